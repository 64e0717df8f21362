/* train_estimate.c - what a run will take, before it starts.
 *
 * Memory is counted, by the same functions that lay it out.  Time is measured: the linear layers of
 * one block and the head, there and back, on some rows, the quickest of a few rounds.  A step is that much per row for every
 * block (there, there again on the way back without the down projection, and back), and MARGIN for
 * everything else: norms, attention over rows of usual length, the adapter's own products. */
#include "engine/train_int.h"

#include "engine/linear_dx.h"
#include "engine/mem.h"

#include <stdlib.h>
#include <string.h>

enum { ROWS = 128, ROUNDS = 3 };
#define MARGIN 1.2

/* Seconds for `ROWS` rows through w, there and back. */
struct cost { double there, back; };

static int time_matrix(struct train *t, const struct matrix *w, struct cost *ret, struct err *err)
{
    const size_t in = ROWS * (size_t)w->K, out = ROWS * (size_t)w->N;
    const size_t bytes = (in + out) * sizeof(float);
    float *x = mem_alloc(bytes);
    const size_t n = matmul_dx_scratch(t->compute, w, ROWS);
    void *scratch = mem_alloc(n + 64);
    struct act act;
    act_init(&act);
    int rc = x == NULL || scratch == NULL ? err_nomem(err) : act_reserve(&act, ROWS, w->K, err);
    for (int round = 0; rc == ERR_OK && round < ROUNDS; round++) {
        for (size_t i = 0; i < in; i++)
            x[i] = (float)(i % 17) / 16;
        const double began = now_mono();
        act_pack(t->compute, &act, x, ROWS, w->K, w->K);
        matmul(t->compute, w, &act, NULL, x + in, w->N);
        const double half = now_mono();
        matmul_dx(t->compute, w, x + in, ROWS, w->N, x, w->K, false, scratch);
        const struct cost c = { half - began, now_mono() - half };
        if (round == 0 || c.there + c.back < ret->there + ret->back)
            *ret = c;
    }
    act_free(&act);
    mem_free(x, bytes);
    mem_free(scratch, n + 64);
    return rc;
}

/* Seconds per row of a training step. */
static int time_row(struct train *t, double *ret, struct err *err)
{
    const int L = t->base->arch.L, trained = L - t->first;
    const int again = trained - 1 - t->nkept; /* blocks that are computed twice */
    double all = 0;
    struct cost c;
    for (int m = 0; m < MOD_COUNT; m++) {
        const struct matrix *w = &t->base->layers[L - 1].mod[m].w;
        if (w->codes == NULL)
            continue;
        int rc = time_matrix(t, w, &c, err);
        if (rc != ERR_OK)
            return rc;
        all += c.there * (L + (m == MOD_DOWN ? 0 : again)) + c.back * trained;
    }
    int rc = time_matrix(t, &t->base->head, &c, err);
    if (rc != ERR_OK)
        return rc;
    const double targets = t->data->tokens > 0
                               ? (double)t->data->targets / (double)t->data->tokens
                               : 1;
    all += (c.there + c.back) * targets;
    *ret = all / ROWS * MARGIN;
    return ERR_OK;
}

static size_t state_bytes(const struct train *t)
{
    size_t n = train_params_bytes(t);
    const bool adalora = t->o.method == METHOD_ADALORA;
    for (size_t i = 0; i < t->nmodules; i++) {
        const struct train_module *m = &t->modules[i];
        const size_t r = (size_t)m->r;
        n += optim_moment_bytes(t->o.moments, r * (size_t)m->in);
        n += optim_moment_bytes(t->o.moments, r * (size_t)m->out);
        if (adalora)
            n += optim_moment_bytes(t->o.moments, r) +
                 (t->continued ? 0 : adalora_module_bytes(m->r, m->in, m->out));
        if (t->o.method == METHOD_DORA)
            n += optim_moment_bytes(t->o.moments, (size_t)m->out) + (size_t)m->out * 16;
    }
    return n + t->data->n * sizeof(uint32_t);
}

static uint64_t trainable(const struct train *t)
{
    return (uint64_t)(train_params_bytes(t) / (sizeof(float) * (t->o.patience > 0 ? 3 : 2)));
}

int train_estimate(const struct base *base, const struct compute *c, const struct train_opts *o,
                   const struct train_set *data, const struct train_set *valid,
                   const struct adapter_src *from, struct train_estimate *ret, struct err *err)
{
    struct train t = { .base = base, .compute = c, .data = data, .valid = valid };
    double row = 0;
    int rc = train_plan(&t, o, from, err);
    if (rc == ERR_OK)
        rc = time_row(&t, &row, err);
    if (rc == ERR_OK) {
        struct train_estimate e = { .steps = t.steps, .trainable = trainable(&t),
                                    .state_bytes = state_bytes(&t),
                                    .work_bytes = train_pass_bytes(&t) };
        const double per_example = (double)data->tokens / (double)data->n;
        double each = (double)t.o.batch * t.o.accumulate;
        each = each < (double)data->n ? each : (double)data->n;
        if (t.o.method != METHOD_DORA)
            e.keep_all = train_kept_bytes(&t) * (size_t)(base->arch.L - 1 - t.first);
        e.bytes = e.state_bytes + e.work_bytes;
        e.seconds_per_step = row * per_example * each;
        e.seconds = e.seconds_per_step * (double)e.steps;
        *ret = e;
    }
    train_params_free(&t);
    train_opts_free(&t.o);
    free(t.from_config);
    free(t.ranks);
    return rc;
}
