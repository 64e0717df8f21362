/* support_linear.c - random matrices of every type, with the weights they stand for. */
#include "tests/support_linear.h"
#include "engine/nf4.h"
#include "engine/num.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

uint64_t gauss_seed;

static double uniform(void) /* (0, 1) */
{
    gauss_seed = gauss_seed * 6364136223846793005u + 1442695040888963407u;
    return ((double)(gauss_seed >> 11) + 0.5) * 0x1p-53;
}

float gauss(void)
{
    double r = sqrt(-2.0 * log(uniform()));
    return (float)(r * cos(6.283185307179586 * uniform()));
}

void *get_aligned(size_t bytes)
{
    void *p = aligned_alloc(64, (bytes + 127) / 64 * 64);
    assert_non_null(p);
    return p;
}

static void fill_nf4(struct weights *w, const float *dense, bool flat)
{
    const size_t N = (size_t)w->m.N, K = (size_t)w->m.K, n = N * K;
    uint8_t *packed = get_aligned(nf4_bytes(n));
    float *absmax = get_aligned(nf4_blocks(n) * sizeof *absmax),
          *back = get_aligned(n * sizeof *back);
    q4_quantize(Q4_NF4, dense, n, packed, absmax);
    q4_dequantize(Q4_NF4, packed, absmax, n, back);
    for (size_t i = 0; i < n; i++)
        w->exact[i] = (double)back[i];
    free(back);
    if (flat) {
        w->codes = packed;
        w->s32 = absmax;
        return;
    }
    w->codes = get_aligned(p16_bytes(N, K));
    w->s16 = get_aligned(p16_scales(N, K) * sizeof *w->s16);
    w->s32 = get_aligned(p16_scales(N, K) * sizeof *w->s32);
    p16_pack(packed, N, K, w->codes);
    p16_scales_from(absmax, N, K, w->s16, w->s32);
    free(packed);
    free(absmax);
}

struct weights make_weights(enum mat_type type, int N, int K)
{
    const size_t n = (size_t)N * (size_t)K;
    struct weights w = { .m = { .type = type, .N = N, .K = K } };
    float *dense = get_aligned(n * sizeof *dense);
    for (size_t i = 0; i < n; i++)
        dense[i] = 0.02f * gauss();
    w.exact = get_aligned(n * sizeof *w.exact);
    for (size_t i = 0; i < n; i++)
        w.exact[i] = (double)dense[i];
    switch (type) {
    case MAT_F32:
        w.codes = get_aligned(n * sizeof *dense);
        memcpy(w.codes, dense, n * sizeof *dense);
        break;
    case MAT_BF16:
        w.codes = get_aligned(n * sizeof(uint16_t));
        for (size_t i = 0; i < n; i++) {
            ((uint16_t *)w.codes)[i] = f32_to_bf16(dense[i]);
            w.exact[i] = (double)bf16_to_f32(((uint16_t *)w.codes)[i]);
        }
        break;
    case MAT_F16:
        w.codes = get_aligned(n * sizeof(uint16_t));
        for (size_t i = 0; i < n; i++) {
            ((uint16_t *)w.codes)[i] = f32_to_f16(dense[i]);
            w.exact[i] = (double)f16_to_f32(((uint16_t *)w.codes)[i]);
        }
        break;
    case MAT_NF4_P16:
    case MAT_NF4_FLAT:
        fill_nf4(&w, dense, type == MAT_NF4_FLAT);
        break;
    case MAT_Q8_P16:
        w.codes = get_aligned(q8_bytes((size_t)N, (size_t)K));
        w.s16 = get_aligned(p16_scales((size_t)N, (size_t)K) * sizeof *w.s16);
        q8_pack(dense, (size_t)N, (size_t)K, w.codes, w.s16);
        break;
    }
    free(dense);
    w.m.codes = w.codes;
    w.m.scales16 = w.s16;
    w.m.scales32 = w.s32;
    return w;
}

void free_weights(struct weights *w)
{
    free(w->codes);
    free(w->s16);
    free(w->s32);
    free(w->exact);
}

float *random_rows(int M, int ldx)
{
    float *x = get_aligned((size_t)M * (size_t)ldx * sizeof *x);
    for (size_t i = 0; i < (size_t)M * (size_t)ldx; i++)
        x[i] = gauss();
    return x;
}

bool usable(enum isa isa)
{
    enum isa same;
    return isa_select(isa_name(isa), &same, NULL) == ERR_OK;
}

void announce_missing(void)
{
    for (int isa = 0; isa < ISA_COUNT; isa++)
        if (!usable((enum isa)isa))
            print_message("SKIPPED: this CPU cannot run the %s kernels\n", isa_name((enum isa)isa));
}

const enum mat_type all_types[TYPES] = { MAT_F32,     MAT_BF16,     MAT_F16,
                                         MAT_NF4_P16, MAT_NF4_FLAT, MAT_Q8_P16 };
const char *const type_names[TYPES] = { "f32", "bf16", "f16", "nf4", "nf4 flat", "8 bit" };
