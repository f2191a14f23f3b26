"""PyTorch's modules and optimizers on all ranks: against one process, and against the loop of ``mpicoll train``."""

import io
import re
import runpy
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

torch = pytest.importorskip("torch", reason="needs torch: make test-torch")

from torch import nn  # noqa: E402
from torch.nn.functional import cross_entropy  # noqa: E402
from torch.optim import SGD, Optimizer  # noqa: E402

from launch import REPOSITORY  # noqa: E402
from mpicoll import UserError  # noqa: E402
from mpicoll.torch import Replica  # noqa: E402
from training import blobs, training  # noqa: E402

P, RANK = MPI.COMM_WORLD.size, MPI.COMM_WORLD.rank
pytestmark = pytest.mark.mpi
torch.set_num_threads(1)


def network(seed: int = 0, dtype: Any = torch.float64) -> Any:
    """As ``training`` has it, but for its initial parameters."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).to(dtype)


def sgd(model: Any, lr: float = 0.1, momentum: float = 0.9) -> Any:
    return torch.optim.SGD(model.parameters(), lr, momentum)


def samples(count: int, dtype: Any = torch.float64) -> tuple[Any, Any]:
    data = blobs(count).train
    return torch.from_numpy(data.x).to(dtype), torch.from_numpy(data.y)


def train(replica: Replica, x: Any, y: Any, batch_size: int, epochs: int = 2, **given: Any) -> None:
    """The loop of the documentation."""
    for epoch in range(epochs):
        for mine in replica.batches(len(x), batch_size, epoch, **given):
            cross_entropy(replica.model(x[mine]), y[mine]).backward()
            replica.step()


def vector(model: Any) -> np.ndarray:
    return np.concatenate([param.detach().numpy().reshape(-1) for param in model.parameters()])


def told_by_all(comm: Any, action: Callable[[], Any]) -> str:
    """The one line that all ranks raise."""
    told = None
    try:
        action()
    except UserError as error:
        told = str(error)
    assert told is not None
    assert "\n" not in told
    assert len(set(comm.allgather(told))) == 1
    return told


def _set(where: Any, name: str, value: Any) -> None:
    setattr(where, name, value)


# One process on whole batches is what sync comes to.

OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    "sgd": sgd,
    "adamw": lambda params: torch.optim.AdamW(params.parameters(), 0.01),
    "two groups": lambda model: torch.optim.SGD(
        [{"params": model[0].parameters(), "lr": 0.1}, {"params": model[2].parameters(), "lr": 0.02}], weight_decay=0.1
    ),
}


@pytest.mark.parametrize(("count", "batch_size"), [(8 * P + 1, 4 * P), (41, 7), (5, 2 * P)])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_sync_is_one_process_on_whole_batches(comm, optimizer, count, batch_size):
    """With a last batch of 1, of which only one rank has a sample; and batches that no number of ranks divides."""
    x, y = samples(count)
    alone, together = network(), network(comm.rank)  # rank 0's counts
    train(Replica(alone, OPTIMIZERS[optimizer](alone), MPI.COMM_SELF), x, y, batch_size)
    train(Replica(together, OPTIMIZERS[optimizer](together), comm), x, y, batch_size)
    np.testing.assert_allclose(vector(together), vector(alone), rtol=0, atol=1e-12)
    assert len({one.tobytes() for one in comm.allgather(vector(together))}) == 1


@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_one_process_is_plain_torch(comm, dtype, error):
    """Of whose loop nothing of ours has any part, with the batches that ranks have together."""
    x, y = samples(8 * P + 1, dtype)
    plain, model = network(0, dtype), network(comm.rank, dtype)
    own, replica = sgd(plain), Replica(model, sgd(model), comm)
    lengths = []
    for epoch in range(2):
        for mine in replica.batches(len(x), 4 * P, epoch):
            whole = torch.cat([torch.from_numpy(share) for share in comm.allgather(mine.numpy())])
            own.zero_grad()
            cross_entropy(plain(x[whole]), y[whole]).backward()
            own.step()
            if len(mine):  # or not, as above
                cross_entropy(model(x[mine]), y[mine]).backward()
            replica.step()
            lengths.append((len(mine), len(whole)))
    assert [whole for _, whole in lengths] == 2 * [4 * P, 4 * P, 1]
    assert P == 1 or min(comm.allgather(min(mine for mine, _ in lengths))) == 0
    np.testing.assert_allclose(vector(model), vector(plain), rtol=0, atol=error)


def test_samples_of_ones_own_choice_count_alike(comm):
    """Ranks have 0, 1, 2, ... of them; without their numbers the result is another one."""
    x, y = samples(P * (P - 1) // 2 + 1)
    start = comm.rank * (comm.rank - 1) // 2
    mine = slice(start, start + comm.rank) if comm.rank < P - 1 else slice(start, len(x))
    plain, model, wrong = network(), network(), network()
    cross_entropy(plain(x), y).backward()
    sgd(plain).step()
    for one, given in ((model, (len(x[mine]), len(x))), (wrong, (1, P))):
        replica = Replica(one, sgd(one), comm)
        if len(x[mine]):
            cross_entropy(one(x[mine]), y[mine]).backward()
        replica.step(*given)
    np.testing.assert_allclose(vector(model), vector(plain), rtol=0, atol=1e-12)
    assert P == 1 or not np.allclose(vector(wrong), vector(plain), rtol=0, atol=1e-4)


@pytest.mark.parametrize("strategy", ["sync", "butterfly"])
def test_the_gradient_of_no_samples_is_none(comm, strategy):
    """Not a number, as the mean over none is."""
    model = nn.Linear(1, 1)
    replica = Replica(model, sgd(model), comm, strategy=strategy)
    x, bias = torch.ones(1), float(model.bias.detach())
    for mine in replica.batches(1, 1):
        ((model.bias - x[mine].mean()) ** 2).sum().backward()
        assert bool(model.bias.grad.isnan()) == (len(mine) == 0)
        replica.step()
    with replica.consensus():
        assert float(model.bias.detach()) == pytest.approx(bias - 0.1 * 2 * (bias - 1), rel=1e-5)


@pytest.mark.parametrize("to_none", [None, True, False])
def test_gradients_are_zero_after_a_step_and_may_be_made_so(comm, to_none):
    x, y = samples(40)
    models = network(), network()
    for model, is_first in zip(models, (True, False), strict=True):
        replica = Replica(model, sgd(model), comm)
        for mine in replica.batches(len(x), 16):
            if not is_first and to_none is not None:
                cross_entropy(model(x[mine]), 0 * y[mine]).backward()  # thrown away
                replica.optimizer.zero_grad(set_to_none=to_none)
            cross_entropy(model(x[mine]), y[mine]).backward()
            replica.step()
    np.testing.assert_array_equal(*map(vector, models))
    assert all(not param.grad.any() for model in models for param in model.parameters())


# The loop of mpicoll train does the same, by any strategy.


@pytest.mark.parametrize(
    "given",
    [
        {"strategy": "sync"},
        {"strategy": "sync", "clip": 0.05},
        *({"strategy": "average", "every": 3, "outer": outer} for outer in ("mean", "bmuf", "bmuf-classical")),
        *({"strategy": "average", "every": 3, "outer": outer} for outer in ("slowmo", "diloco", "easgd")),
        {"strategy": "butterfly"},
        {"strategy": "gossip", "graph": "ring", "mix_first": True},
        {"strategy": "gossip", "graph": "columns.npy"},
    ],
    ids=lambda given: " ".join(map(str, given.values())),
)
def test_strategies_are_those_of_the_loop(comm, folder, given):
    """Of the same steps: batches that are no multiple of p, and a schedule of learning rates, which slowmo looks at."""
    if given.get("graph") == "columns.npy":  # only columns add up to 1: push-sum
        if P < 3:
            pytest.skip("every connected graph of two ranks is doubly stochastic")
        matrix = (np.eye(P) + np.roll(np.eye(P), 1, axis=0)) / 2
        matrix[:, 0] = 1 / P
        if comm.rank == 0:
            np.save(folder / "columns.npy", matrix)
        given = {**given, "graph": str(folder / "columns.npy")}
    data = blobs(101)
    reference = training(comm, data, schedule="linear", **given)
    model = network(comm.rank)
    starts = list(reference.model.tensors(reference.params).values())
    with torch.no_grad():
        for param, start in zip(model.parameters(), starts, strict=True):
            param.copy_(torch.from_numpy(start.T))
    optimizer = sgd(model)
    replica = Replica(model, optimizer, comm, **given)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / (3 * reference.steps_per_epoch))
    x, y = samples(101)
    for epoch in (1, 2, 3):
        for mine in replica.batches(len(x), 32, epoch, seed=3):
            cross_entropy(model(x[mine]), y[mine]).backward()
            replica.step()
            schedule.step()
    final, own = reference.run().params, vector(model)
    wanted = np.concatenate([tensor.T.reshape(-1) for tensor in reference.model.tensors(final).values()])
    with replica.consensus():
        np.testing.assert_allclose(vector(model), wanted, rtol=0, atol=1e-12)
    np.testing.assert_array_equal(vector(model), own)
    at = reference.model.tensors(reference.strategy.point()).values()
    np.testing.assert_allclose(own, np.concatenate([tensor.T.reshape(-1) for tensor in at]), rtol=0, atol=1e-12)
    if P > 1 and (given.get("outer") == "easgd" or "graph" in given):  # the others agreed in the last step
        assert not np.allclose(own, wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("delays", [None, 5])
def test_averaging_in_pairs(comm, delays):
    """By the shares that ranks take; in a simulation as the loop does it."""
    reference = training(comm, blobs(101), strategy="ad-psgd", delays=5, seed=0)  # as a Replica draws neighbors
    model = network(comm.rank)
    with torch.no_grad():
        starts = reference.model.tensors(reference.params).values()
        for param, start in zip(model.parameters(), starts, strict=True):
            param.copy_(torch.from_numpy(start.T))
    replica = Replica(model, sgd(model), comm, strategy="ad-psgd", delays=delays)
    x, y = samples(101)
    before, taken = float(cross_entropy(model(x), y).detach()), list[int]()
    for epoch in (1, 2, 3):
        with pytest.raises(UserError, match="a step is one of an epoch"):
            replica.step()
        for mine in replica.batches(len(x), 32, epoch):
            cross_entropy(model(x[mine]), y[mine]).backward()
            with pytest.raises(UserError, match="between epochs only"), replica.consensus():
                pass
            replica.step()
            taken += mine.tolist()
    assert replica.steps == 3 * 4
    everyones = sorted(sample for of_rank in comm.allgather(taken) for sample in of_rank)
    assert everyones == sorted(3 * [*range(101)])
    final = reference.run().params
    wanted = np.concatenate([tensor.T.reshape(-1) for tensor in reference.model.tensors(final).values()])
    with replica.consensus():
        together = vector(model)
    assert len({one.tobytes() for one in comm.allgather(together)}) == 1
    if delays:
        np.testing.assert_allclose(together, wanted, rtol=0, atol=1e-12)
    with replica.consensus(), torch.no_grad():
        assert cross_entropy(model(x), y) < 0.8 * before


# What begins, what stays, what is shared.


class Odd(nn.Module):
    """Tied, frozen and unused parameters, buffers of several dtypes, one without dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6, bias=False)
        self.tied = nn.Linear(6, 6)
        self.tied.weight = self.first.weight
        self.norm = nn.BatchNorm1d(6)
        self.unused = nn.Parameter(torch.randn(2, 3))
        self.frozen = nn.Parameter(torch.randn(4).half(), requires_grad=False)
        self.register_buffer("mask", torch.rand(6) < 0.5)
        self.register_buffer("scalar", torch.rand(()))

    def forward(self, x: Any) -> Any:
        return self.tied(self.norm(self.first(x)) * self.mask)


