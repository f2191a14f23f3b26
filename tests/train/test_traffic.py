"""The counter of what a rank sends."""

from mpicoll.mpi.paths import Account
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


def test_calls_are_counted_by_their_accounts():
    traffic = Traffic()
    for one in (account(8, 1), account(100, 7), account(0, 0)):
        traffic.count_call(one)
    assert (traffic.bytes_sent, traffic.messages) == (108, 8)
    traffic.count_call(account(None, None))
    assert (traffic.bytes_sent, traffic.messages) == (None, None)
