/* lora.c - the adapters' share of a linear layer, for groups of rows with different adapters.
 *
 * The columns of a group are the ranks of its adapters for the modules that share the input, side by
 * side: by module, then by adapter of the set, then by j.  They are taken in windows of COLS, so
 * that the scratch does not grow with the rank; in each window two loops run over all groups at
 * once:
 *   U   units of (group, 8 rows, 8 columns)
 *   Y   units of (group, 8 rows, module, 512 outputs)
 * Windows ascend and Y walks them in order, so the sums have the order that lora.h promises
 * wherever the cuts lie.  A unit is found by bisection in a table of first units per group, which
 * lives at the end of the scratch. */
#include "engine/lora.h"

#include "engine/dot.h"
#include "engine/lora_int.h"

#include <math.h>

enum { COLS = 256, TILE_ROWS = 8, TILE_COLS = 8, TILE_OUT = 512 };
/* Multiply-adds: below this a loop is not worth waking others, and a piece not worth handing out. */
enum { SERIAL_COST = 65536, PIECE_COST = 32768 };

struct work {
    const struct lora_group *groups;
    int ngroups, layer, nmods;
    const enum module *mods;
    const float *x;
    size_t ldx;
    float *const *y;
    const int *ldy;
    float *u;            /* [row][COLS] */
    int32_t *first_unit; /* [ngroups + 1] */
    int window;          /* first column of this pass */
    const struct dot_ops *dot;
    lora_add_fn add;
};

size_t lora_scratch(int rows) { return (size_t)rows * COLS + (size_t)rows + 1; }

static int imin(int a, int b) { return a < b ? a : b; }
static int imax(int a, int b) { return a > b ? a : b; }
static int ceil_div(int a, int b) { return (a + b - 1) / b; }

static const struct lora_module *module_of(const struct work *w, const struct lora_set *set, int i,
                                           int m)
{
    return adapter_module(set->item[i].adapter, w->layer, w->mods[m]);
}

/* Inputs and outputs of module m; 0 if no adapter of the set has it. */
static int module_in(const struct work *w, const struct lora_set *set, int m)
{
    int in = 0;
    for (int i = 0; i < set->n; i++)
        in = module_of(w, set, i, m)->rank > 0 ? module_of(w, set, i, m)->in : in;
    return in;
}

static int module_out(const struct work *w, const struct lora_set *set, int m)
{
    int out = 0;
    for (int i = 0; i < set->n; i++)
        out = module_of(w, set, i, m)->rank > 0 ? module_of(w, set, i, m)->out : out;
    return out;
}

static int group_cols(const struct work *w, const struct lora_set *set)
{
    int cols = 0;
    for (int m = 0; m < w->nmods; m++)
        for (int i = 0; i < set->n; i++)
            cols += module_of(w, set, i, m)->rank;
    return cols;
}

/* Columns of this pass. */
static int window_cols(const struct work *w, const struct lora_set *set)
{
    return imax(0, imin(COLS, group_cols(w, set) - w->window));
}

static int group_tiles(const struct lora_group *g)
{
    return ceil_div(g->end - g->begin, TILE_ROWS);
}

/* --- walking units ------------------------------------------------------------------------ */
/* The group that unit `n` is of; *ret_rest counts inside it. */
static const struct lora_group *find_unit(const struct work *w, int n, int *ret_rest)
{
    int lo = 0, hi = w->ngroups;
    while (hi - lo > 1) {
        int mid = (lo + hi) / 2;
        if (w->first_unit[mid] <= n)
            lo = mid;
        else
            hi = mid;
    }
    *ret_rest = n - w->first_unit[lo];
    return &w->groups[lo];
}

static void run(const struct compute *c, struct work *w, int64_t units, int64_t cost, pool_fn fn)
{
    if (units == 0)
        return;
    int64_t grain = PIECE_COST / (cost / units + 1);
    pool_run(cost < SERIAL_COST ? NULL : c->pool, units, grain < 1 ? 1 : grain, fn, w);
}

