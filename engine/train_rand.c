/* train_rand.c - Philox, and what is drawn with it. */
#include "engine/train_rand.h"

#include <assert.h>
#include <math.h>
#include <string.h>

void train_rand_u32x4(uint64_t seed, uint64_t stream, uint64_t counter, uint32_t ret[4])
{
    uint32_t c0 = (uint32_t)counter, c1 = (uint32_t)(counter >> 32);
    uint32_t c2 = (uint32_t)stream, c3 = (uint32_t)(stream >> 32);
    uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
    for (int round = 0; round < 10; round++) {
        const uint64_t p0 = (uint64_t)0xD2511F53 * c0, p1 = (uint64_t)0xCD9E8D57 * c2;
        c0 = (uint32_t)(p1 >> 32) ^ c1 ^ k0;
        c1 = (uint32_t)p1;
        c2 = (uint32_t)(p0 >> 32) ^ c3 ^ k1;
        c3 = (uint32_t)p0;
        k0 += 0x9E3779B9; /* golden ratio */
        k1 += 0xBB67AE85; /* sqrt(3) - 1 */
    }
    ret[0] = c0;
    ret[1] = c1;
    ret[2] = c2;
    ret[3] = c3;
}

/* Strictly between 0 and 1, exact. */
static double unit(uint32_t word) { return ((double)word + 0.5) * 0x1p-32; }

void train_rand_uniform(uint64_t seed, uint64_t stream, float lo, float hi, float *ret, size_t n)
{
    const double width = (double)hi - (double)lo;
    uint32_t w[4];
    for (size_t i = 0; i < n; i++) {
        if (i % 4 == 0)
            train_rand_u32x4(seed, stream, i / 4, w);
        ret[i] = (float)((double)lo + width * unit(w[i % 4]));
    }
}

/* ln x for 0 < x < 1, x >= 2^-33: x = 2^e m with m in [1/sqrt2, sqrt2), and ln m = 2 atanh(t),
 * t = (m - 1) / (m + 1), |t| < 0.172: t^2k / (2k + 1) up to k = 10 leaves 1e-17. */
static double ln(double x)
{
    uint64_t bits;
    memcpy(&bits, &x, 8);
    int e = (int)(bits >> 52) - 1022;
    bits = (bits & (((uint64_t)1 << 52) - 1)) | (uint64_t)1022 << 52;
    double m;
    memcpy(&m, &bits, 8); /* [1/2, 1) */
    if (m < 0.70710678118654752) {
        m *= 2;
        e--;
    }
    const double t = (m - 1) / (m + 1), t2 = t * t;
    double sum = 0;
    for (int k = 10; k >= 0; k--)
        sum = sum * t2 + 1.0 / (2 * k + 1);
    return e * 0.69314718055994531 + 2 * t * sum;
}

/* Wichura 1988.  Its third region (closer to 0 or 1 than e^-25) is never met: u >= 2^-33. */
static double normal_quantile(double u)
{
    const double q = u - 0.5;
    if (fabs(q) <= 0.425) {
        const double r = 0.180625 - q * q;
        return q * (((59.109374720 * r + 159.29113202) * r + 50.434271938) * r + 3.3871327179) /
               (((67.187563600 * r + 78.757757664) * r + 17.895169469) * r + 1.0);
    }
    const double r = sqrt(-ln(q < 0 ? u : 1.0 - u)) - 1.6;
    const double z = (((0.17023821103 * r + 1.3067284816) * r + 2.7568153900) * r + 1.4234372777) /
                     ((0.12021132975 * r + 0.73700164250) * r + 1.0);
    return q < 0 ? -z : z;
}

void train_rand_normal(uint64_t seed, uint64_t stream, float sd, float *ret, size_t n)
{
    uint32_t w[4];
    for (size_t i = 0; i < n; i++) {
        if (i % 4 == 0)
            train_rand_u32x4(seed, stream, i / 4, w);
        ret[i] = (float)((double)sd * normal_quantile(unit(w[i % 4])));
    }
}

