/* adalora.c - orthogonality, importance, budget, masks; see the header for the formulas. */
#include "engine/adalora.h"
#include "engine/num.h"
#include "engine/train_bytes.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

struct adalora {
    struct adalora_opts o;
    struct adalora_module *modules;
    size_t n;
    size_t *first;  /* [n]: a module's first triplet among all */
    size_t *offset; /* [n]: its averages begin here */
    size_t triplets, elements;
    float *averages;  /* per module: M of A, B, E, then U of A, B, E; NULL once final */
    float *scores;    /* [triplets] */
    uint32_t *sorted; /* [triplets], scratch */
    bool has_scores, final;
    uint8_t *mask; /* [triplets], of use once final */
    double *gram;  /* [largest r squared], scratch: X^T X - I */
};

static size_t elements_of(int r, int in, int out)
{
    return (size_t)r * ((size_t)in + (size_t)out + 1);
}

size_t adalora_module_bytes(int r, int in, int out)
{
    return 2 * elements_of(r, in, out) * sizeof(float);
}

/* --- making ---------------------------------------------------------------------------------- */
static int check(const struct adalora_opts *o, size_t triplets, size_t n, struct err *err)
{
    if (o->total_step < 1 || o->tinit < 0 || o->tfinal < 0 || o->tfinal > o->total_step ||
        o->tinit >= o->total_step - o->tfinal)
        return err_set(err, ERR_INVALID,
                       "AdaLoRA: tinit %lld is not before total_step %lld minus tfinal %lld",
                       (long long)o->tinit, (long long)o->total_step, (long long)o->tfinal);
    if (o->deltaT < 1)
        return err_set(err, ERR_INVALID, "AdaLoRA: deltaT is %lld, not at least 1",
                       (long long)o->deltaT);
    if (!(o->beta1 > 0 && o->beta1 < 1 && o->beta2 > 0 && o->beta2 < 1))
        return err_set(err, ERR_INVALID, "AdaLoRA: beta1 and beta2 are not between 0 and 1");
    if (o->target_r < 1 || (uint64_t)o->target_r * n > triplets)
        return err_set(err, ERR_INVALID,
                       "AdaLoRA: target_r %d is not between 1 and the rank at the start",
                       o->target_r);
    return ERR_OK;
}

int adalora_create(const struct adalora_opts *o, const struct adalora_module *modules, size_t n,
                   struct adalora **ret, struct err *err)
{
    struct adalora *a = calloc(1, sizeof *a);
    if (a == NULL)
        return err_nomem(err);
    int rc = ERR_NOMEM;
    size_t widest = 0;
    a->o = *o;
    a->n = n;
    a->final = o->keep_all;
    a->modules = malloc((n + 1) * sizeof *modules);
    a->first = malloc((n + 1) * sizeof *a->first);
    a->offset = malloc((n + 1) * sizeof *a->offset);
    if (a->modules == NULL || a->first == NULL || a->offset == NULL)
        goto fail;
    for (size_t i = 0; i < n; i++) {
        const struct adalora_module *m = &modules[i];
        a->modules[i] = *m;
        a->first[i] = a->triplets;
        a->offset[i] = 2 * a->elements;
        a->triplets += (size_t)m->r;
        a->elements += elements_of(m->r, m->in, m->out);
        widest = (size_t)m->r > widest ? (size_t)m->r : widest;
    }
    if (!o->keep_all && (rc = check(o, a->triplets, n, err)) != ERR_OK)
        goto fail;
    rc = ERR_NOMEM;
    a->scores = calloc(a->triplets + 1, sizeof *a->scores);
    a->sorted = malloc((a->triplets + 1) * sizeof *a->sorted);
    a->mask = malloc(a->triplets + 1);
    a->gram = malloc((widest * widest + 1) * sizeof *a->gram);
    if (!a->final)
        a->averages = calloc(2 * a->elements + 1, sizeof *a->averages);
    if (a->scores == NULL || a->sorted == NULL || a->mask == NULL || a->gram == NULL ||
        (a->averages == NULL && !a->final))
        goto fail;
    memset(a->mask, 1, a->triplets + 1);
    *ret = a;
    return ERR_OK;

fail:
    adalora_destroy(a);
    return rc == ERR_NOMEM ? err_nomem(err) : rc;
}

void adalora_destroy(struct adalora *a)
{
    if (a == NULL)
        return;
    free(a->modules);
    free(a->first);
    free(a->offset);
    free(a->averages);
    free(a->scores);
    free(a->sorted);
    free(a->mask);
    free(a->gram);
    free(a);
}

/* --- orthogonality --------------------------------------------------------------------------- */
/* In double, so that it makes no difference that the loops follow memory and not the lanes of
 * dot.h.  Matrices come one after the other; the pool shares the rows of each. */
