"""Asynchronous SGD: with no staleness it is synchronous, otherwise within its bound, and it always ends.

And AD-PSGD: averaging in pairs brings models together and keeps their sum."""

import time
from heapq import heappop, heappush
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

from mpicoll import UserError
from mpicoll.train.batches import Batches
from mpicoll.train.loop import Result, Training
from mpicoll.train.models import MODELS, Batch, Sums
from mpicoll.train.settings import Settings, kind_of
from mpicoll.train.strategies.base import drawn
from training import blobs, trained, training

P = MPI.COMM_WORLD.size
pytestmark = [pytest.mark.mpi, pytest.mark.skipif(P > 5, reason="five ranks show what more would, and sooner")]


class Slow:
    """A model that takes its time."""

    def __init__(self, model: Any, seconds: Any) -> None:
        self._model, self._seconds, self.size = model, seconds, model.size
        self.calls = 0

    def loss_and_grad(self, *args: Any) -> Any:
        self.calls += 1
        time.sleep(self._seconds())
        return self._model.loss_and_grad(*args)


def slowed(made: Training, seconds: Any, **options: Any) -> tuple[Result, int]:
    """Train, and how many gradients this rank took."""
    made.model = Slow(made.model, seconds)  # type: ignore[assignment]
    result = made.run(**options)
    return result, made.model.calls  # type: ignore[attr-defined]


def same_everywhere(comm: MPI.Intracomm, params: np.ndarray) -> bool:
    return len({held.tobytes() for held in comm.allgather(params)}) == 1


