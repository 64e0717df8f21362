/* test_train_golden.c - training against traces of PEFT, transformers and torch's AdamW: losses,
 * gradients, parameters, AdaLoRA's budget, thresholds, masks and final ranks, step by step.
 *
 * Needs the reference folder; without it every test says so and is skipped. */
#include "engine/train_int.h"

#include "engine/forward.h"
#include "engine/safetensors.h"
#include "tests/support_model.h"

#include <jansson.h>
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

struct trace {
    char dir[256];
    json_t *json;
    struct base *base;
    struct compute compute;
    struct train_set set;
    struct train_example examples[16];
    int32_t tokens[16 * 64];
    uint8_t learn[16 * 64];
    struct train *train;
};

static struct st_file *open_file(const struct trace *t, const char *name)
{
    struct err err = { 0 };
    struct st_file *f = NULL;
    char path[512];
    snprintf(path, sizeof path, "%s/%s.safetensors", t->dir, name);
    if (st_open(path, &f, &err) != ERR_OK)
        fail_msg("%s", err.msg);
    return f;
}

static double num(const json_t *j, const char *key, double otherwise)
{
    const json_t *v = json_object_get(j, key);
    return json_is_number(v) ? json_number_value(v) : otherwise;
}

static void read_batch(struct trace *t)
{
    struct st_file *f = open_file(t, "batch");
    const struct st_tensor *ids = st_find(f, "input_ids"), *labels = st_find(f, "labels");
    const int N = (int)ids->shape[0], T = (int)ids->shape[1];
    t->set = (struct train_set){ .n = (size_t)N, .examples = t->examples };
    for (int i = 0; i < N; i++) {
        t->examples[i] = (struct train_example){ t->tokens + i * T, t->learn + i * T, T };
        for (int k = 0; k < T; k++) {
            int64_t id, label;
            memcpy(&id, ids->data + 8 * (i * T + k), 8);
            memcpy(&label, labels->data + 8 * (i * T + k), 8);
            t->tokens[i * T + k] = (int32_t)id;
            t->learn[i * T + k] = k > 0 && label != -100;
            t->set.targets += t->learn[i * T + k];
        }
        t->set.tokens += (uint64_t)T;
    }
    st_close(f);
}

static void load_base(struct trace *t, const char *model, const char *type, enum precision p)
{
    struct base_import_opts o = { .type = type, .head = "f32", .embed = "f32" };
    struct err err = { 0 };
    char tmp[64], path[96], dir[64];
    support_tmpdir(tmp);
    snprintf(path, sizeof path, "%s/m.base", tmp);
    snprintf(dir, sizeof dir, "golden/models/%s", model);
    t->compute.precision = p;
    if (base_import(support_shared(dir), path, &o, &err) != ERR_OK ||
        base_load(path, p, false, &t->base, &err) ||
        isa_select("auto", &t->compute.isa, &err) || pool_create(2, &t->compute.pool, &err))
        fail_msg("%s: %s", dir, err.msg);
    support_remove(tmp);
}

static struct train_opts options(const struct trace *t, enum adapter_method method)
{
    const json_t *c = json_object_get(t->json, "config");
    struct train_opts o;
    train_opts_init(&o);
    o.method = method;
    o.shuffle = false;
    o.batch = (int)t->set.n;
    o.accumulate = 1;
    if (num(t->json, "accum", 1) > 1) {
        o.accumulate = (int)num(t->json, "accum", 1);
        o.batch /= o.accumulate;
    }
    o.max_steps = (int64_t)json_array_size(json_object_get(t->json, "steps"));
    o.lr = num(t->json, "lr", 0);
    o.weight_decay = num(t->json, "weight_decay", 0);
    o.clip = num(t->json, "clip", 0);
    o.schedule = TRAIN_CONSTANT;
    o.warmup = num(t->json, "warmup", 0);
    if (c == NULL) {
        o.rank = (int)num(t->json, "r", 0);
        o.alpha = num(t->json, "lora_alpha", 0);
        return o;
    }
    o.rank = (int)num(c, "target_r", 0);
    o.alpha = num(c, "lora_alpha", 0);
    o.max_steps = (int64_t)num(c, "total_step", 0);
    o.adalora.init_r = (int)num(c, "init_r", 0);
    o.adalora.tinit = (int)num(c, "tinit", 0);
    o.adalora.tfinal = (int)num(c, "tfinal", 0);
    o.adalora.deltaT = (int)num(c, "deltaT", 0);
    o.adalora.beta1 = num(c, "beta1", 0);
    o.adalora.beta2 = num(c, "beta2", 0);
    o.adalora.orth_reg_weight = num(c, "orth_reg_weight", 0);
    return o;
}

