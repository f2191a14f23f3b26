"""Starts jobs of its own under mpirun, always with a time limit, and always the mpirun beside this Python."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

BIN = Path(sys.prefix) / "bin"
REPOSITORY = Path(__file__).parents[1]
# Its launcher, after Ctrl-C, passes nothing on of what the ranks print, and kills them within half a second.
IS_OPEN_MPI = (BIN / "prterun").exists()
OPEN_MPI = {  # what the Makefile sets as well
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
}

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # a shell that runs this in the background has it ignored
    signal.signal(signal.SIGINT, signal.default_int_handler)  # by what is started here too, and Ctrl-C is tested

# What rank 0 says of more ranks than cores, which this machine may have or not: taken out of what is looked at.
CROWDED = "more ranks than cores: "

TESTED = {
    "MPICOLL_PROFILE": "none",  # what this machine was tuned to is not tested
    # Matplotlib complains of fonts that it knows of from an environment that is gone by now.
    "MPLCONFIGDIR": str(REPOSITORY / ".pytest_cache" / "matplotlib"),
}


class Outcome(NamedTuple):
    status: int
    out: str
    err: str
    seconds: float


def run(
    command: Sequence[str | Path],
    cwd: Path,
    timeout: float = 60,
    env: Mapping[str, str] | None = None,
    meanwhile: Callable[[subprocess.Popen[str]], None] = lambda process: None,
) -> Outcome:
    """Run to the end, in a process group of its own; past ``timeout`` seconds kill the group and fail.

    ``meanwhile`` is called with the running process.
    """
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    full = {**os.environ, **OPEN_MPI, "PATH": path, "PYTHONPATH": str(REPOSITORY)}
    full |= {"PYTHONWARNINGS": f"ignore:{CROWDED}", **TESTED, **(env or {})}
    start = time.monotonic()
    process = subprocess.Popen(
        [str(part) for part in command],
        cwd=cwd,
        env=full,
        text=True,
        errors="replace",
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        meanwhile(process)
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        raise AssertionError(f"{command} did not end in {timeout} s\n{out}\n{err}") from None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return Outcome(process.returncode, out, uncrowded(err), time.monotonic() - start)


def uncrowded(err: str) -> str:
    """Without what is said of more ranks than cores."""
    return "".join(line for line in err.splitlines(keepends=True) if not line.startswith(f"mpicoll: {CROWDED}"))


def mpirun(ranks: int, command: Sequence[str | Path], cwd: Path, **options: object) -> Outcome:
    """``run`` on several ranks."""
    return run(["mpirun", "-n", str(ranks), *command], cwd, **options)  # type: ignore[arg-type]
