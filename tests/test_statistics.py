"""Medians, and how far the intervals around them reach."""

from math import comb

import numpy as np
import pytest

from mpicoll.statistics import median, median_ranks


@pytest.mark.parametrize("n", [6, 7, 10, 11, 30, 100, 199, 201, 1000])
def test_the_interval_of_the_median_covers_it_in_95_percent_and_no_shorter_one_does(n):
    def covers(low, high):  # more than low samples are below the median, and at most high
        return sum(comb(n, k) for k in range(low + 1, high + 1)) / 2**n

    low, high = median_ranks(n)
    assert low == n - 1 - high
    assert covers(low, high) >= (0.95 if n <= 200 else 0.945)
    assert covers(low + 1, high - 1) < 0.95


def test_where_no_interval_is_certain_enough_it_is_all_there_is():
    assert [median_ranks(n) for n in range(1, 6)] == [(0, n - 1) for n in range(1, 6)]


def test_the_median_of_known_samples():
    assert median(np.arange(101.0)[::-1]) == (50, 40, 60)
