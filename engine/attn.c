/* attn.c - attention over pages: the walk over tiles; the arithmetic is in ops.
 *
 * Queries (a row and a head) are taken in blocks of at most OPS_QUERIES that share the loads of K
 * and V: first the heads of a row, then those of the next row.  A block is only a way to share
 * loads; each query's sums are its own and in its own order. */
#include "engine/attn.h"

#include "engine/dot.h"

#include <math.h>
#include <string.h>

struct query {
    const float *q;
    float *out;
    float slope;
    int lo, hi; /* visible positions [lo, hi) */
    struct ops_softmax m;
    _Alignas(64) float s[OPS_TILE];
};

struct tile {
    int begin;             /* position */
    int page_lo, page_hi;  /* pages of the tile that some query sees, 0..4 */
    const void *k[OPS_TILE_PAGES], *v[OPS_TILE_PAGES];
};

static int imin(int a, int b) { return a < b ? a : b; }
static int imax(int a, int b) { return a > b ? a : b; }

static void tile_scores(const struct ops *ops, const struct attn_layer *a, const struct tile *t,
                        struct query *q, int nq, bool f32)
{
    const float *in[OPS_QUERIES];
    float *s[OPS_QUERIES];
    for (int p = t->page_lo; p < t->page_hi; p++) {
        for (int i = 0; i < nq; i++) {
            in[i] = q[i].q;
            s[i] = q[i].s + p * KV_PAGE;
        }
        ops->scores(t->k[p], f32, a->hd, a->scale, nq, in, s);
        for (int i = 0; i < nq && a->softcap > 0; i++)
            ops->softcap(a->softcap, KV_PAGE, s[i]);
        for (int i = 0; i < nq && a->slopes != NULL; i++)
            for (int j = 0; j < KV_PAGE; j++)
                s[i][j] += q[i].slope * (float)(t->begin + p * KV_PAGE + j + 1 - q[i].hi);
    }
}

/* out += p V over positions [lo, hi) of the tile, for all of q. */
static void add_values(const struct ops *ops, const struct attn_layer *a, const struct tile *t,
                       struct query *q, int nq, int lo, int hi, bool f32)
{
    const float *p[OPS_QUERIES];
    float *out[OPS_QUERIES];
    while (lo < hi) {
        int page = lo / KV_PAGE, begin = page * KV_PAGE, end = imin(hi, begin + KV_PAGE);
        for (int i = 0; i < nq; i++) {
            p[i] = q[i].s + begin;
            out[i] = q[i].out;
        }
        ops->values(t->v[page], f32, a->hd, lo - begin, end - begin, nq, p, out);
        lo = end;
    }
}

static void tile_run(const struct ops *ops, const struct attn_layer *a, const struct tile *t,
                     struct query *q, int nq, bool f32)
{
    int lo[OPS_QUERIES], hi[OPS_QUERIES], all_lo = 0, all_hi = OPS_TILE;
    tile_scores(ops, a, t, q, nq, f32);
    for (int i = 0; i < nq; i++) {
        lo[i] = imin(imax(q[i].lo - t->begin, 0), OPS_TILE);
        hi[i] = imax(imin(q[i].hi - t->begin, OPS_TILE), lo[i]);
        all_lo = imax(all_lo, lo[i]);
        all_hi = imin(all_hi, hi[i]);
        if (lo[i] == hi[i])
            continue;
        float fix = ops->softmax(&q[i].m, q[i].s, lo[i], hi[i]);
        if (fix != 1.0f)
            ops->scale(fix, a->hd, q[i].out);
    }
    /* Positions that only some of them see are added for those alone: what a query must not see
     * could be infinite, and 0 times that is not 0. */
    all_hi = imax(all_hi, all_lo);
    for (int i = 0; i < nq; i++)
        add_values(ops, a, t, &q[i], 1, lo[i], imin(all_lo, hi[i]), f32);
    add_values(ops, a, t, q, nq, all_lo, all_hi, f32);
    for (int i = 0; i < nq; i++)
        add_values(ops, a, t, &q[i], 1, imax(all_hi, lo[i]), hi[i], f32);
}

static void block_run(const struct ops *ops, const struct attn_layer *a, const int32_t *pages,
                      struct query *q, int nq, int g)
{
    const bool f32 = kv_is_f32(a->kv);
    int lo = q[0].lo, hi = q[0].hi;
    for (int i = 0; i < nq; i++) {
        lo = imin(lo, q[i].lo);
        hi = imax(hi, q[i].hi);
        q[i].m = (struct ops_softmax){ .max = -INFINITY };
        memset(q[i].out, 0, (size_t)a->hd * sizeof *q[i].out);
    }
    for (int begin = lo / OPS_TILE * OPS_TILE; begin < hi; begin += OPS_TILE) {
        struct tile t = { .begin = begin };
        t.page_lo = imax(lo - begin, 0) / KV_PAGE;
        t.page_hi = (imin(hi - begin, OPS_TILE) + KV_PAGE - 1) / KV_PAGE;
        for (int p = t.page_lo; p < t.page_hi; p++) {
            int page = pages[begin / KV_PAGE + p];
            t.k[p] = kv_k(a->kv, page, a->layer, g);
            t.v[p] = kv_v(a->kv, page, a->layer, g);
        }
        tile_run(ops, a, &t, q, nq, f32);
    }
    for (int i = 0; i < nq; i++)
        ops->scale(1.0f / dot_tree(q[i].m.sum), a->hd, q[i].out);
}

void attn_rows(const struct ops *ops, const struct attn_layer *a, const int32_t *pages, int pos,
               int row, int n, int g)
{
    const int heads = a->H / a->G, total = n * heads;
    struct query q[OPS_QUERIES];
    for (int first = 0; first < total; first += OPS_QUERIES) {
        int nq = imin(OPS_QUERIES, total - first);
        for (int i = 0; i < nq; i++) {
            int r = (first + i) / heads, h = g * heads + (first + i) % heads;
            size_t at = ((size_t)(row + r) * (size_t)a->H + (size_t)h) * (size_t)a->hd;
            q[i].q = a->q + (size_t)(row + r) * (size_t)a->q_ld + (size_t)h * (size_t)a->q_step;
            q[i].out = a->out + at;
            q[i].slope = a->slopes != NULL ? a->slopes[h] : 0;
            q[i].hi = pos + r + 1;
            q[i].lo = a->window > 0 ? imax(0, q[i].hi - a->window) : 0;
        }
        block_run(ops, a, pages, q, nq, g);
    }
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
