"""The interface between the training loop and a strategy, and what strategies have in common."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from time import perf_counter
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np

from ...algorithms import ALGORITHMS
from ...errors import UserError
from ...tuning.rules import GPU_PATHS, NATIVE
from ..compress import Code, Compressor, Tensors, compressor
from ..optimizers import clip
from ..traffic import COUNTED, Traffic
from ..transfer import synchronize

if TYPE_CHECKING:  # the command line lists the strategies without starting MPI
    from mpi4py import MPI

    from ..optimizers import Optimizer
    from ..settings import Settings


class Now(NamedTuple):
    """The position in training: the epoch, from 1; the number of steps done; the learning rate of this step."""

    epoch: int
    step: int
    lr: float


class Strategy(Traffic):
    """A strategy: how ranks combine gradients or models, when, and with which peers.

    In every step the loop evaluates the gradient at ``point()`` and calls ``step``, which lets ranks combine gradients,
    lets the optimizer change ``params``, and lets ranks combine these.  ``sums`` holds the gradient, summed over this
    rank's samples, and after it two more sums: the loss, and the number of correct predictions.

    ``seconds`` holds the time of each communication of this rank, waiting included, until the loop removes it;
    ``waits`` holds the part of each that is waiting, if a rank can measure it alone, which it must if ranks do not
    communicate equally often.  ``digest`` stands for all that bits depend on beside the settings.  Each batch has
    ``workers`` shares: as many as ranks, unless workers are simulated.  ``compressor`` is set if messages are
    compressed; it may need ``tensors``, those of the model.  ``clip`` is another function where ranks hold a part of
    the gradient only.

    ``meaning`` says what a rank's parameters and state stand for, if that depends on a setting that may change when a
    run is resumed.  If it differs from that of the checkpoint, or the number of ranks does, no rank continues with its
    own model: all ranks start from the mean of the models.
    """

    options: ClassVar[dict[str, Any]] = {}
    """The settings that belong to this strategy, and their defaults."""

    on_gpu = True
    """Whether the optimizer's state and residuals are on the GPU if the parameters are; otherwise in host memory."""

    replicated = False
    """Whether all ranks hold the same parameters and optimizer state at the end of an epoch."""

    in_step = True
    """Whether all ranks take part in every step and do not communicate in between."""

    vectors = ("anchor", "change", "residual", "known")
    """The names of arrays in the state whose last axis is as long as the parameters."""

    histogram: list[int] | None = None
    """The number of this rank's gradients in an epoch that were 0, 1, ... steps stale; ``None`` if none can be."""

    def __init__(
        self,
        comm: "MPI.Intracomm",
        sums: np.ndarray,
        params: np.ndarray,
        optimizer: "Optimizer",
        settings: "Settings",
        steps_per_epoch: int,
        tensors: Tensors | None = None,
    ) -> None:
        super().__init__()
        self.comm, self.p = comm, comm.size
        self.workers = self.p
        self.sums, self.params, self.optimizer = sums, params, optimizer
        self.settings, self.steps_per_epoch = settings, steps_per_epoch
        self.clip: Callable[[np.ndarray, float], float] = clip
        self.seconds: list[float] = []
        self.waits: list[float] | None = None
        self.digest = self.meaning = ""
        self.algorithm = settings.algorithm
        self.compressor: Compressor | None = None
        if settings.compress is not None:
            like = params if self.on_gpu else None
            self.compressor = compressor(settings.compress, params.size, params.dtype, tensors, settings.seed, like)

    def code(self, size: int | None = None) -> Code:
        """The compressor, which must be a ``Code``, for vectors of this size (by default its own).

        Raises ``UserError`` for a compressor that needs sums over all ranks.
        """
        found, s = self.compressor, self.settings
        if not isinstance(found, Code):
            raise UserError(
                f"--compress {s.compress} needs sums over all ranks, which {s.strategy} does not have: take 16bit, "
                "sign or topk"
            )
        return found if size is None else found.resized(size)

    def option(self, name: str) -> Any:
        """The value of a setting that belongs to this strategy, or its default."""
        given = getattr(self.settings, name)
        return self.options[name] if given is None else given

    def shares(self, first: int, last: int) -> Iterable[tuple[int, int]]:
        """The shares that this rank takes in the steps ``first`` to ``last - 1``, all in one epoch.

        A share is a step and the number of a worker; each step has ``workers`` of them.
        """
        return ((step, self.comm.rank) for step in range(first, last))

    def point(self) -> np.ndarray:
        """The evaluation point of the next gradient, shape (size,)."""
        return self.params

    def step(self, now: Now, samples: int, length: int) -> None:
        """Do a step of training, from the sums over this rank's ``samples`` of a batch of ``length`` on all ranks.

        Whether the loss is finite is not checked on a GPU, since that would wait for the GPU.
        """
        grad = self.sums[:-2]
        factor = self.agree_on_gradient(now) / length
        if factor != 1:
            part = grad[self.optimizer.part]
            part *= factor
        if self.replicated and isinstance(self.sums, np.ndarray) and not np.isfinite(self.sums[-2]):
            raise self.diverged(f"the loss became {self.sums[-2]}", now.epoch, now.step + 1)
        if self.settings.clip is not None:
            self.clip(grad, self.settings.clip)
        self.optimizer.step(self.params, grad, now.lr)
        self.agree_on_parameters(now)

    def diverged(self, what: str, epoch: int, step: int) -> UserError:
        """Return the error that ends training when numbers are not finite."""
        lr = self.settings.lr
        return UserError(f"{what} at step {step} (epoch {epoch}): try a smaller learning rate than {lr}")

    def agree_on_gradient(self, now: Now) -> int:
        """Combine the gradients of ranks, and return the factor that, over the batch length, makes ``sums`` a mean.

        The factor is 1 if ``sums`` now are those of all ranks, and p if they are this rank's own.  With p, every sample
        counts the same in the mean over ranks, however unevenly a batch is shared out, as long as the step is linear in
        the gradient, as that of SGD is.  Adaptive optimizers and clipping are not linear: for these no rank should
        always have more samples than the others, or none.
        """
        return self.p

    def agree_on_parameters(self, now: Now) -> None:
        """Combine the parameters of ranks, after the optimizer's step."""

    def consensus(self) -> np.ndarray:
        """The consensus model, a new array with the same bits on all ranks; a collective call."""
        return self.params.copy() if self.replicated else mean_of(self.comm, self.params)

    @property
    def one_file(self) -> bool:
        """Whether a checkpoint needs the file of rank 0 only: residuals differ between ranks even if models do not."""
        return self.replicated and not self.compressor

    def state(self) -> dict[str, np.ndarray]:
        """The arrays that a checkpoint keeps of the strategy, beside parameters and optimizer state."""
        return self.compressor.state if self.compressor else {}

    def restore(self, state: dict[str, np.ndarray], own: bool) -> None:
        """Continue from the ``state`` of a checkpoint, after ``params`` have been set.

        If ``own``, the state is this rank's.  Otherwise it is that of rank 0, and ``params`` are the mean over all
        ranks (see ``meaning``): arrays that differ between ranks, such as residuals, then start anew.
        """
        if self.compressor:
            for name, array in self.compressor.state.items():
                array[:] = np.asarray(state[name], like=array)
            if not own:
                self.compressor.residual[:] = 0

    @contextmanager
    def agreeing(self) -> Iterator[None]:
        """Time a communication.  On a GPU, first wait until the arrays to send are complete."""
        if self.p > 1:
            synchronize(self.params)
        with timed(self.seconds):
            yield

    def allreduce(self, arrays: Sequence[np.ndarray], op: str) -> None:
        """Allreduce all the arrays in one message, in place, by the algorithm that the settings name.

        By default sums are in the canonical order.  ``algorithm`` becomes the name of the algorithm that was used.
        """
        from ...mpi.collectives import allreduce
        from ...mpi.engine import last

        if len(arrays) > 1 and self.settings.device == "gpu":  # a list would be copied to host memory
            for array in arrays:
                self.allreduce([array], op)
            return
        named = self.settings.algorithm
        x = arrays[0] if len(arrays) == 1 else list(arrays)
        canonical = named == "auto"
        with self.agreeing():
            allreduce(x, self.comm, op, named, deterministic=canonical)
        done = last(self.comm)
        self.count_call(done)
        self.algorithm = done.algorithm

    def allgather(self, array: np.ndarray) -> np.ndarray:
        """Return the arrays of all ranks, shape (p, *array.shape); a collective call.

        The algorithm is the one that the settings name, if it is an allgather algorithm too.  Otherwise it is
        ``COUNTED`` for host arrays, whose traffic is known, and ``"auto"`` for arrays on GPUs.
        """
        from ...mpi.collectives import allgather
        from ...mpi.engine import last

        default, paths = (COUNTED, ()) if isinstance(array, np.ndarray) else ("auto", GPU_PATHS)
        named = self.settings.algorithm
        named = named if named in (*ALGORITHMS["allgather"], NATIVE, *paths) else default
        with self.agreeing():
            gathered = allgather(array, self.comm, algorithm=named)
        done = last(self.comm)
        self.count_call(done)
        self.algorithm = done.algorithm
        return gathered


@contextmanager
def timed(into: list[float]) -> Iterator[None]:
    """Append the seconds that the block takes to a list."""
    start = perf_counter()
    yield
    into.append(perf_counter() - start)


def mean_of(comm: "MPI.Intracomm", array: np.ndarray) -> np.ndarray:
    """Return the mean over all ranks, a new array with the same bits on all of them; a collective call."""
    from ...mpi.collectives import allreduce

    return allreduce(array.copy(), comm, "mean", deterministic=True)


def share_of(number: int, steps: range, workers: int) -> tuple[int, int] | None:
    """The step and the worker of the share with this number; ``None`` if all shares of the steps are taken."""
    step, rank = divmod(number, workers)
    return (steps[step], rank) if step < len(steps) else None


def drawn(seed: int, step: int, workers: int) -> list[Iterator[float]]:
    """The seconds that each simulated worker takes for each step, from ``step`` on.

    They are 0.5 plus an exponentially distributed number with mean 0.5.
    """

    def times(random: np.random.Generator) -> Iterator[float]:
        while True:
            yield 0.5 + random.exponential(0.5)

    return [times(np.random.default_rng([seed, step, worker])) for worker in range(workers)]
