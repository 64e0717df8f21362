/* tensors.c - the modules of a version and their tensors, in chunk rows.
 *
 * All tensors of a version are read into one allocation, each on a 64-byte boundary.  The chunks
 * of a tensor must follow each other without a gap and add up to its size: anything else is a
 * damaged database, found here before the hash is looked at. */
#include "engine/util.h"
#include "store/store_int.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

enum { ALIGN = 64, HUGE_PAGE = 2 << 20 };

static const char *const module_names[MOD_SLOTS] = {
    [MOD_Q] = "q",       [MOD_K] = "k",   [MOD_V] = "v",       [MOD_O] = "o",
    [MOD_GATE] = "gate", [MOD_UP] = "up", [MOD_DOWN] = "down",
    [MOD_QKV] = "qkv",   [MOD_GATE_UP] = "gate_up",
    [MOD_HEAD] = "head", [MOD_EMBED] = "embed",
};

const char *tensors_module_name(int module) { return module_names[module]; }

bool tensors_module_parse(const char *name, int *ret)
{
    for (int i = 0; i < MOD_SLOTS; i++)
        if (strcmp(name, module_names[i]) == 0) {
            *ret = i;
            return true;
        }
    return false;
}

static const struct {
    enum dtype dtype;
    const char *name;
} dtypes[] = { { DT_F32, "F32" }, { DT_F16, "F16" }, { DT_BF16, "BF16" } };

const char *tensors_dtype_name(enum dtype t)
{
    for (size_t i = 0; i < sizeof dtypes / sizeof dtypes[0]; i++)
        if (dtypes[i].dtype == t)
            return dtypes[i].name;
    return NULL;
}

bool tensors_dtype_parse(const char *name, enum dtype *ret)
{
    for (size_t i = 0; i < sizeof dtypes / sizeof dtypes[0]; i++)
        if (strcmp(name, dtypes[i].name) == 0) {
            *ret = dtypes[i].dtype;
            return true;
        }
    return false;
}

static const char part_names[3][2] = { "A", "B", "E" };

/* Bytes of part 0 (A), 1 (B), 2 (E). */
static size_t part_bytes(const struct adapter_src *a, const struct adapter_src_module *m, int part)
{
    const size_t row = (size_t)m->rank * dtype_size(m->dtype);
    switch (part) {
    case 0: return row * (size_t)m->in;
    case 1: return row * (size_t)m->out;
    default: return a->method == METHOD_ADALORA ? row : 0;
    }
}

static const void *part_data(const struct adapter_src_module *m, int part)
{
    return part == 0 ? m->A : part == 1 ? m->B : m->E;
}

/* --- writing ------------------------------------------------------------------------------- */
/* What the schema cannot hold is a mistake of whoever made `a`. */
static int check_module(const struct adapter_src *a, const struct adapter_src_module *m,
                        struct err *err)
{
    if (m->rank < 0 || m->init_rank < m->rank || m->init_rank > ADAPTER_MAX_RANK || m->in < 1 ||
        m->out < 1 || m->in > TENSOR_MAX_WIDTH || m->out > TENSOR_MAX_WIDTH || tensors_dtype_name(m->dtype) == NULL ||
        (int)m->module >= MOD_SLOTS || m->path == NULL)
        return err_set(err, ERR_INTERNAL, "module %s of layer %d has impossible shapes",
                       m->path != NULL ? m->path : "?", m->layer);
    /* SQLite keeps neither NaN nor the sign of zero, and the hash covers every bit. */
    if (!isfinite(m->scaling) || !isfinite(m->alpha) || (m->scaling == 0 && signbit(m->scaling)))
        return err_set(err, ERR_INVALID, "%s has a scaling of %g", m->path, m->scaling);
    for (int part = 0; part < 3; part++)
        if ((part_bytes(a, m, part) > 0) != (m->rank > 0 && part_data(m, part) != NULL))
            return err_set(err, ERR_INTERNAL, "%s of method %s %s a tensor %s", m->path,
                           adapter_method_name(a->method),
                           part_data(m, part) != NULL ? "may not have" : "lacks", part_names[part]);
    return ERR_OK;
}

