/* linear.c - y = x W^T: which kernel for which matrix, and how the work is cut.
 *
 * What is computed, to the last bit, is defined elsewhere: linear_scalar.c for quantised products
 * (MAT_NF4_P16 and MAT_Q8_P16 in PREC_FAST and PREC_EXACT), dot.h for everything else, where the
 * weights are widened or dequantised and the bias is added last.  A dequantised weight is
 *     NF4      code value * scale          8 bit    code * (scale * (1 / 127))
 * with one rounding per operation.  This file only decides who computes which outputs; no sum is
 * ever cut differently because of it.
 *
 * Cutting: a piece of work is a run of panels times a chunk of rows.  A chunk is as many tiles of
 * activations as fit in a part of the L2 cache, so that each panel of weights is read from memory
 * once per chunk and from L1 for every other tile of it.  The pieces of products that share x are
 * numbered one after the other, so that threads meet once for all of them.  Each thread begins at a
 * place of its own: two that read neighbouring panels in turn get less from memory than two that are far
 * from each other (Zen 4, one row: 4 to 6 % less).
 *
 * From about four rows on arithmetic takes longer than reading the weights, and memory idles.  An
 * epilogue (adapters: lora.c) uses that: it names lines that it or somebody after it will read, and
 * the kernels prefetch a few of them for every block that they compute.  What it adds is added as
 * soon as a tile is computed: y is in L1, and the threads need not meet once more. */
#include "engine/linear.h"
#include "engine/dot.h"
#include "engine/linear_int.h"
#include "engine/mem.h"
#include "engine/nf4.h"
#include "engine/num.h"

#include <assert.h>
#include <math.h>
#include <stdbool.h>
#include <string.h>

/* Activations of a chunk: leaves room beside them in the 512 KiB of the smallest L2 in use. */
enum { CHUNK_BYTES = 384 << 10 };

static const struct linear_ops *linear_ops(enum isa isa)
{
#if defined(__x86_64__)
    if (isa == ISA_AVX512)
        return &linear_avx512;
    if (isa == ISA_AVX2)
        return &linear_avx2;
#endif
    (void)isa;
    return &linear_scalar;
}

static int least(int64_t a, int64_t b) { return (int)(a < b ? a : b); }

/* --- 8-bit weights ----------------------------------------------------------------------- */

void q8_pack(const float *w, size_t N, size_t K, uint8_t *codes, uint16_t *scales16)
{
    const size_t blocks = K / BLOCK, panels = (N + PANEL - 1) / PANEL;
    memset(codes, 128, q8_bytes(N, K));
    memset(scales16, 0, panels * PANEL * blocks * sizeof *scales16);
    for (size_t n = 0; n < N; n++)
        for (size_t b = 0; b < blocks; b++) {
            const float *in = w + n * K + b * BLOCK;
            const size_t block = n / PANEL * blocks + b, lane = n % PANEL;
            float most = 0.0f;
            for (int k = 0; k < BLOCK; k++)
                most = fabsf(in[k]) > most ? fabsf(in[k]) : most;
            /* Codes are made for the scale as it is stored. */
            const uint16_t scale16 = f32_to_f16(most);
            const float scale = f16_to_f32(scale16);
            scales16[block * PANEL + lane] = scale16;
            uint8_t *out = codes + block * (BLOCK * PANEL) + 4 * lane;
            for (int k = 0; k < BLOCK && scale > 0.0f; k++) {
                float code = rintf(in[k] / scale * W8_MAX);
                code = fminf(fmaxf(code, -W8_MAX), W8_MAX);
                out[k / 4 * 64 + k % 4] = (uint8_t)((int)code + 128);
            }
        }
}

/* --- single weights ---------------------------------------------------------------------- */

/* Scale of block k / 64 of row n in a panel layout. */
static float panel_scale(const struct matrix *w, size_t n, size_t k)
{
    const size_t at = (n / PANEL * ((size_t)w->K / BLOCK) + k / BLOCK) * PANEL + n % PANEL;
    return w->scales32 != NULL ? w->scales32[at] : f16_to_f32(w->scales16[at]);
}

