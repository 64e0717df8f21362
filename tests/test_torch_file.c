/* test_torch_file.c - adapter_model.bin: dicts of tensors are read, everything else is refused by
 * name, and no damage to a file does any.
 *
 * Archives and pickles are put together here byte by byte, after PKWARE's APPNOTE and Python's
 * pickletools; files that torch.save() itself wrote are in the reference folder. */
#include "engine/torch_file.h"
#include "engine/util.h"
#include "tests/support_model.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

static struct err err;

/* --- writing ------------------------------------------------------------------------------------- */
static void put(struct buf *b, const void *p, size_t n) { assert_int_equal(buf_add(b, p, n), ERR_OK); }

#define LITERAL(b, s) put(b, s, sizeof s - 1)

static void put_number(struct buf *b, size_t v, size_t n)
{
    uint8_t le[32] = { 0 };
    for (size_t i = 0; i < n && i < sizeof v; i++)
        le[i] = (uint8_t)(v >> 8 * i);
    put(b, le, n);
}

struct zip {
    struct buf data, directory;
    size_t n;
    int method;   /* of the next member */
    int local;    /* added to the offset that the directory gives */
};

static void zip_add(struct zip *z, const char *name, const void *p, size_t n)
{
    const size_t at = z->data.len, k = strlen(name);
    LITERAL(&z->data, "PK\3\4\0\0\x08\x08");
    put_number(&z->data, 0, 18);
    put_number(&z->data, k, 2);
    put_number(&z->data, 5, 2); /* an extra field, as torch pads with */
    put(&z->data, name, k);
    LITERAL(&z->data, "FB\1\0Z");
    put(&z->data, p, n);
    LITERAL(&z->directory, "PK\1\2\0\0\0\0\x08\x08");
    put_number(&z->directory, (size_t)z->method, 2);
    put_number(&z->directory, 0, 8);
    put_number(&z->directory, n, 4);
    put_number(&z->directory, n, 4);
    put_number(&z->directory, k, 2);
    put_number(&z->directory, 0, 8);
    put_number(&z->directory, 0, 4);
    put_number(&z->directory, at + (size_t)z->local, 4);
    put(&z->directory, name, k);
    z->n++;
}

static void zip_init(struct zip *z)
{
    memset(z, 0, sizeof *z);
    buf_init(&z->data, 1 << 20);
    buf_init(&z->directory, 1 << 20);
}

/* The whole file in z->data. */
static void zip_end(struct zip *z)
{
    const size_t at = z->data.len;
    put(&z->data, z->directory.data, z->directory.len);
    LITERAL(&z->data, "PK\5\6\0\0\0\0");
    put_number(&z->data, z->n, 2);
    put_number(&z->data, z->n, 2);
    put_number(&z->data, z->directory.len, 4);
    put_number(&z->data, at, 4);
    put_number(&z->data, 0, 2);
    buf_free(&z->directory);
}

static void put_text(struct buf *b, const char *s)
{
    LITERAL(b, "X");
    put_number(b, strlen(s), 4);
    put(b, s, strlen(s));
}

static void put_int(struct buf *b, int v)
{
    LITERAL(b, "J");
    put_number(b, (size_t)(uint32_t)v, 4);
}

/* A tensor of two dimensions, on the stack. */
static void put_tensor(struct buf *b, const char *type, const char *key, int storage, int offset,
                       const int shape[2], const int stride[2])
{
    LITERAL(b, "ctorch._utils\n_rebuild_tensor_v2\n((");
    put_text(b, "storage");
    LITERAL(b, "ctorch\n");
    put(b, type, strlen(type));
    LITERAL(b, "\n");
    put_text(b, key);
    put_text(b, "cpu");
    put_int(b, storage);
    LITERAL(b, "tQ");
    put_int(b, offset);
    for (int i = 0; i < 2; i++) {
        const int *v = i ? stride : shape;
        put_int(b, v[0]);
        put_int(b, v[1]);
        LITERAL(b, "\x86");
    }
    LITERAL(b, "\x89" "ccollections\nOrderedDict\n)RtR");
}

enum { N = 12 };
static const float values[N] = { 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11 };

/* An archive with this pickle and the twelve values as storage 0. */
static void archive(struct zip *z, const struct buf *pickle)
{
    zip_init(z);
    zip_add(z, "archive/data.pkl", pickle->data, pickle->len);
    zip_add(z, "archive/byteorder", "little", 6);
    zip_add(z, "archive/data/0", values, sizeof values);
    zip_add(z, "archive/version", "3\n", 2);
    zip_end(z);
}

