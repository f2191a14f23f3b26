"""NCCL, done by MPI."""

import functools
import importlib

import numpy as np

from . import now
from .runtime import runtime


class NcclError(RuntimeError):
    def __init__(self, status: int) -> None:
        self.status = status
        super().__init__({4: "NCCL_ERROR_INVALID_ARGUMENT", 5: "NCCL_ERROR_INVALID_USAGE"}[status])


NCCL_TYPES = ["INT8", "UINT8", "INT32", "UINT32", "INT64", "UINT64", "FLOAT16", "FLOAT32", "FLOAT64", "BFLOAT16"]
NCCL_OPERATIONS = ["SUM", "PROD", "MAX", "MIN", "AVG"]


class NcclCommunicator:
    """Of all ranks of the communicator that was given to ``install``.

    The ranks meet when they call, not when their streams get there, so that no rank waits for another that waits in
    MPI; what comes of it is written when the stream gets there.
    """

    def __init__(self, ndev: int, commId: tuple, rank: int) -> None:  # noqa: N803
        if len(commId) != 128 or now.fake.nccl is None or ndev != now.fake.nccl.size:
            raise NcclError(4)
        self._comm, self._device = now.fake.nccl.Split(0, rank), runtime.getDevice()
        everyone = self._comm.allgather((commId, now.fake.gpus[self._device]))
        if len({number for number, _ in everyone}) > 1:
            raise NcclError(4)
        if len({gpu for _, gpu in everyone}) < ndev:
            self.destroy()
            raise NcclError(5)  # Duplicate GPU detected

    def size(self) -> int:
        return self._comm.size

    def rank_id(self) -> int:
        return self._comm.rank

    def device_id(self) -> int:
        return self._device

    def destroy(self) -> None:
        if self._comm is not None:
            self._comm.Free()
            self._comm = None

    abort = destroy

    def _given(self, pointer: int, count: int, datatype: int, stream: int) -> np.ndarray:
        """What a buffer holds when the stream gets there, which is now."""
        queue, name = now.fake.queue(stream), NCCL_TYPES[datatype].lower()
        dtype = np.dtype(importlib.import_module("ml_dtypes").bfloat16 if name == "bfloat16" else name)
        queue.run()
        return now.fake.memory_at(pointer, count * dtype.itemsize).view(dtype).copy()

    def _put(self, pointer: int, values: np.ndarray, stream: int) -> None:
        memory = now.fake.memory_at(pointer, values.nbytes)
        now.fake.queue(stream).put(lambda: np.copyto(memory, values.view(np.uint8)))

    def _reduced(self, everyone: list[np.ndarray], op: int) -> np.ndarray:
        total = functools.reduce([np.add, np.multiply, np.maximum, np.minimum, np.add][op], everyone)
        return (total / len(everyone)).astype(total.dtype) if NCCL_OPERATIONS[op] == "AVG" else total

    def allReduce(  # noqa: N802
        self, sendbuf: int, recvbuf: int, count: int, datatype: int, op: int, stream: int
    ) -> None:
        everyone = self._comm.allgather(self._given(sendbuf, count, datatype, stream))
        self._put(recvbuf, self._reduced(everyone, op), stream)

    def reduce(self, sendbuf: int, recvbuf: int, count: int, datatype: int, op: int, root: int, stream: int) -> None:
        everyone = self._comm.gather(self._given(sendbuf, count, datatype, stream), root)
        if everyone is not None:
            self._put(recvbuf, self._reduced(everyone, op), stream)

    def bcast(self, buff: int, count: int, datatype: int, root: int, stream: int) -> None:
        self.broadcast(buff, buff, count, datatype, root, stream)

    def broadcast(self, sendbuff: int, recvbuff: int, count: int, datatype: int, root: int, stream: int) -> None:
        given = self._given(sendbuff, count, datatype, stream) if self._comm.rank == root else None
        self._put(recvbuff, self._comm.bcast(given, root), stream)

    def reduceScatter(  # noqa: N802
        self, sendbuf: int, recvbuf: int, recvcount: int, datatype: int, op: int, stream: int
    ) -> None:
        everyone = self._comm.allgather(self._given(sendbuf, recvcount * self._comm.size, datatype, stream))
        mine = slice(recvcount * self._comm.rank, recvcount * (self._comm.rank + 1))
        self._put(recvbuf, self._reduced(everyone, op)[mine], stream)

    def allGather(self, sendbuf: int, recvbuf: int, count: int, datatype: int, stream: int) -> None:  # noqa: N802
        everyone = self._comm.allgather(self._given(sendbuf, count, datatype, stream))
        self._put(recvbuf, np.concatenate(everyone), stream)
