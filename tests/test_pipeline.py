from collections import deque
from collections.abc import Iterator
from fractions import Fraction
from itertools import combinations, pairwise, product
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from click.testing import CliRunner

from mpicoll.cli.show import show
from mpicoll.cli.verify import verify as verify_command
from mpicoll.draw import gantt_svg, gantt_text
from mpicoll.errors import UserError
from mpicoll.pipeline import (
    PIPELINES,
    Kind,
    Pipeline,
    PipelineSchedule,
    Proof,
    Task,
    Timing,
    cut,
    simulate,
    verify,
    verify_pipeline,
)
from mpicoll.schedule import ScheduleError

DOCS = Path(__file__).parents[1] / "docs"
F, B = Kind.FORWARD, Kind.BACKWARD
ROWS = list(PIPELINES.values())
Table = list[list[Task]]  # [stage]


def made(*stages: str, micro: int = 2) -> PipelineSchedule:
    """From lines like F0 B0 F1 B1."""
    tasks = [[Task(Kind(word[0]), int(word[1:])) for word in line.split()] for line in stages]
    return PipelineSchedule("made", micro, tasks)


# Training, in earnest: stages that multiply by a weight each, and the messages between them.


class Channel:
    """Messages of a kind between two stages: one is sent when the tasks that take those before it are done."""

    def __init__(self) -> None:
        self.under_way: deque[float] = deque()
        self.sent = self.done = 0


class DeadlockError(Exception):
    pass


def stage_at_work(
    tasks: list[Task],
    weight: float,
    inputs: list[float] | None,
    ends: tuple[Channel | None, ...],
    found: dict[str, Any],
) -> Iterator[None]:
    """A stage's process, which stands still at each ``yield``; a ``KeyError`` where it lacks what it works on."""
    before_in, behind_out, behind_in, before_out = ends
    held: dict[int, float] = {}
    found |= {"gradient": 0.0, "held": 0}
    for kind, micro in tasks:
        source, target = (before_in, behind_out) if kind is F else (behind_in, before_out)
        while source and not source.under_way:
            yield
        if kind is F:
            held[micro] = source.under_way.popleft() if source else dict(enumerate(inputs or []))[micro]
            found["held"] = max(found["held"], len(held))
            result = weight * held[micro]
        else:
            activation = held.pop(micro)
            gradient = source.under_way.popleft() if source else weight * activation + 1.0  # some loss
            found["gradient"] += gradient * activation
            result = gradient * weight
        while target and target.sent > target.done:
            yield
        if target:
            target.sent += 1
            target.under_way.append(result)
        if source:
            source.done += 1


def trained(tasks: Table, inputs: list[float], weights: list[float]) -> list[dict[str, Any]]:
    """What each stage finds: its gradient, and how many activations it held; ``DeadlockError`` if they do not end."""
    stages = len(tasks)
    onward = [None, *(Channel() for _ in range(stages - 1)), None]
    backward = [None, *(Channel() for _ in range(stages - 1)), None]
    found: list[dict[str, Any]] = [{} for _ in tasks]
    running = [
        stage_at_work(
            tasks[n],
            weights[n],
            None if n else inputs,
            (onward[n], onward[n + 1], backward[n + 1], backward[n]),
            found[n],
        )
        for n in range(stages)
    ]
    channels = [channel for channel in (*onward, *backward) if channel]
    at_work, progress = list(range(stages)), -1
    while at_work:
        at_work = [n for n in at_work if next(running[n], DeadlockError) is None]
        before, progress = progress, stages - len(at_work) + sum(channel.sent + channel.done for channel in channels)
        if progress == before:
            raise DeadlockError
    assert not any(channel.under_way for channel in channels), "messages are left over"
    return found


def numbers(stages: int, micro: int) -> tuple[list[float], list[float]]:
    rng = np.random.default_rng(stages * 100 + micro)
    return rng.normal(size=micro).tolist(), rng.normal(size=stages).tolist()


def in_one_process(inputs: list[float], weights: list[float]) -> list[float]:
    gradients = [0.0] * len(weights)
    for value in inputs:
        activations = [value]
        for weight in weights:
            activations.append(weight * activations[-1])
        gradient = activations[-1] + 1.0
        for n in reversed(range(len(weights))):
            gradients[n] += gradient * activations[n]
            gradient *= weights[n]
    return gradients


