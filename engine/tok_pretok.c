/* tok_pretok.c - the pre-tokenizer: cut text into the words that the model sees one at a time.
 *
 * The text of a call lies in one buffer; a word is a span of it.  A step turns a list of spans
 * into a finer one.  Metaspace and ByteLevel also rewrite the text: they write the second buffer
 * and the buffers change places.  A ByteLevel that comes last does not rewrite bytes into its
 * alphabet: the model takes bytes directly (raw_bytes), which is the same and much faster. */
#include "engine/tokenizer_int.h"

#include <stdlib.h>
#include <string.h>

/* --- GPT-2's alphabet -------------------------------------------------------------------- */
/* Printable Latin-1 stands for itself; the other bytes, in order, for U+0100 and on. */
static bool stands_for_itself(int b)
{
    return (b >= 0x21 && b <= 0x7e) || (b >= 0xa1 && b <= 0xac) || b >= 0xae;
}

/* How many bytes below b do not stand for themselves. */
static int rank_of_other(int b)
{
    if (b <= 0x20)
        return b;
    if (b <= 0xa0)
        return 0x21 + b - 0x7f;
    return 0x21 + 0xa1 - 0x7f; /* 0xad */
}

int tok_byte_char(uint8_t byte, char ret[2])
{
    int c = stands_for_itself(byte) ? byte : 0x100 + rank_of_other(byte);
    if (c < 0x80) {
        ret[0] = (char)c;
        return 1;
    }
    ret[0] = (char)(0xc0 | c >> 6);
    ret[1] = (char)(0x80 | (c & 0x3f));
    return 2;
}

int tok_char_byte(const char *s, size_t len, size_t *used)
{
    int n = tok_utf8(s, len);
    if (n < 1 || n > 2)
        return -1;
    *used = (size_t)n;
    int c = (int)tok_codepoint(s, n);
    if (c < 0x100)
        return stands_for_itself(c) ? c : -1;
    c -= 0x100;
    if (c <= 0x20)
        return c;
    if (c <= 0x20 + 0xa0 - 0x7e)
        return c - 0x21 + 0x7f;
    return c == 0x20 + 0xa0 - 0x7e + 1 ? 0xad : -1;
}

/* --- spans ------------------------------------------------------------------------------- */
static int add_span(struct tok_spans *l, size_t at, size_t len, size_t origin, struct err *err)
{
    if (l->n == l->cap) {
        size_t cap = l->cap ? 2 * l->cap : 64;
        struct tok_span *v = realloc(l->v, cap * sizeof *v);
        if (v == NULL)
            return err_nomem(err);
        l->v = v;
        l->cap = cap;
    }
    l->v[l->n++] = (struct tok_span){ (uint32_t)at, (uint32_t)len, (uint32_t)origin };
    return ERR_OK;
}

/* Cutting one span [base, base+len) at the matches of a pattern. */
struct cut {
    struct tok_spans *out;
    size_t first; /* where this span's pieces begin in out */
    size_t base;
    size_t origin;
    enum tok_behavior behavior;
    bool was_match; /* the piece before was a match */
    struct err *err;
};

/* The next piece [from, to) of the span.  Pieces follow each other without gaps. */
static int cut_piece(struct cut *k, size_t from, size_t to, bool match)
{
    bool join = false, was = k->was_match;
    k->was_match = match;
    switch (k->behavior) {
    case REMOVED:
        if (match)
            return ERR_OK;
        break;
    case ISOLATED:
        break;
    case CONTIGUOUS:
        join = match == was;
        break;
    case MERGED_WITH_PREVIOUS:
        join = match && !was;
        break;
    case MERGED_WITH_NEXT:
        join = !match && was;
        break;
    }
    if (join && k->out->n > k->first) {
        struct tok_span *last = &k->out->v[k->out->n - 1];
        last->len = (uint32_t)(k->base + to - last->at);
        return ERR_OK;
    }
    size_t origin = k->origin > from ? k->origin - from : 0;
    return add_span(k->out, k->base + from, to - from, origin, k->err);
}

static int split_span(struct tok_call *c, const struct tok_pre *st, const char *text,
                      struct tok_span span, struct tok_spans *out)
{
    struct cut k = { out, out->n, span.at, span.origin, st->behavior, false, c->err };
    struct tok_scan scan = {
        .p = &st->pattern, .text = text + span.at, .len = span.len, .mem = &c->match
    };
    size_t done = 0, start, end;
    int found, rc = ERR_OK;
    while (rc == ERR_OK && (found = tok_scan_next(&scan, &start, &end, c->err)) != 0) {
        if (found < 0)
            return c->err->code;
        if (done != start)
            rc = cut_piece(&k, done, start, st->invert);
        if (rc == ERR_OK)
            rc = cut_piece(&k, start, end, !st->invert);
        done = end;
    }
    if (rc == ERR_OK && done != span.len)
        rc = cut_piece(&k, done, span.len, st->invert);
    return rc;
}

