"""The file format of profiles and measurements: JSON for people to read, which is checked in full when it is read."""

import json
import os
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from ..algorithms import ALGORITHMS
from ..collective import COLLECTIVES
from ..errors import UserError
from ..files import error_message, replace, to_json, writing
from .fingerprint import Fingerprint
from .rules import NATIVE, SHARED

T = TypeVar("T")

VERSION = 1
AGAIN = "make one with mpirun -n N mpicoll tune"


class FormatError(ValueError):
    """What is wrong in a file: the place, what is there, and what was expected."""


class Parts(NamedTuple):
    """The content of a file: where it holds, how it was ``made`` (plain values by any names), and lists by name."""

    fingerprint: Fingerprint
    made: dict[str, Any]
    lists: Any


# ---- writing


def write_file(
    path: str | os.PathLike[str],
    what: str,
    key: str,
    fingerprint: Fingerprint,
    made: dict[str, Any],
    lists: Mapping[str, Iterable[dict[str, Any]]],
) -> None:
    """Make this the content of the file ``path``, whole or not at all; every item of a list is a line.

    ``what`` the file is, is said in errors, which are a ``UserError``; ``key`` is that of the lists.
    """
    head = {"version": VERSION, **fingerprint._asdict(), "made": made}
    members = [f" {to_json(name)}: {to_json(value)}" for name, value in head.items()]
    texts = [f"  {to_json(name)}: [\n   " + ",\n   ".join(map(to_json, own)) + "\n  ]" for name, own in lists.items()]
    members.append(f" {to_json(key)}: {{\n" + ",\n".join(texts) + "\n }")
    with writing(f"{what} {str(path)!r}", "; name another file"):
        replace(Path(path), "{\n" + ",\n".join(members) + "\n}\n")


# ---- reading


def read_file(path: str | os.PathLike[str], what: str, limit: int, build: Callable[[Any], T]) -> T:
    """What ``build`` makes of the JSON in a file of at most ``limit`` bytes.

    Raises a ``UserError`` if the file cannot be read, is no JSON, or ``build`` raises a ``FormatError``.
    """
    try:
        # Something else than a file, such as a pipe without a writer, must not be waited for.
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            data = file.read(limit + 1) or b""
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise UserError(f"{what} {os.fspath(path)!r} cannot be read ({error_message(error)}); {AGAIN}") from error
    try:
        if not data or len(data) > limit:
            raise FormatError(f"longer than {limit} bytes: not one of ours" if data else "the file is empty")
        return build(_json(data))
    except FormatError as error:
        raise UserError(f"{what} {os.fspath(path)!r}: {error}; {AGAIN}") from error


def _json(data: bytes) -> Any:
    def members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for n, name in enumerate(names) if name in names[:n])
            raise FormatError(f"key {shown(twice)} stands twice in one object")
        return found

    def constant(name: str) -> Any:
        raise FormatError(f"{name} is no number of JSON")

    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=members, parse_constant=constant)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise FormatError(f"no JSON, or torn, at {where}: {error.msg}") from error
    except UnicodeDecodeError as error:
        raise FormatError(f"no text in UTF-8 at byte {error.start}") from error
    except FormatError:
        raise
    except (ValueError, RecursionError) as error:  # thousands of digits, or of brackets
        raise FormatError(f"no JSON that can be read: {str(error).split(';')[0]}") from error


def parts(value: Any, key: str) -> Parts:
    """The parts of a file of ours, whose lists are those of ``key`` and still to be checked."""
    version = value.get("version", VERSION) if isinstance(value, dict) else VERSION
    if type(version) is not int or version != VERSION:
        raise FormatError(f"version is {shown(version)}: expected {VERSION}, the one this mpicoll knows")
    found = members_of(value, "the whole", ("version", *Fingerprint._fields, "made", key))
    for name in ("mpi", "machine"):
        if not isinstance(found[name], str) or not found[name]:
            raise FormatError(f"{name} is {shown(found[name])}: expected a text")
    layout = found["layout"]
    if not isinstance(layout, list) or not layout or not all(type(ranks) is int and ranks > 0 for ranks in layout):
        raise FormatError(
            f"layout is {shown(layout)}: expected a list with the ranks on each node, numbers of 1 or more"
        )
    if not isinstance(found["made"], dict):
        raise FormatError(f"made is {shown(found['made'])}: expected an object")
    return Parts(Fingerprint(found["mpi"], found["machine"], tuple(layout)), found["made"], found[key])


def members_of(value: Any, place: str, names: Collection[str]) -> dict[str, Any]:
    """The members of ``value``, which must be an object of exactly these keys, in their order."""
    if not isinstance(value, dict):
        raise FormatError(f"{place} is {shown(value)}: expected an object with the keys {', '.join(names)}")
    for name in names:
        if name not in value:
            raise FormatError(f"{place} lacks the key {name!r}")
    for name in value:
        if name not in names:
            raise FormatError(f"{place} has the unknown key {shown(name)}: expected {', '.join(names)}")
    return {name: value[name] for name in names}


def known_collective(name: Any, place: str) -> str:
    """``name``, which must be that of a collective."""
    if name not in COLLECTIVES:
        raise FormatError(f"{place} is {shown(name)}, which is no collective: expected {', '.join(COLLECTIVES)}")
    return name


def known_algorithm(collective: str, name: Any, place: str) -> str:
    """``name``, which must be that of an algorithm of the collective."""
    known = (NATIVE, SHARED, *ALGORITHMS[collective])
    if name not in known:
        raise FormatError(
            f"{place} names {shown(name)}, which is no {collective} algorithm: expected {', '.join(known)}"
        )
    return name


def shown(value: Any) -> str:
    """A value as an error shows it: as JSON, or the beginning of that."""
    text = json.dumps(value, allow_nan=True)
    return text if len(text) <= 60 else f"{text[:57]}..."
