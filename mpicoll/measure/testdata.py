"""Test data whose results are known exactly: different at every call and on every rank, and exact in every type.

A rank's elements are made from what is common to all ranks and from a small number of its own, its share, which changes
from turn to turn; so the result of any collective can be computed from the common elements and the shares.
"""

from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
from mpi4py import MPI

from ..mpi.buffers import is_half
from ..mpi.gpu.array import Array, cupy
from ..mpi.request import cuts_of
from .task import Task

BLOCK = 1 << 15  # elements made and compared at a time, so that what is in between stays in the cache
ALIGNED = 4096  # bytes: where buffers begin

Memory = Callable[[int, np.dtype], np.ndarray]
"""From a number of elements and their type to an array for them; a collective call."""


class _Op(NamedTuple):
    """An operation on test data: ``one`` makes a rank's elements of the common ones and its share, ``all`` the result.

    Nothing overflows: MPI leaves open what happens then, and Open MPI does not wrap around.
    """

    one: Callable[[np.ndarray, Any], np.ndarray]
    all: Callable[[np.ndarray, np.ndarray], np.ndarray]
    few: bool = False  # ranks whose share is not 0


def _power(x: np.ndarray, share: Any) -> np.ndarray:
    return (x % 2 + 1) ** share


def _times(x: np.ndarray, share: Any) -> np.ndarray:
    return (x % 20 + 1) * share


OPS = {
    "sum": _Op(np.add, lambda x, shares: x * len(shares) + int(shares.sum())),
    "prod": _Op(_power, lambda x, shares: _power(x, int(shares.sum())), few=True),
    "max": _Op(np.add, lambda x, shares: x + int(shares.max())),
    "min": _Op(np.add, lambda x, shares: x + int(shares.min())),
}
_SUM_OF_BYTES = _Op(_times, lambda x, shares: _times(x, int(shares.sum())), few=True)


def _shares(order: np.ndarray, turn: int, few: bool) -> np.ndarray:
    """The shares of all ranks in a turn: small integers that differ for up to 27 ranks, in some ``order`` of them.

    So sums of numbers below 128 are exact in all floats up to a hundred thousand ranks.  If only ``few`` are not 0, the
    sum of all is at most 6.
    """
    if few:
        places = (order + turn) % max(len(order), 3)
        return np.where(places < 6, places % 3, 0)
    return (order + turn) % 27


