"""Exchanges with the partner at distance 1, 2, 4, ...: recursive doubling and halving-doubling.

Both add in the canonical order: neighbors first, then pairs of pairs, the lower group on the left.  With q =
2^floor(log2 p) and n bytes, when p = q:

* recursive doubling exchanges whole vectors: log2 q rounds, n log2 q bytes sent, the fewest rounds there are.
* halving-doubling (Rabenseifner's) exchanges the half that the partner's group will own, then gathers backwards:
  2 log2 q rounds, 2n(q - 1)/q bytes sent.  Taking near partners first makes its sums those of recursive doubling, bit
  for bit; most implementations take far ones first.

Other p are folded: two rounds and n bytes more.  Thakur, Rabenseifner and Gropp, 2005.
"""

from collections.abc import Iterator

from ..schedule import Recv, Round, Send, reduce
from .fold import folded, power_below


def recursive_doubling(p: int, rank: int) -> Iterator[Round]:
    """Allreduce of one chunk."""
    return folded(_exchange_all, p, rank, chunks=1)


def halving_doubling(p: int, rank: int) -> Iterator[Round]:
    """Allreduce of as many chunks as ranks remain after the fold."""
    return folded(_exchange_halves, p, rank, chunks=power_below(p))


def _exchange_all(q: int, member: int) -> Iterator[Round]:
    distance = 1
    while distance < q:
        peer = member ^ distance
        yield Round((Send(peer, 0, 1),), (reduce(member, peer, 0, 1),))
        distance *= 2


def _exchange_halves(q: int, member: int) -> Iterator[Round]:
    low, high, distance = 0, q, 1
    halved = []
    while distance < q:
        peer, middle = member ^ distance, (low + high) // 2
        halves = (low, middle), (middle, high)
        keep, give = halves if member < peer else halves[::-1]
        yield Round((Send(peer, *give),), (reduce(member, peer, *keep),))
        halved.append((peer, keep, give))
        (low, high), distance = keep, 2 * distance
    for peer, keep, give in reversed(halved):
        yield Round((Send(peer, *keep, final=True),), (Recv(peer, *give),))