/* --- U ------------------------------------------------------------------------------------ */
static void dots(const struct work *w, const struct lora_module *mod, const float *x, int M, int j,
                 int nj, float *u)
{
    const size_t in = (size_t)mod->in, at = (size_t)j * in;
    if (mod->dtype == DT_F32)
        w->dot->dots_f32(x, w->ldx, M, (const float *)mod->A + at, in, nj, in, u, COLS);
    else if (mod->dtype == DT_BF16)
        w->dot->dots_bf16(x, w->ldx, M, (const uint16_t *)mod->A + at, in, nj, in, u, COLS);
    else
        w->dot->dots_f16(x, w->ldx, M, (const uint16_t *)mod->A + at, in, nj, in, u, COLS);
}

static void u_unit(const struct work *w, const struct lora_group *g, int rest)
{
    const int blocks = imax(1, ceil_div(window_cols(w, g->set), TILE_COLS)); /* has some */
    const int row = g->begin + rest / blocks * TILE_ROWS, M = imin(TILE_ROWS, g->end - row);
    const int lo = w->window + rest % blocks * TILE_COLS;
    const int hi = imin(lo + TILE_COLS, w->window + window_cols(w, g->set));
    int col = 0;
    for (int m = 0; m < w->nmods; m++) {
        for (int i = 0; i < g->set->n; i++) {
            const struct lora_module *mod = module_of(w, g->set, i, m);
            int j0 = imax(lo - col, 0), j1 = imin(hi - col, mod->rank);
            if (j0 < j1) {
                float *u = w->u + (size_t)row * COLS + (col + j0 - w->window);
                dots(w, mod, w->x + (size_t)row * w->ldx, M, j0, j1 - j0, u);
                for (int j = j0; j < j1; j++) {
                    const float gain = mod->gain[j] * g->set->item[i].weight;
                    for (int r = 0; r < M; r++)
                        u[(size_t)r * COLS + (size_t)(j - j0)] *= gain;
                }
            }
            col += mod->rank;
        }
    }
}

static void u_run(void *arg, int64_t begin, int64_t end, int thread)
{
    const struct work *w = arg;
    (void)thread;
    for (int64_t n = begin; n < end; n++) {
        int rest;
        const struct lora_group *g = find_unit(w, (int)n, &rest);
        u_unit(w, g, rest);
    }
}

static void u_pass(const struct compute *c, struct work *w)
{
    int units = 0;
    int64_t cost = 0;
    for (int g = 0; g < w->ngroups; g++) {
        const struct lora_group *gr = &w->groups[g];
        int cols = window_cols(w, gr->set);
        w->first_unit[g] = units;
        if (cols == 0)
            continue;
        units += group_tiles(gr) * ceil_div(cols, TILE_COLS);
        int in = 0; /* the modules share it, but a set may lack some of them */
        for (int m = 0; m < w->nmods; m++)
            in = imax(in, module_in(w, gr->set, m));
        cost += (int64_t)(gr->end - gr->begin) * cols * in;
    }
    w->first_unit[w->ngroups] = units;
    run(c, w, units, cost, u_run);
}

/* --- Y ------------------------------------------------------------------------------------ */
/* Columns [*lo, *hi) of module m that are in this pass. */
static void module_window(const struct work *w, const struct lora_set *set, int m, int *lo, int *hi)
{
    int begin = 0;
    for (int k = 0; k < m; k++)
        for (int i = 0; i < set->n; i++)
            begin += module_of(w, set, i, k)->rank;
    int end = begin;
    for (int i = 0; i < set->n; i++)
        end += module_of(w, set, i, m)->rank;
    *lo = imax(begin, w->window);
    *hi = imax(*lo, imin(end, w->window + COLS));
}

/* Pieces of TILE_OUT outputs of module m; 0 if it has nothing in this pass. */
static int module_pieces(const struct work *w, const struct lora_set *set, int m)
{
    int lo, hi;
    module_window(w, set, m, &lo, &hi);
    return lo == hi ? 0 : ceil_div(module_out(w, set, m), TILE_OUT);
}

static int group_pieces(const struct work *w, const struct lora_set *set)
{
    int n = 0;
    for (int m = 0; m < w->nmods; m++)
        n += module_pieces(w, set, m);
    return n;
}

