"""The bubble of a pipeline, measured with stages that sleep and exchange the messages of training.

Every rank is a stage.  It does the tasks of a schedule in order, and receives and sends messages by the code that
stages in training use; but its tasks are to sleep, so that a few cores can show many stages of equal cost.

The time of a batch lasts from the beginning of the first stage's first task to the end of its last task.  No task of
another stage ends later, so one clock measures it, wherever stages are.  A stage is busy for as long as its tasks are
meant to take, and idle otherwise.  If a task sleeps longer because its core is busy, the excess counts as idle, as does
the time of calls; both are reported separately.
"""

import gc
import os
import sys
import time
from collections.abc import Sequence
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
from mpi4py import MPI

from ..measure.metrics import summary
from ..measure.timing import Settings, is_enough
from ..mpi.comm import Comm
from ..pipeline import PIPELINES, Kind, simulate, verify
from ..statistics import median
from .flow import Flow
from .group import Spent

COST = {Kind.FORWARD: 1, Kind.BACKWARD: 2}  # of a task, in forwards: a backward is two products where a forward is one
NEAR = 2e-4  # seconds before the end of a task, from when on its rank does not sleep: a timer would be late by as much
CODES = 251  # different messages
PAGE = 4096  # bytes, of which one is written and looked at: all of them would take longer than a short task


class Case(NamedTuple):
    """A case to measure: a row of ``PIPELINES``, micro-batches per batch, and bytes per message."""

    pipeline: str
    micro: int
    nbytes: int


class Result(NamedTuple):
    """The result of a case, with the seconds of each repetition."""

    case: Case
    seconds: np.ndarray  # of a batch
    late: np.ndarray  # that a task has slept longer than it was to, on average over all
    calls: np.ndarray  # from one task to the next of a stage, but for waiting: likewise
    handoff: np.ndarray  # from when a task was to end until the stage that waits for it begins its own
    held: tuple[int, ...]  # of how many micro-batches each stage has held the activations, at most
    wrong: int  # messages that were not the ones that the schedule says


def measure(comm: MPI.Intracomm, cases: Sequence[Case], forward: float, settings: Settings) -> list[Result]:
    """Measure every case, with forward tasks of the given seconds; a collective call, with equal results on all ranks.

    In a repetition every case runs one batch, in random order, and every message size one batch of a single
    micro-batch.  The latter is a chain of tasks, each of which waits for the one before: it shows the time of a
    handoff.
    """
    settings = comm.bcast(settings)
    sizes = sorted({case.nbytes for case in cases})
    chains = [Case(cases[0].pipeline, 1, nbytes) for nbytes in sizes]
    own = Comm(comm.Dup())
    stages = [_Stage(own, case, forward) for case in (*cases, *chains)]
    rng = np.random.default_rng(settings.seed)  # all ranks draw the same
    until = time.monotonic() + settings.max_time
    rounds: list[np.ndarray] = []  # seconds of each batch
    more: list[np.ndarray] = []  # and those that stages were late in it, and in calls, all together
    collecting = gc.isenabled()
    gc.disable()  # not while the clock runs
    try:
        for repetition in range(-settings.warmup, sys.maxsize):
            took = np.zeros((3, len(stages)))
            for n in rng.permutation(len(stages)):
                took[:, n] = stages[n].batch()
            own.Allreduce(MPI.IN_PLACE, took)  # a batch's time is known to the first stage, and is 0 on others
            gc.collect()
            if repetition >= 0:
                rounds.append(took[0])
                more.append(took[1:])
            if own.bcast(own.rank == 0 and is_enough(rounds, len(cases), settings, until)):
                break
    finally:
        if collecting:
            gc.enable()
    wrong = own.allreduce(np.array([stage.wrong for stage in stages]))
    held = own.allgather([stage.held for stage in stages])
    own.Free()
    seconds, (late, calls) = np.array(rounds).T, np.array(more).transpose(1, 2, 0)
    ranks = comm.size
    handoffs = {
        chain.nbytes: (found - sum(COST.values()) * ranks * forward) / (2 * (ranks - 1))
        for chain, found in zip(chains, seconds[len(cases) :], strict=True)
    }
    return [
        Result(
            case,
            seconds[n],
            late[n] / (2 * case.micro * ranks),
            calls[n] / (2 * case.micro * ranks),
            handoffs[case.nbytes],
            tuple(of[n] for of in held),
            int(wrong[n] + wrong[len(cases) + sizes.index(case.nbytes)]),
        )
        for n, case in enumerate(cases)
    ]


