"""Collectives side by side: a synchronised start, the slowest rank, checked results, paired statistics.

A repetition is a round in which every implementation is called once (or several times, back to back), in random order,
each on data that no call before had and from a start of its own that all ranks wait for.  Its time is that of the
slowest rank, and compared is the ratio within a round: a machine that is slow for a while is slow for all.  Nothing is
decided by a rank's own clock but by rank 0's.

On a GPU a call lasts until its stream has done all of it: until the result is there.  Data are made and checked in host
memory there, too, and brought to the GPU and back outside the clock.
"""

import gc
import os
import platform
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import mpi4py
import numpy as np
from mpi4py import MPI

from . import __version__
from .algorithms import ALGORITHMS
from .errors import UserError
from .fit import median, median_ranks
from .mpi import gpu
from .mpi.buffers import is_half
from .mpi.collectives import cuts_of
from .mpi.comm import Comm
from .mpi.launch import cores, library_name, node_of
from .mpi.operations import MOVE, operation
from .mpi.select import SHARED, Options, choose
from .mpi.state import state_of
from .mpi.together import on_all
from .tuning import NATIVE, WAYS, Fingerprint, machine

NULL, SHARED_ARRAYS, SHARED_RESULT = "null", "shared_arrays", "shared_result"
TIME = "%Y-%m-%d %H:%M:%S"
BLOCK = 1 << 15  # elements made and compared at a time, so that what is in between stays in the cache
ALIGNED = 4096  # bytes: where buffers begin
PASSES = 4  # at least, over all sizes; in the first two all take part, in the others those that have a chance
HOPELESS = 3  # times as long as the best: no chance
COPIED = 256 << 20  # bytes, to find out how fast the memory of a GPU is
ENVIRONMENT = (
    *("MPICH_", "MPIR_CVAR_", "OMPI_MCA_", "PMIX_MCA_", "PRTE_MCA_", "I_MPI_"),
    *("UCX_", "FI_", "OMP_", "MPICOLL_"),
)


@dataclass(frozen=True)
class Task:
    """What is measured: ``count`` are the elements of the whole array, of which a rank may give or get a part."""

    collective: str
    count: int
    dtype: np.dtype
    op: str = "sum"
    root: int = 0


Implementation = Callable[[Task, Any, Any], Callable[[], object]]
"""From a task and the send and receive buffers, as mpi4py has them, to the call that is timed.

An array that it returns is its result; if it returns none, what it received is.
"""

Memory = Callable[[int, np.dtype], np.ndarray]
"""From a number of elements and their kind to an array for them; a collective call."""


@dataclass(frozen=True)
class Placed:
    """An ``Implementation`` whose buffers are to lie in memory of its own choice, as ``Comm.empty`` has it."""

    prepare: Implementation
    empty: Memory

    def __call__(self, task: Task, send: Any, recv: Any) -> Callable[[], object]:
        """See ``Implementation``."""
        return self.prepare(task, send, recv)


@dataclass(frozen=True)
class Going:
    """An ``Implementation`` on a GPU; ``went`` says by which way the latest call has gone, and forgets it."""

    prepare: Implementation
    went: Callable[[], str]

    def __call__(self, task: Task, send: Any, recv: Any) -> Callable[[], object]:
        """See ``Implementation``."""
        return self.prepare(task, send, recv)


@dataclass(frozen=True)
class Settings:
    """How it is measured; times in seconds."""

    in_place: tuple[bool, ...] = (False, True)
    calls: int = 1  # back to back, of which a repetition's time is the mean
    sync: str = "barrier"
    max_time: float = 60.0  # of all sizes together, but at least min_reps repetitions of each
    min_reps: int = 10
    warmup: int = 2
    precision: float = 0.02  # a size is done when the interval of each median reaches no further than this share of it
    seed: int = 0
    off_cache: bool = False
    unaligned: bool = False
    device: str = "cpu"  # where buffers are: or "gpu", the current one


@dataclass(frozen=True)
class Result:
    """One implementation at one size; ``us`` is the microseconds of the slowest rank in each repetition."""

    name: str
    in_place: bool
    task: Task
    us: np.ndarray
    native: np.ndarray | None  # of the MPI library's own, in the same repetitions
    wrong: int  # elements, on all ranks and in all repetitions, warm-up included
    way: str = ""  # by which it has gone, on a GPU


class GpuMemory(NamedTuple):
    """GB/s of a GPU, and of its link to the host, while every other GPU does the same; and most ranks on one."""

    copy: float  # of a copy within it: bytes that are read, and those that are written
    to_host: float
    from_host: float
    sharing: int


