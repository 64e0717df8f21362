/* test_train.c - the trainer on random models: gradients of every family and method against central
 * differences of the loss, the quick path against fp32, and what a run promises: the same bits with
 * any number of threads and across saving and restoring, packing that leaks nothing, early stopping,
 * going on from a version. */
#include "engine/train_int.h"

#include "engine/num.h"
#include "engine/train_rand.h"
#include "tests/support_model.h"

#include <jansson.h>
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

#define COUNT(t) (sizeof(t) / sizeof(t)[0])

/* With sanitizers, differences are taken along one direction, and of every third family. */
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
enum { DIRECTIONS = 1, EVERY_FAMILY = 3 };
#else
enum { DIRECTIONS = 2, EVERY_FAMILY = 1 };
#endif

enum { V = 320, EXAMPLES = 12, LONGEST = 40 };

struct data {
    struct train_set set;
    struct train_example examples[EXAMPLES];
    int32_t tokens[EXAMPLES][LONGEST];
    uint8_t learn[EXAMPLES][LONGEST];
};

static struct data *make_data(uint64_t seed)
{
    static struct data all[2];
    struct data *d = &all[seed % 2];
    *d = (struct data){ .set = { .n = EXAMPLES } };
    d->set.examples = d->examples;
    for (int i = 0; i < EXAMPLES; i++) {
        uint32_t r[4];
        train_rand_u32x4(seed, 99, (uint64_t)i, r);
        const int n = 2 + (int)(r[0] % (LONGEST - 1));
        d->examples[i] = (struct train_example){ d->tokens[i], d->learn[i], n };
        for (int k = 0; k < n; k++) {
            train_rand_u32x4(seed, 98, (uint64_t)i * LONGEST + (uint64_t)k, r);
            d->tokens[i][k] = (int32_t)(r[0] % 64);
            d->learn[i][k] = k > 0 && (k > n / 3 || k == n - 1);
            d->set.targets += d->learn[i][k];
        }
        d->set.tokens += (uint64_t)n;
    }
    memset(d->set.hash, (int)seed, sizeof d->set.hash);
    return d;
}

static struct compute compute_of(enum precision p, int threads)
{
    struct compute c = { .precision = p };
    assert_int_equal(isa_select("auto", &c.isa, NULL), ERR_OK);
    assert_int_equal(pool_create(threads, &c.pool, NULL), ERR_OK);
    return c;
}

static struct train *create(const struct base *b, const struct compute *c,
                            const struct train_opts *o, const struct data *d,
                            const struct data *valid, const struct adapter_src *from)
{
    struct err err = { 0 };
    struct train *t = NULL;
    if (train_create(b, c, o, &d->set, valid != NULL ? &valid->set : NULL, from, &t, &err))
        fail_msg("%s", err.msg);
    return t;
}

static struct train_report step(struct train *t)
{
    struct err err = { 0 };
    struct train_report r;
    if (train_step(t, NULL, NULL, &r, &err) != ERR_OK)
        fail_msg("%s", err.msg);
    return r;
}

static struct train_opts opts_of(enum adapter_method m)
{
    struct train_opts o;
    train_opts_init(&o);
    o.method = m;
    o.rank = 4;
    o.batch = EXAMPLES;
    o.max_steps = 20;
    o.shuffle = false;
    o.clip = 0;
    return o;
}

/* --- gradients against differences ---------------------------------------------------------------- */
/* Loss of the first step's batch where the values stand.  The step's update is far below the last
 * bit of every value. */
static double loss_here(struct train *t)
{
    t->step = 0;
    for (size_t i = 0; i < t->nmodules; i++) { /* the norm is a constant (train_linear.c) */
        struct train_module *m = &t->modules[i];
        for (int o = 0; m->m != NULL && o < m->out; o++)
            m->gain[o] = m->m[o] / (float)m->w_norm2[o];
    }
    const struct train_report r = step(t);
    return r.loss + r.orth;
}

