"""NCCL, through CuPy."""

import warnings
from typing import Any

import numpy as np

from ...collective import Collective
from .array import Array, cupy, on

_TYPES = {
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
_OPERATIONS = {"sum": "SUM", "mean": "SUM", "prod": "PROD", "max": "MAX", "min": "MIN", "move": "SUM"}


def _nccl() -> Any:
    """CuPy's module, which warns when it is imported and there is no library."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from cupy.cuda import nccl
    return nccl


def missing() -> str:
    """Why there is no NCCL; empty if there is."""
    try:
        return "" if _nccl().available else "NCCL cannot be loaded: pip install nvidia-nccl-cu13, or cu12"
    except ImportError as error:
        return f"CuPy was built without NCCL ({error})"


def refusal(row: Collective, operation: str, dtype: np.dtype) -> str:
    """Why NCCL has no such collective; empty if it has."""
    if row.nccl is None:
        return f"NCCL has no {row.name}"
    return "" if operation in _OPERATIONS and dtype.name in _TYPES else f"NCCL has no {operation} of {dtype}"


def unique_id() -> Any:
    """A new identifier by which ranks find each other."""
    return _nccl().get_unique_id()


def communicator(device: int, p: int, number: Any, rank: int) -> Any:
    """A communicator of ``p`` ranks, each with a device of its own; all ranks make it together."""
    with cupy().cuda.Device(device):
        return _nccl().NcclCommunicator(p, number, rank)


def run(communicator: Any, row: Collective, send: Array | None, recv: Array | None, operation: str, root: int) -> None:
    """Put a collective on the stream of its arrays, which have the same one; ``root`` is a rank."""
    nccl, array = _nccl(), recv if send is None else send
    assert array is not None
    assert row.nccl is not None
    pointers = array.pointer, array.pointer if recv is None else recv.pointer
    count = recv.size if row.receives_part and recv is not None else array.size
    kind = getattr(nccl, f"NCCL_{_TYPES[array.dtype.name]}")
    op = getattr(nccl, f"NCCL_{_OPERATIONS[operation]}")
    with on(array):
        row.nccl(communicator, *pointers, count, kind, op, root, array.stream.ptr)
