/* train_block.c - the transformer block, there and back.
 *
 * The way there is forward.c's, on whole examples: the same norms, rope, activations and linear
 * layers, attention over rows in fp32 (train_attn.h).  It leaves every intermediate value in t->b; the
 * way back of the same block reads them and writes gradients, the activation's in place of its
 * inputs.
 *
 *   h1 = norm(x)   q, k, v = h1 W   norms of heads   rope   att = attention   t1 = att W
 *   xm = x + post(t1)      h2 = norm(xm)   (parallel residual: h2 = norm(x))
 *   gate, up = h2 W        act = f(gate) up        t2 = act W        x_out = xm + post(t2) */
#include "engine/train_int.h"

#include "engine/ops_grad.h"

#include <math.h>
#include <string.h>

/* Elements below which a loop stays in the caller, and elements of a piece. */
enum { SERIAL_ELEMENTS = 32768, PIECE_ELEMENTS = 8192 };

void train_rows(struct train *t, int elements, pool_fn fn, void *arg)
{
    const int64_t all = (int64_t)t->batch.rows * elements;
    const int64_t grain = PIECE_ELEMENTS / (elements > 0 ? elements : 1);
    pool_run(all < SERIAL_ELEMENTS ? NULL : t->compute->pool, t->batch.rows, grain < 1 ? 1 : grain,
             fn, arg);
}

void train_norm(const struct train *t, const struct base_norm *n, const float *x, int len, float *y)
{
    if (n->bias != NULL)
        t->ops->layernorm(x, n->w, n->bias, t->base->arch.norm_eps, len, y);
    else
        t->ops->rmsnorm(x, n->w, t->base->arch.norm_eps, len, y);
}

void train_norm_back(const struct train *t, const struct base_norm *n, const float *x, int len,
                     const float *dy, float *dx)
{
    if (n->bias != NULL)
        grad_layernorm(t->ops, x, n->w, t->base->arch.norm_eps, len, dy, dx);
    else
        grad_rmsnorm(t->ops, x, n->w, t->base->arch.norm_eps, len, dy, dx);
}

/* --- loops over rows ------------------------------------------------------------------------------ */
struct loop {
    struct train *t;
    const struct base_layer *layer;
    int l;
    const struct base_norm *norm, *post;
    const float *x, *from, *dy;
    float *y, *to, *dx;
};

/* y = norm(x) */
static void norm_fn(void *arg, int64_t begin, int64_t end, int thread)
{
    const struct loop *p = arg;
    const int64_t D = p->t->base->arch.D;
    (void)thread;
    for (int64_t r = begin; r < end; r++)
        train_norm(p->t, p->norm, p->x + r * D, (int)D, p->y + r * D);
}

/* y = x + post(from) */
static void add_fn(void *arg, int64_t begin, int64_t end, int thread)
{
    const struct loop *p = arg;
    const int D = p->t->base->arch.D;
    (void)thread;
    for (int64_t r = begin; r < end; r++) {
        const float *x = p->x + r * D, *from = p->from + r * D;
        float *y = p->y + r * D;
        if (p->post->w == NULL) {
            for (int i = 0; i < D; i++)
                y[i] = x[i] + from[i];
            continue;
        }
        float *to = p->to + r * D;
        train_norm(p->t, p->post, from, D, to);
        for (int i = 0; i < D; i++)
            y[i] = x[i] + to[i];
    }
}

/* to = gradient of what went into post; without post there is nothing to do. */
static void post_back_fn(void *arg, int64_t begin, int64_t end, int thread)
{
    const struct loop *p = arg;
    const int D = p->t->base->arch.D;
    (void)thread;
    for (int64_t r = begin; r < end; r++) {
        memset(p->to + r * D, 0, (size_t)D * sizeof *p->to);
        train_norm_back(p->t, p->post, p->from + r * D, D, p->dy + r * D, p->to + r * D);
    }
}

/* dx += gradient of the norm's input x, from dy */
static void norm_back_fn(void *arg, int64_t begin, int64_t end, int thread)
{
    const struct loop *p = arg;
    const int D = p->t->base->arch.D;
    (void)thread;
    for (int64_t r = begin; r < end; r++)
        train_norm_back(p->t, p->norm, p->x + r * D, D, p->dy + r * D, p->dx + r * D);
}

