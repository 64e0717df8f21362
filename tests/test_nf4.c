/* test_nf4.c - 4-bit quantisation against vectors that bitsandbytes made, and the P16 layout. */
#include "engine/nf4.h"
#include "engine/num.h"
#include "engine/safetensors.h"
#include "engine/util.h"

#include <jansson.h>
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

/* --- reference files --------------------------------------------------------------------- */

static char *shared_path(const char *file)
{
    const char *dir = getenv("LORAD_SHARED");
    char *path = path_join(dir != NULL ? dir : "../shared", file);
    assert_non_null(path);
    if (!file_exists(path)) {
        print_message("SKIPPED: reference file %s is missing\n", path);
        free(path);
        skip();
    }
    return path;
}

static struct st_file *open_golden(const char *name)
{
    char file[128];
    snprintf(file, sizeof file, "golden/quant/%s.safetensors", name);
    char *path = shared_path(file);
    struct st_file *f;
    struct err err = { 0 };
    if (st_open(path, &f, &err) != ERR_OK)
        fail_msg("%s", err.msg);
    free(path);
    return f;
}

/* Tensor `name` + `suffix`, widened; free() it. */
static float *floats(const struct st_file *f, const char *name, const char *suffix, size_t *ret_n)
{
    char full[64];
    snprintf(full, sizeof full, "%s%s", name, suffix);
    const struct st_tensor *t = st_find(f, full);
    assert_non_null(t);
    *ret_n = st_count(t);
    float *ret = malloc(*ret_n * sizeof *ret);
    assert_non_null(ret);
    assert_int_equal(st_f32(t, 0, *ret_n, ret, NULL), ERR_OK);
    return ret;
}

static const uint8_t *bytes(const struct st_file *f, const char *name, const char *suffix, size_t n)
{
    char full[64];
    snprintf(full, sizeof full, "%s%s", name, suffix);
    const struct st_tensor *t = st_find(f, full);
    assert_non_null(t);
    assert_int_equal(t->bytes, n);
    return t->data;
}

static void assert_same_floats(const float *got, const float *want, size_t n, const char *what)
{
    for (size_t i = 0; i < n; i++)
        if (got[i] != want[i])
            fail_msg("%s[%zu] is %.9g, not %.9g", what, i, (double)got[i], (double)want[i]);
}

/* --- code books -------------------------------------------------------------------------- */

static void assert_book(const json_t *book, const char *name, const float *table, size_t n)
{
    const json_t *hex = json_object_get(book, name);
    assert_int_equal(json_array_size(hex), n);
    for (size_t i = 0; i < n; i++) {
        uint32_t want = (uint32_t)strtoul(json_string_value(json_array_get(hex, i)), NULL, 16);
        if (want != f32_bits(table[i]) && !(want << 1 == 0 && table[i] == 0.0f))
            fail_msg("%s[%zu] is %08x, not %08x", name, i, f32_bits(table[i]), want);
    }
}

static void code_books_equal_the_reference_bit_for_bit(void **state)
{
    (void)state;
    char *path = shared_path("golden/quant/codebooks.json");
    json_t *book = json_load_file(path, 0, NULL);
    assert_non_null(book);
    assert_book(book, "nf4_hex", nf4_code, 16);
    assert_book(book, "fp4_hex", fp4_code, 16);
    assert_book(book, "dynamic8_hex", nf4_dynamic8, 256);
    json_decref(book);
    free(path);
}

/* --- quantisation ------------------------------------------------------------------------ */

static const char *const nf4_files[] = {
    "nf4_boundaries_1x64", "nf4_constant_32x64",    "nf4_negconst_32x64",  "nf4_nested2_300x80",
    "nf4_normal_64x64",    "nf4_normal_96x160",     "nf4_outliers_64x128", "nf4_tail_50x30",
    "nf4_tail_97x33",      "nf4_zeroblocks_64x128",
};
static const char *const fp4_files[] = { "fp4_normal_64x64", "fp4_tail_97x33",
                                         "fp4_zeroblocks_64x128" };

