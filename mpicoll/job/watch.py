"""A time limit for calls: a thread that makes no MPI call, so that it can tell what is wrong while MPI waits for ever.

The ranks of a node share a page, which each of these threads updates ten times a second: whether its rank is in a call,
in which, and since when.  When one finds that its rank has been in a call for too long, all report, in one order, and
the job ends with status ``TIMED_OUT``.  Nodes hear of each other in the folder for reports, if there is one: a file in
it is the alarm, and when that is gone again, the time to exit has come.
"""

import json
import mmap
import os
import struct
import sys
import threading
import time
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from mpi4py import MPI

from ..mpi import memory, record
from ..mpi.launch import node_of

TIMED_OUT = 124
"""The exit status of a job that a time limit has ended, as the command timeout has it."""

LIMIT = 600.0
"""Seconds that a call may take by default."""

TICK = 0.1
SILENT = 2.0  # seconds without an update until a rank is called silent
LEFT = 3.0  # seconds to wait in a call for a rank that has left the program
GRACE = 5.0  # seconds for all ranks to report
LAST = 0.3  # seconds from the account to the end
LOOK = 10  # ticks between two looks for an alarm on another node; the ranks of a node take turns

OUTSIDE, INSIDE, GONE, REPORTED, LET_GO = range(5)
_STATES = struct.Struct("=ddqqqq")  # when updated, since when, process, state, exit status, calls counted at the end
_MADE = struct.Struct("=Iq")  # communicator, how many calls
_TEXT = 448
_SLOT = _STATES.size + _TEXT + record.COUNTED * _MADE.size
_HEAD = 64
_ALARM, _DONE, _STATUS = 0, 8, 16  # in the head: the rank that raised the alarm, plus one; when to exit, in ms; and how


class Page:
    """What the ranks of this node know of each other, in memory that has no name, and so is never left behind."""

    def __init__(self, comm: MPI.Intracomm) -> None:
        node = node_of(comm)
        size = _HEAD + _SLOT * node.size
        # What does without /dev/shm, which may be full, and then ends whoever writes to it.
        page = memory.share(node, size, (memory.nameless, memory.temporary))
        ranks = node.allgather(comm.rank)
        node.Free()
        self.ranks = [comm.rank] if page is None else ranks  # those that cannot share it are nodes of their own
        self._memory = page or mmap.mmap(-1, size)
        self._slot = {rank: _HEAD + _SLOT * n for n, rank in enumerate(self.ranks)}

    def write(self, rank: int, since: float, state: int, text: str, status: int = 0) -> None:
        """One rank's part; ``status`` is what it has left with."""
        start, said = self._slot[rank], text.encode(errors="replace")[:_TEXT]
        self._memory[start + _STATES.size : start + _STATES.size + _TEXT] = said.ljust(_TEXT, b"\0")
        made = list(record.made.items()) if state == GONE else []
        for n, (among, number) in enumerate(made):
            _MADE.pack_into(self._memory, start + _STATES.size + _TEXT + n * _MADE.size, _hash(among), number)
        _STATES.pack_into(self._memory, start, time.monotonic(), since, os.getpid(), state, status, len(made))

    def read(self, rank: int) -> tuple[float, float, int, int, str]:
        """When it was updated, since when it is so, the process, the state, and the text."""
        start = self._slot[rank]
        said = self._memory[start + _STATES.size : start + _STATES.size + _TEXT].rstrip(b"\0")
        updated, since, process, state, *_ = _STATES.unpack_from(self._memory, start)
        return updated, since, process, state, said.decode(errors="replace")

    def has_missed(self, rank: int, entry: record.Entry) -> bool:
        """Has a rank that is gone not made this call?"""
        if not entry.where:
            return True  # none ends before all have begun it: that one has not
        start, (*_, counted) = self._slot[rank], _STATES.unpack_from(self._memory, self._slot[rank])
        first = start + _STATES.size + _TEXT
        made = dict(_MADE.iter_unpack(self._memory[first : first + counted * _MADE.size]))
        among, number = entry.counted
        return bool(made.get(_hash(among), number if counted == record.COUNTED else 0) < number)

    def status(self, rank: int) -> int:
        """What it has left with."""
        return int(_STATES.unpack_from(self._memory, self._slot[rank])[4])

    def get(self, where: int) -> int:
        """A number of the head."""
        return int.from_bytes(self._memory[where : where + 8], "little")

    def set(self, where: int, value: int) -> None:
        """The same, written."""
        self._memory[where : where + 8] = value.to_bytes(8, "little")


