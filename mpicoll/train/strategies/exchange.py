"""The messages of ``async``: gradients to the servers of all parts of the parameters, and parameters back."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from ..compress import Code
from ..transfer import fetched, load, store, synchronize
from .base import Now, share_of
from .staleness import Staleness
from .transport import Transport

if TYPE_CHECKING:  # the command line lists the strategies without starting MPI
    from mpi4py import MPI

    from ..server import Packet, Server


class Exchange:
    """The messages between a rank of ``comm`` and the servers of all parts.

    Server r is on rank r, and holds the parameters ``cuts[r]`` to ``cuts[r + 1] - 1``; ``server`` is that of this rank.
    A rank has at most one gradient pending at each server, and sends the next when that has been answered; so there is
    one buffer for each server, allocated by ``memory``.  Answers may arrive at any time, but the parameters at the
    evaluation point ``point`` change in ``step`` only.

    ``codes``, one for each server, encode gradients; if there are none, gradients are sent uncompressed.  If
    ``pooled``, ranks take the next free share of a batch when they are ready.  Each gradient is recorded in
    ``staleness``; ``agreeing`` times communication, and ``count`` gets the bytes and messages that are sent.
    """

    def __init__(
        self,
        comm: "MPI.Intracomm",
        server: "Server",
        point: np.ndarray,
        cuts: Sequence[int],
        codes: Sequence[Code],
        *,
        pooled: bool,
        memory: Callable[[int], np.ndarray],
        staleness: Staleness,
        agreeing: Callable[[], AbstractContextManager[None]],
        count: Callable[[int | None, int | None], None],
    ) -> None:
        from ..server import Packet

        self.transport = Transport(comm, 2 * comm.size, self._handle, count)  # requests of gradients, and of answers
        self.point = point
        self._server, self._codes, self._pooled = server, codes, pooled
        self._staleness, self._agreeing = staleness, agreeing
        self._p, self._rank, self._others = comm.size, comm.rank, self.transport.others
        self._parts = [slice(lo, hi) for lo, hi in pairwise(cuts)]
        lengths, dtype = [part.stop - part.start for part in self._parts], point.dtype
        sizes, kind = ([code.fields.nbytes for code in codes], np.dtype("u1")) if codes else (lengths, dtype)
        self._out = [Packet(size, kind, memory) for size in sizes]  # gradients to each server, or codes
        self._in = [Packet(sizes[comm.rank], kind) for _ in sizes]  # gradients from each rank, or codes
        self._gradients = [Packet(lengths[comm.rank], dtype) for _ in sizes] if codes else self._in
        self._back = [Packet(length, dtype, memory) for length in lengths]  # answers of each server
        self._tags = self.transport.tags(2)  # of gradients, of answers

    def shares(self, steps: range) -> Iterator[tuple[int, int]]:
        """Yield this rank's shares of the steps, and exchange messages until all ranks have finished the epoch."""
        self._steps = steps
        self._pushed, self._answered = 0, [0] * self._p  # gradients, and how many of them by each server
        self._fresh: dict[int, Packet] = {}  # answers that are not read yet, by server
        self._clock, self._number = [0.0] * self._p, [0.0] * self._p  # of the parameters here, by server
        self._step = self._ahead = steps.start  # the next, and that of the server which is furthest
        self._pool = [self._rank, self._p + self._rank]  # numbers of shares that are this rank's to take
        requests, wire = self.transport.requests, self.transport.wire
        for rank in self._others:
            requests[rank] = wire.Recv_init(self._in[rank].raw, rank, self._tags[0])
            requests[self._p + rank] = wire.Recv_init(self._back[rank].raw, rank, self._tags[1])
            requests[rank].Start()
        with self.transport.attended():
            if self._pooled:
                while (share := share_of(self._pool.pop(0), steps, self._p)) is not None:  # of the one or two there
                    yield share
            else:
                while self._step < steps.stop:
                    yield self._step, self._rank
            with self._agreeing(), self.transport.lock:
                self._finish()

    def step(self, grad: np.ndarray, now: Now, samples: float, length: float) -> None:
        """Send a gradient, and wait for parameters that are new enough for the next one."""
        transport, server = self.transport, self._server
        with self._agreeing(), transport.lock:
            taken_at = list(self._number)
            self._staleness.record(self._pushed if self._pooled else self._step - self._steps.start, min(self._clock))
            transport.until("all servers to answer", self._is_answered)
            self._read()  # before there are newer ones: each brings the number of a share
            for rank, packet in enumerate(self._out):
                transport.settle(("gradient", rank))
                packet.say(step=now.step, samples=samples, length=length, lr=now.lr, number=taken_at[rank])
            self._fill(grad, samples > 0)
            self._pushed += 1
            for rank in self._others:
                transport.requests[self._p + rank].Start()  # its answer
                transport.send(("gradient", rank), self._out[rank].raw, rank, self._tags[0])
            self._answer(server.take(self._rank, self._decoded(self._rank, self._out[self._rank])))
            transport.look()
            self._read()
            new_enough = self._is_answered if server.staleness == 0 else self._is_new_enough
            transport.until("parameters that are new enough", new_enough)
            self._read()
            self._step = max(self._step + 1, self._ahead)

    def _fill(self, grad: np.ndarray, any_samples: bool) -> None:
        """Copy a gradient, or codes of it, to the send buffers, and wait for the GPU."""
        if self._codes:
            grad = fetched(grad)
        for rank, (packet, part) in enumerate(zip(self._out, self._parts, strict=True)):
            if not self._codes:
                load(packet.body, grad[part])
            elif any_samples:
                self._codes[rank].send(grad[part], self._codes[rank].fields.of(packet.body))
            else:
                packet.body[:] = 0  # the code of nothing; the residual stays
        synchronize(grad)

    def _decoded(self, rank: int, came: "Packet") -> "Packet":
        """Return the gradient in a message from a rank."""
        if not self._codes:
            return came
        code, gradient = self._codes[self._rank], self._gradients[rank]
        gradient.copy_head(came)
        gradient.body[:] = 0
        code.decode(code.fields.of(came.body), gradient.body, 1)
        return gradient

    def _is_answered(self) -> bool:
        return min(self._answered) == self._pushed

    def _is_new_enough(self) -> bool:
        self._read()
        return min(self._clock) >= self._pushed - self._server.staleness

    def _handle(self, index: int) -> None:
        """Handle a gradient for this rank's server, or an answer for this rank, as ``Transport`` asks."""
        if index < self._p:
            server, came = self._server, self._in[index]
            self._answer(server.finish(index) if came.samples < 0 else server.take(index, self._decoded(index, came)))
        else:
            self._came(index - self._p, self._back[index - self._p])

    def _answer(self, ranks: list[int]) -> None:
        for rank in ranks:
            self.transport.settle(("answer", rank))
            packet = self._server.answer(rank)
            if rank == self._rank:
                self._came(rank, packet)
            else:
                self.transport.requests[rank].Start()  # the next gradient
                self.transport.send(("answer", rank), packet.raw, rank, self._tags[1])

    def _came(self, server: int, answer: "Packet") -> None:
        self._answered[server] += 1
        self._fresh[server] = answer

    def _read(self) -> None:
        """Copy the parameters that have arrived to the evaluation point."""
        for server, answer in self._fresh.items():
            store(self.point[self._parts[server]], answer.body)
            self._clock[server], self._number[server] = answer.clock, answer.number
            self._ahead = max(self._ahead, int(answer.step))
            if server == 0:
                self._pool.append(int(answer.share))
        self._fresh.clear()

    def _finish(self) -> None:
        """End an epoch: once all ranks have ended it, no message is pending."""
        transport, server = self.transport, self._server
        transport.until("all servers to answer", self._is_answered)
        for rank in self._others:
            transport.settle(("gradient", rank))
            self._out[rank].say(samples=-1)
            transport.send(("gradient", rank), self._out[rank].raw, rank, self._tags[0])
        self._answer(server.finish(self._rank))
        transport.until("all ranks to finish the epoch", lambda: all(server.finished))
        transport.end()
