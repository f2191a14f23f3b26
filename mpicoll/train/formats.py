"""What data are read from: each format checked, whole or one rank's share of it, without MPI."""

import bz2
import codecs
import csv
import gzip
import io
import math
import re
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..errors import UserError, reason
from ..files import error_message

if TYPE_CHECKING:
    from scipy.sparse import csr_array

KINDS = (
    "'digits', 'fashion-mnist', 'powerlaw', a .npz, .csv, .tsv, .svm, .svmlight or .libsvm file, "
    "or a folder with X.npy and y.npy or with IDX files"
)
SUFFIXES = {".npz": "npz", ".csv": "csv", ".tsv": "csv", ".svm": "svm", ".svmlight": "svm", ".libsvm": "svm"}
OPENERS: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open}

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # where Debian has it

LABELS = ("y", "label", "class", "target")
"""What a csv file calls the column of labels; if none of its columns is called so, labels are the last."""

NOT_FINITE = re.compile(r"[+-]?(nan|inf|infinity)", re.ASCII | re.IGNORECASE)
NUMBER = r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:e[+-]?\d+)?"
DECIMAL = re.compile(NUMBER, re.ASCII | re.IGNORECASE)
SVM_LINE = re.compile(
    rf"\s*(?:{NUMBER}(?:\s+qid:\S*)?(?:\s+\d+:{NUMBER})*\s*)?(?:#.*)?".encode(), re.IGNORECASE | re.DOTALL
)
"""A line of an svmlight file.  Python's numbers are not asked: they may have underscores."""

INTEGER = re.compile(r"0|-?[1-9]\d{0,17}", re.ASCII)
"""What Python writes for an integer, and fits into 64 bits."""


class Raw(NamedTuple):
    """What a rank's share of a source holds, checked: ``x`` (samples, features), finite; ``y`` (samples,).

    ``y`` are classes from 0; if ``verbatim``, labels as the file has them (text of a csv file, numbers of an svmlight
    file), and a sparse ``x`` has columns numbered as in the file, and as many as this share needs: what they mean
    depends on the other shares.  ``extent``, bytes or samples of the whole source, is the same for all shares.
    ``columns`` and ``label`` are what a csv file calls the features and the labels, if it names them, each by another
    name; ``base`` is the number of an svmlight file's first column, once that is known.  ``layout`` says of a csv file
    where its labels are, and whether line 1 is a header.
    """

    x: "np.ndarray | csr_array"
    y: np.ndarray | None
    x_test: "np.ndarray | csr_array | None" = None
    y_test: np.ndarray | None = None
    verbatim: bool = False
    extent: int = 0
    columns: tuple[str, ...] | None = None
    label: str | None = None
    base: int | None = None
    layout: str | None = None

    def __repr__(self) -> str:
        sets = ((name, getattr(self, name)) for name in ("x", "y", "x_test", "y_test"))
        return f"<Raw: {', '.join(f'{name} {array.shape} {array.dtype}' for name, array in sets if array is not None)}>"


class Schema(NamedTuple):
    """What training found out about its data, which a model keeps, so that other data are read in the same way.

    ``labels[class]`` is what the data call the class; the others are as in ``Raw``, and ``None`` where the data did not
    tell.
    """

    features: int
    labels: np.ndarray
    columns: tuple[str, ...] | None = None
    label: str | None = None
    base: int | None = None
    as_numbers: bool = False
    """Labels are those of an earlier version, which read what looks like a number as one."""

    def facts(self) -> dict[str, Any]:
        """What it holds, as JSON can."""
        own = {name: value for name, value in self._asdict().items() if name != "as_numbers"}
        return {**own, "labels": self.labels.tolist()}

    @classmethod
    def of(cls, facts: dict[str, Any]) -> "Schema":
        """The schema that told these ``facts``; ``ValueError``, ``KeyError`` or ``TypeError`` if none did."""
        features, labels, columns = facts["features"], np.array(facts["labels"]), facts.get("columns")
        label, base = facts.get("label"), facts.get("base")
        if labels.ndim != 1 or labels.dtype.kind not in "ifU" or base not in (None, 0, 1):
            raise ValueError(f"labels {labels.dtype} of shape {labels.shape}, base {base}")
        if columns is not None and (len(columns) != features or not all(isinstance(name, str) for name in columns)):
            raise ValueError(f"{len(columns)} names of {features} features")
        if columns is not None and len(set(columns)) < features:
            raise ValueError("a name of two features")
        names = None if columns is None else tuple(columns)
        return cls(features, labels, names, label, base, "columns" not in facts)


