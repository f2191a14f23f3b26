"""Which path a request takes, and why each other one cannot.

A request travels by the collective of the MPI library (*native*), by the messages of a schedule, or through memory
that ranks share; arrays in the memory of GPUs take one of the paths of ``mpi.gpu.devices``.  The decision depends
only on what is equal on all ranks: the collective, count, dtype, operation and options, and the number of ranks.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
from mpi4py import MPI

from ..algorithms import ALGORITHMS, Algorithm, find
from ..collective import Collective
from ..tuning.rules import GPU_PATHS, NATIVE, SHARED, Rule, preferred
from . import operations
from .agreement import Header
from .buffers import PAIRS, is_half, name_of, specification
from .gpu import staging
from .gpu.array import Array
from .operations import MOVE, Operation
from .operations import name_of as name_of_op
from .plan import Plan
from .progress import driving
from .request import DEFAULT, ONE, Options, Request, lengths_of
from .select import PLAIN, SHARED_FROM, parameters
from .shared import AtOnce
from .state import State

KEPT = 1024
"""Paths that a communicator remembers; the oldest goes first."""

Preference = Literal["fastest", "by messages", "native", "ours"]
"""What ``"auto"`` means: the fastest, the fastest by messages, native wherever that can do what is asked, or never
native."""


class Account(NamedTuple):
    """The algorithm of a call, by name, and what this rank sends in it: ``None`` where that cannot be known."""

    algorithm: str
    bytes_sent: int | None
    messages: int | None


@dataclass(eq=False, slots=True)
class Path:
    """The path of a request, and of all that are like it.

    ``run(send, recv, places)`` does it and returns what was received, arrays being those of the request, of any shape.
    ``native`` is mpi4py's call, if ``run`` is nothing more than ``native(send, recv)`` with arrays as the
    user passes them.  ``at_once``, where it is compiled, does it with the comparison of the call (``Node.at_once``).
    ``places(send, recv)``, of a path in shared memory, is where this rank's arrays lie, which
    travels with the comparison of the call, and the flat arrays, which ``run`` then takes with the places of all.
    """

    name: str
    header: Header
    run: Callable[[Any, Any, Any], Any]
    account: Callable[[], Account]
    native: Callable[[Any, Any], Any] | None = None
    at_once: AtOnce | None = None
    places: Callable[[Any, Any], tuple[tuple[int, ...], Any, Any]] | None = None


# ---- which one


def choose(
    collective: str,
    options: Options,
    nbytes: int,
    dtype: np.dtype,
    operation: Operation,
    rules: tuple[Rule, ...],
    prefer: Preference = "fastest",
    shares: bool = False,
) -> Algorithm | str:
    """The algorithm: a row of the table, ``"native"`` or ``"shared"``.

    ``nbytes`` are those of the whole as it travels, ``rules`` are for ``"auto"``, ``shares`` says whether ranks share
    memory to do it in.  Raises ``ValueError`` if the one that is named cannot do it.
    """
    named = options.algorithm
    if named in GPU_PATHS:
        raise ValueError(f"{named} is for an array in the memory of a GPU, no list, and for calls that wait")
    if options.segments is not None and named in ("auto", NATIVE):
        pipelining = _names(collective, lambda row: "segments" in row.parameters)
        raise ValueError(f"segments are for a pipelining algorithm: name one, {pipelining}")

    def refused(name: str) -> str:
        return refusal(collective, name, options.deterministic, dtype, operation, prefer, shares)

    if named != "auto":
        if why := refused(named):
            raise ValueError(why)
        return named if named in (NATIVE, SHARED) else find(collective, named)
    usual = operation.predefined and dtype not in PAIRS
    if prefer != "ours" and (prefer == "native" or not usual) and not refused(NATIVE):
        return NATIVE
    for name in preferred(rules, nbytes):
        if name == NATIVE and prefer == "ours":
            continue
        if name == SHARED and not (usual and options.wire is None):
            continue
        if not refused(name):
            return name if name in (NATIVE, SHARED) else find(collective, name)
    raise AssertionError(f"no rule has anything for this {collective}: {rules}")


def refusal(
    collective: str,
    name: str,
    deterministic: bool,
    dtype: np.dtype,
    operation: Operation,
    prefer: Preference = "fastest",
    shares: bool = False,
) -> str:
    """Why an algorithm cannot do a call, and what can; empty if it can."""
    if name == NATIVE:
        if deterministic:
            return "native is not deterministic: expected " + _names(collective, lambda row: row.canonical)
        if is_half(dtype) and operation.reduces:
            return f"native does not add {dtype} as float32: expected auto, " + _names(collective, lambda row: True)
        return ""
    if name == SHARED:
        if prefer != "fastest":
            return "shared is for calls that wait: name another algorithm"
        if not shares:
            return (
                f"shared cannot do this {collective} here: it needs two ranks or more that share memory, on every "
                "node, and between nodes it is for allreduce alone"
            )
        return ""
    row = find(collective, name)
    if deterministic and not row.canonical:
        return f"{name} is not deterministic: expected " + _names(collective, lambda row: row.canonical)
    if not operation.commutes and not row.rank_order:
        return f"{name} adds in an order of its own, and the operation does not commute: expected " + _names(
            collective, lambda row: row.rank_order
        )
    return ""


def _names(collective: str, which: Callable[[Algorithm], bool]) -> str:
    return ", ".join(name for name, row in ALGORITHMS[collective].items() if which(row))


def native_first(state: State, row: Collective, nbytes: int) -> bool:
    """Whether ``"auto"`` is native for a move of ``nbytes``."""
    shares = state.can_share(row.name, False, MOVE)
    return choose(row.name, DEFAULT, nbytes, np.dtype(np.uint8), MOVE, state.rules[row.name], shares=shares) == NATIVE


def decide(state: State, request: Request, prefer: Preference = "fastest") -> Path:
    """The path of a request; a ``ValueError`` if what was named cannot do it."""
    if request.on_gpu:
        return _on_gpu(state, request)
    if prefer != "fastest" or not request.operation.predefined or request.options.wire is not None:
        return _decided(state, request, prefer)
    kind = request.kind
    path: Path | None = state.paths.get(kind)
    if path is None:
        if len(state.paths) >= KEPT:
            del state.paths[next(iter(state.paths))]
        path = state.paths[kind] = _decided(state, request, prefer)
    return path


def _decided(state: State, request: Request, prefer: Preference) -> Path:
    one = request.recv is ONE
    request = request._replace(send=None, recv=None, deliver=None, result=None)  # a path keeps no arrays
    if one:
        return _one_result(state, request)
    row, operation, options = request.row, request.operation, request.options
    shares = state.can_share(row.name, options.deterministic, operation)
    chosen = choose(row.name, options, request.nbytes, request.dtype, operation, state.rules[row.name], prefer, shares)
    if chosen == NATIVE:
        return _native(state, request)
    if chosen == SHARED:
        return _shared(state, request)
    assert isinstance(chosen, Algorithm)
    return _by_messages(state, request, chosen)


def header_for(request: Request, name: str, parameters: dict[str, int] | None = None) -> Header:
    """What all ranks must have in common."""
    operation, dtype = request.operation, request.dtype
    moves, carried = not operation.reduces, operation.carried(dtype)
    by_bytes = moves or (name == NATIVE and name_of_op(operation.native) == "user-defined")
    count = request.elements * dtype.itemsize if by_bytes else request.elements
    told = dict(parameters or {}) if request.root is None else {"root": request.root, **(parameters or {})}
    more = ["" if carried == dtype else f"carried as {name_of(carried)}", request.detail]
    return Header(
        request.row.name,
        name,
        "" if moves else operation.name,
        ("bytes" if by_bytes else name_of(dtype)) if count else "",
        count,
        tuple((name, int(value)) for name, value in told.items()),
        request.counts,
        ", ".join(filter(None, more)),
        request.stated,
    )


def told_of(request: Request, algorithm: Algorithm) -> dict[str, int]:
    """Return the parameters of an algorithm for a request; a ``ValueError`` for one that is out of range."""
    segments = request.options.segments
    told = parameters(algorithm, request.elements * request.dtype.itemsize, request.root, segments)
    if segments is not None:
        algorithm.schedule(request.p, **told)  # which says what is wrong with them
    return told


def plan_of(state: State, request: Request, algorithm: Algorithm, told: dict[str, int]) -> Callable[[], Plan]:
    """Return what finds the plan of a request, made now or before."""
    name, schedule = (algorithm.collective, algorithm.name, *told.items()), partial(algorithm.schedule, state.p, **told)
    return partial(state.plan, name, schedule, request.elements, request.dtype, request.operation, request.cuts)


# ---- the arrays of a call


def _flat(x: np.ndarray) -> np.ndarray:
    return x if x.ndim == 1 else x.reshape(-1)


def _arrays(request: Request) -> Callable[[Any, Any], tuple[np.ndarray | None, np.ndarray | None]]:
    """What finds a request's flat arrays in those of a call: its own, or the user's of any shape."""
    reduces, in_place, own = request.row.reduces, request.in_place, request.own if request.cuts else slice(None)

    def find_(send: Any, recv: Any) -> tuple[np.ndarray | None, np.ndarray | None]:
        taken = given = None
        if isinstance(recv, np.ndarray):
            taken = _flat(recv) if reduces else _flat(recv).view(np.uint8)
        if send is recv:
            given = taken
        elif isinstance(send, np.ndarray):
            given = _flat(send) if reduces else _flat(send).view(np.uint8)
        elif in_place and taken is not None:
            given = taken if reduces else taken[own]
        return given, taken

    return find_


# ---- natively


def _native(state: State, request: Request) -> Path:
    row, operation, dtype = request.row, request.operation, request.dtype
    user, op, root, counts = state.user, operation.native, request.root or 0, request.counts
    if dtype in PAIRS and request.cuts:  # mpi4py reads a specification of equal blocks in another way
        counts = lengths_of(request.cuts)
    call = row.native(user, op, root, counts)
    arrays, finish = _arrays(request), operation.finish

    def run(send: Any, recv: Any, places: Any) -> Any:
        given, taken = arrays(send, recv)
        longest = operations.MAX_COUNT
        with driving(user):
            if row.parted:  # parts of several ranks cannot go in pieces
                in_place = MPI.IN_PLACE if request.in_place else None
                sent = in_place if given is None or (row.sends_part and in_place is not None) else specification(given)
                call(sent, in_place if taken is None else specification(taken))
            else:
                for lo in range(0, max(request.elements, 1), longest):
                    one, other = (None if x is None else specification(x[lo : lo + longest]) for x in (given, taken))
                    call(MPI.IN_PLACE if row.reduces and given is taken else one, other)
        if finish and taken is not None:
            with np.errstate(all="ignore"):
                finish(taken, state.p)
        return recv

    # The user's arrays may be handed over as they are, unless counts are those of bytes.
    plain = dtype in PLAIN and request.elements <= operations.MAX_COUNT and finish is None
    plain = plain and (row.reduces or counts is None)
    return Path(
        NATIVE, header_for(request, NATIVE), run, lambda: Account(NATIVE, None, None), native=call if plain else None
    )


# ---- by messages


def _by_messages(state: State, request: Request, algorithm: Algorithm) -> Path:
    row, operation, count, dtype = request.row, request.operation, request.elements, request.dtype
    told = told_of(request, algorithm)
    find_plan = plan_of(state, request, algorithm, told)
    arrays, own = _arrays(request), request.own if request.cuts else slice(None)
    sent = own if row.sends_part else slice(None)
    there = request.in_place and row.sends_part

    def run(send: Any, recv: Any, places: Any) -> Any:
        given, taken = arrays(send, recv)
        if taken is not None and not row.receives_part:
            work = taken
        elif given is not None and not row.sends_part and not row.reduces and given.flags.writeable:
            work = given  # of the root, where nothing arrives
        else:
            work = state.work(count, dtype)
        if given is not None and given is not work and not there:
            work[sent] = given
        state.run(find_plan(), work, operation)
        if taken is not None and row.receives_part:
            taken[:] = work[own]
        return recv

    def account() -> Account:
        plan = find_plan()
        return Account(algorithm.name, plan.bytes_sent, plan.messages)

    return Path(algorithm.name, header_for(request, algorithm.name, told), run, account)


# ---- in memory that ranks share


def _shared(state: State, request: Request) -> Path:
    row, operation, root, cuts = request.row, request.operation, request.root or 0, request.cuts
    # The MPI library moves data with one copy, staging buffers with two.
    staged = row.reduces or request.options.algorithm == SHARED
    arrays, count, in_place = _arrays(request), request.elements, request.in_place
    at_once = state.node.at_once(row, operation, request.dtype, count) if state.shares else None

    def run(send: Any, recv: Any, places: Any) -> Any:
        if not count:
            return recv
        given, taken = arrays(send, recv) if places is None else (send, recv)
        if at_once is not None and places is None:  # compared already
            assert given is not None
            assert taken is not None
            found = state.on_node(at_once, 0, False, given, taken)
            if found is None:
                return recv
            places = found or None
        if state.spans:
            state.join_nodes()
        args = row, given, taken, operation, root, cuts, staged, places, False, in_place
        if not state.on_node(state.node.run, *args):
            _without_sharing(state, request).run(send, recv, None)
        return recv

    def places(send: Any, recv: Any) -> tuple[tuple[int, ...], Any, Any]:
        given, taken = arrays(send, recv)
        return state.node.places(given, taken), given, taken

    found = places if state.shares and request.elements else None
    return Path(
        SHARED,
        header_for(request, SHARED),
        run,
        lambda: _across(state, request),
        at_once=at_once,
        places=found,
    )


def _without_sharing(state: State, request: Request) -> Path:
    """By messages, in the same order of additions."""
    options = DEFAULT._replace(deterministic=request.row.reduces)
    return decide(state, request._replace(options=options), "by messages")


def _across(state: State, request: Request) -> Account:
    found = state.plans_across(request.elements, request.dtype, request.operation)
    if found is None:
        return Account("unknown", None, None)
    return Account(SHARED, sum(plan.bytes_sent for plan in found), sum(plan.messages for plan in found))


def _one_result(state: State, request: Request) -> Path:
    """One result for all ranks of a node; where they share no memory, or it is short, each has one of its own."""
    operation, options, arrays = request.operation, request.options, _arrays(request)
    name = f"{request.row.name}_shared"
    small = request.nbytes < SHARED_FROM[name] and not options.deterministic
    shares = bool(not small and request.elements and state.can_share(name, True, operation))

    private = None if shares else decide(state, request)

    def run(send: Any, recv: Any, places: Any) -> Any:
        given, _ = arrays(send, None) if places is None else (send, None)
        assert given is not None
        if shares:
            if state.spans:
                state.join_nodes()
            result = state.on_node(state.one_result, request.row, given, operation, places)
            if result is not None:
                return result
        return (private or decide(state, request)).run(given, np.empty_like(given), None)

    def places(send: Any, recv: Any) -> tuple[tuple[int, ...], Any, Any]:
        given, _ = arrays(send, None)
        return state.node.places(given, None), given, None

    header = header_for(request, SHARED)._replace(collective=name, detail="" if shares else "each its own")
    found = places if shares and state.shares else None
    return Path(SHARED, header, run, lambda: _across(state, request), places=found)


# ---- on GPUs


def _on_gpu(state: State, request: Request) -> Path:
    """How it goes is known when all ranks have come: they find out together what their GPUs can do."""
    row, operation, options = request.row, request.operation, request.options
    if options.algorithm not in ("auto", *GPU_PATHS) or options.segments is not None or options.wire is not None:
        decide(state, _staged(request, np.broadcast_to(np.empty((), request.dtype), request.elements)))  # raises
    request = request._replace(send=None, recv=None, deliver=None, result=None)  # a path keeps no arrays
    kind = row.name, operation.name, request.elements, request.dtype, options

    def run(send: Any, recv: Any, places: Any) -> Any:
        live = request._replace(send=send, recv=recv)
        if state.p == 1:
            _copy(live)
        elif request.elements:
            together(live)
        if isinstance(recv, Array):
            recv.settle()
        return recv

    def together(live: Request) -> None:
        array = next(x for x in (live.send, live.recv) if isinstance(x, Array))
        devices = state.join_devices(array.device)
        for name in devices.paths(options.algorithm, row, operation, request.dtype, options.deterministic):
            if name == "staged":
                try:
                    _run_staged(state, live, array)
                except BaseException:  # other ranks may be at another piece
                    state.interrupt()
                    raise
            elif not state.on_node(devices.run, name, live):
                continue
            devices.remember(kind, name)
            return

    def account() -> Account:
        went = NATIVE if state.p == 1 else None if state.devices is None else state.devices.took.get(kind)
        if went == "ipc":
            return Account(went, 0, 0)
        if went != "staged":
            return Account(went or "unknown", None, None)
        lengths = [request.elements]
        if not request.cuts:
            lengths = [n for _, n in staging.pieces(request.elements, request.dtype, staging.BUFFER)]
        pieces = [np.broadcast_to(np.empty((), request.dtype), length) for length in lengths]
        found = [decide(state, _staged(request, piece)).account() for piece in pieces]
        name = f"staged {found[0].algorithm}"
        if any(one.bytes_sent is None for one in found):
            return Account(name, None, None)
        sent, messages = (sum(one[n] for one in found) for n in (1, 2))  # type: ignore[misc]
        return Account(name, sent, messages)

    moves = not row.reduces
    header = Header(
        row.name,
        options.algorithm,
        "" if moves else operation.name,
        ("bytes" if moves else name_of(request.dtype)) if request.elements else "",
        request.elements,
        tuple((name, int(n)) for name, n in (("root", request.root), ("segments", options.segments)) if n is not None),
        request.counts,
        ", ".join(
            filter(
                None,
                [
                    "in the memory of GPUs",
                    "deterministic" if options.deterministic and row.reduces else "",
                    f"wire {options.wire}" if options.wire else "",
                    request.detail,
                ],
            )
        ),
        request.stated,
    )
    return Path(options.algorithm, header, run, account)


def _on_host(options: Options) -> Options:
    return options._replace(algorithm="auto") if options.algorithm in GPU_PATHS else options


def _staged(request: Request, flat: np.ndarray) -> Request:
    """Return the request for ``flat`` in host memory, in place."""
    row, rank, root = request.row, request.rank, request.root
    sends = row.sends(rank, root)
    receives = row.receives(rank, root) and not (row.from_root and sends)
    return request._replace(
        send=flat if sends else None,
        recv=flat if receives else None,
        elements=len(flat),
        options=_on_host(request.options),
        in_place=sends and receives,
    )


def _copy(request: Request) -> None:
    """One rank alone has what it sends."""
    given, taken = request.send, request.recv
    if isinstance(taken, Array) and given is not None:
        staging.fill(taken, given)
    elif isinstance(taken, np.ndarray) and isinstance(given, Array):
        given.load(taken)
        given.synchronize()


def _run_staged(state: State, request: Request, array: Array) -> None:
    """Stage the arrays in host memory: in pieces, or, where ranks have parts, all at once."""
    given, taken = request.send, request.recv
    if request.cuts is None:

        def piece(flat: np.ndarray) -> None:
            one = _staged(request, flat)
            decide(state, one).run(one.send, one.recv, None)

        state.boxes(array.device).through(given, taken, piece)  # type: ignore[arg-type]
        return
    sent: Any
    received: Any
    sent, received = (
        staging.staged(x, load=load) if isinstance(x, Array) else x for x, load in ((given, True), (taken, False))
    )
    if request.in_place and request.row.sends_part:
        assert isinstance(taken, Array)
        taken.part(request.own.start, request.own.stop).load(received[request.own])
        taken.synchronize()
    one = request._replace(send=sent, recv=received, options=_on_host(request.options))
    decide(state, one).run(one.send, one.recv, None)
    if isinstance(taken, Array):
        staging.deliver(received, taken)
