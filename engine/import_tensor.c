/* import_tensor.c - converting one tensor from the source's type to the base file's.
 *
 * Work goes in pieces of PIECE elements (8 bit: in panels of 16 rows): a piece is widened to fp32 (which refuses NaN and
 * infinities) and converted by one thread, so that no fp32 copy of a whole tensor ever exists. */
#include "engine/import_int.h"

#include "engine/linear.h"
#include "engine/nf4.h"
#include "engine/util.h"

#include <stdatomic.h>
#include <stdio.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { PIECE = 64 * 1024, BATCH = 32 /* pieces in memory of what is converted and written */ };

enum { CODES, PACKED, ABSMAX, NESTED, NESTED_ABSMAX, SCALES };

int scratch_init(struct scratch *s, size_t K_max, struct err *err)
{
    *s = (struct scratch){ .wide_n = 16 * K_max > PIECE ? 16 * K_max : PIECE };
    int rc = pool_create(0, &s->pool, err);
    if (rc != ERR_OK)
        return rc;
    s->wide = malloc((size_t)pool_threads(s->pool) * s->wide_n * sizeof *s->wide);
    return s->wide ? ERR_OK : err_nomem(err);
}

void scratch_free(struct scratch *s)
{
    pool_destroy(s->pool);
    free(s->wide);
    free(s->codes);
    free(s->packed);
    free(s->absmax);
    free(s->nested);
    free(s->nested_absmax);
    free(s->scales);
    *s = (struct scratch){ 0 };
}

static int room(struct scratch *s, int which, size_t bytes, struct err *err)
{
    void **const slots[] = {
        [CODES] = (void **)&s->codes,   [PACKED] = (void **)&s->packed,
        [ABSMAX] = (void **)&s->absmax, [NESTED] = (void **)&s->nested,
        [NESTED_ABSMAX] = (void **)&s->nested_absmax, [SCALES] = (void **)&s->scales,
    };
    if (bytes <= s->cap[which])
        return ERR_OK;
    free(*slots[which]); /* contents are not kept */
    s->cap[which] = 0;
    *slots[which] = malloc(bytes);
    if (*slots[which] == NULL)
        return err_nomem(err);
    s->cap[which] = bytes;
    return ERR_OK;
}

static size_t count(const struct item *it)
{
    return (size_t)it->w.N * (size_t)(it->w.K ? it->w.K : 1);
}

/* --- what the file holds -------------------------------------------------------------- */

/* Are the source's codes those of the file? */
static bool is_taken_over(const struct item *it)
{
    return it->form == FORM_NF4 && it->src->q4 != NULL && bnb_is_nf4(it->src->q4);
}

static bool has_plain_scales(const struct item *it)
{
    return is_taken_over(it) && it->src->q4->nested_block == 0;
}

static size_t nf4_stored_bytes(const struct item *it)
{
    size_t N = (size_t)it->w.N, K = (size_t)it->w.K;
    return K % NF4_BLOCK == 0 ? p16_bytes(N, K) : nf4_bytes(N * K);
}

static int declare(struct st_writer *out, const char *name, const char *part, const char *dtype,
                   size_t n, size_t elem, struct err *err)
{
    return st_writer_tensor(out, base_part(name, part).s, dtype, 1, (const int64_t[]){ (int64_t)n },
                            n * elem, err);
}

int item_declare(const struct item *it, struct st_writer *out, struct err *err)
{
    const char *name = it->w.name;
    size_t n = count(it), N = (size_t)it->w.N, K = (size_t)it->w.K;
    int rc;
    switch (it->form) {
    case FORM_NF4:
        rc = declare(out, name, "", "U8", nf4_stored_bytes(it), 1, err);
        if (rc == ERR_OK && has_plain_scales(it))
            return declare(out, name, ".absmax", "F32", nf4_blocks(n), 4, err);
        if (rc == ERR_OK)
            rc = declare(out, name, ".absmax", "U8", nf4_blocks(n), 1, err);
        if (rc == ERR_OK)
            rc = declare(out, name, ".nested_absmax", "F32", nf4_nested_blocks(n), 4, err);
        if (rc == ERR_OK)
            rc = declare(out, name, ".nested_offset", "F32", 1, 4, err);
        return rc;
    case FORM_Q8:
        rc = declare(out, name, "", "U8", q8_bytes(N, K), 1, err);
        if (rc == ERR_OK)
            rc = declare(out, name, ".scale", "F16", p16_scales(N, K), 2, err);
        return rc;
    default:
        return st_writer_tensor(out, name, it->form == FORM_F32 ? "F32" : "BF16", K ? 2 : 1,
                                (const int64_t[]){ it->w.N, it->w.K },
                                n * (it->form == FORM_F32 ? 4 : 2), err);
    }
}

