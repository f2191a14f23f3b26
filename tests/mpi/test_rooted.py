"""The contract of every reduce and broadcast, over every row of the table and several roots."""

from typing import Any

import numpy as np
import pytest
from ml_dtypes import bfloat16
from mpi4py import MPI

import mpicoll
from contract import assert_untouched, composition, guarded, maps, own_data
from mpicoll.algorithms import ALGORITHMS
from mpicoll.interpreter import interpret_arrays
from mpicoll.mpi import operations, paths, plan

pytestmark = pytest.mark.mpi
P = MPI.COMM_WORLD.size
ROOTS = sorted({0, 1 % P, P - 1})
COUNTS = sorted({0, 1, P - 1, P, P + 1, 997, 65537})
SHARED = ["shared"] if P > 1 else []  # with one rank there is nothing to share
REDUCES = [*ALGORITHMS["reduce"], "native", "auto", *SHARED]
BCASTS = [*ALGORITHMS["bcast"], "native", "auto", *SHARED]


@pytest.mark.parametrize("root", ROOTS)
@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("name", REDUCES)
def test_sums_arrive_at_the_root_and_nothing_else_is_touched(comm, name, count, root):
    ours = mpicoll.Comm(comm)
    data = own_data(count, comm.rank)
    native = np.empty(count) if comm.rank == root else None
    MPI.Intracomm.Reduce(comm, data, native, root=root)
    expected = sum(own_data(count, rank) for rank in range(P))
    for _ in range(2):
        x, around = guarded(data)
        assert mpicoll.reduce(x, comm, root, algorithm=name) is x
        np.testing.assert_array_equal(x, expected if comm.rank == root else data)
        assert_untouched(around)

        sent, around = guarded(data)
        received, around_received = guarded(np.full(count, -1.0))
        sent.flags.writeable = False
        ours.Reduce(sent, received if comm.rank == root else None, root=root, algorithm=name)
        np.testing.assert_array_equal(received, expected if comm.rank == root else -1)
        if native is not None:
            np.testing.assert_array_equal(received, native)
        np.testing.assert_array_equal(sent, data)
        assert_untouched(around)
        assert_untouched(around_received)

        x, around = guarded(data)
        if comm.rank == root:
            ours.Reduce(MPI.IN_PLACE, x, MPI.SUM, root, name)
        else:
            ours.Reduce(x, None, MPI.SUM, root, name)
        np.testing.assert_array_equal(x, expected if comm.rank == root else data)
        assert_untouched(around)


@pytest.mark.parametrize("dtype", ["i1", "u2", "i8", "f4", "g", "c8", "e", bfloat16])
@pytest.mark.parametrize("name", [name for name in REDUCES if name != "native"])
def test_operations_and_dtypes(comm, name, dtype):
    root = P // 2
    everyones = [own_data(101, rank, dtype) for rank in range(P)]
    wide = [data.astype("c16") if np.dtype(dtype).kind == "c" else data.astype("f8") for data in everyones]
    for op in ("sum", "mean", "max"):
        if op == "max" and np.dtype(dtype).kind == "c":
            continue
        expected = np.max(wide, axis=0) if op == "max" else np.sum(wide, axis=0)
        if op == "mean":
            expected = np.rint(expected / P) if np.dtype(dtype).kind in "iu" else (expected / P)
        x = everyones[comm.rank].copy()
        mpicoll.reduce(x, comm, root, op, name)
        if comm.rank == root:
            np.testing.assert_allclose(x.astype(expected.dtype), expected, rtol=1e-2 if dtype == bfloat16 else 1e-3)
            if op != "mean":
                np.testing.assert_array_equal(x.astype(expected.dtype), expected)
        else:
            assert x.tobytes() == everyones[comm.rank].tobytes()


