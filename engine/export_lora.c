/* export_lora.c - an adapter as plain LoRA; see export.h.
 *
 * scaling is a double that alpha / rank must give back.  Rounding scaling * rank may miss it by one
 * unit in the last place; then a neighbour is tried, and in the few cases where no alpha does it,
 * scaling goes into B as well and alpha = rank.
 *
 * Modules are named by their whole paths, in target_modules as in the patterns: every version of
 * PEFT finds a whole path, by itself or as the regular expression that it also is. */
#include "engine/delta.h"
#include "engine/export.h"
#include "engine/peft_int.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

float export_b(const struct adapter_src_module *m, size_t o, size_t j, double factor)
{
    const double b = delta_element(m->B, m->dtype, o * (size_t)m->rank + j);
    return (float)(factor * (double)delta_e(m, j) * b);
}

/* Fills `to`, whose tensors begin at *p, and moves *p on. */
static int convert(const struct adapter_src_module *from, struct adapter_src_module *to, char **p,
                   struct err *err)
{
    const size_t k = (size_t)from->rank, in = (size_t)from->in, out = (size_t)from->out;
    const bool exact = adapter_alpha_of(from->scaling, from->rank, &to->alpha);
    const bool fold = from->E != NULL || !exact;
    const size_t one = fold ? sizeof(float) : dtype_size(from->dtype);
    char *A = *p, *B = *p + k * in * one;
    *p = B + k * out * one;
    to->A = A;
    to->B = B;
    if (!exact)
        to->alpha = from->rank;
    to->scaling = to->alpha / from->rank;
    if (!fold) {
        to->dtype = from->dtype;
        memcpy(A, from->A, k * in * one);
        memcpy(B, from->B, k * out * one);
        return ERR_OK;
    }
    to->dtype = DT_F32;
    for (size_t i = 0; i < k * in; i++) {
        const float a = delta_element(from->A, from->dtype, i);
        memcpy(A + i * sizeof a, &a, sizeof a);
    }
    for (size_t o = 0; o < out; o++)
        for (size_t j = 0; j < k; j++) {
            const float b = export_b(from, o, j, exact ? 1 : from->scaling);
            if (!isfinite(b))
                return err_set(err, ERR_INVALID, "%s: B with the singular values does not fit F32",
                               from->path);
            memcpy(B + (o * k + j) * sizeof b, &b, sizeof b);
        }
    return ERR_OK;
}

static int convert_all(const struct adapter_src *a, struct adapter_src *to, struct err *err)
{
    size_t total = 64;
    for (size_t i = 0; i < a->nmodules; i++)
        total += (size_t)a->modules[i].rank * ((size_t)a->modules[i].in + (size_t)a->modules[i].out) *
                 sizeof(float);
    char *p = to->own = malloc(total);
    to->modules = calloc(a->nmodules + 1, sizeof *to->modules);
    if (p == NULL || to->modules == NULL)
        return err_nomem(err);
    to->rank_min = ADAPTER_MAX_RANK;
    for (size_t i = 0; i < a->nmodules; i++) {
        const struct adapter_src_module *from = &a->modules[i];
        if (from->rank == 0)
            continue;
        struct adapter_src_module *m = &to->modules[to->nmodules++];
        *m = (struct adapter_src_module){ .layer = from->layer, .module = from->module,
                                          .rank = from->rank, .init_rank = from->rank,
                                          .in = from->in, .out = from->out,
                                          .path = strdup(from->path) };
        int rc = m->path == NULL ? err_nomem(err) : convert(from, m, &p, err);
        if (rc != ERR_OK)
            return rc;
        const uint64_t n = (uint64_t)m->rank * ((uint64_t)m->in + (uint64_t)m->out);
        to->params += n;
        to->bytes += n * dtype_size(m->dtype);
        to->rank_max = m->rank > to->rank_max ? m->rank : to->rank_max;
        to->rank_min = m->rank < to->rank_min ? m->rank : to->rank_min;
    }
    return ERR_OK;
}

/* --- the config -------------------------------------------------------------------------------- */

static json_t *config_json(const struct adapter_src *a)
{
    const int r = a->rank_max;
    json_t *ranks = json_object(), *alphas = json_object(), *targets = json_array();
    for (size_t i = 0; i < a->nmodules; i++) {
        const struct adapter_src_module *m = &a->modules[i];
        json_array_append_new(targets, json_string(m->path));
        if (m->rank != r)
            json_object_set_new(ranks, m->path, json_integer(m->rank));
        if (m->alpha != a->alpha)
            json_object_set_new(alphas, m->path, peft_number(m->alpha));
    }
    return json_pack("{s:s, s:s, s:s?, s:s, s:b, s:i, s:o, s:f, s:o, s:o, s:o}", "peft_type", "LORA",
                     "task_type", "CAUSAL_LM", "base_model_name_or_path", a->base_name, "bias",
                     "none", "inference_mode", 1, "r", r, "lora_alpha", peft_number(a->alpha),
                     "lora_dropout", 0.0, "target_modules", targets, "rank_pattern", ranks,
                     "alpha_pattern", alphas);
}

/* The alpha of the modules with the highest rank is the config's; others go into the pattern. */
int export_lora_config(struct adapter_src *a, struct err *err)
{
    for (size_t i = a->nmodules; i-- > 0;)
        if (a->modules[i].rank == a->rank_max)
            a->alpha = a->modules[i].alpha;
    json_t *j = config_json(a);
    a->config = j != NULL ? json_dumps(j, JSON_INDENT(2) | JSON_REAL_PRECISION(17)) : NULL;
    json_decref(j);
    if (a->config == NULL)
        return err_nomem(err);
    a->config_len = strlen(a->config);
    return ERR_OK;
}

int export_lora(const struct adapter_src *a, struct adapter_src **ret, struct err *err)
{
    int rc = delta_check(a, err);
    if (rc == ERR_OK && a->rank_max == 0)
        rc = err_set(err, ERR_INVALID,
                     "every module of the adapter was pruned to rank 0, which plain LoRA cannot say");
    if (rc != ERR_OK)
        return rc;
    struct adapter_src *to = calloc(1, sizeof *to);
    if (to == NULL)
        return err_nomem(err);
    to->method = METHOD_LORA;
    if (a->base_name != NULL && (to->base_name = strdup(a->base_name)) == NULL)
        rc = err_nomem(err);
    if (rc == ERR_OK)
        rc = convert_all(a, to, err);
    if (rc == ERR_OK)
        rc = export_lora_config(to, err);
    if (rc != ERR_OK) {
        adapter_src_free(to);
        return rc;
    }
    adapter_src_hash(to, to->hash);
    *ret = to;
    return ERR_OK;
}
