/* mem_ahead.h - memory that is used from its front to its back, made ready ahead of who writes to it.
 *
 * The kernel finds and clears a page when it is first written to.  That took 4 ms for a huge page on a
 * virtual machine, whose host has to find it too, and where one position of the KV cache touches a dozen at
 * once, every sequence of the step waits for all of them.  So a thread of its own has the next pages backed while the former are being filled.  It is a matter of speed alone:
 * whoever is faster than the thread waits for the kernel as if there were none. */
#ifndef ENGINE_MEM_AHEAD_H
#define ENGINE_MEM_AHEAD_H

#include <stddef.h>

struct mem_ahead;

/* For memory of mem_alloc(bytes).  NULL if it is too small for huge pages, or no thread is to be had:
 * mem_ahead_reach() then does nothing. */
struct mem_ahead *mem_ahead_start(void *p, size_t bytes);
/* The first `bytes` will soon be written to.  One thread at a time may call; it neither locks nor waits. */
void mem_ahead_reach(struct mem_ahead *a, size_t bytes);
/* Joins the thread; before mem_free().  NULL is fine. */
void mem_ahead_end(struct mem_ahead *a);

#endif