@pytest.mark.parametrize("dtype", ["f4", "e", "c16"])
def test_deterministic_sums_are_the_same_at_every_root_and_everywhere(comm, dtype):
    rng = np.random.default_rng(comm.rank)
    data = (rng.normal(size=999) * 10.0 ** rng.integers(-3, 3, size=999)).astype(dtype)
    expected = data.copy()
    mpicoll.allreduce(expected, comm, deterministic=True)
    ours = mpicoll.Comm(comm, deterministic=True)
    for root in range(P):
        for name in ("tree", "auto"):
            x = data.copy()
            mpicoll.reduce(x, ours, root, algorithm=name)
            assert x.tobytes() == (expected if comm.rank == root else data).tobytes()
            y = np.zeros_like(data)
            ours.Reduce(data, y if comm.rank == root else None, root=root, algorithm=name)
            assert comm.rank != root or y.tobytes() == expected.tobytes()
    for name in ("chain", "double_tree", "native"):
        with pytest.raises(ValueError, match=f"{name} is not deterministic: expected tree"):
            mpicoll.reduce(data, ours, 0, algorithm=name)


@pytest.mark.parametrize("name", REDUCES)
def test_operations_that_do_not_commute_come_out_by_rank_or_are_refused(comm, name):
    everyones, expected = maps(100, P)
    composing = composition()
    for root in ROOTS:
        x = everyones[comm.rank].copy()
        if name == "chain":
            with pytest.raises(ValueError, match="the operation does not commute: expected tree, double_tree"):
                mpicoll.reduce(x, comm, root, composing, name)
        else:
            mpicoll.reduce(x, comm, root, composing, name)
            np.testing.assert_array_equal(x, expected if comm.rank == root else everyones[comm.rank])
    composing.Free()


@pytest.mark.parametrize("row", ALGORITHMS["reduce"].values(), ids=lambda row: row.name)
def test_the_root_ends_with_the_bits_of_the_interpreter(comm, row):
    everyones = [np.random.default_rng(rank).normal(size=1003).astype("f4") for rank in range(P)]
    given = {"segments": 4} if "segments" in row.parameters else {}
    for root in ROOTS:
        expected = interpret_arrays(row.schedule(P, root=root, **given), everyones, np.add)[root]
        x = everyones[comm.rank].copy()
        mpicoll.reduce(x, comm, root, algorithm=row.name, **given)
        assert x.tobytes() == (expected if comm.rank == root else everyones[comm.rank]).tobytes()


