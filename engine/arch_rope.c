/* arch_rope.c - what config.json says about rope: how much of a head rotates, how fast, and how the
 * angles are scaled for texts longer than those of the first training.
 *
 * All kinds are read as transformers' modeling_rope_utils.py (version 5) reads them.  Its versions
 * disagree in places, and then the one that follows what the config says in so many words is
 * taken, or the config is refused:
 *   yarn      `factor` counts where it is given; versions 4.45 to 4.57 took max_position_embeddings /
 *             original_max_position_embeddings instead, which turns published settings into no scaling.
 *   longrope  the attention factor comes from that quotient or from `factor`; where both are there
 *             and differ, only a config that names the attention factor is taken.
 *   dynamic   frequencies change with every token beyond max_position_embeddings, and those of the
 *             keys in the cache do not: there is no right answer there.  Up to that length the
 *             rule is plain rope, and no longer sequence is served. */
#include "engine/arch_int.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* What a kind of scaling reads beside its name, rope_theta and partial_rotary_factor. */
static const char *const of_yarn[] = {
    "factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow",
    "mscale", "mscale_all_dim", "truncate", NULL,
};
static const char *const of_longrope[] = {
    "factor", "original_max_position_embeddings", "attention_factor", "short_factor",
    "long_factor", NULL,
};
static const char *const of_dynamic[] = { "factor", "original_max_position_embeddings", NULL };

static bool is_one_of(const char *key, const char *const *names)
{
    for (; *names != NULL; names++)
        if (strcmp(key, *names) == 0)
            return true;
    return false;
}

/* A member that is not known may be one that changes the angles. */
static int only_known(const json_t *o, const char *type, const char *const *names, struct err *err)
{
    static const char *const always[] = { "rope_type", "type", "rope_theta",
                                          "partial_rotary_factor", NULL };
    const char *key;
    json_t *v;
    json_object_foreach((json_t *)o, key, v)
        if (!cfg_absent(v) && !is_one_of(key, always) && !is_one_of(key, names))
            return err_set(err, ERR_INVALID,
                           "config.json: rope scaling \"%s\" with %.60s is not supported", type, key);
    return ERR_OK;
}

/* How long texts were before scaling: beside the rope settings (where Phi-3 has it), in them, or as
 * long as the model's. */
static int read_original(const json_t *json, const json_t *o, struct arch *a, struct err *err)
{
    static const char key[] = "original_max_position_embeddings";
    const bool phi3 = strcmp(a->family, "phi3") == 0; /* its class has a default */
    int inside = 0, beside = 0;
    int rc = cfg_int(o, key, 0, 1, 1 << 30, &inside, err);
    if (rc == ERR_OK)
        rc = cfg_int(json, key, phi3 ? 4096 : 0, 1, 1 << 30, &beside, err);
    if (rc == ERR_OK && inside > 0 && beside > 0 && inside != beside)
        return err_set(err, ERR_INVALID, "config.json: %s is %d%s, but %d in the rope settings",
                       key, beside,
                       cfg_absent(json_object_get(json, key)) ? " if it is not there" : "", inside);
    a->rope_original_max = beside > 0 ? beside : inside > 0 ? inside : a->max_positions;
    return rc;
}

static int read_llama3(const json_t *o, struct arch *a, struct err *err)
{
    a->rope_scaling = ROPE_LLAMA3;
    int rc = cfg_double(o, "factor", NAN, 1, 1e6, &a->rope_factor, err);
    if (rc == ERR_OK)
        rc = cfg_double(o, "low_freq_factor", NAN, 1e-6, 1e6, &a->rope_low_freq, err);
    if (rc == ERR_OK)
        rc = cfg_double(o, "high_freq_factor", NAN, 1e-6, 1e6, &a->rope_high_freq, err);
    if (rc == ERR_OK)
        rc = cfg_int(o, "original_max_position_embeddings", CFG_REQUIRED, 1, INT32_MAX,
                     &a->rope_original_max, err);
    return rc;
}

/* --- YaRN ------------------------------------------------------------------------------------ */

static double mscale_of(double factor, double mscale)
{
    return factor <= 1 ? 1 : 0.1 * mscale * log(factor) + 1;
}

