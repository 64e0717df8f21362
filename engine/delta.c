/* delta.c - sizes and differences of the changes that adapters make; see delta.h.
 *
 * A change is a product L^T R of two panels: L is [k][out] (B transposed, times scaling and E),
 * R is [k][in] (A).  The inner product of two changes is the sum of the element-wise product of
 * the Gram matrices of their panels.  The difference of two changes of the same rank is written as
 *     B1 A1 - B2 A2 = (B1 - B2) A1 + B2 (A1 - A2)
 * so that two versions which differ little lose no digits, and equal ones give exactly 0. */
#include "engine/delta.h"

#include "engine/util.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* --- what can be done exactly ------------------------------------------------------------------ */

int delta_check(const struct adapter_src *a, struct err *err)
{
    uint64_t factors = 0;
    switch (a->method) {
    case METHOD_LORA:
    case METHOD_RSLORA:
    case METHOD_ADALORA:
        break;
    default:
        return err_set(err, ERR_INVALID,
                       "the adapter's method is %s, and its change is not a sum of products of its "
                       "factors alone: diff, export and merge take lora, rslora and adalora",
                       adapter_method_name(a->method));
    }
    for (size_t i = 0; i < a->nmodules; i++) {
        const struct adapter_src_module *m = &a->modules[i];
        if ((int)m->module < 0 || m->module >= MOD_COUNT)
            return err_set(err, ERR_INVALID,
                           "the adapter changes %s: diff, export and merge take the linear layers "
                           "of the blocks only",
                           m->path);
        factors += (uint64_t)m->rank *
                   ((uint64_t)m->in + (uint64_t)m->out + (a->method == METHOD_ADALORA ? 1 : 0));
    }
    if (a->nextras > 0)
        return err_set(err, ERR_INVALID,
                       "the adapter has the tensor %s, which is no factor: diff, export and merge do "
                       "not take it",
                       a->extras[0].name);
    if (a->params != factors)
        return err_set(err, ERR_INVALID,
                       "the adapter has %llu numbers beside its factors, which diff, export and merge "
                       "do not take",
                       (unsigned long long)(a->params - factors));
    return ERR_OK;
}

float delta_element(const void *tensor, enum dtype t, size_t i)
{
    float f;
    uint16_t h;
    if (t == DT_F32) {
        memcpy(&f, (const char *)tensor + 4 * i, 4);
        return f;
    }
    memcpy(&h, (const char *)tensor + 2 * i, 2);
    return t == DT_F16 ? f16_to_f32(h) : bf16_to_f32(h);
}

float delta_e(const struct adapter_src_module *m, size_t j)
{
    return m->E != NULL ? delta_element(m->E, m->dtype, j) : 1.0f;
}

/* --- panels ------------------------------------------------------------------------------------ */

/* STEP columns of a panel at a time: fp64 panels of whole layers would not fit the cache. */
enum { STEP = 64 };

/* One of the two panels of a change, or a difference of such panels. */
struct panel {
    const struct adapter_src_module *m, *minus; /* minus may be NULL */
    bool left;                                  /* L, else R */
};

static double panel_at(const struct adapter_src_module *m, bool left, size_t j, size_t c)
{
    if (!left)
        return delta_element(m->A, m->dtype, j * (size_t)m->in + c);
    const double b = delta_element(m->B, m->dtype, c * (size_t)m->rank + j);
    return m->scaling * (double)delta_e(m, j) * b;
}

/* Columns [c0, c0 + n) as ret[n][rank]. */
static void panel_load(const struct panel *p, size_t c0, size_t n, double *ret)
{
    const size_t k = (size_t)p->m->rank;
    for (size_t j = 0; j < k; j++)
        for (size_t c = 0; c < n; c++) {
            double v = panel_at(p->m, p->left, j, c0 + c);
            if (p->minus != NULL)
                v -= panel_at(p->minus, p->left, j, c0 + c);
            ret[c * k + j] = v;
        }
}

/* Room for one product: two strips of panels, two Gram matrices. */
struct gram {
    double *x, *y, *l, *r;
    size_t rank; /* the largest it has room for */
};

