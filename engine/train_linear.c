/* train_linear.c - linear layers with what is learned beside them.
 *
 * With x~ = dropout(x) (independent for every module), h = x~ A^T, e = E or 1, s = scaling:
 *   LoRA, AdaLoRA   y = x W^T + b + s (h e) B^T
 *     dB += s dY^T (h e)    dg = s dY B    de += sum_t dg h    dh = dg e    dA += dh^T x~
 *     dx  = dY W + mask (dh A)
 *   DoRA            u = x~ W^T + s h B^T,  y = x W^T + b + g u - x~ W^T,  g = m / n
 *     (without dropout: y = g u + b)   dm += sum_t dY u / n    A and B as above from dY g
 *     dx  = dY W + mask (dY (g - 1) W + dh A)
 *     n is taken as a constant, as the paper proposes (section 4.3) and PEFT does.
 *
 * h and u stay with the module until the way back of the same block. */
#include "engine/linear_dx.h"
#include "engine/train_gemm.h"
#include "engine/train_int.h"
#include "engine/train_rand.h"

#include <string.h>

/* --- dropout ------------------------------------------------------------------------------------ */
struct drop {
    const struct train *t;
    const float *x;
    int K, ldx, ldy;
    float *y;
    uint64_t stream;
    bool back;
};

/* One stream for each module in each micro-batch. */
static uint64_t drop_stream(const struct train_where *at, const struct train_module *m)
{
    const uint64_t micro = (uint64_t)at->step << 13 | (uint64_t)(at->micro & 8191);
    const uint64_t module = (uint64_t)m->layer * MOD_COUNT + (uint64_t)m->module;
    return train_stream(TRAIN_STREAM_DROPOUT, micro << 13 | module);
}

static void drop_fn(void *arg, int64_t begin, int64_t end, int thread)
{
    const struct drop *d = arg;
    const double p = d->t->o.dropout;
    (void)thread;
    (d->back ? train_dropout_back : train_dropout)(
        d->t->o.seed, d->stream, p, begin, d->x + begin * d->ldx, (int)(end - begin), d->K, d->ldx,
        d->y + begin * d->ldy, d->ldy);
}

static bool drops(const struct train *t, const struct train_where *at)
{
    return at->learning && t->o.dropout > 0;
}

/* x~ of module m, in t->b.drop unless nothing is dropped. */
static const float *dropped(struct train *t, const struct train_where *at,
                            const struct train_module *m, const float *x, int *ldx)
{
    if (!drops(t, at))
        return x;
    struct drop d = { t, x, m->in, *ldx, m->in, t->b.drop, drop_stream(at, m), false };
    train_rows(t, m->in, drop_fn, &d);
    *ldx = m->in;
    return t->b.drop;
}

/* --- loops over rows ------------------------------------------------------------------------------ */
struct rows {
    const struct train_module *m;
    const float *from;
    float *to, *to2;
    const float *bias;
    bool dropped;
};

/* to = from * (e s), rows of r; without E only s. */
static void gain_fn(void *arg, int64_t begin, int64_t end, int thread)
{
    const struct rows *p = arg;
    const int r = p->m->r;
    (void)thread;
    for (int64_t t = begin; t < end; t++)
        for (int j = 0; j < r; j++)
            p->to[t * r + j] = p->from[t * r + j] * (p->m->E[j] * p->m->scaling);
}

/* u is there: y becomes what DoRA makes of it. */
static void dora_fn(void *arg, int64_t begin, int64_t end, int thread)
{
    const struct rows *p = arg;
    const int out = p->m->out;
    (void)thread;
    for (int64_t t = begin; t < end; t++) {
        const float *u = p->from + t * out, *g = p->m->gain;
        float *y = p->to + t * out;
        for (int o = 0; o < out; o++) {
            const float b = p->bias != NULL ? p->bias[o] : 0;
            y[o] = p->dropped ? y[o] + b + g[o] * u[o] : g[o] * u[o] + b;
        }
    }
}

/* y -= x~ W^T, before the change enters u. */
static void take_fn(void *arg, int64_t begin, int64_t end, int thread)
{
    const struct rows *p = arg;
    const size_t out = (size_t)p->m->out;
    (void)thread;
    for (size_t i = (size_t)begin * out; i < (size_t)end * out; i++)
        p->to[i] -= p->from[i];
}

