/* lora.h - Y += (X A^T * gain * weight) B^T for groups of rows with different adapters.
 *
 * Orders (compute.h): u_j = sum over k of x_k a_jk in 16 lanes with fused multiply-adds and the
 * fixed tree; then u_j *= gain_j * weight; then y_o = fma(u_j, b_jo, y_o) for j = 0, 1, ... r-1;
 * adapters of a set one after the other in its canonical order.
 *
 * Beside a product of the base:
 *     lora_begin(w, ...)                     X A^T, which needs x alone
 *     matmul_all(..., lora_epilogue(w))      adds U B^T to each tile of y when it is computed
 *     lora_end(w)                            ranks that had no room so far
 *     lora_finish(...)                       what replaces or scales outputs */
#ifndef ENGINE_LORA_H
#define ENGINE_LORA_H

#include "engine/adapter.h"
#include "engine/compute.h"
#include "engine/linear.h"

/* Rows [begin, end) share a set. */
struct lora_group {
    int begin, end;
    const struct lora_set *set;
};

/* Modules that share their input; at most PRODUCTS_MAX. */
struct lora_where {
    int layer;
    const enum module *mods;
    int nmods;
};

/* Of one use; what it points to is borrowed until lora_end(). */
struct lora_work {
    const struct compute *c;
    const struct lora_group *groups;
    int ngroups;
    struct lora_where where;
    const float *x;
    size_t ldx;
    float *const *y;
    const int *ldy;
    /* see lora.c */
    float *u;
    struct lora_term *terms;
    struct lora_ahead *ahead;
    int *columns, *first;
    int window, widest, nterms, tiles, strips, end[PRODUCTS_MAX], nahead, ahead_lines;
    const struct dot_ops *dot;
    void (*add)(enum dtype t, const void *b, size_t ldb, int r, const float *u, size_t ldu, int M,
                float *y, size_t ldy, int n);
    struct epilogue epilogue;
};

/* Floats of scratch that lora_begin() needs for at most `rows` rows. */
size_t lora_scratch(int rows);
/* For modules that share x (rows ldx apart): y[i] are their outputs, rows ldy[i] apart.  scratch:
 * lora_scratch(rows) floats, at a multiple of 8 bytes (64 is best).  The groups are all rows of the
 * products, in order.  `next`, or NULL: whose A is wanted after these products. */
void lora_begin(struct lora_work *w, const struct compute *c, const struct lora_group *groups,
                int ngroups, const struct lora_where *where, const struct lora_where *next,
                const float *x, int ldx, float *const *y, const int *ldy, float *scratch);
/* For the products of the same modules in the same order; NULL if there is nothing to add or to
 * fetch. */
const struct epilogue *lora_epilogue(struct lora_work *w);
void lora_end(struct lora_work *w);
/* All of it where y is there already. */
void lora_apply(const struct compute *c, const struct lora_group *groups, int ngroups,
                const struct lora_where *where, const float *x, int ldx, float *const *y,
                const int *ldy, float *scratch);
/* x += weight * (the adapter's change of the embedding of `token`), which is sum over j of
 * (a_tj * gain_j * weight) b_jo, one fused multiply-add each in ascending j. */
void lora_embed(const struct compute *c, const struct adapter *a, float weight, int32_t token,
                float *x);
/* Last: biases inside lora_B, biases that replace the base's (bias[i], or NULL), DoRA's scales.
 * Groups without any of these are not touched. */
void lora_finish(const struct compute *c, const struct lora_group *groups, int ngroups, int layer,
                 const enum module *mods, int nmods, const float *const *bias, float *const *y,
                 const int *ldy);

#endif
