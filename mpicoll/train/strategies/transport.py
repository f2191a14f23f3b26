"""Messages that come at any time, and a thread that looks after them while its rank computes."""

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
"""Seconds from one look for messages to the next while a rank computes."""

AT_ONCE = 8
"""Looks at a time, as long as messages come: what becomes of one may be another one to look after."""

LOOKS, PAUSE = 1000, 5e-5
"""Looks in a row of a rank that waits; after so many it pauses for some seconds before each."""


class Transport:
    """Messages between pairs of ranks of ``comm``, of which nobody knows when they come.  They are in host memory, and
    so is all that the thread works on, which never has to wait for a GPU.

    ``requests``, of the given number, are those that may complete at any time: ``handle`` is called with the index of
    each that has, by the thread or by a rank that waits, and must not wait itself.  ``lock`` is held then, and protects
    whatever it changes.  What is sent is counted by ``count``, in bytes and messages; ``waits`` are the seconds of each
    wait.
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
        """Tags for so many kinds of messages, which no other call has; all ranks ask for them in the same order."""
        return tuple(self.state.persistent_tag() for _ in range(number))

    def look(self) -> bool:
        """Handle the messages that have come, without waiting; returns whether there were any."""
        came = self._some(self.requests)
        for index in came or ():
            self.handle(index)
        return bool(came)

    def until(self, what: str, done: Callable[[], bool]) -> None:
        """Wait for ``what``, until ``done``, and handle messages meanwhile."""
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
        """Send a message under the name ``what``; it must stay as it is until it is settled."""
        self._sending[what] = self.wire.Isend(message, rank, tag)
        self.count(message.nbytes, 1)

    def settle(self, what: Any) -> None:
        """The message of that name may change: a rank has sent something upon it, so that this does not wait."""
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
        """With a thread that looks for messages while this rank computes, where MPI allows it."""
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
