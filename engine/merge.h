/* merge.h - an adapter added into the weights of a Hugging Face folder: W += scaling * B diag(E) A.
 *
 * The sum is computed in fp32 and rounded once, to the type of the result. */
#ifndef ENGINE_MERGE_H
#define ENGINE_MERGE_H

#include "engine/adapter.h"

struct merge_opts {
    const char *dtype;       /* "bf16", "f16", "f32": of every tensor of numbers; NULL: as it is */
    const char *source_hash; /* 64 digits that the folder's hash must have (a base file's
                              * lorad.source), or NULL */
    /* before each tensor and at the end; true: stop, which is ERR_CANCELLED; may be NULL */
    bool (*progress)(void *ud, const char *tensor, size_t done, size_t total);
    void *ud;
};

/* The architecture that a Hugging Face folder describes. */
int merge_read_arch(const char *dir, struct arch *ret, struct err *err);

/* Writes the folder `out`, which must not exist: the same weight files with the same tensors, their
 * index, config and tokenizer files.  One tensor's rows are in memory at a time.  The folder gets
 * its name when it is whole.  Refused by name: what delta_check() refuses, weights that are 4-bit
 * already, a module that the folder has no weight for, values that do not fit the type. */
int adapter_merge(const struct adapter_src *a, const char *dir, const char *out,
                  const struct merge_opts *opts, struct err *err);

#endif
