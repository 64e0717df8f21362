/* train_opts.c - options of a run: defaults, checks, which modules they mean, and the PEFT config that
 * says the same. */
#include "engine/train_int.h"

#include "engine/peft_int.h"

#include <float.h>
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { EPOCHS_MAX = 100000, BATCH_MAX = 65536 };

void train_opts_init(struct train_opts *o)
{
    *o = (struct train_opts){
        .method = METHOD_LORA, .rank = 16,
        .adalora = { .tinit = -1, .tfinal = -1, .deltaT = 1, .beta1 = 0.85, .beta2 = 0.85,
                     .orth_reg_weight = 0.5 },
        .seed = 42, .epochs = 3, .batch = 8, .accumulate = 1, .shuffle = true, .lr = 2e-4,
        .lr_b_ratio = 1, .schedule = TRAIN_LINEAR, .warmup = 0.03, .beta1 = 0.9, .beta2 = 0.999,
        .eps = 1e-8, .clip = 1, .dtype = DT_F32,
    };
}

void train_opts_free(struct train_opts *o)
{
    if (o == NULL)
        return;
    for (size_t i = 0; i < o->ntargets; i++)
        free(o->targets[i]);
    for (size_t i = 0; i < o->npatterns; i++)
        free(o->patterns[i].pattern);
    free(o->targets);
    free(o->patterns);
    o->targets = NULL;
    o->patterns = NULL;
    o->ntargets = o->npatterns = 0;
}

int train_opts_copy(const struct train_opts *o, struct train_opts *ret, struct err *err)
{
    struct train_opts c = *o;
    c.targets = calloc(o->ntargets + 1, sizeof *c.targets);
    c.patterns = calloc(o->npatterns + 1, sizeof *c.patterns);
    bool done = c.targets != NULL && c.patterns != NULL;
    c.ntargets = c.npatterns = 0;
    for (size_t i = 0; done && i < o->ntargets; i++, c.ntargets++)
        done = (c.targets[i] = strdup(o->targets[i])) != NULL;
    for (size_t i = 0; done && i < o->npatterns; i++, c.npatterns++) {
        c.patterns[i] = o->patterns[i];
        done = (c.patterns[i].pattern = strdup(o->patterns[i].pattern)) != NULL;
    }
    if (!done) {
        train_opts_free(&c);
        return err_nomem(err);
    }
    *ret = c;
    return ERR_OK;
}

/* --- checks ------------------------------------------------------------------------------------------ */
/* A number in [low, high], or in (low, high] with `open`. */
static int number(const char *name, double v, double low, bool open, double high, struct err *err)
{
    if (isfinite(v) && v <= high && (open ? v > low : v >= low))
        return ERR_OK;
    return err_set_slug(err, ERR_INVALID, NULL, name, "%s must be %s %g and at most %g, not %g",
                        name, open ? "more than" : "at least", low, high, v);
}

static int check_adalora(const struct train_opts *o, struct err *err)
{
    const int init_r = o->adalora.init_r;
    int rc = number("init_r", init_r, 0, false, ADAPTER_MAX_RANK, err);
    if (rc == ERR_OK)
        rc = number("tinit", o->adalora.tinit, -1, false, 1e9, err);
    if (rc == ERR_OK)
        rc = number("tfinal", o->adalora.tfinal, -1, false, 1e9, err);
    if (rc == ERR_OK)
        rc = number("deltaT", o->adalora.deltaT, 1, false, 1e9, err);
    if (rc == ERR_OK)
        rc = number("adalora.beta1", o->adalora.beta1, 0, true, 1 - 1e-9, err);
    if (rc == ERR_OK)
        rc = number("adalora.beta2", o->adalora.beta2, 0, true, 1 - 1e-9, err);
    if (rc == ERR_OK)
        rc = number("orth_reg_weight", o->adalora.orth_reg_weight, 0, false, 1e6, err);
    if (rc == ERR_OK && o->adalora.tfinal == 0)
        rc = err_set_slug(err, ERR_INVALID, NULL, "tfinal",
                          "tfinal must be at least 1: the ranks become final so many steps before "
                          "the end, and with 0 they never would");
    if (rc == ERR_OK && o->max_steps > 0 && o->adalora.tinit >= 0 && o->adalora.tfinal >= 0 &&
        o->adalora.tinit >= o->max_steps - o->adalora.tfinal)
        rc = err_set_slug(err, ERR_INVALID, NULL, "tinit",
                          "tinit %d and tfinal %d leave no step of %lld in between to prune in",
                          o->adalora.tinit, o->adalora.tfinal, (long long)o->max_steps);
    if (rc == ERR_OK && init_r != 0 && init_r < o->rank)
        rc = err_set_slug(err, ERR_INVALID, NULL, "init_r",
                          "init_r %d is less than target_r %d: AdaLoRA only takes ranks away", init_r,
                          o->rank);
    if (rc == ERR_OK && o->npatterns > 0)
        rc = err_set_slug(err, ERR_INVALID, NULL, "rank_pattern",
                          "AdaLoRA finds the ranks itself: it takes no rank_pattern or "
                          "alpha_pattern");
    return rc;
}

