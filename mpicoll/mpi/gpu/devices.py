"""What ranks do with each other's arrays in the memory of GPUs, without bringing them to the host.

ipc    The ranks of a node find each other's arrays through CUDA IPC.  One rank for each GPU, its *owner*, runs a kernel
       that reads all inputs and writes all outputs, in the canonical order of additions; the others wait on the host.
       So nothing on a GPU waits for another process, which may not be running there: processes take turns on a GPU.
       Of several GPUs each owner reduces a part for all ranks; of short arrays the whole, for the ranks of its own GPU.
nccl   NCCL, through CuPy, where each rank has a GPU of its own.
aware  The MPI library is given the arrays as they are.

An array is found by its allocation (CuPy hands out parts of one) and the place in it.  The handle of an allocation is
sent when it is met for the first time, and never again.
"""

import os
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
from mpi4py import MPI

from ...collective import Collective
from ...errors import reason
from ...schedule import chunk_start
from ...tuning.rules import GPU_PATHS
from .. import operations
from ..buffers import is_half
from ..operations import Operation
from ..request import Request
from ..shared import Node
from . import assignment, ipc, kernel, launching, nccl
from .array import Array
from .probe import probe

KEPT = 4096
"""Allocations, of all ranks, that stay open; the one that was of no use for longest goes first."""

CALLS = 256
"""Calls that stay prepared."""

WHOLE = 64 << 10
"""Bytes up to which each of several GPUs reduces all of an array, for its own ranks.  Not measured."""

LINE = 64  # bytes, of which parts are multiples, so that they can be read 16 bytes at a time

MOST = 500  # arrays of a kernel, whose arguments are 4 KiB at most

NOWHERE = (0, 0)  # in place of an allocation, whose number is above 0, and the byte in it
Spot = tuple[int, int, int]  # rank, allocation, byte
Facts = tuple[list[str], int, dict[str, str]]
Owner = tuple[int, int]  # rank, and the number of its device
Key = tuple[Owner, int, int]  # who has opened it, whose it is, which allocation


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


