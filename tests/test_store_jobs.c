/* test_store_jobs.c - files and fine-tuning jobs in the store: the queue, reports, checkpoints, ends. */
#include "engine/util.h"
#include "store/store_int.h"
#include "tests/support_model.h"
#include "tests/support_store.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

struct fixture {
    char dir[64], db[96];
    struct store *st;
    int64_t acme, beta;
    char file[STORE_ID_MAX + 1], acme_file[STORE_ID_MAX + 1], beta_file[STORE_ID_MAX + 1];
};

static struct err err;

static void ok(int rc)
{
    if (rc != ERR_OK)
        fail_msg("error %d: %s", rc, err.msg);
}

/* A failure with this code, and this in its sentence or slug. */
static void fails(int rc, int code, const char *says)
{
    if (rc != code || (strstr(err.msg, says) == NULL &&
                       (err.slug == NULL || strstr(err.slug, says) == NULL)))
        fail_msg("error %d (%s): %s", rc, err.slug ? err.slug : "", err.msg);
    err_clear(&err);
}

static void add_file(struct fixture *f, int64_t tenant, char ret[STORE_ID_MAX + 1])
{
    struct store_file file;
    ok(store_file_add(f->st, tenant, "data.jsonl", "fine-tune", "{}\n", 3, 0, &file, &err));
    memcpy(ret, file.ref, sizeof file.ref);
}

static int setup(void **state)
{
    struct fixture *f = calloc(1, sizeof *f);
    *state = f;
    err_clear(&err);
    support_tmpdir(f->dir);
    snprintf(f->db, sizeof f->db, "%s/a.db", f->dir);
    ok(store_open(f->db, &f->st, &err));
    ok(store_tenant_add(f->st, "acme", &f->acme, &err));
    ok(store_tenant_add(f->st, "beta", &f->beta, &err));
    add_file(f, 1, f->file);
    add_file(f, f->acme, f->acme_file);
    add_file(f, f->beta, f->beta_file);
    return 0;
}

static int teardown(void **state)
{
    struct fixture *f = *state;
    store_close(f->st);
    support_remove(f->dir);
    free(f);
    return 0;
}

static int64_t number(struct fixture *f, const char *query)
{
    struct sql q = sql_open(f->st, query, &err);
    assert_int_equal(sql_step(&q), 1);
    int64_t n = sql_col_int(&q, 0);
    ok(sql_close(&q));
    return n;
}

/* --- making jobs ------------------------------------------------------------------------------- */
static struct store_job_new wish(struct fixture *f, int64_t tenant)
{
    return (struct store_job_new){
        .model = "base", .base_name = "some:base", .base_hash_hex = support_base_1,
        .training_file = tenant == 1 ? f->file : tenant == f->acme ? f->acme_file : f->beta_file,
        .seed = 42, .params = "{\"type\":\"lora\"}", .method = "{}", .hyperparameters = "{}",
        .activate = true,
    };
}

static struct store_job create(struct fixture *f, int64_t tenant, const char *name)
{
    struct store_job_new n = wish(f, tenant);
    struct store_job j;
    bool is_new;
    n.name = name;
    ok(store_job_create(f->st, tenant, &n, &j, &is_new, &err));
    assert_true(is_new);
    return j;
}

static struct store_job get(struct fixture *f, const struct store_job *j)
{
    struct store_job got;
    ok(store_job_get(f->st, j->tenant, j->ref, &got, &err));
    return got;
}

static enum job_status status_of(struct fixture *f, const struct store_job *j)
{
    struct store_job got = get(f, j);
    const enum job_status s = got.status;
    store_job_free(&got);
    return s;
}

/* Claims the next job and starts it. */
static struct store_job start(struct fixture *f)
{
    struct store_job j;
    ok(store_job_claim(f->st, support_base_1, "test", &j, &err));
    assert_int_equal(j.status, JOB_VALIDATING);
    ok(store_job_started(f->st, j.id, j.claim, 100, &err));
    return j;
}

static struct store_checkpoint_new checkpoint(int64_t step, const void *state, size_t len,
                                              const struct adapter_src *a)
{
    return (struct store_checkpoint_new){ .step = step, .state = state, .state_len = len,
                                          .adapter = a, .train_loss = 1.5, .train_accuracy = 0.5,
                                          .valid_loss = NAN, .valid_accuracy = NAN };
}

/* Is this sentence among the job's events? */
static bool said(struct fixture *f, const struct store_job *j, const char *text)
{
    struct store_event *e;
    size_t n;
    bool found = false;
    ok(store_event_list(f->st, j->id, 0, 0, &e, &n, &err));
    for (size_t i = 0; i < n; i++)
        found = found || strstr(e[i].message, text) != NULL;
    store_events_free(e, n);
    return found;
}

/* --- files ------------------------------------------------------------------------------------- */
static void a_file_of_many_chunks_comes_back_as_it_was(void **state)
{
    struct fixture *f = *state;
    const size_t len = (17 << 20) + 5; /* five rows, two transactions */
    uint8_t *data = malloc(len), hash[32];
    for (size_t i = 0; i < len; i++)
        data[i] = (uint8_t)(i * 2654435761u >> 13);
    struct store_file file, got;
    struct spool *s;
    const char *path;
    char *back;
    size_t nback;
    ok(store_file_add(f->st, 1, "big.jsonl", "evals", data, len, 0, &file, &err));
    ok(store_file_get(f->st, 1, file.ref, &got, &err));
    sha256_of(data, len, hash);
    assert_memory_equal(got.hash, hash, 32);
    assert_int_equal(got.bytes, len);
    assert_string_equal(got.purpose, "evals");
    assert_string_equal(got.name, "big.jsonl");
    ok(spool_open(f->db, 4 * len, &s, &err));
    ok(store_file_read(f->st, 1, file.ref, s, &err));
    ok(spool_done(s, &path, &err));
    ok(file_read(path, 2 * len, &back, &nback, &err));
    assert_int_equal(nback, len);
    assert_memory_equal(back, data, len);
    free(back);
    spool_close(s);
    ok(spool_open(f->db, len - 1, &s, &err));
    fails(store_file_read(f->st, 1, file.ref, s, &err), ERR_TOO_LARGE, "");
    spool_close(s);
    ok(spool_open(f->db, 4 * len, &s, &err));
    assert_int_equal(number(f, "SELECT max(length(data)) FROM file_chunk"), 4 << 20);
    /* another tenant's */
    fails(store_file_get(f->st, f->acme, file.ref, &got, &err), ERR_NOT_FOUND, "file_not_found");
    fails(store_file_read(f->st, f->acme, file.ref, s, &err), ERR_NOT_FOUND, file.ref);
    fails(store_file_delete(f->st, f->acme, file.ref, &err), ERR_NOT_FOUND, file.ref);
    /* damage is noticed */
    ok(sql_exec(f->st, "UPDATE file_chunk SET data = zeroblob(length(data)) WHERE chunk = 3", &err));
    fails(store_file_read(f->st, 1, file.ref, s, &err), ERR_DB, "damaged");
    ok(sql_exec(f->st, "DELETE FROM file_chunk WHERE chunk = 3", &err));
    fails(store_file_read(f->st, 1, file.ref, s, &err), ERR_DB, "damaged");
    spool_close(s);
    ok(store_file_delete(f->st, 1, file.ref, &err));
    assert_int_equal(number(f, "SELECT count(*) FROM file_chunk"), 3);
    free(data);
}

