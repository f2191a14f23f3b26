"""The scaling of features, which the training set decides."""

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from mpi4py import MPI

if TYPE_CHECKING:
    from scipy.sparse import csr_array


class Scaling(NamedTuple):
    """The scaling (x - center) / spread of features; ``fit`` gives the training set mean 0 and range 2."""

    center: np.ndarray
    spread: np.ndarray

    @classmethod
    def fit(cls, x: "np.ndarray | csr_array", comm: MPI.Intracomm = MPI.COMM_SELF) -> "Scaling":
        """Return the scaling for the samples of all ranks; a collective call.  A constant feature becomes zero.

        Sparse samples are not scaled, since they would not stay sparse.
        """
        samples, features = x.shape
        if not isinstance(x, np.ndarray):
            return cls.none(features)
        low, high, mean = np.full(features, np.inf), np.full(features, -np.inf), np.zeros(features)
        if samples:
            low, high = x.min(axis=0).astype(np.float64), x.max(axis=0).astype(np.float64)
            mean = x.sum(axis=0, dtype=np.float64)
        comm.Allreduce(MPI.IN_PLACE, low, MPI.MIN)
        comm.Allreduce(MPI.IN_PLACE, high, MPI.MAX)
        comm.Allreduce(MPI.IN_PLACE, mean, MPI.SUM)
        mean /= comm.allreduce(samples)
        spread = high / 2 - low / 2
        return cls(mean, np.where(spread > 0, spread, 1.0))

    @classmethod
    def none(cls, features: int) -> "Scaling":
        """Return the scaling that changes nothing."""
        return cls(np.zeros(features), np.ones(features))

    def apply(self, x: "np.ndarray | csr_array", dtype: np.dtype) -> Any:
        """Return scaled samples, a new array; sparse samples stay sparse if they need not be centred."""
        if not isinstance(x, np.ndarray):
            if not self.center.any():
                return type(x)(x.multiply(1 / self.spread), dtype=dtype)
            x = x.toarray()
        scaled = np.empty(x.shape, dtype)
        for first in range(0, len(x), 4096):  # so that not all of them are needed in float64
            rows = slice(first, first + 4096)
            scaled[rows] = (x[rows] - self.center) / self.spread
        return scaled
