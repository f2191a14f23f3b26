"""The number of BLAS threads of a rank: as many as it has cores to itself, so that ranks of a node do not compete."""

import os
from collections import Counter

from mpi4py import MPI

from ..mpi.launch import cores, node_of

_SETTINGS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "BLIS_NUM_THREADS")


def limit_threads(comm: MPI.Intracomm, threads: int | None = None) -> int | None:
    """Give this rank's BLAS ``threads`` threads, by default its share of the node's cores, at least one.

    Returns the number, or ``None`` if an environment variable such as ``OMP_NUM_THREADS`` already says it, which
    is then left alone.  A collective call; lasts until the process ends.
    """
    node = node_of(comm)
    ranks_on = Counter(core for available in node.allgather(cores()) for core in available)
    node.Free()
    if threads is None:
        if any(os.environ.get(name) for name in _SETTINGS):
            return None
        # A core that k ranks may run on counts 1/k for each of them, whether ranks are bound to cores or not.
        threads = max(1, int(sum(1 / ranks_on[core] for core in cores()) + 1e-9))
    from threadpoolctl import threadpool_limits

    threadpool_limits(threads)
    return threads
