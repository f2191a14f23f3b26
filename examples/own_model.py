"""A user-defined model, trained on all ranks by any strategy:

    mpirun -n 4 python -m mpi4py examples/own_model.py gossip

Poisson regression: the number of bicycles hired in an hour, given the weather x, has a Poisson distribution with mean
exp(w x + b).  A model provides the size and the initial values of one flat parameter vector, and the loss and its
gradient, summed over given samples.  It knows nothing of ranks, batches and communication.
"""

import sys

import numpy as np
from mpi4py import MPI

import mpicoll
from mpicoll.train.data import from_arrays
from mpicoll.train.loop import Training
from mpicoll.train.models import Batch, Sums
from mpicoll.train.settings import Settings


class Poisson:
    """Poisson regression with a log link; ``params`` are the weights, and the bias at the end."""

    def __init__(self, features: int) -> None:
        self.size = features + 1

    def initial(self, rng: np.random.Generator, dtype: np.dtype) -> np.ndarray:
        """Zeros: every mean is 1."""
        return np.zeros(self.size, dtype)

    def loss_and_grad(self, params: np.ndarray, batch: Batch, grad: np.ndarray) -> Sums:
        """The negative log-likelihood but for a constant, mean - count * log(mean); its derivative by log(mean) is
        mean - count.  "Correct" is a mean that rounds to the count."""
        log_mean = batch.x @ params[:-1] + params[-1]
        mean = np.exp(log_mean)
        error = mean - batch.y
        grad[:-1] = batch.x.T @ error
        grad[-1] = error.sum()
        return Sums(float(np.sum(mean - batch.y * log_mean)), int(np.sum(np.round(mean) == batch.y)))

    def predict(self, params: np.ndarray, x: np.ndarray) -> np.ndarray:
        """The most likely count."""
        return np.floor(np.exp(x @ params[:-1] + params[-1])).astype(np.int64)


def main() -> None:
    """Train on hours made up from known weights, and see whether they are found."""
    comm = mpicoll.Comm(MPI.COMM_WORLD)
    strategy = sys.argv[1] if len(sys.argv) > 1 else "sync"
    rng, truth = np.random.default_rng(0), np.array([0.8, -0.5, 0.3, 0.0, 0.7])
    x = rng.normal(size=(20_000, 4))
    y = rng.poisson(np.exp(x @ truth[:-1] + truth[-1]))
    data = from_arrays(x, y)  # every rank has them all; Dataset says how to give each a part
    settings = Settings(strategy=strategy, epochs=10, batch_size=200, lr=0.02, dtype="float64")
    result = Training(comm, data, Poisson(4), settings).run()
    if comm.rank == 0:
        print(f"{comm.size} rank(s), {strategy}: loss {result.epochs[-1].train_loss:.4f}")
        print("found", np.round(result.params, 2), "where the truth is", truth)


if __name__ == "__main__":
    main()
