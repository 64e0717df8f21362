/* peft_gguf.c - an adapter from a GGUF file, as convert_lora_to_gguf.py of llama.cpp and our own export
 * write it.
 *
 * Format: general.type "adapter", adapter.type "lora", adapter.lora.alpha; for a weight W of the base
 * the tensors W.lora_a [rank, in] and W.lora_b [out, rank].  llama.cpp adds alpha / rank * B A, with
 * the rank that the tensor has, and plain B A if alpha is 0 or missing.  The embedding's lora_a is
 * transposed: [vocabulary, rank].  Rows of B of q and k are in another order where those of the
 * weight are (export.h), and are put back.
 *
 * There is no config, so one is made, with the modules by their whole paths.  Factors of one type in
 * F32, F16 or BF16 keep it and every byte; Q8_0, and factors of two types, become F32, which is
 * exact. */
#include "engine/delta.h"
#include "engine/export.h"
#include "engine/gguf.h"
#include "engine/peft_int.h"

#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

struct pair {
    const struct gguf_tensor *a, *b;
};

struct reading {
    const struct arch *arch;
    const struct export_family *family;
    struct gguf *g;
    struct pair *pairs; /* [L][MOD_SLOTS] */
    double alpha;
    struct err *err;
};

static const char *show(struct gguf_text t, char ret[128])
{
    char s[160];
    snprintf(s, sizeof s, "%.*s", (int)(t.len < sizeof s - 1 ? t.len : sizeof s - 1), t.s);
    return peft_show(s, ret);
}

static bool is(struct gguf_text t, const char *s)
{
    return t.s != NULL && t.len == strlen(s) && memcmp(t.s, s, t.len) == 0;
}

static bool begins(struct gguf_text t, const char *s)
{
    return t.len >= strlen(s) && memcmp(t.s, s, strlen(s)) == 0;
}

/* --- metadata -------------------------------------------------------------------------------------- */

static int want_text(struct reading *r, const char *key, const char *want)
{
    struct gguf_text have;
    char shown[128];
    int rc = gguf_string(r->g, key, &have, r->err);
    if (rc != ERR_OK || is(have, want))
        return rc;
    return peft_refuse(r->err, "GGUF key %s must be \"%s\" in an adapter for this base (%s), not \"%s\"",
                       key, want, r->arch->family, have.s != NULL ? show(have, shown) : "");
}

/* What is said in general, and what only a client would do, changes nothing here. */
static int check_keys(const struct reading *r)
{
    static const char *const known[] = { "adapter.type", "adapter.lora.alpha",
                                         "adapter.lora.task_name" };
    for (size_t i = 0; i < r->g->nkeys; i++) {
        const struct gguf_text name = r->g->keys[i].name;
        bool ok = begins(name, "general.");
        char shown[128];
        for (size_t k = 0; k < sizeof known / sizeof known[0]; k++)
            ok = ok || is(name, known[k]);
        if (!ok)
            return peft_refuse(r->err, "GGUF key %s: this server does not know it in an adapter",
                               show(name, shown));
    }
    return ERR_OK;
}

static int read_keys(struct reading *r)
{
    int rc = want_text(r, "general.type", "adapter");
    if (rc == ERR_OK)
        rc = want_text(r, "adapter.type", "lora");
    if (rc == ERR_OK)
        rc = want_text(r, "general.architecture", r->family->gguf_arch);
    if (rc == ERR_OK)
        rc = gguf_double(r->g, "adapter.lora.alpha", &r->alpha, NULL, r->err);
    return rc == ERR_OK ? check_keys(r) : rc;
}

/* --- tensors ------------------------------------------------------------------------------------------ */

