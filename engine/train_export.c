/* train_export.c - the adapter of a run, as PEFT would save it: a safetensors image in memory and its
 * adapter_config.json, read back by the same reader that takes uploads.  So what training gives has
 * passed every check that an upload passes. */
#include "engine/train_int.h"

#include "engine/peft_int.h"

#include <stdlib.h>
#include <string.h>

/* One tensor of the image: `rows` x `cols` of `from`, taking only what is kept. */
struct part {
    char name[320];
    const float *from;
    int rows, cols;       /* as stored; cols -1: a vector */
    const uint8_t *keep;  /* of the rows, or with by_col of the columns; NULL: all */
    bool by_col;
};

struct parts {
    struct part *all;
    size_t n;
};

static int count_kept(const uint8_t *keep, int n)
{
    int k = 0;
    for (int i = 0; i < n; i++)
        k += keep == NULL || keep[i];
    return k;
}

static void add(struct parts *p, const char *path, const char *suffix, const float *from, int rows,
                int cols, const uint8_t *keep, bool by_col)
{
    struct part *one = &p->all[p->n++];
    snprintf(one->name, sizeof one->name, "base_model.model.%s%s", path, suffix);
    one->from = from;
    one->rows = rows;
    one->cols = cols;
    one->keep = keep;
    one->by_col = by_col;
}

static void list_parts(const struct train *t, const uint8_t *mask, struct parts *p)
{
    const bool adalora = t->o.method == METHOD_ADALORA;
    char path[256];
    size_t at = 0;
    for (size_t i = 0; i < t->nmodules; i++) {
        const struct train_module *m = &t->modules[i];
        const uint8_t *keep = mask != NULL ? mask + at : NULL;
        at += (size_t)m->r;
        arch_module_path(&t->base->arch, m->layer, m->module, path, sizeof path);
        add(p, path, adalora ? ".lora_A" : ".lora_A.weight", m->A, m->r, m->in, keep, false);
        add(p, path, adalora ? ".lora_B" : ".lora_B.weight", m->B, m->out, m->r, keep, true);
        if (adalora)
            add(p, path, ".lora_E", m->E, m->r, 1, keep, false);
        if (m->m != NULL)
            add(p, path, ".lora_magnitude_vector", m->m, m->out, -1, NULL, false);
    }
}

static void kept_shape(const struct part *p, int *rows, int *cols)
{
    *rows = p->by_col ? p->rows : count_kept(p->keep, p->rows);
    *cols = p->by_col ? count_kept(p->keep, p->cols) : p->cols;
}

static int put_values(const struct part *p, enum dtype dtype, struct buf *ret)
{
    const int cols = p->cols >= 0 ? p->cols : 1;
    int rc = ERR_OK;
    for (int r = 0; r < p->rows && rc == ERR_OK; r++) {
        if (!p->by_col && p->keep != NULL && !p->keep[r])
            continue;
        for (int c = 0; c < cols && rc == ERR_OK; c++) {
            const float v = p->from[(size_t)r * (size_t)cols + (size_t)c];
            const uint16_t h = f32_to_bf16(v);
            if (p->by_col && p->keep != NULL && !p->keep[c])
                continue;
            rc = dtype == DT_F32 ? buf_add(ret, &v, sizeof v) : buf_add(ret, &h, sizeof h);
        }
    }
    return rc;
}

static int put_header(const struct parts *p, enum dtype dtype, struct buf *ret)
{
    size_t at = 0;
    struct buf text;
    buf_init(&text, 100 << 20);
    int rc = buf_puts(&text, "{");
    for (size_t i = 0; rc == ERR_OK && i < p->n; i++) {
        int rows, cols;
        kept_shape(&p->all[i], &rows, &cols);
        const size_t n = (size_t)rows * (cols >= 0 ? (size_t)cols : 1) *
                         dtype_size(dtype);
        rc = buf_printf(&text, "%s\"%s\":{\"dtype\":\"%s\",\"shape\":[", i > 0 ? "," : "",
                        p->all[i].name, dtype == DT_F32 ? "F32" : "BF16");
        if (rc == ERR_OK)
            rc = cols >= 0 ? buf_printf(&text, "%d,%d", rows, cols)
                                    : buf_printf(&text, "%d", rows);
        if (rc == ERR_OK)
            rc = buf_printf(&text, "],\"data_offsets\":[%zu,%zu]}", at, at + n);
        at += n;
    }
    if (rc == ERR_OK)
        rc = buf_puts(&text, "}");
    const uint64_t len = text.len;
    if (rc == ERR_OK)
        rc = buf_add(ret, &len, sizeof len); /* little-endian, as the file is */
    if (rc == ERR_OK)
        rc = buf_add(ret, text.data, text.len);
    buf_free(&text);
    return rc;
}

static int image(const struct train *t, const uint8_t *mask, struct buf *ret)
{
    struct parts p = { calloc(t->nmodules * 4 + 1, sizeof *p.all), 0 };
    if (p.all == NULL)
        return ERR_NOMEM;
    list_parts(t, mask, &p);
    int rc = put_header(&p, t->o.dtype, ret);
    for (size_t i = 0; rc == ERR_OK && i < p.n; i++)
        rc = put_values(&p.all[i], t->o.dtype, ret);
    free(p.all);
    return rc;
}

/* What each triplet was worth goes with the adapter; PEFT's files have no place for it. */
static int put_importance(struct train *t, struct adapter_src *a, struct err *err)
{
    size_t n = 0, at = 0;
    const float *all = train_importance(t, &n);
    for (size_t i = 0; all != NULL && i < a->nmodules; i++) {
        struct adapter_src_module *m = &a->modules[i];
        const size_t r = (size_t)t->modules[i].r; /* the same modules in the same order */
        m->importance = malloc((r + 1) * sizeof *m->importance);
        if (m->importance == NULL)
            return err_nomem(err);
        memcpy(m->importance, all + at, r * sizeof *all);
        at += r;
    }
    return ERR_OK;
}

int train_export(struct train *t, struct adapter_src **ret, struct err *err)
{
    size_t n = 0;
    const uint8_t *mask = t->adalora != NULL && !t->continued ? adalora_mask(t->adalora, &n) : NULL;
    struct buf file;
    struct st_file *st = NULL;
    struct adapter_src *a = NULL;
    char *config = train_config_json(t, mask != NULL);
    buf_init(&file, SIZE_MAX / 2);
    int rc = config == NULL || image(t, mask, &file) != ERR_OK ? err_nomem(err) : ERR_OK;
    if (rc == ERR_OK)
        rc = st_open_mem(file.data, file.len, "the trained adapter", &st, err);
    if (rc == ERR_OK)
        rc = peft_parse(&t->base->arch, config, strlen(config), st, &a, err);
    if (rc == ERR_OK)
        rc = peft_own(a, err);
    if (rc == ERR_OK)
        rc = put_importance(t, a, err);
    st_close(st);
    buf_free(&file);
    free(config);
    if (rc != ERR_OK) {
        adapter_src_free(a);
        return rc;
    }
    *ret = a;
    return ERR_OK;
}
