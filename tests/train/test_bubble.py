"""The idle time of a pipeline's stages, from the seconds that batches took."""

import pytest

from records import bubble_of


def test_idle_is_what_is_left_of_a_batch_when_tasks_are_taken_off():
    one = bubble_of("gpipe", [15.0, 15.0, 15.0])
    assert (one["idle"], one["textbook"], one["ratio"], one["model"]) == pytest.approx((0.4, 0.4, 1, 0.4))
    assert (one["median"], one["n"], one["us"]) == (15e6, 3, [15e6] * 3)
    assert (one["held"], one["promised"]) == ([3, 3, 3], [3, 3, 3])
    slower = bubble_of("gpipe", [18.0, 20.0, 36.0])
    assert (slower["idle"], slower["ratio"]) == pytest.approx((1 - 9 / 20, (1 - 9 / 20) / 0.4))
    assert (slower["ratio_low"], slower["ratio_high"]) == pytest.approx((0.5 / 0.4, 0.75 / 0.4))
    assert bubble_of("1f1b", [15.0])["promised"] == [3, 2, 1]


def test_the_model_has_tasks_and_handoffs_take_what_they_took():
    """Of gpipe two handoffs fill the pipeline and two empty it; what a task takes longer counts ten times, forward and
    backward in each of five turns, and is a part of the handoff behind it."""
    assert bubble_of("gpipe", [17.0], handoff=0.5)["model"] == pytest.approx(1 - 9 / 17)
    assert bubble_of("gpipe", [20.0], late=0.5, handoff=0.5)["model"] == pytest.approx(1 - 9 / 20)
    assert bubble_of("gpipe", [21.0], late=0.25, calls=0.25, handoff=0.75)["model"] == pytest.approx(1 - 9 / 21)