/* {"t": tensor}. */
static void one_tensor(struct buf *b, const char *type, int storage, int offset, const int shape[2],
                       const int stride[2])
{
    buf_init(b, 1 << 16);
    LITERAL(b, "\x80\2}q\0(");
    put_text(b, "t");
    put_tensor(b, type, "0", storage, offset, shape, stride);
    LITERAL(b, "u.");
}

static int open_pickle(const struct buf *pickle, struct st_file **ret, struct zip *z)
{
    archive(z, pickle);
    err_clear(&err);
    return weights_open_mem(z->data.data, z->data.len, "a.bin", ret, &err);
}

/* --- what is read ---------------------------------------------------------------------------------- */
static void a_tensor_has_its_shape_type_and_values(void **state)
{
    (void)state;
    static const struct {
        int offset, shape[2], stride[2];
        float want[6];
    } cases[] = {
        { 0, { 2, 3 }, { 3, 1 }, { 0, 1, 2, 3, 4, 5 } },
        { 6, { 3, 2 }, { 2, 1 }, { 6, 7, 8, 9, 10, 11 } },
        { 1, { 2, 3 }, { 1, 2 }, { 1, 3, 5, 2, 4, 6 } },     /* transposed */
        { 0, { 2, 3 }, { 6, 1 }, { 0, 1, 2, 6, 7, 8 } },     /* part of a wider one */
        { 3, { 2, 3 }, { 0, 0 }, { 3, 3, 3, 3, 3, 3 } },     /* expanded */
        { 2, { 1, 6 }, { 99, 1 }, { 2, 3, 4, 5, 6, 7 } },
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        struct buf p;
        struct zip z;
        struct st_file *f = NULL;
        one_tensor(&p, "FloatStorage", N, cases[i].offset, cases[i].shape, cases[i].stride);
        if (open_pickle(&p, &f, &z) != ERR_OK)
            fail_msg("case %zu: %s", i, err.msg);
        assert_int_equal(f->ntensors, 1);
        const struct st_tensor *t = st_find(f, "t");
        assert_non_null(t);
        assert_int_equal(t->dtype, DT_F32);
        assert_string_equal(t->dtype_name, "F32");
        assert_int_equal(t->ndim, 2);
        assert_int_equal(t->shape[0], cases[i].shape[0]);
        assert_int_equal(t->shape[1], cases[i].shape[1]);
        assert_int_equal(t->bytes, sizeof cases[i].want);
        assert_memory_equal(t->data, cases[i].want, sizeof cases[i].want);
        st_close(f);
        buf_free(&z.data);
        buf_free(&p);
    }
}

static void a_tensor_without_elements_is_read(void **state)
{
    (void)state;
    struct buf p;
    struct zip z;
    struct st_file *f = NULL;
    one_tensor(&p, "FloatStorage", N, 12, (int[]){ 0, 7 }, (int[]){ 7, 1 });
    assert_int_equal(open_pickle(&p, &f, &z), ERR_OK);
    assert_int_equal(f->tensors[0].bytes, 0);
    st_close(f);
    buf_free(&z.data);
    buf_free(&p);
}

/* Files of PyTorch itself. */
static void files_of_pytorch_are_read(void **state)
{
    (void)state;
    static const struct {
        const char *dir, *name;
        size_t n;
        int ndim;
        int64_t shape[3];
    } cases[] = {
        { "golden/adapters/tiny-llama/lora_bin", "base_model.model.model.layers.1.self_attn.v_proj."
          "lora_B.weight", 8, 2, { 32, 4 } },
        { "adapters/bloom-560m-legacy-mergedlinear-bin", "base_model.model.transformer.h.23."
          "self_attention.query_key_value.lora_B.weight", 48, 3, { 2048, 8, 1 } },
    };
    for (size_t i = 0; i < 2; i++) {
        char path[512];
        struct st_file *f = NULL;
        const char *dir = support_shared(cases[i].dir);
        if (dir == NULL)
            skip();
        snprintf(path, sizeof path, "%s/adapter_model.bin", dir);
        err_clear(&err);
        if (weights_open(path, &f, &err) != ERR_OK)
            fail_msg("%s", err.msg);
        assert_int_equal(f->ntensors, cases[i].n);
        const struct st_tensor *t = st_find(f, cases[i].name);
        assert_non_null(t);
        assert_int_equal(t->ndim, cases[i].ndim);
        for (int d = 0; d < t->ndim; d++)
            assert_int_equal(t->shape[d], cases[i].shape[d]);
        for (size_t k = 0; k < f->ntensors; k++) {
            float x;
            assert_int_equal(st_f32(&f->tensors[k], 0, 1, &x, &err), ERR_OK);
            assert_true(fabsf(x) < 10);
        }
        st_close(f);
    }
}

