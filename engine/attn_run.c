/* attn_run.c - attention of a step, shared by threads.
 *
 * Spans are cut into pieces of about equal cost, and a piece and a key/value head is what a thread
 * takes, the costliest first.  Where that is too coarse (few heads, one long context among few rows),
 * long pieces go first, row by row and segment by segment: the results of up to ATTN_SLOTS segments
 * are gathered, then folded head by head.  No cut changes a bit (attn.h), so they may follow the
 * number of threads. */
#include "engine/attn.h"

#include <stdbool.h>
#include <string.h>

/* Segments of a row whose results are kept at a time; queries of a piece, if there are enough rows;
 * multiply-adds below which a step stays in the caller, and a piece is not cut. */
enum { ATTN_SLOTS = 64, PIECE_QUERIES = 64, SERIAL = 1 << 16, PIECE_LEAST = 1 << 15 };

struct attn_piece {
    struct attn_span span;
    int level; /* log2 of the cost for one key/value head */
    bool is_long;
};

/* One segment of one row. */
struct slot {
    struct attn_span row;
    int seg;
    bool first, last; /* of the row */
};

struct job {
    const struct ops *ops;
    const struct attn_layer *a;
    const struct attn_work *w;
    struct slot slots[ATTN_SLOTS];
};

static size_t up64(size_t n) { return (n + 63) & ~(size_t)63; }

size_t attn_lay_out(struct attn_work *w, int H, int hd, int max_rows, void *mem)
{
    const size_t heads = (size_t)H, rows = (size_t)max_rows;
    const size_t pieces = up64(rows * sizeof *w->pieces);
    const size_t softmax = up64(ATTN_SLOTS * heads * sizeof *w->softmax);
    const size_t carry = up64(heads * sizeof *w->carry);
    const size_t values = up64(ATTN_SLOTS * heads * (size_t)hd * sizeof *w->values);
    char *m = mem;
    *w = (struct attn_work){ .max_spans = max_rows };
    if (m != NULL) {
        w->pieces = (struct attn_piece *)m;
        w->sorted = (struct attn_piece *)(m + pieces);
        w->softmax = (struct ops_softmax *)(m + 2 * pieces);
        w->carry = (struct ops_softmax *)(m + 2 * pieces + softmax);
        w->values = (void *)(m + 2 * pieces + softmax + carry);
    }
    return 2 * pieces + softmax + carry + values;
}

/* --- cutting ------------------------------------------------------------------------------------- */
/* Multiply-adds of the row at pos, for one key/value head. */
static int64_t row_cost(const struct attn_layer *a, int pos)
{
    return (int64_t)(pos + 1 - attn_first_visible(pos, a->window)) * a->hd * 2 * (a->H / a->G);
}

static int level_of(int64_t cost) { return 63 - __builtin_clzll((uint64_t)cost); }

/* The span in pieces of at most `most` multiply-adds per key/value head if they can be that small. */
static int cut(const struct attn_layer *a, const struct attn_span *s, int64_t most,
               struct attn_piece *ret)
{
    const int heads = a->H / a->G, limit = (PIECE_QUERIES + heads - 1) / heads;
    const int least = (OPS_QUERIES + heads - 1) / heads; /* a full group of queries */
    int n = 0;
    for (int r = 0, rows; r < s->n; r += rows) {
        const int64_t cost = row_cost(a, s->pos + r);
        rows = most / cost < limit ? (int)(most / cost) : limit;
        rows = rows < least ? least : rows;
        rows = rows > s->n - r ? s->n - r : rows;
        ret[n++] = (struct attn_piece){
            .span = { s->pages, s->pos + r, s->row + r, rows },
            .level = level_of(cost * rows),
        };
    }
    return n;
}

/* The costliest first, so that nobody starts a long piece when the others are done. */
static void sort(const struct attn_piece *p, int n, struct attn_piece *ret)
{
    int first[65] = { 0 };
    for (int i = 0; i < n; i++)
        first[63 - p[i].level + 1]++;
    for (int i = 1; i < 65; i++)
        first[i] += first[i - 1];
    for (int i = 0; i < n; i++)
        ret[first[63 - p[i].level]++] = p[i];
}

