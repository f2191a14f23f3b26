"""Model averaging on Fashion-MNIST: what it reaches, by how often ranks agree, and how much faster more ranks are.

    python bench/averaging.py               measures (a quarter of an hour), prints tables, records them in
                                            bench/results/, and draws docs/averaging.png
    python bench/averaging.py --show FILE   prints a recorded one
    python bench/averaging.py --plot FILE   draws a recorded one in docs/averaging.png

How often: ranks on this machine average every 1, 2, 8, 32 or 128 steps, plainly or with an outer optimizer, at two
learning rates, beside sync with the same epochs and batches.  Training loss and test accuracy are those of the
consensus model at the end.

How much faster, as Su and Chen measured it (2015, arXiv 1507.01239): every rank has batches as large as one rank alone.
Hosts are emulated (cluster.py), with one rank each, and so are devices: a rank computes its gradients and then sleeps
until each sample has taken a given time, so that its speed does not depend on how many ranks share a core, while
communication is real.  A run ends when the consensus model has the accuracy in question.  It is evaluated at regular
intervals, outside the clock, and then a new epoch begins.  The prediction is the device's time of a step plus 1/H of
the time of an average's bytes at the rate of a link.  There are several seeds; for each, everything in random order.
"""

import argparse
import random
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from cluster import bits
from common import command, finish, launched, library, look_first, machine, measuring, spread, written
from stragglers import Emulated

PICTURE = Path(__file__).parents[1] / "docs" / "averaging.png"
MODULES = ("matplotlib", "threadpoolctl")
DATA, SEEDS, HIDDEN = "fashion-mnist", 3, (128,)
# how often
RANKS = 4
COMMON: dict[str, Any] = {"epochs": 6, "batch_size": 128, "schedule": "cosine"}
LRS = (0.03, 0.1)
OUTERS = ("mean", "slowmo")
EVERY = (1, 2, 8, 32, 128)
# how much faster
HOSTS, RATE = (1, 2, 4, 8, 16), "100mbit"
BATCH, SAMPLE = 32, 1e-3  # samples of a rank and step, seconds of its device for each
LR = 0.014  # of one rank, none tried was sooner (0.007 to 0.02); of p ranks times the square root of p
BLOCK, LONGEST, ACCURACY = 32, 1600, 0.84  # steps between two looks, steps at most, and what is looked for
SCALED: dict[str, dict[str, Any]] = {
    "sync": {},
    "average, every 8 steps": {"strategy": "average", "every": 8},
    "average, every 32 steps": {"strategy": "average", "every": 32},
}
PUBLISHED = 16, 9.3  # GPUs, and Su and Chen's speedup
COLORS = {"sync": "black", "average, every 8 steps": "#2171b5", "average, every 32 steps": "#1b9e77"}
OFTEN = {  # learning rate and outer optimizer: how they are drawn; slowmo with 0.1 would be beyond the picture
    (0.03, "mean"): ("mean, learning rate 0.03", "#2171b5"),
    (0.03, "slowmo"): ("slowmo, learning rate 0.03", "#1b9e77"),
    (0.1, "mean"): ("mean, learning rate 0.1", "#e6850e"),
}


def measure(part: str, seed: int) -> dict:
    """One launch, on all ranks: a part of the experiment with a seed."""
    from mpi4py import MPI

    from mpicoll.job.blas import limit_threads
    from mpicoll.mpi.launch import library_name
    from mpicoll.train.data import load
    from mpicoll.train.models import MODELS

    comm = MPI.COMM_WORLD
    limit_threads(comm, 1)
    data = load(DATA, MPI.COMM_SELF, np.dtype("f4"))  # every rank for itself: links are slow
    model = MODELS["mlp"](data.features, data.classes, HIDDEN)
    order = random.Random(comm.bcast(time.time_ns()))
    runs = {"often": often, "faster": faster}[part](comm, data, model, seed, order)
    return {"rank": comm.rank, "mpi": library_name(), "parameters": model.size, "runs": runs}


