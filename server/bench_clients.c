/* bench_clients.c - clients that read streams of tokens, all in one thread so that they cost little.
 *
 * Each has a connection of its own, made before anything is timed.  What comes is taken apart as it
 * comes: HTTP's chunks, and in them the lines of the events, which do not care where chunks end.  An
 * event whose choice has not ended carries text, and its time is kept.  A stream is whole when its choice
 * ended because it had all its tokens and [DONE] came; whatever else the server says is the error. */
#include "server/bench_stage.h"

#include "engine/util.h"

#include <errno.h>
#include <fcntl.h>
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <unistd.h>

enum { LINE_BYTES = 16384, READ_BYTES = 65536, STALL_MS = 120000 };

struct line {
    char s[LINE_BYTES];
    size_t len;
};

enum step { HEAD, CHUNK_SIZE, CHUNK_DATA, CHUNK_END, REFUSAL, DONE };

struct reader {
    int fd;
    enum step step;
    size_t left;             /* of the chunk, or of the body of a refusal */
    bool good;               /* the status was 200 */
    bool all_tokens, end;    /* finish_reason was "length"; [DONE] came */
    char said[160];          /* by the server, instead of that */
    struct line frame, event;
};

/* Letters, each a token, that no other seed has. */
static int add_prompt(struct buf *b, int n, uint64_t seed)
{
    uint64_t x = (seed + 1) * 0x9e3779b97f4a7c15u | 1;
    int rc = ERR_OK;
    for (int i = 0; i < n && rc == ERR_OK; i++) {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        const char letter = (char)('a' + (x >> 33) % 26);
        rc = buf_add(b, &letter, 1);
    }
    return rc;
}

static int send_request(const struct reader *r, struct stage_client *c, uint64_t seed, struct err *err)
{
    struct buf body, all;
    buf_init(&body, 1 << 20);
    buf_init(&all, 1 << 20);
    int rc = buf_printf(&body, "{\"model\":\"%s\",\"max_tokens\":%d,\"stream\":true,\"temperature\":1,"
                        "\"seed\":%llu,\"ignore_eos\":true,\"prompt\":\"", c->model, c->max_tokens,
                        (unsigned long long)(seed & 0xffffff));
    if (rc == ERR_OK)
        rc = add_prompt(&body, c->prompt_tokens, seed);
    if (rc == ERR_OK)
        rc = buf_puts(&body, "\"}");
    if (rc == ERR_OK)
        rc = buf_printf(&all, "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
                        "Content-Type: application/json\r\nContent-Length: %zu\r\n\r\n%s", body.len,
                        body.data);
    c->sent = now_mono();
    rc = rc == ERR_OK ? stage_send(r->fd, all.data, all.len, err) : err_nomem(err);
    buf_free(&body);
    buf_free(&all);
    return rc;
}

/* --- reading -------------------------------------------------------------------------------- */

/* Up to the end of the line, at most n bytes; how many those were.  *ret_whole: `l` is a line now,
 * without its end. */
static size_t add_to_line(struct line *l, const char *p, size_t n, bool *ret_whole)
{
    const char *end = memchr(p, '\n', n);
    const size_t text = end != NULL ? (size_t)(end - p) : n;
    const size_t room = sizeof l->s - 1 - l->len, kept = text < room ? text : room;
    memcpy(l->s + l->len, p, kept); /* nobody looks at what is past the room */
    l->len += kept;
    *ret_whole = end != NULL;
    if (end == NULL)
        return n;
    if (l->len > 0 && l->s[l->len - 1] == '\r')
        l->len--;
    l->s[l->len] = '\0';
    return text + 1;
}

/* The next step after a line of HTTP's own. */
static enum step after_frame(struct reader *r)
{
    switch (r->step) {
    case HEAD:
        if (strncmp(r->frame.s, "HTTP/1.1 200", 12) == 0)
            r->good = true;
        if (strncasecmp(r->frame.s, "Content-Length:", 15) == 0)
            r->left = strtoul(r->frame.s + 15, NULL, 10);
        return r->frame.len > 0 ? HEAD : r->good ? CHUNK_SIZE : r->left > 0 ? REFUSAL : DONE;
    case CHUNK_SIZE:
        r->left = strtoul(r->frame.s, NULL, 16);
        return r->left > 0 ? CHUNK_DATA : DONE;
    default:
        return CHUNK_SIZE;
    }
}

/* The sentence of {"error":{"message":...}}, else what there is. */
static void take_error(struct reader *r, const char *json)
{
    json_t *j = json_loads(json, 0, NULL);
    const char *s = json_string_value(json_object_get(json_object_get(j, "error"), "message"));
    snprintf(r->said, sizeof r->said, "%.150s", s != NULL ? s : json);
    json_decref(j);
}

static void take_event(struct reader *r, struct stage_client *c, double now)
{
    static const char data[] = "data: ";
    const char *s = r->event.s + sizeof data - 1;
    if (strncmp(r->event.s, data, sizeof data - 1) != 0)
        return; /* the empty line between two */
    if (strcmp(s, "[DONE]") == 0)
        r->end = true;
    else if (strncmp(s, "{\"error\":", 9) == 0)
        take_error(r, s);
    else if (strstr(s, "\"finish_reason\":null") != NULL && c->events < c->max_tokens)
        c->at[c->events++] = now;
    else if (strstr(s, "\"finish_reason\":\"length\"") != NULL) {
        r->all_tokens = true;
        if (c->events == 0) /* no token had text (part of a character, say): this event tells of them */
            c->at[c->events++] = now;
    }
}

