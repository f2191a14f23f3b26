"""What was asked, understood: the arguments of a call, of a function or of a mpi4py method, become requests.

Every call goes through here once; the next one that is like it is found in the communicator's cache (``mpi.engine``).
"""

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from operator import index
from typing import Any, NamedTuple, cast

import numpy as np
from mpi4py import MPI

from ..collective import Collective
from ..schedule import chunk_start
from .agreement import Header, header_of
from .buffers import (
    REFUSALS,
    Part,
    TooShortError,
    as_bytes,
    block,
    blocks,
    concerns_device,
    described,
    each_rank,
    in_c_order,
    is_half,
    is_in_place,
    lengths,
    name_of,
    no_stream,
    of_blocks,
    on_device,
    on_stream,
    operand,
    parts,
    payload,
    shape_of,
    staged,
    vector,
)
from .gpu.array import Array, copy_into, copy_of, empty, empty_like, part_of, same_device
from .operations import MOVE, Operation, operation
from .operations import name_of as name_of_op
from .progress import driving


class Options(NamedTuple):
    """How a call is to be made, beside what is to be done; see ``mpicoll.allreduce``."""

    algorithm: str = "auto"
    deterministic: bool = False
    segments: int | None = None
    wire: str | None = None


DEFAULT = Options()


class Marker:
    """What stands in place of an array to receive."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return self.name


NEW = Marker("a new array")  # which the call makes, and returns
ONE = Marker("one result for all ranks of a node")
VECTORS = object()
"""In place of counts: they are in the specification of the whole, with displacements."""


class Lengths(tuple[int, ...]):
    """Counts that all ranks know, of a call whose whole has a specification with displacements."""


class Request(NamedTuple):
    """One array's share of a call: flat arrays of one dtype, in host memory or on a GPU, and what is to become of them.

    ``send`` is what this rank sends, the whole or its part, and ``recv`` what it receives, each ``None`` where it does
    not; ``recv`` may also be ``ONE``.  Where ``send`` is ``recv``, or is ``None`` and ``in_place`` set, what it sends
    is in what it receives.  ``elements`` of ``dtype`` are the whole, ``cuts`` are where parts of it begin,
    ``counts`` their lengths if they are not all equal.

    ``detail`` is what else all ranks must have in common, ``stated`` what those that state it must (see ``Header``).
    ``deliver`` brings the result to where it is wanted, if that is elsewhere; ``result`` is the new array that the call
    returns, if any.
    """

    row: Collective
    p: int
    rank: int
    dtype: np.dtype
    elements: int
    operation: Operation
    options: Options
    root: int | None = None
    cuts: tuple[int, ...] | None = None
    counts: tuple[int, ...] | None = None
    in_place: bool = False
    detail: str = ""
    stated: tuple[str, str] = ("", "")
    send: np.ndarray | Array | None = None
    recv: np.ndarray | Array | Marker | None = None
    deliver: Callable[[], None] | None = None
    result: Any = None

    @property
    def kind(self) -> tuple[Any, ...]:
        """All but the arrays: what it has in common with the requests that are like it."""
        return self[:13], self.recv is ONE

    @property
    def on_gpu(self) -> bool:
        """Whether an array of it is in the memory of a GPU."""
        return isinstance(self.send, Array) or isinstance(self.recv, Array)

    @property
    def own(self) -> slice:
        """This rank's part of the whole."""
        assert self.cuts is not None
        return slice(self.cuts[self.rank], self.cuts[self.rank + 1])

    @property
    def nbytes(self) -> int:
        """Bytes of the whole, as they travel."""
        return self.elements * self.operation.carried(self.dtype).itemsize


class Raw(NamedTuple):
    """A call that is not made of requests: mpi4py's own method with what the user passed, or something else that all
    ranks do together; and what all ranks must have in common."""

    header: Header
    do: Callable[[], Any]


