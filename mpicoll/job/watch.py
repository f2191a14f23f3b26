"""A time limit for calls, kept by a thread that makes no MPI call: it can report what is wrong while MPI waits forever.

The ranks of a node share a page, which each of these threads updates ten times a second: whether its rank is in a call,
in which, and since when.  A thread that finds its rank in a call for too long raises the alarm; all ranks report, that
one prints the account, and the job ends with status ``TIMED_OUT``.  Nodes communicate through the folder for reports,
if there is one: a file in it is the alarm, and when that file is removed it is time to exit.
"""

import json
import mmap
import os
import struct
import sys
import threading
import time
import zlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from mpi4py import MPI

from ..mpi import memory, record
from ..mpi.launch import node_of

TIMED_OUT = 124
"""Exit status of a job that a time limit has ended; the command ``timeout`` uses the same."""

LIMIT = 600.0
"""Default time limit of a call, in seconds."""

TICK = 0.1
SILENT = 2.0  # seconds without an update until a rank is called silent
LEFT = 3.0  # seconds to wait in a call for a rank that has left the program
GRACE = 5.0  # seconds for all ranks to report
LAST = 0.3  # seconds from the account to the end
LISTEN = 10  # ticks between two checks for an alarm on another node; the ranks of a node take turns

_FOLDER = str(Path(__file__).parent)

OUTSIDE, INSIDE, GONE, REPORTED, LET_GO = range(5)
_STATES = struct.Struct("=ddqqqq")  # when updated, since when, process, state, exit status, calls counted at the end
_MADE = struct.Struct("=Iq")  # communicator, how many calls
_TEXT = 448
_SLOT = _STATES.size + _TEXT + record.COUNTED * _MADE.size
_HEAD = 64
ALARM, DONE, STATUS = 0, 8, 16  # where in the head: the rank that raised the alarm, plus one; when to exit, in ms; how


class Clock(Protocol):
    """What a watch needs of the module ``time``."""

    def monotonic(self) -> float:
        """Return the time now, in seconds."""

    def sleep(self, seconds: float, /) -> None:
        """Wait for ``seconds``."""


class Page:
    """What the ranks of a node know of each other: a row for each, and what concerns all.

    ``ranks`` are those of the node, and ``memory`` has ``page_bytes`` of their number, all zero at first.
    """

    def __init__(self, ranks: list[int], memory: mmap.mmap | bytearray) -> None:
        self.ranks, self._memory = ranks, memory
        self._slot = {rank: _HEAD + _SLOT * n for n, rank in enumerate(ranks)}

    def write(
        self,
        rank: int,
        now: float,
        since: float,
        state: int,
        text: str,
        status: int = 0,
        made: Mapping[str, int] | None = None,
        process: int | None = None,
    ) -> None:
        """Write the row of a rank.

        One that has left the program says with which ``status``, and how many calls it has ``made``, by communicator.
        ``process`` is this one unless it is given.
        """
        start, said = self._slot[rank], text.encode(errors="replace")[:_TEXT]
        self._memory[start + _STATES.size : start + _STATES.size + _TEXT] = said.ljust(_TEXT, b"\0")
        counts = list((made or {}).items())
        for n, (among, number) in enumerate(counts):
            _MADE.pack_into(self._memory, start + _STATES.size + _TEXT + n * _MADE.size, _hash(among), number)
        process = os.getpid() if process is None else process
        _STATES.pack_into(self._memory, start, now, since, process, state, status, len(counts))

    def read(self, rank: int) -> tuple[float, float, int, int, str]:
        """Return when the row was updated, since when it is so, the process, the state, and the text."""
        start = self._slot[rank]
        said = self._memory[start + _STATES.size : start + _STATES.size + _TEXT].rstrip(b"\0")
        updated, since, process, state, *_ = _STATES.unpack_from(self._memory, start)
        return updated, since, process, state, said.decode(errors="replace")

    def has_missed(self, rank: int, entry: record.Entry) -> bool:
        """Tell whether a rank that has left the program has not made this call."""
        if not entry.where:
            return True  # it ends on no rank before all have begun it: that one has not
        start, (*_, counted) = self._slot[rank], _STATES.unpack_from(self._memory, self._slot[rank])
        first = start + _STATES.size + _TEXT
        made = dict(_MADE.iter_unpack(self._memory[first : first + counted * _MADE.size]))
        among, number = entry.counted
        return bool(made.get(_hash(among), number if counted == record.COUNTED else 0) < number)

    def status(self, rank: int) -> int:
        """Return the exit status of a rank that has left the program."""
        return int(_STATES.unpack_from(self._memory, self._slot[rank])[4])

    def get(self, where: int) -> int:
        """Read one of the numbers that concern all: ``ALARM``, ``DONE`` or ``STATUS``."""
        return int.from_bytes(self._memory[where : where + 8], "little")

    def set(self, where: int, value: int) -> None:
        """Write one of the numbers that concern all."""
        self._memory[where : where + 8] = value.to_bytes(8, "little")


