/* dot.c - fp32 dot products and scaled additions: the scalar definition, AVX2 and AVX-512.
 *
 * Each function is written once for any weight type as an always-inlined body with a literal
 * `enum dtype`, and instantiated for fp32, bf16 and fp16 below. */
#include "engine/dot.h"
#include "engine/simd_int.h"

#include <math.h>

/* --- scalar: the definition -------------------------------------------------------------- */

INLINE float widen(enum dtype t, const void *w, size_t i)
{
    if (t == DT_F32)
        return ((const float *)w)[i];
    const uint16_t h = ((const uint16_t *)w)[i];
    return t == DT_BF16 ? bf16_to_f32(h) : f16_to_f32(h);
}

/* The lanes go on from where they are. */
INLINE void lanes_scalar(enum dtype t, const float *x, const void *w, size_t n, float *lane)
{
    size_t i = 0;
    for (; i + 16 <= n; i += 16)
        for (size_t l = 0; l < 16; l++)
            lane[l] = fmaf(x[i + l], widen(t, w, i + l), lane[l]);
    if (i < n)
        for (size_t l = 0; l < 16; l++)
            lane[l] =
                i + l < n ? fmaf(x[i + l], widen(t, w, i + l), lane[l]) : fmaf(0.0f, 0.0f, lane[l]);
}

float dot_tree(float lane[16])
{
    for (int half = 8; half > 0; half /= 2)
        for (int l = 0; l < half; l++)
            lane[l] += lane[l + half];
    return lane[0];
}

INLINE float dot_scalar(enum dtype t, const float *x, const void *w, size_t n)
{
    float lane[16] = { 0.0f };
    lanes_scalar(t, x, w, n, lane);
    return dot_tree(lane);
}

INLINE const void *row_of(enum dtype t, const void *w, size_t ldw, int n)
{
    return (const char *)w + (size_t)n * ldw * (t == DT_F32 ? 4 : 2);
}

INLINE void dots_scalar(enum dtype t, const float *x, size_t ldx, int M, const void *w, size_t ldw,
                        int N, size_t K, float *y, size_t ldy)
{
    for (int n = 0; n < N; n++)
        for (int m = 0; m < M; m++)
            y[(size_t)m * ldy + (size_t)n] =
                dot_scalar(t, x + (size_t)m * ldx, row_of(t, w, ldw, n), K);
}

INLINE void axpy_scalar(enum dtype t, float a, const void *w, float *y, size_t n)
{
    for (size_t i = 0; i < n; i++)
        y[i] = fmaf(a, widen(t, w, i), y[i]);
}

/* The functions of one instruction set for one type, and the table of an instruction set. */
#define INSTANTIATE(isa, attribute, name, type, dt)                                                \
    attribute static float dot_##name##_##isa(const float *x, const type *w, size_t n)             \
    {                                                                                              \
        return dot_##isa(dt, x, w, n);                                                             \
    }                                                                                              \
    attribute static void dots_##name##_##isa(const float *x, size_t ldx, int M, const type *w,    \
                                              size_t ldw, int N, size_t K, float *y, size_t ldy)   \
    {                                                                                              \
        dots_##isa(dt, x, ldx, M, w, ldw, N, K, y, ldy);                                           \
    }                                                                                              \
    attribute static void axpy_##name##_##isa(float a, const type *w, float *y, size_t n)          \
    {                                                                                              \
        axpy_##isa(dt, a, w, y, n);                                                                \
    }

#define TABLE(isa, attribute)                                                                      \
    INSTANTIATE(isa, attribute, f32, float, DT_F32)                                                \
    INSTANTIATE(isa, attribute, bf16, uint16_t, DT_BF16)                                           \
    INSTANTIATE(isa, attribute, f16, uint16_t, DT_F16)                                             \
    attribute static void lanes_f32_##isa(const float *x, const float *w, size_t n, float *lane)   \
    {                                                                                              \
        lanes_##isa(DT_F32, x, w, n, lane);                                                        \
    }                                                                                              \
    static const struct dot_ops ops_##isa = {                                                      \
        .dot_f32 = dot_f32_##isa,                                                                  \
        .dot_bf16 = dot_bf16_##isa,                                                                \
        .dot_f16 = dot_f16_##isa,                                                                  \
        .lanes_f32 = lanes_f32_##isa,                                                              \
        .dots_f32 = dots_f32_##isa,                                                                \
        .dots_bf16 = dots_bf16_##isa,                                                              \
        .dots_f16 = dots_f16_##isa,                                                                \
        .axpy_f32 = axpy_f32_##isa,                                                                \
        .axpy_bf16 = axpy_bf16_##isa,                                                              \
        .axpy_f16 = axpy_f16_##isa,                                                                \
    };

