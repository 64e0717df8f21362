/* train_rand.h - the random numbers of training: counter based, the same on every machine.
 *
 * Philox4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC
 * 2011) is a keyed bijection of 128-bit counters: number i of a stream is computed from (seed,
 * stream, i) alone.  So nothing has to be kept to resume, and threads share no state.  Only
 * integers and the correctly rounded operations + - * / sqrt of doubles are used, never libm's
 * functions.
 *
 * A stream is any 64-bit number.  Its top byte says what it is for (enum train_stream); the rest is
 * up to that use.  Pure functions; any thread. */
#ifndef ENGINE_TRAIN_RAND_H
#define ENGINE_TRAIN_RAND_H

#include <stddef.h>
#include <stdint.h>

enum train_stream {
    TRAIN_STREAM_INIT = 1,    /* first values: train_init.h */
    TRAIN_STREAM_SHUFFLE = 2, /* order of the examples of an epoch */
    TRAIN_STREAM_DROPOUT = 3, /* masks of one module in one micro-batch */
};
static inline uint64_t train_stream(enum train_stream use, uint64_t rest)
{
    return (uint64_t)use << 56 | (rest & (((uint64_t)1 << 56) - 1));
}

/* The block `counter` of the stream: key = seed (low word first), counter words = counter, stream
 * (low words first). */
void train_rand_u32x4(uint64_t seed, uint64_t stream, uint64_t counter, uint32_t ret[4]);

/* Uniform in [lo, hi]: (word + 1/2) / 2^32 of the way, in double, rounded once. */
void train_rand_uniform(uint64_t seed, uint64_t stream, float lo, float hi, float *ret, size_t n);
/* Normal with mean 0: the inverse of the distribution function at the same uniforms (Wichura,
 * algorithm AS 241, PPND7: 7 digits); nothing beyond 6.4 sd. */
void train_rand_normal(uint64_t seed, uint64_t stream, float sd, float *ret, size_t n);
/* A permutation of 0..n-1, each as probable as any other (Fisher-Yates; n < 2^32). */
void train_rand_permutation(uint64_t seed, uint64_t stream, uint32_t *ret, size_t n);

/* Inverted dropout of rows row0 .. row0+rows-1 of a matrix with `cols` columns, 0 <= p < 1:
 *     y[r][k] = keep(r, k) ? x[r][k] / (1 - p) : 0        y may be x
 * Whether an element is kept depends on (seed, stream, (row0 + r) * cols + k) only, so rows can be
 * split among threads, and the way back sees the mask of the way forward.  ld*: elements from row
 * to row. */
void train_dropout(uint64_t seed, uint64_t stream, double p, int64_t row0, const float *x, int rows,
                   int cols, int ldx, float *y, int ldy);
/* dx[r][k] += keep(r, k) ? dy[r][k] / (1 - p) : 0 */
void train_dropout_back(uint64_t seed, uint64_t stream, double p, int64_t row0, const float *dy,
                        int rows, int cols, int lddy, float *dx, int lddx);

#endif