static void check_gradient(const char *what, const struct base *b, const struct train_opts *given,
                           double limit)
{
    struct compute c = compute_of(PREC_F32, 2);
    struct train_opts o = *given;
    o.lr = 1e-30;
    struct data *d = make_data(1);
    struct train *t = create(b, &c, &o, d, NULL, NULL);
    float *p0 = malloc(t->nparams * sizeof *p0), *dir = malloc(t->nparams * sizeof *dir);
    float *g = malloc(t->nparams * sizeof *g);
    for (size_t i = 0; i < t->nmodules; i++) {
        struct train_module *m = &t->modules[i];
        const size_t A = (size_t)m->r * (size_t)m->in, B = (size_t)m->r * (size_t)m->out;
        train_rand_normal(5, i, 0.1f, m->A, A);
        train_rand_normal(6, i, 0.1f, m->B, B);
        if (m->E != NULL)
            train_rand_uniform(7, i, 0.5f, 1.5f, m->E, (size_t)m->r);
    }
    train_norms(t);
    for (size_t i = 0; i < t->nmodules; i++) /* kept beside the run, which renews its own */
        for (int k = 0; t->modules[i].m != NULL && k < t->modules[i].out; k++)
            t->modules[i].w_norm2[k] = (double)t->modules[i].norm[k];
    memcpy(p0, t->p, t->nparams * sizeof *p0);
    loss_here(t);
    memcpy(g, t->g, t->nparams * sizeof *g);
    /* Along the gradient itself, where the change is largest, and along a random direction that has
     * a part of it. */
    for (int trial = 0; trial < DIRECTIONS; trial++) {
        double slope = 0, norm = 0, gnorm = 0;
        for (size_t i = 0; i < t->nparams; i++)
            gnorm += (double)g[i] * (double)g[i];
        train_rand_normal(8, (uint64_t)trial, 1, dir, t->nparams);
        const double spread = sqrt(gnorm / (double)t->nparams);
        for (size_t i = 0; i < t->nparams; i++) {
            dir[i] = trial == 0 ? g[i] : g[i] + (float)spread * dir[i];
            slope += (double)g[i] * (double)dir[i];
            norm += (double)dir[i] * (double)dir[i];
        }
        const double eps = 4e-3 / sqrt(norm);
        double at[4];
        for (int k = 0; k < 4; k++) {
            static const double where[] = { 1, -1, 2, -2 };
            for (size_t i = 0; i < t->nparams; i++)
                t->p[i] = (float)((double)p0[i] + where[k] * eps * (double)dir[i]);
            at[k] = loss_here(t);
        }
        /* Fourth order. */
        const double found = (8 * (at[0] - at[1]) - (at[2] - at[3])) / (12 * eps);
        printf("    %-28s slope %.6f, differences %.6f (%.1e)\n", what, slope, found,
               fabs(found / slope - 1));
        if (!(fabs(found / slope - 1) < limit))
            fail_msg("%s: the gradient's slope is %g, differences say %g", what, slope, found);
    }
    free(p0);
    free(dir);
    free(g);
    train_destroy(t);
    pool_destroy(c.pool);
}

#define SHAPE                                                                                      \
    "\"hidden_size\":64,\"intermediate_size\":96,\"num_hidden_layers\":3,"                         \
    "\"num_attention_heads\":4,\"num_key_value_heads\":2,\"vocab_size\":320,"                      \
    "\"max_position_embeddings\":64"
#define LLAMA SHAPE ",\"rms_norm_eps\":1e-5,\"rope_theta\":10000.0,\"tie_word_embeddings\":false"

static const struct { const char *what, *config; } families[] = {
    { "llama", "{\"model_type\":\"llama\"," LLAMA "}" },
    { "llama, biases", "{\"model_type\":\"llama\",\"attention_bias\":true,\"mlp_bias\":true," LLAMA
                       "}" },
    { "mistral, window", "{\"model_type\":\"mistral\",\"sliding_window\":8," LLAMA "}" },
    { "qwen2", "{\"model_type\":\"qwen2\"," LLAMA "}" },
    { "qwen3", "{\"model_type\":\"qwen3\",\"head_dim\":32," LLAMA "}" },
    { "phi3", "{\"model_type\":\"phi3\"," LLAMA "}" },
    { "smollm3", "{\"model_type\":\"smollm3\",\"no_rope_layer_interval\":2," LLAMA "}" },
    { "gpt2", "{\"model_type\":\"gpt2\",\"n_embd\":64,\"n_layer\":3,\"n_head\":4,"
              "\"n_positions\":64,\"vocab_size\":320}" },
    { "gpt_neox, parallel",
      "{\"model_type\":\"gpt_neox\",\"hidden_act\":\"gelu\",\"hidden_size\":64,"
      "\"intermediate_size\":96,\"num_hidden_layers\":3,\"num_attention_heads\":4,"
      "\"rotary_pct\":0.5,\"rotary_emb_base\":10000,\"max_position_embeddings\":64,"
      "\"layer_norm_eps\":1e-5,\"use_parallel_residual\":true,\"tie_word_embeddings\":false,"
      "\"vocab_size\":320}" },
    { "bloom", "{\"model_type\":\"bloom\",\"hidden_size\":96,\"n_layer\":3,\"n_head\":6,"
               "\"vocab_size\":320}" },
    { "chatglm",
      "{\"model_type\":\"chatglm\",\"add_bias_linear\":false,\"add_qkv_bias\":true,"
      "\"apply_residual_connection_post_layernorm\":false,\"ffn_hidden_size\":96,"
      "\"hidden_size\":64,\"kv_channels\":16,\"layernorm_epsilon\":1e-05,"
      "\"multi_query_attention\":true,\"multi_query_group_num\":2,\"num_attention_heads\":4,"
      "\"num_layers\":3,\"original_rope\":true,\"padded_vocab_size\":320,"
      "\"post_layer_norm\":true,\"rmsnorm\":true,\"seq_length\":64,"
      "\"tie_word_embeddings\":false}" },
    { "glm", "{\"model_type\":\"glm\",\"head_dim\":16,\"partial_rotary_factor\":0.5,"
             "\"attention_bias\":true," LLAMA "}" },
    { "glm4", "{\"model_type\":\"glm4\",\"head_dim\":16,\"partial_rotary_factor\":0.5,"
              "\"attention_bias\":true," LLAMA "}" },
    { "gemma2", "{\"model_type\":\"gemma2\",\"head_dim\":16,\"query_pre_attn_scalar\":20,"
                "\"attn_logit_softcapping\":5.0,\"final_logit_softcapping\":3.0,"
                "\"sliding_window\":8,\"hidden_activation\":\"gelu_pytorch_tanh\","
                "\"rms_norm_eps\":1e-6,\"rope_theta\":10000.0," SHAPE "}" },
    { "gemma3", "{\"model_type\":\"gemma3_text\",\"head_dim\":16,\"query_pre_attn_scalar\":20,"
                "\"sliding_window\":8,\"sliding_window_pattern\":2,"
                "\"hidden_activation\":\"gelu_pytorch_tanh\",\"rms_norm_eps\":1e-6,"
                "\"rope_theta\":1000000.0,\"rope_local_base_freq\":10000.0," SHAPE "}" },
};

