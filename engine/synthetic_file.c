/* synthetic_file.c - a synthetic base as a base file (format: base.h). */
#include "engine/synthetic.h"

#include "engine/base_int.h"
#include "engine/nf4.h"
#include "engine/num.h"
#include "engine/safetensors.h"
#include "engine/util.h"

#include <stdlib.h>
#include <string.h>

struct saver {
    const struct base *b;
    struct st_writer *out;
    bool declare; /* first walk: only names and sizes */
};

/* One tensor of the file: declared in the first walk, written in the second. */
static int put(struct saver *s, const char *name, const char *part, const char *dtype, int64_t n,
               size_t elem, const void *data, struct err *err)
{
    if (s->declare)
        return st_writer_tensor(s->out, base_part(name, part).s, dtype, 1, &n, (size_t)n * elem, err);
    return st_writer_data(s->out, data, (size_t)n * elem, err);
}

/* All scales of a synthetic matrix are one number: the nested code of zero, and that as the offset. */
static int put_nf4(struct saver *s, const char *name, const struct matrix *m, struct err *err)
{
    const size_t n = (size_t)m->N * (size_t)m->K, blocks = nf4_blocks(n), nested = nf4_nested_blocks(n);
    const float scale = f16_to_f32(m->scales16[0]);
    int zero = 0;
    while (zero < 255 && nf4_dynamic8[zero] != 0)
        zero++;
    uint8_t *absmax = malloc(blocks);
    float *ones = malloc(nested * sizeof *ones);
    int rc = absmax == NULL || ones == NULL ? err_nomem(err) : ERR_OK;
    for (size_t i = 0; i < nested && ones != NULL; i++)
        ones[i] = 1;
    if (absmax != NULL)
        memset(absmax, zero, blocks);
    if (rc == ERR_OK)
        rc = put(s, name, "", "U8", (int64_t)p16_bytes((size_t)m->N, (size_t)m->K), 1, m->codes, err);
    if (rc == ERR_OK)
        rc = put(s, name, ".absmax", "U8", (int64_t)blocks, 1, absmax, err);
    if (rc == ERR_OK)
        rc = put(s, name, ".nested_absmax", "F32", (int64_t)nested, 4, ones, err);
    if (rc == ERR_OK)
        rc = put(s, name, ".nested_offset", "F32", 1, 4, &scale, err);
    free(absmax);
    free(ones);
    return rc;
}

static int put_q8(struct saver *s, const char *name, const struct matrix *m, struct err *err)
{
    const size_t N = (size_t)m->N, K = (size_t)m->K;
    int rc = put(s, name, "", "U8", (int64_t)q8_bytes(N, K), 1, m->codes, err);
    return rc == ERR_OK ? put(s, name, ".scale", "F16", (int64_t)p16_scales(N, K), 2, m->scales16, err)
                        : rc;
}

static int put_weight(struct saver *s, const struct weight *w, struct err *err)
{
    const struct base *b = s->b;
    switch (w->kind) {
    case W_EMBED:
        return put(s, w->name, "", "BF16", (int64_t)w->N * w->K, 2, b->embed.codes, err);
    case W_HEAD:
        return put_q8(s, w->name, &b->head, err);
    case W_NORM:
        return put(s, w->name, "", "F32", w->N, 4,
                   w->norm == NORM_FINAL ? b->norm_final.w : b->layers[w->layer].norm[w->norm].w, err);
    case W_LINEAR:
        return put_nf4(s, w->name, &b->layers[w->layer].mod[w->module].w, err);
    default:
        return err_set(err, ERR_INTERNAL, "a synthetic base has no weight %s", w->name);
    }
}

static int put_meta(struct saver *s, const char *tokenizer, struct err *err)
{
    char *arch = arch_to_json(&s->b->arch);
    if (arch == NULL)
        return err_nomem(err);
    const struct {
        const char *key, *value;
    } meta[] = {
        { "lorad.format", BASE_FORMAT }, { "lorad.arch", arch }, { "lorad.name", s->b->name },
        { "lorad.type", "nf4" }, { "lorad.head", "8bit" }, { "lorad.embed", "bf16" },
        { "lorad.hash", s->b->hash_hex }, { "lorad.tokenizer", tokenizer },
    };
    int rc = ERR_OK;
    for (size_t i = 0; i < sizeof meta / sizeof meta[0] && rc == ERR_OK; i++)
        if (meta[i].value != NULL)
            rc = st_writer_meta(s->out, meta[i].key, meta[i].value, strlen(meta[i].value), err);
    free(arch);
    return rc;
}

static int put_all(struct saver *s, const char *tokenizer, struct err *err)
{
    struct weight *weights = NULL;
    size_t n = 0;
    int rc = put_meta(s, tokenizer, err);
    if (rc == ERR_OK)
        rc = base_weights(&s->b->arch, &weights, &n, err);
    for (int pass = 0; pass < 2 && rc == ERR_OK; pass++) {
        s->declare = pass == 0;
        for (size_t i = 0; i < n && rc == ERR_OK; i++)
            rc = put_weight(s, &weights[i], err);
        if (rc == ERR_OK && pass == 0)
            rc = st_writer_begin(s->out, err);
    }
    free(weights);
    return rc;
}

int synthetic_save(const struct base *b, const char *tokenizer_json, const char *path, struct err *err)
{
    struct saver s = { .b = b };
    int rc = st_writer_open(path, true, &s.out, err);
    if (rc == ERR_OK)
        rc = put_all(&s, tokenizer_json, err);
    if (rc == ERR_OK)
        return st_writer_commit(s.out, err);
    st_writer_abort(s.out);
    return rc;
}
