/* dataset_text.c - text to examples: ids, and which of them are learned.
 *
 * Where the answer begins among the ids is found without offsets from the tokenizer: as many ids as
 * the text up to there has in common with the whole, so that a token across the border counts as
 * the answer's. */
#include "engine/dataset_int.h"

#include <stdlib.h>
#include <string.h>

/* --- the reader ------------------------------------------------------------------------------------- */

static const json_t *config_token(const json_t *config, const char *name)
{
    const json_t *v = json_object_get(config, name);
    if (json_is_object(v))
        v = json_object_get(v, "content");
    return json_is_string(v) && json_string_length(v) > 0 ? v : NULL;
}

static int find_eos(const struct reader *r)
{
    const struct arch *a = &r->m.base->arch;
    const json_t *name = config_token(r->config, "eos_token");
    const int id = name ? tokenizer_id(r->m.tok, json_string_value(name)) : -1;
    if (id >= 0 && id < a->V)
        return id;
    return a->neos > 0 ? a->eos[0] : -1;
}

int reader_init(struct reader *r, const struct dataset_model *m, const struct dataset_opts *o,
                struct dataset_report *rep, struct err *err)
{
    const int most = m->base->arch.max_positions;
    *r = (struct reader){ .m = *m, .o = *o, .rep = rep };
    if (r->o.max_length == 0)
        r->o.max_length = most;
    if (r->o.max_length < 2 || r->o.max_length > most)
        return err_set_slug(err, ERR_INVALID, NULL, "max_length",
                            "the length of examples must be from 2 to the model's %d positions, not %d",
                            most, r->o.max_length);
    if (m->base->tokenizer_config != NULL)
        r->config = json_loads(m->base->tokenizer_config, 0, NULL);
    r->bos = config_token(r->config, "bos_token");
    r->eos = find_eos(r);
    return set_maker_init(&r->maker, o->max_tokens ? o->max_tokens : DATASET_MAX_TOKENS, err);
}

void reader_free(struct reader *r)
{
    set_maker_free(&r->maker);
    json_decref(r->config);
    free(r->ids.ids);
    free(r->part.ids);
    free(r->learn);
    *r = (struct reader){ 0 };
}

/* --- one example ----------------------------------------------------------------------------------- */

/* Room for one learn byte per id and one more. */
static int grow_learn(struct reader *r, struct err *err)
{
    if (r->ids.n < r->learn_cap)
        return ERR_OK;
    const size_t cap = r->ids.n + r->ids.n / 2 + 256;
    uint8_t *learn = realloc(r->learn, cap);
    if (learn == NULL)
        return err_nomem(err);
    r->learn = learn;
    r->learn_cap = cap;
    return ERR_OK;
}

int reader_encode(struct reader *r, const char *text, size_t len, struct how how, struct err *err)
{
    const int V = r->m.base->arch.V;
    r->ids.n = 0;
    int rc = tokenizer_encode(r->m.tok, text, len, how.add_special, how.parse_special, 0, &r->ids,
                              err);
    if (rc == ERR_OK)
        rc = grow_learn(r, err);
    for (size_t i = 0; i < r->ids.n && rc == ERR_OK; i++) {
        r->learn[i] = 0;
        if (r->ids.ids[i] < 0 || r->ids.ids[i] >= V)
            rc = err_set(err, ERR_INVALID, "the tokenizer gives id %d, and the model has only the "
                         "%d tokens from 0 on", (int)r->ids.ids[i], V);
    }
    return rc;
}

int reader_place(struct reader *r, const char *text, size_t len, struct how how, size_t *ret,
                 struct err *err)
{
    r->part.n = 0;
    int rc = tokenizer_encode(r->m.tok, text, len, how.add_special, how.parse_special, 0, &r->part,
                              err);
    size_t n = 0;
    while (rc == ERR_OK && n < r->part.n && n < r->ids.n && r->part.ids[n] == r->ids.ids[n])
        n++;
    *ret = n;
    return rc;
}

void reader_learn(struct reader *r, size_t from, size_t to)
{
    for (size_t i = from; i < to && i < r->ids.n; i++)
        r->learn[i] = 1;
}

int reader_end(struct reader *r, struct err *err)
{
    struct tok_ids *t = &r->ids;
    if (r->eos < 0 || (t->n > 0 && t->ids[t->n - 1] == r->eos))
        return ERR_OK;
    if (t->n == t->cap) {
        int32_t *ids = realloc(t->ids, (t->cap + 64) * sizeof *ids);
        if (ids == NULL)
            return err_nomem(err);
        t->ids = ids;
        t->cap += 64;
    }
    r->learn[t->n] = 1; /* grow_learn() left room */
    t->ids[t->n++] = r->eos;
    return ERR_OK;
}

int reader_add(struct reader *r, struct err *err)
{
    const size_t most = (size_t)r->o.max_length;
    size_t n = r->ids.n;
    while (n > 1 && !r->learn[n - 1])
        n--;
    if (n < 2)
        return err_set(err, ERR_INVALID, "there is nothing to learn: %s",
                       r->ids.n < 2 ? "it is less than two tokens" : "the answer has no tokens");
    if (n > (size_t)r->rep->longest)
        r->rep->longest = n < INT32_MAX ? (int)n : INT32_MAX;
    if (n > most) {
        r->rep->cut++;
        n = most;
        while (n > 1 && !r->learn[n - 1])
            n--;
        if (n < 2) {
            r->rep->empty++;
            return ERR_OK;
        }
    }
    int rc = set_maker_add(&r->maker, r->ids.ids, r->learn, n, err);
    r->broken = rc != ERR_OK;
    return rc;
}

/* --- prompt and completion, and text ---------------------------------------------------------------- */

int reader_text(struct reader *r, const struct form *f, struct err *err)
{
    struct how how = { .add_special = true, .parse_special = true };
    struct buf all;
    buf_init(&all, SIZE_MAX / 2);
    if (buf_add(&all, f->prompt.data, f->prompt.len) != ERR_OK ||
        buf_add(&all, f->answer.data, f->answer.len) != ERR_OK) {
        buf_free(&all);
        return err_nomem(err);
    }
    const char *text = all.data ? all.data : "";
    const size_t bos = json_string_length(r->bos);
    if (bos > 0 && all.len >= bos && memcmp(text, json_string_value(r->bos), bos) == 0)
        how.add_special = false; /* it says itself where it begins */
    size_t from = 0;
    int rc = reader_encode(r, text, all.len, how, err);
    if (rc == ERR_OK)
        rc = reader_place(r, text, r->o.learn_prompts ? 0 : f->prompt.len, how, &from, err);
    if (rc == ERR_OK) {
        reader_learn(r, from, r->ids.n);
        rc = reader_end(r, err);
    }
    if (rc == ERR_OK)
        rc = reader_add(r, err);
    buf_free(&all);
    return rc;
}
