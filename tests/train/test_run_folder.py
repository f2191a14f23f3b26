"""The files of a run: what comes back, and what is left when something goes wrong."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors import SafetensorError

from mpicoll import UserError
from mpicoll.train import run_folder
from mpicoll.train.checkpoint import Checkpoint
from mpicoll.train.data import Dataset
from mpicoll.train.models import MODELS
from mpicoll.train.readers.raw import Schema
from mpicoll.train.scaling import Scaling
from mpicoll.train.settings import Settings, read_settings
from training import blobs


def data(classes: int = 3, labels: list | None = None) -> Dataset:
    scaling = Scaling(np.arange(4.0), np.arange(1.0, 5.0))
    named = np.array(labels or range(classes))
    return blobs(12)._replace(schema=Schema(4, named), scaling=scaling)


def softmax(folder: Path) -> None:
    """A run of one epoch."""
    settings, model = Settings(model="softmax"), MODELS["softmax"](4, 3, ())
    run_folder.begin(folder, settings, {"ranks": 1})
    run_folder.add_metrics(folder, {"epoch": 1})
    run_folder.finish(folder, settings, model, np.zeros(model.size), data(), {"loss": 1.5})


@pytest.mark.parametrize(
    ("name", "classes", "hidden"),
    [
        ("mlp", 3, None),
        ("mlp", 3, "5,6"),
        ("softmax", 3, None),
        ("logistic", 2, None),
        ("svm", 2, None),
        ("svm", 3, None),
    ],
)
@pytest.mark.parametrize("labels", [None, "text", "signed"])
def test_a_model_comes_back_as_it_was_written(tmp_path, name, classes, hidden, labels):
    settings = Settings(model=name, hidden=hidden)
    model = MODELS[name](4, classes, settings.widths)
    params = np.random.default_rng(0).normal(size=model.size).astype("f4")
    named = {"text": ["cat", "dog", "eel"], "signed": [-1, 1, 7]}.get(labels or "", [0, 1, 2])[:classes]
    whole = data(classes, named)
    run_folder.begin(tmp_path / "a" / "run", settings, {})
    run_folder.finish(tmp_path / "a" / "run", settings, model, params, whole, {})
    back, back_params, back_scaling, schema = run_folder.read_model(tmp_path / "a" / "run")
    assert back.sizes == model.sizes
    x = np.random.default_rng(1).normal(size=(20, 4))
    np.testing.assert_array_equal(back.predict(params, x), model.predict(params, x))
    np.testing.assert_array_equal(back_params, params)
    assert back_params.dtype == params.dtype
    np.testing.assert_array_equal(back_scaling, whole.scaling)
    assert schema.labels.tolist() == named


def test_a_model_of_one_class_is_refused(tmp_path):
    """As earlier versions wrote them, with an output for a class that there is not."""
    model = MODELS["softmax"](4, 1, ())
    run_folder.begin(tmp_path / "run", Settings(model="softmax"), {})
    run_folder.finish(tmp_path / "run", Settings(model="softmax"), model, np.zeros(model.size), data(1, ["yes"]), {})
    with pytest.raises(UserError, match=r"'.*model\.safetensors' knows fewer than two classes: there is nothing"):
        run_folder.read_model(tmp_path / "run")


def test_a_model_of_another_kind_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "FORMAT", "mpicoll-model-99")
    softmax(tmp_path / "run")
    monkeypatch.undo()
    with pytest.raises(UserError, match="has format 'mpicoll-model-99'; expected 'mpicoll-model-2'"):
        run_folder.read_model(tmp_path / "run")


def test_a_folder_appears_complete_and_is_filled_if_it_is_empty(tmp_path):
    (tmp_path / "empty").mkdir()
    run_folder.check_output(tmp_path / "empty")
    for name in ("empty", "new/deeper/run"):
        softmax(tmp_path / name)
        held = sorted(path.name for path in (tmp_path / name).iterdir())
        assert held == ["config.toml", "environment.json", "metrics.jsonl", "model.safetensors", "summary.json"]
    with pytest.raises(UserError, match="already holds files"):
        run_folder.check_output(tmp_path / "empty")
    with pytest.raises(FileExistsError):
        softmax(tmp_path / "empty")
    run_folder.check_output(tmp_path / "other" / "deeper" / "run")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "new"]


@pytest.mark.parametrize("error", [SafetensorError("No space left on device"), OSError(28, "No space left on device")])
def test_a_full_disk_is_one_line_and_leaves_no_part_of_a_model(tmp_path, monkeypatch, error):
    def full(*arguments: object, **keywords: object) -> None:
        raise error

    monkeypatch.setattr("safetensors.numpy.save_file", full)
    with pytest.raises(UserError, match=r"cannot be written .No space left on device.; name another one"):
        softmax(tmp_path / "run")
    held = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert held == ["config.toml", "environment.json", "metrics.jsonl"]
    monkeypatch.setattr(Path, "write_text", full)
    if isinstance(error, OSError):
        with pytest.raises(UserError, match=r"cannot be written .No space left on device.; name another one"):
            softmax(tmp_path / "other")
        assert not (tmp_path / "other").exists()


def test_metrics_of_epochs_to_be_done_again_are_dropped_and_a_torn_line_does_not_count(tmp_path):
    run_folder.begin(tmp_path / "run", Settings(), {})
    for epoch in range(1, 6):
        run_folder.add_metrics(tmp_path / "run", {"epoch": epoch, "loss": 1 / epoch})
    with (tmp_path / "run/metrics.jsonl").open("a") as file:
        file.write('{"epoch": 6, "lo')
    assert [line["epoch"] for line in run_folder.read_metrics(tmp_path / "run")] == [1, 2, 3, 4, 5]
    (tmp_path / "run/summary.json").write_text("{}")
    found = Checkpoint(tmp_path / "run/checkpoints/epoch-00000003", {"epoch": 3}, {})
    run_folder.resume(tmp_path / "run", Settings(epochs=77), found)
    text = (tmp_path / "run/metrics.jsonl").read_text()
    assert [json.loads(line)["epoch"] for line in text.splitlines()] == [1, 2, 3]
    assert read_settings(tmp_path / "run/config.toml")["epochs"] == 77
    assert not (tmp_path / "run/summary.json").exists()
    for line in ("7", "{}", '{"epoch": "x"}'):
        (tmp_path / "run/metrics.jsonl").write_text('{"epoch": 1}\n' + line + "\n")
        with pytest.raises(UserError, match=r"cannot be read .line 2 is not that of an epoch."):
            run_folder.read_metrics(tmp_path / "run")
    with pytest.raises(UserError, match=r"cannot be read .No such file or directory.; expected the folder of a run"):
        run_folder.read_metrics(tmp_path)
