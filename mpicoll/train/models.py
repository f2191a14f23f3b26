"""Models on one flat parameter vector, with explicit gradients, and the interface of a user's own model."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from ..errors import UserError

if TYPE_CHECKING:
    from scipy.sparse import csr_array


class Batch(NamedTuple):
    """A batch of samples, maybe empty: ``x`` (samples, features), dense or CSR, and their classes ``y`` (samples,).

    Classes are int64, counted from 0."""

    x: "np.ndarray | csr_array"
    y: np.ndarray


class Sums(NamedTuple):
    """Sums over the samples of a batch.  They are sums and not means, so that ranks can sum them.

    They may be arrays of no dimension: on a GPU numbers stay there until they are needed.
    """

    loss: float
    correct: int


class Model(Protocol):
    """The interface of a model: any object with these four members can be trained.

    All parameters are one float32 or float64 vector, which ranks reduce and average, optimizers step on and checkpoints
    hold, without knowing its contents.  A model works on views of it, such as ``params[:n].reshape(rows, columns)``.

    On a GPU all arrays are CuPy's except the initial parameters.  NumPy's functions dispatch to CuPy.  Sparse samples
    are a ``cupyx.scipy.sparse.csr_matrix``.

    Nothing here communicates: each rank calls these methods on its own samples, and not always equally often.  So the
    result of a method must depend on its arguments alone; a method must not change or keep its arguments (except
    ``grad``, which is to be written), nor divide by a number of samples.
    """

    size: int
    """The number of parameters."""

    def initial(self, rng: np.random.Generator, dtype: np.dtype) -> np.ndarray:
        """Return initial parameters, a new vector of shape (size,) in host memory, drawn from ``rng``.

        All ranks start with those of rank 0.
        """

    def loss_and_grad(self, params: np.ndarray, batch: Batch, grad: np.ndarray) -> Sums:
        """Return the loss on the batch and the number of correct predictions, both summed over its samples.

        Writes the gradient of this summed loss to all of ``grad``, shape (size,), whose contents are undefined before.
        A batch without samples has loss 0 and gradient 0.  A loss that is not finite ends training.
        """

    def predict(self, params: np.ndarray, x: "np.ndarray | csr_array") -> np.ndarray:
        """Return the most likely class of each sample, integers of shape (samples,)."""


Loss = Callable[[np.ndarray, np.ndarray], tuple[Any, np.ndarray]]
"""From outputs, shape (samples, outputs), and y to the loss, summed over the batch, and its gradient by the outputs,
which may be overwritten."""


def cross_entropy(logits: np.ndarray, y: np.ndarray) -> tuple[Any, np.ndarray]:
    """Cross-entropy of the softmax of ``logits``, one per class; its gradient is the probabilities minus the truth."""
    samples = np.arange(len(y), like=y)
    logits -= logits.max(axis=1, keepdims=True)  # exp cannot overflow, and the normalizer is at least 1
    error = np.exp(logits)
    normalizer = error.sum(axis=1)
    loss = np.sum(np.log(normalizer) - logits[samples, y], dtype=np.float64)
    error /= normalizer[:, np.newaxis]
    error[samples, y] -= 1
    return loss, error


def log_loss(scores: np.ndarray, y: np.ndarray) -> tuple[Any, np.ndarray]:
    """Logistic loss log(1 + exp(-t s)) for score s and truth t = 1 or -1; its derivative is -t / (1 + exp(t s))."""
    truth = _signs(scores, y)
    margin = truth * scores
    loss = np.sum(np.logaddexp(0, -margin), dtype=np.float64)
    return loss, -truth * np.exp(-np.logaddexp(0, margin))  # exp(margin) might overflow


def hinge(scores: np.ndarray, y: np.ndarray) -> tuple[Any, np.ndarray]:
    """Hinge loss max(0, 1 - t s) for score s and truth t = 1 or -1; its derivative is -t where t s < 1, else 0.

    The subgradient at the kink, t s = 1, is 0 as in Pegasos (Shalev-Shwartz et al., 2011).
    """
    truth = _signs(scores, y)
    slack = 1 - truth * scores
    loss = np.sum(np.maximum(slack, 0), dtype=np.float64)  # nan stays nan
    return loss, -truth * (slack > 0)


def _signs(scores: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The truth for each score: 1 where it should be positive, -1 where negative (``Layered`` defines the outputs)."""
    outputs = scores.shape[1]
    positive = np.arange(outputs, like=y) if outputs > 1 else 1
    return np.where(y[:, np.newaxis] == positive, 1, -1).astype(scores.dtype)


Layer = tuple[np.ndarray, np.ndarray]
"""Weight (inputs x outputs), or its gradient, and bias; without elements, if it is added elsewhere."""


def nothing(n: int, values: np.ndarray) -> None:
    """Leave ``values`` as they are: the sums of a whole layer are complete."""


def forward(
    layers: Sequence[Layer],
    x: "np.ndarray | csr_array",
    first: int = 0,
    complete: Callable[[int, np.ndarray], None] = nothing,
) -> list[Any]:
    """Return the input of each layer, and the outputs of the last.

    Layers are numbered from ``first``.  All but number 0 begin with ReLU, in place.  ``complete`` is called with the
    outputs of each layer, to add in place the parts of sums that other ranks have.
    """
    values: list[Any] = [x]
    for n, (weight, bias) in enumerate(layers, first):
        if n:
            np.maximum(values[-1], 0, out=values[-1])
        values.append(values[-1] @ weight)
        if len(bias):
            values[-1] += bias
        complete(n, values[-1])
    return values


