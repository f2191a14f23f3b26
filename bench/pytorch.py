"""Synchronous training beside PyTorch: the sync strategy, alone and in PyTorch, and DistributedDataParallel (gloo).

    python bench/pytorch.py               measures (six minutes), prints tables, records them in bench/results/, and
                                          draws docs/pytorch.png
    python bench/pytorch.py --show FILE   prints a recorded one
    python bench/pytorch.py --plot FILE   draws a recorded one

Perceptrons in float32, 64 samples a step and one thread a rank, SGD with momentum, from the same parameters and on the
same samples.  Ours is what ``mpicoll train`` runs and, as a PyTorch module, a ``mpicoll.torch.Replica``.  Blocks of
steps run in one process, in random order; the times of the slowest rank are compared within a round.  ``tuned`` shares
gradients with PyTorch's buckets and fuses its optimizer.  Each is also run without communication, on all ranks at once:
what is left is NumPy and PyTorch.  After the first block all must hold the same parameters, up to rounding, and later
have about the same loss.

One perceptron has five million parameters and random samples.  The other reads Fashion-MNIST until all have reached an
accuracy on the test set, at which each is looked at after every block, outside the clock.  A block is the beginning of
an epoch; every launch has a seed of its own.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from common import command, finish, gloo, launched, library, look_first, machine, measuring, spread

PICTURE = Path(__file__).parents[1] / "docs" / "pytorch.png"
MODULES = ("torch", "matplotlib", "threadpoolctl")
RANKS, LAUNCHES = [2], 3
BATCH = 64  # samples of a rank and step
CLOSE = 5e-2  # how far parameters may be apart, as a share of how far they have come: see ``_apart``
ALIKE = 0.05  # how far losses on the test set may be apart in the mean, as a share of them
ACCURACY = 0.88  # of the test set, what is looked for where there is one


class Subject(NamedTuple):
    """What is trained, on which data, or random ones; steps of a block; how many blocks after the first, at most."""

    data: str | None
    hidden: tuple[int, ...]
    lr: float
    steps: int
    rounds: int


SUBJECTS = {
    "random": Subject(None, (1875, 1875), 0.01, 10, 10),
    "fashion-mnist": Subject("fashion-mnist", (512, 512), 0.02, 50, 60),
}
OURS, REPLICA = "mpicoll sync", "mpicoll.torch sync"
THEIRS, TUNED = "DistributedDataParallel", "DistributedDataParallel, tuned"
ALONE = {OURS: "mpicoll alone", REPLICA: "torch alone", THEIRS: "torch alone", TUNED: "torch alone, tuned"}
COLORS = {OURS: "#54278f", REPLICA: "#2171b5", THEIRS: "#b0413e", TUNED: "#e6850e"}
Block = Callable[[], float]
"""Takes the next steps; returns their seconds."""


def data(comm: Any, subject: Subject, seed: int) -> Any:
    """The data, on all ranks; random samples, enough for a block, have the classes of a random linear rule."""
    from mpicoll.train.data import from_arrays, load

    if subject.data:
        return load(subject.data, comm, np.dtype("f4"))
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((BATCH * subject.steps * comm.size, 784), np.float32)
    return from_arrays(x, (x @ rng.standard_normal((784, 10), np.float32)).argmax(axis=1))


class Ours:
    """The loop of ``mpicoll train`` with the sync strategy."""

    def __init__(self, comm: Any, whole: Any, subject: Subject, seed: int) -> None:
        from mpicoll.train.loop import Training
        from mpicoll.train.models import MODELS
        from mpicoll.train.settings import Settings

        settings = Settings(lr=subject.lr, epochs=sys.maxsize, batch_size=BATCH * comm.size, seed=seed)
        self.model = MODELS["mlp"](whole.features, whole.classes, subject.hidden)
        self.training, self.steps = Training(comm, whole, self.model, settings), subject.steps

    def block(self) -> float:
        """Do a block of steps, and return its seconds."""
        before = self.training.seconds
        self.training.run(max_steps=self.training.step + self.steps)
        return self.training.seconds - before

    def tensors(self) -> list[np.ndarray]:
        """Weight and bias of each layer."""
        return list(self.model.tensors(self.training.params).values())


class Theirs:
    """The model in PyTorch, from the same initial parameters, without communication."""

    def __init__(
        self, comm: Any, whole: Any, subject: Subject, seed: int, start: list[np.ndarray], *, tuned: bool = False
    ) -> None:
        import torch
        from torch import nn

        layers = [nn.Linear(*weight.shape) for weight in start[::2]]
        relus = [nn.ReLU() for _ in layers]
        self.model = nn.Sequential(*[one for pair in zip(layers, relus, strict=True) for one in pair][:-1])
        with torch.no_grad():
            for own, given in zip(self.model.parameters(), start, strict=True):
                own.copy_(torch.from_numpy(given.T))
        self.call: Any = self.model
        self.loss = nn.CrossEntropyLoss()
        self.optimizer = torch.optim.SGD(self.model.parameters(), subject.lr, 0.9, fused=tuned or None)
        self.comm, self.whole, self.steps, self.seed, self.epoch = comm, whole, subject.steps, seed, 0
        self.x, self.y = torch.from_numpy(whole.train.x), torch.from_numpy(whole.train.y)

    def block(self) -> float:
        """Do a block of steps, and return its seconds; losses are summed, as ours are."""
        self.epoch += 1
        total = 0.0
        start = time.perf_counter()
        for mine in islice(self.batches(), self.steps):
            loss = self.loss(self.call(self.x[mine]), self.y[mine])
            loss.backward()
            self.step()
            total += loss.item()
        return time.perf_counter() - start

    def batches(self) -> Iterator[Any]:
        """Which samples are this rank's, drawn as ours are."""
        import torch

        from mpicoll.train.batches import Batches

        batches = Batches(self.whole, self.comm.size, BATCH * self.comm.size, self.seed, self.epoch)
        for step in range(batches.steps):
            yield torch.from_numpy(batches.share(step, self.comm.rank)[0])

    def step(self) -> None:
        """From the gradient that is there."""
        self.optimizer.step()
        self.optimizer.zero_grad()

    def tensors(self) -> list[np.ndarray]:
        """The parameters, in the order and shapes of ``Ours.tensors``."""
        return [own.detach().numpy().T for own in self.model.parameters()]


