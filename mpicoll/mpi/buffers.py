"""What may be reduced in place: checks an array and gives it as one flat vector."""

from typing import Any

import numpy as np


def vector(x: Any) -> np.ndarray:
    """``x`` as a writable one-dimensional plain array on the same memory.

    Raises ``TypeError`` or ``ValueError``, naming what was expected, for anything but a C-contiguous, aligned, writable
    NumPy array of integers, floats (32 bits or more) or complex numbers in native byte order: never copies in secret.
    """
    if not isinstance(x, np.ndarray) or isinstance(x, np.ma.MaskedArray):
        raise TypeError(f"expected a NumPy array, got {type(x).__module__}.{type(x).__name__}")
    if x.dtype.kind not in "iufc" or x.dtype == np.float16:
        raise TypeError(
            f"expected an array of integers, floats of at least 32 bits or complex numbers, got dtype {x.dtype}"
        )
    if not x.dtype.isnative:
        raise TypeError(
            f"expected native byte order, got dtype {x.dtype.str}; convert with x.astype(x.dtype.newbyteorder('='))"
        )
    if not x.flags.carray:
        if not x.flags.c_contiguous:
            raise ValueError("expected a C-contiguous array; reduce np.ascontiguousarray(x) instead")
        if not x.flags.writeable:
            raise ValueError("expected a writable array: the result is written in place")
        raise ValueError("expected an array aligned as its dtype asks; reduce x.copy() instead")
    return np.asarray(x).reshape(-1)