/* --- conversion in pieces ------------------------------------------------------------- */

struct convert {
    const struct item *it;
    struct scratch *s;
    size_t begin, end, piece; /* elements */
    atomic_bool failed;
    void (*fn)(const struct convert *c, const float *w, size_t first, size_t n);
};

/* Elements [first, first + n) of the transposed tensor: a few columns of the source at a time. */
static int read_transposed(const struct item *it, size_t first, size_t n, float *w, struct err *err)
{
    enum { COLS = 256 };
    const size_t N = (size_t)it->w.N, K = (size_t)it->w.K;
    const size_t end = (first + n + K - 1) / K;
    float col[COLS];
    for (size_t row = first / K; row < end; row += COLS) {
        const size_t rows = end - row < COLS ? end - row : COLS;
        for (size_t k = 0; k < K; k++) {
            int rc = source_f32(it->src, k * N + row, rows, col, err);
            if (rc != ERR_OK)
                return rc;
            for (size_t r = 0; r < rows; r++) {
                const size_t at = (row + r) * K + k;
                if (at >= first && at < first + n)
                    w[at - first] = col[r];
            }
        }
    }
    return ERR_OK;
}

static void convert_piece(void *arg, int64_t begin, int64_t end, int thread)
{
    struct convert *c = arg;
    float *w = c->s->wide + (size_t)thread * c->s->wide_n;
    for (int64_t i = begin; i < end && !atomic_load(&c->failed); i++) {
        size_t first = c->begin + (size_t)i * c->piece;
        size_t n = c->end - first < c->piece ? c->end - first : c->piece;
        struct err err = { 0 };
        if ((c->it->transposed ? read_transposed(c->it, first, n, w, &err)
                               : source_f32(c->it->src, first, n, w, &err)) != ERR_OK)
            atomic_store(&c->failed, true);
        else
            c->fn(c, w, first, n);
    }
}

/* Run `fn` over the elements [begin, end) on all threads. */
static int convert(const struct item *it, struct scratch *s, size_t begin, size_t end, size_t piece,
                   void (*fn)(const struct convert *, const float *, size_t, size_t),
                   struct err *err)
{
    struct convert c = { .it = it, .s = s, .begin = begin, .end = end, .piece = piece, .fn = fn };
    pool_run(s->pool, (int64_t)((end - begin + piece - 1) / piece), 1, convert_piece, &c);
    if (!atomic_load(&c.failed))
        return ERR_OK;
    /* Which piece failed first depends on the threads; the sentence should not. */
    int rc = ERR_OK;
    if (it->transposed) { /* pieces of the source are others: look through all of it */
        begin = 0;
        end = count(it);
    }
    for (size_t first = begin; first < end && rc == ERR_OK; first += PIECE)
        rc = source_f32(it->src, first, end - first < PIECE ? end - first : PIECE, s->wide, err);
    return rc;
}

static void quantize_piece(const struct convert *c, const float *w, size_t first, size_t n)
{
    q4_quantize(Q4_NF4, w, n, c->s->codes + first / 2, c->s->absmax + first / NF4_BLOCK);
}

static void to_f32(const struct convert *c, const float *w, size_t first, size_t n)
{
    memcpy(c->s->packed + (first - c->begin) * 4, w, n * 4);
}

static void to_bf16(const struct convert *c, const float *w, size_t first, size_t n)
{
    uint16_t *out = (uint16_t *)(void *)c->s->packed + (first - c->begin);
    for (size_t i = 0; i < n; i++)
        out[i] = f32_to_bf16(w[i]);
}