def backward(
    layers: Sequence[Layer],
    inputs: Sequence[Any],
    error: np.ndarray,
    grads: Sequence[Layer],
    first: int = 0,
    complete: Callable[[int, np.ndarray], None] = nothing,
) -> np.ndarray:
    """Write all of ``grads``, from the inputs that ``forward`` returned and the gradient by the last outputs.

    Returns the gradient of the loss by the input of the first layer, unless that is layer 0.  The derivative of ReLU at
    0 is 0.
    """
    for n in reversed(range(len(layers))):
        weight_grad, bias_grad = grads[n]
        if hasattr(inputs[n], "indptr"):  # CSR
            weight_grad[:] = inputs[n].T @ error
        else:
            np.matmul(inputs[n].T, error, out=weight_grad)
        if len(bias_grad):
            np.sum(error, axis=0, out=bias_grad)
        if first + n:
            error = error @ layers[n][0].T
            complete(first + n, error)
            error *= inputs[n] > 0
    return error


class Layered:
    """Fully connected layers with ReLU between them and a loss at the end; with one layer, a linear model.

    ``sizes`` are the number of features, the hidden widths, and the number of outputs.  There is one output per class,
    and the largest wins (among equals, the first); or one output for two classes, and class 1 wins if it is positive.
    The vector holds weight (inputs x outputs) and bias of each layer in turn.  Samples may be sparse, and are never
    made dense.
    """

    def __init__(self, sizes: Sequence[int], loss: Loss) -> None:
        self.sizes = tuple(sizes)
        self.size = sum((inputs + 1) * outputs for inputs, outputs in pairwise(self.sizes))
        self.loss = loss

    def tensors(self, params: np.ndarray) -> dict[str, np.ndarray]:
        """``layer0.weight``, ``layer0.bias``, ``layer1.weight``, ...: views of the vector, which they cover."""
        views, at = {}, 0
        for n, (inputs, outputs) in enumerate(pairwise(self.sizes)):
            views[f"layer{n}.weight"] = params[at : at + inputs * outputs].reshape(inputs, outputs)
            at += inputs * outputs
            views[f"layer{n}.bias"] = params[at : at + outputs]
            at += outputs
        return views

    def _layers(self, params: np.ndarray) -> list[Layer]:
        views = list(self.tensors(params).values())
        return list(zip(views[::2], views[1::2], strict=True))

    def initial(self, rng: np.random.Generator, dtype: np.dtype) -> np.ndarray:
        """Return He's initialization (2015): weights of variance 2 / inputs, biases zero.

        Weights are drawn in float64, so that both precisions start from the same point.
        """
        params = np.zeros(self.size, dtype)
        for weight, _ in self._layers(params):
            weight[:] = rng.normal(scale=np.sqrt(2 / weight.shape[0]), size=weight.shape)
        return params

    def loss_and_grad(self, params: np.ndarray, batch: Batch, grad: np.ndarray) -> Sums:
        """Return the summed loss and the correct predictions, and write the gradient, as ``Model`` defines it."""
        layers = self._layers(params)
        inputs = forward(layers, batch.x)
        outputs = inputs.pop()
        correct: Any = np.count_nonzero(classes_of(outputs) == batch.y)
        loss, error = self.loss(outputs, batch.y)
        backward(layers, inputs, error, self._layers(grad))
        return Sums(loss, correct)

    @np.errstate(all="ignore")  # an overflow is an infinite output
    def predict(self, params: np.ndarray, x: "np.ndarray | csr_array") -> np.ndarray:
        """Return the predicted class of each sample."""
        return classes_of(forward(self._layers(params), x)[-1])


def classes_of(outputs: np.ndarray) -> np.ndarray:
    """Return the predicted class of each sample from the outputs."""
    return outputs.argmax(axis=1) if outputs.shape[1] > 1 else (outputs[:, 0] > 0).astype(np.int64)


def softmax(features: int, classes: int, hidden: tuple[int, ...]) -> Layered:
    """Softmax (multinomial logistic) regression."""
    _refuse_hidden("softmax", hidden)
    return Layered((features, max(classes, 2)), cross_entropy)


def mlp(features: int, classes: int, hidden: tuple[int, ...]) -> Layered:
    """A multilayer perceptron with softmax cross-entropy; by default with one hidden layer of 256 units."""
    if any(width < 1 for width in hidden):
        raise UserError(f"model 'mlp' got hidden widths {', '.join(map(str, hidden))}; expected at least 1 each")
    return Layered((features, *(hidden or (256,)), max(classes, 2)), cross_entropy)


def logistic(features: int, classes: int, hidden: tuple[int, ...]) -> Layered:
    """Binary logistic regression: one score, the log odds of class 1."""
    _refuse_hidden("logistic", hidden)
    if classes > 2:
        raise UserError(f"model 'logistic' is for two classes, and the data have {classes}; take softmax, svm or mlp")
    return Layered((features, 1), log_loss)


def svm(features: int, classes: int, hidden: tuple[int, ...]) -> Layered:
    """A linear support vector machine with hinge loss; the optimizer's weight decay determines the margin.

    Two classes share one score.  More classes are one-vs-rest, the default of LIBLINEAR and scikit-learn: a score for
    each class against all others, and the sum of their losses.
    """
    _refuse_hidden("svm", hidden)
    return Layered((features, classes if classes > 2 else 1), hinge)


def _refuse_hidden(name: str, hidden: tuple[int, ...]) -> None:
    if hidden:
        raise UserError(
            f"model {name!r} has no hidden layers, and got widths for {len(hidden)}; take mlp, or give none"
        )


MODELS: dict[str, Callable[[int, int, tuple[int, ...]], Layered]] = {
    "mlp": mlp,
    "softmax": softmax,
    "logistic": logistic,
    "svm": svm,
}
"""Name to model, given the number of features, of classes, and hidden widths, where () is the model's own choice."""
