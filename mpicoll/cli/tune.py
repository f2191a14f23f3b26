"""``mpicoll tune``: measure collectives, make rules for ``auto``, and report what they are worth."""

import os
import signal
import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from ..collective import COLLECTIVES
from ..errors import UserError
from ..mpi.launch import launched_ranks, world
from ..tuning.fingerprint import Fingerprint
from ..tuning.fit import fitted_profile, trial, worth
from ..tuning.measurements import Measurements, Row, read_measurements, write_measurements
from ..tuning.profile import VARIABLE, Profile, default_path, profile_path, read_profile, refusal, write_profile
from ..tuning.rules import Rules
from .numbers import Numbers, dtype_named, pretty
from .output import check_folder

if TYPE_CHECKING:
    from ..measure.task import Task

SIZES = [4**n for n in range(1, 12)]  # bytes: 4 B to 4 MiB
BUDGET = 120.0  # seconds
DTYPE = "float32"
ITEM = 4  # bytes


@click.command(short_help="Measure which algorithms auto should choose here.")
@click.option("--collective", help=f"Collectives, separated by commas [default: {','.join(COLLECTIVES)}].")
@click.option("--sizes", type=Numbers(), help="Sizes of the whole array in bytes to make rules for [default: 4:4M:4].")
@click.option("--budget", type=click.FloatRange(0, 1e6), help=f"Seconds to measure [default: {BUDGET:g}].")
@click.option("--seed", type=click.IntRange(0, 2**63), help="Seed of the data and the order [default: the time].")
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    help="File of the profile [default: the place where mpicoll looks for it].",
)
@click.option(
    "--data",
    type=click.Path(path_type=Path, dir_okay=False),
    help="File of the measurements [default: beside the profile].",
)
@click.option(
    "--fit",
    "source",
    type=click.Path(path_type=Path),
    help="Make rules from this file of measurements; measure nothing.",
)
@click.option(
    "--score",
    is_flag=False,
    flag_value="",
    metavar="[PROFILE]",
    help="Measure what a profile is worth at sizes between those of --sizes; write nothing [default: the one in use].",
)
def tune(
    collective: str | None,
    sizes: list[int] | None,
    budget: float | None,
    seed: int | None,
    out: Path | None,
    data: Path | None,
    source: Path | None,
    score: str | None,
) -> None:
    """Measure collectives and make a profile that auto uses from then on: mpirun -n 4 mpicoll tune

    The profile is for this MPI, machine and layout of ranks on nodes.  It is found by its name, or through
    MPICOLL_PROFILE.  docs/tuning.md describes its format, and how rules are made.
    """
    if budget != budget:
        raise click.UsageError("--budget nan is no number of seconds")
    chosen = [*dict.fromkeys(collective.split(",") if collective else COLLECTIVES)]
    if unknown := [name for name in chosen if name not in COLLECTIVES]:
        raise click.UsageError(f"--collective {unknown[0]!r} is none of {', '.join(COLLECTIVES)}")
    if odd := [size for size in sizes or () if size % ITEM or not size]:
        raise click.UsageError(f"--sizes: {odd[0]} bytes are no whole number, above 0, of {DTYPE}, {ITEM} bytes each")
    if score is not None:
        _leave_out("--score", **{"--fit": source, "--out": out, "--data": data})
    if source is not None:
        measuring = {"--collective": collective, "--sizes": sizes, "--budget": budget, "--seed": seed}
        _leave_out("--fit", **measuring, **{"--data": data})
        _fit(source, out)
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until ends_job: a rank inside MPI's start-up runs no Python handler
    comm = world()  # before anything imports MPI, which would start it
    from ..job.guard import ends_job
    from ..measure.compete import compete, untuned
    from ..measure.machine import check_memory, environment, fingerprint
    from ..measure.timing import NEEDED, Settings
    from ..mpi.together import on_root

    with ends_job(comm):
        if comm.size == 1:
            raise UserError("tune needs two ranks or more: mpirun -n N mpicoll tune")
        check_memory(comm, NEEDED * max(sizes or SIZES))
        here = fingerprint(comm)
        scored = on_root(comm, lambda: _profile(score, here)) if score is not None else None
        files = on_root(comm, lambda: _outputs(here, out, data)) if scored is None else None
        os.environ[VARIABLE] = "none"  # a profile that there is, right or wrong, is not to be in the way
        budget = BUDGET if budget is None else budget
        seed = comm.bcast(time.time_ns() % 2**32 if seed is None else seed)
        tasks = _tasks(chosen, sizes or SIZES, comm.size, scored.rules if scored else None)
        rows: dict[str, list[Row]] = {task.collective: [] for task, _ in tasks}
        click.echo(
            f"# mpicoll tune: {here}\n# {len(tasks)} sizes of {', '.join(rows)}; about {budget:g} s, seed {seed}"
        )
        start = time.monotonic()
        settings = Settings(max_time=budget, min_reps=3, warmup=1, precision=0.05, seed=seed)
        found = compete(comm, [task for task, _ in tasks], settings)
        for (task, fitted), us in zip(tasks, found, strict=True):
            kept = {name: np.round(times, 2) for name, times in us.items()}  # as in the file
            rows[task.collective].append(Row(task.count * ITEM, fitted, untuned(comm, task), kept))
        facts = {**environment(comm), "seconds": round(time.monotonic() - start, 1), "budget": budget, "seed": seed}
        if scored is not None:
            click.echo(report(scored.rules, rows), nl=False)
        if files is not None:
            on_root(comm, lambda: _write(Measurements(here, _made(facts), rows), *files))


