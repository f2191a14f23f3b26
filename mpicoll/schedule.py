"""Schedules: algorithms as data, rounds of transfers that know nothing of arrays or MPI.

The vector is cut into ``chunks``; a chunk keeps its number wherever it goes.  A generator yields the
rounds of *one* rank, lazily, and nothing here builds the other ranks' unless a reader asks for them.

The rules every reader relies on, and the verifier proves:

* All ranks yield the same number of rounds; a rank with nothing to do yields an empty ``Round``.
* Messages between two ranks are matched in order within a round, and cover the same chunks.  Both sides know
  whether what travels is final.
* Sends read what was held before the round.  Within a round no copy lands on chunks that are sent,
  copied to or reduced into; several reductions into a chunk are combined in the order they are listed.
* A schedule that mixes does nothing else, and with the whole vector: all that mixes in a round, a rank's own share
  included, which it sends to itself, replaces it by the weighted sum.
* Reducing is always op(lower group of ranks, higher group), so that both partners of an exchange compute
  the same bits, and operations that do not commute come out right where groups are contiguous.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

MIX = "mix"
"""What the ``collective`` of a schedule is that mixes vectors instead of doing one of the table's."""


class ScheduleError(Exception):
    """A schedule is wrong; the text names the round, the ranks and the chunks."""


class Verb(Enum):
    """What a receive does with the data that arrive."""

    COPY = "copy"  # mine = arriving
    REDUCE_BELOW = "reduce below"  # mine = op(arriving, mine): it arrives from the lower group of ranks
    REDUCE_ABOVE = "reduce above"  # mine = op(mine, arriving): it arrives from the higher group of ranks
    MIX = "mix"  # mine = weight * arriving, and what else mixes, added in the order listed


class Send(NamedTuple):
    """Send chunks [lo, hi) to ``peer``; ``hi`` may pass the number of chunks: the range then wraps.

    ``buffer`` 0 is the user's vector, 1.. are scratch vectors of the same layout.  A rank may send to
    itself, which moves data between its buffers and is no message.  ``final`` says that the peer copies
    into its vector and nothing is added any more: the data may travel in the precision of the result.
    """

    peer: int
    lo: int
    hi: int
    buffer: int = 0
    final: bool = False


class Recv(NamedTuple):
    """Receive chunks [lo, hi) from ``peer`` into ``buffer``, as ``verb`` says; ``weight`` is for mixing."""

    peer: int
    lo: int
    hi: int
    verb: Verb = Verb.COPY
    buffer: int = 0
    weight: float = 1.0


class Round(NamedTuple):
    """The transfers of one rank in one round: all of them may happen at once."""

    sends: tuple[Send, ...] = ()
    recvs: tuple[Recv, ...] = ()


@dataclass(frozen=True)
class Schedule:
    """An algorithm for ``p`` ranks: ``rounds(rank)`` yields that rank's rounds."""

    collective: str
    name: str
    p: int
    chunks: int
    rounds: Callable[[int], Iterable[Round]]
    scratch: int = 0
    root: int = 0

    def __str__(self) -> str:
        return f"{self.name} {self.collective}, p={self.p}"

    @property
    def mixes(self) -> bool:
        """Whether the schedule mixes the vectors of ranks, instead of doing a collective."""
        return self.collective == MIX


def reduce(rank: int, peer: int, lo: int, hi: int, buffer: int = 0) -> Recv:
    """Return a reducing receive in rank order: the lower rank's data are the lower operand."""
    verb = Verb.REDUCE_BELOW if peer < rank else Verb.REDUCE_ABOVE
    return Recv(peer, lo, hi, verb, buffer)


def is_final(recv: Recv) -> bool:
    """Whether a receive takes a finished result: the value that the peer's ``Send.final`` must have."""
    return recv.verb is Verb.COPY and recv.buffer == 0


def chunk_start(count: int, chunk: int, chunks: int) -> int:
    """The first of ``count`` elements that belongs to ``chunk``; ``chunk == chunks`` gives the end.

    Lengths differ by one at most; with fewer elements than chunks some are empty.
    """
    return count * chunk // chunks


def pieces(lo: int, hi: int, chunks: int) -> list[tuple[int, int]]:
    """The one or two contiguous ranges that make up [lo, hi) modulo ``chunks``."""
    if hi <= chunks:
        return [(lo, hi)]
    return [(lo, chunks), (0, hi - chunks)]
