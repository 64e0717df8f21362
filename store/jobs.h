/* jobs.h - fine-tuning jobs: the queue, what a run reports, its resumable state, its checkpoints.
 *
 *   queued -> validating_files -> running -> succeeded | failed | cancelled
 *      ^            |                |
 *      +--- paused <+----------------+     (and back to queued when its process was killed)
 *
 * Two sides.  The API's threads create jobs and wish for things (pause, cancel).  One runner per
 * database file, which holds store_runner_lock(), claims queued jobs, reports, and ends them; only
 * it moves a job out of validating_files and running.  Every claim has a new number, and what the
 * runner writes is refused (ERR_CONFLICT, slug "claim_lost") when the job is not claimed under that
 * number any more.
 *
 * Each call is one transaction, or, for the state's bytes, several short ones of which the last
 * makes it count: a kill at any moment leaves the step, metrics, events, state and checkpoint of
 * one moment.  What a resumed run computes again (steps after its last checkpoint) is written again
 * under the same step and changes nothing.
 *
 * Every change of status writes an event by itself.
 *
 * A full disk is ERR_UNAVAILABLE with nothing written: the runner can pause and try again.
 *
 * The adapter of a checkpoint is a version of a hidden adapter of the job ("ftjob-...:ckpt"), its
 * number the step: no list shows it, it never is live, and it goes with the job.
 * store_version_find() resolves `ft:BASE:TENANT:NAME:JOB` (JOB without "ftjob-") to the version
 * that the job made and `...:ckpt-step-N` to a checkpoint.
 *
 * The rules of store.h about tenants, threads and ownership hold here too.  Numbers that were not
 * measured are NAN, or -1 where they are integers. */
#ifndef STORE_JOBS_H
#define STORE_JOBS_H

#include "store/files.h"
#include "store/store.h"

enum job_status {
    JOB_QUEUED, JOB_VALIDATING, JOB_RUNNING, JOB_PAUSED, JOB_SUCCEEDED, JOB_FAILED, JOB_CANCELLED,
};
const char *job_status_name(enum job_status s); /* "queued", "validating_files", ... */
static inline bool job_ended(enum job_status s) { return s >= JOB_SUCCEEDED; }

enum job_wanted { JOB_GO_ON, JOB_PAUSE, JOB_CANCEL };

struct store_job {
    int64_t id, tenant;
    char ref[STORE_ID_MAX + 1];      /* "ftjob-..." */
    char tenant_name[STORE_NAME_MAX + 1];
    enum job_status status;
    enum job_wanted wanted;          /* of a running one */
    char *model;                     /* as it was asked for */
    char *base_name;
    char base_hash_hex[65];
    char name[STORE_NAME_MAX + 1];   /* of the adapter that will get the version */
    int64_t from_version;            /* id of the version it starts from; 0: none, or gone */
    char *from_ref;                  /* "support@3", also when it is gone; NULL: a new adapter */
    char training_file[STORE_ID_MAX + 1], validation_file[STORE_ID_MAX + 1]; /* "": none */
    uint8_t data_hash[32];           /* of the training file */
    int64_t seed;
    char *params;                    /* JSON for api_train_params() */
    char *method, *hyperparameters;  /* JSON, as clients get them back */
    char *metadata;                  /* JSON object or NULL */
    bool activate;
    char *activate_if;               /* JSON or NULL */
    int64_t created_ms, started_ms, finished_ms; /* 0: not yet */
    int64_t step, steps;             /* steps 0: not known yet */
    int64_t trained_tokens;
    double seconds_per_step;         /* 0: not known */
    char *error_code, *error_message, *error_param; /* NULL: none */
    char *pause_reason;              /* of a paused one, or NULL */
    int64_t result_version;          /* id; 0: none, or deleted */
    int result_number;               /* its number; 0: none */
    int64_t claim;                   /* which claim this is: for the runner's calls */
    int64_t state_step;              /* of the newest state; -1: there is none */
};
void store_job_free(struct store_job *j); /* what it owns */
void store_jobs_free(struct store_job *j, size_t n);
/* "ft:BASE:TENANT:NAME:JOB", with ":ckpt-step-N" if step >= 0; free() it; NULL: out of memory. */
char *store_job_model_name(const struct store_job *j, int64_t step);

