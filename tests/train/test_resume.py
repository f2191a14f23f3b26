"""Jobs that are killed and resumed, from outside."""

import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from launch import mpirun

KILLS = int(os.environ.get("MPICOLL_TEST_KILLS", "2"))
EPOCHS = 15 * KILLS + 15  # of a few milliseconds: more than go by until a kill has come through
RUN = ["mpicoll", "train", "--model", "softmax", "--epochs", str(EPOCHS), "--validation", "0.1", "--lr", "0.02"]


def metrics(folder: Path) -> list[dict[str, Any]]:
    """Without what is measured in seconds."""
    timed = ("seconds", "samples_per_s", "communicating")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in timed} for line in lines]


def kill_all_in(folder: Path) -> None:
    """SIGKILL for the launcher, its helpers and all ranks, until there are none."""
    while True:
        left = []
        for process in Path("/proc").glob("[0-9]*"):
            try:
                if (process / "cwd").resolve() == folder and int(process.name) != os.getpid():
                    left.append(int(process.name))
            except OSError:
                continue
        if not left:
            return
        for number in left:
            try:
                os.kill(number, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.01)


@pytest.mark.parametrize("strategy", ["sync", "average", "butterfly", "gossip"])
@pytest.mark.timeout(60 + 20 * KILLS)
def test_killed_at_any_moment_and_resumed_it_ends_with_the_same_bits(tmp_path, strategy):
    command = [*RUN, "--strategy", strategy]
    assert mpirun(2, [*command, "--out", "whole"], tmp_path).status == 0
    lines, rng, run = tmp_path / "run/metrics.jsonl", random.Random(strategy), tmp_path / "run"
    for _ in range(KILLS):
        resumed = run.exists()
        done = lines.read_text().count("\n") if resumed else 0
        until = done + rng.randint(2, 4)

        def kill(process: subprocess.Popen[str], until: int = until) -> None:
            while process.poll() is None and not (lines.exists() and lines.read_text().count("\n") >= until):
                time.sleep(0.001)
            time.sleep(rng.uniform(0, 0.03))
            kill_all_in(tmp_path)

        again = ["mpicoll", "train", "--resume", "run"] if resumed else [*command, "--out", "run"]
        killed = mpirun(2, again, tmp_path, meanwhile=kill)
        assert killed.status != 0, killed
        assert not (run / "summary.json").exists()
    ended = mpirun(2, ["mpicoll", "train", "--resume", "run"], tmp_path)
    assert (ended.status, ended.err) == (0, "")
    assert "resumed from run/checkpoints/epoch-" in ended.out
    assert (run / "model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()
    assert metrics(run) == metrics(tmp_path / "whole")
    assert list(run.rglob(".*")) == []
