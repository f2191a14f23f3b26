"""Files of the svmlight format: labels, columns and numbers."""

import re

import numpy as np
import pytest

from datafiles import dense, samples, svm
from mpicoll import UserError
from mpicoll.train.data import read
from mpicoll.train.readers.raw import Schema


def test_labels_of_svmlight_files_are_numbers(tmp_path):
    """The format says so: what is equal as a number is one class."""
    for texts, labels in [
        (["+1", "1", "-1", "01", "1e0", "-1.0"], [-1, 1]),
        (["2.50", "2.5", "7", "-0"], [0, 2.5, 7]),
    ]:
        (tmp_path / "data.svm").write_text("".join(f"{text} 1:1\n" for text in texts))
        raw, found = read(str(tmp_path / "data.svm"))
        assert found is not None
        assert raw.y is not None
        assert found.tolist() == labels
        assert found[raw.y].tolist() == [float(text) for text in texts]


@pytest.mark.parametrize(("first", "columns"), [(1, 5), (0, 5)])
def test_svm_counts_from_1_unless_there_is_a_0(tmp_path, first, columns):
    x, y = samples(8)
    (tmp_path / "data.svm").write_text(
        "# two lines that hold\n\n" + svm(x, 2 * y - 1, first=first) + "1 qid:7 # none\n"
    )
    raw, labels = read(str(tmp_path / "data.svm"))
    np.testing.assert_array_equal(dense(raw.x), [*x, [0] * columns])
    assert labels is not None
    assert labels.tolist() == [-1, 1, 3]
    wider, _ = read(str(tmp_path / "data.svm"), Schema(7, np.array([-1, 1, 3]), base=first))
    assert wider.x.shape == (9, 7)


@pytest.mark.parametrize(
    "line",
    [
        "1 1:1_0", "1_0 1:1", "1 1_0:2", "1 1:0x1", "1 +1:2", "1 1:1__0", "1 1:.", "1 1:1e", "1 1:1e1_0", "1 1:1 2",
        "1 1:\u0661", "\u0661 1:1", "1,1:1",
    ],
)  # fmt: skip
def test_numbers_of_svmlight_files_are_decimal_and_ascii(tmp_path, line):
    good = "-.5e-1 qid:7 1:1 2:+2. 30:1E+2 # 1_0\n#1_0\n\n"
    (tmp_path / "data.svm").write_text(good + "1 1:1\n" + line + "\n", encoding="utf-8")
    with pytest.raises(UserError, match=re.escape(f"line 5: {line!r}; expected 'label index:value")):
        read(str(tmp_path / "data.svm"))
    (tmp_path / "data.svm").write_text(good)
    raw, labels = read(str(tmp_path / "data.svm"))
    assert labels is not None
    assert (labels.tolist(), dense(raw.x).sum()) == ([-0.05], 103)
