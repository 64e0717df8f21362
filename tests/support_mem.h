/* support_mem.h - what of a mapping is in memory. */
#ifndef TESTS_SUPPORT_MEM_H
#define TESTS_SUPPORT_MEM_H

#include <stdbool.h>
#include <stddef.h>

/* Whole pages of [p, p + bytes) that are resident (mincore()), p at the beginning of one. */
size_t support_resident(void *p, size_t bytes);
/* Waits until all are; false: not after a minute. */
bool support_wait_resident(void *p, size_t bytes);
/* Waits a while for any to be; false: some is. */
bool support_stays_absent(void *p, size_t bytes);
/* Can this kernel back memory before it is written to, and tell what is? */
bool support_can_populate(void);

#endif
