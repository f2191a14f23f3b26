"""The parts of all ranks to a root, and from it: gather and scatter.

Along the binomial tree each rank passes on the parts of all that are below it, ceil(log2 p) rounds; directly, each part
travels once, and the root exchanges p - 1 messages in one round.  Both work for any p, root, and lengths of parts.
"""

from collections.abc import Iterator

from ..schedule import Recv, Round, Send


def _distances(p: int) -> list[int]:
    return [1 << n for n in range((p - 1).bit_length())]


def gather(p: int, rank: int, root: int) -> Iterator[Round]:
    """Gather of p chunks, one from each rank, up the binomial tree that has ``root`` in the place of rank 0."""
    place = (rank - root) % p
    for distance in _distances(p):
        if place % (2 * distance) == distance:
            peer = (rank - distance) % p
            yield Round((Send(peer, rank, rank + min(distance, p - place), final=True),))
        elif place % (2 * distance) == 0 and place + distance < p:
            peer = (rank + distance) % p
            yield Round(recvs=(Recv(peer, peer, peer + min(distance, p - place - distance)),))
        else:
            yield Round()


def scatter(p: int, rank: int, root: int) -> Iterator[Round]:
    """Scatter of p chunks, one to each rank, down the binomial tree that has ``root`` in the place of rank 0."""
    place = (rank - root) % p
    for distance in reversed(_distances(p)):
        if place % (2 * distance) == distance:
            peer = (rank - distance) % p
            yield Round(recvs=(Recv(peer, rank, rank + min(distance, p - place)),))
        elif place % (2 * distance) == 0 and place + distance < p:
            peer = (rank + distance) % p
            yield Round((Send(peer, peer, peer + min(distance, p - place - distance), final=True),))
        else:
            yield Round()


def direct_gather(p: int, rank: int, root: int) -> Iterator[Round]:
    """Gather of p chunks, each from its rank straight to ``root``."""
    if p == 1:
        return
    if rank == root:
        yield Round(recvs=tuple(Recv(peer, peer, peer + 1) for peer in range(p) if peer != root))
    else:
        yield Round((Send(root, rank, rank + 1, final=True),))


def direct_scatter(p: int, rank: int, root: int) -> Iterator[Round]:
    """Scatter of p chunks, each from ``root`` straight to its rank."""
    if p == 1:
        return
    if rank == root:
        yield Round(tuple(Send(peer, peer, peer + 1, final=True) for peer in range(p) if peer != root))
    else:
        yield Round(recvs=(Recv(root, rank, rank + 1),))
