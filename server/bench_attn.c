/* bench_attn.c - attention over pages beside what bounds it: reading memory, and multiply-adds.
 *
 * One layer of each shape, for one and sixteen decoding rows and for a chunk of a prompt of 512 rows, at
 * several contexts.  LAYERS layers follow each other as in a forward pass, so that keys and values come
 * from memory where they do not fit into caches.  Which of the two ratios is nearer to 1 says what bounds
 * the case. */
#include "server/bench_parts.h"

#include "engine/attn.h"
#include "engine/blas.h"
#include "engine/mem.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { LAYERS = 4, SQUARE = 1024, WIDTH_MAX = 1 << 12 };

static const struct shape {
    const char *name;
    int H, G, hd;
} shapes[] = {
    { "1.1b", 32, 4, 64 },
    { "0.5b", 14, 2, 64 },
    { "mqa", 16, 1, 128 },
    { "mha", 8, 8, 128 },
};
enum { NSHAPES = sizeof shapes / sizeof shapes[0] };

static const struct work {
    int rows, context; /* rows: sequences, or a chunk of one (chunk) that ends at context */
    bool chunk;
} works[] = {
    { 1, 512, false },  { 1, 4096, false }, { 1, 16384, false }, { 16, 512, false },
    { 16, 4096, false }, { 512, 512, true }, { 512, 4608, true },
};
enum { NWORKS = sizeof works / sizeof works[0] };

struct scene {
    struct bench *b;
    struct shape s;
    struct work w;
    struct kv_cache *kv;
    struct kv_seq seqs[16];
    struct attn_span spans[16];
    int nseqs;
    float *q, *out;
    void *mem;
    size_t mem_bytes, row_bytes;
    struct attn_work work;
};

/* OpenBLAS's fp32 product of two squares. */
struct square {
    const struct bench *b;
    float *m[3];
};

static float noise(uint64_t *x)
{
    *x = *x * 6364136223846793005u + 1442695040888963407u;
    return (float)(int32_t)(*x >> 32) * 0x1p-31f;
}

/* --- a case ------------------------------------------------------------------------------------- */
static void store_keys(struct scene *c, const struct kv_seq *seq, float *k, uint64_t *seed)
{
    for (int pos = 0; pos < c->w.context; pos++) {
        for (int d = 0; d < c->s.G * c->s.hd; d++)
            k[d] = noise(seed);
        for (int l = 0; l < LAYERS; l++)
            attn_store(ops_for(c->b->compute.isa), c->kv, seq->pages, l, c->s.G, c->s.hd, pos, k, k, c->s.hd);
    }
}

static int open_seqs(struct scene *c, struct err *err)
{
    static const uint8_t hash[32];
    const struct arch a = { .L = LAYERS, .H = c->s.H, .G = c->s.G, .hd = c->s.hd };
    const int n = c->w.context, nseqs = c->w.chunk ? 1 : c->w.rows;
    uint64_t seed = 1;
    int32_t *tokens = calloc((size_t)n, sizeof *tokens);
    float *k = malloc(WIDTH_MAX * sizeof *k);
    int rc = tokens == NULL || k == NULL ? err_nomem(err) : ERR_OK;
    if (rc == ERR_OK)
        rc = kv_create(&a, KV_F16, (size_t)nseqs * (size_t)kv_pages_for(n) * kv_page_bytes(&a, KV_F16), &c->kv, err);
    while (rc == ERR_OK && c->nseqs < nseqs) {
        const int i = c->nseqs;
        rc = kv_open(c->kv, hash, tokens, n, &c->seqs[i], err);
        if (rc != ERR_OK)
            break;
        c->nseqs++;
        if (!kv_reserve(c->kv, &c->seqs[i], n))
            rc = err_set(err, ERR_INTERNAL, "the cache has too few pages");
        c->spans[i] = (struct attn_span){ c->seqs[i].pages, c->w.chunk ? n - c->w.rows : n - 1, i,
                                          c->w.chunk ? c->w.rows : 1 };
        if (rc == ERR_OK)
            store_keys(c, &c->seqs[i], k, &seed);
    }
    free(tokens);
    free(k);
    return rc;
}

static int open_scene(struct scene *c, struct err *err)
{
    uint64_t seed = 2;
    c->row_bytes = (size_t)c->w.rows * (size_t)c->s.H * (size_t)c->s.hd * sizeof(float);
    c->mem_bytes = attn_lay_out(&c->work, c->s.H, c->s.hd, c->w.rows, NULL);
    c->q = mem_alloc(c->row_bytes);
    c->out = mem_alloc(c->row_bytes);
    c->mem = mem_alloc(c->mem_bytes);
    if (c->q == NULL || c->out == NULL || c->mem == NULL)
        return err_nomem(err);
    attn_lay_out(&c->work, c->s.H, c->s.hd, c->w.rows, c->mem);
    for (size_t i = 0; i < c->row_bytes / sizeof(float); i++)
        c->q[i] = 2 * noise(&seed);
    return open_seqs(c, err);
}

