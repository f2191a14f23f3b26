"""PyTorch's modules and optimizers on all ranks of an MPI job, by any strategy that goes in step.

Three lines of an ordinary training loop change: one makes a ``Replica``, one takes this rank's share of each batch from
``batches``, and one calls its ``step`` instead of the optimizer's.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from mpi4py import MPI

from .errors import UserError
from .mpi.collectives import allreduce, bcast
from .mpi.guard import on_all
from .mpi.state import state_of
from .train.data import Batches, from_arrays
from .train.loop import check
from .train.optimizers import Optimizer
from .train.settings import DTYPES, Settings
from .train.strategies import STRATEGIES, Now

try:
    import torch
except ModuleNotFoundError as error:
    raise ImportError("mpicoll.torch needs PyTorch, which is missing: pip install 'mpicoll[torch]'") from error

NOT_HERE = ("momenta", "sync_epochs", "compress")
"""Settings of strategies that ask for more than torch tells: flat vectors of the state, the length of an epoch, or what
of the vector is a matrix."""


class Replica:
    """This rank's replica of a model, and how it agrees with those of the other ranks.

    Parameters and gradients become views of one vector each, which strategies work on; nothing is copied.  All ranks
    begin with the parameters, buffers and optimizer state of rank 0.  Learning rates are the optimizer's own, and
    schedulers change them as ever.

    Parameters that require no gradient when this is made stay as they are, and so does each rank's own copy of the
    buffers (as of BatchNorm, which normalizes by the rank's own samples).  The others have a gradient in every step,
    zero if the loss does not depend on them.

    Parameters
    ----------
    model
        On the CPU; what is trained is all float32, or all float64.
    optimizer
        Of ``torch.optim``, for parameters of ``model``, one that needs no closure.
    comm
        An intracommunicator; making this is a collective call on it.
    strategy, settings
        As for ``mpicoll train``: ``"sync"``, ``"average"``, ``"butterfly"``, ``"gossip"`` or ``"ad-psgd"``, and
        ``every``, ``outer``, ``outer_lr``, ``outer_momentum``, ``graph``, ``mix_first``, ``delays``; ``clip`` limits
        the norm of the gradient that ranks agree on or, where they do not, of each rank's own; ``algorithm`` is that of
        allreduces.

    Raises ``UserError`` on all ranks for a model, optimizer or setting that cannot be used, or that differs between
    ranks.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        comm: MPI.Intracomm,
        strategy: str = "sync",
        **settings: Any,
    ) -> None:
        trained, chosen = on_all(comm, lambda: (_trained(model, optimizer), _chosen(strategy, settings)))
        tensors = [
            (name, tuple(tensor.shape), str(tensor.dtype), tensor.requires_grad) for name, tensor in _tensors(model)
        ]
        groups = [len(group["params"]) for group in optimizer.param_groups]
        _compare(comm, {"model": tensors, "optimizer": (type(optimizer), groups), "strategy": chosen})
        self.model, self.optimizer, self.comm, self.steps = model, optimizer, comm, 0
        self._trained, self._share, self._is_epoch = trained, (0, 0), False

        flat = torch.cat([param.detach().reshape(-1) for param in trained])
        self._params = flat.numpy()
        self._sums = _zeros(comm, len(flat) + 2, self._params.dtype)  # what a strategy finds there: see Strategy
        sums = torch.from_numpy(self._sums)
        sizes = [param.numel() for param in trained]
        pieces = zip(trained, flat.split(sizes), sums[:-2].split(sizes), strict=True)
        self._views = [(values.view_as(param), grad.view_as(param)) for param, values, grad in pieces]
        for param, (values, grad) in zip(trained, self._views, strict=True):
            param.data, param.grad = values, grad
        bcast(self._params, comm)
        known = {id(param) for param in trained}
        with torch.no_grad():
            for _, tensor in _tensors(model):
                if id(tensor) not in known:  # of any dtype, and small but for what is frozen
                    tensor.copy_(comm.bcast(tensor.clone()))
        state = comm.bcast(optimizer.state_dict())
        if comm.rank:
            optimizer.load_state_dict(state)

        stepping = _Stepping(optimizer, self._params)
        self.strategy = STRATEGIES[strategy](comm, self._sums, self._params, stepping, chosen, steps_per_epoch=1)
        if self.strategy.point() is not self._params:  # push-sum: the model is where gradients are taken
            self.strategy.params = self._params.copy()

    def batches(
        self, samples: int, batch_size: int, epoch: int = 0, *, seed: int = 0, sharded: bool = False
    ) -> Iterator[torch.Tensor]:
        """The batches of an epoch: of each, which samples are this rank's share, a vector of int64.

        Every sample comes once, in an order drawn from ``seed`` and ``epoch``, 0 or more; ``batch_size`` counts those
        of all ranks.  The last batch may be shorter, and ranks may have no sample of it: what they compute of none
        does not matter, nor whether they do.  All ranks hold the same ``samples``; or, if ``sharded``, each its own.
        The first batch is a collective call.  With ``"ad-psgd"`` a rank gets the next share that nobody has taken, so
        that ranks may do more or fewer steps in an epoch, and all must do theirs to its end.
        """
        everyones = {"batch size": batch_size, "epoch": epoch, "seed": seed, "number of samples": sharded or samples}
        _compare(self.comm, everyones)
        x, y = np.empty((samples, 0)), np.zeros(samples, np.int8)  # there is nothing to know of them but their number
        data = from_arrays(x, y, self.comm if sharded else None)
        batches, first = Batches(data, self.comm.size, batch_size, seed, epoch), self.steps
        self._is_epoch = True
        for step, rank in self.strategy.shares(first, first + batches.steps):
            mine, total = batches.share(step - first, rank)
            self._share = len(mine), total
            yield torch.from_numpy(mine)
        self._is_epoch = False
        if not self.strategy.in_step:
            self.steps = first + batches.steps
            self._go_to_point()  # others may have moved it since the last step

    def step(self, samples: int | None = None, total: int | None = None) -> None:
        """Step as the strategy has it, from the gradient in ``model``, and set that to zero.

        It is that of the mean loss over this rank's ``samples`` of a batch of ``total`` on all ranks; by default, over
        the share that ``batches`` gave last.  Ranks without samples call this, too: their gradient counts for nothing.
        """
        if not (self._is_epoch or self.strategy.in_step):
            raise UserError("with ad-psgd a step is one of an epoch: take samples from batches()")
        own = self._share[0] if samples is None else samples
        length = self._share[1] if total is None else total
        if not 0 <= own <= length or not length:
            raise UserError(
                f"step of {own} samples in a batch of {length}: take them from batches(), or give step(samples, total)"
            )
        for param, (values, grad) in zip(self._trained, self._views, strict=True):
            if param.data_ptr() != values.data_ptr():
                raise UserError("the model has other tensors than before: convert or move it before making a Replica")
            if param.grad is not grad:  # zero_grad() took it away
                grad.zero_() if param.grad is None else grad.copy_(param.grad.to_dense())
                param.grad = grad
        if own:
            self._sums *= own / length
        else:
            self._sums[:] = 0  # the mean over none is nan
        now = Now(1, self.steps, float(self.optimizer.param_groups[0]["lr"]))
        self.strategy.step(now, own, 1)
        self.steps += 1
        for times in (self.strategy.seconds, self.strategy.waits or []):
            times.clear()  # nobody asks for them
        self._sums[:] = 0
        self._go_to_point()

    def _go_to_point(self) -> None:
        """Where gradients are to be taken, if the strategy's parameters are not the model's."""
        point = self.strategy.point()
        if point is not self._params:
            self._params[:] = point

    @contextmanager
    def consensus(self) -> Iterator[None]:
        """Within it, the model is the one that all ranks would agree on now, to be evaluated or saved; afterwards it is
        this rank's own again, to be trained on.  Buffers are the mean of all ranks' if they are float32 or float64.
        A collective call, and with ``"ad-psgd"`` none for the midst of an epoch."""
        if self._is_epoch and not self.strategy.in_step:
            raise UserError("with ad-psgd ranks agree on a model between epochs only: go on to the end of batches()")
        buffers = [buffer for buffer in self.model.buffers() if str(buffer.dtype) in _DTYPES]
        own = self._params.copy(), [buffer.clone() for buffer in buffers]
        means = [buffer.numpy().copy() for buffer in buffers]
        if means:
            allreduce(means, self.comm, "mean", deterministic=True)
        self._params[:] = self.strategy.consensus()
        for buffer, mean in zip(buffers, means, strict=True):
            buffer.copy_(torch.from_numpy(mean))
        try:
            yield
        finally:
            self._params[:] = own[0]
            for buffer, before in zip(buffers, own[1], strict=True):
                buffer.copy_(before)


