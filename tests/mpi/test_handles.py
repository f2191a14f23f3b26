"""Nonblocking and persistent allreduces of ours: poll, wait, start, in any order."""

import gc
import threading
import time
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

import mpicoll
from mpicoll.algorithms import ALGORITHMS
from mpicoll.mpi import progress, state
from mpicoll.mpi.plan import Bound

NAMES = [*ALGORITHMS["allreduce"], "native", "auto"]
OURS = list(ALGORITHMS["allreduce"])
P = MPI.COMM_WORLD.size
pytestmark = [pytest.mark.mpi, pytest.mark.skipif(P > 5, reason="five ranks show what more would, and sooner")]
TOTAL = P * (P + 1) / 2  # of rank + 1


def mine(comm: MPI.Intracomm, count: int = 50) -> np.ndarray:
    return np.full(count, comm.rank + 1.0)


@pytest.fixture
def ours(comm: MPI.Intracomm) -> mpicoll.Comm:
    return mpicoll.Comm(comm)


@pytest.fixture(autouse=True)
def nothing_left() -> Any:
    yield
    assert progress.under_way == []


@pytest.mark.parametrize("name", NAMES)
def test_poll_and_wait(ours, name):
    for count in {0, 1, P - 1, P + 1, 1000}:
        x = mine(ours, count)
        handle = mpicoll.iallreduce(x, ours, algorithm=name)
        while not handle.poll():
            pass
        assert handle.poll()
        assert handle.wait() is x
        np.testing.assert_array_equal(x, TOTAL)
        x = mine(ours, count)
        assert mpicoll.iallreduce(x, ours, "mean", name).wait() is x
        np.testing.assert_array_equal(x, TOTAL / P)
    assert not isinstance(handle, MPI.Request)


@pytest.mark.parametrize("name", NAMES)
def test_many_under_way_on_one_communicator_complete_in_any_order(ours, name):
    arrays = [mine(ours, 10 + n) * n for n in range(12)]
    handles = [mpicoll.iallreduce(x, ours, algorithm=name) for x in arrays]
    order = np.random.default_rng(ours.rank).permutation(len(handles))  # another one on every rank
    for n in order:
        handles[n].wait()
        np.testing.assert_array_equal(arrays[n], TOTAL * n)


@pytest.mark.parametrize(
    "names", [("ring", "ring"), ("auto", "native"), ("tree", "native"), ("double_tree", "circulant")]
)
def test_on_two_communicators_started_and_completed_in_different_orders(comm, names):
    """As MPI's own nonblocking collectives may be.  With progress of one handle only, this deadlocks."""
    first, second = mpicoll.Comm(comm).Dup(), mpicoll.Comm(comm).Dup()
    for _ in range(20):
        x, y = mine(comm), 2 * mine(comm)
        calls = [lambda x=x: mpicoll.iallreduce(x, first, algorithm=names[0])]
        calls += [lambda y=y: mpicoll.iallreduce(y, second, algorithm=names[1])]
        started = [call() for call in (calls if comm.rank % 2 else calls[::-1])]
        for handle in started:
            handle.wait()
        np.testing.assert_array_equal(x, TOTAL)
        np.testing.assert_array_equal(y, 2 * TOTAL)
    first.Free()
    second.Free()


@pytest.mark.parametrize("blocking", ["auto", "ring", "native"])
def test_blocking_calls_drive_what_is_under_way(ours, blocking):
    """Rank 0 waits for the handle first, the others for the blocking call first: neither may keep the other waiting."""
    x, y, z = mine(ours), mine(ours), mine(ours)
    other = ours.Dup()
    handle = mpicoll.iallreduce(x, ours, algorithm="ring")
    if ours.rank == 0:
        handle.wait()
    mpicoll.allreduce(y, other, algorithm=blocking)
    other.Allreduce(MPI.IN_PLACE, z, algorithm=blocking)
    handle.wait()
    for array in (x, y, z):
        np.testing.assert_array_equal(array, TOTAL)
    other.Free()


def test_tags_come_round_while_others_are_pending(ours, monkeypatch):
    monkeypatch.setattr(state, "HANDLE_TAGS", range(1, 4))
    for _ in range(10):
        arrays = [mine(ours) * n for n in range(3)]
        handles = [mpicoll.iallreduce(x, ours, algorithm="circulant") for x in arrays]
        for n in np.random.default_rng(ours.rank).permutation(3):
            handles[n].wait()
        for n, x in enumerate(arrays):
            np.testing.assert_array_equal(x, TOTAL * n)


