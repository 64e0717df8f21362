/* test_store.c - adapters, versions and tensors in the database. */
#include "engine/util.h"
#include "store/store_int.h"
#include "tests/support_model.h"
#include "tests/support_store.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <cmocka.h>

static const struct store_put_opts live = { .activate = true, .base_hash_hex = support_base_1,
                                            .base_claimed = true, .origin = "upload" };
static const struct store_put_opts quiet = { .activate = false, .base_hash_hex = support_base_1,
                                             .origin = "train" };

static struct err err;

static void ok(int rc)
{
    if (rc != ERR_OK)
        fail_msg("error %d: %s", rc, err.msg);
}

/* The call must fail with `code`; what it said is in err until the next expect() or clear(). */
static void expect(enum err_code code, int rc)
{
    if (rc != (int)code || err.code != code)
        fail_msg("expected error %d, got %d (%d): %s", code, rc, err.code, err.msg);
    assert_true(err.msg[0] != '\0');
}

#define FAILS(code, call) (err_clear(&err), expect(code, call))
#define SAYS(text)                                                                               \
    do {                                                                                         \
        if (strstr(err.msg, text) == NULL)                                                       \
            fail_msg("\"%s\" does not say \"%s\"", err.msg, text);                                \
    } while (0)

static int setup(void **state)
{
    err_clear(&err);
    return store_open(":memory:", (struct store **)state, &err);
}

static int teardown(void **state)
{
    store_close(*state);
    return 0;
}

/* Put an adapter of this content; returns its version number. */
static int put_width(struct store *st, int64_t tenant, const char *name, uint64_t content, int width,
                     const struct store_put_opts *o, bool *ret_new)
{
    struct adapter_src *a = support_adapter(content, 1, 2, width);
    struct store_version v;
    bool is_new;
    ok(store_adapter_put(st, tenant, name, a, o, &v, &is_new, &err));
    if (ret_new != NULL)
        *ret_new = is_new;
    int n = v.version;
    assert_string_equal(v.name, name);
    assert_memory_equal(v.hash, a->hash, 32);
    store_version_free(&v);
    adapter_src_free(a);
    return n;
}

static int put(struct store *st, int64_t tenant, const char *name, uint64_t content,
               const struct store_put_opts *o, bool *ret_new)
{
    return put_width(st, tenant, name, content, 8, o, ret_new);
}

static int live_version(struct store *st, const char *name)
{
    struct store_version v;
    ok(store_version_find(st, 1, name, &v, &err));
    store_version_free(&v);
    return v.version;
}

static int64_t number(struct store *st, const char *query)
{
    struct sql q = sql_open(st, query, &err);
    assert_int_equal(sql_step(&q), 1);
    int64_t n = sql_col_int(&q, 0);
    ok(sql_close(&q));
    return n;
}

/* --- what goes in comes out ---------------------------------------------------------------- */
static void round_trip(struct store *st, const struct adapter_src *a)
{
    struct store_version v;
    struct adapter_src *b;
    bool is_new;
    ok(store_adapter_put(st, 1, "thing", a, &live, &v, &is_new, &err));
    assert_true(is_new);
    assert_int_equal(v.modules, a->nmodules);
    assert_int_equal(v.bytes, a->bytes);
    assert_int_equal(v.params, a->params);
    assert_int_equal(v.rank_min, a->rank_min);
    assert_int_equal(v.rank_max, a->rank_max);
    assert_true(v.alpha == a->alpha);
    assert_true(v.live && v.base_claimed && v.created_ms > 0);
    assert_string_equal(v.base_hash_hex, support_base_1);
    assert_string_equal(v.origin, "upload");
    assert_string_equal(v.tenant_name, "default");
    assert_int_equal(v.method, a->method);
    ok(store_version_load(st, v.id, &b, &err));
    support_same_adapter(a, b, true);
    adapter_src_free(b);
    ok(store_version_modules(st, v.id, &b, &err));
    support_same_adapter(a, b, false);
    adapter_src_free(b);
    store_version_free(&v);
}

