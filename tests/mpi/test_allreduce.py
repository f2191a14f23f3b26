"""The contract of every allreduce, over every row of the table; one launch runs all cases of its number of ranks."""

from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

import mpicoll
from mpicoll.algorithms import ALGORITHMS
from mpicoll.interpreter import interpret_arrays
from mpicoll.mpi import collectives, plan
from mpicoll.mpi.plan import Plan
from mpicoll.schedule import Schedule
from schedules import census, everyone, exchange, fold_tree_reduce

pytestmark = pytest.mark.mpi
NAMES = [*ALGORITHMS["allreduce"], "native"]
P = MPI.COMM_WORLD.size
COUNTS = sorted({0, 1, P - 1, P, P + 1, 997, 65537})
UFUNCS = {"sum": np.add, "prod": np.multiply, "max": np.maximum, "min": np.minimum}


def own_data(count: int, rank: int, dtype: Any = np.float64) -> np.ndarray:
    """Different on every rank and at every index; small integers, so that sums are exact in any dtype."""
    return ((np.arange(count) * 7 + rank * 3) % 5 + rank % 2).astype(dtype)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("name", NAMES)
def test_sums_are_exact_and_nothing_else_is_touched(comm, name, count):
    guarded = np.full(count + 16, -777.0)
    x = guarded[8 : 8 + count]
    x[:] = own_data(count, comm.rank)
    assert mpicoll.allreduce(x, comm, algorithm=name) is x
    np.testing.assert_array_equal(x, sum(own_data(count, rank) for rank in range(P)))
    np.testing.assert_array_equal(guarded[:8], -777)
    np.testing.assert_array_equal(guarded[8 + count :], -777)


@pytest.mark.parametrize("dtype", ["i1", "u2", "i4", "i8", "f4", "f8", "g", "c8", "c16"])
@pytest.mark.parametrize("op", UFUNCS)
@pytest.mark.parametrize("name", NAMES)
def test_operations_and_dtypes(comm, name, op, dtype):
    everyones = [own_data(101, rank, dtype) for rank in range(P)]
    x = everyones[comm.rank].copy()
    if op in ("max", "min") and x.dtype.kind == "c":
        with pytest.raises(TypeError, match=f"{op} of complex numbers is not defined"):
            mpicoll.allreduce(x, comm, op, name)
        return
    mpicoll.allreduce(x, comm, op, name)
    np.testing.assert_array_equal(x, UFUNCS[op].reduce(everyones, dtype=dtype))
    y = everyones[comm.rank].copy()
    mpicoll.allreduce(y, comm, {"sum": MPI.SUM, "prod": MPI.PROD, "max": MPI.MAX, "min": MPI.MIN}[op], name)
    np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("name", ALGORITHMS["allreduce"])
def test_all_ranks_end_with_the_bits_of_the_interpreter_every_time(comm, name):
    everyones = [np.random.default_rng(rank).normal(size=1003).astype("f4") for rank in range(P)]
    schedule = ALGORITHMS["allreduce"][name].schedule(P)
    expected = interpret_arrays(schedule, everyones, np.add)[0]
    for _ in range(3):
        x = everyones[comm.rank].copy()
        mpicoll.allreduce(x, comm, algorithm=name)
        np.testing.assert_array_equal(x.view("u4"), expected.view("u4"))


def test_shapes_scalars_and_the_ring_by_name(comm):
    x = np.full((3, 4, 5), float(comm.rank))
    np.testing.assert_array_equal(mpicoll.ring_allreduce(x, comm), np.full((3, 4, 5), P * (P - 1) / 2))
    scalar = np.array(2.0)
    assert mpicoll.allreduce(scalar, comm) == 2 * P
    assert mpicoll.ring_allreduce(np.array([comm.rank]), comm, "max") == P - 1


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        ([1.0, 2.0], TypeError, "expected a NumPy array, got builtins.list"),
        (np.zeros(3, "f2"), TypeError, "floats of at least 32 bits .* got dtype float16"),
        (np.zeros(3, bool), TypeError, "got dtype bool"),
        (np.zeros(3, object), TypeError, "got dtype object"),
        (np.zeros(3, ">f8"), TypeError, "native byte order, got dtype >f8"),
        (np.zeros((4, 4))[:, ::2], ValueError, "C-contiguous"),
        (np.zeros((4, 3), order="F"), ValueError, "C-contiguous"),
        (np.broadcast_to(np.zeros(1), 1), ValueError, "writable"),
        (np.zeros(65, "u1")[1:].view("f8"), ValueError, "aligned"),
        (np.ma.zeros(3), TypeError, "got numpy.ma.MaskedArray"),
    ],
)
def test_arrays_that_cannot_be_reduced_in_place_are_refused(comm, bad, error, message):
    with pytest.raises(error, match=message):
        mpicoll.allreduce(bad, comm)


