#ifndef _DEFAULT_SOURCE
#define _DEFAULT_SOURCE
#endif
#include "node.h"

#include <limits.h>
#include <string.h>
#ifdef __linux__
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#include <time.h>

#define BARE 64 /* looks before the first pause: a line that is about to come is seen sooner */

static inline void relax(void)
{
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ __volatile__("isb" ::: "memory");
#endif
}

static inline size_t smaller(size_t a, size_t b)
{
    return a < b ? a : b;
}

size_t node_page(int p)
{
    return (size_t)p * sizeof(rank_t);
}

size_t node_cells(int p)
{
    return (size_t)p * 2 * CELL;
}

size_t node_boxes(int p)
{
    return (size_t)p * RING * BOX;
}

size_t node_scratch(int p)
{
    return (size_t)(2 * p + 2) * 2 * BLOCK; /* as float32, 16-bit floats take twice as much */
}

static inline slot_t *slot_of(const node_t *n, int rank)
{
    return &n->ranks[rank].slots[n->turn & 1];
}

const slot_t *node_slot(const node_t *n, int rank)
{
    return slot_of(n, rank);
}

static unsigned char *cell_of(const node_t *n, int rank)
{
    return n->cells + ((size_t)rank * 2 + (n->turn & 1)) * CELL;
}

static unsigned char *box_of(const node_t *n, int rank, uint64_t k)
{
    return n->boxes + ((size_t)rank * RING + k) * BOX;
}

/* ---- waiting, and being waited for */

#ifdef __linux__
static uint32_t *low_word(_Atomic uint64_t *flag)
{
    uint32_t *words = (uint32_t *)flag;
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
    words++;
#endif
    return words;
}
#endif

static void write_flag(node_t *n, _Atomic uint64_t *flag, uint64_t value)
{
    atomic_store_explicit(flag, value, memory_order_release);
#ifdef __linux__
    /* Either who goes to sleep sees the value, or this rank sees that one sleeps. */
    atomic_thread_fence(memory_order_seq_cst);
    if (atomic_load_explicit(&n->ranks[n->rank].progress.asleep, memory_order_relaxed))
        syscall(SYS_futex, low_word(flag), FUTEX_WAKE, INT_MAX, NULL, NULL, 0);
#endif
}

void node_sleep(node_t *n, long nanoseconds)
{
    struct timespec most = {0, nanoseconds};
#ifdef __linux__
    _Atomic uint32_t *asleep = &n->ranks[n->awaited].progress.asleep;
    atomic_fetch_add_explicit(asleep, 1, memory_order_seq_cst);
    atomic_thread_fence(memory_order_seq_cst);
    if (atomic_load_explicit(n->flag, memory_order_acquire) == n->seen)
        syscall(SYS_futex, low_word(n->flag), FUTEX_WAIT, (uint32_t)n->seen, &most, NULL, 0);
    atomic_fetch_sub_explicit(asleep, 1, memory_order_relaxed);
#else
    nanosleep(&most, NULL);
#endif
}

static int wait_long(node_t *n, int rank, _Atomic uint64_t *flag, uint64_t least)
{
    for (long looks = 0;; looks++) {
        uint64_t seen = atomic_load_explicit(flag, memory_order_acquire);
        if (seen >= least)
            return DONE;
        n->awaited = rank, n->flag = flag, n->seen = seen;
        if (n->wait(n, looks))
            return BROKEN_OFF;
    }
}

/* Until the flag of a rank has come to a value.  (A slot has this turn's or an older one: at least is equal.) */
static inline int await(node_t *n, int rank, _Atomic uint64_t *flag, uint64_t least)
{
    long spin = n->spin;
    for (long looks = 0; looks <= spin; looks++) {
        if (atomic_load_explicit(flag, memory_order_acquire) >= least)
            return DONE;
        if (looks > BARE)
            relax();
    }
    return wait_long(n, rank, flag, least);
}

/* ---- turns */

static inline int await_all(node_t *n)
{
    uint64_t turn = n->turn;
    for (int k = 1, q = n->rank; k < n->p; k++) { /* not all ranks look at one first */
        q = q + 1 == n->p ? 0 : q + 1;
        if (await(n, q, &slot_of(n, q)->turn, turn))
            return BROKEN_OFF;
    }
    return DONE;
}

