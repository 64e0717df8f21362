/* arch_config.c - from config.json to `struct arch`: typed fields, and what all families read.
 *
 * config.json comes in two spellings: transformers 5 writes `rope_parameters` with everything
 * about rope in it, older versions `rope_theta` and `rope_scaling` (whose kind is `rope_type` or
 * `type`).  Both give the same arch.  A setting that would change the result and that the engine
 * cannot compute is refused by name. */
#include "engine/arch.h"
#include "engine/arch_int.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

#define COUNT(t) (sizeof(t) / sizeof(t)[0])

/* --- typed fields --------------------------------------------------------------------- */

int cfg_missing(const char *key, struct err *err)
{
    return err_set(err, ERR_INVALID, "model config: %s is missing", key);
}

/* "model config: head_dim is "x", where ... is expected" */
int cfg_mistyped(const char *key, const json_t *v, const char *expected, struct err *err)
{
    char *text = json_dumps(v, JSON_ENCODE_ANY | JSON_COMPACT);
    err_set(err, ERR_INVALID, "model config: %s is %.80s, where %s is expected", key,
            text ? text : "something", expected);
    free(text);
    return ERR_INVALID;
}

int cfg_int(const json_t *o, const char *key, int def, int min, int max, int *ret,
            struct err *err)
{
    const json_t *v = json_object_get(o, key);
    if (cfg_absent(v)) {
        if (def == CFG_REQUIRED)
            return cfg_missing(key, err);
        *ret = def;
        return ERR_OK;
    }
    json_int_t n = json_integer_value(v);
    if (!json_is_integer(v) || n < min || n > max) {
        char expected[64];
        snprintf(expected, sizeof expected, "an integer from %d to %d", min, max);
        return cfg_mistyped(key, v, expected, err);
    }
    *ret = (int)n;
    return ERR_OK;
}

int cfg_bool(const json_t *o, const char *key, bool def, bool *ret, struct err *err)
{
    const json_t *v = json_object_get(o, key);
    if (!cfg_absent(v) && !json_is_boolean(v))
        return cfg_mistyped(key, v, "true or false", err);
    *ret = cfg_absent(v) ? def : json_is_true(v);
    return ERR_OK;
}

int cfg_double(const json_t *o, const char *key, double def, double min, double max, double *ret,
               struct err *err)
{
    const json_t *v = json_object_get(o, key);
    if (cfg_absent(v)) {
        if (isnan(def))
            return cfg_missing(key, err);
        *ret = def;
        return ERR_OK;
    }
    double x = json_number_value(v);
    if (!json_is_number(v) || !(x >= min && x <= max)) {
        char expected[64];
        snprintf(expected, sizeof expected, "a number from %g to %g", min, max);
        return cfg_mistyped(key, v, expected, err);
    }
    *ret = x;
    return ERR_OK;
}

const char *cfg_pick(const json_t *o, const char *names, char ret[64])
{
    for (;;) {
        size_t n = strcspn(names, "|");
        snprintf(ret, 64, "%.*s", (int)n, names);
        if (names[n] == '\0' || !cfg_absent(json_object_get(o, ret)))
            return ret;
        names += n + 1;
    }
}

/* --- end and begin tokens ------------------------------------------------------------- */

static int add_eos(const json_t *v, struct arch *a, struct err *err)
{
    json_int_t id = json_integer_value(v);
    if (!json_is_integer(v) || id < 0 || id >= a->V)
        return cfg_mistyped("eos_token_id", v, "a token of the vocabulary", err);
    for (int i = 0; i < a->neos; i++)
        if (a->eos[i] == (int)id)
            return ERR_OK;
    if (a->neos == ARCH_MAX_EOS)
        return err_set(err, ERR_INVALID, "config.json: eos_token_id lists more than %d tokens",
                       ARCH_MAX_EOS);
    a->eos[a->neos++] = (int)id;
    return ERR_OK;
}

/* One id or a list of them; generation_config.json is what transformers generates with. */
static int read_eos(const json_t *json, const json_t *gen, struct arch *a, struct err *err)
{
    const json_t *v = json_object_get(gen, "eos_token_id");
    if (cfg_absent(v))
        v = json_object_get(json, "eos_token_id");
    if (cfg_absent(v))
        return ERR_OK;
    if (!json_is_array(v))
        return add_eos(v, a, err);
    int rc = ERR_OK;
    for (size_t i = 0; i < json_array_size(v) && rc == ERR_OK; i++)
        rc = add_eos(json_array_get(v, i), a, err);
    return rc;
}

