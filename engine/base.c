/* base.c - loading a base file.
 *
 * Everything the kernels read lies in one arena.  The same walk over the weights runs twice: once
 * with no arena, checking every tensor's presence, type and size and adding up what it will take,
 * and once filling it.  So base_size() is the first walk, and nothing is allocated that the file
 * does not account for.
 *
 * A base file is as hostile as any other: sizes come from the arch, are checked against the file,
 * and values that would turn into NaN or infinities are refused. */
#include "engine/base.h"

#include "engine/base_int.h"
#include "engine/mem.h"
#include "engine/nf4.h"
#include "engine/safetensors.h"
#include "engine/util.h"

#include <stdlib.h>
#include <string.h>

enum { ALIGN = 64 };

/* base->own */
struct own {
    struct st_file *file; /* kept open with mmap only */
    uint8_t *arena;
    size_t arena_bytes;
};

struct loader {
    const struct st_file *file;
    struct base *base;
    bool fill, use_mmap, keep_f32;
    float plus_one;    /* added to weights of norms: 1 with NORM_RMS_PLUS_ONE */
    uint8_t *arena;    /* NULL while measuring */
    size_t used;       /* bytes of the arena */
    size_t mapped;     /* bytes that stay in the file's map */
    size_t ntensors;   /* of the file that were asked for */
    float *absmax;     /* scratch: block scales of one matrix */
    size_t absmax_cap;
    struct err *err;
};

static void *take(struct loader *ld, size_t bytes)
{
    void *p = ld->fill ? ld->arena + ld->used : NULL;
    ld->used += (bytes + ALIGN - 1) / ALIGN * ALIGN;
    return p;
}

/* The tensor `name` + `part`, which must have this type and number of bytes. */
static const struct st_tensor *need(struct loader *ld, const char *name, const char *part,
                                    enum dtype dtype, size_t bytes)
{
    struct part_name full = base_part(name, part);
    const struct st_tensor *t = st_find(ld->file, full.s);
    if (t == NULL) {
        err_set(ld->err, ERR_INVALID, "tensor %s is missing from the base file", full.s);
        return NULL;
    }
    if (t->dtype != dtype || t->bytes != bytes) {
        err_set(ld->err, ERR_INVALID,
                "tensor %s has %zu bytes of %s, but the model's shape asks for %zu bytes of %s",
                full.s, t->bytes, t->dtype_name, bytes, dtype == DT_U8 ? "U8" : "another type");
        return NULL;
    }
    ld->ntensors++;
    return t;
}

/* The tensor's bytes: in the map if that was asked for and they are aligned, else in the arena. */
static const void *place(struct loader *ld, const struct st_tensor *t)
{
    if (ld->use_mmap && (uintptr_t)t->data % ALIGN == 0) {
        ld->mapped += ld->fill ? 0 : t->bytes;
        return t->data;
    }
    void *p = take(ld, t->bytes);
    if (p != NULL)
        memcpy(p, t->data, t->bytes);
    return p;
}

/* --- matrices ------------------------------------------------------------------------- */

static int all_finite(const struct st_tensor *t, struct err *err)
{
    enum { STEP = 1024 };
    float v[STEP];
    size_t n = st_count(t);
    int rc = ERR_OK;
    for (size_t i = 0; i < n && rc == ERR_OK; i += STEP)
        rc = st_f32(t, i, n - i < STEP ? n - i : STEP, v, err);
    return rc;
}

static int load_dense(struct loader *ld, const struct weight *w, enum dtype dtype,
                      struct matrix *ret)
{
    size_t n = (size_t)w->N * (size_t)w->K;
    const struct st_tensor *t = need(ld, w->name, "", dtype, n * dtype_size(dtype));
    if (t == NULL)
        return ERR_INVALID;
    if (st_count(t) != n)
        return err_set(ld->err, ERR_INVALID, "tensor %s has %zu elements, %zu are needed", w->name,
                       st_count(t), n);
    ret->type = dtype == DT_F32 ? MAT_F32 : MAT_BF16;
    ret->codes = place(ld, t);
    return ld->fill ? all_finite(t, ld->err) : ERR_OK;
}

/* fp16 scales: NaN and infinities have all exponent bits set. */
static int check_scales16(const struct loader *ld, const char *name, const uint16_t *s, size_t n)
{
    unsigned bad = 0;
    for (size_t i = 0; i < n; i++)
        bad |= (s[i] & 0x7c00u) == 0x7c00u;
    return bad ? err_set(ld->err, ERR_INVALID, "a block scale of tensor %s is not finite in fp16",
                         name)
               : ERR_OK;
}

/* Block scales of an NF4 matrix: double-quantised, or plain, and then the others are NULL. */
struct scales {
    const struct st_tensor *absmax, *nested, *offset;
};

