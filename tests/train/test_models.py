"""Models: gradients, sparse samples, empty batches, extreme values, predictions."""

import numpy as np
import pytest
from scipy.sparse import csr_array

from mpicoll import UserError
from mpicoll.train.models import MODELS, Batch, Layered, Model, Sums

KINDS = [  # name, classes, hidden widths; 5 features
    ("softmax", 3, ()),
    ("mlp", 3, (4,)),
    ("mlp", 3, (7, 6)),
    ("logistic", 2, ()),
    ("svm", 2, ()),
    ("svm", 3, ()),
]
every_model = pytest.mark.parametrize(("name", "classes", "hidden"), KINDS)


def example(name: str, classes: int, hidden: tuple[int, ...], samples: int = 9) -> tuple[Layered, np.ndarray, Batch]:
    """A model, parameters and a batch with zeros in it, all of them float64."""
    model, rng = MODELS[name](5, classes, hidden), np.random.default_rng(0)
    params = model.initial(rng, np.dtype("f8")) + rng.normal(size=model.size) * 0.1
    x, y = rng.normal(size=(samples, 5)) * rng.integers(2, size=(samples, 5)), rng.integers(classes, size=samples)
    return model, params, Batch(x, y)


def evaluate(model: Model, params: np.ndarray, batch: Batch) -> tuple[Sums, np.ndarray]:
    grad = np.full(model.size, np.nan, params.dtype)  # all of it must be written
    sums = model.loss_and_grad(params, batch, grad)
    return sums, grad


def differences(model: Model, params: np.ndarray, batch: Batch) -> np.ndarray:
    """The gradient by central differences."""
    grad = np.empty(model.size)
    for n in range(model.size):
        step = np.zeros(model.size)
        step[n] = 1e-6
        above, below = (evaluate(model, params + change, batch)[0].loss for change in (step, -step))
        grad[n] = (above - below) / 2e-6
    return grad


@every_model
def test_gradients_are_the_finite_differences_of_the_loss(name, classes, hidden):
    model, params, batch = example(name, classes, hidden)
    _, grad = evaluate(model, params, batch)
    numeric = differences(model, params, batch)
    np.testing.assert_allclose(grad, numeric, rtol=1e-5, atol=1e-7)
    wrong = grad.copy()
    wrong[np.argmax(abs(wrong))] *= 1.001
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(wrong, numeric, rtol=1e-5, atol=1e-7)


@every_model
@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_sparse_samples_are_like_dense_ones_and_are_never_made_dense(name, classes, hidden, dtype, monkeypatch):
    model, params, batch = example(name, classes, hidden)
    params, x = params.astype(dtype), batch.x.astype(dtype)
    dense_sums, dense_grad = evaluate(model, params, Batch(x, batch.y))
    sparse = csr_array(x)
    for method in ("toarray", "todense"):
        monkeypatch.setattr(csr_array, method, None)
    sums, grad = evaluate(model, params, Batch(sparse, batch.y))
    assert sums == (pytest.approx(dense_sums.loss, rel=1e-12 if dtype == "f8" else 1e-6), dense_sums.correct)
    np.testing.assert_allclose(grad, dense_grad, rtol=0, atol=1e-12 if dtype == "f8" else 1e-5)
    np.testing.assert_array_equal(model.predict(params, sparse), model.predict(params, x))


@every_model
@pytest.mark.parametrize("kind", [np.array, csr_array])
def test_losses_and_gradients_of_shares_add_up_to_those_of_the_batch(name, classes, hidden, kind):
    model, params, (x, y) = example(name, classes, hidden)
    x = kind(x)
    sums, grad = evaluate(model, params, Batch(x, y))
    assert sums.correct == np.count_nonzero(model.predict(params, x) == y)
    parts = [evaluate(model, params, Batch(x[share], y[share])) for share in (slice(2), slice(2, 9), slice(9, 9))]
    np.testing.assert_allclose(np.sum([part[0] for part in parts], axis=0), sums, rtol=1e-13)
    np.testing.assert_allclose(np.sum([part[1] for part in parts], axis=0), grad, rtol=1e-10, atol=1e-14)
    assert parts[2][0] == (0, 0)
    assert not parts[2][1].any()
    assert model.predict(params, x[:0]).shape == (0,)


