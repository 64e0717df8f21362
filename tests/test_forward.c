/* test_forward.c - the promise of compute.h for whole models: a row's logits have the same bits alone,
 * in a batch of other sequences with other adapters, in chunks of any size, on any number of threads
 * and any instruction set. */
#include "engine/forward.h"
#include "engine/num.h"
#include "tests/support_model.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

static uint32_t rng_state = 5;
static float rnd(float scale)
{
    rng_state = rng_state * 1664525 + 1013904223;
    return ((float)(rng_state >> 8) * 0x1p-23f - 1) * scale;
}

/* --- random adapters ------------------------------------------------------------------------- */
struct made {
    struct adapter adapter;
    struct lora_module *modules;
};

static float *floats(size_t n, float scale)
{
    float *p = malloc((n + 1) * sizeof *p);
    assert_non_null(p);
    for (size_t i = 0; i < n; i++)
        p[i] = rnd(scale);
    return p;
}

/* Ranks 0 to `rank`, different for each module. */
static void make(struct made *m, const struct arch *a, int rank, uint8_t name)
{
    memset(m, 0, sizeof *m);
    m->modules = calloc((size_t)a->L * MOD_SLOTS, sizeof *m->modules);
    assert_non_null(m->modules);
    for (int i = 0; i < a->L * MOD_SLOTS; i++) {
        if (i % MOD_SLOTS >= MOD_COUNT)
            continue;
        const size_t in = (size_t)arch_in(a, i % MOD_SLOTS), out = (size_t)arch_out(a, i % MOD_SLOTS);
        const size_t r = (size_t)((i * 5 + 3) % (rank + 1));
        if (r > 0)
            m->modules[i] = (struct lora_module){
                .rank = (int)r, .in = (int)in, .out = (int)out, .dtype = DT_F32,
                .A = floats(r * in, 0.3f), .B = floats(r * out, 0.3f), .gain = floats(r, 0.5f),
            };
    }
    m->adapter.hash[0] = name;
    m->adapter.L = a->L;
    m->adapter.modules = m->modules;
}

static void unmake(struct made *m)
{
    for (int i = 0; i < m->adapter.L * MOD_SLOTS; i++) {
        free((void *)(uintptr_t)m->modules[i].A);
        free((void *)(uintptr_t)m->modules[i].B);
        free((void *)(uintptr_t)m->modules[i].gain);
    }
    free(m->modules);
}

/* --- running sequences ------------------------------------------------------------------------- */
enum { NSEQ = 4, LONGEST = 75, ROWS = 160 };

/* Four sequences: the bare base, an adapter, two adapters, the first adapter again. */
struct scene {
    struct base *base;
    struct made made[2];
    struct lora_set set[NSEQ];
    int len[NSEQ];
    int32_t tokens[NSEQ][LONGEST];
};

struct engine {
    struct compute compute;
    struct kv_cache *kv;
    struct forward *forward;
};

static void engine_open(struct engine *e, const struct base *b, enum precision p, enum isa isa,
                        int threads)
{
    struct err err = { 0 };
    e->compute = (struct compute){ .isa = isa, .precision = p };
    assert_int_equal(pool_create(threads, &e->compute.pool, &err), ERR_OK);
    assert_int_equal(kv_create(&b->arch, kv_type_default(b->is_f32), 64 * kv_page_bytes(&b->arch, kv_type_default(b->is_f32)), &e->kv,
                               &err), ERR_OK);
    assert_int_equal(forward_create(b, &e->compute, e->kv, b->arch.max_positions, ROWS, ROWS,
                                    &e->forward, &err), ERR_OK);
}

static void engine_close(struct engine *e)
{
    forward_destroy(e->forward);
    kv_destroy(e->kv);
    pool_destroy(e->compute.pool);
}

static void seq_open(struct engine *e, struct kv_seq *s, const struct scene *sc, int i)
{
    uint8_t seed[32] = { (uint8_t)(i + 1) };
    memset(s, 0, sizeof *s);
    assert_int_equal(kv_open(e->kv, seed, sc->tokens[i], sc->len[i], s, NULL), ERR_OK);
    assert_int_equal(s->len, 0);
    assert_true(kv_reserve(e->kv, s, sc->len[i]));
}

