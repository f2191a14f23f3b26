"""``mpicoll verify``: the proofs."""

import click

from ..algorithms import ALGORITHMS
from ..errors import UserError
from ..schedule import ScheduleError
from ..verify import verify_algorithm


@click.command(short_help="Prove algorithms right.")
@click.argument("algorithms", nargs=-1, type=click.Choice(list(ALGORITHMS["allreduce"])))
@click.option(
    "--max-ranks", type=click.IntRange(1, 256), default=64, show_default=True, help="Prove for 1 to this many."
)
def verify(algorithms: tuple[str, ...], max_ranks: int) -> None:
    """Prove that algorithms (all of them, if none is named) are right, for every number of ranks up to a limit.

    Every contribution counts exactly once on every rank; no message is unmatched and nothing deadlocks, even with
    synchronous sends; all ranks end with the same bits; no two writes conflict; rounds and bytes are the stated ones.
    """
    click.echo(f"{'algorithm':20} {'proved for':>12} {'rounds':>8} {'sent':>8} {'scratch':>8}")
    for name in algorithms or ALGORITHMS["allreduce"]:
        try:
            for p in range(1, max_ranks + 1):
                proof = verify_algorithm(ALGORITHMS["allreduce"][name], p)
        except ScheduleError as error:
            raise UserError(f"not proved: {error}") from error
        sizes = f"{float(proof.sent):7.3f}n {float(proof.scratch):7.3f}n"
        click.echo(f"{name:20} {f'p = 1..{max_ranks}':>12} {proof.rounds:8} {sizes}")
    click.echo(f"rounds, most bytes sent by a rank and scratch memory are those at p = {max_ranks}, for n bytes")
