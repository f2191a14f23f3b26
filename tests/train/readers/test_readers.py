"""Readers: every format holds the same samples, and shares of a source are the whole."""

import io
import struct
from pathlib import Path

import numpy as np
import pytest

from datafiles import FORMATS, SPARSE, dense, samples, together, write
from mpicoll import UserError
from mpicoll.train import readers
from mpicoll.train.data import read
from mpicoll.train.readers import divisible


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
