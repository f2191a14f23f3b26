"""Samples that are held out: from each class its share."""

from fractions import Fraction

import numpy as np
import pytest
from mpi4py import MPI

from mpicoll.train.data import Dataset, load
from mpicoll.train.holdout import held_out

F8 = np.dtype("f8")

ORDERS: dict[str, np.ndarray] = {
    "of period 5": np.arange(100) % 5,
    "of period 10": np.arange(200) % 10,
    "sorted": np.sort(np.arange(97) % 4),
    "rare": np.array([0] * 80 + [1] * 5 + [2] * 2 + [3]),
    "rarest": np.arange(30) // 2,
    "one of each": np.arange(20),
    "at random": np.random.default_rng(0).choice(6, 500, p=[0.5, 0.3, 0.1, 0.05, 0.03, 0.02]),
    "with a gap": np.arange(60) % 3 * 2,
    "of two": np.array([0, 1]),
}
"""Classes, in the order of samples."""


@pytest.mark.parametrize("share", [0.0, 0.1, 0.2, 0.25, 1 / 3, 0.5, 0.7, 0.9])
@pytest.mark.parametrize("order", ORDERS)
def test_every_class_gives_its_share_and_none_gives_all(order, share):
    y = ORDERS[order]
    counts = np.bincount(y)
    for seed in range(20):
        drawn = held_out(y, len(counts), share, [seed, 1], MPI.COMM_SELF)
        of_each = np.bincount(y[drawn], minlength=len(counts))
        np.testing.assert_array_less(of_each[counts > 0], counts[counts > 0])
        assert abs(of_each - share * counts).max() < 2
        small = np.count_nonzero((counts > 0) & ((counts <= 2) | (share > 0.5)))  # they may have got one back
        missing = int(Fraction(share).limit_denominator(100) * len(y)) - np.count_nonzero(drawn)
        assert 0 <= missing <= small


def test_each_sample_is_drawn_as_often_as_any_other():
    y = np.array([0] * 23 + [1] * 14)
    times = sum(held_out(y, 2, 0.2, [seed, 1], MPI.COMM_SELF).astype(int) for seed in range(1000))
    assert abs(times[:35] - 200).max() < 4 * np.sqrt(1000 * 0.2 * 0.8)
    assert times[35:].tolist() == [0, 0]  # they are no whole piece


def test_the_split_goes_by_classes_and_seed(tmp_path):
    x, y = np.arange(60.0).reshape(60, 1), np.arange(60) % 2
    np.savez(tmp_path / "d.npz", X=x, y=y)

    def split(**given) -> tuple[Dataset, list[list[int]]]:
        data = load(str(tmp_path / "d.npz"), MPI.COMM_SELF, F8, **given)
        x = [np.round(part.x * data.scaling.spread + data.scaling.center) for part in data[:3]]
        for part, numbers in zip(data[:3], x, strict=True):
            np.testing.assert_array_equal(part.y, numbers.ravel() % 2)
        return data, [numbers.astype(int).ravel().tolist() for numbers in x]

    data, numbers = split(validation=0.1)
    assert [part.total for part in data[:3]] == [44, 4, 12]
    assert sorted(n for part in numbers for n in part) == list(range(60))
    assert all(part == sorted(part) for part in numbers)
    assert (data.counts, data.sharded, data.train.start) == ((44,), False, 0)
    assert split(validation=0.1)[1] == split(validation=0.1, test_share=0.2)[1] == numbers
    assert split(validation=0.4)[1][2] == numbers[2]  # the test set is the same
    others = [split(validation=0.1, seed=seed)[1] for seed in (1, 2**63)]
    assert len({str(part[n]) for n in (1, 2) for part in (numbers, *others)}) == 6
    assert [part.total for part in split(validation=1 / 3)[0][:3]] == [32, 16, 12]
    assert [part.total for part in split(test_share=0.45)[0][:3]] == [33, 0, 27]
    assert [part.total for part in split(test_share=0)[0][:3]] == [60, 0, 0]
    # The scaling is that of the training samples alone.
    np.testing.assert_allclose(np.ptp(data.train.x), 2)
    np.testing.assert_allclose(data.train.x.mean(), 0, atol=1e-15)
