/* test_attn.c - attention over pages: against fp64, against its definition written out, and the same
 * bits in any chunks, on any number of threads and any instruction set. */
#include "engine/attn.h"
#include "engine/mem.h"
#include "engine/num.h"
#include "tests/support_ops.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

struct scene {
    struct arch arch;
    struct kv_cache *kv;
    struct kv_seq seq;
    int T, rows; /* positions, and rows that ask (the last ones) */
    float *k, *v, *q;
};

static void fill_with_nan(const struct scene *s)
{
    struct kv_stats st;
    kv_stats(s->kv, &st);
    memset(kv_k(s->kv, 0, 0, 0), 0xff, (size_t)st.pages * st.page_bytes);
}

/* The types, by number. */
enum { NTYPES = KV_Q8 + 1 };

static void scene_open(struct scene *s, int G, int heads, int hd, int T, int rows, enum kv_type type)
{
    static const uint8_t seed[32];
    *s = (struct scene){ .arch = { .L = 2, .G = G, .H = G * heads, .hd = hd }, .T = T,
                         .rows = rows };
    const size_t wide = (size_t)G * (size_t)hd, n = (size_t)T;
    int32_t *tokens = calloc(n, sizeof *tokens);
    size_t bytes = (n / 16 + 3) * kv_page_bytes(&s->arch, type);
    assert_int_equal(kv_create(&s->arch, type, bytes, &s->kv, NULL), ERR_OK);
    fill_with_nan(s); /* what a page held before must not matter */
    assert_int_equal(kv_open(s->kv, seed, tokens, T, &s->seq, NULL), ERR_OK);
    assert_true(kv_reserve(s->kv, &s->seq, T));
    free(tokens);
    s->k = random_floats(n * wide, 2);
    s->v = random_floats(n * wide, 2);
    s->q = random_floats((size_t)rows * wide * (size_t)heads, 2);
    for (int i = 0; i < T; i++)
        attn_store(&ops_scalar, s->kv, s->seq.pages, 1, G, hd, i, s->k + (size_t)i * wide,
                   s->v + (size_t)i * wide, hd);
}

static void scene_close(struct scene *s)
{
    kv_close(s->kv, &s->seq);
    kv_destroy(s->kv);
    free(s->k);
    free(s->v);
    free(s->q);
}

static struct attn_layer scene_layer(const struct scene *s, int window, float *out)
{
    const struct arch *a = &s->arch;
    return (struct attn_layer){ .kv = s->kv, .layer = 1, .H = a->H, .G = a->G, .hd = a->hd,
                                .window = window, .scale = 1 / sqrtf((float)a->hd), .q = s->q,
                                .q_ld = a->H * a->hd, .q_step = a->hd, .out = out };
}

static float *scene_run(const struct scene *s, const struct ops *ops, int window, int chunk)
{
    const struct arch *a = &s->arch;
    float *out = random_floats((size_t)s->rows * (size_t)(a->H * a->hd), 1);
    const struct attn_layer l = scene_layer(s, window, out);
    for (int g = 0; g < a->G; g++)
        for (int r = 0; r < s->rows; r += chunk)
            attn_rows(ops, &l, &(struct attn_span){ s->seq.pages, s->T - s->rows + r, r,
                      s->rows - r < chunk ? s->rows - r : chunk }, g);
    return out;
}

/* --- the definition ------------------------------------------------------------------------------ */
static const float *vector(const struct scene *s, const float *p, int pos, int g)
{
    return p + ((size_t)pos * (size_t)s->arch.G + (size_t)g) * (size_t)s->arch.hd;
}

/* The scale of element d's block of 32. */
static float scale_of(const struct scene *s, const float *x, int d)
{
    float top = 0;
    for (int i = d / 32 * 32; i < s->arch.hd && i < d / 32 * 32 + 32; i++)
        top = fabsf(x[i]) > top ? fabsf(x[i]) : top;
    return f16_to_f32(f32_to_f16(top / 127));
}

/* Element d as it is stored, without a scale. */
static float code(const struct scene *s, const float *x, int d)
{
    if (kv_type_of(s->kv) == KV_F32)
        return x[d];
    if (kv_type_of(s->kv) == KV_F16)
        return f16_to_f32(f32_to_f16(x[d]));
    const float scale = scale_of(s, x, d), c = rintf(x[d] * (1 / scale));
    return scale == 0 ? 0 : c > 127 ? 127 : c < -127 ? -127 : c;
}