/* --- what is not ----------------------------------------------------------------------------------- */
static void a_tensor_beyond_its_storage_is_refused(void **state)
{
    (void)state;
    static const struct {
        int storage, offset, shape[2], stride[2];
        const char *type, *says;
    } cases[] = {
        { N, 1, { 3, 4 }, { 4, 1 }, "FloatStorage", "beyond its storage" },
        { N, 0, { 3, 4 }, { 5, 1 }, "FloatStorage", "beyond its storage" },
        { N, 13, { 1, 1 }, { 1, 1 }, "FloatStorage", "beyond its storage" },
        { N, 0, { 1 << 30, 1 << 30 }, { 1 << 30, 1 << 30 }, "FloatStorage", "beyond its storage" },
        { N, 0, { 4, 4 }, { 0, 0 }, "FloatStorage", "beyond its storage" }, /* grows */
        { N, -1, { 1, 1 }, { 1, 1 }, "FloatStorage", "another form" },
        { N, 0, { -1, 1 }, { 1, 1 }, "FloatStorage", "whole numbers" },
        { N + 1, 0, { 1, 1 }, { 1, 1 }, "FloatStorage", "another size" },
        { N, 0, { 1, 1 }, { 1, 1 }, "DoubleStorage", "another size" },
        { -1, 0, { 1, 1 }, { 1, 1 }, "FloatStorage", "another form" },
        { N, 0, { 1, 1 }, { 1, 1 }, "ComplexFloatStorage", "names torch.ComplexFloatStorage" },
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        struct buf p;
        struct zip z;
        struct st_file *f = NULL;
        one_tensor(&p, cases[i].type, cases[i].storage, cases[i].offset, cases[i].shape,
                   cases[i].stride);
        int rc = open_pickle(&p, &f, &z);
        if (rc != ERR_INVALID || strstr(err.msg, cases[i].says) == NULL)
            fail_msg("case %zu: %d \"%s\"", i, rc, err.msg);
        buf_free(&z.data);
        buf_free(&p);
    }
}

static void a_pickle_that_could_do_anything_is_refused_by_name(void **state)
{
    (void)state;
#define T(text, says) { text, sizeof text - 1, says }
    static const struct {
        const char *text;
        size_t n;
        const char *says;
    } cases[] = {
        T("\x80\2cos\nsystem\n(X\4\0\0\0trueatR.", "names os.system"),
        T("\x80\2c__builtin__\neval\n.", "names __builtin__.eval"),
        T("\x80\2ctorch._utils\n_rebuild_parameter\n.", "names torch._utils._rebuild_parameter"),
        T("\x80\2ctorch\n_utils._rebuild_tensor_v2\n.", "names torch._utils._rebuild_tensor_v2"),
        T("\x80\2(ios\nsystem\n.", "instruction 0x69 at byte 3"),
        T("\x80\2}\x93.", "instruction 0x93 at byte 3"),
        T("\x80\2N.", "instruction 0x4e"),
        T("\x80\4}.", "protocol 2"),
        T("\x80\2}", "cut off"),
        T("\x80\2}.}", "follows its end"),
        T("\x80\2.", "without a dict"),
        T("\x80\2K\1.", "without a dict"),
        T("\x80\2}}.", "without a dict"),
        T("\x80\2}K\1K\1s.", "not a tensor"),
        T("\x80\2}X\1\0\0\0aK\1s.", "not a tensor"),
        T("\x80\2}X\1\0\0\0a}s.", "not a tensor"),
        T("\x80\2}X\2\0\0\0a\0}s.", "zero byte"),
        T("\x80\2}X\xff\xff\xff\xff" "a}s.", "too long"),
        T("\x80\2}h\0.", "memo has no such value"),
        T("\x80\2}q\1.", "memo is used in another order"),
        T("\x80\2(q\0.", "memo is used in another order"),
        T("\x80\2K\1K\1K\1s.", "not a dict"),
        T("\x80\2}(K\1u.", "not a dict"),
        T("\x80\2u.", "no mark"),
        T("\x80\2t.", "no mark"),
        T("\x80\2\x86.", "lacks elements"),
        T("\x80\2(\x85.", "a mark"),
        T("\x80\2)Q.", "a storage has another form"),
        T("\x80\2))R.", "is called"),
        T("\x80\2ctorch._utils\n_rebuild_tensor_v2\n)R.", "a tensor has another form"),
        T("\x80\2ctorch\nFloatStorage\n)R.", "is called"),
        T("\x80\2)}b.", "attributes"),
        T("\x80\2}K\1b.", "attributes"),
        T("\x80\2R.", "no arguments"),
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        struct buf p;
        struct zip z;
        struct st_file *f = NULL;
        buf_init(&p, 1 << 16);
        put(&p, cases[i].text, cases[i].n);
        int rc = open_pickle(&p, &f, &z);
        if (rc != ERR_INVALID || strstr(err.msg, cases[i].says) == NULL)
            fail_msg("case %zu (%s): %d \"%s\"", i, cases[i].says, rc, err.msg);
        buf_free(&z.data);
        buf_free(&p);
    }
}

