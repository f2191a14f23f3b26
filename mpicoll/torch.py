"""The PyTorch adapter: modules and optimizers on all ranks of an MPI job, by any strategy but ``async``.

Three lines of an ordinary training loop change: one makes a ``Replica``, one takes this rank's share of each batch from
``batches``, and one calls its ``step`` instead of the optimizer's.
"""

import inspect
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import combinations
from numbers import Integral, Number
from types import SimpleNamespace
from typing import Any, TypeVar

import numpy as np
from mpi4py import MPI

from .errors import UserError
from .mpi.collectives import allreduce, bcast
from .mpi.sharing import shared
from .mpi.together import on_all
from .train.batches import Batches
from .train.checks import check
from .train.data import from_arrays
from .train.optimizers import Optimizer
from .train.settings import DTYPES, Settings
from .train.strategies import STRATEGIES, Now

try:
    import torch
    from torch.optim.optimizer import register_optimizer_step_pre_hook
except ModuleNotFoundError as error:
    raise ImportError("mpicoll.torch needs PyTorch, which is missing: pip install 'mpicoll[torch]'") from error

NOT_HERE = ("momenta", "sync_epochs", "compress")
"""Settings that need what torch does not provide: the optimizer's state as flat vectors, the length of an epoch, or the
matrices in the parameter vector."""

MEETING = 64
"""Steps between two calls in which all ranks raise errors together, with strategies that have no collective calls."""

T = TypeVar("T")

AFTERWARDS = "after changing the model or its optimizer, make a new Replica, on all ranks"