static void weights_p16(const struct matrix *w, size_t n, size_t k, size_t len, float *ret)
{
    const uint8_t *panel = (const uint8_t *)w->codes + n / PANEL * (size_t)w->K * 8;
    for (size_t i = 0; i < len; i += 8) {
        const uint8_t *in = panel + (k + i) / 8 * 64 + n % PANEL * 4;
        const float scale = panel_scale(w, n, k + i);
        for (int j = 0; j < 4; j++) {
            ret[i + (size_t)j] = nf4_code[in[j] & 15] * scale;
            ret[i + (size_t)j + 4] = nf4_code[in[j] >> 4] * scale;
        }
    }
}

static void weights_q8(const struct matrix *w, size_t n, size_t k, size_t len, float *ret)
{
    const uint8_t *panel = (const uint8_t *)w->codes + n / PANEL * (size_t)w->K * PANEL;
    for (size_t i = 0; i < len; i += 4) {
        const uint8_t *in = panel + (k + i) / 4 * 64 + n % PANEL * 4;
        const float scale = panel_scale(w, n, k + i) * (1.0f / W8_MAX);
        for (int j = 0; j < 4; j++)
            ret[i + (size_t)j] = (float)(in[j] - 128) * scale;
    }
}

static void weights_flat(const struct matrix *w, size_t n, size_t k, size_t len, float *ret)
{
    const uint8_t *codes = w->codes;
    const size_t first = n * (size_t)w->K + k;
    for (size_t i = first; i < first + len; i++) {
        const int code = i % 2 == 0 ? codes[i / 2] >> 4 : codes[i / 2] & 15;
        ret[i - first] = nf4_code[code] * w->scales32[i / NF4_BLOCK];
    }
}

void matrix_part(const struct matrix *w, size_t n, size_t k, size_t len, float *ret)
{
    const size_t at = n * (size_t)w->K + k;
    switch (w->type) {
    case MAT_F32:
        memcpy(ret, (const float *)w->codes + at, len * sizeof *ret);
        break;
    case MAT_BF16:
        for (size_t i = 0; i < len; i++)
            ret[i] = bf16_to_f32(((const uint16_t *)w->codes)[at + i]);
        break;
    case MAT_F16:
        for (size_t i = 0; i < len; i++)
            ret[i] = f16_to_f32(((const uint16_t *)w->codes)[at + i]);
        break;
    case MAT_NF4_P16:
        weights_p16(w, n, k, len, ret);
        break;
    case MAT_NF4_FLAT:
        weights_flat(w, n, k, len, ret);
        break;
    case MAT_Q8_P16:
        weights_q8(w, n, k, len, ret);
        break;
    }
}

void matrix_row(const struct matrix *w, int n, float *ret)
{
    matrix_part(w, (size_t)n, 0, (size_t)w->K, ret);
}

/* --- activations ------------------------------------------------------------------------- */

/* Where the parts of a packed [M, K] begin. */
struct packed {
    char *codes;
    float *scale;
    int32_t *start;
    size_t bytes;
};

static size_t code_size(enum precision p) { return p == PREC_FAST ? 1 : 2; }

static struct packed packed_parts(enum precision p, void *memory, int M, int K)
{
    const size_t blocks = (size_t)M * ((size_t)K / BLOCK), codes = blocks * BLOCK * code_size(p);
    struct packed r = { .bytes = codes + blocks * (sizeof *r.scale + sizeof *r.start) };
    if (memory != NULL) {
        r.codes = memory;
        r.scale = (void *)(r.codes + codes);
        r.start = (void *)(r.scale + blocks);
    }
    return r;
}

/* Is there a kernel that wants x as integers? */
static bool is_packed(enum precision p, int K) { return p != PREC_F32 && K % BLOCK == 0; }

void act_init(struct act *a) { *a = (struct act){ 0 }; }

void act_free(struct act *a)
{
    mem_free(a->packed, a->packed_cap);
    act_init(a);
}

int act_reserve(struct act *a, int M_max, int K_max, struct err *err)
{
    const size_t need = packed_parts(PREC_EXACT, NULL, M_max, K_max).bytes;
    if (need <= a->packed_cap)
        return ERR_OK;
    void *p = mem_alloc(need);
    if (p == NULL)
        return err_nomem(err);
    mem_free(a->packed, a->packed_cap);
    a->packed = p;
    a->packed_cap = need;
    return ERR_OK;
}

