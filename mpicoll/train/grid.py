"""Grids of ranks: data, pipe and tensor axes, and the text by which a user describes them."""

from math import gcd
from typing import Any, NamedTuple

from mpi4py import MPI

from ..errors import UserError
from ..mpi import launch
from ..mpi.comm import Comm

EXAMPLE = "data=2,pipe=2,tensor=2"


class Sizes(NamedTuple):
    """The number of ranks along each axis of a grid; or the place of a rank in it."""

    data: int
    pipe: int
    tensor: int

    def __str__(self) -> str:
        named = [f"{axis}={size}" for axis, size in self._asdict().items() if size > 1]
        return ",".join(named) or "data=1"

    @property
    def group(self) -> int:
        """The number of ranks over which a model is split."""
        return self.pipe * self.tensor


def sizes_of(text: str | None, ranks: int) -> Sizes:
    """Return the sizes of the grid that ``text`` describes, such as ``data=2,pipe=2,tensor=2``, in any order.

    An axis that is left out has one rank, except ``data``, which has the remaining ranks; without ``text`` all ranks
    are along ``data``.  Raises ``UserError`` unless the grid has exactly ``ranks`` ranks.
    """
    given: dict[str, int] = {}
    for part in (f"data={ranks}" if text is None else text).split(","):
        axis, _, number = (piece.strip() for piece in part.partition("="))
        if axis not in Sizes._fields:
            raise UserError(f"--grid has axes {', '.join(Sizes._fields)}, as {EXAMPLE}; got {axis!r}")
        if axis in given or not number.isdecimal() or int(number) < 1:
            raise UserError(f"--grid must give each axis at least 1 rank, and once, as {EXAMPLE}; got {text!r}")
        given[axis] = int(number)
    pipe, tensor = given.get("pipe", 1), given.get("tensor", 1)
    sizes = Sizes(given.get("data", max(ranks // (pipe * tensor), 1)), pipe, tensor)
    if sizes.data * sizes.group != ranks:
        shards = gcd(tensor, ranks)
        stages = gcd(pipe, ranks // shards)
        fits = Sizes(ranks // (shards * stages), stages, shards)
        raise UserError(
            f"--grid {text} is one of {sizes.data * sizes.group} rank(s), and there are {ranks}: take {fits}, or other "
            "axes with that product"
        )
    return sizes


class Grid:
    """The ranks of ``world`` as a grid of these ``sizes``; making it is a collective call.

    ``at`` is the place of this rank.  ``data``, ``pipe`` and ``tensor`` are communicators of the ranks along each axis,
    and ``group`` is a communicator of the ranks that hold a model together, stage by stage.  Ranks along ``tensor``,
    which exchange most, are consecutive, so that they are on one node if possible; then come those along ``data``, then
    those along ``pipe``.
    """

    def __init__(self, world: MPI.Intracomm, sizes: Sizes) -> None:
        self.world, self.sizes = world, sizes
        node = launch.node_of(world)
        nodes = world.allgather(node.bcast(world.rank))  # by the lowest rank there
        node.Free()
        place = sorted(range(world.size), key=lambda rank: (nodes[rank], rank)).index(world.rank)
        rest, tensor = divmod(place, sizes.tensor)
        pipe, data = divmod(rest, sizes.data)
        self.at = Sizes(data, pipe, tensor)

        def beside(color: int) -> Comm:
            made: Any = world.Split(color, place)
            return Comm(made, deterministic=True)

        self.data = beside(pipe * sizes.tensor + tensor)
        self.pipe = beside(data * sizes.tensor + tensor)
        self.tensor = beside(pipe * sizes.data + data)
        self.group = beside(data)

    @property
    def leads(self) -> bool:
        """Whether this rank writes files and reports for its group."""
        return self.at.pipe == self.at.tensor == 0

    def free(self) -> None:
        """Free the communicators; a collective call."""
        for comm in (self.data, self.pipe, self.tensor, self.group):
            comm.Free()
