"""Arrays: what NumPy computes, when the current stream gets there."""

import functools
import operator
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from . import now
from .errors import CUDARuntimeError
from .host import address, copy
from .names import ABOUT, ABSENT, METHODS, VIEWS, WAITING
from .pool import MemoryPointer, alloc
from .runtime import runtime
from .streams import Device, get_current_stream


class Flags:
    """No ``writeable``, and no ``aligned``: CuPy's have none."""

    def __init__(self, flags: Any, owndata: bool) -> None:
        self.c_contiguous, self.f_contiguous, self.owndata = flags.c_contiguous, flags.f_contiguous, owndata
        self.forc, self.fnc = flags.forc, flags.fnc

    def __getitem__(self, name: str) -> bool:
        return getattr(self, name.lower())


class ndarray(np.lib.mixins.NDArrayOperatorsMixin):  # noqa: N801
    __array_priority__ = 100

    def __init__(
        self, shape: Any, dtype: Any = float, memptr: Any = None, strides: Any = None, order: Any = "C"
    ) -> None:
        template = np.broadcast_to(np.empty((), dtype), shape)
        self.data = alloc(template.nbytes) if memptr is None else memptr
        self.base: ndarray | None = None
        memory = now.fake.memory_at(self.data.ptr, template.nbytes) if template.nbytes else np.empty(0, np.uint8)
        self._hidden = np.ndarray(template.shape, template.dtype, memory, 0, strides, order)

    def _like(self, hidden: np.ndarray) -> "ndarray":
        """A view."""
        view = object.__new__(type(self))
        start = address(hidden) - address(self._hidden)
        view.data = MemoryPointer(self.data.mem, self.data.ptr - (self.data.mem.ptr if self.data.mem else 0) + start)
        view.base, view._hidden = self if self.base is None else self.base, hidden
        return view

    dtype = property(lambda self: self._hidden.dtype)
    shape = property(lambda self: self._hidden.shape)
    size = property(lambda self: self._hidden.size)
    nbytes = property(lambda self: self._hidden.nbytes)
    itemsize = property(lambda self: self._hidden.itemsize)
    ndim = property(lambda self: self._hidden.ndim)
    strides = property(lambda self: self._hidden.strides)
    flags = property(lambda self: Flags(self._hidden.flags, self.base is None))
    device = property(lambda self: Device(self.data.device_id))
    T = property(lambda self: self._like(self._hidden.T))

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {
            "shape": self.shape,
            "typestr": self.dtype.str,
            "descr": self.dtype.descr,
            "strides": None if self.flags.c_contiguous else self.strides,
            "data": (self.data.ptr, False),
            "stream": get_current_stream().ptr or 1,
            "version": 3,
        }

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, self.device.id

    def __dlpack__(self, **kwargs: object) -> None:
        raise BufferError("a consumer would follow a pointer to a device")

    def __array__(self, dtype: Any = None, copy: Any = None) -> None:
        raise TypeError(
            "Implicit conversion to a NumPy array is not allowed. Please use `.get()` to construct a NumPy array "
            "explicitly."
        )

    def __reduce__(self) -> Any:
        return array, (self.get(),)

    def __len__(self) -> int:
        return len(self._hidden)

    def __repr__(self) -> str:
        return repr(self.get())

    def __iter__(self) -> Iterator["ndarray"]:
        return (self[n] for n in range(len(self)))

    # reading, which waits

    def get(self, stream: Any = None, order: str = "C", out: Any = None, blocking: bool = True) -> np.ndarray:
        if out is not None:
            if not isinstance(out, np.ndarray):
                raise TypeError("Only numpy.ndarray can be obtained from cupy.ndarray")
            if self.dtype != out.dtype:
                raise TypeError(f"{self.dtype} array cannot be obtained to {out.dtype} array")
            if self.shape != out.shape:
                raise ValueError(f"Shape mismatch. Expected shape: {self.shape}, actual shape: {out.shape}")
            if not out.flags.forc:
                raise RuntimeError("`out` cannot be specified when copying to non-contiguous ndarray")
        with self.device:
            queue = now.fake.queue((stream or get_current_stream()).ptr)
            host = np.empty(self.shape, self.dtype, "F" if order == "F" else "C") if out is None else out
            if blocking:
                now.fake.log.append("get")
                hidden = self._hidden
                queue.put(lambda: np.copyto(host, hidden))
                queue.run()
            else:
                copy(host, self._hidden, host, queue)
        return host

    def set(self, arr: np.ndarray, stream: Any = None) -> None:
        if not isinstance(arr, np.ndarray):
            raise TypeError("Only numpy.ndarray can be set to cupy.ndarray")
        if self.dtype != arr.dtype:
            raise TypeError(f"{arr.dtype} array cannot be set to {self.dtype} array")
        if self.shape != arr.shape:
            raise ValueError(f"Shape mismatch. Old shape: {self.shape}, new shape: {arr.shape}")
        if not self.flags.forc:
            raise RuntimeError("Cannot set to non-contiguous array")
        host = np.ascontiguousarray(arr) if self.flags.c_contiguous else np.asfortranarray(arr)
        with self.device:
            queue = now.fake.queue((stream or get_current_stream()).ptr)
            copy(self._hidden, host, host, queue)

    def item(self, *args: Any) -> Any:
        return self.get().item(*args)

    def tolist(self) -> Any:
        return self.get().tolist()

    def __bool__(self) -> bool:
        return bool(self.get())

    def __int__(self) -> int:
        return int(self.get())

    def __float__(self) -> float:
        return float(self.get())

    def __complex__(self) -> complex:
        return complex(self.get())

    def __index__(self) -> int:
        return operator.index(self.get()[()])

    # all else is put on the current stream

    def __getitem__(self, key: Any) -> "ndarray":
        keys = key if isinstance(key, tuple) else (key,)
        if all(k is None or k is ... or isinstance(k, (int, np.integer, slice)) for k in keys):
            return self._like(self._hidden[(*keys, ...) if ... not in keys else keys])
        masks = [k for k in keys if isinstance(k, (np.ndarray, ndarray)) and k.dtype == np.bool_]
        return call(operator.getitem, (self, key), {}, waits=bool(masks), mixed=True)

    def __setitem__(self, key: Any, value: Any) -> None:
        if isinstance(value, np.ndarray) and value.ndim:
            raise ValueError("non-scalar numpy.ndarray cannot be used for fill")
        keys = key if isinstance(key, tuple) else (key,)
        if isinstance(value, ndarray) and not any(isinstance(k, (list, np.ndarray, ndarray)) for k in keys):
            call(np.copyto, (self[key], value, "unsafe"), {})
        else:
            call(operator.setitem, (self, key, value), {}, mixed=True)

    def fill(self, value: Any) -> None:
        self[...] = value

    def astype(
        self, dtype: Any, order: str = "K", casting: Any = None, subok: Any = None, copy: bool = True
    ) -> "ndarray":
        if not copy and self.dtype == np.dtype(dtype):
            return self
        return call(lambda hidden: hidden.astype(dtype, order), (self,), {})

    def copy(self, order: str = "C") -> "ndarray":
        return call(lambda hidden: hidden.copy(order), (self,), {})

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> Any:
        if ufunc.__name__ in ABSENT or method not in ("__call__", "reduce", "outer", "at"):
            return NotImplemented
        if "where" in kwargs:
            raise TypeError(f"Wrong arguments { ({'where': kwargs['where']}) }")
        return call(getattr(ufunc, method), inputs, kwargs)

    def __array_function__(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        try:
            path = func.__module__.split(".")[1:]
            function = getattr(functools.reduce(getattr, path, now.fake.modules["cupy"]), func.__name__)
        except AttributeError:
            return NotImplemented
        return function(*args, **kwargs) if all(issubclass(t, (ndarray, np.ndarray)) for t in types) else NotImplemented


def _method(name: str) -> Callable[..., Any]:
    def function(x: np.ndarray, *args: Any, **kwargs: Any) -> Any:
        return getattr(x, name)(*args, **kwargs)

    return lambda self, *args, **kwargs: call(function, (self, *args), kwargs, name)


for _name in METHODS:
    setattr(ndarray, _name, _method(_name))


def _replaced(x: Any, kind: type, how: Callable[[Any], Any]) -> Any:
    """Arguments, with all arrays of a kind replaced."""
    if isinstance(x, kind):
        return how(x)
    if type(x) in (list, tuple):
        return type(x)(_replaced(element, kind, how) for element in x)
    return {key: _replaced(value, kind, how) for key, value in x.items()} if type(x) is dict else x


def _refuse(x: np.ndarray) -> None:
    raise TypeError(f"Unsupported type {type(x)}")


def _on_current_device(x: ndarray) -> None:
    if x.device.id != runtime.getDevice():
        raise ValueError(
            f"Array device must be same as the current device: array device = {x.device.id} while current = "
            f"{runtime.getDevice()}"
        )
    if x.size and x.data.ptr % min(x.dtype.itemsize or 1, 8):
        raise CUDARuntimeError("cudaErrorMisalignedAddress")  # later, of the kernel


def call(
    function: Any, args: Any, kwargs: dict[str, Any], name: str = "", waits: bool = False, mixed: bool = False
) -> Any:
    """Have a function of NumPy's computed when the current stream gets there; ``mixed``: it takes host arrays, too."""
    name = name or getattr(function, "__name__", "")
    out = kwargs.pop("out", None)
    out = out[0] if isinstance(out, tuple) else out
    _replaced([args, kwargs, out] if not mixed else out, np.ndarray, _refuse)
    _replaced([args, kwargs, out], ndarray, _on_current_device)
    given = args
    # From here on there is no reference to the arrays: who drops them gives their memory back, whatever is pending.
    args, kwargs = _replaced(_replaced((args, kwargs), np.ndarray, np.copy), ndarray, lambda x: x._hidden)
    if out is not None:
        kwargs["out"] = out._hidden

    def compute(args: Any, kwargs: Any) -> Any:
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a GPU says nothing
            return function(*args, **kwargs)

    if name in ABOUT:
        return compute(args, kwargs)
    if name in VIEWS:
        views = _views(compute(args, kwargs), given[0])
        if views is not None:
            return views
    queue = now.fake.queue(get_current_stream().ptr)
    if waits or name in WAITING:
        now.fake.log.append("get")
        queue.run()
        found = compute(args, kwargs)
    else:
        found = compute(*_replaced((args, kwargs), np.ndarray, np.zeros_like))  # only to see what comes of it
    if found is None or out is not None:
        queue.put(lambda: compute(args, kwargs))
        return out
    many = type(found) in (tuple, list)
    made = [template(np.asarray(one)) for one in (found if many else [found])]
    targets = [x._hidden for x in made]

    def work() -> None:
        results = compute(args, kwargs)
        for target, result in zip(targets, results if many else [results], strict=True):
            np.copyto(target, result)

    queue.put(work)
    return type(found)(made) if many else made[0]


def _views(found: Any, of: Any) -> Any:
    """What NumPy has found, if it is in the same memory."""
    each = found if type(found) in (tuple, list) else [found]
    if not isinstance(of, ndarray) or not all(not one.size or np.may_share_memory(one, of._hidden) for one in each):
        return None
    return type(found)(map(of._like, each)) if each is found else of._like(found)


def template(x: np.ndarray) -> ndarray:
    """An array of the same shape, whose elements lie in memory in the same order."""
    return ndarray(x.shape, x.dtype, order="F" if x.flags.fnc else "C")


def array(
    obj: Any, dtype: Any = None, copy: bool = True, order: Any = "K", subok: bool = False, ndmin: int = 0
) -> ndarray:
    if hasattr(obj, "__cuda_array_interface__") and not isinstance(obj, ndarray):
        obj = adopted(obj)
    if isinstance(obj, ndarray):
        return obj.astype(obj.dtype if dtype is None else dtype, order, copy=copy)
    host = np.array(obj, dtype, order=order, ndmin=ndmin)  # a copy: what becomes of the original is of no account
    made = template(host)
    hidden = made._hidden
    now.fake.queue(get_current_stream().ptr).put(lambda: np.copyto(hidden, host))
    return made


class _Unowned:
    """Memory that another library's array keeps."""

    def __init__(self, owner: Any, pointer: int) -> None:
        self.owner, self.ptr, self.device_id = owner, pointer, runtime.getDevice()


def adopted(x: Any) -> ndarray:
    """A view of another library's array, whose stream is waited for."""
    told = x.__cuda_array_interface__
    if told.get("stream") is not None:
        now.fake.log.append("stream")
        now.fake.queue(0 if told["stream"] == 1 else told["stream"]).run()
    memory = MemoryPointer(_Unowned(x, told["data"][0]), 0)
    return ndarray(told["shape"], np.dtype(told["typestr"]), memory, told.get("strides"))