/* --- the API's side (jobs.c, job_wish.c) ----------------------------------------------------- */
struct store_job_new {
    const char *model, *base_name, *base_hash_hex;
    const char *name;                /* NULL: "ft-" and the job's own id */
    int64_t from_version;            /* 0: none */
    const char *training_file, *validation_file; /* refs; validation_file NULL: none */
    int64_t seed;
    const char *params, *method, *hyperparameters, *metadata;
    bool activate;
    const char *activate_if;
    const char *eval_file;           /* the file that activate_if names, or NULL */
    const char *idempotency_key;     /* NULL: none */
    uint8_t request_hash[32];        /* of the request, when there is a key */
    int max_active;                  /* so many of the tenant's jobs may be under way, more is
                                      * ERR_BUSY; 0: any number */
};
/* The same idempotency key and hash as before is the job of then (*ret_new false); the same key
 * with another hash is ERR_CONFLICT, slug "idempotency_conflict". */
int store_job_create(struct store *st, int64_t tenant, const struct store_job_new *n,
                     struct store_job *ret, bool *ret_new, struct err *err);
/* The same for the key alone, for requests whose files may be gone since; ERR_NOT_FOUND without a
 * sentence if the key is new. */
int store_job_of_key(struct store *st, int64_t tenant, const char *key, const uint8_t hash[32],
                     struct store_job *ret, struct err *err);
/* ERR_NOT_FOUND with slug "job_not_found". */
int store_job_get(struct store *st, int64_t tenant, const char *ref, struct store_job *ret,
                  struct err *err);
struct store_pair { const char *key, *value; };
/* Newest first; `after` a job's ref or NULL; limit 0: all; only jobs whose metadata has all these
 * pairs. */
int store_job_list(struct store *st, int64_t tenant, const char *after, int limit,
                   const struct store_pair *metadata, size_t nmetadata, struct store_job **ret,
                   size_t *ret_n, struct err *err);
/* What a client may wish.  A queued or paused job is paused, resumed or cancelled at once; a
 * running one when the runner has seen `wanted`.  ERR_CONFLICT where it makes no sense (it has
 * ended); asking twice is fine. */
int store_job_cancel(struct store *st, int64_t tenant, const char *ref, struct store_job *ret,
                     struct err *err);
int store_job_pause(struct store *st, int64_t tenant, const char *ref, struct store_job *ret,
                    struct err *err);
int store_job_resume(struct store *st, int64_t tenant, const char *ref, struct store_job *ret,
                     struct err *err);
/* With its events, metrics and checkpoints, never the version it made.  ERR_CONFLICT if it has not
 * ended. */
int store_job_delete(struct store *st, int64_t tenant, const char *ref, struct err *err);

/* --- what a run leaves to read (job_read.c) -------------------------------------------------- */
enum job_level { JOB_INFO, JOB_WARN, JOB_ERROR };
struct store_event {
    int64_t seq;                     /* 1, 2, ... in the job */
    int64_t at_ms;
    enum job_level level;
    bool metrics;                    /* type "metrics", else "message" */
    char *message;
    char *data;                      /* JSON object or NULL */
};
void store_events_free(struct store_event *e, size_t n);
/* Newest first before seq `before` (0: from the newest), as the list of the API pages them. */
int store_event_list(struct store *st, int64_t job, int64_t before, int limit,
                     struct store_event **ret, size_t *ret_n, struct err *err);
/* Oldest first after seq `after`, and the job's status as of the same moment, for streams. */
int store_event_tail(struct store *st, int64_t job, int64_t after, int limit,
                     struct store_event **ret, size_t *ret_n, enum job_status *ret_status,
                     struct err *err);

/* One optimiser step. */
struct store_metric {
    int64_t step;
    double epoch, loss, valid_loss, accuracy, valid_accuracy, lr, grad_norm, tokens_per_s;
    double orth, threshold;          /* AdaLoRA */
    int64_t tokens, targets, budget, kept; /* budget, kept: AdaLoRA */
};
/* Ascending, steps > since; free() it. */
int store_metric_list(struct store *st, int64_t job, int64_t since, int limit,
                      struct store_metric **ret, size_t *ret_n, struct err *err);
struct store_rank {
    int64_t step;                    /* from this step on */
    int layer, module;               /* enum module */
    int rank;
};
/* Changes of rank with since < step <= until, by step, layer, module; free() it. */
int store_rank_list(struct store *st, int64_t job, int64_t since, int64_t until,
                    struct store_rank **ret, size_t *ret_n, struct err *err);
const char *store_module_name(int module); /* "q", "down", ...; NULL if there is no such module */

struct store_checkpoint {
    int64_t step, created_ms;
    int64_t version_id;
    double train_loss, train_accuracy, valid_loss, valid_accuracy;
};
/* Newest first, step < before (0: from the newest); free() it. */
int store_checkpoint_list(struct store *st, int64_t job, int64_t before, int limit,
                          struct store_checkpoint **ret, size_t *ret_n, struct err *err);

