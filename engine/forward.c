/* forward.c - the transformer block, over all rows of a step.
 *
 * Per layer:  h = norm(x);  q, k, v = h W + LoRA;  norms of q and k if the family has them;  rope;
 * store k, v;  attention;  x += attention W + LoRA;  h = norm(x);  x += down(silu(gate) * up).
 * All keys of a step are stored before any row attends, so rows of one chunk see each other.
 *
 * In the last layer only rows whose logits are wanted go past their keys and values: the others'
 * outputs are read by nobody.  The rows are moved together then (trim()).
 *
 * All memory is taken in forward_create(). */
#include "engine/forward.h"

#include "engine/attn.h"
#include "engine/lora.h"
#include "engine/mem.h"
#include "engine/ops.h"
#include "engine/rope.h"

#include <stdlib.h>
#include <string.h>

/* Elements below which a loop over rows stays in the caller, and elements of a piece. */
enum { SERIAL_ELEMENTS = 32768, PIECE_ELEMENTS = 8192 };
/* Multiply-adds that a piece of attention is cut to, if one block of queries is not more; and
 * below which attention stays in the caller. */
enum { ATTN_PIECE = 1 << 20, ATTN_SERIAL = 1 << 16 };

/* One row of the step. */
struct row {
    const struct span *span;
    int pos;
    int32_t token;
};

/* Neighbouring rows of one sequence, for attention. */
struct piece {
    const int32_t *pages;
    int pos, row, n;
    int level; /* log2 of the cost */
};

struct forward {
    const struct base *base;
    const struct compute *compute;
    struct kv_cache *kv;
    const struct ops *ops;
    struct rope *rope;
    int max_rows, max_logits;
    struct act act;
    void *mem;
    size_t mem_bytes;
    /* [max_rows][...] unless said otherwise */
    float *x, *h, *t;          /* residual stream; a normed copy; what a block adds.  [D] */
    float *q, *k, *v, *att;    /* [H hd], [G hd], [G hd], [H hd] */
    float *gate, *up;          /* [F], in the same memory as q, k, v, att */
    float *cos, *sin;          /* [hd / 2] */
    float *lora;
    float *logits;             /* [max_logits][V] */
    struct row *rows;
    struct lora_group *groups;
    struct piece *pieces, *sorted;
    /* of the step */
    int nrows, ngroups, npieces;
    int64_t attn_cost;
};

/* --- memory -------------------------------------------------------------------------------- */
static size_t up64(size_t n) { return (n + 63) & ~(size_t)63; }

static void *carve(char *mem, size_t *at, size_t bytes)
{
    void *p = mem != NULL ? mem + *at : NULL;
    *at += up64(bytes);
    return p;
}

/* Set the pointers into f->mem (or nowhere, to measure); returns the bytes. */
static size_t lay_out(struct forward *f, const struct arch *a, int max_rows, int max_logits)
{
    const size_t T = (size_t)max_rows, one = sizeof(float), D = (size_t)a->D;
    const size_t Q = (size_t)a->H * (size_t)a->hd, K = (size_t)a->G * (size_t)a->hd;
    const size_t F = (size_t)a->F;
    char *m = f->mem;
    size_t at = 0;
    f->x = carve(m, &at, T * D * one);
    f->h = carve(m, &at, T * D * one);
    f->t = carve(m, &at, T * D * one);
    size_t shared = at;
    f->q = carve(m, &at, T * Q * one);
    f->k = carve(m, &at, T * K * one);
    f->v = carve(m, &at, T * K * one);
    f->att = carve(m, &at, T * Q * one);
    f->gate = carve(m, &shared, T * F * one);
    f->up = carve(m, &shared, T * F * one);
    at = at > shared ? at : shared;
    f->cos = carve(m, &at, T * (size_t)(a->hd / 2) * one);
    f->sin = carve(m, &at, T * (size_t)(a->hd / 2) * one);
    f->lora = carve(m, &at, lora_scratch(max_rows) * one);
    f->logits = carve(m, &at, (size_t)max_logits * (size_t)a->V * one);
    f->rows = carve(m, &at, T * sizeof *f->rows);
    f->groups = carve(m, &at, T * sizeof *f->groups);
    f->pieces = carve(m, &at, T * sizeof *f->pieces);
    f->sorted = carve(m, &at, T * sizeof *f->sorted);
    return at;
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
    /* Packed activations take at most 2 bytes per element, and scales. */
    return lay_out(&f, &b->arch, max_rows, max_logits) + rope_bytes(&b->arch) +
           (size_t)max_rows * ((size_t)widest(&b->arch) * 9 / 4 + 256);
}