def _made(facts: dict[str, Any]) -> dict[str, Any]:
    """The facts that a file of measurements keeps."""
    kept = ("mpicoll", "git", "mpi4py", "numpy", "python", "kernel", "seconds", "budget", "seed")
    hosts = [*dict.fromkeys(one["hostname"] for one in facts["devices"])]
    return {"date": facts["start_time"], **{key: facts[key] for key in kept}, "dtype": DTYPE, "hosts": hosts}


def _leave_out(command: str, **options: Any) -> None:
    if given := [name for name, value in options.items() if value is not None]:
        raise click.UsageError(f"{command} has no use for {given[0]}: leave it out")


def _tasks(collectives: list[str], sizes: list[int], p: int, scored: Rules | None) -> list[tuple["Task", bool]]:
    """The tasks to measure, and whether rules are fitted to each: the sizes, and one size between any two, not fitted.

    If a profile is scored, only the latter, for the collectives that it has rules for.
    """
    from ..measure.task import Task

    between = [(before + 2 * after) // (3 * ITEM) * ITEM for before, after in pairwise(sizes)]
    found = []
    for name in collectives:
        parts = p if name in ("reduce_scatter", "allgather") else 1  # programs mostly have equal ones
        counts = {-(-size // (ITEM * parts)) * parts: size in sizes for size in (*between, *sizes)}
        for count, fitted in sorted(counts.items()):
            if scored is None or (name in scored and not fitted):
                found.append((Task(name, count, dtype_named(DTYPE)), fitted))
    if not found:
        raise UserError("nothing to score: no size between two of --sizes, or no collective that the profile is for")
    return found


def _profile(name: str, here: Fingerprint) -> Profile:
    """Return the profile to score: the one of this name or, if no name is given, the one in use."""
    place = (Path(name), True) if name else profile_path(here)
    if place is None:
        raise UserError(f"{VARIABLE} says that no profile is wanted: name one, --score PROFILE")
    profile = read_profile(place[0])
    if why := refusal(profile, here):
        raise UserError(f"profile {str(place[0])!r} is not for here: {why}")
    return profile


def _outputs(here: Fingerprint, out: Path | None, data: Path | None) -> tuple[Path, Path]:
    """Return the files to write, after checking them before anything is measured."""
    if out is None:
        place = profile_path(here)
        out = place[0] if place else default_path(here)
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            why = f"the folder {str(out.parent)!r} cannot be made ({error.strerror})"
            raise UserError(f"{why}: name the profile, --out FILE") from error
    data = data or out.with_name(f"{out.stem}.measured.json")
    if out == data:
        raise UserError(f"{str(out)!r} is named twice: the profile and the measurements need a file each")
    for path in (out, data):
        check_folder(path)
    return out, data


def _fit(source: Path, out: Path | None) -> None:
    if launched_ranks() > 1:
        raise UserError("tune --fit runs on one process: start it without mpirun")
    measured = read_measurements(source)
    out, _ = _outputs(measured.fingerprint, out, None)
    if out == source:
        raise UserError(f"{str(out)!r} is named twice: the profile and the measurements need a file each")
    _write(measured, out, None)


def _write(measured: Measurements, out: Path, data: Path | None) -> None:
    """Write the measurements, if they are new, and the profile made from them; print where they are."""
    profile = fitted_profile(measured)
    if data:
        write_measurements(measured, data)
    write_profile(profile, out)
    click.echo(table(profile.rules) + report(profile.rules, measured.rows), nl=False)
    click.echo(f"{'measurements in ' + str(data) + ', ' if data else ''}profile in {out}")


# ---- what is printed


def table(rules: Rules) -> str:
    """Return the rules, one line each."""
    lines = []
    for collective, own in rules.items():
        for n, rule in enumerate(own):
            bound = "any length" if rule.up_to is None else f"up to {pretty(rule.up_to)}"
            lines.append(f"{'' if n else collective:15}{bound:>18}   {', else '.join(rule.algorithms)}\n")
    return "".join(lines)


def report(rules: Rules, rows: Mapping[str, Sequence[Row]]) -> str:
    """Return what the rules are worth at the sizes that were not fitted: for each collective, and overall."""
    trials = {name: [trial(rules[name], row) for row in own if not row.fitted] for name, own in rows.items()}
    trials = {name: own for name, own in trials.items() if own}
    if not trials:
        return ""
    if len(trials) > 1:
        trials["all"] = [one for own in trials.values() for one in own]
    lines = [f"# slower than the best by, and how fast, at {len([*trials.values()][-1])} sizes that were not fitted\n"]
    lines.append(f"# {'':13}{'mean':>7}{'worst':>8}{'untuned=1':>11}{'native=1':>10}{'least':>7}\n")
    for name, own in trials.items():
        found = worth(own)
        worst, least = found.worst, found.least
        numbers = f"{found.penalty:7.1%}{worst.penalty:8.1%}{found.over_default:11.2f}{found.over_native:10.2f}"
        where = f"worst {pretty(worst.nbytes)}: {worst.choice} for {worst.best}; " if worst.penalty else ""
        where += f"least {pretty(least.nbytes)}"
        lines.append(f"{name:15}{numbers}{least.over_native:7.2f}   {where}\n")
    return "".join(lines)
