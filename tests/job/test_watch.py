"""What a watch makes of a page and of the time: both are set here, so that nothing waits and nothing is launched."""

import json
import os
import re
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mpicoll.job import watch as watching
from mpicoll.job.watch import (
    ALARM,
    DONE,
    GONE,
    GRACE,
    INSIDE,
    LEFT,
    LET_GO,
    OUTSIDE,
    REPORTED,
    SILENT,
    STATUS,
    TICK,
    TIMED_OUT,
    Page,
    Watch,
    page_bytes,
)
from mpicoll.mpi import record

HERE = "communicator 0.1"
LAST = f"in no call, after call 1000 on {HERE}, allreduce of 5 float64"
CALL = "allreduce of 5 float64, sum, ring"


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "calls", type(record.calls)(maxlen=record.KEPT))
    monkeypatch.setattr(record, "inside", {})
    monkeypatch.setattr(record, "made", {})


class Node:
    """The clock of a node, and the other ranks on its page: while time goes by they update their rows, and report when
    there is an alarm, but for those that are stopped, dead or silent."""

    def __init__(self, ranks: tuple[int, ...] = (0, 1, 2)) -> None:
        self.page = Page(list(ranks), bytearray(page_bytes(len(ranks))))
        self.time = 1000.0
        self.rows: dict[int, tuple[int, str]] = {}
        self.still: set[int] = set()
        self.meanwhile: Callable[[], None] = lambda: None
        for rank in ranks[1:]:
            self.set(rank, OUTSIDE, LAST)

    def monotonic(self) -> float:
        return self.time

    def sleep(self, seconds: float) -> None:
        self.time += seconds
        self.meanwhile()
        for rank, (state, text) in self.rows.items():
            if rank not in self.still:
                alarm = self.page.get(ALARM) > 0
                said = f"{text}, at job.py:{rank}" if alarm else text
                self.page.write(rank, self.time, 1000.0, REPORTED if alarm else state, said)

    def set(
        self,
        rank: int,
        state: int,
        text: str,
        status: int = 0,
        made: dict[str, int] | None = None,
        process: int | None = None,
    ) -> None:
        """One that is gone, let go, or a process of its own writes no more."""
        self.rows[rank] = state, text
        if state in (GONE, LET_GO) or process is not None:
            self.still.add(rank)
        self.page.write(rank, self.time, self.time, state, text, status, made, process)

    def watch(self, limit: float = 2.0, folder: Path | None = None, size: int = 3) -> Watch:
        return Watch(self.page, self.page.ranks[0], size, 7, limit, folder, self)

    def until_the_end(self, watch: Watch, seconds: float = 60) -> int | None:
        """What the thread does: the exit status, or ``None`` if there was none in so many seconds."""
        end = self.time + seconds
        while self.time < end:
            self.sleep(TICK)
            if (status := watch.look()) is not None:
                return status
        return None


def call(node: Node, what: str = CALL, number: int = 1001, ranks: tuple[int, ...] = (0, 1, 2)) -> record.Entry:
    """This rank is in a call from now on."""
    entry = record.Entry(what, HERE, ranks, number)
    entry.began = node.time
    record.begin(entry)
    return entry


@contextmanager
def process(*signals: int) -> Iterator[int]:
    """Another process, to which these signals are sent."""
    child = subprocess.Popen(["sleep", "100"])
    for number in signals:
        child.send_signal(number)
    if signal.SIGKILL in signals:
        child.wait()
    else:
        while signals and not watching._is_stopped(child.pid):
            pass
    yield child.pid
    child.kill()
    child.wait()


def account(capfd: pytest.CaptureFixture[str]) -> tuple[str, list[str]]:
    """The line that says why, and those after it."""
    head, *rows = capfd.readouterr().err.splitlines()
    assert head.startswith("mpicoll: ")
    return head, rows


def test_calls_that_end_in_time_are_left_alone(capfd):
    node = Node()
    watch = node.watch()
    assert node.until_the_end(watch, 10) is None  # in no call
    for number in range(5):
        call(node, number=number)
        assert node.until_the_end(watch, 1.5) is None
        record.end()
    assert (node.page.get(ALARM), capfd.readouterr().err) == (0, "")


def test_what_is_on_the_page_is_what_this_rank_is_in(capfd):
    node = Node()
    watch = node.watch()
    watch.publish()
    assert node.page.read(0) == (1000.0, 1000.0, os.getpid(), OUTSIDE, "in no call")
    entry = call(node)
    entry.round = 3
    node.time = 1001.0
    watch.publish()
    assert node.page.read(0) == (1001.0, 1000.0, os.getpid(), INSIDE, f"in call 1001 on {HERE}, {CALL}, round 3")
    record.end()
    entry.ended = 1000.5
    watch.publish()
    told = f"in no call, after call 1001 on {HERE}, {CALL}, round 3"
    assert node.page.read(0) == (1001.0, 1000.5, os.getpid(), OUTSIDE, told)


