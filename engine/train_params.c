/* train_params.c - the trainable tensors: one array of values, one of gradients, cut up in the order of
 * the modules (A, B, then E or m); where they begin; DoRA's norms.
 *
 * DoRA's norm of output o is |W_o + s (B A)_o|, which changes with every step.  It is not computed
 * from a sum of matrices: |W_o|^2 + 2 s B_o . (A W^T)_o + s^2 B_o (A A^T) B_o^T, where |W_o|^2 is known
 * from the start and A W^T is a product of r rows with the packed weights. */
#include "engine/train_int.h"

#include "engine/delta.h"
#include "engine/mem.h"
#include "engine/train_gemm.h"
#include "engine/train_init.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static size_t scalars(const struct train_opts *o, const struct train_module *m)
{
    const size_t r = (size_t)m->r;
    size_t n = r * (size_t)m->in + r * (size_t)m->out;
    if (o->method == METHOD_ADALORA)
        n += r;
    if (o->method == METHOD_DORA)
        n += (size_t)m->out;
    return n;
}

size_t train_params_bytes(const struct train *t)
{
    const size_t copies = t->o.patience > 0 ? 3 : 2;
    size_t n = 0;
    for (size_t i = 0; i < t->nmodules; i++)
        n += scalars(&t->o, &t->modules[i]);
    return n * copies * sizeof(float);
}

/* Pointers of a module into the arrays. */
static void place(const struct train_opts *o, struct train_module *m, float *p, float *g)
{
    const size_t A = (size_t)m->r * (size_t)m->in, B = (size_t)m->r * (size_t)m->out;
    m->A = p;
    m->gA = g;
    m->B = p + A;
    m->gB = g + A;
    if (o->method == METHOD_ADALORA) {
        m->E = p + A + B;
        m->gE = g + A + B;
    }
    if (o->method == METHOD_DORA) {
        m->m = p + A + B;
        m->gm = g + A + B;
    }
}

static int allocate(struct train *t, struct err *err)
{
    t->nparams = 0;
    for (size_t i = 0; i < t->nmodules; i++)
        t->nparams += scalars(&t->o, &t->modules[i]);
    t->p_bytes = (t->nparams + 1) * sizeof(float);
    t->p = mem_alloc(t->p_bytes);
    t->g = mem_alloc(t->p_bytes);
    t->best = t->o.patience > 0 ? mem_alloc(t->p_bytes) : NULL;
    if (t->p == NULL || t->g == NULL || (t->o.patience > 0 && t->best == NULL))
        return err_set(err, ERR_NOMEM, "there is no memory for %zu trainable numbers", t->nparams);
    size_t at = 0;
    for (size_t i = 0; i < t->nmodules; i++) {
        place(&t->o, &t->modules[i], t->p + at, t->g + at);
        at += scalars(&t->o, &t->modules[i]);
    }
    return ERR_OK;
}

/* --- DoRA ------------------------------------------------------------------------------------------------ */
struct norms {
    struct train_module *m;
    float *row;           /* [threads][in] */
    const float *AW, *AA; /* [r][out], [r][r] */
};

static void square_fn(void *arg, int64_t begin, int64_t end, int thread)
{
    const struct norms *n = arg;
    float *row = n->row + (size_t)thread * (size_t)n->m->in;
    for (int64_t o = begin; o < end; o++) {
        double sum = 0;
        matrix_row(n->m->w, (int)o, row);
        for (int i = 0; i < n->m->in; i++)
            sum += (double)row[i] * (double)row[i];
        n->m->w_norm2[o] = sum;
    }
}

static int allocate_norms(struct train *t, struct err *err)
{
    const size_t threads = (size_t)pool_threads(t->compute->pool);
    for (size_t i = 0; i < t->nmodules; i++) {
        struct train_module *m = &t->modules[i];
        struct norms n = { .m = m };
        m->w_norm2 = malloc((size_t)m->out * sizeof *m->w_norm2);
        m->norm = malloc((size_t)m->out * sizeof *m->norm);
        m->gain = malloc((size_t)m->out * sizeof *m->gain);
        n.row = malloc(threads * (size_t)m->in * sizeof *n.row);
        if (m->w_norm2 == NULL || m->norm == NULL || m->gain == NULL || n.row == NULL) {
            free(n.row);
            return err_nomem(err);
        }
        pool_run(t->compute->pool, m->out, 16, square_fn, &n);
        free(n.row);
    }
    return ERR_OK;
}

/* b AA b^T.  Rows of AA go by in order, and what they add to lies side by side, so that it is vector
 * code; in double, like all of the norm. */
