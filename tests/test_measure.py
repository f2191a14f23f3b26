"""The statistics and the formats of mpicoll bench, without measuring."""

import csv
import io
import json
import re

import numpy as np
import pytest

from mpicoll.algorithms import ALGORITHMS
from mpicoll.cli import bench
from mpicoll.errors import UserError
from mpicoll.measure.machine import timer_resolution
from mpicoll.measure.metrics import bandwidths, memory_share, record, summary
from mpicoll.measure.task import Task
from mpicoll.measure.testdata import OPS
from mpicoll.measure.timing import SYNC, Result, Settings, is_enough
from mpicoll.train import bubble

MEMORY = {"copy": 10.0, "add": 5.0}


def test_summary_of_known_samples():
    us = np.arange(101.0)[::-1]
    assert summary(us) == {"n": 101, "median": 50, "p10": 10, "p90": 90, "p99": 99, "min": 0, "max": 100, "mean": 50}


def test_bandwidths_are_those_of_nccl_tests():
    assert bandwidths("allreduce", 4000, 4, 2) == (2, 3)
    assert bandwidths("reduce_scatter", 4000, 4, 2) == bandwidths("allgather", 4000, 4, 2) == (2, 1.5)
    assert bandwidths("bcast", 4000, 4, 2) == bandwidths("reduce", 4000, 4, 2) == (2, 2)
    assert bandwidths("allreduce", 4000, 1, 2) == (2, 0)


def test_share_of_the_memory_bandwidth():
    assert memory_share("allreduce", 10**6, 4, 400, MEMORY) == 1  # 2 MB at 5 GB/s
    assert memory_share("bcast", 10**6, 4, 400, MEMORY) == 0.5
    assert memory_share("reduce_scatter", 10**6, 4, 250, MEMORY) == 1
    assert memory_share("allreduce", 10**6, 4, 250, MEMORY, one_result=True) == 1


def test_the_speed_is_the_median_of_ratios_within_a_repetition():
    slow_for_a_while = np.array([1.0, 1, 1, 10, 10, 10, 10])
    result = Result("ring", True, Task("allreduce", 3, np.dtype("f4")), slow_for_a_while, 2 * slow_for_a_while, 0)
    said = record(result, 4, MEMORY)
    assert (said["speed"], said["speed_low"], said["speed_high"]) == (2, 2, 2)
    assert (said["bytes"], said["n"], said["median"], said["root"]) == (12, 7, 10, -1)


def rounds(*medians, spread=0.0, n=16):
    """So many repetitions of implementations that are spread evenly, and of the empty call, which is not looked at."""
    around = 1 + spread * np.linspace(-1, 1, n)
    return [np.array([*(middle * x for middle in medians), x**9]) for x in around]


@pytest.mark.parametrize(
    ("measured", "until", "expected"),
    [
        (rounds(5.0, n=9), 0.0, False),  # too few, however late it is
        (rounds(5.0, spread=0.9, n=10), 0.0, True),  # late
        (rounds(5.0, spread=0.9), 1e30, False),
        (rounds(5.0, 7.0, spread=0.01), 1e30, True),  # known well enough
        (rounds(5.0, 7.0, spread=0.01, n=15), 1e30, False),  # not looked at
        (rounds(5.0, 0.0, spread=0.9, n=10), 1e30, False),
    ],
)
def test_when_it_is_enough(measured, until, expected):
    assert is_enough(measured, len(measured[0]) - 1, Settings(min_reps=10, precision=0.02), until) is expected


def test_one_that_is_not_known_well_enough_keeps_all_going():
    steady, wild = rounds(5.0, spread=0.001), rounds(7.0, spread=0.9)
    both = [np.array([a[0], b[0], 1]) for a, b in zip(steady, wild, strict=True)]
    assert not is_enough(both, 2, Settings(), 1e30)
    assert is_enough(both, 1, Settings(), 1e30)


def test_the_clock_is_finer_than_what_is_measured():
    assert 0 < timer_resolution() < 100


def test_the_command_offers_what_there_is():
    options = {option.name: option.type for option in bench.bench.params}
    assert [*options["collective"].choices] == [*(name for name in ALGORITHMS if name != "mix"), "pipeline"]
    assert [*options["sync"].choices] == [*SYNC]
    assert [*options["op"].choices] == [*OPS]


