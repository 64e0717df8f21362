/* adapter.c - the content hash, the form for computing, sets of adapters, and writing back.
 *
 * A built adapter is one block of memory: the struct, the table of modules, the gains, then per
 * module A and the transposed B, each on a 64-byte boundary, in the order in which the forward
 * pass reads them.  B is transposed so that y += u_j * b_j runs along rows. */
#include "engine/adapter.h"

#include "engine/mem.h"
#include "engine/util.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char *const method_names[] = { "lora", "rslora", "adalora" };

const char *adapter_method_name(enum adapter_method m) { return method_names[m]; }

bool adapter_method_parse(const char *name, enum adapter_method *ret)
{
    for (size_t i = 0; i < sizeof method_names / sizeof method_names[0]; i++) {
        if (strcmp(name, method_names[i]) == 0) {
            *ret = (enum adapter_method)i;
            return true;
        }
    }
    return false;
}

static const char *dtype_name(enum dtype t)
{
    return t == DT_F32 ? "F32" : t == DT_F16 ? "F16" : t == DT_BF16 ? "BF16" : "?";
}

void adapter_src_free(struct adapter_src *a)
{
    if (a == NULL)
        return;
    for (size_t i = 0; a->modules != NULL && i < a->nmodules; i++) {
        free(a->modules[i].path);
        free(a->modules[i].mask);
    }
    free(a->modules);
    free(a->config);
    free(a->base_name);
    free(a->own);
    free(a);
}

/* --- content hash ---------------------------------------------------------------------------- */

static void hash_number(struct sha256 *h, uint64_t v, size_t bytes)
{
    uint8_t le[8];
    for (size_t i = 0; i < bytes; i++)
        le[i] = (uint8_t)(v >> 8 * i);
    sha256_add(h, le, bytes);
}

static void hash_name(struct sha256 *h, const char *s) { sha256_add(h, s, strlen(s) + 1); }

void adapter_src_hash(const struct adapter_src *a, uint8_t ret[32])
{
    struct sha256 h;
    sha256_init(&h);
    hash_name(&h, adapter_method_name(a->method));
    for (size_t i = 0; i < a->nmodules; i++) {
        const struct adapter_src_module *m = &a->modules[i];
        size_t k = (size_t)m->rank, one = dtype_size(m->dtype);
        uint64_t scaling;
        memcpy(&scaling, &m->scaling, sizeof scaling);
        hash_name(&h, m->path);
        hash_number(&h, (uint32_t)m->in, 4);
        hash_number(&h, (uint32_t)m->out, 4);
        hash_number(&h, (uint32_t)m->rank, 4);
        hash_number(&h, (uint32_t)m->init_rank, 4);
        hash_number(&h, scaling, 8);
        hash_name(&h, dtype_name(m->dtype));
        if (k == 0)
            continue;
        sha256_add(&h, m->A, k * (size_t)m->in * one);
        sha256_add(&h, m->B, k * (size_t)m->out * one);
        if (m->E != NULL)
            sha256_add(&h, m->E, k * one);
    }
    sha256_end(&h, ret);
}

/* --- writing back ------------------------------------------------------------------------------
 */

struct part {
    const char *suffix;
    int64_t shape[2];
    const void *data;
};

/* The tensors of a module in PEFT's names; returns how many. */
static int parts_of(const struct adapter_src *a, const struct adapter_src_module *m,
                    struct part ret[3])
{
    bool ada = a->method == METHOD_ADALORA;
    ret[0] = (struct part){ ada ? "lora_A" : "lora_A.weight", { m->rank, m->in }, m->A };
    ret[1] = (struct part){ ada ? "lora_B" : "lora_B.weight", { m->out, m->rank }, m->B };
    ret[2] = (struct part){ "lora_E", { m->rank, 1 }, m->E };
    return ada ? 3 : 2;
}

static size_t part_bytes(const struct adapter_src_module *m, const struct part *p)
{
    return (size_t)p->shape[0] * (size_t)p->shape[1] * dtype_size(m->dtype);
}