enum { CHUNK = 64, ROW_GRAIN = 16 };

struct orth {
    const float *X; /* A [r][len], or B [len][r] */
    float *g;
    double *gram; /* [r][r]: A A^T - I, or B^T B - I */
    int r, len;
    double by; /* the gradient is `by` * gram * A, or B * gram */
};

static void gram_rows_A(void *arg, int64_t begin, int64_t end, int thread)
{
    const struct orth *w = arg;
    (void)thread;
    for (int64_t i = begin; i < end; i++)
        for (int64_t j = i; j < w->r; j++) {
            const float *x = w->X + i * w->len, *y = w->X + j * w->len;
            double lane[8] = { 0 }, sum = 0;
            int k = 0;
            for (; k + 8 <= w->len; k += 8)
                for (int l = 0; l < 8; l++)
                    lane[l] += (double)x[k + l] * (double)y[k + l];
            for (; k < w->len; k++)
                sum += (double)x[k] * (double)y[k];
            for (int l = 0; l < 8; l++)
                sum += lane[l];
            w->gram[i * w->r + j] = w->gram[j * w->r + i] = i == j ? sum - 1.0 : sum;
        }
}

static void gram_rows_B(void *arg, int64_t begin, int64_t end, int thread)
{
    const struct orth *w = arg;
    (void)thread;
    for (int64_t i = begin; i < end; i++) {
        double *row = w->gram + i * w->r;
        for (int j = 0; j < w->r; j++)
            row[j] = i == j ? -1.0 : 0.0;
        for (int k = 0; k < w->len; k++) {
            const float *x = w->X + (int64_t)k * w->r;
            const double xi = x[i];
            for (int j = 0; j < w->r; j++)
                row[j] += xi * (double)x[j];
        }
    }
}

/* g[row] += by * sum over j of coefficient[j] * X[j], for rows of n numbers, n apart. */
static void add_rows(float *g, double by, const double *coefficient, int count, const float *X,
                     int n)
{
    double sum[CHUNK];
    for (int k = 0; k < n; k += CHUNK) {
        const int len = n - k < CHUNK ? n - k : CHUNK;
        memset(sum, 0, sizeof sum);
        for (int j = 0; j < count; j++)
            for (int l = 0; l < len; l++)
                sum[l] += coefficient[j] * (double)X[(int64_t)j * n + k + l];
        for (int l = 0; l < len; l++)
            g[k + l] += (float)(by * sum[l]);
    }
}

static void gradient_rows_A(void *arg, int64_t begin, int64_t end, int thread)
{
    const struct orth *w = arg;
    (void)thread;
    for (int64_t i = begin; i < end; i++)
        add_rows(w->g + i * w->len, w->by, w->gram + i * w->r, w->r, w->X, w->len);
}

static void gradient_rows_B(void *arg, int64_t begin, int64_t end, int thread)
{
    const struct orth *w = arg;
    (void)thread;
    for (int64_t o = begin; o < end; o++)
        for (int j = 0; j < w->r; j++) {
            const float *x = w->X + o * w->r;
            const double *column = w->gram + (int64_t)j * w->r; /* symmetric */
            double sum = 0;
            for (int i = 0; i < w->r; i++)
                sum += (double)x[i] * column[i];
            w->g[o * w->r + j] += (float)(w->by * sum);
        }
}

static double norm_of(const double *x, size_t n)
{
    double sum = 0;
    for (size_t i = 0; i < n; i++)
        sum += x[i] * x[i];
    return sqrt(sum);
}

double adalora_orth(struct adalora *a, const struct compute *c, double scale)
{
    const double share = a->n > 0 ? a->o.orth_reg_weight / (2.0 * (double)a->n) : 0;
    double total = 0;
    for (size_t i = 0; i < a->n; i++) {
        const struct adalora_module *m = &a->modules[i];
        const size_t r = (size_t)m->r;
        struct orth w = { .X = m->A, .g = m->gA, .gram = a->gram, .r = m->r, .len = m->in };
        pool_run(c->pool, w.r, 1, gram_rows_A, &w);
        double norm = norm_of(w.gram, r * r);
        total += norm;
        if (norm > 0) {
            w.by = scale * share * 2.0 / norm;
            pool_run(c->pool, w.r, 1, gradient_rows_A, &w);
        }
        w = (struct orth){ .X = m->B, .g = m->gB, .gram = a->gram, .r = m->r, .len = m->out };
        pool_run(c->pool, w.r, 1, gram_rows_B, &w);
        norm = norm_of(w.gram, r * r);
        total += norm;
        if (norm > 0) {
            w.by = scale * share * 2.0 / norm;
            pool_run(c->pool, w.len, ROW_GRAIN, gradient_rows_B, &w);
        }
    }
    return share * total;
}

