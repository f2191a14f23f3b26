"""Bruck: an allgather over distances 1, 2, 4, ..., for any number of ranks.

With p ranks and n bytes in all: ceil(log2 p) rounds, n(p - 1)/p bytes sent per rank, the least of both.  Bruck et al.,
1997.  Chunks keep their numbers and ranges may wrap, so that nothing needs to be rotated at the end.
"""

from collections.abc import Iterator

from ..schedule import Recv, Round, Send


def allgather(p: int, rank: int) -> Iterator[Round]:
    """Rank r starts with chunk r; before the round at ``distance`` it holds the ``distance`` chunks from r on."""
    distance = 1
    while distance < p:
        width = min(distance, p - distance)
        there, back = (rank + distance) % p, (rank - distance) % p
        yield Round((Send(back, rank, rank + width, final=True),), (Recv(there, there, there + width),))
        distance *= 2
