"""Fold: what is written for a power of two works for any number of ranks.

With q = 2^floor(log2 p), the first 2(p - q) ranks pair up; the odd one gives its vector to the even one, waits, and is
given the result.  Two rounds and one vector more.  The q that remain keep their order, so groups stay contiguous.
"""

from collections.abc import Callable, Iterator

from ..schedule import Recv, Round, Send, Verb


def folded(
    core: Callable[[int, int], Iterator[Round]], p: int, rank: int, chunks: int, unfold: bool = True
) -> Iterator[Round]:
    """``core(q, member)``, a reduction of ``chunks`` chunks among a power of two members, for ``p`` ranks.

    Without ``unfold`` the ranks that gave their vector away are not given the result: one round less.
    """
    q = power_below(p)
    pairs = p - q
    paired, odd = rank < 2 * pairs, rank % 2

    if paired and odd:
        yield Round((Send(rank - 1, 0, chunks),))
        yield from (Round() for _ in core(q, 0))
        if unfold:
            yield Round(recvs=(Recv(rank - 1, 0, chunks),))
        return
    if pairs:
        yield Round(recvs=(Recv(rank + 1, 0, chunks, Verb.REDUCE_ABOVE),)) if paired else Round()
    for round_ in core(q, member_of(rank, pairs)):
        yield Round(
            tuple(send._replace(peer=rank_of(send.peer, pairs)) for send in round_.sends),
            tuple(recv._replace(peer=rank_of(recv.peer, pairs)) for recv in round_.recvs),
        )
    if pairs and unfold:
        yield Round((Send(rank + 1, 0, chunks, final=True),)) if paired else Round()


def power_below(p: int) -> int:
    """The largest power of two that is at most ``p``."""
    return 1 << (p.bit_length() - 1)


def member_of(rank: int, pairs: int) -> int:
    """Which of those that remain ``rank`` is, or the one it is folded into."""
    return rank // 2 if rank < 2 * pairs else rank - pairs


def rank_of(member: int, pairs: int) -> int:
    """The rank that is ``member`` of those that remain, ``pairs`` having been folded."""
    return 2 * member if member < pairs else member + pairs
