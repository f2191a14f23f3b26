"""The counter of what a rank sends."""

from mpicoll.mpi.collectives import Account
from mpicoll.train.traffic import Traffic


def account(bytes_sent: int | None, messages: int | None) -> Account:
    return Account("ring", bytes_sent, messages)


def test_it_counts_until_something_is_sent_natively():
    traffic = Traffic()
    traffic.count(80, 2)
    traffic.count(20, 1)
    assert (traffic.bytes_sent, traffic.messages) == (100, 3)
    for known in (False, True):
        traffic.count(*(5, 1) if known else (None, None))
        assert (traffic.bytes_sent, traffic.messages) == (None, None)


def test_calls_that_are_alike_are_looked_up_once():
    traffic, found = Traffic(), [account(8, 1), account(100, 7)]
    for key in ("a", "a", "b", "a"):
        traffic.accounted(key, lambda: found.pop(0))
    assert not found
    assert (traffic.bytes_sent, traffic.messages) == (3 * 8 + 100, 3 * 1 + 7)
