/* test_rope.c - rotary positions: angles, and every kind of scaling against transformers' numbers. */
#include "engine/arch_int.h"
#include "engine/ops.h"
#include "engine/rope.h"
#include "engine/util.h"
#include "server/session.h"
#include "tests/support_model.h"

#include <jansson.h>
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

/* --- angles ------------------------------------------------------------------------------------ */
static void rope_rotates_pairs_by_position_times_frequency(void **state)
{
    (void)state;
    struct arch a = { .rot = 80, .max_positions = 131072, .rope_theta = 10000 };
    struct rope *r;
    assert_int_equal(rope_create(&a, a.max_positions, &r, NULL), ERR_OK);
    static const int positions[] = { 0, 1, 255, 256, 257, 4095, 65536, 131071 };
    for (size_t p = 0; p < sizeof positions / sizeof positions[0]; p++) {
        float c[40], s[40], x[80];
        rope_angles(r, positions[p], c, s);
        for (int i = 0; i < 80; i++)
            x[i] = (float)(i % 7) - 3;
        ops_scalar.rope(x, c, s, 80);
        for (int i = 0; i < 40; i++) {
            double t = positions[p] * pow(10000, -2.0 * i / 80);
            assert_true(fabs(c[i] - cos(t)) < 4e-8 && fabs(s[i] - sin(t)) < 4e-8);
            double x0 = i % 7 - 3, x1 = (i + 40) % 7 - 3;
            assert_true(fabs(x[i] - (x0 * cos(t) - x1 * sin(t))) < 1e-6);
            assert_true(fabs(x[i + 40] - (x1 * cos(t) + x0 * sin(t))) < 1e-6);
        }
    }
    rope_destroy(r);
}

/* Llama 3's rule by wave length: kept below 1/4 of the original context, slowed down above it
 * altogether, a blend between. */
static void llama3_scaling_slows_long_waves_only(void **state)
{
    (void)state;
    const double pi = acos(-1);
    struct arch a = { .rot = 128, .max_positions = 512, .rope_theta = 500000,
                      .rope_scaling = ROPE_LLAMA3, .rope_factor = 8, .rope_low_freq = 1,
                      .rope_high_freq = 4, .rope_original_max = 8192 };
    int kept = 0, slowed = 0, blended = 0;
    for (int i = 0; i < 64; i++) {
        double f = pow(500000, -2.0 * i / 128), wave = 2 * pi / f, got = rope_frequency(&a, 512, i);
        if (wave < 8192 / 4.0) {
            assert_true(fabs(got - f) < 1e-15);
            kept++;
        } else if (wave > 8192) {
            assert_true(fabs(got - f / 8) < 1e-15);
            slowed++;
        } else {
            assert_true(got < f && got > f / 8);
            blended++;
        }
    }
    assert_true(kept > 0 && slowed > 0 && blended > 0);
    a.rope_scaling = ROPE_LINEAR;
    assert_true(fabs(rope_frequency(&a, 512, 5) - pow(500000, -10.0 / 128) / 8) < 1e-15);
}

/* --- scaling ----------------------------------------------------------------------------------- */

static void check_case(const json_t *c, size_t number)
{
    struct arch a, kept;
    struct err err = { 0 };
    char *config = json_dumps(json_object_get(c, "config"), 0);
    if (arch_from_config(config, NULL, &a, &err) != ERR_OK)
        fail_msg("case %zu: %s", number, err.msg);
    free(config);
    char *text = arch_to_json(&a);
    if (arch_from_json(text, &kept, &err) != ERR_OK)
        fail_msg("case %zu: %s", number, err.msg);
    free(text);
    const int context = (int)json_integer_value(json_object_get(c, "context"));
    const double amplitude = json_number_value(json_object_get(c, "amplitude"));
    const json_t *freqs = json_object_get(c, "inv_freq");
    struct rope *r;
    float cosine[64], sine[64];
    assert_int_equal(json_array_size(freqs), a.rot / 2);
    assert_int_equal(json_integer_value(json_object_get(c, "max_positions")), a.max_positions);
    assert_int_equal(rope_create(&kept, context, &r, &err), ERR_OK);
    rope_angles(r, 17, cosine, sine);
    for (int i = 0; i < a.rot / 2; i++) {
        const double want = json_number_value(json_array_get(freqs, (size_t)i));
        const double got = rope_frequency(&a, context, i);
        if (!(fabs(got / want - 1) < 3e-6)) /* they compute in fp32 */
            fail_msg("case %zu: frequency %d is %.9g, not %.9g", number, i, got, want);
        assert_true(fabs((double)cosine[i] - amplitude * cos(17 * got)) < 3e-7);
        assert_true(fabs((double)sine[i] - amplitude * sin(17 * got)) < 3e-7);
    }
    rope_destroy(r);
}

