"""One rank is five times slower than the others: what becomes of each strategy, on the digits.

    python bench/stragglers.py               trains (three minutes), prints a table, records it in bench/results/,
                                             and draws docs/stragglers.png
    python bench/stragglers.py --show FILE   prints a recorded table

A rank computes the gradient of its samples and then sleeps, so that a sample takes 0.2 ms, and 1 ms on the slow rank.
So its speed does not depend on how many ranks share a core, while communication is real.  All strategies do the same
number of epochs on the same batches, with the same learning rates.  There are several seeds; for each, all strategies
in random order.
"""

import argparse
import random
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from common import command, finish, launched, library, look_first, machine, measuring, spread

PICTURE = Path(__file__).parents[1] / "docs" / "stragglers.png"
MODULES = ("matplotlib", "threadpoolctl")
DATA = "digits"
RANKS, SEEDS, SLOW, SAMPLE, TIMES = 4, 3, 1, 2e-4, 5  # ranks, seeds, which is slow, seconds a sample, how much slower
COMMON: dict[str, Any] = {"epochs": 20, "batch_size": 128, "lr": 0.05, "momentum": 0.5}
REACHED = 0.2  # a loss, over the training samples of an epoch as they were seen
STRATEGIES: dict[str, dict[str, Any]] = {
    "sync": {},
    "sync, balanced": {"balance": "auto"},
    "sync, 1 backup": {"strategy": "async", "staleness": "0", "backups": 1},
    "async, staleness 0": {"strategy": "async", "staleness": "0"},
    "async, staleness 4": {"strategy": "async", "staleness": "4"},
    "async, staleness 4, balanced": {"strategy": "async", "staleness": "4", "balance": "auto"},
    "AD-PSGD": {"strategy": "ad-psgd"},
    "async, no bound": {"strategy": "async", "staleness": "inf"},
}


class Emulated:
    """A model on an emulated device, which takes a given time for each sample."""

    def __init__(self, model: Any, seconds: float) -> None:
        self._model, self._seconds, self.size = model, seconds, model.size

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def loss_and_grad(self, params: np.ndarray, batch: Any, grad: np.ndarray) -> Any:
        """Compute the loss and the gradient, then sleep until the emulated device would be done."""
        end = time.perf_counter() + self._seconds * len(batch.y)
        sums = self._model.loss_and_grad(params, batch, grad)
        time.sleep(max(end - time.perf_counter(), 0))
        return sums


def measure(name: str, seed: int) -> dict:
    """One run, on all ranks."""
    from mpi4py import MPI

    from mpicoll.job.blas import limit_threads
    from mpicoll.mpi.launch import library_name
    from mpicoll.train.data import load
    from mpicoll.train.loop import Training, added, evaluate
    from mpicoll.train.models import MODELS
    from mpicoll.train.settings import Settings

    comm = MPI.COMM_WORLD
    limit_threads(comm, 1)
    data = load(DATA, comm, np.dtype("f4"))
    model = MODELS["mlp"](data.features, data.classes, ())
    settings = Settings(**{**COMMON, **STRATEGIES[name], "seed": seed})
    emulated = Emulated(model, SAMPLE * (TIMES if comm.rank == SLOW else 1))
    result = Training(comm, data, emulated, settings).run()
    _, accuracy = evaluate(comm, model, result.params, data.test, data.sharded)
    return {
        "rank": comm.rank,
        "mpi": library_name(),
        "seconds": [epoch.seconds for epoch in result.epochs],
        "loss": [epoch.train_loss for epoch in result.epochs],
        "accuracy": accuracy,
        "staleness": added(epoch.staleness or [] for epoch in result.epochs),
    }


