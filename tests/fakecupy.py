"""A CuPy without a GPU, in which a mistake in the order of streams becomes a wrong number.

``with fakecupy.installed() as fake`` (or ``fake = fakecupy.install(monkeypatch)``) puts it where ``import cupy`` finds
it: names and arguments are those of CuPy 14.  ``python tests/fakecupy.py -m mpicoll train --device gpu`` runs a module
with it, in the mode of the environment variable ``FAKECUPY_MODE``, with ``FAKECUPY_DEVICES`` devices, after
``prepare(fake)`` of the module that ``FAKECUPY_WITH`` names, if it does (which adds kernels, for example).

Streams are queues of what is to be done.  When it is done is the mode:

* ``lazy``: at the last moment, when somebody waits for it.  Who reads without waiting reads what was there before.
* ``eager``: when it is put there.  What is put there too early takes effect too early.
* ``random``: any time in between; ``seed`` says which.

Memory of devices is host memory that other processes can map; pointers to it lead nowhere, so that whoever follows one
crashes.  New and freed memory holds bytes of 255: NaN, -1.  An array that is dropped while another stream still needs
it has them too, and so has page-locked memory from the moment on that nobody refers to it.
"""

import contextlib
import ctypes
import functools
import importlib
import itertools
import mmap
import operator
import os
import random
import runpy
import struct
import sys
import threading
import time
import types
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

MODES = ("lazy", "eager", "random")
UNIT = 512
CHUNK = 1 << 20  # what arrays of up to a quarter of it share
FIRST = 1 << 56  # no address of a process: following it is a crash

ERRORS = {
    "cudaErrorInvalidValue": (1, "invalid argument"),
    "cudaErrorMemoryAllocation": (2, "out of memory"),
    "cudaErrorInsufficientDriver": (35, "CUDA driver version is insufficient for CUDA runtime version"),
    "cudaErrorInvalidDevice": (101, "invalid device ordinal"),
    "cudaErrorDeviceUninitialized": (201, "invalid device context"),
    "cudaErrorMapBufferObjectFailed": (205, "mapping of buffer object failed"),
    "cudaErrorInvalidResourceHandle": (400, "invalid resource handle"),
    "cudaErrorNotReady": (600, "device not ready"),
    "cudaErrorIllegalAddress": (700, "an illegal memory access was encountered"),
    "cudaErrorHostMemoryAlreadyRegistered": (712, "part or all of the requested memory range is already mapped"),
    "cudaErrorHostMemoryNotRegistered": (713, "pointer does not correspond to a registered memory region"),
    "cudaErrorMisalignedAddress": (716, "misaligned address"),
}


class CUDARuntimeError(RuntimeError):
    def __init__(self, name: str) -> None:
        self.status = ERRORS[name][0]
        super().__init__(f"{name}: {ERRORS[name][1]}")


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
        self.id, self.handle = next(_now.ids), b""
        self.file = file if file >= 0 else os.memfd_create(f"fakecupy-{self.id}")
        self._close = weakref.finalize(self, os.close, self.file)
        if file < 0:
            os.ftruncate(self.file, size)
        self.memory = np.frombuffer(mmap.mmap(self.file, size), np.uint8)
        if file < 0:
            self.memory[:] = 255
        self.used, self.blocks = UNIT, 0  # the first array in a shared one is not at its start
        places = _now.places.setdefault((size, device), [])
        self.base = places.pop() if places else FIRST + (next(_now.ids) << 40)
        _now.allocations[self.base] = self

    def free(self) -> None:
        del _now.allocations[self.base]
        _now.places.setdefault((self.size, self.device), []).append(self.base)  # another will be there
        self._close()


class Queue:
    """What is to be done on a stream, in order."""

    def __init__(self, device: int, waits_for_null: bool) -> None:
        self.device, self.waits_for_null = device, waits_for_null
        self.works: deque[Callable[[], object]] = deque()
        self.put_in = self.done = 0
        _now.queues.append(self)

    def put(self, work: Callable[[], object]) -> None:
        with _now.lock:
            null = _now.streams.get((0, self.device))
            first = []
            if self is null:
                first = [q for q in _now.queues if q.device == self.device and q.waits_for_null]
            elif self.waits_for_null and null is not None:
                first = [null]
            waits = [(queue, queue.put_in) for queue in first if queue.works]
            self.works.append(lambda: (*(queue.run(upto) for queue, upto in waits), work()))
            self.put_in += 1
            if _now.mode == "eager":
                self.run()
            while _now.mode == "random" and _now.random.random() < 0.5:
                queue = _now.random.choice(_now.queues)
                queue.run(queue.done + 1)

    def run(self, upto: int | None = None) -> None:
        with _now.lock:
            while self.works and (upto is None or self.done < upto):
                self.done += 1
                self.works.popleft()()


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
        self.modules = _modules()

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
            return _host(pointer, nbytes)
        raise CUDARuntimeError("cudaErrorIllegalAddress")

    def allocation(self, pointer: int) -> Known:
        """The base address of an allocation, its size, its number, which no other ever has, and can it be mapped by
        other processes?"""
        for a in self.allocations.values():
            if a.base <= pointer < a.base + a.size:
                return Known(a.base, a.size, a.id, a.kind == "plain" and not a.opened)
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
        global _now
        for queue in self.queues:
            queue.works.clear()
        _now = None
        _other_driver()


_now: Any = None  # the Fake that is installed


# ---- devices, streams, events


class Device:
    def __init__(self, device: Any = None) -> None:
        self.id = runtime.getDevice() if device is None else int(device)
        self._before: list[int] = []

    def use(self) -> None:
        runtime.setDevice(self.id)

    def __enter__(self) -> "Device":
        self._before.append(runtime.getDevice())
        self.use()
        return self

    def __exit__(self, *args: object) -> None:
        runtime.setDevice(self._before.pop())

    def __int__(self) -> int:
        return self.id

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Device) and self.id == other.id

    def __hash__(self) -> int:
        return self.id

    def synchronize(self) -> None:
        with self:
            runtime.deviceSynchronize()

    @property
    def mem_info(self) -> tuple[int, int]:
        return runtime.memGetInfo()

    @property
    def pci_bus_id(self) -> str:
        return runtime.deviceGetPCIBusId(self.id)


class Event:
    def __init__(self, block: bool = False, disable_timing: bool = False, interprocess: bool = False) -> None:
        if interprocess and not disable_timing:
            raise ValueError("Timing must be disabled for interprocess events")
        self.ptr, self._device, self._timing = next(_now.ids), runtime.getDevice(), not disable_timing
        self._mark: tuple[Queue, int] | None = None
        self._time: float | None = None
        self._asked = False
        _now.events[self.ptr] = self

    def record(self, stream: Any = None) -> None:
        queue = _now.queue((stream or get_current_stream()).ptr)
        if queue.device != self._device:
            raise CUDARuntimeError("cudaErrorInvalidResourceHandle")
        self._time, self._asked = None, False
        queue.put(self._reach)
        self._mark = queue, queue.put_in

    def _reach(self) -> None:
        self._time = time.perf_counter()

    def _run(self) -> None:
        if self._mark:
            self._mark[0].run(self._mark[1])

    def synchronize(self) -> None:
        _now.log.append("event")
        self._run()

    @property
    def done(self) -> bool:
        """Who asks again and again gets there."""
        if self._asked:
            self._run()
        self._asked = True
        return self._mark is None or self._mark[0].done >= self._mark[1]


