/* merge.c - adding an adapter to the weights of a folder; see merge.h.
 *
 * Tensors stream through in pieces of rows.  A weight W with a change needs, per piece, the rows of
 *     sum over j of X_j (column) * Y_j (row),
 * where X is B (times scaling and E) and Y is A; families that store weights transposed swap them. */
#include "engine/merge.h"

#include "engine/delta.h"
#include "engine/import_int.h"
#include "engine/merge_int.h"

#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { PIECE = 1 << 20, CONFIG_MAX = 4 << 20 };

/* --- reading -------------------------------------------------------------------------------------- */

int merge_read_arch(const char *dir, struct arch *ret, struct err *err)
{
    char *path = path_join(dir, "config.json"), *gen = path_join(dir, "generation_config.json");
    char *config = NULL, *generation = NULL;
    size_t len;
    int rc = path && gen ? file_read(path, CONFIG_MAX, &config, &len, err) : err_nomem(err);
    if (rc == ERR_OK && file_exists(gen))
        rc = file_read(gen, CONFIG_MAX, &generation, &len, err);
    if (rc == ERR_OK)
        rc = arch_from_config(config, generation, ret, err);
    free(path);
    free(gen);
    free(config);
    free(generation);
    return rc;
}

static int dtype_parse(const char *name, enum dtype *ret, struct err *err)
{
    static const struct { const char *name; enum dtype t; } all[] = {
        { "f32", DT_F32 }, { "f16", DT_F16 }, { "bf16", DT_BF16 },
    };
    *ret = DT_OTHER;
    for (size_t i = 0; name != NULL && i < sizeof all / sizeof all[0]; i++)
        if (strcmp(all[i].name, name) == 0)
            *ret = all[i].t;
    if (name != NULL && *ret == DT_OTHER)
        return err_set(err, ERR_INVALID, "the type must be f32, f16 or bf16, not %.40s", name);
    return ERR_OK;
}

static bool is_number(enum dtype t) { return t == DT_F32 || t == DT_F16 || t == DT_BF16; }

/* Which tensor does each module change? */
static int find_targets(struct merging *g, struct err *err)
{
    g->targets = calloc(g->a->nmodules + 1, sizeof *g->targets);
    if (g->targets == NULL)
        return err_nomem(err);
    for (size_t i = 0; i < g->a->nmodules; i++) {
        const struct adapter_src_module *m = &g->a->modules[i];
        char name[320];
        snprintf(name, sizeof name, "%s.weight", m->path);
        const struct source_tensor *t =
            g->transposed ? source_take(&g->src, name, m->in, m->out, err)
                          : source_take(&g->src, name, m->out, m->in, err);
        if (t == NULL)
            return ERR_INVALID;
        if (t->q4 != NULL)
            return err_set(err, ERR_INVALID,
                           "%s is 4-bit already: an adapter can be merged exactly only into weights "
                           "in F32, F16 or BF16",
                           name);
        g->targets[i] = t->t;
    }
    return ERR_OK;
}

static const struct adapter_src_module *module_of(const struct merging *g,
                                                  const struct st_tensor *t)
{
    for (size_t i = 0; i < g->a->nmodules; i++)
        if (g->targets[i] == t && g->a->modules[i].rank > 0)
            return &g->a->modules[i];
    return NULL;
}

/* --- one weight ----------------------------------------------------------------------------------- */

/* Rounded to `t` in place: ret may be the start of x.  The index of a value that does not fit, or n. */
static size_t narrow(const float *x, size_t n, enum dtype t, void *ret)
{
    uint8_t *p = ret;
    for (size_t i = 0; i < n; i++) {
        float v = x[i];
        uint16_t h = 0;
        if (t == DT_F16)
            v = f16_to_f32(h = f32_to_f16(v));
        else if (t == DT_BF16)
            v = bf16_to_f32(h = f32_to_bf16(v));
        if (!isfinite(v))
            return i;
        if (t == DT_F32)
            memcpy(p + 4 * i, &v, 4);
        else
            memcpy(p + 2 * i, &h, 2);
    }
    return n;
}

/* The two factors in fp32: X [rank][rows], Y [rank][cols] of the tensor as it is stored. */
struct factors {
    float *X, *Y;
    size_t rank, rows, cols;
};

