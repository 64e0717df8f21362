/* sched_int.h - what sched.c, sched_admit.c, sched_lookup.c and gen.c share.
 *
 * A generation is in one of three places: in the inbox (submitted, not seen by the engine yet),
 * in `waiting`, or in `running`; both lists are ordered by number, which is the order of arrival.
 * When it ends the engine lets go of it.  A preempted one goes back to `waiting` with its number,
 * so it is among the first to be admitted again.
 *
 * Locks: sched.lock covers the inbox and the flags that others set; gen.lock covers a generation's
 * log.  gen.lock may be held when sched.lock is taken, never the other way round, and neither is
 * held while anything is computed.
 *
 * Nothing is allocated in a step: what a generation will need is taken when it is submitted (its
 * log) or admitted (its page list).  The one exception is text of more than TEXT_PER_TOKEN (gen.c)
 * bytes a token, for which memory is doubled now and then. */
#ifndef ENGINE_SCHED_INT_H
#define ENGINE_SCHED_INT_H

#include "engine/forward.h"
#include "engine/sched.h"

#include <pthread.h>
#include <stdatomic.h>

/* What struct gen_token says, without its alternatives. */
struct log_entry {
    int32_t token;
    float logprob;
    uint32_t text_begin, text_end;
    int16_t ntop;
    bool prompt;
};

struct gen {
    /* Set by gen_create(), never changed. */
    const struct tokenizer *tokenizer;
    int64_t tenant;
    int nprompt, max_tokens;
    struct sample_params sample;
    struct sample_bias *bias;
    int nadapters;
    struct gen_adapter adapters[LORA_SET_MAX];
    int nstop;
    char *stop[GEN_STOP_MAX];
    size_t stop_len[GEN_STOP_MAX];
    bool ignore_eos, echo;
    double deadline, submitted;

    /* The engine thread's. */
    uint64_t number;
    struct gen *prev, *next;
    int32_t *tokens;  /* [nprompt + max_tokens] */
    int ntokens;      /* prompt and output so far */
    int echoed;       /* prompt tokens that are in the log, when echo */
    struct kv_seq kv; /* open while running */
    bool admitted;    /* at least once */
    uint64_t tickets[LORA_SET_MAX];               /* adapters that are being loaded */
    const struct adapter *pinned[LORA_SET_MAX];   /* adapters held in the cache */
    struct lora_set lora;                         /* valid while running */
    uint8_t seed[32];
    double no_room_since; /* adapters wait for room in the cache; 0: they do not */
    double last_token;    /* when it was chosen; 0: there is none yet */
    bool put_back;        /* preempted since */
    int pages_wanted;     /* no use trying to admit it before so many are available */
    int rows, nlogits;    /* of the step being made */
    int guessed;          /* of these rows: tokens[ntokens .. ntokens + guessed) are guesses */
    int lookup_most, lookup_misses, lookup_rest; /* see sched_lookup.c */
    struct tok_stream *stream; /* NULL without tokenizer */
    struct buf held;           /* decoded but not published */

    /* Shared, under `lock` (`cancelled` and `refs` on their own). */
    pthread_mutex_t lock;
    pthread_cond_t changed;
    struct sched *sched; /* NULL once ended */
    struct log_entry *log;       /* room for every token there can be */
    struct token_logprob *tops;  /* sample.top_logprobs for each */
    size_t nlog;
    struct buf text;
    enum gen_finish finish;
    struct err err;
    struct gen_usage usage;
    _Atomic bool cancelled;
    _Atomic int refs; /* the owner's and the engine's */

    pthread_mutex_t wake_lock; /* held while wake() runs */
    void (*wake)(void *ud);
    void *wake_ud;
};

/* Generations without a seat whose adapters are fetched already. */
enum { SCHED_LOOKAHEAD = 16 };

/* A row of logits and what is to be done with it. */
struct job {
    struct gen *gen;
    const float *logits;
    int pos;   /* whose token these logits are for */
    bool score; /* log-probability of the prompt's token there; else choose one */
    bool ok;
    struct sample_result result;
};