class Asked(NamedTuple):
    """What a program passed.

    ``send`` and ``recv`` are as mpi4py's methods take them.  ``method`` says that a method of mpi4py's was called,
    which takes whatever that takes, and not a function of ours, which is stricter.  ``counts`` are those of ranks'
    parts, if they were given.  ``native_first`` says whether ``"auto"`` is native for a number of bytes.
    """

    comm: MPI.Intracomm
    row: Collective
    send: Any
    recv: Any
    op: str | MPI.Op
    root: Any
    counts: Any
    options: Options
    stream: Any
    method: bool
    native_first: Callable[[int], bool]

    @property
    def untouched(self) -> bool:
        """Whether the MPI library may be given what mpi4py takes and we do not."""
        return self.method and self.options in (DEFAULT, DEFAULT._replace(algorithm="native"))

    def native(self, name: str, *args: Any) -> Callable[[], None]:
        """mpi4py's method of that name."""
        method = getattr(MPI.Intracomm, name)

        def call() -> None:
            with driving(self.comm):
                method(self.comm, *args)

        return call

    def request(
        self,
        send: np.ndarray | Array | None,
        recv: np.ndarray | Array | Marker | None,
        operation: Operation,
        *,
        cuts: tuple[int, ...] | None = None,
        **more: Any,
    ) -> Request:
        """A request for these arrays; a ``ValueError`` unless they fit together."""
        there = [one for one in (send, recv) if isinstance(one, (np.ndarray, Array))]
        same_device(*(one for one in there if isinstance(one, Array)))
        count, dtype = cuts[-1] if cuts else there[0].size, there[0].dtype
        if dtype != there[-1].dtype:
            raise ValueError(f"mismatch in send dtype {dtype} and receive dtype {there[-1].dtype}")
        if cuts is None and there[-1].size != count:
            raise ValueError(f"mismatch in send count {count} and receive count {there[-1].size}")
        if cuts is not None:
            own = cuts[self.comm.rank + 1] - cuts[self.comm.rank]
            for one, is_part in ((send, self.row.sends_part), (recv, self.row.receives_part)):
                wanted = own if is_part else count
                if isinstance(one, (np.ndarray, Array)) and one.size != wanted:
                    raise ValueError(f"expected {wanted} elements of {dtype}, as counts say, got {one.size}")
        counts = lengths_of(cuts) if cuts else None
        if counts is not None and len(set(counts)) == 1:
            counts = None
        comm, options = self.comm, self.options
        if options.wire is not None:
            operation = operation.on_wire(options.wire, dtype)
        return Request(
            self.row,
            comm.size,
            comm.rank,
            dtype,
            count,
            operation,
            options,
            self.root,
            cuts,
            counts,
            send=send,
            recv=recv,
            **more,
        )


def understand(asked: Asked) -> list[Request | Raw]:
    """What is to be done, all of it, or a ``TypeError`` or ``ValueError`` that says why it cannot be."""
    row = asked.row
    if row.rooted:
        asked = asked._replace(root=check_root(asked.comm, asked.root))
    if row.parted:
        return _reduce_scatter(asked) if row.reduces else _moving_parts(asked)
    return _reducing(asked) if row.reduces else _broadcast(asked)


def check_root(comm: MPI.Intracomm, root: Any) -> int:
    """The root as one of Python's whole numbers; a ``ValueError`` if there is no such rank."""
    number = int(index(root))
    if not 0 <= number < comm.size:
        raise ValueError(f"root must be one of {comm.size} ranks, got {root}")
    return number


def cuts_of(counts: Sequence[int] | None, total: int | None, p: int) -> tuple[int, ...]:
    """Where each rank's part begins, and the end; a ``ValueError`` for counts that are not those of ``p`` parts."""
    if counts is None:
        assert total is not None
        return tuple(chunk_start(total, rank, p) for rank in range(p + 1))
    checked = [index(count) for count in counts]
    if len(checked) != p or min(checked) < 0:
        raise ValueError(f"expected a count of 0 or more for each of {p} ranks, got {counts}")
    if total is not None and sum(checked) != total:
        raise ValueError(f"counts sum to {sum(checked)}, the array has {total} elements")
    return (0, *accumulate(checked))


def hashable(counts: Any) -> Any:
    """A list or tuple of Python's whole numbers as a tuple, by which a call may be remembered; all else as no tuple."""
    if not isinstance(counts, (list, tuple)):
        return counts
    return tuple(counts) if {*map(type, counts)} == {int} else list(counts)


def lengths_of(cuts: tuple[int, ...]) -> tuple[int, ...]:
    """The lengths of the parts that begin there."""
    return tuple(after - before for before, after in pairwise(cuts))


# ---- allreduce, reduce


def on_host(asked: Asked, x: Any) -> list[Request]:
    """Requests to reduce ``x`` in place, one for each dtype; what is on a GPU is brought to host memory at once."""
    return _in_place(asked, x, parts(x, asked.stream, as_mpi4py=asked.method), True)


