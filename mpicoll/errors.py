"""The exceptions whose text is written for users, and functions that make such text."""

from collections.abc import Sequence
from typing import Any


class UserError(Exception):
    """An error of the user, in one line: what is wrong, what was expected, what to do.

    Every rank of a job raises the same one; the command line prints it once, from rank 0, and exits
    with status 1.
    """


class MismatchError(RuntimeError):
    """Ranks did not make the same call.  All of them raise the same error, whose text is a table of the calls."""


def reason(error: BaseException) -> str:
    """Return the text of an error or, if it has none, the name of its type."""
    return str(error) or type(error).__name__


def listed(values: Sequence[Any]) -> str:
    """Return the first nine values as text, with ``...`` if there are more."""
    return ", ".join(map(str, values[:9])) + (", ..." if len(values) > 9 else "")
