/* jinja_text.c - strings as Python has them: counted in code points, with Unicode's idea of letters,
 * case and white space.  Inside they are UTF-8 that was checked when it came in. */
#include "engine/jinja_int.h"

#include <string.h>
#include <utf8proc.h>

/* --- code points -------------------------------------------------------------------------------- */

size_t jdecode(const char *s, uint32_t *ret)
{
    const unsigned char *u = (const unsigned char *)s;
    if (u[0] < 0x80) {
        *ret = u[0];
        return 1;
    }
    const size_t n = u[0] >= 0xf0 ? 4 : u[0] >= 0xe0 ? 3 : 2;
    uint32_t cp = u[0] & (0xffu >> (n + 1));
    for (size_t i = 1; i < n; i++)
        cp = cp << 6 | (u[i] & 0x3f);
    *ret = cp;
    return n;
}

size_t jencode(uint32_t cp, char ret[4])
{
    if (cp < 0x80) {
        ret[0] = (char)cp;
        return 1;
    }
    const size_t n = cp < 0x800 ? 2 : cp < 0x10000 ? 3 : 4;
    for (size_t i = n - 1; i > 0; i--, cp >>= 6)
        ret[i] = (char)(0x80 | (cp & 0x3f));
    ret[0] = (char)((0xf00 >> n) | cp);
    return n;
}

size_t jdecode_back(const char *s, size_t len, uint32_t *ret)
{
    size_t n = 1;
    while (n < 4 && n < len && ((unsigned char)s[len - n] & 0xc0) == 0x80)
        n++;
    return jdecode(s + len - n, ret);
}

bool jspace(uint32_t cp)
{
    return (cp >= 9 && cp <= 13) || (cp >= 0x1c && cp <= 0x20) || cp == 0x85 || cp == 0xa0 ||
           cp == 0x1680 || (cp >= 0x2000 && cp <= 0x200a) || cp == 0x2028 || cp == 0x2029 ||
           cp == 0x202f || cp == 0x205f || cp == 0x3000;
}

static utf8proc_category_t category(uint32_t cp) { return utf8proc_category((utf8proc_int32_t)cp); }

bool jprintable(uint32_t cp)
{
    if (cp < 0x80)
        return cp >= 0x20 && cp < 0x7f;
    switch (category(cp)) {
    case UTF8PROC_CATEGORY_CN:
    case UTF8PROC_CATEGORY_CC:
    case UTF8PROC_CATEGORY_CF:
    case UTF8PROC_CATEGORY_CS:
    case UTF8PROC_CATEGORY_CO:
    case UTF8PROC_CATEGORY_ZS:
    case UTF8PROC_CATEGORY_ZL:
    case UTF8PROC_CATEGORY_ZP: return false;
    default: return true;
    }
}

bool jletter(uint32_t cp)
{
    const utf8proc_category_t k = category(cp);
    return k >= UTF8PROC_CATEGORY_LU && k <= UTF8PROC_CATEGORY_LO;
}

bool jword(uint32_t cp)
{
    const utf8proc_category_t k = category(cp);
    return cp == '_' || jletter(cp) || (k >= UTF8PROC_CATEGORY_ND && k <= UTF8PROC_CATEGORY_NO);
}

static size_t count_chars(const char *s, size_t len)
{
    size_t n = 0;
    for (size_t i = 0; i < len; i++)
        n += ((unsigned char)s[i] & 0xc0) != 0x80;
    return n;
}

size_t jchar_at(const struct jstr *s, size_t index)
{
    if (index >= s->chars)
        return s->len;
    if (s->chars == s->len)
        return index;
    size_t at = 0;
    for (; index > 0; index--)
        for (at++; ((unsigned char)s->s[at] & 0xc0) == 0x80;)
            at++;
    return at;
}

/* --- making strings ------------------------------------------------------------------------------ */

