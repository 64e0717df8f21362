/* http.c - the life of a request.
 *
 *   headers   libmicrohttpd calls on_request().  The connection is suspended and a worker runs
 *             api_begin(): route, key, limits.  Where no body is wanted it goes on to dispatch.
 *   body      resumed; pieces are gathered or spooled (http_body.c).
 *   answer    suspended again; a worker runs api_dispatch().  If the engine has to work first, the
 *             request waits and every wake has a worker run api_continue().
 *   sending   resumed; libmicrohttpd gets the answer.  A stream is drained by read_stream(), which
 *             suspends the connection when there is nothing to send; wakes resume it.
 *
 * One lock guards the flags of all requests.  suspend and resume are called under it, always with
 * `suspended` changed in the same breath, so that a wake cannot fall between looking for news and
 * suspending: `woken` is cleared before looking, and checked again before suspending.
 *
 * A suspended connection is not polled, so libmicrohttpd neither sees a client hang up nor counts
 * time for it; http_watch.c does both. */
#include "server/http_int.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/socket.h>
#include <unistd.h>

/* --- requests ------------------------------------------------------------------------------------ */

static const char *get_header(void *ud, const char *key)
{
    return MHD_lookup_connection_value(((struct request *)ud)->c, MHD_HEADER_KIND, key);
}

static const char *get_query(void *ud, const char *key)
{
    const char *v = NULL;
    struct request *r = ud;
    if (MHD_lookup_connection_value_n(r->c, MHD_GET_ARGUMENT_KIND, key, strlen(key), &v, NULL) ==
            MHD_YES &&
        v == NULL)
        v = ""; /* ?key without = */
    return v;
}

struct each {
    bool (*fn)(void *ud, const char *key, const char *value);
    void *ud;
};

static enum MHD_Result on_query(void *ud, enum MHD_ValueKind kind, const char *key,
                                const char *value)
{
    (void)kind;
    const struct each *e = ud;
    return e->fn(e->ud, key, value ? value : "") ? MHD_YES : MHD_NO;
}

static void each_query(void *ud, bool (*fn)(void *fn_ud, const char *key, const char *value),
                       void *fn_ud)
{
    struct each e = { fn, fn_ud };
    MHD_get_connection_values(((struct request *)ud)->c, MHD_GET_ARGUMENT_KIND, on_query, &e);
}

static struct conn *conn_of(struct MHD_Connection *c)
{
    const union MHD_ConnectionInfo *i =
        MHD_get_connection_info(c, MHD_CONNECTION_INFO_SOCKET_CONTEXT);
    return i ? i->socket_context : NULL;
}

/* The headers are in. */
static struct request *request_new(struct http *h, struct MHD_Connection *c, const char *method,
                                   const char *path)
{
    struct request *r = calloc(1, sizeof *r);
    if (r == NULL)
        return NULL;
    r->h = h;
    r->c = c;
    r->conn = conn_of(c);
    r->refs = 1;
    r->started = now_mono();
    r->method = strdup(method);
    r->path = strdup(path);
    buf_init(&r->out, (size_t)8 << 20);
    if (r->method == NULL || r->path == NULL || r->conn == NULL) {
        free(r->method);
        free(r->path);
        free(r);
        return NULL;
    }
    const char *length = get_header(r, "Content-Length");
    r->content_length = length ? strtoull(length, NULL, 10) : 0;
    r->has_body = r->content_length > 0 || get_header(r, "Transfer-Encoding") != NULL;
    r->req = (struct api_req){ .method = r->method, .path = r->path, .query = get_query,
                               .query_each = each_query, .header = get_header, .ud = r };
    return r;
}

void request_unref(struct request *r)
{
    struct http *h = r->h;
    pthread_mutex_lock(&h->lock);
    const bool last = --r->refs == 0;
    pthread_mutex_unlock(&h->lock);
    if (!last)
        return;
    if (r->call != NULL)
        api_abandon(r->call);
    api_resp_free(&r->resp);
    body_free(r);
    buf_free(&r->out);
    free(r->method);
    free(r->path);
    free(r);
}

