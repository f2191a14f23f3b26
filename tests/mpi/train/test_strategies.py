"""Strategies against what theory says of them: every one has an oracle."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

import mpicoll
from mpicoll import UserError
from mpicoll.graphs import graph
from mpicoll.train.optimizers import OPTIMIZERS
from mpicoll.train.settings import Settings
from mpicoll.train.strategies import STRATEGIES, Now, Strategy
from training import DECENTRAL, REPEATABLE, blobs, trained, training

P = MPI.COMM_WORLD.size
pytestmark = [pytest.mark.mpi, pytest.mark.skipif(P in (6, 7), reason="five ranks and eight show it")]
IS_POWER = P & (P - 1) == 0


def strategy(comm: MPI.Intracomm, params: np.ndarray, optimizer: str = "sgd", **given: Any) -> Strategy:
    """By itself, with no model: what is in ``params`` is the test's affair."""
    made = OPTIMIZERS[optimizer](params.size, params.dtype, momentum=0.9, beta2=0.999, weight_decay=0.0)
    sums = np.zeros(params.size + 2, params.dtype)
    return STRATEGIES[given["strategy"]](comm, sums, params, made, Settings(**given), steps_per_epoch=10)


def wander(comm: MPI.Intracomm, made: Strategy, steps: int, lr: float = 0.5, seed: int = 0) -> None:
    """Steps along gradients that are noise alone, of variance 1, another one for each rank and step."""
    for step in range(steps):
        noise = np.random.default_rng([seed, comm.rank, step]).normal(size=made.params.size).astype(made.params.dtype)
        made.agree_on_gradient(Now(1, step, lr))
        made.params -= lr * noise
        made.agree_on_parameters(Now(1, step, lr))


def variance(comm: MPI.Intracomm, params: np.ndarray) -> float:
    """Mean square distance from the mean, per coordinate and rank."""
    return float(np.mean(np.square(np.array(comm.allgather(params)) - comm.allreduce(params) / P)))


# One rank is plain SGD, whatever the strategy.


PLAIN: list[dict[str, Any]] = [
    *({"strategy": name, **given} for name, given in REPEATABLE.items()),
    {"strategy": "average", "every": 1},
    {"strategy": "average", "outer": "bmuf"},
    {"strategy": "average", "outer": "slowmo", "outer_momentum": 0.0},
]


def test_every_strategy_has_its_row():
    assert {*REPEATABLE} == {*STRATEGIES}


@pytest.mark.parametrize("given", PLAIN, ids=lambda given: "-".join(map(str, given.values())))
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_one_rank_is_plain_sgd(given, optimizer):
    plain = trained(MPI.COMM_SELF, blobs(101), strategy="sync", optimizer=optimizer, lr=0.01)
    other = trained(MPI.COMM_SELF, blobs(101), optimizer=optimizer, lr=0.01, **given)
    if "outer" in given:
        np.testing.assert_allclose(other.params, plain.params, rtol=1e-12)
    else:
        np.testing.assert_array_equal(other.params, plain.params)


@pytest.mark.parametrize("outer", ["mean", "bmuf", "slowmo"])
@pytest.mark.parametrize("batch_size", [1, 7, 32])
def test_averaging_in_every_step_is_synchronous_sgd(comm, batch_size, outer):
    """However unevenly the batch is shared out, because gradients are weighted by sample count."""
    given = {"batch_size": batch_size, "momentum": 0.0, "epochs": 1 if batch_size == 1 else 3}
    together = trained(comm, blobs(101), strategy="sync", **given)
    averaged = trained(comm, blobs(101), strategy="average", every=1, outer=outer, outer_momentum=0.0, **given)
    np.testing.assert_allclose(averaged.params, together.params, rtol=1e-9, atol=1e-12)
    kept = trained(comm, blobs(101), strategy="average", every=1, outer=outer, outer_momentum=0.5, **given)
    assert not np.allclose(kept.params, together.params, rtol=1e-3)


def test_synchronous_epochs_come_first(comm):
    """Post-local SGD: the first two epochs are those of sync, bit for bit."""
    common = {"seed": 5, "optimizer": "nesterov"}
    together = trained(comm, blobs(101), strategy="sync", epochs=2, **common)
    for outer in ("mean", "bmuf", "easgd"):
        local = training(comm, blobs(101), strategy="average", sync_epochs=2, epochs=2, outer=outer, **common)
        result = local.run()
        np.testing.assert_array_equal(local.params, together.params)
        np.testing.assert_allclose(result.params, together.params, rtol=1e-14)
        assert (result.epochs[-1].consensus or 0) < 1e-14
    later = trained(comm, blobs(101), strategy="average", sync_epochs=2, every=100, epochs=3, **common)
    assert (later.epochs[1].consensus or 0) < 1e-14
    assert P == 1 or (later.epochs[2].consensus or 0) > 1e-4


