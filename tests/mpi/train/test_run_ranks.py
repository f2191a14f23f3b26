"""Whole runs, and what may become of them when they are resumed with other settings."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from mpi4py import MPI
from test_files import strict
from test_strategies import column_stochastic

from mpicoll import Comm, UserError
from mpicoll.train import loop, run_folder, snapshot
from mpicoll.train import run as runs
from mpicoll.train.checkpoint import latest
from mpicoll.train.loop import Training
from mpicoll.train.settings import MAY_CHANGE, NOT_SAVED, Settings, kind_of
from mpicoll.train.strategies.mixing import Gossip

P = MPI.COMM_WORLD.size
pytestmark = [pytest.mark.mpi, pytest.mark.skipif(P > 5, reason="five ranks show what more would, and sooner")]

SMALL: dict[str, Any] = {"model": "softmax", "dtype": "float64", "epochs": 2, "batch_size": 16, "validation": 0.2}

STRATEGIES: list[dict[str, Any]] = [
    {"strategy": "sync", "optimizer": "adam", "compress": "topk:0.3"},
    {"strategy": "average", "every": 3, "outer": "bmuf", "sync_epochs": 1},
    {"strategy": "average", "every": 3, "outer": "easgd"},
    {"strategy": "butterfly", "momenta": "average"},
    {"strategy": "gossip", "graph": "ring"},
    {"strategy": "gossip", "graph": "directed.npy"},
    {"strategy": "gossip", "graph": "ring", "compress": "topk:0.3"},
    {"strategy": "ad-psgd", "delays": 1, "graph": "ring"},
    {"strategy": "async", "staleness": "0"},
    {"strategy": "async", "delays": 1, "optimizer": "adam"},
]

CHANGES: list[dict[str, Any]] = [
    {"epochs": 4, "patience": 7, "checkpoint": 4, "threads": 1, "test": "other.npz"},
    {"data": "longer.npz"},
    {"graph": "complete"},
    {"graph": "directed.npy"},
    {"balance": "auto"},
    {"balance": ",".join(["1", "2", "3", "4", "5"][:P]), "data": "other.npz"},
    {"grid": f"tensor={P}"},
    {"cut": "1"},
    {"micro": 2},
    {"pipeline": "gpipe"},
    {"recompute": True},
]
"""What settings that may change become."""


def seed(folder: Path) -> None:
    """Data and graphs."""
    rng = np.random.default_rng(0)
    for name, samples in {"data": 60, "other": 60, "longer": 97}.items():
        y = np.arange(samples) % 3
        x = rng.normal(size=(samples, 4)) + y[:, np.newaxis]
        np.savez(folder / f"{name}.npz", X=x, y=y)
    np.save(folder / "directed.npy", column_stochastic(P))
    np.save(folder / "other.npy", (column_stochastic(P) + np.eye(P)) / 2)


@pytest.fixture
def place(comm: MPI.Intracomm, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A folder with data and graphs is the current one; in memory, since there are many runs."""
    made = (
        tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) if comm.rank == 0 else None
    )
    folder = Path(comm.bcast(made and made.name))
    if made:
        seed(folder)
    comm.Barrier()
    with monkeypatch.context() as patch:
        patch.chdir(folder)
        yield
    comm.Barrier()
    if made:
        made.cleanup()


class Held(NamedTuple):
    """What ranks would agree on, and how far the models at which they take gradients are from it."""

    consensus: np.ndarray
    apart: float


def held(training: Training) -> Held:
    consensus = training.strategy.consensus()
    apart = float(np.abs(training.strategy.point() - consensus).max())
    return Held(training.whole(consensus), training.world.allreduce(apart, MPI.MAX))


