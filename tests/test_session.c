/* test_session.c - opening a base with adapters as the commands do: from folders, from the database,
 * with weights; and what is refused. */
#include "server/session.h"
#include "store/store.h"
#include "tests/support_adapter.h"
#include "tests/support_model.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <cmocka.h>

static char dir[64], base_path[96], db_path[96], adapter_dir[96];
static int V;

static void must(int rc, const struct err *err)
{
    if (rc != ERR_OK)
        fail_msg("%s", err->msg);
}

static void write_adapter(const struct arch *a)
{
    static const char config[] = "{\"peft_type\": \"LORA\", \"r\": 4, \"lora_alpha\": 8, "
                                 "\"target_modules\": [\"q_proj\", \"down_proj\"]}";
    struct support_tensor t[64];
    size_t len, n = support_lora_tensors(a, "q_proj", 4, false, "F32", t, 64);
    n += support_lora_tensors(a, "down_proj", 4, false, "F32", t + n, 64 - n);
    char *file = support_tensors_file(t, n, &len);
    snprintf(adapter_dir, sizeof adapter_dir, "%s/adapter", dir);
    assert_int_equal(mkdir(adapter_dir, 0700), 0);
    support_write_file(adapter_dir, "adapter_config.json", config, strlen(config));
    support_write_file(adapter_dir, "adapter_model.safetensors", file, len);
    free(file);
}

/* The adapter twice in the database: `mine` for this base, `other` for another one. */
static void write_db(const struct base *b)
{
    struct err err = { 0 };
    struct store *st;
    struct adapter_src *src;
    struct store_version v;
    bool is_new;
    char other[65];
    memset(other, '5', 64);
    other[64] = '\0';
    snprintf(db_path, sizeof db_path, "%s/lorad.db", dir);
    must(store_open(db_path, &st, &err), &err);
    must(peft_load_dir(&b->arch, adapter_dir, &src, &err), &err);
    const struct store_put_opts right = { true, b->hash_hex, false, "upload" };
    const struct store_put_opts wrong = { true, other, false, "upload" };
    must(store_adapter_put(st, STORE_TENANT_DEFAULT, "mine", src, &right, &v, &is_new, &err), &err);
    store_version_free(&v);
    must(store_adapter_put(st, STORE_TENANT_DEFAULT, "other", src, &wrong, &v, &is_new, &err),
         &err);
    store_version_free(&v);
    adapter_src_free(src);
    store_close(st);
}

static int set_up(void **state)
{
    (void)state;
    struct support_model m = support_model_default("llama");
    struct base_import_opts o = { .name = "random" };
    struct err err = { 0 };
    struct base *b;
    char src[96];
    V = m.V;
    support_tmpdir(dir);
    snprintf(src, sizeof src, "%s/source", dir);
    snprintf(base_path, sizeof base_path, "%s/random.base", dir);
    if (mkdir(src, 0700) != 0)
        return -1;
    support_model_write(&m, src);
    must(base_import(src, base_path, &o, &err), &err);
    must(base_load(base_path, PREC_EXACT, false, &b, &err), &err);
    write_adapter(&b->arch);
    write_db(b);
    base_free(b);
    return 0;
}

static int tear_down(void **state)
{
    (void)state;
    support_remove(dir);
    return 0;
}

/* Open as `lorad x ARGS...` would; returns the exit code. */
static int open_with(struct session *s, const char *const *args)
{
    static const struct opt table[] = { SESSION_OPTIONS("exact"),
                                        { NULL, 0, NULL, NULL, NULL, false } };
    char *argv[16] = { (char[]){ "x" } };
    int argc = 1, code = 0;
    for (; *args != NULL; args++)
        argv[argc++] = strdup(*args);
    struct opts *o = opts_parse(argc, argv, table, "x", NULL, 0, 0, &code);
    if (o != NULL)
        code = session_open(o, s);
    opts_free(o);
    while (--argc > 0)
        free(argv[argc]);
    return code;
}

static int keep(void *ud, int pos, int n, const float *logits, struct err *err)
{
    (void)err;
    memcpy((float *)ud + pos * V, logits, (size_t)(n * V) * sizeof *logits);
    return ERR_OK;
}

