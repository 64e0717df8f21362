/* arch_kept.c - the form of `struct arch` that a base file keeps, and the check that every arch has
 * to pass, wherever it came from.
 *
 * The form is JSON with one member per field.  A field that is new in a later version of lorad has
 * a default that means what older files mean without it. */
#include "engine/arch.h"
#include "engine/arch_int.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define COUNT(t) (sizeof(t) / sizeof(t)[0])

enum { ROT_IS_HD = -1 };

/* Numbers and truth values of the arch, by the names they have in the base file.  What files of
 * before did not have takes its default. */
struct field {
    const char *key;
    size_t offset;
    int min, max;
    int def;
};
#define INT(name, min_, max_, def_) { #name, offsetof(struct arch, name), min_, max_, def_ }
static const struct field int_fields[] = {
    INT(L, 1, ARCH_MAX_LAYERS, CFG_REQUIRED),
    INT(D, 1, 1 << 17, CFG_REQUIRED),
    INT(H, 1, 1 << 12, CFG_REQUIRED),
    INT(G, 1, 1 << 12, CFG_REQUIRED),
    INT(hd, 1, 1 << 12, CFG_REQUIRED),
    INT(F, 1, 1 << 20, CFG_REQUIRED),
    INT(V, 1, 1 << 22, CFG_REQUIRED),
    INT(max_positions, 1, 1 << 30, CFG_REQUIRED),
    INT(rope_original_max, 0, INT32_MAX, CFG_REQUIRED),
    INT(window, 0, INT32_MAX, CFG_REQUIRED),
    INT(bos, -1, 1 << 22, CFG_REQUIRED),
    INT(rot, 0, 1 << 12, ROT_IS_HD),
};
static const struct field bool_fields[] = {
    INT(qkv_bias, 0, 1, 0), INT(o_bias, 0, 1, 0), INT(mlp_bias, 0, 1, 0), INT(qk_norm, 0, 1, 0),
    INT(tied, 0, 1, 0),     INT(parallel, 0, 1, 0),
};
static const struct field double_fields[] = {
    INT(rope_theta, 0, 0, CFG_REQUIRED),    INT(rope_factor, 0, 0, CFG_REQUIRED),
    INT(rope_low_freq, 0, 0, CFG_REQUIRED), INT(rope_high_freq, 0, 0, CFG_REQUIRED),
    INT(rope_theta_local, 0, 0, 0),         INT(attn_scale, 0, 0, 0),
    INT(attn_softcap, 0, 0, 0),             INT(final_softcap, 0, 0, 0),
    INT(embed_scale, 0, 0, 1),
};
#undef INT

static const char *const scaling_names[] = { "default", "linear", "llama3", "yarn", "longrope" };
static const char *const kept_acts[] = { "silu", "gelu_tanh", "gelu" };

static json_t *layers_where(const struct arch *a, bool (*fn)(const struct arch *, int), bool value)
{
    json_t *list = json_array();
    int bad = 0;
    for (int l = 0; l < a->L; l++)
        if (fn(a, l) == value)
            bad |= json_array_append_new(list, json_integer(l));
    if (!bad)
        return list;
    json_decref(list);
    return NULL;
}

static int put_floats(json_t *o, const char *key, const float *x, int n)
{
    json_t *list = json_array();
    int bad = 0;
    for (int i = 0; i < n; i++)
        bad |= json_array_append_new(list, json_real((double)x[i]));
    return json_object_set_new(o, key, list) | bad;
}

/* What only some kinds of scaling have is there with them alone. */
static int put_scaling(json_t *o, const struct arch *a)
{
    int bad = json_object_set_new(o, "rope_scaling", json_string(scaling_names[a->rope_scaling]));
    if (a->rope_scaling == ROPE_YARN || a->rope_scaling == ROPE_LONGROPE)
        bad |= json_object_set_new(o, "rope_amplitude", json_real(a->rope_amplitude));
    if (a->rope_scaling == ROPE_YARN) {
        bad |= json_object_set_new(o, "rope_beta_fast", json_real(a->rope_beta_fast));
        bad |= json_object_set_new(o, "rope_beta_slow", json_real(a->rope_beta_slow));
        bad |= json_object_set_new(o, "rope_truncate", json_boolean(a->rope_truncate));
    }
    if (a->rope_scaling == ROPE_LONGROPE) {
        bad |= put_floats(o, "rope_short", a->rope_short, a->rot / 2);
        bad |= put_floats(o, "rope_long", a->rope_long, a->rot / 2);
    }
    return bad;
}

