"""Optimizers on the flat parameter vector."""

import numpy as np


class SGD:
    """Stochastic gradient descent with heavy-ball momentum: v = momentum v + g, x = x - lr v (Polyak, 1964)."""

    def __init__(self, size: int, dtype: np.dtype, lr: float, momentum: float = 0.9) -> None:
        self.lr, self.momentum = lr, momentum
        self._velocity = np.zeros(size, dtype)
        self._change = np.empty(size, dtype)

    def step(self, params: np.ndarray, grad: np.ndarray) -> None:
        """Update ``params`` in place."""
        self._velocity *= self.momentum
        self._velocity += grad
        np.multiply(self._velocity, self.lr, out=self._change)
        params -= self._change