static void gradients_of_every_family_are_those_of_its_loss(void **state)
{
    (void)state;
    struct train_opts o = opts_of(METHOD_LORA);
    for (size_t i = 0; i < COUNT(families); i += EVERY_FAMILY) {
        o.keep_bytes = i % 2 == 0 ? 0 : (size_t)1 << 30;
        struct base *b = support_base_config(families[i].config, "f32", PREC_F32);
        check_gradient(families[i].what, b, &o, 1e-3);
        base_free(b);
    }
}

static void gradients_of_every_method_are_those_of_its_loss(void **state)
{
    (void)state;
    struct base *f = support_base_config(families[4].config, "nf4", PREC_F32);
    static const char *const names[] = { "lora", "rslora", "adalora", "dora" };
    for (int m = METHOD_LORA; m <= METHOD_DORA; m++)
        for (int drop = 0; drop < 2; drop++) {
            struct train_opts o = opts_of((enum adapter_method)m);
            char what[64];
            o.dropout = drop ? 0.3 : 0;
            o.adalora.tinit = 5;
            snprintf(what, sizeof what, "%s%s", names[m], drop ? ", dropout" : "");
            check_gradient(what, f, &o, 1e-3);
        }
    static char up[] = "up_proj", *some[] = { up };
    struct train_opts o = opts_of(METHOD_LORA);
    o.targets = some;
    o.ntargets = 1;
    check_gradient("up_proj alone", f, &o, 1e-3);
    o.batch = 3;
    o.accumulate = 4;
    check_gradient("micro-batches", f, &o, 1e-3);
    base_free(f);
}

/* --- the quick path --------------------------------------------------------------------------------- */
/* |a - b| / |b| over all gradients of the first step with these values. */
static double gradient_distance(struct train *a, struct train *b)
{
    double diff = 0, norm = 0;
    assert_int_equal(a->nparams, b->nparams);
    for (size_t i = 0; i < a->nparams; i++) {
        diff += pow((double)a->g[i] - (double)b->g[i], 2);
        norm += pow((double)b->g[i], 2);
    }
    return sqrt(diff / norm);
}

static void the_quick_path_keeps_its_bounds(void **state)
{
    (void)state;
    /* train.h: gradients within 1 % (exact), 5 % (fast) of fp32's as a whole. */
    static const double limits[] = { [PREC_FAST] = 5e-2, [PREC_EXACT] = 1e-2 };
    struct support_model m = support_model_default("llama");
    for (enum precision p = PREC_FAST; p <= PREC_EXACT; p++) {
        struct base *b = support_base(&m, "nf4", NULL, PREC_F32);
        struct compute quick = compute_of(p, 2), slow = compute_of(PREC_F32, 2);
        struct train_opts o = opts_of(METHOD_LORA);
        o.lr = 1e-30;
        struct train *x = create(b, &quick, &o, make_data(1), NULL, NULL);
        struct train *y = create(b, &slow, &o, make_data(1), NULL, NULL);
        train_rand_normal(5, 0, 0.05f, x->p, x->nparams);
        memcpy(y->p, x->p, x->nparams * sizeof *x->p);
        const double lx = step(x).loss, ly = step(y).loss, g = gradient_distance(x, y);
        printf("    %-6s loss %.6f against %.6f, gradients off by %.2e\n", precision_name(p), lx,
               ly, g);
        assert_true(fabs(lx - ly) < limits[p] * ly);
        assert_true(g < limits[p]);
        train_destroy(x);
        train_destroy(y);
        pool_destroy(quick.pool);
        pool_destroy(slow.pool);
        base_free(b);
    }
}

/* --- the same bits --------------------------------------------------------------------------------------- */
static struct train_opts busy(enum adapter_method m)
{
    struct train_opts o = opts_of(m);
    o.batch = 3;
    o.accumulate = 2;
    o.shuffle = true;
    o.dropout = 0.1;
    o.clip = 0.5;
    o.lr = 5e-3;
    o.lr_b_ratio = 4;
    o.weight_decay = 0.01;
    o.max_steps = 12;
    o.adalora.tinit = 2;
    o.adalora.tfinal = 3;
    o.micro_tokens = 64;
    return o;
}

static void hash_of(struct train *t, uint8_t ret[32])
{
    struct err err = { 0 };
    struct adapter_src *a = NULL;
    if (train_export(t, &a, &err) != ERR_OK)
        fail_msg("%s", err.msg);
    memcpy(ret, a->hash, 32);
    adapter_src_free(a);
}