static void files_are_listed_newest_first_and_paged(void **state)
{
    struct fixture *f = *state;
    struct store_file a, b, c, *list;
    size_t n;
    ok(store_file_add(f->st, f->acme, "a", "evals", "1", 1, 0, &a, &err));
    ok(store_file_add(f->st, f->acme, "b", "fine-tune", "2", 1, 0, &b, &err));
    ok(store_file_add(f->st, f->acme, "c", "evals", "3", 1, 0, &c, &err));
    ok(store_file_list(f->st, f->acme, NULL, NULL, 2, false, &list, &n, &err));
    assert_int_equal(n, 2);
    assert_string_equal(list[0].ref, c.ref);
    assert_string_equal(list[1].ref, b.ref);
    free(list);
    ok(store_file_list(f->st, f->acme, NULL, b.ref, 0, false, &list, &n, &err));
    assert_int_equal(n, 2); /* a, and the fixture's */
    assert_string_equal(list[0].ref, a.ref);
    free(list);
    ok(store_file_list(f->st, f->acme, "evals", NULL, 0, true, &list, &n, &err));
    assert_int_equal(n, 2);
    assert_string_equal(list[0].ref, a.ref);
    assert_string_equal(list[1].ref, c.ref);
    free(list);
    ok(store_file_list(f->st, f->acme, NULL, b.ref, 0, true, &list, &n, &err));
    assert_int_equal(n, 1);
    free(list);
    fails(store_file_list(f->st, 1, NULL, b.ref, 0, false, &list, &n, &err), ERR_NOT_FOUND, b.ref);
}

static void expired_and_half_written_files_go_unless_a_job_needs_them(void **state)
{
    struct fixture *f = *state;
    struct store_file old, needed, got;
    const int64_t now = now_unix_ms();
    ok(store_file_add(f->st, 1, "old", "fine-tune", "x", 1, now + 3600000, &old, &err));
    ok(store_file_add(f->st, 1, "needed", "fine-tune", "y", 1, now + 3600000, &needed, &err));
    struct store_job_new w = wish(f, 1);
    struct store_job j, cancelled;
    bool is_new;
    w.validation_file = needed.ref;
    ok(store_job_create(f->st, 1, &w, &j, &is_new, &err));
    ok(sql_exec(f->st, "UPDATE file SET expires_ms = 5 WHERE expires_ms IS NOT NULL", &err));
    fails(store_file_get(f->st, 1, old.ref, &got, &err), ERR_NOT_FOUND, "file_not_found");
    ok(store_file_get(f->st, 1, needed.ref, &got, &err));
    ok(sql_exec(f->st, "UPDATE file SET status = 'pending', created_ms = 5 WHERE name = 'data.jsonl'"
                " AND tenant_id <> 1", &err));
    ok(sql_exec(f->st, "INSERT INTO file SELECT 99, 1, 'file-fresh', 'n', 'evals', 'pending', 1,"
                " hash, 9e12, NULL FROM file LIMIT 1", &err));
    fails(store_file_get(f->st, 1, "file-fresh", &got, &err), ERR_NOT_FOUND, "file-fresh");
    ok(store_files_clean(f->st, &err));
    assert_int_equal(number(f, "SELECT count(*) FROM file"), 3); /* needed, fresh, the fixture's */
    fails(store_file_delete(f->st, 1, needed.ref, &err), ERR_CONFLICT, "file_in_use");
    ok(store_job_cancel(f->st, 1, j.ref, &cancelled, &err));
    store_job_free(&cancelled);
    fails(store_file_get(f->st, 1, needed.ref, &got, &err), ERR_NOT_FOUND, needed.ref);
    ok(store_files_clean(f->st, &err));
    assert_int_equal(number(f, "SELECT count(*) FROM file"), 2);
    store_job_free(&j);
}

static void a_file_without_a_name_or_tenant_is_refused(void **state)
{
    struct fixture *f = *state;
    struct store_file file;
    char name[STORE_FILE_NAME_MAX + 2];
    memset(name, 'n', sizeof name - 1);
    name[sizeof name - 1] = '\0';
    fails(store_file_add(f->st, 1, "", "evals", "x", 1, 0, &file, &err), ERR_INVALID, "name");
    fails(store_file_add(f->st, 1, name, "evals", "x", 1, 0, &file, &err), ERR_INVALID, "256");
    fails(store_file_add(f->st, 99, "n", "evals", "x", 1, 0, &file, &err), ERR_NOT_FOUND, "99");
    assert_int_equal(number(f, "SELECT count(*) FROM file"), 3);
}

/* --- creation ---------------------------------------------------------------------------------- */
static void a_job_is_what_was_asked_for(void **state)
{
    struct fixture *f = *state;
    struct store_job_new w = wish(f, 1);
    struct store_job j;
    bool is_new;
    w.name = "support";
    w.metadata = "{\"k\":\"v\"}";
    w.activate_if = "{\"max_loss\":2}";
    w.activate = false;
    ok(store_job_create(f->st, 1, &w, &j, &is_new, &err));
    assert_true(is_new);
    assert_int_equal(j.status, JOB_QUEUED);
    assert_string_equal(j.name, "support");
    assert_string_equal(j.base_name, "some:base");
    assert_string_equal(j.base_hash_hex, support_base_1);
    assert_string_equal(j.params, "{\"type\":\"lora\"}");
    assert_string_equal(j.metadata, "{\"k\":\"v\"}");
    assert_string_equal(j.activate_if, "{\"max_loss\":2}");
    assert_string_equal(j.training_file, f->file);
    assert_string_equal(j.validation_file, "");
    assert_false(j.activate);
    assert_null(j.from_ref);
    assert_null(j.error_code);
    assert_int_equal(j.state_step, -1);
    assert_int_equal(j.seed, 42);
    uint8_t hash[32];
    sha256_of("{}\n", 3, hash);
    assert_memory_equal(j.data_hash, hash, 32);
    assert_true(said(f, &j, "Created fine-tuning job"));
    char *name = store_job_model_name(&j, 20);
    char want[640];
    snprintf(want, sizeof want, "ft:some:base:default:support:%s:ckpt-step-20", j.ref + 6);
    assert_string_equal(name, want);
    free(name);
    struct store_job unnamed = create(f, 1, NULL);
    assert_memory_equal(unnamed.name, "ft-", 3);
    assert_string_equal(unnamed.name + 3, unnamed.ref + 6);
    store_job_free(&unnamed);
    store_job_free(&j);
}

