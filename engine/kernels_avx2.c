/* kernels_avx2.c - the quantised products for CPUs without AVX-512; linear_scalar.c defines every
 * bit of what they return.
 *
 * As in kernels_avx512.c a panel's rows are the lanes and activations are broadcast, but a panel
 * is two vectors (rows 0..7 and 8..15), and up to four rows of activations are taken at once.
 *
 * VPMADDUBSW adds two products of unsigned and signed bytes into 16 bits and saturates there, so
 * bytes are multiplied as |weight| by (activation with the weight's sign): at most 2 * 127 * 127,
 * which fits.  16-bit codes are looked up a byte at a time. */
#include "engine/linear_int.h"
#include "engine/simd_int.h"

#if defined(__x86_64__)
#include <string.h>

enum kind { NF4_I8, NF4_I16, Q8_I8, Q8_I16 };

INLINE size_t block_bytes(enum kind k) { return k == NF4_I8 || k == NF4_I16 ? 512 : 1024; }
INLINE int act_bytes(enum kind k) { return k == NF4_I8 || k == Q8_I8 ? 1 : 2; }
/* Groups of 64 bytes in a block, and dwords of activations that each of them meets. */
INLINE int groups(enum kind k) { return (int)block_bytes(k) / 64; }
INLINE int steps(enum kind k) { return BLOCK * act_bytes(k) / 4 / groups(k); }

INLINE int act_dword(enum kind k, int group, int s)
{
    /* Two groups of 8-bit weights make 8 inputs, pairs 02 46 13 57. */
    return k == Q8_I16 ? group / 2 * 4 + group % 2 + 2 * s : group * steps(k) + s;
}

/* --- weights ----------------------------------------------------------------------------- */

/* NF4's codes: bytes, or the low and high bytes of 16-bit ones; twice, as look-ups want it. */
struct tables {
    __m256i low, high;
};

INLINE AVX2 struct tables make_tables(enum kind k)
{
    if (k == NF4_I8) {
        const __m128i codes = _mm_loadu_si128((const __m128i *)nf4_w8);
        return (struct tables){ _mm256_broadcastsi128_si256(codes), _mm256_setzero_si256() };
    }
    if (k != NF4_I16)
        return (struct tables){ _mm256_setzero_si256(), _mm256_setzero_si256() };
    const __m128i a = _mm_loadu_si128((const __m128i *)nf4_w16);
    const __m128i b = _mm_loadu_si128((const __m128i *)(nf4_w16 + 8));
    const __m128i byte = _mm_set1_epi16(0x00ff);
    const __m128i low = _mm_packus_epi16(_mm_and_si128(a, byte), _mm_and_si128(b, byte));
    const __m128i high = _mm_packus_epi16(_mm_srli_epi16(a, 8), _mm_srli_epi16(b, 8));
    return (struct tables){ _mm256_broadcastsi128_si256(low), _mm256_broadcastsi128_si256(high) };
}

/* The weights of step s of eight rows: four bytes or two 16-bit numbers per row. */
INLINE AVX2 __m256i operand(enum kind k, __m256i v, int s, struct tables t)
{
    const __m256i nibble = _mm256_set1_epi8(0x0f), byte = _mm256_set1_epi16(0x00ff);
    if (k == NF4_I8)
        return _mm256_shuffle_epi8(t.low,
                                   _mm256_and_si256(s == 0 ? v : _mm256_srli_epi16(v, 4), nibble));
    if (k == Q8_I8)
        return _mm256_xor_si256(v, _mm256_set1_epi8(-128));
    if (k == Q8_I16) /* code + 128 of bytes 0 and 2, then of 1 and 3 */
        return s == 0 ? _mm256_and_si256(v, byte) : _mm256_srli_epi16(v, 8);
    /* ACT16_ORDER: low nibbles of bytes 0 and 2, high ones, then the same of bytes 1 and 3 */
    const __m256i index = _mm256_and_si256(s % 2 == 0 ? v : _mm256_srli_epi16(v, 4), nibble);
    const __m256i low = _mm256_shuffle_epi8(t.low, index),
                  high = _mm256_shuffle_epi8(t.high, index);
    if (s < 2)
        return _mm256_or_si256(_mm256_and_si256(low, byte), _mm256_slli_epi16(high, 8));
    return _mm256_or_si256(_mm256_srli_epi16(low, 8), _mm256_andnot_si256(byte, high));
}

