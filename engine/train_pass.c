/* train_pass.c - one micro-batch: embedding, blocks, loss, and the way back; and the memory for it.
 *
 * What enters each block from the lowest trained one on is kept ([T][D] per layer); everything else
 * is computed again, block by block, on the way back, but for the last blocks that there is memory to
 * keep (train_values; the same bits either way).  The last block's values are still there when the
 * way back begins.  Logits exist for TRAIN_HEAD_ROWS target rows at a time. */
#include "engine/train_int.h"

#include "engine/attn.h"
#include "engine/linear_dx.h"
#include "engine/mem.h"
#include "engine/ops_grad.h"

#include <stdlib.h>
#include <string.h>

/* --- memory ------------------------------------------------------------------------------------------ */
static size_t up64(size_t n) { return (n + 63) & ~(size_t)63; }

struct carver {
    char *mem; /* NULL: only count */
    size_t at;
};

static void *carve(struct carver *c, size_t n, size_t size)
{
    void *p = c->mem != NULL ? c->mem + c->at : NULL;
    c->at += up64(n * size);
    return p;
}

static float *floats(struct carver *c, size_t n) { return carve(c, n, sizeof(float)); }

/* Three matrices, or one with the heads of all three: forward.c's layout. */
static void carve_heads(struct carver *c, const struct train *t, struct train_heads *q,
                        struct train_heads *k, struct train_heads *v)
{
    const struct arch *a = &t->base->arch;
    const size_t T = (size_t)t->T, Q = (size_t)a->H * (size_t)a->hd,
                 K = (size_t)a->G * (size_t)a->hd;
    if (t->family->module_path[MOD_QKV] == NULL) {
        *q = (struct train_heads){ floats(c, T * Q), (int)Q, a->hd };
        *k = (struct train_heads){ floats(c, T * K), (int)K, a->hd };
        *v = (struct train_heads){ floats(c, T * K), (int)K, a->hd };
        return;
    }
    const bool by_head = t->family->qkv_by_head;
    const int ld = (int)(Q + 2 * K), step = by_head ? 3 * a->hd : a->hd;
    float *all = floats(c, T * (size_t)ld);
    *q = *k = *v = (struct train_heads){ all, ld, step };
    if (all != NULL) {
        k->p = all + (by_head ? (size_t)a->hd : Q);
        v->p = k->p + (by_head ? (size_t)a->hd : K);
    }
}

static int largest(const struct train *t, int in_out_r)
{
    int n = 0;
    for (size_t i = 0; i < t->nmodules; i++) {
        const struct train_module *m = &t->modules[i];
        const int v = in_out_r == 0 ? m->in : in_out_r == 1 ? m->out : m->r;
        n = v > n ? v : n;
    }
    return n;
}

/* Scratch of matmul_dx() for every matrix that a gradient passes through. */
static size_t dx_scratch(const struct train *t)
{
    size_t most = matmul_dx_scratch(t->compute, &t->base->head, TRAIN_HEAD_ROWS);
    for (int l = t->first; l < t->base->arch.L; l++)
        for (int m = 0; m < MOD_COUNT; m++) {
            const struct matrix *w = &t->base->layers[l].mod[m].w;
            if (w->codes == NULL)
                continue;
            const size_t n = matmul_dx_scratch(t->compute, w, t->T);
            most = n > most ? n : most;
        }
    return most;
}

