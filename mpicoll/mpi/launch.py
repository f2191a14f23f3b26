"""How this process was launched, and starting MPI once that is known to be sane.

Nothing here imports mpi4py before it must, so that the command line can tell rank 0 from the others (and answer
``--help``) without an MPI.
"""

import os
import sys
import warnings
from typing import TYPE_CHECKING

from ..errors import UserError

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

    Under a foreign launcher every process would believe to be alone and do the whole job, or die inside MPI.
    """
    import mpi4py

    mpi4py.rc.initialize = False  # only after the checks below: with a foreign launcher it may not return
    mpi4py.rc.finalize = True
    warnings.filterwarnings("ignore", "suspicious MPI execution environment", RuntimeWarning)  # said below, as an error
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise UserError(
            f"cannot load an MPI library ({str(error).splitlines()[0]}): install one beside this Python, for example "
            "pip install 'mpicoll[mpich]', or load your cluster's MPI module"
        ) from error
    foreign = "OMPI_COMM_WORLD_SIZE" in os.environ and MPI.get_vendor()[0] in MPICH_KIN
    if not foreign and not MPI.Is_initialized():
        MPI.Init_thread()
    if foreign or (launched_ranks() > 1 and MPI.COMM_WORLD.size == 1):
        beside = os.path.join(sys.prefix, "bin", "mpirun")
        ours = f"use {beside}" if os.path.exists(beside) else f"use the mpirun of {library_name()}"
        raise UserError(
            f"the launcher started {launched_ranks()} rank(s), but {library_name()}, the MPI library that this Python "
            f"loads, {'is another MPI' if foreign else 'sees only 1: the launcher is that of another MPI'}; {ours}"
        )
    return MPI.COMM_WORLD


def library_name() -> str:
    """The MPI library and its version, as in ``MPICH 5.0.2``; after ``world()``."""
    from mpi4py import MPI

    vendor, version = MPI.get_vendor()
    return f"{vendor} {'.'.join(map(str, version))}"


def _from_launcher(*names: str) -> int:
    found = (os.environ.get(name, "") for name in names)
    return next((int(value) for value in found if value.isdigit()), 0)