/* Logits of a fixed sequence. */
enum { T = 9 };
static float *run_with(const char *const *args)
{
    static const int32_t tokens[T] = { 1, 70, 71, 72, 5, 6, 300, 9, 10 };
    struct err err = { 0 };
    struct session s;
    struct session_runner *r;
    float *out = calloc((size_t)(T * V), sizeof *out);
    assert_int_equal(open_with(&s, args), 0);
    must(session_runner_open(&s, T, &r, &err), &err);
    must(session_run(r, tokens, T, keep, out, &err), &err);
    session_runner_close(r);
    session_close(&s);
    return out;
}

static void same(float *a, float *b)
{
    assert_memory_equal(a, b, (size_t)(T * V) * sizeof *a);
    free(a);
    free(b);
}

static void an_adapter_from_the_database_gives_the_bits_of_its_folder(void **state)
{
    (void)state;
    char weighted[128];
    snprintf(weighted, sizeof weighted, "%s:-0.5", adapter_dir);
    same(run_with((const char *[]){ "--base", base_path, "--adapter", adapter_dir, NULL }),
         run_with((const char *[]){ "--base", base_path, "--db", db_path, "--adapter", "mine@1",
                                    NULL }));
    same(run_with((const char *[]){ "--base", base_path, "--adapter", weighted, NULL }),
         run_with((const char *[]){ "--base", base_path, "--db", db_path, "--adapter=mine:-0.5",
                                    "--threads", "2", NULL }));
}

static void weights_of_the_same_adapter_add_up(void **state)
{
    (void)state;
    char quarter[128], three[128], none[128];
    snprintf(quarter, sizeof quarter, "%s:0.25", adapter_dir);
    snprintf(three, sizeof three, "%s:0.75", adapter_dir);
    snprintf(none, sizeof none, "%s:-1", adapter_dir);
    float *one = run_with((const char *[]){ "--base", base_path, "-a", adapter_dir, NULL });
    float *bare = run_with((const char *[]){ "--base", base_path, NULL });
    assert_memory_not_equal(one, bare, (size_t)(T * V) * sizeof *one);
    same(one, run_with((const char *[]){ "--base", base_path, "-a", quarter, "-a", three, NULL }));
    same(bare, run_with((const char *[]){ "--base", base_path, "-a", none, "-a", adapter_dir,
                                          NULL }));
}

static void what_cannot_be_opened_is_refused(void **state)
{
    (void)state;
    struct session s;
    static const struct {
        const char *args[8];
        int code;
    } bad[] = {
        { { NULL }, 2 },
        { { "--base", "/nonexistent.base", NULL }, 1 },
        { { "--base", base_path, "--precision", "best", NULL }, 2 },
        { { "--base", base_path, "--kernel", "abacus", NULL }, 2 },
        { { "--base", base_path, "--threads", "-1", NULL }, 2 },
        { { "--base", base_path, "--adapter", "/nonexistent", NULL }, 1 },
        { { "--base", base_path, "--adapter", "mine", NULL }, 1 },
        { { "--base", base_path, "--db", "/nonexistent.db", "--adapter", "mine", NULL }, 1 },
        { { "--base", base_path, "--db", db_path, "--adapter", "nobody", NULL }, 1 },
        { { "--base", base_path, "--db", db_path, "--adapter", "mine@2", NULL }, 1 },
        { { "--base", base_path, "--db", db_path, "--adapter", "mine:nan", NULL }, 1 },
        { { "--base", base_path, "--db", db_path, "--adapter", "other", NULL }, 1 },
        { { "--base", base_path, "--db", db_path, "--tenant=acme", "--adapter", "mine", NULL }, 1 },
    };
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++)
        if (open_with(&s, bad[i].args) != bad[i].code)
            fail_msg("case %zu did not exit with %d", i, bad[i].code);
}

static void more_tokens_than_positions_are_refused(void **state)
{
    (void)state;
    struct err err = { 0 };
    struct session s;
    struct session_runner *r;
    assert_int_equal(open_with(&s, (const char *[]){ "--base", base_path, NULL }), 0);
    assert_int_equal(session_runner_open(&s, 513, &r, &err), ERR_INVALID);
    assert_non_null(strstr(err.msg, "512"));
    session_close(&s);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(an_adapter_from_the_database_gives_the_bits_of_its_folder),
        cmocka_unit_test(weights_of_the_same_adapter_add_up),
        cmocka_unit_test(what_cannot_be_opened_is_refused),
        cmocka_unit_test(more_tokens_than_positions_are_refused),
    };
    return cmocka_run_group_tests(tests, set_up, tear_down);
}
