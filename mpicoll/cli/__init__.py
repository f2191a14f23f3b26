"""The command line: parsing and printing only."""

import os
import signal
import sys
import time
import traceback
import warnings
from contextlib import suppress
from typing import Any, TextIO

from ..errors import UserError
from ..mpi.launch import launched_rank, launched_ranks


def main(args: list[str] | None = None) -> int:
    """Run ``mpicoll ARGS``; returns the exit status (see ``mpicoll --help``)."""
    if launched_ranks() > 1:  # an exception may get lost in an import; commands that can handle Ctrl-C do so later
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    if launched_rank() > 0 or sys.stdout is None:  # None: it is closed
        sys.stdout = _nowhere()  # rank 0 speaks
    if sys.stderr is None:
        sys.stderr = _nowhere()
    warnings.showwarning = _warn  # type: ignore[assignment]
    try:
        status = _run(args)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        _fail("interrupted", 130)
        if launched_rank() > 0:
            time.sleep(1)  # likewise
        os._exit(130)  # not through MPI's finalization, which would wait for the other ranks
    except BrokenPipeError:  # the reader of a pipe has seen enough
        sys.stdout = _nowhere()
        return 1
    except OSError as error:
        sys.stdout = _nowhere()
        return _fail(f"cannot write the output: {error.strerror}", 1)


def _run(args: list[str] | None) -> int:
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
        message = " ".join(error.format_message().split()).rstrip(".")
        return _fail(f"{message} (see {command} --help)", 2)
    except click.Abort:
        raise KeyboardInterrupt from None
    except UserError as error:
        if os.environ.get("MPICOLL_TRACEBACK"):
            traceback.print_exc()
        return _fail(str(error), 1)


def _warn(message: Warning | str, *where: Any) -> None:
    """Print a warning as one line, without the place in the code that it comes from."""
    print(f"mpicoll: {message}", file=sys.stderr, flush=True)


def _nowhere() -> TextIO:
    return open(os.devnull, "w", encoding="utf-8", errors="surrogateescape")


def _fail(message: str, status: int) -> int:
    if launched_rank() == 0:
        with suppress(OSError):
            sys.stdout.flush()
        print(f"mpicoll: {message}", file=sys.stderr, flush=True)
    else:  # some launchers end the job, rank 0 included, when the first process fails: let rank 0 speak
        time.sleep(0.4)
    return status
