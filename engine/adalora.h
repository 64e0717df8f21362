/* adalora.h - AdaLoRA's orthogonality term, importance, budget and masks.
 *
 * Zhang et al., arXiv 2303.10512, as PEFT's AdaLoraModel and RankAllocator compute it (which
 * differs from the paper: the norm is not squared and averaged over the matrices, importance uses
 * the parameters after the step).  A module's change is B diag(E) A; triplet i is row i of A,
 * column i of B and E_i.
 *
 * In a step: gradients of the loss; adalora_orth(); clipping; optim_step(); adalora_update(); only
 * then are the gradients zeroed.
 *
 *   orth         w / K * sum of ||A A^T - I||_F and ||B^T B - I||_F over the K = 2 n matrices
 *   importance   I = |p g| with p after the step and g as it went into it, for every scalar;
 *                M = beta1 M + (1 - beta1) I,  U = beta2 U + (1 - beta2) |I - M|,  s = M U
 *                S_i = s(E_i) + mean of s over row i of A + mean of s over column i of B
 *   budget       B0 = sum of r, BT = target_r * n, t_end = total_step - tfinal
 *                step <= tinit: B0;  up to t_end: trunc((B0 - BT) (1 - (step - tinit) /
 *                (t_end - tinit))^3 + BT);  then BT
 *   mask         tinit < step < t_end and step % deltaT == 0, and at t_end in any case: E_i = 0
 *                where S_i is at or below the k-th smallest S of all modules, k = B0 - budget (none
 *                for k = 0; ties may zero more).  A, B, gradients and moments are not touched, so a
 *                zeroed E comes back with the next optimiser step and is ranked again ...
 *   final        ... until t_end, where importance is not updated any more and the choice is made
 *                for good: from then on E is masked after every step, and the averages are freed.
 * A run whose step count never reaches t_end has no final mask, as in PEFT.
 *
 * Threads: an adalora belongs to one thread at a time, which is also the caller of the pool; no bit
 * depends on the number of threads. */
#ifndef ENGINE_ADALORA_H
#define ENGINE_ADALORA_H

#include "engine/compute.h"
#include "engine/util.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct adalora_module {
    float *A, *gA; /* [r][in], with gradients */
    float *B, *gB; /* [out][r] */
    float *E, *gE; /* [r] */
    int r, in, out;
};

struct adalora_opts {
    int target_r;
    int64_t tinit, tfinal, deltaT, total_step;
    double beta1, beta2;
    double orth_reg_weight;
    bool keep_all; /* prune nothing: final from the start with every triplet kept (a run that goes
                      on from a pruned adapter); of the rest only orth_reg_weight counts */
};

struct adalora;

/* The list is copied, the tensors stay the caller's and must outlive it.  ERR_INVALID if the
 * schedule makes no sense (tinit >= total_step - tfinal, deltaT < 1, target_r above the mean r,
 * ...); ERR_NOMEM. */
int adalora_create(const struct adalora_opts *o, const struct adalora_module *modules, size_t n,
                   struct adalora **ret, struct err *err);
void adalora_destroy(struct adalora *a); /* NULL is fine */

/* Returns the orthogonality term and adds scale times its gradient to gA and gB (a matrix that is
 * orthogonal to the last bit has none). */
double adalora_orth(struct adalora *a, const struct compute *c, double scale);

struct adalora_report {
    int64_t budget;   /* triplets that may stay */
    bool masked;      /* E was masked in this step */
    bool final;       /* the masks will not change any more */
    int64_t k;        /* triplets to zero: B0 - budget if they were ranked in this step, else 0 */
    double threshold; /* S at or below which E was zeroed; NAN if nothing was ranked, or k = 0 */
    int64_t kept;     /* triplets whose E is not 0 now */
};
/* After the optimiser's step; `step` counts as PEFT's update_and_allocate() does: usually from 0.
 */
void adalora_update(struct adalora *a, const struct compute *c, int64_t step,
                    struct adalora_report *ret);
/* The budget of a step, without doing anything. */
int64_t adalora_budget(const struct adalora *a, int64_t step);

/* 1 = kept, for every triplet of every module in order; NULL until it is final.  Borrowed, and so
 * is the other: S of every triplet as of the last step that computed it, NULL if none has. */
const uint8_t *adalora_mask(const struct adalora *a, size_t *ret_n);
const float *adalora_scores(const struct adalora *a, size_t *ret_n);

/* Bytes of the averages of one module of these shapes. */
size_t adalora_module_bytes(int r, int in, int out);
/* What adalora_save() appends now: averages (none once final), scores, masks, a few dozen bytes. */
size_t adalora_state_bytes(const struct adalora *a);
/* Exact, little-endian.  ERR_NOMEM or ERR_TOO_LARGE leave `ret` as it was. */
int adalora_save(const struct adalora *a, struct buf *ret, struct err *err);
/* Back into one made with the same modules and options; *at and *left move past what was read.
 * ERR_INVALID if it is not that or damaged; ERR_NOMEM; nothing has changed then. */
int adalora_restore(struct adalora *a, const void **at, size_t *left, struct err *err);

#endif
