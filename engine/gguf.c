/* gguf.c - see gguf.h. */
#include "engine/gguf.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_KEYS = 10000, MAX_TENSORS = 100000, MAX_NAME = 255, MAX_ALIGN = 65536 };

static const unsigned kind_size[GGUF_KINDS] = {
    [GGUF_U8] = 1,  [GGUF_I8] = 1,  [GGUF_U16] = 2,  [GGUF_I16] = 2, [GGUF_U32] = 4, [GGUF_I32] = 4,
    [GGUF_F32] = 4, [GGUF_BOOL] = 1, [GGUF_U64] = 8, [GGUF_I64] = 8, [GGUF_F64] = 8,
};

/* What is left to read.  A read past the end sets `cut` and gives zeros. */
struct reader {
    const uint8_t *begin, *at, *end;
    const char *what;
    bool cut;
};

static size_t left(const struct reader *r) { return (size_t)(r->end - r->at); }

static const uint8_t *take(struct reader *r, uint64_t n)
{
    if (n > left(r)) {
        r->cut = true;
        return NULL;
    }
    const uint8_t *p = r->at;
    r->at += n;
    return p;
}

static uint64_t little(const uint8_t *p, unsigned n)
{
    uint64_t v = 0;
    for (unsigned i = 0; i < n; i++)
        v |= (uint64_t)p[i] << (8 * i);
    return v;
}

static uint64_t read_uint(struct reader *r, unsigned n)
{
    const uint8_t *p = take(r, n);
    return p ? little(p, n) : 0;
}

static struct gguf_text read_text(struct reader *r)
{
    uint64_t len = read_uint(r, 8);
    const char *s = (const char *)take(r, len);
    return (struct gguf_text){ s, s ? (size_t)len : 0 };
}

static int cut_off(const struct reader *r, const char *where, struct err *err)
{
    return err_set(err, ERR_INVALID, "%s: cut off in %s, at byte %zu", r->what, where,
                   (size_t)(r->at - r->begin));
}

/* --- names ---------------------------------------------------------------------------- */

static int check_name(const struct reader *r, struct gguf_text t, struct err *err)
{
    bool bad = t.len == 0 || t.len > MAX_NAME;
    for (size_t i = 0; i < t.len && !bad; i++)
        bad = (unsigned char)t.s[i] <= ' ' || t.s[i] == 0x7f;
    if (bad)
        return err_set(err, ERR_INVALID,
                       "%s: the name at byte %zu is not 1 to %d bytes without spaces", r->what,
                       (size_t)(r->at - r->begin) - t.len, MAX_NAME);
    return ERR_OK;
}

static int compare(struct gguf_text a, struct gguf_text b)
{
    int c = memcmp(a.s, b.s, a.len < b.len ? a.len : b.len);
    return c != 0 ? c : (a.len > b.len) - (a.len < b.len);
}

static int by_key(const void *pa, const void *pb)
{
    const struct gguf_key *a = pa, *b = pb;
    return compare(a->name, b->name);
}

/* --- keys ----------------------------------------------------------------------------- */

static int read_strings(struct reader *r, struct gguf_key *k, struct err *err)
{
    if (k->n > left(r) / 8) /* each takes 8 bytes at least */
        return cut_off(r, "an array of strings", err);
    k->texts = calloc(k->n + 1, sizeof *k->texts);
    if (k->texts == NULL)
        return err_nomem(err);
    for (size_t i = 0; i < k->n && !r->cut; i++)
        k->texts[i] = read_text(r);
    return r->cut ? cut_off(r, "an array of strings", err) : ERR_OK;
}

