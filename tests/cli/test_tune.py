"""``mpicoll tune``: what it prints, and as it is launched."""

import re
import signal
import subprocess
import sys
import time

import pytest
from click.testing import CliRunner

from launch import IS_OPEN_MPI, mpirun, run
from mpicoll.algorithms import ALGORITHMS
from mpicoll.cli import tune as command
from mpicoll.cli.app import app
from mpicoll.mpi.launch import library_name
from mpicoll.tuning.fingerprint import Fingerprint, machine
from mpicoll.tuning.measurements import read_measurements
from mpicoll.tuning.profile import Profile, default_path, read_profile, write_profile
from mpicoll.tuning.rules import NATIVE, SHARED
from profiles import HERE, PROFILE, RULES, TRIED, TRIED_RULES, steady


def test_the_table_has_a_line_for_each_rule():
    assert command.table(RULES).splitlines() == [
        "allreduce             up to 4 KiB   native, else tree",
        "                       any length   shared, else ring, else halving_doubling",
        "bcast                   up to 0 B   chain",
        "                   up to 1024 GiB   native, else tree",
        "                       any length   scatter_allgather",
    ]


def test_the_report_names_the_worst_and_the_least():
    text = command.report({"allreduce": TRIED_RULES}, {"allreduce": [*TRIED, steady(64, native=1, tree=2)]})
    assert "at 4 sizes that were not fitted" in text
    assert re.search(
        r"allreduce +11\.2% +25\.0% +1\.34 +1\.06 +0\.80   worst 300 B: shared for native; least 300 B", text
    )
    assert command.report({"allreduce": TRIED_RULES}, {"allreduce": []}) == ""


def test_sizes_between_those_that_are_fitted():
    tasks = command._tasks(["allreduce", "allgather"], [4, 16, 64], 3, None)
    assert [(task.collective, task.count, fitted) for task, fitted in tasks] == [
        *[("allreduce", 1, True), ("allreduce", 3, False), ("allreduce", 4, True), ("allreduce", 12, False)],
        *[("allreduce", 16, True), ("allgather", 3, True), ("allgather", 6, True), ("allgather", 12, False)],
        ("allgather", 18, True),
    ]
    scored = command._tasks(["reduce", "allreduce"], command.SIZES, 4, RULES)
    counts = [task.count for task, _ in scored]
    assert counts == [3 * 4**n for n in range(10)]
    assert not any(fitted for _, fitted in scored)


TINY = ["mpicoll", "tune", "--collective", "allreduce,allgather,allreduce", "--sizes", "4:1K:16", "--budget", "0.5"]


def test_it_measures_fits_and_is_found_again(tmp_path):
    config = {"XDG_CONFIG_HOME": str(tmp_path), "MPICOLL_PROFILE": str(tmp_path / "wrong.json")}
    (tmp_path / "wrong.json").write_text("{")  # one that is there already is not in the way
    done = mpirun(2, [*TINY, "--seed", "5"], tmp_path, env=config)
    assert (done.status, done.err) == (0, "")
    profile, measured = tmp_path / "wrong.json", tmp_path / "wrong.measured.json"
    made, data = read_profile(profile), read_measurements(measured)
    assert made.fingerprint.layout == (2,)
    assert [*made.rules] == [*data.rows] == ["allreduce", "allgather"]
    for name, rows in data.rows.items():
        assert [row.nbytes for row in rows if row.fitted] == [4 if name == "allreduce" else 8, 64, 1024]
        for row in rows:
            assert {*row.us} == {NATIVE, *ALGORITHMS[name], *([SHARED] if name == "allreduce" else [])}
            assert min(len(times) for times in row.us.values()) >= 6
            assert row.default in (NATIVE, SHARED)
    for line in command.table(made.rules).splitlines():
        assert line in done.out
    assert "at 4 sizes that were not fitted" in done.out
    assert {"date", "mpicoll", "seconds", "repetitions", "hosts", "seed"} <= {*made.made}

    again = run(["mpicoll", "tune", "--fit", measured, "--out", "again.json"], tmp_path)
    assert (again.status, again.err) == (0, "")
    assert read_profile(tmp_path / "again.json") == made
    assert again.out.splitlines()[:-1] == done.out.splitlines()[2:-1]

    for named in ([], ["again.json"]):
        scored = mpirun(2, [*TINY, "--score", *named], tmp_path, env=config)
        assert (scored.status, scored.err) == (0, "")
        assert re.search(r"\nall +\d+\.\d% +\d+\.\d% ", scored.out)
    assert len([*tmp_path.rglob("*.json")]) == 3


