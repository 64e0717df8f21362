/* store_int.h - for the files of store/ only: the connection, statements, transactions. */
#ifndef STORE_STORE_INT_H
#define STORE_STORE_INT_H

#include "store/files.h"
#include "store/jobs.h"
#include "store/store.h"

#include <pthread.h>
#include <sqlite3.h>

/* Memory that is used again. */
struct room {
    void *p;
    size_t bytes;
};

struct store {
    sqlite3 *db;
    char *path;       /* as given: messages, and DB.pepper */
    int64_t actor;    /* key id for the audit table; 0: none */
    bool has_pepper;  /* pepper[] is read (keys.c) */
    uint8_t pepper[32];
    struct verified *verified; /* [VERIFIED_SLOTS], see verify.c; NULL: nothing was built yet */
    struct room room; /* for the tensors that store_version_build() reads, kept for the next ones */
};

/* --- statements (sql.c) ---------------------------------------------------------------------
 * One prepared statement in use.  Parameters are bound in order.  A failure sticks: later calls do
 * nothing and sql_step() reports it, so a query reads as its SQL, its parameters and one check. */
struct sql {
    sqlite3_stmt *stmt;
    struct store *st;
    struct err *err;
    int rc;   /* first SQLite error, SQLITE_OK so far */
    int next; /* index of the next parameter */
};

struct sql sql_open(struct store *st, const char *text, struct err *err);
void sql_int(struct sql *q, int64_t v);
void sql_real(struct sql *q, double v);
void sql_null(struct sql *q);
/* NULL when v is 0. */
void sql_int_or_null(struct sql *q, int64_t v);
/* Borrowed until sql_close() or sql_reset(); NULL is SQL's NULL. */
void sql_text(struct sql *q, const char *v);
void sql_text_n(struct sql *q, const char *v, size_t len);
void sql_blob(struct sql *q, const void *v, size_t len);
/* 1: a row is ready.  0: no more rows.  -1: failed, q->err is set (a clash of keys sets no text:
 * only the caller knows what the row stands for). */
int sql_step(struct sql *q);
/* Use the statement again with new parameters. */
void sql_reset(struct sql *q);
int64_t sql_col_int(struct sql *q, int i);
double sql_col_real(struct sql *q, int i);
/* NAN for SQL's NULL (which is also what binding NAN gives). */
double sql_col_nan(struct sql *q, int i);
/* Valid until the next step; NULL for SQL's NULL. */
const char *sql_col_text(struct sql *q, int i);
const void *sql_col_blob(struct sql *q, int i, size_t *ret_len);
/* A copy for the caller to free(); NULL for SQL's NULL.  Out of memory sticks. */
char *sql_col_dup(struct sql *q, int i);
/* Into a fixed field, cut if it is longer. */
void sql_col_copy(struct sql *q, int i, char *ret, size_t cap);
/* Finish with the statement.  Returns 0 or the ERR_ code of the failure. */
int sql_close(struct sql *q);

/* sql_step() for a statement without rows, and sql_close(). */
int sql_run(struct sql *q);
/* Statements without parameters or rows. */
int sql_exec(struct store *st, const char *text, struct err *err);
/* The ERR_ code and sentence for an SQLite result. */
int sql_fail(struct store *st, int rc, struct err *err);

/* --- transactions (store.c) ----------------------------------------------------------------- */
/* The writer's lock at once, so that what is read inside stays true until the end. */
int store_begin(struct store *st, struct err *err);
/* One unchanging view of the file for several reads. */
int store_begin_read(struct store *st, struct err *err);
/* Commits if rc is 0, else rolls back.  Returns rc, or why the commit failed. */
int store_end(struct store *st, int rc, struct err *err);
/* One row of the audit table, inside the caller's transaction. */
int store_audit(struct store *st, int64_t tenant, const char *action, struct err *err,
                const char *fmt, ...) __attribute__((format(printf, 5, 6)));
/* Give pages of deleted things back to the file system, a bounded number; failures are nobody's
 * business (the pages are used again anyway). */
void store_shrink(struct store *st);

