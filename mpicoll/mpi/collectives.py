"""The collectives as functions: check the arguments, choose the algorithm, find the plan, run it."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate, chain, pairwise
from numbers import Number
from operator import index
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
from mpi4py import MPI

from ..algorithms import Algorithm
from ..errors import MismatchError
from ..schedule import Schedule, chunk_start
from ..tuning.rules import WAYS
from . import gpu, launch, operations, record
from .agreement import Header, Headers, check_level, header_of, level_of
from .attach import check_comm, interrupted, whole
from .buffers import (
    Part,
    in_c_order,
    lengths,
    name_of,
    on_device,
    on_stream,
    operand,
    order_of,
    parts,
    shape_of,
    specification,
    vector,
)
from .gpu import Array
from .operations import MOVE, Operation, operation
from .operations import name_of as name_of_op
from .plan import Bound, Plan
from .progress import Handle, NativeHandle, PersistentHandle, driving, under_way
from .select import PLAIN, SHARED, Options, Preference, Shared, choose, defaults, parameters
from .state import State, find_state, state_of

C = TypeVar("C", "Call", "DeviceCall", "Native", "Call | DeviceCall")
T = TypeVar("T")


def allreduce(
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
) -> Any:
    """Combine the arrays of all ranks elementwise, in place: every rank's ``x`` ends with the same bits.

    Parameters
    ----------
    x
        An array: NumPy, CuPy, or anything mpi4py takes for a buffer (DLPack and buffer protocol exporters such as CPU
        tensors, ``[buffer, count, datatype]``), contiguous and writable; a list of arrays, which are fused into one
        message for each dtype; or a number. The same shapes and dtypes on all ranks. Integers, floats, complex numbers
        and booleans; 16-bit floats (float16, ml_dtypes' bfloat16) are added as float32 and the result rounded once.
    comm
        An mpi4py intracommunicator. If it is no ``mpicoll.Comm``, the first call on it duplicates it.
    op
        ``"sum"``, ``"mean"`` (the sum, divided once; of integers rounded to the nearest, to even where two are),
        ``"prod"``, ``"max"``, ``"min"`` (NaN if there is any), ``"land"``, ``"lor"``, ``"lxor"``, ``"band"``,
        ``"bor"``, ``"bxor"``; or an ``MPI.Op``, predefined or user-defined. One that does not commute is applied in
        rank order.
    algorithm
        A name from ``mpicoll.ALGORITHMS["allreduce"]``; ``"native"`` for the MPI library's own, which alone decides
        about NaN, signed zeros and whether all ranks get the same bits; ``"auto"`` for what is fastest at this length.
    deterministic
        Add in one canonical order: the bits do not depend on the algorithm, the length of the array, or what it is
        fused with, but only on the number of ranks. By default as the ``Comm`` says, else false.
    segments
        Into how many pieces a pipelining algorithm (``"double_tree"``) cuts; by default by length.
    wire
        ``"16bit"``: sums of 16-bit floats travel as such, rounded at every hop: half the bytes, and less precise. By
        default they travel as float32.
    check
        Whether to compare the call between all ranks first, so that a mistake raises on all of them: ``"header"``
        (operation, dtype, count, algorithm, number of the call), ``"full"`` (also the order of memory, and where the
        calls are made), ``"off"``. The same on all ranks. By default as the ``Comm`` says, else as the environment
        variable ``MPICOLL_CHECK`` does, else ``"header"``.
    stream
        Of arrays in the memory of a GPU: the stream on which ``x`` is read and written, one of CuPy's, or any object
        with ``__cuda_stream__``. By default the current one. Work put there later sees the result.

    Returns
    -------
    ``x`` itself; for a number, the result as a NumPy scalar.

    Raises
    ------
    TypeError, ValueError
        For an array, operation or algorithm that cannot be used, before anything is sent.
    MismatchError
        On all ranks (the others, if some raise one of the above) if they do not make the same call.  With
        ``check="off"`` a mistake on some ranks leaves the others waiting, or with wrong numbers.
    """
    level = level_of(comm, check)
    if (  # what every small call would otherwise pay for
        type(x) is np.ndarray
        and algorithm == "auto"
        and op == "sum"
        and segments is None
        and wire is None
        and stream is None
        and x.dtype in PLAIN
        and x.flags.carray
        and isinstance(comm, MPI.Intracomm)
        and not (getattr(comm, "deterministic", False) if deterministic is None else deterministic)
        and not under_way
        and not interrupted
        and comm
        and (level == "header" or level == "off")
        and ((comm.size == 1 and launch.checked) or x.nbytes < (state := _state(comm)).limits["allreduce"].native_below)
    ):
        if level == "off" or comm.size == 1:
            MPI.Intracomm.Allreduce(comm, MPI.IN_PLACE, x)
        else:
            header = header_of("allreduce", "sum", PLAIN[x.dtype], x.size)
            compared(state, header, MPI.Intracomm.Allreduce, comm, MPI.IN_PLACE, x)
        return x
    if isinstance(x, (Number, np.generic)):
        scalar = _number(x, op)
        allreduce(
            scalar,
            comm,
            op,
            algorithm,
            deterministic=deterministic,
            segments=segments,
            wire=wire,
            check=check,
            stream=stream,
        )
        return scalar[()]
    check_comm(comm)
    options = options_of(comm, algorithm, deterministic, segments, wire)
    with whole(comm):
        run(agreed(comm, check, "allreduce", x, lambda: _calls(x, comm, op, options, stream=stream)))
    return x


def _state(comm: MPI.Intracomm) -> State:
    """The communicator's, which a ``Comm`` has at hand; made now if need be, a collective call."""
    return getattr(comm, "_state", None) or find_state(comm) or state_of(comm)


def _number(x: Any, op: str | MPI.Op) -> np.ndarray:
    """A number as an array to reduce; the mean of whole ones is none."""
    return np.array(x, float if op == "mean" and isinstance(x, int) else None)


def reduce(
    x: Any,
    comm: MPI.Intracomm,
    root: int = 0,
    op: str | MPI.Op = "sum",
    algorithm: str = "auto",
    *,
    deterministic: bool | None = None,
    segments: int | None = None,
    wire: str | None = None,
    check: str | None = None,
    stream: Any = None,
) -> Any:
    """Combine the arrays of all ranks elementwise: the ``x`` of rank ``root`` ends with the result, the others stay.

    Arguments, return value and errors are those of ``allreduce``; algorithms are ``mpicoll.ALGORITHMS["reduce"]``.
    """
    if isinstance(x, (Number, np.generic)):
        scalar = _number(x, op)
        reduce(
            scalar,
            comm,
            root,
            op,
            algorithm,
            deterministic=deterministic,
            segments=segments,
            wire=wire,
            check=check,
            stream=stream,
        )
        return scalar[()]
    check_comm(comm)
    options = options_of(comm, algorithm, deterministic, segments, wire)

    def calls() -> list[Call | DeviceCall]:
        return _calls(x, comm, op, options, collective="reduce", root=root, stream=stream)

    with whole(comm):
        run(agreed(comm, check, "reduce", x, calls))
    return x


def tree_reduce(x: Any, comm: MPI.Intracomm, root: int = 0, op: str | MPI.Op = "sum") -> Any:
    """``reduce`` by the binomial tree: ceil(log2 p) rounds, or two more, and the canonical order of additions."""
    return reduce(x, comm, root, op, "tree")


def bcast(
    x: Any,
    comm: MPI.Intracomm,
    root: int = 0,
    algorithm: str = "auto",
    *,
    segments: int | None = None,
    check: str | None = None,
    stream: Any = None,
) -> Any:
    """Every rank's ``x`` ends with what that of rank ``root`` holds; returns ``x``.

    ``x`` is an array, or a list of arrays, as for ``allreduce``, of any dtype that holds no objects; algorithms are
    ``mpicoll.ALGORITHMS["bcast"]``.
    """
    check_comm(comm)
    options = options_of(comm, algorithm, False, segments)

    def calls() -> list[Any]:
        if on_device(x):
            return [broadcasting(comm, on_stream(x, stream), options, root)]
        pieces = parts(x, stream=stream)
        if any(part.flat.dtype.hasobject for part in pieces):
            raise TypeError("objects are not broadcast from memory to memory: use comm.bcast, in lower case")
        return [
            decide(
                comm, Part(part.flat.view(np.uint8), part.deliver), MOVE, options, collective="bcast", root=root
            )._replace(detail=", ".join(filter(None, [name_of(part.flat.dtype), lengths(x)])))
            for part in pieces
        ]

    with whole(comm):
        run(agreed(comm, check, "bcast", x, calls))
    return x


def reduce_scatter(
    x: Any,
    comm: MPI.Intracomm,
    counts: Sequence[int] | None = None,
    op: str | MPI.Op = "sum",
    algorithm: str = "auto",
    *,
    deterministic: bool | None = None,
    wire: str | None = None,
    check: str | None = None,
    stream: Any = None,
) -> Any:
    """Combine the arrays of all ranks elementwise, and give each rank its part of the result, as a new flat array.

    ``x``, which stays as it is, is one array; rank r gets ``counts[r]`` elements, by default equally many to one, where
    ``x`` is, in host memory or on the GPU.  Other arguments and errors are those of ``allreduce``; algorithms are
    ``mpicoll.ALGORITHMS["reduce_scatter"]``.
    """
    check_comm(comm)
    options = options_of(comm, algorithm, deterministic, wire=wire)
    result: Any = None

    def calls() -> list[Any]:
        nonlocal result
        given = operand(x, stream, writable=False)
        cuts = cuts_of(counts, given.size, comm.size)
        mine, found = cuts[comm.rank + 1] - cuts[comm.rank], operation(op, given.dtype)
        if isinstance(given, Array):
            result = gpu.empty(mine, given.dtype, given)
            taken = Array(result, given.stream)
            return [DeviceCall.made(comm, "reduce_scatter", given, taken, found, options, cuts=cuts)]
        result = np.empty(mine, given.dtype)
        return [decide(comm, Part(given), found, options, collective="reduce_scatter", cuts=cuts, result=result)]

    with whole(comm):
        run(agreed(comm, check, "reduce_scatter", x, calls))
    return result


def allgather(
    x: Any,
    comm: MPI.Intracomm,
    counts: Sequence[int] | None = None,
    algorithm: str = "auto",
    *,
    check: str | None = None,
    stream: Any = None,
) -> Any:
    """The arrays of all ranks, one after another, as a new array.

    ``x`` is one array of any dtype but objects, and the result is where ``x`` is, in host memory or on the GPU.
    Without ``counts`` it has the same shape on all ranks, and the result one dimension more, in front; with them, rank
    r brings ``counts[r]`` elements into a flat result.  Algorithms are ``mpicoll.ALGORITHMS["allgather"]``.
    """
    check_comm(comm)
    options = options_of(comm, algorithm, False)
    result: Any = None
    shape: tuple[int, ...] = ()

    def calls() -> list[Any]:
        nonlocal result, shape
        given = operand(in_c_order(x, stream), stream, writable=False)
        if given.dtype.hasobject:
            raise TypeError("objects are not gathered from memory to memory: use comm.allgather, in lower case")
        cuts = cuts_of([given.size] * comm.size if counts is None else counts, None, comm.size)
        if cuts[comm.rank + 1] - cuts[comm.rank] != given.size:
            raise ValueError(f"rank {comm.rank} brings {given.size} elements, counts say {counts[comm.rank]}")  # type: ignore[index]
        detail = name_of(given.dtype)
        if counts is None:
            shape = shape_of(x)
            detail += f" {shape}"
        if isinstance(given, Array):
            result = gpu.empty(cuts[-1], given.dtype, given)
            return [gathering_on_device(comm, given, Array(result, given.stream), cuts, options, detail)]
        result = np.empty(cuts[-1], given.dtype)
        return [gathering(comm, given, result, cuts, options)._replace(detail=detail)]

    with whole(comm):
        run(agreed(comm, check, "allgather", x, calls))
    return result if counts is not None else result.reshape(comm.size, *shape)


def gathering(
    comm: MPI.Intracomm, flat: np.ndarray | None, result: np.ndarray, cuts: tuple[int, ...], options: Options
) -> "Call":
    """``allgather`` into ``result``, which holds this rank's part already if none is given."""
    size = result.dtype.itemsize
    raw = result.view(np.uint8) if size else np.empty(0, np.uint8)
    in_bytes = tuple(cut * size for cut in cuts)
    call = decide(comm, Part(raw), MOVE, options, collective="allgather", cuts=in_bytes)
    return call if flat is None or not size else call._replace(own=flat.view(np.uint8))


def cuts_of(counts: Sequence[int] | None, total: int | None, p: int) -> tuple[int, ...]:
    """Where each rank's part begins, and the end; a ``ValueError`` unless there is one for each and they add up."""
    if counts is None:
        assert total is not None
        return tuple(chunk_start(total, rank, p) for rank in range(p + 1))
    checked = [index(count) for count in counts]
    if len(checked) != p or min(checked) < 0:
        raise ValueError(f"expected a count of 0 or more for each of {p} ranks, got {counts}")
    if total is not None and sum(checked) != total:
        raise ValueError(f"counts add up to {sum(checked)}, the array has {total} elements")
    return (0, *accumulate(checked))


def gathering_on_device(
    comm: MPI.Intracomm,
    given: Array | np.ndarray,
    taken: Array | np.ndarray,
    cuts: tuple[int, ...],
    options: Options,
    detail: str = "",
) -> "DeviceCall":
    """The same on a GPU."""
    in_bytes = tuple(cut * given.dtype.itemsize for cut in cuts)
    own, all_ = (x.as_bytes() if isinstance(x, Array) else x.view(np.uint8) for x in (given, taken))
    return DeviceCall.made(comm, "allgather", own, all_, MOVE, options, cuts=in_bytes, detail=detail)


def broadcasting(comm: MPI.Intracomm, array: Array, options: Options, root: int, named: bool = True) -> "DeviceCall":
    """``bcast`` of an array on a GPU, which on other ranks is on one, too."""
    check_root(comm, index(root))
    raw, detail = array.as_bytes(), name_of(array.dtype) if named else ""
    given, taken = (raw, None) if comm.rank == root else (None, raw)
    return DeviceCall.made(comm, "bcast", given, taken, MOVE, options, root=root, detail=detail)


def ring_allreduce(x: Any, comm: MPI.Intracomm, op: str | MPI.Op = "sum") -> Any:
    """``allreduce`` by the ring algorithm: 2(p - 1) rounds, 2(p - 1)/p of ``x`` sent by each rank."""
    return allreduce(x, comm, op, "ring")


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

    ``x`` must be left alone meanwhile; ``wait`` returns it. ``"auto"`` means the MPI library's own wherever it can do
    what is asked, since all of MPI's calls drive that; our algorithms are driven by calls to mpicoll alone (see
    ``Handle``). Those need a ``mpicoll.Comm``, whose private duplicate is made beforehand; and on no other communicator
    is the call compared between the ranks (``check``), which is done when it is waited for.
    """
    check_comm(comm)
    options = options_of(comm, algorithm, deterministic, segments, wire)
    with whole(comm):
        state = find_state(comm)
        asked = _asked(comm, check, "iallreduce", x, lambda: _host_calls(x, comm, op, options, "native", stream))
        comparison = state.agreement.begin(asked.headers(), asked.detail) if state and asked.compared else None
        calls = asked.calls()
        delivers = [call.part.deliver for call in calls if call.part.deliver]
        if all(call.row is None for call in calls):
            requests = [request for call in calls for request in call.start_native()]
            finishes = [*(call.finish for call in calls), *delivers]
            return NativeHandle(requests, (x, op, calls), x, finishes, comparison)
        if state is None:
            raise ValueError(
                "iallreduce by an algorithm of ours needs a mpicoll.Comm, made beforehand: mpicoll.Comm(comm)"
            )
        bounds = chain.from_iterable(call.ours().bind(state) for call in calls)
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
    check_comm(comm)
    options = options_of(comm, algorithm, deterministic, segments, wire)
    with whole(comm):

        def checked() -> list[Call]:
            calls = _host_calls(x, comm, op, options, "ours")
            if any(call.row is None for call in calls):
                raise ValueError("native persistent collectives are the MPI library's: comm.Allreduce_init")
            if any(call.part.deliver for call in calls):
                raise TypeError("a persistent allreduce takes one array in host memory: nothing is gathered or staged")
            return [call._replace(collective="allreduce_init") for call in calls]

        calls = agreed(comm, check, "allreduce_init", x, checked)
        state = state_of(comm)
        bounds = chain.from_iterable(call.bind(state) for call in calls)
        return PersistentHandle(state, bounds, state.persistent_tag(), x)


class Account(NamedTuple):
    """The algorithm of a call, by name, and what this rank sends in it: ``None`` where that cannot be known."""

    algorithm: str
    bytes_sent: int | None
    messages: int | None


def account(
    x: Any,
    comm: MPI.Intracomm,
    algorithm: str = "auto",
    *,
    op: str = "sum",
    deterministic: bool | None = None,
    collective: str = "allreduce",
) -> Account:
    """What an ``allreduce`` with these arguments does, or an ``allgather`` of as much from all.  Not a collective call.

    Nothing can be known of the MPI library's own.  In shared memory nothing is sent; what is from node to node is known
    after the first such call.
    """
    check_comm(comm)
    options = options_of(comm, algorithm, deterministic)
    if on_device(x):
        return _account_on_device(on_stream(x), comm, op, options, collective)
    if collective == "allgather":
        flat = vector(x, writable=False)
        result, cuts = np.empty(comm.size * len(flat), flat.dtype), cuts_of([len(flat)] * comm.size, None, comm.size)
        calls = [gathering(comm, flat, result, cuts, options._replace(deterministic=False))]
    else:
        calls = _host_calls(x, comm, op, options)
    return _account(calls)


def _account(calls: "Sequence[Call]") -> Account:
    if not calls or any(call.row is None for call in calls):
        return Account("native", None, None)
    plans: list[Plan] = []
    for call in calls:
        if call.row is not SHARED:
            plans.append(call.plan())
            continue
        found = state_of(call.comm).plans_across(len(call.part.flat), call.part.flat.dtype, call.operation)
        if found is None:
            return Account("unknown", None, None)
        plans += found
    names = dict.fromkeys(call.row.name for call in calls if call.row)
    return Account(", ".join(names), sum(plan.bytes_sent for plan in plans), sum(plan.messages for plan in plans))


def _account_on_device(array: Array, comm: MPI.Intracomm, op: str, options: Options, collective: str) -> Account:
    """As the latest such call went; ``"unknown"`` if there was none.  One rank alone has nothing to send."""
    if collective == "allgather":
        cuts = cuts_of([array.size] * comm.size, None, comm.size)
        call = gathering_on_device(comm, array, array, cuts, options._replace(deterministic=False))
    else:
        call = DeviceCall.made(comm, collective, array, array, operation(op, array.dtype), options)
    way = "native" if comm.size == 1 else call.went()
    if way == "ipc":
        return Account(way, 0, 0)
    if way != "staged":
        return Account(way or "unknown", None, None)
    found = [_account([call.hosted(call.stand_in(length))]) for length in call.pieces()]
    if any(one.bytes_sent is None for one in found):
        return Account(f"staged {found[0].algorithm}", None, None)
    sent, messages = (sum(one[n] for one in found) for n in (1, 2))  # type: ignore[misc]
    return Account(f"staged {found[0].algorithm}", sent, messages)


class _Asked(NamedTuple, Generic[C]):
    """What a rank is to do, or why it cannot; and whether and how that is compared with the other ranks."""

    name: str
    made: list[C]
    error: Exception | None
    detail: tuple[str, ...] | None
    compared: bool

    def headers(self) -> Headers:
        """What is compared, and recorded: 5 us, for those who need it."""
        if self.error is not None:
            return f"{self.name} refused, {self.error}"
        return tuple(call.header() for call in self.made)

    def calls(self) -> list[C]:
        """What it is to do."""
        if self.error is not None:
            raise self.error
        return self.made


def _asked(comm: MPI.Intracomm, check: str | None, name: str, x: Any, make: Callable[[], list[C]]) -> _Asked[C]:
    """What ``make`` gives, or raises."""
    level = level_of(comm, check)
    made: list[C] = []
    error: Exception | None = None
    try:
        check_level(level)
        made = make()
    except Exception as raised:
        error = raised
    detail = (order_of(x),) if level == "full" else None
    return _Asked(name, made, error, detail, level != "off" and comm.size > 1)


def agreed(comm: MPI.Intracomm, check: str | None, name: str, x: Any, make: Callable[[], list[C]]) -> list[C]:
    """What ``make`` gives, once the ranks are seen to make the same call; what it raises, others hear of."""
    state = state_of(comm) if comm.size > 1 else None  # first: how to go about it depends on what ranks share
    asked = _asked(comm, check, name, x, make)
    headers = asked.headers()
    if state is not None and asked.compared:
        record.begin(state.entry(headers))
        try:
            state.agree(headers, asked.detail)
        except MismatchError as mismatch:
            if asked.error is None:
                raise
            raise asked.error from mismatch  # its own, and who else is concerned
    else:
        record.begin(record.Entry(headers))
    return asked.calls()


def compared(state: State, header: Header, call: Callable[..., T], *args: Any) -> T:
    """``agreed`` for a ``call`` of the MPI library that nothing is wrong with, while nothing of ours is under way: the
    same in a third of the time, which small calls notice."""
    headers = (header,)
    record.begin(state.entry(headers))
    try:
        state.agreement.check(headers)
        return call(*args)
    except (KeyboardInterrupt, SystemExit):
        state.interrupt()
        raise
    finally:
        record.end()


def recorded(state: State, header: Header, call: Callable[..., T], *args: Any) -> T:
    """The same, not compared: so that a time limit sees it."""
    record.begin(record.Entry((header,), state.name, state.world))
    try:
        return call(*args)
    finally:
        record.end()


def on_node(
    comm: MPI.Intracomm,
    state: State,
    level: str,
    collective: str,
    send: np.ndarray,
    recv: np.ndarray,
    operation: Operation,
    root: int | None = None,
) -> None:
    """A reduction in memory that all ranks share, of arrays that nothing is wrong with, as ``compared`` has it."""
    flat, at = recv.reshape(-1), root or 0
    args = collective, (flat if send is recv else send.reshape(-1)), flat, operation, at
    header = header_of(collective, operation.name, PLAIN[recv.dtype], recv.size, root, SHARED.name)
    if not (recorded if level == "off" else compared)(state, header, state.on_node, state.node.run, *args):
        part = Part(flat)
        Call(collective, comm, state.p, part, operation, SHARED, {}, root, sent=args[1]).without_sharing().run()


def by_messages(state: State, level: str, send: np.ndarray, recv: np.ndarray, operation: Operation) -> bool:
    """An allreduce by one of our algorithms, likewise, if that is what rules have for it."""
    found = state.direct(operation, recv)
    if found is None:
        return False
    plan, header = found
    flat = recv.reshape(-1)

    def run() -> None:
        if send is not recv:
            flat[:] = send.reshape(-1)  # of whatever shape
        state.run(plan, flat, operation)

    (recorded if level == "off" else compared)(state, header, run)
    return True


def run(calls: "Iterable[Call | DeviceCall | Native]") -> None:
    """All of them, one after another."""
    for call in calls:
        call.run()


class Native(NamedTuple):
    """A call that goes to the MPI library as it is, and what all ranks must have in common."""

    described: Header
    do: Callable[[], None]

    def header(self) -> Header:
        """See the class."""
        return self.described

    def run(self) -> None:
        """Do it."""
        self.do()


class Call(NamedTuple):
    """One array's share of a call, everything decided; ``row`` None means the MPI library's own."""

    collective: str
    comm: MPI.Intracomm
    p: int  # a native handle may outlive the communicator
    part: Part
    operation: Operation
    row: Algorithm | Shared | None
    parameters: dict[str, int]
    root: int | None = None
    cuts: tuple[int, ...] | None = None
    result: np.ndarray | None = None  # where it goes, unless it is in place
    detail: str = ""  # what else all ranks must have in common
    sent: np.ndarray | None = None  # what is given, if it is not there already
    own: np.ndarray | None = None  # in an allgather, what this rank's part is to hold
    boxed: bool = True  # in shared memory, may it be copied there first?

    def run(self) -> None:
        """Do it, and bring the result to where it is wanted."""
        flat = self.part.flat
        if self.own is not None and self.cuts is not None:
            flat[self.cuts[self.comm.rank] : self.cuts[self.comm.rank + 1]] = self.own
        if self.row is SHARED:
            if not self._run_shared():
                self.without_sharing().run()
                return
        elif self.row is not None:
            state = state_of(self.comm)
            plan = self._plan(state)
            # What the root of a broadcast gives may be read-only.
            in_place = self.result is None and self._receives and flat.flags.writeable
            work = flat if in_place else state.copied(flat)
            state.run(plan, work, self.operation)
            if self.result is not None and self.cuts is not None:
                self.result[:] = work[self.cuts[self.comm.rank] : self.cuts[self.comm.rank + 1]]
        else:
            with driving(self.comm):
                for piece in self._pieces():
                    self._run_native(piece)
            self.finish()
        if self.part.deliver and self._receives:
            self.part.deliver()

    def _run_shared(self) -> bool:
        """In memory that all ranks share; false if there is none left, on all of them."""
        flat = self.part.flat
        recv = flat if self.result is None else self.result
        send = flat if self.sent is None else self.sent
        if not len(flat):
            return True
        state = state_of(self.comm)
        state.join_nodes()
        at = self.root or 0
        return state.on_node(state.node.run, self.collective, send, recv, self.operation, at, self.cuts, self.boxed)

    def without_sharing(self) -> "Call":
        """The same by messages, in the same order of additions."""
        if self.sent is not None:
            self.part.flat[:] = self.sent
        return self._decided_again(Options(deterministic=self.operation.reduces), "without sharing")

    def _decided_again(self, options: Options, prefer: Preference) -> "Call":
        return decide(
            self.comm,
            self.part,
            self.operation,
            options,
            collective=self.collective,
            root=self.root,
            cuts=self.cuts,
            result=self.result,
            prefer=prefer,
        )

    def header(self) -> Header:
        """What all ranks must have in common."""
        flat, moves = self.part.flat, self.operation is MOVE
        carried = self.operation.carried(flat.dtype)
        parameters = dict(self.parameters) if self.root is None else {"root": self.root, **self.parameters}
        details = [self.detail] if carried == flat.dtype else [f"carried as {name_of(carried)}", self.detail]
        by_bytes = moves or (self.row is None and name_of_op(self.operation.native) == "user-defined")
        dtype, size = ("bytes", flat.nbytes) if by_bytes else (name_of(flat.dtype), len(flat))
        return Header(
            self.collective,
            self.row.name if self.row else "native",
            "" if moves else self.operation.name,
            dtype if size else "",
            size,
            tuple((name, int(value)) for name, value in parameters.items()),
            self.cuts,
            ", ".join(filter(None, details)),
        )

    @property
    def _receives(self) -> bool:
        return self.collective != "reduce" or self.comm.rank == self.root

    def _run_native(self, piece: Any) -> None:
        op, root = self.operation.native, self.root or 0
        counts = [after - before for before, after in pairwise(self.cuts or ())]
        if self.collective == "reduce_scatter":
            result = specification(self.result) if self.result is not None else None
            MPI.Intracomm.Reduce_scatter(self.comm, specification(self.part.flat), result, counts, op)
        elif self.collective == "allgather":
            MPI.Intracomm.Allgatherv(self.comm, MPI.IN_PLACE, [self.part.flat, counts, MPI.BYTE])
        elif self.collective == "allreduce":
            MPI.Intracomm.Allreduce(self.comm, MPI.IN_PLACE, piece, op)
        elif self.collective == "bcast":
            MPI.Intracomm.Bcast(self.comm, piece, root)
        elif self._receives:
            MPI.Intracomm.Reduce(self.comm, MPI.IN_PLACE, piece, op, root)
        else:
            MPI.Intracomm.Reduce(self.comm, piece, None, op, root)

    def ours(self) -> "Call":
        """The same by an algorithm of ours, where it is not yet."""
        return self if isinstance(self.row, Algorithm) else self._decided_again(Options(), "ours")

    def bind(self, state: State) -> Iterator[Bound]:
        """Its rounds, with scratch memory of their own."""
        plan = self._plan(state)
        return plan.bind(self.part.flat, np.empty(plan.scratch_bytes, np.uint8), self.operation)

    def _schedule(self) -> Schedule:
        assert isinstance(self.row, Algorithm)
        return self.row.schedule(self.p, **self.parameters)

    def _plan(self, state: State) -> Plan:
        assert isinstance(self.row, Algorithm)
        name, flat = (self.row.collective, self.row.name, *self.parameters.items()), self.part.flat
        return state.plan(name, self._schedule, len(flat), flat.dtype, self.operation, self.cuts)

    def plan(self) -> Plan:
        """Its plan, which is not kept with the communicator: finding it out is no collective call."""
        dtype = self.part.flat.dtype
        return Plan(self._schedule(), self.comm.rank, len(self.part.flat), dtype, self.operation.carried(dtype))

    def start_native(self) -> list[MPI.Request]:
        """Start the MPI library's own."""
        return [
            MPI.Intracomm.Iallreduce(self.comm, MPI.IN_PLACE, piece, self.operation.native) for piece in self._pieces()
        ]

    def finish(self) -> None:
        """What is left to do when the MPI library's own is complete."""
        if self.operation.finish and self._receives:
            with np.errstate(all="ignore"):
                self.operation.finish(self.part.flat if self.result is None else self.result, self.p)

    def _pieces(self) -> list[Any]:
        flat, longest = self.part.flat, operations.MAX_COUNT
        if self.cuts is not None:
            return [flat]  # parts of several ranks cannot go in pieces
        return [specification(flat[start : start + longest]) for start in range(0, max(len(flat), 1), longest)]


