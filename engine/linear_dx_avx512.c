/* linear_dx_avx512.c - the backward kernels with AVX-512: fp32, and bf16 where the CPU has
 * VDPBF16PS.
 *
 * A step of a tile is four vectors of 16 columns; six rows of dy, each broadcast, make 24
 * accumulators.  That leaves registers for one step of the tile, and every load feeds at least four
 * multiply-adds.
 *
 * Unpacking: the nibbles of row r lie in dword r of each 64-byte group, so that one permutation of
 * two neighbouring groups, with a shift per lane, puts 16 columns of one row side by side; they
 * index a table of the 16 code values, already multiplied with the row's scale. */
#include "engine/linear_dx_int.h"
#include "engine/linear_int.h"
#include "engine/nf4.h"
#include "engine/simd_int.h"

#if defined(__x86_64__)
#include <string.h>

#define AVX512_BF16                                                                                \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vnni,avx512bf16")))

enum { ROWS = 6, VECTORS = DX_COLUMNS / 16 };

INLINE AVX512 __mmask16 first_lanes(size_t n)
{
    return n >= 16 ? 0xffff : (__mmask16)((1u << n) - 1);
}

AVX512 static void widen(const uint16_t *f16, float *ret)
{
    _mm512_storeu_ps(ret, _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)f16)));
}

/* --- fp32 -------------------------------------------------------------------------------- */

AVX512 static void pack_f32(const float *dy, size_t n, uint32_t *ret)
{
    for (size_t i = 0; i < DX_STEPS; i += 16) {
        const __mmask16 lanes = first_lanes(n > i ? n - i : 0);
        _mm512_store_ps(ret + i, _mm512_maskz_loadu_ps(lanes, dy + i));
    }
}

/* Columns 8g..8g+7 from the low lanes' dword, 8g+8.. from the high ones'. */
INLINE AVX512 __m512i nibble_shifts(void)
{
    return _mm512_setr_epi32(0, 8, 16, 24, 4, 12, 20, 28, 0, 8, 16, 24, 4, 12, 20, 28);
}

AVX512 static void nf4_f32(const uint8_t *codes, const float scale[16], uint32_t *tile)
{
    const __m512 values = _mm512_loadu_ps(nf4_code);
    const __m512i shifts = nibble_shifts();
    __m512i group[8];
    UNROLL
    for (int g = 0; g < 8; g++)
        group[g] = _mm512_load_si512(codes + 64 * g);
    for (int r = 0; r < PANEL; r++) {
        const __m512 table = _mm512_mul_ps(values, _mm512_set1_ps(scale[r]));
        const __m512i row = _mm512_mask_set1_epi32(_mm512_set1_epi32(r), 0xff00, 16 + r);
        UNROLL
        for (int v = 0; v < VECTORS; v++) {
            const __m512i dwords = _mm512_permutex2var_epi32(group[2 * v], row, group[2 * v + 1]);
            const __m512i nibbles = _mm512_srlv_epi32(dwords, shifts);
            _mm512_store_ps(tile + r * DX_COLUMNS + 16 * v, _mm512_permutexvar_ps(nibbles, table));
        }
    }
}

/* 8-bit weights, 16 columns (four groups) of all 16 rows: signed codes, row r in the 128-bit lane
 * r / 4 of vector r % 4. */
INLINE AVX512 void q8_columns(const uint8_t *codes, __m512i ret[4])
{
    const __m512i sign = _mm512_set1_epi8(-128);
    __m512i g[4];
    UNROLL
    for (int i = 0; i < 4; i++)
        g[i] = _mm512_xor_si512(_mm512_load_si512(codes + 64 * i), sign);
    const __m512i low0 = _mm512_unpacklo_epi32(g[0], g[1]),
                  low1 = _mm512_unpacklo_epi32(g[2], g[3]);
    const __m512i top0 = _mm512_unpackhi_epi32(g[0], g[1]),
                  top1 = _mm512_unpackhi_epi32(g[2], g[3]);
    ret[0] = _mm512_unpacklo_epi64(low0, low1);
    ret[1] = _mm512_unpackhi_epi64(low0, low1);
    ret[2] = _mm512_unpacklo_epi64(top0, top1);
    ret[3] = _mm512_unpackhi_epi64(top0, top1);
}

/* The instruction wants its lane as a literal, which clang sees nowhere else. */
INLINE AVX512 __m128i lane(__m512i v, int i)
{
    switch (i) {
    case 0:
        return _mm512_extracti32x4_epi32(v, 0);
    case 1:
        return _mm512_extracti32x4_epi32(v, 1);
    case 2:
        return _mm512_extracti32x4_epi32(v, 2);
    default:
        return _mm512_extracti32x4_epi32(v, 3);
    }
}

