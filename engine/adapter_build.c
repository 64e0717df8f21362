/* adapter_build.c - the form of an adapter that the forward pass computes with.
 *
 * One block of memory: the struct, the tables of modules and norms, then per module the gains, A
 * and B, then the vectors and tables that stand for the base's, each on a 64-byte boundary, in the
 * order in which the forward pass reads them.  B is transposed inside panels so that y += u_j * b_j
 * runs along rows; the embedding's A so that a token's column does. */
#include "engine/adapter.h"

#include "engine/mem.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

static size_t pad64(size_t n) { return (n + 63) & ~(size_t)63; }

/* Bytes in the block; with rank 0 nothing is kept. */
static size_t a_bytes(const struct adapter_src_module *m)
{
    return pad64((size_t)m->rank * (size_t)m->in * dtype_size(m->dtype));
}

static size_t b_bytes(const struct adapter_src_module *m)
{
    return pad64((size_t)m->rank * (size_t)m->out * dtype_size(m->dtype));
}

static size_t gain_bytes(const struct adapter_src_module *m)
{
    return pad64((size_t)m->rank * sizeof(float));
}

static bool is_table(const struct adapter_src_extra *x)
{
    return x->kind == EXTRA_HEAD || x->kind == EXTRA_EMBED;
}

/* Tables and rows keep their type, vectors become fp32. */
static size_t extra_used(const struct adapter_src_extra *x)
{
    const bool kept = is_table(x) || adapter_extra_is_rows(x->kind);
    return adapter_extra_count(x) * (kept ? dtype_size(x->dtype) : sizeof(float));
}

static size_t extra_bytes(const struct adapter_src_extra *x) { return pad64(extra_used(x)); }

static size_t table_bytes(const struct arch *arch)
{
    return pad64((size_t)arch->L * MOD_SLOTS * sizeof(struct lora_module));
}

static bool is_norm(const struct adapter_src_extra *x)
{
    return x->kind == EXTRA_NORM || x->kind == EXTRA_NORM_BIAS;
}

static size_t norms_bytes(const struct arch *arch, const struct adapter_src *src)
{
    for (size_t i = 0; i < src->nextras; i++)
        if (is_norm(&src->extras[i]))
            return pad64((size_t)adapter_norm_count(arch->L) * sizeof(struct base_norm));
    return 0;
}

/* Large blocks begin on a huge page, so that what a step reads of several adapters, the same place
 * of each, would compete for the same few sets of a cache.  Each begins at a distance of its own. */
enum { SKEW = 1024, SKEWS = 64, SKEW_FROM = 2 << 20 };

static size_t skew(const struct adapter_src *src, size_t block)
{
    return block >= SKEW_FROM ? (size_t)(src->hash[0] % SKEWS) * SKEW : 0;
}

/* A multiple of 64, so that mem_footprint() of it is the footprint of what is asked for. */
static size_t block_bytes(const struct arch *arch, const struct adapter_src *src)
{
    size_t n = pad64(sizeof(struct adapter)) + table_bytes(arch) + norms_bytes(arch, src);
    for (size_t i = 0; i < src->nmodules; i++)
        n += gain_bytes(&src->modules[i]) + a_bytes(&src->modules[i]) + b_bytes(&src->modules[i]);
    for (size_t i = 0; i < src->nextras; i++)
        n += extra_bytes(&src->extras[i]);
    return n >= SKEW_FROM ? n + (size_t)SKEW * SKEWS : n;
}

size_t adapter_build_bytes(const struct arch *arch, const struct adapter_src *src)
{
    return mem_footprint(block_bytes(arch, src));
}

/* --- is it this base's? ------------------------------------------------------------------------ */

static bool is_slot(const struct arch *arch, int layer, int module)
{
    return layer >= 0 && layer < arch->L && module >= 0 && module < MOD_SLOTS &&
           (module < MOD_COUNT ? arch_has_module(arch, (enum module)module) : layer == 0);
}

static bool is_float(enum dtype t) { return t == DT_F32 || t == DT_F16 || t == DT_BF16; }

