"""What an expert would ask first where something is slow or broken: facts of this job, and what is wrong with them.

Two parts: ``alone``, of this process, before there is an MPI, which may be what is broken; ``together``, of all ranks.
Facts are plain values, as JSON has them.
"""

import ctypes
import os
import platform
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, redirect_stderr, suppress
from dataclasses import dataclass, field
from importlib.metadata import distributions, version
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import __version__
from ..errors import UserError
from ..mpi import launch, native
from ..mpi.launch import SEGMENT, WHEELS, cores, launched_rank, launched_ranks, library_name, world
from ..tuning.fingerprint import Fingerprint, machine
from ..tuning.profile import VARIABLE, profile_path, read_profile, refusal
from ..tuning.rules import GPU_PATHS

if TYPE_CHECKING:
    from mpi4py import MPI

    from ..mpi.state import State

Facts = dict[str, Any]


@dataclass
class Findings:
    """Facts by topic; what is wrong, so that programs fail; and what is doubtful: they work, slower, or not as meant.

    Both are lines that say what to do.
    """

    facts: dict[str, Any] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    doubtful: list[str] = field(default_factory=list)


# ---- of this process


def alone(known: Collection[str]) -> Findings:
    """Find what can be found without an MPI; ``known`` are the environment variables that are options."""
    found = Findings()
    found.facts["software"] = _software()
    unknown = launch.unknown_variables(known)
    found.doubtful += [launch.unknown(name, meant) for name, meant in unknown.items()]
    found.facts["variables"] = {"set": _variables(), "unknown": unknown}
    found.facts["launcher"] = {"name": launch.launcher(), "ranks": launched_ranks()}
    return found


def _software() -> Facts:
    return {
        "mpicoll": __version__,
        "compiled": _or_none(native.state) or "MPICOLL_NATIVE is wrong",
        "python": platform.python_version(),
        "numpy": np.__version__,
        "mpi4py": _or_none(lambda: version("mpi4py")),
        "executable": sys.executable,
        "wheels": {name: one.version for name in WHEELS for one in distributions(name=name)},
        "told": {name: os.environ[name] for name in sorted(os.environ) if name.startswith("MPI4PY_")},
    }


def _variables() -> dict[str, str]:
    return {name: value for name, value in sorted(os.environ.items()) if name.startswith("MPICOLL_")}


def _own() -> Facts:
    """Facts of this process, once MPI is loaded, if it can be: nothing here waits for other ranks."""
    return {
        "rank": launched_rank(),
        "software": {key: value for key, value in _software().items() if key not in ("executable", "told")},
        "variables": _variables(),
        "mpi": _library(),
        "host": socket.gethostname(),
        "cores": cores(),
        "blas": _or_none(_blas) or [],
        "memory": _or_none(_memory),
        "shm": _or_none(_shm),
        "driver": _driver(),
        "gpu_variables": {name: value for name, value in sorted(os.environ.items()) if _of_gpus(name)},
        "mps": os.path.exists(os.path.join(os.environ.get("CUDA_MPS_PIPE_DIRECTORY", "/tmp/nvidia-mps"), "control")),
    }


def _of_gpus(name: str) -> bool:
    return name.startswith("CUDA_") or (name.startswith("SLURM_") and "GPU" in name)


def _library() -> Facts | None:
    """Facts of the MPI library that is loaded; ``None`` if none can be."""
    if "mpi4py.MPI" not in sys.modules:
        return None
    from mpi4py import MPI

    ranks = MPI.COMM_WORLD.size if MPI.Is_initialized() else None
    return {"name": library_name(), "files": _or_none(_files) or [], "ranks": ranks}


def _files() -> list[str]:
    """Return the files that the kernel says the MPI library is loaded from."""
    maps = Path("/proc/self/maps").read_text(errors="surrogateescape").splitlines()
    paths = dict.fromkeys(line.split(maxsplit=5)[5] for line in maps if line.count("/"))
    return [path for path in paths if re.search(r"/libmpi[^/]*\.so[.\d]*$", path)]


