"""The contract of every reduce-scatter and allgather, over every row of the table, with even and uneven counts."""

from typing import Any

import numpy as np
import pytest
from ml_dtypes import bfloat16
from mpi4py import MPI

import mpicoll
from contract import assert_untouched, composition, guarded, maps, own_data
from mpicoll.algorithms import ALGORITHMS
from mpicoll.mpi import plan

pytestmark = pytest.mark.mpi
P = MPI.COMM_WORLD.size
SHARED = ["shared"] if P > 1 else []  # with one rank there is nothing to share
SCATTERS = [*ALGORITHMS["reduce_scatter"], "native", "auto", *SHARED]
GATHERS = [*ALGORITHMS["allgather"], "native", "auto", *SHARED]
COUNTS = {
    "one": [1] * P,
    "none": [0] * P,
    "even": [97] * P,
    "uneven": [(rank * 5) % 7 + rank % 2 for rank in range(P)],
    "only the last": [0] * (P - 1) + [11],
    "large": [20011 + rank for rank in range(P)],
}


def total(count: int, dtype: Any = np.float64) -> np.ndarray:
    return np.sum([own_data(count, rank) for rank in range(P)], axis=0, dtype=dtype)


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize("name", SCATTERS)
def test_each_rank_gets_its_part_of_the_sum(comm, name, counts):
    ours = mpicoll.Comm(comm)
    count, first = sum(counts), sum(counts[: comm.rank])
    expected = total(count)[first : first + counts[comm.rank]]
    sent, around_sent = guarded(own_data(count, comm.rank))
    sent.flags.writeable = False
    for _ in range(2):
        np.testing.assert_array_equal(mpicoll.reduce_scatter(sent, comm, counts, algorithm=name), expected)
        received, around = guarded(np.full(counts[comm.rank], -1.0))
        ours.Reduce_scatter(sent, received, counts, algorithm=name)
        np.testing.assert_array_equal(received, expected)
        assert_untouched(around)
        if name != "native":  # which crashes in MPICH 5.0.2, at 4 ranks and more, where counts are large and uneven
            in_place, around = guarded(own_data(count, comm.rank))
            ours.Reduce_scatter(MPI.IN_PLACE, in_place, counts, MPI.SUM, name)
            np.testing.assert_array_equal(in_place[: counts[comm.rank]], expected)
            assert_untouched(around)
        if len(set(counts)) == 1:
            received, around = guarded(np.full(counts[0], -1.0))
            ours.Reduce_scatter_block(sent, received, algorithm=name)
            np.testing.assert_array_equal(received, expected)
            assert_untouched(around)
            in_place, around = guarded(own_data(count, comm.rank))
            ours.Reduce_scatter_block(MPI.IN_PLACE, in_place, MPI.SUM, name)
            np.testing.assert_array_equal(in_place[: counts[0]], expected)
            assert_untouched(around)
    np.testing.assert_array_equal(sent, own_data(count, comm.rank))
    assert_untouched(around_sent)


@pytest.mark.parametrize("count", [0, 1, P - 1, P + 1, 101])
@pytest.mark.parametrize("name", SCATTERS)
def test_without_counts_parts_are_equal_to_one_element(comm, name, count):
    x = own_data(count, comm.rank).reshape(-1, 1)
    part = mpicoll.reduce_scatter(x, comm, algorithm=name)
    np.testing.assert_array_equal(np.concatenate(comm.allgather(part)), total(count))
    assert abs(len(part) - count / P) < 1


@pytest.mark.parametrize("dtype", ["i2", "f4", "c16", "e", bfloat16])
@pytest.mark.parametrize("name", [name for name in SCATTERS if name != "native"])
def test_operations_and_dtypes(comm, name, dtype):
    counts = COUNTS["uneven"]
    mine = slice(sum(counts[: comm.rank]), sum(counts[: comm.rank + 1]))
    x = own_data(sum(counts), comm.rank, dtype) * np.array(P, dtype)
    for op in ("sum", "mean"):
        part = mpicoll.reduce_scatter(x, comm, counts, op, name)
        expected = total(sum(counts))[mine] * (P if op == "sum" else 1)
        assert part.dtype == x.dtype
        np.testing.assert_array_equal(part.astype("c16"), expected)
    part = np.empty(counts[comm.rank], dtype)
    mpicoll.Comm(comm).Reduce_scatter(x, part, counts, algorithm=name)
    np.testing.assert_array_equal(part.astype("c16"), total(sum(counts))[mine] * P)


