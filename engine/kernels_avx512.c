/* kernels_avx512.c - the quantised products with AVX-512 VNNI and VBMI; linear_scalar.c defines
 * every bit of what they return.
 *
 * One output row per lane: the 16 rows of a panel sit side by side, an activation is broadcast to
 * all of them, and no sum ever crosses lanes.  Weights become integers by table look-up: a byte
 * permutation uses the low 6 bits of each index and a 16-bit one the low 5, so a table that
 * repeats itself every 16 entries needs no mask in front of it.
 *
 * VPDPBUSD multiplies unsigned by signed bytes: weights are code + 128, and the accumulator starts
 * at -128 * (sum of activations).  VPDPWSSD multiplies signed pairs; NF4 needs no start value
 * there, 8-bit weights do, because they are widened as code + 128 too (a mask and a shift).
 *
 * `rows` rows of a panel are computed at once, always a literal.  Few rows have too few accumulators
 * to hide the instruction's latency, so they get several apiece; integers may be added in any order.
 * Panels are taken one by one: 8 rows by two panels would use a broadcast activation twice, but leave
 * no registers for the sums over blocks (Zen 4, 8 rows: one by one is 13 % faster for 2048 inputs, a
 * third for 576), and 16 rows would walk over both panels twice (13 to 17 %). */
#include "engine/linear_int.h"
#include "engine/simd_int.h"

#if defined(__x86_64__)
#include <string.h>

enum kind { NF4_I8, NF4_I16, Q8_I8, Q8_I16 };

/* --- weights ----------------------------------------------------------------------------- */

INLINE size_t block_bytes(enum kind k) { return k == NF4_I8 || k == NF4_I16 ? 512 : 1024; }
INLINE int act_bytes(enum kind k) { return k == NF4_I8 || k == Q8_I8 ? 1 : 2; }
/* 64-byte vectors of weights in a block, and how many steps (one multiply-add instruction per
 * row, one dword of activations) each makes. */
INLINE int vectors(enum kind k) { return (int)block_bytes(k) / 64; }
INLINE int steps(enum kind k) { return BLOCK * act_bytes(k) / 4 / vectors(k); }

INLINE AVX512 __m512i code_table(enum kind k)
{
    if (k == NF4_I8) {
        const __m128i codes = _mm_loadu_si128((const __m128i *)nf4_w8);
        return _mm512_broadcast_i32x4(_mm_xor_si128(codes, _mm_set1_epi8(-128)));
    }
    if (k == NF4_I16)
        return _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *)nf4_w16));
    return _mm512_setzero_si512();
}

/* Which dword of a row's activations belongs to step s of vector v. */
INLINE int act_dword(enum kind k, int v, int s)
{
    /* Two vectors of 8-bit weights make a group of 8 inputs, pairs 02 46 13 57. */
    return k == Q8_I16 ? v / 2 * 4 + v % 2 + 2 * s : v * steps(k) + s;
}

/* The weights of step s of a vector, as the multiply-add instruction wants them. */
INLINE AVX512 __m512i operand(enum kind k, __m512i v, int s, __m512i table)
{
    switch (k) {
    case NF4_I8: /* low nibbles are inputs 0..3 of the group, high ones 4..7 */
        return _mm512_permutexvar_epi8(s == 0 ? v : _mm512_srli_epi16(v, 4), table);
    case NF4_I16: /* ACT16_ORDER */
        return _mm512_permutexvar_epi16(s == 0 ? v : _mm512_srli_epi16(v, 4 * (unsigned)s), table);
    case Q8_I8:
        return v;
    case Q8_I16: /* bytes 0 and 2, then 1 and 3 */
        return s == 0 ? _mm512_and_si512(v, _mm512_set1_epi16(0x00ff)) : _mm512_srli_epi16(v, 8);
    }
    return v;
}

INLINE AVX512 __m512i multiply_add(enum kind k, __m512i sum, __m512i w, int32_t act)
{
    const __m512i a = _mm512_set1_epi32(act);
    return act_bytes(k) == 1 ? _mm512_dpbusd_epi32(sum, w, a) : _mm512_dpwssd_epi32(sum, w, a);
}

INLINE int32_t dword(const char *p)
{
    int32_t v;
    memcpy(&v, p, sizeof v);
    return v;
}

/* --- one block of outputs ---------------------------------------------------------------- */

