"""Collectives of the ranks that hold a model together, and their cost."""

from collections.abc import Callable
from time import perf_counter

import numpy as np
from mpi4py import MPI

from ..mpi.collectives import allgather, allreduce
from ..mpi.engine import last
from .traffic import COUNTED, Traffic
from .transfer import synchronize


class Spent(Traffic):
    """The cost of communication within a group that holds a model: seconds, seconds of waiting, bytes and messages.

    Waiting is that for messages of another stage, and is part of the seconds of communication.
    """

    def __init__(self) -> None:
        super().__init__()
        self.clear()

    def clear(self) -> None:
        """Set everything to zero."""
        self.seconds = self.waiting = 0.0
        self.bytes_sent = self.messages = 0


class Collectives:
    """Collectives of the ranks in ``comm``, which add their cost to ``spent``; with one rank they do nothing.

    Time on a GPU before the operands are ready does not count.
    """

    def __init__(self, comm: MPI.Intracomm, spent: Spent) -> None:
        self._comm, self._spent = comm, spent

    def allreduce(self, x: np.ndarray) -> np.ndarray:
        """Sum over all ranks, in place."""
        return x if self._comm.size == 1 else self._timed(x, lambda: allreduce(x, self._comm))

    def allgather(self, x: np.ndarray) -> np.ndarray:
        """The arrays of all ranks, in a new first dimension."""
        if self._comm.size == 1:
            return x[np.newaxis]
        algorithm = COUNTED if isinstance(x, np.ndarray) else "auto"
        return self._timed(x, lambda: allgather(x, self._comm, algorithm=algorithm))

    def _timed(self, x: np.ndarray, call: Callable[[], np.ndarray]) -> np.ndarray:
        synchronize(x)
        start = perf_counter()
        result = call()
        self._spent.seconds += perf_counter() - start
        self._spent.count_call(last(self._comm))
        return result
