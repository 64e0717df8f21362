/* forward.c - the transformer block, over all rows of a step.
 *
 * Per layer:  h = norm(x);  q, k, v = h W + LoRA;  norms of q and k if the family has them;  rope;
 * store k, v;  attention;  x += attention W + LoRA;  h = norm(x);  x += down(act(gate) * up).
 * Families differ in what arch.h lists, and all go through the same few loops:
 *   q, k, v in one matrix     its product is not taken apart: `struct heads` says where heads lie
 *   gate and up in one        the same, with the row length of the product
 *   norms after a block       on what it gives, in the loop that adds it to x
 *   parallel residual         that loop takes the norm before it adds
 * All keys of a step are stored before any row attends, so rows of one chunk see each other.
 *
 * In the last layer only rows whose logits are wanted go past their keys and values: the others'
 * outputs are read by nobody.  The rows are moved together then (forward_trim()).
 *
 * All memory is taken in forward_create(). */
#include "engine/forward_int.h"

#include "engine/mem.h"

#include <math.h>
#include <stdlib.h>

/* Elements below which a loop over rows stays in the caller, and elements of a piece. */
enum { SERIAL_ELEMENTS = 32768, PIECE_ELEMENTS = 8192 };

/* --- memory -------------------------------------------------------------------------------- */
static size_t up64(size_t n) { return (n + 63) & ~(size_t)63; }

static void *carve(char *mem, size_t *at, size_t bytes)
{
    void *p = mem != NULL ? mem + *at : NULL;
    *at += up64(bytes);
    return p;
}

/* Products of q, k and v, [max_rows][...] each or together. */
static void lay_out_heads(struct forward *f, const struct arch *a, size_t T, size_t *at)
{
    const size_t one = sizeof(float), Q = (size_t)a->H * (size_t)a->hd;
    const size_t K = (size_t)a->G * (size_t)a->hd;
    char *m = f->mem;
    if (!forward_joined(f)) {
        f->q = (struct heads){ carve(m, at, T * Q * one), (int)Q, a->hd };
        f->k = (struct heads){ carve(m, at, T * K * one), (int)K, a->hd };
        f->v = (struct heads){ carve(m, at, T * K * one), (int)K, a->hd };
        return;
    }
    const bool by_head = f->family->qkv_by_head;
    const int ld = (int)(Q + 2 * K), step = by_head ? 3 * a->hd : a->hd;
    float *all = carve(m, at, T * (size_t)ld * one);
    f->q = f->k = f->v = (struct heads){ all, ld, step };
    if (all != NULL) {
        f->k.p = all + (by_head ? (size_t)a->hd : Q);
        f->v.p = f->k.p + (by_head ? (size_t)a->hd : K);
    }
}

/* Set the pointers into f->mem (or nowhere, to measure); returns the bytes. */
static size_t lay_out(struct forward *f, const struct arch *a, int max_rows, int max_logits)
{
    const size_t T = (size_t)max_rows, one = sizeof(float), D = (size_t)a->D, F = (size_t)a->F;
    const size_t angles = (size_t)f->nropes * (size_t)(a->rot / 2);
    const bool one_product = f->family->module_path[MOD_GATE_UP] != NULL;
    char *m = f->mem;
    size_t at = 0;
    f->x = carve(m, &at, T * D * one);
    f->h = carve(m, &at, T * D * one);
    f->t = carve(m, &at, T * D * one);
    size_t shared = at;
    lay_out_heads(f, a, T, &at);
    f->att = carve(m, &at, T * (size_t)a->H * (size_t)a->hd * one);
    f->ld_gate = one_product ? 2 * a->F : a->F;
    f->gate = carve(m, &shared, T * (size_t)f->ld_gate * one);
    if (one_product)
        f->up = m != NULL ? f->gate + F : NULL;
    else
        f->up = f->family->module_path[MOD_GATE] ? carve(m, &shared, T * F * one) : NULL;
    at = at > shared ? at : shared;
    f->cos = carve(m, &at, T * angles * one);
    f->sin = carve(m, &at, T * angles * one);
    f->slopes = carve(m, &at, (size_t)a->H * one);
    f->lora = carve(m, &at, lora_scratch(max_rows) * one);
    f->logits = carve(m, &at, (size_t)max_logits * (size_t)a->V * one);
    f->rows = carve(m, &at, T * sizeof *f->rows);
    f->groups = carve(m, &at, T * sizeof *f->groups);
    f->spans = carve(m, &at, T * sizeof *f->spans);
    at += attn_lay_out(&f->attn, a->H, a->hd, max_rows, m != NULL ? m + at : NULL);
    return at;
}

