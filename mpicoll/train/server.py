"""The arithmetic of a parameter server: what it does with gradients in the order in which they arrive.

No messages are sent here; ``strategies.asynchronous`` sends and receives them.
"""

import math
from collections.abc import Callable

import numpy as np

from ..mpi.shared import additions
from .optimizers import Optimizer
from .transfer import ordinary

HEAD = ("step", "samples", "length", "lr", "clock", "number", "share")
"""Numbers that go with a vector, in a message's first bytes."""


class Packet:
    """A message: a head of numbers, and a vector.

    A gradient is summed over ``samples``; its head has the ``step``, the ``length`` of that step's batch on all ranks,
    the learning rate, and the ``number`` of the answer at which it was taken.  With ``samples`` = -1 the worker has
    finished.  An answer holds parameters; its head has its ``number``, from 1; the ``clock``, the number of steps of
    which the parameters contain all gradients; the ``step`` that synchronous workers do next; and the ``share`` after
    the next, where workers take the next free share.

    It is in host memory allocated by ``memory``.
    """

    def __init__(self, count: int, dtype: np.dtype, memory: Callable[[int], np.ndarray] = ordinary) -> None:
        size = 8 * len(HEAD)
        self.raw = memory(size + count * dtype.itemsize)
        self._head, self.body = self.raw[:size].view(np.float64), self.raw[size:].view(dtype)

    def copy_head(self, other: "Packet") -> None:
        """Copy the head of another packet."""
        self._head[:] = other._head

    def say(self, **numbers: float) -> None:
        """Set some numbers of the head."""
        for name, number in numbers.items():
            self._head[HEAD.index(name)] = number

    def __getattr__(self, name: str) -> float:
        if name in HEAD:
            return float(self._head[HEAD.index(name)])
        raise AttributeError(name)


