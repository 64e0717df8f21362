/* http.h - libmicrohttpd on one side, api/ on the other.
 *
 * Three kinds of threads.  A few of libmicrohttpd's own poll all connections; they read headers
 * and bodies and write answers, and never wait for anything else.  Workers, each with its own
 * database connection, run the handlers while the connection is suspended.  One watcher notices
 * clients that hang up while they are suspended, and those who take too long.  The life of a
 * request is at the head of http.c. */
#ifndef SERVER_HTTP_H
#define SERVER_HTTP_H

#include "api/api.h"

#include <stdio.h>

struct http_opts {
    struct api *api;
    const char *db_path;       /* where uploads are spooled */
    int poll_threads;          /* 0: 2 */
    int workers;               /* 0: 4 */
    int max_connections;       /* 0: 1024 */
    int max_per_address;       /* 0: no limit of its own */
    int max_uploads;           /* at once; more is 429; 0: 4 */
    double header_seconds;     /* for a request's line and headers; 0: 20 */
    double body_seconds;       /* for a body, plus what it takes at BODY_RATE; 0: 30 */
    double idle_seconds;       /* between two requests; 0: 60 */
    double stall_seconds;      /* a reader of a stream who takes nothing; 0: 30 */
    FILE *access_log;          /* one line per request, or NULL */
};

/* A socket that listens on host:port (port 0: any free one).  *ret_loopback: only this machine can
 * reach it. */
int http_listen(const char *host, int port, int *ret_fd, int *ret_port, bool *ret_loopback,
                struct err *err);

struct http;
/* Serve on `fd`, which is closed at the end. */
int http_start(const struct http_opts *o, int fd, struct http **ret, struct err *err);
/* Stop accepting, give answers that are on their way `seconds` to be sent, then cut off what is
 * left, and free.  NULL is fine. */
void http_stop(struct http *h, double seconds);

struct http_stats {
    int connections, requests, waiting; /* open; under way; of these, those that wait for tokens */
};
void http_stats(struct http *h, struct http_stats *ret);

#endif
