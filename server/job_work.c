/* job_work.c - one job in the thread that trains: data, training, measuring the result.
 *
 * This thread and its pool compute at idle priority.  It touches neither the database nor anything that
 * serving locks: what has to be written it hands over (job_ask). */
#include "server/job_runner_int.h"

#include "engine/util.h"
#include "server/train_args.h"

#include <errno.h>
#include <math.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <time.h>

enum {
    CHECKPOINTS_KEPT = 10,
    TRIES = 3,              /* to write a checkpoint, a second apart */
    UNWRITTEN_MAX = 1000,   /* steps that may wait for a database that is busy or full */
};
#define REPORT_SECONDS 1.0
#define STATE_MAX ((size_t)1 << 40)

/* This thread, and those that it makes. */
static void be_idle(void)
{
    const struct sched_param none = { 0 };
    if (sched_setscheduler(0, SCHED_IDLE, &none) != 0)
        setpriority(PRIO_PROCESS, 0, 19); /* of a thread, on Linux */
}

static bool stop(void *ud)
{
    struct job_run *run = ud;
    return atomic_load(&run->wanted) != TRAIN_GO_ON;
}

/* --- data --------------------------------------------------------------------------------------------------- */
static bool stop_reading(void *ud, uint64_t done, uint64_t total)
{
    (void)done;
    (void)total;
    return stop(ud);
}

/* Ids and learn bytes, and the list of examples, of which the shortest has two tokens. */
static const size_t token_bytes = 5, most_token_bytes = 5 + sizeof(struct train_example) / 2;

static size_t set_bytes(const struct train_set *s)
{
    return s != NULL ? (size_t)s->tokens * token_bytes + s->n * sizeof *s->examples : 0;
}

/* *left: bytes that the run may take, less what the set takes from here on. */
static int read_set(struct job_run *run, enum job_file which, size_t *left, struct err *err)
{
    static const struct { const char *slug, *param; } words[] = {
        [JOB_FILE_TRAIN] = { "invalid_training_file", "training_file" },
        [JOB_FILE_VALID] = { "invalid_validation_file", "validation_file" },
        [JOB_FILE_EVAL] = { "invalid_evaluation_file", "activate_if" },
    };
    const struct job_runner_opts *o = &run->r->o;
    const struct dataset_model m = { o->base, o->tokenizer, o->chat };
    const struct dataset_opts d = { .max_length = run->opts.max_length,
                                    .max_tokens = *left / most_token_bytes + 1,
                                    .now = run->job->created_ms / 1000 };
    const char *path;
    if (run->files[which] == NULL)
        return ERR_OK;
    int rc = spool_done(run->files[which], &path, err);
    if (rc == ERR_OK)
        rc = dataset_read(&m, path, &d, stop_reading, run, NULL, &run->sets[which], err);
    if (rc == ERR_TOO_LARGE) {
        err_clear(err);
        rc = err_set_slug(err, rc, "out_of_memory", NULL, "the data does not fit in memory: `%s` has more "
                          "than %llu tokens; %s", words[which].param, (unsigned long long)d.max_tokens,
                          o->memory_why);
    }
    if (rc == ERR_INVALID)
        err->slug = words[which].slug;
    if (rc == ERR_INVALID || rc == ERR_TOO_LARGE)
        err->param = words[which].param;
    const size_t taken = set_bytes(run->sets[which]);
    *left = *left > taken ? *left - taken : 0;
    return rc;
}

/* Of what is looked at, the set with the longest example: measuring the result takes memory for it too. */
static const struct train_set *longest_look(const struct job_run *run)
{
    const struct train_set *longest = run->sets[JOB_FILE_VALID];
    int most = 0;
    for (int i = JOB_FILE_VALID; i <= JOB_FILE_EVAL; i++)
        for (size_t k = 0; run->sets[i] != NULL && k < run->sets[i]->n; k++)
            if (run->sets[i]->examples[k].n > most) {
                most = run->sets[i]->examples[k].n;
                longest = run->sets[i];
            }
    return longest;
}

/* --- hooks --------------------------------------------------------------------------------------------------- */
static enum train_event wanted(void *ud)
{
    struct job_run *run = ud;
    run->stepped = false;
    return (enum train_event)atomic_load(&run->wanted);
}

static int write_report(struct job_run *run, void *arg, struct err *err)
{
    const struct store_report rep = job_report_view(&run->report);
    (void)arg;
    return store_job_report(run->r->st, run->job->id, run->job->claim, &rep, err);
}

