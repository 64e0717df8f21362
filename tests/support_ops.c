/* support_ops.c - see the header. */
#include "tests/support_ops.h"

#include "engine/compute.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <cmocka.h>

static uint32_t rng_state = 7;
float rnd(float scale)
{
    rng_state = rng_state * 1664525 + 1013904223;
    return ((float)(rng_state >> 8) * 0x1p-23f - 1) * scale;
}

float *random_floats(size_t n, float scale)
{
    float *p = malloc((n + 1) * sizeof *p);
    assert_non_null(p);
    for (size_t i = 0; i < n; i++)
        p[i] = rnd(scale);
    return p;
}

const struct ops *const *vector_ops(void)
{
    static const char *const names[] = { "avx2", "avx512" };
    static const struct ops *found[3];
    enum isa isa;
    int n = 0;
    for (int i = 0; i < 2; i++) {
        if (isa_select(names[i], &isa, NULL) == ERR_OK)
            found[n++] = ops_for(isa);
        else
            fprintf(stderr, "SKIPPED: this CPU has no %s\n", names[i]);
    }
    found[n] = NULL;
    return found;
}
