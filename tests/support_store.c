/* support_store.c - made-up adapters for tests of the store. */
#include "tests/support_store.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

const char support_base_1[] = "1111111111111111111111111111111111111111111111111111111111111111";
const char support_base_2[] = "2222222222222222222222222222222222222222222222222222222222222222";

static void *need(void *p)
{
    if (p == NULL) {
        fprintf(stderr, "out of memory in a test\n");
        abort();
    }
    return p;
}

/* Any bits will do: the store does not look at values. */
static uint8_t next_byte(uint64_t *state)
{
    *state = *state * 6364136223846793005u + 1442695040888963407u;
    return (uint8_t)(*state >> 56);
}

static size_t module_bytes(const struct adapter_src_module *m)
{
    return (size_t)m->rank * 4 * (size_t)(m->in + m->out + 1);
}

/* Sizes, tensors and hash, once the modules are described. */
static void finish(struct adapter_src *a, uint64_t seed)
{
    const bool e = a->method == METHOD_ADALORA;
    size_t total = 0;
    a->rank_min = ADAPTER_MAX_RANK;
    for (size_t i = 0; i < a->nmodules; i++) {
        const struct adapter_src_module *m = &a->modules[i];
        total += module_bytes(m);
        a->params += (uint64_t)m->rank * (uint64_t)(m->in + m->out + e);
        a->rank_min = m->rank < a->rank_min ? m->rank : a->rank_min;
        a->rank_max = m->rank > a->rank_max ? m->rank : a->rank_max;
    }
    a->bytes = a->params * 4;
    uint8_t *p = a->own = need(malloc(total + 1));
    for (size_t i = 0; i < total; i++)
        p[i] = next_byte(&seed);
    for (size_t i = 0; i < a->nmodules; i++) {
        struct adapter_src_module *m = &a->modules[i];
        m->A = p;
        m->B = p + (size_t)m->rank * 4 * (size_t)m->in;
        m->E = e ? p + (size_t)m->rank * 4 * (size_t)(m->in + m->out) : NULL;
        p += module_bytes(m);
    }
    adapter_src_hash(a, a->hash);
}

static struct adapter_src *begin(enum adapter_method method, int layers, const char *config)
{
    struct adapter_src *a = need(calloc(1, sizeof *a));
    a->method = method;
    a->nmodules = (size_t)layers * 2;
    a->modules = need(calloc(a->nmodules, sizeof *a->modules));
    a->config = need(strdup(config));
    a->config_len = strlen(config);
    a->base_name = need(strdup("somebody/some-base"));
    return a;
}

static void describe(struct adapter_src *a, size_t i, int rank, int init_rank, int width)
{
    char path[64];
    struct adapter_src_module *m = &a->modules[i];
    m->layer = (int)(i / 2);
    m->module = i % 2 ? MOD_V : MOD_Q;
    snprintf(path, sizeof path, "model.layers.%d.self_attn.%s_proj", m->layer, i % 2 ? "v" : "q");
    m->path = need(strdup(path));
    m->rank = rank;
    m->init_rank = init_rank;
    m->alpha = a->alpha;
    m->in = m->out = width;
    m->dtype = DT_F32;
}

struct adapter_src *support_adapter(uint64_t seed, int layers, int rank, int width)
{
    struct adapter_src *a = begin(METHOD_LORA, layers, "{\"peft_type\": \"LORA\", \"note\": \"\xc3\xa9\"}");
    a->alpha = 16;
    for (size_t i = 0; i < a->nmodules; i++) {
        describe(a, i, rank, rank, width);
        a->modules[i].scaling = 16.0 / rank;
    }
    finish(a, seed);
    return a;
}

