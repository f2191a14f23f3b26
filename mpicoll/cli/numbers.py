"""Numbers on the command line: how users type them, and how they are printed."""

import re
from typing import Any

import click
import numpy as np

from ..errors import UserError

MOST = 100  # numbers in a list
DTYPES = ("float32", "float64", "float16", "bfloat16", "int8", "uint8", "int32", "int64")


class Numbers(click.ParamType):
    """A sorted list of whole numbers, as 4,1000,64K:64M or 1K:1M:4 (from, to, factor)."""

    name = "list"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[int]:
        """The numbers; see ``click.ParamType.convert``."""
        found: set[int] = set()
        for item in str(value).upper().split(","):
            match = re.fullmatch(r"(\d{1,12}[KMG]?)(?::(\d{1,12}[KMG]?)(?::(\d{1,6}))?)?", item.strip())
            if not match:
                self.fail(f"{item!r} is not a number like 1000 or 64K, or a range like 4:64K or 4:64M:4.", param, ctx)
            number, last, factor = _number(match[1]), _number(match[2] or match[1]), int(match[3] or 2)
            if match[2] and not (1 <= number <= last and factor > 1):
                self.fail(f"{item!r} is not a range from 1 or more upwards, by a factor of 2 or more.", param, ctx)
            found.add(number)
            while match[2] and (number := number * factor) <= last:
                found.add(number)
        if len(found) > MOST:
            self.fail(f"{len(found)} are too many: at most {MOST}.", param, ctx)
        return sorted(found)


def _number(text: str) -> int:
    digits = text.rstrip("KMG")
    return int(digits) << {"": 0, "K": 10, "M": 20, "G": 30}[text.removeprefix(digits)]


class Number(click.FloatRange):
    """A number in a range; nan is refused."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The number; see ``click.ParamType.convert``."""
        number: float = super().convert(value, param, ctx)
        if number != number:
            raise click.UsageError(f"{param.opts[0] if param else value} nan is no number", ctx)
        return number


def dtype_named(name: str) -> np.dtype:
    """The NumPy type of one of ``DTYPES``."""
    if name == "bfloat16":
        try:
            import ml_dtypes
        except ModuleNotFoundError:
            raise UserError("bfloat16 needs the package ml_dtypes: pip install 'mpicoll[bfloat16]'") from None
        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


def pretty(size: float) -> str:
    """A number of bytes as text, in units of powers of two."""
    for unit, shift in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if size >= 1 << shift:
            return f"{size / (1 << shift):.4g} {unit}"
    return f"{size:.4g} B"


def ranges(numbers: list[int]) -> str:
    """Sorted whole numbers as text, such as 0-3,8."""
    starts = [n for n in numbers if n - 1 not in numbers]
    ends = [n for n in numbers if n + 1 not in numbers]
    return ",".join(f"{start}-{end}" if end > start else f"{start}" for start, end in zip(starts, ends, strict=True))