def get_elapsed_time(start_event: Event, end_event: Event) -> float:
    if not (start_event._timing and end_event._timing):
        raise CUDARuntimeError("cudaErrorInvalidResourceHandle")
    if start_event._time is None or end_event._time is None:
        raise CUDARuntimeError("cudaErrorNotReady")
    return (end_event._time - start_event._time) * 1e3


class _BaseStream:
    ptr: int
    device_id: int

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BaseStream) and self.ptr == other.ptr

    def __hash__(self) -> int:
        return self.ptr

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.ptr

    def _checked(self) -> int:
        current = runtime.getDevice()
        if self.device_id not in (-1, current):
            raise RuntimeError(
                f"The device that the stream is created on ({self.device_id}) does not match with the current device "
                f"({current})"
            )
        return current

    def __enter__(self) -> Any:
        device = self._checked()
        local = _local()
        local.stack.append((device, self))
        local.streams[device] = self
        return self

    def __exit__(self, *args: object) -> None:
        """To the one before it in a ``with``, not to the one that was in use: as CuPy does."""
        local = _local()
        device, _ = local.stack.pop()
        local.streams[device] = next((s for d, s in reversed(local.stack) if d == device), Stream.null)

    def use(self) -> Any:
        _local().streams[self._checked()] = self
        return self

    @property
    def done(self) -> bool:
        return not _now.queue(self.ptr).works

    def synchronize(self) -> None:
        runtime.streamSynchronize(self.ptr)

    def record(self, event: Event | None = None) -> Event:
        event = Event() if event is None else event
        event.record(self)
        return event

    def wait_event(self, event: Event) -> None:
        runtime.streamWaitEvent(self.ptr, event.ptr)


class Stream(_BaseStream):
    null: "Stream"
    ptds: "Stream"
    _owner: Any = None
    _foreign: Any = None

    def __init__(
        self, null: bool = False, non_blocking: bool = False, ptds: bool = False, priority: int | None = None
    ) -> None:
        self.ptr, self.device_id = (0, -1) if null else (2, -1)
        if not (null or ptds):
            self.ptr, self.device_id, self._owner = 0x1000 + next(_now.ids), runtime.getDevice(), _now
            _now.streams[self.ptr, -1] = Queue(self.device_id, waits_for_null=not non_blocking)

    def __del__(self) -> None:
        if self._owner is not None:
            self._owner.streams.pop((self.ptr, -1), None)  # what is in its queue will be done, but nothing be put there

    @classmethod
    def from_external(cls, obj: Any) -> "Stream":
        stream = cls.__new__(cls)
        stream.ptr, stream.device_id = obj.__cuda_stream__()[1], runtime.getDevice()
        stream._foreign = obj  # which keeps it
        return stream


class ExternalStream(_BaseStream):
    def __init__(self, ptr: int, device_id: int = -1) -> None:
        warnings.warn("ExternalStream is deprecated. Use Stream.from_external()", DeprecationWarning, stacklevel=2)
        self.ptr, self.device_id = ptr, device_id


Stream.null, Stream.ptds = Stream(null=True), Stream(ptds=True)


def _local() -> Any:
    local = _now.local
    if not hasattr(local, "device"):
        local.device, local.streams, local.stack = 0, {}, []
    return local


def get_current_stream(device_id: int = -1) -> Any:
    return _local().streams.get(runtime.getDevice() if device_id == -1 else device_id, Stream.null)


# ---- the runtime


def _address(x: np.ndarray) -> int:
    return x.__array_interface__["data"][0]


def _host(pointer: int, nbytes: int) -> np.ndarray:
    memory: Any = (ctypes.c_uint8 * nbytes).from_address(pointer)
    return np.frombuffer(memory, np.uint8)


def _copy(target: np.ndarray, source: np.ndarray, host: np.ndarray, queue: Queue) -> None:
    """To or from ``host``: asynchronously, if that is page-locked; and then nothing but its owner keeps it."""
    pinned = _now.is_pinned(_address(host), host.nbytes)
    if pinned and host.nbytes:
        same = np.ndarray(host.shape, host.dtype, _host(_address(host), host.nbytes), 0, host.strides)
        target, source = (same if x is host else x for x in (target, source))
    queue.put(lambda: np.copyto(target, source))
    if not pinned:
        _now.log.append("pageable copy")
        queue.run()