/* to = dY g and, if something is dropped, to2 = dY (g - 1). */
static void dora_back_fn(void *arg, int64_t begin, int64_t end, int thread)
{
    const struct rows *p = arg;
    const int out = p->m->out;
    (void)thread;
    for (int64_t t = begin; t < end; t++)
        for (int o = 0; o < out; o++) {
            const float dy = p->from[t * out + o], g = p->m->gain[o];
            p->to[t * out + o] = dy * g;
            if (p->to2 != NULL)
                p->to2[t * out + o] = dy * g - dy;
        }
}

/* --- forward ---------------------------------------------------------------------------------------- */
static void compute_h(struct train *t, struct train_module *m, const float *x, int ldx)
{
    train_gemm(t->compute, false, true, t->batch.rows, m->r, m->in, 1, x, ldx, m->A, m->in, 0, m->h,
               m->r);
}

static void change(struct train *t, struct train_module *m, const float *x, int ldx, float *y)
{
    const int R = t->batch.rows;
    if (m->r == 0)
        return;
    compute_h(t, m, x, ldx);
    if (m->E == NULL) {
        train_gemm(t->compute, false, true, R, m->out, m->r, m->scaling, m->h, m->r, m->B, m->r, 1,
                   y, m->out);
        return;
    }
    struct rows p = { .m = m, .from = m->h, .to = t->b.hs };
    train_rows(t, m->r, gain_fn, &p);
    train_gemm(t->compute, false, true, R, m->out, m->r, 1, t->b.hs, m->r, m->B, m->r, 1, y,
               m->out);
}

static void dora(struct train *t, const struct train_where *at, struct train_module *m,
                 const float *bias, const float *x, int ldx, float *y)
{
    const int R = t->batch.rows;
    const bool drop = drops(t, at);
    const float *xd = dropped(t, at, m, x, &ldx);
    struct rows p = { .m = m, .from = m->u, .to = y, .bias = bias, .dropped = drop };
    if (drop) {
        act_pack(t->compute, &t->act_drop, xd, R, m->in, ldx);
        matmul(t->compute, m->w, &t->act_drop, NULL, m->u, m->out);
        train_rows(t, m->out, take_fn, &p);
    } else {
        memcpy(m->u, y, (size_t)R * (size_t)m->out * sizeof *y);
    }
    change(t, m, xd, ldx, m->u);
    train_rows(t, m->out, dora_fn, &p);
}

void train_linear(struct train *t, const struct train_where *at, int layer, const enum module *mods,
                  int nmods, const float *x, int ldx, float *const *y)
{
    act_pack(t->compute, &t->act, x, t->batch.rows, arch_in(&t->base->arch, mods[0]), ldx);
    for (int i = 0; i < nmods; i++) {
        const struct base_linear *lin = &t->base->layers[layer].mod[mods[i]];
        struct train_module *m = train_slot(t, layer, mods[i]);
        const bool is_dora = m != NULL && m->m != NULL;
        matmul(t->compute, &lin->w, &t->act, is_dora ? NULL : lin->bias, y[i], lin->w.N);
        if (is_dora) {
            dora(t, at, m, lin->bias, x, ldx, y[i]);
        } else if (m != NULL) {
            int ld = ldx;
            const float *xd = dropped(t, at, m, x, &ld);
            change(t, m, xd, ld, y[i]);
        }
    }
}

void train_linear_h(struct train *t, const struct train_where *at, int layer, enum module mod,
                    const float *x, int ldx)
{
    struct train_module *m = train_slot(t, layer, mod);
    if (m == NULL)
        return;
    const float *xd = dropped(t, at, m, x, &ldx);
    compute_h(t, m, xd, ldx);
}

/* --- backward --------------------------------------------------------------------------------------- */
/* dm: a column at a time, so that each sum has one order. */
struct columns {
    const struct train_module *m;
    const float *dy;
    int R;
};

static void magnitude_fn(void *arg, int64_t begin, int64_t end, int thread)
{
    const struct columns *p = arg;
    const int64_t out = p->m->out;
    (void)thread;
    for (int64_t o = begin; o < end; o++) {
        double sum = 0;
        for (int64_t t = 0; t < p->R; t++)
            sum += (double)p->dy[t * out + o] * (double)p->m->u[t * out + o];
        p->m->gm[o] += (float)(sum / (double)p->m->norm[o]);
    }
}

