/* tokenizer_int.h - what the files of the tokenizer share: tables and stages.
 *
 * tok_json.c fills a `struct tokenizer` from a file; after that nothing in it changes.  Everything
 * that a call needs besides lives in a `struct tok_call` on its stack.
 *
 *   tokenizer.c      the pipeline: added tokens, normaliser, pre-tokenizer, model, template
 *   tok_json.c       tokenizer.json -> tables, refusing what is not understood
 *   tok_json_model.c the same for the model and its vocabulary
 *   tok_json_steps.c the same for normaliser, pre-tokenizer and decoder
 *   tok_vocab.c      token <-> id, merges, added tokens found in a text
 *   tok_regex.c      Oniguruma patterns translated for PCRE2, and searching with them
 *   tok_normalize.c  the normaliser's steps
 *   tok_charsmap.c   SentencePiece's own normaliser, a trie in the file
 *   tok_pretok.c     the pre-tokenizer's steps, the byte-level alphabet
 *   tok_bpe.c        the merge engine
 *   tok_unigram.c    the path with the best score; whole words
 *   tok_decode.c     ids to text, whole or streamed */
#ifndef ENGINE_TOKENIZER_INT_H
#define ENGINE_TOKENIZER_INT_H

#include "engine/tokenizer.h"

#include <jansson.h>

enum {
    TOK_MAX_ID = (1 << 21) - 1, /* eight times the largest vocabulary in use */
    TOK_MAX_STEPS = 64,         /* steps of a normaliser, pre-tokenizer or decoder */
    TOK_MAX_TEMPLATE = 256,     /* ids that a template may add */
    TOK_MAX_TEXT = 256 << 20,   /* bytes in one call */
    TOK_MAX_WORK = 1 << 30,     /* bytes that a normaliser may make of it */
};

/* Rust's \w, in PCRE2's words: the reference's own patterns use it. */
#define TOK_WORD "\\p{Alphabetic}\\p{M}\\p{Nd}\\p{Pc}\\p{Join_Control}"

/* --- patterns (tok_regex.c) -------------------------------------------------------------- */
/* A literal string, or a compiled regular expression. */
struct tok_pattern {
    char *literal; /* [len] or NULL */
    size_t len;
    void *code; /* pcre2_code, or NULL */
};
int tok_pattern_literal(struct tok_pattern *p, const char *s, size_t len, struct err *err);
/* An Oniguruma pattern from a file: translated, or refused by name. */
int tok_pattern_onig(struct tok_pattern *p, const char *s, size_t len, struct err *err);
/* A PCRE2 pattern of our own. */
int tok_pattern_pcre(struct tok_pattern *p, const char *s, struct err *err);
void tok_pattern_free(struct tok_pattern *p);

/* PCRE2's working memory; one per call, made when first needed. */
struct tok_match;
void tok_match_free(struct tok_match *m);

/* All matches of a pattern in a text, one after the other, as Oniguruma's iterator finds them:
 * an empty match right after another match is skipped. */
struct tok_scan {
    const struct tok_pattern *p;
    const char *text;
    size_t len, at, last_end;
    bool matched; /* last_end is valid */
    struct tok_match **mem;
};
/* 1 found, 0 no more, -1 failed (err is set). */
int tok_scan_next(struct tok_scan *s, size_t *start, size_t *end, struct err *err);

/* --- steps ------------------------------------------------------------------------------- */
struct tok_norm {
    enum {
        NORM_PREPEND,
        NORM_REPLACE,
        NORM_UNICODE,
        NORM_LOWERCASE,
        NORM_STRIP,
        NORM_BYTES,
        NORM_CHARSMAP,
        NORM_NMT,
        NORM_STRIP_ACCENTS,
        NORM_CLEAN,
        NORM_CHINESE,
    } kind;
    struct tok_pattern pattern; /* REPLACE */
    char *text;                 /* PREPEND, REPLACE: what to insert */
    size_t text_len;
    bool compose, compat; /* UNICODE: NFC, NFKC, NFD, NFKD */
    bool left, right;     /* STRIP */
    bool only_mn;         /* STRIP_ACCENTS: nonspacing marks only */
    bool longest;         /* CHARSMAP: the longest entry at each place, as SentencePiece itself does */
    uint32_t *trie;       /* CHARSMAP: [ntrie], values are places in `text` */
    size_t ntrie;
};