static int find_scales(struct loader *ld, const char *name, size_t n, struct scales *ret)
{
    const struct st_tensor *t = st_find(ld->file, base_part(name, ".absmax").s);
    *ret = (struct scales){ 0 };
    if (t != NULL && t->dtype == DT_F32) {
        ret->absmax = need(ld, name, ".absmax", DT_F32, nf4_blocks(n) * 4);
        return ret->absmax ? ERR_OK : ERR_INVALID;
    }
    ret->absmax = need(ld, name, ".absmax", DT_U8, nf4_blocks(n));
    ret->nested = need(ld, name, ".nested_absmax", DT_F32, nf4_nested_blocks(n) * 4);
    ret->offset = need(ld, name, ".nested_offset", DT_F32, 4);
    return ret->absmax && ret->nested && ret->offset ? ERR_OK : ERR_INVALID;
}

/* Decode them into ld->absmax. */
static int decode_absmax(struct loader *ld, const char *name, size_t blocks,
                         const struct scales *sc)
{
    if (blocks > ld->absmax_cap) {
        free(ld->absmax);
        ld->absmax = malloc(blocks * sizeof *ld->absmax);
        ld->absmax_cap = ld->absmax ? blocks : 0;
        if (ld->absmax == NULL)
            return err_nomem(ld->err);
    }
    if (sc->nested == NULL)
        return st_f32(sc->absmax, 0, blocks, ld->absmax, ld->err);
    const struct st_tensor *nested = sc->nested;
    size_t n = nested->bytes / 4;
    float *big = malloc(nested->bytes), mean;
    int rc = big ? st_f32(nested, 0, n, big, ld->err) : err_nomem(ld->err);
    if (rc == ERR_OK)
        rc = st_f32(sc->offset, 0, 1, &mean, ld->err);
    if (rc == ERR_OK)
        q4_unnest(sc->absmax->data, big, mean, blocks, ld->absmax);
    free(big);
    for (size_t i = 0; i < blocks && rc == ERR_OK; i++)
        if ((f32_bits(ld->absmax[i]) & 0x7f800000u) == 0x7f800000u)
            rc = err_set(ld->err, ERR_INVALID, "a block scale of tensor %s is not finite", name);
    return rc;
}

static int load_nf4(struct loader *ld, const struct weight *w, struct matrix *ret)
{
    size_t N = (size_t)w->N, K = (size_t)w->K, n = N * K;
    bool panels = K % NF4_BLOCK == 0;
    const struct st_tensor *codes = need(ld, w->name, "", DT_U8,
                                         panels ? p16_bytes(N, K) : nf4_bytes(n));
    struct scales scales;
    if (codes == NULL || find_scales(ld, w->name, n, &scales) != ERR_OK)
        return ERR_INVALID;
    ret->type = panels ? MAT_NF4_P16 : MAT_NF4_FLAT;
    ret->codes = place(ld, codes);
    uint16_t *s16 = panels ? take(ld, p16_scales(N, K) * 2) : NULL;
    float *s32 = !panels         ? take(ld, nf4_blocks(n) * 4)
                 : ld->keep_f32 ? take(ld, p16_scales(N, K) * 4)
                                : NULL;
    ret->scales16 = s16;
    ret->scales32 = s32;
    if (!ld->fill)
        return ERR_OK;
    int rc = decode_absmax(ld, w->name, nf4_blocks(n), &scales);
    if (rc != ERR_OK)
        return rc;
    if (!panels) {
        memcpy(s32, ld->absmax, nf4_blocks(n) * 4);
        return ERR_OK;
    }
    p16_scales_from(ld->absmax, N, K, s16, s32);
    return check_scales16(ld, w->name, s16, p16_scales(N, K));
}

static int load_q8(struct loader *ld, const struct weight *w, struct matrix *ret)
{
    size_t N = (size_t)w->N, K = (size_t)w->K, scales = p16_scales(N, K);
    if (K % 64 != 0)
        return err_set(ld->err, ERR_INVALID, "tensor %s is 8-bit, but %zu columns are no blocks",
                       w->name, K);
    const struct st_tensor *codes = need(ld, w->name, "", DT_U8, q8_bytes(N, K));
    const struct st_tensor *scale = need(ld, w->name, ".scale", DT_F16, scales * 2);
    if (codes == NULL || scale == NULL)
        return ERR_INVALID;
    ret->type = MAT_Q8_P16;
    ret->codes = place(ld, codes);
    ret->scales16 = place(ld, scale);
    return ld->fill ? check_scales16(ld, w->name, ret->scales16, scales) : ERR_OK;
}

