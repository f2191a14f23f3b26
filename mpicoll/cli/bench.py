"""``mpicoll bench``: every algorithm of a collective beside the native one."""

import signal
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import click

from ..algorithms import ALGORITHMS
from ..collective import COLLECTIVES
from ..errors import UserError
from ..mpi.launch import world
from ..tuning.rules import GPU_PATHS, NATIVE
from .bench_formats import PLACES, body, document, head
from .bench_pipeline import PIPELINE, pipeline
from .numbers import DTYPES, Numbers, dtype_named
from .output import Files, Record, Texts, check_folder, check_new, output_options, publish, timing_options
from .pictures import PICTURES, draw_speeds, new_figure


class Bench(click.Command):
    """``mpicoll bench``; with the argument ``pipeline`` it is another command, with options of its own."""

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        """Make the context of this command or, for ``pipeline``, of the other one."""
        place = self._collective(args)
        if place is None or args[place] != PIPELINE:
            return super().make_context(info_name, args, parent, **extra)
        args = [*args[:place], *args[place + 1 :]]
        prefix = parent and f"{parent.auto_envvar_prefix}_{info_name}".upper()  # variables have the names of bench's
        return pipeline.make_context(f"{info_name} {PIPELINE}", args, parent, auto_envvar_prefix=prefix, **extra)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the arguments, and say so if an option is for ``pipeline`` only."""
        place = self._collective(args)
        collective = "allreduce" if place is None else args[place]
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            if error.option_name not in (name for param in pipeline.params for name in param.opts):
                raise
            raise click.UsageError(f"{error.option_name} is for pipeline, not for {collective}", ctx) from error

    def _collective(self, args: list[str]) -> int | None:
        """The index of the argument that names the collective: the first that is no option nor an option's value."""
        options = [param for param in (*self.params, *pipeline.params) if isinstance(param, click.Option)]
        valued = {name for option in options if not option.is_flag for name in option.opts}
        n = 0
        while n < len(args) and args[n].startswith("-"):
            n += 2 if args[n] in valued else 1
        return n if n < len(args) else None


