/* tok_decode.c - ids to text, whole or as a stream.
 *
 * The reference's decoders turn a list of strings into another list of strings.  Here each is a
 * stage that tokens are pushed through, in fragments: tokenizer_decode() and tok_stream run the
 * same stages, so the stream cannot differ from the whole.  A stage holds back only what a later
 * id could still change: the bytes of an unfinished character, a run of byte tokens (which becomes
 * one U+FFFD per byte unless the whole run is valid), trailing characters that Strip may cut. */
#include "engine/tokenizer_int.h"

#include <ctype.h>
#include <stdlib.h>
#include <string.h>

struct stage {
    const struct tok_decoder *d;
    struct buf part; /* a token that has not ended */
    struct buf held; /* bytes that are not text yet */
    bool started;    /* METASPACE: the first token has passed; SUFFIX: there is a held token */
    bool whole;      /* comes after the tokens were joined */
    size_t to_skip;  /* STRIP: characters that may still be cut at the start */
    size_t pending;  /* STRIP: characters held back at the end */
};

struct tok_stream {
    const struct tokenizer *t;
    bool skip_special, continues;
    bool piece; /* one token from the middle of a text */
    struct tok_match *match;
    struct buf *out; /* of the call in progress */
    bool any;        /* a token was written: without a decoder the next one follows a space */
    size_t n;
    struct stage stage[];
};

/* Fragment data[len] of a token enters stage i; `last`: the token ends with it. */
static int push(struct tok_stream *s, size_t i, const char *data, size_t len, bool last);

static int add(struct buf *b, const char *data, size_t len) { return buf_add(b, data, len); }

/* --- the stages -------------------------------------------------------------------------- */
/* What the held bytes and these ones make: complete characters go on, U+FFFD for what is none.
 * With `end`, the unfinished rest becomes U+FFFD too. */
static int push_bytes(struct tok_stream *s, size_t i, bool end)
{
    struct buf *h = &s->stage[i].held;
    size_t done = 0, at = 0;
    int rc = ERR_OK, n = 1;
    while (rc == ERR_OK && at < h->len && n != 0) {
        n = tok_utf8(h->data + at, h->len - at);
        if (n > 0) {
            at += (size_t)n;
            continue;
        }
        if (n == 0 && !end)
            break;
        if (at > done)
            rc = push(s, i + 1, h->data + done, at - done, false);
        if (rc == ERR_OK)
            rc = push(s, i + 1, tok_replacement, 3, false);
        at = n == 0 ? h->len : at + (size_t)-n;
        done = at;
    }
    if (rc == ERR_OK && at > done)
        rc = push(s, i + 1, h->data + done, at - done, false);
    if (h->len > at)
        memmove(h->data, h->data + at, h->len - at);
    h->len -= at;
    return rc;
}

/* A token of the byte-level alphabet as bytes; one with any other character stays as it is. */
static int add_alphabet(struct buf *b, const char *data, size_t len)
{
    size_t before = b->len, used;
    int rc = ERR_OK;
    for (size_t i = 0; rc == ERR_OK && i < len; i += used) {
        int byte = tok_char_byte(data + i, len - i, &used);
        if (byte < 0) {
            b->len = before;
            return add(b, data, len);
        }
        char c = (char)byte;
        rc = add(b, &c, 1);
    }
    return rc;
}

/* The byte that a token like <0x0A> stands for, -1 if it is none. */
static int byte_token(const char *s, size_t len)
{
    if (len != 6 || memcmp(s, "<0x", 3) != 0 || s[5] != '>')
        return -1;
    int v = 0;
    for (int i = 3; i < 5; i++) {
        if (!isxdigit((unsigned char)s[i]))
            return -1;
        v = v * 16 + (isdigit((unsigned char)s[i]) ? s[i] - '0' : (s[i] | 32) - 'a' + 10);
    }
    return v;
}

