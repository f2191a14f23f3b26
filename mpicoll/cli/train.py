"""``mpicoll train``: the main job."""

import math
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

LINES = 10  # of progress where there is no terminal
ROWS = 8  # of ranks, in the account


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
        "test": (str, "A test set of the same kind [default: the data's own, else a share of the samples]."),
        "test_share": (
            _Number(0, 1, max_open=True),
            "The share of the samples to hold out for testing [default: 0.2].",
        ),
        "validation": (_Number(0, 1, max_open=True), "Share of the training samples to hold out for validation."),
        "shards": (bool, "Every rank reads and keeps a part of the data, instead of all."),
        "model": (click.Choice(list(MODELS)), "What to train."),
        "hidden": (_Widths(), "mlp: widths of the hidden layers, as 256,128 [default: 256]."),
    },
    "How the model is split": {
        "grid": (
            str,
            "Ranks as a grid, as data=2,pipe=2,tensor=2: shares of each batch, stages of layers, and shards of layers "
            "[default: all data].",
        ),
        "cut": (_Layers(), "pipe: the first layer of each stage but the first, as 1,3 [default: as even as can be]."),
        "micro": (
            _whole("micro"),
            "pipe: into how many parts a group's share of a batch is cut [default: as there are stages].",
        ),
        "pipeline": (click.Choice(list(PIPELINES)), "pipe: the order of their tasks [default: 1f1b]."),
        "recompute": (bool, "pipe: stages keep their inputs only, and compute the rest again when they need it."),
    },
    "How ranks agree": {
        "strategy": (
            click.Choice(list(STRATEGIES)),
            "On gradients in every step (sync), on a mean of models now and then (average), in every step with one "
            "peer or a few (butterfly, gossip), with one and without waiting for others (ad-psgd), or by a parameter "
            "server that does not wait for all (async).",
        ),
        "algorithm": (
            click.Choice(["auto", *ALGORITHMS["allreduce"], NATIVE, *GPU_PATHS]),
            "The allreduce that adds up; auto adds in the canonical order. The last four are for --device gpu.",
        ),
        "balance": (
            str,
            "Shares of each batch: auto, by measured speed, or a weight for each rank, as 2,1,1 [default: even].",
        ),
        "every": (_whole("every"), "average: steps from one mean to the next [default: 8]."),
        "sync_epochs": (
            _whole("sync_epochs"),
            "average: epochs to be synchronous first [default: 0].",
        ),
        "outer": (click.Choice(list(OUTER)), "average: what becomes of the mean [default: mean]."),
        "outer_lr": (_Number(min=0, min_open=True), "average: how far towards the mean [default: as --outer has it]."),
        "outer_momentum": (
            _Number(0, 1, max_open=True),
            "average: momentum of the mean [default: as --outer has it].",
        ),
        "graph": (
            str,
            "gossip, ad-psgd: of mpicoll show gossip, or an .npy file of matrices [default: exponential; complete].",
        ),
        "mix_first": (bool, "gossip: before the optimizer's step, not after it."),
        "momenta": (
            click.Choice(MOMENTA),
            "average, butterfly, gossip: what becomes of the optimizer's state at an agreement [default: keep].",
        ),
        "compress": (
            str,
            "All but ad-psgd: send less, and the rest later: 16bit, sign, topk:0.01 (of all elements the largest, such "
            "a share) or, sync and average only, powersgd:2 (matrices as a product, of that rank) [default: all].",
        ),
    },
    "How far ranks may run apart": {
        "staleness": (str, "async: steps, at most, of one rank before another; inf for any number [default: 4]."),
        "backups": (
            _whole("backups"),
            "async, --staleness 0: gradients of a step that need not be waited for [default: 0].",
        ),
        "compensate": (_Number(min=0), "async: correct stale gradients by so much, as DC-ASGD does [default: 0]."),
        "slow_down": (bool, "async: the staler a gradient, the smaller its learning rate."),
        "delays": (
            _whole("delays"),
            "async, ad-psgd: simulate, with delays drawn from this seed, to have the same run again.",
        ),
        "workers": (_whole("workers"), "async, --delays: so many [default: as there are ranks]."),
    },
    "How a rank steps": {
        "optimizer": (click.Choice(list(OPTIMIZERS)), "The rule."),
        "lr": (_Number(min=0, min_open=True), "Learning rate."),
        "momentum": (_Number(0, 1, max_open=True), "Of sgd, nesterov and rmsprop; the first beta of adam and adamw."),
        "beta2": (_Number(0, 1, max_open=True), "Of rmsprop, adam and adamw: how slowly squares are forgotten."),
        "weight_decay": (_Number(min=0), "Shrinks parameters by this times the learning rate in every step."),
        "clip": (_Number(min=0, min_open=True), "Longest gradient, by its Euclidean norm [default: any]."),
        "schedule": (click.Choice(list(SCHEDULES)), "Of the learning rate, over the whole run."),
        "warmup": (_whole("warmup"), "Steps in which the learning rate grows to its full value."),
    },
    "For how long, and what else": {
        "epochs": (_whole("epochs"), "Passes over the training set."),
        "batch_size": (_whole("batch_size"), "Samples a step, of all ranks together."),
        "patience": (
            _whole("patience"),
            "Stop after so many epochs without a better validation loss, and take the best model.",
        ),
        "checkpoint": (_whole("checkpoint"), "Epochs from one checkpoint to the next; 0 for none."),
        "seed": (_whole("seed"), "Of the initial parameters, the order of samples, and which are held out."),
        "dtype": (click.Choice(DTYPES), "Of parameters and data."),
        "device": (
            click.Choice(DEVICES),
            "Where parameters and data are, and are computed with; gpu needs CuPy.",
        ),
        "threads": (click.IntRange(1, 4096), "BLAS threads a rank [default: its share of the node's cores]."),
        "out": (str, "New folder for model and metrics [default: one under runs/]."),
    },
}


