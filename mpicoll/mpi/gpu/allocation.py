"""Allocations of device memory, which other processes can open through CUDA IPC."""

from contextlib import suppress
from typing import NamedTuple

from . import driver
from .array import Array, cupy


class Allocation(NamedTuple):
    """A piece of memory that the driver allocated at once.

    ``number`` is above 0 and never used for another allocation, ``base`` the address, ``size`` in bytes.
    """

    number: int
    base: int
    size: int
    device: int


def allocation(array: Array) -> Allocation | None:
    """The allocation that holds an array; ``None`` if other processes cannot open it, as with managed memory."""
    _, base, size, number, capable = driver.attributes(array.pointer)
    if not capable or array.pointer + array.nbytes > base + size:
        return None
    return Allocation(number + 1, base, size, array.device)


def refusal() -> str:
    """Why arrays of other processes cannot be opened here; empty if they can."""
    if cupy().cuda.runtime.is_hip:
        return "this is ROCm, and CUDA IPC is meant"
    return "" if driver.driver() else "the CUDA driver, libcuda.so.1, cannot be loaded"


def handle(allocation: Allocation) -> bytes | None:
    """The handle by which another process can open an allocation; ``None`` if the driver has none."""
    runtime = cupy().cuda.runtime
    try:
        with cupy().cuda.Device(allocation.device):
            return bytes(runtime.ipcGetMemHandle(allocation.base))
    except runtime.CUDARuntimeError:
        return None


def opened(handle: bytes, device: int) -> int | None:
    """Map another process' allocation, and return its address here; ``None`` if the device cannot reach it."""
    runtime = cupy().cuda.runtime
    try:
        with cupy().cuda.Device(device):
            return int(runtime.ipcOpenMemHandle(handle))
    except runtime.CUDARuntimeError:
        return None


def close(base: int, device: int) -> None:
    """Unmap an allocation that was ``opened``; all kernels that use it must have completed."""
    runtime = cupy().cuda.runtime
    with suppress(runtime.CUDARuntimeError), cupy().cuda.Device(device):  # its process may have exited
        runtime.ipcCloseMemHandle(base)
