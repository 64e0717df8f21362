/* sampler.c - penalties, cuts, one draw.
 *
 * A vocabulary has up to 150,000 entries and a draw needs no sorted list of them.  The likeliest k,
 * or the likeliest that make up a share p, are found by partitioning around pivots (expected linear
 * time); the order is strict (larger weight first, then lower id), so that the set found does not
 * depend on the pivots.  Then the draw walks all ids upwards and skips what comes after the last
 * one kept. */
#include "engine/sampler.h"

#include "engine/prob.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

struct sampler {
    int V;
    float *logits;   /* [V] after bias and penalties */
    double *w;       /* [V] weights relative to the largest */
    int32_t *idx;    /* [V] candidates for the cuts */
    uint32_t *count; /* [V] all zero between calls */
};

void sample_defaults(struct sample_params *p)
{
    *p = (struct sample_params){ .temperature = 1, .top_p = 1, .repetition_penalty = 1,
                                 .top_logprobs = -1 };
}

static int out_of_range(struct err *err, const char *field, const char *want, double value)
{
    return err_set_slug(err, ERR_INVALID, "invalid_value", field, "%s must be %s, not %g", field,
                        want, value);
}

int sample_check(const struct sample_params *p, int V, struct err *err)
{
    /* Written so that NaN fails. */
    if (!(p->temperature >= 0 && p->temperature <= 2))
        return out_of_range(err, "temperature", "0 to 2", (double)p->temperature);
    if (!(p->top_p > 0 && p->top_p <= 1))
        return out_of_range(err, "top_p", "above 0 and at most 1", (double)p->top_p);
    if (!(p->min_p >= 0 && p->min_p <= 1))
        return out_of_range(err, "min_p", "0 to 1", (double)p->min_p);
    if (p->top_k < 0)
        return out_of_range(err, "top_k", "0 (off) or more", p->top_k);
    if (!(p->repetition_penalty > 0 && p->repetition_penalty <= 100))
        return out_of_range(err, "repetition_penalty", "above 0 and at most 100",
                            (double)p->repetition_penalty);
    if (!(p->presence_penalty >= -2 && p->presence_penalty <= 2))
        return out_of_range(err, "presence_penalty", "-2 to 2", (double)p->presence_penalty);
    if (!(p->frequency_penalty >= -2 && p->frequency_penalty <= 2))
        return out_of_range(err, "frequency_penalty", "-2 to 2", (double)p->frequency_penalty);
    if (p->top_logprobs < -1 || p->top_logprobs > SAMPLE_TOP_MAX)
        return out_of_range(err, "top_logprobs", "0 to 20", p->top_logprobs);
    if (p->nbias < 0 || p->nbias > SAMPLE_BIAS_MAX)
        return err_set_slug(err, ERR_INVALID, "invalid_value", "logit_bias",
                            "logit_bias has %d entries, at most %d are allowed", p->nbias,
                            SAMPLE_BIAS_MAX);
    for (int i = 0; i < p->nbias; i++) {
        if (p->bias[i].id < 0 || p->bias[i].id >= V)
            return err_set_slug(err, ERR_INVALID, "invalid_value", "logit_bias",
                                "logit_bias names token %d, but tokens run from 0 to %d",
                                (int)p->bias[i].id, V - 1);
        if (!(p->bias[i].bias >= -100 && p->bias[i].bias <= 100))
            return out_of_range(err, "logit_bias", "-100 to 100", (double)p->bias[i].bias);
    }
    return ERR_OK;
}

int sampler_create(int V, struct sampler **ret, struct err *err)
{
    struct sampler *s = calloc(1, sizeof *s);
    if (s == NULL)
        return err_nomem(err);
    s->V = V;
    s->logits = malloc((size_t)V * sizeof *s->logits);
    s->w = malloc((size_t)V * sizeof *s->w);
    s->idx = malloc((size_t)V * sizeof *s->idx);
    s->count = calloc((size_t)V, sizeof *s->count);
    if (s->logits == NULL || s->w == NULL || s->idx == NULL || s->count == NULL) {
        sampler_destroy(s);
        return err_nomem(err);
    }
    *ret = s;
    return ERR_OK;
}

