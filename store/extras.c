/* extras.c - tensors of a version beside its factors, and DoRA's weight norms.
 *
 * The norms of a version are computed by whoever loads it first for a base (a loader's thread) and
 * written here; everybody after reads them.  They are a result that can be had again, so failing to
 * write them fails nobody. */
#include "store/store_int.h"

#include "engine/base.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static const char *const norm_names[NORM_COUNT] = {
    [NORM_ATTN] = "attn",         [NORM_MLP] = "mlp",     [NORM_POST_ATTN] = "post_attn",
    [NORM_POST_MLP] = "post_mlp", [NORM_Q] = "q",         [NORM_K] = "k",
    [NORM_EMBED] = "embed",       [NORM_FINAL] = "final",
};

static bool is_norm(enum adapter_extra k) { return k == EXTRA_NORM || k == EXTRA_NORM_BIAS; }

static bool has_module(enum adapter_extra k)
{
    return k == EXTRA_MAGNITUDE || k == EXTRA_LORA_BIAS || k == EXTRA_BIAS;
}

static const char *part_name(const struct adapter_src_extra *x)
{
    if (is_norm(x->kind))
        return norm_names[x->module];
    return has_module(x->kind) ? tensors_module_name(x->module) : adapter_extra_name(x->kind);
}

static const char *dtype_of(const struct adapter_src_extra *x)
{
    if (adapter_extra_is_ids(x->kind))
        return x->dtype == DT_I32 ? "I32" : NULL;
    return tensors_dtype_name(x->dtype);
}

static size_t bytes_of(const struct adapter_src_extra *x)
{
    return adapter_extra_count(x) * dtype_size(x->dtype);
}

/* --- writing ------------------------------------------------------------------------------- */
static int check_extra(const struct adapter_src_extra *x, struct err *err)
{
    const int names = is_norm(x->kind) ? NORM_COUNT : MOD_SLOTS;
    if (x->kind >= EXTRA_KINDS || x->name == NULL || x->rows < 1 || x->rows > TENSOR_MAX_WIDTH ||
        x->cols < 0 || x->cols > TENSOR_MAX_WIDTH || dtype_of(x) == NULL || x->module < 0 ||
        x->module >= names || x->layer < 0 || x->data == NULL)
        return err_set(err, ERR_INTERNAL, "tensor %s of an adapter has impossible shapes",
                       x->name != NULL ? x->name : "?");
    return ERR_OK;
}

int extras_put(struct store *st, int64_t tenant, int64_t version_id, const struct adapter_src *src,
               struct err *err)
{
    int rc = ERR_OK;
    if (src->nextras == 0)
        return ERR_OK;
    struct sql q = sql_open(st,
                            "INSERT INTO extra_tensor (tenant_id, version_id, seq, kind, layer, part,"
                            " name, dtype, rows, cols) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", err);
    struct sql qc = sql_open(st,
                             "INSERT INTO extra_chunk (tenant_id, version_id, seq, chunk, data)"
                             " VALUES (?, ?, ?, ?, ?)", err);
    for (size_t i = 0; i < src->nextras && rc == ERR_OK; i++) {
        const struct adapter_src_extra *x = &src->extras[i];
        rc = check_extra(x, err);
        if (rc != ERR_OK)
            break;
        sql_reset(&q);
        sql_int(&q, tenant);
        sql_int(&q, version_id);
        sql_int(&q, (int64_t)i);
        sql_text(&q, adapter_extra_name(x->kind));
        sql_int(&q, x->layer);
        sql_text(&q, part_name(x));
        sql_text(&q, x->name);
        sql_text(&q, dtype_of(x));
        sql_int(&q, x->rows);
        sql_int(&q, x->cols);
        if (sql_step(&q) != 0)
            break;
        tensors_put_chunks(&qc, tenant, version_id, i, NULL, x->data, bytes_of(x));
        if (qc.rc != SQLITE_OK)
            break;
    }
    int rx = sql_close(&q), rt = sql_close(&qc);
    if (rc == ERR_OK)
        rc = rx != ERR_OK ? rx : rt;
    if (rc == ERR_CONFLICT)
        rc = err_set(err, ERR_INTERNAL, "an adapter names the same tensor twice");
    return rc;
}

