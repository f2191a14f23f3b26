"""The overhead of mpicoll before the first byte moves.

    python bench/overhead.py               measures (a minute or two), prints, records in bench/results/
    python bench/overhead.py --against DIR beside another checkout of mpicoll, by launches in turn
    python bench/overhead.py --show FILE   prints a recorded one

Measured are: importing it, over mpi4py and NumPy, from bytecode as an installed package is; compiling one rank's plans
at 4096 ranks; small calls, not compared between ranks unless it says so, as the difference to native calls within a
repetition in the same process; and the cost of the flight record for each call that is recorded.  Every figure is the
median of several processes or launches (least to most).
"""

import argparse
import inspect
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from common import command, finish, launched, library, look_first, machine, measuring, mpirun, spread, written

PROCESSES, LAUNCHES, REPETITIONS, CALLS = 15, 5, 40, 200
START = """
import json, time
from mpi4py import MPI
import numpy as np
start = time.perf_counter()
import mpicoll
imported = time.perf_counter()
mpicoll.allreduce
engine = time.perf_counter()
from mpicoll.algorithms import ALGORITHMS
from mpicoll.mpi.plan import Plan
compiled = {}
for name, row in ALGORITHMS["allreduce"].items():
    before = time.perf_counter()
    Plan(row.schedule(4096), 1234, 10**6, np.dtype("f4"))
    compiled[f"compile {name} for one of 4096 ranks (ms)"] = (time.perf_counter() - before) * 1e3
print(json.dumps({
    "import mpicoll (ms)": (imported - start) * 1e3,
    "import mpicoll and its engine (ms)": (engine - start) * 1e3,
    **compiled,
}, allow_nan=False))
"""


def calls() -> dict:
    """Measure one launch, on all ranks: microseconds of each kind of call of four bytes, and the excess over native."""
    from mpi4py import MPI

    import mpicoll
    from mpicoll.mpi import record
    from mpicoll.mpi.agreement import header_of
    from mpicoll.mpi.launch import library_name
    from mpicoll.mpi.state import state_of

    comm = MPI.COMM_WORLD
    ours = mpicoll.Comm(comm, check="off")
    x, y, gathered = np.zeros(1, "f4"), np.zeros(1, "f4"), np.zeros(comm.size, "f4")
    columns, named, counts = np.zeros((2, 2), "f4", order="F"), MPI.FLOAT, [1] * comm.size
    persistent = mpicoll.allreduce_init(x, ours, algorithm="recursive_doubling")
    kinds = {
        "native": lambda: comm.Allreduce(y, x),
        "Comm.Allreduce": lambda: ours.Allreduce(y, x),
        "mpicoll.allreduce": lambda: mpicoll.allreduce(x, ours),
        "Comm.Allreduce, check=header (the default)": lambda: ours.Allreduce(y, x, check="header"),
        "Comm.Allreduce, check=full": lambda: ours.Allreduce(y, x, check="full"),
        "persistent recursive_doubling": lambda: persistent.start().wait(),
        "Comm.Allreduce, deterministic": lambda: ours.Allreduce(y, x, deterministic=True),
        "iallreduce().wait()": lambda: mpicoll.iallreduce(x, ours).wait(),
        "native Iallreduce().Wait()": lambda: comm.Iallreduce(y, x).Wait(),
        "native Bcast": lambda: comm.Bcast(x),
        "Comm.Bcast, check=header": lambda: ours.Bcast(x, check="header"),
        "mpicoll.allreduce, check=header": lambda: mpicoll.allreduce(x, ours, check="header"),
        "mpicoll.allreduce, MPI.SUM, check=header": lambda: mpicoll.allreduce(x, ours, MPI.SUM, check="header"),
        "Comm.Reduce, check=header": lambda: ours.Reduce(y, x, check="header"),
        "Comm.Allgather, check=header": lambda: ours.Allgather(y, gathered, check="header"),
        "Comm.Reduce_scatter_block, check=header": lambda: ours.Reduce_scatter_block(gathered, x, check="header"),
        "mpicoll.bcast, check=header": lambda: mpicoll.bcast(x, ours, check="header"),
        "mpicoll.allgather, check=header": lambda: mpicoll.allgather(x, ours, check="header"),
        "mpicoll.allreduce, ring, check=header": lambda: mpicoll.allreduce(x, ours, "sum", "ring", check="header"),
        "mpicoll.allreduce of a list, check=header": lambda: mpicoll.allreduce([x, y], ours, check="header"),
        "mpicoll.allreduce on a plain communicator": lambda: mpicoll.allreduce(x, comm),
        "Comm.Allreduce in place, check=header": lambda: ours.Allreduce(MPI.IN_PLACE, x, check="header"),
        "Comm.Allreduce of [x, type], check=header": lambda: ours.Allreduce([y, named], [x, named], check="header"),
        "Comm.Allreduce of F order, check=header": lambda: ours.Allreduce(MPI.IN_PLACE, columns, check="header"),
        "Comm.Allgatherv of [x, counts], check=header": lambda: ours.Allgatherv(y, [gathered, counts], check="header"),
    }
    if ours.size > 1:
        there = ours.zeros(1024, "f4")
        kinds["Comm.Allreduce of 4 KiB in shared memory, check=header"] = lambda: ours.Allreduce(
            MPI.IN_PLACE, there, algorithm="shared", check="header"
        )
        kinds["Comm.Allreduce of 4 KiB in shared memory"] = lambda: ours.Allreduce(
            MPI.IN_PLACE, there, algorithm="shared"
        )
    headers = (header_of("allreduce", "sum", "float32", 1),)

    def recorded() -> None:
        record.begin(state_of(ours).entry(headers))
        record.end()

    alone = "flight record, begin and end of a call (us)"
    kinds[alone] = recorded
    times: dict[str, list[float]] = {name: [] for name in kinds}
    for repetition in range(-2, REPETITIONS):
        for name, call in kinds.items():
            comm.Barrier()
            start = time.perf_counter()
            for _ in range(CALLS):
                call()
            if repetition >= 0:
                times[name].append((time.perf_counter() - start) / CALLS * 1e6)
    by_itself = {"native, 4 bytes (us)": times["native"], alone: times.pop(alone)}
    base = {name: times["native Bcast" if name.startswith("Comm.Bcast") else "native"] for name in times}
    over = {f"{name}, over native (us)": np.subtract(us, base[name]) for name, us in times.items()}
    found = {**by_itself, **{name: us for name, us in over.items() if np.any(us)}}
    return {
        "rank": comm.rank,
        "mpi": library_name(),
        "rows": {name: float(np.median(us)) for name, us in found.items()},
    }