class Log:
    """Of all runs: what was held when they were saved, and when they were restored; and the best loss as they began."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.saved: list[Held] = []
        self.restored: list[Held] = []
        self.trainings: list[Training] = []
        self.best: list[tuple[float, int]] = []
        save, restore, train = snapshot.save, snapshot.restore, Training.run

        def saving(training: Training, *args: Any) -> Path:
            self.saved.append(held(training))
            return save(training, *args)

        def restoring(training: Training, checkpoint: Any) -> None:
            restore(training, checkpoint)
            self.restored.append(held(training))
            self.trainings.append(training)

        def running(training: Training, *args: Any) -> Any:
            self.best.append(training.best)
            return train(training, *args)

        patch.setattr(Training, "run", running)
        patch.setattr(snapshot, "save", saving)
        patch.setattr(snapshot, "restore", restoring)


def train(comm: MPI.Intracomm, settings: Settings, resume: str | None = None) -> dict[str, Any]:
    summary = runs.run(Comm(comm), settings, Path(resume) if resume else None)
    comm.Barrier()
    return summary


def copied(comm: MPI.Intracomm, run: str, to: str) -> None:
    comm.Barrier()
    if comm.rank == 0:
        shutil.rmtree(to, ignore_errors=True)
        shutil.copytree(run, to)
    comm.Barrier()


def refused(given: dict[str, Any], change: dict[str, Any]) -> str | None:
    """Why that may not become of it, where it may not."""
    strategy, graph = given["strategy"], change.get("graph")
    if graph and strategy not in ("gossip", "ad-psgd"):
        return "--graph is not for the"
    if graph == "directed.npy" and "compress" in given and P > 1:
        return "needs a symmetric graph"
    if "balance" in change and (strategy == "ad-psgd" or "delays" in given):
        return "--balance has nothing to share out"
    if "grid" in change and P > 1:
        if strategy in ("ad-psgd", "async"):
            return f"is not for the {strategy} strategy"
        return "expected a graph of 1 ranks" if ".npy" in given.get("graph", "") else None
    return "is for stages" if {"cut", "micro", "pipeline", "recompute"} & {*change} else None


@pytest.mark.parametrize("given", STRATEGIES, ids=lambda given: "-".join(map(str, given.values())))
def test_what_may_change_means_what_it_meant(comm, place, monkeypatch, given):
    """It is refused in one line, or ranks go on from what they would have agreed on, and no farther apart."""
    assert {name for change in CHANGES for name in change} == {*MAY_CHANGE}
    log = Log(monkeypatch)
    before = Settings(data="data.npz", out="run", **SMALL, **given)
    train(comm, before)
    last = log.saved[-1]
    for change in CHANGES:
        copied(comm, "run", "again")
        changed = replace(before, out=None, **{"epochs": 3, **change})
        why = refused(given, change)
        if why is not None:
            with pytest.raises(UserError, match=why) as caught:
                train(comm, changed, "again")
            assert "\n" not in str(caught.value)
            continue
        summary = train(comm, changed, "again")
        now = log.restored[-1]
        np.testing.assert_allclose(now.consensus, last.consensus, rtol=1e-12, atol=1e-14, err_msg=str(change))
        assert now.apart <= last.apart * (1 + 1e-9), change
        assert (summary["epochs_done"], summary["out"]) == (changed.epochs, "again")
        assert latest(Path("again")).facts["epoch"] == changed.epochs, change


@pytest.mark.skipif(P == 1, reason="needs other ranks")
@pytest.mark.parametrize("compress", [None, "topk:0.3"])
def test_every_graph_goes_on_from_every_other(comm, place, monkeypatch, compress):
    """Numerators of push-sum are no models, and nothing is known of ranks that were no neighbors."""
    log = Log(monkeypatch)
    graphs = ["ring", "star"] if compress else ["ring", "exponential", "directed.npy", "other.npy"]
    for graph in graphs:
        before = Settings(data="data.npz", out="run", **SMALL, strategy="gossip", graph=graph, compress=compress)
        if comm.rank == 0:
            shutil.rmtree("run", ignore_errors=True)
        comm.Barrier()
        train(comm, before)
        last, before_digest = log.saved[-1], latest(Path("run")).facts["environment"]["graph"]
        for other in graphs:
            copied(comm, "run", "again")
            summary = train(comm, replace(before, out=None, graph=other, epochs=3), "again")
            now, strategy = log.restored[-1], log.trainings[-1].strategy
            np.testing.assert_allclose(now.consensus, last.consensus, rtol=1e-12, atol=1e-14)
            assert now.apart <= last.apart * (1 + 1e-9)
            means_else = before_digest != strategy.digest if compress else (".npy" in graph) != (".npy" in other)
            assert any("are averaged" in change for change in summary["changed"]) is means_else
            assert means_else or now.apart == pytest.approx(last.apart)  # nothing begins anew without need
            assert isinstance(strategy, Gossip)
            assert strategy.push is None or strategy.push.weights.sum() == pytest.approx(P)


def test_what_may_not_change_is_refused_by_name(comm, place):
    before = Settings(data="data.npz", out="run", **SMALL)
    train(comm, before)
    if comm.rank:
        return
    names = [field.name for field in fields(Settings) if field.name not in (*MAY_CHANGE, *NOT_SAVED)]
    assert len(names) > 30
    for name in names:
        value = getattr(before, name)
        kind = kind_of(name)
        other = f"{value}x" if kind is str else not value if kind is bool else kind(value or 0) + 1
        with pytest.raises(
            UserError, match=rf"^--{name.replace('_', '-')} is .* was .*: of a resumed run only"
        ) as caught:
            runs._checkpoint(Path("run"), replace(before, **{name: other}))
        assert "\n" not in str(caught.value)


def test_checkpoints_of_before_do_not_say_what_they_mean(comm, place, monkeypatch):
    """Of the same graph they go on as they were, of another from the mean; and what states held more is left alone."""
    log = Log(monkeypatch)
    before = Settings(data="data.npz", out="run", **SMALL, strategy="gossip", graph="directed.npy")
    train(comm, before)
    if comm.rank == 0:
        manifest = latest(Path("run")).path / "manifest.json"
        facts = json.loads(manifest.read_text())
        assert facts.pop("meaning") == ("push-sum" if P > 1 else "")
        manifest.write_text(json.dumps(facts))
    comm.Barrier()
    last = log.saved[-1]
    for graph in ("directed.npy", "ring"):
        copied(comm, "run", "again")
        train(comm, replace(before, out=None, graph=graph, epochs=3), "again")
        now = log.restored[-1]
        np.testing.assert_allclose(now.consensus, last.consensus, rtol=1e-12, atol=1e-14)
        assert now.apart <= last.apart * (1 + 1e-9)


@pytest.mark.parametrize(
    ("change", "known"),
    [
        ({}, True),
        ({"patience": 2}, True),
        ({"data": "other.npz"}, False),
        ({"data": "longer.npz"}, False),
        ({"patience": None}, False),
    ],
)
def test_the_best_model_of_other_data_is_not_the_best(comm, place, monkeypatch, change, known):
    """Nor is it if nobody asks for the best any more."""
    log = Log(monkeypatch)
    before = Settings(data="data.npz", out="run", **SMALL, patience=5)
    train(comm, before)
    summary = train(comm, replace(before, out=None, epochs=3, **change), "run")
    loss, epoch = log.best[-1]
    assert epoch == 2
    assert (loss < np.inf) is known
    assert (summary["best_epoch"] is None) is ("patience" in change and change["patience"] is None)


def test_a_run_that_stopped_early_says_so_and_is_left_as_it_was(comm, place, monkeypatch):
    """A loss that gets worse, or never is any number, as it is then."""
    for losses in ([1.0, 2.0, 3.0, 4.0], [np.nan] * 4):
        with monkeypatch.context() as patch:
            patch.setattr(loop, "evaluate", partial(lambda left, *args: (next(left), 0.5), iter(losses)))
            settings = Settings(data="data.npz", out="run", **{**SMALL, "epochs": 9, "patience": 2})
            if comm.rank == 0:
                shutil.rmtree("run", ignore_errors=True)
            comm.Barrier()
            summary = train(comm, settings)
        done, best = summary["epochs_done"], 1 if losses[0] == 1 else 0
        assert done == best + 2
        told = (Path("run") / "summary.json").read_bytes()
        with pytest.raises(
            UserError, match=f"stopped early, after epoch {done}: .* since epoch {best} .--patience 2.; to go on"
        ) as caught:
            train(comm, settings, "run")
        assert "\n" not in str(caught.value)
        assert (Path("run") / "summary.json").read_bytes() == told
        comm.Barrier()
        if comm.rank == 0:
            (Path("run") / "summary.json").unlink()  # killed before it was written
        comm.Barrier()
        assert train(comm, settings, "run")["epochs_done"] == done
        assert train(comm, replace(settings, patience=9), "run")["epochs_done"] == 9


def test_numbers_that_are_not_finite_are_null_and_told(comm, place, monkeypatch):
    losses = iter([1.0, np.nan])
    monkeypatch.setattr(loop, "evaluate", lambda *args: (next(losses), 0.5))
    monkeypatch.setattr(runs, "evaluate", lambda *args: (-np.inf, 0.5))
    given = {"data": "data.npz", "strategy": "gossip", "graph": "ring", "patience": 3}
    summary = train(comm, Settings(out="run", **SMALL, **given))
    assert summary["not_finite"] == ["test_loss", "validation_loss"]
    assert (summary["test_loss"], summary["validation_loss"], summary["validation_accuracy"]) == (None, None, 0.5)
    for path in Path("run").rglob("*.json"):
        strict(path.read_text())
    lines = [strict(line) for line in (Path("run") / run_folder.METRICS).read_text().splitlines()]
    assert [line["validation_loss"] for line in lines] == [1.0, None]
    assert strict((Path("run") / run_folder.SUMMARY).read_text()) == summary
    assert {name: summary[name] for name in asdict(Settings()) if name in given} == given