INLINE AVX512 void prefetch(const uint8_t *w, int lines)
{
    UNROLL
    for (int i = 0; i < lines; i++)
        _mm_prefetch((const char *)w + 2048 + 64 * (ptrdiff_t)i, _MM_HINT_T0);
}

/* y of rows [row, row + rows) for one panel of the job. */
INLINE AVX512 void store(const struct panel_job *j, int panel, int row, int rows, const __m512 *f)
{
    const int first = panel * PANEL, left = j->outputs - first;
    const __mmask16 mask = left >= PANEL ? 0xffff : (__mmask16)((1u << left) - 1);
    __m512 bias = _mm512_setzero_ps();
    if (j->bias != NULL)
        bias = _mm512_maskz_loadu_ps(mask, j->bias + first);
    UNROLL
    for (int m = 0; m < rows; m++) {
        const __m512 y = _mm512_fmadd_ps(f[m], _mm512_set1_ps(j->unit), bias);
        _mm512_mask_storeu_ps(j->y + (size_t)(row + m) * j->ldy + first, mask, y);
    }
}

INLINE AVX512 void outputs(enum kind k, const struct panel_job *j, struct fetcher *fetch, int panel,
                           int row, int rows)
{
    const uint8_t *w = j->codes + (size_t)panel * (size_t)j->blocks * block_bytes(k);
    const uint16_t *scales = j->scales + (size_t)panel * (size_t)j->blocks * PANEL;
    const char *act = (const char *)j->act + (ptrdiff_t)row * BLOCK * act_bytes(k);
    const float *act_scale = j->act_scale + row;
    const int32_t *act_start = j->act_start + row;
    const __m512i table = code_table(k);
    const int apiece = rows >= 8 ? 1 : 8 / rows;

    __m512 f[16];
    UNROLL
    for (int m = 0; m < rows; m++)
        f[m] = _mm512_setzero_ps();

    for (int b = 0; b < j->blocks; b++) {
        if (row == 0) /* the first rows read memory; those after them find the panel in a cache */
            prefetch(w, vectors(k));
        fetch_some(fetch);
        __m512i sum[16]; /* sum[c * rows + m]: accumulator c of row m */
        UNROLL
        for (int i = 0; i < rows * apiece; i++)
            sum[i] = i < rows && k != NF4_I16 ? _mm512_set1_epi32(act_start[i])
                                              : _mm512_setzero_si512();
        UNROLL
        for (int v = 0; v < vectors(k); v++) {
            UNROLL
            for (int s = 0; s < steps(k); s++) {
                const int at = 4 * act_dword(k, v, s), c = (v * steps(k) + s) % apiece;
                const __m512i raw = _mm512_load_si512(w + 64 * (ptrdiff_t)v);
                const __m512i x = operand(k, raw, s, table);
                UNROLL
                for (int m = 0; m < rows; m++)
                    sum[c * rows + m] = multiply_add(k, sum[c * rows + m], x,
                                                     dword(act + m * BLOCK * act_bytes(k) + at));
            }
        }
        const __m512 scale = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)scales));
        UNROLL
        for (int m = 0; m < rows; m++) {
            __m512i isum = sum[m];
            /* With `apiece` as its bound, clang 14 leaves this a loop, and with it all sums
             * in memory. */
            UNROLL
            for (int c = 1; c < 8; c++)
                if (c < apiece)
                    isum = _mm512_add_epi32(isum, sum[c * rows + m]);
            const __m512 t = _mm512_mul_ps(_mm512_cvtepi32_ps(isum), _mm512_set1_ps(act_scale[m]));
            f[m] = _mm512_fmadd_ps(t, scale, f[m]);
        }
        w += block_bytes(k);
        scales += PANEL;
        act += (ptrdiff_t)j->rows * BLOCK * act_bytes(k);
        act_scale += j->rows;
        act_start += j->rows;
    }
    store(j, panel, row, rows, f);
}

/* All rows of one panel, in as few groups as registers allow.  Grouping does not change a row. */
INLINE AVX512 void one_panel(enum kind k, const struct panel_job *j, struct fetcher *fetch, int panel)
{
    int row = 0;
#define TAKE(n) (outputs(k, j, fetch, panel, row, n), row += (n))
    while (row < j->rows) {
        const int left = j->rows - row;
        if (left >= 16)
            TAKE(16);
        else if (left >= 12)
            TAKE(12);
        else if (left >= 8)
            TAKE(8);
        else if (left >= 6)
            TAKE(6);
        else if (left >= 4)
            TAKE(4);
        else if (left == 3)
            TAKE(3);
        else if (left == 2)
            TAKE(2);
        else
            TAKE(1);
    }
#undef TAKE
}