def test_tags_come_round_while_one_is_half_way_on_some_ranks(ours, monkeypatch):
    monkeypatch.setattr(state, "HANDLE_TAGS", range(1, 4))
    for name in ("ring", "circulant"):
        x = mine(ours)
        first = mpicoll.iallreduce(x, ours, algorithm=name)
        for _ in range(100 if ours.rank == 1 else 0):
            first.poll()
        later = [mine(ours) * n for n in range(7)]
        handles = [mpicoll.iallreduce(y, ours, algorithm=name) for y in later]
        for handle in [*handles, first]:
            handle.wait()
        np.testing.assert_array_equal(x, TOTAL)
        for n, y in enumerate(later):
            np.testing.assert_array_equal(y, TOTAL * n)


def test_a_call_refused_on_one_rank_leaves_ranks_in_step(ours, monkeypatch):
    if ours.rank == 0:
        with monkeypatch.context() as patch:
            patch.setattr(progress, "_thread_level", MPI.THREAD_SERIALIZED)
            patch.setattr(progress, "_thread_inside", -1)
            for function in (mpicoll.iallreduce, mpicoll.allreduce_init):
                with pytest.raises(RuntimeError, match="one thread at a time"):
                    function(np.zeros(3), ours, algorithm="ring")
    x = mine(ours)
    mpicoll.iallreduce(x, ours, algorithm="ring").wait()
    handle = mpicoll.allreduce_init(x, ours, "max", algorithm="ring")
    handle.start().wait()
    np.testing.assert_array_equal(x, TOTAL)
    handle.free()


def test_empty_arrays_are_calls_too(ours):
    """Native calls with nothing in them still join the ranks: all of them must make them."""
    handle = mpicoll.iallreduce(mine(ours), ours, algorithm="ring")
    if ours.rank == 0:
        handle.wait()
    empty = np.empty(0)
    mpicoll.allreduce(memoryview(empty) if ours.rank == P - 1 else empty, ours)
    x = mine(ours)
    mpicoll.allreduce(x, ours)
    np.testing.assert_array_equal(x, TOTAL)
    handle.wait()


def test_a_dropped_native_handle_keeps_its_memory(ours):
    arrays = [np.full(200_000, ours.rank + 1.0) for _ in range(2)]
    mpicoll.iallreduce(arrays, ours)
    gc.collect()
    junk = [np.full(200_000, -1.0) for _ in range(8)]
    if ours.rank == P - 1:
        time.sleep(0.2)
    last = mpicoll.iallreduce(mine(ours), ours)
    last.wait()
    while progress._native_under_way:  # by the dropped one itself
        progress._native_under_way[0].poll()
    np.testing.assert_array_equal(np.concatenate(arrays), TOTAL)
    del junk


def test_a_dropped_handle_still_arrives(ours):
    x = mine(ours)
    mpicoll.iallreduce(x, ours, algorithm="ring")
    gc.collect()
    y = mine(ours)
    mpicoll.iallreduce(y, ours, algorithm="ring").wait()
    while progress.under_way:
        progress.under_way[0].poll()
    np.testing.assert_array_equal(x, TOTAL)
    np.testing.assert_array_equal(y, TOTAL)


@pytest.mark.parametrize("name", NAMES)
def test_lists_of_several_dtypes(ours, name):
    def fresh() -> list[np.ndarray]:
        return [mine(ours, 3), np.full(4, ours.rank + 1), np.ones((2, 2)), np.full(3, ours.rank + 1, "e")]

    arrays = fresh()[: 3 if name == "native" else 4]
    assert mpicoll.iallreduce(arrays, ours, algorithm=name).wait() is arrays
    for array, total in zip(arrays, (TOTAL, TOTAL, P, TOTAL), strict=False):
        np.testing.assert_array_equal(array, total)


def test_a_temporary_array_is_kept(ours):
    for name in NAMES:
        handle = mpicoll.iallreduce(np.full(3000, ours.rank + 1.0), ours, algorithm=name)
        gc.collect()
        junk = [np.full(3000, -1.0) for _ in range(10)]
        np.testing.assert_array_equal(handle.wait(), TOTAL)
        del junk