void request_resume(struct request *r)
{
    if (!r->suspended)
        return;
    r->suspended = false;
    MHD_resume_connection(r->c);
}

void request_wake(void *ud)
{
    struct request *r = ud;
    pthread_mutex_lock(&r->h->lock);
    r->woken = true;
    if (r->waiting) {
        r->waiting = false;
        work_add(r);
    } else if (r->phase == SENDING) {
        request_resume(r);
    }
    pthread_mutex_unlock(&r->h->lock);
}

/* Hand it to a worker and leave the poll set until that is done. */
static void suspend_for_work(struct request *r, enum phase phase)
{
    pthread_mutex_lock(&r->h->lock);
    r->phase = phase;
    r->conn->deadline = 0;
    MHD_suspend_connection(r->c);
    r->suspended = true;
    work_add(r);
    pthread_mutex_unlock(&r->h->lock);
}

static void set_deadline(struct request *r, double seconds)
{
    pthread_mutex_lock(&r->h->lock);
    watch_deadline(r->conn, seconds);
    pthread_mutex_unlock(&r->h->lock);
}

/* Read the body, for what `phase` says. */
static void start_body(struct request *r, enum phase phase)
{
    r->body_started = now_mono();
    pthread_mutex_lock(&r->h->lock);
    r->phase = phase;
    watch_deadline(r->conn, r->h->o.body_seconds);
    pthread_mutex_unlock(&r->h->lock);
}

/* --- answers ------------------------------------------------------------------------------------- */

/* libmicrohttpd wants the next piece of a stream. */
static ssize_t read_stream(void *ud, uint64_t pos, char *to, size_t max)
{
    (void)pos;
    struct request *r = ud;
    struct http *h = r->h;
    for (;;) {
        if (r->out_sent < r->out.len) {
            const size_t left = r->out.len - r->out_sent, n = left < max ? left : max;
            memcpy(to, r->out.data + r->out_sent, n);
            r->out_sent += n;
            pthread_mutex_lock(&h->lock);
            watch_reading(r->conn, h->o.stall_seconds);
            pthread_mutex_unlock(&h->lock);
            return (ssize_t)n;
        }
        r->out.len = r->out_sent = 0; /* the memory is used again */
        if (r->stream_end)
            return MHD_CONTENT_READER_END_OF_STREAM;

        pthread_mutex_lock(&h->lock);
        r->woken = false;
        const bool gone = r->gone;
        pthread_mutex_unlock(&h->lock);
        if (gone)
            return MHD_CONTENT_READER_END_WITH_ERROR;
        r->stream_end = !r->resp.stream.next(r->resp.stream.ud, &r->out);
        if (r->out.len > 0 || r->stream_end)
            continue;

        bool sleep = false;
        pthread_mutex_lock(&h->lock);
        if (!r->woken && !r->gone) {
            r->conn->deadline = 0;
            MHD_suspend_connection(r->c);
            r->suspended = sleep = true;
        }
        pthread_mutex_unlock(&h->lock);
        if (sleep)
            return 0;
    }
}

static void end_stream(void *ud)
{
    struct request *r = ud;
    r->resp.stream.close(r->resp.stream.ud); /* no wake after this */
    r->resp.stream = (struct api_stream){ 0 };
    request_unref(r);
}