@pytest.mark.parametrize("dtype", ["f4", "e", "c16"])
def test_deterministic_parts_have_the_bits_of_the_whole(comm, dtype):
    rng = np.random.default_rng(comm.rank)
    counts = COUNTS["uneven"]
    mine = slice(sum(counts[: comm.rank]), sum(counts[: comm.rank + 1]))
    data = (rng.normal(size=sum(counts)) * 10.0 ** rng.integers(-3, 3, size=sum(counts))).astype(dtype)
    whole = mpicoll.allreduce(data.copy(), comm, deterministic=True)
    ours = mpicoll.Comm(comm, deterministic=True)
    for name in ("halving", "auto"):
        assert mpicoll.reduce_scatter(data, ours, counts, algorithm=name).tobytes() == whole[mine].tobytes()
        part = np.empty(counts[comm.rank], dtype)
        ours.Reduce_scatter(data, part, counts, algorithm=name)
        assert part.tobytes() == whole[mine].tobytes()
    for name in ("ring", "circulant", "native"):
        with pytest.raises(ValueError, match=f"{name} is not deterministic: expected halving"):
            mpicoll.reduce_scatter(data, ours, counts, algorithm=name)


@pytest.mark.parametrize("name", SCATTERS)
def test_operations_that_do_not_commute_come_out_by_rank_or_are_refused(comm, name):
    everyones, expected = maps(3 * P, P)
    composing = composition()
    if name in ("ring", "circulant"):
        with pytest.raises(ValueError, match="the operation does not commute: expected halving"):
            mpicoll.reduce_scatter(everyones[comm.rank], comm, op=composing, algorithm=name)
    else:
        part = mpicoll.reduce_scatter(everyones[comm.rank], comm, op=composing, algorithm=name)
        np.testing.assert_array_equal(part, expected[3 * comm.rank : 3 * comm.rank + 3])
    composing.Free()


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize("name", GATHERS)
def test_everybody_ends_with_all_parts(comm, name, counts):
    ours = mpicoll.Comm(comm)
    expected = np.concatenate([own_data(count, rank) for rank, count in enumerate(counts)])
    mine, around_mine = guarded(own_data(counts[comm.rank], comm.rank))
    mine.flags.writeable = False
    for _ in range(2):
        np.testing.assert_array_equal(mpicoll.allgather(mine, comm, counts, name), expected)
        received, around = guarded(np.full(sum(counts), -1.0))
        ours.Allgatherv(mine, [received, counts], name)
        np.testing.assert_array_equal(received, expected)
        assert_untouched(around)
        first = sum(counts[: comm.rank])
        received[:] = -1
        received[first : first + counts[comm.rank]] = mine
        ours.Allgatherv(MPI.IN_PLACE, [received, counts, MPI.DOUBLE], name)
        np.testing.assert_array_equal(received, expected)
        assert_untouched(around)
        if len(set(counts)) == 1:
            np.testing.assert_array_equal(mpicoll.allgather(mine, comm, algorithm=name), expected.reshape(P, -1))
            received, around = guarded(np.full(sum(counts), -1.0))
            ours.Allgather(mine, received, name)
            np.testing.assert_array_equal(received, expected)
            assert_untouched(around)
            received, around = guarded(np.full(sum(counts), -1.0))
            received[comm.rank * counts[0] : (comm.rank + 1) * counts[0]] = mine
            ours.Allgather(MPI.IN_PLACE, received, name)
            np.testing.assert_array_equal(received, expected)
            assert_untouched(around)
    assert_untouched(around_mine)


@pytest.mark.parametrize("name", GATHERS)
def test_blocks_may_lie_anywhere_in_the_receive_buffer(comm, name):
    """The last rank's block first, and a gap of two before each."""
    ours, counts = mpicoll.Comm(comm), COUNTS["uneven"]
    starts = [sum(counts[rank + 1 :]) + 2 * (P - rank) for rank in range(P)]
    expected = np.full(sum(counts) + 2 * P + 3, -1.0)
    for rank, start in enumerate(starts):
        expected[start : start + counts[rank]] = own_data(counts[rank], rank)
    mine = own_data(counts[comm.rank], comm.rank)
    for rest in (
        [(counts, starts)],
        [(counts, starts), MPI.DOUBLE],
        [counts, starts, MPI.DOUBLE],
        [counts, starts, "d"],
    ):
        received = np.full(len(expected), -1.0)
        ours.Allgatherv(mine, [received, *rest], name)
        np.testing.assert_array_equal(received, expected)
        received[:] = -1
        received[starts[comm.rank] :][: len(mine)] = mine
        ours.Allgatherv(MPI.IN_PLACE, [received, *rest], name)
        np.testing.assert_array_equal(received, expected)