struct pack_task {
    const struct act *a;
    pack_fn pack;
    struct packed to;
    size_t code_size;
};

static void pack_rows(void *arg, int64_t begin, int64_t end, int thread)
{
    (void)thread;
    const struct pack_task *t = arg;
    const int blocks = t->a->K / BLOCK;
    for (int64_t m = begin; m < end; m++) {
        const int64_t tile = m - m % TILE;
        const int rows = least(t->a->M - tile, TILE);
        const size_t at = (size_t)tile * (size_t)blocks + (size_t)(m - tile);
        t->pack(t->a->x + (size_t)m * (size_t)t->a->ldx, blocks, rows,
                t->to.codes + at * BLOCK * t->code_size, t->to.scale + at, t->to.start + at);
    }
}

void act_pack(const struct compute *c, struct act *a, const float *x, int M, int K, int ldx)
{
    a->x = x;
    a->M = M;
    a->K = K;
    a->ldx = ldx;
    if (!is_packed(c->precision, K))
        return;
    const struct linear_ops *ops = linear_ops(c->isa);
    struct pack_task t = {
        .a = a,
        .pack = c->precision == PREC_FAST ? ops->pack_i8 : ops->pack_i16,
        .to = packed_parts(c->precision, a->packed, M, K),
        .code_size = code_size(c->precision),
    };
    assert(t.to.bytes <= a->packed_cap);
    /* A row takes about a microsecond: too little to wake anybody for a few of them. */
    pool_run(c->pool, M, M >= 32 ? 8 : M, pack_rows, &t);
}

/* --- products ---------------------------------------------------------------------------- */

/* How a quantised product is computed. */
struct panels {
    panel_fn kernel;
    size_t block_bytes;
    float unit;
    int pairs;     /* of panels */
    int64_t first; /* piece */
};

struct matmul_task {
    const struct act *a;
    const struct mat_product *p;
    const struct epilogue *e;
    int begin, end; /* products that are computed together */
    int chunk_rows; /* a multiple of TILE */
    /* quantised products */
    int64_t pieces;
    struct panels panels[PRODUCTS_MAX];
    struct packed packed;
    size_t code_size;
    /* the fp32 product */
    const struct dot_ops *dot;
};

/* Add to rows [row, row + rows) of outputs [first, first + outputs), which are there. */
static void finish(const struct matmul_task *t, int product, int row, int rows, int first,
                   int outputs)
{
    if (t->e != NULL)
        t->e->add(t->e->arg, &(struct y_part){ product, row, rows, first, outputs });
}

/* One piece: a pair of panels times a chunk of rows. */
static void quantised(const struct matmul_task *t, int64_t piece, int product)
{
    const struct mat_product *p = &t->p[product];
    const struct panels *how = &t->panels[product];
    const size_t blocks = (size_t)p->w->K / BLOCK, ldy = (size_t)p->ldy;
    const int64_t own = piece - how->first;
    const int first = (int)(own % how->pairs) * 2 * PANEL;
    const size_t panel = (size_t)first / PANEL;
    const int m0 = (int)(own / how->pairs) * t->chunk_rows;
    const int m1 = least((int64_t)m0 + t->chunk_rows, t->a->M);
    for (int m = m0; m < m1; m += TILE) {
        const size_t at = (size_t)m * blocks;
        struct lines lines[EPILOGUE_LINES];
        struct panel_job j = {
            .codes = (const uint8_t *)p->w->codes + panel * blocks * how->block_bytes,
            .scales = p->w->scales16 + panel * blocks * PANEL,
            .blocks = (int)blocks,
            .rows = least(t->a->M - m, TILE),
            .act = t->packed.codes + at * BLOCK * t->code_size,
            .act_scale = t->packed.scale + at,
            .act_start = t->packed.start + at,
            .unit = how->unit,
            .bias = p->bias != NULL ? p->bias + first : NULL,
            .y = p->y + (size_t)m * ldy + first,
            .ldy = ldy,
            .outputs = least(p->w->N - first, 2 * PANEL),
        };
        if (t->e != NULL) {
            const struct y_part part = { product, m, j.rows, first, j.outputs };
            const int64_t tiles = t->chunk_rows / TILE, tile = piece * tiles + (m - m0) / TILE;
            const int n = t->e->wanted(t->e->arg, &part, tile, t->pieces * tiles, lines);
            j.fetch.next = lines;
            j.fetch.end = lines + n;
            for (int i = 0; i < n; i++)
                j.fetch.lines += lines[i].n;
        }
        how->kernel(&j);
        finish(t, product, m, j.rows, first, j.outputs);
    }
}

