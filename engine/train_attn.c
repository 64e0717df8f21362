/* train_attn.c - attention and its derivative, a block of queries at a time.
 *
 * A block is some rows of an example times the query heads that share a key/value head, stacked:
 * row i * heads + h of its matrices is head h of row i.  So one product serves all heads, and few
 * rows make a block, which keeps what is computed above the diagonal small.
 *     S = scale Q K^T, P = softmax(S), O = P V
 *     dV = P^T dO, dP = dO V^T, dS = P (dP - rowsum(dO O)), dQ = scale dS K, dK = scale dS^T Q */
#include "engine/train_attn.h"

#include "engine/blas.h"
#include "engine/dot.h"
#include "engine/ops.h"

#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>

enum { LANES = 16, STACK = 128, MIN_ROWS = 16, MAX_ROWS = 64, LEVELS = 32 };

static int imin(int a, int b) { return a < b ? a : b; }
static int imax(int a, int b) { return a > b ? a : b; }
static int round_up(int n, int to) { return (n + to - 1) / to * to; }

/* Rows of the example in a block. */
static int block_rows(int heads) { return imin(imax(STACK / heads, MIN_ROWS), MAX_ROWS); }
/* From row to row of the scores; not a power of two, whose rows would compete for cache lines. */
static int scores_ld(int n) { return round_up(n, LANES) + LANES; }

/* What one thread works in. */
struct work {
    float *s, *ds;      /* [stack][ld] */
    float *capped;      /* [ld]: one row of scores after softcap */
    float *q, *o, *t;   /* [stack][hd]: Q, dO and a result, stacked */
    float *stat;        /* [stack]: 1 / sum of exponentials */
};

static size_t work_floats(int max_segment, int heads, int hd)
{
    const size_t stack = (size_t)block_rows(heads) * (size_t)heads;
    const size_t ld = (size_t)scores_ld(max_segment);
    const size_t n = 2 * stack * ld + ld + 3 * stack * (size_t)hd + stack;
    return (n + LANES - 1) / LANES * LANES;
}

size_t train_attn_scratch(int max_segment, int H, int G, int hd, int threads)
{
    return work_floats(max_segment, H / G, hd) * (size_t)threads + LANES;
}

struct job {
    const struct train_attn *a;
    const struct ops *ops;
    const struct dot_ops *dot;
    float *out;             /* forward */
    const float *o, *dout;  /* backward */
    struct train_heads dq, dk, dv;
    float *scratch;         /* on a cache line */
    size_t per_thread;      /* floats */
    int max_segment;
    int first[LEVELS + 1];  /* costliest first: pieces of level l begin here */
};

/* Some rows of one example for one key/value head. */
struct block {
    const struct job *j;
    struct work w;
    int begin, g;   /* first row of the example */
    int row, rows;  /* within the example */
    int lo, n;      /* keys [lo, lo + n) */
    int heads, stack, ld;
};

/* --- order of the pieces ------------------------------------------------------------------------- */
/* 0 is the costliest. */
static int level_of(int n)
{
    int bits = 0;
    for (unsigned v = (unsigned)n; v > 0; v /= 2)
        bits++;
    return LEVELS - 1 - imin(bits, LEVELS - 1);
}

static void order(struct job *j)
{
    int count[LEVELS] = { 0 };
    j->max_segment = 0;
    for (int i = 0; i < j->a->nsegs; i++) {
        count[level_of(j->a->segs[i].n)]++;
        j->max_segment = imax(j->max_segment, j->a->segs[i].n);
    }
    j->first[0] = 0;
    for (int l = 0; l < LEVELS; l++)
        j->first[l + 1] = j->first[l] + count[l];
}

/* Number `which` in the order: by level, then as they are listed.  Found anew each time, which is
 * nothing beside the piece and needs no memory. */
static const struct train_segment *segment(const struct job *j, int which)
{
    int level = 0, i = 0;
    while (which >= j->first[level + 1])
        level++;
    for (int left = which - j->first[level];; i++)
        if (level_of(j->a->segs[i].n) == level && left-- == 0)
            return &j->a->segs[i];
}

