"""The fake GPUs: what tests set, and what they read."""

import itertools
import mmap
import random
import threading
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np

from . import now
from .allocation import Allocation, Known
from .arrays import ndarray
from .driver import forget_driver
from .errors import CUDARuntimeError
from .host import bytes_at
from .modules import modules
from .queues import Queue
from .runtime import runtime
from .streams import Event, Stream

MODES = ("lazy", "eager", "random")


class Fake:
    """All there is of it: what tests set, and what they read.

    ``kernels`` has for the name of each kernel what it does, ``function(code, grid, block, args)``; ``refuse`` names
    functions of the runtime and the error that they are to raise, ``{"hostRegister": "cudaErrorInvalidValue"}``.
    ``log`` says how the host has waited: ``"stream"``, ``"event"``, ``"device"``, ``"get"``, ``"pageable copy"``.
    """

    def __init__(self, mode: str, gpus: tuple[int, ...], nccl: Any, seed: int) -> None:
        if mode not in MODES:
            raise ValueError(f"mode is one of {MODES}, not {mode!r}")
        self.mode, self.gpus, self.nccl, self.random = mode, gpus, nccl, random.Random(seed)
        self.kernels: dict[str, Callable[[str, tuple, tuple, tuple], object]] = {}
        self.refuse: dict[str, str] = {}
        self.log: list[str] = []
        self.lock, self.ids, self.local = threading.RLock(), itertools.count(1), threading.local()
        self.queues: list[Queue] = []
        self.streams: dict[tuple[int, int], Queue] = {}  # by pointer; the default ones of each device, too
        self.events: weakref.WeakValueDictionary[int, Event] = weakref.WeakValueDictionary()
        self.allocations: dict[int, Allocation] = {}
        self.places: dict[tuple[int, int], list[int]] = {}
        self.freed: dict[tuple[int, int, int], list[tuple[Allocation, int]]] = {}
        self.chunks: dict[tuple[int, int], Allocation] = {}
        self.registered: dict[int, int] = {}  # addresses and sizes of host memory, by hostRegister
        self.boxes_at: dict[int, int] = {}  # and of page-locked memory that has been handed out
        self.boxes: dict[int, list[mmap.mmap]] = {}
        self.modules = modules()

    @property
    def syncs(self) -> int:
        """How often the host has waited for a stream, an event or a device."""
        return sum(self.log.count(kind) for kind in ("stream", "event", "device"))

    @property
    def pageable_copies(self) -> int:
        """How many copies were not asynchronous, as asked, because the host memory was not page-locked."""
        return self.log.count("pageable copy")

    @property
    def opened(self) -> list[int]:
        """Addresses of what is open of other processes."""
        return [a.base for a in self.allocations.values() if a.opened]

    def memory_at(self, pointer: int, nbytes: int) -> np.ndarray:
        """The bytes that a kernel finds at an address: of a device, or of page-locked host memory."""
        for a in list(self.allocations.values()):
            if a.base <= pointer <= pointer + nbytes <= a.base + a.size:
                return a.memory[pointer - a.base : pointer - a.base + nbytes]
        if not nbytes or self.is_pinned(pointer, nbytes):
            return bytes_at(pointer, nbytes)
        raise CUDARuntimeError("cudaErrorIllegalAddress")

    def allocation(self, pointer: int) -> Known:
        """The base address of an allocation, its size, its number, which no other ever has, and can it be mapped by
        other processes?"""
        for a in self.allocations.values():
            if a.base <= pointer < a.base + a.size:
                return Known(a.base, a.size, a.id, a.kind in ("plain", "raw") and not a.opened)
        return Known(0, 0, 0, False)

    def is_pinned(self, pointer: int, nbytes: int) -> bool:
        ranges = itertools.chain(self.registered.items(), self.boxes_at.items())
        return any(p <= pointer <= pointer + nbytes <= p + size for p, size in ranges)

    def queue(self, pointer: int) -> Queue:
        """Of a stream; 0 and 2 are those of the current device."""
        device = -1
        if pointer in (0, 2):
            device = runtime.getDevice()
            if (pointer, device) not in self.streams:
                self.streams[pointer, device] = Queue(device, waits_for_null=pointer == 2)
        if (pointer, device) not in self.streams:
            raise CUDARuntimeError("cudaErrorInvalidResourceHandle")
        return self.streams[pointer, device]

    def slow_write(self, x: "ndarray", values: Any, stream: "Stream") -> None:
        """What a slow kernel does: it writes to ``x`` on ``stream``, long after this has returned."""
        hidden, host = x._hidden, np.array(values, x.dtype)
        self.queue(stream.ptr).put(lambda: np.copyto(hidden, host))

    def uninstall(self) -> None:
        for queue in self.queues:
            queue.works.clear()
        now.fake = None
        forget_driver()
