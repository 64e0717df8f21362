/* optim.h - AdamW over a list of tensors, and the learning rate of each step.
 *
 * Step t = 1, 2, ... of a tensor with gradient g, as torch.optim.AdamW computes it (Loshchilov and
 * Hutter, arXiv 1711.05101), fp32 element by element; rate = lr * lr_scale:
 *     p -= rate * weight_decay * p
 *     m = beta1 m + (1 - beta1) g       v = beta2 v + (1 - beta2) g^2
 *     p -= rate / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)
 *
 * Moments of 8 bits (Dettmers et al., arXiv 2110.02861, as AdamW8bit of bitsandbytes keeps them):
 * blocks of 256 elements; per block the largest |m| and |v|, per element the nearest code of m /
 * max in the signed and of v / max in the unsigned dynamic map.  A step decodes, updates as above
 * in fp32, applies, and encodes again.  A negative m never becomes 0; nor, unlike there, does a
 * positive v: where an element's gradients are 10^-4 of the largest of its block, what is kept of m
 * would be divided by eps alone.  Tensors of fewer than 4096 elements keep fp32.
 *
 * Threads: an optim belongs to one thread at a time, which is also the caller of the pool.  Work is
 * cut in pieces of fixed size, so that no bit depends on the number of threads. */
#ifndef ENGINE_OPTIM_H
#define ENGINE_OPTIM_H

#include "engine/compute.h"
#include "engine/train.h"
#include "engine/util.h"

#include <stddef.h>
#include <stdint.h>

enum { OPTIM_BLOCK = 256, OPTIM_8BIT_LEAST = 4096 };

struct optim_tensor {
    float *p, *g; /* [n] parameters and gradient, borrowed */
    size_t n;
    double lr_scale; /* LoRA+: 1, or the ratio for B */
};

struct optim;

/* Moments zero, no step done.  The list is copied, the tensors stay the caller's and must outlive
 * the optim.  ERR_NOMEM. */
int optim_create(const struct optim_tensor *tensors, size_t n, enum train_moments moments,
                 double beta1, double beta2, double eps, double weight_decay, struct optim **ret,
                 struct err *err);
void optim_destroy(struct optim *o); /* NULL is fine */

/* |g| over all tensors together, summed in double in one order; NaN or infinite if a gradient is.
 */
double optim_grad_norm(const struct optim *o);
void optim_scale_grads(struct optim *o, float by);
void optim_zero_grads(struct optim *o);
/* One step.  Gradients are left as they are. */
void optim_step(struct optim *o, const struct compute *c, double lr);

/* Bytes of the moments of one tensor of n elements. */
size_t optim_moment_bytes(enum train_moments moments, size_t n);
/* What optim_save() appends: those of all tensors, and a few dozen bytes. */
size_t optim_state_bytes(const struct optim *o);
/* Step and moments, exact, little-endian.  ERR_NOMEM or ERR_TOO_LARGE leave `ret` as it was. */
int optim_save(const struct optim *o, struct buf *ret, struct err *err);
/* Back into an optim made with tensors of the same sizes and the same kind of moments; *at and
 * *left move past what was read.  ERR_INVALID if it is not that or damaged: nothing has changed
 * then. */
int optim_restore(struct optim *o, const void **at, size_t *left, struct err *err);

/* The values of the unsigned dynamic map, ascending (the signed one is nf4_dynamic8): 0; for each
 * of seven decades d = 0..6 the middles of 2^(d+1) equal parts of [0.1, 1] times 10^(d-6); 1. */
void optim_unsigned_map(float ret[256]);

/* The learning rate of step 1..steps.  W steps of warm-up: o->warmup * steps rounded up if that is
 * below 1, else o->warmup steps.  Up to W: lr * step / W (the first step learns, the W-th has all
 * of lr).  After that, with s = step - 1 steps done, as Hugging Face's schedulers at s: constant lr
 *     linear    lr (steps - s) / (steps - W)
 *     cosine    lr (1 + cos(pi (s - W) / (steps - W))) / 2
 * The same bits on every machine. */
double optim_lr(const struct train_opts *o, int64_t step, int64_t steps);

#endif
