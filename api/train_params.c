/* train_params.c - options of the trainer from JSON, and back.
 *
 * One table has a row for each plain option: its name, its type, where it lies.  Reading and writing
 * both go by it, so that what is stored with a job is what is read again when it runs.  The trainer
 * itself says which values make sense together (train_opts_check). */
#include "api/train_params.h"
#include "api/api_int.h"

#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

/* --- the table ------------------------------------------------------------------------------- */
enum kind { INT, INT64, UINT64, REAL, BOOL, WORD };
enum who { ALL, ADALORA };

static const char *const inits[] = { [TRAIN_INIT_DEFAULT] = "default",
                                     [TRAIN_INIT_GAUSSIAN] = "gaussian",
                                     [TRAIN_INIT_NORMAL] = "normal", NULL };
static const char *const schedules[] = { [TRAIN_CONSTANT] = "constant", [TRAIN_LINEAR] = "linear",
                                         [TRAIN_COSINE] = "cosine", NULL };
static const char *const moments[] = { [TRAIN_MOMENTS_F32] = "f32", [TRAIN_MOMENTS_8BIT] = "8bit",
                                       NULL };

#define AT(member) offsetof(struct train_opts, member)
/* `fixed`: a version to go on from has its own.  Words are enums, which are ints to the compiler. */
static const struct field {
    const char *name;
    enum kind kind;
    enum who who;
    bool fixed;
    size_t at;
    const char *const *words;
} fields[] = {
    { "init", WORD, ALL, true, AT(init), inits },
    { "alpha", REAL, ALL, true, AT(alpha), NULL },
    { "dropout", REAL, ALL, false, AT(dropout), NULL },
    { "init_r", INT, ADALORA, true, AT(adalora.init_r), NULL },
    { "tinit", INT, ADALORA, true, AT(adalora.tinit), NULL },
    { "tfinal", INT, ADALORA, true, AT(adalora.tfinal), NULL },
    { "deltaT", INT, ADALORA, true, AT(adalora.deltaT), NULL },
    { "beta1", REAL, ADALORA, true, AT(adalora.beta1), NULL },
    { "beta2", REAL, ADALORA, true, AT(adalora.beta2), NULL },
    { "orth_reg_weight", REAL, ADALORA, false, AT(adalora.orth_reg_weight), NULL },
    { "seed", UINT64, ALL, false, AT(seed), NULL },
    { "epochs", INT, ALL, false, AT(epochs), NULL },
    { "max_steps", INT64, ALL, false, AT(max_steps), NULL },
    { "batch_size", INT, ALL, false, AT(batch), NULL },
    { "accumulate", INT, ALL, false, AT(accumulate), NULL },
    { "micro_tokens", INT, ALL, false, AT(micro_tokens), NULL },
    { "max_length", INT, ALL, false, AT(max_length), NULL },
    { "shuffle", BOOL, ALL, false, AT(shuffle), NULL },
    { "learning_rate", REAL, ALL, false, AT(lr), NULL },
    { "lr_b_ratio", REAL, ALL, false, AT(lr_b_ratio), NULL },
    { "schedule", WORD, ALL, false, AT(schedule), schedules },
    { "warmup", REAL, ALL, false, AT(warmup), NULL },
    { "adam_beta1", REAL, ALL, false, AT(beta1), NULL },
    { "adam_beta2", REAL, ALL, false, AT(beta2), NULL },
    { "adam_eps", REAL, ALL, false, AT(eps), NULL },
    { "weight_decay", REAL, ALL, false, AT(weight_decay), NULL },
    { "clip", REAL, ALL, false, AT(clip), NULL },
    { "moments", WORD, ALL, false, AT(moments), moments },
    { "eval_every", INT64, ALL, false, AT(eval_every), NULL },
    { "patience", INT, ALL, false, AT(patience), NULL },
    { "checkpoint_every", INT64, ALL, false, AT(checkpoint_every), NULL },
};
enum { NFIELDS = sizeof fields / sizeof fields[0], NAMES_MAX = 4096 };
_Static_assert(sizeof(enum train_init) == sizeof(int) && sizeof(enum train_schedule) == sizeof(int) &&
                   sizeof(enum train_moments) == sizeof(int),
               "words are stored as ints");
/* Those that are more than one plain value. */
static const char *const others[] = { "rank", "target_r", "target_modules", "rank_pattern",
                                      "alpha_pattern", "dtype" };

static void *place(const struct field *f, struct train_opts *o) { return (char *)o + f->at; }

static const struct field *field_named(const char *name)
{
    for (int i = 0; i < NFIELDS; i++)
        if (strcmp(fields[i].name, name) == 0)
            return &fields[i];
    return NULL;
}

