from functools import reduce
from math import cos, log, log2, pi

import networkx as nx
import numpy as np
import pytest

import mpicoll
from mpicoll.algorithms import ALGORITHMS, mixing
from mpicoll.graphs import SAMPLE, Graph, graph
from mpicoll.interpreter import interpret_arrays
from mpicoll.verify import mixing_matrix

NAMES = list(ALGORITHMS["mix"])
RANKS = [*range(1, 18), 24, 31, 32, 36, 63, 64]
ONE_PEER = ["butterfly", "exponential", "matching"]  # weights are halves: exact in any precision


def rounds(made: Graph) -> range:
    return range(made.period or 20)


@pytest.mark.parametrize("p", RANKS)
@pytest.mark.parametrize("name", NAMES)
def test_every_round_is_doubly_stochastic_and_its_schedule_does_what_its_matrix_says(name, p):
    made = graph(name, p)
    assert made.doubly
    for t in rounds(made):
        matrix = made.matrix(t)
        np.testing.assert_allclose([matrix.sum(axis=0), matrix.sum(axis=1)], 1, rtol=1e-14)
        assert (matrix >= 0).all()
        assert (matrix.diagonal() > 0).all()
        np.testing.assert_array_equal(mixing_matrix(mixing.schedule(made, t, 1)), matrix)
        if made.period:
            np.testing.assert_array_equal(made.matrix(t + made.period), matrix)


@pytest.mark.parametrize("p", RANKS)
@pytest.mark.parametrize("name", NAMES)
def test_the_mean_stays(name, p):
    made = graph(name, p)
    vectors = [np.random.default_rng(rank).integers(-999, 999, 5) * 2.0**20 for rank in range(p)]
    mean = np.mean(vectors, axis=0)
    for t in rounds(made):
        vectors = interpret_arrays(mixing.schedule(made, t, 1), vectors, np.add)
        if name in ONE_PEER:
            np.testing.assert_array_equal(np.mean(vectors, axis=0), mean)
        else:
            np.testing.assert_allclose(np.mean(vectors, axis=0), mean, rtol=1e-12, atol=1e-12 * 2**30)


@pytest.mark.parametrize("p", RANKS)
@pytest.mark.parametrize("name", NAMES)
def test_a_period_reaches_the_mean_where_that_is_claimed_and_only_there(name, p):
    made = graph(name, p)
    off = np.abs(made.product() - 1 / p).max()
    assert (off < 1e-12) == ALGORITHMS["mix"][name].exact(p)


@pytest.mark.parametrize("p", [2, 4, 8, 16, 32])
@pytest.mark.parametrize("name", ["butterfly", "exponential"])
def test_any_log2_p_consecutive_steps_reach_the_mean_exactly(name, p):
    made, stages = graph(name, p), p.bit_length() - 1
    assert made.period == stages
    for start in range(stages):
        product = reduce(lambda done, t: made.matrix(t) @ done, range(start, start + stages), np.eye(p))
        np.testing.assert_array_equal(product, np.full((p, p), 1 / p))


@pytest.mark.parametrize("p", RANKS)
@pytest.mark.parametrize("name", NAMES)
def test_a_round_brings_ranks_closer_as_the_second_singular_value_says(name, p):
    made = graph(name, p)
    x = np.random.default_rng(p).normal(size=p)
    for t in rounds(made):
        matrix, before = made.matrix(t), x - x.mean()
        x = matrix @ x
        second = np.linalg.svd(matrix, compute_uv=False)[1] if p > 1 else 0
        assert np.linalg.norm(x - x.mean()) <= second * np.linalg.norm(before) * (1 + 1e-9) + 1e-12


@pytest.mark.parametrize("p", [1, 2, 3, 4, 6, 8, 13, 16])
@pytest.mark.parametrize("name", NAMES)
def test_rounds_to_consensus_are_the_fewest(name, p):
    made = graph(name, p)
    for distance in (0.5, 1e-3):
        needed = made.rounds_to(distance)
        assert needed is not None
        product = np.eye(p)
        for t in range(needed + 1):
            apart = np.linalg.norm(product - 1 / p, 2)
            assert (apart <= distance) == (t == needed)
            product = made.matrix(t) @ product


