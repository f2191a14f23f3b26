"""Arrays in the memory of GPUs, and what the engine does with them: all that it knows of CuPy.

CuPy is found where the program has imported it, and imported here only for a program that asks for a GPU (``take``), or
passes a device array of another library.

An array is read and written on a stream, the current one of its device unless another one is named: after all that was
put on that stream before the call, and before all that is put there after it.  Nothing else is promised, as with any
operation of CuPy's, and so nothing more is waited for: the host waits where MPI, or another process, is to read.
"""

import importlib
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from copy import copy
from functools import lru_cache
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
from mpi4py import MPI

from ..collective import Collective
from ..errors import UserError, reason
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


def in_host_memory(x: Any) -> np.ndarray:
    """The array itself, or a copy of one of CuPy's."""
    return x if isinstance(x, np.ndarray) else x.get()


def holds(x: Any) -> bool:
    """Is an exporter of the CUDA array interface in the memory of a device?  Some export host memory."""
    if is_cupy(x):
        return True
    pointer, _ = x.__cuda_array_interface__["data"]
    if _driver() is None:
        return _rocm()  # whose arrays have the same interface
    return not pointer or _attributes(pointer).kind == _DEVICE  # an empty array is nowhere, and what it says


def adopted(x: Any, writable: bool) -> Any:
    """A CuPy array on the memory of another library's array, of which all is there that was to be written."""
    name = f"{type(x).__module__}.{type(x).__name__} is in the memory of a device"
    try:
        told = x.__cuda_array_interface__ if hasattr(x, "__cuda_array_interface__") else None
        readonly = told is not None and told["data"][1]
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
        found = module.from_dlpack(x) if told is None else module.asarray(x)
    except Exception as error:
        raise TypeError(
            f"{name}, and no CuPy array can be made of it ({reason(error)}): pass cupy.asarray(x), or a copy in host "
            "memory"
        ) from error
    if readonly and writable:
        raise ValueError("expected a writable array: the result is written in place")
    return found


class Array:
    """A device array as collectives have it: ``size`` elements of ``dtype``, side by side from ``pointer`` on.

    Arrays of CuPy's, and all others that export the CUDA array interface or DLPack: what is written to those is there
    when the call returns (``settle``), since nobody knows the stream on which they are read next.

    Raises ``TypeError`` if CuPy cannot read it, ``ValueError`` if it is not contiguous, or is to be written and must
    not be, or the stream is of another device.
    """

    def __init__(self, x: Any, stream: Any = None, writable: bool = False) -> None:
        self._told = stream is not None or is_cupy(x)
        if not is_cupy(x):
            x = adopted(x, writable)
        if not (x.flags.c_contiguous or x.flags.f_contiguous):
            raise ValueError("expected a contiguous array; reduce cupy.ascontiguousarray(x) instead")
        self.array = x  # which keeps the memory
        self.dtype, self.size, self.nbytes = x.dtype, int(x.size), int(x.nbytes)
        self.pointer, self.device = int(x.data.ptr), int(x.device.id)
        self.stream = _stream(stream, self.device)

    def settle(self) -> None:
        """Wait for what was written, unless it is known on which stream it is read next."""
        if not self._told:
            self.synchronize()

    def view(self, dtype: np.dtype) -> "Array":
        """The same memory, as elements of another dtype."""
        other = copy(self)
        other.dtype, other.size = dtype, self.nbytes // dtype.itemsize
        return other

    def as_bytes(self) -> "Array":
        """The same memory."""
        return self.view(np.dtype(np.uint8))

    def part(self, lo: int, hi: int) -> "Array":
        """Elements from ``lo`` to before ``hi``."""
        other = copy(self)
        other.size, other.pointer = hi - lo, self.pointer + lo * self.dtype.itemsize
        other.nbytes = other.size * self.dtype.itemsize
        return other

    def flat(self) -> Any:
        """As a CuPy array of one dimension."""
        memory = self.array.data
        return cupy().ndarray((self.size,), self.dtype, memory + (self.pointer - int(memory.ptr)))

    def load(self, host: np.ndarray, lo: int = 0, stream: Any = None) -> None:
        """Have as many elements from ``lo`` on copied to host memory as there is room for."""
        self._copy(host, lo, stream, cupy().cuda.runtime.memcpyDeviceToHost)

    def store(self, host: np.ndarray, lo: int = 0, stream: Any = None) -> None:
        """Have host memory copied to the elements from ``lo`` on."""
        self._copy(host, lo, stream, cupy().cuda.runtime.memcpyHostToDevice)

    def fill_from(self, other: "Array | np.ndarray") -> None:
        """Have all elements copied from an array on the same device and stream, or in host memory."""
        if isinstance(other, np.ndarray):
            host = staged(self, load=False)
            host[:] = other
            deliver(host, self)
        elif other.pointer != self.pointer and self.nbytes:
            runtime = cupy().cuda.runtime
            with cupy().cuda.Device(self.device):
                runtime.memcpyAsync(
                    self.pointer, other.pointer, self.nbytes, runtime.memcpyDeviceToDevice, self.stream.ptr
                )

    def synchronize(self) -> None:
        """Wait for all that is on its stream."""
        with cupy().cuda.Device(self.device):  # the default stream is that of the current device
            self.stream.synchronize()

    def record(self) -> Any:
        """An event, after all that is on its stream."""
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


