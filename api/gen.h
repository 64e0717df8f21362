/* gen.h - generations: from a JSON body to sequences of the engine and back to JSON.
 *
 *   gen_params.c   every field of the body, checked               -> struct gen_params
 *   gen_target.c   `model` and `adapters`                         -> struct gen_target
 *   chat.c, completions.c   prompts                               -> struct gen_prompt
 *   gen_start.c    submits n sequences per prompt                 -> struct api_call
 *   gen_read.c     the call's answer: one JSON body, or a stream of events
 *   gen_json.c     the shapes of choices, chunks, logprobs, usage */
#ifndef API_GEN_H
#define API_GEN_H

#include "api/api_int.h"

enum { GEN_MAX_CHOICES = 128 }; /* prompts x n */
enum { STOP_MAX = 16 };         /* stop strings of a request */

struct gen_params {
    bool chat;               /* else completions */
    const char *model;       /* or NULL; this and other strings belong to the JSON body */
    int n;
    bool stream, include_usage, echo, ignore_eos;
    int max_tokens;          /* -1: not given; 0: only with echo */
    bool seeded;
    bool logprobs;
    int top_logprobs;
    struct sample_params sample;
    struct sample_bias *bias; /* what sample.bias points to */
    int nstop;
    const char *stop[GEN_STOP_MAX]; /* the client's, at most STOP_MAX, and what ends a turn of chat */
    int nadapters;
    struct { const char *name; double weight; } adapters[LORA_SET_MAX];
};
/* `body` must outlive *ret.  `vocab`: token ids are below it. */
int gen_params_parse(json_t *body, bool chat, int vocab, struct gen_params *ret, struct err *err);
void gen_params_free(struct gen_params *p);

/* What computes: the base, or versions pinned from now on. */
struct gen_target {
    char *model;             /* as the answer calls it */
    int n;
    struct {
        struct gen_adapter use;
        char id[STORE_NAME_MAX + 16]; /* NAME@V */
        char hash[65];
    } item[LORA_SET_MAX];
};
int gen_target_find(struct api_ctx *c, const struct gen_params *p, struct gen_target *ret,
                    struct err *err);
void gen_target_free(struct gen_target *t);

struct gen_prompt {
    struct tok_ids ids;
    char *text;              /* for echo; or NULL */
    size_t text_len;
};
void gen_prompts_free(struct gen_prompt *p, size_t n);

/* Takes over what it needs from `target`, submits, sets c->call and the replay headers. */
int gen_start(struct api_ctx *c, const struct gen_params *p, struct gen_target *target,
              struct gen_prompt *prompts, size_t nprompts, struct err *err);

/* --- one request under way (gen_start.c, gen_read.c, gen_json.c) ---------------------------- */

/* One choice of the answer. */
struct gen_choice {
    struct api_call *call;
    struct gen *gen;
    _Atomic(struct gen *) seen; /* the same, for the engine's thread */
    int index;
    const struct gen_prompt *prompt;
    size_t ntokens;          /* read so far */
    size_t text_from;        /* bytes of text read so far */
    bool started;            /* stream: its first event was made */
    bool done;
    enum gen_finish finish;
    size_t offset;           /* code points so far (completions' text_offset) */
    bool logged;             /* a logprob was made */
    /* collected answers only */
    struct buf text;
    json_t *logprobs;
};

struct api_call {
    struct api *api;
    void (*wake)(void *ud);
    void *wake_ud;
    bool chat, stream, include_usage, echo, hide_output;
    bool logprobs;
    int top_logprobs, n;
    char id[48];
    char fingerprint[20];
    int64_t created;
    uint64_t seed;
    struct gen_target target;
    struct gen_prompt *prompts;
    size_t nprompts;
    struct gen_choice *choices;
    int nchoices;
    /* streams only */
    bool opened, usage_sent, failed;
    /* read buffer */
    struct gen_token tokens[32];
};
void gen_call_free(struct api_call *call);

/* Logprobs in the shape of the route; appended to (chat: an array; completions: four arrays). */
json_t *gen_logprobs_new(const struct api_call *call);
int gen_logprobs_add(const struct api_call *call, struct gen_choice *ch, json_t *logprobs,
                     const struct gen_token *t);
const char *gen_finish_name(enum gen_finish f);
json_t *gen_usage_json(const struct api_call *call);
json_t *gen_replay_json(const struct api_call *call);
/* The whole answer. */
json_t *gen_answer_json(const struct api_call *call);
/* One event; takes `choices`. */
json_t *gen_chunk_json(const struct api_call *call, json_t *choices);
/* One choice of an event; takes `logprobs` (NULL: none). */
json_t *gen_delta_json(const struct api_call *call, struct gen_choice *ch, const char *text,
                       size_t len, json_t *logprobs, const char *finish);

#endif
