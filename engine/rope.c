/* rope.c - see rope.h. */
#include "engine/rope.h"

#include <math.h>
#include <stdlib.h>

enum { STEP = 256 };

struct angle {
    double cos, sin;
};

struct rope {
    int half;           /* rot / 2 */
    struct angle *low;  /* [STEP][half]: b * f_i */
    struct angle *high; /* [max_positions / STEP + 1][half]: 256 a * f_i */
};

double rope_frequency(const struct arch *a, int i)
{
    const double pi = 3.14159265358979323846;
    double f = pow(a->rope_theta, -2.0 * i / a->rot);
    if (a->rope_scaling == ROPE_LINEAR)
        return f / a->rope_factor;
    if (a->rope_scaling != ROPE_LLAMA3)
        return f;
    /* Long waves are slowed down by `factor`, short ones kept, those between blended. */
    double waves = a->rope_original_max * f / (2 * pi);
    double keep = (waves - a->rope_low_freq) / (a->rope_high_freq - a->rope_low_freq);
    keep = keep < 0 ? 0 : keep > 1 ? 1 : keep;
    return (1 - keep) * f / a->rope_factor + keep * f;
}

static size_t nhigh(const struct arch *a) { return (size_t)a->max_positions / STEP + 1; }

size_t rope_bytes(const struct arch *a)
{
    return sizeof(struct rope) +
           (STEP + nhigh(a)) * (size_t)(a->rot / 2) * sizeof(struct angle);
}

int rope_create(const struct arch *a, struct rope **ret, struct err *err)
{
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
        double f = rope_frequency(a, (int)i);
        for (size_t b = 0; b < STEP; b++)
            r->low[b * half + i] = (struct angle){ cos((double)b * f), sin((double)b * f) };
        for (size_t s = 0; s < nhigh(a); s++) {
            double x = (double)(s * STEP) * f;
            r->high[s * half + i] = (struct angle){ cos(x), sin(x) };
        }
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