/* A piece is a panel of 16 rows (the last one may have fewer). */
static void to_q8(const struct convert *c, const float *w, size_t first, size_t n)
{
    size_t K = (size_t)c->it->w.K, panel = first / (16 * K);
    q8_pack(w, n / K, K, c->s->packed + (first - c->begin), c->s->scales + panel * (K / 64) * 16);
}

/* --- forms ---------------------------------------------------------------------------- */

static void digest_begin(struct sha256 *h, const char *dtype, int N, int K)
{
    char line[80];
    if (K)
        snprintf(line, sizeof line, "%s [%d,%d]\n", dtype, N, K);
    else
        snprintf(line, sizeof line, "%s [%d]\n", dtype, N);
    sha256_init(h);
    sha256_add(h, line, strlen(line));
}

/* A matrix in NF4: our own, in the scratch buffers, or the source's. */
struct nf4_parts {
    const uint8_t *codes, *nested;
    const float *absmax; /* plain scales, or NULL: then nested ones */
    const float *nested_absmax;
    float offset;
};

static void digest_nf4(struct item *it, const struct nf4_parts *p)
{
    struct sha256 h;
    size_t n = count(it);
    digest_begin(&h, p->absmax ? "NF4 plain" : "NF4", it->w.N, it->w.K);
    sha256_add(&h, p->codes, nf4_bytes(n));
    if (p->absmax != NULL) {
        sha256_add(&h, p->absmax, nf4_blocks(n) * 4);
    } else {
        sha256_add(&h, p->nested, nf4_blocks(n));
        sha256_add(&h, p->nested_absmax, nf4_nested_blocks(n) * 4);
        sha256_add(&h, &p->offset, 4);
    }
    sha256_end(&h, it->digest);
}

static int nf4_room(const struct item *it, struct scratch *s, struct err *err)
{
    size_t n = count(it);
    int rc = room(s, CODES, nf4_bytes(n), err);
    if (rc == ERR_OK)
        rc = room(s, PACKED, nf4_stored_bytes(it), err);
    if (rc == ERR_OK)
        rc = room(s, ABSMAX, nf4_blocks(n) * 4, err);
    if (rc == ERR_OK)
        rc = room(s, NESTED, nf4_blocks(n), err);
    return rc == ERR_OK ? room(s, NESTED_ABSMAX, nf4_nested_blocks(n) * 4, err) : rc;
}

static int quantize(const struct item *it, struct scratch *s, struct nf4_parts *ret,
                    struct err *err)
{
    size_t n = count(it);
    int rc = convert(it, s, 0, n, PIECE, quantize_piece, err);
    if (rc != ERR_OK)
        return rc;
    *ret = (struct nf4_parts){ .codes = s->codes, .nested = s->nested,
                               .nested_absmax = s->nested_absmax };
    q4_nest(s->absmax, nf4_blocks(n), s->nested, s->nested_absmax, &ret->offset);
    /* Finite weights near the largest number have scales whose differences are not. */
    bool finite = isfinite(ret->offset);
    for (size_t i = 0; i < nf4_nested_blocks(n); i++)
        finite = finite && isfinite(s->nested_absmax[i]);
    if (!finite)
        return err_set(err, ERR_INVALID, "tensor %s has weights too large to be quantised",
                       it->src->t->name);
    return ERR_OK;
}

/* The source's codes as they are; numbers may lie unaligned in it and are copied. */
static int take_over(const struct item *it, struct scratch *s, struct nf4_parts *ret,
                     struct err *err)
{
    const struct q4_source *q = it->src->q4;
    size_t blocks = nf4_blocks(count(it));
    *ret = (struct nf4_parts){ .codes = q->codes->data };
    if (q->nested_block == 0) {
        ret->absmax = s->absmax;
        return st_f32(q->absmax, 0, blocks, s->absmax, err);
    }
    ret->nested = q->absmax->data;
    ret->nested_absmax = s->nested_absmax;
    ret->offset = q->offset;
    return st_f32(q->nested_absmax, 0, nf4_nested_blocks(count(it)), s->nested_absmax, err);
}

