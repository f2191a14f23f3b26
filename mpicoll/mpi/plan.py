"""A schedule compiled for one rank, one length and one dtype: run it on any vector of that kind.

Compiling turns chunks into byte ranges, once; running binds the caller's vector and scratch memory with views.  A
plan holds no memory proportional to the vector, and no pointer to anything of the caller's.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from mpi4py import MPI

from ..schedule import Recv, Round, Schedule, Send, Verb, chunk_start, pieces

MAX_MESSAGE = 2**30
"""Bytes.  Longer pieces travel as several messages: MPI counts are often 32-bit integers."""

_LANDING = -1  # where data to be reduced arrive: the last of the plan's arrays


class _Message(NamedTuple):
    buffer: int
    lo: int  # bytes
    hi: int
    peer: int


class _Reduction(NamedTuple):
    buffer: int
    lo: int  # elements
    hi: int
    landing_lo: int
    landing_hi: int
    verb: Verb


class _Move(NamedTuple):
    source: int
    source_lo: int  # bytes
    source_hi: int
    target: int
    target_lo: int


class _Step(NamedTuple):
    """One round, compiled: do ``moves``, exchange ``recvs`` and ``sends``, do ``reductions``."""

    recvs: list[_Message]
    sends: list[_Message]
    moves: list[_Move]
    reductions: list[_Reduction]


class Plan:
    """The part of ``rank`` in ``schedule``, for vectors of ``count`` elements of ``dtype``.

    ``bytes_sent`` is the payload of the rank's sends in one run, ``scratch_bytes`` the memory it needs meanwhile.
    """

    def __init__(self, schedule: Schedule, rank: int, count: int, dtype: np.dtype) -> None:
        self._schedule, self._rank = schedule, rank
        self._count, self._dtype = count, np.dtype(dtype)
        self._landing_size = 0
        self._steps = [step for step in (self._compile(round_) for round_ in schedule.rounds(rank)) if any(step)]
        # The scratch vectors, then what lands to be reduced, each on a cache line of its own.
        sizes = [count] * schedule.scratch + [self._landing_size]
        self._areas, end = [], 0
        for elements in sizes:
            self._areas.append((end, end + elements * self._dtype.itemsize))
            end = -(-self._areas[-1][1] // 64) * 64
        self.scratch_bytes = end
        self.bytes_sent = sum(message.hi - message.lo for step in self._steps for message in step.sends)

    def run(self, comm: MPI.Intracomm, vector: np.ndarray, op: np.ufunc, scratch: np.ndarray) -> None:
        """Do it to ``vector`` (one-dimensional, contiguous), in place; ``op`` is what reducing means.

        ``comm`` must carry no other messages that could be mistaken for the plan's.  ``scratch`` (uint8) has at least
        ``scratch_bytes`` elements, left with arbitrary contents.
        """
        if (comm.size, comm.rank) != (self._schedule.p, self._rank):
            raise ValueError(f"{self._schedule}: planned for rank {self._rank}, got rank {comm.rank} of {comm.size}")
        if vector.shape != (self._count,) or vector.dtype != self._dtype:
            raise ValueError(f"planned for {self._count} x {self._dtype}, got {vector.shape} x {vector.dtype}")
        arrays = [vector, *(scratch[lo:hi].view(self._dtype) for lo, hi in self._areas)]
        raw = [vector.view(np.uint8).data, *(scratch.data[lo:hi] for lo, hi in self._areas)]
        isend, irecv, sendrecv = comm.Isend, comm.Irecv, comm.Sendrecv
        with np.errstate(all="ignore"):  # like MPI's own reductions; raising here would leave messages under way
            for recvs, sends, moves, reductions in self._steps:
                for source, lo, hi, target, to in moves:
                    raw[target][to : to + hi - lo] = raw[source][lo:hi]
                if len(recvs) == len(sends) == 1:  # one call: small messages cost what the calls cost
                    (into, lo, hi, source), (out, first, last, dest) = recvs[0], sends[0]
                    sendrecv((raw[out][first:last], MPI.BYTE), dest, 0, (raw[into][lo:hi], MPI.BYTE), source, 0)
                else:
                    requests = [irecv((raw[buffer][lo:hi], MPI.BYTE), peer, 0) for buffer, lo, hi, peer in recvs]
                    requests += [isend((raw[buffer][lo:hi], MPI.BYTE), peer, 0) for buffer, lo, hi, peer in sends]
                    MPI.Request.Waitall(requests)
                for buffer, lo, hi, landing_lo, landing_hi, verb in reductions:
                    mine, arrived = arrays[buffer][lo:hi], arrays[_LANDING][landing_lo:landing_hi]
                    if verb is Verb.REDUCE_BELOW:
                        op(arrived, mine, out=mine)
                    else:
                        op(mine, arrived, out=mine)

    def _compile(self, round_: Round) -> _Step:
        rank, size = self._rank, self._dtype.itemsize
        step = _Step([], [], [], [])

        # Messages of a round to one peer need no tags: MPI keeps their order.
        def post(messages: list[_Message], buffer: int, lo: int, hi: int, peer: int) -> None:
            for start in range(lo * size, hi * size, MAX_MESSAGE):
                messages.append(_Message(buffer, start, min(start + MAX_MESSAGE, hi * size), peer))

        for send in round_.sends:
            if send.peer != rank:
                for lo, hi in self._elements(send):
                    post(step.sends, send.buffer, lo, hi, send.peer)

        to_self = iter([send for send in round_.sends if send.peer == rank])
        landed = 0
        for recv in round_.recvs:
            source = next(to_self) if recv.peer == rank else None
            for lo, hi in self._elements(recv):
                buffer, start = recv.buffer, lo
                if recv.verb is not Verb.COPY:
                    buffer, start, landed = _LANDING, landed, landed + hi - lo
                    step.reductions.append(_Reduction(recv.buffer, lo, hi, start, landed, recv.verb))
                if source is None:
                    post(step.recvs, buffer, start, start + hi - lo, recv.peer)
                else:
                    step.moves.append(_Move(source.buffer, lo * size, hi * size, buffer, start * size))
        self._landing_size = max(self._landing_size, landed)
        return step

    def _elements(self, part: Send | Recv) -> Iterator[tuple[int, int]]:
        """The element ranges of a transfer that are not empty."""
        chunks = self._schedule.chunks
        for lo, hi in pieces(part.lo, part.hi, chunks):
            start, stop = chunk_start(self._count, lo, chunks), chunk_start(self._count, hi, chunks)
            if start < stop:
                yield start, stop