/* Pieces are numbered chunk by chunk, so that threads share a chunk's activations. */
static void quantised_pieces(void *arg, int64_t begin, int64_t end, int thread)
{
    (void)thread;
    const struct matmul_task *t = arg;
    int product = t->begin;
    for (int64_t i = begin; i < end; i++) {
        while (product + 1 < t->end && i >= t->panels[product + 1].first)
            product++;
        quantised(t, i, product);
    }
}

/* Dense weights are read where they lie. */
static void dense_piece(void *arg, int64_t begin, int64_t end, int thread)
{
    (void)thread;
    const struct matmul_task *t = arg;
    const struct mat_product *p = &t->p[t->begin];
    const struct matrix *w = p->w;
    const size_t K = (size_t)w->K, ldx = (size_t)t->a->ldx, at = (size_t)begin * K;
    const size_t ldy = (size_t)p->ldy;
    const int N = (int)(end - begin);
    for (int m = 0; m < t->a->M; m += t->chunk_rows) {
        const int rows = least(t->a->M - m, t->chunk_rows);
        const float *x = t->a->x + (size_t)m * ldx;
        float *y = p->y + (size_t)m * ldy + begin;
        if (w->type == MAT_F32)
            t->dot->dots_f32(x, ldx, rows, (const float *)w->codes + at, K, N, K, y, ldy);
        else if (w->type == MAT_F16)
            t->dot->dots_f16(x, ldx, rows, (const uint16_t *)w->codes + at, K, N, K, y, ldy);
        else
            t->dot->dots_bf16(x, ldx, rows, (const uint16_t *)w->codes + at, K, N, K, y, ldy);
        for (int r = 0; p->bias != NULL && r < rows; r++)
            for (int n = 0; n < N; n++)
                y[(size_t)r * ldy + (size_t)n] += p->bias[begin + n];
        finish(t, t->begin, m, rows, (int)begin, N);
    }
}

/* Rows of weights are dequantised a part at a time, for 16 rows of x at once. */
static void dequantised_piece(void *arg, int64_t begin, int64_t end, int thread)
{
    (void)thread;
    const struct matmul_task *t = arg;
    const struct mat_product *p = &t->p[t->begin];
    enum { PART = 8 * BLOCK };
    const size_t K = (size_t)p->w->K;
    for (int64_t n = begin; n < end; n++)
        for (int m0 = 0; m0 < t->a->M; m0 += TILE) {
            const int rows = least(t->a->M - m0, TILE);
            float lanes[TILE][16] = { { 0.0f } }, part[PART];
            for (size_t k = 0; k < K; k += PART) {
                const size_t len = K - k < PART ? K - k : PART;
                matrix_part(p->w, (size_t)n, k, len, part);
                for (int m = 0; m < rows; m++)
                    t->dot->lanes_f32(t->a->x + (size_t)(m0 + m) * (size_t)t->a->ldx + k, part, len,
                                      lanes[m]);
            }
            for (int m = 0; m < rows; m++) {
                float sum = dot_tree(lanes[m]);
                p->y[(size_t)(m0 + m) * (size_t)p->ldy + (size_t)n] =
                    p->bias != NULL ? sum + p->bias[n] : sum;
            }
        }
    finish(t, t->begin, 0, t->a->M, (int)begin, (int)(end - begin));
}

/* About eight pieces per thread, so that one that is held up costs little; at least 1. */
static int64_t grain_of(const struct compute *c, int64_t n)
{
    const int64_t grain = n / (8 * (int64_t)pool_threads(c->pool));
    return grain > 0 ? grain : 1;
}

