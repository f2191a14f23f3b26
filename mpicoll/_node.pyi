"""The compiled part, of mpicoll/native: what mpi/native.py, mpi/shared.py and mpi/compiled.py use of it."""

from collections.abc import Callable
from typing import Any

import numpy as np

LAYOUT: int
INLINE: int
CELL: int

def sizes(p: int, /) -> tuple[int, int, int]: ...
def does(operation: int, kind: str, /) -> bool: ...
def prepare(
    in_place: Any,
    plain: type,
    under_way: list[Any],
    interrupted: set[Any],
    windows: dict[int, Any],
    attach: dict[str, Any],
    agreement: dict[str, Any],
    no_keyval: int,
    /,
) -> None: ...

class Node:
    """The ranks of a node that share memory, and how they take turns."""

    calls: int
    @property
    def turn(self) -> int: ...
    @property
    def not_compared(self) -> int: ...
    def __new__(
        cls,
        page: Any,
        rank: int,
        size: int,
        spin: int,
        order: tuple[tuple[int, int, int], ...],
        pause: Callable[[], None],
        /,
    ) -> Node: ...
    def sync(self) -> None: ...
    def gather(self, number: int, /) -> list[int]: ...
    def exchange(self, *numbers: int) -> list[list[int]]: ...
    def open_cells(self, memory: Any, /) -> None: ...
    def open_boxes(self, memory: Any, /) -> None: ...
    def allreduce(
        self,
        number: int,
        compares: bool,
        operation: int,
        kind: str,
        mean: bool,
        where: tuple[int, ...] | None,
        send: np.ndarray,
        recv: np.ndarray,
        /,
    ) -> list[Any] | None: ...
    def acquire(self, blocking: bool, /) -> bool: ...
    def release(self) -> None: ...
    def bind(self, state: Any, anywhere: bool, /) -> None: ...
    def learn(
        self,
        call: Call,
        op: Any,
        dtype: np.dtype,
        count: int,
        in_place: bool,
        deterministic: bool,
        digest: int,
        code: tuple[int, str, bool],
        headers: Any,
        paths: Any,
        /,
    ) -> None: ...
    def forget(self) -> None: ...
    def close(self) -> None: ...
    def recent(self, first: int, /) -> tuple[list[tuple[Any, int, float, float]], int]: ...

class Call:
    """A collective call: the usual forms of it in machine code, all others by a function."""

    def __new__(cls, function: Callable[..., Any], op: Any, method: bool, /) -> Call: ...
    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...
