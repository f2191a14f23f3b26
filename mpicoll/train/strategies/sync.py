"""Synchronous data-parallel SGD."""

from typing import TYPE_CHECKING, Any, ClassVar

from .base import Now, Strategy

if TYPE_CHECKING:  # the command line lists the strategies without starting MPI
    from ...mpi.sharing import SharedMemory


class Sync(Strategy):
    """Every step uses the gradient of the whole batch: ranks add up their sums over samples.

    Where all ranks share memory there is one copy of the parameters, and of the optimizer's state, for all of them:
    each rank adds up its part of the gradient, and takes the step on that part (Rajbhandari et al. 2020, ZeRO).  The
    bits are those of every other way.  Not on GPUs.

    With ``compress`` each rank sends something shorter than its gradient, and keeps the rest.
    """

    options: ClassVar = {"compress": None}
    replicated = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        from ...mpi.sharing import shared

        super().__init__(*args, **kwargs)
        self._memory: SharedMemory | None = None
        in_parts = self.settings.clip is None and not self.compressor  # a norm is one of all parts, a code likewise
        in_parts = in_parts and self.optimizer.in_parts and self.algorithm in ("auto", "shared")
        in_parts = in_parts and self.settings.device == "cpu"
        memory = shared(self.comm) if in_parts and self.p > 1 else None
        if memory is not None:
            self._share(memory)

    def _share(self, memory: "SharedMemory") -> None:
        """Move everything to memory that all ranks share, if there is enough."""
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
        """See ``Strategy``: what is kept back from one batch is to count as much in the next, however short."""
        if self.compressor:
            self.sums[:-2] /= length
            length = 1
        super().step(now, samples, length)

    def agree_on_gradient(self, now: Now) -> int:
        """See ``Strategy``."""
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
        """See ``Strategy``: nobody goes on before all parts are as they must be."""
        if self._memory is not None:
            with self.agreeing():
                self._memory.barrier("waiting for all parts of the parameters")
