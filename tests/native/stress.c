/* The ranks of a node as threads of one process, for ThreadSanitizer, which sees every access that nothing orders.

       stress RANKS CALLS SEED

   Each rank makes the same calls, chosen by chance: turns, and sums of vectors of all the sizes that take different
   ways, some of which differ between the ranks, and now and then one is late.  Every result is checked. */
#define _DEFAULT_SOURCE
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "node.h"

static int ranks, calls;
static unsigned seed;
static void *page, *cells, *boxes;
static step_t steps[64];

static uint64_t next(uint64_t *state)
{
    *state = *state * 6364136223846793005u + 1442695040888963407u;
    return *state >> 33;
}

static int wait(node_t *n, long looks)
{
    if (looks % 3 == 2)
        node_sleep(n, 1000000);
    else
        sched_yield();
    return 0;
}

static void fail(const char *what, int rank, int call)
{
    fprintf(stderr, "rank %d, call %d: %s\n", rank, call, what);
    exit(1);
}

static void *rank_of(void *argument)
{
    int rank = (int)(intptr_t)argument, p = ranks;
    node_t n = {.ranks = page, .cells = cells, .boxes = boxes, .rank = rank, .p = p, .spin = seed % 3 ? 200 : 0,
                .steps = steps, .n_steps = p - 1, .scratch = malloc(node_scratch(p)), .wait = wait};
    uint64_t same = seed, own = seed * 31 + rank;
    const size_t longest = 6 * BOX / 4;
    uint32_t *x = malloc(longest * 4), *y = malloc(longest * 4);
    for (int call = 0; call < calls; call++) {
        static const size_t edges[] = {1, INLINE / 4, CELL / 4, BOX / 4, RING * BOX / 4, 6 * BOX / 4 - 1};
        size_t kind = next(&same) % 40, count = edges[kind < 12 ? 0 : kind < 24 ? 1 : kind < 36 ? 2 : kind - 34] + next(&same) % 2;
        int differs = next(&same) % 16 == 0, who = (int)(next(&same) % p), in_place = (int)(next(&same) % 2);
        if (next(&own) % 64 == 0)
            usleep(next(&own) % 300);
        if (next(&same) % 8 == 0) { /* a turn with words */
            uint64_t words[3] = {(uint64_t)rank + call, next(&same), call};
            if (node_turn(&n, call, words, sizeof words))
                fail("broken off", rank, call);
            for (int q = 0; q < p; q++) {
                uint64_t theirs[3];
                memcpy(theirs, node_slot(&n, q)->data, sizeof theirs);
                if (theirs[0] != (uint64_t)q + call || theirs[2] != (uint64_t)call || node_slot(&n, q)->number != (uint64_t)call)
                    fail("wrong words", rank, call);
            }
            continue;
        }
        reduction_t r = {kernels_of('I'), OP_SUM, 0, count, count * 4};
        for (size_t i = 0; i < count; i++)
            x[i] = (uint32_t)(rank * 7919 + i * 31 + call);
        if (!in_place)
            memset(y, 0xff, count * 4);
        int how = node_allreduce(&n, &r, call + (differs && rank == who), 1, NULL, x, in_place ? x : y);
        if (how != (differs && p > 1 ? DIFFERENT : DONE))
            fail("not what all others find", rank, call);
        const uint32_t *result = in_place ? x : y;
        for (size_t i = 0; how == DONE && i < count; i++)
            if (result[i] != (uint32_t)(p * (p - 1) / 2 * 7919 + p * (i * 31 + call)))
                fail("a wrong sum", rank, call);
    }
    free(x), free(y), free(n.scratch);
    return NULL;
}

int main(int argc, char **argv)
{
    if (argc != 4)
        return 2;
    ranks = atoi(argv[1]), calls = atoi(argv[2]), seed = (unsigned)atoi(argv[3]);
    page = aligned_alloc(4096, (node_page(ranks) + 4095) / 4096 * 4096);
    cells = aligned_alloc(4096, node_cells(ranks)), boxes = aligned_alloc(4096, node_boxes(ranks));
    memset(page, 0, node_page(ranks));
    for (int k = 0; k < ranks - 1; k++) /* one after another: integers do not mind */
        steps[k] = (step_t){(int16_t)(k ? ranks : 0), (int16_t)(k + 1), (int16_t)ranks};
    pthread_t threads[64];
    for (int rank = 0; rank < ranks; rank++)
        pthread_create(&threads[rank], NULL, rank_of, (void *)(intptr_t)rank);
    for (int rank = 0; rank < ranks; rank++)
        pthread_join(threads[rank], NULL);
    puts("right");
    return 0;
}
