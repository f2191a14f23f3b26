"""Turns, cells and boxes of the compiled part, driven by threads: by themselves, and under sanitizers."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

NATIVE = Path(__file__).parents[2] / "mpicoll" / "native"
COMPILER = shutil.which("cc")
FLAGS = ["-std=c11", "-O1", "-g", "-ffp-contract=off"]
pytestmark = pytest.mark.skipif(COMPILER is None, reason="there is no C compiler")


def build(folder, *flags, change=None):
    """Compile the program, of sources that may be ``change``d: a regular expression, and what to put in its place."""
    sources = folder / "sources"
    shutil.copytree(NATIVE, sources)
    if change is not None:
        text, n = re.subn(change[0], change[1], (sources / "node.c").read_text(), flags=re.DOTALL)
        assert n, change
        (sources / "node.c").write_text(text)
    program = folder / "stress"
    files = [Path(__file__).with_name("stress.c"), sources / "node.c", sources / "kernels.c"]
    command = [COMPILER, *FLAGS, *flags, f"-I{sources}", *files, "-lpthread", "-o", program]
    made = subprocess.run(command, capture_output=True, text=True, timeout=60)
    if made.returncode and flags:
        pytest.skip(f"this compiler cannot do {' '.join(flags)}: {made.stderr.strip().splitlines()[-1]}")
    assert made.returncode == 0, made.stderr
    return program


def run(program, ranks, calls, seed):
    env = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1", "UBSAN_OPTIONS": "halt_on_error=1"}
    try:
        return subprocess.run(
            [program, str(ranks), str(calls), str(seed)], capture_output=True, text=True, timeout=40, env=env
        )
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(program, 124, "", "it hangs")


def assert_right(done):
    assert (done.returncode, done.stdout) == (0, "right\n"), done.stderr[-3000:]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return build(tmp_path_factory.mktemp("plain"))


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("ranks", [2, 3, 4, 7])
def test_every_result_is_right(plain, ranks, seed):
    assert_right(run(plain, ranks, 2000 if ranks < 4 else 600, seed))


def test_nothing_is_read_and_written_at_once(tmp_path):
    program = build(tmp_path, "-fsanitize=thread")
    for ranks in (2, 3, 4):
        assert_right(run(program, ranks, 200, ranks))


def test_nothing_is_undefined(tmp_path):
    program = build(tmp_path, "-fsanitize=undefined", "-fno-sanitize-recover=all")
    for ranks in (2, 3):
        assert_right(run(program, ranks, 500, ranks))


BROKEN = {
    "a flag is written before the data": (
        "(atomic_store_explicit\\(flag, value, )memory_order_release",
        r"\1memory_order_relaxed",
    ),
    "data are read before the flag": (
        "(static inline int await\\(.*?atomic_load_explicit\\(flag, )memory_order_acquire",
        r"\1memory_order_relaxed",
    ),
    "nobody waits for all": ("if \\(await_all\\(n\\)\\)\n        return BROKEN_OFF;\n    if \\(compare", "if (compare"),
    "a box is written while others read it": ("number >= RING; q\\+\\+", "0; q++"),
    "a piece is read before it is there": ("q != n->rank && k && await", "0 && await"),
    "a slice is got before it is reduced": (
        "(slice_of\\(n, count, size, q, &lo, &hi\\);\n        +if \\()q != n->rank &&",
        r"\g<1>0 &&",
    ),
    "what differs is summed": ("if \\(compare && !agreed\\(n, number\\)\\)", "if (0)"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_protocol_is_found(tmp_path, what):
    program = build(tmp_path, "-fsanitize=thread", change=BROKEN[what])
    for ranks in (2, 3):
        for seed in (1, 2):
            done = run(program, ranks, 300, seed)
            if done.returncode:
                assert "data race" in done.stderr or "call" in done.stderr
                return
    pytest.fail("nothing is found")
