"""Synchronous data-parallel SGD."""

from typing import TYPE_CHECKING, Any, ClassVar

from .base import Now, Strategy

if TYPE_CHECKING:  # the command line lists the strategies without starting MPI
    from ...mpi.sharing import SharedMemory


class Sync(Strategy):
    """Synchronous SGD: every step uses the gradient of the global batch, the sum over all ranks.

    If all ranks share memory, there is one copy of the parameters and of the optimizer's state for all of them: each
    rank reduces its part of the gradient, and takes the step on that part (ZeRO: Rajbhandari et al. 2020).  The results
    have the same bits as without shared memory.  This is not done on GPUs.

    With ``compress`` each rank sends a code of its gradient, and keeps the residual.
    """

    options: ClassVar = {"compress": None}
    replicated = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        from ...mpi.sharing import shared

        super().__init__(*args, **kwargs)
        self._memory: SharedMemory | None = None
        in_parts = self.settings.clip is None and not self.compressor  # a norm and a code need the whole gradient
        in_parts = in_parts and self.optimizer.in_parts and self.algorithm in ("auto", "shared")
        in_parts = in_parts and self.settings.device == "cpu"
        memory = shared(self.comm) if in_parts and self.p > 1 else None
        if memory is not None:
            self._share(memory)

    def _share(self, memory: "SharedMemory") -> None:
        """Move parameters, gradients and optimizer state to memory that all ranks share, if there is enough."""
        from ...mpi.request import cuts_of

        vectors = {"": self.params, **self.optimizer.state}
        own = memory.empty(self.sums.size, self.sums.dtype)
        common = {name: memory.common(vector.size, vector.dtype) for name, vector in vectors.items()}
        moved = {name: vector for name, vector in common.items() if vector is not None}
        if own is None or len(moved) < len(vectors):
            return
        self.sums = own
        if self.comm.rank == 0:
            for name, vector in vectors.items():
                moved[name][:] = vector
        memory.barrier("moving parameters to shared memory")
        self.params = moved.pop("")
        self.optimizer.state = moved
        self._memory, self.algorithm = memory, "shared"
        self._cuts = cuts_of(None, len(self.params), self.p)
        self.optimizer.part = slice(*self._cuts[self.comm.rank :][:2])

    def step(self, now: Now, samples: int, length: int) -> None:
        """Do one step; with compression, divide by the batch length first, since the residual is part of a mean."""
        if self.compressor:
            self.sums[:-2] /= length
            length = 1
        super().step(now, samples, length)

    def agree_on_gradient(self, now: Now) -> int:
        """Sum the gradients, losses and correct predictions of all ranks."""
        if self.compressor:
            self.compressor.add_up(self.sums[:-2], self.sums[-2:], self)
            return 1
        if self._memory is None:
            self.allreduce([self.sums], "sum")
            return 1
        grad, loss = self.sums[:-2], self.sums[-2:].tolist()
        with self.agreeing():
            self.sums[-2:] = self._memory.reduce_scatter(grad, grad[self.optimizer.part], self._cuts, loss)
        return 1

    def agree_on_parameters(self, now: Now) -> None:
        """With shared parameters, wait until all ranks have stepped on their parts."""
        if self._memory is not None:
            with self.agreeing():
                self._memory.barrier("waiting for all parts of the parameters")
