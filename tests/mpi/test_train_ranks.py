"""Training on several ranks: it follows the one-rank run, however the batches are shared out."""

import time
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

from mpicoll import UserError
from mpicoll.mpi.threads import limit_threads
from mpicoll.train import data as data_module
from mpicoll.train.data import Dataset, Scaling, load
from mpicoll.train.loop import Result, accuracy, train
from mpicoll.train.models import MODELS
from mpicoll.train.strategies import Sync

pytestmark = pytest.mark.mpi
P = MPI.COMM_WORLD.size
MODEL = MODELS["mlp"](6, 3, (8,))


def blobs(samples: int, dtype: str) -> Dataset:
    y = np.arange(samples) % 3
    x = (np.random.default_rng(5).normal(size=(samples, 6)) + y[:, np.newaxis]).astype(dtype)
    return Dataset(x, y, x[::5], y[::5], 3, Scaling(np.zeros(6), np.ones(6)))


def trained(comm: MPI.Intracomm, data: Dataset, **options: Any) -> Result:
    settings: dict[str, Any] = {
        "strategy": "sync",
        "algorithm": "circulant",
        "epochs": 3,
        "batch_size": 32,
        "lr": 0.1,
        "momentum": 0.9,
        "seed": 3,
    }
    return train(comm, data, MODEL, **{**settings, **options})


@pytest.mark.parametrize("algorithm", ["ring", "circulant", "native"])
@pytest.mark.parametrize("batch_size", [1, 7, 32, 1000])
def test_several_ranks_follow_the_one_rank_run(comm, algorithm, batch_size):
    """Batches smaller than the ranks, uneven shares, a short last batch, one batch for all."""
    data = blobs(101, "f8")
    alone = trained(MPI.COMM_SELF, data, batch_size=batch_size)
    together = trained(comm, data, batch_size=batch_size, algorithm=algorithm)
    np.testing.assert_allclose(together.params, alone.params, rtol=1e-10, atol=1e-13)
    assert together.steps == alone.steps == 3 * -(-101 // batch_size)
    losses = [[epoch.train_loss for epoch in result.epochs] for result in (together, alone)]
    np.testing.assert_allclose(*losses, rtol=1e-10)
    assert together.epochs[-1].train_accuracy == alone.epochs[-1].train_accuracy


def test_in_float32_the_first_20_steps_agree(comm):
    data = blobs(400, "f4")
    alone = trained(MPI.COMM_SELF, data, max_steps=20, epochs=100)
    together = trained(comm, data, max_steps=20, epochs=100)
    assert together.steps == 20
    np.testing.assert_allclose(together.params, alone.params, rtol=1e-4, atol=1e-5)


def test_all_ranks_end_with_the_same_bits_and_training_learns(comm):
    data = blobs(300, "f4")
    result = trained(comm, data, epochs=20)
    assert len({params.tobytes() for params in comm.allgather(result.params)}) == 1
    assert result.epochs[-1].train_loss < result.epochs[0].train_loss
    right = accuracy(comm, MODEL, result.params, data.x_test, data.y_test)
    assert right == np.mean(MODEL.predict(result.params, data.x_test) == data.y_test)
    assert accuracy(comm, MODEL, result.params, data.x_test[:0], data.y_test[:0]) is None


def test_another_seed_is_another_run(comm):
    data = blobs(100, "f8")
    assert not np.array_equal(trained(comm, data).params, trained(comm, data, seed=4).params)


def test_a_loss_that_is_not_finite_stops_all_ranks_at_the_same_step(comm):
    with pytest.raises(UserError, match=r"the loss became (nan|inf) at step") as caught:
        trained(comm, blobs(100, "f4"), lr=1e30)
    assert len(set(comm.allgather(str(caught.value)))) == 1


def test_bytes_are_counted_at_our_own_sends(comm):
    counted = trained(comm, blobs(64, "f4"), epochs=1).bytes_sent
    total = comm.allreduce(counted)
    assert total == 2 * 2 * (P - 1) * (MODEL.size + 2) * 4  # two steps, 2 (p - 1) / p vectors on average
    assert trained(comm, blobs(64, "f4"), epochs=1, algorithm="native").bytes_sent is None


def test_sums_are_what_ranks_add_up(comm):
    sums = np.array([1.0, comm.rank])
    agreement = Sync(comm, "ring", sums)
    agreement.add_up()
    np.testing.assert_array_equal(sums, [P, P * (P - 1) / 2])
    agreement.add_up()
    assert len(agreement.seconds) == 2
    assert min(agreement.seconds) > 0


def test_waiting_is_told_from_moving(comm, monkeypatch):
    """Rank 0 takes 20 ms more than the others for every step: they wait for it, and it for nobody."""
    slow = MODEL.loss_and_grad

    def loss_and_grad(*arguments: Any) -> Any:
        time.sleep(0.02 if comm.rank == 0 else 0)
        return slow(*arguments)

    monkeypatch.setattr(MODEL, "loss_and_grad", loss_and_grad)
    result = trained(comm, blobs(100, "f4"), max_steps=10)
    assert 0 <= result.waiting_seconds <= result.agreement_seconds <= result.seconds
    slowest, *others = comm.allgather(result.waiting_seconds)
    assert slowest < min(others, default=1)
    assert P > 1 or slowest == 0


def test_the_data_are_the_same_on_all_ranks(comm, folder, monkeypatch):
    monkeypatch.setattr(data_module, "BROADCAST_BYTES", 1000)
    path = str(folder / "data.npz")
    x, y = np.random.default_rng(1).normal(size=(100, 7)) * 50 + 10, np.arange(100) % 4
    if comm.rank == 0:
        np.savez(path, X=x, y=y)
    data = load(path, comm, np.dtype("f4"))
    assert len({data.x.tobytes() + data.x_test.tobytes() for data in comm.allgather(data)}) == 1
    held_out = np.arange(100) % 5 == 4
    np.testing.assert_array_equal(data.y_test, y[held_out])
    np.testing.assert_array_equal(data.x, data.scaling.apply(x[~held_out], np.dtype("f4")))
    np.testing.assert_allclose(data.x.mean(axis=0, dtype="f8"), 0, atol=1e-6)
    np.testing.assert_allclose(np.ptp(data.x, axis=0), 2, rtol=1e-5)
    assert data.classes == 4
    with pytest.raises(UserError, match="does not exist"):
        load(path + "x", comm, np.dtype("f4"))


def test_ranks_share_the_cores(comm, monkeypatch):
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "BLIS_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("mpicoll.mpi.threads._cores", lambda: [0, 1, 2, 3, 4, 5])
    assert limit_threads(comm) == max(1, 6 // P)
    monkeypatch.setattr("mpicoll.mpi.threads._cores", lambda: [2 * comm.rank, 2 * comm.rank + 1])  # bound to cores
    assert limit_threads(comm) == 2
    assert limit_threads(comm, 3) == 3
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert limit_threads(comm) is None
    assert limit_threads(comm, 1) == 1
    from threadpoolctl import threadpool_info

    assert {pool["num_threads"] for pool in threadpool_info()} == {1}
