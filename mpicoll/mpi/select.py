"""Which algorithm: by what is equal on all ranks (count, dtype, operation, number of ranks), and by nothing else."""

from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np

from ..algorithms import ALGORITHMS, Algorithm, find
from .buffers import PAIRS, is_half
from .operations import Operation

LARGE = 8 << 20
"""Bytes from which on a ring's traffic in logarithmic rounds beats the MPI library's own; ``bench/allreduce.py``."""

PLAIN = frozenset(np.dtype(character).num for character in "bBhHiIlLqQfdgFDG")
"""Numbers of the dtypes that the MPI library can be given without another look: all numbers but 16-bit floats."""

SMALL = 32 << 10
"""Bytes up to which few rounds are worth sending whole vectors, among our own algorithms."""

SEGMENT = 128 << 10
"""Bytes of a pipelining algorithm's pieces: at least these, and not more pieces than ``MAX_SEGMENTS``."""
MAX_SEGMENTS = 32


class Options(NamedTuple):
    """How a call is to be made, beside what is to be reduced; see ``mpicoll.allreduce``."""

    algorithm: str = "auto"
    deterministic: bool = False
    segments: int | None = None
    wire: str | None = None


Preference = Literal["fastest", "native", "ours"]
"""What ``"auto"`` means: the fastest, the MPI library's own wherever it can do what is asked, or never that."""


def choose(
    options: Options, count: int, dtype: np.dtype, operation: Operation, prefer: Preference = "fastest"
) -> Algorithm | None:
    """The row to use for an allreduce, ``None`` being the MPI library's own.

    Raises ``ValueError`` if the named one cannot do it.
    """
    algorithm, deterministic, segments, _ = options
    if segments is not None and algorithm in ("auto", "native"):
        raise ValueError(
            f"segments are for a pipelining algorithm: name one, {_names(lambda row: bool(row.parameters))}"
        )
    nbytes = count * operation.carried(dtype).itemsize
    if algorithm == "auto":
        native_can = not deterministic and not is_half(dtype)
        native_is_best = nbytes < LARGE or not operation.predefined or dtype in PAIRS
        if native_can and (prefer == "native" or (prefer == "fastest" and native_is_best)):
            return None
        if nbytes <= SMALL:
            return find("allreduce", "recursive_doubling")
        return find("allreduce", "halving_doubling" if deterministic or not operation.commutes else "circulant")
    if algorithm == "native":
        if deterministic:
            raise ValueError("native is not deterministic: expected " + _names(lambda row: row.canonical))
        if is_half(dtype):
            raise ValueError(f"native does not add {dtype} as float32: expected auto, " + _names(lambda row: True))
        return None
    row = find("allreduce", algorithm)
    if deterministic and not row.canonical:
        raise ValueError(f"{algorithm} is not deterministic: expected " + _names(lambda row: row.canonical))
    if not operation.commutes and not row.rank_order:
        raise ValueError(
            f"{algorithm} adds in an order of its own, and the operation does not commute: expected "
            + _names(lambda row: row.rank_order)
        )
    return row


def parameters(row: Algorithm | None, nbytes: int, segments: int | None) -> dict[str, int]:
    """What to tell the algorithm: the number of segments as given, or by the vector's length."""
    if segments is not None and row is not None:
        return {"segments": segments}
    if row is not None and "segments" in row.parameters:
        return {"segments": min(max(nbytes // (2 * SEGMENT), 1), MAX_SEGMENTS)}
    return {}


def _names(which: Callable[[Algorithm], bool]) -> str:
    return ", ".join(name for name, row in ALGORITHMS["allreduce"].items() if which(row))
