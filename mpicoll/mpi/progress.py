"""Messages of our algorithms, at once or step by step: handles, and what drives them.

Progress is made by calls: every wait or poll of a handle, and every blocking collective called through mpicoll, drives
all handles that are under way, on whatever communicator, so that ranks may complete them in any order.  MPI's own
calls do not drive ours.
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
        """Raise if nothing may be started."""

    def interrupt(self) -> None:
        """Nothing may be started any more."""

    def started(self, handle: "Handle", tag: int) -> None:
        """A handle is under way."""

    def completed(self, tag: int) -> None:
        """It is complete."""

    def retain(self) -> None:
        """There is one more user of the private communicator."""

    def release(self) -> None:
        """There is one less."""


under_way: list["Handle"] = []
"""Handles of ours started and not complete, oldest first, of all communicators."""

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
    """A nonblocking collective: ``poll()`` until it is ``True``, or ``wait()``.  It is not an ``MPI.Request``.

    Nothing moves but in calls to mpicoll: ``poll`` and ``wait`` of any handle, and blocking collectives.  A rank that
    waits in one of MPI's own blocking calls meanwhile keeps the others waiting.  The arrays must be left alone until it
    is complete.
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
        self._lock = Lock()  # of the thread that makes progress
        self._bound: Bound | Comparison | None = None
        self._requests: list[Any] = []
        self._error: BaseException | None = None
        self._begin(bounds, comparison)

    def poll(self) -> bool:
        """Make what progress is possible without waiting; is it complete?"""
        check_thread()
        with _all_or_none():
            advance_all()
        self._raise_if_abandoned()
        return self._bound is None

    def wait(self) -> Any:
        """Wait until it is complete, and return the array (or list) that holds the result."""
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
        """Give up: what is under way stays so, and the communicator is of no use any more."""
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
        """Go on with what has arrived, or ``wait`` for all of it.  Was there any progress?"""
        if not self._lock.acquire(blocking=wait):
            return False  # another thread is at it
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
    """Ctrl-C may come between any two steps, of any handle: none of them goes on after it."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as error:
        for handle in list(under_way):
            handle.abandon(error)
        raise


@contextmanager
def _guarding(handle: Handle) -> Iterator[None]:
    """Floating-point conditions are results, not errors; any exception spoils the communicator."""
    try:
        with np.errstate(all="ignore"):
            yield
    except BaseException as error:
        handle.abandon(error)
        raise


class PersistentHandle(Handle):
    """A collective set up once for one array: ``start()``, then as any handle, as often as wanted; at last ``free()``.

    It keeps its memory and its MPI requests, so that starting it allocates nothing.
    """

    def __init__(self, state: Owner, bounds: Iterator[Bound], tag: int, result: Any) -> None:
        super().__init__(state, iter(()), tag, result)
        self._started = False
        self._rounds: list[Bound] | None = list(bounds)
        self._made = [self._persistent_requests(bound) for bound in self._rounds]
        state.retain()

    def start(self) -> "PersistentHandle":
        """Begin, with what the array holds now.  All ranks start theirs in the same order."""
        if self._rounds is None:
            raise RuntimeError("this persistent collective was freed")
        super()._raise_if_abandoned()
        if self._bound is not None:
            raise RuntimeError("this persistent collective is under way: wait for it first")
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
        """Give its requests and its memory back."""
        if self._error is not None:
            return  # MPI may still be using them
        if self._bound is not None:
            raise RuntimeError("this persistent collective is under way: wait for it first")
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
    """The same face for nonblocking collectives of the MPI library, which any of its calls drives."""

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
        for other in list(_native_under_way):  # those that nobody waits for
            with suppress(Exception):  # their own affair
                other._test()
        _native_under_way.append(self)

    def poll(self) -> bool:
        """Is it complete?"""
        check_thread()
        with _all_or_none():
            advance_all()
        return self._test()

    def wait(self) -> Any:
        """Wait until it is complete, and return the array (or list) that holds the result."""
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
            return False  # another thread is at it
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
            _native_under_way.remove(self)  # first: what follows is done once
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


@contextmanager
def driving(comm: MPI.Comm) -> Iterator[None]:
    """Around a blocking call of the MPI library on ``comm``: it is refused if one there was broken off, and meanwhile a
    thread drives what is under way."""
    if interrupted:
        check(comm)
    if under_way:
        advance_all()
    if not under_way:
        yield
        return
    returned = Event()

    def drive() -> None:
        while under_way and not returned.wait(0.0002):
            advance_all()

    thread = Thread(target=drive, name="mpicoll-driving", daemon=True)
    thread.start()
    try:
        yield
    finally:
        returned.set()
        thread.join()


def advance_all() -> bool:
    """All of them, once; was there any progress?  An exception is its own handle's: its ``poll`` and ``wait`` raise."""
    progressed = False
    for handle in list(under_way):
        with suppress(Exception):
            progressed = handle._advance() or progressed
    return progressed


# Threads: MPI says what it takes, once and for all.

_thread_level: int | None = None
_thread_inside: int | None = None


def check_thread() -> None:
    """Raise if the MPI library does not take calls from this thread, or not while another one is in a call of ours."""
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
    """This thread enters, or leaves, a call that makes messages of ours."""
    global _thread_inside
    _thread_inside = get_ident() if entering else None
