/* support_synthetic.h - bases of any size with random 4-bit weights, made in memory: for benchmarks.
 *
 * Codes are uniform random nibbles, so the numbers mean nothing, but every byte is read and every
 * multiplication done as in a real model; scales are such that activations stay in range. */
#ifndef TESTS_SUPPORT_SYNTHETIC_H
#define TESTS_SUPPORT_SYNTHETIC_H

#include "engine/base.h"

struct synthetic_shape {
    const char *name;                   /* "1.1b" */
    int L, D, H, G, hd, F, V;
};
/* "135m" (SmolLM2), "0.5b" (Qwen2.5), "1.1b" (TinyLlama), "7b", "13b" (Llama 2); NULL if it is none. */
const struct synthetic_shape *synthetic_find(const char *name);
/* A Llama of that shape: NF4 with fp16 scales, bf16 embedding, 8-bit head.  Aborts without memory. */
struct base *synthetic_base(const struct synthetic_shape *s);
void synthetic_free(struct base *b);

#endif
