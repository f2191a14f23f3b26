"""Which rule applies."""

from mpicoll.tuning.rules import Rule, preferred


def test_bounds_are_inclusive():
    rules = (Rule(10, ("a",)), Rule(20, ("b",)), Rule(None, ("c",)))
    assert [preferred(rules, n)[0] for n in (0, 10, 11, 20, 21, 1 << 50)] == ["a", "a", "b", "b", "c", "c"]
