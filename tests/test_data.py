"""Data as one process sees them: formats, shares cut by hand, the split, batches."""

import bz2
import gzip
import io
import re
import struct
import warnings
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from mpi4py import MPI

from datafiles import BAD, FORMATS, LABELS, SPARSE, csv, idx, labelled, samples, svm, write
from mpicoll import UserError
from mpicoll.train import readers
from mpicoll.train.batches import Batches, normalized, rebalanced
from mpicoll.train.data import Dataset, Part, from_arrays, load, read, untrained
from mpicoll.train.holdout import held_out
from mpicoll.train.readers import divisible
from mpicoll.train.readers.raw import Raw, Schema
from mpicoll.train.scaling import Scaling

F8 = np.dtype("f8")


def dense(x):
    return x if isinstance(x, np.ndarray) else x.toarray()


def together(shares: list[Raw], features: int) -> tuple[np.ndarray, np.ndarray]:
    """All shares as one; those of sparse files have the columns that they need."""
    x = [np.pad(dense(raw.x), [(0, 0), (0, features - raw.x.shape[1])]) for raw in shares]
    return np.concatenate(x), np.concatenate([raw.y for raw in shares if raw.y is not None])


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_holds_the_same_samples(tmp_path, kind):
    x, y = samples(20)
    raw, labels = read(write(kind, tmp_path, x, y))
    np.testing.assert_array_equal(dense(raw.x), x)
    assert isinstance(raw.x, np.ndarray) is (kind not in SPARSE)
    assert raw.y is not None
    np.testing.assert_array_equal(raw.y, y)
    np.testing.assert_array_equal(labels, [0, 1, 2])
    assert (raw.y.dtype, raw.x_test, raw.verbatim) == (np.int64, None, False)
    assert (raw.columns, raw.label) == ((tuple("abcde"), "label") if kind.startswith("csv") else (None, None))
    assert raw.base == (1 if kind in SPARSE else None)


@pytest.mark.parametrize("kind", FORMATS)
def test_shares_together_are_the_whole(tmp_path, kind):
    """Lines of 12 to 50 bytes: among 200 shares are many in whose range no line begins."""
    x, y = samples(20)
    source = write(kind, tmp_path, x, y)
    assert divisible(source) is (kind in ("npy", "idx", "csv", "svm"))
    if not divisible(source):
        return
    whole = readers.read(source)
    expected, labels = together([whole], whole.x.shape[1])
    for ranks in (1, 2, 3, 4, 5, 7, 20, 23, 200):
        found, found_labels = together([readers.read(source, rank, ranks) for rank in range(ranks)], whole.x.shape[1])
        np.testing.assert_array_equal(found, expected)
        np.testing.assert_array_equal(found_labels, labels)


TEXTS = {
    "no newline at the end": lambda text: text.removesuffix("\n"),
    "CRLF": lambda text: text.replace("\n", "\r\n"),
    "CR": lambda text: text.replace("\n", "\r"),
    "blank lines": lambda text: text.replace("\n", "\n\n \n") + "\n\n",
}


@pytest.mark.parametrize("change", TEXTS)
@pytest.mark.parametrize("kind", ["csv", "svm"])
def test_lines_may_end_in_many_ways(tmp_path, kind, change):
    x, y = samples(9)
    path = tmp_path / f"data.{kind}"
    path.write_bytes(TEXTS[change](csv(x, y) if kind == "csv" else svm(x, y)).encode())
    whole = readers.read(str(path))
    assert len(dense(whole.x)) == 9
    for ranks in range(1, len(path.read_bytes()) + 2, 3):
        shares = [readers.read(str(path), rank, ranks) for rank in range(ranks)]
        for found, expected in zip(together(shares, 6), together([whole], 6), strict=True):
            np.testing.assert_array_equal(found, expected)


def garbage(path: Path, begin: int, end: int, keep: int = 0) -> None:
    """Everything but bytes ``begin`` to ``end`` becomes nonsense, but for the first ``keep`` bytes."""
    data = bytearray(path.read_bytes())
    for n in range(keep, len(data)):
        if not begin <= n < end:
            data[n] = 0xFF
    path.write_bytes(data)


