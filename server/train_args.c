/* train_args.c - see train_args.h. */
#include "server/train_args.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* --- options -------------------------------------------------------------------------------------- */
static bool int_opt(const struct opts *o, const char *name, int64_t lo, int64_t hi, int *ret)
{
    int64_t v = *ret;
    if (!opt_int(o, name, lo, hi, &v))
        return false;
    *ret = (int)v;
    return true;
}

/* One of the words, whose numbers are 0, 1, ... */
static bool word_opt(const struct opts *o, const char *name, const char *const *words, int *ret)
{
    const char *said = opt_str(o, name);
    for (int i = 0; words[i] != NULL; i++)
        if (strcmp(words[i], said) == 0) {
            *ret = i;
            return true;
        }
    fail(2, "--%s: %s is not one of those that --help lists", name, said);
    return false;
}

static bool words(const struct opts *o, struct train_opts *t)
{
    static const char *const inits[] = { "default", "gaussian", "normal", NULL };
    static const char *const schedules[] = { "constant", "linear", "cosine", NULL };
    static const char *const moments[] = { "f32", "8bit", NULL };
    static const char *const dtypes[] = { "f32", "bf16", NULL };
    int init, schedule, moment, dtype;
    if (!adapter_method_parse(opt_str(o, "method"), &t->method)) {
        fail(2, "--method is lora, rslora, dora or adalora, not %s", opt_str(o, "method"));
        return false;
    }
    if (!word_opt(o, "init", inits, &init) || !word_opt(o, "schedule", schedules, &schedule) ||
        !word_opt(o, "moments", moments, &moment) || !word_opt(o, "dtype", dtypes, &dtype))
        return false;
    t->init = (enum train_init)init;
    t->schedule = (enum train_schedule)schedule;
    t->moments = (enum train_moments)moment;
    t->dtype = dtype == 0 ? DT_F32 : DT_BF16;
    return true;
}

static bool numbers(const struct opts *o, struct train_opts *t)
{
    const int most = 1000000000;
    int64_t seed = 0;
    t->shuffle = !opt_flag(o, "no-shuffle");
    if (!opt_int(o, "seed", 0, INT64_MAX, &seed))
        return false;
    t->seed = (uint64_t)seed;
    return int_opt(o, "rank", 1, ADAPTER_MAX_RANK, &t->rank) &&
           opt_double(o, "alpha", 0, 1e6, &t->alpha) &&
           opt_double(o, "dropout", 0, 0.99, &t->dropout) &&
           int_opt(o, "init-r", 0, ADAPTER_MAX_RANK, &t->adalora.init_r) &&
           int_opt(o, "tinit", 0, most, &t->adalora.tinit) &&
           int_opt(o, "tfinal", 0, most, &t->adalora.tfinal) &&
           int_opt(o, "deltaT", 1, most, &t->adalora.deltaT) &&
           opt_double(o, "adalora-beta1", 0, 1, &t->adalora.beta1) &&
           opt_double(o, "adalora-beta2", 0, 1, &t->adalora.beta2) &&
           opt_double(o, "orth-reg-weight", 0, 1e6, &t->adalora.orth_reg_weight) &&
           int_opt(o, "epochs", 1, most, &t->epochs) &&
           opt_int(o, "max-steps", 0, most, &t->max_steps) &&
           int_opt(o, "batch", 1, 65536, &t->batch) &&
           int_opt(o, "accumulate", 1, 65536, &t->accumulate) &&
           int_opt(o, "micro-tokens", 0, 1 << 20, &t->micro_tokens) &&
           int_opt(o, "max-length", 0, 1 << 30, &t->max_length) &&
           opt_double(o, "lr", 0, 10, &t->lr) &&
           opt_double(o, "lr-b-ratio", 0, 1e4, &t->lr_b_ratio) &&
           opt_double(o, "warmup", 0, 1e9, &t->warmup) &&
           opt_double(o, "adam-beta1", 0, 1, &t->beta1) &&
           opt_double(o, "adam-beta2", 0, 1, &t->beta2) &&
           opt_double(o, "adam-eps", 0, 1, &t->eps) &&
           opt_double(o, "weight-decay", 0, 10, &t->weight_decay) &&
           opt_double(o, "clip", 0, 1e9, &t->clip) &&
           opt_int(o, "eval-every", 0, most, &t->eval_every) &&
           int_opt(o, "patience", 0, most, &t->patience) &&
           opt_int(o, "checkpoint-every", 0, most, &t->checkpoint_every);
}

/* Calls fn for each piece of "a,b,c" ("" and NULL have none). */
static bool each_piece(const char *list, bool (*fn)(char *piece, void *ud), void *ud)
{
    char *copy = list != NULL ? strdup(list) : NULL, *rest = NULL;
    bool done = list == NULL || copy != NULL;
    if (copy == NULL && list != NULL)
        fail(2, "out of memory");
    for (char *p = copy ? strtok_r(copy, ",", &rest) : NULL; p != NULL && done;
         p = strtok_r(NULL, ",", &rest))
        done = fn(p, ud);
    free(copy);
    return done;
}

static bool add_target(char *piece, void *ud)
{
    struct train_opts *t = ud;
    char **grown = realloc(t->targets, (t->ntargets + 1) * sizeof *grown);
    if (grown != NULL)
        t->targets = grown;
    if (grown == NULL || (t->targets[t->ntargets] = strdup(piece)) == NULL) {
        fail(2, "out of memory");
        return false;
    }
    t->ntargets++;
    return true;
}

struct patterns {
    struct train_opts *t;
    const char *option;
    bool ranks;
};

