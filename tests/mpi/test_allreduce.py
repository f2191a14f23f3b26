"""The contract of every allreduce, over every row of the table; one launch runs all cases of its number of ranks."""

import array
import pickle
from typing import Any

import numpy as np
import pytest
from ml_dtypes import bfloat16, float8_e4m3fnuz, float8_e5m2
from mpi4py import MPI

import mpicoll
from contract import assert_untouched, composition, guarded, maps, own_data
from mpicoll.algorithms import ALGORITHMS, Algorithm, find
from mpicoll.cost import NODE, Network
from mpicoll.interpreter import interpret_arrays
from mpicoll.mpi import engine, operations, plan, select, state
from mpicoll.mpi.engine import account
from mpicoll.mpi.operations import operation
from mpicoll.mpi.plan import Plan
from mpicoll.mpi.state import State
from mpicoll.schedule import Schedule
from schedules import census, everyone, exchange, fold_tree_reduce

pytestmark = pytest.mark.mpi
ROWS = ALGORITHMS["allreduce"]
NAMES = [*ROWS, "native", "auto", *(["shared"] if MPI.COMM_WORLD.size > 1 else [])]
CANONICAL = [name for name, row in ROWS.items() if row.canonical]
IN_ORDER = [name for name, row in ROWS.items() if row.rank_order]
P = MPI.COMM_WORLD.size
COUNTS = sorted({0, 1, P - 1, P, P + 1, 997, 65537})
UFUNCS = {"sum": np.add, "prod": np.multiply, "max": np.maximum, "min": np.minimum}
UFUNCS |= {"land": np.logical_and, "lor": np.logical_or, "lxor": np.logical_xor}
UFUNCS |= {"band": np.bitwise_and, "bor": np.bitwise_or, "bxor": np.bitwise_xor}
LEGAL = {
    "c": ("sum", "prod"),
    "f": ("sum", "prod", "max", "min"),
    "b": ("land", "lor", "lxor"),
    "i": UFUNCS,
    "u": UFUNCS,
}


def assert_same_bits(comm: MPI.Intracomm, x: np.ndarray) -> None:
    assert len(set(comm.allgather(x.tobytes()))) == 1


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("name", NAMES)
def test_sums_are_exact_and_nothing_else_is_touched(comm, name, count):
    """In place and from a send buffer, as a function and as a method, twice: always the native result."""
    ours = mpicoll.Comm(comm)
    data = own_data(count, comm.rank)
    native = np.empty(count)
    comm.Allreduce(data, native)
    np.testing.assert_array_equal(native, sum(own_data(count, rank) for rank in range(P)))
    for _ in range(2):
        x, around = guarded(data)
        assert mpicoll.allreduce(x, comm, algorithm=name) is x
        np.testing.assert_array_equal(x, native)
        assert_untouched(around)

        x, around = guarded(data)
        ours.Allreduce(MPI.IN_PLACE, x, algorithm=name)
        np.testing.assert_array_equal(x, native)
        assert_untouched(around)

        x, around = guarded(np.full(count, -1.0))
        sent, around_sent = guarded(data)
        sent.flags.writeable = False
        ours.Allreduce(sent, x, algorithm=name)
        np.testing.assert_array_equal(x, native)
        np.testing.assert_array_equal(sent, data)
        assert_untouched(around)
        assert_untouched(around_sent)


@pytest.mark.parametrize("dtype", ["?", "i1", "u2", "i4", "i8", "u8", "f4", "f8", "g", "c8", "c16", "G"])
@pytest.mark.parametrize("name", NAMES)
def test_operations_and_dtypes(comm, name, dtype):
    """Every predefined operation on every dtype MPI has it for, by name and by MPI.Op; the others are refused."""
    everyones = [own_data(101, rank, dtype) for rank in range(P)]
    for op, ufunc in UFUNCS.items():
        x, around = guarded(everyones[comm.rank])
        if op not in LEGAL[x.dtype.kind]:
            with pytest.raises(TypeError, match=f"{op} of .* is not defined"):
                mpicoll.allreduce(x, comm, op, name)
            continue
        mpicoll.allreduce(x, comm, op, name)
        expected = everyones[0]
        for other in everyones[1:]:
            expected = ufunc(expected, other).astype(dtype)
        np.testing.assert_array_equal(x, expected, err_msg=op)
        assert_untouched(around)
        y, _ = guarded(everyones[comm.rank])
        mpicoll.Comm(comm).Allreduce(MPI.IN_PLACE, y, getattr(MPI, op.upper()), name)
        np.testing.assert_array_equal(y, expected, err_msg=op)


