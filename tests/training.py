"""Small data and runs for the tests of training."""

from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

from mpicoll.train.data import Dataset, Part
from mpicoll.train.loop import Result, Training
from mpicoll.train.models import MODELS, Layered
from mpicoll.train.readers.raw import Schema
from mpicoll.train.scaling import Scaling
from mpicoll.train.settings import Settings
from mpicoll.train.strategies import STRATEGIES

REPEATABLE: dict[str, dict[str, Any]] = {
    "sync": {},
    "average": {},
    "butterfly": {},
    "gossip": {},
    "ad-psgd": {"delays": 3},
    "async": {"staleness": "0"},
}
"""A row for each strategy: settings with which a run ends with the same bits, however fast ranks are."""

DECENTRAL = [name for name, strategy in STRATEGIES.items() if strategy.in_step and not strategy.replicated]
"""Strategies whose ranks take steps of their own, all in step, and agree on models."""


def blobs(samples: int, dtype: str = "f8", validation: int = 0) -> Dataset:
    """Three classes of points that overlap, the same on all ranks."""
    y = np.arange(samples) % 3
    x = (np.random.default_rng(5).normal(size=(samples, 6)) + y[:, np.newaxis]).astype(dtype)
    held = Part(x[:validation], y[:validation], 0, validation)
    return Dataset(
        train=Part(x, y, 0, samples),
        validation=held,
        test=Part(x[::5], y[::5], 0, len(y[::5])),
        schema=Schema(6, np.arange(3)),
        scaling=Scaling.none(6),
        sharded=False,
        counts=(),
    )


def training(comm: MPI.Intracomm, data: Dataset, **given: Any) -> Training:
    """Of a small network."""
    defaults: dict[str, Any] = {"epochs": 3, "batch_size": 32, "seed": 3, "dtype": str(data.train.x.dtype)}
    settings = Settings(**{**defaults, **given})
    return Training(comm, data, MODELS["mlp"](6, 3, (8,)), settings)


def trained(comm: MPI.Intracomm, data: Dataset, max_steps: int | None = None, **given: Any) -> Result:
    """To the end."""
    return training(comm, data, **given).run(max_steps=max_steps)


def broken_on_the_last_rank(comm: MPI.Intracomm, patch: pytest.MonkeyPatch, where: str) -> None:
    """From now on models have a loss, or a gradient, that is no number there."""
    step = Layered.loss_and_grad

    def broken(self: Any, params: np.ndarray, batch: Any, grad: np.ndarray) -> Any:
        sums = step(self, params, batch, grad)
        if comm.rank == comm.size - 1:
            grad[0] = np.nan if where == "gradient" else grad[0]
            sums = sums._replace(loss=np.nan if where == "loss" else sums.loss)
        return sums

    patch.setattr(Layered, "loss_and_grad", broken)