static int gram_init(struct gram *g, size_t rank, struct err *err)
{
    g->rank = rank;
    g->x = calloc(STEP * rank + 1, sizeof(double));
    g->y = calloc(STEP * rank + 1, sizeof(double));
    g->l = calloc(rank * rank + 1, sizeof(double));
    g->r = calloc(rank * rank + 1, sizeof(double));
    return g->x && g->y && g->l && g->r ? ERR_OK : err_nomem(err);
}

static void gram_free(struct gram *g)
{
    free(g->x);
    free(g->y);
    free(g->l);
    free(g->r);
}

/* ret[i][j] = sum over columns of p_i q_j. */
static void gram_of(struct gram *g, const struct panel *p, const struct panel *q, double *ret)
{
    const size_t k = (size_t)p->m->rank, l = (size_t)q->m->rank;
    const size_t columns = (size_t)(p->left ? p->m->out : p->m->in);
    memset(ret, 0, k * l * sizeof *ret);
    for (size_t c0 = 0; c0 < columns; c0 += STEP) {
        const size_t n = columns - c0 < STEP ? columns - c0 : STEP;
        panel_load(p, c0, n, g->x);
        panel_load(q, c0, n, g->y);
        for (size_t c = 0; c < n; c++)
            for (size_t i = 0; i < k; i++) {
                const double x = g->x[c * k + i], *y = g->y + c * l;
                double *row = ret + i * l;
                for (size_t j = 0; j < l; j++)
                    row[j] += x * y[j];
            }
    }
}

/* A change is given by its panels L and R. */
struct change {
    struct panel L, R;
};

static struct change change_of(const struct adapter_src_module *m)
{
    return (struct change){ { m, NULL, true }, { m, NULL, false } };
}

static double inner(struct gram *g, const struct change *p, const struct change *q)
{
    const size_t n = (size_t)p->L.m->rank * (size_t)q->L.m->rank;
    if (n == 0)
        return 0;
    gram_of(g, &p->L, &q->L, g->l);
    gram_of(g, &p->R, &q->R, g->r);
    double sum = 0;
    for (size_t i = 0; i < n; i++)
        sum += g->l[i] * g->r[i];
    return sum;
}

/* A sum of squares that rounding made negative is 0. */
static double root(double square) { return square > 0 ? sqrt(square) : 0; }

/* |change of a - change of b|^2 */
static double distance2(struct gram *g, const struct adapter_src_module *a,
                        const struct adapter_src_module *b, double aa, double ab, double bb)
{
    if (a->rank != b->rank || a->rank == 0)
        return aa - 2 * ab + bb;
    const struct change p = { { a, b, true }, { a, NULL, false } };
    const struct change q = { { b, NULL, true }, { a, b, false } };
    return inner(g, &p, &p) + 2 * inner(g, &p, &q) + inner(g, &q, &q);
}

/* --- one adapter --------------------------------------------------------------------------------- */

int delta_norms(const struct adapter_src *a, double *ret, struct err *err)
{
    struct gram g = { 0 };
    int rc = delta_check(a, err);
    if (rc == ERR_OK)
        rc = gram_init(&g, (size_t)a->rank_max, err);
    for (size_t i = 0; rc == ERR_OK && i < a->nmodules; i++) {
        const struct change c = change_of(&a->modules[i]);
        ret[i] = root(inner(&g, &c, &c));
    }
    gram_free(&g);
    return rc;
}

/* --- two adapters -------------------------------------------------------------------------------- */

static int order(const struct adapter_src_module *a, const struct adapter_src_module *b)
{
    return a->layer != b->layer ? (a->layer < b->layer ? -1 : 1)
                                : (a->module > b->module) - (a->module < b->module);
}

/* The next module in the order of both: *ret_a, *ret_b, one of them NULL if only the other has it. */
static bool next_pair(const struct adapter_src *a, size_t *i, const struct adapter_src *b, size_t *j,
                      const struct adapter_src_module **ret_a,
                      const struct adapter_src_module **ret_b)
{
    const struct adapter_src_module *ma = *i < a->nmodules ? &a->modules[*i] : NULL;
    const struct adapter_src_module *mb = *j < b->nmodules ? &b->modules[*j] : NULL;
    if (ma == NULL && mb == NULL)
        return false;
    const int c = ma == NULL ? 1 : mb == NULL ? -1 : order(ma, mb);
    *ret_a = c <= 0 ? ma : NULL;
    *ret_b = c >= 0 ? mb : NULL;
    *i += c <= 0;
    *j += c >= 0;
    return true;
}