static void a_job_that_cannot_be_is_refused(void **state)
{
    struct fixture *f = *state;
    struct store_job j;
    bool is_new;
    struct store_job_new w = wish(f, 1);
    w.training_file = f->acme_file;
    fails(store_job_create(f->st, 1, &w, &j, &is_new, &err), ERR_INVALID, "`training_file`");
    w = wish(f, 1);
    w.validation_file = "file-no";
    fails(store_job_create(f->st, 1, &w, &j, &is_new, &err), ERR_INVALID, "`validation_file`");
    w = wish(f, 1);
    w.eval_file = "file-no";
    fails(store_job_create(f->st, 1, &w, &j, &is_new, &err), ERR_INVALID, "`activate_if`");
    w = wish(f, 1);
    w.name = "Bad Name";
    fails(store_job_create(f->st, 1, &w, &j, &is_new, &err), ERR_INVALID, "invalid_name");
    w = wish(f, 1);
    w.from_version = 77;
    fails(store_job_create(f->st, 1, &w, &j, &is_new, &err), ERR_NOT_FOUND, "77");
    w = wish(f, 1);
    w.max_active = 2;
    for (int i = 0; i < 2; i++) {
        ok(store_job_create(f->st, 1, &w, &j, &is_new, &err));
        store_job_free(&j);
    }
    fails(store_job_create(f->st, 1, &w, &j, &is_new, &err), ERR_BUSY, "2 fine-tuning jobs");
    w = wish(f, f->acme); /* its own count */
    w.max_active = 2;
    ok(store_job_create(f->st, f->acme, &w, &j, &is_new, &err));
    store_job_free(&j);
    assert_int_equal(number(f, "SELECT count(*) FROM job"), 3);
}

static void the_same_key_is_the_same_job(void **state)
{
    struct fixture *f = *state;
    struct store_job_new w = wish(f, 1);
    struct store_job a, b, c;
    bool is_new;
    w.idempotency_key = "k1";
    w.request_hash[0] = 7;
    ok(store_job_create(f->st, 1, &w, &a, &is_new, &err));
    assert_true(is_new);
    w.max_active = 1; /* the limit does not count for what is there */
    ok(store_job_create(f->st, 1, &w, &b, &is_new, &err));
    assert_false(is_new);
    assert_string_equal(a.ref, b.ref);
    w.request_hash[0] = 8;
    fails(store_job_create(f->st, 1, &w, &c, &is_new, &err), ERR_CONFLICT, "idempotency_conflict");
    w = wish(f, f->acme);
    w.idempotency_key = "k1";
    ok(store_job_create(f->st, f->acme, &w, &c, &is_new, &err));
    assert_true(is_new);
    store_job_free(&a);
    store_job_free(&b);
    store_job_free(&c);
}

static void jobs_are_listed_and_filtered_by_metadata(void **state)
{
    struct fixture *f = *state;
    static const char *const metadata[] = { "{\"a\":\"1\"}", NULL, "{\"a\":\"1\",\"b \\\"x\":\"2\"}",
                                            "{\"a\":\"2\"}" };
    struct store_job j[4], *list;
    size_t n;
    bool is_new;
    for (int i = 0; i < 4; i++) {
        struct store_job_new w = wish(f, 1);
        w.metadata = metadata[i];
        ok(store_job_create(f->st, 1, &w, &j[i], &is_new, &err));
    }
    ok(store_job_list(f->st, 1, NULL, 3, NULL, 0, &list, &n, &err));
    assert_int_equal(n, 3);
    assert_string_equal(list[0].ref, j[3].ref);
    store_jobs_free(list, n);
    ok(store_job_list(f->st, 1, j[2].ref, 0, NULL, 0, &list, &n, &err));
    assert_int_equal(n, 2);
    assert_string_equal(list[1].ref, j[0].ref);
    store_jobs_free(list, n);
    const struct store_pair a = { "a", "1" }, both[2] = { { "a", "1" }, { "b \"x", "2" } };
    ok(store_job_list(f->st, 1, NULL, 0, &a, 1, &list, &n, &err));
    assert_int_equal(n, 2);
    store_jobs_free(list, n);
    ok(store_job_list(f->st, 1, NULL, 0, both, 2, &list, &n, &err));
    assert_int_equal(n, 1);
    assert_string_equal(list[0].ref, j[2].ref);
    store_jobs_free(list, n);
    ok(store_job_list(f->st, f->acme, NULL, 0, NULL, 0, &list, &n, &err));
    assert_int_equal(n, 0);
    store_jobs_free(list, n);
    fails(store_job_list(f->st, f->acme, j[0].ref, 0, NULL, 0, &list, &n, &err), ERR_NOT_FOUND,
          "job_not_found");
    for (int i = 0; i < 4; i++)
        store_job_free(&j[i]);
}

/* --- wishes ------------------------------------------------------------------------------------ */
typedef int (*wish_fn)(struct store *, int64_t, const char *, struct store_job *, struct err *);

static void a_wish_changes_what_nobody_runs_and_is_noted_otherwise(void **state)
{
    struct fixture *f = *state;
    static const struct {
        const char *from, *wanted;
        wish_fn wish;
        const char *to, *now_wanted; /* to NULL: refused */
    } cases[] = {
        { "queued", "run", store_job_cancel, "cancelled", "run" },
        { "queued", "run", store_job_pause, "paused", "run" },
        { "queued", "run", store_job_resume, "queued", "run" },
        { "paused", "run", store_job_cancel, "cancelled", "run" },
        { "paused", "run", store_job_pause, "paused", "run" },
        { "paused", "run", store_job_resume, "queued", "run" },
        { "validating_files", "run", store_job_cancel, "validating_files", "cancel" },
        { "validating_files", "run", store_job_pause, "validating_files", "pause" },
        { "running", "run", store_job_cancel, "running", "cancel" },
        { "running", "run", store_job_pause, "running", "pause" },
        { "running", "pause", store_job_resume, "running", "run" },
        { "running", "pause", store_job_cancel, "running", "cancel" },
        { "running", "cancel", store_job_cancel, "running", "cancel" },
        { "running", "cancel", store_job_pause, NULL, "being cancelled" },
        { "running", "cancel", store_job_resume, NULL, "being cancelled" },
        { "cancelled", "run", store_job_cancel, "cancelled", "run" },
        { "cancelled", "run", store_job_pause, NULL, "has cancelled" },
        { "cancelled", "run", store_job_resume, NULL, "has cancelled" },
        { "succeeded", "run", store_job_cancel, NULL, "has succeeded" },
        { "succeeded", "run", store_job_pause, NULL, "job_ended" },
        { "succeeded", "run", store_job_resume, NULL, "job_ended" },
        { "failed", "run", store_job_cancel, NULL, "has failed" },
        { "failed", "run", store_job_pause, NULL, "job_ended" },
        { "failed", "run", store_job_resume, NULL, "job_ended" },
    };
    struct store_job j = create(f, 1, NULL), got;
    fails(store_job_cancel(f->st, f->acme, j.ref, &got, &err), ERR_NOT_FOUND, "job_not_found");
    fails(store_job_pause(f->st, f->acme, j.ref, &got, &err), ERR_NOT_FOUND, "job_not_found");
    fails(store_job_resume(f->st, f->acme, j.ref, &got, &err), ERR_NOT_FOUND, "job_not_found");
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        char text[128];
        snprintf(text, sizeof text, "UPDATE job SET status = '%s', wanted = '%s',"
                 " finished_ms = NULL", cases[i].from, cases[i].wanted);
        ok(sql_exec(f->st, text, &err));
        int rc = cases[i].wish(f->st, 1, j.ref, &got, &err);
        if (cases[i].to == NULL) {
            fails(rc, ERR_CONFLICT, cases[i].now_wanted);
            continue;
        }
        ok(rc);
        if (strcmp(job_status_name(got.status), cases[i].to) != 0)
            fail_msg("case %zu: %s", i, job_status_name(got.status));
        snprintf(text, sizeof text, "SELECT count(*) FROM job WHERE wanted = '%s'"
                 " AND (finished_ms IS NULL) = (status NOT IN ('cancelled'))",
                 cases[i].now_wanted);
        if (strcmp(cases[i].from, "cancelled") != 0)
            assert_int_equal(number(f, text), 1);
        store_job_free(&got);
    }
    store_job_free(&j);
}

