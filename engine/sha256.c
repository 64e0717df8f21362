/* sha256.c - SHA-256 (FIPS 180-4), with the CPU's own instructions where it has them.
 *
 * Every cold adapter is hashed before it is used, and an import hashes the whole model: the
 * portable rounds run at a third of a GB/s, the SHA instructions at two GB/s.  Both give the same
 * bits; sha256_portable() is there for the test that says so. */
#include "engine/util.h"

#include <string.h>
#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#endif

struct inside {
    uint32_t h[8];
    uint64_t len;      /* bytes so far */
    uint8_t block[64]; /* the last len % 64 of them */
};
_Static_assert(sizeof(struct inside) <= sizeof(((struct sha256 *)0)->state),
               "struct sha256 must hold the state");

/* First 32 bits of the fractional parts of the cube roots of the first 64 primes. */
_Alignas(16) static const uint32_t K[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2,
};

static uint32_t ror(uint32_t x, int n) { return x >> n | x << (32 - n); }

static uint32_t big_endian(const uint8_t *p)
{
    return (uint32_t)p[0] << 24 | (uint32_t)p[1] << 16 | (uint32_t)p[2] << 8 | p[3];
}

static void blocks_portable(uint32_t h[8], const uint8_t *p, size_t n)
{
    uint32_t w[64];
    for (; n > 0; n--, p += 64) {
        for (int t = 0; t < 16; t++)
            w[t] = big_endian(p + 4 * t);
        for (int t = 16; t < 64; t++) {
            const uint32_t x = w[t - 15], y = w[t - 2];
            w[t] = w[t - 16] + w[t - 7] + (ror(x, 7) ^ ror(x, 18) ^ x >> 3) +
                   (ror(y, 17) ^ ror(y, 19) ^ y >> 10);
        }
        /* v[(i - t) & 7] is the standard's variable i (a to h) in round t: nothing moves, and eight
         * rounds unrolled leave no index to compute. */
        uint32_t v[8];
        memcpy(v, h, sizeof v);
        for (int t8 = 0; t8 < 64; t8 += 8) {
#pragma GCC unroll 8
            for (int t = 0; t < 8; t++) {
                const uint32_t a = v[-t & 7], b = v[(1 - t) & 7], c = v[(2 - t) & 7];
                const uint32_t e = v[(4 - t) & 7], f = v[(5 - t) & 7], g = v[(6 - t) & 7];
                const uint32_t t1 = v[(7 - t) & 7] + (ror(e, 6) ^ ror(e, 11) ^ ror(e, 25)) +
                                    ((e & f) ^ (~e & g)) + K[t8 + t] + w[t8 + t];
                v[(3 - t) & 7] += t1;
                v[(7 - t) & 7] = t1 + (ror(a, 2) ^ ror(a, 13) ^ ror(a, 22)) +
                                 ((a & b) ^ (a & c) ^ (b & c));
            }
        }
        for (int i = 0; i < 8; i++)
            h[i] += v[i];
    }
}

#if defined(__x86_64__)
/* The instructions keep the state as (a, b, e, f) and (c, d, g, h), highest lane first, and do two
 * rounds at a time; after those the old (a, b, e, f) is the new (c, d, g, h). */
__attribute__((target("sha,sse4.1,ssse3")))
static void blocks_sha(uint32_t h[8], const uint8_t *p, size_t n)
{
    const __m128i swap = _mm_set_epi64x(0x0c0d0e0f08090a0b, 0x0405060700010203);
    __m128i abef = _mm_set_epi32((int)h[0], (int)h[1], (int)h[4], (int)h[5]);
    __m128i cdgh = _mm_set_epi32((int)h[2], (int)h[3], (int)h[6], (int)h[7]);
    for (; n > 0; n--, p += 64) {
        const __m128i abef0 = abef, cdgh0 = cdgh;
        __m128i w[4];
#pragma GCC unroll 16
        for (int g = 0; g < 16; g++) { /* four rounds each */
            __m128i m;
            if (g < 4) {
                m = _mm_shuffle_epi8(_mm_loadu_si128((const __m128i *)(const void *)(p + 16 * g)),
                                     swap);
            } else {
                const __m128i last = w[(g + 3) & 3];
                m = _mm_add_epi32(_mm_sha256msg1_epu32(w[g & 3], w[(g + 1) & 3]),
                                  _mm_alignr_epi8(last, w[(g + 2) & 3], 4));
                m = _mm_sha256msg2_epu32(m, last);
            }
            w[g & 3] = m;
            const __m128i wk =
                _mm_add_epi32(m, _mm_load_si128((const __m128i *)(const void *)(K + 4 * g)));
            cdgh = _mm_sha256rnds2_epu32(cdgh, abef, wk);
            abef = _mm_sha256rnds2_epu32(abef, cdgh, _mm_shuffle_epi32(wk, 0x0e));
        }
        abef = _mm_add_epi32(abef, abef0);
        cdgh = _mm_add_epi32(cdgh, cdgh0);
    }
    uint32_t hi[4], lo[4];
    _mm_storeu_si128((__m128i *)(void *)hi, abef);
    _mm_storeu_si128((__m128i *)(void *)lo, cdgh);
    h[0] = hi[3], h[1] = hi[2], h[4] = hi[1], h[5] = hi[0];
    h[2] = lo[3], h[3] = lo[2], h[6] = lo[1], h[7] = lo[0];
}

