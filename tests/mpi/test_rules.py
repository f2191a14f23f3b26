"""``auto`` does what the rules say, the same on all ranks, and rules come from a profile where there is one."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

import mpicoll
from contract import own_data
from mpicoll.algorithms import ALGORITHMS
from mpicoll.collective import COLLECTIVES
from mpicoll.errors import UserError
from mpicoll.mpi.launch import library_name
from mpicoll.mpi.shared import Node
from mpicoll.mpi.state import State
from mpicoll.tuning.fingerprint import Fingerprint, machine
from mpicoll.tuning.profile import Profile, write_profile
from mpicoll.tuning.rules import Rule

P, RANK = MPI.COMM_WORLD.size, MPI.COMM_WORLD.rank
SMALL, LONG = 96, 300  # elements of float64: in each of the rules
pytestmark = [
    pytest.mark.mpi,
    pytest.mark.usefixtures("python_engine"),
    pytest.mark.skipif(P in (6, 7), reason="five ranks and eight show it"),
]
several = pytest.mark.skipif(P == 1, reason="one rank has no choice")


@pytest.fixture
def ours(comm: MPI.Intracomm) -> mpicoll.Comm:
    return mpicoll.Comm(comm)


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The algorithms that ran, but for the MPI library's own."""
    names: list[str] = []
    run, plan = Node.run, State.plan

    def planned(self: State, name: tuple[str, ...], *args, **kwargs):
        names.append(name[1])
        return plan(self, name, *args, **kwargs)

    def shared(self: Node, *args, **kwargs) -> bool:
        names.append("shared")
        return run(self, *args, **kwargs)

    monkeypatch.setattr(State, "plan", planned)
    monkeypatch.setattr(Node, "run", shared)
    return names


def two(first: str, second: str, last: str, at: int = SMALL * P * 8) -> tuple[Rule, Rule]:
    """Up to so many bytes the first, beyond it the second, and one that can do what these cannot."""
    return Rule(at, tuple(dict.fromkeys((first, last)))), Rule(None, tuple(dict.fromkeys((second, last))))


def calls(comm: mpicoll.Comm, count: int) -> dict[str, Callable[[], None]]:
    """Each collective with ``count`` elements a rank, and the look at what it gives."""
    everyones = [own_data(count * P, rank) for rank in range(P)]
    total, mine, root = np.sum(everyones, 0), everyones[RANK], P - 1
    part = slice(RANK * count, (RANK + 1) * count)

    def allreduce() -> None:
        x = mine.copy()
        comm.Allreduce(MPI.IN_PLACE, x)
        np.testing.assert_array_equal(x, total)
        np.testing.assert_array_equal(mpicoll.allreduce(mine.copy(), comm), total)

    def reduce() -> None:
        x = np.empty_like(mine) if root == RANK else None
        comm.Reduce(mine, x, root=root)
        assert x is None or (x == total).all()

    def bcast() -> None:
        x = everyones[root].copy() if root == RANK else np.empty_like(mine)
        comm.Bcast(x, root)
        np.testing.assert_array_equal(x, everyones[root])

    def reduce_scatter() -> None:
        x = np.empty(count)
        comm.Reduce_scatter_block(mine, x)
        np.testing.assert_array_equal(x, total[part])
        comm.Reduce_scatter(mine, x, [count] * P)
        np.testing.assert_array_equal(x, total[part])

    def allgather() -> None:
        x = np.empty(count * P)
        comm.Allgather(mine[:count], x)
        np.testing.assert_array_equal(x, np.concatenate([one[:count] for one in everyones]))

    def gather() -> None:
        x = np.empty(count * P) if root == RANK else None
        comm.Gather(mine[:count], x, root)
        assert x is None or (x == np.concatenate([one[:count] for one in everyones])).all()

    def scatter() -> None:
        x = np.empty(count)
        comm.Scatter(mine if root == RANK else None, x, root)
        np.testing.assert_array_equal(x, everyones[root][part])

    return {call.__name__: call for call in (allreduce, reduce, bcast, reduce_scatter, allgather, gather, scatter)}


@several
@pytest.mark.parametrize("check", ["header", "off"])
@pytest.mark.parametrize("collective", COLLECTIVES)
def test_every_collective_goes_by_them(comm, collective, check, done):
    ours = mpicoll.Comm(comm, check=check)
    state = ours._state
    last = next(name for name, row in ALGORITHMS[collective].items() if row.canonical or not row.reduces)
    names = [*ALGORITHMS[collective], "native", *(["shared"] if "reduce" in collective and state.shares else [])]
    for first, second in zip(names, [*names[1:], names[0]], strict=True):
        state.follow({collective: two(first, second, last)})
        for count, expected in ((SMALL, first), (SMALL + 1, second), (LONG, second), (0, first)):
            done.clear()
            calls(ours, count)[collective]()
            ran = {*done} or {"native"}
            assert ran == {expected} or (count == 0 and ran == {"native"}), (first, second, count)


