"""The fake CuPy is faithful: what would be wrong on a GPU is wrong there, and what is right is right."""

import ctypes
import importlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import fakecupy
import numpy as np
import pytest


@pytest.fixture(params=fakecupy.MODES)
def fake(request: pytest.FixtureRequest) -> Iterator[fakecupy.Fake]:
    with fakecupy.installed(mode=request.param, devices=2) as made:
        yield made


@pytest.fixture
def lazy() -> Iterator[fakecupy.Fake]:
    with fakecupy.installed(devices=2) as made:
        yield made


@pytest.fixture
def cupy(request: pytest.FixtureRequest) -> Any:
    assert {"fake", "lazy"} & set(request.fixturenames)
    return importlib.import_module("cupy")


def pinned(cupy: Any, values: list[float]) -> np.ndarray:
    host = np.frombuffer(cupy.cuda.alloc_pinned_memory(8 * len(values)), float, len(values))
    host[:] = values
    return host


# ---- order.  Programs give 1 if they are right; (lazy, eager) is what they give.


def waits(cupy: Any, wait: bool) -> float:
    """Reads on the host what a copy brings there."""
    host = pinned(cupy, [0])
    cupy.ones(1).get(out=host, blocking=False)
    if wait:
        cupy.cuda.get_current_stream().synchronize()
    return host[0]


def waits_for_event(cupy: Any, wait: bool) -> float:
    """Reads on one stream what another writes."""
    x, other, mine = cupy.zeros(1), cupy.cuda.Stream(non_blocking=True), cupy.cuda.Stream(non_blocking=True)
    other.wait_event(cupy.cuda.Stream.null.record())
    with other:
        x += 1
    mine.wait_event(other.record() if wait else cupy.cuda.Stream.null.record())
    with mine:
        return x.item()


def keeps_box(cupy: Any, wait: bool) -> float:
    """Fills host memory again, from which a copy may be on its way."""
    host, x = pinned(cupy, [1]), cupy.zeros(1)
    x.set(host)
    if wait:
        cupy.cuda.get_current_stream().synchronize()
    host[:] = 2
    return x.item()


def keeps_box_alive(cupy: Any, wait: bool) -> float:
    """Drops host memory, from which a copy may be on its way."""
    host, x = pinned(cupy, [1]), cupy.zeros(1)
    x.set(host)
    if wait:
        cupy.cuda.get_current_stream().synchronize()
    del host
    return float(np.nan_to_num(x.item(), nan=3))


def fills_first(cupy: Any, right: bool) -> float:
    """Fills host memory, and has it copied."""
    host, x = pinned(cupy, [5]), cupy.zeros(1)
    if right:
        host[:] = 1
    x.set(host)
    host[:] = 1
    return x.item()


def records_last(cupy: Any, right: bool) -> float:
    """Has an event for what was put on a stream."""
    host, event = pinned(cupy, [0]), cupy.cuda.Event(disable_timing=True)
    x = cupy.ones(1)
    if not right:
        event.record()
    x.get(out=host, blocking=False)
    if right:
        event.record()
    event.synchronize()
    return host[0]


def keeps_array(cupy: Any, wait: bool) -> float:
    """Drops an array that another stream reads."""
    x, host, other = cupy.ones(1), pinned(cupy, [0]), cupy.cuda.Stream(non_blocking=True)
    other.wait_event(cupy.cuda.Stream.null.record())
    x.get(stream=other, out=host, blocking=False)
    if wait:
        cupy.cuda.Stream.null.wait_event(other.record())
    del x
    cupy.full(1, 4.0).get()  # takes its place
    other.synchronize()
    return host[0]