static void threads_and_interruptions_change_no_bit(void **state)
{
    (void)state;
    struct support_model m = support_model_default("llama");
    struct base *b = support_base(&m, "nf4", NULL, PREC_EXACT);
    struct data *d = make_data(1);
    for (int method = METHOD_LORA; method <= METHOD_DORA; method++)
        for (int bits8 = 0; bits8 < 2; bits8++) {
            struct compute one = compute_of(PREC_EXACT, 1), two = compute_of(PREC_EXACT, 2);
            struct train_opts o = busy((enum adapter_method)method);
            struct err err = { 0 };
            uint8_t x[32], y[32];
            o.moments = bits8 ? TRAIN_MOMENTS_8BIT : TRAIN_MOMENTS_F32;
            struct train *t = create(b, &one, &o, d, NULL, NULL);
            while (train_step_now(t) < train_steps(t))
                step(t);
            hash_of(t, x);
            train_destroy(t);
            /* Two threads, a new process after every third step, and blocks that are kept. */
            o.keep_bytes = bits8 ? (size_t)1 << 30 : 400 << 10; /* both blocks, or one, are kept */
            t = create(b, &two, &o, d, NULL, NULL);
            assert_int_equal(t->nkept, method == METHOD_DORA ? 0 : bits8 ? 2 : 1);
            while (train_step_now(t) < train_steps(t)) {
                step(t);
                if (train_step_now(t) % 3 != 0)
                    continue;
                struct buf s, tight;
                buf_init(&s, SIZE_MAX / 2);
                assert_int_equal(train_save(t, &s, &err), ERR_OK);
                buf_init(&tight, s.len); /* it asks for no byte more */
                assert_int_equal(train_save(t, &tight, &err), ERR_OK);
                assert_memory_equal(tight.data, s.data, s.len);
                buf_free(&tight);
                train_destroy(t);
                t = create(b, &two, &o, d, NULL, NULL);
                if (train_restore(t, s.data, s.len, &err) != ERR_OK)
                    fail_msg("%s", err.msg);
                buf_free(&s);
            }
            hash_of(t, y);
            train_destroy(t);
            assert_memory_equal(x, y, 32);
            pool_destroy(one.pool);
            pool_destroy(two.pool);
        }
    base_free(b);
}

static bool always(void *ud)
{
    int *left = ud;
    return --*left < 0;
}

static void a_step_that_is_stopped_has_not_happened(void **state)
{
    (void)state;
    struct support_model m = support_model_default("llama");
    struct base *b = support_base(&m, "nf4", NULL, PREC_EXACT);
    struct compute c = compute_of(PREC_EXACT, 2);
    struct train_opts o = busy(METHOD_ADALORA);
    struct train *x = create(b, &c, &o, make_data(1), NULL, NULL);
    struct train *y = create(b, &c, &o, make_data(1), NULL, NULL);
    struct err err = { 0 };
    struct train_report r;
    uint8_t hx[32], hy[32];
    for (int i = 0; i < 6; i++) {
        int left = i * 3;
        assert_int_equal(train_step(x, always, &left, &r, &err), ERR_CANCELLED);
        err_clear(&err);
        step(x);
        step(y);
    }
    hash_of(x, hx);
    hash_of(y, hy);
    assert_memory_equal(hx, hy, 32);
    train_destroy(x);
    train_destroy(y);
    pool_destroy(c.pool);
    base_free(b);
}

static void expect_refused(struct train *t, const void *s, size_t n, const char *why)
{
    struct err err = { 0 };
    assert_int_equal(train_restore(t, s, n, &err), ERR_INVALID);
    if (strstr(err.msg, why) == NULL)
        fail_msg("\"%s\" does not say \"%s\"", err.msg, why);
}

static void a_state_says_where_it_was_computed(void **state)
{
    (void)state;
    struct support_model m = support_model_default("llama");
    struct base *b = support_base(&m, "nf4", NULL, PREC_F32);
    struct compute exact = compute_of(PREC_EXACT, 1), f32 = compute_of(PREC_F32, 2);
    struct train_opts o = busy(METHOD_LORA);
    struct train *t = create(b, &exact, &o, make_data(1), NULL, NULL);
    struct train *same = create(b, &exact, &o, make_data(1), NULL, NULL);
    struct train *other = create(b, &f32, &o, make_data(1), NULL, NULL);
    struct buf s;
    buf_init(&s, SIZE_MAX / 2);
    step(t);
    assert_int_equal(train_save(t, &s, NULL), ERR_OK);
    assert_null(train_elsewhere(t));
    assert_int_equal(train_restore(same, s.data, s.len, NULL), ERR_OK);
    assert_null(train_elsewhere(same));
    assert_int_equal(train_restore(other, s.data, s.len, NULL), ERR_OK);
    assert_non_null(train_elsewhere(other));
    assert_non_null(strstr(train_elsewhere(other), "exact"));
    buf_free(&s);
    train_destroy(t);
    train_destroy(same);
    train_destroy(other);
    pool_destroy(exact.pool);
    pool_destroy(f32.pool);
    base_free(b);
}