/* --- reading ------------------------------------------------------------------------------- */
/* False if the row cannot have been written by extras_put(). */
static bool read_extra(struct sql *q, struct adapter_src_extra *x)
{
    const char *kind = sql_col_text(q, 1), *part = sql_col_text(q, 3), *dtype = sql_col_text(q, 5);
    const int64_t layer = sql_col_int(q, 2), rows = sql_col_int(q, 6), cols = sql_col_int(q, 7);
    *x = (struct adapter_src_extra){ .kind = EXTRA_KINDS, .layer = (int)layer, .rows = (int)rows,
                                     .cols = (int)cols };
    if (kind == NULL || part == NULL || dtype == NULL || layer < 0 || layer > 1 << 20 || rows < 1 ||
        rows > TENSOR_MAX_WIDTH || cols < 0 || cols > TENSOR_MAX_WIDTH)
        return false;
    for (int k = 0; k < EXTRA_KINDS; k++)
        if (strcmp(kind, adapter_extra_name((enum adapter_extra)k)) == 0)
            x->kind = (enum adapter_extra)k;
    const bool ids = adapter_extra_is_ids(x->kind);
    x->dtype = DT_I32;
    if (ids ? strcmp(dtype, "I32") != 0 : !tensors_dtype_parse(dtype, &x->dtype))
        return false;
    if (has_module(x->kind))
        return tensors_module_parse(part, &x->module);
    for (int i = 0; is_norm(x->kind) && i < NORM_COUNT; i++)
        if (strcmp(part, norm_names[i]) == 0) {
            x->module = i;
            return true;
        }
    return x->kind == EXTRA_HEAD || x->kind == EXTRA_EMBED || adapter_extra_is_rows(x->kind) || ids;
}

int extras_get(struct store *st, int64_t version_id, struct adapter_src *a, struct err *err)
{
    size_t cap = 0;
    bool good = true;
    struct sql q = sql_open(st,
                            "SELECT seq, kind, layer, part, name, dtype, rows, cols FROM extra_tensor"
                            " WHERE version_id = ? ORDER BY seq", err);
    sql_int(&q, version_id);
    while (good && sql_step(&q) == 1) {
        if (a->nextras == cap) {
            cap = cap ? cap * 2 : 64;
            void *p = realloc(a->extras, cap * sizeof *a->extras);
            if (p == NULL) {
                q.rc = SQLITE_NOMEM;
                break;
            }
            a->extras = p;
        }
        struct adapter_src_extra *x = &a->extras[a->nextras];
        good = sql_col_int(&q, 0) == (int64_t)a->nextras && read_extra(&q, x);
        if (good) {
            x->name = sql_col_dup(&q, 4);
            a->nextras++; /* from here adapter_src_free() knows it */
        }
    }
    int rc = sql_close(&q);
    if (rc == ERR_OK && !good)
        rc = tensors_damaged(st, version_id, "extra tensor", a->nextras, "its row makes no sense",
                             err);
    return rc;
}

/* Chunk rows come in order of (seq, chunk): fill one tensor after the other. */
int extras_get_data(struct store *st, int64_t version_id, struct adapter_src *a, struct err *err)
{
    const char *wrong = NULL;
    size_t seq = 0;
    if (a->nextras == 0)
        return ERR_OK;
    struct sql q = sql_open(st,
                            "SELECT seq, chunk, data FROM extra_chunk WHERE version_id = ?"
                            " ORDER BY seq, chunk", err);
    sql_int(&q, version_id);
    for (; seq < a->nextras && wrong == NULL; seq++) {
        const size_t bytes = bytes_of(&a->extras[seq]);
        for (size_t at = 0; at < bytes && wrong == NULL;) {
            int row = sql_step(&q);
            if (row < 0)
                return sql_close(&q);
            size_t len = 0;
            const void *data = row == 1 ? sql_col_blob(&q, 2, &len) : NULL;
            if (data == NULL || sql_col_int(&q, 0) != (int64_t)seq ||
                sql_col_int(&q, 1) != (int64_t)(at / TENSOR_CHUNK))
                wrong = "a chunk is missing";
            else if (len > bytes - at || (len != TENSOR_CHUNK && len != bytes - at))
                wrong = "a chunk has the wrong size";
            else
                memcpy((uint8_t *)(uintptr_t)a->extras[seq].data + at, data, len);
            at += len;
        }
    }
    if (wrong == NULL && sql_step(&q) == 1)
        wrong = "there are chunks too many";
    int rc = sql_close(&q);
    if (rc == ERR_OK && wrong != NULL)
        rc = tensors_damaged(st, version_id, "extra tensor", seq, wrong, err);
    return rc;
}