@pytest.mark.parametrize(
    ("program", "lazily", "eagerly"),
    [
        (waits, 0, 1),
        (waits_for_event, 0, 1),
        (keeps_box, 2, 1),
        (keeps_box_alive, 3, 1),
        (fills_first, 1, 5),
        (records_last, 0, 1),
        (keeps_array, 4, 1),
    ],
)
def test_wrong_order_is_a_wrong_number(fake, cupy, program: Callable[[Any, bool], float], lazily, eagerly):
    assert program(cupy, True) == 1
    if fake.mode != "random":
        assert program(cupy, False) == {"lazy": lazily, "eager": eagerly}[fake.mode]


def test_chance_finds_both_mistakes():
    """Neither is seen by being always late, nor by being always early: of the one write early, the other late."""
    found = set()
    for seed in range(40):
        with fakecupy.installed(mode="random", seed=seed):
            cupy = importlib.import_module("cupy")
            found |= {keeps_box(cupy, False), fills_first(cupy, False)}
    assert found == {1, 2, 5}


@pytest.mark.parametrize("non_blocking", [False, True])
def test_the_null_stream_waits_for_streams_that_are_not_non_blocking(lazy, cupy, non_blocking):
    x, stream = cupy.zeros(1), cupy.cuda.Stream(non_blocking=non_blocking)
    lazy.slow_write(x, 1, stream)
    assert x.item() == (0 if non_blocking else 1)
    y = cupy.ones(1)
    with stream:
        assert (y.item() == 1) == (not non_blocking)


def test_waits_are_counted(lazy, cupy):
    x, event = cupy.zeros(3), cupy.cuda.Event()
    assert not lazy.log
    event.record()
    assert not event.done
    event.synchronize()
    assert event.done
    cupy.cuda.Device().synchronize()
    assert (lazy.syncs, lazy.pageable_copies) == (2, 0)
    x.set(np.ones(3))
    assert (lazy.syncs, lazy.pageable_copies) == (2, 1)
    event.record()
    assert not event.done
    while not event.done:  # who asks again and again gets there
        pass
    later = cupy.cuda.Event()
    with pytest.raises(cupy.cuda.runtime.CUDARuntimeError, match="cudaErrorNotReady"):
        cupy.cuda.get_elapsed_time(event, later)
    later.record()
    later.synchronize()
    assert cupy.cuda.get_elapsed_time(event, later) > 0


# ---- arrays


def test_arrays_compute_what_numpy_computes(fake, cupy):
    host = np.arange(6.0, dtype=np.float32).reshape(2, 3)
    x = cupy.asarray(host)
    y = x.T * 2 + np.float32(1)
    y[1:] -= 3
    np.maximum(y, 0, out=y)
    expected = host.T * 2 + np.float32(1)
    expected[1:] -= 3
    np.maximum(expected, 0, out=expected)
    np.testing.assert_array_equal(cupy.asnumpy(y), expected)
    assert (y.dtype, y.flags.f_contiguous, y.flags.c_contiguous) == (expected.dtype, True, False)
    for function in (np.sum, np.argmax, np.zeros_like, np.exp, np.mean, np.linalg.norm, lambda x: x.max(axis=1)):
        found, wanted = function(x), np.asarray(function(host))
        assert (type(found), found.shape, found.dtype) == (cupy.ndarray, wanted.shape, wanted.dtype)
        np.testing.assert_array_equal(found.get(), wanted)
    np.testing.assert_array_equal((x @ x.T).get(), host @ host.T)
    np.testing.assert_array_equal(x[:, [2, 0]].get(), host[:, [2, 0]])
    np.testing.assert_array_equal(x[x > 2].get(), host[host > 2])
    np.testing.assert_array_equal(np.concatenate([x, x]).get(), np.concatenate([host, host]))
    assert np.ones(3, like=x).get().tolist() == [1, 1, 1]
    assert x[1, 1:].data.ptr == x.data.ptr + 16
    assert x.reshape(-1).data.ptr == x.data.ptr