/* What the tensor is follows from its type and from the scales beside it. */
static int load_matrix(struct loader *ld, const struct weight *w, struct matrix *ret)
{
    const struct st_tensor *t = st_find(ld->file, w->name);
    *ret = (struct matrix){ .N = w->N, .K = w->K };
    if (t == NULL || t->dtype == DT_F32 || t->dtype == DT_BF16)
        return load_dense(ld, w, t ? t->dtype : DT_F32, ret);
    if (w->kind == W_EMBED || w->kind == W_POSITIONS)
        return err_set(ld->err, ERR_INVALID, "tensor %s has type %s, where F32 or BF16 is needed",
                       w->name, t->dtype_name);
    return st_find(ld->file, base_part(w->name, ".scale").s) ? load_q8(ld, w, ret)
                                                              : load_nf4(ld, w, ret);
}

static int load_vector(struct loader *ld, const struct weight *w, float plus, const float **ret)
{
    const struct st_tensor *t = need(ld, w->name, "", DT_F32, (size_t)w->N * 4);
    if (t == NULL)
        return ERR_INVALID;
    float *v = take(ld, t->bytes);
    *ret = v; /* NOLINT(clang-analyzer-core.NullDereference): read_meta() made b->layers */
    int rc = v ? st_f32(t, 0, (size_t)w->N, v, ld->err) : ERR_OK;
    for (int i = 0; v != NULL && plus != 0 && i < w->N; i++)
        v[i] += plus;
    return rc;
}

/* --- the walk ------------------------------------------------------------------------- */

static int load_weight(struct loader *ld, const struct weight *w)
{
    struct base *b = ld->base;
    struct base_layer *layer = &b->layers[w->layer < 0 ? 0 : w->layer];
    struct base_norm *norm = w->norm == NORM_EMBED   ? &b->norm_embed
                             : w->norm == NORM_FINAL ? &b->norm_final
                                                     : &layer->norm[w->norm];
    switch (w->kind) {
    case W_EMBED:
        return load_matrix(ld, w, &b->embed);
    case W_POSITIONS:
        return load_matrix(ld, w, &b->positions);
    case W_HEAD:
        if (b->arch.tied && st_find(ld->file, w->name) == NULL) {
            b->head = b->embed;
            return ERR_OK;
        }
        return load_matrix(ld, w, &b->head);
    case W_LINEAR:
        return load_matrix(ld, w, &layer->mod[w->module].w);
    case W_BIAS:
        return load_vector(ld, w, 0, &layer->mod[w->module].bias);
    case W_NORM:
        return load_vector(ld, w, ld->plus_one, &norm->w);
    case W_NORM_BIAS:
        return load_vector(ld, w, 0, &norm->bias);
    }
    return err_set(ld->err, ERR_INTERNAL, "weight %s is of no known kind", w->name);
}

static int walk(struct loader *ld, const struct weight *weights, size_t n)
{
    ld->used = 0;
    ld->ntensors = 0;
    int rc = ERR_OK;
    for (size_t i = 0; i < n && rc == ERR_OK; i++)
        rc = load_weight(ld, &weights[i]);
    return rc;
}

/* A tensor that nobody asked for means that the file is not what we think it is. */
static int check_no_more(const struct loader *ld)
{
    size_t pads = 0;
    for (size_t i = 0; i < ld->file->ntensors; i++)
        pads += strncmp(ld->file->tensors[i].name, "__pad.", 6) == 0;
    if (ld->ntensors + pads == ld->file->ntensors)
        return ERR_OK;
    return err_set(ld->err, ERR_INVALID,
                   "the base file holds %zu tensors that do not belong to a %s model",
                   ld->file->ntensors - pads - ld->ntensors, ld->base->arch.family);
}

/* --- header --------------------------------------------------------------------------- */

static int read_meta(struct base *b, const struct st_file *f, const char *path, struct err *err)
{
    const char *format = st_meta(f, "lorad.format"), *arch = st_meta(f, "lorad.arch");
    const char *name = st_meta(f, "lorad.name"), *hash = st_meta(f, "lorad.hash");
    const char *type = st_meta(f, "lorad.type");
    if (format == NULL)
        return err_set(err, ERR_INVALID,
                       "%s is not a base file; make one with `lorad import FOLDER -o FILE`", path);
    if (strcmp(format, BASE_FORMAT) != 0)
        return err_set(err, ERR_INVALID,
                       "%s has format %.20s; this version of lorad reads format " BASE_FORMAT, path,
                       format);
    if (arch == NULL || name == NULL || type == NULL || hash == NULL ||
        !hex32_parse(hash, b->hash))
        return err_set(err, ERR_INVALID, "%s: the metadata lack lorad.arch, name, type or hash",
                       path);
    int rc = arch_from_json(arch, &b->arch, err);
    if (rc != ERR_OK)
        return rc;
    hex32(b->hash, b->hash_hex);
    b->is_f32 = strcmp(type, "f32") == 0;
    b->name = strdup(name);
    b->path = strdup(path);
    b->layers = calloc((size_t)b->arch.L, sizeof *b->layers);
    if (b->name == NULL || b->path == NULL || b->layers == NULL) {
        err_nomem(err);
        return ERR_NOMEM;
    }
    return ERR_OK;
}

