"""Profiles: the rules that were measured to be best, for one MPI, machine and layout of ranks, in a file.

A profile is read in full or not at all, written whole, and looked for where ``mpicoll tune`` writes it;
docs/tuning.md describes it.
"""

import os
import re
import warnings
from dataclasses import dataclass
from functools import cache
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

from ..algorithms import ALGORITHMS
from .fingerprint import Fingerprint, nodes
from .format import FormatError, known_algorithm, known_collective, members_of, parts, read_file, shown, write_file
from .rules import Rule, Rules, can_do_all

VARIABLE = "MPICOLL_PROFILE"
LIMIT = 1 << 20  # bytes: no profile is as long
NAME = 100  # characters of a file's name; what is longer ends with a digest


@dataclass(frozen=True)
class Profile:
    """Rules, where they hold, and how they were ``made``: date, versions, hosts, plain values by any names."""

    fingerprint: Fingerprint
    rules: Rules
    made: dict[str, Any]


# ---- the file


def read_profile(path: str | os.PathLike[str]) -> Profile:
    """The profile in a file; a ``UserError`` names the first place in it that is wrong."""
    return read_file(path, "profile", LIMIT, _profile)


def write_profile(profile: Profile, path: str | os.PathLike[str]) -> None:
    """Make the profile the content of the file ``path``, whole or not at all."""
    rules = {name: [rule._asdict() for rule in own] for name, own in profile.rules.items()}
    write_file(path, "profile", "rules", profile.fingerprint, profile.made, rules)


def _profile(value: Any) -> Profile:
    fingerprint, made, rules = parts(value, "rules")
    if not isinstance(rules, dict) or not rules:
        raise FormatError(f"rules is {shown(rules)}: expected an object, of rules by collective")
    known = {known_collective(name, "a key of rules"): _rules(name, given) for name, given in rules.items()}
    return Profile(fingerprint, known, made)


def _rules(collective: str, given: Any) -> tuple[Rule, ...]:
    place = f"rules.{collective}"
    if not isinstance(given, list) or not given:
        raise FormatError(f"{place} is {shown(given)}: expected a list of rules")
    rules = [_rule(collective, one, f"{place}, rule {n}") for n, one in enumerate(given, 1)]
    for n, (before, rule) in enumerate(pairwise(rules), 2):
        if before.up_to is None:
            raise FormatError(f"{place}, rule {n} contradicts rule {n - 1}, whose up_to is null: no array comes to it")
        if rule.up_to is not None and rule.up_to <= before.up_to:
            raise FormatError(
                f"{place}, rule {n} contradicts rule {n - 1}: up_to is {rule.up_to}, expected more than {before.up_to}"
            )
    if rules[-1].up_to is not None:
        raise FormatError(
            f"{place}, rule {len(rules)}, the last, is up_to {rules[-1].up_to}: expected null, any length"
        )
    return tuple(rules)


def _rule(collective: str, given: Any, place: str) -> Rule:
    up_to, names = members_of(given, place, Rule._fields).values()
    if up_to is not None and (type(up_to) is not int or up_to < 0):
        raise FormatError(f"{place}, up_to is {shown(up_to)}: expected a number of bytes, 0 or more, or null")
    if not isinstance(names, list) or not names:
        raise FormatError(f"{place}, algorithms is {shown(names)}: expected a list of names")
    for n, name in enumerate(names):
        known_algorithm(collective, name, place)
        if name in names[:n]:
            raise FormatError(f"{place} names {name} twice")
    if not any(can_do_all(collective, name) for name in names):
        able = ", ".join(name for name in ALGORITHMS[collective] if can_do_all(collective, name))
        raise FormatError(f"{place} leaves calls without an algorithm: {shown(names)} holds none of {able}")
    return Rule(up_to, tuple(names))


# ---- which profile


def refusal(profile: Profile, fingerprint: Fingerprint) -> str | None:
    """Why the profile does not apply to this fingerprint, in one line; ``None`` if it does."""
    theirs, ours = profile.fingerprint, fingerprint
    pairs = [(theirs.mpi, ours.mpi), (theirs.machine, ours.machine)]
    said = [f"it is of {one}, here is {other}" for one, other in pairs if one != other]
    if theirs.layout != ours.layout:
        said.append(f"it is of {nodes(theirs.layout)}, here is {nodes(ours.layout)}")
    return f"{'; '.join(said)}: tune again, mpirun -n {sum(ours.layout)} mpicoll tune" if said else None


def default_path(fingerprint: Fingerprint) -> Path:
    """Where the profile for a fingerprint is looked for, and written by ``mpicoll tune``, unless a file is named."""
    base = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    return Path(base, "mpicoll", _file_name(fingerprint))


def _file_name(fingerprint: Fingerprint) -> str:
    layout = "-".join(f"{len([*same])}x{ranks}" for ranks, same in groupby(fingerprint.layout))
    name = re.sub(r"[^a-z0-9.]+", "-", f"{fingerprint.mpi} {fingerprint.machine} {layout}".lower())
    if len(name) > NAME:
        from hashlib import sha256  # takes 2 ms to import

        name = f"{name[: NAME - 9]}-{sha256(repr(fingerprint).encode()).hexdigest()[:8]}"
    return f"{name}.json"


def profile_path(fingerprint: Fingerprint) -> tuple[Path, bool] | None:
    """The file in which the profile for a fingerprint is looked for, and whether it must exist.

    ``None`` if no profile is wanted.  ``MPICOLL_PROFILE`` names the file, or a folder in which it has the name that
    ``default_path`` gives it, or is ``none`` or empty.
    """
    named = os.environ.get(VARIABLE)
    if named is None:
        return default_path(fingerprint), False
    if named in ("", "none"):
        return None
    path = Path(named).absolute()
    return (path / _file_name(fingerprint), False) if os.path.isdir(path) else (path, True)


def find_profile(fingerprint: Fingerprint, whole: bool = True) -> Profile | None:
    """The profile for a fingerprint, if there is one; a process reads a file once.

    Raises a ``UserError`` if it is wrong, or was named and does not exist.  One for another fingerprint causes a
    warning, once, and is not used.  If only its layout is another, there is no warning unless this is the ``whole``
    job: parts of a job have layouts of their own, and may look on another node, where a file that was named for the job
    need not exist.
    """
    place = profile_path(fingerprint)
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


_read_once = cache(read_profile)
_refused: set[Path] = set()
