"""``mpicoll bench`` as it is launched; what it measures is not asserted."""

import csv
import json
import re
import signal
import subprocess
import sys
import time

import pytest
from click.testing import CliRunner

from commands import assert_one_line, outcomes, run_here
from launch import IS_OPEN_MPI, REPOSITORY, mpirun, run
from mpicoll.algorithms import ALGORITHMS
from mpicoll.cli.app import app
from mpicoll.cli.bench import bench
from mpicoll.measure.testdata import OPS
from mpicoll.measure.timing import SYNC

TINY = ["mpicoll", "bench", "--count", "0,1,5,3000", "--max-time", "0", "--min-reps", "2", "--warmup", "1"]
PATCHED = """
import sys
from mpi4py import rc
rc.initialize = False
from mpicoll.cli import main
import mpicoll.mpi.launch
comm = mpicoll.mpi.launch.world()
from mpicoll.measure import contestants
made = contestants.implementations
contestants.implementations = lambda *args: {**made(*args), "ring": BAD}
sys.exit(main(sys.argv[1:]))
"""


# Goes with FAKECUPY_WITH: what tests/fakecupy needs to be a GPU, but a small one.
FAKE = """
import kernels
import mpicoll.measure.machine
import pytest
def prepare(fake):
    kernels.add(fake, pytest.MonkeyPatch())
    mpicoll.measure.machine.COPIED = 1 << 16
"""
WITHOUT_CUPY = "import sys; sys.modules['cupy'] = None; from mpicoll.cli import main; sys.exit(main(sys.argv[1:]))"
ON_GPU = [sys.executable, REPOSITORY / "tests" / "fakecupy", "-m", *TINY, "--device", "gpu"]


def test_the_command_offers_what_there_is():
    options = {option.name: option.type for option in bench.params}
    assert [*options["collective"].choices] == [*(name for name in ALGORITHMS if name != "mix"), "pipeline"]
    assert [*options["sync"].choices] == [*SYNC]
    assert [*options["op"].choices] == [*OPS]


def told(done):
    """What rank 0 says on standard error, but for what it always does of one launch."""
    return [line for line in done.err.splitlines() if "one launch" not in line]