/* --- the runner's side (job_run.c, job_state.c, job_end.c) ----------------------------------- */
/* Only one process at a time runs the jobs of a database: a lock on DB.runner that a killed process
 * lets go.  ERR_BUSY if another one has it.  ":memory:" needs none. */
struct runner_lock;
int store_runner_lock(const char *db_path, struct runner_lock **ret, struct err *err);
void store_runner_unlock(struct runner_lock *l); /* NULL is fine */
/* Jobs that somebody else was running go back to the queue (to paused or cancelled, if that was
 * wanted) with an event that says so: for the holder of the lock, when it starts. */
int store_jobs_requeue(struct store *st, int64_t *ret_n, struct err *err);

/* The next queued job of this base, or ERR_NOT_FOUND without a sentence.  Between tenants: whose
 * last claim is longest ago goes first; inside a tenant: oldest first.  It is validating_files then.
 * `who` is kept with it for people. */
int store_job_claim(struct store *st, const char *base_hash_hex, const char *who,
                    struct store_job *ret, struct err *err);
/* The files are good: it is running, with so many steps to do. */
int store_job_started(struct store *st, int64_t job, int64_t claim, int64_t steps,
                      struct err *err);
/* What is wanted of it.  One indexed read; ERR_CONFLICT "claim_lost", also when it was deleted. */
int store_job_wanted(struct store *st, int64_t job, int64_t claim, enum job_wanted *ret,
                     struct err *err);

struct store_event_new {
    enum job_level level;
    bool metrics;
    int64_t step;                    /* metrics: written once per step, however often computed */
    const char *message, *data;      /* data: JSON object or NULL */
};
/* What happened since the last report.  Any of the lists may be empty.  Reports may gather several
 * steps (one transaction is one fsync). */
struct store_report {
    int64_t step;                    /* done so far; -1: unchanged */
    int64_t trained_tokens;          /* so far, all runs of this job; -1: unchanged */
    double seconds_per_step;         /* 0: unchanged */
    const struct store_metric *metrics;
    size_t nmetrics;
    const struct store_rank *ranks;  /* rows that are as before are not written */
    size_t nranks;
    const struct store_event_new *events;
    size_t nevents;
};
int store_job_report(struct store *st, int64_t job, int64_t claim, const struct store_report *r,
                     struct err *err);

struct store_checkpoint_new {
    int64_t step;
    const void *state;               /* what train_save() gave */
    size_t state_len;
    const struct adapter_src *adapter; /* to be served; NULL: this one is for resuming only */
    double train_loss, train_accuracy, valid_loss, valid_accuracy;
    int keep;                        /* so many servable checkpoints stay, older ones go; 0: all */
};
/* The report and the checkpoint of the same moment: replaces the state before.  The bytes go in
 * first, in short transactions. */
int store_job_checkpoint(struct store *st, int64_t job, int64_t claim, const struct store_report *r,
                         const struct store_checkpoint_new *c, struct err *err);
/* The newest state; free() it.  ERR_NOT_FOUND if there is none; ERR_DB if it is damaged. */
int store_job_state(struct store *st, int64_t job, char **ret, size_t *ret_len, int64_t *ret_step,
                    struct err *err);

/* The ends of a claim.  Each writes the report (NULL: none) in the same transaction; the state goes
 * when the job has ended, checkpoints stay.  A job that would not have ended is cancelled if that was
 * wished for meanwhile, and one that would go back to the queue is paused. */
struct store_quality {
    double train_loss, eval_loss, eval_loss_base; /* mean nll per token, NAN: not measured */
    int64_t eval_tokens;             /* -1: not measured */
};
/* The version (origin "train", parent, hash of the data, quality), live if `activate`, and
 * succeeded.  The same content as a version of that adapter is that version. */
int store_job_succeed(struct store *st, int64_t job, int64_t claim, const struct store_report *r,
                      const struct adapter_src *adapter, const struct store_quality *q,
                      bool activate, struct store_version *ret, struct err *err);
int store_job_fail(struct store *st, int64_t job, int64_t claim, const struct store_report *r,
                   const char *code, const char *message, const char *param, struct err *err);
int store_job_cancelled(struct store *st, int64_t job, int64_t claim, const struct store_report *r,
                        struct err *err);
/* `reason` NULL: it was wished for. */
int store_job_paused(struct store *st, int64_t job, int64_t claim, const struct store_report *r,
                     const char *reason, struct err *err);
/* Back to the queue: the server shuts down. */
int store_job_release(struct store *st, int64_t job, int64_t claim, const struct store_report *r,
                      struct err *err);

#endif
