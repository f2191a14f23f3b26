"""The native kernels have the bits of the reference: every operation on every type, for any processor and for this one.

They are built here with the C compiler found, and called by ctypes.
"""

import ctypes
import platform
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpicoll.mpi.buffers import is_half
from mpicoll.mpi.operations import operation

NATIVE = Path(__file__).parents[2] / "mpicoll" / "native"
FLAGS = ["-std=c11", "-ffp-contract=off", "-fno-math-errno", "-fvisibility=default", "-Wall", "-Werror"]
OPERATIONS = ["sum", "prod", "max", "min", "land", "lor", "lxor", "band", "bor", "bxor"]
LENGTHS = [0, 1, 2, 3, 7, 15, 16, 17, 31, 33, 64, 130, 1000]
DTYPES = [np.dtype(char) for char in "?bBhHiIlLqQfdgFDGe"]
HALVES = [np.dtype("e")]
VARIANTS = {"any processor": 0, "AVX2": 1}
try:
    import ml_dtypes
except ImportError:
    pass
else:
    DTYPES.append(np.dtype(ml_dtypes.bfloat16))
    HALVES.append(np.dtype(ml_dtypes.bfloat16))

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler: cc is not found")
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=[f"{dtype.name} {dtype.char}" for dtype in DTYPES])
each_half = pytest.mark.parametrize("dtype", HALVES, ids=[dtype.name for dtype in HALVES])


class Kind(ctypes.Structure):
    """``kind_t`` of kernels.h."""

    _fields_ = [
        ("size", ctypes.c_size_t),
        ("combine", ctypes.c_void_p * len(OPERATIONS)),
        ("mean", ctypes.c_void_p),
        ("widen", ctypes.c_void_p),
        ("narrow", ctypes.c_void_p),
    ]


class Kernels:
    """What a built library has for one instruction set, called with NumPy arrays."""

    def __init__(self, library: ctypes.CDLL, variant: int) -> None:
        self._of, self._variant = library.kernels_variant, variant
        self._of.restype, self._of.argtypes = ctypes.POINTER(Kind), [ctypes.c_int, ctypes.c_int]

    def kind(self, char: str) -> Kind | None:
        found = self._of(ord(char), self._variant)
        return found.contents if found else None

    def _call(self, name: str, dtype: np.dtype, *arguments: int) -> None:
        kind = self.kind(dtype.char)
        assert kind is not None
        function = kind.combine[OPERATIONS.index(name)] if name in OPERATIONS else getattr(kind, name)
        last = ctypes.c_int if name == "mean" else ctypes.c_size_t
        types: list[Any] = [ctypes.c_void_p] * (3 if name in OPERATIONS else 1 if name == "mean" else 2)
        types += [ctypes.c_size_t, last] if name == "mean" else [last]
        ctypes.CFUNCTYPE(None, *types)(function)(*arguments)

    def combine(self, name: str, lower: np.ndarray, higher: np.ndarray, out: np.ndarray) -> None:
        self._call(name, out.dtype, out.ctypes.data, lower.ctypes.data, higher.ctypes.data, len(out))

    def mean(self, total: np.ndarray, p: int) -> None:
        self._call("mean", total.dtype, total.ctypes.data, len(total), p)

    def widen(self, x: np.ndarray) -> np.ndarray:
        out = np.empty(len(x), np.float32)
        self._call("widen", x.dtype, out.ctypes.data, x.ctypes.data, len(x))
        return out

    def narrow(self, x: np.ndarray, dtype: np.dtype) -> np.ndarray:
        out = np.empty(len(x), dtype)
        self._call("narrow", dtype, out.ctypes.data, x.ctypes.data, len(x))
        return out


def build(target: Path, *flags: str, source: Path = NATIVE) -> ctypes.CDLL:
    command = ["cc", "-O3", *FLAGS, "-shared", "-fPIC", *flags, str(source / "kernels.c"), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(target))


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return build(tmp_path_factory.mktemp("kernels") / "kernels.so")


@pytest.fixture(params=list(VARIANTS.values()), ids=list(VARIANTS))
def kernels(library: ctypes.CDLL, request: pytest.FixtureRequest) -> Kernels:
    found = Kernels(library, request.param)
    if found.kind("f") is None:
        pytest.skip("this processor has no AVX2")
    return found


