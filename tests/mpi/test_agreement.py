"""Calls that differ between ranks raise the same error on all of them, and correct programs never do."""

import itertools
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

import mpicoll
from contract import own_data
from mpicoll.mpi import agreement, nonblocking
from mpicoll.mpi.state import state_of

P = MPI.COMM_WORLD.size
pytestmark = [
    pytest.mark.mpi,
    pytest.mark.skipif(P == 1 or P > 5, reason="one rank agrees with itself, and five show what more would"),
]
ODD = P - 1  # the rank that does something else
OTHERS = "rank 0 " if P == 2 else "ranks 0-" + str(P - 2)


def ones(count: int = 5, dtype: Any = "f8") -> np.ndarray:
    return np.ones(count, dtype)


def strided() -> np.ndarray:
    return np.ones(10)[::2]


def frozen() -> np.ndarray:
    x = np.ones(5)
    x.flags.writeable = False
    return x


Pair = tuple[Callable[[mpicoll.Comm], Any], Callable[[mpicoll.Comm], Any], str, str]

DIFFERENT: dict[str, Pair] = {  # what all do, what one does instead, and how the table calls them
    "count": (
        lambda c: mpicoll.allreduce(ones(), c),
        lambda c: mpicoll.allreduce(ones(6), c),
        "allreduce of 5 float64, sum, (native|shared)",
        "allreduce of 6 float64, sum, (native|shared)",
    ),
    "count, a few bytes against many": (
        lambda c: mpicoll.allreduce(ones(1), c),
        lambda c: mpicoll.allreduce(ones(1 << 20), c),
        "allreduce of 1 float64",
        "allreduce of 1048576 float64",
    ),
    "dtype": (
        lambda c: c.Allreduce(MPI.IN_PLACE, ones()),
        lambda c: c.Allreduce(MPI.IN_PLACE, ones(5, "i8")),
        "allreduce of 5 float64",
        "allreduce of 5 int64",
    ),
    "operation": (
        lambda c: c.Allreduce(ones(), ones()),
        lambda c: c.Allreduce(ones(), ones(), MPI.MAX),
        "allreduce of 5 float64, sum",
        "allreduce of 5 float64, max",
    ),
    "mean": (
        lambda c: mpicoll.allreduce(ones(), c, "mean"),
        lambda c: mpicoll.allreduce(ones(), c),
        "float64, mean",
        "float64, sum",
    ),
    "algorithm": (
        lambda c: mpicoll.allreduce(ones(), c, algorithm="ring"),
        lambda c: mpicoll.allreduce(ones(), c, algorithm="tree"),
        "sum, ring",
        "sum, tree",
    ),
    "segments": (
        lambda c: mpicoll.allreduce(ones(), c, algorithm="double_tree", segments=2),
        lambda c: mpicoll.allreduce(ones(), c, algorithm="double_tree", segments=3),
        "double_tree, segments 2",
        "double_tree, segments 3",
    ),
    "deterministic": (
        lambda c: mpicoll.reduce(ones(), c),
        lambda c: mpicoll.reduce(ones(), c, deterministic=True),
        "sum, native",
        "sum, (shared|tree)",
    ),
    "wire": (
        lambda c: mpicoll.allreduce(ones(5, "e"), c, algorithm="ring"),
        lambda c: mpicoll.allreduce(ones(5, "e"), c, algorithm="ring", wire="16bit"),
        "5 float16, sum, ring, carried as float32",
        "5 float16, sum, ring$",
    ),
    "root": (lambda c: c.Bcast(ones(), 0), lambda c: c.Bcast(ones(), 1), "native, root 0", "native, root 1"),
    "root of a reduce": (
        lambda c: c.Reduce(ones(), ones(), MPI.SUM, 0),
        lambda c: c.Reduce(ones(), ones(), MPI.SUM, 1),
        "reduce of 5 float64, sum, (native|shared), root 0",
        "root 1",
    ),
    "root of ours": (
        lambda c: mpicoll.reduce(ones(), c, 0, algorithm="chain"),
        lambda c: mpicoll.reduce(ones(), c, 1, algorithm="chain"),
        "chain, root 0",
        "chain, root 1",
    ),
    "bytes of a bcast": (
        lambda c: mpicoll.bcast(ones(), c),
        lambda c: mpicoll.bcast(ones(6), c),
        "bcast of 40 bytes",
        "bcast of 48 bytes",
    ),
    "another collective": (
        lambda c: c.Allreduce(MPI.IN_PLACE, ones()),
        lambda c: c.Bcast(ones()),
        "allreduce of 5 float64",
        "bcast of 40 bytes",
    ),
    "parts": (
        lambda c: mpicoll.reduce_scatter(ones(P + 1), c),
        lambda c: mpicoll.reduce_scatter(ones(P + 1), c, [P + 1] + [0] * (P - 1)),
        "reduce_scatter of .* parts of ",
        r"parts of \[" + str(P + 1),
    ),
    "bytes of an allgather": (
        lambda c: c.Allgather(ones(1), ones(P)),
        lambda c: c.Allgather(ones(2), ones(2 * P)),
        f"allgather of {8 * P} bytes",
        f"allgather of {16 * P} bytes",
    ),
    "bytes of an allgather in place": (
        lambda c: c.Allgather(MPI.IN_PLACE, ones(P)),
        lambda c: c.Allgather(MPI.IN_PLACE, ones(2 * P)),
        f"allgather of {8 * P} bytes, native$",
        f"allgather of {16 * P} bytes, native$",
    ),
    "elements of an allgather in place": (
        lambda c: c.Allgather(MPI.IN_PLACE, ones(P)),
        lambda c: c.Allgather(MPI.IN_PLACE, ones(2 * P - 1)),
        f"allgather of {8 * P} bytes, native$",
        f"allgather, native, {2 * P - 1} elements for {P} ranks$",
    ),
    "reduce_scatter_block": (
        lambda c: c.Reduce_scatter_block(ones(P), ones(1)),
        lambda c: c.Reduce_scatter_block(ones(2 * P), ones(2)),
        rf"reduce_scatter of {P} float64, sum, (native|shared)$",
        rf"reduce_scatter of {2 * P} float64, sum, (native|shared)$",
    ),
    "list": (
        lambda c: mpicoll.allreduce([ones(), ones(2, "f4")], c),
        lambda c: mpicoll.allreduce([ones(2, "f4"), ones()], c),
        "of 5 float64, sum, (native|shared), arrays of 5, 2; allreduce of 2 float32",
        "of 2 float32, sum, (native|shared), arrays of 2, 5; allreduce of 5 float64",
    ),
    "list, of the same sum": (
        lambda c: mpicoll.allreduce([ones(3), ones(2)], c),
        lambda c: mpicoll.allreduce([ones(2), ones(3)], c),
        "arrays of 3, 2",
        "arrays of 2, 3",
    ),
    "dtype of the same bytes": (
        lambda c: mpicoll.allgather(ones(), c),
        lambda c: mpicoll.allgather(ones(5, "i8"), c),
        "allgather of .* bytes, .*float64",
        "allgather of .* bytes, .*int64",
    ),
    "counts of an allgatherv": (
        lambda c: c.Allgatherv(ones(1), [ones(P), [1] * P]),
        lambda c: c.Allgatherv(ones(2), [ones(2 * P), [2] * P]),
        "allgatherv of .* bytes",
        "allgatherv of .* bytes",
    ),
    "counts of a reduce_scatter": (
        lambda c: c.Reduce_scatter(ones(P + 1), ones(0 if c.rank else P + 1), [P + 1] + [0] * (P - 1)),
        lambda c: c.Reduce_scatter(ones(P + 1), ones(0 if c.rank < P - 1 else P + 1), [0] * (P - 1) + [P + 1]),
        r"native, parts of \[" + str(P + 1),
        r"native, parts of \[0",
    ),
    "what cannot be written": (
        lambda c: c.Allreduce(ones(), ones()),
        lambda c: c.Allreduce(ones(), frozen()),
        "allreduce of 5 float64",
        "allreduce, sum, (native|shared), .*expected a writable array",
    ),
    "reduce into what cannot be written": (
        lambda c: c.Reduce(ones(), ones(), root=ODD),
        lambda c: c.Reduce(ones(), frozen(), root=ODD),
        "reduce of 5 float64, sum",
        "reduce, sum, (native|shared), .*expected a writable array",
    ),
    "bcast into what cannot be written": (
        lambda c: c.Bcast(ones()),
        lambda c: c.Bcast(frozen()),
        "bcast of 40 bytes",
        "bcast, native, root 0, expected a writable array",
    ),
    "persistent": (
        lambda c: mpicoll.allreduce_init(ones(), c, algorithm="ring"),
        lambda c: mpicoll.allreduce_init(ones(6), c, algorithm="ring"),
        "of 5 float64",
        "of 6 float64",
    ),
    "blocking or not": (
        lambda c: mpicoll.allreduce_init(ones(), c, algorithm="ring"),
        lambda c: mpicoll.allreduce(ones(), c, algorithm="ring"),
        "allreduce_init of 5 float64, sum, ring",
        "allreduce of 5 float64, sum, ring",
    ),
    "level": (
        lambda c: mpicoll.allreduce(ones(), c),
        lambda c: mpicoll.allreduce(ones(), c, check="full"),
        "sum, (native|shared)",
        "sum, (native|shared), at .*test_agreement.py:",
    ),
}
REFUSED: dict[str, Pair] = {  # a mistake that one rank sees by itself: it raises its own error
    "reduce in place where the result does not go": (
        lambda c: c.Reduce(MPI.IN_PLACE, ones(), root=0) if c.rank == 0 else c.Reduce(ones(), None, root=0),
        lambda c: c.Reduce(MPI.IN_PLACE, ones(), root=0),
        "reduce of 5 float64, sum",
        "reduce refused, MPI.IN_PLACE is for the root, 0, alone",
    ),
    "strided": (
        lambda c: mpicoll.allreduce(ones(), c),
        lambda c: mpicoll.allreduce(strided(), c),
        "allreduce of 5 float64",
        "allreduce refused, expected a contiguous array",
    ),
    "strided, to a Comm": (
        lambda c: c.Allreduce(ones(), ones()),
        lambda c: c.Allreduce(ones(), strided(), algorithm="ring"),
        "allreduce of 5 float64",
        "allreduce refused, expected a contiguous array",
    ),
    "unknown algorithm": (
        lambda c: mpicoll.bcast(ones(), c, algorithm="tree"),
        lambda c: mpicoll.bcast(ones(), c, algorithm="rign"),
        "bcast of 40 bytes, tree",
        "bcast refused, unknown bcast algorithm 'rign'",
    ),
    "root beyond": (
        lambda c: mpicoll.reduce(ones(), c, 0),
        lambda c: mpicoll.reduce(ones(), c, P),
        "native, root 0",
        f"reduce refused, root must be one of {P} ranks, got {P}",
    ),
    "counts": (
        lambda c: mpicoll.allgather(ones(2), c, [2] * P),
        lambda c: mpicoll.allgather(ones(3), c, [2] * P),
        "allgather of ",
        f"allgather refused, rank {ODD} brings 3 elements, counts say 2",
    ),
    "level that there is not": (
        lambda c: mpicoll.allreduce(ones(), c),
        lambda c: mpicoll.allreduce(ones(), c, check="on"),
        "allreduce of 5",
        "allreduce refused, check must be one of off, header, full, got 'on'",
    ),
    "room": (
        lambda c: c.Allgather(ones(1), ones(P)),
        lambda c: c.Allgather(ones(1), ones(P + 1)),
        f"allgather of {8 * P} bytes",
        f"allgather refused, expected {P} times what is sent, got room for",
    ),
    "nonsense": (
        lambda c: mpicoll.allreduce(ones(), c),
        lambda c: mpicoll.allreduce("text", c),
        "allreduce of 5",
        "allreduce refused, expected an array in host memory, got builtins.str",
    ),
    "lengths": (
        lambda c: c.Allreduce(ones(), ones()),
        lambda c: c.Allreduce(ones(), ones(4), algorithm="ring"),
        "allreduce of 5 float64",
        "allreduce refused, mismatch in send count 5 and receive count 4",
    ),
}


