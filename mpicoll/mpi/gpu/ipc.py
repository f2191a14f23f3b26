"""The path ``ipc``: a kernel reads and writes the arrays of all ranks of a node, through CUDA IPC.

One rank for each GPU, its *owner*, runs a kernel that reads all inputs and writes all outputs, in the canonical order
of additions; the others wait on the host.  So nothing on a GPU waits for another process, which may not be running
there: processes take turns on a GPU.  If there are several GPUs, each owner reduces a part for all ranks, or all of a
short array for the ranks of its own GPU.
"""

from typing import Any, NamedTuple

import numpy as np

from ...collective import Collective
from ...errors import reason
from ...schedule import chunk_start
from ..operations import Operation
from ..request import Request
from ..shared import Node
from . import kernel, launching
from .array import Array, synchronize
from .mappings import NOWHERE, Key, Mappings, Owner

CALLS = 256
"""Calls that stay prepared."""

WHOLE = 64 << 10
"""Bytes up to which each of several GPUs reduces all of an array, for its own ranks.  Not measured."""

LINE = 64  # bytes, of which parts are multiples, so that they can be read 16 bytes at a time

MOST = 500  # arrays of a kernel, whose arguments are 4 KiB at most

Spot = tuple[int, int, int]  # rank, allocation, byte


class _Job(NamedTuple):
    """Elements ``lo`` to ``hi`` of all targets become those of the sources, reduced; spots are those of elements 0."""

    sources: tuple[Spot, ...]
    targets: tuple[Spot, ...]
    lo: int
    hi: int


class _Prepared(NamedTuple):
    """What this rank launches for a call, and what is open for it, here or elsewhere."""

    launches: list[tuple[Any, ...]]
    met: tuple[Key, ...]


