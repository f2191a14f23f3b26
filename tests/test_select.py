"""What ``auto`` makes of what algorithms cost by the model, where nobody has measured."""

from itertools import pairwise

import pytest

from mpicoll.algorithms import ALGORITHMS, find
from mpicoll.collective import COLLECTIVES
from mpicoll.cost import CLUSTER, NODE
from mpicoll.mpi import select
from mpicoll.mpi.select import ahead, defaults, shortest, tuned
from mpicoll.tuning.rules import Rule, preferred


def able(collective: str, names: tuple[str, ...]) -> None:
    """Every call finds one."""
    rows = [ALGORITHMS[collective][name] for name in names if name in ALGORITHMS[collective]]
    assert any(not row.reduces or (row.canonical and row.rank_order) for row in rows), (collective, names)


@pytest.mark.parametrize("collective", COLLECTIVES)
@pytest.mark.parametrize(
    "where", [(True, False, True), (False, True, False), (False, False, False), (False, False, True)]
)
def test_defaults_are_complete_and_in_order(collective, where):
    for p in (1, 2, 3, 4, 7, 8, 64, 1000):
        rules = defaults(collective, p, *where)
        bounds = [rule.up_to for rule in rules]
        assert bounds[-1] is None
        assert all(low < high for low, high in pairwise(bounds[:-1]))
        for rule in rules:
            able(collective, rule.algorithms)
        assert all(one.algorithms != other.algorithms for one, other in pairwise(rules))
        assert preferred(rules, 0)[0] == "native"


def test_few_rounds_are_for_small_arrays_and_few_bytes_for_large_ones():
    for network in (NODE, CLUSTER):
        for p in (4, 8, 16, 64):
            rules = select._ours("allreduce", p, network)
            assert rules[0].algorithms[0] == "recursive_doubling"
            assert find("allreduce", rules[-1].algorithms[0]).sent(p) < 2
    assert preferred(defaults("allreduce", 8), 1 << 22)[0] == "native"
    assert preferred(defaults("allreduce", 8), select.LARGE[True])[0] != "native"
    assert preferred(defaults("allreduce", 8, one_node=False), select.LARGE[False] - 1)[0] == "native"
    assert preferred(defaults("allreduce", 8, one_node=False), select.LARGE[False])[0] != "native"
    shared = defaults("allreduce", 8, shares=True)
    at = select.SHARED_FROM["allreduce"]
    assert [preferred(shared, at + n)[0] for n in (-1, 0)] == ["native", "shared"]
    assert [preferred(defaults("bcast", 8, True), 1 << 30)[n] for n in (0, 1)] == ["shared", "native"]


def test_the_fewest_that_are_best_for_some_call():
    every = ["ring", "double_tree", "circulant", "tree", "recursive_doubling"]
    assert shortest("allreduce", every) == ("ring", "double_tree", "tree")
    assert shortest("allreduce", every[3:]) == ("tree",)
    assert shortest("bcast", ["chain", "tree"]) == ("chain",)


def test_names_are_put_ahead_between_bounds():
    rules = (Rule(10, ("a", "b")), Rule(20, ("c",)), Rule(None, ("b",)))
    assert ahead(rules, 0, None, "b") == (Rule(10, ("b", "a")), Rule(20, ("b", "c")), Rule(None, ("b",)))
    assert ahead(rules, 5, 16, "x", "a") == (
        *(Rule(4, ("a", "b")), Rule(10, ("x", "a", "b"))),
        *(Rule(15, ("x", "a", "c")), Rule(20, ("c",)), Rule(None, ("b",))),
    )
    assert ahead(rules, 0, 0, "x") == rules
    assert ahead(rules, 21, None, "x")[-1] == Rule(None, ("x", "b"))
    assert ahead(rules, 1000, None, "x")[2:] == (Rule(999, ("b",)), Rule(None, ("x", "b")))


def test_measured_moves_leave_arrays_in_shared_memory_their_way():
    rules = (Rule(None, ("tree",)),)
    at = select.SHARED_FROM["bcast"]
    assert tuned("bcast", rules, shares=False) == tuned("reduce", rules, shares=True) == rules
    assert tuned("bcast", rules, shares=True) == (Rule(at - 1, ("tree",)), Rule(None, ("shared", "native", "tree")))
