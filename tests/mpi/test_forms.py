"""A buffer's specification means to ``mpicoll.Comm`` what it means to mpi4py: every form, on every collective.

A form is a row: how mpi4py is told of so many elements in the middle of a larger memory.  Each is passed to mpi4py's
own method and to ours, and all of both memories must be the same afterwards: the elements that are named, and those
that are not.  What mpi4py refuses is refused by all ranks.  All that differs is listed at the end of a test.
"""

import os
import sys
import threading
import time
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache, partial
from math import inf
from typing import Any, NamedTuple

import numpy as np
import pytest
from mpi4py import MPI

import mpicoll
from mpicoll.mpi import select

P = MPI.COMM_WORLD.size
RANK = MPI.COMM_WORLD.rank
pytestmark = [
    pytest.mark.mpi,
    pytest.mark.skipif(P > 4, reason="four ranks show what more would, and sooner"),
    pytest.mark.timeout(300),
]
SATURATES = MPI.get_vendor()[0] == "Open MPI"
"""Open MPI adds bytes, ``MPI.BYTE`` too, and where they overflow stops at 255: there is nothing to compare with."""
BEFORE = 8  # elements of the memory before those that are named, a multiple of every derived type's extent
AFTER = 8
SHARED = ["shared"] if P > 1 else []
LARGE = (1 << 20) // 8 + 4  # past the thresholds of what reduces, in every block


@lru_cache(maxsize=8)
def pattern(size: int, factor: int, start: int, modulus: int, lowest: int) -> np.ndarray:
    """Whole numbers, so that sums are exact."""
    return (np.arange(size) * factor + start) % modulus + lowest


class Memory:
    """``blocks`` times ``n`` elements, and others before and after them, all different, on this and on other ranks."""

    def __init__(self, n: int, blocks: int = 1, filled: bool = True, kind: str = "", dtype: str = "d") -> None:
        self.n, self.total, self.code = n, n * blocks, dtype
        size = BEFORE + self.total + AFTER
        self.owner: Any
        if kind == "bytearray":
            self.owner = bytearray(size * np.dtype(dtype).itemsize)
        elif kind == "array.array":
            self.owner = array(dtype, bytes(size * np.dtype(dtype).itemsize))
        else:
            self.owner = np.empty(size, dtype)
        self.whole = np.frombuffer(self.owner, dtype)
        self.whole[:] = pattern(size, 1, 0, 1000, 5000)
        self.exact = self.whole[BEFORE : BEFORE + self.total]
        self.long = self.whole[BEFORE:]
        self.up_to = self.whole[: BEFORE + self.total]
        if filled:
            self.exact[:] = pattern(self.total, 7, RANK * 11, 101, RANK)
        self.type = MPI.Datatype.fromcode(dtype)

    def kept(self, result: int | None) -> "Memory":
        """The same, of whose elements that are named only the first hold a result: the others may hold anything."""
        self.loose = slice(BEFORE + (self.total if result is None else result), BEFORE + self.total)
        return self

    loose = slice(0, 0)

    def seen(self) -> np.ndarray:
        """All that is compared."""
        seen = self.whole.copy()
        seen[self.loose] = 0
        return seen


class DLPack:
    """Nothing but an exporter of DLPack."""

    def __init__(self, x: np.ndarray) -> None:
        self._x = x

    def __dlpack__(self, **options: Any) -> Any:
        return self._x.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self._x.__dlpack_device__()


class Index:
    """A number as far as ``operator.index`` is concerned."""

    def __init__(self, n: int) -> None:
        self._n = n

    def __index__(self) -> int:
        return self._n


def read_only(x: np.ndarray) -> np.ndarray:
    x = x[:]
    x.flags.writeable = False
    return x


class Form(NamedTuple):
    """``make`` gives the specification of what is in the middle of a ``Memory``, ``None`` where it cannot be one."""

    name: str
    make: Callable[[Memory], Any]
    kind: str = ""
    derived: bool = False  # algorithms of ours by name may refuse it
    extends: bool = False  # ours may take what mpi4py refuses


