/* http_work.c - the threads that run handlers, each with its own database connection.
 *
 * A request is in the queue at most once.  While a worker has it, its connection is suspended, so
 * nobody else touches it; what happens meanwhile is left in its flags. */
#include "server/http_int.h"

#include <stdlib.h>

void work_add(struct request *r)
{
    if (r->queued)
        return;
    r->queued = true;
    r->next = NULL;
    *r->h->queue_tail = r;
    r->h->queue_tail = &r->next;
    pthread_cond_signal(&r->h->work);
}

/* The headers are there.  Where nothing more is wanted, also the rest. */
static void run_headers(struct request *r, struct api_db *db)
{
    struct api *api = r->h->o.api;
    if (!api_begin(api, db, &r->req, &r->plan, &r->resp)) {
        r->have_resp = true;
        return;
    }
    if (r->plan.body == API_BODY_NONE)
        r->have_resp = api_dispatch(api, db, &r->plan, &r->req, request_wake, r, &r->resp,
                                    &r->call);
}

static void run_answer(struct request *r, struct api_db *db)
{
    if (r->call != NULL)
        r->have_resp = api_continue(r->call, &r->resp);
    else
        r->have_resp = api_dispatch(r->h->o.api, db, &r->plan, &r->req, request_wake, r, &r->resp,
                                    &r->call);
    if (r->have_resp)
        r->call = NULL;
}

/* Called without the lock; returns with it held and the request done with or waiting. */
static void run(struct request *r, struct api_db *db)
{
    struct http *h = r->h;
    for (;;) {
        pthread_mutex_lock(&h->lock);
        r->woken = false;
        const bool gone = r->call != NULL && (r->gone || r->conn->hung_up || h->closing);
        pthread_mutex_unlock(&h->lock);
        if (gone) {
            api_abandon(r->call);
            r->call = NULL;
        } else if (r->phase == HEADERS && r->call == NULL) {
            run_headers(r, db);
        } else {
            run_answer(r, db);
        }
        pthread_mutex_lock(&h->lock);
        if (r->call == NULL) { /* an answer, a body to be read, or nobody left to tell */
            request_resume(r);
            return;
        }
        if (!r->woken && !r->gone && !r->conn->hung_up && !h->closing) {
            r->waiting = true;
            return;
        }
        pthread_mutex_unlock(&h->lock);
    }
}

static void *worker(void *ud)
{
    struct http *h = ud;
    struct api_db *db = NULL;
    struct err err = { 0 };
    pthread_mutex_lock(&h->lock);
    for (;;) {
        while (h->queue == NULL && !h->stopping)
            pthread_cond_wait(&h->work, &h->lock);
        struct request *r = h->queue;
        if (r == NULL)
            break;
        h->queue = r->next;
        if (h->queue == NULL)
            h->queue_tail = &h->queue;
        r->queued = false;
        pthread_mutex_unlock(&h->lock);
        err_clear(&err);
        if (db == NULL && api_db_open(h->o.api, &db, &err) != ERR_OK) {
            api_resp_error(&r->resp, &err);
            r->have_resp = true;
            if (r->call != NULL)
                api_abandon(r->call);
            r->call = NULL;
            pthread_mutex_lock(&h->lock);
            request_resume(r);
        } else {
            run(r, db);
        }
    }
    pthread_mutex_unlock(&h->lock);
    api_db_close(db);
    return NULL;
}

int work_start(struct http *h, struct err *err)
{
    h->workers = calloc((size_t)h->o.workers, sizeof *h->workers);
    if (h->workers == NULL)
        return err_nomem(err);
    while (h->nworkers < h->o.workers) {
        if (pthread_create(&h->workers[h->nworkers], NULL, worker, h) != 0)
            return err_set(err, ERR_UNAVAILABLE, "cannot start worker thread %d", h->nworkers);
        h->nworkers++;
    }
    return ERR_OK;
}

void work_stop(struct http *h)
{
    pthread_mutex_lock(&h->lock);
    h->stopping = true;
    pthread_cond_broadcast(&h->work);
    pthread_mutex_unlock(&h->lock);
    for (int i = 0; i < h->nworkers; i++)
        pthread_join(h->workers[i], NULL);
    h->nworkers = 0;
}