def test_butterfly_is_rank_xor_a_power_of_two_and_otherwise_exponential():
    for p in (2, 4, 8, 16):
        for t in range(10):
            for rank in range(p):
                sources, targets = graph("butterfly", p).neighbors(rank, t)
                peer = rank ^ 1 << t % int(log2(p))
                assert targets == sorted([rank, peer])
                assert sources == [(either, 0.5) for either in targets]
    for p in (1, 3, 5, 6, 7, 12):
        for t in range(10):
            np.testing.assert_array_equal(graph("butterfly", p).matrix(t), graph("exponential", p).matrix(t))


@pytest.mark.parametrize("p", [2, 3, 5, 6, 7, 8, 12, 33])
def test_exponential_peers_are_powers_of_two_away(p):
    stages = (p - 1).bit_length()
    assert graph("exponential", p).period == stages
    shift = np.roll(np.eye(p), 1, axis=0)  # what rank r takes from rank r - 1
    shifts = [np.linalg.matrix_power(shift, 1 << t) for t in range(stages)]
    for t, shifted in enumerate(shifts):
        np.testing.assert_array_equal(graph("exponential", p).matrix(t), (np.eye(p) + shifted) / 2)
    static = (np.eye(p) + sum(shifts)) / (stages + 1)
    np.testing.assert_allclose(graph("static_exponential", p).matrix(7), static, rtol=1e-15)


def test_ring_torus_star_and_complete_have_the_neighbors_they_are_named_for():
    for p in (3, 4, 7, 64):
        second = (1 + 2 * cos(2 * pi / p)) / 3
        assert graph("ring", p).contraction == pytest.approx(abs(second), abs=1e-12)
        assert graph("star", p).contraction == pytest.approx(1 - 1 / p)
    square = nx.grid_2d_graph(4, 6, periodic=True)
    expected = np.eye(24) + nx.to_numpy_array(square, nodelist=[(row, col) for row in range(4) for col in range(6)])
    np.testing.assert_allclose(graph("torus", 24).matrix(0), expected / 5, rtol=1e-15)
    np.testing.assert_array_equal(graph("torus", 7).matrix(0), graph("ring", 7).matrix(0))
    assert [degree(graph("torus", p)) for p in (2, 4, 6, 9)] == [1, 2, 3, 4]
    np.testing.assert_allclose(graph("complete", 7).matrix(0), 1 / 7, rtol=1e-15)
    assert graph("complete", 7).contraction == 0
    star = graph("star", 5).matrix(0)
    assert star[0].tolist() == pytest.approx([0.2] * 5)
    assert star[3].tolist() == pytest.approx([0.2, 0, 0, 0.8, 0])


def degree(made: Graph) -> int:
    """The most neighbors of any rank in any round."""
    return max(int((made.matrix(t) > 0).sum(axis=side).max()) - 1 for t in rounds(made) for side in (0, 1))


def test_base_graphs_are_as_short_as_published():
    lengths = [graph("base", p).period for p in range(2, 17)]
    assert lengths == [1, 3, 2, 5, 4, 5, 3, 7, 6, 7, 5, 7, 6, 7, 4]
    assert [graph("base", p).period for p in (24, 31, 32, 63)] == [6, 9, 5, 11]
    for peers in (1, 2, 3, 4):
        for p in range(1, 66):
            made = graph("base", p, degree=peers)
            assert made.period <= 2 * log(max(p, 2), peers + 1) + 2
            assert degree(made) <= peers
            for t in rounds(made):
                np.testing.assert_array_equal(made.matrix(t), made.matrix(t).T)
            assert np.abs(made.product() - 1 / p).max() < 1e-12


@pytest.mark.parametrize("p", [2, 5, 6, 16])
def test_matchings_are_random_pairs_the_same_for_the_same_seed(p):
    made, again, other = graph("matching", p), graph("matching", p, seed=0), graph("matching", p, seed=3)
    assert made.period is None
    met = np.zeros((p, p))
    for t in range(SAMPLE):
        matrix = made.matrix(t)
        np.testing.assert_array_equal(matrix, again.matrix(t))
        np.testing.assert_array_equal(matrix, matrix.T)
        assert (matrix.diagonal() == 1).sum() == p % 2
        assert (matrix.diagonal() == 0.5).sum() == p - p % 2
        met += matrix
    assert (met > 0).all()
    assert made.digest == again.digest
    if p > 2:
        assert made.digest != other.digest
        of_mean = 1 / 2 - 1 / (2 * (p - 1)) if p % 2 == 0 else 1 / 2
        assert made.contraction == pytest.approx(of_mean**0.5, rel=0.15)


