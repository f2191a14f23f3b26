"""Collective communication and distributed SGD for Python HPC, over MPI.

``mpicoll.allreduce`` and its kin load the MPI engine (and so initialise MPI) when first used; schedules, proofs
and pictures work without an MPI.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .algorithms import ALGORITHMS
    from .errors import MismatchError, UserError
    from .graphs import graph
    from .job.guard import guard
    from .mpi.collectives import (
        allgather,
        allreduce,
        bcast,
        gather,
        reduce,
        reduce_scatter,
        ring_allreduce,
        scatter,
        tree_reduce,
    )
    from .mpi.comm import Comm
    from .mpi.mixing import PushSum, butterfly_mix, gossip_average
    from .mpi.nonblocking import allreduce_init, iallreduce
    from .schedule import ScheduleError

__version__ = "0.1.0"
__all__ = [
    "ALGORITHMS",
    "Comm",
    "MismatchError",
    "PushSum",
    "ScheduleError",
    "UserError",
    "__version__",
    "allgather",
    "allreduce",
    "allreduce_init",
    "bcast",
    "butterfly_mix",
    "gather",
    "gossip_average",
    "graph",
    "guard",
    "iallreduce",
    "reduce",
    "reduce_scatter",
    "ring_allreduce",
    "scatter",
    "tree_reduce",
]

_HOMES = {
    "ALGORITHMS": ".algorithms",
    "Comm": ".mpi.comm",
    "MismatchError": ".errors",
    "PushSum": ".mpi.mixing",
    "ScheduleError": ".schedule",
    "UserError": ".errors",
    "allgather": ".mpi.collectives",
    "allreduce": ".mpi.collectives",
    "allreduce_init": ".mpi.nonblocking",
    "bcast": ".mpi.collectives",
    "butterfly_mix": ".mpi.mixing",
    "gather": ".mpi.collectives",
    "gossip_average": ".mpi.mixing",
    "graph": ".graphs",
    "guard": ".job.guard",
    "iallreduce": ".mpi.nonblocking",
    "reduce": ".mpi.collectives",
    "reduce_scatter": ".mpi.collectives",
    "ring_allreduce": ".mpi.collectives",
    "scatter": ".mpi.collectives",
    "tree_reduce": ".mpi.collectives",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'mpicoll' has no attribute {name!r}")
    if _HOMES[name].startswith((".mpi.", ".job.")):
        import_module(".mpi.launch", __name__).load()
    value = getattr(import_module(_HOMES[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
