"""What the scripts of this folder share: their command line, launches, records, and facts of the machine.

A script looks first whether all is there that it is going to need (``look_first``), launches workers of itself
(``launched``) within ``measuring``, and ends with ``finish``, which records, shows and draws.
"""

import argparse
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from cluster import SKIPPED

from mpicoll.files import replace, to_json

RESULTS = Path(__file__).parent / "results"
TORCH = importlib.util.find_spec("torch") is not None


# ---- the command line


def command(
    parser: argparse.ArgumentParser,
    measure: Callable[[], dict],
    show: Callable[[dict], None],
    draw: Callable[[dict], None] | None = None,
) -> argparse.Namespace | None:
    """The arguments if there is something to measure, else ``None``.

    There is not if a recorded result was shown or drawn here, or if this is a worker, which ``launched`` has launched:
    it has measured, and written what it found.
    """
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--show", type=existing, metavar="FILE")
    if draw:
        parser.add_argument("--plot", type=existing, metavar="FILE")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        result = measure()
        if result.pop("rank") == 0:
            args.worker.write_text(to_json(result))
    elif args.show:
        show(json.loads(args.show.read_text()))
    elif draw and args.plot:
        draw(json.loads(args.plot.read_text()))
    else:
        return args
    return None


def existing(name: str) -> Path:
    """The path of a file, which must exist: the type of an argument."""
    if not Path(name).is_file():
        raise argparse.ArgumentTypeError(f"{name!r} is no file: name one that was recorded, as those in bench/results")
    return Path(name)


# ---- what is needed

LOOK = """
import importlib, sys
from mpicoll.errors import UserError
from mpicoll.mpi.launch import check, launched_rank, load
modules, data = (words.split() for words in sys.argv[1:])
missing = None
try:
    load()
    import numpy as np
    from mpi4py import MPI
    check(MPI.COMM_WORLD)
    for name in modules:
        importlib.import_module(name)
    for name in data:
        from mpicoll.train.data import load
        load(name, MPI.COMM_SELF, np.dtype("f4"))
except ModuleNotFoundError as error:
    missing = f"the package {error.name} is missing: pip install {error.name}"
except UserError as error:
    missing = error
if missing and launched_rank() == 0:
    print(missing)
"""


def look_first(*modules: str, data: Sequence[str] = (), cluster: Sequence[str] = (), out: Sequence[Path] = ()) -> None:
    """End in one line if anything is missing that a script is going to need, and not after minutes of measuring.

    It needs an mpirun that suits this Python, modules, data sets, a cluster with such options, folders to write to.
    """
    RESULTS.mkdir(exist_ok=True)
    for path in (RESULTS / "any.json", *out):
        if path.is_dir() or not os.access(path.absolute().parent, os.W_OK):
            sys.exit(f"{str(path)!r} cannot be written: name a file in a folder of yours that exists")
    look = [*mpirun(2), sys.executable, "-m", "mpi4py", "-c", LOOK, " ".join(modules), " ".join(data)]
    try:
        done = subprocess.run(look, capture_output=True, text=True, timeout=120)
    except FileNotFoundError:
        sys.exit("there is no mpirun: install an MPI beside this Python, as pip install 'mpicoll[mpich]' does")
    if done.stdout or done.returncode:
        sys.exit((done.stdout or done.stderr or f"{look[0]} does not work").splitlines()[0])
    if cluster:
        tried = [sys.executable, str(Path(__file__).with_name("cluster.py")), "--ranks-per-host", "1", *cluster, "--"]
        try_it = [sys.executable, "-c", "from mpi4py import MPI"]
        if status := subprocess.run([*tried, *try_it], stdout=sys.stderr, timeout=120).returncode:
            sys.exit(status)


# ---- launches


def launched(script: str, ranks: int, *options: str) -> dict:
    """Launch ``script --worker FILE`` on this machine, and return the JSON that rank 0 writes to the file."""
    return written(script, mpirun(ranks), *options, MPICOLL_PROFILE="none")


def written(script: str, launcher: Sequence[str], *options: str, **environment: str) -> dict:
    """Run ``script --worker FILE`` by a launcher with an environment, and return the JSON that rank 0 writes."""
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder, "launch.json")  # of long output some was lost, under MPICH, twice
        worker = [sys.executable, "-m", "mpi4py", script, *options, "--worker", str(found)]  # one rank failing ends it
        env = {**os.environ, **environment}
        subprocess.run([*launcher, *worker], stdout=sys.stderr, check=True, timeout=600, env=env)
        return json.loads(found.read_text())


