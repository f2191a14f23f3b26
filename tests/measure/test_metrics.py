"""What is made of times."""

import numpy as np

from mpicoll.measure.metrics import bandwidths, memory_share, record, summary
from mpicoll.measure.task import Task
from mpicoll.measure.timing import Result
from records import MEMORY


def test_summary_of_known_samples():
    us = np.arange(101.0)[::-1]
    assert summary(us) == {"n": 101, "median": 50, "p10": 10, "p90": 90, "p99": 99, "min": 0, "max": 100, "mean": 50}


def test_bandwidths_are_those_of_nccl_tests():
    assert bandwidths("allreduce", 4000, 4, 2) == (2, 3)
    assert bandwidths("reduce_scatter", 4000, 4, 2) == bandwidths("allgather", 4000, 4, 2) == (2, 1.5)
    assert bandwidths("bcast", 4000, 4, 2) == bandwidths("reduce", 4000, 4, 2) == (2, 2)
    assert bandwidths("allreduce", 4000, 1, 2) == (2, 0)


def test_share_of_the_memory_bandwidth():
    assert memory_share("allreduce", 10**6, 4, 400, MEMORY) == 1  # 2 MB at 5 GB/s
    assert memory_share("bcast", 10**6, 4, 400, MEMORY) == 0.5
    assert memory_share("reduce_scatter", 10**6, 4, 250, MEMORY) == 1
    assert memory_share("allreduce", 10**6, 4, 250, MEMORY, one_result=True) == 1


def test_the_speed_is_the_median_of_ratios_within_a_repetition():
    slow_for_a_while = np.array([1.0, 1, 1, 10, 10, 10, 10])
    result = Result("ring", True, Task("allreduce", 3, np.dtype("f4")), slow_for_a_while, 2 * slow_for_a_while, 0)
    said = record(result, 4, MEMORY)
    assert (said["speed"], said["speed_low"], said["speed_high"]) == (2, 2, 2)
    assert (said["bytes"], said["n"], said["median"], said["root"]) == (12, 7, 10, -1)
