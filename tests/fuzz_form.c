/* fuzz_form.c - bodies of multipart/form-data: the Content-Type's value, a line feed, the body.
 *
 * libmicrohttpd parses forms only for a connection of its own, so each input goes through a
 * daemon that never listens: a socket pair is its only client, and MHD_run() its only thread. */
#include "server/http_int.h"
#include "tests/fuzz.h"

#include <netinet/in.h>
#include <sys/socket.h>

static struct http http = { .o = { .db_path = ":memory:" } };

static void check_body(struct request *r)
{
    if (!body_end(r)) {
        law(r->resp.status >= 400 && r->resp.status != 500, "a refusal is the client's fault");
        return;
    }
    law(r->req.nparts <= API_PARTS_MAX, "parts are bounded");
    for (size_t i = 0; i < r->req.nparts; i++) {
        const struct api_part *p = &r->req.parts[i];
        law(p->name != NULL && (p->spool != NULL) == (strcmp(p->name, "weights") == 0),
            "weights alone go to a file");
        law(p->spool != NULL || (p->len <= API_PART_BYTES && p->value[p->len] == '\0'),
            "a part in memory is bounded and ends with a NUL");
    }
}

static enum MHD_Result answer(void *ud, struct MHD_Connection *c, const char *url,
                              const char *method, const char *version, const char *data,
                              size_t *len, void **state)
{
    (void)ud;
    (void)url;
    (void)method;
    (void)version;
    struct request *r = *state;
    if (r == NULL) {
        r = calloc(1, sizeof *r);
        law(r != NULL, "memory");
        *state = r;
        r->h = &http;
        r->c = c;
        r->plan = (struct api_plan){ .body = API_BODY_FORM, .max_body = 1 << 13,
                                     .spool_part = "weights" };
        if (!body_begin(r))
            law(r->resp.status >= 400 && r->resp.status != 500, "a refusal is the client's fault");
        return r->resp.status == 0 ? MHD_YES : MHD_NO;
    }
    if (*len > 0) {
        body_add(r, data, *len);
        *len = 0;
        return MHD_YES;
    }
    check_body(r);
    return MHD_NO;
}

static void completed(void *ud, struct MHD_Connection *c, void **state,
                      enum MHD_RequestTerminationCode why)
{
    (void)ud;
    (void)c;
    (void)why;
    struct request *r = *state;
    if (r == NULL)
        return;
    body_free(r);
    api_resp_free(&r->resp);
    http.uploads -= r->uploading;
    free(r);
    *state = NULL;
}

static struct MHD_Daemon *start(void)
{
    static struct MHD_Daemon *d;
    if (d != NULL)
        return d;
    pthread_mutex_init(&http.lock, NULL);
    http.o.max_uploads = 1;
    d = MHD_start_daemon(MHD_USE_NO_LISTEN_SOCKET, 0, NULL, NULL, answer, NULL,
                         MHD_OPTION_NOTIFY_COMPLETED, completed, NULL, MHD_OPTION_END);
    law(d != NULL, "libmicrohttpd starts");
    return d;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len)
{
    struct MHD_Daemon *d = start();
    const uint8_t *line = len > 0 ? memchr(data, '\n', len) : NULL;
    const size_t ntype = line != NULL ? (size_t)(line - data) : 0;
    const size_t nbody = line != NULL ? len - ntype - 1 : len;
    char head[640];
    int n = snprintf(head, sizeof head,
                     "POST /v1/adapters HTTP/1.1\r\nHost: x\r\nContent-Length: %zu\r\n"
                     "Content-Type: %.*s\r\n\r\n", nbody, (int)(ntype < 400 ? ntype : 400),
                     (const char *)data);
    const struct sockaddr_in address = { .sin_family = AF_INET };
    int fd[2];
    law(socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0, fd) == 0, "socketpair");
    law(write(fd[0], head, (size_t)n) == n, "the head is sent");
    law(nbody == 0 || write(fd[0], data + len - nbody, nbody) == (ssize_t)nbody, "the body is sent");
    shutdown(fd[0], SHUT_WR);
    law(MHD_add_connection(d, fd[1], (const struct sockaddr *)&address, sizeof address) == MHD_YES,
        "a connection is taken");
    const union MHD_DaemonInfo *info;
    do {
        MHD_run(d);
        info = MHD_get_daemon_info(d, MHD_DAEMON_INFO_CURRENT_CONNECTIONS);
    } while (info != NULL && info->num_connections > 0);
    law(http.uploads == 0, "an upload gives its place back");
    close(fd[0]);
    return 0;
}
