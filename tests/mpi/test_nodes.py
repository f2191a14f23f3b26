"""Allreduce on several nodes, which are pretended: ranks of one node that is taken for several."""

import numpy as np
import pytest
from mpi4py import MPI

import mpicoll
from contract import own_data
from mpicoll.measure.contestants import implementations
from mpicoll.measure.task import Task
from mpicoll.measure.timing import Settings, measure
from mpicoll.mpi import select, shared
from mpicoll.mpi.engine import account
from mpicoll.mpi.state import State

P, WORLD_RANK = MPI.COMM_WORLD.size, MPI.COMM_WORLD.rank
pytestmark = [pytest.mark.mpi, pytest.mark.skipif(P == 7, reason="five, six and eight ranks show it")]
LAYOUTS = {  # which node a rank is on
    "pairs": lambda rank: rank // 2,
    "dealt out": lambda rank: rank % 2,
    "threes": lambda rank: rank // 3,
    "fours": lambda rank: rank // 4,
    "first two, and the rest": lambda rank: int(rank > 1),
}


def smallest(layout: str) -> int:
    """Ranks on the node that has the fewest; 0 if there is but one node."""
    nodes = [LAYOUTS[layout](rank) for rank in range(P)]
    return min(map(nodes.count, nodes)) if len({*nodes}) > 1 else 0


@pytest.fixture(params=LAYOUTS)
def ours(request, comm, monkeypatch):
    """A ``Comm`` that takes itself to be on several nodes, with small boxes, so that there are many tiles."""
    layout = LAYOUTS[request.param]
    monkeypatch.setattr(shared, "node_of", lambda comm: MPI.Intracomm(comm.Split(layout(WORLD_RANK), comm.rank)))
    monkeypatch.setattr(shared, "BOX_ACROSS", 4096)
    monkeypatch.setitem(select.SHARED_FROM, "allreduce_shared", 0)
    made = mpicoll.Comm(comm)
    assert made._state is not None
    assert made._state.spans == (smallest(request.param) > 1)
    if not made._state.spans:
        if smallest(request.param) == 1:
            with pytest.raises(ValueError, match=r"it needs two ranks or more that share memory, on every node, and"):
                made.Allreduce(MPI.IN_PLACE, np.zeros(5), algorithm="shared")
        pytest.skip("no several nodes of several ranks")
    return made


@pytest.mark.parametrize("dtype", ["f4", "i8", "f2"])
def test_sums_in_all_kinds_of_memory(ours, dtype):
    for count in (0, 1, P - 1, 9001):
        expected = sum(own_data(count, rank, dtype) for rank in range(P))
        for kind in ("ordinary", "shared", "mixed"):
            x = own_data(count, ours.rank, dtype)
            placed = ours.asarray(x)
            if kind == "shared" or (kind == "mixed" and ours.rank % 3):
                x = placed
            np.testing.assert_array_equal(ours.allreduce_shared(x), expected)
            np.testing.assert_array_equal(ours.allreduce_shared(x, "max"), largest(count, dtype))
            y = np.zeros_like(x)
            ours.Allreduce(x, y, algorithm="shared")
            np.testing.assert_array_equal(y, expected)
            ours.Allreduce(MPI.IN_PLACE, x, algorithm="shared")
            np.testing.assert_array_equal(x, expected)


def largest(count, dtype):
    return np.max([own_data(count, rank, dtype) for rank in range(P)], axis=0)


def test_means_are_divided_once_by_all(ours):
    x = np.full(1009, ours.rank + 0.5)
    ours.Allreduce(MPI.IN_PLACE, x, "mean", algorithm="shared")
    np.testing.assert_array_equal(x, P / 2)


def test_the_canonical_order_where_it_can_be(ours):
    """Else by messages, and nothing that claims to be."""
    x = np.random.default_rng(ours.rank).normal(size=3001).astype("f4")
    expected = x.copy()
    ours.Allreduce(MPI.IN_PLACE, expected, algorithm="recursive_doubling")
    y = x.copy()
    ours.Allreduce(MPI.IN_PLACE, y, deterministic=True)
    np.testing.assert_array_equal(y, expected)
    nodes = ours.allgather(ours._state.node.processes)
    powers = {len({*nodes}), *map(len, nodes)}
    one_by_one = nodes == sorted(nodes, key=nodes.index)
    if one_by_one and len({*map(len, nodes)}) == 1 and all(n & (n - 1) == 0 for n in powers):
        ours.Allreduce(MPI.IN_PLACE, x, algorithm="shared", deterministic=True)
        np.testing.assert_array_equal(x, expected)
    else:
        with pytest.raises(ValueError, match="shared cannot do this allreduce here"):
            ours.Allreduce(MPI.IN_PLACE, x, algorithm="shared", deterministic=True)


def test_auto_goes_that_way_from_a_size_on_however_the_array_is_passed(ours, monkeypatch):
    monkeypatch.setattr(select, "ACROSS_FROM", 1 << 12)
    ours._state.follow({})
    for count in (511, 512, 513):
        x = np.full(count, ours.rank + 1.0)
        ours.Allreduce(MPI.IN_PLACE, x if ours.rank else [x, count, MPI.DOUBLE])
        np.testing.assert_array_equal(x, P * (P + 1) / 2)
    assert account(np.zeros(512), ours)[0] == "shared"
    assert account(np.zeros(511), ours)[0] == "native"


def test_what_goes_from_node_to_node_is_known(ours, monkeypatch):
    """After the first call; of each rank, what it really sends."""
    sent: list[int] = []
    run = State.run
    monkeypatch.setattr(State, "run", lambda self, plan, *more: (sent.append(plan.bytes_sent), run(self, plan, *more)))
    asked = {"algorithm": "shared"}
    assert account(np.zeros(5), ours, **asked) == ("unknown", None, None)
    for count, dtype in ((9001, "f4"), (P + 1, "f8"), (5000, "f2"), (1, "f4")):
        sent.clear()
        x = np.zeros(count, dtype)
        ours.Allreduce(MPI.IN_PLACE, x, **asked)
        assert account(x, ours, **asked)[:2] == ("shared", sum(sent))
        assert ours.allreduce(sum(sent)) > 0


def test_other_collectives_go_by_messages(ours):
    x = np.full(100_000, ours.rank + 1.0)
    with pytest.raises(ValueError, match="shared cannot do this reduce here"):
        ours.Reduce(x, np.empty_like(x), algorithm="shared")
    y = np.empty_like(x)
    ours.Reduce(x, y, root=P - 1)
    assert ours.rank < P - 1 or (y == P * (P + 1) / 2).all()
    np.testing.assert_array_equal(mpicoll.allgather(x[:50_000], ours)[:, 0], np.arange(P) + 1.0)


def test_it_is_measured_beside_the_others(ours):
    f4 = np.dtype("f4")
    calls = implementations(ours, "allreduce", f4, "off")
    tasks = [Task("allreduce", count, f4) for count in (1, 5000)]
    settings = Settings(max_time=0, min_reps=2, warmup=0)
    found = measure(ours, {name: calls[name] for name in ("native", "shared")}, tasks, settings)
    assert {(one.name, one.wrong) for one in found} == {("native", 0), ("shared", 0), ("null", 0)}
    assert "shared" not in implementations(ours, "reduce", f4, "off")


def test_it_can_fail(ours, monkeypatch):
    """Nodes that do not add up with each other have other sums."""
    monkeypatch.setattr(ours._state.node, "across", lambda piece, operation: None)
    x = np.ones(10)
    ours.Allreduce(MPI.IN_PLACE, x, algorithm="shared")
    assert (x == ours._state.node.size).all()
