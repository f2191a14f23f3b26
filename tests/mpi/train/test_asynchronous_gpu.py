"""Training without waiting for all, on GPUs: messages, and what a thread works on, are in host memory.

What can be had again is compared with a CPU in ``test_loop_gpu``.
"""

import threading
from typing import Any

import fakecupy
import kernels
import numpy as np
import pytest
from mpi4py import MPI
from test_asynchronous import Still, same_everywhere, slowed

from mpicoll.mpi.gpu.array import is_cupy
from training import blobs, training

P = MPI.COMM_WORLD.size
pytestmark = [pytest.mark.mpi, pytest.mark.skipif(P > 3, reason="3 ranks show what more would, and sooner")]


class Watched:
    """A lock that knows how much was still to be computed when the rank that steps took it."""

    def __init__(self, fake: Any) -> None:
        self._fake, self._lock = fake, threading.Lock()
        self.left: list[int] = []
        self.acquire, self.release = self._lock.acquire, self._lock.release

    def __enter__(self) -> None:
        self.left.append(len(self._fake.queue(0).works))
        self.acquire()

    def __exit__(self, *args: object) -> None:
        self.release()


@pytest.mark.parametrize("mode", ["lazy", "random"])
@pytest.mark.parametrize("staleness", ["1", "inf", None], ids=["async-1", "async-inf", "ad-psgd"])
def test_it_ends_and_learns(comm, monkeypatch, mode, staleness):
    """And nobody waits for a GPU but the one who steps, before others have to wait for it; and that only for what comes
    and goes, which is page-locked."""
    given = {"strategy": "async" if staleness else "ad-psgd", "staleness": staleness}
    pauses, callers, handlers, seen = np.random.default_rng([3, comm.rank]), set(), set(), set()
    with fakecupy.installed(mode=mode, seed=comm.rank) as fake:
        kernels.add(fake, monkeypatch)
        made = training(comm, blobs(60), device="gpu", **given, batch_size=6, epochs=2, momentum=0.0)
        run, queue = made.strategy._run.transport, fake.queue
        handle, run.lock = run.handle, Watched(fake)

        def put(pointer: int) -> Any:
            callers.add(threading.current_thread().name)
            return queue(pointer)

        def handled(index: int) -> None:
            handlers.add(threading.current_thread().name)
            handle(index)

        def pause() -> float:
            seen.add((made.epoch, fake.pageable_copies, fake.log.count("get")))
            return pauses.exponential(0.002)

        fake.queue, run.handle = put, handled
        result, calls = slowed(made, pause)
        assert comm.allreduce(calls) == 2 * 10 * P
        assert same_everywhere(comm, result.params.get())
        assert result.epochs[-1].train_loss < result.epochs[0].train_loss
        assert staleness != "1" or all(len(epoch.staleness or []) <= 2 for epoch in result.epochs)
        assert len(seen) == len({epoch for epoch, *_ in seen})
        assert callers == {"MainThread"}
        assert any("mpicoll messages" in those for those in comm.allgather(handlers)) == (P > 1)
        assert P == 1 or set(run.lock.left) == {0}


@pytest.mark.parametrize("mode", ["lazy", "random"])
def test_pairs_keep_the_sum_of_models(comm, monkeypatch, mode):
    with fakecupy.installed(mode=mode, seed=comm.rank) as fake:
        kernels.add(fake, monkeypatch)
        made = training(comm, blobs(60), device="gpu", strategy="ad-psgd", batch_size=2, epochs=1, momentum=0.0)
        made.model = Still(made.model)
        made.params[:] = np.asarray(np.random.default_rng(comm.rank).normal(size=made.params.shape), like=made.params)
        mean = comm.allreduce(made.params.get()) / P
        made.run()
        np.testing.assert_allclose(comm.allreduce(made.params.get()) / P, mean, rtol=0, atol=1e-13)
        assert np.max(np.abs(made.params.get() - mean)) < 0.05


def test_the_point_is_the_model_of_then(comm, monkeypatch):
    """Though others change that while the gradient is computed."""
    with fakecupy.installed() as fake:
        kernels.add(fake, monkeypatch)
        strategy = training(comm, blobs(9), device="gpu", strategy="ad-psgd").strategy
        for value in (1, 2):
            strategy.model[:] = value
            strategy.go_to_model()
            strategy.model[:] = 5
            assert set(strategy.point().get().tolist()) == {value}


def test_what_a_server_has_is_in_host_memory(comm, monkeypatch):
    """Of the optimizer, too; what has no server is on the GPU."""
    with fakecupy.installed() as fake:
        kernels.add(fake, monkeypatch)
        for strategy in ("async", "ad-psgd"):
            made = training(comm, blobs(9), device="gpu", strategy=strategy, optimizer="adam")
            assert all(is_cupy(array) for array in (made.params, made.sums, made.strategy.point()))
            assert {is_cupy(vector) for vector in made.optimizer.state.values()} == {strategy == "ad-psgd"}