/* --- the queue --------------------------------------------------------------------------------- */
static void claims_are_fair_between_tenants_and_in_order_inside_one(void **state)
{
    struct fixture *f = *state;
    struct store_job j[7];
    const int64_t owner[7] = { 1, 1, 1, f->acme, f->acme, f->beta, 1 };
    static const int order[7] = { 0, 3, 5, 1, 4, 2, 6 };
    for (int i = 0; i < 7; i++)
        j[i] = create(f, owner[i], NULL);
    for (int i = 0; i < 7; i++) {
        struct store_job got = start(f);
        assert_string_equal(got.ref, j[order[i]].ref);
        ok(store_job_fail(f->st, got.id, got.claim, NULL, "x", "y", NULL, &err));
        if (i == 2) /* forgetting what ran gives nobody a better turn */
            ok(store_job_delete(f->st, got.tenant, got.ref, &err));
        store_job_free(&got);
    }
    struct store_job none;
    assert_int_equal(store_job_claim(f->st, support_base_1, "test", &none, &err), ERR_NOT_FOUND);
    assert_int_equal(err.code, ERR_OK);
    for (int i = 0; i < 7; i++)
        store_job_free(&j[i]);
}

static void a_job_of_another_base_waits(void **state)
{
    struct fixture *f = *state;
    struct store_job j = create(f, 1, NULL), got;
    assert_int_equal(store_job_claim(f->st, support_base_2, "test", &got, &err), ERR_NOT_FOUND);
    ok(store_job_claim(f->st, support_base_1, "test", &got, &err));
    assert_string_equal(got.ref, j.ref);
    store_job_free(&got);
    store_job_free(&j);
}

static void a_claim_that_was_lost_can_write_nothing(void **state)
{
    struct fixture *f = *state;
    struct store_job made = create(f, 1, NULL), old = start(f);
    int64_t n;
    enum job_wanted w;
    ok(store_job_wanted(f->st, old.id, old.claim, &w, &err));
    assert_int_equal(w, JOB_GO_ON);
    ok(store_jobs_requeue(f->st, &n, &err));
    assert_int_equal(n, 1);
    assert_true(said(f, &made, "it starts again"));
    struct store_job again = start(f);
    assert_true(again.claim != old.claim);
    const struct store_report r = { .step = 5, .trained_tokens = -1 };
    struct adapter_src *a = support_adapter(1, 1, 2, 8);
    const struct store_checkpoint_new c = checkpoint(5, "s", 1, a);
    struct store_version v;
    fails(store_job_wanted(f->st, old.id, old.claim, &w, &err), ERR_CONFLICT, "claim_lost");
    fails(store_job_started(f->st, old.id, old.claim, 1, &err), ERR_CONFLICT, "claim_lost");
    fails(store_job_report(f->st, old.id, old.claim, &r, &err), ERR_CONFLICT, "claim_lost");
    fails(store_job_checkpoint(f->st, old.id, old.claim, &r, &c, &err), ERR_CONFLICT, "claim_lost");
    fails(store_job_succeed(f->st, old.id, old.claim, &r, a, NULL, true, &v, &err), ERR_CONFLICT,
          "claim_lost");
    fails(store_job_fail(f->st, old.id, old.claim, &r, "c", "m", NULL, &err), ERR_CONFLICT,
          "claim_lost");
    fails(store_job_cancelled(f->st, old.id, old.claim, &r, &err), ERR_CONFLICT, "claim_lost");
    fails(store_job_paused(f->st, old.id, old.claim, &r, NULL, &err), ERR_CONFLICT, "claim_lost");
    fails(store_job_release(f->st, old.id, old.claim, &r, &err), ERR_CONFLICT, "claim_lost");
    assert_int_equal(number(f, "SELECT step FROM job"), 0);
    assert_int_equal(number(f, "SELECT count(*) FROM version"), 0);
    assert_int_equal(number(f, "SELECT count(*) FROM job_state_chunk"), 0);
    ok(store_job_report(f->st, again.id, again.claim, &r, &err));
    assert_int_equal(number(f, "SELECT step FROM job"), 5);
    adapter_src_free(a);
    store_job_free(&made);
    store_job_free(&old);
    store_job_free(&again);
}

static void orphans_go_where_they_were_going(void **state)
{
    struct fixture *f = *state;
    static const struct { const char *wanted; enum job_status to; const char *says; } cases[] = {
        { "run", JOB_QUEUED, "it goes on after step 5" },
        { "pause", JOB_PAUSED, "was paused" },
        { "cancel", JOB_CANCELLED, "was cancelled" },
    };
    for (int i = 0; i < 3; i++) {
        struct store_job j = create(f, 1, NULL), run = start(f);
        const struct store_checkpoint_new c = checkpoint(5, "state", 5, NULL);
        const struct store_report r = { .step = 7, .trained_tokens = -1 };
        ok(store_job_checkpoint(f->st, run.id, run.claim, NULL, &c, &err));
        ok(store_job_report(f->st, run.id, run.claim, &r, &err));
        char text[96];
        snprintf(text, sizeof text, "UPDATE job SET wanted = '%s' WHERE id = %lld",
                 cases[i].wanted, (long long)j.id);
        ok(sql_exec(f->st, text, &err));
        int64_t n = 0;
        ok(store_jobs_requeue(f->st, &n, &err));
        assert_int_equal(n, 1);
        assert_int_equal(status_of(f, &j), cases[i].to);
        assert_true(said(f, &j, cases[i].says));
        if (cases[i].to == JOB_QUEUED) { /* what came after the state is done again */
            struct store_job again = start(f);
            assert_int_equal(again.step, 5);
            assert_true(said(f, &j, "step 5 of 100 is done"));
            ok(store_job_cancelled(f->st, again.id, again.claim, NULL, &err));
            store_job_free(&again);
        }
        store_job_free(&j);
        store_job_free(&run);
    }
}

static void a_job_that_ends_its_process_again_and_again_is_paused(void **state)
{
    struct fixture *f = *state;
    struct store_job j = create(f, 1, NULL), again;
    int64_t n;
    for (int i = 1; i <= 18; i++) {
        struct store_job run = start(f);
        if (i == 9) { /* a checkpoint: the count begins again */
            const struct store_checkpoint_new c = checkpoint(5, "state", 5, NULL);
            ok(store_job_checkpoint(f->st, run.id, run.claim, NULL, &c, &err));
        }
        ok(store_jobs_requeue(f->st, &n, &err));
        assert_int_equal(status_of(f, &j), i < 18 ? JOB_QUEUED : JOB_PAUSED);
        store_job_free(&run);
    }
    assert_true(said(f, &j, "10 times in a row"));
    ok(store_job_resume(f->st, 1, j.ref, &again, &err));
    assert_null(again.pause_reason);
    assert_int_equal(again.status, JOB_QUEUED);
    store_job_free(&again);
    store_job_free(&j);
}

static void only_one_holds_the_runners_lock(void **state)
{
    struct fixture *f = *state;
    struct runner_lock *a, *b;
    ok(store_runner_lock(f->db, &a, &err));
    fails(store_runner_lock(f->db, &b, &err), ERR_BUSY, "another process");
    store_runner_unlock(a);
    ok(store_runner_lock(f->db, &b, &err));
    store_runner_unlock(b);
    store_runner_unlock(NULL);
    ok(store_runner_lock(":memory:", &a, &err));
    ok(store_runner_lock(":memory:", &b, &err));
    store_runner_unlock(a);
    store_runner_unlock(b);
}