/* A tile by one or two panels. */
INLINE AVX512 void job(enum kind k, const struct panel_job *j)
{
    struct fetcher fetch = j->fetch;
    const int groups = j->rows < 5 || j->rows == 6 || j->rows % 4 == 0 ? 1 : 2; /* see one_panel() */
    fetch_pace(&fetch, j->blocks, groups * ((j->outputs + PANEL - 1) / PANEL));
    for (int p = 0; p * PANEL < j->outputs; p++)
        one_panel(k, j, &fetch, p);
}

AVX512 static void nf4_i8(const struct panel_job *j) { job(NF4_I8, j); }
AVX512 static void nf4_i16(const struct panel_job *j) { job(NF4_I16, j); }
AVX512 static void q8_i8(const struct panel_job *j) { job(Q8_I8, j); }
AVX512 static void q8_i16(const struct panel_job *j) { job(Q8_I16, j); }

/* --- activations ------------------------------------------------------------------------- */

/* Codes of a block as four vectors of 32-bit integers in order of k; returns the scale. */
INLINE AVX512 float quantise_block(const float *x, int most, __m512i code[4])
{
    const __m512i sign = _mm512_set1_epi32(0x7fffffff);
    __m512 v[4];
    __m512i largest = _mm512_setzero_si512();
    UNROLL
    for (int i = 0; i < 4; i++) {
        v[i] = _mm512_loadu_ps(x + 16 * (ptrdiff_t)i);
        largest = _mm512_max_epu32(largest, _mm512_and_si512(_mm512_castps_si512(v[i]), sign));
    }
    const uint32_t bits = _mm512_reduce_max_epu32(largest);
    if (bits - ACT_LEAST_BITS >= ACT_INF_BITS - ACT_LEAST_BITS) { /* outside of both limits */
        UNROLL
        for (int i = 0; i < 4; i++)
            code[i] = _mm512_setzero_si512();
        return bits < ACT_LEAST_BITS ? 0.0f : __builtin_nanf("");
    }
    const float m = _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128((int)bits)));
    const __m512 inverse = _mm512_set1_ps((float)most / m);
    UNROLL
    for (int i = 0; i < 4; i++)
        code[i] = _mm512_cvtps_epi32(_mm512_mul_ps(v[i], inverse));
    return m * (1.0f / (float)most);
}

INLINE AVX512 int32_t start_value(const __m512i code[4])
{
    const __m512i sum =
        _mm512_add_epi32(_mm512_add_epi32(code[0], code[1]), _mm512_add_epi32(code[2], code[3]));
    return -128 * _mm512_reduce_add_epi32(sum);
}

AVX512 static void pack_i8(const float *x, int blocks, int rows, void *codes, float *scale,
                           int32_t *start)
{
    int8_t *out = codes;
    for (int b = 0; b < blocks;
         b++, x += BLOCK, out += BLOCK * rows, scale += rows, start += rows) {
        __m512i code[4];
        *scale = quantise_block(x, A8_MAX, code);
        *start = start_value(code);
        UNROLL
        for (int i = 0; i < 4; i++)
            _mm_storeu_si128((__m128i *)(out + 16 * (ptrdiff_t)i), _mm512_cvtepi32_epi8(code[i]));
    }
}

AVX512 static void pack_i16(const float *x, int blocks, int rows, void *codes, float *scale,
                            int32_t *start)
{
    /* Inside each 128-bit lane, ACT16_ORDER as byte indices. */
    const __m256i order = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15));
    int16_t *out = codes;
    for (int b = 0; b < blocks;
         b++, x += BLOCK, out += BLOCK * rows, scale += rows, start += rows) {
        __m512i code[4];
        *scale = quantise_block(x, A16_MAX, code);
        *start = start_value(code);
        UNROLL
        for (int i = 0; i < 4; i++) {
            const __m256i natural = _mm512_cvtepi32_epi16(code[i]);
            _mm256_storeu_si256((__m256i *)(out + 16 * (ptrdiff_t)i),
                                _mm256_shuffle_epi8(natural, order));
        }
    }
}

const struct linear_ops linear_avx512 = { pack_i8, pack_i16, nf4_i8, nf4_i16, q8_i8, q8_i16 };

#endif
