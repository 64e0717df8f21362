/* forward_vocab.c - both ends of the pass: rows of the embedding, and the output head, with what
 * adapters add to them or have in their place. */
#include "engine/forward_int.h"

static enum mat_type mat_type(enum dtype t)
{
    return t == DT_F32 ? MAT_F32 : t == DT_F16 ? MAT_F16 : MAT_BF16;
}

/* An adapter with a table or rows of its own is alone in its set. */
void forward_embed(const struct forward *f, const struct lora_set *set, int32_t token, float *x)
{
    struct matrix embed = f->base->embed;
    const struct adapter *own = set->n > 0 ? set->item[0].adapter : NULL;
    const void *row = own != NULL ? adapter_row(&own->embed_rows, embed.K, token) : NULL;
    if (row != NULL) {
        const struct matrix one = { .type = mat_type(own->embed_rows.dtype), .N = 1, .K = embed.K,
                                    .codes = row };
        matrix_row(&one, 0, x);
        return; /* LoRA of the embedding does not go with this (peft_tokens.c) */
    }
    if (own != NULL && own->embed.data != NULL) {
        embed.type = mat_type(own->embed.dtype);
        embed.codes = own->embed.data;
    }
    matrix_row(&embed, token, x);
    for (int i = 0; i < set->n; i++)
        lora_embed(f->compute, set->item[i].adapter, set->item[i].weight, token, x);
}

/* Logits of the tokens whose rows of the head an adapter replaces.  f->t is free by now: as many
 * tokens at a time as fit there. */
static void head_rows(struct forward *f, const struct lora_group *gr, const struct adapter_rows *own)
{
    const int D = f->base->arch.D, V = f->base->arch.V;
    const struct act rows = { .x = f->h + (size_t)gr->begin * (size_t)D, .M = gr->end - gr->begin,
                              .K = D, .ldx = D };
    for (int at = 0; at < own->n; at += D) {
        const int n = own->n - at < D ? own->n - at : D;
        const struct matrix w = {
            .type = mat_type(own->dtype), .N = n, .K = D,
            .codes = (const char *)own->data + (size_t)at * (size_t)D * dtype_size(own->dtype),
        };
        matmul(f->compute, &w, &rows, NULL, f->t, D);
        for (int r = 0; r < rows.M; r++)
            for (int i = 0; i < n; i++)
                f->logits[(size_t)(gr->begin + r) * (size_t)V + (size_t)own->ids[at + i]] =
                    f->t[(size_t)r * (size_t)D + (size_t)i];
    }
}

/* The base's head for all rows, unless every group brings its own. */
void forward_head(struct forward *f)
{
    static const enum module mod = (enum module)MOD_HEAD;
    const struct arch *a = &f->base->arch;
    const float *const bias = NULL;
    bool base = false;
    for (int g = 0; g < f->ngroups; g++)
        base = base || f->groups[g].set->n == 0 ||
               f->groups[g].set->item[0].adapter->head.data == NULL;
    act_pack(f->compute, &f->act, f->h, f->nrows, a->D, a->D);
    if (base)
        matmul(f->compute, &f->base->head, &f->act, NULL, f->logits, a->V);
    for (int g = 0; g < f->ngroups; g++) {
        const struct lora_group *gr = &f->groups[g];
        const struct adapter_table *t = gr->set->n > 0 ? &gr->set->item[0].adapter->head : NULL;
        if (t != NULL)
            head_rows(f, gr, &gr->set->item[0].adapter->head_rows);
        if (t == NULL || t->data == NULL)
            continue;
        const struct matrix own = { .type = mat_type(t->dtype), .N = a->V, .K = a->D,
                                    .codes = t->data };
        const struct act rows = { .x = f->h + (size_t)gr->begin * (size_t)a->D,
                                  .M = gr->end - gr->begin, .K = a->D, .ldx = a->D };
        matmul(f->compute, &own, &rows, NULL, f->logits + (size_t)gr->begin * (size_t)a->V, a->V);
    }
    lora_apply(f->compute, f->groups, f->ngroups, &(struct lora_where){ 0, &mod, 1 }, f->h, a->D,
               &f->logits, &a->V, f->lora);
    lora_finish(f->compute, f->groups, f->ngroups, 0, &mod, 1, &bias, &f->logits, &a->V);
}
