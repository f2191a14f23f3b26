"""Asynchronous SGD with a bound on how far ranks run apart.

Every rank trains, and every rank is the parameter server of a part of the parameters.  A step's gradient goes to all of
them, and what comes back is used from the next step on, or from the one after: so messages are on their way while ranks
compute.  All messages are ordinary ones between two ranks; those for the server are answered by a thread while its rank
computes.
"""

import math
from collections.abc import Iterator
from heapq import heappop, heappush
from itertools import count, pairwise
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from ...errors import UserError
from ..compress import Code
from ..optimizers import clip
from ..sent import finished
from .base import Now, Strategy, drawn, share_of
from .messages import Messages, fetched, load, memory_for, store

if TYPE_CHECKING:
    from ..server import Packet


class Async(Strategy):
    """No rank runs more than ``staleness`` steps ahead of any other, and all of their gradients up to then are in the
    parameters at which it takes its own; with ``inf`` there is no bound.  ``server.Server`` says what becomes of them.

    With ``compress`` a rank sends each server something shorter than its gradient, and keeps the rest.  Answers are as
    they are.

    Servers, and what ranks keep, are in host memory.  If gradients are taken on a GPU they come from there in every
    step, and the point for the next one goes there.

    With 0 it is synchronous, bit for bit but for clipping, which here is of each rank's own gradient; ``backups`` are
    how many gradients of a step need not be waited for.  With ``inf`` ranks take shares of batches as they are ready
    for them, unless data are sharded: a faster one takes more.  All wait for each other at the end of an epoch.

    ``delays`` is the seed of a simulation, in which ``workers``, of which each rank plays some, take times that are
    drawn, messages none, and everything happens in the order that follows: the same bits on any number of ranks, if
    they compute the same gradients.
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
        super().__init__(*args, **kwargs)
        from ..server import Server

        self.bound = self._bound()
        self.seed = self.option("delays")
        if self.seed is not None:
            self.workers = self.option("workers") or self.p
        backups, compensate, slow_down = (self.option(name) for name in ("backups", "compensate", "slow_down"))
        self._check(backups, compensate, slow_down)
        self.pooled = self.bound == math.inf and not self.settings.shards
        self.histogram: list[int] = []
        self.memory = memory_for(self.params)
        self.held = self.memory(self.params.nbytes).view(self.params.dtype)  # what the server has
        self._run: _Messages | _Simulated = _Messages(self) if self.seed is None else _Simulated(self)
        rules = {"backups": backups, "compensate": compensate, "slow_down": slow_down, "memory": self.memory}
        self.server = Server(self.held, self.optimizer, self.workers, self.bound, **rules)
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

    def point(self) -> np.ndarray:
        """See ``Strategy``."""
        return self._run.point

    def shares(self, first: int, last: int) -> Iterator[tuple[int, int]]:
        """See ``Strategy``."""
        load(self.held, self.params)
        finished(self.params)
        self.steps = range(first, last)
        self.histogram.clear()
        self.server.begin(first, 2 * self.workers)
        yield from self._run.shares(first, last)
        store(self.params, self.held)

    def step(self, now: Now, samples: int, length: int) -> None:
        """See ``Strategy``."""
        grad = self.sums[:-2]
        if self.settings.clip is not None and samples:
            clip(grad, self.settings.clip * samples)
        share, parts = float(samples), float(length)
        if self.compressor:  # what is kept back from one batch is to count as much in the next, however short
            grad /= length
            share, parts = samples / length, 1.0
        self._run.step(grad, step=now.step, samples=share, length=parts, lr=now.lr)

    def record(self, steps: int, clock: float) -> None:
        """A gradient was taken after so many steps of its worker, at parameters that have those of all in ``clock``."""
        staleness = max(steps - clock, 0)
        if staleness > self.bound + bool(self.server.backups):  # of which servers of two parts may drop other ones
            raise RuntimeError(f"a gradient is {staleness:g} steps stale, and the bound is {self.bound:g}")
        behind = int(staleness)
        self.histogram += [0] * (behind + 1 - len(self.histogram))
        self.histogram[behind] += 1


class _Messages(Messages):
    """Between ranks: gradients to the servers of all parts, and parameters back.

    A rank has at most one gradient under way to each server, and sends the next when that has been answered; so there
    is a buffer for each.  Answers come at any time, but the parameters here change in ``step`` only.
    """

    def __init__(self, strategy: "Async") -> None:
        from ...mpi.request import cuts_of
        from ..server import Packet

        super().__init__(strategy, 2 * strategy.p)  # gradients, answers
        self.strategy: Async = strategy
        self.point = strategy.params
        self.cuts = cuts_of(None, len(self.point), self.p)
        parts, dtype = [hi - lo for lo, hi in pairwise(self.cuts)], self.point.dtype
        strategy.optimizer.part = slice(*self.cuts[self.rank :][:2])
        self._codes = self._coded() if strategy.compressor else []
        sizes, kind = ([code.fields.nbytes for code in self._codes], np.dtype("u1")) if self._codes else (parts, dtype)
        self._out = [Packet(size, kind, strategy.memory) for size in sizes]  # gradients to each server, or codes
        self._in = [Packet(sizes[self.rank], kind) for _ in sizes]  # gradients from each rank, or codes
        self._gradients = [Packet(parts[self.rank], dtype) for _ in parts] if self._codes else self._in
        self._back = [Packet(part, dtype, strategy.memory) for part in parts]  # answers of each server
        self._tags = self.state.persistent_tag(), self.state.persistent_tag()  # of gradients, of answers

    def _coded(self) -> list[Code]:
        """For each server's part, with what is kept of it a part of what is kept of all."""
        residual = self.strategy.code().residual
        codes = [self.strategy.code(hi - lo) for lo, hi in pairwise(self.cuts)]
        for code, (lo, hi) in zip(codes, pairwise(self.cuts), strict=True):
            code.residual = residual[lo:hi]
        return codes

    def shares(self, first: int, last: int) -> Iterator[tuple[int, int]]:
        """See ``Strategy``."""
        s = self.strategy
        self._pushed, self._answered = 0, [0] * self.p  # gradients, and how many of them by each server
        self._fresh: dict[int, Packet] = {}  # answers that are not read yet, by server
        self._clock, self._number = [0.0] * self.p, [0.0] * self.p  # of the parameters here, by server
        self._step = self._ahead = first  # the next, and that of the server which is furthest
        self._pool = [self.rank, self.p + self.rank]  # numbers of shares that are this rank's to take
        for rank in self.others:
            self.requests[rank] = self.wire.Recv_init(self._in[rank].raw, rank, self._tags[0])
            self.requests[self.p + rank] = self.wire.Recv_init(self._back[rank].raw, rank, self._tags[1])
            self.requests[rank].Start()
        with self.attended():
            if s.pooled:
                while (share := share_of(self._pool.pop(0), s.steps, self.p)) is not None:  # of the one or two there
                    yield share
            else:
                while self._step < last:
                    yield self._step, self.rank
            with s.agreeing(), self.lock:
                self._finish()
        self._gather()

    def _gather(self) -> None:
        """The parameters, and the optimizer's state, from the servers of all parts."""
        s, name = self.strategy, self.strategy.algorithm
        for vector in (s.held, *s.optimizer.state.values()):
            own, longest = vector[s.optimizer.part], max(hi - lo for lo, hi in pairwise(self.cuts))
            rows = s.allgather(np.resize(own, longest) if len(own) else np.zeros(longest, vector.dtype))
            for (lo, hi), row in zip(pairwise(self.cuts), rows, strict=True):
                vector[lo:hi] = row[: hi - lo]
        s.algorithm = name

    def step(self, grad: np.ndarray, **numbers: float) -> None:
        """Send a gradient, and go on to parameters that are new enough."""
        s = self.strategy
        with s.agreeing(), self.lock:
            taken_at = list(self._number)
            s.record(self._pushed if s.pooled else self._step - s.steps.start, min(self._clock))
            self.until("all servers to answer", self._is_answered)
            self._read()  # before there are newer ones: each brings the number of a share
            for server, packet in enumerate(self._out):
                self.settle(("gradient", server))
                packet.say(**numbers, number=taken_at[server])
            self._put_out(grad, bool(numbers["samples"]))
            self._pushed += 1
            for server in self.others:
                self.requests[self.p + server].Start()  # its answer
                self.send(("gradient", server), self._out[server].raw, server, self._tags[0])
            self._answer(s.server.take(self.rank, self._decoded(self.rank, self._out[self.rank])))
            self.look()
            self._read()
            self.until("parameters that are new enough", self._is_answered if s.bound == 0 else self._is_new_enough)
            self._read()
            self._step = max(self._step + 1, self._ahead)

    def _put_out(self, grad: np.ndarray, any_samples: bool) -> None:
        """A gradient, or codes of it, into what is sent; a GPU has what was read of answers then, too."""
        if self._codes:
            grad = fetched(grad)
        for server, (packet, (lo, hi)) in enumerate(zip(self._out, pairwise(self.cuts), strict=True)):
            if not self._codes:
                load(packet.body, grad[lo:hi])
            elif any_samples:
                self._codes[server].send(grad[lo:hi], self._codes[server].fields.of(packet.body))
            else:
                packet.body[:] = 0  # the code of nothing, and what is kept stays
        finished(grad)

    def _decoded(self, rank: int, came: "Packet") -> "Packet":
        """The gradient in a message from a rank."""
        if not self._codes:
            return came
        code, gradient = self._codes[self.rank], self._gradients[rank]
        gradient.copy_head(came)
        gradient.body[:] = 0
        code.decode(code.fields.of(came.body), gradient.body, 1)
        return gradient

    def _is_answered(self) -> bool:
        return min(self._answered) == self._pushed

    def _is_new_enough(self) -> bool:
        self._read()
        return min(self._clock) >= self._pushed - self.strategy.bound

    def handle(self, index: int) -> None:
        """See ``Messages``."""
        if index < self.p:
            server, came = self.strategy.server, self._in[index]
            self._answer(server.finish(index) if came.samples < 0 else server.take(index, self._decoded(index, came)))
        else:
            self._came(index - self.p, self._back[index - self.p])

    def _answer(self, ranks: list[int]) -> None:
        for rank in ranks:
            self.settle(("answer", rank))
            packet = self.strategy.server.answer(rank)
            if rank == self.rank:
                self._came(rank, packet)
            else:
                self.requests[rank].Start()  # the next gradient
                self.send(("answer", rank), packet.raw, rank, self._tags[1])

    def _came(self, server: int, answer: "Packet") -> None:
        self._answered[server] += 1
        self._fresh[server] = answer

    def _read(self) -> None:
        """Go on to the parameters that have come."""
        for server, answer in self._fresh.items():
            store(self.point[slice(*self.cuts[server:][:2])], answer.body)
            self._clock[server], self._number[server] = answer.clock, answer.number
            self._ahead = max(self._ahead, int(answer.step))
            if server == 0:
                self._pool.append(int(answer.share))
        self._fresh.clear()

    def _finish(self) -> None:
        """Of an epoch: when all have, no message is under way."""
        server = self.strategy.server
        self.until("all servers to answer", self._is_answered)
        for rank in self.others:
            self.settle(("gradient", rank))
            self._out[rank].say(samples=-1)
            self.send(("gradient", rank), self._out[rank].raw, rank, self._tags[0])
        self._answer(server.finish(self.rank))
        self.until("all ranks to finish the epoch", lambda: all(server.finished))
        self.end()