static int keep_text(const struct st_file *f, const char *key, const char **ret, struct err *err)
{
    const char *v = st_meta(f, key);
    if (v == NULL)
        return ERR_OK;
    *ret = strdup(v);
    return *ret ? ERR_OK : err_nomem(err);
}

static int keep_texts(struct base *b, const struct st_file *f, struct err *err)
{
    int rc = keep_text(f, "lorad.tokenizer", &b->tokenizer_json, err);
    if (rc == ERR_OK)
        rc = keep_text(f, "lorad.tokenizer_config", &b->tokenizer_config, err);
    if (rc == ERR_OK)
        rc = keep_text(f, "lorad.chat_template", &b->chat_template, err);
    b->tokenizer_json_len = b->tokenizer_json ? strlen(b->tokenizer_json) : 0;
    return rc;
}

/* --- public --------------------------------------------------------------------------- */

/* Header and first walk; *ret_weights is the caller's. */
static int measure(struct loader *ld, struct st_file **ret_file, const char *path,
                   struct weight **ret_weights, size_t *ret_n)
{
    int rc = st_open(path, ret_file, ld->err);
    if (rc != ERR_OK)
        return rc;
    ld->file = *ret_file;
    rc = read_meta(ld->base, ld->file, path, ld->err);
    if (rc == ERR_OK)
        rc = base_weights(&ld->base->arch, ret_weights, ret_n, ld->err);
    if (rc == ERR_OK)
        ld->plus_one = family_find(ld->base->arch.family)->norm_kind == NORM_RMS_PLUS_ONE;
    if (rc == ERR_OK)
        rc = walk(ld, *ret_weights, *ret_n);
    return rc == ERR_OK ? check_no_more(ld) : rc;
}

static int fill(struct loader *ld, struct own *own, const struct weight *weights, size_t n)
{
    own->arena_bytes = ld->used;
    own->arena = mem_alloc(ld->used);
    if (own->arena == NULL)
        return err_set(ld->err, ERR_NOMEM, "no memory for the %zu bytes of the base model",
                       ld->used);
    ld->arena = own->arena;
    ld->fill = true;
    return walk(ld, weights, n);
}

int base_load(const char *path, enum precision precision, bool use_mmap, struct base **ret,
              struct err *err)
{
    struct weight *weights = NULL;
    size_t n = 0;
    struct base *b = calloc(1, sizeof *b);
    struct own *own = calloc(1, sizeof *own);
    if (b == NULL || own == NULL) {
        free(b);
        free(own);
        return err_nomem(err);
    }
    b->own = own;
    struct loader ld = { .base = b, .use_mmap = use_mmap, .keep_f32 = precision == PREC_F32,
                         .err = err };
    int rc = measure(&ld, &own->file, path, &weights, &n);
    for (size_t i = 0; rc == ERR_OK && i < n; i++)
        if (weights[i].kind != W_HEAD || !b->arch.tied)
            b->params += (uint64_t)weights[i].N * (uint64_t)(weights[i].K > 0 ? weights[i].K : 1);
    if (rc == ERR_OK)
        rc = fill(&ld, own, weights, n);
    if (rc == ERR_OK)
        rc = keep_texts(b, own->file, err);
    free(weights);
    free(ld.absmax);
    if (rc != ERR_OK) {
        base_free(b);
        return rc;
    }
    b->bytes = own->arena_bytes + ld.mapped;
    if (!use_mmap) {
        st_close(own->file);
        own->file = NULL;
    }
    *ret = b;
    return ERR_OK;
}

void base_free(struct base *b)
{
    if (b == NULL)
        return;
    struct own *own = b->own;
    mem_free(own->arena, own->arena_bytes);
    st_close(own->file);
    free(own);
    free(b->layers);
    free(b->name);
    free(b->path);
    free((char *)b->tokenizer_json);
    free((char *)b->tokenizer_config);
    free((char *)b->chat_template);
    free(b);
}

int base_size(const char *path, size_t *ret, struct err *err)
{
    struct weight *weights = NULL;
    size_t n = 0;
    struct st_file *file = NULL;
    struct base b = { 0 };
    struct loader ld = { .base = &b, .err = err };
    int rc = measure(&ld, &file, path, &weights, &n);
    if (rc == ERR_OK)
        *ret = ld.used;
    free(weights);
    free(b.layers);
    free(b.name);
    free(b.path);
    st_close(file);
    return rc;
}
