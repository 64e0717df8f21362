/* forward_plan.c - which rows a step has: groups of neighbours with the same adapters, for the
 * linear layers, and pieces of about equal cost, for attention. */
#include "engine/forward_int.h"

#include <string.h>

/* Multiply-adds that a piece of attention is cut to, if one block of queries is not more. */
enum { ATTN_PIECE = 1 << 20 };

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

/* Multiply-adds of one row at position pos, for one key/value head. */
static int64_t row_cost(const struct arch *a, int pos)
{
    return (int64_t)(pos + 1) * a->hd * 2 * (a->H / a->G);
}

/* Pieces of about equal cost; at least one full block of queries each, if the rows suffice. */
static void plan_pieces(struct forward *f)
{
    const struct arch *a = &f->base->arch;
    const int heads = a->H / a->G, least = (OPS_QUERIES + heads - 1) / heads;
    f->npieces = 0;
    f->attn_cost = 0;
    for (int r = 0, n; r < f->nrows; r += n) {
        int run = 1;
        while (r + run < f->nrows && f->rows[r + run].span == f->rows[r].span)
            run++;
        const int64_t cost = row_cost(a, f->rows[r].pos + run);
        n = cost < ATTN_PIECE ? (int)(ATTN_PIECE / cost) : 1;
        n = n < least ? least : n;
        n = n > run ? run : n;
        const uint64_t all = (uint64_t)cost * (uint64_t)n;
        const int level = 63 - __builtin_clzll(all);
        f->pieces[f->npieces++] = (struct piece){ f->rows[r].span->kv->pages, f->rows[r].pos,
                                                  r, n, level };
        f->attn_cost += (int64_t)all * a->G;
    }
    /* The costliest first, so that nobody starts a long piece when the others are done. */
    int first[65] = { 0 };
    for (int i = 0; i < f->npieces; i++)
        first[63 - f->pieces[i].level + 1]++;
    for (int i = 1; i < 65; i++)
        first[i] += first[i - 1];
    for (int i = 0; i < f->npieces; i++)
        f->sorted[first[63 - f->pieces[i].level]++] = f->pieces[i];
}

void forward_plan(struct forward *f, const struct span *spans, int nspans)
{
    f->nrows = 0;
    for (int s = 0; s < nspans; s++)
        for (int i = 0; i < spans[s].n; i++)
            f->rows[f->nrows++] =
                (struct row){ &spans[s], spans[s].pos + i, spans[s].tokens[i] };
    plan_groups(f);
    plan_pieces(f);
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
    plan_pieces(f);
}
