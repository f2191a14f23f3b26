"""Optimizers on the flat parameter vector, learning-rate schedules and gradient clipping.

All ranks must get the same bits from the same numbers, wherever arrays are in memory.  So no BLAS is used here, whose
order of additions may depend on alignment: only elementwise operations, and NumPy's sums.
"""

import math
from collections.abc import Callable

import numpy as np

from ..errors import UserError

Array = np.ndarray

BLOCK = 2**16  # elements; vectors are worked through in blocks that stay in the cache, which saves a third of the time


def at_once(size: int, like: Array | None) -> int:
    """The number of elements in a block: all of a vector on a GPU, where each operation costs a kernel launch."""
    return min(size, BLOCK) if like is None or isinstance(like, np.ndarray) else size


class Optimizer:
    """The base of all optimizers, which compute what those of ``torch.optim`` do, up to rounding.

    ``state`` holds the vectors that an optimizer keeps, with the shape and dtype of the parameters, written in place;
    ``steps`` counts the steps.  A checkpoint must keep both: a new optimizer that has them continues with the same
    bits.  ``part`` is the slice of the parameters that it updates: all of them, unless other ranks update the rest.
    ``like`` is an array on the device of the parameters, if they are not in host memory.

    ``momentum`` (beta1 of Adam) and ``beta2`` (alpha of RMSprop) are in [0, 1), ``epsilon`` is above 0; an optimizer
    reads those that its formula names.  ``weight_decay`` is at least 0 and applies to all parameters, biases included:
    it adds ``weight_decay * params`` to the gradient (an L2 penalty), except in AdamW.  Not all defaults are those of
    PyTorch.
    """

    vectors: tuple[str, ...] = ()  # names of the state; a velocity is kept only if there is momentum
    decoupled = False  # weight decay apart from the gradient
    in_parts = True  # whether it can update a part of the parameters, and leave the rest to others

    def __init__(
        self,
        size: int,
        dtype: np.dtype,
        *,
        momentum: float = 0.9,
        beta2: float = 0.999,
        epsilon: float = 1e-8,
        weight_decay: float = 0.0,
        like: Array | None = None,
    ) -> None:
        for name, value in (("momentum", momentum), ("beta2", beta2)):
            if not 0 <= value < 1:
                raise UserError(f"{name} is {value}; expected at least 0 and less than 1")
        if not 0 < epsilon < math.inf:
            raise UserError(f"epsilon is {epsilon}; expected a number above 0")
        if not 0 <= weight_decay < math.inf:
            raise UserError(f"weight decay is {weight_decay}; expected a number of at least 0")
        self.momentum, self.beta2, self.epsilon, self.weight_decay = momentum, beta2, epsilon, weight_decay
        self.steps, self.part = 0, slice(0, size)
        names = [name for name in self.vectors if momentum or name != "velocity"]
        self.state = {name: np.zeros(size, dtype, like=like) for name in names}
        self._scratch = np.empty(at_once(size, like), dtype, like=like)

    def step(self, params: np.ndarray, grad: np.ndarray, lr: float) -> None:
        """Update ``params[part]`` in place; ``grad[part]`` may be overwritten."""
        self.steps += 1
        lr = float(lr)  # a NumPy scalar of float64 would have float32 vectors computed in float64
        length = max(len(self._scratch), 1)
        for start in range(self.part.start, self.part.stop, length):
            block = slice(start, min(start + length, self.part.stop))
            x, g, state = params[block], grad[block], {name: whole[block] for name, whole in self.state.items()}
            scratch = self._scratch[: len(x)]
            if self.weight_decay and self.decoupled:
                x *= 1 - lr * self.weight_decay
            elif self.weight_decay:
                g += np.multiply(x, self.weight_decay, out=scratch)
            self._update(x, g, lr, scratch, state)

    def _update(self, x: Array, g: Array, lr: float, scratch: Array, state: dict[str, Array]) -> None:
        """Step on one block of parameters, gradient and state; ``g`` and ``scratch`` may be overwritten."""
        raise NotImplementedError


class SGD(Optimizer):
    """Stochastic gradient descent with heavy-ball momentum: v = momentum v + g, x = x - lr v (Polyak, 1964).

    Without momentum x = x - lr g.
    """

    vectors = ("velocity",)

    def _update(self, x: Array, g: Array, lr: float, scratch: Array, state: dict[str, Array]) -> None:
        if self.momentum:
            g = _accumulate(state["velocity"], g, self.momentum)
        x -= np.multiply(g, lr, out=scratch)


class Nesterov(Optimizer):
    """SGD with Nesterov's momentum (Sutskever et al., 2013): v = momentum v + g, x = x - lr (g + momentum v).

    Without momentum x = x - lr g.
    """

    vectors = ("velocity",)

    def _update(self, x: Array, g: Array, lr: float, scratch: Array, state: dict[str, Array]) -> None:
        if self.momentum:
            g += np.multiply(_accumulate(state["velocity"], g, self.momentum), self.momentum, out=scratch)
        x -= np.multiply(g, lr, out=scratch)