def _with_options(command: Any) -> Any:
    """An option for each field of ``Settings``."""
    described = {name: option for group in _OPTIONS.values() for name, option in group.items()}
    for field in reversed(fields(Settings)):
        kind, text = described[field.name]
        named = flag(field.name)
        named += f"/--no-{named[2:]}" if kind is bool else ""
        shown = field.default not in (None, False)
        command = click.option(named, type=kind, default=field.default, show_default=shown, help=text)(command)
    return command


class _Grouped(click.Command):
    """Its help lists options in groups."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        records = {param.name: param.get_help_record(ctx) for param in self.get_params(ctx)}
        groups = {title: [records.pop(name) for name in group] for title, group in _OPTIONS.items()}
        for title, group in [*groups.items(), ("Running it", list(records.values()))]:
            with formatter.section(title):
                formatter.write_dl([record for record in group if record])


def _configure(ctx: click.Context, param: click.Parameter, value: Path | None) -> Path | None:
    """The settings in a file, or of the run to resume, are defaults: options and the environment go before them."""
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
    help="A TOML file with any of the options above: epochs = 5.",
)
@click.option(
    "--resume",
    type=click.Path(path_type=Path),
    is_eager=True,
    callback=_configure,
    envvar="MPICOLL_TRAIN_RESUME",
    help="Go on with the run in this folder, from its latest checkpoint; or from the checkpoint in this folder.",
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
    help="Seconds that a rank may wait for the others in a collective; 0 for no limit.",
)
@click.option(
    "--report",
    type=click.Path(path_type=Path, file_okay=False),
    envvar=["MPICOLL_TRAIN_REPORT", "MPICOLL_REPORT"],
    help="Where to leave stacks and calls if the job is ended for that: see mpicoll report.",
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
        self._kept: Epoch | None = None  # the latest, if it was not shown
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
            self._columns |= {"consensus": ("apart", "9.2g")}

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
        """There is a folder: say where, and what it is good for, since a job that is killed has no last words."""
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
        """How to go on if the job ends now, for the end of a line."""
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
    """A line for each rank, or, of many, for the slowest and the fastest."""
    rows = list(enumerate(ranks))
    slowest = min(rows, key=lambda row: row[1]["waiting"])[0]
    if len(rows) > ROWS:
        fastest = max(rows, key=lambda row: row[1]["waiting"])[0]
        rows = [(rank, ranks[rank]) for rank in sorted({slowest, fastest})]
    lines = [f"{'rank':>14}  {'sent':>10} {'messages':>9} {'computing':>9} {'moving':>7} {'waiting':>8}"]
    for rank, row in rows:
        sent = "unknown" if row["bytes_sent"] is None else f"{row['bytes_sent'] / 1e6:.1f} MB"
        messages = "unknown" if row["messages"] is None else str(row["messages"])
        seconds = row["seconds"] or 1.0
        shares = [(row["seconds"] - row["agreeing"]), (row["agreeing"] - row["waiting"]), row["waiting"]]
        computing, moving, waiting = (f"{share / seconds:.0%}" for share in shares)
        note = "  the slowest" if rank == slowest and len(ranks) > 1 else ""
        lines.append(f"{rank:>14}  {sent:>10} {messages:>9} {computing:>9} {moving:>7} {waiting:>8}{note}")
    return lines
