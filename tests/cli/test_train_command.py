"""``mpicoll train``: what it reaches, what it prints, and what it writes where."""

import json
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from test_files import strict

from commands import FILES, QUICK, blobs, npz, outcomes, run_here
from launch import REPOSITORY, mpirun, run
from mpicoll.algorithms import ALGORITHMS


@pytest.mark.parametrize(("ranks", "epochs"), [(1, 8), (2, 30), (3, 8), (4, 8), (5, 8)])
def test_the_main_job_reaches_97_percent(tmp_path, ranks, epochs):
    """With its default number of epochs, and soon."""
    by_messages = ranks in (1, 4)  # else in memory that all ranks share
    given = ["--algorithm", "halving_doubling"] if by_messages else []
    given += ["--epochs", str(epochs)] if epochs != 30 else []
    done = mpirun(ranks, ["mpicoll", "train", "--json", "--out", "run", *given], tmp_path)
    assert (done.status, done.err) == (0, "")
    summary = json.loads(done.out.splitlines()[-1])
    assert summary["test_accuracy"] >= 0.97
    assert summary["train_loss"] < 0.1
    assert (summary["steps"], summary["ranks"]) == (epochs * 23, ranks)
    assert summary["algorithm"] == ("halving_doubling" if by_messages else "shared")
    assert summary["steps_per_s"] > 0
    assert 0 <= summary["wait_fraction"] <= summary["comm_fraction"] <= 1
    sent = float(ALGORITHMS["allreduce"]["halving_doubling"].sent(ranks)) * (summary["parameters"] + 2) * 4
    sent *= by_messages
    assert abs(summary["bytes_sent_per_rank"] / summary["steps"] - sent) <= 2 * ranks * 4
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == FILES
    assert json.loads((tmp_path / "run/summary.json").read_text()) == summary
    metrics = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in metrics] == list(range(1, epochs + 1))
    for wanted in ("test accuracy", "training loss", "steps", "agreement", "waiting", "written to"):
        assert wanted in done.out


def test_runs_without_out_get_folders_of_their_own(tmp_path):
    for _ in range(2):
        assert run_here(QUICK, tmp_path).status == 0
    assert len(list((tmp_path / "runs").iterdir())) == 2


def test_options_are_environment_variables(tmp_path):
    done = run_here(
        ["mpicoll", "train", "--json"], tmp_path, env={"MPICOLL_TRAIN_EPOCHS": "2", "MPICOLL_TRAIN_SEED": "7"}
    )
    other = run_here([*QUICK], tmp_path, env={"MPICOLL_TRAIN_JSON": "1", "MPICOLL_VERSION": "1"})
    assert json.loads(other.out.splitlines()[-1])["epochs"] == 1
    summary = json.loads(done.out.splitlines()[-1])
    assert (summary["epochs"], summary["seed"]) == (2, 7)


def test_a_configuration_file_goes_behind_options_and_the_environment(tmp_path):
    (tmp_path / "c.toml").write_text('epochs = 2\nstrategy = "gossip"\nmix-first = true\nseed = 3\nbatch_size = 50\n')
    command = ["mpicoll", "train", "--config", "c.toml", "--json", "--out", "run", "--seed", "4"]
    done = run_here(command, tmp_path, env={"MPICOLL_TRAIN_BATCH_SIZE": "70"})
    summary = json.loads(done.out.splitlines()[-1])
    assert (summary["epochs"], summary["strategy"], summary["mix_first"]) == (2, "gossip", True)
    assert (summary["seed"], summary["batch_size"]) == (4, 70)
    (tmp_path / "run/config.toml").rename(tmp_path / "again.toml")
    again = run_here(["mpicoll", "train", "--config", "again.toml", "--json"], tmp_path)
    for key in ("train_loss", "seed", "batch_size", "steps"):
        assert json.loads(again.out.splitlines()[-1])[key] == summary[key]


@pytest.mark.parametrize("ranks", [3, 4])
def test_every_strategy_reaches_95_percent(tmp_path, ranks):
    strategies = ["average", "butterfly", "gossip", "async", *(["ad-psgd"] if ranks == 4 else [])]
    commands = [
        ["mpicoll", "train", "--strategy", name, "--epochs", "6", "--json", "--out", name] for name in strategies
    ]
    for strategy, (told, *others) in zip(strategies, outcomes(tmp_path, commands, ranks), strict=True):
        assert {(rank.status, rank.err) for rank in (told, *others)} == {(0, "")}
        assert {rank.out for rank in others} == {""}
        summary = json.loads(told.out.splitlines()[-1])
        assert (summary["strategy"], summary["ranks"]) == (strategy, ranks)
        assert summary["test_accuracy"] >= 0.95
        if strategy == "async":
            assert len(summary["staleness"]) <= 5
            assert sum(summary["staleness"]) == summary["steps"] * ranks
        else:
            assert re.search("ranks were .* apart", told.out)


