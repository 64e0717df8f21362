/* import_bnb.c - matrices that bitsandbytes has quantised to 4 bits, as a checkpoint stores them.
 *
 * A matrix X is 4-bit where X.absmax lies beside it, whatever config.json says: some checkpoints
 * leave layers unquantised.  X itself is bytes of codes, under whatever type they were stored with
 * (bnb_4bit_quant_storage); its shape, and what the scales mean, is JSON in a tensor whose name ends
 * with the kind of codes.  The codebooks lie in the file too: codes are taken over only where these
 * are the ones that the kernels know. */
#include "engine/import_int.h"

#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define STATE ".quant_state.bitsandbytes__"

static int bad(const struct source_tensor *x, struct err *err, const char *what)
{
    return err_set(err, ERR_INVALID, "tensor %s is 4-bit, but %s", x->t->name, what);
}

/* X + part, marked as used; NULL if there is none. */
static const struct st_tensor *beside(struct source *s, const struct source_tensor *x,
                                      const char *part)
{
    char name[400]; /* names have at most 255 bytes */
    snprintf(name, sizeof name, "%s%s", x->t->name, part);
    struct source_tensor *e = source_find(s, name);
    if (e == NULL)
        return NULL;
    e->used = true;
    return e->t;
}

/* --- what the JSON says --------------------------------------------------------------- */

/* Fields of the JSON in the order of `names`; another one could change what the codes mean. */
static bool has_only(const json_t *o, const char *const *names, size_t n)
{
    const char *key;
    json_t *v;
    json_object_foreach((json_t *)o, key, v) {
        size_t i = 0;
        while (i < n && strcmp(key, names[i]) != 0)
            i++;
        if (i == n)
            return false;
    }
    return true;
}

static bool is_text(const json_t *o, const char *key, const char *a, const char *b, const char *c)
{
    const char *s = json_string_value(json_object_get(o, key));
    return s != NULL && (strcmp(s, a) == 0 || strcmp(s, b) == 0 || strcmp(s, c) == 0);
}

/* A block is a power of two from 32 to 4096. */
static bool read_block(const json_t *o, const char *key, size_t *ret)
{
    json_int_t n = json_integer_value(json_object_get(o, key));
    if (n < 32 || n > 4096 || (n & (n - 1)) != 0)
        return false;
    *ret = (size_t)n;
    return true;
}

static int read_state(const struct source_tensor *x, const json_t *o, bool nested,
                      struct q4_source *q, struct err *err)
{
    static const char *const names[] = { "quant_type", "blocksize", "dtype", "shape",
                                         "nested_blocksize", "nested_dtype", "nested_offset" };
    const char *const kind = q->type == Q4_NF4 ? "nf4" : "fp4";
    if (!json_is_object(o) || !has_only(o, names, nested ? 7 : 4))
        return bad(x, err, "its quant_state is no JSON object with the known fields");
    if (!is_text(o, "quant_type", kind, kind, kind))
        return bad(x, err, "quant_type is not the one in the name of its quant_state");
    if (!is_text(o, "dtype", "float32", "float16", "bfloat16"))
        return bad(x, err, "dtype of its quant_state is not float32, float16 or bfloat16");
    const json_t *shape = json_object_get(o, "shape");
    for (size_t i = 0; i < 2; i++) {
        q->shape[i] = json_integer_value(json_array_get(shape, i));
        if (json_array_size(shape) != 2 || q->shape[i] < 1 || q->shape[i] > INT32_MAX)
            return bad(x, err, "shape of its quant_state is not that of a matrix");
    }
    if (!read_block(o, "blocksize", &q->block))
        return bad(x, err, "blocksize of its quant_state is no power of two from 32 to 4096");
    if (!nested)
        return ERR_OK;
    const json_t *offset = json_object_get(o, "nested_offset");
    q->offset = (float)json_number_value(offset);
    if (!read_block(o, "nested_blocksize", &q->nested_block) || !json_is_number(offset) ||
        !isfinite(q->offset) || !is_text(o, "nested_dtype", "float32", "float32", "float32"))
        return bad(x, err, "nested_blocksize, nested_dtype or nested_offset of its quant_state "
                           "cannot be used");
    return ERR_OK;
}

static int find_state(struct source *s, const struct source_tensor *x, struct q4_source *q,
                      struct err *err)
{
    const struct st_tensor *nf4 = beside(s, x, STATE "nf4"), *fp4 = beside(s, x, STATE "fp4");
    if ((nf4 == NULL) == (fp4 == NULL))
        return bad(x, err, "no quant_state of nf4 or fp4 lies beside it, or both");
    const struct st_tensor *t = nf4 ? nf4 : fp4;
    q->type = nf4 ? Q4_NF4 : Q4_FP4;
    if (t->dtype != DT_U8 || t->bytes > 4096)
        return bad(x, err, "its quant_state is no text of at most 4096 bytes");
    q->nested_absmax = beside(s, x, ".nested_absmax");
    json_t *o = json_loadb((const char *)t->data, t->bytes, JSON_REJECT_DUPLICATES, NULL);
    int rc = read_state(x, o, q->nested_absmax != NULL, q, err);
    json_decref(o);
    return rc;
}

/* --- codes, scales, codebooks --------------------------------------------------------- */

/* All values are -1 to 1, so that a scale that is finite gives finite weights. */
static int read_map(struct source *s, const struct source_tensor *x, const char *part, size_t n,
                    float *ret, struct err *err)
{
    const struct st_tensor *t = beside(s, x, part);
    if (t == NULL || t->dtype != DT_F32 || t->bytes != n * 4)
        return err_set(err, ERR_INVALID, "tensor %s is 4-bit, but %s%s is not %zu numbers of F32",
                       x->t->name, x->t->name, part, n);
    int rc = st_f32(t, 0, n, ret, err);
    for (size_t i = 0; i < n && rc == ERR_OK; i++)
        if (fabsf(ret[i]) > 1)
            rc = err_set(err, ERR_INVALID, "tensor %s holds %g, where a codebook ends at 1",
                         t->name, (double)ret[i]);
    return rc;
}

