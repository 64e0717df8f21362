/* keys.c - access keys and the pepper they are hashed with.
 *
 * The database never holds a key, only HMAC-SHA-256 of it with the pepper: 32 random bytes in the
 * file DB.pepper.  So a copy of the database alone neither lets anybody in nor lets anybody guess.
 * Keys have 256 random bits: a fast hash is enough, and it can be looked up by index.
 *
 * The pepper is made with the first key, under the writer's lock, in a temporary file that is
 * linked to its name: it appears whole, once, and never replaces another. */
#include "store/store_int.h"

#include <errno.h>
#include <fcntl.h>
#include <sodium.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#include "engine/util.h"

enum {
    PEPPER_LEN = sizeof(((struct store *)0)->pepper),
    PEPPER_TAG_LEN = 8,   /* which pepper it was, without saying anything about it */
    TOUCH_MS = 60 * 1000, /* last_used_ms is written at most this often */
};
static const char key_start[] = "lorad_";

/* --- the pepper ---------------------------------------------------------------------------- */
static void pepper_tag(const uint8_t pepper[PEPPER_LEN], uint8_t ret[PEPPER_TAG_LEN])
{
    uint8_t full[crypto_auth_hmacsha256_BYTES];
    static const char what[] = "lorad: which pepper is this";
    crypto_auth_hmacsha256(full, (const unsigned char *)what, sizeof what - 1, pepper);
    memcpy(ret, full, PEPPER_TAG_LEN);
}

static char *pepper_path(const struct store *st)
{
    char *path = NULL;
    return asprintf(&path, "%s.pepper", st->path) < 0 ? NULL : path;
}

/* *ret_found false if there is no such file. */
static int pepper_read(const char *path, uint8_t ret[PEPPER_LEN], bool *ret_found, struct err *err)
{
    *ret_found = false;
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0 && errno == ENOENT)
        return ERR_OK;
    if (fd < 0)
        return err_set(err, ERR_IO, "the pepper of the keys, %s, cannot be read: %s", path,
                       strerror(errno));
    int rc = ERR_OK;
    struct stat sb;
    if (fstat(fd, &sb) != 0 || !S_ISREG(sb.st_mode) || sb.st_size != PEPPER_LEN)
        rc = err_set(err, ERR_IO, "%s is not a pepper of keys: it must be a file of %d bytes", path,
                     PEPPER_LEN);
    else if ((sb.st_mode & 077) != 0)
        rc = err_set(err, ERR_IO,
                     "%s can be read by others (mode %04o): run chmod 600 on it, and make new keys"
                     " if somebody may have read it", path, (unsigned)sb.st_mode & 07777);
    else if (read(fd, ret, PEPPER_LEN) != PEPPER_LEN)
        rc = err_set(err, ERR_IO, "the pepper of the keys, %s, cannot be read", path);
    close(fd);
    *ret_found = rc == ERR_OK;
    return rc;
}

static int write_and_sync(int fd, const uint8_t pepper[PEPPER_LEN], struct err *err)
{
    int rc = fd_write_all(fd, pepper, PEPPER_LEN, err);
    if (rc == ERR_OK && fsync(fd) != 0)
        rc = err_set(err, ERR_IO, "cannot write the pepper of the keys: %s", strerror(errno));
    return rc;
}

/* The name must be on the disk before a key is that needs it. */
static void sync_folder(const char *path)
{
    char *folder = strdup(path);
    if (folder == NULL)
        return;
    char *slash = strrchr(folder, '/');
    if (slash != NULL)
        slash[slash == folder] = '\0';
    int fd = open(slash != NULL ? folder : ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd >= 0) {
        fsync(fd);
        close(fd);
    }
    free(folder);
}

static int pepper_create(const char *path, uint8_t ret[PEPPER_LEN], struct err *err)
{
    char *temp;
    if (asprintf(&temp, "%s.XXXXXX", path) < 0)
        return err_nomem(err);
    int fd = mkostemp(temp, O_CLOEXEC); /* O_EXCL, mode 0600 */
    if (fd < 0) {
        int rc = err_set(err, ERR_IO, "cannot make the pepper of the keys, %s: %s", path,
                         strerror(errno));
        free(temp);
        return rc;
    }
    randombytes_buf(ret, PEPPER_LEN);
    int rc = write_and_sync(fd, ret, err);
    close(fd);
    if (rc == ERR_OK && link(temp, path) != 0)
        rc = err_set(err, ERR_IO, "cannot make the pepper of the keys, %s: %s", path,
                     strerror(errno));
    unlink(temp);
    free(temp);
    if (rc == ERR_OK)
        sync_folder(path);
    return rc;
}

/* Is there a good key that was made with another pepper?  (tag NULL: with any.) */
static int foreign_keys(struct store *st, const uint8_t *tag, bool *ret, struct err *err)
{
    struct sql q = sql_open(st,
                            "SELECT 1 FROM access_key WHERE revoked_ms = 0 AND pepper IS NOT ?"
                            " LIMIT 1", err);
    if (tag != NULL)
        sql_blob(&q, tag, PEPPER_TAG_LEN);
    else
        sql_null(&q);
    *ret = sql_step(&q) == 1;
    return sql_close(&q);
}