/* --- reports ----------------------------------------------------------------------------------- */
static struct store_metric metric(int64_t step, double loss)
{
    return (struct store_metric){ .step = step, .epoch = NAN, .loss = loss, .valid_loss = NAN,
                                  .accuracy = 0.25, .valid_accuracy = NAN, .lr = 1e-4,
                                  .grad_norm = 0.5, .tokens_per_s = NAN, .orth = NAN,
                                  .threshold = NAN, .tokens = 100, .targets = 50, .budget = -1,
                                  .kept = -1 };
}

static void what_is_computed_again_is_there_once(void **state)
{
    struct fixture *f = *state;
    struct store_job j = create(f, 1, NULL), run = start(f);
    const struct store_metric m[2] = { metric(1, 3.5), metric(2, 3.25) };
    const struct store_rank k[4] = { { 1, 0, MOD_Q, 8 }, { 1, 1, MOD_V, 8 }, { 2, 0, MOD_Q, 8 },
                                     { 2, 1, MOD_V, 6 } };
    const struct store_event_new e[3] = {
        { JOB_INFO, true, 1, "Step 1/100: training loss=3.50", "{\"step\":1}" },
        { JOB_INFO, true, 2, "Step 2/100: training loss=3.25", "{\"step\":2}" },
        { JOB_WARN, false, 0, "a word of warning", NULL },
    };
    const struct store_report r = { .step = 2, .trained_tokens = 200, .seconds_per_step = 0.5,
                                    .metrics = m, .nmetrics = 2, .ranks = k, .nranks = 4,
                                    .events = e, .nevents = 3 };
    for (int i = 0; i < 2; i++)
        ok(store_job_report(f->st, run.id, run.claim, &r, &err));
    struct store_metric *got;
    struct store_rank *ranks;
    struct store_event *events;
    enum job_status s;
    size_t n;
    ok(store_metric_list(f->st, j.id, -1, 0, &got, &n, &err));
    assert_int_equal(n, 2);
    assert_true(got[1].step == 2 && got[1].loss == 3.25 && isnan(got[1].valid_loss) &&
                got[1].lr == 1e-4 && got[1].tokens == 100 && got[1].budget == -1);
    free(got);
    ok(store_metric_list(f->st, j.id, 1, 1, &got, &n, &err));
    assert_int_equal(n, 1);
    assert_int_equal(got[0].step, 2);
    free(got);
    ok(store_rank_list(f->st, j.id, -1, 100, &ranks, &n, &err));
    assert_int_equal(n, 3); /* q did not change */
    assert_true(ranks[2].step == 2 && ranks[2].layer == 1 && ranks[2].module == MOD_V &&
                ranks[2].rank == 6);
    free(ranks);
    ok(store_rank_list(f->st, j.id, 1, 1, &ranks, &n, &err));
    assert_int_equal(n, 0);
    free(ranks);
    /* created, validating, started; two steps once; the warning twice */
    ok(store_event_tail(f->st, j.id, 3, 0, &events, &n, &s, &err));
    assert_int_equal(n, 4);
    assert_int_equal(s, JOB_RUNNING);
    assert_int_equal(events[0].seq, 4);
    assert_true(events[0].metrics);
    assert_string_equal(events[0].data, "{\"step\":1}");
    assert_int_equal(events[3].level, JOB_WARN);
    assert_null(events[3].data);
    store_events_free(events, n);
    ok(store_event_list(f->st, j.id, 5, 2, &events, &n, &err));
    assert_int_equal(n, 2);
    assert_int_equal(events[0].seq, 4);
    assert_int_equal(events[1].seq, 3);
    store_events_free(events, n);
    struct store_job now = get(f, &j);
    assert_true(now.step == 2 && now.steps == 100 && now.trained_tokens == 200 &&
                now.seconds_per_step == 0.5 && now.started_ms > 0);
    store_job_free(&now);
    /* a bad one leaves nothing */
    const struct store_rank bad = { 3, 0, 99, 1 };
    const struct store_metric third = metric(3, 1);
    const struct store_report w = { .step = 3, .trained_tokens = -1, .metrics = &third,
                                    .nmetrics = 1, .ranks = &bad, .nranks = 1 };
    fails(store_job_report(f->st, run.id, run.claim, &w, &err), ERR_INTERNAL, "99");
    assert_int_equal(number(f, "SELECT count(*) FROM job_metric"), 2);
    assert_null(store_module_name(99));
    assert_null(store_module_name(-1));
    store_job_free(&j);
    store_job_free(&run);
}

/* --- checkpoints ------------------------------------------------------------------------------- */
static void check_state(struct fixture *f, int64_t job, const void *want, size_t want_len,
                        int64_t want_step)
{
    char *got;
    size_t len;
    int64_t step;
    ok(store_job_state(f->st, job, &got, &len, &step, &err));
    assert_int_equal(step, want_step);
    assert_int_equal(len, want_len);
    assert_memory_equal(got, want, len);
    free(got);
}

static void a_state_takes_the_place_of_the_one_before(void **state)
{
    struct fixture *f = *state;
    const size_t len = (21 << 20) + 3;
    uint8_t *big = malloc(len);
    for (size_t i = 0; i < len; i++)
        big[i] = (uint8_t)(i % 251);
    struct store_job j = create(f, 1, NULL), run = start(f);
    char *got;
    size_t n;
    int64_t step;
    fails(store_job_state(f->st, j.id, &got, &n, &step, &err), ERR_NOT_FOUND, "no state");
    struct store_checkpoint_new c = checkpoint(10, big, len, NULL);
    const struct store_metric m = metric(10, 2);
    const struct store_report r = { .step = 10, .trained_tokens = 1000, .metrics = &m,
                                    .nmetrics = 1 };
    ok(store_job_checkpoint(f->st, run.id, run.claim, &r, &c, &err));
    check_state(f, j.id, big, len, 10);
    assert_int_equal(number(f, "SELECT count(*) FROM job_metric"), 1);
    assert_int_equal(number(f, "SELECT count(*) FROM job_checkpoint"), 0);
    /* what a kill in the middle of the next one leaves is nobody's */
    ok(sql_exec(f->st, "INSERT INTO job_state_chunk SELECT NULL, tenant_id, job_id, gen + 1, chunk,"
                " x'00' FROM job_state_chunk WHERE chunk < 2", &err));
    check_state(f, j.id, big, len, 10);
    c = checkpoint(20, "small", 5, NULL);
    ok(store_job_checkpoint(f->st, run.id, run.claim, NULL, &c, &err));
    check_state(f, j.id, "small", 5, 20);
    assert_int_equal(number(f, "SELECT count(*) FROM job_state_chunk"), 1);
    ok(sql_exec(f->st, "UPDATE job_state_chunk SET data = CAST('smell' AS BLOB)", &err));
    fails(store_job_state(f->st, j.id, &got, &n, &step, &err), ERR_DB, "damaged");
    c = checkpoint(0, "small", 5, NULL);
    fails(store_job_checkpoint(f->st, run.id, run.claim, NULL, &c, &err), ERR_INTERNAL, "step 0");
    c = checkpoint(1, "", 0, NULL);
    fails(store_job_checkpoint(f->st, run.id, run.claim, NULL, &c, &err), ERR_INTERNAL, "0 bytes");
    ok(store_job_cancelled(f->st, run.id, run.claim, NULL, &err));
    assert_int_equal(number(f, "SELECT count(*) FROM job_state_chunk"), 0);
    store_job_free(&j);
    store_job_free(&run);
    free(big);
}