/* Products over the panels of a pair: with themselves, each other, and three more for their
 * difference if the ranks are equal. */
double delta_cost(const struct adapter_src *a, const struct adapter_src *b)
{
    const struct adapter_src_module *p, *q;
    double sum = 0;
    for (size_t i = 0, j = 0; next_pair(a, &i, b, &j, &p, &q);) {
        const struct adapter_src_module *m = p != NULL ? p : q;
        if (m == NULL) /* next_pair() gives at least one */
            break;
        const double k = p != NULL ? p->rank : 0, l = q != NULL ? q->rank : 0;
        sum += (k * k + k * l + l * l) * ((double)m->in + m->out) * (p && q && k == l ? 2 : 1);
    }
    return sum;
}

static void compare_pair(struct gram *g, const struct adapter_src_module *a,
                         const struct adapter_src_module *b, struct delta_row *row,
                         struct delta_row *all, double *all_inner)
{
    const struct change p = change_of(a), q = change_of(b);
    const double aa = inner(g, &p, &p), bb = inner(g, &q, &q), ab = inner(g, &p, &q);
    const double dd = distance2(g, a, b, aa, ab, bb);
    row->rank[0] = a->rank;
    row->rank[1] = b->rank;
    row->norm[0] = root(aa);
    row->norm[1] = root(bb);
    row->diff = root(dd);
    row->cosine = aa > 0 && bb > 0 ? fmin(1, fmax(-1, ab / sqrt(aa) / sqrt(bb))) : NAN;
    all->rank[0] += a->rank;
    all->rank[1] += b->rank;
    all->norm[0] += aa; /* squares until the end */
    all->norm[1] += bb;
    all->diff += dd > 0 ? dd : 0;
    *all_inner += ab;
}

static void finish(struct delta_row *all, double ab)
{
    const double aa = all->norm[0], bb = all->norm[1];
    all->norm[0] = root(aa);
    all->norm[1] = root(bb);
    all->diff = root(all->diff);
    all->cosine = aa > 0 && bb > 0 ? fmin(1, fmax(-1, ab / sqrt(aa) / sqrt(bb))) : NAN;
}

static int compare(const struct adapter_src *a, const struct adapter_src *b, struct gram *g,
                   struct delta *d, struct err *err)
{
    const struct adapter_src_module *p, *q;
    double ab = 0;
    for (size_t i = 0, j = 0; next_pair(a, &i, b, &j, &p, &q);) {
        if (p != NULL && q != NULL && (p->in != q->in || p->out != q->out))
            return err_set(err, ERR_CONFLICT,
                           "the adapters are for different bases: %s is %d x %d in the first and "
                           "%d x %d in the second",
                           p->path, p->out, p->in, q->out, q->in);
        if (p == NULL && q == NULL) /* next_pair() gives at least one */
            break;
        struct adapter_src_module none = p != NULL ? *p : *q;
        none.rank = 0;
        struct delta_row *row = &d->rows[d->n++];
        row->path = none.path;
        row->layer = none.layer;
        compare_pair(g, p != NULL ? p : &none, q != NULL ? q : &none, row, &d->all, &ab);
    }
    finish(&d->all, ab);
    return ERR_OK;
}

int delta_compare(const struct adapter_src *a, const struct adapter_src *b, struct delta *ret,
                  struct err *err)
{
    struct gram g = { 0 };
    struct delta d = { 0 };
    int rc = delta_check(a, err);
    if (rc == ERR_OK)
        rc = delta_check(b, err);
    if (rc == ERR_OK)
        rc = gram_init(&g, (size_t)(a->rank_max > b->rank_max ? a->rank_max : b->rank_max), err);
    if (rc == ERR_OK && (d.rows = calloc(a->nmodules + b->nmodules + 1, sizeof *d.rows)) == NULL)
        rc = err_nomem(err);
    if (rc == ERR_OK)
        rc = compare(a, b, &g, &d, err);
    gram_free(&g);
    if (rc != ERR_OK) {
        delta_free(&d);
        return rc;
    }
    *ret = d;
    return ERR_OK;
}

void delta_free(struct delta *d)
{
    free(d->rows);
    *d = (struct delta){ 0 };
}
