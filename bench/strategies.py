"""How ranks agree, side by side: what each strategy reaches, sends and takes on Fashion-MNIST.

    python bench/strategies.py               trains (some minutes), prints a table, records it in bench/results/,
                                             and draws docs/strategies.png
    python bench/strategies.py --show FILE   prints a recorded table

Several seeds; for each, all strategies in random order, so that a machine that is slow for a while is not slow for one
of them.  Seconds are given beside those of sync with the same seed.  Needs Debian's package dataset-fashion-mnist.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from common import existing, finish, look_first, machine, measuring, mpirun

PICTURE = Path(__file__).parents[1] / "docs" / "strategies.png"
MODULES = ("matplotlib",)
RANKS, SEEDS = 4, 3
DATA = "fashion-mnist"
COMMON = ["--data", DATA, "--validation", "0.1", "--epochs", "12", "--batch-size", "128", "--lr", "0.1"]
COMMON += ["--momentum", "0.9", "--schedule", "cosine", "--checkpoint", "0"]
SENT = ["--algorithm", "halving_doubling"]  # by messages, which count; in shared memory nothing would be sent
STRATEGIES = {
    "sync": SENT,
    "average, every 8 steps": ["--strategy", "average", *SENT],
    "butterfly": ["--strategy", "butterfly"],
    "gossip on a ring": ["--strategy", "gossip", "--graph", "ring"],
}


def train(options: list[str], out: Path, ranks: int = RANKS) -> dict:
    """The summary of a run."""
    job = [sys.executable, "-m", "mpicoll", "train", *options, "--json", "--out", str(out)]
    done = subprocess.run([*mpirun(ranks), *job], capture_output=True, text=True, timeout=1800)
    if done.returncode:
        sys.exit(done.stderr.strip())
    return json.loads(done.stdout.splitlines()[-1])


def measure(folder: Path, runs: dict[str, list[dict]]) -> None:
    """All strategies, seed by seed; the runs of each are added."""
    for seed in range(SEEDS):
        for name in random.sample(list(STRATEGIES), len(STRATEGIES)):
            options = [*COMMON, "--seed", str(seed), *STRATEGIES[name]]
            runs[name].append(train(options, folder / f"{seed}-{name.split(',')[0].replace(' ', '-')}"))
            print(f"seed {seed}, {name}: {runs[name][-1]['test_accuracy']:.2%}", file=sys.stderr)


def summarize(runs: dict[str, list[dict]]) -> dict[str, dict]:
    """Median, least and most over the seeds."""

    def spread(values: list[float]) -> list[float]:
        return [float(f(values)) for f in (np.median, np.min, np.max)]

    base = [run["seconds"] for run in runs["sync"]]
    pairs = {name: [(run, of) for run, of in zip(found, base, strict=False)] for name, found in runs.items()}
    return {
        name: {
            "test accuracy": spread([run["test_accuracy"] for run in found]),
            "seconds": spread([run["seconds"] for run in found]),
            "seconds over those of sync": spread([run["seconds"] / of for run, of in pairs[name]]),
            "MB sent by a rank": found[0]["bytes_sent_per_rank"] / 1e6,
            "messages of a rank": max(rank["messages"] for rank in found[0]["per_rank"]),
        }
        for name, found in runs.items()
        if pairs[name]
    }


def show(record: dict) -> None:
    """The table, as Markdown."""
    print(f"{record['ranks']} ranks, {record['mpi']}, {record['machine']['cpu']}, {record['machine']['cores']} cores\n")
    print("| strategy | test accuracy | time, sync = 1 | sent by a rank | messages |\n|---|---|---|---:|---:|")
    for name, row in record["table"].items():
        reached = "{:.1%} ({:.1%} to {:.1%})".format(*row["test accuracy"])
        time = "{:.2f} ({:.2f} to {:.2f})".format(*row["seconds over those of sync"])
        print(f"| {name} | {reached} | {time} | {row['MB sent by a rank']:.0f} MB | {row['messages of a rank']} |")


def main() -> None:
    """Measure, print, record, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--show", type=existing, metavar="FILE")
    args = parser.parse_args()
    if args.show:
        show(json.loads(args.show.read_text()))
        return
    look_first(*MODULES, data=[DATA], out=[PICTURE])
    runs: dict[str, list[dict]] = {name: [] for name in STRATEGIES}

    def record() -> dict:
        if not (table := summarize(runs)):
            raise RuntimeError("nothing to compare with: sync has not run")
        first = runs["sync"][0]
        facts = {"mpi": first["mpi"], "machine": machine(), "ranks": first["ranks"]}
        return {**facts, "options": COMMON, "seeds": SEEDS, "table": table}

    def draw(_: dict) -> None:
        plot = [sys.executable, "-m", "mpicoll", "plot", *(found[0]["out"] for found in runs.values())]
        subprocess.run([*plot, "--out", str(PICTURE)], check=True)

    with tempfile.TemporaryDirectory() as folder:
        with measuring(runs) as ended:
            measure(Path(folder), runs)
        finish("strategies", runs, ended, record, show, draw)


if __name__ == "__main__":
    main()
