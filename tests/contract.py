"""Data and checks that the contract tests of all collectives share."""

from typing import Any

import numpy as np
from mpi4py import MPI


def own_data(count: int, rank: int, dtype: Any = np.float64) -> np.ndarray:
    """Different on every rank and at every index; small integers, so that sums are exact in any dtype."""
    return ((np.arange(count) * 7 + rank * 3) % 5 + rank % 2).astype(dtype)


def guarded(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A copy of ``values``, and the larger array it lies in."""
    around = np.full(len(values) + 16, 77, values.dtype)
    around[8:-8] = values
    return around[8:-8], around


def assert_untouched(around: np.ndarray) -> None:
    guard = np.full(8, 77, around.dtype)
    assert around[:8].tobytes() == around[-8:].tobytes() == guard.tobytes()


def composition() -> MPI.Op:
    """Composing maps z -> a z + b, kept as a + bi: an operation that does not commute.  To be freed."""

    def compose(lower: Any, higher: Any, datatype: MPI.Datatype) -> None:
        first, second = (np.frombuffer(memory, np.complex128) for memory in (lower, higher))
        second[:] = first.real * second + 1j * first.imag

    return MPI.Op.Create(compose, commute=False)


def maps(count: int, ranks: int) -> tuple[list[np.ndarray], np.ndarray]:
    """Such maps for every rank, and their composition in rank order."""
    own = [own_data(count, rank) % 2 + 1 + 1j * own_data(count, rank) for rank in range(ranks)]
    composed = own[0]
    for following in own[1:]:
        composed = composed.real * following + 1j * composed.imag
    return own, composed