static void a_lora_adapter_comes_back_as_it_was(void **state)
{
    struct adapter_src *a = support_adapter(1, 3, 4, 40);
    round_trip(*state, a);
    adapter_src_free(a);
}

static void an_adalora_adapter_keeps_masks_schedule_and_rank_0(void **state)
{
    struct adapter_src *a = support_adalora(2, 6, 24);
    assert_int_equal(a->rank_min, 0);
    round_trip(*state, a);
    adapter_src_free(a);
    assert_int_equal(number(*state, "SELECT count(*) FROM module WHERE mask = '0011'"), 1);
    assert_int_equal(number(*state, "SELECT count(*) FROM module WHERE"
                                    " json_array_length(importance) = init_rank"),
                     number(*state, "SELECT count(*) FROM module WHERE mask IS NOT NULL"));
    assert_int_equal(number(*state, "SELECT rank_after FROM v_version"), 6 * 4 + 10);
    assert_int_equal(number(*state, "SELECT rank_before FROM v_version"), 12 * 4);
    assert_int_equal(number(*state, "SELECT delta_t FROM v_version"), 3);
}

static void tensors_over_4_mib_are_cut_into_chunks(void **state)
{
    /* rank 64, width 20000, F32: 5,120,000 bytes: 4 MiB and the rest */
    struct adapter_src *a = support_adapter(3, 1, 64, 20000);
    round_trip(*state, a);
    adapter_src_free(a);
    assert_int_equal(number(*state, "SELECT count(*) FROM tensor_chunk"), 8);
    assert_int_equal(number(*state, "SELECT max(length(data)) FROM tensor_chunk"), 4 << 20);
    assert_int_equal(number(*state, "SELECT min(length(data)) FROM tensor_chunk"),
                     5120000 - (4 << 20));
}

static void a_tensor_of_exactly_4_mib_is_one_chunk(void **state)
{
    struct adapter_src *a = support_adapter(3, 1, 64, 16384);
    round_trip(*state, a);
    adapter_src_free(a);
    assert_int_equal(number(*state, "SELECT count(*) FROM tensor_chunk"), 4);
}

static void golden_adapter(struct store *st, const char *name)
{
    char dir[128];
    const char *shared = support_shared("golden");
    if (shared == NULL)
        skip();
    const char *root = shared;
    char config[256], *text;
    size_t len;
    struct arch arch;
    struct adapter_src *a;
    snprintf(config, sizeof config, "%s/models/tiny-llama/config.json", root);
    ok(file_read(config, 1 << 20, &text, &len, &err));
    ok(arch_from_config(text, NULL, &arch, &err));
    free(text);
    snprintf(dir, sizeof dir, "%s/adapters/tiny-llama/%s", root, name);
    ok(peft_load_dir(&arch, dir, &a, &err));
    round_trip(st, a);

    /* Byte for byte against the file PEFT wrote, not only against what was parsed. */
    struct st_file *file;
    struct store_version v;
    struct adapter_src *b;
    snprintf(config, sizeof config, "%s/adapter_model.safetensors", dir);
    ok(st_open(config, &file, &err));
    ok(store_version_find(st, 1, "thing", &v, &err));
    ok(store_version_load(st, v.id, &b, &err));
    const bool ada = b->method == METHOD_ADALORA;
    size_t seen = 0;
    for (size_t i = 0; i < b->nmodules; i++) {
        const struct adapter_src_module *m = &b->modules[i];
        const size_t row = (size_t)m->rank * dtype_size(m->dtype);
        const struct { const char *suffix; const void *data; size_t bytes; } parts[] = {
            { ada ? "lora_A" : "lora_A.weight", m->A, row * (size_t)m->in },
            { ada ? "lora_B" : "lora_B.weight", m->B, row * (size_t)m->out },
            { "lora_E", m->E, row },
        };
        for (int p = 0; p < (ada ? 3 : 2); p++, seen++) {
            snprintf(config, sizeof config, "base_model.model.%s.%s", m->path, parts[p].suffix);
            const struct st_tensor *t = st_find(file, config);
            assert_non_null(t);
            assert_int_equal(t->bytes, parts[p].bytes);
            if (t->bytes > 0)
                assert_memory_equal(t->data, parts[p].data, t->bytes);
        }
    }
    assert_int_equal(seen, file->ntensors);
    store_version_free(&v);
    st_close(file);
    adapter_src_free(b);
    adapter_src_free(a);
}