struct adapter_src *support_adalora(uint64_t seed, int layers, int width)
{
    struct adapter_src *a = begin(METHOD_ADALORA, layers, "{\"peft_type\": \"ADALORA\"}");
    a->alpha = 32;
    a->init_r = 4;
    a->target_r = 2;
    a->tinit = 5;
    a->tfinal = 7;
    a->deltaT = 3;
    a->total_step = 100;
    a->beta1 = 0.85;
    a->beta2 = 0.9;
    a->orth_reg_weight = 0.5;
    for (size_t i = 0; i < a->nmodules; i++) {
        const int rank = i % 2 ? 4 : (int)(i / 2) % 5;
        describe(a, i, rank, 4, width);
        struct adapter_src_module *m = &a->modules[i];
        m->scaling = 32 / (4 + 1e-5);
        m->importance = need(calloc(4, sizeof *m->importance));
        for (int k = 0; k < 4; k++)
            m->importance[k] = 1.0f / (float)(3 * k + 7);
        m->mask = need(calloc(4, 1));
        for (int k = 0; k < rank; k++)
            m->mask[3 - k] = 1;
    }
    finish(a, seed);
    return a;
}

static void same_module(const struct adapter_src *s, const struct adapter_src_module *a,
                        const struct adapter_src_module *b, bool tensors)
{
    assert_int_equal(a->layer, b->layer);
    assert_int_equal(a->module, b->module);
    assert_string_equal(a->path, b->path);
    assert_int_equal(a->rank, b->rank);
    assert_int_equal(a->init_rank, b->init_rank);
    assert_true(a->alpha == b->alpha);
    assert_true(a->scaling == b->scaling);
    assert_int_equal(a->in, b->in);
    assert_int_equal(a->out, b->out);
    assert_int_equal(a->dtype, b->dtype);
    assert_int_equal(a->mask != NULL, b->mask != NULL);
    if (a->importance != NULL && b->importance != NULL) /* older schemas had none */
        assert_memory_equal(a->importance, b->importance,
                            (size_t)a->init_rank * sizeof *a->importance);
    if (a->mask != NULL)
        assert_memory_equal(a->mask, b->mask, (size_t)a->init_rank);
    if (!tensors) {
        assert_null(b->A);
        assert_null(b->B);
        assert_null(b->E);
        return;
    }
    const size_t row = (size_t)a->rank * dtype_size(a->dtype);
    if (row == 0)
        return;
    assert_memory_equal(a->A, b->A, row * (size_t)a->in);
    assert_memory_equal(a->B, b->B, row * (size_t)a->out);
    assert_int_equal(b->E != NULL, s->method == METHOD_ADALORA);
    if (b->E != NULL)
        assert_memory_equal(a->E, b->E, row);
}

void support_same_adapter(const struct adapter_src *a, const struct adapter_src *b, bool tensors)
{
    assert_int_equal(a->method, b->method);
    assert_int_equal(a->nmodules, b->nmodules);
    assert_int_equal(a->config_len, b->config_len);
    assert_string_equal(a->config, b->config);
    assert_int_equal(a->base_name != NULL, b->base_name != NULL);
    if (a->base_name != NULL)
        assert_string_equal(a->base_name, b->base_name);
    assert_int_equal(a->rank_max, b->rank_max);
    assert_int_equal(a->rank_min, b->rank_min);
    assert_true(a->alpha == b->alpha);
    assert_int_equal(a->params, b->params);
    assert_int_equal(a->bytes, b->bytes);
    assert_memory_equal(a->hash, b->hash, 32);
    assert_int_equal(a->init_r, b->init_r);
    assert_int_equal(a->target_r, b->target_r);
    assert_int_equal(a->tinit, b->tinit);
    assert_int_equal(a->tfinal, b->tfinal);
    assert_int_equal(a->deltaT, b->deltaT);
    assert_int_equal(a->total_step, b->total_step);
    assert_true(a->beta1 == b->beta1);
    assert_true(a->beta2 == b->beta2);
    assert_true(a->orth_reg_weight == b->orth_reg_weight);
    for (size_t i = 0; i < a->nmodules; i++)
        same_module(a, &a->modules[i], &b->modules[i], tensors);
}
