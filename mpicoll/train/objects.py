"""Objects with large NumPy arrays inside, moved from rank to rank: arrays as they are, in messages of limited size."""

import pickle
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from mpi4py import MPI

T = TypeVar("T")

MESSAGE_BYTES = 2**28  # at most; counts past 2^31 fail on some MPIs


def _dump(value: Any) -> tuple[bytes, list[np.ndarray]]:
    buffers: list[pickle.PickleBuffer] = []
    rest = pickle.dumps(value, 5, buffer_callback=buffers.append)
    return rest, [np.frombuffer(buffer.raw(), np.uint8) for buffer in buffers]


def _move(arrays: list[np.ndarray], move: Callable[[np.ndarray], Any]) -> None:
    for array in arrays:
        for start in range(0, len(array), MESSAGE_BYTES):
            move(array[start : start + MESSAGE_BYTES])


def broadcast(comm: MPI.Intracomm, value: Any) -> Any:
    """The value of rank 0, on every rank; a collective call."""
    rest, arrays = _dump(value)
    rest, sizes = comm.bcast((rest, [len(array) for array in arrays]))
    if comm.rank:
        arrays = [np.empty(size, np.uint8) for size in sizes]
    _move(arrays, lambda piece: comm.Bcast(piece, root=0))
    return pickle.loads(rest, buffers=arrays) if comm.rank else value


def scatter(comm: MPI.Intracomm, cut: Callable[[int], T]) -> T:
    """On each rank the ``cut(rank)`` that rank 0 makes; a collective call."""
    if comm.rank:
        rest, sizes = comm.recv(source=0)
        arrays = [np.empty(size, np.uint8) for size in sizes]
        _move(arrays, lambda piece: comm.Recv(piece, 0))
        return pickle.loads(rest, buffers=arrays)
    for rank in range(1, comm.size):
        rest, arrays = _dump(cut(rank))
        comm.send((rest, [len(array) for array in arrays]), rank)
        _move(arrays, lambda piece, rank=rank: comm.Send(piece, rank))  # type: ignore[misc]
    return cut(0)
