"""Staging: arrays on GPUs through page-locked host memory."""

from collections.abc import Callable
from contextlib import suppress
from threading import Lock
from typing import Any

import numpy as np

from .array import Array, cupy

BUFFER = 4 << 20
"""Bytes of a staging buffer, and so of a piece of an array."""

BUFFERS = 3  # one piece comes from the GPU, one is with MPI, one goes back

# Events and memory: CuPy's pool would hand the memory out again, pending copies or not.
_in_use: list[tuple[Any, np.ndarray]] = []
_using = Lock()


# ---- all of an array at once


def pinned(nbytes: int) -> np.ndarray:
    """Page-locked host memory from CuPy's pool: copies of other memory are slow, and the host waits for them."""
    with _using:
        _in_use[:] = [(event, memory) for event, memory in _in_use if not event.done]
    return np.frombuffer(cupy().cuda.alloc_pinned_memory(max(nbytes, 1)), np.uint8, nbytes)


def staged(array: Array, load: bool) -> np.ndarray:
    """Page-locked host memory for an array; with ``load`` a complete copy of it, else with arbitrary contents."""
    with cupy().cuda.Device(array.device):
        host = pinned(array.nbytes).view(array.dtype)
    if load:
        array.load(host)
        array.synchronize()
    return host


def deliver(host: np.ndarray, array: Array) -> None:
    """Start a copy of page-locked host memory to an array; the memory is kept until the copy is complete."""
    array.store(host)
    with _using:
        _in_use.append((array.record(), host))
    array.settle()


def fill(array: Array, source: Array | np.ndarray) -> None:
    """Start a copy to all of an array, from one on the same device and stream, or from any host memory."""
    if isinstance(source, Array):
        array.copy_from(source)
    else:
        host = staged(array, load=False)
        host[:] = source
        deliver(host, array)


# ---- piece by piece


def pieces(count: int, dtype: np.dtype, nbytes: int) -> list[tuple[int, int]]:
    """Pieces of ``count`` elements, each of ``nbytes`` at most: the first element, and how many."""
    length = max(nbytes // dtype.itemsize, 1)
    return [(lo, min(length, count - lo)) for lo in range(0, count, length)]


def register(memory: np.ndarray) -> bool:
    """Lock the pages of host memory; false if that cannot be done."""
    runtime = cupy().cuda.runtime
    try:
        runtime.hostRegister(memory.ctypes.data, memory.nbytes, 1)  # for all devices of this process
    except runtime.CUDARuntimeError:
        return False
    return True


class StagingBuffers:
    """Page-locked buffers that arrays of any length pass through piece by piece.

    While one piece is with MPI, the next comes from the GPU, and the one before goes back to it.  A copy may still be
    pending when a call returns, and so the memory is kept until ``release``.
    """

    def __init__(self, memory: np.ndarray, device: int, registered: bool = False) -> None:
        size = len(memory) // BUFFERS
        self._memory, self._registered = memory, registered
        self._buffers = [memory[n * size : (n + 1) * size] for n in range(BUFFERS)]
        self._device: int | None = None
        self._out: Any = None
        self._back: Any = None
        self._use(device)

    def _use(self, device: int) -> None:
        """Make streams and events for a device."""
        if device == self._device:
            return
        if self._device is not None:
            self._back.synchronize()
        cuda = cupy().cuda
        with cuda.Device(device):
            self._out, self._back = (cuda.Stream(non_blocking=True) for _ in range(2))
            self._loaded, self._stored = ([cuda.Event(disable_timing=True) for _ in range(BUFFERS)] for _ in range(2))
        self._device = device

    def through(
        self, send: Array | np.ndarray | None, recv: Array | np.ndarray | None, do: Callable[[np.ndarray], None]
    ) -> None:
        """Call ``do`` with each piece of ``send`` in host memory, and copy what it leaves there to ``recv``.

        Without ``send`` a piece has arbitrary contents.  An array in host memory is copied by the host.  The host waits
        for each piece of ``send`` to arrive, or, without one on a GPU, for each buffer to be free; the GPU starts a
        copy to a buffer only when its previous piece has left.
        """
        array = next(one for one in (send, recv) if isinstance(one, Array))
        self._use(array.device)
        with cupy().cuda.Device(array.device):
            self._through(array, send, recv, do)

    def _through(
        self,
        array: Array,
        send: Array | np.ndarray | None,
        recv: Array | np.ndarray | None,
        do: Callable[[np.ndarray], None],
    ) -> None:
        cut = pieces(array.size, array.dtype, len(self._buffers[0]))
        steps = [(n % BUFFERS, lo, count) for n, (lo, count) in enumerate(cut)]
        for stream, one in ((self._out, send), (self._back, recv)):
            if isinstance(one, Array):
                stream.wait_event(one.record())  # what was put there before the call comes first

        def load(number: int, lo: int, count: int) -> None:
            assert isinstance(send, Array)
            self._out.wait_event(self._stored[number])
            send.load(self._view(number, count, array.dtype), lo, self._out)
            self._out.record(self._loaded[number])

        if isinstance(send, Array):
            load(*steps[0])
        for n, (number, lo, count) in enumerate(steps):
            piece = self._view(number, count, array.dtype)
            if not isinstance(send, Array):
                self._stored[number].synchronize()
                if send is not None:
                    piece[:] = send[lo : lo + count]
            else:
                if steps[n + 1 :]:
                    load(*steps[n + 1])
                self._loaded[number].synchronize()
            do(piece)
            if isinstance(recv, Array):
                recv.store(piece, lo, self._back)
                self._back.record(self._stored[number])
            elif recv is not None:
                recv[lo : lo + count] = piece
        if isinstance(recv, Array):
            recv.stream.wait_event(self._back.record())  # what is put there after the call comes last

    def _view(self, number: int, count: int, dtype: np.dtype) -> np.ndarray:
        return self._buffers[number][: count * dtype.itemsize].view(dtype)

    def release(self) -> None:
        """Wait for pending copies, and unlock the memory."""
        runtime = cupy().cuda.runtime
        for stream in (self._out, self._back):
            with suppress(runtime.CUDARuntimeError):  # at the end of the program CUDA may have ended before MPI
                stream.synchronize()
        with suppress(runtime.CUDARuntimeError):
            if self._registered:
                runtime.hostUnregister(self._memory.ctypes.data)


def allocate(memory: np.ndarray | None, device: int) -> StagingBuffers:
    """Staging buffers in this host memory if its pages can be locked, else in memory of CuPy's pool."""
    with cupy().cuda.Device(device):
        if memory is not None and register(memory):
            return StagingBuffers(memory, device, registered=True)
        return StagingBuffers(pinned(BUFFERS * BUFFER), device)