/* A response object with the body in whatever form it has; NULL: out of memory. */
static struct MHD_Response *make_response(struct request *r)
{
    struct api_resp *a = &r->resp;
    struct MHD_Response *m;
    if (a->stream.next != NULL) {
        m = MHD_create_response_from_callback(MHD_SIZE_UNKNOWN, 16 << 10, read_stream, r,
                                              end_stream);
        if (m != NULL) {
            pthread_mutex_lock(&r->h->lock);
            r->refs++;
            pthread_mutex_unlock(&r->h->lock);
        }
        return m;
    }
    if (a->file != NULL) {
        const char *path;
        const size_t size = spool_size(a->file);
        const int fd = spool_done(a->file, &path, NULL) == ERR_OK ?
                           open(path, O_RDONLY | O_CLOEXEC) : -1;
        spool_close(a->file); /* the name goes, the open file stays */
        a->file = NULL;
        m = fd < 0 ? NULL : MHD_create_response_from_fd(size, fd);
        if (m == NULL && fd >= 0)
            close(fd);
        return m;
    }
    if (a->static_body != NULL)
        return MHD_create_response_from_buffer(a->body_len, (void *)(uintptr_t)a->static_body,
                                               MHD_RESPMEM_PERSISTENT);
    m = MHD_create_response_from_buffer(a->body_len, a->body, MHD_RESPMEM_MUST_FREE);
    if (m != NULL)
        a->body = NULL;
    return m;
}

static enum MHD_Result send_answer(struct request *r)
{
    const struct api_resp *a = &r->resp;
    const double size = (double)(a->file ? spool_size(a->file) : a->body_len);
    struct MHD_Response *m = make_response(r);
    if (m == NULL)
        return MHD_NO;
    if (a->type != NULL)
        MHD_add_response_header(m, "Content-Type", a->type);
    for (int i = 0; i < a->nheaders; i++)
        MHD_add_response_header(m, a->header[i].name, a->header[i].value);
    MHD_add_response_header(m, "X-Request-Id", r->id);
    pthread_mutex_lock(&r->h->lock);
    r->phase = SENDING;
    r->status = a->status;
    r->gone = r->gone || (a->stream.next != NULL && r->conn->hung_up);
    r->conn->deadline = now_mono() + r->h->o.stall_seconds + size / BODY_RATE;
    pthread_mutex_unlock(&r->h->lock);
    const enum MHD_Result ok = MHD_queue_response(r->c, (unsigned)a->status, m);
    MHD_destroy_response(m);
    return ok;
}

/* --- what libmicrohttpd lets pass ------------------------------------------------------------------ */

struct framing {
    int lengths, encodings;
    bool chunked;
};

static enum MHD_Result count_framing(void *ud, enum MHD_ValueKind kind, const char *key,
                                     const char *value)
{
    (void)kind;
    struct framing *f = ud;
    f->lengths += strcasecmp(key, "Content-Length") == 0;
    if (strcasecmp(key, "Transfer-Encoding") == 0) {
        f->encodings++;
        f->chunked = value != NULL && strcasecmp(value, "chunked") == 0;
    }
    return MHD_YES;
}

/* A body whose end could be understood in two ways is refused: a proxy in front of this server may
 * understand the other one, and take the rest for the next request. */
static bool one_framing(struct request *r)
{
    struct framing f = { 0 };
    struct err err = { 0 };
    MHD_get_connection_values(r->c, MHD_HEADER_KIND, count_framing, &f);
    if (f.lengths + f.encodings <= 1 && f.encodings == f.chunked)
        return true;
    err_set(&err, ERR_INVALID, "the end of the request's body is not clear: send one Content-Length, "
            "or Transfer-Encoding: chunked alone");
    api_resp_error(&r->resp, &err);
    api_resp_header(&r->resp, "Connection", "close");
    r->have_resp = true;
    return false;
}

/* As libmicrohttpd does it, but a %00 would cut the string short and turn one name into another: it
 * becomes a character that no name has. */
static size_t unescape(void *ud, struct MHD_Connection *c, char *s)
{
    (void)ud;
    (void)c;
    for (char *p = strstr(s, "%00"); p != NULL; p = strstr(p, "%00"))
        p[2] = '1';
    return MHD_http_unescape(s);
}

/* --- libmicrohttpd's callbacks -------------------------------------------------------------------- */

