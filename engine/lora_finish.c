/* lora_finish.c - what an adapter does to a layer's outputs after its factors: biases and DoRA; and
 * low-rank changes of the embedding.
 *
 * y holds x W^T + b + the factors' share.  Per output, each step rounded on its own:
 *   y += weight * lora_bias              a bias inside lora_B, for each adapter of the set in order
 *   y  = (y - b) * scale + b'            DoRA and replaced biases; scale is 1 and b' is b where the
 *                                        adapter has none
 * The base's bias is taken off again rather than added late, so that rows without such adapters
 * cost nothing; a row's result depends on that row alone either way. */
#include "engine/lora.h"

#include "engine/lora_int.h"

struct finish {
    const struct lora_group *group;
    int layer, nmods;
    const enum module *mods;
    const float *const *bias;
    float *const *y;
    const int *ldy;
};

/* Outputs below which a group stays with the caller. */
enum { SERIAL_OUTPUTS = 65536 };

static void replace(const struct lora_module *m, const float *bias, float *y)
{
    for (int o = 0; o < m->out; o++) {
        const float b = bias != NULL ? bias[o] : 0.0f;
        const float f = m->scale != NULL ? m->scale[o] : 1.0f;
        y[o] = (y[o] - b) * f + (m->bias != NULL ? m->bias[o] : b);
    }
}

static void finish_rows(void *arg, int64_t begin, int64_t end, int thread)
{
    const struct finish *f = arg;
    const struct lora_set *set = f->group->set;
    (void)thread;
    for (int64_t n = begin; n < end; n++)
        for (int i = 0; i < f->nmods; i++) {
            float *y = f->y[i] + (f->group->begin + n) * f->ldy[i];
            for (int k = 0; k < set->n; k++) {
                const struct lora_module *m = adapter_module(set->item[k].adapter, f->layer,
                                                             (int)f->mods[i]);
                for (int o = 0; m->lora_bias != NULL && o < m->out; o++)
                    y[o] += set->item[k].weight * m->lora_bias[o];
                if (m->scale != NULL || m->bias != NULL)
                    replace(m, f->bias[i], y);
            }
        }
}

static bool has_vectors(const struct lora_set *set)
{
    for (int i = 0; i < set->n; i++)
        if (set->item[i].adapter->vectors)
            return true;
    return false;
}

void lora_finish(const struct compute *c, const struct lora_group *groups, int ngroups, int layer,
                 const enum module *mods, int nmods, const float *const *bias, float *const *y,
                 const int *ldy)
{
    for (int g = 0; g < ngroups; g++) {
        if (!has_vectors(groups[g].set))
            continue;
        struct finish f = { &groups[g], layer, nmods, mods, bias, y, ldy };
        const int64_t rows = groups[g].end - groups[g].begin;
        int64_t outputs = 0;
        for (int i = 0; i < nmods; i++)
            outputs += rows * ldy[i];
        pool_run(outputs < SERIAL_OUTPUTS ? NULL : c->pool, rows, 1, finish_rows, &f);
    }
}

void lora_embed(const struct compute *c, const struct adapter *a, float weight, int32_t token,
                float *x)
{
    enum { PART = 64 };
    const struct lora_module *m = adapter_module(a, 0, MOD_EMBED);
    const lora_add_fn add = lora_add(c->isa);
    for (int j = 0, n; j < m->rank; j += n) {
        float u[PART];
        n = m->rank - j < PART ? m->rank - j : PART;
        for (int i = 0; i < n; i++) {
            const size_t at = (size_t)token * (size_t)m->rank + (size_t)(j + i);
            const float v = m->dtype == DT_F32   ? ((const float *)m->A)[at]
                            : m->dtype == DT_F16 ? f16_to_f32(((const uint16_t *)m->A)[at])
                                                 : bf16_to_f32(((const uint16_t *)m->A)[at]);
            u[i] = v * (m->gain[j + i] * weight);
        }
        for (int o = 0; o < m->out; o += ADAPTER_PANEL) {
            const int width = m->out - o < ADAPTER_PANEL ? m->out - o : ADAPTER_PANEL;
            const char *b = (const char *)m->B + lora_b_index(m, o, j) * dtype_size(m->dtype);
            add(m->dtype, b, (size_t)width, n, u, PART, 1, x + o, 0, width);
        }
    }
}
