/* bench_linear.c - linear layers beside what bounds them: reading memory, and OpenBLAS.
 *
 * For each number of rows M, every kernel multiplies with matrices that together are larger than
 * most caches, one after the other as a forward pass does.  Rounds are interleaved (all kernels
 * once, then all again), because the speed of memory and clock drift; shown are medians over
 * rounds.  `of read` is bytes of weights per second over the streaming-read bandwidth measured in
 * the same round; `of sgemm` is operations per second over OpenBLAS's fp32 product of the same
 * shape.
 *
 * Then the backward pass dX = dY W of M = 512 rows, in the shapes of a model of 1.1B weights,
 * beside OpenBLAS's product with the same matrix in fp32, which has nothing to unpack. Arguments:
 * THREADS ROUNDS. */
#include "engine/linear.h"
#include "engine/linear_dx.h"
#include "engine/mem.h"
#include "engine/nf4.h"
#include "engine/num.h"
#include "engine/util.h"

#include <cblas.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { N = 5632, K = 2048, POOL_BYTES = 160 << 20, M_MAX = 512, MAX_COPIES = 64, MAX_ROUNDS = 99 };

static const int rows[] = { 1, 2, 4, 8, 16, 64, 512 };
enum { NROWS = sizeof rows / sizeof rows[0] };

enum kind { NF4_FAST, NF4_EXACT, Q8_FAST, Q8_EXACT, BF16, F32, SGEMM, KINDS };
static const char *const kind_names[] = { "nf4 fast", "nf4 exact", "8bit fast", "8bit exact",
                                          "bf16",     "f32",       "sgemm" };

/* Copies of one matrix, read in turn. */
struct copies {
    struct matrix m[MAX_COPIES];
    int n, next;
    size_t bytes; /* of one */
};

static struct copies nf4, q8, bf16, f32;
static struct compute compute;
static struct act act;
static float *x, *y;

static void die(const char *what)
{
    fprintf(stderr, "bench_linear: %s\n", what);
    exit(1);
}

static void *need(size_t bytes)
{
    void *p = mem_alloc(bytes);
    if (p == NULL)
        die("out of memory");
    return p;
}

static void copies_make(struct copies *c, enum mat_type type, const void *codes, size_t code_bytes,
                        const uint16_t *scales, size_t scale_bytes)
{
    c->bytes = code_bytes + scale_bytes;
    c->n = (int)(POOL_BYTES / c->bytes);
    c->n = c->n < 2 ? 2 : c->n > MAX_COPIES ? MAX_COPIES : c->n;
    for (int i = 0; i < c->n; i++) {
        void *to = need(code_bytes);
        memcpy(to, codes, code_bytes);
        uint16_t *s = scale_bytes > 0 ? need(scale_bytes) : NULL;
        if (s != NULL)
            memcpy(s, scales, scale_bytes);
        c->m[i] = (struct matrix){ .type = type, .N = N, .K = K, .codes = to, .scales16 = s };
    }
}

static uint32_t seed = 1;

static float noise(void)
{
    seed = seed * 1664525u + 1013904223u;
    return (float)(int32_t)seed * 0x1p-31f;
}

static void setup(void)
{
    const size_t n = (size_t)N * K, nscales = p16_scales(N, K);
    float *w = need(n * sizeof *w), *absmax = need(nf4_blocks(n) * sizeof *absmax);
    uint8_t *packed = need(nf4_bytes(n)), *codes = need(q8_bytes(N, K));
    uint16_t *scales = need(nscales * sizeof *scales), *half = need(n * sizeof *half);
    for (size_t i = 0; i < n; i++) {
        w[i] = 0.02f * noise();
        half[i] = f32_to_bf16(w[i]);
    }
    q4_quantize(Q4_NF4, w, n, packed, absmax);
    p16_pack(packed, N, K, codes);
    p16_scales_from(absmax, N, K, scales, NULL);
    copies_make(&nf4, MAT_NF4_P16, codes, p16_bytes(N, K), scales, nscales * 2);
    q8_pack(w, N, K, codes, scales);
    copies_make(&q8, MAT_Q8_P16, codes, q8_bytes(N, K), scales, nscales * 2);
    copies_make(&bf16, MAT_BF16, half, n * 2, NULL, 0);
    copies_make(&f32, MAT_F32, w, n * 4, NULL, 0);
    mem_free(w, n * sizeof *w);
    mem_free(absmax, nf4_blocks(n) * sizeof *absmax);
    mem_free(packed, nf4_bytes(n));
    mem_free(codes, q8_bytes(N, K));
    mem_free(scales, nscales * sizeof *scales);
    mem_free(half, n * sizeof *half);

    x = need((size_t)M_MAX * N * sizeof *x); /* of N numbers: dX of the widest shape */
    y = need((size_t)M_MAX * N * sizeof *y);
    for (size_t i = 0; i < (size_t)M_MAX * N; i++)
        x[i] = noise();
    act_init(&act);
    if (act_reserve(&act, M_MAX, K, NULL) != ERR_OK)
        die("out of memory");
}

