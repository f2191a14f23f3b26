"""Circulant: a reduce-scatter, then an allgather, over skips that halve, rounding up, from p to 1.

With p ranks, any p, and n bytes: 2 ceil(log2 p) rounds, 2n(p - 1)/p bytes sent per rank: the ring's traffic
in logarithmically many rounds.  The operation must commute.  Traff, arXiv 2410.14234.
"""

from collections.abc import Iterator
from itertools import pairwise

from ..schedule import Recv, Round, Send, reduce


def skips(p: int) -> list[int]:
    """p, ceil(p/2), ..., 2, 1: ceil(log2 p) + 1 numbers."""
    found = [p]
    while found[-1] > 1:
        found.append((found[-1] + 1) // 2)
    return found


def reduce_scatter(p: int, rank: int) -> Iterator[Round]:
    """Rank r ends with chunk r reduced.

    After the round from skip ``above`` to ``skip``, only the ``skip`` chunks from r on matter to rank r:
    the others, [r + skip, r + above), it gave to the rank that starts there.
    """
    for above, skip in pairwise(skips(p)):
        width = above - skip
        there, back = (rank + skip) % p, (rank - skip) % p
        yield Round((Send(there, there, there + width),), (reduce(rank, back, rank, rank + width),))


def allgather(p: int, rank: int) -> Iterator[Round]:
    """Rank r starts with chunk r.

    The reduce-scatter backwards: before the round at ``skip`` rank r holds the ``skip`` chunks from r on,
    after it ``above`` of them.
    """
    for skip, above in pairwise(reversed(skips(p))):
        width = above - skip
        there, back = (rank + skip) % p, (rank - skip) % p
        yield Round((Send(back, rank, rank + width, final=True),), (Recv(there, there, there + width),))


def allreduce(p: int, rank: int) -> Iterator[Round]:
    """Every rank ends with every chunk reduced."""
    yield from reduce_scatter(p, rank)
    yield from allgather(p, rank)
