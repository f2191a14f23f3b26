"""The compiled part: the same bits as Python, whatever the form of the call, the kind of elements, and the length."""

import gc
import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from mpi4py import MPI

import mpicoll
from mpicoll import MismatchError
from mpicoll.errors import UserError
from mpicoll.mpi import native, record
from mpicoll.mpi.engine import last
from mpicoll.mpi.operations import name_of
from mpicoll.mpi.state import state_of

P = MPI.COMM_WORLD.size
pytestmark = [
    pytest.mark.mpi,
    pytest.mark.skipif(P == 1, reason="nobody to share memory with"),
    pytest.mark.skipif(native.module is None, reason="nothing is compiled here"),
]

BOX = 64 << 10
KINDS = [np.dtype(one) for one in ("?bBhHiIlLqQefdgFDG" if P < 4 else "?iefD")]
OPERATIONS = {"?": ("land", "lor", "lxor"), "b": ("land", "lor", "lxor", "band", "bor", "bxor")}
NUMBERS = ("sum", "mean", "prod", "max", "min")


def operations(dtype):
    if dtype.kind == "b":
        return OPERATIONS["?"]
    if dtype.kind == "c":
        return NUMBERS[:3]
    return NUMBERS if dtype.kind == "f" else (*NUMBERS, *OPERATIONS["b"])


