"""From measurements to rules, and what rules are worth where nothing was fitted; no MPI here.

Compared are always repetitions in which both took their turn: the median of the ratio, and its 95 % interval.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf, isqrt
from typing import Any, NamedTuple

import numpy as np

from .algorithms import ALGORITHMS
from .files import to_json
from .statistics import median
from .tuning import (
    NATIVE,
    SHARED,
    Fingerprint,
    Profile,
    Rule,
    WrongError,
    can_do_all,
    fingerprint_in,
    header,
    known_algorithm,
    known_collective,
    members_of,
    parsed,
    preferred,
    replace,
    shown,
)

LIMIT = 256 << 20  # bytes of a file of measurements

# ---- measurements


class Row(NamedTuple):
    """A collective at one size: for each algorithm the microseconds of the slowest rank in each repetition.

    Where one has fewer than others, it took part in the first of them only.  Rules are made of what is ``fitted``, and
    tried on the rest; ``default`` is what would be done without any.
    """

    nbytes: int
    fitted: bool
    default: str
    us: dict[str, np.ndarray]

    def ratio(self, name: str, other: str) -> tuple[float, float, float]:
        """How many times as long as the other it takes: median, and 95 % interval."""
        return median(_ratios(self.us, name, other))

    def faster(self, name: str, other: str) -> bool:
        """Is it faster than the other beyond noise: does the interval exclude 1, and the median in each quarter?

        Neighbors on the machine come and go: repetitions are not as independent as the interval takes them to be.
        """
        ratios = _ratios(self.us, other, name)
        quarters = np.array_split(ratios, min(4, len(ratios)))
        return median(ratios)[1] > 1 and all(np.median(quarter) > 1 for quarter in quarters)

    def fastest(self, names: set[str]) -> str | None:
        """Of these, the one whose median is the least; ``None`` if none was measured."""
        return min((name for name in self.us if name in names), key=lambda name: np.median(self.us[name]), default=None)


def _ratios(us: Mapping[str, np.ndarray], name: str, other: str) -> np.ndarray:
    n = min(len(us[name]), len(us[other]))
    return us[name][:n] / us[other][:n]


@dataclass(frozen=True, eq=False)
class Measurements:
    """By collective, the shortest array first; where, and how they were ``made``: plain values by any names."""

    fingerprint: Fingerprint
    made: dict[str, Any]
    rows: Mapping[str, Sequence[Row]]


def read(path: str | os.PathLike[str]) -> Measurements:
    """What is in a file; a ``UserError`` naming the place in it that is not as it must be."""
    return parsed(path, "measurements", LIMIT, _measurements)


def write(measured: Measurements, path: str | os.PathLike[str]) -> None:
    """Make them the file at ``path``, whole or not at all; a line for each row."""
    lines = {name: [*map(_line, rows)] for name, rows in measured.rows.items()}
    replace(path, "measurements", measured.fingerprint, measured.made, "rows", lines)


def _line(row: Row) -> str:
    us = {name: times.tolist() for name, times in row.us.items()}
    return to_json({"bytes": row.nbytes, "fitted": row.fitted, "default": row.default, "us": us})


def _measurements(value: Any) -> Measurements:
    found = header(value, "rows")
    given = found["rows"]
    if not isinstance(given, dict) or not given:
        raise WrongError(f"rows is {shown(given)}: expected an object, of lists by collective")
    rows: dict[str, list[Row]] = {}
    for name, ones in given.items():
        collective, place = known_collective(name, "a key of rows"), f"rows.{name}"
        if not isinstance(ones, list):
            raise WrongError(f"{place} is {shown(ones)}: expected a list")
        made = [_row(collective, one, f"{place}, row {n}") for n, one in enumerate(ones, 1)]
        sizes = [row.nbytes for row in made]
        if sizes != sorted({*sizes}):
            raise WrongError(f"{place} is in no order: expected bytes that grow")
        if not any(row.fitted for row in made):
            raise WrongError(f"{place} has no row that is fitted: there is nothing to make rules of")
        rows[name] = made
    return Measurements(fingerprint_in(found), found["made"], rows)


def _row(collective: str, given: Any, place: str) -> Row:
    nbytes, fitted, default, us = members_of(given, place, ("bytes", "fitted", "default", "us")).values()
    if type(nbytes) is not int or nbytes < 0:
        raise WrongError(f"{place}, bytes is {shown(nbytes)}: expected a number, 0 or more")
    if type(fitted) is not bool:
        raise WrongError(f"{place}, fitted is {shown(fitted)}: expected true or false")
    if not isinstance(us, dict) or not isinstance(default, str) or not {NATIVE, default} <= {*us}:
        raise WrongError(f"{place}, us is {shown(us)}: expected times by algorithm, with native and {shown(default)}")
    for name, times in us.items():
        known_algorithm(collective, name, f"{place}, us")
        numbers = isinstance(times, list) and all(type(one) in (int, float) and 0 < one < inf for one in times)
        if not numbers or len(times) < 2:
            raise WrongError(f"{place}, us.{name} is {shown(times)}: expected two or more microseconds above 0")
    if not any(can_do_all(collective, name) for name in us):
        raise WrongError(f"{place} has no algorithm that can do every call")
    return Row(nbytes, fitted, default, {name: np.array(times, float) for name, times in us.items()})


# ---- the fit


def profile(measured: Measurements) -> Profile:
    """The rules that measurements make, for where they were made."""
    rules = {name: fit(name, [row for row in rows if row.fitted]) for name, rows in measured.rows.items()}
    counts = [len(times) for rows in measured.rows.values() for row in rows if row.fitted for times in row.us.values()]
    made = {**measured.made, "repetitions": [min(counts), max(counts)]}
    return Profile(measured.fingerprint, rules, made)


def fit(collective: str, rows: Sequence[Row]) -> tuple[Rule, ...]:
    """Rules from rows of growing size.

    For each kind of call that not every algorithm can do there is a race among those that can.  A rule names who wins
    them, the widest first, but none of a race in which somebody takes part who is named before: he does that call.
    Between two sizes at which the names differ the bound is the geometric mean.
    """
    races = _races(collective)
    winners = zip(*(_winners(rows, names) for names in races), strict=True)
    lists = [_named(races, found) for found in winners]
    rules = []
    for n, (row, names) in enumerate(zip(rows, lists, strict=True)):
        if n + 1 == len(rows):
            rules.append(Rule(None, names))
        elif lists[n + 1] != names:
            rules.append(Rule(isqrt(row.nbytes * rows[n + 1].nbytes), names))
    return tuple(rules)


def _races(collective: str) -> list[set[str]]:
    """Who may take part in which, from the widest to the narrowest.

    A call may go to the MPI library, but not if it is to add 16-bit floats as we do, or to be deterministic; to shared
    memory, but not if it does not wait, or the operation is the program's own; and to all rows of the table, or those
    that add in the order of ranks, or in the canonical one.
    """
    table = ALGORITHMS[collective]
    ordered = {name for name, row in table.items() if row.rank_order}
    canonical = {name for name, row in table.items() if row.canonical}
    besides = [{NATIVE, SHARED}, {NATIVE}, {SHARED}, set()]
    wide = [more | rows for rows in ({*table}, ordered) if rows for more in besides]
    return [*wide, {SHARED} | canonical, canonical] if canonical else wide


def _winners(rows: Sequence[Row], names: set[str]) -> list[str | None]:
    """For each size the fastest, but the one of the size below, and at first the default, unless another is faster
    beyond noise."""
    held: str | None = rows[0].default if rows[0].default in names else None
    found = []
    for row in rows:
        best = row.fastest(names)
        if held not in row.us or (best is not None and row.faster(best, held)):
            held = best
        found.append(held)
    return found


def _named(races: Sequence[set[str]], winners: Sequence[str | None]) -> tuple[str, ...]:
    named: list[str] = []
    for names, winner in zip(races, winners, strict=True):
        if winner is not None and names.isdisjoint(named):
            named.append(winner)
    return tuple(named)


# ---- what they are worth


class Trial(NamedTuple):
    """Rules at a size: what they choose, which takes ``penalty`` longer than the best there, as a share of its time.

    ``over_default`` and ``over_native`` are how many times as fast the choice is as these.
    """

    nbytes: int
    choice: str
    best: str
    penalty: float
    default: str
    over_default: float
    over_native: float


class Worth(NamedTuple):
    """Of several trials; ``worst`` is the one of the greatest penalty, ``least`` that which gains least over native.

    Penalties are averaged as they are, gains as ratios are, by the geometric mean.
    """

    penalty: float
    worst: Trial
    over_default: float
    over_native: float
    least: Trial


def choice(rules: Sequence[Rule], row: Row) -> str:
    """What the rules take there for a call that every algorithm can do: the first that was measured."""
    return next(name for name in preferred(rules, row.nbytes) if name in row.us)


def trial(rules: Sequence[Rule], row: Row) -> Trial:
    """The rules at that size.

    Of several that are alike one is always the luckiest: who is the best is found in every other repetition, and by how
    much in the rest, in turn.
    """
    name = choice(rules, row)
    halves = [{of: times[first::2] for of, times in row.us.items()} for first in (0, 1)]
    lost = [{other: float(np.median(_ratios(half, name, other))) - 1 for other in half} for half in halves]
    found = [max(half, key=half.__getitem__) for half in lost]
    penalty = max((lost[1][found[0]] + lost[0][found[1]]) / 2, 0.0)
    best = max(row.us, key=lambda other: row.ratio(name, other)[0]) if penalty else name
    over = [row.ratio(other, name)[0] for other in (row.default, NATIVE)]
    return Trial(row.nbytes, name, best, penalty, row.default, *over)


def worth(trials: Sequence[Trial]) -> Worth:
    """Of at least one."""
    penalty = float(np.mean([one.penalty for one in trials]))
    over_default, over_native = (
        float(np.exp(np.mean(np.log([getattr(one, of) for one in trials])))) for of in ("over_default", "over_native")
    )
    worst, least = max(trials, key=lambda one: one.penalty), min(trials, key=lambda one: one.over_native)
    return Worth(penalty, worst, over_default, over_native, least)