static int check_modules(const struct arch *arch, const struct adapter_src *src, struct err *err)
{
    int64_t last = -1;
    for (size_t i = 0; i < src->nmodules; i++) {
        const struct adapter_src_module *m = &src->modules[i];
        int64_t at = (int64_t)m->layer * MOD_SLOTS + (int)m->module;
        if (!is_slot(arch, m->layer, (int)m->module) ||
            m->in != adapter_module_in(arch, (int)m->module) ||
            m->out != adapter_module_out(arch, (int)m->module))
            return err_set(err, ERR_INVALID,
                           "the adapter's layer %s, %d to %d, is not in this base (%s with %d "
                           "layers of width %d)",
                           m->path, m->in, m->out, arch->family, arch->L, arch->D);
        if (at <= last)
            return err_set(err, ERR_INVALID, "the adapter has %s twice or out of order", m->path);
        if (m->rank < 0 || m->rank > ADAPTER_MAX_RANK)
            return err_set(err, ERR_INVALID, "%s has rank %d, at most %d are computed", m->path,
                           m->rank, ADAPTER_MAX_RANK);
        if (!is_float(m->dtype))
            return err_set(err, ERR_INVALID, "%s has a type that is not F32, F16 or BF16", m->path);
        last = at;
    }
    return ERR_OK;
}

static size_t norm_wanted(const struct arch *arch, const struct adapter_src_extra *x)
{
    const struct family *f = family_find(arch->family);
    const bool of_heads = x->module == NORM_Q || x->module == NORM_K;
    if (f == NULL || x->layer < 0 || x->module < 0 || x->module >= NORM_COUNT ||
        x->layer >= (x->module < LAYER_NORMS ? arch->L : 1) || f->norm_path[x->module] == NULL ||
        (of_heads && !arch->qk_norm) ||
        (x->kind == EXTRA_NORM_BIAS && f->norm_kind != NORM_LAYER))
        return 0;
    return (size_t)(of_heads ? arch->hd : arch->D);
}

/* Elements of the tensor in this base, or 0 if it has no such. */
static size_t extra_wanted(const struct arch *arch, const struct adapter_src_extra *x)
{
    switch (x->kind) {
    case EXTRA_MAGNITUDE:
    case EXTRA_LORA_BIAS:
    case EXTRA_BIAS:
        return is_slot(arch, x->layer, x->module) && x->module != MOD_EMBED
                   ? (size_t)adapter_module_out(arch, x->module)
                   : 0;
    case EXTRA_NORM:
    case EXTRA_NORM_BIAS:
        return norm_wanted(arch, x);
    case EXTRA_EMBED_ROWS:
    case EXTRA_HEAD_ROWS:
        return x->rows <= arch->V && x->cols == arch->D ? adapter_extra_count(x) : 0;
    case EXTRA_EMBED_IDS:
    case EXTRA_HEAD_IDS:
        return x->cols == 0 ? (size_t)x->rows : 0;
    default:
        return (size_t)arch->V * (size_t)arch->D;
    }
}

/* Rows and their ids come in pairs. */
static bool is_paired(const struct adapter_src *src, size_t i)
{
    const struct adapter_src_extra *x = &src->extras[i];
    const bool rows = adapter_extra_is_rows(x->kind), ids = adapter_extra_is_ids(x->kind);
    if (!rows && !ids)
        return true;
    if (rows ? i + 1 == src->nextras : i == 0)
        return false;
    const struct adapter_src_extra *r = rows ? x : x - 1, *d = r + 1;
    return r->rows == d->rows &&
           ((r->kind == EXTRA_EMBED_ROWS && d->kind == EXTRA_EMBED_IDS) ||
            (r->kind == EXTRA_HEAD_ROWS && d->kind == EXTRA_HEAD_IDS));
}

static int check_extras(const struct arch *arch, const struct adapter_src *src, struct err *err)
{
    for (size_t i = 0; i < src->nextras; i++) {
        const struct adapter_src_extra *x = &src->extras[i];
        const bool typed = adapter_extra_is_ids(x->kind) ? x->dtype == DT_I32 : is_float(x->dtype);
        if (x->rows < 1 || x->cols < 0 || !typed || !is_paired(src, i) ||
            adapter_extra_count(x) != extra_wanted(arch, x))
            return err_set(err, ERR_INVALID,
                           "the adapter's tensor %s, %d by %d, does not fit this base (%s with %d "
                           "layers of width %d)",
                           x->name, x->rows, x->cols, arch->family, arch->L, arch->D);
    }
    return ERR_OK;
}

/* --- building ---------------------------------------------------------------------------------- */

/* Element (r, c) of f [rows][cols] to (c, r) of t. */
static void move(const char *f, char *t, size_t rows, size_t cols, size_t size, size_t r, size_t c)
{
    if (size == 2)
        memcpy(t + (c * rows + r) * 2, f + (r * cols + c) * 2, 2);
    else
        memcpy(t + (c * rows + r) * 4, f + (r * cols + c) * 4, 4);
}

