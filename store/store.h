/* store.h - the one SQLite file: tenants, keys, adapters, their versions and tensors.
 *
 * A `struct store` is one connection.  It belongs to one thread at a time and nothing in it is
 * locked.  SQLite's WAL mode lets others read while one writes; every write is one short
 * transaction.  Everything belongs to a tenant, and every function that takes a tenant sees that
 * tenant's rows only: somebody else's thing is ERR_NOT_FOUND.
 *
 * Ownership: what store_*() fills in is the caller's, freed with the matching *_free().  Strings
 * passed in are copied before the call returns.  Only this folder includes <sqlite3.h>.  The
 * schema is in migrations/, with views that make the file readable from the sqlite3 shell
 * (docs/database.md). */
#ifndef STORE_STORE_H
#define STORE_STORE_H

#include "engine/adapter.h"
#include "engine/err.h"

#include <stdbool.h>
#include <stdint.h>

struct store; /* opaque: see store_int.h */

/* Open the file, creating it if needed (mode 0600), and bring its schema up to date.  A file newer
 * than this program is refused.  ":memory:" gives a private database (tests).  Tenant `default`
 * (id 1) always exists. */
int store_open(const char *path, struct store **ret, struct err *err);
void store_close(struct store *st); /* NULL is fine */
/* Whom the audit table names for what this connection writes from now on: a key's id, or 0 (the
 * command line, a server without keys), which is what a new connection starts with. */
void store_actor(struct store *st, int64_t key_id);
/* Changes when another connection has written (PRAGMA data_version). */
int store_data_version(struct store *st, int64_t *ret, struct err *err);
/* PRAGMA integrity_check, foreign_key_check, and the hash of every version's tensors. */
int store_check(struct store *st, struct err *err);

enum { STORE_NAME_MAX = 64 };
enum { STORE_ID_MAX = 31 };      /* characters of "file-..." and "ftjob-..." */
/* [a-z0-9][a-z0-9._-]{0,63}; ERR_INVALID says so. */
int store_name_check(const char *what, const char *name, struct err *err);

/* --- tenants (tenants.c) and keys (keys.c) ------------------------------------------------- */
enum { STORE_TENANT_DEFAULT = 1 };

struct store_tenant {
    int64_t id;
    char name[STORE_NAME_MAX + 1];
    int64_t created_ms;
    int64_t nadapters;
    int64_t nkeys;  /* that are not revoked */
};
int store_tenant_add(struct store *st, const char *name, int64_t *ret_id, struct err *err);
int store_tenant_find(struct store *st, const char *name, int64_t *ret_id, struct err *err);
int store_tenant_get(struct store *st, int64_t id, struct store_tenant *ret, struct err *err);
/* free() it. */
int store_tenant_list(struct store *st, struct store_tenant **ret, size_t *ret_n, struct err *err);
/* Only when it has no adapters and no job that has not ended, and never `default`; its keys, files
 * and ended jobs are gone with it. */
int store_tenant_remove(struct store *st, const char *name, struct err *err);

/* A key is "lorad_" and 43 characters of base64url (256 random bits).  Only a keyed hash
 * (HMAC-SHA-256 with the pepper) is stored; the pepper lies in DB + ".pepper", mode 0600, made on
 * first use; one that others may read is refused, and so is one that is not the keys'.  The key's
 * first 12 characters are kept to recognise it by. */
enum { STORE_KEY_LEN = 6 + 43 };
struct store_key {
    int64_t id, tenant;
    char prefix[13];
    char label[STORE_NAME_MAX + 1];
    int64_t created_ms, last_used_ms; /* 0: never */
    bool revoked;
};
int store_key_create(struct store *st, int64_t tenant, const char *label,
                     char ret_key[STORE_KEY_LEN + 1], int64_t *ret_id, struct err *err);
/* ERR_AUTH with slug "invalid_api_key" if it is none of ours or revoked.  Constant time in the key.
 * Notes the time in last_used_ms at most once a minute, and never waits for a writer to do so. */
int store_key_check(struct store *st, const char *key, struct store_key *ret, struct err *err);
/* free() it. */
int store_key_list(struct store *st, int64_t tenant /* 0: all */, struct store_key **ret,
                   size_t *ret_n, struct err *err);
int store_key_revoke(struct store *st, int64_t id, struct err *err);
/* How many good keys are there?  (Without keys the server listens on loopback only.) */
int store_key_count(struct store *st, int64_t *ret, struct err *err);

