/* test_safetensors.c - the container: what is read, what is refused, what is written.
 *
 * Files are put together here by hand from the format's description, so that reader and writer are
 * not only compared with each other. */
#include "engine/safetensors.h"
#include "engine/util.h"
#include "tests/support_model.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <dirent.h>
#include <unistd.h>
#include <cmocka.h>

#define COUNT(t) (sizeof(t) / sizeof(t)[0])

/* u64 length, header, data: malloc()ed exactly, so that the sanitizer sees every byte too far. */
static uint8_t *make_file(const char *header, size_t header_len, size_t data_len, size_t *ret_len)
{
    uint8_t *p = malloc(8 + header_len + data_len);
    assert_non_null(p);
    for (int i = 0; i < 8; i++)
        p[i] = (uint8_t)((uint64_t)header_len >> (8 * i));
    memcpy(p + 8, header, header_len);
    for (size_t i = 0; i < data_len; i++)
        p[8 + header_len + i] = (uint8_t)i;
    *ret_len = 8 + header_len + data_len;
    return p;
}

static void tensors_and_metadata_are_found_by_name(void **state)
{
    (void)state;
    const char h[] = "{\"__metadata__\":{\"format\":\"pt\",\"k\\u00e9y\":\"v\"},"
                     "\"b\":{\"dtype\":\"U8\",\"shape\":[3],\"data_offsets\":[0,3]},"
                     "\"a\":{\"data_offsets\":[3,11],\"shape\":[2,1],\"dtype\":\"F32\"},"
                     "\"empty\":{\"dtype\":\"F16\",\"shape\":[0,5],\"data_offsets\":[3,3]},"
                     "\"scalar\":{\"dtype\":\"I64\",\"shape\":[],\"data_offsets\":[11,19]}}   ";
    size_t len;
    uint8_t *p = make_file(h, strlen(h), 19, &len);
    struct st_file *f;
    struct err err = { 0 };
    if (st_open_mem(p, len, "x", &f, &err) != ERR_OK)
        fail_msg("%s", err.msg);
    assert_int_equal(f->ntensors, 4);
    assert_string_equal(f->tensors[0].name, "a");
    const struct st_tensor *a = st_find(f, "a"), *s = st_find(f, "scalar"), *e = st_find(f, "empty");
    assert_int_equal(a->data[0], 3); /* data byte i holds i */
    assert_int_equal(a->bytes, 8);
    assert_int_equal(a->ndim, 2);
    assert_int_equal(a->shape[0], 2);
    assert_int_equal(st_count(s), 1);
    assert_int_equal(s->data[7], 18);
    assert_int_equal(st_count(e), 0);
    assert_null(st_find(f, "c"));
    assert_string_equal(st_meta(f, "k\xc3\xa9y"), "v");
    assert_null(st_meta(f, "none"));
    st_close(f);
    free(p);
}

#define T(name, dtype, shape, b, e)                                                              \
    "\"" name "\":{\"dtype\":\"" dtype "\",\"shape\":" shape ",\"data_offsets\":[" b "," e "]}"

