"""Pictures, drawn with Matplotlib if it is installed."""

from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files import writing
from .bench_formats import PLACES
from .numbers import pretty
from .output import Record, grouped

PICTURES = (".png", ".svg", ".pdf")


def new_figure(width: float, height: float) -> Any:
    """Return an empty figure of this size in inches.  Raises ``UserError`` if Matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise UserError(f"plots need {error.name}: pip install 'mpicoll[plot]'") from error
    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: Any, path: Path, dpi: int) -> None:
    """Write a figure to a file.  Raises ``UserError`` if that is impossible."""
    with writing(repr(str(path))):
        figure.savefig(path, dpi=dpi)


def draw_speeds(facts: Record, records: list[Record], path: Path) -> None:
    """Draw time and speed of a collective against size, on log scales: out of place, if that was measured."""
    place = min(one["in_place"] for one in records)
    shown = [one for one in records if one["in_place"] == place and one["bytes"] and one["implementation"] != "null"]
    sizes = sorted({one["bytes"] for one in shown})
    figure = new_figure(10, 4.8)
    panels = [("median", "p10", "p90", "time (µs): median, 10 % to 90 %")]
    if any(one["speed"] for one in shown):
        panels += [("speed", "speed_low", "speed_high", "speed, native = 1: median, 95 % interval")]
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (middle, low, high, label) in zip(axes, panels, strict=True):
        for n, ((name,), rows) in enumerate(grouped(shown, "implementation").items()):
            if rows[0][middle] is not None:
                native = name == "native"
                style: Record = {"color": "black" if native else f"C{n}", "zorder": 3 if native else 2}
                x, y = ([one[key] for one in rows] for key in ("bytes", middle))
                marker = "osD^vP*X<>"[n % 10]
                axis.plot(x, y, marker=marker, ms=4, lw=2.5 if native else 1.3, label=name, **style)
                ends = ([one[end] for one in rows] for end in (low, high))
                axis.fill_between(x, *ends, alpha=0.1, lw=0, **style)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log", base=10 if middle == "median" else 2)
        axis.set_xticks(sizes[:: -(-len(sizes) // 6)], minor=False)
        axis.set_xticks([], minor=True)
        axis.xaxis.set_major_formatter(lambda size, _: pretty(size))
        if middle == "speed":
            axis.yaxis.set_major_formatter(lambda speed, _: f"{speed:.3g}")
        axis.set_xlabel("size of the array")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    one = shown[0]
    op = f" {one['op']}" if one["op"] != "none" else ""
    figure.suptitle(f"{one['collective']}{op} of {one['dtype']}, {one['ranks']} ranks, {PLACES[place]}; {facts['mpi']}")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    save_figure(figure, path, 150)