/* What was put together once is used as often as 16 MiB of instructions can say so. */
static void a_pickle_that_multiplies_is_refused_before_it_takes_much_memory(void **state)
{
    (void)state;
    static const struct {
        const char *head, *again, *says;
        size_t nhead, nagain;
    } cases[] = {
#define BOMB(head, again, says) { head, again, says, sizeof head - 1, sizeof again - 1 }
        BOMB("\x80\2(X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\0" "0X\3\0\0\0cpuK\1tq\0", "h\0Q",
             "more values"), /* storages */
        BOMB("\x80\2}q\0", "h\0h\0h\0\x87", "more values"), /* tuples */
        BOMB("\x80\2}", ")}s", "more values"), /* entries */
#undef BOMB
    };
    enum { BYTES = 16 << 20 };
    char *p = malloc(BYTES);
    assert_non_null(p);
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        struct torch_tensor *list = NULL;
        size_t n = cases[i].nhead, count = 0;
        memcpy(p, cases[i].head, n);
        for (; n + cases[i].nagain < BYTES; n += cases[i].nagain)
            memcpy(p + n, cases[i].again, cases[i].nagain);
        p[n++] = '.';
        err_clear(&err);
        int rc = torch_pickle_read((const uint8_t *)p, n, "a.bin", &list, &count, &err);
        if (rc != ERR_INVALID || strstr(err.msg, cases[i].says) == NULL)
            fail_msg("case %zu: %d \"%s\"", i, rc, err.msg);
    }
    free(p);
}

/* A long name, once in the file and in it again and again. */
static void a_name_that_is_used_again_and_again_is_refused(void **state)
{
    (void)state;
    struct buf p;
    struct zip z;
    struct st_file *f = NULL;
    char name[256];
    memset(name, 'n', 255);
    name[255] = '\0';
    buf_init(&p, 1 << 20);
    LITERAL(&p, "\x80\2}");
    put_text(&p, name);
    LITERAL(&p, "q\0");
    put_tensor(&p, "FloatStorage", "0", N, 0, (int[]){ 3, 4 }, (int[]){ 4, 1 });
    LITERAL(&p, "q\1s");
    for (int i = 0; i < 100000; i++)
        LITERAL(&p, "h\0h\1s");
    LITERAL(&p, ".");
    int rc = open_pickle(&p, &f, &z);
    if (rc != ERR_INVALID || strstr(err.msg, "have the same name") == NULL)
        fail_msg("%d \"%s\"", rc, err.msg);
    buf_free(&z.data);
    buf_free(&p);
}

static void attributes_of_the_dict_mean_nothing(void **state)
{
    (void)state;
    struct buf p;
    struct zip z;
    struct st_file *f = NULL;
    buf_init(&p, 1 << 16);
    LITERAL(&p, "\x80\2ccollections\nOrderedDict\n)R(");
    put_text(&p, "t");
    put_tensor(&p, "HalfStorage", "0", 2 * N, 0, (int[]){ 2, 3 }, (int[]){ 3, 1 });
    LITERAL(&p, "u}");
    put_text(&p, "_metadata");
    LITERAL(&p, "}sb.");
    if (open_pickle(&p, &f, &z) != ERR_OK)
        fail_msg("%s", err.msg);
    assert_int_equal(f->ntensors, 1);
    assert_int_equal(f->tensors[0].dtype, DT_F16);
    st_close(f);
    buf_free(&z.data);
    buf_free(&p);
}

