"""One job, one outcome: ranks fail together, and a rank that fails alone ends the job."""

import atexit
import math
import os
import select
import signal
import socket
import sys
import threading
import time
import traceback
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

from mpi4py import MPI

from ..errors import MismatchError, UserError
from ..mpi.launch import check, hints
from .watch import LIMIT, Watch, flush, start_watch

INTERRUPTED = 130  # exit status after Ctrl-C, as in shells
LEAVE = 1.0  # seconds for the main thread to leave properly after Ctrl-C
FORWARD = 0.2  # seconds for the launcher to pass on what was printed: MPICH's may lose it when the job is aborted
ARRIVE = 5.0  # seconds for all ranks to raise an error that all should raise


class Guard:
    """What ``mpicoll.guard`` returns: in force at once, to the end of the program, or of a ``with`` block."""

    def __init__(
        self,
        comm: MPI.Intracomm,
        watch: Watch | None,
        handled: bool = True,
        advice: Callable[[], str] = lambda: "",
    ) -> None:
        self.advice = advice  # for the end of the last line
        self.comm, self.rank, self.watch = comm, comm.rank, watch  # the rank is printed after MPI is finalized, too
        self.handled = handled  # Ctrl-C: it is enough that the program handles it
        _in_force.append(self)
        if len(_in_force) == 1:
            _hooks.install()

    def __enter__(self) -> "Guard":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is not None and not isinstance(error, GeneratorExit) and self in _in_force:
            self.end(error)
        self.release()

    def release(self) -> None:
        """Guard no longer: from now on a rank that fails leaves the others waiting, as in any MPI program."""
        if self not in _in_force:
            return  # released before, or by a fork
        _in_force.remove(self)
        if not _in_force:
            _hooks.remove()
        if self.watch:
            self.watch.stop()

    def end(self, error: BaseException | None, thread: threading.Thread | None = None) -> None:
        """End the job, because nobody has caught this exception; after MPI is finalized there is no job to end."""
        if MPI.Is_finalized():
            if not isinstance(error, SystemExit):
                print(f"mpicoll: rank {self.rank} failed after MPI was finalized", file=sys.stderr, flush=True)
        elif isinstance(error, KeyboardInterrupt):
            _exit_interrupted(self)
        elif not isinstance(error, SystemExit):
            _abort(self.comm, 1, error, thread, self.watch)
        elif _status_of(error.code):
            _abort(self.comm, _status_of(error.code), error)


_in_force: list[Guard] = []
"""The guards in force in this process, the newest last."""