enum { NF4_FILES = sizeof nf4_files / sizeof nf4_files[0] };
enum { FP4_FILES = sizeof fp4_files / sizeof fp4_files[0] };

struct quantised {
    size_t n, blocks, nested;
    float *w; /* what was quantised */
    uint8_t *packed, *codes;
    float *absmax, *absmax2, *nested_absmax, *back;
    float offset;
};

/* Quantise and nest w[n], which is taken over. */
static struct quantised quantise(enum q4_type type, float *w, size_t n)
{
    struct quantised q = { .n = n, .blocks = nf4_blocks(n), .nested = nf4_nested_blocks(n) };
    q.w = w;
    q.packed = malloc(nf4_bytes(n));
    q.codes = malloc(q.blocks);
    q.absmax = malloc(q.blocks * sizeof(float));
    q.absmax2 = malloc(q.blocks * sizeof(float));
    q.nested_absmax = malloc(q.nested * sizeof(float));
    q.back = malloc(n * sizeof(float));
    q4_quantize(type, w, n, q.packed, q.absmax);
    q4_nest(q.absmax, q.blocks, q.codes, q.nested_absmax, &q.offset);
    q4_unnest(q.codes, q.nested_absmax, q.offset, q.blocks, q.absmax2);
    q4_dequantize(type, q.packed, q.absmax2, n, q.back);
    return q;
}

static void quantised_free(struct quantised *q)
{
    free(q->w);
    free(q->packed);
    free(q->codes);
    free(q->absmax);
    free(q->absmax2);
    free(q->nested_absmax);
    free(q->back);
}

static void assert_nested(const struct quantised *q, const struct st_file *f, const char *suffix)
{
    size_t n;
    float *offset = floats(f, "nested_offset", suffix, &n);
    float *nested = floats(f, "nested_absmax", suffix, &n);
    assert_same_floats(&q->offset, offset, 1, "nested_offset");
    assert_same_floats(q->nested_absmax, nested, q->nested, "nested_absmax");
    assert_memory_equal(q->codes, bytes(f, "nested_codes", suffix, q->blocks), q->blocks);
    free(offset);
    free(nested);
}

static void nf4_equals_the_reference_bit_for_bit(void **state)
{
    (void)state;
    for (int i = 0; i < NF4_FILES; i++) {
        struct st_file *f = open_golden(nf4_files[i]);
        size_t n, m;
        float *w = floats(f, "weight", "", &n);
        struct quantised q = quantise(Q4_NF4, w, n);
        assert_memory_equal(q.packed, bytes(f, "packed", "", nf4_bytes(n)), nf4_bytes(n));
        float *absmax = floats(f, "absmax", "", &m),
              *after = floats(f, "absmax_after_nested", "", &m);
        assert_same_floats(q.absmax, absmax, q.blocks, "absmax");
        assert_nested(&q, f, "");
        assert_same_floats(q.absmax2, after, q.blocks, "absmax_after_nested");
        float *back = floats(f, "dequant_nested", "", &m),
              *plain = floats(f, "dequant_plain", "", &m);
        assert_same_floats(q.back, back, n, "dequant_nested");
        q4_dequantize(Q4_NF4, q.packed, q.absmax, n, q.back);
        assert_same_floats(q.back, plain, n, "dequant_plain");
        free(absmax);
        free(after);
        free(back);
        free(plain);
        quantised_free(&q);
        st_close(f);
    }
}

