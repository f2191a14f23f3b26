"""``mpicoll show``: what an algorithm looks like."""

import click

from ..algorithms import ALGORITHMS
from ..draw import LEGEND, text
from ..errors import UserError

NAMES = list(dict.fromkeys(name for rows in ALGORITHMS.values() for name in rows))


@click.command()
@click.argument("algorithm", type=click.Choice(NAMES))
@click.option(
    "--collective", type=click.Choice(list(ALGORITHMS)), help="By default the first of these that has the algorithm."
)
@click.option("--ranks", type=click.IntRange(1, 256), default=4, show_default=True)
@click.option("--root", type=click.IntRange(min=0), help="Where it begins or ends, if it has a root.")
@click.option("--segments", type=click.IntRange(1, 64), help="Into how many pieces a pipelining algorithm cuts.")
def show(algorithm: str, collective: str | None, ranks: int, root: int | None, segments: int | None) -> None:
    """Draw an algorithm: ranks across, rounds down."""
    known = [name for name, rows in ALGORITHMS.items() if algorithm in rows]
    collective = collective or known[0]
    if collective not in known:
        raise UserError(f"there is no {algorithm} {collective}: {algorithm} is for {', '.join(known)}")
    row = ALGORITHMS[collective][algorithm]
    asked = {name: value for name, value in (("root", root), ("segments", segments)) if value is not None}
    given = {**row.parameters, **asked}
    try:
        schedule = row.schedule(ranks, **given)
    except ValueError as error:
        raise UserError(str(error)) from error
    click.echo(
        f"{schedule.name} {collective}: {ranks} ranks, {schedule.chunks} chunks, {row.rounds(ranks, **given)} rounds, "
        f"no rank sends more than {row.sent(ranks, **given)} of the vector"
    )
    click.echo(text(schedule))
    click.echo(LEGEND)
