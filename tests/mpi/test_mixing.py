"""The contract of mixing, over every graph of the table, and push-sum."""

from typing import Any

import networkx as nx
import numpy as np
import pytest
from ml_dtypes import bfloat16
from mpi4py import MPI

import mpicoll
from contract import assert_untouched, guarded, own_data
from mpicoll.algorithms import ALGORITHMS, mixing
from mpicoll.graphs import Graph, graph
from mpicoll.interpreter import interpret_arrays
from mpicoll.mpi.operations import BLOCK
from mpicoll.mpi.state import MAX_PLANS, state_of

pytestmark = pytest.mark.mpi
P = MPI.COMM_WORLD.size
NAMES = list(ALGORITHMS["mix"])
HALVES = ["butterfly", "exponential", "matching"]  # the weights of these are exact in any precision


def mixed(made: Graph, start: int, steps: int, vectors: list[np.ndarray]) -> list[np.ndarray]:
    """What all ranks end with, in float64 or more."""
    dtype = np.result_type(vectors[0].dtype, np.float64)
    held = np.array(vectors, dtype)
    for t in range(start, start + steps):
        held = made.matrix(t).astype(dtype) @ held
    return list(held)


@pytest.mark.parametrize("count", [0, 1, P - 1, P, P + 1, 97, BLOCK - 1, BLOCK + 1])
@pytest.mark.parametrize("name", NAMES)
def test_every_rank_ends_with_its_row_of_the_matrices(comm, name, count):
    made = graph(name, P)
    vectors = [own_data(count, rank) * 2.0**10 for rank in range(P)]
    x, around = guarded(vectors[comm.rank])
    for step in range(made.period or 3):
        assert mpicoll.gossip_average(x, comm, name, step=step) is x
    np.testing.assert_allclose(x, mixed(made, 0, made.period or 3, vectors)[comm.rank], rtol=1e-14)
    assert_untouched(around)
    if name in HALVES:
        for step in range(made.period or 3):
            vectors = interpret_arrays(mixing.schedule(made, step, 1), vectors, np.add)
        np.testing.assert_array_equal(x, vectors[comm.rank])


@pytest.mark.parametrize("dtype", ["e", bfloat16, "f", "d", "g", "F", "D"])
@pytest.mark.parametrize("name", NAMES)
def test_dtypes_are_computed_in_higher_precision_and_rounded_once(comm, name, dtype):
    made = graph(name, P)
    vectors = [own_data(97, rank, dtype) for rank in range(P)]
    x = vectors[comm.rank].copy()
    mpicoll.gossip_average(x, comm, name, step=1)
    wide = np.complex128 if np.dtype(dtype).kind == "c" else np.longdouble
    wanted = mixed(made, 1, 1, [vector.astype(wide) for vector in vectors])[comm.rank]
    if dtype in ("d", "g", "D"):
        np.testing.assert_allclose(x, wanted, rtol=1e-15)
    elif dtype == "F":
        np.testing.assert_array_equal(x, wanted.astype(np.complex64))
    else:
        np.testing.assert_array_equal(x.astype("d"), wanted.astype("d").astype(dtype).astype("d"))


def test_butterfly_reaches_the_mean_exactly_in_log2_p_steps_from_any_step(comm):
    made = graph("butterfly", P)
    total = np.sum([own_data(97, rank) for rank in range(P)], axis=0)
    for start in range(made.period or 0):
        x = own_data(97, comm.rank) * P
        for step in range(start, start + (made.period or 0)):
            mpicoll.butterfly_mix(x, comm, step=step)
        if ALGORITHMS["mix"]["butterfly"].exact(P):
            np.testing.assert_array_equal(x, total)
        else:
            assert 0 < comm.allreduce(np.abs(x - total).max(), MPI.MAX) < np.abs(total).max() / 3


