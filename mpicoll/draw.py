"""A schedule as text: ranks across, rounds down."""

from .interpreter import lockstep, span
from .schedule import Recv, Round, Schedule, Send, Verb

LEGEND = "[2]→1 sends chunk 2 to rank 1; [2]←1 receives it from rank 1, [2]+←1 and adds it to its own; [4..1] wraps"


def text(schedule: Schedule) -> str:
    """The picture, one line a round; ``LEGEND`` explains the cells.  Scratch buffers are a, b, ..."""
    table = [[_cell(schedule, round_) for round_ in rounds] for rounds in lockstep(schedule)]
    heads = [f"rank {rank}" for rank in range(schedule.p)]
    widths = [max(map(len, column)) for column in zip(heads, *table, strict=True)]
    rows = [("round", heads), *((f"{t:5}", cells) for t, cells in enumerate(table))]
    return "\n".join(" │ ".join((label, *map(str.ljust, cells, widths))).rstrip() for label, cells in rows)


def _cell(schedule: Schedule, round_: Round) -> str:
    sends = [f"{_buffer(send)}{span(schedule, send)}→{send.peer}" for send in round_.sends]
    recvs = [f"{_buffer(recv)}{span(schedule, recv)}{_SIGNS[recv.verb]}{recv.peer}" for recv in round_.recvs]
    return "  ".join(sends + recvs) or "idle"


_SIGNS = {Verb.COPY: "←", Verb.REDUCE_BELOW: "+←", Verb.REDUCE_ABOVE: "+←"}


def _buffer(part: Send | Recv) -> str:
    return "abcdefghijklmnopqrstuvwxyz"[part.buffer - 1] if part.buffer else ""
