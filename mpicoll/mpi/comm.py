"""The drop-in communicator: an ``MPI.Intracomm`` whose collectives are ours where that is better."""

from collections.abc import Callable, Sequence
from functools import wraps
from itertools import pairwise
from math import prod
from operator import index
from threading import get_ident
from typing import Any, SupportsIndex, TypeVar, cast

import numpy as np
from mpi4py import MPI

from ..tuning.rules import NATIVE, preferred
from . import gpu, operations, record
from .agreement import Header, check_level, header_of, level_of
from .attach import check_comm, interrupted, whole
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
    entries,
    is_half,
    is_in_place,
    no_stream,
    of_blocks,
    on_device,
    on_stream,
    operand,
    order_of,
    parts,
    payload,
    shape_of,
    staged,
    vector,
)
from .buffers import name_of as dtype_name
from .collectives import (
    Call,
    DeviceCall,
    Native,
    agreed,
    broadcasting,
    by_messages,
    check_root,
    compared,
    cuts_of,
    decide,
    gathering,
    gathering_on_device,
    on_node,
    options_of,
    recorded,
    run,
)
from .gpu import Array
from .operations import MOVE, Operation, name_of, operation, predefined
from .progress import driving, under_way
from .select import PLAIN, SHARED, SHARED_FROM, Options, Shared
from .state import State, state_of

C = TypeVar("C", bound=MPI.Intracomm)