@pytest.mark.parametrize(
    ("what", "error"),
    [
        (lambda cupy, x, host: np.asarray(x), "TypeError: Implicit conversion to a NumPy array is not allowed"),
        (lambda cupy, x, host: memoryview(x), "TypeError: memoryview"),
        (lambda cupy, x, host: x + host, "TypeError: Unsupported type"),
        (lambda cupy, x, host: host + x, "TypeError: Unsupported type"),
        (lambda cupy, x, host: np.add(x, x, out=host), "TypeError: Unsupported type"),
        (lambda cupy, x, host: np.concatenate([x, host]), "TypeError: Unsupported type"),
        (lambda cupy, x, host: np.exp(x, where=True), "TypeError: Wrong arguments"),
        (lambda cupy, x, host: x.__setitem__(slice(None), host), "ValueError: non-scalar numpy.ndarray"),
        (lambda cupy, x, host: x.set(host[:1]), "ValueError: Shape mismatch"),
        (lambda cupy, x, host: x.set(host.astype(int)), "TypeError: int64 array cannot be set to float64 array"),
        (lambda cupy, x, host: x[:, ::2].set(host[:, ::2]), "RuntimeError: Cannot set to non-contiguous array"),
        (lambda cupy, x, host: cupy.from_dlpack(host), "TypeError: CPU arrays cannot be directly imported"),
        (lambda cupy, x, host: x.flags.writeable, "AttributeError"),
        (lambda cupy, x, host: cupy.insert, "AttributeError"),
        (lambda cupy, x, host: cupy.cuda.nccl, "AttributeError"),
        (lambda cupy, x, host: cupy.cuda.Device(2).use(), "CUDARuntimeError: cudaErrorInvalidDevice"),
    ],
)
def test_what_cupy_refuses_is_refused(lazy, cupy, what, error):
    with pytest.raises(Exception) as caught:  # noqa: PT011
        what(cupy, cupy.zeros((2, 4)), np.zeros((2, 4)))
    assert f"{type(caught.value).__name__}: {caught.value}".startswith(error)


def test_devices_have_to_be_current(lazy, cupy):
    with cupy.cuda.Device(1):
        x, stream, event = cupy.ones(3), cupy.cuda.Stream(), cupy.cuda.Event()
        assert (x.device.id, stream.device_id, cupy.cuda.Stream.null.device_id) == (1, 1, -1)
    with pytest.raises(ValueError, match="Array device must be same as the current device"):
        x + 1
    with pytest.raises(RuntimeError, match="does not match with the current device"):
        stream.use()
    with pytest.raises(RuntimeError, match="cudaErrorInvalidResourceHandle"):
        stream.record()  # whose event is one of the current device
    with pytest.raises(RuntimeError, match="cudaErrorInvalidResourceHandle"):
        cupy.cuda.Stream.null.record(event)
    assert cupy.cuda.get_current_stream(1) == cupy.cuda.Stream.null
    np.testing.assert_array_equal(x.get(), 1)


def test_streams_that_are_gone_are_refused(lazy, cupy):
    stream, x = cupy.cuda.Stream(), cupy.zeros(1)
    pointer, again = stream.ptr, cupy.cuda.Stream.from_external(stream)
    again.synchronize()
    lazy.slow_write(x, 1, stream)
    del stream, again
    with pytest.raises(RuntimeError, match="cudaErrorInvalidResourceHandle"):
        cupy.cuda.runtime.streamSynchronize(pointer)
    cupy.cuda.runtime.deviceSynchronize()
    assert x.item() == 1  # what was there is done all the same


# ---- memory


def test_following_a_pointer_is_a_crash(lazy, cupy):
    pointer = cupy.zeros(3).__cuda_array_interface__["data"][0]
    found = subprocess.run([sys.executable, "-c", f"import ctypes; ctypes.c_int.from_address({pointer}).value"])
    assert found.returncode == -signal.SIGSEGV
    assert pointer >= 1 << 47  # where no process has memory: not here, either
    with pytest.raises(RuntimeError, match="cudaErrorIllegalAddress"):
        lazy.memory_at(np.zeros(3).ctypes.data, 8)