static void put_checkpoint(struct fixture *f, const struct store_job *run, int64_t step,
                           uint64_t seed, int keep)
{
    struct adapter_src *a = support_adapter(seed, 2, 2, 8);
    struct store_checkpoint_new c = checkpoint(step, "state", 5, a);
    c.keep = keep;
    ok(store_job_checkpoint(f->st, run->id, run->claim, NULL, &c, &err));
    adapter_src_free(a);
}

static void checkpoints_are_served_by_name_and_in_no_list(void **state)
{
    struct fixture *f = *state;
    struct store_job j = create(f, f->acme, "support"), run = start(f);
    struct store_version v, *list;
    struct store_checkpoint *c;
    size_t n;
    int64_t count;
    for (int i = 1; i <= 4; i++)
        put_checkpoint(f, &run, 10 * i, (uint64_t)i, 2);
    ok(store_checkpoint_list(f->st, j.id, 0, 0, &c, &n, &err));
    assert_int_equal(n, 2);
    assert_true(c[0].step == 40 && c[1].step == 30 && c[0].train_loss == 1.5 &&
                isnan(c[0].valid_loss));
    free(c);
    ok(store_checkpoint_list(f->st, j.id, 40, 1, &c, &n, &err));
    assert_int_equal(n, 1);
    assert_int_equal(c[0].step, 30);
    free(c);
    assert_int_equal(number(f, "SELECT count(*) FROM version"), 2); /* expired ones are gone */
    char *name = store_job_model_name(&j, 30), *gone = store_job_model_name(&j, 20),
         *result = store_job_model_name(&j, -1);
    ok(store_version_find(f->st, f->acme, name, &v, &err));
    assert_int_equal(v.version, 30);
    assert_string_equal(v.origin, "checkpoint");
    assert_false(v.live);
    assert_string_equal(v.job, j.ref);
    struct adapter_src *want = support_adapter(3, 2, 2, 8), *got;
    ok(store_version_load(f->st, v.id, &got, &err));
    support_same_adapter(want, got, true);
    adapter_src_free(want);
    adapter_src_free(got);
    char hidden[STORE_NAME_MAX + 1];
    memcpy(hidden, v.name, sizeof hidden);
    store_version_free(&v);
    fails(store_version_find(f->st, f->acme, gone, &v, &err), ERR_NOT_FOUND, "model_not_found");
    fails(store_version_find(f->st, f->acme, result, &v, &err), ERR_NOT_FOUND, "model_not_found");
    fails(store_version_find(f->st, 1, name, &v, &err), ERR_NOT_FOUND, "model_not_found");
    /* not by the ways of users' adapters */
    ok(store_adapter_list(f->st, f->acme, NULL, 0, &list, &n, &err));
    assert_int_equal(n, 0);
    store_versions_free(list, n);
    ok(store_adapter_count(f->st, 0, &count, &err));
    assert_int_equal(count, 0);
    fails(store_version_list(f->st, f->acme, hidden, &list, &n, &err), ERR_NOT_FOUND, hidden);
    fails(store_adapter_promote(f->st, f->acme, hidden, 30, &err), ERR_NOT_FOUND, hidden);
    fails(store_adapter_delete(f->st, f->acme, hidden, &err), ERR_NOT_FOUND, hidden);
    fails(store_version_delete(f->st, f->acme, hidden, 30, &err), ERR_NOT_FOUND, hidden);
    assert_int_equal(number(f, "SELECT count(*) FROM v_version"), 0);
    assert_int_equal(number(f, "SELECT count(*) FROM v_adapter"), 0);
    assert_int_equal(number(f, "SELECT count(*) FROM v_checkpoint"), 2);
    ok(store_check(f->st, &err));
    /* the same step again, and the same content at another step */
    put_checkpoint(f, &run, 40, 9, 0);
    put_checkpoint(f, &run, 50, 9, 0);
    ok(store_version_find(f->st, f->acme, name, &v, &err));
    store_version_free(&v);
    assert_int_equal(number(f, "SELECT count(*) FROM version"), 2);
    assert_int_equal(number(f, "SELECT count(*) FROM job_checkpoint"), 3);
    put_checkpoint(f, &run, 60, 10, 1);
    assert_int_equal(number(f, "SELECT count(*) FROM version"), 1);
    /* and all of it goes with the job */
    ok(store_job_fail(f->st, run.id, run.claim, NULL, "c", "m", NULL, &err));
    assert_int_equal(number(f, "SELECT count(*) FROM version"), 1);
    ok(store_job_delete(f->st, f->acme, j.ref, &err));
    assert_int_equal(number(f, "SELECT (SELECT count(*) FROM version) + (SELECT count(*) FROM"
                            " adapter) + (SELECT count(*) FROM tensor_chunk) + (SELECT count(*) FROM"
                            " job_event) + (SELECT count(*) FROM job_checkpoint)"), 0);
    free(name);
    free(gone);
    free(result);
    store_job_free(&j);
    store_job_free(&run);
}

static void names_of_trained_models_are_exact(void **state)
{
    struct fixture *f = *state;
    struct store_job j = create(f, 1, "support"), run = start(f);
    struct store_version v;
    put_checkpoint(f, &run, 10, 1, 0);
    static const char *const wrong[] = {
        "ft:some:base:default:support:%s:ckpt-step-11", "ft:some:base:default:support:%s:ckpt-step-",
        "ft:some:base:default:support:%s:ckpt-step-010", "ft:some:base:default:support:%s:ckpt-step-1x",
        "ft:some:base:default:support:%s:ckpt-step-+10", "ft:some:base:acme:support:%s:ckpt-step-10",
        "ft:base:default:support:%s:ckpt-step-10", "ft:some:base:default:other:%s:ckpt-step-10",
        "ft:some:base:default:support:x%s:ckpt-step-10", "ft:default:support:%s:ckpt-step-10",
        "ft:some:base:default:support:%s:ckpt-step-99999999999999999999", "ft:%s", "ft:", "ft:::::",
        "ft:some:base:default:support:%s", "ft::default:support:%s:ckpt-step-10",
    };
    char ref[640];
    for (size_t i = 0; i < sizeof wrong / sizeof wrong[0]; i++) {
        snprintf(ref, sizeof ref, wrong[i], j.ref + 6);
        if (store_version_find(f->st, 1, ref, &v, &err) != ERR_NOT_FOUND)
            fail_msg("%s was found", ref);
        err_clear(&err);
    }
    snprintf(ref, sizeof ref, "ft:some:base:default:support:%s:ckpt-step-10", j.ref + 6);
    ok(store_version_find(f->st, 1, ref, &v, &err));
    store_version_free(&v);
    store_job_free(&j);
    store_job_free(&run);
}

