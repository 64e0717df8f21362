/* test_keys.c - tenants, access keys, and the pepper file. */
#include "engine/util.h"
#include "store/store_int.h"
#include "tests/support_model.h"
#include "tests/support_store.h"

#include <fcntl.h>
#include <setjmp.h>
#include <sodium.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#include <cmocka.h>

struct fixture {
    char dir[64], db[96], pepper[112];
    struct store *st;
};

static struct err err;

static void ok(int rc)
{
    if (rc != ERR_OK)
        fail_msg("error %d: %s", rc, err.msg);
}

static void expect(enum err_code code, const char *says, int rc)
{
    if (rc != (int)code || err.code != code || strstr(err.msg, says) == NULL)
        fail_msg("expected error %d saying \"%s\", got %d: %s", code, says, rc, err.msg);
}

#define FAILS(code, says, call) (err_clear(&err), expect(code, says, call))

static int setup(void **state)
{
    struct fixture *f = calloc(1, sizeof *f);
    *state = f;
    err_clear(&err);
    support_tmpdir(f->dir);
    snprintf(f->db, sizeof f->db, "%s/a.db", f->dir);
    snprintf(f->pepper, sizeof f->pepper, "%s.pepper", f->db);
    return store_open(f->db, &f->st, &err);
}

static int teardown(void **state)
{
    struct fixture *f = *state;
    store_close(f->st);
    support_remove(f->dir);
    free(f);
    return 0;
}

/* A fresh connection, as a restarted program has. */
static void reopen(struct fixture *f)
{
    store_close(f->st);
    f->st = NULL;
    ok(store_open(f->db, &f->st, &err));
}

static int64_t make_key(struct store *st, int64_t tenant, char key[STORE_KEY_LEN + 1])
{
    int64_t id;
    ok(store_key_create(st, tenant, "laptop", key, &id, &err));
    return id;
}

/* --- tenants ------------------------------------------------------------------------------- */
static void tenant_default_exists_and_stays(void **state)
{
    struct fixture *f = *state;
    struct store_tenant t, *list;
    size_t n;
    int64_t id;
    ok(store_tenant_find(f->st, "default", &id, &err));
    assert_int_equal(id, STORE_TENANT_DEFAULT);
    ok(store_tenant_get(f->st, id, &t, &err));
    assert_string_equal(t.name, "default");
    assert_true(t.created_ms > 1500000000000);
    assert_true(llabs(t.created_ms - now_unix_ms()) < 3600 * 1000);
    FAILS(ERR_CONFLICT, "cannot be removed", store_tenant_remove(f->st, "default", &err));
    ok(store_tenant_list(f->st, &list, &n, &err));
    assert_int_equal(n, 1);
    free(list);
}

static void tenants_are_added_and_removed_when_empty(void **state)
{
    struct fixture *f = *state;
    struct store_tenant t;
    int64_t id, again;
    ok(store_tenant_add(f->st, "acme", &id, &err));
    FAILS(ERR_CONFLICT, "already", store_tenant_add(f->st, "acme", &again, &err));
    FAILS(ERR_INVALID, "Acme", store_tenant_add(f->st, "Acme", &again, &err));
    FAILS(ERR_NOT_FOUND, "nobody", store_tenant_find(f->st, "nobody", &again, &err));
    FAILS(ERR_NOT_FOUND, "nobody", store_tenant_remove(f->st, "nobody", &err));
    FAILS(ERR_NOT_FOUND, "99", store_tenant_get(f->st, 99, &t, &err));

    char key[STORE_KEY_LEN + 1];
    struct store_version v;
    bool is_new;
    make_key(f->st, id, key);
    struct adapter_src *a = support_adapter(1, 1, 1, 4);
    const struct store_put_opts o = { .activate = true, .base_hash_hex = support_base_1,
                                      .origin = "upload" };
    ok(store_adapter_put(f->st, id, "a", a, &o, &v, &is_new, &err));
    store_version_free(&v);
    adapter_src_free(a);
    ok(store_tenant_get(f->st, id, &t, &err));
    assert_int_equal(t.nadapters, 1);
    assert_int_equal(t.nkeys, 1);
    FAILS(ERR_CONFLICT, "1 adapter", store_tenant_remove(f->st, "acme", &err));
    ok(store_adapter_delete(f->st, id, "a", &err));
    ok(store_tenant_remove(f->st, "acme", &err));
    struct store_key k;
    FAILS(ERR_AUTH, "not one of", store_key_check(f->st, key, &k, &err));
    err_clear(&err);
    /* a later tenant of that name is another one */
    ok(store_tenant_add(f->st, "acme", &again, &err));
    assert_true(again > id);
}