/* The worker has decided what the headers deserve, or has the answer already. */
static enum MHD_Result after_headers(struct request *r)
{
    if (!r->have_resp && body_begin(r)) {
        start_body(r, BODY);
        return MHD_YES;
    }
    if (!r->have_resp && r->resp.status == 0)
        return MHD_NO;
    /* An answer now makes libmicrohttpd close the connection afterwards, and a client that is still
     * sending may not even read it.  So the rest of the body is taken first, unless it is long or
     * the client waits for "100 Continue" with it. */
    if (r->has_body &&
        (r->content_length > SWALLOW_MAX || get_header(r, "Expect") != NULL))
        return send_answer(r);
    start_body(r, ANSWERED);
    return MHD_YES;
}

static enum MHD_Result on_request(void *ud, struct MHD_Connection *c, const char *path,
                                  const char *method, const char *version, const char *data,
                                  size_t *len, void **slot)
{
    (void)version;
    struct http *h = ud;
    struct request *r = *slot;
    if (r == NULL) {
        r = request_new(h, c, method, path);
        if (r == NULL)
            return MHD_NO;
        pthread_mutex_lock(&h->lock);
        if (h->closing) {
            pthread_mutex_unlock(&h->lock);
            request_unref(r);
            return MHD_NO;
        }
        snprintf(r->id, sizeof r->id, "req-%08x%04x", r->conn->serial, ++h->request_serial);
        r->conn->req = r;
        h->nrequests++;
        pthread_mutex_unlock(&h->lock);
        *slot = r;
        if (!one_framing(r))
            return send_answer(r);
        suspend_for_work(r, HEADERS);
        return MHD_YES;
    }
    switch (r->phase) {
    case HEADERS:
        return after_headers(r);
    case BODY:
        if (*len > 0) {
            body_add(r, data, *len);
            *len = 0;
            set_deadline(r, h->o.body_seconds + (double)r->received / BODY_RATE -
                                (now_mono() - r->body_started));
            return r->received > r->plan.max_body + SWALLOW_MAX ? MHD_NO : MHD_YES;
        }
        if (!body_end(r))
            return send_answer(r);
        suspend_for_work(r, ANSWER);
        return MHD_YES;
    case ANSWERED:
        if (*len > 0) {
            r->received += *len;
            *len = 0;
            return r->received > SWALLOW_MAX ? MHD_NO : MHD_YES;
        }
        return send_answer(r);
    case ANSWER:
        return r->have_resp ? send_answer(r) : MHD_NO; /* NO: the client is gone */
    default:
        return MHD_YES;
    }
}

static void log_line(const struct request *r)
{
    FILE *f = r->h->o.access_log;
    if (f == NULL)
        return;
    char path[200];
    size_t n = 0;
    for (const char *p = r->path; *p != '\0' && n + 1 < sizeof path; p++)
        path[n++] = (unsigned char)*p < 0x21 || (unsigned char)*p > 0x7e ? '?' : *p;
    path[n] = '\0';
    fprintf(f, "%s %s %.16s %s %d %.1f ms tenant %lld key %lld\n", r->id, r->conn->address,
            r->method, path, r->status, (now_mono() - r->started) * 1e3,
            (long long)r->plan.tenant, (long long)r->plan.key_id);
}

static void on_completed(void *ud, struct MHD_Connection *c, void **slot,
                         enum MHD_RequestTerminationCode code)
{
    (void)c;
    (void)code;
    struct http *h = ud;
    struct request *r = *slot;
    if (r == NULL)
        return;
    *slot = NULL;
    log_line(r);
    pthread_mutex_lock(&h->lock);
    r->c = NULL;
    r->conn->req = NULL;
    r->conn->unread = 0;
    watch_deadline(r->conn, h->o.idle_seconds + h->o.header_seconds);
    if (r->uploading)
        h->uploads--;
    r->uploading = false;
    if (--h->nrequests == 0)
        pthread_cond_broadcast(&h->idle);
    pthread_mutex_unlock(&h->lock);
    request_unref(r);
}