@pytest.mark.parametrize("kind", ["csv", "svm"])
def test_a_rank_parses_no_line_but_its_own(tmp_path, kind):
    """What is not its own would not be read as numbers; of the line before, it looks for the end."""
    x, y = samples(40)
    source = write(kind, tmp_path, x, y)
    path, ranks = Path(source), 3
    whole = path.read_bytes()
    head = whole.index(b"\n") + 1 if kind == "csv" else 0
    begins = [0, *(n + 1 for n in range(len(whole)) if whole[n : n + 1] == b"\n")]
    for rank in range(ranks):
        expected = readers.read(source, rank, ranks)
        begin, end = (min(at for at in begins if at >= len(whole) * n // ranks) for n in (rank, rank + 1))
        garbage(path, max(begin - 1, 0), end, keep=head)
        found = readers.read(source, rank, ranks)
        path.write_bytes(whole)
        np.testing.assert_array_equal(dense(found.x), dense(expected.x))
        np.testing.assert_array_equal(found.y, expected.y)
        assert len(dense(found.x)) in range(8, 20)


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


def test_a_line_belongs_to_the_range_that_it_begins_in(tmp_path):
    (tmp_path / "data.svm").write_text("".join(f"{n} 1:1\n" for n in range(9)))
    labels = [readers.read(str(tmp_path / "data.svm"), rank, 3).y for rank in range(3)]
    np.testing.assert_array_equal(labels, [[0, 1, 2], [3, 4, 5], [6, 7, 8]])


def npy_header(*shape: int) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "|i1", "fortran_order": False, "shape": shape})
    return file.getvalue()


@pytest.mark.parametrize("kind", ["npy", "idx", "csv", "svm"])
def test_of_a_file_too_large_for_any_memory_a_share_is_read(tmp_path, kind):
    """Files of 2^40 bytes, with holes, of which one share in 2^28 is there."""
    rank, ranks = 2**27 + 1, 2**28
    try:
        with open(tmp_path / "probe", "wb") as file:
            file.truncate(2**40)
    except OSError as error:
        pytest.skip(f"the file system refuses a file of 2^40 bytes: {error.strerror}")
    if kind in ("csv", "svm"):
        path = tmp_path / f"data.{kind}"
        with open(path, "wb") as file:
            file.truncate(2**40)
            file.write(b"1,1.000\n")
            file.seek(rank * 2**12 - 1)
            file.write(b"\n" + (b"2,7.000\n" if kind == "csv" else b"7 1:2.0\n") * 2**9)
        raw = readers.read(str(path), rank, ranks)
        assert raw.y is not None
        assert len(raw.y) == 2**9
        assert {float(label) for label in raw.y} == {7}
        assert raw.x.sum() == 2**10
        return
    if kind == "npy":
        files = [tmp_path / "X.npy", tmp_path / "y.npy"]
        headers = [npy_header(2**30, 2**10), npy_header(2**30)]
    else:
        files = [tmp_path / "train-images-idx3-ubyte", tmp_path / "train-labels-idx1-ubyte"]
        headers = [b"\0\0\x08\2" + struct.pack(">2I", 2**30, 2**10), b"\0\0\x08\1" + struct.pack(">I", 2**30)]
    for path, header, size in zip(files, headers, (2**10, 1), strict=True):
        with open(path, "wb") as file:
            file.write(header)
            file.truncate(len(header) + 2**30 * size)
            file.seek(len(header) + 4 * rank * size)
            file.write(b"\3" * 4 * size)
    raw = readers.read(str(tmp_path), rank, ranks)
    np.testing.assert_array_equal(raw.x, np.full((4, 2**10), 3))
    np.testing.assert_array_equal(raw.y, [3, 3, 3, 3])


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


def test_fashion_mnist_is_debians(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "FASHION_MNIST", tmp_path / "gone")
    with pytest.raises(UserError, match="install Debian's package dataset-fashion-mnist, or name a folder"):
        read("fashion-mnist")
    x, y = samples(7)
    monkeypatch.setattr(readers, "FASHION_MNIST", Path(write("idx.gz", tmp_path, x, y)))
    raw, _ = read("fashion-mnist")
    np.testing.assert_array_equal(raw.x, x)


@pytest.mark.skipif(not readers.FASHION_MNIST.is_dir(), reason="package dataset-fashion-mnist is not installed")
def test_fashion_mnist_is_the_published_one():
    raw, _ = read("fashion-mnist")
    assert raw.y is not None
    assert raw.y_test is not None
    np.testing.assert_array_equal(np.bincount(raw.y), [6000] * 10)
    np.testing.assert_array_equal(np.bincount(raw.y_test), [1000] * 10)
    assert raw.x.shape == (60_000, 784)
    assert raw.x.mean() == pytest.approx(72.94, abs=0.01)  # of 255; published as 0.2860


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


