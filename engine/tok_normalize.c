/* tok_normalize.c - the normaliser: prepend, replace, Unicode forms, lower case, strip, clean.
 *
 * Each step reads one buffer and writes the other.  Unicode normalisation is done here with
 * utf8proc's tables but with our own canonical ordering: utf8proc sorts combining marks by
 * insertion, which a text of nothing but marks makes quadratic. */
#include "engine/tokenizer_int.h"

#include <stdlib.h>
#include <string.h>
#include <utf8proc.h>

const char tok_replacement[4] = "\xEF\xBF\xBD";

int tok_add(struct buf *b, const void *data, size_t len, struct err *err)
{
    int rc = buf_add(b, data, len);
    if (rc == ERR_NOMEM)
        return err_nomem(err);
    if (rc != ERR_OK)
        return err_set(err, rc, "the text grows past %zu bytes in the tokenizer", b->max);
    return ERR_OK;
}

/* --- characters -------------------------------------------------------------------------- */
int tok_utf8(const char *text, size_t len)
{
    const unsigned char *s = (const unsigned char *)text;
    unsigned char c = s[0];
    if (c < 0x80)
        return 1;
    int n = c >= 0xc2 && c <= 0xdf   ? 2
            : c >= 0xe0 && c <= 0xef ? 3
            : c >= 0xf0 && c <= 0xf4 ? 4
                                     : 0;
    if (n == 0)
        return -1;
    /* the second byte excludes long forms, surrogates and what lies above U+10FFFF */
    unsigned char low = c == 0xe0 ? 0xa0 : c == 0xf0 ? 0x90 : 0x80;
    unsigned char high = c == 0xed ? 0x9f : c == 0xf4 ? 0x8f : 0xbf;
    for (int i = 1; i < n; i++) {
        if ((size_t)i == len)
            return 0;
        if (s[i] < low || s[i] > high)
            return -i;
        low = 0x80;
        high = 0xbf;
    }
    return n;
}

uint32_t tok_codepoint(const char *text, int len)
{
    const unsigned char *s = (const unsigned char *)text;
    switch (len) {
    case 1:
        return s[0];
    case 2:
        return (s[0] & 0x1fu) << 6 | (s[1] & 0x3fu);
    case 3:
        return (s[0] & 0x0fu) << 12 | (s[1] & 0x3fu) << 6 | (s[2] & 0x3fu);
    default:
        return (s[0] & 0x07u) << 18 | (s[1] & 0x3fu) << 12 | (s[2] & 0x3fu) << 6 | (s[3] & 0x3fu);
    }
}

bool tok_is_space(uint32_t c)
{
    return (c >= 9 && c <= 13) || c == 0x20 || c == 0x85 || c == 0xa0 || c == 0x1680 ||
           (c >= 0x2000 && c <= 0x200a) || c == 0x2028 || c == 0x2029 || c == 0x202f ||
           c == 0x205f || c == 0x3000;
}

static int add_codepoint(struct buf *b, int32_t c, struct err *err)
{
    utf8proc_uint8_t out[4];
    return tok_add(b, out, (size_t)utf8proc_encode_char(c, out), err);
}

/* --- Unicode normal forms ---------------------------------------------------------------- */
static int ccc(int32_t c) { return utf8proc_get_property(c)->combining_class; }

/* Stable sort of one run of marks by their class: by insertion when short, by counting when
 * long. */
static int sort_marks(int32_t *c, size_t n, struct err *err)
{
    if (n <= 32) {
        for (size_t i = 1; i < n; i++) {
            int32_t x = c[i];
            size_t j = i;
            for (; j > 0 && ccc(c[j - 1]) > ccc(x); j--)
                c[j] = c[j - 1];
            c[j] = x;
        }
        return ERR_OK;
    }
    size_t at[256] = { 0 };
    for (size_t i = 0; i < n; i++)
        at[ccc(c[i])]++;
    for (size_t k = 0, sum = 0; k < 256; k++) {
        size_t count = at[k];
        at[k] = sum;
        sum += count;
    }
    int32_t *sorted = malloc(n * sizeof *sorted);
    if (sorted == NULL)
        return err_nomem(err);
    for (size_t i = 0; i < n; i++)
        sorted[at[ccc(c[i])]++] = c[i];
    memcpy(c, sorted, n * sizeof *sorted);
    free(sorted);
    return ERR_OK;
}

