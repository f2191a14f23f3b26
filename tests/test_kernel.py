"""The kernel for GPUs: its text is compiled for the CPU, and must have the bits of the host; and for a GPU."""

import ctypes
import re
import shutil
import subprocess
import warnings
from collections.abc import Callable
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from mpi4py import MPI

from mpicoll.mpi.buffers import PAIRS
from mpicoll.mpi.gpu import kernel
from mpicoll.mpi.operations import MOVE, operation
from mpicoll.mpi.shared import additions

RANKS = [1, 2, 3, 4, 5, 8, 13]
REDUCED = ["sum", "mean", "prod", "max", "min", "land", "lor", "lxor", "band", "bor", "bxor"]
NUMPYS = ["bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float16", "float32"]
DTYPES = [np.dtype(name) for name in [*NUMPYS, "float64", "complex64", "complex128"]]
try:
    import ml_dtypes
except ImportError:
    pass
else:
    DTYPES.append(np.dtype(ml_dtypes.bfloat16))


class Case(NamedTuple):
    """What a kernel is made for."""

    name: str
    dtype: np.dtype
    p: int
    targets: int = 2
    width: int = 16

    @property
    def divisor(self) -> int | None:
        return self.p if self.name == "mean" else None

    def source(self) -> str:
        return kernel.source(self.name, self.dtype, self.p, self.targets, self.width, self.divisor)

    def __str__(self) -> str:
        return f"{self.name}-{self.dtype}-p{self.p}-{self.targets}-{self.width}"


def defined() -> list[tuple[str, np.dtype]]:
    """All operations, on all dtypes that they are defined on."""
    found = []
    for name in REDUCED:
        for dtype in DTYPES:
            try:
                operation(name, dtype)
            except TypeError:
                continue
            found.append((name, dtype))
    return found


HALVES: list[np.dtype] = [dtype for dtype in DTYPES if dtype.itemsize == 2 and dtype.kind in "fV"]
SAMPLE: list[tuple[str, np.dtype]] = [
    ("sum", np.dtype(np.float32)),
    ("prod", np.dtype(np.complex64)),
    ("mean", np.dtype(np.int16)),
]
CASES = [
    *(Case(name, dtype, 3) for name, dtype in defined()),
    *(Case(name, dtype, p, p) for p in RANKS if p != 3 for name, dtype in SAMPLE),
    *(Case("mean", dtype, p, 1) for p in (1, 8) for dtype in HALVES),
    *(Case("sum", dtype, 1, 3) for dtype in (np.dtype(np.float32), *HALVES)),  # which moves
    *(Case(MOVE.name, np.dtype(np.uint8), 1, 3, width) for width in (1, 4, 16)),
    *(Case("sum", np.dtype(np.float32), 2, 2, width) for width in (1, 2, 4, 8)),
    *(Case("sum", np.dtype(np.complex128), 2, 2, width) for width in (4, 8)),
    Case("max", np.dtype(np.int8), 64, 1),
]

SHIM = """\
#define __global__
#define __device__
#define __launch_bounds__(n)
struct Index { unsigned int x; };
extern "C" { Index blockIdx, blockDim, gridDim, threadIdx; }
"""