def often(comm: Any, data: Any, model: Any, seed: int, order: random.Random) -> list[dict]:
    """Whole trainings: sync, and every outer optimizer with every number of steps from one agreement to the next."""
    from mpicoll.errors import UserError
    from mpicoll.train.loop import Training, evaluate
    from mpicoll.train.settings import Settings

    ways: list[dict] = [{}, *({"outer": outer, "every": every} for outer in OUTERS for every in EVERY)]
    runs = [{"lr": lr, "outer": None, "every": None, **way} for lr in LRS for way in ways]
    for run in order.sample(runs, len(runs)):
        strategy = "average" if run["every"] else "sync"
        try:
            result = Training(comm, data, model, Settings(**COMMON, **run, strategy=strategy, seed=seed)).run()
        except UserError:  # numbers are not finite any more
            run |= {"loss": None, "accuracy": 0.0}
            continue
        loss, _ = evaluate(comm, model, result.params, data.train, False)
        _, accuracy = evaluate(comm, model, result.params, data.test, False)
        run |= {"loss": loss, "accuracy": accuracy}
    return runs


def faster(world: Any, data: Any, model: Any, seed: int, order: random.Random) -> list[dict]:
    """Run until the accuracy is reached: every strategy on the first hosts, by number, and one host alone."""
    runs: list[dict] = [{"ranks": p, "strategy": name} for p in HOSTS for name in SCALED if p > 1 or name == "sync"]
    for run in order.sample(runs, len(runs)):
        comm = world.Split(world.rank < run["ranks"])
        if world.rank < run["ranks"]:
            run |= until(comm, data, model, seed, SCALED[run["strategy"]])
        done = world.Ibarrier()
        while not done.Test():  # a rank that polls would keep others from working
            time.sleep(0.01)
        comm.Free()
    return runs


def until(comm: Any, data: Any, model: Any, seed: int, strategy: dict[str, Any]) -> dict:
    """One run: seconds and accuracy after every block of steps, seconds those of the slowest rank."""
    from mpi4py import MPI

    from mpicoll.train.loop import Training, evaluate
    from mpicoll.train.settings import Settings

    lr = LR * comm.size**0.5
    settings = Settings(lr=lr, epochs=sys.maxsize, batch_size=BATCH * comm.size, seed=seed, **strategy)
    training = Training(comm, data, Emulated(model, SAMPLE), settings)
    seconds, accuracies = [], [0.0]
    while accuracies[-1] < ACCURACY and training.step < LONGEST:
        result = training.run(max_steps=training.step + BLOCK)
        seconds.append(comm.allreduce(training.seconds, MPI.MAX))
        accuracies.append(evaluate(comm, model, result.params, data.test, False)[1] or 0.0)
    return {"seconds": seconds, "accuracy": accuracies[1:], "algorithm": result.algorithm}


def summarize(launches: dict[str, list[dict]]) -> list[dict]:
    """The rows of both parts: median, least and most over the seeds.

    ``speedup`` is that of samples a second, of the median block but the first; ``sooner`` that of seconds to the
    accuracy, ``after`` how many steps that is: beside one rank with the same seed.
    """
    table: list[dict] = []
    for runs in zip(*(launch["runs"] for launch in launches["often"]), strict=True):
        row = {"part": "often", **{name: runs[0][name] for name in ("lr", "outer", "every")}}
        finite = [run for run in runs if run["loss"] is not None]
        for what in ("loss", "accuracy") if finite else ():
            row[what] = spread([run[what] for run in finite])
        table.append({**row, "diverged": len(runs) - len(finite)})
    ones = [next(run for run in launch["runs"] if run["ranks"] == 1) for launch in launches["faster"]]
    for runs in zip(*(launch["runs"] for launch in launches["faster"]), strict=True):
        p, name = runs[0]["ranks"], runs[0]["strategy"]
        if any(run["accuracy"][-1] < ACCURACY for run in runs):
            sys.exit(f"{p} ranks, {name}: an accuracy of {ACCURACY:g} was not reached in {LONGEST} steps")
        every = SCALED[name].get("every", 1)
        row = {"part": "faster", "ranks": p, "strategy": name, "algorithm": runs[0]["algorithm"]}
        row["ms"] = spread([_step(run) * 1e3 for run in runs])
        row["speedup"] = spread([p * _step(one) / _step(run) for one, run in zip(ones, runs, strict=True)])
        row["predicted"] = round(predicted(launches["faster"][0]["parameters"], p, every), 3)
        row["sooner"] = spread([one["seconds"][-1] / run["seconds"][-1] for one, run in zip(ones, runs, strict=True)])
        row["after"] = spread([len(run["seconds"]) * BLOCK for run in runs])
        table.append(row)
    return table


