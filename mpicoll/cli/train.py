"""``mpicoll train``: the main job."""

import json
import math
import signal
import sys
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..algorithms import ALGORITHMS
from ..mpi.launch import launched_ranks, world
from ..train.models import MODELS
from ..train.settings import Settings
from ..train.strategies import STRATEGIES

if TYPE_CHECKING:
    from ..train.loop import Epoch

LINES = 10  # of progress where there is no terminal


class _Number(click.FloatRange):
    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = click.FLOAT.convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return super().convert(number, param, ctx)


_OPTIONS: dict[str, tuple[Any, str]] = {
    "data": (str, "'digits' (handwritten, from scikit-learn), or an .npz file with X and y (classes 0, 1, ...)."),
    "model": (click.Choice(list(MODELS)), "What to train."),
    "strategy": (click.Choice(list(STRATEGIES)), "How ranks agree."),
    "algorithm": (
        click.Choice(["auto", *ALGORITHMS["allreduce"], "native"]),
        "The allreduce that adds up gradients; auto adds in the canonical order.",
    ),
    "epochs": (click.IntRange(min=1), "Passes over the training set."),
    "batch_size": (click.IntRange(min=1), "Samples a step, of all ranks together."),
    "lr": (_Number(min=0, min_open=True), "Learning rate."),
    "momentum": (_Number(0, 1, max_open=True), "Of SGD (heavy ball)."),
    "seed": (click.IntRange(min=0), "Of the initial parameters and the order of samples."),
    "dtype": (click.Choice(["float32", "float64"]), "Of parameters and data."),
    "threads": (click.IntRange(1, 4096), "BLAS threads a rank [default: its share of the node's cores]."),
    "out": (str, "New folder for model and metrics [default: one under runs/]."),
}


def _with_options(command: Any) -> Any:
    """An option for each field of ``Settings``."""
    for field in reversed(fields(Settings)):
        kind, text = _OPTIONS[field.name]
        shown = field.default is not None
        flag = "--" + field.name.replace("_", "-")
        command = click.option(flag, type=kind, default=field.default, show_default=shown, help=text)(command)
    return command


@click.command()
@_with_options
@click.option(
    "--json", "as_json", is_flag=True, envvar="MPICOLL_TRAIN_JSON", help="End with the summary as one line of JSON."
)
@click.option(
    "--timeout",
    type=click.FloatRange(min=0),
    default=600,
    show_default=True,
    envvar=["MPICOLL_TRAIN_TIMEOUT", "MPICOLL_TIMEOUT"],
    help="Seconds that a rank may wait for the others in a collective; 0 for no limit.",
)
@click.option(
    "--report",
    type=click.Path(path_type=Path, file_okay=False),
    envvar=["MPICOLL_TRAIN_REPORT", "MPICOLL_REPORT"],
    help="Where to leave stacks and calls if the job is ended for that: see mpicoll report.",
)
def train(as_json: bool, timeout: float, report: Path | None, **options: Any) -> None:
    """Train a model on all ranks: mpirun -n 4 mpicoll train"""
    settings = Settings(**options)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until ends_job: a rank inside MPI's start-up runs no Python handler
    comm = world()  # before anything imports MPI, which would start it
    from ..mpi.comm import Comm
    from ..mpi.guard import ends_job
    from ..train.run import run

    progress = _Progress(settings)
    if launched_ranks() == 0:
        _say("one rank: use more with mpirun -n N mpicoll train")
    with ends_job(comm, timeout, report):
        summary = run(Comm(comm), settings, progress.start, progress.epoch)
    progress.finish(summary)
    if as_json:
        _say(json.dumps(summary))


def _say(line: str, nl: bool = True) -> None:
    """Print, unless nobody reads any more: training goes on, and its files are what counts."""
    with suppress(OSError):
        click.echo(line, nl=nl)


class _Progress:
    """A bar on a terminal, plain lines elsewhere; then the account."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        # Launchers pass lines on, not cursor movements; Open MPI's gives ranks a terminal of its own all the same.
        self._bar_fits = sys.stdout.isatty() and launched_ranks() == 0
        self._bar: Any = None

    def start(self, facts: dict[str, Any]) -> None:
        s = self._settings
        threads = f", {facts['threads_per_rank']} BLAS thread(s) a rank" if facts["threads_per_rank"] else ""
        _say(f"{s.model} on {s.data}, {facts['ranks']} rank(s), {s.strategy} strategy, {facts['mpi']}{threads}")
        _say(
            f"{facts['train_samples']} training and {facts['test_samples']} test samples, "
            f"{facts['features']} features, {facts['classes']} classes, {facts['parameters']} parameters ({s.dtype})"
        )
        if self._bar_fits:
            from tqdm import tqdm

            self._bar = tqdm(total=s.epochs, unit="epoch", leave=False)
        else:
            _say(f"{'epoch':>7} {'step':>7} {'loss':>8} {'accuracy':>9} {'steps/s':>8}")

    def epoch(self, epoch: "Epoch") -> None:
        if self._bar is not None:
            self._bar.set_postfix(loss=f"{epoch.train_loss:.4f}", accuracy=f"{epoch.train_accuracy:.2%}", refresh=False)
            self._bar.update()
        elif epoch.epoch in (1, self._settings.epochs) or epoch.epoch % -(-self._settings.epochs // LINES) == 0:
            _say(
                f"{epoch.epoch:7} {epoch.step:7} {epoch.train_loss:8.4f} {epoch.train_accuracy:9.2%} "
                f"{epoch.step / epoch.seconds:8.0f}"
            )

    def finish(self, summary: dict[str, Any]) -> None:
        if self._bar is not None:
            self._bar.close()
        accuracy, sent = summary["test_accuracy"], summary["bytes_sent_per_rank"]
        agreeing, waiting = summary["comm_fraction"], summary["wait_fraction"]
        sent_text = "unknown (sent by the MPI library)" if sent is None else f"{sent / 1e6:.1f} MB"
        rows = {
            "test accuracy": "no test samples" if accuracy is None else f"{accuracy:.2%} of {summary['test_samples']}",
            "training loss": f"{summary['train_loss']:.4f}, accuracy {summary['train_accuracy']:.2%} (last epoch)",
            "steps": f"{summary['steps']} in {summary['seconds']:.2f} s, {summary['steps_per_s']:.0f} a second",
            "sent per rank": f"{sent_text}, by {summary['algorithm']} allreduce",
            "communicating": f"{agreeing:.0%} of the time, {waiting:.0%} waiting for others",
            "written to": summary["out"],
        }
        _say("".join(f"{name:>14}  {value}\n" for name, value in rows.items()), nl=False)