@pytest.fixture
def ours(comm: MPI.Intracomm) -> mpicoll.Comm:
    return mpicoll.Comm(comm)


def raised(call: Callable[[mpicoll.Comm], Any], comm: mpicoll.Comm) -> BaseException:
    with pytest.raises((mpicoll.MismatchError, TypeError, ValueError)) as caught:
        call(comm)
    return caught.value


@pytest.mark.parametrize("what", [*DIFFERENT, *REFUSED])
def test_every_rank_hears_who_does_what(ours, what):
    usual, other, shown, shown_other = {**DIFFERENT, **REFUSED}[what]
    error = raised(other if ours.rank == ODD else usual, ours)
    errors = ours.allgather((type(error).__name__, str(error)))
    if what in DIFFERENT:
        assert len(set(errors)) == 1
    else:
        assert errors[ODD][0] in ("TypeError", "ValueError")
        assert len(set(errors[:ODD])) == 1
    name, text = errors[0]
    assert name == "MismatchError"
    head, first, second = text.splitlines()
    assert head == "ranks do not make the same call on this communicator:"
    assert_line(first, OTHERS, shown)
    assert_line(second, f"rank {ODD}", shown_other)
    # Nothing was sent: the communicator is as good as before.
    assert mpicoll.allreduce(np.full(3, 1.0), ours, algorithm="ring").tolist() == [P] * 3


