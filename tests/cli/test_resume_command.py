"""``mpicoll train --resume``: what goes on, what may be changed, and what is said when a run ends before its end."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from commands import FILES, blobs, npz, run_here
from launch import CROWDED, IS_OPEN_MPI, mpirun
from mpicoll.train import run_folder

RUN = ["mpicoll", "train", "--model", "softmax", "--validation", "0.2"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two epochs on data of its own, to be copied."""
    folder = tmp_path_factory.mktemp("finished")
    npz(folder / "d.npz", **blobs(60))
    done = run_here([*RUN, "--epochs", "2", "--data", str(folder / "d.npz"), "--out", "run"], folder)
    assert (done.status, done.err) == (0, "")
    return folder / "run"


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
        failed = run_here(["mpicoll", "train", *options.split(), "--resume", "run"], tmp_path)
        assert failed.status == 1
        assert re.search(message, failed.err)
        assert failed.err.count("\n") == 1
    early = run_here(["mpicoll", "train", "--resume", "run"], tmp_path, env={"MPICOLL_TRAIN_CONFIG": "c.toml"})
    assert "exclude each other" in early.err
    config = tmp_path / "run/config.toml"
    config.write_text(config.read_text().replace("batch_size = 64", "batch_size = 6"))
    edited = run_here(["mpicoll", "train", "--resume", "run", "--epochs", "3"], tmp_path)
    assert "--batch-size is 6, and was 64" in edited.err
    config.write_text(config.read_text().replace("batch_size = 6", "batch_size = 64"))
    changed = run_here(
        ["mpicoll", "train", "--resume", "run", "--epochs", "4", "--lr", "0.1", "--out", "run"], tmp_path
    )
    assert (changed.status, changed.err) == (0, "")
    assert "bits may differ" not in changed.out
    assert "epochs = 4\n" in config.read_text()
    other = mpirun(2, ["mpicoll", "train", "--resume", "run", "--epochs", "5"], tmp_path)
    assert "not as before, and bits may differ: ranks 1 -> 2" in other.out


def test_other_data_of_the_same_size_are_told(tmp_path, finished):
    shutil.copytree(finished, tmp_path / "run")
    data = npz(tmp_path / "e.npz", **blobs(60, seed=1))
    done = run_here(["mpicoll", "train", "--resume", "run", "--epochs", "3", "--data", str(data)], tmp_path)
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
    done = run_here(["mpicoll", "train", "--resume", "run"], tmp_path)
    assert (done.status, done.err) == (0, "")
    assert (tmp_path / "run/model.safetensors").read_bytes() == wanted["model.safetensors"]
    before, after = (json.loads(text) for text in (wanted["summary.json"], (tmp_path / "run/summary.json").read_text()))
    assert (after["test_accuracy"], after["steps"]) == (before["test_accuracy"], before["steps"])


def test_patience_that_is_new_begins_when_the_run_is_resumed(tmp_path, finished):
    shutil.copytree(finished, tmp_path / "run")
    done = run_here(["mpicoll", "train", "--resume", "run", "--epochs", "6", "--patience", "1", "--json"], tmp_path)
    assert json.loads(done.out.splitlines()[-1])["epochs_done"] > 2


def test_resuming_by_other_names_of_the_folder(tmp_path, finished):
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "link").symlink_to("run/checkpoints/epoch-00000002")
    for n, (where, name) in enumerate([("run", "."), ("run/checkpoints/epoch-00000001", "."), (".", "link")]):
        done = run_here(["mpicoll", "train", "--resume", name, "--epochs", str(3 + n)], tmp_path / where)
        assert (done.status, done.err) == (0, ""), (where, name)
    (tmp_path / "run/checkpoints/epoch-00000005/manifest.json").unlink()
    failed = run_here(["mpicoll", "train", "--resume", "run/checkpoints/epoch-00000005"], tmp_path)
    assert re.search("epoch-00000005' cannot be used .*; resume from the one before with --resume .*0004\n", failed.err)


def test_two_jobs_do_not_write_to_one_run(tmp_path, finished):
    shutil.copytree(finished, tmp_path / "run")
    with run_folder.locked(tmp_path / "run"):
        failed = run_here(["mpicoll", "train", "--resume", "run", "--epochs", "3"], tmp_path)
    assert re.fullmatch("mpicoll: '.*run' is being written by another job: wait for it, or stop it\n", failed.err)
    assert run_here(["mpicoll", "train", "--resume", "run", "--epochs", "3"], tmp_path).status == 0


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
    done = run_here(["mpicoll", "train", *early, "--out", "run"], tmp_path)
    assert re.search(r"^ stopped early  no better validation loss in 1 epoch.s.$", done.out, re.MULTILINE)
    again = run_here(["mpicoll", "train", "--resume", "run"], tmp_path)
    assert again.status == 1
    assert re.fullmatch(
        r"mpicoll: 'run' stopped early, after epoch \d+: no better validation loss since epoch \d+ \(--patience 1\); "
        "to go on, ask for more with --patience\n",
        again.err,
    )
    (tmp_path / "run/summary.json").unlink()
    again = run_here(["mpicoll", "train", "--resume", "run"], tmp_path)
    assert (again.status, " stopped early  no better" in again.out) == (0, True)
