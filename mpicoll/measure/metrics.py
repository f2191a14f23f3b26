"""What the times of a result come to: percentiles, bandwidths, and the share that the memory alone would take."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..collective import COLLECTIVES
from ..statistics import median
from ..tuning.rules import NATIVE
from .contestants import SHARED_RESULT
from .machine import GpuMemory
from .timing import NULL, Result


def summary(us: np.ndarray) -> dict[str, float]:
    """The statistics that are printed of the times of a result."""
    p10, middle, p90, p99 = (float(value) for value in np.percentile(us, [10, 50, 90, 99]))
    ends = {"min": float(us.min()), "max": float(us.max()), "mean": float(us.mean())}
    return {"n": len(us), "median": middle, "p10": p10, "p90": p90, "p99": p99, **ends}


def bandwidths(collective: str, nbytes: int, p: int, us: float) -> tuple[float, float]:
    """algbw and busbw in GB/s (1e9), as nccl-tests defines them; ``nbytes`` are those of the whole array."""
    return nbytes / us / 1e3, nbytes / us / 1e3 * COLLECTIVES[collective].bus(p)


def memory_share(
    collective: str, nbytes: int, p: int, us: float, memory: Mapping[str, float], one_result: bool = False
) -> float:
    """The share of the time that the least traffic takes at the bandwidth that ``memory_bandwidth`` found.

    A rank reads as much as the whole array (its own, or the parts of all), and writes what it gets: the whole array, a
    part in reduce_scatter, or if ``one_result`` is shared by all ranks; in reduce this is the root.  More than 1 where
    caches spare the memory.
    """
    row = COLLECTIVES[collective]
    least = nbytes + (nbytes / p if one_result or row.receives_part else nbytes)
    return least / memory["add" if row.reduces else "copy"] / us / 1e3


def gpu_memory_share(
    collective: str, nbytes: int, p: int, us: float, memory: Mapping[str, float], gpus: GpuMemory, through_host: bool
) -> float:
    """The share of the time that the least traffic takes on a GPU at the bandwidths that ``gpu_bandwidth`` found.

    What the ranks of a GPU send is read once in its memory, what they get is written once.  If it goes through host
    memory, the one comes over its link and the other goes back, at once with each other and with what
    ``memory_share`` has the host do: it takes as long as the slowest of these.
    """
    ranks, row = gpus.sharing, COLLECTIVES[collective]
    senders = 1 if row.from_root else ranks
    receivers = 1 if row.to_root else ranks - 1 if row.from_root else ranks
    sent, received = (
        n * nbytes / (p if part else 1) for n, part in ((senders, row.sends_part), (receivers, row.receives_part))
    )
    if not through_host:
        return (sent + received) / gpus.copy / us / 1e3
    link = max(sent / gpus.to_host, received / gpus.from_host) / us / 1e3
    return max(link, memory_share(collective, nbytes, p, us, memory))


def record(result: Result, p: int, memory: Mapping[str, float], gpus: GpuMemory | None = None) -> dict[str, Any]:
    """A result as plain numbers and texts, with all that follows from its times; ``gpus`` if it is one of GPUs."""
    task, said = result.task, summary(result.us)
    nbytes = task.count * task.dtype.itemsize
    at = (task.collective, nbytes, p, said["median"])
    algbw, busbw = bandwidths(*at) if result.name != NULL else (None, None)
    speed, low, high = (None, None, None) if result.native is None else median(result.native / result.us)
    share = None
    if result.name != NULL and gpus:
        share = gpu_memory_share(*at, memory, gpus, result.name == NATIVE or "staged" in result.way)
    elif result.name != NULL:
        share = memory_share(*at, memory, result.name == SHARED_RESULT)
    return {
        "collective": task.collective,
        "implementation": result.name,
        "in_place": result.in_place,
        "ranks": p,
        "bytes": nbytes,
        "count": task.count,
        "dtype": task.dtype.name,
        "op": task.op if task.row.reduces else "none",
        "root": task.root if task.row.rooted else -1,
        **said,
        "wrong": result.wrong,
        "algbw": algbw,
        "busbw": busbw,
        "memory_share": share,
        "speed": speed,
        "speed_low": low,
        "speed_high": high,
        **({"way": result.way} if gpus else {}),
        "us": result.us.tolist(),
    }