static int check_method(const struct train_opts *o, struct err *err)
{
    int rc = number("rank", o->rank, 1, false, ADAPTER_MAX_RANK, err);
    if (rc == ERR_OK)
        rc = number("alpha", o->alpha, 0, false, 1e6, err);
    if (rc == ERR_OK)
        rc = number("dropout", o->dropout, 0, false, 0.99, err);
    if (rc == ERR_OK && o->method == METHOD_ADALORA)
        rc = check_adalora(o, err);
    if (rc == ERR_OK && o->method == METHOD_ADALORA && o->init != TRAIN_INIT_DEFAULT)
        rc = err_set_slug(err, ERR_INVALID, NULL, "init",
                          "AdaLoRA has an initialisation of its own: init must be left alone");
    for (size_t i = 0; rc == ERR_OK && i < o->npatterns; i++) {
        rc = number("rank_pattern", o->patterns[i].rank, 0, false, ADAPTER_MAX_RANK, err);
        if (rc == ERR_OK)
            rc = number("alpha_pattern", o->patterns[i].alpha, 0, false, 1e6, err);
    }
    return rc;
}

static int check_recipe(const struct train_opts *o, struct err *err)
{
    int rc = number("learning_rate", o->lr, 0, true, 10, err);
    if (rc == ERR_OK)
        rc = number("lr_b_ratio", o->lr_b_ratio, 0, true, 1e4, err);
    if (rc == ERR_OK)
        rc = number("warmup", o->warmup, 0, false, 1e9, err);
    if (rc == ERR_OK)
        rc = number("beta1", o->beta1, 0, false, 1 - 1e-9, err);
    if (rc == ERR_OK)
        rc = number("beta2", o->beta2, 0, false, 1 - 1e-9, err);
    if (rc == ERR_OK)
        rc = number("eps", o->eps, (double)FLT_MIN, false, 1, err); /* 0 / 0 without it */
    if (rc == ERR_OK)
        rc = number("weight_decay", o->weight_decay, 0, false, 10, err);
    if (rc == ERR_OK)
        rc = number("clip", o->clip, 0, false, 1e9, err);
    return rc;
}

int train_opts_check(const struct train_opts *o, struct err *err)
{
    int rc = check_method(o, err);
    if (rc == ERR_OK)
        rc = check_recipe(o, err);
    if (rc == ERR_OK)
        rc = number("epochs", o->epochs, o->max_steps > 0 ? 0 : 1, false, EPOCHS_MAX, err);
    if (rc == ERR_OK)
        rc = number("max_steps", (double)o->max_steps, 0, false, TRAIN_STEPS_MAX, err);
    if (rc == ERR_OK)
        rc = number("batch_size", o->batch, 1, false, BATCH_MAX, err);
    if (rc == ERR_OK)
        rc = number("accumulate", o->accumulate, 1, false, BATCH_MAX, err);
    if (rc == ERR_OK)
        rc = number("micro_tokens", o->micro_tokens, 0, false, 1 << 20, err);
    if (rc == ERR_OK)
        rc = number("max_length", o->max_length, 0, false, 1 << 30, err);
    if (rc == ERR_OK)
        rc = number("eval_every", (double)o->eval_every, 0, false, 1e9, err);
    if (rc == ERR_OK)
        rc = number("patience", o->patience, 0, false, 1e9, err);
    if (rc == ERR_OK)
        rc = number("checkpoint_every", (double)o->checkpoint_every, 0, false, 1e9, err);
    if (rc == ERR_OK && o->patience > 0 && o->eval_every == 0)
        rc = err_set_slug(err, ERR_INVALID, NULL, "patience",
                          "patience counts evaluations: it needs eval_every");
    if (rc == ERR_OK && o->dtype != DT_F32 && o->dtype != DT_BF16)
        rc = err_set_slug(err, ERR_INVALID, NULL, "dtype", "dtype must be f32 or bf16");
    return rc;
}