@pytest.mark.parametrize("name", ALGORITHMS["allgather"])
def test_every_form_of_blocks_is_read_as_mpi4py_reads_it(comm, name):
    ours = mpicoll.Comm(comm)
    forms: list[Any] = [
        lambda b: b[: 2 * P],
        lambda b: [b[: 2 * P], MPI.DOUBLE],
        lambda b: [b[: 2 * P], None],
        lambda b: [b[: 2 * P], None, "d"],
        lambda b: [b, 2],
        lambda b: [b, 2, MPI.DOUBLE],
        lambda b: [b, (2, 3)],  # a stride
        lambda b: [b, (2, 3), "d"],
        lambda b: [b, (2, None)],
        lambda b: [b, (2, list(range(0, 3 * P, 3)))],
        lambda b: [b, 2, 3, MPI.DOUBLE],
        lambda b: [b, [2] * P, list(range(0, 3 * P, 3)), None],
        lambda b: [b, np.full(P, 2), None, "d"],
        lambda b: [b[: 2 * P], (None, list(range(0, 2 * P, 2)))],
    ]
    for form in forms:
        native, own = np.full(3 * P, -1.0), np.full(3 * P, -1.0)
        comm.Allgatherv(np.full(2, float(comm.rank)), form(native))
        ours.Allgatherv(np.full(2, float(comm.rank)), form(own), name)
        np.testing.assert_array_equal(own, native)
    some = [0] * P
    ours.Allgatherv(np.zeros(0), [np.zeros(0), (some, [10**6] * P)], name)  # nothing goes beyond


@pytest.mark.parametrize("name", GATHERS)
def test_data_of_any_kind_are_gathered(comm, name):
    for kind in (np.array(["a", "bcd"]), np.array([(1, 2.5)], "i4,f8"), np.array([[True, False]]), np.array(2, "e")):
        np.testing.assert_array_equal(mpicoll.allgather(kind, comm, algorithm=name), np.stack([kind] * P))
    with pytest.raises(TypeError, match=r"use comm.allgather, in lower case"):
        mpicoll.allgather(np.array([None]), comm, algorithm=name)


class Exporter:
    """An array that tells its shape by DLPack alone."""

    def __init__(self, array: np.ndarray) -> None:
        self._array = array

    def __dlpack__(self, **options: Any) -> Any:
        return self._array.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0


class InHostMemory:
    """What says that it is on a GPU, though its memory is the host's."""

    def __init__(self, array: np.ndarray) -> None:
        self.__cuda_array_interface__ = {"version": 3, **array.__array_interface__}
        self._array = array


EXPORTS: dict[str, Any] = {"dlpack": Exporter, "cuda": InHostMemory, "memoryview": memoryview, "numpy": np.asarray}


@pytest.mark.parametrize("export", EXPORTS.values(), ids=EXPORTS)
@pytest.mark.parametrize("order", ["row by row", "column by column", "one column", "no dimension"])
def test_arrays_of_any_library_keep_their_shape_and_order(comm, export, order):
    shape = {"one column": (4, 1), "no dimension": ()}.get(order, (2, 3))
    layout: Any = "F" if order == "column by column" else "C"
    arrays = [
        np.array(own_data(6, rank)[: np.prod(shape, dtype=int)].reshape(shape), order=layout) for rank in range(P)
    ]
    given, ours = export(arrays[comm.rank]), mpicoll.Comm(comm)
    np.testing.assert_array_equal(mpicoll.allgather(given, comm), arrays)
    np.testing.assert_array_equal(ours.allreduce_shared(given), np.sum(arrays, axis=0))
    result = np.array(arrays[comm.rank], order=layout)
    mpicoll.allreduce(export(result), comm, check="full")
    np.testing.assert_array_equal(result, np.sum(arrays, axis=0))


