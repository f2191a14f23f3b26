"""Do all ranks make the same call?  A small exchange before each one, so that a mistake raises on every rank.

Otherwise a rank that calls something else, or with another length, gets wrong numbers, an error of the MPI library, or
waits indefinitely, depending on what the others happen to do.
"""

import os
import sys
from collections.abc import Hashable
from functools import lru_cache
from threading import Lock
from typing import Any, NamedTuple

from mpi4py import MPI

from ..errors import MismatchError
from .record import named, site
from .shared import Node

LEVELS = ("off", "header", "full")
"""Nothing; what is done, to how many of what; and from where, and in which order of memory."""

KEPT = 128
"""Headers remembered: those of a program that makes the same calls again and again."""

_MIX = 0x9E3779B97F4A7C15  # odd: numbers that follow each other differ in many bits
_STATED = (0xFFF, 0xFFF000)  # bits of what only some ranks may state: a dtype, a shape
_CORE = (1 << 64) - (1 << 24)
_HASH, _SAID = 8, 256  # bytes of a hash, and of one with a text

_begun: list["Comparison"] = []  # MPI writes to their memory, though the call may be refused on this rank
_clearing = Lock()
_digests: dict[Hashable, int] = {}
_default: str | None = None


class Header(NamedTuple):
    """A call, as far as it must be the same on all ranks; numbers are Python's own, whose text is always the same.

    ``stated``, the dtype and the shape of an array that is only moved, must each be the same on those ranks alone that
    state it: functions know them, where mpi4py's methods know bytes.
    """

    collective: str
    algorithm: str
    operation: str
    dtype: str
    elements: int | None
    parameters: tuple[tuple[str, int], ...] = ()
    counts: tuple[int, ...] | None = None
    detail: str = ""
    stated: tuple[str, str] = ("", "")

    def __str__(self) -> str:
        what = "" if self.elements is None else f" of {self.elements} {self.dtype}".rstrip()
        named = [f"{name} {value}" for name, value in self.parameters]
        if self.counts is not None:
            named.append(f"parts of {[*self.counts]}")
        named += filter(None, [self.detail, " ".join(filter(None, self.stated))])
        if self.elements is None and self.dtype:
            named.append(self.dtype)
        return ", ".join([f"{self.collective}{what}", *filter(None, [self.operation]), self.algorithm, *named])


Headers = tuple[Header, ...] | str
"""One for each dtype; or why the call cannot be made."""


def level_of(comm: MPI.Comm, check: str | None) -> str:
    """How much to compare: as the call says, else as the ``Comm`` does, else ``MPICOLL_CHECK``, else the header."""
    if check is None:
        check = getattr(comm, "check", None) or default_level()
    return check


def default_level() -> str:
    """What ``MPICOLL_CHECK`` says, else the header."""
    global _default
    if _default is None:
        _default = sys.intern(os.environ.get("MPICOLL_CHECK") or "header")  # the compiled part asks which object it is
    return _default


def check_level(level: str) -> None:
    """Raise ``ValueError`` if there is no such level."""
    if level not in LEVELS:
        raise ValueError(f"check must be one of {', '.join(LEVELS)}, got {level!r}")


@lru_cache(maxsize=KEPT)
def header_of(
    collective: str,
    operation: str,
    dtype: str,
    elements: int | None,
    root: int | None = None,
    algorithm: str = "native",
) -> Header:
    """Return the header of a call, native unless ``algorithm`` says otherwise; calls that are alike share one."""
    return Header(
        collective,
        algorithm,
        operation,
        dtype if elements != 0 else "",
        elements,
        () if root is None else (("root", root),),
    )


class _Counter:
    calls = 0


