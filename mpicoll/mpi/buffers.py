"""What may be reduced: whatever a user passes, as one flat NumPy array on the same memory.

Arrays in the memory of a GPU are recognised here, and what is done with them is in ``mpi.gpu``.
"""

import sys
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from itertools import accumulate
from math import prod
from numbers import Integral, Number
from operator import index
from typing import Any, NamedTuple, cast

import numpy as np
from mpi4py import MPI
from mpi4py.util.dtlib import to_numpy_dtype

from .gpu import staging
from .gpu.array import Array, as_cupy, copy_in_c_order, in_device_memory, is_cupy

REFUSALS = (TypeError, ValueError, BufferError, KeyError)
"""What wrong arguments raise; the last from mpi4py, for a dtype that it does not know."""


class TooShortError(ValueError):
    """A specification goes beyond its buffer.  mpi4py does not look: it is never left to that."""


_CPU = 1  # DLPack's device type
_PAIRS = (MPI.FLOAT_INT, MPI.DOUBLE_INT, MPI.LONG_INT, MPI.TWOINT, MPI.SHORT_INT, MPI.LONG_DOUBLE_INT)
PAIRS = {to_numpy_dtype(datatype): datatype for datatype in _PAIRS}
"""The predefined (value, index) types, for MAXLOC and MINLOC, by their NumPy equivalents."""


class Part(NamedTuple):
    """Host memory to reduce in place, and what brings the result to where the user wants it, if that is elsewhere."""

    flat: np.ndarray
    deliver: Callable[[], None] | None = None


def parts(x: Any, stream: Any = None, as_mpi4py: bool = False) -> list[Part]:
    """What to reduce, one part for each dtype: an array, mpi4py's buffer specification, or a list of arrays (fused).

    Raises ``TypeError`` or ``ValueError``, naming what was expected, for anything that cannot be written in place.
    With ``as_mpi4py`` masked arrays are taken for their data, and integer arrays of no dimension for counts; without,
    they are refused.
    """
    if isinstance(x, (list, tuple)):
        if not _is_specification(x):
            return _fused(x, stream, as_mpi4py)
        if not as_mpi4py and all(hasattr(n, "shape") and not isinstance(n, Integral) for n in x[1:]):
            raise TypeError(
                "an integer array of no dimension could be a count, or one more array of a list: pass [x, int(n)], or "
                "[x, n.reshape(1)]"
            )
    if isinstance(x, np.ma.MaskedArray) and not as_mpi4py:
        raise TypeError("expected a plain array, got a masked one: reduce its data, x.data, or x.filled()")
    if on_device(x):
        return [staged(x, stream=stream)]
    no_stream(stream)
    return [Part(vector(x))]


def vector(x: Any, writable: bool = True) -> np.ndarray:
    """``x`` as a one-dimensional plain array on the same memory, in memory order; never a copy.

    Takes C- or F-contiguous NumPy arrays, exporters of DLPack (CPU tensors) and of the buffer protocol, and mpi4py's
    ``[buffer, count, datatype]`` and its short forms.  Raises ``TypeError`` or ``ValueError`` naming what was expected.
    """
    if isinstance(x, (list, tuple)):
        return _specified(message(x), writable)
    array = _contiguous(_exported(x), writable)
    _check_order(array)
    if not array.flags.aligned:
        raise ValueError("expected an array aligned as its dtype asks; reduce x.copy() instead")
    return array


def _check_order(array: np.ndarray) -> None:
    if not array.dtype.isnative:
        raise TypeError(
            f"expected native byte order, got dtype {array.dtype.str}; convert with x.astype(x.dtype.newbyteorder('='))"
        )


def _contiguous(array: np.ndarray, writable: bool) -> np.ndarray:
    """A plain one-dimensional array on the same memory, in memory order."""
    flags = array.flags
    if not flags.forc:
        raise ValueError("expected a contiguous array; reduce np.ascontiguousarray(x) instead")
    if writable and not flags.writeable:
        raise ValueError("expected a writable array: the result is written in place")
    return np.asarray(array if flags.c_contiguous else array.T).reshape(-1)


def specification(flat: np.ndarray) -> Any:
    """What mpi4py takes for it: what it cannot recognise by its dtype is named."""
    if flat.dtype in PAIRS:
        return [flat, len(flat), PAIRS[flat.dtype]]
    return flat if flat.flags.aligned else [flat.view(np.uint8), len(flat), MPI.Datatype.fromcode(flat.dtype.char)]


HALF = np.dtype(np.float16).num