def share(samples: int, rank: int, ranks: int) -> slice:
    """Which of so many samples are this rank's."""
    return slice(samples * rank // ranks, samples * (rank + 1) // ranks)


def divisible(source: str) -> bool:
    """Whether a rank can read its share without reading the others': not if compressed, nor the small digits."""
    kind, path = _find(source)
    if kind == "idx":
        return not any(file and file.suffix == ".gz" for file in _idx_files(path).values())
    return kind in ("powerlaw", "npy") or (kind in ("csv", "svm") and path.suffix.lower() not in OPENERS)


def read(source: str, rank: int = 0, ranks: int = 1, known: Schema | None = None) -> Raw:
    """Samples that this rank reads: all together, in their order, what one rank reads; shares only of what is
    ``divisible``.  Shares of files of lines hold the lines that begin in as many ranges of equally many bytes.

    Columns of a csv file are those of ``known``, in its order, by their names where both have names; then the file need
    have no labels.  What a file of another kind says against ``known`` shows only when all shares are known."""
    kind, path = _find(source)
    if kind == "digits":
        return _read_digits()
    if kind == "powerlaw":
        return _read_powerlaw(source, rank, ranks)
    if kind == "csv":
        return _read_csv(path, rank, ranks, known)
    if kind == "svm":
        return _read_svm(path, rank, ranks)
    arrays = {"npz": _open_npz, "npy": _map_npy, "idx": _map_idx}[kind](path)
    return _checked(f"data {'file' if kind == 'npz' else 'folder'} {str(path)!r}", arrays, rank, ranks)


def _find(source: str) -> tuple[str, Path]:
    """The kind of source, and where it is."""
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
    with _reading(path):
        if not path.exists():
            raise UserError(f"data file {source!r} does not exist; expected {KINDS}")
        if path.is_dir():
            if (path / "X.npy").exists():
                return "npy", path
            if _idx_files(path)["X"]:
                return "idx", path
            raise UserError(f"data folder {source!r} holds neither X.npy nor train-images-idx3-ubyte, perhaps with .gz")
        if not path.is_file():
            raise UserError(f"data file {source!r} is not a file")
    plain = path.with_suffix("") if path.suffix.lower() in OPENERS else path
    kind = SUFFIXES.get(plain.suffix.lower())
    if kind is None or (kind == "npz" and plain != path):
        raise UserError(f"data file {source!r} has the suffix {path.suffix!r}; expected {KINDS}")
    return kind, path


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """What a file system or a decompressor complains about is told in one line."""
    try:
        yield
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"data file {str(path)!r} cannot be read: {error_message(error)}") from error


# Arrays: X, y, X_test, y_test, of which nothing but the rank's own rows is touched where they are mapped.


def _read_digits() -> Raw:
    """The 1,797 handwritten digits, 8 x 8 pixels of 0..16, that scikit-learn ships (UCI's optdigits test set)."""
    found = find_spec("sklearn")  # not imported: that takes twenty times as long as reading the file
    path = Path(found.submodule_search_locations[0] if found and found.submodule_search_locations else "")
    path /= "datasets/data/digits.csv.gz"
    if not path.is_file():
        raise UserError("the digits come with scikit-learn: pip install 'mpicoll[train]'")
    with _reading(path):
        table = np.loadtxt(path, delimiter=",")
    x, y = np.ascontiguousarray(table[:, :-1]), table[:, -1].astype(np.int64)
    return Raw(x, y, extent=len(y))


