"""The exceptions whose text is for the person at the keyboard, and pieces of such text."""

from collections.abc import Sequence
from typing import Any


class UserError(Exception):
    """One clear line: what is wrong, what was expected, what to do.

    Every rank of a job raises the same one; the command line prints it once, from rank 0, and exits
    with status 1.
    """


class MismatchError(RuntimeError):
    """Ranks do not make the same call; the text is a table of who made which.  All of them raise the same one."""


def reason(error: BaseException) -> str:
    """The text of an error, or, if it has none, the name of its type."""
    return str(error) or type(error).__name__


def listed(values: Sequence[Any]) -> str:
    """The first nine values as text, with ``...`` if there are more."""
    return ", ".join(map(str, values[:9])) + (", ..." if len(values) > 9 else "")
