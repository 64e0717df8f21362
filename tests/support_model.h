/* support_model.h - random models for tests: a Hugging Face folder of a given family and shapes.
 *
 * The same settings give the same bytes everywhere: each tensor is drawn from a generator seeded
 * with its name and `seed`.  Failures print a sentence and abort: a test without its model is
 * worth nothing. */
#ifndef TESTS_SUPPORT_MODEL_H
#define TESTS_SUPPORT_MODEL_H

#include "engine/base.h"
#include "engine/num.h"

#include <stdbool.h>
#include <stdint.h>

struct support_model {
    const char *family;   /* "llama", "mistral", "qwen2", "qwen3" */
    int D, H, G, hd, F, L, V;
    int max_positions;
    int window;           /* mistral and qwen: sliding window, 0: none */
    bool tied, attention_bias, mlp_bias;
    bool old_spelling;    /* config.json as transformers 4 wrote it */
    bool no_tokenizer;
    enum dtype dtype;     /* DT_F32, DT_F16 or DT_BF16: type of the weights */
    uint64_t seed;
};

/* D 128, H 4, G 2, hd 32, F 256, L 3, V 320, 512 positions, F32 weights, untied. */
struct support_model support_model_default(const char *family);

/* Writes config.json, model.safetensors, generation_config.json and, unless no_tokenizer,
 * tokenizer.json (byte-level BPE: 0 <pad>, 1 <s>, 2 </s>, then 256 bytes, then merges up to V;
 * V >= 259; <s> is put before a text) and tokenizer_config.json with a small chat template.
 * `dir` exists. */
void support_model_write(const struct support_model *m, const char *dir);

/* The values of one tensor as support_model_write() draws them, before rounding to `dtype`. */
void support_model_values(const struct support_model *m, const char *name, float scale,
                          float offset, size_t n, float *ret);

/* Write, import (type "nf4" or "f32"; head and embed NULL: defaults) and load. */
struct base *support_base(const struct support_model *m, const char *type, const char *head,
                          enum precision precision);
/* The same for a model of any family, whose config.json is this text: random F32 weights, no
 * tokenizer. */
struct base *support_base_config(const char *config, const char *type, enum precision precision);
/* Only the files. */
void support_config_write(const char *config, uint64_t seed, const char *dir);
/* Import and load an existing Hugging Face folder. */
struct base *support_base_dir(const char *dir, const char *type, const char *head,
                              enum precision precision);

/* A new folder under TMPDIR or /tmp; support_remove() takes it away with all it contains. */
void support_tmpdir(char ret[64]);
void support_remove(const char *dir);
/* Write a file, or abort. */
void support_write_file(const char *dir, const char *name, const void *data, size_t len);
/* Path under LORAD_SHARED (default ../shared), or NULL after saying loudly that the test is
 * skipped.  Static memory of the calling thread. */
const char *support_shared(const char *relative);

#endif