static int step(void *ud, struct train *t, const struct train_report *r, const struct train_valid *v,
                struct err *err)
{
    struct job_run *run = ud;
    int rc = job_report_step(&run->report, t, r, v, err);
    run->stepped = true;
    run->quality.train_loss = r->loss;
    if (rc != ERR_OK || now_mono() - run->report.sent < REPORT_SECONDS)
        return rc;
    rc = job_ask(run, write_report, NULL, err);
    if (rc == ERR_OK)
        job_report_sent(&run->report);
    if (rc != ERR_UNAVAILABLE || run->report.nmetrics > UNWRITTEN_MAX)
        return rc;
    err_clear(err); /* it is gathered on; a checkpoint decides */
    run->report.sent = now_mono();
    return ERR_OK;
}

static int write_checkpoint(struct job_run *run, void *arg, struct err *err)
{
    const struct store_report rep = job_report_view(&run->report);
    return store_job_checkpoint(run->r->st, run->job->id, run->job->claim, &rep, arg, err);
}

/* The state always; an adapter to be served when it is a checkpoint of the schedule, and not one because the
 * run is interrupted. */
static int checkpoint(void *ud, struct train *t, const struct train_report *r,
                      const struct train_valid *v, struct err *err)
{
    struct job_run *run = ud;
    struct adapter_src *a = NULL;
    struct buf state;
    if (train_step_now(t) == 0)
        return ERR_OK; /* nothing that starting anew does not give */
    buf_init(&state, STATE_MAX);
    int rc = train_save(t, &state, err);
    if (rc == ERR_OK && run->stepped)
        rc = train_export(t, &a, err);
    const struct store_checkpoint_new c = {
        .step = train_step_now(t), .state = state.data, .state_len = state.len, .adapter = a,
        .train_loss = run->stepped ? r->loss : NAN,
        .train_accuracy = run->stepped ? r->accuracy : NAN,
        .valid_loss = v != NULL ? v->loss : NAN, .valid_accuracy = v != NULL ? v->accuracy : NAN,
        .keep = CHECKPOINTS_KEPT,
    };
    for (int i = 1; rc == ERR_OK; i++) {
        rc = job_ask(run, write_checkpoint, (void *)&c, err);
        if (rc != ERR_UNAVAILABLE || i == TRIES || stop(run))
            break;
        err_clear(err); /* whoever keeps the database busy may be done by then */
        rc = ERR_OK;
        nanosleep(&(struct timespec){ .tv_sec = 1 }, NULL);
    }
    if (rc == ERR_OK) {
        job_report_sent(&run->report);
        run->kept_step = c.step;
    }
    adapter_src_free(a);
    buf_free(&state);
    return rc;
}

/* --- the result ------------------------------------------------------------------------------------------------ */
/* Mean loss on a set with an adapter, or (NULL) of the bare base: that is a LoRA that has learned nothing. */
static int measure(struct job_run *run, const struct adapter_src *a, const struct train_set *set,
                   struct train_valid *ret, struct err *err)
{
    struct train_opts o;
    struct train *t = NULL;
    train_opts_init(&o);
    o.method = a != NULL ? a->method : METHOD_LORA;
    o.rank = a != NULL ? o.rank : 1;
    o.micro_tokens = run->opts.micro_tokens;
    int rc = train_create(run->r->o.base, &run->compute, &o, set, NULL, a, &t, err);
    if (rc == ERR_OK)
        rc = train_evaluate(t, set, stop, run, ret, err);
    train_destroy(t);
    train_opts_free(&o);
    return rc;
}

static int judge(struct job_run *run, struct err *err)
{
    const struct train_set *set = run->sets[JOB_FILE_EVAL] != NULL ? run->sets[JOB_FILE_EVAL]
                                                                   : run->sets[JOB_FILE_VALID];
    struct train_valid mine, bare;
    if (set == NULL)
        return ERR_OK;
    int rc = measure(run, run->result, set, &mine, err);
    if (rc == ERR_OK)
        rc = measure(run, NULL, set, &bare, err);
    if (rc != ERR_OK)
        return rc;
    run->quality.eval_loss = mine.loss;
    run->quality.eval_loss_base = bare.loss;
    run->quality.eval_tokens = (int64_t)mine.targets;
    const char *what = run->sets[JOB_FILE_EVAL] != NULL ? "evaluation" : "validation";
    if (isnan(run->max_loss))
        return job_report_event(&run->report, JOB_INFO, err, "Loss on the %s file: %.4f, of the base "
                                "alone %.4f", what, mine.loss, bare.loss);
    const bool good = mine.loss <= run->max_loss;
    return job_report_event(&run->report, good ? JOB_INFO : JOB_WARN, err,
                            "Loss on the %s file: %.4f, of the base alone %.4f; activate_if allows "
                            "%.4f: the version %s", what, mine.loss, bare.loss, run->max_loss,
                            good ? "goes live" : "does not go live");
}