class Distributed(Theirs):
    """The model in PyTorch with ``DistributedDataParallel``."""

    def __init__(self, *args: Any, tuned: bool) -> None:
        from torch.nn.parallel import DistributedDataParallel

        super().__init__(*args, tuned=tuned)
        self.call = DistributedDataParallel(self.model, gradient_as_bucket_view=tuned)


class Replicated(Theirs):
    """The model in PyTorch with ``mpicoll.torch``, as its documentation shows."""

    def __init__(self, *args: Any) -> None:
        from mpicoll.torch import Replica

        super().__init__(*args)
        self.replica = Replica(self.model, self.optimizer, self.comm)
        self.step = self.replica.step  # type: ignore[method-assign]

    def batches(self) -> Iterator[Any]:
        """The numbers of this rank's samples in each batch, from the replica."""
        return self.replica.batches(len(self.x), BATCH * self.comm.size, self.epoch, seed=self.seed)


def measure(name: str, seed: int) -> dict:
    """One launch, on all ranks: of each block, seconds of a step on the slowest rank, and the model's loss and accuracy
    on the test set after it, if there is one."""
    from mpi4py import MPI

    from mpicoll.job.blas import limit_threads
    from mpicoll.mpi.launch import library_name
    from mpicoll.train.loop import evaluate

    comm, subject = MPI.COMM_WORLD, SUBJECTS[name]
    dist = gloo(comm)
    limit_threads(comm, 1)
    whole = data(comm, subject, seed)
    ours, alone = (Ours(group, whole, subject, seed) for group in (comm, MPI.COMM_SELF))
    start = [tensor.copy() for tensor in ours.tensors()]
    common = whole, subject, seed, start
    sides: dict[str, Ours | Theirs] = {
        OURS: ours,
        REPLICA: Replicated(comm, *common),
        THEIRS: Distributed(comm, *common, tuned=False),
        TUNED: Distributed(comm, *common, tuned=True),
        ALONE[OURS]: alone,
        ALONE[THEIRS]: Theirs(MPI.COMM_SELF, *common),
        ALONE[TUNED]: Theirs(MPI.COMM_SELF, *common, tuned=True),
    }
    rng = np.random.default_rng(comm.bcast(time.time_ns()))
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    looks: dict[str, list[tuple]] = {side: [] for side in ALONE}

    def take_turns() -> None:
        for side in rng.permutation(list(sides)):
            comm.Barrier()
            seconds[side].append(comm.allreduce(sides[side].block(), MPI.MAX) / subject.steps)
            if side in looks:
                params = np.concatenate([tensor.ravel() for tensor in sides[side].tensors()])
                looks[side].append(evaluate(comm, ours.model, params, whole.test, False))

    take_turns()
    others = [(OURS, side) for side in (REPLICA, THEIRS, TUNED)]
    others += [(ALONE[OURS], ALONE[side]) for side in (THEIRS, TUNED)]
    apart = comm.allreduce(max(_apart(start, sides[one], sides[other]) for one, other in others), MPI.MAX)
    agreeing, waiting, before = ours.training.agreeing, ours.training.waiting, ours.training.seconds
    for _ in range(subject.rounds):
        take_turns()
        if subject.data and all(map(_reached, looks.values())):
            break
    else:
        if subject.data:
            raise RuntimeError(f"an accuracy of {ACCURACY:g} was not reached in {subject.rounds} rounds")
    spent = ours.training.seconds - before
    shares = np.array([ours.training.agreeing - agreeing, ours.training.waiting - waiting]) / spent
    comm.Allreduce(MPI.IN_PLACE, shares)
    dist.destroy_process_group()
    return {
        "rank": comm.rank,
        "subject": name,
        "ranks": comm.size,
        "mpi": library_name(),
        "parameters": ours.model.size,
        "algorithm": ours.training.strategy.algorithm,
        "apart": apart,
        "agreeing": shares[0] / comm.size,
        "waiting": shares[1] / comm.size,
        "seconds": seconds,
        "looks": looks if subject.data else None,
    }


