"""Which algorithm: by what is equal on all ranks (count, dtype, operation, number of ranks), and by nothing else."""

from collections.abc import Callable
from operator import index
from typing import Literal, NamedTuple

import numpy as np
from mpi4py import MPI

from ..algorithms import ALGORITHMS, Algorithm, find
from .buffers import PAIRS, is_half
from .operations import Operation

LARGE = 8 << 20
"""Bytes from which on a ring's traffic in logarithmic rounds beats the MPI library's own; ``bench/allreduce.py``."""

PLAIN = {np.dtype(character): np.dtype(character).name for character in "bBhHiIlLqQfdgFDG"}
"""The dtypes that the MPI library can be given without another look, and their names: all numbers but 16-bit floats."""

SMALL = 32 << 10
"""Bytes up to which few rounds are worth sending whole vectors, among our own algorithms."""

SEGMENT = 128 << 10
"""Bytes of a pipelining algorithm's pieces: at least these, and not more pieces than ``MAX_SEGMENTS``."""
MAX_SEGMENTS = 32


SHARED_FROM = {
    "allreduce": 2 << 20 if MPI.get_vendor()[0] == "Intel MPI" else 512 << 10,
    "reduce": 1 << 20,
    "bcast": 4 << 20,
    "reduce_scatter": 1 << 20,
    "allgather": 4 << 20,
}
"""Bytes of the whole array from which on the MPI library's own is slower than memory that all ranks share, or, where
nothing is reduced, than arrays in it."""


ACROSS_FROM = 1 << 20
"""The same where there are several nodes."""


class Shared(NamedTuple):
    """In place of a row of the table: no schedule, but memory that the ranks share (``mpi.shared``)."""

    name: str = "shared"


SHARED = Shared()


class Options(NamedTuple):
    """How a call is to be made, beside what is to be reduced; see ``mpicoll.allreduce``."""

    algorithm: str = "auto"
    deterministic: bool = False
    segments: int | None = None
    wire: str | None = None


Preference = Literal["fastest", "native", "ours"]
"""What ``"auto"`` means: the fastest, the MPI library's own wherever it can do what is asked, or never that."""


OURS = {
    "allreduce": ("recursive_doubling", "circulant"),
    "reduce": ("tree", "double_tree"),
    "reduce_scatter": ("halving", "circulant"),
}
"""What is best of ours up to ``SMALL``, and above; ``CANONICAL`` and ``IN_ORDER`` are what is if the order matters."""
CANONICAL = {
    "allreduce": ("recursive_doubling", "halving_doubling"),
    "reduce": ("tree", "tree"),
    "reduce_scatter": ("halving", "halving"),
}
IN_ORDER = {**CANONICAL, "reduce": OURS["reduce"]}

FASTER = ("allreduce",)
"""The collectives in which ours are faster than the MPI library's own from ``LARGE`` on."""


def choose(
    collective: str,
    options: Options,
    count: int,
    dtype: np.dtype,
    operation: Operation,
    prefer: Preference = "fastest",
    shares: bool = False,
    spans: bool = False,
) -> Algorithm | Shared | None:
    """The row to use, ``None`` being the MPI library's own; ``shares`` says whether it can be done in memory that ranks
    share, ``spans`` whether that is on several nodes.

    Raises ``ValueError`` if the named one cannot do it.
    """
    algorithm, deterministic, segments, wire = options

    def names(which: Callable[[Algorithm], bool]) -> str:
        return ", ".join(name for name, row in ALGORITHMS[collective].items() if which(row))

    if segments is not None and algorithm in ("auto", "native"):
        pipelining = names(lambda row: "segments" in row.parameters)
        raise ValueError(f"segments are for a pipelining algorithm: name one, {pipelining}")
    nbytes = count * operation.carried(dtype).itemsize
    if algorithm == SHARED.name:
        if prefer != "fastest":
            raise ValueError("shared is for calls that wait: name another algorithm")
        if not shares:
            raise ValueError(
                f"shared cannot do this {collective} here: it needs two ranks or more that share memory, on every "
                "node, and between nodes it is for allreduce alone"
            )
        return SHARED
    if algorithm == "auto":
        native_can = not deterministic and not (is_half(dtype) and operation.reduces)
        ours_can = shares and prefer == "fastest" and operation.predefined and dtype not in PAIRS and wire is None
        if ours_can and (
            count * dtype.itemsize >= (ACROSS_FROM if spans else SHARED_FROM[collective]) or not native_can
        ):
            return SHARED
        slower = collective not in FASTER or nbytes < LARGE
        native_is_best = slower or not operation.predefined or dtype in PAIRS
        if native_can and (prefer == "native" or (prefer == "fastest" and native_is_best)):
            return None
        best = CANONICAL if deterministic else OURS if operation.commutes else IN_ORDER
        return find(collective, best[collective][nbytes > SMALL])
    if algorithm == "native":
        if deterministic:
            raise ValueError("native is not deterministic: expected " + names(lambda row: row.canonical))
        if is_half(dtype) and operation.reduces:
            raise ValueError(f"native does not add {dtype} as float32: expected auto, " + names(lambda row: True))
        return None
    row = find(collective, algorithm)
    if deterministic and not row.canonical:
        raise ValueError(f"{algorithm} is not deterministic: expected " + names(lambda row: row.canonical))
    if not operation.commutes and not row.rank_order:
        raise ValueError(
            f"{algorithm} adds in an order of its own, and the operation does not commute: expected "
            + names(lambda row: row.rank_order)
        )
    return row


def parameters(row: Algorithm | Shared | None, nbytes: int, root: int | None, segments: int | None) -> dict[str, int]:
    """What to tell the algorithm: the root, and the number of segments as given, or by the vector's length."""
    if not isinstance(row, Algorithm):
        return {}
    given = {} if root is None else {"root": root}
    if segments is not None:
        given["segments"] = index(segments)
    elif "segments" in row.parameters:
        given["segments"] = min(max(nbytes // (2 * SEGMENT), 1), MAX_SEGMENTS)
    return given