@pytest.mark.parametrize("text", ["", " ", "nan", "NaN", "-nan", "INF", "+Infinity", "a\0"])
def test_what_is_no_label(tmp_path, text):
    source = labelled(tmp_path / "data.csv", ["a", text, "b"])
    with pytest.raises(UserError, match=r"line 3: .* in column 'label'; expected a label"):
        read(source)


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


def test_powerlaw_is_what_it_says():
    raw = readers.read("powerlaw:4000x2000:20")
    x, y = raw.x, raw.y
    assert not isinstance(x, np.ndarray)
    assert y is not None
    np.testing.assert_allclose(x.power(2).sum(axis=1), 1)
    assert x.has_canonical_format
    assert 18 < x.nnz / 4000 < 22
    assert 0.45 < y.mean() < 0.55
    often = np.sort(np.bincount(x.indices, minlength=2000))[::-1] / 4000
    np.testing.assert_allclose(often[490] / often[90], 101 / 501, rtol=0.1)  # Zipf's law; only rare words come once
    other = readers.read("powerlaw:300x2000:20")
    assert (x[:300] != other.x).nnz == 0
    np.testing.assert_array_equal(y[:300], other.y)
    for ranks in (2, 3, 5, 301):
        found, classes = together([readers.read("powerlaw:300x2000:20", rank, ranks) for rank in range(ranks)], 2000)
        np.testing.assert_array_equal(found, other.x.toarray())
        np.testing.assert_array_equal(classes, other.y)


def test_powerlaw_can_be_learnt():
    from sklearn.linear_model import SGDClassifier

    raw = readers.read("powerlaw:3000x400:10")
    assert raw.y is not None
    fitted = SGDClassifier(loss="log_loss", random_state=0).fit(raw.x[:2000], raw.y[:2000])
    assert 0.8 < fitted.score(raw.x[2000:], raw.y[2000:]) < 0.96


def test_scaling_makes_features_alike_and_leaves_constant_ones_alone():
    x = np.array([[0, 5, 1e6], [4, 5, 3e6], [2, 5, 2e6]])
    np.testing.assert_allclose(Scaling.fit(x).apply(x, F8), [[-1, 0, -1], [1, 0, 1], [0, 0, 0]])
    long = np.array([[0], [2]], "g")
    assert {array.dtype for array in Scaling.fit(long)} == {F8}
    small = np.array([[-128, 0], [127, 1]], "i1")  # must not overflow in the arithmetic of its own dtype
    np.testing.assert_allclose(Scaling.fit(small).apply(small, F8), [[-1, -1], [1, 1]])
    many = np.arange(10_000.0).reshape(-1, 1)
    np.testing.assert_allclose(Scaling.fit(many).apply(many, F8), np.linspace(-1, 1, 10_000).reshape(-1, 1))


def test_scaling_keeps_sparse_samples_sparse():
    raw = readers.read("powerlaw:10x40:3")
    assert not isinstance(raw.x, np.ndarray)
    scaled = Scaling.fit(raw.x).apply(raw.x, np.dtype("f4"))
    assert (scaled.dtype, scaled.nnz) == (np.float32, raw.x.nnz)
    np.testing.assert_array_equal(scaled.toarray(), raw.x.toarray().astype("f4"))
    halved = Scaling(np.zeros(40), np.full(40, 2.0)).apply(raw.x, F8)
    np.testing.assert_array_equal(halved.toarray(), raw.x.toarray() / 2)
    centred = Scaling(np.ones(40), np.ones(40)).apply(raw.x, F8)  # a model of dense data
    np.testing.assert_array_equal(centred, raw.x.toarray() - 1)


ORDERS: dict[str, np.ndarray] = {
    "of period 5": np.arange(100) % 5,
    "of period 10": np.arange(200) % 10,
    "sorted": np.sort(np.arange(97) % 4),
    "rare": np.array([0] * 80 + [1] * 5 + [2] * 2 + [3]),
    "rarest": np.arange(30) // 2,
    "one of each": np.arange(20),
    "at random": np.random.default_rng(0).choice(6, 500, p=[0.5, 0.3, 0.1, 0.05, 0.03, 0.02]),
    "with a gap": np.arange(60) % 3 * 2,
    "of two": np.array([0, 1]),
}
"""Classes, in the order of samples."""