/* Row r, a literal, of what q8_columns() returned. */
INLINE AVX512 __m512 q8_values(const __m512i columns[4], int r, float scale)
{
    const __m128i bytes = lane(columns[r % 4], r / 4);
    return _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes)), _mm512_set1_ps(scale));
}

AVX512 static void q8_f32(const uint8_t *codes, const float scale[16], uint32_t *tile)
{
    for (int v = 0; v < VECTORS; v++) {
        __m512i columns[4];
        q8_columns(codes + (ptrdiff_t)v * 256, columns);
        UNROLL
        for (int r = 0; r < PANEL; r++)
            _mm512_store_ps(tile + r * DX_COLUMNS + 16 * v, q8_values(columns, r, scale[r]));
    }
}

INLINE AVX512 void rows_f32(const uint32_t *tile, int steps, const uint32_t *dy, int rows,
                            float *sum)
{
    __m512 s[ROWS * VECTORS];
    UNROLL
    for (int i = 0; i < rows * VECTORS; i++)
        s[i] = _mm512_setzero_ps();
    for (int n = 0; n < steps; n++, tile += DX_COLUMNS, dy++) {
        __m512 w[VECTORS];
        UNROLL
        for (int v = 0; v < VECTORS; v++)
            w[v] = _mm512_load_ps(tile + 16 * v);
        UNROLL
        for (int m = 0; m < rows; m++) {
            const __m512 d = _mm512_castsi512_ps(_mm512_set1_epi32((int)dy[m * DX_STEPS]));
            UNROLL
            for (int v = 0; v < VECTORS; v++)
                s[m * VECTORS + v] = _mm512_fmadd_ps(d, w[v], s[m * VECTORS + v]);
        }
    }
    UNROLL
    for (int i = 0; i < rows * VECTORS; i++)
        _mm512_store_ps(sum + 16 * i, _mm512_add_ps(_mm512_load_ps(sum + 16 * i), s[i]));
}

/* All rows in groups of six; what is left in one group. */
#define BY_GROUPS(group)                                                                           \
    do {                                                                                           \
        for (; rows >= ROWS; rows -= ROWS, dy += ROWS * DX_STEPS, sum += ROWS * DX_COLUMNS)        \
            group(tile, steps, dy, ROWS, sum);                                                     \
        if (rows == 5)                                                                             \
            group(tile, steps, dy, 5, sum);                                                        \
        else if (rows == 4)                                                                        \
            group(tile, steps, dy, 4, sum);                                                        \
        else if (rows == 3)                                                                        \
            group(tile, steps, dy, 3, sum);                                                        \
        else if (rows == 2)                                                                        \
            group(tile, steps, dy, 2, sum);                                                        \
        else if (rows == 1)                                                                        \
            group(tile, steps, dy, 1, sum);                                                        \
    } while (0)

AVX512 static void multiply_f32(const uint32_t *tile, int steps, const uint32_t *dy, int rows,
                                float *sum)
{
    BY_GROUPS(rows_f32);
}

const struct dx_ops dx_avx512 = { false, pack_f32, widen, nf4_f32, q8_f32, multiply_f32 };

/* --- bf16 -------------------------------------------------------------------------------- */

AVX512_BF16 static void pack_bf16(const float *dy, size_t n, uint32_t *ret)
{
    for (size_t i = 0; i < 2 * DX_STEPS; i += 32) {
        const __m512 low = _mm512_maskz_loadu_ps(first_lanes(n > i ? n - i : 0), dy + i);
        const __m512 high =
            _mm512_maskz_loadu_ps(first_lanes(n > i + 16 ? n - i - 16 : 0), dy + i + 16);
        _mm512_store_si512(ret + i / 2, (__m512i)_mm512_cvtne2ps_pbh(high, low));
    }
}

/* Two rows at once: in each dword the low word is of the even row, the high word of the odd one.
 * Word w of a row's four bytes holds columns 2w, 2w+1 and, in the high nibbles, 2w+4, 2w+5. */