static int widen(const struct merging *g, const struct adapter_src_module *m, struct factors *ret,
                 struct err *err)
{
    const size_t k = (size_t)m->rank, in = (size_t)m->in, out = (size_t)m->out;
    float *A = malloc(k * in * sizeof *A), *Bt = malloc(k * out * sizeof *Bt);
    if (A == NULL || Bt == NULL) {
        free(A);
        free(Bt);
        return err_nomem(err);
    }
    for (size_t i = 0; i < k * in; i++)
        A[i] = delta_element(m->A, m->dtype, i);
    for (size_t j = 0; j < k; j++)
        for (size_t o = 0; o < out; o++)
            Bt[j * out + o] = (float)(m->scaling * (double)delta_e(m, j) *
                                      delta_element(m->B, m->dtype, o * k + j));
    *ret = g->transposed ? (struct factors){ A, Bt, k, in, out }
                         : (struct factors){ Bt, A, k, out, in };
    return ERR_OK;
}

/* w[n rows from `first` on] += X^T Y; `sum` has room for one row. */
static void add_rows(const struct factors *f, size_t first, size_t n, float *w, float *sum)
{
    for (size_t r = 0; r < n; r++, w += f->cols) {
        memset(sum, 0, f->cols * sizeof *sum);
        for (size_t j = 0; j < f->rank; j++) {
            const float x = f->X[j * f->rows + first + r], *y = f->Y + j * f->cols;
            for (size_t c = 0; c < f->cols; c++)
                sum[c] += x * y[c];
        }
        for (size_t c = 0; c < f->cols; c++)
            w[c] += sum[c];
    }
}

/* Elements of the tensor in pieces of whole rows: widened, changed (f may be NULL), rounded. */
static int write_pieces(struct merging *g, const struct st_tensor *t, const struct factors *f,
                        enum dtype to, float *sum, struct err *err)
{
    const size_t total = st_count(t), cols = f != NULL ? f->cols : 1;
    const size_t rows = PIECE / cols > 0 ? PIECE / cols : 1, step = rows * cols;
    float *x = malloc((step < total ? step : total) * sizeof *x + 1);
    int rc = x == NULL ? err_nomem(err) : ERR_OK;
    for (size_t at = 0; rc == ERR_OK && at < total; at += step) {
        const size_t n = total - at < step ? total - at : step;
        rc = st_f32(t, at, n, x, err);
        if (rc == ERR_OK && f != NULL)
            add_rows(f, at / cols, n / cols, x, sum);
        const size_t bad = rc == ERR_OK ? narrow(x, n, to, x) : n;
        if (rc == ERR_OK && bad < n)
            rc = err_set(err, ERR_INVALID, "tensor %s: element %zu does not fit %s", t->name,
                         at + bad, merge_dtype_name(to));
        if (rc == ERR_OK)
            rc = st_writer_data(g->out, x, n * dtype_size(to), err);
    }
    free(x);
    return rc;
}

static int write_tensor(struct merging *g, const struct st_tensor *t, struct err *err)
{
    const struct adapter_src_module *m = module_of(g, t);
    const enum dtype to = merge_dtype(g, t);
    struct factors f = { 0 };
    if (m == NULL && to == t->dtype)
        return st_writer_data(g->out, t->data, t->bytes, err);
    if (m == NULL)
        return write_pieces(g, t, NULL, to, NULL, err);
    int rc = widen(g, m, &f, err);
    float *sum = rc == ERR_OK ? malloc((f.cols + 1) * sizeof *sum) : NULL;
    if (rc == ERR_OK && sum == NULL)
        rc = err_nomem(err);
    if (rc == ERR_OK)
        rc = write_pieces(g, t, &f, to, sum, err);
    free(sum);
    free(f.X);
    free(f.Y);
    return rc;
}

/* --- one file of weights ------------------------------------------------------------------------- */

enum dtype merge_dtype(const struct merging *g, const struct st_tensor *t)
{
    return g->dtype != DT_OTHER && is_number(t->dtype) ? g->dtype : t->dtype;
}

const char *merge_dtype_name(enum dtype t)
{
    return t == DT_F32 ? "F32" : t == DT_F16 ? "F16" : "BF16";
}

static size_t bytes_of(const struct merging *g, const struct st_tensor *t)
{
    const enum dtype to = merge_dtype(g, t);
    return to == t->dtype ? t->bytes : st_count(t) * dtype_size(to);
}