/* --- config.json ---------------------------------------------------------------------- */

static bool lists(const json_t *array, const char *s)
{
    for (size_t i = 0; i < json_array_size(array); i++) {
        const char *e = json_string_value(json_array_get(array, i));
        if (e != NULL && strcmp(e, s) == 0)
            return true;
    }
    return false;
}

/* NULL after recording why. */
static const struct family *read_family(const json_t *json, struct err *err)
{
    const char *type = json_string_value(json_object_get(json, "model_type"));
    if (type == NULL) {
        cfg_missing("model_type", err);
        return NULL;
    }
    const struct family *f = family_find(type);
    if (f == NULL) {
        err_set(err, ERR_INVALID,
                "config.json: model_type \"%.60s\" is not supported; known families: %s", type,
                family_list());
        return NULL;
    }
    const json_t *archs = json_object_get(json, "architectures");
    bool known = cfg_absent(archs);
    for (size_t i = 0; i < COUNT(f->architecture) && f->architecture[i] != NULL; i++)
        known = known || lists(archs, f->architecture[i]);
    if (!known) {
        const char *got = json_string_value(json_array_get(archs, 0));
        err_set(err, ERR_INVALID,
                "config.json: architecture \"%.60s\" is not supported; of family %s it is %s",
                got ? got : "(none)", type, f->architecture[0]);
        return NULL;
    }
    return f;
}

/* Which tensors are 4-bit, and how, is said beside each of them. */
static bool is_bnb_4bit(const json_t *q)
{
    const char *method = json_string_value(json_object_get(q, "quant_method"));
    return method != NULL && strcmp(method, "bitsandbytes") == 0 &&
           (json_is_true(json_object_get(q, "load_in_4bit")) ||
            json_is_true(json_object_get(q, "_load_in_4bit")));
}

/* Settings that would change the result in a way the engine does not compute. */
static int refuse_foreign(const json_t *json, struct err *err)
{
    const json_t *q = json_object_get(json, "quantization_config");
    if (!cfg_absent(q) && !is_bnb_4bit(q)) {
        const char *method = json_string_value(json_object_get(q, "quant_method"));
        return err_set(err, ERR_INVALID,
                       "config.json has a quantization_config (%.60s) that is not bitsandbytes in "
                       "4 bit; import the original in F32, F16 or BF16",
                       method ? method : "no method named");
    }
    return ERR_OK;
}

static const struct {
    const char *name;
    enum activation act;
} act_names[] = {
    { "silu", ACT_SILU },          { "swish", ACT_SILU },
    { "gelu_tanh", ACT_GELU_TANH }, { "gelu_new", ACT_GELU_TANH },
    { "gelu_fast", ACT_GELU_TANH }, { "gelu_pytorch_tanh", ACT_GELU_TANH },
    { "gelu", ACT_GELU_ERF },
};

bool activation_parse(const char *name, enum activation *ret)
{
    for (size_t i = 0; name != NULL && i < COUNT(act_names); i++)
        if (strcmp(name, act_names[i].name) == 0) {
            *ret = act_names[i].act;
            return true;
        }
    return false;
}

bool activation_fits(const struct family *f, enum activation act)
{
    return (act == ACT_SILU) == (f->act == ACT_SILU);
}

static int read_act(const json_t *json, const struct family *f, struct arch *a, struct err *err)
{
    a->act = f->act;
    const json_t *v = f->keys->act ? json_object_get(json, f->keys->act) : NULL;
    if (cfg_absent(v) ||
        (activation_parse(json_string_value(v), &a->act) && activation_fits(f, a->act)))
        return ERR_OK;
    return cfg_mistyped(f->keys->act, v,
                    f->act == ACT_SILU ? "\"silu\""
                                       : "\"gelu\", \"gelu_new\" or \"gelu_pytorch_tanh\"",
                    err);
}

/* An absent number of key/value heads means as many as query heads in some classes; in others it
 * has a fixed default that no real checkpoint relies on. */
