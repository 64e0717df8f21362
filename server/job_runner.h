/* job_runner.h - runs the fine-tuning jobs of a database, one at a time, beside the server.
 *
 * Two threads.  The runner has the connection to the database: it claims jobs, reads their files, and
 * writes what they report.  The other one trains: it and its pool run at idle priority (SCHED_IDLE; nice
 * 19 where that is refused), so that they compute only when nobody else wants to.  What it wants written
 * it hands to the runner and waits.  So no thread of idle priority ever holds a lock that serving may
 * wait for, in this process or in the database.
 *
 * Only one process runs the jobs of a database (store_runner_lock); another one waits until that ends.
 * Jobs whose runner was killed go back to the queue and go on from their last state.
 *
 * Threads: any may call job_runner_wake(); the others belong to the one that started it. */
#ifndef SERVER_JOB_RUNNER_H
#define SERVER_JOB_RUNNER_H

#include "engine/base.h"
#include "engine/chat_template.h"
#include "engine/compute.h"
#include "engine/tokenizer.h"

/* Everything is borrowed. */
struct job_runner_opts {
    const char *db_path;
    const struct base *base;
    const struct tokenizer *tokenizer;
    const struct chat_template *chat; /* or NULL */
    enum isa isa;
    enum precision precision;
    int threads;           /* that train; 0: one per available CPU */
    size_t memory;         /* a run may take so much beside the base */
    const char *memory_why; /* half a sentence that says where that comes from */
};
struct job_runner;
int job_runner_start(const struct job_runner_opts *o, struct job_runner **ret, struct err *err);
/* There is something new to run or to stop; `runner` is the struct job_runner. */
void job_runner_wake(void *runner);
/* A job that runs is to keep its state and go back to the queue; returns at once.  NULL is fine. */
void job_runner_ask_stop(struct job_runner *r);
/* Asks, and waits until it has. */
void job_runner_stop(struct job_runner *r); /* NULL is fine */

#endif