/* --- pieces -------------------------------------------------------------------------------------- */
static void piece_fn(void *arg, int64_t begin, int64_t end, int thread)
{
    const struct job *j = arg;
    (void)thread;
    for (int64_t n = begin; n < end; n++) {
        const struct attn_piece *p = &j->w->sorted[n / j->a->G];
        if (!p->is_long)
            attn_rows(j->ops, j->a, &p->span, (int)(n % j->a->G));
    }
}

/* --- long rows ------------------------------------------------------------------------------------ */
static float *row_out(const struct job *j, int row, int h)
{
    return j->a->out + ((size_t)row * (size_t)j->a->H + (size_t)h) * (size_t)j->a->hd;
}

static float *slot_values(const struct job *j, int slot, int h)
{
    return j->w->values + ((size_t)slot * (size_t)j->a->H + (size_t)h) * (size_t)j->a->hd;
}

static void slot_fn(void *arg, int64_t begin, int64_t end, int thread)
{
    const struct job *j = arg;
    const int G = j->a->G, heads = j->a->H / G;
    (void)thread;
    for (int64_t n = begin; n < end; n++) {
        const int i = (int)(n / G), g = (int)(n % G), h = g * heads;
        const struct slot *s = &j->slots[i];
        float *values = s->first ? row_out(j, s->row.row, h) : slot_values(j, i, h);
        attn_segment(j->ops, j->a, &s->row, g, s->seg, j->w->softmax + i * j->a->H + h, values);
    }
}

/* The slots of heads [begin, end) in order.  A row may go on in the next slots: w->carry. */
static void fold_heads(const struct job *j, int nslots, int begin, int end)
{
    for (int h = begin; h < end; h++) {
        struct ops_softmax *m = &j->w->carry[h];
        for (int i = 0; i < nslots; i++) {
            const struct slot *s = &j->slots[i];
            const struct ops_softmax *next = &j->w->softmax[i * j->a->H + h];
            float *out = row_out(j, s->row.row, h);
            if (s->first)
                *m = *next;
            else
                attn_fold(j->ops, j->a->hd, m, out, next, slot_values(j, i, h));
            if (s->last)
                attn_finish(j->ops, j->a->hd, m, out);
        }
    }
}

static void run_slots(struct pool *pool, struct job *j, int nslots)
{
    pool_run(pool, (int64_t)nslots * j->a->G, 1, slot_fn, j);
    fold_heads(j, nslots, 0, j->a->H);
}

static void run_long(struct pool *pool, struct job *j, const struct attn_span *s)
{
    int n = 0;
    for (int r = 0; r < s->n; r++) {
        const int pos = s->pos + r, last = pos / ATTN_SEGMENT;
        const int first = attn_first_visible(pos, j->a->window) / ATTN_SEGMENT;
        for (int seg = first; seg <= last; seg++) {
            j->slots[n++] = (struct slot){
                .row = { s->pages, pos, s->row + r, 1 }, .seg = seg,
                .first = seg == first, .last = seg == last,
            };
            if (n == ATTN_SLOTS) {
                run_slots(pool, j, n);
                n = 0;
            }
        }
    }
    run_slots(pool, j, n);
}

void attn_run(const struct compute *c, const struct attn_work *w, const struct attn_layer *a,
              const struct attn_span *spans, int nspans)
{
    struct job j = { .ops = ops_for(c->isa), .a = a, .w = w };
    const int threads = c->pool != NULL ? pool_threads(c->pool) : 1;
    int64_t all = 0;
    for (int i = 0; i < nspans; i++)
        for (int r = 0; r < spans[i].n; r++)
            all += row_cost(a, spans[i].pos + r) * a->G;
    int64_t most = all / (8 * threads);
    most = most < PIECE_LEAST ? PIECE_LEAST : most;
    int n = 0;
    for (int i = 0; i < nspans; i++)
        n += cut(a, &spans[i], most, w->pieces + n);
    struct pool *pool = all < SERIAL ? NULL : c->pool;
    for (int i = 0; i < n; i++) {
        struct attn_piece *p = &w->pieces[i];
        const int pos = p->span.pos;
        p->is_long = pool != NULL && threads > 1 && pos >= ATTN_SEGMENT &&
                     row_cost(a, pos) * p->span.n > all / (2 * threads);
        if (p->is_long)
            run_long(pool, &j, &p->span);
    }
    sort(w->pieces, n, w->sorted);
    pool_run(pool, (int64_t)n * a->G, 1, piece_fn, &j);
}
