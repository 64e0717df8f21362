/* train.h - fine-tuning: an adapter learned on the frozen base.
 *
 * One `struct train` is one run: the trainable tensors with their gradients and moments, the
 * workspace of forward and backward, and where in the data the run stands.  The base is only read
 * (the very bytes that serve), dX passes through its packed weights, and gradients exist for the
 * adapter's tensors alone.  A step is:
 *   the next `batch` examples, packed into micro-batches of at most `micro_tokens` rows (no row
 *   sees another example's);  per micro-batch: forward, keeping what enters each block;  loss;
 *   backward, each block that was not kept (keep_bytes) computed once more first;  gradients add up;
 *   AdaLoRA's orthogonality term;  clipping;  AdamW;  AdaLoRA's importance, budget and mask.
 * The loss of a step is the mean over all its target tokens, in whatever micro-batches they lie.
 *
 * Determinism: data, options, seed, CPU type and BLAS core decide every bit; the number of threads
 * and being stopped and resumed do not.  All random numbers are counter based (train_rand.h).
 *
 * Threads: a train belongs to one thread at a time, which is also the caller of compute->pool;
 * nothing in it is shared with serving but the immutable base, and no lock is ever held.
 *
 * Sources: LoRA (arXiv 2106.09685), rsLoRA (2312.03732), QLoRA (2305.14314), DoRA (2402.09353),
 * LoRA+ (2402.12354), AdaLoRA (2303.10512), as PEFT computes them. */
#ifndef ENGINE_TRAIN_H
#define ENGINE_TRAIN_H

#include "engine/adapter.h"
#include "engine/base.h"
#include "engine/compute.h"
#include "engine/util.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* --- data: token ids, and which of them are to be learned ------------------------------------ */
struct train_example {
    const int32_t *tokens; /* [n], n >= 2 */
    const uint8_t *learn;  /* [n]: 1 if predicting this token counts; the first never does */
    int n;
};
struct train_set {
    size_t n;
    struct train_example *examples;
    uint64_t tokens, targets; /* sums over all examples */
    uint8_t hash[32];         /* of ids and learn, in order: what a resumed run compares */
    void *own;                /* memory of whoever made it (dataset.h) */
};

/* --- options --------------------------------------------------------------------------------- */
enum train_init {
    TRAIN_INIT_DEFAULT,  /* PEFT's: A uniform in +-1/sqrt(in), B zero; AdaLoRA: both N(0, 0.02^2), E zero */
    TRAIN_INIT_GAUSSIAN, /* A ~ N(0, (1/r)^2), B zero */
    TRAIN_INIT_NORMAL,   /* A ~ N(0, 1), B zero: the classic note */
};
enum train_schedule { TRAIN_CONSTANT, TRAIN_LINEAR, TRAIN_COSINE };
enum train_moments { TRAIN_MOMENTS_F32, TRAIN_MOMENTS_8BIT };

/* One key of rank_pattern and alpha_pattern, in PEFT's sense. */
struct train_pattern {
    char *pattern;
    int rank;      /* 0: not changed */
    double alpha;  /* 0: not changed */
};

/* train_opts_init() fills in the defaults, which are QLoRA's recipe where it has one. */
struct train_opts {
    enum adapter_method method;
    enum train_init init;
    int rank;                 /* 16; AdaLoRA: target_r */
    double alpha;             /* 0: twice the rank (AdaLoRA: twice target_r) */
    double dropout;           /* 0 */
    char **targets;           /* names as in PEFT's target_modules list; none: every linear layer */
    size_t ntargets;
    struct train_pattern *patterns;
    size_t npatterns;
    struct {
        int init_r;           /* 0: rank * 3 / 2 */
        int tinit, tfinal;    /* -1: a tenth and a fifth of the steps; tfinal is at least 1 */
        int deltaT;           /* 1 */
        double beta1, beta2;  /* 0.85 */
        double orth_reg_weight; /* 0.5 */
    } adalora;

