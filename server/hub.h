/* hub.h - models and adapters from the Hugging Face hub, or whatever speaks as it does.
 *
 * Files go to a cache, CACHE/hub/ORG--NAME/COMMIT/.  A file has its own name there only when it is
 * whole and its hash is right; until then it is NAME.part, where the next run goes on.  Nothing that
 * a server says becomes a path: only names that import or an adapter needs are asked for, and shards
 * of weights have plain names.  One thread. */
#ifndef SERVER_HUB_H
#define SERVER_HUB_H

#include "engine/err.h"

#include <stdbool.h>

/* ORG/NAME[@REV] */
struct hub_ref {
    char repo[200];
    const char *name; /* in repo, after the slash */
    char rev[200];    /* "main" without REV */
};
int hub_ref_parse(const char *text, struct hub_ref *ret, struct err *err);

enum hub_kind { HUB_MODEL, HUB_ADAPTER };

struct hub_opts {
    const char *endpoint; /* NULL: HF_ENDPOINT, or https://huggingface.co */
    const char *cache;    /* NULL: XDG_CACHE_HOME/lorad, or ~/.cache/lorad */
    int jobs;             /* files at once */
    int stall_seconds;    /* a connection that sends nothing for so long is given up */
};
/* Options of commands that download. */
#define HUB_OPTIONS                                                                               \
    { "endpoint", 0, "URL", NULL, "the hub (default: HF_ENDPOINT, or https://huggingface.co)", false }, \
    { "cache", 0, "DIR", NULL, "where files are kept (default: XDG_CACHE_HOME/lorad)", false },   \
    { "jobs", 'j', "N", "4", "files downloaded at once", false },                                 \
    { "stall", 0, "SECONDS", "30", "give up a connection that sends nothing for so long", false }
struct opts;
/* false after a sentence. */
bool hub_opts_read(const struct opts *o, struct hub_opts *ret);

/* Download what is missing of what `kind` needs.  *ret_dir: the folder; free() it. */
int hub_fetch(const struct hub_opts *o, const struct hub_ref *ref, enum hub_kind kind,
              char **ret_dir, struct err *err);

#endif