static int read_key(struct reader *r, struct gguf_key *k, struct err *err)
{
    k->name = read_text(r);
    uint64_t kind = read_uint(r, 4), n = 1;
    if (r->cut)
        return cut_off(r, "the metadata", err);
    int rc = check_name(r, k->name, err);
    if (rc != ERR_OK)
        return rc;
    if (kind == GGUF_ARRAY) {
        k->is_array = true;
        kind = read_uint(r, 4);
        n = read_uint(r, 8);
    }
    if (kind >= GGUF_KINDS || kind == GGUF_ARRAY)
        return err_set(err, ERR_INVALID, "%s: the value of %.*s has the unknown type %llu",
                       r->what, (int)k->name.len, k->name.s, (unsigned long long)kind);
    k->kind = (enum gguf_kind)kind;
    if (r->cut || n > left(r))
        return cut_off(r, "the metadata", err);
    k->n = (size_t)n;
    if (kind == GGUF_STRING)
        return read_strings(r, k, err);
    k->data = n > left(r) / kind_size[kind] ? NULL : take(r, n * kind_size[kind]);
    return k->data ? ERR_OK : cut_off(r, "the metadata", err);
}

static int read_keys(struct reader *r, struct gguf *g, uint64_t n, struct err *err)
{
    if (n > MAX_KEYS)
        return err_set(err, ERR_INVALID, "%s: %llu keys, at most %d are read", r->what,
                       (unsigned long long)n, MAX_KEYS);
    g->keys = calloc((size_t)n + 1, sizeof *g->keys);
    if (g->keys == NULL)
        return err_nomem(err);
    int rc = ERR_OK;
    while (g->nkeys < n && rc == ERR_OK)
        rc = read_key(r, &g->keys[g->nkeys++], err);
    if (rc != ERR_OK)
        return rc;
    qsort(g->keys, g->nkeys, sizeof *g->keys, by_key);
    for (size_t i = 1; i < g->nkeys; i++)
        if (by_key(&g->keys[i - 1], &g->keys[i]) == 0)
            return err_set(err, ERR_INVALID, "%s: the key %.*s is there twice", r->what,
                           (int)g->keys[i].name.len, g->keys[i].name.s);
    return ERR_OK;
}

/* --- tensors -------------------------------------------------------------------------- */

/* Dimensions and type, and with them the number of bytes; the offset goes into `bytes` first. */
static int read_tensor(struct reader *r, struct gguf_tensor *t, uint64_t *ret_offset,
                       struct err *err)
{
    t->name = read_text(r);
    uint64_t ndim = read_uint(r, 4), dims[4] = { 1, 1, 1, 1 }, elements = 1;
    if (r->cut)
        return cut_off(r, "the list of tensors", err);
    int rc = check_name(r, t->name, err);
    if (rc != ERR_OK)
        return rc;
    const int len = (int)t->name.len;
    if (ndim < 1 || ndim > 4)
        return err_set(err, ERR_INVALID, "%s: tensor %.*s has %llu dimensions, 1 to 4 are read",
                       r->what, len, t->name.s, (unsigned long long)ndim);
    bool large = false;
    for (uint64_t i = 0; i < ndim; i++) {
        dims[i] = read_uint(r, 8);
        large |= dims[i] == 0 || dims[i] > INT32_MAX ||
                 __builtin_mul_overflow(elements, dims[i], &elements);
        t->dims[ndim - 1 - i] = (int64_t)dims[i];
    }
    t->ndim = (int)ndim;
    uint32_t id = (uint32_t)read_uint(r, 4);
    *ret_offset = read_uint(r, 8);
    if (r->cut)
        return cut_off(r, "the list of tensors", err);
    t->type = ggml_type_of(id);
    if (t->type == NULL)
        return err_set(err, ERR_INVALID, "%s: tensor %.*s has the type %u, which is not read; %s are",
                       r->what, len, t->name.s, id, ggml_type_list());
    if (large || elements > INT64_MAX / 8 || dims[0] % t->type->block != 0)
        return err_set(err, ERR_INVALID,
                       "%s: the shape of tensor %.*s is empty, larger than any memory, or its rows "
                       "are no whole blocks of %u",
                       r->what, len, t->name.s, t->type->block);
    t->bytes = (size_t)(elements / t->type->block * t->type->bytes);
    return ERR_OK;
}

static int by_place(const void *pa, const void *pb)
{
    const struct gguf_tensor *a = *(const struct gguf_tensor *const *)pa,
                             *b = *(const struct gguf_tensor *const *)pb;
    return (a->data > b->data) - (a->data < b->data);
}

