"""``mpicoll report``: a comparison of the reports that the ranks of a job wrote when it was ended."""

from pathlib import Path

import click

from ..errors import UserError
from ..mpi.record import compare


@click.command(short_help="Compare the reports of a job that was ended.")
@click.argument("folder", type=click.Path(path_type=Path))
def report(folder: Path) -> None:
    """Compare the reports in FOLDER, which mpicoll.guard(report=FOLDER) or MPICOLL_REPORT named.

    For each communicator: the calls that match on all ranks, and from the first that does not, who made which, who
    waits in it and for how long, and who has not come to it.  The stacks of each rank are in FOLDER/rank-N.txt.
    """
    try:
        lines = compare(folder)
    except ValueError as error:
        raise UserError(str(error)) from error
    click.echo("\n".join(lines))