class Server:
    """The server of a part of the parameters, ``params[optimizer.part]``, to which ``workers`` send gradients.

    Everything is in host memory; ``memory`` allocates the answers.

    With a finite ``staleness`` s, a worker that has sent c gradients is answered once every other worker has sent c - s
    (stale-synchronous: Ho et al. 2013) or has finished.  With s = 0 all gradients of a step are summed in the canonical
    order and the optimizer steps once: synchronous SGD.  The server waits for all but ``backups`` of them, and drops
    those that arrive later (Chen et al. 2016).

    Otherwise each gradient is a step of its own when it arrives, as large as its share of a synchronous step: with p
    workers, the gradient is p times the sum over the worker's samples, divided by the length of the batch, and the
    learning rate is divided by p.  So without momentum p of them make a synchronous step, apart from the evaluation
    points.  If delay * p other gradients arrived in between, ``slow_down`` divides the learning rate by 1 + delay (as
    Zhang et al. 2016), and ``compensate`` times g g (w - v) is added to the gradient g, elementwise, where w are the
    current parameters and v those at which g was taken (DC-ASGD: Zheng et al. 2017).
    """

    def __init__(
        self,
        params: np.ndarray,
        optimizer: Optimizer,
        workers: int,
        staleness: float,
        *,
        backups: int = 0,
        compensate: float = 0.0,
        slow_down: bool = False,
        memory: Callable[[int], np.ndarray] = ordinary,
    ) -> None:
        self.params, self.optimizer, self.workers = params, optimizer, workers
        self.staleness, self.backups = staleness, backups
        self.compensate, self.slow_down = compensate, slow_down
        self._part = params[optimizer.part]
        self._grad, self._scratch = np.empty_like(params), np.empty_like(self._part)
        self._order = additions(workers) if workers > 1 else ()
        last = max((out for *_, out in self._order), default=workers)
        self._sums = [np.empty_like(self._part) for _ in range(workers, last)]
        self._zero = np.zeros_like(self._part)
        # Two answers of each worker: one that it may still compute with, and the one to be sent next.
        self._answers = [[Packet(len(self._part), params.dtype, memory) for _ in range(2)] for _ in range(workers)]
        self.begin(0)

    def begin(self, step: int, share: float = math.inf) -> None:
        """Begin an epoch: the gradients that follow were taken at ``params``, in ``step`` and later steps."""
        self.step, self.share = step, share
        self._first = step
        self.updates = 0
        self.clocks = [0] * self.workers
        self.finished = [False] * self.workers
        self._seen = [[0, 0] for _ in range(self.workers)]  # updates, in those answers
        self._numbers = [0] * self.workers
        self._held: dict[int, Packet] = {}  # gradients, not used yet
        self._waiting: set[int] = set()
        for answers in self._answers:
            answers[0].body[:] = self._part

    @property
    def clock(self) -> float:
        """The number of steps of which the parameters have every worker's gradient.

        Workers that have finished, and gradients that were dropped, do not count.
        """
        if self.staleness == 0:
            return self.step - self._first
        running = (clock for clock, done in zip(self.clocks, self.finished, strict=True) if not done)
        return min(running, default=math.inf)

    def finish(self, worker: int) -> list[int]:
        """A worker sends no more gradients; returns the workers to answer now."""
        self.finished[worker] = True
        return self._due()

    def take(self, worker: int, gradient: Packet) -> list[int]:
        """Take a gradient, which must not change until it is answered; returns the workers to answer now."""
        self.clocks[worker] += 1
        if self.staleness == 0:
            self._held[worker] = gradient
            return self._synchronous()
        if gradient.samples > 0:
            self._apply(worker, gradient)
        self._waiting.add(worker)
        return self._due()

    def answer(self, worker: int) -> Packet:
        """The current parameters for a worker, valid until the next answer but one to this worker."""
        number = self._numbers[worker] = self._numbers[worker] + 1
        self._seen[worker][number % 2] = self.updates
        packet = self._answers[worker][number % 2]
        packet.body[:] = self._part
        packet.say(number=number, clock=self.clock, step=self.step, share=self.share)
        self.share += 1
        return packet

    def _due(self) -> list[int]:
        latest = self.clock + self.staleness
        due = sorted(worker for worker in self._waiting if self.clocks[worker] <= latest)
        self._waiting.difference_update(due)
        return due

    def _apply(self, worker: int, gradient: Packet) -> None:
        grad, slot = self._grad[self.optimizer.part], int(gradient.number) % 2
        np.multiply(gradient.body, self.workers / gradient.length, out=grad)
        if self.compensate:
            np.subtract(self._part, self._answers[worker][slot].body, out=self._scratch)
            self._scratch *= self.compensate
            self._scratch *= grad
            self._scratch *= grad
            grad += self._scratch
        lr = gradient.lr / self.workers
        if self.slow_down:
            lr /= 1 + (self.updates - self._seen[worker][slot]) / self.workers
        self.optimizer.step(self.params, self._grad, lr)
        self.updates += 1

    def _synchronous(self) -> list[int]:
        """Do the steps for which there are enough gradients; returns the workers whose step is done."""
        while True:
            now = {worker: held for worker, held in self._held.items() if held.step == self.step}
            if len(now) < self.workers - self.backups:
                break
            grad, samples = self._grad[self.optimizer.part], sum(held.samples for held in now.values())
            operands = [now[worker].body if worker in now else self._zero for worker in range(self.workers)]
            operands += [grad, *self._sums]
            for lower, higher, out in self._order:
                np.add(operands[lower], operands[higher], out=operands[out])
            # A step of no samples is a step all the same: servers of other parts may have got others' gradients.
            np.multiply(operands[self.workers if self._order else 0], 1 / (samples or 1), out=grad)
            self.optimizer.step(self.params, self._grad, next(iter(now.values())).lr)
            self.step += 1
        due = sorted(worker for worker, held in self._held.items() if held.step < self.step)
        for worker in due:
            del self._held[worker]
        return due
