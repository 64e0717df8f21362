/* kernels_avx2.c - the quantised products for CPUs without AVX-512; linear_scalar.c defines every
 * bit of what they return.
 *
 * As in kernels_avx512.c a panel's rows are the lanes and activations are broadcast, but a panel is
 * two halves of eight rows.  A block's operands are 64 vectors:
 *     fast    per 4 inputs and half: the weights as bytes, four per row, and their magnitudes.
 *             VPMADDUBSW adds two products of unsigned and signed bytes into 16 bits and saturates
 *             there, so bytes are multiplied as |weight| by (activation with the weight's sign): at
 *             most 2 * 127 * 127, which fits.
 *     exact   per 4 inputs and half: the weights as 16-bit numbers, four per row, rows 0, 1, 4, 5
 *             of the half in one vector and 2, 3, 6, 7 in the other, as unpacking bytes leaves
 *             them.  Two lanes of a sum belong to a row; VPHADDD joins them at the block's end.
 *             So activations lie in order of k here, not in ACT16_ORDER.
 *
 * Both forms multiply 32 codes in four instructions, of which Zen 3 does no more than 160 GOP/s per
 * core when they do nothing else.  Making an operand takes two to five instructions.  Up to four
 * rows of activations make each operand where they need it; more rows make those of a block once,
 * 4 KiB that stay in L1, and all rows of the tile meet them, four at a time.  One thread, one tile
 * of 16 rows, weights in L2, best of repeats, GOP/s: fast 128, exact 128 (made for every four rows
 * 112 and 64; clang 14: 113 and 124). */
#include "engine/linear_int.h"
#include "engine/simd_int.h"

#if defined(__x86_64__)
#include <stdbool.h>
#include <string.h>

enum kind { NF4_I8, NF4_I16, Q8_I8, Q8_I16 };

INLINE size_t block_bytes(enum kind k) { return k == NF4_I8 || k == NF4_I16 ? 512 : 1024; }
INLINE int act_bytes(enum kind k) { return k == NF4_I8 || k == Q8_I8 ? 1 : 2; }

/* --- operands ---------------------------------------------------------------------------- */

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

/* What eight rows of a panel and four inputs are multiplied as: see above. */
struct operand {
    __m256i a; /* fast: weights; exact: rows 0, 1, 4, 5 */
    __m256i b; /* fast: magnitudes; exact: rows 2, 3, 6, 7 */
};
enum { OPERANDS = BLOCK / 4 * 2 };

/* The four inputs from 8 * g + 4 * s on, of half h of the panel. */
INLINE AVX2 struct operand make_operand(enum kind k, const uint8_t *block, int g, int s, int h,
                                        struct tables t)
{
    const bool nf4 = k == NF4_I8 || k == NF4_I16;
    const uint8_t *at = block + 64 * (ptrdiff_t)(nf4 ? g : 2 * g + s) + 32 * (ptrdiff_t)h;
    __m256i v = _mm256_load_si256((const __m256i *)at);
    if (nf4) /* low nibbles, then high ones */
        v = _mm256_and_si256(s == 0 ? v : _mm256_srli_epi16(v, 4), _mm256_set1_epi8(0x0f));
    if (act_bytes(k) == 1) {
        const __m256i w =
            nf4 ? _mm256_shuffle_epi8(t.low, v) : _mm256_xor_si256(v, _mm256_set1_epi8(-128));
        return (struct operand){ w, _mm256_abs_epi8(w) };
    }
    /* 8-bit weights stay code + 128: act_start takes that off again. */
    const __m256i low = nf4 ? _mm256_shuffle_epi8(t.low, v) : v;
    const __m256i high = nf4 ? _mm256_shuffle_epi8(t.high, v) : _mm256_setzero_si256();
    return (struct operand){ _mm256_unpacklo_epi8(low, high), _mm256_unpackhi_epi8(low, high) };
}

/* --- a block ----------------------------------------------------------------------------- */

INLINE AVX2 __m256i multiply_add_i8(__m256i sum, struct operand w, const char *act)
{
    int32_t four;
    memcpy(&four, act, sizeof four);
    const __m256i a = _mm256_sign_epi8(_mm256_set1_epi32(four), w.a);
    const __m256i pairs = _mm256_maddubs_epi16(w.b, a);
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

INLINE AVX2 __m256i broadcast_i16(const char *act)
{
    int64_t four;
    memcpy(&four, act, sizeof four);
    return _mm256_set1_epi64x(four);
}

/* f += the block's sum * scales: eight outputs of one row. */
INLINE AVX2 __m256 add_block(__m256 f, __m256i sum, float act_scale, const uint16_t *scales)
{
    const __m256 scale = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)scales));
    const __m256 product = _mm256_mul_ps(_mm256_cvtepi32_ps(sum), _mm256_set1_ps(act_scale));
    return _mm256_fmadd_ps(product, scale, f);
}

