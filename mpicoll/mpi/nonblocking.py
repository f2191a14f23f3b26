"""Collectives that return at once, and those that are set up once: ``iallreduce``, ``allreduce_init``."""

from collections.abc import Iterator
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
from mpi4py import MPI

from ..algorithms import Algorithm
from ..collective import ALLREDUCE
from ..tuning.rules import NATIVE, Rule
from . import operations
from .agreement import Headers, check_level, level_of
from .attach import check_comm, whole
from .buffers import order_of, specification
from .engine import together
from .paths import Preference, choose, header_for, plan_of, told_of
from .plan import Bound
from .progress import Handle, NativeHandle, PersistentHandle
from .request import DEFAULT, Asked, Options, Raw, Request, on_host
from .select import defaults
from .state import State, find_state, state_of


def iallreduce(
    x: Any,
    comm: MPI.Intracomm,
    op: str | MPI.Op = "sum",
    algorithm: str = "auto",
    *,
    deterministic: bool | None = None,
    segments: int | None = None,
    wire: str | None = None,
    check: str | None = None,
    stream: Any = None,
) -> Handle | NativeHandle:
    """``allreduce`` that returns at once, with a handle: ``poll()`` it until it is ``True``, or ``wait()``.

    ``x`` must be left alone meanwhile; ``wait`` returns it. ``"auto"`` means native wherever that can do what
    is asked, since all of MPI's calls drive that; our algorithms are driven by calls to mpicoll alone (see
    ``Handle``). Those need a ``mpicoll.Comm``, whose private duplicate is made beforehand; and on no other communicator
    is the call compared between the ranks (``check``), which is done when it is waited for.
    """
    check_comm(comm)
    asked = _asked(comm, x, op, algorithm, deterministic, segments, wire, stream)
    with whole(comm):
        state = find_state(comm)
        rules = state.rules["allreduce"] if state else defaults("allreduce", comm.size)
        level, error = level_of(comm, check), None
        parts: list[Request] = []
        rows: list[Any] = []
        try:
            check_level(level)
            parts = on_host(asked, x)
            rows = [_row(part, rules, "native") for part in parts]
        except Exception as raised:
            error = raised
        comparison = None
        if state is not None and level != "off" and comm.size > 1:
            detail = (order_of(x),) if level == "full" else None
            comparison = state.agreement.begin(_headers(parts, rows, error), detail)
        if error is not None:
            raise error
        delivers = [part.deliver for part in parts if part.deliver]
        if all(row == NATIVE for row in rows):
            requests = [request for part in parts for request in _start_native(comm, part)]
            finishes: list[Any] = [*(partial(_finish, part) for part in parts), *delivers]
            return NativeHandle(requests, (x, op, parts), x, finishes, comparison)
        if state is None:
            raise ValueError(
                "iallreduce by an algorithm of ours needs a mpicoll.Comm, made beforehand: mpicoll.Comm(comm)"
            )
        ours = [_row(part, rules, "ours") if row == NATIVE else row for part, row in zip(parts, rows, strict=True)]
        bounds = chain.from_iterable(_bind(state, part, row) for part, row in zip(parts, ours, strict=True))
        return Handle(state, bounds, state.handle_tag(), x, delivers, comparison)


def allreduce_init(
    x: Any,
    comm: MPI.Intracomm,
    op: str | MPI.Op = "sum",
    algorithm: str = "auto",
    *,
    deterministic: bool | None = None,
    segments: int | None = None,
    wire: str | None = None,
    check: str | None = None,
) -> PersistentHandle:
    """``allreduce`` of one array again and again: set up once, with memory and MPI requests of its own.

    ``handle.start()`` reduces what ``x`` holds then, ``handle.wait()`` ends with the result in it, ``handle.free()``
    gives everything back. It is driven as a handle of ``iallreduce`` is; ``"auto"`` is one of our algorithms.
    """
    asked = _asked(comm, x, op, algorithm, deterministic, segments, wire, None)
    made: list[tuple[Request, Any]] = []

    def calls(state: State) -> list[Raw]:
        parts = on_host(asked, x)
        if asked.options.algorithm == NATIVE:
            raise ValueError("native persistent collectives are the MPI library's: comm.Allreduce_init")
        if any(part.deliver for part in parts):
            raise TypeError("a persistent allreduce takes one array in host memory: nothing is gathered or staged")
        rows = [_row(part, state.rules["allreduce"], "ours") for part in parts]
        made.extend(zip(parts, rows, strict=True))
        headers = _headers(parts, rows)
        return [Raw(header._replace(collective="allreduce_init"), lambda: None) for header in headers]  # type: ignore[union-attr]

    together(comm, check, "allreduce_init", x, calls)
    state = state_of(comm)
    bounds = chain.from_iterable(_bind(state, part, row) for part, row in made)
    return PersistentHandle(state, bounds, state.persistent_tag(), x)


def _asked(
    comm: MPI.Intracomm,
    x: Any,
    op: str | MPI.Op,
    algorithm: str,
    deterministic: bool | None,
    segments: int | None,
    wire: str | None,
    stream: Any,
) -> Asked:
    if deterministic is None:
        deterministic = getattr(comm, "deterministic", False)
    options = Options(algorithm, deterministic, segments, wire)
    return Asked(comm, ALLREDUCE, MPI.IN_PLACE, x, op, None, None, options, stream, False, lambda nbytes: True)


def _row(part: Request, rules: tuple[Rule, ...], prefer: Preference) -> Any:
    """The algorithm, a row or ``"native"``; to be ours, any that can do it."""
    options = DEFAULT if prefer == "ours" and part.options.algorithm == NATIVE else part.options
    row = choose("allreduce", options, part.nbytes, part.dtype, part.operation, rules, prefer)
    if isinstance(row, Algorithm):
        told_of(part, row)  # so that a wrong parameter is refused before anything begins
    return row


def _headers(parts: list[Request], rows: list[Any], error: Exception | None = None) -> Headers:
    if error is not None:
        return f"iallreduce refused, {error}"
    return tuple(
        header_for(part, NATIVE) if isinstance(row, str) else header_for(part, row.name, told_of(part, row))
        for part, row in zip(parts, rows, strict=True)
    )


def _bind(state: State, part: Request, row: Algorithm) -> Iterator[Bound]:
    """The rounds of a request, with scratch memory of their own."""
    flat: Any = part.recv
    plan = plan_of(state, part, row, told_of(part, row))()
    return plan.bind(flat, np.empty(plan.scratch_bytes, np.uint8), part.operation)


def _start_native(comm: MPI.Intracomm, part: Request) -> list[MPI.Request]:
    longest = operations.MAX_COUNT
    flat: Any = part.recv
    pieces = (flat[lo : lo + longest] for lo in range(0, max(part.elements, 1), longest))
    op = part.operation.native
    return [MPI.Intracomm.Iallreduce(comm, MPI.IN_PLACE, specification(piece), op) for piece in pieces]


def _finish(part: Request) -> None:
    flat: Any = part.recv
    if part.operation.finish:
        with np.errstate(all="ignore"):
            part.operation.finish(flat, part.p)
