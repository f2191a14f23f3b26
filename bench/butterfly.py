"""Butterfly mixing after Zhao and Canny (2013) beside allreduce in every step: time to a loss, by delay and by rate.

    python bench/butterfly.py              measures (half an hour), prints tables, records them in
                                           bench/results/, and draws docs/butterfly-mixing.png
    python bench/butterfly.py --show FILE  prints a recorded one
    python bench/butterfly.py --plot FILE  draws a recorded one
    python bench/butterfly.py --only NAMES only some of the experiments; the record keeps what it has of the others

Sparse logistic regression and SVM, on emulated clusters (cluster.py) of one rank a host.  The loss is that of all
training samples, weight decay included, at the mean of the ranks' models.  The one to reach is 0.6 of the way (with a
large model half) from where training begins to the least there is, which L-BFGS finds, and it counts as reached when it
stays so for ``STAYS`` looks at it: with large learning rates it is met by chance long before.

How many steps that takes depends on no network.  So it is found beforehand, in one process that holds the models of all
ranks, where what a strategy does after a step is to multiply them by a matrix.  Each strategy has the learning rate,
of powers of 2 ** (1 / 4), with which it takes fewest steps, looked for up and down from that of allreduce, until two in
a row are no better.  A launch has an order of the samples of its own; what counts in this search is the worst of them.

On the cluster each strategy, in random order, trains for as many steps as it needs, and must then have the loss
foretold; the clock is that of the training loop, which stands still while anything is evaluated.  Compared is the
time to the loss within a launch.  Allreduce in every step is by the algorithm that was fastest in a trial before, and
averaging goes by the same.  Calls are not compared between ranks (``MPICOLL_CHECK=off``): mixing never is.

Foretold is what speed a network would bring on which nothing counts but rounds (where there is a delay: allreduce has
log2 p, mixing one) or bytes (where there is a rate: allreduce 2(p - 1)/p models, mixing one for each neighbor).
"""

import argparse
import json
import math
import random
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from common import RESULTS, command, finish, library, look_first, machine, measuring, spread, written

from mpicoll.files import to_json

CLUSTER = Path(__file__).with_name("cluster.py")
PICTURE = Path(__file__).parents[1] / "docs" / "butterfly-mixing.png"
MODULES = ("matplotlib", "scipy", "threadpoolctl")
MODELS = {"logistic": "logistic regression", "svm": "linear SVM"}
SMALL, LARGE = "powerlaw:20480x2048:50", "powerlaw:20480x47236:75"  # models of 8 KiB, one frame, and of 185 KiB, RCV1's
DECAY, BATCH = 1e-4, 32  # weight decay, and samples of a rank in a step
STAYS = 5
FIRST = 10  # the exponent of the learning rate to begin with, to base 2 ** (1 / 4): 5.7
EVERY, MOST = 5, 1000  # steps between two evaluations of the loss, and the most steps of a run
TOLERANCE = 1e-3  # of the loss foretold
ALGORITHMS, TRIAL = ("native", "recursive_doubling", "halving_doubling"), 30  # of allreduce, and steps to try each


class Experiment(NamedTuple):
    """A cluster, of a rank a host, and what is trained on it."""

    ranks: int
    delay: float = 0  # milliseconds
    rate: int | None = None  # Mbit/s

    @property
    def data(self) -> str:
        """Where bytes are to count there have to be some."""
        return LARGE if self.rate else SMALL

    @property
    def way(self) -> float:
        """The share of the way from the first loss to the least that counts: a large model takes more steps for it."""
        return 0.5 if self.rate else 0.6


DELAYS = {4: (0, 1, 2, 5), 8: (0, 1, 2, 5), 16: (0, 1, 2, 5, 10)}  # by the number of hosts
EXPERIMENTS = {f"{p} hosts, {ms} ms": Experiment(p, delay=ms) for p, delays in DELAYS.items() for ms in delays}
EXPERIMENTS |= {f"8 hosts, {rate} Mbit/s": Experiment(8, rate=rate) for rate in (100, 200, 500, 1000)}

