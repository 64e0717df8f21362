/* http_int.h - what http.c, http_body.c, http_work.c and http_watch.c share. */
#ifndef SERVER_HTTP_INT_H
#define SERVER_HTTP_INT_H

#include "server/http.h"

#include <microhttpd.h>
#include <pthread.h>

enum {
    BODY_RATE = 16 << 10,    /* bytes/s that a client must manage after body_seconds */
    SWALLOW_MAX = 4 << 20,   /* of a refused body are read, so that the client sees the answer */
};

struct request;

/* One TCP connection, from accept to close. */
struct conn {
    int fd;
    uint32_t slot, serial;   /* its place in http->slots, and which connection it is there */
    double deadline;         /* now_mono() when it is cut off; 0: never */
    bool hung_up;            /* the client has closed its side */
    int unread;              /* bytes of a stream that it had not taken when we last looked */
    struct request *req;     /* the one under way, or NULL */
    char address[48];
};

/* Where a form ends: the line "--BOUNDARY--", found while its bytes pass by. */
enum { BOUNDARY_MAX = 70 }; /* by RFC 2046 */
struct form_end {
    char mark[BOUNDARY_MAX + 6];    /* "\r\n--BOUNDARY--" */
    uint8_t back[BOUNDARY_MAX + 6]; /* so many bytes of the mark still fit when the next does not */
    size_t len, at;                 /* len 0: it is not looked for; at: bytes that fit so far */
    bool over;
};

/* What a request is doing.  The handler is called by libmicrohttpd in HEADERS (again, after the
 * worker has decided), BODY, ANSWER; the rest happens while the connection is suspended or
 * sending. */
enum phase {
    HEADERS,   /* the worker runs api_begin() */
    BODY,      /* pieces arrive */
    ANSWERED,  /* there is an answer already; a body is read and dropped */
    ANSWER,    /* the worker runs api_dispatch(), or the engine works */
    SENDING,   /* the answer is libmicrohttpd's */
};

struct request {
    struct http *h;
    struct conn *conn;
    struct MHD_Connection *c; /* NULL once libmicrohttpd is done with it */
    int refs;                 /* connection; response with a stream */
    enum phase phase;
    double started;
    char id[20];
    char *method, *path;
    bool has_body;            /* by its headers */
    uint64_t content_length;

    /* Under h->lock. */
    bool suspended;
    bool queued;              /* a worker has it or will */
    bool waiting;             /* for a wake */
    bool woken;               /* since somebody looked */
    bool gone;                /* the client is */
    struct request *next;     /* in the queue */

    struct api_plan plan;
    struct api_req req;
    struct api_resp resp;
    bool have_resp;
    struct api_call *call;

    /* http_body.c */
    uint64_t received;
    bool too_large;
    struct buf body;
    struct MHD_PostProcessor *form;
    struct form_end form_end;
    struct api_part *parts;
    size_t nparts;
    struct err body_err;      /* why the body is no good */
    bool uploading;           /* counted in h->uploads */
    double body_started;

    /* streams */
    struct buf out;
    size_t out_sent;
    bool stream_end;
    int status;
};

struct http {
    struct http_opts o;
    struct MHD_Daemon *daemon;
    pthread_mutex_t lock;     /* all below, and what struct request says */
    pthread_cond_t work, idle;
    struct request *queue, **queue_tail;
    int nrequests;
    int uploads;
    bool closing;             /* no new requests, nobody waits for the engine any more */
    bool stopping;            /* workers leave when the queue is empty */
    uint16_t request_serial;
    struct conn **slots;
    uint32_t nslots;
    uint32_t serial;
    pthread_t *workers;
    int nworkers;
    pthread_t watcher;
    bool watching;
    int epoll;
    int quit;                 /* eventfd that ends the watcher */
};

/* --- http.c --- */
void request_unref(struct request *r); /* with h->lock not held */
/* News for a request: from the engine, a worker, or the watcher. */
void request_wake(void *ud);
/* Let libmicrohttpd go on with it; h->lock held. */
void request_resume(struct request *r);

/* --- http_body.c --- */
/* Get ready for the body that the plan wants; false: r->resp says why not. */
bool body_begin(struct request *r);
void body_add(struct request *r, const char *data, size_t len);
/* All of it is there: fills r->req; false: r->resp is the refusal. */
bool body_end(struct request *r);
void body_free(struct request *r);

/* --- http_work.c --- */
int work_start(struct http *h, struct err *err);
void work_stop(struct http *h);
/* Give `r` to a worker; h->lock held. */
void work_add(struct request *r);

/* --- http_watch.c --- */
int watch_start(struct http *h, struct err *err);
void watch_stop(struct http *h); /* ends the thread */
/* Closes what watch_add() and watch_remove() use: after the last poll thread has ended. */
void watch_free(struct http *h);
/* h->lock held. */
int watch_add(struct http *h, struct conn *conn);
void watch_remove(struct http *h, struct conn *conn);
/* The next bytes are due in so many seconds. */
void watch_deadline(struct conn *conn, double seconds);
/* More of a stream goes out now; the client is cut off when it takes nothing for so long. */
void watch_reading(struct conn *conn, double seconds);

#endif
