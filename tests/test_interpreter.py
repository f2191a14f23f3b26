import numpy as np
import pytest

from mpicoll.algorithms import ALGORITHMS, find
from mpicoll.interpreter import interpret_arrays
from schedules import census, everyone, exchange


@pytest.mark.parametrize("p", [*range(1, 9), 13, 16, 31, 32, 64])
@pytest.mark.parametrize("name", ALGORITHMS["allreduce"])
def test_every_rank_ends_with_the_exact_sum(name, p):
    for count in {0, 1, p - 1, p, p + 1, 97}:
        vectors = [np.arange(count) * 3.0 + rank**2 for rank in range(p)]
        for result in interpret_arrays(find("allreduce", name).schedule(p), vectors, np.add):
            np.testing.assert_array_equal(result, np.sum(vectors, axis=0))


@pytest.mark.parametrize("schedule", [census(7), exchange(8), everyone(5)], ids=str)
def test_scratch_moves_and_several_reductions(schedule):
    vectors = [np.arange(11.0) + 10 * rank for rank in range(schedule.p)]
    before = [vector.copy() for vector in vectors]
    for result in interpret_arrays(schedule, vectors, np.add):
        np.testing.assert_array_equal(result, np.sum(vectors, axis=0))
    np.testing.assert_array_equal(vectors, before)


def test_an_unknown_algorithm_is_named_with_the_known_ones():
    with pytest.raises(ValueError, match="unknown allreduce algorithm 'rign': expected ring, circulant, or native"):
        find("allreduce", "rign")
    with pytest.raises(ValueError, match="must be at least 1, got 0"):
        find("allreduce", "ring").schedule(0)
