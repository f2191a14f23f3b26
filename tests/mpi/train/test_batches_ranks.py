"""Shares of batches that are not even: the same training, and by speed."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

from mpicoll import UserError
from mpicoll.train.checkpoint import latest
from mpicoll.train.snapshot import restore, save
from mpicoll.train.strategies import STRATEGIES
from training import DECENTRAL, REPEATABLE, blobs, trained, training

P = MPI.COMM_WORLD.size
pytestmark = [pytest.mark.mpi, pytest.mark.skipif(P > 5, reason="five ranks show what more would, and sooner")]
RISING = ",".join(str(rank + 1) for rank in range(P))
UNEQUAL = ",".join(["1000", *["1"] * (P - 1)])
SHARING = [name for name in STRATEGIES if name != "ad-psgd"]  # whose ranks take shares when they are ready
FACTS: dict[str, Any] = {"settings": {}, "environment": {}}


class Watched:
    """A model that takes its time for each sample, and notes which it has seen."""

    def __init__(self, model: Any, seconds: float = 0.0) -> None:
        self._model, self._seconds, self.size = model, seconds, model.size
        self.seen: list[np.ndarray] = []

    def loss_and_grad(self, params: Any, batch: Any, grad: Any) -> Any:
        self.seen.append(batch.x[:, 0])
        time.sleep(self._seconds * len(batch.y))
        return self._model.loss_and_grad(params, batch, grad)


@pytest.mark.parametrize("batch_size", [1, 7, 32, 1000])
@pytest.mark.parametrize("balance", [RISING, UNEQUAL, "auto"])
@pytest.mark.parametrize("algorithm", ["auto", "ring"])
def test_sync_is_the_same_whatever_the_shares(comm, balance, batch_size, algorithm):
    given = {"batch_size": batch_size, "algorithm": algorithm, "epochs": 2 if batch_size == 1 else 3}
    even = trained(comm, blobs(101), **given)
    other = trained(comm, blobs(101), balance=balance, **given)
    np.testing.assert_allclose(other.params, even.params, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(other.epochs[-1].train_loss, even.epochs[-1].train_loss, rtol=1e-9)


@pytest.mark.parametrize("strategy", SHARING)
def test_equal_weights_are_the_bits_of_none(comm, strategy):
    given = {"strategy": strategy, **REPEATABLE[strategy]}
    even, equal = trained(comm, blobs(101), **given), trained(comm, blobs(101), balance=",".join(["0.1"] * P), **given)
    np.testing.assert_array_equal(equal.params, even.params)
    assert even.epochs[0].weights is None
    assert equal.epochs[0].weights == [1 / P] * P


def test_async_without_staleness_is_sync_bit_for_bit(comm):
    together = trained(comm, blobs(101, "f4"), balance=RISING)
    other = trained(comm, blobs(101, "f4"), balance=RISING, strategy="async", staleness="0")
    np.testing.assert_array_equal(other.params, together.params)


@pytest.mark.parametrize("strategy", DECENTRAL)
def test_to_first_order_every_sample_counts_the_same(comm, strategy):
    """One step of SGD of each rank, from one point: the mean is that of sync."""
    given = {"batch_size": 101, "epochs": 1, "momentum": 0.0}
    together = trained(comm, blobs(101), **given)
    other = trained(comm, blobs(101), strategy=strategy, balance=RISING, **given)
    np.testing.assert_allclose(other.params, together.params, rtol=1e-9, atol=1e-12)


@pytest.mark.skipif(P == 1, reason="nobody to be slower than")
@pytest.mark.parametrize("strategy", SHARING)
def test_a_slow_rank_gets_less_and_every_sample_comes_once(comm, strategy):
    """1 ms a sample, and 3 ms on the last rank.  It begins with even shares, and goes half of the way in each epoch."""
    made = training(comm, blobs(240), strategy=strategy, balance="auto", batch_size=40, epochs=4)
    watched = Watched(made.model, 0.003 if comm.rank == P - 1 else 0.001)
    made.model = watched
    counts: list[list[int]] = []

    def every_sample_once(epoch: Any) -> None:
        seen = comm.allgather(np.concatenate(watched.seen))
        np.testing.assert_array_equal(np.sort(np.concatenate(seen)), np.sort(made.data.train.x[:, 0]))
        counts.append(list(map(len, seen)))
        watched.seen.clear()

    result = made.run(every_sample_once)
    *fast, slow = made.weights
    assert min(fast) / slow > 2
    assert max(fast) / slow < 4.5
    assert counts[-1][-1] < min(counts[-1][:-1])
    assert result.epochs[0].weights == [1 / P] * P
    for epoch in result.epochs:
        assert sum(epoch.weights) == pytest.approx(1)
    assert len(set(comm.allgather((tuple(made.weights), *(tuple(epoch.weights) for epoch in result.epochs))))) == 1


def test_fixed_weights_stay(comm):
    made = training(comm, blobs(60), balance=RISING, epochs=2)
    watched = Watched(made.model)
    made.model = watched
    share = [2 * (rank + 1) / (P * (P + 1)) for rank in range(P)]
    for epoch in made.run().epochs:
        np.testing.assert_allclose(epoch.weights, share)
    assert sum(map(len, watched.seen)) == pytest.approx(120 * share[comm.rank], abs=4)


@pytest.mark.parametrize("balance", [RISING, "auto"])
def test_a_resumed_run_begins_with_the_weights_that_were(comm, folder, balance):
    made = training(comm, blobs(101), strategy="gossip", balance=balance, epochs=4)
    paths: list[Path] = []

    def saving(self: Any) -> None:
        paths.append(save(self, folder / "checkpoints", FACTS))
        held.append(self.weights)

    held: list[list[float]] = []
    whole = made.run(checkpoint=saving)
    comm.Barrier()
    other = training(comm, blobs(101), strategy="gossip", balance=balance, epochs=4)
    restore(other, latest(paths[1]))
    assert other.weights == held[1]
    if balance == RISING:
        np.testing.assert_array_equal(other.run().params, whole.params)
    # What is asked for now goes before what was, and weights of other ranks are not those of these.
    changed = training(comm, blobs(101), strategy="gossip", epochs=4)
    restore(changed, latest(paths[1]))
    assert changed.weights is None
    alone = training(MPI.COMM_SELF, blobs(101), strategy="gossip", balance="auto", epochs=4)
    restore(alone, latest(paths[1]))
    assert alone.weights == [1.0]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        *(
            ({"balance": wrong}, f"--balance must be auto, or {P} positive number.* got '{wrong}'")
            for wrong in ("", "fast", "0" + ",1" * (P - 1), "-1" + ",1" * (P - 1), "nan" + ",1" * (P - 1))
        ),
        ({"balance": ",".join(["1"] * (P + 1))}, f"--balance must be auto, or {P} positive number"),
        ({"balance": "inf" + ",1" * (P - 1)}, f"--balance must be auto, or {P} positive number"),
        ({"strategy": "async", "delays": 1}, "nothing to share out with --delays, where times are drawn"),
        ({"strategy": "ad-psgd"}, "nothing to share out with ad-psgd, where ranks take"),
        ({"strategy": "async", "staleness": "inf"}, "nothing to share out with --staleness inf, where ranks take"),
        ({"shards": True}, "nothing to share out with --shards, where each rank has data of its own: leave one"),
    ],
)
def test_what_is_asked_for_wrongly(comm, given, message):
    data = blobs(60)._replace(sharded="shards" in given)
    for balance in [given["balance"]] if "balance" in given else ["auto", RISING]:
        with pytest.raises(UserError, match=message) as caught:
            training(comm, data, **{**given, "balance": balance})
        assert len(set(comm.allgather(str(caught.value)))) == 1
