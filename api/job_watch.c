/* job_watch.c - events of fine-tuning jobs as they happen, as server-sent events.
 *
 * One thread with a connection of its own serves all listeners: while there is one, it looks once a
 * second whether anybody has written to the database (PRAGMA data_version), reads what is new for
 * each job that somebody listens to, and wakes those.  A listener whose last piece was not taken
 * yet is left alone, so that a slow client costs one piece of at most EVENTS_AT_ONCE events.
 *
 * A listener belongs to its stream; the thread marks it busy while it reads for it without the lock,
 * and then whoever comes last frees it.  Wakes are called under the lock: none comes after close. */
#include "api/api_int.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum {
    LISTENERS_MAX = 1000,
    EVENTS_AT_ONCE = 100,
    PIECE_BYTES = 4 << 20,
    LOOK_MS = 1000,
    ALIVE_MS = 15000,       /* a comment goes out after so long a silence, for proxies */
};

struct listener {
    struct job_watch *watch;
    struct store_job job;    /* what ids are made of */
    int64_t after;           /* events up to this one were read */
    struct buf ready;        /* not taken yet */
    double spoke;            /* when something was last made ready */
    bool fresh;              /* there may be more than was read */
    bool ended;              /* nothing comes after `ready` */
    bool busy, closed;
    void (*wake)(void *ud);
    void *wake_ud;
    struct listener *next;
};

struct job_watch {
    struct api *api;
    pthread_mutex_t lock;    /* all below and in listeners, but `st` */
    pthread_cond_t news;
    pthread_t thread;
    bool running, quit;
    struct listener *list;
    int n;
    struct store *st;        /* of the thread */
    int64_t version;
};

static void listener_free(struct listener *l)
{
    store_job_free(&l->job);
    buf_free(&l->ready);
    free(l);
}

/* --- the thread ------------------------------------------------------------------------------ */
static int dump_to_buf(const char *s, size_t len, void *ud)
{
    return buf_add(ud, s, len) == ERR_OK ? 0 : -1;
}

/* "[id: N\n]data: {...}\n\n"; takes j. */
static int put_event(struct buf *b, int64_t seq, json_t *j)
{
    int rc = j == NULL ? ERR_NOMEM : ERR_OK;
    if (rc == ERR_OK && seq > 0)
        rc = buf_printf(b, "id: %lld\n", (long long)seq);
    if (rc == ERR_OK)
        rc = buf_puts(b, "data: ");
    if (rc == ERR_OK &&
        json_dump_callback(j, dump_to_buf, b, JSON_COMPACT | JSON_REAL_PRECISION(9)) != 0)
        rc = ERR_NOMEM;
    if (rc == ERR_OK)
        rc = buf_puts(b, "\n\n");
    json_decref(j);
    return rc;
}

/* What is new after event `after`, without the lock. */
struct piece {
    struct buf text;
    int64_t after;
    bool more, end;
};

static void read_piece(struct job_watch *w, const struct store_job *job, int64_t after,
                       struct piece *p)
{
    struct err err = { 0 };
    struct store_event *e = NULL;
    enum job_status status = JOB_QUEUED;
    size_t n = 0;
    *p = (struct piece){ .after = after };
    buf_init(&p->text, PIECE_BYTES);
    int rc = w->st != NULL ? ERR_OK : store_open(w->api->o.db_path, &w->st, &err);
    if (rc == ERR_OK)
        rc = store_event_tail(w->st, job->id, after, EVENTS_AT_ONCE, &e, &n, &status, &err);
    for (size_t i = 0; i < n && rc == ERR_OK; i++) {
        rc = put_event(&p->text, e[i].seq, job_event_json(job, &e[i]));
        if (rc != ERR_OK)
            err_nomem(&err);
        p->after = e[i].seq;
    }
    store_events_free(e, n);
    if (rc != ERR_OK) { /* deleted, say: the client is told and can ask again */
        put_event(&p->text, 0, error_json(&err));
        p->end = true;
        return;
    }
    p->more = n == EVENTS_AT_ONCE;
    p->end = !p->more && job_ended(status);
    if (p->end)
        p->end = buf_puts(&p->text, "data: [DONE]\n\n") == ERR_OK;
}

/* The piece becomes the listener's, if it is still there; the lock is held. */
static void give(struct listener *l, struct piece *p, double now)
{
    l->busy = false;
    if (l->closed) {
        buf_free(&p->text);
        listener_free(l);
        return;
    }
    l->after = p->after;
    l->fresh = p->more;
    l->ended = p->end;
    if (p->text.len == 0 && now - l->spoke >= ALIVE_MS / 1e3)
        buf_puts(&p->text, ": \n\n");
    if (p->text.len > 0) {
        buf_free(&l->ready);
        l->ready = p->text;
        l->spoke = now;
        l->wake(l->wake_ud);
    } else {
        buf_free(&p->text);
    }
}

/* Somebody to read for. */
static struct listener *find_due(struct job_watch *w)
{
    const double now = now_mono();
    for (struct listener *l = w->list; l != NULL; l = l->next)
        if (l->ready.len == 0 && !l->ended && (l->fresh || now - l->spoke >= ALIVE_MS / 1e3))
            return l;
    return NULL;
}

static void end_all(struct job_watch *w)
{
    for (struct listener *l = w->list; l != NULL; l = l->next)
        if (!l->ended) {
            l->ended = true;
            l->wake(l->wake_ud);
        }
}