/* With `kept`, t1 and t2 only where a norm follows that needs them; else they are the shared ones. */
static void carve_values(struct carver *c, const struct train *t, bool kept, struct train_values *v)
{
    const bool t1 = !kept || t->family->norm_path[NORM_POST_ATTN] != NULL;
    const bool t2 = !kept || t->family->norm_path[NORM_POST_MLP] != NULL;
    const struct arch *a = &t->base->arch;
    const size_t T = (size_t)t->T, D = (size_t)a->D, F = (size_t)a->F,
                 Q = (size_t)a->H * (size_t)a->hd, K = (size_t)a->G * (size_t)a->hd;
    const bool one = t->family->module_path[MOD_GATE_UP] != NULL;
    carve_heads(c, t, &v->q, &v->k, &v->v);
    v->q_raw = a->qk_norm ? floats(c, T * Q) : NULL;
    v->k_raw = a->qk_norm ? floats(c, T * K) : NULL;
    v->att = floats(c, T * Q);
    v->t1 = t1 ? floats(c, T * D) : t->shared.t1;
    v->xm = floats(c, T * D);
    v->t2 = t2 ? floats(c, T * D) : t->shared.t2;
    v->gate = floats(c, T * F * (one ? 2 : 1));
    if (one)
        v->up = v->gate != NULL ? v->gate + F : NULL;
    else
        v->up = t->family->module_path[MOD_GATE] != NULL ? floats(c, T * F) : NULL;
}

static void carve_block(struct carver *c, struct train *t)
{
    const struct arch *a = &t->base->arch;
    struct train_buffers *b = &t->b;
    const size_t T = (size_t)t->T, D = (size_t)a->D, F = (size_t)a->F,
                 Q = (size_t)a->H * (size_t)a->hd;
    const bool drop = t->o.dropout > 0, is_dora = t->o.method == METHOD_DORA;
    float **const D_wide[] = { &b->h1, &b->h2, &b->dh, &b->dt };
    for (size_t i = 0; i < sizeof D_wide / sizeof D_wide[0]; i++)
        *D_wide[i] = floats(c, T * D);
    carve_values(c, t, false, &t->shared);
    carve_heads(c, t, &b->dq, &b->dk, &b->dv);
    b->datt = floats(c, T * Q);
    b->ld_gate = t->family->module_path[MOD_GATE_UP] != NULL ? 2 * a->F : a->F;
    b->act = floats(c, T * F);
    b->dact = floats(c, T * F);
    b->drop = drop ? floats(c, T * (size_t)largest(t, 0)) : NULL;
    b->ddrop = drop ? floats(c, T * (size_t)largest(t, 0)) : NULL;
    b->dyg = is_dora ? floats(c, T * (size_t)largest(t, 1)) : NULL;
    b->gram = is_dora ? floats(c, (size_t)largest(t, 2) * (size_t)largest(t, 2)) : NULL;
    b->hs = floats(c, T * (size_t)largest(t, 2));
    b->dr = floats(c, T * (size_t)largest(t, 2));
    b->attn = floats(c, train_attn_scratch(t->T, a->H, a->G, a->hd, pool_threads(t->compute->pool)));
    b->dx = carve(c, dx_scratch(t), 1);
    b->hn = floats(c, TRAIN_HEAD_ROWS * D);
    b->dhn = floats(c, TRAIN_HEAD_ROWS * D);
    b->logits = floats(c, TRAIN_HEAD_ROWS * (size_t)a->V);
    b->capped = a->final_softcap > 0 ? floats(c, TRAIN_HEAD_ROWS * (size_t)a->V) : NULL;
}

/* h and u of the modules: those of one kind share memory, since only one block is at hand; those of
 * kept blocks have an h of their own. */
static void carve_modules(struct carver *c, struct train *t)
{
    for (int kind = 0; kind < MOD_COUNT; kind++) {
        size_t r = 0, out = 0;
        for (size_t i = 0; i < t->nmodules; i++) {
            const struct train_module *m = &t->modules[i];
            if ((int)m->module != kind)
                continue;
            r = (size_t)m->r > r ? (size_t)m->r : r;
            out = (size_t)m->out;
        }
        float *h = floats(c, (size_t)t->T * r);
        float *u = t->o.method == METHOD_DORA ? floats(c, (size_t)t->T * out) : NULL;
        for (size_t i = 0; i < t->nmodules; i++) {
            struct train_module *m = &t->modules[i];
            if ((int)m->module != kind)
                continue;
            m->h = train_is_kept(t, m->layer) ? floats(c, (size_t)t->T * (size_t)m->r) : h;
            m->u = u;
        }
    }
}