/* The weight rounded to a 16-bit type first, as a checkpoint in that type would be. */
static void sixteen_bit_weights_quantise_like_the_reference(void **state)
{
    (void)state;
    for (int i = 0; i < NF4_FILES; i++) {
        struct st_file *f = open_golden(nf4_files[i]);
        for (int bf = 0; bf < 2; bf++) {
            const char *suffix = bf ? "_bfloat16" : "_float16";
            size_t n, m;
            float *w = floats(f, "weight", "", &n);
            for (size_t k = 0; k < n; k++)
                w[k] = bf ? bf16_to_f32(f32_to_bf16(w[k])) : f16_to_f32(f32_to_f16(w[k]));
            struct quantised q = quantise(Q4_NF4, w, n);
            assert_memory_equal(q.packed, bytes(f, "packed", suffix, nf4_bytes(n)), nf4_bytes(n));
            assert_nested(&q, f, suffix);
            float *back = floats(f, "dequant_nested", suffix, &m);
            for (size_t k = 0; k < n; k++)
                q.back[k] =
                    bf ? bf16_to_f32(f32_to_bf16(q.back[k])) : f16_to_f32(f32_to_f16(q.back[k]));
            assert_same_floats(q.back, back, n, "dequant_nested in 16 bits");
            free(back);
            quantised_free(&q);
        }
        st_close(f);
    }
}

/* The zero bin of FP4 has two codes of the same value, so values are compared. */
static void fp4_dequantises_to_the_reference_values(void **state)
{
    (void)state;
    for (int i = 0; i < FP4_FILES; i++) {
        struct st_file *f = open_golden(fp4_files[i]);
        size_t n, m;
        float *w = floats(f, "weight", "", &n);
        struct quantised q = quantise(Q4_FP4, w, n);
        float *plain = floats(f, "dequant_plain", "", &m),
              *back = floats(f, "dequant_nested", "", &m);
        assert_same_floats(q.back, back, n, "dequant_nested");
        q4_dequantize(Q4_FP4, bytes(f, "packed", "", nf4_bytes(n)), q.absmax, n, q.back);
        assert_same_floats(q.back, plain, n, "dequant_plain of the reference's bytes");
        q4_dequantize(Q4_FP4, q.packed, q.absmax, n, q.back);
        assert_same_floats(q.back, plain, n, "dequant_plain of our bytes");
        free(plain);
        free(back);
        quantised_free(&q);
        st_close(f);
    }
}

/* dynamic8_1000 quantises values directly; nesting them means the same when their mean is
 * taken off, so the file's own absmax and codes are what q4_unnest() must give back. */
static void dynamic_map_decodes_like_the_reference(void **state)
{
    (void)state;
    struct st_file *f = open_golden("dynamic8_1000");
    size_t n, m;
    float *want = floats(f, "dequant", "", &n), *absmax = floats(f, "absmax", "", &m);
    float *got = malloc(n * sizeof *got);
    q4_unnest(bytes(f, "codes", "", n), absmax, 0.0f, n, got);
    assert_same_floats(got, want, n, "dequant");
    free(want);
    free(absmax);
    free(got);
    st_close(f);
}

/* --- edges that no reference file has ------------------------------------------------------ */

static void a_block_of_zeros_takes_the_code_of_zero(void **state)
{
    (void)state;
    float w[65] = { 0.0f }, absmax[2], back[65];
    uint8_t packed[33];
    w[64] = -2.0f;
    q4_quantize(Q4_NF4, w, 65, packed, absmax);
    for (int i = 0; i < 32; i++)
        assert_int_equal(packed[i], 0x77);
    assert_int_equal(packed[32], 0x07); /* code 0 is -1; the odd end is padded with zero */
    assert_true(absmax[0] == 0.0f && absmax[1] == 2.0f);
    q4_dequantize(Q4_NF4, packed, absmax, 65, back);
    assert_true(back[0] == 0.0f && back[64] == -2.0f);
}

static void tiny_weights_stay_finite(void **state)
{
    (void)state;
    float w[64], absmax[1], back[64];
    uint8_t packed[32];
    for (int i = 0; i < 64; i++)
        w[i] = i % 2 ? 1e-42f : -1e-44f;
    q4_quantize(Q4_NF4, w, 64, packed, absmax);
    q4_dequantize(Q4_NF4, packed, absmax, 64, back);
    for (int i = 0; i < 64; i++)
        assert_true(fabsf(back[i]) <= 1e-42f);
}