static int end_byte_run(struct tok_stream *s, size_t i)
{
    struct buf *h = &s->stage[i].held;
    bool valid = true;
    for (size_t at = 0; valid && at < h->len;) {
        int n = tok_utf8(h->data + at, h->len - at);
        valid = n > 0;
        at += n > 0 ? (size_t)n : 1;
    }
    int rc = ERR_OK;
    if (valid && h->len > 0)
        rc = push(s, i + 1, h->data, h->len, true);
    for (size_t k = 0; rc == ERR_OK && !valid && k < h->len; k++)
        rc = push(s, i + 1, tok_replacement, 3, true);
    h->len = 0;
    return rc;
}

static int push_fallback(struct tok_stream *s, size_t i, const char *data, size_t len)
{
    int byte = byte_token(data, len);
    if (byte >= 0) {
        char c = (char)byte;
        return add(&s->stage[i].held, &c, 1);
    }
    int rc = end_byte_run(s, i);
    return rc == ERR_OK ? push(s, i + 1, data, len, true) : rc;
}

static int push_replaced(struct tok_stream *s, size_t i, const char *data, size_t len)
{
    const struct tok_decoder *d = s->stage[i].d;
    struct tok_scan scan = { .p = &d->pattern, .text = data, .len = len, .mem = &s->match };
    struct err err = { 0 };
    size_t done = 0, start, end;
    int found, rc = ERR_OK;
    while (rc == ERR_OK && (found = tok_scan_next(&scan, &start, &end, &err)) != 0) {
        if (found < 0)
            return err.code;
        rc = push(s, i + 1, data + done, start - done, false);
        if (rc == ERR_OK)
            rc = push(s, i + 1, d->text, d->text_len, false);
        done = end;
    }
    return rc == ERR_OK ? push(s, i + 1, data + done, len - done, true) : rc;
}

static int push_metaspace(struct tok_stream *s, size_t i, const char *data, size_t len)
{
    struct stage *st = &s->stage[i];
    const struct tok_decoder *d = st->d;
    bool drop = d->drop_first && !st->started && !s->continues;
    st->started = true;
    struct tok_scan scan = { .p = &d->pattern, .text = data, .len = len };
    size_t done = 0, start, end;
    int rc = ERR_OK;
    while (rc == ERR_OK && tok_scan_next(&scan, &start, &end, NULL) > 0) {
        rc = push(s, i + 1, data + done, start - done, false);
        if (rc == ERR_OK && !drop)
            rc = push(s, i + 1, " ", 1, false);
        done = end;
    }
    return rc == ERR_OK ? push(s, i + 1, data + done, len - done, true) : rc;
}

/* BPEDecoder: the suffix is a space, but nothing in the last token.  So a token waits in `held`
 * for the next one. */
static int push_suffixed(struct tok_stream *s, size_t i, const char *with)
{
    struct stage *st = &s->stage[i];
    if (!st->started)
        return ERR_OK;
    struct tok_scan scan = { .p = &st->d->pattern, .text = st->held.data, .len = st->held.len };
    size_t done = 0, start, end;
    int rc = ERR_OK;
    while (rc == ERR_OK && tok_scan_next(&scan, &start, &end, NULL) > 0) {
        rc = push(s, i + 1, st->held.data + done, start - done, false);
        if (rc == ERR_OK)
            rc = push(s, i + 1, with, strlen(with), false);
        done = end;
    }
    if (rc == ERR_OK)
        rc = push(s, i + 1, st->held.data + done, st->held.len - done, true);
    st->held.len = 0;
    return rc;
}

static int hold_suffixed(struct tok_stream *s, size_t i, const char *data, size_t len)
{
    int rc = push_suffixed(s, i, " ");
    s->stage[i].started = true;
    return rc == ERR_OK ? add(&s->stage[i].held, data, len) : rc;
}

static int push_pending(struct tok_stream *s, size_t i, size_t n)
{
    const struct tok_decoder *d = s->stage[i].d;
    int rc = ERR_OK;
    for (; rc == ERR_OK && n > 0; n--)
        rc = push(s, i + 1, d->text, d->text_len, false);
    return rc;
}

