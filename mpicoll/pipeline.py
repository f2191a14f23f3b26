"""Pipelines as data: which micro-batch a stage works on when; proved and timed without MPI.

The layers are cut into stages, one after another; a batch is cut into micro-batches, which go forward through the
stages and backward again.  A schedule is the order of each stage's tasks.  The rules that ``verify`` proves:

* Every stage does every micro-batch once forward and once backward, forward first.
* Forwards are in the order of the micro-batches, and so are backwards.  The messages of a kind between two stages then
  match in order, and gradients are summed in the order of one process, to the same bits.
* There is no deadlock, even if sends are synchronous.  A stage does its tasks one after another: it takes what the
  neighbor has sent, computes, and sends the result on, which returns once the receive of that very message is posted.
  A stage has at least one receive of each kind posted (activations from the stage before, gradients from the one
  behind): of the first from the beginning, of the next at the latest when the task that took the one before is done
  and its result is sent.  Whoever posts more of them, or does not wait for sends, has less to wait for.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from fractions import Fraction
from itertools import accumulate
from math import inf, lcm
from operator import sub
from typing import Any, NamedTuple

import numpy as np

from .schedule import ScheduleError


class Kind(StrEnum):
    """The direction in which a micro-batch passes through a stage."""

    FORWARD = "F"
    BACKWARD = "B"


class Task(NamedTuple):
    """A stage's work on one micro-batch, in one direction."""

    kind: Kind
    micro: int

    def __str__(self) -> str:
        return f"{self.kind}{self.micro}"


def gpipe(stage: int, stages: int, micro: int) -> Iterator[Task]:
    """All forwards, then all backwards: the activations of the whole batch are held.

    Source: Huang et al., GPipe, NeurIPS 2019.
    """
    yield from (Task(Kind.FORWARD, m) for m in range(micro))
    yield from (Task(Kind.BACKWARD, m) for m in range(micro))


def one_f_one_b(stage: int, stages: int, micro: int) -> Iterator[Task]:
    """As many forwards as there are stages behind, then one forward and one backward in turn: as fast as ``gpipe``,
    holding no more micro-batches than there are stages.

    Source: Narayanan et al., PipeDream, SOSP 2019, with a flush after each batch.
    """
    ahead = min(stages - stage - 1, micro)
    yield from (Task(Kind.FORWARD, m) for m in range(ahead))
    for m in range(micro):
        if ahead + m < micro:
            yield Task(Kind.FORWARD, ahead + m)
        yield Task(Kind.BACKWARD, m)


@dataclass(frozen=True)
class PipelineSchedule:
    """The order of tasks: ``tasks[stage]``, for a batch of ``micro`` micro-batches."""

    name: str
    micro: int
    tasks: Sequence[Sequence[Task]]

    @property
    def stages(self) -> int:
        """How many there are."""
        return len(self.tasks)

    def __str__(self) -> str:
        return f"{self.name} pipeline, {self.stages} stages, {self.micro} micro-batches"


@dataclass(frozen=True)
class Pipeline:
    """One row: the generator of one stage's tasks, and what it is held to.

    All functions take (stage, stages, micro-batches), ``idle`` the last two.  ``held`` is of how many micro-batches a
    stage holds activations at most, ``idle`` the share of the time that every stage does nothing if all tasks of a
    kind take equally long: the textbook's numbers, which ``verify_pipeline`` compares with what the generator does.
    """

    name: str
    generate: Callable[[int, int, int], Iterator[Task]]
    held: Callable[[int, int, int], int]
    idle: Callable[[int, int], Fraction] = lambda stages, micro: Fraction(stages - 1, micro + stages - 1)

    def schedule(self, stages: int, micro: int) -> PipelineSchedule:
        """The schedule for these numbers of stages and micro-batches; ``ValueError`` unless both are at least 1."""
        for what, number in (("stages", stages), ("micro-batches", micro)):
            if number < 1:
                raise ValueError(f"{self.name} pipeline: the number of {what} must be at least 1, got {number}")
        return PipelineSchedule(
            self.name, micro, tuple(tuple(self.generate(stage, stages, micro)) for stage in range(stages))
        )


_ROWS = [
    Pipeline("gpipe", gpipe, held=lambda stage, stages, micro: micro),
    Pipeline("1f1b", one_f_one_b, held=lambda stage, stages, micro: min(micro, stages - stage)),
]
PIPELINES = {row.name: row for row in _ROWS}


@dataclass(frozen=True)
class Proof:
    """The outcome of a proof: the number of micro-batches that each stage holds."""

    held: tuple[int, ...]  # of how many micro-batches each stage holds activations, at most


