"""Models on one flat parameter vector, with explicit gradients."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple, Protocol

import numpy as np


class Sums(NamedTuple):
    """Sums over the samples of a batch; sums, not means, so that those of several ranks add up."""

    loss: float
    correct: int


class Model(Protocol):
    """What the training loop asks of a model; ``size`` is its number of parameters."""

    size: int

    def initial(self, rng: np.random.Generator, dtype: np.dtype) -> np.ndarray:
        """Initial parameters, shape (size,)."""

    def loss_and_grad(self, params: np.ndarray, x: np.ndarray, y: np.ndarray, grad: np.ndarray) -> Sums:
        """Loss and correct predictions on the batch; writes the gradient of the loss into ``grad``, shape (size,)."""

    def predict(self, params: np.ndarray, x: np.ndarray) -> np.ndarray:
        """The most likely class of each sample."""


class MLP:
    """A multilayer perceptron: ReLU between layers, softmax cross-entropy at the end.

    ``sizes`` are features, hidden widths, classes; without hidden layers it is softmax regression.  The vector
    holds weight (inputs x outputs) and bias of each layer in turn.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        self.sizes = tuple(sizes)
        self.size = sum((inputs + 1) * outputs for inputs, outputs in pairwise(self.sizes))

    def layers(self, params: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        """Weight and bias of each layer, as views of the vector."""
        views, at = [], 0
        for inputs, outputs in pairwise(self.sizes):
            weight = params[at : at + inputs * outputs].reshape(inputs, outputs)
            at += inputs * outputs
            views.append((weight, params[at : at + outputs]))
            at += outputs
        return views

    def initial(self, rng: np.random.Generator, dtype: np.dtype) -> np.ndarray:
        """He's initialization: weights of variance 2 / inputs, biases zero.  Drawn in float64, so that both
        precisions start from the same point."""
        params = np.zeros(self.size, dtype)
        for weight, _ in self.layers(params):
            weight[:] = rng.normal(scale=np.sqrt(2 / weight.shape[0]), size=weight.shape)
        return params

    def loss_and_grad(self, params: np.ndarray, x: np.ndarray, y: np.ndarray, grad: np.ndarray) -> Sums:
        """See ``Model``."""
        layers = self.layers(params)
        inputs = self._forward(layers, x)
        logits = inputs.pop()
        logits -= logits.max(axis=1, keepdims=True)
        samples = np.arange(len(y))
        correct = int(np.count_nonzero(logits.argmax(axis=1) == y))
        normalizer = np.log(np.exp(logits).sum(axis=1))
        loss = float(np.sum(normalizer - logits[samples, y]))

        error = np.exp(logits - normalizer[:, np.newaxis])  # of the logits: probabilities minus the truth
        error[samples, y] -= 1
        for n, (weight_grad, bias_grad) in reversed(list(enumerate(self.layers(grad)))):
            np.matmul(inputs[n].T, error, out=weight_grad)
            np.sum(error, axis=0, out=bias_grad)
            if n:
                error = (error @ layers[n][0].T) * (inputs[n] > 0)
        return Sums(loss, correct)

    @np.errstate(all="ignore")  # an overflow is an infinite logit
    def predict(self, params: np.ndarray, x: np.ndarray) -> np.ndarray:
        """See ``Model``."""
        return self._forward(self.layers(params), x)[-1].argmax(axis=1)

    def _forward(self, layers: list[tuple[np.ndarray, np.ndarray]], x: np.ndarray) -> list[np.ndarray]:
        """The input of each layer, and the logits."""
        values = [x]
        for n, (weight, bias) in enumerate(layers):
            if n:
                values[-1] = np.maximum(values[-1], 0, out=values[-1])
            values.append(values[-1] @ weight + bias)
        return values


MODELS: dict[str, Callable[[int, int], MLP]] = {
    "mlp": lambda features, classes: MLP((features, 256, classes)),
    "softmax": lambda features, classes: MLP((features, classes)),
}
