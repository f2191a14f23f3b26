"""Trees: reduce towards a root, then broadcast from it, whole vectors along one tree or halves along two.

The binomial tree adds in the canonical order, as recursive doubling does, and sends less in all: p - 1 vectors up and
p - 1 down.  With q = 2^floor(log2 p): 2 log2 q rounds when p = q, two more when folded.

The double tree pipelines: each half of the vector, in ``segments`` pieces, climbs and descends an in-order binary tree
of its own, and a rank that is inside one tree is a leaf of the other, so that no rank idles or does double work.  With
L = ceil(log2 p): 2L - 1 + segments rounds, at most 2n bytes sent; near full bandwidth in logarithmically many rounds.
Sanders, Speck and Traff, 2009.  Theirs, and NCCL's, mirror or shift the second tree.  Here one has the odd ranks inside
and the other the even ones, both in rank order, so that the operation need not commute.
"""

from collections.abc import Iterator

from ..schedule import Recv, Round, Send, Verb
from . import circulant, parts
from .fold import folded, power_below


def binomial(p: int, rank: int) -> Iterator[Round]:
    """Allreduce of one chunk."""
    return folded(_up_and_down, p, rank, chunks=1)


def _up_and_down(q: int, member: int) -> Iterator[Round]:
    yield from _up(q, member)
    yield from _down(q, member, 0)


def binomial_reduce(p: int, rank: int, root: int) -> Iterator[Round]:
    """Reduce of one chunk: to rank 0 whatever the root, so that the order of additions does not depend on it; then a
    hop."""
    yield from folded(_up, p, rank, chunks=1, unfold=False)
    if root:
        yield Round((Send(root, 0, 1, final=True),) if rank == 0 else (), (Recv(0, 0, 1),) if rank == root else ())


def binomial_bcast(p: int, rank: int, root: int) -> Iterator[Round]:
    """Broadcast of one chunk, along the tree that has ``root`` in the place of rank 0."""
    return _down(p, (rank - root) % p, root)


def _up(q: int, member: int) -> Iterator[Round]:
    distance = 1
    while distance < q:
        if member % (2 * distance) == distance:
            yield Round((Send(member - distance, 0, 1),))
        elif member % (2 * distance) == 0:
            yield Round(recvs=(Recv(member + distance, 0, 1, Verb.REDUCE_ABOVE),))
        else:
            yield Round()
        distance *= 2


def _down(p: int, place: int, root: int) -> Iterator[Round]:
    for distance in reversed([1 << n for n in range((p - 1).bit_length())]):
        if place % (2 * distance) == distance:
            yield Round(recvs=(Recv((place - distance + root) % p, 0, 1),))
        elif place % (2 * distance) == 0 and place + distance < p:
            yield Round((Send((place + distance + root) % p, 0, 1, final=True),))
        else:
            yield Round()


def scatter_allgather(p: int, rank: int, root: int) -> Iterator[Round]:
    """Broadcast of p chunks: each rank is given its own, by the binomial tree, and then all gather.

    2 ceil(log2 p) rounds, at most 2n(p - 1)/p bytes sent: for large vectors.  Van de Geijn and Watts, 1997, but with
    the circulant allgather.
    """
    yield from parts.scatter(p, rank, root)
    yield from circulant.allgather(p, rank)


def double(p: int, rank: int, segments: int) -> Iterator[Round]:
    """Allreduce of 2 ``segments`` chunks, the first half along one tree, the second along the other.

    Segment s leaves a rank at depth d for its parent in round depth - d + s, and comes down to it in round
    depth + d - 1 + s, where ``depth`` is that of the deepest rank of both trees.
    """
    depth = (p - 1).bit_length()
    return _both_trees(p, rank, segments, 2 * depth - 1 + segments, up=0, down=depth)


def double_reduce(p: int, rank: int, root: int, segments: int) -> Iterator[Round]:
    """Reduce of 2 ``segments`` chunks: up both trees, and from their roots to ``root``."""
    depth = (p - 1).bit_length()
    return _both_trees(p, rank, segments, depth + segments, up=0, root=root, hop=depth)


def double_bcast(p: int, rank: int, root: int, segments: int) -> Iterator[Round]:
    """Broadcast of 2 ``segments`` chunks: from ``root`` to the roots of both trees, and down."""
    depth = (p - 1).bit_length()
    return _both_trees(p, rank, segments, depth + segments, down=1, root=root, hop=0)


def _both_trees(
    p: int,
    rank: int,
    segments: int,
    rounds: int,
    up: int | None = None,
    down: int | None = None,
    root: int | None = None,
    hop: int = 0,
) -> Iterator[Round]:
    """Segment 0 leaves the deepest ranks in round ``up`` and the trees' roots in round ``down``; in round ``hop`` it
    passes between these and ``root``, upwards if there is an ``up``."""
    depth = (p - 1).bit_length()
    # Ranks at 1..p, inside at odd ranks; ranks at 0..p-1, inside at even ranks, 0 being the root.
    trees = [(_Place(rank + 1, 1, p), power_below(p) - 1, 0), (_Place(rank, 0, p - 1), 0, segments)]
    for t in range(rounds if p > 1 else 0):
        sends: list[Send] = []
        recvs: list[Recv] = []
        for place, top, first in trees:

            def chunk(start: int | None, first: int = first, t: int = t) -> tuple[int, int] | None:
                s = -1 if start is None else t - start
                return (first + s, first + s + 1) if 0 <= s < segments else None

            rises = None if up is None else up + depth - place.depth
            falls = None if down is None else down + place.depth
            if place.parent is not None:
                if part := chunk(rises):
                    sends.append(Send(place.parent, *part))
                if part := chunk(None if falls is None else falls - 1):
                    recvs.append(Recv(place.parent, *part))
            for child in place.children:
                if part := chunk(None if rises is None else rises - 1):
                    recvs.append(Recv(child, *part, Verb.REDUCE_BELOW if child < rank else Verb.REDUCE_ABOVE))
                if part := chunk(falls):
                    sends.append(Send(child, *part, final=True))
            if root is not None and root != top and (part := chunk(hop)):
                source, target = (root, top) if up is None else (top, root)
                if rank == source:
                    sends.append(Send(target, *part, final=True))
                if rank == target:
                    recvs.append(Recv(source, *part))
        yield Round(tuple(sends), tuple(recvs))


class _Place:
    """Where ``node`` stands in the in-order binary tree of the nodes ``least`` (0 or 1) to ``last``.

    The lowest set bit of a node is its height: odd nodes are leaves.  Node 0, if there, is above them all.  Parent and
    children are given as ranks: nodes less ``least``.
    """

    def __init__(self, node: int, least: int, last: int) -> None:
        above = [node]
        while (parent := _parent(above[-1], last)) >= least and above[-1] != 0:
            above.append(parent)
        self.depth = len(above) - 1
        self.parent = above[1] - least if self.depth else None
        self.children = [child - least for child in _children(node, last)]


def _parent(node: int, last: int) -> int:
    bit = node & -node
    above = (node ^ bit) | (bit << 1)
    return above if above <= last else node ^ bit


def _children(node: int, last: int) -> list[int]:
    """The lower one first."""
    bit = node & -node if node else 1 << (last.bit_length())
    left = [node - bit // 2] if node and bit > 1 else []
    step = bit // 2
    while step and node + step > last:
        step //= 2
    return left + ([node + step] if step else [])