class _Runtime(types.ModuleType):
    """cupy.cuda.runtime: each function first sees whether it is to fail."""

    CUDARuntimeError = CUDARuntimeError
    is_hip = False

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        if isinstance(value, types.MethodType):
            if _now is not None and name in _now.refuse:
                raise_it = CUDARuntimeError(_now.refuse[name])
                return functools.partial(_raise, raise_it)
            if _now is None or not _now.gpus:
                return functools.partial(_raise, CUDARuntimeError("cudaErrorInsufficientDriver"))
        return value

    def getDeviceCount(self) -> int:  # noqa: N802
        return len(_now.gpus)

    def getDevice(self) -> int:  # noqa: N802
        return _local().device

    def setDevice(self, device: int) -> None:  # noqa: N802
        if not 0 <= device < len(_now.gpus):
            raise CUDARuntimeError("cudaErrorInvalidDevice")
        _local().device = device

    def getDeviceProperties(self, device: int) -> dict[str, Any]:  # noqa: N802
        gpu = _now.gpus[device]
        return {
            "name": b"Fake GPU",
            "uuid": b"FAKE\x01" + bytes([gpu + 1]),  # CuPy cuts it off at the first byte of zero
            "multiProcessorCount": 4,
            "totalGlobalMem": 16 << 30,
            "major": 9,
            "minor": 0,
            "pciBusID": gpu + 1,
            "pciDeviceID": 0,
            "pciDomainID": 0,
            "computeMode": 0,
            "maxThreadsPerBlock": 1024,
        }

    def deviceGetPCIBusId(self, device: int) -> str:  # noqa: N802
        return f"0000:{_now.gpus[device] + 1:02X}:00.0"

    def deviceCanAccessPeer(self, device: int, peerDevice: int) -> int:  # noqa: N802, N803
        return int(device != peerDevice)

    def deviceSynchronize(self) -> None:  # noqa: N802
        _now.log.append("device")
        for queue in [q for q in _now.queues if q.device == self.getDevice()]:
            queue.run()

    def memGetInfo(self) -> tuple[int, int]:  # noqa: N802
        return 15 << 30, 16 << 30

    def runtimeGetVersion(self) -> int:  # noqa: N802
        return 13000

    def driverGetVersion(self) -> int:  # noqa: N802
        return 13000

    def free(self, ptr: int) -> None:
        if ptr:
            raise CUDARuntimeError("cudaErrorInvalidValue")

    def memcpyAsync(self, dst: int, src: int, size: int, kind: int, stream: int) -> None:  # noqa: N802
        queue, places = _now.queue(stream), (dst, src)
        on_device = [any(a.base <= p < a.base + a.size for a in _now.allocations.values()) for p in places]
        if kind != self.memcpyDefault and (kind in (2, 3), kind in (1, 3)) != (on_device[1], on_device[0]):
            raise CUDARuntimeError("cudaErrorInvalidValue")
        target, source = (
            _now.memory_at(p, size) if there else _host(p, size) for p, there in zip(places, on_device, strict=True)
        )
        if all(on_device):
            queue.put(lambda: np.copyto(target, source))
        else:
            _copy(target, source, source if on_device[0] else target, queue)

    def memcpy(self, dst: int, src: int, size: int, kind: int) -> None:
        self.memcpyAsync(dst, src, size, kind, 0)
        _now.queue(0).run()

    def memsetAsync(self, ptr: int, value: int, size: int, stream: int) -> None:  # noqa: N802
        memory = _now.memory_at(ptr, size)
        _now.queue(stream).put(lambda: memory.fill(value))

    def streamSynchronize(self, stream: int) -> None:  # noqa: N802
        _now.log.append("stream")
        queue = _now.queue(stream)
        if stream == 0:
            queue.put(lambda: None)  # it comes after all other streams
        queue.run()

    def streamWaitEvent(self, stream: int, event: int, flags: int = 0) -> None:  # noqa: N802
        queue, mark = _now.queue(stream), _now.events[event]._mark
        if mark:
            queue.put(lambda: mark[0].run(mark[1]))

    def eventSynchronize(self, event: int) -> None:  # noqa: N802
        _now.events[event].synchronize()

    def hostRegister(self, ptr: int, size: int, flags: int) -> None:  # noqa: N802
        if any(p < ptr + size and ptr < p + n for p, n in _now.registered.items()):
            raise CUDARuntimeError("cudaErrorHostMemoryAlreadyRegistered")
        _now.registered[ptr] = size

    def hostUnregister(self, ptr: int) -> None:  # noqa: N802
        if _now.registered.pop(ptr, None) is None:
            raise CUDARuntimeError("cudaErrorHostMemoryNotRegistered")

    def ipcGetMemHandle(self, devPtr: int) -> bytes:  # noqa: N802, N803
        base, _, _, capable = _now.allocation(devPtr)
        if not capable:
            raise CUDARuntimeError("cudaErrorInvalidValue")
        a = _now.allocations[base]  # whichever part of it was asked for
        return struct.pack("<5q", os.getpid(), a.file, a.size, a.id, _now.gpus[a.device]).ljust(64, b"\0")

    def ipcOpenMemHandle(self, handle: bytes, flags: int = 1) -> int:  # noqa: N802
        if len(handle) != 64:
            raise CUDARuntimeError("cudaErrorInvalidValue")
        process, file, size, number, _ = struct.unpack_from("<5q", handle)
        if process == os.getpid():
            raise CUDARuntimeError("cudaErrorDeviceUninitialized")
        for a in _now.allocations.values():
            if a.opened and a.handle == handle:
                a.opened += 1
                return a.base
        path = f"/proc/{process}/fd/{file}"
        try:
            if not os.readlink(path).startswith(f"/memfd:fakecupy-{number} "):
                raise OSError("another one")
            a = Allocation(size, self.getDevice(), file=os.open(path, os.O_RDWR))
        except OSError:
            raise CUDARuntimeError("cudaErrorMapBufferObjectFailed") from None
        a.handle = handle
        return a.base

    def ipcCloseMemHandle(self, devPtr: int) -> None:  # noqa: N802, N803
        a = _now.allocations.get(devPtr)
        if a is None or not a.opened:
            raise CUDARuntimeError("cudaErrorInvalidValue")
        a.opened -= 1
        if not a.opened:
            a.free()


def _raise(error: Exception, *args: object, **kwargs: object) -> None:
    raise error


runtime: Any = _Runtime("cupy.cuda.runtime")
for _kind, _name in enumerate(("HostToHost", "HostToDevice", "DeviceToHost", "DeviceToDevice", "Default")):
    setattr(runtime, f"memcpy{_name}", _kind)
runtime.cudaIpcMemLazyEnablePeerAccess = 1


# ---- memory


class PooledMemory:
    """A block; its memory is handed out again when it is dropped, to arrays of the same stream."""

    def __init__(self, allocation: Allocation, offset: int, size: int, stream: int) -> None:
        self.size, self.device_id, self.ptr = size, allocation.device, allocation.base + offset
        self._allocation, self._offset, self._stream, self._fake = allocation, offset, stream, _now
        allocation.blocks += 1

    def __del__(self) -> None:
        if self._fake is not _now or _now is None:
            return
        a, start = self._allocation, self._offset
        a.blocks -= 1
        if a.kind == "plain":
            _now.freed.setdefault((self.device_id, self._stream, self.size), []).append((a, start))
        elif a.blocks == 0:
            a.free()
        queue = _now.streams.get((self._stream, -1)) or _now.streams.get((self._stream, self.device_id))
        if queue:
            queue.put(lambda: a.memory[start : start + self.size].fill(255))


class MemoryPointer:
    def __init__(self, mem: Any, offset: int) -> None:
        self.mem, self.ptr = mem, (mem.ptr if mem else 0) + offset
        self.device_id = mem.device_id if mem else runtime.getDevice()

    def __add__(self, offset: int) -> "MemoryPointer":
        return MemoryPointer(self.mem, self.ptr - (self.mem.ptr if self.mem else 0) + offset)

    @property
    def device(self) -> Device:
        return Device(self.device_id)


