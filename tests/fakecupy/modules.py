"""The modules that ``import cupy`` finds."""

import os
import types
from typing import Any

import numpy as np

from . import arrays, functions, host, kernels, nccl, now, pool, runtime, sparse, streams


def modules() -> dict[str, Any]:
    cuda = _module("cupy.cuda", streams, "Device Event Stream ExternalStream get_current_stream get_elapsed_time")
    _have(cuda, pool, "MemoryPointer MemoryPool alloc malloc_managed malloc_async set_allocator using_allocator")
    _have(cuda, host, "alloc_pinned_memory")
    _have(cuda, runtime, "runtime")
    cuda.__path__, cuda.is_available = [], lambda: bool(now.fake.gpus)

    cupy: Any = functions.Functions("cupy", np)
    cupy.__path__, cupy.__version__, cupy.cuda = [], "14.2.0", cuda
    cupy.linalg = functions.Functions("cupy.linalg", np.linalg)
    cupy.get_default_memory_pool = lambda: pool.default_pool
    _have(cupy, arrays, "ndarray array")
    _have(cupy, functions, "empty empty_like asarray ascontiguousarray asnumpy from_dlpack copyto")
    _have(cupy, kernels, "RawKernel")

    found = {
        "cupy": cupy,
        "cupy.cuda": cuda,
        "cupy.cuda.runtime": runtime.runtime,
        "cupy.cuda.nccl": _nccl(),  # as in CuPy, an attribute of ``cupy.cuda`` only once somebody has imported it
        "cupyx": types.ModuleType("cupyx"),
        "cupyx.scipy": types.ModuleType("cupyx.scipy"),
        "cupyx.scipy.sparse": _module("cupyx.scipy.sparse", sparse, "csr_matrix csc_matrix"),
    }
    found["cupyx"].__path__ = found["cupyx.scipy"].__path__ = []
    return found


def _nccl() -> Any:
    module = _module("cupy.cuda.nccl", nccl, "NcclCommunicator NcclError")
    module.available, module.get_version = True, lambda: 22800
    module.get_unique_id = lambda: tuple(np.frombuffer(os.urandom(128), np.int8))
    for names in (nccl.NCCL_TYPES, nccl.NCCL_OPERATIONS):
        module.__dict__.update({f"NCCL_{name}": number for number, name in enumerate(names)})
    return module


def _module(name: str, source: Any, names: str) -> Any:
    module = types.ModuleType(name)
    _have(module, source, names)
    return module


def _have(module: Any, source: Any, names: str) -> None:
    for name in names.split():
        setattr(module, name, getattr(source, name))
