"""Exchanges with the partner at distance 1, 2, 4, ...: recursive doubling, halving, and both.

Both add in the canonical order: neighbors first, then pairs of pairs, the lower group on the left.  With q =
2^floor(log2 p) and n bytes, when p = q:

* recursive doubling exchanges whole vectors: log2 q rounds, n log2 q bytes sent, the fewest rounds there are.
* halving-doubling (Rabenseifner's) exchanges the half that the partner's group will own, then gathers backwards:
  2 log2 q rounds, 2n(q - 1)/q bytes sent.  Taking near partners first makes its sums those of recursive doubling, bit
  for bit; most implementations take far ones first.

Other p are folded: two rounds and n bytes more.  Thakur, Rabenseifner and Gropp, 2005.

Halving alone is a reduce-scatter, in the same order of additions; since near partners come first, ranks end with the
chunks of others, and one hop brings them home.  Doubling alone is an allgather.
"""

from collections.abc import Iterator

from ..schedule import Recv, Round, Send, reduce
from .fold import folded, member_of, power_below, rank_of


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
    halved = list(_halves(q, member))
    for peer, keep, give in halved:
        yield Round((Send(peer, *give),), (reduce(member, peer, *keep),))
    for peer, keep, give in reversed(halved):
        yield Round((Send(peer, *keep, final=True),), (Recv(peer, *give),))


def _halves(q: int, member: int) -> Iterator[tuple[int, tuple[int, int], tuple[int, int]]]:
    """Yield (peer, parts to keep, parts to send) of the q parts of a vector, until one part is left."""
    low, high, distance = 0, q, 1
    while distance < q:
        peer, middle = member ^ distance, (low + high) // 2
        halves = (low, middle), (middle, high)
        keep, give = halves if member < peer else halves[::-1]
        yield peer, keep, give
        (low, high), distance = keep, 2 * distance


def reduce_scatter(p: int, rank: int) -> Iterator[Round]:
    """Reduce-scatter: rank r ends with chunk r of p.

    After halving, member m holds the part of another member; a hop sends its chunks to their owners.
    """
    q = power_below(p)
    pairs = p - q

    def chunks(low: int, high: int) -> tuple[int, int]:
        """The chunks of parts [low, high), where part m belongs to member m and the rank folded into it."""
        return rank_of(low, pairs), rank_of(high, pairs)

    def core(q: int, member: int) -> Iterator[Round]:
        for peer, keep, give in _halves(q, member):
            yield Round((Send(peer, *chunks(*give)),), (reduce(member, peer, *chunks(*keep)),))

    yield from folded(core, p, rank, p, unfold=False)
    member = member_of(rank, pairs)  # the part with my chunk is its own, or will be
    remains, holds = rank == rank_of(member, pairs), _reversed(member, q)
    held = range(*chunks(holds, holds + 1)) if remains else range(0)
    source = rank_of(holds, pairs)  # as I hold the part of another, that one holds mine
    if p > 1:
        yield Round(
            tuple(Send(chunk, chunk, chunk + 1, final=True) for chunk in held if chunk != rank),
            (Recv(source, rank, rank + 1),) if source != rank else (),
        )


def _reversed(member: int, q: int) -> int:
    """The bits of ``member`` reversed: the part of q that it holds after halving."""
    return int(bin(member + q)[:2:-1], 2) if q > 1 else 0


def allgather(p: int, rank: int) -> Iterator[Round]:
    """Allgather: rank r starts with chunk r of p, and every exchange doubles what members hold.

    The folded ranks send their chunks first, and receive all chunks last.
    """
    q = power_below(p)
    pairs = p - q
    paired, odd = rank < 2 * pairs, rank % 2
    rounds = q.bit_length() - 1
    if paired and odd:
        yield Round((Send(rank - 1, rank, rank + 1, final=True),))
        yield from (Round() for _ in range(rounds))
        yield Round(recvs=(Recv(rank - 1, 0, p),))
        return
    if pairs:
        yield Round(recvs=(Recv(rank + 1, rank + 1, rank + 2),)) if paired else Round()
    member = member_of(rank, pairs)
    for n in range(rounds):
        peer = member ^ (1 << n)
        mine, theirs = ((first >> n << n, (first >> n << n) + (1 << n)) for first in (member, peer))
        send = Send(rank_of(peer, pairs), rank_of(mine[0], pairs), rank_of(mine[1], pairs), final=True)
        yield Round((send,), (Recv(send.peer, rank_of(theirs[0], pairs), rank_of(theirs[1], pairs)),))
    if pairs:
        yield Round((Send(rank + 1, 0, p, final=True),)) if paired else Round()
