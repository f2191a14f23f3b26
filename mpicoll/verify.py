"""Proof that a schedule is right, for a given p: runs it on expressions, and counts.

Each rank starts with a symbol of its own; reducing builds the expression op(lower, higher).  At the end the
expressions tell which contributions arrived *and how often* (a set of marks would let one counted twice pass),
whether all ranks hold the same bits (they do if and only if they hold the same expression), and whether
the operands stand in rank order, so that the operation need not commute.

Mixing needs no symbols: run on the unit vectors, it gives its matrix.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import numpy as np

from .algorithms import Algorithm
from .collective import COLLECTIVES
from .interpreter import interpret, lockstep, span
from .schedule import Recv, Round, Schedule, ScheduleError, Send, Verb, pieces

TOLERANCE = 1e-12  # of the sums and products of mixing weights


@dataclass(frozen=True)
class Proof:
    """The outcome of a proof: the costs, and the order of the additions."""

    rounds: int
    sent: Fraction  # the most any rank sends, as a fraction of the vector
    added: Fraction  # the most that any rank reduces, likewise
    scratch: Fraction  # the most any rank needs beside the vector
    rank_order: bool  # the operands stand in rank order: the operation need not commute
    canonical: bool  # the additions are those of the canonical tree
    exact: bool = False  # mixing ends with the mean itself


class _Expressions:
    """Interned expressions: equal numbers if and only if equal expressions."""

    def __init__(self, p: int) -> None:
        self.counts = list(np.eye(p, dtype=np.int32))  # [expression][rank]; leaf r is expression r
        self.reach: list[tuple[int, int] | None] = [(rank, rank) for rank in range(p)]  # ranks first..last in order
        self._known: dict[tuple[int, int], int] = {}

    def combine(self, lower: int, higher: int) -> int:
        if (lower, higher) not in self._known:
            self._known[lower, higher] = len(self.counts)
            self.counts.append(self.counts[lower] + self.counts[higher])
            below, above = self.reach[lower], self.reach[higher]
            in_order = below and above and below[1] + 1 == above[0]
            self.reach.append((below[0], above[1]) if below and above and in_order else None)
        return self._known[lower, higher]

    def canonical(self) -> int:
        """The expression of the canonical order over all ranks.

        With q the largest power of two in p, the first 2(p - q) ranks are combined in pairs, then neighbors, pairs of
        neighbors, and so on.
        """
        p = len(self.counts[0])
        q = 1 << (p.bit_length() - 1)
        pairs = p - q
        level = [self.combine(2 * n, 2 * n + 1) for n in range(pairs)] + list(range(2 * pairs, p))
        while len(level) > 1:
            level = [self.combine(level[n], level[n + 1]) for n in range(0, len(level), 2)]
        return level[0]


def verify_schedule(schedule: Schedule) -> Proof:
    """Prove that ``schedule`` does what its collective promises; ``ScheduleError`` says where it does not."""
    row = COLLECTIVES.get(schedule.collective)
    if row is None and not schedule.mixes:
        raise ValueError(f"no goal is stated for {schedule.collective!r}: expected mix, {', '.join(COLLECTIVES)}")
    if schedule.p < 1 or schedule.chunks < 1 or not 0 <= schedule.root < schedule.p:
        raise ScheduleError(
            f"{schedule}: needs at least one rank and one chunk, and a root among the ranks; "
            f"has {schedule.chunks} chunks and root {schedule.root}"
        )
    if schedule.mixes and schedule.chunks != 1:
        raise ScheduleError(f"{schedule}: whole vectors are mixed, but it has {schedule.chunks} chunks")
    if row and row.parted and schedule.chunks % schedule.p:
        raise ScheduleError(f"{schedule}: {schedule.chunks} chunks cannot be owned equally by {schedule.p} ranks")
    table = lockstep(schedule)
    for t, rounds in enumerate(table):
        for rank, round_ in enumerate(rounds):
            _check_round(schedule, f"{schedule}, round {t}: rank {rank}", round_)
    if row is None:
        return _verify_mixing(schedule, table)

    expressions = _Expressions(schedule.p)
    start = own_chunks(schedule, range(schedule.p))
    travelled: set[tuple[int, int]] = set()  # (chunk, value) of every copy
    end = interpret(schedule, start, expressions.combine, lambda chunk, value: travelled.add((chunk, value)))

    first: dict[int, tuple[int, int]] = {}  # chunk -> the first rank that must hold it, and what it holds
    promised: dict[int, np.ndarray] = {}  # owner of a chunk -> how often each rank's contribution must count in it
    canonical, rank_order, in_tree = expressions.canonical(), True, True
    for rank, held in enumerate(end):
        for chunk, value in enumerate(held):
            owner = _owner(schedule, chunk)
            if not row.wants(rank, owner, schedule.root):
                continue
            if owner not in promised:
                ones = [row.contributes(one, owner, schedule.root) for one in range(schedule.p)]
                promised[owner] = np.array(ones, np.int32)
            wanted = promised[owner]
            counts = expressions.counts[value] if value is not None else np.zeros(schedule.p, np.int32)
            for origin in np.flatnonzero(counts != wanted):
                raise ScheduleError(
                    f"{schedule}: rank {rank} ends chunk {chunk} with rank {origin}'s contribution "
                    f"counted {counts[origin]} times, not {wanted[origin]}"
                )
            peer, theirs = first.setdefault(chunk, (rank, value))
            if value != theirs:
                raise ScheduleError(
                    f"{schedule}: ranks {peer} and {rank} add chunk {chunk} in different orders, "
                    "so that they may end with different bits"
                )
            rank_order = rank_order and expressions.reach[value] is not None
            in_tree = in_tree and value == canonical
    for chunk, value in travelled:
        if value != first[chunk][1]:
            raise ScheduleError(f"{schedule}: a copy of chunk {chunk} travels as final before all has been added to it")
    return _measure(schedule, table, rank_order, in_tree)


def own_chunks(schedule: Schedule, marks: Iterable[Any]) -> list[list[Any]]:
    """The initial chunks of each rank for a symbolic run: the rank's own symbol, or ``None`` if it contributes none."""
    row = COLLECTIVES.get(schedule.collective)

    def brings(rank: int, chunk: int) -> bool:
        return row is None or row.has(rank, _owner(schedule, chunk), schedule.root)

    return [
        [mark if brings(rank, chunk) else None for chunk in range(schedule.chunks)] for rank, mark in enumerate(marks)
    ]


