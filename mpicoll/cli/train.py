"""``mpicoll train``: the command that trains a model, its options and what it prints."""

import math
import os
import re
import signal
import sys
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

import click

from ..algorithms import ALGORITHMS
from ..errors import UserError, listed
from ..files import to_json
from ..mpi.launch import launched_rank, launched_ranks, world
from ..mpi.record import named
from ..pipeline import PIPELINES
from ..train.models import MODELS
from ..train.optimizers import OPTIMIZERS, SCHEDULES
from ..train.settings import DEVICES, DTYPES, LARGE, LEAST, MOMENTA, Settings, flag, read_settings
from ..train.strategies import STRATEGIES
from ..train.strategies.average import OUTER
from ..tuning.rules import GPU_PATHS, NATIVE

if TYPE_CHECKING:
    from ..train.loop import Epoch

LINES = 10  # at most about this many lines of progress where there is no terminal
ROWS = 8  # with more ranks, the table at the end shows the slowest and the fastest only


class _Number(click.FloatRange):
    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = click.FLOAT.convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return super().convert(number, param, ctx)


class _Widths(click.ParamType):
    name = "widths"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        text = str(value)
        if not re.fullmatch(r"[1-9]\d{0,5}(,[1-9]\d{0,5})*", text):
            self.fail(f"{text!r} is not a list of widths like 256 or 256,128.", param, ctx)
        return text


class _Layers(click.ParamType):
    name = "layers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        text = str(value)
        if not re.fullmatch(r"\d{1,6}(,\d{1,6})*", text, re.ASCII):
            self.fail(f"{text!r} is not a list of layers like 1 or 1,3.", param, ctx)
        return text


def _whole(name: str) -> click.IntRange:
    return click.IntRange(LEAST[name], LARGE - 1)


