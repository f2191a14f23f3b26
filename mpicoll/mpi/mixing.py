"""Mixing as functions: a round of a graph a call.  Unlike the collectives it leaves every rank with its own values."""

from functools import partial
from operator import index
from typing import Any

import numpy as np
from mpi4py import MPI

from ..algorithms import mixing
from ..graphs import Graph, graph
from ..schedule import MIX
from . import record
from .attach import check_comm, whole
from .buffers import Part, is_half, on_device, parts, staged
from .operations import MOVE
from .state import MIXING_TAGS, state_of


def butterfly_mix(x: Any, comm: MPI.Intracomm, *, step: int, stream: Any = None) -> Any:
    """One stage of butterfly mixing, in place: ``x`` becomes the mean of a rank's own array and one peer's.

    If p is a power of two, the peer of rank r at step t is r XOR 2^(t mod log2 p), and log2 p calls with consecutive
    steps, from any step on, leave every rank with the mean of all, exactly but for rounding.  At any other p it is the
    exponential graph of ``gossip_average``, which comes close to the mean and reaches it never.

    Arguments, return value and errors are those of ``gossip_average``.  Source: Zhao and Canny 2013.
    """
    return gossip_average(x, comm, "butterfly", step=step, stream=stream)


def gossip_average(x: Any, comm: MPI.Intracomm, graph: Any = "exponential", *, step: int, stream: Any = None) -> Any:
    """One round of gossip averaging, in place: ``x`` becomes a weighted mean of a rank's own array and its neighbors'.

    The mean over all ranks stays, and every round brings them closer to it; ``mpicoll show gossip`` says how fast.
    Each rank sends ``x`` to its neighbors, and to nobody else.

    Parameters
    ----------
    x
        An array of floats or complex numbers, as for ``allreduce``, or a list of arrays: the same shapes and dtypes on
        all ranks.  It is computed in float64 at least, or in the precision of ``x`` where weights are exact in it.
    comm
        An mpi4py intracommunicator.  If it is no ``mpicoll.Comm``, the first call on it duplicates it.
    graph
        What ``mpicoll.graph`` takes or has made (which is faster, for a matrix), doubly stochastic.  The first call
        with it on a communicator compares it between all ranks.
    step
        The number of the call, the same on all ranks: graphs that change use another round each time.  Count on from
        epoch to epoch; do not start again at 0.
    stream
        As for ``allreduce``: of arrays in the memory of a GPU, which go by way of host memory.

    Returns
    -------
    ``x`` itself.

    Raises
    ------
    TypeError, ValueError
        For what cannot be used, before anything is sent; if graphs differ, on all ranks.
    """
    made = _agreed(graph, comm)
    if not made.doubly:
        raise ValueError(
            "averaging needs a doubly stochastic graph, got one of which only columns add up to 1: use mpicoll.PushSum"
        )
    return _mix(x, comm, made, step, stream)


class PushSum:
    """Averaging on directed graphs, of which only the columns add up to 1: what a rank sends, to itself included.

    ``mix(x)`` keeps the sum of ``x`` over all ranks, but not what single ranks weigh in it, so that each has a
    ``weight`` too, which is mixed likewise: ``estimate(x)``, ``x / weight``, goes to the mean of what all began with.
    In SGD, take gradients at the estimate and step on ``x``.  Every rank must hear of every other in the end; otherwise
    it estimates the mean of those it hears of, or nothing.  The weights follow from the graph, so every rank computes
    them, and none is sent.  Sources: Kempe et al. 2003; Assran et al. 2019 (with SGD).

    Making one is a collective call, which compares the graph between all ranks; ``comm`` and ``graph`` are those of
    ``gossip_average``.
    """

    def __init__(self, comm: MPI.Intracomm, graph: Any) -> None:
        self.comm, self.graph = comm, _agreed(graph, comm)
        self.step = 0
        self.weights: np.ndarray = np.ones(self.graph.p)
        self._rank = comm.rank

    def __repr__(self) -> str:
        return f"<PushSum on a {self.graph}, step {self.step}>"

    @property
    def weight(self) -> float:
        """This rank's; over all ranks they add up to p."""
        return float(self.weights[self._rank])

    def mix(self, x: Any, *, stream: Any = None) -> Any:
        """One round, in place; returns ``x``, an array or a list of arrays as for ``gossip_average``."""
        target, source, weight = self.graph.edges(self.step)
        with np.errstate(all="ignore"):
            weights = np.bincount(target, weight * self.weights[source], self.graph.p)
        _mix(x, self.comm, self.graph, self.step, stream)
        self.weights, self.step = weights, self.step + 1
        return x

    def estimate(self, x: Any) -> Any:
        """The mean as far as it is known here: a new array, or a list of them."""
        if isinstance(x, (list, tuple)):
            return [self.estimate(array) for array in x]
        if not isinstance(x, np.ndarray):
            return x / self.weight
        wide = np.result_type(x.dtype, np.float64)  # the weight may be small
        return np.divide(x, self.weight, dtype=wide).astype(x.dtype)


