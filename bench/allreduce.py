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

SIZES = [4**n for n in range(1, 14)]  # bytes of float32: 4 B to 64 MiB
SECONDS = 1.2  # for each size, all implementations together, but at least MINIMUM repetitions
MINIMUM, MAXIMUM = 11, 1000
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
    from mpicoll.mpi.launch import library_name

    comm = MPI.COMM_WORLD
    subjects: dict[str, Allreduce] = {
        "native": lambda x: comm.Allreduce(MPI.IN_PLACE, x),
        "mpi4py ring": lambda x: plain_ring(comm, x),
        "auto": lambda x: mpicoll.allreduce(x, comm),
    }
    for name in mpicoll.ALGORITHMS["allreduce"]:
        subjects[name] = partial(mpicoll.allreduce, comm=comm, algorithm=name)
    seed = comm.bcast(time.time_ns() % 2**32)
    rng = np.random.default_rng(seed)  # the same on all ranks: they must agree on the order
    rows, wrong = [], 0
    for size in rng.permutation(SIZES):
        count = int(size) // 4
        base = (np.arange(count) % 1000).astype("f4")
        x = np.empty(count, "f4")
        samples: dict[str, list[float]] = {name: [] for name in subjects}
        spent, repetition = 0.0, -2  # two warm-ups
        while repetition < MINIMUM or comm.bcast(spent < SECONDS and repetition < MAXIMUM):
            shift = int(rng.integers(100))
            expected = comm.size * (base + shift) + comm.size * (comm.size - 1) / 2
            for name in rng.permutation(list(subjects)):
                np.add(base, shift + comm.rank, out=x)
                comm.Barrier()
                start = time.perf_counter()
                subjects[name](x)
                seconds = time.perf_counter() - start
                wrong += not np.array_equal(x, expected)
                spent += seconds
                if repetition >= 0:
                    samples[name].append(seconds)
            repetition += 1
        slowest = {}
        for name, times in samples.items():
            seconds_of_slowest = np.array(times)
            comm.Allreduce(MPI.IN_PLACE, seconds_of_slowest, MPI.MAX)
            slowest[name] = np.round(seconds_of_slowest * 1e6, 2).tolist()
        rows.append({"bytes": int(size), "us": slowest})
    return {"rank": comm.rank, "ranks": comm.size, "mpi": library_name(), "wrong": comm.allreduce(wrong), "rows": rows}


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


def pretty(size: int) -> str:
    """A power of two of bytes, as people write it."""
    for unit, shift in (("MiB", 20), ("KiB", 10)):
        if size >= 1 << shift:
            return f"{size >> shift} {unit}"
    return f"{size} B"


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