static struct work work_of(const struct job *j, int thread)
{
    const int heads = j->a->H / j->a->G;
    const size_t stack = (size_t)block_rows(heads) * (size_t)heads;
    const size_t ld = (size_t)scores_ld(j->max_segment), hd = (size_t)j->a->hd;
    struct work w;
    w.s = j->scratch + j->per_thread * (size_t)thread;
    w.ds = w.s + stack * ld;
    w.capped = w.ds + stack * ld;
    w.q = w.capped + ld;
    w.o = w.q + stack * hd;
    w.t = w.o + stack * hd;
    w.stat = w.t + stack * hd;
    return w;
}

/* --- pieces of a block ---------------------------------------------------------------------------- */
static float *row_at(const struct train_heads *x, int row, int h)
{
    return x->p + (size_t)row * (size_t)x->ld + (size_t)h * (size_t)x->step;
}

/* The block's rows of x (H heads, as in struct train_heads), stacked into y. */
static void stack_rows(const struct block *b, const float *x, int ld, int step, float *y)
{
    const size_t hd = (size_t)b->j->a->hd;
    x += (size_t)(b->begin + b->row) * (size_t)ld + (size_t)(b->g * b->heads) * (size_t)step;
    for (int i = 0; i < b->rows; i++, x += ld)
        for (int h = 0; h < b->heads; h++, y += hd)
            memcpy(y, x + (size_t)h * (size_t)step, hd * sizeof *y);
}

static void unstack_rows(const struct block *b, const float *y, const struct train_heads *x)
{
    const size_t hd = (size_t)b->j->a->hd;
    for (int i = 0; i < b->rows; i++)
        for (int h = 0; h < b->heads; h++, y += hd)
            memcpy(row_at(x, b->begin + b->row + i, b->g * b->heads + h), y, hd * sizeof *y);
}

/* Keys that row r of the stack sees: [*lo, *hi) of the block's keys. */
static int visible(const struct block *b, int r, int *ret_hi)
{
    const int pos = b->row + r / b->heads, window = b->j->a->window;
    *ret_hi = pos + 1 - b->lo;
    return window > 0 ? imax(0, pos + 1 - window - b->lo) : 0;
}

static void scores(const struct block *b)
{
    const struct train_attn *a = b->j->a;
    blas_gemm(false, true, b->stack, b->n, a->hd, a->scale, b->w.q, a->hd,
              row_at(&a->k, b->begin + b->lo, b->g), a->k.ld, 0, b->w.s, b->ld);
}

/* Row r of the scores becomes exp(score - max), 0 where it sees nothing; 1 / sum into stat.  What
 * softcap made of the scores is kept in `capped` if that is not NULL. */
static void softmax_row(const struct block *b, int r, float *capped)
{
    const struct train_attn *a = b->j->a;
    float *s = b->w.s + (size_t)r * (size_t)b->ld;
    int hi, lo = visible(b, r, &hi);
    if (a->softcap > 0) {
        b->j->ops->softcap(a->softcap, hi - lo, s + lo);
        if (capped != NULL)
            memcpy(capped + lo, s + lo, (size_t)(hi - lo) * sizeof *s);
    }
    if (a->slopes != NULL) {
        const float slope = a->slopes[b->g * b->heads + r % b->heads];
        for (int j = lo; j < hi; j++)
            s[j] += slope * (float)(j + 1 - hi);
    }
    b->w.stat[r] = 1.0f / b->j->ops->softmax_row(hi - lo, s + lo);
    memset(s, 0, (size_t)lo * sizeof *s);
    memset(s + hi, 0, (size_t)(b->n - hi) * sizeof *s);
}

static void block_forward(const struct block *b)
{
    const struct train_attn *a = b->j->a;
    const struct train_heads out = { b->j->out, a->H * a->hd, a->hd };
    stack_rows(b, a->q.p, a->q.ld, a->q.step, b->w.q);
    scores(b);
    for (int r = 0; r < b->stack; r++)
        softmax_row(b, r, NULL);
    blas_gemm(false, false, b->stack, a->hd, b->n, 1, b->w.s, b->ld,
              row_at(&a->v, b->begin + b->lo, b->g), a->v.ld, 0, b->w.t, a->hd);
    for (int r = 0; r < b->stack; r++)
        b->j->ops->scale(b->w.stat[r], a->hd, b->w.t + (size_t)r * (size_t)a->hd);
    unstack_rows(b, b->w.t, &out);
}