static void y_piece(const struct work *w, const struct lora_group *g, int row, int m, int piece)
{
    const int M = imin(TILE_ROWS, g->end - row);
    int col = 0;
    for (int k = 0; k < m; k++)
        for (int i = 0; i < g->set->n; i++)
            col += module_of(w, g->set, i, k)->rank;
    for (int i = 0; i < g->set->n; i++) {
        const struct lora_module *mod = module_of(w, g->set, i, m);
        int j0 = imax(w->window - col, 0), j1 = imin(w->window + COLS - col, mod->rank);
        if (j0 < j1) {
            const size_t o = (size_t)piece * TILE_OUT, ldy = (size_t)w->ldy[m];
            const size_t out = (size_t)mod->out;
            const int n = imin(TILE_OUT, mod->out - (int)o);
            const char *bt = (const char *)mod->Bt +
                             ((size_t)j0 * out + o) * dtype_size(mod->dtype);
            w->add(mod->dtype, bt, out, j1 - j0,
                   w->u + (size_t)row * COLS + (col + j0 - w->window), COLS, M,
                   w->y[m] + (size_t)row * ldy + o, ldy, n);
        }
        col += mod->rank;
    }
}

static void y_run(void *arg, int64_t begin, int64_t end, int thread)
{
    const struct work *w = arg;
    (void)thread;
    for (int64_t n = begin; n < end; n++) {
        int rest, m = 0;
        const struct lora_group *g = find_unit(w, (int)n, &rest);
        const int pieces = imax(1, group_pieces(w, g->set)); /* a unit's group has some */
        int row = g->begin + rest / pieces * TILE_ROWS;
        rest %= pieces;
        for (; rest >= module_pieces(w, g->set, m); m++)
            rest -= module_pieces(w, g->set, m);
        y_piece(w, g, row, m, rest);
    }
}

static void y_pass(const struct compute *c, struct work *w)
{
    int units = 0;
    int64_t cost = 0;
    for (int g = 0; g < w->ngroups; g++) {
        const struct lora_group *gr = &w->groups[g];
        int pieces = group_pieces(w, gr->set);
        w->first_unit[g] = units;
        units += group_tiles(gr) * pieces;
        cost += (int64_t)(gr->end - gr->begin) * pieces * TILE_OUT * window_cols(w, gr->set) /
                w->nmods;
    }
    w->first_unit[w->ngroups] = units;
    run(c, w, units, cost, y_run);
}

void lora_add_scalar(enum dtype t, const void *bt, size_t ldb, int r, const float *u, size_t ldu,
                     int M, float *y, size_t ldy, int n)
{
    for (size_t m = 0; m < (size_t)M; m++)
        for (size_t j = 0; j < (size_t)r; j++)
            for (size_t o = 0; o < (size_t)n; o++) {
                const size_t at = j * ldb + o;
                float b = t == DT_F32   ? ((const float *)bt)[at]
                          : t == DT_F16 ? f16_to_f32(((const uint16_t *)bt)[at])
                                        : bf16_to_f32(((const uint16_t *)bt)[at]);
                y[m * ldy + o] = fmaf(u[m * ldu + j], b, y[m * ldy + o]);
            }
}

void lora_apply(const struct compute *c, const struct lora_group *groups, int ngroups, int layer,
                const enum module *mods, int nmods, const float *x, int ldx, float *const *y,
                const int *ldy, float *scratch)
{
    struct work w = {
        .groups = groups, .ngroups = ngroups, .layer = layer, .nmods = nmods, .mods = mods,
        .x = x, .ldx = (size_t)ldx, .y = y, .ldy = ldy, .u = scratch, .dot = dot_ops(c->isa),
        .add = lora_add_scalar,
    };
#if defined(__x86_64__)
    if (c->isa == ISA_AVX2)
        w.add = lora_add_avx2;
    if (c->isa == ISA_AVX512)
        w.add = lora_add_avx512;
#endif
    int cols = 0;
    for (int g = 0; g < ngroups; g++)
        cols = imax(cols, group_cols(&w, groups[g].set));
    if (cols == 0)
        return;
    w.first_unit = (void *)(scratch + (size_t)groups[ngroups - 1].end * COLS);
    for (w.window = 0; w.window < cols; w.window += COLS) {
        u_pass(c, &w);
        y_pass(c, &w);
    }
}