@pytest.fixture(autouse=True)
def _no_warnings() -> Iterator[None]:
    with np.errstate(all="ignore"):
        yield


def sample(dtype: np.dtype, n: int, seed: int) -> np.ndarray:
    """Random values; among them extremes, and of floats NaNs, infinities, zeros of both signs and subnormals."""
    rng = np.random.default_rng([seed, n])
    if dtype.kind == "c":
        return sample(np.empty(0, dtype).real.dtype, 2 * n, seed).view(dtype)
    if dtype.kind in "biu":
        bounds = np.iinfo(dtype if dtype.kind != "b" else np.uint8)
        special = np.array([0, 0, 1, 2, bounds.min, bounds.min + 1, bounds.max - 1, bounds.max], dtype)
        usual = rng.integers(0, 256, n * dtype.itemsize, np.uint8).view(np.uint8 if dtype.kind == "b" else dtype)
        usual = usual.astype(dtype)
    else:
        info = np.finfo(dtype) if dtype.num < 24 else ml_dtypes.finfo(dtype)
        tiny = info.smallest_subnormal
        numbers = [
            np.nan,
            -np.nan,
            np.inf,
            -np.inf,
            0,
            -0.0,
            1,
            -1,
            tiny,
            -tiny,
            3 * tiny,
            info.max,
            info.min,
            info.tiny,
        ]
        special = np.array(numbers).astype(dtype) if dtype.itemsize <= 8 else np.array(numbers, dtype)
        usual = rng.standard_normal(n).astype(dtype)
        if dtype.itemsize <= 8:  # any pattern; of long doubles some are no numbers
            patterns = rng.integers(0, 256, n * dtype.itemsize, np.uint8).view(dtype)
            usual = np.where(rng.random(n) < 0.5, usual, patterns)
        else:
            usual += (rng.standard_normal(n) * 2.0**-55).astype(dtype)  # fills the last bits too
    return np.where(rng.random(n) < 0.3, rng.choice(special, n), usual)


def placed(values: np.ndarray, offset: int) -> tuple[np.ndarray, np.ndarray]:
    """A copy that begins ``offset`` elements after a multiple of 64 bytes; and the memory around, which is all ones."""
    memory = np.full(values.nbytes + 256, 255, np.uint8)
    alignment = max(values.dtype.alignment, 1)
    start = -memory.ctypes.data % 64 + 64 + offset * alignment
    array = memory[start : start + values.nbytes].view(values.dtype)
    array[:] = values
    return array, memory


def touched(array: np.ndarray, memory: np.ndarray) -> bool:
    """Was anything written around the array?"""
    before = array.ctypes.data - memory.ctypes.data
    return not (memory[:before] == 255).all() or not (memory[before + array.nbytes :] == 255).all()


def differing(actual: np.ndarray, expected: np.ndarray, zeros_alike: bool = False) -> list[str]:
    """The first places where the bits are others; all NaNs are one, and so may be zeros of both signs."""
    assert actual.dtype == expected.dtype
    if actual.dtype.kind == "c":
        actual, expected = (x.view(x.real.dtype) for x in (actual, expected))
    used = 10 if actual.dtype.char == "g" and np.finfo(actual.dtype).nmant == 63 else actual.itemsize  # then padding
    alike = np.equal(*(x.view(np.uint8).reshape(-1, x.itemsize)[:, :used] for x in (actual, expected))).all(axis=1)
    if actual.dtype.kind not in "biu":
        alike |= np.isnan(actual) & np.isnan(expected)
        if zeros_alike:
            alike |= (actual == 0) & (expected == 0)
    return [f"{actual[i]!r} at {i}, expected {expected[i]!r}" for i in np.flatnonzero(~alike)[:3]]


def reference(name: str, lower: np.ndarray, higher: np.ndarray) -> np.ndarray | None:
    """What the operation gives; ``None`` if it is refused, or the kernels leave it to those of float32."""
    if is_half(lower.dtype) and name in ("sum", "prod"):
        return None
    try:
        found = operation(name, lower.dtype)
    except TypeError:
        return None
    out = np.empty_like(lower)
    found.combine(lower, higher, out=out)
    return out


