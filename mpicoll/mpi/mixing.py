"""Mixing: functions that do one round on a graph.  Unlike after a collective, every rank ends with its own values."""

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
    """Do one stage of butterfly mixing, in place: ``x`` becomes the mean of this rank's array and one peer's.

    If p is a power of two, the peer of rank r at step t is r XOR 2^(t mod log2 p).  Then log2 p calls with consecutive
    steps, from any step on, leave every rank with the mean of all arrays, up to rounding.  At any other p this is the
    exponential graph of ``gossip_average``, which approaches the mean but never reaches it.

    Parameters, return value and errors are those of ``gossip_average``.  Source: Zhao and Canny 2013.
    """
    return gossip_average(x, comm, "butterfly", step=step, stream=stream)


def gossip_average(x: Any, comm: MPI.Intracomm, graph: Any = "exponential", *, step: int, stream: Any = None) -> Any:
    """Do one gossip round in place: ``x`` becomes a weighted mean of this rank's array and its neighbors'.

    The mean over all ranks does not change, and every round brings the ranks closer to it; ``mpicoll show gossip`` says
    how fast.  Each rank sends ``x`` to its neighbors only.

    Parameters
    ----------
    x
        An array of floats or complex numbers, as for ``allreduce``, or a list of arrays: the same shapes and dtypes on
        all ranks.  The mean is computed in float64 or higher precision, or in the precision of ``x`` if that represents
        the weights exactly.
    comm
        An mpi4py intracommunicator.  If it is not a ``mpicoll.Comm``, the first call on it duplicates it.
    graph
        A doubly stochastic graph: an argument of ``mpicoll.graph`` or, which is faster for matrices, its result.  The
        first call with a graph on a communicator compares the graph between all ranks.
    step
        The number of the call, 0 or more, the same on all ranks: it selects the round of a graph that changes.  Do not
        start again at 0 in every epoch.
    stream
        The CuPy stream of arrays on a GPU, as for ``allreduce``.  Such arrays are sent through host memory.

    Returns
    -------
    ``x`` itself.

    Raises
    ------
    TypeError, ValueError
        For arguments that cannot be used, before anything is sent.
    MismatchError
        On all ranks, if they passed different graphs.
    """
    made = _agreed(graph, comm)
    if not made.doubly:
        raise ValueError(
            "gossip_average: graph must be doubly stochastic, got one of which only columns add up to 1: "
            "use mpicoll.PushSum"
        )
    return _mix(x, comm, made, step, stream)


class PushSum:
    """Push-sum: averaging on directed graphs, where only the columns of the mixing matrix need to add up to 1.

    Column j of the matrix holds the weights that rank j sends, to itself included.  ``mix(x)`` keeps the sum of ``x``
    over all ranks, but the ranks come to weigh differently in it.  So each rank has a ``weight`` as well, which is
    mixed in the same way, and ``estimate(x)``, which is ``x / weight``, converges to the mean of the initial arrays.
    In SGD, compute gradients at the estimate and apply them to ``x``.

    The graph must be strongly connected.  Otherwise a rank estimates the mean of those ranks only whose arrays reach
    it.  The weights depend on the graph alone, so every rank computes all of them and none is sent.

    Sources: Kempe, Dobra and Gehrke 2003; Assran et al. 2019 (with SGD).

    Parameters
    ----------
    comm
        An mpi4py intracommunicator of p ranks.  Making a ``PushSum`` is a collective call on it, which compares the
        graph between all ranks.
    graph
        A graph of p ranks: an argument of ``mpicoll.graph``, or its result.

    Attributes
    ----------
    step
        The number of rounds done, which selects the round of a graph that changes.
    weights
        The weights of all ranks, a float64 array of shape (p,) whose elements sum to p; at first all are 1.

    Raises
    ------
    TypeError, ValueError
        For arguments that cannot be used, before anything is sent.
    MismatchError
        On all ranks, if they passed different graphs.
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
        """The weight of this rank, by which ``estimate`` divides; the weights of all ranks sum to p."""
        return float(self.weights[self._rank])

    def mix(self, x: Any, *, stream: Any = None) -> Any:
        """Do one round, in place.

        Parameters
        ----------
        x
            An array of floats or complex numbers, or a list of arrays, as for ``gossip_average``.  Arrays that belong
            together must be passed in one call, since every call is a round.
        stream
            The CuPy stream of arrays on a GPU.

        Returns
        -------
        ``x`` itself.

        Raises
        ------
        TypeError, ValueError
            For arrays that cannot be mixed, before anything is sent; ``step`` and ``weights`` do not change.
        """
        target, source, weight = self.graph.edges(self.step)
        with np.errstate(all="ignore"):
            weights = np.bincount(target, weight * self.weights[source], self.graph.p)
        _mix(x, self.comm, self.graph, self.step, stream)
        self.weights, self.step = weights, self.step + 1
        return x

    def estimate(self, x: Any) -> Any:
        """Return this rank's estimate of the mean, ``x / weight``: a new array, or for a list of arrays a list of them.

        Parameters
        ----------
        x
            The arrays that ``mix`` has mixed.  NumPy arrays are divided in float64 or higher precision, and the result
            has the dtype of ``x``.
        """
        if isinstance(x, (list, tuple)):
            return [self.estimate(array) for array in x]
        if not isinstance(x, np.ndarray):
            return x / self.weight
        wide = np.result_type(x.dtype, np.float64)  # the weight may be small
        return np.divide(x, self.weight, dtype=wide).astype(x.dtype)


def exchange(messages: dict[int, np.ndarray], comm: MPI.Intracomm, graph: Graph, step: int) -> dict[int, np.ndarray]:
    """Send each neighbor an array of bytes of its own, and return the arrays received, of equal length, by rank.

    ``graph`` must be symmetric, and ``messages`` hold an array for each neighbor in the round of ``step``.  Arrays on a
    GPU are sent through host memory.
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
    """Return the graph, after comparing it between all ranks."""
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