# ---- statistics


def summary(us: np.ndarray) -> dict[str, float]:
    """What is printed of a result."""
    p10, middle, p90, p99 = (float(value) for value in np.percentile(us, [10, 50, 90, 99]))
    ends = {"min": float(us.min()), "max": float(us.max()), "mean": float(us.mean())}
    return {"n": len(us), "median": middle, "p10": p10, "p90": p90, "p99": p99, **ends}


def bandwidths(collective: str, nbytes: int, p: int, us: float) -> tuple[float, float]:
    """algbw and busbw in GB/s (1e9), as nccl-tests defines them; ``nbytes`` are those of the whole array."""
    factor = {"allreduce": 2 * (p - 1) / p, "reduce_scatter": (p - 1) / p, "allgather": (p - 1) / p}
    return nbytes / us / 1e3, nbytes / us / 1e3 * factor.get(collective, 1)


def memory_share(
    collective: str, nbytes: int, p: int, us: float, memory: Mapping[str, float], one_result: bool = False
) -> float:
    """The share of the time that the least traffic takes at the bandwidth that ``memory_bandwidth`` found.

    A rank reads as much as the whole array (its own, or the parts of all), and writes what it gets: the whole array, a
    part in reduce_scatter, or if ``one_result`` is shared by all ranks; in reduce this is the root.  More than 1 where
    caches spare the memory.
    """
    least = nbytes + (nbytes / p if one_result or collective == "reduce_scatter" else nbytes)
    return least / memory["add" if "reduce" in collective else "copy"] / us / 1e3


def gpu_memory_share(
    collective: str, nbytes: int, p: int, us: float, memory: Mapping[str, float], there: GpuMemory, through_host: bool
) -> float:
    """The share of the time that the least traffic takes, as ``gpu_bandwidth`` found it.

    What the ranks of a GPU give is read once in its memory, what they get is written once.  If it goes through host
    memory, the one comes over its link and the other goes back, at once with each other and with what
    ``memory_share`` has the host do: it takes as long as the slowest of these.
    """
    ranks = there.sharing
    gives = {"bcast": 1, "allgather": ranks / p}.get(collective, ranks) * nbytes
    gets = {"reduce": 1, "bcast": ranks - 1, "reduce_scatter": ranks / p}.get(collective, ranks) * nbytes
    if not through_host:
        return (gives + gets) / there.copy / us / 1e3
    link = max(gives / there.to_host, gets / there.from_host) / us / 1e3
    return max(link, memory_share(collective, nbytes, p, us, memory))


def record(result: Result, p: int, memory: Mapping[str, float], there: GpuMemory | None = None) -> dict[str, Any]:
    """All that is to be said of a result, in plain numbers and texts; ``there`` if it is one of a GPU."""
    task, said = result.task, summary(result.us)
    nbytes = task.count * task.dtype.itemsize
    at = (task.collective, nbytes, p, said["median"])
    algbw, busbw = bandwidths(*at) if result.name != NULL else (None, None)
    speed, low, high = (None, None, None) if result.native is None else median(result.native / result.us)
    share = None
    if result.name != NULL and there:
        share = gpu_memory_share(*at, memory, there, result.name == NATIVE or "staged" in result.way)
    elif result.name != NULL:
        share = memory_share(*at, memory, result.name == SHARED_RESULT)
    return {
        "collective": task.collective,
        "implementation": result.name,
        "in_place": result.in_place,
        "ranks": p,
        "bytes": nbytes,
        "count": task.count,
        "dtype": task.dtype.name,
        "op": task.op if "reduce" in task.collective else "none",
        "root": task.root if task.collective in ("reduce", "bcast") else -1,
        **said,
        "wrong": result.wrong,
        "algbw": algbw,
        "busbw": busbw,
        "memory_share": share,
        "speed": speed,
        "speed_low": low,
        "speed_high": high,
        **({"way": result.way} if there else {}),
        "us": result.us.tolist(),
    }


# ---- data whose results are known


class _Op(NamedTuple):
    """``one`` makes a rank's elements from what is common to all ranks and its own share, ``all`` the result.

    Nothing overflows: MPI leaves open what happens then, and Open MPI does not wrap around.
    """

    one: Callable[[np.ndarray, Any], np.ndarray]
    all: Callable[[np.ndarray, np.ndarray], np.ndarray]
    few: bool = False  # ranks whose share is not 0


def _power(x: np.ndarray, share: Any) -> np.ndarray:
    return (x % 2 + 1) ** share


