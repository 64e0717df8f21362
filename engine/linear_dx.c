/* linear_dx.c - dX = dY W: how the work is cut, and which kernel does it.
 *
 * A piece is 64 columns of dx (a block of the packed layouts) by some rows.  For every chunk of
 * rows of W (64 in fp32, 128 in bf16) it unpacks a tile once, 16 KB that stay in L1, and multiplies
 * all its rows of dy with it; dy has been packed before, in the order in which pieces read it.
 * Sums over chunks are kept beside the tile and reach dx at the end.
 *
 * Cut for the sake of scratch: rows of dy go in groups of ROWS, and the rows of W in stretches of
 * STRETCH, each adding to dx what it has.  The order of additions of an element of dx:
 *     inside a chunk from 0, n ascending; chunks ascending from 0; stretches ascending. */
#include "engine/linear_dx.h"
#include "engine/linear_dx_int.h"
#include "engine/linear_int.h"

#include <string.h>

enum { ROWS = 512, STRETCH = 8192, LEAST_ROWS = 96 };

static size_t least(size_t a, size_t b) { return a < b ? a : b; }
static size_t ceil_div(size_t a, size_t b) { return (a + b - 1) / b; }

static const struct dx_ops *ops_of(const struct compute *c, const struct matrix *w)
{
#if defined(__x86_64__)
    const bool quick = c->precision != PREC_F32 &&
                       (w->type == MAT_NF4_P16 || w->type == MAT_Q8_P16 || w->type == MAT_BF16);
    if (c->isa == ISA_AVX512 && quick && __builtin_cpu_supports("avx512bf16"))
        return &dx_avx512_bf16;
    if (c->isa == ISA_AVX512)
        return &dx_avx512;
    if (c->isa == ISA_AVX2)
        return &dx_avx2;
#endif
    (void)c;
    (void)w;
    return &dx_scalar;
}

/* Rows of W in a tile. */
static size_t chunk_of(const struct dx_ops *ops)
{
    return ops->bf16 ? (size_t)2 * DX_STEPS : (size_t)DX_STEPS;
}

/* --- scratch ----------------------------------------------------------------------------- */

enum { TILE_DWORDS = DX_STEPS * DX_COLUMNS };

/* Dwords of packed dy: [chunk][row][DX_STEPS]. */
static size_t packed_dwords(const struct dx_ops *ops, size_t N, size_t M)
{
    return ceil_div(least(N, STRETCH), chunk_of(ops)) * least(M, ROWS) * DX_STEPS;
}

/* Dwords of one thread: a tile, and a sum for each row. */
static size_t thread_dwords(size_t M) { return TILE_DWORDS + least(M, ROWS) * DX_COLUMNS; }

size_t matmul_dx_scratch(const struct compute *c, const struct matrix *w, int M)
{
    const size_t rows = (size_t)(M > 0 ? M : 0), threads = (size_t)pool_threads(c->pool);
    return 4 * (packed_dwords(ops_of(c, w), (size_t)w->N, rows) + threads * thread_dwords(rows));
}

/* --- the work ---------------------------------------------------------------------------- */

struct dx_task {
    const struct dx_ops *ops;
    const struct matrix *w;
    const float *dy; /* first row of the group */
    float *dx;
    size_t lddy, lddx;
    bool add;
    size_t n0, n1;       /* the stretch */
    size_t rows, strips; /* of the group; of 64 columns */
    size_t piece_rows;
    uint32_t *packed, *threads;
};

static void pack_rows(void *arg, int64_t begin, int64_t end, int thread)
{
    (void)thread;
    const struct dx_task *t = arg;
    const size_t chunk = chunk_of(t->ops);
    for (size_t m = (size_t)begin; m < (size_t)end; m++)
        for (size_t n = t->n0, i = 0; n < t->n1; n += chunk, i++)
            t->ops->pack(t->dy + m * t->lddy + n, least(t->n1 - n, chunk),
                         t->packed + (i * t->rows + m) * DX_STEPS);
}

/* Rows [n, n + len) of columns [k, k + width) for the packed layouts. */
static void tile_panels(const struct dx_task *t, size_t n, size_t len, size_t k, uint32_t *tile)
{
    const struct matrix *w = t->w;
    const bool is_nf4 = w->type == MAT_NF4_P16;
    const size_t blocks = (size_t)w->K / BLOCK, bytes = is_nf4 ? 512 : 1024;
    const size_t steps = t->ops->bf16 ? PANEL / 2 : PANEL;
    for (size_t p = n / PANEL; p * PANEL < n + len; p++, tile += steps * DX_COLUMNS) {
        const size_t block = p * blocks + k / BLOCK;
        const uint8_t *codes = (const uint8_t *)w->codes + block * bytes;
        /* The blocks of a column lie far apart: nobody else will fetch the next one. */
        if ((p + 1) * PANEL < t->n1)
            for (size_t line = 0; line < bytes; line += 64)
                __builtin_prefetch(codes + blocks * bytes + line);
        float scale[PANEL];
        if (w->scales32 != NULL)
            memcpy(scale, w->scales32 + block * PANEL, sizeof scale);
        else
            t->ops->widen(w->scales16 + block * PANEL, scale);
        for (size_t r = 0; r < PANEL && !is_nf4; r++)
            scale[r] *= 1.0f / W8_MAX;
        (is_nf4 ? t->ops->nf4 : t->ops->q8)(codes, scale, tile);
    }
}

