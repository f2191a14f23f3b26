"""A disposable job that finds out whether the MPI library takes arrays in the memory of GPUs.

The library cannot be asked: one that does not take them may crash, and one that says that it does may crash in some
collectives.  So each collective is tried in a job of its own.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from ...collective import COLLECTIVES

LIMIT = 60.0
"""Seconds after which the job has failed."""

LAUNCHERS = ("PMI_", "PMIX_", "PMI2_", "OMPI_", "PRTE_", "HYDRA_", "HYDI_", "MPI_LOCAL", "SLURM_", "MPIEXEC_")
"""Prefixes of launchers' environment variables, by which a new job would take itself for a part of this one."""

SAYS = "mpicoll: "
"""The prefix of the lines that the job itself prints."""

SIZES = (5, 1 << 20)  # messages of both kinds: short, and long


def probe(collective: str) -> str:
    """Why the library fails in a job of two ranks that do a collective and check the result; empty if it does not."""
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
    """Run one of the two ranks."""
    from mpi4py import MPI

    from ...errors import UserError
    from .array import cupy
    from .assignment import take

    comm, row = MPI.COMM_WORLD, COLLECTIVES[collective]
    try:
        take(comm)
    except UserError as error:
        sys.exit(f"{SAYS}{error}")
    module, p, rank, root = cupy(), comm.size, comm.rank, 1
    sends, receives = row.sends(rank, root), row.receives(rank, root) and not (row.from_root and rank == root)
    for size in SIZES:
        own, parts = slice(rank * size, (rank + 1) * size), [slice(q * size, (q + 1) * size) for q in range(p)]
        x, y = module.arange(size * p, dtype="float32") + rank, module.zeros(size * p, "float32")
        expected = module.zeros(size * p, "float32")
        for owner, part in enumerate(parts):
            for q in range(p):
                if row.contributes(q, owner, root):
                    expected[part] += module.arange(size * p, dtype="float32")[part] + q
        z = x.copy()  # and what is done in place

        def call(send: Any, recv: Any) -> None:
            module.cuda.get_current_stream().synchronize()
            row.native(comm, MPI.SUM, root, None)(send, recv)

        given, taken = x[own] if row.sends_part else x, y[own] if row.receives_part else y
        call(given if sends else None, taken if receives else None)
        right = not receives or bool((taken == (expected[own] if row.receives_part else expected)).all())
        if row.receives_part or row.from_root:
            z = expected
        elif sends and receives:
            call(MPI.IN_PLACE, z)
        else:
            call(z[own] if row.sends_part else z, None)
        if not right or (receives and not bool((z == expected).all())):
            sys.exit(f"{SAYS}its {collective} of {x.nbytes} bytes on a GPU is wrong")
    print("right", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
