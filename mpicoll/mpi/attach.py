"""What mpicoll keeps with a communicator hangs on it by an MPI attribute, and goes when it goes."""

from threading import Lock
from typing import Any, Protocol

from mpi4py import MPI

from . import launch, record


class Attached(Protocol):
    """What hangs on a communicator."""

    def check(self) -> None:
        """Raise if no call may be started on it."""

    def interrupt(self) -> None:
        """A call on it was aborted: no other may be started."""

    def disown(self) -> None:
        """The communicator is being freed, by all ranks."""

    def release(self) -> None:
        """The communicator needs it no more."""


INTERRUPTED = (
    "an earlier call on this communicator was interrupted by an exception, and its messages may still be in flight: "
    "go on with a new communicator (comm.Dup())"
)

interrupted: set[Attached] = set()
"""What hangs on communicators on which a call was aborted, until they are freed: while there is none, calls need not
look."""

_keyval = MPI.KEYVAL_INVALID
_keyval_lock = Lock()


def _release(comm: MPI.Comm, keyval: int, state: Attached) -> None:
    interrupted.discard(state)
    state.disown()  # now, on all ranks, and not when the last handle here is done
    state.release()


def _create_keyval() -> None:
    global _keyval
    with _keyval_lock:
        if _keyval == MPI.KEYVAL_INVALID:  # not at import: MPI may not be initialised yet
            _keyval = MPI.Comm.Create_keyval(delete_fn=_release)


class _Broken:
    """Stands in for the state of a communicator that had none when a call on it was aborted."""

    def check(self) -> None:
        raise RuntimeError(INTERRUPTED)

    def interrupt(self) -> None:
        interrupted.add(self)

    def disown(self) -> None:
        pass

    def release(self) -> None:
        pass


def attached(comm: MPI.Comm) -> Attached | None:
    """What hangs on a communicator, if anything does."""
    if _keyval == MPI.KEYVAL_INVALID:
        _create_keyval()
    found: Any = comm.Get_attr(_keyval)
    return found


def attach(comm: MPI.Comm, state: Attached) -> None:
    """Hang it on the communicator, which releases it when it is freed."""
    if _keyval == MPI.KEYVAL_INVALID:
        _create_keyval()
    comm.Set_attr(_keyval, state)


def check_comm(comm: Any) -> None:
    """Raise ``TypeError`` unless it is a communicator to work on; see also ``launch.check``."""
    if not isinstance(comm, MPI.Intracomm) or not comm:
        what = "one that is null or was freed" if isinstance(comm, MPI.Comm) and not comm else type(comm).__name__
        raise TypeError(f"expected an mpi4py intracommunicator, got {what}")
    launch.check(comm)


def check(comm: MPI.Comm) -> None:
    """Raise if a call on the communicator was aborted: the other ranks may still be in it."""
    if _keyval != MPI.KEYVAL_INVALID:
        found = attached(comm)
        if found is not None:
            found.check()


class whole:  # noqa: N801  (a class: a generator would take a microsecond more of every call)
    """Guard one call on ``comm``: after Ctrl-C in it no other call may be started there; close the flight record."""

    __slots__ = ("comm",)

    def __init__(self, comm: MPI.Intracomm) -> None:
        check(comm)
        self.comm = comm

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: Any, traceback: Any) -> None:
        if kind is not None and issubclass(kind, (KeyboardInterrupt, SystemExit)):
            found = attached(self.comm)
            if found is None:
                found = _Broken()
                attach(self.comm, found)
            found.interrupt()
        record.end()


def world_ranks(comm: MPI.Comm) -> tuple[int, ...]:
    """Its ranks in ``MPI.COMM_WORLD``."""
    group, everything = comm.Get_group(), MPI.COMM_WORLD.Get_group()
    world = tuple(group.Translate_ranks(list(range(group.size)), everything))
    group.Free()
    everything.Free()
    return world


_named_here = 0


def named(comm: MPI.Comm) -> tuple[str, tuple[int, ...]]:
    """A name that is the same on all ranks and no other's, and the ranks in ``MPI.COMM_WORLD``."""
    global _named_here
    world = world_ranks(comm)
    _named_here += comm.rank == 0
    return comm.bcast(f"communicator {world[0]}.{_named_here}"), world