class Adagrad(Optimizer):
    """Adagrad: s = s + g^2, x = x - lr g / (sqrt(s) + epsilon) (Duchi et al., 2011); momentum is not used."""

    vectors = ("sum_square",)

    def _update(self, x: Array, g: Array, lr: float, scratch: Array, state: dict[str, Array]) -> None:
        squares = state["sum_square"]
        squares += np.square(g, out=scratch)
        g /= _root(squares, 1.0, self.epsilon, scratch)
        x -= np.multiply(g, lr, out=scratch)


class RMSProp(Optimizer):
    """RMSProp (Tieleman & Hinton, 2012).

    s = beta2 s + (1 - beta2) g^2, v = momentum v + g / (sqrt(s) + epsilon), x = x - lr v.
    Without momentum x = x - lr g / (sqrt(s) + epsilon).
    """

    vectors = ("mean_square", "velocity")

    def _update(self, x: Array, g: Array, lr: float, scratch: Array, state: dict[str, Array]) -> None:
        squares = state["mean_square"]
        _average(squares, np.square(g, out=scratch), self.beta2)
        g /= _root(squares, 1.0, self.epsilon, scratch)
        if self.momentum:
            g = _accumulate(state["velocity"], g, self.momentum)
        x -= np.multiply(g, lr, out=scratch)


class Adam(Optimizer):
    """Adam (Kingma & Ba, 2015); beta1 is ``momentum``.

    m = beta1 m + (1 - beta1) g, s = beta2 s + (1 - beta2) g^2, and at step t, counted from 1,
    x = x - lr m / (1 - beta1^t) / (sqrt(s / (1 - beta2^t)) + epsilon).
    """

    vectors = ("first_moment", "second_moment")

    def _update(self, x: Array, g: Array, lr: float, scratch: Array, state: dict[str, Array]) -> None:
        mean, squares = state["first_moment"], state["second_moment"]
        _average(squares, np.square(g, out=scratch), self.beta2)
        _average(mean, g, self.momentum)
        root = _root(squares, math.sqrt(1 - self.beta2**self.steps), self.epsilon, scratch)
        np.divide(mean, root, out=g)
        g *= lr / (1 - self.momentum**self.steps)
        x -= g


class AdamW(Adam):
    """Adam with decoupled weight decay (Loshchilov & Hutter, 2019): x = x - lr ``weight_decay`` x before each step.

    Weight decay is not part of the moments.
    """

    decoupled = True


def _accumulate(velocity: np.ndarray, g: np.ndarray, momentum: float) -> np.ndarray:
    """Return velocity = momentum velocity + g, computed in place."""
    velocity *= momentum
    velocity += g
    return velocity


def _average(mean: np.ndarray, values: np.ndarray, beta: float) -> None:
    """Compute mean = beta mean + (1 - beta) values in place; leaves (1 - beta) values in ``values``."""
    values *= 1 - beta
    mean *= beta
    mean += values


def _root(squares: np.ndarray, divisor: float, epsilon: float, out: np.ndarray) -> np.ndarray:
    """Return sqrt(squares) / divisor + epsilon."""
    np.sqrt(squares, out=out)
    out /= divisor
    out += epsilon
    return out


OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "sgd": SGD,
    "nesterov": Nesterov,
    "adagrad": Adagrad,
    "rmsprop": RMSProp,
    "adam": Adam,
    "adamw": AdamW,
}

SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda t: 1.0,
    "linear": lambda t: 1 - t,
    "cosine": lambda t: (1 + math.cos(math.pi * t)) / 2,  # Loshchilov & Hutter, 2017, without restarts
    "step": lambda t: 1.0 if t < 0.5 else 0.1 if t < 0.75 else 0.01,  # He et al., 2016, on CIFAR-10
}
"""The share of the learning rate left when the share t of the steps after the warm-up has been taken."""


def learning_rate(schedule: str, lr: float, step: int, total: int, warmup: int) -> float:
    """The learning rate for the step that follows ``step`` others, in a run of ``total`` steps.

    The first ``warmup`` steps use lr / warmup, 2 lr / warmup, ..., lr (Goyal et al., 2017).  The schedule runs over the
    remaining steps, and would reach its end in the step after the last; later steps use the value at the end.
    """
    if schedule not in SCHEDULES:
        raise UserError(f"learning-rate schedule {schedule!r} is unknown; expected one of {', '.join(SCHEDULES)}")
    if step < warmup:
        return lr * ((step + 1) / warmup)
    return lr * SCHEDULES[schedule](min((step - warmup) / max(total - warmup, 1), 1.0))


def clip(grad: np.ndarray, limit: float) -> float:
    """Scale ``grad`` in place to the norm ``limit`` if its norm, the root of its sum of squares, is larger.

    Returns the norm before (Pascanu et al., 2013).  One that is not finite, because an element is not or its square
    overflows float64, leaves ``grad`` as it is, for the caller to see.  PyTorch divides by norm + 1e-6.
    """
    total, squares = 0.0, np.empty(at_once(len(grad), grad), like=grad)
    for start in range(0, len(grad), max(len(squares), 1)):
        block = grad[start : start + len(squares)]
        total += float(np.sum(np.square(block, out=squares[: len(block)], dtype=np.float64)))
    norm = math.sqrt(total)
    if limit < norm < math.inf:
        grad *= limit / norm
    return norm
