/* bench_mixed.c - decode steps of whole models: no adapters, one that all rows share, and one for each
 * row; beside how fast memory can be read.
 *
 *     bench_mixed [SHAPE [ROUNDS [RANK]...]]      default 1.1b 9 8 16 64; shapes in synthetic.h
 *
 * A step computes one token of BATCH (default 16) sequences whose cache holds 128 positions.  Rounds
 * are interleaved: every case once, then all again, because the speed of memory and clock drift;
 * shown are medians over rounds, of ratios too.  `of bare` is tokens per second over those of the
 * same batch without adapters in the same round, `of read` the bytes of weights and adapters that a
 * step reads, per second, over the bandwidth of reading. */
#include "engine/forward.h"
#include "engine/mem.h"
#include "engine/synthetic.h"
#include "engine/util.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_BATCH = 64, CONTEXT = 128, MAX_ROUNDS = 99, MAX_RANKS = 4, STEPS = 3 };
enum { READ_PIECE = 1 << 20, READ_BYTES = 256 << 20 };

static struct compute compute;
static struct base *base;
static struct kv_cache *kv;
static struct forward *forward;
static struct kv_seq seqs[MAX_BATCH];
static int batch = 16;

static void need(int rc, const struct err *err)
{
    if (rc == ERR_OK)
        return;
    fprintf(stderr, "bench_mixed: %s\n", err->msg);
    exit(1);
}

static void *need_memory(size_t bytes)
{
    void *p = mem_alloc(bytes);
    struct err err = { 0 };
    if (p == NULL)
        need(err_nomem(&err), &err);
    return p;
}

/* --- adapters ------------------------------------------------------------------------------------ */
/* bf16, rank r, every linear layer; all copies hold the same small numbers. */
static void make_adapters(int r, int n, struct adapter **ret)
{
    const struct arch *a = &base->arch;
    const size_t widest = (size_t)r * (size_t)(a->F > a->D ? a->F : a->D);
    struct adapter_src_module *m = calloc((size_t)a->L * MOD_COUNT, sizeof *m);
    uint16_t *numbers = need_memory(widest * sizeof *numbers);
    struct adapter_src src = { .modules = m, .rank_max = r, .rank_min = r };
    struct err err = { 0 };
    for (size_t i = 0; i < widest; i++)
        numbers[i] = (uint16_t)(0x3c00 | (i * 40503u & 0x807f)); /* around +-0.01 */
    for (int l = 0; l < a->L && m != NULL; l++)
        for (int mod = 0; mod < MOD_COUNT; mod++)
            if (arch_has_module(a, (enum module)mod))
                m[src.nmodules++] = (struct adapter_src_module){
                    .layer = l, .module = (enum module)mod, .rank = r, .init_rank = r,
                    .scaling = 1, .in = arch_in(a, (enum module)mod),
                    .out = arch_out(a, (enum module)mod), .dtype = DT_BF16, .A = numbers,
                    .B = numbers,
                };
    for (int i = 0; i < n; i++) {
        src.hash[0] = (uint8_t)(i + 1);
        need(adapter_build(a, &src, 0, &ret[i], &err), &err);
    }
    mem_free(numbers, widest * sizeof *numbers);
    free(m);
}

/* --- cases --------------------------------------------------------------------------------------- */
enum { BARE, SHARED, DIFFERENT, KINDS };
static const char *const kind_names[] = { "no adapter", "one shared", "different" };

struct one_case {
    enum precision precision;
    int rank, kind;
    struct adapter **adapters;
    size_t bytes; /* of weights and adapters */
    double seconds[MAX_ROUNDS], of_bare[MAX_ROUNDS], of_read[MAX_ROUNDS];
};

static double time_step(const struct one_case *c)
{
    struct lora_set sets[MAX_BATCH] = { 0 };
    struct span spans[MAX_BATCH];
    const int32_t token = 7;
    double times[STEPS];
    for (int i = 0; i < batch; i++) {
        if (c->kind != BARE)
            sets[i] = (struct lora_set){ 1, { { c->adapters[c->kind == SHARED ? 0 : i], 1 } } };
        spans[i] = (struct span){ &seqs[i], CONTEXT, 1, &token, &sets[i], 1 };
    }
    compute.precision = c->precision;
    for (int i = 0; i < STEPS; i++) {
        const double start = now_mono();
        forward_run(forward, spans, batch);
        times[i] = now_mono() - start;
    }
    double least = times[0];
    for (int i = 1; i < STEPS; i++)
        least = times[i] < least ? times[i] : least;
    return least;
}

/* --- reading --------------------------------------------------------------------------------------- */
static void read_piece(void *arg, int64_t begin, int64_t end, int thread)
{
    (void)thread;
    for (int64_t i = begin; i < end; i++) {
        const uint64_t *w = (const uint64_t *)arg + i * (READ_PIECE / 8);
        uint64_t sum[8] = { 0 };
        for (size_t k = 0; k < READ_PIECE / 8; k += 8)
            for (size_t l = 0; l < 8; l++)
                sum[l] += w[k + l];
        for (int l = 1; l < 8; l++)
            sum[0] += sum[l];
        volatile uint64_t sink = sum[0];
        (void)sink;
    }
}

/* Bytes per second. */
static double read_bandwidth(void *memory)
{
    double least = 1e9;
    for (int i = 0; i < STEPS; i++) {
        const double start = now_mono();
        pool_run(compute.pool, READ_BYTES / READ_PIECE, 1, read_piece, memory);
        const double s = now_mono() - start;
        least = s < least ? s : least;
    }
    return READ_BYTES / least;
}

