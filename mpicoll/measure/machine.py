"""The machine that is measured: its memory, its GPUs, its clock, and other facts that the numbers depend on."""

import os
import platform
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import mpi4py
import numpy as np
from mpi4py import MPI

from .. import __version__
from ..errors import UserError
from ..mpi import native
from ..mpi.gpu.array import Array, cupy
from ..mpi.gpu.assignment import Gpu
from ..mpi.gpu.staging import pinned
from ..mpi.launch import cores, library_name, node_of
from ..mpi.together import on_all
from ..tuning.fingerprint import Fingerprint, machine

TIME = "%Y-%m-%d %H:%M:%S"
COPIED = 256 << 20  # bytes, to find out how fast the memory of a GPU is
ENVIRONMENT = (
    *("MPICH_", "MPIR_CVAR_", "OMPI_MCA_", "PMIX_MCA_", "PRTE_MCA_", "I_MPI_"),
    *("UCX_", "FI_", "OMP_", "MPICOLL_"),
)


class GpuMemory(NamedTuple):
    """GB/s of a GPU, and of its link to the host, while every other GPU does the same; and most ranks on one."""

    copy: float  # of a copy within it: bytes that are read, and those that are written
    to_host: float
    from_host: float
    sharing: int


def fingerprint(comm: MPI.Intracomm) -> Fingerprint:
    """The fingerprint of this job, with the machine of rank 0.  A collective call."""
    node = node_of(comm)
    firsts = comm.allgather(node.bcast(comm.rank))
    node.Free()
    layout = tuple(count for _, count in sorted(Counter(firsts).items()))
    return Fingerprint(library_name(), comm.bcast(machine()), layout)


def last_level_cache() -> int:
    """Bytes of the last-level cache, as the kernel reports them; 32 MiB if it does not."""
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size[:-1]) << 10 for size in sizes if size[:-1].isdigit() and size.endswith("K")), default=32 << 20)


def memory_bandwidth(comm: MPI.Intracomm) -> dict[str, float]:
    """GB/s of a rank while all copy (2 bytes moved for one), or add (3), arrays that no cache holds: the best of five.

    As STREAM counts: the line that is read because it will be written does not count.
    """
    length = min(max(4 * last_level_cache() // comm.size, 4 << 20), 64 << 20) // 8
    a, b, c = (np.full(length, value, np.float64) for value in (1, 2, 0))
    found = {}
    for name, arrays, work in (("copy", 2, partial(np.copyto, c, a)), ("add", 3, partial(np.add, a, b, out=c))):
        seconds = []
        for _ in range(5):
            comm.Barrier()
            start = time.perf_counter()
            work()
            comm.Barrier()  # until all are done, also where they take turns on a core
            seconds.append(time.perf_counter() - start)
        found[name] = comm.bcast(arrays * a.nbytes / min(seconds) / 1e9)
    return found


def gpu_bandwidth(comm: MPI.Intracomm, mine: Gpu) -> GpuMemory:
    """GB/s of the slowest GPU, the best of ten copies by its own clock.  A collective call.

    The first rank of each GPU copies, while the others wait.
    """
    event, first = cupy().cuda.Event, comm.rank == mine.ranks[0]
    here, other = (Array(cupy().zeros(COPIED if first else 0, np.uint8)) for _ in range(2))
    host = pinned(here.nbytes)

    def speed(moved: int, work: Callable[[], None]) -> float:
        ms = []
        for _ in range(10):
            comm.Barrier()
            start, end = event(), event()
            start.record(here.stream)
            work()
            end.record(here.stream)
            end.synchronize()
            ms.append(cupy().cuda.get_elapsed_time(start, end))
        return comm.allreduce(moved / min(ms) / 1e6 if first else float("inf"), MPI.MIN)

    return GpuMemory(
        copy=speed(2 * COPIED, partial(other.copy_from, here)),
        to_host=speed(COPIED, partial(here.load, host)),
        from_host=speed(COPIED, partial(here.store, host)),
        sharing=comm.allreduce(len(mine.ranks), MPI.MAX),
    )


def check_memory(comm: MPI.Intracomm, needed: int) -> None:
    """Raise a ``UserError`` if the memory of a node is less than ``needed`` bytes for each of its ranks."""
    node = node_of(comm)
    total, ranks = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), node.size
    node.Free()

    def check() -> None:
        if needed * ranks > total:
            raise UserError(
                f"the largest size takes {needed / 2**30:.4g} GiB of memory for each of {ranks} rank(s) on a node, "
                f"which has {total / 2**30:.4g} GiB in all: take smaller sizes, or fewer ranks"
            )

    on_all(comm, check)


def check_gpu_memory(comm: MPI.Intracomm, mine: Gpu, needed: int) -> None:
    """Raise a ``UserError`` if a GPU has less than ``needed`` bytes free for each of its ranks."""
    free = cupy().cuda.runtime.memGetInfo()[0]

    def check() -> None:
        if needed * len(mine.ranks) > free:
            raise UserError(
                f"the largest size takes {needed / 2**30:.4g} GiB on {mine} for each of {len(mine.ranks)} rank(s), and "
                f"{free / 2**30:.4g} GiB are free there: take smaller sizes, or fewer ranks"
            )

    on_all(comm, check)


def timer_resolution() -> float:
    """The resolution of the clock in microseconds: the smallest difference above 0 of two readings."""
    readings = [time.perf_counter_ns() for _ in range(1000)]
    return min(after - before for before, after in pairwise(readings) if after > before) / 1e3


def environment(comm: MPI.Intracomm) -> dict[str, Any]:
    """Return the facts that the numbers depend on; on rank 0, those of all ranks.  A collective call."""
    own = {"rank": comm.rank, "hostname": socket.gethostname(), "pid": os.getpid(), "cpus": cores()}
    devices = comm.gather(own)
    if devices is None:
        return {}
    return {
        "start_time": time.strftime(TIME),
        "args": sys.argv,
        "env": [f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith(ENVIRONMENT)],
        "mpicoll": __version__,
        "compiled": native.state(),
        "git": _revision(),
        "mpi": library_name(),
        "library": MPI.Get_library_version().strip("\0 \n"),
        "mpi4py": mpi4py.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "kernel": platform.release(),
        "devices": devices,
    }


def gpu_environment(comm: MPI.Intracomm, mine: Gpu) -> dict[str, Any]:
    """Return the facts about GPUs that the numbers depend on; on rank 0, those of all ranks.  A collective call."""
    gpus = comm.gather({"rank": comm.rank, **mine._asdict()})
    if gpus is None:
        return {}
    module = cupy()
    runtime = module.cuda.runtime
    versions = {"cuda_runtime": runtime.runtimeGetVersion(), "cuda_driver": runtime.driverGetVersion()}
    numbers = {name: f"{version // 1000}.{version % 1000 // 10}" for name, version in versions.items()}
    return {"gpus": gpus, "cupy": module.__version__, **numbers}


def _revision() -> str | None:
    """The revision of the repository that this package is in, if it is in its own."""
    folder = Path(__file__).parents[2]
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 and (folder / ".git").exists() else None
