"""``mpicoll doctor``: the facts that an expert would ask for first."""

import time
from collections.abc import Iterator
from typing import Any
from uuid import UUID

import click

from ..files import to_json
from ..job.doctor import Facts, Findings, alone, grouped, together
from ..mpi.launch import launched_rank
from ..mpi.record import named
from .bench_pipeline import pipeline
from .numbers import pretty, ranges

SHOWN = 8  # lines of nodes, or of GPUs; --json has all
WIDTH = 11


@click.command(short_help="Say what is here, and what is wrong with it.")
@click.option("--json", "as_json", is_flag=True, envvar="MPICOLL_DOCTOR_JSON", help="One JSON object instead of lines.")
@click.option(
    "--timeout", type=click.FloatRange(0.1, 1e6), default=60, show_default=True, help="Seconds until what hangs ends."
)
@click.pass_context
def doctor(context: click.Context, as_json: bool, timeout: float) -> int:
    """Say what an expert would ask first where something is slow or broken: mpirun -n 4 mpicoll doctor

    Which MPI, by which launcher, on which cores; whether memory is shared; which profile is in force; which GPUs there
    are, which rank has which, and by which paths arrays in their memory go.  Start it as the program that is in trouble
    is started.  If there are GPUs each rank uses its own for a moment.

    The end is "all is well", or what is not, with what to do; exit status 1 if programs will fail.
    """
    found = alone(options(context.find_root()))
    if not as_json:
        click.echo("\n".join(before(found)))
    speaks = together(found, timeout)
    if speaks and as_json:
        click.echo(to_json({"version": 1, **found.facts, "wrong": found.wrong, "doubtful": found.doubtful}))
    elif speaks:
        click.echo("\n".join([*after(found), *end(found)]))
    if found.wrong and launched_rank():
        time.sleep(0.4)  # some launchers end the job when the first process fails: let rank 0 speak
    return 1 if found.wrong else 0


def options(root: click.Context) -> list[str]:
    """The names of the environment variables that are options of commands."""
    assert isinstance(root.command, click.Group)
    return [
        option.envvar if isinstance(option.envvar, str) else f"{root.auto_envvar_prefix}_{name}_{option.name}".upper()
        for name, command in (*root.command.commands.items(), ("bench", pipeline))
        for option in command.params
        if option.envvar or isinstance(option, click.Option)
    ]


# ---- what is printed


def line(label: str, text: str) -> str:
    """Return a fact as a line."""
    return f"{label:{WIDTH}} {text}"


def before(found: Findings) -> Iterator[str]:
    """Return the facts that are known without MPI."""
    software, launcher, variables = (found.facts[key] for key in ("software", "launcher", "variables"))
    versions = f"Python {software['python']}, NumPy {software['numpy']}, mpi4py {software['mpi4py'] or 'missing'}"
    yield line("mpicoll", f"{software['mpicoll']}, {versions}")
    yield line("", f"of {software['executable']}")
    yield line("", f"compiled part: {software['compiled']}")
    if launcher["name"]:
        count = f"{launcher['ranks']} rank(s)" if launcher["ranks"] else "it does not say how many ranks"
        yield line("launcher", f"{launcher['name']}: {count}")
    else:
        yield line("launcher", "none: one process (mpirun -n N mpicoll doctor looks at a job of several)")
    settings = [f"{name}={value}" for name, value in variables["set"].items()]
    for n, setting in enumerate(settings or ["no variable MPICOLL_... is set"]):
        yield line("" if n else "environment", setting)
    wheels = [f"{name} {number}" for name, number in software["wheels"].items()]
    told = [f"{name}={value}" for name, value in software["told"].items()]
    finds = f"uses {', '.join(told)}" if told else "finds MPI by itself (MPI4PY_LIBMPI is not set)"
    yield line("mpi4py", f"{finds}; wheels with an MPI: {', '.join(wheels) or 'none'}")


def after(found: Findings) -> Iterator[str]:
    """Return the facts that are known once MPI was started, or could not be."""
    yield from _mpi(found.facts["mpi"])
    yield from _nodes(found.facts["nodes"])
    if "profile" in found.facts:
        yield line("profile", _profile(found.facts["profile"]))
    gpus = found.facts["gpus"]
    yield from _gpus(gpus)
    seen = any(gpus["visible"].values())
    if "paths" in found.facts and (seen or gpus["cupy"]):
        yield from _paths(found.facts["paths"])
        if seen:
            said = [f"{name} says {'yes' if yes else 'no'}" for name, yes in found.facts["mpi"]["aware"].items()]
            yield line("", f"MPI on GPU memory: {', '.join(said) or 'it says nothing'} (only a hint)")


def end(found: Findings) -> Iterator[str]:
    """Return what is wrong, or that nothing is."""
    yield ""
    if not found.wrong and not found.doubtful:
        yield "all is well"
    for label, those in (("wrong:", found.wrong), ("doubtful:", found.doubtful)):
        for one in those:
            yield line(label, one)