/* --- reading ----------------------------------------------------------------------------- */

static void read_piece(void *arg, int64_t begin, int64_t end, int thread)
{
    (void)thread;
    const struct copies *c = arg;
    enum { PIECES = 16 };
    for (int64_t i = begin; i < end; i++) {
        const size_t words = p16_bytes(N, K) / 8 / PIECES;
        const uint64_t *w = (const uint64_t *)c->m[i / PIECES].codes + (size_t)(i % PIECES) * words;
        uint64_t sum[8] = { 0 };
        for (size_t k = 0; k < words; k += 8)
            for (size_t l = 0; l < 8; l++)
                sum[l] += w[k + l];
        for (int l = 1; l < 8; l++)
            sum[0] += sum[l];
        volatile uint64_t sink = sum[0];
        (void)sink;
    }
}

/* Bytes per second. */
static double read_bandwidth(void)
{
    const double start = now_mono();
    pool_run(compute.pool, (int64_t)nf4.n * 16, 1, read_piece, &nf4);
    return (double)nf4.n * (double)p16_bytes(N, K) / (now_mono() - start);
}

/* --- multiplying ------------------------------------------------------------------------- */

static const struct matrix *next(struct copies *c)
{
    c->next = (c->next + 1) % c->n;
    return &c->m[c->next];
}

static struct copies *copies_of(enum kind k)
{
    switch (k) {
    case NF4_FAST:
    case NF4_EXACT:
        return &nf4;
    case Q8_FAST:
    case Q8_EXACT:
        return &q8;
    case BF16:
        return &bf16;
    default:
        return &f32;
    }
}

/* Seconds for one product, activations converted anew each time. */
static double time_product(enum kind k, int M)
{
    struct copies *c = copies_of(k);
    const int repeats = M <= 8 ? c->n / 2 + 1 : M <= 64 ? 2 : 1;
    compute.precision = k == NF4_EXACT || k == Q8_EXACT ? PREC_EXACT : PREC_FAST;
    const double start = now_mono();
    for (int i = 0; i < repeats; i++) {
        const struct matrix *w = next(c);
        if (k == SGEMM) {
            cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, M, N, K, 1.0f, x, K, w->codes, K,
                        0.0f, y, N);
            continue;
        }
        act_pack(&compute, &act, x, M, K, K);
        matmul(&compute, w, &act, NULL, y, N);
    }
    return (now_mono() - start) / repeats;
}

static int ascending(const void *a, const void *b)
{
    const double u = *(const double *)a, v = *(const double *)b;
    return (u > v) - (u < v);
}

static double median(double *v, int n)
{
    qsort(v, (size_t)n, sizeof *v, ascending);
    return v[n / 2];
}

static double seconds[KINDS][MAX_ROUNDS], bandwidth[MAX_ROUNDS];

static void measure(int M, int rounds)
{
    for (int r = 0; r < rounds; r++) {
        bandwidth[r] = read_bandwidth();
        for (int k = 0; k < KINDS; k++)
            seconds[k][r] = time_product((enum kind)k, M);
    }
    for (int k = 0; k < KINDS; k++) {
        double of_read[MAX_ROUNDS], of_sgemm[MAX_ROUNDS], t[MAX_ROUNDS];
        const double bytes = (double)copies_of((enum kind)k)->bytes, ops = 2.0 * M * N * K;
        for (int r = 0; r < rounds; r++) {
            t[r] = seconds[k][r];
            of_read[r] = bytes / t[r] / bandwidth[r];
            of_sgemm[r] = seconds[SGEMM][r] / t[r];
        }
        const double s = median(t, rounds);
        printf("M=%-4d %-10s %9.1f us %7.1f GB/s %7.1f GOP/s", M, kind_names[k], s * 1e6,
               bytes / s * 1e-9, ops / s * 1e-9);
        if (M <= 8)
            printf("  %4.0f %% of read", 100.0 * median(of_read, rounds));
        if (k != SGEMM)
            printf("  %5.2f x sgemm", median(of_sgemm, rounds));
        printf("\n");
    }
    fflush(stdout);
}