static void pefts_adalora_comes_back_byte_for_byte(void **state)
{
    golden_adapter(*state, "adalora");
}

static void pefts_lora_of_many_ranks_comes_back_byte_for_byte(void **state)
{
    golden_adapter(*state, "lora_hetero");
}

/* --- numbers, live, same content ----------------------------------------------------------- */
static void versions_count_up_and_the_newest_goes_live(void **state)
{
    struct store *st = *state;
    bool is_new;
    assert_int_equal(put(st, 1, "a", 1, &live, &is_new), 1);
    assert_true(is_new);
    assert_int_equal(put(st, 1, "a", 2, &live, &is_new), 2);
    assert_int_equal(live_version(st, "a"), 2);
    assert_int_equal(put(st, 1, "a", 3, &quiet, &is_new), 3);
    assert_int_equal(live_version(st, "a"), 2);
    assert_int_equal(live_version(st, "a@3"), 3);
    ok(store_adapter_promote(st, 1, "a", 1, &err));
    assert_int_equal(live_version(st, "a"), 1);
    ok(store_adapter_promote(st, 1, "a", 1, &err));
    FAILS(ERR_NOT_FOUND, store_adapter_promote(st, 1, "a", 4, &err));
    SAYS("no version 4");
}

static void the_same_content_is_the_same_version(void **state)
{
    struct store *st = *state;
    bool is_new;
    put(st, 1, "a", 1, &live, NULL);
    put(st, 1, "a", 2, &live, NULL);
    assert_int_equal(put(st, 1, "a", 1, &quiet, &is_new), 1);
    assert_false(is_new);
    assert_int_equal(live_version(st, "a"), 2);
    assert_int_equal(put(st, 1, "a", 1, &live, &is_new), 1);
    assert_false(is_new);
    assert_int_equal(live_version(st, "a"), 1);
    assert_int_equal(put(st, 1, "a", 3, &live, &is_new), 3);
    assert_true(is_new);
    /* another adapter, or another base, is another version */
    assert_int_equal(put(st, 1, "b", 1, &live, &is_new), 1);
    assert_true(is_new);
    struct store_put_opts other = live;
    other.base_hash_hex = support_base_2;
    assert_int_equal(put(st, 1, "a", 1, &other, &is_new), 4);
    assert_true(is_new);
}

static void numbers_are_never_used_again(void **state)
{
    struct store *st = *state;
    put(st, 1, "a", 1, &live, NULL);
    put(st, 1, "a", 2, &quiet, NULL);
    put(st, 1, "a", 3, &quiet, NULL);
    ok(store_version_delete(st, 1, "a", 3, &err));
    assert_int_equal(put(st, 1, "a", 4, &quiet, NULL), 4);
    ok(store_adapter_delete(st, 1, "a", &err));
    FAILS(ERR_NOT_FOUND, store_version_find(st, 1, "a", &(struct store_version){ 0 }, &err));
    assert_int_equal(put(st, 1, "a", 1, &live, NULL), 5);
    FAILS(ERR_NOT_FOUND, store_version_find(st, 1, "a@1", &(struct store_version){ 0 }, &err));
}