/* Where a panel's walk over the blocks is. */
struct walk {
    const uint8_t *w;
    const uint16_t *scales;
    const char *act; /* row 0 of the tile's block */
    const float *act_scale;
    const int32_t *act_start;
};

INLINE AVX2 struct walk walk_begin(enum kind k, const struct panel_job *j, int panel)
{
    const size_t first_block = (size_t)panel * (size_t)j->blocks;
    return (struct walk){ j->codes + first_block * block_bytes(k), j->scales + first_block * PANEL,
                          j->act, j->act_scale, j->act_start };
}

INLINE AVX2 void walk_on(enum kind k, const struct panel_job *j, struct walk *at)
{
    at->w += block_bytes(k);
    at->scales += PANEL;
    at->act += (ptrdiff_t)j->rows * BLOCK * act_bytes(k);
    at->act_scale += j->rows;
    at->act_start += j->rows;
}

/* Rows [row, row + rows) of the tile by a block, whose operands are in `made` or, where that is
 * NULL, made here.  f: [row of the tile][half]. */
INLINE AVX2 void rows_i8(enum kind k, const struct walk *at, const struct operand *made,
                         struct tables t, int row, int rows, __m256 (*f)[2])
{
    const char *act = at->act + (ptrdiff_t)row * BLOCK;
    __m256i sum[8]; /* [row][half] */
    UNROLL
    for (int i = 0; i < 2 * rows; i++)
        sum[i] = _mm256_setzero_si256();
    for (int g = 0; g < BLOCK / 8; g++) {
        UNROLL
        for (int i = 0; i < 4; i++) {
            const int s = 2 * g + i / 2, h = i % 2;
            const struct operand w =
                made != NULL ? made[2 * s + h] : make_operand(k, at->w, g, i / 2, h, t);
            UNROLL
            for (int m = 0; m < rows; m++)
                sum[2 * m + h] = multiply_add_i8(sum[2 * m + h], w,
                                                 act + (ptrdiff_t)m * BLOCK + 4 * (ptrdiff_t)s);
        }
    }
    UNROLL
    for (int i = 0; i < 2 * rows; i++)
        f[row + i / 2][i % 2] = add_block(f[row + i / 2][i % 2], sum[i], at->act_scale[row + i / 2],
                                          at->scales + 8 * (ptrdiff_t)(i % 2));
}

/* The same, but one half of the panel. */
INLINE AVX2 void rows_i16(enum kind k, const struct walk *at, const struct operand *made,
                          struct tables t, int row, int rows, int h, __m256 (*f)[2])
{
    const char *act = at->act + (ptrdiff_t)row * BLOCK * 2;
    __m256i sum[8]; /* [row][operand.a, operand.b] */
    UNROLL
    for (int i = 0; i < 2 * rows; i++)
        sum[i] = _mm256_setzero_si256();
    for (int g = 0; g < BLOCK / 8; g++) {
        UNROLL
        for (int i = 0; i < 2; i++) {
            const int s = 2 * g + i;
            const struct operand w =
                made != NULL ? made[2 * s + h] : make_operand(k, at->w, g, i, h, t);
            UNROLL
            for (int m = 0; m < rows; m++) {
                const __m256i a =
                    broadcast_i16(act + ((ptrdiff_t)m * BLOCK + 4 * (ptrdiff_t)s) * 2);
                sum[2 * m] = _mm256_add_epi32(sum[2 * m], _mm256_madd_epi16(w.a, a));
                sum[2 * m + 1] = _mm256_add_epi32(sum[2 * m + 1], _mm256_madd_epi16(w.b, a));
                IN_PLACE(sum[2 * m]);
                IN_PLACE(sum[2 * m + 1]);
            }
        }
    }
    UNROLL
    for (int m = 0; m < rows; m++) {
        __m256i both = _mm256_hadd_epi32(sum[2 * m], sum[2 * m + 1]);
        if (k == Q8_I16)
            both = _mm256_add_epi32(both, _mm256_set1_epi32(at->act_start[row + m]));
        f[row + m][h] =
            add_block(f[row + m][h], both, at->act_scale[row + m], at->scales + 8 * (ptrdiff_t)h);
    }
}

