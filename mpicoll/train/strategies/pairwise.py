"""AD-PSGD (Lian et al. 2018): ranks average their models in pairs, each when it is ready, without waiting for all."""

from collections.abc import Iterator
from heapq import heappop, heappush
from itertools import count
from typing import Any, ClassVar

import numpy as np

from ..optimizers import clip
from ..transfer import load, memory_for, store, synchronize
from .base import Now, Strategy, drawn, share_of, timed
from .mixing import graph_of
from .transport import Transport


class ADPSGD(Strategy):
    """AD-PSGD: after every step a rank averages its model with that of a random neighbor in the graph.

    Neither rank stops computing: each takes its next gradient at a copy of its model from before the averaging.

    In the paper the models of both ranks are locked, and the graph must be bipartite to exclude deadlock.  Here one
    rank sends its model x.  The other rank, whose model is y at that moment, answers d = (x - y)/2 and changes its
    model to y + d; then the first rank subtracts d from its model, which may have changed meanwhile.  If nothing
    happened in between, both hold the mean.  The sum of all models never changes, and since every rank always answers,
    there is no deadlock on any graph.  A rank whose own model is in flight answers (x - y)/4: otherwise two ranks that
    had sent their models to each other would swap them.

    Ranks take the next free share of a batch when they are ready, unless data are sharded: a faster rank takes more
    shares.  All ranks wait for each other at the end of an epoch.  With ``delays``, the seed of a simulation, the times
    of steps are drawn at random and messages take no time; the run has the same bits for the same number of ranks.
    """

    options: ClassVar = {"graph": "complete", "delays": None}
    in_step = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.graph = graph_of(self.comm, self.option("graph"))
        self.digest = self.graph.digest.hex()[:8]
        self.pooled = not self.settings.shards
        on_cpu = isinstance(self.params, np.ndarray)
        self._host = None if on_cpu else memory_for(self.params)(self.params.nbytes).view(self.params.dtype)
        self._point = self.params.copy() if on_cpu else self.params
        simulated = self.option("delays") is not None
        self._run: _Messages | _Simulated = _Simulated(self) if simulated else _Messages(self)
        self.algorithm = f"{'simulated ' if simulated else ''}averaging in pairs on {self.graph.name}"

    @property
    def model(self) -> np.ndarray:
        """The model between steps, in host memory, where averaging with neighbors changes it."""
        return self.params if self._host is None else self._host

    def point(self) -> np.ndarray:
        """The evaluation point: a copy of the model after the last step."""
        return self._point

    def go_to_model(self) -> None:
        """Make the current model the evaluation point of the next gradient."""
        store(self._point, self.model)
        synchronize(self._point)

    def shares(self, first: int, last: int) -> Iterator[tuple[int, int]]:
        """Yield the shares that this rank takes, as ``Strategy.shares`` defines them."""
        load(self.model, self.params)
        self.go_to_model()
        yield from self._run.shares(range(first, last))
        self.go_to_model()

    def step(self, now: Now, samples: int, length: int) -> None:
        """Step by this rank's own gradient, then average with a neighbor."""
        grad = self.sums[:-2]
        grad *= self.p / length  # as in agree_on_gradient
        if self.settings.clip is not None:
            clip(grad, self.settings.clip)
        self._run.step(grad, now, samples, length)

    def optimize(self, grad: np.ndarray, lr: float) -> None:
        """Let the optimizer change the model, and load the result to host memory."""
        store(self.params, self.model)
        self.optimizer.step(self.params, grad, lr)
        load(self.model, self.params)

    def state(self) -> dict[str, np.ndarray]:
        """The number of steps that this rank has taken, which differs between ranks."""
        return {"steps": np.array([self.optimizer.steps])}

    def restore(self, state: dict[str, np.ndarray], own: bool) -> None:
        """Continue from a checkpoint; checkpoints of earlier versions hold the steps of rank 0 only."""
        self._point[:] = self.params
        if "steps" in state:
            self.optimizer.steps = int(state["steps"][0])

    def neighbors(self, rank: int, step: int) -> Iterator[int]:
        """Yield random neighbors of a rank, from this step on; nothing if the rank is alone.

        They are drawn from all neighbors that the rank has in any round of the graph.
        """
        peers = self.graph.peers(rank)
        random = np.random.default_rng([self.settings.seed, step, rank, 1])  # other numbers than ``drawn`` has
        while peers:
            yield int(random.choice(peers))


