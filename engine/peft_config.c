/* peft_config.c - an adapter_config.json as a struct; which modules it means is peft_match.c's. */
#include "engine/peft_int.h"

#include <stdio.h>
#include <string.h>

int peft_wrong(const char *field, const char *want, const json_t *v, struct err *err)
{
    char shown[128];
    return peft_refuse(err, "adapter_config.json: %s must be %s, not %s", field, want,
                       peft_show_json(v, shown));
}

/* An absent or null field leaves *ret alone. */
static int get_int(const json_t *root, const char *field, int low, int high, int *ret,
                   struct err *err)
{
    char want[64];
    const json_t *v = json_object_get(root, field);
    if (v == NULL || json_is_null(v))
        return ERR_OK;
    if (json_is_integer(v) && json_integer_value(v) >= low && json_integer_value(v) <= high) {
        *ret = (int)json_integer_value(v);
        return ERR_OK;
    }
    snprintf(want, sizeof want, "a whole number from %d to %d", low, high);
    return peft_wrong(field, want, v, err);
}

static int get_number(const json_t *root, const char *field, double *ret, struct err *err)
{
    const json_t *v = json_object_get(root, field);
    if (v == NULL || json_is_null(v))
        return ERR_OK;
    if (!json_is_number(v))
        return peft_wrong(field, "a number", v, err);
    *ret = json_number_value(v);
    return ERR_OK;
}

int peft_get_bool(const json_t *root, const char *field, bool *ret, struct err *err)
{
    const json_t *v = json_object_get(root, field);
    if (v == NULL || json_is_null(v))
        return ERR_OK;
    if (!json_is_boolean(v))
        return peft_wrong(field, "true or false", v, err);
    *ret = json_is_true(v);
    return ERR_OK;
}

static int get_dict(const json_t *root, const char *field, json_t **ret, struct err *err)
{
    json_t *v = json_object_get(root, field);
    if (v == NULL || json_is_null(v))
        return ERR_OK;
    if (!json_is_object(v))
        return peft_wrong(field, "an object", v, err);
    *ret = v;
    return ERR_OK;
}

static int check_kind(json_t *root, bool *ret_adalora, struct err *err)
{
    const json_t *type = json_object_get(root, "peft_type");
    const json_t *task = json_object_get(root, "task_type");
    const char *name = json_string_value(type);
    if (name == NULL)
        return peft_refuse(err,
                           "adapter_config.json: peft_type is missing: it must be LORA or ADALORA");
    *ret_adalora = strcmp(name, "ADALORA") == 0;
    if (!*ret_adalora && strcmp(name, "LORA") != 0)
        return peft_wrong("peft_type", "LORA or ADALORA", type, err);
    if (task != NULL && !json_is_null(task) &&
        (!json_is_string(task) || strcmp(json_string_value(task), "CAUSAL_LM") != 0))
        return peft_wrong("task_type", "CAUSAL_LM or null (this server continues text)", task, err);
    return ERR_OK;
}

/* How training began: some beginnings moved part of the base into the adapter, and then the
 * adapter is right only on that other base. */
static int check_init(const json_t *root, struct err *err)
{
    static const char *const harmless[] = { "gaussian", "orthogonal", "eva" };
    const json_t *v = json_object_get(root, "init_lora_weights");
    if (v == NULL || json_is_null(v) || json_is_boolean(v))
        return ERR_OK;
    for (size_t i = 0; json_is_string(v) && i < sizeof harmless / sizeof harmless[0]; i++)
        if (strcmp(json_string_value(v), harmless[i]) == 0)
            return ERR_OK;
    return peft_wrong("init_lora_weights",
                 "true, false, gaussian, orthogonal or eva (others change the base weights)", v,
                 err);
}

