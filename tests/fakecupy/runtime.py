"""cupy.cuda.runtime."""

import functools
import os
import struct
import types
from typing import Any

import numpy as np

from . import now
from .allocation import Allocation
from .errors import CUDARuntimeError
from .host import bytes_at, copy


class Runtime(types.ModuleType):
    """cupy.cuda.runtime: each function first sees whether it is to fail."""

    CUDARuntimeError = CUDARuntimeError
    is_hip = False

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        if isinstance(value, types.MethodType):
            if now.fake is not None and name in now.fake.refuse:
                raise_it = CUDARuntimeError(now.fake.refuse[name])
                return functools.partial(_raise, raise_it)
            if now.fake is None or not now.fake.gpus:
                return functools.partial(_raise, CUDARuntimeError("cudaErrorInsufficientDriver"))
        return value

    def getDeviceCount(self) -> int:  # noqa: N802
        return len(now.fake.gpus)

    def getDevice(self) -> int:  # noqa: N802
        return now.local().device

    def setDevice(self, device: int) -> None:  # noqa: N802
        if not 0 <= device < len(now.fake.gpus):
            raise CUDARuntimeError("cudaErrorInvalidDevice")
        now.local().device = device

    def getDeviceProperties(self, device: int) -> dict[str, Any]:  # noqa: N802
        gpu = now.fake.gpus[device]
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
        return f"0000:{now.fake.gpus[device] + 1:02X}:00.0"

    def deviceCanAccessPeer(self, device: int, peerDevice: int) -> int:  # noqa: N802, N803
        return int(device != peerDevice)

    def deviceSynchronize(self) -> None:  # noqa: N802
        now.fake.log.append("device")
        for queue in [q for q in now.fake.queues if q.device == self.getDevice()]:
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
        fake, places = now.fake, (dst, src)
        queue = fake.queue(stream)
        on_device = [any(a.base <= p < a.base + a.size for a in fake.allocations.values()) for p in places]
        if kind != self.memcpyDefault and (kind in (2, 3), kind in (1, 3)) != (on_device[1], on_device[0]):
            raise CUDARuntimeError("cudaErrorInvalidValue")
        target, source = (
            fake.memory_at(p, size) if there else bytes_at(p, size) for p, there in zip(places, on_device, strict=True)
        )
        if all(on_device):
            queue.put(lambda: np.copyto(target, source))
        else:
            copy(target, source, source if on_device[0] else target, queue)

    def memcpy(self, dst: int, src: int, size: int, kind: int) -> None:
        self.memcpyAsync(dst, src, size, kind, 0)
        now.fake.queue(0).run()

    def memsetAsync(self, ptr: int, value: int, size: int, stream: int) -> None:  # noqa: N802
        memory = now.fake.memory_at(ptr, size)
        now.fake.queue(stream).put(lambda: memory.fill(value))

    def streamSynchronize(self, stream: int) -> None:  # noqa: N802
        now.fake.log.append("stream")
        queue = now.fake.queue(stream)
        if stream == 0:
            queue.put(lambda: None)  # it comes after all other streams
        queue.run()

    def streamWaitEvent(self, stream: int, event: int, flags: int = 0) -> None:  # noqa: N802
        queue, mark = now.fake.queue(stream), now.fake.events[event]._mark
        if mark:
            queue.put(lambda: mark[0].run(mark[1]))

    def eventSynchronize(self, event: int) -> None:  # noqa: N802
        now.fake.events[event].synchronize()

    def hostRegister(self, ptr: int, size: int, flags: int) -> None:  # noqa: N802
        if any(p < ptr + size and ptr < p + n for p, n in now.fake.registered.items()):
            raise CUDARuntimeError("cudaErrorHostMemoryAlreadyRegistered")
        now.fake.registered[ptr] = size

    def hostUnregister(self, ptr: int) -> None:  # noqa: N802
        if now.fake.registered.pop(ptr, None) is None:
            raise CUDARuntimeError("cudaErrorHostMemoryNotRegistered")

    def ipcGetMemHandle(self, devPtr: int) -> bytes:  # noqa: N802, N803
        base, _, _, capable = now.fake.allocation(devPtr)
        if not capable:
            raise CUDARuntimeError("cudaErrorInvalidValue")
        a = now.fake.allocations[base]  # whichever part of it was asked for
        return struct.pack("<5q", os.getpid(), a.file, a.size, a.id, now.fake.gpus[a.device]).ljust(64, b"\0")

    def ipcOpenMemHandle(self, handle: bytes, flags: int = 1) -> int:  # noqa: N802
        if len(handle) != 64:
            raise CUDARuntimeError("cudaErrorInvalidValue")
        process, file, size, number, _ = struct.unpack_from("<5q", handle)
        if process == os.getpid():
            raise CUDARuntimeError("cudaErrorDeviceUninitialized")
        for a in now.fake.allocations.values():
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
        a = now.fake.allocations.get(devPtr)
        if a is None or not a.opened:
            raise CUDARuntimeError("cudaErrorInvalidValue")
        a.opened -= 1
        if not a.opened:
            a.free()


def _raise(error: Exception, *args: object, **kwargs: object) -> None:
    raise error


runtime: Any = Runtime("cupy.cuda.runtime")
for _kind, _name in enumerate(("HostToHost", "HostToDevice", "DeviceToHost", "DeviceToDevice", "Default")):
    setattr(runtime, f"memcpy{_name}", _kind)
runtime.cudaIpcMemLazyEnablePeerAccess = 1