void train_rand_permutation(uint64_t seed, uint64_t stream, uint32_t *ret, size_t n)
{
    assert(n <= UINT32_MAX);
    for (size_t i = 0; i < n; i++)
        ret[i] = (uint32_t)i;
    uint64_t counter = 0;
    uint32_t w[4];
    int left = 0;
    for (size_t i = n; i > 1; i--) {
        /* One of 0..i-1: the high half of word * i, where the few words that would make some
         * results more probable (low half below 2^32 mod i) are drawn again (Lemire 2019). */
        const uint32_t bound = (uint32_t)i, unfair = (0u - bound) % bound;
        uint64_t product;
        do {
            if (left == 0) {
                train_rand_u32x4(seed, stream, counter++, w);
                left = 4;
            }
            product = (uint64_t)w[--left] * bound;
        } while ((uint32_t)product < unfair);
        const uint32_t j = (uint32_t)(product >> 32), other = ret[j];
        ret[j] = ret[i - 1];
        ret[i - 1] = other;
    }
}

/* --- dropout --------------------------------------------------------------------------------- */
struct drop {
    uint64_t seed, stream;
    uint64_t least; /* words below it are dropped */
    float scale;
};

static struct drop drop_of(uint64_t seed, uint64_t stream, double p)
{
    assert(p >= 0 && p < 1);
    return (struct drop){ seed, stream, (uint64_t)(p * 0x1p32), (float)(1.0 / (1.0 - p)) };
}

/* What elements first .. first+n-1, 1 <= n <= DROP_RUN, are multiplied with. */
enum { DROP_RUN = 256 };
static void factors(const struct drop *d, uint64_t first, int n, float *ret)
{
    uint32_t w[4];
    train_rand_u32x4(d->seed, d->stream, first / 4, w);
    for (int i = 0; i < n; i++) {
        const uint64_t e = first + (uint64_t)i;
        if (i > 0 && e % 4 == 0)
            train_rand_u32x4(d->seed, d->stream, e / 4, w);
        ret[i] = w[e % 4] >= d->least ? d->scale : 0.0f;
    }
}

void train_dropout(uint64_t seed, uint64_t stream, double p, int64_t row0, const float *x, int rows,
                   int cols, int ldx, float *y, int ldy)
{
    const struct drop d = drop_of(seed, stream, p);
    float f[DROP_RUN];
    for (int r = 0; r < rows; r++) {
        const uint64_t row = (uint64_t)(row0 + r) * (uint64_t)cols;
        const float *from = x + (size_t)r * (size_t)ldx;
        float *to = y + (size_t)r * (size_t)ldy;
        for (int k = 0; k < cols; k += DROP_RUN) {
            const int n = cols - k < DROP_RUN ? cols - k : DROP_RUN;
            factors(&d, row + (uint64_t)k, n, f);
            for (int i = 0; i < n; i++)
                to[k + i] = from[k + i] * f[i];
        }
    }
}

void train_dropout_back(uint64_t seed, uint64_t stream, double p, int64_t row0, const float *dy,
                        int rows, int cols, int lddy, float *dx, int lddx)
{
    const struct drop d = drop_of(seed, stream, p);
    float f[DROP_RUN];
    for (int r = 0; r < rows; r++) {
        const uint64_t row = (uint64_t)(row0 + r) * (uint64_t)cols;
        const float *from = dy + (size_t)r * (size_t)lddy;
        float *to = dx + (size_t)r * (size_t)lddx;
        for (int k = 0; k < cols; k += DROP_RUN) {
            const int n = cols - k < DROP_RUN ? cols - k : DROP_RUN;
            factors(&d, row + (uint64_t)k, n, f);
            for (int i = 0; i < n; i++)
                to[k + i] += from[k + i] * f[i];
        }
    }
}
