import re

import numpy as np

from commands import QUICK, blobs, npz, run_here
from launch import mpirun, run
from mpicoll.train.run_folder import read_model


def test_alone_it_trains_on_one_rank_and_says_so_then_predicts(tmp_path):
    data = npz(tmp_path / "blobs.npz", **blobs(60))
    done = run_here([*QUICK, "--epochs", "20", "--data", data, "--out", "run", "--algorithm", "native"], tmp_path)
    assert (done.status, done.err) == (0, "")
    assert done.out.startswith("one rank: use more with mpirun")
    assert "unknown" in done.out

    fresh = npz(tmp_path / "fresh.npz", **blobs(30, seed=1))
    predicted = run_here(["mpicoll", "predict", "run", "--data", fresh], tmp_path)
    assert (predicted.status, predicted.err) == (0, "accuracy 100.00% (30 of 30)\n")
    assert predicted.out == "".join(f"{n % 3}\n" for n in range(30))
    unlabelled = npz(tmp_path / "unlabelled.npz", X=blobs(30)["X"])
    saved = run_here(["mpicoll", "predict", "run/model.safetensors", "--data", unlabelled, "--out", "y.txt"], tmp_path)
    assert (saved.status, saved.out) == (0, "30 predictions written to y.txt\n")
    assert len((tmp_path / "y.txt").read_text().split()) == 30
    few = npz(tmp_path / "few.npz", X=blobs(30)["X"][:2], y=[7, 1])  # a class the model does not know is just wrong
    assert "accuracy 50.00% (1 of 2)" in run_here(["mpicoll", "predict", "run", "--data", few], tmp_path).err


def test_labels_are_those_of_the_file(tmp_path):
    """In training, in a file to predict that lacks some of them, and in one that has another."""
    rng, names = np.random.default_rng(0), ["eel", "cat", "dog"]
    rows = [f"{5 * (n % 3) + rng.normal():.3f},{names[n % 3]}" for n in range(60)]
    (tmp_path / "a.csv").write_text("x,label\n" + "\n".join(rows) + "\n")
    assert mpirun(3, [*QUICK, "--epochs", "30", "--data", "a.csv", "--shards", "--out", "run"], tmp_path).status == 0
    (tmp_path / "b.csv").write_text("x,label\n10,dog\n0,eel\n10,gnu\n")
    predicted = run_here(["mpicoll", "predict", "run", "--data", "b.csv"], tmp_path)
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


def test_bad_models(tmp_path):
    assert run_here([*QUICK, "--out", "run"], tmp_path).status == 0
    model = tmp_path / "run/model.safetensors"
    whole = model.read_bytes()
    (tmp_path / "torn").write_bytes(whole[:-100])
    (tmp_path / "other").write_bytes(b"hello")
    for name, message in {"torn": "cannot be read", "other": "cannot be read", "gone": "does not exist"}.items():
        failed = run_here(["mpicoll", "predict", name], tmp_path)
        assert failed.status == 1
        assert re.fullmatch(f"mpicoll: model '{name}' {message}.*\n", failed.err)
    failed = run_here(["mpicoll", "predict", "run", "--data", npz(tmp_path / "d.npz", **blobs())], tmp_path)
    assert "has 4 features; the model was trained on 64" in failed.err
    assert "predict runs on one process" in mpirun(2, ["mpicoll", "predict", "run"], tmp_path).err
    far = run_here(
        ["mpicoll", "predict", "run", "--data", npz(tmp_path / "far.npz", X=np.full((1, 64), 1e300))], tmp_path
    )
    assert "features that overflow float32 when scaled" in far.err
    network, params, _, _ = read_model(model)
    assert (network.sizes, len(params)) == ((64, 10), 650)