@pytest.mark.parametrize("name", ROWS)
def test_all_ranks_end_with_the_bits_of_the_interpreter_every_time(comm, name):
    everyones = [np.random.default_rng(rank).normal(size=1003).astype("f4") for rank in range(P)]
    expected = interpret_arrays(ROWS[name].schedule(P), everyones, np.add)[0]
    for _ in range(3):
        x = everyones[comm.rank].copy()
        mpicoll.allreduce(x, comm, algorithm=name, segments=4 if name == "double_tree" else None)
        np.testing.assert_array_equal(x.view("u4"), expected.view("u4"))


@pytest.mark.parametrize("dtype", ["e", bfloat16])
@pytest.mark.parametrize("count", COUNTS[:-1])
@pytest.mark.parametrize("name", [*ROWS, "auto"])
def test_16_bit_floats_are_added_as_float32_and_rounded_once(comm, name, count, dtype):
    rng = np.random.default_rng(7)
    everyones = (rng.normal(size=(P, count)) * 10).astype(dtype)
    exact = np.sum(everyones.astype("f8"), axis=0)
    magnitude = np.sum(np.abs(everyones.astype("f8")), axis=0)
    for op, p in (("sum", 1), ("mean", P)):
        x, around = guarded(everyones[comm.rank])
        mpicoll.allreduce(x, comm, op, name)
        half_ulp = {"e": 2.0**-11}.get(dtype, 2.0**-8)
        bound = np.abs(exact / p) * half_ulp + P * magnitude * 2.0**-24 + 2.0**-25
        assert (np.abs(x.astype("f8") - exact / p) <= bound).all()
        assert_same_bits(comm, x)
        assert_untouched(around)
    x = everyones[comm.rank].copy()
    mpicoll.allreduce(x, comm, "max", name)
    np.testing.assert_array_equal(x.astype("f8"), np.max(everyones.astype("f8"), axis=0))
    if count and dtype == "e":  # the sum of 16-bit numbers may be too large for them; its mean is not
        x = np.full(count, 60000, dtype)
        mpicoll.allreduce(x, comm, "mean", name)
        np.testing.assert_array_equal(x.astype("f8"), np.float16(60000))