def test_all_begin_as_rank_0_does(comm):
    torch.manual_seed(comm.rank)
    model = Odd()
    replica = Replica(model, sgd(model), comm)
    assert len(replica._params) == 6 * 6 + 6 + 2 * 6 + 2 * 3  # the tied weight once, the frozen one not at all
    torch.manual_seed(0)
    for (name, own), first in zip(model.state_dict().items(), Odd().state_dict().values(), strict=True):
        assert torch.equal(own, first), name
    assert model.tied.weight is model.first.weight


def test_nothing_is_copied(comm):
    """Nor after the gradient has been taken away; and nothing piles up."""
    x, y = samples(40, torch.float32)
    model = Odd()
    replica = Replica(model, sgd(model), comm, strategy="butterfly")
    for step, mine in enumerate(replica.batches(len(x), 20)):
        if step:
            replica.optimizer.zero_grad()
        cross_entropy(model(x[mine]), y[mine]).backward()
        replica.step()
        for param in model.parameters():
            if param.requires_grad:
                assert np.shares_memory(param.detach().numpy(), replica._params)
                assert np.shares_memory(param.grad.numpy(), replica._sums)
        assert not replica.strategy.seconds


def test_frozen_parameters_stay_and_buffers_are_each_ranks_own(comm):
    x, y = samples(30 * P, torch.float32)
    torch.manual_seed(0)
    model = Odd()
    frozen, unused = model.frozen.clone(), model.unused.detach().clone()
    replica = Replica(model, sgd(model), comm, strategy="average")
    train(replica, x, y, 10 * P)
    model.scalar += comm.rank
    assert torch.equal(model.frozen, frozen)
    assert torch.equal(model.unused, unused)
    own, scalar = model.norm.running_mean.clone(), model.scalar.clone()
    everyones = np.array(comm.allgather(own.numpy()))
    assert P == 1 or np.ptp(everyones, axis=0).min() > 0
    with replica.consensus():
        np.testing.assert_allclose(model.norm.running_mean, everyones.mean(axis=0), rtol=1e-6)
        assert float(model.scalar) == pytest.approx(float(scalar) - comm.rank + (P - 1) / 2)
        assert model.norm.num_batches_tracked == 6
    assert torch.equal(model.scalar, scalar)
    assert torch.equal(model.norm.running_mean, own)