def _times(x: np.ndarray, share: Any) -> np.ndarray:
    return (x % 20 + 1) * share


OPS = {
    "sum": _Op(np.add, lambda x, shares: x * len(shares) + int(shares.sum())),
    "prod": _Op(_power, lambda x, shares: _power(x, int(shares.sum())), few=True),
    "max": _Op(np.add, lambda x, shares: x + int(shares.max())),
    "min": _Op(np.add, lambda x, shares: x + int(shares.min())),
}
_SUM_OF_BYTES = _Op(_times, lambda x, shares: _times(x, int(shares.sum())), few=True)


def _shares(order: np.ndarray, turn: int, few: bool) -> np.ndarray:
    """Small integers that change from turn to turn, and differ for up to 27 ranks, which are in some order: so sums of
    numbers below 128 are exact in all floats up to a hundred thousand ranks.  If few are not 0, they add up to 6."""
    if few:
        places = (order + turn) % max(len(order), 3)
        return np.where(places < 6, places % 3, 0)
    return (order + turn) % 27


class _Buffers:
    """What this rank gives and gets, in one array or in two, and what must be in it afterwards."""

    def __init__(
        self, comm: MPI.Intracomm, task: Task, base: np.ndarray, in_place: bool, unaligned: bool, empty: Memory
    ) -> None:
        self._task, self._base, self._rank = task, base, comm.rank
        of_bytes = task.op == "sum" and task.dtype.itemsize == 1 and "reduce" in task.collective
        self._op = _SUM_OF_BYTES if of_bytes else OPS[task.op]
        self._cuts = np.array(cuts_of(None, task.count, comm.size))
        mine, whole, nothing = slice(*self._cuts[comm.rank :][:2]), slice(0, task.count), slice(0, 0)
        at_root = whole if comm.rank == task.root else nothing
        self._gives = {"bcast": at_root, "allgather": mine}.get(task.collective, whole)
        self._gets = {"reduce": at_root, "reduce_scatter": mine}.get(task.collective, whole)
        gets = self._gets.stop - self._gets.start
        before = 1 if unaligned else 0
        takes = task.count if in_place else gets
        self._memory = empty(before + takes, task.dtype)[before:]  # what the call may write to
        self._received = self._memory[:gets]
        self._given = self._memory[self._gives]
        if not in_place:
            self._given = empty(before + self._gives.stop - self._gives.start, task.dtype)[before:]
        self._receives = task.collective != "reduce" or comm.rank == task.root
        self._only_given = not in_place or not self._receives
        self._hand_over(self._given, self._memory)

    def _hand_over(self, given: Any, memory: Any) -> None:
        """To the call."""
        moved = is_half(self._task.dtype) and "reduce" not in self._task.collective
        if moved:  # the MPI library need not know what they are
            given, memory = given.view(np.int16), memory.view(np.int16)
        self.send: Any = given if self._only_given else MPI.IN_PLACE
        self.recv: Any = memory if self._receives else None

    def ready(self, call: Callable[[], object]) -> Callable[[], object]:
        """What is timed."""
        return call

    def fill(self, order: np.ndarray, turn: int) -> None:
        """Overwrite all that is there, with the data of this turn."""
        self._shares = _shares(order, turn, self._op.few)
        self._memory.view(np.uint8)[:] = 0xFF  # as floats, these are not numbers
        for here, there in _blocks(self._gives):
            self._given[here] = self._given_at(there)

    def wrong(self, returned: object) -> int:
        """How many elements of the result, or of what was only to be read, are not what they must be."""
        result = returned if isinstance(returned, np.ndarray) else self._received
        if result.shape != self._received.shape:
            return max(self._received.size, 1)
        pairs: Iterator[tuple[np.ndarray, np.ndarray]] = (
            (result[here], self._wanted_at(there)) for here, there in _blocks(self._gets)
        )
        if self._only_given:
            given = ((self._given[here], self._given_at(there)) for here, there in _blocks(self._gives))
            pairs = chain(pairs, given)
        return sum(int(np.count_nonzero(found != right)) for found, right in pairs)

    def _given_at(self, there: slice) -> np.ndarray:
        share = int(self._shares[self._task.root if self._task.collective == "bcast" else self._rank])
        return self._cast(self._op.one(self._base[there].astype(np.int32), share))

    def _wanted_at(self, there: slice) -> np.ndarray:
        x = self._base[there].astype(np.int32)
        if self._task.collective == "bcast":
            return self._cast(x + int(self._shares[self._task.root]))
        if self._task.collective == "allgather":
            owners = np.searchsorted(self._cuts, np.arange(there.start, there.stop), "right") - 1
            return self._cast(x + self._shares[owners].astype(np.int32))
        return self._cast(self._op.all(x, self._shares))

    def _cast(self, exact: np.ndarray) -> np.ndarray:
        """Floats of 16 bits are rounded once, as results are."""
        with np.errstate(over="ignore"):
            return exact.astype(self._task.dtype)


