/* safetensors.c - reading the safetensors container; st_writer.c writes it.
 *
 * The header is scanned once before it is parsed: the number of commas outside strings bounds the
 * number of JSON values, so that a file of a few megabytes cannot make the parser build a tree of
 * gigabytes.  Then every entry is checked on its own (type, shape, product, size), and all of them
 * together: sorted by where they begin, each must start where the one before it ended, and the last
 * must end with the file. */
#include "engine/safetensors.h"

#include "engine/util.h"

#include <jansson.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum {
    HEADER_MAX = 100 * 1000 * 1000,
    HEADER_MAX_COMMAS = 500 * 1000, /* about 80,000 tensors */
    NAME_MAX_BYTES = 255,
};

static const struct {
    const char *name;
    enum dtype dtype;
    unsigned size;
} dtypes[] = {
    { "F32", DT_F32, 4 },        { "F16", DT_F16, 2 },        { "BF16", DT_BF16, 2 },
    { "U8", DT_U8, 1 },          { "I32", DT_I32, 4 },        { "I64", DT_I64, 8 },
    { "F64", DT_OTHER, 8 },      { "I8", DT_OTHER, 1 },       { "I16", DT_OTHER, 2 },
    { "U16", DT_OTHER, 2 },      { "U32", DT_OTHER, 4 },      { "U64", DT_OTHER, 8 },
    { "BOOL", DT_OTHER, 1 },     { "F8_E4M3", DT_OTHER, 1 },  { "F8_E5M2", DT_OTHER, 1 },
};

/* --- one entry of the header ---------------------------------------------------------- */

static int check_name(const char *name, const char *what, struct err *err)
{
    size_t len = strlen(name);
    if (len == 0 || len > NAME_MAX_BYTES)
        return err_set(err, ERR_INVALID, "%s: a tensor's name has %zu bytes, allowed are 1 to %d",
                       what, len, NAME_MAX_BYTES);
    for (const char *p = name; *p != '\0'; p++)
        if ((unsigned char)*p < 0x20 || *p == 0x7f)
            return err_set(err, ERR_INVALID,
                           "%s: a tensor's name contains the control character 0x%02x", what,
                           (unsigned char)*p);
    return ERR_OK;
}

static int read_dtype(const json_t *v, const char *what, struct st_tensor *t, unsigned *ret_size,
                      struct err *err)
{
    const char *name = json_string_value(v);
    if (name == NULL)
        return err_set(err, ERR_INVALID, "%s: tensor %s has no dtype", what, t->name);
    for (size_t i = 0; i < sizeof dtypes / sizeof dtypes[0]; i++) {
        if (strcmp(name, dtypes[i].name) != 0)
            continue;
        t->dtype = dtypes[i].dtype;
        memcpy(t->dtype_name, dtypes[i].name, strlen(dtypes[i].name) + 1);
        *ret_size = dtypes[i].size;
        return ERR_OK;
    }
    return err_set(err, ERR_INVALID, "%s: tensor %s has the unknown dtype \"%.40s\"", what, t->name,
                   name);
}

/* Shape, and with it the number of bytes that the tensor must have. */
static int read_shape(const json_t *v, const char *what, unsigned elem, struct st_tensor *t,
                      struct err *err)
{
    if (!json_is_array(v))
        return err_set(err, ERR_INVALID, "%s: tensor %s has no shape", what, t->name);
    if (json_array_size(v) > ST_MAX_DIMS)
        return err_set(err, ERR_INVALID, "%s: tensor %s has %zu dimensions, at most %d are read",
                       what, t->name, json_array_size(v), ST_MAX_DIMS);
    size_t bytes = elem;
    bool too_large = false;
    t->ndim = (int)json_array_size(v);
    for (int i = 0; i < t->ndim; i++) {
        const json_t *d = json_array_get(v, (size_t)i);
        if (!json_is_integer(d) || json_integer_value(d) < 0)
            return err_set(err, ERR_INVALID,
                           "%s: dimension %d of tensor %s is not a non-negative integer", what, i,
                           t->name);
        t->shape[i] = json_integer_value(d);
        too_large |= __builtin_mul_overflow(bytes, (size_t)t->shape[i], &bytes);
    }
    if (too_large || bytes > PTRDIFF_MAX)
        return err_set(err, ERR_INVALID, "%s: the shape of tensor %s is larger than any memory",
                       what, t->name);
    t->bytes = bytes;
    return ERR_OK;
}

