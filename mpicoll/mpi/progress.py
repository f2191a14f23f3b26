"""Blocking exchanges, handles of nonblocking and persistent collectives, and the progress of all pending handles.

Progress is made by calls: every wait or poll of a handle, and every blocking collective called through mpicoll, drives
all pending handles, on all communicators, so that ranks may complete them in any order.  Calls of MPI alone do not
drive them.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from threading import Event, Lock, Thread, get_ident
from typing import Any, NoReturn, Protocol

import numpy as np
from mpi4py import MPI

from ..errors import MismatchError
from . import record
from .agreement import Comparison
from .attach import check, interrupted
from .plan import Bound


class Owner(Protocol):
    """The state of the communicator that a handle is on (``mpi.state``)."""

    name: str
    comm: MPI.Intracomm

    def check(self) -> None:
        """Raise if the communicator is unusable or was freed, so that nothing may be started."""

    def interrupt(self) -> None:
        """Mark the communicator unusable: nothing may be started on it any more."""

    def started(self, handle: "Handle", tag: int) -> None:
        """Note that a handle was started, with this tag."""

    def completed(self, tag: int) -> None:
        """Note that the handle with this tag is complete."""

    def retain(self) -> None:
        """Add a user of the private communicator."""

    def release(self) -> None:
        """Remove a user of the private communicator."""


under_way: list["Handle"] = []
"""The pending handles of our algorithms on all communicators, oldest first."""

_native_under_way: list["NativeHandle"] = []
_native_abandoned: list["NativeHandle"] = []
_abandoned: list["Handle"] = []  # after an exception: MPI may still write to their memory


def exchange(comm: MPI.Comm, bound: Bound, tag: int) -> None:
    """Send and receive the messages of one round, and wait for them."""
    recvs, sends = bound.recvs, bound.sends
    if len(recvs) == len(sends) == 1:  # one call: small messages cost what the calls cost
        (into, source), (out, dest) = recvs[0], sends[0]
        comm.Sendrecv((out, MPI.BYTE), dest, tag, (into, MPI.BYTE), source, tag)
    else:
        MPI.Request.Waitall(_post(comm, bound, tag))


def _post(comm: MPI.Comm, bound: Bound, tag: int) -> list[MPI.Request]:
    requests = [comm.Irecv((memory, MPI.BYTE), peer, tag) for memory, peer in bound.recvs]
    requests += [comm.Isend((memory, MPI.BYTE), peer, tag) for memory, peer in bound.sends]
    return requests


class Handle:
    """A nonblocking collective by one of our algorithms, as ``mpicoll.iallreduce`` returns it.

    Call ``poll()`` until it returns ``True``, or ``wait()``.  Do not read or write the arrays before.  A handle is not
    an ``MPI.Request``: progress is made in calls to mpicoll only, that is in ``poll`` and ``wait`` of any handle and in
    blocking collectives.  A rank that waits in a blocking call of MPI (``comm.Barrier()``) keeps the others waiting.

    Handles are made by ``mpicoll.iallreduce``, which is where arguments are described and checked.  If an exception or
    Ctrl-C aborts a pending handle, the communicator is unusable from then on.

    Raises
    ------
    RuntimeError
        When it is made, if MPI was initialised with less than ``MPI_THREAD_MULTIPLE``.  In ``poll`` and ``wait``, if
        the collective was aborted, or MPI does not take calls from this thread.
    MismatchError
        In ``poll`` and ``wait`` on all ranks, if they did not make the same call.
    """

    def __init__(
        self,
        state: Owner,
        bounds: Iterator[Bound],
        tag: int,
        result: Any = None,
        deliver: Iterable[Callable[[], None]] = (),
        comparison: Comparison | None = None,
    ) -> None:
        state.check()
        if _thread_level != MPI.THREAD_MULTIPLE:  # see driving(); refused here, where all ranks are
            raise RuntimeError(
                "handles of our algorithms need MPI_THREAD_MULTIPLE, mpi4py's default: set mpi4py.rc.thread_level = "
                "'multiple' before the first import of mpi4py.MPI, or use algorithm='native'"
            )
        self._state, self._tag = state, tag
        self._result, self._deliver = result, tuple(deliver)
        self._lock = Lock()  # held by the thread that makes progress
        self._bound: Bound | Comparison | None = None
        self._requests: list[Any] = []
        self._error: BaseException | None = None
        self._begin(bounds, comparison)

    def poll(self) -> bool:
        """Make progress without waiting, and return whether the collective is complete.

        Returns
        -------
        ``True`` if the result is in the arrays, which may then be used again.

        Raises
        ------
        RuntimeError, MismatchError
            As for the class.
        """
        check_thread()
        with _all_or_none():
            advance_all()
        self._raise_if_abandoned()
        return self._bound is None

    def wait(self) -> Any:
        """Wait until the collective is complete.

        Returns
        -------
        The array, or list of arrays, that was passed to the call and now holds the result.

        Raises
        ------
        RuntimeError, MismatchError
            If the collective was aborted, or ranks did not make the same call.
        """
        check_thread()
        with _all_or_none(), record.during("waiting for a handle of ours", self._state):
            while self._bound is not None:
                self._raise_if_abandoned()
                if under_way == [self]:
                    self._advance(wait=True)
                elif not advance_all():
                    time.sleep(0)  # others may need this core
        self._raise_if_abandoned()
        return self._result

    def abandon(self, error: BaseException) -> None:
        """Abort the handle because of ``error``: its messages stay in flight, and the communicator becomes unusable."""
        self._error = error
        self._state.interrupt()
        if self in under_way:
            under_way.remove(self)
            _abandoned.append(self)

    def _raise_if_abandoned(self) -> None:
        if self._error is not None:
            _raise_interrupted(self._error)

    def _begin(self, bounds: Iterator[Bound], comparison: Comparison | None = None) -> None:
        self._bounds = bounds
        with self._lock, _guarding(self):
            self._state.started(self, self._tag)
            under_way.append(self)
            if comparison is None:
                self._next_round()
            else:  # nothing is sent before it is known to match
                self._bound, self._requests = comparison, [comparison.request]

    def _advance(self, wait: bool = False) -> bool:
        """Start the next rounds whose messages have arrived, or ``wait`` for all; return whether there was progress."""
        if not self._lock.acquire(blocking=wait):
            return False  # another thread drives this handle
        progressed = False
        try:
            inside(True)
            with _guarding(self):
                while self._bound is not None and self._error is None:
                    if wait:
                        MPI.Request.Waitall(self._requests)
                    elif not MPI.Request.Testall(self._requests):
                        break
                    self._bound.after()
                    self._next_round()
                    progressed = True
        finally:
            self._lock.release()
            inside(False)
        return progressed

    def _next_round(self) -> None:
        for bound in self._bounds:
            bound.before()
            self._bound = bound
            self._requests = self._post(bound)
            if self._requests:
                return
            bound.after()
        for deliver in self._deliver:
            deliver()
        under_way.remove(self)
        self._bound = None
        self._state.completed(self._tag)

    def _post(self, bound: Bound) -> list[Any]:
        return _post(self._state.comm, bound, self._tag)


def _raise_interrupted(error: BaseException) -> NoReturn:
    if isinstance(error, MismatchError):
        raise error
    raise RuntimeError(f"this collective was interrupted by an exception: {error!r}") from error


@contextmanager
def _all_or_none() -> Iterator[None]:
    """Abort all pending handles on Ctrl-C, which may come between any two steps of any of them."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as error:
        for handle in list(under_way):
            handle.abandon(error)
        raise