static bool add_pattern(char *piece, void *ud)
{
    const struct patterns *p = ud;
    struct train_opts *t = p->t;
    char *eq = strrchr(piece, '='), *end = NULL;
    const double v = eq != NULL ? strtod(eq + 1, &end) : 0;
    if (eq == NULL || eq == piece || end == eq + 1 || *end != '\0' || !(v > 0) || v > 1e6 ||
        (p->ranks && v != floor(v))) {
        fail(2, "--%s: \"%s\" is not NAME=%s", p->option, piece,
             p->ranks ? "RANK" : "ALPHA");
        return false;
    }
    *eq = '\0';
    struct train_pattern *grown = realloc(t->patterns, (t->npatterns + 1) * sizeof *grown);
    char *name = strdup(piece);
    if (grown != NULL)
        t->patterns = grown;
    if (grown == NULL || name == NULL) {
        free(name);
        fail(2, "out of memory");
        return false;
    }
    t->patterns[t->npatterns++] = (struct train_pattern){
        .pattern = name, .rank = p->ranks ? (int)v : 0, .alpha = p->ranks ? 0 : v,
    };
    return true;
}

int train_args_read(const struct opts *o, struct train_opts *ret)
{
    struct train_opts t;
    struct err err = { 0 };
    train_opts_init(&t);
    struct patterns ranks = { &t, "rank-pattern", true }, alphas = { &t, "alpha-pattern", false };
    bool done = words(o, &t) && numbers(o, &t) &&
                each_piece(opt_str(o, "target-modules"), add_target, &t) &&
                each_piece(opt_str(o, "rank-pattern"), add_pattern, &ranks) &&
                each_piece(opt_str(o, "alpha-pattern"), add_pattern, &alphas);
    if (done && train_opts_check(&t, &err) != ERR_OK) {
        fail(2, "%s", err.msg);
        done = false;
    }
    if (!done) {
        train_opts_free(&t);
        return 2;
    }
    *ret = t;
    return 0;
}

/* --- data ------------------------------------------------------------------------------------------ */
int train_args_tokens(const struct base *base, const char *spec, int64_t max_length,
                      char **ret_path, struct train_set **ret, struct err *err)
{
    const char *colon = strrchr(spec, ':');
    if (colon == NULL || colon == spec || colon[1] == '\0')
        return err_set(err, ERR_INVALID, "\"%s\" is not FILE.safetensors:TENSOR", spec);
    char *path = strndup(spec, (size_t)(colon - spec));
    if (path == NULL)
        return err_nomem(err);
    const int longest = max_length > 0 ? (int)max_length : base->arch.max_positions;
    int rc = dataset_tokens(path, colon + 1, base->arch.V, longest, NULL, ret, err);
    if (ret_path != NULL)
        *ret_path = path;
    else
        free(path);
    return rc;
}

/* --- memory and time --------------------------------------------------------------------------------- */
size_t train_args_bytes(const struct train_estimate *e) { return e->bytes + e->state_bytes; }

int train_args_fits(const struct train_estimate *e, size_t left, const char *why, struct err *err)
{
    char need[32], state[32], work[32], has[32];
    if (train_args_bytes(e) <= left)
        return ERR_OK;
    return err_set_slug(err, ERR_TOO_LARGE, "out_of_memory", NULL,
                        "the run needs %s beside the base (twice %s for its tensors, gradients and "
                        "moments while they are saved, %s for activations), and there are %s left: "
                        "%s; fewer examples or tokens at once, a smaller rank or 8-bit moments need "
                        "less", human_bytes(train_args_bytes(e), need),
                        human_bytes(e->state_bytes, state), human_bytes(e->work_bytes, work),
                        human_bytes(left, has), why);
}

size_t train_args_keep(const struct train_estimate *e, size_t left)
{
    const size_t need = train_args_bytes(e), room = left > need ? (left - need) / 2 : 0;
    return room < e->keep_all ? room : e->keep_all;
}

const char *train_args_time(double seconds, char ret[32])
{
    const double s = seconds > 0 && seconds < 1e9 ? seconds : 0;
    if (s < 1)
        snprintf(ret, 32, "%.0f ms", s * 1000);
    else if (s < 120)
        snprintf(ret, 32, "%.0f s", s);
    else if (s < 7200)
        snprintf(ret, 32, "%.0f min", s / 60);
    else
        snprintf(ret, 32, "%d h %d min", (int)(s / 3600), (int)(s / 60) % 60);
    return ret;
}

/* --- a step ------------------------------------------------------------------------------------------- */
json_t *train_args_step_json(const struct train_report *r, const struct train_valid *v)
{
    json_t *j = json_pack("{s:I, s:I, s:f, s:f, s:f, s:f, s:f, s:I, s:I, s:f, s:f}", "step",
                          (json_int_t)r->step, "steps", (json_int_t)r->steps, "epoch", r->epoch,
                          "loss", r->loss, "accuracy", r->accuracy, "lr", r->lr, "grad_norm",
                          r->grad_norm, "tokens", (json_int_t)r->tokens, "targets",
                          (json_int_t)r->targets, "seconds", r->seconds, "tokens_per_s",
                          r->seconds > 0 ? (double)r->tokens / r->seconds : 0.0);
    if (j != NULL && v != NULL) {
        json_object_set_new(j, "valid_loss", json_real(v->loss));
        json_object_set_new(j, "valid_accuracy", json_real(v->accuracy));
    }
    if (j != NULL && r->budget >= 0) {
        json_object_set_new(j, "orth", json_real(r->orth));
        json_object_set_new(j, "budget", json_integer((json_int_t)r->budget));
        json_object_set_new(j, "kept", json_integer((json_int_t)r->kept));
        if (isfinite(r->threshold))
            json_object_set_new(j, "threshold", json_real(r->threshold));
    }
    return j;
}