static void hostile_headers_are_refused_with_a_sentence(void **state)
{
    (void)state;
    const struct {
        const char *header;
        size_t data;
        const char *says;
    } cases[] = {
        { "{" T("x", "U8", "[4]", "0", "4") "," T("y", "U8", "[4]", "2", "6") "}", 6, "tensor y begins at byte 2" },
        { "{" T("x", "U8", "[4]", "0", "4") "," T("y", "U8", "[4]", "0", "4") "}", 4, "inside the one before" },
        { "{" T("x", "U8", "[4]", "0", "4") "," T("y", "U8", "[2]", "5", "7") "}", 7, "gap" },
        { "{" T("x", "U8", "[4]", "1", "5") "}", 5, "gap" },
        { "{" T("x", "U8", "[4]", "0", "4") "}", 5, "1 bytes follow" },
        { "{}", 1, "1 bytes follow" },
        { "{" T("x", "U8", "[4]", "0", "4") "}", 3, "tensor x ends at byte 4" },
        { "{" T("x", "F32", "[4]", "0", "4") "}", 4, "tensor x needs 16 bytes" },
        { "{" T("x", "U8", "[4]", "4", "0") "}", 4, "not two ascending" },
        { "{" T("x", "U8", "[-4]", "0", "4") "}", 4, "dimension 0 of tensor x" },
        { "{" T("x", "U8", "[4.0]", "0", "4") "}", 4, "dimension 0 of tensor x" },
        { "{" T("x", "U8", "[\"4\"]", "0", "4") "}", 4, "dimension 0 of tensor x" },
        { "{" T("x", "U8", "[4]", "0.0", "4") "}", 4, "not two ascending" },
        { "{" T("x", "U8", "[4]", "-1", "3") "}", 4, "not two ascending" },
        { "{" T("x", "U8", "[4294967296,4294967296]", "0", "0") "}", 0, "larger than any memory" },
        { "{" T("x", "F32", "[9223372036854775807]", "0", "4") "}", 4, "larger than any memory" },
        { "{" T("x", "F32", "[4611686018427387905]", "0", "4") "}", 4, "larger than any memory" },
        { "{" T("x", "U8", "[99999999999999999999]", "0", "4") "}", 4, "not valid" },
        { "{" T("x", "U8", "[1,1,1,1,1,1,1,1,1]", "0", "1") "}", 1, "9 dimensions" },
        { "{" T("x", "U8", "4", "0", "4") "}", 4, "no shape" },
        { "{" T("x", "Q4_0", "[4]", "0", "4") "}", 4, "unknown dtype \"Q4_0\"" },
        { "{" T("x", "f32", "[1]", "0", "4") "}", 4, "unknown dtype \"f32\"" },
        { "{\"x\":{\"dtype\":4,\"shape\":[4],\"data_offsets\":[0,4]}}", 4, "no dtype" },
        { "{\"x\":{\"dtype\":\"U8\",\"shape\":[4]}}", 4, "not two ascending" },
        { "{\"x\":{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[0,4,4]}}", 4, "not two ascending" },
        { "{\"x\":{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[0,4],\"strides\":[1]}}", 4, "unknown field \"strides\"" },
        { "{\"x\":[\"U8\"]}", 4, "not an object" },
        { "{" T("x", "U8", "[2]", "0", "2") "," T("x", "U8", "[2]", "2", "4") "}", 4, "duplicate" },
        { "{\"__metadata__\":[]}", 0, "__metadata__ is not an object" },
        { "{\"__metadata__\":{\"a\":1}}", 0, "\"a\" is not a string" },
        { "{" T("", "U8", "[4]", "0", "4") "}", 4, "name has 0 bytes" },
        { "{" T("a\\nb", "U8", "[4]", "0", "4") "}", 4, "control character 0x0a" },
        { "{" T("a\\u0000b", "U8", "[4]", "0", "4") "}", 4, "not valid" },
        { "{" T("\xff", "U8", "[4]", "0", "4") "}", 4, "not valid" },
        { "{" T("\xc3\x28", "U8", "[4]", "0", "4") "}", 4, "not valid" },
        { "[]", 0, "not a safetensors file" },
        { "  {}", 0, "not a safetensors file" },
        { "{} x", 0, "not valid" },
        { "{", 0, "not a safetensors file" },
        { "{\"x\":", 0, "not valid" },
        { "", 4, "not a safetensors file" },
    };
    for (size_t i = 0; i < COUNT(cases); i++) {
        size_t len;
        uint8_t *p = make_file(cases[i].header, strlen(cases[i].header), cases[i].data, &len);
        struct st_file *f = NULL;
        struct err err = { 0 };
        int rc = st_open_mem(p, len, "file.x", &f, &err);
        if (rc != ERR_INVALID || strstr(err.msg, cases[i].says) == NULL ||
            strncmp(err.msg, "file.x: ", 8) != 0)
            fail_msg("case %zu %s: code %d, message \"%s\"", i, cases[i].header, rc, err.msg);
        free(p);
    }
}

