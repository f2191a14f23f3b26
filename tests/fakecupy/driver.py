"""The CUDA driver's library, libcuda, which mpicoll asks about pointers."""

import ctypes
import sys
from typing import Any

from . import now


class Library(ctypes.CDLL):
    """libcuda, which mpicoll asks itself; all others are what they are."""

    def __new__(cls, name: Any, *args: Any, **kwargs: Any) -> Any:
        return _Driver() if name == "libcuda.so.1" else super().__new__(cls)


def forget_driver() -> None:
    """Have mpicoll, which keeps the driver it has found, look for it again."""
    if "mpicoll.mpi.gpu.driver" in sys.modules:
        sys.modules["mpicoll.mpi.gpu.driver"].driver.cache_clear()


class _Driver:
    def cuPointerGetAttributes(self, count: int, attributes: Any, data: Any, pointer: Any) -> int:  # noqa: N802
        known = now.fake.allocation(pointer.value)
        values = {2: 2 if known.id else 0, 11: known.base, 12: known.size, 7: known.id, 10: known.capable}
        for attribute, place in zip(attributes, data, strict=True):
            kind = {2: ctypes.c_uint, 10: ctypes.c_int}.get(attribute, ctypes.c_uint64)
            kind.from_address(place).value = values[attribute]
        return 0