class DeviceCall(NamedTuple):
    """A call on arrays in the memory of GPUs.  How it goes is known when all ranks have come: they find out together
    what their GPUs can do."""

    collective: str
    comm: MPI.Intracomm
    given: Array | np.ndarray | None  # by this rank; one of both is on a GPU
    taken: Array | np.ndarray | None
    dtype: np.dtype
    elements: int  # of the whole, as for ``Node.run``
    operation: Operation
    options: Options
    root: int | None = None
    cuts: tuple[int, ...] | None = None
    detail: str = ""

    @classmethod
    def made(
        cls,
        comm: MPI.Intracomm,
        collective: str,
        given: Array | np.ndarray | None,
        taken: Array | np.ndarray | None,
        operation: Operation,
        options: Options,
        *,
        root: int | None = None,
        cuts: tuple[int, ...] | None = None,
        detail: str = "",
    ) -> "DeviceCall":
        """Everything checked that can be before all have come; ``TypeError`` or ``ValueError``."""
        there = [one for one in (given, taken) if one is not None]
        gpu.same_device(*(one for one in there if isinstance(one, Array)))
        count, dtype = cuts[-1] if cuts else there[0].size, there[0].dtype
        if dtype != there[-1].dtype:
            raise ValueError(f"mismatch in send dtype {dtype} and receive dtype {there[-1].dtype}")
        if cuts is None and there[-1].size != count:
            raise ValueError(f"mismatch in send count {count} and receive count {there[-1].size}")
        if root is not None:
            root = int(index(root))
            check_root(comm, root)
        call = cls(collective, comm, given, taken, dtype, count, operation, options, root, cuts, detail)
        if options.algorithm not in ("auto", *WAYS) or options.segments is not None or options.wire is not None:
            call.hosted(call.stand_in(count))  # which says what is wrong with them
        return call

    def header(self) -> Header:
        """What all ranks must have in common."""
        options, moves = self.options, self.operation is MOVE
        given = [("root", self.root), ("segments", options.segments)]
        details = ["in the memory of GPUs", "deterministic" if options.deterministic and not moves else ""]
        return Header(
            self.collective,
            options.algorithm,
            "" if moves else self.operation.name,
            ("bytes" if moves else name_of(self.dtype)) if self.elements else "",
            self.elements,
            tuple((name, int(value)) for name, value in given if value is not None),
            self.cuts,
            ", ".join(filter(None, [*details, f"wire {options.wire}" if options.wire else "", self.detail])),
        )

    def run(self) -> None:
        """Do it, by the first way that can be gone."""
        if self.comm.size == 1:
            self._copy()
        elif self.elements:
            self._run_together()
        if isinstance(self.taken, Array):
            self.taken.settle()

    def _run_together(self) -> None:
        state, options = state_of(self.comm), self.options
        devices = state.join_devices(self._array.device)
        wired = self.operation.on_wire(options.wire, self.dtype) if options.wire else self.operation
        asked = self.collective, self.given, self.taken, wired, self.root or 0, self.cuts
        for way in devices.ways(options.algorithm, self.collective, wired, self.dtype, options.deterministic):
            if way == "staged":
                try:
                    self._run_staged(state)
                except BaseException:  # other ranks may be at another piece
                    state.interrupt()
                    raise
            elif not state.on_node(devices.run, way, asked):
                continue
            devices.remember(self._kind(), way)
            return

    @property
    def _array(self) -> Array:
        """One that is on a GPU."""
        return next(one for one in (self.given, self.taken) if isinstance(one, Array))

    def _kind(self) -> tuple[Any, ...]:
        return self.collective, self.operation.name, self.elements, self.dtype, self.options

    def went(self) -> str | None:
        """Which way the latest such call has gone, if there was one."""
        state = find_state(self.comm)
        return None if state is None or state.devices is None else state.devices.went.get(self._kind())

    def _copy(self) -> None:
        given, taken = self.given, self.taken
        if isinstance(taken, Array) and given is not None:
            taken.fill_from(given)
        elif isinstance(taken, np.ndarray) and isinstance(given, Array):
            given.load(taken)
            given.synchronize()

    def _run_staged(self, state: State) -> None:
        """By way of host memory: in pieces, or, where ranks give or take parts, all at once."""
        if self.cuts is None:
            boxes = state.boxes(self._array.device)
            boxes.through(self.given, self.taken, lambda piece: self.hosted(piece).run())
            return
        assert self.given is not None
        assert self.taken is not None
        result = gpu.staged(self.taken, load=False) if isinstance(self.taken, Array) else self.taken
        if self.collective == "reduce_scatter":
            given = gpu.staged(self.given, load=True) if isinstance(self.given, Array) else self.given
            self.hosted(given, result).run()
        else:
            own = result[self.cuts[self.comm.rank] : self.cuts[self.comm.rank + 1]]
            if isinstance(self.given, Array):
                self.given.load(own)
                self.given.synchronize()
            else:
                own[:] = self.given
            self.hosted(result).run()
        if isinstance(self.taken, Array):
            gpu.deliver(result, self.taken)

    def pieces(self) -> list[int]:
        """The lengths of those in which it is staged."""
        return [self.elements] if self.cuts else [n for _, n in gpu.pieces(self.elements, self.dtype, gpu.BOX)]

    def stand_in(self, length: int) -> np.ndarray:
        """So many elements, but no memory for them."""
        return np.broadcast_to(np.empty((), self.dtype), length)

    def hosted(self, flat: np.ndarray, result: np.ndarray | None = None) -> Call:
        """The same in host memory."""
        options = self.options._replace(algorithm="auto") if self.options.algorithm in WAYS else self.options
        return decide(
            self.comm,
            Part(flat),
            self.operation,
            options,
            collective=self.collective,
            root=self.root,
            cuts=self.cuts,
            result=result,
        )


