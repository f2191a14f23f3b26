"""``mpicoll bench pipeline``: its texts, and as it is launched."""

import csv
import io
import json

import pytest
from click.testing import CliRunner

from launch import mpirun, run
from mpicoll.cli.app import app
from mpicoll.cli.bench_pipeline import body, check_promises, document
from mpicoll.cli.output import table, warnings
from mpicoll.errors import UserError
from records import bubble_of


def test_what_is_printed_and_written_of_pipelines():
    records = [bubble_of("gpipe", [15.0, 16.0]), bubble_of("1f1b", [15.0, 18.0], held=(3, 2, 1))]
    lines = body(records).splitlines()
    assert [line.split()[:4] for line in lines[1:3]] == [
        [name, "3", "1000", ms] for name, ms in (("gpipe", "15500.00"), ("1f1b", "16500.00"))
    ]
    assert {len(line) for line in lines[:3]} == {len(lines[0])}
    assert lines[3:] == ["# Wrong messages: 0 OK"]
    facts = {"start_time": "now", "mpi": "MPICH"}
    rows = list(csv.DictReader(io.StringIO(table(facts, records, raw=True))))
    assert [(row["implementation"], row["micro"], row["us"]) for row in rows[:2]] == [
        ("gpipe", "3", "15000000.0"),
        ("gpipe", "3", "16000000.0"),
    ]
    made = json.loads(document(facts, records))["implementations"]
    assert [(one["name"], one["results"][0]["held"]) for one in made] == [("gpipe", [3, 3, 3]), ("1f1b", [3, 2, 1])]


@pytest.mark.parametrize(("late", "told"), [(0.01, 1), (0.02, 2)])
def test_a_machine_that_has_other_work_is_told_of(late, told):
    facts = {"config": {"ranks": 3}, "resolution": 0.1}
    lines = [*warnings(facts, [bubble_of("gpipe", [16.0]), bubble_of("gpipe", [16.0], late=late)])]
    assert len(lines) == told
    assert told == 1 or lines[0].startswith("tasks ended 20000 us late: ")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (bubble_of("1f1b", [15.0], held=(3, 2, 1)), None),
        (
            bubble_of("1f1b", [15.0], held=(3, 2, 1), wrong=2),
            "2 wrong messages: 1f1b of 3 micro-batches and 1000 bytes",
        ),
        (
            bubble_of("1f1b", [15.0]),
            "stages have held activations of 3, 3, 3 micro-batches, promised are 3, 2, 1: 1f1b of",
        ),
    ],
)
def test_a_schedule_that_does_not_do_what_it_promises_is_an_error(record, message):
    if message is None:
        check_promises([record])
    else:
        with pytest.raises(UserError, match=message):
            check_promises([bubble_of("gpipe", [15.0]), record])


def test_pipelines_are_measured_and_written(tmp_path):
    options = ["--forward", "0", "--sizes", "0,1K", "--max-time", "0", "--min-reps", "2", "--warmup", "1"]
    files = ["--out", "out.json", "--format", "json", "--raw", "raw.csv"]
    done = mpirun(3, ["mpicoll", "bench", "pipeline", *options, *files], tmp_path)
    assert (done.status, [line for line in done.err.splitlines() if "one launch" not in line]) == (0, [])
    wanted = [
        (name, size, micro, held)
        for name, most in (("gpipe", None), ("1f1b", 3))
        for size in (0, 1024)
        for micro in (3, 6, 12)
        for held in [[most - stage if most else micro for stage in range(3)]]
    ]
    whole = json.loads((tmp_path / "out.json").read_text())
    found = [one for made in whole["implementations"] for one in made["results"]]
    assert [(one["implementation"], one["bytes"], one["micro"], one["held"]) for one in found] == wanted
    assert {(one["n"], one["wrong"], one["idle"]) for one in found} == {(2, 0, 1.0)}
    assert [made["name"] for made in whole["implementations"]] == ["gpipe", "1f1b"]
    with (tmp_path / "raw.csv").open() as file:
        assert [row["micro"] for row in csv.DictReader(file)] == [str(micro) for _, _, micro, _ in wanted for _ in "ab"]
    assert "# 3 stages, a rank each; forward 0 ms, backward twice as long, asleep\n" in done.out
    rows = [line.split() for line in done.out.splitlines() if not line.startswith("#")]
    assert [(row[0], int(row[2]), int(row[1])) for row in rows] == [row[:3] for row in wanted]
    assert done.out.endswith("# Wrong messages: 0 OK\n")


def test_one_stage_is_no_pipeline(tmp_path):
    failed = run(["mpicoll", "bench", "pipeline"], tmp_path)
    wanted = "bench pipeline needs two ranks or more, one for each stage: mpirun -n N mpicoll bench pipeline"
    assert (failed.status, failed.out, failed.err) == (1, "", f"mpicoll: {wanted}\n")


@pytest.mark.parametrize("args", ["pipeline", "--micro 4 pipeline", "--out pipeline --forward=3 pipeline"])
def test_it_has_options_and_a_help_of_its_own_wherever_it_is_named(args):
    result = CliRunner().invoke(app, ["bench", *args.split(), "--help"])
    assert result.exit_code == 0
    assert "bench pipeline [OPTIONS]\n" in result.output
    assert "--micro" in result.output
    assert "--device" not in result.output


def test_its_variables_are_those_of_bench():
    result = CliRunner(env={"MPICOLL_BENCH_MICRO": "0"}).invoke(app, ["bench", "pipeline"])
    assert "--micro must be 1 to 4096 micro-batches, got 0" in result.output
