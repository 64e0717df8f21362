/* train_init.h - what the factors of a new adapter start with.
 *
 * Seeds are not PyTorch's: the distributions are PEFT's, the numbers our own. */
#ifndef ENGINE_TRAIN_INIT_H
#define ENGINE_TRAIN_INIT_H

#include "engine/train.h"

/* A [r][in], B [out][r]; E [r] of AdaLoRA, else NULL.  The numbers depend on (seed, layer, module)
 * and the shape, not on which other modules there are.
 *   TRAIN_INIT_DEFAULT   A uniform in +-1/sqrt(in) (He's uniform with a = sqrt 5), B = 0
 *   TRAIN_INIT_GAUSSIAN  A ~ N(0, (1/r)^2), B = 0
 *   TRAIN_INIT_NORMAL    A ~ N(0, 1), B = 0
 * AdaLoRA has one way only: A and B ~ N(0, 0.02^2), E = 0.  Were B zero beside E, no gradient would
 * ever arise, so `init` is not looked at. */
void train_init_module(enum adapter_method method, enum train_init init, uint64_t seed, int layer,
                       int module, int r, int in, int out, float *A, float *B, float *E);

#endif
