"""Training on several ranks: it follows the one-rank run, however the batches are shared out."""

import time
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

from mpicoll import UserError
from mpicoll.cli.train import _table
from mpicoll.job.blas import limit_threads
from mpicoll.train.data import Part
from mpicoll.train.loop import evaluate
from mpicoll.train.models import MODELS, Layered
from mpicoll.train.strategies import STRATEGIES
from training import REPEATABLE, blobs, broken_on_the_last_rank, trained

P = MPI.COMM_WORLD.size
pytestmark = [pytest.mark.mpi, pytest.mark.skipif(P > 5, reason="five ranks show what more would, and sooner")]
MODEL = MODELS["mlp"](6, 3, (8,))


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
    loss, right = evaluate(comm, MODEL, result.params, data.test, sharded=False)
    assert right == np.mean(MODEL.predict(result.params, data.test.x) == data.test.y)
    assert loss is not None
    assert 0 < loss < result.epochs[0].train_loss
    part = slice(len(data.test.y) * comm.rank // P, len(data.test.y) * (comm.rank + 1) // P)
    mine = Part(data.test.x[part], data.test.y[part], part.start, data.test.total)
    assert evaluate(comm, MODEL, result.params, mine, sharded=True) == (pytest.approx(loss), right)
    assert evaluate(comm, MODEL, result.params, Part(data.test.x[:0], data.test.y[:0], 0, 0), False) == (None, None)


def test_another_seed_is_another_run(comm):
    data = blobs(100, "f8")
    assert not np.array_equal(trained(comm, data).params, trained(comm, data, seed=4).params)


def test_a_loss_that_is_not_finite_stops_all_ranks_at_the_same_step(comm):
    with pytest.raises(UserError, match=r"the loss became (nan|inf) at step") as caught:
        trained(comm, blobs(100, "f4"), lr=1e30)
    assert len(set(comm.allgather(str(caught.value)))) == 1


def test_bytes_are_counted_at_our_own_sends(comm):
    ranks = trained(comm, blobs(64, "f4"), epochs=1, algorithm="circulant").ranks
    total = sum(rank.bytes_sent or 0 for rank in ranks)
    assert total == 2 * 2 * (P - 1) * (MODEL.size + 2) * 4  # two steps, 2 (p - 1) / p vectors on average
    natively = trained(comm, blobs(64, "f4"), epochs=1, algorithm="native").ranks
    assert {(rank.bytes_sent, rank.messages) for rank in natively} == {(None, None)}


def test_the_best_model_is_kept_and_patience_ends_the_run_on_all_ranks(comm):
    """Validation samples whose labels are wrong: the better the model, the worse it looks."""
    data = blobs(100, "f4", validation=30)
    data = data._replace(validation=data.validation._replace(y=(data.validation.y + 1) % 3))
    result = trained(comm, data, epochs=50, patience=3, lr=0.5)
    losses = [epoch.validation_loss for epoch in result.epochs]
    best = losses.index(min(losses))
    assert len(losses) == best + 1 + 3 < 50
    loss, _ = evaluate(comm, MODEL, result.params, data.validation, sharded=False)
    assert loss == losses[best]
    assert len({params.tobytes() for params in comm.allgather(result.params)}) == 1


@pytest.mark.parametrize("strategy", ["sync", "average", "butterfly", "gossip", "ad-psgd"])
@pytest.mark.parametrize("batch_size", [1, 3, 1000])
def test_shards_of_uneven_length(comm, strategy, batch_size):
    """Rank r has r samples, and rank 0 of one rank three; some batches give a rank nothing."""
    counts = tuple(range(P)) if P > 2 else (3,) * P
    total, start = sum(counts), sum(counts[: comm.rank])
    every = blobs(total)
    own = Part(
        every.train.x[start : start + counts[comm.rank]], every.train.y[start : start + counts[comm.rank]], start, total
    )
    data = every._replace(train=own, sharded=True, counts=counts)
    result = trained(comm, data, strategy=strategy, batch_size=batch_size, momentum=0.0)
    assert result.steps == 3 * -(-total // batch_size)
    if batch_size == 1000:  # one batch of all: the same as unsharded
        alone = trained(MPI.COMM_SELF, every, strategy="sync", batch_size=batch_size, momentum=0.0, epochs=1)
        first = trained(comm, data, strategy=strategy, batch_size=batch_size, momentum=0.0, epochs=1)
        np.testing.assert_allclose(first.params, alone.params, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("where", ["loss", "gradient"])
@pytest.mark.parametrize("strategy", [*STRATEGIES])
def test_what_becomes_nan_on_one_rank_ends_the_run_on_all(comm, monkeypatch, strategy, where):
    broken_on_the_last_rank(comm, monkeypatch, where)
    with pytest.raises(UserError, match=r"(the loss became nan|parameters became infinite or nan) at step") as caught:
        trained(comm, blobs(40), strategy=strategy, epochs=2, batch_size=10)
    assert len(set(comm.allgather(str(caught.value)))) == 1


@pytest.mark.parametrize("strategy", REPEATABLE)
def test_one_slow_rank_delays_the_others_and_changes_nothing(comm, monkeypatch, strategy):
    given = {"strategy": strategy, "epochs": 1, "batch_size": 10, **REPEATABLE[strategy]}
    usual = trained(comm, blobs(40), **given)
    step = Layered.loss_and_grad

    def slow(*arguments: Any) -> Any:
        time.sleep(0.05 if comm.rank == P - 1 else 0)
        return step(*arguments)

    monkeypatch.setattr(Layered, "loss_and_grad", slow)
    np.testing.assert_array_equal(trained(comm, blobs(40), **given).params, usual.params)


def test_waiting_is_told_from_moving(comm, monkeypatch):
    """Rank 0 takes 20 ms more than the others for every step: they wait for it, and it for nobody."""
    step = Layered.loss_and_grad

    def slow(*arguments: Any) -> Any:
        time.sleep(0.02 if comm.rank == 0 else 0)
        return step(*arguments)

    monkeypatch.setattr(Layered, "loss_and_grad", slow)
    ranks = trained(comm, blobs(100, "f4"), max_steps=10).ranks
    assert all(0 <= rank.waiting <= rank.agreeing <= rank.seconds for rank in ranks)
    slowest, *others = [rank.waiting for rank in ranks]
    assert slowest < min(others, default=1)
    assert P > 1 or slowest == 0


@pytest.mark.parametrize(
    "given",
    [
        *({"strategy": name} for name in STRATEGIES),
        *({"strategy": name, "delays": 3, "graph": graph} for name, graph in (("ad-psgd", "ring"), ("async", None))),
        {"strategy": "async", "staleness": "inf"},
        {"strategy": "async", "staleness": "0", "compress": "sign"},
        {"strategy": "sync", "compress": "powersgd:1"},
        {"strategy": "sync", "algorithm": "native", "clip": 1.0},
        {"strategy": "average", "every": 1, "momenta": "average"},
        {"strategy": "gossip", "graph": "ring", "compress": "topk:0.1"},
    ],
    ids=lambda given: "-".join(str(value) for value in given.values()),
)
def test_computing_moving_and_waiting_are_parts_of_the_whole(comm, given):
    ranks = trained(comm, blobs(101, "f4"), epochs=4, batch_size=P, **given).ranks
    for rank in ranks:
        assert 0 <= rank.waiting <= rank.agreeing <= rank.seconds
    assert not any("-" in line for line in _table([rank._asdict() for rank in ranks]))


@pytest.mark.parametrize("optimizer", ["sgd", "nesterov", "adagrad", "rmsprop", "adam", "adamw"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_parts_in_shared_memory_are_the_bits_of_messages(comm, optimizer, dtype):
    """Of an unevenly shared batch, with weight decay; and clipping, which looks at the whole, by messages or not."""
    given = {"optimizer": optimizer, "dtype": dtype, "batch_size": 7, "weight_decay": 0.01, "epochs": 3}
    data = blobs(101, "f4" if dtype == "float32" else "f8")
    parts = trained(comm, data, **given)
    whole = trained(comm, data, algorithm="halving_doubling", **given)
    assert P == 1 or parts.algorithm == "shared"
    np.testing.assert_array_equal(parts.params, whole.params)
    np.testing.assert_array_equal(
        trained(comm, data, clip=0.5, **given).params,
        trained(comm, data, clip=0.5, algorithm="halving_doubling", **given).params,
    )


def test_ranks_share_the_cores(comm, monkeypatch):
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "BLIS_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("mpicoll.job.blas.cores", lambda: [0, 1, 2, 3, 4, 5])
    assert limit_threads(comm) == max(1, 6 // P)
    monkeypatch.setattr("mpicoll.job.blas.cores", lambda: [2 * comm.rank, 2 * comm.rank + 1])  # bound to cores
    assert limit_threads(comm) == 2
    assert limit_threads(comm, 3) == 3
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert limit_threads(comm) is None
    assert limit_threads(comm, 1) == 1
    from threadpoolctl import threadpool_info

    assert {pool["num_threads"] for pool in threadpool_info()} == {1}
