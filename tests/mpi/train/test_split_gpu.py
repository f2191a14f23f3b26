"""Models that are split over ranks with GPUs: they compute what they do in host memory, and everything is there.

With a CuPy of ours, or on a real GPU, as in ``test_loop_gpu``.
"""

import time
from collections.abc import Iterator
from typing import Any

import fakecupy
import kernels
import numpy as np
import pytest
from mpi4py import MPI
from scipy.sparse import csr_array
from test_loop_gpu import MOST, REAL, cupy, fake  # noqa: F401
from test_split_ranks import ALL, DEEP, LINEAR, batch, fits, seen_by, shown, stopped_after, training, vector

from mpicoll.mpi.collectives import allgather, allreduce
from mpicoll.mpi.gpu import array, sparse
from mpicoll.mpi.gpu.array import in_host_memory, is_cupy
from mpicoll.train import group
from mpicoll.train import split as split_module
from mpicoll.train.checkpoint import latest
from mpicoll.train.grid import Grid, Sizes
from mpicoll.train.loop import Training
from mpicoll.train.models import Batch, Layered, forward, hinge
from mpicoll.train.run import run
from mpicoll.train.run_folder import read_model
from mpicoll.train.settings import Settings
from mpicoll.train.snapshot import restore
from mpicoll.train.split import Split

P = MPI.COMM_WORLD.size
pytestmark = [pytest.mark.mpi, pytest.mark.skipif(P > MOST, reason=f"{MOST} ranks show what more would, and sooner")]
EVERY_GRID = pytest.mark.parametrize("sizes", ALL, ids=str)


@pytest.fixture
def grid(cupy: Any, sizes: Sizes) -> Iterator[Grid]:  # noqa: F811
    made = Grid(MPI.COMM_WORLD, sizes)
    yield made
    made.free()


def there(found: Batch) -> Batch:
    arrays = array.cupy()
    x = arrays.asarray(found.x) if isinstance(found.x, np.ndarray) else sparse.to_device(found.x)
    return Batch(x, arrays.asarray(found.y))


def close(ours: Any, theirs: Any) -> None:
    np.testing.assert_allclose(np.asarray(ours, float), np.asarray(theirs, float), rtol=1e-9, atol=1e-12)


@EVERY_GRID
def test_losses_gradients_and_predictions_are_those_of_host_memory(grid, sizes):
    """However many samples there are, and more micro-batches than that."""
    arrays = array.cupy()
    for model in (model for model in (LINEAR[0], DEEP[1], DEEP[5]) if fits(model, sizes)):
        for samples in (0, 1, 7, 13):
            split = Split(model, grid, micro=2, recompute=samples == 1)
            params, found = split.part(vector(model)), seen_by(split, batch(model, samples, grid.at.data))
            if samples == 7:
                found = found._replace(x=csr_array(found.x))
            grad, on_gpu = np.empty_like(params), arrays.full(split.size, np.nan)
            theirs = split.loss_and_grad(params, found, grad)
            ours = split.loss_and_grad(arrays.asarray(params), there(found), on_gpu)
            assert all(map(is_cupy, ours))
            close([float(number) for number in ours], theirs)
            close(on_gpu.get(), grad)
        classes = split.predict(arrays.asarray(params), there(found).x)
        assert is_cupy(classes)
        np.testing.assert_array_equal(classes.get(), split.predict(params, found.x))


def made_for(grid: Grid, device: str, **given: Any) -> Training:
    model = DEEP[1] if fits(DEEP[1], grid.sizes) else DEEP[2]
    split = Split(model, grid, **given.pop("of_split", {}))
    return training(grid.data, split, **{"device": device, "batch_size": 32, **given})


SPLIT = [sizes for sizes in ALL if sizes.group > 1]
RUNS: dict[str, dict[str, Any]] = {
    "lazy": {"clip": 0.1, "optimizer": "adam", "patience": 1, "of_split": {"micro": 3, "pipeline": "gpipe"}},
    "random": {"strategy": "average", "every": 3, "compress": "powersgd:1"},
}


@pytest.mark.parametrize("sizes", SPLIT, ids=str)
@pytest.mark.parametrize("mode", RUNS)
def test_training_is_that_of_host_memory(sizes, mode, monkeypatch):
    """In whatever order streams do it."""
    if REAL:
        pytest.skip("tells the fake when to do what")
    with fakecupy.installed(mode=mode, seed=MPI.COMM_WORLD.rank) as made:
        kernels.add(made, monkeypatch)
        grid = Grid(MPI.COMM_WORLD, sizes)
        ours, theirs = (made_for(grid, device, **RUNS[mode]).run() for device in ("gpu", "cpu"))
        np.testing.assert_allclose(ours.params, theirs.params, rtol=1e-9, atol=1e-12)
        for mine, other in zip(ours.epochs, theirs.epochs, strict=True):
            for name in ("train_loss", "train_accuracy", "validation_loss", "validation_accuracy", "consensus"):
                close(shown(mine, name), shown(other, name))
        grid.free()


