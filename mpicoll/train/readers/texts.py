"""Which text is a number, and which a label."""

import re

NOT_FINITE = re.compile(r"[+-]?(nan|inf|infinity)", re.ASCII | re.IGNORECASE)
NUMBER = r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:e[+-]?\d+)?"
DECIMAL = re.compile(NUMBER, re.ASCII | re.IGNORECASE)

INTEGER = re.compile(r"0|-?[1-9]\d{0,17}", re.ASCII)
"""Integers as Python writes them, that fit into 64 bits."""


def decoded(line: bytes) -> str:
    """A line as text: different bytes give different text, which encodes to these bytes again."""
    return line.decode(errors="surrogateescape")


def is_label(text: str) -> bool:
    """Whether a field may be a label: no missing value, and no NUL, which NumPy drops at the end."""
    return bool(text) and "\0" not in text and not NOT_FINITE.fullmatch(text)


def is_number(text: str) -> bool:
    """Whether a field is a decimal number in ASCII, ``nan`` or infinite; Python's ``float`` accepts more."""
    return bool(DECIMAL.fullmatch(text) or NOT_FINITE.fullmatch(text))