class _OnGpu(_Buffers):
    """The same on the current GPU, on its current stream."""

    def __init__(
        self, comm: MPI.Intracomm, task: Task, base: np.ndarray, in_place: bool, unaligned: bool, empty: Memory
    ) -> None:
        super().__init__(comm, task, base, in_place, unaligned, empty)
        before = 1 if unaligned else 0

        def like(host: np.ndarray) -> Any:
            return gpu.cupy().empty(before + len(host), host.dtype)[before:]

        memory = like(self._memory)
        given = memory[self._gives] if in_place else like(self._given)
        self._hosts = [(gpu.Array(memory), self._memory)]
        if not in_place:
            self._hosts.append((gpu.Array(given), self._given))
        self._hand_over(given, memory)

    def ready(self, call: Callable[[], object]) -> Callable[[], object]:
        """Until the result is there."""
        stream = gpu.cupy().cuda.get_current_stream()

        def awaited() -> None:
            call()
            stream.synchronize()

        return awaited

    def fill(self, order: np.ndarray, turn: int) -> None:
        """See ``_Buffers``."""
        super().fill(order, turn)
        for array, host in self._hosts:
            array.store(host)
            array.stream.synchronize()

    def wrong(self, returned: object) -> int:
        """See ``_Buffers``; nothing is returned."""
        for array, host in self._hosts:
            array.load(host)
            array.stream.synchronize()
        return super().wrong(None)


def _blocks(part: slice) -> Iterator[tuple[slice, slice]]:
    """The part piece by piece: where in an array of its own, and where in the whole."""
    for start in range(part.start, part.stop, BLOCK):
        stop = min(start + BLOCK, part.stop)
        yield slice(start - part.start, stop - part.start), slice(start, stop)


def _empty(count: int, dtype: np.dtype) -> np.ndarray:
    """A ``Memory``: of this process alone, from the beginning of a page."""
    memory = np.empty(count * dtype.itemsize + ALIGNED, np.uint8)
    start = -memory.ctypes.data % ALIGNED
    return memory[start : start + count * dtype.itemsize].view(dtype)


# ---- what is compared


def implementations(comm: MPI.Intracomm, collective: str, dtype: np.dtype, check: str) -> dict[str, Implementation]:
    """``auto``, the MPI library's own (which cannot add 16-bit floats as we do), and every algorithm of the table.

    Where all ranks share memory also what a ``Comm`` does there with ordinary arrays (in an allreduce also where those
    of each node do), with arrays that lie in it, and in an allreduce with one result for all.
    """
    ours = Comm(comm, check=check)
    state = state_of(ours)
    found: dict[str, Implementation] = {"auto": partial(call_of, ours)}
    if not (is_half(dtype) and "reduce" in collective):
        found[NATIVE] = partial(call_of, MPI.Intracomm(comm))
    if state.can_share(collective, False, operation("sum", dtype)):
        found[SHARED.name] = partial(call_of, ours, algorithm=SHARED.name)
    if state.shares:
        found[SHARED_ARRAYS] = Placed(partial(call_of, ours), ours.empty)
        if collective == "allreduce":
            found[SHARED_RESULT] = Placed(partial(_shared_result, ours), ours.empty)
    return found | {name: partial(call_of, ours, algorithm=name) for name in ALGORITHMS[collective]}


