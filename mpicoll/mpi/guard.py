"""One job, one outcome: ranks fail together, and a rank that fails alone ends the job."""

import atexit
import os
import signal
import socket
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from mpi4py import MPI

from ..errors import MismatchError, UserError
from .launch import hints
from .watch import LIMIT, Watch, flush

T = TypeVar("T")

INTERRUPTED = 130  # exit status after Ctrl-C, as shells have it
LEAVE = 1.0  # seconds for the main thread to leave properly after Ctrl-C
FORWARD = 0.2  # seconds for the launcher to pass on what was printed: MPICH's may lose it when the job is aborted
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


def on_all(comm: MPI.Intracomm, action: Callable[[], T]) -> T:
    """Do ``action`` on every rank: each gets what its own returns; if any raises a ``UserError``, all raise the one of
    the lowest such rank, which is named unless it is rank 0."""
    value: T | None = None
    error: UserError | None = None
    try:
        value = action()
    except UserError as raised:
        error = raised
    failed = [(rank, error) for rank, error in enumerate(comm.allgather(error)) if error is not None]
    if failed:
        comm.Barrier()  # raise it together, however late some ranks come
        rank, first = failed[0]
        raise UserError(f"{first} (on rank {rank})" if rank else str(first)) from error
    return value  # type: ignore[return-value]


class Guard:
    """What ``mpicoll.guard`` returns: in force at once, until the end of the program, or of a ``with`` block."""

    def __init__(self, limit: float, folder: Path | None) -> None:
        self._held = ExitStack()
        self._comm = MPI.COMM_WORLD
        self._watch = Watch(self._comm, limit, folder) if limit else None
        self._process = os.getpid()
        self._status: Any = None  # what sys.exit was given
        self._hooks = hook, thread_hook, leave = sys.excepthook, threading.excepthook, sys.exit

        def uncaught(kind: type[BaseException], error: BaseException, trace: Any) -> None:
            if os.getpid() == self._process:
                self._end(error)
            hook(kind, error, trace)

        def uncaught_in_thread(args: Any) -> None:
            if os.getpid() == self._process and args.exc_type is not SystemExit:
                self._end(args.exc_value, args.thread)
            thread_hook(args)

        def leaving(status: Any = None) -> NoReturn:
            if threading.current_thread() is threading.main_thread():
                self._status = status
            leave(status)

        sys.excepthook, threading.excepthook, sys.exit = uncaught, uncaught_in_thread, leaving
        self._held.enter_context(_exits_after_interrupt(self._comm.rank, handled=True))
        atexit.register(self._leave)

    def __enter__(self) -> "Guard":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is not None:
            self._end(error)
        self.release()

    def release(self) -> None:
        """Let go: from now on a rank that fails leaves the others waiting, as in any MPI program."""
        sys.excepthook, threading.excepthook, sys.exit = self._hooks
        self._held.close()
        atexit.unregister(self._leave)
        if self._watch:
            self._watch.stop()

    def _leave(self) -> None:
        if self._watch and os.getpid() == self._process:
            self._watch.leave(status=_status_of(self._status))

    def _end(self, error: BaseException | None, thread: threading.Thread | None = None) -> None:
        if isinstance(error, KeyboardInterrupt):
            _exit_interrupted(self._comm.rank)
        if isinstance(error, SystemExit):
            if _status_of(error.code):
                _abort(self._comm, _status_of(error.code), error)
            return
        _abort(self._comm, 1, error, thread, self._watch)


def guard(timeout: float | None = None, report: str | os.PathLike[str] | None = None) -> Guard:
    """End the whole job when a rank fails, instead of leaving the others waiting for it.

    One line at the beginning of a program, on all ranks (it is a collective call on ``MPI.COMM_WORLD``), or
    ``with mpicoll.guard():`` around a part of it.

    * An exception that nobody catches, in whatever thread, is told with its traceback, and the job aborted (status 1).
    * Ctrl-C and SIGTERM raise ``KeyboardInterrupt``, which the program may handle; if nobody does, or if this rank does
      not come to it within a second because it waits inside MPI, the job ends with status 130.  Handlers that the
      program sets later are left to do their work.
    * A call of ours that takes longer than ``timeout`` seconds, or for 3 seconds waits for a rank that has left the
      program before that call, ends it with status 124 (that of ``sys.exit``, if the rank left by that and it is not 0)
      and an account of all ranks of the node: in which call each is, or after which, since when, and where in the
      program; with a folder for reports that all nodes see, of those of other nodes too.

    Of more ranks than cores, and less thread support than asked for, rank 0 warns (``RuntimeWarning``).

    Parameters
    ----------
    timeout
        Seconds; 0 for no limit. By default ``MPICOLL_TIMEOUT``, else 600. Rank 0's counts.
    report
        A folder for the stacks and the last calls of each rank, a file for each, if the job is ended. By default
        ``MPICOLL_REPORT``, else none.

    Only calls that are recorded have a limit: those of our functions, and of all blocking methods of a ``Comm``, but
    not small ones that go to the MPI library with ``check="off"``; and not those of mpi4py's own communicators.
    """
    given: Any = (os.environ.get("MPICOLL_TIMEOUT") or LIMIT) if timeout is None else timeout
    report = report or os.environ.get("MPICOLL_REPORT")
    given, folder = MPI.COMM_WORLD.bcast((given, report and os.path.abspath(report)))
    try:
        limit = float(given)
    except (TypeError, ValueError):
        limit = -1.0
    if not limit >= 0:
        raise ValueError(f"timeout must be a number of seconds, 0 or more, got {given!r}")
    made = Guard(limit, Path(folder) if folder else None)
    for hint in hints(MPI.COMM_WORLD):
        warnings.warn(hint, RuntimeWarning, stacklevel=2)
    return made


