"""One job, one outcome: ranks fail together, and a rank that fails alone ends the job."""

import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from mpi4py import MPI

from ..errors import UserError

T = TypeVar("T")

_wake: list[socket.socket] = []  # kept open for the life of the process

INTERRUPTED = 130  # exit status after Ctrl-C, as shells have it
GRACE = 1.0  # seconds that something expected from other ranks, or another thread, is waited for


def on_root(comm: MPI.Intracomm, action: Callable[[], T]) -> T:
    """Do ``action`` on rank 0: every rank gets what it returns, or raises the ``UserError`` it raises."""
    value: T | None = None
    error: UserError | None = None
    if comm.rank == 0:
        try:
            value = action()
        except UserError as raised:
            error = raised
    value, error = comm.bcast((value, error))
    if error is not None:
        raise error
    return value


@contextmanager
def ends_job(comm: MPI.Intracomm) -> Iterator[None]:
    """Within it, an exception on one rank ends the whole job instead of leaving the others waiting.

    A ``UserError`` is expected to be raised by all ranks and passes on once they all did; if they do not within
    ``GRACE`` seconds, or for any other exception, the rank's traceback goes to standard error and the job is
    aborted with status 1.  After Ctrl-C it ends with status 130, even if this rank is inside MPI for ever.
    """
    _exit_after_interrupt(comm.rank)
    try:
        yield
    except UserError:
        if not _all_arrive(comm):
            _abort(comm)
        raise
    except KeyboardInterrupt:
        _exit_interrupted(comm.rank)
    except Exception:
        _abort(comm)


def _all_arrive(comm: MPI.Intracomm) -> bool:
    request = comm.Ibarrier()
    deadline = time.monotonic() + GRACE
    while not request.Test():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def _abort(comm: MPI.Intracomm) -> None:
    text = f"mpicoll: rank {comm.rank} failed:\n{traceback.format_exc()}"
    print(text, file=sys.stderr, end="", flush=True)
    comm.Abort(1)


def _exit_interrupted(rank: int) -> None:
    if rank == 0:
        print("mpicoll: interrupted", file=sys.stderr, flush=True)
    else:
        time.sleep(1.5 * GRACE)  # the first process to exit takes the others along: rank 0 must have spoken
    os._exit(INTERRUPTED)


def _exit_after_interrupt(rank: int) -> None:
    """Python handles a signal only between bytecodes, and so never while this rank waits inside MPI: a thread that
    is woken by the C-level handler gives the main thread time to leave properly, and then ends the process."""
    if _wake or threading.current_thread() is not threading.main_thread():
        return
    wake, woken = socket.socketpair()
    wake.setblocking(False)
    signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
    _wake.append(wake)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what Open MPI's launcher makes of Ctrl-C

    def watch() -> None:
        while woken.recv(1)[0] not in (signal.SIGINT, signal.SIGTERM):
            pass
        time.sleep(GRACE)
        _exit_interrupted(rank)

    threading.Thread(target=watch, name="mpicoll-interrupt", daemon=True).start()
