"""Ranks may write the same call in different ways: all of them agree, and the results are those of one way."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

import mpicoll
from mpicoll.mpi import select

P, RANK = MPI.COMM_WORLD.size, MPI.COMM_WORLD.rank
pytestmark = [pytest.mark.mpi, pytest.mark.skipif(P in (1, 6, 7), reason="nobody to differ from, or nothing new")]
ROOT = P - 1
EACH = 6  # elements of a part; small enough to be native, and large enough for all else where limits are 0

Form = Callable[[mpicoll.Comm, Any], Any]


def own(method: str) -> Callable[..., Form]:
    """A method of a ``Comm``, not in place: ``recv`` elements are received."""

    def form(recv: int | None, *args: Any, **options: Any) -> Form:
        def call(comm: mpicoll.Comm, x: Any) -> Any:
            y = None if recv is None else np.full(recv, -1.0)
            getattr(comm, method)(x, y, *args, **options)
            return y

        return call

    return form


def in_place(method: str, *args: Any, none: bool = False, **options: Any) -> Form:
    """The same in place."""

    def call(comm: mpicoll.Comm, x: Any) -> Any:
        getattr(comm, method)(None if none else MPI.IN_PLACE, x, *args, **options)
        return x

    return call


def allreduces() -> list[Form]:
    n = P * EACH
    return [
        own("Allreduce")(n),
        own("Allreduce")(n, "sum"),
        own("Allreduce")(n, MPI.SUM, deterministic=False),
        in_place("Allreduce"),
        in_place("Allreduce", none=True),
        in_place("Allreduce", "".join(["su", "m"])),
        lambda c, x: mpicoll.allreduce(x, c),
        lambda c, x: mpicoll.allreduce(x, c, MPI.SUM),
        lambda c, x: mpicoll.allreduce([x], c)[0],
        lambda c, x: mpicoll.allreduce(x.reshape(P, EACH), c).reshape(-1),
        lambda c, x: mpicoll.allreduce(x.reshape(P, EACH).T, c).T.reshape(-1),  # in the order of memory
        lambda c, x: mpicoll.allreduce([x, n, MPI.DOUBLE], c)[0],
        lambda c, x: mpicoll.allreduce(memoryview(x), c),
        lambda c, x: c.Allreduce([x.copy(), MPI.DOUBLE], [x, n, MPI.DOUBLE]) or x,
        lambda c, x: mpicoll.allreduce(x, MPI.Intracomm(c), check=c.check),
    ]


def reduces() -> list[Form]:
    n = P * EACH if RANK == ROOT else None

    def place(comm: mpicoll.Comm, x: np.ndarray) -> Any:
        comm.Reduce(MPI.IN_PLACE if RANK == ROOT else x, x if RANK == ROOT else None, root=ROOT)
        return x

    return [
        own("Reduce")(n, MPI.SUM, ROOT),
        own("Reduce")(n, "sum", np.int64(ROOT)),
        own("Reduce")(P * EACH, root=ROOT),  # what others receive is not looked at
        place,
        lambda c, x: mpicoll.reduce(x, c, ROOT),
        lambda c, x: mpicoll.reduce(x, c, ROOT, MPI.SUM),
        lambda c, x: mpicoll.reduce([x], c, ROOT)[0],
        lambda c, x: mpicoll.reduce(x.reshape(P, EACH), c, ROOT).reshape(-1),
    ]


def bcasts() -> list[Form]:
    pair = MPI.DOUBLE.Create_contiguous(2)
    pair.Commit()
    return [
        lambda c, x: c.Bcast(x, ROOT) or x,
        lambda c, x: c.Bcast(x.reshape(P, EACH), np.int64(ROOT)) or x,
        lambda c, x: c.Bcast([x, MPI.DOUBLE], ROOT) or x,
        lambda c, x: c.Bcast([x, x.size // 2, pair], ROOT) or x,
        lambda c, x: c.Bcast(x.view("u1"), ROOT) or x,
        lambda c, x: mpicoll.bcast(x, c, ROOT),
        lambda c, x: mpicoll.bcast([x], c, ROOT)[0],
    ]


def reduce_scatters() -> list[Form]:
    counts = [EACH] * P
    return [
        own("Reduce_scatter_block")(EACH),
        own("Reduce_scatter_block")(EACH, "sum"),
        own("Reduce_scatter")(EACH, counts),
        own("Reduce_scatter")(EACH, tuple(counts), MPI.SUM),
        own("Reduce_scatter")(EACH, np.array(counts)),
        lambda c, x: in_place("Reduce_scatter_block")(c, x)[:EACH],
        lambda c, x: mpicoll.reduce_scatter(x, c),
        lambda c, x: mpicoll.reduce_scatter(x.reshape(P, EACH), c, counts, MPI.SUM),
    ]


def allgathers() -> list[Form]:
    def place(none: bool, comm: mpicoll.Comm, x: np.ndarray) -> Any:
        y = np.full(P * EACH, -1.0)
        y[RANK * EACH : (RANK + 1) * EACH] = x[:EACH]
        comm.Allgather(None if none else MPI.IN_PLACE, y)
        return y

    return [
        lambda c, x: own("Allgather")(P * EACH)(c, x[:EACH]),
        lambda c, x: own("Allgather")(P * EACH)(c, [x, EACH, MPI.DOUBLE]),
        lambda c, x: own("Allgather")(P * EACH)(c, x[:EACH].view("u1")),
        partial(place, False),
        partial(place, True),
        lambda c, x: mpicoll.allgather(x[:EACH], c).reshape(-1),
        lambda c, x: mpicoll.allgather(x[:EACH], c, [EACH] * P),
    ]


TOTAL = np.sum([np.arange(P * EACH) * (rank + 1.0) for rank in range(P)], axis=0)
MINE = slice(RANK * EACH, (RANK + 1) * EACH)
CASES: dict[str, tuple[Callable[[], list[Form]], np.ndarray | None]] = {
    "allreduce": (allreduces, TOTAL),
    "reduce": (reduces, TOTAL if RANK == ROOT else None),
    "bcast": (bcasts, np.arange(P * EACH) * (ROOT + 1.0)),
    "reduce_scatter": (reduce_scatters, TOTAL[MINE]),
    "allgather": (allgathers, np.concatenate([np.arange(EACH) * (rank + 1.0) for rank in range(P)])),
}


@pytest.mark.parametrize("check", ["header", "off"])
@pytest.mark.parametrize("way", ["native", "ours", "shared"])
@pytest.mark.parametrize("collective", CASES)
def test_ranks_may_write_a_call_in_different_ways(comm, monkeypatch, collective, way, check):
    """Each rank another way, twice: when the call is understood, and when it is remembered."""
    if way != "native":
        monkeypatch.setattr(select, "LARGE", dict.fromkeys(select.LARGE, 0))
        for name in select.SHARED_FROM:
            monkeypatch.setitem(select.SHARED_FROM, name, 0)
    ours = mpicoll.Comm(comm.Dup(), check=check)
    if way == "ours":
        monkeypatch.setattr(ours._state, "shares", False)
        ours._state.follow({})
    make, expected = CASES[collective]
    forms = make()
    for turn in range(2 * len(forms)):
        number = (turn // 2 + RANK * (1 + turn // len(forms))) % len(forms)
        for lies in ("private", "shared"):
            x = np.arange(P * EACH) * (RANK + 1.0)
            there = ours.asarray(x)  # of some ranks alone it is used
            if lies == "shared" and (RANK + turn) % 2:
                x = there
            result = forms[number](ours, x)
            if expected is not None:
                np.testing.assert_array_equal(np.asarray(result), expected, f"{collective}, form {number}")
    ours.Free()