def _owner(schedule: Schedule, chunk: int) -> int:
    return chunk * schedule.p // schedule.chunks


def mixing_matrix(schedule: Schedule) -> np.ndarray:
    """The mixing matrix of a schedule: ``[i, j]`` is the weight of rank j's initial vector in rank i's final one."""
    return np.array([mine[0] for mine in interpret(schedule, own_chunks(schedule, np.eye(schedule.p)), np.add)])


def _verify_mixing(schedule: Schedule, table: list[list[Round]]) -> Proof:
    for t, rounds in enumerate(table):  # each by itself: a call does one
        matrix = mixing_matrix(replace(schedule, rounds=lambda rank, rounds=rounds: [rounds[rank]]))  # type: ignore[misc]
        where = f"{schedule}, round {t}"
        if not (matrix >= 0).all():
            raise ScheduleError(f"{where}: a share of rank {np.argwhere(~(matrix >= 0))[0][1]}'s is negative, or none")
        for axis, side in ((1, "row"), (0, "column")):
            sums = matrix.sum(axis=axis)
            for n in np.flatnonzero(~(np.abs(sums - 1) <= TOLERANCE)):
                raise ScheduleError(f"{where}: {side} {n} of the matrix adds up to {sums[n]}: the mean is not kept")
    matrix = mixing_matrix(schedule)
    proof = _measure(schedule, table, False, False)
    return replace(proof, exact=bool(np.abs(matrix - 1 / schedule.p).max() <= TOLERANCE))


def verify_algorithm(algorithm: Algorithm, p: int, **parameters: int) -> Proof:
    """Verify an algorithm for ``p`` ranks: its schedule, and the numbers that the table states about it."""
    schedule = algorithm.schedule(p, **parameters)
    proof = verify_schedule(schedule)
    given = {**algorithm.parameters, **parameters}
    rounds, sent = algorithm.rounds(p, **given), algorithm.sent(p, **given)
    if proof.rounds != rounds:
        raise ScheduleError(f"{schedule}: {proof.rounds} rounds, the table states {rounds}")
    if proof.sent != sent:
        raise ScheduleError(f"{schedule}: sends {proof.sent} of the vector, the table states {sent}")
    if proof.added != (added := algorithm.added(p, **given)):
        raise ScheduleError(f"{schedule}: reduces {proof.added} of the vector, the table states {added}")
    if algorithm.rank_order and not proof.rank_order:
        raise ScheduleError(f"{schedule}: operands do not stand in rank order, the table states they do")
    if algorithm.canonical and not proof.canonical:
        raise ScheduleError(f"{schedule}: the additions are not those of the canonical tree, the table states they are")
    if algorithm.exact(p) and not proof.exact:
        raise ScheduleError(f"{schedule}: does not end with the mean, the table states it does")
    return proof