/* Sequence i alone, `chunk` rows a step: all logits. */
static float *run_alone(const struct scene *sc, int i, enum precision p, enum isa isa, int threads,
                        int chunk)
{
    const size_t V = (size_t)sc->base->arch.V;
    struct engine e;
    struct kv_seq s;
    engine_open(&e, sc->base, p, isa, threads);
    seq_open(&e, &s, sc, i);
    float *out = malloc((size_t)sc->len[i] * V * sizeof *out);
    for (int pos = 0; pos < sc->len[i]; pos += chunk) {
        int n = sc->len[i] - pos < chunk ? sc->len[i] - pos : chunk;
        struct span span = { &s, pos, n, sc->tokens[i] + pos, &sc->set[i], n };
        const float *logits = forward_run(e.forward, &span, 1);
        memcpy(out + (size_t)pos * V, logits, (size_t)n * V * sizeof *out);
        kv_commit(e.kv, &s, sc->tokens[i], pos + n);
    }
    kv_close(e.kv, &s);
    engine_close(&e);
    return out;
}

/* All sequences together, sequence i in chunks of step[i]. */
static void run_together(const struct scene *sc, enum precision p, enum isa isa, int threads,
                         const int step[NSEQ], float *out[NSEQ])
{
    const size_t V = (size_t)sc->base->arch.V;
    struct engine e;
    struct kv_seq s[NSEQ];
    int pos[NSEQ] = { 0 };
    engine_open(&e, sc->base, p, isa, threads);
    for (int i = 0; i < NSEQ; i++) {
        seq_open(&e, &s[i], sc, i);
        out[i] = malloc((size_t)sc->len[i] * V * sizeof *out[i]);
    }
    for (;;) {
        struct span spans[NSEQ];
        int n = 0, who[NSEQ];
        for (int i = 0; i < NSEQ; i++) {
            int left = sc->len[i] - pos[i], rows = left < step[i] ? left : step[i];
            if (rows > 0) {
                who[n] = i;
                spans[n++] = (struct span){ &s[i], pos[i], rows, sc->tokens[i] + pos[i],
                                            &sc->set[i], rows };
            }
        }
        if (n == 0)
            break;
        const float *logits = forward_run(e.forward, spans, n);
        for (int k = 0; k < n; k++) {
            const int i = who[k];
            memcpy(out[i] + (size_t)pos[i] * V, logits, (size_t)spans[k].n * V * sizeof *logits);
            logits += (size_t)spans[k].n * V;
            pos[i] += spans[k].n;
            kv_commit(e.kv, &s[i], sc->tokens[i], pos[i]);
        }
    }
    for (int i = 0; i < NSEQ; i++)
        kv_close(e.kv, &s[i]);
    engine_close(&e);
}

/* `model` is a family, or a whole config.json with 320 tokens. */
static void scene_open(struct scene *sc, const char *model, const char *type, enum precision p)
{
    static const int len[NSEQ] = { 19, LONGEST, 34, 7 };
    if (model[0] == '{') {
        sc->base = support_base_config(model, type, p);
    } else {
        struct support_model m = support_model_default(model);
        m.window = strcmp(model, "mistral") == 0 ? 20 : 0;
        sc->base = support_base(&m, type, NULL, p);
    }
    make(&sc->made[0], &sc->base->arch, 9, 1);
    make(&sc->made[1], &sc->base->arch, 40, 2);
    const struct adapter *a = &sc->made[0].adapter, *b = &sc->made[1].adapter;
    sc->set[0] = (struct lora_set){ 0 };
    sc->set[1] = (struct lora_set){ 1, { { a, 1 } } };
    sc->set[2] = (struct lora_set){ 2, { { a, 0.5f }, { b, -1 } } };
    sc->set[3] = sc->set[1];
    for (int i = 0; i < NSEQ; i++) {
        sc->len[i] = len[i];
        for (int t = 0; t < len[i]; t++)
            sc->tokens[i][t] = (int32_t)((rnd(0.5f) + 0.5f) * (float)(sc->base->arch.V - 1));
    }
}

static void scene_close(struct scene *sc)
{
    unmake(&sc->made[0]);
    unmake(&sc->made[1]);
    base_free(sc->base);
}

static void same_bits(const struct scene *sc, int i, const float *a, const float *b,
                      const char *what)
{
    const size_t n = (size_t)sc->len[i] * (size_t)sc->base->arch.V;
    for (size_t k = 0; k < n; k++)
        if (f32_bits(a[k]) != f32_bits(b[k]))
            fail_msg("%s: sequence %d, row %zu: %.9g is not %.9g", what, i,
                     k / (size_t)sc->base->arch.V, (double)a[k], (double)b[k]);
}