@pytest.mark.parametrize("name", NAMES)
def test_the_mean_stays_for_a_hundred_steps_and_all_come_to_it(comm, name):
    x = np.random.default_rng(comm.rank).normal(1, 1, 1000)
    mean = comm.allreduce(x) / P
    for step in range(100):
        mpicoll.gossip_average(x, comm, name, step=step)
    np.testing.assert_allclose(comm.allreduce(x) / P, mean, rtol=0, atol=1e-12)
    needed = graph(name, P).rounds_to(1e-6)
    assert needed is not None
    if needed <= 100:
        np.testing.assert_allclose(x, mean, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_infinities_and_signed_zeros(comm, name):
    x = np.array([complex(np.inf, 1), complex(1, -0.0), complex(-0.0, -np.inf)])
    before = x.copy()
    mpicoll.gossip_average(x, comm, name, step=0)
    # real and imaginary parts apart: beside an infinity NumPy would compare the other part exactly
    np.testing.assert_allclose(x.view("d"), before.view("d"), rtol=1e-15)
    np.testing.assert_array_equal(np.signbit(x.view("d")), np.signbit(before.view("d")))


@pytest.mark.parametrize("name", NAMES)
def test_what_all_agree_on_does_not_drift(comm, name):
    x = np.random.default_rng(0).normal(size=1000).astype("f4")
    before = x.copy()
    for step in range(100):
        mpicoll.gossip_average(x, comm, name, step=step)
    np.testing.assert_array_equal(x, before)


def test_lists_shapes_and_what_mpi4py_takes(comm):
    made = graph("ring", P)

    def own(rank: int) -> list[np.ndarray]:
        return [own_data(6, rank, "f4").reshape(2, 3), own_data(5, rank), own_data(4, rank, "f4")]

    arrays = own(comm.rank)
    arrays[0] = np.asfortranarray(arrays[0])
    mpicoll.gossip_average(arrays, comm, made, step=0)
    for n, array in enumerate(arrays):
        wanted = mixed(made, 0, 1, [own(rank)[n].reshape(-1) for rank in range(P)])[comm.rank]
        np.testing.assert_allclose(array, wanted.reshape(array.shape), rtol=1e-6)
    x = own_data(5, comm.rank)
    mpicoll.gossip_average([x, 3, MPI.DOUBLE], comm, made, step=0)
    np.testing.assert_allclose(x[:3], mixed(made, 0, 1, [own_data(5, rank) for rank in range(P)])[comm.rank][:3])
    np.testing.assert_array_equal(x[3:], own_data(5, comm.rank)[3:])


def test_a_users_matrix_and_a_networkx_graph(comm):
    ours = mpicoll.Comm(comm)
    lazy = (np.eye(P) + graph("complete", P).matrix(0)) / 2
    for what in (lazy, [lazy, np.eye(P)], nx.path_graph(P), nx.DiGraph(nx.cycle_graph(P)) if P > 2 else np.eye(P)):
        for made in (what, graph(what)):
            x = own_data(13, comm.rank)
            for step in range(3):
                mpicoll.gossip_average(x, ours, made, step=step)
            vectors = [own_data(13, rank) for rank in range(P)]
            np.testing.assert_allclose(x, mixed(graph(what), 0, 3, vectors)[comm.rank], rtol=1e-14)


def test_a_graph_that_differs_between_ranks_is_refused_on_all(comm):
    if P < 3:
        pytest.skip("all graphs of two ranks that average are the same")
    mine = [graph("ring", P), graph("star", P)][comm.rank == P - 1]
    for call in (
        lambda: mpicoll.gossip_average(np.ones(3), comm, mine, step=0),
        lambda: mpicoll.PushSum(comm, mine),
    ):
        with pytest.raises(mpicoll.MismatchError, match=rf"rank {P - 1} .*mix, weights \w+, star graph of {P} ranks"):
            call()
    weights = np.full((P, P), 1 / P)
    if comm.rank == 1:
        weights = (weights + np.eye(P)) / 2
    with pytest.raises(mpicoll.MismatchError, match=f"rank 1 .*user's graph of {P} ranks"):
        mpicoll.gossip_average(np.ones(3), comm, weights, step=0)
    x = np.full(3, float(comm.rank))  # nothing was sent: the communicator is as good as before
    np.testing.assert_allclose(mpicoll.gossip_average(x, comm, "complete", step=0), (P - 1) / 2)


WRONG: dict[str, Any] = {
    "mixing takes floats or complex numbers, got dtype int64": (np.arange(3), "ring", 0),
    "got dtype bool": (np.ones(3, bool), "ring", 0),
    "got dtype int32": ([np.ones(3), np.ones(3, "i4")], "ring", 0),
    "step must be 0 or more, got -1": (np.ones(3), "ring", -1),
    "step must be a whole number, got float": (np.ones(3), "ring", 0.5),
    "expected a graph of": (np.ones(3), np.eye(P + 1), 0),
    f"expected a graph of {P} ranks, got a ring graph of {P + 1} ranks": (np.ones(3), graph("ring", P + 1), 0),
    "unknown graph 'rign'": (np.ones(3), "rign", 0),
    "expected a contiguous array": (np.ones(6)[::2], "ring", 0),
    "expected an array in host memory": (3.5, "ring", 0),
}
if P > 1:
    SINK = np.eye(P)
    SINK[0] = 1 / 2  # rank 0 takes half of what the others have, and gives nothing away
    SINK[1:] /= 2
    SINK[0, 0] = 1
    WRONG["doubly stochastic, .*: use mpicoll.PushSum"] = (
        np.ones(3),
        SINK,
        0,
    )
    WRONG["what rank 0 gives away, column 0, must add up to 1, but misses it by"] = (np.ones(3), SINK.T, 0)


@pytest.mark.parametrize("message", WRONG)
def test_what_cannot_be_mixed_is_refused_with_a_reason(comm, message):
    x, made, step = WRONG[message]
    with pytest.raises((TypeError, ValueError), match=message):
        mpicoll.gossip_average(x, comm, made, step=step)
    with pytest.raises(TypeError, match="expected an mpi4py intracommunicator, got str"):
        mpicoll.butterfly_mix(np.ones(3), "comm", step=0)


def test_plans_are_kept_for_a_period_and_bounded(comm):
    plans = state_of(comm).plans
    x = np.ones(5)
    for step in range(40):
        mpicoll.butterfly_mix(x, comm, step=step)
    assert len(plans) == graph("butterfly", P).period
    for step in range(2 * MAX_PLANS):
        mpicoll.gossip_average(x, comm, "matching", step=step)
    assert len(plans) == MAX_PLANS


def test_collectives_under_way_go_on_meanwhile(comm):
    ours = mpicoll.Comm(comm)
    x, y = own_data(1000, comm.rank), np.full(1000, float(comm.rank))
    handle = mpicoll.iallreduce(x, ours, algorithm="ring")
    for step in range(5):
        mpicoll.gossip_average(y, ours, "complete", step=step)
        if step == 2:
            handle.wait()
    np.testing.assert_array_equal(x, np.sum([own_data(1000, rank) for rank in range(P)], axis=0))
    np.testing.assert_allclose(y, (P - 1) / 2)


# Push-sum.


def one_way(p: int) -> nx.DiGraph:
    """A ring in one direction, and rank 0 sends to everybody: no rank receives what it sends."""
    return nx.DiGraph([(rank, (rank + 1) % p) for rank in range(p)] + [(0, rank) for rank in range(p)])


@pytest.mark.parametrize("dtype", ["f", "d", "D"])
def test_push_sum_conserves_both_sums_and_comes_to_the_mean(comm, dtype):
    made = graph(one_way(P) if P > 1 else np.eye(1))
    push = mpicoll.PushSum(comm, made)
    x = (np.random.default_rng(comm.rank).normal(1, 1, 100) * (1 + (1j if dtype == "D" else 0))).astype(dtype)
    total = comm.allreduce(x.astype("D"))
    for step in range(60):
        assert push.step == step
        assert push.mix(x) is x
        np.testing.assert_allclose(comm.allreduce(x.astype("D")), total, atol=1e-5 if dtype == "f" else 1e-12)
        assert comm.allreduce(push.weight) == pytest.approx(P, abs=1e-12)
        if step == 1 and P > 2:  # neither is what it would be where every row adds up to 1
            assert comm.allreduce(abs(push.weight - 1), MPI.MAX) > 0.01
    np.testing.assert_allclose(push.estimate(x), total / P, atol=1e-4 if dtype == "f" else 1e-5)
    first, second = push.estimate([x, x[:2]])
    np.testing.assert_array_equal(first[:2], second)


def test_push_sum_is_exact_where_weights_are(comm):
    if P < 2:
        pytest.skip("one rank has nobody to push to")
    push = np.eye(P) / 2
    push[np.maximum(np.arange(P) - 1, 0), np.arange(P)] += 0.5  # half to the rank below, and rank 0 keeps all
    weights = mpicoll.PushSum(comm, [push, push[::-1, ::-1]])
    x = own_data(97, comm.rank) * 2.0**20
    total = comm.allreduce(x)
    for step in range(6):
        weights.mix(x)
        np.testing.assert_array_equal(comm.allreduce(x), total)
        assert weights.weights.sum() == P
        assert weights.graph.matrix(step).shape == (P, P)
    vectors = np.array([own_data(97, rank) * 2.0**20 for rank in range(P)])
    held, ones = vectors, np.ones(P)
    for step in range(6):
        held, ones = weights.graph.matrix(step) @ held, weights.graph.matrix(step) @ ones
    np.testing.assert_array_equal(x, held[comm.rank])
    assert weights.weight == ones[comm.rank]


def test_push_sum_on_a_doubly_stochastic_graph_is_averaging(comm):
    push, x, y = mpicoll.PushSum(comm, "ring"), own_data(97, comm.rank), own_data(97, comm.rank)
    for step in range(5):
        push.mix([x])
        mpicoll.gossip_average(y, comm, "ring", step=step)
        np.testing.assert_array_equal(x, y)
        assert push.weight == pytest.approx(1, abs=1e-14)
    assert repr(push) == f"<PushSum on a ring graph of {P} ranks, step 5>"


def test_push_sum_stays_as_it_is_where_a_call_is_refused(comm):
    push = mpicoll.PushSum(comm, "star")
    for wrong in (np.arange(3), "text"):
        with pytest.raises(TypeError):
            push.mix(wrong)
    assert push.step == 0
    assert push.weights.tolist() == [1] * P
    duplicate = comm.Dup()
    gone = mpicoll.PushSum(duplicate, "star")
    duplicate.Free()
    with pytest.raises(TypeError, match="expected an mpi4py intracommunicator, got one that is null or was freed"):
        gone.mix(np.ones(3))
    assert gone.weight == 1


def test_an_estimate_is_of_the_dtype_and_as_precise(comm):
    push = mpicoll.PushSum(comm, "complete")
    push.weights = push.weights * 1e-9  # as where rank after rank passes a little on
    for dtype in ("e", bfloat16, "f", "d", "D"):
        estimate = push.estimate(np.full(3, 1e-7).astype(dtype))
        assert estimate.dtype == np.dtype(dtype)
        np.testing.assert_allclose(estimate.astype("D"), 100, rtol=0.25 if dtype == "e" else 0.01)
