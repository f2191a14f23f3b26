"""Host memory, page-locked or not, and copies to and from it."""

import ctypes
import mmap
from typing import Any

import numpy as np

from . import now
from .allocation import UNIT
from .queues import Queue


def address(x: np.ndarray) -> int:
    return x.__array_interface__["data"][0]


def bytes_at(pointer: int, nbytes: int) -> np.ndarray:
    memory: Any = (ctypes.c_uint8 * nbytes).from_address(pointer)
    return np.frombuffer(memory, np.uint8)


def copy(target: np.ndarray, source: np.ndarray, host: np.ndarray, queue: Queue) -> None:
    """To or from ``host``: asynchronously, if that is page-locked; and then nothing but its owner keeps it."""
    pinned = now.fake.is_pinned(address(host), host.nbytes)
    if pinned and host.nbytes:
        same = np.ndarray(host.shape, host.dtype, bytes_at(address(host), host.nbytes), 0, host.strides)
        target, source = (same if x is host else x for x in (target, source))
    queue.put(lambda: np.copyto(target, source))
    if not pinned:
        now.fake.log.append("pageable copy")
        queue.run()


class _Pinned:
    """What a page-locked box of any size is."""

    ptr: int
    _memory: mmap.mmap
    _fake: Any

    def size(self) -> int:
        return len(self._memory)

    def __del__(self) -> None:
        if now is None:  # the interpreter ends
            return
        if self._fake is now.fake:  # the next one who asks gets it, copies to and from it pending or not
            self._memory[:] = b"\xff" * len(self._memory)
            now.fake.boxes.setdefault(len(self._memory), []).append(self._memory)


def alloc_pinned_memory(size: int) -> Any:
    size = -(-size // UNIT) * UNIT
    boxes = now.fake.boxes.get(size)
    memory = boxes.pop() if boxes else mmap.mmap(-1, size)
    kind: Any = type("PinnedMemoryPointer", (_Pinned, ctypes.c_uint8 * size), {})
    pointer = kind.from_buffer(memory)
    pointer.ptr, pointer._memory, pointer._fake = ctypes.addressof(pointer), memory, now.fake
    now.fake.boxes_at[pointer.ptr] = size
    return pointer