class _Simulated:
    """On any number of ranks, all of which are the server of all parameters, while each plays some of the workers.

    A step takes a worker as long as is ``drawn``; messages take no time.
    """

    def __init__(self, strategy: "Async") -> None:
        from ..server import Packet

        self.strategy, self.point = strategy, strategy.params
        size, dtype = len(strategy.params), strategy.params.dtype
        self._packets = [Packet(size, dtype, strategy.memory) for _ in range(strategy.workers)]

    def shares(self, first: int, last: int) -> Iterator[tuple[int, int]]:
        """See ``Strategy``."""
        s, rank = self.strategy, self.strategy.comm.rank
        times = drawn(s.seed, first, s.workers)
        views, numbers, clocks = [s.held.copy() for _ in times], [0] * s.workers, [0.0] * s.workers
        pool, done = count(), [0] * s.workers
        running: list[tuple[float, int, tuple[int, int]]] = []  # a heap: when who is done with which share

        def begin(now: float, worker: int, step: int) -> None:
            share = share_of(next(pool), s.steps, s.workers) if s.pooled else (step, worker) if step < last else None
            if share is None:
                answer(now, s.server.finish(worker))
            else:
                heappush(running, (now + next(times[worker]), worker, share))

        def answer(now: float, workers: list[int]) -> None:
            for worker in workers:
                packet = s.server.answer(worker)
                views[worker], numbers[worker], clocks[worker] = packet.body, int(packet.number), packet.clock
                begin(now, worker, max(shares[worker][0] + 1, int(packet.step)))

        shares = [(first, worker) for worker in range(s.workers)]
        for worker in range(s.workers):
            begin(0.0, worker, first)
        while running:
            now, worker, shares[worker] = heappop(running)
            self._worker, packet = worker, self._packets[worker]
            if worker % s.p == rank:
                packet.say(number=numbers[worker])
                self._go_to(views[worker])
                s.record(done[worker] if s.pooled else shares[worker][0] - first, clocks[worker])
                yield shares[worker]
            else:
                self._exchange()
            done[worker] += 1
            answer(now, s.server.take(worker, packet))

    def step(self, grad: np.ndarray, **numbers: float) -> None:
        """Give a gradient to all ranks."""
        packet = self._packets[self._worker]
        load(packet.body, grad)
        finished(grad)
        packet.say(**numbers)
        self._exchange()

    def _go_to(self, view: np.ndarray) -> None:
        """Take the next gradient there."""
        if isinstance(self.strategy.params, np.ndarray):
            self.point = view
        else:
            store(self.point, view)

    def _exchange(self) -> None:
        s = self.strategy
        with s.agreeing():
            s.comm.Bcast(self._packets[self._worker].raw, root=self._worker % s.p)
        s.count(None, None)  # by the MPI library