/* "[0.5,0.25]" */
static void put_numbers(struct sql *q, const float *v, int n, struct buf *text)
{
    text->len = 0;
    int rc = buf_puts(text, "[");
    for (int i = 0; i < n && rc == ERR_OK; i++)
        rc = buf_printf(text, "%s%.9g", i > 0 ? "," : "", (double)v[i]);
    if (rc == ERR_OK)
        rc = buf_puts(text, "]");
    if (rc != ERR_OK && q->rc == SQLITE_OK)
        q->rc = SQLITE_NOMEM;
    sql_text_n(q, text->data, text->len);
}

static int put_module(struct sql *q, int64_t tenant, int64_t version_id, size_t seq,
                      const struct adapter_src_module *m, struct buf *text)
{
    char mask[ADAPTER_MAX_RANK + 1];
    sql_reset(q);
    sql_int(q, tenant);
    sql_int(q, version_id);
    sql_int(q, (int64_t)seq);
    sql_int(q, m->layer);
    sql_text(q, module_names[(int)m->module]);
    sql_text(q, m->path);
    sql_int(q, m->rank);
    sql_int(q, m->init_rank);
    sql_real(q, m->alpha);
    sql_real(q, m->scaling);
    sql_int(q, m->in);
    sql_int(q, m->out);
    sql_text(q, tensors_dtype_name(m->dtype));
    if (m->mask != NULL) {
        for (int i = 0; i < m->init_rank; i++)
            mask[i] = m->mask[i] ? '1' : '0';
        sql_text_n(q, mask, (size_t)m->init_rank);
    } else {
        sql_null(q);
    }
    if (m->importance != NULL)
        put_numbers(q, m->importance, m->init_rank, text);
    else
        sql_null(q);
    return sql_step(q);
}

void tensors_put_chunks(struct sql *q, int64_t tenant, int64_t version_id, size_t seq,
                        const char *part, const void *data, size_t bytes)
{
    for (size_t at = 0, chunk = 0; at < bytes; at += TENSOR_CHUNK, chunk++) {
        sql_reset(q);
        sql_int(q, tenant);
        sql_int(q, version_id);
        sql_int(q, (int64_t)seq);
        if (part != NULL)
            sql_text(q, part);
        sql_int(q, (int64_t)chunk);
        sql_blob(q, (const uint8_t *)data + at,
                 bytes - at < TENSOR_CHUNK ? bytes - at : TENSOR_CHUNK);
        if (sql_step(q) != 0)
            return; /* sticks in q */
    }
}

int tensors_put(struct store *st, int64_t tenant, int64_t version_id,
                const struct adapter_src *src, struct err *err)
{
    int rc = ERR_OK;
    struct buf text;
    buf_init(&text, 1 << 20);
    struct sql qm = sql_open(st,
                             "INSERT INTO module (tenant_id, version_id, seq, layer, module, path,"
                             " rank, init_rank, alpha, scaling, inputs, outputs, dtype, mask,"
                             " importance)"
                             " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", err);
    struct sql qc = sql_open(st,
                             "INSERT INTO tensor_chunk (tenant_id, version_id, seq, part, chunk,"
                             " data) VALUES (?, ?, ?, ?, ?, ?)", err);
    for (size_t i = 0; i < src->nmodules && rc == ERR_OK; i++) {
        const struct adapter_src_module *m = &src->modules[i];
        rc = check_module(src, m, err);
        if (rc != ERR_OK || put_module(&qm, tenant, version_id, i, m, &text) != 0)
            break;
        for (int part = 0; part < 3; part++)
            tensors_put_chunks(&qc, tenant, version_id, i, part_names[part], part_data(m, part),
                               part_bytes(src, m, part));
        if (qc.rc != SQLITE_OK)
            break;
    }
    int rm = sql_close(&qm), rt = sql_close(&qc);
    buf_free(&text);
    if (rc == ERR_OK)
        rc = rm != ERR_OK ? rm : rt;
    if (rc == ERR_CONFLICT)
        rc = err_set(err, ERR_INTERNAL, "an adapter names the same module twice");
    return rc != ERR_OK ? rc : extras_put(st, tenant, version_id, src, err);
}

/* --- reading ------------------------------------------------------------------------------- */
int tensors_damaged(struct store *st, int64_t version_id, const char *kind, size_t seq,
                    const char *what, struct err *err)
{
    return err_set(err, ERR_DB, "the database %s is damaged: %s %zu of version id %lld: %s", st->path,
                   kind, seq, (long long)version_id, what);
}

