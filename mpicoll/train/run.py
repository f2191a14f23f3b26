"""A whole training run: data in, model and metrics out."""

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from mpi4py import MPI

from .. import __version__
from ..errors import UserError
from ..mpi.guard import on_root
from ..mpi.launch import library_name
from ..mpi.threads import limit_threads
from .data import load
from .files import check_output, write_run
from .loop import Epoch, accuracy, train
from .models import MODELS
from .settings import Settings


def run(
    comm: MPI.Intracomm,
    settings: Settings,
    started: Callable[[dict[str, Any]], None] = lambda facts: None,
    report: Callable[[Epoch], None] = lambda epoch: None,
) -> dict[str, Any]:
    """Train as ``settings`` say and write the output folder; a collective call.  Returns the summary.

    ``started`` gets what is known once the data are there, ``report`` each epoch.  Bad input raises ``UserError`` on
    all ranks, and leaves nothing written.
    """
    out = on_root(comm, lambda: _output(settings, comm.size))
    dtype = np.dtype(settings.dtype)
    data = load(settings.data, comm, dtype)
    model = MODELS[settings.model](data.x.shape[1], data.classes, ())
    facts = {
        "version": __version__,
        "mpi": library_name(),
        "ranks": comm.size,
        "threads_per_rank": limit_threads(comm, settings.threads),
        "train_samples": len(data.x),
        "test_samples": len(data.x_test),
        "features": data.x.shape[1],
        "classes": data.classes,
        "parameters": model.size,
    }
    started(facts)
    result = train(
        comm,
        data,
        model,
        strategy=settings.strategy,
        algorithm=settings.algorithm,
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        lr=settings.lr,
        momentum=settings.momentum,
        seed=settings.seed,
        report=report,
    )
    # Only now is the test set looked at.
    test_accuracy = accuracy(comm, model, result.params, data.x_test, data.y_test)
    shares = (result.agreement_seconds / result.seconds, result.waiting_seconds / result.seconds)
    agreeing, waiting = np.mean(comm.allgather(shares), axis=0).tolist()
    sent = [count for count in comm.allgather(result.bytes_sent) if count is not None]
    summary = {
        **asdict(settings),
        **facts,
        "algorithm": result.algorithm,
        "test_accuracy": test_accuracy,
        "train_loss": result.epochs[-1].train_loss,
        "train_accuracy": result.epochs[-1].train_accuracy,
        "steps": result.steps,
        "seconds": result.seconds,
        "steps_per_s": result.steps / result.seconds,
        "bytes_sent_per_rank": max(sent) if sent else None,  # the most any rank sent
        "comm_fraction": agreeing,
        "wait_fraction": waiting,  # part of comm_fraction
    }
    epochs = [epoch._asdict() for epoch in result.epochs]

    def write() -> str:
        for folder in [out] if settings.out is not None else _numbered(out):
            try:
                final = {**summary, "out": str(folder)}
                write_run(folder, settings.model, model, result.params, data.scaling, final, epochs)
                return str(folder)
            except FileExistsError:  # another run was given the same name, and was faster
                continue
        raise UserError(f"output folder {str(out)!r} was filled by another program; nothing was written")

    return {**summary, "out": on_root(comm, write)}


def _output(settings: Settings, ranks: int) -> Path:
    """The output folder, checked; a new one under runs/ if none is named."""
    if settings.out is not None:
        out = Path(settings.out)
    else:
        name = f"{Path(settings.data).stem}-{settings.model}-{settings.strategy}-p{ranks}"
        named = Path("runs") / f"{time.strftime('%Y%m%d-%H%M%S')}-{name}"
        out = next(folder for folder in _numbered(named) if not folder.exists())
    check_output(out)
    return out


def _numbered(folder: Path) -> Iterator[Path]:
    yield folder
    yield from (folder.with_name(f"{folder.name}-{n}") for n in range(2, 1000))