def test_sizes():
    convert = bench.Numbers().convert
    assert convert("64k:1M:4,1000,4", None, None) == [4, 1000, 65536, 262144, 1048576]
    assert convert("3:20", None, None) == [3, 6, 12]
    assert convert("0,7,7", None, None) == [0, 7]
    assert convert("5:5", None, None) == [5]
    for bad in (
        "",
        "-1",
        "4:",
        "1:2:3:4",
        "1.5",
        "1T",
        "4K:1K",
        "0:4",
        "1:4:1",
        ",",
        "1:1G:2,1:900G:3,1:900G:5,7:900G:6",
    ):
        with pytest.raises(bench.click.BadParameter):
            convert(bad + ("," + ",".join(map(str, range(70))) if bad.startswith("1:1G") else ""), None, None)


def test_ranges_of_cores():
    assert bench.ranges([0, 1, 2, 3, 8]) == "0-3,8"
    assert bench.ranges([5]) == "5"


def test_bytes_as_people_write_them():
    assert [bench.pretty(size) for size in (4, 1000, 2048, 1000 << 10, 3 << 30)] == [
        "4 B",
        "1000 B",
        "2 KiB",
        "1000 KiB",
        "3 GiB",
    ]


# ---- formats


def made(names=("auto", "native", "ring"), counts=(0, 2, 1 << 20), places=(False, True), wrong=0):
    """Records as they are measured: auto is as fast as native, ring half as fast."""
    rng = np.random.default_rng(1)
    found = []
    for count in counts:
        task = Task("allreduce", count, np.dtype("f4"))
        for place in places:
            us = 10 + count / 1000 + rng.random(20)
            for name in names:
                own = us * (2 if name == "ring" else rng.choice([0.5, 2], 20) if name == "auto" else 1)
                bad = wrong if name == "ring" else 0
                found.append(Result(name, place, task, own, us if "native" in names else None, bad))
        found.append(Result("null", places[0], task, us / 100, None, 0))
    return [record(one, 4, MEMORY) for one in found]


FACTS = {
    "start_time": "2026-01-02 03:04:05",
    "mpicoll": "0",
    "mpi": "An MPI, 1.0",
    "mpi4py": "4",
    "numpy": "2",
    "python": "3",
    "git": None,
    "env": ["OMP_NUM_THREADS=1"],
    "devices": [{"hostname": "a", "cpus": [0, 1]}, {"hostname": "b", "cpus": [2]}, {"hostname": "a", "cpus": [0, 1]}],
    "config": {
        **{"ranks": 4, "sync": "barrier", "check": "off", "seed": 1, "max_time": 1.0, "min_reps": 2},
        **{"off_cache": True, "unaligned": False, "calls": 10},
    },
    "memory": MEMORY,
    "resolution": 0.03,
}


def test_text_is_what_parsers_of_the_osu_benchmarks_read():
    records = made()
    text = bench.header(FACTS, Task("allreduce", 1, np.dtype("f4"))) + bench.body(records)
    assert "seed 1, 10 calls back to back, off cache;" in text
    mean = f"{records[7]['mean']:.2f}"
    assert records[7]["bytes"] == 8
    assert re.search(r"^8\s+(\S+)", text, re.MULTILINE)[1] == mean  # the first block is auto, out of place
    blocks = [line for line in text.splitlines() if not line.startswith("#")]
    assert len(blocks) == 3 * 3 * 2
    for line in blocks:
        size, average, *others = line.split()
        assert (int(size), float(average) > 0) in [(0, True), (8, True), (4 << 20, True)]
        assert line.startswith(size)
        assert len(others) >= 8
    assert "# a: 2 rank(s) on cores 0-1\n# b: 1 rank(s) on cores 2\n" in text
    assert "off cache" in text
    assert "# OMP_NUM_THREADS=1\n" in text
    assert text.endswith("# Wrong elements: 0 OK\n")


def test_speeds_stand_side_by_side_and_no_difference_is_said_to_be_none():
    lines = bench.body(made()).splitlines()
    start = lines.index("# speed of allreduce, out of place, native = 1; = for no difference")
    assert lines[start + 1].split() == ["#", "Size", "native", "us", "null", "us", "auto", "ring"]
    for line, size in zip(lines[start + 2 :], ("0", "8", "4194304"), strict=False):
        found = line.split()
        assert found[1] == size
        assert found[4].startswith("=")
        assert found[5] == "0.50"


