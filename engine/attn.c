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
    int pages;                                         /* that are there, to be read or fetched */
    const void *k[OPS_TILE_PAGES], *v[OPS_TILE_PAGES];
};

static int imin(int a, int b) { return a < b ? a : b; }
static int imax(int a, int b) { return a > b ? a : b; }

/* Ask memory for one page's K and V, that they are there when the tile's turn comes: pages lie apart,
 * so the processor cannot guess the next one. */
static void fetch_page(const struct attn_layer *a, const struct tile *t, int page)
{
    const size_t bytes = kv_part_bytes(kv_type_of(a->kv), a->hd);
    const char *k = t->k[page], *v = t->v[page];
    for (size_t i = 0; i < bytes; i += 64) {
        __builtin_prefetch(k + i);
        __builtin_prefetch(v + i);
    }
}

static void tile_set(struct tile *t, const struct attn_layer *a, const int32_t *pages, int begin,
                     int end, int g)
{
    t->begin = begin;
    t->pages = imax(0, imin(end - begin + KV_PAGE - 1, OPS_TILE)) / KV_PAGE;
    for (int p = 0; p < t->pages; p++) {
        t->k[p] = kv_k(a->kv, pages[begin / KV_PAGE + p], a->layer, g);
        t->v[p] = kv_v(a->kv, pages[begin / KV_PAGE + p], a->layer, g);
    }
}

/* Scores of pages [page_lo, page_hi) of the tile, while pages of `next` are fetched (NULL: of none). */
static void tile_scores(const struct ops *ops, const struct attn_layer *a, const struct tile *t,
                        const struct tile *next, const struct query *q, float (*scores)[OPS_TILE], int nq, int page_lo,
                        int page_hi, enum kv_type type)
{
    const float *in[OPS_QUERIES];
    float *s[OPS_QUERIES];
    for (int p = page_lo; p < page_hi; p++) {
        for (int i = 0; i < nq; i++) {
            in[i] = q[i].q;
            s[i] = scores[i] + p * KV_PAGE;
        }
        if (next != NULL && p < next->pages)
            fetch_page(a, next, p);
        ops->scores(t->k[p], type, a->hd, a->scale, nq, in, s);
        for (int i = 0; i < nq && a->softcap > 0; i++)
            ops->softcap(a->softcap, KV_PAGE, s[i]);
        for (int i = 0; i < nq && a->slopes != NULL; i++)
            for (int j = 0; j < KV_PAGE; j++)
                s[i][j] += q[i].slope * (float)(t->begin + p * KV_PAGE + j - q[i].pos);
    }
}

/* out += p V over positions [lo, hi) of the tile, for all of q. */
static void add_values(const struct ops *ops, const struct attn_layer *a, const struct tile *t,
                       struct query *q, float (*scores)[OPS_TILE], int nq, int lo, int hi, enum kv_type type)
{
    const float *p[OPS_QUERIES];
    float *out[OPS_QUERIES];
    if (lo >= hi)
        return;
    for (int i = 0; i < nq; i++) {
        p[i] = scores[i];
        out[i] = q[i].out;
    }
    ops->values(t->v, type, a->hd, lo, hi, nq, p, out);
}

/* The running softmax of those that see something of the tile. */
static void tile_softmax(const struct ops *ops, const struct attn_layer *a, struct query *q,
                         float (*scores)[OPS_TILE], int nq, const int *lo, const int *hi)
{
    struct ops_softmax *m[OPS_QUERIES];
    float *s[OPS_QUERIES], *out[OPS_QUERIES], fix[OPS_QUERIES];
    int first[OPS_QUERIES], end[OPS_QUERIES], n = 0;
    for (int i = 0; i < nq; i++) {
        if (lo[i] == hi[i])
            continue;
        m[n] = &q[i].m;
        s[n] = scores[i];
        out[n] = q[i].out;
        first[n] = lo[i];
        end[n++] = hi[i];
    }
    ops->softmax(n, m, s, first, end, fix);
    for (int i = 0; i < n; i++)
        if (fix[i] != 1.0f)
            ops->scale(fix[i], a->hd, out[i]);
}

/* A tile for a group of queries. */
static void group_run(const struct ops *ops, const struct attn_layer *a, const struct tile *t,
                      const struct tile *next, struct query *q, int nq, enum kv_type type)
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
    tile_scores(ops, a, t, next, q, s, nq, some_lo / KV_PAGE, (some_hi + KV_PAGE - 1) / KV_PAGE, type);
    tile_softmax(ops, a, q, s, nq, lo, hi);
    /* Positions that only some of them see are added for those alone: what a query must not see
     * could be infinite, and 0 times that is not 0. */
    all_hi = imax(all_hi, all_lo);
    for (int i = 0; i < nq; i++)
        add_values(ops, a, t, &q[i], &s[i], 1, lo[i], imin(all_lo, hi[i]), type);
    add_values(ops, a, t, q, s, nq, all_lo, all_hi, type);
    for (int i = 0; i < nq; i++)
        add_values(ops, a, t, &q[i], &s[i], 1, imax(all_hi, lo[i]), hi[i], type);
}