/* --- adapters (adapters.c) ------------------------------------------------------------------ */
/* What becomes a version. */
struct version_put {
    int64_t tenant;
    const char *name;
    const struct adapter_src *src;
    const struct store_put_opts *o;
    uint8_t base_hash[32];
    /* of a training job; 0 and NULL: an upload */
    int64_t job, parent;
    const uint8_t *data_hash;
    const struct store_quality *quality;
    int checkpoint;   /* > 0: into the job's hidden adapter under this number */
    /* results */
    int64_t adapter, version_id;
    int version;
};
/* Name, base hash, config and content hash are sound; fills base_hash. */
int version_put_check(struct version_put *p, struct err *err);
/* The version, inside the caller's transaction: store_adapter_put() says what it does. */
int version_put(struct store *st, struct version_put *p, struct store_version *ret, bool *ret_new,
                struct err *err);

/* --- chunks (chunks.c): content that is written over several transactions -------------------- */
enum { CHUNKS_PER_COMMIT = 4 };
/* `sql` is INSERT of (tenant_id, owner, [gen,] chunk, data); gen -1: it has none. */
struct chunk_dest {
    const char *sql;
    int64_t tenant, owner, gen;
};
int chunks_put(struct store *st, const struct chunk_dest *d, const void *data, size_t len,
               struct err *err);
/* q gives (chunk, data) in order; closes it.  ERR_DB with `what` if the rows are not `bytes` bytes
 * with this hash. */
int chunks_get(struct sql *q, const char *what, int64_t bytes, const uint8_t hash[32],
               int (*sink)(void *ud, const void *data, size_t len, struct err *err), void *ud);

/* "file-" or "ftjob-" and 16 random characters. */
void ref_make(const char *prefix, char ret[STORE_ID_MAX + 1]);

/* --- jobs (jobs.c) --------------------------------------------------------------------------- */
/* What job_row() reads; add WHERE or ORDER.  Aliases: j job, t tenant. */
#define SELECT_JOB                                                                               \
    "SELECT j.id, j.tenant_id, j.ref, t.name, j.status, j.wanted, j.model, j.base_name,"         \
    " j.base_hash, j.adapter_name, j.from_version_id, j.from_ref, j.training_file,"              \
    " j.validation_file, j.data_hash, j.seed, j.params, j.method, j.hyperparameters, j.metadata," \
    " j.activate, j.activate_if, j.created_ms, j.started_ms, j.finished_ms, j.step, j.steps,"    \
    " j.trained_tokens, j.seconds_per_step, j.error_code, j.error_message, j.error_param,"       \
    " j.pause_reason, j.result_version_id, j.result_number, j.claim, coalesce(j.state_step, -1)" \
    " FROM job j JOIN tenant t ON t.id = j.tenant_id "
/* The one row of q, or ERR_NOT_FOUND without a sentence; closes q. */
int job_one(struct sql *q, struct store_job *ret);
int job_by_id(struct store *st, int64_t id, struct store_job *ret, struct err *err);
/* One event, inside the caller's transaction. */
int job_event(struct store *st, int64_t tenant, int64_t job, const struct store_event_new *e,
              struct err *err);
/* A sentence of level info or another. */
int job_say(struct store *st, const struct store_job *j, enum job_level level, struct err *err,
            const char *fmt, ...) __attribute__((format(printf, 5, 6)));
/* Another status, with `wanted` back to what it is at rest, inside the caller's transaction. */
int job_set_status(struct store *st, int64_t job, enum job_status s, struct err *err);
/* The state's bytes and what a job that has ended needs no more. */
int job_drop_state(struct store *st, int64_t job, struct err *err);
/* --- job_run.c */
/* ERR_CONFLICT "claim_lost" unless it is claimed under this number. */
int job_claimed(struct store *st, int64_t job, int64_t claim, struct store_job *ret,
                struct err *err);
int job_report(struct store *st, const struct store_job *j, const struct store_report *r,
               struct err *err);

/* --- migrations (migrate.c) ----------------------------------------------------------------- */
struct migration {
    int version;
    const char *name;
    const char *sql;
};
int store_migrate(struct store *st, struct err *err);
int store_migrate_with(struct store *st, const struct migration *m, int n, struct err *err);

