/* bench_parts.h - what `lorad bench` measures, one file each. */
#ifndef SERVER_BENCH_PARTS_H
#define SERVER_BENCH_PARTS_H

#include "server/bench.h"

extern const struct bench_part bench_memory; /* bench_memory.c */

/* --- shared between parts ---------------------------------------------------------------------- */
/* Streaming read of memory on huge pages by all threads of the pool, in GB/s: what decoding is bound
 * by.  The buffer is larger than the caches. */
struct bench_reader {
    struct compute *compute;
    const struct bench *b;
    void *data;
    size_t bytes;
    bool small_pages; /* a buffer of 4 KiB pages instead */
    bool one_thread;
};
int bench_reader_open(struct bench *b, bool small_pages, bool one_thread, struct bench_reader *ret,
                      struct err *err);
void bench_reader_close(struct bench_reader *r);
/* The series of that reader. */
struct bench_series bench_reader_series(struct bench_reader *r);

#endif