class Comm(MPI.Intracomm):
    """``MPI.COMM_WORLD``, or any intracommunicator, with faster and reproducible collectives.

    ``mpicoll.Comm(comm)`` is another name for the same communicator: it compares equal, messages sent through one
    are received through the other, and ``Free`` frees it.  Making it is a collective call, for a private duplicate.
    ``Dup``, ``Clone``, ``Split``, ``Split_type``, ``Create`` and ``Create_group`` give a ``Comm`` again; topology
    communicators, intercommunicators and ``Idup`` give what mpi4py gives.

    The MPI library's nonblocking and persistent collectives stay its own.  mpi4py lets go of the buffers of those that
    reduce; here they are kept as long as the request is.

    ``deterministic`` and ``check`` are the defaults of the calls that have such arguments (see ``mpicoll.allreduce``),
    and pass on to copies of this communicator, and to communicators made from it.
    """

    deterministic: bool = False
    check: str = ""
    _state: State | None = None
    _shares: bool = False

    def __new__(
        cls, comm: MPI.Intracomm | None = None, *, deterministic: bool | None = None, check: str | None = None
    ) -> "Comm":
        """See the class."""
        if comm is None:  # how mpi4py makes one that it is going to fill in
            return super().__new__(cls)
        check_comm(comm)
        if deterministic is None:
            deterministic = getattr(comm, "deterministic", False)
        return super().__new__(cls, comm)._ready(deterministic, level_of(comm, check))

    def __reduce__(self) -> str | tuple[Any, ...]:
        """Copy and pickle what mpi4py does: ``MPI.COMM_WORLD`` and ``MPI.COMM_SELF``."""
        _, (_, named) = cast(tuple[Any, ...], super().__reduce__())
        return _again, (type(self), named, self.deterministic, self.check)

    def __repr__(self) -> str:
        if MPI.Is_finalized() or not self:
            return "<mpicoll.Comm, null or freed>"
        named = f" {self.name}" if self.name else ""
        ordered = ", deterministic" if self.deterministic else ""
        return f"<mpicoll.Comm{named}, rank {self.rank} of {self.size}{ordered}, check={self.check!r}>"

    def _ready(self, deterministic: bool, check: str) -> "Comm":
        self.deterministic, self.check = deterministic, check
        check_level(self.check)
        self._state = state_of(self)
        self._shares = self._state.shares
        return self

    def _wrapped(self, comm: C) -> "C | Comm":
        return Comm(comm, deterministic=self.deterministic, check=self.check) if comm else comm

    def Dup(self, info: MPI.Info | None = None) -> "Comm":  # noqa: N802
        """As mpi4py's; a ``Comm``."""
        return super().Dup(info)._ready(self.deterministic, self.check)

    def Dup_with_info(self, info: MPI.Info) -> "Comm":  # noqa: N802
        """As mpi4py's; a ``Comm``."""
        return super().Dup_with_info(info)._ready(self.deterministic, self.check)

    def Clone(self) -> "Comm":  # noqa: N802
        """As mpi4py's; a ``Comm``."""
        return super().Clone()._ready(self.deterministic, self.check)

    def Idup(self, info: MPI.Info | None = None) -> Any:  # noqa: N802
        """As mpi4py's: a plain communicator, to be made a ``Comm`` once the request is complete."""
        return MPI.Intracomm(self).Idup(info)

    def Idup_with_info(self, info: MPI.Info) -> Any:  # noqa: N802
        """As mpi4py's: a plain communicator, to be made a ``Comm`` once the request is complete."""
        return MPI.Intracomm(self).Idup_with_info(info)

    def Split(self, color: int = 0, key: int = 0) -> Any:  # noqa: N802
        """As mpi4py's; a ``Comm``, or ``MPI.COMM_NULL``."""
        return self._wrapped(super().Split(color, key))

    def Split_type(self, split_type: int, key: int = 0, info: MPI.Info = MPI.INFO_NULL) -> Any:  # noqa: N802
        """As mpi4py's; a ``Comm``, or ``MPI.COMM_NULL``."""
        return self._wrapped(super().Split_type(split_type, key, info))

    def Create(self, group: MPI.Group) -> Any:  # noqa: N802
        """As mpi4py's; a ``Comm``, or ``MPI.COMM_NULL``."""
        return self._wrapped(super().Create(group))

    def Create_group(self, group: MPI.Group, tag: int = 0) -> Any:  # noqa: N802
        """As mpi4py's; a ``Comm``, or ``MPI.COMM_NULL``."""
        return self._wrapped(super().Create_group(group, tag))

    def empty(self, shape: int | Sequence[int], dtype: Any = float) -> np.ndarray:
        """An array in memory that the ranks of a node share: collectives on such arrays move far less.

        A collective call.  The array is this rank's own, as any array is, of whatever shape; but ``Allreduce``,
        ``Reduce``, ``Reduce_scatter``, ``Allgather`` and ``Bcast`` find it, its views included, where it is, if all
        ranks pass such arrays.  When it and its views are gone, its memory is used for another one; when the
        communicator is freed, it becomes an ordinary array.

        Where there is no memory to share it is an ordinary array, and there is a warning.
        """
        return self._array("empty", lambda: (shape, dtype, None))

    def zeros(self, shape: int | Sequence[int], dtype: Any = float) -> np.ndarray:
        """The same, full of zeros."""
        return self._array("zeros", lambda: (shape, dtype, 0))

    def full(self, shape: int | Sequence[int], value: Any, dtype: Any = None) -> np.ndarray:
        """The same, full of a value, by default of its dtype."""
        return self._array("full", lambda: (shape, np.asarray(value).dtype if dtype is None else dtype, value))

    def asarray(self, x: Any, dtype: Any = None) -> np.ndarray:
        """The same, a copy of an array."""

        def given() -> tuple[Any, Any, Any]:
            array = np.asarray(x, dtype)
            return array.shape, array.dtype, array

        return self._array("asarray", given)

    def _array(self, name: str, given: Callable[[], tuple[Any, Any, Any]]) -> np.ndarray:
        """Of a shape, a dtype, and what to fill it with."""
        made: list[np.ndarray] = []

        def calls() -> list[Native]:
            shape, dtype, value = given()
            kind = np.dtype(dtype)
            sizes = [index(n) for n in ([shape] if isinstance(shape, SupportsIndex) else shape)]
            if kind.hasobject or not kind.itemsize or min(sizes, default=0) < 0:
                raise ValueError(
                    f"expected a shape, and a dtype of numbers or other plain data, got {sizes} and {kind}"
                )
            if value is not None:
                value = np.broadcast_to(np.asarray(value, kind), sizes)

            def make() -> None:
                made.append(state_of(self).empty(prod(sizes) * kind.itemsize).view(kind).reshape(sizes))
                if value is not None:
                    made[0][...] = value

            return [Native(header_of(name, "", "", None), make)]

        with whole(self):
            run(agreed(self, None, name, None, calls))
        return made[0]

    def allreduce_shared(
        self, x: Any, op: MPI.Op | str = MPI.SUM, *, check: str | None = None, stream: Any = None
    ) -> np.ndarray:
        """Combine the arrays of all ranks elementwise, into one result for all ranks of a node, which is returned.

        It is read-only, and of the shape of ``x``, which stays as it is, and which best lies in shared memory (see
        ``empty``): then this is the fastest there is.  It is the same memory again at the next such call but one; until
        then ranks may read on.

        ``op`` and ``check`` are those of ``mpicoll.allreduce``; 16-bit floats are added as float32.  The order of
        additions is the canonical one if the ``Comm`` is ``deterministic``.

        If ranks do not share memory, or the array is so small that the MPI library's own is faster, or lies on a GPU,
        each has a result of its own.
        """
        level = self.check if check is None else level_of(self, check)
        if (
            type(x) is np.ndarray
            and self._state is not None
            and self._shares
            and x.dtype in PLAIN
            and x.flags.c_contiguous
            and x.size
            and type(op) is MPI.Op
            and (quick := predefined(op, x.dtype))
            and (level == "header" or level == "off")
            and stream is None
            and not under_way
            and not interrupted
        ):
            state, flat = self._state, x.reshape(-1)
            header = header_of("allreduce_shared", quick.name, PLAIN[x.dtype], x.size, algorithm=SHARED.name)
            how = recorded if level == "off" else compared
            if not self._is_small(x):
                result = how(state, header, state.on_node, state.node.allreduce, flat, quick)
            elif x.nbytes < state.limits["allreduce"].native_below:
                result = np.empty_like(flat)
                how(state, header, MPI.Intracomm.Allreduce, self, flat, result, op)
            else:
                result = None
            if result is not None:
                result = result.reshape(x.shape)
                result.flags.writeable = False
                return result
        reduced: list[Any] = []

        def calls() -> list[Any]:
            flat = operand(x, stream, writable=False)
            found = operation(op, flat.dtype)
            if isinstance(flat, Array):
                reduced.append(gpu.empty(flat.size, flat.dtype, flat))
                taken, options = Array(reduced[0], flat.stream), Options(deterministic=self.deterministic)
                return [DeviceCall.made(self, "allreduce", flat, taken, found, options)]

            def call() -> None:
                reduced.append(self._reduced(flat, found))

            header = header_of("allreduce_shared", found.name, dtype_name(flat.dtype), len(flat), algorithm=SHARED.name)
            return [Native(header, call)]

        with whole(self):
            run(agreed(self, check, "allreduce_shared", x, calls))
        return _shaped(x, reduced[0]) if on_device(x) else _like(x, reduced[0])

    def _reduced(self, flat: np.ndarray, found: Operation) -> np.ndarray:
        state = state_of(self)
        if not self._is_small(flat) and state.can_share("allreduce_shared", True, found) and len(flat):
            state.join_nodes()
            result = state.on_node(state.node.allreduce, flat, found)
            if result is not None:
                return result
        part = Part(flat.copy())
        decide(self, part, found, Options(deterministic=self.deterministic)).run()
        return part.flat

    def _is_small(self, x: np.ndarray) -> bool:
        """Is the MPI library's own faster than one result for all?"""
        return x.nbytes < SHARED_FROM["allreduce_shared"] and not self.deterministic

    def Allreduce(  # noqa: N802
        self,
        sendbuf: Any,
        recvbuf: Any,
        op: MPI.Op | str = MPI.SUM,
        algorithm: str = "auto",
        *,
        deterministic: bool | None = None,
        segments: int | None = None,
        wire: str | None = None,
        check: str | None = None,
        stream: Any = None,
    ) -> None:
        """As mpi4py's, for all that it takes, and with the arguments of ``mpicoll.allreduce``.

        With ``algorithm="native"`` host buffers and operations go to the MPI library as they are.
        """
        level = self.check if check is None else level_of(self, check)
        found: Operation | None = None
        if (
            algorithm == "auto"
            and type(recvbuf) is np.ndarray
            and type(op) is MPI.Op
            and recvbuf.dtype in PLAIN
            and (
                recvbuf.nbytes < (limits := (state := self._state or state_of(self)).limits["allreduce"]).native_below
                or (found := predefined(op, recvbuf.dtype)) is not None
            )
            and recvbuf.flags.carray
            and (sendbuf is MPI.IN_PLACE or _are_alike(sendbuf, recvbuf, "" if found else level))
            and (level == "header" or level == "off")
            and segments is None
            and wire is None
            and stream is None
            and not (self.deterministic if deterministic is None else deterministic)
            and not under_way
            and not interrupted
        ):
            send = recvbuf if sendbuf is MPI.IN_PLACE else sendbuf
            if found is None and (level == "off" or self.size == 1):
                return MPI.Intracomm.Allreduce(self, sendbuf, recvbuf, op)
            if found is None:
                header = _header("allreduce", recvbuf, op)
                return compared(state, header, MPI.Intracomm.Allreduce, self, sendbuf, recvbuf, op)
            if self._shares and recvbuf.nbytes >= limits.shared_from:
                return on_node(self, state, level, "allreduce", send, recvbuf, found)
            if by_messages(state, level, send, recvbuf, found):
                return None
        options = options_of(self, algorithm, deterministic, segments, wire)
        with whole(self):
            return self._reduction("allreduce", sendbuf, recvbuf, op, None, options, check, stream)

    def _on_node(self, op: MPI.Op, x: np.ndarray) -> Operation | None:
        """The operation, if it is one for shared memory."""
        return predefined(op, x.dtype) if self._shares else None

    def Reduce(  # noqa: N802
        self,
        sendbuf: Any,
        recvbuf: Any,
        op: MPI.Op | str = MPI.SUM,
        root: int = 0,
        algorithm: str = "auto",
        *,
        deterministic: bool | None = None,
        segments: int | None = None,
        wire: str | None = None,
        check: str | None = None,
        stream: Any = None,
    ) -> None:
        """As mpi4py's, for all that it takes, and with the arguments of ``mpicoll.reduce``."""
        data = recvbuf if sendbuf is MPI.IN_PLACE else sendbuf
        level = self.check if check is None else level_of(self, check)
        found: Operation | None = None
        if (
            algorithm == "auto"
            and type(data) is np.ndarray
            and type(op) is MPI.Op
            and data.dtype in PLAIN
            and (
                data.nbytes < (limits := (self._state or state_of(self)).limits["reduce"]).native_below
                or (data.nbytes >= limits.shared_from and (found := self._on_node(op, data)) is not None)
            )
            and data.flags.carray
            and (
                sendbuf is not MPI.IN_PLACE
                if self.rank != root
                else recvbuf is data or (_are_alike(recvbuf, data, "" if found else level) and recvbuf.flags.writeable)
            )
            and type(root) is int
            and 0 <= root < self.size
            and (level == "header" or level == "off")
            and segments is None
            and wire is None
            and stream is None
            and not (self.deterministic if deterministic is None else deterministic)
            and not under_way
            and not interrupted
        ):
            if found is not None:
                recv = recvbuf if self.rank == root else data
                on_node(self, self._state or state_of(self), level, "reduce", data, recv, found, root)
            elif level == "off" or self.size == 1:
                MPI.Intracomm.Reduce(self, sendbuf, recvbuf, op, root)
            else:
                header = _header("reduce", data, op, root)
                compared(self._state or state_of(self), header, MPI.Intracomm.Reduce, self, sendbuf, recvbuf, op, root)
        else:
            options = options_of(self, algorithm, deterministic, segments, wire)
            with whole(self):
                self._reduction("reduce", sendbuf, recvbuf, op, root, options, check, stream)

    def Bcast(  # noqa: N802
        self,
        buf: Any,
        root: int = 0,
        algorithm: str = "auto",
        *,
        segments: int | None = None,
        check: str | None = None,
        stream: Any = None,
    ) -> None:
        """As mpi4py's, for all that it takes, and with the arguments of ``mpicoll.bcast``."""
        options = options_of(self, algorithm, False, segments, None)
        receives = self.rank != root
        there = concerns_device(buf)
        untold = options == Options() and not there
        unseen = (untold and self._is_native_best("bcast", lambda: payload(buf, receives)[1])) or (
            options == Options("native") and not there
        )
        if level_of(self, check) == "off" and unseen and stream is None:
            return self._natively("Bcast", buf, root)()

        def calls() -> list[Any]:
            check_root(self, root)
            if there:
                return [broadcasting(self, on_stream(buf, stream, receives), options, root, named=False)]
            no_stream(stream)
            if unseen:
                header = header_of("bcast", "", *payload(buf, receives), int(index(root)))
                return [Native(header, self._natively("Bcast", buf, root))]
            part = as_bytes(buf, not receives, receives) if untold else Part(vector(buf, writable=receives))
            raw = Part(part.flat.view(np.uint8), part.deliver if receives else None)
            return [decide(self, raw, MOVE, options, collective="bcast", root=root)]

        with whole(self):
            return run(agreed(self, check, "bcast", buf, calls))

    def _is_native_best(self, collective: str, measure: Callable[[], int | None]) -> bool:
        """Is the MPI library's own the first choice for so many bytes?  It is where nobody knows how many."""
        state = self._state or state_of(self)
        limits = state.limits[collective]
        if limits.native_always or (nbytes := measure()) is None or nbytes < limits.native_below:
            return True
        return preferred(state.rules[collective], nbytes)[0] == NATIVE

    def _natively(self, name: str, *args: Any) -> Callable[[], None]:
        """mpi4py's method of that name."""

        def call() -> None:
            with driving(self):
                getattr(MPI.Intracomm, name)(self, *args)

        return call

    def Reduce_scatter_block(  # noqa: N802
        self,
        sendbuf: Any,
        recvbuf: Any,
        op: MPI.Op | str = MPI.SUM,
        algorithm: str = "auto",
        *,
        deterministic: bool | None = None,
        wire: str | None = None,
        check: str | None = None,
        stream: Any = None,
    ) -> None:
        """As mpi4py's, for all that it takes, and with the arguments of ``mpicoll.reduce_scatter``."""
        options = options_of(self, algorithm, deterministic, None, wire)
        with whole(self):
            run(self._scattering(sendbuf, recvbuf, None, op, options, check, stream))

    def Reduce_scatter(  # noqa: N802
        self,
        sendbuf: Any,
        recvbuf: Any,
        recvcounts: Sequence[int] | None = None,
        op: MPI.Op | str = MPI.SUM,
        algorithm: str = "auto",
        *,
        deterministic: bool | None = None,
        wire: str | None = None,
        check: str | None = None,
        stream: Any = None,
    ) -> None:
        """As mpi4py's, for all that it takes, and with the arguments of ``mpicoll.reduce_scatter``.

        Where ``recvcounts`` is left out, ranks tell each other how much they have room for, in a call of its own.
        """
        options = options_of(self, algorithm, deterministic, None, wire)
        with whole(self):
            counts = recvcounts
            if counts is None and not is_in_place(sendbuf):
                counts = self._room(recvbuf, check)
            run(self._scattering(sendbuf, recvbuf, [] if counts is None else counts, op, options, check, stream))

    def _room(self, recvbuf: Any, check: str | None) -> Sequence[int]:
        """How many elements each rank has room for."""
        own, everyone = np.zeros(1, np.int64), np.zeros(self.size, np.int64)

        def calls() -> list[Native]:
            own[0] = entries(recvbuf)
            return [Native(header_of("reduce_scatter", "", "without recvcounts", None), gather)]

        def gather() -> None:
            with driving(self):
                MPI.Intracomm.Allgather(self, own, everyone)

        run(agreed(self, check, "reduce_scatter", recvbuf, calls))
        record.end()
        return everyone.tolist()

    def _scattering(
        self,
        sendbuf: Any,
        recvbuf: Any,
        recvcounts: Sequence[int] | None,
        op: MPI.Op | str,
        options: Options,
        check: str | None,
        stream: Any,
    ) -> list[Any]:
        """The call of ``Reduce_scatter``, or without ``recvcounts`` that of ``Reduce_scatter_block``."""
        in_place, device = is_in_place(sendbuf), concerns_device(sendbuf, recvbuf)

        def calls() -> list[Any]:
            counts = None if recvcounts is None else each_rank(recvcounts)
            cuts = None if counts is None else cuts_of(counts, None, self.size)
            if not device:
                no_stream(stream)
            try:
                all_ = recvbuf if in_place else sendbuf
                if cuts is None:
                    all_ = of_blocks(all_, self.size)
                given = operand(all_, stream if on_device(all_) else None, writable=in_place)
                taken = given if in_place else operand(recvbuf, stream if on_device(recvbuf) else None)
                found = operation(op, given.dtype)
            except REFUSALS:
                if device or options not in (Options(), Options("native")) or not isinstance(op, MPI.Op):
                    raise
                return [natively(all_, counts, cuts)]
            if cuts is None:
                each = given.size // self.size if in_place else taken.size
                cuts = cuts_of([each] * self.size, None, self.size)
            mine = cuts[self.rank + 1] - cuts[self.rank]
            if given.size != cuts[-1] or (taken.size != mine and not in_place) or given.dtype != taken.dtype:
                room = "" if in_place else f" and {taken.size} of {taken.dtype}"
                raise ValueError(
                    f"expected {cuts[-1]} elements to send and room for {mine} of the same dtype, got {given.size} of "
                    f"{given.dtype}{room}"
                )
            if in_place:  # others may read there when a result is written
                taken = gpu.part(given, 0, mine)
                given = gpu.copied(given)
            if device:
                return [DeviceCall.made(self, "reduce_scatter", given, taken, found, options, cuts=cuts)]
            if options.algorithm == "native" and is_half(given.dtype) and isinstance(op, MPI.Op):
                header = Header("reduce_scatter", "native", found.name, dtype_name(given.dtype), given.size, (), cuts)
                counts = [after - before for before, after in pairwise(cuts)]
                return [Native(header, self._natively("Reduce_scatter", given, taken, counts, op))]
            part = Part(cast(np.ndarray, given))
            return [decide(self, part, found, options, collective="reduce_scatter", cuts=cuts, result=cast(Any, taken))]

        def natively(all_: Any, counts: list[int] | None, cuts: tuple[int, ...] | None) -> Native:
            """Of datatypes and operations that are the MPI library's only; or what mpi4py says of them."""
            op_name, (dtype, count) = name_of(cast(MPI.Op, op)), described(all_)
            if cuts is None:
                header = header_of("reduce_scatter_block", op_name, dtype, count)
                return Native(header, self._natively("Reduce_scatter_block", sendbuf, recvbuf, op))
            header = Header("reduce_scatter", "native", op_name, dtype, count, (), cuts)
            return Native(header, self._natively("Reduce_scatter", sendbuf, recvbuf, counts, op))

        return agreed(self, check, "reduce_scatter", recvbuf, calls)

    def Allgather(  # noqa: N802
        self, sendbuf: Any, recvbuf: Any, algorithm: str = "auto", *, check: str | None = None, stream: Any = None
    ) -> None:
        """As mpi4py's, for all that it takes, and by an algorithm of ``mpicoll.ALGORITHMS["allgather"]``."""
        there = concerns_device(sendbuf, recvbuf)
        untold = (
            not there
            and algorithm == "auto"
            and not self._is_native_best("allgather", lambda: self._gathered_bytes(recvbuf))
        )
        natively = algorithm in ("auto", "native") and not untold and not there and stream is None
        if level_of(self, check) == "off" and natively:
            return self._natively("Allgather", sendbuf, recvbuf)()

        def on_devices() -> DeviceCall:
            all_ = of_blocks(recvbuf, self.size)
            received = operand(all_, stream if on_device(all_) else None)
            each = received.size // self.size
            if is_in_place(sendbuf):
                given = gpu.part(received, each * self.rank, each * (self.rank + 1))
            else:
                given = operand(sendbuf, stream if on_device(sendbuf) else None, writable=False)
            if (each * self.size, given.size, given.dtype) != (received.size, each, received.dtype):
                raise ValueError(
                    f"expected {self.size} times what is sent, got room for {received.size} of {received.dtype}, and "
                    f"{given.size} of {given.dtype}"
                )
            cuts = tuple(range(0, received.size + 1, each)) if each else (0,) * (self.size + 1)
            return gathering_on_device(self, given, received, cuts, Options(algorithm))

        def calls() -> list[Any]:
            if there:
                return [on_devices()]
            no_stream(stream)
            if algorithm in ("auto", "native"):
                dtype, each = block(recvbuf, self.size) if is_in_place(sendbuf) else payload(sendbuf)
                space = payload(recvbuf, True)
                if (
                    not is_in_place(sendbuf)
                    and each is not None
                    and isinstance(recvbuf, np.ndarray)
                    and space[1] != each * self.size
                ):
                    raise ValueError(
                        f"expected {self.size} times what is sent, got room for {space[1]} {space[0]}, and {each} bytes"
                    )
                if untold and each is not None:
                    return [self._gathering_bytes(sendbuf, recvbuf, each)]
                header = header_of("allgather", "", f"{dtype} a rank", each)
                return [Native(header, self._natively("Allgather", sendbuf, recvbuf))]
            received = vector(of_blocks(recvbuf, self.size))
            sent = None if is_in_place(sendbuf) else vector(sendbuf, writable=False)
            count = len(received) // self.size
            if count * self.size != len(received) or (
                sent is not None and (len(sent) != count or sent.dtype != received.dtype)
            ):
                got = "nothing" if sent is None else f"{len(sent)} of {sent.dtype}"
                room = f"{len(received)} of {received.dtype}"
                raise ValueError(f"expected {self.size} times what is sent, got room for {room}, and {got}")
            cuts = tuple(range(0, len(received) + 1, count)) if count else (0,) * (self.size + 1)
            return [gathering(self, sent, received, cuts, Options(algorithm))]

        with whole(self):
            return run(agreed(self, check, "allgather", recvbuf, calls))

    def _gathered_bytes(self, recvbuf: Any) -> int | None:
        if isinstance(recvbuf, np.ndarray):
            return recvbuf.nbytes
        each = block(recvbuf, self.size)[1]
        return None if each is None else each * self.size

    def _gathering_bytes(self, sendbuf: Any, recvbuf: Any, each: int) -> Call:
        in_place = is_in_place(sendbuf)
        part = as_bytes(of_blocks(recvbuf, self.size), load=in_place, store=True)
        sent = None if in_place else as_bytes(sendbuf, load=True, store=False).flat
        cuts = tuple(each * rank for rank in range(self.size + 1))
        return gathering(self, sent, part.flat, cuts, Options())._replace(part=part)

    def Allgatherv(  # noqa: N802
        self, sendbuf: Any, recvbuf: Any, algorithm: str = "auto", *, check: str | None = None, stream: Any = None
    ) -> None:
        """As mpi4py's, for all that it takes, and by an algorithm of ``mpicoll.ALGORITHMS["allgather"]``."""
        device = concerns_device(sendbuf, recvbuf)
        if level_of(self, check) == "off" and algorithm in ("auto", "native") and not device and stream is None:
            return self._natively("Allgatherv", sendbuf, recvbuf)()
        deliver: list[tuple[Any, Any]] = []

        def calls() -> list[Any]:
            if not device:
                no_stream(stream)
                if algorithm in ("auto", "native"):
                    header = self._allgatherv_header(sendbuf, recvbuf)
                    return [Native(header, self._natively("Allgatherv", sendbuf, recvbuf))]
            received, counts, starts = blocks(recvbuf, self.size, stream if concerns_device(recvbuf) else None)
            cuts = cuts_of(counts, None, self.size)
            own = gpu.part(received, starts[self.rank], starts[self.rank] + counts[self.rank])
            sent = None
            if not is_in_place(sendbuf):
                sent = operand(sendbuf, stream if on_device(sendbuf) else None, writable=False)
                if (sent.size, sent.dtype) != (own.size, received.dtype):
                    raise ValueError(
                        f"expected {own.size} elements of {received.dtype} to send, as counts say, got {sent.size} of "
                        f"{sent.dtype}"
                    )
            if tuple(starts) == cuts[:-1]:
                result = gpu.part(received, 0, cuts[-1])
            else:
                result = gpu.empty_like(received, cuts[-1])
                sent = own if sent is None else sent
                for rank, (start, count) in enumerate(zip(starts, counts, strict=True)):
                    place = gpu.part(received, start, start + count)
                    deliver.append((place, gpu.part(result, cuts[rank], cuts[rank + 1])))
            if device:
                return [gathering_on_device(self, own if sent is None else sent, result, cuts, Options(algorithm))]
            return [gathering(self, cast(Any, sent), cast(Any, result), cuts, Options(algorithm))]

        with whole(self):
            run(agreed(self, check, "allgatherv", None, calls))
            for target, source in deliver:
                gpu.move(target, source)
            return None

    def _allgatherv_header(self, sendbuf: Any, recvbuf: Any) -> Header:
        try:
            received, counts, _ = blocks(recvbuf, self.size)
        except TooShortError:
            raise
        except REFUSALS as error:
            return header_of("allgatherv", "", str(error), None)
        size = received.dtype.itemsize
        cuts = cuts_of([count * size for count in counts], None, self.size)
        sent = None if is_in_place(sendbuf) else payload(sendbuf)
        if sent is not None and sent[1] is not None and sent[1] != cuts[self.rank + 1] - cuts[self.rank]:
            raise ValueError(f"expected {counts[self.rank] * size} bytes to send, as counts say, got {sent[1]}")
        return Header("allgatherv", "native", "", "bytes", cuts[-1], (), cuts)

    def _reduction(
        self,
        collective: str,
        sendbuf: Any,
        recvbuf: Any,
        op: MPI.Op | str,
        root: int | None,
        options: Options,
        check: str | None,
        stream: Any,
    ) -> None:
        receives = root is None or self.rank == root
        in_place = receives and is_in_place(sendbuf)
        target = recvbuf if receives else sendbuf
        on_host = not concerns_device(target, None if in_place else sendbuf)
        as_it_is = on_host and isinstance(op, MPI.Op) and not options.deterministic
        before: list[tuple[np.ndarray, np.ndarray]] = []

        def natively() -> list[Any]:
            method, ending = ("Allreduce", []) if root is None else ("Reduce", [root])
            look = payload if name_of(cast(MPI.Op, op)) == "user-defined" else described
            what, count = look(target, receives)
            if count is not None and receives and not in_place and look(sendbuf) != (what, count):
                what, count = f"{look(sendbuf)} to send and {look(target)} to receive", None
            at = None if root is None else int(index(root))
            header = header_of(collective, name_of(cast(MPI.Op, op)), what if count != 0 else "", count, at)
            return [Native(header, self._natively(method, sendbuf, recvbuf, op, *ending))]

        def on_devices() -> DeviceCall:
            given = on_stream(recvbuf if in_place else sendbuf, stream, writable=in_place)
            taken: Array | np.ndarray | None = None
            if receives:
                taken = given if in_place else operand(recvbuf, stream if on_device(recvbuf) else None)
            return DeviceCall.made(self, collective, given, taken, operation(op, given.dtype), options, root=root)

        def calls() -> list[Any]:
            if root is not None:
                check_root(self, index(root))
                if sendbuf is MPI.IN_PLACE and not receives:
                    raise ValueError(f"MPI.IN_PLACE is for the root, {root}, alone: pass what rank {self.rank} sends")
            if on_device(recvbuf if in_place else sendbuf):
                return [on_devices()]
            if not concerns_device(target):
                no_stream(stream)
            if options.algorithm == "native" and as_it_is:
                return natively()
            try:
                if not receives:
                    made = [Part(vector(sendbuf, writable=False))]
                elif on_device(recvbuf):
                    made = [staged(recvbuf, load=False, stream=stream)]
                else:
                    made = parts(recvbuf, stream, as_mpi4py=True)
                calls = [
                    decide(self, part, operation(op, part.flat.dtype), options, collective=collective, root=root)
                    for part in made
                ]
                sent = []
                if receives and not in_place and len(made) == 1:
                    sent = [vector(sendbuf, writable=False)]
            except REFUSALS:
                if options == Options() and as_it_is:
                    return natively()  # takes it, or says what is wrong
                raise
            if as_it_is and not calls:
                return natively()  # which says what is wrong
            if not in_place and len(calls) != 1:
                raise TypeError("a list of arrays is reduced in place: pass MPI.IN_PLACE")
            if sent:
                flat = calls[0].part.flat
                if len(sent[0]) != len(flat):
                    raise ValueError(f"mismatch in send count {len(sent[0])} and receive count {len(flat)}")
                if sent[0].dtype != flat.dtype:
                    raise ValueError(f"mismatch in send dtype {sent[0].dtype} and receive dtype {flat.dtype}")
            if (
                as_it_is
                and calls[0].row is None
                and len(calls) == 1
                and len(calls[0].part.flat) <= operations.MAX_COUNT
            ):
                return natively()
            if sent and isinstance(calls[0].row, Shared):
                return [calls[0]._replace(sent=sent[0])]
            before.extend((calls[0].part.flat, array) for array in sent)
            return calls

        made = agreed(self, check, collective, target, calls)
        for flat, array in before:
            flat[:] = array
        run(made)