static void an_archive_of_another_kind_is_refused(void **state)
{
    (void)state;
    static const char *const says[] = { "compressed", "does not begin where", "same name", "in one folder",
                                        "has a member code/a.py", "no data.pkl", "little-endian",
                                        "twice" };
    for (int i = 0; i < 8; i++) {
        struct buf p;
        struct zip z;
        struct st_file *f = NULL;
        one_tensor(&p, "FloatStorage", N, 0, (int[]){ 3, 4 }, (int[]){ 4, 1 });
        if (i == 7) {
            p.len--; /* the end; then the same again */
            LITERAL(&p, "(");
            put_text(&p, "t");
            put_tensor(&p, "FloatStorage", "0", N, 0, (int[]){ 3, 4 }, (int[]){ 4, 1 });
            LITERAL(&p, "u.");
        }
        zip_init(&z);
        if (i != 5)
            zip_add(&z, "x/data.pkl", p.data, p.len);
        z.method = i == 0 ? 8 : 0;
        z.local = i == 1 ? 3 : 0;
        zip_add(&z, i == 3 ? "y/data/0" : "x/data/0", values, sizeof values);
        z.method = z.local = 0;
        if (i == 2)
            zip_add(&z, "x/data/0", values, sizeof values);
        if (i == 4)
            zip_add(&z, "x/code/a.py", "", 0);
        if (i == 6)
            zip_add(&z, "x/byteorder", "big", 3);
        zip_end(&z);
        err_clear(&err);
        int rc = weights_open_mem(z.data.data, z.data.len, "a.bin", &f, &err);
        if (rc != ERR_INVALID || strstr(err.msg, says[i]) == NULL)
            fail_msg("%s: %d \"%s\"", says[i], rc, err.msg);
        buf_free(&z.data);
        buf_free(&p);
    }
    struct st_file *f = NULL;
    err_clear(&err);
    assert_int_equal(weights_open_mem("\x80\2\x8a\nl\xfc\x9c", 7, "a.bin", &f, &err), ERR_INVALID);
    assert_non_null(strstr(err.msg, "before PyTorch 1.6"));
}

/* Cut anywhere: refused.  One byte changed anywhere: refused or read, and nothing else happens. */
static void damaged_files_do_no_damage(void **state)
{
    (void)state;
    struct buf p;
    struct zip z;
    struct st_file *f = NULL;
    one_tensor(&p, "FloatStorage", N, 1, (int[]){ 2, 3 }, (int[]){ 1, 2 });
    assert_int_equal(open_pickle(&p, &f, &z), ERR_OK);
    st_close(f);
    for (size_t len = 0; len < z.data.len; len++) {
        char *cut = malloc(len + 1); /* so that a sanitizer sees its end */
        assert_non_null(cut);
        memcpy(cut, z.data.data, len);
        err_clear(&err);
        assert_int_equal(weights_open_mem(cut, len, "a.bin", &f, &err), ERR_INVALID);
        free(cut);
    }
    static const uint8_t flips[] = { 1, 4, 0x20, 0x80, 0xff };
    for (size_t i = 4; i < z.data.len; i++)
        for (size_t k = 0; k < sizeof flips; k++) {
            z.data.data[i] = (char)(z.data.data[i] ^ flips[k]);
            err_clear(&err);
            f = NULL;
            int rc = weights_open_mem(z.data.data, z.data.len, "a.bin", &f, &err);
            assert_true(rc == ERR_OK || (rc == ERR_INVALID && err.msg[0] != '\0'));
            unsigned sum = 0; /* every byte of it can be read */
            for (size_t t = 0; rc == ERR_OK && t < f->ntensors; t++)
                for (size_t b = 0; b < f->tensors[t].bytes; b++)
                    sum += f->tensors[t].data[b];
            assert_true(sum < 1u << 20);
            st_close(f);
            z.data.data[i] = (char)(z.data.data[i] ^ flips[k]);
        }
    err_clear(&err);
    buf_free(&z.data);
    buf_free(&p);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_tensor_has_its_shape_type_and_values),
        cmocka_unit_test(a_tensor_without_elements_is_read),
        cmocka_unit_test(files_of_pytorch_are_read),
        cmocka_unit_test(a_tensor_beyond_its_storage_is_refused),
        cmocka_unit_test(a_pickle_that_could_do_anything_is_refused_by_name),
        cmocka_unit_test(a_pickle_that_multiplies_is_refused_before_it_takes_much_memory),
        cmocka_unit_test(a_name_that_is_used_again_and_again_is_refused),
        cmocka_unit_test(attributes_of_the_dict_mean_nothing),
        cmocka_unit_test(an_archive_of_another_kind_is_refused),
        cmocka_unit_test(damaged_files_do_no_damage),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
