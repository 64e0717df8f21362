/* test_quantize.c - `lorad quantize` writes what bitsandbytes writes, and import packs the same codes.
 *
 * References: checkpoints and tensors quantised by bitsandbytes itself (golden/). */
#include "engine/nf4.h"
#include "engine/safetensors.h"
#include "engine/util.h"
#include "server/cmd.h"
#include "tests/support_model.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <cmocka.h>

#define COUNT(t) (sizeof(t) / sizeof(t)[0])

struct dir {
    char path[64];
};

static int setup(void **state)
{
    struct dir *d = malloc(sizeof *d);
    support_tmpdir(d->path);
    *state = d;
    return 0;
}

static int teardown(void **state)
{
    struct dir *d = *state;
    support_remove(d->path);
    free(d);
    return 0;
}

static struct st_file *open_file(const char *path)
{
    struct st_file *f = NULL;
    struct err err = { 0 };
    if (st_open(path, &f, &err) != ERR_OK)
        fail_msg("%s", err.msg);
    return f;
}

static int quantize(const char *in, const char *out, const char *type, bool nested)
{
    char *argv[] = { "quantize", (char *)in, (char *)out, "--type", (char *)type, "--double", NULL };
    return cmd_quantize(nested ? 6 : 5, argv);
}

static void assert_same(const struct st_tensor *got, const struct st_tensor *want)
{
    if (got == NULL)
        fail_msg("%s is missing", want->name);
    if (got->bytes != want->bytes || strcmp(got->dtype_name, want->dtype_name) != 0 ||
        got->ndim != want->ndim || memcmp(got->shape, want->shape, sizeof got->shape) != 0 ||
        memcmp(got->data, want->data, want->bytes) != 0)
        fail_msg("%s differs from %s", got->name, want->name);
}

/* Write a copy of `in` whose F32 tensors are rounded to bf16. */
static void round_to_bf16(const struct st_file *in, const char *path)
{
    struct st_writer *w;
    struct err err = { 0 };
    assert_int_equal(st_writer_open(path, false, &w, &err), ERR_OK);
    for (size_t i = 0; i < in->ntensors; i++)
        assert_int_equal(st_writer_tensor(w, in->tensors[i].name, "BF16", in->tensors[i].ndim,
                                          in->tensors[i].shape, in->tensors[i].bytes / 2, &err), ERR_OK);
    assert_int_equal(st_writer_begin(w, &err), ERR_OK);
    for (size_t i = 0; i < in->ntensors; i++)
        for (size_t k = 0; k < st_count(&in->tensors[i]); k++) {
            float v;
            assert_int_equal(st_f32(&in->tensors[i], k, 1, &v, &err), ERR_OK);
            uint16_t h = f32_to_bf16(v);
            assert_int_equal(st_writer_data(w, &h, 2, &err), ERR_OK);
        }
    assert_int_equal(st_writer_commit(w, &err), ERR_OK);
}

/* Every quantised tensor of the reference's checkpoint, with its scales, maps and JSON. */
static void compare_with_checkpoint(const char *in, const char *reference, const char *out)
{
    assert_int_equal(quantize(in, out, "nf4", true), 0);
    struct st_file *got = open_file(out), *want = open_file(reference);
    size_t compared = 0;
    for (size_t i = 0; i < want->ntensors; i++) {
        const struct st_tensor *t = &want->tensors[i];
        /* the reference leaves embedding and head alone, this command does not */
        if (strstr(t->name, "_proj.") == NULL)
            continue;
        assert_same(st_find(got, t->name), t);
        compared++;
    }
    assert_true(compared >= 2 * 7 * 6);
    st_close(got);
    st_close(want);
}

static void a_quantised_f32_checkpoint_equals_the_reference_byte_for_byte(void **state)
{
    const struct dir *d = *state;
    const char *p = support_shared("golden/models/tiny-llama/model.safetensors");
    if (p == NULL)
        skip();
    char *in = strdup(p), *out = path_join(d->path, "out");
    compare_with_checkpoint(in, support_shared("golden/models/tiny-llama-bnb-4bit/model.safetensors"),
                            out);
    free(in);
    free(out);
}

