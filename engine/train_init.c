/* train_init.c - first values of the factors; see the header. */
#include "engine/train_init.h"
#include "engine/train_rand.h"

#include <math.h>
#include <string.h>

void train_init_module(enum adapter_method method, enum train_init init, uint64_t seed, int layer,
                       int module, int r, int in, int out, float *A, float *B, float *E)
{
    const uint64_t where = (uint64_t)layer << 16 | (uint64_t)module << 1;
    const uint64_t of_A = train_stream(TRAIN_STREAM_INIT, where);
    const uint64_t of_B = train_stream(TRAIN_STREAM_INIT, where | 1);
    const size_t nA = (size_t)r * (size_t)in, nB = (size_t)out * (size_t)r;
    if (method == METHOD_ADALORA) {
        train_rand_normal(seed, of_A, 0.02f, A, nA);
        train_rand_normal(seed, of_B, 0.02f, B, nB);
        memset(E, 0, (size_t)r * sizeof *E);
        return;
    }
    memset(B, 0, nB * sizeof *B);
    const float bound = (float)(1.0 / sqrt((double)in));
    switch (init) {
    case TRAIN_INIT_DEFAULT:
        train_rand_uniform(seed, of_A, -bound, bound, A, nA);
        break;
    case TRAIN_INIT_GAUSSIAN:
        train_rand_normal(seed, of_A, 1.0f / (float)r, A, nA);
        break;
    case TRAIN_INIT_NORMAL:
        train_rand_normal(seed, of_A, 1.0f, A, nA);
        break;
    }
}