ROUNDING = """\
extern "C" void narrow_{dtype}(const float* given, unsigned short* found, int count) {{
    for (int i = 0; i < count; i++) found[i] = n{number}::narrow(given[i]);
}}
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """All kernels, each with a name of its own, for the CPU."""
    if not shutil.which("g++"):
        pytest.skip("there is no g++ to compile it with")
    folder = tmp_path_factory.mktemp("kernels")
    made = folder / "kernels.so"
    whole = folder / "kernels.cpp"
    rounding = [ROUNDING.format(dtype=dtype, number=CASES.index(Case("mean", dtype, 8, 1))) for dtype in HALVES]
    whole.write_text("".join([SHIM, together(CASES), *rounding]))
    exact = ["-O1", "-ffp-contract=off", "-fno-fast-math", "-std=c++17", "-Wall", "-Wno-unknown-pragmas"]
    done = subprocess.run(
        ["g++", *exact, "-shared", "-fPIC", "-o", made, whole], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    return ctypes.CDLL(str(made))


def together(cases: list[Case]) -> str:
    parts = []
    for n, case in enumerate(cases):
        parts.append(f"namespace n{n} {{\n#define {kernel.NAME} k{n}\n{case.source()}#undef {kernel.NAME}\n}}\n")
    return "".join(parts)


def run(library: ctypes.CDLL, case: Case, pointers: list[int], lo: int, hi: int) -> None:
    """By two blocks of three threads, one after another: what one had not read before another wrote, it would miss."""
    do = library[f"k{CASES.index(case)}"]
    given = [*map(ctypes.c_uint64, pointers), ctypes.c_int64(lo), ctypes.c_int64(hi)]
    block, blocks, thread, threads = (
        ctypes.c_uint.in_dll(library, name) for name in ("blockIdx", "gridDim", "threadIdx", "blockDim")
    )
    blocks.value, threads.value = 2, 3
    for n in range(6):
        block.value, thread.value = divmod(n, 3)
        do(*given)


def numbers(dtype: np.dtype, count: int, seed: int) -> np.ndarray:
    """Of all sizes, with what is special among them; and everything there is of 8 and 16 bits."""
    random = np.random.default_rng(seed)
    bits = np.frombuffer(random.bytes(count * dtype.itemsize), np.uint8)
    if dtype.kind == "b":
        return (bits & 1).view(bool)
    any_bits = bits.view(dtype)
    if dtype.kind in "iu":
        few = np.array([0, 1, 2, 3, 5], dtype)[random.integers(5, size=count)]
        return np.where(random.random(count) < 0.3, few, any_bits)
    if dtype.kind == "c":
        return numbers(np.dtype(f"f{dtype.itemsize // 2}"), 2 * count, seed).view(dtype)
    tiny = any_bits.copy()
    tiny.view(f"u{dtype.itemsize}")[:] &= {2: 0x8007, 4: 0x80000007, 8: 0x8000000000000007}[dtype.itemsize]
    special = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, -np.nan], np.float64).astype(dtype)
    near = np.round(random.normal(size=count) * 32).astype(dtype)
    kinds = [near, near * dtype.type(0.0009765625), any_bits, tiny, special[random.integers(6, size=count)]]
    which = random.choice(5, size=count, p=[0.25, 0.2, 0.2, 0.1, 0.25])
    return np.choose(which, [kind.view(f"u{dtype.itemsize}") for kind in kinds]).view(dtype)


def reduced(case: Case, arrays: list[np.ndarray]) -> np.ndarray:
    """As the host does it, in the canonical order."""
    if case.p == 1 and not case.divisor:
        return arrays[0].copy()
    found = operation(case.name, case.dtype)
    values = [array.astype(found.carried(case.dtype)) for array in arrays]
    steps = additions(case.p) if case.p > 1 else ()
    values += [values[0].copy() for _ in range(max([into for *_, into in steps], default=0))]
    for lower, higher, into in steps:
        found.combine(values[lower], values[higher], out=values[into])
    total = values[case.p] if case.p > 1 else values[0]
    if found.finish:
        found.finish(total, case.p)
    return total.astype(case.dtype)


def assert_same_bits(case: Case, found: np.ndarray, wanted: np.ndarray) -> None:
    """But for those of NaNs that were computed."""
    if case.dtype.kind == "c":
        found, wanted = found.view(found.real.dtype), wanted.view(wanted.real.dtype)
    bits = f"u{found.itemsize}"
    same = found.view(bits) == wanted.view(bits)
    if case.name in ("sum", "mean", "prod") and case.dtype.kind in "fcV" and (case.p > 1 or case.divisor):
        with np.errstate(invalid="ignore"):  # ml_dtypes says that there are some
            same |= np.isnan(found) & np.isnan(wanted)
    bad = np.flatnonzero(~same)
    assert not len(bad), f"{len(bad)} differ, such as {found[bad[0]]}, not {wanted[bad[0]]}"


class Memory:
    """Bytes with an element at ``lo`` where a multiple of ``width``, and of nothing wider, is; and 64 on both sides."""

    def __init__(self, case: Case, lo: int, hi: int) -> None:
        size = case.dtype.itemsize
        self.raw = np.full((hi + 1) * size + 192, 0xA5, np.uint8)
        at = self.raw.ctypes.data
        start = 64 - (at + lo * size) % 32 + (case.width if case.width < 16 else 0)
        self.pointer, self.case, self.lo = at + start + 32, case, lo
        self.part = self.raw[start + 32 + lo * size :][: (hi - lo) * size]

    def fill(self, values: np.ndarray) -> "Memory":
        self.part[:] = values.view(np.uint8)
        return self

    def values(self) -> np.ndarray:
        return np.frombuffer(self.part.tobytes(), self.case.dtype)

    def assert_whole(self) -> None:
        """What is around it is as it was."""
        self.part[:] = 0xA5
        assert (self.raw == 0xA5).all()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_bits_are_those_of_the_host(library: ctypes.CDLL, case: Case) -> None:
    elements = max(case.width // case.dtype.itemsize, 1)
    for count in (0, 1, elements - 1, elements + 1, 211):
        for lo in (0, 5):
            for in_place in (False, True):
                hi = lo + count
                given = [numbers(case.dtype, count, seed=case.p * 1000 + q) for q in range(case.p)]
                sources = [Memory(case, lo, hi).fill(values) for values in given]
                targets = [Memory(case, lo, hi) for _ in range(case.targets)]
                if in_place:
                    targets[: case.p] = sources[: case.targets]
                pointers = [memory.pointer for memory in (*sources, *targets)]
                assert kernel.width(pointers, lo, case.dtype.itemsize) == (case.width if case.width < 16 else 16)
                run(library, case, pointers, lo, hi)
                with np.errstate(all="ignore"), warnings.catch_warnings():
                    warnings.simplefilter("ignore", RuntimeWarning)
                    wanted = reduced(case, given)
                for memory in targets:
                    assert_same_bits(case, memory.values(), wanted)
                for memory in (*sources, *targets):
                    memory.assert_whole()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_all_halves_are_what_they_were(library: ctypes.CDLL, dtype: np.dtype) -> None:
    case, given = Case("mean", dtype, 1, 1), np.arange(1 << 16, dtype=np.uint16).view(dtype)
    source, target = Memory(case, 0, len(given)).fill(given), Memory(case, 0, len(given))
    run(library, case, [source.pointer, target.pointer], 0, len(given))
    assert_same_bits(case, target.values(), given)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_floats_are_rounded_as_numpy_does(library: ctypes.CDLL, dtype: np.dtype) -> None:
    ends = np.arange(1 << 16, dtype=np.uint32)[:, None] << 16
    given = (ends | np.array([0, 1, 0x0FFF, 0x1000, 0x1001, 0x3000, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)).ravel()
    found = np.empty(given.shape, dtype)
    library[f"narrow_{dtype}"](ctypes.c_void_p(given.ctypes.data), ctypes.c_void_p(found.ctypes.data), len(given))
    with np.errstate(all="ignore"):
        assert_same_bits(Case("mean", dtype, 1), found, given.view(np.float32).astype(dtype))


ARCHITECTURE = "sm_90"
UNUSED = "177"  # the number of a warning: a mean of one array combines nothing
Compiler = Callable[[str, Path], bytes]


def by_nvcc(text: str, folder: Path) -> bytes:
    """What nvcc makes of a text for a GPU; an ``AssertionError`` with what it says, be it a warning."""
    if not shutil.which("nvcc"):
        pytest.skip("there is no nvcc to compile it with")
    (folder / "kernels.cu").write_text(text)
    wanted = [f"-arch={ARCHITECTURE}", "-cubin", f"-diag-suppress={UNUSED}", *kernel.OPTIONS, "kernels.cu"]
    done = subprocess.run(["nvcc", *wanted], cwd=folder, capture_output=True, text=True, timeout=60)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert said == ""
    return (folder / "kernels.cubin").read_bytes()


def by_nvrtc(text: str, folder: Path) -> bytes:
    """What NVRTC, by which CuPy compiles, makes of a text; an ``AssertionError`` as by nvcc."""
    library, program, size = nvrtc(), ctypes.c_void_p(), ctypes.c_size_t()
    wanted = (f"--gpu-architecture={ARCHITECTURE}", f"--diag-suppress={UNUSED}", *kernel.OPTIONS)
    options = [option.encode() for option in wanted]
    assert not library.nvrtcCreateProgram(ctypes.byref(program), text.encode(), b"kernels.cu", 0, None, None)
    failed = library.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))

    def read(what: str) -> bytes:
        assert not library[f"nvrtcGet{what}Size"](program, ctypes.byref(size))
        found = ctypes.create_string_buffer(size.value)
        assert not library[f"nvrtcGet{what}"](program, found)
        return found.raw

    said = read("ProgramLog").rstrip(b"\0").decode()
    assert not failed, said
    assert said == ""
    made = read("CUBIN")
    library.nvrtcDestroyProgram(ctypes.byref(program))
    return made


def nvrtc() -> ctypes.CDLL:
    """The library: the system's, or that of a package beside CuPy."""
    spec = find_spec("nvidia")
    packages = [Path(folder) for folder in spec.submodule_search_locations or []] if spec else []
    beside = [str(file) for folder in packages for file in sorted(folder.glob("*/lib/libnvrtc.so.*"))]
    for name in (*beside, "libnvrtc.so", *(f"libnvrtc.so.{version}" for version in (13, 12))):
        with suppress(OSError):
            return ctypes.CDLL(name)
    pytest.skip("there is no NVRTC to compile it with: pip install nvidia-cuda-nvrtc")