def _blas() -> list[Facts]:
    from threadpoolctl import threadpool_info

    found = [one for one in threadpool_info() if one["user_api"] == "blas"]
    return [{"name": one["internal_api"], "threads": one["num_threads"]} for one in found]


def _memory() -> Facts:
    """Bytes of memory: of the machine, still available (once MPI is loaded), and the limit of the container."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = None
    for path in ("memory.max", "memory/memory.limit_in_bytes"):  # cgroups, and their first version
        with suppress(OSError, ValueError):  # "max" is none
            limit = int(Path("/sys/fs/cgroup", path).read_text())
    return {"total": total, "available": _or_none(_available), "limit": limit if limit and limit < total else None}


def _available() -> int:
    from ..mpi.memory import available

    return available()


def _shm() -> Facts:
    memory = os.statvfs("/dev/shm")
    return {"total": memory.f_blocks * memory.f_frsize, "available": memory.f_bavail * memory.f_frsize}


def _driver() -> Facts:
    """What CUDA's driver says, which is asked without CuPy, and without making a context on a device."""
    try:
        return _devices(ctypes.CDLL("libcuda.so.1"))
    except OSError:
        return {"version": None, "error": "there is no NVIDIA driver here (libcuda.so.1)", "devices": []}
    except Exception as error:
        return {"version": None, "error": f"the NVIDIA driver cannot be asked ({error})", "devices": []}


def _devices(cuda: Any) -> Facts:
    number, size = ctypes.c_int(), ctypes.c_size_t()
    text, uuid = ctypes.create_string_buffer(256), (ctypes.c_ubyte * 16)()
    cuda.cuDriverGetVersion(ctypes.byref(number))
    driver: Facts = {"version": f"{number.value // 1000}.{number.value % 1000 // 10}", "error": None, "devices": []}
    if status := cuda.cuInit(0):
        said = ctypes.c_char_p()
        cuda.cuGetErrorName(status, ctypes.byref(said))
        driver["error"] = f"the NVIDIA driver gives no GPU ({(said.value or b'?').decode()})"
        return driver
    cuda.cuDeviceGetCount(ctypes.byref(number))
    for n in range(number.value):
        device = ctypes.c_int()
        cuda.cuDeviceGet(ctypes.byref(device), n)
        cuda.cuDeviceGetName(text, len(text), device)
        name = text.value.decode(errors="replace")
        cuda.cuDeviceGetPCIBusId(text, len(text), device)
        cuda.cuDeviceTotalMem_v2(ctypes.byref(size), device)
        getattr(cuda, "cuDeviceGetUuid_v2", cuda.cuDeviceGetUuid)(uuid, device)  # which tells parts of one apart
        bus = text.value.decode(errors="replace")
        driver["devices"].append({"name": name, "bus": bus, "memory": size.value, "uuid": bytes(uuid).hex()})
    return driver


def _or_none(ask: Callable[[], Any]) -> Any:
    try:
        return ask()
    except Exception:  # what cannot be known is no reason to say nothing of the rest
        return None


# ---- of all ranks


def together(found: Findings, seconds: float) -> bool:
    """Start MPI and complete what was found ``alone``; return true on the rank that has it all, and is to print it.

    A collective call.  A process that has not come through in time ends, and prints on standard error where
    it was.
    """
    with _limit(seconds) as doing:
        doing("starting MPI")
        told = StringIO()
        try:
            _tell_before_a_crash()
            with redirect_stderr(told):
                comm = world()
        except UserError as error:
            found.doubtful += _lines(told)
            _tell_of_failure(found, str(error))
            return launched_rank() == 0
        found.doubtful += [line for line in _lines(told) if line not in found.doubtful]
        from .guard import ends_job

        with ends_job(comm):
            _ask_all(comm, found, doing)
            found.wrong = comm.bcast(found.wrong)  # the exit status is everybody's
    return comm.rank == 0