/* --- reading --------------------------------------------------------------------------------- */
static int get_real(json_t *obj, const char *name, double *ret, struct err *err)
{
    const json_t *v = json_object_get(obj, name);
    if (v == NULL || json_is_null(v))
        return ERR_OK;
    if (!json_is_number(v))
        return err_set_slug(err, ERR_INVALID, NULL, name, "`%s` must be a number, not %s", name,
                            json_kind(v));
    *ret = json_number_value(v);
    return ERR_OK;
}

/* Index in the list of words; absent leaves *ret alone. */
static int get_word(json_t *obj, const char *name, const char *const *words, int *ret,
                    struct err *err)
{
    const char *said = NULL;
    int rc = json_get_str(obj, name, &said, err);
    if (rc != ERR_OK || said == NULL)
        return rc;
    char list[64] = "";
    for (int i = 0; words[i] != NULL; i++) {
        if (strcmp(words[i], said) == 0) {
            *ret = i;
            return ERR_OK;
        }
        const size_t n = strlen(list);
        snprintf(list + n, sizeof list - n, "%s%s", n ? ", " : "", words[i]);
    }
    return err_set_slug(err, ERR_INVALID, NULL, name, "`%s` must be one of %s, not \"%.40s\"", name,
                        list, said);
}

static int get_field(json_t *obj, const struct field *f, struct train_opts *o, struct err *err)
{
    void *to = place(f, o);
    int64_t n;
    int rc;
    switch (f->kind) {
    case INT:
        n = *(int *)to;
        rc = json_get_int(obj, f->name, -1, INT32_MAX, &n, err);
        *(int *)to = (int)n;
        return rc;
    case INT64:
        return json_get_int(obj, f->name, 0, INT64_MAX, to, err);
    case UINT64:
        n = (int64_t) * (uint64_t *)to;
        rc = json_get_int(obj, f->name, 0, INT64_MAX, &n, err);
        *(uint64_t *)to = (uint64_t)n;
        return rc;
    case REAL:
        return get_real(obj, f->name, to, err);
    case BOOL:
        return json_get_bool(obj, f->name, to, err);
    default:
        return get_word(obj, f->name, f->words, to, err);
    }
}

/* rank, or AdaLoRA's target_r: the same option under two names. */
static int get_rank(json_t *obj, struct train_opts *o, struct err *err)
{
    int64_t rank = 0, target = 0;
    int rc = json_get_int(obj, "rank", 1, ADAPTER_MAX_RANK, &rank, err);
    if (rc == ERR_OK)
        rc = json_get_int(obj, "target_r", 1, ADAPTER_MAX_RANK, &target, err);
    if (rc != ERR_OK)
        return rc;
    if (rank != 0 && target != 0 && rank != target)
        return err_set_slug(err, ERR_INVALID, NULL, "target_r",
                            "`rank` (%d) is another name of `target_r` (%d): give one of them",
                            (int)rank, (int)target);
    if (rank != 0 || target != 0)
        o->rank = (int)(rank != 0 ? rank : target);
    return ERR_OK;
}

/* A list of names, or "all-linear", which is what none means too. */
static int get_targets(json_t *obj, struct train_opts *o, struct err *err)
{
    static const char name[] = "target_modules";
    json_t *v = json_object_get(obj, name);
    if (v == NULL || json_is_null(v) ||
        (json_is_string(v) && strcmp(json_string_value(v), "all-linear") == 0))
        return ERR_OK;
    const size_t n = json_array_size(v);
    if (!json_is_array(v) || n == 0 || n > NAMES_MAX)
        return err_set_slug(err, ERR_INVALID, NULL, name, "`%s` must be a list of 1 to %d names, or "
                            "\"all-linear\"", name, NAMES_MAX);
    o->targets = calloc(n, sizeof *o->targets);
    if (o->targets == NULL)
        return err_nomem(err);
    for (size_t i = 0; i < n; i++) {
        const json_t *s = json_array_get(v, i);
        if (!json_is_string(s) || json_string_length(s) == 0 || json_string_length(s) > 255 ||
            strlen(json_string_value(s)) != json_string_length(s))
            return err_set_slug(err, ERR_INVALID, NULL, name,
                                "`%s`: element %zu must be the name of a module", name, i);
        o->targets[i] = strdup(json_string_value(s));
        if (o->targets[i] == NULL)
            return err_nomem(err);
        o->ntargets++;
    }
    return ERR_OK;
}