@pytest.mark.parametrize(("ranks", "collective"), [(1, "allreduce"), (3, "reduce_scatter"), (2, "bcast")])
def test_every_algorithm_is_measured_and_written(tmp_path, ranks, collective):
    files = ["--out", "out.json", "--format", "json", "--raw", "raw.csv", "--plot", "picture.png"]
    done = mpirun(ranks, [*TINY[:2], collective, *TINY[2:], *files], tmp_path)
    assert done.status == 0, done.err
    assert len(told(done)) == (ranks == 1)
    assert done.err.count("mpicoll: one launch") == 1
    shared = ["shared", "shared_arrays", "shared_result"][: 3 if collective == "allreduce" else 2] if ranks > 1 else []
    names = ["auto", "native", *shared, *ALGORITHMS[collective]]
    whole = json.loads((tmp_path / "out.json").read_text())
    assert [one["name"] for one in whole["implementations"]] == [*names, "null"]
    for one in whole["implementations"]:
        assert [row["size"] for row in one["results"]] == [0, 4, 20, 12000]
        assert one["out_of_bounds"] == {"count": 0, "okay": True}
    assert [device["rank"] for device in whole["devices"]] == [*range(ranks)]
    assert whole["args"][1:3] == ["bench", collective]
    assert len(whole["library"]) >= len(whole["mpi"].split()[0])
    with (tmp_path / "raw.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["implementation"] for row in rows} == {*names, "null"}
    assert {row["repetition"] for row in rows} == {"0", "1"}
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    place = "in place" if collective == "bcast" else "out of place"
    blocks = re.findall(rf"^# (\w+) {collective}, {place}\n# Size .*\n((?:\d.*\n)+)", done.out, re.MULTILINE)
    assert [name for name, _ in blocks] == names
    assert all([line.split()[0] for line in rows.splitlines()] == ["0", "4", "20", "12000"] for _, rows in blocks)
    assert done.out.endswith("# Wrong elements: 0 OK\n")


def test_on_a_gpu_rows_say_by_which_way_they_went_and_the_header_which_are_missing(tmp_path):
    (tmp_path / "small.py").write_text(FAKE)
    env = {"PYTHONPATH": f"{REPOSITORY}:{tmp_path}", "FAKECUPY_WITH": "small"}
    some = ["--algorithm", "auto,ipc,ring", "--out-of-place", "--out", "out.json", "--format", "json"]
    done = mpirun(2, [*ON_GPU, *some], tmp_path, env=env)
    assert done.status == 0, done.err
    assert "# GPU Fake GPU (0000:01:00.0): 2 rank(s), 0-1\n# a GPU copies " in done.out
    assert "# without nccl: ranks share a GPU, and NCCL is for one rank on each\n" in done.out
    rows = re.findall(r"^(?:20|12000) .* (\w+|-) +\d+\.\d{3}  \d+\.\d+ to ", done.out, re.MULTILINE)
    assert rows == ["ipc", "ipc", "-", "-", "ipc", "ipc", "staged", "staged"]
    whole = json.loads((tmp_path / "out.json").read_text())
    assert [(one["rank"], one["ranks"], one["name"]) for one in whole["gpus"]] == [
        (rank, [0, 1], "Fake GPU") for rank in range(2)
    ]
    assert whole["cupy"] == "14.2.0"
    assert whole["config"]["device"] == "gpu"
    assert whole["gpu_memory"]["sharing"] == 2
    assert [*whole["refused"]] == ["nccl", "aware"]
    assert whole["implementations"][0]["results"][-1]["out_of_place"]["way"] == "ipc"


def test_alone_a_csv_on_standard_output_is_nothing_but_that(tmp_path):
    done = run([*TINY, "--algorithm", "ring,tree", "--format", "csv", "--in-place"], tmp_path)
    assert (done.status, len(told(done))) == (0, 1)
    rows = list(csv.DictReader(done.out.splitlines()))
    assert [(row["implementation"], row["bytes"]) for row in rows[:4]] == [
        *[("native", "0"), ("ring", "0"), ("tree", "0"), ("null", "0")]
    ]
    assert len(rows) == 16
    assert {row["in_place"] for row in rows} == {"True"}


def test_options_are_environment_variables_too(tmp_path):
    env = {"MPICOLL_BENCH_ALGORITHM": "ring", "MPICOLL_BENCH_SYNC": "dissemination", "MPICOLL_BENCH_COUNT": "7"}
    done = mpirun(
        2, ["mpicoll", "bench", *TINY[4:], "--dtype", "float16", "--op", "max", "--unaligned"], tmp_path, env=env
    )
    assert done.status == 0
    assert "# ring allreduce, in place\n" in done.out
    assert "tree" not in done.out
    assert "native" not in done.out
    assert "# Datatype: float16, max; 2 rank(s)\n" in done.out
    assert "# sync dissemination, check off, seed " in done.out
    assert "\n14 " in done.out
    assert "# MPICOLL_BENCH_SYNC=dissemination\n" in done.out


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("lambda task, send, recv: lambda: None", r"\d+ wrong elements: ring of 20 bytes, out of place; ring of "),
        ("lambda task, send, recv: lambda: 1 / (task.count - 5 or comm.rank - 1 or 0)", "rank 1 failed"),
    ],
)
def test_a_wrong_result_and_a_rank_that_fails(tmp_path, bad, message):
    code = PATCHED.replace("BAD", bad)
    files = ["--algorithm", "ring", "--out", "out.csv", "--format", "csv"]
    done = mpirun(2, [sys.executable, "-c", code, *TINY[1:2], "--count", "5", *TINY[4:], *files], tmp_path)
    assert done.status == 1
    assert re.search(message, done.err)
    if "wrong" in message:
        assert done.err.count("wrong elements") == 1
        assert "Traceback" not in done.err
        with (tmp_path / "out.csv").open() as file:  # what was measured is there all the same
            assert max(int(row["wrong"]) for row in csv.DictReader(file) if row["implementation"] == "ring") > 0
        assert re.search(r"# Wrong elements: \d+\n$", done.out)
    else:
        assert "ZeroDivisionError" in done.err
        assert list(tmp_path.iterdir()) == []


REFUSED = [
    ("allreduce --root 1", 2, "--root is for reduce and bcast, not for allreduce"),
    ("reduce --root 3", 1, "--root must be one of 3 ranks, got 3"),
    ("bcast --out-of-place", 1, "nothing to measure at 1 elements: bcast has one buffer, and so is in place"),
    ("--sizes 900G", 1, "the largest size takes 9000 GiB of memory for each of 3 rank"),
    ("--out there", 1, "'there' exists: name a new file"),
    ("--raw no/where.csv", 1, "'no/where.csv' cannot be written: there is no folder 'no'"),
    ("--algorithm native --dtype bfloat16", 1, "native has no allreduce of bfloat16 that adds as ours do"),
]


def test_what_cannot_be_is_one_line(tmp_path):
    (tmp_path / "there").touch()
    commands = [["mpicoll", "bench", *options.split()] for options, _, _ in REFUSED]
    for (_, status, message), ranks in zip(REFUSED, outcomes(tmp_path, commands), strict=True):
        for rank, told in enumerate(ranks):
            assert (told.status, told.out, told.left) == (status, "", ["commands", "there"])
            assert told.err.count("\n") == (rank == 0)
            assert rank or told.err.startswith("mpicoll: ")
            assert rank or message in told.err
    assert (tmp_path / "there").read_text() == ""


