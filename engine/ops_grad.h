/* ops_grad.h - derivatives of what a transformer block does beside linear layers and attention, and
 * the loss.
 *
 * Each takes what entered the operation of ops.h, dy (the loss's derivative by the result), and
 * gives the derivative by the input.  Rope needs none: its derivative is rope with the sine negated.
 *
 * Sums have one order (16 lanes, element i in lane i % 16, then dot_tree(); or double in 8 lanes) and
 * exponentials are ops->exp, so the bits do not depend on instruction set or threads, but for
 * the logarithm in the loss, which is libm's.
 *
 * Pure functions over caller memory; any thread.  n need not be a multiple of anything; dy never
 * overlaps a result. */
#ifndef ENGINE_OPS_GRAD_H
#define ENGINE_OPS_GRAD_H

#include "engine/ops.h"

#include <stdbool.h>
#include <stdint.h>

/* dx += the derivative by x, the norm's input (the bias of layernorm has no part in it).  dx overlaps
 * nothing. */
void grad_rmsnorm(const struct ops *ops, const float *x, const float *w, float eps, int n,
                  const float *dy, float *dx);
void grad_layernorm(const struct ops *ops, const float *x, const float *w, float eps, int n,
                    const float *dy, float *dx);

/* y = act(gate) * up: dgate = dy * up * act'(gate), dup = dy * act(gate).  dgate may be gate, dup may
 * be up.  gelu without a gate (y = gelu(gate)): up and dup NULL. */
void grad_silu_mul(const struct ops *ops, const float *gate, const float *up, const float *dy,
                   int n, float *dgate, float *dup);
void grad_gelu_tanh(const struct ops *ops, const float *gate, const float *up, const float *dy,
                    int n, float *dgate, float *dup);
void grad_gelu_erf(const struct ops *ops, const float *gate, const float *up, const float *dy,
                   int n, float *dgate, float *dup);

/* y is the capped result, c tanh(x / c): dy *= 1 - (y / c)^2. */
void grad_softcap(float c, const float *y, int n, float *dy);

/* Cross entropy of one row: returns -log softmax(logits)[target], and turns the logits into
 * scale * (softmax - onehot(target)).  *hit: the target is the most probable one (of equals, the
 * lowest).  0 <= target < V.  NaN or +inf among the logits make the loss NaN, -inf at the target
 * makes it infinite: the caller looks. */
double grad_cross_entropy(const struct ops *ops, float *logits, int V, int32_t target, float scale,
                          bool *hit);
/* The same value bit for bit, without the derivative. */
double loss_cross_entropy(const struct ops *ops, const float *logits, int V, int32_t target,
                          bool *hit);

#endif
