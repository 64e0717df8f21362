/* train.c - a run: how it is put together, its step, its evaluation.
 *
 * Step s of an epoch takes the examples at places s * each ... of the epoch's order, `each` being
 * batch * accumulate; the last step of an epoch may have fewer.  They are packed into micro-batches in
 * that order: a micro-batch ends where the next example would not fit in T rows, or where `batch`
 * examples are in it.  Everything about the data follows from the step number, so there is no place
 * in it to be kept. */
#include "engine/train_int.h"

#include "engine/peft_int.h"
#include "engine/train_rand.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { ROWS_LEAST = 512, HD_MAX = 1024 };

/* --- putting it together ------------------------------------------------------------------------------- */
static int check_set(const struct base *base, const struct train_set *set, const char *what,
                     int *longest, struct err *err)
{
    const struct arch *a = &base->arch;
    for (size_t i = 0; i < set->n; i++) {
        const struct train_example *e = &set->examples[i];
        if (e->n < 2 || e->n > a->max_positions)
            return err_set(err, ERR_INVALID,
                           "%s: example %zu has %d tokens, not 2 to the model's %d", what, i + 1,
                           e->n, a->max_positions);
        for (int k = 0; k < e->n; k++)
            if (e->tokens[k] < 0 || e->tokens[k] >= a->V)
                return err_set(err, ERR_INVALID,
                               "%s: example %zu has token %d, which is not in this model's "
                               "vocabulary of %d", what, i + 1, (int)e->tokens[k], a->V);
        *longest = e->n > *longest ? e->n : *longest;
    }
    return ERR_OK;
}

static int check_data(struct train *t, struct err *err)
{
    int longest = 0;
    if (t->data->n == 0 || t->data->targets == 0)
        return err_set(err, ERR_INVALID, "there is nothing to learn in the data: %zu examples with "
                       "%zu target tokens", t->data->n, (size_t)t->data->targets);
    if (t->data->n > UINT32_MAX)
        return err_set(err, ERR_INVALID, "there are too many examples: %zu", t->data->n);
    int rc = check_set(t->base, t->data, "training data", &longest, err);
    if (rc == ERR_OK && t->valid != NULL)
        rc = check_set(t->base, t->valid, "validation data", &longest, err);
    if (rc == ERR_OK && t->base->arch.hd > HD_MAX)
        rc = err_set(err, ERR_INVALID, "heads of %d numbers cannot be trained through, only up to %d",
                     t->base->arch.hd, HD_MAX);
    t->T = t->o.micro_tokens > 0 ? t->o.micro_tokens : ROWS_LEAST;
    t->T = longest > t->T ? longest : t->T;
    /* No more rows than there are. */
    const uint64_t all = t->data->tokens > (uint64_t)longest ? t->data->tokens : (uint64_t)longest;
    if ((uint64_t)t->T > all)
        t->T = (int)all;
    return rc;
}

/* The modules, methods and numbers of a version that the run goes on from. */
static int continue_from(struct train *t, const struct adapter_src *from, struct err *err)
{
    if (from->method != t->o.method)
        return err_set_slug(err, ERR_INVALID, NULL, "method",
                            "the version to go on from is %s, the job is %s",
                            adapter_method_name(from->method), adapter_method_name(t->o.method));
    t->modules = calloc(from->nmodules + 1, sizeof *t->modules);
    t->from_config = strdup(from->config);
    if (t->modules == NULL || t->from_config == NULL)
        return err_nomem(err);
    for (size_t i = 0; i < from->nextras; i++)
        if (from->extras[i].kind != EXTRA_MAGNITUDE)
            return err_set(err, ERR_INVALID,
                           "the version to go on from has %s (%s), which cannot be trained",
                           from->extras[i].name, adapter_extra_name(from->extras[i].kind));
    for (size_t i = 0; i < from->nmodules; i++) {
        const struct adapter_src_module *m = &from->modules[i];
        if ((int)m->module >= MOD_COUNT || m->layer >= t->base->arch.L)
            return err_set(err, ERR_INVALID,
                           "the version to go on from adapts %s, which cannot be trained", m->path);
        t->modules[t->nmodules++] = (struct train_module){
            .layer = m->layer, .module = m->module, .r = m->rank, .init_r = m->init_rank,
            .in = m->in, .out = m->out, .alpha = m->alpha, .scaling = (float)m->scaling,
            .w = &t->base->layers[m->layer].mod[m->module].w,
        };
        struct train_module *to = &t->modules[i];
        if (m->mask == NULL)
            continue;
        to->mask = malloc((size_t)m->init_rank + 1);
        if (to->mask == NULL)
            return err_nomem(err);
        memcpy(to->mask, m->mask, (size_t)m->init_rank);
    }
    t->continued = true;
    return ERR_OK;
}

