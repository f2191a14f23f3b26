"""What the training loop asks of a strategy, and what strategies have in common."""

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
    """Where training is: the epoch, from 1; the steps done before this one; and its learning rate."""

    epoch: int
    step: int
    lr: float


class Strategy(Traffic):
    """How ranks agree: on what, when, and with whom.

    For every step the loop takes the gradient at ``point()`` and calls ``step``, which lets ranks agree on it, has the
    optimizer change ``params``, and lets them agree on those.  ``sums`` is what it finds there: the gradient, summed
    over this rank's samples, and two numbers more, which add up likewise: the loss, and the correct predictions.

    ``seconds`` holds the time of each agreement of this rank, waiting for others included, until the loop takes them
    out; ``waits`` those parts of it that are nothing but waiting, where a rank can tell them by itself, which it must
    if not all ranks agree equally often; what it has sent counts up.  ``digest`` stands for what bits depend on beside
    settings.  ``workers`` have a share of each batch: as many as there are ranks, unless some are simulated.
    ``compressor`` is there if ranks are to send less than they have; it may need ``tensors``, the model's.  ``clip`` is
    another one where ranks have a part of the gradient only.

    ``meaning`` is what a rank's parameters and state stand for, if that follows from a setting that may change when a
    run is resumed.  Where it is not that of the checkpoint, or the number of ranks is not, nobody goes on with what was
    its own: all ranks begin with the mean of the models.
    """

    options: ClassVar[dict[str, Any]] = {}
    """Settings that are this strategy's, and what they are by default."""

    on_gpu = True
    """Where parameters are on a GPU, are the optimizer's state and residuals, too?  Else they are in host memory."""

    replicated = False
    """Do all ranks hold the same parameters, and optimizers, at the end of an epoch?"""

    in_step = True
    """Do all ranks take part in every step, and have nothing to do with each other in between?"""

    vectors = ("anchor", "change", "residual", "known")
    """Of its state, what is as long as the parameters in the last axis."""

    histogram: list[int] | None = None
    """Of this rank's gradients in an epoch, where they may be stale: how many were so by 0, 1, ... steps."""

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
        """The compressor, which has to be one that works for each rank by itself; or another such, for that size."""
        found, s = self.compressor, self.settings
        if not isinstance(found, Code):
            raise UserError(
                f"--compress {s.compress} adds up over all ranks, which {s.strategy} does not: take 16bit, sign or topk"
            )
        return found if size is None else found.resized(size)

    def option(self, name: str) -> Any:
        """A setting of this strategy's own, or its default."""
        given = getattr(self.settings, name)
        return self.options[name] if given is None else given

    def shares(self, first: int, last: int) -> Iterable[tuple[int, int]]:
        """Of the steps from ``first`` to before ``last``, all in one epoch: those in which this rank takes a share of
        the batch, and whose it is.  There are ``workers`` shares of each."""
        return ((step, self.comm.rank) for step in range(first, last))

    def point(self) -> np.ndarray:
        """Where to take the gradient, shape (size,)."""
        return self.params

    def step(self, now: Now, samples: int, length: int) -> None:
        """A step of training, from the sums over this rank's ``samples`` of a batch of ``length`` on all ranks.

        A loss on a GPU is not looked at, which would be to wait for it.
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
        """The error that ends training when numbers are not finite."""
        lr = self.settings.lr
        return UserError(f"{what} at step {step} (epoch {epoch}): try a smaller learning rate than {lr}")

    def agree_on_gradient(self, now: Now) -> int:
        """Returns by what to multiply the sums, beside dividing them by the length of the whole batch, to have a mean:
        1 if they are those of all ranks now, p if they are this rank's, on average a p-th.

        With p, every sample counts the same however unevenly a batch is shared out: in the mean of what ranks do with
        their gradients, as long as that is linear in them, as SGD's step is.  Adaptive rules and clipping are not; for
        them it matters that no rank always has more samples than others, nor always none.
        """
        return self.p

    def agree_on_parameters(self, now: Now) -> None:
        """After the optimizer's step."""

    def consensus(self) -> np.ndarray:
        """The model that all ranks would agree on now, the same bits on all of them; a new array, a collective call."""
        return self.params.copy() if self.replicated else mean_of(self.comm, self.params)

    @property
    def one_file(self) -> bool:
        """Does what rank 0 holds do for a checkpoint?  Residuals are each rank's own, be the models the same."""
        return self.replicated and not self.compressor

    def state(self) -> dict[str, np.ndarray]:
        """What a checkpoint keeps of it, beside parameters and the optimizer's state."""
        return self.compressor.state if self.compressor else {}

    def restore(self, state: dict[str, np.ndarray], own: bool) -> None:
        """Go on from what ``state`` was, when ``params`` are there.

        It is this rank's ``own``; or else rank 0's, and ``params`` are the mean of all ranks' (see ``meaning``): what
        each rank has for itself, as residuals, then begins anew.
        """
        if self.compressor:
            for name, array in self.compressor.state.items():
                array[:] = np.asarray(state[name], like=array)
            if not own:
                self.compressor.residual[:] = 0

    @contextmanager
    def agreeing(self) -> Iterator[None]:
        """Around an agreement; on a GPU it begins when what is to be agreed on is there."""
        if self.p > 1:
            synchronize(self.params)
        with timed(self.seconds):
            yield

    def allreduce(self, arrays: Sequence[np.ndarray], op: str) -> None:
        """All of them at once, in place, by the algorithm that the settings name; by default in the canonical order,
        by whatever algorithm that takes, whose name is ``algorithm`` then."""
        from ...mpi.collectives import allreduce
        from ...mpi.engine import last

        if len(arrays) > 1 and self.settings.device == "gpu":  # a list would go by way of the host
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
        """The arrays of all ranks, shape (p, *array.shape), by the algorithm that the settings name, if there is one
        of that name; else by ``COUNTED``, or on GPUs by the path that is best."""
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
    """Put the seconds that it takes into a list: of what is timed within another one, never more than of that."""
    start = perf_counter()
    yield
    into.append(perf_counter() - start)


def mean_of(comm: "MPI.Intracomm", array: np.ndarray) -> np.ndarray:
    """The mean over all ranks, a new array with the same bits on all of them."""
    from ...mpi.collectives import allreduce

    return allreduce(array.copy(), comm, "mean", deterministic=True)


def share_of(number: int, steps: range, workers: int) -> tuple[int, int] | None:
    """Where workers take what is left: the step and the rank of a share, by its number; none if all are taken."""
    step, rank = divmod(number, workers)
    return (steps[step], rank) if step < len(steps) else None


def drawn(seed: int, step: int, workers: int) -> list[Iterator[float]]:
    """In simulations: how long a step takes each worker, from this step on.

    Half a second, and half a second more on average, exponentially distributed.
    """

    def times(random: np.random.Generator) -> Iterator[float]:
        while True:
            yield 0.5 + random.exponential(0.5)

    return [times(np.random.default_rng([seed, step, worker])) for worker in range(workers)]