def test_a_launch_of_what_cannot_be_ends_so(tmp_path):
    done = mpirun(3, ["mpicoll", "bench", "reduce", "--root", "3"], tmp_path)
    assert_one_line(done, tmp_path, 1, "--root must be one of 3 ranks, got 3")
    assert done.out == ""


@pytest.mark.parametrize(
    ("devices", "message"),
    [
        (None, "a GPU needs CuPy, which cannot be imported"),
        ("0", "there is no GPU to be used here (cudaErrorInsufficientDriver"),
        ("1", "nccl cannot do this allreduce here: ranks share a GPU"),
    ],
)
def test_without_a_gpu_or_a_way_it_ends_in_one_line(tmp_path, devices, message):
    command = [*ON_GPU, "--algorithm", "nccl", "--out", "out.txt"]
    if devices is None:
        command[1:4] = ["-c", WITHOUT_CUPY]
    done = mpirun(2, command, tmp_path, env={"FAKECUPY_DEVICES": devices or ""})
    (line,) = [line for line in done.err.splitlines() if line.startswith("mpicoll: ")]
    assert (done.status, done.out) == (1, "")
    assert message in line
    assert "Traceback" not in done.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--device gpu --off-cache", "--off-cache is for arrays in host memory, not for --device gpu"),
        ("--device gpu --algorithm shared", "--algorithm 'shared' is none of auto, native, ipc, nccl, aware, staged,"),
        ("alltoall", "'alltoall' is not one of 'allreduce', 'reduce', 'bcast', 'reduce_scatter', 'allgather'"),
        ("bcast --op sum", "--op is for collectives that reduce, not for bcast"),
        ("--algorithm ring,rnig", "--algorithm 'rnig' is none of auto, native, shared, shared_arrays, shared_result,"),
        ("--sizes 3", "--sizes: 3 bytes are no whole number of float32, 4 bytes each"),
        ("--sizes 4:2", "'4:2' is not a range from 1 or more upwards"),
        ("pipeline --op sum", "pipeline has no use for --op: it takes --algorithm, --sizes, --micro, --forward,"),
        ("pipeline --algorithm ring", "--algorithm 'ring' is none of gpipe, 1f1b"),
        ("pipeline --micro 0,4", "--micro must be 1 to 4096 micro-batches, got 0"),
        ("pipeline --sizes 4,2G", "--sizes: a message of pipeline is at most 1 GiB, got 2147483648 bytes"),
        ("pipeline --forward -1", "-1.0 is not in the range"),
        ("pipeline --forward nan", "--forward nan is no number"),
        ("bcast --micro 4", "--micro is for pipeline, not for bcast"),
        ("--plot a.gif", "--plot must end with .png, .svg, .pdf, got 'a.gif'"),
        ("--plot a.png --count 0", "--plot shows sizes above 0"),
        ("--max-time -1", "-1.0 is not in the range"),
        ("--max-time nan", "--max-time nan is no number"),
    ],
)
def test_wrong_usage(options, message):
    result = CliRunner().invoke(app, ["bench", *options.split()])
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())


def test_two_files_of_one_name(tmp_path):
    failed = run_here([*TINY, "--raw", "a.csv", "--out", "a.csv"], tmp_path)
    assert (failed.status, failed.err) == (1, "mpicoll: 'a.csv' is named twice: name a new file\n")


def test_ctrl_c_ends_it_and_leaves_nothing(tmp_path):
    def interrupt(process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        while not process.stdout.readline().startswith("# memory"):
            pass
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)

    done = mpirun(3, ["mpicoll", "bench", "--out", "out.json"], tmp_path, meanwhile=interrupt, timeout=30)
    assert done.status != 0
    assert IS_OPEN_MPI or "mpicoll: interrupted" in done.err
    assert "Traceback" not in done.err
    assert list(tmp_path.iterdir()) == []


def test_the_claim_that_the_documentation_makes_of_several_launches(tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", (REPOSITORY / "docs/benchmarks.md").read_text(), re.DOTALL)
    made, claim = tmp_path / "made", tmp_path / "claim"
    made.mkdir()
    claim.mkdir()
    options = [*TINY, "--algorithm", "ring", "--format", "csv", "--out"]
    launches = outcomes(made, [[*options, f"launch-{n}.csv"] for n in range(6)], 2)
    for n, (told, _) in enumerate(launches):
        assert told.status == 0
        assert "# ring allreduce, in place\n" in told.out
        (made / f"launch-{n}.csv").rename(claim / f"launch-{n}.csv")
        if n in (0, 4, 5):
            said = run([sys.executable, "-c", code], claim).out.splitlines()
            assert [line.split()[:3] for line in said] == [
                ["ring", place, size] for place in ("False", "True") for size in ("0", "4", "20", "12000")
            ]
            claimed = [line for line in said if "no difference" not in line]
            assert n == 5 or not claimed
