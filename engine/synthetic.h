/* synthetic.h - bases of any size with random 4-bit weights, made in memory: for benchmarks.
 *
 * Codes are uniform random nibbles, so the numbers mean nothing, but every byte is read and every
 * multiplication done as in a real model; scales are such that activations stay in range. */
#ifndef ENGINE_SYNTHETIC_H
#define ENGINE_SYNTHETIC_H

#include "engine/base.h"

struct synthetic_shape {
    const char *name;                   /* "1.1b" */
    int L, D, H, G, hd, F, V;
};
/* "tiny" (for tests), "135m" (SmolLM2), "0.5b" (Qwen2.5), "1.1b" (TinyLlama), "7b", "13b" (Llama 2); NULL
 * if it is none. */
const struct synthetic_shape *synthetic_find(const char *name);
const struct synthetic_shape *synthetic_nth(int i); /* NULL past the last */
/* Bytes of such a base in memory. */
size_t synthetic_bytes(const struct synthetic_shape *s);
/* A Llama of that shape: NF4 with fp16 scales, bf16 embedding, 8-bit head.  Its hash is made from the
 * name. */
int synthetic_base(const struct synthetic_shape *s, struct base **ret, struct err *err);
void synthetic_free(struct base *b); /* NULL is fine */
/* The base as a file that base_load() reads, named after its shape.
 * `tokenizer_json` goes into it, NULL: it has none. */
int synthetic_save(const struct base *b, const char *tokenizer_json, const char *path, struct err *err);

#endif