@several
@pytest.mark.parametrize("check", ["header", "off"])
def test_the_short_way_to_our_algorithms_is_the_same_call(comm, check, done):
    """Ranks may describe the array in ways that go the long way; out of place, by several operations, after others."""
    ours = mpicoll.Comm(comm, check=check)
    ours._state.follow({"allreduce": (Rule(None, ("recursive_doubling",)),)})
    operations = (MPI.SUM, np.add), (MPI.MAX, np.maximum), (MPI.SUM, np.add), (MPI.PROD, np.multiply)
    for n, (op, ufunc) in enumerate(operations):
        for count in (0, 1, 7, 3000):  # copied, and not
            everyones = [own_data(count, rank) % 3 + 1 for rank in range(P)]
            x, y = everyones[RANK].copy(), np.zeros(count)
            ours.Allreduce(MPI.IN_PLACE, [x, count, MPI.DOUBLE] if n % P == RANK else x, op)
            ours.Allreduce([everyones[RANK], MPI.DOUBLE] if n % P == RANK else everyones[RANK], y, op)
            ours.Allreduce(everyones[RANK], y.reshape(-1, 1), op)  # of another shape
            np.testing.assert_array_equal(x, ufunc.reduce(everyones))
            np.testing.assert_array_equal(y, x)
    assert {*done} == {"recursive_doubling"}
    if check == "header":
        with pytest.raises(mpicoll.MismatchError):
            ours.Allreduce(MPI.IN_PLACE, np.ones(3 if RANK else 4))


@several
def test_others_keep_the_defaults(ours, done):
    ours._state.follow({"reduce": (Rule(None, ("tree",)),)})
    calls(ours, SMALL)["allreduce"]()
    assert not done
    calls(ours, SMALL)["reduce"]()
    assert done == ["tree"]


@several
def test_deterministic_calls_only_get_what_is(ours, done):
    rules = (Rule(800, ("native", "ring", "recursive_doubling")), Rule(None, ("circulant", "halving_doubling")))
    ours._state.follow({"allreduce": rules})
    everyones = [np.random.default_rng(rank).normal(size=101) for rank in range(P)]
    for x in (everyones[RANK][:100].copy(), everyones[RANK].copy()):
        mpicoll.allreduce(x, ours, deterministic=True)
        y = everyones[RANK][: len(x)].copy()
        mpicoll.allreduce(y, ours, algorithm="tree")
        assert x.tobytes() == y.tobytes()
    assert done == ["recursive_doubling", "tree", "halving_doubling", "tree"]


@several
def test_a_call_that_the_first_cannot_do_gets_the_next(ours, done):
    """Operations that do not commute, 16-bit floats, and what must not be the MPI library's own."""
    ours._state.follow({"allreduce": (Rule(None, ("native", "ring", "recursive_doubling")),)})
    x = np.ones(5, "f2")
    ours.Allreduce(MPI.IN_PLACE, x)
    assert done == ["ring"]
    assert (x == P).all()
    handle = mpicoll.allreduce_init(np.ones(5), ours)
    assert done == ["ring", "ring"]
    handle.free()

    def first(a: MPI.buffer, b: MPI.buffer, datatype: MPI.Datatype) -> None:
        b[:] = a

    op = MPI.Op.Create(first, commute=False)
    y = np.full(5, RANK + 1.0)
    ours.Allreduce(MPI.IN_PLACE, y, op)
    assert (y == 1).all()
    mpicoll.allreduce_init(y, ours, op).free()
    assert done == ["ring", "ring", "recursive_doubling"]
    op.Free()


@several
def test_one_result_for_all_is_the_librarys_while_small(ours, done):
    small, large = np.full(7, RANK + 1.0), np.full((3, 1 << 16), RANK + 1.0)
    for x, how in ((small, []), (large, ["shared"])):
        result = ours.allreduce_shared(x)
        assert (result == P * (P + 1) / 2).all()
        assert not result.flags.writeable
        assert done == how
    for x in (small.reshape(7, 1).T, small[::1], np.asfortranarray(np.ones((2, 3)))):
        result = ours.allreduce_shared(x, "max")
        assert result.shape == x.shape
        assert (result == ours.allreduce(x.max(), MPI.MAX)).all()
    with pytest.raises((TypeError, ValueError)):
        ours.allreduce_shared(small, "none")


@several
@pytest.mark.parametrize("rules", [None, (Rule(None, ("recursive_doubling",)),)], ids=["defaults", "ours"])
def test_one_result_is_the_same_call_in_whatever_form(ours, rules):
    if rules:
        ours._state.follow({"allreduce": rules})
    x = np.arange(6.0).reshape(2, 3) + RANK
    total = sum(np.arange(6.0).reshape(2, 3) + rank for rank in range(P))
    for other in (lambda: ours.allreduce_shared(x, "sum"), lambda: ours.allreduce_shared(np.asfortranarray(x.T).T)):
        result = other() if RANK else ours.allreduce_shared(x)
        np.testing.assert_array_equal(result, total)


