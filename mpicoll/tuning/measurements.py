"""Times of algorithms side by side, in a file: what rules are made of.

Times are compared within repetitions in which both algorithms took their turn.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any, NamedTuple

import numpy as np

from ..statistics import median
from .fingerprint import Fingerprint
from .format import FormatError, known_algorithm, known_collective, members_of, parts, read_file, shown, write_file
from .rules import NATIVE, can_do_all

LIMIT = 256 << 20  # bytes of a file of measurements


class Row(NamedTuple):
    """A collective at one size: for each algorithm the microseconds of the slowest rank in each repetition.

    Where one has fewer than others, it took part in the first of them only.  Rules are made of what is ``fitted``, and
    tried on the rest; ``default`` is the algorithm without any rules.
    """

    nbytes: int
    fitted: bool
    default: str
    us: dict[str, np.ndarray]

    def ratio(self, name: str, other: str) -> tuple[float, float, float]:
        """How many times as long as the other an algorithm takes: the median, and its 95 % interval."""
        return median(self._ratios(name, other))

    def faster(self, name: str, other: str) -> bool:
        """Whether an algorithm is faster than the other beyond noise.

        It is if the interval excludes 1, and the median does in each quarter of the repetitions: neighbors on the
        machine come and go, so repetitions are not as independent as the interval takes them to be.
        """
        ratios = self._ratios(other, name)
        quarters = np.array_split(ratios, min(4, len(ratios)))
        return median(ratios)[1] > 1 and all(np.median(quarter) > 1 for quarter in quarters)

    def fastest(self, names: set[str]) -> str | None:
        """The algorithm of the least median among ``names``; ``None`` if none of them was measured."""
        return min((name for name in self.us if name in names), key=lambda name: np.median(self.us[name]), default=None)

    def _ratios(self, name: str, other: str) -> np.ndarray:
        n = min(len(self.us[name]), len(self.us[other]))
        return self.us[name][:n] / self.us[other][:n]


@dataclass(frozen=True, eq=False)
class Measurements:
    """Rows by collective, the shortest array first; where they hold, and how they were ``made``: plain values."""

    fingerprint: Fingerprint
    made: dict[str, Any]
    rows: Mapping[str, Sequence[Row]]


def read_measurements(path: str | os.PathLike[str]) -> Measurements:
    """The measurements in a file; a ``UserError`` names the first place in it that is wrong."""
    return read_file(path, "measurements", LIMIT, _measurements)


def write_measurements(measured: Measurements, path: str | os.PathLike[str]) -> None:
    """Make measurements the content of the file ``path``, whole or not at all."""
    rows = {name: map(_members, rows) for name, rows in measured.rows.items()}
    write_file(path, "measurements", "rows", measured.fingerprint, measured.made, rows)


def _members(row: Row) -> dict[str, Any]:
    us = {name: times.tolist() for name, times in row.us.items()}
    return {"bytes": row.nbytes, "fitted": row.fitted, "default": row.default, "us": us}


def _measurements(value: Any) -> Measurements:
    fingerprint, made, given = parts(value, "rows")
    if not isinstance(given, dict) or not given:
        raise FormatError(f"rows is {shown(given)}: expected an object, of lists by collective")
    return Measurements(fingerprint, made, {name: _rows(name, own) for name, own in given.items()})


def _rows(name: str, given: Any) -> list[Row]:
    collective, place = known_collective(name, "a key of rows"), f"rows.{name}"
    if not isinstance(given, list):
        raise FormatError(f"{place} is {shown(given)}: expected a list")
    rows = [_row(collective, one, f"{place}, row {n}") for n, one in enumerate(given, 1)]
    sizes = [row.nbytes for row in rows]
    if sizes != sorted({*sizes}):
        raise FormatError(f"{place} is in no order: expected bytes that grow")
    if not any(row.fitted for row in rows):
        raise FormatError(f"{place} has no row that is fitted: there is nothing to make rules of")
    return rows


def _row(collective: str, given: Any, place: str) -> Row:
    nbytes, fitted, default, us = members_of(given, place, ("bytes", "fitted", "default", "us")).values()
    if type(nbytes) is not int or nbytes < 0:
        raise FormatError(f"{place}, bytes is {shown(nbytes)}: expected a number, 0 or more")
    if type(fitted) is not bool:
        raise FormatError(f"{place}, fitted is {shown(fitted)}: expected true or false")
    if not isinstance(us, dict) or not isinstance(default, str) or not {NATIVE, default} <= {*us}:
        raise FormatError(f"{place}, us is {shown(us)}: expected times by algorithm, with native and {shown(default)}")
    for name, times in us.items():
        known_algorithm(collective, name, f"{place}, us")
        numbers = isinstance(times, list) and all(type(one) in (int, float) and 0 < one < inf for one in times)
        if not numbers or len(times) < 2:
            raise FormatError(f"{place}, us.{name} is {shown(times)}: expected two or more microseconds above 0")
    if not any(can_do_all(collective, name) for name in us):
        raise FormatError(f"{place} has no algorithm that can do every call")
    return Row(nbytes, fitted, default, {name: np.array(times, float) for name, times in us.items()})