def test_the_librarys_own_takes_what_it_takes_without_counts_and_of_16_bits(comm):
    """A rank may have no room for a derived type; float16 is added by the MPI library where that is asked for."""
    ours, double = mpicoll.Comm(comm), MPI.DOUBLE.Create_contiguous(1).Commit()
    add = MPI.Op.Create(lambda a, b, t: np.add(np.frombuffer(a), np.frombuffer(b), np.frombuffer(b)), commute=True)
    rooms = [0 if rank == 1 else 2 for rank in range(P)]
    sent, room = own_data(sum(rooms), comm.rank), np.zeros(rooms[comm.rank])
    ours.Reduce_scatter([sent, double], [room, double], op=add)
    first = sum(rooms[: comm.rank])
    np.testing.assert_array_equal(room, total(sum(rooms))[first : first + len(room)])
    double.Free()
    add.Free()
    if MPI.get_vendor()[0] == "MPICH":
        halves = np.zeros(1, "e")
        ours.Reduce_scatter(np.ones(P, "e"), halves, [1] * P, algorithm="native")
        assert halves[0] == P
        ours.Reduce_scatter_block(np.ones(P, "e"), halves, algorithm="native")
        assert halves[0] == P


def test_counts_that_do_not_fit_are_refused(comm):
    ours = mpicoll.Comm(comm)
    for counts in ([1] * (P + 1), [-1] + [1] * (P - 1), []):
        with pytest.raises(ValueError, match=f"expected a count of 0 or more for each of {P} ranks"):
            mpicoll.reduce_scatter(np.zeros(P), comm, counts)
        with pytest.raises(ValueError, match=f"expected a count of 0 or more for each of {P} ranks"):
            mpicoll.allgather(np.zeros(1), comm, counts)
    with pytest.raises(ValueError, match=f"counts sum to {P}, the array has {P + 1} elements"):
        mpicoll.reduce_scatter(np.zeros(P + 1), comm, [1] * P)
    with pytest.raises(ValueError, match=f"rank {comm.rank} brings 3 elements, counts say 1"):
        mpicoll.allgather(np.zeros(3), comm, [1] * P)
    with pytest.raises(ValueError, match=f"expected {2 * P} elements to send and room for 2 of the same dtype, got"):
        ours.Reduce_scatter(np.zeros(P), np.zeros(2), [2] * P, algorithm="ring")
    with pytest.raises(ValueError, match=f"expected a count of 0 or more for each of {P} ranks"):
        ours.Reduce_scatter(MPI.IN_PLACE, np.zeros(P), algorithm="ring")
    with pytest.raises(ValueError, match=f"expected {P} times what is sent, got room for {P + 1} of float64"):
        ours.Allgather(np.zeros(1), np.zeros(P + 1), "ring")
    twos, x = [2] * P, np.zeros(2 * P)
    for wrong, message in (
        ([x, twos, twos, twos, "d"], r"\[buffer, counts, displacements, datatype\], .* got a list of 5"),
        (np.zeros(P), "expected 1 elements of float64 to send, as counts say, got 2 of float64"),
        ([x, [2] * (P + 1)], f"go beyond|expected a count of 0 or more for each of {P} ranks"),
        ([x, [3] * P], f"go beyond the {2 * P} elements of the buffer"),
        ([x, (twos, [-1] * P)], f"go beyond the {2 * P} elements of the buffer"),
        ([x, (twos, [0] * (P + 1))], f"expected as many displacements as counts, {P}, got {P + 1}"),
        ([x.astype("f4"), twos], "expected 2 elements of float32 to send, as counts say, got 2 of float64"),
        ([x, [1] * P], "expected 1 elements of float64 to send, as counts say, got 2 of float64"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            ours.Allgatherv(np.zeros(2), wrong, "ring")
    with pytest.raises(ValueError, match="unknown allgather algorithm 'tree': expected ring, doubling, bruck, circ"):
        mpicoll.allgather(np.zeros(3), comm, algorithm="tree")


@pytest.mark.parametrize("name", ALGORITHMS["reduce_scatter"])
def test_long_pieces_travel_as_several_messages(comm, name, monkeypatch):
    monkeypatch.setattr(plan, "MAX_MESSAGE", 1000)
    x = own_data(5003, comm.rank)
    part = mpicoll.reduce_scatter(x, comm, algorithm=name)
    whole = mpicoll.allgather(part, comm, comm.allgather(len(part)), "bruck")
    np.testing.assert_array_equal(whole, total(5003))