def assert_line(line: str, who: str, what: str) -> None:
    assert line.startswith("  " + who)
    assert re.search(what, line), (what, line)


@pytest.mark.parametrize("names", [("ring", "tree"), ("native", "ring"), ("native", "native")])
def test_nonblocking_calls_are_compared_when_they_are_waited_for(ours, names):
    own = ours.Dup()
    odd = own.rank == ODD
    handle = mpicoll.iallreduce(ones(5 + odd), own, algorithm=names[odd])
    for wait in (handle.wait, handle.wait):
        with pytest.raises(
            mpicoll.MismatchError, match=f"rank {ODD} .*call 1: allreduce of 6 float64, sum, {names[1]}"
        ):
            wait()
    again = ours.Dup()  # what the MPI library has begun on the other is still under way
    if odd:
        with pytest.raises(ValueError, match="expected a contiguous array"):
            mpicoll.iallreduce(strided(), again)
    else:
        with pytest.raises(mpicoll.MismatchError, match="iallreduce refused, expected a contiguous"):
            mpicoll.iallreduce(ones(), again).wait()


def test_what_is_cut_off_of_a_nonblocking_call_is_compared_and_the_table_says_that_it_is_cut(ours):
    own, last = ours.Dup(), 6 + (ours.rank == ODD)
    with pytest.raises(mpicoll.MismatchError) as caught:
        mpicoll.iallreduce([*(ones(5) for _ in range(100)), ones(last), ones(13 - last)], own).wait()
    _, *lines = str(caught.value).splitlines()
    assert len(lines) == 2
    for line in lines:
        assert re.search(r"call 1: allreduce of 513 float64, sum, (native|shared), arrays of 5, .*[5, ]\.\.\.$", line)
    for start in ("", "x"):  # one of them is cut in the middle of a character
        other = ours.Dup()
        if own.rank == ODD:
            with pytest.raises(ValueError, match="unknown operation"):
                mpicoll.iallreduce(ones(), other, start + "é" * 200)
        else:
            with pytest.raises(mpicoll.MismatchError, match=r"é\.\.\.$"):
                mpicoll.iallreduce(ones(), other).wait()
    if own.rank != ODD:  # that the places differ is no mistake
        mpicoll.iallreduce(ones(), ours, check="full").wait()
    else:
        mpicoll.iallreduce(ones(), ours, check="full").wait()