def _again(kind: type[Comm], comm: MPI.Intracomm, deterministic: bool, check: str) -> Comm:
    """A copy of a ``Comm``, or of one of a kind of the program's own."""
    return kind(comm, deterministic=deterministic, check=check)


def _like(x: Any, flat: np.ndarray) -> np.ndarray:
    """A read-only view, of the shape of ``x`` if it has one."""
    result = _shaped(x, flat)
    result.flags.writeable = False
    return result


def _shaped(x: Any, flat: Any) -> Any:
    """A view, of the shape of ``x`` and in its order."""
    shape = shape_of(x)
    return flat.reshape(shape[::-1]).T if order_of(x) else flat.reshape(shape)


def _header(collective: str, x: np.ndarray, op: MPI.Op, root: int | None = None) -> Header:
    """Of a small call, as any other way to make it has it: what a user-defined operation takes is told by its bytes."""
    name = name_of(op)
    if name == "user-defined":
        return header_of(collective, name, "bytes", x.nbytes, root)
    return header_of(collective, name, PLAIN[x.dtype], x.size, root)


def _are_alike(x: Any, other: np.ndarray, level: str) -> bool:
    """Is it an array of as many elements of the same dtype, side by side?  Unchecked, any array: mpi4py looks."""
    return type(x) is np.ndarray and (
        level == "off" or (x.size == other.size and x.dtype == other.dtype and x.flags.c_contiguous)
    )