/* By what cos and sin are multiplied. */
static int read_amplitude(const json_t *o, struct arch *a, struct err *err)
{
    double m = 0, all = 0;
    int rc = cfg_double(o, "mscale", 0, 0, 1e3, &m, err);
    if (rc == ERR_OK)
        rc = cfg_double(o, "mscale_all_dim", 0, 0, 1e3, &all, err);
    if (rc != ERR_OK)
        return rc;
    const double def = m > 0 && all > 0
                           ? mscale_of(a->rope_factor, m) / mscale_of(a->rope_factor, all)
                           : mscale_of(a->rope_factor, 1);
    return cfg_double(o, "attention_factor", def, 1e-3, 1e3, &a->rope_amplitude, err);
}

/* 0 stands for the default here, as in `x or 32`. */
static int read_beta(const json_t *o, const char *key, double def, double *ret, struct err *err)
{
    int rc = cfg_double(o, key, def, 0, 1e6, ret, err);
    if (rc == ERR_OK && *ret == 0)
        *ret = def;
    return rc;
}

/* The model serves what the scaling was made for, also where max_position_embeddings still says how
 * long the texts of the first training were. */
static int read_yarn(const json_t *json, const json_t *o, struct arch *a, struct err *err)
{
    a->rope_scaling = ROPE_YARN;
    int rc = only_known(o, "yarn", of_yarn, err);
    if (rc == ERR_OK)
        rc = read_original(json, o, a, err);
    if (rc != ERR_OK)
        return rc;
    const double ratio = (double)a->max_positions / a->rope_original_max;
    rc = cfg_double(o, "factor", ratio, 1, 1e6, &a->rope_factor, err);
    if (rc == ERR_OK)
        rc = read_amplitude(o, a, err);
    if (rc == ERR_OK)
        rc = read_beta(o, "beta_fast", 32, &a->rope_beta_fast, err);
    if (rc == ERR_OK)
        rc = read_beta(o, "beta_slow", 1, &a->rope_beta_slow, err);
    if (rc == ERR_OK)
        rc = cfg_bool(o, "truncate", true, &a->rope_truncate, err);
    if (rc != ERR_OK)
        return rc;
    const double reach = a->rope_factor * a->rope_original_max;
    if (reach > a->max_positions)
        a->max_positions = reach < 1 << 30 ? (int)reach : 1 << 30;
    return ERR_OK;
}

/* --- LongRoPE --------------------------------------------------------------------------------- */

int cfg_rope_divisors(const json_t *o, const char *key, int n, float *ret, struct err *err)
{
    const json_t *v = json_object_get(o, key);
    if (n > ARCH_MAX_LONGROPE)
        return err_set(err, ERR_INVALID, "model config: %s for %d angles, the limit is %d", key, n,
                       ARCH_MAX_LONGROPE);
    if (!json_is_array(v) || json_array_size(v) != (size_t)n)
        return err_set(err, ERR_INVALID, "model config: %s is not a list of %d numbers, one for "
                                         "each angle of a head", key, n);
    for (int i = 0; i < n; i++) {
        const json_t *e = json_array_get(v, (size_t)i);
        const double x = json_number_value(e);
        if (!json_is_number(e) || !(x >= 1e-6 && x <= 1e6))
            return err_set(err, ERR_INVALID, "model config: %s[%d] is not a number from 1e-6 to 1e6",
                           key, i);
        ret[i] = (float)x;
    }
    return ERR_OK;
}

static int read_longrope(const json_t *json, const json_t *o, struct arch *a, struct err *err)
{
    double factor;
    a->rope_scaling = ROPE_LONGROPE;
    a->rope_factor = 1; /* the lists say it all */
    int rc = only_known(o, "longrope", of_longrope, err);
    if (rc == ERR_OK)
        rc = read_original(json, o, a, err);
    if (rc == ERR_OK)
        rc = cfg_rope_divisors(o, "short_factor", a->rot / 2, a->rope_short, err);
    if (rc == ERR_OK)
        rc = cfg_rope_divisors(o, "long_factor", a->rot / 2, a->rope_long, err);
    const double ratio = (double)a->max_positions / a->rope_original_max;
    if (rc == ERR_OK)
        rc = cfg_double(o, "factor", ratio, 1e-6, 1e6, &factor, err);
    if (rc != ERR_OK)
        return rc;
    const bool named = !cfg_absent(json_object_get(o, "attention_factor"));
    if (!named && factor != ratio)
        return err_set(err, ERR_INVALID,
                       "config.json: rope scaling \"longrope\" has factor %g, but "
                       "max_position_embeddings / original_max_position_embeddings is %g; "
                       "attention_factor has to say which counts", factor, ratio);
    const double def = factor <= 1 || a->rope_original_max == 1
                           ? 1
                           : sqrt(1 + log(factor) / log(a->rope_original_max));
    return cfg_double(o, "attention_factor", def, 1e-3, 1e3, &a->rope_amplitude, err);
}

