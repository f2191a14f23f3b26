"""Data: read and checked on rank 0, split, scaled, and shared with all ranks."""

import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
from mpi4py import MPI

from ..errors import UserError
from ..mpi.guard import on_root

TEST_EVERY = 5
"""Unless the file brings a test set of its own, every fifth sample (4, 9, 14, ... counted from 0) is held out."""

BROADCAST_BYTES = 2**28  # a message; counts past 2^31 fail on some MPIs


class Raw(NamedTuple):
    """What a source holds, checked: ``x`` (samples, features), finite; ``y`` (samples,) classes from 0."""

    x: np.ndarray
    y: np.ndarray | None
    x_test: np.ndarray | None = None
    y_test: np.ndarray | None = None


class Scaling(NamedTuple):
    """Features become (x - center) / spread; ``fit`` makes the training set span 2 in each, with mean zero."""

    center: np.ndarray
    spread: np.ndarray

    @classmethod
    def fit(cls, x: np.ndarray) -> "Scaling":
        """The scaling that suits these samples; a constant feature becomes zero."""
        low, high = np.float64(x.min(axis=0)), np.float64(x.max(axis=0))
        spread = high / 2 - low / 2
        return cls(x.mean(axis=0, dtype=np.float64), np.where(spread > 0, spread, 1.0))

    def apply(self, x: np.ndarray, dtype: np.dtype) -> np.ndarray:
        """Scaled samples, a new array."""
        return np.ascontiguousarray((x - self.center) / self.spread, dtype)


class Dataset(NamedTuple):
    """Scaled samples, the same on all ranks."""

    x: np.ndarray
    y: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    classes: int
    scaling: Scaling


def load(source: str, comm: MPI.Intracomm, dtype: np.dtype) -> Dataset:
    """The data set, on every rank; whatever is wrong with it is one ``UserError``, raised by every rank."""
    arrays: list[np.ndarray] = []

    def prepare() -> tuple[int, list[tuple[tuple[int, ...], np.dtype]]]:
        data = _prepare(source, comm.size, dtype)
        arrays.extend([data.x, data.y, data.x_test, data.y_test, *data.scaling])
        return data.classes, [(array.shape, array.dtype) for array in arrays]

    classes, kinds = on_root(comm, prepare)
    if comm.rank:
        arrays.extend(np.empty(shape, kind) for shape, kind in kinds)
    for array in arrays:
        raw = array.reshape(-1).view(np.uint8)
        for start in range(0, len(raw), BROADCAST_BYTES):
            comm.Bcast(raw[start : start + BROADCAST_BYTES], root=0)
    x, y, x_test, y_test, center, spread = arrays
    return Dataset(x, y, x_test, y_test, classes, Scaling(center, spread))


def read(source: str) -> Raw:
    """``digits``, or an ``.npz`` file with ``X``, ``y`` (which predictions can do without) and perhaps ``X_test``
    and ``y_test``."""
    if source == "digits":
        return _read_digits()
    arrays = _open_npz(source)
    if ("X_test" in arrays) != ("y_test" in arrays):
        raise UserError(f"data file {source!r} has only one of 'X_test' and 'y_test'; expected both or neither")
    checked: dict[str, np.ndarray] = {}
    for name in ("X", "X_test"):
        if name in arrays:
            checked[name] = _samples(f"data file {source!r}: {name}", arrays[name])
    for name in ("y", "y_test"):
        if name in arrays:
            checked[name] = _labels(f"data file {source!r}: {name}", arrays[name], checked[name.replace("y", "X")])
    if "X_test" in checked and checked["X_test"].shape[1] != checked["X"].shape[1]:
        raise UserError(
            f"data file {source!r}: X_test has {checked['X_test'].shape[1]} features, X has {checked['X'].shape[1]}"
        )
    return Raw(checked["X"], checked.get("y"), checked.get("X_test"), checked.get("y_test"))


