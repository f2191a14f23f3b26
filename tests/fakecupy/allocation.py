"""Memory of devices: host memory that other processes can map, at addresses that lead nowhere."""

import mmap
import os
import weakref
from typing import NamedTuple

import numpy as np

from . import now

UNIT = 512
FIRST = 1 << 56  # no address of a process: following it is a crash


class Known(NamedTuple):
    """What the driver knows of an address."""

    base: int
    size: int
    id: int
    capable: bool


class Allocation:
    """Memory of a device, in an anonymous file that other processes can map."""

    def __init__(self, size: int, device: int, kind: str = "plain", file: int = -1) -> None:
        self.size, self.device, self.kind, self.opened = size, device, kind, int(file >= 0)
        self.id, self.handle = next(now.fake.ids), b""
        self.file = file if file >= 0 else os.memfd_create(f"fakecupy-{self.id}")
        self._close = weakref.finalize(self, os.close, self.file)
        if file < 0:
            os.ftruncate(self.file, size)
        self.memory = np.frombuffer(mmap.mmap(self.file, size), np.uint8)
        if file < 0:
            self.memory[:] = 255
        self.used, self.blocks = UNIT, 0  # the first array in a shared one is not at its start
        places = now.fake.places.setdefault((size, device), [])
        self.base = places.pop() if places else FIRST + (next(now.fake.ids) << 40)
        now.fake.allocations[self.base] = self

    def free(self) -> None:
        del now.fake.allocations[self.base]
        now.fake.places.setdefault((self.size, self.device), []).append(self.base)  # another will be there
        self._close()
