"""Allreduce across the hosts of an emulated cluster (cluster.py), beside native, and gloo if PyTorch is installed.

    python bench/network.py              measures (half an hour), prints tables, records them in bench/results/
    python bench/network.py --show FILE  prints a recorded one
    python bench/network.py --plot FILE  draws a recorded one in docs/network.png
    python bench/network.py --only NAMES only some of the experiments; the record keeps what it has of the others

Measuring is as in bench/allreduce.py: implementations run in random order on fresh data, every result is checked,
ratios are taken within a repetition, our calls are not compared (check="off"), and there are several launches.  All
ranks start at one time by the clock, which is the same on all hosts.  If links have a rate, the least time is that of
2n(h - 1)/h bytes on each host's link, for n bytes on h hosts, without headers: no allreduce sends less.  The tables
show the share of the least time in the time taken, and the bytes that the links counted.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from allreduce import columns, in_turn, speeds, times
from cluster import bits, traffic
from common import RESULTS, command, finish, library, look_first, machine, measuring, spread, written

from mpicoll.cli.numbers import pretty

CLUSTER = Path(__file__).with_name("cluster.py")
PICTURE = Path(__file__).parents[1] / "docs" / "network.png"
RATE = "200mbit"
LARGE = tuple(n << 20 for n in (1, 4, 16))  # bytes of float32
SMALL = tuple(4**n for n in range(1, 9))
SECONDS, MINIMUM = 5, 5  # seconds for each size, all implementations together, and the least number of repetitions


class Experiment(NamedTuple):
    """A cluster, and what is measured on it."""

    hosts: int
    sizes: tuple[int, ...]
    compared: tuple[str, ...]  # of what mpicoll bench measures
    ranks_per_host: int = 1
    rate: str | None = None
    delay: float = 0  # milliseconds
    tuned: float = 0  # seconds of mpicoll tune before each launch, whose profile auto then follows
    environment: Mapping[str, str] = {}  # instead of what cluster.py sets


FULL = ("native", "auto", "ring", "halving_doubling", "circulant")
FAR = ("native", "auto", "recursive_doubling", "halving_doubling", "circulant")
EXPERIMENTS = {
    "4 hosts, 200 Mbit/s": Experiment(4, LARGE, FULL, rate=RATE),
    "8 hosts, 200 Mbit/s": Experiment(8, LARGE, FULL, rate=RATE),
    "8 hosts, 1 ms apart, tuned": Experiment(8, SMALL, FAR, delay=1, tuned=60),
    "8 hosts, 200 Mbit/s, UCX, tuned": Experiment(
        8, LARGE[1:], FULL, rate=RATE, tuned=200, environment={"MPIR_CVAR_CH4_NETMOD": "ucx"}
    ),
    "4 hosts of 2 ranks, 200 Mbit/s": Experiment(4, LARGE[1:2], (*FULL, "recursive_doubling"), 2, RATE),
}
COLORS = {
    "native": ("native", "black"),
    "auto": ("auto", "#1b9e77"),
    "ring": ("ring", "#e6850e"),
    "recursive_doubling": ("recursive doubling", "#54278f"),
    "halving_doubling": ("halving-doubling", "#2171b5"),
    "circulant": ("circulant", "#66a61e"),
    "gloo": ("gloo (torch.distributed)", "#b0413e"),
}


def least(experiment: Experiment, nbytes: int) -> float:
    """Bytes that each host must send in an allreduce of ``nbytes``."""
    return 2 * nbytes * (experiment.hosts - 1) / experiment.hosts


def measure(experiment: Experiment) -> dict:
    """One launch, on all ranks of the cluster."""
    from mpi4py import MPI

    from mpicoll.measure.contestants import implementations
    from mpicoll.measure.machine import ENVIRONMENT
    from mpicoll.measure.timing import SYNC, Settings
    from mpicoll.mpi.launch import library_name

    comm = MPI.COMM_WORLD
    ours = implementations(comm, "allreduce", np.dtype("f4"), "off")
    subjects = {name: ours[name] for name in experiment.compared}
    SYNC["clock"] = partial(start, ahead=0.01 + 5e-3 * experiment.delay)
    seconds, seed = SECONDS * len(experiment.sizes), time.time_ns()
    how = Settings((True,), sync="clock", max_time=seconds, min_reps=MINIMUM, warmup=1, precision=0, seed=seed)
    found = in_turn(comm, subjects, experiment.sizes, how, "node1")
    rows = [
        {"bytes": size, "us": times(found, size), "sent": sent(comm, subjects, size) if experiment.rate else {}}
        for size in experiment.sizes
    ]
    variables = [name for name in os.environ if name.startswith(ENVIRONMENT)]
    facts = {"mpi": library_name(), "environment": {name: os.environ[name] for name in sorted(variables)}}
    return {"rank": comm.rank, **facts, "wrong": sum(one.wrong for one in found), "rows": rows}


def start(comm: Any, ahead: float) -> Callable[[], None]:
    """How ranks wait for each other: until a time, ``ahead`` seconds from now, by the clock that these hosts share.

    A barrier would let some go a delay before the others, and count that.
    """

    def wait() -> None:
        comm.Barrier()
        time.sleep(max(comm.bcast(time.monotonic() + ahead) - time.monotonic(), 0))

    return wait


def sent(comm: Any, subjects: dict[str, Callable], nbytes: int) -> dict[str, int]:
    """By implementation, what the host that sends most sends in one call: headers, and two barriers, included."""
    from mpi4py import MPI

    from mpicoll.measure.task import Task

    found = {}
    for name, prepare in subjects.items():
        call = prepare(Task("allreduce", nbytes // 4, np.dtype("f4")), MPI.IN_PLACE, np.ones(nbytes // 4, "f4"))
        before = traffic("self").sent
        comm.Barrier()
        call()
        comm.Barrier()
        found[name] = comm.allreduce(traffic("self").sent - before, MPI.MAX)
    return found


def launch(name: str) -> dict:
    """One launch of an experiment, tuned before if it is to be."""
    at = EXPERIMENTS[name]
    cluster = [sys.executable, str(CLUSTER), "--hosts", str(at.hosts), "--ranks-per-host", str(at.ranks_per_host)]
    cluster += ["--delay", str(at.delay), *(["--rate", at.rate] if at.rate else []), "--"]
    ours = partial(written, __file__, cluster, "--experiment", name, GLOO_SOCKET_IFNAME="eth0", **at.environment)
    if not at.tuned:
        return ours(MPICOLL_PROFILE="none")
    with tempfile.TemporaryDirectory() as folder:
        profile = str(Path(folder, "profile.json"))
        sizes = ",".join(map(str, at.sizes))
        tune = ["mpicoll", "tune", "--collective", "allreduce", "--sizes", sizes, "--budget", str(at.tuned)]
        files = ["--out", profile, "--data", str(Path(folder, "data.json"))]
        environment = {**os.environ, **at.environment}
        subprocess.run([*cluster, *tune, *files], stdout=sys.stderr, check=True, timeout=600, env=environment)
        return ours(MPICOLL_PROFILE=profile)


def summarize(launches: dict[str, list[dict]]) -> list[dict]:
    """A row for each experiment and size: as in bench/allreduce.py, and how much of the wire's rate is used."""
    table = []
    for name, runs in launches.items():
        experiment = EXPERIMENTS[name]
        for n, size in enumerate(experiment.sizes):
            rows = [run["rows"][n] for run in runs]
            taken = [row["us"] for row in rows]
            row = {"experiment": name, "date": time.strftime("%Y-%m-%d"), "bytes": size, **speeds(taken)}
            if experiment.rate:
                us = least(experiment, size) * 8 / bits(experiment.rate) * 1e6
                row["wire"] = {one: spread([us / float(np.median(at[one])) for at in taken]) for one in taken[0]}
                of = {one: [at["sent"][one] / least(experiment, size) for at in rows] for one in rows[0]["sent"]}
                row["sent"] = {one: spread(found) for one, found in of.items()}
            table.append(row)
    return table


