"""Arrays in the memory of GPUs, and what is done with them: the only file that touches CuPy.

CuPy is found where the program has imported it, and imported here only for a program that asks for a GPU (``take``).

An array is read and written on a stream, the current one of its device unless another one is named: after all that was
put on that stream before the call, and before all that is put there after it.  Nothing else is promised, as with any
operation of CuPy's, and so nothing more is waited for: the host waits where MPI, or another process, is to read.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
from mpi4py import MPI

from ..errors import UserError
from .launch import node_of

BOX = 4 << 20
"""Bytes of host memory that a piece of an array goes through."""

BOXES = 3  # one piece comes from the GPU, one is with MPI, one goes back


def cupy() -> Any:
    """CuPy, if this program has imported it."""
    return sys.modules.get("cupy")


def is_cupy(x: Any) -> bool:
    """Is it an array of CuPy's?"""
    module = cupy()
    return module is not None and isinstance(x, module.ndarray)


class Array:
    """A CuPy array as collectives have it: ``size`` elements of ``dtype``, side by side from ``pointer`` on.

    Raises ``TypeError`` for arrays of others, ``ValueError`` if it is not contiguous, or the stream is of another
    device.
    """

    def __init__(self, x: Any, stream: Any = None) -> None:
        if not is_cupy(x):
            raise TypeError(
                f"{type(x).__module__}.{type(x).__name__} is in the memory of a device and no CuPy array: "
                "pass cupy.from_dlpack(x), or a copy in host memory"
            )
        if not (x.flags.c_contiguous or x.flags.f_contiguous):
            raise ValueError("expected a contiguous array; reduce cupy.ascontiguousarray(x) instead")
        self.array = x  # which keeps the memory
        self.dtype, self.size, self.nbytes = x.dtype, int(x.size), int(x.nbytes)
        self.pointer, self.device = int(x.data.ptr), int(x.device.id)
        self.stream = _stream(stream, self.device)

    def load(self, host: np.ndarray, lo: int = 0, stream: Any = None) -> None:
        """Have as many elements from ``lo`` on copied to host memory as there is room for."""
        self._copy(host, lo, stream, cupy().cuda.runtime.memcpyDeviceToHost)

    def store(self, host: np.ndarray, lo: int = 0, stream: Any = None) -> None:
        """Have host memory copied to the elements from ``lo`` on."""
        self._copy(host, lo, stream, cupy().cuda.runtime.memcpyHostToDevice)

    def fill_from(self, other: "Array") -> None:
        """Have all elements copied from an array on the same device."""
        if other.pointer != self.pointer and self.nbytes:
            runtime = cupy().cuda.runtime
            with on(self):
                self._after(other)
                runtime.memcpyAsync(
                    self.pointer, other.pointer, self.nbytes, runtime.memcpyDeviceToDevice, self.stream.ptr
                )

    def _after(self, other: "Array") -> None:
        if other.stream.ptr != self.stream.ptr:
            self.stream.wait_event(other.stream.record())

    def _copy(self, host: np.ndarray, lo: int, stream: Any, kind: int) -> None:
        if host.nbytes:
            here, there = self.pointer + lo * self.dtype.itemsize, host.__array_interface__["data"][0]
            runtime = cupy().cuda.runtime
            target, source = (there, here) if kind == runtime.memcpyDeviceToHost else (here, there)
            with on(self):
                runtime.memcpyAsync(target, source, host.nbytes, kind, (stream or self.stream).ptr)


@contextmanager
def on(array: Array) -> Iterator[None]:
    """With its device, and its stream, as the current ones."""
    with cupy().cuda.Device(array.device), array.stream:
        yield


def _stream(stream: Any, device: int) -> Any:
    """CuPy's; the current one if none is given."""
    cuda = cupy().cuda
    if stream is None:
        return cuda.get_current_stream(device)
    if not hasattr(stream, "wait_event"):
        if not hasattr(stream, "__cuda_stream__"):
            raise TypeError(
                f"stream= takes a stream of CuPy's, or one with __cuda_stream__, got {type(stream).__name__}"
            )
        with cuda.Device(device):
            return cuda.Stream.from_external(stream)
    if stream.device_id not in (-1, device):
        raise ValueError(f"the array is on device {device}, stream= on device {stream.device_id}: they must be on one")
    return stream


def same_device(*arrays: Array) -> None:
    """Raise ``ValueError`` unless all are on one device."""
    numbers = sorted({array.device for array in arrays})
    if len(numbers) > 1:
        raise ValueError(f"arrays are on devices {', '.join(map(str, numbers))}: those of a call must be on one")


# ---- host memory

_in_use: list[
    tuple[Any, np.ndarray]
] = []  # (event, memory): CuPy's pool would hand it out again, pending copies or not


def pinned(nbytes: int) -> np.ndarray:
    """Bytes of page-locked host memory, which copies to and from a GPU need to be fast, and not to wait; from CuPy's
    pool."""
    _in_use[:] = [(event, memory) for event, memory in _in_use if not event.done]
    return np.frombuffer(cupy().cuda.alloc_pinned_memory(max(nbytes, 1)), np.uint8, nbytes)


def staged(array: Array, load: bool) -> np.ndarray:
    """Page-locked host memory with what the array holds, or with anything in it, if that is not asked for."""
    host = pinned(array.nbytes).view(array.dtype)
    if load:
        array.load(host)
        array.stream.synchronize()
    return host


def deliver(host: np.ndarray, array: Array) -> None:
    """Have memory that ``staged`` has given copied to the array; it is kept until that is done."""
    array.store(host)
    _in_use.append((array.stream.record(), host))


