/* tok_make.h - a tokenizer.json for vocabularies that come without one: of a GGUF file, or of a
 * SentencePiece tokenizer.model.
 *
 * The text is what transformers' converters would write for the same vocabulary (tok_make_spm.c says
 * where not), so that engine/tokenizer.h is the only place that knows how text becomes tokens. */
#ifndef ENGINE_TOK_MAKE_H
#define ENGINE_TOK_MAKE_H

#include "engine/err.h"

#include <stdbool.h>
#include <stddef.h>

/* SentencePiece's numbers, which GGUF uses too. */
enum piece_type {
    PIECE_NORMAL = 1, PIECE_UNKNOWN, PIECE_CONTROL, PIECE_USER, PIECE_UNUSED, PIECE_BYTE
};

struct piece {
    const char *s; /* not NUL-terminated */
    size_t len;
    float score;
    enum piece_type type;
};

/* A text of two tokens' names with a space between. */
struct piece_merge {
    const char *s;
    size_t len;
};

struct vocab {
    const struct piece *pieces; /* by id */
    size_t n;
    const struct piece_merge *merges; /* of byte-level vocabularies, best first */
    size_t nmerges;
    int bos, eos, unk;          /* -1: none */
    bool add_bos, add_eos;      /* around every text */
    /* SentencePiece */
    bool unigram;               /* scores decide among spellings; else they order merges (BPE) */
    const void *charsmap;       /* what the normaliser does to characters first; NULL: nothing */
    size_t charsmap_len;
    bool prefix_space;          /* a text begins with one more space */
    bool prefix_once;           /* only at its very beginning, not after added tokens */
    bool squeeze_spaces;        /* runs of spaces become one, none is left at the ends */
    const void *extra;          /* a json_t list of added tokens as in tokenizer.json, or NULL; they
                                 * come before what the type of a piece says */
};

enum { PIECE_MAX_BYTES = 512 };

/* SentencePiece's BPE and Unigram (tok_make_spm.c).  Merges of BPE are every pair of pieces whose
 * concatenation is a piece, ordered by that one's score.  free() the text. */
int tok_make_spm(const struct vocab *v, char **ret, struct err *err);
/* Byte-level BPE; `pre` names the way in which text is cut into words, as GGUF does. */
int tok_make_bytelevel(const struct vocab *v, const char *pre, char **ret, struct err *err);
/* Does a text get bos in front with this kind of cutting unless the file says otherwise? */
bool tok_make_adds_bos(const char *pre);

/* A tokenizer_config.json with the names of bos and eos, for chat templates.  free() it. */
int tok_make_config(const struct vocab *v, char **ret, struct err *err);

#endif
