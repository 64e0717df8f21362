/* support_ops.h - random numbers and tables of vector code, for tests of ops. */
#ifndef TESTS_SUPPORT_OPS_H
#define TESTS_SUPPORT_OPS_H

#include "engine/ops.h"

#include <stddef.h>

float rnd(float scale); /* [-scale, scale), the same sequence in each run */
float *random_floats(size_t n, float scale); /* the caller's; free() */
/* The vector tables that this CPU can run; says so if one is missing.  NULL ends them. */
const struct ops *const *vector_ops(void);

#endif