def empty(count: int, dtype: np.dtype, like: Array) -> Any:
    """A new CuPy array, flat, on the device, and for the stream, of another one."""
    with on(like):
        return cupy().empty(count, dtype)


def in_c_order(x: Any, stream: Any) -> Any:
    """A copy row by row, of an array that lies there column by column."""
    array = Array(x, stream)
    with on(array):
        return array.array.copy(order="C")


def empty_like(x: "Array | np.ndarray", count: int) -> "Array | np.ndarray":
    """New memory where ``x`` is, for as many elements of its dtype, and on its stream."""
    return Array(empty(count, x.dtype, x), x.stream) if isinstance(x, Array) else np.empty(count, x.dtype)


def copied(array: "Array | np.ndarray") -> "Array | np.ndarray":
    """A copy, on the same device and stream, or in host memory."""
    other = empty_like(array, array.size)
    move(other, array)
    return other


def move(target: "Array | np.ndarray", source: "Array | np.ndarray") -> None:
    """Copy between two arrays that are on the same device and stream, or in host memory both."""
    if isinstance(target, Array):
        target.fill_from(source)
        target.settle()
    else:
        target[:] = source


def part(array: "Array | np.ndarray", lo: int, hi: int) -> "Array | np.ndarray":
    """Elements from ``lo`` to before ``hi``."""
    return array.part(lo, hi) if isinstance(array, Array) else array[lo:hi]


@contextmanager
def on(array: Array) -> Iterator[None]:
    """With its device, and its stream, as the current ones.

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


def _stream(stream: Any, device: int) -> Any:
    """CuPy's; the current one if none is given."""
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


def same_device(*arrays: Array) -> None:
    """Raise ``ValueError`` unless all are on one device."""
    numbers = sorted({array.device for array in arrays})
    if len(numbers) > 1:
        raise ValueError(f"arrays are on devices {', '.join(map(str, numbers))}: those of a call must be on one")


def sparse(x: Any) -> Any:
    """A copy of a sparse matrix by rows (CSR) on the current device, with no place twice in a row.

    CuPy's hold floats only; others become those that they are multiplied as.
    """
    from cupyx.scipy.sparse import csr_matrix

    x = x.tocsr().astype(np.result_type(x.dtype, np.float32), copy=False)
    asarray = cupy().asarray
    made = csr_matrix((asarray(x.data), asarray(x.indices), asarray(x.indptr)), shape=x.shape)
    made.sum_duplicates()  # which it would else look for in each product
    return made


# ---- host memory

# Events and memory: CuPy's pool would hand the memory out again, pending copies or not.
_in_use: list[tuple[Any, np.ndarray]] = []
_using = Lock()


def pinned(nbytes: int) -> np.ndarray:
    """Bytes of page-locked host memory, which copies to and from a GPU need to be fast, and not to wait; from CuPy's
    pool."""
    with _using:
        _in_use[:] = [(event, memory) for event, memory in _in_use if not event.done]
    return np.frombuffer(cupy().cuda.alloc_pinned_memory(max(nbytes, 1)), np.uint8, nbytes)


