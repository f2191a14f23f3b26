"""A whole training run: data in, model and metrics out."""

import platform
import socket
import sys
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
from . import files
from .checkpoint import Checkpoint, latest
from .data import load
from .loop import Epoch, Training, evaluate
from .models import MODELS
from .settings import Settings
from .strategies import STRATEGIES

DEPENDS = ("version", "mpi", "numpy", "python", "machine", "ranks", "threads_per_rank", "train_samples", "shares")
"""What the bits of a run depend on beside its settings."""


def run(
    comm: MPI.Intracomm,
    settings: Settings,
    resume: Path | None = None,
    started: Callable[[dict[str, Any]], None] = lambda facts: None,
    report: Callable[[Epoch], None] = lambda epoch: None,
) -> dict[str, Any]:
    """Train as ``settings`` say and write the output folder; a collective call.  Returns the summary.

    ``resume`` is the folder of a run to go on with, from its latest checkpoint, or that of a checkpoint.  ``started``
    gets what is known once the data are there, ``report`` each epoch.  Bad input raises ``UserError`` on all ranks, and
    leaves nothing written.
    """
    check(settings)
    checkpoint = on_root(comm, lambda: _checkpoint(resume, settings)) if resume else None
    out = checkpoint.path.parent.parent if checkpoint else on_root(comm, lambda: _output(settings, comm.size))
    data = load(
        settings.data,
        comm,
        np.dtype(settings.dtype),
        test=settings.test,
        shards=settings.shards,
        validation=settings.validation,
    )
    if settings.patience is not None and not data.validation.total:
        raise UserError("patience needs a validation set: give it with --validation 0.1")
    model = MODELS[settings.model](data.features, data.classes, settings.widths)
    threads = limit_threads(comm, settings.threads)
    facts = {
        "version": __version__,
        "mpi": library_name(),
        "numpy": np.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "ranks": comm.size,
        "threads_per_rank": threads,
        "train_samples": data.train.total,
        "validation_samples": data.validation.total,
        "test_samples": data.test.total,
        "shares": list(data.counts) if data.sharded else None,
        "features": data.features,
        "classes": data.classes,
        "parameters": model.size,
    }
    hosts = comm.gather(socket.gethostname())
    training = Training(comm, data, model, settings)
    if checkpoint:
        training.restore(checkpoint)
        facts["resumed"] = {"from": str(checkpoint.path), "epoch": training.epoch, "step": training.step}
        facts["changed"] = _changed(checkpoint, facts)
    started(facts)

    def begin() -> Path:
        """The folder, once there is something to put into it."""
        environment = {**facts, "hosts": hosts, "command": sys.argv, "started": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
        for folder in [out] if settings.out is not None else _numbered(out):
            try:
                files.begin(folder, settings, environment)
                return folder
            except FileExistsError:  # another run was given the same name, and was faster
                continue
        raise UserError(f"output folder {str(out)!r} was filled by another program; nothing was written")

    folder: Path | None = None
    if checkpoint:
        folder = out
        on_root(comm, lambda: files.forget_after(out, training.epoch))

    def epoch_done(epoch: Epoch) -> None:
        nonlocal folder
        if folder is None:
            folder = on_root(comm, begin)
        known = {name: value for name, value in epoch._asdict().items() if value is not None}
        where = folder
        on_root(comm, lambda: files.add_metrics(where, known))
        report(epoch)

    def save(training: Training) -> None:
        every = settings.checkpoint
        if every and folder is not None and (training.epoch % every == 0 or training.epoch == settings.epochs):
            pinned = {"settings": asdict(settings), "environment": {name: facts[name] for name in DEPENDS}}
            training.save(folder / files.CHECKPOINTS, pinned)

    result = training.run(epoch_done, save)
    # Only now is the test set looked at.
    test_loss, test_accuracy = evaluate(comm, model, result.params, data.test, data.sharded)
    assert folder is not None
    where = folder

    def finish() -> dict[str, Any]:
        last = files.read_metrics(where)[-1]
        sent = [rank.bytes_sent for rank in result.ranks if rank.bytes_sent is not None]
        spent = sum(rank.seconds for rank in result.ranks) or 1.0
        summary = {
            **asdict(settings),
            **facts,
            "algorithm": result.algorithm,
            "test_accuracy": test_accuracy,
            "test_loss": test_loss,
            **{name: last.get(name) for name in ("train_loss", "train_accuracy")},
            **{name: last.get(name) for name in ("validation_loss", "validation_accuracy")},
            "best_epoch": training.best[1] if training.best_params is not None else None,
            "consensus": result.consensus,
            "epochs_done": training.epoch,
            "steps": result.steps,
            "seconds": training.seconds,
            "steps_per_s": result.steps / training.seconds,
            "bytes_sent_per_rank": max(sent) if sent else None,  # the most any rank sent
            "comm_fraction": sum(rank.agreeing for rank in result.ranks) / spent,
            "wait_fraction": sum(rank.waiting for rank in result.ranks) / spent,  # part of comm_fraction
            "per_rank": [rank._asdict() for rank in result.ranks],
            "out": str(where),
        }
        files.finish(where, settings, model, result.params, data, summary)
        return summary

    return on_root(comm, finish)


def check(settings: Settings) -> None:
    """A ``UserError`` for a setting that belongs to another strategy than the chosen one."""
    for name in {name: None for strategy in STRATEGIES.values() for name in strategy.options}:
        if getattr(settings, name) is not None and name not in STRATEGIES[settings.strategy].options:
            owners = ", ".join(other for other, strategy in STRATEGIES.items() if name in strategy.options)
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{flag} is not for the {settings.strategy} strategy, but for {owners}: leave it out")


def _checkpoint(run: Path, settings: Settings) -> Checkpoint:
    found = latest(run)
    done = found.facts["epoch"]
    if done >= settings.epochs:
        raise UserError(f"{str(run)!r} has done its {done} epochs; to go on, ask for more with --epochs")
    return found


def _changed(checkpoint: Checkpoint, facts: dict[str, Any]) -> list[str]:
    """What bits depend on, and is not as it was."""
    before = checkpoint.facts.get("environment", {})
    changes = [f"{name} {before.get(name)} -> {facts[name]}" for name in DEPENDS if before.get(name) != facts[name]]
    if checkpoint.ranks != facts["ranks"] and len(checkpoint.files) > 1:
        changes.append(f"the models and momenta of {checkpoint.ranks} ranks are averaged")
    return changes


def _output(settings: Settings, ranks: int) -> Path:
    """The output folder, checked; a new one under runs/ if none is named."""
    if settings.out is not None:
        out = Path(settings.out)
    else:
        stem = Path(settings.data.partition(":")[0]).stem
        name = f"{stem}-{settings.model}-{settings.strategy}-p{ranks}"
        named = Path("runs") / f"{time.strftime('%Y%m%d-%H%M%S')}-{name}"
        out = next(folder for folder in _numbered(named) if not folder.exists())
    files.check_output(out)
    return out


def _numbered(folder: Path) -> Iterator[Path]:
    yield folder
    yield from (folder.with_name(f"{folder.name}-{n}") for n in range(2, 1000))
