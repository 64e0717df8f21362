/* bench_targets.c - the numbers that lorad is held to, by the row that shows each. */
#include "server/bench.h"

#include <string.h>

/* Ratios to other programs need figures of those programs, measured in the same run by who has
 * them; they are rows of their own, made when --peer gives the figure. */
const struct bench_target bench_targets[] = {
    { "decode.1.1b.fast.b1.read", "decode", NULL, true, false, 0.90,
      "decode, batch 1, 1.1B: share of the streaming-read bandwidth" },
    { "decode.1.1b.exact.b1.read", "decode", NULL, true, false, 0.90, "the same, exact" },
    { "decode.1.1b.llama.cpp", "decode", "decode.1.1b.fast.b1", true, false, 1.5,
      "decode, batch 1, 1.1B: times llama.cpp Q4_0" },
    { "decode.1.1b.fastest", "decode", "decode.1.1b.fast.b1", true, false, 1.2,
      "decode, batch 1, 1.1B: times the fastest peer" },
    { "prompt.1.1b.fast.fastest", "prompt", "prompt.1.1b.fast.t512", true, false, 1.8,
      "prompt of 512, 1.1B, fast: times the fastest peer" },
    { "prompt.1.1b.exact.fastest", "prompt", "prompt.1.1b.exact.t512", true, false, 1.1,
      "prompt of 512, 1.1B, exact: times the fastest peer" },
    { "prompt.1.1b.fast.llama.cpp", "prompt", "prompt.1.1b.fast.t512", true, false, 3.5,
      "prompt of 512, 1.1B, fast: times llama.cpp" },
    { "mixed.1.1b.fast.r16.a16", "mixed", NULL, true, false, 0.85,
      "16 rows, 16 adapters of rank 16: share of the batch without" },
    { "mixed.1.1b.exact.r16.a16", "mixed", NULL, true, false, 0.85, "the same, exact" },
    { "http.135m.c8.llama.cpp", "http", "http.135m.c8", true, false, 10,
      "8 streaming clients, each with its adapter, 135M: times llama.cpp's server" },
    { "http.135m.c16.llama.cpp", "http", "http.135m.c16", true, false, 10, "16 clients, 135M" },
    { "http.1.1b.c8.llama.cpp", "http", "http.1.1b.c8", true, false, 7, "8 clients, 1.1B" },
    { "http.1.1b.c16.llama.cpp", "http", "http.1.1b.c16", true, false, 7, "16 clients, 1.1B" },
    { "http.135m.c8.steady", "http", NULL, false, true, 1.3,
      "8 clients, 135M: p95 over p50 of the time between tokens" },
    { "http.135m.c16.steady", "http", NULL, false, true, 1.3, "16 clients, 135M" },
    { "http.1.1b.c8.steady", "http", NULL, false, true, 1.3, "8 clients, 1.1B" },
    { "http.1.1b.c16.steady", "http", NULL, false, true, 1.3, "16 clients, 1.1B" },
    { "rotation.distinct.a2000", "rotation", NULL, true, false, 0.90,
      "requests/s with 2,000 adapters in rotation: share of those with 5; distinct" },
    { "rotation.uniform.a2000", "rotation", NULL, true, false, 0.90, "the same, uniform" },
    { "rotation.skewed.a2000", "rotation", NULL, true, false, 0.90, "the same, skewed" },
    { "rotation.identical.a2000", "rotation", NULL, true, false, 0.90, "the same, identical" },
    { "registry.start", "registry", NULL, false, true, 1000, "10,000 adapters in a file: start, ms" },
    { "registry.lookup", "registry", NULL, false, true, 1, "look-up of a name, ms" },
    { "registry.memory", "registry", NULL, true, true, 1, "memory over the cache's budget" },
    { "cold.1.1b.latency", "cold", NULL, false, true, 25,
      "a cold adapter (rank 16, 1.1B): added latency, ms" },
    { "cold.1.1b.busy.latency", "cold", NULL, false, true, 25, "the same beside running sequences" },
    { "cold.1.1b.stall", "cold", NULL, true, true, 2,
      "longest step of the others meanwhile, over the median one" },
    { "load.1.1b", "load", NULL, false, true, 1, "base load, 1.1B, from the page cache, s" },
    { "train.1.1b.pytorch", "train", "train.1.1b.exact", true, false, 2,
      "fine-tuning step, 1.1B: times PyTorch on the CPU" },
    { "train.1.1b.memory.pytorch", "train", "train.1.1b.memory", true, true, 0.25,
      "fine-tuning, 1.1B: share of PyTorch's memory" },
    { "serving.job", "http", NULL, true, false, 0.85,
      "serving while a job trains: share of serving alone" },
    { "quality.exact", "quality", NULL, false, true, 0.1,
      "perplexity of exact, distance from fp32 on the same NF4 weights, %" },
    { "quality.fast", "quality", NULL, false, true, 1, "the same, fast" },
    { NULL, NULL, NULL, false, false, 0, NULL },
};

const struct bench_target *bench_target_find(const char *id)
{
    for (const struct bench_target *t = bench_targets; t->id != NULL; t++)
        if (strcmp(t->id, id) == 0)
            return t;
    return NULL;
}

bool bench_target_met(const struct bench_target *t, double x)
{
    return t->at_most ? x <= t->bound : x >= t->bound;
}