static int check_overlap(const struct reader *r, const struct gguf *g, struct err *err)
{
    const struct gguf_tensor **order = calloc(g->ntensors + 1, sizeof *order);
    if (order == NULL)
        return err_nomem(err);
    for (size_t i = 0; i < g->ntensors; i++)
        order[i] = &g->tensors[i];
    qsort(order, g->ntensors, sizeof *order, by_place);
    int rc = ERR_OK;
    for (size_t i = 1; i < g->ntensors && rc == ERR_OK; i++)
        if (order[i - 1]->data + order[i - 1]->bytes > order[i]->data)
            rc = err_set(err, ERR_INVALID, "%s: tensor %.*s lies inside another one", r->what,
                         (int)order[i]->name.len, order[i]->name.s);
    free(order);
    return rc;
}

/* Where the data begins, and from there each tensor. */
static int place_tensors(struct reader *r, struct gguf *g, const uint64_t *offsets,
                         struct err *err)
{
    int64_t align = 32;
    int rc = gguf_int(g, "general.alignment", 8, MAX_ALIGN, &align, NULL, err);
    if (rc != ERR_OK)
        return rc;
    if ((align & (align - 1)) != 0)
        return err_set(err, ERR_INVALID, "%s: general.alignment %lld is no power of two", r->what,
                       (long long)align);
    size_t used = (size_t)(r->at - r->begin), pad = (size_t)-used & (size_t)(align - 1);
    size_t size = left(r) > pad ? left(r) - pad : 0;
    const uint8_t *data = size ? r->at + pad : r->end;
    for (size_t i = 0; i < g->ntensors; i++) {
        struct gguf_tensor *t = &g->tensors[i];
        if (offsets[i] % (uint64_t)align != 0 || offsets[i] > size || t->bytes > size - offsets[i])
            return err_set(err, ERR_INVALID,
                           "%s: tensor %.*s has %zu bytes at %llu of %zu bytes of data (is the file "
                           "cut off?)",
                           r->what, (int)t->name.len, t->name.s, t->bytes,
                           (unsigned long long)offsets[i], size);
        t->data = data + offsets[i];
    }
    return check_overlap(r, g, err);
}

static int read_tensors(struct reader *r, struct gguf *g, uint64_t n, struct err *err)
{
    if (n > MAX_TENSORS || n > left(r) / 24)
        return err_set(err, ERR_INVALID, "%s: %llu tensors are more than it can hold", r->what,
                       (unsigned long long)n);
    uint64_t *offsets = calloc((size_t)n + 1, sizeof *offsets);
    g->tensors = calloc((size_t)n + 1, sizeof *g->tensors);
    int rc = offsets && g->tensors ? ERR_OK : err_nomem(err);
    for (; g->ntensors < n && rc == ERR_OK; g->ntensors++)
        rc = read_tensor(r, &g->tensors[g->ntensors], &offsets[g->ntensors], err);
    if (rc == ERR_OK)
        rc = place_tensors(r, g, offsets, err);
    free(offsets);
    return rc;
}

/* --- public --------------------------------------------------------------------------- */

bool gguf_is(const void *data, size_t len) { return len >= 4 && memcmp(data, "GGUF", 4) == 0; }

static int parse(struct reader *r, struct gguf *g, struct err *err)
{
    uint32_t magic = (uint32_t)read_uint(r, 4), version = (uint32_t)read_uint(r, 4);
    uint64_t ntensors = read_uint(r, 8), nkeys = read_uint(r, 8);
    if (r->cut || magic != 0x46554747u)
        return err_set(err, ERR_INVALID, "%s: not a GGUF file", r->what);
    if (version != 2 && version != 3)
        return err_set(err, ERR_INVALID, "%s: GGUF version %u; 2 and 3 are read, little-endian",
                       r->what, version);
    int rc = read_keys(r, g, nkeys, err);
    return rc == ERR_OK ? read_tensors(r, g, ntensors, err) : rc;
}

