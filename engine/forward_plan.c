/* forward_plan.c - which rows a step has: groups of neighbours with the same adapters, for the
 * linear layers, and of the same sequence, for attention. */
#include "engine/forward_int.h"

#include <string.h>

static bool same_set(const struct lora_set *a, const struct lora_set *b)
{
    return a == b || lora_set_equal(a, b);
}

static void plan_groups(struct forward *f)
{
    f->ngroups = 0;
    for (int r = 0; r < f->nrows; r++) {
        const struct lora_set *set = f->rows[r].span->lora;
        if (f->ngroups > 0 && same_set(f->groups[f->ngroups - 1].set, set))
            f->groups[f->ngroups - 1].end = r + 1;
        else
            f->groups[f->ngroups++] = (struct lora_group){ r, r + 1, set };
    }
}

static void plan_spans(struct forward *f)
{
    f->nspans = 0;
    for (int r = 0; r < f->nrows; r++) {
        const struct span *of = f->rows[r].span;
        if (r > 0 && f->rows[r - 1].span == of)
            f->spans[f->nspans - 1].n++;
        else
            f->spans[f->nspans++] = (struct attn_span){ of->kv->pages, f->rows[r].pos, r, 1 };
    }
}

void forward_plan(struct forward *f, const struct span *spans, int nspans)
{
    f->nrows = 0;
    for (int s = 0; s < nspans; s++)
        for (int i = 0; i < spans[s].n; i++)
            f->rows[f->nrows++] =
                (struct row){ &spans[s], spans[s].pos + i, spans[s].tokens[i] };
    plan_groups(f);
    plan_spans(f);
}

static bool wanted(const struct row *r)
{
    return r->pos - r->span->pos >= r->span->n - r->span->nlogits;
}

static void move_row(float *p, size_t to, size_t from, size_t n)
{
    memmove(p + to * n, p + from * n, n * sizeof *p);
}

void forward_trim(struct forward *f)
{
    const size_t D = (size_t)f->base->arch.D;
    const size_t angles = (size_t)f->nropes * (size_t)(f->base->arch.rot / 2);
    size_t n = 0;
    for (size_t r = 0; r < (size_t)f->nrows; r++) {
        if (!wanted(&f->rows[r]))
            continue;
        if (n < r) {
            move_row(f->x, n, r, D);
            move_row(f->h, n, r, D);
            move_row(f->cos, n, r, angles);
            move_row(f->sin, n, r, angles);
            if (forward_joined(f))
                move_row(f->q.p, n, r, (size_t)f->q.ld);
            f->rows[n] = f->rows[r];
        }
        n++;
    }
    f->nrows = (int)n;
    plan_groups(f);
    plan_spans(f);
}
