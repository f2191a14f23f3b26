"""A schedule as text: ranks across, rounds down."""

from .interpreter import lockstep
from .schedule import Round, Schedule, Verb

LEGEND = "[2]→1 sends chunk 2 to rank 1; [2]←1 receives it from rank 1, [2]+←1 and adds it to its own; [4..1] wraps"


def text(schedule: Schedule) -> str:
    """The picture, one line a round; ``LEGEND`` explains the cells."""
    table = [[_cell(schedule, round_) for round_ in rounds] for rounds in lockstep(schedule)]
    heads = [f"rank {rank}" for rank in range(schedule.p)]
    widths = [max(map(len, column)) for column in zip(heads, *table, strict=True)]
    rows = [("round", heads), *((f"{t:5}", cells) for t, cells in enumerate(table))]
    return "\n".join(" │ ".join((label, *map(str.ljust, cells, widths))).rstrip() for label, cells in rows)


def _cell(schedule: Schedule, round_: Round) -> str:
    sends = [f"{_chunks(schedule, send.lo, send.hi)}→{send.peer}" for send in round_.sends]
    recvs = [
        f"{_chunks(schedule, recv.lo, recv.hi)}{'' if recv.verb is Verb.COPY else '+'}←{recv.peer}"
        for recv in round_.recvs
    ]
    return "  ".join(sends + recvs) or "idle"


def _chunks(schedule: Schedule, lo: int, hi: int) -> str:
    last = (hi - 1) % schedule.chunks
    return f"[{lo}]" if hi == lo + 1 else f"[{lo}..{last}]"
