"""What ``algorithm="auto"`` goes by once it has been measured: rules, and the profile that keeps them in a file.

A profile is for the MPI, the machine and the layout of ranks on nodes that it was measured on, its fingerprint.  Here
it is read, in full or not at all, written and looked for; ``mpicoll tune`` makes it, and docs/tuning.md describes it.
"""

import json
import os
import platform
import re
import warnings
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from . import files
from .algorithms import ALGORITHMS
from .errors import UserError
from .files import error_message, to_json, writing

T = TypeVar("T")

NATIVE, SHARED = "native", "shared"

WAYS = ("ipc", "nccl", "aware", "staged")
"""How a call on arrays in the memory of GPUs may go (``mpi.devices``, ``mpi.gpu``): what its algorithm may be beside
those for host memory, which are then used on what is staged there."""

COLLECTIVES = tuple(name for name in ALGORITHMS if name != "mix")
VERSION = 1
VARIABLE = "MPICOLL_PROFILE"
LIMIT = 1 << 20  # bytes: no profile is as long
NAME = 100  # characters of a file's name; what is longer ends with a digest
AGAIN = "make one with mpirun -n N mpicoll tune"


class Rule(NamedTuple):
    """For arrays of up to ``up_to`` bytes (inclusive; ``None``: of any length) the algorithms in order of preference.

    The first of them that can do a call does it.  Bytes are those of the whole array.
    """

    up_to: int | None
    algorithms: tuple[str, ...]


Rules = dict[str, tuple[Rule, ...]]
"""By collective: the first rule that an array is not too long for is the one."""


def preferred(rules: Sequence[Rule], nbytes: int) -> tuple[str, ...]:
    """The algorithms for an array of so many bytes, the first best."""
    return next(rule.algorithms for rule in rules if rule.up_to is None or nbytes <= rule.up_to)


class Fingerprint(NamedTuple):
    """Where measurements hold: the MPI library and its version, the machine, and the ranks on each node in turn."""

    mpi: str
    machine: str
    layout: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.mpi}, {self.machine}, {nodes(self.layout)}"


@dataclass(frozen=True)
class Profile:
    """Rules, where they hold, and how they were ``made``: date, versions, hosts, plain values by any names."""

    fingerprint: Fingerprint
    rules: Rules
    made: dict[str, Any]


