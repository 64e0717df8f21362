/* lora.c - the adapters' share of a linear layer, for groups of rows with different adapters.
 *
 * Sixteen rows with an adapter each read nearly as many bytes of adapters as of the base's weights,
 * and compute far less with them.  The base's products, at that number of rows, are bound by
 * arithmetic.  So the two are interleaved:
 *   U   = X A^T needs x alone and is computed first, for all modules that share x.
 *   Y  += U B^T is an epilogue (linear.h) of the base's product: a tile of y, still in L1, gets what
 *         the adapters of its rows add.  The lines of B that this reads are fetched by the product's
 *         kernel while it computes the tile; B lies in panels (adapter.h) so that they are runs.
 *   A     of the modules that come next is fetched by the kernels too, each piece of the product
 *         taking its share.
 *
 * Columns of U are the ranks of a group's adapters for these modules, side by side: by module, then
 * by adapter of the set, then by j.  They are taken in windows of COLS, so that the scratch does not
 * grow with the rank: the epilogue adds the first, lora_end() computes and adds the others.  Windows
 * ascend, so the sums have the order that lora.h promises wherever the cuts lie.
 *
 * A term is what one adapter has in the window for one module and the rows of one group.  Terms are
 * ordered by module, then by row, then as in the set; `first` gives the first that reaches into a
 * tile of rows.  U's units are 8 rows by 8 columns of a term and are found by bisection. */
#include "engine/lora.h"

#include "engine/dot.h"
#include "engine/lora_int.h"

#include <assert.h>
#include <math.h>
#include <string.h>

enum { COLS = 256, UNIT_ROWS = 8, UNIT_COLS = 8, ROW_TILE = 16, STRIP = 256 };
/* Multiply-adds: below this a loop is not worth waking others, and a piece not worth handing out. */
enum { SERIAL_COST = 65536, PIECE_COST = 32768 };
/* Of the A that come next: a part of a cache that all threads share. */
enum { AHEAD_LINES = (8 << 20) / 64, AHEAD_RUNS = 256 };

struct lora_term {
    const struct lora_module *mod;
    float weight;
    int begin, end; /* rows */
    int j, n;       /* n of its ranks, from j on, */
    int col;        /* are these columns of U */
    int unit;       /* its first unit of U */
    /* of mod, where a tile finds them at once */
    int out, rank;
    enum dtype dtype;
    size_t size;    /* of an element */
    const char *B;
};

/* A run of lines; `first`: how many are before it. */
struct lora_ahead {
    const char *at;
    int first;
};

static int imin(int a, int b) { return a < b ? a : b; }
static int imax(int a, int b) { return a > b ? a : b; }
static int ceil_div(int a, int b) { return (a + b - 1) / b; }

/* --- scratch ------------------------------------------------------------------------------ */
static void *carve(char *scratch, size_t *at, size_t bytes)
{
    void *p = scratch != NULL ? scratch + *at : NULL;
    *at += (bytes + 63) & ~(size_t)63;
    return p;
}

/* Set the pointers into `scratch` (or nowhere, to measure); returns the bytes. */
static size_t lay_out(struct lora_work *w, void *scratch, int rows)
{
    const size_t T = (size_t)rows, tiles = (size_t)ceil_div(rows, ROW_TILE);
    size_t at = 0;
    w->u = carve(scratch, &at, T * COLS * sizeof *w->u);
    w->terms = carve(scratch, &at, T * LORA_SET_MAX * PRODUCTS_MAX * sizeof *w->terms);
    w->ahead = carve(scratch, &at, AHEAD_RUNS * sizeof *w->ahead);
    w->columns = carve(scratch, &at, T * sizeof *w->columns);
    w->first = carve(scratch, &at, tiles * PRODUCTS_MAX * sizeof *w->first);
    return at;
}

size_t lora_scratch(int rows)
{
    struct lora_work w;
    return lay_out(&w, NULL, rows) / sizeof(float);
}