/* --- versions (versions.c) ------------------------------------------------------------------ */
/* What version_row() reads; add WHERE or ORDER.  Aliases: v version, a adapter, t tenant. */
#define SELECT_VERSION                                                                           \
    "SELECT v.id, v.adapter_id, v.tenant_id, a.name, t.name, v.number, a.live IS v.number,"      \
    " v.method, v.rank_min, v.rank_max, v.alpha, v.params, v.bytes, v.modules, v.hash,"          \
    " v.base_hash, v.base_claimed, v.base_name, v.origin, v.created_ms,"                         \
    " (SELECT pa.name || '@' || p.number FROM version p JOIN adapter pa ON pa.id = p.adapter_id" \
    " WHERE p.id = v.parent_id), (SELECT vj.ref FROM job vj WHERE vj.id = v.job_id),"            \
    " v.data_hash, v.train_loss, v.eval_loss, v.eval_loss_base, v.eval_tokens"                   \
    " FROM version v JOIN adapter a ON a.id = v.adapter_id JOIN tenant t ON t.id = v.tenant_id "

void version_row(struct sql *q, struct store_version *ret);
/* Every row of a SELECT_VERSION, and closes q. */
int version_rows(struct sql *q, struct store_version **ret, size_t *ret_n);
int version_get(struct store *st, int64_t id, struct store_version *ret, struct err *err);

/* --- tensors (tensors.c) -------------------------------------------------------------------- */
/* Modules and chunk rows of a new version, inside the caller's transaction. */
int tensors_put(struct store *st, int64_t tenant, int64_t version_id,
                const struct adapter_src *src, struct err *err);
struct verify;
/* a->modules and a->extras of the version; with `v` also the tensors, into a->own or, with `room`, there
 * (the room's owner frees it, after `a`), and their hash is begun: verify_end() then, also after a failure. */
int tensors_get(struct store *st, int64_t version_id, struct verify *v, struct room *room,
                struct adapter_src *a, struct err *err);
/* A tensor's data in chunk rows: `part` is NULL for extra tensors.  Failures stick in q. */
void tensors_put_chunks(struct sql *q, int64_t tenant, int64_t version_id, size_t seq,
                        const char *part, const void *data, size_t bytes);
int tensors_damaged(struct store *st, int64_t version_id, const char *kind, size_t seq,
                    const char *what, struct err *err);
const char *tensors_dtype_name(enum dtype t); /* NULL if none that is stored */
bool tensors_dtype_parse(const char *name, enum dtype *ret);
const char *tensors_module_name(int module);  /* below MOD_SLOTS */
bool tensors_module_parse(const char *name, int *ret);
enum { TENSOR_CHUNK = 4 << 20, TENSOR_MAX_WIDTH = 1 << 24 };

/* --- extra tensors and weight norms (extras.c) ----------------------------------------------- */
int extras_put(struct store *st, int64_t tenant, int64_t version_id, const struct adapter_src *src,
               struct err *err);
/* a->extras without their data, and that data into memory that is theirs. */
int extras_get(struct store *st, int64_t version_id, struct adapter_src *a, struct err *err);
int extras_get_data(struct store *st, int64_t version_id, struct adapter_src *a, struct err *err);
/* The norms of the base's weights that a DoRA needs: those that are stored for this base, or computed and
 * then stored. */
int extras_add_norms(struct store *st, int64_t version_id, const struct base *base,
                     struct adapter_src *a, struct err *err);

/* --- is what was read what was put in? (verify.c) --------------------------------------------- */
struct verify {
    struct verified *slot;         /* for what was verified before, and now; NULL: always hash */
    int64_t version_id;            /* with a slot */
    const struct adapter_src *src; /* NULL: not begun */
    bool started;
    pthread_t thread;
    pthread_mutex_t lock;
    pthread_cond_t more;
    size_t ready; /* modules whose tensors are there; SIZE_MAX: all tensors */
    bool given_up;
    uint8_t hash[32];
};
/* The slot for a version's sum, or NULL if memory is out. */
struct verified *verify_slot(struct store *st, int64_t version_id);
/* The tensors of src have their places, but not yet their bytes. */
void verify_begin(struct verify *v, const struct adapter_src *src);
/* Those of the first `ready` modules are there. */
void verify_ready(struct verify *v, size_t ready);
/* All are there, or (`all` false) will never be.  Is the hash src's own?  After this src may go. */
bool verify_end(struct verify *v, bool all);

#endif
