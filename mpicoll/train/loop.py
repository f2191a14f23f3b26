"""The training loop, top to bottom."""

from collections.abc import Callable, Iterable
from itertools import zip_longest
from math import fsum
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
from mpi4py import MPI

from ..errors import UserError
from ..mpi import launch
from ..mpi.collectives import allgather, allreduce
from ..mpi.gpu.array import cupy
from ..mpi.gpu.assignment import Gpu, take
from ..mpi.together import on_all
from ..tuning.rules import GPU_PATHS
from .batches import Batches, rebalanced
from .checks import check, check_split, weights_of
from .data import Dataset, Part
from .group import Spent
from .models import Batch, Model
from .optimizers import OPTIMIZERS, learning_rate
from .settings import Settings
from .split import Split
from .strategies import STRATEGIES, Now
from .transfer import on_gpu, synchronize

BLOCK = 1024
"""Samples evaluated at once."""


class Epoch(NamedTuple):
    """Measures of an epoch.  ``seconds`` are those of training since its beginning, without evaluation and checkpoints.

    ``train_loss`` and ``train_accuracy`` are means over its samples, as they were seen; ``validation_loss`` and
    ``validation_accuracy`` those of the model that ranks agree on.  ``consensus`` is the consensus distance: the root
    mean square distance of the ranks' models from their mean, ``None`` where they are the same by construction.
    ``communicating`` is the share of time that this rank spent in communication, ``bytes_sent`` what it sent, as far as
    that can be known.  ``staleness`` are the numbers of gradients, of all ranks, that were taken at parameters 0, 1, 2,
    ... steps behind.  ``weights`` are the ranks' shares of its batches, where they are not even.
    """

    epoch: int
    step: int
    seconds: float
    train_loss: float
    train_accuracy: float
    samples_per_s: float
    communicating: float
    bytes_sent: int | None
    staleness: list[int] | None = None
    consensus: float | None = None
    validation_loss: float | None = None
    validation_accuracy: float | None = None
    weights: list[float] | None = None


class Rank(NamedTuple):
    """Work of a rank since the run was started or resumed: seconds of training, of communication and of waiting in it.

    Waiting is the part of a communication beyond the time of the rank that got through it fastest: the last to arrive,
    which waits for nobody.  Where ranks do not communicate all at once, it is waiting for messages; so it is between
    the stages of a pipeline.
    """

    seconds: float
    agreeing: float
    waiting: float
    bytes_sent: int | None
    messages: int | None


class Result(NamedTuple):
    """The outcome of a run, the same on all ranks.

    The model is the consensus model at the end or, with patience, the best one on the validation set.
    """

    params: np.ndarray
    epochs: list[Epoch]
    steps: int
    algorithm: str
    consensus: float | None
    ranks: list[Rank]