def test_the_same_matrices_are_the_same_graph_by_whatever_name():
    ring = graph("ring", 6)
    same = [graph(ring.matrix(0)), graph([ring.matrix(0)]), graph(nx.cycle_graph(6)), graph("ring", 6)]
    assert {made.digest for made in same} == {ring.digest}
    assert graph("star", 6).digest != ring.digest
    assert graph("ring", 7).digest != ring.digest
    assert graph([ring.matrix(0), np.eye(6)]).digest != ring.digest


def test_a_users_matrices_one_for_each_round():
    swap = np.array([[0.5, 0.5, 0], [0.5, 0.5, 0], [0, 0, 1]])
    made = mpicoll.graph([swap, swap[::-1, ::-1]])
    assert (made.p, made.period, made.doubly) == (3, 2, True)
    assert made.neighbors(1, 0) == ([(0, 0.5), (1, 0.5)], [0, 1])
    assert made.neighbors(0, 3) == ([(0, 1.0)], [0])
    swap[:] = 0  # it has a copy
    assert made.matrix(0)[0].tolist() == [0.5, 0.5, 0]
    assert made.contraction == pytest.approx(0.5)  # |second eigenvalue| of the product is 1/4
    assert not graph([[0.5, 1], [0.5, 0]]).doubly
    assert not graph([np.eye(2), [[0.5, 1], [0.5, 0]]]).doubly
    assert graph(np.eye(3)).rounds_to(0.5) is None
    assert graph(np.eye(3)).contraction == 1
    assert graph(np.roll(np.eye(3), 1, axis=0)).rounds_to(0.5) is None  # goes round for ever


def test_networkx_graphs():
    path = graph(nx.path_graph(3), 3)  # Metropolis weights
    np.testing.assert_allclose(path.matrix(0), [[2 / 3, 1 / 3, 0], [1 / 3, 1 / 3, 1 / 3], [0, 1 / 3, 2 / 3]])
    directed = nx.DiGraph([(0, 1), (0, 2), (1, 0), (2, 2), (2, 0)])  # each sends equal shares; the loop is no neighbor
    made = graph(directed)
    assert not made.doubly
    np.testing.assert_allclose(made.matrix(0), [[1 / 3, 1 / 2, 1 / 2], [1 / 3, 1 / 2, 0], [1 / 3, 0, 1 / 2]])
    assert made.neighbors(0, 5)[1] == [0, 1, 2]


def test_peers_are_those_of_any_round():
    assert graph("ring", 5).peers(0) == [1, 4]
    assert graph("butterfly", 8).peers(3) == [1, 2, 7]
    assert graph("exponential", 5).peers(0) == [1, 2, 3, 4]  # it takes from some, and gives to others
    assert graph("star", 4).peers(2) == [0]
    assert graph("matching", 4).peers(2) == [0, 1, 3]
    assert graph("ring", 1).peers(0) == []


def test_what_is_symmetric():
    for name in ("ring", "torus", "star", "complete", "base", "matching"):
        for p in (1, 2, 3, 6, 7, 8):
            assert graph(name, p).symmetric, (name, p)
    assert [p for p in range(1, 10) if graph("butterfly", p).symmetric] == [1, 2, 4, 8]
    assert not graph("exponential", 5).symmetric
    assert not graph(np.array([[0.5, 0.3, 0.2], [0.2, 0.5, 0.3], [0.3, 0.2, 0.5]])).symmetric
    regular = graph(nx.DiGraph([(0, 1), (1, 2), (2, 0)]))
    assert regular.doubly
    weighted = nx.DiGraph()
    weighted.add_weighted_edges_from([(0, 1, 1.0), (1, 0, 0.25), (1, 1, 0.75)])
    np.testing.assert_array_equal(graph(weighted).matrix(0), [[0, 0.25], [1, 0.75]])
    mutual = nx.Graph()
    mutual.add_weighted_edges_from([(0, 1, 0.25), (0, 0, 0.75), (1, 1, 0.75)])
    np.testing.assert_array_equal(graph(mutual).matrix(0), [[0.75, 0.25], [0.25, 0.75]])
    single = nx.Graph()
    single.add_node(0)
    assert graph(single).matrix(0).tolist() == [[1]]