static void close_scene(struct scene *c)
{
    for (int i = 0; i < c->nseqs; i++)
        kv_close(c->kv, &c->seqs[i]);
    kv_destroy(c->kv);
    mem_free(c->q, c->row_bytes);
    mem_free(c->out, c->row_bytes);
    mem_free(c->mem, c->mem_bytes);
}

/* Of a layer: a product with keys and one with values for each position that a row sees. */
static double operations(const struct scene *c)
{
    const double n = c->w.context, r = c->w.rows;
    const double positions = c->w.chunk ? r * (n - r) + r * (r + 1) / 2 : r * n;
    return 2 * positions * c->s.H * c->s.hd * 2;
}

/* fp16 keys and values of a layer. */
static double kv_bytes(const struct scene *c)
{
    return (double)c->nseqs * c->w.context * c->s.G * c->s.hd * 4;
}

static void run_layers(void *arg)
{
    struct scene *c = arg;
    for (int i = 0; i < LAYERS; i++) {
        const struct attn_layer a = {
            .kv = c->kv, .layer = i, .H = c->s.H, .G = c->s.G, .hd = c->s.hd, .scale = 0.125f,
            .q = c->q, .q_ld = c->s.H * c->s.hd, .q_step = c->s.hd, .out = c->out,
        };
        attn_run(&c->b->compute, &c->work, &a, c->spans, c->nseqs);
    }
}

static int rate(void *arg, double *ret, struct err *err)
{
    const struct scene *c = arg;
    (void)err;
    *ret = operations(c) * LAYERS / bench_time(c->b, run_layers, arg) * 1e-9;
    return ERR_OK;
}

static void multiply(void *arg)
{
    const struct square *q = arg;
    blas_gemm(false, true, SQUARE, SQUARE, SQUARE, 1, q->m[0], SQUARE, q->m[1], SQUARE, 0, q->m[2], SQUARE);
}

static int blas_rate(void *arg, double *ret, struct err *err)
{
    const struct square *q = arg;
    (void)err;
    *ret = 2.0 * SQUARE * SQUARE * SQUARE / bench_time(q->b, multiply, arg) * 1e-9;
    return ERR_OK;
}

/* --- the part ----------------------------------------------------------------------------------- */
static int measure(struct scene *c, struct bench_reader *reader, struct square *q, struct err *err)
{
    struct bench *b = c->b;
    const char *what = c->w.chunk ? "chunk" : "rows";
    struct bench_series s[] = {
        { .name = "attention", .unit = "GOP/s", .measure = rate, .arg = c },
        bench_reader_series(reader),
        { .name = "GOP/s, OpenBLAS fp32", .unit = "GOP/s", .measure = blas_rate, .arg = q },
    };
    int rc = bench_measure(b, s, 3, err);
    if (rc == ERR_OK)
        rc = bench_row(b, &s[0], &s[2], 1, err, "attention.%s.%s%d.c%d", c->s.name, what, c->w.rows, c->w.context);
    const struct bench_series bytes = bench_scaled(&s[0], "GB/s", kv_bytes(c) / operations(c));
    if (rc == ERR_OK)
        rc = bench_row(b, &bytes, &s[1], 1, err, "attention.%s.%s%d.c%d.read", c->s.name, what, c->w.rows,
                       c->w.context);
    return rc;
}

static int run_all(struct bench *b, struct bench_reader *reader, struct square *q, struct err *err)
{
    int rc = ERR_OK;
    for (int s = 0; s < NSHAPES; s++)
        for (int w = 0; w < NWORKS && rc == ERR_OK; w++) {
            struct scene c = { .b = b, .s = shapes[s], .w = works[w] };
            if (b->quick && (s > 0 || works[w].context > 512))
                continue;
            rc = open_scene(&c, err);
            if (rc == ERR_OK)
                rc = measure(&c, reader, q, err);
            close_scene(&c);
        }
    return rc;
}

static int run(struct bench *b, struct err *err)
{
    const size_t bytes = (size_t)SQUARE * SQUARE * sizeof(float);
    struct bench_reader reader;
    struct square q = { .b = b };
    uint64_t seed = 3;
    if (!bench_room(b, "attention", (size_t)2 << 30))
        return ERR_OK;
    int rc = bench_reader_open(b, false, false, &reader, err);
    if (rc != ERR_OK)
        return rc;
    for (int i = 0; i < 3 && rc == ERR_OK; i++) {
        q.m[i] = mem_alloc(bytes);
        rc = q.m[i] == NULL ? err_nomem(err) : ERR_OK;
        for (int k = 0; k < SQUARE * SQUARE && rc == ERR_OK; k++)
            q.m[i][k] = noise(&seed);
    }
    blas_threads(pool_threads(b->compute.pool));
    if (rc == ERR_OK)
        rc = run_all(b, &reader, &q, err);
    blas_threads(1);
    for (int i = 0; i < 3; i++)
        mem_free(q.m[i], bytes);
    bench_reader_close(&reader);
    return rc;
}

const struct bench_part bench_attn = { "attention", "attention of one layer beside the bandwidth of memory and "
                                       "OpenBLAS", run };
