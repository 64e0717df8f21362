/* test_export.c - AdaLoRA as plain LoRA: the change stays, the scaling comes back to the last bit, what
 * cannot be said is refused by name. */
#include "engine/delta.h"
#include "engine/export.h"
#include "tests/support_model.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

static char path[] = "model.layers.0.self_attn.q_proj";
static char config[] = "{}";

/* One module of 2 inputs, 2 outputs. */
static struct adapter_src one(struct adapter_src_module *m, int rank, double scaling, enum dtype t,
                              const void *A, const void *B, const void *E)
{
    *m = (struct adapter_src_module){ .module = MOD_Q, .path = path, .rank = rank, .init_rank = rank,
                                      .in = 2, .out = 2, .scaling = scaling, .dtype = t, .A = A,
                                      .B = B, .E = E };
    return (struct adapter_src){ .method = E ? METHOD_ADALORA : METHOD_LORA, .nmodules = 1,
                                 .modules = m, .config = config, .rank_max = rank, .rank_min = rank,
                                 .params = (uint64_t)rank * (E ? 5 : 4) };
}

static void singular_values_go_into_b_column_by_column(void **state)
{
    (void)state;
    const float A[] = { 1, 2, 3, 4 }, B[] = { 5, 6, 7, 8 }, E[] = { 0.5f, -3 };
    const float want[] = { 2.5f, -18, 3.5f, -24 };
    struct adapter_src_module m;
    struct adapter_src a = one(&m, 2, 0.25, DT_F32, A, B, E), *lora = NULL;
    assert_int_equal(export_lora(&a, &lora, NULL), ERR_OK);
    assert_int_equal(lora->method, METHOD_LORA);
    assert_null(lora->modules[0].E);
    assert_memory_equal(lora->modules[0].A, A, sizeof A);
    assert_memory_equal(lora->modules[0].B, want, sizeof want);
    assert_true(lora->modules[0].alpha == 0.5);
    adapter_src_free(lora);
}

static void a_16_bit_source_is_folded_without_any_rounding(void **state)
{
    (void)state;
    /* the longest significands: 2047 * 2047 / 2^20 needs 22 bits, which F32 has */
    const uint16_t h = f32_to_f16(2047.0f / 1024), A[] = { h, h }, B[] = { h, h }, E[] = { h };
    struct adapter_src_module m;
    struct adapter_src a = one(&m, 1, 2, DT_F16, A, B, E), *lora = NULL;
    assert_int_equal(export_lora(&a, &lora, NULL), ERR_OK);
    float b;
    memcpy(&b, lora->modules[0].B, sizeof b);
    assert_true((double)b == 2047.0 * 2047.0 / 1048576.0);
    adapter_src_free(lora);
}

static void alpha_over_rank_is_the_scaling_to_the_last_bit(void **state)
{
    (void)state;
    const float A[128] = { 1 }, B[128] = { 1 }, E[64] = { 1 };
    int folded = 0;
    for (int init_r = 1; init_r <= 64; init_r++)
        for (int rank = 1; rank <= init_r; rank++) {
            const double scaling = 32 / (init_r + 1e-5);
            struct adapter_src_module m;
            struct adapter_src a = one(&m, rank, scaling, DT_F32, A, B, E), *lora = NULL;
            assert_int_equal(export_lora(&a, &lora, NULL), ERR_OK);
            const struct adapter_src_module *to = &lora->modules[0];
            assert_true(to->alpha / rank == to->scaling);
            if (to->scaling == scaling) {
                assert_true(*(const float *)to->B == 1.0f);
            } else { /* no alpha does it: B has the scaling */
                assert_true(to->scaling == 1.0);
                assert_true(*(const float *)to->B == (float)scaling);
                folded++;
            }
            adapter_src_free(lora);
        }
    assert_true(folded < 64 * 65 / 2 / 2);
}

static void the_demos_adalora_reloads_as_the_same_change(void **state)
{
    (void)state;
    struct base_import_opts o = { .type = "f32" };
    struct base *base = NULL;
    struct adapter_src *a = NULL, *lora = NULL, *again = NULL;
    struct delta d;
    struct err err = { 0 };
    char tmp[64], file[96];
    support_tmpdir(tmp);
    snprintf(file, sizeof file, "%s/m.base", tmp);
    if (base_import("examples/demo-base", file, &o, &err) != ERR_OK ||
        base_load(file, PREC_F32, false, &base, &err) != ERR_OK ||
        peft_load_dir(&base->arch, "examples/demo-base/adapters/whitman", &a, &err) != ERR_OK ||
        export_lora(a, &lora, &err) != ERR_OK)
        fail_msg("%s", err.msg);
    support_write_file(tmp, "adapter_config.json", lora->config, lora->config_len);
    snprintf(file, sizeof file, "%s/adapter_model.safetensors", tmp);
    if (peft_write_weights(lora, file, &err) != ERR_OK ||
        peft_load_dir(&base->arch, tmp, &again, &err) != ERR_OK ||
        delta_compare(a, again, &d, &err) != ERR_OK)
        fail_msg("%s", err.msg);
    assert_memory_equal(again->hash, lora->hash, 32); /* scalings included */
    assert_true(d.all.diff < 1e-7 * d.all.norm[0]);
    assert_true(d.all.rank[0] == d.all.rank[1]);
    delta_free(&d);
    adapter_src_free(again);
    adapter_src_free(lora);
    adapter_src_free(a);
    base_free(base);
    support_remove(tmp);
}

static void what_other_forms_cannot_say_is_refused_by_name(void **state)
{
    (void)state;
    const float A[] = { 1, 2 }, B[] = { 3e38f, 1 }, E[] = { 10 };
    struct arch arch = { .family = "bloom", .L = 1 };
    struct adapter_src_module m;
    struct adapter_src a = one(&m, 1, 1, DT_F32, A, B, E), *lora = NULL;
    struct err err = { 0 };
    assert_int_equal(export_lora(&a, &lora, &err), ERR_INVALID);
    assert_non_null(strstr(err.msg, path));
    err_clear(&err);
    assert_int_equal(export_gguf(&arch, &a, "/nowhere/x.gguf", &err), ERR_INVALID);
    assert_non_null(strstr(err.msg, "bloom"));
    err_clear(&err);
    a = one(&m, 0, 1, DT_F32, NULL, NULL, E);
    assert_int_equal(export_lora(&a, &lora, &err), ERR_INVALID);
    assert_non_null(strstr(err.msg, "rank 0"));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(singular_values_go_into_b_column_by_column),
        cmocka_unit_test(a_16_bit_source_is_folded_without_any_rounding),
        cmocka_unit_test(alpha_over_rank_is_the_scaling_to_the_last_bit),
        cmocka_unit_test(the_demos_adalora_reloads_as_the_same_change),
        cmocka_unit_test(what_other_forms_cannot_say_is_refused_by_name),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
