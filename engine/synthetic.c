/* synthetic.c - see synthetic.h. */
#include "engine/synthetic.h"

#include "engine/mem.h"
#include "engine/nf4.h"
#include "engine/num.h"
#include "engine/util.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const struct synthetic_shape shapes[] = {
    { "tiny", 2, 128, 4, 2, 32, 256, 512 },
    { "135m", 30, 576, 9, 3, 64, 1536, 49152 },
    { "0.5b", 24, 896, 14, 2, 64, 4864, 151936 },
    { "1.1b", 22, 2048, 32, 4, 64, 5632, 32000 },
    { "7b", 32, 4096, 32, 32, 128, 11008, 32000 },
    { "13b", 40, 5120, 40, 40, 128, 13824, 32000 },
};
enum { NSHAPES = sizeof shapes / sizeof shapes[0] };

const struct synthetic_shape *synthetic_nth(int i) { return i >= 0 && i < NSHAPES ? &shapes[i] : NULL; }

const struct synthetic_shape *synthetic_find(const char *name)
{
    for (int i = 0; i < NSHAPES; i++)
        if (strcmp(shapes[i].name, name) == 0)
            return &shapes[i];
    return NULL;
}

/* --- memory ------------------------------------------------------------------------------------- */
struct piece {
    void *p;
    size_t bytes;
};

/* A base in the making. */
struct maker {
    struct base *b;
    struct piece *pieces; /* = b->own; all memory of weights, ended by one of NULL */
    size_t n, cap;
    uint64_t seed;
    bool failed;          /* memory was out; what comes after is not made */
};

/* Pieces of a block: codes and scales of seven matrices, two norms. */
enum { PIECES_LAYER = 16, PIECES_REST = 8 };

static void *take(struct maker *m, size_t bytes)
{
    void *p = m->failed || m->n + 1 >= m->cap ? NULL : mem_alloc(bytes);
    if (p == NULL) {
        m->failed = true;
        return NULL;
    }
    m->pieces[m->n++] = (struct piece){ p, bytes };
    m->b->bytes += bytes;
    return p;
}

void synthetic_free(struct base *b)
{
    if (b == NULL)
        return;
    for (struct piece *p = b->own; p != NULL && p->p != NULL; p++)
        mem_free(p->p, p->bytes);
    free(b->own);
    free(b->layers);
    free(b->name);
    free(b);
}

/* --- weights ------------------------------------------------------------------------------------ */
static uint64_t next(struct maker *m)
{
    m->seed ^= m->seed << 13;
    m->seed ^= m->seed >> 7;
    m->seed ^= m->seed << 17;
    return m->seed;
}

static uint8_t *codes(struct maker *m, size_t bytes)
{
    uint8_t *p = take(m, bytes);
    for (size_t i = 0; p != NULL && i + 8 <= bytes; i += 8) {
        const uint64_t w = next(m);
        memcpy(p + i, &w, sizeof w);
    }
    return p;
}

/* The mean square of NF4's values is about 0.27, that of the 8-bit codes 1/3: rows of K such weights
 * keep about the size of x. */
static const uint16_t *scales(struct maker *m, size_t n, int K)
{
    uint16_t *s = take(m, n * sizeof *s);
    for (size_t i = 0; s != NULL && i < n; i++)
        s[i] = f32_to_f16(1.0f / __builtin_sqrtf((float)K));
    return s;
}

static struct matrix nf4(struct maker *m, int N, int K)
{
    const uint8_t *c = codes(m, p16_bytes((size_t)N, (size_t)K));
    return (struct matrix){ .type = MAT_NF4_P16, .N = N, .K = K, .codes = c,
                            .scales16 = scales(m, p16_scales((size_t)N, (size_t)K), K) };
}

static struct matrix q8(struct maker *m, int N, int K)
{
    const size_t bytes = q8_bytes((size_t)N, (size_t)K);
    uint8_t *c = codes(m, bytes);
    for (size_t i = 0; c != NULL && i < bytes; i++)
        c[i] = c[i] == 0 ? 1 : c[i]; /* -128 is no code */
    return (struct matrix){ .type = MAT_Q8_P16, .N = N, .K = K, .codes = c,
                            .scales16 = scales(m, bytes / 64, K) };
}

