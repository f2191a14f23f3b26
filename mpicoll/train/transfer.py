"""Copies between host memory and a GPU, for arrays that may be in either."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import UserError

if TYPE_CHECKING:  # the command line lists the strategies, which copy, without starting MPI
    from .data import Dataset, Part


def synchronize(x: Any) -> None:
    """Wait until this rank's GPU has done all its work, if the array is on a GPU."""
    if not isinstance(x, np.ndarray):
        x.device.synchronize()


def ordinary(nbytes: int) -> np.ndarray:
    """Return zeroed host memory of this number of bytes."""
    return np.zeros(nbytes, np.uint8)


def memory_for(x: Any) -> Callable[[int], np.ndarray]:
    """An allocator of zeroed host memory, by bytes, for copies of the array ``x``.

    For an array on a GPU the memory is page-locked: copies of other memory are slow, and the host waits for them.
    """

    def locked(nbytes: int) -> np.ndarray:
        from ..mpi.gpu import staging

        memory = staging.pinned(nbytes)
        memory[:] = 0
        return memory

    return ordinary if isinstance(x, np.ndarray) else locked


def load(host: np.ndarray, x: Any) -> None:
    """Copy an array to host memory; from a GPU the copy is complete only after ``synchronize``."""
    if not isinstance(x, np.ndarray):
        from ..mpi.gpu.array import Array

        Array(x).load(host)
    elif x is not host:
        host[:] = x


def store(x: Any, host: np.ndarray) -> None:
    """Copy host memory to an array; for one on a GPU ``host`` must not change before ``synchronize``."""
    if not isinstance(x, np.ndarray):
        from ..mpi.gpu.array import Array

        Array(x).store(host)
    elif x is not host:
        x[:] = host


def fetched(x: Any) -> np.ndarray:
    """Return the array itself if it is in host memory, otherwise a complete copy there."""
    if isinstance(x, np.ndarray):
        return x
    from ..mpi.gpu import staging
    from ..mpi.gpu.array import Array

    return staging.staged(Array(x), load=True)


def on_gpu(data: "Dataset", dtype: np.dtype, arrays: Any, own_features: Callable[[Any], Any]) -> "Dataset":
    """Copy the data set to the GPU, after a test that the GPU can multiply matrices.

    Only ``own_features`` of the samples are copied; if that needs a copy in host memory, there is one at a time.
    ``arrays`` is CuPy.
    """
    from ..mpi.gpu import sparse

    try:
        square = arrays.ones((2, 2), dtype)
        float((square @ square).sum())  # CuPy comes without what multiplies matrices, and finds it when it has to

        def moved(part: "Part") -> "Part":
            x = own_features(part.x)
            x = arrays.asarray(x) if isinstance(x, np.ndarray) else sparse.to_device(x)
            return part._replace(x=x, y=arrays.asarray(part.y))

        return data.mapped(moved)
    except MemoryError as error:
        raise UserError(
            f"the data are too large for the memory of the GPU ({error}): take --shards, or --device cpu"
        ) from error
    except (ImportError, RuntimeError) as error:
        why = " ".join(str(error).split())
        raise UserError(
            f"CuPy cannot compute here ({why}): if a library is missing, pip install 'cupy-cuda13x[ctk]', or cuda12x"
        ) from error