static int pepper_from_file(struct store *st, const char *path, bool create, struct err *err)
{
    uint8_t tag[PEPPER_TAG_LEN];
    bool found, foreign;
    int rc = pepper_read(path, st->pepper, &found, err);
    if (rc != ERR_OK)
        return rc;
    if (found)
        pepper_tag(st->pepper, tag);
    rc = foreign_keys(st, found ? tag : NULL, &foreign, err);
    if (rc != ERR_OK)
        return rc;
    if (foreign && !found)
        return err_set(err, ERR_IO,
                       "%s has keys, but their pepper, %s, is missing: put it back from a backup, or"
                       " revoke the keys and make new ones", st->path, path);
    if (foreign)
        return err_set(err, ERR_IO,
                       "%s is not the pepper that the keys in %s were made with: put that one back,"
                       " or revoke the keys and make new ones", path, st->path);
    if (!found && create) {
        rc = pepper_create(path, st->pepper, err);
        found = rc == ERR_OK;
    }
    st->has_pepper = found;
    return rc;
}

/* Read it once per connection.  Without `create` and without a file, has_pepper stays false. */
static int pepper_need(struct store *st, bool create, struct err *err)
{
    if (st->has_pepper)
        return ERR_OK;
    if (strcmp(st->path, ":memory:") == 0) {
        randombytes_buf(st->pepper, PEPPER_LEN);
        st->has_pepper = true;
        return ERR_OK;
    }
    char *path = pepper_path(st);
    if (path == NULL)
        return err_nomem(err);
    int rc = pepper_from_file(st, path, create, err);
    free(path);
    return rc;
}

/* --- keys ---------------------------------------------------------------------------------- */
static void key_hash(const struct store *st, const char *key, uint8_t ret[32])
{
    crypto_auth_hmacsha256(ret, (const unsigned char *)key, strlen(key), st->pepper);
}

static void key_make(char ret[STORE_KEY_LEN + 1])
{
    uint8_t secret[32];
    randombytes_buf(secret, sizeof secret);
    memcpy(ret, key_start, sizeof key_start - 1);
    sodium_bin2base64(ret + sizeof key_start - 1, STORE_KEY_LEN + 1 - (sizeof key_start - 1), secret,
                      sizeof secret, sodium_base64_VARIANT_URLSAFE_NO_PADDING);
    sodium_memzero(secret, sizeof secret);
}

/* Inside the caller's transaction. */
static int key_insert(struct store *st, int64_t tenant, const char *label, const char *key,
                      int64_t *ret_id, struct err *err)
{
    struct store_tenant t;
    int rc = store_tenant_get(st, tenant, &t, err);
    if (rc == ERR_OK)
        rc = pepper_need(st, true, err);
    if (rc != ERR_OK)
        return rc;
    uint8_t hash[32], tag[PEPPER_TAG_LEN];
    key_hash(st, key, hash);
    pepper_tag(st->pepper, tag);
    struct sql q = sql_open(st,
                            "INSERT INTO access_key (tenant_id, hash, pepper, prefix, label,"
                            " created_ms) VALUES (?, ?, ?, ?, ?, ?)", err);
    sql_int(&q, tenant);
    sql_blob(&q, hash, sizeof hash);
    sql_blob(&q, tag, sizeof tag);
    sql_text_n(&q, key, sizeof((struct store_key *)0)->prefix - 1);
    sql_text(&q, label);
    sql_int(&q, now_unix_ms());
    rc = sql_run(&q);
    *ret_id = sqlite3_last_insert_rowid(st->db);
    if (rc == ERR_OK)
        rc = store_audit(st, tenant, "key.create", err, "key %lld", (long long)*ret_id);
    return rc;
}

int store_key_create(struct store *st, int64_t tenant, const char *label,
                     char ret_key[STORE_KEY_LEN + 1], int64_t *ret_id, struct err *err)
{
    if (label == NULL)
        label = "";
    if (strlen(label) > STORE_NAME_MAX)
        return err_set(err, ERR_INVALID, "the label of a key has at most %d bytes, not %zu",
                       STORE_NAME_MAX, strlen(label));
    for (const char *p = label; *p != '\0'; p++)
        if ((unsigned char)*p < ' ' || *p == 0x7f)
            return err_set(err, ERR_INVALID, "the label of a key has a control character (%d)", *p);
    char key[STORE_KEY_LEN + 1];
    int64_t id = 0;
    key_make(key);
    int rc = store_begin(st, err);
    if (rc == ERR_OK)
        rc = store_end(st, key_insert(st, tenant, label, key, &id, err), err);
    if (rc == ERR_OK) {
        memcpy(ret_key, key, sizeof key);
        *ret_id = id;
    }
    sodium_memzero(key, sizeof key);
    return rc;
}

#define SELECT_KEY                                                                               \
    "SELECT id, tenant_id, prefix, label, created_ms, last_used_ms, revoked_ms, hash"            \
    " FROM access_key "