    uint64_t seed;            /* 42 */
    int epochs;               /* 3; used when max_steps is 0 */
    int64_t max_steps;        /* 0: as many as epochs need */
    int batch;                /* 8: examples per optimiser step */
    int accumulate;           /* 1: a step takes batch * accumulate examples, `batch` at a time */
    int micro_tokens;         /* 0: as many rows at once as the longest example, at least 512 */
    size_t keep_bytes;        /* 0: memory for values of blocks that need not be computed again on
                               * the way back; up to a fourth less time, the same bits */
    int max_length;           /* 0: the model's context; longer examples are cut at the end */
    bool shuffle;             /* true: a new order each epoch */

    double lr;                /* 2e-4 */
    double lr_b_ratio;        /* 1: LoRA+'s lr of B over lr of A */
    enum train_schedule schedule; /* TRAIN_LINEAR */
    double warmup;            /* 0.03: part of all steps; >= 1: steps */
    double beta1, beta2, eps, weight_decay; /* 0.9, 0.999, 1e-8, 0 */
    double clip;              /* 1: largest norm of the gradient; 0: none */
    enum train_moments moments;

    int64_t eval_every;       /* 0: at the end only; steps between looks at the validation set */
    int patience;             /* 0: never stop early; evaluations without a better loss */
    int64_t checkpoint_every; /* 0: a tenth of the steps, at least 10 */
    enum dtype dtype;         /* DT_F32, or DT_BF16: how the finished adapter is stored */
};
void train_opts_init(struct train_opts *o);
void train_opts_free(struct train_opts *o); /* what it owns; NULL is fine */
int train_opts_copy(const struct train_opts *o, struct train_opts *ret, struct err *err);
/* ERR_INVALID names the option that makes no sense: ranges, AdaLoRA's tinit < total - tfinal, ... */
int train_opts_check(const struct train_opts *o, struct err *err);

/* --- what a run will take (train_estimate.c) --------------------------------------------------- */
struct train_estimate {
    int64_t steps;
    uint64_t trainable;      /* scalars */
    size_t state_bytes;      /* tensors, gradients, moments, AdaLoRA's averages */
    size_t work_bytes;       /* activations and scratch at the peak, with what keep_bytes allows */
    size_t keep_all;         /* what keep_bytes has to be for nothing to be computed again */
    size_t bytes;            /* both: what is taken beside the base */
    double seconds_per_step; /* from a short measurement of this base on these threads */
    double seconds;
};
/* ERR_INVALID if options, data and base do not go together.  Takes part of a second: it times one
 * layer. */
int train_estimate(const struct base *base, const struct compute *c, const struct train_opts *o,
                   const struct train_set *data, const struct train_set *valid,
                   const struct adapter_src *from, struct train_estimate *ret, struct err *err);

/* --- a run --------------------------------------------------------------------------------- */
struct train;

/* `from`: a version whose values the run starts with (same method; ranks, alphas and targets are
 * its own then; AdaLoRA goes on with the triplets that were kept, and prunes no more); NULL: new.
 * Everything passed is borrowed until train_destroy(), but o is copied and `from` is not kept.
 * c->precision: PREC_EXACT is the quick path (linear layers of the base in `exact`, dX in bf16 or
 * fp32): the gradient as a whole is within 1 % of fp32's, measured 0.1 %.  PREC_FAST for the hurried:
 * within 5 %, measured 2.6 %.  PREC_F32 computes everything in fp32, for traces and gradient checks,
 * and needs a base with its fp32 scales. */
int train_create(const struct base *base, const struct compute *c, const struct train_opts *o,
                 const struct train_set *data, const struct train_set *valid,
                 const struct adapter_src *from, struct train **ret, struct err *err);
void train_destroy(struct train *t); /* NULL is fine */