/* --- P16 --------------------------------------------------------------------------------- */

static void p16_unpacks_to_the_same_bytes(void **state)
{
    (void)state;
    const size_t sizes[][2] = { { 1, 64 }, { 16, 64 }, { 17, 128 }, { 50, 192 }, { 64, 320 } };
    for (size_t s = 0; s < sizeof sizes / sizeof sizes[0]; s++) {
        const size_t N = sizes[s][0], K = sizes[s][1], n = N * K / 2;
        uint8_t *packed = malloc(n), *back = malloc(n), *p16 = malloc(p16_bytes(N, K));
        srand(7);
        for (size_t i = 0; i < n; i++)
            packed[i] = (uint8_t)(rand() >> 5);
        p16_pack(packed, N, K, p16);
        p16_unpack(p16, N, K, back);
        assert_memory_equal(packed, back, n);
        free(packed);
        free(back);
        free(p16);
    }
}

/* The layout as nf4.h states it, element by element. */
static void p16_lies_as_described(void **state)
{
    (void)state;
    enum { N = 18, K = 128 };
    uint8_t packed[N * K / 2], p16[2 * 16 * K / 2];
    assert_int_equal(sizeof p16, p16_bytes(N, K));
    srand(8);
    for (size_t i = 0; i < sizeof packed; i++)
        packed[i] = (uint8_t)(rand() >> 5);
    p16_pack(packed, N, K, p16);
    for (int n = 0; n < 32; n++)
        for (int k = 0; k < K; k++) {
            int p = n / 16, r = n % 16, b = k / 64, g = k % 64 / 8, j = k % 8;
            int byte = p16[(p * (K / 64) + b) * 512 + 64 * g + 4 * r + j % 4];
            int got = j < 4 ? byte & 15 : byte >> 4, i = n * K + k;
            int want = n >= N ? 7 : i % 2 == 0 ? packed[i / 2] >> 4 : packed[i / 2] & 15;
            if (got != want)
                fail_msg("row %d, column %d is code %d, not %d", n, k, got, want);
        }
}

static void p16_scales_are_transposed_and_padded(void **state)
{
    (void)state;
    enum { N = 17, K = 192, B = K / 64 };
    float absmax[N * B], s32[32 * B];
    uint16_t s16[32 * B];
    assert_int_equal(32 * B, p16_scales(N, K));
    for (int i = 0; i < N * B; i++)
        absmax[i] = 0.01f * (float)(i + 1);
    p16_scales_from(absmax, N, K, s16, s32);
    for (int n = 0; n < 32; n++)
        for (int b = 0; b < B; b++) {
            float want = n < N ? absmax[n * B + b] : 0.0f;
            int at = (n / 16 * B + b) * 16 + n % 16;
            assert_true(s32[at] == want);
            assert_int_equal(s16[at], f32_to_f16(want));
        }
    p16_scales_from(absmax, N, K, s16, NULL);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(code_books_equal_the_reference_bit_for_bit),
        cmocka_unit_test(nf4_equals_the_reference_bit_for_bit),
        cmocka_unit_test(sixteen_bit_weights_quantise_like_the_reference),
        cmocka_unit_test(fp4_dequantises_to_the_reference_values),
        cmocka_unit_test(dynamic_map_decodes_like_the_reference),
        cmocka_unit_test(a_block_of_zeros_takes_the_code_of_zero),
        cmocka_unit_test(tiny_weights_stay_finite),
        cmocka_unit_test(p16_unpacks_to_the_same_bytes),
        cmocka_unit_test(p16_lies_as_described),
        cmocka_unit_test(p16_scales_are_transposed_and_padded),
    };
    return cmocka_run_group_tests_name("nf4", tests, NULL, NULL);
}