@pytest.mark.parametrize("sizes", SPLIT, ids=str)
def test_everything_is_there_and_steps_read_back_no_more_than_a_norm(grid, fake, monkeypatch):  # noqa: F811
    held: list[Any] = []

    def watched(layers: Any, x: Any, *more: Any) -> Any:
        values = forward(layers, x, *more)
        held.extend(values)
        return values

    def reads(batch_size: int, clip: float | None) -> int:
        made = made_for(grid, "gpu", epochs=1, batch_size=batch_size, clip=clip)
        before = fake.log.count("get")
        made.run()
        sets = [array for part in made.data[:3] for array in part[:2]]
        assert all(map(is_cupy, [made.params, made.sums, *sets]))
        assert made.gpu is not None
        assert made.gpu.ranks == tuple(range(P))  # of all, not of those that have the same part
        return fake.log.count("get") - before

    few = reads(51, None)
    monkeypatch.setattr(split_module, "forward", watched)
    assert reads(17, 1.0) == few + 3
    assert held
    assert all(map(is_cupy, held))
    assert not fake.pageable_copies


@pytest.mark.parametrize("sizes", SPLIT, ids=str)
def test_times_are_those_of_others_and_not_of_the_gpu(grid, fake, monkeypatch):  # noqa: F811
    """It is waited for before ranks add up, and before the first of them waits for a message of the slow last one.

    Messages are so long that they are under way for a while.
    """
    calls: list[str] = []

    def seen(function: Any) -> Any:
        def watched(*args: Any, **how: Any) -> Any:
            calls.append(function.__name__)
            return function(*args, **how)

        return watched

    def slow(*args: Any) -> Any:
        time.sleep(0.05)
        return forward(*args)

    for function in (allreduce, allgather):
        monkeypatch.setattr(group, function.__name__, seen(function))
    if P > 1 and MPI.COMM_WORLD.rank == P - 1:
        monkeypatch.setattr(split_module, "forward", slow)
    model = Layered((9, 3000, 8, 10), hinge)
    split = Split(model, grid, micro=1)
    params, found = split.part(vector(model)), seen_by(split, batch(model, 40))
    grad, on_gpu = np.empty_like(params), array.cupy().empty(split.size)
    split.loss_and_grad(params, found, grad)
    calls.clear()
    before = fake.log.count("device")
    split.loss_and_grad(array.cupy().asarray(params), there(found), on_gpu)
    waits = fake.log.count("device") - before - len(calls)
    assert waits == 1 if grid.at.pipe == 0 < grid.sizes.pipe - 1 else 0 <= waits <= 3 * (grid.sizes.pipe > 1)
    close(on_gpu.get(), grad)


@pytest.mark.parametrize("sizes", [Sizes(1, 1, P)] if P > 1 else [], ids=str)
def test_a_checkpoint_of_a_grid_of_gpus_is_resumed_on_every_other(comm, grid, folder):
    """And with the same bits on the same."""
    settings = {"optimizer": "adam", "patience": 9}
    whole = made_for(grid, "gpu", **settings).run()
    stopped_after(made_for(grid, "gpu", **settings), 1, folder)
    found = []
    alone = training(comm, DEEP[1], device="gpu", batch_size=32, **settings)
    for other in (made_for(grid, "gpu", **settings), made_for(grid, "cpu", **settings), alone):
        other.params += 1
        restore(other, latest(folder))
        found.append(in_host_memory(other.run().params))
        close(found[-1], whole.params)
    assert found[0].tobytes() == whole.params.tobytes()


@pytest.mark.skipif(P == 1, reason="one rank holds all of it")
def test_a_run_writes_the_whole_model_and_says_how_good_it_is(comm, cupy, folder):  # noqa: F811
    def outcome(device: str) -> tuple[np.ndarray, dict[str, Any]]:
        out = folder / device
        grid = f"{'pipe' if P == 2 else 'tensor'}={P}"
        settings = Settings(
            hidden="8", grid=grid, epochs=1, batch_size=512, dtype="float64", device=device, out=str(out)
        )
        summary = comm.bcast(run(comm, settings))
        return read_model(out)[1], summary

    (ours, summary), (theirs, other) = outcome("gpu"), outcome("cpu")
    close(ours, theirs)
    close(summary["test_loss"], other["test_loss"])
    assert sorted(rank for one in summary["gpu"] for rank in one["ranks"]) == list(range(P))