def accumulator(dtype: np.dtype) -> np.dtype:
    """The dtype that sums of ``dtype`` are carried in: float32 for 16-bit floats, otherwise ``dtype`` itself."""
    return np.dtype(np.float32) if is_half(dtype) else dtype


def is_half(dtype: np.dtype) -> bool:
    """Is it a 16-bit float: float16, or ml_dtypes' bfloat16?"""
    return dtype.num == HALF or (dtype.num >= 24 and dtype.name == "bfloat16")  # a name costs 3 us


@lru_cache
def name_of(dtype: np.dtype) -> str:
    """Return the name of a dtype, equal on all ranks for equal numbers."""
    return str(PAIRS[dtype].name) if dtype in PAIRS else dtype.name


def lengths(x: Any) -> str:
    """Return the lengths of the arrays of a list, as text: what is fused must be cut in equal places on all ranks."""
    if not isinstance(x, (list, tuple)) or _is_specification(x) or len(x) < 2:
        return ""
    sizes = [str(size) for array in x if (size := getattr(array, "size", "?"))]
    return f"arrays of {', '.join(sizes)}" if len(sizes) > 1 else ""


def order_of(x: Any) -> str:
    """``"F order"`` if elements lie in memory column by column; for a list, of which arrays they do."""
    if isinstance(x, (list, tuple)):
        if _is_specification(x):
            return ""
        numbers = [str(n) for n, array in enumerate(x) if order_of(array)]
        return f"F order of {', '.join(numbers)}" if numbers and len(x) > 1 else "F order" if numbers else ""
    flags = getattr(_as_array(x), "flags", None)
    return "F order" if getattr(flags, "f_contiguous", False) and not getattr(flags, "c_contiguous", True) else ""


def shape_of(x: Any) -> tuple[int, ...]:
    """The shape of an array, whichever library it is of; ``(n,)`` for a specification of n elements."""
    if isinstance(x, (list, tuple)):
        return (operand(x, writable=False).size,)
    return tuple(np.shape(_as_array(x)))


def in_c_order(x: Any, stream: Any = None) -> Any:
    """An array row by row: itself, or a copy where it lies column by column."""
    if not order_of(x):
        return x
    return copy_in_c_order(x, stream) if on_device(x) else np.ascontiguousarray(_exported(x))


def _as_array(x: Any) -> Any:
    """NumPy's or CuPy's array on the memory of ``x``; ``x`` itself where there is none, which is refused elsewhere."""
    if isinstance(x, np.ndarray) or is_cupy(x):
        return x
    try:
        return as_cupy(x, False) if on_device(x) else _exported(x)
    except (*REFUSALS, AttributeError):
        return x


def is_in_place(sendbuf: Any) -> bool:
    """Whether a send buffer says, as in mpi4py, that the data are in the receive buffer."""
    return sendbuf is None or sendbuf is MPI.IN_PLACE


def on_device(x: Any) -> bool:
    """Is it an array in the memory of a device, or mpi4py's specification of one?"""
    if isinstance(x, (np.ndarray, int)):
        return False
    if isinstance(x, (list, tuple)):
        return len(x) > 0 and on_device(x[0]) and _is_specification(x)
    try:
        if hasattr(x, "__cuda_array_interface__"):
            return in_device_memory(x)
        return hasattr(x, "__dlpack_device__") and x.__dlpack_device__()[0] != _CPU
    except Exception:  # nothing in host memory raises: it will be refused, on all ranks
        return True


def concerns_device(*buffers: Any) -> bool:
    """Is there any such array among them, or in lists of them?  The MPI library is not to see it."""
    for x in buffers:
        if not isinstance(x, np.ndarray) and (any(map(on_device, x)) if isinstance(x, (list, tuple)) else on_device(x)):
            return True
    return False


def staged(x: Any, load: bool = True, stream: Any = None) -> Part:
    """Stage a CuPy array in host memory, all of it at once: its stream is waited for after the copy out.

    ``load=False`` leaves out the copy out, for an array that is only written.
    """
    array = on_stream(x, stream)
    host = staging.staged(array, load)
    return Part(host, partial(staging.deliver, host, array))


def operand(x: Any, stream: Any = None, writable: bool = True) -> Array | np.ndarray:
    """A device array, or whatever ``vector`` takes, where it is."""
    if on_device(x):
        return on_stream(x, stream, writable)
    no_stream(stream)
    return vector(x, writable)


