"""Allreduce by mpicoll beside native, a straightforward ring in mpi4py, and gloo if PyTorch is installed.

    python bench/allreduce.py              measures (a few minutes), prints the table, records it in bench/results/
    python bench/allreduce.py --show FILE  prints a recorded one (--only auto circulant: some of its columns)
    python bench/allreduce.py --plot FILES draws recorded ones, a panel for each, in docs/allreduce.png

There are several launches.  Each repetition runs every implementation once, in random order, on fresh data that differ
by rank, and checks every result exactly.  A call begins with a barrier, and its time is that of the slowest rank.  One
call at a time is measured, as in a program that computes in between, and separately ten calls back to back, as the OSU
benchmarks do.  Ratios are taken within a repetition, so that a machine that is slow for a while is slow for all.  Our
calls are not compared between ranks (check="off"); bench/overhead.py measures the cost of the default.  No profile is
used.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from common import TORCH, command, existing, finish, gloo, launched, library, look_first, machine, measuring, spread

from mpicoll.cli.numbers import pretty

SIZES = [4**n for n in range(1, 14)]  # bytes of float32: 4 B to 64 MiB
COMPARED = ("native", "auto", "shared_arrays", "shared_result", "recursive_doubling", "circulant")
"""Some of what mpicoll bench measures: the more take turns, the less of each call is left in the caches."""

CALLS = (1, 10)  # in a repetition
SECONDS = 1.5  # for each size, checks included, all implementations together, but at least MINIMUM repetitions
MINIMUM = 11
HOW = ("one call at a time", "back to back")
PICTURE = Path(__file__).parents[1] / "docs" / "allreduce.png"
DRAWN = {  # name, color, width of the line
    "shared_result": ("allreduce_shared: one result for all ranks", "#54278f", 2.2),
    "shared_arrays": ("Allreduce of shared arrays", "#2171b5", 2.2),
    "auto": ("Allreduce of any arrays", "#1b9e77", 2.2),
    "mpi4py ring": ("ring written in mpi4py", "#e6850e", 1.5),
    "gloo": ("gloo (torch.distributed)", "#b0413e", 1.5),
}


def plain_ring(comm, x: np.ndarray) -> None:
    """A straightforward ring allreduce in mpi4py: chunks, Sendrecv, a temporary array."""
    p, rank = comm.size, comm.rank
    chunks = np.array_split(x, p)
    after, before = (rank + 1) % p, (rank - 1) % p
    for t in range(p - 1):
        arrived = np.empty_like(chunks[(rank - t - 1) % p])
        comm.Sendrecv(chunks[(rank - t) % p], after, 0, arrived, before, 0)
        chunks[(rank - t - 1) % p] += arrived
    for t in range(p - 1):
        comm.Sendrecv(chunks[(rank - t + 1) % p], after, 0, chunks[(rank - t) % p], before, 0)


def in_turn(comm, subjects: dict, sizes: Sequence[int], settings: Any, first: str = "127.0.0.1") -> list:
    """Results of allreduces of float32 at these sizes in bytes, in turn; of gloo too where there is PyTorch."""
    from mpicoll.measure import timing
    from mpicoll.measure.task import Task

    dist = gloo(comm, first) if TORCH else None
    if dist:
        from torch import from_numpy

        subjects = {**subjects, "gloo": lambda task, send, recv: partial(dist.all_reduce, from_numpy(recv))}
    tasks = [Task("allreduce", size // 4, np.dtype("f4")) for size in sizes]
    found = [one for one in timing.measure(comm, subjects, tasks, settings) if one.name != timing.NULL]
    if dist:
        dist.destroy_process_group()
    return found


def times(found: list, size: int) -> dict[str, list[float]]:
    """The microseconds of every repetition on the slowest rank, by implementation, at this size."""
    return {one.name: np.round(one.us, 2).tolist() for one in found if one.task.count * 4 == size}


def measure() -> dict:
    """One launch, on all ranks."""
    from mpi4py import MPI

    from mpicoll.measure.contestants import Implementation, implementations
    from mpicoll.measure.machine import memory_bandwidth
    from mpicoll.measure.metrics import record
    from mpicoll.measure.timing import Settings
    from mpicoll.mpi.launch import library_name

    comm = MPI.COMM_WORLD
    subjects: dict[str, Implementation] = {"mpi4py ring": lambda task, send, recv: partial(plain_ring, comm, recv)}
    ours = implementations(comm, "allreduce", np.dtype("f4"), "off")
    subjects |= {name: ours[name] for name in COMPARED}
    memory = memory_bandwidth(comm)
    rows, wrong = [], 0
    for calls in CALLS:
        seconds = SECONDS * len(SIZES)
        how = Settings((True,), calls, max_time=seconds, min_reps=MINIMUM, precision=0, seed=time.time_ns())
        found = in_turn(comm, subjects, SIZES, how)
        wrong += sum(one.wrong for one in found)
        shares = [(one.task.count * 4, one.name, record(one, comm.size, memory)["memory_share"]) for one in found]
        for size in SIZES:
            share = {name: share for at, name, share in shares if at == size}
            rows.append({"calls": calls, "bytes": size, "us": times(found, size), "memory_share": share})
    facts = {"ranks": comm.size, "mpi": library_name(), "memory": memory}
    return {"rank": comm.rank, **facts, "wrong": wrong, "rows": rows}


def summarize(launches: list[dict]) -> list[dict]:
    """For each number of ranks, calls in a repetition, and size: the native time, and for each other how often its
    repetitions fit into it.

    The ratio of a launch is the median over its repetitions; given are the launches' median, least and most.  Beside
    it the share of the memory's bandwidth that the median time comes to, the launches' median.
    """
    table = []
    for ranks in sorted({launch["ranks"] for launch in launches}):
        own = [launch["rows"] for launch in launches if launch["ranks"] == ranks]
        runs = [{(row["calls"], row["bytes"]): row for row in rows} for rows in own]
        for calls, size in product(CALLS, SIZES):
            taken, shares = ([run[calls, size][what] for run in runs] for what in ("us", "memory_share"))
            row = {"ranks": ranks, "calls": calls, "bytes": size, **speeds(taken)}
            row["memory_share"] = {name: round(float(np.median([one[name] for one in shares])), 3) for name in taken[0]}
            table.append(row)
    return table


def speeds(taken: list[dict[str, list[float]]]) -> dict:
    """The part of ``summarize`` that is about times, from those of each launch."""
    row: dict = {"repetitions": sum(len(us["native"]) for us in taken)}
    row["native_us"] = round(float(np.median([np.median(us["native"]) for us in taken])), 2)
    for name in [name for name in taken[0] if name != "native"]:
        row[name] = spread([float(np.median(np.array(us["native"]) / np.array(us[name]))) for us in taken])
    return row


def columns(record: dict) -> list[str]:
    """The names of the implementations that were measured beside native."""
    return [name for name, value in record["table"][0].items() if isinstance(value, list)]


def show(record: dict, only: list[str] | None = None) -> None:
    """The table, as Markdown; all columns unless some are named."""
    m, names = record["machine"], only or columns(record)
    libraries = {"mpi4py": "mpi4py", "NumPy": "numpy", "Python": "python", "torch": "torch"}
    versions = [f"{name} {m[key]}" for name, key in libraries.items() if key in m]
    print(f"{', '.join([record['mpi'], *versions])}, mpicoll {m['mpicoll']}, {m['date']}")
    print(f"{m['cpu']}, {m['cores']} cores; {record['launches']} launches each; wrong results: {record['wrong']}")
    print("Speed relative to native (above 1: faster), median of launches (least to most).")
    for ranks, calls in sorted({(row["ranks"], row["calls"]) for row in record["table"]}):
        rows = [row for row in record["table"] if (row["ranks"], row["calls"]) == (ranks, calls)]
        crowded = ", more than cores" if ranks > m["cores"] else ""
        print(f"\n| {ranks} ranks{crowded}, {HOW[calls > 1]} | native us | {' | '.join(names)} |")
        print("|---:|---:|" + "---|" * len(names))
        for row in rows:
            cells = ["{:.2f} ({:.2f} to {:.2f})".format(*row[name]) for name in names]
            print(f"| {pretty(row['bytes'])} | {row['native_us']:.1f} | {' | '.join(cells)} |")
        shares = [f"{name} {rows[-1]['memory_share'][name]:.2f}" for name in ("native", *names)]
        limit = "{:.1f} GB/s a rank ({:.1f} to {:.1f})".format(*record["memory"][str(ranks)])
        print(f"\nShare of the memory's bandwidth, {limit}, at {pretty(rows[-1]['bytes'])}: {', '.join(shares)}")


def draw(records: list[dict], path: Path, ranks: int = 2) -> None:
    """Speed against size, in log scales, a column for each record, a row for each way of calling: the median of
    launches, and from least to most."""
    from matplotlib.figure import Figure

    ways = sorted({row["calls"] for row in records[0]["table"]}, reverse=True)
    figure = Figure(figsize=(max(3.7 * len(records), 6), 1 + 3.5 * len(ways)), layout="constrained")
    axes = figure.subplots(len(ways), len(records), sharex=True, sharey=True, squeeze=False)
    lines = {}
    for axis, (calls, record) in zip(axes.flat, product(ways, records), strict=True):
        rows = [row for row in record["table"] if (row["ranks"], row["calls"]) == (ranks, calls)]
        sizes = [row["bytes"] for row in rows]
        lines["native"] = axis.axhline(1, color="black", lw=1.5)
        for name, (label, color, width) in DRAWN.items():
            if name in rows[0]:
                middle, low, high = np.array([row[name] for row in rows]).T
                axis.fill_between(sizes, low, high, color=color, alpha=0.22, lw=0)
                (lines[label],) = axis.plot(sizes, middle, color=color, lw=width, marker="o", ms=3.2)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log", base=2)
        axis.set_ylim(1 / 70, 16)  # gloo's small messages may take longer
        axis.set_xticks(sizes[::3], [pretty(size) for size in sizes[::3]])
        axis.set_xticks([], minor=True)
        axis.yaxis.set_major_formatter(lambda speed, _: f"{speed:g}×" if speed >= 1 else f"1/{1 / speed:g}")
        axis.grid(alpha=0.25, lw=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    for axis, record in zip(axes[0], records, strict=True):
        axis.set_title(record["mpi"], fontsize=11)
    for axis in axes[-1]:
        axis.set_xlabel("size of the array")
    for axis, calls in zip(axes[:, 0], ways, strict=True):
        axis.set_ylabel(HOW[calls > 1])
    figure.supylabel("speed, native = 1", fontsize=10)
    m = records[0]["machine"]
    figure.suptitle(f"Allreduce of float32, {ranks} ranks on {m['cores']} cores ({m['cpu']})", fontsize=12)
    figure.legend(lines.values(), lines, loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=130)


def main() -> None:
    """Launch, collect, record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--launches", type=int, default=3)
    parser.add_argument("--plot", type=existing, nargs="+", metavar="FILE")
    parser.add_argument("--only", nargs="+", metavar="NAME")
    args = command(parser, measure, lambda record: show(record, parser.parse_args().only))
    if args is None:
        return
    if args.plot:
        draw([json.loads(path.read_text()) for path in args.plot], PICTURE)
        return
    look_first()
    launches: list[dict] = []
    with measuring(launches) as ended:
        for launch in range(args.launches):
            for ranks in args.ranks:
                print(f"launch {launch + 1} of {args.launches}, {ranks} ranks", file=sys.stderr, flush=True)
                launches.append(launched(__file__, ranks))
    mpi, wrong = launches[0]["mpi"], sum(launch["wrong"] for launch in launches)

    def record() -> dict:
        memory: dict[str, list[float]] = {str(one["ranks"]): [] for one in launches}
        for one in launches:
            memory[str(one["ranks"])].append(one["memory"]["add"])
        return {
            "mpi": mpi,
            "machine": machine(),
            "launches": args.launches,
            "memory": {ranks: spread(of, 2) for ranks, of in memory.items()},
            "wrong": wrong,
            "table": summarize(launches),
        }

    finish(f"allreduce-{library(mpi)}{'-gloo' if TORCH else ''}", launches, ended, record, show)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
