/* st_writer.c - writing the safetensors container; safetensors.c reads it.
 *
 * The header is put together while tensors are declared and written by st_writer_begin(); data
 * then streams through.  With `align`, the header is padded with spaces to a multiple of 64 bytes
 * (of the file) and a tensor whose size is not a multiple of 64 is followed by a U8 tensor
 * "__pad.N" that fills it up: the file stays contiguous, as the format demands, and every tensor
 * of the caller's begins on a 64-byte boundary.
 *
 * Nothing appears under the final name before everything is on the disk: the data goes to a
 * temporary name beside it, which is synced and renamed at the end. */
#include "engine/safetensors.h"

#include "engine/util.h"

#include <errno.h>
#include <fcntl.h>
#include <jansson.h>
#include <libgen.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define META_BEGIN "\"__metadata__\":{"

enum { ALIGN = 64, BUFFER = 1 << 18, HEADER_MAX = 100 * 1000 * 1000 };

/* Where a metadata value lies: offset from the start of the members of __metadata__. */
struct meta_value {
    char *key;
    size_t offset, len;
};

struct st_writer {
    int fd;
    bool align, begun;
    char *path, *tmp;
    struct buf meta, header; /* comma-separated members of the two JSON objects */
    struct meta_value *values;
    size_t nvalues, cap_values;
    size_t *sizes, nsizes, cap; /* bytes of each declared tensor */
    size_t declared;         /* bytes of data so far, pads included */
    size_t npads;
    size_t current, left;    /* tensor being written, bytes it still needs */
    uint8_t *buffer;
    size_t filled;
};

static size_t pad_of(const struct st_writer *w, size_t bytes)
{
    return w->align ? (ALIGN - bytes % ALIGN) % ALIGN : 0;
}

static void writer_free(struct st_writer *w)
{
    if (w->fd >= 0)
        close(w->fd);
    free(w->path);
    free(w->tmp);
    buf_free(&w->meta);
    buf_free(&w->header);
    for (size_t i = 0; i < w->nvalues; i++)
        free(w->values[i].key);
    free(w->values);
    free(w->sizes);
    free(w->buffer);
    free(w);
}

void st_writer_abort(struct st_writer *w)
{
    if (w == NULL)
        return;
    if (w->fd >= 0)
        unlink(w->tmp);
    writer_free(w);
}

