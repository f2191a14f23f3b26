"""Functions of the module cupy."""

import types
from typing import Any

import numpy as np

from .arrays import array, call, ndarray
from .names import ABSENT, LACKING


class Functions(types.ModuleType):
    """What NumPy has, by its name, where CuPy has it too."""

    def __init__(self, name: str, numpy: Any) -> None:
        super().__init__(name)
        self._numpy = numpy

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ABSENT or not hasattr(self._numpy, name):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        found = getattr(self._numpy, name)
        if isinstance(found, types.ModuleType):
            raise AttributeError(f"nobody has needed {self.__name__}.{name} so far: it is not here")
        if isinstance(found, type) or not callable(found):
            return found

        def function(*args: Any, **kwargs: Any) -> Any:
            for argument in LACKING.get(name, "").split():
                if argument in kwargs:
                    raise TypeError(f"{name}() got an unexpected keyword argument {argument!r}")
            return call(found, args, kwargs, name)

        return function


def empty(shape: Any, dtype: Any = float, order: str = "C") -> ndarray:
    return ndarray(shape, dtype, order=order)


def empty_like(prototype: Any, dtype: Any = None, order: str = "K", subok: Any = None, shape: Any = None) -> ndarray:
    fortran = order == "F" or (order in "KA" and prototype.flags.fnc)
    shape = prototype.shape if shape is None else shape
    return ndarray(shape, prototype.dtype if dtype is None else dtype, order="F" if fortran else "C")


def asarray(a: Any, dtype: Any = None, order: Any = None, *, blocking: bool = False) -> ndarray:
    return array(a, dtype, False, order or "K")


def ascontiguousarray(a: Any, dtype: Any = None) -> ndarray:
    made = asarray(a, dtype)
    return made if made.flags.c_contiguous else made.copy("C")


def asnumpy(a: Any, stream: Any = None, order: Any = "C", out: Any = None, *, blocking: bool = True) -> np.ndarray:
    return a.get(stream, order, out, blocking) if isinstance(a, ndarray) else np.asarray(a, order=order)


def from_dlpack(array: Any, *, device: Any = None, copy: Any = None) -> ndarray:
    if not isinstance(array, ndarray):
        raise TypeError("CPU arrays cannot be directly imported to CuPy. Use `cupy.array(numpy.from_dlpack(input))`")
    return array._like(array._hidden)


def copyto(dst: ndarray, src: Any, casting: str = "same_kind", where: Any = None) -> None:
    if isinstance(src, np.ndarray) and src.ndim:
        raise ValueError("non-scalar numpy.ndarray cannot be used for copyto")
    call(np.copyto, (dst, src, casting), {} if where is None else {"where": where}, mixed=True)
