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
static struct weight *add(struct list *l, enum weight_kind kind, int layer, const char *format,
                          int N, int K)
{
    struct weight *w = &l->items[l->n++];
    const bool bias = kind == W_BIAS || kind == W_NORM_BIAS;
    char path[100];
    snprintf(path, sizeof path, format, layer);
    *w = (struct weight){ .kind = kind, .layer = layer, .N = N, .K = K };
    snprintf(w->name, sizeof w->name, "%s.%s", path, bias ? "bias" : "weight");
    return w;
}

static void add_norm(struct list *l, int layer, enum norm norm, int N)
{
    const char *format = l->family->norm_path[norm];
    if (format == NULL)
        return;
    add(l, W_NORM, layer, format, N, 0)->norm = norm;
    if (l->family->norm_kind == NORM_LAYER)
        add(l, W_NORM_BIAS, layer, format, N, 0)->norm = norm;
}

static void add_layer(struct list *l, const struct arch *a, int layer)
{
    for (int i = 0; i < LAYER_NORMS; i++) {
        const enum norm norm = (enum norm)i;
        const bool of_heads = norm == NORM_Q || norm == NORM_K;
        if (!of_heads || a->qk_norm)
            add_norm(l, layer, norm, of_heads ? a->hd : a->D);
    }
    for (int m = 0; m < MOD_COUNT; m++) {
        const enum module mod = (enum module)m;
        const char *path = l->family->module_path[m];
        if (path == NULL)
            continue;
        add(l, W_LINEAR, layer, path, arch_out(a, mod), arch_in(a, mod))->module = mod;
        if (arch_has_bias(a, mod))
            add(l, W_BIAS, layer, path, arch_out(a, mod), 0)->module = mod;
    }
}

int base_weights(const struct arch *a, struct weight **ret, size_t *ret_n, struct err *err)
{
    enum { PER_LAYER = 2 * LAYER_NORMS + 2 * MOD_COUNT, OTHERS = 3 + 4 };
    struct list l = { .family = family_find(a->family) };
    if (l.family == NULL || (a->qk_norm && l.family->norm_path[NORM_Q] == NULL))
        return err_set(err, ERR_INVALID, "model config: family %s has no norm of q and k",
                       a->family);
    l.items = calloc((size_t)a->L * PER_LAYER + OTHERS, sizeof *l.items);
    if (l.items == NULL)
        return err_nomem(err);
    add(&l, W_EMBED, -1, l.family->embed, a->V, a->D);
    if (l.family->position == POS_LEARNED)
        add(&l, W_POSITIONS, -1, l.family->positions, a->max_positions, a->D);
    add_norm(&l, -1, NORM_EMBED, a->D);
    for (int layer = 0; layer < a->L; layer++)
        add_layer(&l, a, layer);
    add_norm(&l, -1, NORM_FINAL, a->D);
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
