"""The counter of what a rank sends."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the command line lists the strategies without starting MPI
    from ..mpi.paths import Account

COUNTED = "circulant"
"""The allgather to use in host memory unless another is named: as few rounds and bytes as any, and, unlike the native
one, its traffic is known."""


class Traffic:
    """The bytes and messages that a rank has sent; ``None`` after a native call, whose traffic is not known."""

    def __init__(self) -> None:
        self.bytes_sent: int | None = 0
        self.messages: int | None = 0

    def count(self, bytes_sent: int | None, messages: int | None) -> None:
        """Add bytes and messages; ``None`` if they cannot be known."""
        if bytes_sent is None or messages is None or self.bytes_sent is None or self.messages is None:
            self.bytes_sent = self.messages = None
        else:
            self.bytes_sent, self.messages = self.bytes_sent + bytes_sent, self.messages + messages

    def count_call(self, account: "Account") -> None:
        """Add the bytes and messages of a collective call."""
        self.count(account.bytes_sent, account.messages)