INLINE AVX2 void block_rows(enum kind k, const struct walk *at, const struct operand *made,
                            struct tables t, int row, int rows, __m256 (*f)[2])
{
    if (act_bytes(k) == 1) {
        rows_i8(k, at, made, t, row, rows, f);
    } else {
        rows_i16(k, at, made, t, row, rows, 0, f);
        rows_i16(k, at, made, t, row, rows, 1, f);
    }
}

/* --- one panel --------------------------------------------------------------------------- */

INLINE AVX2 void store(const struct panel_job *j, int panel, int row, const __m256 f[2])
{
    const int first = panel * PANEL, left = j->outputs - first;
    const size_t n = left < PANEL ? (size_t)left : PANEL;
    float bias[PANEL] = { 0.0f }, y[PANEL];
    if (j->bias != NULL)
        memcpy(bias, j->bias + first, n * sizeof *bias);
    UNROLL
    for (int h = 0; h < 2; h++)
        _mm256_storeu_ps(y + 8 * h, _mm256_fmadd_ps(f[h], _mm256_set1_ps(j->unit),
                                                    _mm256_loadu_ps(bias + 8 * h)));
    memcpy(j->y + (size_t)row * j->ldy + first, y, n * sizeof *y);
}

/* Up to four rows: operands stay in registers. */
INLINE AVX2 void few_rows(enum kind k, const struct panel_job *j, struct fetcher *fetch, int panel,
                          int rows)
{
    const struct tables t = make_tables(k);
    struct walk at = walk_begin(k, j, panel);
    __m256 f[4][2];
    UNROLL
    for (int m = 0; m < rows; m++)
        f[m][0] = f[m][1] = _mm256_setzero_ps();
    for (int b = 0; b < j->blocks; b++, walk_on(k, j, &at)) {
        fetch_some(fetch);
        block_rows(k, &at, NULL, t, 0, rows, f);
    }
    UNROLL
    for (int m = 0; m < rows; m++)
        store(j, panel, m, f[m]);
}

INLINE AVX2 void many_rows(enum kind k, const struct panel_job *j, struct fetcher *fetch, int panel)
{
    const struct tables t = make_tables(k);
    struct walk at = walk_begin(k, j, panel);
    struct operand made[OPERANDS];
    __m256 f[TILE][2];
    for (int m = 0; m < j->rows; m++)
        f[m][0] = f[m][1] = _mm256_setzero_ps();
    for (int b = 0; b < j->blocks; b++, walk_on(k, j, &at)) {
        for (int g = 0; g < BLOCK / 8; g++) {
            UNROLL
            for (int i = 0; i < 4; i++)
                made[4 * g + i] = make_operand(k, at.w, g, i / 2, i % 2, t);
        }
        int m = 0;
        for (; m + 4 <= j->rows; m += 4) {
            fetch_some(fetch);
            block_rows(k, &at, made, t, m, 4, f);
        }
        if (m < j->rows)
            fetch_some(fetch);
        switch (j->rows - m) {
        case 3:
            block_rows(k, &at, made, t, m, 3, f);
            break;
        case 2:
            block_rows(k, &at, made, t, m, 2, f);
            break;
        case 1:
            block_rows(k, &at, made, t, m, 1, f);
            break;
        default:
            break;
        }
    }
    for (int m = 0; m < j->rows; m++)
        store(j, panel, m, f[m]);
}

INLINE AVX2 void job(enum kind k, const struct panel_job *j)
{
    struct fetcher fetch = j->fetch;
    const int panels = (j->outputs + PANEL - 1) / PANEL;
    fetch_pace(&fetch, j->blocks, panels * ((j->rows + 3) / 4));
    for (int p = 0; p < panels; p++) {
        switch (j->rows) {
        case 1:
            few_rows(k, j, &fetch, p, 1);
            break;
        case 2:
            few_rows(k, j, &fetch, p, 2);
            break;
        case 3:
            few_rows(k, j, &fetch, p, 3);
            break;
        case 4:
            few_rows(k, j, &fetch, p, 4);
            break;
        default:
            many_rows(k, j, &fetch, p);
            break;
        }
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
    int16_t *out = codes;
    for (int b = 0; b < blocks;
         b++, x += BLOCK, out += BLOCK * rows, scale += rows, start += rows) {
        *scale = quantise_block(x, A16_MAX, out);
        *start = start_value(out);
    }
}

const struct linear_ops linear_avx2 = { pack_i8, pack_i16, nf4_i8, nf4_i16, q8_i8, q8_i16 };

#endif
