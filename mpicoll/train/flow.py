"""Messages between the stages of a pipeline: outputs forward, errors backward."""

import os
from time import perf_counter

import numpy as np
from mpi4py import MPI

from ..mpi import record
from ..mpi.gpu import staging
from ..mpi.gpu.array import Array
from ..mpi.state import state_of
from ..pipeline import Kind
from .group import Spent
from .transfer import synchronize

TAGS = {Kind.FORWARD: 1, Kind.BACKWARD: 2}
NAMES = {Kind.FORWARD: "outputs", Kind.BACKWARD: "errors"}


class Flow:
    """Messages between a stage and its neighbors in ``comm``: outputs to the next stage, errors to the one before.

    ``shapes`` are the shapes of the arrays to receive, by kind, in the order of micro-batches.  They are received on
    the device of ``like``, in its dtype.  A receive is always posted for the next array of each kind, and sends are
    waited for in ``end`` only, so that no stage waits for another to receive.

    Arrays on a GPU are sent and received through page-locked memory, which CuPy reuses.  A send waits for the copy that
    MPI reads; a received array is copied on the current stream, without waiting.
    """

    def __init__(
        self, comm: MPI.Intracomm, like: np.ndarray, shapes: dict[Kind, list[tuple[int, int]]], spent: Spent
    ) -> None:
        self._comm, self._like, self._spent = comm, like, spent
        self._on_host = isinstance(like, np.ndarray)
        self._from = {Kind.FORWARD: comm.rank - 1, Kind.BACKWARD: comm.rank + 1}
        self._to = {Kind.FORWARD: comm.rank + 1, Kind.BACKWARD: comm.rank - 1}
        self._shapes = {kind: iter(found) for kind, found in shapes.items()}
        self._coming: dict[Kind, tuple[np.ndarray, MPI.Request]] = {}
        self._going: list[tuple[np.ndarray, MPI.Request]] = []  # kept unchanged until they have been sent
        for kind in shapes:
            self._post(kind)

    def _post(self, kind: Kind) -> None:
        shape = next(self._shapes[kind], None)
        if shape is not None:
            array = self._memory(shape)
            self._coming[kind] = array, self._comm.Irecv(array, self._from[kind], TAGS[kind])

    def _memory(self, shape: tuple[int, int]) -> np.ndarray:
        """Host memory to receive into, page-locked if the array is copied to a GPU afterwards."""
        dtype = self._like.dtype
        if self._on_host:
            return np.empty(shape, dtype)
        return staging.pinned(shape[0] * shape[1] * dtype.itemsize).view(dtype).reshape(shape)

    def take(self, kind: Kind) -> np.ndarray:
        """Receive the next array of a kind."""
        array, request = self._coming.pop(kind)
        self._wait(request, f"waiting for {NAMES[kind]} of another stage")
        self._forget()
        self._post(kind)
        if self._on_host:
            return array
        there = np.empty(array.shape, array.dtype, like=self._like)
        staging.deliver(array, Array(there))
        return there

    def send(self, kind: Kind, array: np.ndarray) -> None:
        """Send an array of a kind to the neighbor that receives it; the array must not be written to any more."""
        self._forget()
        if not array.flags.c_contiguous:  # as a sparse matrix times a dense one is on a GPU, where it comes by columns
            array = array.copy(order="C")
        host = array if self._on_host else staging.staged(Array(array), load=True)
        self._going.append((host, self._comm.Isend(host, self._to[kind], TAGS[kind])))
        self._spent.count(host.nbytes, 1)

    def _forget(self) -> None:
        """Drop the arrays that have been sent."""
        self._going = [sent for sent in self._going if not sent[1].Test()]

    def end(self) -> None:
        """Wait until all arrays have been sent."""
        for _, request in self._going:
            self._wait(request, "waiting for another stage to receive")
        self._going.clear()

    def _wait(self, request: MPI.Request, what: str) -> None:
        if not request.Test():
            synchronize(self._like)  # while the GPU computes, it is not this that is waited for
            start = perf_counter()
            with record.during(what, state_of(self._comm)):
                while not request.Test():
                    os.sched_yield()  # MPI itself would not, and the other stage may need this core
            took = perf_counter() - start
            self._spent.seconds, self._spent.waiting = self._spent.seconds + took, self._spent.waiting + took
