/* attn.h - causal attention of some rows of one sequence over its pages, and storing their keys.
 *
 * Order: tiles of 64 absolute positions in ascending order with a running softmax; inside a tile the
 * values are added position by position.  A tile or page that a query cannot see is skipped, which
 * changes no bit (its weights would be 0).  Memory does not grow with the length.
 *
 * Pure functions over caller memory; the pieces of a step may run on different threads once all
 * keys and values of the step are stored. */
#ifndef ENGINE_ATTN_H
#define ENGINE_ATTN_H

#include "engine/kv.h"
#include "engine/ops.h"

/* What is the same for every piece of a layer. */
struct attn_layer {
    const struct kv_cache *kv;
    int layer, H, G, hd;
    int window;          /* key j is visible to row i iff i - window < j <= i; 0: no window */
    float scale;         /* of scores */
    float softcap;       /* c: scores become c tanh(score / c); 0: they stay */
    const float *slopes; /* [H] or NULL: slope * (j - i) is added to the score (ALiBi) */
    const float *q;      /* after rope: head h of row r at q + r * q_ld + h * q_step */
    int q_ld, q_step;
    float *out;          /* [rows][H * hd] */
};

/* Rows [row, row + n) of q and out, at positions pos, pos + 1, ... of the sequence with these
 * pages, for the query heads of key/value head g. */
void attn_rows(const struct ops *ops, const struct attn_layer *a, const int32_t *pages, int pos,
               int row, int n, int g);

/* Write one row's keys (after rope) and values to position pos: those of head g are at k + g * step
 * and v + g * step. */
void attn_store(const struct ops *ops, const struct kv_cache *kv, const int32_t *pages, int layer,
                int G, int hd, int pos, const float *k, const float *v, int step);
/* ALiBi: slopes[h] of H heads.  With P the largest power of two up to H: 2^(-8 (h + 1) / P) for
 * h < P, and 2^(-4 (2 m + 1) / P), m = 0, 1, ... for the others. */
void attn_slopes(int H, float *ret);

#endif