static void a_state_that_is_not_of_this_run_is_refused(void **state)
{
    (void)state;
    struct support_model m = support_model_default("llama");
    struct base *b = support_base(&m, "nf4", NULL, PREC_EXACT);
    m.seed = 4711;
    struct base *other = support_base(&m, "nf4", NULL, PREC_EXACT);
    struct compute c = compute_of(PREC_EXACT, 1);
    struct train_opts o = busy(METHOD_LORA), another = o;
    another.lr = 1e-3;
    struct train *t = create(b, &c, &o, make_data(1), NULL, NULL);
    struct train *base2 = create(other, &c, &o, make_data(1), NULL, NULL);
    struct train *opts2 = create(b, &c, &another, make_data(1), NULL, NULL);
    struct train *data2 = create(b, &c, &o, make_data(2), NULL, NULL);
    struct buf s;
    buf_init(&s, SIZE_MAX / 2);
    step(t);
    assert_int_equal(train_save(t, &s, NULL), ERR_OK);
    expect_refused(base2, s.data, s.len, "another base");
    expect_refused(opts2, s.data, s.len, "other options");
    expect_refused(data2, s.data, s.len, "other data");
    expect_refused(t, s.data, 10, "it is none");
    expect_refused(t, s.data, s.len - 1, "damaged");
    s.data[s.len / 2] ^= 1;
    expect_refused(t, s.data, s.len, "damaged");
    buf_free(&s);
    train_destroy(t);
    train_destroy(base2);
    train_destroy(opts2);
    train_destroy(data2);
    pool_destroy(c.pool);
    base_free(b);
    base_free(other);
}

/* --- packing ----------------------------------------------------------------------------------------------- */
static void packed_examples_do_not_see_each_other(void **state)
{
    (void)state;
    struct support_model m = support_model_default("mistral");
    struct base *b = support_base(&m, "nf4", NULL, PREC_F32);
    struct compute c = compute_of(PREC_F32, 2);
    struct train_opts o = opts_of(METHOD_LORA);
    struct data *d = make_data(1);
    struct train *t = create(b, &c, &o, d, NULL, NULL);
    struct train_valid all, one;
    double sum = 0;
    train_rand_normal(5, 0, 0.1f, t->p, t->nparams);
    assert_int_equal(train_evaluate(t, &d->set, NULL, NULL, &all, NULL), ERR_OK);
    for (size_t i = 0; i < d->set.n; i++) {
        const struct train_set alone = { .n = 1, .examples = &d->examples[i] };
        assert_int_equal(train_evaluate(t, &alone, NULL, NULL, &one, NULL), ERR_OK);
        sum += one.loss * (double)one.targets;
    }
    assert_int_equal(all.targets, d->set.targets);
    assert_true(fabs(sum / (double)d->set.targets / all.loss - 1) < 1e-6);
    train_destroy(t);
    pool_destroy(c.pool);
    base_free(b);
}

/* --- whole runs ---------------------------------------------------------------------------------------------- */
struct seen { int steps, looks, checkpoints; double first, last; int64_t stop_at; };

static enum train_event wanted(void *ud)
{
    const struct seen *s = ud;
    return s->stop_at > 0 && s->steps >= s->stop_at ? TRAIN_PAUSE : TRAIN_GO_ON;
}

static int on_step(void *ud, struct train *t, const struct train_report *r,
                   const struct train_valid *v, struct err *err)
{
    struct seen *s = ud;
    (void)t;
    (void)err;
    s->first = s->steps == 0 ? r->loss : s->first;
    s->last = r->loss;
    s->steps++;
    s->looks += v != NULL;
    return ERR_OK;
}

static int on_checkpoint(void *ud, struct train *t, const struct train_report *r,
                         const struct train_valid *v, struct err *err)
{
    struct seen *s = ud;
    (void)t;
    (void)r;
    (void)v;
    (void)err;
    s->checkpoints++;
    return ERR_OK;
}

static void a_run_learns_looks_keeps_and_ends(void **state)
{
    (void)state;
    struct support_model m = support_model_default("qwen3");
    struct base *b = support_base(&m, "nf4", NULL, PREC_EXACT);
    struct compute c = compute_of(PREC_EXACT, 2);
    for (int method = METHOD_LORA; method <= METHOD_DORA; method++) {
        struct train_opts o = opts_of((enum adapter_method)method);
        struct seen s = { .steps = 0 };
        const struct train_hooks h = { &s, wanted, on_step, on_checkpoint };
        enum train_end end;
        struct err err = { 0 };
        o.lr = 2e-2;
        o.batch = 4;
        o.max_steps = 30;
        o.eval_every = 7;
        o.checkpoint_every = 10;
        o.adalora.tfinal = 10;
        o.keep_bytes = (size_t)1 << 30;
        struct train *t = create(b, &c, &o, make_data(1), make_data(2), NULL);
        if (train_loop(t, &h, &end, &err) != ERR_OK)
            fail_msg("%s", err.msg);
        assert_int_equal(end, TRAIN_DONE);
        assert_int_equal(s.steps, 30);
        assert_int_equal(s.looks, 5); /* 7, 14, 21, 28, and the end */
        assert_int_equal(s.checkpoints, 3);
        assert_true(s.last < 0.8 * s.first);
        if (method == METHOD_ADALORA) {
            size_t n;
            int64_t kept = 0;
            const struct train_rank *r = train_ranks(t, &n);
            for (size_t i = 0; i < n; i++)
                kept += r[i].rank;
            assert_int_equal(kept, (int64_t)n * o.rank);
        }
        train_destroy(t);
    }
    pool_destroy(c.pool);
    base_free(b);
}

