"""The table of algorithms: one row each, and everything else (proof, picture, plan, tests) follows from it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction

from ..schedule import Round, Schedule
from . import circulant, ring


@dataclass(frozen=True)
class Algorithm:
    """One row: the generator of one rank's rounds, and the textbook's two numbers to hold it to.

    ``rounds(p)`` and ``sent(p)`` (the most any rank sends, as a fraction of the vector) are stated independently
    of the generator; the verifier compares them with what the generator does.
    """

    collective: str
    name: str
    generate: Callable[[int, int], Iterator[Round]]
    chunks: Callable[[int], int]
    rounds: Callable[[int], int]
    sent: Callable[[int], Fraction]

    def schedule(self, p: int) -> Schedule:
        """This algorithm for ``p`` ranks."""
        if p < 1:
            raise ValueError(f"{self.name} {self.collective}: the number of ranks must be at least 1, got {p}")
        return Schedule(self.collective, self.name, p, self.chunks(p), lambda rank: self.generate(p, rank))


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
        "circulant",
        circulant.allreduce,
        chunks=lambda p: p,
        rounds=lambda p: 2 * (p - 1).bit_length(),  # (p - 1).bit_length() is ceil(log2 p)
        sent=lambda p: Fraction(2 * (p - 1), p),
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
