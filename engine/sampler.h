/* sampler.h - from logits to the next token.
 *
 * Order: logit_bias; repetition penalty (over prompt and output), presence and frequency penalties
 * (over the output); then, if temperature is 0, the largest logit (lowest id wins a tie); else
 * temperature, top_k, top_p, min_p, and one draw.  Log-probabilities are of the distribution after
 * bias and penalties and before temperature and cuts (log-softmax in fp64, fixed order).
 *
 * Random numbers are counter based: a pure function of (seed, choice, position), Philox 4x32-10
 * (Salmon et al., SC 2011), so that a sequence can be preempted, moved in a batch, or replayed.
 * Pure functions over caller memory; any thread. */
#ifndef ENGINE_SAMPLER_H
#define ENGINE_SAMPLER_H

#include "engine/err.h"

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
/* Logits [V] are overwritten.  tokens[0..n) is the sequence so far, of which the first nprompt are
 * the prompt; position n decides the random numbers. */
void sampler_run(struct sampler *s, const struct sample_params *p, float *logits,
                 const int32_t *tokens, int n, int nprompt, struct sample_result *ret);

#endif