/* Sizes follow from the shape, which only the JSON knows. */
static int check_sizes(const struct source_tensor *x, const struct q4_source *q, struct err *err)
{
    size_t n = (size_t)q->shape[0] * (size_t)q->shape[1]; /* both below 2^31 */
    size_t blocks = (n + q->block - 1) / q->block;
    bool nested = q->nested_block != 0;
    if (q->codes->bytes != nf4_bytes(n))
        return bad(x, err, "the number of its bytes is not what its shape asks for");
    if (q->absmax->dtype != (nested ? DT_U8 : DT_F32) ||
        q->absmax->bytes != blocks * (nested ? 1 : 4))
        return bad(x, err, "the scales in its absmax are not as many as its blocks, or have "
                           "another type");
    if (nested && (q->nested_absmax->dtype != DT_F32 ||
                   q->nested_absmax->bytes !=
                       (blocks + q->nested_block - 1) / q->nested_block * 4))
        return bad(x, err, "its nested_absmax has another type or size than its absmax asks for");
    return ERR_OK;
}

static int read_matrix(struct source *s, const struct source_tensor *x, struct q4_source *q,
                       struct err *err)
{
    q->codes = x->t;
    q->absmax = beside(s, x, ".absmax");
    int rc = find_state(s, x, q, err);
    if (rc == ERR_OK)
        rc = check_sizes(x, q, err);
    if (rc == ERR_OK)
        rc = read_map(s, x, ".quant_map", 16, q->map, err);
    if (rc == ERR_OK && q->nested_block != 0)
        rc = read_map(s, x, ".nested_quant_map", 256, q->nested_map, err);
    return rc;
}

/* "X.weight.absmax" to X.weight, if that is what it is. */
static struct source_tensor *owner_of(const struct source *s, const struct source_tensor *e)
{
    static const char suffix[] = ".weight.absmax";
    char name[256];
    size_t len = strlen(e->t->name), m = sizeof suffix - 1;
    if (len <= m || len >= sizeof name || strcmp(e->t->name + len - m, suffix) != 0)
        return NULL;
    memcpy(name, e->t->name, len);
    name[len - strlen(".absmax")] = '\0';
    return source_find(s, name);
}

int bnb_attach(struct source *s, struct err *err)
{
    size_t n = 0;
    for (size_t i = 0; i < s->ntensors; i++)
        n += owner_of(s, &s->tensors[i]) != NULL;
    if (n == 0)
        return ERR_OK;
    s->q4 = calloc(n, sizeof *s->q4);
    if (s->q4 == NULL)
        return err_nomem(err);
    int rc = ERR_OK;
    n = 0;
    for (size_t i = 0; i < s->ntensors && rc == ERR_OK; i++) {
        struct source_tensor *x = owner_of(s, &s->tensors[i]);
        if (x == NULL)
            continue;
        x->q4 = &s->q4[n++];
        rc = read_matrix(s, x, x->q4, err);
    }
    return rc;
}

/* --- what they mean ------------------------------------------------------------------- */

/* The last bit of a map depends on how its maker rounded; the next value is 1e-3 away or more. */
static bool same_map(const float *got, const float *want, size_t n)
{
    for (size_t i = 0; i < n; i++)
        if (!(fabsf(got[i] - want[i]) <= 1e-6f * fabsf(want[i])))
            return false;
    return true;
}

bool bnb_is_nf4(const struct q4_source *q)
{
    return q->type == Q4_NF4 && q->block == NF4_BLOCK && same_map(q->map, nf4_code, 16) &&
           (q->nested_block == 0 || (q->nested_block == NF4_NESTED_BLOCK &&
                                     same_map(q->nested_map, nf4_dynamic8, 256)));
}

void bnb_digest(const struct q4_source *q, struct sha256 *h)
{
    char line[80];
    snprintf(line, sizeof line, "%zu %zu %a\n", q->block, q->nested_block, (double)q->offset);
    sha256_add(h, line, strlen(line));
    sha256_add(h, q->map, sizeof q->map);
    sha256_add(h, q->absmax->data, q->absmax->bytes);
    if (q->nested_block == 0)
        return;
    sha256_add(h, q->nested_map, sizeof q->nested_map);
    sha256_add(h, q->nested_absmax->data, q->nested_absmax->bytes);
}

static int block_scale(const struct q4_source *q, size_t block, float *ret, struct err *err)
{
    if (q->nested_block == 0)
        return st_f32(q->absmax, block, 1, ret, err);
    int rc = st_f32(q->nested_absmax, block / q->nested_block, 1, ret, err);
    if (rc != ERR_OK)
        return rc;
    *ret = q->nested_map[q->absmax->data[block]] * *ret;
    *ret += q->offset;
    return isfinite(*ret) ? ERR_OK
                          : err_set(err, ERR_INVALID, "tensor %s holds an infinite scale",
                                    q->codes->name);
}

int bnb_f32(const struct q4_source *q, size_t first, size_t n, float *ret, struct err *err)
{
    for (size_t i = first; i < first + n;) {
        float scale;
        int rc = block_scale(q, i / q->block, &scale, err);
        if (rc != ERR_OK)
            return rc;
        for (size_t end = (i / q->block + 1) * q->block; i < end && i < first + n; i++) {
            uint8_t byte = q->codes->data[i / 2];
            ret[i - first] = q->map[i % 2 ? byte & 15 : byte >> 4] * scale;
        }
    }
    return ERR_OK;
}