@pytest.mark.parametrize("share", [0.0, 0.1, 0.2, 0.25, 1 / 3, 0.5, 0.7, 0.9])
@pytest.mark.parametrize("order", ORDERS)
def test_every_class_gives_its_share_and_none_gives_all(order, share):
    y = ORDERS[order]
    counts = np.bincount(y)
    for seed in range(20):
        drawn = held_out(y, len(counts), share, [seed, 1], MPI.COMM_SELF)
        of_each = np.bincount(y[drawn], minlength=len(counts))
        np.testing.assert_array_less(of_each[counts > 0], counts[counts > 0])
        assert abs(of_each - share * counts).max() < 2
        small = np.count_nonzero((counts > 0) & ((counts <= 2) | (share > 0.5)))  # they may have got one back
        missing = int(Fraction(share).limit_denominator(100) * len(y)) - np.count_nonzero(drawn)
        assert 0 <= missing <= small


def test_each_sample_is_drawn_as_often_as_any_other():
    y = np.array([0] * 23 + [1] * 14)
    times = sum(held_out(y, 2, 0.2, [seed, 1], MPI.COMM_SELF).astype(int) for seed in range(1000))
    assert abs(times[:35] - 200).max() < 4 * np.sqrt(1000 * 0.2 * 0.8)
    assert times[35:].tolist() == [0, 0]  # they are no whole piece


def test_the_split_goes_by_classes_and_seed(tmp_path):
    x, y = np.arange(60.0).reshape(60, 1), np.arange(60) % 2
    np.savez(tmp_path / "d.npz", X=x, y=y)

    def split(**given) -> tuple[Dataset, list[list[int]]]:
        data = load(str(tmp_path / "d.npz"), MPI.COMM_SELF, F8, **given)
        x = [np.round(part.x * data.scaling.spread + data.scaling.center) for part in data[:3]]
        for part, numbers in zip(data[:3], x, strict=True):
            np.testing.assert_array_equal(part.y, numbers.ravel() % 2)
        return data, [numbers.astype(int).ravel().tolist() for numbers in x]

    data, numbers = split(validation=0.1)
    assert [part.total for part in data[:3]] == [44, 4, 12]
    assert sorted(n for part in numbers for n in part) == list(range(60))
    assert all(part == sorted(part) for part in numbers)
    assert (data.counts, data.sharded, data.train.start) == ((44,), False, 0)
    assert split(validation=0.1)[1] == split(validation=0.1, test_share=0.2)[1] == numbers
    assert split(validation=0.4)[1][2] == numbers[2]  # the test set is the same
    others = [split(validation=0.1, seed=seed)[1] for seed in (1, 2**63)]
    assert len({str(part[n]) for n in (1, 2) for part in (numbers, *others)}) == 6
    assert [part.total for part in split(validation=1 / 3)[0][:3]] == [32, 16, 12]
    assert [part.total for part in split(test_share=0.45)[0][:3]] == [33, 0, 27]
    assert [part.total for part in split(test_share=0)[0][:3]] == [60, 0, 0]
    # The scaling is that of the training samples alone.
    np.testing.assert_allclose(np.ptp(data.train.x), 2)
    np.testing.assert_allclose(data.train.x.mean(), 0, atol=1e-15)


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


@pytest.mark.parametrize("kind", ["csv", "svm", "csv.bz2", "svm.gz"])
@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
def test_files_of_lines_are_utf_8(tmp_path, kind, encoding):
    x, y = samples(20)
    text = csv(x, y) if kind.startswith("csv") else svm(x, y)
    path = tmp_path / f"data.{kind}"
    pack: dict[str, Callable[[bytes], bytes]] = {".gz": gzip.compress, ".bz2": bz2.compress}
    path.write_bytes(pack.get(path.suffix, bytes)(text.encode(encoding)))
    if encoding == "utf-8-sig":
        raw, labels = read(str(path))
        assert labels is not None
        np.testing.assert_array_equal(dense(raw.x), x)
        assert labels.tolist() == [0, 1, 2]
        return
    with pytest.raises(UserError, match=f"data.{kind}' is not UTF-8, but perhaps UTF-16: save it as UTF-8"):
        read(str(path))


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


# Batches.


