/* adapter.c - names, the content hash, writing back, and sets of adapters. */
#include "engine/adapter.h"

#include "engine/util.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <xxhash.h>

static const char *const method_names[] = { "lora", "rslora", "adalora", "dora" };

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

const char *adapter_extra_name(enum adapter_extra k)
{
    static const char *const names[EXTRA_KINDS] = {
        [EXTRA_MAGNITUDE] = "magnitude", [EXTRA_LORA_BIAS] = "lora_bias", [EXTRA_BIAS] = "bias",
        [EXTRA_NORM] = "norm",           [EXTRA_NORM_BIAS] = "norm_bias", [EXTRA_HEAD] = "head",
        [EXTRA_EMBED] = "embed",
        [EXTRA_EMBED_ROWS] = "embed_rows", [EXTRA_HEAD_ROWS] = "head_rows",
        [EXTRA_EMBED_IDS] = "embed_ids",   [EXTRA_HEAD_IDS] = "head_ids",
    };
    return names[k];
}

bool adapter_module_path(const struct arch *arch, int layer, int module, char *ret, size_t cap)
{
    const struct family *f = family_find(arch->family);
    ret[0] = '\0';
    if (module < MOD_COUNT)
        arch_module_path(arch, layer, (enum module)module, ret, cap);
    else if (f != NULL)
        snprintf(ret, cap, "%s", module == MOD_HEAD ? f->head : f->embed);
    return strlen(ret) + 1 < cap;
}

int adapter_module_in(const struct arch *arch, int module)
{
    return module < MOD_COUNT ? arch_in(arch, (enum module)module)
           : module == MOD_HEAD ? arch->D
                                : arch->V;
}

int adapter_module_out(const struct arch *arch, int module)
{
    return module < MOD_COUNT ? arch_out(arch, (enum module)module)
           : module == MOD_HEAD ? arch->V
                                : arch->D;
}

bool adapter_alpha_of(double scaling, int rank, double *ret)
{
    const double a = scaling * rank, all[] = { a, nextafter(a, INFINITY), nextafter(a, -INFINITY) };
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++) {
        *ret = all[i];
        if (isfinite(all[i]) && all[i] / rank == scaling)
            return true;
    }
    return false;
}

static const char *dtype_name(enum dtype t)
{
    return t == DT_F32    ? "F32"
           : t == DT_F16  ? "F16"
           : t == DT_BF16 ? "BF16"
           : t == DT_I32  ? "I32"
                          : "?";
}

void adapter_src_free(struct adapter_src *a)
{
    if (a == NULL)
        return;
    for (size_t i = 0; a->modules != NULL && i < a->nmodules; i++) {
        free(a->modules[i].path);
        free(a->modules[i].mask);
        free(a->modules[i].importance);
        free(a->modules[i].norms);
    }
    for (size_t i = 0; a->extras != NULL && i < a->nextras; i++)
        free(a->extras[i].name);
    free(a->modules);
    free(a->extras);
    free(a->config);
    free(a->base_name);
    free(a->own);
    free(a);
}

/* --- content hash ---------------------------------------------------------------------------- */

/* Where the bytes of an adapter go, in their order. */
struct sink {
    void (*add)(void *to, const void *data, size_t len);
    void *to;
};

static void put_bytes(const struct sink *s, const void *data, size_t len) { s->add(s->to, data, len); }

static void put_number(const struct sink *s, uint64_t v, size_t bytes)
{
    uint8_t le[8];
    for (size_t i = 0; i < bytes; i++)
        le[i] = (uint8_t)(v >> 8 * i);
    put_bytes(s, le, bytes);
}

static void put_name(const struct sink *s, const char *name) { put_bytes(s, name, strlen(name) + 1); }

static bool all_there(void *ud, size_t i)
{
    (void)ud;
    (void)i;
    return true;
}

/* false: wait() gave up. */
static bool put_all(const struct adapter_src *a, const struct sink *s, bool (*wait)(void *ud, size_t i),
                    void *ud)
{
    put_name(s, adapter_method_name(a->method));
    for (size_t i = 0; i < a->nmodules; i++) {
        const struct adapter_src_module *m = &a->modules[i];
        size_t k = (size_t)m->rank, one = dtype_size(m->dtype);
        uint64_t scaling;
        memcpy(&scaling, &m->scaling, sizeof scaling);
        put_name(s, m->path);
        put_number(s, (uint32_t)m->in, 4);
        put_number(s, (uint32_t)m->out, 4);
        put_number(s, (uint32_t)m->rank, 4);
        put_number(s, (uint32_t)m->init_rank, 4);
        put_number(s, scaling, 8);
        put_name(s, dtype_name(m->dtype));
        if (k == 0)
            continue;
        if (!wait(ud, i))
            return false;
        put_bytes(s, m->A, k * (size_t)m->in * one);
        put_bytes(s, m->B, k * (size_t)m->out * one);
        if (m->E != NULL)
            put_bytes(s, m->E, k * one);
    }
    if (!wait(ud, a->nmodules))
        return false;
    for (size_t i = 0; i < a->nextras; i++) {
        const struct adapter_src_extra *x = &a->extras[i];
        put_name(s, "extra");
        put_name(s, adapter_extra_name(x->kind));
        put_name(s, x->name);
        put_number(s, (uint32_t)x->rows, 4);
        put_number(s, (uint32_t)x->cols, 4);
        put_name(s, dtype_name(x->dtype));
        put_bytes(s, x->data, adapter_extra_count(x) * dtype_size(x->dtype));
    }
    return true;
}

