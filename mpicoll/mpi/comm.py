"""The drop-in communicator: an ``MPI.Intracomm`` whose collectives are ours where that is better."""

from collections.abc import Callable, Sequence
from functools import wraps
from math import prod
from operator import index
from sys import intern
from threading import get_ident
from typing import Any, SupportsIndex, TypeVar, cast

import numpy as np
from mpi4py import MPI

from ..collective import ALLGATHER, ALLREDUCE, BCAST, GATHER, REDUCE, REDUCE_SCATTER, SCATTER
from . import record
from .agreement import check_level, header_of, level_of
from .attach import check_comm
from .buffers import blocks, entries, is_in_place, order_of, shape_of
from .compiled import compiled
from .engine import execute, together
from .progress import driving
from .request import ONE, VECTORS, Lengths, Raw, hashable
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

    def __new__(
        cls, comm: MPI.Intracomm | None = None, *, deterministic: bool | None = None, check: str | None = None
    ) -> "Comm":
        """Make a ``Comm`` on the communicator; see the class."""
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
        self.deterministic, self.check = deterministic, intern(check)
        check_level(self.check)
        self._state = state = state_of(self)
        if state._fast is not None:
            self._fast = state._fast  # named in the compiled part, which looks for it
        return self

    def _wrapped(self, comm: C) -> "C | Comm":
        return Comm(comm, deterministic=self.deterministic, check=self.check) if comm else comm

    def Dup(self, info: MPI.Info | None = None) -> "Comm":  # noqa: N802
        """Duplicate the communicator; a ``Comm``, which keeps ``deterministic`` and ``check``."""
        return super().Dup(info)._ready(self.deterministic, self.check)

    def Dup_with_info(self, info: MPI.Info) -> "Comm":  # noqa: N802
        """Duplicate the communicator, with hints; a ``Comm``, which keeps ``deterministic`` and ``check``."""
        return super().Dup_with_info(info)._ready(self.deterministic, self.check)

    def Clone(self) -> "Comm":  # noqa: N802
        """Duplicate the communicator; a ``Comm``, which keeps ``deterministic`` and ``check``."""
        return super().Clone()._ready(self.deterministic, self.check)

    def Idup(self, info: MPI.Info | None = None) -> Any:  # noqa: N802
        """Duplicate without waiting: a plain communicator, to be made a ``Comm`` once the request is complete."""
        return MPI.Intracomm(self).Idup(info)

    def Idup_with_info(self, info: MPI.Info) -> Any:  # noqa: N802
        """Duplicate without waiting: a plain communicator, to be made a ``Comm`` once the request is complete."""
        return MPI.Intracomm(self).Idup_with_info(info)

    def Split(self, color: int = 0, key: int = 0) -> Any:  # noqa: N802
        """Split the communicator by colors; a ``Comm``, or ``MPI.COMM_NULL``."""
        return self._wrapped(super().Split(color, key))

    def Split_type(self, split_type: int, key: int = 0, info: MPI.Info = MPI.INFO_NULL) -> Any:  # noqa: N802
        """Split the communicator by kinds of place, such as nodes; a ``Comm``, or ``MPI.COMM_NULL``."""
        return self._wrapped(super().Split_type(split_type, key, info))

    def Create(self, group: MPI.Group) -> Any:  # noqa: N802
        """Make a communicator of a group of its ranks; a ``Comm``, or ``MPI.COMM_NULL``."""
        return self._wrapped(super().Create(group))

    def Create_group(self, group: MPI.Group, tag: int = 0) -> Any:  # noqa: N802
        """Make a communicator of a group, by the ranks of that group alone; a ``Comm``, or ``MPI.COMM_NULL``."""
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
        """An array in shared memory, full of zeros; see ``empty``."""
        return self._array("zeros", lambda: (shape, dtype, 0))

    def full(self, shape: int | Sequence[int], value: Any, dtype: Any = None) -> np.ndarray:
        """An array in shared memory, full of ``value``, by default of its dtype; see ``empty``."""
        return self._array("full", lambda: (shape, np.asarray(value).dtype if dtype is None else dtype, value))

    def asarray(self, x: Any, dtype: Any = None) -> np.ndarray:
        """A copy of an array in shared memory; see ``empty``."""

        def given() -> tuple[Any, Any, Any]:
            array = np.asarray(x, dtype)
            return array.shape, array.dtype, array

        return self._array("asarray", given)

    def _array(self, name: str, given: Callable[[], tuple[Any, Any, Any]]) -> np.ndarray:
        """A shared array of a shape, a dtype, and what to fill it with."""

        def calls(state: State) -> list[Raw]:
            shape, dtype, value = given()
            kind = np.dtype(dtype)
            sizes = [index(n) for n in ([shape] if isinstance(shape, SupportsIndex) else shape)]
            if kind.hasobject or not kind.itemsize or min(sizes, default=0) < 0:
                raise ValueError(
                    f"expected a shape, and a dtype of numbers or other plain data, got {sizes} and {kind}"
                )
            if value is not None:
                value = np.broadcast_to(np.asarray(value, kind), sizes)

            def make() -> np.ndarray:
                made = state.empty(prod(sizes) * kind.itemsize).view(kind).reshape(sizes)
                if value is not None:
                    made[...] = value
                return made

            return [Raw(header_of(name, "", "", None), make)]

        made: np.ndarray = together(self, None, name, None, calls)
        return made

    def allreduce_shared(
        self, x: Any, op: MPI.Op | str = MPI.SUM, *, check: str | None = None, stream: Any = None
    ) -> np.ndarray:
        """Combine the arrays of all ranks elementwise, into one result for all ranks of a node, which is returned.

        It is read-only, and of the shape of ``x``, which stays as it is, and which best lies in shared memory (see
        ``empty``): then this is the fastest there is.  It is the same memory again at the next such call but one; until
        then ranks may read on.

        ``op`` and ``check`` are those of ``mpicoll.allreduce``; 16-bit floats are added as float32.  The order of
        additions is the canonical one if the ``Comm`` is ``deterministic``.

        If ranks do not share memory, or the array is so small that native is faster, or lies on a GPU,
        each has a result of its own.
        """
        result = execute(self, ALLREDUCE, x, ONE, op, None, None, check=check, stream=stream)
        if not isinstance(result, np.ndarray):  # on a GPU
            return _shaped(x, result)
        result = result.reshape(x.shape) if type(x) is np.ndarray and x.flags.c_contiguous else _shaped(x, result)
        result.flags.writeable = False
        return result

    @compiled(ALLREDUCE, True, MPI.SUM)
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
        """Combine the buffers of all ranks elementwise; every rank receives the result.

        Takes all that mpi4py's method takes.  All ranks receive the same bits, except natively, where the MPI library
        decides.

        Parameters
        ----------
        sendbuf, recvbuf
            As in mpi4py: arrays, exporters, ``[buffer, count, datatype]``; ``MPI.IN_PLACE`` or ``None`` as ``sendbuf``.
            In place, ``recvbuf`` may be a list of arrays, which are fused.
        op
            An ``MPI.Op``, or a name as for ``mpicoll.allreduce``.
        algorithm, deterministic, segments, wire, check, stream
            As for ``mpicoll.allreduce``.  With ``"native"`` buffers go to the MPI library as they are.

        Raises
        ------
        TypeError, ValueError, BufferError, KeyError
            For arguments that cannot be used, before anything is sent, as mpi4py raises them or with what to do.
        MismatchError
            On the other ranks, or on all if they do not make the same call.
        """
        execute(
            self,
            ALLREDUCE,
            sendbuf,
            recvbuf,
            op,
            None,
            None,
            algorithm,
            deterministic,
            segments,
            wire,
            check,
            stream,
        )

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
        """Combine the buffers of all ranks elementwise; rank ``root`` receives the result.

        Takes all that mpi4py's method takes.

        Parameters
        ----------
        sendbuf, recvbuf, root
            As in mpi4py: ``recvbuf`` matters at the root alone, which may pass ``MPI.IN_PLACE`` for ``sendbuf``.
        op, algorithm, deterministic, segments, wire, check, stream
            As for ``Allreduce``; algorithms are ``mpicoll.ALGORITHMS["reduce"]``.

        Raises
        ------
        TypeError, ValueError, BufferError, KeyError
            For arguments that cannot be used, before anything is sent, as mpi4py raises them or with what to do.
        MismatchError
            On the other ranks, or on all if they do not make the same call.
        """
        recv = recvbuf if self.rank == root else None
        execute(self, REDUCE, sendbuf, recv, op, root, None, algorithm, deterministic, segments, wire, check, stream)

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
        """Copy the buffer of rank ``root`` to all ranks; takes all that mpi4py's method takes.

        Parameters
        ----------
        buf, root
            As in mpi4py: any datatype; bytes are compared, not types.
        algorithm
            A name from ``mpicoll.ALGORITHMS["bcast"]``, ``"native"``, ``"shared"``, or ``"auto"``.
        segments, check, stream
            As for ``mpicoll.allreduce``.

        Raises
        ------
        TypeError, ValueError, BufferError, KeyError
            For arguments that cannot be used, before anything is sent, as mpi4py raises them or with what to do.
        MismatchError
            On the other ranks, or on all if they do not make the same call.
        """
        send, recv = (buf, None) if self.rank == root else (None, buf)
        execute(self, BCAST, send, recv, None, root, None, algorithm, False, segments, None, check, stream)

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
        """Combine the buffers of all ranks elementwise, and give each rank an equal part of the result.

        Takes all that mpi4py's method takes.  In place it works on a copy of the input.

        Parameters
        ----------
        sendbuf, recvbuf
            As in mpi4py: p times as many elements as a rank receives; a count in a specification is that of one part.
        op, algorithm, deterministic, wire, check, stream
            As for ``Allreduce``; algorithms are ``mpicoll.ALGORITHMS["reduce_scatter"]``.

        Raises
        ------
        TypeError, ValueError, BufferError, KeyError
            For arguments that cannot be used, before anything is sent, as mpi4py raises them or with what to do.
        MismatchError
            On the other ranks, or on all if they do not make the same call.
        """
        how = algorithm, deterministic, None, wire, check, stream
        execute(self, REDUCE_SCATTER, sendbuf, recvbuf, op, None, None, *how)

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
        """Combine the buffers of all ranks elementwise, and give rank r ``recvcounts[r]`` elements of the result.

        Takes all that mpi4py's method takes.  Without ``recvcounts`` ranks first exchange how much room they have,
        in a call of its own.

        Parameters
        ----------
        sendbuf, recvbuf, recvcounts
            As in mpi4py.
        op, algorithm, deterministic, wire, check, stream
            As for ``Reduce_scatter_block``.

        Raises
        ------
        TypeError, ValueError, BufferError, KeyError
            For arguments that cannot be used, before anything is sent, as mpi4py raises them or with what to do.
        MismatchError
            On the other ranks, or on all if they do not make the same call.
        """
        counts = recvcounts
        if counts is None:
            counts = [] if is_in_place(sendbuf) else self._room(recvbuf, check)
        how = algorithm, deterministic, None, wire, check, stream
        execute(self, REDUCE_SCATTER, sendbuf, recvbuf, op, None, hashable(counts), *how)

    def _room(self, recvbuf: Any, check: str | None) -> Sequence[int]:
        """How many elements each rank has room for."""
        return self._told(lambda: entries(recvbuf), check, "recvcounts")

    def _told(self, number: Callable[[], int], check: str | None, what: str) -> list[int]:
        """A number of each rank, which they tell each other."""

        def calls(state: State) -> list[Raw]:
            own, everyone = np.full(1, number(), np.int64), np.zeros(self.size, np.int64)

            def gather() -> list[int]:
                with driving(self):
                    MPI.Intracomm.Allgather(self, own, everyone)
                return everyone.tolist()

            return [Raw(header_of(f"exchange of {what}", "", "", None), gather)]

        told: list[int] = together(self, check, f"exchange of {what}", None, calls)
        return told

    def Allgather(  # noqa: N802
        self, sendbuf: Any, recvbuf: Any, algorithm: str = "auto", *, check: str | None = None, stream: Any = None
    ) -> None:
        """Gather equal parts of all ranks, one after another, on every rank; takes all that mpi4py's method takes.

        Parameters
        ----------
        sendbuf, recvbuf
            As in mpi4py, of any datatype: room for p parts; a count in the specification of ``recvbuf`` is that of one.
            ``MPI.IN_PLACE`` or ``None`` as ``sendbuf``: this rank's part is in ``recvbuf``.
        algorithm
            A name from ``mpicoll.ALGORITHMS["allgather"]``, ``"native"``, ``"shared"``, or ``"auto"``.
        check, stream
            As for ``mpicoll.allreduce``.

        Raises
        ------
        TypeError, ValueError, BufferError, KeyError
            For arguments that cannot be used, before anything is sent, as mpi4py raises them or with what to do.
        MismatchError
            On the other ranks, or on all if they do not make the same call.
        """
        execute(self, ALLGATHER, sendbuf, recvbuf, None, None, None, algorithm, False, None, None, check, stream)

    def Allgatherv(  # noqa: N802
        self, sendbuf: Any, recvbuf: Any, algorithm: str = "auto", *, check: str | None = None, stream: Any = None
    ) -> None:
        """Gather parts of any lengths of all ranks on every rank; takes all that mpi4py's method takes.

        ``"auto"`` is the native collective.

        Parameters
        ----------
        sendbuf, recvbuf
            As in mpi4py: ``recvbuf`` is ``[buffer, counts, displacements, datatype]`` or one of its short forms.
        algorithm, check, stream
            As for ``Allgather``.

        Raises
        ------
        TypeError, ValueError, BufferError, KeyError
            For arguments that cannot be used, before anything is sent, as mpi4py raises them or with what to do.
        MismatchError
            On the other ranks, or on all if they do not make the same call.
        """
        how = algorithm, False, None, None, check, stream
        execute(self, ALLGATHER, sendbuf, recvbuf, None, None, VECTORS, *how)

    def Gather(  # noqa: N802
        self,
        sendbuf: Any,
        recvbuf: Any,
        root: int = 0,
        algorithm: str = "auto",
        *,
        check: str | None = None,
        stream: Any = None,
    ) -> None:
        """Gather equal parts of all ranks to rank ``root``; takes all that mpi4py's method takes.

        Parameters
        ----------
        sendbuf, recvbuf, root
            As in mpi4py: ``recvbuf`` matters at the root alone, which may pass ``MPI.IN_PLACE`` for ``sendbuf``.
        algorithm
            A name from ``mpicoll.ALGORITHMS["gather"]``, ``"native"``, ``"shared"``, or ``"auto"``.
        check, stream
            As for ``mpicoll.allreduce``.
        """
        recv = recvbuf if self.rank == root else None
        execute(self, GATHER, sendbuf, recv, None, root, None, algorithm, False, None, None, check, stream)

    def Gatherv(  # noqa: N802
        self,
        sendbuf: Any,
        recvbuf: Any,
        root: int = 0,
        algorithm: str = "auto",
        *,
        check: str | None = None,
        stream: Any = None,
    ) -> None:
        """Gather parts of any lengths to rank ``root``; takes all that mpi4py's method takes.

        ``"auto"`` is the native collective: the root alone knows the lengths of parts.  With an algorithm by name ranks
        first tell each other how long theirs are, in a call of its own.  Arguments are those of ``Gather``.
        """
        recv = recvbuf if self.rank == root else None
        counts = self._vectors(sendbuf, recv, root, algorithm, check)
        execute(self, GATHER, sendbuf, recv, None, root, counts, algorithm, False, None, None, check, stream)

    def Scatter(  # noqa: N802
        self,
        sendbuf: Any,
        recvbuf: Any,
        root: int = 0,
        algorithm: str = "auto",
        *,
        check: str | None = None,
        stream: Any = None,
    ) -> None:
        """Give each rank its part of what rank ``root`` has; takes all that mpi4py's method takes.

        Parameters
        ----------
        sendbuf, recvbuf, root
            As in mpi4py: ``sendbuf`` matters at the root alone, which may pass ``MPI.IN_PLACE`` for ``recvbuf``.
        algorithm
            A name from ``mpicoll.ALGORITHMS["scatter"]``, ``"native"``, ``"shared"``, or ``"auto"``.
        check, stream
            As for ``mpicoll.allreduce``.
        """
        send = sendbuf if self.rank == root else None
        execute(self, SCATTER, send, recvbuf, None, root, None, algorithm, False, None, None, check, stream)

    def Scatterv(  # noqa: N802
        self,
        sendbuf: Any,
        recvbuf: Any,
        root: int = 0,
        algorithm: str = "auto",
        *,
        check: str | None = None,
        stream: Any = None,
    ) -> None:
        """Give each rank its part, of any length, of what rank ``root`` has; takes all that mpi4py's method takes.

        See ``Gatherv`` for what ``"auto"`` is; arguments are those of ``Scatter``.
        """
        send = sendbuf if self.rank == root else None
        counts = self._vectors(recvbuf, send, root, algorithm, check)
        execute(self, SCATTER, send, recvbuf, None, root, counts, algorithm, False, None, None, check, stream)

    def _vectors(self, part: Any, whole: Any, root: int, algorithm: str, check: str | None) -> Any:
        """In place of counts: natively the root alone knows them; else all do, since ranks tell each other."""
        if algorithm in ("auto", "native"):
            return VECTORS

        def own() -> int:
            if self.rank == root and is_in_place(part):
                return blocks(whole, self.size, writable=False)[1][root]
            return entries(part)

        return Lengths(self._told(own, check, "counts"))


def _again(kind: type[Comm], comm: MPI.Intracomm, deterministic: bool, check: str) -> Comm:
    """A copy of a ``Comm``, or of one of a kind of the program's own."""
    return kind(comm, deterministic=deterministic, check=check)


def _shaped(x: Any, flat: Any) -> Any:
    """A view, of the shape of ``x`` and in its order."""
    shape = shape_of(x)
    return flat.reshape(shape[::-1]).T if order_of(x) else flat.reshape(shape)


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
    *("Barrier", "Alltoall", "Alltoallv", "Alltoallw", "Scan", "Exscan"),
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
