"""Kernels compiled and launched, from the text that ``kernel`` makes."""

from functools import lru_cache
from typing import Any

import numpy as np

from ..operations import Operation
from . import kernel
from .array import Array, cupy, on


@lru_cache
def compiled(text: str, device: int) -> Any:
    """A kernel compiled for a device; CuPy keeps it on disk for the next program."""
    made = cupy().RawKernel(text, kernel.NAME, kernel.OPTIONS)
    with cupy().cuda.Device(device):
        made.compile()
    return made


@lru_cache
def processors(device: int) -> int:
    """The number of multiprocessors of a GPU."""
    return int(cupy().cuda.runtime.getDeviceProperties(device)["multiProcessorCount"])


def launch(array: Array, text: str, grid: int, block: int, arguments: tuple[Any, ...]) -> None:
    """Launch ``grid`` blocks of ``block`` threads on the device and the stream of an array."""
    with on(array):
        compiled(text, array.device)((grid,), (block,), arguments)


def finish(array: Array, operation: Operation, p: int) -> None:
    """Finish a result that ``kernel`` has not made, such as a mean: a sum is divided by ``p``."""
    width = kernel.width([array.pointer], 0, array.dtype.itemsize)
    text = kernel.source(operation.name, array.dtype, 1, 1, width, p)
    grid, block = kernel.shape(array.size, width, array.dtype.itemsize, processors(array.device))
    at, ends = np.uint64(array.pointer), (np.int64(0), np.int64(array.size))
    if array.size:  # a part may be empty
        launch(array, text, grid, block, (at, at, *ends))
