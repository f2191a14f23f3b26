"""The collectives as functions: check the arguments, find the plan, run it."""

from threading import Lock
from typing import Any

import numpy as np
from mpi4py import MPI

from ..algorithms import find
from .buffers import vector
from .plan import Plan

_OPERATIONS: dict[str, tuple[np.ufunc, MPI.Op]] = {
    "sum": (np.add, MPI.SUM),
    "prod": (np.multiply, MPI.PROD),
    "max": (np.maximum, MPI.MAX),
    "min": (np.minimum, MPI.MIN),
}

MAX_COUNT = 2**30
"""Elements in one call of the MPI library's own: past 2^31 some fail, and some return the input unreduced."""

MAX_PLANS = 64
"""Plans kept per communicator; the one not used for longest goes first."""


class _State:
    """What mpicoll keeps with a communicator: a private duplicate, so that its messages never meet the user's; the
    plans made so far; and scratch memory for whichever runs, as large as the largest that ran."""

    def __init__(self, comm: MPI.Intracomm) -> None:
        self.comm = comm.Dup()
        self.plans: dict[tuple[Any, ...], Plan] = {}
        self.unfinished = False
        self._scratch = np.empty(0, np.uint8)

    def plan(self, algorithm: str, count: int, dtype: np.dtype) -> Plan:
        key = (algorithm, count, dtype)
        plan = self.plans.pop(key, None)
        if plan is None:
            if len(self.plans) >= MAX_PLANS:
                del self.plans[next(iter(self.plans))]
            schedule = find("allreduce", algorithm).schedule(self.comm.size)
            plan = Plan(schedule, self.comm.rank, count, dtype)
        self.plans[key] = plan  # the newest last
        return plan

    def run(self, plan: Plan, vector: np.ndarray, op: np.ufunc) -> None:
        if self.unfinished:
            raise RuntimeError(
                "an earlier call on this communicator was interrupted by an exception, and its messages may still be "
                "under way: go on with a new communicator (comm.Dup())"
            )
        if len(self._scratch) < plan.scratch_bytes:
            self._scratch = np.empty(plan.scratch_bytes, np.uint8)
        self.unfinished = True
        plan.run(self.comm, vector, op, self._scratch)
        self.unfinished = False


def _release(comm: MPI.Comm, keyval: int, state: _State) -> None:
    if not MPI.Is_finalized():
        state.comm.Free()


_keyval = MPI.KEYVAL_INVALID
_keyval_lock = Lock()


def _create_keyval() -> None:
    global _keyval
    with _keyval_lock:
        if _keyval == MPI.KEYVAL_INVALID:  # not at import: MPI may not be initialised yet
            _keyval = MPI.Comm.Create_keyval(delete_fn=_release)


def _check_comm(comm: Any) -> None:
    if not isinstance(comm, MPI.Intracomm) or not comm:
        what = "one that is null or was freed" if isinstance(comm, MPI.Comm) and not comm else type(comm).__name__
        raise TypeError(f"expected an mpi4py intracommunicator, got {what}")


def _state(comm: MPI.Intracomm) -> _State:
    if _keyval == MPI.KEYVAL_INVALID:
        _create_keyval()
    state = comm.Get_attr(_keyval)
    if not isinstance(state, _State):
        state = _State(comm)
        comm.Set_attr(_keyval, state)
    return state


def allreduce(x: np.ndarray, comm: MPI.Intracomm, op: str | MPI.Op = "sum", algorithm: str = "circulant") -> np.ndarray:
    """Combine the arrays of all ranks elementwise, in place: every rank's ``x`` ends with the same bits.

    Parameters
    ----------
    x
        A C-contiguous NumPy array of any shape, integers, floats of at least 32 bits or complex numbers; the same
        shape and dtype on all ranks. A ``max`` or ``min`` with a NaN anywhere is NaN.
    comm
        An mpi4py intracommunicator. The first call on a communicator duplicates it and so involves all its ranks,
        as the call itself does; freeing it frees the duplicate.
    op
        ``"sum"``, ``"prod"``, ``"max"`` or ``"min"``, or mpi4py's ``MPI.SUM``, ``MPI.PROD``, ``MPI.MAX``, ``MPI.MIN``.
    algorithm
        A name from ``mpicoll.ALGORITHMS["allreduce"]``, or ``"native"`` for the MPI library's own. What that does with
        NaN and with signed zeros, and whether all ranks get the same bits, is up to the library.

    Returns
    -------
    ``x`` itself.

    Raises
    ------
    TypeError, ValueError
        For an array, operation or algorithm that cannot be used, before anything is sent. Raised on the rank that
        made the mistake: a mistake on some ranks only leaves the others waiting, unless the job is aborted
        (``mpirun ... python -m mpi4py script.py`` does that).
    """
    flat = vector(x)
    ufunc, native = _operation(op, flat.dtype)
    _check_comm(comm)
    if algorithm == "native":
        for start in range(0, len(flat), MAX_COUNT):
            comm.Allreduce(MPI.IN_PLACE, flat[start : start + MAX_COUNT], native)
        return x
    find("allreduce", algorithm)
    state = _state(comm)
    state.run(state.plan(algorithm, len(flat), flat.dtype), flat, ufunc)
    return x


def ring_allreduce(x: np.ndarray, comm: MPI.Intracomm, op: str | MPI.Op = "sum") -> np.ndarray:
    """``allreduce`` by the ring algorithm: 2(p - 1) rounds, 2(p - 1)/p of ``x`` sent by each rank."""
    return allreduce(x, comm, op, "ring")


def bytes_sent(x: np.ndarray, comm: MPI.Intracomm, algorithm: str) -> int | None:
    """What this rank sends in an ``allreduce`` of ``x``; ``None`` for ``"native"``, where it cannot be known."""
    if algorithm == "native":
        return None
    return Plan(find("allreduce", algorithm).schedule(comm.size), comm.rank, x.size, x.dtype).bytes_sent


def _operation(op: str | MPI.Op, dtype: np.dtype) -> tuple[np.ufunc, MPI.Op]:
    name = op if isinstance(op, str) else next((n for n, (_, o) in _OPERATIONS.items() if o == op), None)
    if name not in _OPERATIONS:
        known = ", ".join(_OPERATIONS)
        raise ValueError(f"unknown operation {op!r}: expected {known}, or the MPI.Op of one of them")
    if name in ("max", "min") and dtype.kind == "c":
        raise TypeError(f"{name} of complex numbers is not defined")
    return _OPERATIONS[name]
