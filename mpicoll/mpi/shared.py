"""Collectives in memory that the ranks of a node share: each reads what the others hold, and nothing is sent.

They are no schedules: there are no messages, but turns, after which everybody sees what everybody else has written.  A
vector is cut into pieces; each has an *owner*, the rank that reduces it for all (in the canonical order, see
``algorithms.fold``) while it is in the cache, or that holds it, where nothing is reduced.  Arrays that lie in shared
memory are read, and written, where they are.  Others go through an *inbox* and an *outbox* of each rank, a tile at a
time:

    put      what others own of the tile goes to this rank's inbox
    reduce   what this rank owns is reduced from all inboxes, and goes to its outbox
    get      what others own comes from their outboxes

with a turn after each, in which one tile is put, the one before is reduced, and the one before that is got.

On several nodes each owner, once it has reduced what its node has of a piece, reduces it with the owners of that piece
on other nodes, by messages; there are as many owners as the smallest node has ranks.
"""

import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache, partial
from itertools import chain
from typing import Any, NamedTuple
from weakref import WeakSet

import numpy as np
from mpi4py import MPI

from ..algorithms.fold import power_below
from ..collective import ALLREDUCE, Collective
from . import native
from .buffers import HALF, is_half
from .launch import cores, node_of
from .memory import NOWHERE, PAGE, Place, Pool, place_of, share, windows
from .operations import Operation

BOX = 512 << 10
"""Bytes of an inbox or an outbox; each rank has two of both, for one tile and the next."""

BOX_ACROSS = 4 << 20
"""The same on several nodes, between which short messages take long."""

TILE = 512 << 10
"""Bytes that are reduced at a time, of all operands together, where nothing is put or got."""

LINE = 64  # bytes of a cache line: pieces are whole ones, so that no two ranks write to the same
WORDS = LINE // 8
SPIN = 2000  # looks at a flag before this core is offered to others
PATIENT = 20_000  # and more, before it is left to them for a while
KEPT = 32  # compiled calls
MAX_TILES = 1024  # of such a one

ORDERED = platform.machine() in ("x86_64", "AMD64", "i686")
"""Do all cores see what one writes in the order in which it does?  Where not, the MPI library's barrier sees to it:
Python has no fences."""

PROCESS = int.from_bytes(os.urandom(8), "little")  # no other's, not even in a container of its own


AtOnce = Callable[[int, bool, np.ndarray, np.ndarray], list[Any] | None]


COMPILED = frozenset({ALLREDUCE.name})
"""Collectives that there is machine code for."""


