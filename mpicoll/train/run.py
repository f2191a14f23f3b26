"""A whole training run: data in, model and metrics out."""

import platform
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
from mpi4py import MPI

from .. import __version__
from ..errors import UserError
from ..job.blas import limit_threads
from ..mpi.gpu.assignment import Gpu
from ..mpi.launch import library_name
from ..mpi.together import on_root
from . import run_folder, snapshot
from .checkpoint import Checkpoint, latest
from .checks import check
from .data import TEST_SHARE, Dataset, fingerprint, load, untrained
from .grid import Grid, sizes_of
from .loop import Epoch, Training, added, evaluate
from .models import MODELS, Layered
from .readers.raw import Schema
from .scaling import Scaling
from .settings import MAY_CHANGE, NOT_SAVED, OF_PIPELINES, Settings, flag
from .split import Split

DEPENDS = (
    "version",
    "mpi",
    "numpy",
    "python",
    "machine",
    "ranks",
    "grid",
    "threads_per_rank",
    "data_crc32",
    "shares",
    "graph",
    "gpu",
    "cupy",
)
"""Facts that the bits of a run depend on, beside its settings."""

OF_RANKS = ("data_crc32", "shares", "graph", "gpu")
"""Facts among these that change with the number of ranks."""


def run(
    comm: MPI.Intracomm,
    settings: Settings,
    resume: Path | None = None,
    started: Callable[[dict[str, Any]], None] = lambda facts: None,
    opened: Callable[[Path], None] = lambda folder: None,
    report: Callable[[Epoch], None] = lambda epoch: None,
) -> dict[str, Any]:
    """Train by ``settings``, write the output folder, and return the summary; a collective call.

    Parameters
    ----------
    comm
        A ``mpicoll.Comm``.
    settings
        The same on all ranks.
    resume
        The folder of a run to continue from its latest checkpoint, or the folder of a checkpoint.
    started, opened, report
        Called on every rank: with the facts of the run once the data are loaded, with the output folder once it exists,
        and with each epoch.

    Raises
    ------
    UserError
        On all ranks, for input that cannot be used; nothing is written then.
    """
    _check_same(comm, settings, resume)
    check(settings)
    sizes = sizes_of(settings.grid, comm.size)
    checkpoint = on_root(comm, lambda: _checkpoint(resume, settings)) if resume else None
    _check_pipeline(settings, sizes.pipe, checkpoint)
    out = checkpoint.path.parent.parent if checkpoint else on_root(comm, lambda: _output(settings, comm.size))
    grid = Grid(comm, sizes) if sizes.group > 1 else None
    beside = grid.data if grid else comm  # those who are to agree on what this rank has
    schema, scaling = (checkpoint.facts.get(name) if checkpoint else None for name in ("schema", "scaling"))
    data = load(
        settings.data,
        beside,
        np.dtype(settings.dtype),
        test=settings.test,
        shards=settings.shards,
        test_share=settings.test_share,
        validation=settings.validation,
        seed=settings.seed,
        known=schema and Schema.of(schema),
        scaling=scaling and Scaling(*np.array(scaling)),
    )
    crc, is_dense = fingerprint(data, beside), isinstance(data.train.x, np.ndarray)
    unseen = untrained(data, beside)
    before = str(checkpoint.facts["environment"].get("data_crc32")) if checkpoint and schema is None else crc
    if checkpoint and crc != before:
        raise UserError(
            f"checkpoint {str(checkpoint.path)!r} was written by an earlier version, and {settings.data!r} now gives "
            "other training samples: test sets were drawn, and labels read, in another way; "
            + ("resume it on as many ranks" if crc.count(".") != before.count(".") else "start the run anew")
        )
    model = MODELS[settings.model](data.features, data.classes, settings.widths)
    own = _split(model, grid, settings) if grid else model
    threads = limit_threads(comm, settings.threads)
    training = Training(beside, data, own, settings)
    data = training.data  # what this rank needs of it
    facts = {
        "version": __version__,
        "mpi": library_name(),
        "numpy": np.__version__,
        "cupy": training.arrays.__version__ if training.gpu else None,
        "gpu": gpus(training.gpu, comm) if training.gpu else None,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "ranks": comm.size,
        "grid": str(sizes) if grid else None,
        "threads_per_rank": threads,
        "data_crc32": crc,
        "graph": training.strategy.digest,
        "train_samples": data.train.total,
        "validation_samples": data.validation.total,
        "test_samples": data.test.total,
        "shares": list(data.counts) if data.sharded else None,
        "features": data.features,
        "classes": data.classes,
        "layout": data.layout,
        "assumed": list(data.assumed),
        "untrained": unseen,
        "parameters": model.size,
        "parameters_held": comm.allgather(own.size) if grid else None,
    }
    hosts = comm.gather(socket.gethostname())
    mixed = checkpoint is not None and bool(checkpoint.facts.get("mixed"))
    if checkpoint:
        snapshot.restore(training, checkpoint)
        if _other_data(checkpoint, crc):
            training.begin_patience()
            mixed = True
        if mixed:
            facts["assumed"] = [*data.assumed, *_drawn_anew(data)]
        facts["resumed"] = {"from": str(checkpoint.path), "epoch": training.epoch, "step": training.step}
        facts["changed"] = _changed(checkpoint, facts, settings, beside.size, snapshot.is_own(training, checkpoint))
    started(facts)

    with ExitStack() as held:

        def begin() -> Path:
            """Make the folder, once there is something to put into it."""
            now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
            environment = {**facts, "hosts": hosts, "command": sys.argv, "started": now}
            for folder in [out] if settings.out is not None else _numbered(out):
                try:
                    run_folder.begin(folder, settings, environment)
                    held.enter_context(run_folder.locked(folder))
                    return folder
                except FileExistsError:  # another run was given the same name, and was faster
                    continue
            raise UserError(f"output folder {str(out)!r} was filled by another program; nothing was written")

        def go_on() -> Path:
            """Make the folder of a resumed run what it was at the checkpoint."""
            assert checkpoint is not None
            held.enter_context(run_folder.locked(out))
            run_folder.resume(out, settings, checkpoint)
            return out

        folder = on_root(comm, go_on) if checkpoint else None
        if folder:
            opened(folder)

        def epoch_done(epoch: Epoch) -> None:
            nonlocal folder
            if folder is None:
                folder = on_root(comm, begin)
                opened(folder)
            where = folder
            known = {name: value for name, value in epoch._asdict().items() if value is not None}
            on_root(comm, lambda: run_folder.add_metrics(where, known))
            report(epoch)

        def save(training: Training) -> None:
            every = settings.checkpoint
            if every and folder is not None and (training.epoch % every == 0 or training.epoch == settings.epochs):
                pinned = {
                    "settings": asdict(settings),
                    "environment": {name: facts[name] for name in DEPENDS},
                    "schema": data.schema.facts(),
                    "mixed": mixed,
                    "scaling": np.array(data.scaling).tolist() if is_dense else None,
                }
                snapshot.save(training, folder / run_folder.CHECKPOINTS, pinned)

        result = training.run(epoch_done, save)
        # Only now is the test set looked at.
        params = training.arrays.asarray(own.part(result.params)) if isinstance(own, Split) else result.params
        test_loss, test_accuracy = evaluate(beside, own, params, data.test, data.sharded)
        assert folder is not None
        where = folder

        def finish() -> dict[str, Any]:
            lines = run_folder.read_metrics(where)
            last = lines[-1]
            sent = [rank.bytes_sent for rank in result.ranks if rank.bytes_sent is not None]
            spent = sum(rank.seconds for rank in result.ranks) or 1.0
            summary = {
                **asdict(settings),
                **facts,
                "graph": settings.graph,
                "algorithm": result.algorithm,
                "test_accuracy": test_accuracy,
                "test_loss": test_loss,
                **{name: last.get(name) for name in ("train_loss", "train_accuracy")},
                **{name: last.get(name) for name in ("validation_loss", "validation_accuracy")},
                "weights": last.get("weights"),
                "best_epoch": training.best[1] if training.best_params is not None else None,
                "consensus": result.consensus,
                "staleness": added(line.get("staleness", []) for line in lines) or None,
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
            # Of an epoch what is null was not finite: what there is not has no key.
            lost = {name for name, value in last.items() if value is None and name in summary}
            lost |= {name for name, value in summary.items() if isinstance(value, float) and not isfinite(value)}
            summary |= {**dict.fromkeys(lost), "not_finite": sorted(lost)}
            run_folder.finish(where, settings, model, result.params, data, summary)
            return summary

        summary = on_root(comm, finish)
        if grid:
            grid.free()
        return summary


def _check_pipeline(settings: Settings, stages: int, checkpoint: Checkpoint | None) -> None:
    """Raise a ``UserError`` for pipeline settings of a run without stages, unless a resumed run had them before."""
    before = checkpoint.facts["settings"] if checkpoint else {}
    for name in OF_PIPELINES if stages == 1 else ():
        if getattr(settings, name) not in (None, False, before.get(name)):
            raise UserError(f"{flag(name)} is for stages, as --grid pipe=2 makes them: leave it out")


def _split(model: Layered, grid: Grid, settings: Settings) -> Split:
    """Return this rank's part of the model."""
    return Split(
        model,
        grid,
        cuts=settings.cuts if grid.sizes.pipe > 1 else None,
        micro=settings.micro if grid.sizes.pipe > 1 else None,
        pipeline=settings.pipeline or "1f1b",
        recompute=settings.recompute and grid.sizes.pipe > 1,
    )


def gpus(mine: Gpu, comm: MPI.Intracomm) -> list[dict[str, Any]]:
    """Return the GPUs of all ranks, in the order of ranks, each with its ``name`` and ``ranks``; a collective call."""
    everyones = comm.allgather((str(mine), mine.ranks))
    return [{"name": name, "ranks": list(ranks)} for name, ranks in dict.fromkeys(everyones)]


def _check_same(comm: MPI.Intracomm, settings: Settings, resume: Path | None) -> None:
    """Raise a ``UserError`` on all ranks unless all have the same settings; a launcher may give them different ones."""
    told = comm.allgather({**asdict(settings), "resume": str(resume)})
    for rank, other in enumerate(told):
        for name, value in other.items():
            if value != told[0][name]:
                raise UserError(
                    f"{flag(name)} must be the same on all ranks, and is {told[0][name]!r} on rank 0 and {value!r} on "
                    f"rank {rank}: give all of them the same options, environment and configuration"
                )


def _checkpoint(run: Path, settings: Settings) -> Checkpoint:
    found = latest(run)
    folder = found.path.parent.parent
    if settings.out is not None and Path(settings.out).resolve() != folder.resolve():
        raise UserError(f"--out cannot be changed: a resumed run goes on in its folder, {str(folder)!r}")
    for name, value in asdict(settings).items():
        before = found.facts["settings"].get(name, getattr(Settings, name))
        same = value == before or (name == "test_share" and {value, before} == {None, TEST_SHARE})
        if name not in (*MAY_CHANGE, *NOT_SAVED) and not same:
            may = ", ".join(map(flag, MAY_CHANGE))
            now, then = ("not given" if one is None else repr(one) for one in (value, before))
            raise UserError(f"{flag(name)} is {now}, and was {then}: of a resumed run only {may} can be changed")
    done = found.facts["epoch"]
    if done >= settings.epochs and (folder / run_folder.SUMMARY).exists():
        raise UserError(f"{str(folder)!r} has done its {done} epochs; to go on, ask for more with --epochs")
    best = found.facts["best"]
    if best and settings.patience and done - best[1] >= settings.patience and (folder / run_folder.SUMMARY).exists():
        raise UserError(
            f"{str(folder)!r} stopped early, after epoch {done}: no better validation loss since epoch {best[1]} "
            f"(--patience {settings.patience}); to go on, ask for more with --patience"
        )
    return found


def _other_data(checkpoint: Checkpoint, crc: str) -> bool:
    """Whether the training samples have changed, which is known only if the number of shards is as before."""
    before = str(checkpoint.facts["environment"].get("data_crc32", crc))
    return before != crc and before.count(".") == crc.count(".")


def _drawn_anew(data: Dataset) -> list[str]:
    """Lines that say which sets were drawn from other data than before."""
    names = ["test"] * bool(data.drawn and data.test.total) + ["validation"] * bool(data.validation.total)
    advice = "name a test set with --test FILE, or train anew" if "test" in names else "train anew"
    line = (
        f"the run has had other training samples than {data.name!r} gives, so that the {' and the '.join(names)} set "
        f"drawn from it may hold samples that were trained on: {advice}"
    )
    return [line] if names else []


def _changed(checkpoint: Checkpoint, facts: dict[str, Any], settings: Settings, models: int, own: bool) -> list[str]:
    """Lines that name what bits depend on and has changed since the checkpoint.

    ``ranks`` is the number of ranks, or groups, that hold a model each; ``own`` says whether they continue with their
    own models.
    """
    before, ranks = checkpoint.facts["environment"], checkpoint.ranks
    names = [name for name in DEPENDS if ranks == models or name not in OF_RANKS]
    changes = [f"{name} {before.get(name)} -> {facts[name]}" for name in names if before.get(name) != facts[name]]
    epochs = checkpoint.facts["settings"].get("epochs")
    if settings.schedule != "constant" and epochs != settings.epochs:
        changes.append(
            f"epochs {epochs} -> {settings.epochs}, and so the learning rates of the {settings.schedule} schedule"
        )
    for name in ("balance", "cut", "micro"):
        was, now = checkpoint.facts["settings"].get(name), getattr(settings, name)
        if was != now:
            changes.append(f"{name} {was} -> {now}")
    if not own and len(checkpoint.files) > 1:
        changes.append(f"the models and momenta of {ranks} ranks are averaged")
    if not own and settings.compress is not None:
        changes.append(f"the residuals of --compress on {ranks} rank(s) are dropped")
    return changes


def _output(settings: Settings, ranks: int) -> Path:
    """Return the output folder after checking it; a new one under runs/ if none is named."""
    if settings.out is not None:
        out = Path(settings.out)
    else:
        stem = Path(settings.data.partition(":")[0]).stem
        name = f"{stem}-{settings.model}-{settings.strategy}-p{ranks}"
        named = Path("runs") / f"{time.strftime('%Y%m%d-%H%M%S')}-{name}"
        out = next(folder for folder in _numbered(named) if not folder.exists())
    run_folder.check_output(out)
    return out


def _numbered(folder: Path) -> Iterator[Path]:
    yield folder
    yield from (folder.with_name(f"{folder.name}-{n}") for n in range(2, 1000))