/* "blk.3.attn_q", or what is outside the blocks. */
static bool parse_weight(const struct reading *r, const char *name, int *ret_layer, int *ret_module)
{
    *ret_layer = 0;
    *ret_module = strcmp(name, "output") == 0 ? MOD_HEAD : MOD_EMBED;
    if (*ret_module == MOD_HEAD || strcmp(name, "token_embd") == 0)
        return true;
    if (strncmp(name, "blk.", 4) != 0)
        return false;
    const char *p = name + 4;
    const size_t digits = strspn(p, "0123456789");
    if (digits < 1 || digits > 6 || (p[0] == '0' && digits > 1) || p[digits] != '.')
        return false;
    *ret_layer = (int)strtol(p, NULL, 10);
    for (int m = 0; m < MOD_COUNT && *ret_layer < r->arch->L; m++)
        if (export_gguf_name(m) != NULL && arch_has_module(r->arch, (enum module)m) &&
            strcmp(p + digits + 1, export_gguf_name(m)) == 0) {
            *ret_module = m;
            return true;
        }
    return false;
}

static int take_tensor(struct reading *r, const struct gguf_tensor *t)
{
    static const char ends[2][16] = { ".weight.lora_a", ".weight.lora_b" };
    const size_t k = strlen(ends[0]);
    char name[64], shown[128];
    int layer, module, part = 0;
    show(t->name, shown);
    while (part < 2 && (t->name.len <= k || memcmp(t->name.s + t->name.len - k, ends[part], k) != 0))
        part++;
    if (part == 2)
        return peft_refuse(r->err, "tensor %s: its name does not end in .weight.lora_a or "
                           ".weight.lora_b, as those of a LoRA in GGUF do", shown);
    snprintf(name, sizeof name, "%.*s",
             (int)(t->name.len - k < sizeof name ? t->name.len - k : sizeof name - 1), t->name.s);
    if (t->name.len - k >= sizeof name || !parse_weight(r, name, &layer, &module))
        return peft_refuse(r->err, "tensor %s: this base (%s with %d layers) has no such linear layer",
                           shown, r->arch->family, r->arch->L);
    if (module >= MOD_COUNT && r->arch->tied)
        return peft_refuse(r->err, "tensor %s: the head of this base is its embedding, and llama.cpp "
                           "has no change of one of them alone", shown);
    struct pair *p = &r->pairs[(size_t)layer * MOD_SLOTS + (size_t)module];
    *(part == 0 ? &p->a : &p->b) = t; /* names are unique (gguf.c) */
    return ERR_OK;
}

static bool is_plain(const struct gguf_tensor *t, enum dtype *ret)
{
    static const enum dtype types[] = { DT_F32, DT_F16, DT_BF16 };
    static const char *const names[] = { "F32", "F16", "BF16" };
    for (size_t i = 0; i < 3; i++)
        if (strcmp(t->type->name, names[i]) == 0) {
            *ret = types[i];
            return true;
        }
    return false;
}

static int check_shape(const struct reading *r, const struct gguf_tensor *t, int64_t rows, int64_t cols)
{
    char shown[128];
    enum dtype plain;
    if (!is_plain(t, &plain) && strcmp(t->type->name, "Q8_0") != 0)
        return peft_refuse(r->err, "tensor %s has type %s, which is not F32, F16, BF16 or Q8_0",
                           show(t->name, shown), t->type->name);
    if (t->ndim == 2 && t->dims[0] == rows && t->dims[1] == cols)
        return ERR_OK;
    return peft_refuse(r->err, "tensor %s has %d dimensions, %lld by %lld, not %lld by %lld as its "
                       "rank and this base say", show(t->name, shown), t->ndim, (long long)t->dims[0],
                       (long long)t->dims[1], (long long)rows, (long long)cols);
}