/* One more pattern, or NULL: out of memory.  Of ranks and of alphas there is one each, also for the
 * same key: the first that fits counts, so the order of both has to stay. */
static struct train_pattern *pattern_add(struct train_opts *o, const char *key)
{
    struct train_pattern *more = realloc(o->patterns, (o->npatterns + 1) * sizeof *more);
    if (more == NULL)
        return NULL;
    o->patterns = more;
    struct train_pattern *p = &more[o->npatterns];
    *p = (struct train_pattern){ .pattern = strdup(key) };
    if (p->pattern == NULL)
        return NULL;
    o->npatterns++;
    return p;
}

/* {"pattern": number}: of ranks or of alphas. */
static int get_patterns(json_t *obj, const char *name, bool ranks, struct train_opts *o,
                        struct err *err)
{
    json_t *v = json_object_get(obj, name), *n;
    const char *key;
    if (v == NULL || json_is_null(v))
        return ERR_OK;
    if (!json_is_object(v) || json_object_size(v) > NAMES_MAX)
        return err_set_slug(err, ERR_INVALID, NULL, name, "`%s` must be an object of at most %d "
                            "patterns, not %s", name, NAMES_MAX, json_kind(v));
    json_object_foreach(v, key, n)
    {
        const bool good = ranks ? json_is_integer(n) && json_integer_value(n) >= 1 &&
                                      json_integer_value(n) <= ADAPTER_MAX_RANK
                                : json_is_number(n) && json_number_value(n) > 0;
        if (!good || key[0] == '\0' || strlen(key) > 255)
            return err_set_slug(err, ERR_INVALID, NULL, name, ranks ?
                                "`%s`: \"%.80s\" needs a rank from 1 to %d" :
                                "`%s`: \"%.80s\" needs an alpha above 0", name, key,
                                ADAPTER_MAX_RANK);
        struct train_pattern *p = pattern_add(o, key);
        if (p == NULL)
            return err_nomem(err);
        if (ranks)
            p->rank = (int)json_integer_value(n);
        else
            p->alpha = json_number_value(n);
    }
    return ERR_OK;
}

static int get_dtype(json_t *obj, struct train_opts *o, struct err *err)
{
    static const char *const words[] = { "f32", "bf16", NULL };
    int i = o->dtype == DT_BF16;
    int rc = get_word(obj, "dtype", words, &i, err);
    o->dtype = i ? DT_BF16 : DT_F32;
    return rc;
}

/* Which fields there are depends on the method. */
static int only_known(json_t *obj, enum adapter_method m, struct err *err)
{
    const bool adalora = m == METHOD_ADALORA;
    const char *key;
    json_t *v;
    json_object_foreach(obj, key, v)
    {
        const struct field *f = field_named(key);
        bool known = f != NULL && (f->who == ALL || adalora);
        for (size_t i = 0; i < sizeof others / sizeof others[0]; i++)
            known = known || strcmp(others[i], key) == 0;
        if (strcmp(key, "target_r") == 0 && !adalora)
            known = false;
        if (!known)
            return err_set_slug(err, ERR_INVALID, NULL, "method",
                                f != NULL || strcmp(key, "target_r") == 0 ?
                                "`method`: `%.80s` is of adalora, not of %s" :
                                "`method`: unknown field `%.80s` of %s", key,
                                adapter_method_name(m));
    }
    return ERR_OK;
}

/* What train_opts_check() would say with names that are not the JSON's. */
static int check_adam(const struct train_opts *o, struct err *err)
{
    const double beta[2] = { o->beta1, o->beta2 };
    static const char *const names[2] = { "adam_beta1", "adam_beta2" };
    for (int i = 0; i < 2; i++)
        if (!(beta[i] >= 0 && beta[i] <= 1 - 1e-9))
            return err_set_slug(err, ERR_INVALID, NULL, names[i],
                                "`%s` must be at least 0 and less than 1, not %g", names[i],
                                beta[i]);
    if (!(o->eps >= (double)FLT_MIN && o->eps <= 1))
        return err_set_slug(err, ERR_INVALID, NULL, "adam_eps",
                            "`adam_eps` must be at least %.3g and at most 1, not %g", (double)FLT_MIN,
                            o->eps);
    return ERR_OK;
}

static int get_ours(json_t *obj, struct train_opts *o, struct err *err)
{
    int rc = only_known(obj, o->method, err);
    for (int i = 0; i < NFIELDS && rc == ERR_OK; i++)
        rc = get_field(obj, &fields[i], o, err);
    if (rc == ERR_OK)
        rc = get_rank(obj, o, err);
    if (rc == ERR_OK)
        rc = get_targets(obj, o, err);
    if (rc == ERR_OK)
        rc = get_patterns(obj, "rank_pattern", true, o, err);
    if (rc == ERR_OK)
        rc = get_patterns(obj, "alpha_pattern", false, o, err);
    if (rc == ERR_OK)
        rc = get_dtype(obj, o, err);
    if (rc == ERR_OK)
        rc = check_adam(o, err);
    return rc;
}

