/* sentencepiece.h - reading SentencePiece's tokenizer.model: a protocol buffer with pieces, scores and
 * what the trainer was told.
 *
 * Read are BPE and Unigram models, with and without a map of characters; word and character models are
 * refused by name.  Every input is hostile: each length is checked against what is left. */
#ifndef ENGINE_SENTENCEPIECE_H
#define ENGINE_SENTENCEPIECE_H

#include "engine/tok_make.h"

/* The pieces of a model; they point into `data`.  free() pieces of the result. */
int spm_read(const void *data, size_t len, struct vocab *ret, struct err *err);

/* The same as tokenizer.json.  `config` and `added` are the texts of tokenizer_config.json and
 * added_tokens.json beside it, or NULL: added tokens, what stands around a text, where the first
 * space comes from.  free() the text. */
int spm_tokenizer(const void *data, size_t len, const char *config, const char *added,
                  char **ret_json, struct err *err);

#endif
