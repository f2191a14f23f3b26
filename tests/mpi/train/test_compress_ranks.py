"""Training with compression: ranks stay together, learn, and send as little as they should."""

from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

from mpicoll import UserError
from mpicoll.train.checkpoint import latest
from mpicoll.train.models import MODELS
from mpicoll.train.snapshot import restore, save
from mpicoll.train.strategies import Now
from mpicoll.train.strategies.sync import Sync
from training import blobs, broken_on_the_last_rank, trained, training

P = MPI.COMM_WORLD.size
pytestmark = [pytest.mark.mpi, pytest.mark.skipif(P > 5, reason="five ranks show what more would, and sooner")]
MODEL = MODELS["mlp"](6, 3, (8,))
KINDS = ["16bit", "sign", "topk:0.1", "powersgd:1"]
ALONE: list[dict[str, Any]] = [
    {"strategy": "gossip", "graph": "ring"},
    {"strategy": "gossip", "graph": "matching", "mix_first": True},
    {"strategy": "async", "staleness": "0"},
    {"strategy": "async", "staleness": "2"},
]
"""In which every rank sends codes of its own."""
WAYS: list[dict[str, Any]] = [{"strategy": "sync"}, {"strategy": "average", "every": 3, "momenta": "average"}]
every_kind = pytest.mark.parametrize("kind", KINDS)
every_way = pytest.mark.parametrize("way", WAYS, ids=lambda way: way["strategy"])


@every_way
@every_kind
def test_all_ranks_stay_together_and_training_learns(comm, kind, way):
    data = blobs(301, "f4")
    given = {"epochs": 12, "lr": 0.1, "momentum": 0.0, **way}
    made = training(comm, data, compress=kind, **given)
    result = made.run()
    if way["strategy"] == "sync" or result.steps % way["every"] == 0:
        assert len({params.tobytes() for params in comm.allgather(made.params)}) == 1
    assert len({params.tobytes() for params in comm.allgather(result.params)}) == 1
    assert result.epochs[-1].train_loss < 0.5 * result.epochs[0].train_loss
    usual = trained(comm, data, **given)
    assert result.epochs[-1].train_loss < usual.epochs[-1].train_loss + 0.05
    assert not np.allclose(result.params, usual.params, rtol=1e-6)


@every_way
@pytest.mark.parametrize("batch_size", [1, 7, 32])
def test_all_of_the_elements_are_no_compression(comm, way, batch_size):
    data, given = blobs(101), {"batch_size": batch_size, "optimizer": "adam", "lr": 0.01, **way}
    together, usual = (trained(comm, data, compress=kind, **given) for kind in ("topk:1.0", None))
    np.testing.assert_allclose(together.params, usual.params, rtol=1e-7, atol=1e-9)
    losses = [[epoch.train_loss for epoch in result.epochs] for result in (together, usual)]
    np.testing.assert_allclose(*losses, rtol=1e-7)


@pytest.mark.parametrize("way", ALONE)
@pytest.mark.parametrize("kind", ["16bit", "sign", "topk:0.1"])
def test_training_learns_where_every_rank_sends_codes_of_its_own(comm, kind, way):
    given = {"epochs": 12, "lr": 0.1, "momentum": 0.0, **way}
    result, usual = (trained(comm, blobs(301), compress=kind, **given) for kind in (kind, None))
    assert result.epochs[-1].train_loss < 0.5 * result.epochs[0].train_loss
    assert result.epochs[-1].train_loss < usual.epochs[-1].train_loss + 0.05
    assert (result.ranks[0].bytes_sent or 0) < 0.9 * (usual.ranks[0].bytes_sent or 1)


@pytest.mark.parametrize("way", ALONE[:3])
@pytest.mark.parametrize("batch_size", [1, 7, 32])
def test_all_of_the_elements_are_no_compression_either(comm, way, batch_size):
    given = {"batch_size": batch_size, "optimizer": "adam", "lr": 0.01, "epochs": 2, **way}
    result, usual = (trained(comm, blobs(51), compress=kind, **given) for kind in ("topk:1.0", None))
    np.testing.assert_allclose(result.params, usual.params, rtol=1e-7, atol=1e-9)


