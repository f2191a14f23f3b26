from mpicoll.algorithms import find
from mpicoll.draw import text
from schedules import fold_tree_reduce


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
