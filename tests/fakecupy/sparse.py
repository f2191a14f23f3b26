"""Sparse matrices, of cupyx.scipy.sparse."""

from collections.abc import Callable
from typing import Any

import numpy as np

from .arrays import array, call, ndarray


class _Sparse:
    """What SciPy computes of its like, when the stream gets there.  The host waits to know how many values there are,
    and whether a place is there twice."""

    format: str

    def __init__(self, arg1: Any, shape: Any, canonical: bool | None = None) -> None:
        self.data, self.indices, self.indptr = arg1
        self.shape, self._canonical, self.dtype, self.nnz = tuple(shape), canonical, self.data.dtype, self.data.size

    @property
    def has_canonical_format(self) -> bool:
        if self._canonical is None:
            self._canonical = bool(self._computed(lambda matrix: np.array(matrix.has_canonical_format)))
        return self._canonical

    def sum_duplicates(self) -> None:
        if not self.has_canonical_format:
            self.data, self.indices, self.indptr = self._computed(lambda matrix: _summed(matrix.copy()), waits=True)
            self.nnz, self._canonical = self.data.size, True

    def __matmul__(self, other: Any) -> Any:
        if not isinstance(other, ndarray):
            return NotImplemented
        if other.dtype != self.dtype:
            raise ValueError(f"products are of one dtype here, not {self.dtype} and {other.dtype}")
        self.sum_duplicates()
        return self._computed(lambda matrix, dense: np.asfortranarray(matrix @ dense), other)

    def _computed(self, how: Callable[..., Any], *args: ndarray, waits: bool = False) -> Any:
        from scipy import sparse

        kind, shape = getattr(sparse, f"{self.format}_array"), self.shape

        def function(data: np.ndarray, indices: np.ndarray, indptr: np.ndarray, *args: np.ndarray) -> Any:
            if min(indices.min(initial=0), indptr.min()) < 0:
                raise RuntimeError("a sparse matrix was looked at before it was there")
            return how(kind((data, indices, indptr), shape=shape), *args)

        return call(function, (self.data, self.indices, self.indptr, *args), {}, waits=waits)


def _parts(matrix: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return matrix.data, matrix.indices, matrix.indptr


def _summed(matrix: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    matrix.sum_duplicates()
    return _parts(matrix)


class csc_matrix(_Sparse):  # noqa: N801
    format = "csc"


class csr_matrix(_Sparse):  # noqa: N801
    format = "csr"

    def __init__(self, arg1: Any, shape: Any = None, dtype: Any = None, copy: bool = False) -> None:
        if not all(isinstance(x, ndarray) and x.ndim == 1 for x in arg1):
            raise ValueError("data, indices, and indptr must be 1-D cupy arrays")
        data, *indices = arg1
        if data.dtype.char not in "?fdFD":
            raise ValueError("Only bool, float32, float64, complex64 and complex128 are supported")
        if indices[1][-1].get() > data.size:
            raise ValueError("last index pointer exceeds the size of data/indices")
        super().__init__((data, *(x.astype(np.int32) for x in indices)), shape)

    @property
    def T(self) -> csc_matrix:  # noqa: N802
        return csc_matrix((self.data, self.indices, self.indptr), self.shape[::-1], self._canonical)

    def __getitem__(self, rows: Any) -> "csr_matrix":
        """Of rows in a slice, or an array."""
        if isinstance(rows, slice):
            rows = array(np.arange(*rows.indices(self.shape[0])))
        made = object.__new__(csr_matrix)
        parts = self._computed(lambda matrix, rows: _parts(matrix[rows]), rows, waits=True)
        _Sparse.__init__(made, parts, (rows.size, self.shape[1]), self._canonical)
        return made
