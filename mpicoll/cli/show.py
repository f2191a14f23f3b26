"""``mpicoll show``: what an algorithm looks like."""

import click

from ..algorithms import ALGORITHMS
from ..draw import LEGEND, text
from ..errors import UserError


@click.command()
@click.argument("algorithm", type=click.Choice(list(ALGORITHMS["allreduce"])))
@click.option("--ranks", type=click.IntRange(1, 256), default=4, show_default=True)
@click.option("--segments", type=click.IntRange(1, 64), help="Into how many pieces a pipelining algorithm cuts.")
def show(algorithm: str, ranks: int, segments: int | None) -> None:
    """Draw an algorithm: ranks across, rounds down."""
    row = ALGORITHMS["allreduce"][algorithm]
    given = {**row.parameters, **({} if segments is None else {"segments": segments})}
    try:
        schedule = row.schedule(ranks, **given)
    except ValueError as error:
        raise UserError(str(error)) from error
    click.echo(
        f"{algorithm} allreduce: {ranks} ranks, {schedule.chunks} chunks, {row.rounds(ranks, **given)} rounds, "
        f"no rank sends more than {row.sent(ranks, **given)} of the vector"
    )
    click.echo(text(schedule))
    click.echo(LEGEND)