static void take_bytes(struct reader *r, struct stage_client *c, const char *p, size_t n)
{
    const double now = now_mono();
    bool whole;
    while (n > 0 && r->step != DONE) {
        size_t used;
        if (r->step == CHUNK_DATA) {
            used = add_to_line(&r->event, p, n < r->left ? n : r->left, &whole);
            r->left -= used;
            if (whole) {
                take_event(r, c, now);
                r->event.len = 0;
            }
            if (r->left == 0)
                r->step = CHUNK_END;
        } else if (r->step == REFUSAL) { /* JSON in one line */
            used = add_to_line(&r->event, p, n < r->left ? n : r->left, &whole);
            r->event.s[r->event.len] = '\0';
            r->left -= used;
            if (r->left == 0)
                r->step = DONE;
        } else {
            used = add_to_line(&r->frame, p, n, &whole);
            if (whole) {
                r->step = after_frame(r);
                r->frame.len = 0;
            }
        }
        p += used;
        n -= used;
    }
}

/* Whether what has ended is what was asked for. */
static int check_end(struct reader *r, const struct stage_client *c, struct err *err)
{
    if (!r->good) {
        take_error(r, r->event.s);
        return err_set(err, ERR_IO, "the server refused a stream for %.60s: %s", c->model, r->said);
    }
    if (r->said[0] != '\0')
        return err_set(err, ERR_IO, "a stream for %.60s broke: %s", c->model, r->said);
    if (!r->all_tokens || !r->end)
        return err_set(err, ERR_IO, "a stream for %.60s ended without %s, and without a reason", c->model,
                       r->all_tokens ? "[DONE]" : "all its tokens");
    return ERR_OK;
}

static int read_some(struct reader *r, struct stage_client *c, char *piece, struct err *err)
{
    const ssize_t n = read(r->fd, piece, READ_BYTES);
    if (n < 0)
        return errno == EAGAIN || errno == EINTR ? ERR_OK
                   : err_set(err, ERR_IO, "a client cannot read: %s", strerror(errno));
    if (n == 0)
        return err_set(err, ERR_IO, "the server closed a stream before its end");
    take_bytes(r, c, piece, (size_t)n);
    return r->step == DONE ? check_end(r, c, err) : ERR_OK;
}

static int read_streams(int epoll, struct reader *r, struct stage_client *c, int n, struct err *err)
{
    struct epoll_event ev[64];
    char *piece = malloc(READ_BYTES);
    int rc = piece != NULL ? ERR_OK : err_nomem(err), left = n;
    while (rc == ERR_OK && left > 0) {
        const int got = epoll_wait(epoll, ev, 64, STALL_MS);
        if (got == 0 || (got < 0 && errno != EINTR))
            rc = err_set(err, ERR_IO, "nothing came from the server for %d s", STALL_MS / 1000);
        for (int k = 0; k < got && rc == ERR_OK; k++) {
            const uint32_t i = ev[k].data.u32;
            rc = read_some(&r[i], &c[i], piece, err);
            if (r[i].step == DONE) {
                epoll_ctl(epoll, EPOLL_CTL_DEL, r[i].fd, NULL);
                left--;
            }
        }
    }
    free(piece);
    return rc;
}

/* --- all of them ------------------------------------------------------------------------------ */

static int connect_all(int port, int epoll, struct reader *r, struct stage_client *c, int n,
                       struct err *err)
{
    for (int i = 0; i < n; i++) {
        struct epoll_event ev = { .events = EPOLLIN, .data.u32 = (uint32_t)i };
        c[i].at = malloc((size_t)c[i].max_tokens * sizeof *c[i].at);
        c[i].events = 0;
        if (c[i].at == NULL)
            return err_nomem(err);
        r[i].fd = stage_connect(port, err);
        if (r[i].fd < 0)
            return ERR_IO;
        if (epoll_ctl(epoll, EPOLL_CTL_ADD, r[i].fd, &ev) != 0)
            return err_set(err, ERR_IO, "epoll: %s", strerror(errno));
    }
    return ERR_OK;
}

int stage_clients(int port, struct stage_client *c, int n, uint64_t seed, struct err *err)
{
    struct reader *r = calloc((size_t)n, sizeof *r);
    const int epoll = epoll_create1(EPOLL_CLOEXEC);
    for (int i = 0; i < n; i++) {
        c[i].at = NULL;
        if (r != NULL)
            r[i].fd = -1;
    }
    int rc = r != NULL && epoll >= 0 ? ERR_OK : err_nomem(err);
    if (rc == ERR_OK)
        rc = connect_all(port, epoll, r, c, n, err);
    for (int i = 0; i < n && rc == ERR_OK; i++) {
        rc = send_request(&r[i], &c[i], seed * 4096 + (uint64_t)i, err);
        fcntl(r[i].fd, F_SETFL, O_NONBLOCK);
    }
    if (rc == ERR_OK)
        rc = read_streams(epoll, r, c, n, err);
    for (int i = 0; r != NULL && i < n; i++)
        if (r[i].fd >= 0)
            close(r[i].fd);
    if (epoll >= 0)
        close(epoll);
    free(r);
    if (rc != ERR_OK)
        stage_clients_free(c, n);
    return rc;
}

void stage_clients_free(struct stage_client *c, int n)
{
    for (int i = 0; i < n; i++) {
        free(c[i].at);
        c[i].at = NULL;
    }
}