static void every_truncation_of_a_file_is_refused(void **state)
{
    (void)state;
    const char h[] = "{" T("x", "U8", "[4]", "0", "4") "}";
    size_t len;
    uint8_t *p = make_file(h, strlen(h), 4, &len);
    for (size_t n = 0; n < len; n++) {
        struct st_file *f = NULL;
        struct err err = { 0 };
        uint8_t *cut = malloc(n ? n : 1);
        memcpy(cut, p, n);
        assert_int_equal(st_open_mem(cut, n, "x", &f, &err), ERR_INVALID);
        assert_true(err.msg[0] != '\0');
        free(cut);
    }
    free(p);
}

static void a_header_longer_than_the_limit_is_refused_before_it_is_read(void **state)
{
    (void)state;
    const uint64_t lengths[] = { 100 * 1000 * 1000 + 1, 1ull << 40, UINT64_MAX, UINT64_MAX - 7 };
    for (size_t i = 0; i < COUNT(lengths); i++) {
        uint8_t file[16] = { 0 };
        for (int b = 0; b < 8; b++)
            file[b] = (uint8_t)(lengths[i] >> (8 * b));
        struct st_file *f = NULL;
        struct err err = { 0 };
        assert_int_equal(st_open_mem(file, sizeof file, "x", &f, &err), ERR_INVALID);
        assert_non_null(strstr(err.msg, "limit"));
    }
}

/* Two megabytes of "{}," would become half a gigabyte of JSON values. */
static void a_header_of_countless_small_values_is_refused_before_it_is_parsed(void **state)
{
    (void)state;
    size_t n = 700 * 1000, len;
    char *h = malloc(3 * n + 16);
    size_t at = (size_t)sprintf(h, "{\"x\":[");
    for (size_t i = 0; i < n; i++) {
        memcpy(h + at, "{},", 3);
        at += 3;
    }
    memcpy(h + at, "{}]}", 4);
    uint8_t *p = make_file(h, at + 4, 0, &len);
    struct st_file *f = NULL;
    struct err err = { 0 };
    assert_int_equal(st_open_mem(p, len, "x", &f, &err), ERR_INVALID);
    assert_non_null(strstr(err.msg, "too many entries"));
    free(p);
    free(h);
}

static void files_that_are_none_are_refused(void **state)
{
    (void)state;
    char dir[64];
    support_tmpdir(dir);
    struct st_file *f = NULL;
    struct err err = { 0 };
    char *missing = path_join(dir, "missing");
    assert_int_equal(st_open(missing, &f, &err), ERR_NOT_FOUND);
    err_clear(&err);
    assert_int_equal(st_open(dir, &f, &err), ERR_INVALID);
    err_clear(&err);
    support_write_file(dir, "empty", "", 0);
    char *empty = path_join(dir, "empty");
    assert_int_equal(st_open(empty, &f, &err), ERR_INVALID);
    assert_non_null(strstr(err.msg, "empty"));
    free(missing);
    free(empty);
    support_remove(dir);
}