enum tok_behavior { REMOVED, ISOLATED, MERGED_WITH_PREVIOUS, MERGED_WITH_NEXT, CONTIGUOUS };
enum tok_prepend { PREPEND_ALWAYS, PREPEND_FIRST, PREPEND_NEVER };

/* Every splitting pre-tokenizer of the reference is PRE_SPLIT with some pattern; the two others
 * rewrite the text and then split it (where `pattern` is there). */
struct tok_pre {
    enum { PRE_SPLIT, PRE_BYTES, PRE_METASPACE } kind;
    struct tok_pattern pattern;
    bool has_pattern;
    enum tok_behavior behavior;
    bool invert;
    bool prefix_space; /* BYTES */
    char *replacement; /* METASPACE */
    size_t replacement_len;
    enum tok_prepend prepend; /* METASPACE */
};

struct tok_decoder {
    enum {
        DEC_BYTES,
        DEC_REPLACE,
        DEC_BYTE_FALLBACK,
        DEC_FUSE,
        DEC_STRIP,
        DEC_METASPACE,
        DEC_SUFFIX,
    } kind;
    struct tok_pattern pattern; /* REPLACE */
    char *text;                 /* REPLACE: content; STRIP, METASPACE: the character; SUFFIX */
    size_t text_len;
    size_t start, stop; /* STRIP */
    bool drop_first;    /* METASPACE: the first token loses its replacement characters */
};

/* --- tables (tok_vocab.c) ---------------------------------------------------------------- */
struct tok_str {
    const char *s; /* NULL: a hole */
    uint32_t len;
};

/* String -> id; open addressing, never more than half full.  Strings are borrowed. */
struct tok_map {
    uint32_t *slot; /* id + 1, 0 is free */
    uint32_t mask;
    const struct tok_str *str; /* by id */
};
int tok_map_init(struct tok_map *m, size_t n, const struct tok_str *str, struct err *err);
/* false if the string is there already. */
bool tok_map_add(struct tok_map *m, uint32_t id);
/* The same; an earlier id with the same string is forgotten. */
void tok_map_set(struct tok_map *m, uint32_t id);
int tok_map_get(const struct tok_map *m, const char *s, size_t len); /* -1: none */

/* Pair of ids -> value. */
struct tok_pairs {
    struct tok_pair {
        uint64_t key;
        uint32_t rank;
        int32_t id;
    } * slot; /* key 0 is free */
    uint64_t mask;
};
int tok_pairs_init(struct tok_pairs *p, size_t n, struct err *err);
/* Sets it, replacing what was there. */
void tok_pairs_set(struct tok_pairs *p, int a, int b, uint32_t rank, int id);
const struct tok_pair *tok_pairs_get(const struct tok_pairs *p, int a, int b);

/* All tokens that a text begins with.  Nodes lie level by level, so that the children of one are
 * neighbours; node 0 is the root, and one more node says where the last one's children end. */
struct tok_trie {
    struct tok_node {
        uint32_t first; /* child */
        int32_t id;     /* of the token that ends here, -1: none */
    } * node;
    uint8_t *label;     /* by node: the byte that leads to it */
    uint32_t root[256]; /* the root's children, 0: none */
};

struct tok_added {
    struct tok_str content;
    char *normal; /* what is searched in normalised text and handed to the decoder; NULL:
                     the content itself */
    size_t normal_len;
    int id;
    bool special, normalized, lstrip, rstrip, single_word;
};

/* Finds the longest token that starts at the leftmost place. */
struct tok_finder {
    struct tok_needle {
        const char *s;
        size_t len;
        int which;
    } * by; /* sorted by bytes */
    size_t n;
    bool first[256]; /* bytes that a token can start with */
};
int tok_finder_init(struct tok_finder *f, const struct tok_added *added, size_t n, bool normalized,
                    struct err *err);