/* --- keys ---------------------------------------------------------------------------------- */
static void a_key_opens_its_tenant_and_is_not_in_the_file(void **state)
{
    struct fixture *f = *state;
    int64_t acme, n;
    char key[STORE_KEY_LEN + 1], other[STORE_KEY_LEN + 1];
    struct store_key k;
    ok(store_key_count(f->st, &n, &err));
    assert_int_equal(n, 0);
    ok(store_tenant_add(f->st, "acme", &acme, &err));
    int64_t id = make_key(f->st, acme, key);
    make_key(f->st, 1, other);
    assert_int_equal(strlen(key), 49);
    assert_int_equal(strspn(key + 6, "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
                                     "0123456789-_"), 43);
    assert_memory_equal(key, "lorad_", 6);
    assert_string_not_equal(key, other);
    ok(store_key_check(f->st, key, &k, &err));
    assert_int_equal(k.id, id);
    assert_int_equal(k.tenant, acme);
    assert_string_equal(k.label, "laptop");
    assert_int_equal(strlen(k.prefix), 12);
    assert_memory_equal(k.prefix, key, 12);

    /* another process, another connection */
    reopen(f);
    ok(store_key_check(f->st, key, &k, &err));
    ok(sql_exec(f->st, "PRAGMA wal_checkpoint(TRUNCATE)", &err));
    char *data;
    size_t len;
    ok(file_read(f->db, 1 << 26, &data, &len, &err));
    assert_null(memmem(data, len, key, STORE_KEY_LEN));
    assert_null(memmem(data, len, key + 12, 20));
    free(data);
}

static void the_stored_hash_is_hmac_sha_256_with_the_pepper(void **state)
{
    struct fixture *f = *state;
    char key[STORE_KEY_LEN + 1], *pepper;
    size_t len;
    make_key(f->st, 1, key);
    ok(file_read(f->pepper, 64, &pepper, &len, &err));
    assert_int_equal(len, 32);
    /* RFC 2104 by hand: H((K ^ opad) || H((K ^ ipad) || text)) */
    uint8_t inner[64 + STORE_KEY_LEN], outer[64 + 32], want[32];
    for (int i = 0; i < 64; i++) {
        uint8_t k = i < 32 ? (uint8_t)pepper[i] : 0;
        inner[i] = k ^ 0x36;
        outer[i] = k ^ 0x5c;
    }
    memcpy(inner + 64, key, STORE_KEY_LEN);
    sha256_of(inner, sizeof inner, outer + 64);
    sha256_of(outer, sizeof outer, want);
    struct sql q = sql_open(f->st, "SELECT count(*) FROM access_key WHERE hash = ?", &err);
    sql_blob(&q, want, 32);
    assert_int_equal(sql_step(&q), 1);
    assert_int_equal(sql_col_int(&q, 0), 1);
    ok(sql_close(&q));
    free(pepper);
}

