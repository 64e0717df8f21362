/* session.h - what the commands that compute share: the base, threads and kernel, the tokenizer, and
 * the adapters that were asked for.
 *
 * A command puts SESSION_OPTIONS("exact") at the head of its option table and calls session_open().
 * Adapters come from PEFT folders, or with --db from the database by name (then a folder is given as
 * a path that begins with . or /).  One thread. */
#ifndef SERVER_SESSION_H
#define SERVER_SESSION_H

#include "engine/adapter.h"
#include "engine/base.h"
#include "engine/chat_template.h"
#include "engine/compute.h"
#include "engine/forward.h"
#include "engine/tokenizer.h"
#include "server/options.h"

#define SESSION_COMPUTE(default_precision)                                                        \
    { "precision", 0, "fast|exact|f32", default_precision, "how linear layers multiply", false }, \
    { "kernel", 0, "auto|scalar|avx2|avx512", "auto", "instruction set", false },                 \
    { "threads", 't', "N", "0", "0: one per available CPU", false },                              \
    { "mmap", 0, NULL, NULL, "map the base file instead of copying it to huge pages", false }
/* For every command that runs sequences. */
#define KV_TYPE_OPTION                                                                            \
    { "kv-type", 0, "f16|q8|f32", NULL,                                                           \
      "keys and values in the cache; default f16, or f32 for a base of --type f32", false }
#define SESSION_OPTIONS(default_precision)                                                        \
    { "base", 'b', "FILE", NULL, "base file made by lorad import", false },                       \
    { "adapter", 'a', "PATH[:WEIGHT]", NULL,                                                      \
      "PEFT folder or GGUF file, or NAME[@VERSION] with --db; may be repeated, results are added", true }, \
    { "db", 0, "FILE", NULL, "database that holds the adapters", false },                         \
    { "tenant", 0, "NAME", "default", "whose adapters, with --db", false },                       \
    KV_TYPE_OPTION,                                                                               \
    SESSION_COMPUTE(default_precision)

struct session {
    struct base *base;
    struct compute compute;
    enum kv_type kv_type;        /* of sequences that run */
    struct tokenizer *tokenizer; /* NULL until session_tokenizer() */
    struct adapter *adapters[LORA_SET_MAX];
    struct lora_set lora;        /* of those, in canonical order */
};

/* What --kv-type says.  If it says nothing *ret_given is false, and when the base is there it is
 * kv_type_default().  0, or 2 after a sentence. */
int session_kv_type(const struct opts *o, enum kv_type *ret, bool *ret_given);
/* 0, or the exit code after printing a sentence. */
int session_open(const struct opts *o, struct session *ret);
/* The same without --adapter: base, threads and kernel. */
int session_open_base(const struct opts *o, struct session *ret);
void session_close(struct session *s);
/* Load the tokenizer if that was not done yet. */
int session_tokenizer(struct session *s, struct err *err);
/* The chat template in `file`, or (NULL) what the base brought along; *ret stays NULL if it brought
 * none.  chat_template_free() it. */
int session_template(const struct base *base, const char *file, struct chat_template **ret,
                     struct err *err);

/* --- running whole sequences, for inspection ----------------------------------------------- */
/* Logits of `n` positions from `pos` on; [n][V].  Not 0: stop, and that is what is returned. */
typedef int (*session_logits_fn)(void *ud, int pos, int n, const float *logits, struct err *err);

struct session_runner;
/* For sequences of at most `longest` tokens. */
int session_runner_open(struct session *s, int longest, struct session_runner **ret,
                        struct err *err);
/* Every position's logits, in order, in pieces.  Ids must be below V. */
int session_run(struct session_runner *r, const int32_t *tokens, int n, session_logits_fn fn,
                void *ud, struct err *err);
/* -log softmax(logits)[id], in fp64. */
double session_nll(const float *logits, int V, int id);
void session_runner_close(struct session_runner *r); /* NULL is fine */

#endif
