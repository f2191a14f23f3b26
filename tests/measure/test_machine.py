"""What is known of the machine."""

from mpicoll.measure.machine import timer_resolution


def test_the_clock_is_finer_than_what_is_measured():
    assert 0 < timer_resolution() < 100