struct jv jstr_borrow(struct jctx *c, const char *s, size_t len)
{
    struct jstr *r = jalloc(c, 1, sizeof *r);
    jcharge(c, len / 64);
    *r = (struct jstr){ s, len, count_chars(s, len), false };
    return (struct jv){ .type = J_STR, .s = r };
}

struct jv jstrn(struct jctx *c, const char *s, size_t len)
{
    char *p = jbytes(c, len);
    if (len > 0)
        memcpy(p, s, len);
    return jstr_borrow(c, p, len);
}

struct jv jstrz(struct jctx *c, const char *s) { return jstrn(c, s, strlen(s)); }

struct jv jstr_part(struct jctx *c, const struct jstr *s, size_t from, size_t to)
{
    return jstr_borrow(c, s->s + from, to - from);
}

struct jv jstr_safe(struct jctx *c, struct jv v, bool safe)
{
    if (v.s->safe == safe)
        return v;
    struct jstr *r = jalloc(c, 1, sizeof *r);
    *r = *v.s;
    r->safe = safe;
    return (struct jv){ .type = J_STR, .s = r };
}

bool jstr_is(const struct jstr *s, const char *z)
{
    return s->len == strlen(z) && memcmp(s->s, z, s->len) == 0;
}

const char *jstr_z(struct jctx *c, const struct jstr *s)
{
    char *p = jalloc(c, s->len + 1, 1);
    if (s->len > 0)
        memcpy(p, s->s, s->len);
    return p;
}

void jout_add(struct jctx *c, struct jout *o, const char *s, size_t n)
{
    jcharge(c, n / 64);
    if (n > c->max_output || o->len > c->max_output - n)
        jfail_plain(c, ERR_TOO_LARGE, NULL, "%s, line %d: the text is longer than %zu bytes",
                    c->name, c->line, c->max_output);
    if (o->len + n > o->cap) {
        size_t cap = o->cap ? 2 * o->cap : 128;
        while (cap < o->len + n)
            cap *= 2;
        char *p = jbytes(c, cap);
        if (o->len > 0)
            memcpy(p, o->s, o->len);
        o->s = p;
        o->cap = cap;
    }
    if (n > 0)
        memcpy(o->s + o->len, s, n);
    o->len += n;
}

void jout_puts(struct jctx *c, struct jout *o, const char *s) { jout_add(c, o, s, strlen(s)); }

void jout_str(struct jctx *c, struct jout *o, const struct jstr *s) { jout_add(c, o, s->s, s->len); }

void jout_char(struct jctx *c, struct jout *o, uint32_t cp)
{
    char b[4];
    jout_add(c, o, b, jencode(cp, b));
}

struct jv jout_end(struct jctx *c, const struct jout *o)
{
    return jstr_borrow(c, o->s != NULL ? o->s : "", o->len);
}

struct jv jescape(struct jctx *c, struct jv v)
{
    if (v.type == J_STR && v.s->safe)
        return v;
    const struct jstr *s = jtostr(c, v).s;
    struct jout o = { 0 };
    jcharge(c, s->len / 8);
    for (size_t i = 0; i < s->len; i++) {
        static const char *const entity[] = { "&amp;", "&lt;", "&gt;", "&#34;", "&#39;" };
        static const char special[] = "&<>\"'";
        const char *p = s->s[i] != '\0' ? strchr(special, s->s[i]) : NULL;
        if (p != NULL)
            jout_puts(c, &o, entity[p - special]);
        else
            jout_add(c, &o, s->s + i, 1);
    }
    return jstr_safe(c, jout_end(c, &o), true);
}

/* --- strip, search, replace ---------------------------------------------------------------------- */

static bool strips(uint32_t cp, const struct jstr *chars)
{
    if (chars == NULL)
        return jspace(cp);
    for (size_t at = 0; at < chars->len;) {
        uint32_t one;
        at += jdecode(chars->s + at, &one);
        if (one == cp)
            return true;
    }
    return false;
}

