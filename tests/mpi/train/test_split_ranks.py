"""Models that are split over ranks are the same models: losses, gradients, predictions, training, checkpoints."""

import time
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI
from safetensors.numpy import save_file
from scipy.sparse import csr_array

from mpicoll import UserError
from mpicoll.mpi import launch
from mpicoll.mpi.engine import account
from mpicoll.pipeline import PIPELINES, Kind
from mpicoll.train import split as split_module
from mpicoll.train.checkpoint import latest
from mpicoll.train.data import from_arrays
from mpicoll.train.flow import Flow
from mpicoll.train.grid import Grid, Sizes
from mpicoll.train.loop import Epoch, Training
from mpicoll.train.models import MODELS, Batch, Layered, Sums, forward, hinge, log_loss
from mpicoll.train.settings import Settings
from mpicoll.train.snapshot import restore, save
from mpicoll.train.split import Split

P, RANK = MPI.COMM_WORLD.size, MPI.COMM_WORLD.rank
pytestmark = pytest.mark.mpi
FACTS: dict[str, Any] = {"settings": {}, "environment": {}}

# Widths that most numbers of shards do not divide, and that are enough for 8 of them.
LINEAR = [MODELS["softmax"](9, 10, ()), MODELS["logistic"](9, 2, ()), MODELS["svm"](9, 2, ()), MODELS["svm"](9, 10, ())]
DEEP = [
    MODELS["mlp"](9, 10, (11,)),
    MODELS["mlp"](9, 10, (8, 13)),  # the outputs are cut
    MODELS["mlp"](9, 10, (9, 11, 8)),
    Layered((9, 8, 9, 11), hinge),
    Layered((9, 10, 9, 8), log_loss),
    Layered((9, 4, 5, 4), log_loss),  # some shards, or all, have one output
]
ALL = [
    Sizes(data, pipe, P // data // pipe)
    for data in range(1, P + 1)
    for pipe in range(1, P // data + 1)
    if P % data == 0 and P // data % pipe == 0
]
EVERY_GRID = pytest.mark.parametrize("sizes", ALL, ids=str)
# Of eight ranks, those that no fewer ranks have, for what takes long.
SOME = [sizes for sizes in ALL if P < 8 or min(sizes) > 1]


@pytest.fixture(scope="module")
def grids() -> Iterator[dict[Sizes, Grid]]:
    """All of them, made once: they take longer than most of what is tested on them."""
    made = {sizes: Grid(MPI.COMM_WORLD, sizes) for sizes in ALL}
    yield made
    for grid in made.values():
        grid.free()


@pytest.fixture
def grid(grids: dict[Sizes, Grid], sizes: Sizes) -> Grid:
    return grids[sizes]


def fits(model: Layered, sizes: Sizes) -> bool:
    return sizes.pipe < len(model.sizes) and (len(model.sizes) == 2 or sizes.tensor <= min(model.sizes))


def batch(model: Layered, samples: int, seed: int = 0) -> Batch:
    rng = np.random.default_rng([seed, samples])
    return Batch(rng.normal(size=(samples, 9)), rng.integers(model.sizes[-1], size=samples))


def vector(model: Layered) -> np.ndarray:
    rng = np.random.default_rng(7)
    return model.initial(rng, np.dtype("f8")) + rng.normal(size=model.size) * 0.1


def seen_by(split: Split, found: Batch) -> Batch:
    """What a rank needs of it."""
    return found._replace(x=split.own_features(found.x))


def gradient(split: Split, params: np.ndarray, found: Batch) -> tuple[Sums, np.ndarray]:
    """The whole, from each rank's part."""
    grad = np.full(split.size, np.nan)
    sums = split.loss_and_grad(split.part(params), seen_by(split, found), grad)
    return sums, split.whole(grad)


def added(model: Layered, params: np.ndarray, found: Batch, micro: int) -> tuple[Sums, np.ndarray]:
    """Those of micro-batches, added up by one process."""
    loss, correct, total = 0.0, 0, np.zeros(model.size)
    n = len(found.y)
    for m in range(min(micro, n)):
        part, grad = slice(n * m // min(micro, n), n * (m + 1) // min(micro, n)), np.empty(model.size)
        sums = model.loss_and_grad(params, Batch(found.x[part], found.y[part]), grad)
        loss, correct, total = loss + sums.loss, correct + sums.correct, total + grad if m else grad
    return Sums(loss, correct), total


@EVERY_GRID
@pytest.mark.parametrize("samples", [0, 1, 13])
def test_losses_gradients_and_predictions_are_those_of_the_whole_model(grid, sizes, samples):
    for model in filter(lambda model: fits(model, sizes), LINEAR + DEEP):
        params, found = vector(model), batch(model, samples, grid.at.data)
        split = Split(model, grid)
        expected, total = added(model, params, found, 1)
        sparse = Batch(csr_array(found.x), found.y)
        for given in (found, sparse):
            sums, grad = gradient(split, params, given)
            np.testing.assert_allclose(sums.loss, expected.loss, rtol=1e-12)
            assert sums.correct == expected.correct
            np.testing.assert_allclose(grad, total, rtol=1e-9, atol=1e-12)
        assert len(set(grid.group.allgather((float(sums.loss), sums.correct)))) == 1
        classes = split.predict(split.part(params), split.own_features(found.x))
        np.testing.assert_array_equal(classes, model.predict(params, found.x))
        np.testing.assert_allclose(split.norm(split.part(grad)), np.linalg.norm(grad))
        np.testing.assert_array_equal(split.whole(split.part(params)), params)
        needed = split.own_features(found.x).shape[1]
        assert needed == (0 if grid.at.pipe else split.tensors(params[: split.size])["layer0.weight"].shape[0])


@EVERY_GRID
def test_the_first_of_equal_outputs_wins(grid, sizes):
    for model in filter(lambda model: fits(model, sizes), LINEAR + DEEP):
        split, x = Split(model, grid), batch(model, 5).x
        np.testing.assert_array_equal(split.predict(np.zeros(split.size), split.own_features(x)), np.zeros(5))


@pytest.mark.parametrize("sizes", [sizes for sizes in ALL if 1 < sizes.pipe <= 4 and sizes.tensor == 1], ids=str)
@pytest.mark.parametrize("pipeline", PIPELINES)
@pytest.mark.parametrize("recompute", [False, True])
def test_pipelines_have_the_bits_of_one_process_and_hold_what_they_promise(grid, sizes, pipeline, recompute):
    for model in (model for model in DEEP if fits(model, sizes)):
        params = vector(model)
        for micro, samples in ((1, 5), (2, 4), (3, 13), (7, 13), (7, 3)):
            found = batch(model, samples)
            split = Split(model, grid, micro=micro, pipeline=pipeline, recompute=recompute)
            expected, total = added(model, params, found, micro)
            sums, grad = gradient(split, params, found)
            assert sums == expected
            assert grad.tobytes() == total.tobytes()
            parts = min(micro, samples)
            assert split.held == PIPELINES[pipeline].held(grid.at.pipe, sizes.pipe, parts)
            told = account(np.zeros(2), grid.group)  # of loss and correct predictions
            ahead, back = grid.at.pipe < sizes.pipe - 1, grid.at.pipe > 0
            assert split.spent.messages == told.messages + parts * (ahead + back)
            layers = list(split.tensors(np.empty(split.size)).values())[::2]
            widths = ahead * layers[-1].shape[1] + back * layers[0].shape[0]
            assert split.spent.bytes_sent == told.bytes_sent + 8 * samples * widths


@pytest.mark.parametrize("sizes", [Sizes(1, P, 1)] if P in (2, 3, 4) else [], ids=str)
@pytest.mark.parametrize("pipeline", PIPELINES)
@pytest.mark.parametrize("leak", [False, True])
def test_arrays_are_gone_when_they_are_of_no_more_use(grid, sizes, pipeline, leak, monkeypatch):
    """Of no more micro-batches than a stage holds there are inputs of layers; what was received, or sent, goes."""
    split, micro, kept = Split(DEEP[2], grid, micro=6, pipeline=pipeline), 6, []
    params, found = split.part(vector(DEEP[2])), seen_by(split, batch(DEEP[2], 12))
    inputs: list[list[tuple[Any, int]]] = []  # of each micro-batch: weak references, and how many bytes
    outputs: list[Any] = []
    taken: list[Any] = []
    late: list[Any] = []  # those that should have been gone
    alive: list[tuple[int, int]] = []  # after each forward: micro-batches, bytes

    def count() -> tuple[int, int]:
        left = [[size for array, size in arrays if array() is not None] for arrays in inputs]
        return sum(map(bool, left)), sum(map(sum, left))

    def watched(*args: Any) -> Any:
        values = forward(*args)
        inputs.append([(weakref.ref(array), array.nbytes) for array in values[:-1]])
        outputs.append(weakref.ref(values[-1]))
        kept.extend(values if leak else ())
        alive.append(count())
        return values

    def take(self: Any, kind: Any) -> Any:
        array = usual(self, kind)
        if kind is Kind.BACKWARD:
            taken.append(weakref.ref(array))
            late.extend(array for array in outputs[: len(taken)] if array() is not None)  # which have been received
        return array

    def complete_errors(n: int, error: Any) -> None:
        late.extend(array for array in taken if array() is not None)

    usual = Flow.take
    monkeypatch.setattr(Flow, "take", take)
    monkeypatch.setattr(split_module, "forward", watched)
    monkeypatch.setattr(split, "complete_errors", complete_errors)
    split.loss_and_grad(params, found, np.empty(split.size))
    held = micro if leak else PIPELINES[pipeline].held(grid.at.pipe, sizes.pipe, micro)
    assert max(alive) == (held, held * sum(size for _, size in inputs[0]))
    assert leak or count() == (0, 0)
    late.extend(array for array in (*outputs, *taken) if array() is not None)
    assert leak == bool(late)


@pytest.mark.parametrize("sizes", [Sizes(P // 2, 2, 1)] if P % 2 == 0 else [], ids=str)
def test_stages_cut_by_hand(grid):
    model = DEEP[2]
    params, found = vector(model), batch(model, 9)
    sizes = [9 * 9 + 9, 9 * 11 + 11, 11 * 8 + 8, 8 * 10 + 10]
    for first in (1, 2, 3):
        split = Split(model, grid, cuts=[first])
        assert split.size == sum(sizes[first:] if grid.at.pipe else sizes[:first])
        assert gradient(split, params, found)[1].tobytes() == added(model, params, found, 2)[1].tobytes()


@pytest.mark.parametrize("sizes", [Sizes(1, P, 1)] if P in (2, 3) else [], ids=str)
def test_waiting_for_another_stage_is_told(grid, monkeypatch):
    def slow(*args: Any) -> Any:
        time.sleep(0.02)
        return forward(*args)

    split = Split(DEEP[2], grid)
    if RANK == 0:
        monkeypatch.setattr(split_module, "forward", slow)
    grid.world.Barrier()
    gradient(split, vector(DEEP[2]), batch(DEEP[2], 9))
    spent = split.spent
    assert 0 <= spent.waiting <= spent.seconds
    assert RANK == 0 or spent.waiting > 0.02
    spent.clear()
    assert (spent.seconds, spent.waiting, spent.bytes_sent, spent.messages) == (0, 0, 0, 0)


def data() -> Any:
    rng = np.random.default_rng(5)
    y = np.arange(60) % 10
    found = from_arrays(rng.normal(size=(60, 9)) + y[:, np.newaxis] / 3, y, test=9)
    return found._replace(validation=found.test, counts=())


def training(comm: MPI.Intracomm, model: Any, **given: Any) -> Training:
    defaults: dict[str, Any] = {"epochs": 2, "batch_size": 16, "seed": 3, "dtype": "float64"}
    return Training(comm, data(), model, Settings(**{**defaults, **given}))


RUNS: list[dict[str, Any]] = [
    {"strategy": "sync"},
    {"strategy": "sync", "clip": 0.1, "optimizer": "adam", "weight_decay": 0.01},
    {"strategy": "average", "every": 3, "outer": "bmuf", "clip": 0.1},
    {"strategy": "gossip", "momenta": "average"},
    {"strategy": "butterfly", "patience": 1},
]


def shown(epoch: Epoch, name: str) -> float:
    found = getattr(epoch, name)
    return -1.0 if found is None else float(found)


@pytest.mark.parametrize("sizes", SOME, ids=str)
def test_training_is_that_of_whole_models_on_as_many_ranks_as_there_are_groups(grid, sizes):
    model = DEEP[1] if fits(DEEP[1], sizes) else DEEP[2]
    for run in RUNS if fits(model, sizes) else []:
        whole = training(grid.data, model, **run).run()
        split = training(grid.data, Split(model, grid), **run).run()
        np.testing.assert_allclose(split.params, whole.params, rtol=1e-7, atol=1e-10)
        assert len(set(grid.world.allgather(split.params.tobytes()))) == 1
        assert len(split.ranks) == P
        for mine, other in zip(split.epochs, whole.epochs, strict=True):
            for name in ("train_loss", "train_accuracy", "validation_loss", "validation_accuracy", "consensus"):
                np.testing.assert_allclose(shown(mine, name), shown(other, name), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("sizes", [sizes for sizes in SOME if sizes.data > 1 and sizes.group > 1], ids=str)
def test_a_group_is_as_fast_as_its_slowest_rank(grid, sizes):
    result = training(grid.data, Split(DEEP[2], grid), balance="auto", epochs=3).run()
    assert len({str(epoch.weights) for epochs in grid.world.allgather(result.epochs) for epoch in epochs[1:2]}) == 1
    assert len(set(grid.world.allgather(result.params.tobytes()))) == 1


@pytest.mark.parametrize("sizes", [Sizes(1, P, 1)] if P == 2 else [], ids=str)
def test_what_ranks_tell_each_other_while_they_train_is_in_their_account(grid):
    """And not what they do to see how good the model is."""
    split = Split(DEEP[2], grid, cuts=[3])
    told = account(np.zeros(2), grid.group)
    result = training(grid.data, split).run()
    assert [rank.bytes_sent for rank in result.ranks] == P * [2 * (51 * 8 * 8 + 4 * told.bytes_sent)]
    assert [rank.messages for rank in result.ranks] == P * [2 * 4 * (2 + told.messages)]
    assert sum(epoch.bytes_sent for epoch in result.epochs) == result.ranks[RANK].bytes_sent
    assert all(0 <= rank.waiting <= rank.agreeing <= rank.seconds for rank in result.ranks)


def stopped_after(made: Training, epochs: int, folder: Any) -> None:
    def saving(self: Training) -> None:
        if self.epoch == epochs:
            save(self, folder / "checkpoints", FACTS)
            raise StopIteration

    with pytest.raises(StopIteration):
        made.run(checkpoint=saving)


def test_a_checkpoint_of_one_grid_is_resumed_on_every_other(comm, grids, folder):
    """An epoch on each, and the last one on none: as one process does it."""
    model, settings = DEEP[2], {"optimizer": "adam", "patience": 99, "clip": 1.0}
    fitting = [grid for sizes, grid in grids.items() if fits(model, sizes)]
    epochs = len(fitting) + 1
    alone = training(MPI.COMM_SELF, model, epochs=epochs, **settings).run()
    for done, grid in enumerate(fitting):
        made = training(grid.data, Split(model, grid), epochs=epochs, **settings)
        if done:
            made.params += 1  # all of it comes from the checkpoint
            restore(made, latest(folder))
        stopped_after(made, done + 1, folder)
    made = training(comm, model, epochs=epochs, **settings)
    restore(made, latest(folder))
    resumed = made.run()
    np.testing.assert_allclose(resumed.params, alone.params, rtol=1e-7, atol=1e-10)
    assert resumed.epochs[-1].validation_loss == pytest.approx(alone.epochs[-1].validation_loss)
    assert resumed.steps == alone.steps


@pytest.mark.parametrize("sizes", [sizes for sizes in SOME if sizes.group > 1 and fits(DEEP[2], sizes)], ids=str)
@pytest.mark.parametrize(
    "run",
    [
        {"strategy": "average", "every": 3, "outer": "bmuf"},
        {"strategy": "sync", "compress": "topk:0.1"},
        {"strategy": "sync", "compress": "powersgd:1"},
        {"strategy": "gossip", "graph": "ring", "compress": "sign"},
    ],
    ids=lambda run: run["strategy"],
)
def test_a_resumed_run_ends_with_the_same_bits(grid, sizes, folder, run, monkeypatch):
    if run.get("compress") == "powersgd:1" and sizes.tensor > 4:
        pytest.skip("no shard of these layers gets smaller")
    whole = training(grid.data, Split(DEEP[2], grid), **run).run()
    written: list[Any] = []
    monkeypatch.setattr("safetensors.numpy.save_file", lambda *args: (written.append(args), save_file(*args)))
    stopped_after(training(grid.data, Split(DEEP[2], grid), **run), 1, folder)
    assert sum(grid.world.allgather(len(written))) == sizes.data  # nobody writes what another does
    files = sorted(path.name for path in latest(folder).path.iterdir())
    assert files == ["manifest.json", *(f"rank-{n}.safetensors" for n in range(sizes.data))]
    other = training(grid.data, Split(DEEP[2], grid), **{**run, "seed": 3})
    other.params += 1
    restore(other, latest(folder))
    assert other.run().params.tobytes() == whole.params.tobytes()


@pytest.mark.parametrize(
    "sizes",
    [
        sizes for sizes in SOME if fits(DEEP[1], sizes) and sizes.tensor < (4 if sizes.pipe == 1 else 3)
    ],  # or none is less
    ids=str,
)
def test_powersgd_sends_all_of_a_gradient_that_has_its_rank(grid, sizes):
    """That of two samples has rank 2, and each rank's part of it too, if it begins with factors drawn at random."""
    alone = training(MPI.COMM_SELF, DEEP[1], batch_size=2).run(max_steps=1)
    split = training(grid.data, Split(DEEP[1], grid), batch_size=2, compress="powersgd:2").run(max_steps=1)
    np.testing.assert_allclose(split.params, alone.params, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("sizes", [Sizes(P // 2, 2, 1)] if P in (2, 4) else [], ids=str)
def test_factors_of_powersgd_are_for_the_same_parts_only(grid, folder):
    """Those of others are of no use to a rank, were they as long."""

    def made(*cuts: int) -> Training:
        model = Split(DEEP[2], grid, cuts=cuts) if cuts else DEEP[2]
        comm = grid.data if cuts else grid.world
        return training(comm, model, compress="powersgd:1", batch_size=64)

    def factors(found: Training) -> bytes:
        return found.strategy.state()["q"].tobytes()

    first = made(2)
    stopped_after(first, 1, folder)
    for other in (made(2), made(1), made()):
        begun = factors(other)
        restore(other, latest(folder))
        same = other.split is not None and other.split.layout == "0-1,2-3 in 1"
        assert factors(other) == (factors(first) if same else begun)


@pytest.mark.skipif(P == 1, reason="one rank holds all of it")
@pytest.mark.parametrize("sizes", [Sizes(1, P, 1), Sizes(1, 1, P)], ids=str)
def test_what_powersgd_cannot_make_smaller_on_one_rank_ends_the_run_on_all(grid, sizes):
    """Weights of the last stage, or of the last shard."""
    model = Layered((9, *(P - 2) * [9], 9, 1), hinge) if sizes.tensor == 1 else Layered((2 * P - 1, 3), hinge)
    split = Split(model, grid)
    with pytest.raises(UserError, match=r"--compress powersgd:1 makes no matrix of this model smaller") as caught:
        training(grid.data, split, compress="powersgd:1")
    assert len(set(grid.world.allgather(str(caught.value)))) == 1


@pytest.mark.skipif(P == 1, reason="one rank holds all of it")
@pytest.mark.parametrize("where", ["at first", "in the last step"])
def test_what_becomes_nan_on_one_rank_ends_the_run_on_all(comm, grids, monkeypatch, where):
    grid = grids[Sizes(1, 1, P)]
    made = training(grid.data, Split(DEEP[1], grid), epochs=1, batch_size=1000)
    if comm.rank == P - 1 and where == "at first":
        made.params[-1] = np.nan
    elif comm.rank == P - 1:
        monkeypatch.setattr(made.strategy, "agree_on_parameters", lambda now: made.params.fill(np.nan))
    with pytest.raises(UserError, match=r"(the loss|parameters) became (infinite or )?nan") as caught:
        made.run()
    assert len(set(comm.allgather(str(caught.value)))) == 1


@pytest.mark.skipif(P not in (4, 8), reason="ranks that are dealt out to two nodes")
def test_shards_are_in_one_node_and_stages_across(comm, monkeypatch):
    monkeypatch.setattr(launch, "node_of", lambda comm: MPI.Intracomm(comm.Split(RANK % 2, comm.rank)))
    grid = Grid(comm, Sizes(1, 2, P // 2))
    assert {rank % 2 for rank in grid.tensor.allgather(RANK)} == {RANK % 2}
    assert {rank % 2 for rank in grid.pipe.allgather(RANK)} == {0, 1}
    assert grid.leads == (RANK == 0)
    grid.free()