static int read_offsets(const json_t *v, const char *what, const uint8_t *data, size_t data_len,
                        struct st_tensor *t, struct err *err)
{
    const json_t *b = json_array_get(v, 0), *e = json_array_get(v, 1);
    if (json_array_size(v) != 2 || !json_is_integer(b) || !json_is_integer(e) ||
        json_integer_value(b) < 0 || json_integer_value(e) < json_integer_value(b))
        return err_set(err, ERR_INVALID,
                       "%s: data_offsets of tensor %s are not two ascending integers", what,
                       t->name);
    uint64_t begin = (uint64_t)json_integer_value(b), end = (uint64_t)json_integer_value(e);
    if (end > data_len)
        return err_set(err, ERR_INVALID,
                       "%s: tensor %s ends at byte %llu, but the file holds %zu bytes of data "
                       "(is it cut off?)",
                       what, t->name, (unsigned long long)end, data_len);
    if (end - begin != t->bytes)
        return err_set(err, ERR_INVALID,
                       "%s: tensor %s needs %zu bytes for its shape and has %llu", what, t->name,
                       t->bytes, (unsigned long long)(end - begin));
    t->data = data + begin;
    return ERR_OK;
}

static int read_entry(json_t *v, const char *what, const uint8_t *data, size_t data_len,
                      struct st_tensor *t, struct err *err)
{
    if (!json_is_object(v))
        return err_set(err, ERR_INVALID, "%s: the entry of tensor %s is not an object", what,
                       t->name);
    const char *key;
    json_t *field;
    json_object_foreach (v, key, field)
        if (strcmp(key, "dtype") != 0 && strcmp(key, "shape") != 0 &&
            strcmp(key, "data_offsets") != 0)
            return err_set(err, ERR_INVALID, "%s: tensor %s has the unknown field \"%.40s\"", what,
                           t->name, key);
    unsigned elem = 0;
    int rc = read_dtype(json_object_get(v, "dtype"), what, t, &elem, err);
    if (rc == ERR_OK)
        rc = read_shape(json_object_get(v, "shape"), what, elem, t, err);
    if (rc == ERR_OK)
        rc = read_offsets(json_object_get(v, "data_offsets"), what, data, data_len, t, err);
    return rc;
}

/* --- the whole header ----------------------------------------------------------------- */

static int by_begin(const void *pa, const void *pb)
{
    const struct st_tensor *a = pa, *b = pb;
    if (a->data != b->data)
        return a->data < b->data ? -1 : 1;
    return (a->bytes > b->bytes) - (a->bytes < b->bytes); /* empty ones first */
}

static int by_name(const void *pa, const void *pb)
{
    const struct st_tensor *a = pa, *b = pb;
    return strcmp(a->name, b->name);
}

/* The tensors must cover the data exactly. */
static int check_tiling(struct st_file *f, const char *what, const uint8_t *data, size_t data_len,
                        struct err *err)
{
    if (f->ntensors > 0)
        qsort(f->tensors, f->ntensors, sizeof *f->tensors, by_begin);
    size_t at = 0;
    for (size_t i = 0; i < f->ntensors; i++) {
        const struct st_tensor *t = &f->tensors[i];
        size_t begin = (size_t)(t->data - data);
        if (begin != at)
            return err_set(err, ERR_INVALID, "%s: tensor %s begins at byte %zu of the data, %s %zu",
                           what, t->name, begin,
                           begin < at ? "inside the one before it, which ends at"
                                      : "leaving a gap after the one before it, which ends at",
                           at);
        at += t->bytes;
    }
    if (at != data_len)
        return err_set(err, ERR_INVALID, "%s: %zu bytes follow the last tensor", what,
                       data_len - at);
    if (f->ntensors > 0)
        qsort(f->tensors, f->ntensors, sizeof *f->tensors, by_name);
    return ERR_OK;
}

