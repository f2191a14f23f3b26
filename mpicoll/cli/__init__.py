"""The command line: parsing and printing only."""

import os
import sys
import traceback

from ..errors import UserError
from ..mpi.launch import launched_rank


def main(args: list[str] | None = None) -> int:
    """Run ``mpicoll ARGS``; returns the exit status (see ``mpicoll --help``)."""
    if launched_rank() > 0 or sys.stdout is None:  # None: it is closed
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # rank 0 speaks
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    try:
        import click

        from .app import app
    except ModuleNotFoundError as error:
        return _fail(f"the command line needs {error.name}: pip install 'mpicoll[train]'", 1)
    try:
        status = app.main(args, prog_name="mpicoll", standalone_mode=False)
        return status if isinstance(status, int) else 0
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "mpicoll"
        return _fail(f"{error.format_message().rstrip('.')} (see {command} --help)", 2)
    except (click.Abort, KeyboardInterrupt):
        return _fail("interrupted", 130)
    except BrokenPipeError:  # the reader of a pipe has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except UserError as error:
        if os.environ.get("MPICOLL_TRACEBACK"):
            traceback.print_exc()
        return _fail(str(error), 1)


def _fail(message: str, status: int) -> int:
    if launched_rank() == 0:
        sys.stdout.flush()
        print(f"mpicoll: {message}", file=sys.stderr, flush=True)
    return status