def _first(rows: list[dict], name: str) -> list[dict]:
    """Those of an experiment that were measured together, the first ones."""
    found = [row for row in rows if row["experiment"] == name]
    sizes = [row["bytes"] for row in found]
    return found[: len(set(sizes))]


def show(record: dict) -> None:
    """The tables, as Markdown."""
    m = record["machine"]
    versions = [f"{name} {m[key]}" for name, key in (("mpi4py", "mpi4py"), ("torch", "torch")) if key in m]
    print(f"{', '.join([record['mpi'], *versions])}, mpicoll {m['mpicoll']}, {m['date']}")
    print(
        f"{m['cpu']}, {m['cores']} cores for all hosts; {record['launches']} launches; wrong results: {record['wrong']}"
    )
    for name in dict.fromkeys(row["experiment"] for row in record["table"]):
        rows = [row for row in record["table"] if row["experiment"] == name]
        names = columns({"table": rows})
        if "wire" in rows[0]:
            print(f"\n{name}: share of the links' rate, median of launches (least to most)\n")
            print(f"| size | native ms | {' | '.join(['native', *names])} |")
        else:
            print(f"\n{name}: speed relative to native, median of launches (least to most)\n")
            print(f"| size | native ms | {' | '.join(names)} |")
        print("|---:|---:|" + "---|" * (len(names) + ("wire" in rows[0])))
        for row in rows:
            cells = [_percent(row["wire"][one]) for one in ("native", *names)] if "wire" in row else []
            cells = cells or ["{:.2f} ({:.2f} to {:.2f})".format(*row[one]) for one in names]
            print(f"| {pretty(row['bytes'])} | {row['native_us'] / 1e3:.2f} | {' | '.join(cells)} |")
        if "wire" in rows[0]:
            of = [f"{one} {_percent(share)}" for one, share in rows[-1]["sent"].items()]
            print(f"\nSent by the host that sends most, of the least, at {pretty(rows[-1]['bytes'])}: {', '.join(of)}")


