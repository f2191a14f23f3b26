"""What reducing means: every operation as a function of two arrays, on the dtypes that MPI defines it for."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import frexp

import numpy as np
from mpi4py import MPI

from .buffers import PAIRS, accumulator, is_half, specification
from .memory import address

BLOCK = 1 << 15
"""Elements mixed at a time, so that what is in between stays in the cache."""

MAX_COUNT = 2**30
"""Elements handed to the MPI library at once: past 2^31 some fail, and some return the input unreduced."""


@dataclass(frozen=True, eq=False)
class Operation:
    """``combine(lower, higher, out=out)`` reduces two arrays into ``out``, which may be one of them.

    ``finish(array, p)`` is done to the result, in place, before it is rounded to the user's dtype; ``widens`` says that
    16-bit floats are carried as float32.  ``native`` is what the MPI library is given, before ``finish``.
    """

    name: str
    combine: Callable[..., object]
    native: MPI.Op
    commutes: bool = True
    widens: bool = False
    finish: Callable[[np.ndarray, int], None] | None = None
    predefined: bool = True
    reduces: bool = True

    def on_wire(self, wire: str, dtype: np.dtype) -> "Operation":
        """Return the operation with 16-bit partial results sent as such: rounded at every hop, half the bytes."""
        if wire != "16bit":
            raise ValueError(f"unknown wire {wire!r}: expected 16bit, or nothing")
        if not is_half(dtype):
            raise TypeError(f"wire='16bit' is for 16-bit floats, got {dtype}")
        return replace(self, widens=False)

    def carried(self, dtype: np.dtype) -> np.dtype:
        """In what partial results of ``dtype`` are kept and sent."""
        return accumulator(dtype) if self.widens else dtype


def _pieces(array: np.ndarray, length: int) -> Iterator[slice]:
    return (slice(start, start + length) for start in range(0, len(array), length))


def _elementwise(ufunc: np.ufunc) -> Callable[..., None]:
    def combine(lower: np.ndarray, higher: np.ndarray, out: np.ndarray) -> None:
        if len(out) == 1:  # with out=lower NumPy takes this for a running sum, and of two NaNs leaves the other one
            out[:] = ufunc(lower, higher)
        else:
            ufunc(lower, higher, out=out)

    return combine


def _product(lower: np.ndarray, higher: np.ndarray, out: np.ndarray) -> None:
    """Multiply; complex numbers by parts, since NumPy's own product rounds differently in long and in short arrays."""
    if out.dtype.kind != "c":
        return _elementwise(np.multiply)(lower, higher, out)
    for piece in _pieces(out, 1 << 13):
        a, b = lower[piece], higher[piece]
        real, imag = a.real * b.real - a.imag * b.imag, a.real * b.imag + a.imag * b.real
        out.real[piece], out.imag[piece] = real, imag
    return None


def _mean(total: np.ndarray, p: int) -> None:
    """Divide, once; for integers the nearest, to even where two are: of the sum as it is, overflow included."""
    if is_half(total.dtype):
        for piece in _pieces(total, 1 << 20):
            total[piece] = total[piece].astype(np.float32) / p
        return
    if total.dtype.kind in "fc":
        parts = total.view(total.real.dtype)  # complex division by p would make NaNs of infinities
        np.divide(parts, p, out=parts)
        return
    for piece in _pieces(total, 1 << 20):  # divmod needs memory of its own
        wide = total[piece].astype(np.uint64 if total.dtype.kind == "u" else np.int64)
        quotient, rest = np.divmod(wide, p)
        up = (rest > p - rest) | ((rest == p - rest) & (quotient % 2 == 1))
        total[piece] = quotient + up


def _nothing(lower: np.ndarray, higher: np.ndarray, out: np.ndarray) -> None:
    raise AssertionError("nothing is to be reduced")


MOVE = Operation("move", _nothing, MPI.OP_NULL, reduces=False)
"""For collectives that only move data, of whatever dtype."""

_NUMBERS, _ORDERED, _LOGICAL, _BITS = "iufc", "iuf", "biu", "iu"  # dtype kinds, as the MPI standard groups types
_TABLE: dict[str, tuple[Operation, str]] = {
    operation.name: (operation, kinds)
    for operation, kinds in [
        (Operation("sum", _elementwise(np.add), MPI.SUM, widens=True), _NUMBERS),
        (Operation("mean", _elementwise(np.add), MPI.SUM, widens=True, finish=_mean), _NUMBERS),
        (Operation("prod", _product, MPI.PROD, widens=True), _NUMBERS),
        (Operation("max", _elementwise(np.maximum), MPI.MAX), _ORDERED),
        (Operation("min", _elementwise(np.minimum), MPI.MIN), _ORDERED),
        (Operation("land", _elementwise(np.logical_and), MPI.LAND), _LOGICAL),
        (Operation("lor", _elementwise(np.logical_or), MPI.LOR), _LOGICAL),
        (Operation("lxor", _elementwise(np.logical_xor), MPI.LXOR), _LOGICAL),
        (Operation("band", _elementwise(np.bitwise_and), MPI.BAND), _BITS),
        (Operation("bor", _elementwise(np.bitwise_or), MPI.BOR), _BITS),
        (Operation("bxor", _elementwise(np.bitwise_xor), MPI.BXOR), _BITS),
    ]
}
_NAMES = {operation.native.handle: name for name, (operation, _) in _TABLE.items() if name != "mean"}
_LOCATIONS = {MPI.MAXLOC.handle: "maxloc", MPI.MINLOC.handle: "minloc"}
_NEVER = {MPI.OP_NULL.handle, MPI.REPLACE.handle, MPI.NO_OP.handle}