def test_the_state_of_the_optimizer_is_that_of_rank_0(comm):
    """As after a checkpoint that rank 0 alone has read: momentum goes on."""
    x, y = samples(40)
    model, begun = network(), network()
    optimizer, other = sgd(model), sgd(begun)
    for one, own in ((model, optimizer), (begun, other)):
        if comm.rank == 0 or one is begun:
            cross_entropy(one(x), y).backward()
            own.step()
    train(Replica(model, optimizer, comm), x, y, 16)
    train(Replica(begun, other, MPI.COMM_SELF), x, y, 16)
    np.testing.assert_allclose(vector(model), vector(begun), rtol=0, atol=1e-12)


# Shares of batches.


@pytest.mark.parametrize("count", [1, P, 5 * P + 1])
def test_every_sample_comes_once(comm, count):
    model = network()
    replica = Replica(model, sgd(model), comm)
    seen = comm.allgather([mine.tolist() for mine in replica.batches(count, 4, epoch=2)])
    assert {len(batches) for batches in seen} == {-(-count // 4)}
    assert sorted(sample for batches in seen for mine in batches for sample in mine) == list(range(count))
    assert all(max(map(len, step)) - min(map(len, step)) <= 1 for step in zip(*seen, strict=True))
    again = [mine.tolist() for mine in replica.batches(count, 4, epoch=2)]
    assert again == seen[comm.rank]
    others = comm.allgather([mine.tolist() for mine in replica.batches(count, 4, epoch=3)])
    assert count < 6 or others != seen


@pytest.mark.skipif(P == 1, reason="one rank is like itself")
@pytest.mark.parametrize("what", ["number of samples", "batch size", "epoch", "seed"])
def test_batches_that_are_not_the_same_are_refused_by_all_ranks(comm, what):
    """They would not be as many, and some ranks wait for ever, or samples come twice."""
    model = network()
    replica = Replica(model, sgd(model), comm)
    other = int(comm.rank == P - 1)
    names = ("number of samples", "batch size", "epoch")
    given = [number + other * (what == name) for number, name in zip((20, 4, 0), names, strict=True)]
    with pytest.raises(UserError, match=f"rank {P - 1} has another {what} than rank 0"):
        next(replica.batches(*given, seed=other * (what == "seed")))


def test_shards_are_each_ranks_own(comm):
    """Ranks hold 0, 3, 6, ... samples, and the steps are those of all of them together."""
    model = network()
    replica = Replica(model, sgd(model), comm)
    own = 3 * (comm.rank if P > 1 else 2)
    total = comm.allreduce(own)
    mine = [share.tolist() for share in replica.batches(own, 4, sharded=True)]
    assert sorted(sample for share in mine for sample in share) == list(range(own))
    lengths = comm.allgather(list(map(len, mine)))
    assert len(mine) == -(-total // 4)
    assert max(map(sum, zip(*lengths, strict=True))) <= 4
    x, y = samples(own)
    train(replica, x, y, 4, sharded=True)
    assert len({one.tobytes() for one in comm.allgather(vector(model))}) == 1


# What cannot be: one line, on all ranks.


def _mixed() -> Any:
    model = network()
    model[2].float()
    return model


def _elsewhere() -> Any:
    return network().to("meta") if RANK == P - 1 else network()


def _frozen() -> Any:
    return network().requires_grad_(False)


def _other() -> Any:
    return nn.Sequential(nn.Linear(6, 8 + (RANK == P - 1)), nn.ReLU())


@pytest.mark.parametrize(
    ("make", "given", "wanted"),
    [
        (network, {"strategy": "async"}, "strategy async .* cannot run torch's: choose sync, average, butterfly, gos"),
        (network, {"strategy": "none"}, "--strategy must be one of"),
        (network, {"every": 8}, "--every is not for the sync strategy, but for average"),
        (network, {"strategy": "average", "every": 0}, "--every must be at least 1"),
        (network, {"lr": 0.1}, "^lr is no setting of a Replica; expected one of algorithm, clip, every, "),
        (network, {"strategy": "average", "momenta": "average"}, "^momenta is no setting"),
        (network, {"strategy": "average", "sync_epochs": 1}, "^sync_epochs is no setting"),
        (network, {"clip": 1.0 + (RANK == P - 1)}, "rank .* has another strategy than rank 0"),
        (_mixed, {}, "parameters are torch.float32 and torch.float64; expected all"),
        (lambda: network().half(), {}, "parameters are torch.float16; expected all torch.float32 or all torch.float64"),
        (_elsewhere, {}, f"0.weight is on meta; .* model.cpu.*{f'.on rank {P - 1}.' if P > 1 else ''}$"),
        (_frozen, {}, "no parameter that requires a gradient"),
        (_other, {}, f"rank {P - 1} has another model than rank 0"),
    ],
)
def test_what_cannot_be_trained_is_refused_by_all_ranks(comm, make, given, wanted):
    if P == 1 and "rank 0" in wanted:
        pytest.skip("one rank is like itself")
    model = make()
    told = None
    try:
        Replica(model, sgd(model), comm, **given)
    except UserError as error:
        told = str(error)
    assert len(set(comm.allgather(told))) == 1
    assert told is not None
    assert re.search(wanted, told)
    assert "\n" not in told


def test_an_optimizer_of_another_model_is_refused(comm):
    with pytest.raises(UserError, match="has parameters that are not the model's"):
        Replica(network(), sgd(network()), comm)


def test_a_step_of_nothing_known_is_refused(comm):
    model = network()
    replica = Replica(model, sgd(model), comm)
    for given, wanted in (((), "0 .* of 0"), ((3,), "3 .* of 0"), ((3, 2), "3 .* of 2")):
        with pytest.raises(UserError, match=f"step of {wanted}: take them from batches"):
            replica.step(*given)
    model.float()
    with pytest.raises(UserError, match=r"0.weight was moved or converted .* make a new Replica"):
        replica.step(1, P)


# What has become another than the Replica was made with.

REMEDY = "make a new Replica"


def freezing() -> tuple[Any, Any]:
    """A network with a frozen parameter, and its optimizer, of two groups."""
    model = network()
    model[0].bias.requires_grad_(False)
    groups = [{"params": [model[0].weight]}, {"params": [*model[2].parameters()], "lr": 0.05}]
    return model, torch.optim.SGD(groups, 0.1, 0.9)


CHANGES: dict[str, tuple[Callable[[Any, Any], Any], str]] = {
    "unfrozen": (lambda model, _: model[0].bias.requires_grad_(), "^0.bias was unfrozen"),
    "all unfrozen": (lambda model, _: model.requires_grad_(), "^0.bias was unfrozen"),
    "frozen": (lambda model, _: model[2].requires_grad_(False), "^2.weight was frozen"),
    "module added": (lambda model, _: model.append(nn.Linear(3, 3)), "^3.weight is new in the model"),
    "module removed": (lambda model, _: model.pop(2), "^2.weight is gone"),
    "module replaced": (
        lambda model, _: model.__setitem__(2, nn.Linear(8, 3).double()),
        "^2.weight is another parameter",
    ),
    "module within a new one": (lambda model, _: model.__setitem__(1, nn.PReLU().double()), "^1.weight is new"),
    "parameter added": (lambda model, _: _set(model[1], "slope", nn.Parameter(torch.ones(1))), "^1.slope is new"),
    "parameter replaced": (
        lambda model, _: _set(model[2], "bias", nn.Parameter(torch.ones(3).double())),
        "^2.bias is another",
    ),
    "parameter removed": (lambda model, _: model[2].register_parameter("bias", None), "^2.bias is gone"),
    "tied": (lambda model, _: _set(model[2], "again", model[0].weight), "^2.again is new"),
    "weights normed": (lambda model, _: nn.utils.parametrizations.weight_norm(model[2]), "^2.weight is gone"),
    "loaded by assignment": (
        lambda model, _: model.load_state_dict(network(1).state_dict(), assign=True),
        "^0.weight is another parameter",
    ),
    "data replaced": (lambda model, _: _set(model[2].bias, "data", model[2].bias.data.clone()), "^2.bias was moved"),
    "data cut": (lambda model, _: _set(model[0].weight, "data", model[0].weight.data[:4]), "^0.weight was moved"),
    "converted": (lambda model, _: model.float(), "^0.weight was moved or converted"),
    "one layer in 16 bits": (lambda model, _: model[2].bfloat16(), "^2.weight was moved or converted"),
    "shared with other processes": (lambda model, _: model.share_memory(), "^0.weight was moved"),
    "another Replica": (lambda model, _: Replica(model, sgd(model), MPI.COMM_SELF), "given to another one"),
    "frozen parameter in the optimizer": (
        lambda model, optimizer: optimizer.add_param_group({"params": [model[0].bias]}),
        "the optimizer has other parameters",
    ),
    "new parameter in the optimizer": (
        lambda _, optimizer: optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]}),
        "the optimizer has other parameters",
    ),
    "group taken out": (lambda _, optimizer: optimizer.param_groups.pop(), "the optimizer has other parameters"),
    "in another group": (
        lambda _, optimizer: optimizer.param_groups[0]["params"].append(optimizer.param_groups[1]["params"].pop()),
        "the optimizer has other parameters",
    ),
}


