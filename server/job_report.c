/* job_report.c - metrics, ranks and events, gathered until they are written in one transaction. */
#include "server/job_runner_int.h"

#include "engine/util.h"

#include <jansson.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { EVENTS_PER_RUN = 200 };

/* The list with room for one more, or NULL: out of memory, and the list is as it was. */
static void *grow(void *list, size_t n, size_t *cap, size_t size)
{
    if (n < *cap)
        return list;
    const size_t more = *cap > 0 ? *cap * 2 : 64;
    void *grown = realloc(list, more * size);
    if (grown != NULL)
        *cap = more;
    return grown;
}

static int add_metric(struct job_report *p, const struct train_report *r,
                      const struct train_valid *v, struct err *err)
{
    const bool adalora = r->budget >= 0;
    struct store_metric *grown = grow(p->metrics, p->nmetrics, &p->metrics_cap, sizeof *grown);
    if (grown == NULL)
        return err_nomem(err);
    p->metrics = grown;
    p->metrics[p->nmetrics++] = (struct store_metric){
        .step = r->step, .epoch = r->epoch, .loss = r->loss, .valid_loss = v ? v->loss : NAN,
        .accuracy = r->accuracy, .valid_accuracy = v ? v->accuracy : NAN, .lr = r->lr,
        .grad_norm = r->grad_norm,
        .tokens_per_s = r->seconds > 0 ? (double)r->tokens / r->seconds : NAN,
        .orth = adalora ? r->orth : NAN, .threshold = r->threshold, .tokens = (int64_t)r->tokens,
        .targets = (int64_t)r->targets, .budget = r->budget, .kept = adalora ? r->kept : -1,
    };
    return ERR_OK;
}

/* Those that changed; all of them the first time. */
static int add_ranks(struct job_report *p, struct train *t, int64_t step, struct err *err)
{
    size_t n;
    const struct train_rank *k = train_ranks(t, &n);
    if (p->known == NULL) {
        if ((p->known = malloc((n + 1) * sizeof *p->known)) == NULL)
            return err_nomem(err);
        for (p->nknown = 0; p->nknown < n; p->nknown++)
            p->known[p->nknown] = -1;
    }
    for (size_t i = 0; i < n && i < p->nknown; i++) {
        if (k[i].rank == p->known[i])
            continue;
        struct store_rank *grown = grow(p->ranks, p->nranks, &p->ranks_cap, sizeof *grown);
        if (grown == NULL)
            return err_nomem(err);
        p->ranks = grown;
        p->known[i] = k[i].rank;
        p->ranks[p->nranks++] = (struct store_rank){ .step = step, .layer = k[i].layer,
                                                     .module = k[i].module, .rank = k[i].rank };
    }
    return ERR_OK;
}

/* Takes both strings. */
static int add_event(struct job_report *p, const struct store_event_new *e, char *message,
                     char *data, struct err *err)
{
    struct store_event_new *grown =
        message != NULL ? grow(p->events, p->nevents, &p->events_cap, sizeof *grown) : NULL;
    if (grown == NULL) {
        free(message);
        free(data);
        return err_nomem(err);
    }
    p->events = grown;
    p->events[p->nevents] = *e;
    p->events[p->nevents].message = message;
    p->events[p->nevents++].data = data;
    return ERR_OK;
}

int job_report_event(struct job_report *p, enum job_level level, struct err *err, const char *fmt, ...)
{
    const struct store_event_new e = { .level = level };
    char *message = NULL;
    va_list ap;
    va_start(ap, fmt);
    if (vasprintf(&message, fmt, ap) < 0)
        message = NULL;
    va_end(ap);
    return add_event(p, &e, message, NULL, err);
}

/* "Step 10/100: training loss=0.55", as OpenAI says it. */
static int add_step_event(struct job_report *p, const struct train_report *r,
                          const struct train_valid *v, struct err *err)
{
    const struct store_event_new e = { .level = JOB_INFO, .metrics = true, .step = r->step };
    char *message = NULL, valid[48] = "";
    json_t *j = json_pack("{s:I, s:I, s:f, s:f}", "step", (json_int_t)r->step, "total_steps",
                          (json_int_t)r->steps, "train_loss", r->loss, "train_mean_token_accuracy",
                          r->accuracy);
    if (j != NULL && v != NULL) {
        snprintf(valid, sizeof valid, ", validation loss=%.2f", v->loss);
        json_object_set_new(j, "full_valid_loss", json_real(v->loss));
        json_object_set_new(j, "full_valid_mean_token_accuracy", json_real(v->accuracy));
    }
    char *data = j != NULL ? json_dumps(j, JSON_COMPACT | JSON_REAL_PRECISION(9)) : NULL;
    json_decref(j);
    if (data == NULL)
        return err_nomem(err);
    if (asprintf(&message, "Step %lld/%lld: training loss=%.2f%s", (long long)r->step,
                 (long long)r->steps, r->loss, valid) < 0)
        message = NULL;
    return add_event(p, &e, message, data, err);
}

int job_report_step(struct job_report *p, struct train *t, const struct train_report *r,
                    const struct train_valid *v, struct err *err)
{
    const int64_t every = (r->steps + EVENTS_PER_RUN - 1) / EVENTS_PER_RUN;
    int rc = add_metric(p, r, v, err);
    if (rc == ERR_OK)
        rc = add_ranks(p, t, r->step, err);
    if (rc == ERR_OK && (r->step == 1 || r->step % every == 0 || r->step == r->steps || v != NULL))
        rc = add_step_event(p, r, v, err);
    p->step = r->step;
    p->trained_tokens += (int64_t)r->tokens;
    p->seconds_per_step = p->seconds_per_step > 0 ? 0.8 * p->seconds_per_step + 0.2 * r->seconds
                                                  : r->seconds;
    return rc;
}

struct store_report job_report_view(const struct job_report *p)
{
    return (struct store_report){
        .step = p->step, .trained_tokens = p->trained_tokens,
        .seconds_per_step = p->seconds_per_step, .metrics = p->metrics, .nmetrics = p->nmetrics,
        .ranks = p->ranks, .nranks = p->nranks, .events = p->events, .nevents = p->nevents,
    };
}

void job_report_sent(struct job_report *p)
{
    for (size_t i = 0; i < p->nevents; i++) {
        free((char *)p->events[i].message);
        free((char *)p->events[i].data);
    }
    p->nmetrics = p->nranks = p->nevents = 0;
    p->sent = now_mono();
}

void job_report_free(struct job_report *p)
{
    job_report_sent(p);
    free(p->metrics);
    free(p->ranks);
    free(p->events);
    free(p->known);
}
