"""The compiled part of the package: whether there is one here, and whether it is wanted.

``MPICOLL_NATIVE`` says ``auto`` (the default: where it was built), ``off``, or ``require``.
"""

import os
from types import ModuleType
from typing import Any, NamedTuple

from ..errors import UserError

LEVELS = ("auto", "off", "require")

LAYOUT = 1
"""The arrangement of shared memory, and what Python and the compiled part expect of each other: as in ``node.h``."""

INLINE, CELL = 112, 16 << 10
"""Bytes of a vector that travels with the comparison, and of one that is copied whole: as in ``node.h``."""

module: ModuleType | None = None
missing = ""
try:
    from .. import _node
except ImportError as error:
    missing = f"it was not built, for which a C compiler and Python's headers are needed: {error}"
else:
    if _node.LAYOUT == LAYOUT:
        module = _node
    else:
        missing = "it was built from other sources: install mpicoll again"

calls: dict[tuple[Any, bool], Any] = {}
"""What programs call, by collective, and whether it is a method, if the usual forms of it are compiled."""


def wanted() -> str:
    """What ``MPICOLL_NATIVE`` says; a ``UserError`` if it is none of ``LEVELS``."""
    level = os.environ.get("MPICOLL_NATIVE") or "auto"
    if level not in LEVELS:
        raise UserError(f"MPICOLL_NATIVE must be one of {', '.join(LEVELS)}, got {level!r}")
    return level


def layout() -> int:
    """Which arrangement of shared memory the compiled part has here; 0 if it is not to be used."""
    return 0 if module is None or wanted() == "off" else LAYOUT


class Offer(NamedTuple):
    """What a rank has: the layout, 0 for none; whether it asks for it, and what is wrong with how it does."""

    layout: int
    required: bool
    wrong: str


def offer() -> Offer:
    """What this rank has."""
    try:
        return Offer(layout(), wanted() == "require", "")
    except UserError as error:
        return Offer(0, False, str(error))


def together(offers: list[Offer]) -> tuple[ModuleType | None, str]:
    """Return the compiled part if all ranks of a node have the same, and why all ranks are to raise, if they are."""
    layouts = [one.layout for one in offers]
    if wrong := next((one.wrong for one in offers if one.wrong), ""):
        return None, wrong
    if len({*layouts}) == 1 and layouts[0]:
        return module, ""
    if any(one.required for one in offers):
        lacking = min(rank for rank, one in enumerate(layouts) if one != max(layouts) or not one)
        text = missing or "others do not have the same"
        return None, f"MPICOLL_NATIVE=require, but rank {lacking} of a node does without the compiled part: {text}"
    return None, ""


def why() -> str:
    """Why this rank does not use it."""
    return missing or "MPICOLL_NATIVE=off"


def state() -> str:
    """In words, for ``doctor`` and the heads of benchmarks."""
    return "yes" if layout() else f"no: {why()}"