static void wrong_keys_and_revoked_keys_are_refused(void **state)
{
    struct fixture *f = *state;
    char key[STORE_KEY_LEN + 1], wrong[STORE_KEY_LEN + 8];
    struct store_key k;
    int64_t n;
    FAILS(ERR_AUTH, "not one of", store_key_check(f->st, "lorad_0123456789012345678901234567890123456789012", &k, &err));
    int64_t id = make_key(f->st, 1, key);
    static const char *const bad[] = { "", "lorad_", "sk-abc", "lorad_x", "' OR 1=1" };
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        FAILS(ERR_AUTH, "not one of", store_key_check(f->st, bad[i], &k, &err));
        assert_string_equal(err.slug, "invalid_api_key");
    }
    for (size_t i = 0; i < STORE_KEY_LEN; i++) { /* every position counts */
        memcpy(wrong, key, sizeof key);
        wrong[i] = wrong[i] == 'A' ? 'B' : 'A';
        FAILS(ERR_AUTH, "not one of", store_key_check(f->st, wrong, &k, &err));
    }
    snprintf(wrong, sizeof wrong, "%s ", key);
    FAILS(ERR_AUTH, "not one of", store_key_check(f->st, wrong, &k, &err));
    err_clear(&err);
    ok(store_key_check(f->st, key, &k, &err));
    ok(store_key_revoke(f->st, id, &err));
    FAILS(ERR_AUTH, "revoked", store_key_check(f->st, key, &k, &err));
    err_clear(&err);
    ok(store_key_revoke(f->st, id, &err));
    FAILS(ERR_NOT_FOUND, "77", store_key_revoke(f->st, 77, &err));
    err_clear(&err);
    ok(store_key_count(f->st, &n, &err));
    assert_int_equal(n, 0);
    struct store_key *list;
    size_t nkeys;
    ok(store_key_list(f->st, 0, &list, &nkeys, &err));
    assert_int_equal(nkeys, 1);
    assert_true(list[0].revoked);
    free(list);
    ok(store_key_list(f->st, 2, &list, &nkeys, &err));
    assert_int_equal(nkeys, 0);
    free(list);
}

static void labels_are_checked(void **state)
{
    struct fixture *f = *state;
    char key[STORE_KEY_LEN + 1], label[80] = { 0 };
    int64_t id;
    memset(label, 'x', 65);
    FAILS(ERR_INVALID, "64", store_key_create(f->st, 1, label, key, &id, &err));
    FAILS(ERR_INVALID, "control", store_key_create(f->st, 1, "a\nb", key, &id, &err));
    FAILS(ERR_NOT_FOUND, "tenant", store_key_create(f->st, 9, "a", key, &id, &err));
    err_clear(&err);
    ok(store_key_create(f->st, 1, NULL, key, &id, &err));
}

static int64_t writes_seen(struct store *other)
{
    int64_t v;
    ok(store_data_version(other, &v, &err));
    return v;
}

static void last_used_is_written_once_a_minute_and_never_waits(void **state)
{
    struct fixture *f = *state;
    char key[STORE_KEY_LEN + 1];
    struct store_key k;
    struct store *other;
    ok(store_open(f->db, &other, &err));
    make_key(f->st, 1, key);
    int64_t before = writes_seen(other);
    ok(store_key_check(f->st, key, &k, &err));
    assert_true(k.last_used_ms > 0);
    int64_t after = writes_seen(other);
    assert_int_not_equal(before, after);
    for (int i = 0; i < 20; i++)
        ok(store_key_check(f->st, key, &k, &err));
    assert_int_equal(writes_seen(other), after);

    ok(sql_exec(f->st, "UPDATE access_key SET last_used_ms = last_used_ms - 60001", &err));
    ok(store_begin(other, &err)); /* somebody is writing */
    double start = now_mono();
    ok(store_key_check(f->st, key, &k, &err));
    assert_true(now_mono() - start < 5.0); /* the busy timeout is 10 s */
    ok(store_end(other, ERR_OK, &err));
    int64_t old = k.last_used_ms;
    ok(store_key_check(f->st, key, &k, &err));
    assert_true(k.last_used_ms > old);
    store_close(other);
}

