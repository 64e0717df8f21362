/* adapter_norms.c - DoRA's weight norms: for each output o of an adapted layer the length of
 * W_o + scaling (B A)_o, where W is what the base computes with.
 *
 * A row of W is dequantised, the rank's rows of A are added to it with one fused multiply-add per
 * element (dot.h: the same bits on every machine), and squares are summed in double.  This is rank
 * times the size of the base in multiply-adds, so it is done once per version and base, by the
 * thread that loads the adapter, and the store keeps the result. */
#include "engine/adapter.h"

#include "engine/base.h"
#include "engine/dot.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static const struct matrix *matrix_of(const struct base *b, int layer, int module)
{
    return module == MOD_HEAD ? &b->head : &b->layers[layer].mod[module].w;
}

const char *adapter_norms_form(const struct base *base, int layer, int module)
{
    const struct matrix *w = matrix_of(base, layer, module);
    switch (w->type) {
    case MAT_NF4_P16:
        return w->scales32 != NULL ? "nf4/f32" : "nf4/f16";
    case MAT_NF4_FLAT:
        return "nf4";
    case MAT_Q8_P16:
        return "q8";
    case MAT_BF16:
        return "bf16";
    default:
        return "f32";
    }
}

/* Element i of a tensor that may lie unaligned. */
static float widen(const void *v, enum dtype t, size_t i)
{
    float f;
    uint16_t h;
    if (t == DT_F32) {
        memcpy(&f, (const char *)v + 4 * i, sizeof f);
        return f;
    }
    memcpy(&h, (const char *)v + 2 * i, sizeof h);
    return t == DT_F16 ? f16_to_f32(h) : bf16_to_f32(h);
}

static void row_norms(const struct dot_ops *dot, const struct matrix *w, const float *A,
                      const struct adapter_src_module *m, float *row)
{
    const size_t in = (size_t)m->in, k = (size_t)m->rank;
    for (int o = 0; o < m->out; o++) {
        double sum = 0;
        matrix_row(w, o, row);
        for (size_t j = 0; j < k; j++) {
            const double b = (double)widen(m->B, m->dtype, (size_t)o * k + j);
            dot->axpy_f32((float)(m->scaling * b), A + j * in, row, in);
        }
        for (size_t i = 0; i < in; i++)
            sum += (double)row[i] * (double)row[i];
        m->norms[o] = (float)sqrt(sum);
    }
}

static int module_norms(const struct dot_ops *dot, const struct matrix *w,
                        struct adapter_src_module *m, struct err *err)
{
    if (w->N != m->out || w->K != m->in)
        return err_set(err, ERR_INVALID, "%s is %d by %d in the adapter and %d by %d in the base",
                       m->path, m->out, m->in, w->N, w->K);
    const size_t in = (size_t)m->in, n = (size_t)m->rank * in;
    float *A = malloc((n + in + 1) * sizeof *A); /* and a row */
    m->norms = malloc(((size_t)m->out + 1) * sizeof *m->norms);
    const bool done = A != NULL && m->norms != NULL;
    if (done) {
        for (size_t i = 0; i < n; i++)
            A[i] = widen(m->A, m->dtype, i);
        row_norms(dot, w, A, m, A + n);
    }
    free(A);
    return done ? ERR_OK : err_nomem(err);
}

int adapter_norms(const struct base *base, struct adapter_src *src, struct err *err)
{
    enum isa isa;
    if (src->method != METHOD_DORA)
        return ERR_OK;
    int rc = isa_select("auto", &isa, err);
    for (size_t i = 0; rc == ERR_OK && i < src->nmodules; i++) {
        struct adapter_src_module *m = &src->modules[i];
        if (m->norms != NULL || (int)m->module == MOD_EMBED)
            continue;
        if (m->layer < 0 || m->layer >= base->arch.L)
            return err_set(err, ERR_INVALID, "%s is not in this base, which has %d layers", m->path,
                           base->arch.L);
        rc = module_norms(dot_ops(isa), matrix_of(base, m->layer, (int)m->module), m, err);
    }
    return rc;
}