def is_right(tasks: Table, micro: int) -> list[int] | None:
    """Does it end, with the gradients of one process, bit for bit?  How many activations were held; ``None`` if not."""
    inputs, weights = numbers(len(tasks), micro)
    try:
        found = trained(tasks, inputs, weights)
    except (DeadlockError, KeyError, AssertionError):
        return None
    if [stage["gradient"] for stage in found] != in_one_process(inputs, weights):
        return None
    return [stage["held"] for stage in found]


def judged(tasks: Table, micro: int) -> list[int] | None:
    """The verifier's verdict, in the same terms."""
    try:
        return list(verify(PipelineSchedule("mutant", micro, tasks)).held)
    except ScheduleError:
        return None


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_every_row_is_proved_and_trains_as_one_process_does(row):
    for stages, micro in product(range(1, 9), range(1, 13)):
        proof = verify_pipeline(row, stages, micro)
        assert is_right(row.schedule(stages, micro).tasks, micro) == list(proof.held)
        assert proof.held[0] == (micro if row.name == "gpipe" else min(stages, micro))


# Mutants: everything that can go wrong with one task.


def mutants(original: Table, micro: int) -> Iterator[tuple[str, Table]]:
    """Each task dropped, duplicated, moved to any other place (so backward before forward, too), of another
    micro-batch and of the other kind; and each two tasks of a stage swapped."""
    for stage, tasks in enumerate(original):
        changed: list[tuple[str, list[Task]]] = []
        for n, task in enumerate(tasks):
            rest = tasks[:n] + tasks[n + 1 :]
            changed.append((f"{task} dropped", rest))
            changed += [(f"{task} again at {at}", [*tasks[:at], task, *tasks[at:]]) for at in {n, len(tasks), 0}]
            moved = [(f"{task} moved to {at}", [*rest[:at], task, *rest[at:]]) for at in range(len(tasks)) if at != n]
            changed += moved
            other = Task(F if task.kind is B else B, task.micro)
            for put in (other, task._replace(micro=(task.micro + 1) % micro), task._replace(micro=micro)):
                if put != task:
                    changed.append((f"{put} for {task}", [*tasks[:n], put, *tasks[n + 1 :]]))
        for n, m in combinations(range(len(tasks)), 2):
            if m > n + 1:  # neighbors have been moved
                swapped = list(tasks)
                swapped[n], swapped[m] = tasks[m], tasks[n]
                changed.append((f"{tasks[n]} and {tasks[m]} swapped", swapped))
        for what, new in changed:
            yield f"stage {stage}: {what}", [*original[:stage], new, *original[stage + 1 :]]


@pytest.mark.parametrize("stages", range(2, 6))
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_every_mutant_is_refused_or_equivalent(row, stages):
    """The verifier accepts what trains as one process does, and nothing else."""
    refused = accepted = 0
    for micro in range(1, 7):
        tasks = [list(mine) for mine in row.schedule(stages, micro).tasks]
        for what, mutant in mutants(tasks, micro):
            verdict = judged(mutant, micro)
            assert verdict == is_right(mutant, micro), f"{micro} micro-batches, {what}"
            assert verdict is None or "moved" in what or "swapped" in what
            refused += verdict is None
            accepted += verdict is not None
    assert refused > accepted > 0


def test_every_order_of_tasks_is_refused_or_right():
    """All that stages may do by themselves, together: they may deadlock."""
    refused = accepted = 0
    for stages, micro in ((2, 4), (3, 3)):
        orders = [
            [Task(F, words[:n].count(F)) if kind is F else Task(B, words[:n].count(B)) for n, kind in enumerate(words)]
            for words in product(Kind, repeat=2 * micro)
            if words.count(F) == micro and all(words[:n].count(F) >= words[:n].count(B) for n in range(2 * micro))
        ]
        for table in product(orders, repeat=stages):
            verdict = judged(list(table), micro)
            assert verdict == is_right(list(table), micro)
            refused += verdict is None
            accepted += verdict is not None
    assert refused > 50
    assert accepted > 50


WRONG = {
    "made pipeline, 2 stages, 2 micro-batches: stage 1: F1 is never done": made("F0 F1 B0 B1", "F0 B0"),
    "stage 0: B1 is never done": made("F0 F1 B0"),
    "stage 0: F0 is done a second time": made("F0 F0 F1 B0 B1"),
    "stage 1: B1 is not in order, B0 must be done before": made("F0 F1 B0 B1", "F0 F1 B1 B0"),
    "stage 0: B1 is done before F1": made("F0 B0 B1 F1"),
    "stage 0: F2 is of no micro-batch, there are 2": made("F0 F1 F2 B0 B1"),
    "stage 0: F-1 is of no micro-batch": made("F-1 F0 F1 B0 B1"),
    "stage 0: B0 waits for stage 1, which is at F1: deadlock": made("F0 B0 F1 B1", "F0 F1 B0 B1"),
    "stage 0: F3 is not received by stage 1, which is at B1: deadlock": made(  # buffered sends would end
        "F0 F1 F2 F3 B0 B1 B2 B3", "F0 B0 F1 B1 F2 B2 F3 B3", micro=4
    ),
}


