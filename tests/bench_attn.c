/* bench_attn.c - attention over pages beside what bounds it: reading memory, and multiply-adds.
 *
 * A layer of each shape, for one and sixteen decoding rows and for a chunk of 512 rows, at several
 * contexts.  `LAYERS` layers follow each other as in a forward pass, so that keys and values come
 * from memory where they do not fit into caches.  Rounds are interleaved; shown are medians.
 * `of read` is bytes of keys and values per second over the streaming-read bandwidth of the same
 * round, `of sgemm` multiply-adds per second over OpenBLAS's fp32 product of 1024 x 1024 matrices.
 * Which of the two is nearer to 100 % is what bounds the case.  Arguments: THREADS ROUNDS KERNEL. */
#include "engine/attn.h"
#include "engine/mem.h"
#include "engine/num.h"
#include "engine/util.h"

#include <cblas.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { LAYERS = 4, MAX_ROUNDS = 99, SQUARE = 1024, READ_BYTES = 256 << 20 };

static const struct shape {
    const char *name;
    int H, G, hd;
} shapes[] = {
    { "1.1b  H 32 G 4 hd 64", 32, 4, 64 },
    { "0.5b  H 14 G 2 hd 64", 14, 2, 64 },
    { "MQA   H 16 G 1 hd 128", 16, 1, 128 },
    { "MHA   H 8  G 8 hd 128", 8, 8, 128 },
};
enum { NSHAPES = sizeof shapes / sizeof shapes[0] };

static const struct work {
    int rows, context; /* rows: sequences, or a chunk of one (chunk) that ends at context */
    bool chunk;
} works[] = {
    { 1, 512, false },   { 1, 4096, false },  { 1, 16384, false }, { 16, 512, false },
    { 16, 4096, false }, { 512, 512, true }, { 512, 4608, true },
};
enum { NWORKS = sizeof works / sizeof works[0] };

static struct compute compute;
static uint64_t *stream;
static float *square[3];

static void die(const char *what)
{
    fprintf(stderr, "bench_attn: %s\n", what);
    exit(1);
}

static void *need(size_t bytes)
{
    void *p = mem_alloc(bytes);
    if (p == NULL)
        die("out of memory");
    return p;
}

static float noise(void)
{
    static uint64_t x = 1;
    x = x * 6364136223846793005u + 1442695040888963407u;
    return (float)(int32_t)(x >> 32) * 0x1p-31f;
}

/* --- what bounds it ------------------------------------------------------------------------- */
static void read_fn(void *arg, int64_t begin, int64_t end, int thread)
{
    (void)thread;
    const uint64_t *w = (const uint64_t *)arg + begin;
    uint64_t sum[8] = { 0 };
    for (int64_t k = 0; k < end - begin; k += 8)
        for (int l = 0; l < 8; l++)
            sum[l] += w[k + l];
    for (int l = 1; l < 8; l++)
        sum[0] += sum[l];
    volatile uint64_t sink = sum[0];
    (void)sink;
}

static double read_bandwidth(void)
{
    const double start = now_mono();
    pool_run(compute.pool, READ_BYTES / 8, 1 << 17, read_fn, stream);
    return READ_BYTES / (now_mono() - start);
}

static double sgemm_rate(void)
{
    const double start = now_mono();
    cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, SQUARE, SQUARE, SQUARE, 1.0f, square[0],
                SQUARE, square[1], SQUARE, 0.0f, square[2], SQUARE);
    return (double)SQUARE * SQUARE * SQUARE / (now_mono() - start);
}

/* --- a case ------------------------------------------------------------------------------------ */
struct scene {
    struct shape s;
    struct work w;
    struct kv_cache *kv;
    struct kv_seq *seq;
    struct attn_span *spans;
    int nseqs;
    float *q, *out;
    void *mem;
    size_t mem_bytes, row_bytes;
    struct attn_work work;
};