/* --- the run ----------------------------------------------------------------------------------------------------- */
static int write_started(struct job_run *run, void *arg, struct err *err)
{
    const int64_t *steps = arg;
    return store_job_started(run->r->st, run->job->id, run->job->claim, *steps, err);
}

static int prepare(struct job_run *run, struct err *err)
{
    const struct job_runner_opts *o = &run->r->o;
    struct train_estimate e;
    size_t left = o->memory;
    int rc = ERR_OK;
    for (int i = 0; i < 3 && rc == ERR_OK; i++)
        rc = read_set(run, (enum job_file)i, &left, err);
    if (rc == ERR_OK)
        rc = train_estimate(o->base, &run->compute, &run->opts, run->sets[JOB_FILE_TRAIN],
                            longest_look(run), run->from, &e, err);
    if (rc == ERR_OK)
        rc = train_args_fits(&e, left, o->memory_why, err);
    if (rc == ERR_OK) {
        run->opts.keep_bytes = train_args_keep(&e, left);
        rc = train_create(o->base, &run->compute, &run->opts, run->sets[JOB_FILE_TRAIN],
                          run->sets[JOB_FILE_VALID], run->from, &run->train, err);
    }
    if (rc == ERR_OK && run->state != NULL)
        rc = train_restore(run->train, run->state, run->state_len, err);
    free(run->state);
    run->state = NULL;
    const char *was = rc == ERR_OK ? train_elsewhere(run->train) : NULL;
    if (was != NULL)
        rc = job_report_event(&run->report, JOB_WARN, err, "The run was computed with \"%s\" and goes on "
                              "with other arithmetic: the result will differ in its last digits from an "
                              "uninterrupted run's", was);
    int64_t steps = rc == ERR_OK ? train_steps(run->train) : 0;
    return rc == ERR_OK ? job_ask(run, write_started, &steps, err) : rc;
}

static int finish(struct job_run *run, enum train_end how, struct err *err)
{
    int rc = ERR_OK;
    if (how == TRAIN_EARLY)
        rc = job_report_event(&run->report, JOB_INFO, err, "Stopped early after step %lld: the "
                              "validation loss does not fall any more",
                              (long long)train_step_now(run->train));
    if (rc == ERR_OK)
        rc = train_export(run->train, &run->result, err);
    train_destroy(run->train); /* measuring has one of its own */
    run->train = NULL;
    return rc == ERR_OK ? judge(run, err) : rc;
}

static int work(struct job_run *run, struct err *err)
{
    const struct train_hooks hooks = { run, wanted, step, checkpoint };
    enum train_end how = TRAIN_DONE;
    run->compute = (struct compute){ .isa = run->r->o.isa, .precision = run->r->o.precision };
    int rc = pool_create(run->r->o.threads, &run->compute.pool, err);
    if (rc == ERR_OK)
        rc = prepare(run, err);
    if (rc == ERR_OK)
        rc = train_loop(run->train, &hooks, &how, err);
    if (rc == ERR_OK && how != TRAIN_PAUSED && how != TRAIN_CANCELLED)
        rc = finish(run, how, err);
    else if (rc == ERR_OK)
        rc = ERR_CANCELLED;
    return rc;
}

void *job_work(void *arg)
{
    struct job_run *run = arg;
    pthread_setname_np(pthread_self(), "lorad-train");
    be_idle();
    const int rc = work(run, &run->err);
    run->end = rc == ERR_OK           ? JOB_END_DONE
               : rc != ERR_CANCELLED  ? JOB_END_FAILED
               : atomic_load(&run->wanted) == TRAIN_CANCEL ? JOB_END_CANCELLED
                                                           : JOB_END_PAUSED;
    train_destroy(run->train);
    for (int i = 0; i < 3; i++)
        train_set_free(run->sets[i]);
    pool_destroy(run->compute.pool);
    pthread_mutex_lock(&run->r->lock);
    run->finished = true;
    run->r->woken = true;
    pthread_cond_signal(&run->r->news);
    pthread_mutex_unlock(&run->r->lock);
    return NULL;
}