def _lines(told: StringIO) -> list[str]:
    return [line.removeprefix("mpicoll: ") for line in told.getvalue().splitlines()]


def _tell_before_a_crash() -> None:
    """Print that /dev/shm is small, if it is: MPICH may end in a bus error."""
    shm, ranks = _or_none(_shm), os.environ.get("MPI_LOCALNRANKS", "")
    needed = int(ranks) * SEGMENT if ranks.isdigit() and int(ranks) > 1 else 0
    if shm and shm["available"] < needed and launched_rank() == 0:
        free = f"/dev/shm has {shm['available'] >> 10} KiB free"
        print(f"mpicoll: {free}: MPI may crash now; a container gets more by --shm-size", file=sys.stderr, flush=True)


def _tell_of_failure(found: Findings, error: str) -> None:
    """Add the error, and the facts of this process only: there is no MPI, or no job."""
    own, told = _own(), found.facts["software"]["told"]
    if own["mpi"] is None and told:
        error += f"; or unset {' and '.join(told)}, by which mpi4py finds what to load"
    found.wrong.append(error)
    found.facts["mpi"] = own["mpi"]
    found.facts["nodes"] = _nodes([{**own, "first": own["rank"], "shared": None}])
    found.facts["gpus"] = _gpus([own], None)


def _ask_all(comm: "MPI.Intracomm", found: Findings, doing: Callable[[str], None]) -> None:
    from ..mpi.state import State

    own = {**_own(), "rank": comm.rank}
    doing("making a communicator of mpicoll's")
    state = State(comm, {})  # no rules: a profile that is wrong is reported, not raised
    doing("sharing memory")
    own["first"], own["shared"] = state.node.comm.bcast(comm.rank), _shared_by(state)
    doing("looking for GPUs and paths")
    own["gpu"], own["cupy"], lacking = _taken(comm)
    reasons = _paths(state, own["gpu"], lacking)
    doing("comparing the ranks")
    everyone = comm.gather(own)
    if everyone is not None:
        _compile(comm, found, everyone, state)
        found.facts["gpus"] = _gpus(everyone, lacking)
        found.facts["paths"] = reasons
        found.doubtful += _about_gpus(found.facts["gpus"])
    state.release()


def _compile(comm: "MPI.Intracomm", found: Findings, everyone: list[Facts], state: "State") -> None:
    """Complete the findings from the facts of all ranks, on rank 0."""
    found.facts["mpi"] = {**everyone[0]["mpi"], "threads": _threads(), "aware": _aware()}
    found.facts["nodes"] = nodes = _nodes(everyone)
    found.facts["profile"] = _profile(found, state)
    for what, key in (("versions", "software"), ("MPI libraries", "mpi"), ("MPICOLL_ variables", "variables")):
        kinds = grouped((str(one[key]), one["rank"]) for one in everyone)
        if len(kinds) > 1:
            from ..mpi.record import named

            others = ", ".join(map(named, list(kinds.values())[1:]))
            found.doubtful.append(f"{what} are not the same everywhere: {others} differ from rank 0 (--json has them)")
            found.facts.setdefault("differing", {})[key] = {named(ranks): kind for kind, ranks in kinds.items()}
    found.doubtful += _about_nodes(nodes)


def _about_nodes(nodes: list[Facts]) -> list[str]:
    return [
        f"the ranks on {node['host']} share no memory, so that collectives are slower: either memory is full, "
        "or they are in containers of their own, or of little /dev/shm (docker: --shm-size)"
        for node in nodes
        if len(node["ranks"]) > 1 and not node["shared"]
    ]