int forward_create(const struct base *b, const struct compute *c, struct kv_cache *kv,
                   int max_rows, int max_logits, struct forward **ret, struct err *err)
{
    struct forward *f = calloc(1, sizeof *f);
    if (f == NULL)
        return err_nomem(err);
    f->base = b;
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
    if (rc == ERR_OK)
        rc = rope_create(&b->arch, &f->rope, err);
    if (rc != ERR_OK) {
        forward_destroy(f);
        return rc;
    }
    *ret = f;
    return ERR_OK;
}

void forward_destroy(struct forward *f)
{
    if (f == NULL)
        return;
    rope_destroy(f->rope);
    act_free(&f->act);
    if (f->mem != NULL)
        mem_free(f->mem, f->mem_bytes);
    free(f);
}

/* --- the plan of a step ---------------------------------------------------------------------- */
static bool same_set(const struct lora_set *a, const struct lora_set *b)
{
    return a == b || lora_set_equal(a, b);
}

static void plan_groups(struct forward *f)
{
    f->ngroups = 0;
    for (int r = 0; r < f->nrows; r++) {
        const struct lora_set *set = f->rows[r].span->lora;
        if (f->ngroups > 0 && same_set(f->groups[f->ngroups - 1].set, set))
            f->groups[f->ngroups - 1].end = r + 1;
        else
            f->groups[f->ngroups++] = (struct lora_group){ r, r + 1, set };
    }
}

/* Multiply-adds of one row at position pos, for one key/value head. */
static int64_t row_cost(const struct arch *a, int pos)
{
    return (int64_t)(pos + 1) * a->hd * 2 * (a->H / a->G);
}

/* Pieces of about equal cost; at least one full block of queries each, if the rows suffice. */
static void plan_pieces(struct forward *f)
{
    const struct arch *a = &f->base->arch;
    const int heads = a->H / a->G, least = (OPS_QUERIES + heads - 1) / heads;
    f->npieces = 0;
    f->attn_cost = 0;
    for (int r = 0, n; r < f->nrows; r += n) {
        int run = 1;
        while (r + run < f->nrows && f->rows[r + run].span == f->rows[r].span)
            run++;
        const int64_t cost = row_cost(a, f->rows[r].pos + run);
        n = cost < ATTN_PIECE ? (int)(ATTN_PIECE / cost) : 1;
        n = n < least ? least : n;
        n = n > run ? run : n;
        const uint64_t all = (uint64_t)cost * (uint64_t)n;
        const int level = 63 - __builtin_clzll(all);
        f->pieces[f->npieces++] = (struct piece){ f->rows[r].span->kv->pages, f->rows[r].pos,
                                                  r, n, level };
        f->attn_cost += (int64_t)all * a->G;
    }
    /* The costliest first, so that nobody starts a long piece when the others are done. */
    int first[65] = { 0 };
    for (int i = 0; i < f->npieces; i++)
        first[63 - f->pieces[i].level + 1]++;
    for (int i = 1; i < 65; i++)
        first[i] += first[i - 1];
    for (int i = 0; i < f->npieces; i++)
        f->sorted[first[63 - f->pieces[i].level]++] = f->pieces[i];
}

static void plan(struct forward *f, const struct span *spans, int nspans)
{
    f->nrows = 0;
    for (int s = 0; s < nspans; s++)
        for (int i = 0; i < spans[s].n; i++)
            f->rows[f->nrows++] =
                (struct row){ &spans[s], spans[s].pos + i, spans[s].tokens[i] };
    plan_groups(f);
    plan_pieces(f);
}

static bool wanted(const struct row *r)
{
    return r->pos - r->span->pos >= r->span->n - r->span->nlogits;
}