static int read_scaling(const json_t *o, struct arch *a, struct err *err)
{
    const char *name = json_string_value(json_object_get(o, "rope_scaling"));
    size_t s = 0;
    while (s < COUNT(scaling_names) && (name == NULL || strcmp(name, scaling_names[s]) != 0))
        s++;
    if (s == COUNT(scaling_names))
        return err_set(err, ERR_INVALID, "lorad.arch: rope_scaling \"%.60s\" is unknown",
                       name ? name : "");
    a->rope_scaling = (enum rope_scaling)s;
    int rc = ERR_OK;
    if (s == ROPE_YARN || s == ROPE_LONGROPE)
        rc = cfg_double(o, "rope_amplitude", NAN, 1e-3, 1e3, &a->rope_amplitude, err);
    if (rc == ERR_OK && s == ROPE_YARN)
        rc = cfg_double(o, "rope_beta_fast", NAN, 0, 1e6, &a->rope_beta_fast, err);
    if (rc == ERR_OK && s == ROPE_YARN)
        rc = cfg_double(o, "rope_beta_slow", NAN, 0, 1e6, &a->rope_beta_slow, err);
    if (rc == ERR_OK && s == ROPE_YARN)
        rc = cfg_bool(o, "rope_truncate", true, &a->rope_truncate, err);
    if (rc == ERR_OK && s == ROPE_LONGROPE)
        rc = cfg_rope_divisors(o, "rope_short", a->rot / 2, a->rope_short, err);
    if (rc == ERR_OK && s == ROPE_LONGROPE)
        rc = cfg_rope_divisors(o, "rope_long", a->rot / 2, a->rope_long, err);
    return rc;
}

char *arch_to_json(const struct arch *a)
{
    json_t *o = json_object(), *eos = json_array();
    const char *base = (const char *)a;
    int bad = json_object_set_new(o, "family", json_string(a->family));
    for (size_t i = 0; i < COUNT(int_fields); i++)
        bad |= json_object_set_new(o, int_fields[i].key,
                                   json_integer(*(const int *)(base + int_fields[i].offset)));
    for (size_t i = 0; i < COUNT(bool_fields); i++)
        bad |= json_object_set_new(o, bool_fields[i].key,
                                   json_boolean(*(const bool *)(base + bool_fields[i].offset)));
    for (size_t i = 0; i < COUNT(double_fields); i++) {
        double v;
        memcpy(&v, base + double_fields[i].offset, sizeof v);
        bad |= json_object_set_new(o, double_fields[i].key, json_real(v));
    }
    bad |= json_object_set_new(o, "norm_eps", json_real((double)a->norm_eps));
    bad |= put_scaling(o, a);
    for (int i = 0; i < a->neos; i++)
        bad |= json_array_append_new(eos, json_integer(a->eos[i]));
    bad |= json_object_set_new(o, "act", json_string(kept_acts[a->act]));
    bad |= json_object_set_new(o, "eos", eos);
    bad |= json_object_set_new(o, "windowed", layers_where(a, arch_layer_windowed, true));
    if (a->rot > 0)
        bad |= json_object_set_new(o, "no_rope", layers_where(a, arch_layer_rope, false));
    char *text = bad ? NULL : json_dumps(o, JSON_COMPACT | JSON_SORT_KEYS);
    json_decref(o);
    return text;
}

