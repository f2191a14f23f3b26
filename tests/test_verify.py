from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from typing import NamedTuple, TypeVar

import numpy as np
import pytest

from mpicoll.algorithms import ALGORITHMS
from mpicoll.cli.verify import variants
from mpicoll.interpreter import interpret_arrays, lockstep
from mpicoll.schedule import Recv, Round, Schedule, ScheduleError, Send, Verb
from mpicoll.verify import mixing_matrix, verify_algorithm, verify_schedule
from schedules import assert_promised, census, everyone, exchange, fold_tree_reduce

ROWS = [row for rows in ALGORITHMS.values() for row in rows.values()]
Table = list[list[Round]]  # [rank][t]
Part = TypeVar("Part", Send, Recv)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.name}-{row.collective}")
def test_every_row_is_proved_with_all_its_roots_and_segments(row):
    """For some numbers of ranks; ``mpicoll verify``, which continuous integration runs, for all from 1 to 64."""
    orders = set()
    for p in (*range(1, 18), 31, 32, 33, 64):
        for given in variants(row, p):
            proof = verify_algorithm(row, p, **given)
            orders.add((proof.rank_order, proof.canonical))
            assert proof.exact == (row.collective == "mix" and row.exact(p))
    # The table claims neither too much (verified above) nor too little.
    if row.reduces:
        found = tuple(all(held) for held in zip(*orders, strict=True))
        assert found == (row.rank_order, row.canonical)


@pytest.mark.parametrize("p", [*range(1, 9), 13, 16, 31])
def test_roots_idle_ranks_and_rank_order(p):
    for root in {0, 1 % p, p - 1}:
        proof = verify_schedule(fold_tree_reduce(p, root))
        assert proof.rank_order
        assert proof.rounds == (p - 1).bit_length() + bool(root)


def test_scratch_and_moves_within_a_rank():
    assert verify_schedule(census(1)).scratch == 0
    via_scratch = Schedule(
        "reduce",
        "via_scratch",
        2,
        1,
        lambda rank: [
            Round((Send(0, 0, 1),)) if rank else Round(recvs=(Recv(1, 0, 1, Verb.COPY, 1),)),
            Round() if rank else Round((Send(0, 0, 1, 1),), (Recv(0, 0, 1, Verb.REDUCE_ABOVE),)),
        ],
        scratch=1,
    )
    proof = verify_schedule(via_scratch)
    assert proof.scratch == 2  # the scratch vector, and where the move to oneself lands
    assert proof.rounds == 1  # which is no message
    for p in [2, 3, 5, 6, 7, 8, 13]:  # right on every rank, but added in another order on each
        with pytest.raises(ScheduleError, match="in different orders, so that they may end with different bits"):
            verify_schedule(census(p))


@pytest.mark.parametrize("p", [1, 2, 4, 8, 16])
def test_both_partners_of_an_exchange_compute_the_same_bits(p):
    assert verify_schedule(exchange(p)).rank_order
    if p > 1:
        wrong = _table(exchange(p))
        first = wrong[0][0]
        wrong[0][0] = first._replace(recvs=(first.recvs[0]._replace(verb=Verb.REDUCE_BELOW),))
        with pytest.raises(ScheduleError, match="different bits"):
            verify_schedule(_from_table(exchange(p), wrong))


def test_several_reductions_into_a_chunk_are_combined_as_listed():
    assert verify_schedule(everyone(2)).scratch == 1  # both chunks land beside the vector
    with pytest.raises(ScheduleError, match="different bits"):
        verify_schedule(everyone(3))


def test_circulant_at_4096_ranks_builds_one_rank_in_logarithmic_rounds():
    rounds = list(ALGORITHMS["allreduce"]["circulant"].schedule(4096).rounds(1234))
    assert len(rounds) == 24
    assert all(len(round_.sends) == len(round_.recvs) == 1 for round_ in rounds)


# Every check, failing.


def _mixed(*rows: list[float]) -> Schedule:
    """A round of mixing by this matrix, zeros left out."""
    p = len(rows)
    return _schedule(
        p,
        {
            rank: Round(
                tuple(Send(peer, 0, 1) for peer in range(p) if rows[peer][rank]),
                tuple(Recv(peer, 0, 1, Verb.MIX, weight=rows[rank][peer]) for peer in range(p) if rows[rank][peer]),
            )
            for rank in range(p)
        },
        collective="mix",
    )


def _schedule(p: int, *rounds: dict[int, Round], chunks: int = 1, collective: str = "allreduce") -> Schedule:
    return Schedule(collective, "wrong", p, chunks, lambda rank: [round_.get(rank, Round()) for round_ in rounds])