class _Stage:
    """A case on this rank; ``wrong`` and ``held`` cover all its batches."""

    def __init__(self, comm: Comm, case: Case, forward: float) -> None:
        self._comm, self._case = comm, case
        schedule = PIPELINES[case.pipeline].schedule(comm.size, case.micro)
        verify(schedule)  # or stages might deadlock
        self._tasks = schedule.tasks[comm.rank]
        self._seconds = {kind: cost * forward for kind, cost in COST.items()}
        giver = {Kind.FORWARD: comm.rank - 1, Kind.BACKWARD: comm.rank + 1}
        self._giver = {kind: rank for kind, rank in giver.items() if 0 <= rank < comm.size}
        self._gives = {kind for kind, rank in giver.items() if 0 <= 2 * comm.rank - rank < comm.size}
        self.wrong, self.held = 0, 0

    def batch(self) -> tuple[float, float, float]:
        """Run a batch; return its seconds (on the first stage), and this stage's seconds late and in calls."""
        comm, nbytes = self._comm, self._case.nbytes
        shapes = {kind: [(1, nbytes)] * self._case.micro for kind in self._giver}
        spent, held, late = Spent(), {}, 0.0
        flow = Flow(comm, np.empty(0, np.uint8), shapes, spent)
        _meet(comm)
        began = perf_counter()
        for kind, m in self._tasks:
            came = flow.take(kind) if kind in self._giver else None
            end = perf_counter() + self._seconds[kind]
            if came is not None:
                self.wrong += bool(np.any(came[:, ::PAGE] != _code(kind, m, self._giver[kind])))
            result = np.empty((1, nbytes), np.uint8)
            result[:, ::PAGE] = _code(kind, m, comm.rank)
            if kind is Kind.FORWARD:
                held[m] = came, result
                self.held = max(self.held, len(held))
            else:
                del held[m]
            sleep_until(end)
            late += max(perf_counter() - end, 0)
            if kind in self._gives:
                flow.send(kind, result)
        took = perf_counter() - began
        calls = took - late - spent.waiting - sum(self._seconds[kind] for kind, _ in self._tasks)
        flow.end()
        return took if comm.rank == 0 else 0, late, calls


def record(result: Result, forward: float) -> dict[str, Any]:
    """Return a result as plain numbers and texts.

    ``idle`` is the share of the time for which a stage is not busy; ``textbook`` is that share if only tasks take time,
    and ``model`` if tasks, calls and handoffs take as long as measured.
    """
    case, stages, row = result.case, len(result.held), PIPELINES[result.case.pipeline]
    busy = sum(COST.values()) * forward * case.micro
    textbook = float(row.idle(stages, case.micro))
    late, calls, handoff = (float(np.median(seconds)) for seconds in (result.late, result.calls, result.handoff))
    costs = {kind: [cost * forward + late + calls] * stages for kind, cost in COST.items()}
    schedule = row.schedule(stages, case.micro)
    modelled = simulate(schedule, costs[Kind.FORWARD], costs[Kind.BACKWARD], max(handoff - late - calls, 0))
    idle, low, high = median(1 - busy / result.seconds)
    return {
        "collective": "pipeline",
        "implementation": case.pipeline,
        "ranks": stages,
        "micro": case.micro,
        "bytes": case.nbytes,
        "forward_us": forward * 1e6,
        **summary(result.seconds * 1e6),
        "wrong": result.wrong,
        "idle": idle,
        "textbook": textbook,
        "ratio": idle / textbook,
        "ratio_low": low / textbook,
        "ratio_high": high / textbook,
        "model": float(1 - busy / modelled.makespan) if modelled.makespan else 0.0,
        "late_us": late * 1e6,
        "calls_us": calls * 1e6,
        "handoff_us": handoff * 1e6,
        "held": list(result.held),
        "promised": [row.held(stage, stages, case.micro) for stage in range(stages)],
        "us": (result.seconds * 1e6).tolist(),
    }


def _code(kind: Kind, micro: int, rank: int) -> int:
    """The code that a message holds in each page, different from those of messages that it could be confused with."""
    return (2 * micro + (kind is Kind.BACKWARD) + 7 * rank) % CODES


def _meet(comm: MPI.Intracomm) -> None:
    """A barrier that yields the core to ranks that are late, which that of MPI does not."""
    request = comm.Ibarrier()
    while not request.Test():
        os.sched_yield()


def sleep_until(moment: float) -> None:
    """Sleep until ``perf_counter`` reaches a time; near the end only yield the core."""
    time.sleep(max(moment - NEAR - perf_counter(), 0))
    while perf_counter() < moment:
        os.sched_yield()
