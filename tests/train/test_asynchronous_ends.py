"""An asynchronous job of which one rank fails ends, at once, whichever way it fails and wherever."""

import sys

import pytest

from launch import REPOSITORY, mpirun

SCRIPT = """
import os, signal, sys, time
sys.path.insert(0, TESTS)
import numpy as np
from mpi4py import MPI
import mpicoll
from training import blobs, training

comm = MPI.COMM_WORLD
how, strategy, staleness, seed = sys.argv[1:]
random = np.random.default_rng(int(seed))
who, when = int(random.integers(comm.size)), int(random.integers(1, 40))
pauses = np.random.default_rng([int(seed), comm.rank])

class Failing:
    def __init__(self, model):
        self.model, self.size, self.calls = model, model.size, 0

    def loss_and_grad(self, *args):
        self.calls += 1
        time.sleep(pauses.exponential(1e-3))
        if comm.rank == who and self.calls == when:
            if how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if how == "raise":
                raise ValueError("of a model")
            os._exit(0)  # leaves, as if all were well
        return self.model.loss_and_grad(*args)

made = training(comm, blobs(200), strategy=strategy, staleness=staleness or None, batch_size=10)
made.model = Failing(made.model)
with mpicoll.guard(timeout=10):
    made.run()
print("ended well")
""".replace("TESTS", repr(str(REPOSITORY / "tests")))


@pytest.mark.parametrize(("strategy", "staleness"), [("async", "0"), ("async", "2"), ("async", "inf"), ("ad-psgd", "")])
@pytest.mark.parametrize("how", ["kill", "raise", "leave"])
def test_a_rank_that_fails_ends_the_job(tmp_path, how, strategy, staleness):
    seed = str(len(how) + 7 * len(staleness))
    done = mpirun(3, [sys.executable, "-c", SCRIPT, how, strategy, staleness, seed], tmp_path, timeout=40)
    assert done.status != 0 or how == "leave"
    assert "ended well" not in done.out
    assert how != "raise" or "ValueError: of a model" in done.err