COLORS = {  # by ``_label``
    "butterfly": "#54278f",
    "gossip, exponential": "#b0413e",
    "gossip, ring": "#e6850e",
    "average, every 2": "#1b9e77",
    "average, every log2 p": "#2171b5",
}


def strategies(p: int) -> dict[str, dict[str, Any]]:
    """What is compared on ``p`` ranks, the first with all others, and its settings."""
    averaging = {f"average, every {n}": {"strategy": "average", "every": n} for n in sorted({2, int(math.log2(p))})}
    return {
        "allreduce": {},
        "butterfly": {"strategy": "butterfly"},
        "gossip, exponential": {"strategy": "gossip", "graph": "exponential"},
        "gossip, ring": {"strategy": "gossip", "graph": "ring"},
        **averaging,
    }


def cost(settings: dict[str, Any], at: Experiment) -> float:
    """The cost of a step, in rounds, or in models that a rank sends."""
    if settings.get("strategy") in ("butterfly", "gossip"):
        return 2 if at.rate and settings.get("graph") == "ring" else 1
    return (2 * (at.ranks - 1) / at.ranks if at.rate else math.log2(at.ranks)) / settings.get("every", 1)


# ---- beforehand, in one process


def objective(model: Any, data: Any, params: np.ndarray) -> tuple[float, np.ndarray]:
    """Mean loss of the training samples and half of weight decay times the square of the parameters; its gradient."""
    from mpicoll.train.models import Batch

    grad = np.empty_like(params)
    sums = model.loss_and_grad(params, Batch(data.train.x, data.train.y), grad)
    square = float(np.sum(np.square(params, dtype=np.float64)))
    return sums.loss / data.train.total + DECAY / 2 * square, grad / data.train.total + DECAY * params


def matrices(settings: dict[str, Any], p: int) -> Callable[[int], np.ndarray]:
    """By what the models, a row for each rank, are multiplied after a step: ``W(t)``, shape (p, p)."""
    from mpicoll import graph

    if settings.get("strategy") in ("butterfly", "gossip"):
        of = graph(settings.get("graph", "butterfly"), p)
        return lambda t: of.matrix(t).astype(np.float32)
    every, mean, own = settings.get("every", 1), np.full((p, p), 1 / p, np.float32), np.eye(p, dtype=np.float32)
    return lambda t: own if (t + 1) % every else mean