# How far ranks drift apart under noise.  With n coordinates, p ranks, an estimate of the variance has a relative
# standard error of at most sqrt(2 / n), that of a mean of n squares of normals; 6 of these are allowed.

N = 20_000
ERROR = 6 * np.sqrt(2 / N)


@pytest.mark.skipif(not IS_POWER, reason="the formula is for powers of two")
def test_consensus_variance_of_butterfly_mixing(comm):
    made = strategy(comm, np.zeros(N), strategy="butterfly")
    wander(comm, made, 7)
    stages = P.bit_length() - 1
    wanted = 0.5**2 * (1 - (stages + 1) / P)
    assert variance(comm, made.params) == pytest.approx(wanted, rel=ERROR, abs=1e-12)


def test_consensus_variance_of_local_sgd(comm):
    made = strategy(comm, np.zeros(N), strategy="average", every=4)
    wander(comm, made, 4 + 3)
    assert variance(comm, made.params) == pytest.approx(0.5**2 * 3 * (1 - 1 / P), rel=ERROR, abs=1e-12)
    wander(comm, made, 4)
    assert variance(comm, made.params) == 0


@pytest.mark.parametrize("mix_first", [False, True])
def test_consensus_variance_of_ring_gossip(comm, mix_first):
    made = strategy(comm, np.zeros(N), strategy="gossip", graph="ring", mix_first=mix_first)
    wander(comm, made, 60)
    values = np.linalg.eigvalsh(graph("ring", P).matrix(0))
    values = np.delete(values, np.argmax(values))  # of the mean
    wanted = 0.5**2 / P * np.sum((1 if mix_first else values**2) / (1 - values**2))
    assert variance(comm, made.params) == pytest.approx(wanted, rel=ERROR, abs=1e-12)


# What stays the same.


@pytest.mark.parametrize("name", DECENTRAL)
def test_the_mean_over_ranks_takes_the_mean_step(comm, name):
    made = strategy(comm, np.full(50, float(comm.rank)), strategy=name)
    wander(comm, made, 9)
    noise = [[np.random.default_rng([0, rank, step]).normal(size=50) for step in range(9)] for rank in range(P)]
    wanted = (P - 1) / 2 - 0.5 * np.sum(np.mean(noise, axis=0), axis=0)
    np.testing.assert_allclose(comm.allreduce(made.params) / P, wanted, rtol=0, atol=1e-12)
    agreed = made.consensus()
    np.testing.assert_allclose(agreed, wanted, rtol=0, atol=1e-12)
    assert len({model.tobytes() for model in comm.allgather(agreed)}) == 1


def test_easgd_keeps_the_sum_of_workers_and_center(comm):
    made = strategy(comm, np.full(50, 3.0), strategy="average", outer="easgd", every=1)
    made.params[:] = comm.rank + np.arange(50)
    for step in range(5):
        before = comm.allreduce(made.params) + made.state()["anchor"]
        apart = variance(comm, made.params)
        made.agree_on_parameters(Now(1, step, 0.1))
        np.testing.assert_allclose(comm.allreduce(made.params) + made.state()["anchor"], before, rtol=1e-13)
        assert variance(comm, made.params) <= apart
    np.testing.assert_array_equal(made.consensus(), made.state()["anchor"])


def column_stochastic(p: int) -> np.ndarray:
    """Rank 0 gives to all, the others a third to the next."""
    matrix = np.eye(p) * (2 / 3 if p > 1 else 1)
    for rank in range(1, p):
        matrix[(rank + 1) % p, rank] += 1 / 3
    matrix[:, 0] = 1 / p
    return matrix