/* What there is beside the factors. */
static int read_beside(json_t *root, struct peft_config *c, struct err *err)
{
    static const char *const biases[] = { "none", "lora_only", "all" };
    json_t *bias = json_object_get(root, "bias"), *save = json_object_get(root, "modules_to_save");
    int rc = peft_get_bool(root, "use_dora", &c->dora, err);
    if (rc == ERR_OK)
        rc = peft_get_bool(root, "lora_bias", &c->lora_bias, err);
    if (rc == ERR_OK)
        rc = peft_get_bool(root, "ensure_weight_tying", &c->tie, err);
    if (rc != ERR_OK)
        return rc;
    if (c->dora && c->lora_bias)
        return peft_wrong("lora_bias", "false with use_dora (as PEFT says)",
                     json_object_get(root, "lora_bias"), err);
    bool known = bias == NULL || json_is_null(bias);
    for (int i = 0; json_is_string(bias) && i < 3; i++)
        if (strcmp(json_string_value(bias), biases[i]) == 0) {
            c->bias = (enum peft_bias)i;
            known = true;
        }
    if (!known)
        return peft_wrong("bias", "none, lora_only or all", bias, err);
    json_t *tokens = json_object_get(root, "trainable_token_indices");
    c->tokens = peft_says_nothing(tokens) ? NULL : tokens;
    if (c->tokens != NULL && !json_is_array(tokens) && !json_is_object(tokens))
        return peft_wrong("trainable_token_indices", "a list of ids, or lists by name", tokens, err);
    if (save == NULL || json_is_null(save))
        return ERR_OK;
    /* PEFT takes the names as regular expressions in one place and as they are in another. */
    bool ok = json_is_array(save);
    for (size_t i = 0; ok && i < json_array_size(save); i++) {
        const char *name = json_string_value(json_array_get(save, i));
        ok = name != NULL && name[0] != '\0' &&
             name[strspn(name, "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_.")] ==
                 '\0';
    }
    c->save = json_array_size(save) > 0 ? save : NULL;
    return ok ? ERR_OK
              : peft_wrong("modules_to_save", "a list of module names of letters, digits, _ and .", save,
                      err);
}

int peft_config_read(json_t *root, struct peft_config *c, struct err *err)
{
    *c = (struct peft_config){ .root = root, .r = 8, .alpha = 8 };
    int init_r = 12;
    int rc = check_kind(root, &c->adalora, err);
    if (rc == ERR_OK)
        rc = peft_fields_check(root, c->adalora, err);
    if (rc == ERR_OK)
        rc = check_init(root, err);
    if (rc == ERR_OK)
        rc = get_int(root, "r", 1, ADAPTER_MAX_RANK, &c->r, err);
    if (rc == ERR_OK)
        rc = get_int(root, "init_r", 1, ADAPTER_MAX_RANK, &init_r, err);
    if (rc == ERR_OK)
        rc = get_number(root, "lora_alpha", &c->alpha, err);
    if (rc == ERR_OK)
        rc = peft_get_bool(root, "use_rslora", &c->rslora, err);
    if (rc == ERR_OK)
        rc = get_dict(root, "rank_pattern", &c->rank_pattern, err);
    if (rc == ERR_OK)
        rc = get_dict(root, "alpha_pattern", &c->alpha_pattern, err);
    if (rc == ERR_OK)
        rc = read_beside(root, c, err);
    if (rc == ERR_OK)
        rc = peft_merged_read(c, err);
    if (c->adalora)
        c->r = init_r;
    /* With a pattern, PEFT trains with init_r in place of alpha but reloads with what is left. */
    if (rc == ERR_OK && c->adalora && c->alpha <= 0 && c->rank_pattern != NULL)
        rc = peft_wrong("lora_alpha", "positive in AdaLoRA with a rank_pattern",
                   json_object_get(root, "lora_alpha"), err);
    return rc;
}

int peft_schedule_read(const json_t *root, struct adapter_src *a, struct err *err)
{
    const int big = 1 << 30;
    a->target_r = 8;
    a->deltaT = 1;
    a->beta1 = a->beta2 = 0.85;
    a->orth_reg_weight = 0.5;
    int rc = get_int(root, "target_r", 0, big, &a->target_r, err);
    if (rc == ERR_OK)
        rc = get_int(root, "tinit", 0, big, &a->tinit, err);
    if (rc == ERR_OK)
        rc = get_int(root, "tfinal", 0, big, &a->tfinal, err);
    if (rc == ERR_OK)
        rc = get_int(root, "deltaT", 0, big, &a->deltaT, err);
    if (rc == ERR_OK)
        rc = get_int(root, "total_step", 0, big, &a->total_step, err);
    if (rc == ERR_OK)
        rc = get_number(root, "beta1", &a->beta1, err);
    if (rc == ERR_OK)
        rc = get_number(root, "beta2", &a->beta2, err);
    if (rc == ERR_OK)
        rc = get_number(root, "orth_reg_weight", &a->orth_reg_weight, err);
    return rc;
}
