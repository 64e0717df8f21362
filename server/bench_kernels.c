/* bench_kernels.c - single matrix products beside what bounds them: reading memory, the multiply-add
 * instruction, and OpenBLAS's fp32 product of the same shape.
 *
 * Every kernel multiplies with matrices that together are larger than most caches, one after the
 * other as a forward pass does; activations are converted anew each time.  The shape is that of the
 * widest layer of a model of 1.1B weights. */
#include "server/bench_parts.h"

#include "engine/blas.h"
#include "engine/linear.h"
#include "engine/linear_dx.h"
#include "engine/mem.h"
#include "engine/nf4.h"
#include "engine/num.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { N = 5632, K = 2048, M_MAX = 512, MAX_COPIES = 64 };
static const size_t POOL_BYTES = (size_t)160 << 20;
static const int rows[] = { 1, 2, 4, 8, 16, 64, 512 };
enum { NROWS = sizeof rows / sizeof rows[0] };

/* Copies of one matrix, read in turn. */
struct copies {
    struct matrix m[MAX_COPIES];
    int n, next;
    size_t code_bytes, scale_bytes; /* of one */
};

struct kernels {
    struct bench *b;
    struct compute compute;
    struct copies nf4, q8, f32;
    struct act act;
    float *x, *y; /* [M_MAX][N], as much as the widest product has on either side */
    uint8_t *scratch;
    size_t scratch_bytes;
    struct bench_reader reader;
    struct bench_peak peak[2];
};

static void copies_free(struct copies *c)
{
    for (int i = 0; i < c->n; i++) {
        mem_free((void *)c->m[i].codes, c->code_bytes);
        mem_free((void *)c->m[i].scales16, c->scale_bytes);
    }
    c->n = 0;
}

static int copies_make(struct copies *c, enum mat_type type, const void *codes, size_t code_bytes,
                       const uint16_t *scales, size_t scale_bytes, struct err *err)
{
    int n = (int)(POOL_BYTES / (code_bytes + scale_bytes));
    n = n < 2 ? 2 : n > MAX_COPIES ? MAX_COPIES : n;
    c->code_bytes = code_bytes;
    c->scale_bytes = scale_bytes;
    while (c->n < n) {
        void *to = mem_alloc(code_bytes), *s = scale_bytes > 0 ? mem_alloc(scale_bytes) : NULL;
        c->m[c->n++] = (struct matrix){ .type = type, .N = N, .K = K, .codes = to, .scales16 = s };
        if (to == NULL || (s == NULL && scale_bytes > 0))
            return err_nomem(err);
        memcpy(to, codes, code_bytes);
        if (s != NULL)
            memcpy(s, scales, scale_bytes);
    }
    return ERR_OK;
}

static const struct matrix *next(struct copies *c)
{
    c->next = (c->next + 1) % c->n;
    return &c->m[c->next];
}

static float noise(uint32_t *seed)
{
    *seed = *seed * 1664525u + 1013904223u;
    return (float)(int32_t)*seed * 0x1p-31f;
}

/* w: [N][K] as fp32. */
static int pack(struct kernels *k, const float *w, struct err *err)
{
    const size_t n = (size_t)N * K, nscales = p16_scales(N, K);
    float *absmax = malloc(nf4_blocks(n) * sizeof *absmax);
    uint8_t *packed = malloc(nf4_bytes(n)), *codes = malloc(q8_bytes(N, K));
    uint16_t *scales = malloc(nscales * sizeof *scales);
    int rc = absmax && packed && codes && scales ? ERR_OK : err_nomem(err);
    if (rc == ERR_OK) {
        q4_quantize(Q4_NF4, w, n, packed, absmax);
        p16_pack(packed, N, K, codes);
        p16_scales_from(absmax, N, K, scales, NULL);
        rc = copies_make(&k->nf4, MAT_NF4_P16, codes, p16_bytes(N, K), scales, nscales * 2, err);
    }
    if (rc == ERR_OK) {
        q8_pack(w, N, K, codes, scales);
        rc = copies_make(&k->q8, MAT_Q8_P16, codes, q8_bytes(N, K), scales, nscales * 2, err);
    }
    if (rc == ERR_OK)
        rc = copies_make(&k->f32, MAT_F32, w, n * sizeof *w, NULL, 0, err);
    free(absmax);
    free(packed);
    free(codes);
    free(scales);
    return rc;
}

