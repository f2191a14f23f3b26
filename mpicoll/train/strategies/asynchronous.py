"""Asynchronous SGD with bounded staleness.

Every rank trains, and every rank is the parameter server of a part of the parameters.  The gradient of a step is sent
to all servers, and their answers are used from the next step on, or from the one after, so that messages travel while
ranks compute.  All messages are point to point; a thread answers those for the server while its rank computes.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from heapq import heappop, heappush
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from ...errors import UserError
from ..compress import Code
from ..optimizers import clip
from ..transfer import load, memory_for, store, synchronize
from .base import Now, Strategy, drawn, share_of
from .exchange import Exchange
from .staleness import Staleness

if TYPE_CHECKING:  # the command line lists the strategies without starting MPI
    from mpi4py import MPI

    from ..server import Server


class Async(Strategy):
    """Asynchronous SGD through parameter servers, with bounded staleness (stale-synchronous: Ho et al. 2013).

    No rank is more than ``staleness`` steps ahead of another: the parameters at which it takes a gradient contain all
    gradients of all ranks up to that many steps before.  With ``inf`` there is no bound.  ``server.Server`` describes
    what servers do with gradients.

    With staleness 0 it is synchronous SGD, with the same bits unless gradients are clipped (here each rank clips its
    own); ``backups`` is the number of gradients of a step that are not waited for.  With ``inf`` ranks take the next
    free share of a batch when they are ready, unless data are sharded: a faster rank takes more shares.  All ranks wait
    for each other at the end of an epoch.

    With ``compress`` a rank sends each server a code of its gradient, and keeps the residual.  Answers are not
    compressed.

    Servers and residuals are in host memory.  If gradients are computed on a GPU, they are copied from there in every
    step, and the next evaluation point is copied back.

    ``delays`` is the seed of a simulation, in which each rank plays some of the ``workers``.  The times of steps are
    drawn at random, messages take no time, and events happen in that order: the run has the same bits on any number of
    ranks, if they compute the same gradients.
    """

    options: ClassVar = {
        "staleness": "4",
        "backups": 0,
        "compensate": 0.0,
        "slow_down": False,
        "delays": None,
        "workers": None,
        "compress": None,
    }
    on_gpu = False
    replicated = True
    in_step = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        from ...mpi.request import cuts_of
        from ..server import Server

        super().__init__(*args, **kwargs)
        self.bound = self._bound()
        self.seed = self.option("delays")
        if self.seed is not None:
            self.workers = self.option("workers") or self.p
        backups, compensate, slow_down = (self.option(name) for name in ("backups", "compensate", "slow_down"))
        self._check(backups, compensate, slow_down)
        memory = memory_for(self.params)
        self._held = memory(self.params.nbytes).view(self.params.dtype)  # the server's parameters
        self._cuts = cuts_of(None, len(self.params), self.p)
        if self.seed is None:
            self.optimizer.part = slice(*self._cuts[self.comm.rank :][:2])
        rules = {"backups": backups, "compensate": compensate, "slow_down": slow_down, "memory": memory}
        self.server = Server(self._held, self.optimizer, self.workers, self.bound, **rules)
        self.staleness = Staleness(self.bound, dropping=bool(backups))
        self.histogram = self.staleness.histogram
        given: dict[str, Any] = {
            "pooled": self.bound == math.inf and not self.settings.shards,
            "memory": memory,
            "staleness": self.staleness,
            "agreeing": self.agreeing,
            "count": self.count,
        }
        self._run: Exchange | _Simulation
        if self.seed is None:
            self._run = Exchange(self.comm, self.server, self.params, self._cuts, self._codes(), **given)
            self.waits = self._run.transport.waits
        else:
            self._run = _Simulation(self.comm, self.server, self.params, self.seed, **given)
        self.algorithm = f"{'simulated ' if self.seed is not None else ''}parameter server, staleness {self.bound:g}"

    def _bound(self) -> float:
        given = str(self.option("staleness"))
        if given != "inf" and not (given.isascii() and given.isdigit()):
            raise UserError(f"--staleness must be a whole number of steps, or inf, got {given!r}")
        return float(given)

    def _check(self, backups: int, compensate: float, slow_down: bool) -> None:
        if backups and self.bound:
            raise UserError(
                f"--backups {backups} is for synchronous steps, of which late gradients are dropped: take --staleness 0"
            )
        if self.seed is not None and self.compressor:
            raise UserError("--compress is not for --delays, where nothing is sent to a server: leave one of them out")
        if self.compressor and self.params.size < self.p:
            raise UserError(f"--compress needs a parameter for each of {self.p} ranks at least, got {self.params.size}")
        if backups >= self.workers:
            raise UserError(f"--backups must be fewer than the {self.workers} worker(s), got {backups}")
        if self.bound == 0 and (compensate or slow_down):
            name = "compensate" if compensate else "slow-down"
            raise UserError(f"--{name} is for gradients that are late, and with --staleness 0 none is: leave it out")
        if self.seed is None and self.option("workers") is not None:
            raise UserError("--workers is for simulated ones: give --delays as well, or more ranks")
        if self.workers > max(self.p, self.settings.batch_size):
            raise UserError(f"--workers must be as many as a batch has samples at most, got {self.workers}")
        if self.settings.shards and self.workers != self.p:
            raise UserError(f"--shards gives each of {self.p} rank(s) data of its own: --workers must be as many")

    def _codes(self) -> list[Code]:
        """A code for the part of each server, which shares that part of the residual; empty without compression."""
        if not self.compressor:
            return []
        residual, codes = self.code().residual, []
        for lo, hi in pairwise(self._cuts):
            codes.append(self.code(hi - lo))
            codes[-1].residual = residual[lo:hi]
        return codes

    def point(self) -> np.ndarray:
        """The evaluation point of the next gradient."""
        return self._run.point

    def shares(self, first: int, last: int) -> Iterator[tuple[int, int]]:
        """Yield this rank's shares of the steps, and gather the parameters from all servers at the end."""
        load(self._held, self.params)
        synchronize(self.params)
        self.staleness.histogram.clear()
        self.server.begin(first, 2 * self.workers)
        yield from self._run.shares(range(first, last))
        if self.seed is None:
            self._gather()
        store(self.params, self._held)

    def _gather(self) -> None:
        """Gather the parameters, and the optimizer's state, from the servers of all parts."""
        name, parts = self.algorithm, [slice(lo, hi) for lo, hi in pairwise(self._cuts)]
        longest = max(part.stop - part.start for part in parts)
        for vector in (self._held, *self.optimizer.state.values()):
            own = vector[self.optimizer.part]
            rows = self.allgather(np.resize(own, longest) if len(own) else np.zeros(longest, vector.dtype))
            for part, row in zip(parts, rows, strict=True):
                vector[part] = row[: part.stop - part.start]
        self.algorithm = name  # not that of the allgather

    def step(self, now: Now, samples: int, length: int) -> None:
        """Send this rank's own gradient to the servers, and take new parameters."""
        grad = self.sums[:-2]
        if self.settings.clip is not None and samples:
            clip(grad, self.settings.clip * samples)
        if self.compressor:  # the residual of one batch is to count as much in the next, however short
            grad /= length
            self._run.step(grad, now, samples / length, 1.0)
        else:
            self._run.step(grad, now, samples, length)