/* Fragments pass at once, except characters at the end that the token may turn out to end with. */
static int push_stripped(struct tok_stream *s, size_t i, const char *data, size_t len, bool last)
{
    struct stage *st = &s->stage[i];
    const struct tok_decoder *d = st->d;
    const size_t n = d->text_len;
    while (st->to_skip > 0 && len >= n && memcmp(data, d->text, n) == 0) {
        data += n;
        len -= n;
        st->to_skip--;
    }
    if (len > 0)
        st->to_skip = 0;
    size_t body = len, tail = 0;
    while (body >= n && tail < d->stop && memcmp(data + body - n, d->text, n) == 0) {
        body -= n;
        tail++;
    }
    int rc = ERR_OK;
    if (body > 0) {
        rc = push_pending(s, i, st->pending);
        st->pending = 0;
    } else if (st->pending + tail > d->stop) {
        rc = push_pending(s, i, st->pending + tail - d->stop);
        st->pending = d->stop - tail;
    }
    st->pending += tail;
    if (last) {
        st->pending = 0;
        st->to_skip = st->whole && s->continues ? 0 : d->start;
    }
    return rc == ERR_OK ? push(s, i + 1, data, body, last) : rc;
}

/* --- pushing ----------------------------------------------------------------------------- */
static int sink(struct tok_stream *s, const char *data, size_t len, bool last)
{
    int rc = ERR_OK;
    if (!s->t->has_decoder && s->any)
        rc = add(s->out, " ", 1);
    s->any = s->any || last;
    return rc == ERR_OK ? add(s->out, data, len) : rc;
}

static int run_stage(struct tok_stream *s, size_t i, const char *data, size_t len)
{
    struct stage *st = &s->stage[i];
    int rc;
    switch (st->d->kind) {
    case DEC_BYTES:
        rc = add_alphabet(&st->held, data, len);
        return rc == ERR_OK ? push_bytes(s, i, false) : rc;
    case DEC_BYTE_FALLBACK:
        return push_fallback(s, i, data, len);
    case DEC_REPLACE:
        return push_replaced(s, i, data, len);
    case DEC_METASPACE:
        return push_metaspace(s, i, data, len);
    case DEC_SUFFIX:
        return hold_suffixed(s, i, data, len);
    case DEC_FUSE:
    case DEC_STRIP:
        break; /* these take fragments */
    }
    return ERR_OK;
}

static int push(struct tok_stream *s, size_t i, const char *data, size_t len, bool last)
{
    if (i == s->n)
        return sink(s, data, len, last);
    struct stage *st = &s->stage[i];
    if (st->d->kind == DEC_FUSE)
        return push(s, i + 1, data, len, false);
    if (st->d->kind == DEC_STRIP)
        return push_stripped(s, i, data, len, last);
    if (last && st->part.len == 0)
        return run_stage(s, i, data, len);
    int rc = add(&st->part, data, len);
    if (rc == ERR_OK && last) {
        rc = run_stage(s, i, st->part.data, st->part.len);
        st->part.len = 0;
    }
    return rc;
}

/* No more tokens come to any stage. */
static int finish(struct tok_stream *s)
{
    int rc = ERR_OK;
    for (size_t i = 0; rc == ERR_OK && i < s->n; i++) {
        if (s->stage[i].d->kind == DEC_BYTE_FALLBACK)
            rc = end_byte_run(s, i);
        if (s->stage[i].d->kind == DEC_BYTES)
            rc = push_bytes(s, i, true);
        if (s->stage[i].d->kind == DEC_SUFFIX)
            rc = push_suffixed(s, i, s->piece ? " " : "");
        if (rc == ERR_OK && (s->stage[i].d->kind == DEC_BYTES || s->stage[i].d->kind == DEC_FUSE))
            rc = push(s, i + 1, "", 0, true);
    }
    return rc;
}

/* --- public ------------------------------------------------------------------------------ */
int tok_stream_open(const struct tokenizer *t, bool skip_special, bool continues,
                    struct tok_stream **ret, struct err *err)
{
    struct tok_stream *s = calloc(1, sizeof *s + t->ndec * sizeof s->stage[0]);
    if (s == NULL)
        return err_nomem(err);
    s->t = t;
    s->skip_special = skip_special;
    s->continues = continues;
    s->n = t->ndec;
    bool whole = false;
    for (size_t i = 0; i < s->n; i++) {
        struct stage *st = &s->stage[i];
        st->d = &t->dec[i];
        st->whole = whole;
        st->to_skip = whole && continues ? 0 : st->d->start;
        buf_init(&st->part, TOK_MAX_WORK);
        buf_init(&st->held, TOK_MAX_WORK);
        whole = whole || st->d->kind == DEC_FUSE || st->d->kind == DEC_BYTES;
    }
    *ret = s;
    return ERR_OK;
}

