/* attn.h - causal attention of the rows of a step over the pages of their sequences, and storing
 * their keys.
 *
 * What a query's result is: its visible positions are cut where absolute positions are a multiple of
 * ATTN_SEGMENT.  Each segment has a running softmax of its own: tiles of 64 absolute positions in
 * ascending order, inside a tile the values added position by position.  The segments' results
 * (maximum m, sums by lane S, values O) are folded in ascending order into the first one's:
 *     m' <= m:  w = exp(m' - m),  S = fma(w, S', S),  O = fma(w, O', O)
 *     m' >  m:  S and O are multiplied with exp(m - m'), m = m', and then the same with w = 1
 * and at the end O is divided by the tree of S.  So a long context can be shared by threads, and who
 * computed what changes no bit.  A segment, tile or page that a query cannot see is skipped, which
 * changes no bit either (its weights would be 0).
 *
 * attn_run() shares the work of a step between threads; attn_rows() and attn_segment() are what a
 * thread does, pure functions over caller memory.  Memory does not grow with the length. */
#ifndef ENGINE_ATTN_H
#define ENGINE_ATTN_H

#include "engine/kv.h"
#include "engine/ops.h"

enum { ATTN_SEGMENT = 1024 };

/* What is the same for every row of a layer. */
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
 * pages. */
struct attn_span {
    const int32_t *pages;
    int pos, row, n;
};

/* What attn_run() works in, in the caller's memory. */
struct attn_piece;
struct attn_work {
    int max_spans;
    struct attn_piece *pieces, *sorted; /* [max_spans] */
    struct ops_softmax *softmax, *carry; /* of segments, [ATTN_SLOTS][H]; of a row, [H] */
    float *values;                       /* of segments, [ATTN_SLOTS][H][hd] */
};

/* Set the pointers into mem, which is aligned to 64 bytes (NULL: into nothing, to measure); returns
 * the bytes.  max_rows: of a step. */
size_t attn_lay_out(struct attn_work *w, int H, int hd, int max_rows, void *mem);

/* All rows of the spans, whose keys and values are stored, on the threads of c. */
void attn_run(const struct compute *c, const struct attn_work *w, const struct attn_layer *a,
              const struct attn_span *spans, int nspans);

/* The rows of one span for the query heads of key/value head g. */
void attn_rows(const struct ops *ops, const struct attn_layer *a, const struct attn_span *s, int g);
/* Segment seg alone for the query heads of g in the span's only row, which sees it: h, counted from
 * the first of these heads, gets ret_m[h] and ret_values[h * hd]. */
void attn_segment(const struct ops *ops, const struct attn_layer *a, const struct attn_span *s,
                  int g, int seg, struct ops_softmax *ret_m, float *ret_values);
/* Fold the next segment into m and values [hd]. */
void attn_fold(const struct ops *ops, int hd, struct ops_softmax *m, float *values,
               const struct ops_softmax *next_m, const float *next_values);
/* Divide by the sum. */
void attn_finish(const struct ops *ops, int hd, struct ops_softmax *m, float *values);

/* Positions [*ret_lo, ...) up to and with pos are visible from pos; window as in attn_layer. */
static inline int attn_first_visible(int pos, int window)
{
    return window > 0 && pos + 1 > window ? pos + 1 - window : 0;
}

/* Write one row's keys (after rope) and values to position pos: those of head g are at k + g * step
 * and v + g * step. */
void attn_store(const struct ops *ops, const struct kv_cache *kv, const int32_t *pages, int layer,
                int G, int hd, int pos, const float *k, const float *v, int step);
/* ALiBi: slopes[h] of H heads.  With P the largest power of two up to H: 2^(-8 (h + 1) / P) for
 * h < P, and 2^(-4 (2 m + 1) / P), m = 0, 1, ... for the others. */
void attn_slopes(int H, float *ret);

#endif