static size_t lay_out(struct train *t, char *mem)
{
    const struct arch *a = &t->base->arch;
    struct carver c = { mem, 0 };
    const size_t T = (size_t)t->T, D = (size_t)a->D;
    const size_t angles = (size_t)t->nropes * (size_t)(a->rot / 2);
    t->xs = floats(&c, (size_t)(a->L - t->first + 1) * T * D);
    t->dx = floats(&c, T * D);
    t->slopes = floats(&c, (size_t)a->H);
    t->cos = floats(&c, T * angles);
    t->sin = floats(&c, T * angles * 2);
    carve_block(&c, t);
    carve_modules(&c, t);
    for (int i = 0; i < t->nkept; i++) {
        struct train_values v;
        carve_values(&c, t, true, t->kept != NULL ? &t->kept[i] : &v);
    }
    t->batch.segs = carve(&c, T, sizeof *t->batch.segs);
    t->batch.tokens = carve(&c, T, sizeof *t->batch.tokens);
    t->batch.pos = carve(&c, T, sizeof *t->batch.pos);
    t->batch.target_rows = carve(&c, T, sizeof *t->batch.target_rows);
    t->batch.targets = carve(&c, T, sizeof *t->batch.targets);
    return c.at;
}

static int widest(const struct arch *a)
{
    int k = a->H * a->hd;
    k = k > a->D ? k : a->D;
    return k > a->F ? k : a->F;
}

/* Packed activations take at most 2 bytes per element, and scales (linear.h). */
static size_t packed_bytes(const struct train *t)
{
    const size_t one = (size_t)t->T * ((size_t)widest(&t->base->arch) * 9 / 4 + 256);
    return one * (t->o.method == METHOD_DORA && t->o.dropout > 0 ? 2 : 1);
}

size_t train_kept_bytes(const struct train *t)
{
    struct train_values v;
    struct carver c = { NULL, 0 };
    carve_values(&c, t, true, &v);
    for (size_t i = 0; i < t->nmodules; i++)
        if (t->modules[i].layer == t->base->arch.L - 1)
            floats(&c, (size_t)t->T * (size_t)t->modules[i].r);
    return c.at;
}

/* Blocks are kept from the last but one down (the last is at hand when the way back begins).  DoRA's u
 * is not kept, so there is nothing to gain. */
void train_pass_keep(struct train *t)
{
    const int most = t->base->arch.L - 1 - t->first;
    const size_t n = t->o.method == METHOD_DORA ? 0 : t->o.keep_bytes / train_kept_bytes(t);
    t->nkept = n < (size_t)most ? (int)n : most;
    t->first_kept = t->base->arch.L - 1 - t->nkept;
}

size_t train_pass_bytes(struct train *t) { return lay_out(t, NULL) + packed_bytes(t); }

int train_pass_create(struct train *t, struct err *err)
{
    const struct arch *a = &t->base->arch;
    int rc = ERR_OK;
    t->nropes = a->rot == 0 ? 0 : a->rope_theta_local > 0 ? 2 : 1;
    act_init(&t->act);
    act_init(&t->act_drop);
    t->kept = calloc((size_t)t->nkept + 1, sizeof *t->kept);
    if (t->kept == NULL)
        return err_nomem(err);
    t->mem_bytes = lay_out(t, NULL);
    t->mem = mem_alloc(t->mem_bytes);
    if (t->mem == NULL)
        return err_set(err, ERR_NOMEM, "there is no memory for %zu bytes of activations",
                       t->mem_bytes);
    lay_out(t, t->mem);
    rc = act_reserve(&t->act, t->T > TRAIN_HEAD_ROWS ? t->T : TRAIN_HEAD_ROWS, widest(a), err);
    if (rc == ERR_OK && t->o.method == METHOD_DORA && t->o.dropout > 0)
        rc = act_reserve(&t->act_drop, t->T, widest(a), err);
    /* As serving does with a context of this length (rope.h). */
    const int context = t->o.max_length > 0 && t->o.max_length < a->max_positions
                            ? t->o.max_length
                            : a->max_positions;
    if (rc == ERR_OK && t->nropes > 0)
        rc = rope_create(a, context, &t->rope[0], err);
    if (rc == ERR_OK && t->nropes > 1) {
        struct arch local = *a;
        local.rope_theta = local.rope_theta_local;
        local.rope_scaling = ROPE_PLAIN;
        local.rope_amplitude = 1;
        rc = rope_create(&local, context, &t->rope[1], err);
    }
    if (rc == ERR_OK)
        attn_slopes(a->H, t->slopes);
    return rc;
}

