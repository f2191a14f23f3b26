"""Readers of data, one file for each kind of source: they read and check the whole or one rank's share, without MPI."""

import re
from pathlib import Path

from ...errors import UserError
from .arrays import idx_files, read_digits, read_idx, read_npy, read_npz
from .csv import read_csv
from .opening import OPENERS, reading
from .powerlaw import read_powerlaw
from .raw import Raw, Schema
from .svmlight import read_svmlight

KINDS = (
    "'digits', 'fashion-mnist', 'powerlaw', a .npz, .csv, .tsv, .svm, .svmlight or .libsvm file, "
    "or a folder with X.npy and y.npy or with IDX files"
)
SUFFIXES = {".npz": "npz", ".csv": "csv", ".tsv": "csv", ".svm": "svm", ".svmlight": "svm", ".libsvm": "svm"}

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # where Debian has it


def divisible(source: str) -> bool:
    """Whether a rank can read its share without the others': false for compressed files and the small digits."""
    kind, path = _find(source)
    if kind == "idx":
        return not any(file and file.suffix == ".gz" for file in idx_files(path).values())
    return kind in ("powerlaw", "npy") or (kind in ("csv", "svm") and path.suffix.lower() not in OPENERS)


def read(source: str, rank: int = 0, ranks: int = 1, known: Schema | None = None) -> Raw:
    """This rank's share of the samples of a source; more than one rank only if it is ``divisible``.

    The shares of all ranks, one after another, are what one rank would read.  Those of files of lines hold the lines
    that begin in as many ranges of equally many bytes.

    With ``known`` the columns of a csv file are put in its order, by name where both have names, and the file need have
    no labels.  Whether a file of another kind contradicts ``known`` shows only when all shares are known.
    """
    kind, path = _find(source)
    if kind == "digits":
        return read_digits()
    if kind == "powerlaw":
        return read_powerlaw(source, rank, ranks)
    if kind == "csv":
        return read_csv(path, rank, ranks, known)
    return {"svm": read_svmlight, "npz": read_npz, "npy": read_npy, "idx": read_idx}[kind](path, rank, ranks)


def _find(source: str) -> tuple[str, Path]:
    """The kind of a source, and its path."""
    path = Path(source)
    if source == "digits" or re.match("powerlaw(:|$)", source):
        return source.split(":")[0], path
    if source == "fashion-mnist":
        if not FASHION_MNIST.is_dir():
            raise UserError(
                f"fashion-mnist is not in {str(FASHION_MNIST)!r}: install Debian's package dataset-fashion-mnist, "
                "or name a folder that holds its four IDX files"
            )
        return "idx", FASHION_MNIST
    with reading(path):
        if not path.exists():
            raise UserError(f"data file {source!r} does not exist; expected {KINDS}")
        if path.is_dir():
            if (path / "X.npy").exists():
                return "npy", path
            if idx_files(path)["X"]:
                return "idx", path
            raise UserError(f"data folder {source!r} holds neither X.npy nor train-images-idx3-ubyte, perhaps with .gz")
        if not path.is_file():
            raise UserError(f"data file {source!r} is not a file")
    plain = path.with_suffix("") if path.suffix.lower() in OPENERS else path
    kind = SUFFIXES.get(plain.suffix.lower())
    if kind is None or (kind == "npz" and plain != path):
        raise UserError(f"data file {source!r} has the suffix {path.suffix!r}; expected {KINDS}")
    return kind, path
