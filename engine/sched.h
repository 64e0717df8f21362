/* sched.h - continuous batching: one engine thread owns every sequence.
 *
 * Each step takes a budget of token rows: first one row of every running sequence, then chunks of
 * prompts that wait: small ones while anybody decodes, so that a long prompt delays a running
 * sequence by one such chunk at most, and the whole budget when nobody does.  A request is admitted when its adapters are in memory (cold ones are loaded
 * by the cache's thread while others run) and pages for its prompt are free.  When pages run out
 * the youngest sequence is preempted: its pages go back, and it is recomputed later to the same
 * bits.  Sequences are finished by an end token, a stop string, a length, a cancel or a deadline.
 *
 * Other threads meet the engine in two places only: sched_submit() (the admission queue) and a
 * `struct gen` (one generation's output: a log that the engine appends to and its owner reads).
 * The engine never calls out, except for `wake`, which must not block.
 *
 * What a request gets does not depend on what else runs, on preemption, on any of the options below
 * or on the number of threads: rows are computed independently (compute.h), random numbers are a
 * function of seed and position (sampler.h). */
#ifndef ENGINE_SCHED_H
#define ENGINE_SCHED_H

#include "engine/adapter_cache.h"
#include "engine/base.h"
#include "engine/compute.h"
#include "engine/histogram.h"
#include "engine/kv.h"
#include "engine/sampler.h"
#include "engine/tokenizer.h"

struct sched;
struct gen;

struct sched_opts {
    const struct base *base;
    const struct tokenizer *tokenizer; /* may be NULL: no text, no stop strings */
    const struct compute *compute;
    struct adapter_cache *adapters; /* may be NULL: no adapters by version */
    size_t kv_bytes;
    enum kv_type kv_type; /* kv_type_default() is what a base has unless told otherwise */
    int max_seqs;    /* running at once, and no more than step_tokens; 0: 64 */
    int step_tokens; /* rows of a step at most; 0: 512 */
    int chunk_tokens; /* of these for prompts, while other sequences wait for their next token; 0:
                         SCHED_CHUNK */
    int max_queue;   /* waiting at most, more is ERR_BUSY; 0: 256 */
    int max_context; /* 0: the model's max_positions; cut to what kv_bytes holds */
    /* Prompt-lookup decoding: while one greedy sequence runs alone, so many tokens at most are
     * guessed per step from what it repeats, and checked in the same pass; 0: none. */
    int lookup; /* at most SCHED_LOOKUP_MAX */
};

/* SCHED_CHUNK, measured with four sequences that decode while prompts of 2,000 tokens come (Zen 4, 2
 * threads, fast): with chunks of 512 / 256 / 128 / 64 / 32, the p95 between tokens is 2,410 / 1,239 /
 * 670 / 324 / 197 ms at 1.1B and 603 / 301 / 178 / 119 / 55 ms at 135M; prompt tokens per second
 * are 245 / 241 / 238 / 226 / 196 and 1,171 / 1,106 / 1,089 / 960 / 674. */
enum { GEN_STOP_MAX = 20, GEN_STOP_LEN = 256, SCHED_LOOKUP_MAX = 64, SCHED_CHUNK = 64 };

/* Which adapter: by version of the store (loaded through the cache) or, for the command line, one
 * that is in memory already. */
struct gen_adapter {
    uint8_t hash[32];
    int64_t version_id;
    size_t bytes;                  /* resident size, for the cache */
    const struct adapter *resident; /* used instead if not NULL */
    float weight;
};

struct gen_request {
    int64_t tenant;
    const int32_t *prompt;  /* copied */
    int nprompt;            /* 1 .. max_context - 1 */
    int max_tokens;         /* >= 1; cut to what the context leaves */
    struct sample_params sample; /* bias is copied */
    int nadapters;
    struct gen_adapter adapters[LORA_SET_MAX];
    int nstop;
    const char *stop[GEN_STOP_MAX]; /* copied; each 1..GEN_STOP_LEN bytes */
    bool ignore_eos;
    bool echo_logprobs;     /* first report prompt tokens with their logprobs (completions' echo) */
    double deadline;        /* now_mono() after which it is cut off; 0: none */
    /* Called on the engine thread after new output; may be NULL.  Must not block, and may call
     * nothing of this header but gen_read() and gen_usage(). */
    void (*wake)(void *ud);
    void *wake_ud;
};