def staged(array: Array, load: bool) -> np.ndarray:
    """Page-locked host memory with what the array holds, or with anything in it, if that is not asked for."""
    with cupy().cuda.Device(array.device):
        host = pinned(array.nbytes).view(array.dtype)
    if load:
        array.load(host)
        array.synchronize()
    return host


def deliver(host: np.ndarray, array: Array) -> None:
    """Have memory that ``staged`` has given copied to the array; it is kept until that is done."""
    array.store(host)
    with _using:
        _in_use.append((array.record(), host))
    array.settle()


def register(memory: np.ndarray) -> bool:
    """Lock the pages of host memory, if that can be."""
    runtime = cupy().cuda.runtime
    try:
        runtime.hostRegister(memory.ctypes.data, memory.nbytes, 1)  # for all devices of this process
    except runtime.CUDARuntimeError:
        return False
    return True


def pieces(count: int, dtype: np.dtype, box: int) -> list[tuple[int, int]]:
    """Of so many elements, as many at a time as a box of so many bytes holds: the first, and how many."""
    length = max(box // dtype.itemsize, 1)
    return [(lo, min(length, count - lo)) for lo in range(0, count, length)]


class Boxes:
    """Page-locked host memory that arrays of any length go through, a piece at a time: while one is with MPI, the next
    comes from the GPU, and the one before goes back to it.

    A copy may still be on its way when a call returns, and so the memory is this one's until it is released.
    """

    def __init__(self, memory: np.ndarray, device: int, registered: bool = False) -> None:
        size = len(memory) // BOXES
        self._memory, self._registered = memory, registered
        self._boxes = [memory[n * size : (n + 1) * size] for n in range(BOXES)]
        self._device: int | None = None
        self._out: Any = None
        self._back: Any = None
        self._use(device)

    def _use(self, device: int) -> None:
        """Streams and events are those of a device."""
        if device == self._device:
            return
        if self._device is not None:
            self._back.synchronize()
        cuda = cupy().cuda
        with cuda.Device(device):
            self._out, self._back = (cuda.Stream(non_blocking=True) for _ in range(2))
            self._loaded, self._stored = ([cuda.Event(disable_timing=True) for _ in range(BOXES)] for _ in range(2))
        self._device = device

    def through(
        self, given: Array | np.ndarray | None, taken: Array | np.ndarray | None, do: Callable[[np.ndarray], None]
    ) -> None:
        """``do`` something with each piece of what is ``given`` (if nothing is, with memory that holds anything), and
        bring what it leaves there to ``taken``.  The host copies what is in host memory.

        The host waits for each piece to come, or, if nothing is given, for each box to be free; the GPU waits with a
        copy to a box until what was there is gone.
        """
        array = next(one for one in (given, taken) if isinstance(one, Array))
        self._use(array.device)
        with cupy().cuda.Device(array.device):
            self._through(array, given, taken, do)

    def _through(
        self,
        array: Array,
        given: Array | np.ndarray | None,
        taken: Array | np.ndarray | None,
        do: Callable[[np.ndarray], None],
    ) -> None:
        cut = pieces(array.size, array.dtype, len(self._boxes[0]))
        steps = [(n % BOXES, lo, count) for n, (lo, count) in enumerate(cut)]
        for stream, one in ((self._out, given), (self._back, taken)):
            if isinstance(one, Array):
                stream.wait_event(one.record())  # what was put there before the call comes first

        def load(number: int, lo: int, count: int) -> None:
            assert isinstance(given, Array)
            self._out.wait_event(self._stored[number])
            given.load(self._view(number, count, array.dtype), lo, self._out)
            self._out.record(self._loaded[number])

        if isinstance(given, Array):
            load(*steps[0])
        for n, (number, lo, count) in enumerate(steps):
            box = self._view(number, count, array.dtype)
            if not isinstance(given, Array):
                self._stored[number].synchronize()
                if given is not None:
                    box[:] = given[lo : lo + count]
            else:
                if steps[n + 1 :]:
                    load(*steps[n + 1])
                self._loaded[number].synchronize()
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
        runtime = cupy().cuda.runtime
        for stream in (self._out, self._back):
            with suppress(runtime.CUDARuntimeError):  # at the end of the program CUDA may be gone before MPI
                stream.synchronize()
        with suppress(runtime.CUDARuntimeError):
            if self._registered:
                runtime.hostUnregister(self._memory.ctypes.data)


def boxes(memory: np.ndarray | None, device: int) -> Boxes:
    """In this host memory, of so many bytes, if its pages can be locked, else in memory of CuPy's pool."""
    with cupy().cuda.Device(device):
        if memory is not None and register(memory):
            return Boxes(memory, device, registered=True)
        return Boxes(pinned(BOXES * BOX), device)


# ---- which GPU


class Gpu(NamedTuple):
    """The one that a rank has: its number among those that the process sees, what it is, and all ranks that have it."""

    number: int
    name: str
    identity: str
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
    return found._replace(
        ranks=tuple(rank for rank, (other, _) in enumerate(everyone) if other.identity == found.identity)
    )


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
        name, unique, bus = identity(number)
    except runtime.CUDARuntimeError as error:
        raise UserError(f"there is no GPU to be used here ({error})") from None
    return Gpu(number, name, unique, bus, ())


def identity(number: int) -> tuple[str, str, str]:
    """The name, what no other GPU has, and the PCI address of a device of this process."""
    runtime = cupy().cuda.runtime
    properties, bus = runtime.getDeviceProperties(number), runtime.deviceGetPCIBusId(number)
    uuid = bytes(properties["uuid"]).hex()  # which CuPy cuts off at its first byte of 0
    return properties["name"].decode(), f"{MPI.Get_processor_name()} {bus} {uuid}", bus


def count() -> int:
    """Devices that this process sees."""
    return int(cupy().cuda.runtime.getDeviceCount())


# ---- kernels


@lru_cache
def compiled(text: str, name: str, options: tuple[str, ...], device: int) -> Any:
    """A kernel, compiled for a device; CuPy keeps it on disk for the next program."""
    kernel = cupy().RawKernel(text, name, options)
    with cupy().cuda.Device(device):
        kernel.compile()
    return kernel


@lru_cache
def processors(device: int) -> int:
    """How many of them the GPU has."""
    return int(cupy().cuda.runtime.getDeviceProperties(device)["multiProcessorCount"])


def launch(
    array: Array, text: str, name: str, options: tuple[str, ...], grid: int, block: int, arguments: tuple[Any, ...]
) -> None:
    """On the device and the stream of an array: so many blocks of so many threads."""
    with on(array):
        compiled(text, name, options, array.device)((grid,), (block,), arguments)


# ---- arrays of other processes


class Allocation(NamedTuple):
    """Memory that the driver has given at once: its number, which is never given again, its address, its bytes, and
    the device where it is."""

    number: int
    base: int
    size: int
    device: int


class _Pointer(NamedTuple):
    """What the CUDA driver knows of a pointer; nothing of one to host memory that CUDA has not made."""

    kind: int = 0
    base: int = 0
    size: int = 0
    number: int = 0
    capable: int = 0  # of being opened by other processes


_DEVICE = 2  # CU_MEMORYTYPE_DEVICE


def allocation(array: Array) -> Allocation | None:
    """The one that an array lies in; none if it cannot be opened by other processes, as managed memory cannot."""
    _, base, size, number, capable = _attributes(array.pointer)
    if not capable or array.pointer + array.nbytes > base + size:
        return None
    return Allocation(number + 1, base, size, array.device)


def _attributes(pointer: int) -> _Pointer:
    """CuPy does not say, the driver does."""
    import ctypes  # takes milliseconds

    driver = _driver()
    if driver is None:
        return _Pointer()
    values = ctypes.c_uint(), ctypes.c_uint64(), ctypes.c_uint64(), ctypes.c_uint64(), ctypes.c_int()
    # MEMORY_TYPE, RANGE_START_ADDR, RANGE_SIZE, BUFFER_ID, IS_LEGACY_CUDA_IPC_CAPABLE
    asked = (ctypes.c_int * 5)(2, 11, 12, 7, 10)
    into = (ctypes.c_void_p * 5)(*map(ctypes.addressof, values))
    error = driver.cuPointerGetAttributes(5, asked, into, ctypes.c_uint64(pointer))
    return _Pointer() if error else _Pointer(*(value.value for value in values))


@lru_cache
def _driver() -> Any:
    import ctypes

    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None


def _rocm() -> bool:
    """Is the library of AMD's GPUs loaded in this process?"""
    import ctypes

    for version in range(5, 9):
        with suppress(OSError):
            ctypes.CDLL(f"libamdhip64.so.{version}", mode=os.RTLD_NOLOAD | os.RTLD_NOW)
            return True
    return False


def ipc_refusal() -> str:
    """Why arrays of other processes cannot be opened here, if so."""
    if cupy().cuda.runtime.is_hip:
        return "this is ROCm, and CUDA IPC is meant"
    return "" if _driver() else "the CUDA driver, libcuda.so.1, cannot be loaded"


def handle(allocation: Allocation) -> bytes | None:
    """By which another process can open it; ``None`` if the driver has none."""
    runtime = cupy().cuda.runtime
    try:
        with cupy().cuda.Device(allocation.device):
            return bytes(runtime.ipcGetMemHandle(allocation.base))
    except runtime.CUDARuntimeError:
        return None


def opened(handle: bytes, device: int) -> int | None:
    """Where another process' allocation begins in this one's addresses; ``None`` if it cannot be reached from the
    device."""
    runtime = cupy().cuda.runtime
    try:
        with cupy().cuda.Device(device):
            return int(runtime.ipcOpenMemHandle(handle))
    except runtime.CUDARuntimeError:
        return None


def close(base: int, device: int) -> None:
    """The opposite; what is under way there has ended."""
    runtime = cupy().cuda.runtime
    with suppress(runtime.CUDARuntimeError), cupy().cuda.Device(device):  # its process may be gone
        runtime.ipcCloseMemHandle(base)


# ---- NCCL

_NCCL_TYPES = {
    "int8": "INT8",
    "uint8": "UINT8",
    "int32": "INT32",
    "uint32": "UINT32",
    "int64": "INT64",
    "uint64": "UINT64",
    "float16": "FLOAT16",
    "bfloat16": "BFLOAT16",
    "float32": "FLOAT32",
    "float64": "FLOAT64",
}
_NCCL_OPERATIONS = {"sum": "SUM", "mean": "SUM", "prod": "PROD", "max": "MAX", "min": "MIN", "move": "SUM"}


def _nccl() -> Any:
    """CuPy's module, which warns when it is imported and there is no library."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from cupy.cuda import nccl
    return nccl


def nccl_missing() -> str:
    """Why there is no NCCL, if so."""
    try:
        return "" if _nccl().available else "NCCL cannot be loaded: pip install nvidia-nccl-cu13, or cu12"
    except ImportError as error:
        return f"CuPy was built without NCCL ({error})"


def nccl_refusal(row: Collective, operation: str, dtype: np.dtype) -> str:
    """Why NCCL cannot do it, if so."""
    if row.nccl is None:
        return f"NCCL has no {row.name}"
    return "" if operation in _NCCL_OPERATIONS and dtype.name in _NCCL_TYPES else f"NCCL has no {operation} of {dtype}"


def nccl_id() -> Any:
    """By which ranks find each other."""
    return _nccl().get_unique_id()


def nccl_communicator(device: int, p: int, number: Any, rank: int) -> Any:
    """One for as many ranks, each with a device of its own; all make it together."""
    with cupy().cuda.Device(device):
        return _nccl().NcclCommunicator(p, number, rank)


def by_nccl(
    communicator: Any, row: Collective, given: Array | None, taken: Array | None, operation: str, root: int
) -> None:
    """Have it done, on the stream of what is given and taken, which is the same; ``root`` is a rank."""
    nccl, array = _nccl(), taken if given is None else given
    assert array is not None
    assert row.nccl is not None
    send, recv = array.pointer, array.pointer if taken is None else taken.pointer
    count = taken.size if row.receives_part and taken is not None else array.size
    kind = getattr(nccl, f"NCCL_{_NCCL_TYPES[array.dtype.name]}")
    op = getattr(nccl, f"NCCL_{_NCCL_OPERATIONS[operation]}")
    with on(array):
        row.nccl(communicator, send, recv, count, kind, op, root, array.stream.ptr)
