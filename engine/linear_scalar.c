/* linear_scalar.c - the definition of the quantised products, written to be read.
 *
 * Every vector kernel returns these bits (but a NaN is a NaN: its sign and payload may differ).
 * Per output and block of 64 inputs, blocks ascending:
 *     isum = sum of weight code * activation code          (integers: exact in any order)
 *     f    = fmaf((float)isum * activation scale, weight scale, f)
 * starting from f = 0; at the end y = fmaf(f, unit, bias or 0).  Conversions and products round to
 * nearest even; the weight scale is fp16, widened.
 *
 * Activations, per row and block, with m = the largest magnitude and C = 127 (fast) or 4095
 * (exact):
 *     m < 2^-100           codes 0, scale 0
 *     m infinite or NaN    codes 0, scale NaN: the row's outputs become NaN, other rows do not
 *     else                 code = round(x * (C / m)) to nearest even, scale = m * (1 / C)
 *
 * Weights: NF4 code values times 127 (fast) or 8191 (exact), rounded; 8-bit weights are what they
 * are.  The largest block sum, 64 * 8191 * 4095, just fits 31 bits. */
#include "engine/linear_int.h"
#include "engine/num.h"

#include <math.h>
#include <string.h>

const int8_t nf4_w8[16] = {
    -127, -88, -67, -50, -36, -23, -12, 0, 10, 20, 31, 43, 56, 71, 92, 127
};
const int16_t nf4_w16[16] = { -8191, -5703, -4301, -3235, -2330, -1513, -746, 0,
                              652,   1318,  2016,  2768,  3610,  4608,  5922, 8191 };

/* --- activations ------------------------------------------------------------------------- */

/* Scale of a block, and codes in order of k. */
static float quantise_block(const float *x, int most, int16_t code[BLOCK])
{
    uint32_t largest = 0;
    for (int k = 0; k < BLOCK; k++) {
        const uint32_t magnitude = f32_bits(x[k]) & 0x7fffffffu;
        largest = magnitude > largest ? magnitude : largest;
    }
    memset(code, 0, BLOCK * sizeof *code);
    if (largest < ACT_LEAST_BITS)
        return 0.0f;
    if (largest >= ACT_INF_BITS)
        return bits_f32(0x7fc00000);
    const float m = bits_f32(largest), inverse = (float)most / m;
    for (int k = 0; k < BLOCK; k++)
        code[k] = (int16_t)lrintf(x[k] * inverse);
    return m * (1.0f / (float)most);
}

static int32_t start_value(const int16_t *code)
{
    int32_t sum = 0;
    for (int k = 0; k < BLOCK; k++)
        sum += code[k];
    return -128 * sum;
}

static void pack_i8(const float *x, int blocks, int rows, void *codes, float *scale, int32_t *start)
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

static void pack_i16(const float *x, int blocks, int rows, void *codes, float *scale,
                     int32_t *start)
{
    int16_t *out = codes;
    for (int b = 0; b < blocks;
         b++, x += BLOCK, out += BLOCK * rows, scale += rows, start += rows) {
        *scale = quantise_block(x, A16_MAX, out);
        *start = start_value(out);
    }
}

/* --- products ---------------------------------------------------------------------------- */

/* Codes of one row (lane) of one block of a panel, in order of k. */
typedef void (*decode_fn)(const uint8_t *block, int lane, int16_t ret[BLOCK]);

static int nf4_nibble(const uint8_t *block, int lane, int k)
{
    const int byte = block[k / 8 * 64 + 4 * lane + k % 4];
    return k % 8 < 4 ? byte & 15 : byte >> 4;
}

static void decode_nf4_8(const uint8_t *block, int lane, int16_t ret[BLOCK])
{
    for (int k = 0; k < BLOCK; k++)
        ret[k] = (int16_t)nf4_w8[nf4_nibble(block, lane, k)];
}

static void decode_nf4_16(const uint8_t *block, int lane, int16_t ret[BLOCK])
{
    for (int k = 0; k < BLOCK; k++)
        ret[k] = nf4_w16[nf4_nibble(block, lane, k)];
}

static int q8_code(const uint8_t *block, int lane, int k)
{
    return block[k / 4 * 64 + 4 * lane + k % 4] - 128;
}

static void decode_q8(const uint8_t *block, int lane, int16_t ret[BLOCK])
{
    for (int k = 0; k < BLOCK; k++)
        ret[k] = (int16_t)q8_code(block, lane, k);
}

static int32_t dot_i8(const int16_t *w, const int8_t *a)
{
    int32_t sum = 0;
    for (int k = 0; k < BLOCK; k++)
        sum += w[k] * a[k];
    return sum;
}

static int32_t dot_i16(const int16_t *w, const int16_t *a)
{
    int32_t sum = 0;
    for (int k = 0; k < BLOCK; k++)
        sum += w[k] * a[k];
    return sum;
}

/* One output lane, all rows of the tile.  block_bytes: of a panel. */
static void one_output(const struct panel_job *j, int output, decode_fn decode, size_t block_bytes,
                       int act_size)
{
    const int lane = output % PANEL;
    const size_t panel = (size_t)(output / PANEL) * (size_t)j->blocks;
    float f[TILE] = { 0.0f };
    for (int b = 0; b < j->blocks; b++) {
        int16_t w[BLOCK];
        decode(j->codes + (panel + (size_t)b) * block_bytes, lane, w);
        const float scale = f16_to_f32(j->scales[(panel + (size_t)b) * PANEL + (size_t)lane]);
        for (int m = 0; m < j->rows; m++) {
            const size_t at = (size_t)b * (size_t)j->rows + (size_t)m;
            const int32_t isum = act_size == 1 ? dot_i8(w, (const int8_t *)j->act + at * BLOCK)
                                               : dot_i16(w, (const int16_t *)j->act + at * BLOCK);
            f[m] = fmaf((float)isum * j->act_scale[at], scale, f[m]);
        }
    }
    const float bias = j->bias != NULL ? j->bias[output] : 0.0f;
    for (int m = 0; m < j->rows; m++)
        j->y[(size_t)m * j->ldy + (size_t)output] = fmaf(f[m], j->unit, bias);
}

static void panels(const struct panel_job *j, decode_fn decode, size_t block_bytes, int act_size)
{
    for (int o = 0; o < j->outputs; o++)
        one_output(j, o, decode, block_bytes, act_size);
}

static void nf4_i8(const struct panel_job *j) { panels(j, decode_nf4_8, 512, 1); }
static void nf4_i16(const struct panel_job *j) { panels(j, decode_nf4_16, 512, 2); }
static void q8_i8(const struct panel_job *j) { panels(j, decode_q8, 1024, 1); }
static void q8_i16(const struct panel_job *j) { panels(j, decode_q8, 1024, 2); }

const struct linear_ops linear_scalar = { pack_i8, pack_i16, nf4_i8, nf4_i16, q8_i8, q8_i16 };
