"""Decentralised SGD: in every step a rank mixes its parameters with those of a few peers, without waiting for all.

Butterfly mixing: Zhao and Canny 2013.  D-PSGD: Lian et al. 2017.  On a directed graph whose mixing matrix is only
column-stochastic, parameters are mixed by push-sum, and gradients taken at the estimates (SGP: Assran et al. 2019).
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from ...errors import UserError
from ...graphs import Graph, graph
from ..compress import Differences
from .base import Now, Strategy

if TYPE_CHECKING:  # the command line lists the strategies without starting MPI
    from mpi4py import MPI


def _read(path: str, p: int) -> Any:
    """Read the mixing matrices in a file, and check that mixing by them brings all ranks together."""
    try:
        matrices = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"graph {path!r} cannot be read as an .npy file of matrices: {error}") from error
    if not isinstance(matrices, np.ndarray):
        raise UserError(f"graph {path!r} holds several arrays: expected an .npy file of one")
    made = _made(path, matrices, p)
    if not made.connected:
        raise UserError(f"graph {path!r} is not connected: some ranks never hear of others, not even through others")
    if p > 1 and made.contraction > 1 - 1e-12:
        raise UserError(f"graph {path!r} does not bring ranks closer to each other: let them keep a part of their own")
    return matrices


def _made(name: str, what: Any, p: int) -> Graph:
    try:
        return graph(what, p)
    except (TypeError, ValueError) as error:
        raise UserError(f"graph {name!r}: {error}") from error


def graph_of(comm: "MPI.Intracomm", what: str) -> Graph:
    """Return the graph of that name, or from the .npy file that rank 0 reads; a collective call.

    Raises ``UserError`` on all ranks if there is no such graph.
    """
    from ...mpi.together import on_root

    if Path(what).suffix != ".npy":
        return _made(what, what, comm.size)
    matrices = on_root(comm, lambda: _read(what, comm.size))
    return _made(what, matrices, comm.size)


class Gossip(Strategy):
    """Gossip: one round of gossip averaging per step, on a graph of ``mpicoll.graph`` or matrices of an ``.npy`` file.

    Ranks mix after the optimizer's step (adapt, then combine) or, with ``mix_first``, before it, with gradients taken
    before either (combine, then adapt).  ``momenta`` says what happens to the optimizer's state: ``keep`` each rank's
    own, or ``average`` it in the same round.  The round is that of the step, counted from the beginning of training.

    With ``compress``, on a symmetric graph, ranks send each neighbor a code of how their model differs from what the
    neighbor knows of it (see ``compress.Differences``).
    """

    options: ClassVar = {"graph": "exponential", "mix_first": False, "momenta": "keep", "compress": None}

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        from ...mpi.mixing import PushSum

        self.graph = graph_of(self.comm, self.option("graph"))
        self.mix_first, self.momenta = self.option("mix_first"), self.option("momenta")
        if self.momenta == "reset":
            raise UserError(f"momenta reset is for averaging: {self.settings.strategy} mixes in every step")
        self.digest = self.graph.digest.hex()[:8]
        self.meaning = "" if self.graph.doubly else "push-sum"  # the models of push-sum are quotients
        self.push = None if self.graph.doubly else PushSum(self.comm, self.graph)
        if self.push and self.momenta == "average":
            raise UserError(
                f"momenta average needs a doubly stochastic graph; only the columns of the {self.graph} add up to 1"
            )
        self._point = self.params.copy() if self.push else self.params
        self.differences = self._differences() if self.compressor else None
        self.algorithm = f"{'push-sum' if self.push else 'mixing'} on {self.graph.name}"

    def _differences(self) -> Differences:
        code = self.code()
        if not self.graph.symmetric:
            raise UserError(
                f"--compress needs a symmetric graph, and the {self.graph} is none: take gossip on ring, torus, star, "
                "complete, matching or base"
            )
        self.meaning = f"differences on {self.digest}"  # neighbors know each other's
        return Differences(code, self.params, self.graph.peers(self.comm.rank))

    def point(self) -> np.ndarray:
        """The evaluation point: the parameters or, with push-sum, the estimate of the mean."""
        if self.push:
            np.divide(self.params, self.push.weight, out=self._point)
        return self._point

    def agree_on_gradient(self, now: Now) -> int:
        """Keep each rank's own gradient; with ``mix_first`` mix the parameters now."""
        if self.mix_first:
            self._mix(now.step)
        return self.p

    def agree_on_parameters(self, now: Now) -> None:
        """Mix the parameters, unless ``mix_first``."""
        if not self.mix_first:
            self._mix(now.step)

    def _mix(self, step: int) -> None:
        from ...mpi.mixing import gossip_average

        arrays = [self.params, *(self.optimizer.state.values() if self.momenta == "average" else [])]
        if self.differences:
            self._mix_differences(self.differences, step)
            del arrays[0]
        if not arrays:
            return
        x = arrays if len(arrays) > 1 else arrays[0]
        with self.agreeing():
            if self.push:
                self.push.step = step
                self.push.mix(x)
            else:
                gossip_average(x, self.comm, self.graph, step=step)
        target, source, _ = self.graph.edges(step)
        others = int(np.count_nonzero((source == self.comm.rank) & (target != self.comm.rank)))
        self.count(others * sum(array.nbytes for array in arrays), others)

    def _mix_differences(self, differences: Differences, step: int) -> None:
        from ...mpi.mixing import exchange

        rank = self.comm.rank
        weights = {peer: weight for peer, weight in self.graph.neighbors(rank, step)[0] if peer != rank}
        messages = {peer: differences.encode(self.params, peer) for peer in weights}
        with self.agreeing():
            came = exchange(messages, self.comm, self.graph, step)
        differences.mix(self.params, came, weights)
        self.count(sum(message.nbytes for message in messages.values()), len(messages))

    def state(self) -> dict[str, np.ndarray]:
        """The weights of push-sum, the same on all ranks; or what neighbors know of each other's models."""
        if self.differences:
            return {"known": self.differences.known}
        return {"weights": self.push.weights} if self.push else {}

    def restore(self, state: dict[str, np.ndarray], own: bool) -> None:
        """Continue from a checkpoint; if all ranks start from the mean, weights are 1 and neighbors know the mean."""
        if self.push:
            self.push.weights = state["weights"] if own else np.ones(self.p)
        if self.differences and not own:
            self.differences.begin(self.params)
        elif self.differences:
            known = self.differences.known
            known[:] = np.asarray(state["known"], like=known)


class Butterfly(Gossip):
    """Butterfly mixing: one stage per step, after which a rank holds the mean of its own parameters and one peer's.

    If p is no power of two, the graph is the one-peer exponential graph (see ``mpicoll.butterfly_mix``).
    """

    options: ClassVar = {"momenta": "keep", "compress": None}

    def option(self, name: str) -> Any:
        """A setting, or its default; graph and ``mix_first`` are fixed."""
        fixed = {"graph": "butterfly", "mix_first": False}
        return fixed[name] if name in fixed else super().option(name)
