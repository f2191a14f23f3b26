"""Memory that the ranks of a node share: whatever kinds of arrays meet, the results are right, and nothing waits for
ever.  Boxes and tiles are made small, so that few elements are many tiles."""

import gc
import time
import warnings
from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import pytest
from ml_dtypes import bfloat16
from mpi4py import MPI

import mpicoll
from contract import assert_untouched, composition, guarded, maps, own_data
from mpicoll.collective import Collective
from mpicoll.mpi import memory, select, shared, sharing
from mpicoll.mpi.memory import place_of
from mpicoll.mpi.shared import Node
from mpicoll.mpi.state import State, state_of

P = MPI.COMM_WORLD.size
BOX, TILE, FROM = 4096, 2048, 512  # bytes
NATIVE_UP_TO = FROM // 8 - 1  # float64
COUNTS = sorted({0, 1, P - 1, P, P + 1, 997, FROM // 8, FROM // 8 + 1, TILE // 8 + 1, BOX // 8 + 1, 3 * BOX // 8 + 5})
KINDS = "shared", "private", "mixed", "views"

pytestmark = [
    pytest.mark.mpi,
    pytest.mark.usefixtures("python_engine"),
    pytest.mark.skipif(P in (6, 7), reason="five ranks and eight show it"),
]
several = pytest.mark.skipif(P == 1, reason="one rank has nobody to share with")


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared, "BOX", BOX)
    monkeypatch.setattr(shared, "TILE", TILE)
    for collective in select.SHARED_FROM:
        monkeypatch.setitem(select.SHARED_FROM, collective, FROM)


@pytest.fixture
def ours(comm: MPI.Intracomm) -> mpicoll.Comm:
    return mpicoll.Comm(comm)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was done in shared memory."""
    done: list[str] = []
    run = Node.run

    def counted(self: Node, row: Collective, *args: Any, **more: Any) -> bool:
        did = run(self, row, *args, **more)
        done.extend([row.name] * did)
        return did

    monkeypatch.setattr(Node, "run", counted)
    return done


def laid(ours: mpicoll.Comm, kind: str, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A copy of ``values`` in memory of that kind, and the larger array, of 77s, that it lies in; a collective call."""
    offset = 3 * ours.rank if kind == "views" else 0
    around = ours.full(len(values) + 16 + offset, 77, values.dtype)[offset:]
    if kind == "private" or (kind == "mixed" and ours.rank % 2):
        around = np.full(len(values) + 16, 77, values.dtype)
    around[8:-8] = values
    return around[8:-8], around


def late(ours: MPI.Intracomm, rank: int, seconds: float = 0.3) -> None:
    time.sleep(seconds * (ours.rank == rank))


@pytest.mark.parametrize("recv_kind", KINDS)
@pytest.mark.parametrize("send_kind", ["in place", *KINDS])
def test_allreduce_of_every_kind_of_array(ours, runs, send_kind, recv_kind):
    for count in COUNTS:
        everyones = [own_data(count, rank) for rank in range(P)]
        data, total = everyones[ours.rank], sum(everyones)
        recv, around = laid(ours, recv_kind, data if send_kind == "in place" else np.full(count, -1.0))
        if send_kind == "in place":
            ours.Allreduce(MPI.IN_PLACE, recv)
        else:
            send, around_sent = laid(ours, send_kind, data)
            send.flags.writeable = False
            for _ in range(2):  # again: by what was compiled
                recv[:] = -1
                ours.Allreduce(send, recv)
            np.testing.assert_array_equal(send, data)
            assert_untouched(around_sent)
        np.testing.assert_array_equal(recv, total, err_msg=str(count))
        assert_untouched(around)
    calls = sum(count > NATIVE_UP_TO for count in COUNTS) * (1 if send_kind == "in place" else 2)
    assert len(runs) == (calls if P > 1 else 0)


@pytest.mark.parametrize(
    ("kind", "dtype"), [*product(KINDS, ["f8", bfloat16]), *(("mixed", dtype) for dtype in ("f4", "i4", "c16", "e"))]
)
@several
@pytest.mark.skipif(P == 4, reason="takes long, and 2, 3 and 5 ranks show it")
def test_bits_are_those_of_recursive_doubling(ours, runs, kind, dtype):
    rng = np.random.default_rng(ours.rank)
    for op in ("sum", "mean", "prod", *(["max"] if dtype != "c16" else [])):
        for count in (1, P + 1, 997, 3 * BOX // 8 + 5):
            data = (rng.normal(size=count) * 30).astype(dtype)
            if dtype == "c16":
                data += 1j * rng.normal(size=count)
            expected = mpicoll.allreduce(data.copy(), ours, op, "recursive_doubling")
            x, around = laid(ours, kind, data)
            for _ in range(2):
                x[:] = data
                mpicoll.allreduce(x, ours, op, "shared")
                assert x.tobytes() == expected.tobytes(), (op, count)
            assert_untouched(around)
            x[:] = data
            assert ours.allreduce_shared(x, op).tobytes() == expected.tobytes()
            if dtype != "i4":
                mpicoll.allreduce(x, ours, op, deterministic=True)
                assert x.tobytes() == expected.tobytes()
            root = count % P
            x[:] = data
            mpicoll.reduce(x, ours, root, op, "shared")
            assert x.tobytes() == (expected if ours.rank == root else data).tobytes()
            x[:] = data
            part = mpicoll.reduce_scatter(x, ours, None, op, "shared")
            assert np.concatenate(ours.allgather(part)).tobytes() == expected.tobytes()
    assert "allreduce" in runs


@several
def test_deterministic_bits_do_not_depend_on_the_length(ours):
    longest = COUNTS[-1]
    data = np.random.default_rng(ours.rank).normal(size=longest)
    whole = mpicoll.allreduce(data.copy(), ours, algorithm="recursive_doubling")
    for count in COUNTS:
        x = data[:count].copy()
        ours.Allreduce(MPI.IN_PLACE, x, deterministic=True)
        assert x.tobytes() == whole[:count].tobytes()
        x[:] = data[:count]
        mpicoll.iallreduce(x, ours, deterministic=True).wait()
        assert x.tobytes() == whole[:count].tobytes()


@pytest.mark.parametrize("kind", KINDS)
@several
def test_operations_that_do_not_commute_and_pairs(ours, runs, kind):
    op = composition()
    for count in (1, P, 1009):
        own, composed = maps(count, P)
        x, around = laid(ours, kind, own[ours.rank])
        ours.Allreduce(MPI.IN_PLACE, x, op, algorithm="shared")
        np.testing.assert_array_equal(x, composed)
        x[:] = own[ours.rank]
        ours.Reduce(MPI.IN_PLACE if ours.rank == P - 1 else x, x, op, P - 1, algorithm="shared")
        np.testing.assert_array_equal(x, composed if ours.rank == P - 1 else own[ours.rank])
        assert_untouched(around)
    op.Free()
    pairs = np.zeros(1009, "d,i")
    pairs = np.zeros(1009, np.dtype([("f0", "f8"), ("f1", "i4")], align=True))
    pairs["f0"], pairs["f1"] = (np.arange(1009) + ours.rank) % P, ours.rank
    ours.Allreduce(MPI.IN_PLACE, [pairs, MPI.DOUBLE_INT], MPI.MAXLOC, algorithm="shared")
    np.testing.assert_array_equal(pairs["f0"], P - 1)
    np.testing.assert_array_equal(pairs["f1"], (P - 1 - np.arange(1009)) % P)
    assert len(runs) == 7


@pytest.mark.parametrize(
    ("send_kind", "recv_kind"),
    [
        *(("shared", "shared"), ("private", "private"), ("shared", "private")),
        *(("private", "shared"), ("mixed", "views"), ("views", "mixed")),
    ],
)
def test_reduce_to_every_root(ours, runs, send_kind, recv_kind):
    for root in range(P):
        for count in (0, P, 997, COUNTS[-1]):
            everyones = [own_data(count, rank) for rank in range(P)]
            send, around_sent = laid(ours, send_kind, everyones[ours.rank])
            recv, around = laid(ours, recv_kind, np.full(count, -1.0))
            ours.Reduce(send, recv if ours.rank == root else None, root=root)
            np.testing.assert_array_equal(recv, sum(everyones) if ours.rank == root else -1)
            np.testing.assert_array_equal(send, everyones[ours.rank])
            ours.Reduce(MPI.IN_PLACE if ours.rank == root else send, send if ours.rank == root else None, root=root)
            np.testing.assert_array_equal(send, sum(everyones) if ours.rank == root else everyones[ours.rank])
            assert_untouched(around)
            assert_untouched(around_sent)
    assert len(runs) == (4 * P if P > 1 else 0)


@pytest.mark.parametrize("kind", KINDS)
def test_bcast_from_every_root(ours, runs, kind):
    for root in range(P):
        for count in COUNTS:
            x, around = laid(ours, kind, own_data(count, ours.rank) + 1000 * ours.rank)
            if ours.rank == root:
                x.flags.writeable = False
            ours.Bcast(x, root)
            np.testing.assert_array_equal(x, own_data(count, root) + 1000 * root)
            assert_untouched(around)
    if kind not in ("private", "mixed"):  # which the MPI library moves with one copy less
        assert len(runs) == (P * sum(count > NATIVE_UP_TO for count in COUNTS) if P > 1 else 0)


def test_bcast_from_memory_in_pieces_to_memory_in_one(ours, runs):
    """The same bytes, by a derived datatype on one rank only."""
    columns = MPI.DOUBLE.Create_vector(997, 1, 2).Commit()
    x = own_data(2 * 997, ours.rank)
    root = P - 1
    ours.Bcast([x, 1, columns] if ours.rank == root else x[:997], root)
    np.testing.assert_array_equal(x[::2] if ours.rank == root else x[:997], own_data(2 * 997, root)[::2])
    columns.Free()
    assert not runs  # a copy is no shared array


UNEVEN: list[Callable[[int], int]] = [
    lambda rank: 0 if rank % 2 else 400 + rank,
    lambda rank: 997 if rank == P - 1 else 0,
    lambda rank: rank,
    lambda rank: 0,
    lambda rank: 611 * (P - rank),
]


@pytest.mark.parametrize("kind", KINDS)
def test_reduce_scatter_into_uneven_and_empty_parts(ours, runs, kind):
    for counts in ([length(rank) for rank in range(P)] for length in UNEVEN):
        start, everyones = sum(counts[: ours.rank]), [own_data(sum(counts), rank) for rank in range(P)]
        expected = np.zeros(sum(counts)) + sum(everyones)
        send, around_sent = laid(ours, kind, everyones[ours.rank])
        recv, around = laid(ours, kind, np.full(counts[ours.rank], -1.0))
        for algorithm in ["auto", *(["shared"] if P > 1 else [])]:
            recv[:] = -1
            ours.Reduce_scatter(send, recv, counts, algorithm=algorithm)
            np.testing.assert_array_equal(recv, expected[start:][: counts[ours.rank]])
            np.testing.assert_array_equal(send, everyones[ours.rank])
        assert_untouched(around)
        assert_untouched(around_sent)
    for count in COUNTS:
        everyones = [own_data(count * P, rank) for rank in range(P)]
        send, _ = laid(ours, kind, everyones[ours.rank])
        recv, around = laid(ours, kind, np.full(count, -1.0))
        ours.Reduce_scatter_block(send, recv)
        np.testing.assert_array_equal(recv, sum(everyones)[count * ours.rank :][:count])
        ours.Reduce_scatter_block(MPI.IN_PLACE, send)
        np.testing.assert_array_equal(send[:count], recv)
        assert_untouched(around)
    assert len(runs) > 2 * len(UNEVEN) or P == 1


@pytest.mark.parametrize("kind", KINDS)
def test_allgather_of_even_uneven_and_empty_parts(ours, runs, kind):
    for count in COUNTS:
        send, _ = laid(ours, kind, own_data(count, ours.rank) + 100 * ours.rank)
        send.flags.writeable = False
        recv, around = laid(ours, kind, np.full(count * P, -1.0))
        expected = np.concatenate([own_data(count, rank) + 100 * rank for rank in range(P)])
        ours.Allgather(send, recv)
        np.testing.assert_array_equal(recv, expected)
        recv[: count * ours.rank] = recv[count * (ours.rank + 1) :] = -1
        ours.Allgather(MPI.IN_PLACE, recv)
        np.testing.assert_array_equal(recv, expected)
        assert_untouched(around)
        np.testing.assert_array_equal(mpicoll.allgather(send, ours).reshape(-1), expected)
    for counts in ([length(rank) for rank in range(P)] for length in UNEVEN):
        send, _ = laid(ours, kind, own_data(counts[ours.rank], ours.rank))
        recv, around = laid(ours, kind, np.full(sum(counts), -1.0))
        expected = np.concatenate([own_data(n, rank) for rank, n in enumerate(counts)])
        for algorithm in ["auto", *(["shared"] if P > 1 else [])]:
            recv[:] = -1
            ours.Allgatherv(send, [recv, counts], algorithm)
            np.testing.assert_array_equal(recv, expected)
            assert_untouched(around)
            np.testing.assert_array_equal(mpicoll.allgather(send, ours, counts, algorithm), expected)
    assert runs or P == 1


@several
def test_views_are_found_and_reduced_where_they_are(ours):
    """Boxes are for what is not found: there are none until then."""
    base = ours.zeros((6, 200))
    node = state_of(ours).node
    views = [
        base,
        base[ours.rank % 3 + 1],
        base.T,
        base.reshape(-1)[5 : 5 + 601],
        base.view("i8"),
        base[3:].reshape(200, 3),
    ]
    for view in views:
        assert place_of(view.reshape(-1, order="A")).window
        view[...] = own_data(view.size, ours.rank).reshape(view.shape)
        ours.Allreduce(MPI.IN_PLACE, view)
        np.testing.assert_array_equal(view, sum(own_data(view.size, r) for r in range(P)).reshape(view.shape))
    assert node.boxes is None
    assert not place_of(np.zeros(3)).window
    x = np.full(601, 1.0)
    ours.Allreduce(MPI.IN_PLACE, x)
    assert (x == P).all()
    assert node.boxes is not None


@pytest.mark.parametrize("kind", KINDS)
@several
def test_what_was_compiled_is_for_the_same_call_only(ours, runs, monkeypatch, kind):
    """Calls that differ in one thing, on the same arrays, again and again: making an array would forget them all."""
    monkeypatch.setattr(shared, "KEPT", 1000)
    count = 1200
    arrays, _ = laid(ours, kind, np.zeros(2 * count))
    x, y = arrays[:count], arrays[count:]
    for _ in range(2):
        for dtype in ("f8", "i8"):
            data = [own_data(count, rank, dtype) + rank + 1 for rank in range(P)]
            send, recv = x.view(dtype), y.view(dtype)
            for root in range(P):
                for op, ufunc in ((MPI.SUM, np.add), (MPI.MAX, np.maximum)):
                    send[:], recv[:] = data[ours.rank], -1
                    ours.Reduce(send, recv, op, root)
                    np.testing.assert_array_equal(recv, ufunc.reduce(data) if ours.rank == root else -1)
                    ours.Reduce(MPI.IN_PLACE if ours.rank == root else send, send, op, root)
                    np.testing.assert_array_equal(send, ufunc.reduce(data) if ours.rank == root else data[ours.rank])
                    send[:] = data[ours.rank]
                    ours.Allreduce(send, recv, op)
                    np.testing.assert_array_equal(recv, ufunc.reduce(data))
                    ours.Allreduce(MPI.IN_PLACE, send[root:], op)
                    np.testing.assert_array_equal(send[root:], ufunc.reduce(data)[root:])
                    send[:] = data[ours.rank]
                    np.testing.assert_array_equal(ours.allreduce_shared(send, op), ufunc.reduce(data))
                ours.Bcast(send, root, "shared")
                np.testing.assert_array_equal(send, data[root])
                counts = [count // P + (rank == root) - (rank == (root + 1) % P) for rank in range(P)]
                send[:], start = data[ours.rank], sum(counts[: ours.rank])
                ours.Reduce_scatter(send[: sum(counts)], recv[: counts[ours.rank]], counts)
                np.testing.assert_array_equal(recv[: counts[ours.rank]], sum(data)[start:][: counts[ours.rank]])
    assert len(runs) == 2 * 2 * P * (2 * 5 + 2)
    assert 8 < len(state_of(ours).node.compiled) < len(runs)


def test_orders_of_memory_may_differ_between_ranks(ours):
    shape = (30, 40)
    values = [own_data(1200, rank).reshape(shape) for rank in range(P)]
    x = ours.empty(shape[::-1]).T if ours.rank % 2 else ours.empty(shape)
    x[...] = values[ours.rank] if not ours.rank % 2 else values[ours.rank].reshape(-1).reshape(shape, order="F")
    ours.Allreduce(MPI.IN_PLACE, x)  # in the order of memory
    total = sum(values)
    np.testing.assert_array_equal(x.reshape(-1, order="A"), total.reshape(-1))


@pytest.mark.parametrize("dtype", ["f4", "i8", "e"])
def test_the_one_result_for_all(ours, dtype):
    for shape in [(), (1,), (5, 0), (3, 7), (20, 50), (300, 9)]:
        data = [own_data(int(np.prod(shape)), rank, dtype).reshape(shape) for rank in range(P)]
        for x in (ours.asarray(data[ours.rank]), data[ours.rank].copy(), data[ours.rank].copy(order="F")):
            result = ours.allreduce_shared(x)
            np.testing.assert_array_equal(result, sum(data))
            np.testing.assert_array_equal(x, data[ours.rank])
            assert result.shape == shape
            assert result.dtype == dtype
            assert not result.flags.writeable
            assert result.flags.f_contiguous >= x.flags.f_contiguous
            with pytest.raises(ValueError, match="read-only"):
                result[...] = 0


@several
def test_results_alternate_between_two_places(ours):
    x = ours.full(2000, 1.0)
    results = [ours.allreduce_shared(x) for _ in range(2)]
    places = [memory.address(result) for result in results]
    assert len({*places}) == 2
    for n in range(2, 7):
        x.fill(n)
        late(ours, n % P, 0.02)  # a slow reader of the last one
        np.testing.assert_array_equal(results[-1], (n - 1) * P if n > 2 else P)
        results.append(ours.allreduce_shared(x))
        assert memory.address(results[-1]) == places[n % 2]
        np.testing.assert_array_equal(results[-1], n * P)
    before = results[-1]
    for count in (3000, 9001, 70000):  # growing: what was there stays
        grown = ours.allreduce_shared(np.full(count, 1.0))
        np.testing.assert_array_equal(grown, P)
        np.testing.assert_array_equal(before, 6 * P)


@several
def test_all_ranks_get_the_same_memory(ours):
    result = ours.allreduce_shared(ours.zeros(1000))
    if ours.rank == P - 1:
        writable = result.base
        while not writable.flags.writeable:
            writable = writable.base
        writable.reshape(-1).view("u1")[:8] = 5
    ours.Barrier()
    assert result.tobytes()[:8] == b"\5" * 8
    ours.Barrier()


def test_arrays_are_used_on_other_communicators(ours, runs):
    x = ours.empty(1009)
    halves = ours.Split(ours.rank % 2, -ours.rank)  # in another order
    subset, own = ours.Split(ours.rank < P - 1, 0), mpicoll.Comm(MPI.COMM_WORLD)
    y = subset.empty(1009)
    made = [ours.Dup(), halves, subset, own]
    for where in made:
        for array in (x, y):
            array[:] = own_data(1009, ours.rank)
            where.Allreduce(MPI.IN_PLACE, array)
            group, world = where.Get_group(), MPI.COMM_WORLD.Get_group()
            ranks = group.Translate_ranks(None, world)
            np.testing.assert_array_equal(array, sum(own_data(1009, rank) for rank in ranks))
            group.Free()
            world.Free()
    for where in made[:-1]:
        where.Free()


@several
def test_dropped_arrays_give_their_memory_to_the_next(ours):
    def window() -> int:
        return place_of(x).window

    x = ours.empty(5000)
    first = window()
    view = x[7:9]
    x = ours.empty(5000)
    second = window()
    assert second != first  # the view is still there
    del view
    x = ours.empty(4000)
    assert window() == first
    kept = x if ours.rank == P - 1 else None
    x = ours.empty(4000)
    assert window() == second  # the first is in use, by one rank
    kept, x = x, np.empty(0)  # now the second is, and the first by none
    x = ours.empty(4000)
    assert window() == first
    x = ours.empty(100)
    third = window()
    assert third not in (first, second)  # it is much smaller
    kept = x
    assert kept is x


def test_sizes_may_differ_by_rank(ours):
    for _ in range(3):
        x = ours.zeros((ours.rank * 1000, 3))
        assert x.shape == (ours.rank * 1000, 3)
        assert not x.any()
        x[...] = ours.rank
        y = ours.asarray(own_data(ours.rank * 700, ours.rank))
        np.testing.assert_array_equal(y, own_data(ours.rank * 700, ours.rank))
        assert (x == ours.rank).all()
        recv = ours.full(sum(range(P)) * 700, -1.0)
        counts = [rank * 700 for rank in range(P)]
        ours.Allgatherv(y, [recv, counts], "shared" if P > 1 else "auto")
        np.testing.assert_array_equal(
            recv, np.concatenate([own_data(n, rank) for rank, n in enumerate(counts)]) if P > 1 else recv
        )


def test_the_faces_of_empty(ours):
    assert ours.empty(3).dtype == float
    assert ours.empty(3).shape == (3,)
    assert ours.zeros((2, np.int64(3)), "i4").tolist() == [[0] * 3] * 2
    assert ours.full((), 3).dtype == np.asarray(3).dtype
    assert ours.full([2], [4, 5], "f4").tolist() == [4, 5]
    copy = ours.asarray(range(4), bfloat16)
    assert copy.dtype == bfloat16
    assert copy.tolist() == [0, 1, 2, 3]
    assert ours.empty((0, 4)).shape == (0, 4)
    for wrong in ((-1,), [3, -2]):
        with pytest.raises(ValueError, match="expected a shape, and a dtype"):
            ours.empty(wrong)
    with pytest.raises(ValueError, match="of numbers or other plain data"):
        ours.empty(3, object)


@pytest.mark.parametrize(
    ("shape", "dtype", "error"), [((-1,), "f8", ValueError), (3, "nonsense", TypeError), (2.5, "f8", TypeError)]
)
@several
def test_an_array_that_cannot_be_raises_on_all(ours, shape, dtype, error):
    wrong = ours.rank == P - 1
    with pytest.raises(error if wrong else mpicoll.MismatchError):
        ours.empty(*((shape, dtype) if wrong else (3, "f8")))
    assert (ours.full(700, 2) == 2).all()  # and on it goes


@pytest.mark.parametrize("name", ["asarray", "full"])
@several
def test_a_value_that_is_no_array_raises_on_all(ours, name, monkeypatch):
    """Without waiting for ever: no rank may raise before it has spoken to the others."""
    spoke: list[Any] = []
    agree = State.agree
    monkeypatch.setattr(State, "agree", lambda *args: spoke.append(args) or agree(*args))
    with pytest.raises(ValueError, match="inhomogeneous"):
        getattr(ours, name)(*([[[1], [2, 3]]] if name == "asarray" else [3, [[1], [2, 3]]]))
    assert spoke


def test_where_nothing_is_shared_it_is_refused(ours):
    x = np.zeros(1000)
    if P == 1:
        for call in (mpicoll.allreduce, mpicoll.reduce_scatter, mpicoll.bcast, mpicoll.reduce, mpicoll.allgather):
            with pytest.raises(
                ValueError, match=r"shared cannot do this .* here: it needs two ranks or more that share"
            ):
                call(x, ours, algorithm="shared")
        assert (ours.allreduce_shared(x + 1) == 1).all()
    with pytest.raises(ValueError, match="shared is for calls that wait"):
        mpicoll.iallreduce(x, ours, algorithm="shared")
    with pytest.raises(ValueError, match="shared is for calls that wait"):
        mpicoll.allreduce_init(x, ours, algorithm="shared")


@several
def test_other_calls_in_between_raise_on_all(ours):
    x = ours.zeros(1000)
    for _ in range(3):
        with pytest.raises(mpicoll.MismatchError, match="ranks do not make the same call"):
            ours.Allreduce(MPI.IN_PLACE, x[: 900 + (ours.rank == P - 1)])
        x.fill(1)
        ours.Allreduce(MPI.IN_PLACE, x)
        assert (x == P).all()


# ---- who waits for whom


@pytest.mark.parametrize("way", ["Isend", "Irecv"])
@pytest.mark.parametrize("count", [3, 200_000])
@several
def test_messages_of_the_program_go_on_meanwhile(ours, count, way):
    """Rank 1 receives what rank 0 has begun to send, or sends what it is to receive, before it joins: in one of them
    rank 0, which waits, must call the MPI library; which, depends on that."""
    x, there = np.full(count, 1.0), np.full(1 << 20, 3.0 * (ours.rank == (way == "Irecv")))
    late(ours, 1, 0.1)
    if ours.rank == 0:
        request = getattr(ours, way)(there, 1)
    elif ours.rank == 1 and way == "Isend":
        ours.Recv(there, 0)
    elif ours.rank == 1:
        ours.Ssend(there, 0)
    ours.Allreduce(MPI.IN_PLACE, x)
    if ours.rank == 0:
        request.Wait()
    assert (there == 3).all() or ours.rank > 1
    assert (x == P).all()


@pytest.mark.parametrize("make", ["empty", "allreduce_shared", "Allreduce", "Bcast"])
@pytest.mark.parametrize("check", ["header", "off"])
@several
def test_handles_of_ours_go_on_meanwhile(ours, check, make, request):
    """Rank 0 waits for its handle before it joins: the others must drive theirs while they wait."""
    other, x, z = ours.Dup(), np.full(4000, 1.0), np.full(30_000, 1.0)
    where = mpicoll.Comm(ours, check=check)
    handle = mpicoll.iallreduce(z, other, algorithm="ring")
    if ours.rank == 0:
        handle.wait()
    if make == "empty":
        where.empty(10)
    elif make == "allreduce_shared":
        x = where.allreduce_shared(x)
    elif make == "Allreduce":
        where.Allreduce(MPI.IN_PLACE, x)
    else:
        where.Bcast(x, P - 1)
    handle.wait()
    assert (z == P).all()
    assert x[0] == x[-1] == (P if "llreduce" in make else 1)
    other.Free()


@several
def test_one_rank_is_very_late(ours):
    x = ours.full(5000, 1.0)
    late(ours, P - 1)
    ours.Allreduce(MPI.IN_PLACE, x)
    assert (x == P).all()
    late(ours, 0)
    assert (ours.allreduce_shared(x) == P * P).all()


@several
def test_with_the_barrier_of_the_mpi_library(ours, monkeypatch):
    """As on machines where cores do not see what others write in its order."""
    monkeypatch.setattr(shared, "ORDERED", False)
    own = ours.Dup()
    for count in COUNTS:
        for kind in KINDS:
            x, around = laid(own, kind, own_data(count, own.rank))
            own.Allreduce(MPI.IN_PLACE, x)
            np.testing.assert_array_equal(x, sum(own_data(count, rank) for rank in range(P)))
            assert_untouched(around)
            np.testing.assert_array_equal(own.allreduce_shared(x), P * x)
            own.Bcast(x, P - 1)
    with pytest.raises(mpicoll.MismatchError):
        own.Allreduce(MPI.IN_PLACE, np.zeros(500 + own.rank))
    own.Free()


@several
def test_random_calls(ours):
    """Many, of random sizes, kinds, roots and delays, on two communicators: every element is looked at."""
    rng, own = np.random.default_rng(P), np.random.default_rng(ours.rank)  # the first is the same on all ranks
    comms = [ours, ours.Dup()]
    arrays = [comms[n % 2].empty(9000) for n in range(4)]
    for n in range(150):
        where, count, root = comms[rng.integers(2)], int(rng.integers(1, 4000)), int(rng.integers(P))
        what, values = rng.integers(5), rng.integers(0, 9, (P, count)).astype(float)
        start = int(own.integers(0, 5000))
        x = arrays[own.integers(4)][start : start + count] if own.integers(4) else np.empty(count)
        x[:] = values[ours.rank]
        if own.integers(8) == 0:
            time.sleep(own.random() * 2e-3)
        total = values.sum(0)
        if what == 0:
            where.Allreduce(MPI.IN_PLACE, x)
            np.testing.assert_array_equal(x, total, err_msg=str(n))
        elif what == 1:
            y = np.empty(count)
            where.Reduce(x, y, root=root)
            assert where.rank != root or (y == total).all(), n
        elif what == 2:
            where.Bcast(x, root)
            np.testing.assert_array_equal(x, values[root], err_msg=str(n))
        elif what == 3:
            np.testing.assert_array_equal(where.allreduce_shared(x), total, err_msg=str(n))
        else:
            np.testing.assert_array_equal(mpicoll.allgather(x, where), values, err_msg=str(n))
    comms[1].Free()


# ---- no memory, and none left


def nothing(*_: Any) -> tuple[int, str]:
    raise OSError("no memory")


@several
def test_without_memory_arrays_are_ordinary(comm, monkeypatch):
    monkeypatch.setattr(memory, "MEMORY", (nothing,))
    own = mpicoll.Comm(comm)
    assert not own._state.shares
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        x = own.full(1000, 1.0)
    assert [str(one.message)[:41] for one in told] == ["no memory to share for arrays of 8000 byt"] * (comm.rank == 0)
    assert not place_of(x).window
    own.Allreduce(MPI.IN_PLACE, x)
    assert (x == P).all()
    assert (own.allreduce_shared(x) == P * P).all()
    with pytest.raises(ValueError, match=r"shared cannot do this .* here: it needs two ranks or more that share"):
        own.Allreduce(MPI.IN_PLACE, x, algorithm="shared")


@several
def test_without_memory_for_boxes_it_goes_by_messages(ours, runs, monkeypatch):
    monkeypatch.setattr(memory, "MEMORY", (nothing,))
    everyones = [own_data(1009, rank) for rank in range(P)]
    root = P - 1
    for _ in range(2):
        x, around = guarded(everyones[ours.rank])
        ours.Allreduce(MPI.IN_PLACE, x)
        np.testing.assert_array_equal(x, sum(everyones))
        y, around_received = guarded(np.full(1009, -1.0))
        ours.Allreduce(everyones[ours.rank], y)
        np.testing.assert_array_equal(y, sum(everyones))
        mpicoll.allreduce(x, ours, "mean", deterministic=True)
        np.testing.assert_array_equal(x, sum(everyones))
        y[:] = -1
        ours.Reduce(everyones[ours.rank], y, root=root)
        np.testing.assert_array_equal(y, sum(everyones) if ours.rank == root else -1)
        x[:] = everyones[ours.rank]
        ours.Bcast(x, root)
        np.testing.assert_array_equal(x, everyones[root])
        everything = np.empty(P * 1009)
        ours.Allgather(everyones[ours.rank], everything)
        np.testing.assert_array_equal(everything, np.concatenate(everyones))
        part = mpicoll.reduce_scatter(everyones[ours.rank], ours)
        np.testing.assert_array_equal(np.concatenate(ours.allgather(part)), sum(everyones))
        np.testing.assert_array_equal(ours.allreduce_shared(everyones[ours.rank]), sum(everyones))
        assert_untouched(around)
        assert_untouched(around_received)
    assert not runs


@several
def test_memory_that_one_rank_cannot_open_is_none(ours, monkeypatch):
    """On all of them; the next maker is asked."""
    with monkeypatch.context() as patch:
        if ours.rank == P - 1:
            patch.setattr(memory.os, "posix_fallocate", nothing)
        assert memory.share(state_of(ours).comm, 1 << 16) is None
    assert memory.share(state_of(ours).comm, 1 << 16, (nothing, memory.temporary)) is not None


def test_communicators_and_arrays_leave_nothing(ours):
    gc.collect()

    def mapped() -> int:
        with open("/proc/self/maps") as maps:
            return sum("mpicoll" in line for line in maps)

    before = mapped()
    for n in range(30):
        own = ours.Dup()
        x = own.full(1000 + n, 1.0)
        own.Allreduce(MPI.IN_PLACE, np.zeros(1000))
        own.allreduce_shared(x)
        own.Free()
        del x, own
    gc.collect()
    assert mapped() == before


@several
def test_freed_communicators_are_unmapped_at_once(ours):
    """Whenever garbage is collected: a mapping is a file descriptor."""
    gc.collect()
    gc.disable()
    try:
        with open("/proc/self/maps") as maps:
            before = sum("mpicoll" in line for line in maps)
        for _ in range(5):
            ours.Dup().Free()
        with open("/proc/self/maps") as maps:
            assert sum("mpicoll" in line for line in maps) == before
    finally:
        gc.enable()


@several
def test_arrays_outlive_the_communicator(ours):
    own, other = ours.Dup(), ours.empty(1000)
    x = own.full(1000, 1.0)
    assert place_of(other).window != place_of(x).window
    own.Free()
    x += 1
    assert (x == 2).all()
    ours.Allreduce(MPI.IN_PLACE, x)  # as any other array
    assert (x == 2 * P).all()
    ours.Allreduce(MPI.IN_PLACE, x[3:-3])
    assert (x[3:-3] == 2 * P * P).all()


@several
def test_a_call_has_two_barriers_and_a_step_of_training_three(ours, monkeypatch):
    """The comparison carries the places of arrays, and the numbers that a step has beside its gradient."""
    barriers, sync = [], Node.sync

    def counted(self: Node) -> None:
        barriers.append(self)
        sync(self)

    x, rank, there = ours.full(1000 * P, ours.rank + 1.0), ours.rank, sharing.shared(ours)
    assert there is not None
    cuts = [1000 * rank for rank in range(P + 1)]
    monkeypatch.setattr(Node, "sync", counted)
    for call in (
        lambda: ours.Allreduce(MPI.IN_PLACE, x, algorithm="shared"),
        lambda: mpicoll.allreduce(x, ours, algorithm="shared"),
        lambda: ours.Bcast(x, P - 1, algorithm="shared"),
    ):
        for _ in range(2):
            barriers.clear()
            call()
            assert len(barriers) == 2
    x[:] = rank
    barriers.clear()
    sums = there.reduce_scatter(x, x[cuts[rank] : cuts[rank + 1]], cuts, [0.5, rank])
    there.barrier("the parameters")
    assert len(barriers) == 3
    assert sums == [0.5 * P, P * (P - 1) / 2]
    assert (x[cuts[rank] : cuts[rank + 1]] == P * (P - 1) / 2).all()
