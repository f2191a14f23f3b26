"""Samples, layers or stages: which grid of ranks trains a model fastest, by its size, batch and network.

    python bench/grids.py               measures (a quarter of an hour), prints tables, records them in bench/results/,
                                        and draws docs/grids.png
    python bench/grids.py --show FILE   prints a recorded one
    python bench/grids.py --plot FILE   draws a recorded one in docs/grids.png

Every grid of the ranks trains the same perceptron of nine layers with the same batches, in random order, and ends with
the same loss.  Devices are emulated: a rank computes its part of a layer, and then sleeps until its floating-point
operations have taken the time that its device would take.  So its speed does not depend on how many ranks share a core,
while communication is real.  Several hosts are emulated as well (cluster.py).

The prediction is the time of the schedule by the times of devices (``mpicoll.pipeline.simulate``) and, with several
hosts, the least bytes that a host must send divided by the rate of its link.
"""

import argparse
import math
import random
import sys
import time
from functools import partial
from itertools import pairwise, product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from cluster import bits
from common import command, finish, launched, library, look_first, machine, measuring, spread, written

PICTURE = Path(__file__).parents[1] / "docs" / "grids.png"
MODULES = ("matplotlib", "threadpoolctl")
RATE, FLOPS = "100mbit", 5e8  # of a link, each way; floating-point operations a second of a device
LAYERS, CLASSES, LAUNCHES, BLOCKS = (
    8,
    16,
    3,
    3,
)  # layers that are as wide as the input is; blocks of steps, after one more


class Case(NamedTuple):
    """A model's width, samples in a batch, how many ranks on how many hosts, and steps in a block."""

    title: str
    width: int
    batch: int
    ranks: int
    hosts: int
    steps: int

    @property
    def grids(self) -> list[tuple[int, int, int]]:
        """All that there are: ranks along ``data``, ``pipe`` and ``tensor``."""
        sizes = [2**n for n in range(self.ranks.bit_length())]
        return [axes for axes in product(sizes, repeat=3) if np.prod(axes) == self.ranks]

    @property
    def sizes(self) -> list[int]:
        """The widths of the layers."""
        return [*(LAYERS + 1) * [self.width], CLASSES]


CASES = {
    "small": Case("a small model, many samples", 64, 2048, 8, 4, 6),
    "large": Case("a large model, slow links", 512, 64, 8, 4, 4),
    "few": Case("fewer samples than ranks, one host", 1024, 2, 4, 1, 8),
}