/* --- what depends on the data ------------------------------------------------------------------------- */
int64_t train_opts_steps(const struct train_opts *o, size_t examples)
{
    const int64_t each = (int64_t)o->batch * o->accumulate;
    const int64_t epoch = ((int64_t)examples + each - 1) / each;
    return o->max_steps > 0 ? o->max_steps : epoch * o->epochs;
}

void train_opts_resolve(struct train_opts *o, int64_t steps)
{
    if (o->alpha == 0)
        o->alpha = 2 * o->rank;
    if (o->adalora.init_r == 0)
        o->adalora.init_r = o->rank + (o->rank + 1) / 2;
    if (o->adalora.tinit < 0)
        o->adalora.tinit = (int)(steps / 10);
    if (o->adalora.tfinal < 0)
        o->adalora.tfinal = steps >= 5 ? (int)(steps / 5) : 1;
    if (o->checkpoint_every == 0)
        o->checkpoint_every = steps / 10 > 10 ? steps / 10 : 10;
}

int train_opts_text(const struct train_opts *o, struct buf *ret)
{
    int rc = buf_printf(
        ret,
        "%d %d %d %.17g %.17g | %d %d %d %d %.17g %.17g %.17g | %" PRIu64 " %d %" PRId64
        " %d %d %d %d %d | %.17g %.17g %d %.17g %.17g %.17g %.17g %.17g %.17g %d | %" PRId64 " %d",
        (int)o->method, (int)o->init, o->rank, o->alpha, o->dropout, o->adalora.init_r,
        o->adalora.tinit, o->adalora.tfinal, o->adalora.deltaT, o->adalora.beta1, o->adalora.beta2,
        o->adalora.orth_reg_weight, o->seed, o->epochs, o->max_steps, o->batch, o->accumulate,
        o->micro_tokens, o->max_length, o->shuffle, o->lr, o->lr_b_ratio, (int)o->schedule,
        o->warmup, o->beta1, o->beta2, o->eps, o->weight_decay, o->clip, (int)o->moments,
        o->eval_every, o->patience);
    for (size_t i = 0; rc == ERR_OK && i < o->ntargets; i++)
        rc = buf_printf(ret, " %s", o->targets[i]);
    for (size_t i = 0; rc == ERR_OK && i < o->npatterns; i++)
        rc = buf_printf(ret, " %s=%d,%.17g", o->patterns[i].pattern, o->patterns[i].rank,
                        o->patterns[i].alpha);
    return rc;
}

/* --- the same as PEFT's config -------------------------------------------------------------------------- */
/* A member or an element that found no memory must not be missing in silence: it would be another
 * adapter.  Both take v, and what is not 0 has failed. */
static int put(json_t *object, const char *key, json_t *v)
{
    return json_object_set_new(object, key, v);
}

static int add(json_t *list, json_t *v) { return json_array_append_new(list, v); }

/* j if all of it is there; NULL: out of memory. */
static json_t *all_of(json_t *j, int failed)
{
    if (!failed)
        return j;
    json_decref(j);
    return NULL;
}