/* Rank of one module as it stands: triplets whose E is not masked (AdaLoRA), or the rank. */
struct train_rank {
    int layer, module; /* enum module */
    int rank, init_rank;
};
/* What one optimiser step did. */
struct train_report {
    int64_t step, steps;     /* 1..steps */
    double epoch;            /* examples seen so far / examples */
    double loss;             /* cross entropy, mean over target tokens */
    double orth;             /* AdaLoRA's term as it is added; else 0 */
    double accuracy;         /* part of target tokens that were the most probable */
    double lr;
    double grad_norm;        /* before clipping */
    uint64_t tokens, targets; /* of this step */
    double seconds;
    int64_t budget;          /* AdaLoRA: triplets that may stay; -1: not AdaLoRA */
    double threshold;        /* AdaLoRA: importance at or below which E was zeroed; NAN: no mask */
    int64_t kept;            /* AdaLoRA: triplets whose E is not 0 */
};
struct train_valid { double loss, accuracy; uint64_t targets; };

/* Called between pieces of work, a few times a second: true means stop now.  Whoever gets true
 * loses the step that was under way and nothing else. */
typedef bool (*train_stop_fn)(void *ud);

/* The next step.  ERR_CANCELLED if `stop` said so (the run is as it was before the step); ERR_INVALID
 * if the loss is not a number any more (says at which step); ERR_CONFLICT after the last step. */
int train_step(struct train *t, train_stop_fn stop, void *ud, struct train_report *ret,
               struct err *err);
/* Mean loss over a set, without changing anything but the workspace. */
int train_evaluate(struct train *t, const struct train_set *set, train_stop_fn stop, void *ud,
                   struct train_valid *ret, struct err *err);
int64_t train_steps(const struct train *t);    /* of the whole run */
int64_t train_step_now(const struct train *t); /* done */
/* Ranks now, ascending by (layer, module); borrowed until the next call. */
const struct train_rank *train_ranks(struct train *t, size_t *ret_n);
/* AdaLoRA: importance of each triplet, [sum of init_rank], in the order of train_ranks(), as of the
 * last step that computed it; NULL if none has. */
const float *train_importance(const struct train *t, size_t *ret_n);

/* Everything that resuming needs (tensors, moments, averages, step, place in the data, options and
 * the hashes of base and data), appended to `ret`; and back into a train made with the same
 * arguments.  ERR_INVALID if it is not that, or damaged. */
int train_save(const struct train *t, struct buf *ret, struct err *err);
int train_restore(struct train *t, const void *state, size_t len, struct err *err);
/* After train_restore(): NULL if the run goes on with the precision, the instruction set and the BLAS
 * core that it had, else what it had ("exact avx512 SkylakeX"): then its bits are not those of an
 * uninterrupted run.  Borrowed. */
const char *train_elsewhere(const struct train *t);

/* The adapter as it stands, with adapter_config.json in PEFT's form: what peft_parse() would give
 * for the files PEFT would write.  AdaLoRA is pruned once its masks are final. */
int train_export(struct train *t, struct adapter_src **ret, struct err *err);

/* --- the whole run (train_loop.c): what the command line and the job runner share ---------------- */
enum train_event { TRAIN_GO_ON, TRAIN_PAUSE, TRAIN_CANCEL };
struct train_hooks {
    void *ud;
    /* What is wanted of the run; asked often, from the run's thread.  Whoever has asked it to stop
     * goes on asking until train_loop() returns. */
    enum train_event (*wanted)(void *ud);
    /* After each step, and after each look at the validation set (v NULL: none this time).  A
     * failure ends the run with it. */
    int (*step)(void *ud, struct train *t, const struct train_report *r,
                const struct train_valid *v, struct err *err);
    /* Keep this state: every checkpoint_every steps, when the run pauses (but not while it looks at the
     * validation set: then it goes on from the state before), and at the end.  A failure ends the run
     * with it (nothing is lost but what came after the last one kept). */
    int (*checkpoint)(void *ud, struct train *t, const struct train_report *r,
                      const struct train_valid *v, struct err *err);
};
enum train_end { TRAIN_DONE, TRAIN_EARLY, TRAIN_PAUSED, TRAIN_CANCELLED };
/* From where the train stands to its end.  With validation and patience the result is the best
 * adapter seen (AdaLoRA: from its final budget on): train_export() gives that one afterwards. */
int train_loop(struct train *t, const struct train_hooks *h, enum train_end *ret, struct err *err);

#endif