def options_of(
    comm: MPI.Intracomm,
    algorithm: str,
    deterministic: bool | None,
    segments: int | None = None,
    wire: str | None = None,
) -> Options:
    """What is not given is as the communicator says."""
    if deterministic is None:
        deterministic = getattr(comm, "deterministic", False)
    return Options(algorithm, deterministic, segments, wire)


def _calls(
    x: Any,
    comm: MPI.Intracomm,
    op: str | MPI.Op,
    options: Options,
    *,
    collective: str = "allreduce",
    root: int | None = None,
    stream: Any = None,
) -> "list[Call | DeviceCall]":
    """What is to be done with ``x``, in place; everything is checked before any of it is."""
    if not on_device(x):
        return [*_host_calls(x, comm, op, options, stream=stream, collective=collective, root=root)]
    array = on_stream(x, stream)
    taken = array if root is None or comm.rank == root else None
    return [DeviceCall.made(comm, collective, array, taken, operation(op, array.dtype), options, root=root)]


def _host_calls(
    x: Any,
    comm: MPI.Intracomm,
    op: str | MPI.Op,
    options: Options,
    prefer: Preference = "fastest",
    stream: Any = None,
    *,
    collective: str = "allreduce",
    root: int | None = None,
) -> list[Call]:
    """One for each dtype, in host memory, to which what is elsewhere is brought at once."""
    calls = [
        decide(comm, part, operation(op, part.flat.dtype), options, collective=collective, root=root, prefer=prefer)
        for part in parts(x, stream=stream)
    ]
    detail = lengths(x)
    return [call._replace(detail=detail) for call in calls] if detail else calls


