"""Timing side by side: a synchronised start, the slowest rank, and paired repetitions.

A repetition is a round in which every implementation is called once (or several times, back to back), in random order,
each on data that no call before had and from a start of its own that all ranks wait for.  Its time is that of the
slowest rank, and compared is the ratio within a round: a machine that is slow for a while is slow for all.  Nothing is
decided by a rank's own clock but by rank 0's.

On a GPU a call lasts until its stream has done all of it: until the result is there.
"""

import gc
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from mpi4py import MPI

from ..statistics import median_ranks
from ..tuning.rules import NATIVE
from .contestants import Implementation, WithMemory, WithPath
from .machine import last_level_cache
from .task import Task, placements
from .testdata import Buffers, GpuBuffers, Memory, own_memory

NULL = "null"  # the name of an empty call
NEEDED = 10  # times the array: the memory that measuring takes on each rank
NEEDED_ON_GPU = 3  # one array in place, two not


@dataclass(frozen=True)
class Settings:
    """How to measure; times are in seconds."""

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
    native: np.ndarray | None  # microseconds of native, in the same repetitions
    wrong: int  # elements, on all ranks and in all repetitions, warm-up included
    way: str = ""  # the path that it has taken, on a GPU


def dissemination(comm: MPI.Intracomm) -> Callable[[], None]:
    """The dissemination barrier, ceil(log2 p) rounds of empty messages, which is equal with any MPI library."""
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
    """The results of every implementation, and of an empty call named null, at every task; the same on all ranks.

    A collective call; the settings of rank 0 count.
    """
    settings = comm.bcast(settings)
    places = [placements(task, comm.size, settings.in_place) for task in tasks]
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
            found[n] = _measure_task(own, implementations, tasks[n], places[n], settings, rng, until)
            gc.collect()
    finally:
        if collecting:
            gc.enable()
    own.Free()
    return [result for results in found for result in results]


def _measure_task(
    comm: MPI.Intracomm,
    implementations: Mapping[str, Implementation],
    task: Task,
    places: Sequence[bool],
    settings: Settings,
    rng: np.random.Generator,
    until: float,
) -> list[Result]:
    common = rng.integers(100, size=task.count, dtype=np.uint8)
    keys = [(name, in_place) for in_place in places for name in implementations] + [(NULL, places[0])]
    kind = GpuBuffers if settings.device == "gpu" else Buffers
    different: dict[tuple[bool, Memory], Buffers] = {}
    buffers: list[Buffers] = []
    for name, in_place in keys:
        subject = implementations.get(name)
        empty = subject.empty if isinstance(subject, WithMemory) else own_memory
        if (in_place, empty) not in different:
            different[in_place, empty] = kind(comm, task, common, in_place, settings.unaligned, empty)
        buffers.append(different[in_place, empty])
    calls = [
        used.completed(implementations[name](task, used.send, used.recv) if name != NULL else lambda: None)
        for (name, _), used in zip(keys, buffers, strict=True)
    ]
    paths: list[dict[str, None]] = [{} for _ in keys]
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
            if isinstance(subject := implementations.get(keys[n][0]), WithPath):
                paths[n][subject.latest_path()] = None
        comm.Allreduce(MPI.IN_PLACE, us, MPI.MAX)
        if repetition >= 0:
            rounds.append(us)
        if comm.bcast(comm.rank == 0 and is_enough(rounds, len(keys) - 1, settings, until)):  # all but the empty call
            break
    comm.Allreduce(MPI.IN_PLACE, wrong, MPI.SUM)
    columns = dict(zip(keys, np.array(rounds).T, strict=True))
    natives = [columns.get((NATIVE, in_place)) if name != NULL else None for name, in_place in keys]
    return [
        Result(*key, task, columns[key], native, int(bad), ", ".join(filter(None, taken)))
        for key, native, bad, taken in zip(keys, natives, wrong, paths, strict=True)
    ]


def is_enough(rounds: Sequence[np.ndarray], compared: int, settings: Settings, until: float) -> bool:
    """Whether to stop: ``rounds`` holds the times in each round, of which the first ``compared`` must be precise."""
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
