/* base_weights.c - the list of weights that a model of some arch has. */
#include "engine/base_int.h"

#include <stdio.h>
#include <stdlib.h>

struct list {
    const struct family *family;
    struct weight *items;
    size_t n;
};

/* `format` has one %d for the layer, or none (layer -1). */
static void add(struct list *l, enum weight_kind kind, int layer, const char *format, int N, int K)
{
    struct weight *w = &l->items[l->n++];
    char path[100];
    snprintf(path, sizeof path, format, layer);
    *w = (struct weight){ .kind = kind, .layer = layer, .N = N, .K = K };
    snprintf(w->name, sizeof w->name, "%s.%s", path, kind == W_BIAS ? "bias" : "weight");
}

static void add_layer(struct list *l, const struct arch *a, int layer)
{
    const struct family *f = l->family;
    add(l, W_NORM_ATTN, layer, f->norm_attn, a->D, 0);
    if (a->qk_norm) {
        add(l, W_Q_NORM, layer, f->q_norm, a->hd, 0);
        add(l, W_K_NORM, layer, f->k_norm, a->hd, 0);
    }
    add(l, W_NORM_MLP, layer, f->norm_mlp, a->D, 0);
    for (int m = 0; m < MOD_COUNT; m++) {
        enum module mod = (enum module)m;
        add(l, W_LINEAR, layer, f->module_path[m], arch_out(a, mod), arch_in(a, mod));
        l->items[l->n - 1].module = mod;
        if (!arch_has_bias(a, mod))
            continue;
        add(l, W_BIAS, layer, f->module_path[m], arch_out(a, mod), 0);
        l->items[l->n - 1].module = mod;
    }
}

int base_weights(const struct arch *a, struct weight **ret, size_t *ret_n, struct err *err)
{
    enum { PER_LAYER = 4 + 2 * MOD_COUNT, OTHERS = 3 };
    struct list l = { .family = family_find(a->family) };
    if (l.family == NULL || (a->qk_norm && l.family->q_norm == NULL))
        return err_set(err, ERR_INVALID, "model config: family %s has no norm of q and k",
                       a->family);
    l.items = calloc((size_t)a->L * PER_LAYER + OTHERS, sizeof *l.items);
    if (l.items == NULL)
        return err_nomem(err);
    add(&l, W_EMBED, -1, l.family->embed, a->V, a->D);
    for (int layer = 0; layer < a->L; layer++)
        add_layer(&l, a, layer);
    add(&l, W_NORM_FINAL, -1, l.family->norm_final, a->D, 0);
    add(&l, W_HEAD, -1, l.family->head, a->V, a->D);
    *ret = l.items;
    *ret_n = l.n;
    return ERR_OK;
}

struct part_name base_part(const char *weight, const char *part)
{
    struct part_name p;
    snprintf(p.s, sizeof p.s, "%s%s", weight, part);
    return p;
}
