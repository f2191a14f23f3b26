/* The ranks of a node that share memory, and what they do together in it.  No Python, no MPI, and so it can be driven by
   threads as well (tests/native).

   Ranks take turns.  In turn t each rank writes its slot of that parity, and then t itself, by a release store; it then
   waits, by acquire loads, until all have written t.  All that a rank wrote before is seen by those who have seen its t.
   A rank may be one turn ahead of others, not two: it needs theirs.  So two slots suffice, and equality tells whether
   one is there.

   What is compared between the ranks, a number, and the data of a small call travel in the same lines as t. */
#ifndef MPICOLL_NODE_H
#define MPICOLL_NODE_H

#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>

#include "kernels.h"

#define LAYOUT 1           /* of all this, and of module.c's calls: as in mpi/native.py */
#define LINE 128           /* bytes that no two ranks write to: processors fetch lines of 64 in pairs */
#define INLINE 112         /* bytes of data that fit in a slot */
#define CELL (16 << 10)    /* bytes of a vector that is copied whole, once, and read by all */
#define BOX (64 << 10)     /* bytes of the pieces that a longer one is cut into */
#define RING 4             /* boxes of each rank: copying runs ahead of reading */
#define BLOCK 4096         /* bytes that are reduced at a time where operands are more than two: they stay in the cache */
#define WORDS 4            /* 64-bit numbers in the slot of a longer call: where arrays lie */

typedef struct {
    _Alignas(LINE) _Atomic uint64_t turn;
    uint64_t number;
    unsigned char data[INLINE];
} slot_t;

typedef struct {
    _Alignas(LINE) _Atomic uint64_t put; /* pieces that this rank has laid out for others, in all */
    _Alignas(LINE) _Atomic uint64_t got; /* and of others' pieces, those that it is done with */
    _Alignas(LINE) _Atomic uint32_t asleep; /* how many sleep until this rank writes */
} progress_t;

typedef struct {
    slot_t slots[2];
    progress_t progress;
} rank_t;

typedef struct { /* lower and higher are reduced into the third: operands, then the result, then scratch memory */
    int16_t lower, higher, into;
} step_t;

typedef struct node {
    rank_t *ranks;
    unsigned char *cells, *boxes; /* NULL until opened */
    int rank, p;
    uint64_t turn, pieces;
    long spin; /* looks before this core is offered to others */
    const step_t *steps;
    int n_steps;
    unsigned char *scratch; /* node_scratch() bytes of this rank's own */
    int (*wait)(struct node *, long looks); /* between looks, once it takes long; not 0: give up */
    int awaited; /* and what is waited for: a flag of that rank, which had this value */
    _Atomic uint64_t *flag;
    uint64_t seen;
} node_t;

typedef struct {
    const kind_t *kind;
    int operation, mean;
    size_t count, nbytes;
} reduction_t;

enum { DONE, DIFFERENT, ELSEWHERE, BROKEN_OFF };

/* Bytes of the memory that all ranks share: flags and slots, cells, boxes. */
size_t node_page(int p);
size_t node_cells(int p);
size_t node_boxes(int p);
size_t node_scratch(int p);

/* In wait: sleep until the rank has written what is waited for, or as long as that. */
void node_sleep(node_t *, long nanoseconds);

/* One turn, with a number and up to INLINE bytes: BROKEN_OFF or DONE.  The slots are then those of this turn. */
int node_turn(node_t *, uint64_t number, const void *data, size_t nbytes);
const slot_t *node_slot(const node_t *, int rank);

/* Reduce the vectors of all ranks, for all of them, in the canonical order.

   With compare, nothing is done unless all have the same number: DIFFERENT.  A vector longer than a cell is left to
   others, ELSEWHERE, if one of the ranks has given words that say where its arrays lie; where is NULL for none. */
int node_allreduce(node_t *, const reduction_t *, uint64_t number, int compare, const uint64_t *where, const void *send,
                   void *recv);

#endif