def implementations_on_gpu(
    comm: MPI.Intracomm, collective: str, dtype: np.dtype, check: str, op: str = "sum", named: Sequence[str] = ()
) -> tuple[dict[str, Implementation], dict[str, str]]:
    """The same for arrays on the current GPU; and the ways that are left out, with what is against them.

    ``auto``, what one writes by hand in place of the MPI library's own, every way that can be gone here, and every
    algorithm of the table on what is staged in host memory.  A ``UserError`` if a way cannot be gone that is ``named``.
    """
    ours = Comm(comm, check=check)
    devices = state_of(ours).join_devices(gpu.cupy().cuda.Device().id)
    reduces = "reduce" in collective
    done = operation(op, dtype) if reduces else MOVE

    def went() -> str:
        ways = ", ".join({*devices.went.values()})
        devices.went.clear()
        return ways

    found: dict[str, Implementation] = {"auto": Going(partial(call_of, ours), went)}
    if not (is_half(dtype) and reduces):
        found[NATIVE] = partial(_by_hand, MPI.Intracomm(comm))
    refused = {}
    for way in WAYS:
        against = devices.why[way] if way not in named else ""
        try:
            if not against:
                devices.ways(way, collective, done, dtype, False)
        except ValueError as error:
            if way in named:
                raise UserError(str(error)) from None
            against = str(error)
        if against:
            refused[way] = against
        else:
            found[way] = Going(partial(call_of, ours, algorithm=way), went)
    staged = {name: Going(partial(call_of, ours, algorithm=name), went) for name in ALGORITHMS[collective]}
    return found | staged, refused


def _by_hand(comm: MPI.Intracomm, task: Task, send: Any, recv: Any) -> Callable[[], object]:
    """What one writes with CuPy and mpi4py alone: out to host memory, as ``get`` has it, the call, and back."""
    at_root = task.collective == "bcast" and comm.rank == task.root
    fetched = send is MPI.IN_PLACE and (at_root or task.collective != "bcast")

    def call() -> None:
        given = send if send is MPI.IN_PLACE else send.get()
        taken = None
        if recv is not None:
            taken = recv.get() if fetched else np.empty(recv.shape, recv.dtype)
        call_of(comm, task, given, taken)()
        if recv is not None and not at_root:
            recv.set(taken)

    return call


def _shared_result(comm: Comm, task: Task, send: Any, recv: Any) -> Callable[[], object]:
    given = recv if send is MPI.IN_PLACE else send
    return partial(comm.allreduce_shared, given, getattr(MPI, task.op.upper()))


def call_of(comm: MPI.Intracomm, task: Task, send: Any, recv: Any, **options: str) -> Callable[[], object]:
    """The method of mpi4py, ready to be called; that of equal parts where they are."""
    op: MPI.Op = getattr(MPI, task.op.upper())
    cuts = cuts_of(None, task.count, comm.size)
    counts = [after - before for before, after in pairwise(cuts)]
    calls: dict[str, Callable[[], object]] = {
        "allreduce": partial(comm.Allreduce, send, recv, op, **options),
        "reduce": partial(comm.Reduce, send, recv, op, task.root, **options),
        "bcast": partial(comm.Bcast, recv, task.root, **options),
        "reduce_scatter": partial(comm.Reduce_scatter_block, send, recv, op, **options)
        if len({*counts}) == 1
        else partial(comm.Reduce_scatter, send, recv, counts, op, **options),
        "allgather": partial(comm.Allgather, send, recv, **options)
        if len({*counts}) == 1
        else partial(comm.Allgatherv, send, [recv, counts], **options),
    }
    return calls[task.collective]


def placements(task: Task, p: int, asked: Sequence[bool]) -> list[bool]:
    """In place, or not, or both, as far as the collective has it; a ``UserError`` if nothing is left."""
    if task.collective == "bcast":
        has, why = {True}, "bcast has one buffer, and so is in place"
    elif task.collective == "reduce_scatter" and task.count % p:
        has, why = {False}, f"reduce_scatter in place is measured where {p} ranks get equal parts: MPICH 5 fails there"
    else:
        has, why = {False, True}, ""
    found = [one for one in asked if one in has]
    if not found:
        raise UserError(f"nothing to measure at {task.count} elements: {why}")
    return found


# ---- measuring


def dissemination(comm: MPI.Intracomm) -> Callable[[], None]:
    """A barrier of ceil(log2 p) rounds of empty messages: the same with any MPI library."""
    p, rank, empty = comm.size, comm.rank, bytearray()
    peers = [((rank + (1 << k)) % p, (rank - (1 << k)) % p) for k in range((p - 1).bit_length())]

    def barrier() -> None:
        for after, before in peers:
            comm.Sendrecv(empty, after, 0, empty, before, 0)

    return barrier


SYNC: dict[str, Callable[[MPI.Intracomm], Callable[[], None]]] = {
    "barrier": lambda comm: comm.Barrier,
    "dissemination": dissemination,
    "none": lambda comm: lambda: None,
}
"""How ranks wait for each other before each call."""