@pytest.mark.parametrize("message", WRONG)
def test_a_wrong_schedule_is_refused_with_a_reason(message):
    with pytest.raises(ScheduleError, match=message):
        verify(WRONG[message])
    with pytest.raises(ScheduleError, match=message):
        simulate(WRONG[message], [1, 1], [1, 1])


def test_a_table_that_promises_too_little_or_too_much_is_refused():
    generate = PIPELINES["gpipe"].generate
    with pytest.raises(ScheduleError, match="stage 1 holds activations of 3 micro-batches, the table states 2"):
        verify_pipeline(Pipeline("wrong", generate, held=lambda stage, stages, micro: micro - stage), 2, 3)
    wrong = Pipeline("wrong", generate, held=lambda stage, stages, micro: micro, idle=lambda stages, micro: Fraction(0))
    with pytest.raises(ScheduleError, match="stage 0 is idle for 1/4 of the time, the table states 0"):
        verify_pipeline(wrong, 2, 3)


def test_numbers_of_stages_and_micro_batches():
    for stages, micro, what in (
        (0, 1, "stages must be at least 1, got 0"),
        (1, -1, "micro-batches must be at least 1"),
    ):
        with pytest.raises(ValueError, match=f"1f1b pipeline: the number of {what}"):
            PIPELINES["1f1b"].schedule(stages, micro)


# When.


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_the_bubble_of_equal_stages_is_the_textbook_s(row):
    forward, backward = Fraction(1, 3), Fraction(5, 7)
    for stages, micro in product(range(1, 9), range(1, 13)):
        timing = simulate(row.schedule(stages, micro), [forward] * stages, [backward] * stages)
        assert timing.makespan == (micro + stages - 1) * (forward + backward)
        assert timing.idle == [Fraction(stages - 1, micro + stages - 1)] * stages


def test_messages_that_take_time_cost_1f1b_more():
    tenth = Fraction(1, 10)
    for stages, micro in product(range(2, 6), range(1, 9)):
        spans = {
            row.name: simulate(row.schedule(stages, micro), [1] * stages, [1] * stages, tenth).makespan for row in ROWS
        }
        assert spans["gpipe"] == 2 * (micro + stages - 1) + 2 * (stages - 1) * tenth
        assert spans["1f1b"] >= spans["gpipe"]
        assert spans["1f1b"] > spans["gpipe"] or micro <= stages + 1
    idle = [simulate(row.schedule(4, 32), [1] * 4, [1] * 4, tenth).idle for row in ROWS]
    assert [f"{float(shares[0]):.1%}" for shares in idle] == ["9.3%", "14.9%"]  # as the documentation says


def test_times_of_tasks():
    timing = simulate(made("F0 F1 B0 B1", "F0 B0 F1 B1"), [1, 3], [2, 5], 10)
    assert timing.start == [[0, 1, 29, 37], [11, 14, 19, 22]]
    assert timing.end == [[1, 2, 31, 39], [14, 19, 22, 27]]
    assert timing.makespan == 39
    assert timing.idle == [Fraction(33, 39), Fraction(23, 39)]
    assert simulate(made("F0 B0", micro=1), [0], [0]).idle == [0]
    floats = simulate(made("F0 F1 B0 B1", "F0 B0 F1 B1"), np.full(2, 0.5, np.float32), np.full(2, 1.5), 0.25)
    assert floats.makespan == 6.5


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_stage_does_one_task_at_a_time_and_none_before_its_message(row):
    rng = np.random.default_rng(5)
    for stages, micro in ((1, 3), (3, 2), (4, 6)):
        schedule = row.schedule(stages, micro)
        forward, backward, message = rng.integers(1, 9, stages), rng.integers(1, 9, stages), 2
        timing = simulate(schedule, forward, backward, message)
        when = {
            (stage, task): (timing.start[stage][n], timing.end[stage][n])
            for stage, tasks in enumerate(schedule.tasks)
            for n, task in enumerate(tasks)
        }
        for stage, tasks in enumerate(schedule.tasks):
            for previous, task in pairwise([None, *tasks]):
                start, end = when[stage, task]
                giver = stage - 1 if task.kind is F else stage + 1
                earliest = [when[stage, previous][1]] if previous else [0]
                earliest += [when[giver, task][1] + message] if 0 <= giver < stages else []
                assert start == max(earliest)
                assert end - start == (forward if task.kind is F else backward)[stage]


