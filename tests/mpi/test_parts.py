"""Gather and scatter: the contract over every algorithm of the table, natively, and in shared memory."""

import re
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

import mpicoll
from contract import assert_untouched, guarded, own_data
from mpicoll.algorithms import ALGORITHMS

P, RANK = MPI.COMM_WORLD.size, MPI.COMM_WORLD.rank
pytestmark = [pytest.mark.mpi, pytest.mark.skipif(P in (6, 7, 8), reason="five ranks show it")]
COUNTS = {
    "equal": [6] * P,
    "nothing": [0] * P,
    "one": [1] * P,
    "uneven": [(3 * rank + 1) % 5 for rank in range(P)],
    "only the last": [0] * (P - 1) + [7],
    "large": [70_001 + rank for rank in range(P)],
}
NAMES = ["auto", "native", *(["shared"] if P > 1 else []), *ALGORITHMS["gather"]]
ROOTS = sorted({P // 2, P - 1})  # 0 is that of the other tests


@pytest.fixture
def ours(comm: MPI.Intracomm) -> mpicoll.Comm:
    return mpicoll.Comm(comm)


def placed(ours: mpicoll.Comm, kind: str, values: np.ndarray) -> np.ndarray:
    """In memory that ranks share, or not, or on some ranks; a collective call."""
    there = ours.asarray(values)
    return there if kind == "shared" or (kind == "mixed" and RANK % 2) else values.copy()


@pytest.mark.parametrize("kind", ["private", "shared", "mixed"])
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize("name", NAMES)
def test_gather_to_every_root(ours, name, counts, kind):
    expected = np.concatenate([own_data(count, rank) for rank, count in enumerate(counts)])
    starts = [sum(counts[:rank]) for rank in range(P)]
    own = slice(starts[RANK], starts[RANK] + counts[RANK])
    mine = placed(ours, kind, own_data(counts[RANK], RANK))
    mine.flags.writeable = False
    for root in ROOTS:
        at_root = root == RANK
        for _ in range(2):
            result = mpicoll.gather(mine, ours, root, counts, name)
            assert (result is None) != at_root
            if at_root:
                np.testing.assert_array_equal(result, expected)
            received, around = guarded(np.full(len(expected), -1.0))
            ours.Gatherv(mine, [received, counts] if at_root else None, root, name)
            np.testing.assert_array_equal(received, expected if at_root else -1)
            assert_untouched(around)
            received[own] = mine
            ours.Gatherv(MPI.IN_PLACE if at_root else mine, [received, counts] if at_root else None, root, name)
            assert not at_root or (received == expected).all()
            apart = np.full(2 * len(expected) + P, -1.0)  # backwards, and with gaps
            places = [2 * (len(expected) - start - count) for start, count in zip(starts, counts, strict=True)]
            ours.Gatherv(mine, [apart, (counts, places)] if at_root else None, root, name)
            if at_root:
                for place, start, count in zip(places, starts, counts, strict=True):
                    np.testing.assert_array_equal(apart[place : place + count], expected[start : start + count])
                assert (apart == -1).sum() >= len(apart) - len(expected)
            if len(set(counts)) == 1:
                whole = placed(ours, kind, np.full(len(expected), -1.0))
                ours.Gather(mine, whole if at_root else None, root, name)
                np.testing.assert_array_equal(whole, expected if at_root else -1)
                whole[own] = mine
                ours.Gather(MPI.IN_PLACE if at_root else mine, whole if at_root else None, root, name)
                assert not at_root or (whole == expected).all()
                parts = mpicoll.gather(mine.reshape(1, -1), ours, root, algorithm=name)
                assert not at_root or parts.shape == (P, 1, counts[0])
                assert not at_root or (parts.reshape(-1) == expected).all()


@pytest.mark.parametrize("kind", ["private", "shared", "mixed"])
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize("name", NAMES)
def test_scatter_from_every_root(ours, name, counts, kind):
    starts = [sum(counts[:rank]) for rank in range(P)]
    own = slice(starts[RANK], starts[RANK] + counts[RANK])
    for root in ROOTS:
        at_root = root == RANK
        expected = own_data(sum(counts), root)
        whole = placed(ours, kind, own_data(sum(counts), RANK))
        whole.flags.writeable = False
        sent = whole if at_root else None
        for _ in range(2):
            mine = mpicoll.scatter(sent, ours, root, counts, name)
            np.testing.assert_array_equal(mine, expected[own])
            received, around = guarded(np.full(counts[RANK], -1.0))
            ours.Scatterv([whole, counts] if at_root else None, received, root, name)
            np.testing.assert_array_equal(received, expected[own])
            assert_untouched(around)
            received[:] = -1
            ours.Scatterv([whole, counts] if at_root else None, MPI.IN_PLACE if at_root else received, root, name)
            np.testing.assert_array_equal(received, -1 if at_root else expected[own])
            apart = np.full(2 * len(expected) + P, -1.0)
            places = [2 * (len(expected) - start - count) for start, count in zip(starts, counts, strict=True)]
            for place, start, count in zip(places, starts, counts, strict=True):
                apart[place : place + count] = expected[start : start + count]
            ours.Scatterv([apart, (counts, places)] if at_root else None, received, root, name)
            np.testing.assert_array_equal(received, expected[own])
            if len(set(counts)) == 1:
                part = placed(ours, kind, np.full(counts[RANK], -1.0))
                ours.Scatter(sent, part, root, name)
                np.testing.assert_array_equal(part, expected[own])
                part[:] = -1
                ours.Scatter(sent, MPI.IN_PLACE if at_root else part, root, name)
                np.testing.assert_array_equal(part, -1 if at_root else expected[own])
                shaped = whole.reshape(P, counts[0]) if at_root else None
                np.testing.assert_array_equal(mpicoll.scatter(shaped, ours, root, algorithm=name), expected[own])


@pytest.mark.parametrize("dtype", ["?", "i1", "c16", "f2", "m8[s]", "S3", [("a", "i4"), ("b", "f8")]])
def test_any_dtype_moves(ours, dtype):
    everyones = [np.arange(4, 8).astype("i8").astype("u1" if dtype == "?" else "i8") + rank for rank in range(P)]
    arrays = [
        np.array([(n, n) for n in one], dtype) if isinstance(dtype, list) else one.astype(dtype) for one in everyones
    ]
    for name in NAMES:
        found = mpicoll.gather(arrays[RANK], ours, P - 1, algorithm=name)
        assert RANK < P - 1 or (found == np.array(arrays)).all()
        mine = mpicoll.scatter(np.array(arrays) if RANK == 0 else None, ours, 0, algorithm=name)
        assert mine.dtype == arrays[RANK].dtype
        assert (mine == arrays[RANK]).all()


def ones(count: int, dtype: Any = "f8") -> np.ndarray:
    return np.ones(count, dtype)


WRONG = {
    "root": (lambda c: c.Gather(ones(1), ones(P), P), ValueError, f"root must be one of {P} ranks, got {P}"),
    "room": (lambda c: c.Gather(ones(2), ones(P), 0), ValueError, "times what is sent|MismatchError|do not make"),
    "objects": (lambda c: mpicoll.gather(np.array([None]), c), TypeError, "use comm.gather, in lower case"),
    "counts": (lambda c: mpicoll.gather(ones(2), c, 0, [1] * P), ValueError, "brings 2 elements"),
    "algorithm": (lambda c: c.Scatter(ones(P), ones(1), 0, "ring"), ValueError, "ring"),
    "parts": (lambda c: mpicoll.scatter(ones(P + 1), c), ValueError, f"expected x of {P} parts"),
    "scattered objects": (lambda c: mpicoll.scatter(np.array([None] * P), c), TypeError, "use comm.scatter"),
    "stream": (
        lambda c: c.Gather(ones(1), ones(P), stream=1),
        TypeError,
        "stream= is for arrays in the memory of a GPU",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_mistakes_raise_on_all_ranks(ours, what):
    call, error, message = WRONG[what]
    with pytest.raises((error, mpicoll.MismatchError)) as caught:
        call(ours)
    told = ours.allgather((type(caught.value).__name__, str(caught.value)))
    assert told[0][0] == error.__name__
    assert re.search(message, told[0][1]), told
    assert mpicoll.gather(np.full(1, RANK), ours) is None or RANK == 0  # and on it goes


@pytest.mark.skipif(P == 1, reason="nobody to differ from")
def test_ranks_that_differ_hear_of_it(ours):
    odd = RANK == P - 1
    for call in (
        lambda: ours.Gather(ones(1 + odd), ones(P * (1 + odd)), 0),
        lambda: ours.Gather(ones(1), ones(P), int(odd)),
        lambda: mpicoll.gather(ones(1, "i8" if odd else "f8"), ours),
        lambda: mpicoll.gather(ones(2).reshape(1, 2) if odd else ones(2).reshape(2, 1), ours),
        lambda: ours.Scatter(ones(P), ones(1 + odd), 0) if not odd else ours.Scatter(None, ones(2), 0),
        lambda: ours.Gather(ones(1), ones(P)) if odd else ours.Scatter(ones(P), ones(1)),
    ):
        with pytest.raises(mpicoll.MismatchError):
            call()