/* What lay_out() needs to know. */
static void set_kind(struct forward *f, const struct arch *a)
{
    f->family = family_find(a->family);
    f->nropes = a->rot == 0 ? 0 : a->rope_theta_local > 0 ? 2 : 1;
}

static int widest(const struct arch *a)
{
    int k = a->H * a->hd;
    k = k > a->D ? k : a->D;
    return k > a->F ? k : a->F;
}

size_t forward_bytes(const struct base *b, int max_rows, int max_logits)
{
    struct forward f = { .mem = NULL };
    set_kind(&f, &b->arch);
    /* Packed activations take at most 2 bytes per element, and scales. */
    return lay_out(&f, &b->arch, max_rows, max_logits) +
           (size_t)f.nropes * rope_bytes(&b->arch) +
           (size_t)max_rows * ((size_t)widest(&b->arch) * 9 / 4 + 256);
}

int forward_create(const struct base *b, const struct compute *c, struct kv_cache *kv, int context,
                   int max_rows, int max_logits, struct forward **ret, struct err *err)
{
    struct forward *f = calloc(1, sizeof *f);
    if (f == NULL)
        return err_nomem(err);
    f->base = b;
    set_kind(f, &b->arch);
    f->compute = c;
    f->kv = kv;
    f->ops = ops_for(c->isa);
    f->max_rows = max_rows;
    f->max_logits = max_logits;
    act_init(&f->act);
    f->mem_bytes = lay_out(f, &b->arch, max_rows, max_logits);
    f->mem = mem_alloc(f->mem_bytes);
    int rc = f->mem == NULL ? err_nomem(err) : ERR_OK;
    if (rc == ERR_OK) {
        lay_out(f, &b->arch, max_rows, max_logits);
        rc = act_reserve(&f->act, max_rows, widest(&b->arch), err);
    }
    if (rc == ERR_OK && f->nropes > 0)
        rc = rope_create(&b->arch, context, &f->rope[0], err);
    if (rc == ERR_OK && f->nropes > 1) {
        struct arch local = b->arch;
        local.rope_theta = local.rope_theta_local;
        local.rope_scaling = ROPE_PLAIN;
        local.rope_amplitude = 1;
        rc = rope_create(&local, context, &f->rope[1], err);
    }
    if (rc != ERR_OK) {
        forward_destroy(f);
        return rc;
    }
    attn_slopes(b->arch.H, f->slopes);
    *ret = f;
    return ERR_OK;
}

void forward_destroy(struct forward *f)
{
    if (f == NULL)
        return;
    rope_destroy(f->rope[0]);
    rope_destroy(f->rope[1]);
    act_free(&f->act);
    if (f->mem != NULL)
        mem_free(f->mem, f->mem_bytes);
    free(f);
}

/* --- loops over rows ------------------------------------------------------------------------- */
struct loop {
    struct forward *f;
    const struct base_norm *norm, *post; /* post: of what a block adds; may have no weights */
    enum norm which, which_post;         /* which they are: norm of layer norm_l, post of layer l */
    int norm_l;
    const struct base_layer *layer;
    int l;
};

static void rows_run(struct forward *f, struct loop *loop, int elements, pool_fn fn)
{
    const int64_t all = (int64_t)f->nrows * elements, grain = PIECE_ELEMENTS / elements;
    pool_run(all < SERIAL_ELEMENTS ? NULL : f->compute->pool, f->nrows, grain < 1 ? 1 : grain, fn,
             loop);
}

/* The norm n of row r: the base's, or what the row's adapter has in its place.  Norm `which` of
 * layer l; l is L for the model's own. */
static void norm_row(const struct forward *f, int64_t r, int l, enum norm which,
                     const struct base_norm *n, const float *x, int len, float *y)
{
    const float eps = f->base->arch.norm_eps;
    const struct lora_set *set = f->rows[r].span->lora;
    /* Who replaces norms is alone in its set (lora_set_check). */
    const struct base_norm *own = set->n > 0 ? set->item[0].adapter->norms : NULL;
    struct base_norm mixed;
    if (own != NULL) {
        own += adapter_norm_index(f->base->arch.L, l, which);
        mixed.w = own->w != NULL ? own->w : n->w;
        mixed.bias = own->bias != NULL ? own->bias : n->bias;
        n = &mixed;
    }
    if (n->bias != NULL)
        f->ops->layernorm(x, n->w, n->bias, eps, len, y);
    else
        f->ops->rmsnorm(x, n->w, eps, len, y);
}