class Watch:
    """The thread of this rank; making it is a collective call."""

    def __init__(self, comm: MPI.Intracomm, limit: float, folder: Path | None) -> None:
        self.rank, self.size, self.limit, self.folder = comm.rank, comm.size, limit, folder
        self.page = Page(comm)
        self.elsewhere = sorted({*range(comm.size)} - {*self.page.ranks})
        self._job = comm.bcast(time.time_ns())
        self._found: dict[int, Any] = {}  # reports of other nodes
        self._since, self._stop = time.monotonic(), threading.Event()
        self._awake = self._since
        self._publish()
        comm.Barrier()
        self._thread = threading.Thread(target=self._run, name="mpicoll-watch", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Watch no longer."""
        self._leave(LET_GO, "is no longer watched")

    def leave(self, status: int = 0) -> None:
        """The same, because the program has come to its end on this rank.

        With a status that is not 0 others may be left waiting: then this is where to exit with them, not later, in MPI,
        from where the launcher would have to fetch it by a signal, and tell of that.
        """
        self._leave(GONE, "has left the program" + (f", with status {status}" if status else ""), status)
        if status:
            self._until(lambda: self.page.get(_ALARM) > 0 or self._all_are(GONE, LET_GO), LEFT + GRACE)
            if self.page.get(_ALARM):
                self._exit_together()

    def _leave(self, state: int, said: str, status: int = 0) -> None:
        self._stop.set()
        self._thread.join()
        self.page.write(self.rank, time.monotonic(), state, said, status)

    def _run(self) -> None:
        before, ticks = time.monotonic(), 0
        while not self._stop.wait(TICK):
            before, now, ticks = time.monotonic(), before, ticks + 1
            if before - now > SILENT:
                self._awake = before  # this process was stopped, as others may have been: time begins anew
            self._publish()
            reason = None if self.page.get(_ALARM) else self._reason()
            if reason:
                self.page.set(_ALARM, self.rank + 1)
                time.sleep(TICK)  # others may raise it at the same time; the last one tells
            elif ticks % (LOOK * len(self.page.ranks)) == LOOK * self.page.ranks.index(self.rank):
                self._listen()
            if self.page.get(_ALARM):
                self._report()
                if reason and self.page.get(_ALARM) == self.rank + 1 and self._raise_elsewhere(reason[1]):
                    self._tell(*reason)
                self._exit_together()

    def _publish(self) -> None:
        entry = record.current()
        if entry is not None:
            self.page.write(self.rank, entry.began, INSIDE, f"in {entry}")
            return
        last = record.calls[-1] if record.calls else None
        since, text = (last.ended or last.began, f", after {last}") if last else (self._since, "")
        self.page.write(self.rank, since, OUTSIDE, f"in no call{text}")

    def _reason(self) -> tuple[str, int] | None:
        """Why to end the job, and with which status."""
        entry, now = record.current(), time.monotonic()
        if entry is None:
            return None
        began = max(entry.began, self._awake)
        for rank in entry.ranks:
            if rank != self.rank and rank in self.page.ranks:
                _, since, _, state, _ = self.page.read(rank)
                if state == GONE and now - max(since, began) > LEFT and self.page.has_missed(rank, entry):
                    return f"rank {rank}, which this call needs, is gone", self.page.status(rank) or TIMED_OUT
        return (f"time limit of {self.limit:g} s", TIMED_OUT) if now - began > self.limit else None

    @property
    def _alarm(self) -> Path | None:
        """Where nodes hear of each other."""
        return self.folder / f"alarm-{self._job}" if self.folder and self.elsewhere else None

    def _listen(self) -> None:
        """Is there an alarm on another node?"""
        if self._alarm:
            with suppress(OSError):  # listed, not just looked for: a file system may remember that there was none
                if self._alarm.name in os.listdir(self._alarm.parent):
                    self._follow(self._alarm)

    def _follow(self, alarm: Path) -> None:
        with suppress(OSError, ValueError):
            self.page.set(_STATUS, int(alarm.read_text()))
        self.page.set(_ALARM, self.size + 1)

    def _raise_elsewhere(self, status: int) -> bool:
        """Raise the alarm on other nodes; false if one of them was faster, and tells."""
        if self._alarm:
            try:
                self._alarm.parent.mkdir(parents=True, exist_ok=True)
                with self._alarm.open("x") as file:
                    file.write(str(status))
            except FileExistsError:
                self._follow(self._alarm)
                return False
            except OSError:
                pass  # said where a report cannot be written
        return True

    def _end_elsewhere(self) -> None:
        if self._alarm:
            with suppress(OSError):
                self._alarm.unlink()

    def collect(self, status: int) -> None:
        """Have all ranks report, because this one is about to end the job with that status."""
        self._stop.set()
        if threading.current_thread() is not self._thread:
            self._thread.join()
        if not self.page.get(_ALARM):
            self.page.set(_ALARM, self.rank + 1)
        raised = self._raise_elsewhere(status)
        self._report()
        self._until(self._all_have_reported, GRACE)
        if raised:
            self._end_elsewhere()

    def _report(self) -> None:
        _, since, _, _, text = self.page.read(self.rank)
        said = f"{text}, at {record.here()}"
        if self.folder is not None:
            facts = {"rank": self.rank, "size": self.size, "job": self._job}
            try:
                record.write(self.folder, {**facts, "seconds": time.monotonic() - since, "said": said})
            except OSError as error:
                print(f"mpicoll: rank {self.rank} cannot write its report: {error}", file=sys.stderr, flush=True)
                self.folder = None
        self.page.write(self.rank, since, REPORTED, said)

    def _all_are(self, *states: int) -> bool:
        return all(self.page.read(rank)[3] in states for rank in self.page.ranks)

    def _all_have_reported(self) -> bool:
        return self._all_are(REPORTED, GONE, LET_GO) and len(self._reports_elsewhere()) == len(self.elsewhere)

    def _reports_elsewhere(self) -> dict[int, Any]:
        """What ranks of other nodes have reported."""
        for rank in self.elsewhere:
            if self.folder is not None and rank not in self._found:
                with suppress(OSError, ValueError, TypeError, KeyError):
                    report = json.loads((self.folder / f"rank-{rank}.json").read_text())
                    if report["job"] == self._job:
                        self._found[rank] = report
        return self._found if self.folder else dict.fromkeys(self.elsewhere)

    def _tell(self, reason: str, status: int) -> None:
        self._until(self._all_have_reported, GRACE)
        entry = record.current()
        print(f"mpicoll: {reason}: rank {self.rank} is in {entry}\n{self.account()}", file=sys.stderr, flush=True)
        self._end_elsewhere()
        self.page.set(_STATUS, status)
        self.page.set(_DONE, int((time.monotonic() + LAST) * 1e3))

    def _exit_together(self) -> None:
        """At the time that whoever tells has set: the launcher kills the others when the first has left."""
        self._until(self._is_told, 2 * GRACE)
        flush()
        at = self.page.get(_DONE) / 1e3 or time.monotonic() + LAST
        time.sleep(max(at - time.monotonic(), 0))
        os._exit(self.page.get(_STATUS) or TIMED_OUT)

    def _is_told(self) -> bool:
        if self.page.get(_ALARM) > self.size and self._alarm:
            return not self._alarm.exists()
        return self.page.get(_DONE) > 0

    def account(self) -> str:
        """A line for each rank of this node, and where to read more."""
        now = time.monotonic()
        rows = []
        for rank in self.page.ranks:
            updated, since, process, state, text = self.page.read(rank)
            if state in (GONE, LET_GO):
                pass
            elif not _lives(process):
                text = f"is dead; was {text}"
            elif now - updated > SILENT and state != REPORTED:
                text = f"{'stopped' if _is_stopped(process) else 'silent'} for {now - updated:.1f} s; was {text}"
            rows.append(f"  rank {rank:<5} {now - since:8.1f} s  {text}")
        rows += self._account_elsewhere()
        if self.folder is not None:
            rows.append(f"  more: mpicoll report {self.folder}; stacks: {self.folder}/rank-*.txt")
        return "\n".join(rows)

    def _account_elsewhere(self) -> list[str]:
        """A line for ranks that say the same, and one for those that say nothing."""
        if not self.elsewhere:
            return []
        if self.folder is None:
            return [f"  {record.named(self.elsewhere)}: on other nodes, seen in reports only (MPICOLL_REPORT=FOLDER)"]
        same: dict[str, list[int]] = {}
        reports = self._reports_elsewhere()
        for rank, report in reports.items():
            same.setdefault(report["said"], []).append(rank)
        rows = [
            f"  {record.named(ranks):<10} {max(reports[rank]['seconds'] for rank in ranks):8.1f} s  {said}"
            for said, ranks in same.items()
        ]
        if missing := [rank for rank in self.elsewhere if rank not in reports]:
            rows.append(f"  {record.named(missing)}: on other nodes, and nothing of them in {self.folder}")
        return rows

    @staticmethod
    def _until(condition: Callable[[], bool], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not condition() and time.monotonic() < deadline:
            time.sleep(TICK / 2)


def _hash(name: str) -> int:
    return zlib.crc32(name.encode())


def flush() -> None:
    """What the program has printed, before the process ends without looking back; but not for ever."""

    def both() -> None:
        for stream in (sys.stdout, sys.stderr):
            with suppress(Exception):
                stream.flush()

    thread = threading.Thread(target=both, daemon=True)
    thread.start()
    thread.join(1)


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True


def _is_stopped(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] in "Tt"
    except (OSError, IndexError):
        return False
