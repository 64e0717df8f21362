/* train_params.h - the `method` of a fine-tuning job as JSON, and as options of the trainer.
 *
 * {"type": "lora"|"rslora"|"dora"|"adalora", "<type>": {...}}, with a field for every option of
 * struct train_opts (docs/fine-tuning-api.md has the table), or OpenAI's {"type": "supervised",
 * "supervised": {"hyperparameters": {...}}}, which is a LoRA with the default settings. */
#ifndef API_TRAIN_PARAMS_H
#define API_TRAIN_PARAMS_H

#include "engine/train.h"

#include <jansson.h>

/* Fills *ret (train_opts_free() it) from defaults and `method`, which may be NULL or null: defaults.
 * ERR_INVALID names an unknown field or a value that makes no sense; *ret is empty then. */
int api_train_params(json_t *method, struct train_opts *ret, struct err *err);
/* The same options with every field spelled out: api_train_params() makes equal ones of it.  A new
 * reference, or NULL: out of memory. */
json_t *api_train_params_json(const struct train_opts *o);
/* OpenAI's hyperparameters (batch_size, learning_rate_multiplier, n_epochs; "auto" is the default)
 * into options; NULL and null change nothing. */
int api_train_hyperparameters(json_t *hyper, struct train_opts *o, struct err *err);
/* What these options are in OpenAI's words; a new reference, or NULL: out of memory. */
json_t *api_train_hyperparameters_json(const struct train_opts *o);
/* The first field of `method` that a version to go on from decides by itself, or NULL. */
const char *api_train_params_fixed(json_t *method);

#endif
