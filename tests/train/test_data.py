"""Data sets as one process loads them."""

import re

import numpy as np
import pytest
from mpi4py import MPI

from datafiles import BAD, FORMATS, dense, samples, write
from mpicoll import UserError
from mpicoll.train import readers
from mpicoll.train.data import from_arrays, load, untrained

F8 = np.dtype("f8")


@pytest.mark.parametrize("kind", ["csv", "svm", "npz"])
def test_a_test_set_of_its_own(tmp_path, kind):
    """Sparse: it has fewer features than the training set, or more."""
    x, y = samples(10)
    train, test = write(kind, tmp_path, x, y), write(kind, tmp_path, x[:4], y[:4], "test")
    data = load(train, MPI.COMM_SELF, F8, test=test)
    assert (data.train.total, data.test.total) == (10, 4)
    np.testing.assert_array_equal(dense(data.test.x), dense(data.train.x)[:4])
    np.testing.assert_array_equal(data.test.y, y[:4])
    if kind == "svm":
        for features in (3, 9):
            (tmp_path / "other.svm").write_text(f"0 {features}:7\n")
            data = load(train, MPI.COMM_SELF, F8, test=str(tmp_path / "other.svm"))
            assert data.train.x.shape[1] == data.test.x.shape[1] == data.features == max(features, 5)
            assert data.test.x[0, features - 1] == 7


@pytest.mark.parametrize("shards", [False, True])
def test_classes_that_training_never_sees_are_told(tmp_path, shards):
    np.savez(tmp_path / "d.npz", X=np.eye(9), y=[0, 2, 4] * 3, X_test=np.eye(9), y_test=[0, 1, 2] * 3)
    data = load(str(tmp_path / "d.npz"), MPI.COMM_SELF, F8, shards=shards)
    assert untrained(data, MPI.COMM_SELF) == [1, 3]
    assert untrained(load("digits", MPI.COMM_SELF, F8, shards=shards), MPI.COMM_SELF) == []


def test_a_share_for_testing_is_for_data_without_a_test_set(tmp_path):
    x, y = samples(10)
    np.savez(tmp_path / "both.npz", X=x, y=y, X_test=x, y_test=y)
    train, test = (write("csv", tmp_path, x, y, name) for name in ("train", "test"))
    with pytest.raises(UserError, match=r"both\.npz' brings a test set of its own: leave out --test-share"):
        load(str(tmp_path / "both.npz"), MPI.COMM_SELF, F8, test_share=0.2)
    with pytest.raises(UserError, match=r"test\.csv' is the test set: leave out --test-share"):
        load(train, MPI.COMM_SELF, F8, test=test, test_share=0.2)


def test_test_sets_of_another_kind_are_refused(tmp_path):
    x, y = samples(10)
    files = {kind: write(kind, tmp_path, x, y) for kind in FORMATS}
    np.savez(tmp_path / "both.npz", X=x, y=y, X_test=x, y_test=y)
    both = str(tmp_path / "both.npz")
    for train, test, message in [
        (files["csv"], files["svm"], "data.svm' is not of the same kind as '.*data.csv'"),
        (files["csv"], files["npz"], "data.npz' is not of the same kind as '.*data.csv'"),
        (both, files["npz"], "both.npz' brings a test set of its own: leave out '.*data.npz'"),
        (files["npz"], both, "both.npz' brings a test set of its own; expected a file that holds one"),
        ("digits", "digits", "'digits' cannot be the test set of 'digits': expected a file of other samples"),
        ("powerlaw:20x9", "powerlaw:10x9", "'powerlaw:10x9' cannot be the test set of 'powerlaw:20x9'"),
        (files["csv"], "gone.csv", "data file 'gone.csv' does not exist"),
    ]:
        for shards in (False, True):
            with pytest.raises(UserError, match=message):
                load(train, MPI.COMM_SELF, F8, test=test, shards=shards)


@pytest.mark.parametrize("message", BAD)
def test_bad_data_are_told_in_one_line(tmp_path, message):
    source = BAD[message](tmp_path)
    for shards in (False, True):
        with pytest.raises(UserError) as caught:
            load(source, MPI.COMM_SELF, np.dtype("f4"), shards=shards)
        assert re.search(message, str(caught.value)), caught.value
        assert "\n" not in str(caught.value)


def test_data_sets_say_what_they_are(tmp_path):
    assert repr(load("digits", MPI.COMM_SELF, np.dtype("f4"), validation=0.1)) == (
        "<Dataset 'digits': 1295 training, 143 validation and 359 test samples; 64 features, 10 classes, float32>"
    )
    sharded = load("powerlaw:100x40:3", MPI.COMM_SELF, F8, shards=True)
    assert repr(sharded) == (
        "<Dataset 'powerlaw:100x40:3': 80 training, 0 validation and 20 test samples, in 1 shards, here 80, 0 and 20; "
        "40 features, 2 classes, float64>"
    )
    assert repr(sharded.train) == "<Part: 80 of 80 samples, sparse (80, 40) float64>"
    arrays = from_arrays(np.eye(3), np.arange(3), test=1)
    assert repr(arrays).startswith("<Dataset 'arrays': 2 training, 0 validation and 1 test samples; 3 features, 3 cl")
    assert repr(arrays.test) == "<Part: 1 of 1 samples, dense (1, 3) float64>"
    path = write("csv", tmp_path, *samples(20))
    assert repr(readers.read(path)) == "<Raw: x (20, 5) float64, y (20,) <U1>"