void tok_stream_free(struct tok_stream *s)
{
    if (s == NULL)
        return;
    for (size_t i = 0; i < s->n; i++) {
        buf_free(&s->stage[i].part);
        buf_free(&s->stage[i].held);
    }
    tok_match_free(s->match);
    free(s);
}

/* An added token goes to the decoders as it was searched, that is, normalised. */
static struct tok_str decoder_input(const struct tokenizer *t, int32_t id)
{
    if (t->flags[id] & TOK_ADDED)
        for (size_t i = 0; i < t->nadded; i++)
            if (t->added[i].id == id && t->added[i].normal != NULL)
                return (struct tok_str){ t->added[i].normal, (uint32_t)t->added[i].normal_len };
    return t->str[id];
}

int tok_stream_add(struct tok_stream *s, int32_t id, struct buf *ret)
{
    const struct tokenizer *t = s->t;
    if (id < 0 || id >= t->size || t->str[id].s == NULL)
        return ERR_INVALID;
    if (s->skip_special && (t->flags[id] & TOK_SPECIAL))
        return ERR_OK;
    s->out = ret;
    struct tok_str token = decoder_input(t, id);
    return push(s, 0, token.s, token.len, true);
}

int tok_stream_end(struct tok_stream *s, struct buf *ret)
{
    s->out = ret;
    return finish(s);
}

int tokenizer_decode(const struct tokenizer *t, const int32_t *ids, size_t n, bool skip_special,
                     struct buf *ret, struct err *err)
{
    struct tok_stream *s = NULL;
    int rc = tok_stream_open(t, skip_special, false, &s, err);
    if (rc != ERR_OK || s == NULL)
        return rc;
    const size_t before = ret->len;
    for (size_t i = 0; rc == ERR_OK && i < n; i++) {
        rc = tok_stream_add(s, ids[i], ret);
        if (rc == ERR_INVALID)
            err_set(err, rc, "token id %d is not in the vocabulary (0 to %d)", (int)ids[i],
                    t->size - 1);
    }
    if (rc == ERR_OK)
        rc = tok_stream_end(s, ret);
    if (rc == ERR_NOMEM)
        err_nomem(err);
    else if (rc != ERR_OK)
        err_set(err, rc, "the text of %zu tokens is longer than %zu bytes", n, ret->max);
    if (rc != ERR_OK) {
        ret->len = before;
        if (ret->data != NULL)
            ret->data[before] = '\0';
    }
    tok_stream_free(s);
    return rc;
}

int tokenizer_piece(const struct tokenizer *t, int id, struct buf *ret)
{
    if (id < 0 || id >= t->size || t->str[id].s == NULL)
        return ERR_INVALID;
    if (t->flags[id] & TOK_ADDED) /* stands for what is written in the file */
        return add(ret, t->str[id].s, t->str[id].len);
    for (size_t i = 0; i < t->ndec; i++) {
        if (t->dec[i].kind == DEC_BYTES && i == 0)
            return add_alphabet(ret, t->str[id].s, t->str[id].len);
        int byte = byte_token(t->str[id].s, t->str[id].len);
        if (t->dec[i].kind == DEC_BYTE_FALLBACK && byte >= 0) {
            char c = (char)byte;
            return add(ret, &c, 1);
        }
    }
    struct tok_stream *s = NULL;
    int rc = tok_stream_open(t, false, true, &s, NULL);
    if (rc != ERR_OK || s == NULL)
        return rc;
    s->piece = true;
    rc = tok_stream_add(s, id, ret);
    if (rc == ERR_OK)
        rc = tok_stream_end(s, ret);
    tok_stream_free(s);
    return rc;
}
