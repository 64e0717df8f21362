/* attn.c - attention over pages: the walk over segments and tiles; the arithmetic is in ops.
 *
 * Queries (a row and a head) are taken in blocks of at most BLOCK that go through the tiles together:
 * first the heads of a row, then those of the next row.  So a tile is read from memory once per
 * block, and from the cache by groups of at most OPS_QUERIES that share its loads.  Blocks and groups
 * are only a way to share loads; each query's sums are its own and in its own order. */
#include "engine/attn.h"

#include "engine/dot.h"

#include <math.h>
#include <string.h>

/* Queries of a block, and numbers of values that it gathers beside the result. */
enum { BLOCK = 64, BLOCK_VALUES = 16384 };

struct query {
    const float *q;
    float *out;
    float slope;
    int pos;    /* its own */
    int lo, hi; /* visible positions [lo, hi) of the segment; none if lo >= hi */
    struct ops_softmax m;
};

struct tile {
    int begin; /* position */
    const void *k[OPS_TILE_PAGES], *v[OPS_TILE_PAGES]; /* of pages that some query sees */
};

static int imin(int a, int b) { return a < b ? a : b; }
static int imax(int a, int b) { return a > b ? a : b; }

/* Scores of pages [page_lo, page_hi) of the tile. */
static void tile_scores(const struct ops *ops, const struct attn_layer *a, const struct tile *t,
                        const struct query *q, float (*scores)[OPS_TILE], int nq, int page_lo,
                        int page_hi, bool f32)
{
    const float *in[OPS_QUERIES];
    float *s[OPS_QUERIES];
    for (int p = page_lo; p < page_hi; p++) {
        for (int i = 0; i < nq; i++) {
            in[i] = q[i].q;
            s[i] = scores[i] + p * KV_PAGE;
        }
        ops->scores(t->k[p], f32, a->hd, a->scale, nq, in, s);
        for (int i = 0; i < nq && a->softcap > 0; i++)
            ops->softcap(a->softcap, KV_PAGE, s[i]);
        for (int i = 0; i < nq && a->slopes != NULL; i++)
            for (int j = 0; j < KV_PAGE; j++)
                s[i][j] += q[i].slope * (float)(t->begin + p * KV_PAGE + j - q[i].pos);
    }
}

/* out += p V over positions [lo, hi) of the tile, for all of q. */
static void add_values(const struct ops *ops, const struct attn_layer *a, const struct tile *t,
                       struct query *q, float (*scores)[OPS_TILE], int nq, int lo, int hi, bool f32)
{
    const float *p[OPS_QUERIES];
    float *out[OPS_QUERIES];
    while (lo < hi) {
        int page = lo / KV_PAGE, begin = page * KV_PAGE, end = imin(hi, begin + KV_PAGE);
        for (int i = 0; i < nq; i++) {
            p[i] = scores[i] + begin;
            out[i] = q[i].out;
        }
        ops->values(t->v[page], f32, a->hd, lo - begin, end - begin, nq, p, out);
        lo = end;
    }
}

/* A tile for a group of queries. */
static void group_run(const struct ops *ops, const struct attn_layer *a, const struct tile *t,
                      struct query *q, int nq, bool f32)
{
    _Alignas(64) float s[OPS_QUERIES][OPS_TILE];
    int lo[OPS_QUERIES], hi[OPS_QUERIES], all_lo = 0, all_hi = OPS_TILE;
    int some_lo = OPS_TILE, some_hi = 0;
    for (int i = 0; i < nq; i++) {
        lo[i] = imin(imax(q[i].lo - t->begin, 0), OPS_TILE);
        hi[i] = imax(imin(q[i].hi - t->begin, OPS_TILE), lo[i]);
        all_lo = imax(all_lo, lo[i]);
        all_hi = imin(all_hi, hi[i]);
        if (lo[i] < hi[i]) {
            some_lo = imin(some_lo, lo[i]);
            some_hi = imax(some_hi, hi[i]);
        }
    }
    if (some_lo >= some_hi)
        return;
    tile_scores(ops, a, t, q, s, nq, some_lo / KV_PAGE, (some_hi + KV_PAGE - 1) / KV_PAGE, f32);
    for (int i = 0; i < nq; i++) {
        if (lo[i] == hi[i])
            continue;
        float fix = ops->softmax(&q[i].m, s[i], lo[i], hi[i]);
        if (fix != 1.0f)
            ops->scale(fix, a->hd, q[i].out);
    }
    /* Positions that only some of them see are added for those alone: what a query must not see
     * could be infinite, and 0 times that is not 0. */
    all_hi = imax(all_hi, all_lo);
    for (int i = 0; i < nq; i++)
        add_values(ops, a, t, &q[i], &s[i], 1, lo[i], imin(all_lo, hi[i]), f32);
    add_values(ops, a, t, q, s, nq, all_lo, all_hi, f32);
    for (int i = 0; i < nq; i++)
        add_values(ops, a, t, &q[i], &s[i], 1, imax(all_hi, lo[i]), hi[i], f32);
}