CAME, SENT, ANSWER, SHARE = range(4)
"""Requests: a message from any rank, an answer being sent, an answer being received, the number of a share."""

FINISHED, ASKS, MODEL = -1.0, 0.0, 1.0
"""Kinds of messages, as the ``samples`` of a packet: end of the epoch, request for a share's number, model."""


class _Messages:
    """AD-PSGD by messages: models, answers, and the numbers of shares, which rank 0 hands out.

    A rank has at most one model in flight, and requests one share ahead.
    """

    def __init__(self, strategy: ADPSGD) -> None:
        from ..server import Packet

        self.strategy, self.transport = strategy, Transport(strategy.comm, 4, self._handle, strategy.count)
        strategy.waits = self.transport.waits
        self.p, self.rank = strategy.comm.size, strategy.comm.rank
        size, dtype = len(strategy.model), strategy.model.dtype
        self._in, self._out, self._word = (Packet(count, dtype) for count in (size, size, 0))
        self._answer = np.empty(size, dtype)
        self._numbers = np.zeros(self.p, np.int64)  # numbers of shares; a rank reads its own, rank 0 writes all
        self._tags = self.transport.tags(3)  # of messages from any rank, of answers, of numbers of shares

    def shares(self, steps: range) -> Iterator[tuple[int, int]]:
        """Yield this rank's shares of the steps, and exchange messages until all ranks have finished the epoch."""
        from mpi4py import MPI

        s = self.strategy
        self._peers, self._peer = s.neighbors(self.rank, steps.start), -1  # the peer whose answer is pending
        self._pool, self._asked, self._next = [self.rank, self.p + self.rank], False, 2 * self.p
        self._running = len(self.transport.others)
        if self.transport.others:
            # No message of the next epoch arrives before this epoch has ended here: all ranks reduce in between.
            self.transport.requests[CAME] = self.transport.wire.Recv_init(self._in.raw, MPI.ANY_SOURCE, self._tags[0])
            self.transport.requests[CAME].Start()
        with self.transport.attended():
            if s.pooled:
                while (share := share_of(self._pool.pop(0), steps, self.p)) is not None:
                    yield share
            else:
                yield from ((step, self.rank) for step in steps)
            with s.agreeing(), self.transport.lock:
                self._finish()

    def step(self, grad: np.ndarray, now: Now, samples: float, length: float) -> None:
        """Step, and send the model to a neighbor once the last neighbor has answered."""
        s = self.strategy
        synchronize(grad)  # before taking the lock, or other ranks would wait for this GPU
        with self.transport.lock:
            s.optimize(grad, now.lr)
            with s.agreeing():
                self._average()
            s.go_to_model()

    def _average(self) -> None:
        self.transport.until("a neighbor to answer", self._is_answered)
        if (peer := next(self._peers, None)) is not None:
            self._peer = peer
            self._out.body[:] = self.strategy.model
            self._out.say(number=self.rank, samples=MODEL)
            self.transport.requests[ANSWER] = self.transport.wire.Irecv(self._answer, peer, self._tags[1])
            self.transport.send("model", self._out.raw, peer, self._tags[0])
        if self.strategy.pooled:
            self._ask()
        self.transport.look()

    def _is_answered(self) -> bool:
        return self._peer < 0

    def _ask(self) -> None:
        """Request the number of the share after the next one, once that of the next one has arrived."""
        if self.rank == 0:
            self._pool.append(self._take())
            return
        self.transport.until("the number of a share", lambda: not self._asked)
        self._asked = True
        self.transport.requests[SHARE] = self.transport.wire.Irecv(self._numbers[self.rank :][:1], 0, self._tags[2])
        self._say([0], ASKS)

    def _take(self) -> int:
        self._next += 1
        return self._next - 1

    def _say(self, ranks: list[int], what: float) -> None:
        self._word.say(number=self.rank, samples=what)
        for rank in ranks:
            self.transport.send(("word", rank), self._word.raw, rank, self._tags[0])

    def _handle(self, index: int) -> None:
        """Handle a completed request, as ``Transport`` asks."""
        if index == CAME:
            self._came(int(self._in.number), self._in.samples)
        elif index == SENT:
            self.transport.requests[CAME].Start()
        elif index == ANSWER:
            self.transport.settle("model")
            model = self.strategy.model
            model -= self._answer
            self._peer = -1
        else:
            self.transport.settle(("word", 0))
            self._asked = False
            self._pool.append(int(self._numbers[self.rank]))

    def _came(self, rank: int, what: float) -> None:
        if what == MODEL:  # move towards it, and answer by how much
            model, way = self.strategy.model, self._in.body
            way -= model
            way *= 0.5 if self._is_answered() else 0.25
            model += way
            self.transport.requests[SENT] = self.transport.wire.Isend(way, rank, self._tags[1])
            self.strategy.count(way.nbytes, 1)
            return
        if what == ASKS:
            self.transport.settle(("share", rank))
            self._numbers[rank] = self._take()
            self.transport.send(("share", rank), self._numbers[rank:][:1], rank, self._tags[2])
        else:
            self._running -= 1
        if self._running:
            self.transport.requests[CAME].Start()

    def _finish(self) -> None:
        """End an epoch: once all ranks have ended it, no message is pending."""
        self.transport.until("a neighbor to answer", self._is_answered)
        self.transport.until("the number of a share", lambda: not self._asked)
        self._say(self.transport.others, FINISHED)
        requests = self.transport.requests
        self.transport.until("all ranks to finish the epoch", lambda: not (self._running or requests[SENT]))
        self.transport.end()