def _step(run: dict) -> float:
    """Seconds of a step."""
    return float(np.median(np.diff(run["seconds"]))) / BLOCK


def predicted(parameters: int, p: int, every: int) -> float:
    """The speedup of p ranks that have nothing to do but compute, and send the least that an allreduce sends."""
    wire = 2 * 4 * parameters * (p - 1) / p * 8 / bits(RATE)
    return p * BATCH * SAMPLE / (BATCH * SAMPLE + wire / every)


def show(record: dict) -> None:
    """The tables, as Markdown."""
    often, faster = ([row for row in record["table"] if row["part"] == part] for part in ("often", "faster"))
    print(f"{record['mpi']}, {record['machine']['cpu']}, {record['machine']['cores']} cores, {record['seeds']} seeds")
    print(f"A perceptron of {record['parameters']} parameters (float32).\n")
    print(f"| {RANKS} ranks | learning rate | steps between | training loss | test accuracy |")
    print("|---|---:|---:|---|---|")
    for row in often:
        cells = ["diverged", ""]
        if "loss" in row:
            cells = ["{:.4g} ({:.4g} to {:.4g})".format(*row["loss"]), _percent(row["accuracy"])]
            cells[0] += f", {row['diverged']} diverged" if row["diverged"] else ""
        print(f"| {row['outer'] or 'sync'} | {row['lr']} | {row['every'] or ''} | {' | '.join(cells)} |")
    print(f"\nHosts of one rank, {RATE} a link, {SAMPLE * 1e3:g} ms a sample, {BATCH} samples of a rank and step:\n")
    print(f"| ranks | strategy | ms a step | speedup | predicted | to {ACCURACY:.0%} | steps to that |")
    print("|---:|---|---|---|---|---|---|")
    for row in faster:
        ms, speedup, sooner = ("{:.2f} ({:.2f} to {:.2f})".format(*row[what]) for what in ("ms", "speedup", "sooner"))
        after = "{:.0f} ({:.0f} to {:.0f})".format(*row["after"])
        name = row["strategy"] if row["ranks"] > 1 else "alone"
        print(f"| {row['ranks']} | {name} | {ms} | {speedup} | {row['predicted']:.2f} | {sooner} | {after} |")


def _percent(values: list[float]) -> str:
    return "{:.1%} ({:.1%} to {:.1%})".format(*values)


