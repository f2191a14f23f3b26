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
from typing import NoReturn, TypeVar

from mpi4py import MPI

from ..errors import UserError

T = TypeVar("T")

INTERRUPTED = 130  # exit status after Ctrl-C, as shells have it
LEAVE = 1.0  # seconds for the main thread to leave properly after Ctrl-C
ARRIVE = 5.0  # seconds for all ranks to raise an error that all should raise


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
        comm.Barrier()  # raise it together, however late some ranks come
        raise error
    return value


@contextmanager
def ends_job(comm: MPI.Intracomm) -> Iterator[None]:
    """Within it, an exception on one rank ends the whole job instead of leaving the others waiting.

    A ``UserError`` is expected to be raised by all ranks, and passes on once they all did; if they do not within
    ``ARRIVE`` seconds, or for any other exception, the rank's traceback goes to standard error and the job is aborted
    with status 1 (that of ``sys.exit`` if this is what was raised).  After Ctrl-C or SIGTERM the job ends with
    status 130, even if this rank is inside MPI for ever.  Entering and leaving are collective calls.
    """
    own = comm.Dup()  # so that no barrier of ours can meet one of the program's
    with _exits_after_interrupt(comm.rank):
        try:
            yield
        except UserError:
            if not _all_arrive(own):
                _abort(comm, 1)
            raise
        except KeyboardInterrupt:
            _exit_interrupted(comm.rank)
        except SystemExit as leaving:
            _abort(comm, leaving.code if isinstance(leaving.code, int) else 1)
        except BaseException:
            _abort(comm, 1)
    own.Free()


def _all_arrive(comm: MPI.Intracomm) -> bool:
    request = comm.Ibarrier()
    deadline = time.monotonic() + ARRIVE
    while not request.Test():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def _abort(comm: MPI.Intracomm, status: int) -> NoReturn:
    text = f"mpicoll: rank {comm.rank} failed:\n{traceback.format_exc()}"
    print(text, file=sys.stderr, end="", flush=True)
    comm.Abort(status)
    os._exit(status)  # some MPIs return while the launcher is still ending the job


def _exit_interrupted(rank: int) -> NoReturn:
    if rank == 0:
        print("mpicoll: interrupted", file=sys.stderr, flush=True)
    else:
        time.sleep(1.5 * LEAVE)  # the first process to exit takes the others along: rank 0 must have spoken
    os._exit(INTERRUPTED)


@contextmanager
def _exits_after_interrupt(rank: int) -> Iterator[None]:
    """Python handles a signal only between bytecodes, and so never while this rank waits inside MPI: a thread that
    is woken by the C-level handler gives the main thread time to leave properly, and then ends the process."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    wake, woken = socket.socketpair()
    wake.setblocking(False)
    left = threading.Event()

    def watch() -> None:
        while received := woken.recv(1):  # nothing once the other end is closed
            if received[0] in (signal.SIGINT, signal.SIGTERM) and not left.wait(LEAVE):
                _exit_interrupted(rank)
        woken.close()

    threading.Thread(target=watch, name="mpicoll-interrupt", daemon=True).start()
    before = signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
    # SIGTERM is what Open MPI's launcher makes of Ctrl-C, and batch systems of a time limit.
    interrupt = signal.signal(signal.SIGINT, signal.default_int_handler)
    terminate = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        left.set()
        signal.signal(signal.SIGINT, interrupt)
        signal.signal(signal.SIGTERM, terminate)
        signal.set_wakeup_fd(before)
        wake.close()