def _nodes(everyone: list[Facts]) -> list[Facts]:
    nodes = []
    for ranks in grouped((one["first"], one) for one in everyone).values():
        first = ranks[0]
        nodes.append(
            {
                "host": first["host"],
                "ranks": [one["rank"] for one in ranks],
                "cores": [one["cores"] for one in ranks],
                "blas": [one["blas"] for one in ranks],
                "shared": first["shared"],
                "memory": first["memory"],
                "shm": first["shm"],
            }
        )
    return nodes


def _shared_by(state: "State") -> str | None:
    """Return by which means the ranks of this node share memory, or ``None``; a collective call of the node."""
    from ..mpi.memory import PAGE, in_shm, nameless, share

    if state.node.shares:
        for make, name in ((nameless, "memory without a name, through /proc"), (in_shm, "files in /dev/shm")):
            if share(state.node.comm, PAGE, [make]) is not None:
                return name
    return None


def _threads() -> Facts:
    import mpi4py
    from mpi4py import MPI

    levels = ("single", "funneled", "serialized", "multiple")
    given = next(name for name in levels if getattr(MPI, f"THREAD_{name.upper()}") == MPI.Query_thread())
    return {"asked": mpi4py.rc.thread_level if mpi4py.rc.threads else "single", "given": given}


def _profile(found: Findings, state: "State") -> Facts:
    """Which file is in force, or why none is."""
    here = Fingerprint(library_name(), machine(), state.layout)
    place = profile_path(here)
    if place is None:
        return {"file": None, "in_force": False, "why": f"{VARIABLE} says that none is wanted"}
    path, needed = str(place[0]), place[1]
    facts: Facts = {"file": path, "in_force": False, "why": None}
    if not needed and not os.path.exists(path):
        facts["why"] = f"there is none: mpirun -n {max(state.p, 2)} mpicoll tune makes it"
        if not _can_be_made(place[0]):
            facts["why"] += " with another place, --out FILE: nothing can be written there"
        return facts
    try:
        refused = refusal(read_profile(path), here)
    except UserError as error:
        facts["why"] = "it is wrong"
        found.wrong.append(str(error))
        return facts
    if refused:
        facts["why"] = "it is for elsewhere"
        found.doubtful.append(f"profile {path!r} is not used: {refused}")
    return {**facts, "in_force": not refused}


def _can_be_made(path: Path) -> bool:
    folder = next((one for one in path.absolute().parents if os.path.exists(one)), Path("/"))
    return os.path.isdir(folder) and os.access(folder, os.W_OK | os.X_OK)


def _aware() -> Facts:
    """Facts that the MPI library gives about memory on GPUs, by the functions it has for that.

    Only a hint: it may say no where it works, and says nothing about single operations.
    """
    said: Facts = {}
    for path in _or_none(_files) or []:
        with suppress(OSError, AttributeError):
            library, answer = ctypes.CDLL(path), ctypes.c_int()
            if hasattr(library, "MPIX_Query_cuda_support"):
                said["MPIX_Query_cuda_support"] = bool(library.MPIX_Query_cuda_support())
            if hasattr(library, "MPIX_GPU_query_support"):  # 0 is CUDA
                library.MPIX_GPU_query_support(0, ctypes.byref(answer))
                said["MPIX_GPU_query_support"] = bool(answer.value)
    return said


# ---- GPUs


def _taken(comm: "MPI.Intracomm") -> tuple[Facts | None, Facts | None, str | None]:
    """Return the GPU that this rank has, facts of CuPy, and if there is no GPU, why; a collective call."""
    from ..mpi.gpu.array import cupy
    from ..mpi.gpu.assignment import take

    taken, lacking = None, None
    try:
        taken = take(comm)._asdict()
    except UserError as error:
        lacking = str(error)
    module = cupy()
    return taken, None if module is None else _or_none(lambda: _cupy(module)), lacking


def _cupy(module: Any) -> Facts:
    runtime = module.cuda.runtime.runtimeGetVersion()
    return {"version": module.__version__, "runtime": f"{runtime // 1000}.{runtime % 1000 // 10}"}


