"""All JSON that is written goes one way, and every parser reads it."""

import json
import math
import re
from typing import NoReturn

import numpy as np
import pytest

from launch import REPOSITORY
from mpicoll.files import to_json


def strict(text: str) -> object:
    """As a parser that knows JSON only."""

    def refuse(name: str) -> NoReturn:
        raise AssertionError(f"{name} is no JSON: {text}")

    return json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize(
    ("value", "read"),
    [
        (math.nan, None),
        (-math.inf, None),
        (np.float64("inf"), None),
        ({"a": [1, math.nan, {"b": (math.inf, 2.5)}]}, {"a": [1, None, {"b": [None, 2.5]}]}),
        ({"text": "NaN", "none": None, "yes": True, "large": 2**70, "é": "\x7f\ud800"}, ...),
        ([1e308 * 10, -0.0, 5e-324], [None, -0.0, 5e-324]),
    ],
)
def test_what_is_not_finite_is_null_however_deep(value, read):
    assert strict(to_json(value)) == (value if read is ... else read)
    assert strict(to_json(value, indent=1)) == (value if read is ... else read)


def writes_nan(source: str) -> bool:
    """May it write JSON that is none, and not say so?  ``json.dump`` and ``json.dumps`` do unless told otherwise."""
    calls = re.split(r"\bjson\.dumps?\(", source)[1:]
    hidden = re.search(r"from json import|import json as", source)
    return bool(hidden) or not all("allow_nan=" in call.split("\n\n")[0] for call in calls)


def test_no_json_is_written_that_may_hold_nan():
    sources = [path for folder in ("mpicoll", "bench") for path in (REPOSITORY / folder).rglob("*.py")]
    assert len(sources) > 50
    assert [str(path) for path in sources if writes_nan(path.read_text())] == []
    assert writes_nan("path.write_text(json.dumps(record))")
