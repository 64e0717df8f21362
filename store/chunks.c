/* chunks.c - content of any size in rows of at most 4 MiB, written over several transactions.
 *
 * One transaction for half a gigabyte would keep every other writer waiting.  So the rows go in a
 * few at a time, and whoever calls makes them count in a last short transaction: until then they
 * belong to nothing that anybody reads. */
#include "store/store_int.h"

#include <sodium.h>
#include <string.h>
#include "engine/util.h"

void ref_make(const char *prefix, char ret[STORE_ID_MAX + 1])
{
    static const char digits[] = "abcdefghijklmnopqrstuvwxyz0123456789";
    const size_t n = strlen(prefix);
    memcpy(ret, prefix, n);
    for (size_t i = n; i < n + 16; i++)
        ret[i] = digits[randombytes_uniform(sizeof digits - 1)];
    ret[n + 16] = '\0';
}

/* At most CHUNKS_PER_COMMIT rows from chunk `first` on. */
static int put_some(struct store *st, const struct chunk_dest *d, const uint8_t *data, size_t len,
                    size_t first, struct err *err)
{
    struct sql q = sql_open(st, d->sql, err);
    for (size_t i = first; i < first + CHUNKS_PER_COMMIT && i * TENSOR_CHUNK < len; i++) {
        const size_t at = i * TENSOR_CHUNK;
        sql_reset(&q);
        sql_int(&q, d->tenant);
        sql_int(&q, d->owner);
        if (d->gen >= 0)
            sql_int(&q, d->gen);
        sql_int(&q, (int64_t)i);
        sql_blob(&q, data + at, len - at < TENSOR_CHUNK ? len - at : TENSOR_CHUNK);
        if (sql_step(&q) != 0)
            break; /* sticks in q */
    }
    return sql_close(&q);
}

int chunks_put(struct store *st, const struct chunk_dest *d, const void *data, size_t len,
               struct err *err)
{
    const size_t n = (len + TENSOR_CHUNK - 1) / TENSOR_CHUNK;
    int rc = ERR_OK;
    for (size_t i = 0; i < n && rc == ERR_OK; i += CHUNKS_PER_COMMIT) {
        rc = store_begin(st, err);
        if (rc == ERR_OK)
            rc = store_end(st, put_some(st, d, data, len, i, err), err);
    }
    return rc;
}

int chunks_get(struct sql *q, const char *what, int64_t bytes, const uint8_t hash[32],
               int (*sink)(void *ud, const void *data, size_t len, struct err *err), void *ud)
{
    struct sha256 h;
    uint8_t got[32];
    int64_t at = 0;
    int rc = ERR_OK;
    bool bad = false;
    sha256_init(&h);
    while (rc == ERR_OK && sql_step(q) == 1) {
        size_t len;
        const void *data = sql_col_blob(q, 1, &len);
        bad = data == NULL || sql_col_int(q, 0) * TENSOR_CHUNK != at ||
              (int64_t)len > bytes - at;
        if (bad)
            break;
        sha256_add(&h, data, len);
        at += (int64_t)len;
        rc = sink(ud, data, len, q->err);
    }
    sha256_end(&h, got);
    struct store *st = q->st;
    struct err *err = q->err;
    const int rq = sql_close(q);
    if (rc == ERR_OK)
        rc = rq;
    if (rc == ERR_OK && (bad || at != bytes || memcmp(got, hash, sizeof got) != 0))
        rc = err_set(err, ERR_DB, "the database %s is damaged: %s is not what was put in",
                     st->path, what);
    return rc;
}
