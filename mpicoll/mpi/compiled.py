"""Calls from Python whose usual forms are made by the compiled part, from the first argument to the last."""

from collections.abc import Callable
from functools import update_wrapper
from typing import Any, TypeVar

from mpi4py import MPI

from ..collective import Collective
from . import agreement, attach, memory, native
from .progress import under_way

F = TypeVar("F", bound=Callable[..., Any])

if native.module is not None:
    looked_at = (under_way, attach.interrupted, memory.windows, vars(attach), vars(agreement))
    native.module.prepare(MPI.IN_PLACE, MPI.Intracomm, *looked_at, MPI.KEYVAL_INVALID)


def compiled(row: Collective, method: bool, op: Any) -> Callable[[F], F]:
    """Decorate what programs call: what ``Node.learn`` has stored goes by the compiled part, all else by the function.
    ``op`` is the operation if none is passed."""

    def wrap(function: F) -> F:
        if native.module is None:
            return function
        call: Any = update_wrapper(native.module.Call(function, op, method), function)
        native.calls[row, method] = call
        return call

    return wrap