/* --- OpenAI's -------------------------------------------------------------------------------- */
/* A number in the range, "auto" or nothing; *ret_given says which. */
static int get_auto(json_t *obj, const char *name, double lo, double hi, bool whole, double *ret,
                    bool *ret_given, struct err *err)
{
    const json_t *v = json_object_get(obj, name);
    *ret_given = false;
    if (v == NULL || json_is_null(v) ||
        (json_is_string(v) && strcmp(json_string_value(v), "auto") == 0))
        return ERR_OK;
    const double n = json_number_value(v);
    if (!(whole ? json_is_integer(v) : json_is_number(v)) || !(n >= lo) || !(n <= hi))
        return err_set_slug(err, ERR_INVALID, NULL, name,
                            "`%s` must be \"auto\" or %s from %g to %g", name,
                            whole ? "an integer" : "a number", lo, hi);
    *ret = n;
    *ret_given = true;
    return ERR_OK;
}

int api_train_hyperparameters(json_t *hyper, struct train_opts *o, struct err *err)
{
    static const char *const known[] = { "batch_size", "learning_rate_multiplier", "n_epochs", NULL };
    double n = 0;
    bool given;
    if (hyper == NULL || json_is_null(hyper))
        return ERR_OK;
    if (!json_is_object(hyper))
        return err_set_slug(err, ERR_INVALID, NULL, "hyperparameters",
                            "`hyperparameters` must be an object, not %s", json_kind(hyper));
    const char *key;
    json_t *v;
    json_object_foreach(hyper, key, v)
        if (strcmp(key, known[0]) != 0 && strcmp(key, known[1]) != 0 && strcmp(key, known[2]) != 0)
            return err_set_slug(err, ERR_INVALID, NULL, "hyperparameters",
                                "`hyperparameters`: unknown field `%.80s`", key);
    int rc = get_auto(hyper, known[0], 1, 256, true, &n, &given, err);
    if (rc == ERR_OK && given)
        o->batch = (int)n;
    if (rc == ERR_OK)
        rc = get_auto(hyper, known[1], 1e-9, 1e4, false, &n, &given, err);
    if (rc == ERR_OK && given)
        o->lr *= n;
    if (rc == ERR_OK)
        rc = get_auto(hyper, known[2], 1, 50, true, &n, &given, err);
    if (rc == ERR_OK && given)
        o->epochs = (int)n;
    return rc;
}

json_t *api_train_hyperparameters_json(const struct train_opts *o)
{
    struct train_opts d;
    train_opts_init(&d);
    const double times = o->lr / d.lr;
    train_opts_free(&d);
    return json_pack("{s:i, s:i, s:f}", "n_epochs", o->epochs, "batch_size", o->batch,
                     "learning_rate_multiplier", times);
}

static int get_supervised(json_t *obj, struct train_opts *o, struct err *err)
{
    const char *key;
    json_t *v;
    json_object_foreach(obj, key, v)
        if (strcmp(key, "hyperparameters") != 0)
            return err_set_slug(err, ERR_INVALID, NULL, "method",
                                "`method`: unknown field `%.80s` of supervised", key);
    return api_train_hyperparameters(json_object_get(obj, "hyperparameters"), o, err);
}

/* --- the method ------------------------------------------------------------------------------ */
/* {"type": T, T: {...}}: T, and the object or NULL. */
static int open_method(json_t *method, const char **ret_type, json_t **ret, struct err *err)
{
    const char *type = NULL, *key;
    json_t *v;
    if (!json_is_object(method))
        return err_set_slug(err, ERR_INVALID, NULL, "method", "`method` must be an object, not %s",
                            json_kind(method));
    int rc = json_get_str(method, "type", &type, err);
    if (rc != ERR_OK)
        return rc;
    if (type == NULL)
        return err_set_slug(err, ERR_INVALID, NULL, "method", "`method` needs a `type`: lora, rslora,"
                            " dora, adalora or supervised");
    json_object_foreach(method, key, v)
        if (strcmp(key, "type") != 0 && strcmp(key, type) != 0)
            return err_set_slug(err, ERR_INVALID, NULL, "method",
                                "`method`: unknown field `%.80s` of type %.40s", key, type);
    v = json_object_get(method, type);
    if (strcmp(type, "type") == 0 || json_is_null(v))
        v = NULL;
    if (v != NULL && !json_is_object(v))
        return err_set_slug(err, ERR_INVALID, NULL, "method",
                            "`method`: `%.40s` must be an object, not %s", type, json_kind(v));
    *ret_type = type;
    *ret = v;
    return ERR_OK;
}

