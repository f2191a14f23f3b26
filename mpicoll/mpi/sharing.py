"""Memory that all ranks of a communicator share, for programs that lay their own data out in it."""

from collections.abc import Sequence

import numpy as np
from mpi4py import MPI

from ..collective import REDUCE_SCATTER
from ..tuning.rules import SHARED
from . import record
from .agreement import Header
from .operations import operation
from .request import lengths_of
from .state import State, state_of


class SharedMemory:
    """The memory that the ranks of a communicator share; see ``shared``."""

    def __init__(self, state: State) -> None:
        self._state = state

    def empty(self, count: int, dtype: np.dtype) -> np.ndarray | None:
        """An array of this rank's own, with anything in it, which the others find in collectives; ``None``, on all
        ranks, if there is no memory for it.  A collective call."""
        memory = self._state.on_node(self._state.node.empty, count * dtype.itemsize)
        return None if memory is None else memory.view(dtype)

    def common(self, count: int, dtype: np.dtype) -> np.ndarray | None:
        """One array for all ranks, full of zeros; ``None``, on all ranks, if there is no memory for it.  A collective
        call."""
        memory = self._state.on_node(self._state.node.common, count * dtype.itemsize)
        return None if memory is None else memory.view(dtype)

    def barrier(self, why: str) -> None:
        """Wait for all ranks; what they wrote before is seen after.  ``why`` is what the flight record shows."""
        with record.during(why, self._state):
            self._state.on_node(self._state.node.sync)

    def reduce_scatter(
        self, send: np.ndarray, recv: np.ndarray, cuts: Sequence[int], numbers: Sequence[float] = ()
    ) -> list[float]:
        """Sum flat arrays of all ranks, and give each its part; returns the sums of up to two ``numbers``.

        ``send`` was made by ``empty``, and ``recv`` may be this rank's part of it, from ``cuts[rank]`` to
        ``cuts[rank + 1]``.  Additions are in the canonical order.  Numbers travel with the comparison of the call.
        """
        state = self._state
        node, cut = state.node, tuple(cuts)
        header = Header("reduce_scatter", SHARED, "sum", send.dtype.name, len(send), (), lengths_of(cut))
        words = np.array(numbers, np.float64).view(np.uint64).tolist()
        places = node.places(send, recv)
        record.begin(state.entry((header,)))
        try:
            found = state.agree((header,), None, (*places, *words))
            assert found is not None
            args = REDUCE_SCATTER, send, recv, operation("sum", send.dtype), 0, cut, True, [one[:4] for one in found]
            if not state.on_node(node.run, *args):
                raise RuntimeError("there is no more memory to share for staging buffers: check /dev/shm")
        except (KeyboardInterrupt, SystemExit):
            state.interrupt()
            raise
        finally:
            record.end()
        everyones = np.array([one[4:] for one in found], np.uint64).view(np.float64)
        sums: list[float] = everyones.sum(axis=0).tolist()
        return sums


def shared(comm: MPI.Intracomm) -> SharedMemory | None:
    """The memory that all ranks of ``comm`` share, or ``None`` if they do not.  The first call is a collective one."""
    state = state_of(comm)
    return SharedMemory(state) if state.shares else None