def on_stream(x: Any, stream: Any = None, writable: bool = True) -> Array:
    """A device array, or what mpi4py's specification names of one, to be read and written on a stream."""
    if not isinstance(x, (list, tuple)):
        return Array(x, stream, writable)
    asked = message(x)
    whole = Array(asked.buffer, stream, writable)
    dtype = whole.dtype if asked.datatype is None else dtype_of(asked.datatype)
    start, stop = _named(asked, whole.nbytes, dtype)
    return whole.view(dtype).part(start, stop)


def no_stream(stream: Any) -> None:
    """Raise ``TypeError`` if there is one: what it is for is in host memory."""
    if stream is not None:
        raise TypeError("stream= is for arrays in the memory of a GPU: leave it out")


def _fused(arrays: Sequence[Any], stream: Any, as_mpi4py: bool) -> list[Part]:
    """Arrays of one dtype side by side in memory of ours: one message instead of many."""
    if stream is not None and not any(map(on_device, arrays)):
        no_stream(stream)
    singles = [part for array in arrays for part in parts(array, stream if on_device(array) else None, as_mpi4py)]
    by_dtype: dict[np.dtype, list[Part]] = {}
    for part in singles:
        by_dtype.setdefault(part.flat.dtype, []).append(part)
    return [group[0] if len(group) == 1 else _side_by_side(group) for group in by_dtype.values()]


def _side_by_side(group: list[Part]) -> Part:
    together = np.concatenate([part.flat for part in group])

    def deliver() -> None:
        start = 0
        for flat, onwards in group:
            flat[:] = together[start : start + len(flat)]
            start += len(flat)
            if onwards:
                onwards()

    return Part(together, deliver)


class Message(NamedTuple):
    """mpi4py's ``[buffer, count, displacement, datatype]`` or one of its short forms; ``None`` for what is left out."""

    buffer: Any
    count: Any = None
    displacement: Any = None
    datatype: MPI.Datatype | str | None = None


def message(x: Any, blocks: bool = False) -> Message:
    """Read a buffer specification as mpi4py's ``message_simple`` does, or with ``blocks`` as its ``message_vector``.

    Count and displacement may be given as a pair: a tuple, or where they are not one for each rank, a list.  Raises
    ``TypeError`` or ``ValueError`` for a list that mpi4py would not take.
    """
    if not isinstance(x, (list, tuple)):
        return Message(x)
    if not 2 <= len(x) <= 4 or not (blocks or _is_specification(x)):
        form = "[buffer, counts, displacements, datatype]" if blocks else "[buffer, count, datatype]"
        raise TypeError(f"expected an array or {form}, as mpi4py takes it, got a list of {len(x)}")
    buffer, count, *rest = x
    if isinstance(buffer, Number):
        raise TypeError("expected an array, got a list of numbers: pass a NumPy array, such as x = np.array(x)")
    datatype = rest.pop() if rest else None
    if len(x) == 2 and isinstance(count, (str, MPI.Datatype)):
        count, datatype = None, count
    displacement = rest[0] if rest else None
    if len(x) < 4 and isinstance(count, tuple if blocks else (tuple, list)):
        if len(count) != 2:
            raise ValueError(f"expected a pair (count, displacement), got {count}")
        count, displacement = count
    if not (datatype is None or isinstance(datatype, (str, MPI.Datatype))):
        raise TypeError(f"expected an MPI datatype as the last of {len(x)} in a list, got {type(datatype).__name__}")
    return Message(buffer, count, displacement, datatype)


def _is_specification(x: Sequence[Any]) -> bool:
    """Is it mpi4py's [buffer, count, datatype] or one of its short forms, not a list of arrays?"""
    if not 2 <= len(x) <= 4:
        return False
    for last in x[1:]:
        if last is None or isinstance(last, (str, MPI.Datatype)) or _is_number(last) or _is_counts(last):
            return True
    return False


def _is_counts(x: Any) -> bool:
    return isinstance(x, (tuple, list)) and all(n is None or _is_number(n) for n in x)


def _is_number(n: Any) -> bool:
    """Is it a whole number, of whatever type?  An array of integers with no dimension is one, as for mpi4py."""
    if isinstance(n, int):
        return True
    if isinstance(n, (list, tuple)) or getattr(n, "ndim", False):
        return False
    if isinstance(n, Integral):
        return True
    if not hasattr(n, "__index__"):
        return False
    try:
        return index(n) is not None
    except TypeError:
        return False


