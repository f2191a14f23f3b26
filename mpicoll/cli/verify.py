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
    synchronous sends; all ranks end with the same bits; no two writes conflict; rounds and bytes are the stated ones;
    and so is the order of additions: any, by rank (the operation need not commute), or canonical (by rank, and
    the same for all such algorithms, bit for bit).  Those that pipeline are proved for several numbers of segments.
    """
    click.echo(f"{'algorithm':20} {'proved for':>12} {'rounds':>8} {'sent':>8} {'scratch':>8}  order")
    for name in algorithms or ALGORITHMS["allreduce"]:
        row = ALGORITHMS["allreduce"][name]
        try:
            for p in range(1, max_ranks + 1):
                for segments in range(1, row.parameters.get("segments", 0)):
                    verify_algorithm(row, p, segments=segments)
                proof = verify_algorithm(row, p)
        except ScheduleError as error:
            raise UserError(f"not proved: {error}") from error
        sizes = f"{float(proof.sent):7.3f}n {float(proof.scratch):7.3f}n"
        order = "canonical" if row.canonical else "by rank" if row.rank_order else "any"
        click.echo(f"{name:20} {f'p = 1..{max_ranks}':>12} {proof.rounds:8} {sizes}  {order}")
    click.echo(f"rounds, most bytes sent by a rank and scratch memory are those at p = {max_ranks}, for n bytes")