@pytest.mark.skipif(P < 3, reason="needs a graph of which some ranks are no neighbors")
def test_neighbors_know_the_same_of_each_other_and_the_sum_stays(comm):
    made = training(comm, blobs(64), strategy="gossip", graph="ring", compress="topk:0.1", lr=1e-9, momentum=0.0)
    strategy = made.strategy
    made.params += np.random.default_rng(comm.rank).normal(size=made.params.shape)
    before, apart = comm.allreduce(made.params), np.ptp(comm.allgather(made.params), axis=0).max()
    for step in range(300):
        made.sums[:] = 0
        strategy.step(Now(1, step, 1e-9), 1, P)
    np.testing.assert_allclose(comm.allreduce(made.params), before, rtol=0, atol=1e-11)
    assert np.ptp(comm.allgather(made.params), axis=0).max() < 0.01 * apart
    peers, known = strategy.graph.peers(comm.rank), strategy.differences.known
    everyones = comm.allgather({peer: vectors.tobytes() for peer, vectors in zip(peers, known, strict=True)})
    for peer, (own, other) in zip(peers, known, strict=True):
        assert everyones[peer][comm.rank] == other.tobytes() + own.tobytes()
    made.params[:] = 7  # a run goes on from the mean: that is what they know of each other then
    strategy.restore({}, own=False)
    assert (known == 7).all()


@pytest.mark.skipif(P == 1, reason="needs other ranks")
@pytest.mark.parametrize(("kind", "algorithm"), [("powersgd:1", "shared"), ("sign", "circulant")])
@pytest.mark.parametrize("way", [{}, {"strategy": "average", "every": 1}])
def test_every_rank_steps_all_parameters_and_sums_are_in_shared_memory(comm, way, kind, algorithm):
    """As docs/training.md has it, of ranks on one node."""
    made = training(comm, blobs(64), compress=kind, epochs=1, **way)
    assert made.optimizer.part == slice(0, made.model.size)
    assert made.run().algorithm == algorithm


def test_graphs_that_are_not_symmetric_cannot_be_compressed(comm):
    if P in (1, 2, 4):
        training(comm, blobs(30), strategy="butterfly", compress="sign")
    if P > 2:
        with pytest.raises(UserError, match=f"needs a symmetric graph, and the exponential graph of {P} ranks is none"):
            training(comm, blobs(30), strategy="gossip", compress="sign")


def test_what_is_kept_back_counts_the_same_in_a_short_batch(comm):
    """The mean gradient is 1 in every batch, whatever its length: what was applied and what is kept are its sum."""
    made = training(comm, blobs(30), compress="topk:0.1", lr=1.0, momentum=0.0)
    strategy, start = made.strategy, made.params.copy()
    assert isinstance(strategy, Sync)
    assert strategy.compressor is not None
    for step, length in enumerate((64, 3, 64, 1)):
        made.sums[:] = length * np.linspace(1, 2, len(made.sums)) / P
        strategy.step(Now(1, step, 1.0), length, length)
    kept = comm.allreduce(strategy.compressor.residual)
    wanted = 4 * np.linspace(1, 2, len(made.sums))[:-2]
    np.testing.assert_allclose(start - made.params + kept, wanted, rtol=1e-12)
    assert kept.any()


