"""Devices, streams and events."""

import time
import warnings
from typing import Any

from . import now
from .errors import CUDARuntimeError
from .queues import Queue
from .runtime import runtime


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
        self.ptr, self._device, self._timing = next(now.fake.ids), runtime.getDevice(), not disable_timing
        self._mark: tuple[Queue, int] | None = None
        self._time: float | None = None
        self._asked = False
        now.fake.events[self.ptr] = self

    def record(self, stream: Any = None) -> None:
        queue = now.fake.queue((stream or get_current_stream()).ptr)
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
        now.fake.log.append("event")
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
        local = now.local()
        local.stack.append((device, self))
        local.streams[device] = self
        return self

    def __exit__(self, *args: object) -> None:
        """To the one before it in a ``with``, not to the one that was in use: as CuPy does."""
        local = now.local()
        device, _ = local.stack.pop()
        local.streams[device] = next((s for d, s in reversed(local.stack) if d == device), Stream.null)

    def use(self) -> Any:
        now.local().streams[self._checked()] = self
        return self

    @property
    def done(self) -> bool:
        return not now.fake.queue(self.ptr).works

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
            self.ptr, self.device_id, self._owner = 0x1000 + next(now.fake.ids), runtime.getDevice(), now.fake
            now.fake.streams[self.ptr, -1] = Queue(self.device_id, waits_for_null=not non_blocking)

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


def get_current_stream(device_id: int = -1) -> Any:
    return now.local().streams.get(runtime.getDevice() if device_id == -1 else device_id, Stream.null)
