"""Training in step beside PyTorch's: our sync strategy, and DistributedDataParallel with gloo, on the same model.

    python bench/ddp.py               measures (a minute or two), prints the table, records it in bench/results/
    python bench/ddp.py --show FILE   prints a recorded one

A perceptron of five million parameters in float32, 64 samples a step and one thread a rank, SGD with momentum, the same
samples; ours is what ``mpicoll train`` runs.  Blocks of steps take turns in one process, in random order; compared is
the time of the slowest rank within a round.  ``tuned`` shares gradients with PyTorch's buckets and fuses its optimizer.
Beside each the same without anybody to agree with, all ranks at once: what is left are NumPy and PyTorch.  After the
first block ours and theirs must hold the same parameters, to rounding.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable

import numpy as np
from allreduce import RESULTS, command, gloo, launched, machine

RANKS, LAUNCHES = [2], 3
FEATURES, HIDDEN, CLASSES = 784, (1875, 1875), 10
BATCH, STEPS, ROUNDS = 64, 10, 10  # samples of a rank and step, steps of a block, blocks of each after the first
LR = 0.01
CLOSE = 1e-3  # how far parameters may be apart, as a share of how far they have come
OURS, THEIRS, TUNED = "mpicoll sync", "DistributedDataParallel", "DistributedDataParallel, tuned"
ALONE = {OURS: "mpicoll alone", THEIRS: "torch alone", TUNED: "torch alone, tuned"}
Block = Callable[[], float]
"""Takes the next ``STEPS`` steps; returns its seconds."""


def data(comm):
    """Classes of random samples by a random linear rule; the same on all ranks, a block for each epoch."""
    from mpicoll.train.data import from_arrays

    rng = np.random.default_rng(0)
    x = rng.standard_normal((BATCH * STEPS * comm.size, FEATURES), np.float32)
    return from_arrays(x, (x @ rng.standard_normal((FEATURES, CLASSES), np.float32)).argmax(axis=1))


class Ours:
    """The loop of ``mpicoll train`` with the sync strategy."""

    def __init__(self, comm) -> None:
        from mpicoll.train.loop import Training
        from mpicoll.train.models import MODELS
        from mpicoll.train.settings import Settings

        settings = Settings(model="mlp", lr=LR, epochs=sys.maxsize, batch_size=BATCH * comm.size, threads=1)
        whole = data(comm)
        self.model = MODELS["mlp"](whole.features, whole.classes, HIDDEN)
        self.training = Training(comm, whole, self.model, settings)

    def block(self) -> float:
        """See ``Block``."""
        before = self.training.seconds
        self.training.run(max_steps=self.training.step + STEPS)
        return self.training.seconds - before

    def tensors(self) -> list[np.ndarray]:
        """Weight and bias of each layer."""
        return list(self.model.tensors(self.training.params).values())


class Theirs:
    """The same in PyTorch, beginning at the same parameters; alone, or with ``DistributedDataParallel``."""

    def __init__(self, comm, start: list[np.ndarray], together: bool, tuned: bool) -> None:
        import torch
        from torch import nn

        layers = [nn.Linear(*weight.shape) for weight in start[::2]]
        relus = [nn.ReLU() for _ in layers]
        self.model = nn.Sequential(*[one for pair in zip(layers, relus, strict=True) for one in pair][:-1])
        with torch.no_grad():
            for own, given in zip(self.model.parameters(), start, strict=True):
                own.copy_(torch.from_numpy(given.T))
        self.call = self.model
        if together:
            self.call = nn.parallel.DistributedDataParallel(self.model, gradient_as_bucket_view=tuned)
        self.loss = nn.CrossEntropyLoss()
        self.optimizer = torch.optim.SGD(self.model.parameters(), LR, 0.9, fused=tuned or None)
        self.comm, self.data, self.epoch = comm, data(comm), 0

    def block(self) -> float:
        """See ``Block``; samples are drawn as ours are, and their losses added up."""
        import torch

        from mpicoll.train.data import Batches

        self.epoch += 1
        x, y = self.data.train.x, self.data.train.y
        total = 0.0
        start = time.perf_counter()
        batches = Batches(self.data, self.comm.size, BATCH * self.comm.size, 0, self.epoch)
        for step in range(batches.steps):
            mine, _ = batches.share(step, self.comm.rank)
            self.optimizer.zero_grad()
            loss = self.loss(self.call(torch.from_numpy(x[mine])), torch.from_numpy(y[mine]))
            loss.backward()
            self.optimizer.step()
            total += loss.item()
        return time.perf_counter() - start

    def tensors(self) -> list[np.ndarray]:
        """As ``Ours.tensors``."""
        return [own.detach().numpy().T for own in self.model.parameters()]


def measure() -> dict:
    """One launch, on all ranks: seconds of a step, on the slowest rank, of each block."""
    from mpi4py import MPI

    from mpicoll.mpi.launch import library_name
    from mpicoll.mpi.threads import limit_threads

    comm = MPI.COMM_WORLD
    dist = gloo(comm)
    limit_threads(comm, 1)
    ours, alone = Ours(comm), Ours(MPI.COMM_SELF)
    start = [tensor.copy() for tensor in ours.tensors()]
    sides: dict[str, Ours | Theirs] = {OURS: ours, ALONE[OURS]: alone}
    for name, tuned in ((THEIRS, False), (TUNED, True)):
        sides[name] = Theirs(comm, start, together=True, tuned=tuned)
        sides[ALONE[name]] = Theirs(MPI.COMM_SELF, start, together=False, tuned=tuned)
    rng = np.random.default_rng(comm.bcast(time.time_ns()))
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for side in sides.values():
        side.block()
    same = {OURS: (THEIRS, TUNED), ALONE[OURS]: (ALONE[THEIRS], ALONE[TUNED])}
    apart = max(_apart(start, sides[one], sides[other]) for one, others in same.items() for other in others)
    apart = comm.allreduce(apart, MPI.MAX)
    agreeing, waiting, before = ours.training.agreeing, ours.training.waiting, ours.training.seconds
    for _ in range(ROUNDS):
        for name in rng.permutation(list(sides)):
            comm.Barrier()
            seconds[name].append(comm.allreduce(sides[name].block(), MPI.MAX) / STEPS)
    spent = ours.training.seconds - before
    shares = np.array([ours.training.agreeing - agreeing, ours.training.waiting - waiting]) / spent
    comm.Allreduce(MPI.IN_PLACE, shares)
    dist.destroy_process_group()
    return {
        "rank": comm.rank,
        "ranks": comm.size,
        "mpi": library_name(),
        "parameters": ours.model.size,
        "algorithm": ours.training.strategy.algorithm,
        "apart": apart,
        "agreeing": shares[0] / comm.size,
        "waiting": shares[1] / comm.size,
        "seconds": seconds,
    }


def _apart(start: list[np.ndarray], one: Ours | Theirs, other: Ours | Theirs) -> float:
    """The largest difference, as a share of the largest step from where both started."""
    differ = max(float(abs(a - b).max()) for a, b in zip(one.tensors(), other.tensors(), strict=True))
    return differ / max(float(abs(a - b).max()) for a, b in zip(one.tensors(), start, strict=True))


def summarize(launches: list[dict]) -> list[dict]:
    """For each number of ranks, of the launches' medians the median, least and most.

    ``ratio`` is their time over ours, within a round; ``agreement`` the share of a step that it takes longer than one
    alone; what ours itself counts as such is ``agreeing``, of which ``waiting`` for other ranks.
    """

    def spread(values: list[float]) -> list[float]:
        return [float(f(values)) for f in (np.median, np.min, np.max)]

    table = []
    for ranks in sorted({launch["ranks"] for launch in launches}):
        runs = [launch for launch in launches if launch["ranks"] == ranks]
        times = [{name: np.array(found) for name, found in run["seconds"].items()} for run in runs]
        row = {"ranks": ranks, "algorithm": runs[0]["algorithm"], "apart": max(run["apart"] for run in runs)}
        row |= {name: spread([run[name] for run in runs]) for name in ("agreeing", "waiting")}
        row["seconds"] = {name: spread([float(np.median(one[name])) for one in times]) for name in times[0]}
        for what, first, second in (("ratio", ALONE, OURS), ("alone", ALONE.values(), ALONE[OURS])):
            row[what] = {name: spread([float(np.median(one[name] / one[second])) for one in times]) for name in first}
        row["agreement"] = {
            name: spread([float(np.median(1 - one[alone] / one[name])) for one in times])
            for name, alone in ALONE.items()
        }
        table.append(row)
    return table


def show(record: dict) -> None:
    """The table, as Markdown."""
    m = record["machine"]
    print(f"{record['mpi']}, torch {m['torch']}, mpi4py {m['mpi4py']}, NumPy {m['numpy']}, Python {m['python']}")
    print(f"{m['cpu']}, {m['cores']} cores; mpicoll {m['mpicoll']}, {m['date']}; {record['launches']} launches")
    print(f"A perceptron of {record['parameters']} parameters (float32), {record['batch']} samples a rank and step.")
    for row in record["table"]:
        crowded = ", more than cores" if row["ranks"] > m["cores"] else ""
        print(f"\n| {row['ranks']} ranks{crowded} | ms a step | time, ours = 1 | alone, ours = 1 | agreement |")
        print("|---|---|---|---|---|")
        for name, alone in ALONE.items():
            ms = "{:.1f} ({:.1f} to {:.1f})".format(*np.multiply(row["seconds"][name], 1e3))
            ratios = [
                "{:.2f} ({:.2f} to {:.2f})".format(*row[what][key]) for what, key in (("ratio", name), ("alone", alone))
            ]
            print(f"| {name} | {ms} | {' | '.join(ratios)} | {_percent(row['agreement'][name])} |")
        said = f"agreeing {_percent(row['agreeing'])} of the time, of which waiting {_percent(row['waiting'])}"
        print(f"\n{OURS} by {row['algorithm']}, by its own account {said}; parameters apart: {row['apart']:.1e}")


def _percent(spread: list[float]) -> str:
    return "{:.0%} ({:.0%} to {:.0%})".format(*spread)


def main() -> None:
    """Launch, collect, record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=RANKS)
    parser.add_argument("--launches", type=int, default=LAUNCHES)
    args = command(parser, measure)
    if args is None:
        return
    if args.show:
        show(json.loads(args.show.read_text()))
        return
    launches = [launched(__file__, ranks) for _ in range(args.launches) for ranks in args.ranks]
    record = {
        "mpi": launches[0]["mpi"],
        "machine": machine(),
        "launches": args.launches,
        "parameters": launches[0]["parameters"],
        "batch": BATCH,
        "table": summarize(launches),
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / "ddp.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    show(record)
    print(f"\nrecorded in {os.path.relpath(path)}", file=sys.stderr)
    apart = max(row["apart"] for row in record["table"])
    if not apart < CLOSE:
        sys.exit(f"parameters are {apart:.1e} apart after {STEPS} steps: not the same training")


if __name__ == "__main__":
    main()
