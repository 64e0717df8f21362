/* support_mem.c - see support_mem.h. */
#include "tests/support_mem.h"

#include "engine/mem.h"

#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

size_t support_resident(void *p, size_t bytes)
{
    const size_t page = (size_t)sysconf(_SC_PAGESIZE), n = bytes / page;
    unsigned char *there = malloc(n + 1);
    size_t found = 0;
    if (there == NULL || mincore(p, n * page, there) != 0) {
        perror("mincore");
        abort();
    }
    for (size_t i = 0; i < n; i++)
        found += there[i] & 1;
    free(there);
    return found;
}

bool support_wait_resident(void *p, size_t bytes)
{
    const size_t page = (size_t)sysconf(_SC_PAGESIZE);
    for (int i = 0; i < 6000; i++) {
        if (support_resident(p, bytes) == bytes / page)
            return true;
        usleep(10000);
    }
    return false;
}

bool support_can_populate(void)
{
    void *p = mem_alloc(MEM_HUGE_PAGE);
    mem_populate(p, MEM_HUGE_PAGE);
    const bool can = support_resident(p, MEM_HUGE_PAGE) > 0;
    mem_free(p, MEM_HUGE_PAGE);
    if (!can)
        printf("SKIPPED: this kernel has no MADV_POPULATE_WRITE\n");
    return can;
}