/* --- tensors of the run and of a file ---------------------------------------------------------- */
struct named { char name[256]; float *p, *g; size_t n; };

static size_t list(const struct trace *t, const struct train_module *m, struct named out[3])
{
    const bool ada = t->train->o.method == METHOD_ADALORA;
    const char *dot = ada ? "" : ".weight";
    char path[160];
    size_t n = 0;
    arch_module_path(&t->base->arch, m->layer, m->module, path, sizeof path);
    out[n] = (struct named){ .p = m->A, .g = m->gA, .n = (size_t)m->r * (size_t)m->in };
    snprintf(out[n++].name, 256, "%s.lora_A%s", path, dot);
    out[n] = (struct named){ .p = m->B, .g = m->gB, .n = (size_t)m->r * (size_t)m->out };
    snprintf(out[n++].name, 256, "%s.lora_B%s", path, dot);
    if (m->E != NULL) {
        out[n] = (struct named){ .p = m->E, .g = m->gE, .n = (size_t)m->r };
        snprintf(out[n++].name, 256, "%s.lora_E", path);
    }
    if (m->m != NULL) {
        out[n] = (struct named){ .p = m->m, .g = m->gm, .n = (size_t)m->out };
        snprintf(out[n++].name, 256, "%s.lora_magnitude_vector.weight", path);
    }
    return n;
}

static void set_values(struct trace *t, const char *file)
{
    struct st_file *f = open_file(t, file);
    struct err err = { 0 };
    size_t used = 0;
    for (size_t i = 0; i < t->train->nmodules; i++) {
        struct named x[3];
        const size_t n = list(t, &t->train->modules[i], x);
        for (size_t k = 0; k < n; k++) {
            const struct st_tensor *v = st_find(f, x[k].name);
            if (v == NULL || st_count(v) != x[k].n || st_f32(v, 0, x[k].n, x[k].p, &err))
                fail_msg("%s: %s %s", file, x[k].name, err.msg);
            used++;
        }
    }
    assert_int_equal(used, f->ntensors);
    st_close(f);
    train_norms(t->train);
}

/* The largest |difference|; with `relative` divided by the largest |value| of each tensor. */
static double difference(struct trace *t, const char *file, bool grads, bool relative)
{
    struct st_file *f = open_file(t, file);
    double worst = 0;
    for (size_t i = 0; i < t->train->nmodules; i++) {
        struct named x[3];
        const size_t n = list(t, &t->train->modules[i], x);
        for (size_t k = 0; k < n; k++) {
            const struct st_tensor *v = st_find(f, x[k].name);
            double most = 0, diff = 0;
            assert_non_null(v);
            for (size_t j = 0; j < x[k].n; j++) {
                float want;
                memcpy(&want, v->data + 4 * j, 4);
                const double d = fabs((double)(grads ? x[k].g : x[k].p)[j] - (double)want);
                most = fmax(most, fabs((double)want));
                diff = fmax(diff, d);
                if (isnan(d))
                    fail_msg("%s is not a number", x[k].name);
            }
            if (relative && most > 1e-9)
                diff /= most;
            worst = fmax(worst, diff);
        }
    }
    st_close(f);
    return worst;
}

static void check(const char *what, double got, double limit)
{
    printf("    %-28s %.2e (limit %.0e)\n", what, got, limit);
    if (!(got <= limit))
        fail_msg("%s: %g is over %g", what, got, limit);
}

