/* lora_avx512.c - Y += U B^T in registers: y is read and written once while j runs.
 *
 * The usual case is a whole panel of bf16 (32 outputs): a rank of it is one vector, whose even
 * elements become fp32 by a shift and whose odd ones by a mask, half of what widening in order would
 * cost; so the even outputs of y are in one vector while j runs and the odd ones in another. */
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
INLINE AVX512 void block(enum dtype t, int mr, int nv, const void *b, size_t ldb, int r, const float *u,
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
        __m512 w[4];
        UNROLL
        for (int v = 0; v < nv; v++)
            w[v] = load(t, b, (size_t)j * ldb + o + 16 * (size_t)v,
                        v == nv - 1 ? last : (__mmask16)0xffff);
        UNROLL
        for (int m = 0; m < mr; m++) {
            const __m512 f = _mm512_set1_ps(u[(size_t)m * ldu + (size_t)j]);
            UNROLL
            for (int v = 0; v < nv; v++)
                acc[m][v] = _mm512_fmadd_ps(f, w[v], acc[m][v]);
        }
    }
    UNROLL
    for (int m = 0; m < mr; m++)
        UNROLL
        for (int v = 0; v < nv; v++)
            _mm512_mask_storeu_ps(y + (size_t)m * ldy + o + 16 * (size_t)v,
                                  v == nv - 1 ? last : (__mmask16)0xffff, acc[m][v]);
}

/* mr rows of a whole panel of bf16. */
INLINE AVX512 void panel(int mr, const uint16_t *b, int r, const float *u, size_t ldu, float *y,
                         size_t ldy)
{
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i odd = _mm512_or_si512(even, _mm512_set1_epi32(1));
    const __m512i first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i second = _mm512_or_si512(first, _mm512_set1_epi32(8));
    const __m512i high = _mm512_set1_epi32((int)0xffff0000u);
    __m512 acc[4][2];
    UNROLL
    for (int m = 0; m < mr; m++) {
        const __m512 a = _mm512_loadu_ps(y + (size_t)m * ldy);
        const __m512 c = _mm512_loadu_ps(y + (size_t)m * ldy + 16);
        acc[m][0] = _mm512_permutex2var_ps(a, even, c);
        acc[m][1] = _mm512_permutex2var_ps(a, odd, c);
    }
    for (int j = 0; j < r; j++) {
        const __m512i raw = _mm512_loadu_si512(b + (size_t)j * 32);
        const __m512 b0 = _mm512_castsi512_ps(_mm512_slli_epi32(raw, 16));
        const __m512 b1 = _mm512_castsi512_ps(_mm512_and_si512(raw, high));
        UNROLL
        for (int m = 0; m < mr; m++) {
            const __m512 f = _mm512_set1_ps(u[(size_t)m * ldu + (size_t)j]);
            acc[m][0] = _mm512_fmadd_ps(f, b0, acc[m][0]);
            acc[m][1] = _mm512_fmadd_ps(f, b1, acc[m][1]);
        }
    }
    UNROLL
    for (int m = 0; m < mr; m++) {
        _mm512_storeu_ps(y + (size_t)m * ldy,
                         _mm512_permutex2var_ps(acc[m][0], first, acc[m][1]));
        _mm512_storeu_ps(y + (size_t)m * ldy + 16,
                         _mm512_permutex2var_ps(acc[m][0], second, acc[m][1]));
    }
}

INLINE AVX512 void panels(const uint16_t *b, int r, const float *u, size_t ldu, int M, float *y,
                          size_t ldy)
{
    int m = 0;
    for (; m + 4 <= M; m += 4)
        panel(4, b, r, u + (size_t)m * ldu, ldu, y + (size_t)m * ldy, ldy);
    for (; m < M; m++)
        panel(1, b, r, u + (size_t)m * ldu, ldu, y + (size_t)m * ldy, ldy);
}

INLINE AVX512 void rows(enum dtype t, int mr, const void *b, size_t ldb, int r, const float *u,
                 size_t ldu, float *y, size_t ldy, size_t n)
{
    size_t o = 0;
    for (; o + 32 <= n; o += 32)
        block(t, mr, 2, b, ldb, r, u, ldu, y, ldy, o, (__mmask16)0xffff);
    for (; o < n; o += 16) {
        __mmask16 last = n - o >= 16 ? (__mmask16)0xffff : (__mmask16)((1u << (n - o)) - 1);
        block(t, mr, 1, b, ldb, r, u, ldu, y, ldy, o, last);
    }
}

INLINE AVX512 void all(enum dtype t, const void *b, size_t ldb, int r, const float *u, size_t ldu, int M,
                float *y, size_t ldy, size_t n)
{
    int m = 0;
    for (; m + 4 <= M; m += 4)
        rows(t, 4, b, ldb, r, u + (size_t)m * ldu, ldu, y + (size_t)m * ldy, ldy, n);
    for (; m < M; m++)
        rows(t, 1, b, ldb, r, u + (size_t)m * ldu, ldu, y + (size_t)m * ldy, ldy, n);
}

AVX512 void lora_add_avx512(enum dtype t, const void *b, size_t ldb, int r, const float *u,
                            size_t ldu, int M, float *y, size_t ldy, int n)
{
    if (t == DT_BF16 && n == 32 && ldb == 32) {
        panels(b, r, u, ldu, M, y, ldy);
        return;
    }
    switch (t) {
    case DT_F32: all(DT_F32, b, ldb, r, u, ldu, M, y, ldy, (size_t)n); break;
    case DT_F16: all(DT_F16, b, ldb, r, u, ldu, M, y, ldy, (size_t)n); break;
    default: all(DT_BF16, b, ldb, r, u, ldu, M, y, ldy, (size_t)n); break;
    }
}
#endif