void train_pass_free(struct train *t)
{
    rope_destroy(t->rope[0]);
    rope_destroy(t->rope[1]);
    act_free(&t->act);
    act_free(&t->act_drop);
    free(t->kept);
    if (t->mem != NULL)
        mem_free(t->mem, t->mem_bytes);
}

/* --- there --------------------------------------------------------------------------------------------- */
/* What enters layer l. */
static float *entering(const struct train *t, int l)
{
    const size_t i = l > t->first ? (size_t)(l - t->first) : 0;
    return t->xs + i * (size_t)t->T * (size_t)t->base->arch.D;
}

static void embed_fn(void *arg, int64_t begin, int64_t end, int thread)
{
    struct train *t = arg;
    const struct base *b = t->base;
    const int D = b->arch.D, half = b->arch.rot / 2;
    (void)thread;
    for (int64_t r = begin; r < end; r++) {
        float *x = entering(t, 0) + r * D, *tmp = t->b.h1 + r * D;
        matrix_row(&b->embed, t->batch.tokens[r], x);
        if (b->arch.embed_scale != 1)
            t->ops->scale((float)b->arch.embed_scale, D, x);
        if (t->family->position == POS_LEARNED) {
            matrix_row(&b->positions, t->batch.pos[r], tmp);
            t->ops->add(tmp, D, x);
        }
        if (b->norm_embed.w != NULL)
            train_norm(t, &b->norm_embed, x, D, x);
        for (int i = 0; i < t->nropes; i++) {
            float *cos = t->cos + (r * t->nropes + i) * half;
            float *sin = t->sin + (r * t->nropes + i) * 2 * half;
            rope_angles(t->rope[i], t->batch.pos[r], cos, sin);
            for (int j = 0; j < half; j++)
                sin[half + j] = -sin[j];
        }
    }
}

/* --- loss ------------------------------------------------------------------------------------------------ */
struct head {
    struct train *t;
    const float *x; /* what leaves the last block */
    int first;      /* target */
    bool learning;
    float scale;
    double loss[TRAIN_HEAD_ROWS];
    bool hit[TRAIN_HEAD_ROWS];
};

static void gather_fn(void *arg, int64_t begin, int64_t end, int thread)
{
    const struct head *h = arg;
    const struct train *t = h->t;
    const int D = t->base->arch.D;
    (void)thread;
    for (int64_t i = begin; i < end; i++)
        train_norm(t, &t->base->norm_final,
                   h->x + (int64_t)t->batch.target_rows[h->first + i] * D, D, t->b.hn + i * D);
}

static void entropy_fn(void *arg, int64_t begin, int64_t end, int thread)
{
    struct head *h = arg;
    const struct train *t = h->t;
    const struct arch *a = &t->base->arch;
    const float cap = (float)a->final_softcap;
    (void)thread;
    for (int64_t i = begin; i < end; i++) {
        float *logits = t->b.logits + i * a->V;
        const int32_t target = t->batch.targets[h->first + i];
        if (cap > 0)
            t->ops->softcap(cap, a->V, logits);
        if (!h->learning)
            h->loss[i] = loss_cross_entropy(t->ops, logits, a->V, target, &h->hit[i]);
        if (!h->learning)
            continue;
        if (cap > 0)
            memcpy(t->b.capped + i * a->V, logits, (size_t)a->V * sizeof *logits);
        h->loss[i] = grad_cross_entropy(t->ops, logits, a->V, target, h->scale, &h->hit[i]);
        if (cap > 0)
            grad_softcap(cap, t->b.capped + i * a->V, a->V, logits);
    }
}

