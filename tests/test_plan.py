"""What a plan is, apart from running it: tests/mpi/test_allreduce.py does that."""

import tracemalloc
from collections import Counter

import numpy as np
import pytest

from mpicoll.algorithms import ALGORITHMS
from mpicoll.graphs import graph
from mpicoll.mpi.operations import operation
from mpicoll.mpi.plan import Plan
from mpicoll.schedule import Schedule
from mpicoll.verify import verify_schedule


def compiled(schedule: Schedule, rank: int, count: int, dtype: str = "f4", op: str = "sum") -> Plan:
    operated = operation(op, np.dtype(dtype))
    finishes = operated.finish is not None
    return Plan(schedule, rank, count, np.dtype(dtype), operated.carried(np.dtype(dtype)), finishes)


LOGARITHMIC = [name for name in ALGORITHMS["allreduce"] if name != "ring"]


@pytest.mark.parametrize("rank", [0, 1, 2500, 4095])
@pytest.mark.parametrize("name", LOGARITHMIC)
def test_one_rank_of_4096_has_few_rounds_of_at_most_two_messages_a_peer(name, rank):
    row = ALGORITHMS["allreduce"][name]
    schedule = row.schedule(4096)
    tracemalloc.start()
    plan = compiled(schedule, rank, 4096 * 10)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(plan._steps) <= row.rounds(4096, **row.parameters) <= 27
    for step in plan._steps:
        for messages in (step.sends, step.recvs):
            assert all(count <= 2 for count in Counter(message.peer for message in messages).values())
    assert plan.bytes_sent <= row.sent(4096, **row.parameters) * 4096 * 40
    assert peak < 4096 * 10  # the other 4095 ranks leave no trace


@pytest.mark.parametrize("p", [1, 2, 3, 4, 5, 7, 8, 13])
@pytest.mark.parametrize("name", ALGORITHMS["allreduce"])
def test_a_plan_needs_the_scratch_memory_that_the_proof_found(name, p):
    schedule = ALGORITHMS["allreduce"][name].schedule(p)
    count = schedule.chunks * 64  # chunks of equal length, of whole cache lines
    plans = [compiled(schedule, rank, count) for rank in range(p)]
    assert max(plan.scratch_bytes for plan in plans) == verify_schedule(schedule).scratch * count * 4


@pytest.mark.parametrize("p", [1, 2, 3, 4, 6, 8])
@pytest.mark.parametrize("name", ALGORITHMS["mix"])
def test_mixing_sends_to_neighbors_only_and_needs_what_they_send(name, p):
    schedule, made = ALGORITHMS["mix"][name].schedule(p), graph(name, p)
    plans = [Plan(schedule, rank, 64, np.dtype("f4")) for rank in range(p)]
    assert max(plan.scratch_bytes for plan in plans) == verify_schedule(schedule).scratch * 64 * 4
    links = sum(np.count_nonzero(made.matrix(t)) - p for t in range(made.period or 1))
    assert sum(plan.bytes_sent for plan in plans) == links * 64 * 4


def test_chunks_that_are_empty_are_not_sent():
    schedule = ALGORITHMS["allreduce"]["ring"].schedule(8)
    plans = [compiled(schedule, rank, 3, "f8") for rank in range(8)]
    assert sum(plan.bytes_sent for plan in plans) == 2 * 7 * 3 * 8
    assert compiled(schedule, 0, 0, "f8")._steps == []


@pytest.mark.parametrize("p", [1, 2, 3, 5, 8, 13])
@pytest.mark.parametrize("name", ALGORITHMS["allreduce"])
def test_every_result_is_rounded_once_where_sums_are_carried_in_float32(name, p):
    """On every rank each element comes to the vector of 16-bit floats exactly once, from its own sums or by message."""
    schedule = ALGORITHMS["allreduce"][name].schedule(p)
    for count in (1, p + 1, 97):
        for rank in range(p):
            plan = compiled(schedule, rank, count, "e", "mean")
            vector, scratch = np.zeros(count, "e"), np.zeros(plan.scratch_bytes, np.uint8)
            came = np.zeros(count, int)
            for bound in plan.bind(vector, scratch, operation("mean", vector.dtype)):
                for target, source, finish in bound.moves:
                    assert finish == (target.base is vector)
                    assert (source.dtype, target.dtype) == (
                        (np.float32, np.float16) if finish else (np.float16, np.float32)
                    )
                    if finish:
                        start = (target.ctypes.data - vector.ctypes.data) // 2
                        came[start : start + len(target)] += 1
                for memory, _ in bound.recvs:
                    start = (np.frombuffer(memory, "u1").ctypes.data - vector.ctypes.data) // 2
                    if 0 <= start < count:
                        came[start : start + len(memory) // 2] += 1
            np.testing.assert_array_equal(came, 1)
