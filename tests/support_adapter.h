/* support_adapter.h - adapters in PEFT's format for tests, made in memory.
 *
 * Failures abort: a test without its adapter is worth nothing. */
#ifndef TESTS_SUPPORT_ADAPTER_H
#define TESTS_SUPPORT_ADAPTER_H

#include "engine/adapter.h"

/* One tensor; the values depend on its name and position only, in (-1, 1). */
struct support_tensor {
    char name[128];
    const char *dtype; /* "F32", "F16", "BF16", or another with 4 bytes an element */
    int64_t rows, cols; /* cols -1: one dimension */
    const char *bad;    /* "nan", "inf": the last value is that; NULL: none */
    bool conv;          /* a third dimension of 1, as a convolution's weight has */
};

/* A safetensors file; free() it. */
char *support_tensors_file(const struct support_tensor *t, size_t n, size_t *ret_len);

/* A llama of 2 layers: D 8, H 2, G 1, hd 4, F 12, V 16. */
void support_small_arch(struct arch *ret);

/* Every module of the arch that `path_end` ends (NULL: all) with rank `rank` in LoRA's names (or
 * AdaLoRA's); returns how many tensors were written to t. */
size_t support_lora_tensors(const struct arch *arch, const char *path_end, int rank, bool adalora,
                            const char *dtype, struct support_tensor *t, size_t cap);

/* peft_parse() of a config's text and tensors. */
int support_parse(const struct arch *arch, const char *config, const struct support_tensor *t,
                  size_t n, struct adapter_src **ret, struct err *err);

#endif