/* False if the row cannot have been written by put_module(). */
static bool read_module(struct sql *q, struct adapter_src_module *m)
{
    const char *name = sql_col_text(q, 2), *dtype = sql_col_text(q, 10);
    if (name == NULL || dtype == NULL)
        return false;
    const int64_t rank = sql_col_int(q, 4), init_rank = sql_col_int(q, 5);
    const int64_t in = sql_col_int(q, 8), out = sql_col_int(q, 9), layer = sql_col_int(q, 1);
    if (rank < 0 || rank > init_rank || init_rank > ADAPTER_MAX_RANK || in < 1 || out < 1 ||
        in > TENSOR_MAX_WIDTH || out > TENSOR_MAX_WIDTH || layer < 0 || layer > 1 << 20)
        return false;
    int module = 0;
    *m = (struct adapter_src_module){
        .layer = (int)layer, .rank = (int)rank, .init_rank = (int)init_rank,
        .alpha = sql_col_real(q, 6), .scaling = sql_col_real(q, 7), .in = (int)in,
        .out = (int)out, .dtype = DT_OTHER,
    };
    const bool known = tensors_module_parse(name, &module);
    m->module = (enum module)module;
    return known && tensors_dtype_parse(dtype, &m->dtype);
}

/* "[0.5,0.25]": init_rank numbers.  Out of memory sticks in q. */
static bool read_importance(struct sql *q, const char *text, struct adapter_src_module *m)
{
    char *end;
    m->importance = malloc(((size_t)m->init_rank + 1) * sizeof *m->importance);
    if (m->importance == NULL) {
        q->rc = SQLITE_NOMEM;
        return true;
    }
    for (int i = 0; i < m->init_rank; i++, text = end) {
        if (*text != (i == 0 ? '[' : ','))
            return false;
        m->importance[i] = strtof(text + 1, &end);
        if (end == text + 1)
            return false;
    }
    return strcmp(text, m->init_rank == 0 ? "[]" : "]") == 0;
}

/* Path, mask and importance; false if the mask is not init_rank of '0' and '1'. */
static bool read_module_texts(struct sql *q, struct adapter_src_module *m)
{
    m->path = sql_col_dup(q, 3);
    const char *mask = sql_col_text(q, 11), *importance = sql_col_text(q, 12);
    if (importance != NULL && !read_importance(q, importance, m))
        return false;
    if (mask == NULL)
        return true;
    if (strlen(mask) != (size_t)m->init_rank || strspn(mask, "01") != (size_t)m->init_rank)
        return false;
    m->mask = malloc((size_t)m->init_rank + 1);
    if (m->mask == NULL) {
        q->rc = SQLITE_NOMEM;
        return true;
    }
    for (int i = 0; i < m->init_rank; i++)
        m->mask[i] = mask[i] == '1';
    return true;
}

static int get_modules(struct store *st, int64_t version_id, struct adapter_src *a,
                       struct err *err)
{
    size_t cap = 0;
    bool good = true;
    struct sql q = sql_open(st,
                            "SELECT seq, layer, module, path, rank, init_rank, alpha, scaling,"
                            " inputs, outputs, dtype, mask, importance FROM module WHERE version_id = ?"
                            " ORDER BY seq", err);
    sql_int(&q, version_id);
    while (good && sql_step(&q) == 1) {
        if (a->nmodules == cap) {
            cap = cap ? cap * 2 : 64;
            void *p = realloc(a->modules, cap * sizeof *a->modules);
            if (p == NULL) {
                q.rc = SQLITE_NOMEM;
                break;
            }
            a->modules = p;
        }
        struct adapter_src_module *m = &a->modules[a->nmodules];
        good = sql_col_int(&q, 0) == (int64_t)a->nmodules && read_module(&q, m);
        if (good) {
            a->nmodules++; /* from here adapter_src_free() knows it */
            good = read_module_texts(&q, m);
        }
    }
    int rc = sql_close(&q);
    if (rc == ERR_OK && !good)
        rc = tensors_damaged(st, version_id, "module", a->nmodules, "its row makes no sense", err);
    return rc;
}

static size_t extra_bytes(const struct adapter_src_extra *x)
{
    return (adapter_extra_count(x) * dtype_size(x->dtype) + ALIGN - 1) / ALIGN * ALIGN;
}

/* On huge pages where it is large; NULL when memory is out. */
static void *memory(size_t bytes)
{
    void *p;
    if (posix_memalign(&p, bytes < HUGE_PAGE ? ALIGN : HUGE_PAGE, bytes) != 0)
        return NULL;
    if (bytes >= HUGE_PAGE)
        madvise(p, bytes, MADV_HUGEPAGE);
    return p;
}

