/* linear_dx_avx2.c - the backward kernels with AVX2 and FMA, fp32.
 *
 * Six rows of dy by 16 columns make 12 accumulators; a tile is gone through in four strips of 16
 * columns. */
#include "engine/linear_dx_int.h"
#include "engine/linear_int.h"
#include "engine/nf4.h"
#include "engine/simd_int.h"

#if defined(__x86_64__)
#include <string.h>

enum { ROWS = 6, STRIP = 16 };

static void pack(const float *dy, size_t n, uint32_t *ret)
{
    memset(ret, 0, DX_STEPS * sizeof *ret);
    memcpy(ret, dy, n * sizeof *dy);
}

AVX2 static void widen(const uint16_t *f16, float *ret)
{
    for (int r = 0; r < PANEL; r += 8)
        _mm256_storeu_ps(ret + r, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(f16 + r))));
}

/* fp32 in the dwords of a tile */
INLINE AVX2 __m256 load(const uint32_t *tile)
{
    return _mm256_castsi256_ps(_mm256_load_si256((const __m256i *)tile));
}

INLINE AVX2 void store(uint32_t *tile, __m256 v)
{
    _mm256_store_si256((__m256i *)tile, _mm256_castps_si256(v));
}

/* A row's four bytes of a group are 8 columns: low nibbles first, then high ones.  The table of 16
 * values is two registers, chosen by the nibble's highest bit. */
AVX2 static void nf4(const uint8_t *codes, const float scale[16], uint32_t *tile)
{
    const __m256 low = _mm256_loadu_ps(nf4_code), high = _mm256_loadu_ps(nf4_code + 8);
    const __m256i shifts = _mm256_setr_epi32(0, 8, 16, 24, 4, 12, 20, 28);
    for (int r = 0; r < PANEL; r++) {
        const __m256 s = _mm256_set1_ps(scale[r]);
        const __m256 below = _mm256_mul_ps(low, s), above = _mm256_mul_ps(high, s);
        for (int g = 0; g < 8; g++) {
            int32_t dword;
            memcpy(&dword, codes + 64 * g + 4 * r, 4);
            const __m256i x = _mm256_srlv_epi32(_mm256_set1_epi32(dword), shifts);
            const __m256 top = _mm256_castsi256_ps(_mm256_slli_epi32(x, 28));
            const __m256 value = _mm256_blendv_ps(_mm256_permutevar8x32_ps(below, x),
                                                  _mm256_permutevar8x32_ps(above, x), top);
            store(tile + r * DX_COLUMNS + 8 * g, value);
        }
    }
}

AVX2 static void q8(const uint8_t *codes, const float scale[16], uint32_t *tile)
{
    const __m256i zero = _mm256_set1_epi32(128);
    for (int r = 0; r < PANEL; r++)
        for (int g = 0; g < 8; g++) {
            int32_t dword[2];
            memcpy(&dword[0], codes + 128 * g + 4 * r, 4);
            memcpy(&dword[1], codes + 128 * g + 64 + 4 * r, 4);
            const __m256i byte = _mm256_cvtepu8_epi32(_mm_setr_epi32(dword[0], dword[1], 0, 0));
            const __m256 code = _mm256_cvtepi32_ps(_mm256_sub_epi32(byte, zero));
            store(tile + r * DX_COLUMNS + 8 * g, _mm256_mul_ps(code, _mm256_set1_ps(scale[r])));
        }
}

INLINE AVX2 void rows_by_strip(const uint32_t *tile, int steps, const uint32_t *dy, int rows,
                               float *sum)
{
    __m256 s[ROWS][2];
    UNROLL
    for (int m = 0; m < rows; m++)
        s[m][0] = s[m][1] = _mm256_setzero_ps();
    for (int n = 0; n < steps; n++, tile += DX_COLUMNS, dy++) {
        const __m256 w0 = load(tile);
        const __m256 w1 = load(tile + 8);
        UNROLL
        for (int m = 0; m < rows; m++) {
            const __m256 d = _mm256_castsi256_ps(_mm256_set1_epi32((int)dy[m * DX_STEPS]));
            s[m][0] = _mm256_fmadd_ps(d, w0, s[m][0]);
            s[m][1] = _mm256_fmadd_ps(d, w1, s[m][1]);
        }
    }
    UNROLL
    for (int m = 0; m < rows; m++) {
        float *to = sum + m * DX_COLUMNS;
        _mm256_store_ps(to, _mm256_add_ps(_mm256_load_ps(to), s[m][0]));
        _mm256_store_ps(to + 8, _mm256_add_ps(_mm256_load_ps(to + 8), s[m][1]));
    }
}

AVX2 static void multiply(const uint32_t *tile, int steps, const uint32_t *dy, int rows, float *sum)
{
    for (int m = 0; m < rows; m += ROWS, dy += ROWS * DX_STEPS, sum += ROWS * DX_COLUMNS)
        for (int k = 0; k < DX_COLUMNS; k += STRIP) {
            switch (rows - m) {
            case 1:
                rows_by_strip(tile + k, steps, dy, 1, sum + k);
                break;
            case 2:
                rows_by_strip(tile + k, steps, dy, 2, sum + k);
                break;
            case 3:
                rows_by_strip(tile + k, steps, dy, 3, sum + k);
                break;
            case 4:
                rows_by_strip(tile + k, steps, dy, 4, sum + k);
                break;
            case 5:
                rows_by_strip(tile + k, steps, dy, 5, sum + k);
                break;
            default:
                rows_by_strip(tile + k, steps, dy, ROWS, sum + k);
            }
        }
}

const struct dx_ops dx_avx2 = { false, pack, widen, nf4, q8, multiply };

#endif
