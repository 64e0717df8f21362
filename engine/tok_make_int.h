/* tok_make_int.h - shared by the files of tok_make.h. */
#ifndef ENGINE_TOK_MAKE_INT_H
#define ENGINE_TOK_MAKE_INT_H

#include "engine/tok_make.h"
#include "engine/tokenizer_int.h"

#include <jansson.h>

/* U+2581 stands for a space in SentencePiece's pieces. */
#define SPACE_MARK "\xe2\x96\x81"

/* Each piece is a text of its own.  *ret_map and *ret_str (its strings) are the caller's. */
int tok_make_check(const struct vocab *v, struct tok_map *ret_map, struct tok_str **ret_str,
                   struct err *err);
json_t *tok_make_text_of(const struct piece *p);
/* The user's own pieces are matched in the text as it was written, with spaces in it. */
json_t *tok_make_with_spaces(const struct piece *p);
/* Tokens that are found in a text as they are, before anything else happens to it. */
bool tok_make_is_added(const struct piece *p);
/* Names with ids, and the list of added tokens; both are the caller's, also after a failure. */
int tok_make_vocab(const struct vocab *v, bool added_in_vocab, json_t **ret_vocab,
                   json_t **ret_added, struct err *err);
/* The whole file.  Takes over all references, also after a failure. */
int tok_make_text(const struct vocab *v, json_t *added, json_t *normalizer, json_t *pre,
                  json_t *decoder, json_t *model, char **ret, struct err *err);

#endif
