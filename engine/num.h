/* num.h - bf16 and fp16 to and from fp32, round to nearest even, in portable C.
 *
 * These define the conversions; vector code must give the same bits (the CPU's own
 * VCVTPH2PS / VCVTPS2PH with round-to-nearest-even do, for every finite value). */
#ifndef ENGINE_NUM_H
#define ENGINE_NUM_H

#include <stdint.h>
#include <string.h>

enum dtype { DT_F32, DT_F16, DT_BF16, DT_U8, DT_I32, DT_I64, DT_OTHER };

/* Bytes of one element; 0 for DT_OTHER. */
static inline unsigned dtype_size(enum dtype t)
{
    static const unsigned char size[] = { 4, 2, 2, 1, 4, 8, 0 };
    return size[t];
}

static inline float bits_f32(uint32_t u)
{
    float f;
    memcpy(&f, &u, 4);
    return f;
}

static inline uint32_t f32_bits(float f)
{
    uint32_t u;
    memcpy(&u, &f, 4);
    return u;
}

static inline float bf16_to_f32(uint16_t h) { return bits_f32((uint32_t)h << 16); }

static inline uint16_t f32_to_bf16(float f)
{
    uint32_t u = f32_bits(f);
    if ((u & 0x7fffffffu) > 0x7f800000u)
        return (uint16_t)(u >> 16 | 0x40); /* stay a NaN */
    return (uint16_t)((u + 0x7fffu + (u >> 16 & 1)) >> 16);
}

static inline float f16_to_f32(uint16_t h)
{
    uint32_t sign = (uint32_t)(h & 0x8000u) << 16, rest = h & 0x7fffu;
    if (rest >= 0x7c00u) /* infinity or NaN */
        return bits_f32(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
    if (rest >= 0x400u)
        return bits_f32(sign | (rest + 0x1c000u) << 13);
    float sub = (float)rest * 0x1p-24f; /* exact */
    return bits_f32(sign | f32_bits(sub));
}

static inline uint16_t f32_to_f16(float f)
{
    uint32_t u = f32_bits(f), sign = u >> 16 & 0x8000u;
    u &= 0x7fffffffu;
    if (u > 0x7f800000u)
        return (uint16_t)(sign | 0x7e00u);
    if (u >= 0x477ff000u) /* rounds to 65536 or more */
        return (uint16_t)(sign | 0x7c00u);
    if (u < 0x38800000u) { /* subnormal: the addition rounds at bit 2^-24 */
        float sub = bits_f32(u) + 0.5f;
        return (uint16_t)(sign | (f32_bits(sub) - 0x3f000000u));
    }
    return (uint16_t)(sign | ((u + 0xfffu + (u >> 13 & 1)) - 0x38000000u) >> 13);
}

#endif