def test_times_that_are_none():
    schedule = PIPELINES["1f1b"].schedule(2, 2)
    with pytest.raises(ValueError, match="2 stages, 2 micro-batches: one time for each stage is needed, got 3"):
        simulate(schedule, [1, 1, 1], [1, 1])
    for times in ([1, -1], [1, float("nan")], [float("inf"), 1]):
        with pytest.raises(ValueError, match="times and costs must be finite and 0 or more, got "):
            simulate(schedule, [1, 1], times)
    with pytest.raises(ValueError, match="must be finite"):
        simulate(schedule, [1, 1], [1, 1], -1)


# Where to cut.


def sums_of(costs: list[Any], stages: list[range]) -> list[Any]:
    return sorted((sum(costs[layer] for layer in layers) for layers in stages), reverse=True)


def test_cuts_are_the_best_of_all():
    rng = np.random.default_rng(3)
    for layers in range(1, 9):
        for costs in (rng.integers(0, 5, layers).tolist(), [1] * layers):
            for stages in range(1, layers + 1):
                ways = [
                    [range(lo, hi) for lo, hi in pairwise((0, *inner, layers))]
                    for inner in combinations(range(1, layers), stages - 1)
                ]
                best = min(ways, key=lambda way: (sums_of(costs, way), [layer.stop for layer in way]))
                assert cut(costs, stages) == best


def test_cuts_by_numbers_of_any_kind():
    assert cut([1, 1, 1, 10], 3) == [range(1), range(1, 3), range(3, 4)]  # even, though 10 is the most in any case
    assert cut([0.1] * 6, 3) == [range(2), range(2, 4), range(4, 6)]  # 0.1 + 0.1 + 0.1 is not 0.3, but that is the same
    assert cut([0.1] * 7, 3) == [range(2), range(2, 4), range(4, 7)]
    assert cut(np.array([5, 1, 1, 1], np.float32), 2) == [range(1), range(1, 4)]
    assert cut([Fraction(1, 3), Fraction(2, 3), 1], 2) == [range(2), range(2, 3)]
    assert cut([0, 0, 0], 3) == [range(1), range(1, 2), range(2, 3)]


def test_layers_that_cannot_be_cut():
    for stages in (0, 4):
        with pytest.raises(ValueError, match=f"3 layers cannot be cut into {stages} stages: each needs a layer"):
            cut([1, 2, 3], stages)
    for cost in (-1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"must be finite and 0 or more, got {cost}"):
            cut([1, cost], 2)


# Pictures and commands.


def test_a_picture_is_the_schedule():
    assert gantt_text(PIPELINES["1f1b"].schedule(3, 4)).splitlines() == [
        "stage 0 │ F0 F1 F2 ·  ·  B0 F3 B1 ·  B2 ·  B3",
        "stage 1 │ ·  F0 F1 ·  B0 F2 B1 F3 B2 ·  B3 ·",
        "stage 2 │ ·  ·  F0 B0 F1 B1 F2 B2 F3 B3 ·  ·",
    ]
    wide = gantt_text(PIPELINES["gpipe"].schedule(11, 11)).splitlines()
    assert wide[0].startswith("stage 0  │ F0  F1  ")
    assert wide[10].startswith("stage 10 │ ·   ·   ")