@click.command(cls=Bench, short_help="Measure algorithms beside native collectives.")
@click.argument("collective", type=click.Choice([*COLLECTIVES, PIPELINE]), default="allreduce")
@click.option(
    "--algorithm",
    "algorithms",
    envvar="MPICOLL_BENCH_ALGORITHM",
    multiple=True,
    help="Algorithms to measure, separated by commas: auto, native, ring, ..., shared_arrays, and for allreduce "
    "shared_result; with --device gpu also ipc, nccl, aware, staged [default: all].",
)
@click.option("--sizes", type=Numbers(), help="Sizes of the whole array in bytes, as 4,1000,64K:64M or 4:64M:4.")
@click.option("--count", type=Numbers(), help="Sizes of the whole array in elements [default: 1:4M:4].")
@click.option("--dtype", type=click.Choice(DTYPES), default="float32", show_default=True, help="Type of the elements.")
@click.option("--op", type=click.Choice(["sum", "prod", "max", "min"]), help="Operation of a reduction [default: sum].")
@click.option("--root", type=click.IntRange(min=0), help="Root of reduce and bcast [default: 0].")
@click.option("--in-place/--out-of-place", default=None, help="Measure only one of the two [default: both].")
@click.option(
    "--device",
    type=click.Choice(["cpu", "gpu"]),
    default="cpu",
    show_default=True,
    help="Device of the arrays; with gpu they are CuPy arrays, and the paths ipc, nccl, aware and staged are measured.",
)
@click.option("--off-cache", is_flag=True, help="Evict the data from the caches before each call.")
@click.option("--unaligned", is_flag=True, help="Start buffers one element after the beginning of a page.")
@click.option(
    "--sync",
    type=click.Choice(["barrier", "dissemination", "none"]),
    default="barrier",
    show_default=True,
    help="Synchronization before each call: the native barrier, mpicoll's dissemination barrier, or none.",
)
@click.option(
    "--check",
    type=click.Choice(["off", "header", "full"]),
    default="off",
    show_default=True,
    help="How mpicoll compares calls between ranks; in programs the default is header.",
)
@click.option(
    "--calls",
    type=click.IntRange(1, 10**6),
    default=1,
    show_default=True,
    help="Number of calls back to back in a repetition; its time is their mean.",
)
@timing_options
@output_options
@click.option("--plot", type=click.Path(path_type=Path, dir_okay=False), help="File for a plot: .png, .svg or .pdf.")
def bench(
    collective: str,
    algorithms: tuple[str, ...],
    sizes: list[int] | None,
    count: list[int] | None,
    dtype: str,
    op: str | None,
    root: int | None,
    in_place: bool | None,
    check: str,
    form: str,
    out: Path | None,
    raw: Path | None,
    plot: Path | None,
    **how: Any,
) -> None:
    """Time every algorithm of a collective beside the native one: mpirun -n 4 mpicoll bench allreduce

    Results are checked, element by element: exit status 1 if any is wrong.  What the numbers mean, and how to make a
    claim of them: docs/benchmarks.md.

    pipeline measures how long stages are idle, by each schedule of a pipeline, and has options of its own: mpicoll
    bench pipeline --help
    """
    chosen = [name for given in algorithms for name in given.split(",")]
    on_gpu = how["device"] == "gpu"
    if on_gpu and how["off_cache"]:
        raise click.UsageError("--off-cache is for arrays in host memory, not for --device gpu")
    shared = ["shared", "shared_arrays", *(["shared_result"] if collective == "allreduce" else [])]
    known = ["auto", "native", *(GPU_PATHS if on_gpu else shared), *ALGORITHMS[collective]]
    if unknown := [name for name in chosen if name not in known]:
        raise click.UsageError(f"--algorithm {unknown[0]!r} is none of {', '.join(known)}")
    row = COLLECTIVES[collective]
    if op and not row.reduces:
        raise click.UsageError(f"--op is for collectives that reduce, not for {collective}")
    if root is not None and not row.rooted:
        raise click.UsageError(f"--root is for reduce and bcast, not for {collective}")
    kind = dtype_named(dtype)
    if odd := [size for size in sizes or () if size % kind.itemsize]:
        raise click.UsageError(f"--sizes: {odd[0]} bytes are no whole number of {dtype}, {kind.itemsize} bytes each")
    elements = {size // kind.itemsize for size in sizes or ()} | {*(count or ())} or {4**n for n in range(12)}
    if plot and (plot.suffix not in PICTURES or elements == {0}):
        why = "shows sizes above 0" if elements == {0} else f"must end with {', '.join(PICTURES)}, got {str(plot)!r}"
        raise click.UsageError(f"--plot {why}")
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until ends_job: a rank inside MPI's start-up runs no Python handler
    comm = world()  # before anything imports MPI, which would start it
    from ..job.guard import ends_job
    from ..measure import machine
    from ..measure.contestants import implementations, implementations_on_gpu
    from ..measure.metrics import record
    from ..measure.task import Task, placements
    from ..measure.timing import NEEDED, NEEDED_ON_GPU, Settings, measure
    from ..mpi.gpu.assignment import take
    from ..mpi.together import on_root

    with ends_job(comm):
        on_root(comm, lambda: _check_output(out, raw, plot))
        if (root or 0) >= comm.size:
            raise UserError(f"--root must be one of {comm.size} ranks, got {root}")
        most = max(elements) * kind.itemsize
        machine.check_memory(comm, NEEDED * most)
        gpu = take(comm) if on_gpu else None
        if gpu:
            machine.check_gpu_memory(comm, gpu, NEEDED_ON_GPU * most)
            available, refused = implementations_on_gpu(comm, collective, kind, check, op or "sum", chosen)
        else:
            available, refused = implementations(comm, collective, kind, check), {}
        if missing := [name for name in chosen if name not in available]:
            why = f"{missing[0]} has no {collective} of {dtype} that adds as ours do: leave it out"
            alone = f"{missing[0]} needs two ranks or more, all of which share memory"
            raise UserError(why if missing[0] == NATIVE else alone)
        wanted = {name: one for name, one in available.items() if not chosen or name in (*chosen, NATIVE)}
        how["seed"] = comm.bcast(time.time_ns() % 2**32 if how["seed"] is None else how["seed"])
        settings = Settings((False, True) if in_place is None else (in_place,), **how)
        tasks = [Task(collective, size, kind, op or "sum", root or 0) for size in sorted(elements)]
        for task in tasks:
            placements(task, comm.size, settings.in_place)  # what cannot be measured is printed before the rest is
        memory, gpus = machine.memory_bandwidth(comm), machine.gpu_bandwidth(comm, gpu) if gpu else None
        config = {"ranks": comm.size, "check": check, **asdict(settings)}
        facts = {
            **machine.environment(comm),
            "config": config,
            "memory": memory,
            "resolution": machine.timer_resolution(),
        }
        if gpu and gpus:
            facts |= {**machine.gpu_environment(comm, gpu), "gpu_memory": gpus._asdict(), "refused": refused}
        records = publish(
            comm,
            facts,
            Texts(partial(head, tasks[0]), body, document),
            lambda: [record(one, comm.size, memory, gpus) for one in measure(comm, wanted, tasks, settings)],
            Files(form, out, raw),
        )
        if plot:
            on_root(comm, lambda: draw_speeds(facts, records, plot))
    check_results(records)


def check_results(records: list[Record]) -> None:
    """Raise a ``UserError`` if a result was wrong."""
    wrong = [one for one in records if one["wrong"]]
    if wrong:
        named = [f"{one['implementation']} of {one['bytes']} bytes, {PLACES[one['in_place']]}" for one in wrong]
        more = f" and {len(named) - 3} more" if len(named) > 3 else ""
        raise UserError(f"{sum(one['wrong'] for one in wrong)} wrong elements: {'; '.join(named[:3])}{more}")


def _check_output(out: Path | None, raw: Path | None, plot: Path | None) -> None:
    """Raise a ``UserError`` before anything is measured if a file cannot be written, or a picture cannot be drawn."""
    check_new(out, raw)
    if plot:
        check_folder(plot)
        new_figure(1, 1)  # there is a Matplotlib