TABLE(scalar, )

/* --- AVX2: lanes 0..7 and 8..15 in a vector each ------------------------------------------- */
#if defined(__x86_64__)

/* Elements [i, i + 16) of w, widened; those from n on are zero. */
INLINE AVX2 void load16_avx2(enum dtype t, const void *w, size_t i, size_t n, __m256 ret[2])
{
    float part[16] = { 0.0f };
    if (i + 16 > n) {
        for (size_t l = 0; i + l < n; l++)
            part[l] = widen(t, w, i + l);
        w = part;
        i = 0;
        t = DT_F32;
    }
    for (int h = 0; h < 2; h++, i += 8) {
        if (t == DT_F32) {
            ret[h] = _mm256_loadu_ps((const float *)w + i);
            continue;
        }
        const __m128i bits = _mm_loadu_si128((const __m128i *)((const uint16_t *)w + i));
        ret[h] = t == DT_F16
                     ? _mm256_cvtph_ps(bits)
                     : _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
    }
}

/* MR rows of x by NR rows of w, literals: two accumulators for each pair. */
INLINE AVX2 void block_avx2(enum dtype t, int MR, int NR, const float *x, size_t ldx, const void *w,
                            size_t ldw, size_t K, float *y, size_t ldy)
{
    __m256 sum[4][2];
    UNROLL
    for (int i = 0; i < MR * NR; i++)
        sum[i][0] = sum[i][1] = _mm256_setzero_ps();
    for (size_t k = 0; k < K; k += 16) {
        __m256 a[2][2], b[2];
        UNROLL
        for (int m = 0; m < MR; m++)
            load16_avx2(DT_F32, x + (size_t)m * ldx, k, K, a[m]);
        UNROLL
        for (int n = 0; n < NR; n++) {
            load16_avx2(t, row_of(t, w, ldw, n), k, K, b);
            UNROLL
            for (int m = 0; m < MR; m++) {
                sum[n * MR + m][0] = _mm256_fmadd_ps(a[m][0], b[0], sum[n * MR + m][0]);
                sum[n * MR + m][1] = _mm256_fmadd_ps(a[m][1], b[1], sum[n * MR + m][1]);
            }
        }
    }
    UNROLL
    for (int i = 0; i < MR * NR; i++) {
        const __m256 eight = _mm256_add_ps(sum[i][0], sum[i][1]);
        const __m128 four =
            _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
        const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
        y[(size_t)(i % MR) * ldy + (size_t)(i / MR)] =
            _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
    }
}

INLINE AVX2 void lanes_avx2(enum dtype t, const float *x, const void *w, size_t n, float *lane)
{
    __m256 low = _mm256_loadu_ps(lane), high = _mm256_loadu_ps(lane + 8);
    for (size_t i = 0; i < n; i += 16) {
        __m256 a[2], b[2];
        load16_avx2(DT_F32, x, i, n, a);
        load16_avx2(t, w, i, n, b);
        low = _mm256_fmadd_ps(a[0], b[0], low);
        high = _mm256_fmadd_ps(a[1], b[1], high);
    }
    _mm256_storeu_ps(lane, low);
    _mm256_storeu_ps(lane + 8, high);
}

INLINE AVX2 float dot_avx2(enum dtype t, const float *x, const void *w, size_t n)
{
    float ret;
    block_avx2(t, 1, 1, x, 0, w, 0, n, &ret, 0);
    return ret;
}

