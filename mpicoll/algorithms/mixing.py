"""Mixing: every round replaces a rank's vector by a weighted mean of its own and its neighbors'.

A round costs what it sends: the whole vector to each neighbor.  Nothing is reduced to one result; what ranks hold comes
closer to the mean of all, as fast as the graph's spectral gap says, and some graphs reach it after a period.
Sources: see ``mpicoll.graph``.
"""

from collections.abc import Iterator

from ..graphs import Graph, graph
from ..schedule import MIX, Recv, Round, Schedule, Send, Verb


def schedule(graph: Graph, start: int = 0, rounds: int | None = None) -> Schedule:
    """That many rounds of ``graph`` from ``start`` on; by default a whole period, or one if there is none."""
    stop = start + ((graph.period or 1) if rounds is None else rounds)
    return Schedule(MIX, graph.name, graph.p, 1, lambda rank: _rounds(graph, rank, range(start, stop)))


def period(name: str, p: int, rank: int) -> Iterator[Round]:
    """A period of the graph of that name."""
    made = graph(name, p)
    return _rounds(made, rank, range(made.period or 1))


def _rounds(graph: Graph, rank: int, rounds: range) -> Iterator[Round]:
    for t in rounds:
        sources, targets = graph.neighbors(rank, t)
        if sources == [(rank, 1.0)] and targets == [rank]:
            yield Round()
            continue
        yield Round(
            tuple(Send(target, 0, 1) for target in targets),
            tuple(Recv(source, 0, 1, Verb.MIX, weight=weight) for source, weight in sources),
        )
