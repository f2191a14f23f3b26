"""The table of algorithms: one row each, and everything else (proof, picture, plan, tests) follows from it."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from math import isqrt

from ..collective import COLLECTIVES
from ..schedule import MIX, Round, Schedule
from . import bruck, chain, circulant, doubling, mixing, parts, ring, tree
from .fold import power_below


@dataclass(frozen=True)
class Algorithm:
    """One row: the generator of one rank's rounds, and what it is held to.

    ``rounds(p)``, ``sent(p)`` and ``added(p)`` (the most that any rank sends and reduces, as fractions of the vector)
    are the textbook's numbers, stated independently of the generator.  The verifier compares them with what the
    generator does, and ``cost`` converts them to seconds.  The verifier also proves that the operands stand in rank
    order if ``rank_order`` says so (the operation then need not commute), and that the additions are those of the
    canonical order if ``canonical`` says so: all such rows give the same bits.

    Mixing is proved to keep the mean, and to reach it if ``exact(p)`` says so; its rows are a period of a graph.

    ``parameters`` are what the algorithm can be told beyond p, with their defaults; every function of the row takes
    them by name.
    """

    collective: str
    name: str
    generate: Callable[..., Iterator[Round]]
    chunks: Callable[..., int]
    rounds: Callable[..., int]
    sent: Callable[..., Fraction]
    added: Callable[..., Fraction] = lambda p, **parameters: Fraction(0)
    rank_order: bool = False
    canonical: bool = False
    exact: Callable[[int], bool] = lambda p: False
    parameters: Mapping[str, int] = field(default_factory=dict)

    @property
    def reduces(self) -> bool:
        """Whether the algorithm reduces, rather than only moving or mixing data."""
        return not self.mixes and COLLECTIVES[self.collective].reduces

    @property
    def mixes(self) -> bool:
        """Whether the algorithm mixes the vectors of ranks, instead of doing a collective."""
        return self.collective == MIX

    def schedule(self, p: int, **parameters: int) -> Schedule:
        """This algorithm for ``p`` ranks; a ``ValueError`` for a parameter it does not have or out of range."""
        if p < 1:
            raise ValueError(f"{self.name} {self.collective}: the number of ranks must be at least 1, got {p}")
        for parameter, value in parameters.items():
            if parameter not in self.parameters:
                raise ValueError(f"{self.name} {self.collective} has no parameter {parameter!r}")
            if parameter == "root" and not 0 <= value < p:
                raise ValueError(f"{self.name} {self.collective}: root must be one of {p} ranks, got {value}")
            if parameter != "root" and value < 1:
                raise ValueError(f"{self.name} {self.collective}: {parameter} must be at least 1, got {value}")
        given = {**self.parameters, **parameters}

        def rounds(rank: int) -> Iterator[Round]:
            return self.generate(p, rank, **given)

        return Schedule(self.collective, self.name, p, self.chunks(p, **given), rounds, root=given.get("root", 0))


def _log(p: int) -> int:
    """floor(log2 p); (p - 1).bit_length() is the ceiling."""
    return p.bit_length() - 1


def _folded(p: int) -> int:
    """1 if p is no power of two: the ranks beyond one are folded."""
    return int(p != power_below(p))


def _double_tree_bcast_sent(p: int, root: int, segments: int) -> Fraction:
    """The most that a rank sends in a double-tree broadcast.

    Every rank is an inner node of one tree, with two children (the first and the last rank with one), and sends a half
    to each.  The root sends a half to the root of each tree, unless it is that itself.
    """
    if p == 1:
        return Fraction(0)
    halves = [1 + (0 < rank < p - 1) for rank in range(p)]
    halves[root] += sum(top != root for top in (power_below(p) - 1, 0))
    return Fraction(max(halves), 2)


def _halving_sent(p: int) -> Fraction:
    """The most that a rank sends in halving: a folded rank sends all, and so does one whose chunk needs a hop."""
    return Fraction(1) if p > 2 else Fraction(p - 1, p)


def _doubling_sent(p: int) -> Fraction:
    """The most that a rank sends in doubling: the first rank sends the chunks of 1, 2, 4, ... members, and the fold."""
    pairs = p - power_below(p)
    doubled = sum((1 << n) + min(1 << n, pairs) for n in range(_log(p)))
    return Fraction(doubled + (p if pairs else 0), p)


def _halving_added(p: int) -> Fraction:
    """The most that a rank reduces in halving: the first rank, chunks of 1, 2, 4, ... members and of the fold."""
    pairs = p - power_below(p)
    return Fraction(sum((1 << n) + min(1 << n, pairs) for n in range(_log(p))), p) + _folded(p)


def _double_tree_added(p: int) -> Fraction:
    """The most that a rank reduces in a double tree: a half from each of two children in one tree."""
    return Fraction(min(p - 1, 2), 2)


def _base_rounds(p: int) -> int:
    """The rounds of the base graph: log2 of the power of two in p, and twice that of the rest plus one in between."""
    odd = p // (p & -p)
    return _log(p // odd) + (2 * _log(odd) + 1 if odd > 1 else 0)


def _torus_neighbors(p: int) -> int:
    """The number of neighbors on a torus: two along each side, but one if the side has two ranks."""
    height = max(n for n in range(1, isqrt(p) + 1) if p % n == 0)
    return sum(min(side - 1, 2) for side in (height, p // height))


def _is_power(p: int) -> bool:
    return p == power_below(p)


def _mixing(
    name: str,
    rounds: Callable[[int], int],
    neighbors: Callable[[int], int] = lambda p: 1,
    exact: Callable[[int], bool] = lambda p: p <= 2,
) -> Algorithm:
    """Return the row of a graph's period, in which some rank always sends to ``neighbors`` ranks."""
    return Algorithm(
        MIX,
        name,
        partial(mixing.period, name),
        chunks=lambda p: 1,
        rounds=lambda p: rounds(p) if p > 1 else 0,
        sent=lambda p: Fraction(rounds(p) * neighbors(p) if p > 1 else 0),
        exact=exact,
    )