@contextmanager
def ends_job(comm: MPI.Intracomm, limit: float = 0, folder: Path | None = None) -> Iterator[None]:
    """Within it, an exception on one rank ends the whole job instead of leaving the others waiting.

    A ``UserError`` is expected to be raised by all ranks, and passes on once they all did; if they do not within
    ``ARRIVE`` seconds, or for any other exception, the rank's traceback goes to standard error and the job is aborted
    with status 1 (that of ``sys.exit`` if this is what was raised).  After Ctrl-C or SIGTERM the job ends with
    status 130, even if this rank is inside MPI for ever.  Calls longer than ``limit`` seconds end it as ``guard`` does.
    Entering and leaving are collective calls.
    """
    own = comm.Dup()  # so that no barrier of ours can meet one of the program's
    watch = Watch(own, limit, folder) if limit else None
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
            _abort(comm, _status_of(leaving.code) or 1)
        except BaseException as error:
            _abort(comm, 1, error, watch=watch)
        finally:
            if watch:
                watch.stop()
    own.Free()


def _status_of(code: Any) -> int:
    """What a process ends with after ``sys.exit(code)``."""
    return 0 if code is None else code & 0xFF if isinstance(code, int) else 1


def _all_arrive(comm: MPI.Intracomm) -> bool:
    request = comm.Ibarrier()
    deadline = time.monotonic() + ARRIVE
    while not request.Test():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def _abort(
    comm: MPI.Intracomm,
    status: int,
    error: BaseException | None = None,
    thread: threading.Thread | None = None,
    watch: Watch | None = None,
) -> NoReturn:
    if isinstance(error, MismatchError) and comm.rank:
        time.sleep(2 * FORWARD)  # all ranks raise the same: it is enough that rank 0 tells
    told = "".join(traceback.format_exception(error)) if error else traceback.format_exc()
    where = f" in {thread.name}" if thread else ""
    print(f"mpicoll: rank {comm.rank} failed{where}:\n{told}", file=sys.stderr, end="", flush=True)
    time.sleep(FORWARD)
    if watch is not None and watch.folder is not None:
        watch.collect(status)
    if MPI.Query_thread() == MPI.THREAD_MULTIPLE or threading.current_thread() is threading.main_thread():
        comm.Abort(status)
    os._exit(status)  # some MPIs return while the launcher is still ending the job


def _exit_interrupted(rank: int) -> NoReturn:
    flush()
    if rank == 0:
        print("mpicoll: interrupted", file=sys.stderr, flush=True)
    else:
        time.sleep(1.5 * LEAVE)  # the first process to exit takes the others along: rank 0 must have spoken
    os._exit(INTERRUPTED)


@contextmanager
def _exits_after_interrupt(rank: int, handled: bool = False) -> Iterator[None]:
    """Python handles a signal only between bytecodes, and so never while this rank waits inside MPI: a thread that
    is woken by the C-level handler gives the main thread time to leave properly, and then ends the process.

    If ``handled``, it is enough that the main thread has come to handle the signal: the program knows what to do then.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    wake, woken = socket.socketpair()
    wake.setblocking(False)
    left, process = threading.Event(), os.getpid()

    def handle(number: int, frame: Any) -> None:
        if handled:
            left.set()
        raise KeyboardInterrupt

    def watch() -> None:
        while received := woken.recv(1):  # nothing once the other end is closed
            ours = received[0] in (signal.SIGINT, signal.SIGTERM) and signal.getsignal(received[0]) is handle
            if ours and not left.wait(LEAVE):
                _exit_interrupted(rank)
            if handled:
                left.clear()
        woken.close()

    def in_child() -> None:  # of a fork: its signals are its own affair
        if not done and os.getpid() != process:
            signal.set_wakeup_fd(-1)
            for number, action in ((signal.SIGINT, interrupt), (signal.SIGTERM, terminate)):
                if signal.getsignal(number) is handle:
                    signal.signal(number, action)

    done: list[bool] = []

    threading.Thread(target=watch, name="mpicoll-interrupt", daemon=True).start()
    before = signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
    # SIGTERM is what Open MPI's launcher makes of Ctrl-C, and batch systems of a time limit.
    interrupt = signal.signal(signal.SIGINT, handle)
    terminate = signal.signal(signal.SIGTERM, handle)
    os.register_at_fork(after_in_child=in_child)
    try:
        yield
    finally:
        left.set()
        done.append(True)
        for number, action in ((signal.SIGINT, interrupt), (signal.SIGTERM, terminate)):
            if signal.getsignal(number) is handle:
                signal.signal(number, action)
        with suppress(OSError, ValueError):  # guards may be released in another order than they were made
            signal.set_wakeup_fd(before)
        wake.close()
