"""What mpicoll keeps with a communicator, and running plans on it, at once or step by step.

Progress is made by calls: every wait or poll of a handle, and every blocking collective called through mpicoll, drives
all handles that are under way, on whatever communicator, so that ranks may complete them in any order.  MPI's own
calls do not drive ours.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from threading import Event, Lock, Thread, get_ident
from typing import Any

import numpy as np
from mpi4py import MPI

from ..algorithms import Algorithm
from .operations import Operation
from .plan import Bound, Plan

MAX_PLANS = 64
"""Plans kept per communicator; the one not used for longest goes first."""

BLOCKING_TAG = 0
HANDLE_TAGS = range(1, 16384)  # one each, in turn: several may be under way on one communicator
PERSISTENT_TAGS = range(16384, 32768)  # one each, for good; MPI guarantees tags up to 32767


class State:
    """A private duplicate of the communicator, so that our messages never meet the user's; the plans made so far; and
    scratch memory for whichever blocking call runs, as large as the largest that ran."""

    def __init__(self, comm: MPI.Intracomm) -> None:
        group = comm.Get_group()
        self.comm = MPI.Intracomm(comm).Create(group)  # a duplicate, but for the user's attributes
        group.Free()
        self.p, self.rank = self.comm.size, self.comm.rank
        self.plans: dict[tuple[Any, ...], Plan] = {}
        self._scratch = np.empty(0, np.uint8)
        self._interrupted = False
        self._running = Lock()
        self._handles = self._persistent = 0
        self._users = 1  # the communicator, and handles that are not done with

    def plan(
        self, algorithm: Algorithm, parameters: dict[str, int], count: int, dtype: np.dtype, operation: Operation
    ) -> Plan:
        """The plan for such a call, made now or before."""
        carried, finishes = operation.carried(dtype), operation.finish is not None
        key = (algorithm.collective, algorithm.name, *parameters.items(), count, dtype, carried, finishes)
        plan = self.plans.pop(key, None)
        if plan is None:
            if len(self.plans) >= MAX_PLANS:
                del self.plans[next(iter(self.plans))]
            schedule = algorithm.schedule(self.p, **parameters)
            plan = Plan(schedule, self.rank, count, dtype, carried, finishes)
        self.plans[key] = plan  # the newest last
        return plan

    def run(self, plan: Plan, vector: np.ndarray, operation: Operation) -> None:
        """Do it now, on memory that belongs to the caller."""
        if under_way:  # other ranks may need them to go on before they join this
            bounds = plan.bind(vector, np.empty(plan.scratch_bytes, np.uint8), operation)
            Handle(self, bounds, BLOCKING_TAG).wait()
            return
        self.check()
        if not self._running.acquire(blocking=False):
            raise RuntimeError(
                "another thread is in a collective on this communicator: give each thread a communicator of its own"
            )
        try:
            _inside(True)
            if len(self._scratch) < plan.scratch_bytes:
                self._scratch = np.empty(plan.scratch_bytes, np.uint8)
            with np.errstate(all="ignore"):  # like MPI's own reductions; raising here would leave messages under way
                for bound in plan.bind(vector, self._scratch, operation):
                    bound.before()
                    _exchange(self.comm, bound)
                    bound.after()
        except BaseException:
            self._interrupted = True
            raise
        finally:
            _inside(False)
            self._running.release()

    def check(self) -> None:
        """Raise if nothing may be started here: messages of an interrupted call would be taken for the new one's."""
        if self._interrupted:
            raise RuntimeError(
                "an earlier call on this communicator was interrupted by an exception, and its messages may still be "
                "under way: go on with a new communicator (comm.Dup())"
            )
        check_thread()

    def interrupted(self) -> None:
        """Messages may stay behind: nothing can be started any more."""
        self._interrupted = True

    def retain(self) -> None:
        """Keep the private communicator, though the user's may be freed."""
        self._users += 1

    def release(self) -> None:
        """The opposite; the last one frees it."""
        self._users -= 1
        if not self._users and not MPI.Is_finalized():
            self.comm.Free()

    def handle_tag(self) -> int:
        """A tag for one nonblocking call: the same on all ranks, which make their calls in the same order."""
        self._handles += 1
        return HANDLE_TAGS[self._handles % len(HANDLE_TAGS)]

    def persistent_tag(self) -> int:
        """A tag for one persistent call."""
        if self._persistent == len(PERSISTENT_TAGS):
            raise RuntimeError(
                f"{self._persistent} persistent collectives were made on this communicator, one more than there "
                "are tags for: use a new communicator (comm.Dup())"
            )
        self._persistent += 1
        return PERSISTENT_TAGS[self._persistent - 1]