enum gen_finish { GEN_RUNNING, GEN_STOP, GEN_LENGTH, GEN_CANCELLED, GEN_DEADLINE, GEN_ERROR };

/* One token of output.  Its text is what became certain with it: bytes from text_begin to text_end
 * of the generation's text (whole UTF-8 characters; nothing that may belong to a stop string).  An
 * end token is logged too, without text of its own.  Text that was held back when a generation is
 * cancelled or cut off follows after the last token's text_end. */
struct gen_token {
    int32_t token;
    float logprob;             /* 0 unless sample.top_logprobs >= 0 */
    bool prompt;               /* an echoed prompt token: no text; the first has no logprob */
    uint32_t text_begin, text_end;
    int ntop;
    struct token_logprob top[SAMPLE_TOP_MAX];
};

/* Starts the engine thread. */
int sched_create(const struct sched_opts *o, struct sched **ret, struct err *err);
/* Bytes of workspace beside KV (for the memory plan), from the same options. */
size_t sched_work_bytes(const struct sched_opts *o);
/* Refuse new work, let running work finish for at most `seconds`, then cancel what is left. */
void sched_drain(struct sched *s, double seconds);
void sched_destroy(struct sched *s); /* cancels everything, joins */
int sched_max_context(const struct sched *s);
int sched_max_queue(const struct sched *s); /* a request of more sequences can never be taken whole */

/* Any thread.  Validates (ERR_INVALID; slug "context_length_exceeded" when the prompt is too long
 * names both numbers), queues (ERR_BUSY when full, ERR_UNAVAILABLE when draining).  *ret is the
 * caller's until gen_release(). */
int sched_submit(struct sched *s, const struct gen_request *r, struct gen **ret, struct err *err);

/* The owner's side of a generation; any one thread at a time. */
/* Copy out tokens [from, ...), at most max; and append the text from byte `text_from` on to `text`
 * (NULL: none).  *ret_finish is GEN_RUNNING until every token has been handed out; GEN_ERROR also
 * when `text` cannot grow.  Returns the number of tokens. */
size_t gen_read(struct gen *g, size_t from, struct gen_token *ret, size_t max, size_t text_from,
                struct buf *text, enum gen_finish *ret_finish);
/* Wait until there is something past token `from` or it is finished (command line, tests). */
void gen_wait(struct gen *g, size_t from);
struct gen_usage {
    int prompt_tokens, cached_tokens, completion_tokens;
    int preemptions;
    double queued, first_token, total; /* seconds since submit; 0 while unknown */
};
void gen_usage(struct gen *g, struct gen_usage *ret);
/* Why it ended with GEN_ERROR. */
void gen_error(struct gen *g, struct err *ret);
/* Stop it within a step or two; output stays readable. */
void gen_cancel(struct gen *g);
/* Cancels if still running, and forgets it: no wake comes after this returns. */
void gen_release(struct gen *g);

struct sched_stats {
    int running, waiting, max_seqs;
    /* rows: positions computed; prompt_tokens: of requests admitted, cached ones included */
    uint64_t steps, rows, prompt_tokens, generated_tokens, finished, cancelled, preempted, rejected;
    uint64_t guessed, guessed_right; /* tokens of prompt-lookup decoding */
    struct kv_stats kv;
    /* step: from planning it to the tokens it chose.  between: from there to planning the next,
     * while sequences run.  gap: from a sequence's token to its next.  running_gap: only of those
     * between which it was not preempted.  decode_step_max: the longest step, in seconds, while one of
     * those waited for its next token. */
    struct histogram_stats step, between, gap, running_gap;
    double decode_step_max;
};
void sched_stats(struct sched *s, struct sched_stats *ret);
/* Forget all cached prefixes before the next step. */
void sched_forget(struct sched *s);
/* For tests: preempt the youngest running sequence before the next step. */
void sched_preempt_one(struct sched *s);

#endif