static int write_parts(const struct adapter_src *a, struct st_writer *w, bool data, struct err *err)
{
    for (size_t i = 0; i < a->nmodules; i++) {
        const struct adapter_src_module *m = &a->modules[i];
        struct part part[3];
        int n = parts_of(a, m, part);
        for (int p = 0; p < n; p++) {
            char name[320];
            size_t bytes = part_bytes(m, &part[p]);
            snprintf(name, sizeof name, "base_model.model.%s.%s", m->path, part[p].suffix);
            int rc = data ? st_writer_data(w, part[p].data, bytes, err)
                          : st_writer_tensor(w, name, dtype_name(m->dtype), 2, part[p].shape, bytes,
                                             err);
            if (rc != ERR_OK)
                return rc;
        }
    }
    return ERR_OK;
}

int peft_write_weights(const struct adapter_src *a, const char *path, struct err *err)
{
    struct st_writer *w = NULL;
    int rc = st_writer_open(path, false, &w, err);
    if (rc != ERR_OK)
        return rc;
    rc = st_writer_meta(w, "format", "pt", 2, err); /* transformers wants to see it */
    if (rc == ERR_OK)
        rc = write_parts(a, w, false, err);
    if (rc == ERR_OK)
        rc = st_writer_begin(w, err);
    if (rc == ERR_OK)
        rc = write_parts(a, w, true, err);
    if (rc == ERR_OK)
        return st_writer_commit(w, err);
    st_writer_abort(w);
    return rc;
}

/* --- the form for computing ------------------------------------------------------------------ */

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

static size_t table_bytes(const struct arch *arch)
{
    return pad64((size_t)arch->L * MOD_COUNT * sizeof(struct lora_module));
}

/* A multiple of 64, so that mem_footprint() of it is the footprint of what is asked for. */
static size_t block_bytes(const struct arch *arch, const struct adapter_src *src)
{
    size_t n = pad64(sizeof(struct adapter)) + table_bytes(arch);
    for (size_t i = 0; i < src->nmodules; i++)
        n += gain_bytes(&src->modules[i]) + a_bytes(&src->modules[i]) + b_bytes(&src->modules[i]);
    return n;
}

size_t adapter_build_bytes(const struct arch *arch, const struct adapter_src *src)
{
    return mem_footprint(block_bytes(arch, src));
}

static int check_shapes(const struct arch *arch, const struct adapter_src *src, struct err *err)
{
    int64_t last = -1;
    for (size_t i = 0; i < src->nmodules; i++) {
        const struct adapter_src_module *m = &src->modules[i];
        int64_t at = (int64_t)m->layer * MOD_COUNT + (int)m->module;
        if (m->layer < 0 || m->layer >= arch->L || (int)m->module < 0 || m->module >= MOD_COUNT ||
            m->in != arch_in(arch, m->module) || m->out != arch_out(arch, m->module))
            return err_set(err, ERR_INVALID,
                           "the adapter's layer %s, %d to %d, is not in this base (%s with %d "
                           "layers of width %d)",
                           m->path, m->in, m->out, arch->family, arch->L, arch->D);
        if (at <= last)
            return err_set(err, ERR_INVALID, "the adapter has %s twice or out of order", m->path);
        if (m->rank < 0 || m->rank > ADAPTER_MAX_RANK)
            return err_set(err, ERR_INVALID, "%s has rank %d, at most %d are computed", m->path,
                           m->rank, ADAPTER_MAX_RANK);
        if (m->dtype != DT_F32 && m->dtype != DT_F16 && m->dtype != DT_BF16)
            return err_set(err, ERR_INVALID, "%s has a type that is not F32, F16 or BF16", m->path);
        last = at;
    }
    return ERR_OK;
}

