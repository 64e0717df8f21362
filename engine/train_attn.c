/* train_attn.c - attention and its derivative, a block of queries at a time.
 *
 * A block is some rows of an example times the query heads that share a key/value head, stacked:
 * row i * heads + h of its matrices is head h of row i.  So one product serves all heads, and few
 * rows make a block, which keeps what is computed above the diagonal small.
 *     S = scale Q K^T, P = softmax(S), O = P V
 *     dV = P^T dO, dP = dO V^T, dS = P (dP - rowsum(dO O)), dQ = scale dS K, dK = scale dS^T Q
 *
 * A piece is an example and a key/value head.  Where there are fewer than PIECES of them, each is
 * cut into parts, runs of rows that cost about the same.  The last part adds to dK and dV
 * themselves, the others to sums of their own, which follow in order: so the cut, and with it every
 * bit, comes from the shapes and not from the number of threads. */
#include "engine/train_attn.h"

#include "engine/blas.h"
#include "engine/dot.h"
#include "engine/ops.h"

#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>

enum { LANES = 16, STACK = 128, MIN_ROWS = 16, MAX_ROWS = 64, LEVELS = 32, PIECES = 16 };

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

static size_t padded(size_t n) { return (n + LANES - 1) / LANES * LANES; }

static size_t work_floats(int max_segment, int heads, int hd)
{
    const size_t stack = (size_t)block_rows(heads) * (size_t)heads;
    const size_t ld = (size_t)scores_ld(max_segment);
    const size_t n = 2 * stack * ld + ld + 3 * stack * (size_t)hd + stack;
    return padded(n);
}

/* dK and dV of a part that is not the last. */
static size_t sums_floats(int max_segment, int hd)
{
    return padded(2 * (size_t)max_segment * (size_t)hd);
}

size_t train_attn_scratch(int max_segment, int H, int G, int hd, int threads)
{
    return work_floats(max_segment, H / G, hd) * (size_t)threads +
           sums_floats(max_segment, hd) * PIECES + LANES;
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
    float *sums;
    int max_segment, parts;
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
    float *dk, *dv; /* of the example's first key */
    int ld_dk, ld_dv;
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
    const size_t hd = (size_t)b->j->a->hd, heads = (size_t)b->heads;
    x += (size_t)(b->begin + b->row) * (size_t)ld + (size_t)b->g * heads * (size_t)step;
    for (int i = 0; i < b->rows; i++, x += ld, y += heads * hd)
        if ((size_t)step == hd)
            memcpy(y, x, heads * hd * sizeof *y);
        else
            for (size_t h = 0; h < heads; h++)
                memcpy(y + h * hd, x + h * (size_t)step, hd * sizeof *y);
}

