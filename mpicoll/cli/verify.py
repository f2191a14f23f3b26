"""``mpicoll verify``: proofs that algorithms and pipelines are right."""

from collections.abc import Iterator

import click

from ..algorithms import ALGORITHMS, Algorithm
from ..errors import UserError
from ..pipeline import PIPELINES, Pipeline, verify_pipeline
from ..schedule import ScheduleError
from ..verify import verify_algorithm

NAMES = sorted({*ALGORITHMS, *(name for rows in ALGORITHMS.values() for name in rows), "pipeline", *PIPELINES})


@click.command(short_help="Prove algorithms right.")
@click.argument("names", nargs=-1, type=click.Choice(NAMES), metavar="[COLLECTIVE | ALGORITHM | pipeline]...")
@click.option(
    "--max-ranks", type=click.IntRange(1, 256), default=64, show_default=True, help="Prove for 1 to this many."
)
def verify(names: tuple[str, ...], max_ranks: int) -> None:
    """Prove that algorithms (all of them, if none is named) are right, for every number of ranks up to a limit.

    Every contribution counts exactly once on every rank; no message is unmatched and nothing deadlocks, even with
    synchronous sends; all ranks end with the same bits; no two writes conflict; rounds and bytes are the stated ones;
    and so is the order of additions: any, by rank (the operation need not commute), or canonical (by rank, and
    the same for all such algorithms, bit for bit).  Those that pipeline are proved for several numbers of segments,
    those with a root for the first two, the last, and one in the middle.  Mixing keeps the mean over all ranks, and
    the graphs that are said to reach it in a period do; there rounds and bytes are those of a period.

    Pipelines are proved for as many stages as ranks, and some numbers of micro-batches: each stage does each
    micro-batch forward and backward, once and in order; nothing deadlocks, even with synchronous sends; and stages hold
    the activations and are idle for the time that are stated.
    """
    rows = [row for rows in ALGORITHMS.values() for row in rows.values()]
    chosen = [row for row in rows if not names or {row.collective, row.name} & {*names}]
    pipelines = [row for row in PIPELINES.values() if not names or {"pipeline", row.name} & {*names}]
    try:
        if chosen:
            _algorithms(chosen, max_ranks)
        if pipelines:
            _pipelines(pipelines, max_ranks)
    except ScheduleError as error:
        raise UserError(f"not proved: {error}") from error


def _algorithms(rows: list[Algorithm], max_ranks: int) -> None:
    click.echo(f"{'collective':15} {'algorithm':18} {'proved for':>12} {'rounds':>7} {'sent':>7} {'scratch':>8}  order")
    for row in rows:
        for p in range(1, max_ranks + 1):
            for given in variants(row, p):
                proof = verify_algorithm(row, p, **given)
        order = "canonical" if row.canonical else "by rank" if row.rank_order else "any" if row.reduces else ""
        if row.mixes:
            exact = [p for p in range(1, max_ranks + 1) if row.exact(p)]
            powers = [1 << n for n in range(max_ranks.bit_length())]
            order = "mean reached" if len(exact) == max_ranks else "mean kept"
            order += ", reached at 2^k" if order == "mean kept" and exact == powers else ""
        sizes = f"{proof.rounds:7} {float(proof.sent):6.3f}n {float(proof.scratch):7.3f}n"
        click.echo(f"{row.collective:15} {row.name:18} {f'p = 1..{max_ranks}':>12} {sizes}  {order}".rstrip())
    click.echo(f"rounds, most bytes sent by a rank and scratch memory are those at p = {max_ranks}, for n bytes")


def _pipelines(rows: list[Pipeline], max_stages: int) -> None:
    click.echo(f"{'pipeline':34} {'proved for':>12} {'idle':>7} {'held':>7}")
    for row in rows:
        for stages in range(1, max_stages + 1):
            for micro in (1, stages // 2 + 1, 2 * stages):
                proof = verify_pipeline(row, stages, micro)
        idle, held = float(row.idle(stages, micro)), max(proof.held)
        click.echo(f"{row.name:34} {f'p = 1..{max_stages}':>12} {idle:7.3f} {held:7}")
    click.echo(
        "share of the time that a stage is idle, and most micro-batches that it holds, "
        f"are those at p = {max_stages}, for {2 * max_stages} micro-batches"
    )


def variants(row: Algorithm, p: int) -> Iterator[dict[str, int]]:
    """The parameters for which an algorithm is proved; the defaults come last."""
    yield from ({"segments": segments} for segments in range(1, row.parameters.get("segments", 0)))
    yield from ({"root": root} for root in sorted({1 % p, p // 2, p - 1} - {0}) if "root" in row.parameters)
    yield {}