/* Keep only the rows whose logits are wanted: x, h, and the angles. */
static void trim(struct forward *f)
{
    const size_t D = (size_t)f->base->arch.D, half = (size_t)f->base->arch.hd / 2;
    size_t n = 0;
    for (size_t r = 0; r < (size_t)f->nrows; r++) {
        if (!wanted(&f->rows[r]))
            continue;
        if (n < r) {
            memcpy(f->x + n * D, f->x + r * D, D * sizeof *f->x);
            memcpy(f->h + n * D, f->h + r * D, D * sizeof *f->h);
            memcpy(f->cos + n * half, f->cos + r * half, half * sizeof *f->cos);
            memcpy(f->sin + n * half, f->sin + r * half, half * sizeof *f->sin);
            f->rows[n] = f->rows[r];
        }
        n++;
    }
    f->nrows = (int)n;
    plan_groups(f);
    plan_pieces(f);
}

/* --- loops over rows ------------------------------------------------------------------------- */
struct loop {
    struct forward *f;
    const float *w;                   /* of a norm */
    const struct base_layer *layer;
    int l;
};

static void rows_run(struct forward *f, struct loop *loop, int elements, pool_fn fn)
{
    const int64_t all = (int64_t)f->nrows * elements, grain = PIECE_ELEMENTS / elements;
    pool_run(all < SERIAL_ELEMENTS ? NULL : f->compute->pool, f->nrows, grain < 1 ? 1 : grain, fn,
             loop);
}

static void embed_fn(void *arg, int64_t begin, int64_t end, int thread)
{
    struct forward *f = ((struct loop *)arg)->f;
    const int D = f->base->arch.D, half = f->base->arch.hd / 2;
    (void)thread;
    for (int64_t r = begin; r < end; r++) {
        matrix_row(&f->base->embed, f->rows[r].token, f->x + r * D);
        rope_angles(f->rope, f->rows[r].pos, f->cos + r * half, f->sin + r * half);
    }
}

static void norm_fn(void *arg, int64_t begin, int64_t end, int thread)
{
    const struct loop *p = arg;
    const struct forward *f = p->f;
    const int D = f->base->arch.D;
    (void)thread;
    for (int64_t r = begin; r < end; r++)
        f->ops->rmsnorm(f->x + r * D, p->w, f->base->arch.norm_eps, D, f->h + r * D);
}

static void add_norm_fn(void *arg, int64_t begin, int64_t end, int thread)
{
    const struct loop *p = arg;
    const struct forward *f = p->f;
    const int D = f->base->arch.D;
    (void)thread;
    for (int64_t r = begin; r < end; r++) {
        f->ops->add(f->t + r * D, D, f->x + r * D);
        f->ops->rmsnorm(f->x + r * D, p->w, f->base->arch.norm_eps, D, f->h + r * D);
    }
}

static void silu_fn(void *arg, int64_t begin, int64_t end, int thread)
{
    const struct forward *f = ((struct loop *)arg)->f;
    const int F = f->base->arch.F;
    (void)thread;
    for (int64_t r = begin; r < end; r++)
        f->ops->silu_mul(f->gate + r * F, f->up + r * F, F, f->gate + r * F);
}

static void heads_rope(const struct forward *f, const float *norm, float *x, int n, int64_t r)
{
    const struct arch *a = &f->base->arch;
    const int64_t angle = r * (a->hd / 2);
    for (int h = 0; h < n; h++, x += a->hd) {
        if (norm != NULL)
            f->ops->rmsnorm(x, norm, a->norm_eps, a->hd, x);
        f->ops->rope(x, f->cos + angle, f->sin + angle, a->hd);
    }
}

static void q_fn(void *arg, int64_t begin, int64_t end, int thread)
{
    const struct loop *p = arg;
    const struct arch *a = &p->f->base->arch;
    (void)thread;
    for (int64_t r = begin; r < end; r++)
        heads_rope(p->f, p->layer->q_norm, p->f->q + r * a->H * a->hd, a->H, r);
}

static void kv_fn(void *arg, int64_t begin, int64_t end, int thread)
{
    const struct loop *p = arg;
    const struct forward *f = p->f;
    const struct arch *a = &f->base->arch;
    (void)thread;
    for (int64_t r = begin; r < end; r++) {
        float *k = f->k + r * a->G * a->hd;
        heads_rope(f, p->layer->k_norm, k, a->G, r);
        attn_store(f->ops, f->kv, f->rows[r].span->kv->pages, p->l, a->G, a->hd, f->rows[r].pos, k,
                   f->v + r * a->G * a->hd);
    }
}