static void unstack_rows(const struct block *b, const float *x, const struct train_heads *to)
{
    const size_t hd = (size_t)b->j->a->hd, heads = (size_t)b->heads;
    float *y = row_at(to, b->begin + b->row, b->g * b->heads);
    for (int i = 0; i < b->rows; i++, x += heads * hd, y += to->ld)
        if ((size_t)to->step == hd)
            memcpy(y, x, heads * hd * sizeof *y);
        else
            for (size_t h = 0; h < heads; h++)
                memcpy(y + h * (size_t)to->step, x + h * hd, hd * sizeof *y);
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
 * softcap made of the scores is kept for grad_row(). */
static void softmax_row(const struct block *b, int r)
{
    const struct train_attn *a = b->j->a;
    float *s = b->w.s + (size_t)r * (size_t)b->ld;
    int hi, lo = visible(b, r, &hi);
    if (a->softcap > 0) {
        b->j->ops->softcap(a->softcap, hi - lo, s + lo);
        memcpy(b->w.capped + lo, s + lo, (size_t)(hi - lo) * sizeof *s);
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
        softmax_row(b, r);
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
    softmax_row(b, r);
    const int row = b->begin + b->row + r / b->heads, h = b->g * b->heads + r % b->heads;
    const float *o = j->o + ((size_t)row * (size_t)a->H + (size_t)h) * hd;
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
              b->dv + (size_t)b->lo * (size_t)b->ld_dv, b->ld_dv);
    blas_gemm(true, false, b->n, hd, b->stack, a->scale, b->w.ds, b->ld, b->w.q, hd, 1,
              b->dk + (size_t)b->lo * (size_t)b->ld_dk, b->ld_dk);
    blas_gemm(false, false, b->stack, hd, b->n, a->scale, b->w.ds, b->ld,
              row_at(&a->k, first, b->g), a->k.ld, 0, b->w.t, hd);
    unstack_rows(b, b->w.t, &j->dq);
}

/* --- pieces ------------------------------------------------------------------------------------ */
/* Rows of an example before part `part`; the cost of a row grows with what it sees. */
static int part_begin(const struct job *j, int n, int part)
{
    if (part == j->parts)
        return n;
    return (int)(n * sqrt((double)part / j->parts)) / MAX_ROWS * MAX_ROWS;
}

/* The first key that rows from `row` on can see. */
static int first_key(const struct train_attn *a, int row)
{
    return a->window > 0 ? imax(0, row + 1 - a->window) : 0;
}

/* Where dK and dV of a part that is not the last are gathered, [max_segment][hd] each. */
static float *part_sums(const struct job *j, int64_t piece, int part)
{
    const size_t which = (size_t)piece * (size_t)(j->parts - 1) + (size_t)part;
    return j->sums + which * sums_floats(j->max_segment, j->a->hd);
}

/* dK and dV of the keys that this part sees begin at 0; the last part takes all that are left. */
static void grad_begin(struct block *b, int64_t piece, int part, int lo, int n)
{
    const struct job *j = b->j;
    const size_t hd = (size_t)j->a->hd;
    if (part < j->parts - 1) {
        b->dk = part_sums(j, piece, part);
        b->dv = b->dk + (size_t)j->max_segment * hd;
        b->ld_dk = b->ld_dv = j->a->hd;
    } else {
        b->dk = row_at(&j->dk, b->begin, b->g);
        b->dv = row_at(&j->dv, b->begin, b->g);
        b->ld_dk = j->dk.ld;
        b->ld_dv = j->dv.ld;
        lo = 0;
    }
    for (int i = lo; i < n; i++) {
        memset(b->dk + (size_t)i * (size_t)b->ld_dk, 0, hd * sizeof *b->dk);
        memset(b->dv + (size_t)i * (size_t)b->ld_dv, 0, hd * sizeof *b->dv);
    }
}

static void part_run(const struct job *j, int64_t piece, int part, int thread)
{
    const struct train_attn *a = j->a;
    const struct train_segment *seg = segment(j, (int)(piece / a->G));
    const int heads = a->H / a->G, step = block_rows(heads);
    const int begin = part_begin(j, seg->n, part), end = part_begin(j, seg->n, part + 1);
    struct block b = { .j = j, .w = work_of(j, thread), .begin = seg->begin,
                       .g = (int)(piece % a->G), .heads = heads, .ld = scores_ld(seg->n) };
    if (begin == end)
        return;
    if (j->out == NULL)
        grad_begin(&b, piece, part, first_key(a, begin), end);
    for (b.row = begin; b.row < end; b.row += step) {
        b.rows = imin(step, end - b.row);
        b.stack = b.rows * heads;
        b.lo = first_key(a, b.row);
        b.n = b.row + b.rows - b.lo;
        if (j->out != NULL)
            block_forward(&b);
        else
            block_backward(&b);
    }
}

static void part_fn(void *arg, int64_t begin, int64_t end, int thread)
{
    const struct job *j = arg;
    for (int64_t n = begin; n < end; n++)
        part_run(j, n / j->parts, (int)(n % j->parts), thread);
}

/* dK and dV += what the parts but the last have gathered. */
static void add_fn(void *arg, int64_t begin, int64_t end, int thread)
{
    const struct job *j = arg;
    const struct train_attn *a = j->a;
    const size_t hd = (size_t)a->hd;
    (void)thread;
    for (int64_t p = begin; p < end; p++) {
        const struct train_segment *seg = segment(j, (int)(p / a->G));
        for (int part = 0; part < j->parts - 1; part++) {
            const int row = part_begin(j, seg->n, part), stop = part_begin(j, seg->n, part + 1);
            const float *dk = part_sums(j, p, part), *dv = dk + (size_t)j->max_segment * hd;
            for (int i = first_key(a, row); i < stop && row < stop; i++) {
                const int to = seg->begin + i, g = (int)(p % a->G);
                j->ops->add(dk + (size_t)i * hd, a->hd, row_at(&j->dk, to, g));
                j->ops->add(dv + (size_t)i * hd, a->hd, row_at(&j->dv, to, g));
            }
        }
    }
}

static void run(const struct compute *c, struct job *j, float *scratch)
{
    const int64_t pieces = (int64_t)j->a->nsegs * j->a->G;
    j->ops = ops_for(c->isa);
    j->dot = dot_ops(c->isa);
    order(j);
    j->parts = pieces > 0 && pieces < PIECES ? PIECES / (int)pieces : 1;
    j->sums = (float *)(((uintptr_t)scratch + 63) & ~(uintptr_t)63);
    j->scratch = j->sums + sums_floats(j->max_segment, j->a->hd) * PIECES;
    j->per_thread = work_floats(j->max_segment, j->a->H / j->a->G, j->a->hd);
    pool_run(c->pool, pieces * j->parts, 1, part_fn, j);
    if (j->out == NULL && j->parts > 1)
        pool_run(c->pool, pieces, 1, add_fn, j);
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