@contextmanager
def _guarding(handle: Handle) -> Iterator[None]:
    """Ignore floating-point conditions, which are results, and abort the handle on any exception."""
    try:
        with np.errstate(all="ignore"):
            yield
    except BaseException as error:
        handle.abandon(error)
        raise


class PersistentHandle(Handle):
    """A persistent collective, as ``mpicoll.allreduce_init`` returns it: set up once for one array, started many times.

    Call ``start()`` and then ``wait()`` (or ``poll()`` until it returns ``True``), any number of times, and ``free()``
    at the end.  It keeps its memory and its MPI requests, so that starting it allocates nothing.
    """

    def __init__(self, state: Owner, bounds: Iterator[Bound], tag: int, result: Any) -> None:
        super().__init__(state, iter(()), tag, result)
        self._started = False
        self._rounds: list[Bound] | None = list(bounds)
        self._made = [self._persistent_requests(bound) for bound in self._rounds]
        state.retain()

    def start(self) -> "PersistentHandle":
        """Start the collective with what the array holds now.

        All ranks must start their persistent collectives on a communicator in the same order.

        Returns
        -------
        The handle itself.

        Raises
        ------
        RuntimeError
            If it is pending or was freed, or the communicator is unusable.
        """
        if self._rounds is None:
            raise RuntimeError("this persistent collective was freed")
        super()._raise_if_abandoned()
        if self._bound is not None:
            raise RuntimeError("this persistent collective is pending: wait for it first")
        self._state.check()
        self._started = True
        self._requests_of = iter(self._made)
        self._begin(iter(self._rounds))
        return self

    def _raise_if_abandoned(self) -> None:
        if not self._started:
            raise RuntimeError("this persistent collective was not started: start() it first")
        super()._raise_if_abandoned()

    def free(self) -> None:
        """Free its requests and its memory.

        Raises
        ------
        RuntimeError
            If it is pending.
        """
        if self._error is not None:
            return  # MPI may still be using the requests
        if self._bound is not None:
            raise RuntimeError("this persistent collective is pending: wait for it first")
        if self._rounds is not None:
            for requests in self._made:
                for request in requests:
                    request.Free()
            self._made, self._rounds = [], None
            self._state.release()

    def _post(self, bound: Bound) -> list[Any]:
        requests = next(self._requests_of)
        MPI.Prequest.Startall(requests)
        return requests

    def _persistent_requests(self, bound: Bound) -> list[MPI.Prequest]:
        comm, tag = self._state.comm, self._tag
        recvs = [comm.Recv_init((memory, MPI.BYTE), peer, tag) for memory, peer in bound.recvs]
        return recvs + [comm.Send_init((memory, MPI.BYTE), peer, tag) for memory, peer in bound.sends]