def measure(
    comm: MPI.Intracomm, implementations: Mapping[str, Implementation], tasks: Sequence[Task], settings: Settings
) -> list[Result]:
    """Every implementation, and an empty call named null, at every task; the same on all ranks, a collective call."""
    settings = comm.bcast(settings)
    where = [placements(task, comm.size, settings.in_place) for task in tasks]
    rng = np.random.default_rng(settings.seed)  # all ranks draw the same
    own = comm.Dup()
    end = time.monotonic() + settings.max_time
    found: list[list[Result]] = [[] for _ in tasks]
    collecting = gc.isenabled()
    gc.disable()  # not while the clock runs
    try:
        for done, n in enumerate(rng.permutation(len(tasks))):
            now = time.monotonic()
            until = now + (end - now) / (len(tasks) - done)
            found[n] = _at(own, implementations, tasks[n], where[n], settings, rng, until)
            gc.collect()
    finally:
        if collecting:
            gc.enable()
    own.Free()
    return [result for results in found for result in results]


def _at(
    comm: MPI.Intracomm,
    implementations: Mapping[str, Implementation],
    task: Task,
    where: Sequence[bool],
    settings: Settings,
    rng: np.random.Generator,
    until: float,
) -> list[Result]:
    base = rng.integers(100, size=task.count, dtype=np.uint8)
    keys = [(name, one) for one in where for name in implementations] + [(NULL, where[0])]
    kind = _OnGpu if settings.device == "gpu" else _Buffers
    made: dict[tuple[bool, Memory], _Buffers] = {}
    buffers: list[_Buffers] = []
    for name, one in keys:
        subject = implementations.get(name)
        empty = subject.empty if isinstance(subject, Placed) else _empty
        if (one, empty) not in made:
            made[one, empty] = kind(comm, task, base, one, settings.unaligned, empty)
        buffers.append(made[one, empty])
    calls = [
        used.ready(implementations[name](task, used.send, used.recv) if name != NULL else lambda: None)
        for (name, _), used in zip(keys, buffers, strict=True)
    ]
    ways: list[dict[str, None]] = [{} for _ in keys]
    elsewhere = np.zeros(2 * last_level_cache() if settings.off_cache else 0, np.uint8)
    synchronise = SYNC[settings.sync](comm)
    rounds: list[np.ndarray] = []
    wrong = np.zeros(len(keys), np.int64)
    order, turn = rng.permutation(comm.size), 0
    for repetition in range(-settings.warmup, sys.maxsize):
        us = np.zeros(len(keys))
        for n in rng.permutation(len(keys)):
            turn += int(rng.integers(1, 3))
            used, call = buffers[n], calls[n]
            used.fill(order, turn)
            np.add(elsewhere, 1, out=elsewhere)
            synchronise()
            start = time.perf_counter_ns()
            for _ in range(settings.calls):
                returned = call()
            us[n] = (time.perf_counter_ns() - start) / 1e3 / settings.calls
            if settings.calls > 1:  # in place, the last has reduced what the one before it had: check one more
                used.fill(order, turn)
                returned = call()
            wrong[n] += used.wrong(returned) if keys[n][0] != NULL else 0
            if isinstance(subject := implementations.get(keys[n][0]), Going):
                ways[n][subject.went()] = None
        comm.Allreduce(MPI.IN_PLACE, us, MPI.MAX)
        if repetition >= 0:
            rounds.append(us)
        if comm.bcast(comm.rank == 0 and is_enough(rounds, len(keys) - 1, settings, until)):  # all but the empty call
            break
    comm.Allreduce(MPI.IN_PLACE, wrong, MPI.SUM)
    columns = dict(zip(keys, np.array(rounds).T, strict=True))
    natives = [columns.get((NATIVE, one)) if name != NULL else None for name, one in keys]
    return [
        Result(*key, task, columns[key], native, int(bad), ", ".join(filter(None, way)))
        for key, native, bad, way in zip(keys, natives, wrong, ways, strict=True)
    ]


def is_enough(rounds: Sequence[np.ndarray], compared: int, settings: Settings, until: float) -> bool:
    """Whether to end: ``rounds`` are the times of all, of which so many, the first, must be precise."""
    n = len(rounds)
    if n < settings.min_reps:
        return False
    if time.monotonic() > until:
        return True
    if n % max(8, 1 << n.bit_length() >> 4):  # sorting takes its time
        return False
    ordered = np.sort(np.array(rounds)[:, :compared], axis=0)
    low, high = median_ranks(n)
    middle = np.median(ordered, axis=0)
    return bool(np.all(np.maximum(ordered[high] - middle, middle - ordered[low]) <= settings.precision * middle))


# ---- what auto chooses from


