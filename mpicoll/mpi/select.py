"""The rules that ``"auto"`` goes by: those measured, or where nobody has, what costs and experience say."""

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from math import inf
from operator import index

import numpy as np
from mpi4py import MPI

from ..algorithms import ALGORITHMS, Algorithm
from ..collective import COLLECTIVES
from ..cost import CLUSTER, NODE, Network, seconds
from ..tuning.rules import NATIVE, SHARED, Rule

PLAIN = frozenset(np.dtype(character) for character in "?bBhHiIlLqQfdgFDG")
"""The dtypes that the MPI library can be given without another look: all but 16-bit floats."""

SEGMENT = 128 << 10
"""Bytes of a pipelining algorithm's pieces: at least these, and not more pieces than ``MAX_SEGMENTS``."""
MAX_SEGMENTS = 32

MOST = 34
"""Arrays of more than 2 to the power of that many bytes are like those."""


SHARED_FROM = {
    **{row.name: row.shared_from for row in COLLECTIVES.values()},
    **({"allreduce": 2 << 20} if MPI.get_vendor()[0] == "Intel MPI" else {}),
    "allreduce_shared": 256 << 10,
}
"""Bytes of the whole array from which on native is slower than memory that all ranks share, or, where
nothing is reduced, than arrays in it; ``bench/allreduce.py``."""

ACROSS_FROM = 1 << 20
"""The same where there are several nodes."""

LARGE = {True: 8 << 20, False: 1 << 20}
"""Bytes from which on one of our allreduces is faster by messages alone, on one node, and on several."""


def parameters(row: Algorithm, nbytes: int, root: int | None = None, segments: int | None = None) -> dict[str, int]:
    """What to tell the algorithm: the root, and the number of segments as given, or by the vector's length."""
    given = {} if root is None else {"root": root}
    if segments is not None:
        given["segments"] = index(segments)
    elif "segments" in row.parameters:
        given["segments"] = min(max(nbytes // (2 * SEGMENT), 1), MAX_SEGMENTS)
    return given


def shortest(collective: str, ranked: Sequence[str]) -> tuple[str, ...]:
    """Keep those of the ranked algorithms, the best first, that are best for some call: any, one whose operation does
    not commute, or a deterministic one."""
    kept: list[str] = []
    able: set[str] = set()
    for name in ranked:
        row = ALGORITHMS[collective][name]
        does = {"any"} | ({"in order"} if row.rank_order or not row.reduces else set())
        does |= {"canonical"} if row.canonical or not row.reduces else set()
        if not does <= able:
            kept.append(name)
            able |= does
    return tuple(kept)


@lru_cache
def _ours(collective: str, p: int, network: Network) -> tuple[Rule, ...]:
    """Return rules by cost alone, without native."""
    rules: list[Rule] = []
    rows = ALGORITHMS[collective].values()
    for bits in range(MOST + 1):
        costs = {row.name: seconds(row, p, 1 << bits, network, **parameters(row, 1 << bits)) for row in rows}
        names = shortest(collective, sorted(costs, key=costs.__getitem__))
        if rules and rules[-1].algorithms == names:
            rules.pop()
        rules.append(Rule(1 << bits, names))
    return (*rules[:-1], rules[-1]._replace(up_to=None))


def ahead(rules: tuple[Rule, ...], lo: int, hi: int | None, *names: str) -> tuple[Rule, ...]:
    """Return the rules with ``names`` first from ``lo`` bytes on, and below ``hi`` if that is not ``None``."""
    found: list[Rule] = []
    begin = 0
    for up_to, algorithms in rules:
        end = inf if up_to is None else up_to + 1
        cuts = sorted({begin, end, *(cut for cut in (lo, hi) if cut is not None and begin < cut < end)})
        for start, stop in pairwise(cuts):
            inside = lo <= start and (hi is None or start < hi)
            here = (*names, *(name for name in algorithms if name not in names)) if inside else algorithms
            found.append(Rule(None if stop == inf else int(stop) - 1, here))
        begin = int(end) if up_to is not None else 0
    return tuple(found)


def defaults(
    collective: str, p: int, shares: bool = False, spans: bool = False, one_node: bool = True, compiled: bool = False
) -> tuple[Rule, ...]:
    """What ``"auto"`` goes by where nobody has measured: sizes up to which native is best almost
    everywhere, and beyond, and where it cannot do what is asked, the costs of ours on an ordinary network.

    ``shares``, ``spans`` and ``one_node`` are a communicator's (``mpi.state``); ``compiled`` says that there is machine
    code for this one in shared memory, which is faster than native at every size.
    """
    rules = _ours(collective, p, NODE if one_node else CLUSTER)
    if shares or (spans and COLLECTIVES[collective].across):
        limit = 0 if compiled else ACROSS_FROM if spans else SHARED_FROM[collective]
        return ahead(ahead(rules, 0, limit, NATIVE, SHARED), limit, None, *_shared_first(collective))
    return ahead(rules, 0, LARGE[one_node] if collective == "allreduce" else None, NATIVE)


def tuned(collective: str, rules: tuple[Rule, ...], shares: bool) -> tuple[Rule, ...]:
    """The rules of a profile.  What moves data is measured with ordinary arrays: those in shared memory keep their
    way."""
    moves = not COLLECTIVES[collective].reduces
    return ahead(rules, SHARED_FROM[collective], None, *_shared_first(collective)) if shares and moves else rules


def _shared_first(collective: str) -> tuple[str, ...]:
    """Where nothing is reduced, native is for arrays that do not lie in shared memory."""
    return (SHARED,) if COLLECTIVES[collective].reduces else (SHARED, NATIVE)
