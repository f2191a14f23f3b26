"""Model averaging: every rank steps by itself, and now and then they agree on a mean.

Plain averaging (local SGD: McDonald et al. 2010, Stich 2019) puts the mean in the place of every rank's parameters.
The others take the mean as a step from where the ranks last agreed, the anchor, and give that step to an optimizer of
its own:

    change = momentum * change + lr * (mean - anchor)
    anchor = anchor + change                                        bmuf-classical (Chen and Huo 2016), slowmo
    anchor = anchor + lr * (mean - anchor) + momentum * change      bmuf, with Nesterov's momentum; diloco

SlowMo (Wang et al. 2020) measures steps in learning rates, so its ``change`` is rescaled when that changes; DiLoCo
(Douillard et al. 2023) is meant for AdamW inside.  In EASGD (Zhang et al. 2015) ranks only move towards the anchor, by
lr/p of the way to where it was before, while it moves towards their mean by lr: the sum of all of them stays.
"""

from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np

from ...errors import UserError
from .base import Now, Strategy

if TYPE_CHECKING:
    from collections.abc import Callable


class Outer(NamedTuple):
    """How the anchor moves; ``momentum`` may depend on the number of ranks."""

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
    """Local SGD: ``every`` so many steps, the mean of all ranks' parameters, or a step towards it.

    For the first ``sync_epochs`` epochs ranks are synchronous (a warm-up, or post-local SGD: Lin et al. 2020).
    ``momenta`` says what becomes of the optimizer's state at an agreement: ``keep`` each rank's own, ``average`` it
    likewise, or ``reset`` it to zero, as after the first step.  With ``compress`` each rank sends something shorter
    than the way from where they last agreed to its model, and keeps the rest.
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
            raise UserError("--compress is for --outer mean as it is: leave out other outers, their lr and momentum")

    def agree_on_gradient(self, now: Now) -> int:
        """See ``Strategy``: only while synchronous."""
        if now.step < self.switch:
            self.allreduce([self.sums], "sum")
            return 1
        return self.p

    def agree_on_parameters(self, now: Now) -> None:
        """See ``Strategy``: every so many steps."""
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
        """See ``Strategy``: in EASGD the anchor."""
        return self._state["anchor"].copy() if self.outer.elastic else super().consensus()

    def state(self) -> dict[str, np.ndarray]:
        """See ``Strategy``: the anchor, the last change of it, and the learning rate then; the same on all ranks."""
        return {**self._state, **super().state()}

    def restore(self, state: dict[str, np.ndarray], own: bool) -> None:
        """See ``Strategy``."""
        super().restore(state, own)
        for name, array in self._state.items():
            array[:] = np.asarray(state[name], like=array)
