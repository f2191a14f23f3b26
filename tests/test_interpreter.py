import numpy as np
import pytest

from mpicoll.algorithms import ALGORITHMS, find
from mpicoll.interpreter import interpret_arrays
from schedules import assert_promised, census, everyone, exchange

ROWS = [row for rows in ALGORITHMS.values() for row in rows.values()]


@pytest.mark.parametrize("p", [*range(1, 9), 13, 16, 31, 32, 64])
@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.name}-{row.collective}")
def test_every_rank_ends_with_what_is_promised(row, p):
    for count in {0, 1, p - 1, p, p + 1, 97}:
        for root in {0, 1 % p, p - 1} if "root" in row.parameters else [None]:
            schedule = row.schedule(p, **({} if root is None else {"root": root}))
            vectors = [np.arange(count) * 3.0 + rank**2 for rank in range(p)]
            assert_promised(schedule, vectors, interpret_arrays(schedule, vectors, np.add))


@pytest.mark.parametrize("p", range(1, 65))
def test_the_canonical_algorithms_give_the_same_bits_however_the_vector_is_cut(p):
    vectors = [np.random.default_rng(rank).normal(size=67).astype("f4") for rank in range(p)]
    whole = interpret_arrays(find("allreduce", "recursive_doubling").schedule(p), vectors, np.add)[0]
    rows = [row for row in ALGORITHMS["allreduce"].values() if row.canonical]
    assert len(rows) == 3
    for row in rows:
        for cut in (0, 1, 30, 67):
            parts = [
                interpret_arrays(row.schedule(p), [v[part] for v in vectors], np.add)
                for part in (slice(cut), slice(cut, None))
            ]
            for first, second in zip(*parts, strict=True):
                np.testing.assert_array_equal(np.concatenate([first, second]).view("u4"), whole.view("u4"))
    if p == 16:  # the test can fail: other orders give other bits
        ring = interpret_arrays(find("allreduce", "ring").schedule(p), vectors, np.add)[0]
        assert not np.array_equal(ring, whole)


@pytest.mark.parametrize("schedule", [census(7), exchange(8), everyone(5)], ids=str)
def test_scratch_moves_and_several_reductions(schedule):
    vectors = [np.arange(11.0) + 10 * rank for rank in range(schedule.p)]
    before = [vector.copy() for vector in vectors]
    for result in interpret_arrays(schedule, vectors, np.add):
        np.testing.assert_array_equal(result, np.sum(vectors, axis=0))
    np.testing.assert_array_equal(vectors, before)


def test_an_unknown_algorithm_is_named_with_the_known_ones():
    with pytest.raises(
        ValueError, match=r"unknown allreduce algorithm 'rign': expected ring, .*double_tree, shared .*, or native"
    ):
        find("allreduce", "rign")
    with pytest.raises(ValueError, match="number of ranks must be at least 1, got 0"):
        find("allreduce", "ring").schedule(0)
    with pytest.raises(ValueError, match="ring allreduce has no parameter 'segments'"):
        find("allreduce", "ring").schedule(2, segments=1)
    for root in (-1, 3):
        with pytest.raises(ValueError, match=f"chain reduce: root must be one of 3 ranks, got {root}"):
            find("reduce", "chain").schedule(3, root=root)
    with pytest.raises(ValueError, match="double_tree allreduce: segments must be at least 1, got 0"):
        find("allreduce", "double_tree").schedule(2, segments=0)