class Agreement:
    """Compares the calls that the ranks of a communicator make, through a private duplicate of it."""

    def __init__(self, comm: MPI.Comm, node: Node | None = None) -> None:
        self._comm, self._p = comm, comm.size
        self._node = node  # if they share memory, all of them
        self._all = bytearray(8 * self._p)
        self._numbers = memoryview(self._all).cast("Q")
        self.counter: Any = _Counter() if node is None else node.counter or _Counter()

    def check(
        self, headers: Headers, detail: tuple[str, ...] | None = None, places: tuple[int, ...] = (), digest: int = 0
    ) -> list[list[int]] | None:
        """Compare a call, with ``detail`` if given: a ``MismatchError`` on all ranks if it is not the same on all.

        64 bits of hash are exchanged, and what they stand for only if they differ.  ``places`` are numbers that travel
        with them where all ranks share memory: those of all ranks are returned.  ``digest`` is that of ``headers``, if
        it is known.
        """
        number = self.number(headers, detail, digest)
        found = None
        if self._node is None:
            numbers = self._gathered(number)
        elif places:
            exchanged = self._node.exchange(number, *places)
            numbers, found = [words[0] for words in exchanged], [words[1:] for words in exchanged]
        else:
            numbers = self._node.gather(number)
        if numbers.count(number) != self._p:
            self.differ(numbers, headers, detail)
        return found

    def number(self, headers: Headers, detail: tuple[str, ...] | None = None, digest: int = 0) -> int:
        """What stands for the next call on this communicator."""
        self.counter.calls = calls = self.counter.calls + 1
        return (digest or digest_of(headers, detail)) ^ (calls * _MIX & _CORE)

    def differ(self, numbers: list[int], headers: Headers, detail: tuple[str, ...] | None) -> None:
        """Raise a ``MismatchError`` unless numbers that differ stand for calls that agree.  A collective call."""
        if not _same(numbers):
            raise MismatchError(_table(self._comm.allgather((digest_of(headers, detail), self._said(headers, detail)))))

    def _gathered(self, number: int) -> list[int]:
        self._comm.Allgather(number.to_bytes(8, sys.byteorder), self._all)
        return self._numbers.tolist()

    def _said(self, headers: Headers, detail: tuple[str, ...] | None) -> str:
        what = headers if isinstance(headers, str) else "; ".join(map(str, headers)) or "nothing to do"
        more = [] if detail is None else [*filter(None, detail), f"at {site(sys._getframe())}"]
        return ", ".join([f"call {self.counter.calls}: {what}", *more])

    def begin(self, headers: Headers, detail: tuple[str, ...] | None = None) -> "Comparison":
        """Compare a nonblocking call: at the end of the request, and so with the text at once, cut to fit."""
        self.counter.calls += 1
        said, room = self._said(headers, detail).encode(), _SAID - _HASH
        if len(said) > room:
            said = said[: room - 3].decode(errors="ignore").encode() + b"..."
        mine = _digest((self.counter.calls, headers, detail)).to_bytes(_HASH, "little") + said.ljust(room, b"\0")
        everyone = bytearray(_SAID * self._p)
        with _clearing:
            for other in list(_begun):  # those that nobody waits for, because this rank refused the call
                if other.refused and other.request.Test():
                    _begun.remove(other)
        refused = isinstance(headers, str)
        comparison = Comparison(self._comm.Iallgather(mine, everyone), mine, everyone, refused)
        _begun.append(comparison)
        return comparison


class Comparison(NamedTuple):
    """A comparison of a nonblocking call that is pending."""

    request: MPI.Request
    mine: bytes
    everyone: bytearray
    refused: bool

    def after(self) -> None:
        """Once the request is complete: raise if calls differ."""
        _begun.remove(self)
        each = [bytes(self.everyone[start : start + _SAID]) for start in range(0, len(self.everyone), _SAID)]
        if any(one[:_HASH] != self.mine[:_HASH] for one in each):  # not the text: places are not compared
            raise MismatchError(_table([(one[:_HASH], one[_HASH:].rstrip(b"\0").decode()) for one in each]))


def _table(said: list[tuple[int | bytes, str]]) -> str:
    """Who made which call, of hashes and texts: a line for each of them.  Texts may be cut, and so be the same where
    hashes differ; calls that agree may be made from different places."""
    ranks: dict[tuple[int | bytes, str], list[int]] = {}
    for rank, call in enumerate(said):
        ranks.setdefault(call, []).append(rank)
    heads = [named(who) for who in ranks.values()]
    width = max(map(len, heads))
    lines = [f"  {head:{width}}  {text}" for head, (_, text) in zip(heads, ranks, strict=True)]
    return "\n".join(["ranks do not make the same call on this communicator:", *lines])


def _same(numbers: list[int]) -> bool:
    """Whether calls agree, of which some may state more than others."""
    core, *stated = ({n & bits for n in numbers} for bits in (_CORE, *_STATED))
    return len(core) == 1 and all(len(one - {0}) < 2 for one in stated)


def digest_of(headers: Headers, detail: tuple[str, ...] | None = None) -> int:
    """What stands for a call in a comparison: a hash of what all ranks must have in common, and below it one of each
    thing that those that state it must, or 0."""
    whole = headers if detail is None else (headers, detail)
    digest = _digests.get(whole)
    if digest is None:
        if len(_digests) >= KEPT:
            _digests.clear()
        stated: list[tuple[str, ...]] = []
        if not isinstance(headers, str):
            stated += zip(*(header.stated for header in headers), strict=True)
            headers = tuple(header._replace(stated=("", "")) for header in headers)
        digest = _digest((headers, detail)) & _CORE
        for bits, what in zip(_STATED, stated, strict=False):
            if any(what):
                digest |= _digest(what) & bits or bits
        _digests[whole] = digest
    return digest


def _digest(what: Hashable) -> int:
    """Return a 64-bit hash that is equal in all processes, as Python's own is not."""
    from hashlib import sha256  # takes 2 ms to import

    return int.from_bytes(sha256(repr(what).encode()).digest()[:8], "little")