static void to_sha256(void *to, const void *data, size_t len) { sha256_add(to, data, len); }

void adapter_src_hash(const struct adapter_src *a, uint8_t ret[32])
{
    adapter_src_hash_following(a, all_there, NULL, ret);
}

void adapter_src_hash_following(const struct adapter_src *a, bool (*wait)(void *ud, size_t i), void *ud,
                                uint8_t ret[32])
{
    struct sha256 h;
    sha256_init(&h);
    if (put_all(a, &(struct sink){ to_sha256, &h }, wait, ud))
        sha256_end(&h, ret);
}

static void to_xxh3(void *to, const void *data, size_t len) { XXH3_128bits_update(to, data, len); }

bool adapter_src_sum(const struct adapter_src *a, uint8_t ret[16])
{
    XXH3_state_t *h = XXH3_createState();
    if (h == NULL)
        return false;
    XXH3_128bits_reset(h);
    put_all(a, &(struct sink){ to_xxh3, h }, all_there, NULL);
    XXH128_canonical_t sum;
    XXH128_canonicalFromHash(&sum, XXH3_128bits_digest(h));
    memcpy(ret, sum.digest, 16);
    XXH3_freeState(h);
    return true;
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
    if ((int)m->module == MOD_EMBED) {
        ret[0] = (struct part){ "lora_embedding_A", { m->rank, m->in }, m->A };
        ret[1] = (struct part){ "lora_embedding_B", { m->out, m->rank }, m->B };
        return 2;
    }
    ret[0] = (struct part){ ada ? "lora_A" : "lora_A.weight", { m->rank, m->in }, m->A };
    ret[1] = (struct part){ ada ? "lora_B" : "lora_B.weight", { m->out, m->rank }, m->B };
    ret[2] = (struct part){ "lora_E", { m->rank, 1 }, m->E };
    return ada ? 3 : 2;
}

static size_t part_bytes(const struct adapter_src_module *m, const struct part *p)
{
    return (size_t)p->shape[0] * (size_t)p->shape[1] * dtype_size(m->dtype);
}

static int write_extras(const struct adapter_src *a, struct st_writer *w, bool data,
                        struct err *err)
{
    for (size_t i = 0; i < a->nextras; i++) {
        const struct adapter_src_extra *x = &a->extras[i];
        char name[320];
        size_t bytes = adapter_extra_count(x) * dtype_size(x->dtype);
        int64_t shape[2] = { x->rows, x->cols };
        if (adapter_extra_is_ids(x->kind)) /* in the config */
            continue;
        snprintf(name, sizeof name, "base_model.model.%s", x->name);
        int rc = data ? st_writer_data(w, x->data, bytes, err)
                      : st_writer_tensor(w, name, dtype_name(x->dtype), x->cols > 0 ? 2 : 1, shape,
                                         bytes, err);
        if (rc != ERR_OK)
            return rc;
    }
    return ERR_OK;
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
    return write_extras(a, w, data, err);
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

int lora_set_check(const struct lora_set *s, struct err *err)
{
    for (int i = 0; i < s->n; i++) {
        const struct lora_item *item = &s->item[i];
        if (item->adapter->alone == NULL || (s->n == 1 && item->weight == 1.0f))
            continue;
        if (s->n > 1)
            return err_set_slug(err, ERR_INVALID, "adapter_not_combinable", "adapters",
                                "one of these %d adapters %s: it cannot be combined with others",
                                s->n, item->adapter->alone);
        return err_set_slug(err, ERR_INVALID, "adapter_not_combinable", "adapters",
                            "the adapter %s: its weight can only be 1, not %g",
                            item->adapter->alone, (double)item->weight);
    }
    return ERR_OK;
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
    const struct sink to = { to_sha256, &h };
    sha256_init(&h);
    put_number(&to, (uint64_t)tenant, 8);
    put_bytes(&to, base_hash, 32);
    put_number(&to, (uint32_t)s->n, 4);
    for (int i = 0; i < s->n; i++) {
        put_bytes(&to, s->item[i].adapter->hash, 32);
        put_number(&to, f32_bits(s->item[i].weight), 4);
    }
    sha256_end(&h, ret);
}