class Training:
    """A training run, which ``run()`` carries out; making it is a collective call.

    The ranks of ``comm`` share each global batch of ``settings.batch_size`` samples; the strategy combines their
    gradients or models.  Every epoch visits all samples in a new order drawn from ``settings.seed``.  With a ``Split``
    model ``comm`` holds the ranks that have the same part of the model, and all ranks of the grid make the run
    together.  With device ``gpu`` each rank uses a GPU, which ``gpu`` describes, and everything is in its memory;
    ``arrays`` is the array library, NumPy or CuPy.
    """

    def __init__(self, comm: MPI.Intracomm, data: Dataset, model: Model, settings: Settings) -> None:
        check(settings)
        launch.check(comm)
        if settings.patience is not None and not data.validation.total:
            raise UserError("--patience needs validation samples: hold out a larger share, as with --validation 0.1")
        self.comm, self.data, self.model, self.settings = comm, data, model, settings
        self.weights = weights_of(settings, comm.size, data.sharded)
        self.split = model if isinstance(model, Split) else None
        self.world: MPI.Intracomm = self.split.grid.world if self.split else comm
        if self.split:
            check_split(settings)
        own_features: Callable[[Any], Any] = self.split.own_features if self.split else lambda x: x
        s, dtype = settings, np.dtype(settings.dtype)
        self.steps_per_epoch = -(-data.train.total // s.batch_size)
        self.gpu: Gpu | None = None
        self.arrays: Any = np
        if s.device == "gpu":
            self.gpu, self.arrays = take(self.world), cupy()
            self.data = on_all(self.world, lambda: on_gpu(data, dtype, self.arrays, own_features))
            if s.algorithm in GPU_PATHS:
                on_all(self.world, self._try_algorithm)
        else:
            self.data = data.mapped(lambda part: part._replace(x=own_features(part.x)))
        params = model.initial(np.random.default_rng(s.seed), dtype)
        comm.Bcast(params, root=0)
        self.params = self.arrays.asarray(params)
        # Gradient, loss, correct predictions: the numbers that ranks may sum.
        self.sums = np.empty(model.size + 2, dtype, like=self.params)
        self.optimizer = OPTIMIZERS[s.optimizer](
            model.size,
            dtype,
            momentum=s.momentum,
            beta2=s.beta2,
            weight_decay=s.weight_decay,
            like=self.params if STRATEGIES[s.strategy].on_gpu else params,
        )
        given = comm, self.sums, self.params, self.optimizer, settings, self.steps_per_epoch
        # What one part of a model is no good for ends the run on all ranks.
        self.strategy = on_all(self.world, lambda: STRATEGIES[s.strategy](*given, getattr(model, "tensors", None)))
        self.params, self.sums = self.strategy.params, self.strategy.sums  # where it has them
        if self.split:
            self.strategy.clip = self.split.clip
        self.epoch = self.step = 0
        self.seconds = self.resumed_seconds = self.agreeing = self.waiting = 0.0
        self.best = np.inf, 0  # validation loss, epoch
        self.best_params: np.ndarray | None = None

    def _try_algorithm(self) -> None:
        """Raise a ``UserError`` on all ranks of the same part unless the algorithm of the settings works here."""
        one = self.arrays.zeros(1, self.settings.dtype)
        try:
            allreduce(one, self.comm, algorithm=self.settings.algorithm)
            if self.settings.compress is not None:
                allgather(one, self.comm, algorithm=self.settings.algorithm)
        except ValueError as error:
            raise UserError(f"--algorithm {self.settings.algorithm}: {error}") from error

    @np.errstate(all="ignore")  # what overflows ends up in the loss or the parameters, and is reported
    def run(
        self,
        report: Callable[[Epoch], None] = lambda epoch: None,
        checkpoint: Callable[["Training"], Any] = lambda training: None,
        max_steps: int | None = None,
    ) -> Result:
        """Train to the end, and return the result.

        ``report`` and ``checkpoint`` are called after each epoch.  ``max_steps`` ends training early, without a
        checkpoint.  Raises ``UserError`` on all ranks if the loss or the parameters are not finite.
        """
        s, history = self.settings, []
        while self.epoch < s.epochs and self.step != max_steps and not self._is_done():
            before = self.step
            try:
                history.append(self._epoch(max_steps))
            except MemoryError as error:
                if self.gpu is None:
                    raise
                raise UserError(
                    f"the memory of {self.gpu} is full ({error}): take a smaller --batch-size, or fewer ranks on it"
                ) from error
            report(history[-1])
            if history[-1].step - before == self.steps_per_epoch:
                checkpoint(self)
        final = self.strategy.consensus()
        distance = self._distance(final)
        if self.best_params is not None:
            final = self.best_params
        return Result(self.whole(final), history, self.step, self.strategy.algorithm, distance, self._ranks())

    def _epoch(self, max_steps: int | None) -> Epoch:
        self.epoch += 1
        s, strategy, x, y = self.settings, self.strategy, self.data.train.x, self.data.train.y
        grad, loss, correct, samples = self.sums[:-2], np.float64(0), 0, 0  # sums over this rank's samples
        total_steps, sent = s.epochs * self.steps_per_epoch, strategy.bytes_sent
        if self.split:
            self.split.spent.clear()  # of evaluation
        start, computing = perf_counter(), 0.0
        batches = Batches(self.data, strategy.workers, s.batch_size, s.seed, self.epoch, self.weights)
        first = self.step
        last = first + batches.steps if max_steps is None else min(first + batches.steps, max_steps)
        for self.step, rank in strategy.shares(first, last):
            mine, length = batches.share(self.step - first, rank)
            lr = learning_rate(s.schedule, s.lr, self.step, total_steps, s.warmup)
            now = Now(self.epoch, self.step, lr)
            began = perf_counter()
            chosen = self.arrays.asarray(mine)
            own = self.model.loss_and_grad(strategy.point(), Batch(x[chosen], y[chosen]), grad)
            if s.balance == "auto":
                synchronize(grad)
            computing += perf_counter() - began
            self.sums[-2], self.sums[-1] = own
            strategy.step(now, len(mine), length)
            loss, correct, samples = loss + own.loss, correct + own.correct, samples + len(mine)
        self.step = last
        totals = np.array([float(loss), float(correct), samples])  # on a GPU, when all is done
        took = perf_counter() - start
        self.seconds += took
        agreeing, weights = self._account(took), self.weights
        if weights and s.balance == "auto":
            if self.split:  # which computes as fast as the slowest of the group
                computing = self.split.grid.group.allreduce(computing, MPI.MAX)
            self.weights = rebalanced(weights, self.comm.allgather((samples, computing)), self.data.train.total)
        loss, correct, seen = allreduce(totals, self.comm, deterministic=True)
        loss, correct = loss / seen, correct / seen
        if not np.isfinite(loss):
            raise strategy.diverged(f"the loss became {loss}", self.epoch, self.step)
        if not self.world.allreduce(bool(np.isfinite(self.params).all()), MPI.LAND):
            raise strategy.diverged("parameters became infinite or nan", self.epoch, self.step)
        return self._evaluated(
            Epoch(
                self.epoch,
                self.step,
                self.seconds,
                float(loss),
                float(correct),
                float(seen) / took,
                agreeing / took,
                None if strategy.bytes_sent is None or sent is None else strategy.bytes_sent - sent,
                self._staleness(),
                weights=weights,
            )
        )

    def _account(self, took: float) -> float:
        """Return this rank's seconds of communication in an epoch that took ``took`` seconds, and account for them.

        Communication between ranks that hold a model together is included.
        """
        strategy, seconds = self.strategy, np.array(self.strategy.seconds)
        if strategy.waits is None:
            fastest = seconds.copy()
            self.comm.Allreduce(MPI.IN_PLACE, fastest, MPI.MIN)
            waits = seconds - fastest
        else:
            waits = np.array(strategy.waits)
            strategy.waits.clear()
        strategy.seconds.clear()
        spent = self.split.spent if self.split else Spent()
        strategy.count(spent.bytes_sent, spent.messages)
        # Rounded once each, and likewise, so that a part is not more than the whole.
        agreeing, waiting = fsum(seconds) + spent.seconds, fsum(waits) + spent.waiting
        assert 0 <= waiting <= agreeing <= took, f"of {took} s of training {agreeing} s agreeing, {waiting} s waiting"
        self.agreeing += agreeing
        self.waiting += waiting
        return agreeing

    def _staleness(self) -> list[int] | None:
        if self.strategy.histogram is None:
            return None
        return added(self.comm.allgather(self.strategy.histogram))

    def _evaluated(self, epoch: Epoch) -> Epoch:
        """Add loss and accuracy of the consensus model to an epoch, and keep the best such model."""
        if self.strategy.replicated and not self.data.validation.total:
            return epoch
        model = self.strategy.consensus()
        epoch = epoch._replace(consensus=self._distance(model))
        if not self.data.validation.total:
            return epoch
        loss, accuracy = evaluate(self.comm, self.model, model, self.data.validation, self.data.sharded)
        if self.settings.patience is not None and loss is not None and loss < self.best[0]:
            self.best, self.best_params = (loss, self.epoch), model
        return epoch._replace(validation_loss=loss, validation_accuracy=accuracy)

    def _is_done(self) -> bool:
        """Whether patience has run out."""
        patience = self.settings.patience
        return patience is not None and self.epoch - self.best[1] >= patience

    def _distance(self, model: np.ndarray) -> float | None:
        """The root mean square distance of the ranks' models from ``model``; ``None`` if they are all the same."""
        if self.strategy.replicated:
            return None
        square = np.array([float(np.sum(np.square(self.strategy.point() - model, dtype=np.float64)))])
        allreduce(square, self.comm, "mean")
        if self.split:
            allreduce(square, self.split.grid.group)
        return float(np.sqrt(square[0]))

    def _ranks(self) -> list[Rank]:
        strategy = self.strategy
        seconds = self.seconds - self.resumed_seconds
        own = Rank(seconds, self.agreeing, self.waiting, strategy.bytes_sent, strategy.messages)
        return [Rank(*rank) for rank in self.world.allgather(tuple(own))]

    def whole(self, array: np.ndarray) -> np.ndarray:
        """Return the array of the whole model; this rank may hold a part of its last axis.  A collective call."""
        return self.split.whole(array) if self.split else array

    def begin_patience(self) -> None:
        """Forget the best model of earlier epochs, which may have been measured on other data."""
        self.best, self.best_params = (np.inf, self.epoch), None


def added(histograms: Iterable[list[int]]) -> list[int]:
    """Return the sum of histograms, which may differ in length."""
    return [sum(counts) for counts in zip_longest(*histograms, fillvalue=0)]


@np.errstate(all="ignore")  # what overflows ends up in the loss
def evaluate(
    comm: MPI.Intracomm, model: Model, params: np.ndarray, part: Part, sharded: bool
) -> tuple[float, float] | tuple[None, None]:
    """Return mean loss and accuracy on a set of samples, which ranks share out; ``None`` if there are none."""
    if not part.total:
        return None, None
    mine = len(part.y) if sharded else part.total
    lo, hi = (0, mine) if sharded else (mine * comm.rank // comm.size, mine * (comm.rank + 1) // comm.size)
    loss, correct, unused = np.float64(0), 0, np.empty_like(params)
    for start in range(lo, hi, BLOCK):
        block = slice(start, min(start + BLOCK, hi))
        own = model.loss_and_grad(params, Batch(part.x[block], part.y[block]), unused)
        loss, correct = loss + own.loss, correct + own.correct
    totals = np.array([float(loss), float(correct)])
    mean, right = (allreduce(totals, comm, deterministic=True) / part.total).tolist()
    return mean, right