/* --- terms -------------------------------------------------------------------------------- */
static int module_terms(struct lora_work *w, int m, int n)
{
    for (int g = 0; g < w->ngroups; g++) {
        const struct lora_group *gr = &w->groups[g];
        for (int i = 0; i < gr->set->n; i++) {
            const struct lora_item *item = &gr->set->item[i];
            const struct lora_module *mod = adapter_module(item->adapter, w->where.layer,
                                                           (int)w->where.mods[m]);
            const int col = w->columns[g] - w->window;
            const int j = imax(0, -col), end = imin(mod->rank, COLS - col);
            if (j < end) {
                w->terms[n] = (struct lora_term){
                    .mod = mod, .weight = item->weight, .begin = gr->begin, .end = gr->end, .j = j,
                    .n = end - j, .col = col + j, .out = mod->out, .rank = mod->rank,
                    .dtype = mod->dtype, .size = dtype_size(mod->dtype), .B = mod->B,
                };
                n++;
            }
            w->columns[g] += mod->rank;
        }
    }
    return n;
}

/* Terms of the window; false if there are none. */
static bool make_terms(struct lora_work *w)
{
    const int rows = w->groups[w->ngroups - 1].end, tiles = ceil_div(rows, ROW_TILE);
    int n = 0;
    memset(w->columns, 0, (size_t)w->ngroups * sizeof *w->columns);
    for (int m = 0; m < w->where.nmods; m++) {
        int at = n;
        w->end[m] = n = module_terms(w, m, n);
        for (int t = 0; t < tiles; t++) {
            while (at < n && w->terms[at].end <= t * ROW_TILE)
                at++;
            w->first[m * tiles + t] = at;
        }
    }
    w->tiles = tiles;
    w->nterms = n;
    w->widest = 0;
    for (int g = 0; g < w->ngroups; g++)
        w->widest = imax(w->widest, w->columns[g]);
    return n > 0;
}

/* --- U ------------------------------------------------------------------------------------ */
static void dots(const struct lora_work *w, const struct lora_module *mod, int row, int M, int j,
                 int nj, float *u)
{
    const float *x = w->x + (size_t)row * w->ldx;
    const size_t in = (size_t)mod->in, at = (size_t)j * in;
    if (mod->dtype == DT_F32)
        w->dot->dots_f32(x, w->ldx, M, (const float *)mod->A + at, in, nj, in, u, COLS);
    else if (mod->dtype == DT_BF16)
        w->dot->dots_bf16(x, w->ldx, M, (const uint16_t *)mod->A + at, in, nj, in, u, COLS);
    else
        w->dot->dots_f16(x, w->ldx, M, (const uint16_t *)mod->A + at, in, nj, in, u, COLS);
}

static void u_unit(const struct lora_work *w, const struct lora_term *t, int rest)
{
    const int blocks = ceil_div(t->n, UNIT_COLS);
    const int row = t->begin + rest / blocks * UNIT_ROWS, M = imin(UNIT_ROWS, t->end - row);
    const int at = rest % blocks * UNIT_COLS, n = imin(UNIT_COLS, t->n - at);
    float *u = w->u + (size_t)row * COLS + (size_t)(t->col + at);
    dots(w, t->mod, row, M, t->j + at, n, u);
    for (int j = 0; j < n; j++) {
        const float gain = t->mod->gain[t->j + at + j] * t->weight;
        for (int r = 0; r < M; r++)
            u[(size_t)r * COLS + (size_t)j] *= gain;
    }
}

/* The term that unit n is of. */
static const struct lora_term *find_unit(const struct lora_work *w, int n)
{
    int lo = 0, hi = w->nterms;
    while (hi - lo > 1) {
        int mid = (lo + hi) / 2;
        if (w->terms[mid].unit <= n)
            lo = mid;
        else
            hi = mid;
    }
    return &w->terms[lo];
}

static void u_run(void *arg, int64_t begin, int64_t end, int thread)
{
    const struct lora_work *w = arg;
    (void)thread;
    for (int64_t n = begin; n < end; n++) {
        const struct lora_term *t = find_unit(w, (int)n);
        u_unit(w, t, (int)n - t->unit);
    }
}

static void run(struct lora_work *w, int64_t units, int64_t cost, pool_fn fn)
{
    if (units == 0)
        return;
    const int64_t grain = PIECE_COST / (cost / units + 1);
    pool_run(cost < SERIAL_COST ? NULL : w->c->pool, units, grain < 1 ? 1 : grain, fn, w);
}