def test_what_is_empty_is_nowhere(lazy, cupy):
    x = cupy.zeros((0, 3))
    assert (x.data.ptr, x.get().shape, lazy.memory_at(x.data.ptr, 0).size) == (0, (0, 3), 0)


def by_driver(pointer: int) -> tuple[int, int, int, bool]:
    values = ctypes.c_uint64(), ctypes.c_uint64(), ctypes.c_uint64(), ctypes.c_int()
    into = (ctypes.c_void_p * 4)(*map(ctypes.addressof, values))
    asked = (ctypes.c_int * 4)(11, 12, 7, 10)
    assert ctypes.CDLL("libcuda.so.1").cuPointerGetAttributes(4, asked, into, ctypes.c_uint64(pointer)) == 0
    base, size, number, capable = (value.value for value in values)
    return base, size, number, bool(capable)


def test_blocks_of_a_pool(lazy, cupy):
    x, y, large = cupy.zeros(3), cupy.zeros(3), cupy.zeros(1 << 16)
    known, other = lazy.allocation(x.data.ptr), lazy.allocation(large.data.ptr)
    assert known == lazy.allocation(y.data.ptr) == by_driver(y.data.ptr) != other
    assert known.base < x.data.ptr < y.data.ptr < known.base + known.size
    assert x.data.mem.ptr == x.data.ptr  # not the base
    pointer = y.data.ptr
    del y
    again = cupy.empty(3)
    assert again.data.ptr == pointer
    assert np.isnan(again.get()).all()
    pointer = large.data.ptr
    del large
    cupy.get_default_memory_pool().free_all_blocks()
    large = cupy.zeros(1 << 16)
    new = lazy.allocation(pointer)
    assert (new.base, new.size) == other[:2] == (large.data.ptr, 8 << 16)
    assert new.id != other.id
    assert lazy.allocation(x.data.ptr) == known
    for allocator in (cupy.cuda.malloc_managed, cupy.cuda.malloc_async):
        with cupy.cuda.using_allocator(allocator):
            z = cupy.ones(3)
        assert not by_driver(z.data.ptr)[3]
        with pytest.raises(RuntimeError, match="cudaErrorInvalidValue"):
            cupy.cuda.runtime.ipcGetMemHandle(z.data.ptr)


CHILD = """
import sys, fakecupy
with fakecupy.installed() as fake:
    import cupy
    runtime = cupy.cuda.runtime
    handle, offset = bytes.fromhex(sys.argv[1]), int(sys.argv[2])
    base = runtime.ipcOpenMemHandle(handle)
    assert runtime.ipcOpenMemHandle(handle) == base and fake.opened == [base]
    x = fake.memory_at(base + offset, 24).view(float)
    assert x.tolist() == [1, 2, 3], x
    x[:] += 1
    runtime.ipcCloseMemHandle(base)
    runtime.ipcCloseMemHandle(base)
    assert not fake.opened
    try:
        fake.memory_at(base, 8)
    except RuntimeError:
        print("well")
"""


def test_memory_is_mapped_by_other_processes(lazy, cupy, pytestconfig):
    cupy.zeros(1)
    x, runtime = cupy.asarray([1.0, 2.0, 3.0]), cupy.cuda.runtime
    handle = runtime.ipcGetMemHandle(x.data.ptr)
    base = lazy.allocation(x.data.ptr).base
    assert len(handle) == 64
    assert handle == runtime.ipcGetMemHandle(base)  # of the allocation
    with pytest.raises(RuntimeError, match="invalid device context"):
        runtime.ipcOpenMemHandle(handle)
    cupy.cuda.get_current_stream().synchronize()
    command = [sys.executable, "-c", CHILD, handle.hex(), str(x.data.ptr - base)]
    folder = str(pytestconfig.rootpath / "tests")
    found = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert (found.stdout, found.stderr) == ("well\n", "")
    assert x.get().tolist() == [2, 3, 4]
    lazy.refuse["ipcGetMemHandle"] = "cudaErrorMapBufferObjectFailed"
    with pytest.raises(RuntimeError, match="cudaErrorMapBufferObjectFailed"):
        runtime.ipcGetMemHandle(x.data.ptr)