def untuned(comm: MPI.Intracomm, task: Task) -> str:
    """The algorithm that ``auto`` is there, with ordinary arrays and no profile."""
    state, reduces = state_of(Comm(comm)), "reduce" in task.collective
    done = operation(task.op, task.dtype) if reduces else MOVE
    shares = reduces and state.can_share(task.collective, False, done)
    rules = state.defaults(task.collective)
    row = choose(task.collective, Options(), task.count, task.dtype, done, rules, shares=shares)
    return row.name if row else NATIVE


def compete(comm: MPI.Intracomm, tasks: Sequence[Task], settings: Settings) -> list[dict[str, np.ndarray]]:
    """For each task the times of all that ``auto`` may choose from, with ordinary arrays; the same on all ranks.

    Passes over all tasks are made until the time is over, at least ``PASSES``.  In the first two all take turns at each
    task, then those that have a chance there: the more take turns, the less of each call is left in the caches, where
    a program makes one call and not seven.  Every pass has memory of its own, and tasks come in an order of its own; a
    neighbor on the machine seldom spoils two of them at a task.  Repetitions are paired, and the first are those of
    all.  An allreduce is in place, as in training, others as far as they must.  A ``UserError`` for a wrong result.
    """
    settings = comm.bcast(settings)
    rng = np.random.default_rng(settings.seed)
    start = time.monotonic()
    share = settings.max_time / len(tasks) / (2 * PASSES)  # seconds of a turn: more passes rather than longer ones
    found = [{name: np.empty(0) for name in _choices(comm, task)} for task in tasks]
    rivals = [[*times] for times in found]
    done = 0
    while True:
        if done >= 2:
            rivals = [_with_a_chance(times, names) for times, names in zip(found, rivals, strict=True)]
        left = [n for n, names in enumerate(rivals) if len(names) > 1]  # nobody runs alone
        spent = time.monotonic() - start
        if not left or comm.bcast(done >= PASSES and spent + spent / done / 2 > settings.max_time):
            return found
        for n in rng.permutation(left):
            where = (tasks[n].collective in ("allreduce", "bcast"),)
            how = replace(settings, in_place=where, max_time=share, seed=int(rng.integers(2**32)))
            choices = _choices(comm, tasks[n])
            for one in measure(comm, {name: choices[name] for name in rivals[n]}, [tasks[n]], how):
                if one.wrong:
                    what = f"{one.name} {one.task.collective} of {one.task.count} elements"
                    raise UserError(f"{one.wrong} wrong elements: {what}")
                if one.name != NULL:
                    found[n][one.name] = np.append(found[n][one.name], one.us)
        done += 1


def _with_a_chance(times: Mapping[str, np.ndarray], names: list[str]) -> list[str]:
    """Of these, who took part in everything so far, those who do not take ``HOPELESS`` times as long as the best of
    them, beyond noise."""
    best = min((times[name] for name in names), key=np.median)
    return [name for name in names if median(times[name] / best)[1] <= HOPELESS]


def _choices(comm: MPI.Intracomm, task: Task) -> dict[str, Implementation]:
    known = {NATIVE, *ALGORITHMS[task.collective], *([SHARED.name] if "reduce" in task.collective else [])}
    found = implementations(comm, task.collective, task.dtype, "off")
    return {name: made for name, made in found.items() if name in known}


# ---- the machine


def fingerprint(comm: MPI.Intracomm) -> Fingerprint:
    """What a profile of this job is for; rank 0's machine counts.  A collective call."""
    node = node_of(comm)
    firsts = comm.allgather(node.bcast(comm.rank))
    node.Free()
    layout = tuple(count for _, count in sorted(Counter(firsts).items()))
    return Fingerprint(library_name(), comm.bcast(machine()), layout)


def last_level_cache() -> int:
    """Bytes, as the kernel says; 32 MiB if it does not."""
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size[:-1]) << 10 for size in sizes if size[:-1].isdigit() and size.endswith("K")), default=32 << 20)


