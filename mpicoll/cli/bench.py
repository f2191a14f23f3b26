"""``mpicoll bench``: every algorithm beside the MPI library's own, and the bubble of pipelines."""

import csv
import io
import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click
import numpy as np
from click.core import ParameterSource

from ..algorithms import ALGORITHMS
from ..errors import UserError
from ..files import to_json
from ..mpi.launch import world
from ..pipeline import PIPELINES
from ..tuning import COLLECTIVES, NATIVE, WAYS

if TYPE_CHECKING:
    from ..measure import Task

PIPELINE = "pipeline"
OF_PIPELINE = (
    *("algorithms", "sizes", "micro", "forward", "max_time", "min_reps", "warmup", "precision", "seed"),
    *("form", "out", "raw"),
)
MICRO = 4096  # micro-batches of a batch, at most
MESSAGE = 1 << 16  # bytes, by default
LONGEST = 1 << 30
FORWARD = 20.0  # ms, by default
FIRST = "# Pipeline"
DTYPES = ("float32", "float64", "float16", "bfloat16", "int8", "uint8", "int32", "int64")
MOST = 100  # sizes
NEEDED = 10  # times the array, on each rank
NEEDED_ON_GPU = 3  # one array in place, two not
PICTURES = (".png", ".svg", ".pdf")
PLACES = {False: "out of place", True: "in place"}
TIMES = ("mean", "median", "p10", "p90", "p99", "min", "max")
HEAD = f"{'# Size':<12}{'Avg Latency(us)':>16}" + "".join(f"{name.capitalize():>11}" for name in TIMES[1:])
HEAD += f"{'Iterations':>12}{'Wrong':>7}{'algbw':>9}{'busbw':>9}{'memory':>8}"
WIDE = max(map(len, WAYS))
SPEED = f"{'speed':>8}  95 % interval"
Record = dict[str, Any]


class Files(NamedTuple):
    """What is written, and where."""

    form: str
    out: Path | None
    raw: Path | None


class Numbers(click.ParamType):
    """As 4,1000,64K:64M or 1K:1M:4, from to and by which factor: sorted."""

    name = "list"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[int]:
        """As click has it."""
        found: set[int] = set()
        for item in str(value).upper().split(","):
            match = re.fullmatch(r"(\d{1,12}[KMG]?)(?::(\d{1,12}[KMG]?)(?::(\d{1,6}))?)?", item.strip())
            if not match:
                self.fail(f"{item!r} is not a number like 1000 or 64K, or a range like 4:64K or 4:64M:4.", param, ctx)
            number, last, factor = _number(match[1]), _number(match[2] or match[1]), int(match[3] or 2)
            if match[2] and not (1 <= number <= last and factor > 1):
                self.fail(f"{item!r} is not a range from 1 or more upwards, by a factor of 2 or more.", param, ctx)
            found.add(number)
            while match[2] and (number := number * factor) <= last:
                found.add(number)
        if len(found) > MOST:
            self.fail(f"{len(found)} are too many: at most {MOST}.", param, ctx)
        return sorted(found)


def _number(text: str) -> int:
    digits = text.rstrip("KMG")
    return int(digits) << {"": 0, "K": 10, "M": 20, "G": 30}[text.removeprefix(digits)]


