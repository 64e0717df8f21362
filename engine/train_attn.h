/* train_attn.h - causal attention over packed examples and its derivative, for training.
 *
 * Whole rows in fp32 and matrix products by blas.h, where serving (attn.h) walks over pages.  Blocks
 * of queries meet the keys they can see and no others; the memory is a block's scores, not a
 * square of the length.  Backward computes the probabilities once more instead of keeping them.
 *
 * How work is cut into pieces follows from the shapes alone, so the bits do not depend on the number
 * of threads (compute->pool).  They do depend on the kernels that OpenBLAS has chosen for this CPU,
 * and may depend on how many examples share the call.
 *
 * Rows are those of one layer of a micro-batch; one call at a time per scratch. */
#ifndef ENGINE_TRAIN_ATTN_H
#define ENGINE_TRAIN_ATTN_H

#include "engine/compute.h"

#include <stddef.h>

/* Head h of row r at p + r * ld + h * step. */
struct train_heads {
    float *p;
    int ld, step;
};

/* Rows [begin, begin + n) are one example: positions 0 .. n-1.  Segments do not overlap. */
struct train_segment {
    int begin, n;
};

struct train_attn {
    int H, G, hd;
    int window;          /* key j is visible to row i iff i - window < j <= i; 0: no window */
    float scale;         /* of scores */
    float softcap;       /* c: scores become c tanh(score / c); 0: they stay */
    const float *slopes; /* [H] or NULL: slope * (j - i) is added to the score (ALiBi) */
    struct train_heads q, k, v; /* after rope; H heads of q, G of k and v */
    const struct train_segment *segs;
    int nsegs;
};

/* Floats of scratch that both functions need if no segment is longer than max_segment. */
size_t train_attn_scratch(int max_segment, int H, int G, int hd, int threads);

/* out [rows][H * hd]; rows outside all segments are left as they are. */
void train_attn_forward(const struct compute *c, const struct train_attn *a, float *out,
                        float *scratch);
/* From out (of forward) and dout: the derivatives by q, k and v, overwritten.  They may not overlap
 * q, k, v, out, dout. */
void train_attn_backward(const struct compute *c, const struct train_attn *a, const float *out,
                         const float *dout, struct train_heads dq, struct train_heads dk,
                         struct train_heads dv, float *scratch);

#endif
