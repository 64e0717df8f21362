/* compute.c - names of instruction sets and precisions, and what this CPU has. */
#include "engine/compute.h"

#include <stdbool.h>
#include <string.h>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

static const char *const isa_names[ISA_COUNT] = { "scalar", "avx2", "avx512" };
static const char *const precision_names[] = { "fast", "exact", "f32" };

enum { PRECISIONS = sizeof precision_names / sizeof precision_names[0] };

/* The features in simd_int.h's AVX2 and AVX512; the compiler's check covers the system's support
 * of the registers too. */
#if defined(__x86_64__)
static bool has_f16c(void) /* clang 14's check does not know this one */
{
    unsigned a, b, c = 0, d;
    return __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & bit_F16C) != 0;
}

static bool has_avx2(void)
{
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
}

static bool has_avx512(void)
{
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vnni");
}
#endif

static bool cpu_has(enum isa isa)
{
#if defined(__x86_64__)
    if (isa == ISA_AVX2)
        return has_avx2();
    if (isa == ISA_AVX512)
        return has_avx512();
#endif
    return isa == ISA_SCALAR;
}

int isa_select(const char *name, enum isa *ret, struct err *err)
{
    if (strcmp(name, "auto") == 0) {
        int best = ISA_COUNT - 1;
        while (!cpu_has((enum isa)best))
            best--;
        *ret = (enum isa)best;
        return ERR_OK;
    }
    for (int i = 0; i < ISA_COUNT; i++) {
        if (strcmp(name, isa_names[i]) != 0)
            continue;
        if (!cpu_has((enum isa)i))
            return err_set(
                err, ERR_INVALID,
                "this CPU lacks instructions that the %s kernels use: take auto or scalar", name);
        *ret = (enum isa)i;
        return ERR_OK;
    }
    return err_set(err, ERR_INVALID, "unknown kernel \"%.40s\": use auto, scalar, avx2 or avx512",
                   name);
}

const char *isa_name(enum isa isa) { return isa_names[isa]; }

int precision_parse(const char *name, enum precision *ret, struct err *err)
{
    for (int i = 0; i < PRECISIONS; i++)
        if (strcmp(name, precision_names[i]) == 0) {
            *ret = (enum precision)i;
            return ERR_OK;
        }
    return err_set(err, ERR_INVALID, "unknown precision \"%.40s\": use fast, exact or f32", name);
}

const char *precision_name(enum precision p) { return precision_names[p]; }
