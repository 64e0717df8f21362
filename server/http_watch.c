/* http_watch.c - notices what libmicrohttpd does not: clients that hang up while their connection
 * is suspended, and those that send or read too slowly.
 *
 * Every connection is in an epoll set of ours for EPOLLRDHUP, once: a client that closes its side
 * has gone, and its sequences are cancelled.  (One that closes only its sending side looks the same
 * from here, and libmicrohttpd gives it up as well.)  Deadlines are looked at a few
 * times a second; a connection past its own is shut down, which libmicrohttpd sees as the client
 * leaving.  Descriptors are valid as long as a conn is in its slot: libmicrohttpd closes them after
 * watch_remove(). */
#include "server/http_int.h"

#include <errno.h>
#include <linux/sockios.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

enum {
    TICK_MS = 250,
    READ_MIN = 16 << 10, /* bytes that a client must take in stall_seconds */
};
/* libmicrohttpd polls edge-triggered and misses an end that arrives together with the last bytes;
 * then nobody else would ever look at the connection again. */
static const double hang_up_seconds = 2;
static const uint64_t quit_key = UINT64_MAX;

static uint64_t key_of(const struct conn *c) { return (uint64_t)c->serial << 32 | c->slot; }

int watch_add(struct http *h, struct conn *conn)
{
    uint32_t slot = 0;
    while (slot < h->nslots && h->slots[slot] != NULL)
        slot++;
    if (slot == h->nslots) {
        const uint32_t n = h->nslots ? 2 * h->nslots : 64;
        struct conn **more = realloc(h->slots, n * sizeof(struct conn *));
        if (more == NULL)
            return ERR_NOMEM;
        memset(more + h->nslots, 0, (n - h->nslots) * sizeof(struct conn *));
        h->slots = more;
        h->nslots = n;
    }
    conn->slot = slot;
    conn->serial = h->serial++ & 0x7fffffff; /* never quit_key */
    struct epoll_event ev = { .events = EPOLLRDHUP | EPOLLONESHOT, .data.u64 = key_of(conn) };
    if (epoll_ctl(h->epoll, EPOLL_CTL_ADD, conn->fd, &ev) != 0)
        return ERR_IO;
    h->slots[slot] = conn;
    return ERR_OK;
}

void watch_remove(struct http *h, struct conn *conn)
{
    h->slots[conn->slot] = NULL;
    epoll_ctl(h->epoll, EPOLL_CTL_DEL, conn->fd, NULL);
}

void watch_deadline(struct conn *conn, double seconds)
{
    if (conn->hung_up && seconds > hang_up_seconds)
        seconds = hang_up_seconds;
    conn->deadline = now_mono() + seconds;
}

/* What the kernel still holds for the client; 0 if it will not say. */
static int unsent(const struct conn *conn)
{
    int n = 0;
    return ioctl(conn->fd, SIOCOUTQ, &n) == 0 ? n : 0;
}

void watch_reading(struct conn *conn, double seconds)
{
    watch_deadline(conn, seconds);
    conn->unread = unsent(conn);
}

/* The kernel may hold megabytes, and asks for more only when much of that has gone.  So a slow
 * client that reads steadily is late here, but not one that has stopped. */
static bool still_reads(struct conn *conn)
{
    const int before = conn->unread;
    conn->unread = unsent(conn);
    return conn->unread > 0 && before - conn->unread >= READ_MIN;
}

/* h->lock held. */
static void hang_up(struct http *h, uint64_t key)
{
    const uint32_t slot = (uint32_t)key;
    struct conn *conn = slot < h->nslots ? h->slots[slot] : NULL;
    if (conn == NULL || key_of(conn) != key)
        return;
    conn->hung_up = true;
    struct request *r = conn->req;
    if (r == NULL || r->phase == BODY || r->phase == ANSWERED) {
        watch_deadline(conn, hang_up_seconds);
    } else if (r->waiting) {
        r->gone = true;
        r->waiting = false;
        work_add(r);
    } else if (r->phase == SENDING) {
        r->gone = true;
        request_resume(r);
    }
}

/* h->lock held. */
static void check_deadlines(struct http *h)
{
    const double now = now_mono();
    for (uint32_t i = 0; i < h->nslots; i++) {
        struct conn *conn = h->slots[i];
        if (conn == NULL || conn->deadline == 0 || conn->deadline > now)
            continue;
        if (conn->unread > 0 && !conn->hung_up && still_reads(conn)) {
            watch_deadline(conn, h->o.stall_seconds);
            continue;
        }
        conn->deadline = 0;
        shutdown(conn->fd, SHUT_RDWR);
    }
}

static void *watch(void *ud)
{
    struct http *h = ud;
    struct epoll_event ev[64];
    double checked = now_mono();
    for (;;) {
        const int n = epoll_wait(h->epoll, ev, 64, TICK_MS);
        bool quit = n < 0 && errno != EINTR;
        pthread_mutex_lock(&h->lock);
        for (int i = 0; i < n; i++) {
            if (ev[i].data.u64 == quit_key)
                quit = true;
            else
                hang_up(h, ev[i].data.u64);
        }
        if (now_mono() - checked >= TICK_MS / 1e3) {
            check_deadlines(h);
            checked = now_mono();
        }
        pthread_mutex_unlock(&h->lock);
        if (quit)
            return NULL;
    }
}

int watch_start(struct http *h, struct err *err)
{
    h->quit = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    h->epoll = epoll_create1(EPOLL_CLOEXEC);
    struct epoll_event ev = { .events = EPOLLIN, .data.u64 = quit_key };
    if (h->quit < 0 || h->epoll < 0 || epoll_ctl(h->epoll, EPOLL_CTL_ADD, h->quit, &ev) != 0)
        return err_set(err, ERR_UNAVAILABLE, "cannot watch connections: %s", strerror(errno));
    if (pthread_create(&h->watcher, NULL, watch, h) != 0)
        return err_set(err, ERR_UNAVAILABLE, "cannot start the watcher's thread");
    h->watching = true;
    return ERR_OK;
}

void watch_stop(struct http *h)
{
    if (h->watching && eventfd_write(h->quit, 1) == 0)
        pthread_join(h->watcher, NULL);
    h->watching = false;
}

void watch_free(struct http *h)
{
    if (h->quit >= 0)
        close(h->quit);
    if (h->epoll >= 0)
        close(h->epoll);
    h->quit = h->epoll = -1;
}