static void a_live_version_cannot_be_deleted_alone(void **state)
{
    struct store *st = *state;
    put(st, 1, "a", 1, &live, NULL);
    put(st, 1, "a", 2, &live, NULL);
    FAILS(ERR_CONFLICT, store_version_delete(st, 1, "a", 2, &err));
    SAYS("live");
    ok(store_version_delete(st, 1, "a", 1, &err));
    /* nor behind the program's back */
    err_clear(&err);
    assert_int_not_equal(sql_exec(st, "DELETE FROM version", &err), ERR_OK);
    err_clear(&err);
    ok(store_adapter_delete(st, 1, "a", &err));
    assert_int_equal(number(st, "SELECT count(*) FROM version"), 0);
    assert_int_equal(number(st, "SELECT count(*) FROM module"), 0);
    assert_int_equal(number(st, "SELECT count(*) FROM tensor_chunk"), 0);
    FAILS(ERR_NOT_FOUND, store_adapter_delete(st, 1, "a", &err));
}

static void an_adapter_without_a_live_version_says_what_to_ask_for(void **state)
{
    struct store *st = *state;
    struct store_version *list, v;
    size_t n;
    put(st, 1, "a", 1, &quiet, NULL);
    put(st, 1, "a", 2, &quiet, NULL);
    FAILS(ERR_NOT_FOUND, store_version_find(st, 1, "a", &v, &err));
    assert_string_equal(err.slug, "model_not_found");
    SAYS("a@2");
    ok(store_adapter_list(st, 1, NULL, 0, &list, &n, &err));
    assert_int_equal(n, 1);
    assert_int_equal(list[0].version, 2);
    assert_false(list[0].live);
    store_versions_free(list, n);
    /* the last version takes the adapter with it */
    ok(store_version_delete(st, 1, "a", 1, &err));
    ok(store_version_delete(st, 1, "a", 2, &err));
    assert_int_equal(number(st, "SELECT count(*) FROM adapter"), 0);
    assert_int_equal(put(st, 1, "a", 1, &live, NULL), 3);
}

static void lists_are_sorted_and_paged(void **state)
{
    struct store *st = *state;
    struct store_version *list;
    size_t n;
    int64_t count;
    static const char *const names[] = { "c", "a", "e", "b", "d" };
    for (size_t i = 0; i < 5; i++)
        put(st, 1, names[i], i, &live, NULL);
    put(st, 1, "b", 77, &live, NULL);
    ok(store_adapter_list(st, 1, NULL, 2, &list, &n, &err));
    assert_int_equal(n, 2);
    assert_string_equal(list[0].name, "a");
    assert_string_equal(list[1].name, "b");
    assert_int_equal(list[1].version, 2);
    store_versions_free(list, n);
    ok(store_adapter_list(st, 1, "b", 10, &list, &n, &err));
    assert_int_equal(n, 3);
    assert_string_equal(list[0].name, "c");
    assert_string_equal(list[2].name, "e");
    store_versions_free(list, n);
    ok(store_version_list(st, 1, "b", &list, &n, &err));
    assert_int_equal(n, 2);
    assert_int_equal(list[0].version, 1);
    assert_true(!list[0].live && list[1].live);
    store_versions_free(list, n);
    ok(store_adapter_count(st, 1, &count, &err));
    assert_int_equal(count, 5);
    FAILS(ERR_NOT_FOUND, store_version_list(st, 1, "zzz", &list, &n, &err));
}

/* --- refusals ------------------------------------------------------------------------------ */
static void references_that_are_none_are_not_found(void **state)
{
    struct store *st = *state;
    struct store_version v;
    put(st, 1, "a", 1, &live, NULL);
    static const char *const good[] = { "a", "a@1", "default/a", "default/a@1" };
    for (size_t i = 0; i < sizeof good / sizeof good[0]; i++) {
        ok(store_version_find(st, 1, good[i], &v, &err));
        store_version_free(&v);
    }
    static const char *const bad[] = {
        "", "b", "A", "a@", "a@0", "a@2", "a@-1", "a@+1", "a@01", "a@1 ", "a@1@1", "a@live",
        "a@4294967297", "a@99999999999999999999", "/a", "default/", "acme/a", "default/default/a",
        "a' OR '1'='1", "%", "@1",
        "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    };
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        err_clear(&err);
        if (store_version_find(st, 1, bad[i], &v, &err) != ERR_NOT_FOUND)
            fail_msg("\"%s\" was found", bad[i]);
        assert_string_equal(err.slug, "model_not_found");
    }
}