def _named(asked: Message, nbytes: int, dtype: np.dtype) -> tuple[int, int]:
    """The first element that a message of one block names, and the one after the last, of a buffer of ``nbytes``."""
    size = dtype.itemsize
    start = 0 if asked.displacement is None else index(asked.displacement)
    if asked.count is None and (nbytes % size or start * size > nbytes):
        raise ValueError(f"the buffer has {nbytes} bytes: no whole number of elements of {size} bytes from {start} on")
    stop = nbytes // size if asked.count is None else start + index(asked.count)
    if not 0 <= start <= stop <= nbytes // size:
        raise TooShortError(
            f"the buffer has {nbytes // size} elements, {asked.count} from number {start} on were asked for"
        )
    return start, stop


def _specified(asked: Message, writable: bool) -> np.ndarray:
    """What a message of one block names, in host memory."""
    if (asked.buffer is None or asked.buffer is MPI.BOTTOM) and not asked.count and asked.datatype is not None:
        return np.empty(0, dtype_of(asked.datatype))
    if asked.datatype is None:
        flat = vector(asked.buffer, writable)
        dtype = flat.dtype
    else:
        dtype = dtype_of(asked.datatype)
        flat = _contiguous(_exported(asked.buffer), writable)
    start, stop = _named(asked, flat.nbytes, dtype)
    return flat.view(np.uint8)[start * dtype.itemsize : stop * dtype.itemsize].view(dtype)