class NativeHandle:
    """A nonblocking collective of the MPI library, with the methods of ``Handle``; any MPI call drives it."""

    def __init__(
        self,
        requests: list[MPI.Request],
        keep: Any,
        result: Any,
        deliver: Iterable[Callable[[], None]],
        comparison: Comparison | None = None,
    ) -> None:
        self._requests, self._result, self._deliver = requests, result, tuple(deliver)
        self._comparison = comparison
        self._keep = keep  # mpi4py's nonblocking reductions let go of their buffers and operation
        self._lock = Lock()
        self._error: BaseException | None = None
        for other in list(_native_under_way):  # complete handles that nobody waits for
            with suppress(Exception):  # raised again by their own poll and wait
                other._test()
        _native_under_way.append(self)

    def poll(self) -> bool:
        """Return whether the collective is complete: the result is then in the arrays.

        Raises
        ------
        RuntimeError, MismatchError
            If the collective was aborted, or ranks did not make the same call.
        """
        check_thread()
        with _all_or_none():
            advance_all()
        return self._test()

    def wait(self) -> Any:
        """Wait until the collective is complete.

        Returns
        -------
        The array, or list of arrays, that was passed to the call and now holds the result.

        Raises
        ------
        RuntimeError, MismatchError
            If the collective was aborted, or ranks did not make the same call.
        """
        check_thread()
        with record.during("waiting for a handle of the MPI library"):
            while not self._test(wait=not under_way):
                with _all_or_none():
                    if not advance_all():
                        time.sleep(0)
        return self._result

    def _test(self, wait: bool = False) -> bool:
        if self._error is not None:
            _raise_interrupted(self._error)
        if self not in _native_under_way:
            return True
        if not self._lock.acquire(blocking=False):
            return False  # another thread drives this handle
        try:
            if self not in _native_under_way:
                return True
            if self._comparison is not None:
                if wait:
                    self._comparison.request.Wait()
                elif not self._comparison.request.Test():
                    return False
                self._comparison.after()
                self._comparison = None
            if wait:
                MPI.Request.Waitall(self._requests)
            elif not MPI.Request.Testall(self._requests):
                return False
            _native_under_way.remove(self)  # first, so that what follows is done once
            for deliver in self._deliver:
                deliver()
            self._keep = None
            return True
        except BaseException as error:
            self._error = error
            if self in _native_under_way:
                _native_under_way.remove(self)
                _native_abandoned.append(self)
            raise
        finally:
            self._lock.release()


class driving:  # noqa: N801  (a class: a generator would take a microsecond more of every call)
    """Guard a blocking call of the MPI library on ``comm``: a thread drives the pending handles meanwhile.

    Raises ``RuntimeError`` if a collective on ``comm`` was aborted.
    """

    __slots__ = ("returned", "thread")

    def __init__(self, comm: MPI.Comm) -> None:
        if interrupted:
            check(comm)
        self.thread: Thread | None = None

    def __enter__(self) -> None:
        if under_way:
            advance_all()
        if not under_way:
            return
        self.returned = Event()
        self.thread = Thread(target=self._drive, name="mpicoll-driving", daemon=True)
        self.thread.start()

    def __exit__(self, *error: object) -> None:
        if self.thread is not None:
            self.returned.set()
            self.thread.join()

    def _drive(self) -> None:
        while under_way and not self.returned.wait(0.0002):
            advance_all()


def advance_all() -> bool:
    """Drive all pending handles once, and return whether there was progress.

    An exception is kept by the handle that it belongs to, and raised by its ``poll`` and ``wait``.
    """
    progressed = False
    for handle in list(under_way):
        with suppress(Exception):
            progressed = handle._advance() or progressed
    return progressed


# Threads: MPI says once which calls it takes from which thread.

_thread_level: int | None = None
_thread_inside: int | None = None


def check_thread() -> None:
    """Raise ``RuntimeError`` if MPI does not take calls from this thread, or not while another thread is in a call."""
    global _thread_level
    if _thread_level is None:
        _thread_level = MPI.Query_thread()
    if _thread_level < MPI.THREAD_SERIALIZED and not MPI.Is_thread_main():
        raise RuntimeError(
            "MPI was initialised for calls from its main thread only (MPI_THREAD_FUNNELED or less): make this call "
            "there, or set mpi4py.rc.thread_level = 'multiple' before the first import of mpi4py.MPI"
        )
    if _thread_level == MPI.THREAD_SERIALIZED and _thread_inside not in (None, get_ident()):
        raise RuntimeError(
            "MPI was initialised for one thread at a time (MPI_THREAD_SERIALIZED) and another one is in a collective: "
            "take turns, or set mpi4py.rc.thread_level = 'multiple' before the first import of mpi4py.MPI"
        )


def inside(entering: bool) -> None:
    """Note that this thread enters or leaves a call that sends messages of our algorithms."""
    global _thread_inside
    _thread_inside = get_ident() if entering else None
