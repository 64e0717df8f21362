/* cmd_quantize.c - `lorad quantize`: every 2-D float tensor in the reference's serialised 4-bit form.
 *
 * For a tensor X of n elements: X U8 [ceil(n/2), 1] (codes), X.absmax (fp32 scales, or 8-bit codes
 * of them with --double), X.quant_map, with --double X.nested_absmax and X.nested_quant_map, and
 * X.quant_state.bitsandbytes__nf4: JSON with what shapes and types do not say.  Everything else is
 * copied.  For checking the numerics from outside: the codes are those that `lorad import` packs.
 *
 * Tensors are quantised twice, because the header, which comes first, holds the length of the JSON
 * and the JSON holds the mean of the scales. */
#include "engine/nf4.h"
#include "engine/safetensors.h"
#include "engine/util.h"
#include "server/cmd.h"
#include "server/options.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct run {
    enum q4_type type;
    bool nested;
    struct st_file *in;
    struct st_writer *out;
};

/* One tensor in 4-bit form. */
struct quantized {
    size_t n, blocks, nested_blocks;
    uint8_t *packed, *codes;
    float *absmax, *nested_absmax, offset;
    char state[400]; /* the JSON */
};

static void quantized_free(struct quantized *q)
{
    free(q->packed);
    free(q->codes);
    free(q->absmax);
    free(q->nested_absmax);
}

static const char *dtype_name(enum dtype t)
{
    return t == DT_F32 ? "float32" : t == DT_F16 ? "float16" : "bfloat16";
}

/* The shortest decimal that reads back as the same double, always with a point or exponent. */
static void format_double(double x, char ret[40])
{
    char digits[32];
    for (int n = 1; n <= 17; n++) {
        snprintf(digits, sizeof digits, "%.*g", n, x);
        if (strtod(digits, NULL) == x)
            break;
    }
    snprintf(ret, 40, "%s%s", digits, strpbrk(digits, ".e") ? "" : ".0");
}

static void describe(const struct run *r, const struct st_tensor *t, struct quantized *q)
{
    int len = snprintf(q->state, sizeof q->state,
                       "{\"quant_type\": \"%s\", \"blocksize\": %d, \"dtype\": \"%s\", "
                       "\"shape\": [%lld, %lld]",
                       r->type == Q4_NF4 ? "nf4" : "fp4", NF4_BLOCK, dtype_name(t->dtype),
                       (long long)t->shape[0], (long long)t->shape[1]);
    if (r->nested) {
        char offset[40];
        format_double((double)q->offset, offset);
        len += snprintf(q->state + len, sizeof q->state - (size_t)len,
                        ", \"nested_blocksize\": %d, \"nested_dtype\": \"float32\", "
                        "\"nested_offset\": %s",
                        NF4_NESTED_BLOCK, offset);
    }
    snprintf(q->state + len, sizeof q->state - (size_t)len, "}");
}

static bool quantized_init(struct quantized *q, size_t n)
{
    *q = (struct quantized){ .n = n, .blocks = nf4_blocks(n), .nested_blocks = nf4_nested_blocks(n) };
    q->packed = malloc(nf4_bytes(n));
    q->absmax = malloc(q->blocks * sizeof *q->absmax);
    q->codes = malloc(q->blocks);
    q->nested_absmax = malloc(q->nested_blocks * sizeof *q->nested_absmax);
    if (q->packed && q->absmax && q->codes && q->nested_absmax)
        return true;
    quantized_free(q);
    return false;
}

/* In pieces: no fp32 copy of the whole tensor. */
static int quantize(const struct run *r, const struct st_tensor *t, struct quantized *q,
                    struct err *err)
{
    enum { PIECE = 16 * 1024 };
    float wide[PIECE];
    int rc = ERR_OK;
    if (!quantized_init(q, st_count(t)))
        return err_nomem(err);
    for (size_t i = 0; i < q->n && rc == ERR_OK; i += PIECE) {
        size_t m = q->n - i < PIECE ? q->n - i : PIECE;
        rc = st_f32(t, i, m, wide, err);
        if (rc == ERR_OK)
            q4_quantize(r->type, wide, m, q->packed + i / 2, q->absmax + i / NF4_BLOCK);
    }
    if (rc == ERR_OK && r->nested)
        q4_nest(q->absmax, q->blocks, q->codes, q->nested_absmax, &q->offset);
    if (rc == ERR_OK)
        describe(r, t, q);
    else
        quantized_free(q);
    return rc;
}

/* The parts of a quantised tensor in the order of the file; returns how many there are. */
struct part {
    const char *suffix, *dtype;
    size_t n, elem;
    const void *data;
};