class Buffers:
    """The buffers of this rank, ``send`` and ``recv`` as mpi4py takes them: one array or two, with data of this turn.

    ``common`` are the elements that all ranks make theirs from; ``empty`` makes the arrays.
    """

    def __init__(
        self, comm: MPI.Intracomm, task: Task, common: np.ndarray, in_place: bool, unaligned: bool, empty: Memory
    ) -> None:
        self._task, self._common, self._rank = task, common, comm.rank
        of_bytes = task.op == "sum" and task.dtype.itemsize == 1 and task.row.reduces
        self._op = _SUM_OF_BYTES if of_bytes else OPS[task.op]
        self._cuts = np.array(cuts_of(None, task.count, comm.size))
        own, whole, nothing = slice(*self._cuts[comm.rank :][:2]), slice(0, task.count), slice(0, 0)
        row = task.row
        self._receives = row.receives(comm.rank, task.root)
        sends = row.sends(comm.rank, task.root)
        self._sent_part = (own if row.sends_part else whole) if sends else nothing
        self._received_part = (own if row.receives_part else whole) if self._receives else nothing
        received = self._received_part.stop - self._received_part.start
        before = 1 if unaligned else 0
        self._memory = empty(before + (task.count if in_place else received), task.dtype)[before:]
        self._received = self._memory[:received]
        self._sent = self._memory[self._sent_part]
        if not in_place:
            self._sent = empty(before + self._sent_part.stop - self._sent_part.start, task.dtype)[before:]
        self._only_read = not in_place or not self._receives  # what is sent
        self._pass(self._sent, self._memory)

    def _pass(self, sent: Any, memory: Any) -> None:
        """Pass these arrays to the call."""
        moved = is_half(self._task.dtype) and not self._task.row.reduces
        if moved:  # the MPI library need not know what they are
            sent, memory = sent.view(np.int16), memory.view(np.int16)
        self.send: Any = sent if self._only_read else MPI.IN_PLACE
        self.recv: Any = memory if self._receives else None

    def completed(self, call: Callable[[], object]) -> Callable[[], object]:
        """Make the call, and wait until its result is complete."""
        return call

    def fill(self, order: np.ndarray, turn: int) -> None:
        """Overwrite everything with the data of this turn."""
        self._shares = _shares(order, turn, self._op.few)
        self._memory.view(np.uint8)[:] = 0xFF  # as floats, these are not numbers
        for here, there in _blocks(self._sent_part):
            self._sent[here] = self._expected_sent(there)

    def wrong(self, returned: object) -> int:
        """Count the wrong elements in the result, which is the array ``returned`` or the receive buffer.

        Elements of read-only buffers that have changed count too.
        """
        result = returned if isinstance(returned, np.ndarray) else self._received
        if result.shape != self._received.shape:
            return max(self._received.size, 1)
        pairs: Iterator[tuple[np.ndarray, np.ndarray]] = (
            (result[here], self._expected(there)) for here, there in _blocks(self._received_part)
        )
        if self._only_read:
            sent = ((self._sent[here], self._expected_sent(there)) for here, there in _blocks(self._sent_part))
            pairs = chain(pairs, sent)
        return sum(int(np.count_nonzero(found != right)) for found, right in pairs)

    def _expected_sent(self, there: slice) -> np.ndarray:
        return self._cast(self._op.one(self._common[there].astype(np.int32), int(self._shares[self._rank])))

    def _expected(self, there: slice) -> np.ndarray:
        x, row = self._common[there].astype(np.int32), self._task.row
        if row.reduces:
            return self._cast(self._op.all(x, self._shares))
        if row.from_root:
            return self._cast(x + int(self._shares[self._task.root]))
        owners = np.searchsorted(self._cuts, np.arange(there.start, there.stop), "right") - 1
        return self._cast(x + self._shares[owners].astype(np.int32))

    def _cast(self, exact: np.ndarray) -> np.ndarray:
        """To the type of the task; floats of 16 bits are rounded once, as results are."""
        with np.errstate(over="ignore"):
            return exact.astype(self._task.dtype)


class GpuBuffers(Buffers):
    """Buffers on the current GPU; data are made and checked in host memory, and copied outside the clock."""

    def __init__(
        self, comm: MPI.Intracomm, task: Task, common: np.ndarray, in_place: bool, unaligned: bool, empty: Memory
    ) -> None:
        super().__init__(comm, task, common, in_place, unaligned, empty)
        before = 1 if unaligned else 0

        def like(host: np.ndarray) -> Any:
            return cupy().empty(before + len(host), host.dtype)[before:]

        memory = like(self._memory)
        sent = memory[self._sent_part] if in_place else like(self._sent)
        self._hosts = [(Array(memory), self._memory)]
        if not in_place:
            self._hosts.append((Array(sent), self._sent))
        self._pass(sent, memory)

    def completed(self, call: Callable[[], object]) -> Callable[[], object]:
        """Make the call, and wait until the current stream has completed it."""
        stream = cupy().cuda.get_current_stream()

        def awaited() -> None:
            call()
            stream.synchronize()

        return awaited

    def fill(self, order: np.ndarray, turn: int) -> None:
        """Overwrite everything with the data of this turn, and copy it to the GPU."""
        super().fill(order, turn)
        for array, host in self._hosts:
            array.store(host)
            array.stream.synchronize()

    def wrong(self, returned: object) -> int:
        """Count the wrong elements in the result, after copying it to host memory."""
        for array, host in self._hosts:
            array.load(host)
            array.stream.synchronize()
        return super().wrong(None)


def _blocks(part: slice) -> Iterator[tuple[slice, slice]]:
    """A part block by block: where in an array of its own, and where in the whole."""
    for start in range(part.start, part.stop, BLOCK):
        stop = min(start + BLOCK, part.stop)
        yield slice(start - part.start, stop - part.start), slice(start, stop)


def own_memory(count: int, dtype: np.dtype) -> np.ndarray:
    """A ``Memory`` of this process alone, from the beginning of a page."""
    memory = np.empty(count * dtype.itemsize + ALIGNED, np.uint8)
    start = -memory.ctypes.data % ALIGNED
    return memory[start : start + count * dtype.itemsize].view(dtype)