class Ipc:
    """The ranks of a node as users of each other's device memory.

    ``gpus`` are the identities of the devices that each rank sees, ``why`` is why the path is unavailable, if it is.
    """

    def __init__(self, node: Node, gpus: list[list[str]], why: str) -> None:
        self._node, self._gpus, self.why = node, gpus, why
        self.p, self.rank = node.comm.size, node.comm.rank
        self._mappings = Mappings(node.comm, self._forget)
        self._ready: set[str] = set()  # texts of kernels
        self._prepared: dict[Any, _Prepared] = {}

    def refusal(self, row: Collective, operation: Operation, dtype: np.dtype) -> str:
        """Why such a call cannot take this path; empty if it can."""
        return self.why or kernel.refusal(operation, dtype)

    def run(self, request: Request, send: Any, recv: Any) -> bool:
        """Run a request; false, on all ranks, if its arrays cannot take this path, and nothing was done."""
        row, operation, root, cuts = request.row, request.operation, request.root or 0, request.cuts
        arrays = [array for array in (send, recv) if isinstance(array, Array)]
        count, dtype = request.elements, request.dtype
        self._mappings.begin()
        error: Exception | None = None
        mine = [0, 0, *NOWHERE, *NOWHERE]
        try:
            synchronize(arrays)  # others are to read, and write, what is done there before
            there = self._mappings.place(send)
            mine = [0, arrays[0].device, *there, *(there if recv is send else self._mappings.place(recv))]
        except Exception as raised:  # of something that was done there before
            error, mine[0] = raised, 1
        everyone = self._node.exchange(*mine)
        self._raise_if([failed for failed, *_ in everyone], row.name, error)
        places = [place for _, *place in everyone]
        key = (row.name, operation.name, count, dtype, root, cuts, *(tuple(place) for place in places))
        prepared = self._prepared.get(key)
        if prepared is None:
            jobs = self._jobs(row, count, dtype, root, cuts, places)
            prepared = None if jobs is None else self._prepare(jobs, operation, dtype)
            if prepared is None:
                return False
            while len(self._prepared) >= CALLS:
                del self._prepared[next(iter(self._prepared))]
            self._prepared[key] = prepared
        self._mappings.use(prepared.met)
        try:
            for launch in prepared.launches:
                launching.launch(arrays[0], *launch)
            if prepared.launches:
                arrays[0].synchronize()  # others are to read it
        except Exception as raised:
            error = raised
        self._raise_if([failed for (failed,) in self._node.exchange(int(error is not None))], row.name, error)
        return True

    def release(self) -> None:
        """Close everything that is open of other ranks."""
        self._mappings.close()

    def _raise_if(self, failed: list[int], collective: str, error: Exception | None) -> None:
        """Raise an error on all ranks if one has failed."""
        if any(failed):
            reasons = self._node.comm.allgather(None if error is None else reason(error))
            rank = failed.index(1)
            raise RuntimeError(f"this {collective} failed on the GPU of rank {rank}: {reasons[rank]}") from error

    def _jobs(
        self,
        row: Collective,
        count: int,
        dtype: np.dtype,
        root: int,
        cuts: tuple[int, ...] | None,
        places: list[list[int]],
    ) -> dict[Owner, list[_Job]] | None:
        """The jobs of each owner; ``None`` if a rank's array cannot be found, or there are too many."""
        ranks, size = range(self.p), dtype.itemsize
        senders = [q for q in ranks if row.sends(q, root)]
        receivers = [q for q in ranks if row.receives(q, root)]
        if row.from_root and not places[root][3]:  # which has what it sends
            receivers.remove(root)
        if not (all(places[q][1] for q in senders) and all(places[q][3] for q in receivers)):
            return None
        if len(senders) + len(receivers) > MOST:
            return None

        def spot(q: int, of: int, before: int = 0) -> Spot:
            """Where the vector of a rank begins, or would begin if its array were what follows ``before`` elements."""
            return q, places[q][of], places[q][of + 1] - before * size

        owners: dict[str, Owner] = {}
        for q in ranks:
            owners.setdefault(self._gpus[q][places[q][0]], (q, places[q][0]))
        of_same = {owner: [q for q in receivers if self._gpus[q][places[q][0]] == at] for at, owner in owners.items()}
        sources = tuple(spot(q, 1) for q in senders)
        read, written = ({(q, place[of], place[of + 1]) for q, place in enumerate(places)} for of in (1, 3))
        apart = read.isdisjoint(written - {(q, *NOWHERE) for q in ranks})
        jobs: dict[Owner, list[_Job]] = {}
        unit = max(LINE // size, 1)
        for n, (owner, near) in enumerate(of_same.items()):
            lo, hi = (min(chunk_start(-(-count // unit), at, len(owners)) * unit, count) for at in (n, n + 1))
            if cuts is None and len(owners) > 1 and count * size <= WHOLE and apart:
                jobs[owner] = [_Job(sources, tuple(spot(q, 3) for q in near), 0, count)]
            elif cuts is None:
                jobs[owner] = [_Job(sources, tuple(spot(q, 3) for q in receivers), lo, hi)]
            elif row.receives_part:
                jobs[owner] = [_Job(sources, (spot(q, 3, cuts[q]),), cuts[q], cuts[q + 1]) for q in near]
            else:
                every = [(spot(q, 1, cuts[q]), cuts[q], cuts[q + 1]) for q in ranks]
                jobs[owner] = [_Job((its,), tuple(spot(q, 3) for q in near), lo, hi) for its, lo, hi in every]
        return {owner: [job for job in its if job.lo < job.hi and job.targets] for owner, its in jobs.items()}

    def _prepare(self, jobs: dict[Owner, list[_Job]], operation: Operation, dtype: np.dtype) -> _Prepared | None:
        """Open and compile what is new; ``None``, on all ranks, if one of these cannot be done.

        A collective call.  Allocations are opened by the owners that need them.
        """
        every = [(owner, job) for owner, its in jobs.items() for job in its]
        spots = [(owner, spot) for owner, job in every for spot in (*job.sources, *job.targets)]
        met = tuple(dict.fromkeys((owner, rank, number) for owner, (rank, number, _) in spots))
        if self._mappings.failed(met):
            return None
        me, mine = next(((owner, its) for owner, its in jobs.items() if owner[0] == self.rank), ((self.rank, -1), []))

        def text(job: _Job) -> tuple[str, int]:
            width = kernel.width([at for *_, at in (*job.sources, *job.targets)], job.lo, dtype.itemsize)
            divisor = self.p if operation.finish else None
            return kernel.source(operation.name, dtype, len(job.sources), len(job.targets), width, divisor), width

        texts = {text(job)[0] for _, job in every}
        if not texts <= self._ready:
            self.why = self._compile({text(job)[0] for job in mine}, me[1])
            if self.why:
                return None
            self._ready |= texts
        if not self._mappings.open(met):
            return None

        def address(spot: Spot) -> np.uint64:
            rank, number, at = spot
            return np.uint64(self._mappings.base((me, rank, number)) + at)

        launches = []
        for job in mine:
            source, width = text(job)
            grid, block = kernel.shape(job.hi - job.lo, width, dtype.itemsize, launching.processors(me[1]))
            ends = np.int64(job.lo), np.int64(job.hi)
            addresses = [address(spot) for spot in (*job.sources, *job.targets)]
            launches.append((source, grid, block, (*addresses, *ends)))
        return _Prepared(launches, met)

    def _compile(self, texts: set[str], device: int) -> str:
        """Why a kernel cannot be compiled, equal on all ranks; empty if all can be."""
        why = ""
        try:
            for text in sorted(texts):
                launching.compiled(text, device)
                launching.processors(device)
        except Exception as error:
            why = reason(error).splitlines()[0]
        found = next(filter(None, self._node.comm.allgather(why)), "")
        return f"its kernel cannot be compiled ({found})" if found else ""

    def _forget(self, closed: set[Key]) -> None:
        """Forget calls that were prepared for what is closed."""
        self._prepared = {call: one for call, one in self._prepared.items() if closed.isdisjoint(one.met)}