@pytest.mark.parametrize("dtype", ["e", bfloat16])
@pytest.mark.parametrize("name", [*ROWS, "auto"])
def test_16_bit_on_the_wire_is_a_choice(comm, name, dtype):
    """Every hop rounds: right to half a unit in the last place for each addition; small integers exactly."""
    rng = np.random.default_rng(7)
    everyones = (rng.normal(size=(P, 97)) * 10).astype(dtype)
    exact = np.sum(everyones.astype("f8"), axis=0)
    half_ulp = {"e": 2.0**-11}.get(dtype, 2.0**-8)
    x = everyones[comm.rank].copy()
    mpicoll.allreduce(x, comm, algorithm=name, wire="16bit")
    magnitude = np.sum(np.abs(everyones.astype("f8")), axis=0)
    assert (np.abs(x.astype("f8") - exact) <= 1.01 * (P - 1) * half_ulp * magnitude + 2.0**-24).all()
    assert_same_bits(comm, x)
    x = own_data(97, comm.rank, dtype) * P
    mpicoll.Comm(comm).Allreduce(MPI.IN_PLACE, x, "mean", name, wire="16bit")
    np.testing.assert_array_equal(x.astype("f8"), sum(own_data(97, rank) for rank in range(P)))
    mpicoll.iallreduce(x, mpicoll.Comm(comm), "max", name, wire="16bit").wait()
    plan = Plan(ROWS["ring"].schedule(P), comm.rank, 840, np.dtype(dtype))
    assert plan.bytes_sent == 2 * (P - 1) * (840 // P) * 2 or 840 % P
    with pytest.raises(TypeError, match="wire='16bit' is for 16-bit floats, got float64"):
        mpicoll.allreduce(np.zeros(3), comm, algorithm=name, wire="16bit")
    with pytest.raises(ValueError, match="unknown wire '8bit': expected 16bit"):
        mpicoll.allreduce(x, comm, algorithm=name, wire="8bit")


def test_16_bit_sums_travel_as_float32_and_their_results_as_16_bit(comm):
    count, comm = P * 840, mpicoll.Comm(comm)
    x = np.zeros(count, "e")
    for name in ("ring", "circulant", "halving_doubling", "recursive_doubling"):
        wide = comm.allreduce(account(np.zeros(count, "f4"), comm, name)[1], MPI.MAX)
        sent = comm.allreduce(account(x, comm, name)[1], MPI.MAX)
        assert sent == wide if name == "recursive_doubling" and P in (1, 2, 4, 8) else sent < wide or P == 1
        if name in ("ring", "circulant"):
            assert sent == (P - 1) * 840 * (4 + 2)


@pytest.mark.parametrize("name", NAMES)
def test_means(comm, name):
    everyones = np.array([own_data(101, rank) * 3 + rank for rank in range(P)])
    total = everyones.sum(axis=0)
    for dtype in ("f4", "f8", "c16", "i2", "i8", "u1"):
        x = everyones[comm.rank].astype(dtype)
        mpicoll.allreduce(x, comm, "mean", name)
        whole = np.dtype(dtype).kind in "iu"
        np.testing.assert_array_equal(x, np.rint(total / P) if whole else total.astype(x.real.dtype) / P)
    with np.errstate(all="raise"):
        x = np.array([np.inf + 1j, 1e308 + 1j, 2.5e-308])
        mpicoll.allreduce(x, comm, "mean", name)
    assert x[0] == np.inf + 1j
    assert P == 1 or x[1] in (np.inf + 1j, 1e308 + 1j)
    x = -everyones[comm.rank].astype("i4")
    mpicoll.Comm(comm).Allreduce(MPI.IN_PLACE, x, "mean", name)
    np.testing.assert_array_equal(x, np.rint(-total / P))


@pytest.mark.parametrize("name", NAMES)
def test_user_defined_operations(comm, name):
    """Composing maps z -> a z + b, kept as a + bi, does not commute: in rank order, or refused."""

    calls = []

    def larger(lower: Any, higher: Any, datatype: MPI.Datatype) -> None:
        calls.append(len(lower))
        a, b = (np.frombuffer(memory, np.int64) for memory in (lower, higher))
        np.maximum(a, b, out=b)

    commuting = MPI.Op.Create(larger, commute=True)
    x = own_data(100, comm.rank, np.int64)
    mpicoll.allreduce(x, comm, commuting, name)
    np.testing.assert_array_equal(x, np.max([own_data(100, rank) for rank in range(P)], axis=0))
    assert comm.allreduce(len(calls)) or P == 1
    commuting.Free()

    everyones, expected = maps(100, P)
    composing = composition()
    x, around = guarded(everyones[comm.rank])
    if name in ("ring", "circulant"):
        with pytest.raises(ValueError, match=r"the operation does not commute: expected recursive_.*double_tree"):
            mpicoll.allreduce(x, comm, composing, name)
    else:
        assert name in [*IN_ORDER, "native", "auto", "shared"]
        mpicoll.allreduce(x, comm, composing, name)
        np.testing.assert_array_equal(x, expected)
    assert_untouched(around)
    if P > 2 and name == "tree":  # the test can fail: the other way round is something else
        mpicoll.allreduce(x := everyones[P - 1 - comm.rank].copy(), comm, composing, name)
        assert not np.array_equal(x, expected)
    composing.Free()


@pytest.mark.parametrize("name", NAMES)
def test_the_place_of_the_largest_and_the_smallest(comm, name):
    pair = np.dtype([("value", "f8"), ("index", "i4")], align=True)
    everyones = [np.array([(v, rank * 100 + n) for n, v in enumerate(own_data(9, rank))], pair) for rank in range(P)]
    for op, best in ((MPI.MAXLOC, np.max), (MPI.MINLOC, np.min)):
        x = everyones[comm.rank].copy()
        mpicoll.allreduce([x, 9, MPI.DOUBLE_INT], comm, op, name)
        values = np.array([every["value"] for every in everyones])
        np.testing.assert_array_equal(x["value"], best(values, axis=0))
        first = np.argmax(values == best(values, axis=0), axis=0)  # the lowest index wins
        np.testing.assert_array_equal(x["index"], first * 100 + np.arange(9))
    with pytest.raises(TypeError, match=r"maxloc of floats is not defined: pass \[x, count, MPI.DOUBLE_INT\]"):
        mpicoll.allreduce(np.zeros(3), comm, MPI.MAXLOC, name)


@pytest.mark.parametrize("dtype", ["f4", "f8", "e", "c8"])
def test_deterministic_sums_do_not_depend_on_algorithm_length_pieces_or_fusion(comm, dtype, monkeypatch):
    rng = np.random.default_rng(comm.rank)
    data = (rng.normal(size=1200) * 10.0 ** rng.integers(-3, 3, size=1200)).astype(dtype)
    ours = mpicoll.Comm(comm, deterministic=True)

    def bits(algorithm: str, cuts: tuple[int, ...], length: int = plan.MAX_MESSAGE, network: Network = NODE) -> bytes:
        with monkeypatch.context() as patch:
            patch.setattr(plan, "MAX_MESSAGE", length)
            patch.setattr(select, "NODE", network)
            own = comm.Dup()  # plans are kept with the communicator
            pieces = [piece.copy() for piece in np.split(data, cuts)]
            for piece in pieces:
                mpicoll.allreduce(piece, own, algorithm=algorithm, deterministic=True)
            own.Free()
        return np.concatenate(pieces).tobytes()

    expected = bits("recursive_doubling", ())
    assert_same_bits(comm, np.frombuffer(expected, np.uint8))
    for algorithm in [*CANONICAL, "auto"]:
        for cuts in ((), (1,), (3, 700)):
            assert bits(algorithm, cuts) == expected
            assert bits(algorithm, cuts, length=40, network=Network(0, 1, 1)) == expected
    x, fused = data.copy(), [part.copy() for part in np.split(data, (5, 600))]
    ours.Allreduce(MPI.IN_PLACE, x)
    assert x.tobytes() == expected
    mpicoll.allreduce(fused, ours)
    assert np.concatenate(fused).tobytes() == expected
    ours.Allreduce(data, x)
    assert x.tobytes() == expected
    ours.Dup().Allreduce(MPI.IN_PLACE, y := data.copy())
    assert y.tobytes() == expected
    mpicoll.iallreduce(y := data.copy(), ours).wait()
    assert y.tobytes() == expected
    if P in (5, 7, 8) and dtype == "f4":  # the test can fail: a ring adds in another order
        ring = data.copy()
        mpicoll.allreduce(ring, comm, algorithm="ring")
        assert ring.tobytes() != expected
        ours.Allreduce(MPI.IN_PLACE, y := data.copy(), algorithm="ring", deterministic=False)
        assert y.tobytes() == ring.tobytes()
    for name in ("ring", "circulant", "double_tree", "native"):
        with pytest.raises(
            ValueError, match=f"{name} is not deterministic: expected recursive_doubling, halving_doubling"
        ):
            ours.Allreduce(MPI.IN_PLACE, data.copy(), algorithm=name)


@pytest.mark.parametrize("name", ROWS)
def test_single_numbers_and_complex_products_have_the_same_bits_too(comm, name):
    """NumPy takes other ways for arrays of length one, and there leaves other NaNs and rounds products differently."""
    nans = np.array([0x7FC00001 + rank for rank in range(P)], "u4").view("f4")
    for count in (1, 2, 3, 5, 8, 9, 16, 17, 33):
        for op in ("sum", "prod", "max", "mean"):
            x = np.repeat(nans[comm.rank], count)
            mpicoll.allreduce(x, comm, op, name)
            assert_same_bits(comm, x)
    x = np.array([[np.inf, -np.inf, np.nan, 1.0][comm.rank % 4]])
    mpicoll.allreduce(x, comm, algorithm=name)
    assert_same_bits(comm, x)
    rng = np.random.default_rng(comm.rank)
    for dtype in ("c8", "c16"):
        z = (rng.normal(size=33) + 1j * rng.normal(size=33)).astype(dtype)
        whole, parts = z.copy(), [z[n : n + 1].copy() for n in range(33)]
        mpicoll.allreduce(whole, comm, "prod", name)
        assert_same_bits(comm, whole)
        if name in CANONICAL:
            for part in parts:
                mpicoll.allreduce(part, comm, "prod", name)
            assert np.concatenate(parts).tobytes() == whole.tobytes()


def test_shapes_orders_scalars_and_the_ring_by_name(comm):
    x = np.full((3, 4, 5), float(comm.rank))
    np.testing.assert_array_equal(mpicoll.ring_allreduce(x, comm), np.full((3, 4, 5), P * (P - 1) / 2))
    y = np.asfortranarray(np.arange(12.0).reshape(3, 4))
    np.testing.assert_array_equal(mpicoll.ring_allreduce(y, comm), P * np.arange(12.0).reshape(3, 4))
    scalar = np.array(2.0)
    assert mpicoll.allreduce(scalar, comm) == 2 * P
    elsewhere = np.ones(3, pickle.loads(pickle.dumps(np.dtype("f4"))))  # a dtype equal to NumPy's, not the same
    assert mpicoll.ring_allreduce(elsewhere, comm)[0] == P
    assert mpicoll.ring_allreduce(np.array([comm.rank]), comm, "max") == P - 1
    assert mpicoll.allreduce(comm.rank, comm) == P * (P - 1) // 2
    assert mpicoll.allreduce(1.5, comm, "mean", "tree") == 1.5
    assert mpicoll.allreduce(1.5 if comm.rank == 0 else 0, comm, "mean") == 1.5 / P
    assert mpicoll.allreduce(np.float32(2), comm, "prod").dtype == np.float32
    assert mpicoll.allreduce(2j, comm) == 2j * P
    for truth in (bool, np.bool_):
        assert not mpicoll.allreduce(truth(comm.rank != P - 1), comm, "land")
    assert mpicoll.allreduce(bfloat16(2), comm) == 2 * P


@pytest.mark.parametrize("name", NAMES)
def test_a_list_of_arrays_is_one_message_for_each_dtype(comm, name):
    arrays = [np.full(3, comm.rank, "f8"), np.arange(4, dtype="i4"), np.zeros(0), np.ones((2, 2)), np.array(comm.rank)]
    fused = tuple(arrays)
    assert mpicoll.allreduce(fused, comm, algorithm=name) is fused
    expected = [np.full(3, P * (P - 1) / 2), P * np.arange(4), np.zeros(0), np.full((2, 2), P), P * (P - 1) // 2]
    for got, right in zip(arrays, expected, strict=True):
        np.testing.assert_array_equal(got, right)
    for x in ([], [np.zeros(0)], [np.zeros(0), np.zeros(0)]):
        assert mpicoll.allreduce(x, comm, algorithm=name) is x


def test_mpi4pys_buffer_specifications(comm):
    for algorithm in NAMES:
        for make in (
            lambda x: x,
            lambda x: [x, 4],
            lambda x: [x, MPI.DOUBLE],
            lambda x: [x, "d"],
            lambda x: (x, 4, MPI.DOUBLE),
            lambda x: [x, None, MPI.DOUBLE],
            lambda x: [x, (4, 0), "d"],
            lambda x: [x, (4, None), MPI.DOUBLE],
            lambda x: [x.view("u1"), 4, MPI.DOUBLE],
            memoryview,
        ):
            x = own_data(4, comm.rank)
            mpicoll.Comm(comm).Allreduce(MPI.IN_PLACE, make(x), algorithm=algorithm)
            np.testing.assert_array_equal(x, sum(own_data(4, rank) for rank in range(P)))
        x = np.arange(6.0)
        mpicoll.Comm(comm).Allreduce([np.ones(9), 3], [x, (3, 2), MPI.DOUBLE], algorithm=algorithm)
        np.testing.assert_array_equal(x, [0, 1, P, P, P, 5])
        bits = bytearray([1 << comm.rank, 255])
        mpicoll.Comm(comm).Allreduce(MPI.IN_PLACE, bits, MPI.BOR, algorithm)
        assert bits == bytearray([2**P - 1, 255])


class Tensor:
    """Exports its memory by DLPack alone, as CPU tensors do."""

    def __init__(self, array: np.ndarray, device: int = 1) -> None:
        self.array, self.device = array, device

    def __dlpack__(self, **options: Any) -> Any:
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device, 0


@pytest.mark.parametrize("name", NAMES)
def test_exporters_of_memory(comm, name):
    for export in (Tensor, lambda x: array.array("d", x), memoryview):
        x = export(own_data(20, comm.rank))
        assert mpicoll.allreduce(x, comm, algorithm=name) is x
        expected = sum(own_data(20, rank) for rank in range(P))
        np.testing.assert_array_equal(x.array if isinstance(x, Tensor) else np.asarray(x), expected)
    tensors = [Tensor(np.full(3, comm.rank)), np.ones(2), Tensor(np.ones(4))]
    mpicoll.allreduce(tensors, comm, "max", name)
    np.testing.assert_array_equal(tensors[0].array, P - 1)
    with pytest.raises(
        TypeError, match=r"test_allreduce.Tensor is in the memory of a device, which needs CuPy .*pip install"
    ):
        mpicoll.allreduce(Tensor(np.zeros(3), device=2), comm, algorithm=name)


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        ("text", TypeError, "expected an array in host memory, got builtins.str: pass a NumPy array"),
        ([[1.0, 2.0], [3.0]], TypeError, "got builtins.float: pass a NumPy array"),
        ({1.0}, TypeError, "expected an array in host memory, got builtins.set"),
        (np.zeros(3, object), TypeError, "sum of objects is not defined"),
        (np.zeros(3, "S4"), TypeError, r"sum of dtype \|S4 is not defined"),
        (np.zeros(3, float8_e5m2), TypeError, "sum of .*float8_e5m2 is not defined"),
        (np.zeros(3, float8_e4m3fnuz), TypeError, "sum of .*float8_e4m3fnuz is not defined"),
        (np.zeros(3, ">f8"), TypeError, "native byte order, got dtype >f8"),
        (np.zeros((4, 4))[:, ::2], ValueError, "contiguous"),
        (np.broadcast_to(np.zeros(1), 1), ValueError, "writable"),
        (np.zeros(65, "u1")[1:].view("f8"), ValueError, "aligned"),
        (np.ma.zeros(3), TypeError, "got a masked one"),
        ([np.zeros(3), np.ma.zeros(3)], TypeError, "got a masked one"),
        ([np.zeros(3), 4, 5, MPI.DOUBLE], ValueError, "the buffer has 3 elements, 4 from number 5 on were asked for"),
        ([np.zeros(3), 1, MPI.DOUBLE.Create_contiguous(2)], TypeError, "derived MPI datatypes"),
        ([1, 2, 3], TypeError, r"got a list of numbers: pass a NumPy array"),
        ([np.zeros(3), 400_000, MPI.DOUBLE], ValueError, "the buffer has 3 elements, 400000 from number 0 on"),
        ([np.zeros(3), np.array(2)], TypeError, r"could be a count, or one more array of a list: pass \[x, int\(n\)\]"),
    ],
)
def test_what_cannot_be_reduced_in_place_is_refused(comm, bad, error, message):
    for algorithm in ("auto", "ring"):
        with pytest.raises(error, match=message):
            mpicoll.allreduce(bad, comm, algorithm=algorithm)


