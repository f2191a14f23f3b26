"""Device arrays: CuPy's, and those of other libraries, as collectives use them."""

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from typing import Any

import numpy as np

from ...errors import reason
from . import driver


def cupy() -> Any:
    """CuPy, if this program has imported it, else ``None``."""
    return sys.modules.get("cupy")


def is_cupy(x: Any) -> bool:
    """Whether ``x`` is an array of CuPy's."""
    module = cupy()
    return module is not None and isinstance(x, module.ndarray)


def in_host_memory(x: Any) -> np.ndarray:
    """The array itself, or a copy of a CuPy array in host memory."""
    return x if isinstance(x, np.ndarray) else x.get()


def in_device_memory(x: Any) -> bool:
    """Whether an exporter of the CUDA array interface is in the memory of a device; some export host memory."""
    if is_cupy(x):
        return True
    pointer, _ = x.__cuda_array_interface__["data"]
    if driver.driver() is None:
        return driver.rocm()  # whose arrays have the same interface
    return not pointer or driver.attributes(pointer).kind == driver.DEVICE  # an empty array has no address


def as_cupy(x: Any, writable: bool) -> Any:
    """A CuPy array on the memory of another library's array, complete with everything pending for it.

    Raises ``TypeError`` if CuPy is missing or cannot read it, ``ValueError`` if it must be ``writable`` and is not.
    """
    name = f"{type(x).__module__}.{type(x).__name__} is in the memory of a device"
    try:
        interface = x.__cuda_array_interface__ if hasattr(x, "__cuda_array_interface__") else None
        readonly = interface is not None and interface["data"][1]
    except Exception as error:
        raise TypeError(f"{name}, and its CUDA array interface cannot be read: {reason(error)}") from error
    try:
        module = importlib.import_module("cupy")
    except ImportError as error:
        raise TypeError(
            f"{name}, which needs CuPy ({error}): pip install 'mpicoll[cuda13]', or cuda12; or pass a copy in host "
            "memory"
        ) from None
    try:
        found = module.from_dlpack(x) if interface is None else module.asarray(x)
    except Exception as error:
        raise TypeError(
            f"{name}, and no CuPy array can be made of it ({reason(error)}): pass cupy.asarray(x), or a copy in host "
            "memory"
        ) from error
    if readonly and writable:
        raise ValueError("expected a writable array: the result is written in place")
    return found


class Array:
    """A contiguous device array for collectives: ``size`` elements of ``dtype`` from the address ``pointer`` on.

    Takes CuPy arrays, and all others that export the CUDA array interface or DLPack.  Nobody knows the stream on which
    the latter are read next, and so what is written to them is complete when the call returns (``settle``).

    Raises ``TypeError`` if CuPy cannot read it, ``ValueError`` if it is not contiguous, or must be ``writable`` and is
    not, or the stream is of another device.
    """

    def __init__(self, x: Any, stream: Any = None, writable: bool = False) -> None:
        self._stream_known = stream is not None or is_cupy(x)
        if not is_cupy(x):
            x = as_cupy(x, writable)
        if not (x.flags.c_contiguous or x.flags.f_contiguous):
            raise ValueError("expected a contiguous array; reduce cupy.ascontiguousarray(x) instead")
        self.array = x  # which keeps the memory
        self.dtype, self.size, self.nbytes = x.dtype, int(x.size), int(x.nbytes)
        self.pointer, self.device = int(x.data.ptr), int(x.device.id)
        self.stream = _stream(stream, self.device)

    def settle(self) -> None:
        """Wait for what was written, unless it is known on which stream it is read next."""
        if not self._stream_known:
            self.synchronize()

    def view(self, dtype: np.dtype) -> "Array":
        """This memory as elements of another dtype."""
        other = copy(self)
        other.dtype, other.size = dtype, self.nbytes // dtype.itemsize
        return other

    def as_bytes(self) -> "Array":
        """This memory as bytes."""
        return self.view(np.dtype(np.uint8))

    def part(self, lo: int, hi: int) -> "Array":
        """Elements from ``lo`` to before ``hi``."""
        other = copy(self)
        other.size, other.pointer = hi - lo, self.pointer + lo * self.dtype.itemsize
        other.nbytes = other.size * self.dtype.itemsize
        return other

    def flat(self) -> Any:
        """This memory as a CuPy array of one dimension."""
        memory = self.array.data
        return cupy().ndarray((self.size,), self.dtype, memory + (self.pointer - int(memory.ptr)))

    def load(self, host: np.ndarray, lo: int = 0, stream: Any = None) -> None:
        """Start a copy of ``len(host)`` elements from ``lo`` on to host memory."""
        self._copy(host, lo, stream, cupy().cuda.runtime.memcpyDeviceToHost)

    def store(self, host: np.ndarray, lo: int = 0, stream: Any = None) -> None:
        """Start a copy of host memory to the elements from ``lo`` on."""
        self._copy(host, lo, stream, cupy().cuda.runtime.memcpyHostToDevice)

    def copy_from(self, other: "Array") -> None:
        """Start a copy of all elements from an array on the same device and stream."""
        if other.pointer != self.pointer and self.nbytes:
            runtime = cupy().cuda.runtime
            with cupy().cuda.Device(self.device):
                runtime.memcpyAsync(
                    self.pointer, other.pointer, self.nbytes, runtime.memcpyDeviceToDevice, self.stream.ptr
                )

    def synchronize(self) -> None:
        """Wait for everything on its stream."""
        with cupy().cuda.Device(self.device):  # the default stream is that of the current device
            self.stream.synchronize()

    def record(self) -> Any:
        """An event after everything on its stream."""
        cuda = cupy().cuda
        with cuda.Device(self.device):
            return self.stream.record(cuda.Event(disable_timing=True))

    def _copy(self, host: np.ndarray, lo: int, stream: Any, kind: int) -> None:
        if host.nbytes:
            here, there = self.pointer + lo * self.dtype.itemsize, host.__array_interface__["data"][0]
            runtime = cupy().cuda.runtime
            target, source = (there, here) if kind == runtime.memcpyDeviceToHost else (here, there)
            with cupy().cuda.Device(self.device):
                runtime.memcpyAsync(target, source, host.nbytes, kind, (stream or self.stream).ptr)