_OPTIONS: dict[str, dict[str, tuple[Any, str]]] = {
    "What is learned": {
        "data": (
            str,
            "digits (handwritten, from scikit-learn), fashion-mnist, powerlaw[:SAMPLESxFEATURES], an .npz, .csv or "
            "LIBSVM file, or a folder of .npy or IDX files.",
        ),
        "test": (str, "Test set, a file of the same kind [default: the data's own, else a share of the samples]."),
        "test_share": (
            _Number(0, 1, max_open=True),
            "Share of the samples to hold out for testing [default: 0.2].",
        ),
        "validation": (_Number(0, 1, max_open=True), "Share of the training samples to hold out for validation."),
        "shards": (bool, "Each rank reads and keeps its own part of the data instead of all of it."),
        "model": (click.Choice(list(MODELS)), "Model."),
        "hidden": (_Widths(), "mlp: widths of the hidden layers, for example 256,128 [default: 256]."),
    },
    "How the model is split": {
        "grid": (
            str,
            "Grid of ranks, for example data=2,pipe=2,tensor=2: data splits each batch, pipe splits the model into "
            "stages, tensor splits each layer [default: all ranks along data].",
        ),
        "cut": (
            _Layers(),
            "pipe: first layer of each stage after the first, for example 1,3 [default: stages of about equal cost].",
        ),
        "micro": (_whole("micro"), "pipe: micro-batches per batch [default: the number of stages]."),
        "pipeline": (click.Choice(list(PIPELINES)), "pipe: schedule of the stages' tasks [default: 1f1b]."),
        "recompute": (bool, "pipe: store only the inputs of a stage, and recompute its activations when needed."),
    },
    "Strategy": {
        "strategy": (
            click.Choice(list(STRATEGIES)),
            "How ranks combine their work: gradients in every step (sync); models every few steps (average); models "
            "in every step with one or a few peers (butterfly, gossip); with one peer, asynchronously (ad-psgd); "
            "gradients through a parameter server with bounded staleness (async).",
        ),
        "algorithm": (
            click.Choice(["auto", *ALGORITHMS["allreduce"], NATIVE, *GPU_PATHS]),
            "Allreduce algorithm; auto sums in the canonical order. The last four are for --device gpu.",
        ),
        "balance": (
            str,
            "Shares of each batch: auto (by measured speed), or a weight for each rank, for example 2,1,1 "
            "[default: equal shares].",
        ),
        "every": (_whole("every"), "average: steps between two averages of the models [default: 8]."),
        "sync_epochs": (_whole("sync_epochs"), "average: number of synchronous epochs at the start [default: 0]."),
        "outer": (click.Choice(list(OUTER)), "average: outer optimizer, which applies the mean [default: mean]."),
        "outer_lr": (
            _Number(min=0, min_open=True),
            "average: learning rate of the outer optimizer [default: depends on --outer].",
        ),
        "outer_momentum": (
            _Number(0, 1, max_open=True),
            "average: momentum of the outer optimizer [default: depends on --outer].",
        ),
        "graph": (
            str,
            "gossip, ad-psgd: graph that mpicoll show gossip lists, or an .npy file of mixing matrices "
            "[default: exponential for gossip, complete for ad-psgd].",
        ),
        "mix_first": (bool, "gossip: mix before the optimizer's step, not after it."),
        "momenta": (
            click.Choice(MOMENTA),
            "average, butterfly, gossip: optimizer state when models are combined: keep each rank's own, average it, "
            "or reset it (average only) [default: keep].",
        ),
        "compress": (
            str,
            "All but ad-psgd: compress what is sent, with error feedback: 16bit, sign, topk:0.01 (the largest 1 % of "
            "the elements), or, for sync and average, powersgd:2 (matrices of rank 2) [default: no compression].",
        ),
    },
    "Asynchronous strategies": {
        "staleness": (
            str,
            "async: number of steps that one rank may be ahead of another; inf for no bound [default: 4].",
        ),
        "backups": (
            _whole("backups"),
            "async, --staleness 0: number of slowest gradients that a step does not wait for [default: 0].",
        ),
        "compensate": (
            _Number(min=0),
            "async: factor of the delay compensation of stale gradients (DC-ASGD) [default: 0].",
        ),
        "slow_down": (bool, "async: divide the learning rate of a gradient by 1 + its staleness."),
        "delays": (
            _whole("delays"),
            "async, ad-psgd: seed of a reproducible simulation, in which delays are drawn at random.",
        ),
        "workers": (
            _whole("workers"),
            "async, --delays: number of simulated workers [default: the number of ranks].",
        ),
    },
    "Optimizer": {
        "optimizer": (click.Choice(list(OPTIMIZERS)), "Optimizer."),
        "lr": (_Number(min=0, min_open=True), "Learning rate."),
        "momentum": (
            _Number(0, 1, max_open=True),
            "Momentum of sgd, nesterov and rmsprop; beta1 of adam and adamw.",
        ),
        "beta2": (
            _Number(0, 1, max_open=True),
            "Decay of the mean squared gradient in rmsprop, adam and adamw.",
        ),
        "weight_decay": (_Number(min=0), "Weight decay, a factor of the learning rate."),
        "clip": (_Number(min=0, min_open=True), "Clip gradients to this L2 norm [default: off]."),
        "schedule": (click.Choice(list(SCHEDULES)), "Learning-rate schedule over the whole run."),
        "warmup": (_whole("warmup"), "Steps in which the learning rate grows linearly to its full value."),
    },
    "Length of the run, and the rest": {
        "epochs": (_whole("epochs"), "Passes over the training set."),
        "batch_size": (_whole("batch_size"), "Samples per step, on all ranks together."),
        "patience": (
            _whole("patience"),
            "Stop after this many epochs without a better validation loss, and keep the best model.",
        ),
        "checkpoint": (_whole("checkpoint"), "Epochs between checkpoints; 0 for no checkpoints."),
        "seed": (_whole("seed"), "Seed of the initial parameters, the order of samples, and the sets held out."),
        "dtype": (click.Choice(DTYPES), "Type of parameters and data."),
        "device": (click.Choice(DEVICES), "Device that holds parameters and data and computes; gpu needs CuPy."),
        "threads": (click.IntRange(1, 4096), "BLAS threads per rank [default: its share of the node's cores]."),
        "out": (str, "New folder for the model and the metrics [default: one under runs/]."),
    },
}