class _Simulated:
    """AD-PSGD simulated: every rank replays the events of all ranks, and takes part in its own."""

    def __init__(self, strategy: ADPSGD) -> None:
        from ...mpi.state import state_of

        self.strategy, self._state = strategy, state_of(strategy.comm)
        self._waits = strategy.waits = []
        self._tag, self._other = self._state.persistent_tag(), np.empty_like(strategy.model)

    def shares(self, steps: range) -> Iterator[tuple[int, int]]:
        """Yield this rank's shares, in the order of the simulated events."""
        s, rank = self.strategy, self.strategy.comm.rank
        times, pool = drawn(s.option("delays"), steps.start, s.p), count()
        own = [((step, worker) for step in steps) for worker in range(s.p)]
        peers = [s.neighbors(worker, steps.start) for worker in range(s.p)]
        running: list[tuple[float, int, tuple[int, int]]] = []  # a heap of (end, worker, share)

        def begin(now: float, worker: int) -> None:
            share = share_of(next(pool), steps, s.p) if s.pooled else next(own[worker], None)
            if share is not None:
                heappush(running, (now + next(times[worker]), worker, share))

        for worker in range(s.p):
            begin(0.0, worker)
        while running:
            now, worker, share = heappop(running)
            peer = next(peers[worker], worker)
            self._peer = peer if worker == rank else worker
            if worker == rank:
                yield share
            elif peer == rank:
                self._average()
            begin(now, worker)

    def step(self, grad: np.ndarray, now: Now, samples: float, length: float) -> None:
        """Step, and average the model with that of a neighbor."""
        s = self.strategy
        s.optimize(grad, now.lr)
        if self._peer != s.comm.rank:
            self._average()
        s.go_to_model()

    def _average(self) -> None:
        from ...mpi import record

        s, model, peer = self.strategy, self.strategy.model, self._peer
        with s.agreeing(), timed(self._waits), record.during(f"averaging with rank {peer}", self._state):
            self._state.comm.Sendrecv(model, peer, self._tag, self._other, peer, self._tag)
        s.count(model.nbytes, 1)
        model += self._other
        model *= 0.5