/* And what it stands for. */
static double at(const struct scene *s, const float *p, int pos, int g, int d)
{
    const float *x = vector(s, p, pos, g);
    const double c = code(s, x, d);
    return kv_type_of(s->kv) == KV_Q8 ? c * (double)scale_of(s, x, d) : c;
}

static float score(const struct scene *s, const float *q, const float *k)
{
    const bool q8 = kv_type_of(s->kv) == KV_Q8;
    const int hd = s->arch.hd, step = q8 ? 32 : hd;
    float sum = 0;
    for (int begin = 0; begin < hd; begin += step) {
        float acc[4] = { 0 };
        for (int d = begin; d < hd && d < begin + step; d++)
            acc[d % 4] = fmaf(q[d], code(s, k, d), acc[d % 4]);
        const float part = (acc[0] + acc[1]) + (acc[2] + acc[3]);
        sum = q8 ? fmaf(part, scale_of(s, k, begin), sum) : part;
    }
    return sum;
}

struct sums {
    float max, sum[16], *o;
};

static float exp_of(float x)
{
    ops_scalar.exp(&x, 1, &x);
    return x;
}

/* What was gathered so far under a larger maximum. */
static void raise_to(struct sums *m, float max, int hd)
{
    const float fix = exp_of(m->max - max);
    for (int l = 0; l < 16; l++)
        m->sum[l] *= fix;
    for (int d = 0; d < hd; d++)
        m->o[d] *= fix;
    m->max = max;
}

/* Positions [lo, hi) of a segment. */
static void gather(const struct scene *s, const struct attn_layer *l, int r, int h, int lo, int hi,
                   struct sums *m)
{
    const int hd = s->arch.hd, g = h / (s->arch.H / s->arch.G), pos = s->T - s->rows + r;
    const float *q = s->q + ((size_t)r * (size_t)s->arch.H + (size_t)h) * (size_t)hd;
    float *o = m->o;
    *m = (struct sums){ .max = -INFINITY, .o = o };
    for (int d = 0; d < hd; d++)
        o[d] = 0;
    for (int begin = lo / 64 * 64; begin < hi; begin += 64) {
        float w[64], top = -INFINITY;
        const int a = lo > begin ? lo : begin, b = hi < begin + 64 ? hi : begin + 64;
        for (int j = a; j < b; j++) {
            float x = score(s, q, vector(s, s->k, j, g)) * l->scale;
            if (l->softcap > 0)
                ops_scalar.softcap(l->softcap, 1, &x);
            if (l->slopes != NULL)
                x += l->slopes[h] * (float)(j - pos);
            w[j - begin] = x;
            top = x > top ? x : top;
        }
        if (top > m->max)
            raise_to(m, top, hd);
        for (int j = a; j < b; j++) {
            w[j - begin] = exp_of(w[j - begin] - m->max);
            m->sum[j % 16] += w[j - begin];
        }
        for (int j = a; j < b; j++) {
            const float *v = vector(s, s->v, j, g);
            for (int d = 0; d < hd; d++) {
                const bool q8 = kv_type_of(s->kv) == KV_Q8;
                o[d] = fmaf(q8 ? w[j - begin] * scale_of(s, v, d) : w[j - begin], code(s, v, d), o[d]);
            }
        }
    }
}

/* Head h of row r. */
static void by_definition(const struct scene *s, const struct attn_layer *l, int r, int h,
                          float *ret)
{
    const int hd = s->arch.hd, pos = s->T - s->rows + r;
    const int lo = l->window > 0 && pos + 1 > l->window ? pos + 1 - l->window : 0;
    struct sums all = { .o = ret }, next = { .o = malloc((size_t)hd * sizeof(float)) };
    for (int seg = lo / 1024; seg <= pos / 1024; seg++) {
        const int a = lo > seg * 1024 ? lo : seg * 1024;
        const int b = pos + 1 < (seg + 1) * 1024 ? pos + 1 : (seg + 1) * 1024;
        if (seg == lo / 1024) {
            gather(s, l, r, h, a, b, &all);
            continue;
        }
        gather(s, l, r, h, a, b, &next);
        float w = 1;
        if (next.max > all.max)
            raise_to(&all, next.max, hd);
        else
            w = exp_of(next.max - all.max);
        for (int i = 0; i < 16; i++)
            all.sum[i] = fmaf(w, next.sum[i], all.sum[i]);
        for (int d = 0; d < hd; d++)
            ret[d] = fmaf(w, next.o[d], ret[d]);
    }
    for (int n = 8; n > 0; n /= 2)
        for (int i = 0; i < n; i++)
            all.sum[i] += all.sum[i + n];
    const float c = 1 / all.sum[0];
    for (int d = 0; d < hd; d++)
        ret[d] *= c;
    free(next.o);
}

