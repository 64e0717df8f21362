/* test_train_attn.c - attention for training against fp64 code of its own: the result, the
 * derivatives against central differences, and the same bits with any number of threads. */
#include "engine/attn.h"
#include "engine/train_attn.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

enum { MAX_SEGS = 8 };
/* Of the largest component; and what rounding leaves where the derivative is 0, as of a lone row. */
static const double RELATIVE = 1e-5, ABSOLUTE = 5e-7;

/* One shape and its options; `lens` ends with 0. */
struct shape {
    const char *what;
    int H, G, hd, window;
    float softcap;
    bool alibi;
    bool joined; /* q, k and v of a head lie together, as in one product */
    int gap;     /* rows of no example before each segment */
    int lens[MAX_SEGS];
};

struct data {
    const struct shape *shape;
    struct train_attn a;
    struct train_segment segs[MAX_SEGS];
    float slopes[64];
    int rows;
    size_t q_len, kv_len, out_len;
    float *mem, *grad; /* what q, k, v and their derivatives lie in */
    size_t mem_len;
    struct train_heads dq, dk, dv;
    float *out, *dout, *scratch;
};

static uint32_t rng_state = 5;
static float rnd(float scale) /* [-scale, scale) */
{
    rng_state = rng_state * 1664525 + 1013904223;
    return ((float)(rng_state >> 8) * 0x1p-23f - 1) * scale;
}

static float *floats(size_t n, float scale)
{
    float *p = malloc((n + 1) * sizeof *p);
    assert_non_null(p);
    for (size_t i = 0; i < n; i++)
        p[i] = scale > 0 ? rnd(scale) : NAN;
    return p;
}

static void place(const struct shape *s, float *mem, int rows, struct train_heads *q,
                  struct train_heads *k, struct train_heads *v)
{
    const int hd = s->hd;
    if (s->joined) { /* BLOOM's way: [head][q k v][hd] */
        *q = (struct train_heads){ mem, 3 * s->H * hd, 3 * hd };
        *k = (struct train_heads){ mem + hd, 3 * s->H * hd, 3 * hd };
        *v = (struct train_heads){ mem + 2 * hd, 3 * s->H * hd, 3 * hd };
        return;
    }
    *q = (struct train_heads){ mem, s->H * hd, hd };
    *k = (struct train_heads){ mem + (size_t)rows * (size_t)(s->H * hd), s->G * hd, hd };
    *v = (struct train_heads){ k->p + (size_t)rows * (size_t)(s->G * hd), s->G * hd, hd };
}

static void data_init(struct data *d, const struct shape *s, int threads)
{
    memset(d, 0, sizeof *d);
    d->shape = s;
    d->a = (struct train_attn){ .H = s->H, .G = s->G, .hd = s->hd, .window = s->window,
                                .scale = 1.0f / sqrtf((float)s->hd), .softcap = s->softcap,
                                .segs = d->segs };
    if (s->alibi) {
        attn_slopes(s->H, d->slopes);
        d->a.slopes = d->slopes;
    }
    int longest = 0;
    for (int i = 0; s->lens[i] > 0; i++) {
        d->rows += s->gap;
        d->segs[d->a.nsegs++] = (struct train_segment){ d->rows, s->lens[i] };
        d->rows += s->lens[i];
        longest = s->lens[i] > longest ? s->lens[i] : longest;
    }
    d->mem_len = (size_t)d->rows * (size_t)((s->H + 2 * s->G) * s->hd);
    d->out_len = (size_t)d->rows * (size_t)(s->H * s->hd);
    d->mem = floats(d->mem_len, 2);
    d->grad = floats(d->mem_len, 0);
    place(s, d->mem, d->rows, &d->a.q, &d->a.k, &d->a.v);
    place(s, d->grad, d->rows, &d->dq, &d->dk, &d->dv);
    d->out = floats(d->out_len, 0);
    d->dout = floats(d->out_len, 1);
    d->scratch = floats(train_attn_scratch(longest, s->H, s->G, s->hd, threads), 0);
}

static void data_free(struct data *d)
{
    free(d->mem);
    free(d->grad);
    free(d->out);
    free(d->dout);
    free(d->scratch);
}

static struct compute compute_of(struct pool *pool)
{
    struct compute c = { .pool = pool, .precision = PREC_F32 };
    assert_int_equal(isa_select("auto", &c.isa, NULL), ERR_OK);
    return c;
}

