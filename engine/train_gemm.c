/* train_gemm.c - see train_gemm.h. */
#include "engine/train_gemm.h"

#include "engine/blas.h"

#include <stddef.h>

/* Rows or columns of the result per piece, and multiply-adds below which the caller does it all. */
enum { PIECE_ROWS = 64, PIECE_COLS = 256, SERIAL = 1 << 18 };

struct job {
    bool ta, tb, by_cols;
    int m, n, k, lda, ldb, ldc;
    float alpha, beta;
    const float *a, *b;
    float *out;
};

static void run(void *arg, int64_t begin, int64_t end, int thread)
{
    const struct job *j = arg;
    const int each = j->by_cols ? PIECE_COLS : PIECE_ROWS, all = j->by_cols ? j->n : j->m;
    (void)thread;
    for (int64_t i = begin; i < end; i++) {
        const int at = (int)i * each, len = all - at < each ? all - at : each;
        const size_t off = (size_t)at;
        if (j->by_cols)
            blas_gemm(j->ta, j->tb, j->m, len, j->k, j->alpha, j->a, j->lda,
                      j->b + (j->tb ? off * (size_t)j->ldb : off), j->ldb, j->beta, j->out + off,
                      j->ldc);
        else
            blas_gemm(j->ta, j->tb, len, j->n, j->k, j->alpha,
                      j->a + (j->ta ? off : off * (size_t)j->lda), j->lda, j->b, j->ldb, j->beta,
                      j->out + off * (size_t)j->ldc, j->ldc);
    }
}

void train_gemm(const struct compute *c, bool ta, bool tb, int m, int n, int k, float alpha,
                const float *a, int lda, const float *b, int ldb, float beta, float *out, int ldc)
{
    struct job j = { ta, tb, n > m, m, n, k, lda, ldb, ldc, alpha, beta, a, b, out };
    const int pieces = j.by_cols ? (n + PIECE_COLS - 1) / PIECE_COLS
                                 : (m + PIECE_ROWS - 1) / PIECE_ROWS;
    if (m <= 0 || n <= 0)
        return;
    pool_run((int64_t)m * n * k < SERIAL ? NULL : c->pool, pieces, 1, run, &j);
}
