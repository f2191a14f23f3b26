"""The training loop, top to bottom."""

from collections.abc import Callable, Collection, Iterable
from dataclasses import asdict
from itertools import zip_longest
from math import fsum
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
from mpi4py import MPI

from ..errors import UserError
from ..mpi import gpu, launch
from ..mpi.collectives import allgather, allreduce, bcast
from ..mpi.together import on_all, on_root
from ..pipeline import PIPELINES
from ..tuning import WAYS
from .checkpoint import Checkpoint, save
from .data import Batches, Dataset, Part, normalized, rebalanced
from .models import Batch, Model
from .optimizers import OPTIMIZERS, SCHEDULES, learning_rate
from .parallel import Spent, Split
from .sent import finished
from .settings import DEVICES, DTYPES, MOMENTA, Settings, expected, flag, shown
from .strategies import STRATEGIES, Now
from .strategies.average import OUTER

BLOCK = 1024
"""Samples evaluated at once."""

FACTORS = "strategy.q"
"""In a checkpoint: with what PowerSGD begins the next time, for the matrices that a rank has a part of."""


CHOICES: dict[str, Collection[str]] = {
    "strategy": STRATEGIES,
    "optimizer": OPTIMIZERS,
    "schedule": SCHEDULES,
    "outer": OUTER,
    "momenta": MOMENTA,
    "dtype": DTYPES,
    "device": DEVICES,
    "pipeline": PIPELINES,
}


def check(settings: Settings) -> None:
    """A ``UserError`` for a setting that is out of range, or belongs to another strategy than the chosen one."""
    for name, value in asdict(settings).items():
        if value is not None and (wanted := expected(name, value)) is not None:
            raise UserError(f"{flag(name)} must be {wanted}, got {shown(value)}")
    for name, known in CHOICES.items():
        value = getattr(settings, name)
        if value is not None and value not in known:
            raise UserError(f"{flag(name)} must be one of {', '.join(known)}, got {value!r}")
    for name in {name: None for strategy in STRATEGIES.values() for name in strategy.options}:
        if getattr(settings, name) is not None and name not in STRATEGIES[settings.strategy].options:
            owners = ", ".join(other for other, strategy in STRATEGIES.items() if name in strategy.options)
            raise UserError(f"{flag(name)} is not for the {settings.strategy} strategy, but for {owners}: leave it out")
    if settings.device != "gpu" and settings.algorithm in WAYS:
        raise UserError(f"--algorithm {settings.algorithm} is for --device gpu: take another, or that device")


def check_split(settings: Settings) -> None:
    """A ``UserError`` for a setting that does not go with a model of which each rank has a part."""
    if not STRATEGIES[settings.strategy].in_step:  # they do not see the same samples in the same step
        others = ", ".join(name for name, strategy in STRATEGIES.items() if strategy.in_step)
        raise UserError(f"--grid with pipe or tensor is not for the {settings.strategy} strategy, but for {others}")


def weights_of(settings: Settings, p: int, sharded: bool) -> list[float] | None:
    """Of the ranks' shares of each batch to begin with, adding up to 1; ``None`` if they are even, and stay so."""
    given = settings.balance
    if given is None:
        return None
    for there, name, why in (
        (sharded, "--shards", "each rank has data of its own"),
        (settings.delays is not None, "--delays", "times are drawn"),
        (settings.staleness == "inf", "--staleness inf", "ranks take shares when they are ready"),
        (settings.strategy == "ad-psgd", "ad-psgd", "ranks take shares when they are ready"),
    ):
        if there:
            raise UserError(f"--balance has nothing to share out with {name}, where {why}: leave one of them out")
    if given == "auto":
        return p * [1 / p]
    try:
        weights = [float(weight) for weight in given.split(",")]
    except ValueError:
        weights = []
    if len(weights) != p or not all(0 < weight < np.inf for weight in weights):
        raise UserError(
            f"--balance must be auto, or {p} positive number(s), one for each rank, as 2,1,1; got {given!r}"
        )
    return normalized(weights)


