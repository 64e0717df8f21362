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
/* x += weight * (the adapter's change of the embedding of `token`), which is sum over j of
 * (a_tj * gain_j * weight) b_jo, one fused multiply-add each in ascending j. */
void lora_embed(const struct compute *c, const struct adapter *a, float weight, int32_t token,
                float *x);
/* After lora_apply() with the same arguments: biases inside lora_B, biases that replace the base's
 * (bias[i], or NULL), DoRA's scales.  Groups without any of these are not touched. */
void lora_finish(const struct compute *c, const struct lora_group *groups, int ngroups, int layer,
                 const enum module *mods, int nmods, const float *const *bias, float *const *y,
                 const int *ldy);

#endif