def test_host_memory_is_registered_once(lazy, cupy):
    host, runtime, x = np.arange(3.0), cupy.cuda.runtime, cupy.zeros(3)
    runtime.hostRegister(host.ctypes.data, host.nbytes, 0)
    with pytest.raises(RuntimeError, match="cudaErrorHostMemoryAlreadyRegistered"):
        runtime.hostRegister(host.ctypes.data + 8, 8, 0)
    runtime.memcpyAsync(x.data.ptr, host.ctypes.data, 24, runtime.memcpyHostToDevice, 0)
    assert lazy.memory_at(host.ctypes.data, 24).nbytes == 24
    assert not lazy.pageable_copies
    assert x.get().tolist() == [0, 1, 2]
    with pytest.raises(RuntimeError, match="cudaErrorInvalidValue"):
        runtime.memcpyAsync(x.data.ptr, host.ctypes.data, 24, runtime.memcpyDeviceToHost, 0)
    runtime.hostUnregister(host.ctypes.data)
    with pytest.raises(RuntimeError, match="cudaErrorHostMemoryNotRegistered"):
        runtime.hostUnregister(host.ctypes.data)


def test_kernels_are_what_a_test_says(fake, cupy):
    x, kernel = cupy.zeros(3), cupy.RawKernel("text", "twice", ("--fmad=false",))
    with pytest.raises(KeyError, match="twice"):
        kernel((1,), (32,), (x,))
    seen = []

    def twice(code: str, grid: tuple, block: tuple, args: tuple) -> None:
        seen.append((code, grid, block))
        fake.memory_at(int(args[0]), 24).view(float)[:] += 2 * args[1]

    fake.kernels["twice"] = twice
    with pytest.raises(RuntimeError, match="cudaErrorInvalidValue"):
        kernel((1,), (2048,), (x, 1))
    with pytest.raises(TypeError, match="Unsupported type"):
        kernel((1,), (32,), (np.zeros(3), 1))
    kernel((2,), (32,), (np.uint64(x.data.ptr), 3))
    assert seen == {"lazy": [], "eager": [("text", (2,), (32,))]}.get(fake.mode, seen)
    assert x.get().tolist() == [6, 6, 6]


class Pair:
    """A communicator of two ranks that do the same, each with a GPU of its own, or with the same."""

    size, rank = 2, 0

    def __init__(self, apart: bool) -> None:
        self.apart = apart

    def Split(self, color: int, key: int) -> "Pair":  # noqa: N802
        return self

    def Free(self) -> None:  # noqa: N802
        """Nothing."""

    def allgather(self, x: Any) -> list[Any]:
        return [x, (x[0], x[1] + 1)] if self.apart and isinstance(x, tuple) else [x, x]


@pytest.mark.parametrize("mode", ["lazy", "eager"])
def test_nccl_works_on_streams_of_gpus_that_differ(mode):
    with fakecupy.installed(mode=mode, nccl=Pair(False)):
        nccl = importlib.import_module("cupy.cuda.nccl")
        with pytest.raises(nccl.NcclError, match="NCCL_ERROR_INVALID_USAGE"):
            nccl.NcclCommunicator(2, nccl.get_unique_id(), 0)
    with fakecupy.installed(mode=mode, nccl=Pair(True)):
        cupy, nccl = importlib.import_module("cupy"), importlib.import_module("cupy.cuda.nccl")
        both = nccl.NcclCommunicator(2, nccl.get_unique_id(), 0)
        x, stream = cupy.ones(3), cupy.cuda.Stream(non_blocking=True)
        stream.wait_event(cupy.cuda.Stream.null.record())
        both.allReduce(x.data.ptr, x.data.ptr, 3, nccl.NCCL_FLOAT64, nccl.NCCL_SUM, stream.ptr)
        assert x.get()[0] == {"lazy": 1, "eager": 2}[mode]
        assert x.get(stream=stream).tolist() == [2, 2, 2]


