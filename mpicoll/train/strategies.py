"""How ranks agree, and nothing else."""

from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:  # the command line lists the strategies without starting MPI
    from mpi4py import MPI


class Sync:
    """Synchronous data-parallel SGD: every step uses the gradient of the whole global batch.

    Ranks add up sums over samples, so that each sample counts the same however unevenly the batch is shared out.
    Unless another ``algorithm`` is named, they add in the canonical order, whatever algorithm that takes: its name is
    ``algorithm`` then.
    ``seconds`` holds, for each step, the time in agreement, waiting for other ranks included; ``bytes_sent`` counts up
    (``None`` where the MPI library does the sending and it cannot be known).
    """

    def __init__(self, comm: "MPI.Intracomm", algorithm: str, sums: np.ndarray) -> None:
        from ..mpi.collectives import account, allreduce

        canonical = algorithm == "auto"
        self._allreduce = lambda: allreduce(sums, comm, algorithm=algorithm, deterministic=canonical)
        self.algorithm, self._bytes = account(sums, comm, algorithm, deterministic=canonical)  # a step
        self.seconds: list[float] = []
        self.bytes_sent = None if self._bytes is None else 0

    def add_up(self) -> None:
        """Replace ``sums`` by their total over all ranks: the same bits on every rank."""
        start = perf_counter()
        self._allreduce()
        self.seconds.append(perf_counter() - start)
        if self._bytes is not None and self.bytes_sent is not None:
            self.bytes_sent += self._bytes


STRATEGIES = {"sync": Sync}
