"""CSV files: numbers, and a label in one column."""

import csv
import math
from collections.abc import Callable, Iterable
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ...errors import UserError, listed
from .lines import first_line, own_lines, parsed
from .raw import Raw, Schema
from .texts import DECIMAL, decoded, is_label, is_number

LABELS = ("y", "label", "class", "target")
"""Names of the column of labels; without one of them the last column holds the labels."""


class _Columns(NamedTuple):
    """The columns that are features, in the order of the model, and the one of labels, if any."""

    has_header: bool
    features: list[int]
    label: int | None


def _columns(path: Path, names: list[str], known: Schema | None) -> _Columns:
    """The columns by the fields of the first line, which are ``names`` if it is a header."""
    what, count = f"data file {str(path)!r}", len(names)
    if count < (2 if known is None else 1):
        raise UserError(
            f"{what}, line 1: {'one field' if names else 'nothing'}; expected features and a label, "
            "with commas, semicolons or tabs between"
        )
    called = [n for n, name in enumerate(names) if name.lower() in LABELS]
    if len(called) > 1:
        raise UserError(f"{what} has columns {names[called[0]]!r} and {names[called[1]]!r}; expected one of labels")
    places = {name: n for n, name in enumerate(known.columns or ())} if known else {}
    has_header = bool(called) or not any(map(is_number, names)) or (bool(places) and places.keys() <= set(names))
    first = {name: n for n, name in reversed(list(enumerate(names)))}
    again = next((n for n, name in enumerate(names) if first[name] < n), None)
    if has_header and again is not None:
        name = names[again]
        where = f"columns {first[name] + 1} and {again + 1}"
        raise UserError(f"{what} has a column {name!r} twice ({where}): name each column once")
    by_name = has_header and bool(places)
    label = called[0] if called else None
    if label is None and known is not None and by_name:
        label = names.index(known.label) if known.label in names else None
    elif label is None and (known is None or count == known.features + 1):
        label = count - 1
    features = [n for n in range(count) if n != label]
    if known is not None and by_name:
        found = {names[n] for n in features}
        if found != places.keys():
            other, missing = sorted(found - places.keys()), sorted(places.keys() - found)
            why = f"a column {other[0]!r}" if other else f"no column {missing[0]!r}"
            raise UserError(f"{what} has {why}; expected those of the training set: {listed(known.columns or ())}")
        features.sort(key=lambda n: places[names[n]])
    elif known is not None and len(features) != known.features:
        raise UserError(
            f"{what} has {count} columns; the model was trained on {known.features} features: expected as many, and "
            "perhaps a label"
        )
    return _Columns(has_header, features, label)


def read_csv(path: Path, rank: int, ranks: int, known: Schema | None) -> Raw:
    """This rank's share of a CSV file: numbers, and a label in one column.

    The first line decides the delimiter, the first of tab, semicolon and comma that occurs in it, and the number of
    columns.  It is a header if it names a column of labels, or all columns of ``known``, or if none of its fields is a
    number.  Fields may be quoted, but hold no line ends.
    """
    head = first_line(path)
    delimiter = next((mark for mark in "\t;," if mark.encode() in head), ",")

    def fields(line: bytes) -> list[str]:
        try:
            return [field.strip() for field in next(csv.reader([decoded(line)], delimiter=delimiter), [])]
        except csv.Error:
            return []

    names = fields(head)
    has_header, features, label = _columns(path, names, known)
    lines, begin, size = own_lines(path, rank, ranks)
    if begin == 0 and lines and has_header:
        lines[0] = b""
    # To predict, a column of labels may be there and empty: that can be said of a whole file, not of a share.
    empty = known is not None and ranks == 1 and label is not None and _is_empty(label, map(fields, lines))

    def parse(lines: list[bytes]) -> tuple[np.ndarray, np.ndarray | None]:
        known: dict[str, int] = {}

        def number_of(text: str) -> int:
            text = text.strip(" \t")
            if not is_label(text):
                raise ValueError(text)
            return known.setdefault(text, len(known))

        texts = [decoded(line) for line in lines if line.strip()]
        if any(text.count('"') % 2 for text in texts):
            raise ValueError('"')  # the field would go on in the next line
        table = np.empty((0, len(names)))
        if texts:
            converters: dict[int | str, Callable[[str], int]] = {}
            if label is not None:
                converters[label] = (lambda text: 0) if empty else number_of
            table = np.loadtxt(texts, delimiter=delimiter, comments=None, converters=converters, quotechar='"', ndmin=2)
        if table.shape[1] != len(names) or not np.isfinite(table).all():
            raise ValueError(table.shape)
        x = np.take(table, features, axis=1)
        if label is None or empty:
            return x, None
        return x, np.array(list(known), np.str_)[table[:, label].astype(np.intp)]

    def complaint(line: bytes) -> str:
        found = fields(line)
        if decoded(line).count('"') % 2:
            return "a quoted field does not end"
        if len(found) != len(names):
            return f"{len(found)} fields; expected {len(names)}, as in line 1"
        for n, field in enumerate(found):
            finite = bool(DECIMAL.fullmatch(field)) and math.isfinite(float(field))
            if not (finite if n != label else empty or is_label(field)):
                name = f"{names[n]!r}" if has_header else n + 1
                return f"{field!r} in column {name}; expected {'a label' if n == label else 'a finite number'}"
        return "cannot be read as numbers"

    x, y = parsed(path, begin, lines, parse, complaint)
    named = "" if label is None or not has_header else f", {names[label]!r}"
    layout = "no labels" if label is None else f"labels: column {label + 1} of {len(names)}{named}"
    layout += f"; line 1 is {'a header' if has_header else 'a sample'}"
    raw = Raw(x, y, verbatim=True, extent=size, layout=layout)
    if not has_header:
        return raw
    return raw._replace(columns=tuple(names[n] for n in features), label=None if label is None else names[label])


def _is_empty(column: int, rows: Iterable[list[str]]) -> bool:
    """Whether there are rows, and the column is there but empty in all of them."""
    rows = filter(any, rows)
    first = next(rows, [])
    return len(first) > column and all(len(row) > column and not row[column] for row in chain([first], rows))