def _mpi(mpi: Facts | None) -> Iterator[str]:
    if mpi is None:
        yield line("MPI", "none could be loaded")
        return
    yield line("MPI", mpi["name"] + (f": {mpi['ranks']} rank(s)" if mpi["ranks"] else ", not started"))
    for path in mpi["files"] or ["a file that is unknown"]:
        yield line("", f"loaded from {path}")
    if "threads" in mpi:
        asked, given = mpi["threads"]["asked"], mpi["threads"]["given"]
        means = {
            "multiple": "handles may be made, and waited for, in all threads",
            "serialized": "threads have to take turns with all calls",
        }.get(given, "all calls have to be made in the main thread")
        yield line("threads", f"{given} (asked for: {asked}): {means}")
        if given == "multiple" and mpi["name"].startswith("MPICH "):
            yield line("", "below that MPICH is 2 to 4 times faster for small messages, but then handles are refused:")
            yield line("", "   mpi4py.rc.thread_level = 'serialized', before mpi4py.MPI is imported")


def _nodes(nodes: list[Facts]) -> Iterator[str]:
    for n, node in enumerate(nodes[:SHOWN]):
        yield line("" if n else f"{len(nodes)} node(s)", f"{node['host']}: {_cores(node)}")
        yield line("", f"   {_memory(node)}")
        yield line("", f"   {_blas(node)}")
    if nodes[SHOWN:]:
        yield line("", f"and {len(nodes) - SHOWN} more (--json has them)")


def _cores(node: Facts) -> str:
    own = grouped((ranges(one), rank) for one, rank in zip(node["cores"], node["ranks"], strict=True))
    each = [f"{named(ranks)} on cores {cores}" for cores, ranks in own.items()]
    return "; ".join(each[:SHOWN]) + ("; ..." if each[SHOWN:] else "")


def _memory(node: Facts) -> str:
    memory, shm = node["memory"], node["shm"]
    said = [pretty(memory["total"]) if memory else "unknown"]
    if memory and memory["available"] is not None:
        said[0] += f", {pretty(memory['available'])} free"
    if memory and memory["limit"]:
        said.append(f"{pretty(memory['limit'])} for this container")
    said.append(f"/dev/shm {pretty(shm['total'])}, {pretty(shm['available'])} free" if shm else "no /dev/shm")
    if len(node["ranks"]) > 1:
        said.append(f"ranks share {node['shared']}" if node["shared"] else "ranks share none")
    return f"memory: {'; '.join(said)}"


def _blas(node: Facts) -> str:
    counts = [max((one["threads"] for one in libraries), default=0) for libraries in node["blas"]]
    if not all(counts):
        return "BLAS: unknown (pip install threadpoolctl)"
    names = ", ".join(dict.fromkeys(one["name"] for libraries in node["blas"] for one in libraries))
    count = f"{min(counts)}" if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"
    text = f"BLAS: {names}, {count} thread(s) a rank"
    there = len({core for one in node["cores"] for core in one})
    if sum(counts) > max(there, len(counts)):
        share = max(1, there // len(counts))
        text += f", {sum(counts)} on {there} cores: set OMP_NUM_THREADS={share} (mpicoll train needs no such setting)"
    return text


def _profile(profile: Facts) -> str:
    if profile["in_force"]:
        return f"{profile['file']} is in force"
    return f"none; {profile['file']}: {profile['why']}" if profile["file"] else f"none: {profile['why']}"


def _gpus(gpus: Facts) -> Iterator[str]:
    driver, cupy = gpus["driver"], gpus["cupy"]
    seen = {device["uuid"]: device for devices in gpus["visible"].values() for device in devices}
    software = [f"driver for CUDA {driver['version']}"] if driver["version"] else []
    software += [f"CuPy {cupy['version']} with CUDA {cupy['runtime']}"] if cupy else []
    software += ["MPS runs"] if gpus["mps"] else []
    what = f"{len(seen)} seen" if seen else f"none: {driver['error'] or 'the driver shows none'}"
    yield line("GPUs", "; ".join([what, *software]))
    having: dict[Any, Any] = {(one["host"], one["bus"].lower()): one["ranks"] for one in gpus["taken"]}
    for uuid, device in list(seen.items())[:SHOWN]:
        holders = having.get((device["host"], device["bus"].lower()))
        use = f": {named(holders)}" if holders else ": no rank's" if having else ""
        name = f"{device['host']}: {device['name']} ({device['bus']}), {pretty(device['memory'])}, GPU-{UUID(uuid)}"
        yield line("", name + use)
    if len(seen) > SHOWN:
        yield line("", f"and {len(seen) - SHOWN} more (--json has them)")
    for name, values in gpus["variables"].items():
        few = [f"{value} ({named(ranks)})" for value, ranks in list(values.items())[:SHOWN]]
        yield line("", f"{name}={', '.join(few)}" if len(values) > 1 else f"{name}={next(iter(values))}")


def _paths(paths: dict[str, str]) -> Iterator[str]:
    reasons = {*paths.values()}
    if len(reasons) == 1 and "" not in reasons:
        yield line("paths", f"none for arrays on GPUs: {reasons.pop()}")
        return
    for n, (name, why) in enumerate(paths.items()):
        yield line("" if n else "paths", f"{name}: {f'no, {why}' if why else 'yes'}")
