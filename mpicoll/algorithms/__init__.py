"""The table of algorithms: one row each, and everything else (proof, picture, plan, tests) follows from it."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction

from ..schedule import Round, Schedule
from . import circulant, doubling, ring, tree
from .fold import power_below


@dataclass(frozen=True)
class Algorithm:
    """One row: the generator of one rank's rounds, and what it is held to.

    ``rounds(p)`` and ``sent(p)`` (the most any rank sends, as a fraction of the vector) are the textbook's numbers,
    stated independently of the generator; the verifier compares them with what the generator does.  It proves as well
    that the operands stand in rank order if ``rank_order`` says so (the operation then need not commute), and that
    the additions are those of the canonical tree if ``canonical`` does: all such rows give the same bits.

    ``parameters`` are what the algorithm can be told beyond p, with their defaults; every function of the row takes
    them by name.
    """

    collective: str
    name: str
    generate: Callable[..., Iterator[Round]]
    chunks: Callable[..., int]
    rounds: Callable[..., int]
    sent: Callable[..., Fraction]
    rank_order: bool = False
    canonical: bool = False
    parameters: Mapping[str, int] = field(default_factory=dict)

    def schedule(self, p: int, **parameters: int) -> Schedule:
        """This algorithm for ``p`` ranks; a ``ValueError`` for a parameter that it does not have or that is below 1."""
        if p < 1:
            raise ValueError(f"{self.name} {self.collective}: the number of ranks must be at least 1, got {p}")
        for parameter, value in parameters.items():
            if parameter not in self.parameters:
                raise ValueError(f"{self.name} {self.collective} has no parameter {parameter!r}")
            if value < 1:
                raise ValueError(f"{self.name} {self.collective}: {parameter} must be at least 1, got {value}")
        given = {**self.parameters, **parameters}
        return Schedule(
            self.collective, self.name, p, self.chunks(p, **given), lambda rank: self.generate(p, rank, **given)
        )


def _log(p: int) -> int:
    """floor(log2 p); (p - 1).bit_length() is the ceiling."""
    return p.bit_length() - 1


def _folded(p: int) -> int:
    """1 if p is no power of two: the ranks beyond one are folded."""
    return int(p != power_below(p))


_ROWS = [
    Algorithm(
        "allreduce",
        "ring",
        ring.allreduce,
        chunks=lambda p: p,
        rounds=lambda p: 2 * (p - 1),
        sent=lambda p: Fraction(2 * (p - 1), p),
    ),
    Algorithm(
        "allreduce",
        "recursive_doubling",
        doubling.recursive_doubling,
        chunks=lambda p: 1,
        rounds=lambda p: _log(p) + 2 * _folded(p),
        sent=lambda p: Fraction(_log(p) + _folded(p)),
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
    ),
    Algorithm(
        "allreduce",
        "tree",
        tree.binomial,
        chunks=lambda p: 1,
        rounds=lambda p: 2 * _log(p) + 2 * _folded(p),
        sent=lambda p: Fraction(_log(p) + _folded(p)),
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
        rank_order=True,
        parameters={"segments": 4},
    ),
]

ALGORITHMS: dict[str, dict[str, Algorithm]] = {}
for _row in _ROWS:
    ALGORITHMS.setdefault(_row.collective, {})[_row.name] = _row


def find(collective: str, name: str) -> Algorithm:
    """The row of that name; a ``ValueError`` that lists the known ones if there is none."""
    known = ALGORITHMS[collective]
    if name not in known:
        names = ", ".join(known)
        raise ValueError(
            f"unknown {collective} algorithm {name!r}: expected {names}, or native (the MPI library's own)"
        )
    return known[name]
