"""The files that mpicoll writes: whole or not at all, with JSON that every parser reads and errors in one line."""

import errno
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import UserError, reason


def to_json(value: Any, **layout: Any) -> str:
    """The JSON text of a value, in which a number that is not finite is null, since JSON has no word for it.

    ``value`` is made of dicts, lists, tuples, texts, numbers, truth values and ``None``; ``layout`` is what
    ``json.dumps`` takes, as ``indent=1``.
    """
    return json.dumps(_finite(value), allow_nan=False, **layout)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def replace(path: Path, text: str) -> None:
    """Make ``text`` the content of the file ``path``, whole or not at all: see ``replacing``."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8", errors="surrogateescape")  # paths in it may be no text


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside ``path``: the file that is written there becomes the file ``path`` when the block ends.

    At any moment ``path`` is the file that was there before, or the new one, whole; if the block fails, nothing is left
    beside it.  A symbolic link stays, and what it leads to is replaced.  Raises ``OSError`` if the block does, or if
    ``path`` is something else than a file, such as a folder or a device.
    """
    real = Path(os.path.realpath(path))
    if real.exists() and not real.is_file():
        raise OSError(errno.EINVAL, "it is no ordinary file", str(path))
    partial = real.with_name(f".{real.name}.{os.getpid()}.partial")
    try:
        yield partial
        partial.replace(real)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def writing(what: str, advice: str = "") -> Iterator[None]:
    """Turn an ``OSError`` within the block into a ``UserError``: that ``what`` cannot be written, why, and ``advice``.

    ``what`` names the file as it is shown to the user, ``advice`` is appended as it is.
    """
    try:
        yield
    except OSError as error:
        raise cannot_write(what, error, advice) from error


def cannot_write(what: str, error: Exception, advice: str = "") -> UserError:
    """The ``UserError`` that says that ``what`` cannot be written, why, and what to do."""
    return UserError(f"{what} cannot be written ({error_message(error)}){advice}")


def error_message(error: Exception) -> str:
    """Why a file cannot be used, in one line: the system's words for an ``OSError``, else the error's first line."""
    return getattr(error, "strerror", None) or reason(error).splitlines()[0]