static void a_run_without_progress_ends_early_with_its_best(void **state)
{
    (void)state;
    struct support_model m = support_model_default("llama");
    struct base *b = support_base(&m, "nf4", NULL, PREC_EXACT);
    struct compute c = compute_of(PREC_EXACT, 2);
    struct train_opts o = opts_of(METHOD_LORA);
    struct seen s = { .steps = 0 };
    const struct train_hooks h = { &s, wanted, on_step, on_checkpoint };
    struct train_valid v;
    enum train_end end;
    o.lr = 3e-2; /* learns the random training data by heart: the other data gets worse */
    o.max_steps = 200;
    o.eval_every = 2;
    o.patience = 3;
    struct data *d = make_data(1), *other = make_data(2);
    struct train *t = create(b, &c, &o, d, other, NULL);
    assert_int_equal(train_loop(t, &h, &end, NULL), ERR_OK);
    assert_int_equal(end, TRAIN_EARLY);
    assert_true(s.steps < 200);
    assert_true(t->has_best);
    assert_int_equal(train_evaluate(t, &other->set, NULL, NULL, &v, NULL), ERR_OK);
    assert_true(v.loss == t->best_loss);
    train_destroy(t);
    pool_destroy(c.pool);
    base_free(b);
}

/* Pauses in the look after a step, which no hook has seen then. */
struct looker { struct train *t; struct buf state; int64_t seen; bool armed; };

static enum train_event in_the_look(void *ud)
{
    const struct looker *l = ud;
    return l->armed && train_step_now(l->t) > l->seen ? TRAIN_PAUSE : TRAIN_GO_ON;
}

static int note_step(void *ud, struct train *t, const struct train_report *r,
                     const struct train_valid *v, struct err *err)
{
    struct looker *l = ud;
    (void)t;
    (void)v;
    (void)err;
    l->seen = r->step;
    return ERR_OK;
}

static int note_state(void *ud, struct train *t, const struct train_report *r,
                      const struct train_valid *v, struct err *err)
{
    struct looker *l = ud;
    (void)r;
    (void)v;
    l->state.len = 0;
    return train_save(t, &l->state, err);
}

static void a_stop_while_it_looks_changes_no_bit(void **state)
{
    (void)state;
    struct support_model m = support_model_default("llama");
    struct base *b = support_base(&m, "nf4", NULL, PREC_EXACT);
    struct compute c = compute_of(PREC_EXACT, 2);
    struct train_opts o = opts_of(METHOD_LORA);
    struct data *d = make_data(1), *other = make_data(2);
    struct looker l = { .armed = false };
    const struct train_hooks h = { &l, in_the_look, note_step, note_state };
    enum train_end end;
    struct err err = { 0 };
    o.max_steps = 12;
    o.eval_every = 4;
    o.patience = 2;
    o.checkpoint_every = 3;
    buf_init(&l.state, (size_t)1 << 30);
    struct train *whole = create(b, &c, &o, d, other, NULL);
    l.t = whole;
    assert_int_equal(train_loop(whole, &h, &end, &err), ERR_OK);

    struct train *t = create(b, &c, &o, d, other, NULL);
    l.t = t;
    l.seen = 0;
    l.state.len = 0;
    l.armed = true;
    assert_int_equal(train_loop(t, &h, &end, &err), ERR_OK);
    assert_int_equal(end, TRAIN_PAUSED);
    assert_int_equal(l.seen, 3); /* of step 4 only the look is missing */
    train_destroy(t);

    t = create(b, &c, &o, d, other, NULL);
    l.t = t;
    l.armed = false;
    assert_int_equal(train_restore(t, l.state.data, l.state.len, NULL), ERR_OK);
    assert_int_equal(train_step_now(t), 3);
    assert_int_equal(train_loop(t, &h, &end, &err), ERR_OK);
    assert_int_equal(t->step, whole->step);
    assert_true(t->best_loss == whole->best_loss);
    assert_memory_equal(t->p, whole->p, t->nparams * sizeof *t->p);
    train_destroy(t);
    train_destroy(whole);
    buf_free(&l.state);
    pool_destroy(c.pool);
    base_free(b);
}

