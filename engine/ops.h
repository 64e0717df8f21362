/* ops.h - everything a transformer block does beside its linear layers: norms, rope, activations,
 * softmax.
 *
 * One table of functions per instruction set.  The scalar functions (ops.c) are the definition: they
 * sum in the order in which the vector code does (16 lanes, element i in lane i % 16, fused
 * multiply-adds, then the tree of dot_tree()), and they have an exponential of their own, because
 * libm's differs from machine to machine.  ops_avx2.c and ops_avx512.c give the same bits for every
 * finite input.
 *
 * Pure functions over caller memory; any thread.  n need not be a multiple of anything. */
#ifndef ENGINE_OPS_H
#define ENGINE_OPS_H

#include "engine/compute.h"
#include "engine/kv.h"

#include <stdbool.h>
#include <stdint.h>

/* Attention works on tiles of 64 positions (4 pages of the cache), aligned to absolute positions,
 * so that its order of additions depends on nothing but the position. */
enum { OPS_TILE = 64, OPS_TILE_PAGES = OPS_TILE / KV_PAGE, OPS_QUERIES = 4 };

/* Running softmax of one query: the maximum so far, and sums of exp(score - max) by lane. */
struct ops_softmax {
    float max;
    float sum[16];
};

struct ops {
    /* y = x / sqrt(mean(x^2) + eps) * w; y may be x. */
    void (*rmsnorm)(const float *x, const float *w, float eps, int n, float *y);
    /* y = (x - m) / sqrt(mean((x - m)^2) + eps) * w + bias with m = mean(x); y may be x. */
    void (*layernorm)(const float *x, const float *w, const float *bias, float eps, int n,
                      float *y);
    /* Rotate the pairs (i, i + n/2) of n numbers in place; cos and sin are [n/2]. */
    void (*rope)(float *x, const float *cos, const float *sin, int n);
    /* The same with the pairs (2i, 2i + 1). */
    void (*rope_pairs)(float *x, const float *cos, const float *sin, int n);
    /* y = gate / (1 + exp(-gate)) * up; y may be either. */
    void (*silu_mul)(const float *gate, const float *up, int n, float *y);
    /* y = gelu(gate) * up, or gelu(gate) if up is NULL; y may be either. */
    void (*gelu_tanh)(const float *gate, const float *up, int n, float *y);
    void (*gelu_erf)(const float *gate, const float *up, int n, float *y);
    /* y = c tanh(y / c) */
    void (*softcap)(float c, int n, float *y);
    /* y += x */
    void (*add)(const float *x, int n, float *y);
    /* y = exp(x), within 1.5 ulp; y may be x. */
    void (*exp)(const float *x, int n, float *y);
    /* Round to nearest even. */
    void (*to_f16)(const float *x, int n, uint16_t *y);

    /* Blocks of KV_Q8_BLOCK numbers (the last may be short) as x = code * scale: scale = the largest
     * |x| / 127 in fp16, codes rounded to nearest even, in -127..127.  A block with an infinity, a
     * NaN or more than fp16 holds gets a NaN for a scale. */
    void (*to_q8)(const float *x, int n, int8_t *codes, uint16_t *scales);