static int make_slots(struct train *t, struct err *err)
{
    const size_t L = (size_t)t->base->arch.L;
    t->slots = calloc(L * MOD_COUNT, sizeof(struct train_module *));
    t->ranks = calloc(t->nmodules + 1, sizeof *t->ranks);
    if (t->slots == NULL || t->ranks == NULL)
        return err_nomem(err);
    t->first = t->base->arch.L - 1;
    for (size_t i = 0; i < t->nmodules; i++) {
        struct train_module *m = &t->modules[i];
        t->slots[m->layer * MOD_COUNT + (int)m->module] = m;
        t->first = m->layer < t->first ? m->layer : t->first;
        t->T = m->r > t->T ? m->r : t->T;
    }
    return ERR_OK;
}

static int make_optim(struct train *t, struct err *err)
{
    struct optim_tensor *list = calloc(t->nmodules * 3 + 1, sizeof *list);
    size_t n = 0;
    if (list == NULL)
        return err_nomem(err);
    for (size_t i = 0; i < t->nmodules; i++) {
        const struct train_module *m = &t->modules[i];
        const size_t r = (size_t)m->r;
        if (r > 0) {
            list[n++] = (struct optim_tensor){ m->A, m->gA, r * (size_t)m->in, 1 };
            list[n++] = (struct optim_tensor){ m->B, m->gB, r * (size_t)m->out, t->o.lr_b_ratio };
        }
        if (m->E != NULL && r > 0)
            list[n++] = (struct optim_tensor){ m->E, m->gE, r, 1 };
        if (m->m != NULL)
            list[n++] = (struct optim_tensor){ m->m, m->gm, (size_t)m->out, 1 };
    }
    int rc = optim_create(list, n, t->o.moments, t->o.beta1, t->o.beta2, t->o.eps,
                          t->o.weight_decay, &t->optim, err);
    free(list);
    return rc;
}

static int make_adalora(struct train *t, struct err *err)
{
    if (t->o.method != METHOD_ADALORA)
        return ERR_OK;
    const struct adalora_opts o = {
        .target_r = t->o.rank, .tinit = t->o.adalora.tinit, .tfinal = t->o.adalora.tfinal,
        .deltaT = t->o.adalora.deltaT, .total_step = t->steps, .beta1 = t->o.adalora.beta1,
        .beta2 = t->o.adalora.beta2, .orth_reg_weight = t->o.adalora.orth_reg_weight,
        .keep_all = t->continued,
    };
    struct adalora_module *list = calloc(t->nmodules + 1, sizeof *list);
    if (list == NULL)
        return err_nomem(err);
    for (size_t i = 0; i < t->nmodules; i++) {
        const struct train_module *m = &t->modules[i];
        list[i] = (struct adalora_module){ m->A, m->gA, m->B, m->gB, m->E, m->gE, m->r, m->in,
                                           m->out };
    }
    int rc = adalora_create(&o, list, t->nmodules, &t->adalora, err);
    free(list);
    t->allocated.threshold = NAN;
    for (size_t i = 0; i < t->nmodules; i++)
        t->allocated.budget = t->allocated.kept += t->modules[i].r;
    return rc;
}

int train_plan(struct train *t, const struct train_opts *o, const struct adapter_src *from,
               struct err *err)
{
    int rc = train_opts_check(o, err);
    if (rc == ERR_OK)
        rc = train_opts_copy(o, &t->o, err);
    if (rc == ERR_OK)
        rc = check_data(t, err);
    if (rc != ERR_OK)
        return rc;
    t->steps = train_opts_steps(&t->o, t->data->n);
    if (t->steps > TRAIN_STEPS_MAX)
        return err_set_slug(err, ERR_INVALID, NULL, "epochs",
                            "%d epochs of this data are %lld steps, and a run has at most %d",
                            t->o.epochs, (long long)t->steps, TRAIN_STEPS_MAX);
    train_opts_resolve(&t->o, t->steps);
    t->valid = t->valid != NULL && t->valid->targets > 0 ? t->valid : NULL;
    t->family = family_find(t->base->arch.family);
    t->ops = ops_for(t->compute->isa);
    t->nropes = t->base->arch.rot == 0 ? 0 : t->base->arch.rope_theta_local > 0 ? 2 : 1;
    if (t->valid == NULL && t->o.patience > 0)
        return err_set_slug(err, ERR_INVALID, NULL, "patience",
                            "stopping early needs validation data");
    rc = from != NULL ? continue_from(t, from, err)
                      : train_targets(t->base, &t->o, &t->modules, &t->nmodules, err);
    if (rc == ERR_OK)
        rc = make_slots(t, err);
    if (rc == ERR_OK)
        train_pass_keep(t);
    return rc;
}