static void a_run_goes_on_from_a_version(void **state)
{
    (void)state;
    struct support_model m = support_model_default("llama");
    struct base *b = support_base(&m, "nf4", NULL, PREC_EXACT);
    struct compute c = compute_of(PREC_EXACT, 2);
    struct data *d = make_data(1);
    for (int method = METHOD_LORA; method <= METHOD_DORA; method++) {
        struct train_opts o = opts_of((enum adapter_method)method);
        struct adapter_src *a = NULL, *next = NULL;
        struct train_valid before, after;
        struct err err = { 0 };
        o.lr = 2e-2;
        o.adalora.tfinal = 5;
        struct train *t = create(b, &c, &o, d, NULL, NULL);
        while (train_step_now(t) < train_steps(t))
            step(t);
        assert_int_equal(train_evaluate(t, &d->set, NULL, NULL, &before, NULL), ERR_OK);
        if (train_export(t, &a, &err) != ERR_OK)
            fail_msg("%s", err.msg);
        train_destroy(t);
        t = create(b, &c, &o, d, NULL, a);
        assert_int_equal(train_evaluate(t, &d->set, NULL, NULL, &after, NULL), ERR_OK);
        assert_true(fabs(after.loss / before.loss - 1) < 1e-5);
        assert_true(step(t).loss < before.loss * 1.05);
        if (train_export(t, &next, &err) != ERR_OK)
            fail_msg("%s", err.msg);
        assert_int_equal(next->params, a->params); /* pruned ranks stay */
        assert_memory_not_equal(next->hash, a->hash, 32);
        adapter_src_free(next);
        train_destroy(t);
        /* Another method is refused by name. */
        o.method = method == METHOD_LORA ? METHOD_DORA : METHOD_LORA;
        assert_int_equal(train_create(b, &c, &o, &d->set, NULL, a, &t, &err), ERR_INVALID);
        assert_non_null(strstr(err.msg, adapter_method_name((enum adapter_method)method)));
        adapter_src_free(a);
    }
    pool_destroy(c.pool);
    base_free(b);
}

static void an_estimate_is_what_a_run_takes(void **state)
{
    (void)state;
    struct support_model m = support_model_default("llama");
    struct base *b = support_base(&m, "nf4", NULL, PREC_EXACT);
    struct compute c = compute_of(PREC_EXACT, 2);
    struct data *d = make_data(1);
    for (int method = METHOD_LORA; method <= METHOD_DORA; method++) {
        struct train_opts o = opts_of((enum adapter_method)method);
        struct train_estimate e;
        struct err err = { 0 };
        struct buf s;
        if (train_estimate(b, &c, &o, &d->set, NULL, NULL, &e, &err) != ERR_OK)
            fail_msg("%s", err.msg);
        struct train *t = create(b, &c, &o, d, NULL, NULL);
        assert_int_equal(e.steps, train_steps(t));
        assert_int_equal(e.trainable, t->nparams);
        assert_true(e.work_bytes >= t->mem_bytes && e.work_bytes < 2 * t->mem_bytes);
        /* What is saved are the values and all that is kept between steps; gradients come on top. */
        buf_init(&s, SIZE_MAX / 2);
        step(t);
        assert_int_equal(train_save(t, &s, NULL), ERR_OK);
        const size_t kept = s.len + t->nparams * sizeof(float);
        assert_true(e.state_bytes > kept * 8 / 10 && e.state_bytes < kept * 14 / 10);
        assert_true(e.seconds_per_step > 0 && e.seconds > e.seconds_per_step);
        buf_free(&s);
        train_destroy(t);
    }
    pool_destroy(c.pool);
    base_free(b);
}

/* --- refusals --------------------------------------------------------------------------------------------------- */
static void options_that_make_no_sense_are_refused_by_name(void **state)
{
    (void)state;
    struct support_model m = support_model_default("llama");
    struct base *b = support_base(&m, "nf4", NULL, PREC_EXACT);
    struct compute c = compute_of(PREC_EXACT, 1);
    static char nowhere[] = "z_proj", *some[] = { nowhere };
    for (int i = 0; i < 14; i++) {
        struct train_opts o = opts_of(METHOD_LORA);
        struct err err = { 0 };
        struct train *t = NULL;
        const char *want = "";
        switch (i) {
        case 0: o.rank = 0; want = "rank"; break;
        case 1: o.lr = NAN; want = "learning_rate"; break;
        case 2: o.dropout = 1; want = "dropout"; break;
        case 3: o.batch = 0; want = "batch_size"; break;
        case 4: o.method = METHOD_ADALORA; o.adalora.init_r = 2; want = "init_r"; break;
        case 5: o.method = METHOD_ADALORA; o.adalora.tinit = 15; o.adalora.tfinal = 5;
                want = "tinit"; break;
        case 6: o.method = METHOD_ADALORA; o.init = TRAIN_INIT_NORMAL; want = "init"; break;
        case 7: o.patience = 2; want = "eval_every"; break;
        case 8: o.patience = 2; o.eval_every = 1; want = "validation"; break;
        case 9: o.targets = some; o.ntargets = 1; want = "z_proj"; break;
        case 10: o.dtype = DT_F16; want = "dtype"; break;
        case 12: o.method = METHOD_ADALORA; o.adalora.tfinal = 0; want = "tfinal"; break;
        case 13: o.eps = 1e-300; want = "eps"; break;
        case 11: o.max_steps = 0; o.epochs = 0; want = "epochs"; break;
        }
        assert_int_equal(train_create(b, &c, &o, &make_data(1)->set, NULL, NULL, &t, &err),
                         ERR_INVALID);
        if (strstr(err.msg, want) == NULL)
            fail_msg("case %d: \"%s\" does not name %s", i, err.msg, want);
    }
    struct data *d = make_data(1);
    struct err err = { 0 };
    struct train *t = NULL;
    struct train_opts o = opts_of(METHOD_LORA);
    d->tokens[3][1] = V;
    assert_int_equal(train_create(b, &c, &o, &d->set, NULL, NULL, &t, &err), ERR_INVALID);
    assert_non_null(strstr(err.msg, "example 4 has token 320"));
    pool_destroy(c.pool);
    base_free(b);
}