/* How much memory the names and the metadata take, and how many of each there are. */
static int measure(json_t *root, const char *what, struct st_file *f, size_t *ret_bytes,
                   struct err *err)
{
    const char *key;
    json_t *v;
    size_t bytes = 1;
    json_t *meta = json_object_get(root, "__metadata__");
    if (meta != NULL && !json_is_object(meta))
        return err_set(err, ERR_INVALID, "%s: __metadata__ is not an object", what);
    json_object_foreach (meta, key, v) {
        if (!json_is_string(v))
            return err_set(err, ERR_INVALID, "%s: __metadata__ value \"%.80s\" is not a string",
                           what, key);
        bytes += strlen(key) + json_string_length(v) + 2;
    }
    f->nmeta = json_object_size(meta);
    json_object_foreach (root, key, v)
        if (v != meta)
            bytes += strlen(key) + 1;
    f->ntensors = json_object_size(root) - (meta != NULL);
    *ret_bytes = bytes;
    return ERR_OK;
}

static char *keep(char **at, const char *s)
{
    size_t n = strlen(s) + 1;
    char *p = memcpy(*at, s, n);
    *at += n;
    return p;
}

static int read_header(struct st_file *f, json_t *root, const char *what,
                       const uint8_t *data, size_t data_len, struct err *err)
{
    size_t bytes = 1;
    int rc = measure(root, what, f, &bytes, err);
    if (rc != ERR_OK)
        return rc;
    f->names = malloc(bytes);
    f->tensors = calloc(f->ntensors + 1, sizeof *f->tensors);
    f->meta = calloc(f->nmeta + 1, sizeof *f->meta);
    if (f->names == NULL || f->tensors == NULL || f->meta == NULL)
        return err_nomem(err);
    char *at = f->names;
    const char *key;
    json_t *v;
    size_t i = 0;
    json_object_foreach (json_object_get(root, "__metadata__"), key, v) {
        f->meta[i].key = keep(&at, key);
        f->meta[i++].value = keep(&at, json_string_value(v));
    }
    i = 0;
    json_object_foreach (root, key, v) {
        if (strcmp(key, "__metadata__") == 0)
            continue;
        rc = check_name(key, what, err);
        if (rc != ERR_OK)
            return rc;
        f->tensors[i].name = keep(&at, key);
        rc = read_entry(v, what, data, data_len, &f->tensors[i++], err);
        if (rc != ERR_OK)
            return rc;
    }
    return check_tiling(f, what, data, data_len, err);
}

/* Bounds what the JSON parser can allocate; says nothing about validity. */
static size_t count_commas(const uint8_t *s, size_t len)
{
    size_t commas = 0;
    bool in_string = false;
    for (size_t i = 0; i < len; i++) {
        if (in_string && s[i] == '\\')
            i++;
        else if (s[i] == '"')
            in_string = !in_string;
        else if (!in_string && s[i] == ',')
            commas++;
    }
    return commas;
}

static int parse(struct st_file *f, const char *what, struct err *err)
{
    if (f->map_len < 8)
        return err_set(err, ERR_INVALID, "%s: %zu bytes are too few for a safetensors file", what,
                       f->map_len);
    uint64_t len = 0;
    for (int i = 7; i >= 0; i--)
        len = len << 8 | f->map[i];
    if (len > HEADER_MAX)
        return err_set(err, ERR_INVALID,
                       "%s: not a safetensors file (its header would have %llu bytes, the limit is "
                       "%d)",
                       what, (unsigned long long)len, HEADER_MAX);
    if (len > f->map_len - 8)
        return err_set(err, ERR_INVALID,
                       "%s: cut off: the header has %llu bytes, the file only %zu", what,
                       (unsigned long long)len, f->map_len);
    const uint8_t *text = f->map + 8;
    if (len < 2 || text[0] != '{')
        return err_set(err, ERR_INVALID, "%s: not a safetensors file (its header is not JSON)",
                       what);
    if (count_commas(text, (size_t)len) > HEADER_MAX_COMMAS)
        return err_set(err, ERR_INVALID, "%s: the header has too many entries", what);
    json_error_t je;
    json_t *root = json_loadb((const char *)text, (size_t)len, JSON_REJECT_DUPLICATES, &je);
    if (root == NULL)
        return err_set(err, ERR_INVALID, "%s: the header is not valid: %s", what, je.text);
    f->data_begin = 8 + (size_t)len;
    int rc = read_header(f, root, what, f->map + f->data_begin, f->map_len - f->data_begin, err);
    json_decref(root);
    return rc;
}