static void key_row(struct sql *q, struct store_key *ret)
{
    *ret = (struct store_key){ .id = sql_col_int(q, 0), .tenant = sql_col_int(q, 1),
                               .created_ms = sql_col_int(q, 4), .last_used_ms = sql_col_int(q, 5),
                               .revoked = sql_col_int(q, 6) != 0 };
    sql_col_copy(q, 2, ret->prefix, sizeof ret->prefix);
    sql_col_copy(q, 3, ret->label, sizeof ret->label);
}

/* A reader's request must not wait for somebody's upload: give up at once if the lock is taken. */
static void key_touch(struct store *st, struct store_key *k)
{
    const int64_t now = now_unix_ms();
    if (now - k->last_used_ms < TOUCH_MS && now >= k->last_used_ms)
        return;
    int wait_ms = 0;
    struct sql q = sql_open(st, "PRAGMA busy_timeout", NULL);
    if (sql_step(&q) == 1)
        wait_ms = (int)sql_col_int(&q, 0);
    sql_close(&q);
    sqlite3_busy_timeout(st->db, 0);
    q = sql_open(st, "UPDATE access_key SET last_used_ms = ? WHERE id = ?", NULL);
    sql_int(&q, now);
    sql_int(&q, k->id);
    if (sql_run(&q) == ERR_OK)
        k->last_used_ms = now;
    sqlite3_busy_timeout(st->db, wait_ms);
}

static int key_refuse(struct err *err)
{
    return err_set_slug(err, ERR_AUTH, "invalid_api_key", NULL,
                        "the key is not one of this server's, or it was revoked");
}

int store_key_check(struct store *st, const char *key, struct store_key *ret, struct err *err)
{
    if (strlen(key) != STORE_KEY_LEN || strncmp(key, key_start, sizeof key_start - 1) != 0)
        return key_refuse(err);
    int rc = pepper_need(st, false, err);
    if (rc != ERR_OK)
        return rc;
    if (!st->has_pepper) /* no pepper, no keys */
        return key_refuse(err);

    uint8_t hash[32];
    key_hash(st, key, hash);
    struct store_key k = { .id = 0 };
    bool good = false;
    struct sql q = sql_open(st, SELECT_KEY "WHERE hash = ?", err);
    sql_blob(&q, hash, sizeof hash);
    if (sql_step(&q) == 1) {
        size_t len;
        const void *stored = sql_col_blob(&q, 7, &len);
        key_row(&q, &k);
        good = len == sizeof hash && sodium_memcmp(stored, hash, sizeof hash) == 0 && !k.revoked;
    }
    rc = sql_close(&q);
    if (rc != ERR_OK)
        return rc;
    if (!good)
        return key_refuse(err);
    key_touch(st, &k);
    *ret = k;
    return ERR_OK;
}

int store_key_list(struct store *st, int64_t tenant, struct store_key **ret, size_t *ret_n,
                   struct err *err)
{
    struct store_key *list = NULL;
    size_t n = 0, cap = 0;
    struct sql q = sql_open(st, SELECT_KEY "WHERE ?1 = 0 OR tenant_id = ?1 ORDER BY id", err);
    sql_int(&q, tenant);
    while (sql_step(&q) == 1) {
        if (n == cap) {
            cap = cap ? cap * 2 : 16;
            void *p = realloc(list, cap * sizeof *list);
            if (p == NULL) {
                q.rc = SQLITE_NOMEM;
                break;
            }
            list = p;
        }
        key_row(&q, &list[n++]);
    }
    int rc = sql_close(&q);
    if (rc != ERR_OK) {
        free(list);
        return rc;
    }
    *ret = list;
    *ret_n = n;
    return ERR_OK;
}

/* Inside the caller's transaction.  Revoking twice is no error and keeps the first time. */
static int key_revoke_row(struct store *st, int64_t id, struct err *err)
{
    struct sql q = sql_open(st,
                            "UPDATE access_key SET revoked_ms = coalesce(nullif(revoked_ms, 0), ?)"
                            " WHERE id = ? RETURNING tenant_id", err);
    sql_int(&q, now_unix_ms());
    sql_int(&q, id);
    int row = sql_step(&q);
    int64_t tenant = row == 1 ? sql_col_int(&q, 0) : 0;
    int rc = sql_close(&q);
    if (rc == ERR_OK && row == 0)
        rc = err_set(err, ERR_NOT_FOUND, "there is no key number %lld", (long long)id);
    if (rc == ERR_OK)
        rc = store_audit(st, tenant, "key.revoke", err, "key %lld", (long long)id);
    return rc;
}

int store_key_revoke(struct store *st, int64_t id, struct err *err)
{
    int rc = store_begin(st, err);
    if (rc != ERR_OK)
        return rc;
    return store_end(st, key_revoke_row(st, id, err), err);
}

int store_key_count(struct store *st, int64_t *ret, struct err *err)
{
    struct sql q = sql_open(st, "SELECT count(*) FROM access_key WHERE revoked_ms = 0", err);
    int64_t n = 0;
    if (sql_step(&q) == 1)
        n = sql_col_int(&q, 0);
    int rc = sql_close(&q);
    if (rc == ERR_OK)
        *ret = n;
    return rc;
}
