"""The flight record: what this process has called lately, kept in memory, to be told when something goes wrong."""

import faulthandler
import json
import sys
import threading
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from threading import Lock, get_ident
from time import monotonic
from typing import Any
from weakref import WeakSet

from ..files import replace, to_json

KEPT = 256
"""Calls; older ones are forgotten."""

COUNTED = 256
"""Communicators whose calls are counted, twice if some are compared and some are not; later ones are not."""

HERE = str(Path(__file__).parent)


class Entry:
    """A call: what it is, on which communicator, when it began and ended, and how far it has come.

    ``ranks`` are those that make it as well, ``call`` is its number on the communicator, if it is compared, and
    ``uncompared`` that among the others of these ranks.
    """

    __slots__ = ("began", "call", "ended", "ranks", "round", "uncompared", "what", "where")

    def __init__(self, what: Any, where: str = "", ranks: tuple[int, ...] = (), call: int = 0) -> None:
        self.what, self.where, self.ranks, self.call = what, where, ranks, call
        self.uncompared = 0
        self.round: int | None = None
        self.began, self.ended = monotonic(), 0.0

    @property
    def shown(self) -> str:
        """What it is, in words."""
        return self.what if isinstance(self.what, str) else "; ".join(map(str, self.what))

    @property
    def counted(self) -> tuple[str, int]:
        """Among which calls, and as which of them; 0 if it is not counted."""
        return (self.where, self.call) if self.call else (f"{self.where}, not compared", self.uncompared)

    def __str__(self) -> str:
        numbered = f"call {self.call} on {self.where}, {self.shown}" if self.call else self.shown
        place = f" on {self.where}" if self.where and not self.call else ""
        return f"{numbered}{place}" + ("" if self.round is None else f", round {self.round}")


calls: deque[Entry] = deque(maxlen=KEPT)
"""The last ones that Python made, the latest at the end; ``recorded`` has those of the compiled part as well."""

inside: dict[int, Entry] = {}
"""Those that have not ended, by thread."""

made: dict[str, int] = {}
"""How many calls that other ranks make as well have begun, by communicator: those compared, and those not."""


def begin(entry: Entry) -> None:
    """This thread is in a call from now on."""
    calls.append(entry)
    inside[get_ident()] = entry
    if entry.call:
        if entry.where in made or len(made) < COUNTED:
            made[entry.where] = entry.call
    elif entry.ranks and entry.where:
        among, _ = entry.counted
        if among in made or len(made) < COUNTED:
            made[among] = entry.uncompared = made.get(among, 0) + 1


def end() -> None:
    """And no more."""
    entry = inside.pop(get_ident(), None)
    if entry is not None:
        entry.ended = monotonic()


class during:  # noqa: N801  (a class: a generator would take a microsecond more)
    """A call, unless this thread is in one already."""

    __slots__ = ("entry",)

    def __init__(self, what: str, state: Any = None, ranks: tuple[int, ...] = ()) -> None:
        already = get_ident() in inside
        self.entry = None if already else Entry(what, state.name) if state else Entry(what, ranks=ranks)

    def __enter__(self) -> None:
        if self.entry is not None:
            begin(self.entry)

    def __exit__(self, *error: object) -> None:
        if self.entry is not None:
            end()


class Source:
    """The calls on a communicator that the compiled part makes, and keeps a record of, by itself."""

    def __init__(self, native: Any, where: str, ranks: tuple[int, ...]) -> None:
        self.native, self.where, self.ranks = native, where, ranks
        self.seen = self.not_compared = 0
        self.open: Entry | None = None  # the latest that was seen, if it had not ended

    def refresh(self) -> list[Entry]:
        """The calls since the last time; of the one that had not ended then, how it ended."""
        recent, self.seen = self.native.recent(self.seen - (self.open is not None))
        found = []
        for what, call, began, ended in recent:
            entry, self.open = self.open, None
            if entry is None or entry.call != call:
                if entry is not None:  # it has, and the ring has forgotten it
                    entry.ended = began
                entry = Entry(what, self.where, self.ranks, call)
                found.append(entry)
            entry.began, entry.ended = began, ended
            if not ended:
                self.open = entry
        return found


_sources: WeakSet[Source] = WeakSet()
_compiled: deque[Entry] = deque(maxlen=KEPT)
_refreshing = Lock()


def follow(native: Any, where: str, ranks: tuple[int, ...]) -> Source | None:
    """Have the calls of a communicator that the compiled part makes in the record, as long as what is returned is."""
    if native is None:
        return None
    source = Source(native, where, ranks)
    _sources.add(source)
    return source


def refresh() -> None:
    """Bring the record up to date: who reads it calls this first."""
    with _refreshing:
        found: list[Entry] = []
        for source in list(_sources):
            found += source.refresh()
            if source.native.calls and (source.where in made or len(made) < COUNTED):
                made[source.where] = source.native.calls
            more, source.not_compared = source.native.not_compared - source.not_compared, source.native.not_compared
            among = f"{source.where}, not compared"
            if more and (among in made or len(made) < COUNTED):
                made[among] = made.get(among, 0) + more
        _compiled.extend(sorted(found, key=_began))


def _began(entry: Entry) -> float:
    return entry.began


def recorded() -> list[Entry]:
    """The last calls, the latest at the end."""
    refresh()
    return sorted([*calls, *_compiled], key=_began)[-KEPT:]


