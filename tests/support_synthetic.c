/* support_synthetic.c - see support_synthetic.h. */
#include "tests/support_synthetic.h"

#include "engine/linear_int.h"
#include "engine/mem.h"
#include "engine/nf4.h"
#include "engine/num.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const struct synthetic_shape shapes[] = {
    { "135m", 30, 576, 9, 3, 64, 1536, 49152 },
    { "0.5b", 24, 896, 14, 2, 64, 4864, 151936 },
    { "1.1b", 22, 2048, 32, 4, 64, 5632, 32000 },
    { "7b", 32, 4096, 32, 32, 128, 11008, 32000 },
    { "13b", 40, 5120, 40, 40, 128, 13824, 32000 },
};

const struct synthetic_shape *synthetic_find(const char *name)
{
    for (size_t i = 0; i < sizeof shapes / sizeof shapes[0]; i++)
        if (strcmp(shapes[i].name, name) == 0)
            return &shapes[i];
    return NULL;
}

struct pieces { void *p[8192]; size_t bytes[8192]; size_t n; };

static void *take(struct base *b, size_t bytes)
{
    struct pieces *own = b->own;
    void *p = mem_alloc(bytes);
    if (p == NULL || own->n == sizeof own->p / sizeof own->p[0]) {
        fprintf(stderr, "there is no memory for a synthetic base\n");
        abort();
    }
    own->p[own->n] = p;
    own->bytes[own->n++] = bytes;
    b->bytes += bytes;
    return p;
}

static uint64_t seed = 1;

static uint64_t next(void)
{
    seed ^= seed << 13;
    seed ^= seed >> 7;
    seed ^= seed << 17;
    return seed;
}

static void fill(void *p, size_t bytes)
{
    uint64_t *w = p;
    for (size_t i = 0; i < bytes / 8; i++)
        w[i] = next();
}

static const uint16_t *scales(struct base *b, size_t n, float v)
{
    uint16_t *s = take(b, n * sizeof *s);
    for (size_t i = 0; i < n; i++)
        s[i] = f32_to_f16(v);
    return s;
}

/* The mean square of NF4's values is about 0.27: rows of K such weights keep the size of x. */
static struct matrix nf4(struct base *b, int N, int K)
{
    const size_t panels = ((size_t)N + PANEL - 1) / PANEL, blocks = (size_t)K / BLOCK;
    const size_t bytes = panels * PANEL * (size_t)K / 2;
    void *codes = take(b, bytes);
    fill(codes, bytes);
    return (struct matrix){ .type = MAT_NF4_P16, .N = N, .K = K, .codes = codes,
                            .scales16 = scales(b, panels * blocks * PANEL,
                                               1.0f / __builtin_sqrtf((float)K)) };
}

static struct matrix q8(struct base *b, int N, int K)
{
    const size_t bytes = q8_bytes((size_t)N, (size_t)K);
    uint8_t *codes = take(b, bytes);
    fill(codes, bytes);
    for (size_t i = 0; i < bytes; i++)
        codes[i] = codes[i] == 0 ? 1 : codes[i];
    return (struct matrix){ .type = MAT_Q8_P16, .N = N, .K = K, .codes = codes,
                            .scales16 = scales(b, bytes / BLOCK,
                                               1.0f / __builtin_sqrtf((float)K)) };
}

static struct matrix bf16(struct base *b, int N, int K)
{
    const size_t n = (size_t)N * (size_t)K;
    uint16_t *w = take(b, n * sizeof *w);
    for (size_t i = 0; i < n; i++)
        w[i] = (uint16_t)(0x3c00 | (next() & 0x80ff)); /* around +-0.01 */
    return (struct matrix){ .type = MAT_BF16, .N = N, .K = K, .codes = w };
}

static struct base_norm ones(struct base *b, int n)
{
    float *w = take(b, (size_t)n * sizeof *w);
    for (int i = 0; i < n; i++)
        w[i] = 1;
    return (struct base_norm){ .w = w };
}

struct base *synthetic_base(const struct synthetic_shape *s)
{
    struct base *b = calloc(1, sizeof *b);
    char config[512];
    if (b == NULL || (b->own = calloc(1, sizeof(struct pieces))) == NULL)
        abort();
    snprintf(config, sizeof config,
             "{\"model_type\":\"llama\",\"num_hidden_layers\":%d,\"hidden_size\":%d,"
             "\"num_attention_heads\":%d,\"num_key_value_heads\":%d,\"head_dim\":%d,"
             "\"intermediate_size\":%d,\"vocab_size\":%d,\"max_position_embeddings\":4096,"
             "\"rms_norm_eps\":1e-5,\"rope_theta\":10000.0,\"tie_word_embeddings\":false}",
             s->L, s->D, s->H, s->G, s->hd, s->F, s->V);
    if (arch_from_config(config, NULL, &b->arch, NULL) != ERR_OK)
        abort();
    b->name = strdup(s->name);
    b->embed = bf16(b, s->V, s->D);
    b->head = q8(b, s->V, s->D);
    b->norm_final = ones(b, s->D);
    b->layers = calloc((size_t)s->L, sizeof *b->layers);
    if (b->name == NULL || b->layers == NULL)
        abort();
    for (int l = 0; l < s->L; l++) {
        b->layers[l].norm[NORM_ATTN] = ones(b, s->D);
        b->layers[l].norm[NORM_MLP] = ones(b, s->D);
        for (int m = MOD_Q; m <= MOD_DOWN; m++)
            b->layers[l].mod[m].w = nf4(b, arch_out(&b->arch, (enum module)m),
                                        arch_in(&b->arch, (enum module)m));
    }
    return b;
}

void synthetic_free(struct base *b)
{
    struct pieces *own = b->own;
    for (size_t i = 0; i < own->n; i++)
        mem_free(own->p[i], own->bytes[i]);
    free(own);
    free(b->layers);
    free(b->name);
    free(b);
}