/* Plain softmax attention in fp64; returns the largest error. */
static double scene_error(const struct scene *s, const float *out, int window)
{
    const struct arch *a = &s->arch;
    const int hd = a->hd;
    double *w = malloc((size_t)s->T * sizeof *w), worst = 0;
    for (int r = 0; r < s->rows; r++) {
        for (int h = 0; h < a->H; h++) {
            const int i = s->T - s->rows + r, g = h / (a->H / a->G);
            const int lo = window > 0 && i - window + 1 > 0 ? i - window + 1 : 0;
            const float *q = s->q + ((size_t)r * (size_t)a->H + (size_t)h) * (size_t)hd;
            double top = -INFINITY, sum = 0;
            for (int j = lo; j <= i; j++) {
                w[j] = 0;
                for (int d = 0; d < hd; d++)
                    w[j] += (double)q[d] * at(s, s->k, j, g, d);
                w[j] /= sqrt(hd);
                top = w[j] > top ? w[j] : top;
            }
            for (int j = lo; j <= i; j++)
                sum += w[j] = exp(w[j] - top);
            for (int d = 0; d < hd; d++) {
                double want = 0;
                for (int j = lo; j <= i; j++)
                    want += w[j] / sum * at(s, s->v, j, g, d);
                double off = fabs(want - out[(q - s->q) + d]);
                worst = off > worst ? off : worst;
            }
        }
    }
    free(w);
    return worst;
}

static const struct {
    int G, heads, hd, T, rows, window;
} cases[] = {
    { 1, 1, 8, 1, 1, 0 },       { 2, 1, 16, 16, 16, 0 },  { 2, 2, 20, 33, 33, 0 },
    { 1, 3, 64, 65, 20, 0 },    { 2, 4, 32, 130, 7, 0 },  { 1, 8, 64, 200, 5, 0 },
    { 1, 7, 80, 90, 9, 0 },     { 2, 1, 128, 257, 30, 0 },{ 1, 2, 6, 70, 70, 8 },
    { 2, 1, 8, 1024, 2, 0 },    { 2, 2, 16, 1026, 4, 0 }, { 1, 3, 24, 2100, 3, 0 },
    { 1, 20, 32, 3075, 6, 0 },  { 1, 2, 8, 3000, 5, 1100 }, { 2, 1, 16, 2080, 70, 33 },
    { 2, 4, 16, 150, 40, 8 },   { 1, 1, 96, 300, 66, 64 },{ 1, 4, 48, 140, 33, 1 },
    { 1, 2, 64, 170, 170, 100 },{ 2, 5, 18, 81, 13, 17 },
};
enum { NCASES = sizeof cases / sizeof cases[0] };

static void attention_agrees_with_fp64_softmax(void **state)
{
    (void)state;
    for (int c = 0; c < NCASES; c++) {
        for (int t = 0; t < NTYPES; t++) {
            struct scene s;
            scene_open(&s, cases[c].G, cases[c].heads, cases[c].hd, cases[c].T, cases[c].rows,
                       (enum kv_type)t);
            float *out = scene_run(&s, &ops_scalar, cases[c].window, cases[c].rows);
            double off = scene_error(&s, out, cases[c].window);
            if (!(off < 5e-6))
                fail_msg("case %d, %s: error %g", c, kv_type_name((enum kv_type)t), off);
            free(out);
            scene_close(&s);
        }
    }
}