/* All M rows of x by NR (1, 2 or 4) rows of w: eight sums at most, as registers allow. */
INLINE AVX2 void strip_avx2(enum dtype t, int NR, const float *x, size_t ldx, int M, const void *w,
                            size_t ldw, size_t K, float *y, size_t ldy)
{
    int m = 0;
    for (; m + 2 <= M; m += 2) {
        const float *a = x + (size_t)m * ldx;
        float *out = y + (size_t)m * ldy;
        block_avx2(t, 2, NR < 2 ? NR : 2, a, ldx, w, ldw, K, out, ldy);
        if (NR == 4)
            block_avx2(t, 2, 2, a, ldx, row_of(t, w, ldw, 2), ldw, K, out + 2, ldy);
    }
    if (m < M)
        block_avx2(t, 1, NR, x + (size_t)m * ldx, ldx, w, ldw, K, y + (size_t)m * ldy, ldy);
}

INLINE AVX2 void dots_avx2(enum dtype t, const float *x, size_t ldx, int M, const void *w,
                           size_t ldw, int N, size_t K, float *y, size_t ldy)
{
    int n = 0;
    for (; n + 4 <= N; n += 4)
        strip_avx2(t, 4, x, ldx, M, row_of(t, w, ldw, n), ldw, K, y + n, ldy);
    for (; n + 2 <= N; n += 2)
        strip_avx2(t, 2, x, ldx, M, row_of(t, w, ldw, n), ldw, K, y + n, ldy);
    if (n < N)
        strip_avx2(t, 1, x, ldx, M, row_of(t, w, ldw, n), ldw, K, y + n, ldy);
}

INLINE AVX2 void axpy_avx2(enum dtype t, float a, const void *w, float *y, size_t n)
{
    const size_t whole = n - n % 16;
    for (size_t i = 0; i < whole; i += 16) {
        __m256 b[2];
        load16_avx2(t, w, i, n, b);
        for (int h = 0; h < 2; h++) {
            float *to = y + i + (size_t)h * 8;
            _mm256_storeu_ps(to, _mm256_fmadd_ps(_mm256_set1_ps(a), b[h], _mm256_loadu_ps(to)));
        }
    }
    for (size_t i = whole; i < n; i++)
        y[i] = fmaf(a, widen(t, w, i), y[i]);
}

TABLE(avx2, AVX2)

/* --- AVX-512 ----------------------------------------------------------------------------- */

/* The elements of `w` from i on that `mask` names, widened; zeros elsewhere. */
INLINE AVX512 __m512 load16(enum dtype t, const void *w, size_t i, __mmask16 mask)
{
    if (t == DT_F32)
        return _mm512_maskz_loadu_ps(mask, (const float *)w + i);
    const __m256i h = _mm256_maskz_loadu_epi16(mask, (const uint16_t *)w + i);
    if (t == DT_F16)
        return _mm512_cvtph_ps(h);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
}

INLINE AVX512 __mmask16 tail_mask(size_t n) { return (__mmask16)((1u << n % 16) - 1); }

INLINE AVX512 float tree(__m512 s)
{
    __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(s), _mm512_extractf32x8_ps(s, 1));
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

/* Four trees at once, each adding the same pairs. */
INLINE AVX512 __m128 tree4(__m512 a, __m512 b, __m512 c, __m512 d)
{
    /* 8 lanes of each pair, then 4 lanes of all four, one after the other */
    const __m512 ab =
        _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
    const __m512 cd =
        _mm512_add_ps(_mm512_shuffle_f32x4(c, d, 0x44), _mm512_shuffle_f32x4(c, d, 0xee));
    __m512 s =
        _mm512_add_ps(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xdd));
    s = _mm512_add_ps(s, _mm512_permute_ps(s, 0x4e));
    s = _mm512_add_ps(s, _mm512_permute_ps(s, 0xb1));
    return _mm512_castps512_ps128(_mm512_maskz_compress_ps(0x1111, s));
}

/* A block of MR rows of x by NR (1 or 4) rows of w, both literals: MR * NR accumulators in
 * registers. */
