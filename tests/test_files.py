"""What is written: JSON for every parser, files whole or not at all, and errors in one line."""

import json
import math
import os
import re
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest

from launch import REPOSITORY
from mpicoll.errors import UserError
from mpicoll.files import error_message, replace, replacing, to_json, writing


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


def test_a_file_is_replaced_whole_and_a_link_to_it_stays(tmp_path):
    path, link = tmp_path / "file", tmp_path / "link"
    path.write_text("old")
    link.symlink_to(path)
    with replacing(link) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
    assert link.is_symlink()
    assert path.read_text() == "new"
    replace(path, "newer \udcff")  # a byte that is no text
    assert path.read_bytes() == b"newer \xff"
    assert sorted(one.name for one in tmp_path.iterdir()) == ["file", "link"]


def test_where_writing_fails_the_file_stays_and_nothing_is_left_beside_it(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def torn() -> None:
        with replacing(path) as partial:
            partial.write_text("half of i")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        torn()
    assert path.read_text() == "old"
    assert [one.name for one in tmp_path.iterdir()] == ["file"]


def test_what_is_no_file_is_not_replaced(tmp_path):
    for path in (tmp_path, Path(os.devnull)):
        with pytest.raises(OSError, match="it is no ordinary file"):
            replace(path, "text")
    with pytest.raises(FileNotFoundError):
        replace(tmp_path / "no" / "where", "text")


def test_an_error_of_the_system_is_one_line_for_the_user(tmp_path):
    with pytest.raises(UserError, match=r"^'x' cannot be written \(No space left on device\); name another$"):
        with writing("'x'", "; name another"):
            raise OSError(28, "No space left on device")
    with pytest.raises(ValueError, match="other"), writing("'x'"):
        raise ValueError("other errors pass")
    assert error_message(ValueError("one\ntwo")) == "one"
    assert error_message(ValueError()) == "ValueError"