static void on_connection(void *ud, struct MHD_Connection *c, void **context,
                          enum MHD_ConnectionNotificationCode code)
{
    struct http *h = ud;
    if (code == MHD_CONNECTION_NOTIFY_CLOSED) { /* before the descriptor is closed */
        struct conn *conn = *context;
        *context = NULL;
        if (conn == NULL)
            return;
        pthread_mutex_lock(&h->lock);
        watch_remove(h, conn);
        pthread_mutex_unlock(&h->lock);
        free(conn);
        return;
    }
    struct conn *conn = calloc(1, sizeof *conn);
    if (conn == NULL)
        return; /* requests without one are refused */
    conn->fd = MHD_get_connection_info(c, MHD_CONNECTION_INFO_CONNECTION_FD)->connect_fd;
    const struct sockaddr *a =
        MHD_get_connection_info(c, MHD_CONNECTION_INFO_CLIENT_ADDRESS)->client_addr;
    if (a->sa_family == AF_INET6)
        inet_ntop(AF_INET6, &((const struct sockaddr_in6 *)(const void *)a)->sin6_addr,
                  conn->address, sizeof conn->address);
    else
        inet_ntop(AF_INET, &((const struct sockaddr_in *)(const void *)a)->sin_addr, conn->address,
                  sizeof conn->address);
    pthread_mutex_lock(&h->lock);
    watch_deadline(conn, h->o.header_seconds);
    const int rc = watch_add(h, conn);
    pthread_mutex_unlock(&h->lock);
    if (rc != ERR_OK) {
        free(conn);
        return;
    }
    *context = conn;
}

/* libmicrohttpd's own complaints would be one line per odd client. */
static void no_log(void *ud, const char *fmt, va_list ap)
{
    (void)ud;
    (void)fmt;
    (void)ap;
}

/* --- start and stop --------------------------------------------------------------------------------- */

static void set_defaults(struct http_opts *o)
{
    const struct http_opts d = { .poll_threads = 2, .workers = 4, .max_connections = 1024,
                                 .max_uploads = 4, .header_seconds = 20, .body_seconds = 30,
                                 .idle_seconds = 60, .stall_seconds = 30 };
    o->poll_threads = o->poll_threads > 0 ? o->poll_threads : d.poll_threads;
    o->workers = o->workers > 0 ? o->workers : d.workers;
    o->max_connections = o->max_connections > 0 ? o->max_connections : d.max_connections;
    o->max_uploads = o->max_uploads > 0 ? o->max_uploads : d.max_uploads;
    o->header_seconds = o->header_seconds > 0 ? o->header_seconds : d.header_seconds;
    o->body_seconds = o->body_seconds > 0 ? o->body_seconds : d.body_seconds;
    o->idle_seconds = o->idle_seconds > 0 ? o->idle_seconds : d.idle_seconds;
    o->stall_seconds = o->stall_seconds > 0 ? o->stall_seconds : d.stall_seconds;
    /* libmicrohttpd gives every thread an equal share. */
    if (o->max_connections < o->poll_threads)
        o->max_connections = o->poll_threads;
}

static int start_daemon(struct http *h, int fd, struct err *err)
{
    const unsigned flags = MHD_USE_EPOLL_INTERNAL_THREAD | MHD_ALLOW_SUSPEND_RESUME | MHD_USE_ITC |
                           MHD_USE_ERROR_LOG;
    struct MHD_OptionItem items[] = {
        { MHD_OPTION_EXTERNAL_LOGGER, (intptr_t)no_log, NULL }, /* first: it counts from there */
        { MHD_OPTION_LISTEN_SOCKET, fd, NULL },
        { MHD_OPTION_THREAD_POOL_SIZE, h->o.poll_threads > 1 ? h->o.poll_threads : 0, NULL },
        { MHD_OPTION_CONNECTION_LIMIT, h->o.max_connections, NULL },
        { MHD_OPTION_PER_IP_CONNECTION_LIMIT, h->o.max_per_address, NULL },
        { MHD_OPTION_CONNECTION_TIMEOUT, (intptr_t)h->o.idle_seconds + 1, NULL },
        { MHD_OPTION_CONNECTION_MEMORY_LIMIT, 64 << 10, NULL },
        { MHD_OPTION_UNESCAPE_CALLBACK, (intptr_t)unescape, NULL },
        { MHD_OPTION_NOTIFY_COMPLETED, (intptr_t)on_completed, h },
        { MHD_OPTION_NOTIFY_CONNECTION, (intptr_t)on_connection, h },
        { MHD_OPTION_END, 0, NULL },
    };
    h->daemon = MHD_start_daemon(flags, 0, NULL, NULL, on_request, h, MHD_OPTION_ARRAY, items,
                                 MHD_OPTION_END);
    if (h->daemon == NULL)
        return err_set(err, ERR_INTERNAL, "the HTTP daemon did not start: %s", strerror(errno));
    return ERR_OK;
}

