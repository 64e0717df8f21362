/* export_gguf.c - an adapter as a GGUF file of llama.cpp, and the table of families.
 *
 * Format: "GGUF", version 3, counts of tensors and of metadata, the metadata, a record for each
 * tensor (name, dimensions with the fastest first, type, offset), then the data on 32-byte
 * boundaries; all numbers little-endian.  An adapter is general.type "adapter" with adapter.type
 * "lora" and adapter.lora.alpha; for a weight W of the base there are W.lora_a = A [rank][in] and
 * W.lora_b = B [out][rank].  llama.cpp adds alpha / rank * B A, with the rank read from the tensor,
 * and takes an alpha of 0 for "no scaling", so 0 is never written.
 *
 * The file appears under its name when it is whole. */
#include "engine/delta.h"
#include "engine/export.h"
#include "engine/util.h"

#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static const struct export_family families[] = {
    { "llama", "llama", true },
    { "mistral", "llama", true },
    { "qwen2", "qwen2", false },
    { "qwen3", "qwen3", false },
};

int export_family_find(const struct arch *arch, const struct export_family **ret, struct err *err)
{
    for (size_t i = 0; i < sizeof families / sizeof families[0]; i++)
        if (strcmp(families[i].model_type, arch->family) == 0) {
            *ret = &families[i];
            return ERR_OK;
        }
    return err_set(err, ERR_INVALID,
                   "merging, and adapters in GGUF, are not possible for a base of the family %s: its "
                   "weights lie in files in another way than those of llama, mistral, qwen2 and qwen3",
                   arch->family);
}

/* --- writing --------------------------------------------------------------------------------------- */

enum { GGUF_VERSION = 3, GGUF_ALIGN = 32, GGUF_U32 = 4, GGUF_F32 = 6, GGUF_STRING = 8 };

struct out {
    FILE *f;
    uint64_t at;
};

/* Errors stay in the stream until close. */
static void put(struct out *o, const void *data, size_t len)
{
    fwrite(data, 1, len, o->f);
    o->at += len;
}

static void put_number(struct out *o, uint64_t v, size_t bytes)
{
    uint8_t le[8];
    for (size_t i = 0; i < bytes; i++)
        le[i] = (uint8_t)(v >> 8 * i);
    put(o, le, bytes);
}

static void put_f32(struct out *o, float v) { put_number(o, f32_bits(v), 4); }

static void put_string(struct out *o, const char *s)
{
    put_number(o, strlen(s), 8);
    put(o, s, strlen(s));
}

static void put_key(struct out *o, const char *key, uint32_t type)
{
    put_string(o, key);
    put_number(o, type, 4);
}

static void put_text(struct out *o, const char *key, const char *value)
{
    put_key(o, key, GGUF_STRING);
    put_string(o, value);
}

static void put_pad(struct out *o)
{
    static const char zero[GGUF_ALIGN];
    put(o, zero, (GGUF_ALIGN - o->at % GGUF_ALIGN) % GGUF_ALIGN);
}

static uint64_t padded(uint64_t n) { return (n + GGUF_ALIGN - 1) / GGUF_ALIGN * GGUF_ALIGN; }

/* --- the adapter ------------------------------------------------------------------------------------- */

static const char *const names[MOD_COUNT] = {
    [MOD_Q] = "attn_q",       [MOD_K] = "attn_k",   [MOD_V] = "attn_v",       [MOD_O] = "attn_output",
    [MOD_GATE] = "ffn_gate",  [MOD_UP] = "ffn_up",  [MOD_DOWN] = "ffn_down",
};

const char *export_gguf_name(int module)
{
    return module >= 0 && module < MOD_COUNT ? names[module] : NULL;
}

struct writing {
    struct out o;
    const struct arch *arch;
    const struct export_family *family;
    const struct adapter_src *a;
    float alpha;
};

static void put_record(struct writing *w, const struct adapter_src_module *m, char which,
                       uint64_t fast, uint64_t slow, uint64_t *offset)
{
    char name[96];
    snprintf(name, sizeof name, "blk.%d.%s.weight.lora_%c", m->layer, names[m->module], which);
    put_string(&w->o, name);
    put_number(&w->o, 2, 4);
    put_number(&w->o, fast, 8);
    put_number(&w->o, slow, 8);
    put_number(&w->o, 0, 4); /* F32 */
    put_number(&w->o, *offset, 8);
    *offset += padded(fast * slow * sizeof(float));
}

/* Which row of the Hugging Face matrix is row `o` of GGUF's? */
static size_t source_row(const struct writing *w, const struct adapter_src_module *m, size_t o)
{
    if (!w->family->permuted || (m->module != MOD_Q && m->module != MOD_K))
        return o;
    const size_t hd = (size_t)w->arch->hd, head = o / hd, i = o % hd;
    return head * hd + i % 2 * (hd / 2) + i / 2;
}

/* What B must be multiplied by, so that alpha / rank does the rest. */
static double factor_of(const struct writing *w, const struct adapter_src_module *m)
{
    const double have = (double)w->alpha / m->rank;
    return have == m->scaling ? 1 : m->scaling / have;
}

