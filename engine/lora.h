/* lora.h - Y += (X A^T * gain * weight) B^T for groups of rows with different adapters.
 *
 * Orders (compute.h): u_j = sum over k of x_k a_jk in 16 lanes with fused multiply-adds and the
 * fixed tree; then u_j *= gain_j * weight; then y_o = fma(u_j, b_jo, y_o) for j = 0, 1, ... r-1;
 * adapters of a set one after the other in its canonical order. */
#ifndef ENGINE_LORA_H
#define ENGINE_LORA_H

#include "engine/adapter.h"
#include "engine/compute.h"

/* Rows [begin, end) share a set. */
struct lora_group {
    int begin, end;
    const struct lora_set *set;
};

/* Floats of scratch that lora_apply() needs for at most `rows` rows. */
size_t lora_scratch(int rows);
/* For the `nmods` modules of `layer` that share the input x (rows ldx apart): y[i] are their
 * outputs, rows ldy[i] apart.  scratch: lora_scratch(rows) floats. */
void lora_apply(const struct compute *c, const struct lora_group *groups, int ngroups, int layer,
                const enum module *mods, int nmods, const float *x, int ldx, float *const *y,
                const int *ldy, float *scratch);

#endif
