"""The competition that ``mpicoll tune`` holds: all that ``auto`` may choose from, with ordinary arrays."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from mpi4py import MPI

from ..algorithms import ALGORITHMS
from ..errors import UserError
from ..mpi.comm import Comm
from ..mpi.operations import MOVE, operation
from ..mpi.paths import choose
from ..mpi.request import DEFAULT
from ..mpi.state import state_of
from ..statistics import median
from ..tuning.rules import NATIVE, SHARED
from .contestants import Implementation, implementations
from .task import Task
from .timing import NULL, Settings, measure

PASSES = 4  # at least, over all sizes; in the first two all take part, in the others those that have a chance
HOPELESS = 3  # times as long as the best: no chance


def untuned(comm: MPI.Intracomm, task: Task) -> str:
    """The algorithm that ``auto`` takes for the task with ordinary arrays and no profile."""
    state, reduces = state_of(Comm(comm)), task.row.reduces
    done = operation(task.op, task.dtype) if reduces else MOVE
    shares = reduces and state.can_share(task.collective, False, done)
    rules = state.defaults(task.collective)
    nbytes = task.count * done.carried(task.dtype).itemsize
    row = choose(task.collective, DEFAULT, nbytes, task.dtype, done, rules, shares=shares)
    return row if isinstance(row, str) else row.name


def compete(comm: MPI.Intracomm, tasks: Sequence[Task], settings: Settings) -> list[dict[str, np.ndarray]]:
    """For each task the times of all that ``auto`` may choose from, with ordinary arrays; the same on all ranks.

    Passes over all tasks are made until the time is over, at least ``PASSES``.  In the first two all take turns at each
    task, then those that have a chance there: the more take turns, the less of each call is left in the caches, where
    a program makes one call and not seven.  Every pass has memory of its own, and tasks come in an order of its own; a
    neighbor on the machine seldom spoils two of them at a task.  Repetitions are paired, and the first are those of
    all.  An allreduce is in place, as in training, others as far as they must.  A ``UserError`` for a wrong result.
    """
    settings = comm.bcast(settings)
    rng = np.random.default_rng(settings.seed)
    start = time.monotonic()
    share = settings.max_time / len(tasks) / (2 * PASSES)  # seconds of a turn: more passes rather than longer ones
    found = [{name: np.empty(0) for name in _choices(comm, task)} for task in tasks]
    rivals = [[*times] for times in found]
    done = 0
    while True:
        if done >= 2:
            rivals = [_with_a_chance(times, names) for times, names in zip(found, rivals, strict=True)]
        left = [n for n, names in enumerate(rivals) if len(names) > 1]  # nobody runs alone
        spent = time.monotonic() - start
        if not left or comm.bcast(done >= PASSES and spent + spent / done / 2 > settings.max_time):
            return found
        for n in rng.permutation(left):
            where = (not tasks[n].row.parted and not tasks[n].row.to_root,)
            how = replace(settings, in_place=where, max_time=share, seed=int(rng.integers(2**32)))
            choices = _choices(comm, tasks[n])
            for one in measure(comm, {name: choices[name] for name in rivals[n]}, [tasks[n]], how):
                if one.wrong:
                    what = f"{one.name} {one.task.collective} of {one.task.count} elements"
                    raise UserError(f"{one.wrong} wrong elements: {what}")
                if one.name != NULL:
                    found[n][one.name] = np.append(found[n][one.name], one.us)
        done += 1


def _with_a_chance(times: Mapping[str, np.ndarray], names: list[str]) -> list[str]:
    """Those of ``names`` whose ratio of times to the best has a 95 % interval that begins at ``HOPELESS`` at most.

    All of them took part in everything so far.
    """
    best = min((times[name] for name in names), key=np.median)
    return [name for name in names if median(times[name] / best)[1] <= HOPELESS]


def _choices(comm: MPI.Intracomm, task: Task) -> dict[str, Implementation]:
    known = {NATIVE, *ALGORITHMS[task.collective], *([SHARED] if task.row.reduces else [])}
    found = implementations(comm, task.collective, task.dtype, "off")
    return {name: one for name, one in found.items() if name in known}
