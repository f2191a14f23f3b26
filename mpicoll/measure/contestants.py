"""The implementations that are compared: ``auto``, native, shared memory, and every algorithm of the table."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
from mpi4py import MPI

from ..algorithms import ALGORITHMS
from ..collective import COLLECTIVES
from ..errors import UserError
from ..mpi import gpu
from ..mpi.buffers import is_half
from ..mpi.comm import Comm
from ..mpi.operations import MOVE, operation
from ..mpi.request import cuts_of
from ..mpi.state import state_of
from ..tuning.rules import NATIVE, SHARED, WAYS
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
    if not (is_half(dtype) and "reduce" in collective):
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
    devices = state_of(ours).join_devices(gpu.cupy().cuda.Device().id)
    reduces = "reduce" in collective
    done = operation(op, dtype) if reduces else MOVE

    def latest_path() -> str:
        paths = ", ".join({*devices.went.values()})
        devices.went.clear()
        return paths

    found: dict[str, Implementation] = {"auto": WithPath(partial(call_of, ours), latest_path)}
    if not (is_half(dtype) and reduces):
        found[NATIVE] = partial(_by_hand, MPI.Intracomm(comm))
    refused = {}
    for path in WAYS:
        against = devices.why[path] if path not in named else ""
        try:
            if not against:
                devices.ways(path, COLLECTIVES[collective], done, dtype, False)
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
    op: MPI.Op = getattr(MPI, task.op.upper())
    cuts = cuts_of(None, task.count, comm.size)
    counts = [after - before for before, after in pairwise(cuts)]
    calls: dict[str, Callable[[], object]] = {
        "allreduce": partial(comm.Allreduce, send, recv, op, **options),
        "reduce": partial(comm.Reduce, send, recv, op, task.root, **options),
        "bcast": partial(comm.Bcast, recv, task.root, **options),
        "reduce_scatter": partial(comm.Reduce_scatter_block, send, recv, op, **options)
        if len({*counts}) == 1
        else partial(comm.Reduce_scatter, send, recv, counts, op, **options),
        "allgather": partial(comm.Allgather, send, recv, **options)
        if len({*counts}) == 1
        else partial(comm.Allgatherv, send, [recv, counts], **options),
    }
    return calls[task.collective]


def _shared_result(comm: Comm, task: Task, send: Any, recv: Any) -> Callable[[], object]:
    own = recv if send is MPI.IN_PLACE else send
    return partial(comm.allreduce_shared, own, getattr(MPI, task.op.upper()))


def _by_hand(comm: MPI.Intracomm, task: Task, send: Any, recv: Any) -> Callable[[], object]:
    """Return a call as one writes it with CuPy and mpi4py alone: a copy by ``get``, the native call, a copy back."""
    at_root = task.collective == "bcast" and comm.rank == task.root
    fetched = send is MPI.IN_PLACE and (at_root or task.collective != "bcast")

    def call() -> None:
        sent = send if send is MPI.IN_PLACE else send.get()
        received = None
        if recv is not None:
            received = recv.get() if fetched else np.empty(recv.shape, recv.dtype)
        call_of(comm, task, sent, received)()
        if recv is not None and not at_root:
            recv.set(received)

    return call
