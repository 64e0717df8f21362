/* safetensors.h - reading and writing the safetensors container.
 *
 * Format: u64 little-endian header length, a JSON object {name: {dtype, shape,
 * data_offsets: [begin, end]}, "__metadata__": {strings}}, then the data.  Every input is
 * hostile: a header is at most 100 MB, offsets must tile the data exactly without overlap or
 * gap, sizes must agree with shape and dtype (all products checked for overflow), names are
 * unique.  Tensors need not be aligned: use the *_f32 helper or memcpy.
 *
 * A `struct st_file` maps the file (or borrows memory), is immutable, and any thread may
 * read it. */
#ifndef ENGINE_SAFETENSORS_H
#define ENGINE_SAFETENSORS_H

#include "engine/err.h"
#include "engine/num.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { ST_MAX_DIMS = 8 };

struct st_tensor {
    const char *name;
    enum dtype dtype;       /* DT_OTHER: dtype_name says which */
    char dtype_name[8];
    int ndim;
    int64_t shape[ST_MAX_DIMS];
    const uint8_t *data;    /* inside the file; maybe unaligned */
    size_t bytes;
};

struct st_file {
    size_t ntensors;
    struct st_tensor *tensors; /* sorted by name */
    size_t nmeta;
    struct st_meta { char *key, *value; } *meta;
    size_t data_begin;         /* offset of the data in the file */
    const uint8_t *map;        /* the whole file */
    size_t map_len;
    bool mapped;               /* ours to unmap */
    void *names;               /* backing store of names */
};

/* `path` is named in messages; the file is mapped read-only. */
int st_open(const char *path, struct st_file **ret, struct err *err);
/* Over memory that the caller keeps until st_close(); `what` is named in messages. */
int st_open_mem(const void *data, size_t len, const char *what, struct st_file **ret,
                struct err *err);
void st_close(struct st_file *f); /* NULL is fine */

/* The caller is done with these bytes of a mapped file for now: they stop counting as this
 * process's memory, and come back from the file if they are read again.  Nothing happens to
 * borrowed memory. */
void st_forget(const struct st_file *f, const void *data, size_t len);

/* NULL if there is none. */
const struct st_tensor *st_find(const struct st_file *f, const char *name);
const char *st_meta(const struct st_file *f, const char *key);
/* Elements, 1 for a scalar. */
size_t st_count(const struct st_tensor *t);
/* Elements [first, first+n) widened to fp32; only F32, F16 and BF16.  ERR_INVALID naming the
 * tensor if another type, or if a value is NaN or infinite. */
int st_f32(const struct st_tensor *t, size_t first, size_t n, float *ret, struct err *err);

/* --- writing: declare everything, begin, then the data in the declared order ---------- */
struct st_writer;
/* Writes to `path` + a temporary suffix in the same folder; st_writer_commit() syncs and
 * renames, st_writer_abort() removes.  Tensor data starts on 64-byte boundaries (the header
 * is padded; each tensor's size is padded by the writer through a U8 tensor only if
 * `align` is set: see safetensors.c). */
int st_writer_open(const char *path, bool align, struct st_writer **ret, struct err *err);
int st_writer_meta(struct st_writer *w, const char *key, const char *value, size_t len,
                   struct err *err);
int st_writer_tensor(struct st_writer *w, const char *name, const char *dtype_name, int ndim,
                     const int64_t *shape, size_t bytes, struct err *err);
int st_writer_begin(struct st_writer *w, struct err *err);
/* Replace the value of a key that was declared with another value of the same encoded length: for
 * hashes of the data, which are known only after it.  Between begin and commit. */
int st_writer_patch(struct st_writer *w, const char *key, const char *value, size_t len,
                    struct err *err);
/* Append to the data of the current tensor; tensors follow each other as declared. */
int st_writer_data(struct st_writer *w, const void *data, size_t len, struct err *err);
int st_writer_commit(struct st_writer *w, struct err *err); /* frees w, also on failure */
void st_writer_abort(struct st_writer *w);                  /* NULL is fine */

#endif