AVX512_BF16 static void nf4_bf16(const uint8_t *codes, const float scale[16], uint32_t *tile)
{
    const __m512 values = _mm512_loadu_ps(nf4_code);
    /* Shifts by 0 or 8 for even and odd columns, 4 more for columns 4..7. */
    const __m512i shift = _mm512_setr_epi32(0, 0x00080008, 0, 0x00080008, 0x00040004, 0x000c000c,
                                            0x00040004, 0x000c000c, 0, 0x00080008, 0, 0x00080008,
                                            0x00040004, 0x000c000c, 0x00040004, 0x000c000c);
    /* Words of rows 0 and 1 of two groups; the second group's words are 32 and up. */
    const __m512i words =
        _mm512_setr_epi32(0x00020000, 0x00020000, 0x00030001, 0x00030001, 0x00020000, 0x00020000,
                          0x00030001, 0x00030001, 0x00220020, 0x00220020, 0x00230021, 0x00230021,
                          0x00220020, 0x00220020, 0x00230021, 0x00230021);
    const __m512i nibble = _mm512_set1_epi32(0x000f000f), odd = _mm512_set1_epi32(0x00100000);
    __m512i group[8];
    UNROLL
    for (int g = 0; g < 8; g++)
        group[g] = _mm512_load_si512(codes + 64 * g);
    for (int r = 0; r < PANEL; r += 2) {
        const __m512i table =
            (__m512i)_mm512_cvtne2ps_pbh(_mm512_mul_ps(values, _mm512_set1_ps(scale[r + 1])),
                                         _mm512_mul_ps(values, _mm512_set1_ps(scale[r])));
        const __m512i pair = _mm512_add_epi16(words, _mm512_set1_epi16((short)(2 * r)));
        UNROLL
        for (int v = 0; v < VECTORS; v++) {
            const __m512i x = _mm512_srlv_epi16(
                _mm512_permutex2var_epi16(group[2 * v], pair, group[2 * v + 1]), shift);
            /* (x & nibble) | odd */
            const __m512i index = _mm512_ternarylogic_epi32(x, nibble, odd, 0xea);
            _mm512_store_si512(tile + r / 2 * DX_COLUMNS + 16 * v,
                               _mm512_permutexvar_epi16(index, table));
        }
    }
}

AVX512_BF16 static void q8_bf16(const uint8_t *codes, const float scale[16], uint32_t *tile)
{
    const __m512i interleave =
        _mm512_setr_epi32(0x00100000, 0x00110001, 0x00120002, 0x00130003, 0x00140004, 0x00150005,
                          0x00160006, 0x00170007, 0x00180008, 0x00190009, 0x001a000a, 0x001b000b,
                          0x001c000c, 0x001d000d, 0x001e000e, 0x001f000f);
    for (int v = 0; v < VECTORS; v++) {
        __m512i columns[4];
        q8_columns(codes + (ptrdiff_t)v * 256, columns);
        UNROLL
        for (int r = 0; r < PANEL; r += 2) {
            const __m512 even = q8_values(columns, r, scale[r]);
            const __m512 odd = q8_values(columns, r + 1, scale[r + 1]);
            const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(odd, even);
            _mm512_store_si512(tile + r / 2 * DX_COLUMNS + 16 * v,
                               _mm512_permutexvar_epi16(interleave, both));
        }
    }
}

INLINE AVX512_BF16 void rows_bf16(const uint32_t *tile, int steps, const uint32_t *dy, int rows,
                                  float *sum)
{
    __m512 s[ROWS * VECTORS];
    UNROLL
    for (int i = 0; i < rows * VECTORS; i++)
        s[i] = _mm512_setzero_ps();
    for (int n = 0; n < steps; n++, tile += DX_COLUMNS, dy++) {
        __m512bh w[VECTORS];
        UNROLL
        for (int v = 0; v < VECTORS; v++)
            w[v] = (__m512bh)_mm512_load_si512(tile + 16 * v);
        UNROLL
        for (int m = 0; m < rows; m++) {
            const __m512bh d = (__m512bh)_mm512_set1_epi32((int)dy[m * DX_STEPS]);
            UNROLL
            for (int v = 0; v < VECTORS; v++)
                s[m * VECTORS + v] = _mm512_dpbf16_ps(s[m * VECTORS + v], d, w[v]);
        }
    }
    UNROLL
    for (int i = 0; i < rows * VECTORS; i++)
        _mm512_store_ps(sum + 16 * i, _mm512_add_ps(_mm512_load_ps(sum + 16 * i), s[i]));
}

AVX512_BF16 static void multiply_bf16(const uint32_t *tile, int steps, const uint32_t *dy, int rows,
                                      float *sum)
{
    BY_GROUPS(rows_bf16);
}

const struct dx_ops dx_avx512_bf16 = { true, pack_bf16, widen, nf4_bf16, q8_bf16, multiply_bf16 };

#endif