LATE = {  # what keeps rank 1 from a call
    "sleeping": (OUTSIDE, LAST),
    "in another call": (INSIDE, f"in Barrier on {HERE}"),
    "in a handle": (INSIDE, f"in waiting for a handle of ours on {HERE}"),
}


@pytest.mark.parametrize("what", LATE)
def test_a_time_limit_ends_the_job_and_says_who_is_late(capfd, tmp_path, what):
    node = Node()
    node.set(1, *LATE[what])
    watch = node.watch(folder=tmp_path / "report")
    call(node)
    assert node.until_the_end(watch) == TIMED_OUT
    assert 1002.0 < node.time < 1003.0  # soon after the limit, and at the time that all were told
    assert (node.page.get(STATUS), node.page.get(DONE)) == (TIMED_OUT, pytest.approx(node.time * 1e3, abs=1))
    head, rows = account(capfd)
    assert head == f"mpicoll: time limit of 2 s: rank 0 is in call 1001 on {HERE}, {CALL}"
    told = [f"in call 1001 on {HERE}, {CALL}, at ", f"{LATE[what][1]}, at job.py:1", f"{LAST}, at job.py:2"]
    for rank, row in enumerate(rows[:3]):
        assert re.match(rf"  rank {rank}          2\.[123] s  {re.escape(told[rank])}", row)
    assert re.search(r", at .*test_watch.py:\d+$", rows[0])
    assert rows[3:] == [f"  more: mpicoll report {tmp_path}/report; stacks: {tmp_path}/report/rank-*.txt"]
    report = json.loads((tmp_path / "report/rank-0.json").read_text())
    assert (report["rank"], report["size"], report["job"]) == (0, 3, 7)
    assert report["said"].startswith(f"in call 1001 on {HERE}")
    assert "in test_a_time_limit" in (tmp_path / "report/rank-0.txt").read_text()


def test_ranks_that_cannot_report_are_named_with_what_they_were_in(capfd):
    node = Node((0, 1, 2, 3, 4, 5))
    with process(signal.SIGSTOP) as stopped, process(signal.SIGKILL) as dead, process() as silent:
        node.set(1, OUTSIDE, LAST, process=stopped)
        node.set(2, INSIDE, f"in Barrier on {HERE}", process=dead)
        node.set(3, OUTSIDE, LAST, process=silent)
        node.set(4, LET_GO, "is no longer watched")
        node.set(5, GONE, "has left the program", made={HERE: 1001})
        call(node, ranks=(0, 1, 2, 3))
        watch = node.watch(size=6)
        assert node.until_the_end(watch) == TIMED_OUT
    assert 1002.0 + GRACE < node.time < 1003.0 + GRACE  # for so long they were waited for
    _, rows = account(capfd)
    assert [re.sub(r"for 7\.\d s", "for 7 s", row.split(None, 4)[4]) for row in rows[1:]] == [
        f"stopped for 7 s; was {LAST}",
        f"is dead; was in Barrier on {HERE}",
        f"silent for 7 s; was {LAST}",
        "is no longer watched",
        "has left the program",
    ]


@pytest.mark.parametrize(
    ("status", "told", "ends"),
    [(0, "has left the program", TIMED_OUT), (3, "has left the program, with status 3", 3)],
)
def test_a_rank_that_is_gone_ends_the_job_soon(capfd, status, told, ends):
    node = Node()
    watch = node.watch(limit=1000)
    call(node)
    node.set(1, GONE, told, status, {HERE: 1000})
    assert node.until_the_end(watch, LEFT - TICK) is None
    assert node.until_the_end(watch) == ends
    head, rows = account(capfd)
    assert head == f"mpicoll: rank 1, which this call needs, is gone: rank 0 is in call 1001 on {HERE}, {CALL}"
    assert re.fullmatch(rf"  rank 1          3\.[123] s  {told}", rows[1])


def test_a_rank_that_left_long_ago_is_waited_for_since_the_call_began():
    node = Node()
    watch = node.watch(limit=1000)
    node.set(1, GONE, "has left the program", made={})
    assert node.until_the_end(watch, 100) is None
    call(node)
    assert node.until_the_end(watch, LEFT - TICK) is None
    assert node.until_the_end(watch, 1) == TIMED_OUT