/* A list of integers in [0, max). */
static int read_list(const json_t *o, const char *key, int max, size_t limit, int *ret, int *ret_n,
                     struct err *err)
{
    const json_t *v = json_object_get(o, key);
    if (!json_is_array(v) || json_array_size(v) > limit)
        return err_set(err, ERR_INVALID, "lorad.arch: %s is not a list of at most %zu integers",
                       key, limit);
    *ret_n = (int)json_array_size(v);
    for (int i = 0; i < *ret_n; i++) {
        const json_t *e = json_array_get(v, (size_t)i);
        if (!json_is_integer(e) || json_integer_value(e) < 0 || json_integer_value(e) >= max)
            return err_set(err, ERR_INVALID, "lorad.arch: %s[%d] is not an integer below %d", key,
                           i, max);
        ret[i] = (int)json_integer_value(e);
    }
    return ERR_OK;
}

static int read_kept_act(const json_t *o, struct arch *a, struct err *err)
{
    const json_t *v = json_object_get(o, "act");
    if (v == NULL || activation_parse(json_string_value(v), &a->act))
        return ERR_OK;
    return cfg_mistyped("act", v, "the name of an activation", err);
}

static int read_kept(const json_t *o, struct arch *a, struct err *err)
{
    char *base = (char *)a;
    double eps = 0;
    int layers[ARCH_MAX_LAYERS], n = 0;
    const char *family = json_string_value(json_object_get(o, "family"));
    if (family == NULL || family_find(family) == NULL)
        return err_set(err, ERR_INVALID, "lorad.arch: family \"%.60s\" is unknown; known: %s",
                       family ? family : "", family_list());
    snprintf(a->family, sizeof a->family, "%s", family);
    int rc = ERR_OK;
    for (size_t i = 0; i < COUNT(int_fields) && rc == ERR_OK; i++)
        rc = cfg_int(o, int_fields[i].key, int_fields[i].def, int_fields[i].min, int_fields[i].max,
                     (int *)(base + int_fields[i].offset), err);
    if (a->rot == ROT_IS_HD)
        a->rot = a->hd;
    for (size_t i = 0; i < COUNT(bool_fields) && rc == ERR_OK; i++)
        rc = cfg_bool(o, bool_fields[i].key, false, (bool *)(base + bool_fields[i].offset), err);
    for (size_t i = 0; i < COUNT(double_fields) && rc == ERR_OK; i++) {
        double v = 0;
        const int def = double_fields[i].def;
        rc = cfg_double(o, double_fields[i].key, def == CFG_REQUIRED ? NAN : def, 0, 1e15, &v, err);
        memcpy(base + double_fields[i].offset, &v, sizeof v);
    }
    if (rc == ERR_OK)
        rc = cfg_double(o, "norm_eps", NAN, 1e-13, 0.11, &eps, err);
    if (rc == ERR_OK)
        rc = read_list(o, "eos", a->V, ARCH_MAX_EOS, a->eos, &a->neos, err);
    if (rc == ERR_OK)
        rc = read_list(o, "windowed", a->L, ARCH_MAX_LAYERS, layers, &n, err);
    for (int i = 0; i < n && rc == ERR_OK; i++)
        arch_set_windowed(a, layers[i]);
    n = 0;
    if (rc == ERR_OK && json_object_get(o, "no_rope") != NULL)
        rc = read_list(o, "no_rope", a->L, ARCH_MAX_LAYERS, layers, &n, err);
    for (int i = 0; i < n && rc == ERR_OK; i++)
        arch_set_no_rope(a, layers[i]);
    if (rc == ERR_OK)
        rc = read_kept_act(o, a, err);
    a->norm_eps = (float)eps;
    if (rc == ERR_OK)
        rc = read_scaling(o, a, err);
    return rc == ERR_OK ? arch_check(a, err) : rc;
}

int arch_from_json(const char *json, struct arch *ret, struct err *err)
{
    json_t *o = NULL;
    struct arch a = { .bos = -1, .rope_theta = 10000, .embed_scale = 1 };
    int rc = cfg_parse(json, "lorad.arch", &o, err);
    if (rc == ERR_OK)
        rc = read_kept(o, &a, err);
    json_decref(o);
    if (rc == ERR_OK)
        *ret = a;
    return rc;
}

/* --- what cannot be seen from one field alone ---------------------------------------- */

