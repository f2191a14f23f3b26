"""Losses of a last layer whose outputs are cut over ranks."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from .group import Collectives
from .models import Loss, cross_entropy, hinge, log_loss


class Shard:
    """This rank's columns ``shard`` of the last layer's outputs; the other columns are on other ranks.

    Making it is a collective call of the ranks with the other columns.  For each sample ``highest`` is the highest of
    all outputs, and ``classes`` the first output that reaches it.
    """

    def __init__(self, outputs: np.ndarray, shard: slice, ranks: Collectives) -> None:
        self.outputs, self.shard, self.ranks = outputs, shard, ranks
        own = np.stack([outputs.max(axis=1), shard.start + outputs.argmax(axis=1)]).astype(np.float64)
        everyones = ranks.allgather(own)  # shape (shards, 2, samples)
        samples = np.arange(len(outputs), like=outputs)
        self.highest, classes = everyones[everyones[:, 0].argmax(axis=0), :, samples].T
        self.classes = classes.astype(np.int64)


def _cross_entropy(shard: Shard, y: np.ndarray) -> tuple[Any, np.ndarray]:
    """The cross-entropy of the softmax over all shards; see ``models.cross_entropy``."""
    outputs, own = shard.outputs, y - shard.shard.start
    outputs -= shard.highest[:, np.newaxis]
    error = np.exp(outputs)
    here = (own >= 0) & (own < outputs.shape[1])  # is the truth in this shard?
    truth = np.arange(len(y), like=y), np.where(here, own, 0)
    sums = np.stack([error.sum(axis=1), np.where(here, outputs[truth], 0)])
    normalizer, likelihood = shard.ranks.allreduce(sums)
    error /= normalizer[:, np.newaxis]
    error[truth] -= here
    return np.sum(np.log(normalizer) - likelihood, dtype=np.float64), error


def _separate(loss: Loss, shard: Shard, y: np.ndarray) -> tuple[Any, np.ndarray]:
    """Compute a ``loss`` that is a sum over outputs, one for each class."""
    own = y - shard.shard.start
    if shard.outputs.shape[1] == 1:  # which a loss would take for the one that stands for class 1 of two
        own = (own == 0).astype(y.dtype)
    part, error = loss(shard.outputs, own)
    return shard.ranks.allreduce(np.reshape(part, 1))[0], error


SHARDED: dict[Loss, Callable[[Shard, np.ndarray], tuple[Any, np.ndarray]]] = {
    cross_entropy: _cross_entropy,
    log_loss: partial(_separate, log_loss),
    hinge: partial(_separate, hinge),
}
"""By loss, the function that computes it where outputs are cut: from a shard and the classes to the loss over all
shards, and its gradient by the outputs of this one.  Collective calls."""