static int declare(struct merging *g, const struct st_file *f, struct err *err)
{
    int rc = ERR_OK;
    for (size_t i = 0; rc == ERR_OK && i < f->nmeta; i++)
        rc = st_writer_meta(g->out, f->meta[i].key, f->meta[i].value, strlen(f->meta[i].value), err);
    for (size_t i = 0; rc == ERR_OK && i < f->ntensors; i++) {
        const struct st_tensor *t = &f->tensors[i];
        const enum dtype to = merge_dtype(g, t);
        rc = st_writer_tensor(g->out, t->name, to == t->dtype ? t->dtype_name : merge_dtype_name(to),
                              t->ndim, t->shape, bytes_of(g, t), err);
        g->total += bytes_of(g, t);
    }
    return rc == ERR_OK ? st_writer_begin(g->out, err) : rc;
}

static int write_file(struct merging *g, const struct source_file *file, struct err *err)
{
    const struct st_file *f = file->st;
    char *path = path_join(g->tmp, file->name);
    int rc = path == NULL ? err_nomem(err) : st_writer_open(path, false, &g->out, err);
    free(path);
    if (rc != ERR_OK)
        return rc;
    rc = declare(g, f, err);
    for (size_t i = 0; rc == ERR_OK && i < f->ntensors; i++) {
        const struct st_tensor *t = &f->tensors[i];
        if (g->o->progress != NULL && g->o->progress(g->o->ud, t->name, g->done, g->all))
            rc = err_set(err, ERR_CANCELLED, "stopped: nothing is written");
        else
            rc = write_tensor(g, t, err);
        st_forget(f, t->data, t->bytes);
        g->done += t->bytes;
    }
    if (rc == ERR_OK)
        return st_writer_commit(g->out, err);
    st_writer_abort(g->out);
    return rc;
}

/* --- all of it ----------------------------------------------------------------------------------- */

static int check_source_hash(const struct merging *g, struct err *err)
{
    const atomic_bool go_on = false;
    char hex[65];
    if (g->o->source_hash == NULL)
        return ERR_OK;
    source_hash(&g->src, &go_on, hex);
    if (strcmp(hex, g->o->source_hash) != 0)
        return err_set(err, ERR_CONFLICT,
                       "%s is not the folder that the base file was made from: its files' hash is "
                       "%.12s..., not %.12s...",
                       g->src.dir, hex, g->o->source_hash);
    return ERR_OK;
}

static int prepare(struct merging *g, const char *dir, struct err *err)
{
    int rc = delta_check(g->a, err);
    if (rc == ERR_OK)
        rc = dtype_parse(g->o->dtype, &g->dtype, err);
    if (rc == ERR_OK)
        rc = source_open(dir, &g->src, err);
    if (rc != ERR_OK)
        return rc;
    g->transposed = family_find(g->src.arch.family)->transposed;
    for (size_t i = 0; i < g->src.nfiles; i++) {
        const struct st_file *f = g->src.files[i].st;
        for (size_t k = 0; f != NULL && k < f->ntensors; k++)
            g->all += f->tensors[k].bytes;
    }
    rc = find_targets(g, err);
    return rc == ERR_OK ? check_source_hash(g, err) : rc;
}

static int write_all(struct merging *g, const char *out, struct err *err)
{
    int rc = merge_folder_make(g, out, err);
    for (size_t i = 0; rc == ERR_OK && i < g->src.nfiles; i++)
        if (g->src.files[i].st != NULL)
            rc = write_file(g, &g->src.files[i], err);
    if (rc == ERR_OK)
        rc = merge_copy_files(g, err);
    if (rc == ERR_OK && rename(g->tmp, out) != 0)
        rc = err_set(err, ERR_IO, "%s: %s", out, strerror(errno));
    if (rc == ERR_OK && g->o->progress != NULL)
        g->o->progress(g->o->ud, "", g->all, g->all);
    if (rc != ERR_OK)
        merge_folder_remove(g);
    return rc;
}

int adapter_merge(const struct adapter_src *a, const char *dir, const char *out,
                  const struct merge_opts *opts, struct err *err)
{
    struct merging g = { .a = a, .o = opts };
    int rc = prepare(&g, dir, err);
    if (rc == ERR_OK)
        rc = write_all(&g, out, err);
    source_close(&g.src);
    free(g.targets);
    free(g.tmp);
    return rc;
}