static json_t *targets_json(const struct train_opts *o, const struct family *f)
{
    json_t *list = json_array();
    int failed = 0;
    for (size_t i = 0; i < o->ntargets; i++)
        failed |= add(list, json_string(o->targets[i]));
    /* Every linear layer: the last parts of their names, as PEFT has them after it looked. */
    for (int m = 0; m < MOD_COUNT && o->ntargets == 0; m++)
        if (f->module_path[m] != NULL) {
            const char *dot = strrchr(f->module_path[m], '.');
            failed |= add(list, json_string(dot != NULL ? dot + 1 : f->module_path[m]));
        }
    return all_of(list, failed);
}

static int put_adalora(json_t *j, const struct train_opts *o, int64_t steps)
{
    return put(j, "init_r", json_integer(o->adalora.init_r)) |
           put(j, "target_r", json_integer(o->rank)) |
           put(j, "tinit", json_integer(o->adalora.tinit)) |
           put(j, "tfinal", json_integer(o->adalora.tfinal)) |
           put(j, "deltaT", json_integer(o->adalora.deltaT)) |
           put(j, "beta1", json_real(o->adalora.beta1)) |
           put(j, "beta2", json_real(o->adalora.beta2)) |
           put(j, "orth_reg_weight", json_real(o->adalora.orth_reg_weight)) |
           put(j, "total_step", json_integer(steps));
}

static int put_lora(json_t *j, const struct train_opts *o)
{
    json_t *ranks = json_object(), *alphas = json_object();
    int failed = 0;
    for (size_t i = 0; i < o->npatterns; i++) {
        const struct train_pattern *p = &o->patterns[i];
        if (p->rank > 0)
            failed |= put(ranks, p->pattern, json_integer(p->rank));
        if (p->alpha > 0)
            failed |= put(alphas, p->pattern, peft_number(p->alpha));
    }
    failed |= put(j, "rank_pattern", ranks);
    failed |= put(j, "alpha_pattern", alphas);
    failed |= put(j, "use_rslora", json_boolean(o->method == METHOD_RSLORA));
    failed |= put(j, "use_dora", json_boolean(o->method == METHOD_DORA));
    if (o->init == TRAIN_INIT_GAUSSIAN)
        failed |= put(j, "init_lora_weights", json_string("gaussian"));
    return failed;
}

static json_t *opts_json(const struct base *base, const struct train_opts *o, int64_t steps)
{
    const bool adalora = o->method == METHOD_ADALORA;
    const struct family *f = family_find(base->arch.family);
    json_t *j = json_pack(
        "{s:s, s:s, s:s?, s:s, s:b, s:i, s:o, s:f, s:o, s:b}", "peft_type",
        adalora ? "ADALORA" : "LORA", "task_type", "CAUSAL_LM", "base_model_name_or_path",
        base->name, "bias", "none", "inference_mode", 1, "r", o->rank, "lora_alpha",
        peft_number(o->alpha), "lora_dropout", o->dropout, "target_modules", targets_json(o, f),
        "fan_in_fan_out", f->transposed);
    return all_of(j, adalora ? put_adalora(j, o, steps) : put_lora(j, o));
}

/* {"PATH.lora_E": [booleans]} of all modules. */
static json_t *kept_json(const struct train *t)
{
    size_t n = 0, at = 0;
    const uint8_t *mask = adalora_mask(t->adalora, &n);
    json_t *all = json_object();
    int failed = 0;
    for (size_t i = 0; i < t->nmodules; i++) {
        const struct train_module *m = &t->modules[i];
        char path[256], name[sizeof path + 8];
        arch_module_path(&t->base->arch, m->layer, m->module, path, sizeof path);
        snprintf(name, sizeof name, "%s.lora_E", path);
        json_t *list = json_array();
        for (int k = 0; k < m->r; k++)
            failed |= add(list, json_boolean(mask[at++]));
        failed |= put(all, name, list);
    }
    return all_of(all, failed);
}

char *train_config_json(const struct train *t, bool pruned)
{
    if (t->from_config != NULL)
        return strdup(t->from_config);
    json_t *j = opts_json(t->base, &t->o, t->steps);
    if (t->o.method == METHOD_ADALORA)
        j = all_of(j, put(j, "rank_pattern", pruned ? kept_json(t) : json_null()));
    /* Not sorted: in a pattern the first key that fits counts. */
    char *s = j != NULL ? json_dumps(j, JSON_INDENT(2) | JSON_REAL_PRECISION(17)) : NULL;
    json_decref(j);
    return s;
}

