/* forward.h - one forward pass over the rows of a step, every row with its own adapters.
 *
 * A step is a list of spans; a span is consecutive positions of one sequence.  All rows go
 * through each linear layer of the base together; then, for each group of rows with the same
 * lora_set, U = X A^T and Y += (U * gain * weight) B^T (lora.h).  Rows without adapters pay
 * nothing.  Results of a row depend on its sequence alone (compute.h).
 *
 * A `struct forward` is a workspace for at most `max_rows` rows and `max_logits` rows of logits,
 * allocated once; it belongs to one thread (the engine's), which is also the pool's caller. */
#ifndef ENGINE_FORWARD_H
#define ENGINE_FORWARD_H

#include "engine/adapter.h"
#include "engine/base.h"
#include "engine/compute.h"
#include "engine/kv.h"

struct span {
    struct kv_seq *kv;            /* pages reserved up to pos + n; not committed by forward() */
    int pos;                      /* position of the first row = kv->len */
    int n;                        /* rows */
    const int32_t *tokens;        /* [n] */
    const struct lora_set *lora;  /* never NULL; n = 0 for the bare base */
    int nlogits;                  /* logits are wanted for the last `nlogits` rows, 0..n */
};

struct forward;
/* Bytes that forward_create() takes (for the memory plan). */
size_t forward_bytes(const struct base *b, int max_rows, int max_logits);
/* `context`: as many positions as a sequence may get, at most the model's; it chooses the angles of
 * models that have two sets of them (rope.h), nothing else. */
int forward_create(const struct base *b, const struct compute *c, struct kv_cache *kv, int context,
                   int max_rows, int max_logits, struct forward **ret, struct err *err);
void forward_destroy(struct forward *f); /* NULL is fine */

/* Sum of n <= max_rows, sum of nlogits <= max_logits; tokens are in 0..V-1; positions below the
 * model's max_positions.  Spans with equal lora_sets should be neighbours (they are computed
 * together).  Returns logits [sum of nlogits][V], valid until the next call.  Never fails: all
 * memory is there. */
const float *forward_run(struct forward *f, const struct span *spans, int nspans);

#endif
