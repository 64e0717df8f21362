/* gguf.h - reading GGUF, the container of llama.cpp: metadata, and tensors in block types.
 *
 * Format, version 3 (2 reads the same), little-endian: "GGUF", u32 version, u64 number of tensors,
 * u64 number of keys; keys as string, u32 type, value; tensors as string, u32 dimensions, u64 each
 * (the innermost first), u32 type, u64 offset; then the data from the next multiple of
 * general.alignment on.  A string is a u64 length and bytes without an end.
 *
 * Every input is hostile: counts are held against the bytes that are left before anything is
 * allocated, tensors must lie aligned inside the data without overlapping, keys and names are
 * unique.  What is read points into the caller's memory; any thread may use it. */
#ifndef ENGINE_GGUF_H
#define ENGINE_GGUF_H

#include "engine/err.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* How numbers lie in a tensor: blocks of `block` elements in `bytes` bytes along a row. */
struct ggml_type {
    uint32_t id;
    const char *name;
    unsigned block, bytes;
    void (*f32)(const uint8_t *block, float *ret); /* NULL: F32, F16 and BF16 */
};
enum { GGML_MAX_BLOCK = 256 };

/* NULL if unknown. */
const struct ggml_type *ggml_type_of(uint32_t id);
/* "F32, F16, Q4_0, ..." */
const char *ggml_type_list(void);

enum gguf_kind {
    GGUF_U8, GGUF_I8, GGUF_U16, GGUF_I16, GGUF_U32, GGUF_I32, GGUF_F32, GGUF_BOOL, GGUF_STRING,
    GGUF_ARRAY, GGUF_U64, GGUF_I64, GGUF_F64, GGUF_KINDS
};

struct gguf_text {
    const char *s; /* no NUL at the end; may hold any bytes */
    size_t len;
};

struct gguf_key {
    struct gguf_text name;
    enum gguf_kind kind; /* of the value; of the elements with is_array */
    bool is_array;
    size_t n;            /* elements */
    const uint8_t *data;
    struct gguf_text *texts; /* [n] for strings, else NULL */
};

struct gguf_tensor {
    struct gguf_text name;
    const struct ggml_type *type;
    int ndim;
    int64_t dims[4]; /* outermost first, as in safetensors */
    const uint8_t *data;
    size_t bytes;
};

struct gguf {
    struct gguf_key *keys;
    size_t nkeys;
    struct gguf_tensor *tensors; /* as in the file */
    size_t ntensors;
};

/* `data` is kept by the caller until gguf_close(); `what` is named in messages. */
int gguf_open_mem(const void *data, size_t len, const char *what, struct gguf **ret,
                  struct err *err);
void gguf_close(struct gguf *g); /* NULL is fine */
/* Does it begin like one? */
bool gguf_is(const void *data, size_t len);

/* NULL if there is none. */
const struct gguf_key *gguf_find(const struct gguf *g, const char *name);
/* The value of a key as a number; ERR_INVALID naming the key if it is there and no integer from
 * `min` to `max`.  *ret stays as it is, and *ret_there (may be NULL) is false, if it is missing. */
int gguf_int(const struct gguf *g, const char *name, int64_t min, int64_t max, int64_t *ret,
             bool *ret_there, struct err *err);
int gguf_double(const struct gguf *g, const char *name, double *ret, bool *ret_there,
                struct err *err);
int gguf_bool(const struct gguf *g, const char *name, bool *ret, struct err *err);
/* NULL text if it is missing. */
int gguf_string(const struct gguf *g, const char *name, struct gguf_text *ret, struct err *err);
/* Element i of an array of F32 or of I32. */
float gguf_f32_at(const struct gguf_key *k, size_t i);
int32_t gguf_i32_at(const struct gguf_key *k, size_t i);

#endif