GPU_CASES = [
    *(
        Case(name, np.dtype(dtype), 8, 8)
        for name, dtype in [("sum", "float32"), ("prod", "complex64"), ("max", "float16")]
    ),
    *(Case("mean", np.dtype(name), 4, 4) for name in ("int8", "int64")),
    *(Case("mean", dtype, 4, 4) for dtype in HALVES),
    *(Case(MOVE.name, np.dtype(np.uint8), 1, targets) for targets in (1, 8)),
    Case("lxor", np.dtype(bool), 2, 2),
    Case("sum", np.dtype(np.float32), 64, 64),
    Case("sum", np.dtype(np.complex128), 2, 2, 8),
]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """What the compiler for GPUs says, and what it makes of them."""
    if not shutil.which("nvcc"):
        pytest.skip("there is no nvcc to compile it with")
    folder = tmp_path_factory.mktemp("kernels")
    (folder / "kernels.cu").write_text(together(GPU_CASES))
    wanted = ["-arch=sm_90", "-cubin", "-Werror=all-warnings", "-Xptxas=-v", "--keep", *kernel.OPTIONS, "kernels.cu"]
    done = subprocess.run(["nvcc", *wanted], cwd=folder, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stderr, (folder / "kernels.ptx").read_text()


def test_compiles_for_a_gpu_and_all_that_a_thread_reads_is_in_registers(compiled: tuple[str, str]) -> None:
    said, _ = compiled
    assert "warning" not in said
    assert re.findall(r"(\d+) bytes stack frame", said) == ["0"] * len(GPU_CASES)
    assert re.findall(r"(\d+) bytes spill", said) == ["0"] * 2 * len(GPU_CASES)


def test_loads_and_stores_are_wide(compiled: tuple[str, str]) -> None:
    _, made = compiled
    for n, case in enumerate(GPU_CASES):
        text = made[made.index(f".entry k{n}(") :].partition("\n}")[0]
        for verb in ("ld", "st"):
            found = re.findall(rf"{verb}\.global(?:\.v(\d))?\.\w(\d+)", text)
            assert max(int(many or 1) * int(bits) // 8 for many, bits in found) == (8 if case.p == 64 else case.width)


def test_a_product_and_a_sum_are_rounded_each(compiled: tuple[str, str]) -> None:
    _, made = compiled
    assert "mul.rn.f32" in made
    assert "fma." not in made


FORMS = [(1, 3, 16), (2, 1, 16), (3, 3, 1), (8, 2, 8)]
"""Arrays to read, arrays to write, and bytes of loads and stores."""


def every(p: int, targets: int, width: int) -> list[Case]:
    """All operations, on all dtypes that they are defined on; of one array to read also moves, of all sizes."""
    moves = [Case(MOVE.name, np.dtype(f"V{size}"), p, targets, width) for size in (1, 2, 4, 8, 16) if p == 1]
    return [*moves, *(Case(name, dtype, p, targets, width) for name, dtype in defined())]


@pytest.mark.parametrize(("p", "targets", "width"), FORMS)
@pytest.mark.parametrize("compiler", [by_nvcc, by_nvrtc])
def test_compiles_for_a_gpu(compiler: Compiler, p: int, targets: int, width: int, tmp_path: Path) -> None:
    cases = every(p, targets, width)
    made = compiler(together(cases), tmp_path)
    assert all(f"k{n}\0".encode() in made for n in range(len(cases)))


@pytest.mark.parametrize("compiler", [by_nvcc, by_nvrtc])
def test_an_error_in_a_kernel_is_found(compiler: Compiler, tmp_path: Path) -> None:
    wrong = Case("sum", np.dtype(np.float32), 2).source().replace("a + b", "a + c")
    with pytest.raises(AssertionError, match='identifier "c" is undefined'):
        compiler(wrong, tmp_path)


def test_the_text_includes_nothing() -> None:
    for name, dtype in defined():
        assert "#include" not in Case(name, dtype, 5).source()


def test_width_is_what_all_arrays_allow() -> None:
    assert kernel.width([4096, 8192], 0, 4) == 16
    assert kernel.width([4096, 8192], 1, 4) == 4
    assert kernel.width([4096 - 4, 8192 + 12], 1, 4) == 16
    assert kernel.width([4096, 8192 + 8], 0, 16) == 8
    assert kernel.width([4096, 8193], 0, 2) == 1


def test_shape_has_a_thread_for_each_group_up_to_a_bound() -> None:
    assert kernel.shape(0, 16, 4, 132) == (1, 256)
    assert kernel.shape(1024, 16, 4, 132) == (1, 256)
    assert kernel.shape(1025, 16, 4, 132) == (2, 256)
    assert kernel.shape(257, 4, 16, 132) == (2, 256)
    assert kernel.shape(1 << 40, 16, 4, 132) == (132 * 64, 256)


def test_what_cannot_be_done_is_refused() -> None:
    for name, dtype in defined():
        assert kernel.refusal(operation(name, dtype), dtype) == ""
    assert kernel.refusal(MOVE, np.dtype(np.uint8)) == ""
    assert kernel.refusal(MOVE, np.dtype("S12")) == "elements have 12 bytes"
    long = np.dtype(np.longdouble)
    assert kernel.refusal(operation("sum", long), long) == f"there is no {long} on GPUs"
    pair, own = next(iter(PAIRS)), MPI.Op.Create(lambda a, b, datatype: None)
    for op, dtype in [(MPI.MAXLOC, pair), (MPI.MINLOC, pair), (own, np.dtype(float))]:
        assert kernel.refusal(operation(op, dtype), dtype) == "the operation is no predefined one"
    own.Free()
