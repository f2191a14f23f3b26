"""``mpicoll`` commands in this process, which takes milliseconds, and many of them in one launch."""

import io
import json
import os
import re
import signal
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import chdir, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple, TextIO
from unittest.mock import patch

import numpy as np

from launch import TESTED, Outcome, mpirun, uncrowded
from mpicoll.cli import main

FILES = ["checkpoints", "config.toml", "environment.json", "metrics.jsonl", "model.safetensors", "summary.json"]
QUICK = ["mpicoll", "train", "--model", "softmax", "--epochs", "1"]


def run_here(
    command: Sequence[str | Path], cwd: Path, env: Mapping[str, str] | None = None, out: TextIO | None = None
) -> Outcome:
    """What ``launch.run`` does, in this process; ``out`` is where standard output goes instead."""
    name, *args = map(str, command)
    assert name == "mpicoll"
    written = io.BytesIO(), io.BytesIO()
    streams = [io.TextIOWrapper(one, encoding="utf-8", write_through=True) for one in written]
    interrupt, start = signal.getsignal(signal.SIGINT), time.monotonic()
    with (
        chdir(cwd),
        patch.dict(os.environ, {**TESTED, **(env or {})}),
        patch.object(sys, "argv", [name, *args]),
        redirect_stdout(out or streams[0]) as given,
        redirect_stderr(streams[1]),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("default")
        try:
            status = main(args)
        finally:
            signal.signal(signal.SIGINT, interrupt)
            if sys.stdout is not given:  # it could not be written
                sys.stdout.close()
    told, errors = (one.getvalue().decode() for one in written)
    return Outcome(status, told, errors, time.monotonic() - start)


def npz(path: Path, **arrays: object) -> Path:
    np.savez(path, **arrays)  # type: ignore[arg-type]
    return path


def blobs(samples: int = 60, seed: int = 0) -> dict[str, np.ndarray]:
    """Three classes that are easy to tell apart."""
    y = np.arange(samples) % 3
    return {"X": np.random.default_rng(seed).normal(size=(samples, 4)) + 5 * y[:, np.newaxis], "y": y}


def assert_one_line(done: Outcome, tmp_path: Path, status: int, message: str) -> None:
    """One clear line from rank 0, a status, and nothing written."""
    left = sorted(path.name for path in tmp_path.iterdir() if path.suffix != ".npz")
    assert done.status == status
    lines = [line for line in done.err.splitlines() if line.startswith("mpicoll: ")]
    assert len(lines) == 1, done.err
    assert re.search(message, lines[0])
    assert "Traceback" not in done.err
    assert left == []


class Told(NamedTuple):
    """What a command is on one rank: status, what it prints, and what the folder holds afterwards."""

    status: int
    out: str
    err: str
    left: list[str]


SEVERAL = """
import contextlib, io, json, sys, time
from pathlib import Path
from mpicoll import cli
from mpicoll.mpi.launch import world
comm, outcomes = world(), []
cli.time.sleep = lambda seconds: None  # nobody ends here before rank 0 has spoken
for command in json.loads(Path("commands").read_text()):
    with contextlib.redirect_stderr(io.StringIO()) as err, contextlib.redirect_stdout(io.StringIO()) as out:
        status = cli.main(command)
    left = sorted(path.name for path in Path().iterdir() if path.suffix != ".npz")
    outcomes.append((status, out.getvalue(), err.getvalue(), left))
    comm.Barrier()
for_all = comm.gather(outcomes)
if comm.rank == 0:
    Path("outcomes").write_text(json.dumps([*zip(*for_all)]))
"""


def outcomes(tmp_path: Path, commands: list[list[str]], ranks: int = 3) -> list[list[Told]]:
    """Commands one after the other in one job, which a launch for each would take much longer for: of each what it is
    on every rank."""
    (tmp_path / "commands").write_text(json.dumps([command[1:] for command in commands]))
    done = mpirun(ranks, [sys.executable, "-c", SEVERAL], tmp_path, timeout=70)
    assert (done.status, done.err) == (0, "")
    found = json.loads((tmp_path / "outcomes").read_text())
    return [[Told(status, out, uncrowded(err), left) for status, out, err, left in command] for command in found]


def assert_refused(ranks: list[Told], status: int, message: str) -> None:
    """By all of them, in one line of rank 0's, and nothing written."""
    for rank, told in enumerate(ranks):
        assert (told.status, told.left) == (status, ["commands"]), (message, told)
        assert told.err.count("\n") == (rank == 0), told
        assert rank or re.search(f"^mpicoll: .*({message})", told.err), told
