"""The same samples in every format, and files that are wrong in one way each."""

import bz2
import gzip
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np

from mpicoll.train.readers.raw import Raw

FORMATS = ["npz", "npy", "idx", "idx.gz", "csv", "csv.bz2", "svm", "svm.gz"]
SPARSE = ("svm", "svm.gz")


def samples(count: int, features: int = 5, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Small integers, many of them 0, and three classes."""
    rng = np.random.default_rng(seed)
    x = rng.integers(0, 200, (count, features)) * (rng.random((count, features)) < 0.6) * 1.0
    x[0] = 1  # so that sparse files use all columns
    return x, np.arange(count) % 3


def write(kind: str, folder: Path, x: np.ndarray, y: np.ndarray, name: str = "data") -> str:
    """The path to give to ``--data``."""
    path = folder / f"{name}.{kind}"
    if kind == "npz":
        np.savez(path, X=x, y=y)
    elif kind == "npy":
        path.mkdir()
        np.save(path / "X.npy", x)
        np.save(path / "y.npy", y)
    elif kind in ("idx", "idx.gz"):
        path.mkdir()
        for file, array in (("images-idx3", x.reshape(len(x), 1, -1).astype("u1")), ("labels-idx1", y.astype("u1"))):
            (path / f"train-{file}-ubyte").write_bytes(idx(array))
        if kind == "idx.gz":
            for plain in list(path.iterdir()):
                plain.with_name(f"{plain.name}.gz").write_bytes(gzip.compress(plain.read_bytes()))
                plain.unlink()
    else:
        text = csv(x, y) if kind.startswith("csv") else svm(x, y)
        pack: dict[str, Callable[[bytes], bytes]] = {".gz": gzip.compress, ".bz2": bz2.compress}
        path.write_bytes(pack.get(path.suffix, bytes)(text.encode()))
    return str(path)


def idx(array: np.ndarray) -> bytes:
    code = {"u1": 8, "i1": 9, "i2": 11, "i4": 12, "f4": 13, "f8": 14}[array.dtype.str[1:]]
    header = bytes([0, 0, code, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.astype(array.dtype.newbyteorder(">")).tobytes()


def csv(x: np.ndarray, y: np.ndarray, end: str = "\n") -> str:
    lines = [
        "a,b,c,d,e,label",
        *(",".join(f"{value:g}" for value in [*row, label]) for row, label in zip(x, y, strict=True)),
    ]
    return "".join(line + end for line in lines)


def svm(x: np.ndarray, y: np.ndarray, end: str = "\n", first: int = 1) -> str:
    """Zeros are left out; the first column has number ``first``."""
    lines = [
        f"{label:g} " + " ".join(f"{n + first}:{row[n]:g}" for n in np.flatnonzero(row))
        for row, label in zip(x, y, strict=True)
    ]
    return "".join(line + end for line in lines)


LABELS: dict[str, tuple[list[str], list[str] | list[int]]] = {
    "integers": (["10", "9", "-1"], [-1, 9, 10]),
    "underscores": (["1_0", "10", "2_1"], ["10", "1_0", "2_1"]),
    "signs": (["+1", "1", "-1", "-0", "0"], ["-1", "-0", "0", "+1", "1"]),
    "leading zeros": (["01", "1", "001", "10"], ["001", "01", "1", "10"]),
    "points": (["1", "1.0", "1.", "1.00"], ["1", "1.", "1.0", "1.00"]),
    "points only": (["10.0", "9.0"], ["9.0", "10.0"]),
    "exponents": (["1e0", "1", "1E0", "1e400", "1e500"], ["1", "1E0", "1e0", "1e400", "1e500"]),
    "fractions": (["0.1", ".1", "0.10000000000000001"], [".1", "0.1", "0.10000000000000001"]),
    "long": (["9007199254740993", "9007199254740992"], [9007199254740992, 9007199254740993]),
    "longer": (["92233720368547758080", "92233720368547758081"], ["92233720368547758080", "92233720368547758081"]),
    "digits of other scripts": (["1", "\uff11", "\u0661", "\u00b9"], ["1", "\u00b9", "\u0661", "\uff11"]),
    "blanks of other kinds": (["1", "\xa01", "1\u2003"], ["1", "1\u2003", "\xa01"]),
    "hexadecimal and words": (["0x1", "1", "True", "one"], ["0x1", "1", "True", "one"]),
    "accents": (["\u00e9", "e\u0301", "e"], ["e", "e\u0301", "\u00e9"]),
    "case": (["a", "A", "nano"], ["A", "a", "nano"]),
    "bytes that are no text": (["\udcff", "\\xff", "\udcfe"], ["\\xff", "\udcfe", "\udcff"]),
}
"""Texts of labels, all different, and what the classes are called in their order."""


def labelled(path: Path, texts: list[str]) -> str:
    """A csv file with each of these labels in three lines."""
    lines = [f"{n},{text}\n" for n, text in enumerate(3 * texts)]
    path.write_text("".join(["a,label\n", *lines]), encoding="utf-8", errors="surrogateescape")
    return str(path)


def _text(name: str, text: str | bytes) -> Callable[[Path], str]:
    def make(folder: Path) -> str:
        (folder / name).write_bytes(text.encode() if isinstance(text, str) else text)
        return str(folder / name)

    return make


def _npz(**arrays: object) -> Callable[[Path], str]:
    def make(folder: Path) -> str:
        np.savez(folder / "data.npz", **arrays)  # type: ignore[arg-type]
        return str(folder / "data.npz")

    return make


def _npy(**arrays: object) -> Callable[[Path], str]:
    def make(folder: Path) -> str:
        for name, array in arrays.items():
            np.save(folder / f"{name}.npy", np.asarray(array))
        return str(folder)

    return make


def _idx(**files: bytes) -> Callable[[Path], str]:
    """``images`` and ``labels``, good unless given."""
    x, y = samples(9)
    good = {"images": idx(x.reshape(9, 5, 1).astype("u1")), "labels": idx(y.astype("u1"))}

    def make(folder: Path) -> str:
        for name, number in (("images", 3), ("labels", 1)):
            (folder / f"train-{name}-idx{number}-ubyte").write_bytes({**good, **files}[name])
        return str(folder)

    return make


def _torn_gz(folder: Path) -> str:
    _idx()(folder)
    path = folder / "train-images-idx3-ubyte"
    packed = gzip.compress(np.random.default_rng(0).bytes(1000))
    path.with_name(path.name + ".gz").write_bytes(packed[:-500])
    path.unlink()
    return str(folder)


def _torn_npy(folder: Path) -> str:
    x, y = samples(30)
    _npy(X=x, y=y)(folder)
    (folder / "X.npy").write_bytes((folder / "X.npy").read_bytes()[:-8])
    return str(folder)


def _unreadable(folder: Path) -> str:
    (folder / "data.csv").symlink_to("/proc/self/mem")
    return str(folder / "data.csv")


X, Y = samples(30)
CSV, SVM = csv(X, Y).splitlines(), svm(X, Y).splitlines()


def _lines(name: str, lines: list[str], number: int, line: str) -> Callable[[Path], str]:
    """A good file but for one line, counted from 1."""
    return _text(name, "\n".join([*lines[: number - 1], line, *lines[number:]]))


BAD: dict[str, Callable[[Path], str]] = {
    r"data file '.*data.csv', line 25: 'x' in column 'b'; expected a finite number": _lines(
        "data.csv", CSV, 25, "1,x,3,4,5,0"
    ),
    r"line 24: 'nan' in column 'c'; expected a finite number": _lines("data.csv", CSV, 24, "1,2,nan,4,5,0"),
    r"line 30: '' in column 'a'; expected a finite number": _lines("data.csv", CSV, 30, ",2,3,4,5,0"),
    r"line 29: '' in column 'label'; expected a label": _lines("data.csv", CSV, 29, "1,2,3,4,5,"),
    r"line 28: 'NaN' in column 'label'; expected a label": _lines("data.csv", CSV, 28, "1,2,3,4,5,NaN"),
    r"line 2: 'q' in column 1; expected a finite number": _text("data.csv", "1,2,0\nq,3,1\n"),
    r"line 31: 5 fields; expected 6, as in line 1": _lines("data.csv", CSV, 31, "1,2,3,4,5"),
    r"line 3: 7 fields; expected 6, as in line 1": _lines("data.csv", CSV, 3, "1,2,3,4,5,6,0"),
    r"line 17: a quoted field does not end": _lines("data.csv", CSV, 17, '1,2,3,4,5,"0'),
    r"line 6: '1_0' in column 'a'; expected a finite number": _lines("data.csv", CSV, 6, "1_0,2,3,4,5,0"),
    r"columns 'y' and 'Target'; expected one of labels": _text("data.csv", "a,y,Target\n1,2,3\n"),
    r"data.csv' has a column 'a' twice .columns 1 and 2.: name each column once": _text(
        "data.csv", "a,a,b,label\n1,2,3,0\n4,5,6,1\n"
    ),
    r"data.csv' has a column '' twice .columns 2 and 3.: name": _text("data.csv", "a,,,label\n1,2,3,0\n4,5,6,1\n"),
    r"data.csv' has a column 'b' twice .columns 1 and 3.: name": _text("data.csv", "b;y;b\n1;2;3\n4;5;6\n"),
    r"data.csv', line 1: nothing; expected features and a label": _text("data.csv", ""),
    r"data.csv', line 1: one field; expected features and a label": _text("data.csv", "1 2 0\n3 4 1\n"),
    r"data.csv' holds no samples": _text("data.csv", "a,b,label\n\n"),
    r"data.csv' has labels like 0.5, 1.5, 2.5: measurements; expected classes": _text(
        "data.csv", "".join(f"1,{n + 0.5}\n" for n in range(30))
    ),
    r"data.tsv' has 40 different labels for 60 samples; expected classes": _text(
        "data.tsv", "".join(f"1\tname{n % 40}\n" for n in range(60))
    ),
    r"data.csv' has samples of one class only, yes: expected two at least": _text("data.csv", 20 * "1,yes\n"),
    r"data.csv' has samples of one class only, 1_0: expected": _text("data.csv", "a,label\n" + 20 * "1,1_0\n"),
    r"data.svm' has samples of one class only, 2.5: expected": _text("data.svm", 20 * "2.5 1:1\n"),
    r"' has samples of one class only, 2: expected": _npy(X=X, y=30 * [2]),
    r"data.csv' cannot be read: Input/output error": _unreadable,
    r"data.csv.gz' cannot be read: Not a gzipped file": _text("data.csv.gz", "1,2,3\n"),
    r"data.csv.bz2' cannot be read: Invalid data stream": _text("data.csv.bz2", "1,2,3\n"),
    r"data.svm' holds no samples": _text("data.svm", "# nothing\n"),
    r"data.svm' has no features": _text("data.svm", "1\n0\n" * 20),
    r"data.svm', line 23: '1 3:x'; expected 'label index:value": _lines("data.svm", SVM, 23, "1 3:x"),
    r"data.svm', line 22: '1 2:1 1:1'; expected": _lines("data.svm", SVM, 22, "1 2:1 1:1"),
    r"data.svm', line 30: '1 -1:1'; expected": _lines("data.svm", SVM, 30, "1 -1:1"),
    r"data.svm', line 9: '1 1:inf'; expected": _lines("data.svm", SVM, 9, "1 1:inf"),
    r"data.svm', line 8: 'nan 1:1'; expected": _lines("data.svm", SVM, 8, "nan 1:1"),
    r"data.svm', line 11: '1_0 1:1'; expected": _lines("data.svm", SVM, 11, "1_0 1:1"),
    r"data.svm', line 7: '1:1 2:1'; expected": _lines("data.svm", SVM, 7, "1:1 2:1"),
    r"data.svm', line 1: '1 99999999999:1'; expected": _lines("data.svm", SVM, 1, "1 99999999999:1"),
    r"data.svm', line 3: '0 1:1 1:1 1:1 1:1 1:1 1:1 1:1 1:1 1:1 1:\.\.\.'; expected": _lines(
        "data.svm", SVM, 3, "0" + 20 * " 1:1"
    ),
    r"data.svm' has labels like -1.5, -0.5, 0.5: measurements": _text(
        "data.svm", "".join(f"{n - 1.5} 1:1\n" for n in range(30))
    ),
    r"data.txt' has the suffix '.txt'; expected": _text("data.txt", "0 1:1\n"),
    r"data.npz.gz' has the suffix '.gz'; expected": _text("data.npz.gz", "hello"),
    r"data file '.*X.npy' cannot be mapped as a plain array: mmap length is greater": _torn_npy,
    r"data file '.*X.npy' cannot be mapped as a plain array: .*objects": _npy(X=np.array([[{}]]), y=[0]),
    r"data folder '.*': X holds nan at sample 28, feature 3": _npy(
        X=np.where(np.arange(150).reshape(30, 5) == 143, np.nan, X), y=Y
    ),
    r": y holds 0.5 at sample 27; expected integers": _npy(X=X, y=np.where(np.arange(30) == 27, 0.5, Y)),
    r": y has 29 labels for 30 samples": _npy(X=X, y=Y[:-1]),
    r": y holds 70, more classes than samples": _npy(X=X, y=np.where(np.arange(30) == 27, 70, Y)),
    r": y_test holds 5, y only classes 0 to 2": _npy(X=X, y=Y, X_test=X, y_test=np.where(np.arange(30) == 29, 5, Y)),
    r": X_test has 4 features, X has 5": _npy(X=X, y=Y, X_test=X[:, :4], y_test=Y),
    r": X_test has shape \(0, 5\); expected samples x features": _npz(X=X, y=Y, X_test=X[:0], y_test=Y[:0]),
    r"has only one of 'X_test' and 'y_test'": _npy(X=X, y=Y, X_test=X),
    r"has no array 'y': training needs a label": _npy(X=X),
    r"features that overflow float32 when scaled": _npy(
        X=np.eye(60) * 1.7e308 - 8e307, y=[0, 1] * 30, X_test=np.eye(60) * 1e308, y_test=[0] * 60
    ),
    r"train-images-idx3-ubyte.gz' cannot be read: Compressed file ended": _torn_gz,
    r"images-idx3-ubyte' begins with 00 00 07 03; expected IDX": _idx(images=b"\0\0\7\3" + bytes(99)),
    r"images-idx3-ubyte' begins with nothing; expected IDX": _idx(images=b""),
    r"labels-idx1-ubyte' is torn, or longer than it should be: 8 bytes for shape \(9,\)": _idx(
        labels=idx(Y[:9].astype("u1"))[:-1]
    ),
    r"labels-idx1-ubyte' is torn, or longer than it should be: 0 bytes for shape \(\)": _idx(labels=b"\0\0\10\1\0\0"),
    r": X has shape \(9,\); expected samples x features": _idx(images=idx(Y[:9].astype("u1"))),
    r": X has shape \(0, 5, 5\); expected": _idx(images=idx(np.zeros((0, 5, 5), "u1"))),
    r": y has 8 labels for 9 samples": _idx(labels=idx(Y[:8].astype("u1"))),
    r"x.csv' cannot be read: File name too long": lambda folder: "x" * 300 + ".csv",
    r"holds neither X.npy nor train-images-idx3-ubyte": lambda folder: str(folder),
    r"'powerlaw:x'; expected|'powerlaw:x': expected powerlaw": lambda folder: "powerlaw:x",
    r"'powerlaw:10x3': expected at least 1 sample, 4 to 16777216 features": lambda folder: "powerlaw:10x3",
    r"'powerlaw:0x9': expected at least 1 sample": lambda folder: "powerlaw:0x9",
    r"'powerlaw:10x9:0': expected at least 1 sample": lambda folder: "powerlaw:10x9:0",
    r"'powerlaw:10x9:3': expected at least 1 sample": lambda folder: "powerlaw:10x9:3",
    r"'powerlaw:10x99999999': expected at least 1 sample": lambda folder: "powerlaw:10x99999999",
}


def dense(x):
    return x if isinstance(x, np.ndarray) else x.toarray()


def together(shares: list[Raw], features: int) -> tuple[np.ndarray, np.ndarray]:
    """All shares as one; those of sparse files have the columns that they need."""
    x = [np.pad(dense(raw.x), [(0, 0), (0, features - raw.x.shape[1])]) for raw in shares]
    return np.concatenate(x), np.concatenate([raw.y for raw in shares if raw.y is not None])
