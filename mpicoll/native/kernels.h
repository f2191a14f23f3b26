/* Elementwise reductions, with the bits of mpi/operations.py whatever the compiler, the length and the processor.

   Compile with -O3 -std=c11 -ffp-contract=off -fno-math-errno: a product and a sum fused into one rounding would change
   the bits of complex products.  Arrays are aligned as their elements are, no better.  Nothing here allocates, locks,
   or keeps state but what the processor can do. */

#ifndef MPICOLL_KERNELS_H
#define MPICOLL_KERNELS_H

#include <stddef.h>

enum operation { OP_SUM, OP_PROD, OP_MAX, OP_MIN, OP_LAND, OP_LOR, OP_LXOR, OP_BAND, OP_BOR, OP_BXOR, OPERATIONS };

typedef void (*combine_t)(void *out, const void *lower, const void *higher, size_t n); /* out may be lower or higher */
typedef void (*finish_t)(void *x, size_t n, int p); /* divides by p > 0 in place; integers to nearest, ties to even */
typedef void (*widen_t)(float *out, const void *x, size_t n);  /* 16-bit floats to float32 */
typedef void (*narrow_t)(void *out, const float *x, size_t n); /* and back, rounded once: to nearest, ties to even */

/* What there is for one type, NULL where operations.py refuses it.  16-bit floats have max and min of their own; their
   sums, products and means are those of float32, between widen and narrow. */
typedef struct {
    size_t size;
    combine_t combine[OPERATIONS];
    finish_t mean;
    widen_t widen;
    narrow_t narrow;
} kind_t;

/* The fastest for this processor; type is NumPy's dtype.char, 'E' for bfloat16.  NULL for types not reduced. */
const kind_t *kernels_of(int type);

/* For tests: variant 0 is for every processor, 1 for AVX2 with F16C, NULL where there is none; -1 the best. */
const kind_t *kernels_variant(int type, int variant);

#endif
