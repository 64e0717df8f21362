/* train_gemm.h - fp32 products on the pool.
 *
 * The result is cut into pieces of fixed size along its longer side, each one call of blas_gemm(), so
 * its bits do not depend on the number of threads. */
#ifndef ENGINE_TRAIN_GEMM_H
#define ENGINE_TRAIN_GEMM_H

#include "engine/compute.h"

#include <stdbool.h>

/* As blas_gemm(): C = alpha op(A) op(B) + beta C. */
void train_gemm(const struct compute *c, bool ta, bool tb, int m, int n, int k, float alpha,
                const float *a, int lda, const float *b, int ldb, float beta, float *out, int ldc);

#endif