_DTYPES = [f"torch.{name}" for name in DTYPES]


def _zeros(comm: MPI.Intracomm, size: int, dtype: np.dtype) -> np.ndarray:
    """Where allreduces of ranks on one node find it, if there is such memory; a collective call."""
    state = state_of(comm)
    own = state.on_node(state.node.empty, size * dtype.itemsize) if state.shares else None
    zeros = np.empty(size, dtype) if own is None else own.view(dtype)
    zeros[:] = 0
    return zeros


class _Stepping(Optimizer):
    """A torch optimizer as strategies know one.  It steps on the model, which may be elsewhere than their parameters,
    from the gradient that is there, at a learning rate of its own."""

    in_parts = False

    def __init__(self, optimizer: torch.optim.Optimizer, model: np.ndarray) -> None:
        super().__init__(len(model), model.dtype)
        self._optimizer, self._model = optimizer, model

    def step(self, params: np.ndarray, grad: np.ndarray, lr: float) -> None:
        """See ``Optimizer``."""
        if params is not self._model:
            self._model[:] = params
        self._optimizer.step()
        if params is not self._model:
            params[:] = self._model


def _tensors(model: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Parameters and buffers by name, each once."""
    return [*model.named_parameters(), *model.named_buffers()]


def _trained(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.nn.Parameter]:
    """The parameters to train, each once; a ``UserError`` if they cannot be."""
    for name, tensor in _tensors(model):
        if tensor.device.type != "cpu":
            raise UserError(f"{name} is on {tensor.device}; expected a model on the CPU: move it with model.cpu()")
    trained = [param for param in model.parameters() if param.requires_grad]
    found = sorted({str(param.dtype) for param in trained})
    if not trained:
        raise UserError("the model has no parameter that requires a gradient: there is nothing to train")
    if len(found) > 1 or found[0] not in _DTYPES:
        raise UserError(
            f"parameters are {' and '.join(found)}; expected all {' or all '.join(_DTYPES)}: convert them, as with "
            "model.float()"
        )
    known = {id(param) for param in model.parameters()}
    if any(id(param) not in known for group in optimizer.param_groups for param in group["params"]):
        raise UserError("the optimizer has parameters that are not the model's: make it of model.parameters()")
    return trained


def _chosen(strategy: str, given: dict[str, Any]) -> Settings:
    """The settings; a ``UserError`` for those that do not count here."""
    usable = {name: one for name, one in STRATEGIES.items() if name != "async"}
    if strategy == "async":
        raise UserError(
            f"strategy async needs servers that run the optimizer, and cannot run torch's: choose {', '.join(usable)}"
        )
    names = [name for one in usable.values() for name in one.options]
    known = ["algorithm", "clip", *(name for name in dict.fromkeys(names) if name not in NOT_HERE)]
    for name in given:
        if name not in known:
            raise UserError(f"{name} is no setting of a Replica; expected one of {', '.join(known)}")
    settings = Settings(strategy=strategy, **given)
    check(settings)
    return settings


def _compare(comm: MPI.Intracomm, facts: dict[str, Any]) -> None:
    """A ``UserError`` on all ranks if any of these is not the same on all."""
    told = comm.allgather(facts)
    for rank, others in enumerate(told):
        for what, fact in others.items():
            if fact != told[0][what]:
                raise UserError(f"rank {rank} has another {what} than rank 0; expected the same on all ranks")