def test_unknown_names_are_refused_with_the_known_ones(comm):
    with pytest.raises(ValueError, match=r"unknown allreduce algorithm 'rign': expected ring, .* or native"):
        mpicoll.allreduce(np.zeros(3), comm, algorithm="rign")
    for op in ("mode", MPI.LXOR):
        with pytest.raises(ValueError, match=r"unknown operation .*: expected sum, prod, max, min"):
            mpicoll.allreduce(np.zeros(3), comm, op)
    freed = comm.Dup()
    freed.Free()
    for name in NAMES:
        with pytest.raises(TypeError, match="expected an mpi4py intracommunicator, got int"):
            mpicoll.allreduce(np.zeros(3), 3, algorithm=name)
        for null in (MPI.COMM_NULL, freed):
            with pytest.raises(TypeError, match="got one that is null or was freed"):
                mpicoll.allreduce(np.zeros(3), null, algorithm=name)


@pytest.mark.parametrize("name", NAMES)
def test_subclasses_are_their_memory(comm, name):
    class Stubborn(np.ndarray):
        __array_ufunc__ = None

    for x in (np.arange(12.0).reshape(3, 4).view(np.recarray), np.arange(1.0, 5).view(Stubborn)):
        before = np.asarray(x).copy()
        assert mpicoll.allreduce(x, comm, algorithm=name) is x
        np.testing.assert_array_equal(np.asarray(x), P * before)


@pytest.mark.parametrize("name", ALGORITHMS["allreduce"])
def test_overflow_and_nan_are_results_not_errors(comm, name):
    """An exception in the middle would leave messages under way: the next call would add up old data."""
    with np.errstate(all="raise"):
        x = np.array([3e38, 1, np.inf if comm.rank else -np.inf, np.nan], "f4")
        mpicoll.allreduce(x, comm, algorithm=name)
        y = np.full(4, float(comm.rank))
        mpicoll.allreduce(y, comm, algorithm=name)
        z = np.array([np.nan if comm.rank == P - 1 else 1.0] * 5)
        mpicoll.allreduce(z, comm, "max", name)
    np.testing.assert_array_equal(y, P * (P - 1) / 2)
    assert np.isnan(z).all()
    assert x[1] == P
    assert np.isnan(x[3])
    if P > 1:
        assert x[0] == np.inf
        assert np.isnan(x[2])