static void embed_fn(void *arg, int64_t begin, int64_t end, int thread)
{
    struct forward *f = ((struct loop *)arg)->f;
    const struct base *b = f->base;
    const int D = b->arch.D, half = b->arch.rot / 2;
    (void)thread;
    for (int64_t r = begin; r < end; r++) {
        float *x = f->x + r * D;
        forward_embed(f, f->rows[r].span->lora, f->rows[r].token, x);
        if (b->arch.embed_scale != 1)
            f->ops->scale((float)b->arch.embed_scale, D, x);
        if (f->family->position == POS_LEARNED) {
            matrix_row(&b->positions, f->rows[r].pos, f->h + r * D);
            f->ops->add(f->h + r * D, D, x);
        }
        if (b->norm_embed.w != NULL)
            norm_row(f, r, b->arch.L, NORM_EMBED, &b->norm_embed, x, D, x);
        for (int i = 0; i < f->nropes; i++) {
            const int64_t at = (r * f->nropes + i) * half;
            rope_angles(f->rope[i], f->rows[r].pos, f->cos + at, f->sin + at);
        }
    }
}

static void norm_fn(void *arg, int64_t begin, int64_t end, int thread)
{
    const struct loop *p = arg;
    const struct forward *f = p->f;
    const int D = f->base->arch.D;
    (void)thread;
    for (int64_t r = begin; r < end; r++)
        norm_row(f, r, p->norm_l, p->which, p->norm, f->x + r * D, D, f->h + r * D);
}

/* After attention or MLP: x += t, h = norm(x). */
static void add_norm_fn(void *arg, int64_t begin, int64_t end, int thread)
{
    const struct loop *p = arg;
    const struct forward *f = p->f;
    const int D = f->base->arch.D;
    (void)thread;
    for (int64_t r = begin; r < end; r++) {
        float *x = f->x + r * D, *t = f->t + r * D;
        if (p->post->w != NULL)
            norm_row(f, r, p->l, p->which_post, p->post, t, D, t);
        f->ops->add(t, D, x);
        norm_row(f, r, p->norm_l, p->which, p->norm, x, D, f->h + r * D);
    }
}

/* The same in the middle of a block whose two halves read the same x. */
static void norm_add_fn(void *arg, int64_t begin, int64_t end, int thread)
{
    const struct loop *p = arg;
    const struct forward *f = p->f;
    const int D = f->base->arch.D;
    (void)thread;
    for (int64_t r = begin; r < end; r++) {
        norm_row(f, r, p->norm_l, p->which, p->norm, f->x + r * D, D, f->h + r * D);
        f->ops->add(f->t + r * D, D, f->x + r * D);
    }
}

static void act_fn(void *arg, int64_t begin, int64_t end, int thread)
{
    const struct forward *f = ((struct loop *)arg)->f;
    const int F = f->base->arch.F;
    const enum activation act = f->base->arch.act;
    (void)thread;
    for (int64_t r = begin; r < end; r++) {
        float *gate = f->gate + r * f->ld_gate;
        const float *up = f->up != NULL ? f->up + r * f->ld_gate : NULL;
        if (act == ACT_SILU)
            f->ops->silu_mul(gate, up, F, gate);
        else if (act == ACT_GELU_TANH)
            f->ops->gelu_tanh(gate, up, F, gate);
        else
            f->ops->gelu_erf(gate, up, F, gate);
    }
}

/* Norm and rotate n heads of row r. */
static void heads_rope(const struct loop *p, enum norm kind, const struct heads *heads, int n,
                       int64_t r)
{
    const struct forward *f = p->f;
    const struct arch *a = &f->base->arch;
    const int which = f->nropes == 2 && arch_layer_windowed(a, p->l);
    const int64_t angle = (r * f->nropes + which) * (a->rot / 2);
    const bool turn = arch_layer_rope(a, p->l);
    const struct base_norm *norm = &p->layer->norm[kind];
    float *x = heads->p + r * heads->ld;
    for (int h = 0; h < n; h++, x += heads->step) {
        if (norm->w != NULL)
            norm_row(f, r, p->l, kind, norm, x, a->hd, x);
        if (turn && f->family->position == POS_ROPE_INTERLEAVED)
            f->ops->rope_pairs(x, f->cos + angle, f->sin + angle, a->rot);
        else if (turn)
            f->ops->rope(x, f->cos + angle, f->sin + angle, a->rot);
    }
}

