"""Copies where arrays are in host memory: none that are not needed.  Those on GPUs are tested by training on them."""

import numpy as np

from mpicoll.train.transfer import fetched, load, memory_for, store, synchronize


def test_in_host_memory_nothing_is_copied_onto_itself():
    x, host = np.arange(3.0), np.zeros(3)
    load(host, x)
    np.testing.assert_array_equal(host, x)
    host += 1
    store(x, host)
    np.testing.assert_array_equal(x, [1, 2, 3])
    load(x, x)
    store(x, x)
    synchronize(x)
    assert fetched(x) is x
    np.testing.assert_array_equal(x, [1, 2, 3])
    assert memory_for(x)(5).tolist() == [0] * 5