def either(name: str, dtype: np.dtype) -> bool:
    """May a zero have either sign?  Which one NumPy takes, depends on the processor; the kernels do as it on x86."""
    return platform.machine() != "x86_64" and name in ("max", "min") and dtype.kind not in "iu"


def wrong_combinations(kernels: Kernels, dtype: np.dtype, name: str, n: int, expected_of: str = "") -> list[str]:
    wrong = []
    lower, higher = sample(dtype, n, 1), sample(dtype, n, 2)
    expected = reference(expected_of or name, lower, higher)
    assert expected is not None
    for offsets in [(0, 0, 0), (1, 1, 1), (3, 0, 1)]:
        for destination in range(3):
            places = [placed(x, k) for x, k in zip((lower, higher, np.zeros(n, dtype)), offsets, strict=True)]
            out = places[destination][0]
            kernels.combine(name, places[0][0], places[1][0], out)
            assert not any(touched(*place) for place in places)
            for operand, before in zip(places[:2], (lower, higher), strict=True):
                if operand[0] is not out:
                    assert operand[0].tobytes() == before.tobytes()
            wrong += differing(out, expected, either(name, dtype))
    return wrong


def wrong_means(kernels: Kernels, dtype: np.dtype) -> list[str]:
    wrong = []
    finish = operation("mean", dtype).finish
    assert finish is not None
    for p in (1, 2, 3, 4, 6, 7, 100, 1000, 65537):
        for n in LENGTHS:
            values = sample(dtype, n, p)
            values[1::2] = np.arange(-40, n - 40)[: len(values[1::2])].astype(dtype)  # ties among them
            out, memory = placed(values, 1)
            kernels.mean(out, p)
            assert not touched(out, memory)
            finish(values, p)
            wrong += differing(out, values)
    return wrong


def every(dtype: np.dtype) -> np.ndarray:
    return np.arange(1 << 16, dtype=np.uint16).view(dtype)


def to_be_rounded(dtype: np.dtype) -> np.ndarray:
    """All that 16 bits hold, halfway between each two and beyond the last, the neighbours of these; and any bits."""
    numbers = np.unique(every(dtype)[np.isfinite(every(dtype))].astype(np.float64))
    beyond = 2.0 ** (16 if dtype.char == "e" else 128)
    numbers = np.concatenate([[-beyond], numbers, [beyond]])
    halfway = ((numbers[1:] + numbers[:-1]) / 2).astype(np.float32)
    neighbours = [np.nextafter(halfway, np.float32(to)) for to in (-np.inf, np.inf)]
    patterns = np.random.default_rng(1).integers(0, 1 << 32, 100_000, np.uint32).view(np.float32)
    return np.concatenate([every(dtype).astype(np.float32), halfway, *neighbours, patterns])


def wrong_roundings(kernels: Kernels, dtype: np.dtype) -> list[str]:
    x = to_be_rounded(dtype)
    return differing(kernels.narrow(x, dtype), x.astype(dtype))


@each_dtype
def test_every_operation_has_the_bits_of_the_reference(kernels, dtype):
    kind = kernels.kind(dtype.char)
    assert kind.size == dtype.itemsize
    for index, name in enumerate(OPERATIONS):
        if reference(name, np.zeros(2, dtype), np.zeros(2, dtype)) is None:
            assert kind.combine[index] is None
            continue
        for n in LENGTHS:
            assert wrong_combinations(kernels, dtype, name, n) == []


@each_dtype
def test_the_mean_has_the_bits_of_the_reference(kernels, dtype):
    if dtype.kind == "b" or is_half(dtype):
        assert kernels.kind(dtype.char).mean is None
    else:
        assert wrong_means(kernels, dtype) == []


@each_half
@pytest.mark.parametrize("name", ["sum", "mean", "prod"])
def test_16_bit_floats_are_carried_as_float32_and_rounded_once(kernels, dtype, name):
    found, p = operation(name, dtype), 3
    for n in LENGTHS:
        shares = [sample(dtype, n, seed) for seed in range(p)]
        total, expected = kernels.widen(shares[0]), shares[0].astype(np.float32)
        for share in shares[1:]:
            kernels.combine("prod" if name == "prod" else "sum", total, kernels.widen(share), total)
            found.combine(expected, share.astype(np.float32), out=expected)
        if found.finish:
            kernels.mean(total, p)
            found.finish(expected, p)
        assert differing(kernels.narrow(total, dtype), expected.astype(dtype)) == []


