/* gguf_blocks.c - the block types of GGUF to fp32.
 *
 * Two kinds: blocks of 32 with one fp16 scale, and blocks of 256 ("K") whose sub-blocks of 16 or 32
 * have small integer scales under one or two fp16 ones.  With d the scale and m the minimum of an
 * element's sub-block, a number is d * code, or d * code - m (+ m in Q4_1 and Q5_1); each product
 * is rounded on its own. */
#include "engine/gguf.h"

#include "engine/num.h"

#include <stddef.h>

static float half(const uint8_t *p) { return f16_to_f32((uint16_t)(p[0] | p[1] << 8)); }

/* --- blocks of 32: low nibbles are elements 0 to 15, high ones 16 to 31 ---------------- */

static int nibble(const uint8_t *q, int i) { return i < 16 ? q[i] & 15 : q[i - 16] >> 4; }

static void q4_0(const uint8_t *b, float *ret)
{
    const float d = half(b);
    for (int i = 0; i < 32; i++)
        ret[i] = d * (float)(nibble(b + 2, i) - 8);
}

static void q4_1(const uint8_t *b, float *ret)
{
    const float d = half(b), m = half(b + 2);
    for (int i = 0; i < 32; i++)
        ret[i] = d * (float)nibble(b + 4, i) + m;
}

/* The fifth bits of all elements are one word in front of the nibbles. */
static int five(const uint8_t *b, int i)
{
    return nibble(b + 4, i) | (b[i / 8] >> i % 8 & 1) << 4;
}

static void q5_0(const uint8_t *b, float *ret)
{
    const float d = half(b);
    for (int i = 0; i < 32; i++)
        ret[i] = d * (float)(five(b + 2, i) - 16);
}

static void q5_1(const uint8_t *b, float *ret)
{
    const float d = half(b), m = half(b + 2);
    for (int i = 0; i < 32; i++)
        ret[i] = d * (float)five(b + 4, i) + m;
}

static void q8_0(const uint8_t *b, float *ret)
{
    const float d = half(b);
    for (int i = 0; i < 32; i++)
        ret[i] = d * (float)(int8_t)b[2 + i];
}

/* Code values of the "non-linear" types. */
static const int8_t nl[16] = { -127, -104, -83, -65, -49, -35, -22, -10,
                               1,    13,   25,  38,  53,  69,  89,  113 };

static void iq4_nl(const uint8_t *b, float *ret)
{
    const float d = half(b);
    for (int i = 0; i < 32; i++)
        ret[i] = d * (float)nl[nibble(b + 2, i)];
}

/* --- blocks of 256 --------------------------------------------------------------------- */

/* Two bits of element i: 32 bytes hold 128 elements, four to a byte, 32 apart. */
static int two(const uint8_t *q, int i) { return q[i / 128 * 32 + i % 32] >> i % 128 / 32 * 2 & 3; }

static void q2_k(const uint8_t *b, float *ret)
{
    const uint8_t *scales = b, *q = b + 16;
    const float d = half(b + 80), dmin = half(b + 82);
    for (int i = 0; i < 256; i++) {
        const int s = scales[i / 16];
        const float m = dmin * (float)(s >> 4), scale = d * (float)(s & 15);
        ret[i] = scale * (float)two(q, i) - m;
    }
}

/* Scales have 6 bits: four in a nibble of the first 8 bytes, two in the last 4. */
static int q3_scale(const uint8_t *s, int j)
{
    return ((j < 8 ? s[j] & 15 : s[j - 8] >> 4) | (s[8 + j % 4] >> j / 4 * 2 & 3) << 4) - 32;
}

static void q3_k(const uint8_t *b, float *ret)
{
    const uint8_t *high = b, *q = b + 32, *scales = b + 96;
    const float d = half(b + 108);
    for (int i = 0; i < 256; i++) {
        const int code = two(q, i) - (high[i % 32] >> i / 32 & 1 ? 0 : 4);
        ret[i] = d * (float)q3_scale(scales, i / 16) * (float)code;
    }
}