/* Empty pieces mattered to the cutting only. */
static void drop_empty(struct tok_spans *l)
{
    size_t n = 0;
    for (size_t i = 0; i < l->n; i++)
        if (l->v[i].len > 0)
            l->v[n++] = l->v[i];
    l->n = n;
}

/* --- steps ------------------------------------------------------------------------------- */
static void swap_spans(struct tok_call *c)
{
    struct tok_spans was = c->spans;
    c->spans = c->spans2;
    c->spans2 = was;
    c->spans2.n = 0;
}

static int split_all(struct tok_call *c, const struct tok_pre *st)
{
    int rc = ERR_OK;
    for (size_t i = 0; rc == ERR_OK && i < c->spans.n; i++)
        rc = split_span(c, st, c->text.data, c->spans.v[i], &c->spans2);
    drop_empty(&c->spans2);
    swap_spans(c);
    return rc;
}

/* Write every span anew with `write`, into the other buffer. */
static int rewrite(struct tok_call *c, const struct tok_pre *st,
                   int (*write)(struct buf *, const struct tok_pre *, const char *, struct tok_span,
                                struct err *))
{
    int rc = ERR_OK;
    c->spare.len = 0;
    for (size_t i = 0; rc == ERR_OK && i < c->spans.n; i++) {
        struct tok_span *span = &c->spans.v[i];
        size_t at = c->spare.len;
        rc = write(&c->spare, st, c->text.data + span->at, *span, c->err);
        span->at = (uint32_t)at;
        span->len = (uint32_t)(c->spare.len - at);
        span->origin = span->origin > 0; /* its beginning still does */
    }
    struct buf was = c->text;
    c->text = c->spare;
    c->spare = was;
    return rc;
}

static int write_with_space(struct buf *out, const struct tok_pre *st, const char *s,
                            struct tok_span span, struct err *err)
{
    (void)st;
    int rc = s[0] == ' ' ? ERR_OK : tok_add(out, " ", 1, err);
    return rc == ERR_OK ? tok_add(out, s, span.len, err) : rc;
}

static int write_in_alphabet(struct buf *out, const struct tok_pre *st, const char *s,
                             struct tok_span span, struct err *err)
{
    (void)st;
    int rc = ERR_OK;
    for (size_t i = 0; rc == ERR_OK && i < span.len; i++) {
        char c[2];
        rc = tok_add(out, c, (size_t)tok_byte_char((uint8_t)s[i], c), err);
    }
    return rc;
}

static int write_metaspace(struct buf *out, const struct tok_pre *st, const char *s,
                           struct tok_span span, struct err *err)
{
    const char *r = st->replacement;
    size_t n = st->replacement_len;
    bool has = s[0] == ' ' || (span.len >= n && memcmp(s, r, n) == 0);
    int rc = ERR_OK;
    if (!has && (st->prepend == PREPEND_ALWAYS || (st->prepend == PREPEND_FIRST && span.origin > 0)))
        rc = tok_add(out, r, n, err);
    for (size_t i = 0; rc == ERR_OK && i < span.len;) {
        const char *space = memchr(s + i, ' ', span.len - i);
        size_t to = space != NULL ? (size_t)(space - s) : span.len;
        rc = tok_add(out, s + i, to - i, err);
        if (rc == ERR_OK && space != NULL)
            rc = tok_add(out, r, n, err);
        i = to + (space != NULL);
    }
    return rc;
}

/* `raw`: the model takes the bytes of this step. */
static int run_step(struct tok_call *c, const struct tok_pre *st, bool raw)
{
    int rc = ERR_OK;
    if (st->kind == PRE_METASPACE)
        rc = rewrite(c, st, write_metaspace);
    else if (st->kind == PRE_BYTES && st->prefix_space)
        rc = rewrite(c, st, write_with_space);
    if (rc == ERR_OK && st->has_pattern)
        rc = split_all(c, st);
    if (rc == ERR_OK && st->kind == PRE_BYTES && !raw)
        rc = rewrite(c, st, write_in_alphabet);
    return rc;
}

int tok_pretokenize(struct tok_call *c, size_t origin)
{
    c->spans.n = c->spans2.n = 0;
    int rc = add_span(&c->spans, 0, c->text.len, origin, c->err);
    for (size_t i = 0; rc == ERR_OK && i < c->t->npre; i++)
        rc = run_step(c, &c->t->pre[i], i + 1 == c->t->npre && c->t->raw_bytes);
    return rc;
}
