"""The steps of an epoch: which rank has which samples in each step, and how shares follow the speeds of ranks."""

from collections.abc import Sequence
from itertools import accumulate

import numpy as np

from .data import Dataset
from .readers.raw import share

MEASURED = 8
"""Fewer samples than this in an epoch do not tell how fast a rank is."""

GOLDEN = (5**0.5 - 1) / 2
"""Its multiples, modulo 1, are spread as evenly as those of any number."""


class Batches:
    """The steps of an epoch, and the share of each rank in their batches.

    Every sample comes once, in an order drawn from ``seed`` and ``epoch``; the last batch may be shorter.

    If every rank holds all samples, batches do not depend on the number of ranks, and each rank takes a slice of each
    batch: equal slices, or slices in proportion to ``weights``, one for each rank, which holds to within one sample in
    each step and exactly over many steps.  If data are sharded, each rank shuffles its shard and deals it out to the
    steps in turn, starting after the step at which the previous rank ended: the number of steps is that of unsharded
    data, and batches differ by at most one sample.
    """

    def __init__(
        self,
        data: Dataset,
        ranks: int,
        batch_size: int,
        seed: int,
        epoch: int,
        weights: Sequence[float] | None = None,
    ) -> None:
        self.steps = -(-data.train.total // batch_size)
        self._ends = None  # of the ranks' parts of a batch, as a whole of 1
        if weights and len(set(weights)) > 1:
            ends = [0.0, *accumulate(weights)]
            self._ends = [end / ends[-1] for end in ends]
        self._data, self._ranks, self._batch_size = data, ranks, batch_size
        self._order: dict[int, np.ndarray] = {}  # by rank, where each has its own
        self._seed = [seed, epoch]

    def share(self, step: int, rank: int) -> tuple[np.ndarray, int]:
        """The samples of ``data.train`` in a rank's share of a step, and the length of the batch on all ranks.

        Steps are counted from 0.  If data are sharded, a rank knows its own shares only.
        """
        total = self._data.train.total
        if not self._data.sharded:
            if not self._order:
                rng = np.random.default_rng(self._seed)
                self._order[0], self._phase = rng.permutation(total), rng.random()
            batch = self._order[0][step * self._batch_size :][: self._batch_size]
            if self._ends:
                phase = (self._phase + step * GOLDEN) % 1  # of rounding, up or down
                lo, hi = (int(end * len(batch) + phase) for end in self._ends[rank : rank + 2])
                return batch[lo:hi], len(batch)
            turn = (rank + step) % self._ranks  # no rank is always the one with a sample more, or fewer
            return batch[share(len(batch), turn, self._ranks)], len(batch)
        if rank not in self._order:
            self._order[rank] = np.random.default_rng([*self._seed, rank]).permutation(len(self._data.train.y))
        length = -(-(total - step) // self.steps)
        return self._order[rank][(step - self._data.train.start) % self.steps :: self.steps], length


def rebalanced(weights: Sequence[float], measured: Sequence[tuple[int, float]], total: int) -> list[float]:
    """The weights of ranks in the next epoch of ``total`` samples, which add up to 1.

    ``measured`` holds, for each rank, its samples in the last epoch and the seconds that it spent on them.  Weights
    move half of the way towards the ranks' speeds.  At the fixed point all ranks take the same time for a step, even if
    some of it does not depend on the number of samples.  A rank with too few samples for a measurement keeps its
    weight, and no weight becomes so small that the rank would have too few.
    """
    known = [rank for rank, (samples, seconds) in enumerate(measured) if samples >= MEASURED and seconds > 0]
    speeds = {rank: measured[rank][0] / measured[rank][1] for rank in known}
    theirs, whole = sum(weights[rank] for rank in known), sum(speeds.values())  # NumPy's sums depend on the machine
    new = [(w + speeds[rank] / whole * theirs) / 2 if rank in speeds else w for rank, w in enumerate(weights)]
    least = min(2 * MEASURED / total, 1 / len(weights))
    return normalized([max(weight, least) for weight in new])


def normalized(weights: Sequence[float]) -> list[float]:
    """Return the weights divided by their sum."""
    largest = max(weights)
    scaled = [weight / largest for weight in weights]  # of which the sum is finite
    return [weight / sum(scaled) for weight in scaled]
