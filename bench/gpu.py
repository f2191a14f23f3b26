"""Allreduce of arrays in the memory of one GPU that several ranks share, and a step of training there.

    python bench/gpu.py                measures (ten minutes), prints tables, records them in bench/results/, and draws
                                       docs/gpu.png
    python bench/gpu.py --out FILE     records them there, and draws nothing
    python bench/gpu.py --show FILE    prints a recorded one
    python bench/gpu.py --plot FILE    draws a recorded one

It compares, side by side as mpicoll bench --device gpu does, ``ipc``, ``staged`` and native with copies written by hand
with CuPy and mpi4py alone: x.get(), the native call on ordinary host memory, x.set().  A call lasts until its stream
has completed it, and every result is checked.  The share is that of the least time that the traffic takes: for ``ipc``
every array is read once and written once, at the bandwidth of the GPU's copies; for ``staged`` the slowest of the link
to the host, in each direction, and the host's additions.

``staged`` is measured with staging buffers of several sizes, in page-locked memory that ranks share, or in memory of
each rank's own.

A step of training is one of mpicoll train --device gpu, of a perceptron with wide layers, in epochs after the first.
Its share of communication is the time of a separate allreduce of as many numbers as there are parameters: the host's
clock would include what the GPU still computes when the call is made.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
from common import command, finish, launched, library, look_first, machine, measuring, mpirun, spread

from mpicoll.cli.bench_formats import PLACES
from mpicoll.cli.numbers import pretty

SIZES = [4 << 10, 64 << 10, 1 << 20, 16 << 20, 64 << 20, 1 << 30]  # bytes of float32
LONG = 64 << 20  # longer ones take seconds to be made and checked, and are repeated no more than needed
RANKS, LAUNCHES = [2, 4], 2
SECONDS, MINIMUM, FEWEST = 4.0, 11, 3  # of a size, in a launch; repetitions at least, and of long ones
BOXES = [1 << 20, 4 << 20, 8 << 20, 16 << 20]  # bytes
AIMS = {"ipc": 0.7, "staged": 0.85}  # shares
COLORS = {"ipc": "#54278f", "staged": "#e6850e"}
PICTURE = Path(__file__).parents[1] / "docs" / "gpu.png"
MODULES = ("matplotlib",)
TRAINED, BATCH, STEPS, EPOCHS, WIDTHS = [1, 2, 4], 1024, 20, 4, (784, 4096, 4096, 10)


def parameters() -> int:
    """The number of parameters of the perceptron."""
    return sum((before + 1) * after for before, after in pairwise(WIDTHS))


@contextmanager
def boxes(size: int, shared: bool) -> Iterator[list[bool]]:
    """Give communicators that first stage something within the block staging buffers of this size.

    If ``shared`` they are in memory that ranks share, if it can be page-locked, otherwise in memory of each rank's own.
    Yields a list that says whether shared memory was locked.
    """
    from mpicoll.mpi.gpu import staging

    before, register, locked = staging.BUFFER, staging.register, []

    def asked(memory: np.ndarray) -> bool:
        locked.append(shared and register(memory))
        return locked[-1]

    staging.BUFFER, staging.register = size, asked
    try:
        yield locked
    finally:
        staging.BUFFER, staging.register = before, register


def staged(own: Any, size: int, shared: bool) -> Any:
    """Return ``staged`` with such staging buffers on a new communicator; ``None`` if ranks cannot share them."""
    from mpicoll import Comm
    from mpicoll.measure.contestants import implementations_on_gpu
    from mpicoll.mpi.gpu.array import cupy
    from mpicoll.mpi.state import state_of

    with boxes(size, shared) as locked:
        state_of(Comm(own)).boxes(cupy().cuda.Device().id)
    made = implementations_on_gpu(own, "allreduce", np.dtype("f4"), "off")[0]["staged"]
    return made if own.allreduce(any(locked)) == shared * own.size else None


def measure(sizes: list[int]) -> dict:
    """One launch, on all ranks."""
    from mpi4py import MPI

    from mpicoll.measure import timing
    from mpicoll.measure.contestants import implementations_on_gpu
    from mpicoll.measure.machine import check_gpu_memory, gpu_bandwidth, gpu_environment, memory_bandwidth
    from mpicoll.measure.metrics import record
    from mpicoll.measure.task import Task
    from mpicoll.mpi.gpu.assignment import take
    from mpicoll.mpi.launch import library_name

    comm, f4 = MPI.COMM_WORLD, np.dtype("f4")
    mine = take(comm)
    check_gpu_memory(comm, mine, 3 * max(sizes))
    memory, there = memory_bandwidth(comm), gpu_bandwidth(comm, mine)
    ours, refused = implementations_on_gpu(comm, "allreduce", f4, "off")

    def rows(subjects: dict, sizes: list[int], places: tuple[bool, ...], **more: Any) -> list[dict]:
        found = []
        for size in sizes:
            least = MINIMUM if size <= LONG else FEWEST
            how = timing.Settings(places, 1, "barrier", SECONDS, least, 1, 0, seed=time.time_ns(), device="gpu")
            results = timing.measure(comm, subjects, [Task("allreduce", size // 4, f4)], how)
            for one in (one for one in results if one.name != timing.NULL):
                said = record(one, comm.size, memory, there)
                kept = ("implementation", "in_place", "bytes", "way", "wrong", "median", "memory_share", "speed")
                found.append({**{key: said[key] for key in kept}, **more})
        return found

    named = {name: ours[name] for name in ("native", "ipc", "staged") if name in ours}
    table = rows(named, sizes, (False, True))
    largest = max((one for one in sizes if one <= LONG), default=min(sizes))
    for size, shared in product(BOXES, (True, False)):
        own = comm.Dup()
        if subject := staged(own, size, shared):
            table += rows({"staged": subject}, [largest], (True,), box=size, shared=shared)
        own.Free()
    gradient = rows({"auto": ours["auto"]}, [4 * parameters()], (True,)) if TRAINED else []
    return {
        "rank": comm.rank,
        "ranks": comm.size,
        "mpi": library_name(),
        "memory": memory,
        "gpu_memory": there._asdict(),
        "gpu": gpu_environment(comm, mine),
        "refused": refused,
        "rows": table,
        "gradient_us": gradient[0]["median"] if gradient else None,
        "wrong": sum(row["wrong"] for row in table + gradient),
    }


def check() -> None:
    """Exit with the reason, in one line, if there is no GPU."""
    tiny = ["--device", "gpu", "--count", "1", "--algorithm", "auto", "--max-time", "0", "--min-reps", "1"]
    done = subprocess.run(
        [sys.executable, "-m", "mpicoll", "bench", *tiny], capture_output=True, text=True, timeout=300
    )
    if done.returncode:
        sys.exit(done.stderr.strip())


def step(ranks: int, folder: Path) -> float:
    """Milliseconds of a step of training, in epochs after the first."""
    path = folder / "samples.npz"
    if not path.exists():
        rng = np.random.default_rng(0)
        x = rng.standard_normal((BATCH * STEPS * 5 // 4, WIDTHS[0]), np.float32)  # a fifth is the test set
        np.savez(path, X=x, y=(x @ rng.standard_normal((WIDTHS[0], WIDTHS[-1]), np.float32)).argmax(axis=1))
    out = folder / f"run-{ranks}"
    options = ["--data", path, "--model", "mlp", "--hidden", ",".join(map(str, WIDTHS[1:-1])), "--lr", "0.01"]
    options += ["--batch-size", BATCH, "--epochs", EPOCHS, "--checkpoint", "0", "--out", out, "--json"]
    train = [*mpirun(ranks), sys.executable, "-m", "mpicoll", "train"]
    line = [*map(str, [*train, "--device", "gpu", *options])]
    done = subprocess.run(line, capture_output=True, text=True, timeout=600)
    if done.returncode:
        sys.exit(done.stderr.strip())
    epochs = [json.loads(line)["seconds"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    return (epochs[-1] - epochs[0]) / (EPOCHS - 1) / STEPS * 1e3


def summarize(launches: list[dict], steps: dict[int, list[float]]) -> list[dict]:
    """A row for each number of ranks, place, size, and box where there are several: of each implementation the
    microseconds, the speed (native = 1, within a repetition) and the share; the launches' median, least and most.

    And one for each number of ranks that train: milliseconds of a step, and of them those of communication.
    """
    found: dict[tuple, dict[str, list[dict]]] = {}
    for launch in launches:
        for one in launch["rows"]:
            key = launch["ranks"], one["in_place"], one["bytes"], one.get("box"), one.get("shared")
            found.setdefault(key, {}).setdefault(one["implementation"], []).append(one)
    table = []
    for (ranks, in_place, size, box, shared), by in found.items():
        row: dict[str, Any] = {"ranks": ranks, "in_place": in_place, "bytes": size}
        row |= {} if box is None else {"box": box, "shared": shared}
        for name, rows in by.items():
            row[name] = {"us": spread([one["median"] for one in rows])}
            row[name]["share"] = spread([one["memory_share"] for one in rows])
            if rows[0]["speed"] is not None:
                row[name]["speed"] = spread([one["speed"] for one in rows])
            row[name]["way"] = ", ".join(dict.fromkeys(one["way"] for one in rows))
        table.append(row)
    for ranks, ms in [(ranks, ms) for ranks, ms in steps.items() if ms]:
        apart = [launch["gradient_us"] / 1e3 for launch in launches if launch["ranks"] == ranks] or [0.0]
        part = float(np.median(apart))
        shares = spread([part / one for one in ms])
        table.append({"ranks": ranks, "step_ms": spread(ms), "agreement_ms": part, "agreement": shares})
    return table


def show(record: dict) -> None:
    """The tables, as Markdown."""
    m, gpu, speed = record["machine"], record["gpu"], record["gpu_memory"]
    print(f"{gpu['name']}, CuPy {gpu['cupy']}, CUDA runtime {gpu['cuda_runtime']}, driver {gpu['cuda_driver']}")
    print(f"{record['mpi']}, mpi4py {m['mpi4py']}, NumPy {m['numpy']}, Python {m['python']}, {m['date']}")
    print(f"{m['cpu']}, {m['cores']} cores; {record['launches']} launches each; wrong results: {record['wrong']}")
    link = "{to_host:.1f} GB/s to the host, {from_host:.1f} GB/s from there".format(**speed)
    print(f"The GPU copies {speed['copy']:.0f} GB/s, read and written; {link}.")
    for way, why in record["refused"].items():
        print(f"Not measured: {way} ({why})")
    print("Median of launches (least to most); speed: native = 1; share: of what the memory, or the link, allows.")
    calls = [row for row in record["table"] if "native" in row]
    for ranks, place in dict.fromkeys((row["ranks"], row["in_place"]) for row in calls):
        print(f"\n| {ranks} ranks, {PLACES[place]} | native us | ipc us | speed | share | staged us | speed | share |")
        print("|---:|---:|---:|---|---|---:|---|---|")
        for row in calls:
            if (row["ranks"], row["in_place"]) == (ranks, place):
                cells = [cell for name in COLORS for cell in _cells(row.get(name), name)]
                print(f"| {pretty(row['bytes'])} | {row['native']['us'][0]:.1f} | {' | '.join(cells)} |")
    print("\n| staged, by buffer size | us | share |\n|---|---:|---|")
    for row in [row for row in record["table"] if "box" in row]:
        where = "that ranks share" if row["shared"] else "of each rank's own"
        us, _, share = _cells(row["staged"], "staged")
        print(f"| {row['ranks']} ranks, {pretty(row['bytes'])}, {pretty(row['box'])} {where} | {us} | {share} |")
    steps = [row for row in record["table"] if "step_ms" in row]
    if steps:
        print("\n| a step of training | ms | of communication |\n|---|---|---|")
    for row in steps:
        took, share = ("{:.3g} ({:.3g} to {:.3g})".format(*row[name]) for name in ("step_ms", "agreement"))
        print(f"| {row['ranks']} rank(s), {record['parameters']} parameters | {took} | {share} |")


def _cells(one: dict | None, name: str) -> list[str]:
    """Microseconds, and how it has gone if not by its name; speed; share."""
    if one is None:
        return ["-"] * 3
    ratios = ["{:.2f} ({:.2f} to {:.2f})".format(*one[what]) if what in one else "-" for what in ("speed", "share")]
    return [f"{one['us'][0]:.1f}{'' if one['way'] == name else ' by ' + one['way']}", *ratios]


def draw(record: dict, path: Path = PICTURE) -> None:
    """Share and speed against size, in place."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.4), layout="constrained")
    calls = [row for row in record["table"] if "native" in row and row["in_place"]]
    for axis, what in zip(figure.subplots(1, 2), ("share", "speed"), strict=True):
        for name, ranks in product(COLORS, sorted({row["ranks"] for row in calls})):
            rows = [row for row in calls if row["ranks"] == ranks and name in row]
            sizes = [row["bytes"] for row in rows]
            middle, low, high = np.array([row[name][what] for row in rows]).reshape(-1, 3).T
            style: dict[str, Any] = {"color": COLORS[name], "ls": "-" if ranks == min(RANKS) else "--"}
            axis.plot(sizes, middle, marker="o", ms=3.5, label=f"{name}, {ranks} ranks", **style)
            axis.fill_between(sizes, low, high, color=COLORS[name], alpha=0.15, lw=0)
        for name, aim in AIMS.items() if what == "share" else ():
            axis.axhline(aim, color=COLORS[name], lw=0.8, ls=":")
        axis.set_xscale("log", base=2)
        axis.set_xlabel("size of the array")
        ticks = sorted({row["bytes"] for row in calls})
        axis.set_xticks(ticks, [pretty(size) for size in ticks], rotation=30)
        axis.set_xticks([], minor=True)
        axis.grid(alpha=0.25, lw=0.6)
        axis.spines[["top", "right"]].set_visible(False)
        if what == "speed":
            axis.set_yscale("log", base=2)
            axis.yaxis.set_major_formatter(lambda speed, _: f"{speed:g}×" if speed >= 1 else f"1/{1 / speed:g}")
            axis.axhline(1, color="black", lw=1.2)
            axis.set_ylabel("speed (x.get(), native Allreduce, x.set(): 1)")
            axis.legend(frameon=False)
        else:
            axis.set_ylim(0, 1.05)
            axis.set_ylabel("share of the memory's or the link's bandwidth")
    figure.suptitle(f"Allreduce of float32, in place, on one {record['gpu']['name']}")
    figure.savefig(path, dpi=130)


