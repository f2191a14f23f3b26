"""Kernels from their text: compiled, and launched."""

from functools import lru_cache
from typing import Any

from .array import Array, cupy, on


@lru_cache
def compiled(text: str, name: str, options: tuple[str, ...], device: int) -> Any:
    """A kernel compiled for a device; CuPy keeps it on disk for the next program."""
    kernel = cupy().RawKernel(text, name, options)
    with cupy().cuda.Device(device):
        kernel.compile()
    return kernel


@lru_cache
def processors(device: int) -> int:
    """The number of multiprocessors of a GPU."""
    return int(cupy().cuda.runtime.getDeviceProperties(device)["multiProcessorCount"])


def launch(
    array: Array, text: str, name: str, options: tuple[str, ...], grid: int, block: int, arguments: tuple[Any, ...]
) -> None:
    """Launch ``grid`` blocks of ``block`` threads on the device and the stream of an array."""
    with on(array):
        compiled(text, name, options, array.device)((grid,), (block,), arguments)