static int read_heads(const json_t *json, const struct family *f, struct arch *a, struct err *err)
{
    const struct config_keys *k = f->keys;
    int rc = ERR_OK;
    a->G = a->H;
    if (k->G != NULL)
        rc = cfg_int(json, k->G,
                     f->absent.G_is_H || json_object_get(json, k->G) != NULL ? a->H : CFG_REQUIRED,
                     1, 1 << 12, &a->G, err);
    if (rc != ERR_OK)
        return rc;
    const bool given = k->hd != NULL && !cfg_absent(json_object_get(json, k->hd));
    if (!given && f->absent.hd == 0 && a->D % a->H != 0)
        return err_set(err, ERR_INVALID,
                       "config.json: hidden_size %d is not a multiple of num_attention_heads %d%s",
                       a->D, a->H, k->hd ? ", and head_dim is missing" : "");
    a->hd = f->absent.hd > 0 ? f->absent.hd : a->D / a->H;
    return k->hd != NULL ? cfg_int(json, k->hd, a->hd, 1, 1 << 12, &a->hd, err) : ERR_OK;
}

static int read_shapes(const json_t *json, const struct family *f, struct arch *a, struct err *err)
{
    const struct config_keys *k = f->keys;
    const struct {
        const char *key;
        int max, def, *ret;
    } fields[] = {
        { k->L, ARCH_MAX_LAYERS, CFG_REQUIRED, &a->L },
        { k->D, 1 << 17, CFG_REQUIRED, &a->D },
        { k->H, 1 << 12, CFG_REQUIRED, &a->H },
        { k->V, 1 << 22, CFG_REQUIRED, &a->V },
        { k->positions, 1 << 30, f->absent.positions ? f->absent.positions : CFG_REQUIRED,
          &a->max_positions },
    };
    char key[64];
    int rc = ERR_OK;
    for (size_t i = 0; i < COUNT(fields) && rc == ERR_OK; i++)
        rc = cfg_int(json, cfg_pick(json, fields[i].key, key), fields[i].def, 1, fields[i].max,
                     fields[i].ret, err);
    if (rc != ERR_OK)
        return rc;
    a->F = 4 * a->D;
    if (k->F != NULL)
        rc = cfg_int(json, k->F, f->absent.F_is_4D ? a->F : CFG_REQUIRED, 1, 1 << 20, &a->F, err);
    return rc == ERR_OK ? read_heads(json, f, a, err) : rc;
}

static int read_config(const json_t *json, const json_t *gen, struct arch *a, struct err *err)
{
    if (!json_is_object(json) || (gen != NULL && !json_is_object(gen)))
        return err_set(err, ERR_INVALID, "%s is not a JSON object",
                       json_is_object(json) ? "generation_config.json" : "config.json");
    double eps = 0;
    const struct family *f = read_family(json, err);
    if (f == NULL)
        return ERR_INVALID;
    snprintf(a->family, sizeof a->family, "%s", f->model_type);
    int rc = refuse_foreign(json, err);
    if (rc == ERR_OK)
        rc = read_act(json, f, a, err);
    if (rc == ERR_OK)
        rc = read_shapes(json, f, a, err);
    if (rc == ERR_OK)
        rc = cfg_double(json, f->keys->eps, f->absent.eps, 1e-12, 0.1, &eps, err);
    a->norm_eps = (float)eps;
    if (rc == ERR_OK && f->keys->theta != NULL)
        rc = cfg_rope(json, f, a, err);
    if (rc == ERR_OK)
        rc = cfg_bool(json, "tie_word_embeddings", f->absent.tied, &a->tied, err);
    if (rc == ERR_OK)
        rc = cfg_int(json, "bos_token_id", -1, 0, a->V - 1, &a->bos, err);
    if (rc == ERR_OK)
        rc = read_eos(json, gen, a, err);
    if (rc == ERR_OK)
        rc = f->read_config(json, a, err);
    return rc == ERR_OK ? arch_check(a, err) : rc;
}

int cfg_parse(const char *text, const char *what, json_t **ret, struct err *err)
{
    *ret = NULL;
    if (text == NULL)
        return ERR_OK;
    json_error_t je;
    *ret = json_loads(text, JSON_REJECT_DUPLICATES, &je);
    if (*ret == NULL)
        return err_set(err, ERR_INVALID, "%s is not valid JSON (line %d: %s)", what, je.line,
                       je.text);
    return ERR_OK;
}

int arch_from_config(const char *config, const char *generation_config, struct arch *ret,
                     struct err *err)
{
    json_t *json = NULL, *gen = NULL;
    struct arch a = { .bos = -1, .rope_theta = 10000, .embed_scale = 1 };
    int rc = cfg_parse(config, "config.json", &json, err);
    if (rc == ERR_OK)
        rc = cfg_parse(generation_config, "generation_config.json", &gen, err);
    if (rc == ERR_OK)
        rc = read_config(json, gen, &a, err);
    json_decref(json);
    json_decref(gen);
    if (rc == ERR_OK)
        *ret = a;
    return rc;
}