/* --- weight norms -------------------------------------------------------------------------- */
static void bind_norm(struct sql *q, const struct base *base, int64_t version_id, size_t seq,
                      const struct adapter_src_module *m)
{
    sql_reset(q);
    sql_int(q, version_id);
    sql_int(q, (int64_t)seq);
    sql_blob(q, base->hash, sizeof base->hash);
    sql_text(q, adapter_norms_form(base, m->layer, (int)m->module));
}

/* Those that are stored; *ret_all says that none is missing. */
static int norms_get(struct store *st, int64_t version_id, const struct base *base,
                     struct adapter_src *a, bool *ret_all, struct err *err)
{
    int rc = ERR_OK;
    *ret_all = true;
    struct sql q = sql_open(st,
                            "SELECT norms FROM weight_norm WHERE version_id = ? AND seq = ?"
                            " AND base_hash = ? AND form = ?", err);
    for (size_t i = 0; i < a->nmodules && rc == ERR_OK; i++) {
        struct adapter_src_module *m = &a->modules[i];
        const size_t want = (size_t)m->out * sizeof *m->norms;
        size_t len = 0;
        bind_norm(&q, base, version_id, i, m);
        const int row = sql_step(&q);
        const void *data = row == 1 ? sql_col_blob(&q, 0, &len) : NULL;
        if (row < 0)
            break;
        *ret_all = *ret_all && row == 1;
        if (row == 0)
            continue;
        if (data == NULL || len != want) {
            rc = tensors_damaged(st, version_id, "module", i, "its weight norms have another size",
                                 err);
            break;
        }
        m->norms = malloc(want);
        if (m->norms == NULL)
            rc = err_nomem(err);
        else
            memcpy(m->norms, data, want);
    }
    int rq = sql_close(&q);
    return rc != ERR_OK ? rc : rq;
}

static int norms_put(struct store *st, int64_t version_id, const struct base *base,
                     const struct adapter_src *a, struct err *err)
{
    struct sql q = sql_open(st,
                            "INSERT OR IGNORE INTO weight_norm (tenant_id, version_id, seq, base_hash,"
                            " form, norms) SELECT tenant_id, id, ?2, ?3, ?4, ?5 FROM version"
                            " WHERE id = ?1", err);
    for (size_t i = 0; i < a->nmodules; i++) {
        const struct adapter_src_module *m = &a->modules[i];
        bind_norm(&q, base, version_id, i, m);
        sql_blob(&q, m->norms, (size_t)m->out * sizeof *m->norms);
        if (sql_step(&q) != 0)
            break;
    }
    return sql_close(&q);
}

int extras_add_norms(struct store *st, int64_t version_id, const struct base *base,
                     struct adapter_src *a, struct err *err)
{
    bool all = false;
    int rc = ERR_OK;
    for (size_t i = 0; i < a->nmodules && rc == ERR_OK; i++) /* else it has no form to ask for */
        if (a->modules[i].layer >= base->arch.L || (int)a->modules[i].module == MOD_EMBED)
            rc = err_set(err, ERR_INVALID, "%s is not a layer that DoRA can adapt in this base",
                         a->modules[i].path);
    if (rc == ERR_OK)
        rc = norms_get(st, version_id, base, a, &all, err);
    if (rc != ERR_OK || all)
        return rc;
    rc = adapter_norms(base, a, err);
    if (rc != ERR_OK)
        return rc;
    if (store_begin(st, NULL) == ERR_OK)
        store_end(st, norms_put(st, version_id, base, a, NULL), NULL);
    return ERR_OK;
}