@click.command(short_help="Measure algorithms beside the MPI library's own.")
@click.argument("collective", type=click.Choice([*COLLECTIVES, PIPELINE]), default="allreduce")
@click.option(
    "--algorithm",
    "algorithms",
    envvar="MPICOLL_BENCH_ALGORITHM",
    multiple=True,
    help="Which: auto, native, ring, ... or several, by commas; also shared_arrays, and shared_result of allreduce; on "
    "a gpu ipc, nccl, aware, staged; of pipeline gpipe, 1f1b.",
)
@click.option(
    "--sizes",
    type=Numbers(),
    help="Bytes of the whole array, as 4,1000,64K:64M or 4:64M:4; of pipeline those of a message [default: 64K].",
)
@click.option("--count", type=Numbers(), help="The same in elements [default: 1:4M:4].")
@click.option("--dtype", type=click.Choice(DTYPES), default="float32", show_default=True)
@click.option("--op", type=click.Choice(["sum", "prod", "max", "min"]), help="If it reduces [default: sum].")
@click.option("--root", type=click.IntRange(min=0), help="Of reduce and bcast [default: 0].")
@click.option(
    "--micro", type=Numbers(), help="Of pipeline: micro-batches of a batch, as 4,8 [default: 1, 2 and 4 a stage]."
)
@click.option(
    "--forward",
    type=click.FloatRange(0, 1e6),
    help=f"Of pipeline: ms that a forward task takes; a backward takes twice as long [default: {FORWARD:g}].",
)
@click.option("--in-place/--out-of-place", default=None, help="Only one of them [default: both].")
@click.option(
    "--device",
    type=click.Choice(["cpu", "gpu"]),
    default="cpu",
    show_default=True,
    help="Where the arrays are: on a gpu they are CuPy's, and the ways ipc, nccl, aware and staged compete.",
)
@click.option("--off-cache", is_flag=True, help="Before each call, sweep the data out of the caches.")
@click.option("--unaligned", is_flag=True, help="Buffers begin one element after the beginning of a page.")
@click.option(
    "--sync",
    type=click.Choice(["barrier", "dissemination", "none"]),
    default="barrier",
    show_default=True,
    help="How ranks wait for each other before each call: MPI's barrier, or one of our own.",
)
@click.option(
    "--check",
    type=click.Choice(["off", "header", "full"]),
    default="off",
    show_default=True,
    help="Whether our calls are compared between the ranks, as header is the default elsewhere.",
)
@click.option(
    "--calls",
    type=click.IntRange(1, 10**6),
    default=1,
    show_default=True,
    help="Calls back to back in a repetition, whose time is their mean.",
)
@click.option("--max-time", type=click.FloatRange(0, 1e6), default=60, show_default=True, help="Seconds to measure.")
@click.option("--min-reps", type=click.IntRange(1, 10**6), default=10, show_default=True, help="At least, of a size.")
@click.option("--warmup", type=click.IntRange(0, 10**6), default=2, show_default=True, help="More, not counted.")
@click.option(
    "--precision",
    type=click.FloatRange(0, 1),
    default=0.02,
    show_default=True,
    help="A size is done early when 95 % intervals of all medians reach no further than this share.",
)
@click.option("--seed", type=click.IntRange(0, 2**63), help="Of the data and the order [default: the time].")
@click.option(
    "--format",
    "form",
    type=click.Choice(["osu", "csv", "json"]),
    default="osu",
    show_default=True,
    envvar="MPICOLL_BENCH_FORMAT",
    help="The text of the OSU benchmarks, a table, or what nccl-tests writes.",
)
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="A new file for it; text is printed.")
@click.option("--raw", type=click.Path(path_type=Path, dir_okay=False), help="A new csv file: every repetition.")
@click.option("--plot", type=click.Path(path_type=Path, dir_okay=False), help="Draw it: .png, .svg or .pdf.")
@click.pass_context
def bench(
    ctx: click.Context,
    collective: str,
    algorithms: tuple[str, ...],
    sizes: list[int] | None,
    count: list[int] | None,
    dtype: str,
    op: str | None,
    root: int | None,
    micro: list[int] | None,
    forward: float | None,
    in_place: bool | None,
    check: str,
    form: str,
    out: Path | None,
    raw: Path | None,
    plot: Path | None,
    **how: Any,
) -> None:
    """Time a collective by every algorithm, beside the MPI library's own: mpirun -n 4 mpicoll bench allreduce

    Results are checked, element by element: exit status 1 if any is wrong.  What the numbers mean, and how to make a
    claim of them: docs/benchmarks.md.

    pipeline measures how long stages are idle, by each schedule of a pipeline: every rank is a stage, and its tasks are
    to sleep.
    """
    if nan := [name for name, value in {"forward": forward, **how}.items() if value != value]:
        raise click.UsageError(f"--{nan[0].replace('_', '-')} nan is no number")
    chosen = [name for given in algorithms for name in given.split(",")]
    files = Files(form, out, raw)
    if collective == PIPELINE:
        _check_pipeline(ctx, chosen, micro, sizes)
        of_both = {name: how[name] for name in OF_PIPELINE if name in how}
        _bench_pipeline(chosen, micro, sizes, FORWARD if forward is None else forward, of_both, files)
        return
    if micro is not None or forward is not None:
        raise click.UsageError(f"--{'forward' if micro is None else 'micro'} is for pipeline, not for {collective}")
    on_gpu = how["device"] == "gpu"
    if on_gpu and how["off_cache"]:
        raise click.UsageError("--off-cache is for arrays in host memory, not for --device gpu")
    shared = ["shared", "shared_arrays", *(["shared_result"] if collective == "allreduce" else [])]
    known = ["auto", "native", *(WAYS if on_gpu else shared), *ALGORITHMS[collective]]
    if unknown := [name for name in chosen if name not in known]:
        raise click.UsageError(f"--algorithm {unknown[0]!r} is none of {', '.join(known)}")
    if op and "reduce" not in collective:
        raise click.UsageError(f"--op is for collectives that reduce, not for {collective}")
    if root is not None and collective not in ("reduce", "bcast"):
        raise click.UsageError(f"--root is for reduce and bcast, not for {collective}")
    kind = _dtype(dtype)
    if odd := [size for size in sizes or () if size % kind.itemsize]:
        raise click.UsageError(f"--sizes: {odd[0]} bytes are no whole number of {dtype}, {kind.itemsize} bytes each")
    elements = {size // kind.itemsize for size in sizes or ()} | {*(count or ())} or {4**n for n in range(12)}
    if plot and (plot.suffix not in PICTURES or elements == {0}):
        why = "shows sizes above 0" if elements == {0} else f"must end with {', '.join(PICTURES)}, got {str(plot)!r}"
        raise click.UsageError(f"--plot {why}")
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until ends_job: a rank inside MPI's start-up runs no Python handler
    comm = world()  # before anything imports MPI, which would start it
    from .. import measure as m
    from ..job.guard import ends_job
    from ..mpi.gpu import take
    from ..mpi.together import on_root

    with ends_job(comm):
        on_root(comm, lambda: _check_output(out, raw, plot))
        if (root or 0) >= comm.size:
            raise UserError(f"--root must be one of {comm.size} ranks, got {root}")
        most = max(elements) * kind.itemsize
        m.check_memory(comm, NEEDED * most)
        gpu = take(comm) if on_gpu else None
        refused: dict[str, str] = {}
        if gpu:
            m.check_gpu_memory(comm, gpu, NEEDED_ON_GPU * most)
            available, refused = m.implementations_on_gpu(comm, collective, kind, check, op or "sum", chosen)
        else:
            available = m.implementations(comm, collective, kind, check)
        if missing := [name for name in chosen if name not in available]:
            why = f"{missing[0]} has no {collective} of {dtype} that adds as ours do: leave it out"
            alone = f"{missing[0]} needs two ranks or more, all of which share memory"
            raise UserError(why if missing[0] == NATIVE else alone)
        wanted = {name: made for name, made in available.items() if not chosen or name in (*chosen, NATIVE)}
        how["seed"] = comm.bcast(time.time_ns() % 2**32 if how["seed"] is None else how["seed"])
        settings = m.Settings((False, True) if in_place is None else (in_place,), **how)
        tasks = [m.Task(collective, size, kind, op or "sum", root or 0) for size in sorted(elements)]
        for task in tasks:
            m.placements(task, comm.size, settings.in_place)  # what cannot be measured is told before the rest is
        memory, there = m.memory_bandwidth(comm), m.gpu_bandwidth(comm, gpu) if gpu else None
        config = {"ranks": comm.size, "check": check, **asdict(settings)}
        facts = {**m.environment(comm), "config": config, "memory": memory, "resolution": m.timer_resolution()}
        if gpu and there:
            facts |= {**m.gpu_environment(comm, gpu), "gpu_memory": there._asdict(), "refused": refused}
        records = _publish(
            comm,
            facts,
            (lambda: header(facts, tasks[0]), body, document),
            lambda: [m.record(one, comm.size, memory, there) for one in m.measure(comm, wanted, tasks, settings)],
            files,
        )
        if plot:
            on_root(comm, lambda: draw(facts, records, plot))
    wrong = [one for one in records if one["wrong"]]
    if wrong:
        named = [f"{one['implementation']} of {one['bytes']} bytes, {PLACES[one['in_place']]}" for one in wrong]
        more = f" and {len(named) - 3} more" if len(named) > 3 else ""
        raise UserError(f"{sum(one['wrong'] for one in wrong)} wrong elements: {'; '.join(named[:3])}{more}")


def _check_pipeline(ctx: click.Context, names: list[str], micro: list[int] | None, sizes: list[int] | None) -> None:
    options = {param.name: param.opts[0] for param in ctx.command.params if isinstance(param, click.Option)}
    given = [name for name in options if ctx.get_parameter_source(name or "") is not ParameterSource.DEFAULT]
    if other := [options[name] for name in given if name not in OF_PIPELINE]:
        taken = ", ".join(options[name] for name in OF_PIPELINE)
        raise click.UsageError(f"pipeline has no use for {other[0]}: it takes {taken}")
    if unknown := [name for name in names if name not in PIPELINES]:
        raise click.UsageError(f"--algorithm {unknown[0]!r} is none of {', '.join(PIPELINES)}")
    if bad := [number for number in micro or () if not 1 <= number <= MICRO]:
        raise click.UsageError(f"--micro must be 1 to {MICRO} micro-batches, got {bad[0]}")
    if sizes and sizes[-1] > LONGEST:
        raise click.UsageError(f"--sizes: a message of pipeline is at most 1 GiB, got {sizes[-1]} bytes")


def _bench_pipeline(
    names: list[str], micro: list[int] | None, sizes: list[int] | None, forward: float, how: Record, files: Files
) -> None:
    """The stages are the ranks; ``forward`` is in ms."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # as in bench
    comm = world()
    from .. import measure as m
    from ..job.guard import ends_job
    from ..mpi.together import on_root
    from ..train import bubble

    with ends_job(comm):
        on_root(comm, lambda: _check_output(files.out, files.raw, None))
        if comm.size == 1:
            raise UserError(
                "bench pipeline needs two ranks or more, one for each stage: mpirun -n N mpicoll bench pipeline"
            )
        micro, sizes = micro or [n * comm.size for n in (1, 2, 4)], sizes or [MESSAGE]
        m.check_memory(comm, (2 * max(micro) + NEEDED) * max(sizes))
        how["seed"] = comm.bcast(time.time_ns() % 2**32 if how["seed"] is None else how["seed"])
        settings = m.Settings(**how)
        cases = [
            bubble.Case(name, number, size)
            for name in PIPELINES
            if not names or name in names
            for size in sizes
            for number in micro
        ]
        config = {"ranks": comm.size, "forward_ms": forward, **how}
        facts = {**m.environment(comm), "config": config, "resolution": m.timer_resolution()}
        records = _publish(
            comm,
            facts,
            (lambda: pipeline_header(facts), pipeline_body, pipeline_document),
            lambda: [bubble.record(one, forward / 1e3) for one in bubble.measure(comm, cases, forward / 1e3, settings)],
            files,
        )
    check_promises(records)


def check_promises(records: list[Record]) -> None:
    """A ``UserError`` if a schedule did not do what it says."""
    for one in records:
        where = f"{one['implementation']} of {one['micro']} micro-batches and {one['bytes']} bytes"
        if one["wrong"]:
            raise UserError(f"{one['wrong']} wrong messages: {where}")
        if one["held"] != one["promised"]:
            held, promised = (", ".join(map(str, one[key])) for key in ("held", "promised"))
            raise UserError(f"stages have held activations of {held} micro-batches, promised are {promised}: {where}")


def _publish(
    comm: Any,
    facts: Record,
    texts: tuple[Callable[[], str], Callable[[list[Record]], str], Callable[[Record, list[Record]], str]],
    found: Callable[[], list[Record]],
    files: Files,
) -> list[Record]:
    """Print what the numbers depend on, find them, print them, and write them."""
    from ..measure import TIME
    from ..mpi.together import on_root

    head, body, document = texts
    told = comm.rank == 0 and (files.form == "osu" or files.out is not None)
    if told:
        _say(head())
    records = found()
    facts["end_time"] = time.strftime(TIME)
    whole = {"osu": lambda: head() + body(records), "csv": lambda: table(facts, records)}
    text = {**whole, "json": lambda: document(facts, records)}[files.form]
    if comm.rank == 0:
        _say(body(records) if told else text())
        for line in warnings(facts, records):
            click.echo(f"mpicoll: {line}", err=True)
    on_root(comm, lambda: _write({files.out: text, files.raw: lambda: table(facts, records, raw=True)}))
    return records


def _say(text: str) -> None:
    """Print, unless nobody reads any more."""
    with suppress(OSError):
        click.echo(text, nl=False)


def _dtype(name: str) -> np.dtype:
    if name == "bfloat16":
        try:
            import ml_dtypes
        except ModuleNotFoundError:
            raise UserError("bfloat16 needs the package ml_dtypes: pip install 'mpicoll[bfloat16]'") from None
        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


def _check_output(out: Path | None, raw: Path | None, plot: Path | None) -> None:
    """Before anything is measured: data that exist are not overwritten, nor by one another."""
    for path in filter(None, (out, raw)):
        if path.exists() or out == raw:
            raise UserError(f"{str(path)!r} {'exists' if path.exists() else 'is named twice'}: name a new file")
    for path in filter(None, (out, raw, plot)):
        if not path.parent.is_dir():
            raise UserError(f"{str(path)!r} cannot be written: there is no folder {str(path.parent)!r}")
    if plot:
        _figure()


def _write(texts: dict[Path | None, Callable[[], str]]) -> None:
    for path, text in texts.items():
        if path:
            try:
                with path.open("x", encoding="utf-8", errors="surrogateescape") as file:
                    file.write(text())
            except OSError as error:
                raise UserError(f"{str(path)!r} cannot be written ({error.strerror})") from error


# ---- what is printed: of plain records, as measure.record makes them


def header(facts: Record, task: "Task") -> str:
    """What the numbers depend on, as comments."""
    config, memory = facts["config"], facts["memory"]
    op = f", {task.op}" if "reduce" in task.collective else ""
    root = f", root {task.root}" if task.collective in ("reduce", "bcast") else ""
    how = f"sync {config['sync']}, check {config['check']}, seed {config['seed']}"
    how += f", {config['calls']} calls back to back" if config["calls"] > 1 else ""
    how += "".join(f", {name.replace('_', ' ')}" for name in ("off_cache", "unaligned") if config[name])
    lines = [
        f"mpicoll {task.collective.capitalize()} Latency Test v{facts['mpicoll']}",
        f"Datatype: {task.dtype.name}{op}{root}; {config['ranks']} rank(s)",
        *_where(facts),
        f"{how}; {config['max_time']:g} s in all, at least {config['min_reps']} repetitions of a size",
        f"memory of a rank while all copy: {memory['copy']:.2f} GB/s, while all add: {memory['add']:.2f} GB/s; "
        f"clock resolution {facts['resolution']:.3f} us",
        *(_on_gpus(facts) if "gpus" in facts else []),
        *facts["env"],
    ]
    return "".join(f"# {line}\n" for line in lines)


def _where(facts: Record) -> list[str]:
    nodes: dict[str, list[str]] = {}
    for device in facts["devices"]:
        nodes.setdefault(device["hostname"], []).append(ranges(device["cpus"]))
    return [
        *(f"{host}: {len(on)} rank(s) on cores {'; '.join(dict.fromkeys(on))}" for host, on in nodes.items()),
        f"{facts['mpi']}, mpi4py {facts['mpi4py']}, NumPy {facts['numpy']}, Python {facts['python']}, "
        f"revision {facts['git'] or 'unknown'}, {facts['start_time']}",
    ]


def _on_gpus(facts: Record) -> list[str]:
    by_ranks = {tuple(one["ranks"]): one for one in facts["gpus"]}
    speed = facts["gpu_memory"]
    return [
        *(
            f"GPU {one['name']} ({one['bus']}): {len(one['ranks'])} rank(s), {ranges(list(one['ranks']))}"
            for one in by_ranks.values()
        ),
        f"a GPU copies {speed['copy']:.2f} GB/s, read and written; to host memory {speed['to_host']:.2f} GB/s, "
        f"from there {speed['from_host']:.2f} GB/s",
        f"CuPy {facts['cupy']}, CUDA runtime {facts['cuda_runtime']}, driver {facts['cuda_driver']}; "
        "a call lasts until its stream has done it",
        "native is the MPI library's own on a copy in ordinary host memory: x.get(), the call, x.set()",
        *(f"without {way}: {why}" for way, why in facts["refused"].items()),
    ]


def ranges(numbers: list[int]) -> str:
    """As 0-3,8."""
    starts = [n for n in numbers if n - 1 not in numbers]
    ends = [n for n in numbers if n + 1 not in numbers]
    return ",".join(f"{start}-{end}" if end > start else f"{start}" for start, end in zip(starts, ends, strict=True))


def body(records: list[Record]) -> str:
    """A block for each implementation, as the OSU benchmarks print one; then their speeds side by side, as comments."""
    lines = []
    for (place, name), rows in _grouped(records, "in_place", "implementation").items():
        if name != "null":
            lines += [f"# {name} {rows[0]['collective']}, {PLACES[place]}", _head(rows[0]), *map(_row, rows)]
    empty = {one["count"]: one for one in records if one["implementation"] == "null"}
    for (place,), found in _grouped(records, "in_place").items():
        names = [name for (name,) in _grouped(found, "implementation") if name not in ("native", "null")]
        if all(one["speed"] is None for one in found):
            continue  # the MPI library has none like it
        lines.append(f"# speed of {found[0]['collective']}, {PLACES[place]}, native = 1; = for no difference")
        lines.append(f"# {'Size':>10} {'native us':>11} {'null us':>8} " + "".join(f" {name:>9}" for name in names))
        for (count,), rows in _grouped(found, "count").items():
            by = {one["implementation"]: one for one in rows}
            native = f"{by['native']['median']:.2f}"
            cells = "".join(f" {_speed(by[name]):>{max(9, len(name))}}" for name in names)
            lines.append(f"# {rows[0]['bytes']:>10} {native:>11} {empty[count]['median']:>8.2f} {cells}")
    wrong = sum(one["wrong"] for one in records)
    return "\n".join([*lines, f"# Wrong elements: {wrong}{'' if wrong else ' OK'}"]) + "\n"


def _grouped(records: list[Record], *keys: str) -> dict[tuple, list[Record]]:
    found: dict[tuple, list[Record]] = {}
    for one in records:
        found.setdefault(tuple(one[key] for key in keys), []).append(one)
    return found


def _head(one: Record) -> str:
    return HEAD + (f"  {'way':{WIDE}}" if "way" in one else "") + SPEED


def _row(one: Record) -> str:
    times = f"{one['mean']:>16.2f}" + "".join(f"{one[name]:>11.2f}" for name in TIMES[1:])
    rates = f"{one['algbw']:>9.3f}{one['busbw']:>9.3f}{one['memory_share']:>8.2f}"
    rates += f"  {one['way'] or '-':{WIDE}}" if "way" in one else ""
    speed = "" if one["speed"] is None else f"{one['speed']:>8.3f}  {one['speed_low']:.3f} to {one['speed_high']:.3f}"
    return f"{one['bytes']:<12d}{times}{one['n']:>12d}{one['wrong']:>7d}{rates}{speed}"


def _speed(one: Record) -> str:
    return f"{'=' if one['speed_low'] <= 1 <= one['speed_high'] else ''}{one['speed']:.2f}"


def pipeline_header(facts: Record) -> str:
    """What the numbers of pipelines depend on, as comments."""
    config = facts["config"]
    lines = [
        f"mpicoll Pipeline Bubble Test v{facts['mpicoll']}",
        f"{config['ranks']} stages, a rank each; forward {config['forward_ms']:g} ms, backward twice as long, asleep",
        *_where(facts),
        f"seed {config['seed']}; {config['max_time']:g} s in all, at least {config['min_reps']} repetitions",
        *facts["env"],
    ]
    return "".join(f"# {line}\n" for line in lines)


def pipeline_body(records: list[Record]) -> str:
    """A line for each schedule, size of messages and number of micro-batches."""
    rows = [_cells(one) for one in records]
    widths = {title: max(len(title), *(len(row[title]) for row in rows)) for title in rows[0]}
    lines = [
        "  ".join(
            cell.ljust(widths[title]) if title == FIRST else cell.rjust(widths[title]) for title, cell in row.items()
        )
        for row in ({title: title for title in widths}, *rows)
    ]
    wrong = sum(one["wrong"] for one in records)
    return "\n".join([*lines, f"# Wrong messages: {wrong}{'' if wrong else ' OK'}"]) + "\n"


def _cells(one: Record) -> dict[str, str]:
    times = {"Median(ms)": "median", "P10": "p10", "P90": "p90"}
    return {
        FIRST: one["implementation"],
        **{title: str(one[title.lower()]) for title in ("Micro", "Bytes")},
        **{title: f"{one[key] / 1e3:.2f}" for title, key in times.items()},
        "Iterations": str(one["n"]),
        "idle": f"{one['idle']:.4f}",
        "textbook": f"{one['textbook']:.4f}",
        "ratio": f"{one['ratio']:.3f}",
        "95 % interval": f"{one['ratio_low']:.3f} to {one['ratio_high']:.3f}",
        "model": f"{one['model']:.4f}",
        **{f"{name}(us)": f"{one[f'{name}_us']:.0f}" for name in ("late", "calls", "handoff")},
        **{title: str(max(one[title])) for title in ("held", "promised")},
        "Wrong": str(one["wrong"]),
    }


def pipeline_document(facts: Record, records: list[Record]) -> str:
    """JSON: the records of each schedule; beside them what all have in common."""
    made = [{"name": name, "results": own} for (name,), own in _grouped(records, "implementation").items()]
    return to_json({"version": 1, **facts, "implementations": made}, indent=1) + "\n"


def table(facts: Record, records: list[Record], raw: bool = False) -> str:
    """CSV: a row for each implementation, place and size; or for each repetition."""
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


def document(facts: Record, records: list[Record]) -> str:
    """JSON: for each implementation what nccl-tests writes, by its keys; beside it what all have in common."""
    made = []
    for (name,), own in _grouped(records, "implementation").items():
        results = []
        for rows in _grouped(own, "count").values():
            one = rows[0]
            result = {"size": one["bytes"], "count": one["count"], "type": one["dtype"], "redop": one["op"]}
            results.append({**result, "root": one["root"], **{key: value for row in rows for key, value in _nccl(row)}})
        wrong, busbw = sum(one["wrong"] for one in own), [one["busbw"] for one in own if one["busbw"] is not None]
        ends = {"out_of_bounds": {"count": wrong, "okay": not wrong}}
        ends |= {"average_bus_bandwidth": {"bandwidth": float(np.mean(busbw))}} if busbw else {}
        made.append({"name": name, "results": results, **ends})
    return to_json({"version": 1, **facts, "implementations": made}, indent=1) + "\n"


def _nccl(one: Record) -> list[tuple[str, Record]]:
    us = np.array(one["us"])
    place = PLACES[one["in_place"]].replace(" ", "_")
    said = {"time": one["median"], "alg_bw": one["algbw"], "bus_bw": one["busbw"], "nwrong": one["wrong"]}
    ours = {key: one[key] for key in ("memory_share", "speed", "speed_low", "speed_high", "way") if key in one}
    spread = {
        f"{name}_us": one[key] for name, key in [("avg", "mean"), ("p50", "median"), *((t, t) for t in TIMES[2:])]
    }
    spread |= {"p95_us": float(np.percentile(us, 95)), "stdev_us": float(us.std())}
    spread |= {"cv_pct": 100 * float(us.std() / us.mean())}
    return [(place, said | ours), (f"{place}_per_iter", {**spread, "times_us": one["us"]})]


def warnings(facts: Record, records: list[Record]) -> Iterator[str]:
    """What makes the numbers worth less than they look."""
    if facts["config"]["ranks"] == 1:
        yield "one rank: use more with mpirun -n N mpicoll bench"
    coarse = {one["implementation"] for one in records if facts["resolution"] > one["median"] / 10} - {"null"}
    if coarse:
        yield f"the clock's resolution is more than a tenth of the median of {', '.join(sorted(coarse))}"
    late, forward = (max(one.get(key, 0) for one in records) for key in ("late_us", "forward_us"))
    if late > forward / 100 > 0:
        yield f"tasks ended {late:.0f} us late: their cores had more to do, and the bubble looks larger than it is"
    yield "one launch: claim nothing before you have run it several times (docs/benchmarks.md says why)"


def draw(facts: Record, records: list[Record], path: Path) -> None:
    """Time and speed against size, in log scales: out of place, if that was measured."""
    place = min(one["in_place"] for one in records)
    shown = [one for one in records if one["in_place"] == place and one["bytes"] and one["implementation"] != "null"]
    sizes = sorted({one["bytes"] for one in shown})
    figure = _figure()
    panels = [("median", "p10", "p90", "time (µs): median, 10 % to 90 %")]
    if any(one["speed"] for one in shown):
        panels += [("speed", "speed_low", "speed_high", "speed, native = 1: median, 95 % interval")]
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (middle, low, high, label) in zip(axes, panels, strict=True):
        for n, ((name,), rows) in enumerate(_grouped(shown, "implementation").items()):
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
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise UserError(f"{str(path)!r} cannot be written ({error.strerror})") from error


def _figure() -> Any:
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise UserError(f"plots need {error.name}: pip install 'mpicoll[plot]'") from error
    return Figure(figsize=(10, 4.8), layout="constrained")


def pretty(size: float) -> str:
    """A number of bytes, in powers of two."""
    for unit, shift in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if size >= 1 << shift:
            return f"{size / (1 << shift):.4g} {unit}"
    return f"{size:.4g} B"
