"""The tasks to measure: a collective, its number of elements, in place or not."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..collective import COLLECTIVES, Collective
from ..errors import UserError


@dataclass(frozen=True)
class Task:
    """A collective to measure; ``count`` elements are the whole array, of which a rank may send or get a part."""

    collective: str
    count: int
    dtype: np.dtype
    op: str = "sum"
    root: int = 0

    @property
    def row(self) -> Collective:
        """Its row in the table of collectives."""
        return COLLECTIVES[self.collective]


def placements(task: Task, p: int, asked: Sequence[bool]) -> list[bool]:
    """Those of the ``asked`` placements, ``True`` for in place, that the collective has.

    Raises a ``UserError`` if nothing is left.
    """
    row = task.row
    if row.from_root and not row.parted:
        has, why = {True}, "bcast has one buffer, and so is in place"
    elif row.from_root:
        has, why = {False}, f"{task.collective} is measured with two buffers"
    elif row.reduces and row.parted and task.count % p:
        has, why = {False}, f"reduce_scatter in place is measured where {p} ranks get equal parts: MPICH 5 fails there"
    else:
        has, why = {False, True}, ""
    found = [one for one in asked if one in has]
    if not found:
        raise UserError(f"nothing to measure at {task.count} elements: {why}")
    return found