/* --- fp64 ------------------------------------------------------------------------------------------- */
static size_t at(const struct train_heads *x, int r, int h)
{
    return (size_t)r * (size_t)x->ld + (size_t)h * (size_t)x->step;
}

/* One head of one row; q, k and v lie in mem64 as they do in d->mem.  p has room for a segment. */
static void attend64(const struct data *d, const double *mem64, const struct train_segment *seg,
                     int i, int h, double *p, double *out)
{
    const struct train_attn *a = &d->a;
    const int g = h / (a->H / a->G), lo = a->window > 0 && i >= a->window ? i - a->window + 1 : 0;
    const double *q = mem64 + (a->q.p - d->mem) + at(&a->q, seg->begin + i, h);
    double max = -INFINITY, sum = 0;
    for (int j = lo; j <= i; j++) {
        const double *k = mem64 + (a->k.p - d->mem) + at(&a->k, seg->begin + j, g);
        double s = 0;
        for (int e = 0; e < a->hd; e++)
            s += q[e] * k[e];
        s *= (double)a->scale;
        if (a->softcap > 0)
            s = (double)a->softcap * tanh(s / (double)a->softcap);
        if (a->slopes != NULL)
            s += (double)a->slopes[h] * (j - i);
        p[j] = s;
        max = fmax(max, s);
    }
    for (int e = 0; e < a->hd; e++)
        out[e] = 0;
    for (int j = lo; j <= i; j++) {
        const double *v = mem64 + (a->v.p - d->mem) + at(&a->v, seg->begin + j, g);
        const double e = exp(p[j] - max);
        sum += e;
        for (int c = 0; c < a->hd; c++)
            out[c] += e * v[c];
    }
    for (int e = 0; e < a->hd; e++)
        out[e] /= sum;
}

static void forward64(const struct data *d, const double *mem64, double *out)
{
    const struct train_attn *a = &d->a;
    double *p = malloc((size_t)d->rows * sizeof *p + 1);
    assert_non_null(p);
    for (int s = 0; s < a->nsegs; s++)
        for (int i = 0; i < a->segs[s].n; i++)
            for (int h = 0; h < a->H; h++)
                attend64(d, mem64, &a->segs[s], i, h, p,
                         out + ((size_t)(a->segs[s].begin + i) * (size_t)a->H + (size_t)h) *
                                   (size_t)a->hd);
    free(p);
}

static double *widened(const float *x, size_t n)
{
    double *p = malloc((n + 1) * sizeof *p);
    assert_non_null(p);
    for (size_t i = 0; i < n; i++)
        p[i] = (double)x[i];
    return p;
}

/* sum(dout * out), of one segment only: what one number of it can change. */
static double weighted(const struct data *d, const double *mem64, const struct train_segment *seg,
                       double *p, double *o)
{
    const struct train_attn *a = &d->a;
    double sum = 0;
    for (int i = 0; i < seg->n; i++)
        for (int h = 0; h < a->H; h++) {
            attend64(d, mem64, seg, i, h, p, o);
            const float *dout = d->dout + ((size_t)(seg->begin + i) * (size_t)a->H + (size_t)h) *
                                              (size_t)a->hd;
            for (int e = 0; e < a->hd; e++)
                sum += o[e] * (double)dout[e];
        }
    return sum;
}

/* --- shapes ------------------------------------------------------------------------------------------ */
static const struct shape shapes[] = {
    { "one head", 1, 1, 8, 0, 0, false, false, 0, { 5 } },
    { "one row", 2, 1, 4, 0, 0, false, false, 0, { 1 } },
    { "several examples", 2, 2, 8, 0, 0, false, false, 0, { 3, 11, 1, 7 } },
    { "groups of heads", 6, 2, 8, 0, 0, false, false, 0, { 9, 4 } },
    { "head of odd size", 3, 1, 13, 0, 0, false, false, 0, { 20 } },
    { "window", 2, 1, 8, 3, 0, false, false, 0, { 2, 25 } },
    { "window of one", 2, 1, 8, 1, 0, false, false, 0, { 6 } },
    { "softcap", 4, 2, 8, 0, 2.5f, false, false, 0, { 14, 3 } },
    { "softcap and window", 4, 2, 8, 5, 2.5f, false, false, 0, { 19 } },
    { "ALiBi", 6, 6, 8, 0, 0, true, false, 0, { 17, 2 } },
    { "ALiBi in groups with a window", 6, 3, 8, 6, 0, true, false, 0, { 17, 5 } },
    { "joined q, k and v", 3, 3, 8, 0, 0, true, true, 0, { 10, 6 } },
    { "rows of no example", 4, 2, 8, 0, 0, false, false, 2, { 6, 9 } },
    { "more rows than a block", 2, 1, 4, 0, 0, false, false, 0, { 70 } },
    { "more rows than a block, with everything", 8, 2, 4, 21, 3, true, false, 1, { 40, 33 } },
};
enum { NSHAPES = sizeof shapes / sizeof shapes[0] };