def memory_bandwidth(comm: MPI.Intracomm) -> dict[str, float]:
    """GB/s of a rank while all copy (2 bytes moved for one), or add (3), arrays that no cache holds: the best of five.

    As STREAM counts: the line that is read because it will be written does not count.
    """
    length = min(max(4 * last_level_cache() // comm.size, 4 << 20), 64 << 20) // 8
    a, b, c = (np.full(length, value, np.float64) for value in (1, 2, 0))
    found = {}
    for name, arrays, work in (("copy", 2, partial(np.copyto, c, a)), ("add", 3, partial(np.add, a, b, out=c))):
        seconds = []
        for _ in range(5):
            comm.Barrier()
            start = time.perf_counter()
            work()
            comm.Barrier()  # until all are done, also where they take turns on a core
            seconds.append(time.perf_counter() - start)
        found[name] = comm.bcast(arrays * a.nbytes / min(seconds) / 1e9)
    return found


def gpu_bandwidth(comm: MPI.Intracomm, mine: gpu.Gpu) -> GpuMemory:
    """The best of ten copies, by the GPU's clock: by the first rank of each GPU, while the others wait.  The slowest
    GPU counts.  A collective call."""
    event, first = gpu.cupy().cuda.Event, comm.rank == mine.ranks[0]
    here, other = (gpu.Array(gpu.cupy().zeros(COPIED if first else 0, np.uint8)) for _ in range(2))
    host = gpu.pinned(here.nbytes)

    def speed(moved: int, work: Callable[[], None]) -> float:
        ms = []
        for _ in range(10):
            comm.Barrier()
            start, end = event(), event()
            start.record(here.stream)
            work()
            end.record(here.stream)
            end.synchronize()
            ms.append(gpu.cupy().cuda.get_elapsed_time(start, end))
        return comm.allreduce(moved / min(ms) / 1e6 if first else float("inf"), MPI.MIN)

    return GpuMemory(
        copy=speed(2 * COPIED, partial(other.fill_from, here)),
        to_host=speed(COPIED, partial(here.load, host)),
        from_host=speed(COPIED, partial(here.store, host)),
        sharing=comm.allreduce(len(mine.ranks), MPI.MAX),
    )


def check_memory(comm: MPI.Intracomm, needed: int) -> None:
    """A ``UserError`` if the memory of a node is less than ``needed`` bytes for each of its ranks."""
    node = node_of(comm)
    total, ranks = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), node.size
    node.Free()

    def check() -> None:
        if needed * ranks > total:
            raise UserError(
                f"the largest size takes {needed / 2**30:.4g} GiB of memory for each of {ranks} rank(s) on a node, "
                f"which has {total / 2**30:.4g} GiB in all: take smaller sizes, or fewer ranks"
            )

    on_all(comm, check)


def check_gpu_memory(comm: MPI.Intracomm, mine: gpu.Gpu, needed: int) -> None:
    """The same of the memory of a GPU, of which others may have taken some."""
    free = gpu.cupy().cuda.runtime.memGetInfo()[0]

    def check() -> None:
        if needed * len(mine.ranks) > free:
            raise UserError(
                f"the largest size takes {needed / 2**30:.4g} GiB on {mine} for each of {len(mine.ranks)} rank(s), and "
                f"{free / 2**30:.4g} GiB are free there: take smaller sizes, or fewer ranks"
            )

    on_all(comm, check)


def timer_resolution() -> float:
    """Microseconds: the least that two readings of the clock differ by, if they do."""
    readings = [time.perf_counter_ns() for _ in range(1000)]
    return min(after - before for before, after in pairwise(readings) if after > before) / 1e3


def environment(comm: MPI.Intracomm) -> dict[str, Any]:
    """What the numbers depend on; on rank 0, where it is known of all ranks.  A collective call."""
    own = {"rank": comm.rank, "hostname": socket.gethostname(), "pid": os.getpid(), "cpus": cores()}
    devices = comm.gather(own)
    if devices is None:
        return {}
    return {
        "start_time": time.strftime(TIME),
        "args": sys.argv,
        "env": [f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith(ENVIRONMENT)],
        "mpicoll": __version__,
        "git": _revision(),
        "mpi": library_name(),
        "library": MPI.Get_library_version().strip("\0 \n"),
        "mpi4py": mpi4py.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "kernel": platform.release(),
        "devices": devices,
    }


def gpu_environment(comm: MPI.Intracomm, mine: gpu.Gpu) -> dict[str, Any]:
    """The same of GPUs."""
    gpus = comm.gather({"rank": comm.rank, **mine._asdict()})
    if gpus is None:
        return {}
    module = gpu.cupy()
    runtime = module.cuda.runtime
    versions = {"cuda_runtime": runtime.runtimeGetVersion(), "cuda_driver": runtime.driverGetVersion()}
    numbers = {name: f"{version // 1000}.{version % 1000 // 10}" for name, version in versions.items()}
    return {"gpus": gpus, "cupy": module.__version__, **numbers}


def _revision() -> str | None:
    """Of the repository this package is in, if it is one's own."""
    folder = Path(__file__).parents[1]
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 and (folder / ".git").exists() else None
