"""``mpicoll plot``: runs side by side."""

import math
from pathlib import Path
from typing import Any

import click

from ..errors import UserError
from ..mpi.launch import launched_ranks
from .pictures import PICTURES, new_figure, save_figure

PANELS = [("train_loss", "training loss"), ("train_accuracy", "training accuracy")]
VALIDATED = [("validation_loss", "validation loss"), ("validation_accuracy", "validation accuracy")]
MOST = 12  # runs in one picture


@click.command(short_help="Draw loss and accuracy of runs.")
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    default="runs.png",
    show_default=True,
    help="The picture: .png, .svg or .pdf.",
)
def plot(runs: tuple[Path, ...], out: Path) -> None:
    """Draw loss and accuracy of RUNS, folders that mpicoll train wrote, against steps and against seconds.

    Of the validation set if all of them have one, else as they were seen in training.  Runs are named by what is not
    the same in all.  A run that is not finished is drawn as far as it has come.
    """
    if launched_ranks() > 1:
        raise UserError("plot runs on one process: start it without mpirun")
    if len(runs) > MOST:
        raise UserError(f"{len(runs)} runs are too many to tell apart in one picture: name at most {MOST}")
    if out.suffix not in PICTURES:
        raise UserError(f"--out must end with .png, .svg or .pdf, got {str(out)!r}")
    figure = new_figure(10, 7)
    from matplotlib.ticker import PercentFormatter

    from ..train.run_folder import CONFIG, ENVIRONMENT, read_metrics
    from ..train.settings import read_settings

    curves, settings = [], []
    for run in runs:
        lines = read_metrics(run)
        if not lines:
            raise UserError(f"{str(run)!r} has no metrics yet")
        curves.append(lines)
        settings.append({**read_settings(run / CONFIG), "ranks": _ranks(run / ENVIRONMENT)})
    validated = all("validation_loss" in line for lines in curves for line in lines)
    axes = figure.subplots(2, 2, sharey="row", sharex="col")
    for row, (key, name) in zip(axes, VALIDATED if validated else PANELS, strict=True):
        shown = [line[key] for lines in curves for line in lines if line[key] is not None] or [0]
        for axis, x in zip(row, ("step", "seconds"), strict=True):
            for lines, label in zip(curves, names(settings, runs), strict=True):
                marker = "." if len(lines) < 50 else None
                y = [math.nan if line[key] is None else line[key] for line in lines]
                axis.plot([line[x] for line in lines], y, marker=marker, label=label)
            axis.grid(alpha=0.3)
        if key.endswith("loss") and max(shown) > 10 * min(shown) > 0:
            row[0].set_yscale("log")
        if key.endswith("accuracy"):
            row[0].yaxis.set_major_formatter(PercentFormatter(1))
        row[0].set_ylabel(name)
    for axis, scale in zip(axes[-1], ("steps of SGD", "seconds of training"), strict=True):
        axis.set_xlabel(scale)
    figure.suptitle(", ".join(f"{key} {value}" for key, value in _common(settings).items()).replace("$", r"\$"))
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=min(len(runs), 4))
    save_figure(figure, out, 120)
    click.echo(f"{len(runs)} run(s) drawn in {out}")


def names(settings: list[dict[str, Any]], runs: tuple[Path, ...]) -> list[str]:
    """A name for each run: its settings that are not the same in all runs, or the name of its folder."""
    different = [key for key in _keys(settings) if len({str(one.get(key)) for one in settings}) > 1]
    found = []
    for one in settings:
        said = [str(one[key]) if key == "strategy" else f"{key} {one[key]}" for key in different if key in one]
        found.append(", ".join(said).replace("$", r"\$"))  # no formulas
    if "" in found or len(set(found)) < len(found):
        return [(run.name or str(run)).replace("$", r"\$") for run in runs]
    return found


def _keys(settings: list[dict[str, Any]]) -> list[str]:
    """Return the settings that name runs, the strategy first."""
    return list(dict.fromkeys(["strategy", *(key for one in settings for key in one)]))


def _common(settings: list[dict[str, Any]]) -> dict[str, Any]:
    shown = ("data", "model", "ranks", "batch_size")
    return {key: settings[0].get(key) for key in shown if len({str(one.get(key)) for one in settings}) == 1}


def _ranks(path: Path) -> Any:
    import json

    try:
        return json.loads(path.read_text())["ranks"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{str(path)!r} cannot be read; expected the folder of a run") from error