MADE = {  # by a rank that is gone; the call that others are in; has it missed that?
    "it, and one more": ({HERE: 1002}, (HERE, 1001, 0), False),
    "it": ({HERE: 1001}, (HERE, 1001, 0), False),
    "all before": ({HERE: 1000}, (HERE, 1001, 0), True),
    "none": ({}, (HERE, 1, 0), True),
    "those of another communicator": ({"communicator 0.2": 7}, (HERE, 1, 0), True),
    "those that are compared only": ({HERE: 7}, (HERE, 0, 1), True),
    "one that is not compared": ({f"{HERE}, not compared": 1}, (HERE, 0, 1), False),
    "what is on no communicator of ours": ({HERE: 7}, ("", 0, 0), True),
    "so many that no more were counted": (
        {f"communicator 7.{n}": 1 for n in range(record.COUNTED)},
        (HERE, 1, 0),
        False,
    ),
    "many, and this one counted": (
        {HERE: 1, **{f"communicator 7.{n}": 1 for n in range(record.COUNTED - 1)}},
        (HERE, 2, 0),
        True,
    ),
}


@pytest.mark.parametrize("what", MADE)
def test_a_rank_that_is_gone_has_missed_a_call_or_not(what):
    made, (where, number, uncompared), missed = MADE[what]
    node = Node()
    watch = node.watch(limit=1000)
    entry = record.Entry("x", where, (0, 1, 2), number)
    entry.began, entry.uncompared = node.time, uncompared
    record.inside[0] = entry
    node.set(1, GONE, "has left the program", made=made)
    assert node.page.has_missed(1, entry) == missed
    assert node.until_the_end(watch, 10) == (TIMED_OUT if missed else None)


def test_ranks_that_are_let_go_or_not_in_the_call_are_not_waited_for(capfd):
    node = Node()
    watch = node.watch(limit=1000)
    node.set(1, LET_GO, "is no longer watched")
    node.set(2, GONE, "has left the program", made={})
    call(node, ranks=(0, 1))
    assert node.until_the_end(watch, 100) is None
    assert capfd.readouterr().err == ""


def test_a_job_that_was_suspended_has_its_time_anew():
    node = Node()
    watch = node.watch()
    call(node)
    assert node.until_the_end(watch, 1.5) is None
    node.time += SILENT + 1
    assert node.until_the_end(watch, 1.9) is None
    assert node.until_the_end(watch, 1) == TIMED_OUT


def test_another_rank_tells(capfd, tmp_path):
    """This one reports, and exits when it is time, with the status that it is told."""
    node = Node()
    watch = node.watch(folder=tmp_path)
    call(node)
    node.page.set(ALARM, 2)

    def tell() -> None:
        if node.time > 1001.0:
            node.page.set(STATUS, 3)
            node.page.set(DONE, 1002500)

    node.meanwhile = tell
    assert node.until_the_end(watch) == 3
    assert (node.time, capfd.readouterr().err) == (1002.5, "")
    assert node.page.read(0)[3] == REPORTED
    assert (tmp_path / "rank-0.json").exists()


def test_of_two_that_raise_the_alarm_at_once_the_last_tells(capfd):
    node = Node()
    watch = node.watch()
    call(node)

    def other() -> None:
        if node.page.get(ALARM) == 1:
            node.page.set(ALARM, 3)

    node.meanwhile = other
    assert node.until_the_end(watch) == TIMED_OUT
    assert capfd.readouterr().err == ""
    assert node.time > 1002.0 + 2 * GRACE  # nobody set the time to exit


def test_a_folder_that_cannot_be_written_is_told(capfd):
    node = Node()
    watch = node.watch(folder=Path("/proc/no/report"))
    call(node)
    assert node.until_the_end(watch) == TIMED_OUT
    lines = capfd.readouterr().err.splitlines()
    assert lines[0].startswith("mpicoll: rank 0 cannot write its report: ")
    assert lines[1].startswith("mpicoll: time limit of 2 s: ")
    assert not any("more:" in line for line in lines)


# Several nodes: this one has ranks 0 and 2 of 4.


def reported(folder: Path, rank: int, said: str, job: int = 7) -> None:
    (folder / f"rank-{rank}.json").write_text(json.dumps({"job": job, "said": said, "seconds": 2.5 + rank}))


def test_ranks_of_other_nodes_are_told_of_by_their_reports(capfd, tmp_path):
    """They hear of it by a file, which is gone when it is time to exit; a report of an earlier job is none."""
    node = Node((0, 2))
    watch = node.watch(folder=tmp_path, size=6)
    call(node)
    reported(tmp_path, 1, "of yesterday", job=6)

    def others() -> None:
        if (tmp_path / "alarm-7").exists():
            assert (tmp_path / "alarm-7").read_text() == str(TIMED_OUT)
            assert not node.page.get(DONE)
            for rank in (3, 4, 5):
                reported(tmp_path, rank, "in no call, at job.py:9" if rank > 3 else "in Barrier, at job.py:8")

    node.meanwhile = others
    assert node.until_the_end(watch) == TIMED_OUT
    _, rows = account(capfd)
    assert [row.split()[1] for row in rows[:2]] == ["0", "2"]
    assert rows[2:-1] == [
        "  rank 3          5.5 s  in Barrier, at job.py:8",
        "  ranks 4-5       7.5 s  in no call, at job.py:9",
        f"  rank 1: on other nodes, and nothing of them in {tmp_path}",
    ]
    assert not (tmp_path / "alarm-7").exists()