def test_what_has_nothing_to_be_compared_with_is_not():
    text = bench.body(made(names=("auto", "ring"), places=(False,)))
    assert "speed of" not in text
    assert len([line for line in text.splitlines() if not line.startswith("#")]) == 6


def test_wrong_elements_are_in_every_format():
    records = made(wrong=3)
    assert bench.body(records).endswith("# Wrong elements: 18\n")
    assert {row["wrong"] for row in csv.DictReader(io.StringIO(bench.table(FACTS, records)))} == {"0", "3"}
    ring = json.loads(bench.document(FACTS, records))["implementations"][2]
    assert ring["out_of_bounds"] == {"count": 18, "okay": False}
    assert ring["results"][0]["in_place"]["nwrong"] == 3


def test_csv_gives_back_what_was_measured():
    records = made()
    rows = list(csv.DictReader(io.StringIO(bench.table(FACTS, records))))
    assert len(rows) == len(records)
    for row, one in zip(rows, records, strict=True):
        assert (row["mpi"], row["implementation"], row["in_place"]) == (
            "An MPI, 1.0",
            one["implementation"],
            str(one["in_place"]),
        )
        for key in ("bytes", "count", "ranks", "n", "wrong", *bench.TIMES, "algbw", "busbw", "speed", "speed_low"):
            assert row[key] == ("" if one[key] is None else str(one[key]))
    raw = list(csv.DictReader(io.StringIO(bench.table(FACTS, records, raw=True))))
    assert len(raw) == 20 * len(records)
    assert [float(row["us"]) for row in raw[20:40]] == records[1]["us"]
    assert [int(row["repetition"]) for row in raw[20:40]] == [*range(20)]


def test_json_has_the_keys_of_nccl_tests():
    whole = json.loads(bench.document({**FACTS, "args": [], "end_time": ""}, made()))
    assert {"version", "start_time", "args", "env", "config", "devices", "end_time"} < {*whole}
    assert [one["name"] for one in whole["implementations"]] == ["auto", "native", "ring", "null"]
    ring = whole["implementations"][2]
    assert {*ring} == {"name", "results", "out_of_bounds", "average_bus_bandwidth"}
    row = ring["results"][1]
    assert [row[key] for key in ("size", "count", "type", "redop", "root")] == [8, 2, "float32", "sum", -1]
    for place in ("out_of_place", "in_place"):
        assert {"time", "alg_bw", "bus_bw", "nwrong"} < {*row[place]}
        keys = {"min_us", "max_us", "avg_us", "p50_us", "p95_us", "p99_us", "stdev_us", "cv_pct", "times_us"}
        assert keys < {*row[f"{place}_per_iter"]}
        assert row[place]["bus_bw"] == pytest.approx(1.5 * row[place]["alg_bw"])
        assert len(row[f"{place}_per_iter"]["times_us"]) == 20
    assert "in_place" not in whole["implementations"][3]["results"][0]


def test_warnings():
    assert [line.partition(":")[0] for line in bench.warnings(FACTS, made())] == ["one launch"]
    alone = {**FACTS, "config": {"ranks": 1}, "resolution": 3.0}
    one, coarse, _ = bench.warnings(alone, made())
    assert one.startswith("one rank: use more")
    assert coarse == "the clock's resolution is more than a tenth of the median of auto, native, ring"


@pytest.mark.parametrize("name", ["a.png", "a.svg"])
def test_a_picture_is_drawn(tmp_path, name):
    bench.draw(FACTS, made(), tmp_path / name)
    picture = (tmp_path / name).read_bytes()
    assert picture.startswith(b"\x89PNG") or b"<svg" in picture
    bench.draw(FACTS, made(names=("auto", "ring"), places=(True,)), tmp_path / name)  # without native


# ---- the bubble of pipelines


