"""What a second file means: its columns and labels are those of the training set."""

from pathlib import Path

import numpy as np
import pytest
from mpi4py import MPI

from mpicoll import UserError
from mpicoll.train.data import load

F8 = np.dtype("f8")


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        ("a,label\n1,0\n2,1\n", "a,label\n1,0\n2,7\n", "the test set has the label 7, '.*train.csv' only 0, 1"),
        ("a,label\n1,x\n2,z\n", "a,label\n1,x\n2,y\n", "the test set has the label y, '.*train.csv' only x, z"),
        ("a,label\n1,0\n2,1\n", "a,label\n1,0\n2,one\n", "the test set has the label one, '.*train.csv' only 0, 1"),
        ("a,label\n1,0\n2,1\n", "a,b,label\n1,0,0\n", "test.csv' has a column 'b'; expected those of the tr.*: a$"),
        ("1,0\n2,1\n", "1,0,0\n", "test.csv' has 3 columns; the model was trained on 1 features: expected as many"),
        ("1,0\n2,1\n", "1\n2\n", "test.csv' has no labels: training needs a label for each sample"),
        ("1,0\n2,1\n", "1,\n2,\n", "test.csv' has no labels: training needs a label for each sample"),
        ("1,0\n2,1\n", "1,\n2,0\n", "test.csv', line 1: '' in column 2; expected a label"),
        ("a,label\n1,0\n", "a,label,a\n1,0,2\n", r"test.csv' has a column 'a' twice .columns 1 and 3.: name each"),
        ("b,label\n1,0\n", "a,label,a\n1,0,2\n", "test.csv' has a column 'a' twice"),
    ],
)
def test_a_test_set_that_does_not_fit(tmp_path, train, test, message):
    (tmp_path / "train.csv").write_text(train)
    (tmp_path / "test.csv").write_text(test)
    with pytest.raises(UserError, match=message):
        load(str(tmp_path / "train.csv"), MPI.COMM_SELF, F8, test=str(tmp_path / "test.csv"))


SPARSE_TESTS: dict[str, tuple[str, str, str | int]] = {
    "from 1, and a test set from 0": ("0 1:1 2:1\n1 3:1\n", "0 0:1 1:1\n1 2:1\n", "has a column 0; in the training"),
    "from 0, and a test set from 1": (
        "0 0:1 1:1\n1 2:1\n",
        "0 1:1 2:1\n1 3:1\n",
        "has 4 features and no column 0; the training set has 3, and columns were counted from 0",
    ),
    "from 0, and a test set from 1 that is narrow": ("0 0:1 1:1\n1 2:1\n", "0 1:1\n1 2:1\n", 3),
    "from 0, and a wider test set": ("0 0:1 1:1\n1 2:1\n", "0 0:1\n1 4:1\n", 5),
    "from 1, and a wider test set": ("0 1:1\n1 3:1\n", "0 4:1\n1 2:1\n", 4),
    "from 1, and an empty test set": ("0 1:1\n1 3:1\n", "0\n1\n", 3),
    "labels": ("-1 1:1\n1 3:1\n", "0 1:1\n", "the test set has the label 0, '.*train.svm' only -1, 1"),
    "labels with a point": ("-1 1:1\n1.5 3:1\n", "2 1:1\n", "the test set has the label 2, '.*train.svm' only -1, 1.5"),
}


@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("case", SPARSE_TESTS)
def test_a_sparse_test_set_goes_by_the_training_set(tmp_path, case, shards):
    train, test, told = SPARSE_TESTS[case]
    names = [str(tmp_path / "train.svm"), str(tmp_path / "test.svm")]
    for name, text in zip(names, (train, test), strict=True):
        Path(name).write_text(text)
    if isinstance(told, str):
        with pytest.raises(UserError, match=told):
            load(names[0], MPI.COMM_SELF, F8, test=names[1], shards=shards)
    else:
        assert load(names[0], MPI.COMM_SELF, F8, test=names[1], shards=shards).features == told
