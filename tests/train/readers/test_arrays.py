"""Arrays: of .npz, .npy and IDX files, and the digits."""

import numpy as np
import pytest
from mpi4py import MPI

from datafiles import idx, samples
from mpicoll import UserError
from mpicoll.train import readers
from mpicoll.train.data import load, read


@pytest.mark.parametrize("kind", ["npy", "idx"])
def test_a_rank_touches_no_row_but_its_own(tmp_path, kind):
    """The rows of others are not finite, and their labels no classes."""
    x, y = samples(10)
    folder, ranks = tmp_path / kind, 3
    folder.mkdir()
    for rank in range(ranks):
        own = slice(10 * rank // ranks, 10 * (rank + 1) // ranks)
        torn_x, torn_y = np.full(x.shape, np.nan, "f4"), np.full(y.shape, -1, "i1")
        torn_x[own], torn_y[own] = x[own], y[own]
        if kind == "npy":
            np.save(folder / "X.npy", torn_x)
            np.save(folder / "y.npy", torn_y)
        else:
            (folder / "train-images-idx3-ubyte").write_bytes(idx(torn_x))
            (folder / "train-labels-idx1-ubyte").write_bytes(idx(torn_y))
        found = readers.read(str(folder), rank, ranks)
        np.testing.assert_array_equal(found.x, x[own])
        np.testing.assert_array_equal(found.y, y[own])
    with pytest.raises(UserError, match="X holds nan at sample 0"):
        readers.read(str(folder))


F8 = np.dtype("f8")


@pytest.mark.parametrize("dtype", ["u1", "i1", "i2", "i4", "f4", "f8"])
def test_idx_of_every_type_with_a_test_set(tmp_path, dtype):
    x, y = samples(6)
    x = (x - (dtype != "u1")).clip(-128, 127).astype(dtype)
    for name, array in (("train", x.reshape(6, 5, 1)), ("t10k", x[:2].reshape(2, 1, 5))):
        (tmp_path / f"{name}-images-idx3-ubyte").write_bytes(idx(array))
        (tmp_path / f"{name}-labels-idx1-ubyte").write_bytes(idx(y[: len(array)].astype("i4")))
    raw = readers.read(str(tmp_path))
    np.testing.assert_array_equal(raw.x, x)
    np.testing.assert_array_equal(raw.x_test, x[:2])
    np.testing.assert_array_equal(raw.y_test, y[:2])
    assert raw.x.dtype == np.dtype(dtype)
    data = load(str(tmp_path), MPI.COMM_SELF, F8)
    assert (data.train.total, data.test.total, data.features) == (6, 2, 5)


def test_the_digits_are_the_published_ones():
    raw, _ = read("digits")
    assert (raw.x.shape, raw.x_test) == ((1797, 64), None)
    assert raw.y is not None
    np.testing.assert_array_equal(np.bincount(raw.y), [178, 182, 177, 183, 181, 182, 181, 179, 174, 180])
    from sklearn.datasets import load_digits  # whose file we read by ourselves, which takes less time

    for found, published in zip((raw.x, raw.y), load_digits(return_X_y=True), strict=True):
        np.testing.assert_array_equal(found, published)


def test_samples_of_any_shape_and_labels_in_a_column(tmp_path):
    np.savez(tmp_path / "d.npz", X=np.arange(24, dtype="u1").reshape(3, 2, 4), y=np.array([[0.0], [1], [2]]))
    raw, _ = read(str(tmp_path / "d.npz"))
    assert raw.x.shape == (3, 8)
    assert raw.y is not None
    assert (raw.y.tolist(), raw.y.dtype) == ([0, 1, 2], np.int64)


def test_predictions_need_no_labels(tmp_path):
    np.savez(tmp_path / "d.npz", X=np.eye(3))
    raw, labels = read(str(tmp_path / "d.npz"))
    assert (raw.y, labels) == (None, None)