static void q_fn(void *arg, int64_t begin, int64_t end, int thread)
{
    const struct loop *p = arg;
    (void)thread;
    for (int64_t r = begin; r < end; r++)
        heads_rope(p, NORM_Q, &p->f->q, p->f->base->arch.H, r);
}

static void kv_fn(void *arg, int64_t begin, int64_t end, int thread)
{
    const struct loop *p = arg;
    const struct forward *f = p->f;
    const struct arch *a = &f->base->arch;
    (void)thread;
    for (int64_t r = begin; r < end; r++) {
        heads_rope(p, NORM_K, &f->k, a->G, r);
        attn_store(f->ops, f->kv, f->rows[r].span->kv->pages, p->l, a->G, a->hd, f->rows[r].pos,
                   f->k.p + r * f->k.ld, f->v.p + r * f->v.ld, f->k.step);
    }
}

static void softcap_fn(void *arg, int64_t begin, int64_t end, int thread)
{
    const struct forward *f = ((struct loop *)arg)->f;
    const struct arch *a = &f->base->arch;
    (void)thread;
    for (int64_t r = begin; r < end; r++)
        f->ops->softcap((float)a->final_softcap, a->V, f->logits + r * a->V);
}

/* --- linear layers --------------------------------------------------------------------------- */
/* Linear layers that share their input, in the order in which a block computes them.  The last are
 * those of the first kind in the next layer. */
enum { LIN_QKV, LIN_O, LIN_IN, LIN_DOWN, LIN_KINDS };

static struct lora_where where(const struct forward *f, int l, int kind)
{
    static const enum module qkv[] = { MOD_Q, MOD_K, MOD_V }, joined[] = { MOD_QKV },
                             o[] = { MOD_O }, in[] = { MOD_GATE, MOD_UP },
                             fused[] = { MOD_GATE_UP }, down[] = { MOD_DOWN };
    switch (kind) {
    case LIN_QKV:
        return forward_joined(f) ? (struct lora_where){ l, joined, 1 }
                                 : (struct lora_where){ l, qkv, 3 };
    case LIN_O:
        return (struct lora_where){ l, o, 1 };
    case LIN_IN:
        return f->ld_gate != f->base->arch.F ? (struct lora_where){ l, fused, 1 }
               : f->up != NULL               ? (struct lora_where){ l, in, 2 }
                                             : (struct lora_where){ l, in + 1, 1 };
    default:
        return (struct lora_where){ l, down, 1 };
    }
}

/* y[i] = x W + bias + LoRA for modules [first, first + n) of a kind, whose x is packed. */
static void linear_some(struct forward *f, int l, int kind, int first, int n, const float *x, int ldx,
                        float *const *y)
{
    const struct base_layer *layer = &f->base->layers[l];
    const int after = l * LIN_KINDS + kind + 1;
    struct lora_where now = where(f, l, kind), next = where(f, after / LIN_KINDS, after % LIN_KINDS);
    struct lora_work lora;
    struct mat_product p[PRODUCTS_MAX];
    int ldy[PRODUCTS_MAX];
    const float *bias[PRODUCTS_MAX];
    now.mods += first;
    now.nmods = n;
    for (int i = 0; i < n; i++) {
        const struct base_linear *lin = &layer->mod[now.mods[i]];
        ldy[i] = lin->w.N;
        bias[i] = lin->bias;
        p[i] = (struct mat_product){ &lin->w, lin->bias, y[i], ldy[i] };
    }
    lora_begin(&lora, f->compute, f->groups, f->ngroups, &now,
               next.layer < f->base->arch.L ? &next : NULL, x, ldx, y, ldy, f->lora);
    matmul_all(f->compute, &f->act, p, n, lora_epilogue(&lora));
    lora_end(&lora);
    lora_finish(f->compute, f->groups, f->ngroups, l, now.mods, n, bias, y, ldy);
}

static void linear(struct forward *f, int l, int kind, const float *x, int ldx, float *const *y)
{
    linear_some(f, l, kind, 0, where(f, l, kind).nmods, x, ldx, y);
}

static void pack(struct forward *f, const float *x, int in, int ldx)
{
    act_pack(f->compute, &f->act, x, f->nrows, in, ldx);
}