@pytest.mark.parametrize("where", ["step", "consensus", "batches"])
@pytest.mark.parametrize("change", CHANGES)
def test_what_has_changed_since_is_refused_by_all_ranks(comm, change, where):
    """On one rank; and nothing has been changed then, on any."""
    model, optimizer = freezing()
    replica = Replica(model, optimizer, comm)
    x, y = samples(4)
    cross_entropy(model(x), y).backward()
    replica.step(4, 4 * P)
    cross_entropy(model(x), y).backward()
    before = replica._params.copy()
    change, wanted = CHANGES[change]
    if comm.rank == P - 1:
        change(model, optimizer)
    actions: dict[str, Callable[[], Any]] = {
        "step": lambda: replica.step(4, 4 * P),
        "consensus": lambda: replica.consensus().__enter__(),
        "batches": lambda: next(replica.batches(4, 4)),
    }
    told = told_by_all(comm, actions[where])
    assert re.search(wanted, told)
    assert REMEDY in told
    assert (f"(on rank {P - 1})" in told) == (P > 1)
    np.testing.assert_array_equal(replica._params, before)
    assert replica.steps == 1


@pytest.mark.parametrize(
    ("given", "steps"),
    [
        ({"strategy": "average", "every": 3}, 6),
        ({"strategy": "average", "every": 2, "outer": "easgd"}, 6),
        ({"strategy": "average", "every": 1000}, 8),
        ({"strategy": "butterfly"}, 8),
        ({"strategy": "gossip", "graph": "ring", "mix_first": True}, 8),
    ],
    ids=lambda given: " ".join(map(str, given.values())) if isinstance(given, dict) else None,
)
def test_ranks_that_do_not_meet_in_a_step_raise_when_they_do(comm, monkeypatch, given, steps):
    monkeypatch.setattr("mpicoll.torch.MEETING", 4)
    model, optimizer = freezing()
    replica = Replica(model, optimizer, comm, **given)
    x, y = samples(4)
    taken = []

    def loop() -> None:
        for number in range(10):
            if number == 4 and comm.rank == P - 1:
                model[0].bias.requires_grad_()
            taken.append(None)
            cross_entropy(model(x), y).backward()
            replica.step(4, 4 * P)

    assert re.search(f"^0.bias was unfrozen .*{REMEDY}", told_by_all(comm, loop))
    assert len(taken) == steps


WRONG: dict[str, Callable[[Replica, int], None]] = {  # in every step, of an epoch of 5; what one step says of itself
    "numbers": lambda replica, number: replica.step(16, 8),
    "numbers on one rank": lambda replica, number: replica.step(*((16, 8) if replica.comm.rank == P - 1 else ())),
    "every other batch left out": lambda replica, number: replica.step() if number % 2 else None,
    "the last step only": lambda replica, number: replica.step(*((2, 1) if number == 4 else ())),
    "the last step only, on one rank": lambda replica, number: replica.step(
        *((2, 1) if number == 4 and replica.comm.rank == 0 else ())
    ),
}


@pytest.mark.parametrize("strategy", ["sync", "average", "butterfly", "gossip", "ad-psgd"])
@pytest.mark.parametrize("wrong", WRONG)
def test_no_epoch_ends_without_a_word_of_what_was_wrong_in_it(comm, strategy, wrong):
    """Steps that were refused on some rank are lost: at the end of the epoch at the latest all ranks know."""
    if strategy == "ad-psgd" and wrong in ("every other batch left out", "the last step only, on one rank"):
        pytest.skip(
            "shares are for whoever comes: one that is left out is tested beside, and a rank may have few steps"
        )
    model = network()
    replica = Replica(model, sgd(model), comm, strategy=strategy)
    x, y = samples(10 * P)

    def epoch() -> None:
        for number, mine in enumerate(replica.batches(len(x), 2 * P)):
            cross_entropy(model(x[mine]), y[mine], reduction="mean").backward()
            WRONG[wrong](replica, number)

    assert re.search("step of|shares were taken", told_by_all(comm, epoch))


@pytest.mark.parametrize("strategy", ["sync", "average", "butterfly", "gossip"])
def test_batches_of_an_evaluation_are_no_shares_of_a_step(comm, strategy):
    """In the midst of an epoch, as whoever evaluates now and then does it."""
    trained = []
    for evaluates in (False, True):
        model = network()
        replica = Replica(model, sgd(model), comm, strategy=strategy)
        x, y = samples(10 * P)
        for number, mine in enumerate(replica.batches(len(x), 2 * P)):
            cross_entropy(model(x[mine]), y[mine]).backward()
            if evaluates and number in (0, 3):
                with replica.consensus():
                    assert sum(comm.allreduce(len(part)) for part in replica.batches(len(x), 3 * P)) == len(x)
            replica.step()
        trained.append(vector(model))
    np.testing.assert_array_equal(*trained)