static void close_kernels(struct kernels *k)
{
    copies_free(&k->nf4);
    copies_free(&k->q8);
    copies_free(&k->f32);
    act_free(&k->act);
    mem_free(k->x, (size_t)M_MAX * N * sizeof *k->x);
    mem_free(k->y, (size_t)M_MAX * N * sizeof *k->y);
    mem_free(k->scratch, k->scratch_bytes);
    bench_reader_close(&k->reader);
}

static int open_kernels(struct bench *b, struct kernels *k, struct err *err)
{
    const size_t n = (size_t)N * K, m = (size_t)M_MAX * N;
    uint32_t seed = 1;
    float *w = malloc(n * sizeof *w);
    *k = (struct kernels){ .b = b, .compute = b->compute, .x = mem_alloc(m * sizeof *k->x),
                           .y = mem_alloc(m * sizeof *k->y) };
    act_init(&k->act);
    k->compute.precision = PREC_F32;
    const struct matrix widest = { .type = MAT_NF4_P16, .N = N, .K = K };
    k->scratch_bytes = matmul_dx_scratch(&k->compute, &widest, M_MAX);
    k->scratch = mem_alloc(k->scratch_bytes);
    int rc = w && k->x && k->y && k->scratch ? ERR_OK : err_nomem(err);
    for (size_t i = 0; i < n && rc == ERR_OK; i++)
        w[i] = 0.02f * noise(&seed);
    for (size_t i = 0; i < m && rc == ERR_OK; i++)
        k->x[i] = k->y[i] = noise(&seed);
    if (rc == ERR_OK)
        rc = pack(k, w, err);
    if (rc == ERR_OK)
        rc = act_reserve(&k->act, M_MAX, K, err);
    if (rc == ERR_OK)
        rc = bench_reader_open(b, false, false, &k->reader, err);
    free(w);
    return rc;
}

/* --- products -------------------------------------------------------------------------------------- */
enum kind { NF4, Q8, ACT_PACK, SGEMM, DX, DX_SGEMM };
static const char *const kind_names[] = { "nf4", "head", "act_pack", "sgemm", "dx", "dx_sgemm" };

struct product {
    struct kernels *k;
    enum kind kind;
    enum precision precision;
    int M, outputs, inputs;
};

static void multiply(void *arg)
{
    const struct product *p = arg;
    struct kernels *k = p->k;
    if (p->kind == SGEMM) {
        blas_gemm(false, true, p->M, N, K, 1.0f, k->x, K, next(&k->f32)->codes, K, 0.0f, k->y, N);
        return;
    }
    act_pack(&k->compute, &k->act, k->x, p->M, K, K);
    if (p->kind != ACT_PACK)
        matmul(&k->compute, next(p->kind == NF4 ? &k->nf4 : &k->q8), &k->act, NULL, k->y, N);
}

/* Any bytes are codes, so a part of the large matrix is one too. */
static void multiply_dx(void *arg)
{
    const struct product *p = arg;
    struct kernels *k = p->k;
    struct matrix w = *next(p->kind == DX ? &k->nf4 : &k->f32);
    w.N = p->outputs;
    w.K = p->inputs;
    if (p->kind == DX)
        matmul_dx(&k->compute, &w, k->y, p->M, w.N, k->x, w.K, false, k->scratch);
    else
        blas_gemm(false, false, p->M, w.K, w.N, 1.0f, k->y, w.N, w.codes, w.K, 0.0f, k->x, w.K);
}

/* GOP/s: a multiply and an add are two.  Of act_pack: GB/s of fp32 read. */
static int rate(void *arg, double *ret, struct err *err)
{
    const struct product *p = arg;
    const bool dx = p->kind == DX || p->kind == DX_SGEMM;
    (void)err;
    p->k->compute.precision = p->precision;
    const double seconds = bench_time(p->k->b, dx ? multiply_dx : multiply, arg);
    const double ops = 2.0 * p->M * p->outputs * p->inputs, bytes = 4.0 * p->M * p->inputs;
    *ret = (p->kind == ACT_PACK ? bytes : ops) / seconds * 1e-9;
    return ERR_OK;
}

static struct bench_series series_of(struct product *p)
{
    return (struct bench_series){ .name = p->kind == SGEMM || p->kind == DX_SGEMM ? "GOP/s, OpenBLAS fp32"
                                                                                  : kind_names[p->kind],
                                  .unit = p->kind == ACT_PACK ? "GB/s" : "GOP/s", .measure = rate, .arg = p };
}

/* --- rows ------------------------------------------------------------------------------------------- */
enum { READ, BLAS, FIRST, MAX_PRODUCTS = 8, MAX_SERIES = 16 };

