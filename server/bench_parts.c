/* bench_parts.c - the parts of `lorad bench`, in the order they run. */
#include "server/bench_parts.h"

const struct bench_part *const bench_parts[] = {
    &bench_memory,
    &bench_kernels,
    &bench_attn,
    &bench_decode,
    &bench_prompt,
    &bench_mixed,
    &bench_train,
    &bench_load,
    &bench_quality,
    &bench_tokenizer,
    &bench_http,
    &bench_cold,
    &bench_registry,
    &bench_rotation,
    NULL,
};