int train_create(const struct base *base, const struct compute *c, const struct train_opts *o,
                 const struct train_set *data, const struct train_set *valid,
                 const struct adapter_src *from, struct train **ret, struct err *err)
{
    struct train *t = calloc(1, sizeof *t);
    if (t == NULL)
        return err_nomem(err);
    t->base = base;
    t->compute = c;
    t->data = data;
    t->valid = valid;
    t->epoch_in_order = -1;
    int rc = train_plan(t, o, from, err);
    if (rc == ERR_OK)
        rc = train_pass_create(t, err);
    if (rc == ERR_OK)
        rc = train_params_create(t, from, err);
    if (rc == ERR_OK)
        rc = make_optim(t, err);
    if (rc == ERR_OK)
        rc = make_adalora(t, err);
    if (rc == ERR_OK && (t->order = malloc((data->n + 1) * sizeof *t->order)) == NULL)
        rc = err_nomem(err);
    if (rc != ERR_OK) {
        train_destroy(t);
        return rc;
    }
    train_norms(t);
    *ret = t;
    return ERR_OK;
}

void train_destroy(struct train *t)
{
    if (t == NULL)
        return;
    optim_destroy(t->optim);
    adalora_destroy(t->adalora);
    train_pass_free(t);
    train_params_free(t);
    train_opts_free(&t->o);
    free(t->from_config);
    free(t->ranks);
    free(t->order);
    free(t);
}

/* --- examples ------------------------------------------------------------------------------------------- */
static void batch_clear(struct train_batch *b) { b->rows = b->nsegs = b->ntargets = 0; }

static void batch_add(struct train_batch *b, const struct train_example *e)
{
    b->segs[b->nsegs++] = (struct train_segment){ b->rows, e->n };
    for (int i = 0; i < e->n; i++) {
        b->tokens[b->rows + i] = e->tokens[i];
        b->pos[b->rows + i] = i;
        if (i + 1 < e->n && e->learn[i + 1]) {
            b->target_rows[b->ntargets] = b->rows + i;
            b->targets[b->ntargets++] = e->tokens[i + 1];
        }
    }
    b->rows += e->n;
}

static uint64_t targets_of(const struct train_example *e)
{
    uint64_t n = 0;
    for (int i = 1; i < e->n; i++)
        n += e->learn[i] != 0;
    return n;
}

/* Where step number `step` (from 0) begins in its epoch's order, and how many examples it takes. */
static void place_of(const struct train *t, int64_t step, int64_t *epoch, size_t *first, size_t *n)
{
    const int64_t each = (int64_t)t->o.batch * t->o.accumulate;
    const int64_t per_epoch = ((int64_t)t->data->n + each - 1) / each;
    *epoch = step / per_epoch;
    *first = (size_t)(step % per_epoch * each);
    *n = t->data->n - *first < (size_t)each ? t->data->n - *first : (size_t)each;
}

static void make_order(struct train *t, int64_t epoch)
{
    if (t->epoch_in_order == epoch)
        return;
    if (t->o.shuffle)
        train_rand_permutation(t->o.seed, train_stream(TRAIN_STREAM_SHUFFLE, (uint64_t)epoch),
                               t->order, t->data->n);
    else
        for (size_t i = 0; i < t->data->n; i++)
            t->order[i] = (uint32_t)i;
    t->epoch_in_order = epoch;
}

/* --- a step --------------------------------------------------------------------------------------------- */
/* Gradients of examples order[first .. first + n), in micro-batches. */
static int learn(struct train *t, size_t first, size_t n, float scale, train_stop_fn stop, void *ud,
                 struct train_sum *sum, struct err *err)
{
    struct train_where at = { .step = t->step, .learning = true };
    int rc = ERR_OK;
    for (size_t i = 0; rc == ERR_OK && i < n; at.micro++) {
        batch_clear(&t->batch);
        const size_t group = i / (size_t)t->o.batch;
        for (; i < n && i / (size_t)t->o.batch == group; i++) {
            const struct train_example *e = &t->data->examples[t->order[first + i]];
            if (t->batch.rows + e->n > t->T)
                break;
            batch_add(&t->batch, e);
        }
        if (t->batch.ntargets > 0)
            rc = train_pass(t, &at, scale, stop, ud, sum, err);
    }
    return rc;
}