    /* --- leaves of attention (attn.c); K and V of a page as they lie in the cache (kv.h) ---
     * Scores of `nq` <= OPS_QUERIES queries with the 16 positions of one page; sums over hd in 4
     * accumulators (d % 4), added as (0+1)+(2+3), times scale.  With KV_Q8 that is the sum of each
     * block, and they are added as sum = fma(block, its scale, sum) from 0.  Scores go to
     * s[i][0..15]. */
    void (*scores)(const void *k, enum kv_type type, int hd, float scale, int nq,
                   const float *const *q, float *const *s);
    /* For each of nq <= OPS_QUERIES: s[0..64) are scores of which [a, b) are visible, at least one:
     * they become exp(s - max), the others 0, and enter the sums.  ret_fix is what the values
     * gathered so far must be multiplied with (1 unless the maximum grew). */
    void (*softmax)(int nq, struct ops_softmax *const *m, float *const *s, const int *a,
                    const int *b, float *ret_fix);
    /* out[i][d] = fma(p[i][j], V[j][d], out[i][d]) for j = a .. b-1 in turn; a and b count positions
     * of the tile, whose pages are v[0..3].  With KV_Q8: fma(p[i][j] * scale, code, out[i][d]). */
    void (*values)(const void *const *v, enum kv_type type, int hd, int a, int b, int nq,
                   const float *const *p, float *const *out);
    /* y *= c */
    void (*scale)(float c, int n, float *y);

    /* --- leaves of attention for training (train_attn.c), on a whole row of scores; n >= 1 ---
     * s becomes exp(s - max(s)); returns the sum. */
    float (*softmax_row)(int n, float *s);
    /* p *= c, then d = p * (d - dot). */
    void (*softmax_grad)(float c, float dot, int n, float *p, float *d);
};

const struct ops *ops_for(enum isa isa);
extern const struct ops ops_scalar;
#if defined(__x86_64__)
extern const struct ops ops_avx2, ops_avx512;
#endif

/* exp(x) = 2^n (1 + r + r^2 q(r)), n = round(x / ln 2), r = x - n ln 2 in two steps, q of degree 5
 * interpolated at the Chebyshev nodes (error 0.013 ulp before rounding).  Above 89 the result is
 * infinite, below -104 zero. */
#define OPS_EXP_MIN (-104.0f)
#define OPS_EXP_MAX 89.0f
#define OPS_LOG2E 0x1.715476p+0f
#define OPS_LN2_HI 0x1.62e430p-1f
#define OPS_LN2_LO (-0x1.05c610p-29f)
#define OPS_ROUND 12582912.0f /* adding and taking away 1.5 * 2^23 rounds to an integer */
#define OPS_EXP_Q0 0x1.000000p-1f
#define OPS_EXP_Q1 0x1.555556p-3f
#define OPS_EXP_Q2 0x1.5554e8p-5f
#define OPS_EXP_Q3 0x1.1110e0p-7f
#define OPS_EXP_Q4 0x1.6d43b0p-10f
#define OPS_EXP_Q5 0x1.a1256cp-13f

/* tanh(x) = m / (m + 2) with m = exp(2x) - 1 = 2^n p + (2^n - 1), p = r + r^2 q(r) as above, which
 * loses nothing near 0.  Beyond 10 it is 1 to the last bit. */
#define OPS_TANH_MAX 10.0f

/* gelu(u) with tanh is u / (1 + exp(-2z)), z = sqrt(2 / pi) (u + 0.044715 u^3): these are -2
 * sqrt(2 / pi) and that times 0.044715. */
#define OPS_GELU_A (-0x1.988454p+0f)
#define OPS_GELU_B (-0x1.2444f2p-4f)

/* gelu(u) with erf is u h for u < 0 and u - u h else, where h = exp(-u^2 / 2) P(t) is half of
 * erfc(|u| / sqrt(2)), t = 1 / (1 + |u| / 4), and P of degree 10 interpolates at the Chebyshev nodes
 * of |u| <= 14 (error of h: 4e-9 before rounding). */
#define OPS_ERFC_P                                                                                    {                                                                                                     -0x1.0db5c0p-16f, 0x1.9a00bep-4f, 0x1.89e35ep-4f, 0x1.d186d2p-4f, 0x1.2c1e3ep-7f,                     0x1.d9ef10p-3f, -0x1.b258bep-3f, 0x1.0b65aep-2f, -0x1.a2bfa6p-4f, -0x1.05a604p-8f,                0x1.b78d0ep-8f                                                                            }
enum { OPS_ERFC_DEGREE = 10 };

#endif