/* Scale and minimum of sub-block j of 32, 6 bits each: the first four lie in the low bits of bytes
 * 0 to 3 and 4 to 7; of the others, four bits in bytes 8 to 11 and two on top of those. */
static void k_scale(const uint8_t *s, int j, int *scale, int *min)
{
    if (j < 4) {
        *scale = s[j] & 63;
        *min = s[j + 4] & 63;
    } else {
        *scale = (s[j + 4] & 15) | s[j - 4] >> 6 << 4;
        *min = s[j + 4] >> 4 | s[j] >> 6 << 4;
    }
}

/* 32 bytes hold 64 elements: low nibbles first.  `high`: the fifth bits, or NULL. */
static void k_blocks(float d, float dmin, const uint8_t *scales, const uint8_t *q,
                     const uint8_t *high, float *ret)
{
    for (int i = 0; i < 256; i++) {
        const int byte = q[i / 64 * 32 + i % 32];
        int code = i / 32 % 2 ? byte >> 4 : byte & 15, scale, min;
        if (high != NULL)
            code |= (high[i % 32] >> i / 32 & 1) << 4;
        k_scale(scales, i / 32, &scale, &min);
        const float m = dmin * (float)min, s = d * (float)scale;
        ret[i] = s * (float)code - m;
    }
}

static void q4_k(const uint8_t *b, float *ret)
{
    k_blocks(half(b), half(b + 2), b + 4, b + 16, NULL, ret);
}

static void q5_k(const uint8_t *b, float *ret)
{
    k_blocks(half(b), half(b + 2), b + 4, b + 48, b + 16, ret);
}

/* Low four bits: 64 bytes hold 128 elements, low nibbles first; the others as in two(). */
static void q6_k(const uint8_t *b, float *ret)
{
    const float d = half(b + 208);
    for (int i = 0; i < 256; i++) {
        const int byte = b[i / 128 * 64 + i % 64], low = i % 128 < 64 ? byte & 15 : byte >> 4;
        const int code = (low | two(b + 128, i) << 4) - 32;
        ret[i] = d * (float)(int8_t)b[192 + i / 16] * (float)code;
    }
}

static void iq4_xs(const uint8_t *b, float *ret)
{
    const float d = half(b);
    const int high = b[2] | b[3] << 8;
    for (int j = 0; j < 8; j++) {
        const int low = b[4 + j / 2] >> j % 2 * 4 & 15;
        const float scale = d * (float)((low | (high >> 2 * j & 3) << 4) - 32);
        for (int i = 0; i < 32; i++)
            ret[32 * j + i] = scale * (float)nl[nibble(b + 8 + 16 * j, i)];
    }
}

static const struct ggml_type types[] = {
    { 0, "F32", 1, 4, NULL },          { 1, "F16", 1, 2, NULL },
    { 30, "BF16", 1, 2, NULL },        { 2, "Q4_0", 32, 18, q4_0 },
    { 3, "Q4_1", 32, 20, q4_1 },       { 6, "Q5_0", 32, 22, q5_0 },
    { 7, "Q5_1", 32, 24, q5_1 },       { 8, "Q8_0", 32, 34, q8_0 },
    { 10, "Q2_K", 256, 84, q2_k },     { 11, "Q3_K", 256, 110, q3_k },
    { 12, "Q4_K", 256, 144, q4_k },    { 13, "Q5_K", 256, 176, q5_k },
    { 14, "Q6_K", 256, 210, q6_k },    { 20, "IQ4_NL", 32, 18, iq4_nl },
    { 23, "IQ4_XS", 256, 136, iq4_xs },
};

const struct ggml_type *ggml_type_of(uint32_t id)
{
    for (size_t i = 0; i < sizeof types / sizeof types[0]; i++)
        if (types[i].id == id)
            return &types[i];
    return NULL;
}

const char *ggml_type_list(void)
{
    return "F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K to Q6_K, IQ4_NL and IQ4_XS";
}
