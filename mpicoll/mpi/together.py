"""Errors that all ranks raise together, so that none waits for one that has failed."""

from collections.abc import Callable
from typing import TypeVar

from mpi4py import MPI

from ..errors import UserError

T = TypeVar("T")


def on_root(comm: MPI.Intracomm, action: Callable[[], T]) -> T:
    """Call ``action`` on rank 0 and return its result on every rank.

    A ``UserError`` that it raises is raised on every rank.  A collective call.
    """
    value: T | None = None
    error: UserError | None = None
    if comm.rank == 0:
        try:
            value = action()
        except UserError as raised:
            error = raised
    value, error = comm.bcast((value, error))
    if error is not None:
        comm.Barrier()  # all raise at the same time, however late some ranks come
        raise error
    return value


def on_all(comm: MPI.Intracomm, action: Callable[[], T]) -> T:
    """Call ``action`` on every rank and return each rank's own result.

    If it raises a ``UserError`` on some ranks, every rank raises that of the lowest of them, which is named in the text
    unless it is rank 0.  A collective call.
    """
    value: T | None = None
    error: UserError | None = None
    try:
        value = action()
    except UserError as raised:
        error = raised
    failed = [(rank, error) for rank, error in enumerate(comm.allgather(error)) if error is not None]
    if failed:
        comm.Barrier()  # all raise at the same time, however late some ranks come
        rank, first = failed[0]
        raise UserError(f"{first} (on rank {rank})" if rank else str(first)) from error
    return value  # type: ignore[return-value]