static inline slot_t *begin_turn(node_t *n, uint64_t number)
{
    n->turn++;
    slot_t *mine = slot_of(n, n->rank);
    mine->number = number;
    return mine;
}

int node_turn(node_t *n, uint64_t number, const void *data, size_t nbytes)
{
    slot_t *mine = begin_turn(n, number);
    if (nbytes)
        memcpy(mine->data, data, nbytes);
    write_flag(n, &mine->turn, n->turn);
    return await_all(n);
}

static int agreed(const node_t *n, uint64_t number)
{
    int differ = 0;
    for (int q = 0; q < n->p; q++)
        differ |= slot_of(n, q)->number != number;
    return !differ;
}

/* ---- reducing */

static void fold_block(node_t *n, const reduction_t *r, const unsigned char *const *operands, unsigned char *out,
                       size_t at, size_t count)
{
    const kind_t *kind = r->kind, *carried = kind;
    int p = n->p;
    const unsigned char *arrays[2 * p + 2];
    unsigned char *room = n->scratch, *total = out + at * kind->size;
    int widens = kind->widen && (r->operation == OP_SUM || r->operation == OP_PROD);
    if (widens) {
        carried = kernels_of('f');
        for (int q = 0; q < p; q++, room += 2 * BLOCK) {
            kind->widen((float *)room, operands[q] + at * kind->size, count);
            arrays[q] = room;
        }
        total = room, room += 2 * BLOCK;
    } else
        for (int q = 0; q < p; q++)
            arrays[q] = operands[q] + at * kind->size;
    arrays[p] = total;
    for (int k = p + 1; k < 2 * p + 2; k++)
        arrays[k] = room + (size_t)(k - p - 1) * 2 * BLOCK;
    combine_t combine = carried->combine[r->operation];
    for (int k = 0; k < n->n_steps; k++) {
        step_t s = n->steps[k];
        combine((void *)arrays[s.into], arrays[s.lower], arrays[s.higher], count);
    }
    if (r->mean)
        carried->mean(total, count, p);
    if (widens)
        kind->narrow(out + at * kind->size, (float *)total, count);
}

/* Reduce the operands of all ranks, in the canonical order. */
static void fold(node_t *n, const reduction_t *r, const unsigned char *const *operands, unsigned char *out, size_t count)
{
    size_t block = BLOCK / r->kind->size;
    if (n->p == 2 && !r->mean && !r->kind->widen) {
        r->kind->combine[r->operation](out, operands[0], operands[1], count);
        return;
    }
    for (size_t at = 0; at < count; at += block)
        fold_block(n, r, operands, out, at, smaller(block, count - at));
}

/* Each rank lays out its pieces in boxes, and reduces those of all: what it reads is as much as p - 1 vectors. */
static int exchange(node_t *n, const reduction_t *r, const unsigned char *send, unsigned char *recv)
{
    const unsigned char *operands[n->p];
    uint64_t first = n->pieces, laid = 1; /* the first is there already */
    uint64_t pieces = (r->nbytes + BOX - 1) / BOX;
    progress_t *mine = &n->ranks[n->rank].progress;
    for (uint64_t k = 0; k < pieces; k++) {
        while (laid < pieces && laid < k + RING - 1) {
            size_t at = laid * BOX;
            uint64_t number = first + laid;
            for (int q = 0; q < n->p && number >= RING; q++) /* until others are done with what was in this box */
                if (q != n->rank && await(n, q, &n->ranks[q].progress.got, number - RING + 1))
                    return BROKEN_OFF;
            memcpy(box_of(n, n->rank, number % RING), send + at, smaller(BOX, r->nbytes - at));
            write_flag(n, &mine->put, number + 1);
            laid++;
        }
        size_t at = k * BOX, nbytes = smaller(BOX, r->nbytes - at);
        uint64_t number = first + k;
        for (int q = 0; q < n->p; q++) {
            operands[q] = q == n->rank ? send + at : box_of(n, q, number % RING);
            if (q != n->rank && k && await(n, q, &n->ranks[q].progress.put, number + 1))
                return BROKEN_OFF;
        }
        fold(n, r, operands, recv + at, nbytes / r->kind->size);
        write_flag(n, &mine->got, number + 1);
    }
    n->pieces += pieces;
    return DONE;
}