@pytest.mark.parametrize("name", [*OURS, "auto"])
def test_persistent_calls_reduce_what_the_array_holds_at_the_start(ours, name):
    for count in {0, 1, P + 1, 1000}:
        x = np.zeros(count)
        handle = mpicoll.allreduce_init(x, ours, algorithm=name)
        for early in (handle.wait, handle.poll):
            with pytest.raises(RuntimeError, match=r"was not started: start\(\) it first"):
                early()
        for n in range(4):
            x[:] = mine(ours, count) * n
            assert handle.start() is handle
            if n % 2:
                while not handle.poll():
                    pass
            assert handle.wait() is x
            np.testing.assert_array_equal(x, TOTAL * n)
        handle.free()
        with pytest.raises(RuntimeError, match="was freed"):
            handle.start()
        handle.free()  # once more does nothing


def test_persistent_nonblocking_and_blocking_calls_do_not_meet(ours):
    x, y, z, w = (np.zeros(20) for _ in range(4))
    first, second = (mpicoll.allreduce_init(a, ours, "mean" if a is y else "sum", "circulant") for a in (x, y))
    for n in range(10):
        for a in (x, y, z, w):
            a[:] = mine(ours, 20) * n
        first.start()
        second.start()
        third = mpicoll.iallreduce(z, ours, algorithm="circulant")
        mpicoll.allreduce(w, ours, algorithm="circulant")
        for handle in (third, second, first) if ours.rank % 2 else (first, second, third):
            handle.wait()
        for a, total in ((x, TOTAL), (y, TOTAL / P), (z, TOTAL), (w, TOTAL)):
            np.testing.assert_array_equal(a, total * n)
    first.start()
    if P > 1:
        for forbidden in (first.start, first.free):
            with pytest.raises(RuntimeError, match="pending: wait"):
                forbidden()
    first.wait()
    first.free()
    second.free()


def test_persistent_starts_allocate_nothing(ours):
    """No array, no request: only a few short-lived objects of Python's."""
    import tracemalloc

    x = mine(ours, 100_000)
    handle = mpicoll.allreduce_init(x, ours, algorithm="circulant")
    handle.start().wait()
    tracemalloc.start()
    for _ in range(20):
        handle.start().wait()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 20_000
    handle.free()


def test_what_cannot_be_persistent_is_refused(ours, monkeypatch):
    with pytest.raises(ValueError, match=r"native persistent collectives are the MPI library's: comm.Allreduce_init"):
        mpicoll.allreduce_init(np.zeros(3), ours, algorithm="native")
    with pytest.raises(TypeError, match="takes one array in host memory"):
        mpicoll.allreduce_init([np.zeros(3), np.zeros(3)], ours)
    monkeypatch.setattr(state, "PERSISTENT_TAGS", range(100, 102))
    for _ in range(2):
        mpicoll.allreduce_init(np.zeros(3), ours).free()
    with pytest.raises(RuntimeError, match="2 persistent collectives were made on this communicator"):
        mpicoll.allreduce_init(np.zeros(3), ours)


def test_a_plain_communicator_is_refused_before_anything_is_sent(comm):
    plain = MPI.COMM_WORLD.Dup()
    with pytest.raises(ValueError, match=r"needs a mpicoll.Comm, made beforehand: mpicoll.Comm\(comm\)"):
        mpicoll.iallreduce(np.zeros(3), plain, algorithm="ring")
    x = mine(plain)
    mpicoll.iallreduce(x, plain).wait()  # the MPI library's own needs nothing of ours
    np.testing.assert_array_equal(x, TOTAL)
    plain.Free()


def test_a_communicator_may_be_freed_before_its_handles_are_complete(ours):
    own = ours.Dup()
    x, y = mine(ours), mine(ours)
    persistent = mpicoll.allreduce_init(y, own, algorithm="tree")
    handle = mpicoll.iallreduce(x, own, algorithm="ring")
    private = state.find_state(own).comm
    own.Free()
    handle.wait()
    persistent.start().wait()
    np.testing.assert_array_equal(np.stack([x, y]), TOTAL)
    assert private != MPI.COMM_NULL
    persistent.free()
    assert private == MPI.COMM_NULL


