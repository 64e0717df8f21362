/* train_loop.c - a whole run: steps, looks at the validation set, checkpoints, the end.
 *
 * The state that decides (best loss, evaluations without a better one) is the train's, so it is saved
 * with it and a resumed run ends where an uninterrupted one does. */
#include "engine/train_int.h"

#include <string.h>

static bool wants_stop(void *ud)
{
    const struct train_hooks *h = ud;
    return h->wanted != NULL && h->wanted(h->ud) != TRAIN_GO_ON;
}

/* Whether this adapter may be the result: AdaLoRA's only with its final ranks. */
static bool eligible(const struct train *t)
{
    size_t n;
    return t->o.method != METHOD_ADALORA || t->continued || adalora_mask(t->adalora, &n) != NULL;
}

static void judge(struct train *t, const struct train_valid *v)
{
    if (t->best == NULL || !eligible(t))
        return;
    if (!t->has_best || v->loss < t->best_loss) {
        memcpy(t->best, t->p, t->nparams * sizeof *t->p);
        t->best_loss = v->loss;
        t->has_best = true;
        t->worse = 0;
        return;
    }
    t->worse++;
    t->ended = t->worse >= t->o.patience;
}

/* One step, a look at the validation set where it is time, and what the hooks do with it.  A stop in
 * the look leaves a step that nobody has judged, which no state may hold (*ret_half): the run goes on
 * from the state before. */
static int one(struct train *t, const struct train_hooks *h, struct train_report *r,
               bool *ret_half, struct err *err)
{
    struct train_valid v, *looked = NULL;
    int rc = train_step(t, wants_stop, (void *)h, r, err);
    if (rc != ERR_OK)
        return rc;
    const bool last = t->step == t->steps;
    const bool look = t->o.eval_every > 0 && t->step % t->o.eval_every == 0;
    if (t->valid != NULL && (look || last)) {
        rc = train_evaluate(t, t->valid, wants_stop, (void *)h, &v, err);
        if (rc != ERR_OK) {
            *ret_half = true;
            return rc;
        }
        looked = &v;
        judge(t, looked);
    }
    if (h->step != NULL && (rc = h->step(h->ud, t, r, looked, err)) != ERR_OK)
        return rc;
    const bool keep = t->step % t->o.checkpoint_every == 0 || last || t->ended;
    return keep && h->checkpoint != NULL ? h->checkpoint(h->ud, t, r, looked, err) : ERR_OK;
}

int train_loop(struct train *t, const struct train_hooks *h, enum train_end *ret, struct err *err)
{
    struct train_report r = { .step = t->step, .steps = t->steps };
    while (t->step < t->steps && !t->ended) {
        const enum train_event e = h->wanted != NULL ? h->wanted(h->ud) : TRAIN_GO_ON;
        bool half = false;
        int rc = e == TRAIN_GO_ON ? one(t, h, &r, &half, err) : ERR_CANCELLED;
        if (rc == ERR_CANCELLED) {
            err_clear(err);
            const bool pause = h->wanted(h->ud) == TRAIN_PAUSE;
            *ret = pause ? TRAIN_PAUSED : TRAIN_CANCELLED;
            return pause && !half && h->checkpoint != NULL ? h->checkpoint(h->ud, t, &r, NULL, err)
                                                           : ERR_OK;
        }
        if (rc != ERR_OK)
            return rc;
    }
    *ret = t->ended ? TRAIN_EARLY : TRAIN_DONE;
    if (t->has_best) {
        memcpy(t->p, t->best, t->nparams * sizeof *t->p);
        train_norms(t);
    }
    return ERR_OK;
}