static int read_method(json_t *method, struct train_opts *o, struct err *err)
{
    const char *type = NULL;
    json_t *obj = NULL;
    int rc = open_method(method, &type, &obj, err);
    if (rc != ERR_OK || type == NULL)
        return rc;
    if (strcmp(type, "supervised") == 0)
        return obj != NULL ? get_supervised(obj, o, err) : ERR_OK;
    if (!adapter_method_parse(type, &o->method))
        return err_set_slug(err, ERR_INVALID, NULL, "method",
                            "`method`: type \"%.40s\" is not one of lora, rslora, dora, adalora, "
                            "supervised", type);
    return obj != NULL ? get_ours(obj, o, err) : ERR_OK;
}

int api_train_params(json_t *method, struct train_opts *ret, struct err *err)
{
    struct train_opts o;
    train_opts_init(&o);
    int rc = method == NULL || json_is_null(method) ? ERR_OK : read_method(method, &o, err);
    if (rc == ERR_OK)
        rc = train_opts_check(&o, err);
    if (rc != ERR_OK) {
        train_opts_free(&o);
        *ret = (struct train_opts){ 0 };
        return rc;
    }
    *ret = o;
    return ERR_OK;
}

const char *api_train_params_fixed(json_t *method)
{
    const char *type = json_string_value(json_object_get(method, "type"));
    json_t *obj = type != NULL ? json_object_get(method, type) : NULL;
    for (int i = 0; i < NFIELDS; i++)
        if (fields[i].fixed && json_object_get(obj, fields[i].name) != NULL)
            return fields[i].name;
    for (size_t i = 0; i < sizeof others / sizeof others[0]; i++)
        if (strcmp(others[i], "dtype") != 0 && json_object_get(obj, others[i]) != NULL)
            return others[i];
    return NULL;
}

/* --- writing --------------------------------------------------------------------------------- */
static json_t *field_json(const struct field *f, const struct train_opts *o)
{
    const void *from = (const char *)o + f->at;
    switch (f->kind) {
    case INT: return json_integer(*(const int *)from);
    case INT64: return json_integer(*(const int64_t *)from);
    case UINT64: return json_integer((json_int_t) * (const uint64_t *)from);
    case REAL: return json_real(*(const double *)from);
    case BOOL: return json_boolean(*(const bool *)from);
    default: return json_string(f->words[*(const int *)from]);
    }
}

static json_t *targets_json(const struct train_opts *o)
{
    if (o->ntargets == 0)
        return json_string("all-linear");
    json_t *list = json_array();
    for (size_t i = 0; i < o->ntargets; i++)
        json_array_append_new(list, json_string(o->targets[i]));
    return list;
}

static json_t *patterns_json(const struct train_opts *o, bool ranks)
{
    json_t *obj = json_object();
    for (size_t i = 0; i < o->npatterns; i++) {
        const struct train_pattern *p = &o->patterns[i];
        if (ranks && p->rank > 0)
            json_object_set_new(obj, p->pattern, json_integer(p->rank));
        if (!ranks && p->alpha > 0)
            json_object_set_new(obj, p->pattern, json_real(p->alpha));
    }
    return obj;
}

json_t *api_train_params_json(const struct train_opts *o)
{
    const bool adalora = o->method == METHOD_ADALORA;
    json_t *obj = json_object();
    int bad = json_object_set_new(obj, adalora ? "target_r" : "rank", json_integer(o->rank));
    bad |= json_object_set_new(obj, "target_modules", targets_json(o));
    if (!adalora) {
        bad |= json_object_set_new(obj, "rank_pattern", patterns_json(o, true));
        bad |= json_object_set_new(obj, "alpha_pattern", patterns_json(o, false));
    }
    for (int i = 0; i < NFIELDS; i++)
        if (fields[i].who == ALL || adalora)
            bad |= json_object_set_new(obj, fields[i].name, field_json(&fields[i], o));
    bad |= json_object_set_new(obj, "dtype", json_string(o->dtype == DT_BF16 ? "bf16" : "f32"));
    if (bad != 0) {
        json_decref(obj);
        return NULL;
    }
    const char *type = adapter_method_name(o->method);
    return json_pack("{s:s, s:o}", "type", type, type, obj);
}