def _in_place(asked: Asked, x: Any, made: list[Part], receives: bool) -> list[Request]:
    detail = lengths(x)
    return [
        asked.request(
            part.flat,
            part.flat if receives else None,
            operation(asked.op, part.flat.dtype),
            detail=detail,
            in_place=receives,
            deliver=part.deliver if receives else None,
        )
        for part in made
    ]


def _reducing(asked: Asked) -> list[Request | Raw]:
    comm, row, send, recv, op, stream = asked.comm, asked.row, asked.send, asked.recv, asked.op, asked.stream
    receives = row.receives(comm.rank, asked.root)
    if send is MPI.IN_PLACE and not receives:
        raise ValueError(f"MPI.IN_PLACE is for the root, {asked.root}, alone: pass what rank {comm.rank} sends")
    in_place = receives and is_in_place(send)
    if in_place:
        send = recv
    target = recv if receives else send
    device = concerns_device(target) if in_place else concerns_device(target, send)
    as_it_is = (
        asked.method and recv is not ONE and isinstance(op, MPI.Op) and not asked.options.deterministic and not device
    )
    if device and on_device(send):
        there = on_stream(send, stream, writable=in_place)
        taken: Any = there if in_place else None
        result = None
        if recv is ONE:
            result = empty(there.size, there.dtype, there)
            taken = Array(result, there.stream)
        elif receives and not in_place:
            taken = operand(recv, stream if on_device(recv) else None)
        return [asked.request(there, taken, operation(op, there.dtype), result=result)]
    if not (device and concerns_device(target)):
        no_stream(stream)
    if as_it_is and asked.options.algorithm == "native":
        return [_native_reduction(asked, in_place)]
    try:
        if recv is ONE or (asked.method and not receives):
            made = [Part(vector(send, writable=False))]
        elif device and receives and on_device(recv):
            made = [staged(recv, load=False, stream=stream)]
        else:
            made = parts(target, stream, as_mpi4py=asked.method)
        done = [operation(op, part.flat.dtype) for part in made]
        given = vector(send, writable=False) if receives and not in_place and len(made) == 1 else None
    except REFUSALS:
        if as_it_is and asked.options == DEFAULT:
            return [_native_reduction(asked, in_place)]  # takes it, or says what is wrong
        raise
    if as_it_is and not made:
        return [_native_reduction(asked, in_place)]  # which says what is wrong
    if recv is ONE:
        return [asked.request(made[0].flat, ONE, done[0])]
    if given is not None:
        return [asked.request(given, made[0].flat, done[0], deliver=made[0].deliver)]
    if asked.method and not in_place and len(made) != 1:
        raise TypeError("a list of arrays is reduced in place: pass MPI.IN_PLACE")
    return [*_in_place(asked, target, made, receives)]


def _native_reduction(asked: Asked, in_place: bool) -> Raw:
    """A call for datatypes and operations that are the MPI library's only; or what mpi4py says of them."""
    op, row = cast(MPI.Op, asked.op), asked.row
    receives = row.receives(asked.comm.rank, asked.root)
    target = asked.recv if receives else asked.send
    look = payload if name_of_op(op) == "user-defined" else described
    what, count = look(target, receives)
    if count is not None and receives and not in_place and look(asked.send) != (what, count):
        what, count = f"{look(asked.send)} to send and {look(target)} to receive", None
    header = header_of(row.name, name_of_op(op), what if count != 0 else "", count, asked.root)
    rooted = [asked.root] if row.rooted else []
    return Raw(header, asked.native(row.name.capitalize(), asked.send, asked.recv, op, *rooted))


# ---- bcast