/* __builtin_cpu_supports("sha") is too new for gcc 12: CPUID leaf 7, EBX bit 29. */
static bool have_sha(void)
{
    unsigned a, b = 0, c, d;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (b >> 29 & 1) != 0 &&
           __builtin_cpu_supports("sse4.1") && __builtin_cpu_supports("ssse3");
}
#endif

static void blocks(uint32_t h[8], const uint8_t *p, size_t n)
{
#if defined(__x86_64__)
    static int have = -1; /* every thread finds the same answer */
    int now = __atomic_load_n(&have, __ATOMIC_RELAXED);
    if (now < 0) {
        now = have_sha();
        __atomic_store_n(&have, now, __ATOMIC_RELAXED);
    }
    if (now) {
        blocks_sha(h, p, n);
        return;
    }
#endif
    blocks_portable(h, p, n);
}

typedef void (*blocks_fn)(uint32_t h[8], const uint8_t *p, size_t n);

static void begin(struct inside *s)
{
    /* the same of the square roots of the first 8 primes */
    static const uint32_t start[8] = { 0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                       0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19 };
    memcpy(s->h, start, sizeof start);
    s->len = 0;
}

static void add(struct inside *s, const uint8_t *p, size_t len, blocks_fn fn)
{
    size_t have = (size_t)(s->len % 64);
    s->len += len;
    if (have > 0) {
        const size_t take = len < 64 - have ? len : 64 - have;
        memcpy(s->block + have, p, take);
        if (have + take < 64)
            return;
        fn(s->h, s->block, 1);
        p += take;
        len -= take;
    }
    fn(s->h, p, len / 64);
    memcpy(s->block, p + len / 64 * 64, len % 64);
}

/* A one bit, zeros up to 8 bytes before the end of a block, the length in bits. */
static void end(struct inside *s, uint8_t ret[32], blocks_fn fn)
{
    const uint64_t bits = s->len * 8;
    uint8_t pad[72] = { 0x80 };
    const size_t zeros = (119 - (size_t)(s->len % 64)) % 64 + 1; /* with the 0x80 */
    for (int i = 0; i < 8; i++)
        pad[zeros + (size_t)i] = (uint8_t)(bits >> (56 - 8 * i));
    add(s, pad, zeros + 8, fn);
    for (int i = 0; i < 32; i++)
        ret[i] = (uint8_t)(s->h[i / 4] >> (24 - 8 * (i % 4)));
}

static struct inside *inside(struct sha256 *h) { return (struct inside *)(void *)h->state; }

void sha256_init(struct sha256 *h) { begin(inside(h)); }

void sha256_add(struct sha256 *h, const void *data, size_t len)
{
    if (len > 0)
        add(inside(h), data, len, blocks);
}

void sha256_end(struct sha256 *h, uint8_t ret[32]) { end(inside(h), ret, blocks); }

void sha256_of(const void *data, size_t len, uint8_t ret[32])
{
    struct sha256 h;
    sha256_init(&h);
    sha256_add(&h, data, len);
    sha256_end(&h, ret);
}

void sha256_portable(const void *data, size_t len, uint8_t ret[32])
{
    struct inside s;
    begin(&s);
    if (len > 0)
        add(&s, data, len, blocks_portable);
    end(&s, ret, blocks_portable);
}