@pytest.mark.parametrize(
    "mine",
    [np.ones(3), [torch.ones(3)], {"of": np.ones(2)}, object(), float("nan"), "word"],
    ids=lambda x: type(x).__name__,
)
def test_settings_of_the_programs_own_are_let_be(comm, mine):
    model = network()
    replica = Replica(model, SGD([{"params": list(model.parameters()), "mine": mine}], lr=0.1), comm)
    x, y = samples(4 * P)
    train(replica, x, y, 2 * P, epochs=1)
    assert replica.steps == 2


def test_ranks_that_average_in_pairs_raise_at_the_end_of_the_epoch(comm):
    model, optimizer = freezing()
    replica = Replica(model, optimizer, comm, strategy="ad-psgd")
    x, y = samples(30)
    train(replica, x, y, 2 * P, epochs=1)

    def epoch() -> None:
        for number, mine in enumerate(replica.batches(len(x), 2 * P, 1)):
            if number == 1 and comm.rank == P - 1:
                model[0].bias.requires_grad_()
            cross_entropy(model(x[mine]), y[mine]).backward()
            replica.step()

    assert re.search(f"^0.bias was unfrozen .*{REMEDY}", told_by_all(comm, epoch))


def test_a_new_replica_goes_on_after_a_change(comm):
    """As plain torch does: a frozen parameter is unfrozen, and given to the optimizer, whose momenta go on."""
    x, y = samples(4 * P)
    mine = slice(4 * comm.rank, 4 * comm.rank + 4)
    (plain, own), (model, optimizer) = freezing(), freezing()
    for _ in range(2):
        replica = Replica(model, optimizer, comm)
        for _ in range(3):
            own.zero_grad()
            cross_entropy(plain(x), y).backward()
            own.step()
            cross_entropy(model(x[mine]), y[mine]).backward()
            replica.step(4, 4 * P)
        for one, its in ((plain, own), (model, optimizer)):
            if len(its.param_groups) == 2:
                its.add_param_group({"params": [one[0].bias.requires_grad_()], "lr": 0.2})
    np.testing.assert_allclose(vector(model), vector(plain), rtol=0, atol=1e-12)
    assert not np.allclose(vector(model)[48:56], vector(network())[48:56], rtol=0, atol=1e-3)


def test_a_new_replica_may_begin_where_ranks_agree(comm):
    """As it has to where ranks have models of their own, which do not come back."""
    x, y = samples(30 * P)
    model, optimizer = freezing()
    replica = Replica(model, optimizer, comm, strategy="average", every=50)
    train(replica, x, y, 5 * P, epochs=1)
    with replica.consensus():
        wanted = vector(model)
        optimizer.add_param_group({"params": [model[0].bias.requires_grad_()]})
        newer = Replica(model, optimizer, comm, strategy="average", every=50)
    np.testing.assert_array_equal(vector(model), wanted)
    assert len({one.tobytes() for one in comm.allgather(vector(model))}) == 1
    train(newer, x, y, 5 * P, epochs=1)
    assert not np.array_equal(vector(model), wanted)


def test_a_replica_is_of_one_model_and_optimizer(comm):
    model = network()
    replica = Replica(model, sgd(model), comm)
    for name in ("model", "optimizer"):
        with pytest.raises(AttributeError, match="no setter"):
            setattr(replica, name, getattr(replica, name))


def _own(model: Any) -> None:
    for param in model.parameters():
        param.grad = param.grad.clone()


def _again(model: Any) -> None:
    for param in model.parameters():
        param.grad.data = param.grad.data.clone()


def _shuffled(model: Any) -> None:
    for param in model.parameters():
        param.grad = param.grad.t().contiguous().t() if param.grad.dim() == 2 else param.grad.clone()


HARMLESS: dict[str, Callable[[Any, Any], Any]] = {
    "gradients of the program's own": lambda model, _: _own(model),
    "the data of gradients replaced": lambda model, _: _again(model),
    "gradients in another order of memory": lambda model, _: _shuffled(model),
    "sparse gradients": lambda model, _: _set(model[2].weight, "grad", model[2].weight.grad.to_sparse()),
    "clipped by the program": lambda model, _: nn.utils.clip_grad_norm_(model.parameters(), 1e6),
    "state loaded": lambda model, _: model.load_state_dict(deepcopy(model.state_dict())),
    "state of the optimizer loaded": lambda _, optimizer: optimizer.load_state_dict(deepcopy(optimizer.state_dict())),
    "converted to what it was": lambda model, _: model.double().cpu(),
    "module without parameters replaced": lambda model, _: model.__setitem__(1, nn.LeakyReLU(0.0)),
    "unfrozen what was not frozen": lambda model, _: model.requires_grad_(),
    "for evaluation": lambda model, _: model.eval(),
    "copied": lambda model, optimizer: deepcopy((model, optimizer)),
    "compared in inference mode": lambda model, _: torch.inference_mode()(model)(torch.zeros(1, 6).double()),
    "learning rate of a group": lambda _, optimizer: optimizer.param_groups[0].update(lr=0.1),
    "buffer registered": lambda model, _: model.register_buffer("seen", torch.zeros(1)),
}


@pytest.mark.parametrize("change", HARMLESS)
def test_what_changes_nothing_is_taken(comm, change):
    """Between backward and step, on one rank."""
    x, y = samples(40)
    models = network(), network()
    for model, is_changed in zip(models, (True, False), strict=True):
        replica = Replica(model, sgd(model), comm)
        for mine in replica.batches(len(x), 16):
            cross_entropy(model(x[mine]), y[mine]).backward()
            if is_changed and comm.rank == P - 1:
                HARMLESS[change](model, replica.optimizer)
            replica.step()
    np.testing.assert_array_equal(*map(vector, models))


def test_a_gradient_of_another_shape_is_refused(comm):
    model = network()
    replica = Replica(model, sgd(model), comm)
    if comm.rank == P - 1:
        model[0].bias.grad.data = torch.ones(1).double()
    assert "a gradient has shape (1,); expected (8,)" in told_by_all(comm, lambda: replica.step(1, P))


# Another than the Replica steps.