def test_sparse_matrices_are_there_when_the_stream_gets_there():
    with fakecupy.installed(mode="lazy") as fake:
        cupy, sparse = importlib.import_module("cupy"), importlib.import_module("cupyx.scipy.sparse")
        parts = (cupy.asarray(x) for x in (np.array([1.0, 2.0, 3.0]), np.array([1, 1, 0]), np.array([0, 2, 3])))
        matrix = sparse.csr_matrix(tuple(parts), shape=(2, 2))
        matrix.sum_duplicates()
        assert matrix.data.get().tolist() == [3, 3]
        stream, dense, queue = cupy.cuda.Stream(non_blocking=True), cupy.asarray(np.eye(2)), fake.queue(0)
        waits = fake.log.count("get")
        chosen = matrix[cupy.asarray(np.array([1, 0, 1]))]
        assert fake.log.count("get") == waits + 1  # for the number of its values
        product, transposed = chosen @ dense, chosen.T @ cupy.asarray(np.ones((3, 1)))
        assert fake.log.count("get") == waits + 1
        assert queue.works
        assert product.get().tolist() == [[3, 0], [0, 3], [3, 0]]
        assert transposed.get().tolist() == [[6], [3]]
        assert matrix[0:1].indices.get().tolist() == [1]
        chosen = matrix[cupy.asarray(np.array([1]))]
        with stream:
            early = chosen @ dense
        with pytest.raises(RuntimeError, match="looked at before it was there"):
            early.get(stream=stream)


def test_numbers_have_to_be_aligned():
    with fakecupy.installed():
        cupy = importlib.import_module("cupy")
        memory = cupy.zeros(32, np.uint8)
        assert (memory[8:16].view(np.float64) + 1).get() == [1]
        with pytest.raises(RuntimeError, match="cudaErrorMisalignedAddress"):
            memory[4:12].view(np.float64) + 1
        with pytest.raises(TypeError, match="unexpected keyword argument 'count'"):
            np.unpackbits(memory, count=3)


def test_without_a_driver_nothing_works():
    with fakecupy.installed(devices=0):
        cupy = importlib.import_module("cupy")
        for call in (lambda: cupy.zeros(3), cupy.cuda.runtime.getDeviceCount, cupy.cuda.Stream):
            with pytest.raises(RuntimeError, match="cudaErrorInsufficientDriver"):
                call()
        assert not cupy.cuda.is_available()
    assert "cupy" not in sys.modules


@pytest.mark.parametrize("mode", ["lazy", "eager"])
def test_a_program_is_run_with_it(pytestconfig, tmp_path, mode):
    (tmp_path / "program.py").write_text(
        "import sys, cupy\n"
        "x, stream = cupy.zeros(1), cupy.cuda.Stream(non_blocking=True)\n"
        "cupy.RawKernel('', 'five')((1,), (1,), (x,), stream=stream)\n"
        "print(sys.argv[1:], x.item(), __name__)"
    )
    (tmp_path / "helper.py").write_text(
        "def prepare(fake): fake.kernels['five'] = "
        "lambda code, grid, block, args: fake.memory_at(args[0], 8).view(float).fill(5)"
    )
    environment = {"FAKECUPY_MODE": mode, "FAKECUPY_WITH": "helper", "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, str(pytestconfig.rootpath / "tests" / "fakecupy"), "-m", "program", "a", "-b"]
    found = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    assert (found.stdout, found.stderr) == (f"['a', '-b'] {5.0 if mode == 'eager' else 0.0} __main__\n", "")
