"""What a plan is, apart from running it: tests/mpi/test_allreduce.py does that."""

import tracemalloc
from collections import Counter

import numpy as np
import pytest

from mpicoll.algorithms import ALGORITHMS
from mpicoll.mpi.plan import Plan
from mpicoll.verify import verify_schedule

LOGARITHMIC = [name for name in ALGORITHMS["allreduce"] if name != "ring"]


@pytest.mark.parametrize("rank", [0, 1, 2500, 4095])
@pytest.mark.parametrize("name", LOGARITHMIC)
def test_one_rank_of_4096_has_few_rounds_of_at_most_two_messages_a_peer(name, rank):
    row = ALGORITHMS["allreduce"][name]
    schedule = row.schedule(4096)
    tracemalloc.start()
    plan = Plan(schedule, rank, 4096 * 10, np.dtype("f4"))
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
    plans = [Plan(schedule, rank, count, np.dtype("f4")) for rank in range(p)]
    assert max(plan.scratch_bytes for plan in plans) == verify_schedule(schedule).scratch * count * 4


def test_chunks_that_are_empty_are_not_sent():
    schedule = ALGORITHMS["allreduce"]["ring"].schedule(8)
    plans = [Plan(schedule, rank, 3, np.dtype("f8")) for rank in range(8)]
    assert sum(plan.bytes_sent for plan in plans) == 2 * 7 * 3 * 8
    assert Plan(schedule, 0, 0, np.dtype("f8"))._steps == []
