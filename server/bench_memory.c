/* bench_memory.c - how fast memory can be read, which bounds the decoding of one sequence. */
#include "server/bench_parts.h"

#include "engine/mem.h"
#include "engine/util.h"

#include <string.h>
#include <sys/mman.h>

enum { PIECES = 256 };
static const size_t BUFFER = (size_t)512 << 20, BUFFER_QUICK = (size_t)64 << 20;

/* A sum of all words, in as many chains as loads can be in flight. */
static void read_piece(void *arg, int64_t begin, int64_t end, int thread)
{
    const struct bench_reader *r = arg;
    (void)thread;
    for (int64_t i = begin; i < end; i++) {
        const size_t words = r->bytes / PIECES / 8;
        const uint64_t *w = (const uint64_t *)r->data + (size_t)i * words;
        uint64_t sum[16] = { 0 };
        for (size_t k = 0; k < words; k += 16)
            for (size_t l = 0; l < 16; l++)
                sum[l] += w[k + l];
        for (int l = 1; l < 16; l++)
            sum[0] += sum[l];
        volatile uint64_t sink = sum[0];
        (void)sink;
    }
}

static void read_all(void *arg)
{
    struct bench_reader *r = arg;
    pool_run(r->one_thread ? NULL : r->compute->pool, PIECES, 1, read_piece, r);
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
    struct bench_reader r = { .compute = &b->compute, .b = b, .bytes = b->quick ? BUFFER_QUICK : BUFFER,
                              .small_pages = small, .one_thread = one_thread };
    r.data = small ? small_pages(r.bytes) : mem_alloc(r.bytes);
    if (r.data == NULL)
        return err_nomem(err);
    memset(r.data, 1, r.bytes);
    *ret = r;
    return ERR_OK;
}

void bench_reader_close(struct bench_reader *r)
{
    if (r->data == NULL)
        return;
    if (r->small_pages)
        munmap(r->data, r->bytes);
    else
        mem_free(r->data, r->bytes);
    r->data = NULL;
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
    if (!bench_room(b, "memory", 4 * BUFFER))
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
