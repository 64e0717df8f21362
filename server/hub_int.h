/* hub_int.h - downloads in three parts: what to ask for (hub.c), transfers (hub_http.c), the file that
 * a transfer fills (hub_part.c). */
#ifndef SERVER_HUB_INT_H
#define SERVER_HUB_INT_H

#include "engine/util.h"
#include "server/hub.h"

#include <curl/curl.h>
#include <nettle/sha1.h>

enum { HUB_NAME_MAX = 200 };

/* A file as the hub lists it. */
struct hub_file {
    char name[HUB_NAME_MAX + 1];
    uint64_t size;
    bool lfs;
    uint8_t sha256[32]; /* of the content, with lfs */
    uint8_t sha1[20];   /* of "blob SIZE\0" and the content (git), without */
};

/* --- hub_part.c ------------------------------------------------------------------------------- */
/* NAME.part on its way to NAME.  Locked, so that two programs do not write the same file. */
struct part {
    const struct hub_file *file;
    int dir, fd;
    uint64_t at;    /* bytes there, all of them in the hash */
    bool resumed;   /* some were there before this run */
    struct sha256 sha256;
    struct sha1_ctx sha1;
};
/* Is NAME there, whole? */
bool part_is_done(int dir, const struct hub_file *f);
/* Goes on where an earlier run ended. */
int part_open(struct part *p, int dir, const struct hub_file *f, struct err *err);
int part_write(struct part *p, const void *data, size_t len, struct err *err);
int part_restart(struct part *p, struct err *err);
/* All bytes are there: check the hash and give it its name.  With a wrong hash the file is removed;
 * *ret_again true: some bytes were of an earlier run, and it is worth trying once more. */
int part_finish(struct part *p, bool *ret_again, struct err *err);
void part_close(struct part *p);

/* --- hub_http.c ------------------------------------------------------------------------------- */
struct hub {
    const struct hub_opts *o;
    const struct hub_ref *ref;
    char *endpoint;    /* without a slash at the end */
    char *token;       /* "Authorization: Bearer ...", or NULL */
    CURLM *multi;
};

struct transfer {
    char *url;         /* of the first request */
    const char *what;  /* for messages: a file's name, or "the list of files" */
    struct part *part; /* where it goes, or NULL: */
    struct buf *text;

    /* hub_http.c's */
    struct hub *hub;
    CURL *easy;        /* NULL between two tries */
    struct curl_slist *headers;
    char *next;        /* where a redirect pointed */
    int redirects, tries;
    double not_before; /* when it may be tried again */
    double retry_after; /* seconds that the server asked for, or -1 */
    uint64_t began, range; /* bytes at the start of this try; where the server said it begins */
    bool done;
    struct err err;    /* of our own side: disk, size */
};

int hub_open(struct hub *h, const struct hub_opts *o, const struct hub_ref *ref, struct err *err);
void hub_close(struct hub *h);
/* Run them all, o->jobs at a time; the first failure that no new try mends stops the rest. */
int hub_run(struct hub *h, struct transfer *t, size_t n, const char *label, struct err *err);

#endif