static void act_fn(void *arg, int64_t begin, int64_t end, int thread)
{
    const struct loop *p = arg;
    const struct train_buffers *b = &p->t->b;
    const int F = p->t->base->arch.F;
    (void)thread;
    for (int64_t r = begin; r < end; r++) {
        const float *gate = b->at->gate + r * b->ld_gate;
        const float *up = b->at->up != NULL ? b->at->up + r * b->ld_gate : NULL;
        if (p->t->base->arch.act == ACT_SILU)
            p->t->ops->silu_mul(gate, up, F, b->act + r * F);
        else if (p->t->base->arch.act == ACT_GELU_TANH)
            p->t->ops->gelu_tanh(gate, up, F, b->act + r * F);
        else
            p->t->ops->gelu_erf(gate, up, F, b->act + r * F);
    }
}

static void act_back_fn(void *arg, int64_t begin, int64_t end, int thread)
{
    const struct loop *p = arg;
    const struct train_buffers *b = &p->t->b;
    const struct ops *ops = p->t->ops;
    const int F = p->t->base->arch.F;
    (void)thread;
    for (int64_t r = begin; r < end; r++) {
        float *gate = b->at->gate + r * b->ld_gate;
        float *up = b->at->up != NULL ? b->at->up + r * b->ld_gate : NULL;
        const float *d = b->dact + r * F;
        if (p->t->base->arch.act == ACT_SILU)
            grad_silu_mul(ops, gate, up, d, F, gate, up);
        else if (p->t->base->arch.act == ACT_GELU_TANH)
            grad_gelu_tanh(ops, gate, up, d, F, gate, up);
        else
            grad_gelu_erf(ops, gate, up, d, F, gate, up);
    }
}

/* --- heads ------------------------------------------------------------------------------------------ */
static void turn(const struct loop *p, float *x, int64_t r, bool back)
{
    const struct train *t = p->t;
    const struct arch *a = &t->base->arch;
    const int half = a->rot / 2, which = t->nropes == 2 && arch_layer_windowed(a, p->l);
    const float *cos = t->cos + (r * t->nropes + which) * half;
    const float *sin = t->sin + ((r * t->nropes + which) * 2 + (back ? 1 : 0)) * half;
    if (t->family->position == POS_ROPE_INTERLEAVED)
        t->ops->rope_pairs(x, cos, sin, a->rot);
    else
        t->ops->rope(x, cos, sin, a->rot);
}

static void heads_there(const struct loop *p, enum norm kind, const struct train_heads *heads, int n,
                        float *raw, int64_t r)
{
    const struct arch *a = &p->t->base->arch;
    const struct base_norm *norm = &p->layer->norm[kind];
    float *x = heads->p + r * heads->ld;
    for (int h = 0; h < n; h++, x += heads->step) {
        if (norm->w != NULL) {
            memcpy(raw + (r * n + h) * a->hd, x, (size_t)a->hd * sizeof *x);
            train_norm(p->t, norm, x, a->hd, x);
        }
        if (arch_layer_rope(a, p->l))
            turn(p, x, r, false);
    }
}

static void heads_back(const struct loop *p, enum norm kind, const struct train_heads *heads, int n,
                       const float *raw, int64_t r)
{
    const struct arch *a = &p->t->base->arch;
    const struct base_norm *norm = &p->layer->norm[kind];
    float *dx = heads->p + r * heads->ld;
    float dy[1024];
    for (int h = 0; h < n; h++, dx += heads->step) {
        if (arch_layer_rope(a, p->l))
            turn(p, dx, r, true);
        if (norm->w == NULL)
            continue;
        memcpy(dy, dx, (size_t)a->hd * sizeof *dy);
        memset(dx, 0, (size_t)a->hd * sizeof *dx);
        train_norm_back(p->t, norm, raw + (r * n + h) * a->hd, a->hd, dy, dx);
    }
}

static void heads_fn(void *arg, int64_t begin, int64_t end, int thread)
{
    const struct loop *p = arg;
    const struct train_buffers *b = &p->t->b;
    (void)thread;
    for (int64_t r = begin; r < end; r++) {
        heads_there(p, NORM_Q, &b->at->q, p->t->base->arch.H, b->at->q_raw, r);
        heads_there(p, NORM_K, &b->at->k, p->t->base->arch.G, b->at->k_raw, r);
    }
}

static void heads_back_fn(void *arg, int64_t begin, int64_t end, int thread)
{
    const struct loop *p = arg;
    const struct train_buffers *b = &p->t->b;
    (void)thread;
    for (int64_t r = begin; r < end; r++) {
        heads_back(p, NORM_Q, &b->dq, p->t->base->arch.H, b->at->q_raw, r);
        heads_back(p, NORM_K, &b->dk, p->t->base->arch.G, b->at->k_raw, r);
    }
}