def _exchange(comm: MPI.Comm, bound: Bound) -> None:
    recvs, sends = bound.recvs, bound.sends
    if len(recvs) == len(sends) == 1:  # one call: small messages cost what the calls cost
        (into, source), (out, dest) = recvs[0], sends[0]
        comm.Sendrecv((out, MPI.BYTE), dest, BLOCKING_TAG, (into, MPI.BYTE), source, BLOCKING_TAG)
    else:
        MPI.Request.Waitall(_post(comm, bound, BLOCKING_TAG))


def _post(comm: MPI.Comm, bound: Bound, tag: int) -> list[MPI.Request]:
    requests = [comm.Irecv((memory, MPI.BYTE), peer, tag) for memory, peer in bound.recvs]
    requests += [comm.Isend((memory, MPI.BYTE), peer, tag) for memory, peer in bound.sends]
    return requests


under_way: list["Handle"] = []
"""Handles started and not complete, oldest first, of all communicators."""


class Handle:
    """A nonblocking collective: ``poll()`` until it is ``True``, or ``wait()``.  It is not an ``MPI.Request``.

    Nothing moves but in calls to mpicoll: ``poll`` and ``wait`` of any handle, and blocking collectives.  A rank that
    waits in one of MPI's own blocking calls meanwhile keeps the others waiting.  The arrays must be left alone until it
    is complete.
    """

    def __init__(
        self,
        state: State,
        bounds: Iterator[Bound],
        tag: int,
        result: Any = None,
        deliver: Iterable[Callable[[], None]] = (),
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
        self._begin(bounds)

    def poll(self) -> bool:
        """Make what progress is possible without waiting; is it complete?"""
        check_thread()
        _advance_all()
        return self._bound is None

    def wait(self) -> Any:
        """Wait until it is complete, and return the array (or list) that holds the result."""
        check_thread()
        while self._bound is not None:
            if self not in under_way:  # an exception ended it, in this call or an earlier one
                self._state.check()
            if len(under_way) == 1:
                self._advance(wait=True)
            elif not _advance_all():
                time.sleep(0)  # others may need this core
        return self._result

    def _begin(self, bounds: Iterator[Bound]) -> None:
        self._bounds = bounds
        self._bound: Bound | None = None
        self._requests: list[Any] = []
        with self._guarded():
            self._next_round()
        if self._bound is not None:
            self._state.retain()
            under_way.append(self)

    def _advance(self, wait: bool = False) -> bool:
        """Go on with what has arrived, or ``wait`` for all of it.  Was there any progress?"""
        if not self._lock.acquire(blocking=wait):
            return False  # another thread is at it
        try:
            _inside(True)
            progressed = False
            while self._bound is not None:
                with self._guarded():
                    if wait:
                        MPI.Request.Waitall(self._requests)
                    elif not MPI.Request.Testall(self._requests):
                        break
                    self._bound.after()
                    self._next_round()
                progressed = True
                if self._bound is None:
                    self._gone()
            return progressed
        finally:
            _inside(False)
            self._lock.release()

    def _gone(self) -> None:
        under_way.remove(self)
        self._state.release()

    def _next_round(self) -> None:
        for bound in self._bounds:
            bound.before()
            self._requests = self._post(bound)
            if self._requests:
                self._bound = bound
                return
            bound.after()
        for deliver in self._deliver:
            deliver()
        self._bound = None

    def _post(self, bound: Bound) -> list[Any]:
        return _post(self._state.comm, bound, self._tag)

    def _guarded(self) -> "_Guarded":
        return _Guarded(self)


class _Guarded:
    """Floating-point conditions are results, not errors; any exception spoils the communicator."""

    def __init__(self, handle: Handle) -> None:
        self._handle = handle
        self._errstate = np.errstate(all="ignore")

    def __enter__(self) -> None:
        self._errstate.__enter__()

    def __exit__(self, kind: type[BaseException] | None, *rest: Any) -> None:
        self._errstate.__exit__(kind, *rest)
        if kind is not None:
            self._handle._state.interrupted()
            if self._handle in under_way:
                self._handle._gone()


class PersistentHandle(Handle):
    """A collective set up once for one array: ``start()``, then as any handle, as often as wanted; at last ``free()``.

    It keeps its memory and its MPI requests, so that starting it allocates nothing.
    """

    def __init__(
        self,
        state: State,
        bounds: Iterator[Bound],
        tag: int,
        result: Any,
        gather: Iterable[Callable[[], None]] = (),
        deliver: Iterable[Callable[[], None]] = (),
    ) -> None:
        super().__init__(state, iter(()), tag, result)
        self._deliver = tuple(deliver)
        self._gather = tuple(gather)
        self._rounds: list[Bound] | None = list(bounds)
        self._made = [self._persistent_requests(bound) for bound in self._rounds]
        state.retain()

    def start(self) -> "PersistentHandle":
        """Begin, with what the array holds now.  All ranks start theirs in the same order."""
        if self._rounds is None:
            raise RuntimeError("this persistent collective was freed")
        if self._bound is not None:
            raise RuntimeError("this persistent collective is under way: wait for it first")
        self._state.check()
        for gather in self._gather:
            gather()
        self._requests_of = iter(self._made)
        self._begin(iter(self._rounds))
        return self

    def free(self) -> None:
        """Give its requests and its memory back."""
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
        self, requests: list[MPI.Request], keep: Any, result: Any, deliver: Iterable[Callable[[], None]]
    ) -> None:
        self._requests, self._result, self._deliver = requests, result, tuple(deliver)
        self._keep = keep  # mpi4py's nonblocking reductions let go of their buffers and operation

    def poll(self) -> bool:
        """Is it complete?"""
        check_thread()
        _advance_all()
        return self._complete(MPI.Request.Testall(self._requests))

    def wait(self) -> Any:
        """Wait until it is complete, and return the array (or list) that holds the result."""
        while under_way:
            if self.poll():
                return self._result
            time.sleep(0)
        check_thread()
        MPI.Request.Waitall(self._requests)
        self._complete(True)
        return self._result

    def _complete(self, done: bool) -> bool:
        if done and self._keep is not None:
            self._keep = None
            for deliver in self._deliver:
                deliver()
        return done