/* --- set-up and report ----------------------------------------------------------------------------- */
static void open_cache(void)
{
    const struct arch *a = &base->arch;
    const size_t block = KV_PAGE * (size_t)a->hd * sizeof(uint16_t);
    const int32_t tokens[1] = { 7 };
    struct err err = { 0 };
    const int pages = batch * kv_pages_for(CONTEXT + 1);
    need(kv_create(a, false, (size_t)pages * kv_page_bytes(a, false), &kv, &err), &err);
    for (int i = 0; i < batch; i++) {
        const uint8_t seed[32] = { (uint8_t)(i + 1) };
        need(kv_open(kv, seed, tokens, 1, &seqs[i], &err), &err);
        if (!kv_reserve(kv, &seqs[i], CONTEXT + 1))
            abort();
        for (int p = 0; p < seqs[i].npages; p++)
            for (int l = 0; l < a->L; l++)
                for (int g = 0; g < a->G; g++) {
                    memset(kv_k(kv, seqs[i].pages[p], l, g), 0x2c, block); /* 0.065 in fp16 */
                    memset(kv_v(kv, seqs[i].pages[p], l, g), 0x2c, block);
                }
    }
}

static int ascending(const void *a, const void *b)
{
    const double u = *(const double *)a, v = *(const double *)b;
    return (u > v) - (u < v);
}

static double median(double *v, int n)
{
    qsort(v, (size_t)n, sizeof *v, ascending);
    return v[n / 2];
}

static void report(struct one_case *c, int rounds)
{
    const double s = median(c->seconds, rounds);
    printf("%-6s rank %-3d %-10s %8.2f ms %8.1f tokens/s  %5.1f %% of bare  %5.1f %% of read\n",
           precision_name(c->precision), c->rank, kind_names[c->kind], s * 1e3, batch / s,
           100 * median(c->of_bare, rounds), 100 * median(c->of_read, rounds));
}

int main(int argc, char **argv)
{
    static const int usual[] = { 8, 16, 64 };
    static struct one_case cases[2 * (1 + 2 * MAX_RANKS)];
    static struct adapter *adapters[MAX_RANKS][MAX_BATCH];
    struct err err = { 0 };
    const struct synthetic_shape *shape = synthetic_find(argc > 1 ? argv[1] : "1.1b");
    int rounds = argc > 2 ? atoi(argv[2]) : 9, nranks = argc > 3 ? argc - 3 : 3, n = 0;
    rounds = rounds < 1 ? 1 : rounds > MAX_ROUNDS ? MAX_ROUNDS : rounds;
    batch = getenv("BATCH") != NULL ? atoi(getenv("BATCH")) : batch;
    if (shape == NULL || nranks > MAX_RANKS || batch < 1 || batch > MAX_BATCH)
        need(err_set(&err, ERR_INVALID, "see the head of bench_mixed.c"), &err);
    need(isa_select("auto", &compute.isa, &err), &err);
    need(pool_create(0, &compute.pool, &err), &err);
    need(synthetic_base(shape, &base, &err), &err);
    open_cache();
    need(forward_create(base, &compute, kv, CONTEXT + 1, batch, batch, &forward, &err), &err);
    char *memory = need_memory(READ_BYTES);
    memset(memory, 1, READ_BYTES);

    /* Of the embedding a step reads a few rows. */
    const size_t weights = base->bytes - (size_t)base->arch.V * (size_t)base->arch.D * 2;
    for (int i = 0; i < nranks; i++)
        make_adapters(argc > 3 ? atoi(argv[3 + i]) : usual[i], batch, adapters[i]);
    for (int p = PREC_FAST; p <= PREC_EXACT; p++) {
        cases[n++] = (struct one_case){ .precision = (enum precision)p, .bytes = weights };
        for (int i = 0; i < nranks; i++)
            for (int k = SHARED; k < KINDS; k++)
                cases[n++] = (struct one_case){
                    .precision = (enum precision)p, .rank = adapters[i][0]->rank_max, .kind = k,
                    .adapters = adapters[i],
                    .bytes = weights + (k == SHARED ? 1 : (size_t)batch) * adapters[i][0]->bytes,
                };
    }
    static double bandwidth[MAX_ROUNDS];
    for (int r = 0; r < rounds; r++) {
        const struct one_case *bare = cases;
        const double read = bandwidth[r] = read_bandwidth(memory);
        for (int i = 0; i < n; i++) {
            struct one_case *c = &cases[i];
            bare = c->kind == BARE ? c : bare;
            c->seconds[r] = time_step(c);
            c->of_bare[r] = bare->seconds[r] / c->seconds[r];
            c->of_read[r] = (double)c->bytes / c->seconds[r] / read;
        }
    }
    printf("%s, batch %d, %d positions, %s kernels, %d threads, %d rounds, reading %.1f GB/s\n",
           shape->name, batch, CONTEXT, isa_name(compute.isa), pool_threads(compute.pool), rounds,
           median(bandwidth, rounds) * 1e-9);
    for (int i = 0; i < n; i++)
        report(&cases[i], rounds);
    for (int i = 0; i < nranks; i++)
        for (int k = 0; k < batch; k++)
            adapter_free(adapters[i][k]);
    forward_destroy(forward);
    for (int i = 0; i < batch; i++)
        kv_close(kv, &seqs[i]);
    kv_destroy(kv);
    mem_free(memory, READ_BYTES);
    synthetic_free(base);
    pool_destroy(compute.pool);
    return 0;
}