struct gen_list {
    struct gen *first, *last;
    int n;
};

struct sched {
    const struct base *base;
    const struct tokenizer *tokenizer;
    const struct compute *compute;
    struct adapter_cache *adapters;
    int max_seqs, max_rows, max_chunk, max_logits, max_queue, max_context, lookup;

    /* The engine thread's. */
    pthread_t thread;
    struct kv_cache *kv;
    struct forward *forward;
    struct sampler **samplers; /* one per thread of the pool */
    int nsamplers;
    struct gen_list waiting, running;
    struct gen **batch;  /* [max_seqs] of the step */
    struct span *spans;  /* [max_seqs] */
    struct job *jobs;    /* [max_logits] */

    pthread_mutex_t lock;
    pthread_cond_t work; /* for the engine: something changed */
    pthread_cond_t done; /* for sched_drain(): nothing is left */
    struct gen_list inbox;
    uint64_t last_number;
    int active; /* submitted and not ended */
    int queued; /* of those, never admitted */
    bool poked, draining, cancel_all, stopping;
    int preempt, forget; /* asked for by sched_preempt_one() and sched_forget() */

    struct histogram step, between, gap, running_gap; /* see struct sched_stats */
    double chosen_at; /* when the tokens of the last step were chosen; 0: nothing ran since */

    _Atomic int nrunning, nwaiting;
    _Atomic uint64_t decode_step_max_ns; /* see struct sched_stats */
    _Atomic uint64_t steps, rows, prompt_tokens, generated_tokens, finished, cancelled, preempted,
        rejected, guessed, guessed_right;
};

/* --- sched.c ------------------------------------------------------------------------------- */
/* Make the engine look around. */
void sched_poke(struct sched *s);
/* By number. */
void list_insert(struct gen_list *l, struct gen *g);
void list_remove(struct gen_list *l, struct gen *g);
/* Take it out of `from`, give back what it holds, tell its owner. */
void sched_end(struct sched *s, struct gen_list *from, struct gen *g, enum gen_finish finish,
               const struct err *err);

/* --- sched_admit.c ------------------------------------------------------------------------- */
/* Move waiting generations whose adapters and pages are there to `running`. */
void sched_admit(struct sched *s);
/* Give every running generation its rows of the next step (gen.rows, gen.nlogits). */
void sched_plan(struct sched *s);
/* Back to waiting; its pages are given back. */
void sched_preempt(struct sched *s, struct gen *g);
/* Release pinned adapters and abandon loads. */
void sched_drop_adapters(struct sched *s, struct gen *g);
/* Is some generation waiting for room in the adapter cache? */
bool sched_room_wanted(const struct sched *s);

/* --- sched_lookup.c ------------------------------------------------------------------------ */
/* After sched_plan(): guesses behind the tokens of a sequence that runs alone, and rows for them. */
void lookup_plan(struct sched *s);
/* So many of g->guessed were what was chosen. */
void lookup_learn(struct sched *s, struct gen *g, int right);

/* --- gen.c --------------------------------------------------------------------------------- */
/* Copies and checks what does not depend on the scheduler's state. */
int gen_create(struct sched *s, const struct gen_request *r, struct gen **ret, struct err *err);
void gen_unref(struct gen *g);
/* Log a token (and the text that became certain with it).  `last`: no other will come.  Returns
 * GEN_RUNNING, GEN_STOP when a stop string was completed, or GEN_ERROR when memory is out. */
enum gen_finish gen_add(struct gen *g, const struct sample_result *r, bool end_token, bool last);
/* Log prompt token number g->echoed with its log-probability. */
void gen_echo(struct gen *g, const struct sample_result *r);
/* Usage: it begins to run, with `cached` positions found; it was preempted. */
void gen_started(struct gen *g, int cached);
void gen_preempted(struct gen *g);
/* Publish what was held back and the reason; `err` with GEN_ERROR only. */
void gen_end(struct gen *g, enum gen_finish finish, const struct err *err);
void gen_wake(struct gen *g);

#endif
