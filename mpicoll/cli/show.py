"""``mpicoll show``: what an algorithm looks like."""

import click

from ..algorithms import ALGORITHMS
from ..draw import LEGEND, text


@click.command()
@click.argument("algorithm", type=click.Choice(list(ALGORITHMS["allreduce"])))
@click.option("--ranks", type=click.IntRange(1, 256), default=4, show_default=True)
def show(algorithm: str, ranks: int) -> None:
    """Draw an algorithm: ranks across, rounds down."""
    row = ALGORITHMS["allreduce"][algorithm]
    schedule = row.schedule(ranks)
    click.echo(
        f"{algorithm} allreduce: {ranks} ranks, {schedule.chunks} chunks, {row.rounds(ranks)} rounds, "
        f"each rank sends {row.sent(ranks)} of the vector"
    )
    click.echo(text(schedule))
    click.echo(LEGEND)