/* Too large for central differences. */
static const struct shape large[] = {
    { "long", 4, 2, 64, 0, 0, false, false, 0, { 300 } },
    { "long, many heads in a group", 16, 1, 32, 0, 0, false, false, 0, { 200, 64, 65 } },
    { "long, window", 4, 4, 80, 50, 0, false, false, 0, { 257, 100 } },
    { "long, with everything", 8, 2, 24, 100, 5, true, false, 1, { 300, 30, 128 } },
};
enum { NLARGE = sizeof large / sizeof large[0] };

static void check_forward(const struct shape *s)
{
    struct data d;
    data_init(&d, s, 1);
    const struct compute c = compute_of(NULL);
    train_attn_forward(&c, &d.a, d.out, d.scratch);
    double *mem64 = widened(d.mem, d.mem_len), *want = widened(d.out, d.out_len), largest = 0;
    forward64(&d, mem64, want);
    for (size_t i = 0; i < d.out_len; i++)
        if (!isnan(want[i]))
            largest = fmax(largest, fabs(want[i]));
    for (size_t i = 0; i < d.out_len; i++)
        if (!(fabs((double)d.out[i] - want[i]) <= 1e-6 * largest) &&
            !(isnan(want[i]) && isnan(d.out[i]))) /* a row of no example */
            fail_msg("%s: out[%zu] is %.9g, in fp64 %.9g", s->what, i, (double)d.out[i], want[i]);
    free(mem64);
    free(want);
    data_free(&d);
}

static void forward_agrees_with_fp64(void **state)
{
    (void)state;
    for (int i = 0; i < NSHAPES; i++)
        check_forward(&shapes[i]);
    for (int i = 0; i < NLARGE; i++)
        check_forward(&large[i]);
}

/* The derivative by one of q, k, v: heads of x, whose numbers lie in d->mem where dx's lie in d->grad. */
static void check_part(const struct data *d, double *mem64, const struct train_heads *x,
                       const struct train_heads *dx, int heads, const char *name)
{
    double *p = malloc((size_t)d->rows * sizeof *p + 1), o[256], largest = 0, worst = 0;
    assert_non_null(p);
    for (int s = 0; s < d->a.nsegs; s++) {
        const struct train_segment *seg = &d->segs[s];
        for (int i = 0; i < seg->n * heads * d->a.hd; i++) {
            const int r = seg->begin + i / (heads * d->a.hd), h = i / d->a.hd % heads;
            const size_t off = at(x, r, h) + (size_t)(i % d->a.hd);
            double *var = mem64 + (x->p - d->mem) + off;
            const double step = 1e-5, was = *var;
            *var = was + step;
            double plus = weighted(d, mem64, seg, p, o);
            *var = was - step;
            double minus = weighted(d, mem64, seg, p, o);
            *var = was;
            const double want = (plus - minus) / (2 * step), got = (double)dx->p[off];
            largest = fmax(largest, fabs(want));
            worst = fmax(worst, isnan(got) ? INFINITY : fabs(got - want));
        }
    }
    if (!(worst <= RELATIVE * largest + ABSOLUTE))
        fail_msg("%s: d%s is wrong by %.3g, the largest is %.3g", d->shape->what, name, worst,
                 largest);
    free(p);
}

static void derivatives_are_central_differences(void **state)
{
    (void)state;
    const struct compute c = compute_of(NULL);
    for (int i = 0; i < NSHAPES; i++) {
        struct data d;
        data_init(&d, &shapes[i], 1);
        train_attn_forward(&c, &d.a, d.out, d.scratch);
        train_attn_backward(&c, &d.a, d.out, d.dout, d.dq, d.dk, d.dv, d.scratch);
        double *mem64 = widened(d.mem, d.mem_len);
        check_part(&d, mem64, &d.a.q, &d.dq, d.a.H, "q");
        check_part(&d, mem64, &d.a.k, &d.dk, d.a.G, "k");
        check_part(&d, mem64, &d.a.v, &d.dv, d.a.G, "v");
        free(mem64);
        data_free(&d);
    }
}