def dataset(counts: tuple[int, ...], rank: int, sharded: bool = True) -> Dataset:
    here, total = counts[rank], sum(counts)
    start = sum(counts[:rank]) if sharded else 0
    train = Part(np.zeros((here, 2)), np.zeros(here, np.int64), start, total if sharded else here)
    none = Part(np.zeros((0, 2)), np.zeros(0, np.int64), 0, 0)
    return Dataset(train, none, none, Schema(2, np.arange(2)), Scaling.none(2), sharded, counts)


def taken(data, ranks, rank, batch_size, seed, epoch, weights=None):
    """Of a rank, in all steps of an epoch."""
    made = Batches(data, ranks, batch_size, seed, epoch, weights)
    return [made.share(step, rank) for step in range(made.steps)]


def epoch_of(counts, batch_size, epoch=1, seed=3):
    """For each rank, the steps of its epoch."""
    return [taken(dataset(counts, rank), len(counts), rank, batch_size, seed, epoch) for rank in range(len(counts))]


SHARDS = [(7,), (5, 5), (4, 9, 3), (0, 1, 0, 20), (1, 1, 1, 1, 1), (0, 0, 3), (100, 101), (13, 0, 2, 8, 1)]


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7, 16, 1000])
@pytest.mark.parametrize("counts", SHARDS)
def test_shards_come_once_an_epoch_in_steps_that_all_ranks_share(counts, batch_size):
    ranks, total = epoch_of(counts, batch_size), sum(counts)
    for count, steps in zip(counts, ranks, strict=True):
        assert len(steps) == -(-total // batch_size)
        np.testing.assert_array_equal(np.sort(np.concatenate([mine for mine, _ in steps])), np.arange(count))
        sizes = [len(mine) for mine, _ in steps]
        assert max(sizes) - min(sizes) <= 1
    for step in zip(*ranks, strict=True):
        whole = sum(len(mine) for mine, _ in step)
        assert {length for _, length in step} == {whole}
        assert 1 <= whole <= batch_size


def test_every_epoch_is_shuffled_anew_and_can_be_repeated():
    def orders(counts, **options):
        return [np.concatenate([mine for mine, _ in steps]).tolist() for steps in epoch_of(counts, 10, **options)]

    first = orders((30, 30))
    assert first == orders((30, 30))
    assert first[0] != first[1]
    assert first != orders((30, 30), epoch=2)
    assert first != orders((30, 30), seed=4)


@pytest.mark.parametrize("batch_size", [1, 3, 8, 30, 100])
def test_batches_of_data_that_all_ranks_hold_do_not_depend_on_their_number(batch_size):
    alone = taken(dataset((30,), 0, sharded=False), 1, 0, batch_size, 3, 1)
    np.testing.assert_array_equal(np.sort(np.concatenate([mine for mine, _ in alone])), np.arange(30))
    for ranks in (2, 3, 7, 40):
        data = dataset((30,) * ranks, 0, sharded=False)
        steps = list(zip(*(taken(data, ranks, rank, batch_size, 3, 1) for rank in range(ranks)), strict=True))
        assert len(steps) == len(alone)
        for (whole, length), shares in zip(alone, steps, strict=True):
            np.testing.assert_array_equal(np.sort(np.concatenate([mine for mine, _ in shares])), np.sort(whole))
            assert {size for _, size in shares} == {length} == {len(whole)}
        visited = [sum(len(step[rank][0]) for step in steps) for rank in range(ranks)]  # surpluses go round
        assert batch_size > 1 or max(visited) - min(visited) <= 1
    other = np.concatenate([mine for mine, _ in taken(dataset((30,), 0, sharded=False), 1, 0, batch_size, 3, 2)])
    assert other.tolist() != np.concatenate([mine for mine, _ in alone]).tolist()


WEIGHTS = [
    (1, 2),
    (1000, 1),
    (1, 1000),
    (2, 1, 1, 1),
    (1, 1e-9, 1e300),
    (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7),
    (3, 5) * 20,
]


def weighted(weights, samples, batch_size, epoch=1):
    """For each step, the parts of all ranks."""
    ranks = len(weights)
    data = dataset((samples,) * ranks, 0, sharded=False)
    return list(zip(*(taken(data, ranks, rank, batch_size, 3, epoch, weights) for rank in range(ranks)), strict=True))


@pytest.mark.parametrize("batch_size", [1, 3, 8, 64, 1000])
@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_weighted_shares_are_the_whole_batch_and_in_proportion(weights, batch_size):
    alone = taken(dataset((203,), 0, sharded=False), 1, 0, batch_size, 3, 1)
    steps, share = weighted(weights, 203, batch_size), np.array(normalized(weights))
    done = np.zeros(len(weights))
    for (whole, length), shares in zip(alone, steps, strict=True):
        np.testing.assert_array_equal(np.concatenate([mine for mine, _ in shares]), whole)
        assert {size for _, size in shares} == {length} == {len(whole)}
        lengths = np.array([len(mine) for mine, _ in shares])
        assert abs(lengths - share * length).max() < 1 + 1e-9
        done += lengths
    # What is rounded goes round: at random a rank would be off by about sqrt(steps) / 2, always down by steps / 2.
    assert abs(done - share * 203).max() < 3


def test_over_epochs_of_one_step_rounding_goes_round_as_well():
    """Of 10 samples rank 0 is to have 2.5, in each of 400 epochs."""
    lengths = [[len(mine) for mine, _ in weighted((1, 3), 10, 10, epoch)[0]] for epoch in range(400)]
    assert {length for length, _ in lengths} == {2, 3}
    assert np.mean([length for length, _ in lengths]) == pytest.approx(2.5, abs=0.1)


def test_a_share_may_be_empty():
    lengths = [len(shares[1][0]) for shares in weighted((1000, 1), 6000, 3)]
    assert set(lengths) == {0, 1}
    assert sum(lengths) == pytest.approx(6, abs=2)


def test_weights_may_be_large():
    assert normalized([1e308, 1e308, 5e307]) == pytest.approx([0.4, 0.4, 0.2])


@pytest.mark.parametrize("weight", [0.1, 7.0])
def test_equal_weights_are_even_shares(weight):
    data = dataset((100,) * 3, 0, sharded=False)
    for rank in range(3):
        even, other = taken(data, 3, rank, 7, 3, 1), taken(data, 3, rank, 7, 3, 1, [weight] * 3)
        for (mine, _), (same, _) in zip(even, other, strict=True):
            np.testing.assert_array_equal(mine, same)


# Shares by speed.


def balanced(seconds, total=1000, epochs=30):
    """Shares in the end, if ranks take so many ``seconds`` for so many of ``total`` samples."""
    weights = [1 / len(seconds)] * len(seconds)
    for _ in range(epochs):
        samples = [int(weight * total) for weight in weights]
        weights = rebalanced(weights, [(n, took(n)) for n, took in zip(samples, seconds, strict=True)], total)
        assert sum(weights) == pytest.approx(1)
    return weights


def test_a_rank_twice_as_slow_gets_half_the_work():
    def linear(n):
        return 0.001 * n

    def slow(n):
        return 0.002 * n

    assert balanced([linear, slow]) == pytest.approx([2 / 3, 1 / 3], rel=0.01)
    assert balanced([slow, linear, linear]) == pytest.approx([1 / 5, 2 / 5, 2 / 5], rel=0.01)
    first = balanced([linear, slow], epochs=1)  # half of the way
    assert first == pytest.approx([7 / 12, 5 / 12])
    assert balanced([linear] * 4) == pytest.approx([1 / 4] * 4)


def test_time_that_does_not_depend_on_samples_is_time_all_the_same():
    """All take equally long in the end: 1 + n ms and 1 + 3 n ms."""
    fast, slow = balanced([lambda n: 1 + n, lambda n: 1 + 3 * n])
    assert fast * 1000 == pytest.approx(3 * slow * 1000, rel=0.02)
    fast, slow = balanced([lambda n: 100 + n, lambda n: 300 + n], epochs=100)
    assert 100 + fast * 1000 == pytest.approx(300 + slow * 1000, rel=0.02)


def test_none_is_left_without_samples_or_judged_by_too_few():
    _, slow = balanced([lambda n: 1e-6 * n, lambda n: 1.0 * n])
    assert slow * 1000 == pytest.approx(16, rel=0.05)
    assert rebalanced([0.7, 0.2, 0.1], [(700, 1.0), (7, 1.0), (0, 0.0)], 1000) == pytest.approx([0.7, 0.2, 0.1])
    assert rebalanced([0.5, 0.3, 0.2], [(500, 1.0), (7, 1.0), (200, 2.0)], 1000) == pytest.approx(
        [(0.5 + 0.7 * 5 / 6) / 2, 0.3, (0.2 + 0.7 / 6) / 2]
    )
    assert balanced([lambda n: n, lambda n: 9 * n, lambda n: n], total=20) == [1 / 3] * 3  # nothing can be told