def summarize(runs: dict[str, list[dict]]) -> list[dict]:
    """A row for each strategy, median, least and most over seeds; seconds beside those of sync with the same seed, of
    seeds that have both."""
    from mpicoll.train.loop import added

    def until(run: dict) -> float:
        """Seconds to the loss; those of the whole run if it was not reached."""
        return next(
            (s for s, loss in zip(run["seconds"], run["loss"], strict=True) if loss <= REACHED), run["seconds"][-1]
        )

    table = []
    for name, found in runs.items():
        pairs = list(zip(runs["sync"], found, strict=False))
        if not pairs:
            continue
        histogram = added(run["staleness"] for run in found)
        total = sum(histogram)
        table.append(
            {
                "strategy": name,
                "speed": spread([base["seconds"][-1] / run["seconds"][-1] for base, run in pairs]),
                "until": spread([until(base) / until(run) for base, run in pairs]),
                "loss": spread([run["loss"][-1] for run in found]),
                "accuracy": spread([run["accuracy"] for run in found]),
                "staleness": sum(n * count for n, count in enumerate(histogram)) / total if total else None,
                "stalest": len(histogram) - 1 if total else None,
            }
        )
    return table


def show(record: dict) -> None:
    """The table, as Markdown."""
    print(
        f"{RANKS} ranks, one of them {TIMES} times slower; {record['mpi']}, {record['machine']['cpu']}, {SEEDS} seeds\n"
    )
    print(
        f"| strategy | speed, sync = 1 | to a loss of {REACHED:g}, sync = 1 | loss at the end | test accuracy | stale |"
    )
    print("|---|---|---|---|---|---|")
    for row in record["table"]:
        speed, until = ("{:.2f} ({:.2f} to {:.2f})".format(*row[name]) for name in ("speed", "until"))
        loss, accuracy = "{:.4f}".format(row["loss"][0]), "{:.1%} ({:.1%} to {:.1%})".format(*row["accuracy"])
        stale = "" if row["staleness"] is None else f"{row['staleness']:.1f}, at most {row['stalest']}"
        print(f"| {row['strategy']} | {speed} | {until} | {loss} | {accuracy} | {stale} |")


def draw(runs: dict[str, list[dict]], path: Path) -> None:
    """Loss of the first seed against epochs and against seconds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.4), layout="constrained")
    by_epoch, by_time = figure.subplots(1, 2, sharey=True)
    for name, (run, *_) in runs.items():
        by_epoch.plot(range(1, len(run["loss"]) + 1), run["loss"], lw=1.6)
        by_time.plot(run["seconds"], run["loss"], lw=1.6, label=name)
    for axis, label in ((by_epoch, "epochs"), (by_time, "seconds")):
        axis.set(xlabel=label, yscale="log")
        axis.grid(alpha=0.25, lw=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    by_epoch.set_ylabel("training loss")
    by_time.legend(frameon=False)
    figure.suptitle(f"Digits, {RANKS} ranks, one of them {TIMES} times slower")
    figure.savefig(path, dpi=110)


def main() -> None:
    """Measure, print, record, draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--strategy", help=argparse.SUPPRESS)  # of a worker
    parser.add_argument("--seed", type=int, help=argparse.SUPPRESS)
    args = command(parser, lambda: measure(parser.parse_args().strategy, parser.parse_args().seed), show)
    if args is None:
        return
    look_first(*MODULES, data=[DATA], out=[PICTURE])
    runs: dict[str, list[dict]] = {name: [] for name in STRATEGIES}
    with measuring(runs) as ended:
        for seed in range(SEEDS):
            for name in random.sample(list(STRATEGIES), len(STRATEGIES)):
                runs[name].append(launched(__file__, RANKS, "--strategy", name, "--seed", str(seed)))
                print(f"seed {seed}, {name}: {runs[name][-1]['seconds'][-1]:.1f} s", file=sys.stderr)
    mpi = next(found[0]["mpi"] for found in runs.values() if found)

    def record() -> dict:
        if not (table := summarize(runs)):
            raise RuntimeError("nothing to compare with: sync has not run")
        return {"mpi": mpi, "machine": machine(), "options": COMMON, "seeds": SEEDS, "table": table}

    finish(f"stragglers-{library(mpi)}", runs, ended, record, show, lambda _: draw(runs, PICTURE))


if __name__ == "__main__":
    main()