def exchange(messages: dict[int, np.ndarray], comm: MPI.Intracomm, graph: Graph, step: int) -> dict[int, np.ndarray]:
    """Instead of one array for all neighbors, some bytes for each; returns as many from each, by rank.

    ``graph`` is symmetric, and ``messages`` are for all neighbors in the round of ``step``.  What is in the memory of a
    GPU goes by way of host memory.
    """
    _agreed(graph, comm)
    with whole(comm):
        state = state_of(comm)
        record.begin(record.Entry(f"exchange on a {graph}, step {step}", state.name))
        given = {rank: parts(message)[0] for rank, message in messages.items()}
        came = {rank: np.empty_like(message) for rank, message in messages.items()}
        taken = {rank: staged(x, load=False) if on_device(x) else Part(x) for rank, x in came.items()}
        tag = _tag(graph, graph.round(step))
        try:
            requests = [state.comm.Irecv(flat, rank, tag) for rank, (flat, _) in taken.items()]
            requests += [state.comm.Isend(flat, rank, tag) for rank, (flat, _) in given.items()]
            MPI.Request.Waitall(requests)
            for _, deliver in taken.values():
                if deliver:
                    deliver()
        except BaseException:
            state.interrupt()
            raise
    return came


def _tag(graph: Graph, t: int) -> int:
    return MIXING_TAGS[(int.from_bytes(graph.digest[:4], "little") + t) % len(MIXING_TAGS)]


def _agreed(what: Any, comm: MPI.Intracomm) -> Graph:
    """The graph, the same on all ranks."""
    check_comm(comm)
    made = what if isinstance(what, Graph) else graph(what, comm.size)
    if made.p != comm.size:
        raise ValueError(f"expected a graph of {comm.size} ranks, got a {made}")
    with whole(comm):
        state_of(comm).agree_on(made)
    return made


def _mix(x: Any, comm: MPI.Intracomm, graph: Graph, step: int, stream: Any) -> Any:
    check_comm(comm)
    try:
        t = index(step)
    except TypeError:
        raise TypeError(f"step must be a whole number, got {type(step).__name__}") from None
    if t < 0:
        raise ValueError(f"step must be 0 or more, got {step}")
    t = graph.round(t)
    with whole(comm):
        pieces = parts(x, stream=stream)
        for flat, _ in pieces:
            if not (flat.dtype.kind in "fc" and flat.dtype.num < 24) and not is_half(flat.dtype):
                raise TypeError(
                    f"mixing takes floats or complex numbers, got dtype {flat.dtype}: convert with x.astype(float)"
                )
        state = state_of(comm)
        record.begin(record.Entry(f"mix on a {graph}, step {step}", state.name))
        tag = _tag(graph, t)
        for flat, deliver in pieces:
            schedule = partial(mixing.schedule, graph, t, 1)
            state.run(state.plan((MIX, graph.digest, t), schedule, len(flat), flat.dtype, MOVE), flat, MOVE, tag)
            if deliver:
                deliver()
    return x