def test_unknown_names_are_refused_with_the_known_ones(comm):
    with pytest.raises(ValueError, match=r"unknown allreduce algorithm 'rign': expected ring, .* or native"):
        mpicoll.allreduce(np.zeros(3), comm, algorithm="rign")
    with pytest.raises(ValueError, match=r"unknown operation 'mode': expected sum, mean, prod, max, min"):
        mpicoll.allreduce(np.zeros(3), comm, "mode")
    for op in (MPI.OP_NULL, MPI.REPLACE):
        with pytest.raises(ValueError, match="reduce nothing"):
            mpicoll.allreduce(np.zeros(3), comm, op)
    with pytest.raises(ValueError, match="ring allreduce has no parameter 'segments'"):
        mpicoll.allreduce(np.zeros(3), comm, algorithm="ring", segments=3)
    for name in ("auto", "native"):
        with pytest.raises(ValueError, match="segments are for a pipelining algorithm: name one, double_tree"):
            mpicoll.allreduce(np.zeros(3), comm, algorithm=name, segments=3)
    with pytest.raises(ValueError, match="segments must be at least 1, got 0"):
        mpicoll.allreduce(np.zeros(3), comm, algorithm="double_tree", segments=0)
    with pytest.raises(TypeError, match="cannot be interpreted as an integer"):
        mpicoll.allreduce(np.zeros(3), comm, algorithm="double_tree", segments="2")
    with pytest.raises(ValueError, match="native does not add float16 as float32"):
        mpicoll.allreduce(np.zeros(3, "e"), comm, algorithm="native")
    freed = comm.Dup()
    freed.Free()
    for name in NAMES:
        with pytest.raises(TypeError, match="expected an mpi4py intracommunicator, got int"):
            mpicoll.allreduce(np.zeros(3), 3, algorithm=name)
        for null in (MPI.COMM_NULL, freed):
            with pytest.raises(TypeError, match="got one that is null or was freed"):
                mpicoll.allreduce(np.zeros(3), null, algorithm=name)