def test_push_sum_keeps_both_sums_and_finds_the_mean(comm, folder):
    if comm.rank == 0:
        np.save(folder / "graph.npy", column_stochastic(P))
    comm.Barrier()
    made = strategy(comm, np.arange(50.0) * comm.rank, strategy="gossip", graph=str(folder / "graph.npy"))
    assert P == 1 or "push-sum" in made.algorithm
    for step in range(150):
        made.agree_on_parameters(Now(1, step, 0.1))
        np.testing.assert_allclose(comm.allreduce(made.params), np.arange(50.0) * P * (P - 1) / 2, rtol=1e-12)
        if P > 1:
            assert made.state()["weights"].sum() == pytest.approx(P)
    np.testing.assert_allclose(made.point(), np.arange(50.0) * (P - 1) / 2, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(made.consensus(), np.arange(50.0) * (P - 1) / 2, rtol=1e-12)
    result = trained(comm, blobs(101), strategy="gossip", graph=str(folder / "graph.npy"), epochs=5)
    assert result.epochs[-1].train_loss < result.epochs[0].train_loss


# Outer optimizers, against their papers' own recurrences.


def averages(comm: MPI.Intracomm, made: Strategy, lrs: list[float], note: Callable[[np.ndarray], None]) -> np.ndarray:
    """Local steps that differ by rank, ``note`` being told each mean before ranks take it in."""
    for step, lr in enumerate(lrs):
        made.params += np.random.default_rng([comm.rank, step]).normal(size=made.params.size)
        note(comm.allreduce(made.params) / P)
        made.agree_on_parameters(Now(1, step, lr))
    return made.params


@pytest.mark.parametrize(("outer", "lr", "momentum"), [("diloco", 0.7, 0.9), ("bmuf", 1.0, 1 - 1 / P)])
def test_nesterov_outside(comm, outer, lr, momentum):
    """The optimizer that DiLoCo names, as PyTorch's SGD(nesterov=True) has it: x -= lr (g + momentum v)."""
    x, v = np.ones(20), np.zeros(20)

    def follow(mean: np.ndarray) -> None:
        nonlocal x, v
        v = momentum * v + (x - mean)
        x = x - lr * ((x - mean) + momentum * v)

    made = strategy(comm, np.ones(20), strategy="average", outer=outer, every=1)
    ended = averages(comm, made, [0.1] * 5, follow)
    np.testing.assert_allclose(ended, x, rtol=1e-12)


def test_slow_momentum(comm):
    """u = beta u + (x - mean) / gamma; x = x - alpha gamma u, with the learning rate gamma of that time."""
    x, u, gammas = np.ones(20), np.zeros(20), [0.1, 0.1, 0.02, 0.02, 0.3]
    rates = iter(gammas)

    def follow(mean: np.ndarray) -> None:
        nonlocal x, u
        gamma = next(rates)
        u = 0.6 * u + (x - mean) / gamma
        x = x - 0.8 * gamma * u

    made = strategy(comm, np.ones(20), strategy="average", outer="slowmo", outer_lr=0.8, outer_momentum=0.6, every=1)
    np.testing.assert_allclose(averages(comm, made, gammas, follow), x, rtol=1e-10)


def test_block_momentum(comm):
    x, d = np.ones(20), np.zeros(20)

    def follow(mean: np.ndarray) -> None:
        nonlocal x, d
        d = (1 - 1 / P) * d + (mean - x)
        x = x + d

    made = strategy(comm, np.ones(20), strategy="average", outer="bmuf-classical", every=1)
    np.testing.assert_allclose(averages(comm, made, [0.1] * 5, follow), x, rtol=1e-12)


# The optimizer's state at an agreement.


@pytest.mark.parametrize(("name", "momenta"), [("average", "keep"), ("average", "average"), ("average", "reset")])
def test_momenta_at_an_average(comm, name, momenta):
    made = strategy(comm, np.zeros(5), "adam", strategy=name, every=2, momenta=momenta)
    own = {name: np.full(5, 1.0 + comm.rank + n) for n, name in enumerate(made.optimizer.state)}
    made.optimizer.steps = 7
    for key, vector in made.optimizer.state.items():
        vector[:] = own[key]
    made.agree_on_parameters(Now(1, 0, 0.1))  # no agreement yet
    assert all((made.optimizer.state[key] == own[key]).all() for key in own)
    made.agree_on_parameters(Now(1, 1, 0.1))
    for key, vector in made.optimizer.state.items():
        wanted = {"keep": own[key], "average": comm.allreduce(own[key]) / P, "reset": np.zeros(5)}[momenta]
        np.testing.assert_allclose(vector, wanted, rtol=1e-15)
    assert made.optimizer.steps == (0 if momenta == "reset" else 7)


def test_momenta_are_mixed_by_the_same_round(comm):
    made = strategy(comm, np.full(5, float(comm.rank)), strategy="gossip", graph="ring", momenta="average")
    made.optimizer.state["velocity"][:] = comm.rank
    made.agree_on_parameters(Now(1, 0, 0.1))
    np.testing.assert_array_equal(made.optimizer.state["velocity"], made.params)
    with pytest.raises(UserError, match="momenta reset is for averaging: butterfly mixes in every step"):
        strategy(comm, np.zeros(5), strategy="butterfly", momenta="reset")


# What was sent.


@pytest.mark.parametrize(("name", "every"), [("sync", 1), ("average", 4), ("butterfly", 1), ("gossip", 1)])
def test_bytes_and_messages(comm, name, every):
    params = np.zeros(1000, "f4")
    given = {"every": every} if name == "average" else {"graph": "ring"} if name == "gossip" else {}
    if name in ("sync", "average"):
        made = strategy(comm, params, strategy=name, **given)
        made.agree_on_gradient(Now(1, every - 1, 0.1))
        made.agree_on_parameters(Now(1, every - 1, 0.1))
        assert P == 1 or (made.algorithm, made.bytes_sent, made.messages) == ("shared", 0, 0)
        given["algorithm"] = "halving_doubling"
    made = strategy(comm, params, strategy=name, **given)
    for step in range(8):
        made.agree_on_gradient(Now(1, step, 0.1))
        made.agree_on_parameters(Now(1, step, 0.1))
    size = params.nbytes + (8 if name == "sync" else 0)
    neighbors = len(set(graph("ring", P).neighbors(comm.rank, 0)[1]) - {comm.rank})
    if name == "butterfly":
        assert (made.bytes_sent, made.messages) == ((8 * size, 8) if P > 1 else (0, 0))
    elif name == "gossip":
        assert (made.bytes_sent, made.messages) == (8 * size * neighbors, 8 * neighbors)
    else:
        row = mpicoll.ALGORITHMS["allreduce"][made.algorithm]
        most = comm.allreduce(made.bytes_sent, MPI.MAX)
        assert most == pytest.approx(8 / every * float(row.sent(P)) * size, abs=8 * 4 * P)
        assert comm.allreduce(made.messages, MPI.MAX) >= 8 / every * (P > 1)
    assert len(made.seconds) == 8 / every


# Bad input.


def test_a_file_of_several_arrays_is_no_graph(comm, folder):
    if comm.rank == 0:
        with (folder / "graph.npy").open("wb") as file:
            np.savez(file, a=np.eye(P), b=np.eye(P))
    comm.Barrier()
    with pytest.raises(UserError, match=r"holds several arrays: expected an .npy file of one"):
        strategy(comm, np.zeros(5), strategy="gossip", graph=str(folder / "graph.npy"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"strategy": "snyc"},
            "--strategy must be one of sync, average, butterfly, gossip, ad-psgd, async, got 'snyc'",
        ),
        ({"optimizer": "adm"}, "--optimizer must be one of sgd, .*, got 'adm'"),
        ({"strategy": "average", "outer": "bm"}, "--outer must be one of mean, bmuf, .*, got 'bm'"),
        ({"strategy": "average", "every": 0}, "--every must be at least 1, got 0"),
        ({"batch_size": 0}, "--batch-size must be at least 1, got 0"),
        ({"every": 3}, "--every is not for the sync strategy, but for average: leave it out"),
        ({"strategy": "butterfly", "graph": "ring"}, "--graph is not for the butterfly strategy, but for gossip"),
        ({"patience": 3}, "--patience needs validation samples"),
    ],
)
def test_settings_that_will_not_do(comm, given, message):
    with pytest.raises(UserError, match=message):
        training(comm, blobs(30), **given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"graph": "rign"}, "graph 'rign': .*ring"),
        ({"graph": "gone.npy"}, "graph 'gone.npy' cannot be read as an .npy file of matrices"),
    ],
)
def test_graphs_that_there_are_not(comm, given, message):
    with pytest.raises(UserError, match=message):
        strategy(comm, np.zeros(5), strategy="gossip", **given)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: np.eye(P + 1), f"expected a graph of {P} ranks, got one of {P + 1}"),
        (lambda: np.eye(P) * 0.9, "must add up to 1"),
        (lambda: np.eye(P), "is not connected: some ranks never hear of others"),
        (lambda: np.diag([0.5] * (P - 1) + [1]) + np.eye(P, k=-1) / 2, "is not connected"),  # rank 0 hears of nobody
        (lambda: np.roll(np.eye(P), 1, axis=0), "does not bring ranks closer to each other"),
    ],
)
def test_matrices_that_will_not_do(comm, folder, make, message):
    if P == 1 and "add up" not in message and "expected" not in message:
        pytest.skip("one rank is always connected")
    path = folder / "graph.npy"
    if comm.rank == 0:
        np.save(path, make())
    comm.Barrier()
    with pytest.raises(UserError, match=message) as caught:
        strategy(comm, np.zeros(5), strategy="gossip", graph=str(path))
    assert len(set(comm.allgather(str(caught.value)))) == 1