static int order_marks(int32_t *c, size_t n, struct err *err)
{
    int rc = ERR_OK;
    for (size_t i = 0; rc == ERR_OK && i < n;) {
        size_t from = i;
        while (i < n && ccc(c[i]) != 0)
            i++;
        if (i - from > 1)
            rc = sort_marks(c + from, i - from, err);
        if (i < n)
            i++;
    }
    return rc;
}

/* s[len] -> *ret, decomposed and ordered; free() it. */
static int decompose(const char *s, size_t len, utf8proc_option_t options, int32_t **ret,
                     size_t *ret_n, struct err *err)
{
    size_t n = 0, cap = len + 32;
    int32_t *c = malloc(cap * sizeof *c);
    if (c == NULL)
        return err_nomem(err);
    int boundary = 0;
    for (size_t i = 0; i < len;) {
        int size = tok_utf8(s + i, len - i);
        utf8proc_ssize_t made =
            utf8proc_decompose_char((int32_t)tok_codepoint(s + i, size), c + n,
                                    (utf8proc_ssize_t)(cap - n), options, &boundary);
        if (made >= 0 && (size_t)made <= cap - n) {
            n += (size_t)made;
            i += (size_t)size;
            continue;
        }
        int32_t *bigger = made < 0 ? NULL : realloc(c, 2 * cap * sizeof *c);
        if (bigger == NULL) {
            free(c);
            return err_nomem(err);
        }
        c = bigger;
        cap *= 2;
    }
    int rc = order_marks(c, n, err);
    if (rc != ERR_OK) {
        free(c);
        return rc;
    }
    *ret = c;
    *ret_n = n;
    return ERR_OK;
}

/* First code point that the form may change, or that may change its neighbour. */
static bool already_normal(const struct tok_norm *st, const char *s, size_t len)
{
    /* the first byte of U+0300 is 0xcc, of U+00A0 0xc2, of U+00C0 0xc3 */
    unsigned char first = st->compat ? 0xc2 : st->compose ? 0xcc : 0xc3;
    for (size_t i = 0; i < len; i++)
        if ((unsigned char)s[i] >= first)
            return false;
    return true;
}

static int write_form(const struct tok_norm *st, const char *s, size_t len, struct buf *out,
                      struct err *err)
{
    if (already_normal(st, s, len))
        return tok_add(out, s, len, err);
    int32_t *c = NULL;
    size_t n = 0;
    int options = UTF8PROC_STABLE | UTF8PROC_DECOMPOSE | (st->compat ? UTF8PROC_COMPAT : 0);
    int rc = decompose(s, len, (utf8proc_option_t)options, &c, &n, err);
    if (rc != ERR_OK || c == NULL)
        return rc;
    if (st->compose)
        n = (size_t)utf8proc_normalize_utf32(c, (utf8proc_ssize_t)n,
                                             UTF8PROC_STABLE | UTF8PROC_COMPOSE);
    for (size_t i = 0; rc == ERR_OK && i < n; i++)
        rc = add_codepoint(out, c[i], err);
    free(c);
    return rc;
}

static int unicode_form(const struct tok_norm *st, const char *s, size_t len, struct buf *out,
                        size_t *origin, struct err *err)
{
    int rc = write_form(st, s, *origin, out, err);
    *origin = out->len; /* what the beginning alone becomes */
    out->len = 0;
    return rc == ERR_OK ? write_form(st, s, len, out, err) : rc;
}