@every_model
def test_float32_follows_float64(name, classes, hidden):
    model, params, batch = example(name, classes, hidden)
    sums, grad = evaluate(model, params, batch)
    single_sums, single_grad = evaluate(model, params.astype("f4"), Batch(batch.x.astype("f4"), batch.y))
    assert single_grad.dtype == np.float32
    assert single_sums.loss == pytest.approx(sums.loss, rel=1e-6)
    np.testing.assert_allclose(single_grad, grad, rtol=1e-5, atol=1e-5)
    double, single = (model.initial(np.random.default_rng(3), np.dtype(dtype)) for dtype in ("f8", "f4"))
    assert single.dtype == np.float32
    np.testing.assert_array_equal(single, double.astype("f4"))


@pytest.mark.parametrize("dtype", ["f4", "f8"])
@pytest.mark.parametrize("name", ["softmax", "logistic", "svm"])
def test_confident_models_neither_overflow_nor_change_their_input(name, dtype):
    """Scores of 2e6 and -2e6, the first sample right and the second wrong by all of that; warnings are errors here."""
    model = MODELS[name](2, 2, ())
    params = np.array([100, -100, -100, 100, 0, 0] if name == "softmax" else [-100, 100, 0], dtype)
    x, y = np.array([[1e4, -1e4], [-1e4, 1e4]], dtype), np.array([0, 0])
    before, params_before = x.copy(), params.copy()
    sums, grad = evaluate(model, params, Batch(x, y))
    assert sums == (pytest.approx(4e6 if name == "softmax" else 2e6, rel=1e-6), 1)
    np.testing.assert_array_equal(model.predict(params, x), [0, 1])
    wrong = np.outer([-1e4, 1e4], [-1, 1] if name == "softmax" else [1])  # of the second sample alone
    np.testing.assert_array_equal(grad, [*wrong.ravel(), *([-1, 1] if name == "softmax" else [1])])
    np.testing.assert_array_equal(x, before)
    np.testing.assert_array_equal(params, params_before)


@every_model
def test_nan_is_not_hidden(name, classes, hidden):
    model, params, batch = example(name, classes, hidden)
    params[-1] = np.nan  # the last bias
    with np.errstate(invalid="ignore"):  # as the training loop does
        assert np.isnan(evaluate(model, params, batch)[0].loss)


def test_losses_by_hand():
    """One feature, weight 1 and bias 0, so that the sample is the score."""
    score = np.array([[0.5], [0.5], [3.0]])
    y = np.array([1, 0, 1])
    logistic = np.log1p(np.exp([-0.5, 0.5, -3])).sum()
    assert evaluate(MODELS["logistic"](1, 2, ()), np.array([1.0, 0]), Batch(score, y))[0] == (
        pytest.approx(logistic),
        2,
    )
    sums, grad = evaluate(MODELS["svm"](1, 2, ()), np.array([1.0, 0]), Batch(score, y))
    assert sums == (0.5 + 1.5 + 0, 2)
    np.testing.assert_array_equal(grad, [-0.5 + 0.5, -1 + 1])  # the last is beyond its margin
    both = np.array([1.0, -1, 0, 0])  # softmax of (s, -s) for classes 0, 1: log odds of class 0 are 2 s
    softmax = np.log1p(np.exp([1, -1, 6])).sum()
    assert evaluate(MODELS["softmax"](1, 2, ()), both, Batch(score, y))[0] == (pytest.approx(softmax), 1)


def test_hinge_has_subgradient_0_at_the_kink():
    model, kink = MODELS["svm"](1, 2, ()), np.array([[1.0], [-1.0]])
    sums, grad = evaluate(model, np.array([1.0, 0]), Batch(kink, np.array([1, 0])))
    assert sums == (0, 2)
    np.testing.assert_array_equal(grad, [0, 0])
    _, grad = evaluate(model, np.array([np.nextafter(1, 0), 0]), Batch(kink[:1], np.array([1])))
    np.testing.assert_array_equal(grad, [-1, -1])


