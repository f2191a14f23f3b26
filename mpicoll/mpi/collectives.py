"""The collectives as functions: each is its arguments, its documentation, and one call of the engine."""

from collections.abc import Sequence
from math import prod
from numbers import Number
from typing import Any

import numpy as np
from mpi4py import MPI

from ..collective import ALLGATHER, ALLREDUCE, BCAST, GATHER, REDUCE, REDUCE_SCATTER, SCATTER
from .agreement import header_of
from .buffers import shape_of
from .compiled import compiled
from .engine import execute, together
from .progress import driving
from .request import NEW, Lengths, Raw, check_root, cuts_of, hashable, lengths_of
from .state import State


@compiled(ALLREDUCE, False, "sum")
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
        A name from ``mpicoll.ALGORITHMS["allreduce"]``; ``"native"`` for that of the MPI library, which alone decides
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
    array = x if type(x) is np.ndarray or not isinstance(x, (Number, np.generic)) else _number(x, op)
    execute(
        comm,
        ALLREDUCE,
        MPI.IN_PLACE,
        array,
        op,
        None,
        None,
        algorithm,
        deterministic,
        segments,
        wire,
        check,
        stream,
        False,
    )
    return x if array is x else array[()]


def _number(x: Any, op: str | MPI.Op) -> np.ndarray:
    """A number as an array to reduce; the mean of whole ones is none."""
    return np.array(x, float if op == "mean" and isinstance(x, int) else None)


def _is_root(comm: Any, root: Any) -> bool:
    """Whether this rank is the root; of no communicator it is, so that the engine says what is wrong."""
    return not isinstance(comm, MPI.Intracomm) or not comm or comm.rank == root


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

    Parameters
    ----------
    root
        The rank whose ``x`` receives the result.
    """
    array = _number(x, op) if isinstance(x, (Number, np.generic)) else x
    send, recv = (MPI.IN_PLACE, array) if _is_root(comm, root) else (array, None)
    execute(
        comm, REDUCE, send, recv, op, root, None, algorithm, deterministic, segments, wire, check, stream, method=False
    )
    return x if array is x else array[()]


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
    send, recv = (x, None) if _is_root(comm, root) else (None, x)
    execute(comm, BCAST, send, recv, None, root, None, algorithm, False, segments, None, check, stream, method=False)
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
    how = algorithm, deterministic, None, wire, check, stream
    return execute(comm, REDUCE_SCATTER, x, NEW, op, None, hashable(counts), *how, method=False)


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
    how = algorithm, False, None, None, check, stream
    result = execute(comm, ALLGATHER, x, NEW, None, None, hashable(counts), *how, method=False)
    return result if counts is not None else result.reshape(comm.size, *shape_of(x))


def gather(
    x: Any,
    comm: MPI.Intracomm,
    root: int = 0,
    counts: Sequence[int] | None = None,
    algorithm: str = "auto",
    *,
    check: str | None = None,
    stream: Any = None,
) -> Any:
    """The arrays of all ranks, one after another, as a new array on rank ``root``; ``None`` on the others.

    Parameters
    ----------
    x
        One array of any dtype but objects, the same on all ranks.  Without ``counts`` it has the same shape on all
        ranks, and the result one dimension more, in front.
    counts
        The numbers of elements that ranks bring, the same on all ranks; the result is flat.
    algorithm
        A name from ``mpicoll.ALGORITHMS["gather"]``, ``"native"``, ``"shared"``, or ``"auto"``.
    comm, root, check, stream
        As for ``reduce``.

    Returns
    -------
    The new array on the root, where ``x`` is, in host memory or on the GPU.  Errors are those of ``allreduce``.
    """
    recv = NEW if _is_root(comm, root) else None
    how = algorithm, False, None, None, check, stream
    result = execute(comm, GATHER, x, recv, None, root, hashable(counts), *how, method=False)
    if recv is None or counts is not None:
        return result
    return result.reshape(comm.size, *shape_of(x))


def scatter(
    x: Any,
    comm: MPI.Intracomm,
    root: int = 0,
    counts: Sequence[int] | None = None,
    algorithm: str = "auto",
    *,
    check: str | None = None,
) -> np.ndarray:
    """This rank's part of the array of rank ``root``, as a new array.

    Parameters
    ----------
    x
        The root's array, in host memory, of any dtype but objects; the other ranks' is not looked at, and may be
        ``None``.  Without ``counts`` its first dimension is the number of ranks, and rank r receives ``x[r]``.
    counts
        The numbers of elements that ranks receive, as flat arrays; matters at the root alone.
    algorithm
        A name from ``mpicoll.ALGORITHMS["scatter"]``, ``"native"``, ``"shared"``, or ``"auto"``.
    comm, root, check
        As for ``reduce``.

    Returns
    -------
    A new array in host memory.  The root first tells the others shapes and dtype, in a call of its own.

    Raises
    ------
    TypeError, ValueError
        On the root, for an array that cannot be scattered; ``MismatchError`` on the other ranks.
    """
    send: Any = None

    def calls(state: State) -> list[Raw]:
        nonlocal send
        at, told = check_root(comm, root), None
        if comm.rank == at:
            send = np.ascontiguousarray(x)
            if send.dtype.hasobject:
                raise TypeError("objects are not scattered from memory to memory: use comm.scatter, in lower case")
            if counts is None and (not send.ndim or len(send) != comm.size):
                raise ValueError(f"scatter: expected x of {comm.size} parts, one for each rank, got shape {send.shape}")
            cuts = None if counts is None else cuts_of(counts, send.size, comm.size)
            shapes = [send.shape[1:]] * comm.size if cuts is None else [(n,) for n in lengths_of(cuts)]
            told = send.dtype, shapes

        def tell() -> Any:
            with driving(state.comm):
                return state.comm.bcast(told, at)

        return [Raw(header_of("shapes of a scatter", "", "", None, at), tell)]

    dtype, shapes = together(comm, check, "scatter", None, calls)
    part = np.empty(shapes[comm.rank], dtype)
    known: Any = None
    raw: Any = None if send is None else send.reshape(-1).view(np.uint8)  # of any dtype
    if len({*shapes}) > 1:
        known = Lengths(prod(shape) * dtype.itemsize for shape in shapes)
        raw = None if raw is None else [raw, [*known]]
    execute(
        comm,
        SCATTER,
        raw,
        part.reshape(-1).view(np.uint8),
        None,
        root,
        known,
        algorithm,
        False,
        None,
        None,
        check,
        None,
    )
    return part


def ring_allreduce(x: Any, comm: MPI.Intracomm, op: str | MPI.Op = "sum") -> Any:
    """``allreduce`` by the ring algorithm: 2(p - 1) rounds, 2(p - 1)/p of ``x`` sent by each rank."""
    return allreduce(x, comm, op, "ring")
