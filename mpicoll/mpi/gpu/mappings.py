"""Allocations of other processes, mapped through CUDA IPC, on all ranks alike.

An array is found by its allocation (CuPy hands out parts of one) and its place there.  The handle of an allocation is
sent when the allocation is met for the first time, and never again.
"""

from collections.abc import Callable, Sequence

import numpy as np
from mpi4py import MPI

from . import allocation
from .array import Array

KEPT = 4096
"""Allocations, of all ranks, that stay open; the one that was of no use for longest is closed first."""

NOWHERE = (0, 0)  # in place of an allocation, whose number is above 0, and the byte in it
Owner = tuple[int, int]  # rank, and the number of its device
Key = tuple[Owner, int, int]  # who has opened it, whose it is, which allocation


class Mappings:
    """What ranks have opened of each other, and what they could not open; the keys are equal on all ranks.

    ``forget`` is called with the keys of what has been closed.
    """

    def __init__(self, comm: MPI.Intracomm, forget: Callable[[set[Key]], None]) -> None:
        self._comm, self._rank, self._forget = comm, comm.rank, forget
        self._bases: dict[Key, int | None] = {}  # of what is open
        self._own: dict[int, allocation.Allocation] = {}  # of this rank, by number, those of this call and some more
        self._failed: set[Key] = set()

    def begin(self) -> None:
        """Begin a call: drop what is no longer of use to any."""
        if len(self._own) > KEPT:
            self._own.clear()
        if len(self._failed) > KEPT:  # equal on all ranks
            self._failed.clear()

    def place(self, array: Array | np.ndarray | None) -> tuple[int, int]:
        """The number of an array's allocation, and the byte where it begins; ``NOWHERE`` if nobody can open it."""
        found = allocation.allocation(array) if isinstance(array, Array) else None
        if found is None or not isinstance(array, Array):
            return NOWHERE
        self._own[found.number] = found
        return found.number, array.pointer - found.base

    def base(self, key: Key) -> int:
        """The address at which an allocation is open."""
        base = self._bases[key]
        assert base is not None
        return base

    def use(self, met: tuple[Key, ...]) -> None:
        """Note that allocations are of use, so that others are closed first."""
        if 2 * len(self._bases) > KEPT:
            for key in met:
                self._bases[key] = self._bases.pop(key)

    def failed(self, met: tuple[Key, ...]) -> bool:
        """Whether one of these could not be opened before."""
        return not self._failed.isdisjoint(met)

    def open(self, met: tuple[Key, ...]) -> bool:
        """Open what is not yet open; false, on all ranks, if that cannot be done.

        A collective call.  At the second try all else is closed, since memory that its owner has freed meanwhile may be
        in the way.  What cannot be opened then has ``failed``, and is not tried again.
        """
        return self._open(met) or self._open(met, again=True)

    def close(self) -> None:
        """Close everything."""
        self._close(list(self._bases))

    def _open(self, met: tuple[Key, ...], again: bool = False) -> bool:
        if again:
            self.close()
        new = [key for key in met if key not in self._bases]
        if not new:
            return True
        handles = self._handles(new)
        self._close([key for key in self._bases if key not in met][: max(len(self._bases) + len(new) - KEPT, 0)])
        bad = {key for found in self._comm.allgather(self._open_own(new, handles)) for key in found}
        self._close([key for key in new if key in bad])
        if again:
            self._failed |= bad
        return not bad

    def _handles(self, new: list[Key]) -> dict[tuple[int, int], bytes | None]:
        """The handles of new allocations, by rank and number: each rank sends those of its own."""
        mine = {(rank, number): allocation.handle(self._own[number]) for _, rank, number in new if rank == self._rank}
        return {key: handle for those in self._comm.allgather(mine) for key, handle in those.items()}

    def _open_own(self, new: list[Key], handles: dict[tuple[int, int], bytes | None]) -> list[Key]:
        """Open what this rank must open; returns what it cannot."""
        bad = []
        for key in new:
            (reader, device), rank, number = key
            base, handle = None, handles[rank, number]
            if reader == self._rank == rank:
                base = self._own[number].base
            elif reader == self._rank and handle is not None:
                base = allocation.opened(handle, device)
            if handle is None or (reader == self._rank and base is None):
                bad.append(key)
            self._bases[key] = base
        return bad

    def _close(self, keys: Sequence[Key]) -> None:
        for key in keys:
            base, whose = self._bases.pop(key), key[1]
            if base is not None and whose != self._rank:
                allocation.close(base, key[0][1])
        if keys:
            self._forget({*keys})