/* Threads for M x N x K multiplications; none but the caller where waking them costs more. */
static struct pool *pool_for(const struct compute *c, int64_t work)
{
    return work >= 1 << 17 ? c->pool : NULL;
}

/* Rows of a chunk, evenly cut, when one row takes `row_bytes`. */
static int chunk_rows(int M, size_t row_bytes)
{
    size_t most = CHUNK_BYTES / (row_bytes * TILE);
    if (most < 1)
        most = 1;
    const size_t tiles = ((size_t)M + TILE - 1) / TILE, chunks = (tiles + most - 1) / most;
    return (int)((tiles + chunks - 1) / chunks) * TILE;
}

static bool has_panels(const struct compute *c, const struct matrix *w)
{
    return (w->type == MAT_NF4_P16 || w->type == MAT_Q8_P16) && is_packed(c->precision, w->K);
}

static struct panels panels_of(const struct compute *c, const struct matrix *w)
{
    const bool fast = c->precision == PREC_FAST, nf4 = w->type == MAT_NF4_P16;
    const struct linear_ops *ops = linear_ops(c->isa);
    return (struct panels){
        .kernel = nf4 ? (fast ? ops->nf4_i8 : ops->nf4_i16) : (fast ? ops->q8_i8 : ops->q8_i16),
        .block_bytes = nf4 ? 512 : 1024,
        .unit = nf4 && !fast ? 1.0f / W16_MAX : 1.0f / W8_MAX,
        .pairs = (w->N + 2 * PANEL - 1) / (2 * PANEL),
    };
}

static void matmul_quantised(const struct compute *c, struct matmul_task *t)
{
    int64_t work = 0;
    t->pieces = 0;
    t->code_size = code_size(c->precision);
    t->packed = packed_parts(c->precision, t->a->packed, t->a->M, t->a->K);
    t->chunk_rows = chunk_rows(t->a->M, (size_t)t->a->K * t->code_size);
    const int chunks = (t->a->M + t->chunk_rows - 1) / t->chunk_rows;
    for (int i = t->begin; i < t->end; i++) {
        t->panels[i] = panels_of(c, t->p[i].w);
        t->panels[i].first = t->pieces;
        t->pieces += (int64_t)t->panels[i].pairs * chunks;
        work += (int64_t)t->a->M * t->p[i].w->N * t->a->K;
    }
    pool_run_apart(pool_for(c, work), t->pieces, grain_of(c, t->pieces), quantised_pieces, t);
}

static void matmul_fp32(const struct compute *c, struct matmul_task *t)
{
    const struct matrix *w = t->p[t->begin].w;
    t->dot = dot_ops(c->isa);
    t->chunk_rows = chunk_rows(t->a->M, (size_t)w->K * sizeof(float));
    const bool dense = w->type == MAT_F32 || w->type == MAT_BF16 || w->type == MAT_F16;
    /* Whole groups of four rows, which the dense kernels take at once. */
    const int64_t grain = (grain_of(c, w->N) + 3) / 4 * 4;
    pool_run(pool_for(c, (int64_t)t->a->M * w->N * w->K), w->N, grain,
             dense ? dense_piece : dequantised_piece, t);
}

void matmul_all(const struct compute *c, const struct act *a, const struct mat_product *p, int n,
                const struct epilogue *e)
{
    struct matmul_task t = { .a = a, .p = p, .e = e };
    assert(n <= PRODUCTS_MAX);
    for (int i = 0; i < n && a->M > 0; i = t.end) {
        assert(p[i].w->K == a->K);
        t.begin = t.end = i;
        while (t.end < n && has_panels(c, p[t.end].w))
            t.end++;
        if (t.end > i) {
            matmul_quantised(c, &t);
        } else {
            t.end++;
            matmul_fp32(c, &t);
        }
    }
}

void matmul(const struct compute *c, const struct matrix *w, const struct act *a, const float *bias,
            float *y, int ldy)
{
    const struct mat_product p = { w, bias, y, ldy };
    matmul_all(c, a, &p, 1, NULL);
}
