"""Synchronous data-parallel SGD."""

from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from .base import Now, Strategy

if TYPE_CHECKING:  # the command line lists the strategies without starting MPI
    from ...mpi.state import State


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
        from ...mpi.state import state_of

        super().__init__(*args, **kwargs)
        self._state: State | None = None
        in_parts = self.settings.clip is None and not self.compressor  # a norm is one of all parts, a code likewise
        in_parts = in_parts and self.optimizer.in_parts and self.algorithm in ("auto", "shared")
        in_parts = in_parts and self.settings.device == "cpu"
        if in_parts and self.p > 1 and state_of(self.comm).shares:
            self._share(state_of(self.comm))

    def _share(self, state: "State") -> None:
        """Move everything to memory that all ranks share, if there is enough."""
        from ...mpi.collectives import cuts_of
        from ...mpi.operations import operation

        vectors = {"": self.params, **self.optimizer.state}
        own = state.on_node(state.node.empty, self.sums.nbytes)
        common = {name: state.on_node(state.node.common, vector.nbytes) for name, vector in vectors.items()}
        if own is None or any(memory is None for memory in common.values()):
            return
        self.sums = own.view(self.sums.dtype)
        moved = {name: common[name].view(vector.dtype) for name, vector in vectors.items()}  # type: ignore[union-attr]
        if self.comm.rank == 0:
            for name, vector in vectors.items():
                moved[name][:] = vector
        state.on_node(state.node.sync)
        self.params = moved.pop("")
        self.optimizer.state = moved
        self._state, self.algorithm = state, "shared"
        self._cuts = cuts_of(None, len(self.params), self.p)
        self.optimizer.part = slice(*self._cuts[self.comm.rank :][:2])
        self._sum = operation("sum", self.sums.dtype)

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
        if self._state is None:
            self.allreduce([self.sums], "sum")
            return 1
        from ...mpi.agreement import header_of
        from ...mpi.collectives import compared

        state, grad = self._state, self.sums[:-2]
        header = header_of("reduce_scatter", "sum", grad.dtype.name, len(grad), algorithm="shared")
        with self.agreeing():
            args = "reduce_scatter", grad, grad[self.optimizer.part], self._sum, 0, self._cuts
            compared(state, header, state.on_node, state.node.run, *args)
            mine = self.sums[-2:].astype(np.float64).view(np.uint64).tolist()
            everyones = np.array(state.on_node(state.node.exchange, *mine), np.uint64).view(np.float64)
            self.sums[-2:] = everyones.sum(axis=0)
        return 1

    def agree_on_parameters(self, now: Now) -> None:
        """See ``Strategy``: nobody goes on before all parts are as they must be."""
        if self._state is not None:
            from ...mpi import record

            with self.agreeing(), record.during("waiting for all parts of the parameters", self._state):
                self._state.on_node(self._state.node.sync)