static void names_follow_the_rule(void **state)
{
    (void)state;
    char long_name[66] = { 0 };
    memset(long_name, 'a', 65);
    const char *bad[] = { "", ".a", "-a", "_a", "A", "a b", "a/b", "a@1", "\xc3\xa9", long_name };
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++)
        FAILS(ERR_INVALID, store_name_check("an adapter", bad[i], &err));
    long_name[64] = '\0';
    const char *good[] = { "a", "0", "a.b_c-d", long_name };
    for (size_t i = 0; i < sizeof good / sizeof good[0]; i++)
        ok(store_name_check("an adapter", good[i], &err));
}

static void what_cannot_be_kept_exactly_is_refused(void **state)
{
    struct store *st = *state;
    struct store_version v;
    bool is_new;
    struct adapter_src *a = support_adapter(1, 1, 2, 8);
    FAILS(ERR_INVALID, store_adapter_put(st, 1, "A", a, &live, &v, &is_new, &err));
    FAILS(ERR_NOT_FOUND, store_adapter_put(st, 99, "a", a, &live, &v, &is_new, &err));
    struct store_put_opts o = live;
    o.base_hash_hex = "12";
    FAILS(ERR_INTERNAL, store_adapter_put(st, 1, "a", a, &o, &v, &is_new, &err));
    a->modules[1].scaling = -0.0;
    adapter_src_hash(a, a->hash);
    FAILS(ERR_INVALID, store_adapter_put(st, 1, "a", a, &live, &v, &is_new, &err));
    a->modules[1].scaling = 8;
    FAILS(ERR_INTERNAL, store_adapter_put(st, 1, "a", a, &live, &v, &is_new, &err));
    SAYS("hash");
    adapter_src_hash(a, a->hash);
    a->modules[1].layer = a->modules[0].layer;
    a->modules[1].module = a->modules[0].module;
    FAILS(ERR_INTERNAL, store_adapter_put(st, 1, "a", a, &live, &v, &is_new, &err));
    assert_int_equal(number(st, "SELECT count(*) FROM adapter"), 0);
    assert_int_equal(number(st, "SELECT count(*) FROM adapter_number"), 0);
    assert_int_equal(number(st, "SELECT count(*) FROM audit"), 0);
    adapter_src_free(a);
}

/* --- tenants do not see each other --------------------------------------------------------- */
static void another_tenants_adapter_is_not_found_anywhere(void **state)
{
    struct store *st = *state;
    struct store_version v, *list;
    size_t n;
    int64_t acme, count;
    ok(store_tenant_add(st, "acme", &acme, &err));
    put(st, acme, "secret", 1, &live, NULL);
    put(st, acme, "secret", 2, &quiet, NULL);
    FAILS(ERR_NOT_FOUND, store_version_find(st, 1, "secret", &v, &err));
    FAILS(ERR_NOT_FOUND, store_version_find(st, 1, "secret@1", &v, &err));
    FAILS(ERR_NOT_FOUND, store_version_find(st, 1, "acme/secret", &v, &err));
    FAILS(ERR_NOT_FOUND, store_version_list(st, 1, "secret", &list, &n, &err));
    FAILS(ERR_NOT_FOUND, store_adapter_promote(st, 1, "secret", 2, &err));
    FAILS(ERR_NOT_FOUND, store_version_delete(st, 1, "secret", 2, &err));
    FAILS(ERR_NOT_FOUND, store_adapter_delete(st, 1, "secret", &err));
    ok(store_adapter_list(st, 1, NULL, 0, &list, &n, &err));
    assert_int_equal(n, 0);
    store_versions_free(list, n);
    ok(store_adapter_count(st, 1, &count, &err));
    assert_int_equal(count, 0);
    ok(store_adapter_count(st, 0, &count, &err));
    assert_int_equal(count, 1);

    /* the same name is another adapter, with its own numbers */
    assert_int_equal(put(st, 1, "secret", 3, &live, NULL), 1);
    ok(store_version_find(st, acme, "secret", &v, &err));
    assert_int_equal(v.version, 1);
    assert_string_equal(v.tenant_name, "acme");
    store_version_free(&v);
    ok(store_version_find(st, acme, "acme/secret@2", &v, &err));
    store_version_free(&v);
    ok(store_adapter_delete(st, 1, "secret", &err));
    ok(store_version_find(st, acme, "secret", &v, &err));
    store_version_free(&v);
}