/* Known bit patterns, at an odd address. */
static void values_widen_exactly_and_nan_or_infinity_is_named(void **state)
{
    (void)state;
    const char h[] = "{" T("pad", "U8", "[1]", "0", "1") "," T("bf", "BF16", "[3]", "1", "7") ","
                     T("hf", "F16", "[3]", "7", "13") "," T("f", "F32", "[2]", "13", "21") ","
                     T("i", "I32", "[1]", "21", "25") "}";
    size_t len;
    uint8_t *p = make_file(h, strlen(h), 25, &len), *d = p + 8 + strlen(h);
    memcpy(d + 1, (uint8_t[]){ 0x80, 0x3f, 0xc0, 0xbf, 0x80, 0x7f }, 6); /* 1, -1.5, inf */
    memcpy(d + 7, (uint8_t[]){ 0x00, 0x3c, 0x01, 0x00, 0x01, 0x7c }, 6); /* 1, 2^-24, nan */
    memcpy(d + 13, (uint8_t[]){ 0, 0, 0x40, 0x40, 0, 0, 0x80, 0xff }, 8); /* 3, -inf */
    struct st_file *f;
    struct err err = { 0 };
    float v[3];
    assert_int_equal(st_open_mem(p, len, "x", &f, &err), ERR_OK);
    assert_int_equal(st_f32(st_find(f, "bf"), 0, 2, v, &err), ERR_OK);
    assert_true(v[0] == 1.0f && v[1] == -1.5f);
    assert_int_equal(st_f32(st_find(f, "hf"), 0, 2, v, &err), ERR_OK);
    assert_true(v[0] == 1.0f && v[1] == ldexpf(1, -24));
    assert_int_equal(st_f32(st_find(f, "f"), 0, 1, v, &err), ERR_OK);
    assert_true(v[0] == 3.0f);
    const struct {
        const char *name, *says;
    } bad[] = {
        { "bf", "tensor bf holds an infinity at element 2" },
        { "hf", "tensor hf holds NaN at element 2" },
        { "f", "tensor f holds an infinity at element 1" },
        { "i", "tensor i has type I32" },
    };
    for (size_t i = 0; i < COUNT(bad); i++) {
        const struct st_tensor *t = st_find(f, bad[i].name);
        err_clear(&err);
        assert_int_equal(st_f32(t, 0, st_count(t), v, &err), ERR_INVALID);
        if (strstr(err.msg, bad[i].says) == NULL)
            fail_msg("%s: \"%s\"", bad[i].name, err.msg);
    }
    err_clear(&err);
    assert_int_equal(st_f32(st_find(f, "f"), 2, 1, v, &err), ERR_INTERNAL);
    st_close(f);
    free(p);
}

/* --- writer --------------------------------------------------------------------------- */

static size_t files_in(const char *dir)
{
    size_t n = 0;
    DIR *d = opendir(dir);
    for (const struct dirent *e; (e = readdir(d)) != NULL;)
        n += e->d_name[0] != '.';
    closedir(d);
    return n;
}

static void check(int rc, const struct err *err)
{
    if (rc != ERR_OK)
        fail_msg("%s", err->msg);
}

/* Sizes around the alignment and around the writer's buffer. */
static const size_t sizes[] = { 1, 64, 0, 63, 65, 300000, 128, 0, 262144, 7 };

static void write_sizes(const char *path, bool align)
{
    struct st_writer *w;
    struct err err = { 0 };
    static uint8_t data[300000];
    check(st_writer_open(path, align, &w, &err), &err);
    check(st_writer_meta(w, "text", "a \"b\"\n\xc3\xa9", 8, &err), &err);
    check(st_writer_meta(w, "hash", "0000", 4, &err), &err);
    for (size_t i = 0; i < COUNT(sizes); i++) {
        char name[8];
        sprintf(name, "t%zu", i);
        check(st_writer_tensor(w, name, "U8", 1, (const int64_t[]){ (int64_t)sizes[i] }, sizes[i],
                               &err), &err);
    }
    check(st_writer_begin(w, &err), &err);
    for (size_t i = 0; i < COUNT(sizes); i++) {
        memset(data, (int)i + 1, sizeof data);
        size_t half = sizes[i] / 3;
        check(st_writer_data(w, data, half, &err), &err);
        check(st_writer_data(w, data, sizes[i] - half, &err), &err);
    }
    check(st_writer_patch(w, "hash", "abcd", 4, &err), &err);
    check(st_writer_commit(w, &err), &err);
}

static void what_was_written_is_read_back_aligned_or_not(void **state)
{
    (void)state;
    char dir[64];
    support_tmpdir(dir);
    char *path = path_join(dir, "f.safetensors");
    for (int align = 0; align < 2; align++) {
        write_sizes(path, align);
        assert_int_equal(files_in(dir), 1);
        struct st_file *f;
        struct err err = { 0 };
        check(st_open(path, &f, &err), &err);
        assert_string_equal(st_meta(f, "text"), "a \"b\"\n\xc3\xa9");
        assert_string_equal(st_meta(f, "hash"), "abcd");
        if (!align)
            assert_int_equal(f->ntensors, COUNT(sizes));
        for (size_t i = 0; i < COUNT(sizes); i++) {
            char name[8];
            sprintf(name, "t%zu", i);
            const struct st_tensor *t = st_find(f, name);
            assert_int_equal(t->bytes, sizes[i]);
            assert_true(!align || (t->data - f->map) % 64 == 0);
            for (size_t k = 0; k < t->bytes; k++)
                assert_int_equal(t->data[k], i + 1);
        }
        st_close(f);
    }
    free(path);
    support_remove(dir);
}