@several
@pytest.mark.parametrize("name", ["tree", "chain", "scatter_allgather"])
def test_what_is_only_read_is_broadcast_by_our_algorithms_too(ours, name):
    ours._state.follow({"bcast": (Rule(None, (name,)),)})
    for count in (0, 3, 10_000):
        sent = own_data(count, P - 1)
        x = np.zeros(count)
        sent.flags.writeable = False
        ours.Bcast(sent if RANK == P - 1 else x, P - 1)
        ours.Bcast(bytes(sent) if RANK == P - 1 else x.view("u1"), P - 1)
        assert RANK == P - 1 or (x == sent).all()


@several
def test_reduce_scatter_without_counts_goes_by_rules_as_well(ours, done):
    ours._state.follow({"reduce_scatter": (Rule(None, ("halving",)),)})
    mine, part = own_data(3 * P, RANK), np.zeros(3)
    ours.Reduce_scatter(mine, part)
    np.testing.assert_array_equal(part, sum(own_data(3 * P, rank) for rank in range(P))[3 * RANK :][:3])
    assert done == ["halving"]


@several
def test_nothing_at_all_in_whatever_form(ours):
    ours._state.follow({name: (Rule(None, ("shared", "tree")),) for name in ("reduce",)})
    ours._state.follow({"allreduce": (Rule(None, ("shared", "recursive_doubling")),)})
    for _ in range(3):
        ours.Allreduce(MPI.IN_PLACE, np.zeros(0), MPI.SUM if RANK else "sum")
        ours.Reduce(np.zeros(0), np.zeros(0), MPI.SUM if RANK else "sum", root=P - 1)
    x = np.ones(3)
    ours.Allreduce(MPI.IN_PLACE, x)
    assert (x == P).all()


@several
def test_a_mismatch_leaves_the_result_as_it_was(ours):
    ours._state.follow({"allreduce": (Rule(None, ("recursive_doubling",)),)})
    result = np.full(4 - min(RANK, 1), -1.0)
    with pytest.raises(mpicoll.MismatchError):
        ours.Allreduce(np.ones(len(result)), result)
    assert (result == -1).all()


@several
def test_one_result_is_in_the_canonical_order_if_asked(comm, done):
    ours = mpicoll.Comm(comm, deterministic=True)
    x = np.random.default_rng(RANK).normal(size=13)
    y = x.copy()
    mpicoll.allreduce(y, ours, algorithm="recursive_doubling")
    assert ours.allreduce_shared(x).tobytes() == y.tobytes()
    assert done == ["recursive_doubling", "shared"]


# ---- where they come from


def profile(comm: MPI.Intracomm, rules: tuple[Rule, ...], **other: Any) -> Profile:
    here = Fingerprint(library_name(), machine(), mpicoll.Comm(comm)._state.layout)  # type: ignore[union-attr]
    return Profile(here._replace(**other), {"allreduce": rules}, {})


@pytest.fixture
def named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that only rank 0 is told of: others have a wrong one."""
    path = folder / ("profile.json" if RANK == 0 else "none.json")
    monkeypatch.setenv("MPICOLL_PROFILE", str(path))
    return path


RULES = (Rule(40, ("recursive_doubling",)), Rule(None, ("tree",)))


@several
def test_rank_0_reads_it_and_all_follow(comm, named, done, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setenv("MPICOLL_PROFILE", "none")
        made = profile(comm, RULES)
    if RANK == 0:
        write_profile(made, named)
    ours = mpicoll.Comm(comm.Dup())
    assert ours._state.rules["allreduce"] == RULES
    for count in (5, 6):
        x = np.full(count, RANK + 1.0)
        ours.Allreduce(MPI.IN_PLACE, x)
        assert (x == P * (P + 1) / 2).all()
    assert done == ["recursive_doubling", "tree"]
    alone = ours.Split(RANK)  # of another layout, as parts of a job are: without a word
    assert alone._state.rules["allreduce"][0].algorithms[0] == "native"
    ours.Free()


@several
@pytest.mark.parametrize("other", [{"mpi": "MPI 0.1"}, {"machine": "abacus"}, {"layout": (1,) * 77}])
def test_one_from_elsewhere_is_refused_in_a_line(comm, named, other, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setenv("MPICOLL_PROFILE", "none")
        made = profile(comm, RULES, **other)
    if RANK == 0:
        write_profile(made, named)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        ours = mpicoll.Comm(comm.Dup())
    assert ours._state.rules["allreduce"] != RULES
    said = [str(one.message) for one in told]
    assert [len(said), *("\n" in line for line in said)] == ([1, False] if RANK == 0 else [0])
    assert RANK or ("tune" in said[0] and str(named) in said[0])
    ours.Free()


@several
@pytest.mark.parametrize("text", [None, "", "{", '{"version": 1}'], ids=["missing", "empty", "torn", "wrong"])
def test_a_wrong_one_is_the_same_error_on_all_ranks(comm, named, text):
    if RANK == 0 and text is not None:
        named.write_text(text)
    own = comm.Dup()
    with pytest.raises(UserError, match=r"profile.json") as caught:
        mpicoll.Comm(own)
    assert len({*comm.allgather(str(caught.value))}) == 1
    own.Free()
