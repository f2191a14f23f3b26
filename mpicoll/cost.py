"""What an algorithm would take on a given network: seconds, from what its row states."""

from typing import NamedTuple

from .algorithms import Algorithm


class Network(NamedTuple):
    """Three numbers stand for it: seconds that a round takes however little it moves, and bytes that a rank sends, and
    adds up, in a second."""

    latency: float
    sends: float
    adds: float


NODE = Network(8e-6, 5e9, 10e9)
"""Messages between two processes of a node, sent from Python: two thirds of the latency are its own."""

CLUSTER = Network(30e-6, 1.2e9, 10e9)
"""An ordinary network of 10 Gbit/s."""


def seconds(algorithm: Algorithm, p: int, nbytes: float, network: Network, **parameters: int) -> float:
    """At least that long, for a vector of ``nbytes``; ``parameters`` are the algorithm's.

    A rank takes the time of all its own messages; and the last round ends when a message of at least one chunk has
    gone before it in each.
    """
    given = {**algorithm.parameters, **parameters}
    rounds = algorithm.rounds(p, **given)
    moved = max(float(algorithm.sent(p, **given)), rounds / algorithm.chunks(p, **given))
    each = moved / network.sends + float(algorithm.added(p, **given)) / network.adds
    return rounds * network.latency + nbytes * each
