"""What the CUDA driver knows of pointers; CuPy does not report it."""

import os
from contextlib import suppress
from functools import lru_cache
from typing import Any, NamedTuple

DEVICE = 2
"""CU_MEMORYTYPE_DEVICE, the kind of device memory."""


class Pointer(NamedTuple):
    """Attributes of a pointer; all 0 for host memory that CUDA did not allocate.

    ``capable`` says whether other processes can open the allocation.
    """

    kind: int = 0
    base: int = 0
    size: int = 0
    number: int = 0
    capable: int = 0


@lru_cache
def driver() -> Any:
    """The CUDA driver's library, or ``None``."""
    import ctypes  # takes milliseconds

    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None


def attributes(pointer: int) -> Pointer:
    """Ask the driver for the attributes of a pointer."""
    import ctypes

    library = driver()
    if library is None:
        return Pointer()
    values = ctypes.c_uint(), ctypes.c_uint64(), ctypes.c_uint64(), ctypes.c_uint64(), ctypes.c_int()
    # MEMORY_TYPE, RANGE_START_ADDR, RANGE_SIZE, BUFFER_ID, IS_LEGACY_CUDA_IPC_CAPABLE
    asked = (ctypes.c_int * 5)(2, 11, 12, 7, 10)
    into = (ctypes.c_void_p * 5)(*map(ctypes.addressof, values))
    error = library.cuPointerGetAttributes(5, asked, into, ctypes.c_uint64(pointer))
    return Pointer() if error else Pointer(*(value.value for value in values))


def rocm() -> bool:
    """Whether the library of AMD's GPUs is loaded in this process."""
    import ctypes

    for version in range(5, 9):
        with suppress(OSError):
            ctypes.CDLL(f"libamdhip64.so.{version}", mode=os.RTLD_NOLOAD | os.RTLD_NOW)
            return True
    return False