static struct train_attn attention(const struct train *t, int l)
{
    const struct arch *a = &t->base->arch;
    return (struct train_attn){
        .H = a->H, .G = a->G, .hd = a->hd,
        .window = arch_layer_windowed(a, l) ? a->window : 0,
        .scale = a->attn_scale > 0 ? (float)a->attn_scale : 1.0f / sqrtf((float)a->hd),
        .softcap = (float)a->attn_softcap,
        .slopes = t->family->position == POS_ALIBI ? t->slopes : NULL,
        .q = t->b.at->q, .k = t->b.at->k, .v = t->b.at->v,
        .segs = t->batch.segs, .nsegs = t->batch.nsegs,
    };
}

/* --- there -------------------------------------------------------------------------------------------- */
static const enum module QKV[] = { MOD_Q, MOD_K, MOD_V }, JOINED = MOD_QKV, O = MOD_O,
                         GATE_UP[] = { MOD_GATE, MOD_UP }, BOTH = MOD_GATE_UP, DOWN = MOD_DOWN;

static bool joined(const struct train *t) { return t->family->module_path[MOD_QKV] != NULL; }
static bool one_product(const struct train *t)
{
    return t->family->module_path[MOD_GATE_UP] != NULL;
}

static void normed(struct loop *p, enum norm which, const float *x, float *y)
{
    p->norm = &p->layer->norm[which];
    p->x = x;
    p->y = y;
    train_rows(p->t, p->t->base->arch.D, norm_fn, p);
}

static void there_gate_up(struct train *t, const struct train_where *at, int l)
{
    struct train_buffers *b = &t->b;
    const int D = t->base->arch.D;
    if (one_product(t))
        train_linear(t, at, l, &BOTH, 1, b->h2, D, &b->at->gate);
    else if (b->at->up != NULL)
        train_linear(t, at, l, GATE_UP, 2, b->h2, D, (float *const[]){ b->at->gate, b->at->up });
    else
        train_linear(t, at, l, GATE_UP + 1, 1, b->h2, D, &b->at->gate);
}

static void there_attention(struct train *t, const struct train_where *at, struct loop *p,
                            const float *x)
{
    struct train_buffers *b = &t->b;
    const struct arch *a = &t->base->arch;
    float *const y[] = { b->at->q.p, b->at->k.p, b->at->v.p };
    if (joined(t))
        train_linear(t, at, p->l, &JOINED, 1, b->h1, a->D, y);
    else
        train_linear(t, at, p->l, QKV, 3, b->h1, a->D, y);
    train_rows(t, (a->H + a->G) * a->hd, heads_fn, p);
    const struct train_attn attn = attention(t, p->l);
    train_attn_forward(t->compute, &attn, b->at->att, b->attn);
    train_linear(t, at, p->l, &O, 1, b->at->att, a->H * a->hd, &b->at->t1);
    p->post = &p->layer->norm[NORM_POST_ATTN];
    p->x = x;
    p->from = b->at->t1;
    p->to = b->dt;
    p->y = b->at->xm;
    train_rows(t, a->D, add_fn, p);
}

void train_block(struct train *t, const struct train_where *at, int l, const float *x_in,
                 float *x_out)
{
    struct train_buffers *b = &t->b;
    const struct arch *a = &t->base->arch;
    struct loop p = { .t = t, .layer = &t->base->layers[l], .l = l };
    const bool kept = x_out == NULL && train_is_kept(t, l);
    b->at = train_is_kept(t, l) ? &t->kept[l - t->first_kept] : &t->shared;
    normed(&p, NORM_ATTN, x_in, b->h1);
    if (!kept)
        there_attention(t, at, &p, x_in);
    normed(&p, NORM_MLP, a->parallel ? x_in : b->at->xm, b->h2);
    if (!kept)
        there_gate_up(t, at, l);
    train_rows(t, a->F, act_fn, &p);
    const struct train_module *down = train_slot(t, l, MOD_DOWN);
    p.post = &p.layer->norm[NORM_POST_MLP];
    /* On the way back, what down gives is needed for a norm after it and for DoRA; else its h will
     * do, which saves a quarter of the products. */
    if (x_out != NULL || (!kept && (p.post->w != NULL || (down != NULL && down->m != NULL))))
        train_linear(t, at, l, &DOWN, 1, b->act, a->F, &b->at->t2);
    else if (!kept)
        train_linear_h(t, at, l, MOD_DOWN, b->act, a->F);
    if (x_out == NULL)
        return;
    p.x = b->at->xm;
    p.from = b->at->t2;
    p.to = b->dt;
    p.y = x_out;
    train_rows(t, a->D, add_fn, &p);
}

