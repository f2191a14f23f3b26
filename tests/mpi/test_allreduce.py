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
    ],
)
def test_arrays_that_cannot_be_reduced_in_place_are_refused(comm, bad, error, message):
    with pytest.raises(error, match=message):
        mpicoll.allreduce(bad, comm)


def test_unknown_names_are_refused_with_the_known_ones(comm):
    with pytest.raises(ValueError, match="unknown allreduce algorithm 'rign': expected one of ring, circulant, native"):
        mpicoll.allreduce(np.zeros(3), comm, algorithm="rign")
    for op in ("mode", MPI.LXOR):
        with pytest.raises(ValueError, match=r"unknown operation .*: expected sum, prod, max, min"):
            mpicoll.allreduce(np.zeros(3), comm, op)
    with pytest.raises(TypeError, match="expected an mpi4py intracommunicator, got int"):
        mpicoll.allreduce(np.zeros(3), 3)


def run_directly(comm: MPI.Intracomm, schedule: Schedule, x: np.ndarray) -> None:
    Plan(schedule, comm.rank, len(x), x.dtype).run(comm, x, np.add)


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
    x = np.zeros(P * 100, "f4")
    assert collectives.bytes_sent(x, comm, name) == 2 * (P - 1) * 400
    assert collectives.bytes_sent(x, comm, "native") is None


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
    for n in range(3000 if P < 3 else 100):
        part = comm.Split(comm.rank % 2, comm.rank)
        x = np.full(1 + n % 3, float(comm.rank))
        mpicoll.allreduce(x, part)
        assert x[0] == sum(range(comm.rank % 2, P, 2))
        part.Free()
    for count in range(2 * collectives.MAX_PLANS):
        mpicoll.allreduce(np.zeros(count), comm)
    assert len(collectives._state(comm).plans) == collectives.MAX_PLANS


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
        ready.run(comm, np.zeros(11), np.add)
    with pytest.raises(ValueError, match="planned for rank"):
        Plan(ALGORITHMS["allreduce"]["ring"].schedule(P + 1), P, 10, np.dtype("f8")).run(comm, np.zeros(10), np.add)
