"""The collectives as functions: check the arguments, find the plan, run it."""

from functools import cache
from typing import Any

import numpy as np
from mpi4py import MPI

from ..algorithms import ALGORITHMS
from .buffers import vector
from .plan import Plan

_OPERATIONS: dict[str, tuple[np.ufunc, MPI.Op]] = {
    "sum": (np.add, MPI.SUM),
    "prod": (np.multiply, MPI.PROD),
    "max": (np.maximum, MPI.MAX),
    "min": (np.minimum, MPI.MIN),
}

MAX_PLANS = 64
"""Plans kept per communicator; the one not used for longest goes first."""


class _State:
    """What mpicoll keeps with a communicator: a private duplicate, so that its messages never meet the user's, and
    the plans made so far."""

    def __init__(self, comm: MPI.Intracomm) -> None:
        self.comm = comm.Dup()
        self.plans: dict[tuple[Any, ...], Plan] = {}

    def plan(self, algorithm: str, count: int, dtype: np.dtype) -> Plan:
        key = (algorithm, count, dtype)
        plan = self.plans.pop(key, None)
        if plan is None:
            if len(self.plans) >= MAX_PLANS:
                del self.plans[next(iter(self.plans))]
            schedule = ALGORITHMS["allreduce"][algorithm].schedule(self.comm.size)
            plan = Plan(schedule, self.comm.rank, count, dtype)
        self.plans[key] = plan  # the newest last
        return plan


def _release(comm: MPI.Comm, keyval: int, state: _State) -> None:
    if not MPI.Is_finalized():
        state.comm.Free()


@cache
def _keyval() -> int:
    return MPI.Comm.Create_keyval(delete_fn=_release)


def _state(comm: MPI.Intracomm) -> _State:
    if not isinstance(comm, MPI.Intracomm):
        raise TypeError(f"expected an mpi4py intracommunicator, got {type(comm).__name__}")
    state = comm.Get_attr(_keyval())
    if not isinstance(state, _State):
        state = _State(comm)
        comm.Set_attr(_keyval(), state)
    return state


def allreduce(x: np.ndarray, comm: MPI.Intracomm, op: str | MPI.Op = "sum", algorithm: str = "circulant") -> np.ndarray:
    """Combine the arrays of all ranks elementwise, in place: every rank's ``x`` ends with the same bits.

    Parameters
    ----------
    x
        A C-contiguous NumPy array of any shape, integers, floats of at least 32 bits or complex numbers; the same
        shape and dtype on all ranks.
    comm
        An mpi4py intracommunicator. The first call on a communicator duplicates it and so involves all its ranks,
        as the call itself does; freeing it frees the duplicate.
    op
        ``"sum"``, ``"prod"``, ``"max"`` or ``"min"``, or mpi4py's ``MPI.SUM``, ``MPI.PROD``, ``MPI.MAX``, ``MPI.MIN``.
    algorithm
        A name from ``mpicoll.ALGORITHMS["allreduce"]``, or ``"native"`` for the MPI library's own.

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
    check_algorithm(algorithm)
    if algorithm == "native":
        comm.Allreduce(MPI.IN_PLACE, flat, native)
    else:
        state = _state(comm)
        state.plan(algorithm, len(flat), flat.dtype).run(state.comm, flat, ufunc)
    return x


def ring_allreduce(x: np.ndarray, comm: MPI.Intracomm, op: str | MPI.Op = "sum") -> np.ndarray:
    """``allreduce`` by the ring algorithm: 2(p - 1) rounds, 2(p - 1)/p of ``x`` sent by each rank."""
    return allreduce(x, comm, op, "ring")


def bytes_sent(x: np.ndarray, comm: MPI.Intracomm, algorithm: str) -> int | None:
    """What this rank sends in an ``allreduce`` of ``x``; ``None`` for ``"native"``, where it cannot be known."""
    if algorithm == "native":
        return None
    return _state(comm).plan(algorithm, x.size, x.dtype).bytes_sent


def check_algorithm(name: str) -> None:
    """A ``ValueError`` that lists the known ones unless ``allreduce`` knows ``name``."""
    known = [*ALGORITHMS["allreduce"], "native"]
    if name not in known:
        raise ValueError(f"unknown allreduce algorithm {name!r}: expected one of {', '.join(known)}")


def _operation(op: str | MPI.Op, dtype: np.dtype) -> tuple[np.ufunc, MPI.Op]:
    name = op if isinstance(op, str) else next((n for n, (_, o) in _OPERATIONS.items() if o == op), None)
    if name not in _OPERATIONS:
        known = ", ".join(_OPERATIONS)
        raise ValueError(f"unknown operation {op!r}: expected {known}, or the MPI.Op of one of them")
    if name in ("max", "min") and dtype.kind == "c":
        raise TypeError(f"{name} of complex numbers is not defined")
    return _OPERATIONS[name]
