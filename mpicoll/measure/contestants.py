"""The implementations that are compared: ``auto``, native, shared memory, and every algorithm of the table."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from mpi4py import MPI

from ..algorithms import ALGORITHMS
from ..collective import COLLECTIVES
from ..errors import UserError
from ..mpi.buffers import is_half
from ..mpi.comm import Comm
from ..mpi.gpu.array import cupy
from ..mpi.operations import MOVE, operation
from ..mpi.request import cuts_of, lengths_of
from ..mpi.state import state_of
from ..tuning.rules import GPU_PATHS, NATIVE, SHARED
from .task import Task
from .testdata import Memory

SHARED_ARRAYS, SHARED_RESULT = "shared_arrays", "shared_result"

Implementation = Callable[[Task, Any, Any], Callable[[], object]]
"""From a task and the send and receive buffers, as mpi4py takes them, to the call that is timed.

An array that it returns is its result; if it returns none, what it received is.
"""


@dataclass(frozen=True)
class WithMemory:
    """An ``Implementation`` whose buffers lie in memory that it chooses, as ``Comm.empty`` allocates it."""

    prepare: Implementation
    empty: Memory

    def __call__(self, task: Task, send: Any, recv: Any) -> Callable[[], object]:
        """Make the call with the buffers of this turn."""
        return self.prepare(task, send, recv)


@dataclass(frozen=True)
class WithPath:
    """An ``Implementation`` on a GPU; ``latest_path`` names the path of the latest call, once."""

    prepare: Implementation
    latest_path: Callable[[], str]

    def __call__(self, task: Task, send: Any, recv: Any) -> Callable[[], object]:
        """Make the call with the buffers of this turn."""
        return self.prepare(task, send, recv)


def implementations(comm: MPI.Intracomm, collective: str, dtype: np.dtype, check: str) -> dict[str, Implementation]:
    """Return the implementations of a task: ``auto``, native, and every algorithm of the table.

    Native is left out for 16-bit floats, which it does not sum as float32.  If all ranks share memory (for an
    allreduce, those of each node), also ``shared`` on ordinary arrays, ``shared_arrays`` and, for an allreduce,
    ``shared_result``.
    """
    ours = Comm(comm, check=check)
    state = state_of(ours)
    found: dict[str, Implementation] = {"auto": partial(call_of, ours)}
    if not (is_half(dtype) and COLLECTIVES[collective].reduces):
        found[NATIVE] = partial(call_of, MPI.Intracomm(comm))
    if state.can_share(collective, False, operation("sum", dtype)):
        found[SHARED] = partial(call_of, ours, algorithm=SHARED)
    if state.shares:
        found[SHARED_ARRAYS] = WithMemory(partial(call_of, ours), ours.empty)
        if collective == "allreduce":
            found[SHARED_RESULT] = WithMemory(partial(_shared_result, ours), ours.empty)
    return found | {name: partial(call_of, ours, algorithm=name) for name in ALGORITHMS[collective]}


def implementations_on_gpu(
    comm: MPI.Intracomm, collective: str, dtype: np.dtype, check: str, op: str = "sum", named: Sequence[str] = ()
) -> tuple[dict[str, Implementation], dict[str, str]]:
    """Return the implementations for arrays on the current GPU, and the reasons why other paths are not available.

    They are ``auto``, native with copies written by hand, every path that is available here, and every algorithm of the
    table on data staged in host memory.  Raises ``UserError`` if a path that is ``named`` is not available.
    """
    ours = Comm(comm, check=check)
    devices = state_of(ours).join_devices(cupy().cuda.Device().id)
    reduces = COLLECTIVES[collective].reduces
    done = operation(op, dtype) if reduces else MOVE

    def latest_path() -> str:
        paths = ", ".join({*devices.took.values()})
        devices.took.clear()
        return paths

    found: dict[str, Implementation] = {"auto": WithPath(partial(call_of, ours), latest_path)}
    if not (is_half(dtype) and reduces):
        found[NATIVE] = partial(_by_hand, MPI.Intracomm(comm))
    refused = {}
    for path in GPU_PATHS:
        against = devices.why[path] if path not in named else ""
        try:
            if not against:
                devices.paths(path, COLLECTIVES[collective], done, dtype, False)
        except ValueError as error:
            if path in named:
                raise UserError(str(error)) from None
            against = str(error)
        if against:
            refused[path] = against
        else:
            found[path] = WithPath(partial(call_of, ours, algorithm=path), latest_path)
    staged = {name: WithPath(partial(call_of, ours, algorithm=name), latest_path) for name in ALGORITHMS[collective]}
    return found | staged, refused


def call_of(comm: MPI.Intracomm, task: Task, send: Any, recv: Any, **options: str) -> Callable[[], object]:
    """Return a call of mpi4py's method for the task; if all parts are equal, of the method for equal parts."""
    lengths = lengths_of(cuts_of(None, task.count, comm.size))
    counts = lengths if len({*lengths}) > 1 else None
    call = task.row.native(_WithOptions(comm, options), getattr(MPI, task.op.upper()), task.root, counts)
    return partial(call, None if task.row.from_root and send is MPI.IN_PLACE else send, recv)


class _WithOptions:
    """A communicator whose methods are called with ``options``."""

    def __init__(self, comm: MPI.Intracomm, options: dict[str, str]) -> None:
        self._comm, self._options = comm, options

    def __getattr__(self, name: str) -> Any:
        return partial(getattr(self._comm, name), **self._options)


def _shared_result(comm: Comm, task: Task, send: Any, recv: Any) -> Callable[[], object]:
    own = recv if send is MPI.IN_PLACE else send
    return partial(comm.allreduce_shared, own, getattr(MPI, task.op.upper()))


def _by_hand(comm: MPI.Intracomm, task: Task, send: Any, recv: Any) -> Callable[[], object]:
    """Return a call as one writes it with CuPy and mpi4py alone: a copy by ``get``, the native call, a copy back."""
    at_root = task.row.from_root and comm.rank == task.root
    fetched = send is MPI.IN_PLACE and (at_root or not task.row.from_root)

    def call() -> None:
        sent = send if send is MPI.IN_PLACE else send.get()
        received = None
        if recv is not None:
            received = recv.get() if fetched else np.empty(recv.shape, recv.dtype)
        call_of(comm, task, sent, received)()
        if recv is not None and not at_root:
            recv.set(received)

    return call
