"""Grids: how they are described, and what does not fit on so many ranks."""

import pytest

from mpicoll import UserError
from mpicoll.train.grid import Sizes, sizes_of


@pytest.mark.parametrize(
    ("text", "ranks", "sizes"),
    [
        (None, 5, (5, 1, 1)),
        ("data=3", 3, (3, 1, 1)),
        ("tensor=2, pipe = 3", 6, (1, 3, 2)),
        ("pipe=2", 8, (4, 2, 1)),
        ("pipe=2,data=1,tensor=4", 8, (1, 2, 4)),
    ],
)
def test_grids_that_are_told_in_words(text, ranks, sizes):
    assert sizes_of(text, ranks) == Sizes(*sizes)
    assert sizes_of(str(Sizes(*sizes)), ranks) == Sizes(*sizes)


@pytest.mark.parametrize(
    ("text", "ranks", "message"),
    [
        ("pipes=2", 2, "--grid has axes data, pipe, tensor, as data=2,pipe=2,tensor=2; got 'pipes'"),
        ("", 2, "got ''"),
        ("pipe", 2, "--grid must give each axis at least 1 rank, and once, as .*; got 'pipe'"),
        ("pipe=0", 2, "at least 1 rank"),
        ("pipe=-1", 2, "at least 1 rank"),
        ("pipe=x", 2, "at least 1 rank"),
        ("pipe=1,pipe=2", 2, "and once"),
        ("data=2,pipe=2", 6, "--grid data=2,pipe=2 is one of 4 rank.s., and there are 6: take data=3,pipe=2, or other"),
        ("pipe=4", 6, "is one of 4 rank.s., and there are 6: take data=3,pipe=2, or"),
        ("data=2,pipe=2,tensor=2", 1, "is one of 8 rank.s., and there are 1: take data=1, or"),
        ("tensor=8,pipe=3", 12, "is one of 24 rank.s., and there are 12: take pipe=3,tensor=4, or"),
    ],
)
def test_grids_that_are_none(text, ranks, message):
    with pytest.raises(UserError, match=message):
        sizes_of(text, ranks)
