"""What mpicoll costs before the first byte moves:  python bench/overhead.py

Importing it, over mpi4py and NumPy; compiling one rank's plan at 4096 ranks; a call with nothing to send.  Prints
milliseconds and microseconds, median (least to most) of several processes; they are for orientation, not for comparison
between machines.
"""

import json
import subprocess
import sys

import numpy as np

PROCESSES = 15
PROBE = """
import json, time, timeit
from mpi4py import MPI
import numpy as np
start = time.perf_counter()
import mpicoll
imported = time.perf_counter()
mpicoll.allreduce
engine = time.perf_counter()
from mpicoll.algorithms import ALGORITHMS
from mpicoll.mpi.plan import Plan
schedule = ALGORITHMS["allreduce"]["circulant"].schedule(4096)
before = time.perf_counter()
Plan(schedule, 1234, 10**6, np.dtype("f4"))
after = time.perf_counter()
x = np.zeros(64, "f4")
call = min(timeit.repeat(lambda: mpicoll.allreduce(x, MPI.COMM_SELF), number=2000, repeat=5)) / 2000
native = min(timeit.repeat(lambda: MPI.COMM_SELF.Allreduce(MPI.IN_PLACE, x), number=2000, repeat=5)) / 2000
print(json.dumps([(imported - start) * 1e3, (engine - start) * 1e3, (after - before) * 1e3, call * 1e6, native * 1e6]))
"""
NAMES = [
    "import mpicoll (ms)",
    "import mpicoll and its engine (ms)",
    "compile one rank's circulant plan at p = 4096 (ms)",
    "allreduce on one rank: nothing to send (us)",
    "the MPI library's own on one rank (us)",
]


def main() -> None:
    """Measure in fresh processes, print a table."""
    runs = []
    for _ in range(PROCESSES):
        done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=True, timeout=60)
        runs.append(json.loads(done.stdout))
    for name, values in zip(NAMES, np.transpose(runs), strict=True):
        print(f"{name:52} {np.median(values):8.2f} ({values.min():.2f} to {values.max():.2f})")


if __name__ == "__main__":
    main()