def register(memory: np.ndarray) -> bool:
    """Lock the pages of host memory, if that can be."""
    runtime = cupy().cuda.runtime
    try:
        runtime.hostRegister(memory.ctypes.data, memory.nbytes, 0)
    except runtime.CUDARuntimeError:
        return False
    return True


class Boxes:
    """Page-locked host memory that arrays of any length go through, a piece at a time: while one is with MPI, the next
    comes from the GPU, and the one before goes back to it.

    The memory is ``BOXES`` boxes, of which a copy may still be on its way when a call returns.
    """

    def __init__(self, memory: np.ndarray, device: int, registered: bool = False) -> None:
        cuda = cupy().cuda
        size = len(memory) // BOXES
        self._memory, self._registered = memory, registered
        self._boxes = [memory[n * size : (n + 1) * size] for n in range(BOXES)]
        self.device = device
        with cuda.Device(device):
            self._out, self._back = (cuda.Stream(non_blocking=True) for _ in range(2))
            self._loaded, self._stored = ([cuda.Event(disable_timing=True) for _ in range(BOXES)] for _ in range(2))

    def through(
        self, given: Array | np.ndarray | None, taken: Array | np.ndarray | None, do: Callable[[np.ndarray], None]
    ) -> None:
        """``do`` something with each piece of what is ``given`` (if nothing is, with memory that holds anything), and
        bring what it leaves there to ``taken``.

        Where one of them is in host memory it is copied by the host.
        """
        either = taken if given is None else given
        assert either is not None
        itemsize = either.dtype.itemsize
        length = max(len(self._boxes[0]) // itemsize, 1)
        pieces = [(n % BOXES, lo, min(length, either.size - lo)) for n, lo in enumerate(range(0, either.size, length))]
        for stream, array in ((self._out, given), (self._back, taken)):
            if isinstance(array, Array):
                stream.wait_event(array.stream.record())  # what was put there before the call comes first

        def load(number: int, lo: int, count: int) -> None:
            assert isinstance(given, Array)
            self._out.wait_event(self._stored[number])  # what was there before has to be gone
            given.load(self._view(number, count, either.dtype), lo, self._out)
            self._out.record(self._loaded[number])

        if isinstance(given, Array) and pieces:
            load(*pieces[0])
        for n, (number, lo, count) in enumerate(pieces or [(0, 0, 0)]):
            box = self._view(number, count, either.dtype)
            if isinstance(given, Array):
                if pieces[n + 1 :]:
                    load(*pieces[n + 1])
                self._loaded[number].synchronize()
            else:
                self._stored[number].synchronize()
                if given is not None:
                    box[:] = given[lo : lo + count]
            do(box)
            if isinstance(taken, Array):
                taken.store(box, lo, self._back)
                self._back.record(self._stored[number])
            elif taken is not None:
                taken[lo : lo + count] = box
        if isinstance(taken, Array):
            taken.stream.wait_event(self._back.record())  # what is put there after the call comes last

    def _view(self, number: int, count: int, dtype: np.dtype) -> np.ndarray:
        return self._boxes[number][: count * dtype.itemsize].view(dtype)

    def release(self) -> None:
        """Wait for what is on its way, and give the memory back."""
        self._back.synchronize()
        if self._registered:
            cupy().cuda.runtime.hostUnregister(self._memory.ctypes.data)
            self._registered = False


# ---- which GPU


class Gpu(NamedTuple):
    """The one that a rank has: its number among those that the process sees, what it is, and all ranks that have it."""

    number: int
    name: str
    uuid: str
    bus: str
    ranks: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.name} ({self.bus})"


def take(comm: MPI.Intracomm) -> Gpu:
    """Give every rank a GPU, and make it the current device: rank modulo GPUs, of those of its node that are seen.

    Where the launcher lets each rank see one of its own, it is that one.  Imports CuPy.  A collective call, which
    raises ``UserError`` on all ranks if some have no CuPy, or no GPU.
    """
    node = node_of(comm)
    local = node.rank
    node.Free()
    found, error = None, None
    try:
        found = _chosen(local)
    except UserError as raised:
        error = str(raised)
    everyone = comm.allgather((found, error))
    failed = [(rank, why) for rank, (_, why) in enumerate(everyone) if why]
    if failed:
        comm.Barrier()  # raise it together
        rank, why = failed[0]
        raise UserError(f"{why} (on rank {rank})" if rank else str(why))
    assert found is not None
    return found._replace(ranks=tuple(rank for rank, (other, _) in enumerate(everyone) if other.uuid == found.uuid))


def _chosen(local: int) -> Gpu:
    try:
        import cupy as module
    except ImportError as error:
        raise UserError(
            f"a GPU needs CuPy, which cannot be imported ({error}): pip install 'mpicoll[cuda13]', or cuda12, as the "
            "driver has it (nvidia-smi)"
        ) from None
    runtime = module.cuda.runtime
    try:
        number = local % max(runtime.getDeviceCount(), 1)
        module.cuda.Device(number).use()
        runtime.free(0)  # makes the context: now, and not in the middle of something
        name, uuid, bus = identity(number)
    except runtime.CUDARuntimeError as error:
        raise UserError(f"there is no GPU to be used here ({error}): leave out --device gpu") from None
    return Gpu(number, name, uuid, bus, ())


def identity(number: int) -> tuple[str, str, str]:
    """The name, the UUID, which no other GPU has, and the PCI address of a device of this process."""
    runtime = cupy().cuda.runtime
    properties = runtime.getDeviceProperties(number)
    return properties["name"].decode(), bytes(properties["uuid"]).hex(), runtime.deviceGetPCIBusId(number)