_ROWS = [
    Algorithm(
        "allreduce",
        "ring",
        ring.allreduce,
        chunks=lambda p: p,
        rounds=lambda p: 2 * (p - 1),
        sent=lambda p: Fraction(2 * (p - 1), p),
        added=lambda p: Fraction(p - 1, p),
    ),
    Algorithm(
        "allreduce",
        "recursive_doubling",
        doubling.recursive_doubling,
        chunks=lambda p: 1,
        rounds=lambda p: _log(p) + 2 * _folded(p),
        sent=lambda p: Fraction(_log(p) + _folded(p)),
        added=lambda p: Fraction(_log(p) + _folded(p)),
        rank_order=True,
        canonical=True,
    ),
    Algorithm(
        "allreduce",
        "halving_doubling",
        doubling.halving_doubling,
        chunks=power_below,
        rounds=lambda p: 2 * _log(p) + 2 * _folded(p),
        sent=lambda p: 2 - Fraction(2, power_below(p)) + _folded(p),
        added=lambda p: 1 - Fraction(1, power_below(p)) + _folded(p),
        rank_order=True,
        canonical=True,
    ),
    Algorithm(
        "allreduce",
        "circulant",
        circulant.allreduce,
        chunks=lambda p: p,
        rounds=lambda p: 2 * (p - 1).bit_length(),
        sent=lambda p: Fraction(2 * (p - 1), p),
        added=lambda p: Fraction(p - 1, p),
    ),
    Algorithm(
        "allreduce",
        "tree",
        tree.binomial,
        chunks=lambda p: 1,
        rounds=lambda p: 2 * _log(p) + 2 * _folded(p),
        sent=lambda p: Fraction(_log(p) + _folded(p)),
        added=lambda p: Fraction(_log(p) + _folded(p)),
        rank_order=True,
        canonical=True,
    ),
    Algorithm(
        "allreduce",
        "double_tree",
        tree.double,
        chunks=lambda p, segments: 2 * segments,
        rounds=lambda p, segments: 2 * (p - 1).bit_length() - 1 + segments if p > 1 else 0,
        sent=lambda p, segments: Fraction(min(p, 4), 2) if p > 1 else Fraction(0),
        added=lambda p, segments: _double_tree_added(p),
        rank_order=True,
        parameters={"segments": 4},
    ),
    Algorithm(
        "reduce",
        "tree",
        tree.binomial_reduce,
        chunks=lambda p, root: 1,
        rounds=lambda p, root: _log(p) + _folded(p) + (root > 0),
        sent=lambda p, root: Fraction(p > 1),
        added=lambda p, root: Fraction(_log(p) + _folded(p)),
        rank_order=True,
        canonical=True,
        parameters={"root": 0},
    ),
    Algorithm(
        "reduce",
        "chain",
        chain.reduce_to,
        chunks=lambda p, root, segments: segments,
        rounds=lambda p, root, segments: p - 2 + segments if p > 1 else 0,
        sent=lambda p, root, segments: Fraction(p > 1),
        added=lambda p, root, segments: Fraction(p > 1),
        parameters={"root": 0, "segments": 4},
    ),
    Algorithm(
        "reduce",
        "double_tree",
        tree.double_reduce,
        chunks=lambda p, root, segments: 2 * segments,
        rounds=lambda p, root, segments: (p - 1).bit_length() + segments if p > 1 else 0,
        sent=lambda p, root, segments: Fraction(p > 1),
        added=lambda p, root, segments: _double_tree_added(p),
        rank_order=True,
        parameters={"root": 0, "segments": 4},
    ),
    Algorithm(
        "bcast",
        "tree",
        tree.binomial_bcast,
        chunks=lambda p, root: 1,
        rounds=lambda p, root: (p - 1).bit_length(),
        sent=lambda p, root: Fraction((p - 1).bit_length()),
        parameters={"root": 0},
    ),
    Algorithm(
        "bcast",
        "chain",
        chain.bcast,
        chunks=lambda p, root, segments: segments,
        rounds=lambda p, root, segments: p - 2 + segments if p > 1 else 0,
        sent=lambda p, root, segments: Fraction(p > 1),
        parameters={"root": 0, "segments": 4},
    ),
    Algorithm(
        "bcast",
        "double_tree",
        tree.double_bcast,
        chunks=lambda p, root, segments: 2 * segments,
        rounds=lambda p, root, segments: (p - 1).bit_length() + segments if p > 1 else 0,
        sent=_double_tree_bcast_sent,
        parameters={"root": 0, "segments": 4},
    ),
    Algorithm(
        "bcast",
        "scatter_allgather",
        tree.scatter_allgather,
        chunks=lambda p, root: p,
        rounds=lambda p, root: 2 * (p - 1).bit_length(),
        sent=lambda p, root: Fraction(2 * (p - 1), p),
        parameters={"root": 0},
    ),
    Algorithm(
        "reduce_scatter",
        "ring",
        ring.reduce_scatter,
        chunks=lambda p: p,
        rounds=lambda p: p - 1,
        sent=lambda p: Fraction(p - 1, p),
        added=lambda p: Fraction(p - 1, p),
    ),
    Algorithm(
        "reduce_scatter",
        "halving",
        doubling.reduce_scatter,
        chunks=lambda p: p,
        rounds=lambda p: _log(p) + 1 + _folded(p) if p > 2 else p - 1,
        sent=_halving_sent,
        added=_halving_added,
        rank_order=True,
        canonical=True,
    ),
    Algorithm(
        "reduce_scatter",
        "circulant",
        circulant.reduce_scatter,
        chunks=lambda p: p,
        rounds=lambda p: (p - 1).bit_length(),
        sent=lambda p: Fraction(p - 1, p),
        added=lambda p: Fraction(p - 1, p),
    ),
    Algorithm(
        "allgather",
        "ring",
        ring.allgather,
        chunks=lambda p: p,
        rounds=lambda p: p - 1,
        sent=lambda p: Fraction(p - 1, p),
    ),
    Algorithm(
        "allgather",
        "doubling",
        doubling.allgather,
        chunks=lambda p: p,
        rounds=lambda p: _log(p) + 2 * _folded(p),
        sent=_doubling_sent,
    ),
    Algorithm(
        "allgather",
        "bruck",
        bruck.allgather,
        chunks=lambda p: p,
        rounds=lambda p: (p - 1).bit_length(),
        sent=lambda p: Fraction(p - 1, p),
    ),
    Algorithm(
        "allgather",
        "circulant",
        circulant.allgather,
        chunks=lambda p: p,
        rounds=lambda p: (p - 1).bit_length(),
        sent=lambda p: Fraction(p - 1, p),
    ),
    Algorithm(
        "gather",
        "binomial",
        parts.gather,
        chunks=lambda p, root: p,
        rounds=lambda p, root: (p - 1).bit_length(),
        sent=lambda p, root: Fraction(max(p - power_below(p), power_below(p) // 2), p),
        parameters={"root": 0},
    ),
    Algorithm(
        "gather",
        "direct",
        parts.direct_gather,
        chunks=lambda p, root: p,
        rounds=lambda p, root: min(p - 1, 1),
        sent=lambda p, root: Fraction(p > 1, p),
        parameters={"root": 0},
    ),
    Algorithm(
        "scatter",
        "binomial",
        parts.scatter,
        chunks=lambda p, root: p,
        rounds=lambda p, root: (p - 1).bit_length(),
        sent=lambda p, root: Fraction(p - 1, p),
        parameters={"root": 0},
    ),
    Algorithm(
        "scatter",
        "direct",
        parts.direct_scatter,
        chunks=lambda p, root: p,
        rounds=lambda p, root: min(p - 1, 1),
        sent=lambda p, root: Fraction(p - 1, p),
        parameters={"root": 0},
    ),
    _mixing("butterfly", lambda p: (p - 1).bit_length(), exact=_is_power),
    _mixing("exponential", lambda p: (p - 1).bit_length(), exact=_is_power),
    _mixing("static_exponential", lambda p: 1, lambda p: (p - 1).bit_length(), exact=lambda p: p <= 3),
    _mixing("ring", lambda p: 1, lambda p: min(p - 1, 2), exact=lambda p: p <= 3),
    _mixing("torus", lambda p: 1, _torus_neighbors, exact=lambda p: p <= 3),
    _mixing("star", lambda p: 1, lambda p: p - 1),
    _mixing("complete", lambda p: 1, lambda p: p - 1, exact=lambda p: True),
    _mixing("matching", lambda p: 1),
    _mixing("base", _base_rounds, exact=lambda p: True),
]

ALGORITHMS: dict[str, dict[str, Algorithm]] = {}
for _row in _ROWS:
    ALGORITHMS.setdefault(_row.collective, {})[_row.name] = _row


def find(collective: str, name: str) -> Algorithm:
    """Return the row of that name.  Raises ``ValueError``, which lists the known names, if there is none."""
    known = ALGORITHMS[collective]
    if name not in known:
        names = ", ".join(known)
        raise ValueError(
            f"unknown {collective} algorithm {name!r}: expected {names}, shared (memory of a node), or native (that of "
            "the MPI library)"
        )
    return known[name]
