/* linear_int.h - between linear.c, which defines the arithmetic and cuts the work into jobs, and
 * the kernels of one instruction set each.
 *
 * Packed activations: the M rows are cut into tiles of 16 (the last may be smaller).  A tile of R
 * rows holds [block][R][64] codes, [block][R] scales and [block][R] start values; tiles follow
 * each other.  Codes lie in order of k, but for the int16 codes (PREC_EXACT) of AVX-512: inside
 * each group of 8 they lie in the order ACT16_ORDER, which is the order in which its 16-bit
 * multiply-add instruction meets the nibbles of the P16 layout (and the bytes of the 8-bit one). */
#ifndef ENGINE_LINEAR_INT_H
#define ENGINE_LINEAR_INT_H

#include "engine/linear.h"

enum { BLOCK = 64, PANEL = 16, TILE = 16 };

#define ACT16_ORDER                                                                                \
    {                                                                                              \
        0, 2, 4, 6, 1, 3, 5, 7                                                                     \
    }

/* Largest codes: what 1.0 and the block's largest activation become. */
enum { W8_MAX = 127, W16_MAX = 8191, A8_MAX = 127, A16_MAX = 4095 };

/* NF4's code values as integers: round(value * W8_MAX) and round(value * W16_MAX). */
extern const int8_t nf4_w8[16];
extern const int16_t nf4_w16[16];

/* A block whose largest magnitude lies below the first is all zeros; one at or above the second
 * holds an infinity or a NaN.  As bits of |x|, which order as the values do, NaN last. */
enum { ACT_LEAST_BITS = 0x0d800000 /* 2^-100 */, ACT_INF_BITS = 0x7f800000 };

/* One row: x[64 * blocks].  Block b goes to codes + b * 64 * rows, scale[b * rows] and
 * start[b * rows], where `rows` is the number of rows in the tile. */
typedef void (*pack_fn)(const float *x, int blocks, int rows, void *codes, float *scale,
                        int32_t *start);

/* Hands out the lines of a list (linear.h), a few for each block that a kernel works on. */
struct fetcher {
    const struct lines *next, *end;
    const char *at;
    int left;      /* lines from `at` on */
    int lines;     /* of all of the list */
    int per_block; /* 0: no more */
};

/* A kernel will walk over `blocks` blocks `walks` times. */
static inline void fetch_pace(struct fetcher *f, int blocks, int walks)
{
    f->per_block = f->lines > 0 ? f->lines / (blocks * walks) + 1 : 0;
}

static inline void fetch_some(struct fetcher *f)
{
    for (int i = 0; i < f->per_block; i++) {
        while (f->left == 0) {
            if (f->next == f->end) {
                f->per_block = 0;
                return;
            }
            f->at = f->next->at;
            f->left = f->next->n;
            f->next++;
        }
        __builtin_prefetch(f->at, 0, 2); /* L2: the tile's activations need all of L1 */
        f->at += 64;
        f->left--;
    }
}

/* One tile by one or two panels. */
struct panel_job {
    const uint8_t *codes;   /* first panel; the second follows after blocks * block_bytes */
    const uint16_t *scales; /* [panel][block][16], fp16 */
    int blocks;
    int rows;        /* of the tile: 1..TILE */
    const void *act; /* the tile */
    const float *act_scale;
    const int32_t *act_start; /* -128 * sum of the block's codes */
    float unit;               /* real value of a weight's code 1 where the scale is 1 */
    const float *bias;        /* of the first output, or NULL */
    float *y;                 /* row 0, first output */
    size_t ldy;
    int outputs; /* 1..2 * PANEL */
    struct fetcher fetch;
};
typedef void (*panel_fn)(const struct panel_job *j);

/* Weights [k, k + len) of row n as fp32; in the panel layouts k and len are multiples of 64. */
void matrix_part(const struct matrix *w, size_t n, size_t k, size_t len, float *ret);

struct linear_ops {
    pack_fn pack_i8, pack_i16;
    panel_fn nf4_i8, nf4_i16; /* MAT_NF4_P16: fast, exact */
    panel_fn q8_i8, q8_i16;   /* MAT_Q8_P16: fast, exact */
};

extern const struct linear_ops linear_scalar;
#if defined(__x86_64__)
extern const struct linear_ops linear_avx2, linear_avx512;
#endif

#endif