def _apart(start: list[np.ndarray], one: Ours | Theirs, other: Ours | Theirs) -> float:
    """The norm of the difference, as a share of that of the way from where both started.

    Not the largest element: where the input of a ReLU is zero but for rounding, NumPy and PyTorch may disagree on its
    sign, and then one unit's weights go another way with one sample.  In float64 that does not happen, and after 50
    steps on Fashion-MNIST they are 1e-15 apart; in float32 5e-7 or, where it has happened, 1e-2.  Ranks that do not
    agree are more than 0.1 apart.
    """

    def distance(a: list[np.ndarray], b: list[np.ndarray]) -> float:
        return float(np.sqrt(sum(np.sum((x - y) ** 2, dtype=np.float64) for x, y in zip(a, b, strict=True))))

    return distance(one.tensors(), other.tensors()) / distance(one.tensors(), start)


def _reached(looks: list) -> int:
    """After how many blocks the accuracy is that looked for; 0 if it never is."""
    return next((n for n, (_, accuracy) in enumerate(looks, 1) if accuracy >= ACCURACY), 0)


def summarize(launches: list[dict]) -> list[dict]:
    """A row for each subject and number of ranks: of the launches' medians the median, least and most.

    ``ratio`` is their time over ours, within a round; ``agreement`` the share of a step that it takes longer than one
    alone; what ours itself counts as such is ``agreeing``, of which ``waiting`` for other ranks.  The first block, in
    which everything is set up, does not count there.  Until the accuracy is reached it does: ``until`` are those
    seconds, ``sooner`` their multiple of ours in the same launch, ``after`` how many steps it is; and ``curves`` how
    far losses on the test set are from ours, as a share of it: the mean over blocks, of the launches' the largest.
    """
    table = []
    for name, ranks in sorted({(launch["subject"], launch["ranks"]) for launch in launches}):
        runs = [launch for launch in launches if (launch["subject"], launch["ranks"]) == (name, ranks)]
        times = [{side: np.array(found[1:]) for side, found in run["seconds"].items()} for run in runs]
        row: dict[str, Any] = {"subject": name, "ranks": ranks, "parameters": runs[0]["parameters"]}
        row |= {"algorithm": runs[0]["algorithm"], "apart": max(run["apart"] for run in runs)}
        row |= {what: spread([run[what] for run in runs]) for what in ("agreeing", "waiting")}
        row["ms"] = {side: spread([float(np.median(one[side])) * 1e3 for one in times]) for side in times[0]}
        for what, first, second in (("ratio", ALONE, OURS), ("alone", ALONE.values(), ALONE[OURS])):
            row[what] = {side: spread([float(np.median(one[side] / one[second])) for one in times]) for side in first}
        row["agreement"] = {
            side: spread([float(np.median(1 - one[alone] / one[side])) for one in times])
            for side, alone in ALONE.items()
        }
        if runs[0]["looks"]:
            row |= _until(runs)
        table.append(row)
    return table


