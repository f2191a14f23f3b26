"""Training in the memory of GPUs: what it does in host memory, it does there, and nothing goes to and fro meanwhile.

With a CuPy of ours that needs no GPU (``fakecupy``); it takes no NumPy array for one of its own.  Where there is a GPU,
``make test-gpu`` runs them with the real one: those that need to know more of it than that are left out.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fakecupy
import kernels
import numpy as np
import pytest
from mpi4py import MPI
from scipy.sparse import csc_array, csr_array
from test_snapshot import stopped_after

from mpicoll import UserError
from mpicoll.mpi.gpu import array, assignment
from mpicoll.mpi.gpu.array import is_cupy
from mpicoll.train import loop, optimizers
from mpicoll.train.checkpoint import latest
from mpicoll.train.data import Dataset
from mpicoll.train.loop import Result
from mpicoll.train.models import MODELS, Batch
from mpicoll.train.optimizers import OPTIMIZERS, clip
from mpicoll.train.run import run
from mpicoll.train.run_folder import read_model
from mpicoll.train.settings import Settings
from mpicoll.train.snapshot import restore
from training import blobs, trained, training

P = MPI.COMM_WORLD.size
REAL = os.environ.get("MPICOLL_TEST_GPU") == "1"
MOST = 4 if REAL else 3  # ranks: more would show the same, and take longer
pytestmark = [pytest.mark.mpi, pytest.mark.skipif(P > MOST, reason=f"{MOST} ranks show what more would, and sooner")]

RUNS: list[dict[str, Any]] = [
    {"strategy": "sync"},
    {"strategy": "sync", "optimizer": "adamw", "clip": 0.5, "weight_decay": 0.1, "lr": 0.01},
    {"strategy": "sync", "optimizer": "rmsprop", "algorithm": "ring", "batch_size": 2, "epochs": 1, "lr": 0.01},
    {"strategy": "average", "every": 2, "outer": "slowmo", "sync_epochs": 1, "optimizer": "adagrad"},
    {"strategy": "average", "every": 3, "outer": "easgd", "optimizer": "adam", "momenta": "reset", "lr": 0.01},
    {"strategy": "butterfly", "optimizer": "nesterov", "momenta": "average"},
    {"strategy": "gossip", "mix_first": True},
    {"strategy": "average", "every": 2, "momenta": "average"},
    {"strategy": "async", "staleness": "0", "optimizer": "adam", "lr": 0.01},
    {"strategy": "async", "delays": 4, "workers": 5, "compensate": 0.1, "slow_down": True, "clip": 0.5},
    {"strategy": "ad-psgd", "delays": 3, "optimizer": "adamw", "lr": 0.01},
    {"strategy": "async", "staleness": "0", "compress": "16bit"},
    {"strategy": "sync", "compress": "16bit", "algorithm": "ring"},
    {"strategy": "sync", "compress": "powersgd:1"},
    {"strategy": "average", "every": 2, "compress": "topk:0.1"},
    {"strategy": "gossip", "graph": "ring", "compress": "sign", "momenta": "average"},
]
CODED: list[dict[str, Any]] = [{"strategy": "sync", "compress": "powersgd:1"}, RUNS[-1]]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """All ranks on one GPU that does everything at the last moment: who looks too early sees NaN."""
    if REAL:
        pytest.skip("asks the fake what it has seen")
    with fakecupy.installed(mode="lazy") as made:
        kernels.add(made, monkeypatch)
        yield made


@pytest.fixture
def cupy(request: pytest.FixtureRequest) -> Any:
    """The same, or the real one."""
    if not REAL:
        request.getfixturevalue("fake")
        return array.cupy()
    try:
        assignment.take(MPI.COMM_WORLD)
    except UserError as error:
        pytest.skip(f"no GPU: {error}")
    return array.cupy()


def close(ours: Any, theirs: Any) -> None:
    np.testing.assert_allclose(np.asarray(ours, float), np.asarray(theirs, float), rtol=1e-9, atol=1e-12)


def sparse(data: Dataset) -> Dataset:
    """Of every other feature of a sample there is nothing left, of one there is a value in two parts."""
    train, validation, test = (
        part._replace(x=csr_array(part.x * ((np.arange(len(part.x))[:, np.newaxis] + np.arange(6)) % 2)))
        for part in data[:3]
    )
    x: Any = train.x
    parts = np.insert(x.data, 1, x.data[0] / 4), np.insert(x.indices, 1, x.indices[0]), x.indptr + (x.indptr > 0)
    parts[0][0] *= 0.75
    return data._replace(train=train._replace(x=csr_array(parts, shape=x.shape)), validation=validation, test=test)


def same(ours: Any, theirs: Result) -> None:
    """To rounding: matrices are multiplied by other libraries, and sums taken in another order.  (The fake one has
    NumPy's, and in places its bits.)"""
    close(ours.params.get(), theirs.params)
    for ours_then, theirs_then in zip(ours.epochs, theirs.epochs, strict=True):
        for name in ("train_loss", "train_accuracy", "validation_loss", "validation_accuracy", "consensus"):
            close(getattr(ours_then, name), getattr(theirs_then, name))


@pytest.mark.parametrize("given", RUNS, ids=lambda given: "-".join(str(value) for value in given.values()))
def test_a_gpu_computes_what_a_cpu_does(comm, cupy, given):
    data = blobs(37, validation=13)
    ours = trained(comm, data, device="gpu", **given)
    same(ours, trained(comm, data, **given))
    assert len(set(comm.allgather(ours.params.get().tobytes()))) == 1


@pytest.mark.parametrize("counts", [False, True])
def test_so_it_does_with_sparse_data(comm, cupy, counts):
    """Among them whole numbers, by columns, as many as there are samples; and of some samples nothing."""
    data = sparse(blobs(37, validation=13))
    given: dict[str, Any] = {"batch_size": 12, "epochs": 2, "dtype": "float64"}  # at the end some ranks have nothing
    if counts:
        x = np.arange(36).reshape(6, 6) % 4 * [[0], [1], [0], [1], [0], [1]]
        data = data._replace(train=data.train._replace(x=csc_array(x), y=data.train.y[:6], total=6))
        given["batch_size"] = 1
    same(trained(comm, data, device="gpu", **given), trained(comm, data, **given))


@pytest.mark.parametrize("model", ["softmax", "logistic", "svm"])
def test_so_does_every_model(cupy, model):
    data = blobs(30)
    y = data.train.y % (2 if model == "logistic" else 3)
    made = MODELS[model](6, int(y.max()) + 1, ())
    params = made.initial(np.random.default_rng(1), np.dtype("f8"))
    grad, there = np.empty_like(params), cupy.empty(made.size, "f8")
    theirs = made.loss_and_grad(params, Batch(data.train.x, y), grad)
    ours = made.loss_and_grad(cupy.asarray(params), Batch(cupy.asarray(data.train.x), cupy.asarray(y)), there)
    assert all(map(is_cupy, ours))
    close([float(number) for number in ours], theirs)
    close(there.get(), grad)


@pytest.mark.parametrize(
    ("mode", "given"),
    [
        *((mode, {"strategy": "sync"}) for mode in fakecupy.MODES),
        ("random", {"strategy": "async", "staleness": "0"}),
        ("random", {"strategy": "async", "staleness": "inf", "delays": 4}),
        ("random", {"strategy": "ad-psgd", "delays": 3}),
    ],
)
def test_in_whatever_order_streams_do_it(comm, monkeypatch, mode, given):
    if REAL:
        pytest.skip("tells the fake when to do what")
    data, given = blobs(37), {"optimizer": "adam", "lr": 0.01, **given}
    theirs = trained(comm, data, **given)
    with fakecupy.installed(mode=mode, seed=comm.rank) as made:
        kernels.add(made, monkeypatch)
        same(trained(comm, data, device="gpu", **given), theirs)


def test_everything_is_there(comm, cupy):
    made = training(comm, blobs(37, validation=13), device="gpu", optimizer="adam", strategy="average", outer="bmuf")
    made.run(max_steps=1)
    kept = [
        made.params,
        made.sums,
        made.strategy.params,
        *made.optimizer.state.values(),
        *made.strategy.state().values(),
    ]
    sets = [array for part in made.data[:3] for array in part[:2]]
    assert [array.shape for array in (*kept, *sets) if not is_cupy(array)] == [(1,)]  # the outer learning rate
    coded = [training(comm, sparse(blobs(37)), device="gpu", **given) for given in CODED]
    (x, _, *_), codes, known = coded[0].data.train, coded[0].strategy.compressor, coded[1].strategy.differences.known
    assert all(map(is_cupy, [x.data, x.indices, x.indptr, *codes.state.values(), codes._dense, known]))


def reads(comm: MPI.Intracomm, fake: Any, data: Dataset, batch_size: int, given: dict[str, Any]) -> int:
    """From the GPU, in an epoch."""
    made = training(comm, data, device="gpu", epochs=1, batch_size=batch_size, **given)
    before = fake.log.count("get")
    made.run()
    return fake.log.count("get") - before


@pytest.mark.parametrize("given", [{"strategy": "average"}, *CODED])
def test_steps_do_not_read_numbers_back(comm, fake, given):
    """Only epochs do; and steps on sparse data, how many there are."""
    data = blobs(64)
    assert reads(comm, fake, data, 64, given) == reads(comm, fake, data, 16, given)
    assert reads(comm, fake, sparse(data), 16, given) == reads(comm, fake, data, 16, given) + 4


@pytest.mark.skipif(P == 1, reason="one rank has nothing to gather")
@pytest.mark.parametrize(("asked", "went"), [("auto", "ipc"), ("tree", "ipc"), ("ring", "staged ring")])
def test_codes_are_gathered_the_way_that_is_named_or_the_best_one(comm, fake, asked, went):
    """By trees nothing is gathered."""
    assert trained(comm, blobs(37), 1, device="gpu", algorithm=asked, compress="sign").algorithm == went


@pytest.mark.parametrize("balance", [None, "auto"])
def test_times_are_those_of_the_gpu(comm, fake, balance):
    """It is waited for before an agreement, and where ranks' times are measured, after each gradient; else never."""
    before = fake.log.count("device")
    steps = trained(comm, blobs(64), device="gpu", epochs=1, batch_size=8, balance=balance).steps
    assert fake.log.count("device") - before == steps * ((P > 1) + (balance == "auto"))
    assert P > 1 or balance or fake.syncs == 0


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_on_a_gpu_a_step_is_one_of_the_whole_vector(fake, cupy, monkeypatch, name):
    def launches() -> int:
        x, grad = cupy.zeros(50), cupy.ones(50)
        optimizer = OPTIMIZERS[name](50, np.dtype("f8"), weight_decay=0.1, like=x)
        queue = fake.queue(0)
        before = queue.put_in
        clip(grad, 1)
        optimizer.step(x, grad, 0.1)
        return queue.put_in - before

    whole = launches()
    monkeypatch.setattr(optimizers, "BLOCK", 10)
    assert launches() == whole


@pytest.mark.parametrize(
    "more",
    [
        {"strategy": "average", "every": 3, "outer": "slowmo"},
        {"strategy": "async", "staleness": "0", "compress": "16bit"},
        *CODED,
    ],
)
def test_a_resumed_run_ends_with_the_same_bits(comm, cupy, folder, more):
    data = blobs(41, validation=20)
    data = data._replace(validation=data.validation._replace(y=(data.validation.y + 1) % 3))  # the first model is best
    given = {"device": "gpu", "optimizer": "adam", "epochs": 4, "patience": 3, **more}
    whole = trained(comm, data, **given)
    path = stopped_after(training(comm, data, **given), 2, folder / "checkpoints")
    other = training(comm, data, **{**given, "seed": 5})
    restore(other, latest(path))
    assert other.run().params.get().tobytes() == whole.params.get().tobytes()


@pytest.mark.skipif(P == 1, reason="needs other numbers of ranks")
def test_another_number_of_ranks_goes_on_from_the_mean(comm, cupy, folder):
    made = training(comm, blobs(41), device="gpu", strategy="butterfly", optimizer="adam")
    path = stopped_after(made, 1, folder / "checkpoints")
    mean = comm.allreduce(made.params.get()) / P
    part = comm.Split(comm.rank > 0)  # one rank, and the others
    if comm.rank:
        other = training(part, blobs(41), device="gpu", strategy="butterfly", optimizer="adam")
        restore(other, latest(path))
        close(other.params.get(), mean)
        assert other.run().epochs[-1].epoch == 3
    part.Free()


@pytest.mark.parametrize("strategy", ["sync", "butterfly"])
def test_a_loss_that_is_no_number_ends_training_on_all_ranks(comm, cupy, strategy):
    with pytest.raises(UserError, match=r"the loss became nan at step 2 \(epoch 1\)"):
        trained(comm, blobs(64), device="gpu", strategy=strategy, lr=1e200)


REFUSED = [
    ({"device": "tpu"}, "--device must be one of cpu, gpu, got 'tpu'"),
]


@pytest.mark.parametrize(("given", "said"), REFUSED, ids=lambda x: "")
def test_what_is_not_for_gpus_is_refused_by_name(comm, cupy, given, said):
    with pytest.raises(UserError, match=said):
        trained(comm, blobs(37), **{"device": "gpu", **given})


def test_a_way_that_cannot_gather_codes_is_refused(comm, cupy, monkeypatch):
    def fail(*args: Any, **kwargs: Any) -> None:
        raise ValueError("staged cannot do this allgather here")

    monkeypatch.setattr(loop, "allgather", fail)
    with pytest.raises(UserError, match="--algorithm staged: staged cannot do this allgather here"):
        training(comm, blobs(37), device="gpu", algorithm="staged", compress="sign")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ImportError("no libcublas.so.13"), r"CuPy cannot compute here \(no libcublas.so.13\)"),
        (MemoryError("out of memory"), r"the data are too large for the memory of the GPU \(out of memory\)"),
    ],
)
def test_a_gpu_that_cannot_be_used_on_one_rank_is_told_on_all(comm, cupy, monkeypatch, error, said):
    def fail(*args: Any) -> None:
        raise error

    if comm.rank == P - 1:
        monkeypatch.setattr(cupy, "asarray", fail)
    with pytest.raises(UserError, match=said):
        trained(comm, blobs(37), device="gpu")