static void scatter_fn(void *arg, int64_t begin, int64_t end, int thread)
{
    const struct head *h = arg;
    const struct train *t = h->t;
    const int D = t->base->arch.D;
    (void)thread;
    for (int64_t i = begin; i < end; i++) {
        const int64_t at = (int64_t)t->batch.target_rows[h->first + i] * D;
        train_norm_back(t, &t->base->norm_final, h->x + at, D, t->b.dhn + i * D, t->dx + at);
    }
}

static void head_rows(struct train *t, struct head *h, int n, struct train_sum *ret)
{
    const struct arch *a = &t->base->arch;
    struct pool *pool = t->compute->pool;
    pool_run(pool, n, 4, gather_fn, h);
    act_pack(t->compute, &t->act, t->b.hn, n, a->D, a->D);
    matmul(t->compute, &t->base->head, &t->act, NULL, t->b.logits, a->V);
    pool_run(pool, n, 1, entropy_fn, h);
    for (int i = 0; i < n; i++) {
        ret->loss += h->loss[i];
        ret->hits += h->hit[i];
    }
    if (!h->learning)
        return;
    matmul_dx(t->compute, &t->base->head, t->b.logits, n, a->V, t->b.dhn, a->D, false, t->b.dx);
    pool_run(pool, n, 4, scatter_fn, h);
}

/* --- a micro-batch --------------------------------------------------------------------------------------- */
static int stopped(train_stop_fn stop, void *ud, struct err *err)
{
    return stop != NULL && stop(ud) ? err_set(err, ERR_CANCELLED, "stopped") : ERR_OK;
}

static int there(struct train *t, const struct train_where *at, train_stop_fn stop, void *ud,
                 struct err *err)
{
    const int L = t->base->arch.L;
    train_rows(t, t->base->arch.D, embed_fn, t);
    for (int l = 0; l < L; l++) {
        int rc = stopped(stop, ud, err);
        if (rc != ERR_OK)
            return rc;
        train_block(t, at, l, entering(t, l), entering(t, l + 1));
    }
    return ERR_OK;
}

static int back(struct train *t, const struct train_where *at, train_stop_fn stop, void *ud,
                struct err *err)
{
    const int L = t->base->arch.L;
    for (int l = L - 1; l >= t->first; l--) {
        int rc = stopped(stop, ud, err);
        if (rc != ERR_OK)
            return rc;
        if (l < L - 1)
            train_block(t, at, l, entering(t, l), NULL);
        train_block_back(t, at, l, entering(t, l), t->dx);
    }
    return ERR_OK;
}

int train_pass(struct train *t, const struct train_where *at, float scale, train_stop_fn stop,
               void *ud, struct train_sum *ret, struct err *err)
{
    const size_t D = (size_t)t->base->arch.D;
    struct head h = { .t = t, .x = entering(t, t->base->arch.L), .learning = at->learning,
                      .scale = scale };
    int rc = there(t, at, stop, ud, err);
    if (rc != ERR_OK)
        return rc;
    if (at->learning)
        memset(t->dx, 0, (size_t)t->batch.rows * D * sizeof *t->dx);
    for (int n; h.first < t->batch.ntargets; h.first += n) {
        n = t->batch.ntargets - h.first;
        n = n < TRAIN_HEAD_ROWS ? n : TRAIN_HEAD_ROWS;
        head_rows(t, &h, n, ret);
        if ((rc = stopped(stop, ud, err)) != ERR_OK)
            return rc;
    }
    return at->learning ? back(t, at, stop, ud, err) : ERR_OK;
}