def name_of(op: str | MPI.Op) -> str:
    """What it is called."""
    if isinstance(op, str):
        return op
    return _NAMES.get(op.handle) or _LOCATIONS.get(op.handle, "user-defined")


def operation(op: str | MPI.Op, dtype: np.dtype) -> Operation:
    """``op`` on arrays of ``dtype``; a ``ValueError`` if it is unknown, a ``TypeError`` if MPI defines none such."""
    if isinstance(op, MPI.Op):
        name = _NAMES.get(op.handle)
        if name is None:
            return _by_mpi(op, dtype)
    elif isinstance(op, str):
        name = op
    else:
        raise TypeError(f"expected the name of an operation or an MPI.Op, got {type(op).__name__}")
    if name not in _TABLE:
        known = ", ".join(_TABLE)
        raise ValueError(f"unknown operation {op!r}: expected {known}, or an MPI.Op")
    found, kinds = _TABLE[name]
    if not ((dtype.kind in kinds and _is_numpys(dtype)) or (is_half(dtype) and "f" in kinds)):
        raise TypeError(f"{name} of {_called(dtype)} is not defined")
    return found


def _by_mpi(op: MPI.Op, dtype: np.dtype) -> Operation:
    """User-defined operations, and MAXLOC and MINLOC: the MPI library combines, we communicate."""
    if op.handle in _NEVER:
        raise ValueError("MPI.OP_NULL, MPI.REPLACE and MPI.NO_OP reduce nothing")
    located = _LOCATIONS.get(op.handle)
    if located and dtype not in PAIRS:
        raise TypeError(
            f"{located} of {_called(dtype)} is not defined: pass [x, count, MPI.DOUBLE_INT] or another pair type"
        )
    if not located and dtype not in PAIRS and (dtype.kind not in "biufc" or not _is_numpys(dtype) or is_half(dtype)):
        raise TypeError(f"a user-defined operation on {_called(dtype)} is not supported")

    def combine(lower: np.ndarray, higher: np.ndarray, out: np.ndarray) -> None:
        result = out if address(out) != address(lower) else np.empty_like(higher)
        if address(result) != address(higher):
            result[:] = higher
        for piece in _pieces(lower, MAX_COUNT):
            op.Reduce_local(specification(lower[piece]), specification(result[piece]))  # into the second
        if out is not result:
            out[:] = result

    return Operation(located or "user-defined", combine, op, op.Is_commutative(), predefined=bool(located))


def mix(out: np.ndarray, shares: list[tuple[np.ndarray, float]]) -> None:
    """Replace ``out``, which may be one of the arrays, by the sum of the weighted arrays, in this order.

    It is computed in float64 at least and rounded once, so that thousands of rounds do not shift the mean; but the mean
    of two is as good in any precision, and is computed in that of the arrays (float32 for 16-bit floats).
    """
    if out.dtype.kind == "c":  # by parts: infinities times a complex weight would be NaNs
        out, shares = out.view(out.real.dtype), [(array.view(array.real.dtype), weight) for array, weight in shares]
    halves = len(shares) <= 2 and all(frexp(weight)[0] == 0.5 for _, weight in shares)
    dtype = np.result_type(out.dtype, np.float32 if halves else np.float64)
    total, share = np.empty((2, min(len(out), BLOCK)), dtype)
    for piece in _pieces(out, BLOCK):
        size = len(out[piece])
        for n, (array, weight) in enumerate(shares):
            np.multiply(array[piece], weight, out=share[:size] if n else total[:size], dtype=dtype)
            if n:
                np.add(total[:size], share[:size], out=total[:size])
        out[piece] = total[:size]


def _is_numpys(dtype: np.dtype) -> bool:
    """Not one that a package added, such as ml_dtypes' 8-bit floats, which may have the kind of another."""
    return dtype.num < 24


def _called(dtype: np.dtype) -> str:
    kinds = {"b": "booleans", "c": "complex numbers", "f": "floats", "O": "objects"}
    if dtype in PAIRS:
        return f"pairs {dtype}"
    return kinds.get(dtype.kind, f"dtype {dtype}") if _is_numpys(dtype) else f"dtype {dtype}"