@pytest.mark.parametrize(
    ("kind", "bytes_sent"),
    [
        (None, 2 * (P - 1) * (MODEL.size + 2) * 4),
        ("16bit", P * (P - 1) * (8 + 8 + 168)),  # fields begin at multiples of 8 bytes
        ("sign", P * (P - 1) * (8 + 8 + 16)),
        ("topk:0.1", P * (P - 1) * (8 + 40 + 16)),
        ("powersgd:1", 2 * (P - 1) * 4 * ((6 + 8 + 8 + 3 + 2) + (8 + 3))),
    ],
)
@pytest.mark.parametrize("algorithm", ["ring", "circulant"])
def test_bytes_are_those_of_the_codes(comm, kind, bytes_sent, algorithm):
    assert MODEL.size == 83
    ranks = trained(comm, blobs(64, "f4"), epochs=1, algorithm=algorithm, compress=kind).ranks
    assert sum(rank.bytes_sent or 0 for rank in ranks) == 2 * bytes_sent  # two steps
    result = trained(comm, blobs(64, "f4"), epochs=1, compress=kind)
    if kind and "powersgd" not in kind:  # by messages, though memory is shared
        assert result.algorithm == "circulant"
        assert sum(rank.bytes_sent or 0 for rank in result.ranks) == 2 * bytes_sent
    natively = trained(comm, blobs(64, "f4"), epochs=1, algorithm="native", compress=kind).ranks
    assert {(rank.bytes_sent, rank.messages) for rank in natively} == {(None, None)}


@pytest.mark.parametrize("where", ["loss", "gradient"])
@every_way
@every_kind
def test_what_becomes_nan_on_one_rank_ends_the_run_on_all(comm, monkeypatch, kind, way, where):
    broken_on_the_last_rank(comm, monkeypatch, where)
    with pytest.raises(UserError, match=r"(the loss became nan|parameters became infinite or nan) at step") as caught:
        trained(comm, blobs(40), epochs=2, batch_size=10, compress=kind, **way)
    assert len(set(comm.allgather(str(caught.value)))) == 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"compress": "gzip"}, "--compress must be 16bit, sign, topk:SHARE .*, got 'gzip'"),
        ({"compress": "powersgd:7"}, "--compress powersgd:7 makes no matrix of this model smaller"),
        ({"compress": "sign", "strategy": "ad-psgd"}, "--compress is not for the ad-psgd strategy, but for sync, aver"),
        (
            {"compress": "powersgd:1", "strategy": "gossip", "graph": "ring"},
            "--compress powersgd:1 .*gossip.*: take 16bit, sign or topk",
        ),
        ({"compress": "powersgd:1", "strategy": "async"}, "--compress powersgd:1 .*async.*: take 16bit, sign or topk"),
        ({"compress": "sign", "strategy": "async", "delays": 1}, "--compress is not for --delays"),
        ({"compress": "sign", "strategy": "average", "outer": "bmuf"}, "--compress .*--outer mean: leave out"),
        ({"compress": "sign", "strategy": "average", "outer_momentum": 0.5}, "--compress .*--outer mean: leave out"),
    ],
)
def test_settings_that_will_not_do(comm, given, message):
    with pytest.raises(UserError, match=message) as caught:
        training(comm, blobs(30), **given)
    assert len(set(comm.allgather(str(caught.value)))) == 1


@every_way
def test_residuals_are_kept_by_each_rank_and_dropped_by_another_number_of_them(comm, folder, way):
    facts: dict[str, Any] = {"settings": {}, "environment": {}}
    made = training(comm, blobs(101), compress="powersgd:1", epochs=1, **way)
    made.run(checkpoint=lambda self: save(self, folder / "checkpoints", facts))
    comm.Barrier()
    state = made.strategy.state()
    assert P == 1 or len({residual.tobytes() for residual in comm.allgather(state["residual"])}) == P
    assert len({q.tobytes() for q in comm.allgather(state["q"])}) == 1
    again = training(comm, blobs(101), compress="powersgd:1", **way)
    restore(again, latest(folder))
    for name, array in again.strategy.state().items():
        np.testing.assert_array_equal(array, state[name])
    if P > 1:
        alone = training(MPI.COMM_SELF, blobs(101), compress="powersgd:1", **way)
        alone.strategy.state()["residual"][:] = 1
        restore(alone, latest(folder))
        assert not alone.strategy.state()["residual"].any()
        np.testing.assert_array_equal(alone.strategy.state()["q"], state["q"])
