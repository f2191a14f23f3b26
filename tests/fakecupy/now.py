"""The fake that is installed, and what each thread has of it."""

from typing import Any

fake: Any = None


def local() -> Any:
    """The current device of this thread, the current stream of each device, and the streams of its ``with``."""
    local = fake.local
    if not hasattr(local, "device"):
        local.device, local.streams, local.stack = 0, {}, []
    return local