def verify(schedule: PipelineSchedule) -> Proof:
    """Prove that ``schedule`` keeps the rules, or raise ``ScheduleError`` saying which stage and task does not."""
    for stage in range(schedule.stages):
        _check_stage(schedule, stage)
    _check_messages(schedule)
    return Proof(tuple(_held(tasks) for tasks in schedule.tasks))


def verify_pipeline(pipeline: Pipeline, stages: int, micro: int) -> Proof:
    """Verify a pipeline for these numbers of stages and micro-batches, and the numbers in its row."""
    schedule = pipeline.schedule(stages, micro)
    proof = verify(schedule)
    stated = tuple(pipeline.held(stage, stages, micro) for stage in range(stages))
    for stage in range(stages):
        if proof.held[stage] != stated[stage]:
            raise ScheduleError(
                f"{schedule}: stage {stage} holds activations of {proof.held[stage]} micro-batches, "
                f"the table states {stated[stage]}"
            )
    idle = _simulate(schedule, {Kind.FORWARD: [1] * stages, Kind.BACKWARD: [2] * stages}, 0).idle
    for stage in range(stages):
        if idle[stage] != pipeline.idle(stages, micro):
            raise ScheduleError(
                f"{schedule}: stage {stage} is idle for {idle[stage]} of the time, "
                f"the table states {pipeline.idle(stages, micro)}"
            )
    return proof


def _check_stage(schedule: PipelineSchedule, stage: int) -> None:
    """Check one stage's tasks by themselves: each once, in order, forward first."""
    done = dict.fromkeys(Kind, 0)
    for task in schedule.tasks[stage]:
        wrong = None
        if not 0 <= task.micro < schedule.micro:
            wrong = f"is of no micro-batch, there are {schedule.micro}"
        elif task.micro < done[task.kind]:
            wrong = "is done a second time"
        elif task.micro > done[task.kind]:
            wrong = f"is not in order, {Task(task.kind, done[task.kind])} must be done before"
        elif task.kind is Kind.BACKWARD and task.micro >= done[Kind.FORWARD]:
            wrong = f"is done before {Task(Kind.FORWARD, task.micro)}"
        if wrong:
            raise ScheduleError(f"{schedule}: stage {stage}: {task} {wrong}")
        done[task.kind] += 1
    for kind, count in done.items():
        if count < schedule.micro:
            raise ScheduleError(f"{schedule}: stage {stage}: {Task(kind, count)} is never done")


def _neighbors(schedule: PipelineSchedule, stage: int, kind: Kind) -> tuple[int | None, int | None]:
    """The stage from which a task gets its input, and the stage that gets its result; ``None`` at the ends."""
    before, behind = (stage - 1 if stage else None), (stage + 1 if stage + 1 < schedule.stages else None)
    return (before, behind) if kind is Kind.FORWARD else (behind, before)


def _check_messages(schedule: PipelineSchedule) -> None:
    """Run all stages to the end, with synchronous sends and no more receives posted than promised.

    Tasks of a kind are in order, so that their number says which they are.
    """
    at = [0] * schedule.stages  # which task each stage is at
    computed = {kind: [0] * schedule.stages for kind in Kind}
    sent = {kind: [0] * schedule.stages for kind in Kind}  # or need not be

    def obstacle(stage: int, task: Task) -> str | None:
        """The reason why the stage cannot compute its task or, if it has, send the result."""
        giver, taker = _neighbors(schedule, stage, task.kind)
        if computed[task.kind][stage] == task.micro:
            if giver is not None and computed[task.kind][giver] <= task.micro:
                return f"waits for stage {giver}, which is at {schedule.tasks[giver][at[giver]]}"
        elif taker is not None and sent[task.kind][taker] < task.micro:
            return f"is not received by stage {taker}, which is at {schedule.tasks[taker][at[taker]]}"
        return None

    def step(stage: int) -> bool:
        """Compute the task or send its result, if possible; return whether that was done."""
        if at[stage] == len(schedule.tasks[stage]) or obstacle(stage, task := schedule.tasks[stage][at[stage]]):
            return False
        if computed[task.kind][stage] == task.micro:
            computed[task.kind][stage] += 1
        else:
            sent[task.kind][stage] += 1
            at[stage] += 1
        return True

    while sum(map(step, range(schedule.stages))):
        pass
    for stage, tasks in enumerate(schedule.tasks):
        if at[stage] < len(tasks):
            task = tasks[at[stage]]
            raise ScheduleError(f"{schedule}: stage {stage}: {task} {obstacle(stage, task)}: deadlock")