def _paths(state: "State", taken: Facts | None, lacking: str | None) -> dict[str, str]:
    """Return for each path of arrays in the memory of GPUs an empty text, or why it is not available.  A collective
    call."""

    why = dict.fromkeys(GPU_PATHS, str(lacking)) if taken is None else state.join_devices(taken["number"]).why
    return {path: why[path] for path in reversed(GPU_PATHS)}


def _gpus(everyone: list[Facts], lacking: str | None) -> Facts:
    visible = {
        str(one["rank"]): [{**device, "host": one["host"]} for device in one["driver"]["devices"]] for one in everyone
    }
    return {
        "driver": {key: everyone[0]["driver"][key] for key in ("version", "error")},
        "cupy": everyone[0].get("cupy"),
        "lacking": lacking,
        "visible": visible,
        "taken": [{**one["gpu"], "host": one["host"]} for one in everyone if one.get("gpu")],
        "mps": any(one["mps"] for one in everyone),
        "variables": _values([(one["rank"], one["gpu_variables"]) for one in everyone]),
    }


def _about_gpus(gpus: Facts) -> list[str]:
    number = gpus["driver"]["version"]
    if gpus["lacking"] and any(gpus["visible"].values()):
        extra = f"; the driver is for CUDA {number}" if number else ""
        return [f"there are GPUs that cannot be used: {gpus['lacking']}{extra}"]
    shared = [one["ranks"] for one in gpus["taken"] if len(one["ranks"]) > 1]
    if shared and not gpus["mps"]:
        most = max(map(len, shared))
        return [f"up to {most} ranks share a GPU, and take turns on it: one rank for each, or NVIDIA's MPS, is faster"]
    return []


def _values(given: list[tuple[int, dict[str, str]]]) -> dict[str, dict[str, list[int]]]:
    """Group ranks by variable and by the value that it has there."""
    names = sorted({name for _, one in given for name in one})
    return {name: grouped((one[name], rank) for rank, one in given if name in one) for name in names}


def grouped(pairs: Iterable[tuple[Any, Any]]) -> dict[Any, list[Any]]:
    """Group values by key; keys are in the order in which they come first."""
    found: dict[Any, list[Any]] = {}
    for key, value in pairs:
        found.setdefault(key, []).append(value)
    return found


# ---- a limit that holds while MPI keeps Python's threads from running, as its start does

_WATCH = """
import os, select, signal, sys, time
process, seconds, who = int(sys.argv[1]), float(sys.argv[2]), sys.argv[3]
end, doing = time.monotonic() + seconds, "beginning"
while select.select([0], [], [], max(end - time.monotonic(), 0))[0]:
    text = os.read(0, 4096)
    if not text:
        sys.exit()
    doing = text.decode().splitlines()[-1]
line = f"mpicoll: {who} is ended: after {seconds:g} s it is still {doing}; it waits for ranks that say something else"
os.write(2, f"{line}, or nothing\\n".encode())
time.sleep(1)
if os.getppid() == process:
    os.kill(process, signal.SIGKILL)
"""


@contextmanager
def _limit(seconds: float) -> Iterator[Callable[[str], None]]:
    """Yield the function to be called with each thing that is done, in words; end this process after ``seconds``.

    Another process watches this one, and waits for others to print their line too before it ends it: launchers end the
    job when the first process fails.
    """
    who = f"rank {launched_rank()} on {socket.gethostname()}"
    command = [sys.executable, "-I", "-S", "-c", _WATCH, str(os.getpid()), str(seconds), who]
    watch = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)  # Ctrl-C is not for it
    assert watch.stdin is not None
    pipe = watch.stdin.fileno()

    def doing(what: str) -> None:
        with suppress(OSError):
            os.write(pipe, f"{what}\n".encode())

    try:
        yield doing
    finally:
        watch.send_signal(signal.SIGKILL)
        watch.stdin.close()
        watch.wait()
