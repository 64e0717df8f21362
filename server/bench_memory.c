/* bench_memory.c - how fast memory can be read, which bounds the decoding of one sequence. */
#include "server/bench_parts.h"

#include "engine/mem.h"
#include "engine/util.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

enum { PIECES = 256 };
static const size_t BUFFER = (size_t)512 << 20, BUFFER_QUICK = (size_t)64 << 20;

static size_t buffer_bytes(const struct bench *b) { return b->quick ? BUFFER_QUICK : BUFFER; }

/* A sum of all words, in as many chains as loads can be in flight. */
static void read_region(const struct bench_region *r)
{
    const uint64_t *w = r->at;
    uint64_t sum[16] = { 0 };
    for (size_t k = 0; k < r->bytes / 128 * 16; k += 16)
        for (size_t l = 0; l < 16; l++)
            sum[l] += w[k + l];
    for (int l = 1; l < 16; l++)
        sum[0] += sum[l];
    volatile uint64_t sink = sum[0];
    (void)sink;
}

static void read_some(void *arg, int64_t begin, int64_t end, int thread)
{
    const struct bench_reader *r = arg;
    (void)thread;
    for (int64_t i = begin; i < end; i++)
        read_region(&r->regions[i]);
}

static void read_all(void *arg)
{
    struct bench_reader *r = arg;
    pool_run_apart(r->one_thread ? NULL : r->compute->pool, r->n, 1, read_some, r);
}

static int read_rate(void *arg, double *ret, struct err *err)
{
    const struct bench_reader *r = arg;
    (void)err;
    *ret = (double)r->bytes / bench_time(r->b, read_all, arg) * 1e-9;
    return ERR_OK;
}

/* Pages that stay 4 KiB whatever the machine's setting. */
static void *small_pages(size_t bytes)
{
    void *p = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED)
        return NULL;
    madvise(p, bytes, MADV_NOHUGEPAGE);
    return p;
}

int bench_reader_open(struct bench *b, bool small, bool one_thread, struct bench_reader *ret, struct err *err)
{
    struct bench_reader r = { .compute = &b->compute, .b = b, .bytes = buffer_bytes(b),
                              .small_pages = small, .one_thread = one_thread, .n = PIECES };
    r.data = small ? small_pages(r.bytes) : mem_alloc(r.bytes);
    r.regions = calloc(PIECES, sizeof *r.regions);
    if (r.data == NULL || r.regions == NULL) {
        bench_reader_close(&r);
        return err_nomem(err);
    }
    memset(r.data, 1, r.bytes);
    for (size_t i = 0; i < PIECES; i++)
        r.regions[i] = (struct bench_region){ (char *)r.data + i * (r.bytes / PIECES), r.bytes / PIECES };
    *ret = r;
    return ERR_OK;
}

static void add_region(struct bench_reader *r, const struct matrix *w)
{
    const size_t bytes = w->type == MAT_NF4_P16 ? (size_t)w->N * (size_t)w->K / 2
                       : w->type == MAT_Q8_P16  ? (size_t)w->N * (size_t)w->K
                                                : 0;
    if (bytes == 0)
        return;
    r->regions[r->n++] = (struct bench_region){ w->codes, bytes };
    r->bytes += bytes;
}

int bench_reader_of_base(struct bench *b, const struct base *base, struct bench_reader *ret, struct err *err)
{
    struct bench_reader r = { .compute = &b->compute, .b = b };
    r.regions = calloc((size_t)base->arch.L * MOD_COUNT + 1, sizeof *r.regions);
    if (r.regions == NULL)
        return err_nomem(err);
    for (int l = 0; l < base->arch.L; l++)
        for (int m = 0; m < MOD_COUNT; m++)
            add_region(&r, &base->layers[l].mod[m].w);
    add_region(&r, &base->head);
    *ret = r;
    return ERR_OK;
}

void bench_reader_close(struct bench_reader *r)
{
    if (r->data != NULL && r->small_pages)
        munmap(r->data, r->bytes);
    else if (r->data != NULL)
        mem_free(r->data, r->bytes);
    free(r->regions);
    r->data = NULL;
    r->regions = NULL;
}

struct bench_series bench_reader_series(struct bench_reader *r)
{
    return (struct bench_series){ .name = "GB/s streaming read", .unit = "GB/s", .measure = read_rate,
                                  .arg = r };
}

static int run(struct bench *b, struct err *err)
{
    static const char *const ids[] = { "memory.huge.all", "memory.huge.one", "memory.4k.all", "memory.4k.one" };
    struct bench_reader r[4] = { 0 };
    struct bench_series s[4];
    int rc = ERR_OK;
    if (!bench_room(b, "memory", 4 * buffer_bytes(b)))
        return ERR_OK;
    for (int i = 0; i < 4 && rc == ERR_OK; i++)
        rc = bench_reader_open(b, i >= 2, i % 2 == 1, &r[i], err);
    for (int i = 0; i < 4; i++)
        s[i] = bench_reader_series(&r[i]);
    if (rc == ERR_OK)
        rc = bench_measure(b, s, 4, err);
    for (int i = 0; i < 4 && rc == ERR_OK; i++)
        rc = bench_row(b, &s[i], i == 0 ? NULL : &s[0], 1, err, "%s", ids[i]);
    for (int i = 0; i < 4; i++)
        bench_reader_close(&r[i]);
    return rc;
}

const struct bench_part bench_memory = { "memory", "streaming read of memory: huge and 4 KiB pages, one "
                                         "thread and all", run };