/* --- tests ------------------------------------------------------------------------------------- */
static enum isa best_isa(void)
{
    enum isa isa = ISA_SCALAR;
    assert_int_equal(isa_select("auto", &isa, NULL), ERR_OK);
    return isa;
}

static void hold_promise(const char *family, const char *type, enum precision p)
{
    const enum isa isa = best_isa();
    struct scene sc;
    scene_open(&sc, family, type, p);
    float *want[NSEQ], *got[NSEQ];
    for (int i = 0; i < NSEQ; i++) {
        want[i] = run_alone(&sc, i, p, isa, 1, LONGEST);
        for (int k = 0; k < sc.len[i] * sc.base->arch.V; k++)
            assert_true(isfinite(want[i][k]));
    }
    static const int chunks[] = { 1, 3, 7, 16 };
    for (size_t c = 0; c < sizeof chunks / sizeof chunks[0]; c++) {
        float *out = run_alone(&sc, 1, p, isa, 1 + (int)c % 3, chunks[c]);
        same_bits(&sc, 1, want[1], out, "in chunks");
        free(out);
    }
    static const int steps[][NSEQ] = { { 1, 1, 1, 1 }, { 19, 75, 34, 7 }, { 5, 30, 1, 2 } };
    for (size_t c = 0; c < sizeof steps / sizeof steps[0]; c++) {
        run_together(&sc, p, isa, 1 + (int)c % 2, steps[c], got);
        for (int i = 0; i < NSEQ; i++) {
            same_bits(&sc, i, want[i], got[i], "in a batch");
            free(got[i]);
        }
    }
    static const char *const other[] = { "scalar", "avx2" };
    for (int k = 0; k < 2; k++) {
        enum isa isa2;
        if (isa_select(other[k], &isa2, NULL) != ERR_OK)
            continue;
        run_together(&sc, p, isa2, 2, steps[2], got);
        for (int i = 0; i < NSEQ; i++) {
            same_bits(&sc, i, want[i], got[i], other[k]);
            free(got[i]);
        }
    }
    for (int i = 0; i < NSEQ; i++)
        free(want[i]);
    scene_close(&sc);
}

static void llama_fast_logits_do_not_depend_on_their_company(void **state)
{
    (void)state;
    hold_promise("llama", "nf4", PREC_FAST);
}

static void llama_exact_logits_do_not_depend_on_their_company(void **state)
{
    (void)state;
    hold_promise("llama", "nf4", PREC_EXACT);
}

static void llama_f32_logits_do_not_depend_on_their_company(void **state)
{
    (void)state;
    hold_promise("llama", "f32", PREC_F32);
}

static void mistral_with_a_window_keeps_the_promise(void **state)
{
    (void)state;
    hold_promise("mistral", "nf4", PREC_EXACT);
}

static void qwen2_with_biases_keeps_the_promise(void **state)
{
    (void)state;
    hold_promise("qwen2", "nf4", PREC_FAST);
}

static void qwen3_with_head_norms_keeps_the_promise(void **state)
{
    (void)state;
    hold_promise("qwen3", "nf4", PREC_EXACT);
}

/* One model for each way in which families differ from Llama. */
static const char gpt2[] =
    "{\"model_type\":\"gpt2\",\"n_embd\":128,\"n_layer\":2,\"n_head\":4,\"n_positions\":128,"
    "\"vocab_size\":320}";
static const char neox[] =
    "{\"model_type\":\"gpt_neox\",\"hidden_size\":128,\"num_hidden_layers\":2,"
    "\"num_attention_heads\":4,\"intermediate_size\":192,\"max_position_embeddings\":128,"
    "\"vocab_size\":320,\"rotary_pct\":0.25}";
static const char bloom[] =
    "{\"model_type\":\"bloom\",\"hidden_size\":96,\"n_layer\":3,\"n_head\":6,"
    "\"vocab_size\":320}";

static const char chatglm[] =
    "{\"model_type\":\"chatglm\",\"hidden_size\":128,\"num_layers\":2,\"num_attention_heads\":4,"
    "\"multi_query_attention\":true,\"multi_query_group_num\":2,\"kv_channels\":32,"
    "\"ffn_hidden_size\":192,\"seq_length\":128,\"padded_vocab_size\":320,"
    "\"add_bias_linear\":false,\"add_qkv_bias\":true}";