/* Did anybody write since the last look?  Without the lock; when that cannot be told, maybe. */
static bool changed(struct job_watch *w)
{
    int64_t v = 0;
    struct err err = { 0 };
    if (w->st == NULL || store_data_version(w->st, &v, &err) != ERR_OK)
        return true;
    const bool news = v != w->version;
    w->version = v;
    return news;
}

/* One look at everybody; the lock is held. */
static void look(struct job_watch *w)
{
    pthread_mutex_unlock(&w->lock);
    const bool all = changed(w);
    pthread_mutex_lock(&w->lock);
    for (struct listener *l = w->list; l != NULL; l = l->next)
        l->fresh = l->fresh || all;
    struct listener *l;
    while (!w->quit && (l = find_due(w)) != NULL) {
        struct piece p;
        l->busy = true;
        l->fresh = false;
        pthread_mutex_unlock(&w->lock);
        read_piece(w, &l->job, l->after, &p);
        pthread_mutex_lock(&w->lock);
        give(l, &p, now_mono());
    }
}

static void *watch(void *ud)
{
    struct job_watch *w = ud;
    pthread_mutex_lock(&w->lock);
    while (!w->quit) {
        if (w->list == NULL) {
            pthread_cond_wait(&w->news, &w->lock);
            continue;
        }
        if (atomic_load(&w->api->draining))
            end_all(w);
        else
            look(w);
        struct timespec t;
        clock_gettime(CLOCK_MONOTONIC, &t);
        t.tv_sec += LOOK_MS / 1000;
        if (!w->quit)
            pthread_cond_timedwait(&w->news, &w->lock, &t);
    }
    pthread_mutex_unlock(&w->lock);
    store_close(w->st);
    return NULL;
}

/* --- streams --------------------------------------------------------------------------------- */
static bool next(void *ud, struct buf *out)
{
    struct listener *l = ud;
    struct job_watch *w = l->watch;
    pthread_mutex_lock(&w->lock);
    if (l->ready.len > 0 && buf_add(out, l->ready.data, l->ready.len) == ERR_OK) {
        buf_free(&l->ready);
        buf_init(&l->ready, PIECE_BYTES);
        if (l->fresh) /* it was not all */
            pthread_cond_signal(&w->news);
    }
    const bool go_on = !l->ended || l->ready.len > 0;
    pthread_mutex_unlock(&w->lock);
    return go_on;
}

static void close_stream(void *ud)
{
    struct listener *l = ud;
    struct job_watch *w = l->watch;
    pthread_mutex_lock(&w->lock);
    struct listener **at = &w->list;
    while (*at != l)
        at = &(*at)->next;
    *at = l->next;
    w->n--;
    const bool busy = l->busy;
    l->closed = true;
    pthread_mutex_unlock(&w->lock);
    if (!busy)
        listener_free(l);
}

/* The thread runs from the first listener on; the lock is held. */
static int start(struct job_watch *w, struct err *err)
{
    if (w->n == LISTENERS_MAX)
        return err_set(err, ERR_BUSY, "%d clients listen to events, which is the limit", w->n);
    if (!w->running && pthread_create(&w->thread, NULL, watch, w) != 0)
        return err_set(err, ERR_UNAVAILABLE, "cannot start the thread that watches jobs");
    w->running = true;
    return ERR_OK;
}

int job_watch_stream(struct api_ctx *c, const struct store_job *j, int64_t after, struct err *err)
{
    struct job_watch *w = c->api->watch;
    struct listener *l = calloc(1, sizeof *l);
    if (l == NULL)
        return err_nomem(err);
    l->watch = w;
    l->job.id = j->id;
    memcpy(l->job.ref, j->ref, sizeof l->job.ref);
    l->after = after;
    l->fresh = true;
    l->spoke = now_mono();
    l->wake = c->wake;
    l->wake_ud = c->wake_ud;
    buf_init(&l->ready, PIECE_BYTES);
    pthread_mutex_lock(&w->lock);
    int rc = start(w, err);
    if (rc == ERR_OK) {
        l->next = w->list;
        w->list = l;
        w->n++;
        pthread_cond_signal(&w->news);
    }
    pthread_mutex_unlock(&w->lock);
    if (rc != ERR_OK) {
        listener_free(l);
        return rc;
    }
    c->resp->status = 200;
    c->resp->type = "text/event-stream";
    api_resp_header(c->resp, "Cache-Control", "no-cache");
    api_resp_header(c->resp, "X-Accel-Buffering", "no");
    c->resp->stream = (struct api_stream){ .next = next, .close = close_stream, .ud = l };
    return ERR_OK;
}

int job_watch_create(struct api *a, struct job_watch **ret, struct err *err)
{
    struct job_watch *w = calloc(1, sizeof *w);
    if (w == NULL)
        return err_nomem(err);
    w->api = a;
    w->version = -1;
    pthread_condattr_t mono;
    pthread_condattr_init(&mono);
    pthread_condattr_setclock(&mono, CLOCK_MONOTONIC);
    pthread_mutex_init(&w->lock, NULL);
    pthread_cond_init(&w->news, &mono);
    pthread_condattr_destroy(&mono);
    *ret = w;
    return ERR_OK;
}

void job_watch_destroy(struct job_watch *w)
{
    if (w == NULL)
        return;
    pthread_mutex_lock(&w->lock);
    w->quit = true;
    pthread_cond_signal(&w->news);
    pthread_mutex_unlock(&w->lock);
    if (w->running)
        pthread_join(w->thread, NULL);
    pthread_mutex_destroy(&w->lock);
    pthread_cond_destroy(&w->news);
    free(w);
}