def page_bytes(ranks: int) -> int:
    """Return the bytes that the page of ``ranks`` takes."""
    return _HEAD + _SLOT * ranks


def shared_page(comm: MPI.Intracomm) -> Page:
    """Make the page of this node, in memory that has no name, and so is never left behind; a collective call.

    Ranks that cannot share memory have a page each.
    """
    node = node_of(comm)
    # Not in /dev/shm, which may be full: whoever writes to it then is ended.
    shared = memory.share(node, page_bytes(node.size), (memory.nameless, memory.temporary))
    ranks = node.allgather(comm.rank)
    node.Free()
    return Page([comm.rank], mmap.mmap(-1, page_bytes(1))) if shared is None else Page(ranks, shared)


def start_watch(comm: MPI.Intracomm, limit: float, folder: Path | None) -> "Watch":
    """Watch the calls of this rank from now on, in a thread; a collective call."""
    watch = Watch(shared_page(comm), comm.rank, comm.size, comm.bcast(time.time_ns()), limit, folder)
    watch.publish()
    comm.Barrier()
    watch.begin()
    return watch


class Watch:
    """Ends the job when a call of this rank takes too long, or waits for a rank that has left the program.

    ``job`` is a number that all ranks of the job have in common, and no other job, ``limit`` the seconds that a call
    may take, and ``folder`` that for reports.
    """

    def __init__(
        self, page: Page, rank: int, size: int, job: int, limit: float, folder: Path | None, clock: Clock = time
    ) -> None:
        self.page, self.rank, self.size, self.limit, self.folder = page, rank, size, limit, folder
        self.elsewhere = sorted({*range(size)} - {*page.ranks})
        self._job, self._clock = job, clock
        self._found: dict[int, Any] = {}  # reports of other nodes
        self._since = self._awake = self._looked = clock.monotonic()
        self._looks = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="mpicoll-watch", daemon=True)

    def begin(self) -> None:
        """Start the thread."""
        self._looked = self._clock.monotonic()
        self._thread.start()

    def stop(self) -> None:
        """Watch no longer."""
        self._leave(LET_GO, "is no longer watched")

    def leave(self, status: int = 0) -> None:
        """Watch no longer, because the program has come to its end on this rank.

        With a status that is not 0 other ranks may be left waiting.  Then this rank exits here, together with them, and
        not later inside MPI, where the launcher would have to end it by a signal, and would print that.
        """
        self._leave(GONE, "has left the program" + (f", with status {status}" if status else ""), status)
        if status:
            self._until(lambda: self.page.get(ALARM) > 0 or self._all_are(GONE, LET_GO), LEFT + GRACE)
            if self.page.get(ALARM):
                os._exit(self._end())

    def _leave(self, state: int, said: str, status: int = 0) -> None:
        self._stop_thread()
        now = self._clock.monotonic()
        self.page.write(self.rank, now, now, state, said, status, record.counted() if state == GONE else None)

    def _stop_thread(self) -> None:
        self._stop.set()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(TICK):
            status = self.look()
            if status is not None:
                os._exit(status)

    def look(self) -> int | None:
        """Look at the page once, ten times a second: return the exit status if the job is to end, else ``None``."""
        before, self._looked, self._looks = self._looked, self._clock.monotonic(), self._looks + 1
        if self._looked - before > SILENT:
            self._awake = self._looked  # this process was stopped, as others may have been: time begins anew
        self.publish()
        reason = None if self.page.get(ALARM) else self._reason()
        if reason:
            self.page.set(ALARM, self.rank + 1)
            self._clock.sleep(TICK)  # others may raise it at the same time; the last one prints the account
        elif self._looks % (LISTEN * len(self.page.ranks)) == LISTEN * self.page.ranks.index(self.rank):
            self._listen()
        if not self.page.get(ALARM):
            return None
        self._report()
        if reason and self.page.get(ALARM) == self.rank + 1 and self._raise_elsewhere(reason[1]):
            self._tell(*reason)
        return self._end()

    def publish(self) -> None:
        """Write the row of this rank: the call that it is in, or the last one that it was in."""
        entry, now = record.current(), self._clock.monotonic()
        if entry is not None:
            self.page.write(self.rank, now, entry.began, INSIDE, f"in {entry}")
            return
        last = record.latest()
        since, text = (last.ended or last.began, f", after {last}") if last else (self._since, "")
        self.page.write(self.rank, now, since, OUTSIDE, f"in no call{text}")

    def _reason(self) -> tuple[str, int] | None:
        """Return why to end the job, and with which exit status; ``None`` if there is no reason to."""
        entry, now = record.current(), self._clock.monotonic()
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
        """The file by which nodes hear of each other; none if there is one node, or no folder."""
        return self.folder / f"alarm-{self._job}" if self.folder and self.elsewhere else None

    def _listen(self) -> None:
        """Follow the alarm of another node, if there is one."""
        if self._alarm:
            with suppress(OSError):  # listed, not just looked for: a file system may remember that there was none
                if self._alarm.name in os.listdir(self._alarm.parent):
                    self._follow(self._alarm)

    def _follow(self, alarm: Path) -> None:
        with suppress(OSError, ValueError):
            self.page.set(STATUS, int(alarm.read_text()))
        self.page.set(ALARM, self.size + 1)

    def _raise_elsewhere(self, status: int) -> bool:
        """Raise the alarm on other nodes; return false if one of them was faster, and prints the account."""
        if self._alarm:
            try:
                self._alarm.parent.mkdir(parents=True, exist_ok=True)
                with self._alarm.open("x") as file:
                    file.write(str(status))
            except FileExistsError:
                self._follow(self._alarm)
                return False
            except OSError:
                pass  # reported where a report cannot be written
        return True

    def _end_elsewhere(self) -> None:
        if self._alarm:
            with suppress(OSError):
                self._alarm.unlink()

    def collect(self, status: int) -> None:
        """Have all ranks report, because this one is about to end the job with that status."""
        self._stop_thread()
        if not self.page.get(ALARM):
            self.page.set(ALARM, self.rank + 1)
        raised = self._raise_elsewhere(status)
        self._report()
        self._until(self._all_have_reported, GRACE)
        if raised:
            self._end_elsewhere()

    def _report(self) -> None:
        _, since, _, _, text = self.page.read(self.rank)
        said = f"{text}, at {_here()}"
        if self.folder is not None:
            facts = {"rank": self.rank, "size": self.size, "job": self._job}
            try:
                record.write(self.folder, {**facts, "seconds": self._clock.monotonic() - since, "said": said})
            except OSError as error:
                print(f"mpicoll: rank {self.rank} cannot write its report: {error}", file=sys.stderr, flush=True)
                self.folder = None
        self.page.write(self.rank, self._clock.monotonic(), since, REPORTED, said)

    def _all_are(self, *states: int) -> bool:
        return all(self.page.read(rank)[3] in states for rank in self.page.ranks)

    def _all_have_reported(self) -> bool:
        return self._all_are(REPORTED, GONE, LET_GO) and len(self._reports_elsewhere()) == len(self.elsewhere)

    def _reports_elsewhere(self) -> dict[int, Any]:
        """Return what ranks of other nodes have reported, by rank."""
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
        self.page.set(STATUS, status)
        self.page.set(DONE, int((self._clock.monotonic() + LAST) * 1e3))

    def _end(self) -> int:
        """Wait for the time to exit, which the rank that prints the account sets, and return the exit status.

        All exit at that time, because the launcher kills the others when the first has left.
        """
        self._until(self._is_told, 2 * GRACE)
        flush()
        at = self.page.get(DONE) / 1e3 or self._clock.monotonic() + LAST
        self._clock.sleep(max(at - self._clock.monotonic(), 0))
        return self.page.get(STATUS) or TIMED_OUT

    def _is_told(self) -> bool:
        if self.page.get(ALARM) > self.size and self._alarm:
            return not self._alarm.exists()
        return self.page.get(DONE) > 0

    def account(self) -> str:
        """Return a line for each rank of this node, lines for those of other nodes, and where to read more."""
        now = self._clock.monotonic()
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
        """Return a line for ranks that say the same, and one for those that say nothing."""
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

    def _until(self, condition: Callable[[], bool], seconds: float) -> None:
        deadline = self._clock.monotonic() + seconds
        while not condition() and self._clock.monotonic() < deadline:
            self._clock.sleep(TICK / 2)


def _hash(name: str) -> int:
    return zlib.crc32(name.encode())


def flush() -> None:
    """Flush what the program has printed, before the process ends abruptly; wait for a second at most."""

    def both() -> None:
        for stream in (sys.stdout, sys.stderr):
            with suppress(Exception):
                stream.flush()

    thread = threading.Thread(target=both, daemon=True)
    thread.start()
    thread.join(1)


def _here() -> str:
    """Return where the program is now, by file and line: in the main thread, outside of this package's calls."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame is not None and frame.f_code.co_filename.startswith(_FOLDER):
        frame = frame.f_back
    return record.site(frame) if frame is not None else "?"


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