@each_half
def test_all_16_bit_floats_widen_and_come_back(kernels, dtype):
    x = every(dtype)
    assert differing(kernels.widen(x), x.astype(np.float32)) == []
    assert differing(kernels.narrow(kernels.widen(x), dtype), x) == []


@each_half
def test_rounding_is_to_nearest_even(kernels, dtype):
    assert wrong_roundings(kernels, dtype) == []


@each_half
def test_few_16_bit_floats_are_converted_as_many_are(kernels, dtype):
    rounded = to_be_rounded(dtype)[-1000:]
    for n in LENGTHS:
        x = sample(dtype, n, 1)
        assert differing(kernels.widen(x), x.astype(np.float32)) == []
        assert differing(kernels.narrow(rounded[:n], dtype), rounded[:n].astype(dtype)) == []


@each_half
def test_the_variants_convert_to_the_same_bits_of_nans_too(library, dtype):
    one, other = (Kernels(library, variant) for variant in (0, -1))
    x = every(dtype)
    assert one.widen(x).tobytes() == other.widen(x).tobytes()
    x = to_be_rounded(dtype)
    assert one.narrow(x, dtype).tobytes() == other.narrow(x, dtype).tobytes()
    assert one.narrow(x[-9:], dtype).tobytes() == one.narrow(x, dtype)[-9:].tobytes()


@pytest.mark.parametrize("variant", [0, 1, -1])
def test_other_types_have_no_kernels(library, variant):
    for char in "mMSUOVpPcxa\0":
        assert Kernels(library, variant).kind(char) is None


def test_the_best_is_taken_of_what_there_is(library):
    address = {
        variant: ctypes.addressof(kind) for variant in (0, 1, -1) if (kind := Kernels(library, variant).kind("f"))
    }
    assert address[-1] == address.get(1, address[0])
    library.kernels_of.restype = ctypes.c_void_p
    assert library.kernels_of(ord("f")) == address[-1]


@each_dtype
def test_another_operation_in_its_place_is_noticed(kernels, dtype):
    zeros = np.zeros(2, dtype)
    names = [name for name in OPERATIONS if reference(name, zeros, zeros) is not None]
    assert len(names) >= 2
    for name in names:
        for other in names:
            assert bool(wrong_combinations(kernels, dtype, name, 1000, expected_of=other)) == (name != other)


@pytest.mark.parametrize(
    ("file", "right", "wrong", "check"),
    [
        (
            "kernels.inc",
            "(a MORE b) | (a != a)",
            "(a MORE b)",
            lambda k: wrong_combinations(k, np.dtype("d"), "max", 130),
        ),
        ("kernels.inc", "rest > p - rest", "rest >= p - rest", lambda k: wrong_means(k, np.dtype("h"))),
        ("kernels.inc", "below = rest < 0", "below = 0", lambda k: wrong_means(k, np.dtype("q"))),
        ("kernels.c", "0xfff + (magnitude >> 13 & 1)", "0x1000", lambda k: wrong_roundings(k, np.dtype("e"))),
    ],
    ids=["NaN lost", "ties up", "towards zero", "halves up"],
)
def test_a_wrong_kernel_is_noticed(tmp_path, file, right, wrong, check):
    for source in NATIVE.glob("kernels.*"):
        text = source.read_text()
        if source.name == file:
            assert right in text
            text = text.replace(right, wrong)
        (tmp_path / source.name).write_text(text)
    assert check(Kernels(build(tmp_path / "wrong.so", "-O1", "-Wno-error", source=tmp_path), 0))


def test_a_fused_product_and_sum_would_be_noticed(tmp_path):
    flags = ["-ffp-contract=fast"]
    if platform.machine() == "x86_64":
        flags.append("-mfma")
        if "fma" not in Path("/proc/cpuinfo").read_text().split():
            pytest.skip("this processor fuses none")
    elif platform.machine() != "aarch64":
        pytest.skip("it is not known how to fuse them here")
    assert wrong_combinations(Kernels(build(tmp_path / "fused.so", *flags), 0), np.dtype("D"), "prod", 1000)