/* The softmax and values of a segment, of which q[i] sees [q[i].lo, q[i].hi). */
static void segment_run(const struct ops *ops, const struct attn_layer *a, const int32_t *pages,
                        struct query *q, int nq, int g)
{
    const bool f32 = kv_is_f32(a->kv);
    int lo = q[0].lo, hi = q[0].hi;
    for (int i = 0; i < nq; i++) {
        lo = imin(lo, q[i].lo);
        hi = imax(hi, q[i].hi);
        if (q[i].lo >= q[i].hi)
            continue;
        q[i].m = (struct ops_softmax){ .max = -INFINITY };
        memset(q[i].out, 0, (size_t)a->hd * sizeof *q[i].out);
    }
    for (int begin = lo / OPS_TILE * OPS_TILE; begin < hi; begin += OPS_TILE) {
        struct tile t = { .begin = begin };
        const int page_hi = (imin(hi - begin, OPS_TILE) + KV_PAGE - 1) / KV_PAGE;
        for (int p = imax(lo - begin, 0) / KV_PAGE; p < page_hi; p++) {
            int page = pages[begin / KV_PAGE + p];
            t.k[p] = kv_k(a->kv, page, a->layer, g);
            t.v[p] = kv_v(a->kv, page, a->layer, g);
        }
        for (int i = 0; i < nq; i += OPS_QUERIES)
            group_run(ops, a, &t, q + i, imin(OPS_QUERIES, nq - i), f32);
    }
}

static int block_size(int hd) { return imin(BLOCK, BLOCK_VALUES / hd); }

/* Query number i of the span: row i / heads, head g * heads + i % heads. */
static void query_set(struct query *q, const struct attn_layer *a, const struct attn_span *s, int g,
                      int i)
{
    const int heads = a->H / a->G, r = i / heads, h = g * heads + i % heads;
    *q = (struct query){ .pos = s->pos + r, .slope = a->slopes != NULL ? a->slopes[h] : 0 };
    q->q = a->q + (size_t)(s->row + r) * (size_t)a->q_ld + (size_t)h * (size_t)a->q_step;
}

/* What of the segment it sees. */
static void query_see(struct query *q, const struct attn_layer *a, int seg)
{
    q->lo = imax(attn_first_visible(q->pos, a->window), seg * ATTN_SEGMENT);
    q->hi = imin(q->pos + 1, (seg + 1) * ATTN_SEGMENT);
}

/* Queries [first, first + nq) of the span, all segments. */
static void block_run(const struct ops *ops, const struct attn_layer *a, const struct attn_span *s,
                      int g, int first, int nq)
{
    const int heads = a->H / a->G;
    const size_t hd = (size_t)a->hd;
    struct query q[BLOCK];
    struct ops_softmax m[BLOCK];
    float *out[BLOCK], part[BLOCK_VALUES];
    for (int i = 0; i < nq; i++) {
        const size_t row = (size_t)(s->row + (first + i) / heads);
        query_set(&q[i], a, s, g, first + i);
        out[i] = a->out + (row * (size_t)a->H + (size_t)(g * heads + (first + i) % heads)) * hd;
    }
    const int begin = attn_first_visible(q[0].pos, a->window), end = q[nq - 1].pos;
    for (int seg = begin / ATTN_SEGMENT; seg <= end / ATTN_SEGMENT; seg++) {
        for (int i = 0; i < nq; i++) {
            const bool is_first = attn_first_visible(q[i].pos, a->window) / ATTN_SEGMENT == seg;
            query_see(&q[i], a, seg);
            q[i].out = is_first ? out[i] : part + (size_t)i * hd;
        }
        segment_run(ops, a, s->pages, q, nq, g);
        for (int i = 0; i < nq; i++)
            if (q[i].out == out[i])
                m[i] = q[i].m;
            else if (q[i].lo < q[i].hi)
                attn_fold(ops, a->hd, &m[i], out[i], &q[i].m, q[i].out);
    }
    for (int i = 0; i < nq; i++)
        attn_finish(ops, a->hd, &m[i], out[i]);
}