def micro_of(case: Case, data: int, pipe: int) -> int:
    """The number of micro-batches: four times that of the stages, but at most one per sample of a group."""
    return min(4 * pipe, case.batch // data) if pipe > 1 else 1


def emulated(model: Any, grid: Any, micro: int) -> Any:
    """Return a rank's part of the model on an emulated device, which takes a given time for every layer."""
    from mpicoll.train import models
    from mpicoll.train import split as split_module
    from mpicoll.train.bubble import sleep_until

    class Device(split_module.Split):
        """Layers are done when ``complete_outputs`` or ``complete_errors`` is called; and the first one, going back,
        when all is."""

        def __init__(self) -> None:
            super().__init__(model, grid, micro=micro)
            self._began, self._costs = 0.0, dict[int, float]()

        def layers(self, params: np.ndarray) -> list[Any]:
            layers = super().layers(params)
            self._costs = {n: 2 * weight.size / FLOPS for n, (weight, _) in enumerate(layers, self.first)}
            return layers

        def begin(self) -> None:
            self._began = time.perf_counter()

        def take_time(self, layer: int, samples: int, passes: int) -> None:
            sleep_until(self._began + passes * samples * self._costs[layer])

        def complete_outputs(self, n: int, outputs: np.ndarray) -> None:
            self.take_time(n, len(outputs), 1)
            super().complete_outputs(n, outputs)
            self.begin()

        def complete_errors(self, n: int, error: np.ndarray) -> None:
            self.take_time(n, len(error), 2)  # by weights, and by inputs
            super().complete_errors(n, error)
            self.begin()

    split = Device()

    def forward(*args: Any) -> Any:
        split.begin()
        return models.forward(*args)

    def backward(layers: Any, inputs: Any, error: np.ndarray, *rest: Any) -> Any:
        split.begin()
        result = models.backward(layers, inputs, error, *rest)
        if split.is_first:
            split.take_time(0, len(error), 1)
        return result

    vars(split_module).update(forward=forward, backward=backward)
    return split


def measure(name: str) -> dict:
    """One launch, on all ranks: every grid of a case, in random order."""
    from mpi4py import MPI

    from mpicoll.job.blas import limit_threads
    from mpicoll.mpi.launch import library_name
    from mpicoll.train.data import Dataset, Part
    from mpicoll.train.grid import Grid, Sizes
    from mpicoll.train.loop import Training
    from mpicoll.train.models import Layered, cross_entropy
    from mpicoll.train.readers.raw import Schema
    from mpicoll.train.scaling import Scaling
    from mpicoll.train.settings import Settings

    comm, case = MPI.COMM_WORLD, CASES[name]
    limit_threads(comm, 1)
    model = Layered(case.sizes, cross_entropy)
    rng, samples = np.random.default_rng(0), case.batch * case.steps * (BLOCKS + 1)
    x, y = rng.normal(size=(samples, case.width)).astype("f4"), rng.integers(CLASSES, size=samples)
    none = Part(x[:0], y[:0], 0, 0)
    schema, scaling = Schema(case.width, np.arange(CLASSES)), Scaling.none(case.width)
    data = Dataset(Part(x, y, 0, samples), none, none, schema, scaling, False, ())
    runs = []
    for axes in random.Random(comm.bcast(time.time_ns())).sample(case.grids, len(case.grids)):
        sizes = Sizes(*axes)
        grid = Grid(comm, sizes)
        split = emulated(model, grid, micro_of(case, sizes.data, sizes.pipe))
        settings = Settings(lr=1e-3, momentum=0, epochs=1, batch_size=case.batch)
        training = Training(grid.data, data, split, settings)
        seconds, losses = [0.0], []
        for block in range(1, BLOCKS + 2):
            training.epoch = 0  # of which all blocks are the beginning
            result = training.run(max_steps=block * case.steps)
            losses.append(result.epochs[-1].train_loss)
            seconds.append(comm.allreduce(training.seconds, MPI.MAX))
        sent = [rank.bytes_sent for rank in result.ranks if rank.bytes_sent is not None]
        runs.append(
            {
                "grid": str(sizes),
                "axes": axes,
                "ms": (np.diff(seconds)[1:] / case.steps * 1e3).round(3).tolist(),
                "loss": losses[-1],
                "sent": max(sent) / training.step if len(sent) == comm.size else None,
                "held": max(comm.allgather(split.held)),
            }
        )
        grid.free()
    return {"rank": comm.rank, "mpi": library_name(), "parameters": model.size, "runs": runs}


def predicted(case: Case, axes: tuple[int, int, int]) -> dict:
    """Milliseconds of a step; of these those that devices compute; and the share of time that they wait for each other,
    the bubble."""
    from mpicoll.pipeline import PIPELINES, simulate
    from mpicoll.train.models import Layered, cross_entropy
    from mpicoll.train.pieces import is_cut_by_inputs, stages_of

    data, pipe, tensor = axes
    micro, on_host = micro_of(case, data, pipe), case.ranks // case.hosts
    samples = math.ceil(case.batch / data) / micro
    model = Layered(case.sizes, cross_entropy)
    places = {(d, s, t): (s * data + d) * tensor + t for d in range(data) for s in range(pipe) for t in range(tensor)}

    def link(axis: int, nbytes: float) -> float:
        """Seconds in which all groups along an axis reduce this number of bytes each, by the busiest host's link."""
        groups: dict[tuple[int, ...], set[int]] = {}
        for at, place in places.items():
            groups.setdefault((*at[:axis], *at[axis + 1 :]), set()).add(place // on_host)
        by_host = np.zeros(case.hosts)
        for hosts in groups.values():
            by_host[list(hosts)] += 2 * nbytes * (len(hosts) - 1) / len(hosts)
        return by_host.max() * 8 / bits(RATE)

    forward, backward, own = [], [], []
    for layers in stages_of(model, pipe, None):
        ahead = back = 0.0
        for n in layers:
            inputs, outputs = model.sizes[n : n + 2]
            once = 2 * inputs * outputs / tensor * samples / FLOPS
            sums = link(2, 4 * samples * (outputs if is_cut_by_inputs(model, n) else inputs)) if tensor > 1 else 0
            ahead += once + (sums if is_cut_by_inputs(model, n) else 0)
            back += once * (2 if n else 1) + (sums if n and not is_cut_by_inputs(model, n) else 0)
        forward.append(ahead)
        backward.append(back)
        own.append(sum((model.sizes[n] + 1) * model.sizes[n + 1] for n in layers) / tensor)
    leaving = min(on_host, data * tensor) if case.hosts > 1 else 0  # messages that leave a host at once
    message = 4 * samples * case.width * leaving * 8 / bits(RATE)
    timing = simulate(PIPELINES["1f1b"].schedule(pipe, micro), forward, backward, message)
    step = timing.makespan + (link(0, 4 * max(own)) if data > 1 else 0)
    flops = sum(pair[0] * pair[1] * (6 if n else 4) for n, pair in enumerate(pairwise(model.sizes)))
    return {
        "ms": round(float(step) * 1e3, 1),
        "device": round(flops * case.batch / case.ranks / FLOPS * 1e3, 1),
        "bubble": round((pipe - 1) / (micro + pipe - 1), 3),
        "micro": micro,
    }


def summarize(launches: dict[str, list[dict]]) -> list[dict]:
    """A row for each case and grid: milliseconds of a step and speed, the fastest grid's being 1; the median, the least
    and the most over launches, of which each has its median."""
    table: list[dict] = []
    for name, found in [(name, found) for name, found in launches.items() if found]:
        rows = []
        by_grid = [{run["grid"]: run for run in launch["runs"]} for launch in found]
        losses = [run["loss"] for launch in found for run in launch["runs"]]
        if np.ptp(losses) > 1e-3 * np.mean(losses):
            sys.exit(f"{name}: grids do not train the same model: losses from {min(losses)} to {max(losses)}")
        for run in by_grid[0].values():
            times = [float(np.median(grids[run["grid"]]["ms"])) for grids in by_grid]
            row = {"case": name, **{key: run[key] for key in ("grid", "sent", "held")}, "ms": spread(times)}
            rows.append({**row, "predicted": predicted(CASES[name], tuple(run["axes"])), "times": times})
        best = min(rows, key=lambda row: row["ms"][0])["times"]
        for row in rows:
            row["speed"] = spread([fast / own for fast, own in zip(best, row.pop("times"), strict=True)])
        table += sorted(rows, key=lambda row: row["ms"][0])
    return table


def show(record: dict) -> None:
    """The tables, as Markdown."""
    print(f"{record['mpi']}, {record['machine']['cpu']}, {record['machine']['cores']} cores, {LAUNCHES} launches")
    for name, case in CASES.items():
        rows = [row for row in record["table"] if row["case"] == name]
        if not rows:
            continue
        where = (
            f"{case.ranks} ranks on {case.hosts} hosts, {RATE} a link"
            if case.hosts > 1
            else f"{case.ranks} ranks on one host"
        )
        print(f"\n**{case.title}**: {record['parameters'][name]} parameters, {case.batch} samples a step, {where};")
        print(f"devices compute for {rows[0]['predicted']['device']:.0f} ms.\n")
        print("| grid | micro-batches | bubble | KB a rank sends | ms a step | predicted | speed |")
        print("|---|---:|---:|---:|---|---:|---|")
        for row in rows:
            told = row["predicted"]
            stages = f"{told['micro']} | {told['bubble']:.0%}" if told["bubble"] else " | "
            sent = "" if row["sent"] is None else f"{row['sent'] / 1e3:.0f}"
            ms, speed = (
                "{:.0f} ({:.0f} to {:.0f})".format(*row["ms"]),
                "{:.2f} ({:.2f} to {:.2f})".format(*row["speed"]),
            )
            print(f"| {row['grid']} | {stages} | {sent} | {ms} | {told['ms']:.0f} | {speed} |")


def draw(record: dict, path: Path) -> None:
    """For each case, bars of what a step takes, and what was predicted."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14.5, 4.6), layout="constrained")
    for axis, (name, case) in zip(figure.subplots(1, len(CASES)), CASES.items(), strict=True):
        rows = [row for row in record["table"] if row["case"] == name][::-1]
        middle, low, high = np.array([row["ms"] for row in rows]).T
        colors = ["#1b9e77" if row is rows[-1] else "#9ecae1" for row in rows]
        places = range(len(rows))
        axis.barh(
            places, middle, xerr=[middle - low, high - middle], color=colors, error_kw={"lw": 1, "ecolor": "#555"}
        )
        axis.plot(
            [row["predicted"]["ms"] for row in rows], places, "|", color="black", ms=13, mew=1.6, label="predicted"
        )
        axis.axvline(rows[0]["predicted"]["device"], color="#b0413e", lw=1, ls="--", label="devices compute")
        axis.set_yticks(places, [row["grid"] for row in rows])
        axis.set_xlabel("milliseconds a step")
        axis.set_title(case.title, fontsize=11)
        axis.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(frameon=False, fontsize=9, loc="upper right")
    figure.suptitle(f"Every grid of the ranks; devices of {FLOPS / 1e9:g} Gflop/s, hosts' links of {RATE[:-4]} Mbit/s")
    figure.savefig(path, dpi=110)


def main() -> None:
    """Launch, collect, record, draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--launches", type=int, default=LAUNCHES)
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)  # of a worker
    args = command(parser, lambda: measure(parser.parse_args().case), show, partial(draw, path=PICTURE))
    if args is None:
        return
    cluster = [sys.executable, str(Path(__file__).with_name("cluster.py")), "--rate", RATE]
    look_first(*MODULES, cluster=["--rate", RATE], out=[PICTURE])
    launches: dict[str, list[dict]] = {name: [] for name in CASES}
    with measuring(launches) as ended:
        for launch in range(args.launches):
            for name, case in CASES.items():
                print(f"launch {launch + 1} of {args.launches}, {case.title}", file=sys.stderr, flush=True)
                hosts = [*cluster, "--hosts", str(case.hosts), "--"]
                launches[name].append(
                    written(__file__, hosts, "--case", name, MPICOLL_PROFILE="none")
                    if case.hosts > 1
                    else launched(__file__, case.ranks, "--case", name)
                )
    mpi = next(found[0]["mpi"] for found in launches.values() if found)

    def record() -> dict:
        parameters = {name: found[0]["parameters"] for name, found in launches.items() if found}
        return {"mpi": mpi, "machine": machine(), "parameters": parameters, "table": summarize(launches)}

    finish(f"grids-{library(mpi)}", launches, ended, record, show, partial(draw, path=PICTURE))


if __name__ == "__main__":
    main()