/* --- adapters (adapters.c), versions (versions.c), tensors (tensors.c) ---------------------- */
struct store_version {
    int64_t id, adapter, tenant;
    char name[STORE_NAME_MAX + 1];   /* the adapter's */
    char tenant_name[STORE_NAME_MAX + 1];
    int version;                     /* 1, 2, 3, ...; never reused */
    bool live;
    enum adapter_method method;
    int rank_min, rank_max;
    double alpha;
    uint64_t params;
    int64_t bytes;                   /* of the tensors */
    int64_t modules;
    char hash_hex[65];
    uint8_t hash[32];
    char base_hash_hex[65];          /* the base it is bound to */
    bool base_claimed;               /* bound by the uploader's word only */
    char *base_name;                 /* what its config claims, or NULL */
    char origin[16];                 /* "upload", "train", "checkpoint" */
    int64_t created_ms;
    /* of trained ones: "support@3" that it was trained on from, the job ("" if deleted), the sha256
     * of the file; NULL, "" or NAN where there is none */
    char *parent;
    char job[STORE_ID_MAX + 1];
    char data_hash_hex[65];
    double train_loss, eval_loss, eval_loss_base; /* mean nll per token */
    int64_t eval_tokens;             /* -1: not measured */
};
void store_version_free(struct store_version *v);
void store_versions_free(struct store_version *v, size_t n);

struct store_quality;         /* jobs.h */
struct store_put_opts {
    bool activate;            /* make it live */
    const char *base_hash_hex; /* of the base that is loaded */
    bool base_claimed;
    const char *origin;       /* "upload" */
    /* of one that was trained without a job; 0 and NULL: not known */
    int64_t parent;           /* id of the version it was trained on from */
    const uint8_t *data_hash; /* [32] */
    const struct store_quality *quality;
};
/* New version of `name` (the adapter is made if there is none), in one transaction, tensors in chunk
 * rows of at most 4 MiB.  The same content for the same base as an existing version of this adapter
 * is that version (*ret_new false): nothing is written except, with activate, which one is live. */
int store_adapter_put(struct store *st, int64_t tenant, const char *name,
                      const struct adapter_src *src, const struct store_put_opts *o,
                      struct store_version *ret, bool *ret_new, struct err *err);
/* `ref` is NAME or NAME@V (live version without V), or OWNER/NAME[@V] where OWNER is the tenant
 * itself (sharing between tenants comes with the rights to do so), or what a training job made:
 * ft:BASE:TENANT:NAME:JOB[:ckpt-step-N] (jobs.h).  ERR_NOT_FOUND with slug "model_not_found". */
int store_version_find(struct store *st, int64_t tenant, const char *ref,
                       struct store_version *ret, struct err *err);
/* Live versions of the tenant's adapters, by name; `after` (a name or NULL) and `limit` (0: all)
 * page it.  Adapters without a live version are listed with their newest. */
int store_adapter_list(struct store *st, int64_t tenant, const char *after, int limit,
                       struct store_version **ret, size_t *ret_n, struct err *err);
/* All versions, oldest first; ERR_NOT_FOUND if there is no such adapter. */
int store_version_list(struct store *st, int64_t tenant, const char *name,
                       struct store_version **ret, size_t *ret_n, struct err *err);
int store_adapter_count(struct store *st, int64_t tenant /* 0: all */, int64_t *ret,
                        struct err *err);
/* Make version `version` live. */
int store_adapter_promote(struct store *st, int64_t tenant, const char *name, int version,
                          struct err *err);
/* NAME: the adapter with all its versions.  A version alone: ERR_CONFLICT if it is live; the last
 * one takes the adapter with it. */
int store_adapter_delete(struct store *st, int64_t tenant, const char *name, struct err *err);
int store_version_delete(struct store *st, int64_t tenant, const char *name, int version,
                         struct err *err);

/* Everything of a version, for building it or writing it out.  Checks the hash: ERR_DB if the
 * tensors are not what was put in. */
int store_version_load(struct store *st, int64_t version_id, struct adapter_src **ret,
                       struct err *err);
/* The version in the form that the forward pass of `base` computes with (adapter_build()), built while
 * the hash is still being computed, and thrown away if that is not what it should be.  What this connection
 * has built before is recognised by a shorter sum (verify.c).  DoRA's weight norms are computed when
 * nobody has built the version for this base before, and then stored.  `spare` is adapter_build()'s. */
int store_version_build(struct store *st, int64_t version_id, const struct base *base,
                        struct adapter **spare, struct adapter **ret /* adapter_free() */,
                        struct err *err);
/* Per-module facts without the tensors (A, B, E are NULL): for showing. */
int store_version_modules(struct store *st, int64_t version_id, struct adapter_src **ret,
                          struct err *err);

/* --- spool (spool.c) ------------------------------------------------------------------------ */
/* Uploads gather in files DB.spool/XXXXXX (folder mode 0700) until they are checked and written in
 * one transaction.  What a killed process left is removed when the server starts; files in use,
 * also by another process, are locked (flock) and stay.  ":memory:" spools to TMPDIR.  A spool
 * belongs to one thread at a time. */
struct spool;
int spool_clean(const char *db_path, struct err *err);
/* At most `max` bytes: more is ERR_TOO_LARGE. */
int spool_open(const char *db_path, size_t max, struct spool **ret, struct err *err);
int spool_write(struct spool *s, const void *data, size_t len, struct err *err);
/* Finish writing; the file's path, for mapping. */
int spool_done(struct spool *s, const char **ret_path, struct err *err);
size_t spool_size(const struct spool *s);
void spool_close(struct spool *s); /* removes the file; NULL is fine */

#endif