/* Path, rank, scaling and type of a module, and that its tensors fit. */
static int describe(const struct reading *r, int layer, int module, const struct pair *p,
                    struct adapter_src_module *m)
{
    char path[256], shown[128];
    adapter_module_path(r->arch, layer, module, path, sizeof path);
    if (p->a == NULL || p->b == NULL)
        return peft_refuse(r->err, "tensor %s has no %s beside it",
                           show((p->a != NULL ? p->a : p->b)->name, shown),
                           p->a != NULL ? "lora_b" : "lora_a");
    *m = (struct adapter_src_module){ .layer = layer, .module = (enum module)module,
                                      .in = adapter_module_in(r->arch, module),
                                      .out = adapter_module_out(r->arch, module),
                                      .path = strdup(path) };
    if (m->path == NULL)
        return err_nomem(r->err);
    const int64_t rank = p->b->ndim == 2 ? p->b->dims[1] : 0;
    if (rank < 1 || rank > ADAPTER_MAX_RANK)
        return peft_refuse(r->err, "tensor %s: its rank must be 1 to %d", show(p->b->name, shown),
                           ADAPTER_MAX_RANK);
    m->rank = m->init_rank = (int)rank;
    m->alpha = r->alpha != 0 ? r->alpha : m->rank;
    m->scaling = m->alpha / m->rank;
    enum dtype a = DT_F32, b = DT_F32;
    const bool kept = is_plain(p->a, &a) && is_plain(p->b, &b) && a == b;
    m->dtype = kept ? a : DT_F32;
    int rc = module == MOD_EMBED ? check_shape(r, p->a, m->in, rank) : check_shape(r, p->a, rank, m->in);
    return rc == ERR_OK ? check_shape(r, p->b, m->out, rank) : rc;
}

/* --- values --------------------------------------------------------------------------------------- */

/* Element i as it will be: in `one` bytes. */
static bool copy_element(const struct gguf_tensor *t, size_t i, size_t one, char *to)
{
    enum dtype plain = DT_F32;
    float v, block[GGML_MAX_BLOCK];
    if (is_plain(t, &plain)) {
        v = delta_element(t->data, plain, i);
    } else {
        t->type->f32(t->data + i / t->type->block * t->type->bytes, block);
        v = block[i % t->type->block];
    }
    if (one == 2) /* its own type: the very bytes */
        memcpy(to, t->data + 2 * i, 2);
    else
        memcpy(to, &v, 4);
    return isfinite(v);
}

/* Row of the tensor for row o of Hugging Face's. */
static size_t row_in_file(const struct reading *r, int module, size_t o)
{
    if (!r->family->permuted || (module != MOD_Q && module != MOD_K))
        return o;
    const size_t hd = (size_t)r->arch->hd, in = o % hd;
    return o - in + 2 * (in % (hd / 2)) + in / (hd / 2);
}

/* [rows][cols] of ours; `flip`: the tensor is [cols][rows]. */
static int copy_tensor(const struct reading *r, const struct gguf_tensor *t, int module, bool is_b,
                       size_t rows, size_t cols, size_t one, char *to)
{
    const bool flip = module == MOD_EMBED && !is_b;
    for (size_t o = 0; o < rows; o++) {
        const size_t row = is_b ? row_in_file(r, module, o) : o;
        for (size_t k = 0; k < cols; k++) {
            char shown[128];
            const size_t i = flip ? k * rows + o : row * cols + k;
            if (!copy_element(t, i, one, to + (o * cols + k) * one))
                return peft_refuse(r->err, "tensor %s holds a value that is not finite, at element %zu",
                                   show(t->name, shown), i);
        }
    }
    return ERR_OK;
}

static size_t pad64(size_t n) { return (n + 63) & ~(size_t)63; }

static int copy_all(const struct reading *r, struct adapter_src *a)
{
    size_t total = 0;
    for (size_t i = 0; i < a->nmodules; i++) {
        const struct adapter_src_module *m = &a->modules[i];
        const size_t row = (size_t)m->rank * dtype_size(m->dtype);
        total += pad64(row * (size_t)m->in) + pad64(row * (size_t)m->out);
    }
    char *p = a->own = aligned_alloc(64, total);
    int rc = p == NULL ? err_nomem(r->err) : ERR_OK;
    for (size_t i = 0; i < a->nmodules && rc == ERR_OK; i++) {
        struct adapter_src_module *m = &a->modules[i];
        const struct pair *pair = &r->pairs[(size_t)m->layer * MOD_SLOTS + (size_t)m->module];
        const size_t k = (size_t)m->rank, one = dtype_size(m->dtype), in = (size_t)m->in;
        m->A = p;
        rc = copy_tensor(r, pair->a, (int)m->module, false, k, in, one, p);
        p += pad64(k * in * one);
        m->B = p;
        if (rc == ERR_OK)
            rc = copy_tensor(r, pair->b, (int)m->module, true, (size_t)m->out, k, one, p);
        p += pad64(k * (size_t)m->out * one);
    }
    return rc;
}

