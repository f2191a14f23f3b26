"""Model averaging: every rank steps by itself, and every few steps the models are averaged.

Plain averaging (local SGD: McDonald et al. 2010, Stich 2019) replaces the parameters of every rank by the mean.  The
other outer optimizers treat the difference between the mean and the anchor, the last common model, as a step:

    change = momentum * change + lr * (mean - anchor)
    anchor = anchor + change                                        bmuf-classical (Chen and Huo 2016), slowmo
    anchor = anchor + lr * (mean - anchor) + momentum * change      bmuf, with Nesterov's momentum; diloco

SlowMo (Wang et al. 2020) measures steps in units of the learning rate, so its ``change`` is rescaled when the learning
rate changes.  DiLoCo (Douillard et al. 2023) is meant for AdamW as the inner optimizer.  In EASGD (Zhang et al. 2015)
each rank only moves towards the previous anchor, by lr/p of the difference, while the anchor moves towards the mean of
the ranks by lr: the sum of the models and the anchor does not change.
"""

from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np

from ...errors import UserError
from .base import Now, Strategy

if TYPE_CHECKING:
    from collections.abc import Callable


class Outer(NamedTuple):
    """An outer optimizer: how the anchor moves.  ``momentum`` is a function of the number of ranks."""

    lr: float = 1.0
    momentum: "Callable[[int], float]" = lambda p: 0.0
    nesterov: bool = False
    by_learning_rate: bool = False
    elastic: bool = False


OUTER = {
    "mean": Outer(),
    "bmuf": Outer(momentum=lambda p: 1 - 1 / p, nesterov=True),
    "bmuf-classical": Outer(momentum=lambda p: 1 - 1 / p),
    "slowmo": Outer(momentum=lambda p: 0.7, by_learning_rate=True),
    "diloco": Outer(0.7, lambda p: 0.9, nesterov=True),
    "easgd": Outer(0.9, elastic=True),
}


class Average(Strategy):
    """Local SGD: after every ``every`` steps, ranks take the mean of their parameters, or a step towards it.

    The first ``sync_epochs`` epochs are synchronous (a warm-up, or post-local SGD: Lin et al. 2020).  ``momenta`` says
    what happens to the optimizer's state when models are averaged: ``keep`` each rank's own, ``average`` it as well, or
    ``reset`` it to zero.  With ``compress`` each rank sends a code of the difference between its model and the anchor,
    and keeps the residual.
    """

    options: ClassVar = {
        "every": 8,
        "sync_epochs": 0,
        "outer": "mean",
        "outer_lr": None,
        "outer_momentum": None,
        "momenta": "keep",
        "compress": None,
    }

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.every, self.momenta = self.option("every"), self.option("momenta")
        self.switch = self.option("sync_epochs") * self.steps_per_epoch
        self.outer = OUTER[self.option("outer")]
        lr, momentum = self.option("outer_lr"), self.option("outer_momentum")
        self.lr = self.outer.lr if lr is None else lr
        self.momentum = self.outer.momentum(self.p) if momentum is None else momentum
        self.plain = self.outer == Outer() and (self.lr, self.momentum) == (1, 0)
        self._state = {}
        if not self.plain:
            self._mean = np.empty_like(self.params)
            self._state = {"anchor": self.params.copy(), "change": np.zeros_like(self.params), "lr": np.zeros(1)}
        elif self.compressor:
            self._state = {"anchor": self.params.copy()}
        if self.compressor and not self.plain:
            raise UserError(
                "--compress is for plain --outer mean: leave out any other --outer, --outer-lr and --outer-momentum"
            )

    def agree_on_gradient(self, now: Now) -> int:
        """Sum the gradients of all ranks while training is synchronous; afterwards keep each rank's own."""
        if now.step < self.switch:
            self.allreduce([self.sums], "sum")
            return 1
        return self.p

    def agree_on_parameters(self, now: Now) -> None:
        """Average the models, if this is one of every ``every`` steps."""
        local = now.step + 1 - self.switch
        if local <= 0 and self._state:
            self._state["anchor"][:] = self.params
        if local <= 0 or local % self.every:
            return
        state = self.optimizer.state.values() if self.momenta == "average" else []
        if self.compressor:
            self._take_coded_steps()
            if state:
                self.allreduce([*state], "mean")
        elif self.plain:
            self.allreduce([self.params, *state], "mean")
        else:
            self._mean[:] = self.params
            self.allreduce([self._mean, *state], "mean")
            self._move(now.lr)
        if self.momenta == "reset":
            self.optimizer.steps = 0
            for vector in self.optimizer.state.values():
                vector[:] = 0

    def _take_coded_steps(self) -> None:
        assert self.compressor
        anchor = self._state["anchor"]
        self.params -= anchor
        self.compressor.add_up(self.params, np.zeros(0, anchor.dtype, like=anchor), self)
        self.params /= self.p
        anchor += self.params
        self.params[:] = anchor

    def _move(self, lr: float) -> None:
        anchor, change, last = self._state["anchor"], self._state["change"], self._state["lr"]
        if self.outer.elastic:
            self.params += (anchor - self.params) * (self.lr / self.p)
        step = self._mean  # becomes lr * (mean - anchor)
        step -= anchor
        step *= self.lr
        if self.outer.by_learning_rate and last[0]:
            change *= lr / last[0]
        last[0] = lr
        change *= self.momentum
        change += step
        if self.outer.nesterov:
            anchor += step
            anchor += change * self.momentum
        else:
            anchor += change
        if not self.outer.elastic:
            self.params[:] = anchor

    def consensus(self) -> np.ndarray:
        """The consensus model: in EASGD the anchor, otherwise the mean."""
        return self._state["anchor"].copy() if self.outer.elastic else super().consensus()

    def state(self) -> dict[str, np.ndarray]:
        """The anchor, its last change, and the learning rate of that step; the same on all ranks."""
        return {**self._state, **super().state()}

    def restore(self, state: dict[str, np.ndarray], own: bool) -> None:
        """Continue from a checkpoint: copy the arrays of ``state``."""
        super().restore(state, own)
        for name, array in self._state.items():
            array[:] = np.asarray(state[name], like=array)