static void attn_fn(void *arg, int64_t begin, int64_t end, int thread)
{
    const struct loop *p = arg;
    const struct forward *f = p->f;
    const struct arch *a = &f->base->arch;
    (void)thread;
    const struct attn_layer layer = {
        .kv = f->kv, .layer = p->l, .H = a->H, .G = a->G, .hd = a->hd, .q = f->q, .out = f->att,
        .window = arch_layer_windowed(a, p->l) ? a->window : 0,
    };
    for (int64_t n = begin; n < end; n++) {
        const struct piece *c = &f->sorted[n / a->G];
        attn_rows(f->ops, &layer, c->pages, c->pos, c->row, c->n, (int)(n % a->G));
    }
}

/* --- linear layers --------------------------------------------------------------------------- */
/* y[i] = x W + bias + LoRA for modules that share x, whose activations are packed. */
static void linear(struct forward *f, int l, const float *x, int in, const enum module *mods,
                   int nmods, float *const *y)
{
    const struct base_layer *layer = &f->base->layers[l];
    int ldy[MOD_COUNT];
    for (int i = 0; i < nmods; i++) {
        const struct base_linear *lin = &layer->mod[mods[i]];
        ldy[i] = lin->w.N;
        matmul(f->compute, &lin->w, &f->act, lin->bias, y[i], ldy[i]);
    }
    lora_apply(f->compute, f->groups, f->ngroups, l, mods, nmods, x, in, y, ldy, f->lora);
}

static void pack(struct forward *f, const float *x, int in)
{
    act_pack(f->compute, &f->act, x, f->nrows, in, in);
}

/* --- the block --------------------------------------------------------------------------------- */
/* q in f->q, keys and values in the cache; with `only_wanted`, q of wanted rows only. */
static void block_qkv(struct forward *f, int l, bool only_wanted)
{
    static const enum module mods[] = { MOD_Q, MOD_K, MOD_V };
    const struct arch *a = &f->base->arch;
    struct loop loop = { .f = f, .layer = &f->base->layers[l], .l = l };
    pack(f, f->h, a->D);
    if (!only_wanted) {
        linear(f, l, f->h, a->D, mods, 3, (float *const[]){ f->q, f->k, f->v });
        rows_run(f, &loop, a->G * a->hd * 4, kv_fn);
    } else {
        linear(f, l, f->h, a->D, mods + 1, 2, (float *const[]){ f->k, f->v });
        rows_run(f, &loop, a->G * a->hd * 4, kv_fn);
        trim(f);
        if (f->nrows == 0)
            return;
        pack(f, f->h, a->D);
        linear(f, l, f->h, a->D, mods, 1, (float *const[]){ f->q });
    }
    rows_run(f, &loop, a->H * a->hd, q_fn);
}

static void block_attention(struct forward *f, int l)
{
    static const enum module o = MOD_O;
    const struct arch *a = &f->base->arch;
    struct loop loop = { .f = f, .layer = &f->base->layers[l], .l = l };
    pool_run(f->attn_cost < ATTN_SERIAL ? NULL : f->compute->pool, (int64_t)f->npieces * a->G, 1,
             attn_fn, &loop);
    pack(f, f->att, a->H * a->hd);
    linear(f, l, f->att, a->H * a->hd, &o, 1, &f->t);
    loop.w = loop.layer->norm_mlp;
    rows_run(f, &loop, a->D, add_norm_fn);
}

static void block_mlp(struct forward *f, int l)
{
    static const enum module in[] = { MOD_GATE, MOD_UP }, down = MOD_DOWN;
    const struct arch *a = &f->base->arch;
    struct loop loop = { .f = f };
    pack(f, f->h, a->D);
    linear(f, l, f->h, a->D, in, 2, (float *const[]){ f->gate, f->up });
    rows_run(f, &loop, a->F, silu_fn);
    pack(f, f->gate, a->F);
    linear(f, l, f->gate, a->F, &down, 1, &f->t);
    /* The norm that follows belongs to the next block, or is the last one. */
    loop.w = l + 1 < a->L ? f->base->layers[l + 1].norm_attn : f->base->norm_final;
    rows_run(f, &loop, a->D, add_norm_fn);
}

const float *forward_run(struct forward *f, const struct span *spans, int nspans)
{
    const struct arch *a = &f->base->arch;
    struct loop loop = { .f = f, .w = f->base->layers[0].norm_attn };
    plan(f, spans, nspans);
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
    pack(f, f->h, a->D);
    matmul(f->compute, &f->base->head, &f->act, NULL, f->logits, a->V);
    return f->logits;
}