/* With the gradients at hand.  From optim_step() on the step is not to be stopped any more. */
static int update(struct train *t, double lr, train_stop_fn stop, void *ud,
                  struct train_report *r, struct err *err)
{
    if (t->adalora != NULL)
        r->orth = adalora_orth(t->adalora, t->compute, 1);
    r->grad_norm = optim_grad_norm(t->optim);
    if (!isfinite(r->loss) || !isfinite(r->orth) || !isfinite(r->grad_norm))
        return err_set_slug(err, ERR_INVALID, "diverged", NULL,
                            "step %lld: the %s is not a number any more; a lower learning rate may "
                            "help", (long long)t->step + 1,
                            isfinite(r->loss) ? "gradient" : "loss");
    if (stop != NULL && stop(ud))
        return err_set(err, ERR_CANCELLED, "stopped");
    if (t->o.clip > 0 && r->grad_norm > t->o.clip)
        optim_scale_grads(t->optim, (float)(t->o.clip / (r->grad_norm + 1e-6)));
    optim_step(t->optim, t->compute, lr);
    if (t->adalora != NULL)
        adalora_update(t->adalora, t->compute, t->adalora_first + t->step, &t->allocated);
    train_norms(t);
    return ERR_OK;
}

int train_step(struct train *t, train_stop_fn stop, void *ud, struct train_report *ret,
               struct err *err)
{
    const double began = now_mono();
    struct train_report r = { .step = t->step + 1, .steps = t->steps, .budget = -1,
                              .threshold = NAN };
    struct train_sum sum = { 0, 0 };
    int64_t epoch;
    size_t first, n;
    if (t->step >= t->steps)
        return err_set(err, ERR_CONFLICT, "the run is over: all %lld steps are done",
                       (long long)t->steps);
    place_of(t, t->step, &epoch, &first, &n);
    make_order(t, epoch);
    for (size_t i = 0; i < n; i++) {
        const struct train_example *e = &t->data->examples[t->order[first + i]];
        r.tokens += (uint64_t)e->n;
        r.targets += targets_of(e);
    }
    optim_zero_grads(t->optim);
    const double targets = r.targets > 0 ? (double)r.targets : 1;
    int rc = learn(t, first, n, (float)(1 / targets), stop, ud, &sum, err);
    if (rc != ERR_OK)
        return rc;
    r.loss = sum.loss / targets;
    r.accuracy = (double)sum.hits / targets;
    r.epoch = (double)epoch + (double)(first + n) / (double)t->data->n;
    r.lr = optim_lr(&t->o, t->step + 1, t->steps);
    rc = update(t, r.lr, stop, ud, &r, err);
    if (rc != ERR_OK)
        return rc;
    if (t->adalora != NULL) {
        r.budget = t->allocated.budget;
        r.threshold = t->allocated.threshold;
        r.kept = t->allocated.kept;
    }
    t->step++;
    r.seconds = now_mono() - began;
    *ret = r;
    return ERR_OK;
}

int train_evaluate(struct train *t, const struct train_set *set, train_stop_fn stop, void *ud,
                   struct train_valid *ret, struct err *err)
{
    const struct train_where at = { .step = t->step };
    struct train_sum sum = { 0, 0 };
    int longest = 0, rc = check_set(t->base, set, "evaluation data", &longest, err);
    if (rc == ERR_OK && longest > t->T)
        rc = err_set(err, ERR_INVALID, "evaluation data: the longest example has %d tokens, and the "
                     "run has room for %d", longest, t->T);
    uint64_t targets = 0;
    for (size_t i = 0; rc == ERR_OK && i < set->n;) {
        batch_clear(&t->batch);
        for (; i < set->n && t->batch.rows + set->examples[i].n <= t->T; i++)
            batch_add(&t->batch, &set->examples[i]);
        targets += (uint64_t)t->batch.ntargets;
        if (t->batch.ntargets > 0)
            rc = train_pass(t, &at, 0, stop, ud, &sum, err);
    }
    if (rc != ERR_OK)
        return rc;
    if (targets == 0)
        return err_set(err, ERR_INVALID, "evaluation data: there are no target tokens");
    *ret = (struct train_valid){ .loss = sum.loss / (double)targets,
                                 .accuracy = (double)sum.hits / (double)targets,
                                 .targets = targets };
    return ERR_OK;
}

/* --- looking at it -------------------------------------------------------------------------------------- */
int64_t train_steps(const struct train *t) { return t->steps; }
int64_t train_step_now(const struct train *t) { return t->step; }

const struct train_rank *train_ranks(struct train *t, size_t *ret_n)
{
    for (size_t i = 0; i < t->nmodules; i++) {
        const struct train_module *m = &t->modules[i];
        int kept = m->r;
        for (int k = 0; m->E != NULL && t->step > 0 && k < m->r; k++)
            kept -= m->E[k] == 0;
        t->ranks[i] = (struct train_rank){ m->layer, (int)m->module, kept, m->init_r };
    }
    *ret_n = t->nmodules;
    return t->ranks;
}

const float *train_importance(const struct train *t, size_t *ret_n)
{
    return t->adalora != NULL && !t->continued ? adalora_scores(t->adalora, ret_n) : NULL;
}
