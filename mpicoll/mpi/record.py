"""The flight record: what this process has called lately, kept in memory, to be told when something goes wrong."""

import sys
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import get_ident
from time import monotonic
from typing import Any

KEPT = 256
"""Calls; older ones are forgotten."""

PACKAGE = str(Path(__file__).parents[1])


class Entry:
    """A call: what it is, on which communicator, when it began and ended, and how far it has come."""

    __slots__ = ("began", "call", "ended", "ranks", "round", "what", "where")

    def __init__(self, what: Any, where: str = "", ranks: tuple[int, ...] = (), call: int = 0) -> None:
        self.what, self.where, self.ranks, self.call = what, where, ranks, call
        self.round: int | None = None
        self.began, self.ended = monotonic(), 0.0

    def __str__(self) -> str:
        what = self.what if isinstance(self.what, str) else "; ".join(map(str, self.what))
        number = f"call {self.call} on {self.where}, " if self.call else f"{self.where}, " if self.where else ""
        return f"{number}{what}" + ("" if self.round is None else f", round {self.round}")


calls: deque[Entry] = deque(maxlen=KEPT)
"""The last ones, the latest at the end."""

inside: dict[int, Entry] = {}
"""Those that have not ended, by thread."""


def begin(entry: Entry) -> None:
    """This thread is in a call from now on."""
    calls.append(entry)
    inside[get_ident()] = entry


def end() -> None:
    """And no more."""
    entry = inside.pop(get_ident(), None)
    if entry is not None:
        entry.ended = monotonic()


@contextmanager
def during(what: str, state: Any = None) -> Iterator[None]:
    """A call, unless this thread is in one already."""
    if get_ident() in inside:
        yield
        return
    begin(Entry(what, state.name, state.world) if state else Entry(what))
    try:
        yield
    finally:
        end()


def current() -> Entry | None:
    """The call that has been going on for longest."""
    return min(list(inside.values()), key=lambda entry: entry.began, default=None)


def site(frame: Any) -> str:
    """Where a program calls us: the file and line nearest to ``frame`` that is not our own."""
    while frame.f_back is not None and frame.f_code.co_filename.startswith(PACKAGE):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


def lines() -> list[str]:
    """The record, for people: one line a call, with seconds before now."""
    now = monotonic()
    found = []
    for entry in list(calls):
        took = f"took {entry.ended - entry.began:.6f} s" if entry.ended else "has not ended"
        found.append(f"{entry.began - now:12.6f} s  {took:>20}  {entry}")
    return found


def here() -> str:
    """Where the main thread is now."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    return site(frame) if frame is not None else "?"