/* --- which modules ---------------------------------------------------------------------------------------- */
/* Does some module of the base end in this name? */
static bool names_something(const struct arch *a, const char *name)
{
    char path[256];
    const size_t n = strlen(name);
    for (int l = 0; l < a->L; l++)
        for (int m = 0; m < MOD_COUNT; m++) {
            arch_module_path(a, l, (enum module)m, path, sizeof path);
            const size_t k = strlen(path);
            if (k >= n && n > 0 && strcmp(path + k - n, name) == 0 &&
                (k == n || path[k - n - 1] == '.'))
                return true;
        }
    return false;
}

static int check_names(const struct arch *a, const struct train_opts *o, struct err *err)
{
    char shown[128];
    for (size_t i = 0; i < o->ntargets; i++)
        if (!names_something(a, o->targets[i]))
            return err_set_slug(err, ERR_INVALID, NULL, "target_modules",
                                "target_modules: \"%s\" is no linear layer in the blocks of this "
                                "base (%s)", peft_show(o->targets[i], shown), a->family);
    return ERR_OK;
}

static float scaling_of(const struct train_opts *o, int r, double alpha)
{
    if (o->method == METHOD_RSLORA)
        return (float)(alpha / sqrt(r));
    return (float)(o->method == METHOD_ADALORA ? alpha / (o->adalora.init_r + 1e-5) : alpha / r);
}

static int find(const struct base *base, const struct train_opts *o, struct peft_matcher *match,
                struct train_module *list, size_t *n, struct err *err)
{
    const struct arch *a = &base->arch;
    char path[256];
    for (int l = 0; l < a->L; l++)
        for (int m = 0; m < MOD_COUNT; m++) {
            bool wanted = false;
            int r = o->adalora.init_r;
            double alpha = o->alpha;
            if (!arch_has_module(a, (enum module)m))
                continue;
            arch_module_path(a, l, (enum module)m, path, sizeof path);
            int rc = peft_matcher_targets(match, path, true, &wanted, err);
            if (rc == ERR_OK && wanted && o->method != METHOD_ADALORA)
                rc = peft_matcher_rank(match, path, &r, &alpha, err);
            if (rc != ERR_OK)
                return rc;
            if (wanted)
                list[(*n)++] = (struct train_module){
                    .layer = l, .module = (enum module)m, .r = r, .init_r = r,
                    .in = arch_in(a, (enum module)m), .out = arch_out(a, (enum module)m),
                    .alpha = alpha, .scaling = scaling_of(o, r, alpha),
                    .w = &base->layers[l].mod[m].w,
                };
        }
    return ERR_OK;
}

int train_targets(const struct base *base, const struct train_opts *o, struct train_module **ret,
                  size_t *ret_n, struct err *err)
{
    struct peft_config c = { .adalora = o->method == METHOD_ADALORA, .r = o->rank,
                             .alpha = o->alpha };
    struct peft_matcher *match = NULL;
    size_t n = 0;
    struct train_module *list = calloc((size_t)base->arch.L * MOD_COUNT + 1, sizeof *list);
    c.root = opts_json(base, o, 1);
    int rc = list == NULL || c.root == NULL ? err_nomem(err) : check_names(&base->arch, o, err);
    if (rc == ERR_OK) {
        c.rank_pattern = c.adalora ? NULL : json_object_get(c.root, "rank_pattern");
        c.alpha_pattern = c.adalora ? NULL : json_object_get(c.root, "alpha_pattern");
        rc = peft_matcher_create(&c, &match, err);
    }
    if (rc == ERR_OK)
        rc = find(base, o, match, list, &n, err);
    peft_matcher_free(match);
    json_decref(c.root);
    if (rc != ERR_OK) {
        free(list);
        return rc;
    }
    *ret = list;
    *ret_n = n;
    return ERR_OK;
}