static void compute_u(struct lora_work *w)
{
    int units = 0;
    int64_t cost = 0;
    for (int i = 0; i < w->nterms; i++) {
        struct lora_term *t = &w->terms[i];
        const int rows = t->end - t->begin;
        t->unit = units;
        units += ceil_div(rows, UNIT_ROWS) * ceil_div(t->n, UNIT_COLS);
        cost += (int64_t)rows * t->n * t->mod->in;
    }
    run(w, units, cost, u_run);
}

/* --- Y ------------------------------------------------------------------------------------ */
/* Where B of output o is, from the term's first rank on (lora_b_index()); *width: elements from a
 * rank to the next. */
static const char *b_at(const struct lora_term *t, int o, int *width)
{
    const int first = o - o % ADAPTER_PANEL;
    *width = imin(ADAPTER_PANEL, t->out - first);
    const int64_t at = (int64_t)first * t->rank + (int64_t)t->j * *width + (o - first);
    return t->B + (size_t)at * t->size;
}

/* Outputs [first, first + outputs) of rows [row, end). */
static void add_term(const struct lora_work *w, const struct lora_term *t, int m, int row, int end,
                     int first, int outputs)
{
    const size_t ldy = (size_t)w->ldy[m];
    const float *u = w->u + (size_t)row * COLS + (size_t)t->col;
    float *y = w->y[m] + (size_t)row * ldy;
    const int last = imin(first + outputs, t->out);
    for (int o = first, n; o < last; o += n) {
        int width;
        const char *b = b_at(t, o, &width);
        n = imin(last - o, ADAPTER_PANEL - o % ADAPTER_PANEL);
        w->add(t->dtype, b, (size_t)width, t->n, u, COLS, end - row, y + o, ldy, n);
    }
}

/* An epilogue's part.  Rows of a tile are those of a few neighbouring terms. */
static void add_part(void *arg, const struct y_part *p)
{
    const struct lora_work *w = arg;
    const int m = p->product, end = p->row + p->rows;
    for (int i = w->first[m * w->tiles + p->row / ROW_TILE]; i < w->end[m]; i++) {
        const struct lora_term *t = &w->terms[i];
        if (t->begin >= end)
            break;
        if (t->end > p->row)
            add_term(w, t, m, imax(t->begin, p->row), imin(t->end, end), p->first, p->outputs);
    }
}

static int lines_of(size_t bytes) { return (int)((bytes + 63) / 64); }

/* What add_part() will read, and a share of the A that come next. */
static int part_wants(void *arg, const struct y_part *p, int64_t piece, int64_t pieces,
                      struct lines *ret)
{
    const struct lora_work *w = arg;
    const int m = p->product, end = p->row + p->rows;
    const int begin = (int)(w->ahead_lines * piece / pieces);
    const int until = (int)(w->ahead_lines * (piece + 1) / pieces);
    int n = 0;
    for (int i = w->first[m * w->tiles + p->row / ROW_TILE]; i < w->end[m]; i++) {
        const struct lora_term *t = &w->terms[i];
        int width;
        if (t->begin >= end || n == EPILOGUE_LINES / 2)
            break;
        const char *b = b_at(t, p->first, &width);
        ret[n++] = (struct lines){ b, lines_of((size_t)t->n * (size_t)width * t->size) };
    }
    int at = 0;
    for (int hi = w->nahead; hi - at > 1;) { /* the last run that begins at or before `begin` */
        const int mid = (at + hi) / 2;
        *(w->ahead[mid].first <= begin ? &at : &hi) = mid;
    }
    for (int line = begin; line < until && n < EPILOGUE_LINES; at++) {
        const int last = at + 1 < w->nahead ? w->ahead[at + 1].first : w->ahead_lines;
        const int stop = imin(last, until);
        ret[n++] = (struct lines){ w->ahead[at].at + (size_t)(line - w->ahead[at].first) * 64,
                                   stop - line };
        line = stop;
    }
    return n;
}