/* A base file is as hostile as a config.json. */
static int check_rope(const struct arch *a, const struct family *f, struct err *err)
{
    const bool has = f->position == POS_ROPE_HALF || f->position == POS_ROPE_INTERLEAVED;
    if (a->rot % 2 != 0 || a->rot > a->hd || (a->rot > 0) != has)
        return err_set(err, ERR_INVALID,
                       "model config: rope cannot turn %d of %d numbers of a head", a->rot, a->hd);
    if (!(a->rope_theta >= 1) || (a->rope_theta_local != 0 && !(a->rope_theta_local >= 1)) ||
        (a->rope_scaling != ROPE_PLAIN && !(a->rope_factor > 0)))
        return err_set(err, ERR_INVALID, "model config: rope_theta %g with factor %g is no rope",
                       a->rope_theta, a->rope_factor);
    if (a->rope_scaling == ROPE_LLAMA3 &&
        !(a->rope_low_freq > 0 && a->rope_high_freq > a->rope_low_freq && a->rope_original_max > 0))
        return err_set(err, ERR_INVALID,
                       "model config: high_freq_factor %g is not above low_freq_factor %g",
                       a->rope_high_freq, a->rope_low_freq);
    if (a->rope_scaling == ROPE_YARN &&
        !(a->rope_theta > 1 && a->rope_original_max > 0 && a->rope_beta_slow > 0 &&
          a->rope_beta_fast >= a->rope_beta_slow))
        return err_set(err, ERR_INVALID,
                       "model config: YaRN from %g to %g turns in %d positions with rope_theta %g",
                       a->rope_beta_fast, a->rope_beta_slow, a->rope_original_max, a->rope_theta);
    if (a->rope_scaling == ROPE_LONGROPE && a->rope_original_max < 1)
        return err_set(err, ERR_INVALID, "model config: longrope without rope_original_max");
    return ERR_OK;
}

static int check_heads(const struct arch *a, const struct family *f, struct err *err)
{
    if (a->H % a->G != 0)
        return err_set(err, ERR_INVALID,
                       "model config: num_attention_heads %d is not a multiple of "
                       "num_key_value_heads %d",
                       a->H, a->G);
    if (f->qkv_by_head && a->G != a->H)
        return err_set(err, ERR_INVALID,
                       "model config: a %s model has as many key/value heads as heads, not %d of "
                       "%d",
                       a->family, a->G, a->H);
    if (a->hd % 2 != 0)
        return err_set(err, ERR_INVALID, "model config: head_dim %d is odd; rope needs pairs",
                       a->hd);
    if ((int64_t)a->H * a->hd > 1 << 20)
        return err_set(err, ERR_INVALID,
                       "model config: %d heads of %d are %lld wide; the limit is %d", a->H, a->hd,
                       (long long)a->H * a->hd, 1 << 20);
    return ERR_OK;
}

int arch_check(const struct arch *a, struct err *err)
{
    static const uint8_t none[sizeof a->windowed];
    const struct family *f = family_find(a->family);
    if (a->bos >= a->V)
        return err_set(err, ERR_INVALID, "model config: bos_token_id %d is not below vocab_size %d",
                       a->bos, a->V);
    if (a->window == 0 && memcmp(a->windowed, none, sizeof none) != 0)
        return err_set(err, ERR_INVALID, "model config: layers have a sliding window of no size");
    if (!activation_fits(f, a->act))
        return err_set(err, ERR_INVALID, "model config: %s is no activation of a %s model",
                       kept_acts[a->act], a->family);
    if (f->position == POS_LEARNED && a->max_positions > 1 << 22)
        return err_set(err, ERR_INVALID, "model config: %d learned positions are too many",
                       a->max_positions);
    if (!(a->embed_scale > 0 && a->embed_scale <= 1e6 && a->attn_scale <= 1e6))
        return err_set(err, ERR_INVALID, "model config: embeddings times %g, scores times %g",
                       a->embed_scale, a->attn_scale);
    int rc = check_heads(a, f, err);
    return rc == ERR_OK ? check_rope(a, f, err) : rc;
}
