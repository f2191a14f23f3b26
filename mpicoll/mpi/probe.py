"""Does the MPI library take arrays in the memory of GPUs?

It cannot be asked: one that does not may crash, one that says so may crash in some collectives.  So a job of its own
tries each.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

LIMIT = 60.0
"""Seconds until it is given up."""

LAUNCHERS = ("PMI_", "PMIX_", "PMI2_", "OMPI_", "PRTE_", "HYDRA_", "HYDI_", "MPI_LOCAL", "SLURM_", "MPIEXEC_")
"""What variables of a launcher begin with, by which a new job would take itself for a part of this one."""

SAYS = "mpicoll: "
"""What its own lines begin with."""

SIZES = (5, 1 << 20)  # messages of both kinds: short, and long


def probe(collective: str) -> str:
    """Why it does not, if so: two ranks are launched, which do it, and look at the result."""
    beside = Path(sys.executable).with_name("mpirun")
    launcher = str(beside) if beside.exists() else shutil.which("mpirun")
    if launcher is None:
        return "no mpirun to try it with: MPICOLL_GPU_AWARE=1 says that it works"
    environment = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHERS)}
    kept = ("OMPI_ALLOW_RUN_AS_ROOT", "OMPI_MCA_", "SLURM_JOB")
    environment |= {name: value for name, value in os.environ.items() if name.startswith(kept)}
    command = [launcher, "-n", "2", sys.executable, "-m", __name__, collective]
    try:
        done = subprocess.run(
            command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=LIMIT
        )
    except subprocess.TimeoutExpired:
        return f"a job of two ranks that tried it did not end within {LIMIT:g} s"
    except OSError as error:
        return f"a job of two ranks cannot be launched ({error})"
    if done.returncode == 0 and done.stdout.split() == ["right", "right"]:
        return ""
    said = [line.strip() for line in (done.stdout + done.stderr).splitlines() if any(map(str.isalpha, line))]
    own = [line.removeprefix(SAYS) for line in said if line.startswith(SAYS)]  # launchers say much, before and after
    why = [*own, *said[-1:], "it said nothing"][0]
    return f"a job of two ranks that tried it failed with status {done.returncode}: {why}"


def main(collective: str) -> None:
    """One of the two ranks."""
    from mpi4py import MPI

    from ..errors import UserError
    from .gpu import cupy, take

    comm = MPI.COMM_WORLD
    try:
        take(comm)
    except UserError as error:
        sys.exit(f"{SAYS}{error}")
    module, p, rank = cupy(), comm.size, comm.rank
    for size in SIZES:
        x = module.arange(size * p, dtype="float32") + rank
        y = module.zeros(size * p, "float32")
        total = module.arange(size * p, dtype="float32") * p + p * (p - 1) // 2
        z, other = x.copy(), total  # and what is done in place
        module.cuda.get_current_stream().synchronize()
        if collective == "allreduce":
            comm.Allreduce(x, y)
            comm.Allreduce(MPI.IN_PLACE, z)
        elif collective == "reduce":
            comm.Reduce(x, y if rank == 1 else None, root=1)
            comm.Reduce(MPI.IN_PLACE if rank == 1 else z, z if rank == 1 else None, root=1)
            y, total, other = (y, total, other) if rank == 1 else (x, x, z)
        elif collective == "bcast":
            comm.Bcast(x, root=1)
            y, total = x, module.arange(size * p, dtype="float32") + 1
            other = z
        elif collective == "reduce_scatter":
            comm.Reduce_scatter(x, y[:size], [size] * p)
            y, total, other = y[:size], total[rank * size : (rank + 1) * size], z
        else:
            comm.Allgatherv(x[:size], [y, [size] * p])
            total = other = module.concatenate([module.arange(size, dtype="float32") + n for n in range(p)])
            z[rank * size : (rank + 1) * size] = x[:size]
            module.cuda.get_current_stream().synchronize()
            comm.Allgatherv(MPI.IN_PLACE, [z, [size] * p])
        if not bool((y == total).all() and (z == other).all()):
            sys.exit(f"{SAYS}its {collective} of {x.nbytes} bytes on a GPU is wrong")
    print("right", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
