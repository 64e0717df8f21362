/* mem.c - large memory on huge pages, the limits of this process, and the memory plan.
 *
 * Large blocks are mapped so that they start on a 2 MiB boundary and end on the page that holds
 * their last byte: the kernel backs every whole 2 MiB of them with one huge page, and the rest
 * with small ones, so a block takes what it needs and not up to 2 MiB more. */
#include "engine/mem.h"

#include "engine/util.h"

#include <limits.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23 /* Linux 5.14, whatever the headers know */
#endif

static size_t page_size(void)
{
    long n = sysconf(_SC_PAGESIZE);
    return n > 0 ? (size_t)n : 4096;
}

/* Up to a multiple of `unit` (a power of two); 0 when that does not fit a size_t. */
static size_t round_up(size_t n, size_t unit)
{
    return n > SIZE_MAX - (unit - 1) ? 0 : (n + unit - 1) & ~(unit - 1);
}

size_t mem_footprint(size_t bytes)
{
    if (bytes >= MEM_HUGE_PAGE)
        return round_up(bytes, page_size());
    return bytes == 0 ? 64 : round_up(bytes, 64);
}

/* Map a little more than asked for and give back what lies before the boundary and after the end.
 */
static void *map_large(size_t size)
{
    if (size > SIZE_MAX - MEM_HUGE_PAGE)
        return NULL;
    char *raw =
        mmap(NULL, size + MEM_HUGE_PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (raw == MAP_FAILED)
        return NULL;
    size_t before = (MEM_HUGE_PAGE - (uintptr_t)raw % MEM_HUGE_PAGE) % MEM_HUGE_PAGE;
    if (before > 0)
        munmap(raw, before);
    munmap(raw + before + size, MEM_HUGE_PAGE - before);
#ifdef MADV_HUGEPAGE
    madvise(raw + before, size, MADV_HUGEPAGE); /* a wish: without it everything still works */
#endif
    return raw + before;
}

void *mem_alloc(size_t bytes)
{
    size_t size = mem_footprint(bytes);
    if (size == 0)
        return NULL;
    if (bytes >= MEM_HUGE_PAGE)
        return map_large(size);
    void *p = aligned_alloc(64, size);
    if (p != NULL)
        memset(p, 0, size);
    return p;
}

void mem_free(void *p, size_t bytes)
{
    if (p == NULL)
        return;
    if (bytes >= MEM_HUGE_PAGE)
        munmap(p, mem_footprint(bytes));
    else
        free(p);
}

void mem_populate(void *p, size_t bytes)
{
    const uintptr_t page = page_size(), from = ((uintptr_t)p + page - 1) / page * page;
    const uintptr_t to = ((uintptr_t)p + bytes) / page * page;
    if (to > from)
        madvise((void *)from, to - from, MADV_POPULATE_WRITE); /* older kernels say no */
}

/* --- limits ------------------------------------------------------------------------------- */

/* The number that a file below root holds; SIZE_MAX for "max", for a missing file, and for what
 * is no number. */
static size_t read_limit(const char *root, const char *dir, const char *name)
{
    char path[PATH_MAX], text[64];
    int n = snprintf(path, sizeof path, "%s%s/%s", root, dir, name);
    if (n < 0 || (size_t)n >= sizeof path)
        return SIZE_MAX;
    FILE *f = fopen(path, "re");
    if (f == NULL)
        return SIZE_MAX;
    size_t ret = SIZE_MAX;
    if (fgets(text, sizeof text, f) != NULL) {
        char *end;
        unsigned long long v = strtoull(text, &end, 10);
        if (end != text && text[0] != '-')
            ret = (size_t)v;
    }
    fclose(f);
    return ret;
}

/* The least limit from `dir` up to the mount point `top`, both included. */
static size_t limit_up_the_tree(const char *root, char *dir, size_t top, const char *name)
{
    size_t least = SIZE_MAX;
    for (;;) {
        size_t v = read_limit(root, dir, name);
        if (v < least)
            least = v;
        char *slash = strrchr(dir, '/');
        if (strlen(dir) <= top || slash == NULL || slash < dir + top)
            return least;
        *slash = '\0';
    }
}

/* Does the comma-separated list hold this word? */
static bool list_has(const char *list, const char *word)
{
    size_t n = strlen(word);
    for (const char *p = list; p != NULL; p = strchr(p, ',')) {
        p += *p == ',';
        if (strncmp(p, word, n) == 0 && (p[n] == ',' || p[n] == '\0'))
            return true;
    }
    return false;
}

/* Our group in the hierarchy that counts memory: a line "ID:CONTROLLERS:PATH" of
 * /proc/self/cgroup.  v2 is the line with no controllers.  False if there is no such line. */
static bool own_group(const char *root, bool v2, char ret[PATH_MAX])
{
    char path[PATH_MAX], line[PATH_MAX + 256];
    snprintf(path, sizeof path, "%s/proc/self/cgroup", root);
    FILE *f = fopen(path, "re");
    if (f == NULL)
        return false;
    bool found = false;
    while (!found && fgets(line, sizeof line, f) != NULL) {
        line[strcspn(line, "\n")] = '\0';
        char *controllers = strchr(line, ':');
        char *group = controllers ? strchr(controllers + 1, ':') : NULL;
        if (group == NULL)
            continue;
        *group++ = '\0';
        found = v2 ? controllers[1] == '\0' : list_has(controllers + 1, "memory");
        if (found)
            snprintf(ret, PATH_MAX, "%.*s", PATH_MAX - 1, group);
    }
    fclose(f);
    return found;
}

/* One line of /proc/self/mountinfo, "ID PARENT DEV ROOT POINT OPTIONS ... - TYPE SOURCE SUPER":
 * is it the hierarchy we want?  `base` is the group that the mount shows as its top. */
static bool is_cgroup_mount(char *line, bool v2, char **base, char **point)
{
    char *dash = strstr(line, " - ");
    if (dash == NULL)
        return false;
    *dash = '\0';
    char *save, *type = strtok_r(dash + 3, " \n", &save);
    strtok_r(NULL, " \n", &save); /* source */
    char *super = strtok_r(NULL, " \n", &save);
    if (type == NULL || strcmp(type, v2 ? "cgroup2" : "cgroup") != 0)
        return false;
    if (!v2 && (super == NULL || !list_has(super, "memory")))
        return false;
    *base = *point = NULL;
    int field = 0;
    for (char *p = strtok_r(line, " ", &save); p != NULL; p = strtok_r(NULL, " ", &save)) {
        if (field == 3)
            *base = p;
        else if (field == 4)
            *point = p;
        field++;
    }
    return *base != NULL && *point != NULL;
}

/* The limit of one kind of hierarchy.  In a container the mount may show our own group as its
 * top, or the path may lie outside of what is mounted: then the top itself is asked. */
static size_t group_limit(const char *root, bool v2)
{
    char group[PATH_MAX], path[PATH_MAX], line[4 * PATH_MAX];
    if (!own_group(root, v2, group))
        return SIZE_MAX;
    snprintf(path, sizeof path, "%s/proc/self/mountinfo", root);
    FILE *f = fopen(path, "re");
    if (f == NULL)
        return SIZE_MAX;
    size_t least = SIZE_MAX;
    while (fgets(line, sizeof line, f) != NULL) {
        char *base, *point;
        if (!is_cgroup_mount(line, v2, &base, &point))
            continue;
        size_t skip = strcmp(base, "/") == 0 ? 0 : strlen(base);
        const char *rest = "";
        if (strncmp(group, base, skip) == 0 && group[skip] == '/' &&
            strstr(group + skip, "/..") == NULL && group[skip + 1] != '\0')
            rest = group + skip;
        char dir[2 * PATH_MAX];
        snprintf(dir, sizeof dir, "%s%s", point, rest);
        size_t v = limit_up_the_tree(root, dir, strlen(point),
                                     v2 ? "memory.max" : "memory.limit_in_bytes");
        if (v < least)
            least = v;
    }
    fclose(f);
    return least;
}

/* MemTotal of /proc/meminfo, which knows about the memory of a virtual machine or a container
 * that fakes it. */
static size_t physical(const char *root)
{
    char path[PATH_MAX], line[256];
    snprintf(path, sizeof path, "%s/proc/meminfo", root);
    FILE *f = fopen(path, "re");
    if (f == NULL)
        return SIZE_MAX;
    unsigned long long kib = 0;
    while (kib == 0 && fgets(line, sizeof line, f) != NULL)
        if (sscanf(line, "MemTotal: %llu kB", &kib) != 1)
            kib = 0;
    fclose(f);
    return kib == 0 || kib > SIZE_MAX >> 10 ? SIZE_MAX : (size_t)kib << 10;
}

size_t mem_limit_below(const char *root)
{
    size_t least = physical(root), v2 = group_limit(root, true), v1 = group_limit(root, false);
    least = v2 < least ? v2 : least;
    least = v1 < least ? v1 : least;
    return least == SIZE_MAX ? 0 : least;
}

size_t mem_limit(void)
{
    size_t n = mem_limit_below("");
    if (n > 0)
        return n;
    long pages = sysconf(_SC_PHYS_PAGES); /* no /proc here */
    return pages > 0 ? (size_t)pages * page_size() : (size_t)1 << 30;
}

size_t mem_resident(void)
{
    FILE *f = fopen("/proc/self/statm", "re");
    if (f == NULL)
        return 0;
    unsigned long long all = 0, resident = 0;
    if (fscanf(f, "%llu %llu", &all, &resident) != 2)
        resident = 0;
    fclose(f);
    return (size_t)resident * page_size();
}

/* --- the plan ------------------------------------------------------------------------------ */

static int no_fit(size_t budget, size_t base, size_t work, size_t kv, size_t adapters,
                  const char *what, struct err *err)
{
    char b[5][32];
    return err_set(err, ERR_INVALID,
                   "the memory budget of %s does not hold %s for the base, %s of workspace, "
                   "%s of KV cache (%s) and %s of adapters",
                   human_bytes(budget, b[0]), human_bytes(base, b[1]), human_bytes(work, b[2]),
                   human_bytes(kv, b[3]), what, human_bytes(adapters, b[4]));
}

int mem_plan(size_t budget, size_t base, size_t work, size_t kv_min, size_t kv, size_t adapters,
             struct mem_plan *ret, struct err *err)
{
    static const char least[] = "the least for one sequence of full length";
    if (budget == 0)
        budget = mem_limit() / 5 * 4;
    if (kv != 0 && kv < kv_min) {
        char b[2][32];
        return err_set(err, ERR_INVALID,
                       "a KV cache of %s is too small: one sequence of full length needs %s",
                       human_bytes(kv, b[0]), human_bytes(kv_min, b[1]));
    }
    size_t need_kv = kv != 0 ? kv : kv_min;
    const char *what = kv != 0 ? "as asked for" : least;
    if (base > budget || work > budget - base || need_kv > budget - base - work ||
        adapters > budget - base - work - need_kv)
        return no_fit(budget, base, work, need_kv, adapters, what, err);

    size_t left = budget - base - work;
    struct mem_plan p = { .total = budget, .base = base, .work = work };
    if (kv != 0) {
        p.kv = kv;
        p.adapters = adapters != 0 ? adapters : left - kv;
    } else if (adapters != 0) {
        p.adapters = adapters;
        p.kv = left - adapters;
    } else {
        p.kv = left - left / 4;
        if (p.kv < kv_min) /* adapters get what one sequence leaves */
            p.kv = kv_min;
        p.adapters = left - p.kv;
    }
    *ret = p;
    return ERR_OK;
}