/* --- the other steps --------------------------------------------------------------------- */
static int lowercase(const char *s, size_t len, struct buf *out, size_t *origin, struct err *err)
{
    int rc = ERR_OK;
    size_t made = 0; /* of the output, from the start of the input */
    for (size_t i = 0; rc == ERR_OK && i < len;) {
        int n = tok_utf8(s + i, len - i);
        uint32_t c = tok_codepoint(s + i, n);
        if (c == 0x130) /* the only character whose lower case is two */
            rc = tok_add(out, "i\xCC\x87", 3, err);
        else
            rc = add_codepoint(out, utf8proc_tolower((int32_t)c), err);
        i += (size_t)n;
        if (i <= *origin)
            made = out->len;
    }
    *origin = made;
    return rc;
}

static int replace(const struct tok_norm *st, const char *s, size_t len, struct buf *out,
                   struct tok_match **mem, size_t *origin, struct err *err)
{
    struct tok_scan scan = { .p = &st->pattern, .text = s, .len = len, .mem = mem };
    size_t done = 0, start, end, made = 0;
    int found, rc = ERR_OK;
    while (rc == ERR_OK && (found = tok_scan_next(&scan, &start, &end, err)) != 0) {
        if (found < 0)
            return err->code;
        if (done < *origin)
            made += (start < *origin ? start : *origin) - done;
        /* what replaces several characters counts as coming from the last of them */
        size_t last = end;
        while (last > start && (s[--last] & 0xc0) == 0x80)
            continue;
        if (last < *origin)
            made += st->text_len;
        rc = tok_add(out, s + done, start - done, err);
        if (rc == ERR_OK)
            rc = tok_add(out, st->text, st->text_len, err);
        done = end;
    }
    if (done < *origin)
        made += *origin - done;
    *origin = made;
    return rc == ERR_OK ? tok_add(out, s + done, len - done, err) : rc;
}

static int strip(const struct tok_norm *st, const char *s, size_t len, struct buf *out,
                 size_t *origin, struct err *err)
{
    size_t from = 0, to = len;
    while (st->left && from < to) {
        int n = tok_utf8(s + from, to - from);
        if (!tok_is_space(tok_codepoint(s + from, n)))
            break;
        from += (size_t)n;
    }
    while (st->right && to > from) {
        size_t at = to - 1;
        while ((s[at] & 0xc0) == 0x80)
            at--;
        if (!tok_is_space(tok_codepoint(s + at, (int)(to - at))))
            break;
        to = at;
    }
    *origin = *origin > from ? *origin - from : 0;
    return tok_add(out, s + from, to - from, err);
}

/* Control characters go, other white space becomes a space: SentencePiece's way. */
static int32_t nmt(int32_t c)
{
    if ((c >= 1 && c <= 8) || c == 0xb || (c >= 0xe && c <= 0x1f) || c == 0x7f || c == 0x8f ||
        c == 0x9f)
        return -1;
    if (c == 9 || c == 10 || c == 12 || c == 13 || c == 0x1680 || (c >= 0x200b && c <= 0x200f) ||
        c == 0x2028 || c == 0x2029 || c == 0x2581 || c == 0xfeff || c == 0xfffd)
        return ' ';
    return c;
}

/* The same as BERT does it. */
static int32_t clean(int32_t c)
{
    if (c == 9 || c == 10 || c == 13)
        return ' ';
    utf8proc_category_t k = utf8proc_category(c);
    if (c == 0 || c == 0xfffd || k == UTF8PROC_CATEGORY_CC || k == UTF8PROC_CATEGORY_CF ||
        k == UTF8PROC_CATEGORY_CO)
        return -1;
    return tok_is_space((uint32_t)c) ? ' ' : c;
}

static bool is_mark(int32_t c, bool only_mn)
{
    utf8proc_category_t k = utf8proc_category(c);
    return k == UTF8PROC_CATEGORY_MN ||
           (!only_mn && (k == UTF8PROC_CATEGORY_MC || k == UTF8PROC_CATEGORY_ME));
}