@pytest.mark.parametrize("staleness", ["0", "1", "inf"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_one_rank_is_plain_sgd(staleness, optimizer):
    given = {"optimizer": optimizer, "lr": 0.01}
    plain = trained(MPI.COMM_SELF, blobs(101), strategy="sync", **given)
    other = trained(MPI.COMM_SELF, blobs(101), strategy="async", staleness=staleness, **given)
    np.testing.assert_array_equal(other.params, plain.params)


@pytest.mark.parametrize("batch_size", [1, 7, 32])
@pytest.mark.parametrize("optimizer", ["sgd", "nesterov", "adamw"])
def test_without_staleness_it_is_sync_bit_for_bit(comm, optimizer, batch_size):
    given = {"optimizer": optimizer, "lr": 0.01, "weight_decay": 0.01, "schedule": "cosine", "batch_size": batch_size}
    epochs = given["epochs"] = 1 if batch_size == 1 else 3
    together = trained(comm, blobs(101, "f4"), strategy="sync", **given)
    for simulated in ({}, {"delays": 4}):
        other = trained(comm, blobs(101, "f4"), strategy="async", staleness="0", **simulated, **given)
        np.testing.assert_array_equal(other.params, together.params)
        assert [epoch.staleness for epoch in other.epochs] == epochs * [[-(-101 // batch_size) * P]]
    stale = trained(comm, blobs(101, "f4"), strategy="async", staleness="2", delays=4, **given)
    assert P == 1 or not np.array_equal(stale.params, together.params)


@pytest.mark.parametrize("staleness", [1, 3])
def test_staleness_stays_within_its_bound(comm, staleness):
    pauses = np.random.default_rng([3, comm.rank])
    made = training(comm, blobs(200), strategy="async", staleness=str(staleness), batch_size=10, momentum=0.0)
    result, calls = slowed(made, lambda: pauses.exponential(0.002))
    assert calls == 60
    assert same_everywhere(comm, result.params)
    for epoch in result.epochs:
        assert epoch.staleness is not None
        assert len(epoch.staleness) <= staleness + 1
        assert sum(epoch.staleness) == 20 * P
    assert P == 1 or sum(sum(epoch.staleness[1:]) for epoch in result.epochs) > 0
    assert result.epochs[-1].train_loss < result.epochs[0].train_loss


def test_a_bound_that_is_broken_is_noticed(comm):
    made = training(comm, blobs(50), strategy="async", staleness="2")
    with pytest.raises(RuntimeError, match="3 steps stale, and the bound is 2"):
        made.strategy.staleness.record(7, 4)


UNBOUNDED: list[dict[str, Any]] = [{"strategy": "async", "staleness": "inf"}, {"strategy": "ad-psgd"}]


@pytest.mark.skipif(P == 1, reason="nobody to be slower than")
@pytest.mark.parametrize("unbounded", UNBOUNDED, ids=lambda given: given["strategy"])
def test_without_a_bound_the_slow_take_less(comm, unbounded):
    made = training(comm, blobs(200), **unbounded, batch_size=4, epochs=1)
    result, calls = slowed(made, lambda: 0.05 if comm.rank == P - 1 else 0.001)
    everyones = comm.allgather(calls)
    assert sum(everyones) == 50 * P
    assert everyones[-1] < min(everyones[:-1])
    assert same_everywhere(comm, result.params)
    assert result.steps == 50


@pytest.mark.parametrize("given", [{"strategy": "async", "staleness": "2"}, *UNBOUNDED])
def test_every_share_is_taken_once_however_long_messages_take(comm, given):
    """Of a large model, whose messages are on their way while ranks compute."""
    model, settings = MODELS["mlp"](6, 3, (20_000,)), Settings(**given, batch_size=6, epochs=1)
    made, taken = Training(comm, blobs(180), model, settings), []
    shares = made.strategy.shares
    made.strategy.shares = lambda *steps: (taken.append(share) or share for share in shares(*steps))
    result, _ = slowed(made, lambda: 2e-3 * (comm.rank == 0))
    everyones = [share for of_rank in comm.allgather(taken) for share in of_rank]
    assert sorted(everyones) == [(step, rank) for step in range(30) for rank in range(P)]
    assert same_everywhere(comm, result.params)


@pytest.mark.parametrize("bounded", [{"strategy": "async", "staleness": "2"}, *UNBOUNDED])
@pytest.mark.parametrize("careful", [{}, {"compensate": 0.1}, {"slow_down": True}])
def test_it_learns_about_as_well(comm, bounded, careful):
    if careful and bounded["strategy"] != "async":
        pytest.skip("for gradients that are sent")
    given = {"epochs": 12, "momentum": 0.0, "batch_size": 16}
    together = trained(comm, blobs(300), strategy="sync", **given)
    other = trained(comm, blobs(300), **bounded, **careful, **given)
    allowed = 0.5 if careful.get("slow_down") else 0.25  # slower is what it is
    assert other.epochs[-1].train_loss == pytest.approx(together.epochs[-1].train_loss, rel=allowed)
    assert other.epochs[-1].train_loss < 0.6 * other.epochs[0].train_loss


@pytest.mark.skipif(P < 3, reason="needs some to wait for, and one not to")
def test_backups_are_not_waited_for(comm):
    made = training(comm, blobs(200), strategy="async", staleness="0", backups=1, batch_size=10, epochs=2, momentum=0.0)
    result, calls = slowed(made, lambda: 0.1 if comm.rank == 1 else 0.001)
    everyones = comm.allgather(calls)
    assert everyones[1] < 20
    assert result.steps == 40
    assert comm.allgather(made.optimizer.steps) == P * [40]
    assert all(len(epoch.staleness or []) <= 2 for epoch in result.epochs)
    assert same_everywhere(comm, result.params)
    assert result.epochs[-1].train_loss < result.epochs[0].train_loss


# Simulated delays.


@pytest.mark.parametrize("staleness", ["1", "inf"])
@pytest.mark.parametrize("workers", [1, 3, 6])
def test_a_simulated_run_is_the_same_on_any_number_of_ranks(comm, staleness, workers):
    given = {"strategy": "async", "staleness": staleness, "delays": 7, "workers": workers, "optimizer": "adam"}
    careful = {"compensate": 0.1, "slow_down": True, "clip": 0.5}
    alone = trained(MPI.COMM_SELF, blobs(101), **given, **careful)
    together = trained(comm, blobs(101), **given, **careful)
    np.testing.assert_array_equal(together.params, alone.params)
    assert [epoch.staleness for epoch in together.epochs] == [epoch.staleness for epoch in alone.epochs]
    assert same_everywhere(comm, together.params)
    other = trained(comm, blobs(101), **{**given, "delays": 8}, **careful)
    assert workers == 1 or not np.array_equal(other.params, together.params)


def test_simulated_backups(comm):
    given = {"strategy": "async", "staleness": "0", "delays": 7, "workers": 5, "backups": 2}
    alone, together = trained(MPI.COMM_SELF, blobs(101), **given), trained(comm, blobs(101), **given)
    np.testing.assert_array_equal(together.params, alone.params)
    full = trained(comm, blobs(101), **{**given, "backups": 0})
    assert not np.array_equal(full.params, together.params)


# Averaging in pairs.


class Still:
    """A model that learns nothing, so that only averaging moves it; slowly, or the first rank takes all shares."""

    def __init__(self, model: Any) -> None:
        self.size = model.size

    def loss_and_grad(self, params: np.ndarray, batch: Any, grad: np.ndarray) -> Sums:
        time.sleep(1e-3)
        grad[:] = 0
        return Sums(0.0, 0)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("delays", [None, 3])
def test_a_rank_with_nobody_to_average_with_is_plain_sgd(optimizer, delays):
    given = {"optimizer": optimizer, "lr": 0.01, "clip": 0.5}
    plain = trained(MPI.COMM_SELF, blobs(101), strategy="sync", **given)
    other = trained(MPI.COMM_SELF, blobs(101), strategy="ad-psgd", delays=delays, **given)
    np.testing.assert_array_equal(other.params, plain.params)


@pytest.mark.skipif(P == 1, reason="nobody to average with")
@pytest.mark.parametrize("graph", ["complete", "ring", "star"])
@pytest.mark.parametrize("how", [{}, {"delays": 5}, {"shards": True}, {"shards": True, "delays": 5}])
def test_pairs_bring_models_together_and_keep_their_sum(comm, graph, how):
    made = training(comm, blobs(200), strategy="ad-psgd", graph=graph, batch_size=2, epochs=1, momentum=0.0, **how)
    made.model = Still(made.model)
    made.params[:] = np.random.default_rng(comm.rank).normal(size=made.params.shape)
    mean = comm.allreduce(made.params) / P
    made.run()
    np.testing.assert_allclose(comm.allreduce(made.params) / P, mean, rtol=0, atol=1e-13)
    assert np.max(np.abs(made.params - mean)) < 0.01
    assert made.params is made.strategy.params
    np.testing.assert_array_equal(made.strategy.point(), made.params)
    # Of each share a model and what it is answered, or another model; and one word to all, or more for numbers.
    messages, sent = (comm.allreduce(made.strategy.messages), comm.allreduce(made.strategy.bytes_sent))
    exchanged, finished = 2 * 100 * P, 0 if "delays" in how else P * (P - 1)
    assert messages >= exchanged + finished
    assert sent >= exchanged * made.params.nbytes
    if how:
        assert messages == exchanged + finished
        assert sent <= exchanged * (made.params.nbytes + 64) + 64 * finished


def test_two_that_send_their_models_to_each_other_do_not_swap_them(comm):
    """Each has its own under way when the other's comes."""
    if P != 2:
        pytest.skip("needs two")
    made = training(comm, blobs(20), strategy="ad-psgd", shards=True, batch_size=20, epochs=1, momentum=0.0)
    made.strategy._run.transport.threads = False
    made.model = Still(made.model)
    made.params[:] = comm.rank
    comm.Barrier()
    made.run()
    assert set(comm.allgather(made.params[0])) <= {0.5, 0.25, 0.75}
    assert comm.allreduce(made.params[0]) == 1


@pytest.mark.parametrize("graph", ["ring", "one_way.npy"])
def test_only_neighbors_are_asked(comm, folder, graph):
    """Of any round, and in both directions."""
    if graph != "ring":
        graph, alone = str(folder / graph), np.eye(P)
        if comm.rank == 0:
            np.save(graph, [alone, (alone + np.roll(alone, 1, axis=0)) / 2])
        comm.Barrier()
    made = training(comm, blobs(20), strategy="ad-psgd", graph=graph)
    drawn_for = made.strategy.neighbors(comm.rank, 0)
    found = {next(drawn_for) for _ in range(50)} if P > 1 else set(drawn_for)
    assert found == {(comm.rank + 1) % P, (comm.rank - 1) % P} - {comm.rank}


@pytest.mark.skipif(P < 3, reason="needs neighbors to choose from")
def test_who_is_asked_has_nothing_to_do_with_how_long_steps_take(comm):
    """Though both be drawn from the same seed."""
    strategy, lasts, asks = training(comm, blobs(20), strategy="ad-psgd", seed=5, delays=5).strategy, [], []
    for step in range(500):
        times, peers = drawn(5, step, P)[comm.rank], strategy.neighbors(comm.rank, step)
        lasts.append([next(times) for _ in range(2)])
        asks.append([next(peers) for _ in range(4)])
    assert np.abs(np.corrcoef(lasts, asks, rowvar=False)[:2, 2:]).max() < 0.25


@pytest.mark.parametrize("delays", [None, 3])
def test_optimizing_is_not_agreeing(delays):
    made = training(MPI.COMM_SELF, blobs(50), strategy="ad-psgd", delays=delays)
    step = made.optimizer.step
    made.optimizer.step = lambda *args: (time.sleep(0.01), step(*args))
    assert made.run().epochs[-1].communicating < 0.5


def test_a_simulation_does_what_it_says(comm):
    """Step by step, for all ranks, on each."""
    data, epochs, size, lr = blobs(50), 2, 10, 0.1
    result = trained(comm, data, strategy="ad-psgd", delays=9, batch_size=size, epochs=epochs, lr=lr, momentum=0.0)
    made = training(MPI.COMM_SELF, data, batch_size=size)
    one = training(comm, data, strategy="ad-psgd", delays=9)
    models = [made.params.copy() for _ in range(P)]
    points, grad, first = [made.params.copy() for _ in range(P)], np.empty_like(made.params), 0
    for epoch in range(1, epochs + 1):
        batches = Batches(data, P, size, 3, epoch, None)
        shares = iter([(step, rank) for step in range(batches.steps) for rank in range(P)])
        times = drawn(9, first, P)
        peers = [one.strategy.neighbors(rank, first) for rank in range(P)]
        heap = [(next(times[rank]), rank, next(shares)) for rank in range(P)]
        heap.sort()
        while heap:
            now, rank, (step, share) = heappop(heap)
            mine, length = batches.share(step, share)
            made.model.loss_and_grad(points[rank], Batch(data.train.x[mine], data.train.y[mine]), grad)
            models[rank] -= lr * (grad * (P / length))
            peer = next(peers[rank], None)
            if peer is not None:
                models[rank] = (models[rank] + models[peer]) * 0.5
                models[peer] = models[rank].copy()
            points[rank] = models[rank].copy()
            if following := next(shares, None):
                heappush(heap, (now + next(times[rank]), rank, following))
        points = [model.copy() for model in models]
        first += batches.steps
    np.testing.assert_allclose(result.params, np.mean(models, axis=0), rtol=1e-12, atol=1e-14)


# It ends.


def test_it_ends_a_hundred_times(comm):
    """With pauses, ends in the midst of an epoch, parts without parameters, batches smaller than the ranks."""
    common = np.random.default_rng(11)
    pauses = np.random.default_rng([11, comm.rank])
    for _ in range(100):
        staleness = str(common.choice(["0", "1", "4", "inf", "pairs"]))
        kind = {"strategy": "async", "staleness": staleness} if staleness != "pairs" else {"strategy": "ad-psgd"}
        made = training(
            comm,
            blobs(int(common.integers(5, 40))),
            **kind,
            batch_size=int(common.integers(1, 12)),
            epochs=2,
            backups=1 if staleness == "0" and P > 1 and common.integers(2) else None,
        )
        if common.integers(4) == 0:  # an MPI that does not let two threads call it
            made.strategy._run.transport.threads = False
        longest, most = common.choice([0, 0, 2e-4, 2e-3]), int(common.integers(1, 9))
        result, _ = slowed(made, lambda longest=longest: pauses.uniform(0, longest), max_steps=most)
        assert same_everywhere(comm, result.params)
        assert result.steps == min(most, 2 * made.steps_per_epoch)


def test_what_is_asked_for_wrongly(comm):
    for wrong, message in {
        "staleness=-1": "--staleness must be a whole number of steps, or inf, got '-1'",
        "staleness=2 backups=1": "--backups 1 is for synchronous steps",
        f"staleness=0 backups={P}": f"--backups must be fewer than the {P} worker",
        "staleness=0 compensate=1": "--compensate is for gradients that are late",
        "staleness=0 slow_down=1": "--slow-down is for gradients that are late",
        "workers=3": "--workers is for simulated ones",
        "delays=1 workers=33": "--workers must be as many as a batch has samples at most, got 33",
        f"delays=1 workers={P + 1} shards=1": f"--shards gives each of {P} rank",
    }.items():
        given = dict(option.split("=") for option in wrong.split())
        numbers = {name: value if name == "staleness" else kind_of(name)(int(value)) for name, value in given.items()}
        with pytest.raises(UserError, match=message):
            training(comm, blobs(20), strategy="async", **numbers)