def _until(runs: list[dict]) -> dict:
    """The part of ``summarize`` that is about losses and accuracies; with the curves of the first launch."""
    steps = SUBJECTS[runs[0]["subject"]].steps
    row: dict[str, Any] = {}
    blocks = [{side: _reached(looks) for side, looks in run["looks"].items()} for run in runs]
    clocks = [{side: np.cumsum(run["seconds"][side]) * steps for side in ALONE} for run in runs]
    until = [
        {side: float(clock[side][one[side] - 1]) for side in ALONE} for clock, one in zip(clocks, blocks, strict=True)
    ]
    row["until"] = {side: spread([one[side] for one in until]) for side in ALONE}
    row["sooner"] = {side: spread([one[side] / one[OURS] for one in until]) for side in ALONE}
    row["after"] = {side: spread([one[side] * steps for one in blocks]) for side in ALONE}
    losses = [{side: np.array(looks)[:, 0] for side, looks in run["looks"].items()} for run in runs]
    row["curves"] = {side: max(float(np.mean(abs(of[side] / of[OURS] - 1))) for of in losses) for side in ALONE}
    row["first"] = {
        side: {"seconds": np.round(clocks[0][side], 3).tolist(), "accuracy": [look[1] for look in looks]}
        for side, looks in runs[0]["looks"].items()
    }
    return row


def show(record: dict) -> None:
    """The tables, as Markdown."""
    m = record["machine"]
    print(f"{record['mpi']}, torch {m['torch']}, mpi4py {m['mpi4py']}, NumPy {m['numpy']}, Python {m['python']}")
    print(f"{m['cpu']}, {m['cores']} cores; mpicoll {m['mpicoll']}, {m['date']}; {record['launches']} launches")
    for row in record["table"]:
        crowded = ", more than cores" if row["ranks"] > m["cores"] else ""
        print(f"\n{row['subject']}: a perceptron of {row['parameters']} parameters, {BATCH} samples a rank and step\n")
        until = f" s to {ACCURACY:.0%} | to that, ours = 1 | steps to that |" if "until" in row else ""
        print(f"| {row['ranks']} ranks{crowded} | ms a step | time, ours = 1 | alone, ours = 1 | agreement |{until}")
        print("|---|---|---|---|---|" + "---|---|---|" * bool(until))
        for name, alone in ALONE.items():
            values = [row["ms"][name], row["ratio"][name], row["alone"][alone]]
            cells = ["{:.2f} ({:.2f} to {:.2f})".format(*one) for one in values] + [_percent(row["agreement"][name])]
            if until:
                cells += ["{:.2f} ({:.2f} to {:.2f})".format(*row[what][name]) for what in ("until", "sooner")]
                cells.append("{:.0f} ({:.0f} to {:.0f})".format(*row["after"][name]))
            print(f"| {name} | {' | '.join(cells)} |")
        said = f"agreeing {_percent(row['agreeing'])} of the time, of which waiting {_percent(row['waiting'])}"
        print(f"\n{OURS} by {row['algorithm']}, by its own account {said}; parameters apart: {row['apart']:.1e}")
        if until:
            print(f"Test losses are {max(row['curves'].values()):.1%} apart, in the mean over blocks.")


