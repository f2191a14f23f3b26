"""Schedules that only tests use, and what any schedule promises."""

from collections.abc import Iterator

import numpy as np

from mpicoll.graphs import graph
from mpicoll.schedule import Recv, Round, Schedule, Send, Verb, chunk_start, reduce


def fold_tree_reduce(p: int, root: int) -> Schedule:
    """Binomial tree in absolute ranks, any p, then one hop to the root: idle ranks, a root, one chunk."""

    def rounds(rank: int) -> Iterator[Round]:
        distance = 1
        while distance < p:
            if rank % (2 * distance) == distance:
                yield Round(sends=(Send(rank - distance, 0, 1),))
            elif rank % (2 * distance) == 0 and rank + distance < p:
                yield Round(recvs=(reduce(rank, rank + distance, 0, 1),))
            else:
                yield Round()
            distance *= 2
        if root and rank in (0, root):
            yield Round(sends=(Send(root, 0, 1, final=True),)) if rank == 0 else Round(recvs=(Recv(0, 0, 1),))
        elif root:
            yield Round()

    return Schedule("reduce", "fold_tree", p, 1, rounds, root=root)


def census(p: int) -> Schedule:
    """Bruck and Ho's allreduce: two scratch vectors, moves within a rank, and *different* bits on different ranks.

    Buffer 0 holds mine + the ranks before me, buffer 1 the ranks before me alone, buffer 2 what arrives.
    """

    def rounds(rank: int) -> Iterator[Round]:
        before = 0  # how many ranks before me are in buffer 1
        for bit in bin(p - 1)[2:] if p > 1 else "":
            distance, buffer = (before + 1, 0) if bit == "1" else (before, 1)
            if before == 0 and bit == "0":
                continue
            yield Round(
                (Send((rank + distance) % p, 0, 1, buffer),), (Recv((rank - distance) % p, 0, 1, Verb.COPY, 2),)
            )
            into_before = Verb.REDUCE_BELOW if before else Verb.COPY
            yield Round(
                (Send(rank, 0, 1, 2), Send(rank, 0, 1, 2)),
                (Recv(rank, 0, 1, Verb.REDUCE_BELOW, 0), Recv(rank, 0, 1, into_before, 1)),
            )
            before = 2 * before + (bit == "1")

    return Schedule("allreduce", "census", p, 1, rounds, scratch=2)


def exchange(p: int) -> Schedule:
    """Recursive doubling for p a power of two: both partners send what they reduce into, in rank order."""

    def rounds(rank: int) -> Iterator[Round]:
        distance = 1
        while distance < p:
            peer = rank ^ distance
            yield Round((Send(peer, 0, 1),), (reduce(rank, peer, 0, 1),))
            distance *= 2

    return Schedule("allreduce", "exchange", p, 1, rounds)


def everyone(p: int) -> Schedule:
    """All ranks send all to all, at once: several reductions into one chunk, combined in the order listed."""

    def rounds(rank: int) -> Iterator[Round]:
        below = [Recv(peer, 0, 2, Verb.REDUCE_BELOW) for peer in reversed(range(rank))]
        above = [Recv(peer, 0, 2, Verb.REDUCE_ABOVE) for peer in range(rank + 1, p)]
        yield Round(tuple(Send(peer, 0, 2) for peer in range(p) if peer != rank), (*below, *above))

    return Schedule("allreduce", "everyone", p, 2, rounds)


def promised(schedule: Schedule, vectors: list[np.ndarray]) -> list[list[tuple[slice, np.ndarray]]]:
    """For each rank, what it must end with, and where, if the operation is addition."""
    p, count = schedule.p, len(vectors[0])
    whole, total = slice(0, count), np.sum(vectors, axis=0)
    own = [slice(chunk_start(count, rank, p), chunk_start(count, rank + 1, p)) for rank in range(p)]
    if schedule.collective == "allreduce":
        return [[(whole, total)]] * p
    if schedule.collective == "reduce":
        return [[(whole, total)] if rank == schedule.root else [] for rank in range(p)]
    if schedule.collective == "bcast":
        return [[(whole, vectors[schedule.root])]] * p
    if schedule.collective == "mix":
        return [[(whole, mixed)] for mixed in graph(schedule.name, p).product() @ vectors]
    if schedule.collective == "reduce_scatter":
        return [[(own[rank], total[own[rank]])] for rank in range(p)]
    if schedule.collective == "scatter":
        return [[(part, vectors[schedule.root][part])] for part in own]
    gathered = [(part, vectors[rank][part]) for rank, part in enumerate(own)]
    if schedule.collective == "gather":
        return [gathered if rank == schedule.root else [] for rank in range(p)]
    return [gathered] * p


def assert_promised(schedule: Schedule, vectors: list[np.ndarray], results: list[np.ndarray], what: str = "") -> None:
    """What ranks end with is what was promised: exactly, but for mixing weights."""
    for rank, promises in enumerate(promised(schedule, vectors)):
        for held, wanted in promises:
            tolerance = 1e-12 if schedule.collective == "mix" else 0
            np.testing.assert_allclose(
                results[rank][held], wanted, tolerance, 0, err_msg=f"{schedule}: {what}: rank {rank}"
            )
