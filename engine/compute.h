/* compute.h - who computes and how: threads, instruction set, precision.
 *
 * The promise that everything below `forward()` keeps: a token row's result does
 * not depend on the rows beside it, on how a prompt was cut into chunks, on the
 * number of threads, or on the instruction set.  It follows from three habits:
 *   - work is split between threads only where pieces do not share a sum;
 *   - every sum has ONE order, written down beside the scalar code, and the vector
 *     code follows it (16 lanes, a fixed tree at the end, fused multiply-adds);
 *   - inside a 64-block the quantised products are integers, where order is free.
 * The scalar code is the definition.  Tests hold the vector code to it bit for bit. */
#ifndef ENGINE_COMPUTE_H
#define ENGINE_COMPUTE_H

#include "engine/err.h"

#include <stdint.h>

/* Instruction sets with kernels of their own, slowest first.  Where something has none for
 * ISA_AVX2 (with FMA and F16C), the scalar code gives the same bits. */
enum isa { ISA_SCALAR, ISA_AVX2, ISA_AVX512, ISA_COUNT };

/* How linear layers multiply; see linear.h.  Chosen once per process, never by batch size. */
enum precision { PREC_FAST, PREC_EXACT, PREC_F32 };

/* Threads that wait for loops to share.  One caller at a time. */
struct pool;

struct compute {
    struct pool *pool;
    enum isa isa;
    enum precision precision;
};

/* `name` is "auto" (the best this CPU has), "scalar", "avx2" or "avx512".  ERR_INVALID if it is
 * unknown or this CPU lacks it. */
int isa_select(const char *name, enum isa *ret, struct err *err);
const char *isa_name(enum isa isa);
/* "fast", "exact" or "f32". */
int precision_parse(const char *name, enum precision *ret, struct err *err);
const char *precision_name(enum precision p);

/* `nthreads` counts the caller: 1 makes no thread.  0 means one per available CPU
 * (sched_getaffinity and the cgroup's cpu.max), at least 1. */
int pool_create(int nthreads, struct pool **ret, struct err *err);
void pool_destroy(struct pool *p); /* NULL is fine */
int pool_threads(const struct pool *p);

/* Call fn(arg, begin, end, thread) for pieces that together cover [0, n) once, each at
 * most `grain` long, on all threads; return when all are done.  Pieces are handed out as
 * threads become free (a static split suffers when something else takes a core), so
 * results must not depend on who does what.  `thread` is 0..pool_threads-1; the caller
 * is thread 0.  A NULL pool runs everything in the caller. */
typedef void (*pool_fn)(void *arg, int64_t begin, int64_t end, int thread);
void pool_run(struct pool *p, int64_t n, int64_t grain, pool_fn fn, void *arg);
/* The same, but each thread begins at a place of its own and takes pieces that follow each other,
 * until it has to help others: for loops over much memory, which is read faster by threads that are
 * far from each other (see linear.c). */
void pool_run_apart(struct pool *p, int64_t n, int64_t grain, pool_fn fn, void *arg);

#endif