def _check_round(schedule: Schedule, where: str, round_: Round) -> None:
    """Check one rank's round by itself: ranges, at most two contiguous messages per peer, no conflicting writes."""
    parts: list[Send | Recv] = [*round_.sends, *round_.recvs]
    for part in parts:
        if not 0 <= part.peer < schedule.p:
            raise ScheduleError(f"{where} names rank {part.peer}; there are {schedule.p}")
        if not 0 <= part.buffer <= schedule.scratch:
            raise ScheduleError(f"{where} names buffer {part.buffer}; there are {schedule.scratch + 1}")
        if not (0 <= part.lo < schedule.chunks and 0 < part.hi - part.lo <= schedule.chunks):
            raise ScheduleError(f"{where} names chunks [{part.lo}, {part.hi}) of {schedule.chunks}")
    messages = Counter[tuple[type, int]]()
    for part in parts:
        messages[type(part), part.peer] += len(pieces(part.lo, part.hi, schedule.chunks))
    for (kind, peer), count in messages.items():
        if count > 2:
            raise ScheduleError(f"{where} has {count} {kind.__name__}s with rank {peer}; two are allowed")

    sent = {place for send in round_.sends for place in _places(schedule, send)}
    written: dict[tuple[int, int], list[Verb]] = {}
    for recv in round_.recvs:
        for place in _places(schedule, recv):
            written.setdefault(place, []).append(recv.verb)
    for (_, chunk), verbs in written.items():
        if Verb.COPY in verbs and len(verbs) > 1:
            raise ScheduleError(f"{where} copies onto chunk {chunk} and writes it a second time in the same round")
    for recv in round_.recvs:
        if (recv.verb is Verb.MIX) != schedule.mixes:
            raise ScheduleError(f"{where} receives to {recv.verb.value}, in a schedule for {schedule.collective}")
        if recv.verb is Verb.COPY and not sent.isdisjoint(_places(schedule, recv)):
            raise ScheduleError(f"{where} copies chunks {span(schedule, recv)} onto what it sends in the same round")


def _places(schedule: Schedule, part: Send | Recv) -> list[tuple[int, int]]:
    return [(part.buffer, chunk % schedule.chunks) for chunk in range(part.lo, part.hi)]


def _measure(schedule: Schedule, table: list[list[Round]], rank_order: bool, canonical: bool) -> Proof:
    """Measure the rounds with a message, and the largest chunk counts of any rank; all chunks count as equally long."""
    sent, added, scratch = ([0] * schedule.p for _ in range(3))
    busy = 0
    for rank in range(schedule.p):
        own = {place for rounds in table for recv in rounds[rank].recvs for place in _places(schedule, recv)}
        scratch[rank] = sum(buffer > 0 for buffer, _ in own)
        scratch[rank] += max((_landing(rank, rounds[rank]) for rounds in table), default=0)
    for rounds in table:
        messages = [(rank, send) for rank, round_ in enumerate(rounds) for send in round_.sends if send.peer != rank]
        busy += bool(messages)
        for rank, send in messages:
            sent[rank] += send.hi - send.lo
        for rank, round_ in enumerate(rounds):
            added[rank] += sum(
                recv.hi - recv.lo for recv in round_.recvs if recv.verb in (Verb.REDUCE_BELOW, Verb.REDUCE_ABOVE)
            )
    most = [Fraction(max(chunks), schedule.chunks) for chunks in (sent, added, scratch)]
    return Proof(busy, most[0], most[1], most[2], rank_order, canonical)


def _landing(rank: int, round_: Round) -> int:
    """The number of chunks that arrive to be reduced or mixed, and are received into scratch."""
    return sum(recv.hi - recv.lo for recv in round_.recvs if recv.verb is not Verb.COPY and not _stays(rank, recv))


def _stays(rank: int, recv: Recv) -> bool:
    """Whether a receive is a rank's own share in mixing, which is not moved."""
    return recv.verb is Verb.MIX and recv.peer == rank