int gguf_open_mem(const void *data, size_t len, const char *what, struct gguf **ret,
                  struct err *err)
{
    struct gguf *g = calloc(1, sizeof *g);
    if (g == NULL)
        return err_nomem(err);
    struct reader r = { .begin = data, .at = data, .end = (const uint8_t *)data + len,
                        .what = what };
    int rc = parse(&r, g, err);
    if (rc != ERR_OK) {
        gguf_close(g);
        return rc;
    }
    *ret = g;
    return ERR_OK;
}

void gguf_close(struct gguf *g)
{
    if (g == NULL)
        return;
    for (size_t i = 0; i < g->nkeys; i++)
        free(g->keys[i].texts);
    free(g->keys);
    free(g->tensors);
    free(g);
}

const struct gguf_key *gguf_find(const struct gguf *g, const char *name)
{
    const struct gguf_key key = { .name = { name, strlen(name) } };
    return g->nkeys ? bsearch(&key, g->keys, g->nkeys, sizeof key, by_key) : NULL;
}

static int not_a(const char *name, const char *what, struct err *err)
{
    return err_set(err, ERR_INVALID, "GGUF key %s is not %s", name, what);
}

int gguf_int(const struct gguf *g, const char *name, int64_t min, int64_t max, int64_t *ret,
             bool *ret_there, struct err *err)
{
    const struct gguf_key *k = gguf_find(g, name);
    if (ret_there != NULL)
        *ret_there = k != NULL;
    if (k == NULL)
        return ERR_OK;
    const bool is_signed = k->kind == GGUF_I8 || k->kind == GGUF_I16 || k->kind == GGUF_I32 ||
                           k->kind == GGUF_I64;
    const bool whole = is_signed || k->kind == GGUF_U8 || k->kind == GGUF_U16 ||
                       k->kind == GGUF_U32 || k->kind == GGUF_U64;
    if (!whole || k->is_array)
        return not_a(name, "an integer", err);
    const unsigned bits = 8 * kind_size[k->kind];
    uint64_t u = little(k->data, bits / 8);
    if (is_signed && bits < 64 && u >> (bits - 1) & 1)
        u |= ~(uint64_t)0 << bits;
    const int64_t v = (int64_t)u;
    if ((!is_signed && u > INT64_MAX) || v < min || v > max)
        return err_set(err, ERR_INVALID, "GGUF key %s is %lld, not %lld to %lld", name,
                       (long long)v, (long long)min, (long long)max);
    *ret = v;
    return ERR_OK;
}

int gguf_double(const struct gguf *g, const char *name, double *ret, bool *ret_there,
                struct err *err)
{
    const struct gguf_key *k = gguf_find(g, name);
    if (ret_there != NULL)
        *ret_there = k != NULL;
    if (k == NULL)
        return ERR_OK;
    if (k->is_array || (k->kind != GGUF_F32 && k->kind != GGUF_F64))
        return not_a(name, "a number", err);
    double d;
    memcpy(&d, k->data, k->kind == GGUF_F64 ? 8 : 4);
    *ret = k->kind == GGUF_F64 ? d : (double)gguf_f32_at(k, 0);
    return isfinite(*ret) ? ERR_OK : not_a(name, "a finite number", err);
}

int gguf_bool(const struct gguf *g, const char *name, bool *ret, struct err *err)
{
    const struct gguf_key *k = gguf_find(g, name);
    if (k == NULL)
        return ERR_OK;
    if (k->is_array || k->kind != GGUF_BOOL || k->data[0] > 1)
        return not_a(name, "true or false", err);
    *ret = k->data[0];
    return ERR_OK;
}

int gguf_string(const struct gguf *g, const char *name, struct gguf_text *ret, struct err *err)
{
    const struct gguf_key *k = gguf_find(g, name);
    *ret = (struct gguf_text){ 0 };
    if (k == NULL)
        return ERR_OK;
    if (k->is_array || k->kind != GGUF_STRING)
        return not_a(name, "a string", err);
    *ret = k->texts[0];
    return ERR_OK;
}

float gguf_f32_at(const struct gguf_key *k, size_t i)
{
    float f;
    memcpy(&f, k->data + 4 * i, 4);
    return f;
}

int32_t gguf_i32_at(const struct gguf_key *k, size_t i)
{
    int32_t v;
    memcpy(&v, k->data + 4 * i, 4);
    return v;
}