static void a_full_disk_loses_nothing(void **state)
{
    struct fixture *f = *state;
    const size_t len = 40 << 20;
    uint8_t *big = calloc(1, len);
    struct store_job j = create(f, 1, NULL), run = start(f);
    put_checkpoint(f, &run, 10, 1, 0);
    const struct store_metric m = metric(20, 2);
    const struct store_report r = { .step = 20, .trained_tokens = 2000, .metrics = &m,
                                    .nmetrics = 1 };
    struct adapter_src *a = support_adapter(2, 2, 2, 8);
    struct store_checkpoint_new c = checkpoint(20, big, len, a);
    c.keep = 1;
    char text[64];
    snprintf(text, sizeof text, "PRAGMA max_page_count = %lld",
             (long long)number(f, "PRAGMA page_count") + 1200);
    ok(sql_exec(f->st, text, &err));
    fails(store_job_checkpoint(f->st, run.id, run.claim, &r, &c, &err), ERR_UNAVAILABLE, "full");
    check_state(f, j.id, "state", 5, 10);
    assert_int_equal(number(f, "SELECT count(*) FROM job_metric"), 0);
    assert_int_equal(number(f, "SELECT max(step) FROM job_checkpoint"), 10);
    assert_int_equal(number(f, "SELECT count(*) FROM job_state_chunk"), 1);
    ok(store_check(f->st, &err));
    struct store_file file;
    fails(store_file_add(f->st, 1, "big", "evals", big, len, 0, &file, &err), ERR_UNAVAILABLE,
          "full");
    assert_int_equal(number(f, "SELECT count(*) FROM file WHERE name = 'big'"), 0);
    ok(store_job_paused(f->st, run.id, run.claim, NULL, "the disk is full", &err));
    struct store_job now = get(f, &j);
    assert_int_equal(now.status, JOB_PAUSED);
    assert_string_equal(now.pause_reason, "the disk is full");
    store_job_free(&now);
    assert_true(said(f, &j, "paused: the disk is full"));
    /* there is room again */
    ok(sql_exec(f->st, "PRAGMA max_page_count = 4294967294", &err));
    ok(store_job_resume(f->st, 1, j.ref, &now, &err));
    assert_null(now.pause_reason);
    store_job_free(&now);
    assert_true(said(f, &j, "goes on after step 10"));
    struct store_job again = start(f);
    ok(store_job_checkpoint(f->st, again.id, again.claim, &r, &c, &err));
    check_state(f, j.id, big, len, 20);
    store_job_free(&again);
    adapter_src_free(a);
    store_job_free(&j);
    store_job_free(&run);
    free(big);
}

/* --- ends -------------------------------------------------------------------------------------- */
static void success_is_a_version_with_its_history(void **state)
{
    struct fixture *f = *state;
    struct adapter_src *first = support_adapter(1, 2, 2, 8), *trained = support_adapter(2, 2, 2, 8);
    const struct store_put_opts o = { .activate = true, .base_hash_hex = support_base_1,
                                      .origin = "upload" };
    struct store_version from, v;
    bool is_new;
    ok(store_adapter_put(f->st, 1, "support", first, &o, &from, &is_new, &err));
    struct store_job_new w = wish(f, 1);
    struct store_job j, now;
    w.name = "support";
    w.from_version = from.id;
    ok(store_job_create(f->st, 1, &w, &j, &is_new, &err));
    assert_string_equal(j.from_ref, "support@1");
    assert_int_equal(j.from_version, from.id);
    struct store_job run = start(f);
    /* the last checkpoint has the same content */
    const struct store_checkpoint_new c = checkpoint(100, "state", 5, trained);
    ok(store_job_checkpoint(f->st, run.id, run.claim, NULL, &c, &err));
    const struct store_quality q = { 1.25, 1.5, 4, 1000 };
    const struct store_report r = { .step = 100, .trained_tokens = 5000 };
    ok(store_job_succeed(f->st, run.id, run.claim, &r, trained, &q, false, &v, &err));
    assert_string_equal(v.name, "support");
    assert_int_equal(v.version, 2);
    assert_false(v.live);
    assert_string_equal(v.origin, "train");
    assert_string_equal(v.parent, "support@1");
    assert_string_equal(v.job, j.ref);
    assert_true(v.train_loss == 1.25 && v.eval_loss == 1.5 && v.eval_loss_base == 4 &&
                v.eval_tokens == 1000);
    uint8_t hash[32];
    char hex[65];
    sha256_of("{}\n", 3, hash);
    hex32(hash, hex);
    assert_string_equal(v.data_hash_hex, hex);
    now = get(f, &j);
    assert_int_equal(now.status, JOB_SUCCEEDED);
    assert_int_equal(now.result_version, v.id);
    assert_int_equal(now.result_number, 2);
    assert_int_equal(now.step, 100);
    assert_int_equal(now.state_step, -1);
    assert_true(now.finished_ms >= now.started_ms && now.started_ms > 0);
    store_job_free(&now);
    assert_true(said(f, &j, "support@2"));
    store_version_free(&v);
    char *name = store_job_model_name(&j, -1);
    ok(store_version_find(f->st, 1, name, &v, &err));
    assert_int_equal(v.version, 2);
    store_version_free(&v);
    /* the same again is the same version, live this time */
    struct store_job same = create(f, 1, "support"), run2 = start(f);
    ok(store_job_succeed(f->st, run2.id, run2.claim, NULL, trained, NULL, true, &v, &err));
    assert_int_equal(v.version, 2);
    assert_true(v.live);
    store_version_free(&v);
    /* a job goes, its version stays; a version goes, its job stays */
    ok(store_job_delete(f->st, 1, j.ref, &err));
    fails(store_version_find(f->st, 1, name, &v, &err), ERR_NOT_FOUND, "model_not_found");
    ok(store_version_find(f->st, 1, "support@2", &v, &err));
    assert_string_equal(v.job, "");
    store_version_free(&v);
    ok(store_adapter_delete(f->st, 1, "support", &err));
    now = get(f, &same);
    assert_int_equal(now.status, JOB_SUCCEEDED);
    assert_int_equal(now.result_version, 0);
    assert_int_equal(now.result_number, 2);
    store_job_free(&now);
    ok(store_check(f->st, &err));
    free(name);
    store_version_free(&from);
    adapter_src_free(first);
    adapter_src_free(trained);
    store_job_free(&j);
    store_job_free(&run);
    store_job_free(&same);
    store_job_free(&run2);
}

static void a_version_that_is_gone_is_known_by_name(void **state)
{
    struct fixture *f = *state;
    struct adapter_src *a = support_adapter(1, 2, 2, 8);
    const struct store_put_opts o = { .activate = true, .base_hash_hex = support_base_1,
                                      .origin = "upload" };
    struct store_version v;
    struct store_job j;
    bool is_new;
    ok(store_adapter_put(f->st, 1, "support", a, &o, &v, &is_new, &err));
    struct store_job_new w = wish(f, 1);
    w.from_version = v.id;
    ok(store_job_create(f->st, 1, &w, &j, &is_new, &err));
    ok(store_adapter_delete(f->st, 1, "support", &err));
    struct store_job now = get(f, &j);
    assert_int_equal(now.from_version, 0);
    assert_string_equal(now.from_ref, "support@1");
    /* another tenant cannot start from it */
    w = wish(f, f->acme);
    store_version_free(&v);
    ok(store_adapter_put(f->st, 1, "support", a, &o, &v, &is_new, &err));
    w.from_version = v.id;
    struct store_job none;
    fails(store_job_create(f->st, f->acme, &w, &none, &is_new, &err), ERR_INTERNAL, "another tenant");
    store_job_free(&now);
    store_job_free(&j);
    store_version_free(&v);
    adapter_src_free(a);
}

