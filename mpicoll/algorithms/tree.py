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
from .fold import folded


def binomial(p: int, rank: int) -> Iterator[Round]:
    """Allreduce of one chunk."""
    return folded(_up_and_down, p, rank, chunks=1)


def _up_and_down(q: int, member: int) -> Iterator[Round]:
    distances = [1 << n for n in range(q.bit_length() - 1)]
    for distance in distances:
        if member % (2 * distance) == distance:
            yield Round((Send(member - distance, 0, 1),))
        elif member % (2 * distance) == 0:
            yield Round(recvs=(Recv(member + distance, 0, 1, Verb.REDUCE_ABOVE),))
        else:
            yield Round()
    for distance in reversed(distances):
        if member % (2 * distance) == distance:
            yield Round(recvs=(Recv(member - distance, 0, 1),))
        elif member % (2 * distance) == 0:
            yield Round((Send(member + distance, 0, 1, final=True),))
        else:
            yield Round()


def double(p: int, rank: int, segments: int) -> Iterator[Round]:
    """Allreduce of 2 ``segments`` chunks, the first half along one tree, the second along the other.

    Segment s leaves a rank at depth d for its parent in round depth - d + s, and comes down to it in round
    depth + d - 1 + s, where ``depth`` is that of the deepest rank of both trees.
    """
    depth = (p - 1).bit_length()
    # Ranks at 1..p, inside at odd ranks; ranks at 0..p-1, inside at even ranks, 0 being the root.
    trees = [(_Place(rank + 1, 1, p), 0), (_Place(rank, 0, p - 1), segments)]
    for t in range(2 * depth - 1 + segments if p > 1 else 0):
        sends: list[Send] = []
        recvs: list[Recv] = []
        for place, first in trees:

            def chunk(s: int, first: int = first) -> tuple[int, int] | None:
                return (first + s, first + s + 1) if 0 <= s < segments else None

            if place.parent is not None:
                if up := chunk(t - (depth - place.depth)):
                    sends.append(Send(place.parent, *up))
                if down := chunk(t - (depth + place.depth - 1)):
                    recvs.append(Recv(place.parent, *down))
            up, down = chunk(t - (depth - place.depth - 1)), chunk(t - (depth + place.depth))
            for child in place.children:
                if up:
                    recvs.append(Recv(child, *up, Verb.REDUCE_BELOW if child < rank else Verb.REDUCE_ABOVE))
                if down:
                    sends.append(Send(child, *down, final=True))
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