def clear() -> None:
    """Forget all calls so far."""
    refresh()
    calls.clear()
    _compiled.clear()


def counted() -> dict[str, int]:
    """``made``, up to date."""
    refresh()
    return made


def latest() -> Entry | None:
    """The call that began last."""
    return max(recorded(), key=_began, default=None)


def current() -> Entry | None:
    """The call that has been going on for longest."""
    refresh()
    open_ = [source.open for source in list(_sources) if source.open is not None]
    return min([*inside.values(), *open_], key=lambda entry: entry.began, default=None)


def site(frame: Any) -> str:
    """Where a program calls this package: its file and line; where it is, if it is elsewhere."""
    outer = frame
    while outer is not None and not outer.f_code.co_filename.startswith(HERE):
        outer = outer.f_back  # NumPy's, called by ours, or all of them the program's
    while outer is not None and outer.f_code.co_filename.startswith(HERE):
        outer = outer.f_back
    found = outer or frame
    return f"{found.f_code.co_filename}:{found.f_lineno}"


def write(folder: Path, facts: dict[str, Any]) -> None:
    """This rank's part of a report: its calls, for ``compare``, and the stacks of its threads.

    ``facts`` are its ``rank``, the ``size`` of the job, the number of the ``job``, and whatever else is to be told.
    """
    folder.mkdir(parents=True, exist_ok=True)
    now = monotonic()
    known = [
        {
            "communicator": entry.where,
            "ranks": entry.ranks,
            "call": entry.call,
            "what": entry.shown,
            "round": entry.round,
            "began": entry.began - now,
            "ended": entry.ended - now if entry.ended else None,
        }
        for entry in recorded()
    ]
    name = f"rank-{facts['rank']}"
    with (folder / f"{name}.txt").open("w") as file:
        faulthandler.dump_traceback(file)
    replace(folder / f"{name}.json", to_json({**facts, "calls": known}))


def compare(folder: Path) -> list[str]:
    """What the reports of all ranks of the latest job say, in lines; a ``ValueError`` if there are none."""
    try:
        found = [_read(path) for path in sorted(folder.glob("rank-*.json"))]
        if not found:
            raise ValueError(f"{str(folder)!r} holds no report: expected files rank-0.json, rank-1.json, ...")
        latest = max(report["job"] for report in found)  # files of earlier jobs may lie beside
        reports = {report["rank"]: report for report in found if report["job"] == latest}
        size = max(report["size"] for report in reports.values())
        made: dict[str, dict[int, dict[int, Any]]] = {}  # communicator -> call -> rank -> the call there
        members: dict[str, list[int]] = {}
        for rank, report in reports.items():
            for call in report["calls"]:
                if call["call"]:
                    made.setdefault(call["communicator"], {}).setdefault(call["call"], {})[rank] = call
                    members[call["communicator"]] = call["ranks"]
    except (KeyError, TypeError, AttributeError):
        raise ValueError(f"{str(folder)!r} holds files that are no reports") from None
    missing = sorted(set(range(size)) - set(reports))
    told = [f"{len(reports)} of {size} ranks reported" + (f"; nothing of {named(missing)}" if missing else "")]
    for communicator, numbers in made.items():
        told.append(f"{communicator}, {named(members[communicator])}:")
        told += _differences(numbers, [rank for rank in members[communicator] if rank in reports])
    return told


def _differences(made: dict[int, dict[int, Any]], members: list[int]) -> list[str]:
    """From the first call that is not the same, and complete, on all ranks."""
    newest = {rank: max((number for number, by in made.items() if rank in by), default=0) for rank in members}
    oldest = max(min((number for number, by in made.items() if rank in by), default=0) for rank in members)
    same, told = [], []
    for number in sorted(made):
        by = made[number]
        whats = {rank: call["what"] for rank, call in by.items()}
        behind = [rank for rank in members if rank not in by and newest[rank] < number]
        open_ = [rank for rank, call in by.items() if call["ended"] is None]
        if number < oldest:
            continue  # some ranks have forgotten it
        if not behind and not open_ and len(set(whats.values())) == 1:
            same.append(number)
            continue
        for what in dict.fromkeys(whats.values()):
            ranks = [rank for rank in whats if whats[rank] == what]
            waiting = [rank for rank in ranks if rank in open_]
            since = f" ({named(waiting)} for {-min(by[rank]['began'] for rank in waiting):.1f} s)" if waiting else ""
            told.append(f"  call {number}: {what}: {named(ranks)}{since}")
        if behind:
            told.append(f"  call {number}: not made by {named(behind)}")
    head = f"  calls {same[0]} to {same[-1]} match on all" if same else "  no call in common"
    return [head, *told]


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{str(path)!r} cannot be read: {error}") from None


def named(ranks: Iterable[int]) -> str:
    """``ranks 0-2, 5``"""
    spans: list[list[int]] = []
    for rank in sorted(ranks):
        if spans and spans[-1][1] + 1 == rank:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    many = len(spans) > 1 or (spans and spans[0][0] != spans[0][1])
    listed = ", ".join(str(lo) if lo == hi else f"{lo}-{hi}" for lo, hi in spans)
    return f"{'ranks' if many else 'rank'} {listed}"


def here() -> str:
    """Where the main thread is now."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    return site(frame) if frame is not None else "?"