/* --- public --------------------------------------------------------------------------- */

int st_open_mem(const void *data, size_t len, const char *what, struct st_file **ret,
                struct err *err)
{
    struct st_file *f = calloc(1, sizeof *f);
    if (f == NULL)
        return err_nomem(err);
    f->map = data;
    f->map_len = len;
    int rc = parse(f, what, err);
    if (rc != ERR_OK) {
        st_close(f);
        return rc;
    }
    *ret = f;
    return ERR_OK;
}

int st_open(const char *path, struct st_file **ret, struct err *err)
{
    const uint8_t *map;
    size_t len;
    int rc = file_map(path, &map, &len, err);
    if (rc != ERR_OK)
        return rc;
    rc = st_open_mem(map, len, path, ret, err);
    if (rc != ERR_OK)
        munmap((void *)map, len);
    else
        (*ret)->mapped = true;
    return rc;
}

void st_close(struct st_file *f)
{
    if (f == NULL)
        return;
    if (f->mapped)
        munmap((void *)f->map, f->map_len);
    free(f->tensors);
    free(f->meta);
    free(f->names);
    free(f);
}

void st_forget(const struct st_file *f, const void *data, size_t len)
{
    const uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
    uintptr_t begin = (uintptr_t)data / page * page, end = (uintptr_t)data + len;
    if (f->mapped && begin >= (uintptr_t)f->map && end <= (uintptr_t)f->map + f->map_len)
        madvise((void *)begin, end - begin, MADV_DONTNEED); /* the map is read-only: nothing is lost */
}

const struct st_tensor *st_find(const struct st_file *f, const char *name)
{
    struct st_tensor key = { .name = name };
    if (f->ntensors == 0)
        return NULL;
    return bsearch(&key, f->tensors, f->ntensors, sizeof key, by_name);
}

const char *st_meta(const struct st_file *f, const char *key)
{
    for (size_t i = 0; i < f->nmeta; i++)
        if (strcmp(f->meta[i].key, key) == 0)
            return f->meta[i].value;
    return NULL;
}

size_t st_count(const struct st_tensor *t)
{
    size_t n = 1;
    for (int i = 0; i < t->ndim; i++)
        n *= (size_t)t->shape[i];
    return n;
}

static void widen(const struct st_tensor *t, size_t first, size_t n, float *ret)
{
    const uint8_t *p = t->data + first * dtype_size(t->dtype);
    uint16_t h;
    if (t->dtype == DT_F32)
        memcpy(ret, p, n * 4);
    else if (t->dtype == DT_BF16)
        for (size_t i = 0; i < n; i++) {
            memcpy(&h, p + 2 * i, 2);
            ret[i] = bf16_to_f32(h);
        }
    else
        for (size_t i = 0; i < n; i++) {
            memcpy(&h, p + 2 * i, 2);
            ret[i] = f16_to_f32(h);
        }
}

int st_f32(const struct st_tensor *t, size_t first, size_t n, float *ret, struct err *err)
{
    if (t->dtype != DT_F32 && t->dtype != DT_F16 && t->dtype != DT_BF16)
        return err_set(err, ERR_INVALID, "tensor %s has type %s, where F32, F16 or BF16 is needed",
                       t->name, t->dtype_name);
    size_t count = st_count(t);
    if (first > count || n > count - first)
        return err_set(err, ERR_INTERNAL, "tensor %s has %zu elements; %zu from %zu were asked for",
                       t->name, count, n, first);
    if (n == 0)
        return ERR_OK;
    widen(t, first, n, ret);
    uint32_t bad = 0;
    for (size_t i = 0; i < n; i++)
        bad |= (f32_bits(ret[i]) & 0x7f800000u) == 0x7f800000u;
    if (!bad)
        return ERR_OK;
    for (size_t i = 0; i < n; i++)
        if (!isfinite(ret[i]))
            return err_set(err, ERR_INVALID, "tensor %s holds %s at element %zu", t->name,
                           isnan(ret[i]) ? "NaN" : "an infinity", first + i);
    return ERR_OK;
}
