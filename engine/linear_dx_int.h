/* linear_dx_int.h - between linear_dx.c, which cuts the work, and the kernels of one instruction
 * set each.
 *
 * A tile is a part of W, ready to be multiplied: DX_STEPS steps of 64 columns, 4 bytes each.  A
 * step is one row n of W in fp32, or two rows in bf16, the even one in the low half.  Packed dy
 * has, for each row m, 4 bytes per step: one value in fp32 or two in bf16.  Steps past the last
 * row of W are zero on both sides. */
#ifndef ENGINE_LINEAR_DX_INT_H
#define ENGINE_LINEAR_DX_INT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { DX_STEPS = 64, DX_COLUMNS = 64 };

struct dx_ops {
    bool bf16;
    /* n values of one row of dy to DX_STEPS dwords. */
    void (*pack)(const float *dy, size_t n, uint32_t *ret);
    /* 16 block scales. */
    void (*widen)(const uint16_t *f16, float *ret);
    /* One block of a panel (16 rows, 64 columns) to 16 or 8 steps of a tile.  `scale` is what a
     * weight's value (NF4) or code (8 bit) is multiplied with, per row. */
    void (*nf4)(const uint8_t *codes, const float scale[16], uint32_t *tile);
    void (*q8)(const uint8_t *codes, const float scale[16], uint32_t *tile);
    /* sum[m][0..64) += the sum over `steps` of dy[m][step] tile[step][0..64), itself begun at 0.
     * Rows of dy are DX_STEPS dwords apart, those of sum DX_COLUMNS. */
    void (*multiply)(const uint32_t *tile, int steps, const uint32_t *dy, int rows, float *sum);
};

extern const struct dx_ops dx_scalar;
#if defined(__x86_64__)
extern const struct dx_ops dx_avx2, dx_avx512, dx_avx512_bf16;
#endif

#endif