def test_a_run_writes_what_it_has_from_the_gpu(comm, cupy, folder):
    def params(device: str) -> tuple[np.ndarray, dict[str, Any]]:
        out = folder / device
        settings = Settings(model="softmax", epochs=1, batch_size=256, dtype="float64", device=device, out=str(out))
        summary = comm.bcast(run(comm, settings))
        return read_model(Path(out))[1], summary

    (ours, summary), (theirs, _) = params("gpu"), params("cpu")
    close(ours, theirs)
    assert sorted(rank for one in summary["gpu"] for rank in one["ranks"]) == list(range(P))
    assert REAL or [one["name"] for one in summary["gpu"]] == ["Fake GPU (0000:01:00.0)"]
    assert summary["cupy"] == cupy.__version__


def test_a_run_from_before_there_were_devices_is_resumed_on_a_cpu(comm, folder):
    settings = Settings(model="softmax", epochs=1, batch_size=256, out=str(folder / "run"))
    run(comm, settings)
    if comm.rank == 0:
        (path,) = (folder / "run").glob("checkpoints/*/manifest.json")
        facts = json.loads(path.read_text())
        del facts["settings"]["device"], facts["environment"]["gpu"], facts["environment"]["cupy"]
        path.write_text(json.dumps(facts))
    comm.Barrier()
    told: list[dict[str, Any]] = []
    run(comm, replace(settings, epochs=2), folder / "run", told.append)
    assert told[0]["changed"] == []