struct jv jstrip(struct jctx *c, const struct jstr *s, struct jv chars, int sides)
{
    const struct jstr *set = NULL;
    if (chars.type == J_STR)
        set = chars.s;
    else if (jgiven(chars) && chars.type != J_NONE)
        jfail(c, "strip arg must be None or str, not %s", jtype_name(chars));
    size_t from = 0, to = s->len;
    uint32_t cp;
    while ((sides & STRIP_LEFT) && from < to) {
        const size_t n = jdecode(s->s + from, &cp);
        if (!strips(cp, set))
            break;
        from += n;
    }
    while ((sides & STRIP_RIGHT) && to > from) {
        const size_t n = jdecode_back(s->s, to, &cp);
        if (!strips(cp, set))
            break;
        to -= n;
    }
    jcharge(c, (s->len - (to - from)) * (set ? set->len + 1 : 1) / 16);
    return jstr_safe(c, jstr_part(c, s, from, to), s->safe);
}

size_t jfind(struct jctx *c, const struct jstr *s, const struct jstr *what, size_t from)
{
    if (from > s->len || what->len > s->len - from)
        return SIZE_MAX;
    if (what->len == 0)
        return from;
    jcharge(c, what->len / 16);
    const char *p = memmem(s->s + from, s->len - from, what->s, what->len);
    jcharge(c, ((p ? (size_t)(p - s->s) : s->len) - from) / 64 + 1);
    return p ? (size_t)(p - s->s) : SIZE_MAX;
}

/* Python puts `new` between all characters when `old` is empty. */
static struct jv replace_empty(struct jctx *c, const struct jstr *s, const struct jstr *new,
                               int64_t count)
{
    struct jout o = { 0 };
    for (size_t at = 0; at <= s->len;) {
        uint32_t cp;
        if (count-- != 0)
            jout_str(c, &o, new);
        else
            count = 0;
        if (at == s->len)
            break;
        const size_t n = jdecode(s->s + at, &cp);
        jout_add(c, &o, s->s + at, n);
        at += n;
        jcharge(c, 1);
    }
    return jout_end(c, &o);
}

struct jv jreplace(struct jctx *c, const struct jstr *s, const struct jstr *old,
                   const struct jstr *new, int64_t count)
{
    if (old->len == 0)
        return replace_empty(c, s, new, count);
    struct jout o = { 0 };
    size_t from = 0;
    while (count != 0) {
        const size_t at = jfind(c, s, old, from);
        if (at == SIZE_MAX)
            break;
        jout_add(c, &o, s->s + from, at - from);
        jout_str(c, &o, new);
        from = at + old->len;
        count -= count > 0;
    }
    jout_add(c, &o, s->s + from, s->len - from);
    return jout_end(c, &o);
}

/* --- split --------------------------------------------------------------------------------------- */

static void reverse_seq(struct jseq *q)
{
    for (size_t i = 0; i < q->n / 2; i++) {
        const struct jv v = q->v[i];
        q->v[i] = q->v[q->n - 1 - i];
        q->v[q->n - 1 - i] = v;
    }
}

static void split_space(struct jctx *c, const struct jstr *s, int64_t max, struct jseq *q)
{
    size_t at = 0;
    uint32_t cp;
    jcharge(c, s->len / 16);
    for (;;) {
        while (at < s->len) {
            const size_t n = jdecode(s->s + at, &cp);
            if (!jspace(cp))
                break;
            at += n;
        }
        if (at == s->len)
            return;
        size_t to = at;
        while (to < s->len) {
            const size_t n = jdecode(s->s + to, &cp);
            if (jspace(cp))
                break;
            to += n;
        }
        if (max == 0) {
            jseq_add(c, q, jstr_part(c, s, at, s->len));
            return;
        }
        jseq_add(c, q, jstr_part(c, s, at, to));
        max -= max > 0;
        at = to;
    }
}

