/* lora_avx512.c - Y += U B^T in registers: up to 4 rows by 4 vectors of outputs while j runs, so that
 * y is read and written once, and each row of B^T is widened once for 4 rows. */
#include "engine/lora_int.h"
#include "engine/simd_int.h"

#if defined(__x86_64__)
#include <stdint.h>


INLINE AVX512 __m512 load(enum dtype t, const void *p, size_t i, __mmask16 m)
{
    if (t == DT_F32)
        return _mm512_maskz_loadu_ps(m, (const float *)p + i);
    __m256i h = _mm256_maskz_loadu_epi16(m, (const uint16_t *)p + i);
    if (t == DT_F16)
        return _mm512_cvtph_ps(h);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
}

/* mr rows, nv vectors from output o on, the last under mask `last`.  t, mr, nv are literals. */
INLINE AVX512 void block(enum dtype t, int mr, int nv, const void *bt, size_t ldb, int r, const float *u,
                  size_t ldu, float *y, size_t ldy, size_t o, __mmask16 last)
{
    __m512 acc[4][4];
    UNROLL
    for (int m = 0; m < mr; m++)
        UNROLL
        for (int v = 0; v < nv; v++)
            acc[m][v] = _mm512_maskz_loadu_ps(v == nv - 1 ? last : (__mmask16)0xffff,
                                              y + (size_t)m * ldy + o + 16 * (size_t)v);
    for (int j = 0; j < r; j++) {
        __m512 b[4];
        UNROLL
        for (int v = 0; v < nv; v++)
            b[v] = load(t, bt, (size_t)j * ldb + o + 16 * (size_t)v,
                        v == nv - 1 ? last : (__mmask16)0xffff);
        UNROLL
        for (int m = 0; m < mr; m++) {
            const __m512 f = _mm512_set1_ps(u[(size_t)m * ldu + (size_t)j]);
            UNROLL
            for (int v = 0; v < nv; v++)
                acc[m][v] = _mm512_fmadd_ps(f, b[v], acc[m][v]);
        }
    }
    UNROLL
    for (int m = 0; m < mr; m++)
        UNROLL
        for (int v = 0; v < nv; v++)
            _mm512_mask_storeu_ps(y + (size_t)m * ldy + o + 16 * (size_t)v,
                                  v == nv - 1 ? last : (__mmask16)0xffff, acc[m][v]);
}

INLINE AVX512 void rows(enum dtype t, int mr, const void *bt, size_t ldb, int r, const float *u,
                 size_t ldu, float *y, size_t ldy, size_t n)
{
    size_t o = 0;
    for (; o + 64 <= n; o += 64)
        block(t, mr, 4, bt, ldb, r, u, ldu, y, ldy, o, (__mmask16)0xffff);
    for (; o < n; o += 16) {
        __mmask16 last = n - o >= 16 ? (__mmask16)0xffff : (__mmask16)((1u << (n - o)) - 1);
        block(t, mr, 1, bt, ldb, r, u, ldu, y, ldy, o, last);
    }
}

INLINE AVX512 void all(enum dtype t, const void *bt, size_t ldb, int r, const float *u, size_t ldu, int M,
                float *y, size_t ldy, size_t n)
{
    int m = 0;
    for (; m + 4 <= M; m += 4)
        rows(t, 4, bt, ldb, r, u + (size_t)m * ldu, ldu, y + (size_t)m * ldy, ldy, n);
    for (; m < M; m++)
        rows(t, 1, bt, ldb, r, u + (size_t)m * ldu, ldu, y + (size_t)m * ldy, ldy, n);
}

AVX512 void lora_add_avx512(enum dtype t, const void *bt, size_t ldb, int r, const float *u,
                            size_t ldu, int M, float *y, size_t ldy, int n)
{
    switch (t) {
    case DT_F32: all(DT_F32, bt, ldb, r, u, ldu, M, y, ldy, (size_t)n); break;
    case DT_F16: all(DT_F16, bt, ldb, r, u, ldu, M, y, ldy, (size_t)n); break;
    default: all(DT_BF16, bt, ldb, r, u, ldu, M, y, ldy, (size_t)n); break;
    }
}
#endif
