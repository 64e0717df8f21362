/* linear_dx_scalar.c - the backward kernels in portable C, fp32. */
#include "engine/linear_dx_int.h"
#include "engine/linear_int.h"
#include "engine/nf4.h"
#include "engine/num.h"

#include <string.h>

static void pack(const float *dy, size_t n, uint32_t *ret)
{
    memset(ret, 0, DX_STEPS * sizeof *ret);
    memcpy(ret, dy, n * sizeof *dy);
}

static void widen(const uint16_t *f16, float *ret)
{
    for (int r = 0; r < PANEL; r++)
        ret[r] = f16_to_f32(f16[r]);
}

static void nf4(const uint8_t *codes, const float scale[16], uint32_t *tile)
{
    for (size_t r = 0; r < PANEL; r++)
        for (size_t k = 0; k < BLOCK; k++) {
            const int byte = codes[k / 8 * 64 + 4 * r + k % 4];
            const int code = k % 8 < 4 ? byte & 15 : byte >> 4;
            tile[r * DX_COLUMNS + k] = f32_bits(nf4_code[code] * scale[r]);
        }
}

static void q8(const uint8_t *codes, const float scale[16], uint32_t *tile)
{
    for (size_t r = 0; r < PANEL; r++)
        for (size_t k = 0; k < BLOCK; k++) {
            const int code = codes[k / 4 * 64 + 4 * r + k % 4] - 128;
            tile[r * DX_COLUMNS + k] = f32_bits((float)code * scale[r]);
        }
}

static void multiply(const uint32_t *tile, int steps, const uint32_t *dy, int rows, float *sum)
{
    for (int m = 0; m < rows; m++, dy += DX_STEPS, sum += DX_COLUMNS) {
        float s[DX_COLUMNS] = { 0.0f };
        for (int n = 0; n < steps; n++) {
            const float d = bits_f32(dy[n]);
            const uint32_t *w = tile + (ptrdiff_t)n * DX_COLUMNS;
            for (int k = 0; k < DX_COLUMNS; k++)
                s[k] += d * bits_f32(w[k]);
        }
        for (int k = 0; k < DX_COLUMNS; k++)
            sum[k] += s[k];
    }
}

const struct dx_ops dx_scalar = { false, pack, widen, nf4, q8, multiply };