static void attention_has_the_same_bits_in_any_chunks_and_on_any_instruction_set(void **state)
{
    (void)state;
    const struct ops *const *vector = vector_ops();
    for (int c = 0; c < NCASES; c++) {
        for (int t = 0; t < NTYPES; t++) {
            struct scene s;
            scene_open(&s, cases[c].G, cases[c].heads, cases[c].hd, cases[c].T, cases[c].rows,
                       (enum kv_type)t);
            const size_t bytes =
                (size_t)(s.rows * s.arch.H * s.arch.hd) * sizeof(float);
            float *all = scene_run(&s, &ops_scalar, cases[c].window, cases[c].rows);
            for (int chunk = 1; chunk <= 7; chunk += 2) {
                float *out = scene_run(&s, &ops_scalar, cases[c].window, chunk);
                assert_memory_equal(all, out, bytes);
                free(out);
                for (const struct ops *const *v = vector; *v != NULL; v++) {
                    out = scene_run(&s, *v, cases[c].window, chunk);
                    assert_memory_equal(all, out, bytes);
                    free(out);
                }
            }
            free(all);
            scene_close(&s);
        }
    }
}

/* Scores of thousands, of either sign: the running maximum must keep up without overflow. */
static void attention_stands_extreme_scores(void **state)
{
    (void)state;
    struct scene s;
    scene_open(&s, 1, 2, 32, 200, 3, KV_F32);
    for (int i = 0; i < s.rows * 64; i++)
        s.q[i] *= 4000;
    float *out = scene_run(&s, &ops_scalar, 0, 3);
    for (int i = 0; i < s.rows * 64; i++)
        assert_true(isfinite(out[i]));
    assert_true(scene_error(&s, out, 0) < 2e-2);
    free(out);
    scene_close(&s);
}

/* A later row of the chunk may hold infinite values: earlier rows do not see them. */
static void attention_is_untouched_by_what_it_must_not_see(void **state)
{
    (void)state;
    const struct ops *const *vector = vector_ops();
    for (const struct ops *ops = &ops_scalar; ops != NULL; ops = *vector++) {
        struct scene s;
        scene_open(&s, 1, 1, 32, 40, 8, KV_F32);
        float *clean = scene_run(&s, ops, 0, 8);
        float bad[32];
        for (int i = 0; i < 32; i++)
            bad[i] = i % 2 ? INFINITY : NAN;
        attn_store(&ops_scalar, s.kv, s.seq.pages, 1, 1, 32, 37, bad, bad, 32); /* row 5 of 8 */
        float *out = scene_run(&s, ops, 0, 8);
        assert_memory_equal(clean, out, 5 * 32 * sizeof *out);
        free(clean);
        free(out);
        scene_close(&s);
    }
}

/* Softcap and ALiBi too. */
static void attention_is_what_its_definition_says(void **state)
{
    (void)state;
    static const struct {
        int G, heads, hd, T, rows, window;
        float softcap;
        bool alibi;
    } cases_of[] = {
        { 2, 2, 20, 1024, 3, 0, 0, false },  { 1, 3, 16, 1025, 3, 0, 0, false },
        { 2, 1, 8, 2100, 4, 0, 0, false },   { 1, 2, 12, 3100, 5, 1500, 0, false },
        { 1, 70, 8, 2050, 4, 0, 0, false },  { 1, 3, 10, 2200, 2, 0, 5, false },
        { 1, 4, 16, 2060, 3, 0, 0, true },   { 1, 1, 8, 90, 30, 17, 0, true },
    };
    for (size_t c = 0; c < sizeof cases_of / sizeof cases_of[0]; c++) {
        for (int t = 0; t < NTYPES; t++) {
            struct scene s;
            float slopes[70];
            scene_open(&s, cases_of[c].G, cases_of[c].heads, cases_of[c].hd, cases_of[c].T,
                       cases_of[c].rows, (enum kv_type)t);
            const int H = s.arch.H, hd = s.arch.hd;
            float *out = random_floats((size_t)(s.rows * H * hd), 1);
            float *want = random_floats((size_t)hd, 1);
            struct attn_layer l = scene_layer(&s, cases_of[c].window, out);
            attn_slopes(H, slopes);
            l.softcap = cases_of[c].softcap;
            l.slopes = cases_of[c].alibi ? slopes : NULL;
            for (int g = 0; g < s.arch.G; g++)
                attn_rows(&ops_scalar, &l,
                          &(struct attn_span){ s.seq.pages, s.T - s.rows, 0, s.rows }, g);
            for (int r = 0; r < s.rows; r++)
                for (int h = 0; h < H; h++) {
                    by_definition(&s, &l, r, h, want);
                    if (memcmp(want, out + (r * H + h) * hd, (size_t)hd * sizeof *want) != 0)
                        fail_msg("case %zu, %s: row %d, head %d", c,
                                 kv_type_name((enum kv_type)t), r, h);
                }
            free(out);
            free(want);
            scene_close(&s);
        }
    }
}

