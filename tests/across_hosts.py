"""What ranks do on the cluster of test_cluster.py; rank 0 writes what they found to the file that is named."""

import json
import sys
import time
from collections.abc import Callable
from importlib import import_module
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np
from mpi4py import MPI

import mpicoll
from contract import own_data

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
traffic = import_module("cluster").traffic

COUNTS = (1, 7, 1009, 50_000)  # of float64
MANY = 1 << 20  # float32, where bytes are counted
COUNTED = ("shared", "auto", "ring", "halving_doubling", "circulant", "recursive_doubling")


def calls(comm: mpicoll.Comm, count: int) -> dict[str, tuple[Callable[[np.ndarray, str], np.ndarray], np.ndarray]]:
    """By collective, the call on this rank's data by a named algorithm, and what must come of it."""
    p, rank = comm.size, comm.rank
    data = [own_data(count, r) for r in range(p)]
    total = np.sum(data, axis=0)
    cuts = [*accumulate([count // p] * (p - 1), initial=0), count]  # the last rank has the rest
    counts, mine = [hi - lo for lo, hi in pairwise(cuts)], slice(*cuts[rank:][:2])
    gathered = np.concatenate([data[r][cuts[r] : cuts[r + 1]] for r in range(p)])
    return {
        "allreduce": (lambda x, name: mpicoll.allreduce(x, comm, algorithm=name), total),
        "reduce": (lambda x, name: mpicoll.reduce(x, comm, 5, algorithm=name), total if rank == 5 else data[rank]),
        "bcast": (lambda x, name: mpicoll.bcast(x, comm, 3, name), data[3]),
        "reduce_scatter": (lambda x, name: mpicoll.reduce_scatter(x, comm, counts, algorithm=name), total[mine]),
        "allgather": (lambda x, name: mpicoll.allgather(x[mine], comm, counts, name), gathered),
    }


def wrong(comm: mpicoll.Comm) -> list[str]:
    """Which results are, on this rank: of every collective by every algorithm at every count."""
    return [
        f"{collective} by {name} of {count} on rank {comm.rank}"
        for count in COUNTS
        for collective, (call, right) in calls(comm, count).items()
        for name in ("auto", *mpicoll.ALGORITHMS[collective], *(["shared"] if collective == "allreduce" else []))
        if not np.array_equal(call(own_data(count, comm.rank), name), right)
    ]


def counted(comm: mpicoll.Comm, name: str) -> tuple[float, int]:
    """The seconds of an allreduce of ``MANY``, and the bytes that this host sent meanwhile."""
    comm.Allreduce(MPI.IN_PLACE, np.zeros(MANY >> 4, np.float32), algorithm=name)  # connections are made
    x = np.full(MANY, comm.rank, np.float32)
    before = traffic("self").sent
    comm.Barrier()
    start = time.monotonic()
    comm.Allreduce(MPI.IN_PLACE, x, algorithm=name)
    comm.Barrier()
    seconds, after = time.monotonic() - start, traffic("self").sent
    assert (x == sum(range(comm.size))).all()
    comm.Barrier()
    return seconds, after - before


if __name__ == "__main__":
    comm = mpicoll.Comm(MPI.COMM_WORLD)
    found = {
        "hosts": comm.gather([MPI.Get_processor_name(), comm.Split_type(MPI.COMM_TYPE_SHARED).size]),
        "count": MANY,
        "wrong": comm.gather(wrong(comm)),
        "counted": {name: comm.gather(counted(comm, name)) for name in COUNTED},
    }
    if comm.rank == 0:
        Path(sys.argv[1]).write_text(json.dumps(found))