class MemoryPool:
    def malloc(self, size: int) -> MemoryPointer:
        if not size:
            return MemoryPointer(None, 0)
        size, device, stream = -(-size // UNIT) * UNIT, runtime.getDevice(), get_current_stream().ptr
        _now.queue(stream)  # which must be there
        freed = _now.freed.get((device, stream, size))
        if freed:
            allocation, start = freed.pop()
            return MemoryPointer(PooledMemory(allocation, start, size, stream), 0)
        if size > CHUNK // 4:
            return MemoryPointer(PooledMemory(Allocation(size, device), 0, size, stream), 0)
        chunk = _now.chunks.get((device, stream))
        if chunk is None or chunk.used + size > chunk.size:
            chunk = _now.chunks[device, stream] = Allocation(CHUNK, device)
        chunk.used += size
        return MemoryPointer(PooledMemory(chunk, chunk.used - size, size, stream), 0)

    def free_all_blocks(self, stream: Any = None) -> None:
        for device in range(len(_now.gpus)):  # as freeing does
            for queue in [q for q in _now.queues if q.device == device]:
                queue.run()
        _now.freed.clear()
        _now.chunks = {key: chunk for key, chunk in _now.chunks.items() if chunk.blocks}
        for a in [a for a in _now.allocations.values() if not (a.blocks or a.opened)]:
            a.free()


_pool = MemoryPool()


def _not_capable(kind: str, size: int) -> MemoryPointer:
    size = -(-max(size, 1) // UNIT) * UNIT
    return MemoryPointer(
        PooledMemory(Allocation(size, runtime.getDevice(), kind), 0, size, get_current_stream().ptr), 0
    )


malloc_managed = functools.partial(_not_capable, "managed")
malloc_async = functools.partial(_not_capable, "async")


def alloc(size: int) -> MemoryPointer:
    return getattr(_local(), "allocator", _pool.malloc)(size)


def set_allocator(allocator: Any = _pool.malloc) -> None:
    _local().allocator = allocator or malloc_managed


@contextlib.contextmanager
def using_allocator(allocator: Any = None) -> Iterator[None]:
    before = getattr(_local(), "allocator", _pool.malloc)
    set_allocator(allocator)
    try:
        yield
    finally:
        set_allocator(before)


class _Pinned:
    """What a page-locked box of any size is."""

    ptr: int
    _memory: mmap.mmap
    _fake: Fake

    def size(self) -> int:
        return len(self._memory)

    def __del__(self) -> None:
        if self._fake is _now:  # the next one who asks gets it, copies to and from it pending or not
            self._memory[:] = b"\xff" * len(self._memory)
            _now.boxes.setdefault(len(self._memory), []).append(self._memory)


def alloc_pinned_memory(size: int) -> Any:
    size = -(-size // UNIT) * UNIT
    boxes = _now.boxes.get(size)
    memory = boxes.pop() if boxes else mmap.mmap(-1, size)
    kind: Any = type("PinnedMemoryPointer", (_Pinned, ctypes.c_uint8 * size), {})
    pointer = kind.from_buffer(memory)
    pointer.ptr, pointer._memory, pointer._fake = ctypes.addressof(pointer), memory, _now
    _now.boxes_at[pointer.ptr] = size
    return pointer


# ---- arrays

# What NumPy has and CuPy has not.
ABSENT = {
    *("asmatrix", "block", "bmat", "busday_count", "busday_offset", "busdaycalendar", "bytes_", "character"),
    *("clongdouble", "complex256", "datetime64", "datetime_as_string", "datetime_data", "einsum_path", "errstate"),
    *("flexible", "float128", "frompyfunc", "fromregex", "geomspace", "get_include", "getbufsize", "geterr"),
    *("geterrcall", "histogram_bin_edges", "info", "insert", "is_busday", "isnat", "longdouble", "matrix", "matvec"),
    *("memmap", "nanpercentile", "nanquantile", "ndenumerate", "nditer", "nested_iters", "object_", "polyder"),
    *("polydiv", "polyint", "recarray", "record", "setbufsize", "seterr", "seterrcall", "show_runtime", "spacing"),
    *("str_", "test", "timedelta64", "unstack", "vecdot", "vecmat", "void"),
}
LACKING = {"packbits": "axis", "unpackbits": "axis count", "partition": "kind order"}  # arguments of what it has
VIEWS = {
    *("reshape", "ravel", "transpose", "squeeze", "swapaxes", "moveaxis", "broadcast_to", "expand_dims", "atleast_1d"),
    *("atleast_2d", "split", "array_split", "hsplit", "vsplit", "diagonal", "real", "imag", "flip", "view"),
}
# What needs no values, and what needs them to know the shape of the result, and so waits.
ABOUT = {"shape", "ndim", "size", "may_share_memory", "shares_memory", "result_type", "can_cast", "iscomplexobj"}
WAITING = {"nonzero", "flatnonzero", "argwhere", "unique", "compress", "extract", "isscalar", "union1d", "setdiff1d"}
METHODS = [
    *("all", "any", "argmax", "argmin", "argsort", "clip", "conj", "cumsum", "dot", "flatten", "max", "mean", "min"),
    *("nonzero", "prod", "repeat", "round", "std", "sum", "take", "trace", "var", "reshape", "ravel", "transpose"),
    *("squeeze", "swapaxes", "diagonal", "view"),
]


class Flags:
    """No ``writeable``, and no ``aligned``: CuPy's have none."""

    def __init__(self, flags: Any, owndata: bool) -> None:
        self.c_contiguous, self.f_contiguous, self.owndata = flags.c_contiguous, flags.f_contiguous, owndata
        self.forc, self.fnc = flags.forc, flags.fnc

    def __getitem__(self, name: str) -> bool:
        return getattr(self, name.lower())


class ndarray(np.lib.mixins.NDArrayOperatorsMixin):  # noqa: N801
    __array_priority__ = 100

    def __init__(
        self, shape: Any, dtype: Any = float, memptr: Any = None, strides: Any = None, order: Any = "C"
    ) -> None:
        template = np.broadcast_to(np.empty((), dtype), shape)
        self.data = alloc(template.nbytes) if memptr is None else memptr
        self.base: ndarray | None = None
        memory = _now.memory_at(self.data.ptr, template.nbytes) if template.nbytes else np.empty(0, np.uint8)
        self._hidden = np.ndarray(template.shape, template.dtype, memory, 0, strides, order)

    def _like(self, hidden: np.ndarray) -> "ndarray":
        """A view."""
        view = object.__new__(type(self))
        start = _address(hidden) - _address(self._hidden)
        view.data = MemoryPointer(self.data.mem, self.data.ptr - (self.data.mem.ptr if self.data.mem else 0) + start)
        view.base, view._hidden = self if self.base is None else self.base, hidden
        return view

    dtype = property(lambda self: self._hidden.dtype)
    shape = property(lambda self: self._hidden.shape)
    size = property(lambda self: self._hidden.size)
    nbytes = property(lambda self: self._hidden.nbytes)
    itemsize = property(lambda self: self._hidden.itemsize)
    ndim = property(lambda self: self._hidden.ndim)
    strides = property(lambda self: self._hidden.strides)
    flags = property(lambda self: Flags(self._hidden.flags, self.base is None))
    device = property(lambda self: Device(self.data.device_id))
    T = property(lambda self: self._like(self._hidden.T))

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {
            "shape": self.shape,
            "typestr": self.dtype.str,
            "descr": self.dtype.descr,
            "strides": None if self.flags.c_contiguous else self.strides,
            "data": (self.data.ptr, False),
            "stream": get_current_stream().ptr or 1,
            "version": 3,
        }

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, self.device.id

    def __dlpack__(self, **kwargs: object) -> None:
        raise BufferError("a consumer would follow a pointer to a device")

    def __array__(self, dtype: Any = None, copy: Any = None) -> None:
        raise TypeError(
            "Implicit conversion to a NumPy array is not allowed. Please use `.get()` to construct a NumPy array "
            "explicitly."
        )

    def __reduce__(self) -> Any:
        return array, (self.get(),)

    def __len__(self) -> int:
        return len(self._hidden)

    def __repr__(self) -> str:
        return repr(self.get())

    def __iter__(self) -> Iterator["ndarray"]:
        return (self[n] for n in range(len(self)))

    # reading, which waits

    def get(self, stream: Any = None, order: str = "C", out: Any = None, blocking: bool = True) -> np.ndarray:
        if out is not None:
            if not isinstance(out, np.ndarray):
                raise TypeError("Only numpy.ndarray can be obtained from cupy.ndarray")
            if self.dtype != out.dtype:
                raise TypeError(f"{self.dtype} array cannot be obtained to {out.dtype} array")
            if self.shape != out.shape:
                raise ValueError(f"Shape mismatch. Expected shape: {self.shape}, actual shape: {out.shape}")
            if not out.flags.forc:
                raise RuntimeError("`out` cannot be specified when copying to non-contiguous ndarray")
        with self.device:
            queue = _now.queue((stream or get_current_stream()).ptr)
            host = np.empty(self.shape, self.dtype, "F" if order == "F" else "C") if out is None else out
            if blocking:
                _now.log.append("get")
                hidden = self._hidden
                queue.put(lambda: np.copyto(host, hidden))
                queue.run()
            else:
                _copy(host, self._hidden, host, queue)
        return host

    def set(self, arr: np.ndarray, stream: Any = None) -> None:
        if not isinstance(arr, np.ndarray):
            raise TypeError("Only numpy.ndarray can be set to cupy.ndarray")
        if self.dtype != arr.dtype:
            raise TypeError(f"{arr.dtype} array cannot be set to {self.dtype} array")
        if self.shape != arr.shape:
            raise ValueError(f"Shape mismatch. Old shape: {self.shape}, new shape: {arr.shape}")
        if not self.flags.forc:
            raise RuntimeError("Cannot set to non-contiguous array")
        host = np.ascontiguousarray(arr) if self.flags.c_contiguous else np.asfortranarray(arr)
        with self.device:
            queue = _now.queue((stream or get_current_stream()).ptr)
            _copy(self._hidden, host, host, queue)

    def item(self, *args: Any) -> Any:
        return self.get().item(*args)

    def tolist(self) -> Any:
        return self.get().tolist()

    def __bool__(self) -> bool:
        return bool(self.get())

    def __int__(self) -> int:
        return int(self.get())

    def __float__(self) -> float:
        return float(self.get())

    def __complex__(self) -> complex:
        return complex(self.get())

    def __index__(self) -> int:
        return operator.index(self.get()[()])

    # all else is put on the current stream

    def __getitem__(self, key: Any) -> "ndarray":
        keys = key if isinstance(key, tuple) else (key,)
        if all(k is None or k is ... or isinstance(k, (int, np.integer, slice)) for k in keys):
            return self._like(self._hidden[(*keys, ...) if ... not in keys else keys])
        masks = [k for k in keys if isinstance(k, (np.ndarray, ndarray)) and k.dtype == np.bool_]
        return _call(operator.getitem, (self, key), {}, waits=bool(masks), mixed=True)

    def __setitem__(self, key: Any, value: Any) -> None:
        if isinstance(value, np.ndarray) and value.ndim:
            raise ValueError("non-scalar numpy.ndarray cannot be used for fill")
        keys = key if isinstance(key, tuple) else (key,)
        if isinstance(value, ndarray) and not any(isinstance(k, (list, np.ndarray, ndarray)) for k in keys):
            _call(np.copyto, (self[key], value, "unsafe"), {})
        else:
            _call(operator.setitem, (self, key, value), {}, mixed=True)

    def fill(self, value: Any) -> None:
        self[...] = value

    def astype(
        self, dtype: Any, order: str = "K", casting: Any = None, subok: Any = None, copy: bool = True
    ) -> "ndarray":
        if not copy and self.dtype == np.dtype(dtype):
            return self
        return _call(lambda hidden: hidden.astype(dtype, order), (self,), {})

    def copy(self, order: str = "C") -> "ndarray":
        return _call(lambda hidden: hidden.copy(order), (self,), {})

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> Any:
        if ufunc.__name__ in ABSENT or method not in ("__call__", "reduce", "outer", "at"):
            return NotImplemented
        if "where" in kwargs:
            raise TypeError(f"Wrong arguments { ({'where': kwargs['where']}) }")
        return _call(getattr(ufunc, method), inputs, kwargs)

    def __array_function__(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        try:
            path = func.__module__.split(".")[1:]
            function = getattr(functools.reduce(getattr, path, _now.modules["cupy"]), func.__name__)
        except AttributeError:
            return NotImplemented
        return function(*args, **kwargs) if all(issubclass(t, (ndarray, np.ndarray)) for t in types) else NotImplemented


def _method(name: str) -> Callable[..., Any]:
    def function(x: np.ndarray, *args: Any, **kwargs: Any) -> Any:
        return getattr(x, name)(*args, **kwargs)

    return lambda self, *args, **kwargs: _call(function, (self, *args), kwargs, name)


for _name in METHODS:
    setattr(ndarray, _name, _method(_name))


def _replaced(x: Any, kind: type, how: Callable[[Any], Any]) -> Any:
    """Arguments, with all arrays of a kind replaced."""
    if isinstance(x, kind):
        return how(x)
    if type(x) in (list, tuple):
        return type(x)(_replaced(element, kind, how) for element in x)
    return {key: _replaced(value, kind, how) for key, value in x.items()} if type(x) is dict else x


def _refuse(x: np.ndarray) -> None:
    raise TypeError(f"Unsupported type {type(x)}")


def _on_current_device(x: ndarray) -> None:
    if x.device.id != runtime.getDevice():
        raise ValueError(
            f"Array device must be same as the current device: array device = {x.device.id} while current = "
            f"{runtime.getDevice()}"
        )
    if x.size and x.data.ptr % min(x.dtype.itemsize or 1, 8):
        raise CUDARuntimeError("cudaErrorMisalignedAddress")  # later, of the kernel


def _call(
    function: Any, args: Any, kwargs: dict[str, Any], name: str = "", waits: bool = False, mixed: bool = False
) -> Any:
    """Have a function of NumPy's computed when the current stream gets there; ``mixed``: it takes host arrays, too."""
    name = name or getattr(function, "__name__", "")
    out = kwargs.pop("out", None)
    out = out[0] if isinstance(out, tuple) else out
    _replaced([args, kwargs, out] if not mixed else out, np.ndarray, _refuse)
    _replaced([args, kwargs, out], ndarray, _on_current_device)
    given = args
    # From here on there is no reference to the arrays: who drops them gives their memory back, whatever is pending.
    args, kwargs = _replaced(_replaced((args, kwargs), np.ndarray, np.copy), ndarray, lambda x: x._hidden)
    if out is not None:
        kwargs["out"] = out._hidden

    def compute(args: Any, kwargs: Any) -> Any:
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a GPU says nothing
            return function(*args, **kwargs)

    if name in ABOUT:
        return compute(args, kwargs)
    if name in VIEWS:
        views = _views(compute(args, kwargs), given[0])
        if views is not None:
            return views
    queue = _now.queue(get_current_stream().ptr)
    if waits or name in WAITING:
        _now.log.append("get")
        queue.run()
        found = compute(args, kwargs)
    else:
        found = compute(*_replaced((args, kwargs), np.ndarray, np.zeros_like))  # only to see what comes of it
    if found is None or out is not None:
        queue.put(lambda: compute(args, kwargs))
        return out
    many = type(found) in (tuple, list)
    made = [_template(np.asarray(one)) for one in (found if many else [found])]
    targets = [x._hidden for x in made]

    def work() -> None:
        results = compute(args, kwargs)
        for target, result in zip(targets, results if many else [results], strict=True):
            np.copyto(target, result)

    queue.put(work)
    return type(found)(made) if many else made[0]


def _views(found: Any, of: Any) -> Any:
    """What NumPy has found, if it is in the same memory."""
    each = found if type(found) in (tuple, list) else [found]
    if not isinstance(of, ndarray) or not all(not one.size or np.may_share_memory(one, of._hidden) for one in each):
        return None
    return type(found)(map(of._like, each)) if each is found else of._like(found)


def _template(x: np.ndarray) -> ndarray:
    """An array of the same shape, whose elements lie in memory in the same order."""
    return ndarray(x.shape, x.dtype, order="F" if x.flags.fnc else "C")


# ---- the modules


class _Functions(types.ModuleType):
    """What NumPy has, by its name, where CuPy has it too."""

    def __init__(self, name: str, numpy: Any) -> None:
        super().__init__(name)
        self._numpy = numpy

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ABSENT or not hasattr(self._numpy, name):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        found = getattr(self._numpy, name)
        if isinstance(found, types.ModuleType):
            raise AttributeError(f"nobody has needed {self.__name__}.{name} so far: it is not here")
        if isinstance(found, type) or not callable(found):
            return found

        def function(*args: Any, **kwargs: Any) -> Any:
            for argument in LACKING.get(name, "").split():
                if argument in kwargs:
                    raise TypeError(f"{name}() got an unexpected keyword argument {argument!r}")
            return _call(found, args, kwargs, name)

        return function


def empty(shape: Any, dtype: Any = float, order: str = "C") -> ndarray:
    return ndarray(shape, dtype, order=order)


def empty_like(prototype: Any, dtype: Any = None, order: str = "K", subok: Any = None, shape: Any = None) -> ndarray:
    fortran = order == "F" or (order in "KA" and prototype.flags.fnc)
    shape = prototype.shape if shape is None else shape
    return ndarray(shape, prototype.dtype if dtype is None else dtype, order="F" if fortran else "C")


def array(
    obj: Any, dtype: Any = None, copy: bool = True, order: Any = "K", subok: bool = False, ndmin: int = 0
) -> ndarray:
    if hasattr(obj, "__cuda_array_interface__") and not isinstance(obj, ndarray):
        obj = _adopted(obj)
    if isinstance(obj, ndarray):
        return obj.astype(obj.dtype if dtype is None else dtype, order, copy=copy)
    host = np.array(obj, dtype, order=order, ndmin=ndmin)  # a copy: what becomes of the original is of no account
    made = _template(host)
    hidden = made._hidden
    _now.queue(get_current_stream().ptr).put(lambda: np.copyto(hidden, host))
    return made


class _Unowned:
    """Memory that another library's array keeps."""

    def __init__(self, owner: Any, pointer: int) -> None:
        self.owner, self.ptr, self.device_id = owner, pointer, runtime.getDevice()


def _adopted(x: Any) -> ndarray:
    """A view of another library's array, whose stream is waited for."""
    told = x.__cuda_array_interface__
    if told.get("stream") is not None:
        _now.log.append("stream")
        _now.queue(0 if told["stream"] == 1 else told["stream"]).run()
    memory = MemoryPointer(_Unowned(x, told["data"][0]), 0)
    return ndarray(told["shape"], np.dtype(told["typestr"]), memory, told.get("strides"))


def asarray(a: Any, dtype: Any = None, order: str = "K", *, blocking: bool = False) -> ndarray:
    return array(a, dtype, False, order)


def ascontiguousarray(a: Any, dtype: Any = None) -> ndarray:
    made = asarray(a, dtype)
    return made if made.flags.c_contiguous else made.copy("C")


def asnumpy(a: Any, stream: Any = None, order: Any = "C", out: Any = None, *, blocking: bool = True) -> np.ndarray:
    return a.get(stream, order, out, blocking) if isinstance(a, ndarray) else np.asarray(a, order=order)


def from_dlpack(x: Any, **kwargs: Any) -> ndarray:
    if not isinstance(x, ndarray):
        raise TypeError("CPU arrays cannot be directly imported to CuPy. Use `cupy.array(numpy.from_dlpack(input))`")
    return x._like(x._hidden)


def copyto(dst: ndarray, src: Any, casting: str = "same_kind", where: Any = None) -> None:
    if isinstance(src, np.ndarray) and src.ndim:
        raise ValueError("non-scalar numpy.ndarray cannot be used for copyto")
    _call(np.copyto, (dst, src, casting), {} if where is None else {"where": where}, mixed=True)


class _Sparse:
    """What SciPy computes of its like, when the stream gets there.  The host waits to know how many values there are,
    and whether a place is there twice."""

    format: str

    def __init__(self, arg1: Any, shape: Any, canonical: bool | None = None) -> None:
        self.data, self.indices, self.indptr = arg1
        self.shape, self._canonical, self.dtype, self.nnz = tuple(shape), canonical, self.data.dtype, self.data.size

    @property
    def has_canonical_format(self) -> bool:
        if self._canonical is None:
            self._canonical = bool(self._computed(lambda matrix: np.array(matrix.has_canonical_format)))
        return self._canonical

    def sum_duplicates(self) -> None:
        if not self.has_canonical_format:
            self.data, self.indices, self.indptr = self._computed(lambda matrix: _summed(matrix.copy()), waits=True)
            self.nnz, self._canonical = self.data.size, True

    def __matmul__(self, other: Any) -> Any:
        if not isinstance(other, ndarray):
            return NotImplemented
        if other.dtype != self.dtype:
            raise ValueError(f"products are of one dtype here, not {self.dtype} and {other.dtype}")
        self.sum_duplicates()
        return self._computed(lambda matrix, dense: np.asfortranarray(matrix @ dense), other)

    def _computed(self, how: Callable[..., Any], *args: ndarray, waits: bool = False) -> Any:
        from scipy import sparse

        kind, shape = getattr(sparse, f"{self.format}_array"), self.shape

        def function(data: np.ndarray, indices: np.ndarray, indptr: np.ndarray, *args: np.ndarray) -> Any:
            if min(indices.min(initial=0), indptr.min()) < 0:
                raise RuntimeError("a sparse matrix was looked at before it was there")
            return how(kind((data, indices, indptr), shape=shape), *args)

        return _call(function, (self.data, self.indices, self.indptr, *args), {}, waits=waits)


def _parts(matrix: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return matrix.data, matrix.indices, matrix.indptr


def _summed(matrix: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    matrix.sum_duplicates()
    return _parts(matrix)


class csc_matrix(_Sparse):  # noqa: N801
    format = "csc"


class csr_matrix(_Sparse):  # noqa: N801
    format = "csr"

    def __init__(self, arg1: Any, shape: Any = None, dtype: Any = None, copy: bool = False) -> None:
        if not all(isinstance(x, ndarray) and x.ndim == 1 for x in arg1):
            raise ValueError("data, indices, and indptr must be 1-D cupy arrays")
        data, *indices = arg1
        if data.dtype.char not in "?fdFD":
            raise ValueError("Only bool, float32, float64, complex64 and complex128 are supported")
        if indices[1][-1].get() > data.size:
            raise ValueError("last index pointer exceeds the size of data/indices")
        super().__init__((data, *(x.astype(np.int32) for x in indices)), shape)

    @property
    def T(self) -> csc_matrix:  # noqa: N802
        return csc_matrix((self.data, self.indices, self.indptr), self.shape[::-1], self._canonical)

    def __getitem__(self, rows: Any) -> "csr_matrix":
        """Of rows in a slice, or an array."""
        if isinstance(rows, slice):
            rows = array(np.arange(*rows.indices(self.shape[0])))
        made = object.__new__(csr_matrix)
        parts = self._computed(lambda matrix, rows: _parts(matrix[rows]), rows, waits=True)
        _Sparse.__init__(made, parts, (rows.size, self.shape[1]), self._canonical)
        return made


class RawKernel:
    """Compiles nothing: what it does is what ``Fake.kernels`` has for its name."""

    def __init__(
        self,
        code: str,
        name: str,
        options: tuple[str, ...] = (),
        backend: str = "nvrtc",
        translate_cucomplex: bool = False,
        *,
        enable_cooperative_groups: bool = False,
        jitify: bool = False,
    ) -> None:
        if not isinstance(options, tuple):
            raise TypeError("Argument 'options' has incorrect type (expected tuple)")
        self.code, self.name, self.options = code, name, options

    def compile(self, log_stream: Any = None) -> None:
        """Does nothing."""

    def __call__(self, grid: tuple, block: tuple, args: tuple, *, shared_mem: int = 0, stream: Any = None) -> None:
        if self.name not in _now.kernels:
            raise KeyError(f"no test has said what the kernel {self.name!r} does")
        if not (isinstance(grid, tuple) and isinstance(block, tuple)):
            raise TypeError("grid and block are tuples")
        if min(*grid, *block, 1) < 1 or np.prod(block) > 1024:
            raise CUDARuntimeError("cudaErrorInvalidValue")
        for x in args:
            if not isinstance(x, (int, float, complex, bool, np.generic, ndarray)):
                raise TypeError(f"Unsupported type {type(x)}")
        numbers = tuple(x.data.ptr if isinstance(x, ndarray) else x for x in args)
        function, code = _now.kernels[self.name], self.code
        _now.queue((stream or get_current_stream()).ptr).put(lambda: function(code, grid, block, numbers))


# ---- NCCL, by MPI


class NcclError(RuntimeError):
    def __init__(self, status: int) -> None:
        self.status = status
        super().__init__({4: "NCCL_ERROR_INVALID_ARGUMENT", 5: "NCCL_ERROR_INVALID_USAGE"}[status])


NCCL_TYPES = ["INT8", "UINT8", "INT32", "UINT32", "INT64", "UINT64", "FLOAT16", "FLOAT32", "FLOAT64", "BFLOAT16"]
NCCL_OPERATIONS = ["SUM", "PROD", "MAX", "MIN", "AVG"]


class NcclCommunicator:
    """Of all ranks of the communicator that was given to ``install``.

    The ranks meet when they call, not when their streams get there, so that no rank waits for another that waits in
    MPI; what comes of it is written when the stream gets there.
    """

    def __init__(self, ndev: int, commId: tuple, rank: int) -> None:  # noqa: N803
        if len(commId) != 128 or _now.nccl is None or ndev != _now.nccl.size:
            raise NcclError(4)
        self._comm, self._device = _now.nccl.Split(0, rank), runtime.getDevice()
        everyone = self._comm.allgather((commId, _now.gpus[self._device]))
        if len({number for number, _ in everyone}) > 1:
            raise NcclError(4)
        if len({gpu for _, gpu in everyone}) < ndev:
            self.destroy()
            raise NcclError(5)  # Duplicate GPU detected

    def size(self) -> int:
        return self._comm.size

    def rank_id(self) -> int:
        return self._comm.rank

    def device_id(self) -> int:
        return self._device

    def destroy(self) -> None:
        if self._comm is not None:
            self._comm.Free()
            self._comm = None

    abort = destroy

    def _given(self, pointer: int, count: int, datatype: int, stream: int) -> np.ndarray:
        """What a buffer holds when the stream gets there, which is now."""
        queue, name = _now.queue(stream), NCCL_TYPES[datatype].lower()
        dtype = np.dtype(importlib.import_module("ml_dtypes").bfloat16 if name == "bfloat16" else name)
        queue.run()
        return _now.memory_at(pointer, count * dtype.itemsize).view(dtype).copy()

    def _put(self, pointer: int, values: np.ndarray, stream: int) -> None:
        memory = _now.memory_at(pointer, values.nbytes)
        _now.queue(stream).put(lambda: np.copyto(memory, values.view(np.uint8)))

    def _reduced(self, everyone: list[np.ndarray], op: int) -> np.ndarray:
        total = functools.reduce([np.add, np.multiply, np.maximum, np.minimum, np.add][op], everyone)
        return (total / len(everyone)).astype(total.dtype) if NCCL_OPERATIONS[op] == "AVG" else total

    def allReduce(  # noqa: N802
        self, sendbuf: int, recvbuf: int, count: int, datatype: int, op: int, stream: int
    ) -> None:
        everyone = self._comm.allgather(self._given(sendbuf, count, datatype, stream))
        self._put(recvbuf, self._reduced(everyone, op), stream)

    def reduce(self, sendbuf: int, recvbuf: int, count: int, datatype: int, op: int, root: int, stream: int) -> None:
        everyone = self._comm.gather(self._given(sendbuf, count, datatype, stream), root)
        if everyone is not None:
            self._put(recvbuf, self._reduced(everyone, op), stream)

    def bcast(self, buff: int, count: int, datatype: int, root: int, stream: int) -> None:
        self.broadcast(buff, buff, count, datatype, root, stream)

    def broadcast(self, sendbuff: int, recvbuff: int, count: int, datatype: int, root: int, stream: int) -> None:
        given = self._given(sendbuff, count, datatype, stream) if self._comm.rank == root else None
        self._put(recvbuff, self._comm.bcast(given, root), stream)

    def reduceScatter(  # noqa: N802
        self, sendbuf: int, recvbuf: int, recvcount: int, datatype: int, op: int, stream: int
    ) -> None:
        everyone = self._comm.allgather(self._given(sendbuf, recvcount * self._comm.size, datatype, stream))
        mine = slice(recvcount * self._comm.rank, recvcount * (self._comm.rank + 1))
        self._put(recvbuf, self._reduced(everyone, op)[mine], stream)

    def allGather(self, sendbuf: int, recvbuf: int, count: int, datatype: int, stream: int) -> None:  # noqa: N802
        everyone = self._comm.allgather(self._given(sendbuf, count, datatype, stream))
        self._put(recvbuf, np.concatenate(everyone), stream)


# ---- putting it there


def _modules() -> dict[str, Any]:
    nccl = types.ModuleType("cupy.cuda.nccl")
    for names in (NCCL_TYPES, NCCL_OPERATIONS):
        nccl.__dict__.update({f"NCCL_{name}": number for number, name in enumerate(names)})
    nccl.__dict__.update(
        available=True, get_version=lambda: 22800, get_unique_id=lambda: tuple(np.frombuffer(os.urandom(128), np.int8))
    )
    nccl.__dict__.update(NcclCommunicator=NcclCommunicator, NcclError=NcclError)
    cuda: Any = types.ModuleType("cupy.cuda")
    cuda.__path__ = []
    for name in ("Device", "Event", "Stream", "ExternalStream", "MemoryPointer", "MemoryPool", "runtime", "alloc"):
        setattr(cuda, name, globals()[name])
    for name in ("get_current_stream", "get_elapsed_time", "alloc_pinned_memory", "malloc_managed", "malloc_async"):
        setattr(cuda, name, globals()[name])
    cuda.set_allocator, cuda.using_allocator = set_allocator, using_allocator
    cuda.is_available = lambda: bool(_now.gpus)
    cupy: Any = _Functions("cupy", np)
    cupy.__path__, cupy.__version__, cupy.linalg = [], "14.2.0", _Functions("cupy.linalg", np.linalg)
    for name in ("ndarray", "empty", "empty_like", "array", "asarray", "ascontiguousarray", "asnumpy", "from_dlpack"):
        setattr(cupy, name, globals()[name])
    cupy.copyto, cupy.RawKernel, cupy.get_default_memory_pool = copyto, RawKernel, lambda: _pool
    cupy.cuda = cuda
    cupyx: Any = {name: types.ModuleType(name) for name in ("cupyx", "cupyx.scipy", "cupyx.scipy.sparse")}
    cupyx["cupyx"].__path__ = cupyx["cupyx.scipy"].__path__ = []
    cupyx["cupyx.scipy.sparse"].csr_matrix = csr_matrix
    # As in CuPy, ``cupy.cuda.nccl`` is there only once somebody has imported it.
    return {"cupy": cupy, "cupy.cuda": cuda, "cupy.cuda.runtime": runtime, "cupy.cuda.nccl": nccl, **cupyx}


class _Library(ctypes.CDLL):
    """libcuda, which mpicoll asks itself; all others are what they are."""

    def __new__(cls, name: Any, *args: Any, **kwargs: Any) -> Any:
        return _Driver() if name == "libcuda.so.1" else super().__new__(cls)


def _other_driver() -> None:
    """Have mpicoll, which keeps the driver it has found, look for it again."""
    if "mpicoll.mpi.gpu" in sys.modules:
        sys.modules["mpicoll.mpi.gpu"]._driver.cache_clear()


class _Driver:
    def cuPointerGetAttributes(self, count: int, attributes: Any, data: Any, pointer: Any) -> int:  # noqa: N802
        known = _now.allocation(pointer.value)
        values = {2: 2 if known.id else 0, 11: known.base, 12: known.size, 7: known.id, 10: known.capable}
        for attribute, place in zip(attributes, data, strict=True):
            kind = {2: ctypes.c_uint, 10: ctypes.c_int}.get(attribute, ctypes.c_uint64)
            kind.from_address(place).value = values[attribute]
        return 0


def current() -> Fake:
    """The one that is installed."""
    return _now


def install(
    monkeypatch: Any,
    mode: str = "lazy",
    devices: int = 1,
    gpus: tuple[int, ...] | None = None,
    nccl: Any = None,
    seed: int = 0,
) -> Fake:
    """Put it where CuPy would be, until pytest's ``monkeypatch`` takes it away again.

    A process sees ``devices`` GPUs; ``gpus`` says which ones of its node they are, so that those of two processes may
    differ.  None: the driver is missing.  ``nccl`` is the communicator of MPI by which NCCL is done.
    """
    global _now
    _now = fake = Fake(mode, tuple(range(devices)) if gpus is None else tuple(gpus), nccl, seed)
    for name, module in fake.modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(ctypes, "CDLL", _Library)
    _other_driver()
    return fake


@contextlib.contextmanager
def installed(**arguments: Any) -> Iterator[Fake]:
    """The same for as long as a ``with`` lasts; arguments as those of ``install``."""
    import pytest

    with pytest.MonkeyPatch.context() as monkeypatch:
        fake = install(monkeypatch, **arguments)
        try:
            yield fake
        finally:
            fake.uninstall()


if __name__ == "__main__":
    import pytest

    if len(sys.argv) < 3 or sys.argv[1] != "-m":
        sys.exit("usage: python tests/fakecupy.py -m MODULE ARGUMENTS")
    sys.modules["fakecupy"] = sys.modules["__main__"]
    _mode, _devices = os.environ.get("FAKECUPY_MODE", "lazy"), int(os.environ.get("FAKECUPY_DEVICES", "1"))
    _fake = install(pytest.MonkeyPatch(), _mode, _devices)  # to the end, when communicators may still want to use it
    if "FAKECUPY_WITH" in os.environ:
        importlib.import_module(os.environ["FAKECUPY_WITH"]).prepare(_fake)
    sys.argv = sys.argv[2:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
