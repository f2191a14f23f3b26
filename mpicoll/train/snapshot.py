"""The state of a training run as tensors of a checkpoint, and back.

A checkpoint of a split model holds the arrays of the whole model.
"""

from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError
from ..mpi.collectives import bcast
from ..mpi.together import on_all, on_root
from . import checkpoint as checkpoints
from .checkpoint import Checkpoint
from .loop import Training

FACTORS = "strategy.q"
"""The tensor of the factors that PowerSGD begins with the next time, one for each matrix that a rank has a part of."""


def save(training: Training, folder: Path, facts: dict[str, Any]) -> Path:
    """Write a checkpoint of the run into ``folder``, a collective call; ``facts`` are added to its manifest."""
    split, strategy = training.split, training.strategy
    tensors = {"params": training.params}
    tensors |= {f"optimizer.{name}": vector for name, vector in training.optimizer.state.items()}
    tensors |= {f"strategy.{name}": array for name, array in strategy.state().items()}
    if training.best_params is not None:
        tensors["best"] = training.best_params
    if split:
        tensors = {n: split.whole(array) if _is_long(training, n) else array for n, array in tensors.items()}
        if FACTORS in tensors:
            tensors[FACTORS] = split.gathered(tensors[FACTORS])
    where = {
        "epoch": training.epoch,
        "step": training.step,
        "seconds": training.seconds,
        "optimizer_steps": training.optimizer.steps,
        "best": training.best if training.settings.patience is not None else None,
        "weights": training.weights,
        "ranks": training.comm.size,
        "meaning": strategy.meaning,
        "layout": _layout(training),
    }
    writes = (training.comm.rank == 0 or not strategy.one_file) and (not split or split.grid.leads)
    number = training.comm.rank if writes else None
    return checkpoints.save(folder, training.world, {**where, **facts}, tensors, number)


def is_own(training: Training, checkpoint: Checkpoint) -> bool:
    """Whether ranks continue with their own arrays: their number and the ``meaning`` of arrays are as before."""
    facts, strategy = checkpoint.facts, training.strategy
    same = facts.get("meaning") == strategy.meaning
    if "meaning" not in facts:  # it is older, and what it means may depend on the graph
        same = facts["environment"].get("graph", strategy.digest) == strategy.digest
    return checkpoint.ranks == training.comm.size and same


def restore(training: Training, checkpoint: Checkpoint) -> None:
    """Continue from a checkpoint; a collective call.

    Each rank takes its own arrays if it can continue with them (``is_own``); otherwise all ranks take the mean.
    """
    facts, own, split, strategy = checkpoint.facts, is_own(training, checkpoint), training.split, training.strategy
    tensors = _read(training, checkpoint, own)
    if split:
        tensors = {n: split.part(array) if _is_long(training, n) else array for n, array in tensors.items()}
    training.params[:] = training.arrays.asarray(tensors["params"])
    for name, vector in training.optimizer.state.items():
        vector[:] = np.asarray(tensors[f"optimizer.{name}"], like=vector)
    if FACTORS in tensors:
        initial = strategy.state()[FACTORS.removeprefix("strategy.")]
        if facts.get("layout") != _layout(training):
            tensors[FACTORS] = initial  # those of other matrices are of no use
        elif split:
            tensors[FACTORS] = split.own(tensors[FACTORS], initial.size)
    state = {name.removeprefix("strategy."): tensors[name] for name in tensors if name.startswith("strategy.")}
    training.epoch, training.step, training.optimizer.steps = facts["epoch"], facts["step"], facts["optimizer_steps"]
    strategy.restore(state, own)
    training.seconds = training.resumed_seconds = facts["seconds"]
    settings = training.settings
    if settings.balance == "auto" and len(facts.get("weights") or ()) == training.comm.size:
        training.weights = facts["weights"]
    training.begin_patience()  # it may be new
    if facts["best"] is not None and settings.patience is not None:
        loss, epoch = facts["best"]
        training.best = np.inf if loss is None else loss, epoch
        training.best_params = training.arrays.asarray(tensors["best"]) if "best" in tensors else None


def _read(training: Training, checkpoint: Checkpoint, own: bool) -> dict[str, np.ndarray]:
    """Read the tensors of this rank if ``own``, otherwise the mean of those of all ranks; a collective call."""
    world, split = training.world, training.split
    size = (split.model if split else training.model).size
    vectors = ["params", *(f"optimizer.{name}" for name in training.optimizer.state)]

    def read(rank: int) -> dict[str, np.ndarray]:
        tensors = checkpoint.tensors(rank)
        if any(name not in tensors or tensors[name].shape != (size,) for name in vectors):
            raise UserError(
                f"checkpoint {str(checkpoint.path)!r} is that of another model than {size} parameters: "
                "were the data changed?"
            )
        return tensors

    if own or len(checkpoint.files) == 1:
        return on_all(world, lambda: read(training.comm.rank))
    held: list[dict[str, np.ndarray]] = []

    def average() -> None:
        tensors = read(0)
        sums = {name: tensors[name].astype(np.float64) for name in vectors}
        for rank in range(1, checkpoint.ranks):
            others = read(rank)
            for name in vectors:
                sums[name] += others[name]
        held.append({**tensors, **{name: total / checkpoint.ranks for name, total in sums.items()}})

    on_root(world, average)  # or every file would be read by every rank
    kinds = {name: (array.shape, array.dtype) for name, array in held[0].items()} if held else None
    kinds = world.bcast(kinds)
    tensors = held[0] if held else {name: np.empty(*kind) for name, kind in kinds.items()}
    for name in kinds:
        bcast(tensors[name], world)
    return tensors


def _is_long(training: Training, name: str) -> bool:
    """Whether the last axis of a tensor is as long as the parameters."""
    return not name.startswith("strategy.") or name.removeprefix("strategy.") in training.strategy.vectors


def _layout(training: Training) -> str | None:
    """The layout of the matrices that PowerSGD's factors belong to; ``None`` for those of the whole model."""
    return training.split.layout if training.split else None