static void the_schema_itself_keeps_tenants_apart(void **state)
{
    struct store *st = *state;
    int64_t acme;
    ok(store_tenant_add(st, "acme", &acme, &err));
    put(st, 1, "a", 1, &live, NULL);
    static const char *const moves[] = {
        "UPDATE version SET tenant_id = 2",
        "UPDATE module SET tenant_id = 2",
        "UPDATE tensor_chunk SET tenant_id = 2",
        "UPDATE adapter SET tenant_id = 2",
    };
    for (size_t i = 0; i < sizeof moves / sizeof moves[0]; i++) {
        struct err why = { .code = ERR_OK };
        if (sql_exec(st, moves[i], &why) == ERR_OK)
            fail_msg("%s was accepted", moves[i]);
    }
    assert_int_equal(number(st, "SELECT count(*) FROM sqlite_schema WHERE type = 'table'"
                                " AND name NOT LIKE 'sqlite_%' AND name <> 'tenant'"
                                " AND sql NOT LIKE '%tenant_id %'"), 0);
}

/* --- audit, damage ------------------------------------------------------------------------- */
static void every_change_says_who_made_it(void **state)
{
    struct store *st = *state;
    put(st, 1, "a", 1, &live, NULL);
    store_actor(st, 7);
    put(st, 1, "a", 2, &quiet, NULL);
    put(st, 1, "a", 2, &quiet, NULL); /* nothing changes, nothing to say */
    ok(store_adapter_promote(st, 1, "a", 2, &err));
    ok(store_version_delete(st, 1, "a", 1, &err));
    ok(store_adapter_delete(st, 1, "a", &err));
    struct sql q = sql_open(st,
                            "SELECT group_concat(action || ' ' || object || ' ' ||"
                            " coalesce(key_id, '-'), ', ') FROM (SELECT * FROM audit ORDER BY id)",
                            &err);
    assert_int_equal(sql_step(&q), 1);
    assert_string_equal(sql_col_text(&q, 0),
                        "adapter.put a@1 -, adapter.promote a@1 -, adapter.put a@2 7,"
                        " adapter.promote a@2 7, version.delete a@1 7, adapter.delete a 7");
    ok(sql_close(&q));
}