/* A name that nobody has: the process id, and a number for what a crash left lying. */
static int open_temporary(struct st_writer *w, struct err *err)
{
    for (int i = 0; i < 100; i++) {
        sprintf(w->tmp, "%s.tmp-%ld-%d", w->path, (long)getpid(), i);
        w->fd = open(w->tmp, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
        if (w->fd >= 0)
            return ERR_OK;
        if (errno != EEXIST)
            break;
    }
    return err_set(err, ERR_IO, "%s: cannot be written: %s", w->tmp, strerror(errno));
}

int st_writer_open(const char *path, bool align, struct st_writer **ret, struct err *err)
{
    struct st_writer *w = calloc(1, sizeof *w);
    if (w == NULL)
        return err_nomem(err);
    w->fd = -1;
    w->align = align;
    buf_init(&w->meta, HEADER_MAX);
    buf_init(&w->header, HEADER_MAX);
    w->path = strdup(path);
    w->tmp = malloc(strlen(path) + 64);
    w->buffer = malloc(BUFFER);
    int rc = w->path == NULL || w->tmp == NULL || w->buffer == NULL ? err_nomem(err)
                                                                    : open_temporary(w, err);
    if (rc != ERR_OK) {
        writer_free(w);
        return rc;
    }
    *ret = w;
    return ERR_OK;
}

/* --- the header ----------------------------------------------------------------------- */

static int add_string(struct buf *b, const char *s, size_t len, const char *what, struct err *err)
{
    if (memchr(s, '\0', len) != NULL)
        return err_set(err, ERR_INVALID, "%s contains a zero byte", what);
    json_t *v = json_stringn(s, len);
    if (v == NULL)
        return err_set(err, ERR_INVALID, "%s is not valid UTF-8", what);
    char *text = json_dumps(v, JSON_ENCODE_ANY);
    json_decref(v);
    if (text == NULL)
        return err_nomem(err);
    int rc = buf_puts(b, text);
    free(text);
    return rc == ERR_OK ? ERR_OK : err_set(err, rc, "%s does not fit into the file's header", what);
}

/* Remember that the value of `key` lies in meta[begin, meta.len). */
static int remember(struct st_writer *w, const char *key, size_t begin, struct err *err)
{
    if (w->nvalues == w->cap_values) {
        size_t cap = w->cap_values ? 2 * w->cap_values : 16;
        struct meta_value *p = realloc(w->values, cap * sizeof *p);
        if (p == NULL)
            return err_nomem(err);
        w->values = p;
        w->cap_values = cap;
    }
    struct meta_value *v = &w->values[w->nvalues];
    v->key = strdup(key);
    if (v->key == NULL)
        return err_nomem(err);
    v->offset = begin;
    v->len = w->meta.len - begin;
    w->nvalues++;
    return ERR_OK;
}

int st_writer_meta(struct st_writer *w, const char *key, const char *value, size_t len,
                   struct err *err)
{
    int rc = w->meta.len > 0 ? buf_puts(&w->meta, ",") : ERR_OK;
    if (rc == ERR_OK)
        rc = add_string(&w->meta, key, strlen(key), key, err);
    if (rc == ERR_OK)
        rc = buf_puts(&w->meta, ":");
    size_t begin = w->meta.len;
    if (rc == ERR_OK)
        rc = add_string(&w->meta, value, len, key, err);
    if (rc == ERR_OK)
        rc = remember(w, key, begin, err);
    return rc == ERR_OK ? ERR_OK : err_set(err, rc, "metadata %s does not fit into the header", key);
}

/* One entry of the header; the data follow what was declared before. */
static int declare(struct st_writer *w, const char *name, const char *dtype, int ndim,
                   const int64_t *shape, size_t bytes, struct err *err)
{
    struct buf *b = &w->header;
    int rc = b->len > 0 ? buf_puts(b, ",") : ERR_OK;
    if (rc == ERR_OK)
        rc = add_string(b, name, strlen(name), name, err);
    if (rc == ERR_OK)
        rc = buf_printf(b, ":{\"dtype\":\"%s\",\"shape\":[", dtype);
    for (int i = 0; i < ndim && rc == ERR_OK; i++)
        rc = buf_printf(b, "%s%lld", i > 0 ? "," : "", (long long)shape[i]);
    if (rc == ERR_OK)
        rc = buf_printf(b, "],\"data_offsets\":[%zu,%zu]}", w->declared, w->declared + bytes);
    w->declared += bytes;
    return rc == ERR_OK ? ERR_OK : err_set(err, rc, "tensor %s does not fit into the header", name);
}

int st_writer_tensor(struct st_writer *w, const char *name, const char *dtype_name, int ndim,
                     const int64_t *shape, size_t bytes, struct err *err)
{
    if (w->begun)
        return err_set(err, ERR_INTERNAL, "tensor %s was declared after the data began", name);
    if (w->nsizes == w->cap) {
        size_t cap = w->cap ? 2 * w->cap : 64;
        size_t *p = realloc(w->sizes, cap * sizeof *p);
        if (p == NULL)
            return err_nomem(err);
        w->sizes = p;
        w->cap = cap;
    }
    int rc = declare(w, name, dtype_name, ndim, shape, bytes, err);
    if (rc != ERR_OK)
        return rc;
    w->sizes[w->nsizes++] = bytes;
    size_t pad = pad_of(w, bytes);
    if (pad == 0)
        return ERR_OK;
    char pad_name[40];
    snprintf(pad_name, sizeof pad_name, "__pad.%zu", w->npads++);
    return declare(w, pad_name, "U8", 1, (const int64_t[]){ (int64_t)pad }, pad, err);
}

/* --- data ----------------------------------------------------------------------------- */

static int flush(struct st_writer *w, struct err *err)
{
    int rc = fd_write_all(w->fd, w->buffer, w->filled, err);
    w->filled = 0;
    return rc;
}

static int put(struct st_writer *w, const void *data, size_t len, struct err *err)
{
    if (len > BUFFER - w->filled) {
        int rc = flush(w, err);
        if (rc != ERR_OK)
            return rc;
        if (len >= BUFFER)
            return fd_write_all(w->fd, data, len, err);
    }
    if (len > 0)
        memcpy(w->buffer + w->filled, data, len);
    w->filled += len;
    return ERR_OK;
}

/* Go on to the next tensor that needs bytes, writing the pads on the way. */
static int advance(struct st_writer *w, struct err *err)
{
    static const uint8_t zero[ALIGN];
    while (w->left == 0 && w->current < w->nsizes) {
        int rc = put(w, zero, pad_of(w, w->sizes[w->current]), err);
        if (rc != ERR_OK)
            return rc;
        w->current++;
        w->left = w->current < w->nsizes ? w->sizes[w->current] : 0;
    }
    return ERR_OK;
}

int st_writer_begin(struct st_writer *w, struct err *err)
{
    struct buf h;
    buf_init(&h, HEADER_MAX);
    int rc = buf_puts(&h, "{");
    if (rc == ERR_OK && w->meta.len > 0) {
        rc = buf_puts(&h, META_BEGIN);
        if (rc == ERR_OK)
            rc = buf_add(&h, w->meta.data, w->meta.len);
        if (rc == ERR_OK)
            rc = buf_puts(&h, w->header.len > 0 ? "}," : "}");
    }
    if (rc == ERR_OK && w->header.len > 0)
        rc = buf_add(&h, w->header.data, w->header.len);
    if (rc == ERR_OK)
        rc = buf_puts(&h, "}");
    while (rc == ERR_OK && (h.len + 8) % (w->align ? ALIGN : 8) != 0)
        rc = buf_puts(&h, " ");
    if (rc != ERR_OK) {
        buf_free(&h);
        return err_set(err, rc, "%s: the header does not fit", w->path);
    }
    uint8_t len[8];
    for (int i = 0; i < 8; i++)
        len[i] = (uint8_t)((uint64_t)h.len >> (8 * i));
    rc = put(w, len, 8, err);
    if (rc == ERR_OK)
        rc = put(w, h.data, h.len, err);
    buf_free(&h);
    buf_free(&w->meta);
    buf_free(&w->header);
    w->begun = true;
    w->left = w->nsizes > 0 ? w->sizes[0] : 0;
    return rc == ERR_OK ? advance(w, err) : rc;
}

int st_writer_data(struct st_writer *w, const void *data, size_t len, struct err *err)
{
    const uint8_t *p = data;
    while (len > 0) {
        if (!w->begun || w->current == w->nsizes)
            return err_set(err, ERR_INTERNAL, "%s: more data than tensors were declared for",
                           w->path);
        size_t n = len < w->left ? len : w->left;
        int rc = put(w, p, n, err);
        if (rc != ERR_OK)
            return rc;
        p += n;
        len -= n;
        w->left -= n;
        rc = advance(w, err);
        if (rc != ERR_OK)
            return rc;
    }
    return ERR_OK;
}

int st_writer_patch(struct st_writer *w, const char *key, const char *value, size_t len,
                    struct err *err)
{
    const struct meta_value *v = NULL;
    for (size_t i = 0; i < w->nvalues && v == NULL; i++)
        if (strcmp(w->values[i].key, key) == 0)
            v = &w->values[i];
    if (v == NULL || !w->begun)
        return err_set(err, ERR_INTERNAL, "%s: there is no metadata %s to replace", w->path, key);
    struct buf text;
    buf_init(&text, HEADER_MAX);
    int rc = flush(w, err);
    if (rc == ERR_OK)
        rc = add_string(&text, value, len, key, err);
    if (rc == ERR_OK && text.len != v->len)
        rc = err_set(err, ERR_INTERNAL, "%s: metadata %s has another length", w->path, key);
    size_t done = 0;
    while (rc == ERR_OK && done < text.len) {
        off_t at = (off_t)(8 + strlen("{" META_BEGIN) + v->offset + done);
        ssize_t n = pwrite(w->fd, text.data + done, text.len - done, at);
        if (n < 0 && errno != EINTR)
            rc = err_set(err, ERR_IO, "%s: %s", w->tmp, strerror(errno));
        done += n > 0 ? (size_t)n : 0;
    }
    buf_free(&text);
    return rc;
}

/* A rename is on the disk when its folder is. */
static void sync_folder(const char *path)
{
    char *copy = strdup(path);
    if (copy == NULL)
        return;
    int fd = open(dirname(copy), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    free(copy);
    if (fd < 0)
        return;
    (void)fsync(fd); /* some file systems cannot; the file itself is safe */
    close(fd);
}

int st_writer_commit(struct st_writer *w, struct err *err)
{
    int rc = ERR_OK;
    if (!w->begun || w->current < w->nsizes)
        rc = err_set(err, ERR_INTERNAL, "%s: tensor %zu of %zu lacks %zu bytes", w->path,
                     w->current, w->nsizes, w->left);
    if (rc == ERR_OK)
        rc = flush(w, err);
    if (rc == ERR_OK && fsync(w->fd) != 0)
        rc = err_set(err, ERR_IO, "%s: %s", w->tmp, strerror(errno));
    if (rc == ERR_OK && rename(w->tmp, w->path) != 0)
        rc = err_set(err, ERR_IO, "%s: cannot be renamed to %s: %s", w->tmp, w->path,
                     strerror(errno));
    if (rc != ERR_OK) {
        st_writer_abort(w);
        return rc;
    }
    sync_folder(w->path);
    writer_free(w);
    return ERR_OK;
}