def lengths(dtype):
    """In elements: both sides of every threshold."""
    size = dtype.itemsize
    edges = [native.INLINE // size, native.CELL // size, BOX // size, 4 * BOX // size]
    return sorted({1, 2, *(edge + beside for edge in edges for beside in (-1, 0, 1)), 5 * BOX // size + 3})


def data(dtype, count, rank, seed=0):
    random = np.random.default_rng([seed, rank, count])
    if dtype.kind == "b":
        return random.random(count) < 0.5
    if dtype.kind in "iu":
        info = np.iinfo(dtype)
        return random.integers(info.min, info.max, count, dtype, endpoint=True)
    values = random.standard_normal((count, 2))
    values *= 10.0 ** random.integers(-3, 4, (count, 1))
    return (values[:, 0] + 1j * values[:, 1] if dtype.kind == "c" else values[:, 0]).astype(dtype)


def bits(x):
    return x.view(np.uint8).tolist() if x.dtype.char not in "gG" else x.tolist()  # of 16 bytes some are anything


@pytest.fixture
def engines(comm, monkeypatch):
    """One communicator by machine code, and one by Python."""
    ours = mpicoll.Comm(comm)
    assert state_of(ours).node.counter is not None
    monkeypatch.setenv("MPICOLL_NATIVE", "off")
    python = mpicoll.Comm(comm.Dup(), deterministic=True)
    assert state_of(python).node.counter is None
    yield ours, python
    python.Free()


@pytest.mark.parametrize("dtype", KINDS, ids=str)
def test_bits_are_those_of_python(engines, dtype):
    ours, python = engines
    counts = lengths(dtype)
    for op in operations(dtype):
        for count in counts if op in ("sum", "lor") else counts[:6]:
            mine, expected = data(dtype, count, ours.rank), data(dtype, count, ours.rank)
            python.Allreduce(MPI.IN_PLACE, expected, op, algorithm="shared")
            for _ in range(2):  # the second time from the start
                result = np.empty_like(mine)
                ours.Allreduce(mine, result, op)
                assert bits(result) == bits(expected), (op, count)
            ours.Allreduce(MPI.IN_PLACE, mine, op)
            assert bits(mine) == bits(expected), (op, count)


FORMS = {
    "method": lambda comm, x, y: comm.Allreduce(x, y),
    "op": lambda comm, x, y: comm.Allreduce(x, y, MPI.SUM),
    "op=": lambda comm, x, y: comm.Allreduce(x, y, op=MPI.SUM),
    "sum": lambda comm, x, y: comm.Allreduce(x, y, "sum"),
    "deterministic": lambda comm, x, y: comm.Allreduce(x, y, deterministic=True),
    "read only": lambda comm, x, y: comm.Allreduce(read_only(x), y),
    "type": lambda comm, x, y: comm.Allreduce([x, MPI.FLOAT], [y, MPI.FLOAT]),
    "strided": lambda comm, x, y: comm.Allreduce(np.asfortranarray(x.reshape(-1, 1)), y.reshape(-1, 1)),
    "in place": lambda comm, x, y: comm.Allreduce(MPI.IN_PLACE, copied(x, y)),
    "none": lambda comm, x, y: comm.Allreduce(None, copied(x, y)),
    "function": lambda comm, x, y: mpicoll.allreduce(copied(x, y), comm),
    "function op": lambda comm, x, y: mpicoll.allreduce(copied(x, y), comm, MPI.SUM),
    "check": lambda comm, x, y: comm.Allreduce(x, y, check="header"),
}


def copied(x, y):
    y[:] = x
    return y


def read_only(x):
    x = x.copy()
    x.flags.writeable = False
    return x


@pytest.mark.parametrize("count", [1, native.INLINE // 4 + 1, native.CELL // 4 + 1, 40000])
def test_ranks_may_use_any_form(comm, count):
    ours = mpicoll.Comm(comm)
    names = [*FORMS]
    for turn in range(3 * len(names)):
        form = FORMS[names[(turn + turn // len(names) * ours.rank) % len(names)]]
        parts = [np.arange(count, dtype="f4") * (rank + 1) + turn for rank in range(P)]
        y = np.empty(count, "f4")
        form(ours, parts[ours.rank], y)
        np.testing.assert_array_equal(y, sum(parts[1:], start=parts[0]), err_msg=str(turn))
        assert last(ours) == ("shared", 0, 0)


def test_operations_are_told_apart(comm):
    ours = mpicoll.Comm(comm)
    expected = {"sum": P * (P + 1) / 2, "max": P, "min": 1, "mean": (P + 1) / 2}
    named = {"sum": MPI.SUM, "max": MPI.MAX, "min": MPI.MIN}
    for turn in range(3):
        for name, value in expected.items():
            x = np.full(2, ours.rank + 1.0)
            results = [mpicoll.allreduce(x.copy(), ours, name), mpicoll.allreduce(x.copy(), ours, op=name)]
            for op in (name, named.get(name, name)):
                y, z = np.zeros(2), np.zeros(2)
                ours.Allreduce(x, y, op)
                ours.Allreduce(x, z, op=op)
                results += [y, z]
            assert all((result == value).all() for result in results), (turn, name, results)


def test_a_plain_communicator_and_none_that_is_compared(comm):
    free = mpicoll.Comm(comm, check="off")
    for count in (1, 1000, 10000, 100000):
        for _ in range(3):
            x = np.full(count, comm.rank + 1.0)
            assert mpicoll.allreduce(x, comm) is x
            np.testing.assert_array_equal(x, P * (P + 1) / 2)
            y = np.empty(count)
            assert free.Allreduce(np.full(count, comm.rank + 1.0), y) is None
            np.testing.assert_array_equal(y, P * (P + 1) / 2)


def test_a_call_is_read_as_it_is_when_it_is_made(comm):
    """Nothing of the arrays is remembered."""
    ours = mpicoll.Comm(comm)
    x, y = np.zeros(6), np.zeros(6)
    for _ in range(2):
        ours.Allreduce(x, y)
    x.shape = 2, 3
    y.shape = 3, 2
    x[:] = ours.rank
    ours.Allreduce(x, y)
    assert (y == P * (P - 1) / 2).all()
    for wrong in (np.zeros((6, 2))[:, 0], np.zeros(6, "f4"), np.zeros(6, ">f8"), np.zeros(7)):
        with pytest.raises((ValueError, TypeError, KeyError, BufferError)):
            ours.Allreduce(x, wrong)
    y.flags.writeable = False
    with pytest.raises((ValueError, BufferError)):
        ours.Allreduce(x, y)
    with pytest.raises(TypeError):
        ours.Allreduce(x)
    with pytest.raises(TypeError):
        ours.Allreduce(x, y, MPI.SUM, op=MPI.SUM)


def usual(comm, x):
    comm.Allreduce(MPI.IN_PLACE, x)


DIFFERENT = {
    "count": lambda comm, x: comm.Allreduce(MPI.IN_PLACE, x[:-1]),
    "dtype": lambda comm, x: comm.Allreduce(MPI.IN_PLACE, x.astype("f4")),
    "operation": lambda comm, x: comm.Allreduce(MPI.IN_PLACE, x, MPI.MAX),
    "collective": lambda comm, x: comm.Bcast(x),
    "error": lambda comm, x: comm.Allreduce(MPI.IN_PLACE, x, "no such operation"),
}


@pytest.mark.parametrize("count", [3, native.INLINE // 8 + 2, native.CELL // 8 + 2, 40000])
@pytest.mark.parametrize("what", DIFFERENT)
def test_a_different_call_raises_on_all_ranks_and_the_next_one_is_right(comm, what, count):
    ours = mpicoll.Comm(comm)
    x = np.ones(count)
    for _ in range(3):
        ours.Allreduce(MPI.IN_PLACE, np.ones(count))
        for wrong in {0, P - 1}:
            kept = x.copy()
            call = DIFFERENT[what] if ours.rank == wrong else usual
            with pytest.raises((MismatchError, ValueError)):
                call(ours, x)
            np.testing.assert_array_equal(x, kept)
        y = np.full(count, ours.rank + 1.0)
        ours.Allreduce(MPI.IN_PLACE, y)
        np.testing.assert_array_equal(y, P * (P + 1) / 2)


def test_some_arrays_may_lie_in_shared_memory(comm):
    ours = mpicoll.Comm(comm)
    for count in (5, 1000, 5000, 40000):
        there, here = ours.zeros(count), np.zeros(count)
        for turn in range(4):
            for who in ({0}, {P - 1}, {*range(P)}, set()):
                x = there if ours.rank in who else here
                x[:] = ours.rank + turn
                ours.Allreduce(MPI.IN_PLACE, x)
                np.testing.assert_array_equal(x, P * (P - 1) / 2 + P * turn)


def test_communicators_take_turns_of_their_own(comm):
    many = [mpicoll.Comm(comm.Dup()) for _ in range(4)]
    for turn in range(50):
        for n in range(4):
            one = many[(n * 3 + turn) % 4]
            x = np.full(1 + 900 * n, comm.rank * 1.0 + n)
            one.Allreduce(MPI.IN_PLACE, x)
            np.testing.assert_array_equal(x, P * (P - 1) / 2 + P * n)
    for one in many:
        one.Free()
    x = np.zeros(1)
    with pytest.raises((TypeError, ValueError, MPI.Exception)):
        many[0].Allreduce(MPI.IN_PLACE, x)


def test_freed_communicators_leave_nothing(comm):
    """Without a collection of garbage: memory that is shared goes when the communicator does."""

    def maps():
        return Path("/proc/self/maps").read_text().count("mpicoll")

    before = maps()
    gc.disable()
    try:
        for _ in range(20):
            ours = mpicoll.Comm(comm.Dup())
            for count in (3, 1000, 20000):
                for _ in range(2):
                    ours.Allreduce(MPI.IN_PLACE, np.ones(count))
            ours.Free()
    finally:
        gc.enable()
    assert maps() <= before + 3


def test_an_error_while_waiting_ends_the_communicator(comm, monkeypatch):
    ours = mpicoll.Comm(comm)
    for _ in range(3):
        ours.Allreduce(MPI.IN_PLACE, np.ones(3))
    comm.Barrier()
    if ours.rank == 0:  # alone: others do not come

        def handler(*_):
            raise OSError("of the program's own")

        before = signal.signal(signal.SIGUSR1, handler)
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGUSR1)).start()
        with pytest.raises(OSError, match="program's own"):
            ours.Allreduce(MPI.IN_PLACE, np.ones(3))
        signal.signal(signal.SIGUSR1, before)
        with pytest.raises(RuntimeError, match=r"interrupted|aborted|broken"):
            ours.Allreduce(MPI.IN_PLACE, np.ones(3))
    comm.Barrier()


def test_the_flight_record_has_them(comm, monkeypatch):
    monkeypatch.setattr(record, "made", {})
    ours = mpicoll.Comm(comm)
    x = np.zeros(3)
    record.refresh()
    before = state_of(ours).agreement.counter.calls
    for _ in range(10):
        ours.Allreduce(MPI.IN_PLACE, x)
    assert state_of(ours).agreement.counter.calls == before + 10
    record.refresh()
    name = state_of(ours).name
    found = sorted((one for one in record.recorded() if one.where == name and one.call), key=lambda one: one.call)
    assert [one.call for one in found][-10:] == [*range(before + 1, before + 11)]
    assert all("allreduce of 3 float64, sum, shared" in str(one) for one in found[-10:])
    assert all(0 < one.began <= one.ended <= time.monotonic() for one in found)
    assert record.counted()[name] == before + 10
    assert record.latest() is not None
    assert record.current() is None


def test_a_rank_that_is_late_is_waited_for_and_seen(comm):
    ours = mpicoll.Comm(comm)
    x = np.ones(3)
    for _ in range(3):
        ours.Allreduce(MPI.IN_PLACE, np.ones(3))
    seen = []
    if ours.rank == P - 1:
        time.sleep(0.4)
    else:
        threading.Timer(0.2, lambda: seen.append(str(record.current()))).start()
    ours.Allreduce(MPI.IN_PLACE, x)
    np.testing.assert_array_equal(x, P)
    if ours.rank != P - 1:
        time.sleep(0.05)
        assert "allreduce of 3 float64" in seen[0]
    comm.Barrier()


def test_messages_of_the_program_go_on_meanwhile(comm):
    """The last rank comes only when it has what rank 0 sends, which the MPI library must be driven for."""
    ours = mpicoll.Comm(comm)
    x = np.ones(3)
    for _ in range(3):
        ours.Allreduce(MPI.IN_PLACE, np.ones(3))
    for count in (10, 1 << 20):
        request = comm.Isend(np.full(count, 7.0), P - 1) if comm.rank == 0 else None
        if comm.rank == P - 1:
            taken = np.empty(count)
            comm.Recv(taken, 0)
            assert (taken == 7).all()
        ours.Allreduce(MPI.IN_PLACE, x)
        if request is not None:
            request.Wait()
    np.testing.assert_array_equal(x, P * P)


def test_handles_go_on_meanwhile(comm):
    ours = mpicoll.Comm(comm)
    x = np.ones(3)
    for _ in range(3):
        ours.Allreduce(MPI.IN_PLACE, np.ones(3))
    y = np.full(100000, comm.rank + 1.0)
    handle = mpicoll.iallreduce(y, ours, algorithm="ring")
    if comm.rank == P - 1:
        handle.wait()
    ours.Allreduce(MPI.IN_PLACE, x)
    handle.wait()
    np.testing.assert_array_equal(y, P * (P + 1) / 2)
    np.testing.assert_array_equal(x, P)


def test_ctrl_c_ends_the_wait_and_the_communicator(comm):
    ours = mpicoll.Comm(comm)
    x = np.ones(3)
    for _ in range(3):
        ours.Allreduce(MPI.IN_PLACE, np.ones(3))
    comm.Barrier()
    if ours.rank == 0:  # alone: others do not come
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            ours.Allreduce(MPI.IN_PLACE, x)
        with pytest.raises(RuntimeError, match=r"interrupted|aborted|broken"):
            ours.Allreduce(MPI.IN_PLACE, x)
    comm.Barrier()


def test_another_thread_is_looked_at_closely(comm):
    """It may make calls where the MPI library allows it, but not while this one is in a call."""
    ours = mpicoll.Comm(comm)
    for _ in range(3):
        ours.Allreduce(MPI.IN_PLACE, np.ones(3))
    results = []

    def work():
        x = np.full(3, comm.rank + 1.0)
        ours.Allreduce(MPI.IN_PLACE, x)
        results.append(x)

    if MPI.Query_thread() == MPI.THREAD_MULTIPLE:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        np.testing.assert_array_equal(results[0], P * (P + 1) / 2)


def test_nobody_comes_in_between(comm):
    """A call from a signal handler, while another one waits, is refused; it counts for nothing."""
    ours = mpicoll.Comm(comm)
    for _ in range(3):
        ours.Allreduce(MPI.IN_PLACE, np.ones(3))
    refused = []

    def handler(*_):
        try:
            ours.Allreduce(MPI.IN_PLACE, np.ones(3))
        except RuntimeError as error:
            refused.append(str(error))

    before = signal.signal(signal.SIGUSR1, handler)
    for shared in (False, True):
        x = ours.full(300000, 1.0) if shared else np.ones(3)
        if ours.rank == 0:
            threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGUSR1)).start()
        if ours.rank == P - 1:
            time.sleep(0.4)
        ours.Allreduce(MPI.IN_PLACE, x)
        assert (x == P).all()
    signal.signal(signal.SIGUSR1, before)
    assert [text[:14] for text in refused] == (["another thread"] * 2 if ours.rank == 0 else [])
    y = np.ones(3)
    ours.Allreduce(MPI.IN_PLACE, y)
    assert (y == P).all()


@pytest.mark.parametrize(("first", "other"), [("require", "off"), ("on", "auto")])
def test_all_ranks_refuse_what_one_cannot(comm, monkeypatch, first, other):
    monkeypatch.setenv("MPICOLL_NATIVE", first if comm.rank == P - 1 else other)
    with pytest.raises(UserError, match="MPICOLL_NATIVE"):
        mpicoll.Comm(comm)


def test_one_rank_without_it_and_none_uses_it(comm, monkeypatch):
    monkeypatch.setenv("MPICOLL_NATIVE", "off" if comm.rank == P - 1 else "auto")
    ours, x = mpicoll.Comm(comm), np.ones(3)
    assert state_of(ours).node.counter is None
    for _ in range(3):
        ours.Allreduce(MPI.IN_PLACE, x)
    assert (x == P**3).all()


def test_many_forms_and_strings_that_are_made(comm):
    """More forms than there are places for; and the name of an operation need not be the one in the program."""
    ours = mpicoll.Comm(comm)
    made = "".join(["s", "um"])
    for turn in range(3):
        for count in range(1, 400):
            x = np.full(count, ours.rank + turn * 1.0)
            mpicoll.allreduce(x, ours, made if count % 2 else "sum")
            assert x[0] == x[-1] == P * (P - 1) / 2 + P * turn


def test_calls_are_counted_alike(comm, monkeypatch):
    """Whether a call goes by Python or not, which need not be the same on all ranks."""
    monkeypatch.setattr(record, "made", {})
    for check in ("header", "off"):
        ours = mpicoll.Comm(comm, check=check)
        before = dict(record.counted())
        for _ in range(10):
            mpicoll.allreduce(np.ones(3), ours, "sum" if ours.rank else "".join(["s", "um"]))
        name = state_of(ours).name + (", not compared" if check == "off" else "")
        assert record.counted()[name] - before.get(name, 0) == 10


def test_the_open_call_is_in_the_record(comm):
    """However many calls of the compiled part are seen at once."""
    many = [mpicoll.Comm(comm.Dup()) for _ in range(5)]
    for ours in many:
        for _ in range(70):
            ours.Allreduce(MPI.IN_PLACE, np.ones(3))
    seen = []
    if comm.rank == P - 1:
        time.sleep(0.3)
    else:
        threading.Timer(0.15, lambda: seen.append((record.recorded()[-1], record.current()))).start()
    many[0].Bcast(np.ones(3))
    comm.Barrier()
    if comm.rank != P - 1:
        [(last_one, open_one)] = seen
        assert last_one is open_one
        assert "bcast" in str(open_one)
    assert all(one.ended for one in record.recorded() if one.where == state_of(many[0]).name)
    for ours in many:
        ours.Free()


def test_what_is_not_compiled_goes_by_python(comm):
    ours = mpicoll.Comm(comm)
    double = MPI.Op.Create(
        lambda a, b, _: np.add(np.frombuffer(a), np.frombuffer(b), out=np.frombuffer(b)), commute=True
    )
    x = np.full(4, comm.rank + 1.0)
    for _ in range(2):
        y = x.copy()
        ours.Allreduce(MPI.IN_PLACE, y, double)
        np.testing.assert_array_equal(y, P * (P + 1) / 2)
    assert name_of(double) == "user-defined"
    double.Free()
    half = np.full(5, comm.rank + 1, "f2")
    for _ in range(2):
        y = half.copy()
        ours.Allreduce(MPI.IN_PLACE, y, wire="16bit")
        np.testing.assert_array_equal(y, P * (P + 1) / 2)


def test_it_is_a_function_to_who_looks():
    import copy
    import inspect
    import pickle
    import pydoc

    for one in (mpicoll.allreduce, mpicoll.Comm.Allreduce):
        assert inspect.isroutine(one)
        assert "op" in inspect.signature(one).parameters
        assert inspect.getdoc(one).startswith("Combine")
        assert "algorithm: str" in pydoc.render_doc(one, renderer=pydoc.plaintext)
    assert mpicoll.allreduce.__name__ == "allreduce"
    assert mpicoll.allreduce.__module__ == "mpicoll.mpi.collectives"
    assert copy.deepcopy(mpicoll.allreduce) is mpicoll.allreduce
    assert pickle.loads(pickle.dumps(mpicoll.allreduce)) is mpicoll.allreduce