static void scene_open(struct scene *c, const struct shape *s, const struct work *w)
{
    static const uint8_t seed[32];
    static float k[1 << 12];
    const struct arch a = { .L = LAYERS, .H = s->H, .G = s->G, .hd = s->hd };
    const int nseqs = w->chunk ? 1 : w->rows, n = w->context;
    *c = (struct scene){ .s = *s, .w = *w, .nseqs = nseqs };
    c->row_bytes = (size_t)w->rows * (size_t)s->H * (size_t)s->hd * sizeof(float);
    c->q = need(c->row_bytes);
    c->out = need(c->row_bytes);
    for (size_t i = 0; i < c->row_bytes / sizeof(float); i++)
        c->q[i] = 2 * noise();
    c->seq = calloc((size_t)nseqs, sizeof *c->seq);
    c->spans = calloc((size_t)nseqs, sizeof *c->spans);
    int32_t *tokens = calloc((size_t)n, sizeof *tokens);
    struct err err = { 0 };
    if (c->seq == NULL || c->spans == NULL || tokens == NULL ||
        kv_create(&a, false, (size_t)nseqs * (size_t)kv_pages_for(n) * kv_page_bytes(&a, false),
                  &c->kv, &err) != ERR_OK)
        die("out of memory");
    for (int i = 0; i < nseqs; i++) {
        if (kv_open(c->kv, seed, tokens, n, &c->seq[i], &err) != ERR_OK ||
            !kv_reserve(c->kv, &c->seq[i], n))
            die("no pages");
        c->spans[i] = (struct attn_span){ c->seq[i].pages, w->chunk ? n - w->rows : n - 1, i,
                                          w->chunk ? w->rows : 1 };
        for (int pos = 0; pos < n; pos++) {
            for (int d = 0; d < s->G * s->hd; d++)
                k[d] = noise();
            for (int l = 0; l < LAYERS; l++)
                attn_store(ops_for(compute.isa), c->kv, c->seq[i].pages, l, s->G, s->hd, pos, k, k,
                           s->hd);
        }
    }
    free(tokens);
    c->mem_bytes = attn_lay_out(&c->work, s->H, s->hd, w->rows, NULL);
    c->mem = need(c->mem_bytes);
    attn_lay_out(&c->work, s->H, s->hd, w->rows, c->mem);
}

static void scene_close(struct scene *c)
{
    for (int i = 0; i < c->nseqs; i++)
        kv_close(c->kv, &c->seq[i]);
    kv_destroy(c->kv);
    mem_free(c->q, c->row_bytes);
    mem_free(c->out, c->row_bytes);
    mem_free(c->mem, c->mem_bytes);
    free(c->seq);
    free(c->spans);
}

static double multiply_adds(const struct scene *c)
{
    const double n = c->w.context, r = c->w.rows;
    const double positions = c->w.chunk ? r * (n - r) + r * (r + 1) / 2 : r * n;
    return positions * c->s.H * c->s.hd * 2;
}

/* Seconds of one layer. */
static double scene_time(struct scene *c)
{
    const int repeats = multiply_adds(c) < 1e8 ? 4 : 1;
    const double start = now_mono();
    for (int i = 0; i < repeats * LAYERS; i++) {
        const struct attn_layer a = {
            .kv = c->kv, .layer = i % LAYERS, .H = c->s.H, .G = c->s.G, .hd = c->s.hd, .scale = 0.125f,
            .q = c->q, .q_ld = c->s.H * c->s.hd, .q_step = c->s.hd, .out = c->out,
        };
        attn_run(&compute, &c->work, &a, c->spans, c->nseqs);
    }
    return (now_mono() - start) / (repeats * LAYERS);
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

static void run_case(const struct shape *s, const struct work *w, int rounds)
{
    struct scene c;
    double t[MAX_ROUNDS], read[MAX_ROUNDS], gemm[MAX_ROUNDS];
    scene_open(&c, s, w);
    const double kv = (double)(w->chunk ? 1 : w->rows) * w->context * s->G * s->hd * 4;
    for (int r = 0; r < rounds; r++) {
        const double bandwidth = read_bandwidth(), rate = sgemm_rate();
        t[r] = scene_time(&c);
        read[r] = kv / t[r] / bandwidth;
        gemm[r] = multiply_adds(&c) / t[r] / rate;
    }
    const double time = median(t, rounds);
    printf("  %3d row%s %5d: %9.1f us  %5.1f GB/s %4.0f %% of read  %5.1f GMAC/s %4.0f %% of sgemm\n",
           w->rows, w->chunk ? "s to" : w->rows > 1 ? "s at" : "  at", w->context, time * 1e6,
           kv / time * 1e-9, 100 * median(read, rounds), multiply_adds(&c) / time * 1e-9,
           100 * median(gemm, rounds));
    scene_close(&c);
}

int main(int argc, char **argv)
{
    const int threads = argc > 1 ? atoi(argv[1]) : 0;
    int rounds = argc > 2 ? atoi(argv[2]) : 5;
    struct err err = { 0 };
    rounds = rounds < 1 ? 1 : rounds > MAX_ROUNDS ? MAX_ROUNDS : rounds;
    if (isa_select(argc > 3 ? argv[3] : "auto", &compute.isa, &err) != ERR_OK ||
        pool_create(threads, &compute.pool, &err) != ERR_OK)
        die(err.msg);
    openblas_set_num_threads(pool_threads(compute.pool));
    stream = need(READ_BYTES);
    memset(stream, 1, READ_BYTES);
    for (int i = 0; i < 3; i++) {
        square[i] = need((size_t)SQUARE * SQUARE * sizeof(float));
        for (int k = 0; k < SQUARE * SQUARE; k++)
            square[i][k] = noise();
    }
    sgemm_rate();
    printf("attention of one layer, %s kernels, %d threads, %d rounds\n", isa_name(compute.isa),
           pool_threads(compute.pool), rounds);
    for (int s = 0; s < NSHAPES; s++) {
        printf("%s\n", shapes[s].name);
        for (int w = 0; w < NWORKS; w++)
            run_case(&shapes[s], &works[w], rounds);
    }
    return 0;
}