/* Index of the added token found at or after `from`, -1 if there is none. */
int tok_finder_next(const struct tok_finder *f, const char *s, size_t len, size_t from,
                    size_t *start, size_t *end);

/* Sort by bytes, a prefix before what it begins. */
void tok_needles_sort(struct tok_needle *v, size_t n);

uint64_t tok_hash(const void *data, size_t len);

/* --- the tokenizer ----------------------------------------------------------------------- */
enum { TOK_SPECIAL = 1, TOK_ADDED = 2 }; /* flags[] */

struct tokenizer {
    int size;
    struct tok_str *str; /* [size] as in the file */
    uint8_t *flags;      /* [size] */
    char *arena;         /* the strings */

    size_t nadded;
    struct tok_added *added;
    struct tok_finder raw, normal; /* tokens searched before and after normalisation */
    struct tok_pattern word;       /* one word character, if any token is single_word */

    size_t nnorm, npre, ndec;
    struct tok_norm *norm;
    struct tok_pre *pre;
    struct tok_decoder *dec;
    bool has_decoder;
    size_t nprefix, nsuffix; /* ids that the post-processor puts around the text */
    int32_t *prefix, *suffix;

    enum tok_model { TOK_BPE, TOK_UNIGRAM, TOK_WORD_LEVEL } model;
    struct tok_map vocab; /* the model's own tokens, without the added ones */
    bool has_unk, byte_fallback;
    bool raw_bytes;         /* the last pre-tokenizer is ByteLevel: words are bytes, see bytes[] */
    bool shrinks;           /* a text may give fewer ids than its length promises */
    int unk;                /* -1: named in the file but not in the vocabulary */
    int bytes[256];         /* raw_bytes: id of the byte's character; else of <0xXX>; -1: none */
    int ascii[128];         /* id of each character, for text that is not raw bytes */
    size_t max_token;       /* bytes of the longest token of the model */

    /* Unigram */
    bool sentencepiece; /* sums are fp32; an unknown text is never looked up as a whole */
    double *score;    /* by id; NAN: no text is spelled with it */
    double unk_score; /* of a character that no token covers */
    struct tok_trie trie;

    /* BPE */
    bool fuse_unk, ignore_merges;
    struct tok_pairs merges;
    struct tok_pairs cross; /* pairs of neighbouring characters that some merge joins */
    uint8_t cross_small[256][32]; /* the same as bits for raw bytes, or ASCII */
};

/* Work of one call to tokenizer_encode(). */
struct tok_span {
    uint32_t at, len;
    uint32_t origin; /* so many of its bytes come from the first character of the whole text, and
                        a word that begins with one of them is Metaspace's "first" */
};
struct tok_spans {
    struct tok_span *v;
    size_t n, cap;
};

struct tok_symbol {
    int32_t id; /* -1: merged into its left neighbour */
    int32_t prev, next;
};
struct tok_todo {
    uint32_t rank;
    int32_t pos, id;
};
enum { TOK_CACHED = 40 }; /* longest word that is remembered, in bytes */
struct tok_cached {
    size_t at; /* in the output: a word met again has its ids there already */
    uint32_t n;
    uint8_t len; /* 0: free */
    char word[TOK_CACHED];
};

/* Unigram: the best way to spell the text up to here. */
struct tok_best {
    double score;
    int32_t id;
    uint32_t from; /* where its last token begins */
};

struct tok_call {
    const struct tokenizer *t;
    struct err *err;
    bool parse_special;
    struct tok_ids *out;
    size_t limit; /* out->n may not pass it */
    struct tok_match *match;
    struct buf normal;      /* a section of the input after normalisation */
    struct buf text, spare; /* what the pre-tokenizer works on, and a second one */
    struct tok_spans spans, spans2;
    struct tok_cached *cache;
    size_t cache_mask;
    struct tok_symbol *sym;
    size_t nsym, sym_cap;
    struct tok_todo *heap;
    size_t nheap, heap_cap;
    struct tok_best *best;
    size_t best_cap;
};