#if defined(__SSE2__)
/* 8 by 8 elements of 2 bytes, rows `from` and `to` bytes apart. */
static void transpose_8x8(const char *f, size_t from, char *t, size_t to)
{
    __m128i a[8], b[8];
    for (size_t i = 0; i < 8; i++)
        a[i] = _mm_loadu_si128((const __m128i *)(const void *)(f + i * from));
    for (int i = 0; i < 4; i++) { /* pairs of rows i and i + 4, three times, sort the columns */
        b[2 * i] = _mm_unpacklo_epi16(a[i], a[i + 4]);
        b[2 * i + 1] = _mm_unpackhi_epi16(a[i], a[i + 4]);
    }
    for (int i = 0; i < 4; i++) {
        a[2 * i] = _mm_unpacklo_epi16(b[i], b[i + 4]);
        a[2 * i + 1] = _mm_unpackhi_epi16(b[i], b[i + 4]);
    }
    for (size_t i = 0; i < 4; i++) {
        _mm_storeu_si128((__m128i *)(void *)(t + 2 * i * to), _mm_unpacklo_epi16(a[i], a[i + 4]));
        _mm_storeu_si128((__m128i *)(void *)(t + (2 * i + 1) * to),
                         _mm_unpackhi_epi16(a[i], a[i + 4]));
    }
}
#endif

/* [rows][cols] to [cols][rows], in squares that stay in the cache. */
static void transpose(const void *from, void *to, size_t rows, size_t cols, size_t size)
{
    enum { SQUARE = 32 };
    const char *f = from;
    char *t = to;
    size_t done = 0; /* columns that are there already */
#if defined(__SSE2__)
    const size_t whole = size == 2 ? rows / 8 * 8 : 0;
    for (; whole > 0 && done + 8 <= cols; done += 8) {
        for (size_t r = 0; r < whole; r += 8)
            transpose_8x8(f + (r * cols + done) * 2, cols * 2, t + (done * rows + r) * 2, rows * 2);
        for (size_t r = whole; r < rows; r++)
            for (size_t c = done; c < done + 8; c++)
                move(f, t, rows, cols, size, r, c);
    }
#endif
    for (size_t r0 = 0; r0 < rows; r0 += SQUARE)
        for (size_t c0 = done; c0 < cols; c0 += SQUARE)
            for (size_t r = r0; r < rows && r < r0 + SQUARE; r++)
                for (size_t c = c0; c < cols && c < c0 + SQUARE; c++)
                    move(f, t, rows, cols, size, r, c);
}

/* Element i of a vector that may lie unaligned. */
static float element(const void *v, enum dtype t, size_t i)
{
    float f;
    uint16_t h;
    if (t == DT_F32) {
        memcpy(&f, (const char *)v + 4 * i, 4);
        return f;
    }
    memcpy(&h, (const char *)v + 2 * i, 2);
    return t == DT_F16 ? f16_to_f32(h) : bf16_to_f32(h);
}

/* The next `bytes` of the block, and zeros to their boundary. */
static char *next(char **p, size_t bytes)
{
    char *at = *p;
    *p += pad64(bytes);
    memset(at + bytes, 0, (size_t)(*p - at) - bytes);
    return at;
}

static void build_module(const struct adapter_src_module *m, struct lora_module *ret, char **p)
{
    size_t k = (size_t)m->rank, one = dtype_size(m->dtype);
    float *gain = (float *)(void *)next(p, k * sizeof *gain);
    for (size_t j = 0; j < k; j++)
        gain[j] = (float)(m->scaling * (m->E != NULL ? (double)element(m->E, m->dtype, j) : 1.0));
    void *A = next(p, k * (size_t)m->in * one);
    if ((int)m->module == MOD_EMBED)
        transpose(m->A, A, k, (size_t)m->in, one);
    else
        memcpy(A, m->A, k * (size_t)m->in * one);
    char *B = next(p, k * (size_t)m->out * one);
    for (size_t o = 0, n; o < (size_t)m->out; o += n) {
        n = (size_t)m->out - o < ADAPTER_PANEL ? (size_t)m->out - o : ADAPTER_PANEL;
        transpose((const char *)m->B + o * k * one, B + o * k * one, n, k, one);
    }
    *ret = (struct lora_module){ .rank = m->rank, .in = m->in, .out = m->out, .dtype = m->dtype,
                                 .A = A, .B = B, .gain = gain };
}