class Devices:
    """The ranks of a communicator, as far as their GPUs are concerned; making it is a collective call."""

    def __init__(self, comm: MPI.Intracomm, node: Node, own: Facts) -> None:
        """``own`` are the ``facts`` of this rank."""
        self.comm, self.node, self.p, self.rank = comm, node, comm.size, comm.rank
        found, device = comm.allgather(own), own[1]
        self._gpus = [gpus for gpus, *_ in found]
        self._device, owned = device, [gpus[number] for gpus, number, _ in found]
        self.why = {**_reasons([why for *_, why in found], owned, node), "staged": ""}
        """Why each path is unavailable, empty if it is available: the same on all ranks."""
        self._trusted = not self.why["aware"]
        self._bases: dict[Key, int | None] = {}  # of what is open; the same keys on all ranks
        self._own: dict[int, ipc.Allocation] = {}  # of this rank, by number, those of this call and some more
        self._failed: set[Key] = set()
        self._ready: set[str] = set()  # texts of kernels
        self._prepared: dict[Any, _Prepared] = {}
        self._probed: dict[str, str] = {}
        self._nccl: Any = None
        self.took: dict[Any, str] = {}
        """The path that the latest call of a kind took."""

    def paths(
        self, asked: str, row: Collective, operation: Operation, dtype: np.dtype, deterministic: bool
    ) -> list[str]:
        """The paths to try, in order; the last is always ``"staged"``.

        A collective call, which raises ``ValueError`` on all ranks if the one asked for is unavailable.
        """

        def why_not(path: str) -> str:
            if path == "ipc":
                return self.why["ipc"] or kernel.refusal(operation, dtype)
            if deterministic and operation.reduces:
                return "it adds in an order of its own, and the call is to be deterministic"
            if is_half(dtype) and operation.widens:
                return f"it does not add {dtype} as float32: ask for wire='16bit', or another"
            if not operation.predefined:
                return "the operation is no predefined one"
            if path == "nccl":
                return self.why["nccl"] or nccl.refusal(row, operation.name, dtype)
            if is_half(dtype) and operation.reduces:
                return f"the MPI library does not know {dtype}"
            return "" if self._trusted else self._probe(row.name)

        if asked == "auto":
            return [*(path for path in ("ipc", "nccl") if not why_not(path)), "staged"]
        if asked not in GPU_PATHS or asked == "staged":
            return ["staged"]
        if why := why_not(asked):
            raise ValueError(f"{asked} cannot do this {row.name} here: {why}")
        return [asked, "staged"]

    def run(self, path: str, request: Request) -> bool:
        """Run a request that is not empty; false, on all ranks, if its arrays cannot take this path, and nothing was
        done.  An array in host memory is for the MPI library only."""
        given, taken = request.send, request.recv
        if request.in_place and given is None and isinstance(taken, Array):
            given = taken.part(request.own.start, request.own.stop)
        return {"ipc": self._by_ipc, "nccl": self._by_nccl, "aware": self._by_mpi}[path](request, given, taken)

    def remember(self, kind: Any, path: str) -> None:
        """Note the path that a call took."""
        if len(self.took) >= CALLS:
            self.took.clear()
        self.took[kind] = path

    # ---- by IPC

    def _by_ipc(self, request: Request, given: Any, taken: Any) -> bool:
        row, operation, root, cuts = request.row, request.operation, request.root or 0, request.cuts
        collective = row.name
        arrays = [array for array in (given, taken) if isinstance(array, Array)]
        count, dtype = request.count, request.dtype
        if len(self._own) > KEPT:
            self._own.clear()
        if len(self._failed) > KEPT:  # the same on all ranks
            self._failed.clear()
        error: Exception | None = None
        mine = [0, 0, *NOWHERE, *NOWHERE]
        try:
            _settle(arrays)  # others are to read, and write, what is done there before
            there = self._place(given)
            mine = [0, arrays[0].device, *there, *(there if taken is given else self._place(taken))]
        except Exception as raised:  # of something that was done there before
            error, mine[0] = raised, 1
        told = self.node.exchange(*mine)
        self._raise_if([failed for failed, *_ in told], collective, error)
        places = [place for _, *place in told]
        key = (collective, operation.name, count, dtype, root, cuts, *(tuple(place) for place in places))
        prepared = self._prepared.get(key)
        if prepared is None:
            jobs = self._jobs(row, count, dtype, root, cuts, places)
            prepared = None if jobs is None else self._prepare(jobs, operation, dtype)
            if prepared is None:
                return False
            while len(self._prepared) >= CALLS:
                del self._prepared[next(iter(self._prepared))]
            self._prepared[key] = prepared
        if 2 * len(self._bases) > KEPT:
            for met in prepared.met:
                self._bases[met] = self._bases.pop(met)
        launches = prepared.launches
        try:
            for launch in launches:
                launching.launch(arrays[0], *launch)
            if launches:
                arrays[0].synchronize()  # others are to read it
        except Exception as raised:
            error = raised
        self._raise_if([failed for (failed,) in self.node.exchange(int(error is not None))], collective, error)
        return True

    def _raise_if(self, failed: list[int], collective: str, error: Exception | None) -> None:
        """On all ranks, if one has."""
        if any(failed):
            told = self.node.comm.allgather(None if error is None else reason(error))
            rank = failed.index(1)
            raise RuntimeError(f"this {collective} failed on the GPU of rank {rank}: {told[rank]}") from error

    def _place(self, array: Array | np.ndarray | None) -> tuple[int, int]:
        """The number of its allocation, and the byte where it begins; ``NOWHERE`` if it is in none to be shared."""
        found = ipc.allocation(array) if isinstance(array, Array) else None
        if found is None or not isinstance(array, Array):
            return NOWHERE
        self._own[found.number] = found
        return found.number, array.pointer - found.base

    def _jobs(
        self,
        row: Collective,
        count: int,
        dtype: np.dtype,
        root: int,
        cuts: tuple[int, ...] | None,
        places: list[list[int]],
    ) -> dict[Owner, list[_Job]] | None:
        """What each owner does; none if somebody's array cannot be found, or there are too many."""
        ranks, size = range(self.p), dtype.itemsize
        givers = [q for q in ranks if row.sends(q, root)]
        takers = [q for q in ranks if row.receives(q, root) and not (row.from_root and q == root)]
        if not (all(places[q][1] for q in givers) and all(places[q][3] for q in takers)):
            return None
        if len(givers) + len(takers) > MOST:
            return None

        def spot(q: int, of: int, before: int = 0) -> Spot:
            """Where the vector of a rank begins, or would, if what it has is what follows so many elements."""
            return q, places[q][of], places[q][of + 1] - before * size

        owners: dict[str, Owner] = {}
        for q in ranks:
            owners.setdefault(self._gpus[q][places[q][0]], (q, places[q][0]))
        of_same = {owner: [q for q in takers if self._gpus[q][places[q][0]] == at] for at, owner in owners.items()}
        sources = tuple(spot(q, 1) for q in givers)
        given, taken = ({(q, place[of], place[of + 1]) for q, place in enumerate(places)} for of in (1, 3))
        apart = given.isdisjoint(taken - {(q, *NOWHERE) for q in ranks})
        jobs: dict[Owner, list[_Job]] = {}
        unit = max(LINE // size, 1)
        for n, (owner, near) in enumerate(of_same.items()):
            lo, hi = (min(chunk_start(-(-count // unit), at, len(owners)) * unit, count) for at in (n, n + 1))
            if cuts is None and len(owners) > 1 and count * size <= WHOLE and apart:
                jobs[owner] = [_Job(sources, tuple(spot(q, 3) for q in near), 0, count)]
            elif cuts is None:
                jobs[owner] = [_Job(sources, tuple(spot(q, 3) for q in takers), lo, hi)]
            elif row.receives_part:
                jobs[owner] = [_Job(sources, (spot(q, 3, cuts[q]),), cuts[q], cuts[q + 1]) for q in near]
            else:
                every = [(spot(q, 1, cuts[q]), cuts[q], cuts[q + 1]) for q in ranks]
                jobs[owner] = [_Job((its,), tuple(spot(q, 3) for q in near), lo, hi) for its, lo, hi in every]
        return {owner: [job for job in its if job.lo < job.hi and job.targets] for owner, its in jobs.items()}

    def _prepare(self, jobs: dict[Owner, list[_Job]], operation: Operation, dtype: np.dtype) -> _Prepared | None:
        """``None``, on all ranks, if allocations cannot be opened, or kernels not be compiled.

        A collective call, in which what is new is opened, by the owners that need it, and compiled.
        """
        every = [(owner, job) for owner, its in jobs.items() for job in its]
        spots = [(owner, spot) for owner, job in every for spot in (*job.sources, *job.targets)]
        met = tuple(dict.fromkeys((owner, rank, number) for owner, (rank, number, _) in spots))
        if not self._failed.isdisjoint(met):
            return None
        me, mine = next(((owner, its) for owner, its in jobs.items() if owner[0] == self.rank), ((self.rank, -1), []))

        def text(job: _Job) -> tuple[str, int]:
            width = kernel.width([at for *_, at in (*job.sources, *job.targets)], job.lo, dtype.itemsize)
            divisor = self.p if operation.finish else None
            return kernel.source(operation.name, dtype, len(job.sources), len(job.targets), width, divisor), width

        texts = {text(job)[0] for _, job in every}
        if not texts <= self._ready:
            self.why["ipc"] = self._compile({text(job)[0] for job in mine}, me[1])
            if self.why["ipc"]:
                return None
            self._ready |= texts
        if not (self._opens(met) or self._opens(met, again=True)):
            return None

        def address(spot: Spot) -> np.uint64:
            rank, number, at = spot
            base = self._bases[me, rank, number]
            assert base is not None
            return np.uint64(base + at)

        launches = []
        for job in mine:
            source, width = text(job)
            grid, block = kernel.shape(job.hi - job.lo, width, dtype.itemsize, launching.processors(me[1]))
            ends = np.int64(job.lo), np.int64(job.hi)
            addresses = [address(spot) for spot in (*job.sources, *job.targets)]
            launches.append((source, kernel.NAME, kernel.OPTIONS, grid, block, (*addresses, *ends)))
        return _Prepared(launches, met)

    def _compile(self, texts: set[str], device: int) -> str:
        """Why one cannot be, the same on all ranks; empty if all can."""
        why = ""
        try:
            for text in sorted(texts):
                launching.compiled(text, kernel.NAME, kernel.OPTIONS, device)
                launching.processors(device)
        except Exception as error:
            why = reason(error).splitlines()[0]
        found = next(filter(None, self.node.comm.allgather(why)), "")
        return f"its kernel cannot be compiled ({found})" if found else ""

    def _opens(self, met: tuple[Key, ...], again: bool = False) -> bool:
        """Open what is not yet; false, on all ranks, if that cannot be.  ``again``: with all else closed, since memory
        that its owner has given back meanwhile may be in the way."""
        if again:
            self._close(list(self._bases))
        new = [key for key in met if key not in self._bases]
        if not new:
            return True
        handles = self._handles(new)
        self._close([key for key in self._bases if key not in met][: max(len(self._bases) + len(new) - KEPT, 0)])
        bad = {key for found in self.node.comm.allgather(self._open(new, handles)) for key in found}
        self._close([key for key in new if key in bad])
        if again:
            self._failed |= bad
        return not bad

    def _handles(self, new: list[Key]) -> dict[tuple[int, int], bytes | None]:
        """Of all that are new, by rank and allocation: each tells its own."""
        mine = {(rank, number): ipc.handle(self._own[number]) for _, rank, number in new if rank == self.rank}
        return {key: handle for those in self.node.comm.allgather(mine) for key, handle in those.items()}

    def _open(self, new: list[Key], handles: dict[tuple[int, int], bytes | None]) -> list[Key]:
        """Those that this rank is to open, and those that it cannot."""
        bad = []
        for key in new:
            (reader, device), rank, number = key
            base, handle = None, handles[rank, number]
            if reader == self.rank == rank:
                base = self._own[number].base
            elif reader == self.rank and handle is not None:
                base = ipc.opened(handle, device)
            if handle is None or (reader == self.rank and base is None):
                bad.append(key)
            self._bases[key] = base
        return bad

    def _close(self, keys: Sequence[Key]) -> None:
        """And forget calls that were prepared for them."""
        for key in keys:
            base, whose = self._bases.pop(key), key[1]
            if base is not None and whose != self.rank:
                ipc.close(base, key[0][1])
        closed = {*keys}
        if closed:
            self._prepared = {call: one for call, one in self._prepared.items() if closed.isdisjoint(one.met)}

    def release(self) -> None:
        """Close all that is open; it is of no use any more."""
        self._close(list(self._bases))
        if self._nccl is not None:
            with suppress(Exception):  # at the end of the program CUDA may be gone before MPI
                self._nccl.destroy()
            self._nccl = None

    # ---- by NCCL

    def _by_nccl(self, request: Request, given: Any, taken: Any) -> bool:
        if request.counts is not None:
            return False
        operation = request.operation
        there = [array for array in (given, taken) if array is not None]
        able = all(isinstance(array, Array) and array.device == self._device for array in there)
        if not self.comm.allreduce(able, MPI.LAND):
            return False
        assert not isinstance(given, np.ndarray)
        assert not isinstance(taken, np.ndarray)
        if self._nccl is None and not self._begin_nccl():
            return False
        nccl.run(self._nccl, request.row, given, taken, operation.name, request.root or 0)
        if taken is not None and operation.finish:
            self._finish(taken, operation)
        return True

    def _begin_nccl(self) -> bool:
        number, why = None, ""
        try:
            number = nccl.unique_id() if self.rank == 0 else None
        except Exception as error:
            why = reason(error)
        number, why = self.comm.bcast((number, why))
        if not why:
            try:
                self._nccl = nccl.communicator(self._device, self.p, number, self.rank)
            except Exception as error:
                why = reason(error)
            why = next(filter(None, self.comm.allgather(why)), "")
        self.why["nccl"] = why
        return not why

    def _finish(self, taken: Array, operation: Operation) -> None:
        """What is done to a result that the kernel has not made."""
        width = kernel.width([taken.pointer], 0, taken.dtype.itemsize)
        text = kernel.source(operation.name, taken.dtype, 1, 1, width, self.p)
        shape = kernel.shape(taken.size, width, taken.dtype.itemsize, launching.processors(taken.device))
        at, ends = np.uint64(taken.pointer), (np.int64(0), np.int64(taken.size))
        if taken.size:  # of a part there may be nothing
            launching.launch(taken, text, kernel.NAME, kernel.OPTIONS, *shape, (at, at, *ends))

    # ---- by the MPI library

    def _by_mpi(self, request: Request, given: Any, taken: Any) -> bool:
        _settle([array for array in (given, taken) if isinstance(array, Array)])  # MPI knows nothing of streams
        row, operation = request.row, request.operation
        call = row.native(self.comm, operation.native, request.root or 0, request.counts)
        send, recv = (array.flat() if isinstance(array, Array) else array for array in (given, taken))
        if row.parted:
            call(MPI.IN_PLACE if request.in_place or _is_part(given, taken) else send, recv)
        else:
            longest, in_place = operations.MAX_COUNT, given is taken
            for lo in range(0, request.count, longest):
                one, other = (None if x is None else x[lo : lo + longest] for x in (send, recv))
                call(MPI.IN_PLACE if in_place else one, other)
        if operation.finish and isinstance(taken, Array):
            self._finish(taken, operation)
        elif operation.finish and isinstance(taken, np.ndarray):
            operation.finish(taken, self.p)
        return True

    def _probe(self, collective: str) -> str:
        """Does it, in a job of two ranks that may crash, say what it should?  If not, why; the same on all ranks."""
        if collective not in self._probed:
            self._probed[collective] = self.comm.bcast(probe(collective) if self.rank == 0 else None)
        return self._probed[collective]


def _is_part(one: Array | np.ndarray | None, other: Array | np.ndarray | None) -> bool:
    """Does it lie in the other one?"""
    if not (isinstance(one, Array) and isinstance(other, Array)):
        return False
    return other.pointer <= one.pointer < other.pointer + other.nbytes


def _settle(arrays: list[Array]) -> None:
    """Wait for what is on their streams."""
    for array in {array.stream.ptr: array for array in arrays}.values():
        array.synchronize()


def facts(device: int) -> Facts:
    """Facts of this rank: the identities of the GPUs it sees, its own one's number, and why paths are unavailable."""
    gpus = [assignment.identity(number)[1] for number in range(assignment.count())]
    said = os.environ.get("MPICOLL_GPU_AWARE", "")
    untrusted = "not unless it is asked for by its name, and tried, or MPICOLL_GPU_AWARE=1 says that it works"
    if said not in ("", "0", "1"):
        untrusted = f"MPICOLL_GPU_AWARE={said} is not understood: expected 1 or 0"
    return (
        gpus,
        device,
        {"ipc": ipc.refusal(), "nccl": nccl.missing(), "aware": "" if said == "1" else untrusted},
    )


def _reasons(whys: list[dict[str, str]], owned: list[str], node: Node) -> dict[str, str]:
    """Why each path is unavailable to all ranks together."""
    if len(whys) == 1:
        return dict.fromkeys(whys[0], "one rank has nobody to share with: mpirun -n N")
    found = {}
    for path in whys[0]:
        reasons = [why[path] for why in whys]
        first = next(filter(None, reasons), "")
        found[path] = first if len({*reasons}) == 1 else f"{first} (rank {reasons.index(first)})"
    if not node.whole:
        found["ipc"] = "ranks are on several nodes"
    elif not node.shares:
        found["ipc"] = "ranks share no memory"
    if len({*owned}) < len(owned):
        found["nccl"] = "ranks share a GPU, and NCCL is for one rank on each"
    return found
