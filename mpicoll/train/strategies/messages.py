"""Messages that come at any time, and that a thread looks after while its rank computes."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Event, Lock, Thread
from typing import Any

import numpy as np

from .base import Strategy, timed

POLL = 1e-3
"""Seconds from one look for messages to the next while a rank computes."""

AT_ONCE = 8
"""So often it looks then, as long as there are any: what becomes of a message may be another one to look after."""

LOOKS, PAUSE = 1000, 5e-5
"""So often a rank that waits looks for messages in a row, and then after so many seconds each."""


class Messages:
    """Of ``strategy``: ordinary messages between two ranks, of which nobody knows when they come.  They are in host
    memory, and so is all that the thread works on, which never has to wait for a GPU.

    ``requests`` are those that may complete at any time: ``handle`` is called with the index of each that has, by the
    thread or by a rank that waits, and does not wait itself.  ``lock`` is held then, and protects whatever it changes.
    """

    def __init__(self, strategy: Strategy, requests: int) -> None:
        from mpi4py import MPI

        from ...mpi.state import state_of

        self.strategy = strategy
        self.waits: list[float] = []
        strategy.waits = self.waits
        self.p, self.rank, self.state = strategy.p, strategy.comm.rank, state_of(strategy.comm)
        self.others = [(self.rank + n) % self.p for n in range(1, self.p)]
        self.wire = self.state.comm
        self.requests: list[Any] = requests * [MPI.REQUEST_NULL]
        self.lock, self._stop = Lock(), Event()
        self._sending: dict[Any, MPI.Request] = {}  # by name
        self._some = MPI.Request.Testsome
        self._threads = MPI.Query_thread() >= MPI.THREAD_SERIALIZED
        self._failed: BaseException | None = None

    def handle(self, index: int) -> None:
        """A request has completed."""
        raise NotImplementedError

    def look(self) -> bool:
        """For messages, without waiting; returns whether any had come."""
        came = self._some(self.requests)
        for index in came or ():
            self.handle(index)
        return bool(came)

    def until(self, what: str, done: Callable[[], bool]) -> None:
        """Wait, and meanwhile look for messages."""
        from ...mpi import record

        if self._failed is not None:
            raise self._failed
        if done():
            return
        with timed(self.waits), record.during(f"waiting for {what}", self.state):
            looks = 0
            while not done():
                if self.look():
                    looks = 0
                elif (looks := looks + 1) < LOOKS:
                    os.sched_yield()  # MPI itself would not, and others may need this core to send
                else:
                    time.sleep(PAUSE)

    def send(self, what: Any, message: np.ndarray, rank: int, tag: int) -> None:
        """Under that name; it must stay as it is until it is settled."""
        self._sending[what] = self.wire.Isend(message, rank, tag)
        self.strategy.count(message.nbytes, 1)

    def settle(self, what: Any) -> None:
        """It need not stay as it is any more: at once, since the rank has sent something upon it."""
        if request := self._sending.pop(what, None):
            request.Wait()

    def end(self) -> None:
        """Of an epoch, when all messages have been received."""
        for request in self._sending.values():
            request.Wait()
        self._sending.clear()
        for request in self.requests:
            if request:
                request.Free()

    @contextmanager
    def attended(self) -> Iterator[None]:
        """With a thread that looks for messages while this rank computes, where MPI allows it."""
        self._stop.clear()
        thread = Thread(target=self._attend, name="mpicoll messages", daemon=True)
        if self._threads and self.others:
            thread.start()
        try:
            yield
        except BaseException:
            self.state.interrupt()  # messages may still be under way
            raise
        finally:
            self._stop.set()
            if thread.is_alive():
                thread.join()

    @np.errstate(all="ignore")  # as in the other thread
    def _attend(self) -> None:
        while not self._stop.wait(POLL):
            if self.lock.acquire(blocking=False):  # else the other thread is at it
                try:
                    for _ in range(AT_ONCE):
                        if not self.look():
                            break
                except BaseException as error:  # which is for the other thread to raise
                    self._failed = error
                    return
                finally:
                    self.lock.release()