/* --- all of it ------------------------------------------------------------------------------------- */

static int fill(struct reading *r, struct adapter_src *a)
{
    const size_t slots = (size_t)r->arch->L * MOD_SLOTS;
    size_t n = 0;
    for (size_t i = 0; i < slots; i++)
        n += r->pairs[i].a != NULL || r->pairs[i].b != NULL;
    if (n == 0)
        return peft_refuse(r->err, "the GGUF file has no tensors: it is an adapter without a change");
    a->modules = calloc(n, sizeof *a->modules);
    if (a->modules == NULL)
        return err_nomem(r->err);
    int rc = ERR_OK;
    a->rank_min = ADAPTER_MAX_RANK;
    for (size_t i = 0; i < slots && rc == ERR_OK; i++) {
        if (r->pairs[i].a == NULL && r->pairs[i].b == NULL)
            continue;
        struct adapter_src_module *m = &a->modules[a->nmodules++];
        rc = describe(r, (int)(i / MOD_SLOTS), (int)(i % MOD_SLOTS), &r->pairs[i], m);
        const uint64_t all = (uint64_t)m->rank * ((uint64_t)m->in + (uint64_t)m->out);
        a->params += all;
        a->bytes += all * dtype_size(m->dtype);
        a->rank_max = m->rank > a->rank_max ? m->rank : a->rank_max;
        a->rank_min = m->rank < a->rank_min ? m->rank : a->rank_min;
    }
    if (rc == ERR_OK)
        rc = copy_all(r, a);
    if (rc == ERR_OK)
        rc = export_lora_config(a, r->err);
    if (rc == ERR_OK)
        adapter_src_hash(a, a->hash);
    return rc;
}

int peft_gguf_parse(const struct arch *arch, const void *data, size_t len, const char *what,
                    struct adapter_src **ret, struct err *err)
{
    struct reading r = { .arch = arch, .err = err };
    struct adapter_src *a = calloc(1, sizeof *a);
    r.pairs = calloc((size_t)arch->L * MOD_SLOTS, sizeof *r.pairs);
    int rc = a != NULL && r.pairs != NULL ? export_family_find(arch, &r.family, err) : err_nomem(err);
    if (rc == ERR_OK)
        rc = gguf_open_mem(data, len, what, &r.g, err);
    if (rc == ERR_OK)
        rc = read_keys(&r);
    for (size_t i = 0; rc == ERR_OK && i < r.g->ntensors; i++)
        rc = take_tensor(&r, &r.g->tensors[i]);
    if (rc == ERR_OK) {
        a->method = METHOD_LORA;
        rc = fill(&r, a);
    }
    gguf_close(r.g);
    free(r.pairs);
    if (rc != ERR_OK) {
        adapter_src_free(a);
        return rc;
    }
    *ret = a;
    return ERR_OK;
}

static int load_file(const struct arch *arch, const char *path, int fd, size_t len,
                     struct adapter_src **ret, struct err *err)
{
    void *map = len > 0 ? mmap(NULL, len, PROT_READ, MAP_PRIVATE, fd, 0) : MAP_FAILED;
    if (len == 0 || (map != MAP_FAILED && !gguf_is(map, len))) {
        if (map != MAP_FAILED)
            munmap(map, len);
        return err_set(err, ERR_INVALID, "%s is neither an adapter's folder nor a GGUF file", path);
    }
    if (map == MAP_FAILED)
        return err_set(err, ERR_IO, "%s: %s", path, strerror(errno));
    int rc = peft_gguf_parse(arch, map, len, path, ret, err);
    munmap(map, len);
    return rc;
}

int adapter_load(const struct arch *arch, const char *path, struct adapter_src **ret, struct err *err)
{
    struct stat sb;
    const int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return err_set(err, errno == ENOENT ? ERR_NOT_FOUND : ERR_IO, "%s: %s", path, strerror(errno));
    const bool file = fstat(fd, &sb) == 0 && S_ISREG(sb.st_mode);
    int rc = file ? load_file(arch, path, fd, (size_t)sb.st_size, ret, err)
                  : peft_load_dir(arch, path, ret, err);
    close(fd);
    return rc;
}
