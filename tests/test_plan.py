"""What a plan is, apart from running it: tests/mpi/test_allreduce.py does that."""

import tracemalloc

import numpy as np
import pytest

from mpicoll.algorithms import ALGORITHMS
from mpicoll.mpi.plan import Plan


@pytest.mark.parametrize("rank", [0, 1, 2500, 4095])
def test_one_rank_of_4096_has_few_rounds_of_at_most_two_messages(rank):
    schedule = ALGORITHMS["allreduce"]["circulant"].schedule(4096)
    tracemalloc.start()
    plan = Plan(schedule, rank, 4096 * 10, np.dtype("f4"))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(plan._steps) == 24
    for step in plan._steps:
        for messages in (step.sends, step.recvs):
            assert 1 <= len(messages) <= 2
            assert len({message.peer for message in messages}) == 1
    assert plan.bytes_sent == 2 * 4095 * 40
    assert peak < 4096 * 10  # the other 4095 ranks leave no trace
    assert plan.scratch_bytes == 2048 * 40


def test_chunks_that_are_empty_are_not_sent():
    schedule = ALGORITHMS["allreduce"]["ring"].schedule(8)
    plans = [Plan(schedule, rank, 3, np.dtype("f8")) for rank in range(8)]
    assert sum(plan.bytes_sent for plan in plans) == 2 * 7 * 3 * 8
    assert Plan(schedule, 0, 0, np.dtype("f8"))._steps == []