class Problem(NamedTuple):
    """A model by name, the data, the number of ranks that share them out, and the loss to reach.

    ``x`` are the training samples with a column of ones, so that a bias is like any weight.
    """

    kind: str
    model: Any
    data: Any
    x: Any
    p: int
    target: float

    def steps(self, settings: dict[str, Any], lr: float, seed: int, most: int) -> tuple[float, float | None]:
        """After how many steps the loss is reached, and which it is then; infinity if that takes ``most`` or more.

        The models of all ranks are one, whose inputs are theirs side by side: of a sample all are zero but those of the
        rank that has it.
        """
        from scipy.sparse import csr_array

        from mpicoll.train.batches import Batches
        from mpicoll.train.models import MODELS, Batch

        p, size, train = self.p, self.model.size, self.data.train
        side_by_side = MODELS[self.kind](p * size, 2, ())
        params, grad = np.zeros((2, p * size + 1), np.float32)  # at the end a bias that stays 0
        models, grads = (vector[:-1].reshape(p, size) for vector in (params, grad))
        models[:] = self.model.initial(np.random.default_rng(seed), np.dtype(np.float32))
        mix, per_epoch = matrices(settings, p), -(-train.total // (BATCH * p))
        reached: list[tuple[int, float]] = []  # without a break
        for step in range(most + STAYS * EVERY):
            if step % per_epoch == 0:
                batches = Batches(self.data, p, BATCH * p, seed, step // per_epoch + 1)
            shares = [batches.share(step % per_epoch, rank)[0] for rank in range(p)]
            samples = np.concatenate(shares)
            x = self.x[samples]
            rank_of = np.repeat(np.repeat(np.arange(p, dtype=np.int32), [len(of) for of in shares]), np.diff(x.indptr))
            x = csr_array((x.data, x.indices + size * rank_of, x.indptr), shape=(len(samples), p * size))
            side_by_side.loss_and_grad(params, Batch(x, train.y[samples]), grad)
            grads *= p / len(samples)
            grads += DECAY * models
            models[:] = mix(step) @ (models - lr * grads)
            if (step + 1) % EVERY == 0:
                loss, _ = objective(self.model, self.data, models.mean(axis=0))
                reached = [*reached, (step + 1, loss)] if loss <= self.target else []
                if len(reached) == STAYS:
                    return reached[0]
                if not reached and step + 1 >= most:
                    break
        return math.inf, None

    def tuned(self, settings: dict[str, Any], exponent: int, seeds: int) -> tuple[int, list]:
        """The best exponent of the learning rate, and ``steps`` with it for each seed."""

        def runs(exponent: int, most: int) -> list:
            return [self.steps(settings, 2 ** (exponent / 4), seed, most) for seed in range(seeds)]

        best, least = exponent, MOST
        for first, way in ((exponent, 1), (exponent - 1, -1)):
            other, worse = first, 0
            while worse < 2:
                steps = max(steps for steps, _ in runs(other, least))
                best, least, worse = (other, int(steps), 0) if steps < least else (best, least, worse + 1)
                other += way
        return best, runs(best, MOST)


@np.errstate(all="ignore")  # with some learning rates it goes astray
def choose(at: Experiment, seeds: int) -> dict:
    """For each model the loss to reach and, for each strategy, its learning rate, and the steps and the loss then for
    each seed."""
    from mpi4py import MPI
    from scipy.optimize import minimize
    from scipy.sparse import hstack

    from mpicoll.job.blas import limit_threads
    from mpicoll.train.data import load
    from mpicoll.train.models import MODELS as KNOWN

    limit_threads(MPI.COMM_SELF, 1)
    data = load(at.data, MPI.COMM_SELF, np.dtype(np.float32))
    x = hstack([data.train.x, np.ones((data.train.total, 1), np.float32)], format="csr")
    found: dict = {"rank": 0}
    for kind in MODELS:
        model = KNOWN[kind](data.features, data.classes, ())
        start = model.initial(np.random.default_rng(0), np.dtype(np.float64))
        least = minimize(partial(objective, model, data), start, jac=True, method="L-BFGS-B").fun  # close to it for svm
        target = least + (1 - at.way) * (objective(model, data, start)[0] - least)
        problem, chosen, first = Problem(kind, model, data, x, at.ranks, target), {}, FIRST
        for strategy, settings in strategies(at.ranks).items():
            best, runs = problem.tuned(settings, first, seeds)
            if not all(loss for _, loss in runs):
                sys.exit(f"{strategy}, {kind}, {at.ranks} ranks: the loss is not reached in {MOST} steps")
            chosen[strategy] = {"lr": 2 ** (best / 4), "runs": runs}
            first = best if strategy == "allreduce" else first
        found[kind] = {"least": least, "target": target, "strategies": chosen}
    return found


# ---- on the cluster


def measure(name: str, chosen: dict, seed: int) -> dict:
    """One launch, on all ranks: seconds to the loss, by model and strategy."""
    from mpi4py import MPI

    from mpicoll.job.blas import limit_threads
    from mpicoll.mpi.launch import library_name
    from mpicoll.train import models
    from mpicoll.train.data import load
    from mpicoll.train.loop import Training
    from mpicoll.train.settings import Settings

    comm = MPI.COMM_WORLD
    limit_threads(comm, 1)
    data = load(EXPERIMENTS[name].data, MPI.COMM_SELF, np.dtype(np.float32))  # nothing goes by the slow network
    known = strategies(comm.size)

    def train(kind: str, strategy: str, steps: int, algorithm: str) -> tuple[float, float | None]:
        """Seconds, and the loss then, which rank 0 knows."""
        lr = chosen[kind]["strategies"][strategy]["lr"]
        settings = {"lr": lr, "momentum": 0.0, "weight_decay": DECAY, "batch_size": BATCH * comm.size, "epochs": MOST}
        settings |= {"seed": seed, "algorithm": algorithm, **known[strategy]}
        model = models.MODELS[kind](data.features, data.classes, ())
        training = Training(comm, data, model, Settings(**settings))
        comm.Barrier()
        result = training.run(max_steps=steps)
        loss = objective(model, data, result.params)[0] if comm.rank == 0 else None
        return comm.allreduce(training.seconds, MPI.MAX), loss

    for strategy in known:  # connections are made
        train("logistic", strategy, 2 * comm.size.bit_length(), "auto")
    trial = {name: train("logistic", "allreduce", TRIAL, name)[0] / TRIAL * 1e3 for name in ALGORITHMS}
    fastest = min(trial, key=trial.__getitem__)
    seconds: dict = {kind: {} for kind in MODELS}
    wrong = 0
    tasks = [(kind, strategy) for kind in MODELS for strategy in known]
    for kind, strategy in random.Random(seed).sample(tasks, len(tasks)):
        steps, foretold = chosen[kind]["strategies"][strategy]["runs"][seed]
        seconds[kind][strategy], loss = train(kind, strategy, steps, fastest)
        wrong += loss is not None and not abs(loss - foretold) <= TOLERANCE * foretold
    return {"rank": comm.rank, "mpi": library_name(), "wrong": wrong, "trial": trial, "seconds": seconds}


def launch(name: str, chosen: dict, seed: int) -> dict:
    """One launch of an experiment."""
    at = EXPERIMENTS[name]
    cluster = [sys.executable, str(CLUSTER), "--hosts", str(at.ranks), "--ranks-per-host", "1"]
    cluster += ["--delay", str(at.delay), *(["--rate", f"{at.rate}mbit"] if at.rate else []), "--"]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "chosen.json")
        file.write_text(to_json(chosen))
        options = ["--experiment", name, "--chosen", str(file), "--seed", str(seed)]
        return written(__file__, cluster, *options, MPICOLL_PROFILE="none", MPICOLL_CHECK="off")


def summarize(launches: dict[str, list[dict]], chosen: dict[str, dict]) -> list[dict]:
    """A row for each experiment, model and strategy; median, least and most of launches."""
    table = []
    for name, runs in launches.items():
        at, settings = EXPERIMENTS[name], strategies(EXPERIMENTS[name].ranks)
        fastest = [min(run["trial"], key=run["trial"].__getitem__) for run in runs]
        for kind, strategy in [(kind, strategy) for kind in MODELS for strategy in settings]:
            of = chosen[name][kind]["strategies"]
            steps, base = ([steps for steps, _ in of[one]["runs"]] for one in (strategy, "allreduce"))
            seconds, whole = ([run["seconds"][kind][one] for run in runs] for one in (strategy, "allreduce"))
            saved = cost(settings["allreduce"], at) / cost(settings[strategy], at)
            table.append(
                {
                    "experiment": name,
                    "date": time.strftime("%Y-%m-%d"),
                    "model": kind,
                    "strategy": strategy,
                    "loss": round(chosen[name][kind]["target"], 5),
                    "least": round(chosen[name][kind]["least"], 5),
                    "lr": round(of[strategy]["lr"], 3),
                    "steps": spread(steps),
                    "ms": spread([1e3 * s / n for s, n in zip(seconds, steps, strict=True)]),
                    "seconds": spread(seconds),
                    "speed": spread([b / s for s, b in zip(seconds, whole, strict=True)]),
                    "foretold": round(saved * float(np.median(np.divide(base, steps))), 3),
                    "algorithm": max(fastest, key=fastest.count),
                    "trial_ms": {one: spread([run["trial"][one] for run in runs]) for one in ALGORITHMS},
                }
            )
    return table


def show(record: dict) -> None:
    """The tables, as Markdown."""
    m = record["machine"]
    print(f"{record['mpi']}, mpicoll {m['mpicoll']}, {m['cpu']}, {m['cores']} cores for all hosts, {m['date']}")
    print(f"{record['launches']} launches; losses other than foretold: {record['wrong']}")
    print("Speed is how often the time to the loss fits into that of allreduce: median of launches (least to most).")
    rows = record["table"]
    for name, kind in dict.fromkeys((row["experiment"], row["model"]) for row in rows):
        here = [row for row in rows if (row["experiment"], row["model"]) == (name, kind)]
        first = here[0]
        trial = ", ".join(f"{one} {ms[0]:.2f}" for one, ms in first["trial_ms"].items())
        print(f"\n{name}, {MODELS[kind]}, to a loss of {first['loss']:.4f} (least {first['least']:.4f})")
        print(f"allreduce by {first['algorithm']}; ms a step in the trial: {trial}\n")
        print("| strategy | learning rate | steps | ms a step | seconds | speed | foretold |")
        print("|---|---:|---:|---:|---:|---|---:|")
        for row in here:
            numbers = f"{row['lr']:.3g} | {row['steps'][0]:.0f} | {row['ms'][0]:.2f} | {row['seconds'][0]:.2f}"
            speed = "{:.2f} ({:.2f} to {:.2f})".format(*row["speed"])
            print(f"| {row['strategy']} | {numbers} | {speed} | {row['foretold']:.2f} |")


def _label(strategy: str, p: int) -> str:
    """What a strategy is called whatever the number of ranks."""
    return "average, every log2 p" if p > 4 and strategy == f"average, every {int(math.log2(p))}" else strategy


def draw(record: dict, path: Path) -> None:
    """A row of panels for each model: speed against delay at 4, 8 and 16 hosts, and against the links' rate."""
    from matplotlib.figure import Figure

    panels = [(p, False) for p in sorted({at.ranks for at in EXPERIMENTS.values()})] + [(8, True)]
    figure = Figure(figsize=(15, 7), layout="constrained")
    axes = figure.subplots(len(MODELS), len(panels), sharex="col", sharey=True)
    lines = {}
    for (kind, (p, by_rate)), axis in zip(
        [(kind, panel) for kind in MODELS for panel in panels], axes.flat, strict=True
    ):
        here = [(EXPERIMENTS[row["experiment"]], row) for row in record["table"] if row["model"] == kind]
        here = [(at, row) for at, row in here if at.ranks == p and bool(at.rate) == by_rate]
        lines["allreduce in every step"] = axis.axhline(1, color="black", lw=1.5)
        for strategy in strategies(p):
            rows = [(at.rate if by_rate else at.delay, row) for at, row in here if row["strategy"] == strategy]
            if strategy == "allreduce" or not rows:
                continue
            label = _label(strategy, p)
            x, (middle, low, high) = [x for x, _ in rows], np.array([row["speed"] for _, row in rows]).T
            axis.fill_between(x, low, high, color=COLORS[label], alpha=0.18, lw=0)
            (lines[label],) = axis.plot(x, middle, color=COLORS[label], lw=1.8, marker="o", ms=3.5)
            if strategy == "butterfly":
                most = axis.axhline(rows[-1][1]["foretold"], color=COLORS[label], lw=1.2, ls=":")
                lines["butterfly, foretold: nothing but rounds, or bytes, counts"] = most
        axis.grid(alpha=0.25, lw=0.6)
        axis.spines[["top", "right"]].set_visible(False)
        axis.yaxis.set_major_formatter(lambda speed, _: f"{speed:g}×")
        ticks = [at.rate or at.delay for at in EXPERIMENTS.values() if at.ranks == p and bool(at.rate) == by_rate]
        axis.set_xscale("log" if by_rate else "linear")
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.set_xticks([], minor=True)
        if axis in axes[0]:
            size = "185 KiB" if by_rate else "8 KiB"
            axis.set_title(f"{p} hosts, model of {size}", fontsize=11)
        if axis in axes[-1]:
            axis.set_xlabel("rate of the links, Mbit/s" if by_rate else "delay between hosts, ms")
        if axis in axes[:, 0]:
            axis.set_ylabel(f"{MODELS[kind]}: speed")
    axes[0, 0].set_ylim(bottom=0)
    m = record["machine"]
    about = f"emulated hosts on {m['cores']} cores ({m['cpu']}), {record['mpi']}"
    figure.suptitle(f"Time to the same loss, allreduce in every step = 1: {about}", fontsize=12)
    figure.legend(lines.values(), lines, loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Choose, launch, collect, record, draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--launches", type=int, default=3)
    parser.add_argument("--only", choices=EXPERIMENTS, nargs="+", default=[*EXPERIMENTS], metavar="NAME")
    parser.add_argument("--experiment", help=argparse.SUPPRESS)  # of a worker, and what follows
    parser.add_argument("--chosen", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, help=argparse.SUPPRESS)

    def work() -> dict:
        of = parser.parse_args()
        at = EXPERIMENTS[of.experiment]
        if of.chosen is None:
            return choose(at, of.launches)
        return measure(of.experiment, json.loads(of.chosen.read_text()), of.seed)

    args = command(parser, work, show, partial(draw, path=PICTURE))
    if args is None:
        return
    # what is the same for all experiments with as many ranks on the same data, those that take longest first
    problems = {(at.ranks, at.data): name for name, at in EXPERIMENTS.items() if name in args.only}
    ordered = dict(sorted(problems.items(), reverse=True))
    options = [("--experiment", name, "--launches", str(args.launches)) for name in ordered.values()]
    links = ["--delay", "1"] if any(EXPERIMENTS[name].delay for name in args.only) else []
    links += ["--rate", "100mbit"] if any(EXPERIMENTS[name].rate for name in args.only) else []
    look_first(*MODULES, cluster=links, out=[PICTURE])
    chosen: dict[str, dict] = {}
    launches: dict[str, list[dict]] = {name: [] for name in args.only}
    found = {"chosen": chosen, **launches}
    with measuring(found) as ended:
        print("choosing learning rates", file=sys.stderr, flush=True)
        with ThreadPoolExecutor(2) as pool:
            for problem, of in zip(ordered, pool.map(lambda of: written(__file__, [], *of), options), strict=True):
                chosen |= {
                    name: of for name in args.only if (EXPERIMENTS[name].ranks, EXPERIMENTS[name].data) == problem
                }
        for n in range(args.launches):
            for name, runs in launches.items():
                print(f"launch {n + 1} of {args.launches}: {name}", file=sys.stderr, flush=True)
                runs.append(launch(name, chosen[name], n))
    every = [run for runs in launches.values() for run in runs]
    mpi, wrong = (every[0]["mpi"] if every else "unknown MPI"), sum(run["wrong"] for run in every)
    name = f"butterfly-{library(mpi)}"

    def record() -> dict:
        if not (measured := {one: runs for one, runs in launches.items() if runs}):
            raise RuntimeError("nothing was launched")
        rows = summarize(measured, chosen)
        if (recorded := RESULTS / f"{name}.json").exists() and not ended.why:
            rows += [row for row in json.loads(recorded.read_text())["table"] if row["experiment"] not in measured]
        rows = [row for one in EXPERIMENTS for row in rows if row["experiment"] == one]
        return {"mpi": mpi, "machine": machine(), "launches": args.launches, "wrong": wrong, "table": rows}

    finish(name, found, ended, record, show, partial(draw, path=PICTURE))
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