INLINE AVX512 void block_avx512(enum dtype t, int MR, int NR, const float *x, size_t ldx,
                                const void *w, size_t ldw, size_t K, float *y, size_t ldy)
{
    __m512 sum[16];
    UNROLL
    for (int i = 0; i < MR * NR; i++)
        sum[i] = _mm512_setzero_ps();
    const size_t whole = K - K % 16;
    for (size_t k = 0; k < K; k += 16) {
        const __mmask16 mask = k < whole ? 0xffff : tail_mask(K);
        __m512 a[4];
        UNROLL
        for (int m = 0; m < MR; m++)
            a[m] = _mm512_maskz_loadu_ps(mask, x + (size_t)m * ldx + k);
        UNROLL
        for (int n = 0; n < NR; n++) {
            const __m512 b = load16(t, row_of(t, w, ldw, n), k, mask);
            UNROLL
            for (int m = 0; m < MR; m++)
                sum[n * MR + m] = _mm512_fmadd_ps(a[m], b, sum[n * MR + m]);
        }
    }
    UNROLL
    for (int m = 0; m < MR; m++) {
        if (NR == 4)
            _mm_storeu_ps(y + (size_t)m * ldy,
                          tree4(sum[m], sum[MR + m], sum[2 * MR + m], sum[3 * MR + m]));
        else
            y[(size_t)m * ldy] = tree(sum[m]);
    }
}

INLINE AVX512 void lanes_avx512(enum dtype t, const float *x, const void *w, size_t n, float *lane)
{
    const size_t whole = n - n % 16;
    __m512 sum = _mm512_loadu_ps(lane);
    for (size_t i = 0; i < n; i += 16) {
        const __mmask16 mask = i < whole ? 0xffff : tail_mask(n);
        sum = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(mask, x + i), load16(t, w, i, mask), sum);
    }
    _mm512_storeu_ps(lane, sum);
}

INLINE AVX512 float dot_avx512(enum dtype t, const float *x, const void *w, size_t n)
{
    float ret;
    block_avx512(t, 1, 1, x, 0, w, 0, n, &ret, 0);
    return ret;
}

/* All M rows of x by NR rows of w. */
INLINE AVX512 void strip_avx512(enum dtype t, int NR, const float *x, size_t ldx, int M,
                                const void *w, size_t ldw, size_t K, float *y, size_t ldy)
{
    int m = 0;
    for (; m + 4 <= M; m += 4)
        block_avx512(t, 4, NR, x + (size_t)m * ldx, ldx, w, ldw, K, y + (size_t)m * ldy, ldy);
    for (; m + 2 <= M; m += 2)
        block_avx512(t, 2, NR, x + (size_t)m * ldx, ldx, w, ldw, K, y + (size_t)m * ldy, ldy);
    for (; m < M; m++)
        block_avx512(t, 1, NR, x + (size_t)m * ldx, ldx, w, ldw, K, y + (size_t)m * ldy, ldy);
}

INLINE AVX512 void dots_avx512(enum dtype t, const float *x, size_t ldx, int M, const void *w,
                               size_t ldw, int N, size_t K, float *y, size_t ldy)
{
    int n = 0;
    for (; n + 4 <= N; n += 4)
        strip_avx512(t, 4, x, ldx, M, row_of(t, w, ldw, n), ldw, K, y + n, ldy);
    for (; n < N; n++)
        strip_avx512(t, 1, x, ldx, M, row_of(t, w, ldw, n), ldw, K, y + n, ldy);
}

INLINE AVX512 void axpy_avx512(enum dtype t, float a, const void *w, float *y, size_t n)
{
    const __m512 factor = _mm512_set1_ps(a);
    const size_t whole = n - n % 16;
    for (size_t i = 0; i < n; i += 16) {
        const __mmask16 mask = i < whole ? 0xffff : tail_mask(n);
        const __m512 old = _mm512_maskz_loadu_ps(mask, y + i);
        _mm512_mask_storeu_ps(y + i, mask, _mm512_fmadd_ps(factor, load16(t, w, i, mask), old));
    }
}

TABLE(avx512, AVX512)
#endif

const struct dot_ops *dot_ops(enum isa isa)
{
#if defined(__x86_64__)
    if (isa == ISA_AVX512)
        return &ops_avx512;
    if (isa == ISA_AVX2)
        return &ops_avx2;
#endif
    (void)isa;
    return &ops_scalar;
}