/* --- backward ---------------------------------------------------------------------------- */

enum dx_kind { DX_QUICK, DX_F32, DX_SGEMM, DX_KINDS };
static const char *const dx_names[] = { "dX quick", "dX f32", "dX sgemm" };

static double time_dx(enum dx_kind k, int outputs, int inputs, void *scratch)
{
    struct matrix w = *next(k == DX_SGEMM ? &f32 : &nf4);
    const double start = now_mono();
    if (k == DX_SGEMM) {
        cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasNoTrans, M_MAX, inputs, outputs, 1.0f, y,
                    outputs, w.codes, inputs, 0.0f, x, inputs);
    } else {
        w.N = outputs;
        w.K = inputs;
        compute.precision = k == DX_F32 ? PREC_F32 : PREC_EXACT;
        matmul_dx(&compute, &w, y, M_MAX, outputs, x, inputs, false, scratch);
    }
    return now_mono() - start;
}

static void measure_dx(int outputs, int inputs, int rounds)
{
    /* Any bytes are codes, so a part of the large matrix is one too. */
    const struct matrix w = { .type = MAT_NF4_P16, .N = outputs, .K = inputs };
    compute.precision = PREC_F32;
    const size_t bytes = matmul_dx_scratch(&compute, &w, M_MAX);
    void *scratch = need(bytes);
    for (int r = 0; r < rounds; r++)
        for (int k = 0; k < DX_KINDS; k++)
            seconds[k][r] = time_dx((enum dx_kind)k, outputs, inputs, scratch);
    for (int k = 0; k < DX_KINDS; k++) {
        double of_sgemm[MAX_ROUNDS], t[MAX_ROUNDS];
        for (int r = 0; r < rounds; r++) {
            t[r] = seconds[k][r];
            of_sgemm[r] = seconds[DX_SGEMM][r] / t[r];
        }
        const double s = median(t, rounds);
        printf("%4d x %-4d M=%d %-8s %9.1f us %7.1f GOP/s", outputs, inputs, M_MAX, dx_names[k],
               s * 1e6, 2.0 * M_MAX * outputs * inputs / s * 1e-9);
        if (k != DX_SGEMM)
            printf("  %5.2f x sgemm", median(of_sgemm, rounds));
        printf("\n");
    }
    fflush(stdout);
    mem_free(scratch, bytes);
}

int main(int argc, char **argv)
{
    struct err err = { 0 };
    int rounds = argc > 2 ? atoi(argv[2]) : 7;
    rounds = rounds < 1 ? 1 : rounds > MAX_ROUNDS ? MAX_ROUNDS : rounds;
    if (isa_select("auto", &compute.isa, &err) != ERR_OK ||
        pool_create(argc > 1 ? atoi(argv[1]) : 0, &compute.pool, &err) != ERR_OK)
        die(err.msg);
    openblas_set_num_threads(pool_threads(compute.pool));
    setup();
    printf("linear layer %d x %d, %s kernels, %d threads, %d rounds, OpenBLAS %s\n", N, K,
           isa_name(compute.isa), pool_threads(compute.pool), rounds, openblas_get_corename());
    double b[MAX_ROUNDS];
    for (int r = 0; r < rounds; r++)
        b[r] = read_bandwidth();
    printf("streaming read %.1f GB/s\n", median(b, rounds) * 1e-9);
    for (int i = 0; i < NROWS; i++)
        measure(rows[i], rounds);
    for (size_t i = 0; i < (size_t)M_MAX * N; i++)
        y[i] = noise();
    measure_dx(5632, 2048, rounds);
    measure_dx(2048, 5632, rounds);
    measure_dx(2048, 2048, rounds);
    measure_dx(256, 2048, rounds);
    pool_destroy(compute.pool);
    return 0;
}