def _broadcast(asked: Asked) -> list[Request | Raw]:
    comm, root, stream = asked.comm, asked.root, asked.stream
    sends = comm.rank == root
    x = asked.recv if asked.send is None else asked.send

    def request(raw: Any, deliver: Callable[[], None] | None = None, **more: Any) -> Request:
        send, recv = (raw, None) if sends else (None, raw)
        return asked.request(send, recv, MOVE, deliver=deliver, **more)

    if on_device(x) or (asked.method and concerns_device(x)):
        array = on_stream(x, stream, asked.method and not sends)
        return [request(array.as_bytes(), stated=("" if asked.method else name_of(array.dtype), ""))]
    if not asked.method:
        pieces = parts(x, stream=stream)
        if any(part.flat.dtype.hasobject for part in pieces):
            raise TypeError("objects are not broadcast from memory to memory: use comm.bcast, in lower case")
        detail = lengths(x)
        return [
            request(
                part.flat.view(np.uint8),
                part.deliver,
                stated=(name_of(part.flat.dtype), ""),
                detail=detail,
            )
            for part in pieces
        ]
    no_stream(stream)
    if not asked.untouched:
        part = Part(vector(x, writable=not sends))
        return [request(part.flat.view(np.uint8), part.deliver)]
    what, nbytes = payload(x, not sends)
    native = Raw(header_of("bcast", "", what, nbytes, root), asked.native("Bcast", x, root))
    derived = not isinstance(x, np.ndarray)
    if nbytes is None or asked.options.algorithm == "native" or (derived and asked.native_first(nbytes)):
        return [native]
    part = as_bytes(x, sends, not sends)
    return [request(part.flat, None if sends else part.deliver)]


# ---- reduce_scatter