/* A product's rows: beside OpenBLAS, of what reading allows, of what the instruction allows. */
static int report(struct kernels *k, const struct product *p, const struct bench_series *s,
                  const struct bench_series *all, const struct bench_series *peak, struct err *err)
{
    struct bench *b = k->b;
    const char *name = kind_names[p->kind], *precision = precision_name(p->precision);
    if (p->kind == ACT_PACK)
        return bench_row(b, s, NULL, 0, err, "kernels.%s.%s.m%d", name, precision, p->M);
    const struct copies *c = p->kind == NF4 ? &k->nf4 : &k->q8;
    const double ops = 2.0 * p->M * N * K;
    int rc = bench_row(b, s, &all[BLAS], 1, err, "kernels.%s.%s.m%d", name, precision, p->M);
    if (rc == ERR_OK && p->M <= 16) {
        const struct bench_series bytes =
            bench_scaled(s, "GB/s", (double)(c->code_bytes + c->scale_bytes) / ops);
        rc = bench_row(b, &bytes, &all[READ], 1, err, "kernels.%s.%s.m%d.read", name, precision, p->M);
    }
    if (rc == ERR_OK && p->M >= 4 && peak != NULL)
        rc = bench_row(b, s, peak, 1, err, "kernels.%s.%s.m%d.peak", name, precision, p->M);
    return rc;
}

static int forward_rows(struct kernels *k, int M, struct err *err)
{
    struct bench *b = k->b;
    struct product p[MAX_PRODUCTS], blas = { k, SGEMM, PREC_F32, M, N, K };
    struct bench_series s[MAX_SERIES];
    const struct bench_series *peak[2] = { NULL, NULL };
    int np = 0, n = FIRST;
    s[READ] = bench_reader_series(&k->reader);
    s[BLAS] = series_of(&blas);
    for (int precision = PREC_FAST; precision <= PREC_EXACT; precision++)
        for (int kind = NF4; kind <= ACT_PACK && b->precisions[precision]; kind++) {
            p[np] = (struct product){ k, (enum kind)kind, (enum precision)precision, M, N, K };
            s[n++] = series_of(&p[np++]);
        }
    int rc = ERR_OK, all = n;
    for (int precision = PREC_FAST; precision <= PREC_EXACT; precision++)
        if (b->precisions[precision] &&
            bench_peak_series(b, (enum precision)precision, &k->peak[precision], &s[all]))
            peak[precision] = &s[all++];
    rc = bench_measure(b, s, all, err);
    for (int i = 0; i < np && rc == ERR_OK; i++)
        rc = report(k, &p[i], &s[FIRST + i], s, peak[p[i].precision], err);
    return rc;
}

static int backward_rows(struct kernels *k, int outputs, int inputs, struct err *err)
{
    struct product p[] = { { k, DX, PREC_EXACT, M_MAX, outputs, inputs },
                           { k, DX, PREC_F32, M_MAX, outputs, inputs },
                           { k, DX_SGEMM, PREC_F32, M_MAX, outputs, inputs } };
    struct bench_series s[3] = { series_of(&p[0]), series_of(&p[1]), series_of(&p[2]) };
    int rc = bench_measure(k->b, s, 3, err);
    if (rc == ERR_OK)
        rc = bench_row(k->b, &s[0], &s[2], 1, err, "kernels.dx.quick.%dx%d", outputs, inputs);
    if (rc == ERR_OK)
        rc = bench_row(k->b, &s[1], &s[2], 1, err, "kernels.dx.f32.%dx%d", outputs, inputs);
    return rc;
}

static int run(struct bench *b, struct err *err)
{
    static const int shapes[][2] = { { 5632, 2048 }, { 2048, 5632 }, { 2048, 2048 }, { 256, 2048 } };
    struct kernels k;
    if (!bench_room(b, "kernels", 6 * POOL_BYTES + ((size_t)512 << 20)))
        return ERR_OK;
    int rc = open_kernels(b, &k, err);
    blas_threads(pool_threads(b->compute.pool));
    for (int i = 0; i < NROWS && rc == ERR_OK; i++)
        rc = forward_rows(&k, rows[i], err);
    for (int i = 0; i < 4 && rc == ERR_OK; i++)
        rc = backward_rows(&k, shapes[i][0], shapes[i][1], err);
    blas_threads(1);
    close_kernels(&k);
    return rc;
}

const struct bench_part bench_kernels = { "kernels", "matrix products of 1 to 512 rows beside the bandwidth "
                                          "of memory, the multiply-add instruction, and OpenBLAS", run };