class Around(Optimizer):
    """An optimizer that steps by way of another one."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        super().__init__(inner.param_groups, {})

    def step(self, closure: Any = None) -> Any:
        return self.inner.step(closure)


def _scaled(model: Any, optimizer: Any) -> None:
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(model(torch.ones(1, 6).double()).sum()).backward()
    scaler.step(optimizer)


HABITS: dict[str, Callable[[Any, Any], Any]] = {
    "step": lambda _, optimizer: optimizer.step(),
    "step of a closure": lambda _, optimizer: optimizer.step(lambda: 0.0),
    "step of a scaler": _scaled,
    "step of another optimizer": lambda model, _: torch.optim.Adam(model[2].parameters()).step(),
    "step of one around it": lambda _, optimizer: Around(optimizer).step(),
    "step of a copy": lambda _, optimizer: _with_params(optimizer).step(),
}


def _with_params(optimizer: Any) -> Any:
    other = torch.optim.SGD(optimizer.param_groups[0]["params"], 0.1)
    other.load_state_dict(optimizer.state_dict())
    return other


@pytest.mark.parametrize("scheduled", [False, True])
@pytest.mark.parametrize("habit", HABITS)
def test_only_the_replica_steps(comm, habit, scheduled):
    model = network()
    optimizer = sgd(model)
    if scheduled:  # which wraps step
        torch.optim.lr_scheduler.StepLR(optimizer, 1)
    replica = Replica(model, optimizer, comm)
    x, y = samples(4)
    cross_entropy(model(x), y).backward()
    before = vector(model)
    assert "call replica.step() instead" in told_by_all(comm, lambda: HABITS[habit](model, optimizer))
    np.testing.assert_array_equal(vector(model), before)
    replica.step(4, 4 * P)
    assert not np.array_equal(vector(model), before)


def test_other_optimizers_step_and_wrapped_ones_do(comm):
    """Also while an older Replica of the same model is still there."""
    x, y = samples(4)
    models = network(), network()
    for model, around in zip(models, (False, True), strict=True):
        older = Replica(model, sgd(model), comm)
        replica = Replica(model, Around(sgd(model)) if around else sgd(model), comm)
        other = network()
        cross_entropy(other(model(x).detach().repeat(1, 2)), y).backward()
        sgd(other).step()
        cross_entropy(model(x), y).backward()
        replica.step(4, 4 * P)
        assert "given to another one" in told_by_all(comm, lambda one=older: one.step(4, 4 * P))
    np.testing.assert_array_equal(*map(vector, models))


def test_without_its_replica_an_optimizer_steps(comm):
    """At once, and the model is an ordinary one."""
    x, y = samples(30)
    model = network()
    replica = Replica(model, sgd(model), comm)
    train(replica, x, y, 12)
    with replica.consensus():
        pass
    del replica
    before, optimizer = vector(model), sgd(model)
    cross_entropy(model(x), y).backward()
    optimizer.step()
    assert not np.array_equal(vector(model), before)


def test_a_step_within_a_consensus_is_refused(comm):
    model = network()
    replica = Replica(model, sgd(model), comm)
    with replica.consensus():
        with replica.consensus():
            pass
        with pytest.raises(UserError, match="lost at its end: leave the with block"):
            replica.step(1, P)
    replica.step(1, P)


# Shares and steps.

AHEAD: dict[str, Callable[[Any], Any]] = {
    "a list": list,
    "two at a time": lambda shares: [(one, next(shares, None)) for one in shares],
    "behind a prefetching loader": lambda shares: next(iter(_loader(shares))),
}


def _loader(shares: Any) -> Any:
    return torch.utils.data.DataLoader(range(41), batch_sampler=(one.tolist() for one in shares), num_workers=1)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of forks
@pytest.mark.parametrize("way", AHEAD)
def test_shares_taken_ahead_of_a_step_are_refused(comm, way):
    model = network()
    replica = Replica(model, sgd(model), comm)
    before = vector(model)
    AHEAD[way](replica.batches(41, 2 * P + 1))
    wanted = r"shares were taken .* since the last step: .* step\(samples, total\)"
    assert re.search(wanted, told_by_all(comm, replica.step))
    told_by_all(comm, replica.step)  # nor are they forgotten
    np.testing.assert_array_equal(vector(model), before)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("way", ["each", "loader", "accumulated", "in parts"])
def test_shares_and_their_numbers_belong_together(comm, way):
    """Whole batches of 7, and a last one of 6, or batches of 14 in two shares: as plain torch has it."""
    x, y = samples(41)
    plain, model = network(), network()
    own, replica = sgd(plain), Replica(model, sgd(model), comm)
    shares = [*replica.batches(len(x), 7)]
    wholes = [torch.cat([torch.from_numpy(one) for one in comm.allgather(share.numpy())]) for share in shares]
    assert [share.total for share in shares] == [*map(len, wholes)] == [7, 7, 7, 7, 7, 6]
    if way == "accumulated":
        wholes = [torch.cat(pair) for pair in zip(wholes[::2], wholes[1::2], strict=True)]
    for whole in wholes:
        own.zero_grad()
        cross_entropy(plain(x[whole]), y[whole]).backward()
        own.step()
    if way == "accumulated":
        for pair in zip(shares[::2], shares[1::2], strict=True):
            count = sum(map(len, pair))
            for mine in pair:
                (cross_entropy(model(x[mine]), y[mine], reduction="sum") / count).backward()
            replica.step(count, sum(mine.total for mine in pair))
    elif way == "in parts":
        for mine in replica.batches(len(x), 7):
            for part in mine.split(2):
                (cross_entropy(model(x[part]), y[part], reduction="sum") / len(mine)).backward()
            replica.step()
    else:
        taken: Any = shares if way == "each" else _loader(shares)
        for share, mine in zip(shares, taken, strict=True):
            cross_entropy(model(x[mine]), y[mine]).backward()
            replica.step(len(mine), share.total)
    np.testing.assert_allclose(vector(model), vector(plain), rtol=0, atol=1e-12)


@pytest.mark.parametrize("delays", [None, 5])
def test_pairs_take_no_share_ahead(comm, delays):
    model = network()
    replica = Replica(model, sgd(model), comm, strategy="ad-psgd", delays=delays)

    def epoch() -> None:
        for number, _ in enumerate(replica.batches(10 * P, 2 * P)):
            if number != 2 or comm.rank < P - 1:
                replica.step()

    assert "call step() for each, step(0, 1) to leave one out" in told_by_all(comm, epoch)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (lambda rank: (2, 2), f"{P:.4g} times the total"),
        (lambda rank: (2, 3 * P), "0.6667 times the total"),
        (lambda rank: (rank == 0, 2 * P), f"{1 / (2 * P):.4g} times"),
        (lambda rank: (2, 1 if rank == P - 1 else 2 * P), "step of 2 samples in a batch of 1"),
        (lambda rank: (0, 0), "step of 0 samples in a batch of 0"),
        (lambda rank: (lambda: 0,), "takes two numbers of samples, got function"),
    ],
)
def test_numbers_that_do_not_fit_together_are_refused_by_all_ranks(comm, given, wanted):
    if P == 1 and "1 times" in wanted:
        pytest.skip("one rank has all samples")
    model = network()
    replica = Replica(model, sgd(model), comm)
    before = vector(model)
    assert re.search(wanted, told_by_all(comm, lambda: replica.step(*given(comm.rank))))
    np.testing.assert_array_equal(vector(model), before)
    replica.step(2, 2 * P)


@pytest.mark.parametrize(
    ("call", "wanted"),
    [
        (lambda replica, comm: next(replica.batches(10, 0)), "batch_size must be a whole number of at least 1, got 0"),
        (lambda replica, comm: next(replica.batches(10, 5, -1)), "epoch must be a whole number of at least 0, got -1"),
        (lambda replica, comm: next(replica.batches(10, 2.5)), "batch_size must be a whole number .* got 2.5"),
        (lambda replica, comm: Replica(network(), None, comm), "optimizer must be a torch.optim.Optimizer, got None"),
        (lambda replica, comm: Replica([], sgd(network()), comm), "model must be a torch.nn.Module, got list"),
    ],
)
def test_what_is_no_number_or_no_module_is_refused_by_name(comm, call, wanted):
    model = network()
    replica = Replica(model, sgd(model), comm)
    assert re.search(wanted, told_by_all(comm, lambda: call(replica, comm)))


@pytest.mark.skipif(P == 1, reason="one rank is like itself")
def test_learning_rates_by_each_ranks_own_loss_are_refused(comm):
    """As of a scheduler that waits for the loss to fall."""
    model = network()
    optimizer = sgd(model)
    replica = Replica(model, optimizer, comm)
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
    for loss in (1.0, 1.0 + comm.rank):
        schedule.step(loss - comm.rank)
    schedule.step(1.0 if comm.rank else 0.5)
    assert "has another setting of the optimizer" in told_by_all(comm, lambda: next(replica.batches(4, 4)))


# What leaves the program.


def _saved(what: Any) -> bytes:
    file = io.BytesIO()
    torch.save(what, file)
    return file.getvalue()


SAVED: dict[str, Callable[[Any], Any]] = {
    "model": lambda model: model.state_dict(),
    "a layer": lambda model: model.tied.state_dict(),
    "a parameter": lambda model: model.unused,
    "a detached one": lambda model: {"bias": model.tied.bias.detach()},
    "gradients": lambda model: [param.grad for param in model.parameters() if param.grad is not None][:1],
    "the module": lambda model: list(model.norm.parameters()),
}


@pytest.mark.parametrize("what", SAVED)
def test_files_are_no_larger_than_without_a_replica(comm, what):
    model, plain = Odd(), Odd()
    Replica(model, sgd(model), comm)
    for param in plain.parameters():
        param.grad = torch.zeros_like(param) if param.requires_grad else None
    assert len(_saved(SAVED[what](model))) == len(_saved(SAVED[what](plain)))


def test_what_ranks_agree_on_loads_into_a_plain_module(comm):
    x, y = samples(30 * P, torch.float32)
    torch.manual_seed(0)
    model, plain = Odd(), Odd()
    replica = Replica(model, sgd(model), comm, strategy="average")
    train(replica, x, y, 10 * P)
    with replica.consensus():
        file, wanted = io.BytesIO(_saved(model.state_dict())), deepcopy(model.state_dict())
    plain.load_state_dict(torch.load(file))
    assert plain.state_dict().keys() == wanted.keys()
    assert all(torch.equal(one, wanted[name]) for name, one in plain.state_dict().items())


def test_safetensors_saves_it(comm, folder):
    """It takes no tensors that share memory, but for tied ones."""
    tensors = pytest.importorskip("safetensors.torch", reason="needs safetensors")
    model = Odd()
    replica = Replica(model, sgd(model), comm)
    with replica.consensus():
        tensors.save_model(model, str(folder / f"{comm.rank}.safetensors"))
        tensors.save_file({"b": model.tied.bias.detach()}, str(folder / f"bias-{comm.rank}.safetensors"))
    plain = Odd()
    tensors.load_model(plain, str(folder / f"{comm.rank}.safetensors"))
    assert all(torch.equal(one, model.state_dict()[name]) for name, one in plain.state_dict().items())
    assert torch.equal(tensors.load_file(str(folder / f"bias-{comm.rank}.safetensors"))["b"], model.tied.bias)


# Buffers in a consensus.


class Holds(nn.Module):
    """A module with a buffer, which ``forward`` changes."""

    def __init__(self, buffer: Any, forward: Callable[[Any], Any]) -> None:
        super().__init__()
        self.linear, self.then = nn.Linear(6, 3), forward
        self.register_buffer("held", buffer)

    def forward(self, x: Any) -> Any:
        self.then(self)
        return self.linear(x)


def _buffer(value: Any) -> Callable[[Any], None]:
    return lambda module: _set(module, "held", value(module.held))


ASSIGNED: dict[str, tuple[Any, Callable[[Any], None]]] = {
    "anew": (torch.ones(3), _buffer(lambda held: held + 1)),
    "in place": (torch.ones(3), lambda module: module.held.add_(1)),
    "in place, then anew": (torch.ones(3), _buffer(lambda held: held.add_(1) * 2)),
    "whole numbers": (torch.tensor(3), _buffer(lambda held: held + 1)),
    "whole numbers in place": (torch.tensor(3), lambda module: module.held.add_(1)),
    "truth": (torch.ones(3).bool(), lambda module: module.held.logical_not_()),
    "16 bits": (torch.ones(3).bfloat16(), lambda module: module.held.mul_(2)),
    "another shape": (torch.ones(3), _buffer(lambda held: torch.zeros(5))),
    "another type": (torch.ones(3), _buffer(lambda held: held.long())),
    "expanded": (torch.ones(3), _buffer(lambda held: held[:1].expand(4))),
    "none": (torch.ones(3), _buffer(lambda held: None)),
    "from none": (None, _buffer(lambda held: torch.ones(2))),
    "gone": (torch.ones(3), lambda module: module._buffers.pop("held", None)),
}


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("way", ASSIGNED)
def test_a_consensus_gives_back_all_buffers(comm, way, inference):
    """By forward, whatever it makes of them: in training mode, as a program that forgets eval()."""
    buffer, forward = ASSIGNED[way]
    model = Holds(deepcopy(buffer), forward)
    replica = Replica(model, sgd(model), comm)
    mode = torch.inference_mode if inference else torch.no_grad
    with replica.consensus(), mode():
        model(torch.ones(2, 6))
        after = model._buffers.get("held")
        assert (after is None) != (buffer is None) if way in ("none", "from none", "gone") else after is not None
    assert model.held is None if buffer is None else torch.equal(model.held, buffer)
    assert buffer is None or not (model.held.is_inference() or model.held.stride() != buffer.stride())
    assert buffer is None or model.held.dtype == buffer.dtype


def test_batches_of_an_evaluation_are_not_counted(comm):
    """Nor those of a norm in two places; and buffers that training assigns anew have a mean."""
    norm = nn.BatchNorm1d(6)
    model = nn.Sequential(norm, norm, Holds(torch.zeros(2), _buffer(lambda held: (held + comm.rank)[:1].expand(2))))
    replica = Replica(model, sgd(model), comm)
    model(torch.randn(4, 6)).sum().backward()
    replica.step(4, 4 * P)
    before, held = deepcopy(norm.state_dict()), model[2].held
    assert norm.num_batches_tracked == 2
    with replica.consensus():
        assert model[2].held.tolist() == pytest.approx(2 * [(P - 1) / 2])
        model(torch.randn(4, 6))
        assert norm.num_batches_tracked == 4
    assert all(torch.equal(one, before[name]) for name, one in norm.state_dict().items())
    assert model[2].held is held
    assert held.tolist() == 2 * [comm.rank]


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_a_scripted_module_is_one_too(comm):
    model = torch.jit.script(nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3)))
    replica = Replica(model, sgd(model), comm)
    model(torch.randn(4, 6)).sum().backward()
    replica.step(4, 4 * P)
    with replica.consensus():
        model(torch.randn(4, 6))
    assert model[1].num_batches_tracked == 1
    if comm.rank == P - 1:
        model[0].bias.requires_grad_(False)
    assert re.search(f"^0.bias was frozen .*{REMEDY}", told_by_all(comm, lambda: replica.step(4, 4 * P)))


@pytest.mark.skipif(P == 1, reason="one rank is like itself")
@pytest.mark.parametrize(
    ("way", "wanted"),
    [
        (_buffer(lambda held: torch.zeros(3 + RANK)), "has another shape of buffer held than rank 0"),
        (lambda module: module.register_buffer(f"own{RANK}", torch.ones(1)), "has another set of buffers"),
    ],
)
def test_buffers_that_have_no_mean_are_refused_by_all_ranks(comm, way, wanted):
    model = Holds(torch.ones(3), way)
    replica = Replica(model, sgd(model), comm)
    model(torch.ones(1, 6))
    assert wanted in told_by_all(comm, lambda: replica.consensus().__enter__())


# Tensors and optimizers that cannot be.


def _with_buffer(buffer: Any) -> Any:
    model = network()
    model[2].register_buffer("held", buffer)
    return model


def _with_param(value: Any) -> Any:
    model = network()
    model[2].held = nn.Parameter(value)
    return model


def _made_in_inference() -> Any:
    with torch.inference_mode():
        buffer = torch.ones(3)
    return _with_buffer(buffer)


def _tied_by_data() -> Any:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight.data = model[0].weight.data
    return model


def _columns() -> Any:
    """Interleaved in memory, and apart."""
    whole, model = torch.ones(4, 6), nn.Module()
    model.left, model.right = nn.Parameter(whole[:, :3]), nn.Parameter(whole[:, 3:])
    return model


def _with_view() -> Any:
    model = network()
    model[2].register_buffer("row", model[0].weight.detach()[1])
    return model


def _of_a_closure(model: Any) -> Any:
    """An optimizer of the program's own."""
    kind = type("Closure", (SGD,), {"step": lambda self, closure: SGD.step(self, closure)})
    return kind(model.parameters())


