"""What a rank tells others: how much that is, and when it begins where a GPU has to come to an end first."""

from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:  # the command line lists the strategies without starting MPI
    from ..mpi.paths import Account


class Sent:
    """Bytes and messages that a rank has sent, which count up; ``None`` where the MPI library does the sending, and it
    cannot be known."""

    def __init__(self) -> None:
        self.bytes_sent: int | None = 0
        self.messages: int | None = 0
        self._accounts: dict[Hashable, Account] = {}

    def count(self, bytes_sent: int | None, messages: int | None) -> None:
        """So much more was sent."""
        if bytes_sent is None or messages is None or self.bytes_sent is None or self.messages is None:
            self.bytes_sent = self.messages = None
        else:
            self.bytes_sent, self.messages = self.bytes_sent + bytes_sent, self.messages + messages

    def accounted(self, key: Hashable, find: "Callable[[], Account]") -> "Account":
        """A collective call was made, which others with this ``key`` are like: what it sends is found out once."""
        if key not in self._accounts:
            self._accounts[key] = find()
        found = self._accounts[key]
        self.count(found.bytes_sent, found.messages)
        return found


def gathering(x: Any) -> str:
    """The allgather to take: in host memory a schedule that is short and sends no more than it must, of whose messages
    something is known; on GPUs the way that is best."""
    return "circulant" if isinstance(x, np.ndarray) else "auto"


def finished(x: Any) -> None:
    """Wait until all that this rank has put on its GPU is done, if the array is there."""
    if not isinstance(x, np.ndarray):
        x.device.synchronize()
