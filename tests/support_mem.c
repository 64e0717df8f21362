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

bool support_stays_absent(void *p, size_t bytes)
{
    for (int i = 0; i < 20; i++) {
        if (support_resident(p, bytes) > 0)
            return false;
        usleep(5000);
    }
    return true;
}

bool support_can_populate(void)
{
    void *p = mem_alloc(MEM_HUGE_PAGE);
    bool can = p != NULL && support_resident(p, MEM_HUGE_PAGE) == 0;
    if (can) {
        mem_populate(p, MEM_HUGE_PAGE);
        can = support_resident(p, MEM_HUGE_PAGE) == MEM_HUGE_PAGE / (size_t)sysconf(_SC_PAGESIZE);
    }
    mem_free(p, MEM_HUGE_PAGE);
    if (!can)
        printf("SKIPPED: this kernel does not back memory ahead, or does not tell\n");
    return can;
}