SWAP = {0: Round((Send(1, 0, 1),), (Recv(1, 0, 1),)), 1: Round((Send(0, 0, 1),), (Recv(0, 0, 1),))}
GIVE = {0: Round((Send(1, 0, 1),)), 1: Round(recvs=(Recv(0, 0, 1, Verb.REDUCE_BELOW),))}
BOTH = Round((Send(1, 0, 1), Send(1, 1, 2)))
TAKE = Round((Send(0, 1, 2), Send(0, 0, 1)), (Recv(0, 0, 1), Recv(0, 1, 2)))
WRONG = {
    r"rank 1 copies chunks \[0\] onto what it sends": _schedule(2, {0: BOTH, 1: TAKE}, chunks=2),
    "has 0 chunks": _schedule(2, chunks=0),
    "needs at least one rank": _schedule(0),
    "and root 2": replace(_schedule(2, collective="reduce"), root=2),
    "and root -1": replace(_schedule(2, collective="reduce"), root=-1),
    "3 chunks cannot be owned equally by 2 ranks": _schedule(2, chunks=3, collective="reduce_scatter"),
    "rank 1 ends chunk 2 with rank 0's contribution counted 0 times": _schedule(
        2,
        {
            0: Round((Send(1, 3, 4),), (Recv(1, 0, 2, Verb.REDUCE_ABOVE),)),
            1: Round((Send(0, 0, 2),), (Recv(0, 3, 4, Verb.REDUCE_BELOW),)),
        },
        chunks=4,
        collective="reduce_scatter",
    ),
    "names rank 2; there are 2": _schedule(2, {0: Round((Send(2, 0, 1),))}),
    "names buffer 1; there are 1": _schedule(2, {0: Round((Send(1, 0, 1, 1),))}),
    r"names chunks \[0, 2\) of 1": _schedule(2, {0: Round((Send(1, 0, 2),))}),
    r"names chunks \[1, 1\) of 2": _schedule(2, {0: Round((Send(1, 1, 1),))}, chunks=2),
    "has 3 Sends with rank 1; two are allowed": _schedule(
        2, {0: Round(tuple(Send(1, c, c + 1) for c in range(3)))}, chunks=3
    ),
    r"rank 1 waits for chunks \[0\] from rank 0 .*deadlock": _schedule(2, {1: GIVE[1]}),
    r"rank 0 sends chunks \[0\] to rank 1, which does not receive them: deadlock": _schedule(2, {0: GIVE[0]}),
    r"expects chunks \[1\], rank 0 sends \[0\]": _schedule(2, {0: GIVE[0], 1: Round(recvs=(Recv(0, 1, 2),))}, chunks=2),
    r"copies chunks \[0\] onto what it sends": _schedule(2, SWAP),
    "copies onto chunk 0 and writes it a second time": _schedule(
        3, {0: Round(recvs=(Recv(1, 0, 1), Recv(2, 0, 1))), 1: Round((Send(0, 0, 1),)), 2: Round((Send(0, 0, 1),))}
    ),
    "rank 0 ends chunk 0 with rank 1's contribution counted 0 times, not 1": _schedule(2, GIVE),
    "rank 1 ends chunk 0 with rank 0's contribution counted 2 times, not 1": replace(
        _schedule(2, GIVE, GIVE, collective="reduce"), root=1
    ),
    "one side is empty": _schedule(
        2, {0: Round((Send(1, 1, 2, final=True),)), 1: Round(recvs=(Recv(0, 1, 2),))}, chunks=2, collective="allgather"
    ),
    r"rank 1 takes chunks \[0\] as final, rank 0 sends them as partial": _schedule(
        2, {0: GIVE[0], 1: Round(recvs=(Recv(0, 0, 1),))}
    ),
    r"rank 1 takes chunks \[0\] as partial, rank 0 sends them as final": _schedule(
        2, {0: Round((Send(1, 0, 1, final=True),)), 1: GIVE[1]}
    ),
    "a copy of chunk 0 travels as final before all has been added to it": _schedule(
        3,
        {1: Round((Send(0, 0, 1),)), 0: Round(recvs=(Recv(1, 0, 1, Verb.REDUCE_ABOVE),))},
        {2: Round((Send(1, 0, 1, final=True),)), 1: Round(recvs=(Recv(2, 0, 1),))},
        {1: Round((Send(0, 0, 1),)), 0: Round(recvs=(Recv(1, 0, 1, Verb.REDUCE_ABOVE),))},
        collective="reduce",
    ),
    r"rank 0 takes chunks \[0\] as partial, rank 0 sends them as final": _schedule(
        2, {0: Round((Send(0, 0, 1, 0, True),), (Recv(0, 0, 1, Verb.REDUCE_ABOVE),))}
    ),
    "round 0: row 0 of the matrix adds up to 1.25: the mean is not kept": _mixed([0.75, 0.5], [0.25, 0.5]),
    "column 0 of the matrix adds up to 0.5: the mean is not kept": _mixed([0.5, 0.5], [0, 1]),
    "a share of rank 1's is negative, or none": _mixed([1.5, -0.5], [-0.5, 1.5]),
    "a share of rank 0's is negative, or none": _mixed([float("nan"), 0.5], [0.5, 0.5]),
    "rank 0 receives to mix, in a schedule for allreduce": _schedule(
        2, {0: Round((Send(0, 0, 1),), (Recv(0, 0, 1, Verb.MIX),)), 1: GIVE[0]}
    ),
    "rank 1 receives to reduce below, in a schedule for mix": _schedule(2, GIVE, collective="mix"),
    "whole vectors are mixed, but it has 2 chunks": _schedule(2, chunks=2, collective="mix"),
}