/* A step as the scheduler makes it: spans of one sequence at different places, of one row and of
 * many, so that some are shared segment by segment and some go whole. */
static void a_step_has_the_same_bits_on_any_number_of_threads(void **state)
{
    (void)state;
    static const struct {
        int G, heads, hd, T, window;
    } shapes[] = {
        { 1, 4, 16, 9000, 0 }, { 2, 3, 8, 70000, 0 }, { 1, 2, 8, 5000, 2500 }, { 4, 1, 16, 3000, 0 },
    };
    enum { ROWS = 40 };
    for (size_t c = 0; c < sizeof shapes / sizeof shapes[0]; c++) {
        struct scene s;
        const int T = shapes[c].T;
        scene_open(&s, shapes[c].G, shapes[c].heads, shapes[c].hd, T, ROWS,
                   c % 2 ? KV_Q8 : KV_F16);
        const int H = s.arch.H, hd = s.arch.hd;
        const size_t bytes = (size_t)(ROWS * H * hd) * sizeof(float);
        const struct attn_span spans[] = {
            { s.seq.pages, T - 1, 0, 1 },   { s.seq.pages, 3, 1, 1 },    { s.seq.pages, 1023, 2, 3 },
            { s.seq.pages, 100, 5, 20 },    { s.seq.pages, T - 3, 25, 3 }, { s.seq.pages, 2047, 28, 12 },
        };
        float *want = random_floats((size_t)(ROWS * H * hd), 1);
        float *out = random_floats((size_t)(ROWS * H * hd), 1);
        struct attn_layer l = scene_layer(&s, shapes[c].window, want);
        for (size_t i = 0; i < sizeof spans / sizeof spans[0]; i++)
            for (int g = 0; g < s.arch.G; g++)
                attn_rows(&ops_scalar, &l, &spans[i], g);
        struct attn_work w;
        const size_t mem_bytes = attn_lay_out(&w, H, hd, ROWS, NULL);
        void *mem = mem_alloc(mem_bytes);
        assert_non_null(mem);
        attn_lay_out(&w, H, hd, ROWS, mem);
        l.out = out;
        for (int threads = 1; threads <= 5; threads++) {
            struct compute compute = { .isa = ISA_SCALAR };
            assert_int_equal(isa_select(threads % 2 ? "auto" : "scalar", &compute.isa, NULL), ERR_OK);
            assert_int_equal(pool_create(threads, &compute.pool, NULL), ERR_OK);
            for (int i = 0; i < 2; i++) { /* the long row alone, and all */
                memset(out, 0xff, bytes);
                attn_run(&compute, &w, &l, spans, i == 0 ? 1 : 6);
                assert_memory_equal(out, want, i == 0 ? (size_t)(H * hd) * sizeof *out : bytes);
            }
            pool_destroy(compute.pool);
        }
        mem_free(mem, mem_bytes);
        free(want);
        free(out);
        scene_close(&s);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(attention_agrees_with_fp64_softmax),
        cmocka_unit_test(attention_has_the_same_bits_in_any_chunks_and_on_any_instruction_set),
        cmocka_unit_test(attention_is_what_its_definition_says),
        cmocka_unit_test(a_step_has_the_same_bits_on_any_number_of_threads),
        cmocka_unit_test(attention_stands_extreme_scores),
        cmocka_unit_test(attention_is_untouched_by_what_it_must_not_see),
    };
#if defined(__SANITIZE_THREAD__)
    cmocka_set_test_filter("a_step_*"); /* the others have one thread, and take minutes so */
#endif
    return cmocka_run_group_tests(tests, NULL, NULL);
}
