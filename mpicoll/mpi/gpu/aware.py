"""The path ``aware``: the MPI library is given device arrays as they are."""

import os
from typing import Any

import numpy as np
from mpi4py import MPI

from ...collective import Collective
from .. import operations
from ..buffers import is_half
from ..operations import Operation
from ..request import Request
from . import launching
from .array import Array, synchronize
from .probe import probe


def doubt() -> str:
    """Why the MPI library is not trusted with device arrays; empty if the user says that it works."""
    said = os.environ.get("MPICOLL_GPU_AWARE", "")
    if said not in ("", "0", "1"):
        return f"MPICOLL_GPU_AWARE={said} is not understood: expected 1 or 0"
    return (
        ""
        if said == "1"
        else "not unless it is asked for by its name, and tried, or MPICOLL_GPU_AWARE=1 says that it works"
    )


class Aware:
    """The MPI library of the ranks of a communicator; ``why`` is why it is not trusted, if it is not."""

    def __init__(self, comm: MPI.Intracomm, why: str) -> None:
        self._comm, self.why, self._probed = comm, why, dict[str, str]()
        self._trusted = not why

    def refusal(self, row: Collective, operation: Operation, dtype: np.dtype) -> str:
        """Why such a call cannot take this path; empty if it can.  A collective call, unless the library is trusted."""
        if is_half(dtype) and operation.reduces:
            return f"the MPI library does not know {dtype}"
        return "" if self._trusted else self._probe(row.name)

    def _probe(self, collective: str) -> str:
        """Why the library fails in a job of two ranks that may crash; empty if it does not.  Equal on all ranks."""
        if collective not in self._probed:
            self._probed[collective] = self._comm.bcast(probe(collective) if self._comm.rank == 0 else None)
        return self._probed[collective]

    def run(self, request: Request, send: Any, recv: Any) -> bool:
        """Run a request; arrays may be in host memory, too."""
        synchronize([array for array in (send, recv) if isinstance(array, Array)])  # MPI knows nothing of streams
        row, operation, p = request.row, request.operation, self._comm.size
        call = row.native(self._comm, operation.native, request.root or 0, request.counts)
        given, taken = (array.flat() if isinstance(array, Array) else array for array in (send, recv))
        if row.parted:
            if row.sends_part and (request.in_place or _is_part(send, recv)):
                given = MPI.IN_PLACE
            elif request.in_place:
                taken = MPI.IN_PLACE
            call(given, taken)
        else:
            longest, in_place = operations.MAX_COUNT, send is recv
            for lo in range(0, request.elements, longest):
                one, other = (None if x is None else x[lo : lo + longest] for x in (given, taken))
                call(MPI.IN_PLACE if in_place else one, other)
        if operation.finish and isinstance(recv, Array):
            launching.finish(recv, operation, p)
        elif operation.finish and isinstance(recv, np.ndarray):
            operation.finish(recv, p)
        return True

    def release(self) -> None:
        """Nothing to free."""


def _is_part(one: Array | np.ndarray | None, other: Array | np.ndarray | None) -> bool:
    """Whether one array lies in the other."""
    if not (isinstance(one, Array) and isinstance(other, Array)):
        return False
    return other.pointer <= one.pointer < other.pointer + other.nbytes