class _Request(MPI.Request):
    """Keeps what the MPI library is using; for good, if it is dropped before it is complete."""

    _kept: Any = None

    def __del__(self, leaked: list[Any] = []) -> None:  # noqa: B006
        if self and self._kept is not None:
            leaked.append(self._kept)


class _Prequest(MPI.Prequest):
    _kept: Any = None
    __del__ = _Request.__del__


def _keeping(name: str) -> Callable[..., MPI.Request]:
    native = getattr(MPI.Intracomm, name)

    @wraps(native)
    def call(self: Comm, *args: Any, **kwargs: Any) -> MPI.Request:
        request = native(self, *args, **kwargs)
        kept = _Prequest(request) if isinstance(request, MPI.Prequest) else _Request(request)
        kept._kept = (args, kwargs)
        return kept

    return call


for _name in [
    *("Iallreduce", "Ireduce", "Ireduce_scatter", "Ireduce_scatter_block", "Iscan", "Iexscan"),
    *("Allreduce_init", "Reduce_init", "Reduce_scatter_init", "Reduce_scatter_block_init", "Scan_init", "Exscan_init"),
]:
    setattr(Comm, _name, _keeping(_name))


def _recorded(name: str, collective: bool) -> Callable[..., Any]:
    native = getattr(Comm, name)

    @wraps(native)
    def call(self: Comm, *args: Any, **kwargs: Any) -> Any:
        state = self._state
        if state is None or get_ident() in record.inside:
            return native(self, *args, **kwargs)
        record.begin(record.Entry(name, state.name, state.world if collective else ()))
        try:
            return native(self, *args, **kwargs)
        finally:
            record.end()

    return call


for _name in [
    *("Barrier", "Gather", "Gatherv", "Scatter", "Scatterv", "Alltoall", "Alltoallv", "Alltoallw", "Scan", "Exscan"),
    *("barrier", "bcast", "gather", "scatter", "allgather", "alltoall", "reduce", "allreduce", "scan", "exscan"),
    *("Dup", "Dup_with_info", "Clone", "Split", "Split_type", "Create", "Create_cart", "Create_graph"),
    *("Create_dist_graph", "Create_dist_graph_adjacent", "Create_intercomm", "Spawn", "Spawn_multiple"),
]:
    setattr(Comm, _name, _recorded(_name, True))
for _name in [
    *("Send", "Ssend", "Rsend", "Recv", "Sendrecv", "Sendrecv_replace", "Probe", "Mprobe", "Create_group"),
    *("send", "ssend", "recv", "sendrecv", "probe", "mprobe"),
]:
    setattr(Comm, _name, _recorded(_name, False))
