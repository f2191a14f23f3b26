"""Reading files: how compressed ones are opened, and how errors are reported."""

import bz2
import gzip
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ...errors import UserError
from ...files import error_message

OPENERS: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open}


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Around reading ``path``: errors of the file system and of decompression become a ``UserError`` of one line."""
    try:
        yield
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"data file {str(path)!r} cannot be read: {error_message(error)}") from error
