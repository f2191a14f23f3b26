"""A time limit for calls: a thread that makes no MPI call, so that it can tell what is wrong while MPI waits for ever.

The ranks of a node share a page, which each of these threads updates ten times a second: whether its rank is in a call,
in which, and since when.  When one finds that its rank has been in a call for too long, all report, in one order, and
the job ends with status ``TIMED_OUT``.
"""

import mmap
import os
import struct
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from mpi4py import MPI

from . import record

TIMED_OUT = 124
"""The exit status of a job that a time limit has ended, as the command timeout has it."""

LIMIT = 600.0
"""Seconds that a call may take by default."""

TICK = 0.1
SILENT = 2.0  # seconds without an update until a rank is called silent
LEFT = 3.0  # seconds to wait in a call for a rank that has left the program
GRACE = 5.0  # seconds for all ranks to report

OUTSIDE, INSIDE, GONE, REPORTED = range(4)
_STATES = struct.Struct("=ddqqqq")  # when updated, since when, process, state, the communicator and number of a call
_SLOT = 512
_HEAD = 64
_ALARM, _DONE = 0, 8  # where in the head: the rank that raised the alarm, plus one; when to exit, in milliseconds


class Page:
    """What the ranks of this node know of each other, in a file that has no name any more, and so is never left."""

    def __init__(self, comm: MPI.Intracomm) -> None:
        node = comm.Split_type(MPI.COMM_TYPE_SHARED, key=comm.rank)
        self.ranks = node.allgather(comm.rank)
        size = _HEAD + _SLOT * node.size
        path = None
        if node.rank == 0:
            folder = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
            handle, path = tempfile.mkstemp(prefix="mpicoll-watch-", dir=folder)
            os.truncate(handle, size)
            os.close(handle)
        path = node.bcast(path)
        with open(path, "r+b") as file:
            self._memory = mmap.mmap(file.fileno(), size)
        node.Barrier()
        if node.rank == 0:
            os.unlink(path)
        node.Free()
        self._slot = {rank: _HEAD + _SLOT * n for n, rank in enumerate(self.ranks)}

    def write(self, rank: int, since: float, state: int, text: str, call: tuple[int, int] = (0, 0)) -> None:
        """One rank's part; ``call`` is the last one that it has begun."""
        start, said = self._slot[rank], text.encode(errors="replace")[: _SLOT - _STATES.size]
        room = _SLOT - _STATES.size
        self._memory[start + _STATES.size : start + _SLOT] = said.ljust(room, b"\0")
        _STATES.pack_into(self._memory, start, time.monotonic(), since, os.getpid(), state, *call)

    def read(self, rank: int) -> tuple[float, float, int, int, str]:
        """When it was updated, since when it is so, the process, the state, and the text."""
        start = self._slot[rank]
        said = self._memory[start + _STATES.size : start + _SLOT].rstrip(b"\0")
        updated, since, process, state, *_ = _STATES.unpack_from(self._memory, start)
        return updated, since, process, state, said.decode(errors="replace")

    def last_call(self, rank: int) -> tuple[int, int]:
        """What it has begun last."""
        *_, communicator, number = _STATES.unpack_from(self._memory, self._slot[rank])
        return communicator, number

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
        self._since, self._stop = time.monotonic(), threading.Event()
        self._awake = self._since
        self._publish()
        comm.Barrier()
        self._thread = threading.Thread(target=self._run, name="mpicoll-watch", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Watch no longer."""
        self.leave("is no longer watched")

    def leave(self, why: str = "has left the program") -> None:
        """The same, because the program has come to its end on this rank."""
        self._stop.set()
        self._thread.join()
        self.page.write(self.rank, time.monotonic(), GONE, why, _last_call())

    def _run(self) -> None:
        before = time.monotonic()
        while not self._stop.wait(TICK):
            before, now = time.monotonic(), before
            if before - now > SILENT:
                self._awake = before  # this process was stopped, as others may have been: time begins anew
            self._publish()
            reason = None if self.page.get(_ALARM) else self._reason()
            if reason:
                self.page.set(_ALARM, self.rank + 1)
                time.sleep(TICK)  # others may raise it at the same time; the last one tells
            if self.page.get(_ALARM):
                self._report()
                if reason and self.page.get(_ALARM) == self.rank + 1:
                    self._tell(reason)
                self._exit_together()

    def _publish(self) -> None:
        entry = record.current()
        if entry is not None:
            self.page.write(self.rank, entry.began, INSIDE, f"in {entry}", _last_call())
            return
        last = record.calls[-1] if record.calls else None
        since, text = (last.ended or last.began, f", after {last}") if last else (self._since, "")
        self.page.write(self.rank, since, OUTSIDE, f"in no call{text}", _last_call())

    def _reason(self) -> str | None:
        entry, now = record.current(), time.monotonic()
        if entry is None:
            return None
        began = max(entry.began, self._awake)
        for rank in entry.ranks:
            if rank != self.rank and rank in self.page.ranks and entry.call:
                _, since, _, state, _ = self.page.read(rank)
                communicator, number = self.page.last_call(rank)
                missed = communicator == _hash(entry.where) and number < entry.call
                if state == GONE and missed and now - max(since, began) > LEFT:
                    return f"rank {rank}, which this call needs, is gone"
        return f"time limit of {self.limit:g} s" if now - began > self.limit else None

    def collect(self) -> None:
        """Have all ranks of this node report, because this one is about to end the job."""
        self._stop.set()
        if threading.current_thread() is not self._thread:
            self._thread.join()
        if not self.page.get(_ALARM):
            self.page.set(_ALARM, self.rank + 1)
        self._report()
        self._until(self._all_have_reported, GRACE)

    def _report(self) -> None:
        if self.folder is not None:
            try:
                record.write(self.folder, self.rank, self.size)
            except OSError as error:
                print(f"mpicoll: rank {self.rank} cannot write its report: {error}", file=sys.stderr, flush=True)
                self.folder = None
        _, since, _, _, text = self.page.read(self.rank)
        self.page.write(self.rank, since, REPORTED, f"{text}, at {record.here()}")

    def _all_have_reported(self) -> bool:
        return all(self.page.read(rank)[3] in (REPORTED, GONE) for rank in self.page.ranks)

    def _tell(self, reason: str) -> None:
        self._until(self._all_have_reported, GRACE)
        entry = record.current()
        print(f"mpicoll: {reason}: rank {self.rank} is in {entry}\n{self.account()}", file=sys.stderr, flush=True)
        self.page.set(_DONE, int((time.monotonic() + 3 * TICK) * 1e3))

    def _exit_together(self) -> None:
        """At the time that whoever tells has set: the launcher kills the others when the first has left."""
        self._until(lambda: self.page.get(_DONE) > 0, 2 * GRACE)
        flush()
        time.sleep(max(self.page.get(_DONE) / 1e3 - time.monotonic(), 0))
        os._exit(TIMED_OUT)

    def account(self) -> str:
        """A line for each rank of this node, and where to read more."""
        now = time.monotonic()
        rows = []
        for rank in self.page.ranks:
            updated, since, process, state, text = self.page.read(rank)
            if state == GONE:
                pass
            elif not _lives(process):
                text = f"is dead; was {text}"
            elif now - updated > SILENT and state != REPORTED:
                text = f"{'stopped' if _is_stopped(process) else 'silent'} for {now - updated:.1f} s; was {text}"
            rows.append(f"  rank {rank:<5} {now - since:8.1f} s  {text}")
        if len(self.page.ranks) < self.size:
            rows.append(f"  the other {self.size - len(self.page.ranks)} ranks are on other nodes")
        if self.folder is not None:
            rows.append(f"  more: mpicoll report {self.folder}; stacks: {self.folder}/rank-*.txt")
        return "\n".join(rows)

    @staticmethod
    def _until(condition: Callable[[], bool], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not condition() and time.monotonic() < deadline:
            time.sleep(TICK / 2)


def _hash(name: str) -> int:
    return zlib.crc32(name.encode())


def _last_call() -> tuple[int, int]:
    last = next((entry for entry in reversed(list(record.calls)) if entry.call), None)
    return (_hash(last.where), last.call) if last else (0, 0)


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
