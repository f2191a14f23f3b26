"""Arrays in the memory of GPUs: what holds in host memory holds there, by every way, whatever the order of streams.

With a CuPy of ours that needs no GPU (``fakecupy``), in which what is read too early has not been written.  Where there
is a GPU, ``make test-gpu`` runs them with the real one: those that need to know more of it than that are left out.
"""

import os
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import fakecupy
import kernels
import numpy as np
import pytest
from mpi4py import MPI

import mpicoll
from contract import composition, maps, own_data
from mpicoll import MismatchError
from mpicoll.errors import UserError
from mpicoll.mpi.gpu import array, assignment, ipc, kernel, launching, mappings, staging
from mpicoll.mpi.request import cuts_of
from mpicoll.mpi.state import state_of

WORLD = MPI.COMM_WORLD
P, ROOT = WORLD.size, WORLD.size // 2
REAL = os.environ.get("MPICOLL_TEST_GPU") == "1"
BOX = 64  # bytes
COUNTS = sorted({0, 1, P + 1, BOX // 8 - 1, BOX // 8, BOX // 8 + 1, 3 * BOX // 8 + 5})
WAYS = ["auto", "staged", "ours"]

MOST = 4 if REAL else 3  # ranks: more would show the same, and take longer
pytestmark = [pytest.mark.mpi, pytest.mark.skipif(P > MOST, reason=f"{MOST} ranks show what more would, and sooner")]


@pytest.fixture(params=["real"] if REAL else fakecupy.MODES)
def cupy(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """All ranks on one GPU, and boxes so small that arrays take several."""
    monkeypatch.setattr(staging, "BUFFER", BOX)
    if REAL:
        try:
            assignment.take(WORLD)
        except UserError as error:
            pytest.skip(f"no GPU: {error}")
        yield array.cupy()
    else:
        with fakecupy.installed(mode=request.param, seed=WORLD.rank) as fake:
            kernels.add(fake, monkeypatch)
            yield array.cupy()


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """What there is to see of the fake one, and to set; lazy."""
    if REAL:
        pytest.skip("asks the fake what it has seen")
    monkeypatch.setattr(staging, "BUFFER", BOX)
    with fakecupy.installed(mode="lazy") as made:
        kernels.add(made, monkeypatch)
        yield made


@pytest.fixture
def ours(comm: MPI.Intracomm) -> mpicoll.Comm:
    return mpicoll.Comm(comm)


SPIN = r"""
extern "C" __global__ void spin(long long cycles) {
    long long start = clock64();
    while (clock64() - start < cycles) {}
}
"""


def late(values: np.ndarray) -> tuple[Any, Any]:
    """An array that a slow kernel is still to write, and the stream where it does, which is not the default one."""
    module = array.cupy()
    values, stream = np.asarray(values), module.cuda.Stream(non_blocking=True)
    with stream:
        x = module.zeros(values.shape, values.dtype)
    if REAL:
        right = module.asarray(values)
        module.cuda.Device().synchronize()
        with stream:
            module.RawKernel(SPIN, "spin")((1,), (1,), (5_000_000,))
            x[...] = right
    else:
        fakecupy.current().slow_write(x, values, stream)
    return x, stream


def expected(collective: str, count: int, dtype: Any = float) -> np.ndarray:
    everyone = [own_data(count, other, dtype) for other in range(P)]
    total = np.sum(everyone, axis=0).astype(dtype)
    cuts = cuts_of(None, count, P)
    return {
        "allreduce": total,
        "reduce": total if WORLD.rank == ROOT else everyone[WORLD.rank],
        "bcast": everyone[ROOT],
        "reduce_scatter": total[cuts[WORLD.rank] : cuts[WORLD.rank + 1]],
        "allgather": np.array(everyone),
    }[collective]


CALLS: dict[str, Callable[..., Any]] = {
    "allreduce": lambda x, comm, **how: mpicoll.allreduce(x, comm, **how),
    "reduce": lambda x, comm, **how: mpicoll.reduce(x, comm, ROOT, **how),
    "bcast": lambda x, comm, **how: mpicoll.bcast(x, comm, ROOT, **how),
    "reduce_scatter": lambda x, comm, **how: mpicoll.reduce_scatter(x, comm, **how),
    "allgather": lambda x, comm, **how: mpicoll.allgather(x, comm, **how),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("collective", CALLS)
def test_it_is_what_it_is_in_host_memory(cupy, ours, collective, way):
    """Whatever is still to be written when the call is made; and what is done at once with the result, on that stream,
    sees it."""
    algorithm = next(iter(mpicoll.ALGORITHMS[collective])) if way == "ours" else way
    for count in COUNTS:
        x, stream = late(own_data(count, ours.rank))
        result = CALLS[collective](x, ours, algorithm=algorithm, stream=stream)
        with stream:
            after = result * 2
            x += 1000
        np.testing.assert_array_equal(after.get(stream=stream), expected(collective, count) * 2)
        if collective in ("allreduce", "reduce", "bcast"):
            assert result is x


@pytest.mark.parametrize("way", WAYS)
def test_parts_go_to_a_root_and_come_from_it(cupy, ours, way):
    algorithm, rank = "binomial" if way == "ours" else way, ours.rank
    for n in (0, 1, 3 * BOX // 8 + 1):
        everyone = np.array([own_data(n, other) for other in range(P)])
        whole = own_data(n * P, ROOT)
        x, stream = late(everyone[rank])
        with stream:
            y, z, part = cupy.zeros(n * P), cupy.zeros(n * P), cupy.zeros(n)
            z[rank * n : rank * n + n] = x
            sent = cupy.asarray(whole)
        how: dict[str, Any] = {"stream": stream, "algorithm": algorithm}
        ours.Gather(x, y if rank == ROOT else None, ROOT, **how)
        ours.Gather(MPI.IN_PLACE if rank == ROOT else x, z if rank == ROOT else None, ROOT, **how)
        result = mpicoll.gather(x, ours, ROOT, **how)
        assert (result is None) == (rank != ROOT)
        if rank == ROOT:
            for got in (y, z, result):
                np.testing.assert_array_equal(got.get(stream=stream).reshape(P, n), everyone)
        ours.Scatter(sent if rank == ROOT else None, part, ROOT, **how)
        np.testing.assert_array_equal(part.get(stream=stream), whole[rank * n : rank * n + n])
        with stream:
            part[...] = -1
        ours.Scatter(sent if rank == ROOT else None, MPI.IN_PLACE if rank == ROOT else part, ROOT, **how)
        np.testing.assert_array_equal(part.get(stream=stream), -1 if rank == ROOT else whole[rank * n : rank * n + n])
        if way == "ours":
            counts = [(2 * other + n) % 4 for other in range(P)]
            mine = x[: counts[rank]] if n > 3 else cupy.zeros(counts[rank])
            ours.Gatherv(mine, [cupy.zeros(sum(counts)), counts] if rank == ROOT else None, ROOT, **how)
        else:
            with pytest.raises((TypeError, mpicoll.MismatchError, ValueError)):
                ours.Gatherv(x, [y, [n] * P] if rank == ROOT else None, ROOT, algorithm="native", stream=stream)


def test_methods_are_those_of_host_memory(cupy, ours):
    """As mpi4py has them: out of place and in place, uneven parts, results in host memory, F order."""
    n, p, rank = 11, P, ours.rank
    own, total = own_data(n, rank), expected("allreduce", n)

    def same(stream: Any, got: Any, right: np.ndarray) -> None:
        np.testing.assert_array_equal(got.get(stream=stream) if array.is_cupy(got) else got, right)

    for how in ({}, {"algorithm": "staged"}):
        x, stream = late(own)
        with stream:
            y = cupy.zeros(n)
        host = np.zeros(n)
        ours.Allreduce(x, y, stream=stream, **how)
        same(stream, y, total)
        same(stream, x, own)
        ours.Allreduce(x, host, stream=stream, **how)
        same(stream, host, total)
        ours.Reduce(x, host if rank == ROOT else None, root=ROOT, stream=stream, **how)
        ours.Reduce(x, y if rank == ROOT else None, MPI.MAX, root=ROOT, stream=stream, **how)
        same(stream, y, np.max([own_data(n, other) for other in range(p)], axis=0) if rank == ROOT else total)
        ours.Bcast(x, root=ROOT, stream=stream, **how)
        same(stream, x, own_data(n, ROOT))
        ours.Allreduce(MPI.IN_PLACE, x, "mean", stream=stream, **how)
        same(stream, x, own_data(n, ROOT))

        x, stream = late(own_data(3 * p, rank))
        whole = sum(own_data(3 * p, other) for other in range(p))
        with stream:
            part = cupy.zeros(3)
        ours.Reduce_scatter_block(x, part, stream=stream, **how)
        same(stream, part, whole[3 * rank : 3 * rank + 3])
        ours.Reduce_scatter_block(MPI.IN_PLACE, x, stream=stream, **how)
        same(stream, x[:3], whole[3 * rank : 3 * rank + 3])

        counts = [2 * other % 3 for other in range(p)]
        cuts = np.cumsum([0, *counts])
        x, stream = late(own_data(cuts[-1], rank))
        with stream:
            part = cupy.zeros(counts[rank])
        ours.Reduce_scatter(x, part, counts, stream=stream, **how)
        same(stream, part, sum(own_data(cuts[-1], other) for other in range(p))[cuts[rank] : cuts[rank + 1]])

        with stream:
            everyones = cupy.zeros(int(cuts[-1]))
        x, _ = late(own_data(counts[rank], rank))
        ours.Allgatherv(x, [everyones, counts], stream=_, **how)
        same(_, everyones, np.concatenate([own_data(count, other) for other, count in enumerate(counts)]))
        x, stream = late(own_data(2, rank))
        with stream:
            everyones = cupy.zeros((p, 2))
        ours.Allgather(x, everyones, stream=stream, **how)
        same(stream, everyones, np.array([own_data(2, other) for other in range(p)]))
        with stream:
            everyones = cupy.zeros((p, 2))
            everyones[rank] = x
        ours.Allgather(MPI.IN_PLACE, everyones, stream=stream, **how)
        same(stream, everyones, np.array([own_data(2, other) for other in range(p)]))

    x, stream = late(np.asfortranarray(own_data(12, rank).reshape(3, 4)))
    with stream:
        x = cupy.asfortranarray(x)
    one = ours.allreduce_shared(x, stream=stream)
    same(stream, one, expected("allreduce", 12).reshape(3, 4))
    ours.Allreduce(own, y := cupy.zeros(n))
    same(None, y, total)


@pytest.mark.parametrize("dtype", ["?", "i1", "u2", "i8", "f2", "bfloat16", "f4", "f8", "F", "D"])
def test_bits_are_those_of_the_canonical_order(cupy, ours, dtype):
    """By IPC, and in pieces: what the host computes with ``deterministic=True``."""
    kind = np.dtype(pytest.importorskip("ml_dtypes").bfloat16 if dtype == "bfloat16" else dtype)
    random, names = np.random.default_rng(ours.rank), ["sum", "mean", "prod", "max", "min", "lor", "bxor"]
    values = random.normal(size=29) * 10.0 ** random.integers(-3, 4, 29)
    own = (values if kind.kind not in "iu" else random.integers(0, 100, 29)).astype(kind)
    for name in names:
        try:
            right = mpicoll.allreduce(own.copy(), ours, name, deterministic=True)
        except TypeError:
            with pytest.raises(TypeError):
                mpicoll.allreduce(cupy.asarray(own), ours, name)
            continue
        for how in ({"algorithm": "ipc"} if P > 1 else {}, {"algorithm": "staged", "deterministic": True}):
            x, stream = late(own)
            mpicoll.allreduce(x, ours, name, stream=stream, **how)
            assert x.get(stream=stream).tobytes() == right.tobytes(), (name, how)


@pytest.mark.parametrize("way", ["auto", "staged"])
def test_the_stream_in_use_stays_so(cupy, ours, way):
    """Which ``with`` would not see to; and what is put there before and after is in order, without being named."""
    stream, before = cupy.cuda.Stream(non_blocking=True), cupy.cuda.get_current_stream()
    other, named = late(own_data(19, ours.rank))
    stream.use()
    try:
        x = cupy.asarray(own_data(19, ours.rank))
        for _ in range(2):
            mpicoll.allreduce(x, ours, "max", algorithm=way)
            x += 1
        mpicoll.reduce_scatter(other, ours, algorithm=way, stream=named)
        assert cupy.cuda.get_current_stream() == stream
        foreign = SimpleNamespace(__cuda_stream__=lambda: (0, stream.ptr), wait_event=None)  # as PyTorch's are
        mpicoll.allreduce(x, ours, "max", algorithm=way, stream=foreign)
        right = np.max([own_data(19, other) for other in range(P)], axis=0) + 2
        np.testing.assert_array_equal(x.get(), right)
    finally:
        before.use()


def test_arrays_here_and_there(cupy, ours):
    """What is given may be in host memory and what is taken on the GPU, and the other way round; no pointer to a GPU
    reaches the MPI library, which would follow it."""
    rank, each, everyone = ours.rank, own_data(2 * P, ours.rank), [own_data(2 * P, other) for other in range(P)]
    total, mine = np.sum(everyone, axis=0), slice(2 * rank, 2 * rank + 2)
    for send, take in ((each, cupy.zeros), (cupy.asarray(each), np.zeros)):
        for how in ({}, {"check": "off"}):
            part, whole = take(2), take((P, 2 * P))
            ours.Reduce_scatter_block(send, part, **how)
            np.testing.assert_array_equal(part.tolist(), total[mine])
            part = take(2)
            ours.Reduce_scatter(send, part, [2] * P, **how)
            np.testing.assert_array_equal(part.tolist(), total[mine])
            ours.Allgather(send, whole, **how)
            np.testing.assert_array_equal(whole.tolist(), everyone)
            whole = take((P, 2 * P))
            ours.Allgatherv(send, [whole, 2 * P], **how)
            np.testing.assert_array_equal(whole.tolist(), everyone)
    x, z = each.copy(), cupy.asarray(each)
    ours.Allreduce(MPI.IN_PLACE, [x, z])
    np.testing.assert_array_equal(x, total)
    np.testing.assert_array_equal(z.get(), total)
    columns = own_data(6, rank).reshape(2, 3)
    for order in (np.asfortranarray(columns), cupy.asarray(np.asfortranarray(columns))):
        found = mpicoll.allgather(order, ours)
        np.testing.assert_array_equal(found.tolist(), [own_data(6, other).reshape(2, 3) for other in range(P)])


def test_all_else_goes_by_way_of_the_host(cupy, ours):
    """Nonblocking calls, lists, mixing, operations that users define, pairs of 16 bit on the wire."""
    own, total = own_data(7, ours.rank), expected("allreduce", 7)
    x, stream = late(own)
    assert mpicoll.iallreduce(x, ours, stream=stream).wait() is x
    np.testing.assert_array_equal(x.get(stream=stream), total)
    arrays, streams = zip(*(late(part) for part in (own, own_data(3, ours.rank, "i4"))), strict=True)
    for each in streams:
        each.synchronize()
    mpicoll.allreduce([arrays[0], own, arrays[1]], ours)
    np.testing.assert_array_equal(arrays[0].get(), total)
    np.testing.assert_array_equal(own, total)
    np.testing.assert_array_equal(arrays[1].get(), expected("allreduce", 3, "i4"))
    own = own_data(7, ours.rank)
    x, stream = late(own)
    mpicoll.gossip_average(x, ours, "complete", step=0, stream=stream)
    np.testing.assert_allclose(x.get(stream=stream), total / P)
    each, composed = maps(7, P)
    compose = composition()
    x, stream = late(each[ours.rank])
    mpicoll.allreduce(x, ours, compose, stream=stream)
    np.testing.assert_array_equal(x.get(stream=stream), composed)
    compose.Free()
    x, stream = late(own.astype("f2"))
    mpicoll.allreduce(x, ours, wire="16bit", stream=stream)
    np.testing.assert_array_equal(x.get(stream=stream), total)


class Foreign:
    """Another library's array on the same memory, which exports it by the CUDA array interface alone."""

    def __init__(self, x: Any, stream: Any = None, readonly: bool = False) -> None:
        self._array = x
        told = {"data": (x.data.ptr, readonly), "strides": x.strides, "stream": None if stream is None else stream.ptr}
        self.__cuda_array_interface__ = {"shape": x.shape, "typestr": x.dtype.str, "version": 3, **told}


@pytest.mark.parametrize("told", [True, False], ids=["with a stream", "without"])
@pytest.mark.parametrize("collective", CALLS)
def test_arrays_of_other_libraries_are_taken(cupy, ours, collective, told):
    """What they are still to hold is waited for on the stream that they tell; results are there when the call ends, on
    whatever stream they are read."""
    for count in (0, 1, 37):
        x, stream = late(own_data(count, ours.rank))
        if not told:
            stream.synchronize()
        foreign = Foreign(x, stream if told else None)
        result = CALLS[collective](foreign, ours)
        other = cupy.cuda.Stream(non_blocking=True)
        if result is foreign:
            np.testing.assert_array_equal(x.get(stream=other), expected(collective, count))
        else:
            np.testing.assert_array_equal(result.get(), expected(collective, count))


@pytest.mark.parametrize("way", ["auto", "staged", "ring"])
def test_arrays_of_other_libraries_receive(cupy, ours, way):
    host, starts = own_data(2 * P, ours.rank), [3 * rank for rank in range(P)]
    there, other = cupy.asarray(host), cupy.cuda.Stream(non_blocking=True)
    by_host = "auto" if way == "staged" else way
    for call, count in (
        (lambda x, y, way: ours.Allreduce(x, y, algorithm=way), 2 * P),
        (lambda x, y, way: ours.Reduce_scatter_block(x, y, algorithm=way), 2),
        (lambda x, y, way: ours.Reduce_scatter(x, y, algorithm=way), 2),
        (lambda x, y, way: ours.Allgather([x, 2], y, way), 2 * P),
        (lambda x, y, way: ours.Allgatherv([x, 2], [y, (2, starts)], way), 3 * P),
    ):
        received, right = cupy.zeros(count), np.zeros(count)
        cupy.cuda.get_current_stream().synchronize()
        call(there, Foreign(received), way)
        call(host, right, by_host)
        np.testing.assert_array_equal(received.get(stream=other), right)


SIMPLE: dict[str, Callable[[Any, int], Any]] = {  # of a buffer of 3 P + 2 elements, so many of them
    "the buffer": lambda b, n: b[:n],
    "buffer, type": lambda b, n: [b[:n], MPI.DOUBLE],
    "buffer, code": lambda b, n: (b[:n], "d"),
    "buffer, count": lambda b, n: [b, n],
    "buffer, count, type": lambda b, n: [b, n, MPI.DOUBLE],
    "buffer, None, type": lambda b, n: [b[:n], None, "d"],
    "buffer, pair, type": lambda b, n: [b, (n, 2), MPI.DOUBLE],
    "buffer, pair": lambda b, n: [b, [n, 1]],
    "buffer, count, displacement, type": lambda b, n: [b, n, 1, MPI.DOUBLE],
    "other type": lambda b, n: [b, (2 * n, 2), MPI.INT],
    "column by column": lambda b, n: [b[: 2 * P].reshape(-1, 2).T, n],
}
VECTOR: dict[str, Callable[[Any], Any]] = {  # of such a buffer, two for each rank
    "the buffer": lambda b: b[: 2 * P],
    "counts": lambda b: [b, [2] * P],
    "count": lambda b: [b, 2],
    "NumPy counts": lambda b: [b, np.full(P, 2), MPI.DOUBLE],
    "pair": lambda b: [b, ([2] * P, [3 * rank for rank in reversed(range(P))]), "d"],
    "stride": lambda b: [b, 2, 3, MPI.DOUBLE],
    "type": lambda b: [b[: 2 * P], MPI.DOUBLE],
}


def test_specifications_are_read_as_those_of_host_memory(cupy, ours):
    def both(call: Callable[[Any, Any], None]) -> None:
        host, to = own_data(3 * P + 2, ours.rank), np.full(3 * P + 2, -1.0)
        given, taken = cupy.asarray(host), cupy.asarray(to)
        call(host, to)
        call(given, taken)
        np.testing.assert_array_equal(given.get(), host)
        np.testing.assert_array_equal(taken.get(), to)

    for name, form in SIMPLE.items():
        both(lambda x, y: ours.Allreduce(form(x, 2 * P), form(y, 2 * P)))  # noqa: B023
        both(lambda x, y: ours.Allreduce(MPI.IN_PLACE, form(x, 2 * P), MPI.MAX, "ring"))  # noqa: B023
        both(lambda x, y: ours.Reduce(form(x, 2), form(y, 2) if ours.rank == ROOT else None, root=ROOT))  # noqa: B023
        both(lambda x, y: ours.Bcast(form(x, 2), root=ROOT))  # noqa: B023
        counts = [4 if name == "other type" else 2] * P
        both(lambda x, y: ours.Reduce_scatter(form(x, 2 * P), form(y, 2), counts))  # noqa: B023
        both(lambda x, y: ours.Reduce_scatter(form(x, 2 * P), form(y, 2)))  # noqa: B023
        both(lambda x, y: ours.Reduce_scatter(None, form(x, 2 * P), counts))  # noqa: B023
        each = 2 * P if name in ("the buffer", "buffer, type", "buffer, code", "buffer, None, type") else 2
        both(lambda x, y: ours.Reduce_scatter_block(form(x, each), form(y, 2)))  # noqa: B023
        both(lambda x, y: ours.Reduce_scatter_block(MPI.IN_PLACE, form(x, each)))  # noqa: B023
        both(lambda x, y: ours.Allgather(form(x, 2), form(y, each)))  # noqa: B023
        both(lambda x, y: ours.Allgather(MPI.IN_PLACE, form(x, each), "ring"))  # noqa: B023
    for vector in VECTOR.values():
        both(lambda x, y: ours.Allgatherv(x[:2], vector(y)))  # noqa: B023
        both(lambda x, y: ours.Allgatherv([x, 2, MPI.DOUBLE], vector(y), "ring"))  # noqa: B023
        both(lambda x, y: ours.Allgatherv(None, vector(x)))  # noqa: B023


def test_mistakes_are_told_to_all(cupy, ours):
    n = own_data(5, ours.rank)
    there = cupy.asarray(n)
    foreign = SimpleNamespace(__cuda_array_interface__={}, __module__="other", dtype=n.dtype, shape=n.shape)
    readonly = Foreign(there, readonly=True)
    stream = cupy.cuda.Stream()

    class Raises:
        @property
        def __cuda_array_interface__(self) -> None:
            raise RuntimeError("it needs gradients")

    for call, error, message in (
        (lambda: ours.Allreduce(MPI.IN_PLACE, Raises()), TypeError, "interface cannot be read: it needs gradients"),
        (lambda: ours.Allgather([there], there), TypeError, "got a list of 1"),
        (lambda: ours.Bcast([there, n]), TypeError, r"\[buffer, count, datatype\], .* got a list of 2"),
        (lambda: ours.Allgatherv(there, [there, [5] * P, [0] * P]), TypeError, "MPI datatype as the last of 3"),
        (lambda: ours.Allgatherv(there, [there, ([5] * P, [1] * P)]), ValueError, "go beyond the 5 elements"),
        (lambda: ours.Allreduce(MPI.IN_PLACE, [there, 6]), ValueError, "has 5 elements, 6 from number 0 on"),
        (lambda: ours.Allreduce(MPI.IN_PLACE, readonly), ValueError, "expected a writable array"),
        (lambda: ours.Allreduce(there, [readonly, "d"]), ValueError, "expected a writable array"),
        (
            lambda: mpicoll.allreduce(foreign, ours),
            TypeError,
            "other|SimpleNamespace .* interface cannot be read: 'data'",
        ),
        (lambda: mpicoll.allreduce([n, foreign], ours), TypeError, "interface cannot be read"),
        (lambda: mpicoll.butterfly_mix(foreign, ours, step=0), TypeError, "interface cannot be read"),
        (lambda: ours.Allreduce(n, foreign), TypeError, "interface cannot be read"),
        (lambda: ours.Allreduce(foreign, n), TypeError, "interface cannot be read"),
        (lambda: ours.Allreduce(MPI.IN_PLACE, [there, 5, MPI.Datatype()]), TypeError, "derived MPI datatypes"),
        (lambda: mpicoll.allreduce(n, ours, stream=stream), TypeError, "stream= is for arrays in the memory of a GPU"),
        (lambda: ours.Bcast(n, stream=stream), TypeError, "stream= is for arrays"),
        (lambda: mpicoll.allreduce(there, ours, stream=7), TypeError, "stream= takes a stream of CuPy's"),
        (lambda: mpicoll.allreduce(n, ours, algorithm="ipc"), ValueError, "ipc is for an array in the memory of a GPU"),
        (lambda: mpicoll.allreduce(there, ours, algorithm="rings"), ValueError, "rings"),
        (lambda: mpicoll.allreduce(there, ours, "sums"), ValueError, "unknown operation"),
        (lambda: mpicoll.allreduce(cupy.zeros((4, 4))[:, :2], ours), ValueError, "ascontiguousarray"),
        (lambda: ours.Allreduce(there, cupy.zeros(6)), ValueError, "mismatch in send count 5 and receive count 6"),
        (lambda: ours.Allreduce(there, cupy.zeros(5, "f4")), ValueError, "mismatch in send dtype"),
        (lambda: mpicoll.reduce(there, ours, P), ValueError, f"one of {P} ranks, got {P}"),
        (lambda: mpicoll.allreduce_init(there, ours), TypeError, "takes one array in host memory"),
        (lambda: mpicoll.allreduce(there, ours, algorithm="tree", wire="16bit"), TypeError, "wire='16bit' is for"),
    ):
        with pytest.raises(error, match=message):
            call()
    if P > 1:
        with pytest.raises(MismatchError, match="in the memory of GPUs"):
            mpicoll.allreduce(there if ours.rank else n, ours)
        with pytest.raises(ValueError if ours.rank else MismatchError):  # and to those who made none
            mpicoll.allreduce(there, ours, algorithm="rings" if ours.rank else "auto")
        with pytest.raises(ValueError, match=r"nccl cannot do this allreduce here: .*deterministic"):
            mpicoll.allreduce(there, ours, algorithm="nccl", deterministic=True)
    mpicoll.allreduce(there, ours)
    np.testing.assert_array_equal(there.get(), expected("allreduce", 5))


# ---- what the fake one has seen


def test_the_host_waits_for_each_piece_and_for_nothing_else(fake, ours):
    """And no copy waits for the host because its memory is not page-locked; no memory is taken again and again."""
    import cupy

    x = cupy.asarray(own_data(5 * BOX // 8, ours.rank))
    boxes: Any = None
    for n in range(5):
        fake.log.clear()
        mpicoll.allreduce(x, ours, algorithm="staged")
        if P > 1:
            assert fake.log == ["event"] * 5
        boxes = boxes if n > 1 else dict(fake.registered)
    assert fake.registered == boxes
    if P > 1:
        fake.log.clear()
        mpicoll.allreduce(x, ours, algorithm="ipc")
        assert fake.log.count("stream") == (2 if ours.rank == 0 else 1)
        assert len(fake.log) == fake.log.count("stream")


@pytest.mark.skipif(P == 1, reason="nothing is staged for one rank")
def test_boxes_are_private_where_shared_memory_cannot_be_locked(fake, ours):
    import cupy

    fake.refuse["hostRegister"] = "cudaErrorInvalidValue"
    x = cupy.asarray(own_data(50, ours.rank))
    mpicoll.allreduce(x, ours, algorithm="staged")
    assert fake.pageable_copies == 0
    np.testing.assert_array_equal(x.get(), expected("allreduce", 50))


@pytest.mark.skipif(P == 1, reason="nobody to share with")
def test_arrays_of_others_are_found_wherever_they_lie(fake, ours):
    """Parts of an allocation, memory that is used again, allocations that are new at an old address; what is met for
    the first time is opened, once, by the owner alone."""
    import cupy

    pool, ours = cupy.get_default_memory_pool(), ours.Dup()
    seen = state_of(ours)
    for n in range(6):
        x = cupy.asarray(own_data(9 + n % 2, ours.rank))
        y = cupy.zeros_like(x)
        ours.Allreduce(x, y)
        np.testing.assert_array_equal(y.get(), expected("allreduce", 9 + n % 2))
        assert seen.devices is not None
        assert set(seen.devices.took.values()) == {"ipc"}
        if n % 2:
            del x, y
            pool.free_all_blocks()
    assert len(fake.opened) == (3 * (P - 1) if ours.rank == 0 else 0)
    ours.Free()
    assert fake.opened == []


@pytest.mark.skipif(P == 1, reason="nobody to share with")
def test_what_cannot_be_opened_is_staged(fake, ours, monkeypatch):
    """On all ranks; what cannot be once is not tried again, and other arrays go on as before."""
    import cupy

    def went(n: int, x: Any = None) -> str:
        x = cupy.asarray(own_data(n, ours.rank)) if x is None else x
        mpicoll.allreduce(x, ours)
        np.testing.assert_array_equal(x.get(), expected("allreduce", n))
        devices = state_of(ours).devices
        assert devices is not None
        return next(way for (_, _, elements, *_), way in devices.took.items() if elements == n)

    assert went(3) == "ipc"
    with cupy.cuda.using_allocator(cupy.cuda.malloc_managed if ours.rank == 1 else None):
        assert went(4) == "staged"
    big = [cupy.zeros(1 << 16) for _ in range(3)]  # allocations of their own
    for x in big:
        x[:9] = cupy.asarray(own_data(9, ours.rank))
    fake.refuse["ipcOpenMemHandle"] = "cudaErrorMapBufferObjectFailed"
    assert went(9, big[0][:9]) == "staged"
    fake.refuse.clear()
    big[0][:8] = cupy.asarray(own_data(8, ours.rank))
    assert went(8, big[0][:8]) == "staged"
    assert went(5) == "ipc"
    fake.refuse["ipcGetMemHandle"] = "cudaErrorInvalidValue" if ours.rank == 1 else ""
    if not fake.refuse["ipcGetMemHandle"]:
        fake.refuse.clear()
    assert went(9, big[1][:9]) == "staged"
    fake.refuse.clear()
    big[2][:6] = cupy.asarray(own_data(6, ours.rank))
    monkeypatch.setattr(mappings, "KEPT", 2)
    assert went(6, big[2][:6]) == "ipc"  # another goes for it
    assert len(fake.opened) <= P
    assert went(7) == "ipc"  # and comes back


@pytest.mark.skipif(P == 1, reason="nobody to share with")
def test_a_kernel_that_cannot_be_compiled_is_done_without(fake, ours, monkeypatch):
    import cupy

    def fails(*args: Any) -> None:
        raise RuntimeError("nvrtc: error: invalid value\nand more")

    monkeypatch.setattr(launching, "compiled", fails)
    x = cupy.asarray(own_data(5, ours.rank))
    mpicoll.allreduce(x, ours)
    np.testing.assert_array_equal(x.get(), expected("allreduce", 5))
    with pytest.raises(
        ValueError, match=r"ipc cannot do this reduce here: its kernel cannot be compiled \(nvrtc: error"
    ):
        mpicoll.reduce(x, ours, algorithm="ipc")


@pytest.mark.skipif(P == 1, reason="nobody to share with")
def test_a_kernel_that_fails_fails_on_all_ranks(fake, ours):
    import cupy

    def fails(*args: Any) -> None:
        raise fakecupy.CUDARuntimeError("cudaErrorIllegalAddress")

    fake.kernels[kernel.NAME] = fails
    with pytest.raises(RuntimeError, match="this allreduce failed on the GPU of rank 0"):
        mpicoll.allreduce(cupy.zeros(5), ours)
    other = mpicoll.Comm(ours.Dup())
    if ours.rank == 1:  # and what one rank did before the call
        fake.refuse["streamSynchronize"] = "cudaErrorIllegalAddress"
    with pytest.raises(RuntimeError, match="this reduce failed on the GPU of rank 1"):
        mpicoll.reduce(cupy.zeros(5), other)


@pytest.mark.skipif(P == 1, reason="nobody to share with")
@pytest.mark.parametrize("whole", [0, 1 << 20], ids=["in parts", "whole"])
def test_several_gpus_share_the_work(monkeypatch, comm, whole):
    """Two for all ranks, in turn; each writes a part for all ranks, or all of it for its own."""
    if REAL:
        pytest.skip("asks the fake what it has seen")
    monkeypatch.setattr(ipc, "WHOLE", whole)
    ours, written = mpicoll.Comm(comm.Dup()), []
    with fakecupy.installed(mode="random", seed=ours.rank, gpus=(ours.rank % 2,)) as fake:
        import cupy

        kernels.add(fake, monkeypatch, lambda targets, lo, hi: written.append((targets, hi - lo)))
        for n in (1, 37, 0):  # of one element only one of them has anything to do
            x, stream = late(own_data(n, ours.rank))
            with stream:
                y = cupy.zeros(n)
            written.clear()
            ours.Allreduce(x, y, stream=stream)
            np.testing.assert_array_equal(y.get(stream=stream), expected("allreduce", n))
            if n == 37 and ours.rank < 2:
                near = len(range(ours.rank, P, 2))
                assert written == [(near, 37) if whole else (P, (16, 21)[ours.rank])]  # in whole lines
            ours.Allreduce(MPI.IN_PLACE, x, stream=stream)  # where whole vectors would be read and written at once
            np.testing.assert_array_equal(x.get(stream=stream), expected("allreduce", n))
            for collective in CALLS:
                x, stream = late(own_data(n, ours.rank))
                result = CALLS[collective](x, ours, algorithm="ipc", stream=stream)
                np.testing.assert_array_equal(result.get(stream=stream), expected(collective, n))
        ours.Free()


@pytest.mark.skipif(P == 1, reason="one rank needs nobody")
def test_nccl_does_what_is_asked(monkeypatch, comm):
    """Where each rank has a GPU of its own, and on the node none can be opened by another."""
    if REAL:
        pytest.skip("needs a GPU for each rank")
    ours = mpicoll.Comm(comm.Dup())
    with fakecupy.installed(mode="random", seed=ours.rank, gpus=(ours.rank,), nccl=comm) as fake:
        kernels.add(fake, monkeypatch)
        fake.refuse["ipcOpenMemHandle"] = "cudaErrorMapBufferObjectFailed"
        for n in (0, 1, 5 * P):
            for collective in CALLS:
                x, stream = late(own_data(n, ours.rank, "f4"))
                result = CALLS[collective](x, ours, algorithm="nccl", stream=stream)
                np.testing.assert_array_equal(result.get(stream=stream), expected(collective, n, "f4"))
        x, stream = late(own_data(7, ours.rank, "i4"))
        mpicoll.allreduce(x, ours, "mean", stream=stream)  # opens, fails, and goes on by NCCL
        right = mpicoll.allreduce(own_data(7, ours.rank, "i4"), ours, "mean")
        np.testing.assert_array_equal(x.get(stream=stream), right)
        made = state_of(ours).devices
        assert made is not None
        assert {way for (collective, *_), way in made.took.items() if collective == "allreduce"} == {"nccl"}
        for call, why in (
            (lambda: mpicoll.allreduce(x, ours, "bor", algorithm="nccl"), "NCCL has no bor of int32"),
            (lambda: mpicoll.allreduce(x.astype("f2"), ours, algorithm="nccl"), "does not add float16 as float32"),
        ):
            with pytest.raises(ValueError, match=f"nccl cannot do this allreduce here: .*{why}"):
                call()
        ours.Free()


@pytest.mark.skipif(P == 1, reason="one rank needs nobody")
def test_the_mpi_library_is_given_arrays_only_where_that_is_known_to_work(fake, ours, monkeypatch):
    """Here it does not: a job of two ranks has no CuPy.  Where it is trusted, what it gets is the array."""
    import cupy

    x = cupy.asarray(own_data(7, ours.rank))
    with pytest.raises(ValueError, match=r"aware cannot do this allreduce here: .* with status 1: a GPU needs CuPy"):
        mpicoll.allreduce(x, ours, algorithm="aware")
    monkeypatch.setenv("MPICOLL_GPU_AWARE", "yes")
    doubtful = mpicoll.Comm(ours.Dup())
    mpicoll.allreduce(x, doubtful)
    assert "MPICOLL_GPU_AWARE=yes is not understood: expected 1 or 0" in state_of(doubtful).devices.why["aware"]
    doubtful.Free()
    monkeypatch.setenv("MPICOLL_GPU_AWARE", "1")

    flat = array.Array.flat

    def seen(array: array.Array) -> np.ndarray:
        assert (flat(array).size, flat(array).data.ptr) == (array.size, array.pointer)
        return np.empty(0) if not array.size else fake.memory_at(array.pointer, array.nbytes).view(array.dtype)

    monkeypatch.setattr(array.Array, "flat", seen)
    trusting = mpicoll.Comm(ours.Dup())
    for collective in CALLS:
        for n in (0, 1, 4 * P):
            y, stream = late(own_data(n, ours.rank))
            result = CALLS[collective](y, trusting, algorithm="aware", stream=stream)
            np.testing.assert_array_equal(result.get(stream=stream), expected(collective, n))
    y, stream = late(own_data(7, ours.rank))
    mpicoll.allreduce(y, trusting, "mean", algorithm="aware", stream=stream)
    np.testing.assert_array_equal(y.get(stream=stream), mpicoll.allreduce(own_data(7, ours.rank), ours, "mean"))
    trusting.Free()


def test_an_array_need_not_be_on_the_current_device(monkeypatch, comm):
    """Nor on the same one in all calls; but all of a call are."""
    if REAL:
        pytest.skip("needs two GPUs")
    monkeypatch.setattr(staging, "BUFFER", BOX)
    ours = mpicoll.Comm(comm.Dup())
    for mode in fakecupy.MODES:
        with fakecupy.installed(mode=mode, devices=2) as fake:
            import cupy

            kernels.add(fake, monkeypatch)
            own = mpicoll.Comm(ours.Dup())
            for way in ("staged", "auto"):
                for number in (1, 0, 1):
                    with cupy.cuda.Device(number):
                        x, stream = late(own_data(37, ours.rank))
                        with stream:
                            y = cupy.zeros(37)
                    own.Allreduce(x, y, algorithm=way, stream=stream)
                    with cupy.cuda.Device(number), stream:
                        y += 1
                        np.testing.assert_array_equal(y.get(stream=stream), expected("allreduce", 37) + 1)
                    stream.synchronize()
                    mpicoll.allreduce(y, own, "max", algorithm=way)
                    with cupy.cuda.Device(number):
                        np.testing.assert_array_equal(y.get(), expected("allreduce", 37) + 1)
            for pair in ((x, cupy.zeros(37)), (cupy.zeros(37), x)):
                with pytest.raises(ValueError, match="arrays are on devices 0, 1: those of a call must be on one"):
                    own.Allreduce(*pair)
            with pytest.raises(ValueError, match="the array is on device 1, stream= on device 0"):
                mpicoll.allreduce(x, own, stream=cupy.cuda.Stream())
            own.Free()
    ours.Free()


def test_ranks_take_gpus_in_turn(comm):
    if REAL:
        pytest.skip("asks the fake what it has seen")
    for seen in ((0, 1), (WORLD.rank,)):  # all see two, or each its own
        with fakecupy.installed(gpus=seen):
            found = assignment.take(comm)
            own = seen[comm.rank % len(seen)]
            assert found.number == array.cupy().cuda.Device().id == comm.rank % len(seen)
            assert found.ranks == tuple(rank for rank in range(P) if (rank % 2 if len(seen) == 2 else rank) == own)
            assert str(found) == f"Fake GPU (0000:0{own + 1}:00.0)"
    with fakecupy.installed(gpus=(0,) if comm.rank != P - 1 else ()):
        with pytest.raises(UserError, match=r"there is no GPU to be used here \(cudaError"):
            assignment.take(comm)