static void a_quantised_bf16_checkpoint_equals_the_reference_byte_for_byte(void **state)
{
    const struct dir *d = *state;
    const char *p = support_shared("golden/models/tiny-qwen2/model.safetensors");
    if (p == NULL)
        skip();
    char *in = path_join(d->path, "in"), *out = path_join(d->path, "out");
    struct st_file *f = open_file(p);
    round_to_bf16(f, in);
    compare_with_checkpoint(in, support_shared("golden/models/tiny-qwen2-bnb-4bit/model.safetensors"),
                            out);
    st_close(f);
    free(in);
    free(out);
}

/* One golden file: a tensor `weight` and what the reference made of it. */
static void compare_golden(const char *in, const char *out, bool nested, bool exact_codes)
{
    assert_int_equal(quantize(in, out, "nf4", nested), 0);
    struct st_file *got = open_file(out), *want = open_file(in);
    assert_same(st_find(got, "weight"), st_find(want, exact_codes ? "packed" : "packed_cuda_rule"));
    assert_same(st_find(got, "weight.quant_map"), st_find(want, "quant_map"));
    if (nested) {
        assert_same(st_find(got, "weight.absmax"), st_find(want, "nested_codes"));
        assert_same(st_find(got, "weight.nested_absmax"), st_find(want, "nested_absmax"));
        assert_same(st_find(got, "weight.nested_quant_map"), st_find(want, "nested_quant_map"));
    } else {
        assert_same(st_find(got, "weight.absmax"), st_find(want, "absmax"));
        assert_null(st_find(got, "weight.nested_absmax"));
    }
    st_close(got);
    st_close(want);
}

static void golden_tensors_get_the_reference_s_codes_and_scales(void **state)
{
    static const char *const names[] = {
        "nf4_normal_64x64", "nf4_normal_96x160", "nf4_outliers_64x128", "nf4_boundaries_1x64",
        "nf4_constant_32x64", "nf4_negconst_32x64", "nf4_nested2_300x80", "nf4_zeroblocks_64x128",
    };
    const struct dir *d = *state;
    char *out = path_join(d->path, "out");
    for (size_t i = 0; i < COUNT(names); i++)
        for (int nested = 0; nested < 2; nested++) {
            char rel[100];
            snprintf(rel, sizeof rel, "golden/quant/%s.safetensors", names[i]);
            const char *in = support_shared(rel);
            if (in == NULL) {
                free(out);
                skip();
            }
            compare_golden(in, out, nested, true);
        }
    free(out);
}

/* Sizes that are no multiple of 64, or odd: the last block is short. */
static void tails_follow_the_rule_of_cuda(void **state)
{
    static const char *const names[] = { "nf4_tail_50x30", "nf4_tail_97x33" };
    const struct dir *d = *state;
    char *out = path_join(d->path, "out");
    for (size_t i = 0; i < COUNT(names); i++) {
        char rel[100];
        snprintf(rel, sizeof rel, "golden/quant/%s.safetensors", names[i]);
        const char *in = support_shared(rel);
        if (in == NULL) {
            free(out);
            skip();
        }
        compare_golden(in, out, true, false);
    }
    free(out);
}