static void split_space_right(struct jctx *c, const struct jstr *s, int64_t max, struct jseq *q)
{
    size_t to = s->len;
    uint32_t cp;
    jcharge(c, s->len / 16);
    for (;;) {
        while (to > 0) {
            const size_t n = jdecode_back(s->s, to, &cp);
            if (!jspace(cp))
                break;
            to -= n;
        }
        if (to == 0)
            break;
        size_t from = to;
        while (from > 0) {
            const size_t n = jdecode_back(s->s, from, &cp);
            if (jspace(cp))
                break;
            from -= n;
        }
        if (max == 0) {
            jseq_add(c, q, jstr_part(c, s, 0, to));
            break;
        }
        jseq_add(c, q, jstr_part(c, s, from, to));
        max -= max > 0;
        to = from;
    }
    reverse_seq(q);
}

static void split_right(struct jctx *c, const struct jstr *s, const struct jstr *sep, int64_t max,
                        struct jseq *q)
{
    size_t at = s->len, to = at;
    while (max != 0 && at >= sep->len) {
        jcharge(c, 1);
        if (memcmp(s->s + at - sep->len, sep->s, sep->len) == 0) {
            jseq_add(c, q, jstr_part(c, s, at, to));
            to = at -= sep->len;
            max -= max > 0;
        } else {
            at--;
        }
    }
    jseq_add(c, q, jstr_part(c, s, 0, to));
    reverse_seq(q);
}

struct jv jsplit(struct jctx *c, const struct jstr *s, struct jv sep, int64_t max, bool from_right)
{
    struct jseq *q = jseq_new(c, SEQ_LIST, 0);
    if (sep.type == J_NONE || !jgiven(sep)) {
        (from_right ? split_space_right : split_space)(c, s, max, q);
        return jseqv(q);
    }
    if (sep.type != J_STR)
        jfail(c, "must be str or None, not %s", jtype_name(sep));
    if (sep.s->len == 0)
        jfail(c, "empty separator");
    if (from_right) {
        split_right(c, s, sep.s, max, q);
        return jseqv(q);
    }
    size_t from = 0, at;
    while (max != 0 && (at = jfind(c, s, sep.s, from)) != SIZE_MAX) {
        jseq_add(c, q, jstr_part(c, s, from, at));
        from = at + sep.s->len;
        max -= max > 0;
    }
    jseq_add(c, q, jstr_part(c, s, from, s->len));
    return jseqv(q);
}

static bool line_end(uint32_t cp)
{
    return (cp >= 10 && cp <= 13) || (cp >= 0x1c && cp <= 0x1e) || cp == 0x85 || cp == 0x2028 ||
           cp == 0x2029;
}

struct jv jsplitlines(struct jctx *c, const struct jstr *s, bool keep)
{
    struct jseq *q = jseq_new(c, SEQ_LIST, 0);
    size_t from = 0;
    for (size_t at = 0; at < s->len;) {
        uint32_t cp;
        size_t n = jdecode(s->s + at, &cp);
        if (line_end(cp)) {
            if (cp == '\r' && at + 1 < s->len && s->s[at + 1] == '\n')
                n = 2;
            jseq_add(c, q, jstr_part(c, s, from, keep ? at + n : at));
            from = at + n;
        }
        at += n;
    }
    jcharge(c, s->len / 16);
    if (from < s->len)
        jseq_add(c, q, jstr_part(c, s, from, s->len));
    return jseqv(q);
}

/* where: -1 text at the left, 1 at the right, 0 in the middle */
struct jv jpad(struct jctx *c, const struct jstr *s, int64_t width, struct jv fill, int where)
{
    if (jgiven(fill) && (fill.type != J_STR || fill.s->chars != 1))
        jfail(c, "The fill character must be exactly one character long");
    if (width <= (int64_t)s->chars)
        return jstr_safe(c, jstr_part(c, s, 0, s->len), s->safe);
    const size_t all = (size_t)width - s->chars;
    /* Python's rule for the odd space */
    const size_t left = where < 0 ? 0 : where > 0 ? all : all / 2 + (all & (size_t)width & 1);
    struct jout o = { 0 };
    for (size_t i = 0; i < all; i++) {
        if (i == left)
            jout_str(c, &o, s);
        jout_add(c, &o, jgiven(fill) ? fill.s->s : " ", jgiven(fill) ? fill.s->len : 1);
        jcharge(c, 1);
    }
    if (left == all)
        jout_str(c, &o, s);
    return jstr_safe(c, jout_end(c, &o), s->safe);
}