def elements(drawn: str, tag: str) -> list[Any]:
    return list(ElementTree.fromstring(drawn).iter("{http://www.w3.org/2000/svg}" + tag))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_drawing_has_a_box_for_each_task_where_and_as_long_as_it_is(row):
    schedule = row.schedule(3, 5)
    timing = simulate(schedule, [1, 2, 3], [2, 4, 6], 1)
    drawn = gantt_svg(schedule, verify(schedule), timing, "a < b & c")
    boxes = [box for box in elements(drawn, "rect") if box.get("stroke") == "white"]
    scale = float(boxes[0].get("width"))  # of 1
    assert len({box.get("fill") for box in boxes}) == 2
    for stage in range(3):
        y = sorted({float(box.get("y")) for box in boxes})[stage]
        boxes_of_stage = [box for box in boxes if float(box.get("y")) == y]
        fills = {F: boxes[0].get("fill"), B: boxes[-1].get("fill")}
        assert [box.get("fill") for box in boxes_of_stage] == [fills[task.kind] for task in schedule.tasks[stage]]
        spans = [(float(box.get("x")) - 76, float(box.get("width"))) for box in boxes_of_stage]
        wanted = [
            (start * scale, (end - start) * scale)
            for start, end in zip(timing.start[stage], timing.end[stage], strict=True)
        ]
        np.testing.assert_allclose(spans, wanted, rtol=1e-3, atol=1e-2)
    labels = [label.text for label in elements(drawn, "text")]
    assert [label for label in labels if label.isdecimal() and len(label) == 1][-1] == str(verify(schedule).held[2])
    white = [label.text for label in elements(drawn, "text") if label.get("fill") == "white"]
    assert white == [str(task.micro) for tasks in schedule.tasks for task in tasks]
    assert {"a < b & c", "stage 2", "forward", "backward", "idle", "holds", "time"} <= {*labels}
    for share in timing.idle:
        assert f"{float(share):.0%}" in labels


def test_a_drawing_of_nothing_and_of_much():
    nothing = made("F0 B0", micro=1)
    assert "idle for 0% of the time" in gantt_svg(nothing, Proof((1,)), Timing([[0, 0]], [[0, 0]]), "nothing")
    many = PIPELINES["gpipe"].schedule(1, 400)
    drawn = gantt_svg(many, verify(many), simulate(many, [1], [9]), "numbers that fit")
    fitting = [label.text for label in elements(drawn, "text") if label.get("fill") == "white"]
    assert fitting == [str(micro) for micro in range(400)]  # of backwards; forwards are too short


@pytest.mark.parametrize("name", PIPELINES)
def test_the_pictures_in_the_documentation_are_current(name):
    schedule = PIPELINES[name].schedule(4, 8)
    timing = simulate(schedule, [1] * 4, [1] * 4)
    title = f"{name} pipeline: 4 stages, 8 micro-batches"
    assert (DOCS / f"{name}.svg").read_text() == gantt_svg(schedule, verify(schedule), timing, title)


def printed(command: Any, arguments: str) -> list[str]:
    result = CliRunner().invoke(command, arguments.split())
    return [str(result.exception)] if isinstance(result.exception, UserError) else result.output.splitlines()


def test_show_and_verify(tmp_path):
    about = "1f1b pipeline: 4 stages, 8 micro-batches"
    head, *rows, legend = printed(show, "1f1b")
    assert head == f"{about}, idle for 3/11 of the time, no stage holds activations of more than 4 micro-batches"
    assert "\n".join(rows) == gantt_text(PIPELINES["1f1b"].schedule(4, 8))
    assert legend == "F3 takes micro-batch 3 forward through the stage's layers, B3 backward; ·: idle"
    assert printed(show, "gpipe --ranks 2 --micro 3")[0].startswith(
        "gpipe pipeline: 2 stages, 3 micro-batches, idle for 1/4"
    )
    assert printed(show, f"1f1b --svg {tmp_path}/a.svg") == [f"{about}: drawn in {tmp_path}/a.svg"]
    assert (tmp_path / "a.svg").read_text() == (DOCS / "1f1b.svg").read_text()
    for option in ("--root 1", "--segments 2", "--collective mix"):
        assert printed(show, f"gpipe {option}") == ["gpipe is a pipeline: it takes --ranks, --micro and --svg only"]
    assert printed(show, "ring --micro 3") == ["ring allreduce has no parameter 'micro'"]
    assert printed(show, "gossip --micro 3")[0].startswith("gossip is a table of all graphs: it takes --ranks only")
    assert (
        "would have 524288 cells, more than 200000: take fewer stages"
        in printed(show, "1f1b --ranks 256 --micro 1024")[0]
    )
    both = printed(verify_command, "pipeline --max-ranks 5")
    assert [line.split() for line in both[1:-1]] == [
        ["gpipe", "p", "=", "1..5", "0.286", "10"],
        ["1f1b", "p", "=", "1..5", "0.286", "5"],
    ]
    assert "pipeline" not in "".join(printed(verify_command, "ring --max-ranks 2"))
    assert [line.split()[0] for line in printed(verify_command, "1f1b bruck --max-ranks 2")] == [
        *("collective", "allgather", "rounds,", "pipeline", "1f1b", "share")
    ]
