"""Batches: who has which samples in which step, and shares by speed."""

import numpy as np
import pytest

from mpicoll.train.batches import Batches, normalized, rebalanced
from mpicoll.train.data import Dataset, Part
from mpicoll.train.readers.raw import Schema
from mpicoll.train.scaling import Scaling


def dataset(counts: tuple[int, ...], rank: int, sharded: bool = True) -> Dataset:
    here, total = counts[rank], sum(counts)
    start = sum(counts[:rank]) if sharded else 0
    train = Part(np.zeros((here, 2)), np.zeros(here, np.int64), start, total if sharded else here)
    none = Part(np.zeros((0, 2)), np.zeros(0, np.int64), 0, 0)
    return Dataset(train, none, none, Schema(2, np.arange(2)), Scaling.none(2), sharded, counts)


def taken(data, ranks, rank, batch_size, seed, epoch, weights=None):
    """Of a rank, in all steps of an epoch."""
    made = Batches(data, ranks, batch_size, seed, epoch, weights)
    return [made.share(step, rank) for step in range(made.steps)]


def epoch_of(counts, batch_size, epoch=1, seed=3):
    """For each rank, the steps of its epoch."""
    return [taken(dataset(counts, rank), len(counts), rank, batch_size, seed, epoch) for rank in range(len(counts))]


