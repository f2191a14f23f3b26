"""The kernel of ``mpi.gpu.kernel``, done by NumPy, for a GPU that is none."""

from collections.abc import Callable
from typing import Any

import numpy as np

from mpicoll.mpi.gpu import kernel
from mpicoll.mpi.operations import MOVE, operation
from mpicoll.mpi.shared import additions


def source(name: str, dtype: np.dtype, p: int, targets: int, width: int, divisor: int | None) -> str:
    """In place of the text: what it says."""
    return repr((name, dtype.name, p, targets, width, divisor))


def add(fake: Any, patch: Any, told: Callable[[int, int, int], object] = lambda targets, lo, hi: None) -> None:
    """Have the GPU do it, and tell how many arrays it writes to, and which elements."""
    patch.setattr(kernel, "source", source)
    fake.kernels[kernel.NAME] = lambda code, grid, block, args: _reduce(fake, code, args, told)


def _reduce(fake: Any, code: str, args: tuple[Any, ...], told: Callable[[int, int, int], object]) -> None:
    name, kind, p, targets, width, divisor = eval(code)
    dtype = _dtype(kind)
    *pointers, lo, hi = map(int, args)
    size = dtype.itemsize
    told(targets, lo, hi)
    assert len(pointers) == p + targets
    assert all((pointer + lo * size) % width == 0 for pointer in pointers)
    arrays = [fake.memory_at(pointer + lo * size, (hi - lo) * size).view(dtype) for pointer in pointers]
    found = MOVE if name == MOVE.name else operation(name, dtype)
    carried = found.carried(dtype)
    values = [array.astype(carried) for array in arrays[:p]]
    values += [values[0].copy() for _ in range(p + 1)]  # the total, and what is in between
    with np.errstate(all="ignore"):
        for lower, higher, into in additions(p) if p > 1 else ():
            values.append(values[0].copy())
            found.combine(values[lower], values[higher], out=values[into])
        total = values[p] if p > 1 else values[0]
        if divisor is not None:
            assert found.finish is not None
            found.finish(total, divisor)
        for array in arrays[p:]:
            array[:] = total


def _dtype(name: str) -> np.dtype:
    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)