/* --- one trace ------------------------------------------------------------------------------------ */
static bool begin(struct trace *t, const char *name, enum adapter_method method, enum precision p)
{
    struct err err = { 0 };
    json_error_t why;
    char path[512];
    memset(t, 0, sizeof *t);
    snprintf(path, sizeof path, "golden/train/%s", name);
    const char *dir = support_shared(path);
    if (dir == NULL)
        return false;
    snprintf(t->dir, sizeof t->dir, "%s", dir);
    snprintf(path, sizeof path, "%s/trace.json", t->dir);
    t->json = json_load_file(path, 0, &why);
    assert_non_null(t->json);
    const char *base = json_string_value(json_object_get(t->json, "base"));
    const char *model = json_string_value(json_object_get(t->json, "model"));
    load_base(t, model, strcmp(base, "f32") == 0 ? "f32" : "nf4", p);
    read_batch(t);
    struct train_opts o = options(t, method);
    struct train_pattern pattern = { .pattern = (char *)"v_proj", .rank = 2 };
    if (strcmp(name, "rslora_nf4_wd") == 0) {
        o.patterns = &pattern;
        o.npatterns = 1;
    }
    if (train_create(t->base, &t->compute, &o, &t->set, NULL, NULL, &t->train, &err) != ERR_OK)
        fail_msg("%s: %s", name, err.msg);
    t->train->adalora_first = (int64_t)num(t->json, "first_step", 0);
    set_values(t, "init");
    printf("  %s (%s, %s)\n", name, model, precision_name(p));
    return true;
}

static void end(struct trace *t)
{
    train_destroy(t->train);
    base_free(t->base);
    pool_destroy(t->compute.pool);
    json_decref(t->json);
}

static double step(struct trace *t, struct train_report *r)
{
    struct err err = { 0 };
    if (train_step(t->train, NULL, NULL, r, &err) != ERR_OK)
        fail_msg("%s", err.msg);
    return r->loss;
}

/* LoRA, rsLoRA, DoRA. */
static void plain(const char *name, enum adapter_method method)
{
    static struct trace t;
    if (!begin(&t, name, method, PREC_F32))
        skip();
    const json_t *steps = json_object_get(t.json, "steps");
    double loss = 0, norm = 0, rate = 0;
    for (size_t i = 0; i < json_array_size(steps); i++) {
        const json_t *want = json_array_get(steps, i);
        struct train_report r;
        loss = fmax(loss, fabs(step(&t, &r) - num(want, "loss", NAN)));
        norm = fmax(norm, fabs(r.grad_norm / num(want, "grad_norm", NAN) - 1));
        rate = fmax(rate, fabs(r.lr / num(want, "lr", NAN) - 1));
        if (i == 0) {
            check("gradients, step 1", difference(&t, "grads_step1", true, true), 1e-4);
            check("values, step 1", difference(&t, "after_step1", false, false), 1e-4);
        }
        if (i == 4)
            check("values, step 5", difference(&t, "after_step5", false, false), 1e-4);
    }
    check("losses", loss, 1e-4);
    check("gradient norms, relative", norm, 1e-4);
    check("learning rates, relative", rate, 1e-12);
    check("values at the end", difference(&t, "final", false, false), 1e-4);
    struct train_valid v;
    struct err err = { 0 };
    assert_int_equal(train_evaluate(t.train, &t.set, NULL, NULL, &v, &err), ERR_OK);
    check("final loss", fabs(v.loss - num(t.json, "final_loss", NAN)), 1e-4);
    end(&t);
}

static void check_mask(struct trace *t, const json_t *step)
{
    const json_t *alive = json_object_get(step, "nonzero_E");
    char name[192];
    for (size_t i = 0; i < t->train->nmodules; i++) {
        const struct train_module *m = &t->train->modules[i];
        arch_module_path(&t->base->arch, m->layer, m->module, name, 160);
        strcat(name, ".lora_E");
        const json_t *want = json_object_get(alive, name);
        assert_int_equal(json_array_size(want), m->r);
        for (int k = 0; k < m->r; k++)
            if ((m->E[k] != 0) != json_is_true(json_array_get(want, (size_t)k)))
                fail_msg("step %lld: %s[%d]: E is %g", (long long)t->train->step, name, k,
                         (double)m->E[k]);
    }
}

