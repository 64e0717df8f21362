/* train_state.c - a run's state as bytes.
 *
 * Little-endian, in this order:
 *   "lorad train 1\n"
 *   32 bytes each: sha256 of the options' text, the base's hash, the hashes of training and
 *     validation data (zeros without)
 *   i64 steps, step, number of trainable scalars, evaluations since the best;  f64 best loss;
 *   u8 has best, ended early
 *   64 bytes: where the values come from, e.g. "exact avx512 SkylakeX" (precision, instruction set,
 *     BLAS core), zeros behind
 *   f32 values; if there are best values, those too
 *   optim_save(); adalora_save() if the method is AdaLoRA
 *   sha256 of all of it */
#include "engine/train_int.h"

#include "engine/blas.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MAGIC "lorad train 1\n"

struct head {
    uint8_t opts[32], base[32], data[32], valid[32];
    int64_t steps, step, nparams, worse;
    double best_loss;
    uint8_t has_best, ended, zero[6];
    char machine[64];
};

static int make_head(const struct train *t, struct head *ret, struct err *err)
{
    struct buf text;
    buf_init(&text, 1 << 20);
    if (train_opts_text(&t->o, &text) != ERR_OK) {
        buf_free(&text);
        return err_nomem(err);
    }
    *ret = (struct head){ .steps = t->steps, .step = t->step, .nparams = (int64_t)t->nparams,
                          .worse = t->worse, .best_loss = t->best_loss, .has_best = t->has_best,
                          .ended = t->ended };
    snprintf(ret->machine, sizeof ret->machine, "%s %s %s", precision_name(t->compute->precision),
             isa_name(t->compute->isa), blas_core());
    sha256_of(text.data, text.len, ret->opts);
    buf_free(&text);
    memcpy(ret->base, t->base->hash, sizeof ret->base);
    memcpy(ret->data, t->data->hash, sizeof ret->data);
    if (t->valid != NULL)
        memcpy(ret->valid, t->valid->hash, sizeof ret->valid);
    return ERR_OK;
}

static size_t state_bytes(const struct train *t)
{
    return sizeof MAGIC - 1 + sizeof(struct head) + 32 +
           t->nparams * sizeof(float) * (t->has_best ? 2 : 1) + optim_state_bytes(t->optim) +
           (t->adalora != NULL ? adalora_state_bytes(t->adalora) : 0);
}

int train_save(const struct train *t, struct buf *ret, struct err *err)
{
    const size_t begin = ret->len;
    struct head h;
    uint8_t sum[32];
    int rc = make_head(t, &h, err);
    if (rc != ERR_OK)
        return rc;
    rc = buf_reserve(ret, state_bytes(t));
    if (rc == ERR_OK)
        rc = buf_add(ret, MAGIC, sizeof MAGIC - 1);
    if (rc == ERR_OK)
        rc = buf_add(ret, &h, sizeof h);
    if (rc == ERR_OK)
        rc = buf_add(ret, t->p, t->nparams * sizeof *t->p);
    if (rc == ERR_OK && t->has_best)
        rc = buf_add(ret, t->best, t->nparams * sizeof *t->best);
    if (rc == ERR_OK)
        rc = optim_save(t->optim, ret, err);
    if (rc == ERR_OK && t->adalora != NULL)
        rc = adalora_save(t->adalora, ret, err);
    if (rc == ERR_OK) {
        sha256_of(ret->data + begin, ret->len - begin, sum);
        rc = buf_add(ret, sum, sizeof sum);
    }
    if (rc != ERR_OK) {
        ret->len = begin;
        return err_set(err, rc, "there is no room for the state of the run");
    }
    return ERR_OK;
}

/* --- back -------------------------------------------------------------------------------------------------- */
static int refuse(struct err *err, const char *why)
{
    return err_set(err, ERR_INVALID, "the saved state of the run cannot be used: %s", why);
}

static int check_head(const struct train *t, const struct head *h, struct err *err)
{
    struct head mine;
    int rc = make_head(t, &mine, err);
    if (rc != ERR_OK)
        return rc;
    if (memcmp(h->base, mine.base, 32) != 0)
        return refuse(err, "it belongs to another base");
    if (memcmp(h->data, mine.data, 32) != 0 || memcmp(h->valid, mine.valid, 32) != 0)
        return refuse(err, "it belongs to other data");
    if (memcmp(h->opts, mine.opts, 32) != 0 || h->steps != mine.steps ||
        h->nparams != mine.nparams)
        return refuse(err, "it belongs to other options");
    if (h->step < 0 || h->step > h->steps || h->has_best > 1 || h->ended > 1 || h->worse < 0 ||
        h->worse > INT32_MAX || h->machine[sizeof h->machine - 1] != '\0' || (h->has_best && t->best == NULL))
        return refuse(err, "its numbers make no sense");
    return ERR_OK;
}

static bool take(const void **at, size_t *left, void *to, size_t n)
{
    if (*left < n)
        return false;
    memcpy(to, *at, n);
    *at = (const char *)*at + n;
    *left -= n;
    return true;
}

/* The values wait in `p` until everything else has been accepted. */
static int restore(struct train *t, const struct head *h, const void *at, size_t left, float *p,
                   struct err *err)
{
    const size_t n = t->nparams * sizeof *p;
    if (!take(&at, &left, p, n) || (h->has_best && !take(&at, &left, p + t->nparams, n)))
        return refuse(err, "it is cut off");
    int rc = optim_restore(t->optim, &at, &left, err);
    if (rc == ERR_OK && t->adalora != NULL)
        rc = adalora_restore(t->adalora, &at, &left, err);
    if (rc == ERR_OK && left != 0)
        rc = refuse(err, "there is more of it than there should be");
    if (rc != ERR_OK)
        return rc;
    memcpy(t->p, p, n);
    if (h->has_best)
        memcpy(t->best, p + t->nparams, n);
    memcpy(t->elsewhere, h->machine, sizeof h->machine);
    t->step = h->step;
    t->best_loss = h->best_loss;
    t->has_best = h->has_best;
    t->ended = h->ended;
    t->worse = (int)h->worse;
    train_norms(t);
    return ERR_OK;
}

/* NULL, or where the run was computed before if that was elsewhere. */
const char *train_elsewhere(const struct train *t)
{
    struct head mine;
    if (t->elsewhere[0] == '\0' || make_head(t, &mine, NULL) != ERR_OK ||
        strcmp(mine.machine, t->elsewhere) == 0)
        return NULL;
    return t->elsewhere;
}

int train_restore(struct train *t, const void *state, size_t len, struct err *err)
{
    const size_t fixed = sizeof MAGIC - 1 + sizeof(struct head) + 32;
    struct head h;
    uint8_t sum[32];
    if (len < fixed || memcmp(state, MAGIC, sizeof MAGIC - 1) != 0)
        return refuse(err, "it is none");
    sha256_of(state, len - 32, sum);
    if (memcmp((const char *)state + len - 32, sum, 32) != 0)
        return refuse(err, "it is damaged");
    const void *at = (const char *)state + sizeof MAGIC - 1;
    size_t left = len - 32 - (sizeof MAGIC - 1);
    take(&at, &left, &h, sizeof h);
    int rc = check_head(t, &h, err);
    if (rc != ERR_OK)
        return rc;
    float *p = malloc((t->nparams + 1) * 2 * sizeof *p);
    if (p == NULL)
        return err_nomem(err);
    rc = restore(t, &h, at, left, p, err);
    free(p);
    return rc;
}
