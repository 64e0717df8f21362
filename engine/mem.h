/* mem.h - large memory on huge pages, and how much of it there is.
 *
 * Decoding is bound by how fast weights stream from memory, and 4 KiB pages cost a third
 * of that; so weights, adapters and the KV cache live in anonymous memory that asks for
 * huge pages.  Any thread may call. */
#ifndef ENGINE_MEM_H
#define ENGINE_MEM_H

#include "engine/err.h"

#include <stddef.h>
#include <stdint.h>

#define MEM_HUGE_PAGE ((size_t)2 << 20)

/* Zeroed memory, aligned to 64 bytes (2 MiB when large), madvised to huge pages when
 * it is at least 2 MiB.  NULL when there is none.  Free it with mem_free() and the same size. */
void *mem_alloc(size_t bytes);
void mem_free(void *p, size_t bytes); /* NULL is fine */
/* What mem_alloc(bytes) takes once every byte of it is used: rounded up to 64 bytes, or to
 * pages when large.  For budgets. */
size_t mem_footprint(size_t bytes);
/* Have the whole pages of large memory from mem_alloc() backed now and not when they are first written
 * to; what they hold stays.  A wish (Linux 5.14).  Others may use the memory meanwhile. */
void mem_populate(void *p, size_t bytes);

/* What this process may use: the smaller of physical memory and the cgroup's limit
 * (v2 memory.max up the tree, v1 memory.limit_in_bytes). */
size_t mem_limit(void);
/* The same, with /proc and /sys looked up below `root` ("" is the real one); 0 if nothing there
 * says anything.  For tests. */
size_t mem_limit_below(const char *root);
/* Resident bytes of this process now (/proc/self/statm). */
size_t mem_resident(void);

/* How one budget is divided.  All in bytes. */
struct mem_plan {
    size_t total, base, work, kv, adapters;
};

/* Divide `budget` (0: 80 % of mem_limit()) after `base` and `work` bytes are taken:
 * what is left goes to KV and adapters, a quarter of it to adapters unless `kv` or
 * `adapters` asks for a fixed size (0: not fixed).  `kv_min` is the least KV that is of
 * use (one sequence of full context).  ERR_INVALID with the arithmetic in the sentence
 * if it does not fit. */
int mem_plan(size_t budget, size_t base, size_t work, size_t kv_min, size_t kv, size_t adapters,
             struct mem_plan *ret, struct err *err);

#endif