/* --- the block --------------------------------------------------------------------------------- */
/* q in f->q, keys and values in the cache; with `only_wanted`, q of wanted rows only. */
static void block_qkv(struct forward *f, int l, bool only_wanted)
{
    const struct arch *a = &f->base->arch;
    struct loop loop = { .f = f, .layer = &f->base->layers[l], .l = l };
    float *const y[] = { f->q.p, f->k.p, f->v.p };
    const bool q_first = forward_joined(f) || !only_wanted;
    pack(f, f->h, a->D, a->D);
    if (q_first)
        linear(f, l, LIN_QKV, f->h, a->D, y);
    else
        linear_some(f, l, LIN_QKV, 1, 2, f->h, a->D, y + 1);
    rows_run(f, &loop, a->G * a->hd * 4, kv_fn);
    if (only_wanted)
        forward_trim(f);
    if (f->nrows == 0)
        return;
    if (!q_first) {
        pack(f, f->h, a->D, a->D);
        linear_some(f, l, LIN_QKV, 0, 1, f->h, a->D, y);
    }
    rows_run(f, &loop, a->H * a->hd, q_fn);
}

static void attend(const struct forward *f, int l)
{
    const struct arch *a = &f->base->arch;
    const struct attn_layer layer = {
        .kv = f->kv, .layer = l, .H = a->H, .G = a->G, .hd = a->hd,
        .window = arch_layer_windowed(a, l) ? a->window : 0,
        .scale = a->attn_scale > 0 ? (float)a->attn_scale : 1.0f / sqrtf((float)a->hd),
        .softcap = (float)a->attn_softcap,
        .slopes = f->family->position == POS_ALIBI ? f->slopes : NULL,
        .q = f->q.p, .q_ld = f->q.ld, .q_step = f->q.step, .out = f->att,
    };
    attn_run(f->compute, &f->attn, &layer, f->spans, f->nspans);
}

static void block_attention(struct forward *f, int l)
{
    const struct arch *a = &f->base->arch;
    const struct base_layer *layer = &f->base->layers[l];
    struct loop loop = { .f = f, .layer = layer, .l = l, .norm = &layer->norm[NORM_MLP],
                         .which = NORM_MLP, .norm_l = l, .post = &layer->norm[NORM_POST_ATTN],
                         .which_post = NORM_POST_ATTN };
    const int wide = a->H * a->hd;
    attend(f, l);
    pack(f, f->att, wide, wide);
    linear(f, l, LIN_O, f->att, wide, &f->t);
    rows_run(f, &loop, a->D, a->parallel ? norm_add_fn : add_norm_fn);
}

static void block_mlp(struct forward *f, int l)
{
    const struct arch *a = &f->base->arch;
    const struct base_layer *layer = &f->base->layers[l];
    struct loop loop = { .f = f, .l = l, .post = &layer->norm[NORM_POST_MLP],
                         .which_post = NORM_POST_MLP, .norm_l = l + 1 };
    pack(f, f->h, a->D, a->D);
    linear(f, l, LIN_IN, f->h, a->D, (float *const[]){ f->gate, f->up });
    rows_run(f, &loop, a->F, act_fn);
    pack(f, f->gate, a->F, f->ld_gate);
    linear(f, l, LIN_DOWN, f->gate, f->ld_gate, &f->t);
    /* The norm that follows belongs to the next block, or is the last one. */
    loop.norm = l + 1 < a->L ? &layer[1].norm[NORM_ATTN] : &f->base->norm_final;
    loop.which = l + 1 < a->L ? NORM_ATTN : NORM_FINAL;
    rows_run(f, &loop, a->D, add_norm_fn);
}

const float *forward_run(struct forward *f, const struct span *spans, int nspans)
{
    const struct arch *a = &f->base->arch;
    struct loop loop = { .f = f, .norm = &f->base->layers[0].norm[NORM_ATTN],
                         .which = NORM_ATTN };
    forward_plan(f, spans, nspans);
    int nwanted = 0;
    for (int s = 0; s < nspans; s++)
        nwanted += spans[s].nlogits;
    if (f->nrows == 0)
        return f->logits;

    rows_run(f, &loop, a->D, embed_fn);
    rows_run(f, &loop, a->D, norm_fn);
    for (int l = 0; l < a->L; l++) {
        block_qkv(f, l, l == a->L - 1 && nwanted < f->nrows);
        if (f->nrows == 0)
            return f->logits;
        block_attention(f, l);
        block_mlp(f, l);
    }
    forward_head(f);
    if (a->final_softcap > 0)
        rows_run(f, &loop, a->V, softcap_fn);
    return f->logits;
}
