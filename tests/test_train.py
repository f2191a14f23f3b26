"""The parts of training that one process can show."""

import numpy as np
import pytest
from safetensors import SafetensorError

from mpicoll import UserError
from mpicoll.train import files
from mpicoll.train.data import Scaling, read
from mpicoll.train.files import check_output, read_model, write_run
from mpicoll.train.models import MODELS


def test_scaling_makes_features_alike_and_leaves_constant_ones_alone():
    x = np.array([[0, 5, 1e6], [4, 5, 3e6], [2, 5, 2e6]])
    np.testing.assert_allclose(Scaling.fit(x).apply(x, np.dtype("f8")), [[-1, 0, -1], [1, 0, 1], [0, 0, 0]])
    long = np.array([[0], [2]], "g")
    assert {array.dtype for array in Scaling.fit(long)} == {np.dtype("f8")}
    small = np.array([[-128, 0], [127, 1]], "i1")  # must not overflow in the arithmetic of its own dtype
    np.testing.assert_allclose(Scaling.fit(small).apply(small, np.dtype("f8")), [[-1, -1], [1, 1]])


def test_the_digits_are_the_published_ones():
    x, y, x_test, _ = read("digits")
    assert (x.shape, x_test) == ((1797, 64), None)
    assert y is not None
    np.testing.assert_array_equal(np.bincount(y), [178, 182, 177, 183, 181, 182, 181, 179, 174, 180])


def test_samples_of_any_shape_and_labels_in_a_column(tmp_path):
    np.savez(tmp_path / "d.npz", X=np.arange(24, dtype="u1").reshape(3, 2, 4), y=np.array([[0.0], [1], [2]]))
    x, y, _, _ = read(str(tmp_path / "d.npz"))
    assert x.shape == (3, 8)
    assert y is not None
    assert (y.tolist(), y.dtype) == ([0, 1, 2], np.int64)


@pytest.mark.parametrize(
    ("name", "classes", "hidden"),
    [("mlp", 3, (5,)), ("mlp", 3, (5, 6)), ("softmax", 3, ()), ("logistic", 2, ()), ("svm", 2, ()), ("svm", 3, ())],
)
def test_a_model_comes_back_as_it_was_written(tmp_path, name, classes, hidden):
    model = MODELS[name](4, classes, hidden)
    params = np.random.default_rng(0).normal(size=model.size).astype("f4")
    scaling = Scaling(np.arange(4.0), np.arange(1.0, 5.0))
    write_run(tmp_path / "a" / "run", name, model, params, scaling, {"loss": 1.5}, [{"epoch": 1}])
    back, back_params, back_scaling = read_model(tmp_path / "a" / "run")
    assert back.sizes == model.sizes
    x = np.random.default_rng(1).normal(size=(20, 4))
    np.testing.assert_array_equal(back.predict(params, x), model.predict(params, x))
    np.testing.assert_array_equal(back_params, params)
    assert back_params.dtype == params.dtype
    np.testing.assert_array_equal(back_scaling, scaling)


def test_a_model_of_another_kind_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "FORMAT", "mpicoll-model-99")
    model = MODELS["softmax"](2, 2, ())
    write_run(tmp_path / "run", "softmax", model, np.zeros(model.size), Scaling(np.zeros(2), np.ones(2)), {}, [])
    monkeypatch.undo()
    with pytest.raises(UserError, match="has format 'mpicoll-model-99'; expected 'mpicoll-model-1'"):
        read_model(tmp_path / "run")


def test_a_run_is_written_whole_or_not_at_all(tmp_path):
    model, scaling = MODELS["softmax"](2, 2, ()), Scaling(np.zeros(2), np.ones(2))
    with pytest.raises(TypeError):  # the summary, written last, cannot be written as JSON
        write_run(tmp_path / "run", "softmax", model, np.zeros(model.size), scaling, {"x": {1}}, [])
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "empty").mkdir()
    check_output(tmp_path / "empty")
    write_run(tmp_path / "empty", "softmax", model, np.zeros(model.size), scaling, {}, [])
    with pytest.raises(UserError, match="already holds files"):
        check_output(tmp_path / "empty")
    check_output(tmp_path / "new" / "deeper" / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


@pytest.mark.parametrize("error", [SafetensorError("No space left on device"), OSError(28, "No space left on device")])
def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, monkeypatch, error):
    def full(*arguments: object) -> None:
        raise error

    monkeypatch.setattr("safetensors.numpy.save_file", full)
    model, scaling = MODELS["softmax"](2, 2, ()), Scaling(np.zeros(2), np.ones(2))
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "run", tmp_path / "empty"):
        with pytest.raises(UserError, match=r"cannot be written .No space left on device.; name another one"):
            write_run(folder, "softmax", model, np.zeros(model.size), scaling, {}, [])
    assert list(tmp_path.rglob("*")) == [tmp_path / "empty"]
