"""Which algorithm: by what is equal on all ranks (count, dtype, operation, number of ranks), and by nothing else."""

from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import pairwise, takewhile
from math import inf
from operator import index
from typing import Literal, NamedTuple

import numpy as np
from mpi4py import MPI

from ..algorithms import ALGORITHMS, Algorithm, find
from ..cost import CLUSTER, NODE, Network, seconds
from ..tuning.rules import NATIVE, WAYS, Rule, preferred
from . import operations
from .buffers import PAIRS, is_half
from .operations import Operation

PLAIN = {np.dtype(character): np.dtype(character).name for character in "bBhHiIlLqQfdgFDG"}
"""The dtypes that the MPI library can be given without another look, and their names: all numbers but 16-bit floats."""

SEGMENT = 128 << 10
"""Bytes of a pipelining algorithm's pieces: at least these, and not more pieces than ``MAX_SEGMENTS``."""
MAX_SEGMENTS = 32

MOST = 34
"""Arrays of more than 2 to the power of that many bytes are like those."""


SHARED_FROM = {
    "allreduce": 2 << 20 if MPI.get_vendor()[0] == "Intel MPI" else 512 << 10,
    "allreduce_shared": 256 << 10,
    "reduce": 1 << 20,
    "bcast": 4 << 20,
    "reduce_scatter": 1 << 20,
    "allgather": 4 << 20,
}
"""Bytes of the whole array from which on the MPI library's own is slower than memory that all ranks share, or, where
nothing is reduced, than arrays in it; ``bench/allreduce.py``."""

ACROSS_FROM = 1 << 20
"""The same where there are several nodes."""

LARGE = {True: 8 << 20, False: 1 << 20}
"""Bytes from which on one of our allreduces is faster by messages alone, on one node, and on several."""


class Shared(NamedTuple):
    """In place of a row of the table: no schedule, but memory that the ranks share (``mpi.shared``)."""

    name: str = "shared"


SHARED = Shared()


class Options(NamedTuple):
    """How a call is to be made, beside what is to be reduced; see ``mpicoll.allreduce``."""

    algorithm: str = "auto"
    deterministic: bool = False
    segments: int | None = None
    wire: str | None = None


Preference = Literal["fastest", "without sharing", "native", "ours"]
"""What ``"auto"`` means: the fastest, the fastest by messages, the MPI library's own wherever it can do what is asked,
or never that."""


def shortest(collective: str, ranked: Sequence[str]) -> tuple[str, ...]:
    """Of algorithms of ours, the best first, those that are the best for some call: any, one whose operation does not
    commute, or a deterministic one."""
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
    """By cost alone, the MPI library's own left out."""
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
    """The same, but those of the names come first from ``lo`` bytes on, and below ``hi``, if there is an end to it."""
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
    collective: str, p: int, shares: bool = False, spans: bool = False, one_node: bool = True
) -> tuple[Rule, ...]:
    """What ``"auto"`` goes by where nobody has measured: sizes up to which the MPI library's own is best almost
    everywhere, and beyond, and where it cannot do what is asked, the costs of ours on an ordinary network.

    ``shares``, ``spans`` and ``one_node`` are a communicator's (``mpi.state``).
    """
    rules = _ours(collective, p, NODE if one_node else CLUSTER)
    if shares or (spans and collective == "allreduce"):
        limit = ACROSS_FROM if spans else SHARED_FROM[collective]
        return ahead(ahead(rules, 0, limit, NATIVE, SHARED.name), limit, None, *_shared_first(collective))
    return ahead(rules, 0, LARGE[one_node] if collective == "allreduce" else None, NATIVE)


def tuned(collective: str, rules: tuple[Rule, ...], shares: bool) -> tuple[Rule, ...]:
    """The rules of a profile.  What moves data is measured with ordinary arrays: those in shared memory keep their
    way."""
    moves = "reduce" not in collective
    return ahead(rules, SHARED_FROM[collective], None, *_shared_first(collective)) if shares and moves else rules


def _shared_first(collective: str) -> tuple[str, ...]:
    """Where nothing is reduced, the MPI library's own is for arrays that do not lie in shared memory."""
    return (SHARED.name,) if "reduce" in collective else (SHARED.name, NATIVE)