def test_what_mixing_does_is_a_matrix():
    rows = [[0.5, 0, 0.5], [0.5, 0.5, 0], [0, 0.5, 0.5]]
    np.testing.assert_array_equal(mixing_matrix(_mixed(*rows)), rows)
    proof = verify_schedule(_mixed(*rows))
    assert (proof.rounds, proof.sent, proof.scratch, proof.exact) == (1, 1, 1, False)
    assert verify_schedule(_mixed([0.5, 0.5], [0.5, 0.5])).exact


@pytest.mark.parametrize("message", WRONG)
def test_a_wrong_schedule_is_refused_with_a_reason(message):
    schedule = WRONG[message]
    with pytest.raises(ScheduleError, match=message):
        verify_schedule(schedule)


def test_ranks_that_disagree_on_the_number_of_rounds_are_refused():
    with pytest.raises(ScheduleError, match="rank 1 has 1 rounds, rank 0 has 0"):
        verify_schedule(Schedule("allreduce", "wrong", 2, 1, lambda rank: [Round()] * rank))


def test_a_table_that_promises_too_little_or_too_much_is_refused():
    row = ALGORITHMS["allreduce"]["ring"]
    with pytest.raises(ScheduleError, match="6 rounds, the table states 5"):
        verify_algorithm(replace(row, rounds=lambda p: 5), 4)
    with pytest.raises(ScheduleError, match="sends 3/2 of the vector, the table states 1"):
        verify_algorithm(replace(row, sent=lambda p: Fraction(1)), 4)
    with pytest.raises(ScheduleError, match="3/4 of the vector, the table states 1"):
        verify_algorithm(replace(row, added=lambda p: Fraction(1)), 4)
    with pytest.raises(ScheduleError, match="operands do not stand in rank order, the table states they do"):
        verify_algorithm(replace(row, rank_order=True), 4)
    with pytest.raises(ScheduleError, match="not those of the canonical tree, the table states they are"):
        verify_algorithm(replace(row, canonical=True), 4)
    with pytest.raises(ScheduleError, match="ring mix, p=4: does not end with the mean, the table states it does"):
        verify_algorithm(replace(ALGORITHMS["mix"]["ring"], exact=lambda p: True), 4)
    with pytest.raises(ValueError, match="no goal is stated for 'guess'"):
        verify_schedule(_schedule(2, collective="guess"))


# Mutants: everything that can go wrong with one transfer, or with the order of two rounds.


def _table(schedule: Schedule) -> Table:
    return [list(rounds) for rounds in zip(*lockstep(schedule), strict=True)] or [[] for _ in range(schedule.p)]


def _from_table(schedule: Schedule, table: Table) -> Schedule:
    return replace(schedule, rounds=lambda rank: table[rank])


class Site(NamedTuple):
    """One transfer of a table: where it stands, and both its sides."""

    table: Table
    t: int
    src: int
    send: Send
    recv: Recv

    def changed(self, sends: dict[int, tuple[Send, ...]], recvs: dict[int, tuple[Recv, ...]]) -> Table:
        """The table with these {rank: parts} in place of the transfer's two sides."""
        table = [list(rounds) for rounds in self.table]
        t, (before, after) = self.t, (table[self.src], table[self.send.peer])
        before[t] = before[t]._replace(sends=_without(before[t].sends, self.send))
        after[t] = after[t]._replace(recvs=_without(after[t].recvs, self.recv))
        for rank, new_sends in sends.items():
            table[rank][t] = table[rank][t]._replace(sends=table[rank][t].sends + new_sends)
        for rank, new_recvs in recvs.items():
            table[rank][t] = table[rank][t]._replace(recvs=table[rank][t].recvs + new_recvs)
        return table