def bubbles(pipeline, seconds, late=0.0, calls=0.0, handoff=0.0, held=(3, 3, 3), wrong=0):
    """Three micro-batches at three stages, a forward of one second: 15 s, of which each stage works for 9."""
    times = [np.full(len(seconds), of_each) for of_each in (late, calls, handoff)]
    case = bubble.Case(pipeline, 3, 1000)
    return bubble.record(bubble.Result(case, np.array(seconds), *times, held, wrong), forward=1.0)


def test_idle_is_what_is_left_of_a_batch_when_tasks_are_taken_off():
    one = bubbles("gpipe", [15.0, 15.0, 15.0])
    assert (one["idle"], one["textbook"], one["ratio"], one["model"]) == pytest.approx((0.4, 0.4, 1, 0.4))
    assert (one["median"], one["n"], one["us"]) == (15e6, 3, [15e6] * 3)
    assert (one["held"], one["promised"]) == ([3, 3, 3], [3, 3, 3])
    slower = bubbles("gpipe", [18.0, 20.0, 36.0])
    assert (slower["idle"], slower["ratio"]) == pytest.approx((1 - 9 / 20, (1 - 9 / 20) / 0.4))
    assert (slower["ratio_low"], slower["ratio_high"]) == pytest.approx((0.5 / 0.4, 0.75 / 0.4))
    assert bubbles("1f1b", [15.0])["promised"] == [3, 2, 1]


def test_the_model_has_tasks_and_handoffs_take_what_they_took():
    """Of gpipe two handoffs fill the pipeline and two empty it; what a task takes longer counts ten times, forward and
    backward in each of five turns, and is a part of the handoff behind it."""
    assert bubbles("gpipe", [17.0], handoff=0.5)["model"] == pytest.approx(1 - 9 / 17)
    assert bubbles("gpipe", [20.0], late=0.5, handoff=0.5)["model"] == pytest.approx(1 - 9 / 20)
    assert bubbles("gpipe", [21.0], late=0.25, calls=0.25, handoff=0.75)["model"] == pytest.approx(1 - 9 / 21)


def test_what_is_printed_and_written_of_pipelines():
    records = [bubbles("gpipe", [15.0, 16.0]), bubbles("1f1b", [15.0, 18.0], held=(3, 2, 1))]
    lines = bench.pipeline_body(records).splitlines()
    assert [line.split()[:4] for line in lines[1:3]] == [
        [name, "3", "1000", ms] for name, ms in (("gpipe", "15500.00"), ("1f1b", "16500.00"))
    ]
    assert {len(line) for line in lines[:3]} == {len(lines[0])}
    assert lines[3:] == ["# Wrong messages: 0 OK"]
    facts = {"start_time": "now", "mpi": "MPICH"}
    rows = list(csv.DictReader(io.StringIO(bench.table(facts, records, raw=True))))
    assert [(row["implementation"], row["micro"], row["us"]) for row in rows[:2]] == [
        ("gpipe", "3", "15000000.0"),
        ("gpipe", "3", "16000000.0"),
    ]
    made = json.loads(bench.pipeline_document(facts, records))["implementations"]
    assert [(one["name"], one["results"][0]["held"]) for one in made] == [("gpipe", [3, 3, 3]), ("1f1b", [3, 2, 1])]


@pytest.mark.parametrize(("late", "told"), [(0.01, 1), (0.02, 2)])
def test_a_machine_that_has_other_work_is_told_of(late, told):
    facts = {"config": {"ranks": 3}, "resolution": 0.1}
    lines = [*bench.warnings(facts, [bubbles("gpipe", [16.0]), bubbles("gpipe", [16.0], late=late)])]
    assert len(lines) == told
    assert told == 1 or lines[0].startswith("tasks ended 20000 us late: ")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (bubbles("1f1b", [15.0], held=(3, 2, 1)), None),
        (bubbles("1f1b", [15.0], held=(3, 2, 1), wrong=2), "2 wrong messages: 1f1b of 3 micro-batches and 1000 bytes"),
        (
            bubbles("1f1b", [15.0]),
            "stages have held activations of 3, 3, 3 micro-batches, promised are 3, 2, 1: 1f1b of",
        ),
    ],
)
def test_a_schedule_that_does_not_do_what_it_promises_is_an_error(record, message):
    if message is None:
        bench.check_promises([record])
    else:
        with pytest.raises(UserError, match=message):
            bench.check_promises([bubbles("gpipe", [15.0]), record])