def _stream(stream: Any, device: int) -> Any:
    """A stream of CuPy's; the current one of the device if none is passed."""
    cuda = cupy().cuda
    if stream is None:
        return cuda.get_current_stream(device)
    if not isinstance(stream, (cuda.Stream, cuda.ExternalStream)):
        if not hasattr(stream, "__cuda_stream__"):
            raise TypeError(
                f"stream= takes a stream of CuPy's, or one with __cuda_stream__, got {type(stream).__name__}"
            )
        with cuda.Device(device):
            return cuda.Stream.from_external(stream)
    if stream.device_id not in (-1, device):
        raise ValueError(f"the array is on device {device}, stream= on device {stream.device_id}: they must be on one")
    return stream


@contextmanager
def on(array: Array) -> Iterator[None]:
    """Make the device and the stream of an array the current ones.

    The ``with`` of a CuPy stream ends with the one before it in a ``with``, not with the one that was in use.
    """
    cuda = cupy().cuda
    with cuda.Device(array.device):
        before = cuda.get_current_stream()
        array.stream.use()
        try:
            yield
        finally:
            before.use()


def synchronize(arrays: list[Array]) -> None:
    """Wait for everything on the streams of arrays."""
    for array in {array.stream.ptr: array for array in arrays}.values():
        array.synchronize()


def same_device(*arrays: Array) -> None:
    """Raise ``ValueError`` unless all arrays are on one device."""
    numbers = sorted({array.device for array in arrays})
    if len(numbers) > 1:
        raise ValueError(f"arrays are on devices {', '.join(map(str, numbers))}: those of a call must be on one")


# ---- arrays on a device, or in host memory


def empty(count: int, dtype: np.dtype, like: Array) -> Any:
    """A new flat CuPy array on the device, and for the stream, of another one."""
    with on(like):
        return cupy().empty(count, dtype)


def empty_like(x: Array | np.ndarray, count: int) -> Array | np.ndarray:
    """New memory for ``count`` elements of the dtype of ``x``, where ``x`` is, and on its stream."""
    return Array(empty(count, x.dtype, x), x.stream) if isinstance(x, Array) else np.empty(count, x.dtype)


def copy_of(array: Array | np.ndarray) -> Array | np.ndarray:
    """A copy on the same device and stream, or in host memory."""
    other = empty_like(array, array.size)
    copy_into(other, array)
    return other


def copy_in_c_order(x: Any, stream: Any) -> Any:
    """A copy in C order of a CuPy array, or another library's device array, in Fortran order."""
    array = Array(x, stream)
    with on(array):
        return array.array.copy(order="C")


def copy_into(target: Array | np.ndarray, source: Array | np.ndarray) -> None:
    """Copy between two arrays on the same device and stream, or two in host memory."""
    if isinstance(target, Array):
        assert isinstance(source, Array)
        target.copy_from(source)
        target.settle()
    else:
        target[:] = source


def part_of(array: Array | np.ndarray, lo: int, hi: int) -> Array | np.ndarray:
    """Elements from ``lo`` to before ``hi``."""
    return array.part(lo, hi) if isinstance(array, Array) else array[lo:hi]
