"""Labels: which text is which class."""

import warnings

import numpy as np
import pytest
from mpi4py import MPI

from datafiles import LABELS, labelled
from mpicoll.train.data import load, read
from mpicoll.train.readers.raw import Schema

F8 = np.dtype("f8")


def test_labels_are_looked_up_among_those_of_a_model(tmp_path):
    for text, known, classes in [
        ("1,9+\n2,10\n3,8\n", np.array(["10", "9+"]), [1, 0, -1]),
        ("1,10\n2,10\n", np.array(["10", "9+"]), [0, 0]),
        ("1,10\n2,1\n3,x\n4,+1\n5,1.0\n", np.array([-1, 1, 10]), [2, 1, -1, -1, -1]),
        ("1,10\n2,1.5\n3,1.50\n", np.array([-1, 1.5, 10]), [2, 1, -1]),
    ]:
        (tmp_path / "data.csv").write_text(text)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            raw, labels = read(str(tmp_path / "data.csv"), Schema(1, known))
        assert raw.y is not None
        assert raw.y.tolist() == classes
        assert labels is known
        assert len(told) == (-1 in classes)
    (tmp_path / "data.svm").write_text("+1 1:1\n0 1:1\n")
    with pytest.warns(RuntimeWarning, match="1 of 2 labels are none that the model knows, and count as wrong"):
        raw, _ = read(str(tmp_path / "data.svm"), Schema(3, np.array([-1, 1]), base=1))
    assert raw.y is not None
    assert (raw.y.tolist(), raw.x.shape) == ([1, -1], (2, 3))


@pytest.mark.parametrize("name", LABELS)
def test_two_texts_are_two_classes_and_come_back_as_they_were(tmp_path, name):
    texts, labels = LABELS[name]
    source = labelled(tmp_path / "data.csv", texts)
    raw, found = read(source)
    assert found is not None
    assert raw.y is not None
    assert found.tolist() == labels
    assert [str(label) for label in found[raw.y]] == 3 * texts
    data = load(source, MPI.COMM_SELF, F8, shards=True)
    assert data.labels.tolist() == labels
