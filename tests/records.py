"""Records as they are measured, for the tests of what is printed and written of them."""

import numpy as np

from mpicoll.measure.metrics import record
from mpicoll.measure.task import Task
from mpicoll.measure.timing import Result
from mpicoll.train import bubble

MEMORY = {"copy": 10.0, "add": 5.0}


def records_of(names=("auto", "native", "ring"), counts=(0, 2, 1 << 20), places=(False, True), wrong=0):
    """Records as they are measured: auto is as fast as native, ring half as fast."""
    rng = np.random.default_rng(1)
    found = []
    for count in counts:
        task = Task("allreduce", count, np.dtype("f4"))
        for place in places:
            us = 10 + count / 1000 + rng.random(20)
            for name in names:
                own = us * (2 if name == "ring" else rng.choice([0.5, 2], 20) if name == "auto" else 1)
                bad = wrong if name == "ring" else 0
                found.append(Result(name, place, task, own, us if "native" in names else None, bad))
        found.append(Result("null", places[0], task, us / 100, None, 0))
    return [record(one, 4, MEMORY) for one in found]


FACTS = {
    "start_time": "2026-01-02 03:04:05",
    "mpicoll": "0",
    "mpi": "An MPI, 1.0",
    "mpi4py": "4",
    "numpy": "2",
    "python": "3",
    "git": None,
    "env": ["OMP_NUM_THREADS=1"],
    "devices": [{"hostname": "a", "cpus": [0, 1]}, {"hostname": "b", "cpus": [2]}, {"hostname": "a", "cpus": [0, 1]}],
    "config": {
        **{"ranks": 4, "sync": "barrier", "check": "off", "seed": 1, "max_time": 1.0, "min_reps": 2},
        **{"off_cache": True, "unaligned": False, "calls": 10},
    },
    "memory": MEMORY,
    "resolution": 0.03,
}


def bubble_of(pipeline, seconds, late=0.0, calls=0.0, handoff=0.0, held=(3, 3, 3), wrong=0):
    """Three micro-batches at three stages, a forward of one second: 15 s, of which each stage works for 9."""
    times = [np.full(len(seconds), of_each) for of_each in (late, calls, handoff)]
    case = bubble.Case(pipeline, 3, 1000)
    return bubble.record(bubble.Result(case, np.array(seconds), *times, held, wrong), forward=1.0)