/* In the room, which grows if it has to. */
static void *memory_in(struct room *room, size_t bytes)
{
    if (room->bytes < bytes) {
        free(room->p);
        room->p = memory(bytes);
        room->bytes = room->p != NULL ? bytes : 0;
    }
    return room->p;
}

/* One piece of memory for every tensor; pointers into it are set, the bytes are not there yet. */
static int place_tensors(struct adapter_src *a, struct room *room, struct err *err)
{
    size_t total = 0;
    for (size_t i = 0; i < a->nmodules; i++)
        for (int part = 0; part < 3; part++)
            total += (part_bytes(a, &a->modules[i], part) + ALIGN - 1) / ALIGN * ALIGN;
    for (size_t i = 0; i < a->nextras; i++)
        total += extra_bytes(&a->extras[i]);
    total += ALIGN;
    uint8_t *p = room != NULL ? memory_in(room, total) : memory(total);
    if (p == NULL)
        return err_nomem(err);
    if (room == NULL)
        a->own = p;
    for (size_t i = 0; i < a->nmodules; i++) {
        struct adapter_src_module *m = &a->modules[i];
        for (int part = 0; part < 3; part++) {
            const void **slot = part == 0 ? &m->A : part == 1 ? &m->B : &m->E;
            *slot = part == 2 && a->method != METHOD_ADALORA ? NULL : p;
            p += (part_bytes(a, m, part) + ALIGN - 1) / ALIGN * ALIGN;
        }
    }
    for (size_t i = 0; i < a->nextras; i++) {
        a->extras[i].data = p;
        p += extra_bytes(&a->extras[i]);
    }
    return ERR_OK;
}

/* Chunk rows come in order of (seq, part, chunk): fill one tensor after the other. */
static int get_chunks(struct store *st, int64_t version_id, struct adapter_src *a, struct verify *v,
                      struct err *err)
{
    const char *wrong = NULL;
    size_t seq = 0, at = 0;
    int part = 0;
    struct sql q = sql_open(st,
                            "SELECT seq, part, chunk, data FROM tensor_chunk WHERE version_id = ?"
                            " ORDER BY seq, part, chunk", err);
    sql_int(&q, version_id);
    for (; seq < a->nmodules; part = (part + 1) % 3, seq += part == 0) {
        if (part == 0)
            verify_ready(v, seq);
        const size_t bytes = part_bytes(a, &a->modules[seq], part);
        for (at = 0; at < bytes && wrong == NULL;) {
            int row = sql_step(&q);
            if (row < 0)
                return sql_close(&q);
            size_t len = 0;
            const void *data = row == 1 ? sql_col_blob(&q, 3, &len) : NULL;
            const char *name = row == 1 ? sql_col_text(&q, 1) : NULL;
            if (data == NULL || name == NULL || sql_col_int(&q, 0) != (int64_t)seq ||
                strcmp(name, part_names[part]) != 0 ||
                sql_col_int(&q, 2) != (int64_t)(at / TENSOR_CHUNK))
                wrong = "a chunk is missing";
            else if (len > bytes - at || (len != TENSOR_CHUNK && len != bytes - at))
                wrong = "a chunk has the wrong size";
            else
                memcpy((uint8_t *)part_data(&a->modules[seq], part) + at, data, len);
            at += len;
        }
        if (wrong != NULL)
            break;
    }
    if (wrong == NULL && sql_step(&q) == 1)
        wrong = "there are chunks too many";
    int rc = sql_close(&q);
    if (rc == ERR_OK && wrong != NULL)
        rc = tensors_damaged(st, version_id, "module", seq, wrong, err);
    return rc;
}

int tensors_get(struct store *st, int64_t version_id, struct verify *v, struct room *room,
                struct adapter_src *a, struct err *err)
{
    int rc = get_modules(st, version_id, a, err);
    if (rc == ERR_OK)
        rc = extras_get(st, version_id, a, err);
    if (rc != ERR_OK || v == NULL)
        return rc;
    rc = place_tensors(a, room, err);
    if (rc != ERR_OK)
        return rc;
    verify_begin(v, a);
    rc = get_chunks(st, version_id, a, v, err);
    return rc != ERR_OK ? rc : extras_get_data(st, version_id, a, err);
}
