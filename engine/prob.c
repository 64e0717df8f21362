/* prob.c - exp, log and sums over a vocabulary.
 *
 * The loops are written with the compiler's vector type of 8 doubles, which every target has (as
 * several narrower registers if need be).  Each lane does IEEE operations that are never
 * contracted, so the function compiled for AVX-512 returns what the plain one returns.
 *
 * exp(x): n = round(x / ln 2), r = x - n ln 2 in two pieces, |r| <= 0.347, Taylor to r^12
 * (remainder below 2e-16), times 2^n through the exponent field.
 * log(x): x = 2^k m with m in [sqrt(1/2), sqrt(2)), z = (m-1)/(m+1), 2 atanh(z) as a series. */
#include "engine/prob.h"

#include <float.h>
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

enum { LANES = 8 };
typedef double vec __attribute__((vector_size(LANES * sizeof(double))));
typedef float fvec __attribute__((vector_size(LANES * sizeof(float))));
typedef int64_t ivec __attribute__((vector_size(LANES * sizeof(int64_t))));

#define INLINE static inline __attribute__((always_inline))

/* Below this exp() is 0 for every purpose here, and 2^n above stays a normal number. */
#define LOWEST (-700.0)

/* In place, because vectors wider than the target's registers have no stable calling convention. */
INLINE void exp_lanes(vec *x)
{
    static const double taylor[] = { 1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880,
                                     1.0 / 40320,     1.0 / 5040,     1.0 / 720,     1.0 / 120,
                                     1.0 / 24,        1.0 / 6,        0.5,           1.0,
                                     1.0 };
    const double round = 0x1.8p52; /* adding it leaves the nearest integer in the low bits */
    const ivec live = *x >= LOWEST;
    vec v = (vec)((ivec)*x & live);
    vec n = v * 0x1.71547652b82fep0 + round;
    ivec k = (ivec)n - (ivec)((vec){ 0 } + round);
    n -= round;
    vec r = (v - n * 0x1.62e42feep-1) - n * 0x1.a39ef35793c76p-33;
    vec p = (vec){ 0 } + taylor[0];
    for (size_t i = 1; i < sizeof taylor / sizeof taylor[0]; i++)
        p = p * r + taylor[i];
    vec two_n = (vec)((k + 1023) << 52);
    *x = (vec)((ivec)(p * two_n) & live);
}

INLINE double sum_lanes(const vec *s)
{
    const vec v = *s;
    return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
}

INLINE double exp_body(const float *logits, int n, float max, double scale, double *w)
{
    vec sum = { 0 };
    int i = 0;
    for (; i + LANES <= n; i += LANES) {
        fvec l;
        memcpy(&l, logits + i, sizeof l);
        vec x = (__builtin_convertvector(l, vec) - (double)max) * scale;
        exp_lanes(&x);
        if (w != NULL)
            memcpy(w + i, &x, sizeof x);
        sum += x;
    }
    if (i < n) {
        vec x = (vec){ 0 } + 2 * LOWEST; /* adds nothing in the lanes that are left over */
        for (int j = 0; i + j < n; j++)
            x[j] = ((double)logits[i + j] - (double)max) * scale;
        exp_lanes(&x);
        for (int j = 0; w != NULL && i + j < n; j++)
            w[i + j] = x[j];
        sum += x;
    }
    return sum_lanes(&sum);
}

double prob_exp_plain(const float *logits, int n, float max, double scale, double *w)
{
    return exp_body(logits, n, max, scale, w);
}

#if defined(__x86_64__)
__attribute__((target("avx512f,avx512dq")))
static double exp_avx512(const float *logits, int n, float max, double scale, double *w)
{
    return exp_body(logits, n, max, scale, w);
}
#endif

double prob_exp(const float *logits, int n, float max, double scale, double *w)
{
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq"))
        return exp_avx512(logits, n, max, scale, w);
#endif
    return prob_exp_plain(logits, n, max, scale, w);
}

double prob_log(double x)
{
    int k;
    double m = frexp(x, &k); /* [0.5, 1) */
    if (m < 0x1.6a09e667f3bcdp-1) {
        m *= 2;
        k--;
    }
    double z = (m - 1) / (m + 1), q = z * z, s = 0;
    for (int i = 23; i >= 1; i -= 2)
        s = s * q + 1.0 / i;
    return k * 0x1.62e42fefa39efp-1 + 2 * z * s;
}

bool prob_max(const float *logits, int n, float *ret)
{
    float m[4] = { -INFINITY, -INFINITY, -INFINITY, -INFINITY };
    bool ok = true;
    for (int i = 0; i < n; i++) {
        float x = logits[i];
        ok &= x <= FLT_MAX; /* false for NaN too */
        m[i % 4] = x > m[i % 4] ? x : m[i % 4];
    }
    float a = m[0] > m[1] ? m[0] : m[1], b = m[2] > m[3] ? m[2] : m[3];
    *ret = a > b ? a : b;
    return ok && *ret > -INFINITY;
}