/* buf_add with the sentence on failure. */
int tok_add(struct buf *b, const void *data, size_t len, struct err *err);
int tok_push_id(struct tok_call *c, int id);

/* Run the normaliser: s[len] -> text.  *origin is how many bytes at the start of s come from the
 * first character of the input, and then how many of text do. */
int tok_normalize(const struct tokenizer *t, const char *s, size_t len, struct buf *text,
                  struct buf *spare, struct tok_match **mem, size_t *origin, struct err *err);

/* SentencePiece's normaliser (tok_charsmap.c): `text` is base64. */
int tok_charsmap_read(struct tok_norm *st, const char *text, size_t len, struct err *err);
int tok_charsmap(const struct tok_norm *st, const char *s, size_t len, struct buf *out,
                 size_t *origin, struct err *err);

/* Run the pre-tokenizer over c->text (not empty), which may be rewritten: words in c->spans. */
int tok_pretokenize(struct tok_call *c, size_t origin);

/* One word to ids, appended to c->out. */
typedef int (*tok_word_fn)(struct tok_call *c, const char *s, size_t len);
int tok_bpe(struct tok_call *c, const char *s, size_t len);
int tok_unigram(struct tok_call *c, const char *s, size_t len);
int tok_word_level(struct tok_call *c, const char *s, size_t len);
/* The same through the cache. */
int tok_cached(struct tok_call *c, const char *s, size_t len, tok_word_fn fn);
/* ERR_TOO_LARGE for a text that is hopelessly long, before any work is done. */
int tok_check_limit(struct tok_call *c, size_t len);
int tok_lacks_unknown(struct err *err);
/* What the models need besides: bytes[], ascii[]; cross; the trie. */
void tok_chars_prepare(struct tokenizer *t);
int tok_bpe_prepare(struct tokenizer *t, struct err *err);
int tok_unigram_prepare(struct tokenizer *t, struct err *err);
bool tok_bytes_known(const struct tokenizer *t, const char *s, size_t n);

/* --- reading tokenizer.json -------------------------------------------------------------- */
/* The file is refused: ERR_INVALID with a sentence (a format and its values). */
#define tok_bad(err, ...) err_set(err, ERR_INVALID, "tokenizer.json: " __VA_ARGS__)

/* ERR_INVALID if the object has other keys than these (a list with spaces between).  `where` is
 * what to call it. */
int tok_only(const json_t *o, const char *where, const char *keys, struct err *err);
/* Members: the default if absent or null, ERR_INVALID if of another type. */
int tok_get_bool(const json_t *o, const char *where, const char *key, bool def, bool *ret,
                 struct err *err);
/* A copy with a NUL after it; free() it.  Must be there. */
int tok_get_text(const json_t *o, const char *where, const char *key, char **ret, size_t *ret_len,
                 struct err *err);
int tok_read_model(struct tokenizer *t, const json_t *model, const json_t *added, struct err *err);
/* The components that are lists of steps (tok_json_steps.c); `o` may be NULL or null. */
int tok_read_normalizer(struct tokenizer *t, const json_t *o, struct err *err);
int tok_read_pre_tokenizer(struct tokenizer *t, const json_t *o, struct err *err);
int tok_read_decoder(struct tokenizer *t, const json_t *o, struct err *err);

/* --- bytes and characters ---------------------------------------------------------------- */
/* GPT-2's alphabet: every byte is written as one printable character. */
int tok_byte_char(uint8_t byte, char ret[2]);               /* returns its length */
int tok_char_byte(const char *s, size_t len, size_t *used); /* -1: not of the alphabet */

/* Length of the UTF-8 character at s, or, if there is none, minus the length of the longest
 * prefix of one (at least 1): what becomes one U+FFFD.  0: [s, s+len) is the beginning of a
 * character and ends too early. */
int tok_utf8(const char *s, size_t len);
uint32_t tok_codepoint(const char *s, int len); /* of a valid character */
bool tok_is_space(uint32_t c);                  /* Unicode's White_Space */
extern const char tok_replacement[4];           /* U+FFFD */

#endif