/* de, and dr (R rows of r) becomes dh. */
static void singular_values(struct train *t, struct train_module *m, float *dr)
{
    const int R = t->batch.rows, r = m->r;
    for (int j = 0; j < r; j++) {
        double sum = 0;
        for (int i = 0; i < R; i++)
            sum += (double)dr[(size_t)i * (size_t)r + (size_t)j] *
                   (double)m->h[(size_t)i * (size_t)r + (size_t)j];
        m->gE[j] += (float)sum;
    }
    for (int i = 0; i < R; i++)
        for (int j = 0; j < r; j++)
            dr[(size_t)i * (size_t)r + (size_t)j] *= m->E[j];
}

/* Gradients of the factors; dx (if not NULL) = or += dh A. */
static void change_back(struct train *t, struct train_module *m, const float *x, int ldx,
                        const float *dy, float *dx, int lddx, bool add)
{
    const int R = t->batch.rows;
    float *dr = t->b.dr;
    if (m->r == 0) {
        if (dx != NULL && !add)
            for (int i = 0; i < R; i++)
                memset(dx + (size_t)i * (size_t)lddx, 0, (size_t)m->in * sizeof *dx);
        return;
    }
    if (m->E != NULL) {
        struct rows p = { .m = m, .from = m->h, .to = t->b.hs };
        train_rows(t, m->r, gain_fn, &p);
        train_gemm(t->compute, true, false, m->out, m->r, R, 1, dy, m->out, t->b.hs, m->r, 1, m->gB,
                   m->r);
    } else {
        train_gemm(t->compute, true, false, m->out, m->r, R, m->scaling, dy, m->out, m->h, m->r, 1,
                   m->gB, m->r);
    }
    train_gemm(t->compute, false, false, R, m->r, m->out, m->scaling, dy, m->out, m->B, m->r, 0, dr,
               m->r);
    if (m->E != NULL)
        singular_values(t, m, dr);
    train_gemm(t->compute, true, false, m->r, m->in, R, 1, dr, m->r, x, ldx, 1, m->gA, m->in);
    if (dx != NULL)
        train_gemm(t->compute, false, false, R, m->in, m->r, 1, dr, m->r, m->A, m->in, add ? 1 : 0,
                   dx, lddx);
}

void train_linear_back(struct train *t, const struct train_where *at, int layer, enum module mod,
                       const float *x, int ldx, const float *dy, float *dx, int lddx, bool add)
{
    const struct matrix *w = &t->base->layers[layer].mod[mod].w;
    struct train_module *m = train_slot(t, layer, mod);
    const int R = t->batch.rows;
    const bool drop = m != NULL && drops(t, at), is_dora = m != NULL && m->m != NULL;
    const float *dyg = dy;
    if (is_dora) {
        struct columns c = { m, dy, R };
        struct rows p = { .m = m, .from = dy, .to = t->b.dyg, .to2 = drop ? m->u : NULL };
        pool_run(t->compute->pool, m->out, 64, magnitude_fn, &c);
        train_rows(t, m->out, dora_back_fn, &p); /* u has served its purpose: its place is taken */
        dyg = t->b.dyg;
    }
    if (dx != NULL)
        matmul_dx(t->compute, w, is_dora && !drop ? dyg : dy, R, w->N, dx, lddx, add, t->b.dx);
    if (m == NULL)
        return;
    const float *xd = dropped(t, at, m, x, &ldx);
    if (!drop) {
        change_back(t, m, xd, ldx, dyg, dx, lddx, true);
        return;
    }
    float *ddrop = dx != NULL ? t->b.ddrop : NULL;
    change_back(t, m, xd, ldx, dyg, ddrop, m->in, false);
    if (dx == NULL)
        return;
    if (is_dora)
        matmul_dx(t->compute, w, m->u, R, w->N, ddrop, m->in, true, t->b.dx);
    struct drop d = { t, ddrop, m->in, m->in, lddx, dx, drop_stream(at, m), true };
    train_rows(t, m->in, drop_fn, &d);
}