def test_a_profile_is_written_where_it_will_be_found(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    name = default_path(HERE).name
    for variable, expected in (
        (None, tmp_path / "config" / "mpicoll" / name),
        ("none", tmp_path / "config" / "mpicoll" / name),
        (str(tmp_path), tmp_path / name),
        (str(tmp_path / "mine.json"), tmp_path / "mine.json"),
    ):
        monkeypatch.delenv("MPICOLL_PROFILE", raising=False)
        if variable is not None:
            monkeypatch.setenv("MPICOLL_PROFILE", variable)
        out, data = command._outputs(HERE, None, None)
        assert (out, data) == (expected, expected.with_name(f"{expected.stem}.measured.json"))


@pytest.mark.parametrize(
    ("ranks", "options", "status", "message"),
    [
        (1, "", 1, "tune needs two ranks or more: mpirun -n N mpicoll tune"),
        (2, "--score missing.json", 1, "profile 'missing.json' cannot be read (No such file or directory)"),
        (2, "--score foreign.json", 1, "profile 'foreign.json' is not for here: it is of MPICH 1"),
        (2, "--score torn.json", 1, "profile 'torn.json': no JSON, or torn, at line 1, column 2"),
        (2, "--score p.json --sizes 64", 1, "nothing to score: no size between two of --sizes, or no collective"),
        (2, "--score p.json --collective reduce", 1, "nothing to score: no size between two of --sizes, or no coll"),
        (2, "--out no/where.json", 1, "'no/where.json' cannot be written: there is no folder 'no'"),
        (2, "--out a.json --data a.json", 1, "'a.json' is named twice"),
        (2, "--sizes 900G", 1, "the largest size takes 9000 GiB of memory for each of 2 rank"),
        (2, "--fit torn.json", 1, "tune --fit runs on one process: start it without mpirun"),
    ],
)
def test_what_cannot_be_is_one_line(tmp_path, ranks, options, status, message):
    write_profile(Profile(Fingerprint("MPICH 1", "?", (2,)), RULES, {}), tmp_path / "foreign.json")
    here = Fingerprint(library_name(), machine(), (2,))
    write_profile(Profile(here, RULES, {}), tmp_path / "p.json")
    (tmp_path / "torn.json").write_text("{")
    before = sorted(tmp_path.iterdir())
    done = mpirun(ranks, ["mpicoll", "tune", *options.split()], tmp_path)
    (line,) = [line for line in done.err.splitlines() if line.startswith("mpicoll: ")]
    assert (done.status, done.out) == (status, "")
    assert message in line
    assert "Traceback" not in done.err
    assert sorted(tmp_path.iterdir()) == before


def test_what_cannot_be_fitted_or_scored_is_one_line(tmp_path):
    (tmp_path / "torn.json").write_text("{")
    failed = run(["mpicoll", "tune", "--fit", "torn.json", "--out", "p.json"], tmp_path)
    assert failed.status == 1
    assert re.fullmatch(r"mpicoll: measurements 'torn.json': no JSON, or torn, at .*\n", failed.err)
    assert [file.name for file in tmp_path.iterdir()] == ["torn.json"]
    unwanted = mpirun(2, [*TINY, "--score"], tmp_path, env={"MPICOLL_PROFILE": "none"})
    assert (unwanted.status, unwanted.out) == (1, "")
    assert "mpicoll: MPICOLL_PROFILE says that no profile is wanted: name one, --score PROFILE\n" in unwanted.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--collective allreduce,mix", "--collective 'mix' is none of allreduce, reduce, bcast, reduce_scatter, allga"),
        ("--sizes 6", "--sizes: 6 bytes are no whole number, above 0, of float32, 4 bytes each"),
        ("--sizes 0,4", "--sizes: 0 bytes are no whole number, above 0"),
        ("--budget -1", "-1.0 is not in the range"),
        ("--budget nan", "--budget nan is no number of seconds"),
        ("--fit a --budget 5", "--fit has no use for --budget: leave it out"),
        ("--fit a --data b", "--fit has no use for --data: leave it out"),
        ("--score a --out b", "--score has no use for --out: leave it out"),
        ("--score --fit b", "--score has no use for --fit: leave it out"),
    ],
)
def test_wrong_usage(options, message):
    result = CliRunner().invoke(app, ["tune", *options.split()])
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())


PATCHED = """
import sys
from mpicoll.cli import main
import mpicoll.mpi.launch
mpicoll.mpi.launch.world()
from mpicoll.measure import compete
made = compete.implementations
compete.implementations = lambda *args: {**made(*args), "ring": lambda task, send, recv: lambda: None}
sys.exit(main(sys.argv[1:]))
"""


def test_a_wrong_result_is_a_failure_and_nothing_is_written(tmp_path):
    done = mpirun(2, [sys.executable, "-c", PATCHED, *TINY[1:], "--out", "p.json"], tmp_path)
    assert done.status == 1
    assert re.search(
        r"^mpicoll: \d+ wrong elements: ring (allreduce|allgather) of \d+ elements$", done.err, re.MULTILINE
    )
    assert "Traceback" not in done.err
    assert [*tmp_path.iterdir()] == []


def test_ctrl_c_leaves_no_file(tmp_path):
    def interrupt(process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        while not process.stdout.readline().startswith("# "):
            pass
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)

    done = mpirun(2, ["mpicoll", "tune", "--out", "p.json"], tmp_path, meanwhile=interrupt, timeout=30)
    assert done.status != 0
    assert IS_OPEN_MPI or "mpicoll: interrupted" in done.err
    assert [*tmp_path.iterdir()] == []


def test_a_job_says_in_a_line_that_it_does_not_use_a_profile_and_ends_in_one_with_a_wrong_one(tmp_path):
    path = tmp_path / "profile.json"
    command = ["mpicoll", "train", "--model", "softmax", "--epochs", "1", "--json"]
    write_profile(PROFILE, path)
    done = mpirun(3, command, tmp_path, env={"MPICOLL_PROFILE": str(path)})
    assert done.status == 0, done.err
    (line,) = done.err.splitlines()
    assert line.startswith(f"mpicoll: profile {str(path)!r} is not used: it is of ")
    assert line.endswith("tune again, mpirun -n 3 mpicoll tune")
    path.write_text(path.read_text()[:-20])
    done = mpirun(3, command, tmp_path, env={"MPICOLL_PROFILE": str(path)})
    assert (done.status, done.out) == (1, "")
    assert done.err.startswith(f"mpicoll: profile {str(path)!r}: ")
    assert len(done.err.splitlines()) == 1
