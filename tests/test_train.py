"""The files of a run: what comes back, and what is left when something goes wrong."""

import json
import math
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from mpi4py import MPI
from safetensors import SafetensorError

from datafiles import samples
from mpicoll import Comm, UserError
from mpicoll.cli.app import app
from mpicoll.train import holdout, run_folder
from mpicoll.train.checkpoint import Checkpoint
from mpicoll.train.checks import check
from mpicoll.train.data import Dataset
from mpicoll.train.models import MODELS
from mpicoll.train.readers.raw import Schema
from mpicoll.train.run import run
from mpicoll.train.scaling import Scaling
from mpicoll.train.settings import NOT_SAVED, Settings, expected, kind_of, read_settings, written
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


def of_before(folder: Path) -> str:
    """The run's only checkpoint becomes one of an earlier version; returns what is told of its training samples."""
    (manifest,) = folder.glob("checkpoints/*/manifest.json")
    facts = json.loads(manifest.read_text())
    del facts["schema"], facts["scaling"], facts["settings"]["test_share"]
    manifest.write_text(json.dumps(facts))
    return facts["environment"]["data_crc32"]


@pytest.mark.parametrize("shards", [False, True])
def test_checkpoints_of_before_are_resumed_with_the_same_samples_or_refused(tmp_path, shards):
    x, y = samples(30)
    np.savez(tmp_path / "own.npz", X=x, y=y, X_test=x, y_test=y)  # a test set that was not drawn
    given = {"model": "softmax", "epochs": 2, "checkpoint": 2, "shards": shards, "out": str(tmp_path / "own")}
    own = Settings(**given, data=str(tmp_path / "own.npz"))
    run(Comm(MPI.COMM_SELF), own)
    crc = of_before(tmp_path / "own")
    summary = run(Comm(MPI.COMM_SELF), replace(own, epochs=4), resume=tmp_path / "own")
    assert (summary["data_crc32"], summary["changed"], summary["epochs_done"]) == (crc, [], 4)

    np.savez(tmp_path / "drawn.npz", X=x, y=y)
    drawn = replace(own, data=str(tmp_path / "drawn.npz"), out=str(tmp_path / "drawn"))
    run(Comm(MPI.COMM_SELF), drawn)
    of_before(tmp_path / "drawn")
    held = {path: path.read_bytes() for path in (tmp_path / "drawn").rglob("*.*")}
    with pytest.MonkeyPatch.context() as patch:  # as if it had been drawn otherwise
        patch.setattr(holdout, "_random", lambda seed, places: places)
        with pytest.raises(UserError, match=r"epoch-00000002' was written by an earlier version, and .*drawn.npz' now"):
            run(Comm(MPI.COMM_SELF), replace(drawn, epochs=4), resume=tmp_path / "drawn")
    assert {path: path.read_bytes() for path in (tmp_path / "drawn").rglob("*.*")} == held


def test_a_resumed_run_keeps_its_test_set(tmp_path):
    x, y = samples(50)
    np.savez(tmp_path / "d.npz", X=x, y=y)
    settings = Settings(
        data=str(tmp_path / "d.npz"), model="softmax", epochs=2, out=str(tmp_path / "r"), test_share=0.3, seed=5
    )
    first = run(Comm(MPI.COMM_SELF), settings)
    assert (first["test_samples"], first["test_share"], first["untrained"]) == (15, 0.3, [])
    assert read_settings(tmp_path / "r/config.toml")["test_share"] == 0.3
    again = run(Comm(MPI.COMM_SELF), replace(settings, epochs=3), resume=tmp_path / "r")
    assert (again["data_crc32"], again["changed"], again["test_samples"]) == (first["data_crc32"], [], 15)
    for other in (replace(settings, epochs=4, test_share=0.2), replace(settings, epochs=4, seed=6)):
        with pytest.raises(UserError, match=r"--(test-share|seed) is .*: of a resumed run only --epochs"):
            run(Comm(MPI.COMM_SELF), other, resume=tmp_path / "r")


@pytest.mark.parametrize("period", [5, 10, 7])
def test_labels_in_turn_are_all_learnt_and_all_tested(tmp_path, period):
    """Classes that are easy to tell apart, of which none may be missing in training or in the test set."""
    y = np.arange(40 * period) % period
    np.savez(tmp_path / "d.npz", X=np.eye(period)[y] + 0.01, y=y)
    settings = Settings(data=str(tmp_path / "d.npz"), model="softmax", epochs=5, checkpoint=0, out=str(tmp_path / "r"))
    for validation in (0.0, 0.1):
        given = replace(settings, validation=validation, out=str(tmp_path / str(validation)))
        assert run(Comm(MPI.COMM_SELF), given)["test_accuracy"] == 1


def test_settings_come_back_from_the_file_that_a_run_writes(tmp_path):
    odd = Settings(
        data='a "b"\\c\n/é\x7f\U0001f600.npz',
        lr=1e-7,
        hidden="3,4",
        mix_first=True,
        patience=4,
        out="x",
        validation=0.25,
    )
    (tmp_path / "config.toml").write_text(written(odd), encoding="utf-8")
    assert Settings(**read_settings(tmp_path / "config.toml"), out="x") == odd