/* --- case ---------------------------------------------------------------------------------------- */

static bool cased(uint32_t cp)
{
    const utf8proc_category_t k = category(cp);
    return k == UTF8PROC_CATEGORY_LU || k == UTF8PROC_CATEGORY_LL || k == UTF8PROC_CATEGORY_LT ||
           utf8proc_tolower((utf8proc_int32_t)cp) != (utf8proc_int32_t)cp ||
           utf8proc_toupper((utf8proc_int32_t)cp) != (utf8proc_int32_t)cp;
}

/* A sigma at the end of a word has a small letter of its own. */
static bool final_sigma(const struct jstr *s, size_t at, size_t n)
{
    uint32_t cp;
    if (at == 0)
        return false;
    jdecode_back(s->s, at, &cp);
    if (!cased(cp))
        return false;
    if (at + n >= s->len)
        return true;
    jdecode(s->s + at + n, &cp);
    return !cased(cp);
}

/* Letters that become several: Unicode's table of special casing, as far as Latin script goes. */
static const char *special_upper(uint32_t cp, bool title)
{
    static const char *const ligature[][2] = { { "FF", "Ff" }, { "FI", "Fi" }, { "FL", "Fl" },
                                               { "FFI", "Ffi" }, { "FFL", "Ffl" }, { "ST", "St" },
                                               { "ST", "St" } };
    if (cp == 0xdf)
        return title ? "Ss" : "SS";
    if (cp >= 0xfb00 && cp <= 0xfb06)
        return ligature[cp - 0xfb00][title];
    return cp == 0x149 ? "\xca\xbcN" : NULL;
}

static void add_upper(struct jctx *c, struct jout *o, uint32_t cp, bool title)
{
    const char *many = special_upper(cp, title);
    if (many != NULL)
        jout_puts(c, o, many);
    else
        jout_char(c, o, (uint32_t)(title ? utf8proc_totitle((utf8proc_int32_t)cp)
                                         : utf8proc_toupper((utf8proc_int32_t)cp)));
}

static void add_lower(struct jctx *c, struct jout *o, const struct jstr *s, size_t at, size_t n,
                      uint32_t cp)
{
    if (cp == 0x3a3)
        jout_char(c, o, final_sigma(s, at, n) ? 0x3c2 : 0x3c3);
    else if (cp == 0x130)
        jout_puts(c, o, "i\xcc\x87");
    else
        jout_char(c, o, (uint32_t)utf8proc_tolower((utf8proc_int32_t)cp));
}

struct jv jcase(struct jctx *c, const struct jstr *s, enum jcase how)
{
    struct jout o = { 0 };
    bool inside = false; /* a word (title), the text (capital) */
    jcharge(c, s->len / 8);
    for (size_t at = 0; at < s->len;) {
        uint32_t cp;
        const size_t n = jdecode(s->s + at, &cp);
        bool upper = how == CASE_UPPER;
        if (how == CASE_TITLE || how == CASE_CAPITAL)
            upper = !inside;
        else if (how == CASE_SWAP)
            upper = utf8proc_toupper((utf8proc_int32_t)cp) != (utf8proc_int32_t)cp ||
                    special_upper(cp, false) != NULL;
        if (upper)
            add_upper(c, &o, cp, how == CASE_TITLE || how == CASE_CAPITAL);
        else
            add_lower(c, &o, s, at, n, cp);
        inside = how == CASE_CAPITAL || cased(cp);
        at += n;
    }
    return jstr_safe(c, jout_end(c, &o), s->safe);
}
