/* lora_int.h - what lora.c, lora_finish.c, lora_avx2.c and lora_avx512.c share. */
#ifndef ENGINE_LORA_INT_H
#define ENGINE_LORA_INT_H

#include "engine/compute.h"
#include "engine/num.h"

#include <stddef.h>

/* y[m][o] = fma(u[m][j], b[j][o], y[m][o]) for j = 0 .. r-1 in turn, for M rows and n outputs; rows
 * of b `ldb` elements apart. */
typedef void (*lora_add_fn)(enum dtype t, const void *b, size_t ldb, int r, const float *u,
                            size_t ldu, int M, float *y, size_t ldy, int n);
void lora_add_scalar(enum dtype t, const void *b, size_t ldb, int r, const float *u, size_t ldu,
                     int M, float *y, size_t ldy, int n);
#if defined(__x86_64__)
void lora_add_avx2(enum dtype t, const void *b, size_t ldb, int r, const float *u, size_t ldu,
                   int M, float *y, size_t ldy, int n);
void lora_add_avx512(enum dtype t, const void *b, size_t ldb, int r, const float *u, size_t ldu,
                     int M, float *y, size_t ldy, int n);
#endif
lora_add_fn lora_add(enum isa isa);

#endif
