/* bench_peak.c - how many multiply-adds a second the machine does when nothing has to be loaded.
 *
 * Each loop holds sixteen sums, more than the latency of the instruction times the ports that take it;
 * the empty assembly keeps the compiler from computing equal sums and unchanged products once. */
#include "server/bench_parts.h"

#if defined __x86_64__
#include <immintrin.h>

enum { LOOPS = 1 << 17, SUMS = 16 };
#define FRESH(v) __asm__ volatile("" : "+x"(v))

__attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni"))) static void avx512_fast(void)
{
    __m512i s[SUMS], a = _mm512_set1_epi8(1), w = _mm512_set1_epi8(3);
#pragma GCC unroll 16
    for (int i = 0; i < SUMS; i++) {
        s[i] = _mm512_setzero_si512();
        FRESH(s[i]);
    }
    for (int k = 0; k < LOOPS; k++)
#pragma GCC unroll 16
        for (int i = 0; i < SUMS; i++)
            s[i] = _mm512_dpbusd_epi32(s[i], w, a);
#pragma GCC unroll 16
    for (int i = 0; i < SUMS; i++)
        FRESH(s[i]);
}

__attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni"))) static void avx512_exact(void)
{
    __m512i s[SUMS], a = _mm512_set1_epi16(1), w = _mm512_set1_epi16(3);
#pragma GCC unroll 16
    for (int i = 0; i < SUMS; i++) {
        s[i] = _mm512_setzero_si512();
        FRESH(s[i]);
    }
    for (int k = 0; k < LOOPS; k++)
#pragma GCC unroll 16
        for (int i = 0; i < SUMS; i++)
            s[i] = _mm512_dpwssd_epi32(s[i], w, a);
#pragma GCC unroll 16
    for (int i = 0; i < SUMS; i++)
        FRESH(s[i]);
}

__attribute__((target("avx2"))) static void avx2_fast(void)
{
    __m256i s[SUMS / 2], a = _mm256_set1_epi8(1), w = _mm256_set1_epi8(3);
    const __m256i ones = _mm256_set1_epi16(1);
#pragma GCC unroll 16
    for (int i = 0; i < SUMS / 2; i++) {
        s[i] = _mm256_setzero_si256();
        FRESH(s[i]);
    }
    for (int k = 0; k < 2 * LOOPS; k++)
#pragma GCC unroll 16
        for (int i = 0; i < SUMS / 2; i++) {
            FRESH(a);
            s[i] = _mm256_add_epi32(s[i], _mm256_madd_epi16(_mm256_maddubs_epi16(w, a), ones));
        }
#pragma GCC unroll 16
    for (int i = 0; i < SUMS / 2; i++)
        FRESH(s[i]);
}

__attribute__((target("avx2"))) static void avx2_exact(void)
{
    __m256i s[SUMS / 2], a = _mm256_set1_epi16(1), w = _mm256_set1_epi16(3);
#pragma GCC unroll 16
    for (int i = 0; i < SUMS / 2; i++) {
        s[i] = _mm256_setzero_si256();
        FRESH(s[i]);
    }
    for (int k = 0; k < 2 * LOOPS; k++)
#pragma GCC unroll 16
        for (int i = 0; i < SUMS / 2; i++) {
            FRESH(a);
            s[i] = _mm256_add_epi32(s[i], _mm256_madd_epi16(w, a));
        }
#pragma GCC unroll 16
    for (int i = 0; i < SUMS / 2; i++)
        FRESH(s[i]);
}

/* The loop, and multiply-adds of one of its LOOPS * SUMS instructions. */
static void (*loop_of(enum isa isa, enum precision p, int *ret_lanes))(void)
{
    const bool fast = p == PREC_FAST;
    if (isa != ISA_AVX512 && isa != ISA_AVX2)
        return NULL;
    *ret_lanes = (isa == ISA_AVX512 ? 64 : 32) / (fast ? 1 : 2);
    if (isa == ISA_AVX512)
        return fast ? avx512_fast : avx512_exact;
    return fast ? avx2_fast : avx2_exact;
}
#else
enum { LOOPS = 1, SUMS = 1 };

static void (*loop_of(enum isa isa, enum precision p, int *ret_lanes))(void)
{
    (void)isa;
    (void)p;
    *ret_lanes = 1;
    return NULL;
}
#endif

enum { PIECES = 64 };

static void piece(void *arg, int64_t begin, int64_t end, int thread)
{
    const struct bench_peak *peak = arg;
    int lanes;
    void (*loop)(void) = loop_of(peak->compute->isa, peak->precision, &lanes);
    (void)thread;
    for (int64_t i = begin; i < end && loop != NULL; i++)
        loop();
}

static void all(void *arg)
{
    const struct bench_peak *peak = arg;
    pool_run(peak->compute->pool, PIECES, 1, piece, arg);
}

static int rate(void *arg, double *ret, struct err *err)
{
    const struct bench_peak *peak = arg;
    int lanes = 0;
    (void)err;
    loop_of(peak->compute->isa, peak->precision, &lanes);
    *ret = 2.0 * lanes * LOOPS * SUMS * PIECES / bench_time(peak->b, all, arg) * 1e-9;
    return ERR_OK;
}

bool bench_peak_series(struct bench *b, enum precision p, struct bench_peak *peak, struct bench_series *ret)
{
    int lanes;
    if (loop_of(b->compute.isa, p, &lanes) == NULL)
        return false;
    *peak = (struct bench_peak){ b, &b->compute, p };
    *ret = (struct bench_series){ .name = "GOP/s, peak", .unit = "GOP/s", .measure = rate, .arg = peak };
    return true;
}
