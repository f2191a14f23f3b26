"""The kernel that reduces arrays in the memory of a GPU, as text: nothing here touches a GPU, or CuPy.

It reads the same elements of p arrays, combines them in the canonical order (see ``shared.additions``), and writes the
result to any number of arrays, which may be those that were read: a thread has read all of its elements before it
writes any.  So every array is read once, and written once, which is the least that can be.  Bits are those of the host,
but for the payloads of NaNs that were computed (of a GPU's there is one only), and whatever the CPU, zeros and NaNs are
chosen as NumPy does on x86.

Headers cannot be counted upon where CuPy compiles, so the text includes none.
"""

from collections.abc import Iterable
from functools import lru_cache
from math import gcd
from typing import NamedTuple

import numpy as np

from ..buffers import is_half
from ..operations import MOVE, Operation
from ..shared import additions

NAME = "mpicoll_reduce"

OPTIONS = ("--fmad=false",)
"""Options of the compiler: a product and a sum that are rounded only once would differ from the host's bits."""

WIDEST = 16
"""Bytes of the widest loads and stores."""

BLOCK = 256  # threads
BLOCKS = 64
"""The most blocks for each multiprocessor, which runs 3 to 6 at a time: enough that it does not matter if the last run
is not full.  Of longer arrays each thread does more.  Not measured."""

PENDING = 64
"""Bytes that a thread reads before it waits for any, with no more than 8 loads.

The 750 to 1500 threads that a multiprocessor has registers for then read 48 to 96 KB; what keeps the memory busy is
about 25 KB for a multiprocessor of an H100 (3.4 TB/s, perhaps 0.9 us of latency, 132 multiprocessors), and 35 KB for
one of an H200.  Not measured.
"""

HELD = 512
"""Bytes of input that a thread has registers for; it has 255 registers of 4 bytes for everything."""

_WORDS = {16: "Bytes16", 8: "unsigned long long", 4: "unsigned int", 2: "unsigned short", 1: "unsigned char"}
_INTEGERS = {
    **{f"uint{8 * size}": word for size, word in _WORDS.items() if size < 16},
    **{"bool": "unsigned char", "int8": "signed char", "int16": "short", "int32": "int", "int64": "long long"},
}
_FLOATS = {"float32": "float", "float64": "double"}
_COMPLEX = {"complex64": "float", "complex128": "double"}  # of two each

_TEXT = """\
enum {{ P = {p}, TARGETS = {targets} }};  // arrays to read, and to write
enum {{ WORDS = {words}, ELEMENTS = {elements} }};  // in a group
enum {{ AT_ONCE = {at_once} }};  // groups that a thread reads before it combines any
enum {{ SIZE = {size} }};  // bytes of an element

struct alignas(16) Bytes16 {{ unsigned int a, b, c, d; }};
typedef {word} Word;
{types}
union Group {{
    Word words[WORDS];
    Element elements[ELEMENTS];
}};

static __device__ inline Element reduced(const Element (&x)[P]) {{
{steps}
}}

extern "C" __global__ void __launch_bounds__({block})
{name}({arguments}, long long lo, long long hi) {{
    const char* const sources[P] = {{{sources}}};
    char* const targets[TARGETS] = {{{sinks}}};
    const long long count = hi - lo, groups = count / ELEMENTS;
    const long long thread = blockIdx.x * (long long)blockDim.x + threadIdx.x;
    const long long threads = gridDim.x * (long long)blockDim.x;
#pragma unroll 1
    for (long long first = thread; first < groups; first += AT_ONCE * threads) {{
        Group given[AT_ONCE][P];
#pragma unroll
        for (int k = 0; k < AT_ONCE; k++) {{
            const long long group = first + k * threads;
            if (group >= groups) continue;
            const long long byte = lo * SIZE + group * (long long)sizeof(Group);
#pragma unroll
            for (int n = 0; n < P; n++) {{
                const Word* const words = (const Word*)(sources[n] + byte);
#pragma unroll
                for (int w = 0; w < WORDS; w++) given[k][n].words[w] = words[w];
            }}
        }}
#pragma unroll
        for (int k = 0; k < AT_ONCE; k++) {{
            const long long group = first + k * threads;
            if (group >= groups) continue;
            const long long byte = lo * SIZE + group * (long long)sizeof(Group);
            Group result;
#pragma unroll
            for (int e = 0; e < ELEMENTS; e++) {{
                Element x[P];
#pragma unroll
                for (int n = 0; n < P; n++) x[n] = given[k][n].elements[e];
                result.elements[e] = reduced(x);
            }}
#pragma unroll
            for (int n = 0; n < TARGETS; n++) {{
                Word* const words = (Word*)(targets[n] + byte);
#pragma unroll
                for (int w = 0; w < WORDS; w++) words[w] = result.words[w];
            }}
        }}
    }}
#pragma unroll 1
    for (long long i = lo + groups * ELEMENTS + thread; i < hi; i += threads) {{  // fewer than are in a group
        Element x[P];
#pragma unroll
        for (int n = 0; n < P; n++) x[n] = ((const Element*)sources[n])[i];
        const Element result = reduced(x);
#pragma unroll
        for (int n = 0; n < TARGETS; n++) ((Element*)targets[n])[i] = result;
    }}
}}
"""