void sampler_destroy(struct sampler *s)
{
    if (s == NULL)
        return;
    free(s->logits);
    free(s->w);
    free(s->idx);
    free(s->count);
    free(s);
}

size_t sampler_bytes(int V)
{
    return (size_t)V * (sizeof(float) + sizeof(double) + sizeof(int32_t) + sizeof(uint32_t));
}

/* --- random numbers ------------------------------------------------------------------------ */
void philox4x32(const uint32_t counter[4], const uint32_t key[2], uint32_t ret[4])
{
    uint32_t c[4], k0 = key[0], k1 = key[1];
    memcpy(c, counter, sizeof c);
    for (int round = 0; round < 10; round++) {
        uint64_t p0 = (uint64_t)c[0] * 0xD2511F53u, p1 = (uint64_t)c[2] * 0xCD9E8D57u;
        uint32_t next[4] = { (uint32_t)(p1 >> 32) ^ c[1] ^ k0, (uint32_t)p1,
                             (uint32_t)(p0 >> 32) ^ c[3] ^ k1, (uint32_t)p0 };
        memcpy(c, next, sizeof c);
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    memcpy(ret, c, sizeof c);
}

/* [0, 1) with 53 bits. */
static double uniform(const struct sample_params *p, int position)
{
    const uint32_t counter[4] = { (uint32_t)position, 0, p->choice, 0 };
    const uint32_t key[2] = { (uint32_t)p->seed, (uint32_t)(p->seed >> 32) };
    uint32_t r[4];
    philox4x32(counter, key, r);
    return (double)(((uint64_t)r[1] << 32 | r[0]) >> 11) * 0x1p-53;
}

/* --- bias and penalties -------------------------------------------------------------------- */
static void penalise_repetition(struct sampler *s, float penalty, float *logits,
                                const int32_t *tokens, int n)
{
    if (penalty == 1.0f)
        return;
    for (int i = 0; i < n; i++) {
        float *l = &logits[tokens[i]];
        if (s->count[tokens[i]]++ == 0)
            *l = *l > 0 ? *l / penalty : *l * penalty;
    }
    for (int i = 0; i < n; i++)
        s->count[tokens[i]] = 0;
}

static void penalise_output(struct sampler *s, float presence, float frequency, float *logits,
                            const int32_t *tokens, int n)
{
    if (presence == 0.0f && frequency == 0.0f)
        return;
    for (int i = 0; i < n; i++)
        s->count[tokens[i]]++;
    for (int i = 0; i < n; i++) {
        uint32_t *c = &s->count[tokens[i]];
        if (*c > 0)
            logits[tokens[i]] -= frequency * (float)*c + presence;
        *c = 0; /* once per token */
    }
}

/* --- log-probabilities --------------------------------------------------------------------- */
/* The `top` largest logits, descending, lowest id first among equals; -infinity is left out. */
static int find_top(const float *logits, int V, int top, struct token_logprob *ret)
{
    int n = 0;
    if (top == 0)
        return 0;
    for (int i = 0; i < V; i++) {
        float x = logits[i];
        if ((n == top && x <= ret[n - 1].logprob) || x == -INFINITY)
            continue;
        int at = n < top ? n++ : n - 1;
        for (; at > 0 && ret[at - 1].logprob < x; at--)
            ret[at] = ret[at - 1];
        ret[at] = (struct token_logprob){ .token = i, .logprob = x };
    }
    return n;
}

static float logprob_of(float logit, float max, double log_sum)
{
    double lp = ((double)logit - (double)max) - log_sum;
    return lp < -9999 ? -9999.0f : (float)lp; /* stays a number in JSON */
}

static void report(const float *logits, int V, float max, double sum, int32_t token, int top,
                   struct sample_result *ret)
{
    double log_sum = prob_log(sum);
    ret->logprob = logprob_of(logits[token], max, log_sum);
    ret->ntop = find_top(logits, V, top, ret->top);
    for (int i = 0; i < ret->ntop; i++)
        ret->top[i].logprob = logprob_of(ret->top[i].logprob, max, log_sum);
}

/* --- cuts ---------------------------------------------------------------------------------- */
/* Does token a come before b?  Strict for a != b. */
static bool before(const double *w, int32_t a, int32_t b)
{
    return w[a] != w[b] ? w[a] > w[b] : a < b;
}

/* Move what comes before idx[pivot] to the front of [lo, hi); returns where the pivot ends up. */
static int partition(const double *w, int32_t *idx, int lo, int hi, int pivot)
{
    int32_t p = idx[pivot];
    idx[pivot] = idx[hi - 1];
    int m = lo;
    for (int i = lo; i < hi - 1; i++)
        if (before(w, idx[i], p)) {
            int32_t t = idx[i];
            idx[i] = idx[m];
            idx[m++] = t;
        }
    idx[hi - 1] = idx[m];
    idx[m] = p;
    return m;
}

/* Any pivot gives the same set; a scattered one keeps crafted logits from being slow. */
static int pick_pivot(int lo, int hi, uint32_t *state)
{
    *state = *state * 1664525u + 1013904223u;
    return lo + (int)(((uint64_t)*state * (uint64_t)(hi - lo)) >> 32);
}

/* Bring the k likeliest of idx[0..n) to the front. */
static int keep_count(const double *w, int32_t *idx, int n, int k)
{
    uint32_t state = 1;
    for (int lo = 0, hi = n; k < n && hi - lo > 1;) {
        int m = partition(w, idx, lo, hi, pick_pivot(lo, hi, &state));
        if (m < k)
            lo = m + 1;
        else
            hi = m;
    }
    return k < n ? k : n;
}

/* Bring the fewest likeliest of idx[0..n) that weigh at least `mass` to the front; how many? */
static int keep_mass(const double *w, int32_t *idx, int n, double mass)
{
    uint32_t state = 1;
    int lo = 0, hi = n;
    while (lo < hi) {
        int m = partition(w, idx, lo, hi, pick_pivot(lo, hi, &state));
        double sum = 0;
        for (int i = lo; i < m; i++)
            sum += w[idx[i]];
        if (sum >= mass) {
            hi = m;
        } else if (sum + w[idx[m]] >= mass) {
            return m + 1;
        } else {
            mass -= sum + w[idx[m]];
            lo = m + 1;
        }
    }
    return lo > 0 ? lo : 1;
}

/* Write the ids of all weights >= least to idx; how many? */
static int gather(struct sampler *s, double least)
{
    int n = 0;
    for (int32_t i = 0; i < s->V; i++) {
        s->idx[n] = i;
        n += s->w[i] >= least;
    }
    return n;
}

/* A weight that at least k tokens reach: the k-th of the maxima of blocks of 64. */
static double reached_by(struct sampler *s, int k)
{
    int n = 0;
    for (int32_t i = 0; i < s->V; i++) {
        if (i % 64 == 0)
            s->idx[n++] = i;
        else if (s->w[i] > s->w[s->idx[n - 1]])
            s->idx[n - 1] = i;
    }
    if (n < k)
        return 0;
    keep_count(s->w, s->idx, n, k);
    double least = s->w[s->idx[0]];
    for (int i = 1; i < k; i++)
        least = s->w[s->idx[i]] < least ? s->w[s->idx[i]] : least;
    return least;
}

/* The least likely token that top_k and top_p keep, or -1 when they keep all.  Most tokens are put
 * aside by their weight before anything is moved. */
static int32_t cut(struct sampler *s, const struct sample_params *p, double sum)
{
    bool by_count = p->top_k > 0 && p->top_k < s->V, by_mass = p->top_p < 1;
    if (!by_count && !by_mass)
        return -1;
    int n;
    if (by_count) {
        n = keep_count(s->w, s->idx, gather(s, reached_by(s, p->top_k)), p->top_k);
        sum = 0;
        for (int i = 0; i < n; i++)
            sum += s->w[s->idx[i]];
    } else { /* all that weigh less than this together weigh less than what may be missing; half
              * of it leaves room for rounding */
        n = gather(s, (1 - (double)p->top_p) * sum / s->V / 2);
    }
    if (by_mass)
        n = keep_mass(s->w, s->idx, n, (double)p->top_p * sum);
    int32_t last = s->idx[0];
    for (int i = 1; i < n; i++)
        if (before(s->w, last, s->idx[i]))
            last = s->idx[i];
    return last;
}

/* --- the choice ---------------------------------------------------------------------------- */
static int32_t argmax(const float *logits, float max)
{
    int32_t i = 0;
    while (logits[i] != max)
        i++;
    return i;
}

/* Draw from the weights s->w, whose sum is `sum`. */
static int32_t draw(struct sampler *s, const struct sample_params *p, double sum, int position)
{
    int32_t last = cut(s, p, sum);
    double least = (double)p->min_p; /* the largest weight is 1 */
    if (last >= 0 && s->w[last] > least)
        least = s->w[last];
    int n = gather(s, least);
    if (last >= 0 || least > 0) {
        int kept = 0;
        sum = 0;
        for (int i = 0; i < n; i++) {
            int32_t id = s->idx[i];
            if (last >= 0 && before(s->w, last, id)) /* as likely as the last, but a higher id */
                continue;
            s->idx[kept++] = id;
            sum += s->w[id];
        }
        n = kept;
    }
    double target = uniform(p, position) * sum, so_far = 0;
    int32_t found = s->idx[0];
    for (int i = 0; i < n; i++) {
        if (s->w[s->idx[i]] == 0)
            continue;
        found = s->idx[i]; /* the last one, should rounding leave the target beyond the end */
        so_far += s->w[found];
        if (so_far > target)
            break;
    }
    return found;
}

/* The logits after bias and penalties: the caller's own when there are none. */
static const float *adjust(struct sampler *s, const struct sample_params *p, const float *logits,
                           const int32_t *tokens, int n, int nprompt)
{
    if (p->nbias == 0 && p->repetition_penalty == 1.0f && p->presence_penalty == 0.0f &&
        p->frequency_penalty == 0.0f)
        return logits;
    memcpy(s->logits, logits, (size_t)s->V * sizeof *logits);
    for (int i = 0; i < p->nbias; i++)
        s->logits[p->bias[i].id] += p->bias[i].bias;
    penalise_repetition(s, p->repetition_penalty, s->logits, tokens, n);
    penalise_output(s, p->presence_penalty, p->frequency_penalty, s->logits, tokens + nprompt,
                    n - nprompt);
    return s->logits;
}

bool sampler_run(struct sampler *s, const struct sample_params *p, const float *logits,
                 const int32_t *tokens, int n, int nprompt, struct sample_result *ret)
{
    logits = adjust(s, p, logits, tokens, n, nprompt);
    float max;
    if (!prob_max(logits, s->V, &max))
        return false;
    *ret = (struct sample_result){ .token = 0 };
    if (p->temperature == 0) {
        ret->token = argmax(logits, max);
    } else {
        double sum = prob_exp(logits, s->V, max, 1.0 / (double)p->temperature, s->w);
        ret->token = draw(s, p, sum, n);
    }
    if (p->top_logprobs >= 0)
        report(logits, s->V, max, prob_exp(logits, s->V, max, 1, NULL), ret->token,
               p->top_logprobs, ret);
    return true;
}

bool sampler_score(struct sampler *s, const float *logits, int32_t token, int top,
                   struct sample_result *ret)
{
    float max;
    if (!prob_max(logits, s->V, &max))
        return false;
    *ret = (struct sample_result){ .token = token };
    report(logits, s->V, max, prob_exp(logits, s->V, max, 1, NULL), token, top < 0 ? 0 : top, ret);
    return true;
}