void attn_rows(const struct ops *ops, const struct attn_layer *a, const struct attn_span *s, int g)
{
    const int total = s->n * (a->H / a->G), block = block_size(a->hd);
    for (int first = 0; first < total; first += block)
        block_run(ops, a, s, g, first, imin(block, total - first));
}

void attn_segment(const struct ops *ops, const struct attn_layer *a, const struct attn_span *s,
                  int g, int seg, struct ops_softmax *ret_m, float *ret_values)
{
    const int heads = a->H / a->G;
    struct query q[BLOCK];
    for (int first = 0; first < heads; first += BLOCK) {
        const int nq = imin(BLOCK, heads - first);
        for (int i = 0; i < nq; i++) {
            query_set(&q[i], a, s, g, first + i);
            query_see(&q[i], a, seg);
            q[i].out = ret_values + (size_t)(first + i) * (size_t)a->hd;
        }
        segment_run(ops, a, s->pages, q, nq, g);
        for (int i = 0; i < nq; i++)
            ret_m[first + i] = q[i].m;
    }
}

void attn_fold(const struct ops *ops, int hd, struct ops_softmax *m, float *values,
               const struct ops_softmax *next_m, const float *next_values)
{
    const float *w[1];
    float weight = next_m->max - m->max, *to[1];
    if (next_m->max > m->max) {
        float fix = m->max - next_m->max;
        ops->exp(&fix, 1, &fix);
        ops->scale(fix, 16, m->sum);
        ops->scale(fix, hd, values);
        m->max = next_m->max;
        weight = 1;
    } else {
        ops->exp(&weight, 1, &weight);
    }
    w[0] = &weight;
    to[0] = m->sum;
    ops->values(next_m->sum, true, 16, 0, 1, 1, w, to);
    to[0] = values;
    ops->values(next_values, true, hd, 0, 1, 1, w, to);
}

void attn_finish(const struct ops *ops, int hd, struct ops_softmax *m, float *values)
{
    ops->scale(1.0f / dot_tree(m->sum), hd, values);
}

/* --- storing ----------------------------------------------------------------------------- */
static void store_f32(float *kt, float *v, int at, int hd, const float *k, const float *val)
{
    for (int d = 0; d < hd; d++)
        kt[d * KV_PAGE + at] = k[d];
    memcpy(v + at * hd, val, (size_t)hd * sizeof *val);
}

static void store_f16(const struct ops *ops, uint16_t *kt, uint16_t *v, int at, int hd,
                      const float *k, const float *val)
{
    uint16_t tmp[64];
    for (int d = 0; d < hd; d += 64) {
        int n = imin(64, hd - d);
        ops->to_f16(k + d, n, tmp);
        for (int e = 0; e < n; e++)
            kt[(d + e) * KV_PAGE + at] = tmp[e];
    }
    ops->to_f16(val, hd, v + at * hd);
}

void attn_store(const struct ops *ops, const struct kv_cache *kv, const int32_t *pages, int layer,
                int G, int hd, int pos, const float *k, const float *v, int step)
{
    const bool f32 = kv_is_f32(kv);
    const int page = pages[pos / KV_PAGE], at = pos % KV_PAGE;
    for (int g = 0; g < G; g++) {
        void *kt = kv_k(kv, page, layer, g), *vt = kv_v(kv, page, layer, g);
        const size_t off = (size_t)g * (size_t)step;
        if (f32)
            store_f32(kt, vt, at, hd, k + off, v + off);
        else
            store_f16(ops, kt, vt, at, hd, k + off, v + off);
    }
}

void attn_slopes(int H, float *ret)
{
    int P = 1;
    while (2 * P <= H)
        P *= 2;
    for (int h = 0; h < H; h++)
        ret[h] = (float)exp2(h < P ? -8.0 * (h + 1) / P : -4.0 * (2 * (h - P) + 1) / P);
}