def _percent(values: list[float]) -> str:
    return "{:.0%} ({:.0%} to {:.0%})".format(*values)


def draw(record: dict, path: Path) -> None:
    """A panel for each experiment: share of the rate, or time, against size; bytes where hosts have several ranks."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(18, 4.4), layout="constrained")
    lines = {}
    for axis, (name, experiment) in zip(figure.subplots(1, len(EXPERIMENTS)), EXPERIMENTS.items(), strict=True):
        rows = [row for row in record["table"] if row["experiment"] == name]
        sizes = [row["bytes"] for row in rows]
        names = [one for one in COLORS if one == "native" or one in rows[0]]
        axis.set_title(name, fontsize=11)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25, lw=0.6)
        if experiment.ranks_per_host > 1:
            names = [one for one in names if one in rows[0]["sent"]]
            for n, one in enumerate(names):
                middle, low, high = rows[0]["sent"][one]
                axis.bar(n, middle, color=COLORS[one][1], yerr=[[middle - low], [high - middle]])
            axis.axhline(1, color="black", lw=1, ls=":")
            axis.set_xticks([])
            axis.set_ylabel(f"bytes sent by a host, the least = 1 ({pretty(sizes[0])})")
            continue
        axis.set_xscale("log", base=2)
        axis.set_xticks(
            sizes[:: 1 if experiment.rate else 2], [pretty(size) for size in sizes[:: 1 if experiment.rate else 2]]
        )
        axis.set_xticks([], minor=True)
        axis.set_xlabel("size of the array")
        for one in names:
            if experiment.rate:
                middle, low, high = np.array([row["wire"][one] for row in rows]).T
            else:
                ratios = np.array([row.get(one, [1, 1, 1]) for row in rows]).T
                middle, high, low = np.array([row["native_us"] for row in rows]) / 1e3 / ratios
            label, color = COLORS[one]
            axis.fill_between(sizes, low, high, color=color, alpha=0.18, lw=0)
            (lines[label],) = axis.plot(sizes, middle, color=color, lw=1.8, marker="o", ms=3.5)
        if experiment.rate:
            axis.set_ylim(0, 1.05)
            axis.axhline(1, color="black", lw=1, ls=":")
            axis.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
            axis.set_ylabel("share of the links' rate")
        else:
            axis.set_yscale("log", base=2)
            axis.yaxis.set_major_formatter(lambda ms, _: f"{ms:g}")
            axis.set_ylabel("milliseconds")
    m = record["machine"]
    about = f"emulated hosts on {m['cores']} cores ({m['cpu']}), {record['mpi']}"
    figure.suptitle(f"Allreduce of float32 across hosts: {about}", fontsize=12)
    figure.legend(lines.values(), lines, loc="outside lower center", ncols=len(lines), frameon=False)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Launch, collect, record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--launches", type=int, default=3)
    parser.add_argument("--only", choices=EXPERIMENTS, nargs="+", default=[*EXPERIMENTS], metavar="NAME")
    parser.add_argument("--experiment", choices=EXPERIMENTS, help=argparse.SUPPRESS)  # of a worker
    args = command(
        parser, lambda: measure(EXPERIMENTS[parser.parse_args().experiment]), show, partial(draw, path=PICTURE)
    )
    if args is None:
        return
    links = ["--delay", "1"] if any(EXPERIMENTS[name].delay for name in args.only) else []
    links += ["--rate", RATE] if any(EXPERIMENTS[name].rate for name in args.only) else []
    look_first(cluster=links)
    launches: dict[str, list[dict]] = {name: [] for name in args.only}
    with measuring(launches) as ended:
        for n in range(args.launches):
            for name, found in launches.items():
                print(f"launch {n + 1} of {args.launches}: {name}", file=sys.stderr, flush=True)
                found.append(launch(name))
    runs = [run for found in launches.values() for run in found]
    name, wrong = f"network-{library(runs[0]['mpi'])}", sum(run["wrong"] for run in runs)

    def record() -> dict:
        rows = summarize({one: found for one, found in launches.items() if found})
        if (recorded := RESULTS / f"{name}.json").exists() and not ended.why:
            rows = rows + json.loads(recorded.read_text())["table"]
        return {
            "mpi": runs[0]["mpi"],
            "machine": machine(),
            "environment": runs[0]["environment"],
            "launches": args.launches,
            "wrong": wrong,
            "table": [row for one in EXPERIMENTS for row in _first(rows, one)],
        }

    finish(name, launches, ended, record, show)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
