"""Bad input to ``mpicoll train``: one clear line from rank 0, a status, nothing written."""

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from commands import QUICK, assert_one_line, assert_refused, blobs, npz, outcomes, run_here
from launch import mpirun, run


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


def test_bad_data(tmp_path):
    paths = [make(tmp_path / f"data-{n}.npz") for n, make in enumerate(BAD_FILES.values())]
    commands = [[*QUICK, "--data", str(path), "--out", "run"] for path in paths]
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
    commands = [[*QUICK, *options] for options, _, _ in BAD_OPTIONS]
    for (_, status, message), ranks in zip(BAD_OPTIONS, outcomes(tmp_path, commands), strict=True):
        assert_refused(ranks, status, message)


@pytest.mark.parametrize("options", [["--data", "nowhere.npz"], ["--epochs", "0"], ["--model", "mlp", "--lr", "1e9"]])
def test_a_launch_of_what_is_refused_ends_so(tmp_path, options):
    """Before MPI has started, in agreement, and in a step: rank 0 speaks, whoever ends first."""
    ((status, message),) = [(status, message) for given, status, message in BAD_OPTIONS if given == options]
    assert_one_line(mpirun(3, [*QUICK, *options], tmp_path), tmp_path, status, message)


def test_a_step_into_infinity_at_the_very_end_is_found(tmp_path):
    data = npz(tmp_path / "d.npz", **blobs())
    done = run_here([*QUICK, "--data", data, "--batch-size", "1000", "--lr", "1e39"], tmp_path)
    assert_one_line(
        done, tmp_path, 1, "parameters became infinite or nan at step 1 .epoch 1.: try a smaller learning rate"
    )


def test_ranks_may_not_have_settings_of_their_own(tmp_path):
    command = ["mpirun", "-n", "1", *QUICK, ":", "-n", "1", *QUICK, "--lr", "0.5"]
    failed = run(command, tmp_path)
    message = "--lr must be the same on all ranks, and is 0.1 on rank 0 and 0.5 on rank 1: give all of them the same"
    assert_one_line(failed, tmp_path, 1, message)