def _open_npz(path: Path) -> dict[str, np.ndarray]:
    """The arrays named X, y, X_test and y_test; a ``UserError`` that lists what there is if X is not among them."""
    what = f"data file {str(path)!r}"
    try:
        if not zipfile.is_zipfile(path):
            raise UserError(f"{what} is not an .npz file, or only the beginning of one")
        with np.load(path, allow_pickle=False) as file:
            names, arrays = list(file), {name: file[name] for name in ("X", "y", "X_test", "y_test") if name in file}
    except UserError:
        raise
    except Exception as error:  # a foreign or torn file fails in any way that zipfile, zlib and NumPy know
        why = reason(error).splitlines()[0]
        raise UserError(f"{what} cannot be read as an .npz file of plain arrays: {why}") from error
    if "X" not in arrays:
        there = listed(list(map(repr, names))) or "none"
        raise UserError(f"{what} has no array 'X' (samples x features); it has {there}")
    for name, array in arrays.items():
        if not isinstance(array, np.ndarray):  # NumPy returns what it does not know as bytes
            raise UserError(f"{what}: {name} is not an array")
    return arrays


def _map_npy(folder: Path) -> dict[str, np.ndarray]:
    arrays = {}
    for name in ("X", "y", "X_test", "y_test"):
        path = folder / f"{name}.npy"
        if path.exists():
            try:
                arrays[name] = np.load(path, mmap_mode="r", allow_pickle=False)
            except Exception as error:  # as above
                why = reason(error).splitlines()[0]
                raise UserError(f"data file {str(path)!r} cannot be mapped as a plain array: {why}") from error
    return arrays


def _idx_files(folder: Path) -> dict[str, Path | None]:
    """The four files under their usual names, uncompressed if there are both; ``None`` for those that are missing."""

    def find(name: str) -> Path | None:
        return next((path for path in (folder / name, folder / f"{name}.gz") if path.exists()), None)

    return {
        "X": find("train-images-idx3-ubyte"),
        "y": find("train-labels-idx1-ubyte"),
        "X_test": find("t10k-images-idx3-ubyte"),
        "y_test": find("t10k-labels-idx1-ubyte"),
    }


IDX_TYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


def _map_idx(folder: Path) -> dict[str, np.ndarray]:
    return {name: _map_idx_file(path) for name, path in _idx_files(folder).items() if path is not None}


