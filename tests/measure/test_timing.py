"""When it has been measured for long enough."""

import numpy as np
import pytest

from mpicoll.measure.timing import Settings, is_enough


def rounds(*medians, spread=0.0, n=16):
    """So many repetitions of implementations that are spread evenly, and of the empty call, which is not looked at."""
    around = 1 + spread * np.linspace(-1, 1, n)
    return [np.array([*(middle * x for middle in medians), x**9]) for x in around]


@pytest.mark.parametrize(
    ("measured", "until", "expected"),
    [
        (rounds(5.0, n=9), 0.0, False),  # too few, however late it is
        (rounds(5.0, spread=0.9, n=10), 0.0, True),  # late
        (rounds(5.0, spread=0.9), 1e30, False),
        (rounds(5.0, 7.0, spread=0.01), 1e30, True),  # known well enough
        (rounds(5.0, 7.0, spread=0.01, n=15), 1e30, False),  # not looked at
        (rounds(5.0, 0.0, spread=0.9, n=10), 1e30, False),
    ],
)
def test_when_it_is_enough(measured, until, expected):
    assert is_enough(measured, len(measured[0]) - 1, Settings(min_reps=10, precision=0.02), until) is expected


def test_one_that_is_not_known_well_enough_keeps_all_going():
    steady, wild = rounds(5.0, spread=0.001), rounds(7.0, spread=0.9)
    both = [np.array([a[0], b[0], 1]) for a, b in zip(steady, wild, strict=True)]
    assert not is_enough(both, 2, Settings(), 1e30)
    assert is_enough(both, 1, Settings(), 1e30)