class Replica:
    """This rank's replica of a model, and the strategy by which it is combined with the replicas of other ranks.

    Parameters and gradients become slices of one vector each, which strategies work on without copies.  All ranks start
    with the parameters, buffers and optimizer state of rank 0.  Learning rates are the optimizer's, and schedulers
    change them as usual.

    Frozen parameters (without ``requires_grad``) do not change.  Buffers are each rank's own: ``BatchNorm`` normalizes
    by this rank's samples.  All other parameters have a gradient in every step, which is zero if the loss does not
    depend on them.

    The set of parameters, which of them are frozen, and the parameters of the optimizer are fixed when a ``Replica`` is
    made.  After changing them, or moving or converting the model, make a new one.  ``step``, ``batches`` and
    ``consensus`` raise ``UserError`` on all ranks if something has changed: with ``"sync"`` in the same step, otherwise
    at the next collective call, within at most 64 steps.  The optimizer's own ``step()`` raises as well, and that of
    any other optimizer of the same parameters.

    Parameters
    ----------
    model
        A module on the CPU with dense tensors.  The parameters to train are all float32 or all float64.
    optimizer
        An optimizer of ``torch.optim`` for parameters of ``model``, which needs no closure and takes dense gradients.
    comm
        An mpi4py intracommunicator; making a ``Replica`` is a collective call on it.
    strategy
        ``"sync"``, ``"average"``, ``"butterfly"``, ``"gossip"`` or ``"ad-psgd"``, as for ``mpicoll train``.
    settings
        ``every``, ``outer``, ``outer_lr``, ``outer_momentum``, ``graph``, ``mix_first`` and ``delays`` of the strategy,
        as for ``mpicoll train``; ``clip``, the L2 norm to which the combined gradient is clipped, or with other
        strategies than ``"sync"`` each rank's own; ``algorithm``, the allreduce algorithm.

    Raises
    ------
    UserError
        On all ranks, for a model, optimizer or setting that cannot be used or that differs between ranks.
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
        names = {id(param): name for name, param in model.named_parameters()}
        groups = [[names[id(param)] for param in group["params"]] for group in optimizer.param_groups]
        _compare(comm, {"model": tensors, "optimizer": (type(optimizer), groups), "strategy": chosen})
        self.comm, self.steps = comm, 0
        self._share, self._taken, self._is_epoch, self._evaluates = (0, 0), 0, False, False

        size, dtype = sum(param.numel() for param in trained), str(trained[0].dtype).removeprefix("torch.")
        self._params = np.empty(size, dtype)
        self._sums = _zeros(comm, size + 2, self._params.dtype)  # what a strategy finds there: see Strategy
        self._slices = _sliced(trained, self._params, self._sums)
        bcast(self._params, comm)
        known = {id(param) for param in trained}
        with torch.no_grad():
            for _, tensor in _tensors(model):
                if id(tensor) not in known:  # of any dtype, and small but for what is frozen
                    tensor.copy_(comm.bcast(tensor.clone()))
        state = comm.bcast(optimizer.state_dict())
        if comm.rank:
            optimizer.load_state_dict(state)

        self._made, self._verdict = _Made(model, optimizer, self._slices), _Verdict(comm)
        of_all = self._sums if STRATEGIES[strategy].replicated else None
        stepping = _Stepping(optimizer, self._params, self._verdict, of_all)
        self.strategy = STRATEGIES[strategy](comm, self._sums, self._params, stepping, chosen, steps_per_epoch=1)
        if self.strategy.point() is not self._params:  # push-sum: the model is where gradients are taken
            self.strategy.params = self._params.copy()
        _replicas.add(self)

    @property
    def model(self) -> torch.nn.Module:
        """The model that the ``Replica`` was made with."""
        return self._made.model

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimizer that the ``Replica`` was made with."""
        return self._made.optimizer

    def batches(
        self, samples: int, batch_size: int, epoch: int = 0, *, seed: int = 0, sharded: bool = False
    ) -> Iterator[torch.Tensor]:
        """Yield this rank's share of each batch of an epoch.

        Every sample comes once, in an order drawn from ``seed`` and ``epoch``.  The last batch may be shorter, so that
        a rank may have no sample of it; its gradient then counts for nothing.  The first share is a collective call.
        With ``"ad-psgd"`` a rank gets the next free share, so that ranks do different numbers of steps in an epoch; all
        must iterate to its end.

        Parameters
        ----------
        samples
            The number of samples: the same on all ranks or, if ``sharded``, that of this rank's own samples.
        batch_size
            The number of samples in a batch on all ranks together, at least 1.
        epoch
            The number of the epoch, 0 or more.
        seed
            The seed of the order of samples, 0 or more.
        sharded
            Whether each rank holds samples of its own.

        Yields
        ------
        The numbers of this rank's samples, an int64 tensor of shape (samples of this share,).  Its attribute ``total``
        is the number of samples in the batch on all ranks.  If shares are taken ahead of their steps (by a data loader
        that prefetches), or several for one step, pass ``len(share)`` and ``share.total`` to ``step``.

        Raises
        ------
        UserError
            On all ranks, for arguments that cannot be used or differ, or if the model has changed.
        """
        self._meet()
        everyones: dict[str, Any] = {
            "batch size": batch_size,
            "epoch": epoch,
            "seed": seed,
            "number of samples": sharded or samples,
        }
        if self.strategy.replicated:  # as by a scheduler that goes by a rank's own loss
            everyones["setting of the optimizer, as the learning rate,"] = self._made.settings()
        _compare(self.comm, everyones)
        for name, least, number in (("batch_size", 1, batch_size), ("epoch", 0, epoch), ("seed", 0, seed)):
            if not isinstance(number, Integral) or number < least:
                raise UserError(f"batches(): {name} must be a whole number of at least {least}, got {number!r}")
        x, y = np.empty((samples, 0)), np.zeros(samples, np.int8)  # there is nothing to know of them but their number
        data = from_arrays(x, y, self.comm if sharded else None)
        batches, first = Batches(data, self.comm.size, batch_size, seed, epoch), self.steps
        if self._evaluates:  # shares that no step is for
            for step in range(batches.steps):
                yield _share_of(*batches.share(step, self.comm.rank))
            return
        self._is_epoch, self._taken = True, 0
        for step, rank in self.strategy.shares(first, first + batches.steps):
            mine, total = batches.share(step - first, rank)
            self._share, self._taken = (len(mine), total), self._taken + 1
            yield _share_of(mine, total)
            if self._taken and not self.strategy.in_step:  # others count on a step
                self._verdict.note(self._refuse_to_skip)
                self.step(0, 1)
        self._is_epoch = False
        if not self.strategy.in_step:
            self.steps = first + batches.steps
            self._go_to_point()  # others may have moved it since the last step
        if not self.strategy.replicated:
            self._verdict.tell()

    def _refuse_to_skip(self) -> None:
        raise UserError(
            "a share was taken from batches() before the last one had its step, and with ad-psgd none is ahead: call "
            "step() for each, step(0, 1) to leave one out"
        )

    def step(self, samples: int | None = None, total: int | None = None) -> None:
        """Do one step of the strategy with the gradient in ``model``, and set that gradient to zero.

        Every rank must call it, also without samples: its gradient then counts for nothing.

        Parameters
        ----------
        samples
            The number of this rank's samples; the gradient is that of the mean loss over them.
        total
            The number of samples in the batch on all ranks.  By default both are those of the last share that
            ``batches`` yielded, which must be the only one since the last step.

        Raises
        ------
        UserError
            On all ranks, if the numbers cannot be used or the model has changed.
        """
        if self._evaluates:
            raise UserError("step() within consensus() would be lost at its end: leave the with block first")
        if not (self._is_epoch or self.strategy.in_step):
            raise UserError("with ad-psgd a step is one of an epoch: take samples from batches()")
        self._verdict.note(self._made.check)
        own, length = self._verdict.note(lambda: self._weights(samples, total)) or (0, 1)
        self._verdict.note(lambda: _take_gradients(self._slices))
        if own:
            self._sums *= own / length
        else:
            self._sums[:] = 0  # the mean over none is nan
        self._sums[-2:] = own / length, self._verdict.error is not None  # all ranks look at the sums of these
        try:
            if self._meets():
                self._verdict.tell()
            now = Now(1, self.steps, float(self.optimizer.param_groups[0]["lr"]))
            self.strategy.step(now, own, 1)
        finally:
            self._sums[:] = 0
            for times in (self.strategy.seconds, self.strategy.waits or []):
                times.clear()  # nobody reads these times
        self.steps += 1
        self._taken = 0
        self._go_to_point()

    def _weights(self, samples: int | None, total: int | None) -> tuple[int, int]:
        """The number of samples of this rank's gradient, and of the batch on all ranks."""
        if self._taken > 1 and (samples is None or total is None):
            raise UserError(
                f"{self._taken} shares were taken from batches() since the last step: for a step of several, or where "
                "a data loader reads ahead, give step(samples, total), which are len(mine) and mine.total of a share; "
                "for a batch that is left out, call step(0, mine.total) on all ranks"
            )
        own = self._share[0] if samples is None else samples
        length = self._share[1] if total is None else total
        if not (isinstance(own, Integral) and isinstance(length, Integral)):
            raise UserError(
                f"step(samples, total) takes two numbers of samples, got {type(own).__name__} and "
                f"{type(length).__name__}: a closure is for optimizers that need one, which a Replica cannot take"
            )
        if not 0 <= own <= length or not length:
            raise UserError(
                f"step of {own} samples in a batch of {length}: take them from batches(), or give step(samples, total)"
            )
        return own, length

    def _meets(self) -> bool:
        """Whether ranks exchange errors in this step, other than with the gradient."""
        if self.strategy.replicated or not self.strategy.in_step:
            return False
        step, often = self.steps + 1, min(getattr(self.strategy, "every", MEETING), MEETING)
        is_early = step < often and step & (step - 1) == 0  # most mistakes are made in all steps: report them early
        return is_early or step % often == 0

    def _meet(self) -> None:
        """Raise on all ranks if something is wrong on any of them; a collective call."""
        self._verdict.note(self._made.check)
        self._verdict.tell()

    def _go_to_point(self) -> None:
        """Copy the evaluation point to the model, if the strategy's parameters are not the model's."""
        point = self.strategy.point()
        if point is not self._params:
            self._params[:] = point

    @contextmanager
    def consensus(self) -> Iterator[None]:
        """Hold the consensus model in ``model`` within a ``with`` block, to evaluate or save it; a collective call.

        Buffers of float32 and float64 hold the mean over all ranks meanwhile.  After the block the model is this rank's
        own again, parameters and buffers.

        Raises
        ------
        UserError
            On all ranks if the model has changed; with ``"ad-psgd"`` also within an epoch.
        """
        if self._is_epoch and not self.strategy.in_step:
            raise UserError("with ad-psgd ranks agree on a model between epochs only: go on to the end of batches()")
        self._meet()
        own, buffers, before = self._params.copy(), _Buffers(self.model), self._evaluates
        means = buffers.means(self.comm)
        self._params[:] = self.strategy.consensus()
        self._evaluates = True
        try:
            buffers.put(means)
            yield
        finally:
            self._params[:] = own
            buffers.restore()
            self._evaluates = before