/* --- back --------------------------------------------------------------------------------------------- */
/* The gradient of what a half of the block gave, before its post norm: dx itself if it has none. */
static const float *back_post(struct train *t, struct loop *p, enum norm kind, const float *given,
                              const float *dx)
{
    p->post = &p->layer->norm[kind];
    if (p->post->w == NULL)
        return dx;
    p->from = given;
    p->dy = dx;
    p->to = t->b.dt;
    train_rows(t, t->base->arch.D, post_back_fn, p);
    return t->b.dt;
}

/* dh2 into t->b.dh */
static void back_mlp(struct train *t, const struct train_where *at, struct loop *p, const float *dx)
{
    struct train_buffers *b = &t->b;
    const struct arch *a = &t->base->arch;
    const float *dt = back_post(t, p, NORM_POST_MLP, b->at->t2, dx);
    train_linear_back(t, at, p->l, MOD_DOWN, b->act, a->F, dt, b->dact, a->F, false);
    train_rows(t, a->F, act_back_fn, p);
    if (one_product(t)) {
        train_linear_back(t, at, p->l, MOD_GATE_UP, b->h2, a->D, b->at->gate, b->dh, a->D, false);
        return;
    }
    if (b->at->up != NULL)
        train_linear_back(t, at, p->l, MOD_GATE, b->h2, a->D, b->at->gate, b->dh, a->D, false);
    train_linear_back(t, at, p->l, MOD_UP, b->h2, a->D, b->at->up != NULL ? b->at->up : b->at->gate, b->dh,
                      a->D, b->at->up != NULL);
}

/* dh1 into t->b.dh, if it is wanted. */
static void back_attention(struct train *t, const struct train_where *at, struct loop *p,
                           const float *dx, bool below)
{
    struct train_buffers *b = &t->b;
    const struct arch *a = &t->base->arch;
    const int wide = a->H * a->hd;
    float *dh = below ? b->dh : NULL;
    const float *dt = back_post(t, p, NORM_POST_ATTN, b->at->t1, dx);
    train_linear_back(t, at, p->l, MOD_O, b->at->att, wide, dt, b->datt, wide, false);
    const struct train_attn attn = attention(t, p->l);
    train_attn_backward(t->compute, &attn, b->at->att, b->datt, b->dq, b->dk, b->dv, b->attn);
    train_rows(t, (a->H + a->G) * a->hd, heads_back_fn, p);
    if (joined(t)) {
        train_linear_back(t, at, p->l, MOD_QKV, b->h1, a->D, b->dq.p, dh, a->D, false);
        return;
    }
    train_linear_back(t, at, p->l, MOD_Q, b->h1, a->D, b->dq.p, dh, a->D, false);
    train_linear_back(t, at, p->l, MOD_K, b->h1, a->D, b->dk.p, dh, a->D, true);
    train_linear_back(t, at, p->l, MOD_V, b->h1, a->D, b->dv.p, dh, a->D, true);
}

void train_block_back(struct train *t, const struct train_where *at, int l, const float *x_in,
                      float *dx)
{
    struct train_buffers *b = &t->b;
    const struct arch *a = &t->base->arch;
    const bool below = l > t->first;
    struct loop p = { .t = t, .layer = &t->base->layers[l], .l = l };
    /* With the parallel residual both halves see the gradient of x_out, so what the MLP's adds to dx
     * waits until attention has read it. */
    back_mlp(t, at, &p, dx);
    if (a->parallel) {
        /* In xm, whose values nobody needs any more. */
        memset(b->at->xm, 0, (size_t)t->batch.rows * (size_t)a->D * sizeof *b->at->xm);
        p.norm = &p.layer->norm[NORM_MLP];
        p.x = x_in;
        p.dy = b->dh;
        p.dx = b->at->xm;
        train_rows(t, a->D, norm_back_fn, &p);
    } else {
        p.norm = &p.layer->norm[NORM_MLP];
        p.x = b->at->xm;
        p.dy = b->dh;
        p.dx = dx;
        train_rows(t, a->D, norm_back_fn, &p);
    }
    back_attention(t, at, &p, dx, below);
    if (!below)
        return;
    p.norm = &p.layer->norm[NORM_ATTN];
    p.x = x_in;
    p.dy = b->dh;
    p.dx = dx;
    train_rows(t, a->D, norm_back_fn, &p);
    if (a->parallel)
        for (size_t i = 0; i < (size_t)t->batch.rows * (size_t)a->D; i++)
            dx[i] += b->at->xm[i];
}
