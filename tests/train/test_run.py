"""Whole runs: samples that are held out, and what a resumed run keeps."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

from datafiles import samples
from mpicoll import Comm, UserError
from mpicoll.train import holdout
from mpicoll.train.checkpoint import Checkpoint
from mpicoll.train.run import DEPENDS, run
from mpicoll.train.run import _changed as changed
from mpicoll.train.settings import Settings, read_settings


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


def test_what_is_not_as_before_is_said_of_models_not_of_ranks():
    """Two groups of two ranks are as many models as two ranks."""
    before = {"data_crc32": "a", "ranks": 2}
    facts: dict[str, Any] = {"ranks": 2, "environment": before, "settings": {"micro": 2}}
    found = Checkpoint(Path("run/checkpoints/epoch-00000001"), facts, {"rank-0": "", "rank-1": ""})
    now = {**dict.fromkeys(DEPENDS), "data_crc32": "b", "ranks": 4, "grid": "data=2,pipe=2"}
    same = changed(found, now, Settings(), 2, True)
    assert same == ["ranks 2 -> 4", "grid None -> data=2,pipe=2", "data_crc32 a -> b", "micro 2 -> None"]
    assert changed(found, now, Settings(), 4, False)[2:] == [
        "micro 2 -> None",
        "the models and momenta of 2 ranks are averaged",
    ]