class _Hooks:
    """Handlers of exceptions, signals and the end of the program while guards are in force.

    The first guard installs them, and the last that is released removes them, except those that the program has
    replaced meanwhile.

    Python handles a signal only between bytecodes, and so never while this rank waits inside MPI: a thread that is
    woken by the C-level handler gives the main thread time to leave properly, and then ends the process.  If all guards
    are ``handled``, it is enough that the main thread comes to handle the signal: the program knows what to do then.
    """

    def __init__(self) -> None:
        self._replaced: list[tuple[Any, str, Any, Any]] = []  # where, name, ours, the program's
        self._signals: dict[int, Any] = {}  # the program's handlers
        self._sockets: tuple[socket.socket, socket.socket] | None = None
        self._wakeup, self._handled, self._sees_forks = -1, 0, False
        self._status: Any = None  # what sys.exit was given
        self._raised: weakref.ref[Any] | None = None  # attribute of the exception that was raised

    def install(self) -> None:
        """Install all handlers; those of signals in the main thread only, as Python demands."""
        hook, thread_hook, leave = sys.excepthook, threading.excepthook, sys.exit

        def uncaught(kind: type[BaseException], error: BaseException, trace: Any) -> None:
            if _in_force:
                _in_force[-1].end(error)
            hook(kind, error, trace)

        def uncaught_in_thread(args: Any) -> None:
            if _in_force and args.exc_type is not SystemExit:
                _in_force[-1].end(args.exc_value, args.thread)
            thread_hook(args)

        def leaving(status: Any = None) -> NoReturn:
            try:
                leave(status)
            except SystemExit as error:
                if threading.current_thread() is threading.main_thread():
                    self._remember(error)
                raise

        ours = ((sys, "excepthook", uncaught), (threading, "excepthook", uncaught_in_thread), (sys, "exit", leaving))
        for where, name, hooked in ours:
            self._replaced.append((where, name, hooked, getattr(where, name)))
            setattr(where, name, hooked)
        atexit.register(self._at_exit)
        if not self._sees_forks:
            os.register_at_fork(after_in_child=self._in_child)
            self._sees_forks = True
        if threading.current_thread() is threading.main_thread() and self._sockets is None:
            self._sockets = wake, woken = socket.socketpair()
            wake.setblocking(False)
            woken.setblocking(False)
            threading.Thread(target=self._wait, args=(wake, woken), name="mpicoll-interrupt", daemon=True).start()
            self._wakeup = signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
            # SIGTERM is what Open MPI's launcher makes of Ctrl-C, and batch systems of a time limit.
            self._signals = {number: signal.signal(number, self.handle) for number in (signal.SIGINT, signal.SIGTERM)}

    def remove(self) -> None:
        """Remove the handlers that are still ours."""
        for where, name, ours, before in self._replaced:
            if getattr(where, name) is ours:
                setattr(where, name, before)
        self._replaced.clear()
        atexit.unregister(self._at_exit)
        if threading.current_thread() is threading.main_thread() and self._sockets is not None:
            (wake, _), self._sockets = self._sockets, None
            for number, before in self._signals.items():
                if signal.getsignal(number) == self.handle:
                    signal.signal(number, before)
            current = signal.set_wakeup_fd(-1)
            with suppress(OSError, ValueError):  # closed meanwhile
                signal.set_wakeup_fd(self._wakeup if current == wake.fileno() else current)
            wake.close()

    def handle(self, number: int, frame: Any) -> None:
        """Handle a signal, in the main thread."""
        if all(guard.handled for guard in _in_force):
            if self._sockets is not None:
                with suppress(OSError):  # that there is nothing
                    self._sockets[1].recv(4096)  # those that came before are handled by this as well
            self._handled += 1
        raise KeyboardInterrupt

    def _wait(self, wake: socket.socket, woken: socket.socket) -> None:
        poll = select.poll()
        poll.register(woken, select.POLLIN)
        while True:
            poll.poll()
            handled = self._handled
            try:
                received = woken.recv(4096)
            except BlockingIOError:
                continue  # handled already
            except OSError:
                return
            if not received:
                break
            if not any(n in self._signals and signal.getsignal(n) == self.handle for n in received):
                continue
            deadline = time.monotonic() + LEAVE
            while time.monotonic() < deadline and self._is_open(wake, handled):
                time.sleep(LEAVE / 50)
            if self._is_open(wake, handled):
                _exit_interrupted(_in_force[-1])
        woken.close()

    def _is_open(self, wake: socket.socket, handled: int) -> bool:
        return bool(_in_force) and self._handled == handled and self._sockets is not None and self._sockets[0] is wake

    def _remember(self, error: SystemExit) -> None:
        """Remember the status until the exception is dropped while Python code runs: the program has caught it then."""

        def forget(gone: Any) -> None:
            if self._raised is gone and sys._getframe().f_back is not None:
                self._status = None

        raised = _Raised()
        error.__dict__["_mpicoll"] = raised
        self._status, self._raised = error.code, weakref.ref(raised, forget)

    def _at_exit(self) -> None:
        for guard in reversed(_in_force):
            if guard.watch:
                guard.watch.leave(_status_of(self._status))

    def _in_child(self) -> None:
        """Release all guards in a forked child: it is no rank, and its signals are its own."""
        if _in_force:
            _in_force.clear()
            sockets = self._sockets
            self.remove()
            if sockets is not None:
                sockets[1].close()


class _Raised:
    """Stands for an exception in a weak reference, which exceptions do not support."""


_hooks = _Hooks()


