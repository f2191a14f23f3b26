"""Files of lines, a sample each: the lines of one rank, and the number of a line that cannot be parsed."""

import codecs
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...errors import UserError
from .opening import OPENERS, reading
from .raw import share


def own_lines(path: Path, rank: int, ranks: int) -> tuple[list[bytes], int, int]:
    """The lines that begin in this rank's range of bytes, the byte where the first begins, and the size of the file.

    A rank reads beyond them only the end of the line within which its range begins.
    """
    with reading(path):
        opener = OPENERS.get(path.suffix.lower())
        if opener is not None:
            with opener(path) as file:
                text = file.read()
            return _without_mark(text.splitlines()), 0, len(text)
        with open(path, "rb") as file:
            size = file.seek(0, io.SEEK_END)

            def first_line_from(byte: int) -> int:
                if byte == 0:
                    return 0
                file.seek(byte - 1)
                file.readline()
                return file.tell()

            own = share(size, rank, ranks)
            begin, end = first_line_from(own.start), first_line_from(own.stop)
            file.seek(begin)
            lines = file.read(end - begin).splitlines()
            return lines if begin else _without_mark(lines), begin, size


def first_line(path: Path) -> bytes:
    """The first line of a file, perhaps compressed, without byte order mark and line end; it must be UTF-8."""
    with reading(path):
        with OPENERS.get(path.suffix.lower(), open)(path, "rb") as file:
            line = file.readline()
    if line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in line:
        raise UserError(f"data file {str(path)!r} is not UTF-8, but perhaps UTF-16: save it as UTF-8")
    return _without_mark([line])[0].rstrip(b"\r\n").split(b"\r")[0]


def _without_mark(lines: list[bytes]) -> list[bytes]:
    """The first lines of a file, without the byte order mark of UTF-8."""
    if lines:
        lines[0] = lines[0].removeprefix(codecs.BOM_UTF8)
    return lines


def parsed(
    path: Path, begin: int, lines: list[bytes], parse: Callable[[list[bytes]], Any], complaint: Callable[[bytes], str]
) -> Any:
    """The result of ``parse(lines)``; a ``ValueError`` becomes a ``UserError`` with the number of the first bad line.

    ``complaint(line)`` says what is wrong with it.  Lines before byte ``begin`` are counted only then.
    """
    try:
        return parse(lines)
    except ValueError as error:
        good, bad = 0, len(lines)  # the first bad line is among lines[good:bad]
        while bad - good > 1:
            middle = (good + bad) // 2
            try:
                parse(lines[good:middle])
                good = middle
            except ValueError:
                bad = middle
        number, left = good + 1, begin
        with reading(path), open(path, "rb") as file:
            while left:
                block = file.read(min(left, 2**24))
                number, left = number + block.count(b"\n"), left - len(block)
        raise UserError(f"data file {str(path)!r}, line {number}: {complaint(lines[good])}") from error
