"""Memory that the ranks of a node share.  It has no name, so that nothing is left of it when a job is killed.

It is Linux's anonymous memory file, which the ranks open through /proc and map: it needs no call of the MPI library,
and no /dev/shm, which in containers often has but a few megabytes.  Where ranks cannot see each other in /proc, it is a
file in /dev/shm, removed as soon as all have opened it.
"""

import mmap
import os
import sys
import tempfile
import weakref
from bisect import bisect_right
from collections.abc import Callable, Sequence
from contextlib import suppress
from operator import itemgetter
from pathlib import Path
from threading import Lock
from typing import NamedTuple

import numpy as np
from mpi4py import MPI

PAGE = mmap.PAGESIZE

LITTLE = 1 << 20
"""Bytes up to which nobody asks whether there is as much memory."""

KEEPING_NO_FILE: dict[str, bool] = {} if sys.version_info < (3, 13) else {"trackfd": False}
"""How to map a file without a descriptor of one's own for it, of which a process may have a thousand."""


def nameless() -> tuple[int, str]:
    """A file of anonymous memory: its descriptor, and where other processes find it."""
    handle = os.memfd_create("mpicoll")
    return handle, f"/proc/{os.getpid()}/fd/{handle}"


def in_shm() -> tuple[int, str]:
    """A file in /dev/shm."""
    return tempfile.mkstemp(prefix="mpicoll-", dir="/dev/shm")


def temporary() -> tuple[int, str]:
    """A file on disk: for what is small."""
    return tempfile.mkstemp(prefix="mpicoll-")


MEMORY: Sequence[Callable[[], tuple[int, str]]] = (nameless, in_shm)


def share(
    node: MPI.Intracomm, size: int, makers: Sequence[Callable[[], tuple[int, str]]] | None = None
) -> mmap.mmap | None:
    """``size`` bytes, all zero, that the ranks of ``node`` share; ``None`` on all of them if they cannot (as in
    containers of their own), or there is not as much.  A collective call.

    Every rank reserves its own of as many equal parts, which then lies near it; and nobody meets the end of memory
    later, in a bus error.
    """
    enough = size < LITTLE or node.bcast(size <= available())
    part = size // node.size
    start, end = node.rank * part, size if node.rank == node.size - 1 else (node.rank + 1) * part
    for make in (MEMORY if makers is None else makers) if enough else ():
        handle, path, same, named = -1, "", (0, 0), False
        if node.rank == 0:
            with suppress(OSError, AttributeError):
                handle, path = make()
                os.ftruncate(handle, size)
                same, named = os.fstat(handle)[1:3], os.fstat(handle).st_nlink > 0
        path, same, named = node.bcast((path, same, named))
        file = memory = None
        with suppress(OSError):
            if os.stat(path)[1:3] == same:  # a number of another container's process may be one here too
                file = os.open(path, os.O_RDWR)
        if named:
            node.Barrier()
            if handle >= 0:
                os.unlink(path)
        if file is not None:
            with suppress(OSError, ValueError, OverflowError):
                if end > start:
                    os.posix_fallocate(file, start, end - start)
                memory = mmap.mmap(file, size, **KEEPING_NO_FILE)
            os.close(file)
        found = node.allgather(memory is not None)
        if handle >= 0:
            os.close(handle)
        if memory is not None and all(found):
            return memory
    return None