_DTYPES = [f"torch.{name}" for name in DTYPES]


def _zeros(comm: MPI.Intracomm, size: int, dtype: np.dtype) -> np.ndarray:
    """Return a vector of zeros, in shared memory if the ranks have any; a collective call."""
    memory = shared(comm)
    own = None if memory is None else memory.empty(size, dtype)
    zeros = np.empty(size, dtype) if own is None else own
    zeros[:] = 0
    return zeros


def _share_of(mine: np.ndarray, total: int) -> torch.Tensor:
    """Return a rank's share of a batch as a tensor, with the length of the batch as its ``total``."""
    given: Any = torch.from_numpy(mine)
    given.total = total
    return given


def _is_number(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and x.numel() == 1


class _Slice:
    """A parameter to train, with the slices of the two vectors that hold its values and its gradient."""

    def __init__(self, param: torch.nn.Parameter, values: np.ndarray, grad: np.ndarray) -> None:
        # To torch each slice is a storage of its own, so that torch.save writes the slice and not the whole vector.
        self.param, self.values, self._grad = param, _tensor(values, param.shape), _tensor(grad, param.shape)
        self.at, self._grad_at = self.values.data_ptr(), self._grad.data_ptr()
        self.values.copy_(param.detach())
        param.data = self.values
        self._give()

    def _give(self) -> None:
        self.param.grad = self._given = self._grad.detach()  # the program may replace its data

    def take(self) -> None:
        """Copy the gradient to the vector, if it is elsewhere."""
        grad = self.param.grad
        if grad is self._given and grad.data_ptr() == self._grad_at and grad.is_set_to(self._grad):
            return
        if grad is None:  # by zero_grad()
            self._grad.zero_()
        elif grad.shape != self._grad.shape:
            raise UserError(f"a gradient has shape {tuple(grad.shape)}; expected {tuple(self._grad.shape)}")
        else:
            self._grad.copy_(grad.detach().to_dense())
        self._give()


def _sliced(trained: list[torch.nn.Parameter], params: np.ndarray, sums: np.ndarray) -> list[_Slice]:
    """Cut the two vectors into slices for the parameters, one after another."""
    ends = np.cumsum([param.numel() for param in trained])
    return [
        _Slice(param, params[end - param.numel() : end], sums[end - param.numel() : end])
        for param, end in zip(trained, ends, strict=True)
    ]


def _tensor(array: np.ndarray, shape: torch.Size) -> torch.Tensor:
    return torch.from_numpy(array).view(shape)


class _Made:
    """The model and optimizer of a ``Replica`` as they were when it was made, to find changes in every step cheaply."""

    def __init__(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, slices: list[_Slice]) -> None:
        self.model, self.optimizer, self._slices = model, optimizer, slices
        self._params = _named(model)
        self._requiring = [param.requires_grad for param in self._params.values()]
        self._groups = self._in_groups()
        self.ids = {id(part.param) for part in slices}
        self._look()

    def _look(self) -> None:
        modules = [*self.model.modules()]
        self._held_by = [held for one in modules for held in (one._parameters, one._modules)]
        self._held = [one for held in self._held_by for one in held.values()]  # kept, so that no other has its id
        self._ids = self._in_modules()

    def _in_modules(self) -> list[int]:
        return [id(one) for held in self._held_by for one in held.values()]

    def _in_groups(self) -> list[list[int]]:
        return [[*map(id, group["params"])] for group in self.optimizer.param_groups]

    def settings(self) -> str:
        """The settings of the optimizer by group: its numbers, texts, and tuples of these."""
        plain = (Number, str, type(None))

        def comparable(value: Any) -> bool:
            return isinstance(value, plain) or (isinstance(value, (tuple, list)) and all(map(comparable, value)))

        groups = [
            {name: value.item() if _is_number(value) else value for name, value in group.items() if name != "params"}
            for group in self.optimizer.param_groups
        ]
        return repr([{name: value for name, value in group.items() if comparable(value)} for group in groups])

    def check(self) -> None:
        """Raise a ``UserError`` if the model or the optimizer has changed."""
        if self._in_modules() != self._ids:
            now = _named(self.model)
            for name in {**self._params, **now}:
                if now.get(name) is not (was := self._params.get(name)):
                    how = "new in the model" if was is None else "another parameter" if name in now else "gone"
                    raise UserError(f"{name} is {how} since the Replica was made: {AFTERWARDS}")
            self._look()  # modules without parameters
        requiring = [param.requires_grad for param in self._params.values()]
        if requiring != self._requiring:
            which = [now != was for now, was in zip(requiring, self._requiring, strict=True)].index(True)
            how = "unfrozen" if requiring[which] else "frozen"
            raise UserError(f"{[*self._params][which]} was {how} since the Replica was made: {AFTERWARDS}")
        for part in self._slices:
            if not (part.param.data_ptr() == part.at and part.param.is_set_to(part.values)):
                name = next(name for name, param in self._params.items() if param is part.param)
                raise UserError(
                    f"{name} was moved or converted since the Replica was made, or given to another one: {AFTERWARDS}"
                )
        if self._in_groups() != self._groups:
            raise UserError(f"the optimizer has other parameters than when the Replica was made: {AFTERWARDS}")


def _named(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The parameters of the model, each under all its names."""
    return dict(model.named_parameters(remove_duplicate=False))


def _take_gradients(slices: list[_Slice]) -> None:
    for part in slices:
        part.take()


class _Verdict:
    """The error of this rank, kept until all ranks raise it together."""

    def __init__(self, comm: MPI.Intracomm) -> None:
        self._comm = comm
        self.error: UserError | None = None

    def note(self, action: Callable[[], T]) -> T | None:
        """Call a function, unless there is an error already, and return its result; keep its ``UserError``."""
        try:
            return action() if self.error is None else None
        except UserError as error:
            self.error = error
            return None

    def tell(self) -> None:
        """Raise on all ranks the error of any rank; a collective call."""
        error, self.error = self.error, None

        def own() -> None:
            if error is not None:
                raise error

        on_all(self._comm, own)


class _Stepping(Optimizer):
    """A torch optimizer with the interface of ``train.optimizers.Optimizer``.

    It steps on the model, whose parameters may be other arrays than the strategy's, by the gradient of the model and at
    its own learning rate; and not at all if this rank has an error.

    If ranks have summed their gradients, ``sums`` also holds the sum of their weights and the number of ranks with an
    error.  So all ranks raise the same error before anything is changed, without another exchange.
    """

    in_parts = False

    def __init__(
        self, optimizer: torch.optim.Optimizer, model: np.ndarray, verdict: _Verdict, sums: np.ndarray | None
    ) -> None:
        super().__init__(len(model), model.dtype)
        self._optimizer, self._model, self._verdict, self._sums = optimizer, model, verdict, sums

    def step(self, params: np.ndarray, grad: np.ndarray, lr: float) -> None:
        """Step on the model, or raise on all ranks if one of them has an error."""
        if self._sums is not None:
            self._check(*self._sums[-2:])
        if self._verdict.error is not None:
            return
        if params is not self._model:
            self._model[:] = params
        _ours.append(self._optimizer)
        try:
            self._optimizer.step()
        finally:
            _ours.pop()
        if params is not self._model:
            params[:] = self._model

    def _check(self, weight: float, wrong: float) -> None:
        if wrong:
            self._verdict.tell()
        if abs(weight - 1) > 1e-3:
            raise UserError(
                f"step(samples, total): the samples of all ranks sum to {weight:.4g} times the total, expected 1: "
                "give each rank's own samples, and the total of all ranks"
            )


_replicas: "weakref.WeakSet[Replica]" = weakref.WeakSet()
_ours: list[torch.optim.Optimizer] = []
"""Optimizers that a Replica steps with now."""


def _refuse_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Raise before an optimizer steps on parameters of a ``Replica`` by itself: ranks would diverge silently."""
    if _ours or not _replicas:
        return
    params = {id(param) for group in optimizer.param_groups for param in group["params"]}
    if any(params & replica._made.ids for replica in [*_replicas]):
        name = type(optimizer).__name__
        raise UserError(
            f"{name}.step() would change parameters of a Replica by this rank's own gradient: call replica.step() "
            "instead; or, to go on without it, delete the replica"
        )


register_optimizer_step_pre_hook(_refuse_step)


class _Buffers:
    """The buffers of a model as they are now, to be restored later."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model
        self._places = [(one, name, kept) for one in model.modules() for name, kept in one._buffers.items()]
        self._kept = [(kept, kept.detach().clone()) for kept in {id(kept): kept for kept in model.buffers()}.values()]

    def means(self, comm: MPI.Intracomm) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The means over all ranks of the buffers that have one; a collective call."""
        with_mean = {name: one for name, one in self._model.named_buffers() if _is_plain(one)}
        with_mean = {name: one for name, one in with_mean.items() if str(one.dtype) in _DTYPES}
        shapes = {f"shape of buffer {name}": tuple(one.shape) for name, one in with_mean.items()}
        _compare(comm, {"set of buffers": [(name, str(one.dtype)) for name, one in with_mean.items()]})
        _compare(comm, shapes)
        means = [one.detach().resolve_neg().numpy().copy() for one in with_mean.values()]
        if means:
            allreduce(means, comm, "mean", deterministic=True)
        return [(one, torch.from_numpy(mean)) for one, mean in zip(with_mean.values(), means, strict=True)]

    def put(self, others: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Replace the values of some buffers, in their memory if possible."""
        with torch.no_grad():
            for one, values in others:
                if _is_writable(one):
                    one.copy_(values)
                    continue
                for module, name, kept in self._places:
                    if kept is one:
                        module._buffers[name] = values

    def restore(self) -> None:
        """Restore the buffers, which ``forward`` may have replaced or written to."""
        for module, name, kept in self._places:
            if name not in module._buffers or module._buffers[name] is not kept:
                module._buffers[name] = kept
        self.put([(kept, values) for kept, values in self._kept if _is_writable(kept)])


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether the tensor has an array of memory that holds its elements."""
    return tensor.layout is torch.strided and not (tensor.is_nested or tensor.is_quantized)


def _is_expanded(tensor: torch.Tensor) -> bool:
    """Whether several elements of the tensor certainly share memory."""
    sides = [*zip(tensor.shape, tensor.stride(), strict=True)]
    extent = 1 + sum((size - 1) * stride for size, stride in sides)
    return bool(tensor.numel()) and (extent < tensor.numel() or any(size > 1 and not stride for size, stride in sides))


def _is_writable(tensor: torch.Tensor) -> bool:
    """Whether torch can write to the tensor, element by element."""
    return _is_plain(tensor) and not _is_expanded(tensor) and (not tensor.is_inference() or _in_inference())


def _in_inference() -> bool:
    return bool(torch.is_inference_mode_enabled())


def _tensors(model: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    """The parameters and buffers of the model by name, each once."""
    return [*model.named_parameters(), *model.named_buffers()]


def _trained(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.nn.Parameter]:
    """The parameters to train, each once.  Raises ``UserError`` if one of them cannot be trained."""
    for name, given, kind in (("model", model, torch.nn.Module), ("optimizer", optimizer, torch.optim.Optimizer)):
        if not isinstance(given, kind):
            raise UserError(
                f"Replica(): {name} must be a torch.{kind.__module__.split('.')[1]}.{kind.__name__}, got "
                f"{type(given).__name__}"
            )
    if _in_inference():
        raise UserError("nothing can be trained within torch.inference_mode(): make the Replica outside of it")
    for name, tensor in _tensors(model):
        _check_tensor(name, tensor)
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
    _check_apart(model)
    _check_optimizer(optimizer)
    return trained


def _check_tensor(name: str, tensor: torch.Tensor) -> None:
    """Raise a ``UserError`` unless the tensor can be copied between ranks and written to."""
    if torch.nn.parameter.is_lazy(tensor):
        raise UserError(
            f"{name} has no shape yet, being of a lazy module: have the model compute a batch before making a Replica"
        )
    if tensor.device.type != "cpu":
        raise UserError(f"{name} is on {tensor.device}; expected a model on the CPU: move it with model.cpu()")
    if not _is_plain(tensor):
        kind = "nested" if tensor.is_nested else "quantized" if tensor.is_quantized else f"of layout {tensor.layout}"
        raise UserError(
            f"{name} is {kind}; expected dense tensors: convert it, as with to_dense(), or train without it"
        )
    if _is_expanded(tensor):
        raise UserError(f"{name} is expanded, several of its elements sharing memory: make it with clone()")
    if tensor.is_inference():
        raise UserError(f"{name} was made in torch.inference_mode(), and cannot be written to: make it with clone()")


def _check_apart(model: torch.nn.Module) -> None:
    """Raise a ``UserError`` if a parameter to train shares memory with another tensor.

    Its values move to a vector, so that the two would no longer share memory.
    """
    groups: dict[int, list[tuple[str, torch.Tensor]]] = {}
    for name, tensor in _tensors(model):
        groups.setdefault(tensor.untyped_storage().data_ptr(), []).append((name, tensor))
    for group in groups.values():
        for (name, one), (other, two) in combinations(group, 2):
            if (one.requires_grad or two.requires_grad) and _share_memory(one, two):
                raise UserError(
                    f"{name} and {other} share memory, and would not in a Replica: to tie parameters, have one "
                    "nn.Parameter in both places; make other tensors with clone()"
                )


def _share_memory(one: torch.Tensor, two: torch.Tensor) -> bool:
    """Whether two tensors overlap in memory."""
    return bool(one.numel() and two.numel() and np.shares_memory(_memory(one), _memory(two)))


def _memory(tensor: torch.Tensor) -> np.ndarray:
    """The memory that holds the elements of a tensor, of any dtype, also of those that NumPy does not have."""
    size = tensor.element_size()
    strides = tuple(size * stride for stride in tensor.stride())
    at = {"version": 3, "data": (tensor.data_ptr(), False), "typestr": f"|V{size}", "strides": strides}
    return np.asarray(SimpleNamespace(__array_interface__={**at, "shape": tuple(tensor.shape)}))


def _check_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Raise a ``UserError`` if the optimizer needs a closure or sparse gradients."""
    kind = type(optimizer).__name__
    if isinstance(optimizer, torch.optim.SparseAdam):
        raise UserError(f"{kind} takes sparse gradients only, and those of a Replica are dense: take Adam")
    parameters = inspect.signature(optimizer.step).parameters.values()
    needed = [one.name for one in parameters if one.default is one.empty and one.kind is one.POSITIONAL_OR_KEYWORD]
    if needed := [name for name in needed if name != "self"]:
        raise UserError(
            f"{kind}.step() needs a {needed[0]}, and a Replica has none for it: take an optimizer that steps without"
        )


def _chosen(strategy: str, given: dict[str, Any]) -> Settings:
    """Return the settings of the strategy.  Raises ``UserError`` for those that a ``Replica`` does not have."""
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
    """Raise a ``UserError`` on all ranks if one of these values differs between ranks; a collective call."""
    told = comm.allgather(facts)
    for rank, others in enumerate(told):
        for what, fact in others.items():
            if what not in told[0] or fact != told[0][what]:
                raise UserError(f"rank {rank} has another {what} than rank 0; expected the same on all ranks")