/* --- pepper -------------------------------------------------------------------------------- */
static void the_pepper_is_a_private_file(void **state)
{
    struct fixture *f = *state;
    char key[STORE_KEY_LEN + 1];
    struct stat sb;
    struct store_key k;
    assert_int_not_equal(stat(f->pepper, &sb), 0);
    make_key(f->st, 1, key);
    assert_int_equal(stat(f->pepper, &sb), 0);
    assert_int_equal(sb.st_mode & 07777, 0600);
    assert_int_equal(stat(f->db, &sb), 0);
    assert_int_equal(sb.st_mode & 07777, 0600);

    assert_int_equal(chmod(f->pepper, 0640), 0);
    reopen(f);
    FAILS(ERR_IO, "chmod 600", store_key_check(f->st, key, &k, &err));
    assert_int_equal(chmod(f->pepper, 0400), 0);
    err_clear(&err);
    ok(store_key_check(f->st, key, &k, &err));
}

static void a_missing_or_foreign_pepper_is_named(void **state)
{
    struct fixture *f = *state;
    char key[STORE_KEY_LEN + 1], aside[128], again[STORE_KEY_LEN + 1];
    int64_t id;
    struct store_key k;
    int64_t first = make_key(f->st, 1, key);
    snprintf(aside, sizeof aside, "%s.aside", f->pepper);
    assert_int_equal(rename(f->pepper, aside), 0);
    reopen(f);
    FAILS(ERR_IO, "is missing", store_key_check(f->st, key, &k, &err));
    FAILS(ERR_IO, "is missing", store_key_create(f->st, 1, "", again, &id, &err));
    assert_int_not_equal(access(f->pepper, F_OK), 0);

    support_write_file(f->dir, "a.db.pepper", "0123456789abcdef0123456789abcdef", 32);
    assert_int_equal(chmod(f->pepper, 0600), 0);
    FAILS(ERR_IO, "not the pepper", store_key_check(f->st, key, &k, &err));
    support_write_file(f->dir, "a.db.pepper", "short", 5);
    FAILS(ERR_IO, "32 bytes", store_key_check(f->st, key, &k, &err));

    assert_int_equal(rename(aside, f->pepper), 0);
    err_clear(&err);
    ok(store_key_check(f->st, key, &k, &err));

    /* revoking the keys of a lost pepper makes room for a new one */
    assert_int_equal(unlink(f->pepper), 0);
    reopen(f);
    ok(store_key_revoke(f->st, first, &err));
    make_key(f->st, 1, again);
    ok(store_key_check(f->st, again, &k, &err));
    FAILS(ERR_AUTH, "not one of", store_key_check(f->st, key, &k, &err));
}

static void two_connections_share_one_pepper(void **state)
{
    struct fixture *f = *state;
    struct store *other;
    char key[STORE_KEY_LEN + 1], key2[STORE_KEY_LEN + 1];
    struct store_key k;
    ok(store_open(f->db, &other, &err));
    FAILS(ERR_AUTH, "not one of",
          store_key_check(other, "lorad_0123456789012345678901234567890123456789012", &k, &err));
    err_clear(&err);
    make_key(f->st, 1, key);
    ok(store_key_check(other, key, &k, &err));
    make_key(other, 1, key2);
    ok(store_key_check(f->st, key2, &k, &err));
    store_close(other);
}

int main(void)
{
#define T(f) cmocka_unit_test_setup_teardown(f, setup, teardown)
    const struct CMUnitTest tests[] = {
        T(tenant_default_exists_and_stays),
        T(tenants_are_added_and_removed_when_empty),
        T(a_key_opens_its_tenant_and_is_not_in_the_file),
        T(the_stored_hash_is_hmac_sha_256_with_the_pepper),
        T(wrong_keys_and_revoked_keys_are_refused),
        T(labels_are_checked),
        T(last_used_is_written_once_a_minute_and_never_waits),
        T(the_pepper_is_a_private_file),
        T(a_missing_or_foreign_pepper_is_named),
        T(two_connections_share_one_pepper),
    };
    return cmocka_run_group_tests_name("keys", tests, NULL, NULL);
}
