/* linear_dx.h - the backward pass of frozen linear layers: dX = dY W, straight from the packed
 * weights.
 *
 * Dimensions as in linear.h: W is [N, K], dy is [M, N], dx is [M, K]; fp32 in and out.
 *
 * What is computed:
 *   PREC_F32                the weights that matrix_row() gives, fp32 multiply-adds.  An element is
 *                           off by less than 2e-6 of the root mean square of its row.
 *   PREC_EXACT, PREC_FAST   where the CPU has AVX512_BF16, dy and the weights of MAT_NF4_P16,
 *                           MAT_Q8_P16 and MAT_BF16 are rounded to bf16 (to nearest even), and
 *                           their products summed in fp32: dx is off by 2.4e-3 (Frobenius norm,
 *                           relative; 1.7e-3 for MAT_BF16, whose weights are exact), held below
 *                           3e-3.  Numbers below 2^-126 count as zero.  All else is computed as in
 *                           PREC_F32.
 * Sums over n are cut at fixed places, so that every element of dx has one order of additions: it
 * does not depend on the number of threads, on M, or on the other rows.  It may differ from one
 * instruction set to the next: training promises the same bits on one type of CPU.
 * A row of dy with an infinity or a NaN spoils its own row of dx only.
 *
 * Threads: runs on c->pool; one caller at a time per pool. */
#ifndef ENGINE_LINEAR_DX_H
#define ENGINE_LINEAR_DX_H

#include "engine/linear.h"

#include <stdbool.h>

/* Bytes of scratch that matmul_dx() needs for at most M rows; less than 20 MB, plus 150 KB per
 * thread, whatever M is. */
size_t matmul_dx_scratch(const struct compute *c, const struct matrix *w, int M);

/* dx[m][k] = sum_n dy[m][n] W[n][k], or += with `add`, for every type of matrix.  Rows of dy are
 * `lddy` floats apart, those of dx `lddx`; they do not overlap.  `scratch` is aligned to 64 bytes
 * and holds nothing between calls. */
void matmul_dx(const struct compute *c, const struct matrix *w, const float *dy, int M, int lddy,
               float *dx, int lddx, bool add, void *scratch);

#endif
