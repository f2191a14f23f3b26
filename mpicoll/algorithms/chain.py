"""Chain: ranks in a row, each passing the vector on to the next in segments, so that all are busy at once.

With p ranks, n bytes and c segments: p - 2 + c rounds, n bytes sent per rank, and no rank receives more than that: the
least for a large vector and few ranks.  The row runs around the ranks and begins, or ends, at the root.
"""

from collections.abc import Iterator

from ..schedule import Recv, Round, Send, reduce


def reduce_to(p: int, rank: int, root: int, segments: int) -> Iterator[Round]:
    """Reduce: from the rank before the root, down, to the root."""
    after, before = (rank + 1) % p, (rank - 1) % p
    distance = (rank - root) % p  # the farthest begins
    for t in range(p - 2 + segments if p > 1 else 0):
        sends = [Send(before, s, s + 1) for s in [t - (p - 1 - distance)] if distance and 0 <= s < segments]
        recvs = [
            reduce(rank, after, s, s + 1) for s in [t - (p - 2 - distance)] if distance < p - 1 and 0 <= s < segments
        ]
        yield Round(tuple(sends), tuple(recvs))


def bcast(p: int, rank: int, root: int, segments: int) -> Iterator[Round]:
    """Broadcast: from the root on, up."""
    after, before = (rank + 1) % p, (rank - 1) % p
    distance = (rank - root) % p
    for t in range(p - 2 + segments if p > 1 else 0):
        sends = [Send(after, s, s + 1, final=True) for s in [t - distance] if distance < p - 1 and 0 <= s < segments]
        recvs = [Recv(before, s, s + 1) for s in [t - distance + 1] if distance and 0 <= s < segments]
        yield Round(tuple(sends), tuple(recvs))
