"""CSV files: delimiters, headers, columns and labels."""

import numpy as np
import pytest
from mpi4py import MPI

from datafiles import dense, labelled
from mpicoll import UserError
from mpicoll.train.data import load, read

F8 = np.dtype("f8")


@pytest.mark.parametrize(
    ("text", "x", "labels"),
    [
        ("1,2,0\n3,4,1\n", [[1, 2], [3, 4]], [0, 1]),
        ("w;h;c\n1;2;a\n3;4;b\n", [[1, 2], [3, 4]], ["a", "b"]),
        ("Class\tw\th\nb\t1\t2\na\t3\t4\n", [[3, 4], [1, 2]], ["a", "b"]),
        ("w,LABEL,h\n1,-1,2\n3,1,4\n", [[1, 2], [3, 4]], [-1, 1]),
        ("w,LABEL,h\n3,+1,4\n1,-1,2\n", [[1, 2], [3, 4]], ["-1", "+1"]),
        ("7,8,target\n1,2,1.5\n3,4,10\n", [[1, 2], [3, 4]], ["1.5", "10"]),
        ("\ufeffa,y\n1e2,9\n-.5,10\n", [[100], [-0.5]], [9, 10]),
        ("\ufeff1,9\n2,10\n", [[1], [2]], [9, 10]),
        ('"1","a, or b"\n" 2 ",c\n', [[1], [2]], ["a, or b", "c"]),
        ("1,x#1\n2,x#2\n", [[1], [2]], ["x#1", "x#2"]),
        ("1,10\n2,9+\n", [[1], [2]], ["10", "9+"]),
        ("1,\xfc\n2,z\n", [[2], [1]], ["z", "\xfc"]),
    ],
)
def test_csv_in_many_forms(tmp_path, text, x, labels):
    """``x`` in the order of the labels, which is the order of the classes."""
    (tmp_path / "data.csv").write_text(text, encoding="utf-8")
    raw, found = read(str(tmp_path / "data.csv"))
    assert found is not None
    assert raw.y is not None
    assert found.tolist() == labels
    np.testing.assert_array_equal(dense(raw.x)[np.argsort(raw.y)], x)


@pytest.mark.parametrize("text", ["", " ", "nan", "NaN", "-nan", "INF", "+Infinity", "a\0"])
def test_what_is_no_label(tmp_path, text):
    source = labelled(tmp_path / "data.csv", ["a", text, "b"])
    with pytest.raises(UserError, match=r"line 3: .* in column 'label'; expected a label"):
        read(source)


@pytest.mark.parametrize(
    ("text", "layout"),
    [
        ("0,1,species\n1,2,a\n3,4,b\n", None),
        ("1,2,a\n3,4,b\n", "labels: column 3 of 3; line 1 is a sample"),
        ("w,h,species\n1,2,a\n3,4,b\n", "labels: column 3 of 3, 'species'; line 1 is a header"),
        ("w,class,h\n1,a,2\n3,b,4\n", "labels: column 2 of 3, 'class'; line 1 is a header"),
        ("1,y,3\n1,a,2\n3,b,4\n", "labels: column 2 of 3, 'y'; line 1 is a header"),
    ],
)
def test_it_is_told_where_labels_of_a_csv_file_are(tmp_path, text, layout):
    (tmp_path / "data.csv").write_text(text)
    data = load(str(tmp_path / "data.csv"), MPI.COMM_SELF, F8)
    assert data.layout == (layout or "labels: column 3 of 3; line 1 is a sample")
