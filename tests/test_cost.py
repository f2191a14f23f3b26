"""What algorithms cost by the model."""

import pytest

from mpicoll.algorithms import find
from mpicoll.cost import CLUSTER, Network, seconds

ONE_SECOND = Network(1, 1, 1)  # a round, a byte sent, a byte added


@pytest.mark.parametrize(
    ("collective", "name", "p", "rounds", "sent", "added"),
    [
        ("allreduce", "ring", 4, 6, 1.5, 0.75),
        ("allreduce", "recursive_doubling", 8, 3, 3, 3),
        ("allreduce", "recursive_doubling", 5, 4, 4, 3),
        ("allreduce", "halving_doubling", 8, 6, 1.75, 0.875),
        ("allreduce", "tree", 8, 6, 6, 3),  # whole vectors, up and down, though no rank sends more than three
        ("reduce", "chain", 8, 10, 2.5, 1),  # four segments: the last comes in the tenth round
        ("bcast", "scatter_allgather", 4, 4, 1.5, 0),
        ("allgather", "ring", 1, 0, 0, 0),
    ],
)
def test_rounds_bytes_and_additions_make_seconds(collective, name, p, rounds, sent, added):
    row = find(collective, name)
    assert seconds(row, p, 1000, ONE_SECOND) == pytest.approx(rounds + 1000 * (sent + added))
    assert seconds(row, p, 1000, Network(2, 10, 50)) == pytest.approx(2 * rounds + 100 * sent + 20 * added)
    assert seconds(row, p, 0, ONE_SECOND) == rounds


def test_more_segments_fill_a_chain():
    chain = find("bcast", "chain")
    long = [seconds(chain, 8, 1e6, CLUSTER, segments=segments) for segments in (1, 2, 4, 8)]
    assert long == sorted(long, reverse=True)
    assert seconds(chain, 8, 1, CLUSTER, segments=8) > seconds(chain, 8, 1, CLUSTER, segments=1)