static int write_nf4(struct item *it, struct scratch *s, struct st_writer *out, struct err *err)
{
    size_t n = count(it), N = (size_t)it->w.N, K = (size_t)it->w.K;
    struct nf4_parts p = { 0 };
    int rc = nf4_room(it, s, err);
    if (rc == ERR_OK)
        rc = (is_taken_over(it) ? take_over : quantize)(it, s, &p, err);
    if (rc != ERR_OK)
        return rc;
    const uint8_t *stored = p.codes;
    if (K % NF4_BLOCK == 0) {
        p16_pack(p.codes, N, K, s->packed);
        stored = s->packed;
    }
    if (it->has_digest && it->w.kind == W_LINEAR)
        digest_nf4(it, &p);
    rc = st_writer_data(out, stored, nf4_stored_bytes(it), err);
    if (rc == ERR_OK && p.absmax != NULL)
        return st_writer_data(out, p.absmax, nf4_blocks(n) * 4, err);
    if (rc == ERR_OK)
        rc = st_writer_data(out, p.nested, nf4_blocks(n), err);
    if (rc == ERR_OK)
        rc = st_writer_data(out, p.nested_absmax, nf4_nested_blocks(n) * 4, err);
    return rc == ERR_OK ? st_writer_data(out, &p.offset, 4, err) : rc;
}

static int write_q8(const struct item *it, struct scratch *s, struct st_writer *out,
                    struct err *err)
{
    size_t N = (size_t)it->w.N, K = (size_t)it->w.K, panel = 16 * K;
    int rc = room(s, SCALES, p16_scales(N, K) * 2, err);
    if (rc == ERR_OK)
        rc = room(s, PACKED, BATCH * panel, err);
    for (size_t begin = 0; begin < N * K && rc == ERR_OK; begin += BATCH * panel) {
        size_t end = N * K - begin < BATCH * panel ? N * K : begin + BATCH * panel;
        rc = convert(it, s, begin, end, panel, to_q8, err);
        if (rc == ERR_OK)
            rc = st_writer_data(out, s->packed, (end - begin + panel - 1) / panel * panel, err);
    }
    return rc == ERR_OK ? st_writer_data(out, s->scales, p16_scales(N, K) * 2, err) : rc;
}

static int write_dense(const struct item *it, struct scratch *s, struct st_writer *out,
                       struct err *err)
{
    size_t n = count(it), elem = it->form == FORM_F32 ? 4 : 2;
    int rc = room(s, PACKED, (size_t)BATCH * PIECE * elem, err);
    for (size_t begin = 0; begin < n && rc == ERR_OK; begin += BATCH * PIECE) {
        size_t end = n - begin < BATCH * PIECE ? n : begin + BATCH * PIECE;
        rc = convert(it, s, begin, end, PIECE, elem == 4 ? to_f32 : to_bf16, err);
        if (rc == ERR_OK)
            rc = st_writer_data(out, s->packed, (end - begin) * elem, err);
    }
    return rc;
}

/* A weight that the file does not hold as NF4 is what the source has. */
static int digest_source(struct item *it, struct scratch *s, struct err *err)
{
    const struct q4_source *q = it->src->q4;
    struct sha256 h;
    if (q != NULL && bnb_is_nf4(q)) {
        struct nf4_parts p;
        int rc = nf4_room(it, s, err);
        if (rc == ERR_OK)
            rc = take_over(it, s, &p, err);
        if (rc == ERR_OK)
            digest_nf4(it, &p);
        return rc;
    }
    digest_begin(&h, q ? "4-bit" : it->src->t->dtype_name, it->transposed ? it->w.K : it->w.N,
                 it->transposed ? it->w.N : it->w.K);
    if (it->src->head_rows != 0)
        gguf_digest(it->src, &h);
    else
        sha256_add(&h, it->src->t->data, it->src->t->bytes);
    if (q != NULL)
        bnb_digest(q, &h);
    sha256_end(&h, it->digest);
    return ERR_OK;
}

int item_write(struct item *it, struct scratch *s, struct st_writer *out, struct err *err)
{
    int rc = it->has_digest && !(it->form == FORM_NF4 && it->w.kind == W_LINEAR)
                 ? digest_source(it, s, err)
                 : ERR_OK;
    if (rc != ERR_OK)
        return rc;
    switch (it->form) {
    case FORM_NF4:
        return write_nf4(it, s, out, err);
    case FORM_Q8:
        return write_q8(it, s, out, err);
    default:
        return write_dense(it, s, out, err);
    }
}
