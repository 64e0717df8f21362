/* rope.c - see rope.h. */
#include "engine/rope.h"

#include <math.h>
#include <stdlib.h>

enum { STEP = 256 };
static const double pi = 3.14159265358979323846;

struct angle {
    double cos, sin;
};

struct rope {
    int half;           /* rot / 2 */
    struct angle *low;  /* [STEP][half]: b * f_i, times the amplitude */
    struct angle *high; /* [max_positions / STEP + 1][half]: 256 a * f_i */
};

/* Llama 3: long waves are slowed down by `factor`, short ones kept, those between blended. */
static double llama3(const struct arch *a, double f)
{
    double waves = a->rope_original_max * f / (2 * pi);
    double keep = (waves - a->rope_low_freq) / (a->rope_high_freq - a->rope_low_freq);
    keep = keep < 0 ? 0 : keep > 1 ? 1 : keep;
    return (1 - keep) * f / a->rope_factor + keep * f;
}

/* Which angle turns that often within the original context, as a real number. */
static double angle_of(const struct arch *a, double turns)
{
    return a->rot * log(a->rope_original_max / (turns * 2 * pi)) / (2 * log(a->rope_theta));
}

/* YaRN (arXiv 2309.00071, section 3.2): the same blend, but linear in the number of the angle. */
static double yarn(const struct arch *a, double f, int i)
{
    double low = angle_of(a, a->rope_beta_fast), high = angle_of(a, a->rope_beta_slow);
    if (a->rope_truncate) {
        low = floor(low);
        high = ceil(high);
    }
    low = low < 0 ? 0 : low;
    high = high > a->rot - 1 ? a->rot - 1 : high;
    if (low == high)
        high += 0.001;
    double slow = (i - low) / (high - low);
    slow = slow < 0 ? 0 : slow > 1 ? 1 : slow;
    return slow * f / a->rope_factor + (1 - slow) * f;
}

double rope_frequency(const struct arch *a, int context, int i)
{
    const double f = pow(a->rope_theta, -2.0 * i / a->rot);
    switch (a->rope_scaling) {
    case ROPE_LINEAR:
        return f / a->rope_factor;
    case ROPE_LLAMA3:
        return llama3(a, f);
    case ROPE_YARN:
        return yarn(a, f, i);
    case ROPE_LONGROPE:
        return f / (double)(context > a->rope_original_max ? a->rope_long : a->rope_short)[i];
    default:
        return f;
    }
}

static struct angle turn(double x, double amplitude)
{
    const double c = cos(x), s = sin(x);
    return (struct angle){ amplitude * c, amplitude * s };
}

static size_t nhigh(const struct arch *a) { return (size_t)a->max_positions / STEP + 1; }

size_t rope_bytes(const struct arch *a)
{
    return sizeof(struct rope) +
           (STEP + nhigh(a)) * (size_t)(a->rot / 2) * sizeof(struct angle);
}

int rope_create(const struct arch *a, int context, struct rope **ret, struct err *err)
{
    const double amp = a->rope_amplitude > 0 ? a->rope_amplitude : 1;
    struct rope *r = calloc(1, sizeof *r);
    if (r == NULL)
        return err_nomem(err);
    const size_t half = (size_t)a->rot / 2;
    r->half = (int)half;
    r->low = malloc(STEP * half * sizeof *r->low);
    r->high = malloc(nhigh(a) * half * sizeof *r->high);
    if (r->low == NULL || r->high == NULL) {
        rope_destroy(r);
        return err_nomem(err);
    }
    for (size_t i = 0; i < half; i++) {
        double f = rope_frequency(a, context, (int)i);
        for (size_t b = 0; b < STEP; b++)
            r->low[b * half + i] = turn((double)b * f, amp);
        for (size_t s = 0; s < nhigh(a); s++)
            r->high[s * half + i] = turn((double)(s * STEP) * f, 1);
    }
    *ret = r;
    return ERR_OK;
}

void rope_destroy(struct rope *r)
{
    if (r == NULL)
        return;
    free(r->low);
    free(r->high);
    free(r);
}

void rope_angles(const struct rope *r, int pos, float *cosine, float *sine)
{
    const struct angle *lo = r->low + (size_t)(pos % STEP) * (size_t)r->half;
    const struct angle *hi = r->high + (size_t)(pos / STEP) * (size_t)r->half;
    for (int i = 0; i < r->half; i++) {
        cosine[i] = (float)(hi[i].cos * lo[i].cos - hi[i].sin * lo[i].sin);
        sine[i] = (float)(hi[i].sin * lo[i].cos + hi[i].cos * lo[i].sin);
    }
}