class Node:
    """The ranks of a communicator that share memory, and how they take turns; making it is a collective call.

    ``pause`` is called now and then while this rank waits: it drives what else is pending, messages of the MPI
    library included, without which another rank may never come.
    """

    def __init__(self, comm: MPI.Intracomm, pause: Callable[[], None]) -> None:
        node = node_of(comm)
        self.whole = node.size == comm.size  # is there only this one?
        if self.whole:
            node.Free()
            node = comm
        self.comm, self.size, self.rank = node, node.size, node.rank
        self.ranks, self.box = comm.size, BOX if self.whole else BOX_ACROSS
        self.across: Callable[[np.ndarray, Operation], None] | None = None  # reduces with other nodes, if there are any
        p = self.size
        self.owners = list(range(p))  # ranks here that own pieces
        found = node.allgather((PROCESS, cores(), native.offer()))
        self.processes = tuple(one[0] for one in found)
        module, self.wrong = native.together([one[2] for one in found]) if p > 1 else (None, native.offer().wrong)
        self.pool = Pool(node, self.processes)
        size = 3 * p * LINE if module is None else module.sizes(p)[0]
        page = share(node, size) if p > 1 else None
        self.shares = page is not None
        self._native: Any = None
        self._room: list[int] = []  # bytes of memory that the compiled part is still to be given
        if p == 1 and native.offer().layout and native.module is not None:
            self._native = native.module.Node(bytearray(native.module.sizes(1)[0]), 0, 1, 0, (), pause)
        if page is None:
            return
        self._spin = SPIN if len({core for one in found for core in one[1]}) >= p else 0
        if module is not None:
            self._native = module.Node(page, self.rank, p, self._spin, additions(p), pause)
            _, *self._room = module.sizes(p)
        self._words, self._turn, self._pause = memoryview(page).cast("Q"), 0, pause
        self._flag, self._flags = self.rank * WORDS, [q * WORDS for q in range(p) if q != self.rank]
        self._slots = [[(p + odd * p + q) * WORDS for q in range(p)] for odd in (0, 1)]
        self.boxes: np.ndarray | None = None
        self._results: list[np.ndarray] = []
        self.compiled: dict[Any, list[list[Step]]] = {}
        self._scratch = np.empty(0, np.uint8)
        _nodes.add(self)

    # ---- turns

    def sync(self) -> None:
        """Wait until all ranks have come here; what they wrote before is seen after."""
        if self._native is not None:
            self._native.sync()
            return
        if not ORDERED:
            self.comm.Barrier()
            return
        self._turn += 1
        turn, words = self._turn, self._words
        words[self._flag] = turn
        for flag in self._flags:
            looks = 0
            while words[flag] < turn:
                looks += 1
                if looks > self._spin:
                    self._wait(looks - self._spin)

    def _wait(self, looks: int) -> None:
        if not looks % 16:
            self._pause()
        if looks < PATIENT:
            os.sched_yield()
        else:
            time.sleep(5e-5)

    def exchange(self, *mine: int) -> list[list[int]]:
        """Up to eight numbers of each rank, seen by all.

        A rank may be a turn ahead of those that still read, not two; so there are two places to write to.
        """
        if self._native is not None:
            theirs: list[list[int]] = self._native.exchange(*mine)
            return theirs
        slots, words = self._slots[self._turn & 1], self._words
        if not ORDERED:
            self.comm.Barrier()  # until all have read the last ones
        for at, number in enumerate(mine, slots[self.rank]):
            words[at] = number
        self.sync()
        n = len(mine)
        return [words[at : at + n].tolist() for at in slots]

    def gather(self, number: int) -> list[int]:
        """One number of each rank, seen by all: ``exchange`` at the least cost."""
        if self._native is not None:
            numbers: list[int] = self._native.gather(number)
            return numbers
        if not ORDERED:
            return [theirs for (theirs,) in self.exchange(number)]
        slots, words = self._slots[self._turn & 1], self._words
        words[slots[self.rank]] = number
        self.sync()
        return [words[slot] for slot in slots]

    # ---- what is compiled

    def at_once(self, row: Collective, operation: Operation, dtype: np.dtype, count: int) -> AtOnce | None:
        """What makes such a call at once, its comparison included: a function of the number that stands for the call,
        whether it is to be compared, and flat arrays.  ``None`` if that is not compiled.

        It returns ``None`` when it is done.  Otherwise nothing is done, on all ranks: it returns what they compare,
        which is not the same; or where their arrays lie, some in shared memory, or where there is no memory an empty
        list.
        """
        code = _code_of(operation, dtype) if self.does(row.name) else None
        if code is None or not count:
            return None
        number_of, kind, mean = code
        allreduce, nbytes = self._native.allreduce, count * dtype.itemsize
        needs = 0 if nbytes <= native.INLINE else 1 if nbytes <= native.CELL else 2

        def call(number: int, compares: bool, send: np.ndarray, recv: np.ndarray) -> list[Any] | None:
            where = None
            if needs == 2:
                where = self.places(send, recv)
                where = where if any(where) else None
            if needs and self._room[needs - 1]:
                if compares:
                    numbers = self.gather(number)
                    if numbers.count(number) != self.size:
                        return numbers
                    compares = False
                if not self._give(needs):
                    return []
            found: list[Any] | None = allreduce(number, compares, number_of, kind, mean, where, send, recv)
            return found

        return call

    def does(self, collective: str) -> bool:
        """Whether there is an ``at_once`` for a collective."""
        return self._native is not None and self.whole and collective in COMPILED

    @property
    def counter(self) -> Any:
        """What counts the calls that are compared, if that is the compiled part."""
        return self._native

    def learn(self, key: tuple[Any, ...], operation: Operation, digest: int, headers: Any, paths: Any) -> None:
        """Have calls of these arguments (collective, method, operation, dtype, elements, in place, deterministic) made
        by the compiled part from the start."""
        row, method, op, dtype, count, in_place, deterministic = key
        code, call = _code_of(operation, dtype), native.calls.get((row, method))
        if self._native is not None and code is not None and call is not None:
            op = sys.intern(op) if isinstance(op, str) else op
            self._native.learn(call, op, dtype, count, in_place, deterministic, digest, code, headers, paths)

    def bind(self, state: Any) -> Any:
        """Give the compiled part, if there is one, the state whose calls it makes; return it."""
        if self._native is not None:
            self._native.bind(state, MPI.Query_thread() == MPI.THREAD_MULTIPLE)
        return self._native

    def forget(self) -> None:
        """Look at all calls closely again."""
        if self._native is not None:
            self._native.forget()

    def _give(self, what: int) -> bool:
        """Give the compiled part memory for vectors of a cell (1), or longer (2); false, on all ranks, if none is."""
        memory = share(self.comm, self._room[what - 1])
        if memory is None:
            return False
        (self._native.open_cells if what == 1 else self._native.open_boxes)(memory)
        self._room[what - 1] = 0
        return True

    # ---- memory

    def empty(self, nbytes: int) -> np.ndarray | None:
        """Return memory of this rank that others find; ``None``, on all ranks, if there is none (see ``Pool``)."""
        if not self.shares:
            return None
        forget()
        return self.pool.empty(nbytes)

    def common(self, nbytes: int) -> np.ndarray | None:
        """Return memory that is one for all ranks, full of zeros; ``None`` if there is none.  A collective call."""
        memory = share(self.comm, max(nbytes, 1)) if self.shares else None
        return None if memory is None else np.frombuffer(memory, np.uint8, nbytes)

    def result(self, nbytes: int) -> np.ndarray | None:
        """Memory that is one for all ranks: the same again at the next call but one.  ``None`` if there is none.

        A collective call.
        """
        if not self._results or len(self._results[0]) < nbytes:
            size = -(-nbytes // PAGE) * PAGE
            memory = share(self.comm, 2 * size)
            if memory is None:
                return None
            self.compiled.clear()
            self._results = [np.frombuffer(memory, np.uint8, size, half * size) for half in (0, 1)]
        self._results.reverse()
        return self._results[0][:nbytes]

    def _open(self) -> bool:
        """Make sure that there are staging buffers; false, on all ranks, if there is no memory.  A collective call."""
        if self.boxes is None:
            memory = share(self.comm, self.size * 4 * self.box)
            if memory is not None:
                self.boxes = np.frombuffer(memory, np.uint8).reshape(self.size, 2, 2, self.box)
        return self.boxes is not None

    def release(self) -> None:
        """Give back what no array uses; it is of no use any more."""
        self.disown()
        if self._native is not None:
            self._native.close()
            self._native = None
        if self.shares:
            self._results, self.boxes, self.across = [], None, None
            self._words.release()
            del self._pause  # which refers to whom this belongs
        if not self.whole:
            self.comm.Free()

    def disown(self) -> None:
        """Arrays that were made here are ordinary ones from now on."""
        self.pool.trim()
        forget()

    def _place_of(self, array: np.ndarray) -> Place:
        """Where it is, if all ranks here can find it."""
        place = place_of(array)
        return place if place.window and windows[place.window].parts_of(self.processes) else NOWHERE

    def array(self, rank: int, place: Sequence[int], dtype: np.dtype) -> np.ndarray:
        """What begins there, of that rank's part."""
        parts = windows[place[0]].parts_of(self.processes)
        assert parts is not None
        tail = parts[rank][place[1] :]
        return tail[: len(tail) // dtype.itemsize * dtype.itemsize].view(dtype)

    def scratch(self, n: int, length: int, dtype: np.dtype) -> list[np.ndarray]:
        """Return ``n`` arrays of ``length`` elements, each on lines of its own, which the next call takes over."""
        size = -(-length * dtype.itemsize // LINE) * LINE
        if len(self._scratch) < n * size:
            self._scratch = np.empty(n * size, np.uint8)
        return [self._scratch[k * size :][: length * dtype.itemsize].view(dtype) for k in range(n)]

    # ---- the collectives

    def places(self, send: np.ndarray | None, recv: np.ndarray | None) -> tuple[int, int, int, int]:
        """Where this rank's arrays lie, in four numbers for ``exchange``: what all ranks must know for ``run``."""
        there = NOWHERE if recv is None else self._place_of(recv)
        if send is recv:
            return (*there, *there)
        return (*(NOWHERE if send is None else self._place_of(send)), *there)

    def run(
        self,
        row: Collective,
        send: np.ndarray | None,
        recv: np.ndarray | None,
        operation: Operation,
        root: int = 0,
        cuts: Sequence[int] | None = None,
        staged: bool = True,
        places: list[list[int]] | None = None,
        one: bool = False,
        in_place: bool = False,
    ) -> bool:
        """Run a collective on flat arrays of one dtype; a collective call.

        ``send`` is what this rank sends, the whole or its part, and ``recv`` what it receives; ``None`` where it sends
        or receives nothing.  Both may be one array; ``in_place`` says that one is a part of the other.  ``cuts`` are
        where parts begin.  ``places`` are those of all ranks, if they were exchanged already.  With ``one``, ``recv``
        is what ``result`` has returned, one result for all ranks.

        Returns false, on all ranks, and has done nothing, if it takes staging buffers, and there is no memory for them,
        or they are not wanted (``staged``).
        """
        if places is None:
            places = self.exchange(*self.places(send, None if one else recv))
        array: Any = recv if send is None else send
        count = cuts[-1] if cuts else len(array)
        own = not (row.reduces or in_place or send is None or recv is None) and row.parted
        key = None
        if operation.predefined:
            key = (
                *(row, operation.name, operation.widens, count, array.dtype, root, cuts, staged, own),
                id(self._results[0]) if one else 0,
                *chain.from_iterable(places),
            )
        turns: Iterable[Iterable[Step]] | None = self.compiled.get(key)
        if turns is None:
            call = _Call(self, row, recv if one else None, array.dtype, count, operation, root, cuts, places, own)
            if call.staged and not (staged and self._open()):
                return False
            turns = call.turns()
            if key is not None and call.tiles <= MAX_TILES:
                if len(self.compiled) >= KEPT:
                    del self.compiled[next(iter(self.compiled))]
                turns = self.compiled[key] = [list(map(_prepared, steps)) for steps in turns]
        vectors = send, recv
        with np.errstate(all="ignore"):  # like MPI's own reductions
            for n, steps in enumerate(turns):
                if n:
                    self.sync()
                for do, arrays in steps:
                    if arrays:
                        do(*[vectors[a.of][a.lo : a.hi] if type(a) is _Slice else a for a in arrays])  # type: ignore[index]
                    else:
                        do()
        return True

    def owned(self, count: int, dtype: np.dtype) -> list[int]:
        """Return the lengths of the pieces that this rank reduces with other nodes, of ``count`` elements in all."""
        if self.rank not in self.owners:
            return []
        owners, at = len(self.owners), self.owners.index(self.rank)
        tiles, length = _tiles(-(-count // owners), dtype.itemsize, self.box // owners)
        starts = [min((tile * owners + at) * length, count) for tile in range(tiles)]
        return [n for start in starts if (n := min(start + length, count) - start)]


_nodes: WeakSet[Node] = WeakSet()


def forget() -> None:
    """All compiled calls: their views keep memory that may be given back."""
    for node in list(_nodes):
        node.compiled.clear()


class _Slice(NamedTuple):
    """Elements of what the caller passes, to send (0) or to receive (1): bound when the call is made."""

    of: int
    lo: int
    hi: int


Array = np.ndarray | _Slice
Step = tuple[Callable[..., object], tuple[Any, ...]]
"""What to do with which arrays."""


class _Call:
    """This rank's part in a call, compiled: phases, each of which does its steps for one tile after another."""

    def __init__(
        self,
        node: Node,
        row: Collective,
        one: np.ndarray | None,
        dtype: np.dtype,
        count: int,
        operation: Operation,
        root: int,
        cuts: Sequence[int] | None,
        places: list[list[int]],
        own: bool,
    ) -> None:
        self.node, self.row, self.operation, self.dtype = node, row, operation, dtype
        self.root, self.cuts, self.count = root, cuts, count
        self.me, self.p = node.rank, node.size
        ranks = range(self.p)
        senders = [q for q in ranks if row.sends(q, root)]
        takers = [q for q in ranks if row.receives(q, root)]
        self.owners = senders if not row.reduces else node.owners
        self.receives = self.me in takers
        self.delivers = takers != [self.me]  # to others

        self.sources: dict[int, np.ndarray] = {}  # by rank, if they are read where they are
        self.targets: list[np.ndarray] = []  # where results are written at once, for all who want them
        self.own = own  # this rank's part is to be copied from what it sends to what it receives
        self.own_first = False  # where others read it then
        if all(places[q][0] for q in senders):
            self.sources = {q: node.array(q, places[q][:2], dtype) for q in senders}
            self.sent_from = [self._part(q)[0] if row.sends_part else 0 for q in ranks]
        elif row.sends_part and not row.to_root and all(places[q][2] for q in ranks):
            self.sources = {q: node.array(q, places[q][2:], dtype) for q in ranks}
            self.sent_from, self.own_first = [0] * self.p, True
        if one is not None:
            self.targets = [one]
        elif row.reduces and not row.receives_part and all(places[q][2] for q in takers):
            takers = [*takers[self.me :], *takers[: self.me]]  # not all of them in one order
            self.targets = [node.array(q, places[q][2:], dtype) for q in takers]

        before = [] if self.sources else [self.put]
        after = [] if self.targets or row.receives_part else [self.get]
        if row.reduces:
            self.phases = [*before, self.reduce, *after]
        else:
            self.phases = [self.get] if self.sources else [self.lay_out, self.get]
        self.staged = len(self.phases) > 1

        most = node.box if self.staged or not row.reduces or node.across else TILE
        owners = len(self.owners)
        if row.parted:
            longest = max(stop - start for start, stop in map(self._part, ranks))
        else:
            longest = -(-self.count // owners)
        self.scatters = not row.reduces and row.receives_part
        # An inbox has room for what each owner reduces, the outbox of a root for the part of each rank.
        shares = owners if row.reduces else self.p if self.scatters else 1
        self.tiles, self.length = _tiles(longest, dtype.itemsize, most // shares)

    def _part(self, rank: int) -> tuple[int, int]:
        """Where a rank's part of the whole begins and ends; all of it, where there are no parts."""
        return (self.cuts[rank], self.cuts[rank + 1]) if self.cuts else (0, self.count)

    def turns(self) -> Iterator[Iterable[Step]]:
        """The steps of each turn."""
        own = self.bring_own()
        if self.own_first:
            yield own
            own = iter(())
        if self.staged:
            for turn in range(self.tiles + len(self.phases) - 1):
                active = [
                    phase(turn - later) for later, phase in enumerate(self.phases) if 0 <= turn - later < self.tiles
                ]
                yield chain(own if not turn else (), *active)
        else:
            yield chain(own, chain.from_iterable(map(self.phases[0], range(self.tiles))))
        if self.sources or self.targets:  # somebody may still be reading there, or writing
            yield ()

    def piece(self, tile: int, owner: int) -> tuple[int, int]:
        """Which elements of the whole they are."""
        if self.cuts:
            start, stop = self.cuts[owner] + tile * self.length, self.cuts[owner + 1]
        else:
            start, stop = (tile * len(self.owners) + self.owners.index(owner)) * self.length, self.count
        return min(start, stop), min(start + self.length, stop)

    def sent(self, lo: int, hi: int) -> _Slice:
        """Elements of the whole in what this rank sends."""
        start = self._part(self.me)[0] if self.row.sends_part else 0
        return _Slice(0, lo - start, hi - start)

    def received(self, lo: int, hi: int) -> _Slice:
        """Elements of the whole in what this rank receives."""
        start = self._part(self.me)[0] if self.row.receives_part else 0
        return _Slice(1, lo - start, hi - start)

    def bring_own(self) -> Iterator[Step]:
        """Copy this rank's part from what it sends to what it receives."""
        lo, hi = self._part(self.me)
        if self.own and lo < hi:
            yield _copy, (self.received(lo, hi), self.sent(lo, hi))

    def box(self, kind: int, tile: int, rank: int, start: int, length: int) -> np.ndarray:
        """Elements of an inbox (0) or an outbox (1)."""
        assert self.node.boxes is not None
        size = self.dtype.itemsize
        return self.node.boxes[rank, kind, tile & 1, start * size : (start + length) * size].view(self.dtype)

    def put(self, tile: int) -> Iterator[Step]:
        """For others to reduce."""
        for owner in self.owners:
            lo, hi = self.piece(tile, owner)
            if owner != self.me and lo < hi:
                yield _copy, (self.box(0, tile, self.me, owner * self.length, hi - lo), self.sent(lo, hi))

    def lay_out(self, tile: int) -> Iterator[Step]:
        """For others to get."""
        if self.me not in self.owners:
            return
        for part in range(self.p) if self.scatters else [self.me]:
            lo, hi = self.piece(tile, part)
            if lo < hi and not (self.scatters and part == self.me):
                at = part * self.length if self.scatters else 0
                yield _copy, (self.box(1, tile, self.me, at, hi - lo), self.sent(lo, hi))

    def reduce(self, tile: int) -> Iterator[Step]:
        """What this rank owns, of all ranks."""
        lo, hi = self.piece(tile, self.me) if self.me in self.owners else (0, 0)
        if lo == hi:
            return
        operands: list[Array] = [array[lo:hi] for array in self.sources.values()]
        if not operands:
            operands = [self.box(0, tile, q, self.me * self.length, hi - lo) for q in range(self.p)]
            operands[self.me] = self.sent(lo, hi)
        outs: list[Array] = []
        if self.row.receives_part:
            outs.append(self.received(lo, hi))
        elif self.targets:
            outs += [target[lo:hi] for target in self.targets]
        else:
            outs += [self.received(lo, hi)] if self.receives else []
            outs += [self.box(1, tile, self.me, 0, hi - lo)] if self.delivers else []
        first, *others = outs
        yield from self.combine(operands, first, hi - lo)
        for other in others:
            yield _copy, (other, first)

    def combine(self, operands: list[Array], out: Array, length: int) -> Iterator[Step]:
        """In the canonical order; 16-bit floats as float32, rounded once."""
        operation, p = self.operation, self.p
        carried = operation.carried(self.dtype)
        order = additions(p)
        wider = p if carried != self.dtype else 0
        scratch = self.node.scratch(wider + max(into for *_, into in order) - p, length, carried)
        total = out
        if wider:
            for wide, operand in zip(scratch, operands, strict=False):
                yield _copy, (wide, operand)
            operands, total = [*scratch[:p]], scratch[0]
        arrays = [*operands, total, *scratch[wider:]]
        for lower, higher, into in order:
            yield operation.combine, (arrays[lower], arrays[higher], arrays[into])
        if self.node.across:
            yield partial(_across, self.node.across, operation), (total,)
        if operation.finish:
            yield partial(_finish, operation.finish, self.node.ranks), (total,)
        if wider:
            yield _copy, (out, total)

    def get(self, tile: int) -> Iterator[Step]:
        """What others own."""
        if not self.receives:
            return
        for part in [self.me] if self.scatters else self.owners:
            lo, hi = self.piece(tile, part)
            holder = self.root if self.scatters else part
            if holder == self.me or lo == hi:
                continue
            if self.staged:
                there = self.box(1, tile, holder, part * self.length if self.scatters else 0, hi - lo)
            else:
                start = self.sent_from[holder]
                there = self.sources[holder][lo - start : hi - start]
            yield _copy, (self.received(lo, hi), there)


def _tiles(longest: int, size: int, most: int) -> tuple[int, int]:
    """Return in how many pieces of at most ``most`` bytes, whole cache lines, an owner's elements are done, and the
    elements of each."""
    line = LINE // size if LINE % size == 0 else LINE
    tiles = -(-longest // (max(most // size // line, 1) * line))
    return tiles, -(-longest // (max(tiles, 1) * line)) * line


def _prepared(step: Step) -> Step:
    """Return the step with nothing to bind when the call is made, if that can be."""
    do, arrays = step
    return step if any(isinstance(array, _Slice) for array in arrays) else (partial(do, *arrays), ())


def _across(across: Callable[[np.ndarray, Operation], None], operation: Operation, total: np.ndarray) -> None:
    across(total, operation)


def _finish(finish: Callable[[np.ndarray, int], None], p: int, total: np.ndarray) -> None:
    finish(total, p)


OPERATIONS = ("sum", "prod", "max", "min", "land", "lor", "lxor", "band", "bor", "bxor")
"""In the order of ``enum operation`` in ``kernels.h``."""


def _code_of(operation: Operation, dtype: np.dtype) -> tuple[int, str, bool] | None:
    """The operation's number, the kind of elements, and whether to divide: what the compiled part takes; ``None`` if it
    has no code for it."""
    name = "sum" if operation.name == "mean" else operation.name
    if not operation.predefined or name not in OPERATIONS or not dtype.isnative or native.module is None:
        return None
    half, number = is_half(dtype), OPERATIONS.index(name)
    if half and name in ("sum", "prod") and not operation.widens:  # rounded at every hop
        return None
    kind = "E" if half and dtype.num != HALF else dtype.char
    return (number, kind, operation.name == "mean") if native.module.does(number, kind) else None


def _copy(target: np.ndarray, source: np.ndarray) -> None:
    target[:] = source


@lru_cache
def additions(p: int) -> tuple[tuple[int, int, int], ...]:
    """The canonical order of ``algorithms.fold`` for one who has all p operands: (lower, higher, out), by number.

    0 to p - 1 are the operands, which stay as they are, p is the total, written at last, and more are scratch.
    """
    pairs = p - power_below(p)
    order: list[tuple[int, int, int]] = []

    def total(lo: int, hi: int, depth: int) -> int:
        """Reduce members ``lo`` to ``hi`` of those that remain when pairs are folded; return where the total is."""
        if hi - lo == 1 and lo >= pairs:
            return lo + pairs
        half = (lo + hi) // 2
        lower = total(lo, half, depth) if hi - lo > 1 else 2 * lo
        higher = total(half, hi, depth + (lower > p)) if hi - lo > 1 else 2 * lo + 1
        order.append((lower, higher, p + 1 + depth))
        return p + 1 + depth

    total(0, p - pairs, 0)
    lower, higher, _ = order.pop()
    return (*order, (lower, higher, p))
