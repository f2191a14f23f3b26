"""The training loop, top to bottom."""

from collections.abc import Callable
from time import perf_counter
from typing import NamedTuple

import numpy as np
from mpi4py import MPI

from ..errors import UserError
from .data import Dataset
from .models import Batch, Model
from .optimizers import OPTIMIZERS
from .strategies import STRATEGIES


class Epoch(NamedTuple):
    """After an epoch: means over its samples, as they were seen, and the seconds since training began."""

    epoch: int
    step: int
    seconds: float
    train_loss: float
    train_accuracy: float


class Result(NamedTuple):
    """The outcome of a run; seconds and bytes are this rank's.

    ``waiting_seconds`` is the part of ``agreement_seconds`` that this rank spent, in each step, beyond the rank that
    got through it fastest: the last to arrive, which waits for nobody.
    """

    params: np.ndarray
    steps: int
    seconds: float
    agreement_seconds: float
    waiting_seconds: float
    algorithm: str
    bytes_sent: int | None
    epochs: list[Epoch]


@np.errstate(all="ignore")  # what overflows ends up in the loss or the parameters, and is reported
def train(
    comm: MPI.Intracomm,
    data: Dataset,
    model: Model,
    *,
    strategy: str,
    algorithm: str,
    epochs: int,
    batch_size: int,
    lr: float,
    momentum: float,
    seed: int,
    max_steps: int | None = None,
    report: Callable[[Epoch], None] = lambda epoch: None,
) -> Result:
    """Train ``model`` with SGD on all ranks of ``comm``; every rank ends with the same parameters.

    ``batch_size`` is global: the ranks share each batch, and the run follows the one-rank run with the same seed
    whatever their number, to rounding.  Every epoch visits all samples in a new order drawn from ``seed``.
    ``report`` is called after each epoch; ``max_steps`` ends the run early.  A loss, or at the end a parameter, that
    is not finite raises ``UserError`` on all ranks.
    """
    p, rank = comm.size, comm.rank
    params = model.initial(np.random.default_rng(seed), data.x.dtype)
    comm.Bcast(params, root=0)
    sums = np.empty(model.size + 2, params.dtype)  # what ranks add up: gradient, loss, correct predictions
    grad = sums[: model.size]
    agreement = STRATEGIES[strategy](comm, algorithm, sums)
    optimizer = OPTIMIZERS["sgd"](model.size, params.dtype, momentum=momentum)

    samples, step, history = len(data.x), 0, []
    start = perf_counter()
    for epoch in range(1, epochs + 1):
        order = np.random.default_rng([seed, epoch]).permutation(samples)
        loss = correct = seen = 0.0
        for first in range(0, samples, batch_size):
            batch = order[first : first + batch_size]
            mine = batch[len(batch) * rank // p : len(batch) * (rank + 1) // p]
            sums[-2:] = model.loss_and_grad(params, Batch(data.x[mine], data.y[mine]), grad)
            agreement.add_up()
            step += 1
            if not np.isfinite(sums[-2]):
                raise UserError(
                    f"the loss became {sums[-2]} at step {step} (epoch {epoch}): try a smaller learning rate than {lr}"
                )
            grad /= len(batch)
            optimizer.step(params, grad, lr)
            loss, correct, seen = loss + float(sums[-2]), correct + float(sums[-1]), seen + len(batch)
            if step == max_steps:
                break
        history.append(Epoch(epoch, step, perf_counter() - start, loss / seen, correct / seen))
        report(history[-1])
        if step == max_steps:
            break
    seconds = perf_counter() - start
    if not np.isfinite(params).all():
        raise UserError(f"parameters became infinite or nan at step {step}: try a smaller learning rate than {lr}")
    agreeing = np.array(agreement.seconds)
    fastest = agreeing.copy()
    comm.Allreduce(MPI.IN_PLACE, fastest, MPI.MIN)
    waiting = float(np.sum(agreeing - fastest))
    spent = float(np.sum(agreeing))
    return Result(params, step, seconds, spent, waiting, agreement.algorithm, agreement.bytes_sent, history)


def accuracy(comm: MPI.Intracomm, model: Model, params: np.ndarray, x: np.ndarray, y: np.ndarray) -> float | None:
    """The share of ``x`` predicted right, each rank predicting its part; ``None`` if there are no samples."""
    part = slice(len(x) * comm.rank // comm.size, len(x) * (comm.rank + 1) // comm.size)
    right = comm.allreduce(int(np.count_nonzero(model.predict(params, x[part]) == y[part])))
    return right / len(x) if len(x) else None