static int put_data(struct writing *w, const struct adapter_src_module *m, struct err *err)
{
    const size_t k = (size_t)m->rank;
    const double factor = factor_of(w, m);
    for (size_t i = 0; i < k * (size_t)m->in; i++)
        put_f32(&w->o, delta_element(m->A, m->dtype, i));
    put_pad(&w->o);
    for (size_t o = 0; o < (size_t)m->out; o++)
        for (size_t j = 0; j < k; j++) {
            const float b = export_b(m, source_row(w, m, o), j, factor);
            if (!isfinite(b))
                return err_set(err, ERR_INVALID, "%s: B with its scaling does not fit F32", m->path);
            put_f32(&w->o, b);
        }
    put_pad(&w->o);
    return ERR_OK;
}

static int put_all(struct writing *w, struct err *err)
{
    const struct adapter_src *a = w->a;
    uint64_t n = 0, offset = 0;
    int rc = ERR_OK;
    for (size_t i = 0; i < a->nmodules; i++)
        n += a->modules[i].rank > 0 ? 2 : 0;
    put(&w->o, "GGUF", 4);
    put_number(&w->o, GGUF_VERSION, 4);
    put_number(&w->o, n, 8);
    put_number(&w->o, 5, 8);
    put_text(&w->o, "general.architecture", w->family->gguf_arch);
    put_text(&w->o, "general.type", "adapter");
    put_text(&w->o, "adapter.type", "lora");
    put_key(&w->o, "adapter.lora.alpha", GGUF_F32);
    put_f32(&w->o, w->alpha);
    put_key(&w->o, "general.quantization_version", GGUF_U32);
    put_number(&w->o, 2, 4);
    for (size_t i = 0; i < a->nmodules; i++) {
        const struct adapter_src_module *m = &a->modules[i];
        if (m->rank == 0)
            continue;
        put_record(w, m, 'a', (uint64_t)m->in, (uint64_t)m->rank, &offset);
        put_record(w, m, 'b', (uint64_t)m->rank, (uint64_t)m->out, &offset);
    }
    put_pad(&w->o);
    for (size_t i = 0; rc == ERR_OK && i < a->nmodules; i++)
        if (a->modules[i].rank > 0)
            rc = put_data(w, &a->modules[i], err);
    return rc;
}

static int check_modules(const struct arch *arch, const struct adapter_src *a, struct err *err)
{
    for (size_t i = 0; i < a->nmodules; i++) {
        const struct adapter_src_module *m = &a->modules[i];
        if (export_gguf_name((int)m->module) == NULL ||
            m->layer >= arch->L || m->in != arch_in(arch, m->module) ||
            m->out != arch_out(arch, m->module))
            return err_set(err, ERR_INVALID, "the adapter's layer %s, %d to %d, is not in this base",
                           m->path, m->in, m->out);
    }
    return ERR_OK;
}

/* To a name beside it, synced, then renamed. */
static int write_file(struct writing *w, const char *tmp, const char *path, struct err *err)
{
    const int fd = open(tmp, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
    if (fd < 0)
        return err_set(err, ERR_IO, "%s: %s", tmp, strerror(errno));
    w->o.f = fdopen(fd, "wb");
    if (w->o.f == NULL) {
        close(fd);
        unlink(tmp);
        return err_nomem(err);
    }
    int rc = put_all(w, err);
    const bool bad = ferror(w->o.f) || fflush(w->o.f) != 0 || fsync(fd) != 0;
    if (rc == ERR_OK && bad)
        rc = err_set(err, ERR_IO, "%s: %s", tmp, strerror(errno));
    if (fclose(w->o.f) != 0 && rc == ERR_OK)
        rc = err_set(err, ERR_IO, "%s: %s", tmp, strerror(errno));
    if (rc == ERR_OK && rename(tmp, path) != 0)
        rc = err_set(err, ERR_IO, "%s: %s", path, strerror(errno));
    if (rc != ERR_OK)
        unlink(tmp);
    return rc;
}

int export_gguf(const struct arch *arch, const struct adapter_src *a, const char *path,
                struct err *err)
{
    struct writing w = { .arch = arch, .a = a };
    int rc = delta_check(a, err);
    if (rc == ERR_OK && a->rank_max == 0)
        rc = err_set(err, ERR_INVALID, "every module of the adapter was pruned to rank 0: there is "
                     "nothing to write");
    if (rc == ERR_OK)
        rc = export_family_find(arch, &w.family, err);
    if (rc == ERR_OK)
        rc = check_modules(arch, a, err);
    if (rc != ERR_OK)
        return rc;
    const float alpha = (float)a->alpha;
    w.alpha = isnormal(alpha) ? alpha : 1.0f;
    char *tmp = NULL;
    if (asprintf(&tmp, "%s.%ld.tmp", path, (long)getpid()) < 0)
        return err_nomem(err);
    rc = write_file(&w, tmp, path, err);
    free(tmp);
    return rc;
}