@pytest.mark.parametrize("name", NAMES)
def test_subclasses_are_their_memory(comm, name):
    class Stubborn(np.ndarray):
        __array_ufunc__ = None

    for x in (np.arange(12.0).reshape(3, 4).view(np.recarray), np.arange(1.0, 5).view(Stubborn)):
        before = np.asarray(x).copy()
        assert mpicoll.allreduce(x, comm, algorithm=name) is x
        np.testing.assert_array_equal(np.asarray(x), P * before)


@pytest.mark.parametrize("name", ROWS)
def test_overflow_and_nan_are_results_not_errors(comm, name):
    """An exception in the middle would leave messages under way: the next call would add up old data."""
    ours = mpicoll.Comm(comm)
    for call in (
        lambda x, *rest: mpicoll.allreduce(x, comm, *rest),
        lambda x, *rest: mpicoll.iallreduce(x, ours, *rest).wait(),
    ):
        with np.errstate(all="raise"):
            x = np.array([3e38, 1, np.inf if comm.rank else -np.inf, np.nan], "f4")
            call(x, "sum", name)
            y = np.full(4, float(comm.rank))
            call(y, "sum", name)
            z = np.array([np.nan if comm.rank == P - 1 else 1.0] * 5)
            call(z, "max", name)
            half = np.full(3, 6e4, "e")
            call(half, "sum", name)
        np.testing.assert_array_equal(y, P * (P - 1) / 2)
        assert np.isnan(z).all()
        assert x[1] == P
        assert np.isnan(x[3])
        if P > 1:
            assert x[0] == np.inf
            assert np.isnan(x[2])
            assert (half == np.inf).all()


