"""``mpicoll show``: pictures of algorithms and pipelines, and a table of gossip graphs."""

from pathlib import Path

import click

from ..algorithms import ALGORITHMS
from ..draw import GANTT_LEGEND, gantt_svg, gantt_text, legend, svg, text
from ..errors import UserError
from ..files import writing
from ..graphs import graph
from ..pipeline import PIPELINES, simulate, verify
from ..schedule import MIX

NAMES = [*dict.fromkeys(name for rows in ALGORITHMS.values() for name in rows), "gossip", *PIPELINES]
CONSENSUS = 1e-3
MICRO = 8  # micro-batches, by default
LARGEST = 200_000  # cells of a picture: a few MB


@click.command(short_help="Draw an algorithm.")
@click.argument("name", type=click.Choice(NAMES), metavar="ALGORITHM|gossip")
@click.option(
    "--collective",
    type=click.Choice(list(ALGORITHMS)),
    help="Collective to draw [default: the first of these that has the algorithm].",
)
@click.option("--ranks", type=click.IntRange(1, 256), default=4, show_default=True, help="Number of ranks, or stages.")
@click.option("--root", type=click.IntRange(min=0), help="Root, of an algorithm that has one.")
@click.option("--segments", type=click.IntRange(1, 64), help="Number of segments of a pipelining algorithm.")
@click.option(
    "--micro",
    type=click.IntRange(1, 1024),
    help=f"Number of micro-batches of a pipeline [default: {MICRO}].",
)
@click.option(
    "--svg", "picture", type=click.Path(path_type=Path, dir_okay=False), help="SVG file to write instead of text."
)
def show(
    name: str,
    collective: str | None,
    ranks: int,
    root: int | None,
    segments: int | None,
    micro: int | None,
    picture: Path | None,
) -> None:
    """Draw an algorithm, ranks across and rounds down: as text, or as a picture.

    Algorithms are those that `mpicoll verify` lists.  The name gossip gives the graphs to mix on, side by side: the
    messages that a rank sends in a round, the spectral gap (how much of the distance to the mean goes in a round), and
    how many rounds it takes until a thousandth of the distance is left, whatever the ranks held.

    The names gpipe and 1f1b are schedules of pipelines, drawn with stages (--ranks) down and time across, as if all
    stages took equally long, forward and backward.
    """
    options = {"root": root, "segments": segments, "micro": micro}
    asked = {option: value for option, value in options.items() if value is not None}
    if name == "gossip":
        if asked or picture or collective not in (None, MIX):
            raise UserError("gossip is a table of all graphs: it takes --ranks only; name one to draw it")
        _gossip(ranks)
        return
    if name in PIPELINES:
        if collective or not asked.keys() <= {"micro"}:
            raise UserError(f"{name} is a pipeline: it takes --ranks, --micro and --svg only")
        _pipeline(name, ranks, micro or MICRO, picture)
        return
    known = [name_ for name_, rows in ALGORITHMS.items() if name in rows]
    collective = collective or known[0]
    if collective not in known:
        raise UserError(f"there is no {name} {collective}: {name} is for {', '.join(known)}")
    row = ALGORITHMS[collective][name]
    given = {**row.parameters, **asked}
    try:
        schedule = row.schedule(ranks, **given)
    except ValueError as error:
        raise UserError(str(error)) from error
    chunks = f", {schedule.chunks} chunks" if collective != MIX else ""
    about = f"{name} {collective}: {ranks} ranks{chunks}, {row.rounds(ranks, **given)} rounds"
    if picture is None:
        click.echo(f"{about}, no rank sends more than {row.sent(ranks, **given)} of the vector")
        click.echo(text(schedule))
        click.echo(legend(schedule))
        return
    _check_size(about, ranks * ranks * schedule.chunks * (row.rounds(ranks, **given) + 1), "take fewer ranks")
    _write(picture, about, svg(schedule, about))


def _check_size(about: str, cells: int, advice: str) -> None:
    if cells > LARGEST:
        raise UserError(f"a picture of {about} would have {cells} cells, more than {LARGEST}: {advice}")


def _write(picture: Path, about: str, drawing: str) -> None:
    with writing(repr(str(picture))):
        picture.write_text(drawing, encoding="utf-8")
    click.echo(f"{about}: drawn in {picture}")


def _pipeline(name: str, stages: int, micro: int, picture: Path | None) -> None:
    about = f"{name} pipeline: {stages} stages, {micro} micro-batches"
    _check_size(about, 2 * stages * micro, "take fewer stages or micro-batches")
    schedule = PIPELINES[name].schedule(stages, micro)
    proof = verify(schedule)
    if picture is None:
        idle = PIPELINES[name].idle(stages, micro)
        held = max(proof.held)
        click.echo(
            f"{about}, idle for {idle} of the time, no stage holds activations of more than {held} micro-batches"
        )
        click.echo(gantt_text(schedule))
        click.echo(GANTT_LEGEND)
        return
    _write(picture, about, gantt_svg(schedule, proof, simulate(schedule, [1] * stages, [1] * stages), about))


def _gossip(ranks: int) -> None:
    click.echo(
        f"{'graph':18} {'period':>6} {'messages':>9} {'spectral gap':>13} {f'rounds to {CONSENSUS:g}':>16}  mean"
    )
    for name, row in ALGORITHMS[MIX].items():
        made = graph(name, ranks)
        messages = max(len(made.neighbors(rank, t)[1]) - 1 for t in range(made.period or 1) for rank in range(ranks))
        gap, rounds = f"{1 - made.contraction:.3g}", made.rounds_to(CONSENSUS)
        needed = "never" if rounds is None else str(rounds)
        exact = f"reached after {made.period or 1}" if row.exact(ranks) else "approached"
        click.echo(f"{name:18} {made.period or 'none':>6} {messages:9} {gap:>13} {needed:>16}  {exact}")
