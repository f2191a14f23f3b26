"""The output of the commands that measure: records of plain values, printed and written in several formats."""

import csv
import io
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import click

from ..errors import UserError
from ..files import writing
from .numbers import Number, ranges

Record = dict[str, Any]
"""A result in plain values, as ``measure.metrics.record`` and ``train.bubble.record`` make it."""

C = TypeVar("C", bound=Callable[..., Any] | click.Command)


class Files(NamedTuple):
    """The files to write: a format, a file for it, and a file for the times of every repetition."""

    form: str
    out: Path | None
    raw: Path | None


class Texts(NamedTuple):
    """The functions that make the texts of a measurement.

    ``head`` is made of the facts, and printed before anything is measured; ``body`` is made of the records, and
    ``document``, which is JSON, of both.
    """

    head: Callable[[Record], str]
    body: Callable[[list[Record]], str]
    document: Callable[[Record, list[Record]], str]


# ---- options


def timing_options(command: C) -> C:
    """Add the options that say how long to measure to a command."""
    options = [
        click.option(
            "--max-time", type=Number(0, 1e6), default=60, show_default=True, help="Seconds to measure in all."
        ),
        click.option(
            "--min-reps",
            type=click.IntRange(1, 10**6),
            default=10,
            show_default=True,
            help="Least number of repetitions of a size.",
        ),
        click.option(
            "--warmup",
            type=click.IntRange(0, 10**6),
            default=2,
            show_default=True,
            help="Repetitions of a size that are made first and not counted.",
        ),
        click.option(
            "--precision",
            type=Number(0, 1),
            default=0.02,
            show_default=True,
            help="End a size early when the 95 % interval of each median is within this share of it.",
        ),
        click.option(
            "--seed", type=click.IntRange(0, 2**63), help="Seed of the data and the order [default: the time]."
        ),
    ]
    return _all(options, command)


def output_options(command: C) -> C:
    """Add the options of ``Files`` to a command."""
    options = [
        click.option(
            "--format",
            "form",
            type=click.Choice(["osu", "csv", "json"]),
            default="osu",
            show_default=True,
            envvar="MPICOLL_BENCH_FORMAT",
            help="Format: text like that of the OSU benchmarks, a csv table, or JSON like that of nccl-tests.",
        ),
        click.option(
            "--out",
            type=click.Path(path_type=Path, dir_okay=False),
            help="New file for the result; text is then printed as well.",
        ),
        click.option(
            "--raw",
            type=click.Path(path_type=Path, dir_okay=False),
            help="New csv file for the time of every repetition.",
        ),
    ]
    return _all(options, command)


def _all(options: Sequence[Callable[[Any], Any]], command: C) -> C:
    for option in reversed(options):
        command = option(command)
    return command


# ---- files


def check_new(*paths: Path | None) -> None:
    """Raise a ``UserError`` if one of the files exists, or two are the same: no data are overwritten."""
    given = [path for path in paths if path]
    for path in given:
        if path.exists() or given.count(path) > 1:
            raise UserError(f"{str(path)!r} {'exists' if path.exists() else 'is named twice'}: name a new file")
        check_folder(path)


def check_folder(path: Path) -> None:
    """Raise a ``UserError`` unless the folder of the file ``path`` exists and can be written to."""
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise UserError(f"{str(path)!r} cannot be written: there is no folder {str(path.parent)!r} to write to")


def publish(comm: Any, facts: Record, texts: Texts, measured: Callable[[], list[Record]], files: Files) -> list[Record]:
    """Print the facts, measure the records, print and write them, and return them; a collective call."""
    from ..measure.machine import TIME
    from ..mpi.together import on_root

    ahead = comm.rank == 0 and (files.form == "osu" or files.out is not None)
    if ahead:
        _say(texts.head(facts))
    records = measured()
    facts["end_time"] = time.strftime(TIME)
    text = {
        "osu": lambda: texts.head(facts) + texts.body(records),
        "csv": lambda: table(facts, records),
        "json": lambda: texts.document(facts, records),
    }[files.form]
    if comm.rank == 0:
        _say(texts.body(records) if ahead else text())
        for line in warnings(facts, records):
            click.echo(f"mpicoll: {line}", err=True)
    on_root(comm, lambda: _write({files.out: text, files.raw: lambda: table(facts, records, raw=True)}))
    return records


def _say(text: str) -> None:
    """Print a text, unless nobody reads the output any more."""
    with suppress(OSError):
        click.echo(text, nl=False)


def _write(texts: dict[Path | None, Callable[[], str]]) -> None:
    for path, text in texts.items():
        if path:
            with writing(repr(str(path))), path.open("x", encoding="utf-8", errors="surrogateescape") as file:
                file.write(text())


# ---- texts


def where(facts: Record) -> list[str]:
    """Lines that say where records were measured: hosts, cores, versions."""
    nodes: dict[str, list[str]] = {}
    for device in facts["devices"]:
        nodes.setdefault(device["hostname"], []).append(ranges(device["cpus"]))
    return [
        *(f"{host}: {len(on)} rank(s) on cores {'; '.join(dict.fromkeys(on))}" for host, on in nodes.items()),
        f"{facts['mpi']}, mpi4py {facts['mpi4py']}, NumPy {facts['numpy']}, Python {facts['python']}, "
        f"revision {facts['git'] or 'unknown'}, {facts['start_time']}",
    ]


def grouped(records: list[Record], *keys: str) -> dict[tuple, list[Record]]:
    """Group records by their values of ``keys``."""
    found: dict[tuple, list[Record]] = {}
    for one in records:
        found.setdefault(tuple(one[key] for key in keys), []).append(one)
    return found


def table(facts: Record, records: list[Record], raw: bool = False) -> str:
    """Return the records as CSV: a row for each or, if ``raw``, for each repetition."""
    common = {key: facts[key] for key in ("start_time", "mpi")}
    rows = [{**common, **{key: value for key, value in one.items() if key != "us"}} for one in records]
    if raw:
        kept = (*common, "ranks", "collective", "implementation", "micro", "in_place", "bytes")
        rows = [
            {**{key: row[key] for key in kept if key in row}, "repetition": n, "us": us}
            for row, one in zip(rows, records, strict=True)
            for n, us in enumerate(one["us"])
        ]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def warnings(facts: Record, records: list[Record]) -> Iterator[str]:
    """Lines on what makes the numbers less reliable than they look."""
    if facts["config"]["ranks"] == 1:
        yield "one rank: use more with mpirun -n N mpicoll bench"
    coarse = {one["implementation"] for one in records if facts["resolution"] > one["median"] / 10} - {"null"}
    if coarse:
        yield f"the clock's resolution is more than a tenth of the median of {', '.join(sorted(coarse))}"
    late, forward = (max(one.get(key, 0) for one in records) for key in ("late_us", "forward_us"))
    if late > forward / 100 > 0:
        yield f"tasks ended {late:.0f} us late: their cores had more to do, and the bubble looks larger than it is"
    yield "one launch: claim nothing before you have run it several times (docs/benchmarks.md says why)"