def test_after_an_interrupted_call_the_communicator_refuses(comm, monkeypatch):
    broken = comm.Dup()
    mpicoll.allreduce(np.ones(3), broken, algorithm="ring")

    def interrupted(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Plan, "kept", interrupted)
        with pytest.raises(KeyboardInterrupt):
            mpicoll.allreduce(np.ones(3), broken, algorithm="ring")
    for call in (mpicoll.allreduce, mpicoll.iallreduce, mpicoll.allreduce_init):
        with pytest.raises(RuntimeError, match="interrupted by an exception, and its messages may still be in flight"):
            call(np.ones(3), broken, algorithm="ring")
    assert mpicoll.allreduce(np.ones(3), broken.Dup(), algorithm="ring")[0] == P


@pytest.mark.parametrize("wrap", [mpicoll.Comm, lambda comm: comm])
@pytest.mark.parametrize("name", ["auto", "ring"])
def test_broken_off_between_two_messages_native_calls_are_refused_too(comm, monkeypatch, name, wrap):
    """A list of two dtypes is two messages; the next call must not be taken for the second."""
    broken = wrap(comm.Dup())
    run, calls = engine.run, []

    def interrupted(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return run(*args)

    with monkeypatch.context() as patch:
        patch.setattr(engine, "run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            mpicoll.allreduce([np.ones(3), np.ones(3, "f4")], broken, algorithm=name)
    tries = [lambda: mpicoll.allreduce(np.ones(3), broken), lambda: mpicoll.reduce(np.ones(3), broken)]
    tries += [lambda: mpicoll.iallreduce(np.ones(3), broken), lambda: mpicoll.bcast(np.ones(3), broken)]
    if wrap is mpicoll.Comm:
        tries += [lambda: broken.Allreduce(MPI.IN_PLACE, np.ones(3)), lambda: broken.Reduce(np.ones(3), np.ones(3))]
        tries += [lambda: broken.Bcast(np.ones(3)), lambda: broken.Allgather(np.ones(1), np.ones(P))]
        tries += [lambda: broken.Reduce_scatter_block(np.ones(P), np.ones(1))]
    for again in tries:
        with pytest.raises(RuntimeError, match="interrupted by an exception"):
            again()
    assert mpicoll.allreduce(np.ones(3), wrap(broken.Dup()))[0] == P
    assert mpicoll.allreduce(np.ones(3), comm)[0] == P
    broken.Free()


@pytest.mark.parametrize("name", NAMES)
def test_counts_past_a_limit_go_in_pieces(comm, name, monkeypatch):
    """The limits are 2^30 elements and bytes; what they protect from begins at 2^31."""
    monkeypatch.setattr(operations, "MAX_COUNT", 1000)
    monkeypatch.setattr(plan, "MAX_MESSAGE", 1000)

    def add(lower: Any, higher: Any, datatype: MPI.Datatype) -> None:
        first, second = (np.frombuffer(memory, np.float64) for memory in (lower, higher))
        second += first

    added = MPI.Op.Create(add, commute=True)
    for op in ("sum", "mean", added):
        x = own_data(5003, comm.rank) * P
        mpicoll.allreduce(x, comm, op, name)
        total = sum(own_data(5003, rank) for rank in range(P)) * P
        np.testing.assert_array_equal(x, total / (P if op == "mean" else 1))
    x = np.zeros(5003)
    mpicoll.Comm(comm).Allreduce(own_data(5003, comm.rank), x, algorithm=name if name != "native" else "auto")
    np.testing.assert_array_equal(x, sum(own_data(5003, rank) for rank in range(P)))


@pytest.mark.usefixtures("python_engine")
def test_auto_is_native_below_and_ours_above(comm, monkeypatch):
    x = np.zeros(1000)
    assert account(x, mpicoll.Comm(comm.Dup())) == ("native", None, None)
    for bound in select.SHARED_FROM:
        monkeypatch.setitem(select.SHARED_FROM, bound, 1 << 14)
    monkeypatch.setattr(select, "LARGE", {True: 8000, False: 0})
    ours = mpicoll.Comm(comm)
    if P > 1:  # one node
        assert account(np.zeros(2047), ours) == ("native", None, None)
        assert account(np.zeros(2048), ours) == account(x, ours, deterministic=True) == ("shared", 0, 0)
        assert account(np.zeros(10, "e"), ours) == ("shared", 0, 0)
    monkeypatch.setattr(ours._state, "shares", False)  # by messages
    ours._state.follow({})
    if P == 1:
        return  # nothing costs anything
    assert account(x[1:], ours, deterministic=True)[0] == "recursive_doubling"
    assert account(np.zeros(1 << 17), ours, deterministic=True)[0] == "halving_doubling"
    assert account(np.zeros(10, "e"), ours)[0] == "recursive_doubling"
    long = account(np.zeros(1 << 18, "e"), ours)[0]
    assert ROWS[long].added(P) < ROWS["recursive_doubling"].added(P)
    assert account(x, ours)[0] != "native"
    assert account(x[1:], ours)[0] == "native"
    y = own_data(1000, comm.rank)
    mpicoll.allreduce(y, ours)
    np.testing.assert_array_equal(y, sum(own_data(1000, rank) for rank in range(P)))


def run_directly(comm: MPI.Intracomm, schedule: Schedule, x: np.ndarray) -> None:
    """Without the table: on a communicator that carries nothing else."""
    added = operation("sum", x.dtype)
    State(comm).run(Plan(schedule, comm.rank, len(x), x.dtype, added.carried(x.dtype)), x, added)


@pytest.mark.parametrize("make", [census, everyone, exchange, lambda p: fold_tree_reduce(p, p - 1)])
def test_the_plan_does_what_the_interpreter_says(comm, make):
    """Scratch, moves within a rank, several reductions into a chunk, idle ranks, a root: in random bits."""
    if make is exchange and P & (P - 1):
        return
    schedule = make(P)
    everyones = [np.random.default_rng(rank).normal(size=37).astype("f4") for rank in range(P)]
    x = everyones[comm.rank].copy()
    run_directly(comm, schedule, x)
    np.testing.assert_array_equal(x.view("u4"), interpret_arrays(schedule, everyones, np.add)[comm.rank].view("u4"))
    halves = [np.arange(37, dtype="e") + rank for rank in range(P)]
    x = halves[comm.rank].copy()
    run_directly(comm, schedule, x)
    expected = interpret_arrays(schedule, [half.astype("f4") for half in halves], np.add)[comm.rank]
    np.testing.assert_array_equal(x, expected.astype("e"))


@pytest.mark.parametrize("row", ROWS.values(), ids=lambda row: row.name)
def test_bytes_sent_are_the_textbook_ones(comm, row: Algorithm):
    x = np.zeros(P * 840, "f4")  # a multiple of every number of chunks here
    comm, given = mpicoll.Comm(comm), select.parameters(row, x.nbytes, None, None)
    most = comm.allreduce(account(x, comm, row.name)[1], MPI.MAX)
    assert most == row.sent(P, **given) * x.nbytes
    if comm.rank == 0:  # not a collective call
        assert account(x, comm, row.name)[0] == row.name


def test_the_users_pending_receive_never_sees_our_messages(comm):
    ours = mpicoll.Comm(comm)
    mine = np.zeros(1)
    request = comm.Irecv(mine, MPI.ANY_SOURCE, MPI.ANY_TAG)
    for name in ROWS:
        x = np.full(2 * P, 1.0)
        mpicoll.allreduce(x, comm, algorithm=name)
        mpicoll.iallreduce(x, ours, algorithm=name).wait()
        persistent = mpicoll.allreduce_init(x, ours, algorithm=name)
        persistent.start().wait()
        persistent.free()
        np.testing.assert_array_equal(x, P**3)
    assert not request.Test()
    comm.Barrier()  # before anybody sends
    comm.Send(np.array([42.0 + comm.rank]), (comm.rank + 1) % P)
    request.Wait()
    assert mine[0] == 42 + (comm.rank - 1) % P


def test_communicators_and_plans_come_and_go(comm):
    """More communicators than an MPI has contexts: duplicates that are not freed would run out."""
    scarce = MPI.get_vendor()[0] != "Open MPI"  # MPICH and its kin have 2048 contexts; Open MPI has more, and is slow
    for n in range(2200 if scarce and P < 5 else 100):
        part = comm.Split(comm.rank % 2, comm.rank)
        x = np.full(1 + n % 3, float(comm.rank))
        mpicoll.allreduce(x, part, algorithm="tree")
        assert x[0] == sum(range(comm.rank % 2, P, 2))
        part.Free()
    for count in range(2 * state.MAX_PLANS):
        mpicoll.allreduce(np.zeros(count), comm, algorithm="tree")
    own = state.state_of(comm)
    counts = [key[1] for key in own.plans]
    assert counts == list(range(state.MAX_PLANS, 2 * state.MAX_PLANS))
    mpicoll.allreduce(np.zeros(state.MAX_PLANS), comm, algorithm="tree")  # the oldest is now the newest
    assert [key[1] for key in own.plans][-1] == state.MAX_PLANS
    assert len(own._scratch) <= 8 * 2 * state.MAX_PLANS  # shared by all plans


def test_an_unrelated_rank_is_not_needed(comm):
    """Ranks outside a communicator take no part: here they never call."""
    part = comm.Split(0 if comm.rank < (P + 1) // 2 else MPI.UNDEFINED)
    if part != MPI.COMM_NULL:
        x = np.ones(10)
        mpicoll.ring_allreduce(x, part)
        np.testing.assert_array_equal(x, part.size)
        part.Free()


def test_a_plan_is_for_one_kind_of_vector():
    ready = Plan(find("allreduce", "ring").schedule(P), 0, 10, np.dtype("f8"))
    with pytest.raises(ValueError, match=r"planned for 10 x float64, got \(11,\) x float64"):
        next(ready.bind(np.zeros(11), np.empty(10**4, np.uint8), operation("sum", np.dtype("f8"))))
