"""The output formats of ``mpicoll bench``: text like that of the OSU benchmarks, and JSON by the keys of nccl-tests."""

from typing import TYPE_CHECKING

import numpy as np

from ..files import to_json
from ..tuning.rules import GPU_PATHS
from .numbers import ranges
from .output import Record, grouped, where

if TYPE_CHECKING:
    from ..measure.task import Task

PLACES = {False: "out of place", True: "in place"}
TIMES = ("mean", "median", "p10", "p90", "p99", "min", "max")
HEAD = f"{'# Size':<12}{'Avg Latency(us)':>16}" + "".join(f"{name.capitalize():>11}" for name in TIMES[1:])
HEAD += f"{'Iterations':>12}{'Wrong':>7}{'algbw':>9}{'busbw':>9}{'memory':>8}"
WIDE = max(map(len, GPU_PATHS))
SPEED = f"{'speed':>8}  95 % interval"


def head(task: "Task", facts: Record) -> str:
    """Return the facts that the numbers depend on, as comments."""
    config, memory = facts["config"], facts["memory"]
    op = f", {task.op}" if task.row.reduces else ""
    root = f", root {task.root}" if task.row.rooted else ""
    how = f"sync {config['sync']}, check {config['check']}, seed {config['seed']}"
    how += f", {config['calls']} calls back to back" if config["calls"] > 1 else ""
    how += "".join(f", {name.replace('_', ' ')}" for name in ("off_cache", "unaligned") if config[name])
    lines = [
        f"mpicoll {task.collective.capitalize()} Latency Test v{facts['mpicoll']}",
        f"Datatype: {task.dtype.name}{op}{root}; {config['ranks']} rank(s)",
        *where(facts),
        f"{how}; {config['max_time']:g} s in all, at least {config['min_reps']} repetitions of a size",
        f"memory of a rank while all copy: {memory['copy']:.2f} GB/s, while all add: {memory['add']:.2f} GB/s; "
        f"clock resolution {facts['resolution']:.3f} us",
        *(_on_gpus(facts) if "gpus" in facts else []),
        *facts["env"],
    ]
    return "".join(f"# {line}\n" for line in lines)


def _on_gpus(facts: Record) -> list[str]:
    by_ranks = {tuple(one["ranks"]): one for one in facts["gpus"]}
    speed = facts["gpu_memory"]
    return [
        *(
            f"GPU {one['name']} ({one['bus']}): {len(one['ranks'])} rank(s), {ranges(list(one['ranks']))}"
            for one in by_ranks.values()
        ),
        f"a GPU copies {speed['copy']:.2f} GB/s, read and written; to host memory {speed['to_host']:.2f} GB/s, "
        f"from there {speed['from_host']:.2f} GB/s",
        f"CuPy {facts['cupy']}, CUDA runtime {facts['cuda_runtime']}, driver {facts['cuda_driver']}; "
        "a call lasts until its stream has done it",
        "native is the MPI library's collective on a copy in ordinary host memory: x.get(), the call, x.set()",
        *(f"without {way}: {why}" for way, why in facts["refused"].items()),
    ]


def body(records: list[Record]) -> str:
    """Return a block for each implementation, as the OSU benchmarks print it, and a table of speeds as comments."""
    lines = []
    for (place, name), rows in grouped(records, "in_place", "implementation").items():
        if name != "null":
            lines += [f"# {name} {rows[0]['collective']}, {PLACES[place]}", _head(rows[0]), *map(_row, rows)]
    empty = {one["count"]: one for one in records if one["implementation"] == "null"}
    for (place,), found in grouped(records, "in_place").items():
        names = [name for (name,) in grouped(found, "implementation") if name not in ("native", "null")]
        if all(one["speed"] is None for one in found):
            continue  # the MPI library has none like it
        lines.append(f"# speed of {found[0]['collective']}, {PLACES[place]}, native = 1; = for no difference")
        lines.append(f"# {'Size':>10} {'native us':>11} {'null us':>8} " + "".join(f" {name:>9}" for name in names))
        for (count,), rows in grouped(found, "count").items():
            by = {one["implementation"]: one for one in rows}
            native = f"{by['native']['median']:.2f}"
            cells = "".join(f" {_speed(by[name]):>{max(9, len(name))}}" for name in names)
            lines.append(f"# {rows[0]['bytes']:>10} {native:>11} {empty[count]['median']:>8.2f} {cells}")
    wrong = sum(one["wrong"] for one in records)
    return "\n".join([*lines, f"# Wrong elements: {wrong}{'' if wrong else ' OK'}"]) + "\n"


def _head(one: Record) -> str:
    return HEAD + (f"  {'way':{WIDE}}" if "way" in one else "") + SPEED


def _row(one: Record) -> str:
    times = f"{one['mean']:>16.2f}" + "".join(f"{one[name]:>11.2f}" for name in TIMES[1:])
    rates = f"{one['algbw']:>9.3f}{one['busbw']:>9.3f}{one['memory_share']:>8.2f}"
    rates += f"  {one['way'] or '-':{WIDE}}" if "way" in one else ""
    speed = "" if one["speed"] is None else f"{one['speed']:>8.3f}  {one['speed_low']:.3f} to {one['speed_high']:.3f}"
    return f"{one['bytes']:<12d}{times}{one['n']:>12d}{one['wrong']:>7d}{rates}{speed}"


def _speed(one: Record) -> str:
    return f"{'=' if one['speed_low'] <= 1 <= one['speed_high'] else ''}{one['speed']:.2f}"


def document(facts: Record, records: list[Record]) -> str:
    """Return JSON: the common facts, and for each implementation what nccl-tests writes, by its keys."""
    made = []
    for (name,), own in grouped(records, "implementation").items():
        results = []
        for rows in grouped(own, "count").values():
            one = rows[0]
            result = {"size": one["bytes"], "count": one["count"], "type": one["dtype"], "redop": one["op"]}
            results.append({**result, "root": one["root"], **{key: value for row in rows for key, value in _nccl(row)}})
        wrong, busbw = sum(one["wrong"] for one in own), [one["busbw"] for one in own if one["busbw"] is not None]
        ends = {"out_of_bounds": {"count": wrong, "okay": not wrong}}
        ends |= {"average_bus_bandwidth": {"bandwidth": float(np.mean(busbw))}} if busbw else {}
        made.append({"name": name, "results": results, **ends})
    return to_json({"version": 1, **facts, "implementations": made}, indent=1) + "\n"


def _nccl(one: Record) -> list[tuple[str, Record]]:
    us = np.array(one["us"])
    place = PLACES[one["in_place"]].replace(" ", "_")
    said = {"time": one["median"], "alg_bw": one["algbw"], "bus_bw": one["busbw"], "nwrong": one["wrong"]}
    ours = {key: one[key] for key in ("memory_share", "speed", "speed_low", "speed_high", "way") if key in one}
    spread = {
        f"{name}_us": one[key] for name, key in [("avg", "mean"), ("p50", "median"), *((t, t) for t in TIMES[2:])]
    }
    spread |= {"p95_us": float(np.percentile(us, 95)), "stdev_us": float(us.std())}
    spread |= {"cv_pct": 100 * float(us.std() / us.mean())}
    return [(place, said | ours), (f"{place}_per_iter", {**spread, "times_us": one["us"]})]
