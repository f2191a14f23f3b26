"""Kernels, which do what a test says."""

from typing import Any

import numpy as np

from . import now
from .arrays import ndarray
from .errors import CUDARuntimeError
from .streams import get_current_stream


class RawKernel:
    """Compiles nothing: what it does is what ``Fake.kernels`` has for its name."""

    def __init__(
        self,
        code: str,
        name: str,
        options: tuple[str, ...] = (),
        backend: str = "nvrtc",
        translate_cucomplex: bool = False,
        *,
        enable_cooperative_groups: bool = False,
        jitify: Any = None,
    ) -> None:
        if not isinstance(options, tuple):
            raise TypeError("Argument 'options' has incorrect type (expected tuple)")
        self.code, self.name, self.options = code, name, options

    def compile(self, log_stream: Any = None) -> None:
        """Does nothing."""

    def __call__(self, grid: tuple, block: tuple, args: tuple, *, shared_mem: int = 0, stream: Any = None) -> None:
        if self.name not in now.fake.kernels:
            raise KeyError(f"no test has said what the kernel {self.name!r} does")
        if not (isinstance(grid, tuple) and isinstance(block, tuple)):
            raise TypeError("grid and block are tuples")
        if min(*grid, *block, 1) < 1 or np.prod(block) > 1024:
            raise CUDARuntimeError("cudaErrorInvalidValue")
        for x in args:
            if not isinstance(x, (int, float, complex, bool, np.generic, ndarray)):
                raise TypeError(f"Unsupported type {type(x)}")
        numbers = tuple(x.data.ptr if isinstance(x, ndarray) else x for x in args)
        function, code = now.fake.kernels[self.name], self.code
        now.fake.queue((stream or get_current_stream()).ptr).put(lambda: function(code, grid, block, numbers))