def test_an_exception_ends_the_handle_and_its_communicator(ours, monkeypatch):
    own = ours.Dup()
    with monkeypatch.context() as patch:

        def fails(self: Bound) -> None:
            raise KeyboardInterrupt

        patch.setattr(Bound, "before", fails)
        with pytest.raises(KeyboardInterrupt):
            mpicoll.iallreduce(np.zeros(3), own, algorithm="ring", op="mean", check="off")
    with pytest.raises(RuntimeError, match="interrupted by an exception"):
        mpicoll.iallreduce(np.zeros(3), own, algorithm="ring")
    if P > 1:
        other = ours.Dup()
        handle = mpicoll.iallreduce(np.zeros(100), other, algorithm="ring")  # all ranks end in the same round
        with monkeypatch.context() as patch:
            patch.setattr(Bound, "after", fails)
            with pytest.raises(KeyboardInterrupt):
                handle.wait()
        for call in (handle.wait, handle.poll, handle.wait):
            with pytest.raises(RuntimeError, match="interrupted by an exception"):
                call()
        third = ours.Dup()
        persistent = mpicoll.allreduce_init(np.zeros(100), third, algorithm="ring")
        persistent.start()
        with monkeypatch.context() as patch:
            patch.setattr(Bound, "after", fails)
            with pytest.raises(KeyboardInterrupt):
                persistent.wait()
        with pytest.raises(RuntimeError, match="interrupted by an exception"):
            persistent.start()
        persistent.free()


def test_an_exception_is_raised_by_its_own_handle_alone(ours, monkeypatch):
    if P == 1:
        return
    broken, sound = ours.Dup(), ours.Dup()
    after = Bound.after

    def fails(self: Bound) -> None:
        if self.operation.name == "max":
            raise MemoryError
        after(self)

    monkeypatch.setattr(Bound, "after", fails)
    x = mine(ours, 100)
    failing = mpicoll.iallreduce(mine(ours, 100), broken, "max", "ring")
    handle = mpicoll.iallreduce(x, sound, "sum", "ring")
    while not handle.poll():
        pass
    np.testing.assert_array_equal(x, TOTAL)
    with pytest.raises((RuntimeError, MemoryError)):
        failing.wait()


def test_a_native_handle_finishes_once(ours, monkeypatch):
    """Interrupted while it divides a sum to make a mean of it, it must not divide again."""
    x = mine(ours)
    handle = mpicoll.iallreduce(x, ours.Dup(), "mean")
    calls: list[int] = []

    def interrupted(self: Any) -> None:
        calls.append(1)
        raise KeyboardInterrupt

    handle._deliver = (lambda: interrupted(None),)
    with pytest.raises(KeyboardInterrupt):
        handle.wait()
    for call in (handle.wait, handle.poll):
        with pytest.raises(RuntimeError, match="interrupted by an exception"):
            call()
    assert calls == [1]


def test_a_native_mean_outlives_its_communicator(ours):
    if MPI.get_vendor()[0] == "Open MPI":
        return  # it crashes when a communicator is freed before its nonblocking collectives are complete
    own, x, y = ours.Dup(), mine(ours), mine(ours)
    handle = mpicoll.iallreduce(x, own, "mean")
    own.Free()
    mpicoll.iallreduce(y, ours).wait()
    handle.wait()
    np.testing.assert_array_equal(x, TOTAL / P)
    np.testing.assert_array_equal(y, TOTAL)


def test_interrupted_while_driving_others_the_communicator_refuses(ours, monkeypatch):
    own, x = ours.Dup(), mine(ours)
    pending = mpicoll.iallreduce(x, ours, algorithm="ring")

    def interrupted(self: Any) -> None:
        raise KeyboardInterrupt

    if P > 1:
        with monkeypatch.context() as patch:
            patch.setattr(progress.Handle, "wait", interrupted)
            with pytest.raises(KeyboardInterrupt):  # unchecked: comparing calls may complete what is under way
                mpicoll.allreduce(mine(ours), own, algorithm="ring", check="off")
        with pytest.raises(RuntimeError, match="interrupted by an exception"):
            mpicoll.allreduce(mine(ours), own, algorithm="ring")
    pending.wait()
    np.testing.assert_array_equal(x, TOTAL)


# Threads.

