"""The fake CuPy has no name, and takes no argument, that the real one has not.

Needs CuPy, and no GPU: ``make test-cupy`` runs it in an environment that has one.
"""

import ast
import importlib
import inspect
import re
import types
import warnings
from collections.abc import Iterator
from inspect import Parameter
from typing import Any

import fakecupy
import numpy as np
import pytest
from fakecupy.names import ABSENT

MODULES = ["cupy", "cupy.cuda", "cupy.cuda.runtime", "cupy.cuda.nccl", "cupyx.scipy.sparse"]
NAMED, ANY_PLACE, ANY_NAME = Parameter.KEYWORD_ONLY, Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD


def real(name: str) -> Any:
    """A module of CuPy's; the test is skipped where there is none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it tells of libraries that are missing
        try:
            return importlib.import_module(name)
        except ImportError as error:
            pytest.skip(f"there is no CuPy to compare with ({error}): make test-cupy")


@pytest.fixture(params=MODULES)
def pair(request: pytest.FixtureRequest) -> Iterator[tuple[Any, Any]]:
    """A module of the real CuPy, and of the fake one."""
    cupys = real(request.param)
    if request.param == "cupy.cuda.nccl" and not cupys.available:
        pytest.skip("there is no NCCL to compare with: make test-cupy")
    with fakecupy.installed() as fake:
        yield cupys, fake.modules[request.param]


def members(cupys: Any, mine: Any, name: str) -> Iterator[tuple[str, Any, Any]]:
    """What is public in a module or a class of the fake, by its full name, and the same of CuPy's, if it is there."""
    for key in dir(mine):
        value = inspect.getattr_static(mine, key)
        if key[0] == "_" or inspect.ismodule(value):
            continue
        value, other = getattr(mine, key), getattr(cupys, key, None)
        yield f"{name}.{key}", other if hasattr(cupys, key) else Parameter.empty, value
        if isinstance(value, type) and other is not None:
            yield from members(other, value, f"{name}.{key}")


def test_all_names_are_those_of_cupy(pair):
    cupys, mine = pair
    missing = [name for name, other, _ in members(cupys, mine, mine.__name__) if other is Parameter.empty]
    assert missing == []


def test_all_arguments_are_those_of_cupy(pair):
    cupys, mine = pair
    different = []
    for name, other, value in members(cupys, mine, mine.__name__):
        if isinstance(value, (types.FunctionType, types.MethodType, type)):
            given, taken = inspect.signature(value), signature(other, name.split(".")[-1])
            different += [f"{name}{given}, CuPy's {taken}: {why}" for why in refusals(given, taken)]
    assert different == []


def refusals(given: inspect.Signature, taken: inspect.Signature) -> list[str]:
    """Which calls that ``given`` takes ``taken`` would refuse, or take for others."""
    found = []
    ours, theirs = ([one for one in made.parameters.values() if one.name != "self"] for made in (given, taken))
    kinds = {one.kind for one in theirs}
    names = {one.name: one for one in theirs}
    for place, one in enumerate(ours):
        other = names.get(one.name)
        if one.kind in (ANY_PLACE, ANY_NAME):
            continue
        if other is None:
            if (ANY_NAME if one.kind is NAMED else ANY_PLACE) not in kinds:
                found.append(f"there is no {one.name}")
        elif one.kind is not NAMED and other.kind is NAMED:
            found.append(f"{one.name} goes by its name only")
        elif one.kind is not NAMED and ANY_PLACE not in kinds and theirs.index(other) != place:
            found.append(f"{one.name} is number {theirs.index(other)}")
        elif one.default is not other.default and one.default != other.default:
            found.append(f"{one.name} is {other.default} if it is not given")
    if ANY_NAME not in {one.kind for one in ours}:
        found += [
            f"{one.name} is needed"
            for one in theirs
            if one.default is Parameter.empty
            and one.name not in given.parameters
            and one.kind not in (ANY_PLACE, ANY_NAME)
        ]
    return found


def signature(function: Any, name: str) -> inspect.Signature:
    """What CuPy's takes: what is compiled says it in the first line of its documentation."""
    try:
        return inspect.signature(function)
    except ValueError:
        return documented((inspect.getdoc(function) or "").partition("\n")[0], name)


def documented(line: str, name: str) -> inspect.Signature:
    """The signature that a line states, with types as in C."""
    told = re.match(rf"(?:\w+\.)*{name}\((.*)\)(?: ->.*)?$", line)
    assert told, f"{name} does not say what it takes: {line}"
    parameters: list[Parameter] = []
    kind: Any = Parameter.POSITIONAL_OR_KEYWORD
    for text in told[1].split(", "):
        words, _, default = text.partition("=")
        last = words.split()[-1] if words else ""
        if last.startswith("**"):
            parameters.append(Parameter(last[2:], ANY_NAME))
        elif last.startswith("*"):
            kind = NAMED
            parameters += [Parameter(last[1:], ANY_PLACE)] if last[1:] else []
        elif last:
            known = ast.literal_eval(default) if default else Parameter.empty
            parameters.append(Parameter(last, kind, default=known))
    return inspect.Signature(parameters)


def test_what_numpy_has_and_cupy_has_not_is_absent():
    cupy = real("cupy")
    lacking = {name for name in dir(np) if name[0] != "_" and callable(getattr(np, name)) and not hasattr(cupy, name)}
    assert lacking <= ABSENT
    assert not [name for name in ABSENT if hasattr(cupy, name)]


@pytest.mark.parametrize(
    ("fake", "why"),
    [
        (lambda to, size, kind=4, *, stream=0: None, []),
        (lambda to, size, kind=4, **kwargs: None, []),
        (lambda to: None, ["size is needed"]),
        (lambda size, to: None, ["size is number 1", "to is number 0"]),
        (lambda to, size, kind=3: None, ["kind is 4 if it is not given"]),
        (lambda to, size, kind=4, stream=0: None, ["stream goes by its name only"]),
        (lambda to, size, *, flags=0: None, ["there is no flags"]),
    ],
)
def test_a_difference_is_found(fake, why):
    taken = documented("runtime.copy(intptr_t to, size_t size, int kind=4, *, stream=0) -> int", "copy")
    assert refusals(inspect.signature(fake), taken) == why