static void more_steps_than_a_run_can_count_are_refused(void **state)
{
    (void)state;
    enum { MANY = 20000 };
    struct support_model m = support_model_default("llama");
    struct base *b = support_base(&m, "nf4", NULL, PREC_EXACT);
    struct compute c = compute_of(PREC_EXACT, 1);
    const struct train_example one = make_data(1)->examples[0];
    struct train_example *list = malloc(MANY * sizeof *list);
    struct train_set many = { .n = MANY, .examples = list, .tokens = MANY * (uint64_t)one.n,
                              .targets = MANY };
    struct train_opts o = opts_of(METHOD_ADALORA);
    struct train *t = NULL;
    struct err err = { 0 };
    for (int i = 0; i < MANY; i++)
        list[i] = one;
    o.batch = 1;
    o.max_steps = 0;
    o.epochs = 100000;
    assert_int_equal(train_create(b, &c, &o, &many, NULL, NULL, &t, &err), ERR_INVALID);
    assert_non_null(strstr(err.msg, "2000000000 steps"));
    free(list);
    pool_destroy(c.pool);
    base_free(b);
}

/* Allocations of jansson before one fails; -1: none does. */
static long json_left = -1;
static void *json_malloc(size_t n) { return json_left >= 0 && json_left-- == 0 ? NULL : malloc(n); }

static void no_memory_for_the_config_makes_no_other_adapter(void **state)
{
    (void)state;
    struct support_model m = support_model_default("llama");
    struct base *b = support_base(&m, "nf4", NULL, PREC_EXACT);
    struct compute c = compute_of(PREC_EXACT, 1);
    struct train_pattern pattern = { .pattern = (char[]){ "q_proj" }, .rank = 2, .alpha = 3 };
    for (int adalora = 0; adalora < 2; adalora++) {
        struct train_opts o = opts_of(adalora ? METHOD_ADALORA : METHOD_LORA);
        struct train_module *list = NULL;
        struct err err = { 0 };
        size_t n;
        long k = 0;
        int rc;
        o.patterns = adalora ? NULL : &pattern;
        o.npatterns = adalora ? 0 : 1;
        json_set_alloc_funcs(json_malloc, free);
        do {
            err_clear(&err);
            json_left = k++;
            rc = train_targets(b, &o, &list, &n, &err);
            if (rc != ERR_OK)
                assert_int_equal(rc, ERR_NOMEM);
        } while (json_left < 0);
        json_left = -1;
        json_set_alloc_funcs(malloc, free);
        assert_int_equal(rc, ERR_OK);
        assert_true(k > 20);
        assert_int_equal(n, 3 * 7);
        free(list);
    }
    pool_destroy(c.pool);
    base_free(b);
}

static void a_run_that_diverges_says_where(void **state)
{
    (void)state;
    struct support_model m = support_model_default("llama");
    struct base *b = support_base(&m, "nf4", NULL, PREC_EXACT);
    struct compute c = compute_of(PREC_EXACT, 1);
    struct train_opts o = opts_of(METHOD_LORA);
    struct train *t = create(b, &c, &o, make_data(1), NULL, NULL);
    struct train_report r;
    struct err err = { 0 };
    step(t);
    t->modules[0].A[0] = INFINITY;
    assert_int_equal(train_step(t, NULL, NULL, &r, &err), ERR_INVALID);
    assert_non_null(strstr(err.msg, "step 2"));
    assert_int_equal(train_step_now(t), 1);
    train_destroy(t);
    pool_destroy(c.pool);
    base_free(b);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(gradients_of_every_family_are_those_of_its_loss),
        cmocka_unit_test(gradients_of_every_method_are_those_of_its_loss),
        cmocka_unit_test(the_quick_path_keeps_its_bounds),
        cmocka_unit_test(threads_and_interruptions_change_no_bit),
        cmocka_unit_test(a_step_that_is_stopped_has_not_happened),
        cmocka_unit_test(a_state_says_where_it_was_computed),
        cmocka_unit_test(a_state_that_is_not_of_this_run_is_refused),
        cmocka_unit_test(packed_examples_do_not_see_each_other),
        cmocka_unit_test(a_run_learns_looks_keeps_and_ends),
        cmocka_unit_test(a_run_without_progress_ends_early_with_its_best),
        cmocka_unit_test(a_stop_while_it_looks_changes_no_bit),
        cmocka_unit_test(a_run_goes_on_from_a_version),
        cmocka_unit_test(an_estimate_is_what_a_run_takes),
        cmocka_unit_test(options_that_make_no_sense_are_refused_by_name),
        cmocka_unit_test(more_steps_than_a_run_can_count_are_refused),
        cmocka_unit_test(no_memory_for_the_config_makes_no_other_adapter),
        cmocka_unit_test(a_run_that_diverges_says_where),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
