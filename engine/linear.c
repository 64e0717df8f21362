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
 * once per chunk and from L1 for every other tile of it. */
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

struct matmul_task {
    const struct matrix *w;
    const struct act *a;
    const float *bias;
    float *y;
    size_t ldy;
    int chunk_rows; /* a multiple of TILE */
    /* quantised products */
    panel_fn kernel;
    struct packed packed;
    size_t code_size, block_bytes;
    float unit;
    int pairs; /* of panels */
    /* fp32 products */
    const struct dot_ops *dot;
};

/* Pieces are numbered chunk by chunk, so that threads share a chunk's activations. */
static void quantised_piece(void *arg, int64_t begin, int64_t end, int thread)
{
    (void)thread;
    const struct matmul_task *t = arg;
    const struct matrix *w = t->w;
    const size_t blocks = (size_t)w->K / BLOCK;
    for (int64_t i = begin; i < end; i++) {
        const int first = (int)(i % t->pairs) * 2 * PANEL;
        const size_t panel = (size_t)first / PANEL;
        const int m0 = (int)(i / t->pairs) * t->chunk_rows;
        const int m1 = least((int64_t)m0 + t->chunk_rows, t->a->M);
        for (int m = m0; m < m1; m += TILE) {
            const size_t at = (size_t)m * blocks;
            const struct panel_job j = {
                .codes = (const uint8_t *)w->codes + panel * blocks * t->block_bytes,
                .scales = w->scales16 + panel * blocks * PANEL,
                .blocks = (int)blocks,
                .rows = least(t->a->M - m, TILE),
                .act = t->packed.codes + at * BLOCK * t->code_size,
                .act_scale = t->packed.scale + at,
                .act_start = t->packed.start + at,
                .unit = t->unit,
                .bias = t->bias != NULL ? t->bias + first : NULL,
                .y = t->y + (size_t)m * t->ldy + first,
                .ldy = t->ldy,
                .outputs = least(w->N - first, 2 * PANEL),
            };
            t->kernel(&j);
        }
    }
}

/* Dense weights are read where they lie. */
static void dense_piece(void *arg, int64_t begin, int64_t end, int thread)
{
    (void)thread;
    const struct matmul_task *t = arg;
    const struct matrix *w = t->w;
    const size_t K = (size_t)w->K, ldx = (size_t)t->a->ldx, at = (size_t)begin * K;
    const int N = (int)(end - begin);
    for (int m = 0; m < t->a->M; m += t->chunk_rows) {
        const int rows = least(t->a->M - m, t->chunk_rows);
        const float *x = t->a->x + (size_t)m * ldx;
        float *y = t->y + (size_t)m * t->ldy + begin;
        if (w->type == MAT_F32)
            t->dot->dots_f32(x, ldx, rows, (const float *)w->codes + at, K, N, K, y, t->ldy);
        else if (w->type == MAT_F16)
            t->dot->dots_f16(x, ldx, rows, (const uint16_t *)w->codes + at, K, N, K, y, t->ldy);
        else
            t->dot->dots_bf16(x, ldx, rows, (const uint16_t *)w->codes + at, K, N, K, y, t->ldy);
        for (int r = 0; t->bias != NULL && r < rows; r++)
            for (int n = 0; n < N; n++)
                y[(size_t)r * t->ldy + (size_t)n] += t->bias[begin + n];
    }
}

/* Rows of weights are dequantised a part at a time, for 16 rows of x at once. */
static void dequantised_piece(void *arg, int64_t begin, int64_t end, int thread)
{
    (void)thread;
    const struct matmul_task *t = arg;
    enum { PART = 8 * BLOCK };
    const size_t K = (size_t)t->w->K;
    for (int64_t n = begin; n < end; n++)
        for (int m0 = 0; m0 < t->a->M; m0 += TILE) {
            const int rows = least(t->a->M - m0, TILE);
            float lanes[TILE][16] = { { 0.0f } }, part[PART];
            for (size_t k = 0; k < K; k += PART) {
                const size_t len = K - k < PART ? K - k : PART;
                matrix_part(t->w, (size_t)n, k, len, part);
                for (int m = 0; m < rows; m++)
                    t->dot->lanes_f32(t->a->x + (size_t)(m0 + m) * (size_t)t->a->ldx + k, part, len,
                                      lanes[m]);
            }
            for (int m = 0; m < rows; m++) {
                float sum = dot_tree(lanes[m]);
                t->y[(size_t)(m0 + m) * t->ldy + (size_t)n] =
                    t->bias != NULL ? sum + t->bias[n] : sum;
            }
        }
}

/* About eight pieces per thread, so that one that is held up costs little; at least 1. */
static int64_t grain_of(const struct compute *c, int64_t n)
{
    const int64_t grain = n / (8 * (int64_t)pool_threads(c->pool));
    return grain > 0 ? grain : 1;
}

/* Threads for M x N x K multiplications; none but the caller where waking them costs more. */
static struct pool *pool_for(const struct compute *c, const struct matmul_task *t)
{
    const int64_t work = (int64_t)t->a->M * t->w->N * t->w->K;
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

static void matmul_quantised(const struct compute *c, struct matmul_task *t)
{
    const bool fast = c->precision == PREC_FAST, nf4 = t->w->type == MAT_NF4_P16;
    const struct linear_ops *ops = linear_ops(c->isa);
    if (nf4)
        t->kernel = fast ? ops->nf4_i8 : ops->nf4_i16;
    else
        t->kernel = fast ? ops->q8_i8 : ops->q8_i16;
    t->packed = packed_parts(c->precision, t->a->packed, t->a->M, t->a->K);
    t->code_size = code_size(c->precision);
    t->block_bytes = nf4 ? 512 : 1024;
    t->unit = nf4 && !fast ? 1.0f / W16_MAX : 1.0f / W8_MAX;
    t->pairs = (t->w->N + 2 * PANEL - 1) / (2 * PANEL);
    t->chunk_rows = chunk_rows(t->a->M, (size_t)t->a->K * t->code_size);
    const int64_t pieces = (int64_t)t->pairs * ((t->a->M + t->chunk_rows - 1) / t->chunk_rows);
    pool_run(pool_for(c, t), pieces, grain_of(c, pieces), quantised_piece, t);
}

void matmul(const struct compute *c, const struct matrix *w, const struct act *a, const float *bias,
            float *y, int ldy)
{
    assert(w->K == a->K);
    struct matmul_task t = { .w = w, .a = a, .bias = bias, .y = y, .ldy = (size_t)ldy };
    if (a->M <= 0)
        return;
    const bool panels = w->type == MAT_NF4_P16 || w->type == MAT_Q8_P16;
    if (panels && is_packed(c->precision, w->K)) {
        matmul_quantised(c, &t);
        return;
    }
    t.dot = dot_ops(c->isa);
    t.chunk_rows = chunk_rows(a->M, (size_t)w->K * sizeof(float));
    const bool dense = w->type == MAT_F32 || w->type == MAT_BF16 || w->type == MAT_F16;
    /* Whole groups of four rows, which the dense kernels take at once. */
    const int64_t grain = (grain_of(c, w->N) + 3) / 4 * 4;
    pool_run(pool_for(c, &t), w->N, grain, dense ? dense_piece : dequantised_piece, &t);
}