static void a_wish_that_comes_while_the_run_ends_is_not_lost(void **state)
{
    struct fixture *f = *state;
    static const struct {
        wish_fn wish;
        bool release;
        const char *reason;
        enum job_status to;
    } cases[] = {
        { store_job_cancel, false, NULL, JOB_CANCELLED },
        { store_job_cancel, false, "the disk is full", JOB_CANCELLED },
        { store_job_cancel, true, NULL, JOB_CANCELLED },
        { store_job_pause, true, NULL, JOB_PAUSED },
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        struct store_job j = create(f, 1, NULL), run = start(f), now;
        const struct store_checkpoint_new c = checkpoint(5, "state", 5, NULL);
        ok(store_job_checkpoint(f->st, run.id, run.claim, NULL, &c, &err));
        ok(cases[i].wish(f->st, 1, j.ref, &now, &err));
        store_job_free(&now);
        ok(cases[i].release ?
               store_job_release(f->st, run.id, run.claim, NULL, &err) :
               store_job_paused(f->st, run.id, run.claim, NULL, cases[i].reason, &err));
        now = get(f, &j);
        assert_int_equal(now.status, cases[i].to);
        assert_null(now.pause_reason);
        assert_int_equal(now.state_step, cases[i].to == JOB_CANCELLED ? -1 : 5);
        assert_true(said(f, &j, cases[i].to == JOB_CANCELLED ? "was cancelled" : "was paused"));
        store_job_free(&now);
        store_job_free(&run);
        store_job_free(&j);
    }
}

static void other_ends_say_why(void **state)
{
    struct fixture *f = *state;
    struct store_job j = create(f, 1, NULL), run = start(f), now;
    const struct store_report r = { .step = 3, .trained_tokens = 30 };
    ok(store_job_release(f->st, run.id, run.claim, &r, &err));
    assert_int_equal(status_of(f, &j), JOB_QUEUED);
    assert_true(said(f, &j, "server is stopping"));
    store_job_free(&run);
    run = start(f);
    ok(store_job_paused(f->st, run.id, run.claim, &r, NULL, &err));
    assert_int_equal(status_of(f, &j), JOB_PAUSED);
    fails(store_job_delete(f->st, 1, j.ref, &err), ERR_CONFLICT, "job_active");
    ok(store_job_resume(f->st, 1, j.ref, &now, &err));
    store_job_free(&now);
    store_job_free(&run);
    run = start(f);
    ok(store_job_fail(f->st, run.id, run.claim, &r, "invalid_training_file", "line 3 is no JSON",
                      "training_file", &err));
    now = get(f, &j);
    assert_int_equal(now.status, JOB_FAILED);
    assert_string_equal(now.error_code, "invalid_training_file");
    assert_string_equal(now.error_message, "line 3 is no JSON");
    assert_string_equal(now.error_param, "training_file");
    assert_true(now.step == 3 && now.trained_tokens == 30 && now.finished_ms > 0);
    store_job_free(&now);
    assert_true(said(f, &j, "line 3 is no JSON"));
    fails(store_job_delete(f->st, f->acme, j.ref, &err), ERR_NOT_FOUND, "job_not_found");
    ok(store_job_delete(f->st, 1, j.ref, &err));
    struct store_event *e;
    size_t ne;
    enum job_status s;
    fails(store_event_tail(f->st, j.id, 0, 0, &e, &ne, &s, &err), ERR_NOT_FOUND, "deleted");
    store_job_free(&run);
    store_job_free(&j);
}

static void a_tenant_goes_with_its_files_and_ended_jobs(void **state)
{
    struct fixture *f = *state;
    struct store_job j = create(f, f->acme, "support"), run = start(f);
    put_checkpoint(f, &run, 10, 1, 0);
    struct store_tenant t;
    ok(store_tenant_get(f->st, f->acme, &t, &err));
    assert_int_equal(t.nadapters, 0); /* the hidden one is not the tenant's */
    fails(store_tenant_remove(f->st, "acme", &err), ERR_CONFLICT, "1 fine-tuning job that has not");
    ok(store_job_cancelled(f->st, run.id, run.claim, NULL, &err));
    ok(store_tenant_remove(f->st, "acme", &err));
    char text[160];
    snprintf(text, sizeof text, "SELECT (SELECT count(*) FROM job WHERE tenant_id = %lld) +"
             " (SELECT count(*) FROM file WHERE tenant_id = %lld) + (SELECT count(*) FROM version)",
             (long long)f->acme, (long long)f->acme);
    assert_int_equal(number(f, text), 0);
    ok(store_check(f->st, &err));
    store_job_free(&j);
    store_job_free(&run);
}

static void what_happened_is_in_the_audit_table(void **state)
{
    struct fixture *f = *state;
    struct store_job j = create(f, 1, NULL), now;
    ok(store_job_pause(f->st, 1, j.ref, &now, &err));
    store_job_free(&now);
    ok(store_job_resume(f->st, 1, j.ref, &now, &err));
    store_job_free(&now);
    ok(store_job_cancel(f->st, 1, j.ref, &now, &err));
    store_job_free(&now);
    ok(store_job_delete(f->st, 1, j.ref, &err));
    ok(store_file_delete(f->st, 1, f->file, &err));
    assert_int_equal(number(f, "SELECT count(*) FROM v_audit WHERE tenant = 'default' AND action IN"
                            " ('file.put', 'job.create', 'job.pause', 'job.resume', 'job.cancel',"
                            " 'job.delete', 'file.delete')"), 7);
    store_job_free(&j);
}

int main(void)
{
#define T(f) cmocka_unit_test_setup_teardown(f, setup, teardown)
    const struct CMUnitTest tests[] = {
        T(a_file_of_many_chunks_comes_back_as_it_was),
        T(files_are_listed_newest_first_and_paged),
        T(expired_and_half_written_files_go_unless_a_job_needs_them),
        T(a_file_without_a_name_or_tenant_is_refused),
        T(a_job_is_what_was_asked_for),
        T(a_job_that_cannot_be_is_refused),
        T(the_same_key_is_the_same_job),
        T(jobs_are_listed_and_filtered_by_metadata),
        T(a_wish_changes_what_nobody_runs_and_is_noted_otherwise),
        T(claims_are_fair_between_tenants_and_in_order_inside_one),
        T(a_job_of_another_base_waits),
        T(a_claim_that_was_lost_can_write_nothing),
        T(orphans_go_where_they_were_going),
        T(a_job_that_ends_its_process_again_and_again_is_paused),
        T(only_one_holds_the_runners_lock),
        T(what_is_computed_again_is_there_once),
        T(a_state_takes_the_place_of_the_one_before),
        T(checkpoints_are_served_by_name_and_in_no_list),
        T(names_of_trained_models_are_exact),
        T(a_full_disk_loses_nothing),
        T(success_is_a_version_with_its_history),
        T(a_version_that_is_gone_is_known_by_name),
        T(a_wish_that_comes_while_the_run_ends_is_not_lost),
        T(other_ends_say_why),
        T(a_tenant_goes_with_its_files_and_ended_jobs),
        T(what_happened_is_in_the_audit_table),
    };
    return cmocka_run_group_tests_name("store_jobs", tests, NULL, NULL);
}
