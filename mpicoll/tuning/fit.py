"""How rules are fitted to measurements, and what they are worth at sizes that were not fitted."""

from collections.abc import Sequence
from math import isqrt
from typing import NamedTuple

import numpy as np

from ..algorithms import ALGORITHMS
from .measurements import Measurements, Row
from .profile import Profile
from .rules import NATIVE, SHARED, Rule, preferred

# ---- the fit


def fitted_profile(measured: Measurements) -> Profile:
    """Return the profile of the rules fitted to measurements, for the machine and layout of these."""
    rules = {name: fit(name, [row for row in rows if row.fitted]) for name, rows in measured.rows.items()}
    counts = [len(times) for rows in measured.rows.values() for row in rows if row.fitted for times in row.us.values()]
    made = {**measured.made, "repetitions": [min(counts), max(counts)]}
    return Profile(measured.fingerprint, rules, made)


def fit(collective: str, rows: Sequence[Row]) -> tuple[Rule, ...]:
    """Return the rules for a collective, from rows of growing size.

    For each kind of call that only some algorithms can do, there is a race among these algorithms.  A rule names the
    winners, that of the widest race first.  It leaves out the winner of a race in which an algorithm named before takes
    part, since that one does the call.  The bound between two sizes with different names is their geometric mean.
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
    """The algorithms of each race, from the widest to the narrowest.

    Native cannot sum 16-bit floats as float32, nor be deterministic.  Shared memory is for blocking calls and
    predefined operations.  Some calls need rows of the table that reduce in rank order, or in the canonical order.
    """
    table = ALGORITHMS[collective]
    ordered = {name for name, row in table.items() if row.rank_order}
    canonical = {name for name, row in table.items() if row.canonical}
    besides = [{NATIVE, SHARED}, {NATIVE}, {SHARED}, set()]
    wide = [more | rows for rows in ({*table}, ordered) if rows for more in besides]
    return [*wide, {SHARED} | canonical, canonical] if canonical else wide


def _winners(rows: Sequence[Row], names: set[str]) -> list[str | None]:
    """The winner at each size: that of the size below (at first the default), unless the fastest is faster beyond
    noise.
    """
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


# ---- what rules are worth


class Trial(NamedTuple):
    """The algorithm that rules choose at a size, and its time relative to others.

    ``penalty`` is the share by which it takes longer than the best; ``over_default`` and ``over_native`` are its speeds
    relative to the default and to native.
    """

    nbytes: int
    choice: str
    best: str
    penalty: float
    default: str
    over_default: float
    over_native: float


class Worth(NamedTuple):
    """The worth of rules in several trials: ``worst`` has the greatest penalty, ``least`` the least speed over native.

    The mean of penalties is arithmetic, that of speeds geometric.
    """

    penalty: float
    worst: Trial
    over_default: float
    over_native: float
    least: Trial


def choice(rules: Sequence[Rule], row: Row) -> str:
    """The algorithm that the rules choose for a call that all can do: the first preferred one that was measured."""
    return next(name for name in preferred(rules, row.nbytes) if name in row.us)


def trial(rules: Sequence[Rule], row: Row) -> Trial:
    """Try rules at the size of a row.

    Among algorithms of equal speed the best is a matter of chance.  So the best is determined from every other
    repetition, and the penalty from the rest, and the other way round.
    """
    name = choice(rules, row)
    halves = [row._replace(us={of: times[first::2] for of, times in row.us.items()}) for first in (0, 1)]
    lost = [{other: half.ratio(name, other)[0] - 1 for other in half.us} for half in halves]
    found = [max(half, key=half.__getitem__) for half in lost]
    penalty = max((lost[1][found[0]] + lost[0][found[1]]) / 2, 0.0)
    best = max(row.us, key=lambda other: row.ratio(name, other)[0]) if penalty else name
    over = [row.ratio(other, name)[0] for other in (row.default, NATIVE)]
    return Trial(row.nbytes, name, best, penalty, row.default, *over)


def worth(trials: Sequence[Trial]) -> Worth:
    """Return the worth of rules in one trial or more."""
    penalty = float(np.mean([one.penalty for one in trials]))
    over_default, over_native = (
        float(np.exp(np.mean(np.log([getattr(one, of) for one in trials])))) for of in ("over_default", "over_native")
    )
    worst, least = max(trials, key=lambda one: one.penalty), min(trials, key=lambda one: one.over_native)
    return Worth(penalty, worst, over_default, over_native, least)
