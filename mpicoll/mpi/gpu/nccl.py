"""The path ``nccl``: NCCL, through CuPy, where each rank has a GPU of its own."""

import warnings
from contextlib import suppress
from typing import Any

import numpy as np
from mpi4py import MPI

from ...collective import Collective
from ...errors import reason
from ..operations import Operation
from ..request import Request
from . import launching
from .array import Array, cupy, on

_TYPES = {
    "int8": "INT8",
    "uint8": "UINT8",
    "int32": "INT32",
    "uint32": "UINT32",
    "int64": "INT64",
    "uint64": "UINT64",
    "float16": "FLOAT16",
    "bfloat16": "BFLOAT16",
    "float32": "FLOAT32",
    "float64": "FLOAT64",
}
_OPERATIONS = {"sum": "SUM", "mean": "SUM", "prod": "PROD", "max": "MAX", "min": "MIN", "move": "SUM"}


def _nccl() -> Any:
    """CuPy's module, which warns when it is imported and there is no library."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from cupy.cuda import nccl
    return nccl


def missing() -> str:
    """Why there is no NCCL; empty if there is."""
    try:
        return "" if _nccl().available else "NCCL cannot be loaded: pip install nvidia-nccl-cu13, or cu12"
    except ImportError as error:
        return f"CuPy was built without NCCL ({error})"


class Nccl:
    """NCCL for the ranks of a communicator, each of which has the device of this number.

    ``why`` is why the path is unavailable, if it is.
    """

    def __init__(self, comm: MPI.Intracomm, device: int, why: str) -> None:
        self._comm, self._device, self.why = comm, device, why
        self._communicator: Any = None  # from the first call on

    def refusal(self, row: Collective, operation: Operation, dtype: np.dtype) -> str:
        """Why such a call cannot take this path; empty if it can."""
        if self.why:
            return self.why
        if row.nccl is None:
            return f"NCCL has no {row.name}"
        known = operation.name in _OPERATIONS and dtype.name in _TYPES
        return "" if known else f"NCCL has no {operation.name} of {dtype}"

    def run(self, request: Request, send: Any, recv: Any) -> bool:
        """Run a request; false, on all ranks, if its arrays cannot take this path, and nothing was done."""
        if request.counts is not None:
            return False
        operation = request.operation
        arrays = [array for array in (send, recv) if array is not None]
        able = all(isinstance(array, Array) and array.device == self._device for array in arrays)
        if not self._comm.allreduce(able, MPI.LAND):
            return False
        if self._communicator is None and not self._begin():
            return False
        self._put(request.row, send, recv, operation.name, request.root or 0)
        if recv is not None and operation.finish:
            launching.finish(recv, operation, self._comm.size)
        return True

    def _begin(self) -> bool:
        """Make the communicator; false, on all ranks, if that cannot be done."""
        number, why = None, ""
        try:
            number = _nccl().get_unique_id() if self._comm.rank == 0 else None
        except Exception as error:
            why = reason(error)
        number, why = self._comm.bcast((number, why))
        if not why:
            try:
                with cupy().cuda.Device(self._device):
                    self._communicator = _nccl().NcclCommunicator(self._comm.size, number, self._comm.rank)
            except Exception as error:
                why = reason(error)
            why = next(filter(None, self._comm.allgather(why)), "")
        self.why = why
        return not why

    def _put(self, row: Collective, send: Array | None, recv: Array | None, operation: str, root: int) -> None:
        """Put a collective on the stream of its arrays, which have the same one; ``root`` is a rank."""
        nccl, array = _nccl(), recv if send is None else send
        assert array is not None
        assert row.nccl is not None
        pointers = array.pointer, array.pointer if recv is None else recv.pointer
        count = recv.size if row.receives_part and recv is not None else array.size
        kind = getattr(nccl, f"NCCL_{_TYPES[array.dtype.name]}")
        op = getattr(nccl, f"NCCL_{_OPERATIONS[operation]}")
        with on(array):
            row.nccl(self._communicator, *pointers, count, kind, op, root, array.stream.ptr)

    def release(self) -> None:
        """Free the communicator."""
        if self._communicator is not None:
            with suppress(Exception):  # at the end of the program CUDA may have ended before MPI
                self._communicator.destroy()
            self._communicator = None