/* --- importance ------------------------------------------------------------------------------ */
struct betas {
    float keep1, new1, keep2, new2;
};

/* The averages of one scalar move on; returns its score. */
static float move_on(const struct betas *b, float p, float g, float *m, float *u)
{
    const float now = fabsf(p * g);
    *m = b->keep1 * *m + b->new1 * now;
    *u = b->keep2 * *u + b->new2 * fabsf(now - *m);
    return *m * *u;
}

static void score_modules(void *arg, int64_t begin, int64_t end, int thread)
{
    const struct adalora *a = arg;
    const struct betas b = { (float)a->o.beta1, (float)(1.0 - a->o.beta1), (float)a->o.beta2,
                             (float)(1.0 - a->o.beta2) };
    (void)thread;
    for (int64_t at = begin; at < end; at++) {
        const struct adalora_module *w = &a->modules[at];
        float *score = a->scores + a->first[at];
        float *m = a->averages + a->offset[at], *u = m + elements_of(w->r, w->in, w->out);
        const size_t in = (size_t)w->in, r = (size_t)w->r, B = r * in, E = B + r * (size_t)w->out;
        for (size_t i = 0; i < r; i++) {
            double sum = 0;
            for (size_t e = i * in; e < (i + 1) * in; e++)
                sum += (double)move_on(&b, w->A[e], w->gA[e], &m[e], &u[e]);
            score[i] = (float)(sum / w->in);
        }
        for (int i = 0; i < w->r; i += CHUNK) {
            const int count = w->r - i < CHUNK ? w->r - i : CHUNK;
            double sum[CHUNK] = { 0 };
            for (size_t o = 0; o < (size_t)w->out; o++)
                for (int j = 0; j < count; j++) {
                    const size_t e = o * r + (size_t)(i + j);
                    sum[j] += (double)move_on(&b, w->B[e], w->gB[e], &m[B + e], &u[B + e]);
                }
            for (int j = 0; j < count; j++)
                score[i + j] += (float)(sum[j] / w->out);
        }
        for (size_t i = 0; i < r; i++)
            score[i] += move_on(&b, w->E[i], w->gE[i], &m[E + i], &u[E + i]);
    }
}

/* --- budget and masks ------------------------------------------------------------------------ */
int64_t adalora_budget(const struct adalora *a, int64_t step)
{
    const int64_t begin = (int64_t)a->triplets, end = a->o.target_r * (int64_t)a->n;
    const int64_t last = a->o.total_step - a->o.tfinal;
    if (a->o.keep_all || step <= a->o.tinit)
        return begin;
    if (step >= last)
        return end;
    const double x = 1.0 - (double)(step - a->o.tinit) / (double)(last - a->o.tinit);
    /* x^3, rounded once as pow() does: where x^3 times the difference is an integer, the last bit
     * decides.  fma() gives what the two products leave behind. */
    const double square = x * x, square_rest = fma(x, x, -square);
    const double cube = square * x, cube_rest = fma(square, x, -cube) + square_rest * x;
    return (int64_t)((double)(begin - end) * (cube + cube_rest) + (double)end);
}

static int by_value(const void *x, const void *y)
{
    const uint32_t a = *(const uint32_t *)x, b = *(const uint32_t *)y;
    return (a > b) - (a < b);
}

/* The k-th smallest score, 1 <= k <= triplets.  They are not negative, so that their bits are in
 * the same order; a NaN is above all. */
static float kth_smallest(struct adalora *a, size_t k)
{
    for (size_t i = 0; i < a->triplets; i++)
        a->sorted[i] = f32_bits(a->scores[i]);
    qsort(a->sorted, a->triplets, sizeof *a->sorted, by_value);
    return bits_f32(a->sorted[k - 1]);
}

static void mask_E(struct adalora *a)
{
    for (size_t i = 0; i < a->n; i++)
        for (int j = 0; j < a->modules[i].r; j++)
            if (!a->mask[a->first[i] + (size_t)j])
                a->modules[i].E[j] = 0.0f;
}

static int64_t kept(const struct adalora *a)
{
    int64_t n = 0;
    for (size_t i = 0; i < a->n; i++)
        for (int j = 0; j < a->modules[i].r; j++)
            n += a->modules[i].E[j] != 0.0f;
    return n;
}