def test_lists_scalars_and_the_tree_by_name(comm):
    root = P - 1
    arrays = [own_data(3, comm.rank), own_data(4, comm.rank, "i4"), own_data(2, comm.rank)]
    before = [array.copy() for array in arrays]
    assert mpicoll.reduce(arrays, comm, root, algorithm="chain") is arrays
    for array, own in zip(arrays, before, strict=True):
        total = sum(own_data(len(own), rank) for rank in range(P))
        np.testing.assert_array_equal(array, total if comm.rank == root else own)
    got = mpicoll.tree_reduce(comm.rank, comm, root)
    assert got == (P * (P - 1) // 2 if comm.rank == root else comm.rank)


@pytest.mark.parametrize("root", ROOTS)
@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("name", BCASTS)
def test_everybody_ends_with_what_the_root_holds(comm, name, count, root):
    ours = mpicoll.Comm(comm)
    expected = own_data(count, root)
    x, around = guarded(own_data(count, comm.rank))
    assert mpicoll.bcast(x, comm, root, name) is x
    np.testing.assert_array_equal(x, expected)
    assert_untouched(around)
    x, around = guarded(own_data(count, comm.rank))
    if comm.rank == root:
        x.flags.writeable = False
    ours.Bcast(x, root, name)
    np.testing.assert_array_equal(x, expected)
    assert_untouched(around)


@pytest.mark.parametrize("name", BCASTS)
def test_data_of_any_kind_are_broadcast(comm, name):
    root = P - 1
    kinds = [np.array(["a", "bcd"]), np.array([b"x", b"yz"]), np.array([(1, 2.5)], "i4,f8"), np.array([True, False])]
    kinds += [np.array([1, 2], "e"), np.array([1, 2], bfloat16), np.array(["2026-11-23"], "M8[D]"), np.array(7j)]
    for kind in kinds:
        x = kind.copy() if comm.rank == root else np.zeros_like(kind)
        mpicoll.bcast(x, comm, root, name)
        assert x.tobytes() == kind.tobytes()
    arrays = [np.full(3, comm.rank), np.full(2, float(comm.rank)), np.full(4, comm.rank)]
    mpicoll.bcast(arrays, comm, root, name)
    assert all((array == root).all() for array in arrays)
    pair = MPI.INT.Create_contiguous(2).Commit()
    y = np.full(4, comm.rank, "i4")
    if name in ("auto", "native"):
        mpicoll.Comm(comm).Bcast([y, 2, pair], root, name)
        assert (y == root).all()
    else:
        with pytest.raises(TypeError, match="derived MPI datatypes"):
            mpicoll.Comm(comm).Bcast([y, 2, pair], root, name)
    pair.Free()
    with pytest.raises(TypeError, match=r"use comm.bcast, in lower case"):
        mpicoll.bcast(np.array([None]), comm, root, name)


def test_roots_that_are_none_are_refused(comm):
    ours = mpicoll.Comm(comm)
    for root in (-1, P):
        message = f"root must be one of {P} ranks, got {root}"
        for call in (
            lambda root=root: mpicoll.reduce(np.zeros(3), comm, root),
            lambda root=root: mpicoll.bcast(np.zeros(3), comm, root),
            lambda root=root: ours.Reduce(np.zeros(3), np.zeros(3), root=root, algorithm="tree"),
            lambda root=root: ours.Bcast(np.zeros(3), root, "tree"),
        ):
            with pytest.raises(ValueError, match=message):
                call()
    with pytest.raises(ValueError, match="unknown bcast algorithm 'ring': expected tree, chain, double_tree, scatter_"):
        mpicoll.bcast(np.zeros(3), comm, algorithm="ring")


@pytest.mark.parametrize("name", [*ALGORITHMS["reduce"], "native"])
def test_counts_past_a_limit_go_in_pieces(comm, name, monkeypatch):
    monkeypatch.setattr(operations, "MAX_COUNT", 1000)
    monkeypatch.setattr(plan, "MAX_MESSAGE", 1000)
    x = own_data(5003, comm.rank)
    mpicoll.reduce(x, comm, P - 1, algorithm=name)
    expected = sum(own_data(5003, rank) for rank in range(P))
    np.testing.assert_array_equal(x, expected if comm.rank == P - 1 else own_data(5003, comm.rank))
    mpicoll.bcast(x, comm, P - 1, "native" if name == "native" else "scatter_allgather")
    np.testing.assert_array_equal(x, expected)


def test_a_plain_large_reduce_goes_in_pieces_too(comm, monkeypatch):
    """Not from the short way of small calls straight to the MPI library."""
    monkeypatch.setattr(operations, "MAX_COUNT", 1 << 19)
    counts, native = [], paths.specification

    def counting(piece: Any) -> Any:
        counts.append(len(piece))
        return native(piece)

    monkeypatch.setattr(paths, "specification", counting)
    root, x = P - 1, np.full((1 << 20) + 1, comm.rank + 1.0)
    received = np.empty_like(x) if comm.rank == root else None
    ours = mpicoll.Comm(comm)
    monkeypatch.setattr(ours._state, "shares", False)
    ours._state.follow({})
    ours.Reduce(x, received, root=root)
    assert counts == [1 << 19] * (4 if received is not None else 2) + [1] * (2 if received is not None else 1)
    assert received is None or (received == P * (P + 1) / 2).all()


def test_while_a_handle_is_under_way(comm):
    """Rank 0 waits for the handle first, the others reduce and broadcast first."""
    ours = mpicoll.Comm(comm)
    other = ours.Dup()
    for name in ("auto", "tree"):
        x, y = own_data(50, comm.rank), own_data(50, comm.rank)
        handle = mpicoll.iallreduce(x, ours, algorithm="ring")
        if comm.rank == 0:
            handle.wait()
        mpicoll.reduce(y, other, P - 1, algorithm=name)
        other.Bcast(y, P - 1, name)
        handle.wait()
        np.testing.assert_array_equal(x, sum(own_data(50, rank) for rank in range(P)))
        np.testing.assert_array_equal(y, x)
    other.Free()