def test_paths_that_are_no_text_and_numbers_of_either_kind(tmp_path):
    odd = Settings(data=b"\xff".decode(errors="surrogateescape"), hidden="5")
    (tmp_path / "c.toml").write_text(written(odd), encoding="utf-8", errors="surrogateescape")
    assert Settings(**read_settings(tmp_path / "c.toml")) == odd
    (tmp_path / "c.toml").write_text("hidden = 5\nlr = 1\n")
    assert read_settings(tmp_path / "c.toml") == {"hidden": "5", "lr": 1.0}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epochs = 3\nlerning-rate = 1\n", "has an unknown key 'lerning-rate': expected one of data, test, "),
        ("epohcs = 3\n", "has an unknown key 'epohcs': did you mean 'epochs'"),
        ("batch-sise = 3\n", "has an unknown key 'batch-sise': did you mean 'batch_size'"),
        ("epochs = [1]\n", "epochs must be a whole number, got .1."),
        ("epochs = 2.7\n", "epochs must be a whole number, got 2.7"),
        ("epochs = true\n", "epochs must be a whole number, got True"),
        ("lr = true\n", "lr must be a number, got True"),
        ("shards = 2\n", "shards must be true or false, got 2"),
        ("seed = 1" + 30 * "0" + "\n", "seed must be below 2\\^64, got 1000"),
        ('out = "a\\u0000b"\n', "out must be text"),
        ("[train]\nepochs = 1\n", "unknown key 'train'"),
        ("batch-size = 5\nbatch_size = 7\n", "has 'batch_size' twice, with - and with _: leave one of them out"),
        ("weight_decay = 0.1\nlr = 1\nweight-decay = 0.1\n", "has 'weight_decay' twice"),
        ("seed = " + 5000 * "9" + "\n", "is not TOML: "),
        ("seed = 0x" + 5000 * "f" + "\n", "seed must be below 2\\^64, got one of thousands of digits"),
        ("lr = " + 400 * "9" + "\n", "lr must be finite"),
        ("hidden = " + 5000 * "[" + "\n", "is not TOML: "),
        ("epochs 3\n", "is not TOML: "),
    ],
)
def test_configurations_that_will_not_do(tmp_path, text, message):
    path = tmp_path / "c.toml"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        read_settings(path)


NAMES = [field.name for field in fields(Settings)]

GIVEN: dict[type, list[Any]] = {
    int: [1, 2**31, 2**53 + 1, 2**63 - 1, 2**63, 2**64 - 1],
    float: [0.0, 5e-324, 1e-7, 0.1, 1 / 3, 1e16, 1e22, 1.7976931348623157e308],
    bool: [True, False],
    str: [
        *(
            "",
            " ",
            "a b",
            "\\",
            '"',
            "'",
            '"""',
            "#",
            "=",
            "[x]",
            "\n",
            "\r\n",
            "\t\b\f",
            "\x01\x1f",
            "\x7f",
            "\x80\x85",
        ),
        *(
            "\u2028\ufeff",
            "\ue000\uffff",
            "\U0001f600",
            b"\xff\xc3\xa9\x80".decode(errors="surrogateescape"),
            "true",
            "7",
        ),
    ],
}
"""Values of each type that a setting may have, as far as its type says."""

WRONG: dict[type, list[Any]] = {
    int: [2**64, 2**64 + 1, 2**1000, 1 << 20000, 1.5, True, "3", math.nan],
    float: [math.inf, -math.inf, math.nan, 2**1024, "0.1", False],
    bool: [1, 0.0, "yes"],
    str: ["a\0b", 3.5, True],
}


def test_every_value_that_is_accepted_is_read_back(tmp_path):
    path = tmp_path / "config.toml"
    for name in NAMES:
        for value in GIVEN[kind_of(name)]:
            assert expected(name, value) is None
            given = Settings(**{name: value})
            path.write_text(written(given), encoding="utf-8", errors="surrogateescape")
            back = Settings(**read_settings(path))
            assert back == (given if name not in NOT_SAVED else Settings())
            assert repr(getattr(back, name)) == repr(getattr(given, name)) or name in NOT_SAVED


def test_every_value_that_could_not_be_read_back_is_refused(tmp_path):
    assert {kind_of(name) for name in NAMES} == {*WRONG}
    for name in NAMES:
        for value in WRONG[kind_of(name)]:
            with pytest.raises(UserError, match=f"^--{name.replace('_', '-')} must be ") as caught:
                check(Settings(**{name: value}))
            assert len(str(caught.value)) < 100


def test_whole_numbers_that_could_not_be_read_back_are_no_options():
    """By flag, by environment, and in a file."""
    whole = [name for name in NAMES if kind_of(name) is int]
    assert len(whole) >= 13
    for name in whole:
        option = "--" + name.replace("_", "-")
        for value in (2**64, 10**30):
            for arguments, env in (([option, str(value)], {}), ([], {f"MPICOLL_TRAIN_{name.upper()}": str(value)})):
                failed = CliRunner().invoke(app, ["train", "--data", "gone.npz", *arguments], env=env)
                assert failed.exit_code == 2
                assert f"'{option}'" in failed.output
                assert f"{value} is not in the range" in " ".join(failed.output.split())


def test_configurations_that_cannot_be_read(tmp_path):
    for name, message in {"gone": "No such file", ".": "Is a directory"}.items():
        with pytest.raises(UserError, match=f"cannot be read: .*{message}"):
            read_settings(tmp_path / name)
