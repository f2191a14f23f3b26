"""From measurements to rules, and what rules are worth at sizes to which nothing was fitted."""

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
    """The profile of the rules that are fitted to measurements, for where these were made."""
    rules = {name: fit(name, [row for row in rows if row.fitted]) for name, rows in measured.rows.items()}
    counts = [len(times) for rows in measured.rows.values() for row in rows if row.fitted for times in row.us.values()]
    made = {**measured.made, "repetitions": [min(counts), max(counts)]}
    return Profile(measured.fingerprint, rules, made)


def fit(collective: str, rows: Sequence[Row]) -> tuple[Rule, ...]:
    """The rules for a collective, from rows of growing size.

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
    """The algorithms that may take part in each race, from the widest to the narrowest.

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
    """The fastest for each size; or that of the size below, at first the default, if it is not slower beyond noise."""
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
    """What rules choose at a size, and how it compares: it takes ``penalty`` longer than the best, as a share of that.

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
    """What rules are worth in several trials: ``worst`` has the greatest penalty, ``least`` gains least over native.

    Penalties are averaged as they are, gains as ratios are, by the geometric mean.
    """

    penalty: float
    worst: Trial
    over_default: float
    over_native: float
    least: Trial


def choice(rules: Sequence[Rule], row: Row) -> str:
    """What the rules choose for a call that every algorithm can do: the first of the preferred that was measured."""
    return next(name for name in preferred(rules, row.nbytes) if name in row.us)


def trial(rules: Sequence[Rule], row: Row) -> Trial:
    """A trial of rules at the size of a row.

    Of several that are alike one is always the luckiest: which is the best is found in every other repetition, and by
    how much in the rest, in turn.
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
    """What rules are worth in at least one trial."""
    penalty = float(np.mean([one.penalty for one in trials]))
    over_default, over_native = (
        float(np.exp(np.mean(np.log([getattr(one, of) for one in trials])))) for of in ("over_default", "over_native")
    )
    worst, least = max(trials, key=lambda one: one.penalty), min(trials, key=lambda one: one.over_native)
    return Worth(penalty, worst, over_default, over_native, least)