static double quadratic(const float *AA, const float *b, int r)
{
    enum { CHUNK = 64 };
    double sum = 0;
    for (int j = 0; j < r; j += CHUNK) {
        const int n = r - j < CHUNK ? r - j : CHUNK;
        double column[CHUNK] = { 0 };
        for (int k = 0; k < r; k++) {
            const float *row = AA + (size_t)k * (size_t)r + j;
            for (int i = 0; i < n; i++)
                column[i] += (double)row[i] * (double)b[k];
        }
        for (int i = 0; i < n; i++)
            sum += (double)b[j + i] * column[i];
    }
    return sum;
}

static void norm_fn(void *arg, int64_t begin, int64_t end, int thread)
{
    const struct norms *n = arg;
    const struct train_module *m = n->m;
    const int r = m->r;
    const double s = (double)m->scaling;
    (void)thread;
    for (int64_t o = begin; o < end; o++) {
        const float *b = m->B + o * r;
        double cross = 0;
        for (int j = 0; j < r; j++)
            cross += (double)b[j] * (double)n->AW[(int64_t)j * m->out + o];
        const double all = m->w_norm2[o] + 2 * s * cross + s * s * quadratic(n->AA, b, r);
        m->norm[o] = (float)sqrt(all > 0 ? all : 0);
        m->gain[o] = m->norm[o] > 0 ? m->m[o] / m->norm[o] : 0;
    }
}

void train_norms(struct train *t)
{
    if (t->o.method != METHOD_DORA)
        return;
    for (size_t i = 0; i < t->nmodules; i++) {
        struct train_module *m = &t->modules[i];
        /* T is at least the largest rank; u is free between passes. */
        float *AW = m->u, *AA = t->b.gram;
        struct norms n = { .m = m, .AW = AW, .AA = AA };
        act_pack(t->compute, &t->act, m->A, m->r, m->in, m->in);
        matmul(t->compute, m->w, &t->act, NULL, AW, m->out);
        train_gemm(t->compute, false, true, m->r, m->r, m->in, 1, m->A, m->in, m->A, m->in, 0, AA,
                   m->r);
        pool_run(t->compute->pool, m->out, 64, norm_fn, &n);
    }
}

/* --- first values ------------------------------------------------------------------------------------------ */
static void widen(const void *from, enum dtype t, size_t n, float *to)
{
    for (size_t i = 0; i < n; i++)
        to[i] = delta_element(from, t, i);
}

static const struct adapter_src_extra *magnitude_of(const struct adapter_src *src,
                                                    const struct train_module *m)
{
    for (size_t i = 0; i < src->nextras; i++) {
        const struct adapter_src_extra *x = &src->extras[i];
        if (x->kind == EXTRA_MAGNITUDE && x->layer == m->layer && x->module == (int)m->module)
            return x;
    }
    return NULL;
}

static void continue_module(const struct adapter_src *src, const struct adapter_src_module *from,
                            struct train_module *m)
{
    const struct adapter_src_extra *x = m->m != NULL ? magnitude_of(src, m) : NULL;
    widen(from->A, from->dtype, (size_t)m->r * (size_t)m->in, m->A);
    widen(from->B, from->dtype, (size_t)m->r * (size_t)m->out, m->B);
    if (m->E != NULL)
        widen(from->E, from->dtype, (size_t)m->r, m->E);
    if (x != NULL)
        widen(x->data, x->dtype, (size_t)m->out, m->m);
}

static int begin(struct train *t, const struct adapter_src *from, struct err *err)
{
    for (size_t i = 0; i < t->nmodules; i++) {
        struct train_module *m = &t->modules[i];
        if (from != NULL)
            continue_module(from, &from->modules[i], m);
        else
            train_init_module(t->o.method, t->o.init, t->o.seed, m->layer, (int)m->module, m->r,
                              m->in, m->out, m->A, m->B, m->E);
    }
    if (t->o.method != METHOD_DORA)
        return ERR_OK;
    int rc = allocate_norms(t, err);
    for (size_t i = 0; rc == ERR_OK && from == NULL && i < t->nmodules; i++)
        for (int o = 0; o < t->modules[i].out; o++)
            t->modules[i].m[o] = (float)sqrt(t->modules[i].w_norm2[o]);
    return rc;
}

int train_params_create(struct train *t, const struct adapter_src *from, struct err *err)
{
    int rc = allocate(t, err);
    return rc != ERR_OK ? rc : begin(t, from, err);
}

void train_params_free(struct train *t)
{
    for (size_t i = 0; i < t->nmodules; i++) {
        struct train_module *m = &t->modules[i];
        free(m->w_norm2);
        free(m->norm);
        free(m->gain);
        free(m->mask);
    }
    mem_free(t->p, t->p_bytes);
    mem_free(t->g, t->p_bytes);
    mem_free(t->best, t->p_bytes);
    free(t->modules);
    free(t->slots);
}
