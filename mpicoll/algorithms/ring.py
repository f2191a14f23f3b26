"""Ring: a reduce-scatter, then an allgather, each passing chunks once around the ring of ranks.

With p ranks and n bytes: 2(p - 1) rounds, 2n(p - 1)/p bytes sent per rank, which no allreduce can beat;
the number of rounds makes it slow for small n.  Patarasuk and Yuan, 2009.
"""

from collections.abc import Iterator

from ..schedule import Recv, Round, Send, reduce


def reduce_scatter(p: int, rank: int) -> Iterator[Round]:
    """Rank r ends with chunk r reduced: in round t it passes on chunk r - 1 - t."""
    after, before = (rank + 1) % p, (rank - 1) % p
    for t in range(p - 1):
        out, into = (rank - 1 - t) % p, (rank - 2 - t) % p
        yield Round((Send(after, out, out + 1),), (reduce(rank, before, into, into + 1),))


def allgather(p: int, rank: int) -> Iterator[Round]:
    """Rank r starts with chunk r: in round t it passes on chunk r - t."""
    after, before = (rank + 1) % p, (rank - 1) % p
    for t in range(p - 1):
        out, into = (rank - t) % p, (rank - 1 - t) % p
        yield Round((Send(after, out, out + 1, final=True),), (Recv(before, into, into + 1),))


def allreduce(p: int, rank: int) -> Iterator[Round]:
    """Every rank ends with every chunk reduced."""
    yield from reduce_scatter(p, rank)
    yield from allgather(p, rank)
