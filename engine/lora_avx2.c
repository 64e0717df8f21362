/* lora_avx2.c - Y += U B^T in registers: up to 2 rows by 4 vectors of 8 outputs while j runs. */
#include "engine/lora_int.h"
#include "engine/simd_int.h"

#if defined(__x86_64__)
#include <stdint.h>
#include <string.h>

INLINE AVX2 __m256 widen(enum dtype t, const void *p, size_t i)
{
    if (t == DT_F32)
        return _mm256_loadu_ps((const float *)p + i);
    __m128i h = _mm_loadu_si128((const __m128i *)((const uint16_t *)p + i));
    if (t == DT_F16)
        return _mm256_cvtph_ps(h);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
}

/* mr rows, nv whole vectors from output o on.  t, mr, nv are literals. */
INLINE AVX2 void block(enum dtype t, int mr, int nv, const void *bt, size_t ldb, int r,
                       const float *u, size_t ldu, float *y, size_t ldy, size_t o)
{
    __m256 acc[2][4], b[4];
    UNROLL
    for (int m = 0; m < mr; m++)
        UNROLL
        for (int v = 0; v < nv; v++)
            acc[m][v] = _mm256_loadu_ps(y + (size_t)m * ldy + o + 8 * (size_t)v);
    for (int j = 0; j < r; j++) {
        UNROLL
        for (int v = 0; v < nv; v++)
            b[v] = widen(t, bt, (size_t)j * ldb + o + 8 * (size_t)v);
        UNROLL
        for (int m = 0; m < mr; m++) {
            const __m256 f = _mm256_broadcast_ss(&u[(size_t)m * ldu + (size_t)j]);
            UNROLL
            for (int v = 0; v < nv; v++)
                acc[m][v] = _mm256_fmadd_ps(f, b[v], acc[m][v]);
        }
    }
    UNROLL
    for (int m = 0; m < mr; m++)
        UNROLL
        for (int v = 0; v < nv; v++)
            _mm256_storeu_ps(y + (size_t)m * ldy + o + 8 * (size_t)v, acc[m][v]);
}

INLINE AVX2 void rows(enum dtype t, int mr, const void *bt, size_t ldb, int r, const float *u,
                      size_t ldu, float *y, size_t ldy, size_t n)
{
    size_t o = 0;
    for (; o + 32 <= n; o += 32)
        block(t, mr, 4, bt, ldb, r, u, ldu, y, ldy, o);
    for (; o + 8 <= n; o += 8)
        block(t, mr, 1, bt, ldb, r, u, ldu, y, ldy, o);
    if (o < n) /* fewer than 8 outputs: the definition has the same order */
        lora_add_scalar(t, (const char *)bt + o * dtype_size(t), ldb, r, u, ldu, mr, y + o, ldy,
                        (int)(n - o));
}

INLINE AVX2 void all(enum dtype t, const void *bt, size_t ldb, int r, const float *u, size_t ldu,
                     int M, float *y, size_t ldy, size_t n)
{
    int m = 0;
    for (; m + 2 <= M; m += 2)
        rows(t, 2, bt, ldb, r, u + (size_t)m * ldu, ldu, y + (size_t)m * ldy, ldy, n);
    if (m < M)
        rows(t, 1, bt, ldb, r, u + (size_t)m * ldu, ldu, y + (size_t)m * ldy, ldy, n);
}

AVX2 void lora_add_avx2(enum dtype t, const void *bt, size_t ldb, int r, const float *u,
                        size_t ldu, int M, float *y, size_t ldy, int n)
{
    switch (t) {
    case DT_F32: all(DT_F32, bt, ldb, r, u, ldu, M, y, ldy, (size_t)n); break;
    case DT_F16: all(DT_F16, bt, ldb, r, u, ldu, M, y, ldy, (size_t)n); break;
    default: all(DT_BF16, bt, ldb, r, u, ldu, M, y, ldy, (size_t)n); break;
    }
}
#endif
