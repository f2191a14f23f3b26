"""Sparse matrices on a GPU."""

from typing import Any

import numpy as np

from .array import cupy


def to_device(x: Any) -> Any:
    """A copy of a sparse matrix on the current device, by rows (CSR), with no element stored twice.

    CuPy's matrices hold floats only; others become the floats that they are multiplied as.
    """
    from cupyx.scipy.sparse import csr_matrix

    x = x.tocsr().astype(np.result_type(x.dtype, np.float32), copy=False)
    asarray = cupy().asarray
    made = csr_matrix((asarray(x.data), asarray(x.indices), asarray(x.indptr)), shape=x.shape)
    made.sum_duplicates()  # or each product would look for them
    return made