def starts() -> list[dict]:
    """What ``START`` finds, in processes one after another; the first of them only makes the bytecode."""
    start = [sys.executable, "-c", START]
    with tempfile.TemporaryDirectory() as folder:
        env = {**os.environ, "PYTHONPYCACHEPREFIX": folder}
        env.pop("PYTHONDONTWRITEBYTECODE", None)
        prints = [
            subprocess.run(start, env=env, capture_output=True, text=True, check=True, timeout=60).stdout
            for _ in range(1 + PROCESSES)
        ]
    return [json.loads(found) for found in prints[1:]]


def launched_there(folder: Path, ranks: int) -> dict:
    """Launch ``calls`` with the mpicoll of another folder, of which nothing else is needed."""
    head = f"import json, sys, time\nimport numpy as np\nREPETITIONS, CALLS = {REPETITIONS}, {CALLS}\n"
    end = "found = calls()\nif found.pop('rank') == 0:\n"
    end += "    open(sys.argv[-1], 'w').write(json.dumps(found, allow_nan=False))\n"
    with tempfile.TemporaryDirectory() as temporary:
        script = Path(temporary, "calls.py")
        script.write_text(head + inspect.getsource(calls) + end)
        return written(str(script), mpirun(ranks), MPICOLL_PROFILE="none", PYTHONPATH=str(folder))


def checkout(name: str) -> Path:
    """The folder of another checkout: the type of an argument."""
    if not Path(name, "mpicoll", "__init__.py").is_file():
        raise argparse.ArgumentTypeError(f"{name!r} is no checkout of mpicoll: name the folder that has mpicoll/ in it")
    return Path(name).resolve()


def main() -> None:
    """Measure in fresh processes and launches, print a table, record it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--against", type=checkout, metavar="DIR")
    args = command(parser, calls, show)
    if args is None:
        return
    look_first()
    found: dict[int, list[dict]] = {0: [], 1: [], 2: []}
    before: dict[int, list[dict]] = {1: [], 2: []}
    with measuring(found) as ended:
        found[0] += starts()
        for ranks in (1, 2):
            for _ in range(LAUNCHES):
                found[ranks].append(launched(__file__, ranks))
                if args.against:
                    before[ranks].append(launched_there(args.against, ranks))
    mpi = next((launch["mpi"] for launch in found[1]), "unknown MPI")

    def record() -> dict:
        table = summarize(found[0])
        for ranks in (1, 2):
            rows = summarize([launch["rows"] for launch in found[ranks]]) if found[ranks] else {}
            table.update({f"{ranks} rank(s): {name}": values for name, values in rows.items()})
        for ranks, launches in before.items():
            rows = summarize([launch["rows"] for launch in launches]) if launches else {}
            table.update({f"before, {ranks} rank(s): {name}": values for name, values in rows.items()})
        return {"mpi": mpi, "machine": machine(), "table": table}

    name = "overhead-against" if args.against else "overhead"
    finish(f"{name}-{library(mpi)}", found, ended, record, show)


def summarize(runs: list[dict]) -> dict:
    """Median, least and most of each figure."""
    return {name: spread([run[name] for run in runs], 2) for name in runs[0]}


def show(record: dict) -> None:
    """The table, as text."""
    m = record["machine"]
    print(f"{record['mpi']}, mpi4py {m['mpi4py']}, NumPy {m['numpy']}, Python {m['python']}")
    print(f"{m['cpu']}, {m['cores']} cores")
    for name, values in record["table"].items():
        print("{:84} {:8.2f} ({:.2f} to {:.2f})".format(name, *values))


if __name__ == "__main__":
    main()