static const struct adapter_src_module *module_of(const struct adapter_src *src,
                                                  const struct adapter_src_extra *x)
{
    for (size_t i = 0; i < src->nmodules; i++)
        if (src->modules[i].layer == x->layer && (int)src->modules[i].module == x->module)
            return &src->modules[i];
    return NULL;
}

/* A vector as fp32: as it is, times the scaling, or as DoRA's m / n. */
static int build_vector(const struct adapter_src *src, const struct adapter_src_extra *x,
                        float *ret, struct err *err)
{
    const struct adapter_src_module *m = module_of(src, x);
    if ((x->kind == EXTRA_MAGNITUDE || x->kind == EXTRA_LORA_BIAS) && m == NULL)
        return err_set(err, ERR_INVALID, "tensor %s belongs to a layer that is not adapted",
                       x->name);
    if (x->kind == EXTRA_MAGNITUDE && m->norms == NULL)
        return err_set(err, ERR_INTERNAL, "the weight norms of %s are not known", m->path);
    for (int o = 0; o < x->rows; o++) {
        const float v = element(x->data, x->dtype, (size_t)o);
        ret[o] = x->kind == EXTRA_LORA_BIAS   ? (float)(m->scaling * (double)v)
                 : x->kind == EXTRA_MAGNITUDE ? (float)((double)v / (double)m->norms[o])
                                              : v;
        if (!isfinite(ret[o]))
            return err_set(err, ERR_INVALID, "tensor %s: element %d is %g, which %s %g is not "
                           "finite", x->name, o, (double)v,
                           x->kind == EXTRA_MAGNITUDE ? "over a weight norm of" : "times",
                           x->kind == EXTRA_MAGNITUDE ? (double)m->norms[o] : m->scaling);
    }
    return ERR_OK;
}

static void build_norm(const struct arch *arch, const struct adapter_src_extra *x, float *at,
                       struct adapter *a)
{
    const int l = x->module < LAYER_NORMS ? x->layer : arch->L;
    struct base_norm *n = &a->norms[adapter_norm_index(arch->L, l, (enum norm)x->module)];
    *(x->kind == EXTRA_NORM ? &n->w : &n->bias) = at;
    a->alone = "replaces norms of the base";
    if (x->kind == EXTRA_NORM && family_find(arch->family)->norm_kind == NORM_RMS_PLUS_ONE)
        for (int i = 0; i < x->rows; i++)
            at[i] = 1.0f + at[i]; /* as in the base that is loaded */
}

struct place {
    int32_t id, at;
};

static int by_id(const void *a, const void *b)
{
    const int32_t x = ((const struct place *)a)->id, y = ((const struct place *)b)->id;
    return (x > y) - (x < y);
}

/* Rows at `at` and their ids behind them, both in order of the ids. */
static int build_rows(const struct arch *arch, const struct adapter_src_extra *x, char *at,
                      struct adapter *a, struct err *err)
{
    const size_t n = (size_t)x->rows, row = (size_t)x->cols * dtype_size(x->dtype);
    int32_t *ids = (int32_t *)(void *)(at + extra_bytes(x));
    struct place *order = malloc(n * sizeof *order);
    if (order == NULL)
        return err_nomem(err);
    for (size_t i = 0; i < n; i++) {
        memcpy(&order[i].id, (const char *)x[1].data + i * sizeof *ids, sizeof *ids);
        order[i].at = (int32_t)i;
    }
    qsort(order, n, sizeof *order, by_id);
    int rc = ERR_OK;
    for (size_t i = 0; i < n && rc == ERR_OK; i++) {
        ids[i] = order[i].id;
        if (ids[i] < 0 || ids[i] >= arch->V || (i > 0 && ids[i] == ids[i - 1]))
            rc = err_set(err, ERR_INVALID, "tensor %s: token %d is not in this base's vocabulary of "
                         "%d, or is there twice", x->name, (int)ids[i], arch->V);
        memcpy(at + i * row, (const char *)x->data + (size_t)order[i].at * row, row);
    }
    free(order);
    *(x->kind == EXTRA_HEAD_ROWS ? &a->head_rows : &a->embed_rows) =
        (struct adapter_rows){ x->rows, ids, x->dtype, at };
    a->alone = "replaces rows of the base's embedding or head";
    return rc;
}