UNUSABLE: dict[str, tuple[Callable[[], Any], Callable[[Any], Any], str]] = {
    "expanded buffer": (lambda: _with_buffer(torch.ones(1).expand(3)), sgd, "^2.held is expanded.* clone"),
    "sliding buffer": (lambda: _with_buffer(torch.ones(8).unfold(0, 4, 1)), sgd, "^2.held is expanded"),
    "sparse buffer": (lambda: _with_buffer(torch.eye(3).to_sparse()), sgd, "^2.held is of layout .*sparse_coo"),
    "compressed buffer": (lambda: _with_buffer(torch.eye(3).to_sparse_csr()), sgd, "^2.held is of layout .*_csr"),
    "nested buffer": (
        lambda: _with_buffer(torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])),
        sgd,
        "^2.held is nested",
    ),
    "buffer of inference": (_made_in_inference, sgd, "^2.held was made in torch.inference_mode.* clone"),
    "lazy buffer": (lambda: nn.Sequential(network(), nn.LazyBatchNorm1d(affine=False)), sgd, "^1.running_mean has no"),
    "sparse parameter": (lambda: _with_param(torch.eye(3).to_sparse()), sgd, "^2.held is of layout"),
    "expanded parameter": (lambda: _with_param(torch.ones(1).double().expand(3)), sgd, "^2.held is expanded"),
    "lazy module": (lambda: nn.Sequential(network(), nn.LazyLinear(2)), sgd, "^1.weight has no shape .* a batch"),
    "tied by data": (_tied_by_data, sgd, "^0.weight and 1.weight share memory"),
    "view of a parameter": (_with_view, sgd, "^0.weight and 2.row share memory"),
    "SparseAdam": (network, lambda model: torch.optim.SparseAdam(list(model.parameters())), "SparseAdam .* take Adam"),
    "LBFGS": (network, lambda model: torch.optim.LBFGS(model.parameters()), r"^LBFGS.step\(\) needs a closure"),
    "an optimizer of a closure": (
        network,
        _of_a_closure,
        "^Closure.step.* needs a closure",
    ),
}


