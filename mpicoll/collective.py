"""The table of collectives: one row each, from which the engine, the verifier, and the benchmark know what it does.

A collective has a *whole*, a vector of n elements in p parts, one for each rank.  Each rank, or the root alone, sends
the whole or its own part; each rank, or the root alone, receives the whole or its own part.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, eq=False)
class Collective:
    """One row: who sends and receives what, and the calls of the MPI library and of NCCL that do the same.

    ``native(comm, op, root, counts)`` is the method of mpi4py's communicator ``comm``, to be called with what this rank
    sends and receives; ``counts`` are the lengths of the parts, ``None`` if all are equal.  ``nccl(comm, send, recv,
    count, type, op, root, stream)`` calls the method of CuPy's NCCL communicator with two pointers and the number of
    elements that this rank sends, or, of ``reduce_scatter``, receives; ``None`` where NCCL has no such call.

    ``bus(p)`` is the bus factor of nccl-tests: the bandwidth that the hardware is used at, over size divided by time.
    ``shared_from`` are the bytes of the whole from which on memory that all ranks share is faster than the MPI library,
    as ``bench/allreduce.py`` measured it; ``across`` says that nodes may also do their share in memory each, and the
    rest by messages between them.
    """

    name: str
    native: "Callable[[Any, Any, int, Any], Call]"
    nccl: Callable[..., None] | None
    bus: Callable[[int], float]
    shared_from: int
    reduces: bool = False
    from_root: bool = False
    to_root: bool = False
    sends_part: bool = False
    receives_part: bool = False
    across: bool = False

    def __repr__(self) -> str:
        return f"<Collective {self.name}>"

    @property
    def rooted(self) -> bool:
        """Whether one rank, the root, sends or receives alone."""
        return self.from_root or self.to_root

    @property
    def parted(self) -> bool:
        """Whether each rank has a part of the whole for its own."""
        return self.sends_part or self.receives_part

    def sends(self, rank: int, root: int | None) -> bool:
        """Whether a rank sends anything."""
        return not self.from_root or rank == root

    def receives(self, rank: int, root: int | None) -> bool:
        """Whether a rank receives anything."""
        return not self.to_root or rank == root

    def has(self, rank: int, owner: int, root: int | None) -> bool:
        """Whether a rank has, when the call begins, what the part of the rank ``owner`` is made from."""
        return self.sends(rank, root) and (not self.sends_part or rank == owner)

    def wants(self, rank: int, owner: int, root: int | None) -> bool:
        """Whether a rank is to have the part of the rank ``owner`` when the call ends."""
        return self.receives(rank, root) and (not self.receives_part or rank == owner)

    def contributes(self, rank: int, owner: int, root: int | None) -> bool:
        """Whether the result in the part of the rank ``owner`` contains, once, what ``rank`` sends."""
        return self.reduces or (rank == root if self.from_root else rank == owner)


def _others(p: int) -> float:
    return (p - 1) / p


def _all(p: int) -> float:
    return 1


Call = Callable[[Any, Any], object]


def _allreduce(comm: Any, op: Any, root: int, counts: Any) -> Call:
    method = comm.Allreduce
    return lambda send, recv: method(send, recv, op)


def _reduce_scatter(comm: Any, op: Any, root: int, counts: Any) -> Call:
    if counts is None:
        return lambda send, recv: comm.Reduce_scatter_block(send, recv, op)
    return lambda send, recv: comm.Reduce_scatter(send, recv, counts, op)


def _allgather(comm: Any, op: Any, root: int, counts: Any) -> Call:
    if counts is None:
        return lambda send, recv: comm.Allgather(send, recv)
    listed = [*counts]  # a tuple would be counts and displacements
    return lambda send, recv: comm.Allgatherv(send, [recv, listed])


def _gather(comm: Any, op: Any, root: int, counts: Any) -> Call:
    if counts is None:
        return lambda send, recv: comm.Gather(send, recv, root)
    listed = [*counts]
    return lambda send, recv: comm.Gatherv(send, None if recv is None else [recv, listed], root)


def _scatter(comm: Any, op: Any, root: int, counts: Any) -> Call:
    if counts is None:
        return lambda send, recv: comm.Scatter(send, recv, root)
    listed = [*counts]
    return lambda send, recv: comm.Scatterv(None if send is None else [send, listed], recv, root)


COLLECTIVES = {
    row.name: row
    for row in [
        Collective(
            "allreduce",
            _allreduce,
            lambda comm, send, recv, count, kind, op, root, stream: comm.allReduce(send, recv, count, kind, op, stream),
            lambda p: 2 * _others(p),
            512 << 10,
            reduces=True,
            across=True,
        ),
        Collective(
            "reduce",
            lambda comm, op, root, counts: lambda send, recv: comm.Reduce(send, recv, op, root),
            lambda comm, send, recv, count, kind, op, root, stream: comm.reduce(
                send, recv, count, kind, op, root, stream
            ),
            _all,
            1 << 20,
            reduces=True,
            to_root=True,
        ),
        Collective(
            "bcast",
            lambda comm, op, root, counts: lambda send, recv: comm.Bcast(recv if send is None else send, root),
            lambda comm, send, recv, count, kind, op, root, stream: comm.bcast(send, count, kind, root, stream),
            _all,
            4 << 20,
            from_root=True,
        ),
        Collective(
            "reduce_scatter",
            _reduce_scatter,
            lambda comm, send, recv, count, kind, op, root, stream: comm.reduceScatter(
                send, recv, count, kind, op, stream
            ),
            _others,
            1 << 20,
            reduces=True,
            receives_part=True,
        ),
        Collective(
            "allgather",
            _allgather,
            lambda comm, send, recv, count, kind, op, root, stream: comm.allGather(send, recv, count, kind, stream),
            _others,
            4 << 20,
            sends_part=True,
        ),
        Collective("gather", _gather, None, _others, 4 << 20, to_root=True, sends_part=True),
        Collective("scatter", _scatter, None, _others, 4 << 20, from_root=True, receives_part=True),
    ]
}
ALLREDUCE, REDUCE, BCAST, REDUCE_SCATTER, ALLGATHER, GATHER, SCATTER = COLLECTIVES.values()
