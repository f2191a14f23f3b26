"""Every command of the README runs, and prints what the README shows, numbers aside."""

import re
import shlex
import sys
from pathlib import Path

import pytest

from launch import REPOSITORY, run

README = (REPOSITORY / "README.md").read_text()
BLOCKS = re.findall(r"```console\n(.*?)```", README, re.DOTALL)
PROGRAMS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
COMMANDS = [
    (command, shown)
    for block in BLOCKS
    for command, shown in re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", block, re.MULTILINE)
]


def masked(text: str) -> list[str]:
    """Lines with numbers, the width of columns, and which rank happens to be the slowest taken out."""
    lines = [re.sub("  the slowest$", "", line) for line in text.splitlines()]
    return [re.sub(r"\s+", " ", re.sub(r"[\d.,]*\d", "N", line)).strip() for line in lines]


def assert_shown(shown: str, printed: str) -> None:
    """``...`` in what is shown stands for any lines."""
    pattern = "".join("(?:.*\n)*?" if line == "..." else re.escape(line) + "\n" for line in masked(shown))
    text = "".join(line + "\n" for line in masked(printed))
    assert re.fullmatch(pattern, text), f"the README shows\n{shown}\nprinted was\n{printed}"


@pytest.mark.timeout(300)
def test_every_command_runs_and_prints_what_the_readme_shows(tmp_path):
    (tmp_path / "job.py").write_text(PROGRAMS[0])
    ci = (REPOSITORY / ".ci" / "run").read_text().splitlines()
    assert len(COMMANDS) >= 8
    for command, shown in COMMANDS:
        if command == "make test":  # this is it
            assert command in ci
            continue
        # All ranks take most of a minute, and numbers of epochs are numbers.
        where, env = tmp_path, {"MPICOLL_VERIFY_MAX_RANKS": "16", "MPICOLL_TRAIN_EPOCHS": "6"}
        if command == "make train":  # without building the environment this test runs in
            command += f" --assume-old={Path(sys.prefix).name}/.train-installed"
            where = REPOSITORY
            env |= {"MPICOLL_TRAIN_OUT": str(tmp_path / "run"), "MAKELEVEL": "0", "MAKEFLAGS": ""}
        done = run(shlex.split(command), where, timeout=120, env=env)
        assert done.status == 0, (command, done)
        printed = done.out + done.err
        assert_shown(shown.replace("runs/20261123-092206-digits-mlp-sync-p4", str(tmp_path / "run")), printed)


def test_a_wrong_line_is_found():
    assert_shown("...\nsteps 690 in 2 s\n", "else\nsomething\nsteps  12 in 0.5 s\n")
    with pytest.raises(AssertionError, match="the README shows"):
        assert_shown("...\nstepz 690\n", "something\nsteps 12\n")
    with pytest.raises(AssertionError):
        assert_shown("steps 690\n", "something\nsteps 12\n")


def test_links_lead_somewhere():
    headings = {line.strip("# ").lower().replace(" ", "-") for line in README.splitlines() if line.startswith("## ")}
    for target in re.findall(r"\]\(([^)]*)\)", README):
        assert (REPOSITORY / target).exists() or target.removeprefix("#") in headings, target


def test_the_tables_are_the_recorded_ones():
    recorded = REPOSITORY / "bench" / "results" / "allreduce-mpich-gloo.json"
    columns = ["auto", "shared_arrays", "shared_result", "mpi4py ring", "circulant", "gloo"]
    command = [sys.executable, REPOSITORY / "bench" / "allreduce.py", "--show", recorded, "--only", *columns]
    shown = run(command, REPOSITORY).out.splitlines()
    strategies = REPOSITORY / "bench" / "results" / "strategies.json"
    shown += run(
        [sys.executable, REPOSITORY / "bench" / "strategies.py", "--show", strategies], REPOSITORY
    ).out.splitlines()
    rows = [line for line in README.splitlines() if line.startswith("| ")]
    assert len(rows) >= 10
    for row in rows:
        assert row in shown
    assert "wrong results: 0" in "".join(shown)