def test_svm_of_three_classes_is_three_svms_of_two():
    model, params, batch = example("svm", 3, ())
    sums, grad = evaluate(model, params, batch)
    one, tensors, grads = MODELS["svm"](5, 2, ()), model.tensors(params), model.tensors(grad)
    losses = []
    for n in range(3):
        alone = np.append(tensors["layer0.weight"][:, n], tensors["layer0.bias"][n])
        against_all, alone_grad = evaluate(one, alone, Batch(batch.x, np.int64(batch.y == n)))
        losses.append(against_all.loss)
        part = np.append(grads["layer0.weight"][:, n], grads["layer0.bias"][n])
        np.testing.assert_allclose(part, alone_grad, rtol=1e-12, atol=1e-12)
    assert sums.loss == pytest.approx(sum(losses), rel=1e-12)
    scores = batch.x @ tensors["layer0.weight"] + tensors["layer0.bias"]
    np.testing.assert_array_equal(model.predict(params, batch.x), scores.argmax(axis=1))


def test_scores_of_zero_are_class_0():
    for name in ("softmax", "logistic", "svm"):
        model = MODELS[name](2, 2, ())
        sums, _ = evaluate(model, np.zeros(model.size), Batch(np.ones((3, 2)), np.array([0, 1, 0])))
        assert sums.correct == 2
        assert model.predict(np.zeros(model.size), np.ones((3, 2))).tolist() == [0, 0, 0]


@every_model
def test_tensors_are_views_that_cover_the_vector(name, classes, hidden):
    model, params, _ = example(name, classes, hidden)
    tensors = model.tensors(params)
    layers = len(hidden) + 1
    assert list(tensors) == [f"layer{n}.{part}" for n in range(layers) for part in ("weight", "bias")]
    assert tensors["layer0.weight"].shape == (5, model.sizes[1])
    assert sum(tensor.size for tensor in tensors.values()) == model.size
    for value, tensor in enumerate(tensors.values()):
        tensor[:] = value
    np.testing.assert_array_equal(params, np.repeat(np.arange(2 * layers), [t.size for t in tensors.values()]))


def test_sizes():
    assert MODELS["mlp"](5, 3, ()).sizes == (5, 256, 3)
    assert MODELS["mlp"](5, 1, (4, 6)).sizes == (5, 4, 6, 2)
    assert MODELS["softmax"](5, 1, ()).sizes == (5, 2)  # data of one class
    assert [MODELS["svm"](5, classes, ()).sizes[-1] for classes in (1, 2, 3)] == [1, 1, 3]
    assert MODELS["logistic"](5, 1, ()).size == 6


def test_what_a_model_is_not_for_is_refused():
    with pytest.raises(UserError, match=r"model 'logistic' is for two classes, and the data have 3; take softmax, svm"):
        MODELS["logistic"](5, 3, ())
    for name in ("softmax", "logistic", "svm"):
        with pytest.raises(UserError, match=f"model '{name}' has no hidden layers, and got widths for 2; take mlp"):
            MODELS[name](5, 2, (4, 4))
    with pytest.raises(UserError, match="model 'mlp' got hidden widths 8, 0; expected at least 1 each"):
        MODELS["mlp"](5, 2, (8, 0))


@every_model
def test_plain_descent_learns(name, classes, hidden):
    """Three (or two) clouds in 5 dimensions; sparse, as these models must take them."""
    model, rng = MODELS[name](5, classes, hidden), np.random.default_rng(1)
    y = rng.integers(classes, size=60)
    batch = Batch(csr_array(rng.normal(size=(60, 5)) * 0.3 + np.eye(5)[y] * 2), y)
    params = model.initial(rng, np.dtype("f8"))
    for _ in range(100):
        sums, grad = evaluate(model, params, batch)
        params -= 0.3 / 60 * grad
    assert sums.correct >= 58
