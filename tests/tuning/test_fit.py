"""Rules that measurements make, and what rules are worth."""

import numpy as np
import pytest

from mpicoll.algorithms import ALGORITHMS
from mpicoll.collective import COLLECTIVES
from mpicoll.tuning.fit import fit, trial, worth
from mpicoll.tuning.measurements import Row
from mpicoll.tuning.rules import NATIVE, SHARED, Rule, can_do_all
from profiles import TRIED, TRIED_RULES, steady


def test_between_two_winners_the_bound_is_the_geometric_mean():
    rows = [
        steady(1 << 10, native=1, tree=2, ring=9),
        steady(1 << 12, native=2, tree=3, ring=9),
        steady(1 << 14, native=9, tree=4, ring=9),
        steady(1 << 15, native=20, tree=6, ring=9),
        steady(1 << 17, native=30, tree=20, ring=9),
    ]
    assert fit("allreduce", rows) == (
        Rule(1 << 13, (NATIVE, "tree")),
        Rule(1 << 16, ("tree",)),
        Rule(None, ("ring", "tree")),
    )
    assert fit("bcast", [steady(4, native=5, tree=6, chain=7), steady(400, native=9, tree=6, chain=2)]) == (
        Rule(40, (NATIVE, "tree")),
        Rule(None, ("chain",)),
    )
    assert fit("bcast", rows[:1]) == (Rule(None, (NATIVE, "tree")),)


def test_each_kind_of_call_has_its_own_winner():
    times = {"native": 1, "shared": 2, "ring": 3, "circulant": 8, "double_tree": 4, "tree": 6, "halving_doubling": 5}
    assert fit("allreduce", [steady(4, **times)]) == (
        Rule(None, (NATIVE, SHARED, "ring", "double_tree", "halving_doubling")),
    )
    slow = {**times, "shared": 10, "native": 3.5}
    assert fit("allreduce", [steady(4, **slow)]) == (Rule(None, ("ring", NATIVE, "double_tree", "halving_doubling")),)


@pytest.mark.parametrize("collective", COLLECTIVES)
def test_whatever_a_call_can_do_it_finds_the_best_of_it(collective):
    """By trying all orders of speed that chance comes to, for all sets of algorithms that a call may be able to use."""
    table, rng = ALGORITHMS[collective], np.random.default_rng(1)
    narrower = [
        {name for name, row in table.items() if row.rank_order},
        {name for name, row in table.items() if row.canonical},
    ]
    kinds = [
        {*more, *rows}
        for rows in ({*table}, *(narrower if "reduce" in collective else []))
        for more in ({NATIVE, SHARED}, {NATIVE}, {SHARED}, set())
        if not (NATIVE in more and rows == narrower[1])
    ]
    names = [NATIVE, SHARED, *table]
    for times in (rng.permutation(len(names)) + 1 for _ in range(300)):
        us = dict(zip(names, times, strict=True))
        (found,) = fit(collective, [steady(4, **us)])
        for able in kinds:
            assert next(name for name in found.algorithms if name in able) == min(able, key=lambda name: us[name])
        assert can_do_all(collective, found.algorithms[-1])
        assert not any(can_do_all(collective, name) for name in found.algorithms[:-1])


def noisy(nbytes, rng, n=40, **middle):
    """A row of algorithms that are all slow for a while, together, and each a bit now and then."""
    together = 1 + 5 * (rng.random(n) < 0.3)
    us = {name: time * together * (1 + 0.2 * rng.random(n)) for name, time in middle.items()}
    return Row(nbytes, True, NATIVE, us)


def test_noise_does_not_make_rules():
    rng = np.random.default_rng(3)
    rows = [noisy(4 << n, rng, native=10, tree=10, ring=10) for n in range(20)]
    assert len({row.fastest({*row.us}) for row in rows}) == 3  # what would be chosen by the medians alone
    assert len(fit("allreduce", rows)) == 1


def test_what_is_beyond_noise_does():
    rng = np.random.default_rng(3)
    rows = [noisy(4 << n, rng, native=10, tree=30 * 0.8**n, ring=99) for n in range(12)]  # equal at n = 4.9
    before, after = fit("allreduce", rows)
    assert (before.algorithms, after) == ((NATIVE, "tree"), Rule(None, ("tree",)))
    assert 4 << 4 < before.up_to < 4 << 7


def test_a_neighbor_that_comes_for_a_while_does_not_either():
    us = {"native": np.repeat([10.0, 60, 70, 60], 20), "tree": np.full(80, 20.0)}  # it hits native most
    row = Row(4, True, NATIVE, us)
    assert row.ratio("native", "tree")[1] > 1
    assert not row.faster("tree", "native")
    assert fit("allreduce", [row]) == (Rule(None, (NATIVE, "tree")),)
    assert row._replace(us={name: times[20:] for name, times in us.items()}).faster("tree", "native")


def test_without_reason_to_leave_it_the_default_is_kept():
    row = steady(4, default="shared", native=3, shared=3, tree=3)
    assert fit("allreduce", [row]) == (Rule(None, (SHARED, NATIVE, "tree")),)


def test_compared_are_repetitions_that_both_took_part_in():
    row = Row(4, True, NATIVE, {"native": np.array([1.0] * 3 + [9.0] * 30), "tree": np.array([2.0] * 3)})
    assert row.ratio("tree", "native") == (2, 2, 2)
    assert row.ratio("native", "tree") == (0.5, 0.5, 0.5)


def test_what_rules_are_worth_by_hand():
    trials = [trial(TRIED_RULES, row) for row in TRIED]
    assert [one[:3] for one in trials] == [
        (96, NATIVE, NATIVE),
        (100, NATIVE, "tree"),
        (192, "tree", "tree"),
        (300, SHARED, NATIVE),
    ]
    assert [one.penalty for one in trials] == pytest.approx([0, 0.2, 0, 0.25])
    assert [one.over_default for one in trials] == pytest.approx([1, 1, 4, 0.8])
    assert [one.over_native for one in trials] == pytest.approx([1, 1, 1.6, 0.8])
    found = worth(trials)
    assert found.penalty == pytest.approx(0.45 / 4)
    assert (found.worst.nbytes, found.least.nbytes) == (300, 300)
    assert found.over_default == pytest.approx(3.2 ** (1 / 4))
    assert found.over_native == pytest.approx(1.28 ** (1 / 4))


def test_the_luckiest_of_several_that_are_alike_is_not_the_best():
    rng = np.random.default_rng(4)
    us = {name: 10 * (1 + 0.5 * rng.random(16)) for name in [NATIVE, SHARED, *ALGORITHMS["allreduce"]]}
    rules, row = (Rule(None, (NATIVE, "tree")),), Row(4, False, NATIVE, us)
    lucky = max(row.ratio(NATIVE, name)[0] - 1 for name in us)
    assert trial(rules, row).penalty < 0.03 < 0.06 < lucky
    slow = trial(rules, row._replace(us={**us, NATIVE: 2 * us[NATIVE]}))
    assert slow.penalty == pytest.approx(1, abs=0.2)