static void a_file_that_is_not_finished_never_appears(void **state)
{
    (void)state;
    char dir[64];
    support_tmpdir(dir);
    char *path = path_join(dir, "f");
    for (int how = 0; how < 4; how++) {
        struct st_writer *w;
        struct err err = { 0 };
        check(st_writer_open(path, false, &w, &err), &err);
        check(st_writer_tensor(w, "t", "U8", 1, (const int64_t[]){ 4 }, 4, &err), &err);
        check(st_writer_begin(w, &err), &err);
        check(st_writer_data(w, "abc", 3, &err), &err);
        if (how == 0) {
            st_writer_abort(w);
        } else if (how == 1) {
            assert_int_equal(st_writer_commit(w, &err), ERR_INTERNAL); /* a byte is missing */
        } else if (how == 2) {
            assert_int_equal(st_writer_data(w, "de", 2, &err), ERR_INTERNAL); /* one too many */
            st_writer_abort(w);
        } else {
            assert_int_equal(st_writer_patch(w, "none", "x", 1, &err), ERR_INTERNAL);
            st_writer_abort(w);
        }
        assert_int_equal(files_in(dir), 0);
    }
    struct st_writer *w = NULL;
    struct err err = { 0 };
    char *nowhere = path_join(dir, "none/f");
    assert_int_equal(st_writer_open(nowhere, false, &w, &err), ERR_IO);
    free(nowhere);
    free(path);
    support_remove(dir);
}

static void metadata_that_is_no_text_is_refused(void **state)
{
    (void)state;
    char dir[64];
    support_tmpdir(dir);
    char *path = path_join(dir, "f");
    struct st_writer *w;
    struct err err = { 0 };
    check(st_writer_open(path, false, &w, &err), &err);
    assert_int_equal(st_writer_meta(w, "k", "\xff", 1, &err), ERR_INVALID);
    err_clear(&err);
    assert_int_equal(st_writer_meta(w, "k", "a\0b", 3, &err), ERR_INVALID);
    st_writer_abort(w);
    free(path);
    support_remove(dir);
}

static void real_files_of_other_programs_are_read(void **state)
{
    (void)state;
    const char *path = support_shared("models/stories260K/model.safetensors");
    if (path == NULL)
        skip();
    struct st_file *f;
    struct err err = { 0 };
    check(st_open(path, &f, &err), &err);
    const struct st_tensor *t = st_find(f, "model.embed_tokens.weight");
    assert_non_null(t);
    assert_int_equal(t->shape[0], 512);
    assert_int_equal(t->shape[1], 64);
    st_close(f);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(tensors_and_metadata_are_found_by_name),
        cmocka_unit_test(hostile_headers_are_refused_with_a_sentence),
        cmocka_unit_test(every_truncation_of_a_file_is_refused),
        cmocka_unit_test(a_header_longer_than_the_limit_is_refused_before_it_is_read),
        cmocka_unit_test(a_header_of_countless_small_values_is_refused_before_it_is_parsed),
        cmocka_unit_test(files_that_are_none_are_refused),
        cmocka_unit_test(values_widen_exactly_and_nan_or_infinity_is_named),
        cmocka_unit_test(what_was_written_is_read_back_aligned_or_not),
        cmocka_unit_test(a_file_that_is_not_finished_never_appears),
        cmocka_unit_test(metadata_that_is_no_text_is_refused),
        cmocka_unit_test(real_files_of_other_programs_are_read),
    };
    return cmocka_run_group_tests_name("safetensors", tests, NULL, NULL);
}