def _reduce_scatter(asked: Asked) -> list[Request | Raw]:
    comm, send, recv, stream = asked.comm, asked.send, asked.recv, asked.stream
    p, rank = comm.size, comm.rank
    in_place, device = recv is not NEW and is_in_place(send), concerns_device(send, recv)
    counts = None if asked.counts is None else each_rank(asked.counts)
    cuts = None if counts is None else cuts_of(counts, None, p)
    if not device:
        no_stream(stream)
    whole: Any = recv if in_place else send
    try:
        if asked.method and cuts is None:
            whole = of_blocks(whole, p)
        given = operand(whole, stream if on_device(whole) else None, writable=in_place)
        if recv is NEW:
            cuts = cuts_of(counts, given.size, p)
            taken = empty_like(given, cuts[rank + 1] - cuts[rank])
        else:
            taken = given if in_place else operand(recv, stream if on_device(recv) else None)
        found = operation(asked.op, given.dtype)
    except REFUSALS:
        if device or not asked.untouched or not isinstance(asked.op, MPI.Op):
            raise
        return [_native_reduce_scatter(asked, whole, counts, cuts)]
    if cuts is None:
        cuts = cuts_of([given.size // p if in_place else taken.size] * p, None, p)
    mine = cuts[rank + 1] - cuts[rank]
    if given.size != cuts[-1] or (taken.size != mine and not in_place) or given.dtype != taken.dtype:
        room = "" if in_place else f" and {taken.size} of {taken.dtype}"
        raise ValueError(
            f"expected {cuts[-1]} elements to send and room for {mine} of the same dtype, got {given.size} of "
            f"{given.dtype}{room}"
        )
    if in_place:  # others may read there when a result is written
        taken = part_of(given, 0, mine)
        given = copy_of(given)
    returned = taken.array if isinstance(taken, Array) else taken
    request = asked.request(given, taken, found, cuts=cuts, result=returned if recv is NEW else None)
    if not device and asked.untouched and asked.options.algorithm == "native" and is_half(given.dtype):
        header = Header("reduce_scatter", "native", found.name, name_of(given.dtype), given.size, (), request.counts)
        do = asked.native("Reduce_scatter", given, taken, lengths_of(cuts), asked.op)
        return [Raw(header, do)]
    return [request]


def _native_reduce_scatter(asked: Asked, whole: Any, counts: list[int] | None, cuts: tuple[int, ...] | None) -> Raw:
    """A call for datatypes and operations that are the MPI library's only; or what mpi4py says of them."""
    op = cast(MPI.Op, asked.op)
    dtype, count = described(whole)
    if cuts is None:
        header = header_of("reduce_scatter_block", name_of_op(op), dtype, count)
        return Raw(header, asked.native("Reduce_scatter_block", asked.send, asked.recv, op))
    header = Header("reduce_scatter", "native", name_of_op(op), dtype, count, (), lengths_of(cuts))
    return Raw(header, asked.native("Reduce_scatter", asked.send, asked.recv, counts, op))


# ---- allgather, and all else that moves the parts of ranks


def _moving_parts(asked: Asked) -> list[Request | Raw]:
    if asked.counts is VECTORS or isinstance(asked.counts, Lengths):
        return _vectors(asked)
    return _blocks(asked) if asked.method else _new(asked)


def _sides(asked: Asked) -> tuple[Any, Any, bool, bool]:
    """Return what was passed for the whole and the part; whether this rank has the whole, and its part within it."""
    row, rank, root = asked.row, asked.comm.rank, asked.root
    if row.sends_part:
        whole, part, has_whole = asked.recv, asked.send, row.receives(rank, root)
    else:
        whole, part, has_whole = asked.send, asked.recv, row.sends(rank, root)
    return whole, part, has_whole, has_whole and is_in_place(part)


def _bytes(x: Array | np.ndarray) -> Any:
    if isinstance(x, Array):
        return x.as_bytes()
    return x.view(np.uint8) if x.dtype.itemsize else np.empty(0, np.uint8)


def _moving(asked: Asked, send: Any, recv: Any, cuts: tuple[int, ...], size: int, **more: Any) -> Request:
    """Return the request in bytes; ``cuts`` are in elements of ``size`` bytes."""
    as_sent, as_received = (None if x is None else _bytes(x) for x in (send, recv))
    return asked.request(as_sent, as_received, MOVE, cuts=tuple(cut * size for cut in cuts), **more)


def _new(asked: Asked) -> list[Request | Raw]:
    """A function, whose result is a new array."""
    comm, x, stream = asked.comm, asked.send, asked.stream
    p, counts = comm.size, asked.counts
    given = operand(in_c_order(x, stream), stream, writable=False)
    if given.dtype.hasobject:
        raise TypeError(f"objects are not gathered from memory to memory: use comm.{asked.row.name}, in lower case")
    cuts = cuts_of([given.size] * p if counts is None else counts, None, p)
    if cuts[comm.rank + 1] - cuts[comm.rank] != given.size:
        raise ValueError(f"rank {comm.rank} brings {given.size} elements, counts say {counts[comm.rank]}")
    stated = name_of(given.dtype), f"{shape_of(x)}" if counts is None else ""
    if not asked.row.receives(comm.rank, asked.root):
        return [_moving(asked, given, None, cuts, given.dtype.itemsize, stated=stated)]
    result = empty_like(given, cuts[-1])
    returned = result.array if isinstance(result, Array) else result
    return [_moving(asked, given, result, cuts, given.dtype.itemsize, stated=stated, result=returned)]


def _blocks(asked: Asked) -> list[Request | Raw]:
    """A method, to which the whole is equal blocks."""
    comm, row, stream = asked.comm, asked.row, asked.stream
    p = comm.size
    whole, part, has_whole, in_place = _sides(asked)
    device = concerns_device(whole if has_whole else None, None if in_place else part)
    if not device:
        no_stream(stream)
        if asked.options.algorithm in ("auto", "native"):
            return [_equal_bytes(asked, whole if has_whole else None, None if in_place else part)]
    whole_array = part_array = None
    if has_whole:
        together = of_blocks(whole, p)
        whole_array = operand(together, stream if on_device(together) else None, writable=row.sends_part)
    if not in_place:
        part_array = operand(part, stream if on_device(part) else None, writable=row.receives_part)
    given = whole_array if part_array is None else part_array
    assert given is not None
    each = given.size // p if part_array is None else given.size
    if whole_array is not None and (each * p, given.dtype) != (whole_array.size, whole_array.dtype):
        got = "nothing" if part_array is None else f"{part_array.size} of {part_array.dtype}"
        room = f"{whole_array.size} of {whole_array.dtype}"
        raise ValueError(f"expected {p} times what is sent, got room for {room}, and {got}")
    cuts = tuple(each * one for one in range(p + 1))
    send, recv = (part_array, whole_array) if row.sends_part else (whole_array, part_array)
    return [_moving(asked, send, recv, cuts, given.dtype.itemsize, in_place=in_place)]


def _equal_bytes(asked: Asked, whole: Any, part: Any) -> Request | Raw:
    """Equal blocks of any datatype, in host memory; either is ``None`` where this rank has none."""
    comm, row = asked.comm, asked.row
    p = comm.size
    dtype, each = block(whole, p, row.sends_part) if part is None else payload(part, row.receives_part)
    if whole is not None and part is not None:
        what, room = payload(whole, row.sends_part)
        if each is not None and isinstance(whole, np.ndarray) and room != each * p:
            raise ValueError(f"expected {p} times what is sent, got room for {room} {what}, and {each} bytes")
    rooted = [asked.root] if row.rooted else []
    header = header_of(row.name, "", dtype, None if each is None else each * p, asked.root)
    native = Raw(header, asked.native(row.name.capitalize(), asked.send, asked.recv, *rooted))
    derived = not all(x is None or isinstance(x, np.ndarray) for x in (whole, part))
    if each is None or asked.options.algorithm == "native" or (derived and asked.native_first(each * p)):
        return native
    cuts = tuple(each * rank for rank in range(p + 1))
    delivers = []
    arrays: list[np.ndarray | None] = []
    for x, written in ((whole, row.sends_part), (part, row.receives_part)):
        if x is None:
            arrays.append(None)
            continue
        together = of_blocks(x, p) if x is whole else x
        flat, deliver = as_bytes(together, load=not written or part is None, store=written)
        arrays.append(flat)
        delivers += [deliver] if deliver else []
    send, recv = arrays[::-1] if row.sends_part else arrays
    in_place = part is None
    return asked.request(send, recv, MOVE, cuts=cuts, in_place=in_place, deliver=delivers[0] if delivers else None)


def _vectors(asked: Asked) -> list[Request | Raw]:
    """A method, to which the whole is blocks of any lengths, with displacements."""
    comm, row, root, stream = asked.comm, asked.row, asked.root, asked.stream
    p, rank = comm.size, comm.rank
    whole, part, has_whole, in_place = _sides(asked)
    native = asked.options.algorithm in ("auto", "native")
    if not concerns_device(whole if has_whole else None, None if in_place else part):
        no_stream(stream)
        if native:
            rooted = [root] if row.rooted else []
            header = header_of(f"{row.name}v", "", "", None, root) if row.rooted else _vectors_header(asked)
            return [Raw(header, asked.native(f"{row.name.capitalize()}v", asked.send, asked.recv, *rooted))]
    elif native and row.rooted:
        raise TypeError(f"{row.name}v of arrays in the memory of GPUs needs an algorithm by name: binomial or another")
    counts: Sequence[int] = asked.counts if isinstance(asked.counts, Lengths) else []
    array = own = part_array = None
    starts: Sequence[int] = []
    if has_whole:
        on_stream_ = stream if concerns_device(whole) else None
        array, found, starts = blocks(whole, p, on_stream_, writable=row.sends_part)
        if row.rooted and tuple(found) != tuple(counts):
            raise ValueError(f"expected counts {[*counts]}, as the ranks have them, got {found}")
        counts = found
        own = part_of(array, starts[rank], starts[rank] + counts[rank])
    cuts = cuts_of(counts, None, p)
    if not in_place:
        part_array = operand(part, stream if on_device(part) else None, writable=row.receives_part)
        dtype = part_array.dtype if array is None else array.dtype
        if (part_array.size, part_array.dtype) != (counts[rank], dtype):
            what = f"{counts[rank]} elements of {dtype} to {'send' if row.sends_part else 'receive'}"
            raise ValueError(f"expected {what}, as counts say, got {part_array.size} of {part_array.dtype}")
    deliver = None
    if array is not None and tuple(starts) == cuts[:-1]:
        array = part_of(array, 0, cuts[-1])
    elif array is not None:
        packed, apart = empty_like(array, cuts[-1]), array
        pairs = [
            (part_of(apart, start, start + count), part_of(packed, cuts[one], cuts[one + 1]))
            for one, (start, count) in enumerate(zip(starts, counts, strict=True))
        ]
        if row.sends_part:
            part_array, in_place = own if part_array is None else part_array, False

            def deliver() -> None:
                for there, here in pairs:
                    copy_into(there, here)

        else:
            for there, here in pairs:
                copy_into(here, there)
        array = packed
    given: Any = array if part_array is None else part_array
    send, recv = (part_array, array) if row.sends_part else (array, part_array)
    return [_moving(asked, send, recv, cuts, given.dtype.itemsize, in_place=in_place, deliver=deliver)]


def _vectors_header(asked: Asked) -> Header:
    p, rank = asked.comm.size, asked.comm.rank
    try:
        received, counts, _ = blocks(asked.recv, p)
    except TooShortError:
        raise
    except REFUSALS as error:
        return header_of("allgatherv", "", str(error), None)
    if len(counts) != p or min(counts) < 0:
        cuts_of(counts, None, p)  # which says what is wrong with them
    size = received.dtype.itemsize
    each = tuple([count * size for count in counts])
    sent = None if is_in_place(asked.send) else payload(asked.send)
    if sent is not None and sent[1] is not None and sent[1] != each[rank]:
        raise ValueError(f"expected {each[rank]} bytes to send, as counts say, got {sent[1]}")
    return Header("allgatherv", "native", "", "bytes", sum(each), (), each)
