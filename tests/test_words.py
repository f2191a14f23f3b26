"""The words of docs/words.md: what was given up is not written again, and docstrings stand alone."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch import REPOSITORY

PHRASES = {
    r"MPI library's own": "native",
    r"broken off": "aborted",
    r"told of": "reported",
    r"(is|are|was|were) told": "is reported, printed, passed",
    r"(can|could|cannot|to|may|might) be gone": "available",
    r"for ever": "indefinitely",
    r"so many": "name the number",
    r"ever so": "much",
    r"as (\S+ ){1,4}has it": "as X does, as X defines it",
    r"had again": "repeated",
    r"under way": "pending, in flight",
    r"boxes": "staging buffers",
    r"add(s|ed|ing)? up(?! to\b)": "reduces, sums",
    r"(kept|keeps?|keeping) back": "residual",
    r"by way of": "through",
    r"at hand": "name it",
    r"as ever": "as usual",
    r"would else": "would otherwise",
}
"""Phrases given up, as regular expressions in which a blank stands for any white space, and what to write instead."""

HEADLESS = ("Of ", "The same", "The opposite", "See ", "A ``UserError``", "A ``ValueError``", "A ``ScheduleError``")
"""What no docstring begins with: its first line makes sense without its neighbors."""

WHERE = ("mpicoll/**/*.py", "bench/*.py", "examples/*.py", "README.md", "docs/*.md")


def prose(path: Path, text: str) -> Iterator[tuple[int, str]]:
    """The first line and the text of what people read: of Python its strings and comments, of a page all but itself."""
    if path.suffix != ".py":
        if path.name != "words.md":
            yield 1, text
        return
    comments: list[tuple[int, str]] = []
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            if comments and token.start[0] == comments[-1][0] + comments[-1][1].count("\n") + 1:
                first, before = comments.pop()
                comments.append((first, before + "\n" + token.string.lstrip("# ")))
            else:
                comments.append((token.start[0], token.string))
    yield from comments
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value


def given_up(path: Path, text: str) -> list[str]:
    """A line for each word given up, and for each docstring that does not stand alone."""
    found = []
    for line, words in prose(path, text):
        for phrase, better in PHRASES.items():
            for match in re.finditer(r"\b" + phrase.replace(" ", r"\s+") + r"\b", words, re.IGNORECASE):
                where = line + words.count("\n", 0, match.start())
                found.append(f"{path}:{where}: {' '.join(match[0].split())!r}: {better}")
    if path.suffix == ".py":
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                first = (ast.get_docstring(node) or "").partition("\n")[0]
                if first.startswith(HEADLESS):
                    found.append(f"{path}:{getattr(node, 'lineno', 1)}: docstring {first!r} does not stand alone")
    return found


FILES = sorted({path.relative_to(REPOSITORY) for pattern in WHERE for path in REPOSITORY.glob(pattern)})


def test_words_that_were_given_up_stay_given_up():
    found = [line for path in FILES for line in given_up(path, (REPOSITORY / path).read_text())]
    assert not found, "docs/words.md has better words:\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("path", "text", "line"),
    [
        ("x.md", "one\nand\nthe MPI library's\nown", 'x.md:3: "MPI library\'s own": native'),
        ("x.py", "# calls that\n# are under\n# way\n", "x.py:2: 'under way': pending, in flight"),
        ("x.py", "x = 1\nraise ValueError('ranks add up numbers')\n", "x.py:2: 'add up': reduces, sums"),
        ("x.py", "def f():\n    '''The opposite.'''\n", "x.py:1: docstring 'The opposite.' does not stand alone"),
        ("x.py", "'''Of a rank.'''\n", "x.py:1: docstring 'Of a rank.' does not stand alone"),
    ],
)
def test_a_word_given_up_is_found(path, text, line):
    assert given_up(Path(path), text) == [line]


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("x.md", "columns add up\nto 1"),
        ("x.py", "under_way = boxes = 1  # a name is not prose\n"),
        ("docs/words.md", "| under way |"),
        ("x.py", "def f():\n    '''Officers of the same rank.'''\n"),
    ],
)
def test_other_words_are_not(path, text):
    assert given_up(Path(path), text) == []