def _without(parts: tuple[Part, ...], part: Part) -> tuple[Part, ...]:
    at = parts.index(part)
    return parts[:at] + parts[at + 1 :]


def _sites(table: Table) -> Iterator[Site]:
    for t in range(len(table[0])):
        for src, rounds in enumerate(table):
            for send in rounds[t].sends:
                there = table[send.peer][t].recvs
                recv = next(recv for recv in there if (recv.peer, recv.lo, recv.hi) == (src, send.lo, send.hi))
                yield Site(table, t, src, send, recv)


def _mutants(schedule: Schedule) -> Iterator[tuple[str, Table]]:
    """Each transfer dropped, duplicated, redirected, of other chunks, with another verb, on both sides (so that it is
    still well matched) and on one side only; and each two neighboring rounds swapped, on all ranks and on one."""
    p, chunks = schedule.p, schedule.chunks
    original = _table(schedule)
    for site in _sites(original):
        _, t, src, send, recv = site
        dst = send.peer

        def both(sends: tuple[Send, ...], recvs: tuple[Recv, ...], site: Site = site) -> Table:
            return site.changed({site.src: sends}, {site.send.peer: recvs})

        where = f"round {t}, {src} to {dst}, chunks {send.lo}..{send.hi}:"
        yield f"{where} dropped", both((), ())
        yield f"{where} not sent", both((), (recv,))
        yield f"{where} not received", both((send,), ())
        yield f"{where} twice", both((send, send), (recv, recv))
        yield f"{where} sent twice", both((send, send), (recv,))
        yield f"{where} received twice", both((send,), (recv, recv))
        for verb in Verb:
            if verb is not recv.verb:
                yield f"{where} {verb.value}", both((send,), (recv._replace(verb=verb),))
        yield f"{where} sent as final or not", both((send._replace(final=not send.final),), (recv,))
        shifted = (send.lo + 1) % chunks
        for lo, hi in {(shifted, shifted + send.hi - send.lo), (send.lo, send.hi + 1), (send.lo, send.hi - 1)}:
            other_send, other_recv = send._replace(lo=lo, hi=hi), recv._replace(lo=lo, hi=hi)
            yield f"{where} as {lo}..{hi}", both((other_send,), (other_recv,))
            yield f"{where} sent as {lo}..{hi}", both((other_send,), (recv,))
        for peer in {(src + 1) % p, dst} - {src}:
            yield f"{where} received from {peer}", both((send,), (recv._replace(peer=peer),))
        for peer in {(dst + 1) % p, src} - {dst}:
            there = send._replace(peer=peer)
            yield f"{where} sent to {peer}", both((there,), (recv,))
            yield f"{where} redirected to {peer}", site.changed({src: (there,)}, {peer: (recv,)})
        if len(recv_list := original[dst][t].recvs) > 1:
            swapped_recvs = [list(rounds) for rounds in original]
            swapped_recvs[dst][t] = original[dst][t]._replace(recvs=recv_list[::-1])
            yield f"{where} receives in reverse", swapped_recvs
    for t in range(len(original[0]) - 1):
        swapped = [[*rounds[:t], rounds[t + 1], rounds[t], *rounds[t + 2 :]] for rounds in original]
        yield f"rounds {t} and {t + 1} swapped", swapped
        for rank in range(p):
            one = [swapped[rank] if rank == other else rounds for other, rounds in enumerate(original)]
            yield f"rounds {t} and {t + 1} swapped on rank {rank}", one


@pytest.mark.parametrize("p", range(2, 9))
@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.name}-{row.collective}")
def test_every_mutant_is_refused_or_equivalent(row, p):
    """An accepted mutant must compute what the original does, as far as promised, for inputs that tell all counts."""
    given = {"root": p // 2} if "root" in row.parameters else {}
    given |= {"segments": 2} if "segments" in row.parameters else {}
    schedule = row.schedule(p, **given)
    vectors = [np.full(3 * p + 1, 100.0**rank) + np.arange(3 * p + 1) for rank in range(p)]
    refused = accepted = 0
    for what, table in _mutants(schedule):
        mutant = _from_table(schedule, table)
        try:
            verify_schedule(mutant)
        except ScheduleError:
            refused += 1
            continue
        accepted += 1
        assert not what.endswith(("not sent", "not received", "sent twice", "received twice", "final or not"))
        assert not what.endswith("dropped") or not row.reduces
        if row.collective != "mix" or not what.endswith("swapped"):  # rounds of mixing keep the mean in any order
            assert_promised(schedule, vectors, interpret_arrays(mutant, vectors, np.add), what)
    assert refused > accepted
