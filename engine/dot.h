/* dot.h - fp32 dot products and scaled additions in one fixed order.
 *
 * The order of every fp32 dot product of the engine (dense weights, LoRA, attention): sixteen
 * lanes, lane l takes elements l, l + 16, l + 32, ... with one fused multiply-add each, starting
 * from +0; when n is not a multiple of 16 the lanes past the end take 0 * 0 in the last step.
 * Then the tree: lane l += lane l + 8 (l < 8), then + 4, + 2, + 1.  axpy is one fused multiply-add
 * per element.  The scalar code in dot.c is the definition; the vector code gives the same bits
 * (but a NaN is a NaN: its sign and payload may differ).
 *
 * Rows may have any alignment.  Pure functions: any thread may call. */
#ifndef ENGINE_DOT_H
#define ENGINE_DOT_H

#include "engine/compute.h"
#include "engine/num.h"

#include <stddef.h>
#include <stdint.h>

/* x is fp32; w is fp32, bf16 or fp16, widened exactly. */
struct dot_ops {
    /* sum of x[i] * w[i] */
    float (*dot_f32)(const float *x, const float *w, size_t n);
    float (*dot_bf16)(const float *x, const uint16_t *w, size_t n);
    float (*dot_f16)(const float *x, const uint16_t *w, size_t n);
    /* For dot products cut into parts: the lanes go on from where they are.  All parts but the
     * last are a multiple of 16 long; begin with zeros, end with dot_tree(). */
    void (*lanes_f32)(const float *x, const float *w, size_t n, float lane[16]);
    /* y[m * ldy + n] = dot(row m of x, row n of w): M x N of them, blocked so that operands are
     * read from memory once per few rows.  ld*: elements from row to row. */
    void (*dots_f32)(const float *x, size_t ldx, int M, const float *w, size_t ldw, int N, size_t K,
                     float *y, size_t ldy);
    void (*dots_bf16)(const float *x, size_t ldx, int M, const uint16_t *w, size_t ldw, int N,
                      size_t K, float *y, size_t ldy);
    void (*dots_f16)(const float *x, size_t ldx, int M, const uint16_t *w, size_t ldw, int N,
                     size_t K, float *y, size_t ldy);
    /* y[i] = fma(a, w[i], y[i]) */
    void (*axpy_f32)(float a, const float *w, float *y, size_t n);
    void (*axpy_bf16)(float a, const uint16_t *w, float *y, size_t n);
    void (*axpy_f16)(float a, const uint16_t *w, float *y, size_t n);
};

const struct dot_ops *dot_ops(enum isa isa);

/* The sum of sixteen lanes; they are overwritten. */
float dot_tree(float lane[16]);

#endif
