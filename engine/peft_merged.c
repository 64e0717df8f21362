/* peft_merged.c - enable_lora: layers of the first versions of PEFT, turned into plain LoRA.
 *
 * With p parts of which s are on, such a layer has A [s r, in] and B [out / p * s, s r / 2, 1], the
 * weight of a convolution of width 1 in two groups: the first half of B's rows sees the first half of
 * A's, the second half the second.  Row i of what comes out is added to row i % (out / p) of the
 * (i / (out / p))-th part that is on.  The scaling is alpha / r.
 *
 * The same as plain LoRA: rank s r, alpha s alpha, and B [out, s r] with those blocks and zeros. */
#include "engine/peft_int.h"

#include <string.h>

enum { PARTS_MAX = 64, GROUPS = 2 };

static int refuse(struct err *err, const char *what, const json_t *v)
{
    char shown[128];
    return peft_refuse(err, "adapter_config.json: enable_lora %s: %s", what, peft_show_json(v, shown));
}

/* What a MergedLinear could not have been saved with, or what has no plain form. */
static int check_others(const struct peft_config *c, struct err *err)
{
    static const char *const later[] = { "rank_pattern", "alpha_pattern", "use_rslora", "use_dora",
                                         "lora_bias", "trainable_token_indices" };
    for (size_t i = 0; i < sizeof later / sizeof later[0]; i++)
        if (!peft_says_nothing(json_object_get(c->root, later[i])))
            return peft_refuse(err, "adapter_config.json: enable_lora does not go with %s, which is "
                               "younger", later[i]);
    if (c->bias != BIAS_NONE)
        return peft_refuse(err, "adapter_config.json: enable_lora does not go with bias here: the "
                           "layers of that time named their biases otherwise");
    return ERR_OK;
}

int peft_merged_read(struct peft_config *c, struct err *err)
{
    json_t *v = json_object_get(c->root, "enable_lora");
    const size_t n = json_array_size(v);
    if (peft_says_nothing(v))
        return ERR_OK;
    if (!json_is_array(v) || n > PARTS_MAX)
        return refuse(err, "must be a list of booleans, one for each part of a layer", v);
    for (size_t i = 0; i < n; i++) {
        if (!json_is_boolean(json_array_get(v, i)))
            return refuse(err, "must be a list of booleans, one for each part of a layer", v);
        c->parts_on += json_is_true(json_array_get(v, i));
    }
    if (c->parts_on == 0)
        return refuse(err, "turns no part on", v);
    c->merged = v;
    c->parts = (int)n;
    return check_others(c, err);
}

int peft_merged_check(const struct peft_reading *r, const struct adapter_src_module *m,
                      const struct st_tensor *B)
{
    char shown[128];
    const int p = r->c.parts, s = r->c.parts_on;
    const int64_t rows = (int64_t)m->out / p * s;
    if (m->out % p != 0 || rows % GROUPS != 0 || m->rank % GROUPS != 0)
        return peft_refuse(r->err,
                           "%s: enable_lora cuts %d outputs into %d parts, %d of them on, and rank %d "
                           "into two groups, which does not come out even",
                           m->path, m->out, p, s, r->c.r);
    if (B->ndim != 3 || B->shape[0] != rows || B->shape[1] != m->rank / GROUPS || B->shape[2] != 1)
        return peft_refuse(r->err,
                           "tensor %s has another shape than [%lld, %d, 1] (two groups, as enable_lora, "
                           "r %d and %d outputs of this base say)",
                           peft_show(B->name, shown), (long long)rows, m->rank / GROUPS, r->c.r,
                           m->out);
    return peft_check_values(r, B);
}

size_t peft_merged_bytes(const struct adapter_src_module *m)
{
    return (size_t)m->out * (size_t)m->rank * dtype_size(m->dtype);
}

/* The output that row i of the grouped B belongs to. */
static size_t output_of(const struct peft_config *c, size_t part, size_t i)
{
    size_t left = i / part;
    for (size_t e = 0; e < (size_t)c->parts; e++)
        if (json_is_true(json_array_get(c->merged, e)) && left-- == 0)
            return e * part + i % part;
    return 0; /* not reached: i is less than part * parts_on */
}

void peft_merged_expand(const struct peft_config *c, const struct adapter_src_module *m, void *ret)
{
    const size_t one = dtype_size(m->dtype), half = (size_t)m->rank / GROUPS;
    const size_t part = (size_t)(m->out / c->parts), rows = part * (size_t)c->parts_on;
    memset(ret, 0, peft_merged_bytes(m));
    for (size_t i = 0; i < rows; i++) {
        const size_t group = i / (rows / GROUPS);
        const size_t to = output_of(c, part, i) * (size_t)m->rank + group * half;
        memcpy((char *)ret + to * one, (const char *)m->B + i * half * one, half * one);
    }
}

char *peft_merged_config(const struct peft_config *c, double alpha, struct err *err)
{
    static const char *const gone[] = { "enable_lora", "merge_weights", "fan_in_fan_out" };
    json_t *root = json_deep_copy(c->root);
    for (size_t i = 0; i < sizeof gone / sizeof gone[0]; i++)
        json_object_del(root, gone[i]);
    char *text = NULL;
    if (root != NULL && json_object_set_new(root, "r", json_integer(c->r * c->parts_on)) == 0 &&
        json_object_set_new(root, "lora_alpha", peft_number(alpha)) == 0)
        text = json_dumps(root, JSON_INDENT(2) | JSON_REAL_PRECISION(17));
    json_decref(root);
    if (text == NULL)
        err_nomem(err);
    return text;
}