@cache
def machine() -> str:
    """The processor's name as the kernel has it, and the number of cores; of this node."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            text = file.read(4096)
    except OSError:
        text = ""
    found = re.search(r"^(?:model name|cpu|CPU part)\s*:\s*(\S.*?)\s*$", text, re.MULTILINE)
    name = found[1] if found else platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores"


def nodes(layout: tuple[int, ...]) -> str:
    """A layout for people: 4 node(s) x 2 rank(s)."""
    parts = [(len([*same]), ranks) for ranks, same in groupby(layout)]
    if len(parts) > 3:
        return f"{len(layout)} node(s), {sum(layout)} ranks in no order"
    return " + ".join(f"{count} node(s) x {ranks} rank(s)" for count, ranks in parts)


def can_do_all(collective: str, algorithm: str) -> bool:
    """Is there no call of the collective that this algorithm cannot do?

    The MPI library's own is never deterministic, and memory may not be shared.  All rows of the table that add in the
    canonical order keep the order of ranks too.
    """
    row = ALGORITHMS[collective].get(algorithm)
    return row is not None and (row.canonical or not row.reduces)


# ---- the file


def read(path: str | os.PathLike[str]) -> Profile:
    """The profile in a file; a ``UserError`` naming the place in it that is not as it must be."""
    return parsed(path, "profile", LIMIT, _profile)


def write(profile: Profile, path: str | os.PathLike[str]) -> None:
    """Make it the file at ``path``, which at any moment is the one that was there, or the new one, whole."""
    lines = {name: [*map(_line, rules)] for name, rules in profile.rules.items()}
    replace(path, "profile", profile.fingerprint, profile.made, "rules", lines)


def _line(rule: Rule) -> str:
    return to_json(rule._asdict())


def replace(
    path: str | os.PathLike[str],
    what: str,
    fingerprint: Fingerprint,
    made: dict[str, Any],
    key: str,
    lines: dict[str, list[str]],
) -> None:
    """Write JSON that people can read, with lists under ``key`` that have a line for each item; whole or not at all."""
    head = {"version": VERSION, **fingerprint._asdict(), "made": made}
    members = [f" {to_json(name)}: {to_json(value)}" for name, value in head.items()]
    lists = [f"  {to_json(name)}: [\n   " + ",\n   ".join(items) + "\n  ]" for name, items in lines.items()]
    members.append(f" {to_json(key)}: {{\n" + ",\n".join(lists) + "\n }")
    text = "{\n" + ",\n".join(members) + "\n}\n"
    with writing(f"{what} {str(path)!r}", "; name another file"):
        files.replace(Path(path), text)


class WrongError(ValueError):
    """What in a file is not as it must be: the place, what is there, and what was expected."""


def parsed(path: str | os.PathLike[str], what: str, limit: int, build: Callable[[Any], T]) -> T:
    """What ``build`` makes of the JSON in a file of at most ``limit`` bytes; a ``UserError`` if that cannot be."""
    try:
        # Something else than a file, such as a pipe without a writer, must not be waited for.
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            data = file.read(limit + 1) or b""
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise UserError(f"{what} {os.fspath(path)!r} cannot be read ({error_message(error)}); {AGAIN}") from error
    try:
        if not data or len(data) > limit:
            raise WrongError(f"longer than {limit} bytes: not one of ours" if data else "the file is empty")
        return build(_json(data))
    except WrongError as error:
        raise UserError(f"{what} {os.fspath(path)!r}: {error}; {AGAIN}") from error


def _json(data: bytes) -> Any:
    def members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for n, name in enumerate(names) if name in names[:n])
            raise WrongError(f"key {shown(twice)} stands twice in one object")
        return found

    def constant(name: str) -> Any:
        raise WrongError(f"{name} is no number of JSON")

    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=members, parse_constant=constant)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise WrongError(f"no JSON, or torn, at {where}: {error.msg}") from error
    except UnicodeDecodeError as error:
        raise WrongError(f"no text in UTF-8 at byte {error.start}") from error
    except WrongError:
        raise
    except (ValueError, RecursionError) as error:  # thousands of digits, or of brackets
        raise WrongError(f"no JSON that can be read: {str(error).split(';')[0]}") from error


def shown(value: Any) -> str:
    """In an error: as JSON, but not for lines, and with what is no number."""
    text = json.dumps(value, allow_nan=True)
    return text if len(text) <= 60 else f"{text[:57]}..."


def members_of(value: Any, place: str, names: Collection[str]) -> dict[str, Any]:
    """``value``, if it is an object of exactly these keys."""
    if not isinstance(value, dict):
        raise WrongError(f"{place} is {shown(value)}: expected an object with the keys {', '.join(names)}")
    for name in names:
        if name not in value:
            raise WrongError(f"{place} lacks the key {name!r}")
    for name in value:
        if name not in names:
            raise WrongError(f"{place} has the unknown key {shown(name)}: expected {', '.join(names)}")
    return value


def header(value: Any, *keys: str) -> dict[str, Any]:
    """A file of ours, with its version, its fingerprint, how it was made, and these keys."""
    version = value.get("version", VERSION) if isinstance(value, dict) else VERSION
    if type(version) is not int or version != VERSION:
        raise WrongError(f"version is {shown(version)}: expected {VERSION}, the one this mpicoll knows")
    found = members_of(value, "the whole", ("version", *Fingerprint._fields, "made", *keys))
    for key in ("mpi", "machine"):
        if not isinstance(found[key], str) or not found[key]:
            raise WrongError(f"{key} is {shown(found[key])}: expected a text")
    layout = found["layout"]
    if not isinstance(layout, list) or not layout or not all(type(ranks) is int and ranks > 0 for ranks in layout):
        raise WrongError(
            f"layout is {shown(layout)}: expected a list with the ranks on each node, numbers of 1 or more"
        )
    if not isinstance(found["made"], dict):
        raise WrongError(f"made is {shown(found['made'])}: expected an object")
    return found


def fingerprint_in(found: dict[str, Any]) -> Fingerprint:
    """The one that ``header`` found to be right."""
    return Fingerprint(found["mpi"], found["machine"], tuple(found["layout"]))


def known_collective(name: Any, place: str) -> str:
    """``name``, if there is such a collective."""
    if name not in COLLECTIVES:
        raise WrongError(f"{place} is {shown(name)}, which is no collective: expected {', '.join(COLLECTIVES)}")
    return name


def known_algorithm(collective: str, name: Any, place: str) -> str:
    """``name``, if the collective has such an algorithm."""
    known = (NATIVE, SHARED, *ALGORITHMS[collective])
    if name not in known:
        raise WrongError(
            f"{place} names {shown(name)}, which is no {collective} algorithm: expected {', '.join(known)}"
        )
    return name


def _profile(value: Any) -> Profile:
    found = header(value, "rules")
    rules = found["rules"]
    if not isinstance(rules, dict) or not rules:
        raise WrongError(f"rules is {shown(rules)}: expected an object, of rules by collective")
    made = {known_collective(name, "a key of rules"): _rules(name, given) for name, given in rules.items()}
    return Profile(fingerprint_in(found), made, found["made"])


def _rules(collective: str, given: Any) -> tuple[Rule, ...]:
    place = f"rules.{collective}"
    if not isinstance(given, list) or not given:
        raise WrongError(f"{place} is {shown(given)}: expected a list of rules")
    rules = [_rule(collective, one, f"{place}, rule {n}") for n, one in enumerate(given, 1)]
    for n, (before, rule) in enumerate(pairwise(rules), 2):
        if before.up_to is None:
            raise WrongError(f"{place}, rule {n} contradicts rule {n - 1}, whose up_to is null: no array comes to it")
        if rule.up_to is not None and rule.up_to <= before.up_to:
            raise WrongError(
                f"{place}, rule {n} contradicts rule {n - 1}: up_to is {rule.up_to}, expected more than {before.up_to}"
            )
    if rules[-1].up_to is not None:
        raise WrongError(f"{place}, rule {len(rules)}, the last, is up_to {rules[-1].up_to}: expected null, any length")
    return tuple(rules)


def _rule(collective: str, given: Any, place: str) -> Rule:
    up_to, names = (members_of(given, place, Rule._fields)[key] for key in Rule._fields)
    if up_to is not None and (type(up_to) is not int or up_to < 0):
        raise WrongError(f"{place}, up_to is {shown(up_to)}: expected a number of bytes, 0 or more, or null")
    if not isinstance(names, list) or not names:
        raise WrongError(f"{place}, algorithms is {shown(names)}: expected a list of names")
    for n, name in enumerate(names):
        known_algorithm(collective, name, place)
        if name in names[:n]:
            raise WrongError(f"{place} names {name} twice")
    if not any(can_do_all(collective, name) for name in names):
        able = ", ".join(name for name in ALGORITHMS[collective] if can_do_all(collective, name))
        raise WrongError(f"{place} leaves calls without an algorithm: {shown(names)} holds none of {able}")
    return Rule(up_to, tuple(names))


# ---- which one


def refusal(profile: Profile, fingerprint: Fingerprint) -> str | None:
    """Why the profile is not for here, in one line; ``None`` if it is."""
    theirs, ours = profile.fingerprint, fingerprint
    pairs = [(theirs.mpi, ours.mpi), (theirs.machine, ours.machine)]
    said = [f"it is of {one}, here is {other}" for one, other in pairs if one != other]
    if theirs.layout != ours.layout:
        said.append(f"it is of {nodes(theirs.layout)}, here is {nodes(ours.layout)}")
    return f"{'; '.join(said)}: tune again, mpirun -n {sum(ours.layout)} mpicoll tune" if said else None


def default_path(fingerprint: Fingerprint) -> Path:
    """Where its profile is looked for, and written by ``mpicoll tune``, unless told otherwise."""
    base = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    return Path(base, "mpicoll", _file_name(fingerprint))


def _file_name(fingerprint: Fingerprint) -> str:
    layout = "-".join(f"{len([*same])}x{ranks}" for ranks, same in groupby(fingerprint.layout))
    name = re.sub(r"[^a-z0-9.]+", "-", f"{fingerprint.mpi} {fingerprint.machine} {layout}".lower())
    if len(name) > NAME:
        from hashlib import sha256  # takes 2 ms to import

        name = f"{name[: NAME - 9]}-{sha256(repr(fingerprint).encode()).hexdigest()[:8]}"
    return f"{name}.json"


def looked_for(fingerprint: Fingerprint) -> tuple[Path, bool] | None:
    """Which file is its profile, and whether there must be one; ``None`` if none is wanted.

    ``MPICOLL_PROFILE`` names it, or a folder in which it is called as in ``default_path``, or says ``none`` or nothing.
    """
    named = os.environ.get(VARIABLE)
    if named is None:
        return default_path(fingerprint), False
    if named in ("", "none"):
        return None
    path = Path(named).absolute()
    return (path / _file_name(fingerprint), False) if os.path.isdir(path) else (path, True)


def find(fingerprint: Fingerprint, whole: bool = True) -> Profile | None:
    """The profile for here, if there is one; a process reads a file once.

    A ``UserError`` if it is wrong, or named and not there.  One that is for elsewhere warns, once, and is none; if only
    its layout is another, not even that unless this is the ``whole`` job: parts of a job have layouts of their own, and
    may look on another node, where a file that was named for the job need not be.
    """
    place = looked_for(fingerprint)
    if place is None:
        return None
    path, needed = place
    if not (needed and whole) and not os.path.exists(path):  # which never raises, as pathlib's does
        return None
    profile = _read_once(path)
    why = refusal(profile, fingerprint)
    if why is None:
        return profile
    moved = profile.fingerprint[:2] == fingerprint[:2]
    if (whole or not moved) and path not in _refused:
        _refused.add(path)
        warnings.warn(f"profile {str(path)!r} is not used: {why}", RuntimeWarning, stacklevel=2)
    return None


_read_once = cache(read)
_refused: set[Path] = set()