@pytest.mark.filterwarnings("ignore")  # of torch's, that some of these are in beta
@pytest.mark.parametrize("everywhere", [False, True])
@pytest.mark.parametrize("what", UNUSABLE)
def test_tensors_and_optimizers_that_cannot_be_are_refused_by_all_ranks(comm, what, everywhere):
    make, optimizer, wanted = UNUSABLE[what]
    here = everywhere or comm.rank == P - 1
    model = make() if here else network()
    told = told_by_all(comm, lambda: Replica(model, (optimizer if here else sgd)(model), comm))
    assert re.search(wanted, told)


def test_slices_of_one_tensor_are_apart(comm):
    model = _columns()
    replica = Replica(model, sgd(model), comm)
    (model.left.sum() + 2 * model.right.sum()).backward()
    replica.step(1, P)
    np.testing.assert_allclose(vector(model), [*12 * [0.9], *12 * [0.8]], rtol=1e-6)


@pytest.mark.skipif(P == 1, reason="one rank is like itself")
def test_groups_of_other_parameters_are_refused(comm):
    """Though as many."""
    model = network()
    optimizer = torch.optim.SGD(model[2 if comm.rank else 0].parameters(), 0.1)
    assert "has another optimizer than rank 0" in told_by_all(comm, lambda: Replica(model, optimizer, comm))


def test_the_example_runs(comm, capfd, monkeypatch):
    strategies = ("sync", "average")
    for strategy in strategies:
        monkeypatch.setattr("sys.argv", ["torch_ranks.py", strategy])
        runpy.run_path(str(REPOSITORY / "examples" / "torch_ranks.py"), run_name="__main__")
    lines = capfd.readouterr().out.splitlines()
    assert len(lines) == (0 if comm.rank else 2)
    for strategy, line in zip(strategies, lines, strict=False):
        found = re.fullmatch(rf"{P} rank\(s\), {strategy}: ([\d.]+)% of 359 read right", line)
        assert found, line
        assert float(found[1]) > 90


def test_the_program_of_the_readme_runs(comm, capfd):
    _, program = re.findall(r"```python\n(.*?)```", (REPOSITORY / "README.md").read_text(), re.DOTALL)
    torch.manual_seed(comm.rank)
    exec(program, {})
    out = capfd.readouterr().out
    found = re.fullmatch(rf"rank {comm.rank}: ([\d.]+)\n", out)
    assert len(set(comm.allgather(found and found[1]))) == 1
    assert found, out
    assert float(found[1]) < 0.05