static void find_damage(int width)
{
    static const char *const damage[] = {
        "UPDATE tensor_chunk SET data = zeroblob(length(data)) WHERE id = 2",
        "UPDATE tensor_chunk SET data = zeroblob(length(data) - 1) WHERE id = 2",
        "UPDATE tensor_chunk SET chunk = 5 WHERE id = 2",
        "UPDATE tensor_chunk SET part = 'E' WHERE id = 2",
        "DELETE FROM tensor_chunk WHERE id = 2",
        "DELETE FROM tensor_chunk WHERE id = 4",
        "INSERT INTO tensor_chunk SELECT 9, tenant_id, version_id, seq, 'E', 0, x'00'"
        " FROM tensor_chunk WHERE id = 4",
        "UPDATE module SET scaling = scaling * 2 WHERE seq = 0",
        "UPDATE module SET module = 'x' WHERE seq = 0",
        "UPDATE module SET dtype = 'I8' WHERE seq = 1",
        "UPDATE module SET rank = 1 WHERE seq = 1",
        "UPDATE module SET inputs = 1000000000000 WHERE seq = 0",
        "UPDATE module SET init_rank = 1000000000000 WHERE seq = 0",
        "UPDATE module SET mask = 'ab' WHERE seq = 0",
        "UPDATE module SET importance = '[1,2,3]' WHERE seq = 0",
        "UPDATE module SET importance = '[1,2,3,x]' WHERE seq = 0",
        "DELETE FROM module WHERE seq = 0",
        "UPDATE version SET hash = zeroblob(32)",
        "UPDATE version SET method = 'magic'",
    };
    for (size_t i = 0; i < sizeof damage / sizeof damage[0]; i++) {
        struct store *st;
        struct adapter_src *a;
        ok(store_open(":memory:", &st, &err));
        put_width(st, 1, "a", 1, width, &live, NULL);
        ok(store_check(st, &err));
        ok(store_version_load(st, 1, &a, &err));
        adapter_src_free(a);
        ok(sql_exec(st, damage[i], &err));
        err_clear(&err);
        int rc = store_version_load(st, 1, &a, &err);
        if (rc != ERR_DB)
            fail_msg("after %s: error %d, %s", damage[i], rc, err.msg);
        FAILS(ERR_DB, store_check(st, &err));
        err_clear(&err);
        store_close(st);
    }
}

static void damage_is_found_and_named(void **state)
{
    (void)state;
    find_damage(8);
    find_damage(1 << 17); /* 4 MiB: a thread hashes while another reads */
}

static void views_agree_with_what_was_put(void **state)
{
    struct store *st = *state;
    put(st, 1, "a", 1, &live, NULL);
    put(st, 1, "a", 2, &live, NULL);
    assert_int_equal(number(st, "SELECT live FROM v_adapter WHERE adapter = 'a'"), 2);
    assert_int_equal(number(st, "SELECT bytes FROM v_adapter"), 2 * 2 * 2 * 16 * 4);
    assert_int_equal(number(st, "SELECT sum(bytes) FROM v_module WHERE version = 1"),
                     2 * 2 * 16 * 4);
    assert_int_equal(number(st, "SELECT count(*) FROM v_version WHERE live"), 1);
    assert_int_equal(number(st, "SELECT count(*) FROM v_audit WHERE at LIKE '20%Z'"), 4);
}

int main(void)
{
#define T(f) cmocka_unit_test_setup_teardown(f, setup, teardown)
    const struct CMUnitTest tests[] = {
        T(a_lora_adapter_comes_back_as_it_was),
        T(an_adalora_adapter_keeps_masks_schedule_and_rank_0),
        T(tensors_over_4_mib_are_cut_into_chunks),
        T(a_tensor_of_exactly_4_mib_is_one_chunk),
        T(pefts_adalora_comes_back_byte_for_byte),
        T(pefts_lora_of_many_ranks_comes_back_byte_for_byte),
        T(versions_count_up_and_the_newest_goes_live),
        T(the_same_content_is_the_same_version),
        T(numbers_are_never_used_again),
        T(a_live_version_cannot_be_deleted_alone),
        T(an_adapter_without_a_live_version_says_what_to_ask_for),
        T(lists_are_sorted_and_paged),
        T(references_that_are_none_are_not_found),
        T(names_follow_the_rule),
        T(what_cannot_be_kept_exactly_is_refused),
        T(another_tenants_adapter_is_not_found_anywhere),
        T(the_schema_itself_keeps_tenants_apart),
        T(every_change_says_who_made_it),
        T(damage_is_found_and_named),
        T(views_agree_with_what_was_put),
    };
    return cmocka_run_group_tests_name("store", tests, NULL, NULL);
}
