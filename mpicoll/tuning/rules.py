"""The rules of ``algorithm="auto"``: which algorithms to prefer for an array of a given length."""

from collections.abc import Sequence
from typing import NamedTuple

from ..algorithms import ALGORITHMS

NATIVE, SHARED = "native", "shared"

GPU_PATHS = ("ipc", "nccl", "aware", "staged")
"""Paths of a call on arrays in the memory of GPUs (``mpi.gpu.devices``): what its algorithm may be beside those for
host memory, which are then used on what is staged there."""


class Rule(NamedTuple):
    """For arrays of up to ``up_to`` bytes (inclusive; ``None``: of any length) the algorithms in order of preference.

    The first of them that can do a call does it.  Bytes are those of the whole array.
    """

    up_to: int | None
    algorithms: tuple[str, ...]


Rules = dict[str, tuple[Rule, ...]]
"""Rules by collective: the first rule that an array is not too long for applies."""


def preferred(rules: Sequence[Rule], nbytes: int) -> tuple[str, ...]:
    """The algorithms for an array of ``nbytes`` bytes, the best first."""
    return next(rule.algorithms for rule in rules if rule.up_to is None or nbytes <= rule.up_to)


def can_do_all(collective: str, algorithm: str) -> bool:
    """Whether the algorithm can do every call of the collective.

    Native is never deterministic, and memory may not be shared.  All rows of the table that reduce in the canonical
    order keep the order of ranks too.
    """
    row = ALGORITHMS[collective].get(algorithm)
    return row is not None and (row.canonical or not row.reduces)
