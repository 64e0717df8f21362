/* support_lora.c - random adapters for tests. */
#include "tests/support_lora.h"

#include "engine/mem.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void need(bool ok, const char *what)
{
    if (ok)
        return;
    fprintf(stderr, "support_lora: %s\n", what);
    abort();
}

static uint64_t next(uint64_t *state) /* splitmix64 */
{
    uint64_t z = *state += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

/* n values of about `size`, evenly spread, in the given type. */
static void draw(uint64_t *state, enum dtype type, size_t n, double size, void *ret)
{
    for (size_t i = 0; i < n; i++) {
        float x = (float)(((double)(next(state) >> 11) * 0x1p-53 - 0.5) * 2 * size * sqrt(3));
        if (type == DT_F32)
            ((float *)ret)[i] = x;
        else
            ((uint16_t *)ret)[i] = type == DT_F16 ? f32_to_f16(x) : f32_to_bf16(x);
    }
}

static size_t pad(size_t bytes) { return (bytes + 63) / 64 * 64; }

static void set_scaling(struct adapter_src_module *m, enum adapter_method method)
{
    m->alpha = 2.0 * m->init_rank;
    m->scaling = method == METHOD_LORA     ? m->alpha / m->init_rank
                 : method == METHOD_RSLORA ? m->alpha / sqrt(m->init_rank)
                                           : m->alpha / (m->init_rank + 1e-5);
}

struct adapter_src *support_lora_src(const struct arch *arch, enum adapter_method method,
                                     int rank, float size, uint64_t seed)
{
    static const enum dtype types[] = { DT_F32, DT_F16, DT_BF16 };
    const enum dtype type = types[seed % 3];
    size_t nmodules = 0;
    uint64_t state = seed * 1000003 + (uint64_t)method;

    struct adapter_src *a = calloc(1, sizeof *a);
    need(a != NULL, "out of memory");
    a->modules = calloc((size_t)arch->L * MOD_COUNT, sizeof *a->modules);
    need(a->modules != NULL, "out of memory");
    a->method = method;
    a->rank_min = rank;
    a->alpha = 2.0 * rank;
    a->config = strdup("{}");
    a->config_len = 2;

    size_t total = 0;
    for (int i = 0; i < arch->L * MOD_COUNT; i++) {
        struct adapter_src_module *m = &a->modules[nmodules];
        char path[128];
        if (!arch_has_module(arch, (enum module)(i % MOD_COUNT)))
            continue;
        nmodules++;
        m->layer = i / MOD_COUNT;
        m->module = (enum module)(i % MOD_COUNT);
        arch_module_path(arch, m->layer, m->module, path, sizeof path);
        m->path = strdup(path);
        m->init_rank = rank;
        m->rank = method == METHOD_ADALORA ? (int)(next(&state) % (unsigned)(rank + 1)) : rank;
        m->in = arch_in(arch, m->module);
        m->out = arch_out(arch, m->module);
        m->dtype = type;
        set_scaling(m, method);
        total += pad((size_t)m->rank * (size_t)m->in * 4) +
                 pad((size_t)m->rank * (size_t)m->out * 4) + pad((size_t)m->rank * 4);
        a->rank_max = m->rank > a->rank_max ? m->rank : a->rank_max;
        a->rank_min = m->rank < a->rank_min ? m->rank : a->rank_min;
    }
    a->nmodules = nmodules;
    char *p = a->own = malloc(total + 64);
    need(p != NULL, "out of memory");
    for (size_t i = 0; i < nmodules; i++) {
        struct adapter_src_module *m = &a->modules[i];
        const size_t r = (size_t)m->rank, in = (size_t)m->in, out = (size_t)m->out;
        if (r == 0)
            continue;
        draw(&state, type, r * in, 1 / sqrt((double)in), p);
        m->A = p;
        p += pad(r * in * 4);
        draw(&state, type, out * r, (double)size / m->scaling / sqrt((double)r), p);
        m->B = p;
        p += pad(out * r * 4);
        if (method == METHOD_ADALORA) {
            draw(&state, type, r, 1, p);
            m->E = p;
            p += pad(r * 4);
        }
        a->params += r * (in + out) + (m->E != NULL ? r : 0);
    }
    a->bytes = a->params * dtype_size(type);
    adapter_src_hash(a, a->hash);
    return a;
}

struct adapter *support_spare(size_t bytes)
{
    struct adapter *a = mem_alloc(bytes);
    need(a != NULL, "out of memory");
    memset(a, 0xa5, bytes);
    a->bytes = bytes;
    a->own = a;
    return a;
}

struct adapter *support_lora(const struct arch *arch, enum adapter_method method, int rank,
                             float size, uint64_t seed)
{
    struct adapter_src *src = support_lora_src(arch, method, rank, size, seed);
    struct adapter *a;
    struct err err = { .code = ERR_OK };
    if (adapter_build(arch, src, (int64_t)seed, NULL, &a, &err) != ERR_OK)
        need(false, err.msg);
    adapter_src_free(src);
    return a;
}