def _read_digits() -> Raw:
    """The 1,797 handwritten digits, 8 x 8 pixels of 0..16, that scikit-learn ships (UCI's optdigits test set)."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UserError("the digits come with scikit-learn: pip install 'mpicoll[train]'") from error
    x, y = load_digits(return_X_y=True)
    return Raw(x, y)


def _open_npz(path: str) -> dict[str, np.ndarray]:
    """The arrays named X, y, X_test and y_test; a ``UserError`` that lists what there is if X is not among them."""
    if not Path(path).exists():
        raise UserError(f"data file {path!r} does not exist; expected 'digits' or an .npz file")
    if not Path(path).is_file():
        raise UserError(f"data file {path!r} is not a file")
    try:
        if not zipfile.is_zipfile(path):
            raise UserError(f"data file {path!r} is not an .npz file, or only the beginning of one")
        with np.load(path, allow_pickle=False) as file:
            names, arrays = list(file), {name: file[name] for name in ("X", "y", "X_test", "y_test") if name in file}
    except UserError:
        raise
    except Exception as error:  # a foreign or torn file fails in any way that zipfile, zlib and NumPy know
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"data file {path!r} cannot be read as an .npz file of plain arrays: {reason}") from error
    if "X" not in arrays:
        listed = ", ".join(map(repr, names[:9])) + (", ..." if len(names) > 9 else "")
        raise UserError(f"data file {path!r} has no array 'X' (samples x features); it has {listed or 'none'}")
    for name, array in arrays.items():
        if not isinstance(array, np.ndarray):  # NumPy returns what it does not know as bytes
            raise UserError(f"data file {path!r}: {name} is not an array")
    return arrays


def _samples(what: str, x: np.ndarray) -> np.ndarray:
    if x.dtype.kind not in "biuf":
        raise UserError(f"{what} has dtype {x.dtype}; expected real numbers")
    if x.ndim < 2 or not x.size:
        raise UserError(f"{what} has shape {x.shape}; expected samples x features, at least one of each")
    x = x.reshape(len(x), -1)
    bad = np.argwhere(~np.isfinite(x))
    if len(bad):
        sample, feature = bad[0]
        more = f" (and in {len(bad) - 1} more places)" if len(bad) > 1 else ""
        where = f"sample {sample}, feature {feature}{more}"
        raise UserError(f"{what} holds {x[sample, feature]} at {where}; expected finite numbers")
    return x


def _labels(what: str, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    if y.ndim == 0 or y.shape not in ((len(y),), (len(y), 1)):
        raise UserError(f"{what} has shape {y.shape}; expected one label per sample")
    y = y.reshape(-1)
    if len(y) != len(x):
        raise UserError(f"{what} has {len(y)} labels for {len(x)} samples; expected one each")
    if y.dtype.kind not in "biuf":
        raise UserError(f"{what} has dtype {y.dtype}; expected integers, 0 for the first class")
    limit = np.iinfo(np.int64).max
    bad = np.flatnonzero(~((y >= 0) & (y < limit) & (y == np.floor(y))))  # catches NaN as well
    if len(bad):
        raise UserError(f"{what} holds {y[bad[0]]} at sample {bad[0]}; expected integers, 0 for the first class")
    return y.astype(np.int64)


def _prepare(source: str, ranks: int, dtype: np.dtype) -> Dataset:
    raw = read(source)
    if raw.y is None:
        raise UserError(f"data file {source!r} has no array 'y': training needs a label for each sample")
    x, y, x_test, y_test = raw.x, raw.y, raw.x_test, raw.y_test
    classes = int(y.max()) + 1
    if classes > max(len(y), 2):
        raise UserError(f"{source!r}: y holds {y.max()}, more classes than samples; number the classes 0, 1, 2, ...")
    if y_test is not None and y_test.max() >= classes:
        raise UserError(f"{source!r}: y_test holds {y_test.max()}, y only classes 0 to {classes - 1}")
    if x_test is None or y_test is None:
        held_out = np.arange(len(x)) % TEST_EVERY == TEST_EVERY - 1
        x, y, x_test, y_test = x[~held_out], y[~held_out], x[held_out], y[held_out]
    if len(x) < ranks:
        raise UserError(f"{source!r} has {len(x)} training samples for {ranks} ranks; start at most {len(x)} ranks")
    with np.errstate(all="ignore"):  # what overflows is reported below
        scaling = Scaling.fit(x)
        scaled, scaled_test = scaling.apply(x, dtype), scaling.apply(x_test, dtype)
    if not (np.isfinite(scaled).all() and np.isfinite(scaled_test).all()):
        raise UserError(f"{source!r} has features that overflow {dtype} when scaled; make the values smaller")
    return Dataset(scaled, y, scaled_test, y_test, classes, scaling)