def draw(record: dict, path: Path) -> None:
    """Loss and accuracy against steps between agreements; speedups against ranks, of samples and to the accuracy."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 8.4), layout="constrained")
    (losses, accuracies), (speedups, sooner) = figure.subplots(2, 2)
    for (lr, outer), (label, color) in OFTEN.items():
        rows = [row for row in record["table"] if row["part"] == "often" and row["lr"] == lr]
        (base,) = [row for row in rows if row["outer"] is None]
        rows = [row for row in rows if row["outer"] == outer and "loss" in row]
        for axis, what in ((losses, "loss"), (accuracies, "accuracy")):
            if outer == "mean":
                axis.axhline(base[what][0], color=color, lw=1.2, ls="--", label=f"sync, learning rate {lr}")
            middle, low, high = np.array([row[what] for row in rows]).T
            every = [row["every"] for row in rows]
            axis.fill_between(every, low, high, color=color, alpha=0.18, lw=0)
            axis.plot(every, middle, color=color, lw=1.8, marker="o", ms=3.5, label=label)
    for axis, what in ((speedups, "speedup"), (sooner, "sooner")):
        for name, color in COLORS.items():
            of = [row for row in record["table"] if row["part"] == "faster" and row["ranks"] == 1]
            of += [
                row for row in record["table"] if row["part"] == "faster" and row["strategy"] == name and row not in of
            ]
            ranks = [row["ranks"] for row in of]
            middle, low, high = np.array([row[what] for row in of]).T
            axis.fill_between(ranks, low, high, color=color, alpha=0.18, lw=0)
            axis.plot(ranks, middle, color=color, lw=1.8, marker="o", ms=3.5, label=name)
            if axis is speedups:
                axis.plot(ranks, [row["predicted"] for row in of], color=color, lw=1.2, ls="--")
        axis.plot(HOSTS, HOSTS, color="black", lw=1, ls=":")
        axis.set_xscale("log", base=2)
        axis.set_yscale("log", base=2)
        axis.set_xticks(HOSTS, [str(p) for p in HOSTS])
        axis.set_yticks(HOSTS, [f"{p}×" for p in HOSTS])
        axis.set_xlabel("ranks")
    speedups.plot([], [], color="black", lw=1.2, ls="--", label="predicted")
    speedups.plot(*PUBLISHED, "*", color="#b0413e", ms=11, label="published: Su and Chen, 2015, GPUs")
    for axis in (losses, accuracies):
        axis.set_xscale("log", base=2)
        axis.set_xticks(EVERY, [str(every) for every in EVERY])
        axis.set_xlabel("steps from one agreement to the next")
    losses.set(ylabel="training loss", ylim=(0.15, 0.4))
    accuracies.set(ylabel="test accuracy", ylim=(0.84, 0.9))
    accuracies.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    speedups.set_ylabel("samples a second, one rank = 1")
    sooner.set_ylabel(f"speed to a test accuracy of {ACCURACY:.0%}, one rank = 1")
    losses.legend(frameon=False, fontsize=9)
    speedups.legend(frameon=False, fontsize=9, loc="upper left")
    for axis in (losses, accuracies, speedups, sooner):
        axis.minorticks_off()
        axis.grid(alpha=0.25, lw=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    losses.set_title(f"How often {RANKS} ranks agree", fontsize=11)
    speedups.set_title(f"Emulated hosts and devices, {RATE.replace('mbit', ' Mbit/s')}", fontsize=11)
    figure.suptitle("Model averaging, Fashion-MNIST")
    figure.savefig(path, dpi=110)


def main() -> None:
    """Launch, collect, record, draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--part", choices=("often", "faster"), help=argparse.SUPPRESS)  # of a worker
    parser.add_argument("--seed", type=int, help=argparse.SUPPRESS)
    args = command(
        parser, lambda: measure(parser.parse_args().part, parser.parse_args().seed), show, partial(draw, path=PICTURE)
    )
    if args is None:
        return
    cluster = [sys.executable, str(Path(__file__).with_name("cluster.py")), "--hosts", str(max(HOSTS))]
    cluster += ["--ranks-per-host", "1", "--rate", RATE, "--"]
    look_first(*MODULES, data=[DATA], cluster=["--rate", RATE], out=[PICTURE])
    launches: dict[str, list[dict]] = {"often": [], "faster": []}
    with measuring(launches) as ended:
        for seed in range(args.seeds):
            print(f"seed {seed + 1} of {args.seeds}", file=sys.stderr, flush=True)
            options = "--seed", str(seed), "--part"
            launches["often"].append(launched(__file__, RANKS, *options, "often"))
            launches["faster"].append(written(__file__, cluster, *options, "faster", MPICOLL_PROFILE="none"))
    first = launches["often"][0]

    def record() -> dict:
        facts = {"mpi": first["mpi"], "machine": machine(), "parameters": first["parameters"], "seeds": args.seeds}
        return {**facts, "table": summarize(launches)}

    finish(f"averaging-{library(first['mpi'])}", launches, ended, record, show, partial(draw, path=PICTURE))


if __name__ == "__main__":
    main()