static int list_parts(const struct run *r, const struct quantized *q, struct part ret[6])
{
    bool nf4 = r->type == Q4_NF4;
    int n = 0;
    ret[n++] = (struct part){ "", "U8", nf4_bytes(q->n), 1, q->packed };
    if (r->nested) {
        ret[n++] = (struct part){ ".absmax", "U8", q->blocks, 1, q->codes };
        ret[n++] = (struct part){ ".nested_absmax", "F32", q->nested_blocks, 4, q->nested_absmax };
        ret[n++] = (struct part){ ".nested_quant_map", "F32", 256, 4, nf4_dynamic8 };
    } else {
        ret[n++] = (struct part){ ".absmax", "F32", q->blocks, 4, q->absmax };
    }
    ret[n++] = (struct part){ ".quant_map", "F32", 16, 4, nf4 ? nf4_code : fp4_code };
    ret[n++] = (struct part){ nf4 ? ".quant_state.bitsandbytes__nf4"
                                  : ".quant_state.bitsandbytes__fp4",
                              "U8", strlen(q->state), 1, q->state };
    return n;
}

static bool is_matrix(const struct st_tensor *t)
{
    return t->ndim == 2 && st_count(t) > 0 &&
           (t->dtype == DT_F32 || t->dtype == DT_F16 || t->dtype == DT_BF16);
}

static int declare(const struct run *r, const struct st_tensor *t, struct err *err)
{
    if (!is_matrix(t))
        return st_writer_tensor(r->out, t->name, t->dtype_name, t->ndim, t->shape, t->bytes, err);
    struct quantized q;
    struct part parts[6];
    int rc = quantize(r, t, &q, err);
    if (rc != ERR_OK)
        return rc;
    int n = list_parts(r, &q, parts);
    for (int i = 0; i < n && rc == ERR_OK; i++) {
        char name[320];
        snprintf(name, sizeof name, "%s%s", t->name, parts[i].suffix);
        rc = st_writer_tensor(r->out, name, parts[i].dtype, i == 0 ? 2 : 1,
                              (const int64_t[]){ (int64_t)parts[i].n, 1 },
                              parts[i].n * parts[i].elem, err);
    }
    quantized_free(&q);
    return rc;
}

static int write_tensor(const struct run *r, const struct st_tensor *t, struct err *err)
{
    if (!is_matrix(t))
        return st_writer_data(r->out, t->data, t->bytes, err);
    struct quantized q;
    struct part parts[6];
    int rc = quantize(r, t, &q, err);
    if (rc != ERR_OK)
        return rc;
    int n = list_parts(r, &q, parts);
    for (int i = 0; i < n && rc == ERR_OK; i++)
        rc = st_writer_data(r->out, parts[i].data, parts[i].n * parts[i].elem, err);
    quantized_free(&q);
    return rc;
}

static int write_all(struct run *r, const char *path, struct err *err)
{
    size_t total = 0, done = 0;
    int rc = st_writer_open(path, false, &r->out, err);
    for (size_t i = 0; i < r->in->nmeta && rc == ERR_OK; i++)
        rc = st_writer_meta(r->out, r->in->meta[i].key, r->in->meta[i].value,
                            strlen(r->in->meta[i].value), err);
    for (size_t i = 0; i < r->in->ntensors; i++)
        total += 2 * r->in->tensors[i].bytes;
    for (int pass = 0; pass < 2; pass++) {
        for (size_t i = 0; i < r->in->ntensors && rc == ERR_OK; i++) {
            const struct st_tensor *t = &r->in->tensors[i];
            rc = pass == 0 ? declare(r, t, err) : write_tensor(r, t, err);
            done += t->bytes;
            progress("quantising", done, total);
        }
        if (rc == ERR_OK && pass == 0)
            rc = st_writer_begin(r->out, err);
    }
    if (rc != ERR_OK) {
        st_writer_abort(r->out);
        return rc;
    }
    return st_writer_commit(r->out, err);
}

static int run(const struct opts *o)
{
    struct run r = { .nested = opt_flag(o, "double") };
    struct err err = { 0 };
    const char *type = opt_str(o, "type");
    if (strcmp(type, "nf4") != 0 && strcmp(type, "fp4") != 0)
        return fail(2, "--type %s is unknown; known: nf4, fp4", type);
    r.type = strcmp(type, "nf4") == 0 ? Q4_NF4 : Q4_FP4;
    int rc = st_open(opts_arg(o, 0), &r.in, &err);
    if (rc == ERR_OK)
        rc = write_all(&r, opts_arg(o, 1), &err);
    st_close(r.in);
    return rc == ERR_OK ? 0 : fail(1, "%s", err.msg);
}

int cmd_quantize(int argc, char **argv)
{
    static const struct opt table[] = {
        { "type", 0, "TYPE", "nf4", "nf4 or fp4", false },
        { "double", 0, NULL, NULL, "quantise the block scales to 8 bits as well", false },
        { NULL, 0, NULL, NULL, NULL, false },
    };
    int code = 2;
    struct opts *o = opts_parse(
        argc, argv, table, "quantize IN.safetensors OUT.safetensors",
        "Writes every 2-D float tensor of IN in the serialised 4-bit form of bitsandbytes, and the\n"
        "others unchanged.",
        2, 2, &code);
    if (o == NULL)
        return code;
    code = run(o);
    opts_free(o);
    return code;
}