/* The derivatives of large shapes, by the formulas in fp64. */
static void backward64(const struct data *d, const double *mem64, double *grad)
{
    const struct train_attn *a = &d->a;
    const int hd = a->hd;
    const ptrdiff_t q0 = a->q.p - d->mem, k0 = a->k.p - d->mem, v0 = a->v.p - d->mem;
    double *s = malloc((size_t)d->rows * sizeof *s), *o = malloc((size_t)hd * sizeof *o);
    assert_true(s != NULL && o != NULL);
    for (size_t i = 0; i < d->mem_len; i++)
        grad[i] = 0;
    for (int n = 0; n < a->nsegs; n++)
        for (int i = 0; i < a->segs[n].n; i++)
            for (int h = 0; h < a->H; h++) {
                const int row = a->segs[n].begin + i, g = h / (a->H / a->G);
                const int lo = a->window > 0 && i >= a->window ? i - a->window + 1 : 0;
                const double *q = mem64 + q0 + at(&a->q, row, h);
                const float *dout = d->dout + ((size_t)row * (size_t)a->H + (size_t)h) * (size_t)hd;
                attend64(d, mem64, &a->segs[n], i, h, s, o);
                double max = -INFINITY, sum = 0, dot = 0;
                for (int j = lo; j <= i; j++)
                    max = fmax(max, s[j]);
                for (int j = lo; j <= i; j++)
                    sum += exp(s[j] - max);
                for (int e = 0; e < hd; e++)
                    dot += o[e] * (double)dout[e];
                for (int j = lo; j <= i; j++) {
                    const int at_j = a->segs[n].begin + j;
                    const size_t k = (size_t)k0 + at(&a->k, at_j, g);
                    const size_t v = (size_t)v0 + at(&a->v, at_j, g);
                    double dp = 0, raw = 0, p = exp(s[j] - max) / sum;
                    for (int e = 0; e < hd; e++) {
                        dp += (double)dout[e] * mem64[v + (size_t)e];
                        raw += q[e] * mem64[k + (size_t)e];
                    }
                    double ds = p * (dp - dot) * (double)a->scale;
                    if (a->softcap > 0) {
                        double t = tanh(raw * (double)a->scale / (double)a->softcap);
                        ds *= 1 - t * t;
                    }
                    for (int e = 0; e < hd; e++) {
                        grad[q0 + (ptrdiff_t)at(&a->q, row, h) + e] += ds * mem64[k + (size_t)e];
                        grad[k + (size_t)e] += ds * q[e];
                        grad[v + (size_t)e] += p * (double)dout[e];
                    }
                }
            }
    free(s);
    free(o);
}

static void check_large(const struct data *d, const double *want, const struct train_heads *x,
                        const struct train_heads *dx, int heads, const char *name)
{
    double largest = 0, worst = 0;
    for (int s = 0; s < d->a.nsegs; s++)
        for (int i = 0; i < d->segs[s].n; i++)
            for (int h = 0; h < heads; h++)
                for (int e = 0; e < d->a.hd; e++) {
                    const size_t off = at(x, d->segs[s].begin + i, h) + (size_t)e;
                    const double w = want[(size_t)(x->p - d->mem) + off], got = (double)dx->p[off];
                    largest = fmax(largest, fabs(w));
                    worst = fmax(worst, isnan(got) ? INFINITY : fabs(got - w));
                }
    if (!(worst <= RELATIVE * largest + ABSOLUTE))
        fail_msg("%s: d%s is wrong by %.3g, the largest is %.3g", d->shape->what, name, worst,
                 largest);
}