/* Row r: P into s and dS into ds, which holds dP. */
static void grad_row(const struct block *b, int r)
{
    const struct job *j = b->j;
    const struct train_attn *a = j->a;
    const size_t hd = (size_t)a->hd, at = (size_t)r * (size_t)b->ld;
    float *s = b->w.s + at, *ds = b->w.ds + at;
    softmax_row(b, r, b->w.capped);
    const size_t row = (size_t)(b->begin + b->row + r / b->heads);
    const size_t h = (size_t)(b->g * b->heads + r % b->heads);
    const float *o = j->o + (row * (size_t)a->H + h) * hd;
    const float dot = j->dot->dot_f32(o, b->w.o + (size_t)r * hd, hd), inv = b->w.stat[r];
    j->ops->softmax_grad(inv, dot, b->n, s, ds);
    if (a->softcap <= 0)
        return;
    int hi, lo = visible(b, r, &hi);
    for (int i = lo; i < hi; i++) {
        const float t = b->w.capped[i] / a->softcap;
        ds[i] *= 1.0f - t * t;
    }
}

static void block_backward(const struct block *b)
{
    const struct job *j = b->j;
    const struct train_attn *a = j->a;
    const int hd = a->hd, first = b->begin + b->lo;
    stack_rows(b, a->q.p, a->q.ld, a->q.step, b->w.q);
    stack_rows(b, j->dout, a->H * hd, hd, b->w.o);
    scores(b);
    blas_gemm(false, true, b->stack, b->n, hd, 1, b->w.o, hd, row_at(&a->v, first, b->g), a->v.ld,
              0, b->w.ds, b->ld);
    for (int r = 0; r < b->stack; r++)
        grad_row(b, r);
    blas_gemm(true, false, b->n, hd, b->stack, 1, b->w.s, b->ld, b->w.o, hd, 1,
              row_at(&j->dv, first, b->g), j->dv.ld);
    blas_gemm(true, false, b->n, hd, b->stack, a->scale, b->w.ds, b->ld, b->w.q, hd, 1,
              row_at(&j->dk, first, b->g), j->dk.ld);
    blas_gemm(false, false, b->stack, hd, b->n, a->scale, b->w.ds, b->ld,
              row_at(&a->k, first, b->g), a->k.ld, 0, b->w.t, hd);
    unstack_rows(b, b->w.t, &j->dq);
}

static void piece_fn(void *arg, int64_t begin, int64_t end, int thread)
{
    const struct job *j = arg;
    const struct train_attn *a = j->a;
    const int heads = a->H / a->G, step = block_rows(heads);
    for (int64_t p = begin; p < end; p++) {
        const struct train_segment *seg = segment(j, (int)(p / a->G));
        struct block b = { .j = j, .w = work_of(j, thread), .begin = seg->begin,
                           .g = (int)(p % a->G), .heads = heads, .ld = scores_ld(seg->n) };
        for (int i = 0; i < seg->n && j->out == NULL; i++) {
            memset(row_at(&j->dk, seg->begin + i, b.g), 0, (size_t)a->hd * sizeof(float));
            memset(row_at(&j->dv, seg->begin + i, b.g), 0, (size_t)a->hd * sizeof(float));
        }
        for (b.row = 0; b.row < seg->n; b.row += step) {
            b.rows = imin(step, seg->n - b.row);
            b.stack = b.rows * heads;
            b.lo = a->window > 0 ? imax(0, b.row + 1 - a->window) : 0;
            b.n = b.row + b.rows - b.lo;
            if (j->out != NULL)
                block_forward(&b);
            else
                block_backward(&b);
        }
    }
}

static void run(const struct compute *c, struct job *j, float *scratch)
{
    j->ops = ops_for(c->isa);
    j->dot = dot_ops(c->isa);
    j->scratch = (float *)(((uintptr_t)scratch + 63) & ~(uintptr_t)63);
    order(j);
    j->per_thread = work_floats(j->max_segment, j->a->H / j->a->G, j->a->hd);
    pool_run(c->pool, (int64_t)j->a->nsegs * j->a->G, 1, piece_fn, j);
}

void train_attn_forward(const struct compute *c, const struct train_attn *a, float *out,
                        float *scratch)
{
    struct job j = { .a = a, .out = out };
    run(c, &j, scratch);
}

void train_attn_backward(const struct compute *c, const struct train_attn *a, const float *out,
                         const float *dout, struct train_heads dq, struct train_heads dk,
                         struct train_heads dv, float *scratch)
{
    struct job j = { .a = a, .o = out, .dout = dout, .dq = dq, .dk = dk, .dv = dv };
    run(c, &j, scratch);
}