void adalora_update(struct adalora *a, const struct compute *c, int64_t step,
                    struct adalora_report *ret)
{
    const int64_t last = a->o.total_step - a->o.tfinal;
    struct adalora_report r = { .budget = adalora_budget(a, step), .threshold = (double)NAN };
    if (!a->final && step < last) {
        pool_run(c->pool, (int64_t)a->n, 1, score_modules, a);
        a->has_scores = true;
    }
    const bool rank = !a->final && (step >= last || (step > a->o.tinit && step % a->o.deltaT == 0));
    if (rank) {
        memset(a->mask, 1, a->triplets);
        r.k = (int64_t)a->triplets - r.budget;
        if (r.k > 0 && a->has_scores) {
            const float threshold = kth_smallest(a, (size_t)r.k);
            for (size_t i = 0; i < a->triplets; i++)
                a->mask[i] = !(a->scores[i] <= threshold);
            r.threshold = (double)threshold;
        }
        if (step >= last) {
            a->final = true;
            free(a->averages);
            a->averages = NULL;
        }
    }
    r.masked = rank || a->final;
    if (r.masked)
        mask_E(a);
    r.final = a->final;
    r.kept = kept(a);
    *ret = r;
}

const uint8_t *adalora_mask(const struct adalora *a, size_t *ret_n)
{
    *ret_n = a->triplets;
    return a->final ? a->mask : NULL;
}

const float *adalora_scores(const struct adalora *a, size_t *ret_n)
{
    *ret_n = a->triplets;
    return a->has_scores ? a->scores : NULL;
}

/* --- saving ---------------------------------------------------------------------------------- */
/* "ADAL", version 1, head; scores, if there are any; the mask, once final, or the averages. */
static const char magic[8] = { 'A', 'D', 'A', 'L', 1, 0, 0, 0 };
struct head {
    uint64_t modules, triplets, elements, has_scores, final;
};

static size_t averages_bytes(const struct adalora *a) { return 2 * a->elements * sizeof(float); }

size_t adalora_state_bytes(const struct adalora *a)
{
    return sizeof magic + sizeof(struct head) + (a->has_scores ? a->triplets * sizeof(float) : 0) +
           (a->final ? a->triplets : averages_bytes(a));
}

int adalora_save(const struct adalora *a, struct buf *ret, struct err *err)
{
    const size_t before = ret->len;
    const struct head head = { a->n, a->triplets, a->elements, a->has_scores, a->final };
    int rc = buf_add(ret, magic, sizeof magic);
    if (rc == ERR_OK)
        rc = buf_add(ret, &head, sizeof head);
    if (rc == ERR_OK && a->has_scores)
        rc = buf_add(ret, a->scores, a->triplets * sizeof(float));
    if (rc == ERR_OK)
        rc = a->final ? buf_add(ret, a->mask, a->triplets)
                      : buf_add(ret, a->averages, averages_bytes(a));
    if (rc != ERR_OK) {
        ret->len = before;
        return err_set(err, rc, "no room for AdaLoRA's state");
    }
    return ERR_OK;
}

static bool mask_ok(const uint8_t *mask, size_t n)
{
    for (size_t i = 0; i < n; i++)
        if (mask[i] > 1)
            return false;
    return true;
}

int adalora_restore(struct adalora *a, const void **at, size_t *left, struct err *err)
{
    struct train_bytes b = { *at, *left };
    char m[sizeof magic];
    struct head head;
    if (!train_bytes_take(&b, m, sizeof m) || memcmp(m, magic, sizeof m) != 0 ||
        !train_bytes_take(&b, &head, sizeof head) || head.has_scores > 1 || head.final > 1)
        return err_set(err, ERR_INVALID, "AdaLoRA's saved state is damaged");
    if (head.modules != a->n || head.triplets != a->triplets || head.elements != a->elements ||
        (a->o.keep_all && !head.final))
        return err_set(err, ERR_INVALID, "AdaLoRA's saved state is of another adapter");

    const size_t scores_len = head.has_scores ? a->triplets * sizeof(float) : 0;
    const void *scores = train_bytes_skip(&b, scores_len), *averages = NULL;
    const uint8_t *mask = NULL;
    if (head.final)
        mask = train_bytes_skip(&b, a->triplets);
    else
        averages = train_bytes_skip(&b, averages_bytes(a));
    if (scores == NULL || !train_bytes_floats_ok(scores, scores_len / sizeof(float), 0) ||
        (head.final ? mask == NULL || !mask_ok(mask, a->triplets)
                    : averages == NULL || !train_bytes_floats_ok(averages, 2 * a->elements, 0)))
        return err_set(err, ERR_INVALID, "AdaLoRA's saved state is damaged");

    if (averages != NULL && a->averages == NULL) {
        a->averages = malloc(averages_bytes(a) + 1);
        if (a->averages == NULL)
            return err_nomem(err);
    }
    if (averages != NULL) {
        memcpy(a->averages, averages, averages_bytes(a));
    } else {
        free(a->averages);
        a->averages = NULL;
        memcpy(a->mask, mask, a->triplets);
    }
    memcpy(a->scores, scores, scores_len);
    a->has_scores = head.has_scores != 0;
    a->final = head.final != 0;
    *at = b.at;
    *left = b.left;
    return ERR_OK;
}