static void derivatives_of_large_shapes_agree_with_fp64(void **state)
{
    (void)state;
    const struct compute c = compute_of(NULL);
    for (int i = 0; i < NSHAPES + NLARGE; i++) {
        struct data d;
        data_init(&d, i < NSHAPES ? &shapes[i] : &large[i - NSHAPES], 1);
        train_attn_forward(&c, &d.a, d.out, d.scratch);
        train_attn_backward(&c, &d.a, d.out, d.dout, d.dq, d.dk, d.dv, d.scratch);
        double *mem64 = widened(d.mem, d.mem_len), *want = widened(d.mem, d.mem_len);
        backward64(&d, mem64, want);
        check_large(&d, want, &d.a.q, &d.dq, d.a.H, "q");
        check_large(&d, want, &d.a.k, &d.dk, d.a.G, "k");
        check_large(&d, want, &d.a.v, &d.dv, d.a.G, "v");
        free(mem64);
        free(want);
        data_free(&d);
    }
}

static void any_number_of_threads_gives_the_same_bits(void **state)
{
    (void)state;
    enum { THREADS = 3 };
    for (int i = 0; i < NSHAPES + NLARGE; i++) {
        struct data d;
        data_init(&d, i < NSHAPES ? &shapes[i] : &large[i - NSHAPES], THREADS);
        struct compute c = compute_of(NULL);
        train_attn_forward(&c, &d.a, d.out, d.scratch);
        train_attn_backward(&c, &d.a, d.out, d.dout, d.dq, d.dk, d.dv, d.scratch);
        float *out = d.out, *grad = d.grad;
        d.out = floats(d.out_len, 0);
        d.grad = floats(d.mem_len, 0);
        place(d.shape, d.grad, d.rows, &d.dq, &d.dk, &d.dv);
        for (int threads = 2; threads <= THREADS; threads++) {
            assert_int_equal(pool_create(threads, &c.pool, NULL), ERR_OK);
            train_attn_forward(&c, &d.a, d.out, d.scratch);
            train_attn_backward(&c, &d.a, d.out, d.dout, d.dq, d.dk, d.dv, d.scratch);
            pool_destroy(c.pool);
            assert_memory_equal(d.out, out, d.out_len * sizeof *out);
            assert_memory_equal(d.grad, grad, d.mem_len * sizeof *grad);
        }
        free(out);
        free(grad);
        data_free(&d);
    }
}

static void what_an_example_gets_does_not_depend_on_its_neighbours(void **state)
{
    (void)state;
    const struct shape both = { "two", 4, 2, 16, 0, 0, false, false, 0, { 45, 30 } };
    struct data d;
    data_init(&d, &both, 1);
    const struct compute c = compute_of(NULL);
    train_attn_forward(&c, &d.a, d.out, d.scratch);
    train_attn_backward(&c, &d.a, d.out, d.dout, d.dq, d.dk, d.dv, d.scratch);
    float *out = d.out, *grad = d.grad;
    d.out = floats(d.out_len, 0);
    d.grad = floats(d.mem_len, 0);
    place(&both, d.grad, d.rows, &d.dq, &d.dk, &d.dv);
    /* The second alone: the rows of the first may hold anything. */
    d.segs[0] = d.segs[1];
    d.a.nsegs = 1;
    for (int i = 0; i < 45 * d.a.q.ld; i++)
        d.a.q.p[i] = NAN;
    for (int i = 0; i < 45 * d.a.k.ld; i++)
        d.a.k.p[i] = d.a.v.p[i] = NAN;
    train_attn_forward(&c, &d.a, d.out, d.scratch);
    train_attn_backward(&c, &d.a, d.out, d.dout, d.dq, d.dk, d.dv, d.scratch);
    const size_t row = (size_t)d.a.q.ld, kv = (size_t)d.a.k.ld;
    assert_memory_equal(d.out + 45 * row, out + 45 * row, 30 * row * sizeof *out);
    assert_memory_equal(d.dq.p + 45 * row, grad + 45 * row, 30 * row * sizeof *grad);
    assert_memory_equal(d.dk.p + 45 * kv, grad + (d.dk.p - d.grad) + 45 * kv,
                        30 * kv * sizeof *grad);
    assert_memory_equal(d.dv.p + 45 * kv, grad + (d.dv.p - d.grad) + 45 * kv,
                        30 * kv * sizeof *grad);
    free(out);
    free(grad);
    data_free(&d);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(forward_agrees_with_fp64),
        cmocka_unit_test(derivatives_are_central_differences),
        cmocka_unit_test(derivatives_of_large_shapes_agree_with_fp64),
        cmocka_unit_test(any_number_of_threads_gives_the_same_bits),
        cmocka_unit_test(what_an_example_gets_does_not_depend_on_its_neighbours),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
