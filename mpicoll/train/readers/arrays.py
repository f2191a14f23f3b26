"""Arrays X, y, X_test and y_test from .npz, .npy and IDX files, and the digits of scikit-learn.

Where files are mapped, only the rank's own rows are touched.
"""

import gzip
import io
import math
import zipfile
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from ...errors import UserError, listed, reason
from .opening import reading
from .raw import Raw, share


def read_digits() -> Raw:
    """The 1,797 handwritten digits, 8 x 8 pixels of 0..16, that scikit-learn ships (UCI's optdigits test set)."""
    found = find_spec("sklearn")  # not imported: that takes twenty times as long as reading the file
    path = Path(found.submodule_search_locations[0] if found and found.submodule_search_locations else "")
    path /= "datasets/data/digits.csv.gz"
    if not path.is_file():
        raise UserError("the digits come with scikit-learn: pip install 'mpicoll[train]'")
    with reading(path):
        table = np.loadtxt(path, delimiter=",")
    x, y = np.ascontiguousarray(table[:, :-1]), table[:, -1].astype(np.int64)
    return Raw(x, y, extent=len(y))


def read_npz(path: Path, rank: int, ranks: int) -> Raw:
    """This rank's share of an .npz file with the arrays X and perhaps y, X_test and y_test."""
    return _checked(f"data file {str(path)!r}", _open_npz(path), rank, ranks)


def read_npy(folder: Path, rank: int, ranks: int) -> Raw:
    """This rank's share of a folder with X.npy and perhaps y.npy, X_test.npy and y_test.npy."""
    return _checked(f"data folder {str(folder)!r}", _map_npy(folder), rank, ranks)


def read_idx(folder: Path, rank: int, ranks: int) -> Raw:
    """This rank's share of a folder of IDX files, named as MNIST's are."""
    arrays = {name: _map_idx_file(path) for name, path in idx_files(folder).items() if path is not None}
    return _checked(f"data folder {str(folder)!r}", arrays, rank, ranks)


def _open_npz(path: Path) -> dict[str, np.ndarray]:
    """The arrays named X, y, X_test and y_test; without X, a ``UserError`` that lists the names in the file."""
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


def idx_files(folder: Path) -> dict[str, Path | None]:
    """The four files under their usual names, ``None`` if missing; where both exist, the uncompressed one."""

    def find(name: str) -> Path | None:
        return next((path for path in (folder / name, folder / f"{name}.gz") if path.exists()), None)

    return {
        "X": find("train-images-idx3-ubyte"),
        "y": find("train-labels-idx1-ubyte"),
        "X_test": find("t10k-images-idx3-ubyte"),
        "y_test": find("t10k-labels-idx1-ubyte"),
    }


IDX_TYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


def _map_idx_file(path: Path) -> np.ndarray:
    """An array of LeCun's IDX format, big endian: two zero bytes, the type, the number of dimensions, each of them."""
    what = f"data file {str(path)!r}"
    with reading(path):
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