def blocks(
    x: Any, p: int, stream: Any = None, writable: bool = True
) -> tuple[np.ndarray | Array, list[int], list[int]]:
    """mpi4py's specification of a block for each of ``p`` ranks: the buffer, all counts, and all displacements.

    A count or a displacement may be one number for all, a stride; a *tuple* of two is (counts, displacements); what is
    left out is the whole buffer in blocks that are equal to one element, and one after another.
    """
    buffer, counts, displacements, datatype = message(x, blocks=True)
    flat = operand(buffer if datatype is None else [buffer, datatype], stream, writable)
    if counts is None:
        found = [flat.size // p + (rank < flat.size % p) for rank in range(p)]
    else:
        found = [index(counts)] * p if _is_number(counts) else each_rank(counts)
    if displacements is None:
        starts = [0, *accumulate(found)][: len(found)]
    elif _is_number(displacements):
        starts = [index(displacements) * rank for rank in range(len(found))]
    else:
        starts = each_rank(displacements)
    if len(starts) != len(found):
        raise ValueError(f"expected as many displacements as counts, {len(found)}, got {len(starts)}")
    end = flat.size
    if any(count and not 0 <= start <= end - count for start, count in zip(starts, found, strict=True)):
        raise TooShortError(f"counts and displacements go beyond the {flat.size} elements of the buffer")
    return flat, found, starts


def each_rank(numbers: Any) -> list[int]:
    """A sequence of whole numbers, as one of Python's own."""
    if not hasattr(numbers, "__len__"):
        raise TypeError(f"expected a sequence of whole numbers, one for each rank, got {type(numbers).__name__}")
    return [index(number) for number in numbers]


def of_blocks(x: Any, p: int) -> Any:
    """What mpi4py takes for ``p`` equal blocks, as it is for all of them: a count there is that of a block."""
    asked = message(x)
    if asked.count is None:
        return x
    return [asked.buffer, (index(asked.count) * p, asked.displacement), asked.datatype]


def entries(x: Any) -> int:
    """How many entries of its datatype, which may be a derived one, a message of one block names."""
    asked = message(x)
    if asked.count is not None:
        return index(asked.count)
    size = _derived_size(x)
    return (
        operand(x, writable=False).size
        if size is None
        else size // max(cast(MPI.Datatype, asked.datatype).Get_size(), 1)
    )


def described(x: Any, writable: bool = False) -> tuple[str, int | None]:
    """The dtype and the number of elements of a buffer that goes to the MPI library as it is; of derived types the
    number of bytes.  What is wrong with it is its dtype then: if it is the same on all ranks, mpi4py may decide."""
    try:
        flat = vector(x, writable)
        return (name_of(flat.dtype) if len(flat) else "", len(flat))
    except TooShortError:
        raise
    except Exception as error:
        size = _derived_size(x)
        return (str(error), None) if size is None else ("bytes" if size else "", size)


def _movable(x: Any, writable: bool) -> np.ndarray:
    """What ``vector`` gives, and NumPy arrays of structures, or not aligned, which may be moved though not reduced."""
    if not isinstance(x, np.ndarray):
        return vector(x, writable)
    _check_order(x)
    return _contiguous(x, writable)


def payload(x: Any, writable: bool = False) -> tuple[str, int | None]:
    """Return ``"bytes"`` and how many a buffer holds; what is wrong with it and ``None`` if that is not known."""
    if type(x) is np.ndarray and x.flags.carray and x.dtype.isnative:
        return "bytes", x.nbytes
    try:
        return "bytes", _movable(x, writable).nbytes
    except Exception:
        dtype, size = described(x, writable)
        return ("bytes", size) if size is not None else (dtype, None)


def block(x: Any, p: int, writable: bool = True) -> tuple[str, int | None]:
    """``payload`` of one of ``p`` equal blocks each of whole elements."""
    together = of_blocks(x, p)
    what, size = payload(together, writable)
    if not size:
        return what, size
    named = isinstance(x, (list, tuple)) and isinstance(x[-1], MPI.Datatype)
    element = x[-1].Get_size() if named else vector(together, writable).itemsize
    if size % (element * p):
        return f"{size // element} elements for {p} ranks", None
    return what, size // p


def as_bytes(x: Any, load: bool, store: bool) -> Part:
    """What is moved, of any dtype and datatype: the memory itself, or where that is in pieces (as of derived types) a
    copy, which is filled before, and brought back after, as asked."""
    try:
        return Part(_movable(x, store).view(np.uint8))
    except REFUSALS:
        size = _derived_size(x)
        if size is None:
            raise
    flat, itself = np.empty(size, np.uint8), MPI.COMM_SELF

    def deliver() -> None:
        itself.Sendrecv([flat, MPI.BYTE], 0, 0, x, 0, 0)

    if load:
        itself.Sendrecv(x, 0, 0, [flat, MPI.BYTE], 0, 0)
    return Part(flat, deliver if store else None)


def _derived_size(x: Any) -> int | None:
    """The bytes that a message with a datatype moves, a derived one too; ``None`` if it is no such message."""
    try:
        _, count, displacement, datatype = asked = message(x)
        if not isinstance(datatype, MPI.Datatype) or not datatype:
            return None
        if count is None:
            room = memoryview(asked.buffer).nbytes - index(displacement or 0) * datatype.extent
            count = room // datatype.extent
        return int(index(count)) * datatype.Get_size()
    except Exception:
        return None


def dtype_of(datatype: MPI.Datatype | str) -> np.dtype:
    """NumPy's equivalent of a predefined MPI type; a ``TypeError`` where there is none to reduce."""
    if isinstance(datatype, str):
        datatype = MPI.Datatype.fromcode(datatype)
    if not isinstance(datatype, MPI.Datatype):
        raise TypeError(f"expected an MPI datatype, got {type(datatype).__name__}")
    if not datatype or not datatype.is_predefined or datatype == MPI.LOGICAL:
        raise TypeError("derived MPI datatypes are reduced by the MPI library only: algorithm='native' of a Comm")
    if datatype in (MPI.BYTE, MPI.PACKED):  # no number, though its bits may be combined: by the MPI library
        return np.dtype("V1")
    dtype = to_numpy_dtype(datatype)
    if not dtype.itemsize:
        raise TypeError(f"{datatype.name} is nothing to be reduced")
    return dtype


def _exported(x: Any) -> np.ndarray:
    """A NumPy array on the memory of an object that exports it."""
    if isinstance(x, np.ndarray):
        return x
    if type(x).__module__ == "torch" and str(getattr(x, "dtype", "")) == "torch.bfloat16":
        return _torch_bfloat16(x)
    try:
        return np.asarray(memoryview(x))
    except TypeError:
        pass
    if hasattr(x, "__cuda_array_interface__"):  # which also tells of host memory: see on_device
        told = x.__cuda_array_interface__
        shape, dtype, (pointer, readonly) = told["shape"], np.dtype(told["typestr"]), told["data"]
        if not pointer and prod(shape):
            raise ValueError(f"{type(x).__module__}.{type(x).__name__} exports a null pointer: it has no memory")
        memory = memoryview(MPI.buffer.frombuffer(x, readonly))  # type: ignore[arg-type]
        return np.ndarray(shape, dtype, memory, strides=told.get("strides"))
    if hasattr(x, "__dlpack__"):
        return np.from_dlpack(x)
    raise TypeError(
        f"expected an array in host memory, got {type(x).__module__}.{type(x).__name__}: pass a NumPy array, such as "
        "x = np.asarray(x)"
    )


def _torch_bfloat16(x: Any) -> np.ndarray:
    try:
        from ml_dtypes import bfloat16
    except ImportError:
        raise TypeError("tensors of bfloat16 need the package ml_dtypes: pip install ml_dtypes") from None
    if x.requires_grad:
        raise BufferError("tensors that require gradients cannot be reduced in place: pass x.detach()")
    return np.from_dlpack(x.view(sys.modules["torch"].int16)).view(bfloat16)