/* Each rank lays out a piece in a box, reduces its slice of it for all into another one, and gets those of others.

   A box is used again for the next piece but one: who lays that out has seen that all have reduced this one, and who
   reduces it, that all have laid out the next, and so have got this one. */
static void slice_of(const node_t *n, size_t count, size_t size, int rank, size_t *lo, size_t *hi)
{
    size_t line = size < LINE ? LINE / size : 1, lines = (count + line - 1) / line;
    size_t each = (lines + n->p - 1) / n->p * line;
    *lo = smaller((size_t)rank * each, count);
    *hi = smaller(((size_t)rank + 1) * each, count);
}

static int slices(node_t *n, const reduction_t *r, const unsigned char *send, unsigned char *recv)
{
    const unsigned char *operands[n->p];
    size_t size = r->kind->size;
    progress_t *mine = &n->ranks[n->rank].progress;
    for (size_t at = 0; at < r->nbytes; at += BOX, n->pieces++) {
        size_t nbytes = smaller(BOX, r->nbytes - at), count = nbytes / size, lo, hi;
        uint64_t number = n->pieces, odd = number & 1;
        if (at) {
            memcpy(box_of(n, n->rank, odd), send + at, nbytes);
            write_flag(n, &mine->put, number + 1);
        }
        slice_of(n, count, size, n->rank, &lo, &hi);
        for (int k = 0, q = n->rank; k < n->p; k++, q = q + 1 == n->p ? 0 : q + 1) {
            operands[q] = box_of(n, q, odd) + lo * size;
            if (q != n->rank && at && await(n, q, &n->ranks[q].progress.put, number + 1))
                return BROKEN_OFF;
        }
        if (lo < hi)
            fold(n, r, operands, box_of(n, n->rank, 2 + odd) + lo * size, hi - lo);
        write_flag(n, &mine->got, number + 1);
        for (int k = 0, q = n->rank; k < n->p; k++, q = q + 1 == n->p ? 0 : q + 1) {
            slice_of(n, count, size, q, &lo, &hi);
            if (q != n->rank && await(n, q, &n->ranks[q].progress.got, number + 1))
                return BROKEN_OFF;
            if (lo < hi)
                memcpy(recv + at + lo * size, box_of(n, q, 2 + odd) + lo * size, (hi - lo) * size);
        }
    }
    return DONE;
}

int node_allreduce(node_t *n, const reduction_t *r, uint64_t number, int compare, const uint64_t *where,
                   const void *send, void *recv)
{
    if (n->p == 1) { /* the result is what it sends, to the last bit */
        if (send != recv)
            memmove(recv, send, r->nbytes);
        return DONE;
    }
    const unsigned char *operands[n->p];
    slot_t *mine = begin_turn(n, number);
    if (r->nbytes <= INLINE)
        memcpy(mine->data, send, r->nbytes);
    else if (r->nbytes <= CELL)
        memcpy(cell_of(n, n->rank), send, r->nbytes);
    else {
        if (where)
            memcpy(mine->data, where, WORDS * sizeof *where);
        else {
            memset(mine->data, 0, WORDS * sizeof *where);
            uint64_t first = n->pieces;
            if (n->p == 2 && first >= RING && await(n, !n->rank, &n->ranks[!n->rank].progress.got, first - RING + 1))
                return BROKEN_OFF;
            memcpy(box_of(n, n->rank, n->p == 2 ? first % RING : first & 1), send, smaller(BOX, r->nbytes));
        }
    }
    write_flag(n, &mine->turn, n->turn);
    if (await_all(n))
        return BROKEN_OFF;
    if (compare && !agreed(n, number))
        return DIFFERENT;
    if (r->nbytes > CELL) {
        static const unsigned char nowhere[WORDS * sizeof *where];
        for (int q = 0; q < n->p; q++)
            if (memcmp(slot_of(n, q)->data, nowhere, sizeof nowhere))
                return ELSEWHERE;
        return n->p == 2 ? exchange(n, r, send, recv) : slices(n, r, send, recv);
    }
    for (int q = 0; q < n->p; q++)
        operands[q] = r->nbytes <= INLINE ? slot_of(n, q)->data : cell_of(n, q);
    fold(n, r, operands, recv, r->count);
    return DONE;
}