/* The softmax and values of a segment, of which q[i] sees [q[i].lo, q[i].hi). */
static void segment_run(const struct ops *ops, const struct attn_layer *a, const int32_t *pages,
                        struct query *q, int nq, int g)
{
    const enum kv_type type = kv_type_of(a->kv);
    int lo = q[0].lo, hi = q[0].hi;
    for (int i = 0; i < nq; i++) {
        lo = imin(lo, q[i].lo);
        hi = imax(hi, q[i].hi);
        if (q[i].lo >= q[i].hi)
            continue;
        q[i].m = (struct ops_softmax){ .max = -INFINITY };
        memset(q[i].out, 0, (size_t)a->hd * sizeof *q[i].out);
    }
    struct tile tiles[2] = { { 0 } };
    tile_set(&tiles[0], a, pages, lo / OPS_TILE * OPS_TILE, hi, g);
    for (int n = 0; tiles[n % 2].begin < hi; n++) {
        struct tile *t = &tiles[n % 2], *next = &tiles[(n + 1) % 2];
        tile_set(next, a, pages, t->begin + OPS_TILE, hi, g);
        for (int i = 0; i < nq; i += OPS_QUERIES)
            group_run(ops, a, t, i == 0 ? next : NULL, q + i, imin(OPS_QUERIES, nq - i), type);
    }
}

static int block_size(int hd) { return imax(1, imin(BLOCK, BLOCK_VALUES / hd)); }

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
        const size_t row = (size_t)s->row + (size_t)((first + i) / heads);
        query_set(&q[i], a, s, g, first + i);
        m[i] = (struct ops_softmax){ .max = -INFINITY };
        out[i] = a->out + (row * (size_t)a->H + (size_t)(g * heads + (first + i) % heads)) * hd;
    }
    const int begin = attn_first_visible(q[0].pos, a->window), end = q[nq - 1].pos;
    for (int seg = begin / ATTN_SEGMENT; seg <= end / ATTN_SEGMENT; seg++) {
        for (int i = 0; i < nq; i++) {
            const bool is_first = attn_first_visible(q[i].pos, a->window) / ATTN_SEGMENT == seg;
            query_see(&q[i], a, seg);
            q[i].out = is_first ? out[i] : &part[(size_t)i * hd];
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
    ops->values(&(const void *){ next_m->sum }, KV_F32, 16, 0, 1, 1, w, to);
    to[0] = values;
    ops->values(&(const void *){ next_values }, KV_F32, hd, 0, 1, 1, w, to);
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

static void store_q8(const struct ops *ops, int8_t *kt, int8_t *v, int at, int hd, const float *k,
                     const float *val)
{
    uint16_t *k_scales = (uint16_t *)(kt + hd * KV_PAGE), *v_scales = (uint16_t *)(v + hd * KV_PAGE);
    for (int d = 0; d < hd; d += KV_Q8_BLOCK) {
        const int n = imin(KV_Q8_BLOCK, hd - d), block = d / KV_Q8_BLOCK;
        int8_t tmp[KV_Q8_BLOCK];
        ops->to_q8(k + d, n, tmp, &k_scales[block * KV_PAGE + at]);
        for (int e = 0; e < n; e++)
            kt[(d + e) * KV_PAGE + at] = tmp[e];
        ops->to_q8(val + d, n, v + at * hd + d, &v_scales[block * KV_PAGE + at]);
    }
}

void attn_store(const struct ops *ops, const struct kv_cache *kv, const int32_t *pages, int layer,
                int G, int hd, int pos, const float *k, const float *v, int step)
{
    const int page = pages[pos / KV_PAGE], at = pos % KV_PAGE;
    for (int g = 0; g < G; g++) {
        void *kt = kv_k(kv, page, layer, g), *vt = kv_v(kv, page, layer, g);
        const size_t off = (size_t)g * (size_t)step;
        switch (kv_type_of(kv)) {
        case KV_F16: store_f16(ops, kt, vt, at, hd, k + off, v + off); break;
        case KV_F32: store_f32(kt, vt, at, hd, k + off, v + off); break;
        case KV_Q8: store_q8(ops, kt, vt, at, hd, k + off, v + off); break;
        }
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