def _with_options(command: Any) -> Any:
    """Add an option for each field of ``Settings`` to a command."""
    described = {name: option for group in _OPTIONS.values() for name, option in group.items()}
    for field in reversed(fields(Settings)):
        kind, text = described[field.name]
        named = flag(field.name)
        named += f"/--no-{named[2:]}" if kind is bool else ""
        shown = field.default not in (None, False)
        command = click.option(named, type=kind, default=field.default, show_default=shown, help=text)(command)
    return command


class _Grouped(click.Command):
    """A command whose help lists options in groups."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        records = {param.name: param.get_help_record(ctx) for param in self.get_params(ctx)}
        groups = {title: [records.pop(name) for name in group] for title, group in _OPTIONS.items()}
        for title, group in [*groups.items(), ("Running it", list(records.values()))]:
            with formatter.section(title):
                formatter.write_dl([record for record in group if record])


def _configure(ctx: click.Context, param: click.Parameter, value: Path | None) -> Path | None:
    """Make the settings of a file, or of the run to resume, the defaults; options and the environment override them."""
    if value is None:
        return None
    if ctx.default_map:
        raise UserError("--config and --resume exclude each other: a resumed run keeps its settings")
    if param.name == "resume":
        run = value if (value / "config.toml").exists() else value.resolve().parent.parent
        if not (run / "config.toml").exists():
            raise UserError(f"{str(value)!r} holds no run: --resume takes the folder that mpicoll train wrote")
        ctx.default_map = read_settings(run / "config.toml")
    else:
        ctx.default_map = read_settings(value)
    return value


@click.command(cls=_Grouped)
@_with_options
@click.option(
    "--config",
    type=click.Path(path_type=Path),
    is_eager=True,
    callback=_configure,
    expose_value=False,
    envvar="MPICOLL_TRAIN_CONFIG",
    help="TOML file with any of the options above, for example epochs = 5.",
)
@click.option(
    "--resume",
    type=click.Path(path_type=Path),
    is_eager=True,
    callback=_configure,
    envvar="MPICOLL_TRAIN_RESUME",
    help="Folder of a run to continue from its latest checkpoint, or of the checkpoint to continue from.",
)
@click.option(
    "--json", "as_json", is_flag=True, envvar="MPICOLL_TRAIN_JSON", help="End with the summary as one line of JSON."
)
@click.option(
    "--timeout",
    type=_Number(min=0),
    default=600,
    show_default=True,
    envvar=["MPICOLL_TRAIN_TIMEOUT", "MPICOLL_TIMEOUT"],
    help="Seconds that a collective may wait for other ranks before the job is ended; 0 for no limit.",
)
@click.option(
    "--report",
    type=click.Path(path_type=Path, file_okay=False),
    envvar=["MPICOLL_TRAIN_REPORT", "MPICOLL_REPORT"],
    help="Folder for the stacks and the last calls of every rank if the job is ended; mpicoll report compares them.",
)
def train(resume: Path | None, as_json: bool, timeout: float, report: Path | None, **options: Any) -> None:
    """Train a model on all ranks: mpirun -n 4 mpicoll train"""
    settings = Settings(**options)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until ends_job: a rank inside MPI's start-up runs no Python handler
    comm = world()  # before anything imports MPI, which would start it
    from ..job.guard import ends_job
    from ..mpi.comm import Comm
    from ..train.run import run

    progress = _Progress(settings)
    if launched_ranks() == 0:
        _say("one rank: use more with mpirun -n N mpicoll train")
    with ends_job(comm, timeout, report, progress.advice):
        summary = run(Comm(comm), settings, resume, progress.start, progress.open, progress.epoch)
    progress.finish(summary)
    if as_json:
        _say(to_json(summary))


def _say(line: str, nl: bool = True) -> None:
    """Print a line.  If nobody reads the output any more, training continues without it."""
    try:
        click.echo(line, nl=nl)
    except OSError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (for good: what could not be written is still in the buffer)


class _Progress:
    """What ``mpicoll train`` prints: a bar on a terminal, plain lines elsewhere, and a summary at the end."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        # Launchers pass lines on, not cursor movements; Open MPI's gives ranks a terminal of its own all the same.
        self._bar_fits = sys.stdout.isatty() and launched_ranks() == 0
        self._bar: Any = None
        self._kept: Epoch | None = None  # the latest epoch, if it was not shown
        self._folder: Path | None = None
        self._first = 0
        self._columns: dict[str, tuple[str, str]] = {
            "epoch": ("epoch", "7d"),
            "step": ("step", "7d"),
            "train_loss": ("loss", "8.4f"),
            "train_accuracy": ("accuracy", "9.2%"),
            "samples_per_s": ("samples/s", "10.0f"),
            "communicating": ("comm.", "6.0%"),
        }
        if settings.validation:
            self._columns |= {
                "validation_loss": ("valid. loss", "12.4f"),
                "validation_accuracy": ("valid. acc.", "12.2%"),
            }
        if settings.strategy == "async":
            self._columns |= {"staleness": ("stale", "6.2f")}
        elif settings.strategy != "sync":
            self._columns |= {"consensus": ("consensus", "9.2g")}

    def start(self, facts: dict[str, Any]) -> None:
        s = self._settings
        threads = f", {facts['threads_per_rank']} BLAS thread(s) a rank" if facts["threads_per_rank"] else ""
        _say(f"{s.model} on {s.data}, {facts['ranks']} rank(s), {s.strategy} strategy, {facts['mpi']}{threads}")
        validation = f", {facts['validation_samples']} validation" if facts["validation_samples"] else ""
        _say(
            f"{facts['train_samples']} training{validation} and {facts['test_samples']} test samples, "
            f"{facts['features']} features, {facts['classes']} classes, {facts['parameters']} parameters ({s.dtype})"
        )
        if facts["layout"]:
            _say(facts["layout"])
        if facts["untrained"]:
            _say(f"no training sample of the class(es) {listed(facts['untrained'])}: they cannot be learnt")
        if facts["grid"]:
            held = facts["parameters_held"]
            _say(f"grid {facts['grid']}: {min(held)} to {max(held)} parameters a rank")
        if facts["gpu"]:
            _say("; ".join(f"{named(gpu['ranks'])} on {gpu['name']}" for gpu in facts["gpu"]))
            for gpu in facts["gpu"]:
                if len(gpu["ranks"]) > 1 and launched_rank() == 0:
                    shared = f"{named(gpu['ranks'])} share {gpu['name']}: more ranks than GPUs here; they take turns"
                    click.echo(f"mpicoll: {shared}", err=True)
        if "resumed" in facts:
            resumed = facts["resumed"]
            self._first = resumed["epoch"]
            _say(f"resumed from {resumed['from']}: epoch {resumed['epoch']}, step {resumed['step']}")
            for change in facts["changed"]:
                _say(f"  not as before, and bits may differ: {change}")
        for line in facts["assumed"] if launched_rank() == 0 else ():
            click.echo(f"mpicoll: {line}", err=True)
        if self._bar_fits:
            from tqdm import tqdm

            self._bar = tqdm(total=s.epochs, initial=self._first, unit="epoch", leave=False)

    def open(self, folder: Path) -> None:
        """Print the run's folder, and how to resume from it: a job that is killed cannot do so at its end."""
        self._folder = folder
        resume = f"; if it is killed: mpicoll train --resume {quote(str(folder))}" if self._settings.checkpoint else ""
        told = f"writes to {folder}{resume}"
        if self._bar is not None:
            with suppress(OSError):
                self._bar.write(told)
        else:
            _say(told)
            _say(" ".join(f"{head:>{self._width(spec)}}" for head, spec in self._columns.values()))

    def advice(self) -> str:
        """Return how to resume if the job ends now, as the end of a line."""
        from ..train.checkpoint import going_on

        return going_on(self._folder) if self._folder else ""

    @staticmethod
    def _width(spec: str) -> str:
        return spec.partition(".")[0].rstrip("d")

    def epoch(self, epoch: "Epoch") -> None:
        if self._bar is not None:
            self._bar.set_postfix(loss=f"{epoch.train_loss:.4f}", accuracy=f"{epoch.train_accuracy:.2%}", refresh=False)
            self._bar.update()
        elif (
            epoch.epoch in (self._first + 1, self._settings.epochs)
            or epoch.epoch % -(-self._settings.epochs // LINES) == 0
        ):
            self._line(epoch)
        else:
            self._kept = epoch

    def _line(self, epoch: "Epoch") -> None:
        self._kept = None
        shown = epoch._asdict() | {"staleness": _mean(epoch.staleness or [1])}
        _say(" ".join(format(shown[name] or 0, spec) for name, (_, spec) in self._columns.items()))

    def finish(self, summary: dict[str, Any]) -> None:
        if self._bar is not None:
            self._bar.close()
        elif self._kept is not None:  # patience has ended the run
            self._line(self._kept)
        accuracy, best = summary["test_accuracy"], summary["best_epoch"]
        rows = {}
        if summary["epochs_done"] < summary["epochs"]:
            rows["stopped early"] = f"no better validation loss in {summary['patience']} epoch(s)"
        rows |= {
            "test accuracy": "no test samples" if accuracy is None else f"{accuracy:.2%} of {summary['test_samples']}",
            "training loss": f"{summary['train_loss']:.4f}, accuracy {summary['train_accuracy']:.2%} (last epoch)",
            "steps": f"{summary['steps']} in {summary['seconds']:.2f} s, {summary['steps_per_s']:.0f} a second"
            + ("" if best is None else f"; the model is that of epoch {best}"),
            "agreement": f"{summary['algorithm']}, {summary['comm_fraction']:.0%} of the time"
            + (f"; ranks were {summary['consensus']:.2g} apart" if summary["consensus"] is not None else ""),
        }
        if summary["not_finite"]:
            rows["not finite"] = f"{', '.join(summary['not_finite'])}: infinite or nan, and null in summary.json"
        _say("".join(f"{name:>14}  {value}\n" for name, value in rows.items()), nl=False)
        _say("\n".join(_table(summary["per_rank"])))
        _say(f"{'written to':>14}  {summary['out']}")


def _mean(histogram: list[int]) -> float:
    return sum(n * count for n, count in enumerate(histogram)) / sum(histogram)


def _table(ranks: list[dict[str, Any]]) -> list[str]:
    """The lines of a table with a row for each rank or, if there are many ranks, for the slowest and the fastest."""
    rows = list(enumerate(ranks))
    slowest = min(rows, key=lambda row: row[1]["waiting"])[0]
    if len(rows) > ROWS:
        fastest = max(rows, key=lambda row: row[1]["waiting"])[0]
        rows = [(rank, ranks[rank]) for rank in sorted({slowest, fastest})]
    lines = [f"{'rank':>14}  {'sent':>10} {'messages':>9} {'computing':>9} {'transfer':>8} {'waiting':>8}"]
    for rank, row in rows:
        sent = "unknown" if row["bytes_sent"] is None else f"{row['bytes_sent'] / 1e6:.1f} MB"
        messages = "unknown" if row["messages"] is None else str(row["messages"])
        seconds = row["seconds"] or 1.0
        shares = [(row["seconds"] - row["agreeing"]), (row["agreeing"] - row["waiting"]), row["waiting"]]
        computing, transfer, waiting = (f"{share / seconds:.0%}" for share in shares)
        note = "  the slowest" if rank == slowest and len(ranks) > 1 else ""
        lines.append(f"{rank:>14}  {sent:>10} {messages:>9} {computing:>9} {transfer:>8} {waiting:>8}{note}")
    return lines