INLINE AVX2 __m256i multiply_add(enum kind k, __m256i sum, __m256i w, __m256i a)
{
    if (act_bytes(k) == 2)
        return _mm256_add_epi32(sum, _mm256_madd_epi16(w, a));
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(a, w));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

INLINE AVX2 __m256i broadcast(const char *p)
{
    int32_t v;
    memcpy(&v, p, sizeof v);
    return _mm256_set1_epi32(v);
}

/* --- one panel --------------------------------------------------------------------------- */

/* f[2 * m + h]: row m, half h of the panel */
INLINE AVX2 void store(const struct panel_job *j, int panel, int row, int rows, const __m256 *f)
{
    const int first = panel * PANEL, left = j->outputs - first;
    const size_t n = left < PANEL ? (size_t)left : PANEL;
    float bias[PANEL] = { 0.0f }, y[PANEL];
    if (j->bias != NULL)
        memcpy(bias, j->bias + first, n * sizeof *bias);
    UNROLL
    for (int m = 0; m < rows; m++) {
        UNROLL
        for (int h = 0; h < 2; h++)
            _mm256_storeu_ps(y + 8 * h, _mm256_fmadd_ps(f[2 * m + h], _mm256_set1_ps(j->unit),
                                                        _mm256_loadu_ps(bias + 8 * h)));
        memcpy(j->y + (size_t)(row + m) * j->ldy + first, y, n * sizeof *y);
    }
}

INLINE AVX2 void outputs(enum kind k, const struct panel_job *j, struct fetcher *fetch, int panel,
                         int row, int rows)
{
    const size_t first_block = (size_t)panel * (size_t)j->blocks;
    const uint8_t *w = j->codes + first_block * block_bytes(k);
    const uint16_t *scales = j->scales + first_block * PANEL;
    const char *act = (const char *)j->act + (ptrdiff_t)row * BLOCK * act_bytes(k);
    const float *act_scale = j->act_scale + row;
    const int32_t *act_start = j->act_start + row;
    const struct tables t = make_tables(k);

    __m256 f[8];
    UNROLL
    for (int i = 0; i < 2 * rows; i++)
        f[i] = _mm256_setzero_ps();

    for (int b = 0; b < j->blocks; b++) {
        fetch_some(fetch);
        __m256i sum[8];
        UNROLL
        for (int i = 0; i < 2 * rows; i++)
            sum[i] = k == Q8_I16 ? _mm256_set1_epi32(act_start[i / 2]) : _mm256_setzero_si256();
        UNROLL
        for (int g = 0; g < groups(k); g++) {
            UNROLL
            for (int s = 0; s < steps(k); s++) {
                const char *a = act + 4 * (ptrdiff_t)act_dword(k, g, s);
                UNROLL
                for (int h = 0; h < 2; h++) {
                    const uint8_t *at = w + 64 * (ptrdiff_t)g + 32 * (ptrdiff_t)h;
                    const __m256i x = operand(k, _mm256_load_si256((const __m256i *)at), s, t);
                    UNROLL
                    for (int m = 0; m < rows; m++)
                        sum[2 * m + h] = multiply_add(k, sum[2 * m + h], x,
                                                      broadcast(a + m * BLOCK * act_bytes(k)));
                }
            }
        }
        UNROLL
        for (int h = 0; h < 2; h++) {
            const uint16_t *s16 = scales + 8 * (ptrdiff_t)h;
            const __m256 scale = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)s16));
            UNROLL
            for (int m = 0; m < rows; m++) {
                const int i = 2 * m + h;
                const __m256 product =
                    _mm256_mul_ps(_mm256_cvtepi32_ps(sum[i]), _mm256_set1_ps(act_scale[m]));
                f[i] = _mm256_fmadd_ps(product, scale, f[i]);
            }
        }
        w += block_bytes(k);
        scales += PANEL;
        act += (ptrdiff_t)j->rows * BLOCK * act_bytes(k);
        act_scale += j->rows;
        act_start += j->rows;
    }
    store(j, panel, row, rows, f);
}