/* FP4 has two codes for zero, so values are compared. */
static void fp4_gives_the_reference_s_values(void **state)
{
    static const char *const names[] = { "fp4_normal_64x64", "fp4_tail_97x33", "fp4_zeroblocks_64x128" };
    const struct dir *d = *state;
    char *out = path_join(d->path, "out");
    for (size_t i = 0; i < COUNT(names); i++) {
        char rel[100];
        snprintf(rel, sizeof rel, "golden/quant/%s.safetensors", names[i]);
        const char *in = support_shared(rel);
        if (in == NULL) {
            free(out);
            skip();
        }
        assert_int_equal(quantize(in, out, "fp4", false), 0);
        struct st_file *got = open_file(out), *want = open_file(in);
        const struct st_tensor *value = st_find(want, "dequant_plain");
        size_t n = st_count(value);
        float *a = malloc(n * 4), *b = malloc(n * 4), *absmax = malloc(nf4_blocks(n) * 4);
        struct err err = { 0 };
        assert_int_equal(st_f32(st_find(got, "weight.absmax"), 0, nf4_blocks(n), absmax, &err), 0);
        assert_int_equal(st_f32(value, 0, n, b, &err), 0);
        q4_dequantize(Q4_FP4, st_find(got, "weight")->data, absmax, n, a);
        for (size_t k = 0; k < n; k++)
            assert_true(a[k] == b[k]);
        assert_non_null(st_find(got, "weight.quant_state.bitsandbytes__fp4"));
        free(a);
        free(b);
        free(absmax);
        st_close(got);
        st_close(want);
    }
    free(out);
}

static void what_is_no_float_matrix_is_copied_and_nan_is_refused(void **state)
{
    const struct dir *d = *state;
    char *in = path_join(d->path, "in"), *out = path_join(d->path, "out");
    const float v[4] = { 1, 2, 3, 4 };
    float bad[4] = { 1, 2, 0, 4 };
    struct err err = { 0 };
    for (int nan = 0; nan < 2; nan++) {
        struct st_writer *w;
        bad[2] = nan ? bits_f32(0x7fc00000) : 3;
        assert_int_equal(st_writer_open(in, false, &w, &err), 0);
        assert_int_equal(st_writer_meta(w, "key", "value", 5, &err), 0);
        assert_int_equal(st_writer_tensor(w, "vector", "F32", 1, (const int64_t[]){ 4 }, 16, &err), 0);
        assert_int_equal(st_writer_tensor(w, "ints", "I32", 2, (const int64_t[]){ 2, 2 }, 16, &err), 0);
        assert_int_equal(st_writer_tensor(w, "matrix", "F32", 2, (const int64_t[]){ 2, 2 }, 16, &err), 0);
        assert_int_equal(st_writer_begin(w, &err), 0);
        assert_int_equal(st_writer_data(w, v, 16, &err), 0);
        assert_int_equal(st_writer_data(w, v, 16, &err), 0);
        assert_int_equal(st_writer_data(w, bad, 16, &err), 0);
        assert_int_equal(st_writer_commit(w, &err), 0);
        unlink(out);
        assert_int_equal(quantize(in, out, "nf4", false), nan);
        assert_int_equal(access(out, F_OK), nan ? -1 : 0);
        if (nan)
            break;
        struct st_file *f = open_file(out);
        assert_memory_equal(st_find(f, "vector")->data, v, 16);
        assert_string_equal(st_find(f, "ints")->dtype_name, "I32");
        assert_int_equal(st_find(f, "matrix")->bytes, 2);
        assert_string_equal(st_meta(f, "key"), "value");
        st_close(f);
    }
    assert_int_equal(quantize(in, out, "nf5", false), 2);
    assert_int_equal(quantize("/nonexistent", out, "nf4", false), 1);
    free(in);
    free(out);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(
            a_quantised_f32_checkpoint_equals_the_reference_byte_for_byte, setup, teardown),
        cmocka_unit_test_setup_teardown(
            a_quantised_bf16_checkpoint_equals_the_reference_byte_for_byte, setup, teardown),
        cmocka_unit_test_setup_teardown(golden_tensors_get_the_reference_s_codes_and_scales, setup,
                                        teardown),
        cmocka_unit_test_setup_teardown(tails_follow_the_rule_of_cuda, setup, teardown),
        cmocka_unit_test_setup_teardown(fp4_gives_the_reference_s_values, setup, teardown),
        cmocka_unit_test_setup_teardown(what_is_no_float_matrix_is_copied_and_nan_is_refused, setup,
                                        teardown),
    };
    return cmocka_run_group_tests_name("quantize", tests, NULL, NULL);
}
