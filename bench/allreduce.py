"""Our allreduces beside the MPI library's own and a straightforward ring in mpi4py.

    python bench/allreduce.py              measures (a few minutes), prints the table, records it in bench/results/
    python bench/allreduce.py --show FILE  prints a recorded one (--only auto circulant: some of its columns)

Each of several launches takes every implementation in turn, in random order, at every repetition, on fresh data
that differ by rank, and checks every result exactly.  A repetition begins with a barrier and lasts as long as its
slowest rank.  Compared is the ratio within a repetition: a machine that is slow for a while is slow for all.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from mpicoll.cli.bench import pretty

SIZES = [4**n for n in range(1, 14)]  # bytes of float32: 4 B to 64 MiB
SECONDS = 2.5  # for each size, checks included, all implementations together, but at least MINIMUM repetitions
MINIMUM = 11
RESULTS = Path(__file__).parent / "results"
Allreduce = Callable[[np.ndarray], object]


def plain_ring(comm, x: np.ndarray) -> None:
    """What one writes after reading about ring allreduce: chunks, Sendrecv, a temporary array."""
    p, rank = comm.size, comm.rank
    chunks = np.array_split(x, p)
    after, before = (rank + 1) % p, (rank - 1) % p
    for t in range(p - 1):
        arrived = np.empty_like(chunks[(rank - t - 1) % p])
        comm.Sendrecv(chunks[(rank - t) % p], after, 0, arrived, before, 0)
        chunks[(rank - t - 1) % p] += arrived
    for t in range(p - 1):
        comm.Sendrecv(chunks[(rank - t + 1) % p], after, 0, chunks[(rank - t) % p], before, 0)


def measure() -> dict:
    """One launch, on all ranks; the seconds of every repetition on the slowest rank."""
    from mpi4py import MPI

    import mpicoll
    from mpicoll.measure import Settings, Task
    from mpicoll.measure import measure as measure_all
    from mpicoll.mpi.launch import library_name

    comm = MPI.COMM_WORLD
    calls: dict[str, Allreduce] = {
        "native": lambda x: comm.Allreduce(MPI.IN_PLACE, x),
        "mpi4py ring": lambda x: plain_ring(comm, x),
        "auto": lambda x: mpicoll.allreduce(x, comm),
    }
    for name in mpicoll.ALGORITHMS["allreduce"]:
        calls[name] = partial(mpicoll.allreduce, comm=comm, algorithm=name)
    subjects = {name: lambda task, send, recv, call=call: partial(call, recv) for name, call in calls.items()}
    tasks = [Task("allreduce", size // 4, np.dtype("f4")) for size in SIZES]
    settings = Settings((True,), max_time=SECONDS * len(SIZES), min_reps=MINIMUM, precision=0, seed=time.time_ns())
    found = measure_all(comm, subjects, tasks, settings)
    rows = [
        {
            "bytes": task.count * 4,
            "us": {one.name: np.round(one.us, 2).tolist() for one in found if one.task == task and one.name != "null"},
        }
        for task in tasks
    ]
    wrong = sum(one.wrong for one in found)
    return {"rank": comm.rank, "ranks": comm.size, "mpi": library_name(), "wrong": wrong, "rows": rows}


def machine() -> dict:
    """What the numbers depend on."""
    cpu = Path("/proc/cpuinfo").read_text().split("model name", 1)[1].split(":", 1)[1].splitlines()[0].strip()
    import mpi4py

    import mpicoll

    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "mpi4py": mpi4py.__version__,
        "mpicoll": mpicoll.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def summarize(launches: list[dict]) -> list[dict]:
    """For each number of ranks and size: the native time, and for each other how often its repetitions fit into it.

    The ratio of a launch is the median over its repetitions; given are the launches' median, least and most.
    """
    table = []
    for ranks in sorted({launch["ranks"] for launch in launches}):
        runs = [{row["bytes"]: row["us"] for row in launch["rows"]} for launch in launches if launch["ranks"] == ranks]
        for size in SIZES:
            times = [run[size] for run in runs]
            row = {"ranks": ranks, "bytes": size, "repetitions": sum(len(us["native"]) for us in times)}
            row["native_us"] = round(float(np.median([np.median(us["native"]) for us in times])), 2)
            for name in [name for name in times[0] if name != "native"]:
                ratios = [np.median(np.array(us["native"]) / np.array(us[name])) for us in times]
                row[name] = [round(float(f(ratios)), 3) for f in (np.median, np.min, np.max)]
            table.append(row)
    return table


def show(record: dict, only: list[str] | None = None) -> None:
    """The table, as Markdown; all columns unless some are named."""
    m = record["machine"]
    print(f"{record['mpi']}, mpi4py {m['mpi4py']}, NumPy {m['numpy']}, Python {m['python']}")
    print(f"{m['cpu']}, {m['cores']} cores; {record['launches']} launches each; wrong results: {record['wrong']}")
    print("Speed as a multiple of the MPI library's own (above 1: faster), median of launches (least to most).")
    names = only or [name for name, value in record["table"][0].items() if isinstance(value, list)]
    for ranks in sorted({row["ranks"] for row in record["table"]}):
        crowded = ", more than cores" if ranks > m["cores"] else ""
        print(f"\n| {ranks} ranks{crowded} | native us | {' | '.join(names)} |")
        print("|---:|---:|" + "---|" * len(names))
        for row in record["table"]:
            if row["ranks"] == ranks:
                cells = ["{:.2f} ({:.2f} to {:.2f})".format(*row[name]) for name in names]
                print(f"| {pretty(row['bytes'])} | {row['native_us']:.1f} | {' | '.join(cells)} |")


def launched(script: str, ranks: int) -> dict:
    """What one launch of ``script --worker`` measures: the JSON that rank 0 prints last."""
    mpirun = Path(sys.prefix, "bin", "mpirun")
    worker = [sys.executable, "-m", "mpi4py", script, "--worker"]  # -m mpi4py: one rank failing ends the job
    launcher = [str(mpirun) if mpirun.exists() else "mpirun", "-n", str(ranks)]
    done = subprocess.run([*launcher, *worker], stdout=subprocess.PIPE, text=True, check=True, timeout=600)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Launch, collect, record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--launches", type=int, default=3)
    parser.add_argument("--show", type=Path, metavar="FILE")
    parser.add_argument("--only", nargs="+", metavar="NAME")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        result = measure()
        if result.pop("rank") == 0:
            print(json.dumps(result))
        return
    if args.show:
        show(json.loads(args.show.read_text()), args.only)
        return
    launches = []
    for launch in range(args.launches):
        for ranks in args.ranks:
            print(f"launch {launch + 1} of {args.launches}, {ranks} ranks", file=sys.stderr, flush=True)
            launches.append(launched(__file__, ranks))
    record = {
        "mpi": launches[0]["mpi"],
        "machine": machine(),
        "launches": args.launches,
        "wrong": sum(launch["wrong"] for launch in launches),
        "table": summarize(launches),
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"allreduce-{record['mpi'].rsplit(' ', 1)[0].lower().replace(' ', '-')}.json"
    text = json.dumps({**record, "table": None}, indent=1)
    rows = ",\n".join("  " + json.dumps(row) for row in record["table"])
    path.write_text(text.replace('"table": null', f'"table": [\n{rows}\n ]') + "\n")
    show(record)
    print(f"\nrecorded in {os.path.relpath(path)}", file=sys.stderr)
    sys.exit(1 if record["wrong"] else 0)


if __name__ == "__main__":
    main()