_WIDE = {
    "float16": """\
union Single { float number; unsigned int bits; };
static __device__ inline float wide(unsigned short half) {
    Single single;
#ifdef __CUDA_ARCH__
    asm("cvt.f32.f16 %0, %1;" : "=f"(single.number) : "h"(half));
#else
    const unsigned int rest = half & 0x7fffu;
    single.number = rest / 16777216.0f;  // what a denormal is
    if (rest >= 0x400u) single.bits = (rest << 13) + ((rest >= 0x7c00u ? 224u : 112u) << 23);
    single.bits |= (half & 0x8000u) << 16;
#endif
    return single.number;
}
""",
    "bfloat16": """\
union Single { float number; unsigned int bits; };
static __device__ inline float wide(unsigned short half) {
    Single single;
    single.bits = (unsigned int)half << 16;
    return single.number;
}
""",
}

# To the nearest, to even where two are.
_NARROW = {
    "float16": """\
static __device__ inline unsigned short narrow(float number) {
    unsigned short half;
#ifdef __CUDA_ARCH__
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half) : "f"(number));
#else
    Single single;
    single.number = number;
    const unsigned int sign = (single.bits >> 16) & 0x8000u;
    single.bits &= 0x7fffffffu;
    if (single.bits > 0x7f800000u) return 0x7fffu;
    if (single.bits >= 0x47800000u) return sign | 0x7c00u;
    if (single.bits >= 0x38800000u) {
        half = sign | ((single.bits + 0xfffu + ((single.bits >> 13) & 1u) - 0x38000000u) >> 13);
    } else {
        single.number += 0.5f;  // whose last bit is as much as the last of a denormal
        half = sign | (single.bits - 0x3f000000u);
    }
#endif
    return half;
}
""",
    "bfloat16": """\
static __device__ inline unsigned short narrow(float number) {
    Single single;
    single.number = number;
    if (number != number) return 0x7fffu;
    return (single.bits + 0x7fffu + ((single.bits >> 16) & 1u)) >> 16;
}
""",
}

_MEAN_OF_INTEGERS = """\
static __device__ inline {wide} mean({wide} total) {{
    {wide} quotient = total / {divisor}, rest = total % {divisor};{floor}
    const bool up = rest > {divisor} - rest || (rest == {divisor} - rest && (quotient & 1));
    return quotient + up;  // the nearest, to even where two are
}}
"""

_FLOOR = """
    if (rest < 0) quotient -= 1, rest += {divisor};"""

_ARITHMETIC = """\
{types}
static __device__ inline Value value(Element x) {{ return {value}; }}
static __device__ inline Value combined(Value a, Value b) {{ return {combined}; }}
static __device__ inline Element element(Value total) {{ return {element}; }}
"""

_SYMBOLS = {"sum": "+", "mean": "+", "prod": "*", "max": ">", "min": "<"}
_SYMBOLS |= {f"{kind}{name}": symbol for kind in "lb" for name, symbol in [("and", "&"), ("or", "|"), ("xor", "^")]}


def refusal(operation: Operation, dtype: np.dtype) -> str:
    """Why the kernel cannot reduce such elements; empty if it can."""
    if operation.name == MOVE.name:
        return "" if dtype.itemsize in _WORDS else f"elements have {dtype.itemsize} bytes"
    if not operation.predefined or operation.name in ("maxloc", "minloc"):
        return "the operation is no predefined one"
    known = is_half(dtype) or dtype.name in (*_INTEGERS, *_FLOATS, *_COMPLEX)
    return "" if known else f"there is no {dtype} on GPUs"


def width(pointers: Iterable[int], lo: int, itemsize: int) -> int:
    """Bytes of the widest loads and stores that arrays allow whose elements 0 are at these addresses."""
    return gcd(WIDEST, *(pointer + lo * itemsize for pointer in pointers))