static void check_pruned(struct trace *t)
{
    struct err err = { 0 };
    struct adapter_src *a = NULL, *want = NULL;
    char dir[512];
    snprintf(dir, sizeof dir, "%s/adapter", t->dir);
    if (train_export(t->train, &a, &err) != ERR_OK ||
        peft_load_dir(&t->base->arch, dir, &want, &err) != ERR_OK)
        fail_msg("%s", err.msg);
    assert_int_equal(a->nmodules, want->nmodules);
    assert_int_equal(a->params, want->params);
    for (size_t i = 0; i < a->nmodules; i++) {
        assert_string_equal(a->modules[i].path, want->modules[i].path);
        assert_int_equal(a->modules[i].rank, want->modules[i].rank);
        assert_int_equal(a->modules[i].init_rank, want->modules[i].init_rank);
        assert_true(a->modules[i].scaling == want->modules[i].scaling);
        if (want->modules[i].mask != NULL)
            assert_memory_equal(a->modules[i].mask, want->modules[i].mask,
                                (size_t)want->modules[i].init_rank);
    }
    /* What decided goes with it: every triplet that was kept is worth more than any that was not. */
    float least = INFINITY, most = 0;
    for (size_t i = 0; i < a->nmodules; i++)
        for (int k = 0; k < a->modules[i].init_rank; k++) {
            const float v = a->modules[i].importance[k];
            if (a->modules[i].mask[k])
                least = v < least ? v : least;
            else
                most = v > most ? v : most;
        }
    assert_true(least > most && most > 0);
    adapter_src_free(a);
    adapter_src_free(want);
}

static void adaptive(const char *name)
{
    static struct trace t;
    if (!begin(&t, name, METHOD_ADALORA, PREC_F32))
        skip();
    const json_t *steps = json_object_get(t.json, "steps");
    double loss = 0, orth = 0, threshold = 0;
    for (size_t i = 0; i < json_array_size(steps); i++) {
        const json_t *want = json_array_get(steps, i);
        struct train_report r;
        if (t.train->step == t.train->steps)
            break;
        loss = fmax(loss, fabs(step(&t, &r) - num(want, "loss_ce", NAN)));
        orth = fmax(orth, fabs(r.orth - num(want, "loss_orth", NAN)));
        assert_int_equal(r.budget, (int64_t)num(want, "budget", -1));
        if (json_is_number(json_object_get(want, "threshold")))
            threshold = fmax(threshold, fabs(r.threshold / num(want, "threshold", NAN) - 1));
        check_mask(&t, want);
        if (i == 0) {
            check("gradients, step 1", difference(&t, "grads_step1", true, true), 1e-4);
            check("values, step 1", difference(&t, "after_step1", false, false), 3e-4);
        }
        if (i == 3)
            check("gradients, step 4", difference(&t, "grads_step4", true, true), 1e-4);
        if (i == 4)
            check("values, step 5", difference(&t, "after_step5", false, false), 3e-4);
    }
    check("losses", loss, 2e-4);
    check("orthogonality term", orth, 2e-4);
    check("thresholds, relative", threshold, 1e-3);
    check("values at the end", difference(&t, "final_unpruned", false, false), 3e-4);
    check_pruned(&t);
    end(&t);
}

static void lora_f32(void **s) { (void)s; plain("lora_f32", METHOD_LORA); }
static void lora_nf4(void **s) { (void)s; plain("lora_nf4", METHOD_LORA); }
static void lora_nf4_randB(void **s) { (void)s; plain("lora_nf4_randB", METHOD_LORA); }
static void lora_qwen3(void **s) { (void)s; plain("lora_qwen3_nf4", METHOD_LORA); }
static void lora_bloom(void **s) { (void)s; plain("lora_bloom_nf4", METHOD_LORA); }
static void lora_chatglm(void **s) { (void)s; plain("lora_chatglm_nf4", METHOD_LORA); }
static void recipe(void **s) { (void)s; plain("qlora_recipe_clip_accum", METHOD_LORA); }
static void rslora(void **s) { (void)s; plain("rslora_nf4_wd", METHOD_RSLORA); }
static void dora(void **s) { (void)s; plain("dora_nf4", METHOD_DORA); }
static void adalora_nf4(void **s) { (void)s; adaptive("adalora_nf4"); }
static void adalora_fast(void **s) { (void)s; adaptive("adalora_nf4_lr1e-2"); }
static void adalora_every3(void **s) { (void)s; adaptive("adalora_deltaT3_from1"); }
static void adalora_bloom(void **s) { (void)s; adaptive("adalora_bloom_f32"); }

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(lora_f32),     cmocka_unit_test(lora_nf4),
        cmocka_unit_test(lora_nf4_randB), cmocka_unit_test(lora_qwen3),
        cmocka_unit_test(lora_bloom),   cmocka_unit_test(lora_chatglm),
        cmocka_unit_test(recipe),       cmocka_unit_test(rslora),
        cmocka_unit_test(dora),         cmocka_unit_test(adalora_nf4),
        cmocka_unit_test(adalora_fast), cmocka_unit_test(adalora_every3),
        cmocka_unit_test(adalora_bloom),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