static int build_extra(const struct arch *arch, const struct adapter_src *src,
                       const struct adapter_src_extra *x, struct lora_module *table,
                       struct adapter *a, char **p, struct err *err)
{
    void *at = next(p, extra_used(x));
    if (is_table(x)) {
        *(x->kind == EXTRA_HEAD ? &a->head : &a->embed) = (struct adapter_table){ x->dtype, at };
        memcpy(at, x->data, adapter_extra_count(x) * dtype_size(x->dtype));
        a->alone = "replaces the base's embedding or head";
        return ERR_OK;
    }
    if (adapter_extra_is_rows(x->kind))
        return build_rows(arch, x, at, a, err);
    if (adapter_extra_is_ids(x->kind)) /* with the rows */
        return ERR_OK;
    int rc = build_vector(src, x, at, err);
    if (rc != ERR_OK)
        return rc;
    if (is_norm(x)) {
        build_norm(arch, x, at, a);
        return ERR_OK;
    }
    struct lora_module *m = &table[x->layer * MOD_SLOTS + x->module];
    m->out = x->rows;
    a->vectors = true;
    if (x->kind == EXTRA_LORA_BIAS) {
        m->lora_bias = at;
        return ERR_OK;
    }
    *(x->kind == EXTRA_MAGNITUDE ? &m->scale : &m->bias) = at;
    a->alone = x->kind == EXTRA_MAGNITUDE ? "is a DoRA, which scales the base's outputs"
                                          : "replaces biases of the base";
    return ERR_OK;
}

/* Into the block at p, whatever it holds. */
static int build(const struct adapter_src *src, const struct arch *arch, char *p, struct adapter *a,
                 struct err *err)
{
    memset(p + pad64(sizeof *a), 0, table_bytes(arch) + norms_bytes(arch, src));
    p += pad64(sizeof *a);
    struct lora_module *table = (struct lora_module *)(void *)p;
    p += table_bytes(arch);
    a->modules = table;
    if (norms_bytes(arch, src) > 0) {
        a->norms = (struct base_norm *)(void *)p;
        p += norms_bytes(arch, src);
    }
    for (size_t i = 0; i < src->nmodules; i++) {
        const struct adapter_src_module *m = &src->modules[i];
        if (m->rank == 0) /* the table is zero already */
            continue;
        build_module(m, &table[m->layer * MOD_SLOTS + (int)m->module], &p);
        if (m->rank > a->rank_max)
            a->rank_max = m->rank;
    }
    for (size_t i = 0; i < src->nextras; i++) {
        int rc = build_extra(arch, src, &src->extras[i], table, a, &p, err);
        if (rc != ERR_OK)
            return rc;
    }
    if (arch->tied && a->head_rows.n == 0)
        a->head_rows = a->embed_rows;
    return ERR_OK;
}

const void *adapter_row(const struct adapter_rows *r, int D, int32_t token)
{
    int low = 0, high = r->n;
    while (low < high) {
        const int mid = low + (high - low) / 2;
        if (r->ids[mid] < token)
            low = mid + 1;
        else
            high = mid;
    }
    return low < r->n && r->ids[low] == token
               ? (const char *)r->data + (size_t)low * (size_t)D * dtype_size(r->dtype)
               : NULL;
}

/* Memory for the block: the spare one's, or new, which there may only be once that has gone. */
static char *take_block(struct adapter **spare, size_t block)
{
    struct adapter *s = spare != NULL ? *spare : NULL;
    if (s != NULL)
        *spare = NULL;
    if (s != NULL && s->bytes == mem_footprint(block))
        return s->own;
    adapter_free(s);
    return mem_alloc(block);
}

int adapter_build(const struct arch *arch, const struct adapter_src *src, int64_t version_id,
                  struct adapter **spare, struct adapter **ret, struct err *err)
{
    int rc = check_modules(arch, src, err);
    if (rc == ERR_OK)
        rc = check_extras(arch, src, err);
    if (rc != ERR_OK)
        return rc;
    size_t block = block_bytes(arch, src);
    char *own = take_block(spare, block);
    if (own == NULL)
        return err_nomem(err);
    struct adapter *a = (struct adapter *)(void *)(own + skew(src, block));
    memset(a, 0, sizeof *a);
    memcpy(a->hash, src->hash, sizeof a->hash);
    a->version_id = version_id;
    a->L = arch->L;
    a->bytes = mem_footprint(block);
    a->own = own;
    rc = build(src, arch, (char *)a, a, err);
    if (rc != ERR_OK) {
        adapter_free(a);
        return rc;
    }
    *ret = a;
    return ERR_OK;
}

void adapter_free(struct adapter *a)
{
    if (a != NULL)
        mem_free(a->own, a->bytes);
}