class Limits(NamedTuple):
    """What calls look at before the rules they are of: below so many bytes these have the MPI library's own (and it
    takes the count), from so many on shared memory; or they never have but the former."""

    native_below: float
    shared_from: float
    native_always: bool


def limits(rules: tuple[Rule, ...]) -> Limits:
    """Of these rules."""
    firsts = [(inf if rule.up_to is None else rule.up_to, rule.algorithms[0]) for rule in rules]
    native = max((up_to for up_to, _ in takewhile(lambda first: first[1] == NATIVE, firsts)), default=-1) + 1
    other = max((up_to for up_to, name in firsts if name != SHARED.name), default=-1)
    # No elements at all never come to shared memory: there would be nobody to wait for.
    return Limits(min(native, operations.MAX_COUNT), max(other + 1, 1), native == inf)


def choose(
    collective: str,
    options: Options,
    count: int,
    dtype: np.dtype,
    operation: Operation,
    rules: tuple[Rule, ...],
    prefer: Preference = "fastest",
    shares: bool = False,
) -> Algorithm | Shared | None:
    """The row to use, ``None`` being the MPI library's own; ``rules`` are for ``"auto"``, ``shares`` says whether ranks
    share memory to do it in.

    Raises ``ValueError`` if the named one cannot do it.
    """
    algorithm, deterministic, segments, wire = options

    def names(which: Callable[[Algorithm], bool]) -> str:
        return ", ".join(name for name, row in ALGORITHMS[collective].items() if which(row))

    if algorithm in WAYS:
        raise ValueError(f"{algorithm} is for an array in the memory of a GPU, no list, and for calls that wait")
    if segments is not None and algorithm in ("auto", NATIVE):
        pipelining = names(lambda row: "segments" in row.parameters)
        raise ValueError(f"segments are for a pipelining algorithm: name one, {pipelining}")
    nbytes = count * operation.carried(dtype).itemsize
    if algorithm == SHARED.name:
        if prefer != "fastest":
            raise ValueError("shared is for calls that wait: name another algorithm")
        if not shares:
            raise ValueError(
                f"shared cannot do this {collective} here: it needs two ranks or more that share memory, on every "
                "node, and between nodes it is for allreduce alone"
            )
        return SHARED
    if algorithm == "auto":
        native_can = not deterministic and not (is_half(dtype) and operation.reduces) and prefer != "ours"
        usual = operation.predefined and dtype not in PAIRS
        if native_can and (prefer == "native" or not usual):
            return None
        shared_can = shares and prefer == "fastest" and usual and wire is None
        for name in preferred(rules, nbytes):
            if name == NATIVE:
                if native_can:
                    return None
            elif name == SHARED.name:
                if shared_can:
                    return SHARED
            else:
                row = find(collective, name)
                if (row.canonical or not deterministic) and (row.rank_order or operation.commutes):
                    return row
        raise AssertionError(f"no rule has anything for this {collective}: {rules}")
    if algorithm == NATIVE:
        if deterministic:
            raise ValueError("native is not deterministic: expected " + names(lambda row: row.canonical))
        if is_half(dtype) and operation.reduces:
            raise ValueError(f"native does not add {dtype} as float32: expected auto, " + names(lambda row: True))
        return None
    row = find(collective, algorithm)
    if deterministic and not row.canonical:
        raise ValueError(f"{algorithm} is not deterministic: expected " + names(lambda row: row.canonical))
    if not operation.commutes and not row.rank_order:
        raise ValueError(
            f"{algorithm} adds in an order of its own, and the operation does not commute: expected "
            + names(lambda row: row.rank_order)
        )
    return row


def parameters(
    row: Algorithm | Shared | None, nbytes: int, root: int | None = None, segments: int | None = None
) -> dict[str, int]:
    """What to tell the algorithm: the root, and the number of segments as given, or by the vector's length."""
    if not isinstance(row, Algorithm):
        return {}
    given = {} if root is None else {"root": root}
    if segments is not None:
        given["segments"] = index(segments)
    elif "segments" in row.parameters:
        given["segments"] = min(max(nbytes // (2 * SEGMENT), 1), MAX_SEGMENTS)
    return given
