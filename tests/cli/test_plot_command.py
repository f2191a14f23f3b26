from pathlib import Path

from commands import QUICK, run_here
from launch import run
from mpicoll.cli.plot import names


def test_plots(tmp_path):
    for strategy in ("sync", "gossip"):
        assert run_here([*QUICK, "--epochs", "2", "--strategy", strategy, "--out", strategy], tmp_path).status == 0
    drawn = run_here(["mpicoll", "plot", "sync", "gossip", "--out", "a.svg"], tmp_path)
    assert (drawn.out, drawn.err, drawn.status) == ("2 run(s) drawn in a.svg\n", "", 0)
    assert (tmp_path / "a.svg").read_text().count("<path") > 10
    assert run(["mpicoll", "plot", "sync"], tmp_path).status == 0
    assert (tmp_path / "runs.png").read_bytes().startswith(b"\x89PNG")
    for arguments, message in {
        "gone": "'gone/metrics.jsonl' cannot be read (No such file or directory); expected the folder of a run",
        "sync --out a.txt": "--out must end with .png, .svg or .pdf, got 'a.txt'",
        "sync --out no/where.png": "'no/where.png' cannot be written (No such file or directory)",
        " ".join(["sync"] * 13): "13 runs are too many to tell apart in one picture: name at most 12",
    }.items():
        failed = run_here(["mpicoll", "plot", *arguments.split()], tmp_path)
        assert (failed.status, failed.err) == (1, f"mpicoll: {message}\n")


def test_runs_are_named_by_what_is_not_the_same():
    runs = (Path("a"), Path("b"))
    assert names([{"strategy": "sync", "lr": 1}, {"strategy": "gossip", "lr": 1}], runs) == ["sync", "gossip"]
    assert names([{"strategy": "sync", "lr": 1}, {"strategy": "sync", "lr": 2}], runs) == ["lr 1", "lr 2"]
    assert names([{"lr": 1}, {"lr": 1, "graph": "ring"}], runs) == ["a", "b"]
    assert names([{"lr": 1}, {"lr": 1}], runs) == ["a", "b"]
