"""``mpicoll bench pipeline``: how long the stages of a pipeline are idle, by each of its schedules."""

import signal
import time
from pathlib import Path
from typing import Any

import click

from ..errors import UserError
from ..files import to_json
from ..mpi.launch import world
from ..pipeline import PIPELINES
from .numbers import Number, Numbers
from .output import Files, Record, Texts, check_new, grouped, output_options, publish, timing_options, where

PIPELINE = "pipeline"
MICRO = 4096  # micro-batches of a batch, at most
MESSAGE = 1 << 16  # bytes, by default
LONGEST = 1 << 30
FORWARD = 20  # ms, by default
FIRST = "# Pipeline"


class Pipeline(click.Command):
    """``mpicoll bench pipeline``, which lists its options if it is given one of ``mpicoll bench``."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the arguments, and name the options that there are if one is unknown."""
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            taken = ", ".join(param.opts[0] for param in self.params)
            raise click.UsageError(f"pipeline has no use for {error.option_name}: it takes {taken}", ctx) from error


@click.command(cls=Pipeline, short_help="Measure how long stages of a pipeline are idle.")
@click.option(
    "--algorithm",
    "algorithms",
    envvar="MPICOLL_BENCH_ALGORITHM",
    multiple=True,
    help=f"Schedules to measure, separated by commas: {', '.join(PIPELINES)} [default: all].",
)
@click.option("--sizes", type=Numbers(), help="Bytes per message, as 4,1000,64K:64M or 4:64M:4 [default: 64K].")
@click.option("--micro", type=Numbers(), help="Micro-batches per batch, as 4,8 [default: 1, 2 and 4 per stage].")
@click.option(
    "--forward",
    type=Number(0, 1e6),
    default=FORWARD,
    show_default=True,
    help="Milliseconds of a forward task; a backward task takes twice as long.",
)
@timing_options
@output_options
def pipeline(
    algorithms: tuple[str, ...],
    sizes: list[int] | None,
    micro: list[int] | None,
    forward: float,
    form: str,
    out: Path | None,
    raw: Path | None,
    **how: Any,
) -> None:
    """Measure how long the stages of a pipeline are idle, by each schedule: mpirun -n 4 mpicoll bench pipeline

    Every rank is a stage, and its tasks are to sleep.  docs/benchmarks.md explains the numbers.
    """
    names = [name for given in algorithms for name in given.split(",")]
    if unknown := [name for name in names if name not in PIPELINES]:
        raise click.UsageError(f"--algorithm {unknown[0]!r} is none of {', '.join(PIPELINES)}")
    if bad := [number for number in micro or () if not 1 <= number <= MICRO]:
        raise click.UsageError(f"--micro must be 1 to {MICRO} micro-batches, got {bad[0]}")
    if sizes and sizes[-1] > LONGEST:
        raise click.UsageError(f"--sizes: a message of pipeline is at most 1 GiB, got {sizes[-1]} bytes")
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until ends_job: a rank inside MPI's start-up runs no Python handler
    comm = world()  # before anything imports MPI, which would start it
    from ..job.guard import ends_job
    from ..measure import machine
    from ..measure.timing import NEEDED, Settings
    from ..mpi.together import on_root
    from ..train import bubble

    with ends_job(comm):
        on_root(comm, lambda: check_new(out, raw))
        if comm.size == 1:
            raise UserError(
                "bench pipeline needs two ranks or more, one for each stage: mpirun -n N mpicoll bench pipeline"
            )
        micro, sizes = micro or [n * comm.size for n in (1, 2, 4)], sizes or [MESSAGE]
        machine.check_memory(comm, (2 * max(micro) + NEEDED) * max(sizes))
        how["seed"] = comm.bcast(time.time_ns() % 2**32 if how["seed"] is None else how["seed"])
        settings = Settings(**how)
        cases = [
            bubble.Case(name, number, size)
            for name in PIPELINES
            if not names or name in names
            for size in sizes
            for number in micro
        ]
        config = {"ranks": comm.size, "forward_ms": forward, **how}
        facts = {**machine.environment(comm), "config": config, "resolution": machine.timer_resolution()}
        records = publish(
            comm,
            facts,
            Texts(head, body, document),
            lambda: [bubble.record(one, forward / 1e3) for one in bubble.measure(comm, cases, forward / 1e3, settings)],
            Files(form, out, raw),
        )
    check_promises(records)


def check_promises(records: list[Record]) -> None:
    """Raise a ``UserError`` if a schedule did not do what its row promises."""
    for one in records:
        case = f"{one['implementation']} of {one['micro']} micro-batches and {one['bytes']} bytes"
        if one["wrong"]:
            raise UserError(f"{one['wrong']} wrong messages: {case}")
        if one["held"] != one["promised"]:
            held, promised = (", ".join(map(str, one[key])) for key in ("held", "promised"))
            raise UserError(f"stages have held activations of {held} micro-batches, promised are {promised}: {case}")


# ---- texts


def head(facts: Record) -> str:
    """Return the facts that the numbers of pipelines depend on, as comments."""
    config = facts["config"]
    lines = [
        f"mpicoll Pipeline Bubble Test v{facts['mpicoll']}",
        f"{config['ranks']} stages, a rank each; forward {config['forward_ms']:g} ms, backward twice as long, asleep",
        *where(facts),
        f"seed {config['seed']}; {config['max_time']:g} s in all, at least {config['min_reps']} repetitions",
        *facts["env"],
    ]
    return "".join(f"# {line}\n" for line in lines)


def body(records: list[Record]) -> str:
    """Return a line for each schedule, size of messages and number of micro-batches."""
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


def document(facts: Record, records: list[Record]) -> str:
    """Return JSON: the common facts, and the records of each schedule."""
    made = [{"name": name, "results": own} for (name,), own in grouped(records, "implementation").items()]
    return to_json({"version": 1, **facts, "implementations": made}, indent=1) + "\n"