/* The blocks of ideographs around which BERT puts spaces. */
static bool is_chinese(int32_t c)
{
    static const int32_t blocks[][2] = { { 0x4e00, 0x9fff },   { 0x3400, 0x4dbf },
                                         { 0x20000, 0x2a6df }, { 0x2a700, 0x2b73f },
                                         { 0x2b740, 0x2b81f }, { 0x2b920, 0x2ceaf },
                                         { 0xf900, 0xfaff },   { 0x2f800, 0x2fa1f } };
    for (size_t i = 0; i < sizeof blocks / sizeof blocks[0]; i++)
        if (c >= blocks[i][0] && c <= blocks[i][1])
            return true;
    return false;
}

/* Steps that drop a character, replace it or put spaces around it. */
static int each_char(const struct tok_norm *st, const char *s, size_t len, struct buf *out,
                     size_t *origin, struct err *err)
{
    int rc = ERR_OK;
    size_t made = 0;
    for (size_t i = 0; rc == ERR_OK && i < len;) {
        int n = tok_utf8(s + i, len - i);
        int32_t was = (int32_t)tok_codepoint(s + i, n), c = was;
        if (st->kind == NORM_NMT)
            c = nmt(was);
        else if (st->kind == NORM_CLEAN)
            c = clean(was);
        else if (st->kind == NORM_STRIP_ACCENTS)
            c = is_mark(was, st->only_mn) ? -1 : was;
        bool around = st->kind == NORM_CHINESE && is_chinese(was);
        if (around)
            rc = tok_add(out, " ", 1, err);
        if (rc == ERR_OK && c >= 0)
            rc = c == was ? tok_add(out, s + i, (size_t)n, err) : add_codepoint(out, c, err);
        if (rc == ERR_OK && around)
            rc = tok_add(out, " ", 1, err);
        i += (size_t)n;
        if (i <= *origin)
            made = out->len;
    }
    *origin = made;
    return rc;
}

static int run_step(const struct tok_norm *st, const char *s, size_t len, struct buf *out,
                    struct tok_match **mem, size_t *origin, struct err *err)
{
    int rc = ERR_OK;
    size_t made = 0;
    switch (st->kind) {
    case NORM_PREPEND:
        if (len > 0)
            rc = tok_add(out, st->text, st->text_len, err);
        *origin += *origin > 0 ? st->text_len : 0;
        return rc == ERR_OK ? tok_add(out, s, len, err) : rc;
    case NORM_REPLACE:
        return replace(st, s, len, out, mem, origin, err);
    case NORM_UNICODE:
        return unicode_form(st, s, len, out, origin, err);
    case NORM_LOWERCASE:
        return lowercase(s, len, out, origin, err);
    case NORM_STRIP:
        return strip(st, s, len, out, origin, err);
    case NORM_CHARSMAP:
        return tok_charsmap(st, s, len, out, origin, err);
    case NORM_NMT:
    case NORM_STRIP_ACCENTS:
    case NORM_CLEAN:
    case NORM_CHINESE:
        return each_char(st, s, len, out, origin, err);
    case NORM_BYTES:
        for (size_t i = 0; rc == ERR_OK && i < len; i++) {
            char c[2];
            rc = tok_add(out, c, (size_t)tok_byte_char((uint8_t)s[i], c), err);
            if (i < *origin)
                made = out->len;
        }
        *origin = made;
        return rc;
    }
    return rc;
}

int tok_normalize(const struct tokenizer *t, const char *s, size_t len, struct buf *text,
                  struct buf *spare, struct tok_match **mem, size_t *origin, struct err *err)
{
    text->len = 0;
    if (t->nnorm == 0)
        return tok_add(text, s, len, err);
    int rc = run_step(&t->norm[0], s, len, text, mem, origin, err);
    for (size_t i = 1; rc == ERR_OK && i < t->nnorm; i++) {
        struct buf was = *text;
        *text = *spare;
        *spare = was;
        text->len = 0;
        rc = run_step(&t->norm[i], spare->data, spare->len, text, mem, origin, err);
    }
    return rc;
}
