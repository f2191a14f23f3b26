import json
import threading

import pytest

from mpicoll.mpi import record


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(record, "calls", type(record.calls)(maxlen=record.KEPT))
    monkeypatch.setattr(record, "inside", {})


def call(what: str, number: int, ranks: tuple[int, ...] = (0, 1, 2)) -> None:
    record.begin(record.Entry(what, "communicator 0.1", ranks, number))


def written(folder, rank, calls, open_=False, size=3, job=1):
    """What a rank leaves that has made these calls."""
    record.calls.clear()
    for number, what in calls.items():
        call(what, number)
        if not open_ or number != max(calls):
            record.end()
    record.write(folder, {"rank": rank, "size": size, "job": job})
    record.inside.clear()


def test_calls_are_inside_until_they_end_each_thread_its_own():
    assert record.current() is None
    call("first", 1)
    other = threading.Thread(target=lambda: call("second", 2))
    other.start()
    other.join()
    current = record.current()
    assert current is not None
    assert str(current) == "call 1 on communicator 0.1, first"
    current.round = 3
    assert str(current) == "call 1 on communicator 0.1, first, round 3"
    record.end()
    record.end()  # as often as you like
    assert current.ended >= current.began
    assert [entry.what for entry in record.inside.values()] == ["second"]


def test_a_call_in_a_call_is_one():
    with record.during("outer"):
        with record.during("inner"):
            assert [entry.what for entry in record.calls] == ["outer"]
        assert record.current() is not None
    assert record.current() is None


def test_the_record_forgets():
    for number in range(3 * record.KEPT):
        call("x", number)
        record.end()
    assert len(record.calls) == record.KEPT


def test_reports_are_compared_from_the_first_difference_on(tmp_path):
    same = dict.fromkeys(range(1, 6), "allreduce of 5")
    written(tmp_path, 0, {**same, 6: "allreduce of 5"}, open_=True)
    written(tmp_path, 1, same)
    written(tmp_path, 2, {**{n: same[n] for n in range(3, 6)}, 6: "bcast of 8"}, open_=True)
    assert record.compare(tmp_path) == [
        "3 of 3 ranks reported",
        "communicator 0.1, ranks 0-2:",
        "  calls 3 to 5 match on all",
        "  call 6: allreduce of 5: rank 0 (rank 0 for 0.0 s)",
        "  call 6: bcast of 8: rank 2 (rank 2 for 0.0 s)",
        "  call 6: not made by rank 1",
    ]
    (tmp_path / "rank-1.json").unlink()
    assert record.compare(tmp_path)[0] == "2 of 3 ranks reported; nothing of rank 1"
    assert "test_record.py" in (tmp_path / "rank-0.txt").read_text()  # the stacks
    assert sorted(path.name for path in tmp_path.iterdir())[-1] == "rank-2.txt"  # nothing partial


def test_reports_of_an_earlier_job_are_left_out(tmp_path):
    for rank in range(4):
        written(tmp_path, rank, {1: "bcast of 8"}, size=4, job=1)
    for rank in (0, 2):
        written(tmp_path, rank, {1: "allreduce of 5"}, job=2)
    assert record.compare(tmp_path) == [
        "2 of 3 ranks reported; nothing of rank 1",
        "communicator 0.1, ranks 0-2:",
        "  calls 1 to 1 match on all",
    ]


def test_what_is_no_report_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"holds no report: expected files rank-0.json, rank-1.json"):
        record.compare(tmp_path)
    for text, message in (("{", "cannot be read"), ("[]", "no reports"), ('{"rank": 0}', "no reports")):
        (tmp_path / "rank-0.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            record.compare(tmp_path)
    (tmp_path / "rank-0.json").write_text(json.dumps({"rank": 0, "size": 2, "job": 1, "calls": []}))
    assert record.compare(tmp_path) == ["1 of 2 ranks reported; nothing of rank 1"]


def test_ranks_are_named_in_spans():
    assert record.named([0]) == "rank 0"
    assert record.named([3, 1, 2, 7]) == "ranks 1-3, 7"