def check_root(comm: MPI.Intracomm, root: int) -> None:
    """Raise ``ValueError`` if there is no such rank."""
    if not 0 <= root < comm.size:
        raise ValueError(f"root must be one of {comm.size} ranks, got {root}")


def decide(
    comm: MPI.Intracomm,
    part: Part,
    operation: Operation,
    options: Options,
    *,
    collective: str = "allreduce",
    root: int | None = None,
    cuts: tuple[int, ...] | None = None,
    result: np.ndarray | None = None,
    prefer: Preference = "fastest",
) -> Call:
    """Choose; a ``ValueError`` if what was named cannot do it."""
    flat = part.flat
    if root is not None:
        root = int(index(root))
        check_root(comm, root)
    if options.wire is not None:
        operation = operation.on_wire(options.wire, flat.dtype)
    state = find_state(comm)
    rules = state.rules[collective] if state else defaults(collective, comm.size)
    shares = state is not None and state.can_share(collective, options.deterministic, operation)
    row = choose(collective, options, len(flat), flat.dtype, operation, rules, prefer, shares)
    given = parameters(row, flat.nbytes, root, options.segments)
    if isinstance(row, Algorithm) and options.segments is not None:
        row.schedule(comm.size, **given)  # so that a wrong parameter is refused now
    boxed = operation.reduces or options.algorithm != "auto"  # the MPI library moves data with one copy, boxes with two
    return Call(collective, comm, comm.size, part, operation, row, given, root, cuts, result, boxed=boxed)