def pairs(m: Memory) -> Any:
    return m.exact.reshape(2, m.total // 2) if m.total % 2 == 0 else None


def if_by(divisor: int, m: Memory, make: Callable[[], Any]) -> Any:
    return make() if m.n % divisor == 0 else None


TWO = MPI.DOUBLE.Create_contiguous(2).Commit()
GAP = MPI.DOUBLE.Create_vector(2, 1, 2).Create_resized(0, 32).Commit()  # elements 0 and 2 of four
TWIN = MPI.DOUBLE.Dup()

TAKEN = [
    Form("a", lambda m: m.exact),
    Form("[a, type]", lambda m: [m.exact, m.type]),
    Form("(a, type)", lambda m: (m.exact, m.type)),
    Form("[a, code]", lambda m: [m.exact, m.code]),
    Form("[a, None]", lambda m: [m.exact, None]),
    Form("[a, n]", lambda m: [m.long, m.n]),
    Form("(a, n)", lambda m: (m.long, m.n)),
    Form("[a, int64(n)]", lambda m: [m.long, np.int64(m.n)]),
    Form("[a, array(n)]", lambda m: [m.long, np.array(m.n)]),
    Form("[a, index(n)]", lambda m: [m.long, Index(m.n)]),
    Form("[a, index(n), type]", lambda m: [m.long, Index(m.n), m.type]),
    Form("[a, n, type]", lambda m: [m.long, m.n, m.type]),
    Form("(a, n, code)", lambda m: (m.long, m.n, m.code)),
    Form("[a, n, None]", lambda m: [m.long, m.n, None]),
    Form("[a, None, type]", lambda m: [m.exact, None, m.type]),
    Form("[a, None, None]", lambda m: [m.exact, None, None]),
    Form("[a, (n, displ)]", lambda m: [m.whole, (m.n, BEFORE)]),
    Form("[a, [n, displ]]", lambda m: [m.whole, [m.n, BEFORE]]),
    Form("[a, (n, index(displ))]", lambda m: [m.whole, (m.n, Index(BEFORE))]),
    Form("[a, (n, None)]", lambda m: [m.long, (m.n, None)]),
    Form("[a, (None, displ)]", lambda m: [m.up_to, (None, BEFORE)]),
    Form("[a, (None, None)]", lambda m: [m.exact, (None, None)]),
    Form("[a, (n, displ), type]", lambda m: [m.whole, (m.n, BEFORE), m.type]),
    Form("(a, [n, displ], code)", lambda m: (m.whole, [m.n, BEFORE], m.code)),
    Form("[a, (n, displ), None]", lambda m: [m.whole, (m.n, BEFORE), None]),
    Form("[a, (n, None), type]", lambda m: [m.long, (m.n, None), m.type]),
    Form("[a, (None, displ), type]", lambda m: [m.up_to, (None, BEFORE), m.type]),
    Form("[a, n, displ, type]", lambda m: [m.whole, m.n, BEFORE, m.type]),
    Form("[a, n, displ, None]", lambda m: [m.whole, m.n, BEFORE, None]),
    Form("[a, n, None, code]", lambda m: [m.long, m.n, None, m.code]),
    Form("[a, None, displ, type]", lambda m: [m.up_to, None, BEFORE, m.type]),
    Form("[a, None, None, None]", lambda m: [m.exact, None, None, None]),
    Form("memoryview", lambda m: m.exact.data),
    Form("memoryview of two dimensions", lambda m: m.exact.reshape(1, -1).data),
    Form("[memoryview, n, type]", lambda m: [m.long.data, m.n, m.type]),
    Form("[memoryview of bytes, type]", lambda m: [m.exact.view("u1").data, m.type]),
    Form("[bytearray, n, displ, type]", lambda m: [m.owner, m.n, BEFORE, m.type], "bytearray"),
    Form("[bytearray, (n, displ), code]", lambda m: [m.owner, (m.n, BEFORE), m.code], "bytearray"),
    Form("[array.array, (n, displ)]", lambda m: [m.owner, (m.n, BEFORE)], "array.array"),
    Form("[array.array, n, displ, type]", lambda m: [m.owner, m.n, BEFORE, m.type], "array.array"),
    Form("DLPack", lambda m: DLPack(m.exact)),
    Form("[DLPack, n]", lambda m: [DLPack(m.long), m.n]),
    Form("two dimensions", lambda m: m.exact.reshape(-1, 1)),
    Form("Fortran order", lambda m: None if pairs(m) is None else pairs(m).T),
    Form("[Fortran order, type]", lambda m: None if pairs(m) is None else [pairs(m).T, m.type]),
    Form("no dimension", lambda m: m.exact.reshape(()) if m.total == 1 else None),
    Form("masked", lambda m: np.ma.array(m.exact, copy=False)),
    Form("[masked, n, type]", lambda m: [np.ma.array(m.long, copy=False), m.n, m.type]),
    Form("[of another dtype, type]", lambda m: [m.exact.view("i8"), m.type]),
    Form("[of another size, n, displ, type]", lambda m: [m.whole.view("u1"), m.n, BEFORE, m.type]),
    Form("[of another byte order, type]", lambda m: [m.exact.view(">f8"), m.type]),
    Form("[None, 0, type]", lambda m: None if m.n else [None, 0, m.type]),
    Form("[BOTTOM, 0, type]", lambda m: None if m.n else [MPI.BOTTOM, 0, m.type]),
    Form("[None, type]", lambda m: None if m.n else [None, m.type]),
]  # fmt: skip
"""All describe the same elements."""

TYPES = [
    Form("of bytes", lambda m: None if SATURATES else m.exact.view("u1")),
    Form("[of bytes, BYTE]", lambda m: None if SATURATES else [m.exact.view("u1"), MPI.BYTE]),
    Form("[a, n bytes, BYTE]", lambda m: None if SATURATES else [m.long, 8 * m.n, MPI.BYTE]),
    Form("[a, n, TWO]", lambda m: if_by(2, m, lambda: [m.long, m.n // 2, TWO]), derived=True),
    Form("[a, TWO]", lambda m: if_by(2, m, lambda: [m.exact, TWO]), derived=True),
    Form("[a, n, displ, TWO]", lambda m: if_by(2, m, lambda: [m.whole, m.n // 2, 4, TWO]), derived=True),
    Form("[a, n, GAP]", lambda m: if_by(4, m, lambda: [m.long, m.n // 4, GAP]), derived=True),
    Form("[a, (n, displ), GAP]", lambda m: if_by(4, m, lambda: [m.whole, (m.n // 4, 2), GAP]), derived=True),
    Form("[a, GAP]", lambda m: if_by(4, m, lambda: [m.exact, GAP]), derived=True),
    Form("[a, n, TWIN]", lambda m: [m.long, m.n, TWIN], derived=True),
]  # fmt: skip
"""Of other types: what moves data takes them, and what reduces only if the operation is defined on them."""

WRONG = [
    # [a, DATATYPE_NULL] is left out: MPICH 5.0.2 aborts the job.  So is MPI.IN_PLACE to receive, which mpi4py takes for
    # a buffer without an element.
    Form("[a]", lambda m: [m.exact], extends=True),
    Form("(a,)", lambda m: (m.exact,), extends=True),
    Form("[]", lambda m: []),
    Form("[a, n, displ, type, type]", lambda m: [m.whole, m.n, BEFORE, m.type, m.type]),
    Form("[a, -n]", lambda m: [m.long, -1]),
    Form("[a, (n, -displ)]", lambda m: [m.long, (m.n, -1)]),
    Form("[a, (n, displ beyond)]", lambda m: [m.whole, (m.n, len(m.whole) + 1)]),
    Form("[a, (n,)]", lambda m: [m.long, (m.n,)]),
    Form("[a, ()]", lambda m: [m.exact, ()]),
    Form("[a, (n, displ, 0)]", lambda m: [m.whole, (m.n, BEFORE, 0)]),
    Form("[a, (n, displ, 0), type]", lambda m: [m.whole, (m.n, BEFORE, 0), m.type]),
    Form("[a, array((n, displ))]", lambda m: [m.whole, np.array([m.n, BEFORE])], extends=True),
    Form("[a, (n, displ), 0, type]", lambda m: [m.whole, (m.n, BEFORE), 0, m.type]),
    Form("[a, type, n]", lambda m: [m.long, m.type, m.n]),
    Form("[a, n, n]", lambda m: [m.long, m.n, 0]),
    Form("[a, 1.0]", lambda m: [m.long, float(m.n)]),
    Form("[a, unknown code]", lambda m: [m.exact, "no such type"]),
    Form("[part of an element, type]", lambda m: [m.long.view("u1")[:-1], m.type]),
    Form("of another byte order", lambda m: m.exact.view(">f8")),
    Form("strided", lambda m: m.whole[::2]),
    Form("[strided, n]", lambda m: [m.whole[::2], m.n // 2]),
    Form("text", lambda m: "text"),
    Form("objects", lambda m: np.array([None] * max(m.total, 1))),
]  # fmt: skip
"""What mpi4py refuses."""

FORMS = [*TAKEN, *TYPES, *WRONG]
READ_ONLY = Form("read-only", lambda m: read_only(m.exact))
PLAIN = TAKEN[0]


def mixed(forms: Sequence[Form]) -> list[Form]:
    """Another form on every rank: rows that say so."""
    return [
        forms[(n + 7 * RANK) % len(forms)]._replace(name=f"form {n} + 7 rank of {len(forms)}")
        for n in range(0, len(forms), 3)
    ]


class Case(NamedTuple):
    """A call: ``make`` gives new memories, and the arguments made of them."""

    name: str
    form: "Form | VectorForm"
    make: Callable[[Any], tuple[list[Memory], tuple[Any, ...]]]
    reference: Callable[[Any], tuple[list[Memory], tuple[Any, ...]]] | None = None
    """How mpi4py is asked for the same, where it cannot be in the same way; the last memory is what is compared."""


REFUSED, MISMATCH = 1, 2


class Differences:
    """What differs, gathered on all ranks."""

    capture: Any = None  # pytest's, to be heard

    def __init__(self, comm: MPI.Intracomm, collective: str) -> None:
        self.comm, self.collective, self.found = comm.Dup(), collective, list[tuple[str, ...]]()
        self.what, self.until, self.ended = "", inf, threading.Event()
        threading.Thread(target=self._give_up, daemon=True).start()

    def _give_up(self) -> None:
        """What hangs is known as long as there is only one way out."""
        while not self.ended.wait(1):
            if time.monotonic() > self.until:
                self.capture.suspend_global_capture(in_=True)
                found = "\n".join(map(str, self.found))
                print(
                    f"rank {RANK}: {self.collective} {self.what} HANGS; so far:\n{found}", file=sys.stderr, flush=True
                )
                os._exit(3)

    def watched(self, what: str, call: Callable[[], Any]) -> str:
        """What it raises, or nothing; all is over if it does not come back."""
        self.what, self.until = what, time.monotonic() + 30
        try:
            call()
        except Exception as error:
            return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        finally:
            self.until = inf
        return ""

    def compare(self, case: "Case", theirs: MPI.Intracomm, ours: MPI.Intracomm, ways: Sequence[str]) -> None:
        """One case, by all these algorithms, and unchecked by the first."""
        memories, args = (case.reference or case.make)(case.form)
        method = getattr(ours, self.collective)
        refusal = self.watched(f"{case.name} by mpi4py", lambda: getattr(theirs, self.collective)(*args))
        expected = [memory.seen() for memory in memories]

        def attempt(way: str, check: str | None) -> str:
            memories, args = case.make(case.form)
            before = [memory.seen() for memory in memories]
            what = f"{case.name}, {way}, {check or 'checked'}"
            error = self.watched(what, lambda: method(*args, algorithm=way, check=check))
            got = [memory.seen() for memory in memories]
            found = ""
            if error and not refusal and not (case.form.derived and way not in ("auto", "native")):
                found = f"refused, {error}"
            elif error:
                found = "refused, and written to: " + where(got, before) if where(got, before) else ""
            elif refusal and not case.form.extends:
                found = f"taken, mpi4py has {refusal}"
            elif not refusal:
                found = where(got[-len(expected) :], expected[-len(got) :])
            if found:
                self.found.append((case.name, way, check or "checked", found))
            return error

        raised = [refusal, *(attempt(way, None) for way in ways)]
        everyones = self.outcomes(raised)
        assert not everyones[0].any() or everyones[0].all(), case.name  # or there is nothing to compare with
        for way, outcomes in zip(ways, everyones[1:], strict=True):
            if outcomes.any() and not outcomes.all():
                self.found.append((case.name, way, "checked", f"refused by some: {outcomes}"))
        # Unchecked, what one rank alone refuses is a hang, as it is for mpi4py.
        if not everyones[1].any() or (everyones[1] == REFUSED).all():
            unchecked = self.outcomes([attempt(ways[0], "off")])[0]
            if unchecked.any() and not unchecked.all():
                self.found.append((case.name, ways[0], "off", f"refused by some: {unchecked}"))

    def outcomes(self, raised: list[str]) -> np.ndarray:
        """What all ranks have come to, of calls each of which raised something or nothing."""
        kinds = [MISMATCH if error.startswith("MismatchError") else REFUSED if error else 0 for error in raised]
        mine = np.array(kinds, "u1")
        everyones = np.empty((P, len(mine)), "u1")
        self.comm.Allgather(mine, everyones)
        return everyones.T

    def report(self) -> None:
        """Fail on all ranks with what there is on all of them."""
        same: dict[tuple[str, str], list[set[str]]] = {}
        for rank, found in enumerate(self.comm.allgather(self.found)):
            for case, way, check, what in found:
                for known, one in zip(
                    same.setdefault((case, what), [set(), set(), set()]), (str(rank), way, check), strict=True
                ):
                    known.add(one)
        self.ended.set()
        self.comm.Free()
        lines = [
            f"{self.collective} {case} | ranks {', '.join(sorted(ranks))} | {', '.join(sorted(ways))} | "
            f"{', '.join(sorted(checks))} | {what}"
            for (case, what), (ranks, ways, checks) in same.items()
        ]
        assert not lines, f"{len(lines)} differences:\n" + "\n".join(lines)


def where(got: list[np.ndarray], expected: list[np.ndarray]) -> str:
    """In what memories differ."""
    said = []
    for n, (memory, other) in enumerate(zip(got, expected, strict=True)):
        if len(at := np.flatnonzero(memory != other)):
            first = int(at[0])
            said.append(
                f"memory {n} wrong: {len(at)} of {len(other)}, at {first - BEFORE} {memory[first]}, not {other[first]}"
            )
    return "; ".join(said)


@pytest.fixture(autouse=True)
def _heard(request: pytest.FixtureRequest) -> None:
    Differences.capture = request.config.pluginmanager.get_plugin("capturemanager")


FEW = ("a", "[a, n]", "[a, (n, displ), type]", "[a, n, displ, type]", "[DLPack, n]", "Fortran order", "[a, n, GAP]")
SIZES = [("native", 0), ("native", 12), ("native", LARGE), ("ours", 0), ("ours", 1), ("ours", 12)]
SUM = MPI.SUM


@pytest.fixture(
    params=[size for size in SIZES if P <= 2 or (size[1] > 1 and P == 3)], ids=lambda size: f"{size[0]} {size[1]}"
)
def size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[str, int]:
    """Whose algorithms ``"auto"`` takes for small arrays; and how many elements."""
    if request.param[0] == "ours":
        monkeypatch.setattr(select, "LARGE", dict.fromkeys(select.LARGE, 0))
        for collective in select.SHARED_FROM:
            monkeypatch.setitem(select.SHARED_FROM, collective, 0)
    return request.param


def swept(comm: MPI.Intracomm, size: tuple[str, int], collective: str, key: str, cases: Iterable[Case]) -> None:
    """All of them, by the algorithms that may be taken: they all read the same.

    With more than two ranks, which are more than most small machines have cores, each is by one of those named.
    """
    named = ["native"] if size[0] == "native" else [*mpicoll.ALGORITHMS[key], *SHARED]
    other = comm.Dup()
    found, ours = Differences(comm, collective), mpicoll.Comm(other)
    for n, case in enumerate(cases):
        some = named if size[1] == 12 and P <= 2 and case.form not in WRONG else [named[n % len(named)]]
        found.compare(case, comm, ours, ["auto"] if size[1] >= LARGE else ["auto", *some])
    other.Free()
    found.report()


class Shape(NamedTuple):
    """So many elements in so many blocks."""

    n: int
    blocks: int = 1


def forms_of(shapes: Iterable[Shape], forms: Iterable[Form] = FORMS) -> list[Form]:
    """All that can be had of such shapes; of large arrays a few, past the thresholds that there are."""
    shapes, forms = [*shapes], [*forms]
    if P > 2 and len(forms) > 1:
        forms = forms[P % 2 :: 2]
    there = [f for f in forms if not any(f.make(Memory(*shape, kind=f.kind)) is None for shape in shapes)]
    if max(shapes).n >= LARGE:
        return [form for form in there if form.name in FEW]
    return [*there, *mixed([form for form in there if form in TAKEN])]


def two_sided(
    name: str,
    sent: Shape,
    received: Shape,
    together: Shape,
    rest: Callable[[], Sequence[Any]] = list,
    *,
    shapes: Iterable[Shape] = (),
    forms: Iterable[Form] = FORMS,
    result: int | None = None,
    in_place: bool = True,
    in_place_is_right: bool = True,
) -> Iterator[Case]:
    """Cases of a call with what is sent and what is received, or both in one place, of which ``result`` is the result.

    ``shapes`` are those of all ranks, if they are not the same; ``rest`` gives what other arguments there are.
    """

    def both(form: Form) -> Any:
        one, other = Memory(*sent, kind=form.kind), Memory(*received, filled=False, kind=form.kind)
        return [one, other], (form.make(one), form.make(other), *rest())

    def at_once(form: Form, word: Any = MPI.IN_PLACE) -> Any:
        memory = Memory(*together, kind=form.kind).kept(result)
        return [memory], (word, form.make(memory), *rest())

    def not_in_place(form: Form) -> Any:
        one, other = Memory(*sent), Memory(*together).kept(result)
        return [other], (one.exact, [other.whole, (received.n, BEFORE), other.type], *rest())

    def from_read_only(form: Form) -> Any:
        one, other = Memory(*sent), Memory(*received, filled=False)
        return [one, other], (READ_ONLY.make(one), form.make(other), *rest())

    reference = None if in_place_is_right else not_in_place
    shapes = [*shapes] or [sent, received, together]
    for form in forms_of(shapes, forms):
        yield Case(f"{name} {form.name}", form, both)
        if in_place and (in_place_is_right or form in TAKEN):
            yield Case(f"{name} in place {form.name}", form, at_once, reference)
            if sent.n == 12 and in_place_is_right:
                yield Case(f"{name} None {form.name}", form, partial(at_once, word=None), reference)
    if sent.n >= LARGE:
        return
    if in_place and in_place_is_right:
        yield Case(f"{name} None and IN_PLACE", PLAIN, partial(at_once, word=None if RANK % 2 else MPI.IN_PLACE))
    yield Case(f"{name} sent read-only", PLAIN, from_read_only)
    yield Case(f"{name} received read-only", READ_ONLY, both)


COUNTS_AS: dict[str, Callable[[list[int]], Any]] = {
    "a list": lambda counts: counts,
    "a tuple": tuple,
    "an array": np.array,
    "an array of int32": lambda counts: np.array(counts, "i4"),
    "array.array": lambda counts: array("q", counts),
    "a memoryview": lambda counts: memoryview(array("q", counts)),
    "a list of int64": lambda counts: [np.int64(count) for count in counts],
    "a list of indices": lambda counts: [Index(count) for count in counts],
    "None": lambda counts: None,
    # What mpi4py refuses.
    "one number": lambda counts: counts[0],
    "too many": lambda counts: [*counts, 0],
    "too few": lambda counts: counts[1:],
    "an iterator": iter,
    "floats": lambda counts: [float(count) for count in counts],
    "too large": lambda counts: [count + 1 for count in counts],
    "too small": lambda counts: [max(count - 1, 0) for count in counts],
}


def unevenly(n: int) -> list[int]:
    """About so many on each rank, none on some; a multiple of 4 everywhere if ``n`` is."""
    return [n * ((5 * rank + 2) % 4) if n < LARGE else n + 4 * rank for rank in range(P)]


def as_given(counts: list[int], form: Callable[[list[int]], Any]) -> list[Any]:
    return [form(counts), SUM]


def parts(n: int) -> Iterator[Case]:
    """Cases of ``Reduce_scatter``."""
    for what, counts in {"even": [n] * P, "uneven": unevenly(n), "last": [0] * (P - 1) + [n]}.items():
        whole, mine = Shape(sum(counts)), Shape(counts[RANK])
        cases = partial(
            two_sided,
            sent=whole,
            received=mine,
            together=whole,
            result=mine.n,
            # Uneven counts in place crash MPICH 5.0.2: what is right is known from what it does not in place.
            in_place_is_right=len({*counts}) == 1,
            shapes=[whole, *map(Shape, counts)],
        )
        if what != "last":
            yield from cases(f"n={n} {what}", rest=partial(as_given, counts, list))
        for name, given in COUNTS_AS.items() if n == 12 else ():
            rest, in_place = partial(as_given, counts, given), what == "even"
            yield from cases(f"n={n} {what} counts {name}", rest=rest, forms=[PLAIN], in_place=in_place)


def rooted(n: int, root: int) -> Iterator[Case]:
    """Cases of ``Reduce``; what is passed to receive matters at the root alone."""
    receives = root == RANK
    kept = SUM, root

    def both(form: Form, other: Any = None) -> Any:
        sent, received = Memory(n, kind=form.kind), Memory(n, filled=False, kind=form.kind)
        into = form.make(received) if receives else received.exact if other is PLAIN else other
        return [sent, received], (form.make(sent), into, *kept)

    def at_once(form: Form, word: Any = MPI.IN_PLACE) -> Any:
        memory = Memory(n, kind=form.kind)
        return [memory], ((word, form.make(memory), *kept) if receives else (form.make(memory), None, *kept))

    def from_read_only(form: Form) -> Any:
        sent, received = Memory(n), Memory(n, filled=False)
        return [sent, received], (READ_ONLY.make(sent), received.exact if receives else None, *kept)

    name = f"n={n} root {root}"
    for form in forms_of([Shape(n)]):
        yield Case(f"{name} {form.name}", form, both)
        yield Case(f"{name} in place {form.name}", form, at_once)
    yield Case(f"{name} None", PLAIN, partial(at_once, word=None))
    yield Case(f"{name} sent read-only", PLAIN, from_read_only)
    for other in (PLAIN, "text", np.zeros(n + 1), np.zeros(n, "f4"), read_only(np.zeros(n)), [], [np.zeros(n), n + 1]):
        what = "an array" if other is PLAIN else str(other).replace("\n", "")[:30]
        yield Case(f"{name} elsewhere {what}", PLAIN, partial(both, other=other))


def from_root(n: int, root: int) -> Iterator[Case]:
    """Cases of ``Bcast``."""

    def of(form: Form, there: Form | None = None) -> Any:
        memory = Memory(n, kind=form.kind)
        return [memory], ((there or form if root == RANK else form).make(memory), root)

    for form in forms_of([Shape(n)]):
        yield Case(f"n={n} root {root} {form.name}", form, of)
    yield Case(f"n={n} root {root} from read-only", PLAIN, partial(of, there=READ_ONLY))


class Vector(NamedTuple):
    """A memory for parts of all ranks, their counts, and places for them, in another order, and with gaps."""

    m: Memory
    counts: list[int]
    starts: list[int]

    @property
    def n(self) -> int:
        return self.counts[0]

    @property
    def dense(self) -> np.ndarray:
        """So many elements as there are, one part after another."""
        return self.m.exact[: sum(self.counts)]

    @property
    def even(self) -> bool:
        return len({*self.counts}) == 1

    @property
    def nearly(self) -> bool:
        """Are these the counts that mpi4py makes of the length alone?"""
        total = sum(self.counts)
        return self.counts == [total // P + (total % P > rank) for rank in range(P)]


class VectorForm(NamedTuple):
    name: str
    make: Callable[[Vector], Any]
    kind: str = ""
    derived: bool = False
    extends: bool = False


V = VectorForm
VECTORS = [
    V("a", lambda v: v.dense if v.nearly else None),
    V("[a, type]", lambda v: [v.dense, v.m.type] if v.nearly else None),
    V("(a, code)", lambda v: (v.dense, v.m.code) if v.nearly else None),
    V("[a, None]", lambda v: [v.dense, None] if v.nearly else None),
    V("[a, None, type]", lambda v: [v.dense, None, v.m.type] if v.nearly else None),
    V("[a, (None, None)]", lambda v: [v.dense, (None, None)] if v.nearly else None),
    V("[a, (None, None), type]", lambda v: [v.dense, (None, None), v.m.type] if v.nearly else None),
    V("[a, None, None, type]", lambda v: [v.dense, None, None, v.m.type] if v.nearly else None),
    V("memoryview", lambda v: v.dense.data if v.nearly else None),
    V("DLPack", lambda v: DLPack(v.dense) if v.nearly else None),
    V("two dimensions", lambda v: v.dense.reshape(-1, 1) if v.nearly else None),
    V("[a, n]", lambda v: [v.m.long, v.n] if v.even else None),
    V("[a, int64(n)]", lambda v: [v.m.long, np.int64(v.n)] if v.even else None),
    V("[a, index(n)]", lambda v: [v.m.long, Index(v.n)] if v.even else None),
    V("[a, array(n)]", lambda v: [v.m.long, np.array(v.n)] if v.even else None),
    V("[a, n, type]", lambda v: [v.m.long, v.n, v.m.type] if v.even else None),
    V("[a, (n, None)]", lambda v: [v.m.long, (v.n, None)] if v.even else None),
    V("[a, (n, stride)]", lambda v: [v.m.long, (v.n, v.n + 2)] if v.even else None),
    V("[a, (n, index(stride))]", lambda v: [v.m.long, (v.n, Index(v.n + 2))] if v.even else None),
    V("[a, (n, stride), type]", lambda v: [v.m.long, (v.n, v.n + 2), v.m.type] if v.even else None),
    V("[a, n, stride, code]", lambda v: [v.m.long, v.n, v.n + 2, v.m.code] if v.even else None),
    V("[a, n, starts, type]", lambda v: [v.m.long, v.n, v.starts, v.m.type] if v.even else None),
    V("[a, (n, starts)]", lambda v: [v.m.long, (v.n, v.starts)] if v.even else None),
    V("[a, counts]", lambda v: [v.m.long, v.counts]),
    V("(a, counts)", lambda v: (v.m.long, v.counts)),
    V("[a, tuple]", lambda v: [v.m.long, tuple(v.counts)] if P != 2 else None),  # two are counts and displacements
    V("[a, tuple, type]", lambda v: [v.m.long, tuple(v.counts), v.m.type] if P != 2 else None),
    V("[a, array]", lambda v: [v.m.long, np.array(v.counts)]),
    V("[a, array of int32, code]", lambda v: [v.m.long, np.array(v.counts, "i4"), v.m.code]),
    V("[a, array.array]", lambda v: [v.m.long, array("l", v.counts)]),
    V("[a, indices]", lambda v: [v.m.long, [Index(count) for count in v.counts]]),
    V("[a, counts, type]", lambda v: [v.m.long, v.counts, v.m.type]),
    V("[a, counts, None]", lambda v: [v.m.long, v.counts, None]),
    V("[a, (counts, None)]", lambda v: [v.m.long, (v.counts, None)]),
    V("[a, (counts, starts)]", lambda v: [v.m.long, (v.counts, v.starts)]),
    V("(a, (tuple, tuple), code)", lambda v: (v.m.long, (tuple(v.counts), tuple(v.starts)), v.m.code)),
    V("[a, (counts, starts), type]", lambda v: [v.m.long, (v.counts, v.starts), v.m.type]),
    V("[a, (counts, starts), None]", lambda v: [v.m.long, (v.counts, v.starts), None]),
    V("[a, (array, array)]", lambda v: [v.m.long, (np.array(v.counts), np.array(v.starts))]),
    V("[a, counts, starts, type]", lambda v: [v.m.long, v.counts, v.starts, v.m.type]),
    V("[a, counts, starts, None]", lambda v: [v.m.long, v.counts, v.starts, None]),
    V("[a, counts, None, type]", lambda v: [v.m.long, v.counts, None, v.m.type]),
    V("[a, array, indices, code]", lambda v: [v.m.long, np.array(v.counts), [*map(Index, v.starts)], v.m.code]),
    V("[memoryview, (counts, starts), type]", lambda v: [v.m.long.data, (v.counts, v.starts), v.m.type]),
    V("[bytearray, counts, starts, type]", lambda v: [v.m.owner, v.counts, v.starts, v.m.type], "bytearray"),
    V("[array.array, (counts, starts)]", lambda v: [v.m.owner, (v.counts, v.starts)], "array.array"),
    V("[DLPack, (counts, starts)]", lambda v: [DLPack(v.m.long), (v.counts, v.starts)]),
    V("[Fortran order, counts]", lambda v: [v.m.whole[BEFORE:-1].reshape(-1, 1).T, v.counts]),
    V("[masked, counts, type]", lambda v: [np.ma.array(v.m.long, copy=False), v.counts, v.m.type]),
    V("[of another size, counts, starts, type]", lambda v: [v.m.long.view("u1"), v.counts, v.starts, v.m.type]),
    V("[of another byte order, counts, type]", lambda v: [v.m.long.view(">f8"), v.counts, v.m.type]),
    V("[None, counts, type]", lambda v: None if any(v.counts) else [None, v.counts, v.m.type]),
    V("[a, counts, TWO]", lambda v: by(2, v, lambda counts: [v.m.long, counts, TWO]), derived=True),
    V("[a, (counts, starts), TWO]", lambda v: by(2, v, lambda c: [v.m.long, (c, halves(v.starts)), TWO]), derived=True),
    V("[a, counts, GAP]", lambda v: by(2, v, lambda counts: [v.m.long, counts, GAP]), derived=True),
    # What mpi4py refuses.
    V("[a]", lambda v: [v.dense]),
    V("[]", lambda v: []),
    V("[a, (counts,)]", lambda v: [v.m.long, (v.counts,)]),
    V("[a, (counts, starts, 0)]", lambda v: [v.m.long, (v.counts, v.starts, 0)]),
    V("[a, [counts, starts]]", lambda v: [v.m.long, [v.counts, v.starts]]),
    V("[a, counts, starts]", lambda v: [v.m.long, v.counts, v.starts]),
    V("[a, (counts, starts), 0, type]", lambda v: [v.m.long, (v.counts, v.starts), 0, v.m.type]),
    V("[a, counts, starts, type, 0]", lambda v: [v.m.long, v.counts, v.starts, v.m.type, 0]),
    V("[a, type, counts]", lambda v: [v.m.long, v.m.type, v.counts]),
    V("[a, too many]", lambda v: [v.m.long, [*v.counts, 0]]),
    V("[a, too few]", lambda v: [v.m.long, v.counts[1:]]),
    V("[a, (counts, too many)]", lambda v: [v.m.long, (v.counts, [*v.starts, 0])]),
    V("[a, (counts, too few)]", lambda v: [v.m.long, (v.counts, v.starts[1:])]),
    V("[a, floats]", lambda v: [v.m.long, [float(count) for count in v.counts]]),
    V("[a, 1.0]", lambda v: [v.m.long, 1.0]),
    V("[a, iterator]", lambda v: [v.m.long, iter(v.counts)]),
    V("[a, unknown code]", lambda v: [v.dense, "no such type"]),
    V("[part of an element, type]", lambda v: [v.m.long.view("u1")[:-1], v.m.type]),
    V("of another byte order", lambda v: v.dense.view(">f8") if v.nearly else None),
    V("[of another byte order, counts]", lambda v: [v.m.long.view(">f8"), v.counts]),
    V("[strided, counts]", lambda v: [v.m.whole[::2], v.counts]),
    V("[read-only, counts]", lambda v: [read_only(v.m.long), v.counts]),
    V("text", lambda v: "text"),
    V("nothing", lambda v: Ellipsis),
]  # fmt: skip


def halves(numbers: list[int]) -> list[int]:
    return [number // 2 for number in numbers]


def by(divisor: int, v: Vector, make: Callable[[list[int]], Any]) -> Any:
    return None if any(count % divisor for count in v.counts) else make([count // divisor for count in v.counts])


def vectors(n: int) -> Iterator[Case]:
    """Cases of ``Allgatherv``."""
    nearly = [n + 1] + [n] * (P - 1)
    for what, counts in {"even": [n] * P, "nearly": nearly, "uneven": unevenly(n)}.items():
        starts = [sum(counts[rank + 1 :]) + 2 * (P - rank) for rank in range(P)]

        def vector(form: VectorForm, counts: list[int] = counts, starts: list[int] = starts) -> Vector:
            return Vector(Memory(2 * sum(counts) + 2 * P + 2, kind=form.kind), counts, starts)

        def both(form: Any, sent: Form = PLAIN, vector: Any = vector) -> Any:
            v = vector(form)
            memory = Memory(v.counts[RANK], kind=sent.kind)
            return [memory, v.m], (sent.make(memory), form.make(v))

        def at_once(form: Any, word: Any = MPI.IN_PLACE, vector: Any = vector) -> Any:
            v = vector(form)
            return [v.m], (word, form.make(v))

        forms = [form for form in VECTORS if form.make(vector(form)) is not None]
        for form in forms[P % 2 :: 2] if P > 2 else forms:
            yield Case(f"n={n} {what} {form.name}", form, both)
            yield Case(f"n={n} {what} in place {form.name}", form, at_once)
        yield Case(f"n={n} {what} None", V("", lambda v: [v.m.long, v.counts]), partial(at_once, word=None))
        in_bytes = V("", lambda v: [v.m.long, [8 * count for count in v.counts], "B"])
        yield Case(
            f"n={n} {what} in bytes", in_bytes, partial(both, sent=Form("", lambda m: [m.exact.view("u1"), "B"]))
        )
        for one in forms_of(map(Shape, counts), [*TAKEN, *WRONG]) if what == "uneven" else ():
            form = V("", lambda v: [v.m.long, v.counts])
            yield Case(f"n={n} {what} sent {one.name}", form, partial(both, sent=one))


def test_reduce_scatter_block(comm, size):
    n = size[1]
    cases = two_sided(f"n={n}", Shape(n, P), Shape(n), Shape(n, P), lambda: [SUM], result=n)
    swept(comm, size, "Reduce_scatter_block", "reduce_scatter", cases)


def test_reduce_scatter(comm, size):
    swept(comm, size, "Reduce_scatter", "reduce_scatter", parts(size[1]))


def test_allreduce(comm, size):
    n = size[1]
    swept(comm, size, "Allreduce", "allreduce", two_sided(f"n={n}", Shape(n), Shape(n), Shape(n), lambda: [SUM]))


def test_allgather(comm, size):
    n = size[1]
    swept(comm, size, "Allgather", "allgather", two_sided(f"n={n}", Shape(n), Shape(n, P), Shape(n, P)))


@pytest.mark.parametrize("root", sorted({0, P - 1}))
def test_reduce(comm, size, root):
    swept(comm, size, "Reduce", "reduce", rooted(size[1], root))


@pytest.mark.parametrize("root", sorted({0, P - 1}))
def test_bcast(comm, size, root):
    swept(comm, size, "Bcast", "bcast", from_root(size[1], root))


def test_allgatherv(comm, size):
    if size[1] < LARGE:  # which nothing depends on
        swept(comm, size, "Allgatherv", "allgather", vectors(size[1]))


# What users have met.


def expected_block(n: int) -> np.ndarray:
    return P * (np.arange(n) + n * RANK) + P * (P - 1) / 2


def mine(n: int) -> np.ndarray:
    return np.arange(P * n, dtype=float) + RANK


@pytest.mark.parametrize("n", [3, 400_000])
@pytest.mark.parametrize("algorithm", ["auto", *mpicoll.ALGORITHMS["reduce_scatter"], *SHARED])
def test_a_count_is_that_of_a_block(comm, n, algorithm):
    ours, t = mpicoll.Comm(comm), np.zeros(n + 1)
    s = mine(n)
    ours.Reduce_scatter_block(MPI.IN_PLACE, [s, n, MPI.DOUBLE], algorithm=algorithm)
    np.testing.assert_array_equal(s[:n], expected_block(n))
    ours.Reduce_scatter_block([mine(n), n], [t, n], algorithm=algorithm)
    np.testing.assert_array_equal(t, [*expected_block(n), 0])


@pytest.mark.parametrize("n", [3, 400_000])
@pytest.mark.parametrize("algorithm", ["auto", *mpicoll.ALGORITHMS["reduce_scatter"], *SHARED])
def test_none_is_another_word_for_in_place(comm, n, algorithm):
    ours, s = mpicoll.Comm(comm), mine(n)
    ours.Reduce_scatter_block(None, s, algorithm=algorithm)
    np.testing.assert_array_equal(s[:n], expected_block(n))


def named_on_some(ours: mpicoll.Comm, n: int, check: str | None) -> None:
    """An operation is an ``MPI.Op`` on some ranks, and its name on the others."""
    op = "sum" if RANK % 2 else MPI.SUM
    x, whole, got = mine(n), P * np.arange(P * n) + P * (P - 1) / 2, np.zeros(P * n)
    ours.Allreduce(x, got, op, check=check)
    np.testing.assert_array_equal(got, whole)
    got[:] = 0
    ours.Reduce(x, got, op, P - 1, check=check)
    np.testing.assert_array_equal(got, whole if RANK == P - 1 else 0)
    ours.Reduce_scatter(x, got[:n], [n] * P, op, check=check)
    np.testing.assert_array_equal(got[:n], expected_block(n))
    np.testing.assert_array_equal(mpicoll.allreduce(x.copy(), ours, op, check=check), whole)
    np.testing.assert_array_equal(mpicoll.reduce_scatter(x, ours, op=op, check=check), expected_block(n))
    summed = mpicoll.reduce(x.copy(), ours, P - 1, op, check=check)
    np.testing.assert_array_equal(summed, whole if RANK == P - 1 else x)
    got[:] = 0
    ours.Reduce_scatter_block(x, got[:n], op, check=check)
    np.testing.assert_array_equal(got[:n], expected_block(n))


@pytest.mark.parametrize("n", [0, 3, 400_000])
def test_ranks_may_call_an_operation_by_name_or_not(comm, n):
    named_on_some(mpicoll.Comm(comm), n, None)


@pytest.mark.parametrize("n", [0, 3, 400_000])
def test_so_they_may_unchecked(comm, n):
    found = Differences(comm, "unchecked, an operation by name on some ranks")
    error = found.watched(f"n={n}", lambda: named_on_some(mpicoll.Comm(comm), n, "off"))
    if error:
        found.found.append((f"n={n}", "auto", "off", error))
    found.report()


@pytest.mark.parametrize("word", [MPI.IN_PLACE, None], ids=["IN_PLACE", "None"])
@pytest.mark.parametrize("n", [12, 20_011, LARGE])
def test_uneven_parts_in_place(comm, n, word):
    """By the MPI library itself MPICH 5.0.2 may crash there."""
    ours, counts = mpicoll.Comm(comm), [n + rank for rank in range(P)]
    for algorithm in ("auto", *mpicoll.ALGORITHMS["reduce_scatter"]):
        x, first = np.arange(sum(counts)) + 0.5 * RANK, sum(counts[:RANK])
        ours.Reduce_scatter(word, x, counts, algorithm=algorithm)
        right = P * np.arange(first, first + counts[RANK]) + 0.5 * P * (P - 1) / 2
        np.testing.assert_array_equal(x[: counts[RANK]], right)
