"""Where measurements hold: the MPI library, the machine, and the layout of ranks on nodes."""

import os
import platform
import re
from functools import cache
from itertools import groupby
from typing import NamedTuple


class Fingerprint(NamedTuple):
    """Where measurements hold: the MPI library and its version, the machine, and the ranks on each node in turn."""

    mpi: str
    machine: str
    layout: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.mpi}, {self.machine}, {nodes(self.layout)}"


@cache
def machine() -> str:
    """The name of this node's processor, as the kernel tells it, and its number of cores."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            text = file.read(4096)
    except OSError:
        text = ""
    found = re.search(r"^(?:model name|cpu|CPU part)\s*:\s*(\S.*?)\s*$", text, re.MULTILINE)
    name = found[1] if found else platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores"


def nodes(layout: tuple[int, ...]) -> str:
    """A layout as text for users: 4 node(s) x 2 rank(s)."""
    parts = [(len([*same]), ranks) for ranks, same in groupby(layout)]
    if len(parts) > 3:
        return f"{len(layout)} node(s), {sum(layout)} ranks in no order"
    return " + ".join(f"{count} node(s) x {ranks} rank(s)" for count, ranks in parts)