def guard(timeout: float | None = None, report: str | os.PathLike[str] | None = None) -> Guard:
    """End the whole job when a rank fails, instead of leaving the others waiting for it.

    One line at the beginning of a program, on all ranks (it is a collective call on ``MPI.COMM_WORLD``), or
    ``with mpicoll.guard():`` around a part of it.

    * An exception that nobody catches, in whatever thread, or that leaves the ``with`` block, is printed with its
      traceback, and the job is aborted (status 1).
    * Ctrl-C and SIGTERM raise ``KeyboardInterrupt``, which the program may handle; if nobody does, or if this rank does
      not come to it within a second because it waits inside MPI, or computes in one long call of a library, the job
      ends with status 130.  Handlers that the program sets later are left to do their work.
    * A call of ours that takes longer than ``timeout`` seconds, or for 3 seconds waits for a rank that has left the
      program without making it, ends it with status 124 (that of ``sys.exit``, if it left by that and it is not 0)
      and an account of all ranks of the node: in which call each is, or after which, since when, and where in the
      program; with a folder for reports that all nodes see, of those of other nodes too.

    Of more ranks than cores, and less thread support than asked for, rank 0 warns (``RuntimeWarning``).

    Parameters
    ----------
    timeout
        Seconds; 0 for no limit, but for ranks that left. By default ``MPICOLL_TIMEOUT``, else 600. Rank 0's counts.
    report
        A folder for the stacks and the last calls of each rank, a file for each, if the job is ended. By default
        ``MPICOLL_REPORT``, else none.

    Only calls that are recorded have a limit: those of our functions, and of the methods of a ``Comm`` that wait
    for others, but not small ones that go to the MPI library with ``check="off"``; and not those of mpi4py's own
    communicators.
    """
    check(MPI.COMM_WORLD)
    given: Any = (os.environ.get("MPICOLL_TIMEOUT") or LIMIT) if timeout is None else timeout
    report = report or os.environ.get("MPICOLL_REPORT")
    given, folder = MPI.COMM_WORLD.bcast((given, report and os.path.abspath(report)))
    try:
        limit = float(given)
    except (TypeError, ValueError):
        limit = -1.0
    if not limit >= 0:
        raise ValueError(f"timeout must be a number of seconds, 0 or more, got {given!r}")
    watch = start_watch(MPI.COMM_WORLD, limit or math.inf, Path(folder) if folder else None)
    made = Guard(MPI.COMM_WORLD, watch)
    for hint in hints(MPI.COMM_WORLD):
        warnings.warn(hint, RuntimeWarning, stacklevel=2)
    return made


@contextmanager
def ends_job(
    comm: MPI.Intracomm, limit: float = 0, folder: Path | None = None, advice: Callable[[], str] = lambda: ""
) -> Iterator[None]:
    """Make an exception on one rank end the whole job, instead of leaving the others waiting, in a ``with`` block.

    A ``UserError`` is expected to be raised by all ranks, and passes on once they all did; if they do not within
    ``ARRIVE`` seconds, or for any other exception, the rank's traceback goes to standard error and the job is aborted
    with status 1 (that of ``sys.exit`` if this is what was raised).  After Ctrl-C or SIGTERM the job ends with
    status 130, even if this rank waits inside MPI forever.  A call longer than ``limit`` seconds ends it as in
    ``guard``.  ``advice`` returns the end of the line that is printed then.  Entering and leaving are collective calls.
    """
    own = comm.Dup()  # so that no barrier of ours can meet one of the program's
    watch = start_watch(own, limit or math.inf, folder) if limit or folder else None
    guard = Guard(own, watch, handled=False, advice=advice)
    try:
        yield
    except UserError:
        if not _all_arrive(own):
            _abort(comm, 1)
        raise
    except KeyboardInterrupt:
        _exit_interrupted(guard)
    except SystemExit as leaving:
        _abort(comm, _status_of(leaving.code) or 1)
    except BaseException as error:
        _abort(comm, 1, error, watch=watch)
    finally:
        guard.release()
    own.Free()


def _status_of(code: Any) -> int:
    """Return the exit status of a process after ``sys.exit(code)``."""
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
        time.sleep(2 * FORWARD)  # all ranks raise the same: it is enough that rank 0 prints it
    told = "".join(traceback.format_exception(error)) if error else traceback.format_exc()
    where = f" in {thread.name}" if thread else ""
    print(f"mpicoll: rank {comm.rank} failed{where}:\n{told}", file=sys.stderr, end="", flush=True)
    time.sleep(FORWARD)
    if watch is not None and watch.folder is not None:
        watch.collect(status)
    if MPI.Query_thread() == MPI.THREAD_MULTIPLE or threading.current_thread() is threading.main_thread():
        comm.Abort(status)
    os._exit(status)  # some MPIs return while the launcher is still ending the job


def _exit_interrupted(guard: Guard) -> NoReturn:
    flush()
    if (rank := guard.rank) == 0:
        print(f"mpicoll: interrupted{guard.advice()}", file=sys.stderr, flush=True)
    else:
        time.sleep(1.5 * LEAVE)  # the first process to exit takes the others along: rank 0 must have spoken
        print(f"mpicoll: rank {rank} interrupted", file=sys.stderr, flush=True)  # alone, then
        time.sleep(FORWARD)
    os._exit(INTERRUPTED)
