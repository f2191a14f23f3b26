"""Messages that arrive at any time, and a thread that handles them while its rank computes."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Event, Lock, Thread
from typing import TYPE_CHECKING, Any

import numpy as np

from .base import timed

if TYPE_CHECKING:  # the command line lists the strategies without starting MPI
    from mpi4py import MPI

POLL = 1e-3
"""Seconds between two tests for messages while a rank computes."""

AT_ONCE = 8
"""The most tests in a row while messages arrive: handling one may complete another."""

LOOKS, PAUSE = 1000, 5e-5
"""The number of tests that a waiting rank makes in a row, and the seconds it sleeps before each test after that."""


class Transport:
    """Messages between pairs of ranks of ``comm`` that may arrive at any time.

    They are in host memory, as is everything that the thread works on, so that it never waits for a GPU.

    ``requests`` is the number of requests that may complete at any time.  ``handle`` is called with the index of each
    request that has completed, by the thread or by a rank that waits, and must not wait itself.  ``lock`` is held then,
    and protects whatever ``handle`` changes.  ``count`` gets the bytes and the number of messages sent; ``waits`` holds
    the seconds of each wait.
    """

    def __init__(
        self,
        comm: "MPI.Intracomm",
        requests: int,
        handle: Callable[[int], None],
        count: Callable[[int | None, int | None], None],
    ) -> None:
        from mpi4py import MPI

        from ...mpi.state import state_of

        self.handle, self.count = handle, count
        self.rank, self.state = comm.rank, state_of(comm)
        self.others = [(comm.rank + n) % comm.size for n in range(1, comm.size)]
        self.wire = self.state.comm
        self.requests: list[Any] = requests * [MPI.REQUEST_NULL]
        self.waits: list[float] = []
        self.lock, self._stop = Lock(), Event()
        self.threads = MPI.Query_thread() >= MPI.THREAD_SERIALIZED
        self._sending: dict[Any, MPI.Request] = {}  # by name
        self._some = MPI.Request.Testsome
        self._failed: BaseException | None = None

    def tags(self, number: int) -> tuple[int, ...]:
        """Reserve ``number`` message tags that no other call uses; all ranks must do so in the same order."""
        return tuple(self.state.persistent_tag() for _ in range(number))

    def look(self) -> bool:
        """Handle the messages that have arrived, without waiting; return whether there were any."""
        came = self._some(self.requests)
        for index in came or ():
            self.handle(index)
        return bool(came)

    def until(self, what: str, done: Callable[[], bool]) -> None:
        """Handle messages until ``done`` returns true; ``what`` names the wait in reports."""
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
        """Send a message under the name ``what``; it must not change until ``settle`` is called with that name."""
        self._sending[what] = self.wire.Isend(message, rank, tag)
        self.count(message.nbytes, 1)

    def settle(self, what: Any) -> None:
        """Complete the message of that name, which may then change.  This does not wait: its receiver has answered."""
        if request := self._sending.pop(what, None):
            request.Wait()

    def end(self) -> None:
        """End an epoch, when all messages have been received."""
        for request in self._sending.values():
            request.Wait()
        self._sending.clear()
        for request in self.requests:
            if request:
                request.Free()

    @contextmanager
    def attended(self) -> Iterator[None]:
        """Run a thread that handles messages while this rank computes, if the thread level of MPI allows it."""
        self._stop.clear()
        thread = Thread(target=self._attend, name="mpicoll messages", daemon=True)
        if self.threads and self.others:
            thread.start()
        try:
            yield
        except BaseException:
            self.state.interrupt()  # messages may still be pending
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
