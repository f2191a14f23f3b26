"""Checkpoints: whole or not at all, and what is resumed from one ends with the same bits."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI
from test_strategies import column_stochastic

from mpicoll import UserError
from mpicoll.train import checkpoint
from mpicoll.train.checkpoint import latest
from mpicoll.train.loop import Training
from mpicoll.train.snapshot import restore, save
from training import blobs, training

P = MPI.COMM_WORLD.size
pytestmark = [pytest.mark.mpi, pytest.mark.skipif(P > 5, reason="five ranks show what more would, and sooner")]
FACTS: dict[str, Any] = {"settings": {}, "environment": {}}

RUNS: list[dict[str, Any]] = [
    {"strategy": "sync", "optimizer": "adamw", "schedule": "cosine", "warmup": 5},
    {"strategy": "sync", "optimizer": "rmsprop", "clip": 0.5},
    {"strategy": "sync", "optimizer": "adam", "compress": "topk:0.1"},
    {"strategy": "sync", "compress": "powersgd:1"},
    {"strategy": "average", "every": 3, "compress": "sign", "sync_epochs": 1},
    {"strategy": "average", "every": 3, "optimizer": "nesterov", "momenta": "average"},
    {"strategy": "average", "every": 5, "outer": "bmuf", "sync_epochs": 1, "optimizer": "adam", "momenta": "reset"},
    {"strategy": "average", "outer": "easgd", "optimizer": "adagrad"},
    {"strategy": "average", "outer": "slowmo", "schedule": "linear"},
    {"strategy": "butterfly", "optimizer": "adam"},
    {"strategy": "gossip", "graph": "base", "mix_first": True},
    {"strategy": "gossip", "graph": "matching", "momenta": "average"},
    {"strategy": "gossip", "graph": "directed.npy"},
    {"strategy": "gossip", "graph": "ring", "compress": "topk:0.1"},
    {"strategy": "async", "staleness": "0", "compress": "sign"},
    {"strategy": "ad-psgd", "delays": 3, "graph": "ring", "optimizer": "adam"},
    {"strategy": "async", "staleness": "2", "delays": 3, "optimizer": "adam"},
    {"strategy": "async", "staleness": "inf", "delays": 3, "compensate": 0.1},
    {"strategy": "async", "staleness": "0", "optimizer": "nesterov"},
]


def graphs(run: dict[str, Any], folder: Path, comm: MPI.Intracomm) -> dict[str, Any]:
    """With the path of its matrices, if it has any."""
    if not run.get("graph", "").endswith(".npy"):
        return run
    if comm.rank == 0:
        np.save(folder / run["graph"], column_stochastic(comm.size))
    comm.Barrier()
    return {**run, "graph": str(folder / run["graph"])}


def stopped_after(made: Training, epochs: int, folder: Path) -> Path:
    """Train so long, and save."""
    paths: list[Path] = []

    def saving(self: Training) -> None:
        if self.epoch == epochs:
            paths.append(save(self, folder, FACTS))
            raise StopIteration

    with pytest.raises(StopIteration):
        made.run(checkpoint=saving)
    return paths[0]


@pytest.mark.parametrize("run", RUNS, ids=lambda run: "-".join(str(value) for value in run.values()))
def test_a_resumed_run_ends_with_the_same_bits(comm, folder, run):
    given = {**graphs(run, folder, comm), "epochs": 5, "patience": 3}
    data = blobs(101, "f4", validation=20)
    if "optimizer" not in run:  # the best model is that of the first epoch, and kept in the checkpoint
        data = data._replace(validation=data.validation._replace(y=(data.validation.y + 1) % 3))
    whole = training(comm, data, **given).run()
    path = stopped_after(training(comm, data, **given), 2, folder / "checkpoints")
    other = training(comm, data, **{**given, "seed": 3})
    other.params += 1  # all of it comes from the checkpoint
    restore(other, latest(path))
    resumed = other.run()
    assert resumed.params.tobytes() == whole.params.tobytes()
    assert resumed.steps == whole.steps
    for before, after in zip(whole.epochs[2:], resumed.epochs, strict=True):
        assert (before.train_loss, before.consensus, before.validation_loss) == (
            after.train_loss,
            after.consensus,
            after.validation_loss,
        )


@pytest.mark.parametrize("run", RUNS, ids=lambda run: "-".join(str(value) for value in run.values()))
def test_a_run_killed_after_its_last_epoch_is_as_it_was(comm, folder, run):
    given = graphs(run, folder, comm)
    made = training(comm, blobs(101), **given)
    whole = made.run(checkpoint=lambda self: save(self, folder / "checkpoints", FACTS))
    comm.Barrier()
    other = training(comm, blobs(101), **given)
    restore(other, latest(folder))
    resumed = other.run()
    assert resumed.params.tobytes() == whole.params.tobytes()
    assert (resumed.steps, resumed.consensus) == (whole.steps, whole.consensus)


@pytest.mark.skipif(P == 1, reason="needs other numbers of ranks")
@pytest.mark.parametrize("run", RUNS, ids=lambda run: "-".join(str(value) for value in run.values()))
def test_fewer_ranks_go_on_from_the_mean(comm, folder, run):
    data, given = blobs(101), graphs(run, folder, comm)
    made = training(comm, data, **given)
    path = stopped_after(made, 1, folder / "checkpoints")
    mean = comm.allreduce(made.params) / P
    part = comm.Split(comm.rank > 0)  # one rank, and the others
    if comm.rank:
        others = {**given, "graph": "exponential"} if "directed" in str(given.get("graph")) else given
        other = training(part, data, **others)
        restore(other, latest(path))
        np.testing.assert_allclose(other.params, mean, rtol=1e-12)
        assert (other.epoch, other.step) == (1, 4)
        assert other.run().epochs[-1].epoch == 3
    part.Free()


@pytest.mark.skipif(P == 1, reason="needs other numbers of ranks")
@pytest.mark.parametrize("run", RUNS, ids=lambda run: "-".join(str(value) for value in run.values()))
def test_more_ranks_go_on_from_the_model_of_one(comm, folder, run):
    data, given = blobs(101), {**run, "graph": "ring"} if "directed" in str(run.get("graph")) else run
    model = None
    if comm.rank == 0:
        alone = training(MPI.COMM_SELF, data, **given)
        stopped_after(alone, 1, folder / "checkpoints")
        model = alone.strategy.consensus()
    model = comm.bcast(model)
    other = training(comm, data, **graphs(run, folder, comm))
    restore(other, latest(folder))
    np.testing.assert_allclose(other.strategy.consensus(), model, rtol=1e-12)
    assert len({point.tobytes() for point in comm.allgather(other.strategy.point())}) == 1
    assert other.run().epochs[-1].epoch == 3


def saved(comm: MPI.Intracomm, folder: Path, epochs: int = 2, **given: Any) -> list[Path]:
    """Checkpoints of that many epochs, every rank having a file of its own."""
    made = training(comm, blobs(60), strategy="gossip", epochs=epochs, **given)
    made.run(checkpoint=lambda self: save(self, folder / "checkpoints", FACTS))
    comm.Barrier()
    return sorted((folder / "checkpoints").iterdir())


def test_the_latest_are_kept_and_nothing_else(comm, folder):
    kept = saved(comm, folder, epochs=6)
    assert [path.name for path in kept] == ["epoch-00000004", "epoch-00000005", "epoch-00000006"]
    wanted = ["manifest.json", *(f"rank-{rank}.safetensors" for rank in range(P))]
    assert sorted(path.name for path in kept[-1].iterdir()) == sorted(wanted)
    assert latest(folder).path == kept[-1]
    comm.Barrier()
    # One that goes on from an earlier one leaves none of those that came after it.
    made = training(comm, blobs(60), strategy="gossip", epochs=5)
    (folder / "checkpoints/epoch-00000005.bak").mkdir(exist_ok=True)  # somebody else's
    restore(made, latest(kept[0]))
    comm.Barrier()
    if comm.rank == 0:
        (folder / "checkpoints/.epoch-00000007.partial").mkdir()  # of a job that was killed
        checkpoint.drop_after(latest(kept[0]))
        assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == [kept[0].name, "epoch-00000005.bak"]
    made.run(checkpoint=lambda self: save(self, folder / "checkpoints", FACTS))
    comm.Barrier()
    left = [path.name for path in sorted((folder / "checkpoints").iterdir())]
    assert left == ["epoch-00000004", "epoch-00000005", "epoch-00000005.bak"]


def tear(path: Path) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])


def flip(path: Path) -> None:
    whole = bytearray(path.read_bytes())
    whole[-1] ^= 1
    path.write_bytes(whole)


def edited(**facts: Any) -> Callable[[Path], object]:
    return lambda path: path.write_text(json.dumps({**json.loads(path.read_text()), **facts}))


newer = edited(format="mpicoll-checkpoint-9")


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("rank-{last}.safetensors", tear, "torn, or was changed"),
        ("rank-{last}.safetensors", flip, "torn, or was changed"),
        ("rank-{last}.safetensors", Path.unlink, "is missing"),
        ("manifest.json", tear, "manifest.json: "),
        ("manifest.json", newer, "its format is 'mpicoll-checkpoint-9'; this version reads 'mpicoll-checkpoint-1'"),
        ("manifest.json", lambda path: path.write_text("[]"), "its format is None"),
        ("manifest.json", Path.unlink, "No such file"),
        ("manifest.json", edited(best=3), "manifest.json: best is 3"),
        ("manifest.json", edited(epoch="x"), "manifest.json: epoch is 'x'"),
        ("manifest.json", edited(environment=None), "manifest.json: environment is None"),
        ("manifest.json", edited(files={}), f"names the files of 0 of {P} ranks"),
    ],
)
def test_damaged_ones_are_refused_by_all_and_the_one_before_is_offered(comm, folder, name, damage, message):
    before, last = saved(comm, folder)
    if comm.rank == 0:
        damage(last / name.format(last=P - 1))
    comm.Barrier()
    made = training(comm, blobs(60), strategy="gossip")
    with pytest.raises(UserError, match=message) as caught:
        restore(made, latest(folder))
    assert f"; resume from the one before with --resume {before}" in str(caught.value)
    assert len(set(comm.allgather(str(caught.value)))) == 1
    restore(made, latest(before))
    assert made.epoch == 1


def test_one_of_another_model_is_refused(comm, folder):
    saved(comm, folder, epochs=1)
    with pytest.raises(UserError, match=r"is that of another model than .* parameters: were the data changed"):
        restore(training(comm, blobs(60), optimizer="adam"), latest(folder))
    with pytest.raises(UserError, match="holds no checkpoint to resume from: remove it, and start the run anew"):
        latest(folder / "checkpoints")


def test_a_rank_that_cannot_write_stops_all_and_leaves_what_was_there(comm, folder, monkeypatch):
    (before,) = saved(comm, folder, epochs=1)

    def full(*arguments: object, **keywords: object) -> None:
        raise OSError(28, "No space left on device")

    made = training(comm, blobs(60), strategy="gossip", epochs=2)
    restore(made, latest(before))
    if comm.rank == P - 1:
        monkeypatch.setattr("safetensors.numpy.save_file", full)
    with pytest.raises(UserError, match=r"cannot be written .No space left on device.: training stops") as caught:
        made.run(checkpoint=lambda self: save(self, folder / "checkpoints", FACTS))
    assert len(set(comm.allgather(str(caught.value)))) == 1
    comm.Barrier()
    assert list((folder / "checkpoints").iterdir()) == [before]
    assert checkpoint.KEPT >= 2