def test_without_a_folder_nothing_is_known_of_other_nodes(capfd):
    node = Node((0, 2))
    watch = node.watch(size=4)
    call(node)
    assert node.until_the_end(watch) == TIMED_OUT
    assert node.time < 1003.0  # nor waited for
    _, rows = account(capfd)
    assert rows[2:] == ["  ranks 1, 3: on other nodes, seen in reports only (MPICOLL_REPORT=FOLDER)"]


def test_an_alarm_of_another_node_is_heard(capfd, tmp_path):
    node = Node((0, 2))
    watch = node.watch(limit=1000, folder=tmp_path, size=4)
    call(node)
    assert node.until_the_end(watch, 5) is None
    (tmp_path / "alarm-8").write_text("5")  # of another job
    assert node.until_the_end(watch, 5) is None
    (tmp_path / "alarm-7").write_text("3")

    def told() -> None:
        if node.time > 1013.0:
            (tmp_path / "alarm-7").unlink(missing_ok=True)

    node.meanwhile = told
    assert node.until_the_end(watch) == 3
    assert 1013.0 < node.time < 1014.0
    assert (tmp_path / "rank-0.json").exists()
    assert capfd.readouterr().err == ""


def test_of_two_nodes_that_raise_the_alarm_at_once_the_first_tells(capfd, tmp_path):
    node = Node((0, 2))
    watch = node.watch(folder=tmp_path, size=4)
    call(node)

    def other() -> None:
        if node.page.get(ALARM) == 1:
            (tmp_path / "alarm-7").write_text("9")
        elif node.time > 1005.0:
            (tmp_path / "alarm-7").unlink(missing_ok=True)

    node.meanwhile = other
    assert node.until_the_end(watch) == 9
    assert capfd.readouterr().err == ""


# A rank that ends by itself.


def test_all_report_when_a_rank_is_about_to_fail(capfd, tmp_path):
    node = Node((0, 2))
    watch = node.watch(limit=1000, folder=tmp_path, size=4)

    def others() -> None:
        if (tmp_path / "alarm-7").exists():
            assert (tmp_path / "alarm-7").read_text() == "1"
            for rank in (1, 3):
                reported(tmp_path, rank, "in no call")

    node.meanwhile = others
    watch.publish()
    watch.collect(1)
    assert node.time < 1001.0
    assert [node.page.read(rank)[3] for rank in (0, 2)] == [REPORTED, REPORTED]
    assert {path.name for path in tmp_path.glob("*.json")} == {f"rank-{rank}.json" for rank in (0, 1, 3)}
    assert not (tmp_path / "alarm-7").exists()
    said = json.loads((tmp_path / "rank-0.json").read_text())["said"]
    assert re.fullmatch(r"in no call, at .*test_watch.py:\d+", said)
    assert capfd.readouterr().err == ""


def test_leaving_says_which_calls_were_made(capfd):
    node = Node()
    watch = node.watch()
    entry = call(node, number=5)
    record.end()
    watch.leave()
    assert node.page.read(0)[3:] == (GONE, "has left the program")
    assert not node.page.has_missed(0, entry)
    entry.call = 6
    assert node.page.has_missed(0, entry)
    node.watch().stop()
    assert node.page.read(0)[3:] == (LET_GO, "is no longer watched")


def test_leaving_together_with_a_status_is_nothing_to_tell_of(capfd):
    node = Node()
    for rank, state in ((1, GONE), (2, LET_GO)):
        node.set(rank, state, "has left")
    node.watch().leave(3)
    assert (node.time, node.page.status(0), capfd.readouterr().err) == (1000.0, 3, "")
    assert node.page.read(0)[3:] == (GONE, "has left the program, with status 3")


def test_leaving_alone_with_a_status_others_are_given_time_to_notice():
    node = Node()
    node.watch().leave(3)
    assert node.time == pytest.approx(1000.0 + LEFT + GRACE, abs=TICK)


def test_texts_on_the_page_may_be_long_and_of_any_letters():
    page = Page([0, 1], bytearray(page_bytes(2)))
    page.write(0, 1.0, 2.0, INSIDE, "in " + "é" * 1000 + "\udcff", process=5)
    page.write(1, 1.0, 2.0, INSIDE, "beside", process=6)
    updated, since, number, state, text = page.read(0)
    assert (updated, since, number, state) == (1.0, 2.0, 5, INSIDE)
    assert text.startswith("in éé")
    assert page.read(1) == (1.0, 2.0, 6, INSIDE, "beside")
