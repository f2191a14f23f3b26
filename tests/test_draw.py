from collections import Counter
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from mpicoll.algorithms import ALGORITHMS, find
from mpicoll.draw import share, svg, text
from mpicoll.graphs import graph
from mpicoll.interpreter import lockstep
from mpicoll.schedule import Schedule, Verb, pieces
from schedules import fold_tree_reduce

DOCS = Path(__file__).parents[1] / "docs"
ROWS = [row for rows in ALGORITHMS.values() for row in rows.values()]


def test_a_picture_is_the_schedule():
    assert text(find("allreduce", "circulant").schedule(3)).splitlines() == [
        "round │ rank 0        │ rank 1        │ rank 2",
        "    0 │ [2]→2  [0]+←1 │ [0]→0  [1]+←2 │ [1]→1  [2]+←0",
        "    1 │ [1]→1  [0]+←2 │ [2]→2  [1]+←0 │ [0]→0  [2]+←1",
        "    2 │ [0]→2  [1]←1  │ [1]→0  [2]←2  │ [2]→1  [0]←0",
        "    3 │ [0]→1  [2]←2  │ [1]→2  [0]←0  │ [2]→0  [1]←1",
    ]


def test_ranges_that_wrap_and_idle_ranks():
    assert "[4..0]→4" in text(find("allreduce", "circulant").schedule(5))
    assert text(fold_tree_reduce(3, 0)).splitlines()[1].endswith("idle")


def test_mixing_shows_weights():
    assert text(find("mix", "base").schedule(3)).splitlines() == [
        "round │ rank 0          │ rank 1          │ rank 2",
        "    0 │ →1  1/2 + 1/2←1 │ →0  1/2←0 + 1/2 │ idle",
        "    1 │ →2  1/3 + 2/3←2 │ idle            │ →0  2/3←0 + 1/3",
        "    2 │ →1  1/2 + 1/2←1 │ →0  1/2←0 + 1/2 │ idle",
    ]
    assert [share(weight) for weight in (1 / 3, 1.0, 0.123456789)] == ["1/3", "1", "0.123"]


def elements(schedule: Schedule, tag: str) -> list[Any]:
    root = ElementTree.fromstring(svg(schedule, "a < b & c"))
    return list(root.iter("{http://www.w3.org/2000/svg}" + tag))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.name}-{row.collective}")
def test_a_drawing_has_an_arrow_for_each_message_and_a_cell_for_each_contribution(row):
    for p in (1, 4, 6, 8):
        schedule = row.schedule(p)
        arrows = Counter(
            recv.verb is Verb.COPY
            for rounds in lockstep(schedule)
            for rank, round_ in enumerate(rounds)
            for recv in round_.recvs
            for _ in pieces(recv.lo, recv.hi, schedule.chunks)
            if recv.peer != rank
        )
        curves = [path for path in elements(schedule, "path") if "C" in path.get("d")]
        assert Counter("stroke-dasharray" in curve.attrib for curve in curves) == arrows
        titles = [label.text for label in elements(schedule, "text")]
        assert [f"rank {rank}" for rank in range(p)] == [title for title in titles if title.startswith("rank ")]
        assert "a < b & c" in titles
    # the last row of boxes: all is there, of everybody, where an allreduce ends
    if row.collective == "allreduce":
        cells = [box for box in elements(schedule, "rect") if box.get("fill") not in ("white", "#f1f1f1", "none")]
        bottom = max(float(cell.get("y")) for cell in cells)
        assert sum(float(cell.get("y")) == bottom for cell in cells) == p * schedule.chunks


def test_bars_are_as_long_as_shares():
    made = graph("base", 6)
    bars = [box for box in elements(find("mix", "base").schedule(6), "rect") if box.get("fill").startswith("#")]
    widths = np.array([float(bar.get("width")) for bar in bars if bar.get("fill") != "#f1f1f1"]) / 72
    product, wanted = np.eye(6), np.ones(6)
    for t in range(4):
        product = made.matrix(t) @ product
        wanted = np.append(wanted, product[product > 0])
    np.testing.assert_allclose(widths, wanted, atol=1e-5)


@pytest.mark.parametrize(("collective", "name", "p"), [("allreduce", "ring", 4), ("mix", "butterfly", 8)])
def test_the_pictures_in_the_documentation_are_current(collective, name, p):
    drawn = (DOCS / f"{name}.svg").read_text()
    title = drawn.split('fill="#111"')[1].split(">")[1].split("<")[0]
    assert drawn == svg(find(collective, name).schedule(p), title)