@contextmanager
def driving() -> Iterator[None]:
    """Drive what is under way, by a thread, while this one is inside a blocking call of the MPI library."""
    if not under_way:
        yield
        return
    returned = Event()

    def drive() -> None:
        while under_way and not returned.wait(0.0002):
            _advance_all()

    thread = Thread(target=drive, name="mpicoll-driving", daemon=True)
    thread.start()
    try:
        yield
    finally:
        returned.set()
        thread.join()


def _advance_all() -> bool:
    return sum(handle._advance() for handle in list(under_way)) > 0  # all of them: any() would stop at the first


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


def _inside(entering: bool) -> None:
    global _thread_inside
    _thread_inside = get_ident() if entering else None


# The state hangs on the communicator by an MPI attribute, and goes when it goes.

_keyval = MPI.KEYVAL_INVALID
_keyval_lock = Lock()


def _release(comm: MPI.Comm, keyval: int, state: State) -> None:
    state.release()


def _create_keyval() -> None:
    global _keyval
    with _keyval_lock:
        if _keyval == MPI.KEYVAL_INVALID:  # not at import: MPI may not be initialised yet
            _keyval = MPI.Comm.Create_keyval(delete_fn=_release)


def find_state(comm: MPI.Intracomm) -> State | None:
    """The communicator's, if it has one."""
    if _keyval == MPI.KEYVAL_INVALID:
        _create_keyval()
    state = comm.Get_attr(_keyval)
    return state if isinstance(state, State) else None


def state_of(comm: MPI.Intracomm) -> State:
    """The communicator's, made now (a collective call) or before."""
    state = find_state(comm)
    if state is None:
        state = State(comm)
        comm.Set_attr(_keyval, state)
    return state
