"""A schedule compiled for one rank, one length and one dtype: binds to any vector of that kind.

Compiling turns chunks into ranges, once; binding makes views of the caller's vector and of scratch memory, a round at a
time.  A plan holds no pointer to anything of the caller's, and no memory proportional to the vector, but for a small
one (``State.run``).
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from ..schedule import Recv, Round, Schedule, Send, Verb, chunk_start, is_final, pieces
from .operations import Operation, mix

MAX_MESSAGE = 2**30
"""Bytes.  Longer pieces travel as several messages: MPI counts are often 32-bit integers."""

# Areas of memory: 0 is what is reduced, 1.. are the schedule's scratch vectors, and
_LANDING = -1  # where data to be reduced or mixed arrive
_RESULT = -2  # the caller's vector, where it is not area 0 because sums are carried in another dtype


class _Message(NamedTuple):
    area: int
    lo: int  # bytes
    hi: int
    peer: int


class _Reduction(NamedTuple):
    area: int
    lo: int  # elements
    hi: int
    landing_lo: int
    landing_hi: int
    verb: Verb


class _Move(NamedTuple):
    source: int
    lo: int  # elements
    hi: int
    target: int
    target_lo: int
    finish: bool = False  # what is moved is a result: finish it first


class _Step(NamedTuple):
    """One round, compiled: do ``moves``, exchange ``recvs`` and ``sends``, do ``reductions``, or mix ``shares``."""

    recvs: list[_Message]
    sends: list[_Message]
    moves: list[_Move]
    reductions: list[_Reduction]
    shares: list[tuple[int, int, float]]  # (area, first element, weight)


class Bound(NamedTuple):
    """One round on real memory: ``before()``, exchange ``recvs`` and ``sends``, ``after()``."""

    recvs: list[tuple[memoryview, int]]  # (memory, peer)
    sends: list[tuple[memoryview, int]]
    moves: list[tuple[np.ndarray, np.ndarray, bool]]  # (target, source, finish)
    reductions: list[tuple[np.ndarray, np.ndarray, np.ndarray]]  # (lower, higher, out)
    vector: np.ndarray
    shares: list[tuple[np.ndarray, float]]  # to be mixed into the vector
    operation: Operation
    p: int

    def before(self) -> None:
        """Make ready what is to be sent."""
        for target, source, finish in self.moves:
            if finish and self.operation.finish:
                self.operation.finish(source, self.p)
            if target is not source:
                target[:] = source

    def after(self) -> None:
        """Reduce or mix what has arrived."""
        combine = self.operation.combine
        for lower, higher, out in self.reductions:
            combine(lower, higher, out=out)
        if self.shares:
            mix(self.vector, self.shares)


class Plan:
    """The part of ``rank`` in ``schedule``, for vectors of ``count`` elements of ``dtype``.

    Partial results are carried and sent in the dtype ``carried``, results in ``dtype``; if it ``finishes``, something
    is done to each result before it is rounded to that.  Chunk c begins at element ``cuts[c]``; without ``cuts``,
    chunks are equally long, to one element.
    ``bytes_sent`` is the payload of the rank's ``messages`` in one run, ``scratch_bytes`` the memory it needs for it.
    """

    def __init__(
        self,
        schedule: Schedule,
        rank: int,
        count: int,
        dtype: np.dtype,
        carried: np.dtype | None = None,
        finishes: bool = False,
        cuts: tuple[int, ...] | None = None,
    ) -> None:
        self._schedule, self._rank = schedule, rank
        self._count, self._dtype = count, np.dtype(dtype)
        self._carried, self._finishes = np.dtype(carried or dtype), finishes
        self._cuts = cuts
        self._widens = self._carried != self._dtype
        self._landing_size = 0
        self._unfinished = np.ones(schedule.chunks, bool)  # chunks whose result is not in the caller's vector yet
        self._steps = [step for step in self._compile() if any(step)]
        del self._unfinished
        # What sums are carried in, the scratch vectors, and what lands to be reduced: each on a cache line of its own.
        sizes = [count] * (schedule.scratch + self._widens) + [self._landing_size]
        self._areas, end = [], 0
        for elements in sizes:
            self._areas.append((end, end + elements * self._carried.itemsize))
            end = -(-self._areas[-1][1] // 64) * 64
        self.scratch_bytes = end
        self.bytes_sent = sum(message.hi - message.lo for step in self._steps for message in step.sends)
        self.messages = sum(len(step.sends) for step in self._steps)
        self._kept: tuple[tuple[object, object], list[Bound], np.ndarray] | None = None

    def kept(self, operation: Operation) -> tuple[list[Bound], np.ndarray]:
        """The rounds of ``operation`` on a vector that is the plan's own, bound when they are first asked for."""
        does = operation.combine, operation.finish
        if self._kept is None or self._kept[0] != does:
            vector, scratch = np.empty(self._count, self._dtype), np.empty(self.scratch_bytes, np.uint8)
            self._kept = does, list(self.bind(vector, scratch, operation)), vector
        return self._kept[1:]

    def bind(self, vector: np.ndarray, scratch: np.ndarray, operation: Operation) -> Iterator[Bound]:
        """The rounds of ``operation`` on ``vector`` (one-dimensional, contiguous), which ends with the result.

        ``scratch`` (uint8) has at least ``scratch_bytes`` elements, left with arbitrary contents.
        """
        if vector.shape != (self._count,) or vector.dtype != self._dtype:
            raise ValueError(f"planned for {self._count} x {self._dtype}, got {vector.shape} x {vector.dtype}")
        own = [scratch[lo:hi] for lo, hi in self._areas]
        arrays = [area.view(self._carried) for area in own]
        bytes_of = [area.data for area in own]
        caller = vector.view(np.uint8).data
        if self._widens:  # ..., landing, result: so that _RESULT and _LANDING count from the end
            arrays.insert(len(arrays) - 1, vector)
            bytes_of.insert(len(bytes_of) - 1, caller)
        else:
            arrays.insert(0, vector)
            bytes_of.insert(0, caller)
        p = self._schedule.p
        for recvs, sends, moves, reductions, shares in self._steps:
            yield Bound(
                [(bytes_of[area][lo:hi], peer) for area, lo, hi, peer in recvs],
                [(bytes_of[area][lo:hi], peer) for area, lo, hi, peer in sends],
                [self._bound_move(arrays, move) for move in moves] if moves else [],
                [self._bound_reduction(arrays, reduction) for reduction in reductions],
                vector,
                [(arrays[area][lo : lo + self._count], weight) for area, lo, weight in shares],
                operation,
                p,
            )

    @staticmethod
    def _bound_move(arrays: list[np.ndarray], move: _Move) -> tuple[np.ndarray, np.ndarray, bool]:
        source = arrays[move.source][move.lo : move.hi]
        same = (move.source, move.lo) == (move.target, move.target_lo)
        target = source if same else arrays[move.target][move.target_lo : move.target_lo + move.hi - move.lo]
        return target, source, move.finish

    @staticmethod
    def _bound_reduction(arrays: list[np.ndarray], reduction: _Reduction) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        area, lo, hi, landing_lo, landing_hi, verb = reduction
        mine, arrived = arrays[area][lo:hi], arrays[_LANDING][landing_lo:landing_hi]
        return (arrived, mine, mine) if verb is Verb.REDUCE_BELOW else (mine, arrived, mine)

    def _compile(self) -> Iterator[_Step]:
        if self._widens:
            yield _Step([], [], [_Move(_RESULT, 0, self._count, 0, 0)], [], [])
        for round_ in self._schedule.rounds(self._rank):
            yield self._compile_round(round_)
        if self._widens:
            yield _Step([], [], self._finishing(0, self._schedule.chunks), [], [])
        elif self._finishes and self._count:
            yield _Step([], [], [_Move(0, 0, self._count, 0, 0, finish=True)], [], [])

    def _compile_round(self, round_: Round) -> _Step:
        rank, chunks = self._rank, self._schedule.chunks
        step = _Step([], [], [], [], [])

        # Messages of a round to one peer need no tags: MPI keeps their order.
        def post(messages: list[_Message], area: int, lo: int, hi: int, peer: int) -> None:
            size = (self._dtype if area == _RESULT else self._carried).itemsize
            for start in range(lo * size, hi * size, MAX_MESSAGE):
                messages.append(_Message(area, start, min(start + MAX_MESSAGE, hi * size), peer))

        for send in round_.sends:
            if send.peer == rank:
                continue
            area = send.buffer
            if send.final and self._widens:
                area = _RESULT
                for lo, hi in pieces(send.lo, send.hi, chunks):
                    step.moves.extend(self._finishing(lo, hi))
            for lo, hi in self._elements(send):
                post(step.sends, area, lo, hi, send.peer)

        to_self = iter([send for send in round_.sends if send.peer == rank])
        landed = 0
        for recv in round_.recvs:
            source = next(to_self) if recv.peer == rank else None
            arrives_final = self._widens and source is None and is_final(recv)
            if arrives_final:
                for lo, hi in pieces(recv.lo, recv.hi, chunks):
                    self._unfinished[lo:hi] = False
            for lo, hi in self._elements(recv):
                area, start = _RESULT if arrives_final else recv.buffer, lo
                if recv.verb is Verb.MIX:
                    if source is not None:  # its own share is mixed where it is
                        step.shares.append((source.buffer, lo, recv.weight))
                        continue
                    area, start, landed = _LANDING, landed, landed + hi - lo
                    step.shares.append((area, start, recv.weight))
                elif recv.verb is not Verb.COPY:
                    area, start, landed = _LANDING, landed, landed + hi - lo
                    step.reductions.append(_Reduction(recv.buffer, lo, hi, start, landed, recv.verb))
                if source is None:
                    post(step.recvs, area, start, start + hi - lo, recv.peer)
                else:
                    step.moves.append(_Move(source.buffer, lo, hi, area, start))
        self._landing_size = max(self._landing_size, landed)
        return step

    def _finishing(self, lo: int, hi: int) -> list[_Move]:
        """Moves that bring the results of chunks [lo, hi) to the caller's vector, rounded, unless they are there."""
        moves: list[_Move] = []
        for chunk in (lo + np.flatnonzero(self._unfinished[lo:hi])).tolist():
            start, stop = self._start(chunk), self._start(chunk + 1)
            if moves and moves[-1].hi == start:
                moves[-1] = moves[-1]._replace(hi=stop)
            elif start < stop:
                moves.append(_Move(0, start, stop, _RESULT, start, finish=True))
        self._unfinished[lo:hi] = False
        return moves

    def _elements(self, part: Send | Recv) -> Iterator[tuple[int, int]]:
        """The element ranges of a transfer that are not empty."""
        for lo, hi in pieces(part.lo, part.hi, self._schedule.chunks):
            start, stop = self._start(lo), self._start(hi)
            if start < stop:
                yield start, stop

    def _start(self, chunk: int) -> int:
        if self._cuts is not None:
            return self._cuts[chunk]
        return chunk_start(self._count, chunk, self._schedule.chunks)
