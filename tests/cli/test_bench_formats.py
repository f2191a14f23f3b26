"""What ``mpicoll bench`` prints, writes and draws, without measuring."""

import csv
import io
import json
import re

import numpy as np
import pytest

from mpicoll.cli.bench_formats import TIMES, body, document, head
from mpicoll.cli.output import table, warnings
from mpicoll.cli.pictures import draw_speeds
from mpicoll.measure.task import Task
from records import FACTS, records_of


def test_text_is_what_parsers_of_the_osu_benchmarks_read():
    records = records_of()
    text = head(Task("allreduce", 1, np.dtype("f4")), FACTS) + body(records)
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
    lines = body(records_of()).splitlines()
    start = lines.index("# speed of allreduce, out of place, native = 1; = for no difference")
    assert lines[start + 1].split() == ["#", "Size", "native", "us", "null", "us", "auto", "ring"]
    for line, size in zip(lines[start + 2 :], ("0", "8", "4194304"), strict=False):
        found = line.split()
        assert found[1] == size
        assert found[4].startswith("=")
        assert found[5] == "0.50"


def test_what_has_nothing_to_be_compared_with_is_not():
    text = body(records_of(names=("auto", "ring"), places=(False,)))
    assert "speed of" not in text
    assert len([line for line in text.splitlines() if not line.startswith("#")]) == 6


def test_wrong_elements_are_in_every_format():
    records = records_of(wrong=3)
    assert body(records).endswith("# Wrong elements: 18\n")
    assert {row["wrong"] for row in csv.DictReader(io.StringIO(table(FACTS, records)))} == {"0", "3"}
    ring = json.loads(document(FACTS, records))["implementations"][2]
    assert ring["out_of_bounds"] == {"count": 18, "okay": False}
    assert ring["results"][0]["in_place"]["nwrong"] == 3


def test_csv_gives_back_what_was_measured():
    records = records_of()
    rows = list(csv.DictReader(io.StringIO(table(FACTS, records))))
    assert len(rows) == len(records)
    for row, one in zip(rows, records, strict=True):
        assert (row["mpi"], row["implementation"], row["in_place"]) == (
            "An MPI, 1.0",
            one["implementation"],
            str(one["in_place"]),
        )
        for key in ("bytes", "count", "ranks", "n", "wrong", *TIMES, "algbw", "busbw", "speed", "speed_low"):
            assert row[key] == ("" if one[key] is None else str(one[key]))
    raw = list(csv.DictReader(io.StringIO(table(FACTS, records, raw=True))))
    assert len(raw) == 20 * len(records)
    assert [float(row["us"]) for row in raw[20:40]] == records[1]["us"]
    assert [int(row["repetition"]) for row in raw[20:40]] == [*range(20)]


def test_json_has_the_keys_of_nccl_tests():
    whole = json.loads(document({**FACTS, "args": [], "end_time": ""}, records_of()))
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
    assert [line.partition(":")[0] for line in warnings(FACTS, records_of())] == ["one launch"]
    alone = {**FACTS, "config": {"ranks": 1}, "resolution": 3.0}
    one, coarse, _ = warnings(alone, records_of())
    assert one.startswith("one rank: use more")
    assert coarse == "the clock's resolution is more than a tenth of the median of auto, native, ring"


@pytest.mark.parametrize("name", ["a.png", "a.svg"])
def test_a_picture_is_drawn(tmp_path, name):
    draw_speeds(FACTS, records_of(), tmp_path / name)
    picture = (tmp_path / name).read_bytes()
    assert picture.startswith(b"\x89PNG") or b"<svg" in picture
    draw_speeds(FACTS, records_of(names=("auto", "ring"), places=(True,)), tmp_path / name)  # without native