/* List the A of modules that come next. */
static void look_ahead(struct lora_work *w, const struct lora_where *next)
{
    w->nahead = w->ahead_lines = 0;
    for (int m = 0; next != NULL && m < next->nmods; m++)
        for (int g = 0; g < w->ngroups; g++) {
            const struct lora_set *set = w->groups[g].set;
            for (int i = 0; i < set->n; i++) {
                const struct lora_module *mod = adapter_module(set->item[i].adapter, next->layer,
                                                               (int)next->mods[m]);
                const size_t bytes = (size_t)mod->rank * (size_t)mod->in * dtype_size(mod->dtype);
                if (mod->rank == 0)
                    continue;
                if (w->nahead == AHEAD_RUNS || w->ahead_lines + lines_of(bytes) > AHEAD_LINES)
                    return;
                w->ahead[w->nahead++] = (struct lora_ahead){ mod->A, w->ahead_lines };
                w->ahead_lines += lines_of(bytes);
                __builtin_prefetch(mod->gain, 0, 2);
            }
        }
}

/* --- all of it ---------------------------------------------------------------------------- */
lora_add_fn lora_add(enum isa isa)
{
#if defined(__x86_64__)
    if (isa == ISA_AVX512)
        return lora_add_avx512;
    if (isa == ISA_AVX2)
        return lora_add_avx2;
#endif
    (void)isa;
    return lora_add_scalar;
}

void lora_add_scalar(enum dtype t, const void *b, size_t ldb, int r, const float *u, size_t ldu,
                     int M, float *y, size_t ldy, int n)
{
    for (size_t m = 0; m < (size_t)M; m++)
        for (size_t j = 0; j < (size_t)r; j++)
            for (size_t o = 0; o < (size_t)n; o++) {
                const size_t at = j * ldb + o;
                float f = t == DT_F32   ? ((const float *)b)[at]
                          : t == DT_F16 ? f16_to_f32(((const uint16_t *)b)[at])
                                        : bf16_to_f32(((const uint16_t *)b)[at]);
                y[m * ldy + o] = fmaf(u[m * ldu + j], f, y[m * ldy + o]);
            }
}

void lora_begin(struct lora_work *w, const struct compute *c, const struct lora_group *groups,
                int ngroups, const struct lora_where *where, const struct lora_where *next,
                const float *x, int ldx, float *const *y, const int *ldy, float *scratch)
{
    *w = (struct lora_work){
        .c = c, .groups = groups, .ngroups = ngroups, .where = *where, .x = x, .ldx = (size_t)ldx,
        .y = y, .ldy = ldy, .dot = dot_ops(c->isa), .add = lora_add(c->isa),
        .epilogue = { w, add_part, part_wants },
    };
    assert(where->nmods <= PRODUCTS_MAX);
    if (ngroups == 0)
        return;
    lay_out(w, scratch, groups[ngroups - 1].end);
    if (make_terms(w))
        compute_u(w);
    look_ahead(w, next);
}

const struct epilogue *lora_epilogue(struct lora_work *w)
{
    return w->nterms > 0 || w->nahead > 0 ? &w->epilogue : NULL;
}

/* Without a product to go with: units of (module, 16 rows, STRIP outputs). */
static void y_run(void *arg, int64_t begin, int64_t end, int thread)
{
    struct lora_work *w = arg;
    (void)thread;
    for (int64_t n = begin; n < end; n++) {
        const int strip = (int)(n % w->strips), tile = (int)(n / w->strips) % w->tiles;
        const int m = (int)(n / w->strips) / w->tiles;
        add_part(w, &(struct y_part){ m, tile * ROW_TILE, ROW_TILE, strip * STRIP, STRIP });
    }
}

static void add_window(struct lora_work *w)
{
    int widest = 0;
    int64_t cost = 0;
    for (int i = 0; i < w->nterms; i++) {
        const struct lora_term *t = &w->terms[i];
        widest = imax(widest, t->mod->out);
        cost += (int64_t)(t->end - t->begin) * t->n * t->mod->out;
    }
    w->strips = ceil_div(widest, STRIP);
    run(w, (int64_t)w->strips * w->tiles * w->where.nmods, cost, y_run);
}

void lora_end(struct lora_work *w)
{
    for (w->window = COLS; w->window < w->widest; w->window += COLS)
        if (make_terms(w)) {
            compute_u(w);
            add_window(w);
        }
}

void lora_apply(const struct compute *c, const struct lora_group *groups, int ngroups,
                const struct lora_where *where, const float *x, int ldx, float *const *y,
                const int *ldy, float *scratch)
{
    struct lora_work w;
    lora_begin(&w, c, groups, ngroups, where, NULL, x, ldx, y, ldy, scratch);
    add_window(&w);
    lora_end(&w);
}
