/* sampler.h - from logits to the next token.
 *
 * Order: logit_bias (added); repetition penalty (over prompt and output), presence and frequency penalties
 * (over the output); then, if temperature is 0, the largest logit (lowest id wins a tie); else
 * temperature, top_k, top_p, min_p, and one draw.  Log-probabilities are of the distribution after
 * bias and penalties and before temperature and cuts (log-softmax in fp64, see prob.h).
 *
 *   repetition p   logit / p if positive, logit * p if not, once per token seen
 *   presence p     logit - p, once per token seen; frequency p: logit - p * times seen
 *   top_k k        the k likeliest (lowest ids first among equals)
 *   top_p p        of those, the fewest likeliest whose share is at least p
 *   min_p p        of those, all at least p times as likely as the likeliest
 * The draw walks what is left in the order of ids.
 *
 * Random numbers are counter based: a pure function of (seed, choice, position), Philox 4x32-10
 * (Salmon et al., SC 2011), so that a sequence can be preempted, moved in a batch, or replayed.
 * Pure functions over caller memory; any thread. */
#ifndef ENGINE_SAMPLER_H
#define ENGINE_SAMPLER_H

#include "engine/err.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { SAMPLE_TOP_MAX = 20, SAMPLE_BIAS_MAX = 1024 };

struct sample_bias {
    int32_t id;
    float bias;
};

struct token_logprob {
    int32_t token;
    float logprob; /* natural log */
};

struct sample_params {
    float temperature;        /* 0: greedy */
    int top_k;                /* 0: off */
    float top_p, min_p;       /* 1 and 0: off */
    float repetition_penalty; /* 1: off */
    float presence_penalty, frequency_penalty; /* 0: off */
    uint64_t seed;
    uint32_t choice;          /* which of n choices */
    int nbias;
    const struct sample_bias *bias; /* borrowed */
    int top_logprobs;         /* how many alternatives to report, 0..SAMPLE_TOP_MAX; -1: none
                               * and no logprob either */
};

struct sample_result {
    int32_t token;
    float logprob; /* natural log; 0 if not asked for */
    int ntop;
    struct token_logprob top[SAMPLE_TOP_MAX]; /* descending */
};

/* Defaults: temperature 1, everything else off. */
void sample_defaults(struct sample_params *p);
/* Ranges as in the OpenAI API (and top_k, min_p, repetition_penalty as in vLLM); ERR_INVALID
 * names the field. */
int sample_check(const struct sample_params *p, int V, struct err *err);

/* Scratch for one sampler, made once. */
struct sampler;
int sampler_create(int V, struct sampler **ret, struct err *err);
void sampler_destroy(struct sampler *s);
size_t sampler_bytes(int V); /* what one takes, for the memory plan */
/* Logits [V] are not changed.  tokens[0..n) is the sequence so far, of which the first nprompt are
 * the prompt; position n decides the random numbers.  false if a logit is NaN or infinite, so that
 * there is no distribution to choose from. */
bool sampler_run(struct sampler *s, const struct sample_params *p, const float *logits,
                 const int32_t *tokens, int n, int nprompt, struct sample_result *ret);
/* No choice: the log-probability of `token` and `top` alternatives under the logits as they are
 * (prompt tokens). */
bool sampler_score(struct sampler *s, const float *logits, int32_t token, int top,
                   struct sample_result *ret);

/* The random function itself: 10 rounds of Philox 4x32. */
void philox4x32(const uint32_t counter[4], const uint32_t key[2], uint32_t ret[4]);

#endif
