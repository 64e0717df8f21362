/* tokenizer.h - text to token ids and back, from a Hugging Face tokenizer.json.
 *
 * Models: BPE, byte-level (GPT-2, Llama 3, Qwen) and SentencePiece-style with byte fallback
 * (Llama 2, Mistral), Unigram and WordLevel.  Normalisers, added tokens, pre-tokenizers, post-processors and decoders as
 * the file names them; anything that is not understood is refused by name when the file is
 * loaded, never skipped.  The pipeline and its order are at the head of tokenizer.c.
 *
 * A `struct tokenizer` is immutable and any thread may use it at once.  A `struct tok_stream`
 * belongs to one thread. */
#ifndef ENGINE_TOKENIZER_H
#define ENGINE_TOKENIZER_H

#include "engine/err.h"
#include "engine/util.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct tokenizer;

/* `json` is not kept. */
int tokenizer_load(const char *json, size_t len, struct tokenizer **ret, struct err *err);
void tokenizer_free(struct tokenizer *t);
/* Ids run from 0 to this minus 1 (added tokens included; there may be holes). */
int tokenizer_size(const struct tokenizer *t);

/* Growing list of ids; free() ids. */
struct tok_ids {
    int32_t *ids;
    size_t n, cap;
};

/* text[len] (any bytes; invalid UTF-8 becomes U+FFFD as the reference does) -> ids, appended to
 * ret, which must be initialised (zeroed at first) and is as before after a failure.
 * `add_special`: run the post-processor (adds <s> and the like).  `parse_special`: tokens
 * marked special in the file are recognised in the text (else they are plain text).
 * ERR_TOO_LARGE when more than `max` ids would come out (0: no limit); ERR_INVALID when a pattern
 * of the tokenizer gives up on the text, or the text has an unknown character and the tokenizer no
 * token for it. */
int tokenizer_encode(const struct tokenizer *t, const char *text, size_t len, bool add_special,
                     bool parse_special, size_t max, struct tok_ids *ret, struct err *err);
/* ids -> bytes, appended to ret.  Unknown ids: ERR_INVALID. */
int tokenizer_decode(const struct tokenizer *t, const int32_t *ids, size_t n, bool skip_special,
                     struct buf *ret, struct err *err);

/* -1 if there is no such token. */
int tokenizer_id(const struct tokenizer *t, const char *token);
bool tokenizer_is_special(const struct tokenizer *t, int id);
/* The bytes that one token stands for inside a text (a leading space included; byte tokens give
 * their byte; special tokens their name): for logprobs.  Appended to ret. */
int tokenizer_piece(const struct tokenizer *t, int id, struct buf *ret);

/* Streaming decode: feed ids one by one; each call appends the text that is now certain, never
 * part of a UTF-8 character.  The concatenation equals tokenizer_decode() of all ids.  With
 * `continues`, the ids follow a prompt: the first one keeps its leading space, as it would in the
 * middle of a text. */
struct tok_stream;
int tok_stream_open(const struct tokenizer *t, bool skip_special, bool continues,
                    struct tok_stream **ret, struct err *err);
int tok_stream_add(struct tok_stream *s, int32_t id, struct buf *ret);
/* What is left (an incomplete character becomes U+FFFD). */
int tok_stream_end(struct tok_stream *s, struct buf *ret);
void tok_stream_free(struct tok_stream *s);

#endif