def _map_idx_file(path: Path) -> np.ndarray:
    """An array of LeCun's IDX format, big endian: two zero bytes, the type, the number of dimensions, each of them."""
    what = f"data file {str(path)!r}"
    with _reading(path):
        compressed = path.suffix == ".gz"
        data = gzip.decompress(path.read_bytes()) if compressed else b""
        with io.BytesIO(data) if compressed else open(path, "rb") as file:
            magic = file.read(4)
            if len(magic) < 4 or magic[:2] != b"\0\0" or magic[2] not in IDX_TYPES or not 1 <= magic[3] <= 8:
                raise UserError(
                    f"{what} begins with {magic.hex(' ') or 'nothing'}; expected IDX: 00 00, type, dimensions"
                )
            sizes = file.read(4 * magic[3])
            shape = tuple(np.frombuffer(sizes[: len(sizes) // 4 * 4], ">u4").tolist())
            begin, end = file.tell(), file.seek(0, io.SEEK_END)
        dtype = np.dtype(IDX_TYPES[magic[2]])
        if len(shape) != magic[3] or end - begin != math.prod(shape) * dtype.itemsize:
            raise UserError(f"{what} is torn, or longer than it should be: {end - begin} bytes for shape {shape}")
        if end == begin:
            return np.empty(shape, dtype)
        if compressed:
            return np.frombuffer(data, dtype, offset=begin).reshape(shape)
        return np.memmap(path, dtype, "r", begin, shape)


def _checked(what: str, arrays: dict[str, np.ndarray], rank: int, ranks: int) -> Raw:
    if ("X_test" in arrays) != ("y_test" in arrays):
        raise UserError(f"{what} has only one of 'X_test' and 'y_test'; expected both or neither")
    found: dict[str, np.ndarray] = {}
    for name in ("X", "X_test"):
        if name in arrays:
            found[name] = _samples(f"{what}: {name}", arrays[name], rank, ranks)
    for name in ("y", "y_test"):
        if name in arrays:
            found[name] = _labels(f"{what}: {name}", arrays[name], len(arrays[name.replace("y", "X")]), rank, ranks)
    if "X_test" in found and found["X_test"].shape[1] != found["X"].shape[1]:
        raise UserError(f"{what}: X_test has {found['X_test'].shape[1]} features, X has {found['X'].shape[1]}")
    return Raw(found["X"], found.get("y"), found.get("X_test"), found.get("y_test"), extent=len(arrays["X"]))


def _samples(what: str, x: np.ndarray, rank: int, ranks: int) -> np.ndarray:
    if x.dtype.kind not in "biuf":
        raise UserError(f"{what} has dtype {x.dtype}; expected real numbers")
    if x.ndim < 2 or not x.size:
        raise UserError(f"{what} has shape {x.shape}; expected samples x features, at least one of each")
    own = share(len(x), rank, ranks)
    mine = np.asarray(x[own]).reshape(-1, math.prod(x.shape[1:]))
    if x.dtype.kind == "f" and not np.isfinite(mine).all():
        bad = np.argwhere(~np.isfinite(mine))
        sample, feature = bad[0]
        more = f" (and in {len(bad) - 1} more places)" if len(bad) > 1 else ""
        where = f"sample {own.start + sample}, feature {feature}{more}"
        raise UserError(f"{what} holds {mine[sample, feature]} at {where}; expected finite numbers")
    return mine.astype(mine.dtype.newbyteorder("="), copy=False)


def _labels(what: str, y: np.ndarray, samples: int, rank: int, ranks: int) -> np.ndarray:
    if y.ndim == 0 or y.shape not in ((len(y),), (len(y), 1)):
        raise UserError(f"{what} has shape {y.shape}; expected one label per sample")
    if len(y) != samples:
        raise UserError(f"{what} has {len(y)} labels for {samples} samples; expected one each")
    if y.dtype.kind not in "biuf":
        raise UserError(f"{what} has dtype {y.dtype}; expected integers, 0 for the first class")
    own = share(len(y), rank, ranks)
    mine = np.asarray(y[own]).reshape(-1)
    limit = np.iinfo(np.int64).max
    bad = np.flatnonzero(~((mine >= 0) & (mine < limit) & (mine == np.floor(mine))))  # catches NaN as well
    if len(bad):
        where = f"sample {own.start + bad[0]}"
        raise UserError(f"{what} holds {mine[bad[0]]} at {where}; expected integers, 0 for the first class")
    return mine.astype(np.int64)


# Files of lines, a sample each.


def _own_lines(path: Path, rank: int, ranks: int) -> tuple[list[bytes], int, int]:
    """The lines that begin in this rank's range of bytes, the byte where they begin, and the bytes of the file.

    Besides them, a rank reads the end of the line that its range begins within."""
    with _reading(path):
        opener = OPENERS.get(path.suffix.lower())
        if opener is not None:
            with opener(path) as file:
                text = file.read()
            return _without_mark(text.splitlines()), 0, len(text)
        with open(path, "rb") as file:
            size = file.seek(0, io.SEEK_END)

            def first_line_from(byte: int) -> int:
                if byte == 0:
                    return 0
                file.seek(byte - 1)
                file.readline()
                return file.tell()

            own = share(size, rank, ranks)
            begin, end = first_line_from(own.start), first_line_from(own.stop)
            file.seek(begin)
            lines = file.read(end - begin).splitlines()
            return lines if begin else _without_mark(lines), begin, size


def _first_line(path: Path) -> bytes:
    """The first line of a file, perhaps compressed, which must be of UTF-8, without the byte order mark and the end."""
    with _reading(path):
        with OPENERS.get(path.suffix.lower(), open)(path, "rb") as file:
            line = file.readline()
    if line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in line:
        raise UserError(f"data file {str(path)!r} is not UTF-8, but perhaps UTF-16: save it as UTF-8")
    return _without_mark([line])[0].rstrip(b"\r\n").split(b"\r")[0]


def _without_mark(lines: list[bytes]) -> list[bytes]:
    """Lines from the first one on, without the byte order mark of UTF-8."""
    if lines:
        lines[0] = lines[0].removeprefix(codecs.BOM_UTF8)
    return lines


def _parse(
    path: Path, begin: int, lines: list[bytes], parse: Callable[[list[bytes]], Any], complaint: Callable[[bytes], str]
) -> Any:
    """``parse(lines)``; if that raises ``ValueError``, a ``UserError`` with the number of the first line to blame.

    Lines before byte ``begin`` are counted only then.
    """
    try:
        return parse(lines)
    except ValueError as error:
        good, bad = 0, len(lines)  # the first bad line is among lines[good:bad]
        while bad - good > 1:
            middle = (good + bad) // 2
            try:
                parse(lines[good:middle])
                good = middle
            except ValueError:
                bad = middle
        number, left = good + 1, begin
        with _reading(path), open(path, "rb") as file:
            while left:
                block = file.read(min(left, 2**24))
                number, left = number + block.count(b"\n"), left - len(block)
        raise UserError(f"data file {str(path)!r}, line {number}: {complaint(lines[good])}") from error


class _Columns(NamedTuple):
    """Which columns of a csv file are features, in the order of the model, and which one the labels, if any."""

    has_header: bool
    features: list[int]
    label: int | None


def _columns(path: Path, names: list[str], known: Schema | None) -> _Columns:
    """What the fields of the first line, ``names`` if it is a header, say of the columns."""
    what, count = f"data file {str(path)!r}", len(names)
    if count < (2 if known is None else 1):
        raise UserError(
            f"{what}, line 1: {'one field' if names else 'nothing'}; expected features and a label, "
            "with commas, semicolons or tabs between"
        )
    called = [n for n, name in enumerate(names) if name.lower() in LABELS]
    if len(called) > 1:
        raise UserError(f"{what} has columns {names[called[0]]!r} and {names[called[1]]!r}; expected one of labels")
    places = {name: n for n, name in enumerate(known.columns or ())} if known else {}
    has_header = bool(called) or not any(map(is_number, names)) or (bool(places) and places.keys() <= set(names))
    first = {name: n for n, name in reversed(list(enumerate(names)))}
    again = next((n for n, name in enumerate(names) if first[name] < n), None)
    if has_header and again is not None:
        name = names[again]
        where = f"columns {first[name] + 1} and {again + 1}"
        raise UserError(f"{what} has a column {name!r} twice ({where}): name each column once")
    by_name = has_header and bool(places)
    label = called[0] if called else None
    if label is None and known is not None and by_name:
        label = names.index(known.label) if known.label in names else None
    elif label is None and (known is None or count == known.features + 1):
        label = count - 1
    features = [n for n in range(count) if n != label]
    if known is not None and by_name:
        found = {names[n] for n in features}
        if found != places.keys():
            other, missing = sorted(found - places.keys()), sorted(places.keys() - found)
            why = f"a column {other[0]!r}" if other else f"no column {missing[0]!r}"
            raise UserError(f"{what} has {why}; expected those of the training set: {listed(known.columns or ())}")
        features.sort(key=lambda n: places[names[n]])
    elif known is not None and len(features) != known.features:
        raise UserError(
            f"{what} has {count} columns; the model was trained on {known.features} features: expected as many, and "
            "perhaps a label"
        )
    return _Columns(has_header, features, label)


def _read_csv(path: Path, rank: int, ranks: int, known: Schema | None) -> Raw:
    """Numbers, and a label in one column.

    The first line tells the delimiter: the first of tab, semicolon, comma that occurs in it; and the number of columns.
    It is a header if it names a column of labels, or all those that are known, or if none of its fields is a number.
    Fields may be quoted, but hold no line ends.
    """
    head = _first_line(path)
    delimiter = next((mark for mark in "\t;," if mark.encode() in head), ",")

    def fields(line: bytes) -> list[str]:
        try:
            return [field.strip() for field in next(csv.reader([_text(line)], delimiter=delimiter), [])]
        except csv.Error:
            return []

    names = fields(head)
    has_header, features, label = _columns(path, names, known)
    lines, begin, size = _own_lines(path, rank, ranks)
    if begin == 0 and lines and has_header:
        lines[0] = b""
    # To predict, a column of labels may be there and empty: that can be said of a whole file, not of a share.
    empty = known is not None and ranks == 1 and label is not None and _is_empty(label, map(fields, lines))

    def parse(lines: list[bytes]) -> tuple[np.ndarray, np.ndarray | None]:
        known: dict[str, int] = {}

        def number_of(text: str) -> int:
            text = text.strip(" \t")
            if not is_label(text):
                raise ValueError(text)
            return known.setdefault(text, len(known))

        texts = [_text(line) for line in lines if line.strip()]
        if any(text.count('"') % 2 for text in texts):
            raise ValueError('"')  # the field would go on in the next line
        table = np.empty((0, len(names)))
        if texts:
            converters: dict[int | str, Callable[[str], int]] = {}
            if label is not None:
                converters[label] = (lambda text: 0) if empty else number_of
            table = np.loadtxt(texts, delimiter=delimiter, comments=None, converters=converters, quotechar='"', ndmin=2)
        if table.shape[1] != len(names) or not np.isfinite(table).all():
            raise ValueError(table.shape)
        x = np.take(table, features, axis=1)
        if label is None or empty:
            return x, None
        return x, np.array(list(known), np.str_)[table[:, label].astype(np.intp)]

    def complaint(line: bytes) -> str:
        found = fields(line)
        if _text(line).count('"') % 2:
            return "a quoted field does not end"
        if len(found) != len(names):
            return f"{len(found)} fields; expected {len(names)}, as in line 1"
        for n, field in enumerate(found):
            finite = bool(DECIMAL.fullmatch(field)) and math.isfinite(float(field))
            if not (finite if n != label else empty or is_label(field)):
                name = f"{names[n]!r}" if has_header else n + 1
                return f"{field!r} in column {name}; expected {'a label' if n == label else 'a finite number'}"
        return "cannot be read as numbers"

    x, y = _parse(path, begin, lines, parse, complaint)
    named = "" if label is None or not has_header else f", {names[label]!r}"
    layout = "no labels" if label is None else f"labels: column {label + 1} of {len(names)}{named}"
    layout += f"; line 1 is {'a header' if has_header else 'a sample'}"
    raw = Raw(x, y, verbatim=True, extent=size, layout=layout)
    if not has_header:
        return raw
    return raw._replace(columns=tuple(names[n] for n in features), label=None if label is None else names[label])


def _is_empty(column: int, rows: Iterable[list[str]]) -> bool:
    """Whether there is a row, and all have the column and nothing in it."""
    rows = filter(any, rows)
    first = next(rows, [])
    return len(first) > column and all(len(row) > column and not row[column] for row in chain([first], rows))


def listed(values: Sequence[Any]) -> str:
    """The first ones, and whether there are more."""
    return ", ".join(map(str, values[:9])) + (", ..." if len(values) > 9 else "")


def _text(line: bytes) -> str:
    """Whatever the bytes are, no two lines become the same text, and each can be written as it was."""
    return line.decode(errors="surrogateescape")


def is_label(text: str) -> bool:
    """Whether a field may be one: not what stands for a missing value, nor with a NUL, which NumPy drops at the end."""
    return bool(text) and "\0" not in text and not NOT_FINITE.fullmatch(text)


def is_number(text: str) -> bool:
    """Whether a field is a decimal number in ASCII, or ``nan``, or infinite; Python's ``float`` takes more."""
    return bool(DECIMAL.fullmatch(text) or NOT_FINITE.fullmatch(text))


def _read_svm(path: Path, rank: int, ranks: int) -> Raw:
    """Lines of ``label index:value index:value ...``, indices increasing; ``qid`` and comments are passed over."""
    from scipy.sparse import csr_array
    from sklearn.datasets import load_svmlight_file

    def parse(lines: list[bytes]) -> Raw:
        if not all(map(SVM_LINE.fullmatch, lines)):
            raise ValueError("not a number")
        # Not by the loader's own offset and length: where no line begins in a range, it reads one twice.
        try:
            x, y = load_svmlight_file(io.BytesIO(b"\n".join(lines)), zero_based=True)
        except OverflowError as error:
            raise ValueError(error) from error
        if not (np.isfinite(x.data).all() and (abs(y) < 2**53).all()):  # beyond, different integers would be equal
            raise ValueError("not finite")
        shape = (len(y), int(x.indices.max(initial=-1)) + 1)
        return Raw(csr_array((x.data, x.indices.astype(np.int32), x.indptr), shape=shape), y, verbatim=True)

    def complaint(line: bytes) -> str:
        shown = _text(line[:40]) + ("..." if len(line) > 40 else "")
        return (
            f"{shown!r}; expected 'label index:value index:value ...', finite numbers, increasing indices, and a label "
            "below 2^53"
        )

    _first_line(path)
    lines, begin, size = _own_lines(path, rank, ranks)
    return _parse(path, begin, lines, parse, complaint)._replace(extent=size)


# Data made up.

BLOCK = 256  # samples drawn together


def _read_powerlaw(source: str, rank: int, ranks: int) -> Raw:
    """``powerlaw``, or ``powerlaw:SAMPLESxFEATURES:NONZEROS``: sparse samples of two classes, in the likeness of RCV1.

    Like in RCV1's training set (20,242 news stories, 47,236 words, about 75 of them in each; Lewis et al., 2004):
    Zipf's law, the k-th word in proportion to 1 / (k + 10), in columns of no particular order; stories of different
    length; weights (1 + log occurrences) * log(1 + 1 / share of stories with the word), and rows of norm 1.  Unlike it:
    words come independently of each other, there are no topics, and the label is whether a linear function of the 256
    most frequent words is above its median, turned round for a twentieth of the samples; so no model is right in
    more than 95 %, but for luck, and one that learns from all words is less so.
    Sample n is the same whatever the number of samples and of ranks.
    """
    from scipy.sparse import csr_array, vstack

    fields = re.fullmatch(r"powerlaw(?::(\d+)x(\d+)(?::(\d+))?)?", source)
    if fields is None:
        raise UserError(
            f"{source!r}: expected powerlaw or powerlaw:SAMPLESxFEATURES or powerlaw:SAMPLESxFEATURES:NONZEROS"
        )
    samples, features = int(fields[1] or 20_242), int(fields[2] or 47_236)
    nonzeros = int(fields[3]) if fields[3] else max(1, min(75, features // 4))
    if not (1 <= samples < 2**53 and 4 <= features <= 2**24 and 1 <= nonzeros <= features // 4):
        raise UserError(
            f"{source!r}: expected at least 1 sample, 4 to {2**24} features, and 1 to {max(features // 4, 1)} nonzeros"
        )
    rng = np.random.default_rng([features, nonzeros])
    share_of_words = 1 / np.arange(11.0, features + 11)
    share_of_words /= share_of_words.sum()
    columns = rng.permutation(features)
    rule = np.zeros(features)
    rule[columns[:256]] = rng.normal(size=min(256, features))
    # How many words a story needs so that so many of them are different.
    words = np.geomspace(1, 1000 * features, 60)
    different = np.array([_at_least_one(share_of_words, n).sum() for n in words])
    weights = np.empty(features)
    weights[columns] = np.log1p(1 / _at_least_one(share_of_words, float(np.interp(nonzeros, different, words))))
    upto = np.cumsum(share_of_words)

    def block(number: int) -> tuple[Any, np.ndarray, np.ndarray]:
        """Samples, what the rule says of them, and whether the label is turned round."""
        rng = np.random.default_rng([features, nonzeros, number])
        wanted = nonzeros * np.exp(0.5 * rng.normal(size=BLOCK) - 0.125)  # its mean is nonzeros
        lengths = np.maximum(1, np.interp(wanted, different, words)).astype(np.int64)
        drawn = np.minimum(np.searchsorted(upto, rng.random(lengths.sum())), features - 1)
        cells, times = np.unique(np.repeat(np.arange(BLOCK), lengths) * features + columns[drawn], return_counts=True)
        row, column = cells // features, cells % features
        values = (1 + np.log(times)) * weights[column]
        values /= np.sqrt(np.bincount(row, values**2))[row]
        ends = np.cumsum(np.bincount(row, minlength=BLOCK))
        x = csr_array((values, column.astype(np.int32), np.append(0, ends).astype(np.int32)), shape=(BLOCK, features))
        return x, x @ rule, rng.random(BLOCK) < 0.05

    own = share(samples, rank, ranks)
    middle = np.median(block(0)[1])  # so that there are about as many of both classes
    xs, ys = [csr_array((0, features))], [np.empty(0, np.int64)]
    for number in range(own.start // BLOCK, -(-own.stop // BLOCK)):
        first = number * BLOCK
        here = slice(max(own.start - first, 0), min(own.stop - first, BLOCK))
        x, score, turned = block(number)
        xs.append(x[here])
        ys.append(((score > middle) ^ turned)[here].astype(np.int64))
    return Raw(csr_array(vstack(xs, format="csr")), np.concatenate(ys), extent=samples)


def _at_least_one(chances: np.ndarray, draws: float) -> np.ndarray:
    """The chance that each comes up among so many draws."""
    return -np.expm1(draws * np.log1p(-chances))