class _Simulation:
    """A simulation on any number of ranks: every rank is a server of all parameters, and plays some of the workers.

    The seconds of a worker's step are ``drawn`` from ``seed``; messages take no time.
    """

    def __init__(
        self,
        comm: "MPI.Intracomm",
        server: "Server",
        params: np.ndarray,
        seed: int,
        *,
        pooled: bool,
        memory: Callable[[int], np.ndarray],
        staleness: Staleness,
        agreeing: Callable[[], AbstractContextManager[None]],
        count: Callable[[int | None, int | None], None],
    ) -> None:
        from ..server import Packet

        self.point = params
        self._comm, self._server, self._params, self._seed = comm, server, params, seed
        self._pooled, self._staleness, self._agreeing, self._count = pooled, staleness, agreeing, count
        self._packets = [Packet(len(params), params.dtype, memory) for _ in range(server.workers)]

    def shares(self, steps: range) -> Iterator[tuple[int, int]]:
        """Yield this rank's shares of the steps, in the order of the simulated events."""
        server, workers, first = self._server, self._server.workers, steps.start
        times = drawn(self._seed, first, workers)
        views, numbers, clocks = [server.params.copy() for _ in times], [0] * workers, [0.0] * workers
        pool, done = itertools.count(), [0] * workers
        running: list[tuple[float, int, tuple[int, int]]] = []  # a heap of (end, worker, share)

        def begin(now: float, worker: int, step: int) -> None:
            own = (step, worker) if step < steps.stop else None
            share = share_of(next(pool), steps, workers) if self._pooled else own
            if share is None:
                answer(now, server.finish(worker))
            else:
                heappush(running, (now + next(times[worker]), worker, share))

        def answer(now: float, due: list[int]) -> None:
            for worker in due:
                packet = server.answer(worker)
                views[worker], numbers[worker], clocks[worker] = packet.body, int(packet.number), packet.clock
                begin(now, worker, max(shares[worker][0] + 1, int(packet.step)))

        shares = [(first, worker) for worker in range(workers)]
        for worker in range(workers):
            begin(0.0, worker, first)
        while running:
            now, worker, shares[worker] = heappop(running)
            self._worker, packet = worker, self._packets[worker]
            if worker % self._comm.size == self._comm.rank:
                packet.say(number=numbers[worker])
                self._go_to(views[worker])
                self._staleness.record(done[worker] if self._pooled else shares[worker][0] - first, clocks[worker])
                yield shares[worker]
            else:
                self._exchange()
            done[worker] += 1
            answer(now, server.take(worker, packet))

    def step(self, grad: np.ndarray, now: Now, samples: float, length: float) -> None:
        """Send this rank's gradient to all ranks."""
        packet = self._packets[self._worker]
        load(packet.body, grad)
        synchronize(grad)
        packet.say(step=now.step, samples=samples, length=length, lr=now.lr)
        self._exchange()

    def _go_to(self, view: np.ndarray) -> None:
        """Make ``view`` the evaluation point of the next gradient."""
        if isinstance(self._params, np.ndarray):
            self.point = view
        else:
            store(self.point, view)

    def _exchange(self) -> None:
        with self._agreeing():
            self._comm.Bcast(self._packets[self._worker].raw, root=self._worker % self._comm.size)
        self._count(None, None)  # natively