def shape(count: int, width: int, itemsize: int, processors: int) -> tuple[int, int]:
    """The numbers of blocks, and of threads in each block, for ``count`` elements."""
    groups = -(-count * itemsize // max(width, itemsize))
    return max(min(-(-groups // BLOCK), BLOCKS * processors), 1), BLOCK


@lru_cache
def source(operation: str, dtype: np.dtype, p: int, targets: int, width: int, divisor: int | None = None) -> str:
    """A kernel in CUDA C++.  Its arguments are the addresses of elements 0 of ``p`` arrays to read, and of as many to
    write as there are ``targets``, and which elements: from ``lo`` to before ``hi``.

    ``width`` is that of loads and stores, for these elements; a mean is divided by ``divisor``.
    """
    size = dtype.itemsize
    width = min(width, 1 << max(HELD // p, 1).bit_length() - 1)
    sources, sinks = [f"s{n}" for n in range(p)], [f"t{n}" for n in range(targets)]
    if p == 1 and divisor is None:  # bits are kept, even those of NaNs
        types, steps = f"typedef {_WORDS[size]} Element;", ["return x[0];"]
    else:
        types, steps = _arithmetic(operation, dtype, divisor).text(), _steps(p)
    return _TEXT.format(
        p=p,
        targets=targets,
        words=max(size // width, 1),
        elements=max(width // size, 1),
        at_once=max(min(PENDING // max(size, width), 8) // p, 1),
        size=size,
        word=_WORDS[width],
        types=types,
        steps="\n".join(f"    {step}" for step in steps),
        block=BLOCK,
        name=NAME,
        arguments=", ".join([f"const char* {array}" for array in sources] + [f"char* {array}" for array in sinks]),
        sources=", ".join(sources),
        sinks=", ".join(sinks),
    )


def _steps(p: int) -> list[str]:
    """Statements that combine p values in the canonical order, each result under a name of its own."""
    names = {n: f"value(x[{n}])" for n in range(p)}
    steps = []
    for number, (lower, higher, into) in enumerate(additions(p) if p > 1 else ()):
        steps.append(f"const Value v{number} = combined({names[lower]}, {names[higher]});")
        names[into] = f"v{number}"
    return [*steps, f"return element({names[p if p > 1 else 0]});"]


class _Arithmetic(NamedTuple):
    """An operation in C++: the types ``Element`` and ``Value``, and expressions for the value of an element ``x``, for
    what values ``a`` and ``b`` combine to, and for the element made of the ``total``."""

    types: str
    combined: str
    value: str = "x"
    element: str = "total"

    def text(self) -> str:
        """The definitions in C++."""
        return _ARITHMETIC.format(**self._asdict())


def _arithmetic(operation: str, dtype: np.dtype, divisor: int | None) -> _Arithmetic:
    symbol = _SYMBOLS[operation]
    if symbol in "<>":
        return _choice(symbol, dtype)
    if is_half(dtype):
        types = f"typedef unsigned short Element;\ntypedef float Value;\n{_WIDE[dtype.name]}{_NARROW[dtype.name]}"
        return _Arithmetic(types, f"a {symbol} b", "wide(x)", f"narrow({_divided('total', divisor)})")
    if dtype.kind == "f":
        return _Arithmetic(_alike(_FLOATS[dtype.name]), f"a {symbol} b", element=_divided("total", divisor))
    if dtype.kind == "c":
        return _of_complex(symbol, dtype, divisor)
    if operation[0] == "l":
        return _Arithmetic(_alike(_INTEGERS[dtype.name]), f"(a != 0) {symbol} (b != 0)")
    return _of_integers(symbol, dtype, divisor)


def _alike(name: str) -> str:
    return f"typedef {name} Element;\ntypedef Element Value;\n"


def _divided(number: str, divisor: int | None) -> str:
    return number if divisor is None else f"{number} / {divisor}"


def _choice(symbol: str, dtype: np.dtype) -> _Arithmetic:
    """The larger or the smaller of two elements, unchanged: the first NaN if there is one, and of two equal elements,
    such as zeros of both signs, the one that NumPy takes."""
    name, equal = dtype.name, "=" if dtype == np.float16 else ""
    if name in _WIDE:
        a, b, types = "wide(a)", "wide(b)", _alike("unsigned short") + _WIDE[name]
    else:
        a, b, types = "a", "b", _alike(_INTEGERS.get(name) or _FLOATS[name])
    nan = "" if name in _INTEGERS else f"{a} != {a} || "
    return _Arithmetic(types, f"{nan}{a} {symbol}{equal} {b} ? a : b")


def _of_complex(symbol: str, dtype: np.dtype, divisor: int | None) -> _Arithmetic:
    """Complex numbers, by real and imaginary parts, as on the host."""
    types = f"struct Element {{ {_COMPLEX[dtype.name]} real, imag; }};\ntypedef Element Value;\n"
    sums = "a.real + b.real, a.imag + b.imag"
    products = "a.real * b.real - a.imag * b.imag, a.real * b.imag + a.imag * b.real"
    total = ", ".join(_divided(f"total.{part}", divisor) for part in ("real", "imag"))
    return _Arithmetic(types, f"Value{{{sums if symbol == '+' else products}}}", element=f"Element{{{total}}}")


def _of_integers(symbol: str, dtype: np.dtype, divisor: int | None) -> _Arithmetic:
    """Integers, combined without signs, so that overflow wraps around."""
    bits, types = 64 if dtype.itemsize == 8 else 32, _alike(_INTEGERS[dtype.name])
    combined = "({0})a {1} ({0})b".format(_INTEGERS[f"uint{bits}"], symbol)
    if divisor is None:
        return _Arithmetic(types, combined)
    signed = dtype.kind == "i"
    wide, floor = _INTEGERS[f"int{bits}" if signed else f"uint{bits}"], _FLOOR if signed else ""
    mean = _MEAN_OF_INTEGERS.format(wide=wide, divisor=divisor, floor=floor.format(divisor=divisor))
    return _Arithmetic(f"{types}{mean}", combined, element="mean(total)")