needs_multiple = pytest.mark.skipif(MPI.Query_thread() < MPI.THREAD_MULTIPLE, reason="needs MPI_THREAD_MULTIPLE")


@needs_multiple
@pytest.mark.skipif(P > 4, reason="four ranks show what more would, and sooner")
def test_threads_with_a_communicator_each(ours):
    comms = [ours.Dup() for _ in range(3)]
    wrong: list[Any] = []

    def work(comm: mpicoll.Comm) -> None:
        for n in range(20):
            for name in ("ring", "circulant"):
                x = mine(comm) * n
                if n % 2:
                    mpicoll.allreduce(x, comm, algorithm=name)
                else:
                    mpicoll.iallreduce(x, comm, algorithm=name).wait()
                wrong.extend(x[x != TOTAL * n])

    threads = [threading.Thread(target=work, args=(comm,)) for comm in comms]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    for comm in comms:
        comm.Free()


@needs_multiple
@pytest.mark.parametrize("pending", [False, True])
def test_two_threads_on_one_communicator_are_refused(ours, monkeypatch, pending):
    other = ours.Dup()
    handle = mpicoll.iallreduce(mine(ours), other, algorithm="ring") if pending else None
    caught: list[str] = []
    inside, go_on = threading.Event(), threading.Event()
    before = Bound.before

    def slow(self: Bound) -> None:
        if threading.current_thread() is thread:
            inside.set()
            go_on.wait(10)
        before(self)

    monkeypatch.setattr(Bound, "before", slow)
    thread = threading.Thread(target=lambda: mpicoll.allreduce(np.zeros(3), ours, "mean", "ring"))
    thread.start()
    inside.wait(10)
    try:
        mpicoll.allreduce(np.zeros(3), ours, algorithm="ring")
    except RuntimeError as error:
        caught.append(str(error))
    go_on.set()
    thread.join()
    assert caught == [
        "another thread is in a collective on this communicator: give each thread a communicator of its own"
    ]
    if handle:
        handle.wait()


@pytest.mark.parametrize(
    ("level", "message"),
    [(MPI.THREAD_FUNNELED, "from its main thread only"), (MPI.THREAD_SERIALIZED, "one thread at a time")],
)
def test_past_the_thread_level_is_a_clear_error(ours, monkeypatch, level, message):
    """Ranks all see the same; the level is only pretended."""
    monkeypatch.setattr(progress, "_thread_level", level)
    mpicoll.allreduce(np.zeros(3), ours, algorithm="ring")  # the main thread may
    mpicoll.iallreduce(np.zeros(3), ours).wait()
    for function in (mpicoll.iallreduce, mpicoll.allreduce_init):
        with pytest.raises(RuntimeError, match="handles of our algorithms need MPI_THREAD_MULTIPLE"):
            function(np.zeros(3), ours, algorithm="ring")
    if level == MPI.THREAD_SERIALIZED:
        monkeypatch.setattr(progress, "_thread_inside", -1)  # somebody else is
    caught: list[str] = []

    def call() -> None:
        for function in (mpicoll.allreduce, mpicoll.iallreduce):
            try:
                function(np.zeros(3), ours, algorithm="ring")
            except RuntimeError as error:
                caught.append(str(error))

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    assert len(caught) == 2
    assert all(message in text and "mpi4py.rc.thread_level = 'multiple'" in text for text in caught)


def test_the_first_call_on_another_communicator_drives_handles(ours, comm):
    """It makes a private duplicate, which is a collective call: rank 1 comes to it only after the handle."""
    for _ in range(10):
        plain, x, y = comm.Dup(), mine(ours, 100_000), mine(ours)
        handle = mpicoll.iallreduce(x, ours, algorithm="ring")
        if comm.rank == 1:
            handle.wait()
        mpicoll.allreduce(y, plain)
        handle.wait()
        assert x[0] == y[0] == TOTAL
        plain.Free()


def test_waiting_leaves_the_core_to_others(ours):
    """Two handles: progress is by polling, and a rank that comes late must get its turn on a crowded machine."""
    x, y = mine(ours), mine(ours)
    if ours.rank == 0:
        time.sleep(0.05)
    first, second = (mpicoll.iallreduce(a, ours, algorithm="ring") for a in (x, y))
    second.wait()
    first.wait()
    np.testing.assert_array_equal(x + y, 2 * TOTAL)
