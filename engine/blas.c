/* blas.c - the one place that includes OpenBLAS. */
#include "engine/blas.h"

#include <cblas.h>
#include <pthread.h>

static pthread_once_t once = PTHREAD_ONCE_INIT;

static void one_thread(void) { openblas_set_num_threads(1); }

void blas_gemm(bool ta, bool tb, int m, int n, int k, float alpha, const float *a, int lda,
               const float *b, int ldb, float beta, float *c, int ldc)
{
    pthread_once(&once, one_thread);
    if (m <= 0 || n <= 0)
        return;
    cblas_sgemm(CblasRowMajor, ta ? CblasTrans : CblasNoTrans, tb ? CblasTrans : CblasNoTrans, m,
                n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}

const char *blas_core(void)
{
    pthread_once(&once, one_thread);
    return openblas_get_corename();
}

void blas_threads(int n)
{
    pthread_once(&once, one_thread);
    openblas_set_num_threads(n);
}