def available() -> int:
    """Bytes of memory that this machine, or the container, could give now, as the kernel says."""
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    with suppress(OSError, ValueError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        found += [int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")]
    with suppress(OSError, ValueError):  # a container sees its own limit here; "max" is none
        limit, used = (int(Path("/sys/fs/cgroup", name).read_text()) for name in ("memory.max", "memory.current"))
        found.append(limit - used)
    return min(found)


class Window:
    """Memory with a part for each rank of a node, which all of them have mapped."""

    def __init__(self, number: int, memory: mmap.mmap, processes: tuple[int, ...], rank: int) -> None:
        self.number, self.processes = number, processes  # in the order of parts
        self.size = len(memory) // len(processes)
        self.parts = [np.frombuffer(memory, np.uint8, self.size, q * self.size) for q in range(len(processes))]
        self.start = address(self.parts[rank])
        self.lent, self._base = False, 0
        self._memory, self._rank = memory, rank
        self._among: dict[tuple[int, ...], list[np.ndarray] | None] = {}
        windows[number] = self
        _order()

    def lend(self, nbytes: int) -> np.ndarray:
        """This rank's part, in use until the array and all its views are gone."""
        array = np.frombuffer(self._memory, np.uint8, nbytes, self._rank * self.size)
        self.lent, self._base = True, id(array)
        _bases[id(array)] = self.number, nbytes
        weakref.finalize(array, self._returned, id(array)).atexit = False
        return array[:]  # a view: it, and its views, have this array for their base

    def _returned(self, base: int) -> None:
        self.lent = False
        _bases.pop(base, None)

    def parts_of(self, processes: tuple[int, ...]) -> list[np.ndarray] | None:
        """Theirs, if all of them have one."""
        if processes == self.processes:
            return self.parts
        if processes not in self._among:
            known = dict(zip(self.processes, self.parts, strict=True))
            self._among[processes] = [known[one] for one in processes] if known.keys() >= {*processes} else None
        return self._among[processes]

    def forget(self) -> None:
        """It is no longer found: arrays in it are as any others.  Its memory goes with the last of them."""
        del windows[self.number]
        _bases.pop(self._base, None)
        _order()


windows: dict[int, Window] = {}
"""By number, which is the same on all ranks that have it, and no other's on their node."""
_ordered: tuple[tuple[int, Window], ...] = ()  # by where this process' own parts begin
_ordering = Lock()
_bases: dict[int, tuple[int, int]] = {}  # the number of the window, and the bytes, by the id of an array that is lent


def _order() -> None:
    """Other threads may be looking meanwhile."""
    global _ordered
    with _ordering:
        _ordered = tuple(sorted((window.start, window) for window in list(windows.values())))


class Place(NamedTuple):
    """Where an array of this rank's lies: the number of the window, 0 if it is in none, and the byte of the part."""

    window: int = 0
    offset: int = 0


NOWHERE = Place()


def place_of(array: np.ndarray) -> Place:
    """Return where a contiguous array lies.  Usual cases need no address, which takes NumPy 0.7 us."""
    base = array.base
    ordered = _ordered
    if not ordered or base is None:
        return NOWHERE
    number, nbytes = _bases.get(id(base), (0, 0))
    if number and array.nbytes == nbytes:
        return Place(number)
    start = address(array)
    n = bisect_right(ordered, start, key=itemgetter(0))
    if n:
        window = ordered[n - 1][1]
        if start + array.nbytes <= window.start + window.size:
            return Place(window.number, start - window.start)
    return NOWHERE


class Pool:
    """The windows of one communicator: those that no rank uses any more are used again."""

    def __init__(self, node: MPI.Intracomm, processes: tuple[int, ...]) -> None:
        self._node, self._processes = node, processes
        self._windows: list[Window] = []

    def empty(self, nbytes: int) -> np.ndarray | None:
        """Return ``nbytes`` of a window, not necessarily as many on each rank; ``None`` on all of them if there is no
        memory to share.  A collective call of the node."""
        asked = self._node.allgather((nbytes, [window.number for window in self._windows if not window.lent]))
        most = max(size for size, _ in asked)
        free = set.intersection(*(set(numbers) for _, numbers in asked))
        fitting = [one for one in self._windows if one.number in free and most <= one.size <= max(2 * most, PAGE)]
        window: Window | None
        if fitting:
            window = min(fitting, key=lambda one: (one.size, one.number))
        else:
            self.trim(free)
            window = self._made(max(-(-most // PAGE), 1) * PAGE)
        return None if window is None else window.lend(nbytes)

    def trim(self, free: set[int] | None = None) -> None:
        """Give back what nobody uses, or all there is."""
        for window in list(self._windows):
            if free is None or window.number in free:
                self._windows.remove(window)
                window.forget()

    def _made(self, size: int) -> Window | None:
        memory = share(self._node, size * self._node.size)
        number = self._node.bcast(
            int.from_bytes(os.urandom(7), "little") + 1
        )  # whatever process, of whatever container
        if memory is None:
            return None
        window = Window(number, memory, self._processes, self._node.rank)
        self._windows.append(window)
        return window


def address(array: np.ndarray) -> int:
    """Where its first element is."""
    return int(array.__array_interface__["data"][0])
