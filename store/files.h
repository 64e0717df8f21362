/* files.h - uploaded files: training data and data to evaluate on.
 *
 * A file has an id that clients see ("file-..."), and its bytes in chunk rows.  It is written in
 * several short transactions and is there for everybody else only after the last one.  The rules of
 * store.h about tenants, threads and ownership hold here too. */
#ifndef STORE_FILES_H
#define STORE_FILES_H

#include "store/store.h"

enum { STORE_FILE_NAME_MAX = 255 };

struct store_file {
    int64_t id, tenant;
    char ref[STORE_ID_MAX + 1];  /* "file-..." */
    char name[STORE_FILE_NAME_MAX + 1];
    char purpose[16];            /* "fine-tune", "evals" */
    int64_t bytes;
    uint8_t hash[32];            /* sha256 of the content */
    int64_t created_ms, expires_ms; /* 0: never */
};
/* `data` is the whole content.  expires_ms 0: never. */
int store_file_add(struct store *st, int64_t tenant, const char *name, const char *purpose,
                   const void *data, size_t len, int64_t expires_ms, struct store_file *ret,
                   struct err *err);
/* ERR_NOT_FOUND with slug "file_not_found": also a file that has expired, unless a job that has not
 * ended needs it. */
int store_file_get(struct store *st, int64_t tenant, const char *ref, struct store_file *ret,
                   struct err *err);
/* Newest first, or oldest first.  purpose NULL: all; `after`: a file's ref, or NULL; limit 0: all.
 * free() *ret. */
int store_file_list(struct store *st, int64_t tenant, const char *purpose, const char *after,
                    int limit, bool oldest_first, struct store_file **ret, size_t *ret_n,
                    struct err *err);
/* The content, written into a spool piece by piece (at most 4 MiB each).  ERR_DB if the bytes are not
 * what was put in. */
int store_file_read(struct store *st, int64_t tenant, const char *ref, struct spool *to,
                    struct err *err);
/* ERR_CONFLICT while a job that has not ended needs it. */
int store_file_delete(struct store *st, int64_t tenant, const char *ref, struct err *err);
/* Removes what has expired and what a killed process left half-written (older than an hour). */
int store_files_clean(struct store *st, struct err *err);

#endif
