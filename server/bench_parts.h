/* bench_parts.h - what `lorad bench` measures, one file each. */
#ifndef SERVER_BENCH_PARTS_H
#define SERVER_BENCH_PARTS_H

#include "engine/forward.h"
#include "server/bench.h"

extern const struct bench_part bench_memory; /* bench_memory.c */
extern const struct bench_part bench_kernels; /* bench_kernels.c */
extern const struct bench_part bench_attn;   /* bench_attn.c */
extern const struct bench_part bench_decode; /* bench_decode.c */
extern const struct bench_part bench_prompt; /* bench_decode.c */
extern const struct bench_part bench_mixed;  /* bench_mixed.c */
extern const struct bench_part bench_train;  /* bench_train.c */
extern const struct bench_part bench_quality; /* bench_quality.c */
extern const struct bench_part bench_tokenizer; /* bench_tokenizer.c */
extern const struct bench_part bench_load;   /* bench_load.c */
extern const struct bench_part bench_http;   /* bench_http.c */
extern const struct bench_part bench_cold;   /* bench_cold.c */
extern const struct bench_part bench_registry; /* bench_registry.c */
extern const struct bench_part bench_rotation; /* bench_rotation.c */

/* --- shared between parts ---------------------------------------------------------------------- */
/* Streaming read of memory by all threads of the pool, in GB/s: what decoding is bound by. */
struct bench_region {
    const void *at;
    size_t bytes;
};
struct bench_reader {
    struct compute *compute;
    const struct bench *b;
    struct bench_region *regions; /* [n] */
    int n;
    size_t bytes;     /* of all */
    void *data;       /* a buffer of its own, or NULL */
    bool small_pages; /* it has 4 KiB pages */
    bool one_thread;
};
/* A buffer on huge pages (or not), larger than the caches. */
int bench_reader_open(struct bench *b, bool small_pages, bool one_thread, struct bench_reader *ret,
                      struct err *err);
/* The codes of a base's linear layers and head, where they lie: on a virtual machine one buffer is read
 * at 35 GB/s and another at 55, as the host has placed them. */
int bench_reader_of_base(struct bench *b, const struct base *base, struct bench_reader *ret, struct err *err);
void bench_reader_close(struct bench_reader *r);
/* The series of that reader. */
struct bench_series bench_reader_series(struct bench_reader *r);

/* The multiply-add instructions that a precision's kernels use, in registers alone, by all threads, in
 * GOP/s (a multiply and an add are two): bench_peak.c.  No such series for scalar code: false. */
struct bench_peak {
    const struct bench *b;
    struct compute *compute;
    enum precision precision;
};
bool bench_peak_series(struct bench *b, enum precision p, struct bench_peak *peak, struct bench_series *ret);

/* A synthetic base with sequences that hold BENCH_CONTEXT positions of small numbers each, and a
 * workspace (bench_model.c).  A step can be run again and again: it is never committed. */
enum { BENCH_CONTEXT = 128, BENCH_BATCH_MAX = 32, BENCH_PROMPT_MAX = 512 };
struct bench_model {
    struct bench *b;
    const struct synthetic_shape *shape;
    struct compute compute; /* the workspace computes with this: set its precision before a step */
    struct base *base;
    struct kv_cache *kv;
    struct kv_seq seqs[BENCH_BATCH_MAX], fresh; /* the last is empty: for prompts */
    struct forward *forward;
    size_t read_bytes;      /* that a step reads of the base, whatever the batch */
    size_t kv_bytes;        /* and of a sequence */
};
size_t bench_model_bytes(const struct synthetic_shape *s); /* for bench_room() */
int bench_model_open(struct bench *b, const char *shape, struct bench_model *ret, struct err *err);
void bench_model_close(struct bench_model *m);
/* One token of each of the first `batch` sequences; sets [batch], NULL: no adapters. */
void bench_model_step(struct bench_model *m, enum precision p, int batch, const struct lora_set *sets);
/* A prompt of n tokens, logits of the last. */
void bench_model_prompt(struct bench_model *m, enum precision p, int n);

#endif