/* --- all kinds -------------------------------------------------------------------------------- */

int cfg_rope_scaling(const json_t *json, const json_t *o, struct arch *a, struct err *err)
{
    const json_t *v = json_object_get(o, "rope_type");
    if (cfg_absent(v))
        v = json_object_get(o, "type");
    const char *type = cfg_absent(v) ? "default" : json_string_value(v);
    if (type == NULL)
        return cfg_mistyped("rope_type", v, "a string", err);
    /* Phi-3 was published with names of before there was one. */
    if (strcmp(a->family, "phi3") == 0 && (strcmp(type, "su") == 0 || strcmp(type, "yarn") == 0))
        type = "longrope";
    if (strcmp(type, "default") == 0)
        return ERR_OK;
    if (strcmp(type, "dynamic") == 0)
        return only_known(o, type, of_dynamic, err);
    if (strcmp(type, "linear") == 0) {
        a->rope_scaling = ROPE_LINEAR;
        return cfg_double(o, "factor", NAN, 1e-6, 1e6, &a->rope_factor, err);
    }
    if (strcmp(type, "llama3") == 0)
        return read_llama3(o, a, err);
    if (strcmp(type, "yarn") == 0)
        return read_yarn(json, o, a, err);
    if (strcmp(type, "longrope") == 0)
        return read_longrope(json, o, a, err);
    return err_set(err, ERR_INVALID,
                   "config.json: rope scaling \"%.60s\" is not supported; default, linear, dynamic, "
                   "llama3, yarn and longrope are",
                   type);
}

/* How much of each head rotates.  `params` (or NULL) comes before the fields at the top. */
static int read_rotary(const json_t *json, const json_t *params, const struct family *f,
                       struct arch *a, struct err *err)
{
    static const char v5[] = "partial_rotary_factor";
    const json_t *o = cfg_absent(json_object_get(params, v5)) ? json : params;
    const bool partial = f->keys->rotary != NULL;
    char key[64];
    double part = 1;
    int rc = cfg_double(o, o == params || !partial ? v5 : cfg_pick(o, f->keys->rotary, key),
                        partial ? f->absent.rotary : 1, partial ? 0.01 : 1, 1, &part, err);
    a->rot = (int)(a->hd * part);
    return rc;
}

int cfg_rope(const json_t *json, const struct family *f, struct arch *a, struct err *err)
{
    const json_t *params = json_object_get(json, "rope_parameters");
    const json_t *scaling = json_object_get(json, "rope_scaling");
    char key[64];
    if (!cfg_absent(params) && !cfg_absent(scaling))
        return err_set(err, ERR_INVALID,
                       "config.json has both rope_parameters and rope_scaling; only one can hold");
    if (f->local_rope && !cfg_absent(json_object_get(params, "full_attention")))
        params = json_object_get(params, "full_attention");
    const json_t *o = cfg_absent(params) ? scaling : params;
    if (!cfg_absent(o) && !json_is_object(o))
        return cfg_mistyped(o == params ? "rope_parameters" : "rope_scaling", o, "an object", err);
    const bool inside = !cfg_absent(params) && !cfg_absent(json_object_get(params, "rope_theta"));
    int rc = cfg_double(inside ? params : json,
                        inside ? "rope_theta" : cfg_pick(json, f->keys->theta, key),
                        f->absent.theta, 1, 1e15, &a->rope_theta, err);
    if (rc == ERR_OK)
        rc = read_rotary(json, o, f, a, err);
    return rc != ERR_OK || cfg_absent(o) ? rc : cfg_rope_scaling(json, o, a, err);
}