def test_the_slowest_rank_of_many_is_in_the_account(tmp_path):
    done = mpirun(10, [*QUICK, "--strategy", "gossip", "--batch-size", "4"], tmp_path)
    assert (done.status, done.err) == (0, "")
    rows = re.findall(r"^ +(\d+) +[\d.]+ MB +\d+ +\d+% +\d+% +\d+%(.*)$", done.out, re.MULTILINE)
    assert 1 <= len(rows) <= 2
    assert [note for _, note in rows].count("  the slowest") == 1


def test_the_example_of_an_own_model_finds_the_truth(tmp_path):
    for strategy in ("sync", "gossip"):
        done = mpirun(2, [sys.executable, "-m", "mpi4py", REPOSITORY / "examples/own_model.py", strategy], tmp_path)
        assert (done.status, done.err) == (0, "")
        found = [float(number) for number in re.findall(r"-?\d+\.\d*", done.out.splitlines()[-1].split("where")[0])]
        np.testing.assert_allclose(found, [0.8, -0.5, 0.3, 0.0, 0.7], atol=0.06)


def test_folders_that_exist_empty_are_filled(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to("elsewhere")
    (tmp_path / "dangling").symlink_to("new")
    (tmp_path / "here").mkdir()
    for out, where, cwd in [
        ("empty", "empty", "."),
        ("link/", "elsewhere", "."),
        ("dangling", "new", "."),
        (".", "here", "here"),
        ("a/b/c", "a/b/c", "."),
    ]:
        assert run_here([*QUICK, "--out", out], tmp_path / cwd).status == 0
        assert sorted(path.name for path in (tmp_path / where).iterdir()) == FILES


def test_runs_started_at_once_do_not_take_each_others_folder(tmp_path):
    command = "for n in 1 2 3; do mpicoll train --model softmax --epochs 1 & done; wait"
    assert run(["bash", "-c", command], tmp_path).status == 0
    folders = list((tmp_path / "runs").iterdir())
    assert len(folders) == 3
    for folder in folders:
        assert sorted(path.name for path in folder.iterdir()) == FILES
        assert json.loads((folder / "summary.json").read_text())["out"] == f"runs/{folder.name}"


def test_a_folder_that_holds_a_run_is_not_touched(tmp_path):
    assert run_here([*QUICK, "--out", "run"], tmp_path).status == 0
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*.*")}
    again = run_here([*QUICK, "--out", "run"], tmp_path)
    assert again.status == 1
    assert "output folder 'run' already holds files; name another one with --out" in again.err
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*.*")} == before


def test_numbers_that_are_not_finite_are_told(tmp_path):
    given = blobs()
    far = {"X_test": np.full((2, 4), 1e38), "y_test": [0, 1]}
    data = npz(tmp_path / "d.npz", **given, **far)
    done = run_here(
        ["mpicoll", "train", "--data", data, "--lr", "1", "--epochs", "2", "--json", "--out", "run"], tmp_path
    )
    assert (done.status, done.err) == (0, "")
    assert "    not finite  test_loss: infinite or nan, and null in summary.json\n" in done.out
    summary = strict(done.out.splitlines()[-1])
    assert strict((tmp_path / "run/summary.json").read_text()) == summary
    assert (summary["test_loss"], summary["not_finite"]) == (None, ["test_loss"])


@pytest.mark.parametrize("delay", [0.2, 0.4, 0.5, 0.6])
def test_ctrl_c_while_starting_ends_the_job_too(tmp_path, delay):
    def interrupt(process: subprocess.Popen[str]) -> None:
        time.sleep(delay)
        process.send_signal(signal.SIGINT)

    done = mpirun(
        3, ["mpicoll", "train", "--epochs", "1000000", "--out", "run"], tmp_path, meanwhile=interrupt, timeout=20
    )
    assert done.status != 0
    assert [path.name for path in tmp_path.iterdir()] in ([], ["run"])  # if it had come to an epoch


def test_names_that_are_no_text(tmp_path):
    name = b"\xff".decode(errors="surrogateescape")
    done = mpirun(2, [*QUICK, "--out", name], tmp_path)
    assert (done.status, "Traceback" in done.err) == (0, False)
    assert sorted(path.name for path in (tmp_path / name).iterdir()) == FILES
