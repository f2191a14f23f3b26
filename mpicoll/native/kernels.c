/* Which variant, and how 16-bit floats are converted without hardware for it; the loops are in kernels.inc. */

#include "kernels.h"

#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#endif

/* That no iteration touches what another does; restrict would say too much, as out may be an operand. */
#if defined(__clang__)
#define INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#pragma clang diagnostic ignored "-Wpass-failed" /* as of long double: no processor has vectors of it */
#else
#define INDEPENDENT _Pragma("GCC ivdep")
#endif

_Static_assert(sizeof(int) == 4 && sizeof(short) == 2 && sizeof(long long) == 8, "as the table of types has it");

static inline uint32_t bits_of(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

static inline float float_of(uint32_t bits)
{
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* By a mask: of condition ? yes : no GCC makes a branch if one of them is a float operation, and no vectors then. */
static inline uint32_t choose(int condition, uint32_t yes, uint32_t no)
{
    const uint32_t mask = -(uint32_t)condition;
    return (yes & mask) | (no & ~mask);
}

/* NaNs become quiet and keep what fits of their other bits, as in the processors' own conversions: the bits are the
   same in every variant.  Magnitudes are signed, since SSE2 compares no other integers. */

static inline float f16_to_float(uint16_t x)
{
    const int32_t magnitude = (x & 0x7fff) << 13, infinite = 31 << 23, normal = 1 << 23;
    const uint32_t rescaled = magnitude + ((127 - 15) << 23);
    const uint32_t special = magnitude | (255 << 23) | choose(magnitude > infinite, 1 << 22, 0);
    const float subnormal = float_of(rescaled + normal) - float_of((127 - 14) << 23); /* exact */
    const uint32_t finite = choose(magnitude < normal, bits_of(subnormal), rescaled);
    return float_of(choose(magnitude >= infinite, special, finite) | (uint32_t)(x & 0x8000) << 16);
}

static inline uint16_t float_to_f16(float x)
{
    const uint32_t bits = bits_of(x);
    const int32_t magnitude = bits & 0x7fffffff, infinite = 255 << 23;
    const int32_t normal = (127 - 14) << 23, large = (127 + 16) << 23;
    const uint32_t rounded = (magnitude - ((127 - 15) << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
    const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f); /* 2^-24 is the last bit of both */
    const uint32_t special = 0x7c00 | choose(magnitude > infinite, 0x200 | (magnitude >> 13 & 0x3ff), 0);
    const uint32_t finite = choose(magnitude < normal, subnormal, rounded);
    return (uint16_t)(choose(magnitude >= large, special, finite) | (bits >> 16 & 0x8000));
}

static inline float b16_to_float(uint16_t x)
{
    return float_of((uint32_t)x << 16 | choose((x & 0x7fff) > 0x7f80, 1 << 22, 0));
}

static inline uint16_t float_to_b16(float x)
{
    const uint32_t bits = bits_of(x);
    const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return (uint16_t)choose((int32_t)(bits & 0x7fffffff) > 255 << 23, bits >> 16 | 0x40, rounded);
}

#define JOINED(x, variant) x##_##variant
#define NAMED(x, variant) JOINED(x, variant)
#define N(x) NAMED(x, VARIANT)

#define VARIANT plain
#include "kernels.inc"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,f16c")
#endif
#undef VARIANT
#define VARIANT avx2
#define F16C
#include "kernels.inc"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

/* By hand, as __builtin_cpu_supports does not know f16c in every compiler, and with zig's runtime finds no AVX2 at all.
   The operating system must save all of the vector registers, too: bits 1 and 2 of XCR0 tell. */
static int find_avx2(void)
{
    const unsigned needed = bit_OSXSAVE | bit_AVX | bit_F16C;
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d) || (c & needed) != needed)
        return 0;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(b & bit_AVX2))
        return 0;
    __asm__ volatile("xgetbv" : "=a"(a), "=d"(d) : "c"(0));
    return (a & 6) == 6;
}

/* Found once, as a virtual machine is slow to tell; threads that ask at the same time write the same. */
static int has_avx2(void)
{
    static int known = -1;
    int has = __atomic_load_n(&known, __ATOMIC_RELAXED);
    if (has < 0) {
        has = find_avx2();
        __atomic_store_n(&known, has, __ATOMIC_RELAXED);
    }
    return has;
}
#endif

const kind_t *kernels_variant(int type, int variant)
{
#if defined(__x86_64__)
    if (variant != 0 && has_avx2())
        return kind_avx2(type);
#endif
    return variant == 1 ? NULL : kind_plain(type);
}

const kind_t *kernels_of(int type)
{
    return kernels_variant(type, -1);
}