def test_push_sum_on_a_directed_graph_comes_to_agree():
    made = graph(nx.DiGraph([(0, 1), (1, 2), (2, 0), (0, 2)]))
    needed = made.rounds_to(1e-6)
    assert needed is not None
    assert not made.doubly
    x, weight = np.array([1.0, 5.0, 9.0]), np.ones(3)
    for t in range(needed):
        x, weight = made.matrix(t) @ x, made.matrix(t) @ weight
    np.testing.assert_allclose(x / weight, 5, atol=1e-5)
    assert 10 < needed < 40


WRONG = {
    "unknown graph 'rign': expected butterfly, .*base, a matrix or a networkx graph": lambda: graph("rign", 4),
    "a ring graph needs the number of ranks, 1 or more": lambda: graph("ring"),
    "a star graph needs the number of ranks": lambda: graph("star", 0),
    "the number of ranks, p, must be whole": lambda: graph("star", 4.0),  # type: ignore[arg-type]
    "the number of ranks, p and seed, must be whole": lambda: graph("matching", 4, seed=[1]),  # type: ignore[arg-type]
    "a ring graph has no parameter 'seed'": lambda: graph("ring", 4, seed=1),
    "seed: only for graphs that have a name": lambda: graph(np.eye(2), seed=1),
    "degree of a base graph must be 1 or more, got 0": lambda: graph("base", 4, degree=0),
    "seed of a matching graph must be 0 or more, got -1": lambda: graph("matching", 4, seed=-1),
    "expected a graph of 4 ranks, got one of 3": lambda: graph(np.eye(3), 4),
    "expected the name of a graph, a square matrix of real numbers or several, or a networkx graph, got int": lambda: (
        graph(7, 4)
    ),
    "networkx graph, got list": lambda: graph([[1, 2], [3]]),
    r"networkx graph, got shape \(1, 2, 3\)": lambda: graph(np.ones((2, 3))),
    "or a networkx graph, got ndarray": lambda: graph(np.eye(2) * 1j),
    "real numbers or several, or a networkx graph, got list": lambda: graph([["1"]]),
    "weights of a networkx graph must be real numbers": lambda: graph(nx.Graph([(0, 1, {"weight": [1]})])),
    r"networkx graph, got shape \(0,\)": lambda: graph(()),
    "user's graph of 2 ranks, round 0: every weight must be 0 or more": lambda: graph([[1.5, -0.5], [-0.5, 1.5]]),
    "user's graph of 2 ranks, round 1: every weight must be 0 or more": lambda: graph([np.eye(2), np.eye(2) * np.nan]),
    "round 0: what rank 0 gives away, column 0, must add up to 1, but misses it by -0.5": lambda: graph(
        [[0.5, 0.5], [0, 0.5]]
    ),
    "round 1: what rank 1 gives away, column 1, must add up to 1, but misses it by 0.5": lambda: graph(
        [np.eye(2), [[0, 0.5], [1, 1]]]
    ),
    "misses it by 2.98e-08; divide each column by its sum, in float64": lambda: graph(np.full((3, 3), 1 / 3, "f4")),
    "round 0: rank 0 takes nothing, not even of its own, and would end with zero": lambda: graph([[0, 0], [1, 1]]),
    "nodes of the networkx graph must be the ranks: the numbers 0 to 2": lambda: graph(nx.path_graph([1, 2, 3])),
    "the numbers 0 to 0": lambda: graph(nx.Graph()),
    "weights on some edges only": lambda: graph(nx.Graph([(0, 1, {"weight": 1}), (1, 2)])),
    "several edges between two nodes": lambda: graph(nx.MultiGraph([(0, 1), (0, 1)])),
}


@pytest.mark.parametrize("message", WRONG)
def test_what_is_no_graph_is_refused_with_a_reason(message):
    with pytest.raises((TypeError, ValueError), match=message):
        WRONG[message]()