static void http_free(struct http *h)
{
    watch_free(h);
    pthread_mutex_destroy(&h->lock);
    pthread_cond_destroy(&h->work);
    pthread_cond_destroy(&h->idle);
    free(h->slots);
    free(h->workers);
    free(h);
}

int http_start(const struct http_opts *o, int fd, struct http **ret, struct err *err)
{
    struct http *h = calloc(1, sizeof *h);
    if (h == NULL) {
        close(fd);
        return err_nomem(err);
    }
    h->o = *o;
    set_defaults(&h->o);
    h->queue_tail = &h->queue;
    pthread_condattr_t mono;
    pthread_condattr_init(&mono);
    pthread_condattr_setclock(&mono, CLOCK_MONOTONIC);
    pthread_mutex_init(&h->lock, NULL);
    pthread_cond_init(&h->work, NULL);
    pthread_cond_init(&h->idle, &mono);
    pthread_condattr_destroy(&mono);

    int rc = watch_start(h, err);
    if (rc == ERR_OK)
        rc = work_start(h, err);
    if (rc == ERR_OK)
        rc = start_daemon(h, fd, err);
    if (rc != ERR_OK) {
        work_stop(h);
        watch_stop(h);
        http_free(h);
        close(fd);
        return rc;
    }
    *ret = h;
    return ERR_OK;
}

/* Wait until no request is under way, at most until `when`; h->lock held. */
static void wait_idle(struct http *h, double when)
{
    const struct timespec t = { .tv_sec = (time_t)when,
                                .tv_nsec = (long)((when - (double)(time_t)when) * 1e9) };
    while (h->nrequests > 0 && pthread_cond_timedwait(&h->idle, &h->lock, &t) != ETIMEDOUT)
        continue;
}

void http_stop(struct http *h, double seconds)
{
    if (h == NULL)
        return;
    const int fd = MHD_quiesce_daemon(h->daemon);
    pthread_mutex_lock(&h->lock);
    wait_idle(h, now_mono() + seconds);
    h->closing = true;
    /* What is left is cut off; suspended connections must be resumed before the daemon may stop. */
    for (uint32_t i = 0; i < h->nslots; i++) {
        struct request *r = h->slots[i] ? h->slots[i]->req : NULL;
        if (r == NULL)
            continue;
        r->gone = true;
        if (r->waiting) {
            r->waiting = false;
            work_add(r);
        } else if (r->phase == SENDING) {
            request_resume(r);
        }
        shutdown(h->slots[i]->fd, SHUT_RDWR);
    }
    wait_idle(h, now_mono() + 10);
    pthread_mutex_unlock(&h->lock);
    watch_stop(h);
    work_stop(h); /* finishes its queue, so that nobody stays suspended */
    MHD_stop_daemon(h->daemon);
    if (fd >= 0)
        close(fd);
    http_free(h);
}

void http_stats(struct http *h, struct http_stats *ret)
{
    *ret = (struct http_stats){ 0 };
    pthread_mutex_lock(&h->lock);
    for (uint32_t i = 0; i < h->nslots; i++) {
        const struct request *r = h->slots[i] ? h->slots[i]->req : NULL;
        ret->connections += h->slots[i] != NULL;
        ret->requests += r != NULL;
        ret->waiting += r != NULL && (r->waiting || (r->phase == SENDING && r->suspended));
    }
    pthread_mutex_unlock(&h->lock);
}