def main() -> None:
    """Launch, collect, record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, metavar="BYTES")
    parser.add_argument("--launches", type=int, default=LAUNCHES, choices=range(1, 100), metavar="N")
    parser.add_argument("--out", type=Path, metavar="FILE")
    args = command(parser, lambda: measure(parser.parse_args().sizes), show, draw)
    if args is None:
        return
    check()
    look_first(*([] if args.out else MODULES), out=[args.out or PICTURE])
    launches: list[dict] = []
    steps: dict[int, list[float]] = {ranks: [] for ranks in TRAINED}
    with tempfile.TemporaryDirectory() as folder, measuring(launches) as ended:
        for launch in range(args.launches):
            for ranks in RANKS:
                print(f"launch {launch + 1} of {args.launches}, {ranks} ranks", file=sys.stderr, flush=True)
                launches.append(launched(__file__, ranks, "--sizes", *map(str, args.sizes)))
            for ranks in TRAINED:
                print(f"launch {launch + 1} of {args.launches}, training on {ranks}", file=sys.stderr, flush=True)
                Path(folder, str(launch)).mkdir(exist_ok=True)
                steps[ranks].append(step(ranks, Path(folder, str(launch))))
    mpi, wrong = launches[0]["mpi"], sum(launch["wrong"] for launch in launches)

    def record() -> dict:
        speeds = [launch["gpu_memory"] for launch in launches]
        return {
            "mpi": mpi,
            "machine": machine(),
            "gpu": {"name": launches[0]["gpu"]["gpus"][0]["name"], **launches[0]["gpu"]},
            "gpu_memory": {name: float(np.median([one[name] for one in speeds])) for name in speeds[0]},
            "memory": {launch["ranks"]: launch["memory"] for launch in launches},
            "refused": launches[0]["refused"],
            "launches": args.launches,
            "parameters": parameters(),
            "wrong": wrong,
            "table": summarize(launches, steps),
        }

    name = str(args.out.absolute().with_suffix("")) if args.out else f"gpu-{library(mpi)}"
    finish(name, [launches, steps], ended, record, show, None if args.out else draw)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
