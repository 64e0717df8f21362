/* linear.h - y = x W^T for every kind of weight, for any number of rows.
 *
 * Dimensions: M token rows, K inputs, N outputs; W is [N, K], x is [M, K], y is [M, N].
 *
 * What each precision computes (block = 64 inputs, all sums over blocks in ascending
 * order, one fp32 fused multiply-add per block):
 *   PREC_FAST   weights as int8 codes, activations rounded to int8 with one scale per
 *               block; integer dot product inside the block (exact).
 *   PREC_EXACT  weights as int16 codes (14 bit), activations as int16 (13 bit) with one
 *               scale per block; integer dot product inside the block (exact).
 *   PREC_F32    dequantised weights, fp32; 16 lanes over k, fused multiply-adds, then a
 *               fixed tree.  Scalar and unhurried: for golden tests and gradient checks.
 * MAT_F32, MAT_BF16 and MAT_F16 weights always use the PREC_F32 rule (vectorised), whatever the
 * precision; MAT_NF4_FLAT dequantises and does the same.
 * The rounding rules are in linear_scalar.c and dot.h; vector kernels follow them bit for bit.
 * A row of x with an infinity or a NaN gets NaN (or infinite) outputs; other rows do not notice.
 *
 * Threads: a matrix is immutable once filled.  Products run on the compute's pool and have
 * one caller at a time per pool. */
#ifndef ENGINE_LINEAR_H
#define ENGINE_LINEAR_H

#include "engine/compute.h"

#include <stddef.h>
#include <stdint.h>

enum mat_type {
    MAT_F32,      /* dense: float [N][K] */
    MAT_BF16,     /* dense: uint16_t [N][K] */
    MAT_F16,      /* the same in fp16 (tables that adapters bring) */
    MAT_NF4_P16,  /* codes: p16 layout; scales16/scales32 [panel][K/64][16] */
    MAT_NF4_FLAT, /* codes: reference layout; scales32 [blocks] of the flattened tensor */
    MAT_Q8_P16,   /* 8-bit, symmetric: codes + 128 as uint8; see q8_pack(); scales16 */
};

struct matrix {
    enum mat_type type;
    int N, K;
    const void *codes;        /* 64-byte aligned; or dense data */
    const uint16_t *scales16; /* fp16, or NULL */
    const float *scales32;    /* or NULL; MAT_NF4_P16 needs it for PREC_F32 only */
};

/* 8-bit weights, one fp16 scale per block of 64 inputs (output heads).  Layout: panel p of
 * 16 rows, block b: 16 groups g of 64 bytes; in a group 4 bytes per row r: byte j holds
 * element k = 64b + 4g + j of row 16p + r, as code + 128 with code in -127..127.  Scales
 * [panel][K/64][16] are the blocks' largest magnitudes: a weight is code * scale / 127.  K must
 * be a multiple of 64. */
static inline size_t q8_bytes(size_t N, size_t K) { return (N + 15) / 16 * 16 * K; }
void q8_pack(const float *w, size_t N, size_t K, uint8_t *codes, uint16_t *scales16);

/* Row n of W as fp32 (embedding look-ups, tests). */
void matrix_row(const struct matrix *w, int n, float *ret);

/* Activations converted once and used by every matrix that shares them (q, k, v). */
struct act {
    const float *x; /* borrowed: [M][K], rows `ldx` apart; must outlive the act's use */
    int M, K, ldx;
    void *packed;   /* owned: grows, never shrinks */
    size_t packed_cap;
};

void act_init(struct act *a);
void act_free(struct act *a);
/* Make room once, so that act_pack() never allocates. */
int act_reserve(struct act *a, int M_max, int K_max, struct err *err);
/* Convert x for `c->precision`.  Must fit what was reserved. */
void act_pack(const struct compute *c, struct act *a, const float *x, int M, int K, int ldx);

/* y[m][n] = sum_k x[m][k] W[n][k] (+ bias[n] if bias is not NULL), rows of y `ldy` apart. */
struct mat_product {
    const struct matrix *w;
    const float *bias;
    float *y;
    int ldy;
};

/* Rows and outputs of product `product`. */
struct y_part {
    int product, row, rows, first, outputs;
};

/* `n` lines of 64 bytes from `at` on. */
struct lines {
    const char *at;
    int n;
};
enum { EPILOGUE_LINES = 160 };

/* What is to happen to outputs as soon as they are computed and still in the nearest cache.
 * Any thread may call, with any part; parts do not overlap, and together they are all of y. */
struct epilogue {
    void *arg;
    void (*add)(void *arg, const struct y_part *p);
    /* Memory that is wanted soon, by add() for this part or by somebody else: it is read into the
     * cache while the part is computed, which costs nothing where arithmetic is what takes the
     * time.  Fills ret and returns how many, at most EPILOGUE_LINES.  `piece` counts the parts
     * below `pieces`, so that each can take its share of something. */
    int (*wanted)(void *arg, const struct y_part *p, int64_t piece, int64_t pieces,
                  struct lines *ret);
};

/* Products that share x, at most PRODUCTS_MAX; e may be NULL. */
enum { PRODUCTS_MAX = 3 };
void matmul_all(const struct compute *c, const struct act *a, const struct mat_product *p, int n,
                const struct epilogue *e);
/* One product, nothing after it. */
void matmul(const struct compute *c, const struct matrix *w, const struct act *a,
            const float *bias, float *y, int ldy);

#endif