def test_after_an_interrupted_call_the_communicator_refuses(comm, monkeypatch):
    broken = comm.Dup()
    mpicoll.allreduce(np.ones(3), broken)

    def interrupted(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Plan, "run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            mpicoll.allreduce(np.ones(3), broken)
    with pytest.raises(RuntimeError, match="interrupted by an exception, and its messages may still be under way"):
        mpicoll.allreduce(np.ones(3), broken)
    assert mpicoll.allreduce(np.ones(3), broken.Dup())[0] == P


def test_long_vectors_take_the_native_call_in_pieces(comm, monkeypatch):
    monkeypatch.setattr(collectives, "MAX_COUNT", 10)
    x = own_data(101, comm.rank)
    mpicoll.allreduce(x, comm, algorithm="native")
    np.testing.assert_array_equal(x, sum(own_data(101, rank) for rank in range(P)))


def run_directly(comm: MPI.Intracomm, schedule: Schedule, x: np.ndarray) -> None:
    ready = Plan(schedule, comm.rank, len(x), x.dtype)
    ready.run(comm, x, np.add, np.empty(ready.scratch_bytes, np.uint8))


@pytest.mark.parametrize("make", [census, everyone, exchange, lambda p: fold_tree_reduce(p, p - 1)])
def test_the_plan_does_what_the_interpreter_says(comm, make):
    """Scratch, moves within a rank, several reductions into a chunk, idle ranks, a root: in random bits."""
    if make is exchange and P & (P - 1):
        return
    schedule = make(P)
    everyones = [np.random.default_rng(rank).normal(size=37).astype("f4") for rank in range(P)]
    x = everyones[comm.rank].copy()
    run_directly(comm, schedule, x)
    np.testing.assert_array_equal(x.view("u4"), interpret_arrays(schedule, everyones, np.add)[comm.rank].view("u4"))


@pytest.mark.parametrize("name", ALGORITHMS["allreduce"])
def test_long_pieces_travel_as_several_messages(comm, name, monkeypatch):
    monkeypatch.setattr(plan, "MAX_MESSAGE", 1000)
    x = own_data(5003, comm.rank)
    run_directly(comm, ALGORITHMS["allreduce"][name].schedule(P), x)
    np.testing.assert_array_equal(x, sum(own_data(5003, rank) for rank in range(P)))


@pytest.mark.parametrize("name", ALGORITHMS["allreduce"])
def test_bytes_sent_are_the_textbook_ones(comm, name):
    row = ALGORITHMS["allreduce"][name]
    x = np.zeros(P * 840, "f4")  # a multiple of every number of chunks here
    most = comm.allreduce(collectives.bytes_sent(x, comm, name), MPI.MAX)
    assert most == row.sent(P, **row.parameters) * x.nbytes
    assert collectives.bytes_sent(x, comm, "native") is None
    if comm.rank == 0:  # not a collective call
        assert collectives.bytes_sent(x, MPI.COMM_WORLD, name) <= most


def test_the_users_pending_receive_never_sees_our_messages(comm):
    mine = np.zeros(1)
    request = comm.Irecv(mine, MPI.ANY_SOURCE, MPI.ANY_TAG)
    for name in ALGORITHMS["allreduce"]:
        x = np.full(2 * P, 1.0)
        mpicoll.allreduce(x, comm, algorithm=name)
        np.testing.assert_array_equal(x, P)
    comm.Send(np.array([42.0 + comm.rank]), (comm.rank + 1) % P)
    request.Wait()
    assert mine[0] == 42 + (comm.rank - 1) % P


def test_communicators_and_plans_come_and_go(comm):
    """More communicators than an MPI has contexts: duplicates that are not freed would run out."""
    scarce = MPI.get_vendor()[0] != "Open MPI"  # MPICH and its kin have 2048 contexts; Open MPI has more, and is slow
    for n in range(2200 if scarce and P < 5 else 100):
        part = comm.Split(comm.rank % 2, comm.rank)
        x = np.full(1 + n % 3, float(comm.rank))
        mpicoll.allreduce(x, part)
        assert x[0] == sum(range(comm.rank % 2, P, 2))
        part.Free()
    for count in range(2 * collectives.MAX_PLANS):
        mpicoll.allreduce(np.zeros(count), comm)
    state = collectives._state(comm)
    assert [key[1] for key in state.plans] == list(range(collectives.MAX_PLANS, 2 * collectives.MAX_PLANS))
    mpicoll.allreduce(np.zeros(collectives.MAX_PLANS), comm)  # the oldest is now the newest
    assert [key[1] for key in state.plans][-1] == collectives.MAX_PLANS
    assert len(state._scratch) < 8 * 2 * collectives.MAX_PLANS  # shared by all plans


def test_an_unrelated_rank_is_not_needed(comm):
    """Ranks outside a communicator take no part: here they never call."""
    part = comm.Split(0 if comm.rank < (P + 1) // 2 else MPI.UNDEFINED)
    if part != MPI.COMM_NULL:
        x = np.ones(10)
        mpicoll.ring_allreduce(x, part)
        np.testing.assert_array_equal(x, part.size)
        part.Free()


def test_a_plan_is_for_one_rank_and_one_kind_of_vector(comm):
    ready = Plan(ALGORITHMS["allreduce"]["ring"].schedule(P), comm.rank, 10, np.dtype("f8"))
    with pytest.raises(ValueError, match=r"planned for 10 x float64, got \(11,\) x float64"):
        ready.run(comm, np.zeros(11), np.add, np.empty(0, np.uint8))
    other = Plan(ALGORITHMS["allreduce"]["ring"].schedule(P + 1), P, 10, np.dtype("f8"))
    with pytest.raises(ValueError, match="planned for rank"):
        other.run(comm, np.zeros(10), np.add, np.empty(0, np.uint8))
