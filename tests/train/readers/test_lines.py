"""Files of lines: how lines end, and which rank reads which."""

import bz2
import gzip
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from datafiles import csv, dense, samples, svm, together, write
from mpicoll import UserError
from mpicoll.train import readers
from mpicoll.train.data import read

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


def test_a_line_belongs_to_the_range_that_it_begins_in(tmp_path):
    (tmp_path / "data.svm").write_text("".join(f"{n} 1:1\n" for n in range(9)))
    labels = [readers.read(str(tmp_path / "data.svm"), rank, 3).y for rank in range(3)]
    np.testing.assert_array_equal(labels, [[0, 1, 2], [3, 4, 5], [6, 7, 8]])


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