SHARDS = [(7,), (5, 5), (4, 9, 3), (0, 1, 0, 20), (1, 1, 1, 1, 1), (0, 0, 3), (100, 101), (13, 0, 2, 8, 1)]


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7, 16, 1000])
@pytest.mark.parametrize("counts", SHARDS)
def test_shards_come_once_an_epoch_in_steps_that_all_ranks_share(counts, batch_size):
    ranks, total = epoch_of(counts, batch_size), sum(counts)
    for count, steps in zip(counts, ranks, strict=True):
        assert len(steps) == -(-total // batch_size)
        np.testing.assert_array_equal(np.sort(np.concatenate([mine for mine, _ in steps])), np.arange(count))
        sizes = [len(mine) for mine, _ in steps]
        assert max(sizes) - min(sizes) <= 1
    for step in zip(*ranks, strict=True):
        whole = sum(len(mine) for mine, _ in step)
        assert {length for _, length in step} == {whole}
        assert 1 <= whole <= batch_size


def test_every_epoch_is_shuffled_anew_and_can_be_repeated():
    def orders(counts, **options):
        return [np.concatenate([mine for mine, _ in steps]).tolist() for steps in epoch_of(counts, 10, **options)]

    first = orders((30, 30))
    assert first == orders((30, 30))
    assert first[0] != first[1]
    assert first != orders((30, 30), epoch=2)
    assert first != orders((30, 30), seed=4)


@pytest.mark.parametrize("batch_size", [1, 3, 8, 30, 100])
def test_batches_of_data_that_all_ranks_hold_do_not_depend_on_their_number(batch_size):
    alone = taken(dataset((30,), 0, sharded=False), 1, 0, batch_size, 3, 1)
    np.testing.assert_array_equal(np.sort(np.concatenate([mine for mine, _ in alone])), np.arange(30))
    for ranks in (2, 3, 7, 40):
        data = dataset((30,) * ranks, 0, sharded=False)
        steps = list(zip(*(taken(data, ranks, rank, batch_size, 3, 1) for rank in range(ranks)), strict=True))
        assert len(steps) == len(alone)
        for (whole, length), shares in zip(alone, steps, strict=True):
            np.testing.assert_array_equal(np.sort(np.concatenate([mine for mine, _ in shares])), np.sort(whole))
            assert {size for _, size in shares} == {length} == {len(whole)}
        visited = [sum(len(step[rank][0]) for step in steps) for rank in range(ranks)]  # surpluses go round
        assert batch_size > 1 or max(visited) - min(visited) <= 1
    other = np.concatenate([mine for mine, _ in taken(dataset((30,), 0, sharded=False), 1, 0, batch_size, 3, 2)])
    assert other.tolist() != np.concatenate([mine for mine, _ in alone]).tolist()


WEIGHTS = [
    (1, 2),
    (1000, 1),
    (1, 1000),
    (2, 1, 1, 1),
    (1, 1e-9, 1e300),
    (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7),
    (3, 5) * 20,
]


def weighted(weights, samples, batch_size, epoch=1):
    """For each step, the parts of all ranks."""
    ranks = len(weights)
    data = dataset((samples,) * ranks, 0, sharded=False)
    return list(zip(*(taken(data, ranks, rank, batch_size, 3, epoch, weights) for rank in range(ranks)), strict=True))


@pytest.mark.parametrize("batch_size", [1, 3, 8, 64, 1000])
@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_weighted_shares_are_the_whole_batch_and_in_proportion(weights, batch_size):
    alone = taken(dataset((203,), 0, sharded=False), 1, 0, batch_size, 3, 1)
    steps, share = weighted(weights, 203, batch_size), np.array(normalized(weights))
    done = np.zeros(len(weights))
    for (whole, length), shares in zip(alone, steps, strict=True):
        np.testing.assert_array_equal(np.concatenate([mine for mine, _ in shares]), whole)
        assert {size for _, size in shares} == {length} == {len(whole)}
        lengths = np.array([len(mine) for mine, _ in shares])
        assert abs(lengths - share * length).max() < 1 + 1e-9
        done += lengths
    # What is rounded goes round: at random a rank would be off by about sqrt(steps) / 2, always down by steps / 2.
    assert abs(done - share * 203).max() < 3


def test_over_epochs_of_one_step_rounding_goes_round_as_well():
    """Of 10 samples rank 0 is to have 2.5, in each of 400 epochs."""
    lengths = [[len(mine) for mine, _ in weighted((1, 3), 10, 10, epoch)[0]] for epoch in range(400)]
    assert {length for length, _ in lengths} == {2, 3}
    assert np.mean([length for length, _ in lengths]) == pytest.approx(2.5, abs=0.1)


def test_a_share_may_be_empty():
    lengths = [len(shares[1][0]) for shares in weighted((1000, 1), 6000, 3)]
    assert set(lengths) == {0, 1}
    assert sum(lengths) == pytest.approx(6, abs=2)


def test_weights_may_be_large():
    assert normalized([1e308, 1e308, 5e307]) == pytest.approx([0.4, 0.4, 0.2])


@pytest.mark.parametrize("weight", [0.1, 7.0])
def test_equal_weights_are_even_shares(weight):
    data = dataset((100,) * 3, 0, sharded=False)
    for rank in range(3):
        even, other = taken(data, 3, rank, 7, 3, 1), taken(data, 3, rank, 7, 3, 1, [weight] * 3)
        for (mine, _), (same, _) in zip(even, other, strict=True):
            np.testing.assert_array_equal(mine, same)


def balanced(seconds, total=1000, epochs=30):
    """Shares in the end, if ranks take so many ``seconds`` for so many of ``total`` samples."""
    weights = [1 / len(seconds)] * len(seconds)
    for _ in range(epochs):
        samples = [int(weight * total) for weight in weights]
        weights = rebalanced(weights, [(n, took(n)) for n, took in zip(samples, seconds, strict=True)], total)
        assert sum(weights) == pytest.approx(1)
    return weights


def test_a_rank_twice_as_slow_gets_half_the_work():
    def linear(n):
        return 0.001 * n

    def slow(n):
        return 0.002 * n

    assert balanced([linear, slow]) == pytest.approx([2 / 3, 1 / 3], rel=0.01)
    assert balanced([slow, linear, linear]) == pytest.approx([1 / 5, 2 / 5, 2 / 5], rel=0.01)
    first = balanced([linear, slow], epochs=1)  # half of the way
    assert first == pytest.approx([7 / 12, 5 / 12])
    assert balanced([linear] * 4) == pytest.approx([1 / 4] * 4)


def test_time_that_does_not_depend_on_samples_is_time_all_the_same():
    """All take equally long in the end: 1 + n ms and 1 + 3 n ms."""
    fast, slow = balanced([lambda n: 1 + n, lambda n: 1 + 3 * n])
    assert fast * 1000 == pytest.approx(3 * slow * 1000, rel=0.02)
    fast, slow = balanced([lambda n: 100 + n, lambda n: 300 + n], epochs=100)
    assert 100 + fast * 1000 == pytest.approx(300 + slow * 1000, rel=0.02)


def test_none_is_left_without_samples_or_judged_by_too_few():
    _, slow = balanced([lambda n: 1e-6 * n, lambda n: 1.0 * n])
    assert slow * 1000 == pytest.approx(16, rel=0.05)
    assert rebalanced([0.7, 0.2, 0.1], [(700, 1.0), (7, 1.0), (0, 0.0)], 1000) == pytest.approx([0.7, 0.2, 0.1])
    assert rebalanced([0.5, 0.3, 0.2], [(500, 1.0), (7, 1.0), (200, 2.0)], 1000) == pytest.approx(
        [(0.5 + 0.7 * 5 / 6) / 2, 0.3, (0.2 + 0.7 / 6) / 2]
    )
    assert balanced([lambda n: n, lambda n: 9 * n, lambda n: n], total=20) == [1 / 3] * 3  # nothing can be told