INLINE AVX2 void job(enum kind k, const struct panel_job *j)
{
    struct fetcher fetch = j->fetch;
    fetch_pace(&fetch, j->blocks, (j->outputs + PANEL - 1) / PANEL * ((j->rows + 3) / 4));
    for (int p = 0; p * PANEL < j->outputs; p++) {
        int row = 0;
        for (; row + 4 <= j->rows; row += 4)
            outputs(k, j, &fetch, p, row, 4);
        for (; row + 2 <= j->rows; row += 2)
            outputs(k, j, &fetch, p, row, 2);
        if (row < j->rows)
            outputs(k, j, &fetch, p, row, 1);
    }
}

AVX2 static void nf4_i8(const struct panel_job *j) { job(NF4_I8, j); }
AVX2 static void nf4_i16(const struct panel_job *j) { job(NF4_I16, j); }
AVX2 static void q8_i8(const struct panel_job *j) { job(Q8_I8, j); }
AVX2 static void q8_i16(const struct panel_job *j) { job(Q8_I16, j); }

/* --- activations ------------------------------------------------------------------------- */

/* Codes of a block in order of k; returns the scale. */
INLINE AVX2 float quantise_block(const float *x, int most, int16_t code[BLOCK])
{
    const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
    __m256i largest = _mm256_setzero_si256();
    for (int i = 0; i < BLOCK; i += 8)
        largest = _mm256_max_epu32(
            largest, _mm256_and_si256(_mm256_castps_si256(_mm256_loadu_ps(x + i)), magnitude));
    __m128i four =
        _mm_max_epu32(_mm256_castsi256_si128(largest), _mm256_extracti128_si256(largest, 1));
    four = _mm_max_epu32(four, _mm_shuffle_epi32(four, 0x4e));
    four = _mm_max_epu32(four, _mm_shuffle_epi32(four, 0xb1));
    const uint32_t bits = (uint32_t)_mm_cvtsi128_si32(four);
    if (bits - ACT_LEAST_BITS >= ACT_INF_BITS - ACT_LEAST_BITS) { /* outside of both limits */
        memset(code, 0, BLOCK * sizeof *code);
        return bits < ACT_LEAST_BITS ? 0.0f : __builtin_nanf("");
    }
    const float m = _mm_cvtss_f32(_mm_castsi128_ps(four));
    const __m256 inverse = _mm256_set1_ps((float)most / m);
    for (int i = 0; i < BLOCK; i += 16) {
        const __m256i a = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + i), inverse));
        const __m256i b = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + i + 8), inverse));
        /* packs works in 128-bit halves: put the quarters back in order */
        const __m256i both = _mm256_permute4x64_epi64(_mm256_packs_epi32(a, b), 0xd8);
        _mm256_storeu_si256((__m256i *)(code + i), both);
    }
    return m * (1.0f / (float)most);
}

INLINE AVX2 int32_t start_value(const int16_t *code)
{
    int32_t sum = 0;
    for (int k = 0; k < BLOCK; k++)
        sum += code[k];
    return -128 * sum;
}

AVX2 static void pack_i8(const float *x, int blocks, int rows, void *codes, float *scale,
                         int32_t *start)
{
    int8_t *out = codes;
    int16_t code[BLOCK];
    for (int b = 0; b < blocks;
         b++, x += BLOCK, out += BLOCK * rows, scale += rows, start += rows) {
        *scale = quantise_block(x, A8_MAX, code);
        *start = start_value(code);
        for (int k = 0; k < BLOCK; k++)
            out[k] = (int8_t)code[k];
    }
}

AVX2 static void pack_i16(const float *x, int blocks, int rows, void *codes, float *scale,
                          int32_t *start)
{
    /* Inside each 128-bit half, ACT16_ORDER as byte indices. */
    const __m256i order = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15));
    int16_t *out = codes, code[BLOCK];
    for (int b = 0; b < blocks;
         b++, x += BLOCK, out += BLOCK * rows, scale += rows, start += rows) {
        *scale = quantise_block(x, A16_MAX, code);
        *start = start_value(code);
        for (int k = 0; k < BLOCK; k += 16) {
            const __m256i natural = _mm256_loadu_si256((const __m256i *)(code + k));
            _mm256_storeu_si256((__m256i *)(out + k), _mm256_shuffle_epi8(natural, order));
        }
    }
}

const struct linear_ops linear_avx2 = { pack_i8, pack_i16, nf4_i8, nf4_i16, q8_i8, q8_i16 };

#endif
