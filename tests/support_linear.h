/* support_linear.h - random matrices of every type, with the weights they stand for, and which
 * kernels this machine can run. */
#ifndef TESTS_SUPPORT_LINEAR_H
#define TESTS_SUPPORT_LINEAR_H

#include "engine/linear.h"

#include <stdbool.h>

extern uint64_t gauss_seed;
float gauss(void); /* N(0, 1), from gauss_seed on */
/* Aligned to 64 bytes; free() frees it. */
void *get_aligned(size_t bytes);
float *random_rows(int M, int ldx);

/* A matrix and the weights it stands for. */
struct weights {
    struct matrix m;
    void *codes;
    uint16_t *s16;
    float *s32;
    double *exact; /* [N][K]: code value * unrounded scale */
};
struct weights make_weights(enum mat_type type, int N, int K);
void free_weights(struct weights *w);

enum { TYPES = 6 };
extern const enum mat_type all_types[TYPES];
extern const char *const type_names[TYPES];

/* Vector code that this machine can run. */
bool usable(enum isa isa);
void announce_missing(void); /* says what is skipped */

#define FOR_EACH_ISA(first, isa)                                                                   \
    for (enum isa isa = (first); isa < ISA_COUNT; isa = (enum isa)(isa + 1))                       \
        if (usable(isa))

#endif