def _percent(spread: list[float]) -> str:
    return "{:.0%} ({:.0%} to {:.0%})".format(*spread)


def draw(record: dict, path: Path) -> None:
    """Time of a step beside ours, of each subject; and accuracy against seconds in the first launch."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    bars, curves = figure.subplots(1, 2)
    rows = [row for row in record["table"] if row["ranks"] == record["table"][0]["ranks"]]
    for n, row in enumerate(rows):
        for k, (name, color) in enumerate(COLORS.items()):
            middle, low, high = row["ratio"][name]
            at = n + (k - 1.5) * 0.2
            bars.bar(at, middle, 0.18, color=color, yerr=[[middle - low], [high - middle]], ecolor="#444444")
            bars.annotate(
                f"{row['ms'][name][0]:.1f}", (at, 0), (0, 4), textcoords="offset points", ha="center", color="w"
            )
        for name, found in row.get("first", {}).items():
            curves.plot(found["seconds"], found["accuracy"], color=COLORS[name], lw=1.6, label=name)
    bars.set_xticks(range(len(rows)), [f"{row['subject']}\n{row['parameters']:,} parameters" for row in rows])
    bars.set_ylabel("time of a step, mpicoll sync = 1")
    bars.set_title("milliseconds a step", fontsize=11)
    curves.axhline(ACCURACY, color="black", lw=1, ls=":")
    curves.set(xlabel="seconds", ylim=(0.8, None), title="accuracy on the test set of Fashion-MNIST")
    curves.title.set_fontsize(11)
    curves.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    curves.legend(frameon=False, loc="lower right")
    for axis in (bars, curves):
        axis.grid(alpha=0.25, lw=0.6, axis="y" if axis is bars else "both")
        axis.spines[["top", "right"]].set_visible(False)
    m = record["machine"]
    figure.suptitle(f"Training in step, {rows[0]['ranks']} ranks of one thread on {m['cores']} cores ({m['cpu']})")
    figure.savefig(path, dpi=110)


def main() -> None:
    """Launch, collect, record, draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=RANKS)
    parser.add_argument("--launches", type=int, default=LAUNCHES)
    parser.add_argument("--subject", help=argparse.SUPPRESS)  # of a worker
    parser.add_argument("--seed", type=int, help=argparse.SUPPRESS)
    args = command(
        parser,
        lambda: measure(parser.parse_args().subject, parser.parse_args().seed),
        show,
        partial(draw, path=PICTURE),
    )
    if args is None:
        return
    data = [subject.data for subject in SUBJECTS.values() if subject.data]
    look_first(*MODULES, data=data, out=[PICTURE])
    launches: list[dict] = []
    with measuring(launches) as ended:
        for seed in range(args.launches):
            for ranks in args.ranks:
                for name in SUBJECTS:
                    print(f"launch {seed + 1} of {args.launches}, {ranks} ranks: {name}", file=sys.stderr, flush=True)
                    launches.append(launched(__file__, ranks, "--subject", name, "--seed", str(seed)))
    mpi = launches[0]["mpi"]

    def record() -> dict:
        return {"mpi": mpi, "machine": machine(), "launches": args.launches, "table": summarize(launches)}

    finish(f"pytorch-{library(mpi)}", launches, ended, record, show, partial(draw, path=PICTURE))
    table = summarize(launches)
    apart = max(row["apart"] for row in table)
    if not apart < CLOSE:
        sys.exit(f"parameters are {apart:.1e} apart after a block of steps: not the same training")
    curves = max((max(row["curves"].values()) for row in table if "curves" in row), default=0.0)
    if not curves < ALIKE:
        sys.exit(f"losses on the test set are {curves:.1%} apart: not the same training")


if __name__ == "__main__":
    main()