def mpirun(ranks: int) -> list[str]:
    """The command that launches this number of ranks on this machine."""
    beside = Path(sys.prefix, "bin", "mpirun")
    return [str(beside) if beside.exists() else "mpirun", "-n", str(ranks)]


# ---- records


class Ended:
    """The reason why measuring ended early, if it did, and the exit status of the script."""

    def __init__(self) -> None:
        self.why, self.status = "", 0


@contextmanager
def measuring(found: list | dict) -> Iterator[Ended]:
    """A block in which launches are added to ``found``; whatever ends it, Ctrl-C too, is kept for ``finish``.

    If it ends early and nothing was found, the script ends.
    """
    ended = Ended()
    try:
        yield ended
    except subprocess.CalledProcessError as error:
        ended.why = f"a launch has ended with status {error.returncode}"
        ended.status = SKIPPED if error.returncode == SKIPPED else 1
    except subprocess.TimeoutExpired as error:
        ended.why, ended.status = f"a launch has not ended in {error.timeout:g} s", 1
    except KeyboardInterrupt:
        ended.why, ended.status = "interrupted", 130
    except SystemExit as error:
        ended.why, ended.status = str(error.code), 1
    except Exception as error:
        traceback.print_exc()
        ended.why, ended.status = f"{type(error).__name__}: {error}", 1
    if ended.why and not any(found.values() if isinstance(found, dict) else found):
        _end(ended, "nothing was measured before")


def finish(
    name: str,
    found: list | dict,
    ended: Ended,
    record: Callable[[], dict],
    show: Callable[[dict], None],
    draw: Callable[[dict], None] | None = None,
) -> None:
    """Record, show and draw, in this order: nothing that goes wrong later loses what was measured.

    If measuring has ended early, what there is is recorded under a name of its own, so that a whole record stays, and
    the script ends.  If nothing can be made of it, launches are recorded as they are.
    """
    part = f"{name}-unfinished"
    try:
        made = record()
    except (Exception, SystemExit) as error:
        why = ended.why or f"{type(error).__name__}: {error}"
        save({"failed": why, "found": found}, part)
        if ended.why:
            _end(ended, "what was measured before is recorded, as it is")
        raise
    if ended.why:
        save({"failed": ended.why, **made}, part)
        show(made)
        _end(ended, "what was measured before is recorded")
    save(made, name)
    show(made)
    if draw:
        draw(made)


def _end(ended: Ended, more: str) -> NoReturn:
    sys.stdout.flush()
    print(f"{Path(sys.argv[0]).name}: {ended.why}; {more}", file=sys.stderr, flush=True)
    sys.exit(ended.status)


def save(record: dict, name: str) -> None:
    """Write a record to ``RESULTS``, with a line for each row of its table."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    text = to_json(record, indent=1)
    if isinstance(record.get("table"), list):
        rows = ",\n".join("  " + to_json(row) for row in record["table"])
        text = to_json({**record, "table": None}, indent=1)
        text = text.replace('"table": null', f'"table": [\n{rows}\n ]')
    replace(path, text + "\n")
    print(f"\nrecorded in {os.path.relpath(path)}", file=sys.stderr)


def spread(values: list[float], digits: int = 3) -> list[float]:
    """The median, the least and the most."""
    return [round(float(f(values)), digits) for f in (np.median, np.min, np.max)]


# ---- facts


def machine() -> dict:
    """The machine and the versions that the numbers depend on."""
    cpu = Path("/proc/cpuinfo").read_text().split("model name", 1)[1].split(":", 1)[1].splitlines()[0].strip()
    import mpi4py

    import mpicoll
    from mpicoll.mpi import native

    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "mpi4py": mpi4py.__version__,
        "mpicoll": mpicoll.__version__,
        "compiled": native.state(),
        **({"torch": version("torch")} if TORCH else {}),
        "date": time.strftime("%Y-%m-%d"),
    }


def library(mpi: str) -> str:
    """The name of an MPI library without its version, as a part of a file's name."""
    return mpi.rsplit(" ", 1)[0].lower().replace(" ", "-")


def gloo(comm, first: str = "127.0.0.1") -> Any:
    """``torch.distributed`` with a process group of all ranks, one thread a rank; a collective call.

    Ranks meet at a port that is free on the host of the first rank, whose address others know as ``first``.
    """
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    meeting = dist.TCPStore(first, 0, is_master=True, wait_for_workers=False) if comm.rank == 0 else None
    port = comm.bcast(meeting and meeting.port)
    store = meeting or dist.TCPStore(first, port)
    dist.init_process_group("gloo", store=store, rank=comm.rank, world_size=comm.size)
    return dist