class Epoch(NamedTuple):
    """After an epoch; ``seconds`` are those of training since it began, without evaluation and checkpoints.

    ``train_loss`` and ``train_accuracy`` are means over its samples, as they were seen; ``consensus`` is the root mean
    square distance of the ranks' models from their mean, ``None`` where they are the same by construction; those of
    the validation set are of the model that ranks agree on.  ``communicating`` is this rank's share of time in
    agreement, ``bytes_sent`` what it sent, as far as that can be known.  ``staleness`` says how many gradients, of all
    ranks, were taken at parameters 0, 1, 2, ... steps behind.  ``weights`` are the ranks' shares of its batches, where
    they are not even.
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
    """What a rank did since the run was started or resumed: seconds of training, of agreement, and of waiting.

    Waiting is the part of an agreement that goes beyond the time of the rank that got through it fastest: the last to
    arrive, which waits for nobody.  Where ranks do not agree all at once, it is waiting for messages; so it is between
    the stages of a pipeline.
    """

    seconds: float
    agreeing: float
    waiting: float
    bytes_sent: int | None
    messages: int | None


class Result(NamedTuple):
    """The outcome of a run, the same on all ranks: the model that they agree on at the end, or, with patience, the one
    that was best on the validation set; and what each rank did."""

    params: np.ndarray
    epochs: list[Epoch]
    steps: int
    algorithm: str
    consensus: float | None
    ranks: list[Rank]


class Training:
    """A run: ``run()`` it.  Made by all ranks together.

    The ranks share each global batch of ``settings.batch_size`` samples; how they agree is the strategy's affair.
    Every epoch visits all samples in a new order drawn from ``settings.seed``.  Of a ``Split`` model, ``comm`` are the
    ranks that have the same part of it, and all of its grid make this together.  With device ``gpu`` each rank takes a
    GPU, ``gpu`` says which one, and parameters, data and all else are in its memory; ``arrays`` is the library whose
    arrays they are.
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
        own_features = self.split.own_features if self.split else everything
        s, dtype = settings, np.dtype(settings.dtype)
        self.steps_per_epoch = -(-data.train.total // s.batch_size)
        self.gpu: gpu.Gpu | None = None
        self.arrays: Any = np
        if s.device == "gpu":
            self.gpu, self.arrays = gpu.take(self.world), gpu.cupy()
            self.data = on_all(self.world, lambda: moved(data, dtype, self.arrays, own_features))
            if s.algorithm in WAYS:
                on_all(self.world, self._try_algorithm)
        else:
            self.data = replaced(data, lambda part: part._replace(x=own_features(part.x)))
        params = model.initial(np.random.default_rng(s.seed), dtype)
        comm.Bcast(params, root=0)
        self.params = self.arrays.asarray(params)
        # Gradient, loss, correct predictions: what ranks may add up.
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
        """A ``UserError``, on all ranks that have the same part, unless it can do what is asked of it."""
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
        """Train to the end; ``report`` and ``checkpoint`` are called after each epoch, ``max_steps`` ends it early, and
        then there is no checkpoint.

        A loss or parameters that are not finite raise ``UserError`` on all ranks.
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
        return Result(self._whole(final), history, self.step, self.strategy.algorithm, distance, self._ranks())

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
                finished(grad)
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
        """Add up the times of the epoch's agreements, among them those on outputs and errors of ranks that hold a model
        together; returns this rank's seconds in them, of those that the epoch ``took``."""
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
        """With what is known of the model that ranks agree on; a new best one is kept."""
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
        """Has patience run out?"""
        patience = self.settings.patience
        return patience is not None and self.epoch - self.best[1] >= patience

    def _distance(self, model: np.ndarray) -> float | None:
        """Of the ranks' models from ``model``, root mean square."""
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

    # What a checkpoint keeps, and going on from one.  Of a split model that is the whole.

    def _is_long(self, name: str) -> bool:
        """Is that tensor as long as the parameters, in the last axis?"""
        return not name.startswith("strategy.") or name.removeprefix("strategy.") in self.strategy.vectors

    @property
    def _layout(self) -> str | None:
        """To which matrices PowerSGD's factors belong; ``None`` if it is to those of the whole model."""
        return self.split.layout if self.split else None

    def _whole(self, array: np.ndarray) -> np.ndarray:
        """All parts; a collective call."""
        return _by_rows(array, self.split.whole, self.split.model.size) if self.split else array

    def _part(self, array: np.ndarray) -> np.ndarray:
        """The opposite."""
        return _by_rows(array, self.split.part, self.split.size) if self.split else array

    def save(self, folder: Path, facts: dict[str, Any]) -> Path:
        """Write a checkpoint, a collective call; ``facts`` are what else it should say."""
        tensors = {"params": self.params}
        tensors |= {f"optimizer.{name}": vector for name, vector in self.optimizer.state.items()}
        tensors |= {f"strategy.{name}": array for name, array in self.strategy.state().items()}
        if self.best_params is not None:
            tensors["best"] = self.best_params
        tensors = {name: self._whole(array) if self._is_long(name) else array for name, array in tensors.items()}
        if self.split and FACTORS in tensors:
            tensors[FACTORS] = self.split.gathered(tensors[FACTORS])
        where = {
            "epoch": self.epoch,
            "step": self.step,
            "seconds": self.seconds,
            "optimizer_steps": self.optimizer.steps,
            "best": self.best if self.settings.patience is not None else None,
            "weights": self.weights,
            "ranks": self.comm.size,
            "meaning": self.strategy.meaning,
            "layout": self._layout,
        }
        writes = (self.comm.rank == 0 or not self.strategy.one_file) and (not self.split or self.split.grid.leads)
        return save(folder, self.world, {**where, **facts}, tensors, self.comm.rank if writes else None)

    def is_own(self, checkpoint: Checkpoint) -> bool:
        """Is what a rank had still its own?  Not with other ranks, nor if that has another ``meaning`` now."""
        facts, strategy = checkpoint.facts, self.strategy
        same = facts.get("meaning") == strategy.meaning
        if "meaning" not in facts:  # it is older, and what it means may depend on the graph
            same = facts["environment"].get("graph", strategy.digest) == strategy.digest
        return checkpoint.ranks == self.comm.size and same

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint, a collective call.

        Each rank takes what it had, or, if that ``is_own`` no longer, all take the mean of what there is.
        """
        facts, own = checkpoint.facts, self.is_own(checkpoint)
        vectors = ["params", *(f"optimizer.{name}" for name in self.optimizer.state)]

        def read(rank: int) -> dict[str, np.ndarray]:
            tensors = checkpoint.tensors(rank)
            size = (self.split.model if self.split else self.model).size
            if any(name not in tensors or tensors[name].shape != (size,) for name in vectors):
                raise UserError(
                    f"checkpoint {str(checkpoint.path)!r} is that of another model than {size} parameters: "
                    "were the data changed?"
                )
            return tensors

        def average() -> None:
            tensors = read(0)
            sums = {name: tensors[name].astype(np.float64) for name in vectors}
            for rank in range(1, checkpoint.ranks):
                others = read(rank)
                for name in vectors:
                    sums[name] += others[name]
            held.append({**tensors, **{name: total / checkpoint.ranks for name, total in sums.items()}})

        if own or len(checkpoint.files) == 1:
            tensors = on_all(self.world, lambda: read(self.comm.rank))
        else:  # rank 0 reads, or every file would be read by every rank
            held: list[dict[str, np.ndarray]] = []
            on_root(self.world, average)
            kinds = {name: (array.shape, array.dtype) for name, array in held[0].items()} if held else None
            kinds = self.world.bcast(kinds)
            tensors = held[0] if held else {name: np.empty(*kind) for name, kind in kinds.items()}
            for name in kinds:
                bcast(tensors[name], self.world)
        tensors = {name: self._part(array) if self._is_long(name) else array for name, array in tensors.items()}
        self.params[:] = self.arrays.asarray(tensors["params"])
        for name, vector in self.optimizer.state.items():
            vector[:] = np.asarray(tensors[f"optimizer.{name}"], like=vector)
        if FACTORS in tensors:
            begun = self.strategy.state()[FACTORS.removeprefix("strategy.")]
            if facts.get("layout") != self._layout:
                tensors[FACTORS] = begun  # those of other matrices are of no use
            elif self.split:
                tensors[FACTORS] = self.split.own(tensors[FACTORS], begun.size)
        state = {name.removeprefix("strategy."): tensors[name] for name in tensors if name.startswith("strategy.")}
        self.epoch, self.step, self.optimizer.steps = facts["epoch"], facts["step"], facts["optimizer_steps"]
        self.strategy.restore(state, own)
        self.seconds = self.resumed_seconds = facts["seconds"]
        if self.settings.balance == "auto" and len(facts.get("weights") or ()) == self.comm.size:
            self.weights = facts["weights"]
        self.begin_patience()  # it may be new
        if facts["best"] is not None and self.settings.patience is not None:
            loss, epoch = facts["best"]
            self.best = np.inf if loss is None else loss, epoch
            self.best_params = self.arrays.asarray(tensors["best"]) if "best" in tensors else None

    def begin_patience(self) -> None:
        """Know no best model of earlier epochs: those of other data, say."""
        self.best, self.best_params = (np.inf, self.epoch), None


def _by_rows(array: np.ndarray, convert: Callable[[np.ndarray], np.ndarray], size: int) -> np.ndarray:
    """A new array, of that size in the last axis."""
    rows = array.reshape(-1, array.shape[-1])
    found = np.empty((len(rows), size), array.dtype)
    for row, into in zip(rows, found, strict=True):
        into[:] = convert(row)
    return found.reshape(*array.shape[:-1], size)


def everything(x: Any) -> Any:
    """Of samples, what a rank that has a whole model needs."""
    return x


def replaced(data: Dataset, change: Callable[[Part], Part]) -> Dataset:
    """With other sets in place of the three, one after another."""
    train, validation, test = map(change, (data.train, data.validation, data.test))
    return data._replace(train=train, validation=validation, test=test)


def moved(data: Dataset, dtype: np.dtype, arrays: Any, own_features: Callable[[Any], Any] = everything) -> Dataset:
    """The same data in the memory of the GPU, which is found to be able to compute; of each set, what this rank needs
    is copied in host memory only while it is moved."""
    try:
        square = arrays.ones((2, 2), dtype)
        float((square @ square).sum())  # CuPy comes without what multiplies matrices, and finds it when it has to

        def there(part: Part) -> Part:
            x = own_features(part.x)
            x = arrays.asarray(x) if isinstance(x, np.ndarray) else gpu.sparse(x)
            return part._replace(x=x, y=arrays.asarray(part.y))

        return replaced(data, there)
    except MemoryError as error:
        raise UserError(
            f"the data are too large for the memory of the GPU ({error}): take --shards, or --device cpu"
        ) from error
    except (ImportError, RuntimeError) as error:
        why = " ".join(str(error).split())
        raise UserError(
            f"CuPy cannot compute here ({why}): if a library is missing, pip install 'cupy-cuda13x[ctk]', or cuda12x"
        ) from error


def added(histograms: Iterable[list[int]]) -> list[int]:
    """Of one length or several."""
    return [sum(counts) for counts in zip_longest(*histograms, fillvalue=0)]


@np.errstate(all="ignore")  # what overflows ends up in the loss
def evaluate(
    comm: MPI.Intracomm, model: Model, params: np.ndarray, part: Part, sharded: bool
) -> tuple[float, float] | tuple[None, None]:
    """Mean loss and accuracy on a set of samples, of which each rank takes its part; ``None`` if there are none."""
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