static struct matrix bf16(struct maker *m, int N, int K)
{
    const size_t n = (size_t)N * (size_t)K;
    uint16_t *w = take(m, n * sizeof *w);
    for (size_t i = 0; w != NULL && i < n; i++)
        w[i] = (uint16_t)(0x3c00 | (next(m) & 0x80ff)); /* around +-0.01 */
    return (struct matrix){ .type = MAT_BF16, .N = N, .K = K, .codes = w };
}

static struct base_norm ones(struct maker *m, int n)
{
    float *w = take(m, (size_t)n * sizeof *w);
    for (int i = 0; w != NULL && i < n; i++)
        w[i] = 1;
    return (struct base_norm){ .w = w };
}

/* --- the base ----------------------------------------------------------------------------------- */
static int arch_of(const struct synthetic_shape *s, struct arch *ret, struct err *err)
{
    char config[512];
    snprintf(config, sizeof config,
             "{\"model_type\":\"llama\",\"num_hidden_layers\":%d,\"hidden_size\":%d,"
             "\"num_attention_heads\":%d,\"num_key_value_heads\":%d,\"head_dim\":%d,"
             "\"intermediate_size\":%d,\"vocab_size\":%d,\"max_position_embeddings\":4096,"
             "\"rms_norm_eps\":1e-5,\"rope_theta\":10000.0,\"tie_word_embeddings\":false}",
             s->L, s->D, s->H, s->G, s->hd, s->F, s->V);
    return arch_from_config(config, NULL, ret, err);
}

size_t synthetic_bytes(const struct synthetic_shape *s)
{
    struct arch a;
    if (arch_of(s, &a, NULL) != ERR_OK)
        return 0;
    const size_t V = (size_t)s->V, D = (size_t)s->D;
    size_t all = V * D * 2 + q8_bytes(V, D) + q8_bytes(V, D) / 32;
    for (int m = MOD_Q; m <= MOD_DOWN; m++) {
        const size_t N = (size_t)arch_out(&a, (enum module)m), K = (size_t)arch_in(&a, (enum module)m);
        all += (size_t)s->L * (p16_bytes(N, K) + 2 * p16_scales(N, K));
    }
    return all + (size_t)(2 * s->L + 1) * D * sizeof(float);
}

int synthetic_base(const struct synthetic_shape *s, struct base **ret, struct err *err)
{
    struct base *b = calloc(1, sizeof *b);
    struct maker m = { .b = b, .cap = (size_t)s->L * PIECES_LAYER + PIECES_REST, .seed = 1 };
    if (b == NULL)
        return err_nomem(err);
    int rc = arch_of(s, &b->arch, err);
    b->name = strdup(s->name);
    sha256_of(s->name, strlen(s->name), b->hash);
    hex32(b->hash, b->hash_hex);
    b->own = m.pieces = calloc(m.cap, sizeof *m.pieces);
    b->layers = calloc((size_t)s->L, sizeof *b->layers);
    if (rc != ERR_OK || b->name == NULL || b->own == NULL || b->layers == NULL) {
        synthetic_free(b);
        return rc != ERR_OK ? rc : err_nomem(err);
    }
    b->embed = bf16(&m, s->V, s->D);
    b->head = q8(&m, s->V, s->D);
    b->norm_final = ones(&m, s->D);
    for (int l = 0; l < s->L; l++) {
        b->layers[l].norm[NORM_ATTN] = ones(&m, s->D);
        b->layers[l].norm[NORM_MLP] = ones(&m, s->D);
        for (int k = MOD_Q; k <= MOD_DOWN; k++)
            b->layers[l].mod[k].w = nf4(&m, arch_out(&b->arch, (enum module)k),
                                        arch_in(&b->arch, (enum module)k));
    }
    if (m.failed) {
        synthetic_free(b);
        return err_set(err, ERR_NOMEM, "there is no memory for a base of shape %s", s->name);
    }
    *ret = b;
    return ERR_OK;
}