/* [rows][cols] to [cols][rows], in squares that stay in the cache. */
static void transpose(const void *from, void *to, size_t rows, size_t cols, size_t size)
{
    enum { SQUARE = 32 };
    const char *f = from;
    char *t = to;
    for (size_t r0 = 0; r0 < rows; r0 += SQUARE)
        for (size_t c0 = 0; c0 < cols; c0 += SQUARE)
            for (size_t r = r0; r < rows && r < r0 + SQUARE; r++)
                for (size_t c = c0; c < cols && c < c0 + SQUARE; c++) {
                    if (size == 2)
                        memcpy(t + (c * rows + r) * 2, f + (r * cols + c) * 2, 2);
                    else
                        memcpy(t + (c * rows + r) * 4, f + (r * cols + c) * 4, 4);
                }
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

static void build_module(const struct adapter_src_module *m, struct lora_module *ret, char **p)
{
    size_t k = (size_t)m->rank, one = dtype_size(m->dtype);
    float *gain = (float *)(void *)*p;
    *p += gain_bytes(m);
    for (size_t j = 0; j < k; j++)
        gain[j] = (float)(m->scaling * (m->E != NULL ? (double)element(m->E, m->dtype, j) : 1.0));
    void *A = *p;
    *p += a_bytes(m);
    memcpy(A, m->A, k * (size_t)m->in * one);
    void *Bt = *p;
    *p += b_bytes(m);
    transpose(m->B, Bt, (size_t)m->out, k, one);
    *ret = (struct lora_module){ m->rank, m->in, m->out, m->dtype, A, Bt, gain };
}

int adapter_build(const struct arch *arch, const struct adapter_src *src, int64_t version_id,
                  struct adapter **ret, struct err *err)
{
    int rc = check_shapes(arch, src, err);
    if (rc != ERR_OK)
        return rc;
    size_t block = block_bytes(arch, src);
    char *p = mem_alloc(block);
    if (p == NULL)
        return err_nomem(err);
    struct adapter *a = (struct adapter *)(void *)p;
    p += pad64(sizeof *a);
    struct lora_module *table = (struct lora_module *)(void *)p;
    p += table_bytes(arch);
    memcpy(a->hash, src->hash, sizeof a->hash);
    a->version_id = version_id;
    a->L = arch->L;
    a->bytes = mem_footprint(block);
    a->modules = table;
    a->own = a;
    for (size_t i = 0; i < src->nmodules; i++) {
        const struct adapter_src_module *m = &src->modules[i];
        if (m->rank == 0) /* the table is zero already */
            continue;
        build_module(m, &table[m->layer * MOD_COUNT + (int)m->module], &p);
        if (m->rank > a->rank_max)
            a->rank_max = m->rank;
    }
    *ret = a;
    return ERR_OK;
}

void adapter_free(struct adapter *a)
{
    if (a != NULL)
        mem_free(a->own, a->bytes);
}

/* --- sets --------------------------------------------------------------------------------------
 */

/* Does item i come after item j in canonical order? */
static bool comes_after(const struct lora_set *s, int i, int j)
{
    int c = memcmp(s->item[i].adapter->hash, s->item[j].adapter->hash, 32);
    return c != 0 ? c > 0 : s->item[i].weight > s->item[j].weight;
}

void lora_set_sort(struct lora_set *s)
{
    for (int i = 1; i < s->n; i++) /* a handful: insertion sort */
        for (int j = i; j > 0 && comes_after(s, j - 1, j); j--) {
            struct lora_item swap = s->item[j];
            s->item[j] = s->item[j - 1];
            s->item[j - 1] = swap;
        }
    int n = 0;
    for (int i = 0; i < s->n; i++) {
        if (n > 0 && memcmp(s->item[n - 1].adapter->hash, s->item[i].adapter->hash, 32) == 0)
            s->item[n - 1].weight += s->item[i].weight;
        else
            s->item[n++] = s->item[i];
    }
    s->n = n;
}

bool lora_set_equal(const struct lora_set *a, const struct lora_set *b)
{
    if (a->n != b->n)
        return false;
    for (int i = 0; i < a->n; i++)
        if (f32_bits(a->item[i].weight) != f32_bits(b->item[i].weight) ||
            memcmp(a->item[i].adapter->hash, b->item[i].adapter->hash, 32) != 0)
            return false;
    return true;
}

void lora_set_seed(const struct lora_set *s, int64_t tenant, const uint8_t base_hash[32],
                   uint8_t ret[32])
{
    struct sha256 h;
    sha256_init(&h);
    hash_number(&h, (uint64_t)tenant, 8);
    sha256_add(&h, base_hash, 32);
    hash_number(&h, (uint32_t)s->n, 4);
    for (int i = 0; i < s->n; i++) {
        sha256_add(&h, s->item[i].adapter->hash, 32);
        hash_number(&h, f32_bits(s->item[i].weight), 4);
    }
    sha256_end(&h, ret);
}