static const char glm4[] =
    "{\"model_type\":\"glm4\",\"hidden_size\":128,\"num_hidden_layers\":2,"
    "\"num_attention_heads\":4,\"num_key_value_heads\":2,\"head_dim\":40,"
    "\"intermediate_size\":192,\"max_position_embeddings\":128,\"vocab_size\":320}";
static const char smollm3[] =
    "{\"model_type\":\"smollm3\",\"hidden_size\":128,\"num_hidden_layers\":3,"
    "\"num_attention_heads\":4,\"num_key_value_heads\":2,\"no_rope_layers\":[1,0,1],"
    "\"intermediate_size\":192,\"max_position_embeddings\":128,\"vocab_size\":320}";
static const char gemma2[] =
    "{\"model_type\":\"gemma2\",\"hidden_size\":128,\"num_hidden_layers\":2,"
    "\"num_attention_heads\":4,\"num_key_value_heads\":2,\"head_dim\":32,\"sliding_window\":20,"
    "\"intermediate_size\":192,\"max_position_embeddings\":128,\"vocab_size\":320,"
    "\"attn_logit_softcapping\":2.0,\"final_logit_softcapping\":3.0}";
static const char gemma3[] =
    "{\"model_type\":\"gemma3_text\",\"hidden_size\":128,\"num_hidden_layers\":3,"
    "\"num_attention_heads\":4,\"num_key_value_heads\":1,\"head_dim\":32,\"sliding_window\":20,"
    "\"sliding_window_pattern\":2,\"intermediate_size\":192,\"max_position_embeddings\":128,"
    "\"vocab_size\":320}";

/* Sequences on both sides of the original length, all turned by the long set. */
static const char phi3[] =
    "{\"model_type\":\"phi3\",\"hidden_size\":128,\"num_hidden_layers\":2,"
    "\"num_attention_heads\":4,\"num_key_value_heads\":2,\"intermediate_size\":192,"
    "\"max_position_embeddings\":128,\"original_max_position_embeddings\":16,\"vocab_size\":320,"
    "\"rope_scaling\":{\"type\":\"longrope\","
    "\"short_factor\":[1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1],"
    "\"long_factor\":[1,1.1,1.2,1.4,1.8,2,2.5,3,4,5,6,7,7.5,8,8,8]}}";

static void gpt2_with_learned_positions_keeps_the_promise(void **state)
{
    (void)state;
    hold_promise(gpt2, "nf4", PREC_FAST);
}

static void neox_with_parallel_residual_and_partial_rope_keeps_the_promise(void **state)
{
    (void)state;
    hold_promise(neox, "nf4", PREC_EXACT);
}

static void bloom_with_slopes_and_rows_that_are_no_blocks_keeps_the_promise(void **state)
{
    (void)state;
    hold_promise(bloom, "nf4", PREC_EXACT);
}

static void chatglm_with_pairs_and_two_joined_products_keeps_the_promise(void **state)
{
    (void)state;
    hold_promise(chatglm, "nf4", PREC_FAST);
}

static void glm4_with_norms_after_its_blocks_keeps_the_promise(void **state)
{
    (void)state;
    hold_promise(glm4, "nf4", PREC_EXACT);
}

static void smollm3_without_rope_in_a_layer_keeps_the_promise(void **state)
{
    (void)state;
    hold_promise(smollm3, "nf4", PREC_EXACT);
}

static void gemma2_with_capped_scores_and_windows_keeps_the_promise(void **state)
{
    (void)state;
    hold_promise(gemma2, "nf4", PREC_EXACT);
}

static void gemma3_with_two_ropes_keeps_the_promise(void **state)
{
    (void)state;
    hold_promise(gemma3, "nf4", PREC_FAST);
}

static void phi3_with_longrope_keeps_the_promise(void **state)
{
    (void)state;
    hold_promise(phi3, "nf4", PREC_EXACT);
}