/* The same for all other types: row by row, with zeros right of the last column. */
static void tile_rows(const struct dx_task *t, size_t n, size_t len, size_t k, size_t width,
                      uint32_t *tile)
{
    if (width < DX_COLUMNS || t->ops->bf16)
        memset(tile, 0, TILE_DWORDS * sizeof *tile);
    for (size_t i = 0; i < len; i++) {
        if (!t->ops->bf16) {
            float row[DX_COLUMNS];
            matrix_part(t->w, n + i, k, width, row);
            memcpy(tile + i * DX_COLUMNS, row, width * sizeof *row);
            continue;
        }
        const uint16_t *row = (const uint16_t *)t->w->codes + (n + i) * (size_t)t->w->K + k;
        uint32_t *pair = tile + i / 2 * DX_COLUMNS;
        for (size_t j = 0; j < width; j++)
            pair[j] |= (uint32_t)row[j] << (i % 2 * 16);
    }
}

static void dx_piece(const struct dx_task *t, size_t k, size_t m, size_t rows, uint32_t *scratch)
{
    const size_t chunk = chunk_of(t->ops), width = least((size_t)t->w->K - k, DX_COLUMNS);
    const bool panels = t->w->type == MAT_NF4_P16 || t->w->type == MAT_Q8_P16;
    const size_t per_step = t->ops->bf16 ? 2 : 1;
    uint32_t *tile = scratch;
    float *sum = (void *)(scratch + TILE_DWORDS);
    memset(sum, 0, rows * DX_COLUMNS * sizeof *sum);
    for (size_t n = t->n0, i = 0; n < t->n1; n += chunk, i++) {
        const size_t len = least(t->n1 - n, chunk);
        if (panels)
            tile_panels(t, n, len, k, tile);
        else
            tile_rows(t, n, len, k, width, tile);
        t->ops->multiply(tile, (int)ceil_div(len, per_step),
                         t->packed + (i * t->rows + m) * DX_STEPS, (int)rows, sum);
    }
    for (size_t r = 0; r < rows; r++) {
        float *to = t->dx + (m + r) * t->lddx + k;
        const float *from = sum + r * DX_COLUMNS;
        for (size_t j = 0; j < width; j++)
            to[j] = t->add || t->n0 > 0 ? to[j] + from[j] : from[j];
    }
}

static void dx_pieces(void *arg, int64_t begin, int64_t end, int thread)
{
    const struct dx_task *t = arg;
    uint32_t *scratch = t->threads + (size_t)thread * thread_dwords(t->rows);
    for (size_t i = (size_t)begin; i < (size_t)end; i++) {
        const size_t m = i / t->strips * t->piece_rows;
        dx_piece(t, i % t->strips * DX_COLUMNS, m, least(t->rows - m, t->piece_rows), scratch);
    }
}

/* Rows of a piece: all of them where the columns make enough pieces for the threads. */
static size_t piece_rows(size_t rows, size_t strips, size_t threads)
{
    size_t parts = least(ceil_div(8 * threads, strips), ceil_div(rows, LEAST_ROWS));
    return ceil_div(ceil_div(rows, parts), 6) * 6; /* whole groups of the kernels' */
}

void matmul_dx(const struct compute *c, const struct matrix *w, const float *dy, int M, int lddy,
               float *dx, int lddx, bool add, void *scratch)
{
    const size_t N = (size_t)w->N, K = (size_t)w->K;
    struct dx_task t = { .ops = ops_of(c, w), .w = w, .lddy = (size_t)lddy, .lddx = (size_t)lddx };
    t.add = add;
    t.strips = ceil_div(K, DX_COLUMNS);
    for (size_t m = 0; m < (size_t)M; m += ROWS) {
        t.dy = dy + m * t.lddy;
        t.dx = dx + m * t.lddx;
        t.rows = least((size_t)M - m, ROWS);
        t.piece_rows = piece_rows(t.rows, t.strips, (size_t)pool_threads(c->pool));
        t.packed = scratch;
        t.threads = t.packed + packed_dwords(t.ops, N, t.rows);
        /* Waking others costs more than a little work. */
        struct pool *pool = t.rows * N * K >= (size_t)1 << 17 ? c->pool : NULL;
        for (t.n0 = 0; t.n0 < N; t.n0 = t.n1) {
            t.n1 = least(N, t.n0 + STRETCH);
            pool_run(pool, (int64_t)t.rows, 16, pack_rows, &t);
            const size_t pieces = t.strips * ceil_div(t.rows, t.piece_rows);
            pool_run(pool, (int64_t)pieces, 1, dx_pieces, &t);
        }
    }
}