def _held(tasks: Sequence[Task]) -> int:
    """The most micro-batches whose activations a stage holds: from their forward to the end of their backward."""
    return max(accumulate(1 if task.kind is Kind.FORWARD else -1 for task in tasks))


@dataclass(frozen=True)
class Timing:
    """When each task starts and ends: ``start[stage][n]`` and ``end[stage][n]`` for the n-th task of a stage."""

    start: Sequence[Sequence[Any]]
    end: Sequence[Sequence[Any]]

    @property
    def makespan(self) -> Any:
        """The time at which all tasks are done."""
        return max(ends[-1] for ends in self.end)

    @property
    def idle(self) -> list[Fraction]:
        """For each stage, the share of the time that it does nothing: the bubble.  Exact, as far as the times are."""
        busy = [sum(map(sub, ends, starts)) for starts, ends in zip(self.start, self.end, strict=True)]
        return [1 - Fraction(time) / Fraction(self.makespan) if self.makespan else Fraction(0) for time in busy]


def simulate(schedule: PipelineSchedule, forward: Sequence[Any], backward: Sequence[Any], message: Any = 0) -> Timing:
    """Compute when each task starts and ends.

    A forward takes ``forward[stage]``, a backward ``backward[stage]``, and a message ``message``, during which both
    stages may compute.  Times are numbers of 0 or more, in any unit.  Raises ``ScheduleError`` if the schedule is
    wrong.
    """
    verify(schedule)
    costs = {Kind.FORWARD: _numbers(forward), Kind.BACKWARD: _numbers(backward)}
    for times in costs.values():
        if len(times) != schedule.stages:
            raise ValueError(f"{schedule}: one time for each stage is needed, got {len(times)}")
    return _simulate(schedule, costs, _numbers([message])[0])


def _simulate(schedule: PipelineSchedule, costs: dict[Kind, list[Any]], message: Any) -> Timing:
    """Compute when each task starts and ends, for a schedule that was verified."""
    start: list[list[Any]] = [[] for _ in range(schedule.stages)]
    end: list[list[Any]] = [[] for _ in range(schedule.stages)]
    done: dict[Kind, list[list[Any]]] = {kind: [[] for _ in range(schedule.stages)] for kind in Kind}
    while any(len(ends) < len(tasks) for ends, tasks in zip(end, schedule.tasks, strict=True)):
        for stage, tasks in enumerate(schedule.tasks):
            for task in tasks[len(end[stage]) :]:
                giver, _ = _neighbors(schedule, stage, task.kind)
                if giver is not None and len(done[task.kind][giver]) <= task.micro:
                    break
                free = end[stage][-1] if end[stage] else 0
                start[stage].append(free if giver is None else max(free, done[task.kind][giver][task.micro] + message))
                end[stage].append(start[stage][-1] + costs[task.kind][stage])
                done[task.kind][stage].append(end[stage][-1])
    return Timing(start, end)


def _numbers(values: Sequence[Any]) -> list[Any]:
    """Convert numbers to Python's.  Raises ``ValueError`` unless all are finite and 0 or more."""
    numbers = np.asarray(values).tolist()
    for number in numbers:
        if not 0 <= number < inf:
            raise ValueError(f"times and costs must be finite and 0 or more, got {number}")
    return numbers


def cut(costs: Sequence[Any], stages: int) -> list[range]:
    """Cut layers with these costs into stages of consecutive layers, at least one each, minimizing the largest cost.

    Among equal solutions the second largest cost is minimized, and so on; then the earliest cuts are taken.  Costs are
    finite numbers of 0 or more, and compared exactly.
    """
    numbers = _numbers(costs)
    if not 1 <= stages <= len(numbers):
        raise ValueError(f"{len(numbers)} layers cannot be cut into {stages} stages: each needs a layer at least")
    exact = [Fraction(cost) for cost in numbers]
    scale = lcm(*(cost.denominator for cost in exact))
    until = [0, *accumulate(int(cost * scale) for cost in exact)]  # what the layers before each cut cost
    # For the first layers, by how many: (costs of stages, highest first; cuts), of which the least is the best.  What
    # is better stays so with one stage more, whatever that costs.
    best: list[tuple[tuple[int, ...], tuple[int, ...]]] = [((until[n],), (n,)) for n in range(1, len(numbers) + 1)]
    for done in range(1, stages):
        best = [
            min(
                (tuple(sorted((*sums, until[n] - until[ends[-1]]), reverse=True)), (*ends, n))
                for sums, ends in best
                if ends[-1] < n
            )
            for n in range(done + 1, len(numbers) + 1)
        ]
    ends = best[-1][1]
    return [range(lo, hi) for lo, hi in zip((0, *ends), ends, strict=False)]