/* Rows whose logits nobody wants are cut off in the last layer; the others must not notice. */
static void ask_for_fewer(const char *model)
{
    const enum isa isa = best_isa();
    struct scene sc;
    scene_open(&sc, model, "nf4", PREC_EXACT);
    const size_t V = (size_t)sc.base->arch.V;
    static const int nlogits[NSEQ] = { 1, 3, 0, 7 };
    struct span spans[NSEQ];
    struct kv_seq s[NSEQ];
    struct engine e;
    engine_open(&e, sc.base, PREC_EXACT, isa, 2);
    for (int i = 0; i < NSEQ; i++) {
        seq_open(&e, &s[i], &sc, i);
        spans[i] = (struct span){ &s[i], 0, sc.len[i], sc.tokens[i], &sc.set[i], nlogits[i] };
    }
    const float *logits = forward_run(e.forward, spans, NSEQ);
    for (int i = 0; i < NSEQ; i++) {
        float *want = run_alone(&sc, i, PREC_EXACT, isa, 1, LONGEST);
        const size_t n = (size_t)nlogits[i] * V;
        assert_memory_equal(want + (size_t)sc.len[i] * V - n, logits, n * sizeof *want);
        logits += n;
        free(want);
    }
    /* None at all: only the keys and values are wanted, and the next step finds them. */
    const int before = sc.len[0] - 4;
    kv_close(e.kv, &s[0]);
    kv_forget(e.kv);
    seq_open(&e, &s[0], &sc, 0);
    spans[0] = (struct span){ &s[0], 0, before, sc.tokens[0], &sc.set[0], 0 };
    forward_run(e.forward, spans, 1);
    kv_commit(e.kv, &s[0], sc.tokens[0], before);
    spans[0] = (struct span){ &s[0], before, 4, sc.tokens[0] + before, &sc.set[0], 1 };
    logits = forward_run(e.forward, spans, 1);
    float *want = run_alone(&sc, 0, PREC_EXACT, isa, 1, LONGEST);
    assert_memory_equal(want + (size_t)(sc.len[0] - 1) * V, logits, V * sizeof *want);
    free(want);
    for (int i = 0; i < NSEQ; i++)
        kv_close(e.kv, &s[i]);
    engine_close(&e);
    scene_close(&sc);
}

static void asking_for_fewer_logits_changes_none_of_them(void **state)
{
    (void)state;
    ask_for_fewer("qwen3");
    ask_for_fewer(neox); /* q, k and v in one product, the residual stream read twice */
    ask_for_fewer(gemma3); /* two angles per row, the last layer with a window */
}

/* An adapter must matter: a batch in which nobody's did would pass everything above. */
static void adapters_change_the_logits_of_their_rows(void **state)
{
    (void)state;
    struct scene sc;
    scene_open(&sc, "llama", "nf4", PREC_EXACT);
    float *with = run_alone(&sc, 1, PREC_EXACT, best_isa(), 1, LONGEST);
    sc.set[1] = sc.set[0];
    float *without = run_alone(&sc, 1, PREC_EXACT, best_isa(), 1, LONGEST);
    double diff = 0, norm = 0;
    for (int k = 0; k < sc.len[1] * sc.base->arch.V; k++) {
        diff += pow(with[k] - without[k], 2);
        norm += pow(without[k], 2);
    }
    assert_true(diff > 1e-4 * norm);
    free(with);
    free(without);
    scene_close(&sc);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(llama_fast_logits_do_not_depend_on_their_company),
        cmocka_unit_test(llama_exact_logits_do_not_depend_on_their_company),
        cmocka_unit_test(llama_f32_logits_do_not_depend_on_their_company),
        cmocka_unit_test(mistral_with_a_window_keeps_the_promise),
        cmocka_unit_test(qwen2_with_biases_keeps_the_promise),
        cmocka_unit_test(qwen3_with_head_norms_keeps_the_promise),
        cmocka_unit_test(gpt2_with_learned_positions_keeps_the_promise),
        cmocka_unit_test(neox_with_parallel_residual_and_partial_rope_keeps_the_promise),
        cmocka_unit_test(bloom_with_slopes_and_rows_that_are_no_blocks_keeps_the_promise),
        cmocka_unit_test(chatglm_with_pairs_and_two_joined_products_keeps_the_promise),
        cmocka_unit_test(glm4_with_norms_after_its_blocks_keeps_the_promise),
        cmocka_unit_test(smollm3_without_rope_in_a_layer_keeps_the_promise),
        cmocka_unit_test(gemma2_with_capped_scores_and_windows_keeps_the_promise),
        cmocka_unit_test(gemma3_with_two_ropes_keeps_the_promise),
        cmocka_unit_test(phi3_with_longrope_keeps_the_promise),
        cmocka_unit_test(asking_for_fewer_logits_changes_none_of_them),
        cmocka_unit_test(adapters_change_the_logits_of_their_rows),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
