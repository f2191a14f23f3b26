"""The cost model: the seconds that an algorithm takes on a given network, from the numbers in its row."""

from typing import NamedTuple

from .algorithms import Algorithm


class Network(NamedTuple):
    """A network: seconds per round however short the messages, and bytes per second that a rank sends and reduces."""

    latency: float
    sends: float
    adds: float


NODE = Network(8e-6, 5e9, 10e9)
"""Messages between two processes of a node, sent from Python, which causes two thirds of the latency."""

CLUSTER = Network(30e-6, 1.2e9, 10e9)
"""An ordinary network of 10 Gbit/s."""


def seconds(algorithm: Algorithm, p: int, nbytes: float, network: Network, **parameters: int) -> float:
    """A lower bound of the seconds that an algorithm takes for a vector of ``nbytes`` on ``p`` ranks.

    It is the time of all messages of one rank, and at least the time of one chunk per round.  ``parameters`` are those
    of the algorithm.
    """
    given = {**algorithm.parameters, **parameters}
    rounds = algorithm.rounds(p, **given)
    moved = max(float(algorithm.sent(p, **given)), rounds / algorithm.chunks(p, **given))
    each = moved / network.sends + float(algorithm.added(p, **given)) / network.adds
    return rounds * network.latency + nbytes * each
