/* dataset_int.h - what the parts of reading training data share.
 *
 *   dataset.c       bytes -> lines or elements of an array -> JSON; the report
 *   dataset_form.c  JSON -> one of the forms: what is prompt, what is answer
 *   dataset_text.c  prompt and completion, text -> tokens
 *   dataset_chat.c  messages -> tokens: what of a conversation is learned
 *   dataset_set.c   examples -> struct train_set; sets from tensors */
#ifndef ENGINE_DATASET_INT_H
#define ENGINE_DATASET_INT_H

#include "engine/dataset.h"

/* --- the set that is being made (dataset_set.c) ---------------------------------------------- */
struct set_maker {
    struct train_set *set;
    size_t cap;           /* of set->examples */
    uint64_t max_tokens;
    struct sha256 hash;
};
int set_maker_init(struct set_maker *m, uint64_t max_tokens, struct err *err);
/* learn[0] is taken for 0.  n >= 2. */
int set_maker_add(struct set_maker *m, const int32_t *ids, const uint8_t *learn, size_t n,
                  struct err *err);
/* Where the set stands, and back there: what was added since is gone. */
struct set_mark {
    size_t n, used;
    uint64_t tokens, targets;
    void *own;
    struct sha256 hash;
};
struct set_mark set_maker_mark(const struct set_maker *m);
void set_maker_back(struct set_maker *m, const struct set_mark *mark);
struct train_set *set_maker_take(struct set_maker *m);
void set_maker_free(struct set_maker *m); /* zeroed or taken is fine */

/* --- one object (dataset_form.c) ---------------------------------------------------------------- */
/* What an object says. */
struct form {
    struct buf prompt, answer;  /* text forms */
    json_t *messages;           /* or this: without `weight`; owned */
    json_t *tools;              /* borrowed from the object, or NULL */
    uint8_t *learn;             /* one per message: an answer to be learned */
};
int form_read(const json_t *object, struct form *ret, struct err *err);
void form_free(struct form *f);

/* --- tokens (dataset_text.c) -------------------------------------------------------------------- */
struct reader {
    struct dataset_model m;
    struct dataset_opts o;    /* defaults filled in */
    json_t *config;           /* tokenizer_config.json, which owns bos */
    const json_t *bos;        /* the token's name, or NULL */
    int eos;                  /* what ends completion and text; -1: none */
    struct set_maker maker;
    struct dataset_report *rep;
    bool broken;              /* a failure was not the line's fault */
    struct tok_ids ids, part; /* scratch: the example, and a part of it */
    uint8_t *learn;           /* scratch: one per id */
    size_t learn_cap;
};
int reader_init(struct reader *r, const struct dataset_model *m, const struct dataset_opts *o,
                struct dataset_report *rep, struct err *err);
void reader_free(struct reader *r);

/* How a text becomes ids: see tokenizer_encode(). */
struct how {
    bool add_special, parse_special;
};
/* A new example: r->ids of text[len], checked against the vocabulary, nothing of it learned yet. */
int reader_encode(struct reader *r, const char *text, size_t len, struct how how, struct err *err);
/* At which id what follows the first len bytes of the example's text begins: ids in common with that
 * part alone. */
int reader_place(struct reader *r, const char *text, size_t len, struct how how, size_t *ret,
                 struct err *err);
void reader_learn(struct reader *r, size_t from, size_t to);
/* EOS behind the example, if it is not there yet, and learned. */
int reader_end(struct reader *r, struct err *err);
/* Into the set, without what comes after the last learned id. */
int reader_add(struct reader *r, struct err *err);

int reader_text(struct reader *r, const struct form *f, struct err *err);
int reader_chat(struct reader *r, const struct form *f, struct err *err); /* dataset_chat.c */

#endif