static void every_kind_of_scaling_gives_transformers_frequencies(void **state)
{
    (void)state;
    json_t *cases = json_load_file("tests/data/rope_cases.json", 0, NULL);
    assert_true(json_array_size(cases) >= 15);
    for (size_t i = 0; i < json_array_size(cases); i++)
        check_case(json_array_get(cases, i), i);
    json_decref(cases);
}

#define MODEL                                                                                       \
    "{\"hidden_size\":64,\"intermediate_size\":96,\"num_hidden_layers\":2,\"num_attention_heads\":4,"   \
    "\"num_key_value_heads\":2,\"vocab_size\":320,\"rms_norm_eps\":1e-5,\"max_position_embeddings\":128,"
#define EIGHT(x) "[" x "," x "," x "," x "," x "," x "," x "," x "]"

static const char plain[] = MODEL "\"model_type\":\"llama\"}";
/* Nothing up to 32 positions, half as fast beyond. */
static const char two_sets[] =
    MODEL "\"model_type\":\"llama\",\"rope_scaling\":{\"type\":\"longrope\",\"short_factor\":" EIGHT("1")
          ",\"long_factor\":" EIGHT("2") ",\"original_max_position_embeddings\":32,"
          "\"attention_factor\":1}}";
static const char halved[] =
    MODEL "\"model_type\":\"llama\",\"rope_scaling\":{\"type\":\"linear\",\"factor\":2}}";
static const char louder[] =
    MODEL "\"model_type\":\"llama\",\"rope_scaling\":{\"type\":\"longrope\",\"short_factor\":" EIGHT("1")
          ",\"long_factor\":" EIGHT("1") ",\"attention_factor\":2}}";

enum { N = 24, V = 320 };

static int keep(void *ud, int pos, int n, const float *logits, struct err *err)
{
    (void)err;
    memcpy((float *)ud + (size_t)pos * V, logits, (size_t)n * V * sizeof *logits);
    return ERR_OK;
}

/* Logits of N tokens where a sequence might get `context` positions; closes the base. */
static float *logits_in(struct base *base, int context)
{
    struct session s = { .base = base, .compute.precision = PREC_F32 };
    struct session_runner *r;
    struct err err = { 0 };
    int32_t tokens[N];
    float *logits = malloc(N * V * sizeof *logits);
    for (int i = 0; i < N; i++)
        tokens[i] = (i * 97 + 31) % V;
    assert_int_equal(isa_select("auto", &s.compute.isa, &err), ERR_OK);
    assert_int_equal(pool_create(2, &s.compute.pool, &err), ERR_OK);
    assert_int_equal(session_runner_open(&s, context, &r, &err), ERR_OK);
    assert_int_equal(session_run(r, tokens, N, keep, logits, &err), ERR_OK);
    session_runner_close(r);
    session_close(&s);
    return logits;
}

static struct base *base_of(const char *config)
{
    return support_base_config(config, "f32", PREC_F32);
}

static void the_context_chooses_between_longrope_s_two_sets(void **state)
{
    (void)state;
    const size_t bytes = (size_t)N * V * sizeof(float);
    float *as_is = logits_in(base_of(plain), 32), *slow = logits_in(base_of(halved), 32);
    float *in32 = logits_in(base_of(two_sets), 32), *in33 = logits_in(base_of(two_sets), 33);
    assert_memory_equal(as_is, in32, bytes);
    assert_memory_equal(slow, in33, bytes);
    assert_memory_not_equal(in32, in33, bytes);
    free(as_is);
    free(slow);
    free(in32);
    free(in33);
}

/* cos and sin times 2, of queries and of keys: scores times 4. */
static void the_attention_factor_counts_twice_in_scores(void **state)
{
    (void)state;
    struct base *b = base_of(plain);
    b->arch.attn_scale = 4 / sqrt(b->arch.hd);
    float *want = logits_in(b, N), *got = logits_in(base_of(louder), N);
    assert_memory_equal(want, got, (size_t)N * V * sizeof *got);
    free(want);
    free(got);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(rope_rotates_pairs_by_position_times_frequency),
        cmocka_unit_test(llama3_scaling_slows_long_waves_only),
        cmocka_unit_test(every_kind_of_scaling_gives_transformers_frequencies),
        cmocka_unit_test(the_context_chooses_between_longrope_s_two_sets),
        cmocka_unit_test(the_attention_factor_counts_twice_in_scores),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