def test_a_table_tells_calls_apart_that_read_the_same():
    table = agreement._table([(1, "a call..."), (2, "a call..."), (1, "a call..."), (2, "another place")])
    assert table.splitlines()[1:] == [
        "  ranks 0, 2  a call...",
        "  rank 1      a call...",
        "  rank 3      another place",
    ]


def test_nothing_is_described_where_nothing_is_compared(ours, monkeypatch):
    def described(*arguments: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(nonblocking, "header_for", described)
    for name in ("native", "ring"):
        assert mpicoll.iallreduce(ones(), ours, algorithm=name, check="off").wait().tolist() == [P] * 5
        assert mpicoll.iallreduce(ones(), mpicoll.Comm(MPI.COMM_SELF), algorithm=name).wait().tolist() == [1] * 5


def test_the_order_of_memory_and_the_place_are_compared_in_full(ours):
    square = np.ones((3, 3))
    if ours.rank == ODD:
        square = np.asfortranarray(square)
    mpicoll.allreduce(square, ours)
    with pytest.raises(mpicoll.MismatchError) as caught:
        mpicoll.allreduce(square, ours, check="full")
    assert re.search("sum, (native|shared), at ", str(caught.value))
    assert re.search("sum, (native|shared), F order, at ", str(caught.value))
    assert "test_agreement.py:" in str(caught.value)
    with pytest.raises(mpicoll.MismatchError, match=f"rank {ODD} .*F order of 1, at"):
        mpicoll.allreduce([np.ones(3), square], ours, check="full")
    if ours.rank == 0:  # that the places differ is no mistake
        mpicoll.bcast(ones(), ours, check="full")
    else:
        mpicoll.bcast(ones(), ours, check="full")


@pytest.mark.usefixtures("python_engine")
def test_levels_come_from_the_call_the_comm_and_the_environment(comm, monkeypatch):
    ours = mpicoll.Comm(comm)
    monkeypatch.setattr(agreement, "_default", None)
    counted = []
    before = agreement.Agreement.check

    def counting(self: Any, headers: Any, detail: Any = None, *more: Any) -> Any:
        counted.append("header" if detail is None else "full")
        return before(self, headers, detail, *more)

    monkeypatch.setattr(agreement.Agreement, "check", counting)

    def level(comm: mpicoll.Comm, **given: Any) -> list[str]:
        counted.clear()
        mpicoll.allreduce(ones(), comm, **given)
        comm.Allreduce(MPI.IN_PLACE, ones(), **given)
        comm.Reduce(ones(), ones() if comm.rank == 0 else None, **given)
        comm.Bcast(ones(), **given)
        return list(counted)

    assert level(ours) == ["header"] * 4
    assert level(ours, check="off") == []
    assert level(ours, check="full") == ["full"] * 4
    off = mpicoll.Comm(ours, check="off")
    for derived in (off, off.Dup(), off.Clone(), off.Split(), mpicoll.Comm(off.Split(), check="off")):
        assert level(derived) == []
        assert level(derived, check="header") == ["header"] * 4
    monkeypatch.setattr(agreement, "_default", None)
    monkeypatch.setenv("MPICOLL_CHECK", "full")
    assert level(mpicoll.Comm(MPI.Intracomm(ours))) == ["full"] * 4
    assert level(mpicoll.Comm(ours)) == ["header"] * 4  # a copy does what the original does
    monkeypatch.setattr(agreement, "_default", None)
    monkeypatch.setenv("MPICOLL_CHECK", "sometimes")
    with pytest.raises(ValueError, match="check must be one of off, header, full, got 'sometimes'"):
        mpicoll.Comm(MPI.Intracomm(ours))
    with pytest.raises(ValueError, match="check must be one of off, header, full, got 'sometimes'"):
        mpicoll.allreduce(ones(), MPI.Intracomm(ours))
    with pytest.raises(ValueError, match="check must be one of off, header, full, got 'on'"):
        mpicoll.Comm(ours, check="on")
    monkeypatch.setattr(agreement, "_default", None)


@pytest.mark.parametrize("check", ["header", "full"])
def test_correct_programs_are_left_alone(ours, check):
    """The same call may be written in different ways on different ranks."""
    own = mpicoll.Comm(ours, check=check)
    odd, rank = own.rank % 2, own.rank
    swapped = MPI.Op.Create(lambda a, b, datatype: None, commute=True)
    for count, n in itertools.product((0, 1, 7, 1000), range(12)):
        x = own_data(count, rank)
        mpicoll.allreduce(memoryview(x) if odd else x, own)
        own.Allreduce(MPI.IN_PLACE, [x, MPI.DOUBLE] if odd else x, op=MPI.SUM if odd else "sum")
        own.Allreduce(x.copy() if odd else MPI.IN_PLACE, x)
        mpicoll.allreduce([x, x[:0]] if odd else [x], own)
        own.Reduce(x, x.copy() if rank == n % P else None, MPI.MAX, n % P)
        own.Reduce(MPI.IN_PLACE if rank == n % P else x, x, "max", n % P, "tree")
        own.Bcast([x, count, MPI.DOUBLE] if odd else x, n % P)
        own.Bcast([x, 8 * count, MPI.BYTE] if odd else x.view("u1"), n % P, "tree")
        own.Allreduce(x.copy(), x, swapped)
        parts = np.empty(count * P)
        own.Allgather(x, parts)
        own.Allgather([x, MPI.DOUBLE] if odd else x, parts, "ring")
        own.Allgatherv(x, [parts, [count] * P] if odd else parts)
        own.Reduce_scatter_block(parts, x)
        own.Reduce_scatter(parts, x, [count] * P)
        mpicoll.reduce_scatter(parts, own)
        mpicoll.allgather(np.ones(rank), own, range(P) if odd else list(range(P)))
        handle = mpicoll.iallreduce(x, own, algorithm="ring")
        mpicoll.allreduce(float(rank), own)
        handle.wait()
    for root in (0, np.int64(0), False) if odd else (0, 0, 0):
        own.Bcast(x, root)
        own.Reduce(x, np.empty_like(x) if rank == 0 else None, root=root)
        mpicoll.reduce(x, own, root)
    own.Reduce_scatter(np.ones(2 * P), np.ones(2), np.full(P, 2) if odd else [2] * P)
    pair = MPI.DOUBLE.Create_contiguous(2).Commit()
    own.Bcast([np.ones(4), pair] if odd else np.ones(4))
    own.Bcast([np.ones(4), 2, pair] if odd else [np.ones(4), 4, MPI.DOUBLE])
    own.Allgather([np.ones(2), 1, pair] if odd else np.ones(2), np.ones(2 * P))
    own.Allreduce(MPI.IN_PLACE, [np.ones(4), 2, pair] if odd else np.ones(4), swapped)
    own.Allreduce([None, 0, MPI.DOUBLE] if odd else np.ones(0), np.ones(0))
    everything = np.ones(2 * P)
    own.Allgather(MPI.IN_PLACE, [everything, 2, MPI.DOUBLE] if odd else everything)
    pair.Free()
    swapped.Free()
    column = MPI.DOUBLE.Create_vector(3, 1, 3).Commit()  # a column at the root, contiguous at the others
    square, flat = np.arange(9.0), np.zeros(3)
    own.Bcast([square, 1, column] if rank == 0 else flat)
    assert rank == 0 or flat.tolist() == [0, 3, 6]
    column.Free()


@pytest.mark.parametrize("given", ["array", "specification", "function"])
def test_a_user_defined_operation_is_the_same_on_small_arrays_however_they_are_given(ours, given):
    op = MPI.Op.Create(lambda a, b, datatype: None, commute=True)
    x, odd, root = ones(), ours.rank == ODD, P - 1
    if not odd or given == "array":
        ours.Allreduce(MPI.IN_PLACE, x, op)
        ours.Reduce(x.copy(), x, op, root)
    elif given == "specification":
        ours.Allreduce(MPI.IN_PLACE, [x, 5, MPI.DOUBLE], op)
        ours.Reduce([x.copy(), 5, MPI.DOUBLE], [x, 5, MPI.DOUBLE], op, root)
    else:
        mpicoll.allreduce(x, ours, op)
        mpicoll.reduce(x, ours, root, op)
    op.Free()


IN_PLACE_FORMS: dict[str, Callable[[np.ndarray], tuple[Any, int]]] = {  # and where the first block begins
    "array": lambda x: (x[: 2 * P], 0),
    "type": lambda x: ([x[: 2 * P], MPI.DOUBLE], 0),
    "no count": lambda x: ([x[: 2 * P], None, None, "d"], 0),
    "count": lambda x: ([x, 2], 0),
    "count and type": lambda x: ([x, np.int64(2), "d"], 0),
    "pair": lambda x: ([x, (2, None)], 0),
    "displacement in a pair": lambda x: ([x, [2, 1], MPI.DOUBLE], 1),
    "displacement": lambda x: ([x, 2, 1, MPI.DOUBLE], 1),
}


@pytest.mark.parametrize("algorithm", ["auto", "ring"])
@pytest.mark.parametrize("form", IN_PLACE_FORMS)
def test_an_allgather_in_place_is_the_same_in_all_of_mpi4pys_forms(ours, form, algorithm):
    x = np.zeros(2 * P + 2)
    given, start = IN_PLACE_FORMS[form](x) if ours.rank == ODD else (x[: 2 * P], 0)
    x[start:][2 * ours.rank :][:2] = ours.rank + 1
    ours.Allgather(MPI.IN_PLACE, given, algorithm)
    assert x[start:][: 2 * P].tolist() == [rank + 1 for rank in range(P) for _ in range(2)]
    if algorithm == "auto":
        ours.Allgather(None if ours.rank == ODD else MPI.IN_PLACE, given)
        pair = MPI.DOUBLE.Create_contiguous(2).Commit()
        ours.Allgather(MPI.IN_PLACE, [x[: 2 * P], pair] if ours.rank == ODD else [x, 1, pair])
        pair.Free()


def test_a_call_that_one_rank_leaves_out_is_noticed_at_the_next(ours):
    for _ in range(500):
        mpicoll.allreduce(ones(), ours)
    if ours.rank != ODD:
        with pytest.raises(mpicoll.MismatchError, match="call 501: allreduce of 5") as caught:
            mpicoll.allreduce(ones(), ours)
    else:
        with pytest.raises(mpicoll.MismatchError, match="call 501: reduce of 5") as caught:
            mpicoll.reduce(ones(), ours)
    assert len(set(ours.allgather(str(caught.value)))) == 1


def test_the_hash_tells_calls_apart_by_their_number(ours):
    """A rank that is a call behind, on calls that are otherwise equal, is found out."""
    if ours.rank == ODD:
        state_of(ours).agreement.counter.calls += 1
    with pytest.raises(mpicoll.MismatchError, match=f"rank {ODD} .*call 2: allreduce of 5"):
        mpicoll.allreduce(ones(), ours)


def test_different_calls_have_different_hashes():
    calls = [
        (agreement.Header(collective, algorithm, "sum", dtype, count, (("root", root),)),)
        for collective, algorithm, dtype, count, root in itertools.product(
            ("reduce", "bcast"), ("tree", "native"), ("float32", "float64"), range(20), range(4)
        )
    ]
    assert len({agreement._digest(call) for call in calls}) == len(calls)
    assert len(agreement._digests) <= agreement.KEPT


def test_what_is_stated_tells_all_dtypes_apart():
    """Of a dtype there are 12 bits."""

    def stated(name: str, shape: str = "") -> int:
        header = agreement.Header("allgather", "native", "", "bytes", 48, stated=(name, shape))
        return agreement.digest_of((header,))

    characters = "?bBhHiIlLqQefdgFDG"
    names = {np.dtype(character).name for character in characters} | {"bfloat16", "|S1", "|V1", "datetime64[ns]"}
    plain = stated("")
    assert len({stated(name) for name in names}) == len(names)
    assert {agreement._same([stated(name), plain, stated("", "(3,)")]) for name in names} == {True}
    assert not agreement._same([stated("float64", "(3, 2)"), stated("float64", "(2, 3)")])
    assert agreement._same([stated("float64", "(3, 2)"), stated("float64"), stated("", "(3, 2)")])
