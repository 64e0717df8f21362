/* train_args.h - what the commands and the job runner that train share: options of a run from flags,
 * data from files, whether a run fits in memory, and what a step did as JSON.  One thread each. */
#ifndef SERVER_TRAIN_ARGS_H
#define SERVER_TRAIN_ARGS_H

#include "engine/chat_template.h"
#include "engine/dataset.h"
#include "engine/train.h"
#include "server/options.h"
#include "server/session.h"

#include <jansson.h>

/* For the table of a command; the defaults are those of train_opts_init(). */
#define TRAIN_OPTIONS                                                                             \
    { "method", 0, "lora|rslora|dora|adalora", "lora", "what is trained", false },                \
    { "rank", 'r', "N", "16", "rank of every module; AdaLoRA: target_r, the mean at the end",     \
      false },                                                                                    \
    { "alpha", 0, "X", NULL, "lora_alpha [twice the rank]", false },                              \
    { "dropout", 0, "P", "0", "of what goes into the adapter", false },                           \
    { "target-modules", 0, "NAME,...", NULL, "as PEFT names them [every linear layer]", false },  \
    { "rank-pattern", 0, "NAME=N,...", NULL, "other ranks for some modules", false },             \
    { "alpha-pattern", 0, "NAME=X,...", NULL, "other alphas for some modules", false },           \
    { "init", 0, "default|gaussian|normal", "default",                                            \
      "first values of A: PEFT's, N(0, 1/r^2), N(0, 1)", false },                                 \
    { "init-r", 0, "N", NULL, "AdaLoRA: rank at the start [one and a half times --rank]", false }, \
    { "tinit", 0, "N", NULL, "AdaLoRA: steps before pruning [a tenth]", false },                  \
    { "tfinal", 0, "N", NULL, "AdaLoRA: steps at the end with final ranks [a fifth]", false },    \
    { "deltaT", 0, "N", "1", "AdaLoRA: steps between two cuts", false },                          \
    { "adalora-beta1", 0, "X", "0.85", "AdaLoRA: smoothing of the sensitivity", false },          \
    { "adalora-beta2", 0, "X", "0.85", "AdaLoRA: smoothing of the uncertainty", false },          \
    { "orth-reg-weight", 0, "X", "0.5", "AdaLoRA: weight of the orthogonality term", false },     \
    { "seed", 's', "N", "42", "first values, order of the data, dropout", false },                \
    { "epochs", 0, "N", "3", "times through the data", false },                                   \
    { "max-steps", 0, "N", "0", "steps instead of epochs (0: epochs)", false },                   \
    { "batch", 0, "N", "8", "examples at once", false },                                          \
    { "accumulate", 0, "N", "1", "batches per step", false },                                     \
    { "micro-tokens", 0, "N", "0", "rows at once (0: the longest example, at least 512)", false }, \
    { "max-length", 0, "N", "0", "longer examples are cut (0: the model's positions)", false },   \
    { "no-shuffle", 0, NULL, NULL, "examples in the order of the file", false },                  \
    { "lr", 0, "X", "2e-4", "highest learning rate", false },                                     \
    { "lr-b-ratio", 0, "X", "1", "LoRA+: learning rate of B over that of A", false },             \
    { "schedule", 0, "constant|linear|cosine", "linear", "of the learning rate", false },         \
    { "warmup", 0, "X", "0.03", "part of the steps, or from 1 on their number", false },          \
    { "adam-beta1", 0, "X", "0.9", "AdamW", false },                                              \
    { "adam-beta2", 0, "X", "0.999", "AdamW", false },                                            \
    { "adam-eps", 0, "X", "1e-8", "AdamW", false },                                               \
    { "weight-decay", 0, "X", "0", "AdamW", false },                                              \
    { "clip", 0, "X", "1", "largest norm of the gradient (0: any)", false },                      \
    { "moments", 0, "f32|8bit", "f32", "how AdamW's moments are kept", false },                   \
    { "eval-every", 0, "N", "0", "steps between looks at --valid (0: at the end)", false },       \
    { "patience", 0, "N", "0", "stop after N looks without a better loss (0: never)", false },    \
    { "checkpoint-every", 0, "N", "0", "steps between saved states (0: a tenth)", false },        \
    { "dtype", 0, "f32|bf16", "f32", "how the adapter is stored", false }

/* 0, or 2 after a sentence.  train_opts_free() *ret. */
int train_args_read(const struct opts *o, struct train_opts *ret);

/* dataset_tokens() of "FILE:TENSOR"; max_length 0: the model's positions.  ret_path (may be NULL): FILE,
 * free() it, also on failure. */
int train_args_tokens(const struct base *base, const char *spec, int64_t max_length,
                      char **ret_path, struct train_set **ret, struct err *err);

/* Does the run fit into `left` bytes?  Beside what train_estimate() counts it needs room for one copy of
 * its state.  `why` says where `left` comes from and ends the sentence of the refusal
 * (ERR_TOO_LARGE, slug "out_of_memory"). */
int train_args_fits(const struct train_estimate *e, size_t left, const char *why, struct err *err);
size_t train_args_bytes(const struct train_estimate *e);
/* How much of `left` bytes a run that fits may have for values that it need not compute again then
 * (train_opts.keep_bytes): half of what it leaves, at most what is of use. */
size_t train_args_keep(const struct train_estimate *e, size_t left);

/* "1 h 12 min", "45 s". */
const char *train_args_time(double seconds, char ret[32]);

/* One step as JSON; `v` NULL: no look at the validation set.  A new reference, or NULL. */
json_t *train_args_step_json(const struct train_report *r, const struct train_valid *v);

#endif
