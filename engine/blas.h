/* blas.h - fp32 matrix products by OpenBLAS, for training.
 *
 * OpenBLAS runs single-threaded inside each of our threads: its own threads would fight the pool.
 * Pieces are cut by what is computed, never by who computes it, so a result depends on the shapes
 * and on the CPU type that OpenBLAS has chosen (blas_core()), not on the number of threads.
 *
 * Any thread may call; several at once. */
#ifndef ENGINE_BLAS_H
#define ENGINE_BLAS_H

#include <stdbool.h>

/* C = alpha op(A) op(B) + beta C, all row-major: op(A) is [m, k], op(B) is [k, n], C is [m, n];
 * op(X) is X or, with tx, its transpose.  ld*: elements from row to row as stored. */
void blas_gemm(bool ta, bool tb, int m, int n, int k, float alpha, const float *a, int lda,
               const float *b, int ldb, float beta, float *c, int ldc);
/* Let OpenBLAS use threads of its own, in a process that computes nothing else meanwhile: benchmarks
 * compare with that.  1 is the rule. */
void blas_threads(int n);
/* The kernel family that OpenBLAS uses here, e.g. "SkylakeX"; static. */
const char *blas_core(void);

#endif
