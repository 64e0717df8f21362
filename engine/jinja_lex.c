/* jinja_lex.c - template text to tokens.
 *
 * White space around tags is decided here.  A minus inside a tag eats all white space on its side.
 * Else a block or comment tag eats the blanks between the start of its line and itself
 * (lstrip_blocks) and the one newline behind it (trim_blocks), unless a plus on that side says
 * not to.  {{ }} eats nothing.  One newline at the end of the template is dropped. */
#include "engine/jinja_int.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct lexer {
    struct jctx *c;
    const char *s;       /* newlines are \n */
    size_t len, at;
    int line;
    bool line_starting;  /* what was read last ended with a newline, or nothing was */
    char *open;          /* brackets that wait for their end */
    size_t nopen;
    struct jtoks toks;
};

_Noreturn static void fail(struct lexer *l, const char *what)
{
    l->c->line = l->line;
    jfail(l->c, "%s", what);
}

static struct jtok *add(struct lexer *l, enum jtok_type type)
{
    struct jtoks *t = &l->toks;
    jcharge(l->c, 1);
    if (t->n == t->cap) {
        const size_t cap = t->cap ? 2 * t->cap : 256;
        struct jtok *v = jalloc(l->c, cap, sizeof *v);
        if (t->n > 0)
            memcpy(v, t->v, t->n * sizeof *v);
        t->v = v;
        t->cap = cap;
    }
    struct jtok *k = &t->v[t->n++];
    *k = (struct jtok){ .type = type, .line = l->line };
    return k;
}

/* Go on to `to`, counting lines. */
static void move(struct lexer *l, size_t to)
{
    for (; l->at < to; l->at++)
        l->line += l->s[l->at] == '\n';
    if (to > 0)
        l->line_starting = l->s[to - 1] == '\n';
}

static bool starts(const struct lexer *l, size_t at, const char *what)
{
    const size_t n = strlen(what);
    return n <= l->len - at && memcmp(l->s + at, what, n) == 0;
}

static size_t skip_space(const struct lexer *l, size_t at)
{
    while (at < l->len) {
        uint32_t cp;
        const size_t n = jdecode(l->s + at, &cp);
        if (!jspace(cp))
            break;
        at += n;
    }
    return at;
}

static size_t back_space(const struct lexer *l, size_t from, size_t to)
{
    while (to > from) {
        uint32_t cp;
        const size_t n = jdecode_back(l->s, to, &cp);
        if (!jspace(cp))
            break;
        to -= n;
    }
    return to;
}

/* --- data ------------------------------------------------------------------------------------------ */

/* Text from here to the tag at `to`, whose inside begins with `sign`. */
static void data(struct lexer *l, size_t to, char sign, bool lstrip)
{
    size_t end = to;
    if (sign == '-') {
        end = back_space(l, l->at, to);
    } else if (sign != '+' && lstrip) {
        size_t start = to;
        while (start > l->at && l->s[start - 1] != '\n')
            start--;
        if ((start > l->at || l->line_starting) && back_space(l, start, to) == start)
            end = start;
    }
    if (end > l->at) {
        struct jtok *k = add(l, T_DATA);
        k->s = l->s + l->at;
        k->len = end - l->at;
    }
    move(l, to);
}

/* The end of a tag at `at`, "%}" or "#}", with what it eats: the place behind it, or 0. */
static size_t tag_end(const struct lexer *l, size_t at, const char *end)
{
    const char first = at < l->len ? l->s[at] : '\0';
    if ((first == '-' || first == '+') && starts(l, at + 1, end))
        return first == '-' ? skip_space(l, at + 3) : at + 3;
    if (!starts(l, at, end))
        return 0;
    return at + 2 < l->len && l->s[at + 2] == '\n' ? at + 3 : at + 2;
}

static void comment(struct lexer *l)
{
    for (size_t at = l->at; at + 1 < l->len; at++) {
        const size_t to = tag_end(l, at, "#}");
        if (to > 0) {
            move(l, to);
            return;
        }
    }
    if (l->at < l->len) /* nothing at all behind it is fine, as in Jinja */
        fail(l, "a comment has no end");
}

static bool sign_at(const struct lexer *l, size_t at)
{
    return at < l->len && (l->s[at] == '-' || l->s[at] == '+');
}

/* {% raw %} at `at`: the place behind it, or 0. */
static size_t raw_begin(const struct lexer *l, size_t at)
{
    at += 2;
    at = skip_space(l, at + sign_at(l, at));
    if (!starts(l, at, "raw"))
        return 0;
    at = skip_space(l, at + 3);
    if (starts(l, at, "-%}"))
        return skip_space(l, at + 3);
    return starts(l, at, "%}") ? at + 2 : 0;
}

static void raw(struct lexer *l)
{
    for (size_t at = l->at; at + 1 < l->len; at++) {
        if (!starts(l, at, "{%"))
            continue;
        const size_t sign = at + 2;
        size_t to = skip_space(l, sign + sign_at(l, sign));
        if (!starts(l, to, "endraw"))
            continue;
        to = tag_end(l, skip_space(l, to + 6), "%}");
        if (to == 0)
            continue;
        data(l, at, sign_at(l, sign) ? l->s[sign] : '\0', true);
        move(l, to);
        return;
    }
    if (l->at < l->len)
        fail(l, "{% raw %} has no {% endraw %}");
}

/* --- inside of tags -------------------------------------------------------------------------------- */

static size_t digits(const struct lexer *l, size_t at, int base)
{
    for (;;) {
        size_t d = at + (at < l->len && l->s[at] == '_');
        const char ch = d < l->len ? l->s[d] : '\0';
        const int v = ch >= '0' && ch <= '9' ? ch - '0'
                      : (ch | 32) >= 'a' && (ch | 32) <= 'f' ? (ch | 32) - 'a' + 10 : 99;
        if (v >= base)
            return at;
        at = d + 1;
    }
}

/* The end of a float that begins at `at`, or 0. */
static size_t float_end(const struct lexer *l, size_t at)
{
    if (at > 0 && l->s[at - 1] == '.')
        return 0;
    size_t to = digits(l, at, 10);
    bool is = false;
    if (to < l->len && l->s[to] == '.') {
        const size_t end = digits(l, to + 1, 10);
        if (end > to + 1 && l->s[to + 1] != '_') {
            to = end;
            is = true;
        }
    }
    if (to < l->len && (l->s[to] | 32) == 'e') {
        size_t e = to + 1;
        e += sign_at(l, e);
        const size_t end = digits(l, e, 10);
        if (end > e && l->s[e] != '_') {
            to = end;
            is = true;
        }
    }
    return is ? to : 0;
}

static void number(struct lexer *l)
{
    size_t at = l->at, to = float_end(l, at);
    const bool is_float = to > 0;
    int base = 10;
    if (!is_float && l->s[at] == '0') {
        const char k = at + 1 < l->len ? (char)(l->s[at + 1] | 32) : '\0';
        base = k == 'b' ? 2 : k == 'o' ? 8 : k == 'x' ? 16 : 1;
        if (base > 1 && digits(l, at + 2, base) > at + 2)
            at += 2;
        else
            base = 1; /* only zeros may follow a zero */
        to = digits(l, at, base);
        base = base == 1 ? 10 : base;
    } else if (!is_float) {
        to = digits(l, at, 10);
    }
    char text[400];
    size_t n = 0;
    if (to - at >= sizeof text)
        fail(l, "a number has too many digits");
    for (size_t i = at; i < to; i++)
        if (l->s[i] != '_')
            text[n++] = l->s[i];
    text[n] = '\0';
    struct jtok *k = add(l, is_float ? T_FLOAT : T_INT);
    if (is_float) {
        k->value = jfloat(strtod(text, NULL));
    } else {
        int64_t v = 0;
        for (size_t i = 0; i < n; i++) {
            const int d = text[i] <= '9' ? text[i] - '0' : (text[i] | 32) - 'a' + 10;
            if (__builtin_mul_overflow(v, base, &v) || __builtin_add_overflow(v, d, &v))
                fail(l, "an integer has more than 64 bits");
        }
        k->value = jint(v);
    }
    move(l, to);
}

static bool identifier(const char *s, size_t len)
{
    for (size_t at = 0; at < len;) {
        uint32_t cp;
        const size_t n = jdecode(s + at, &cp);
        if (!(cp == '_' || jletter(cp) || (at > 0 && jword(cp))))
            return false;
        at += n;
    }
    return true;
}

static size_t name_end(const struct lexer *l)
{
    size_t at = l->at;
    while (at < l->len) {
        uint32_t cp;
        const size_t n = jdecode(l->s + at, &cp);
        if (!jword(cp))
            break;
        at += n;
    }
    return at;
}

/* --- strings ----------------------------------------------------------------------------------- */

/* `n` digits of `base` at *at; -1 if they are not there. */
static int64_t escaped_number(const struct lexer *l, size_t *at, size_t end, int n, int base)
{
    int64_t v = 0;
    for (int i = 0; i < n; i++, (*at)++) {
        const char ch = *at < end ? l->s[*at] : '\0';
        const int d = ch >= '0' && ch <= '9' ? ch - '0'
                      : (ch | 32) >= 'a' && (ch | 32) <= 'f' ? (ch | 32) - 'a' + 10 : 99;
        if (d >= base)
            return base == 8 && i > 0 ? v : -1;
        v = v * base + d;
    }
    return v;
}

/* What follows a backslash at *at. */
static void escape(struct lexer *l, size_t *at, size_t end, struct jout *o)
{
    static const char from[] = "\\'\"abfnrtv", to[] = "\\'\"\a\b\f\n\r\t\v";
    const char ch = l->s[*at];
    const char *p = strchr(from, ch);
    int64_t cp = -1;
    if (ch == '\n') {
        (*at)++;
        return;
    }
    if (ch != '\0' && p != NULL) {
        jout_add(l->c, o, &to[p - from], 1);
        (*at)++;
        return;
    }
    if (ch >= '0' && ch <= '7') {
        cp = escaped_number(l, at, end, 3, 8);
    } else if (ch == 'x' || ch == 'u' || ch == 'U') {
        (*at)++;
        cp = escaped_number(l, at, end, ch == 'x' ? 2 : ch == 'u' ? 4 : 8, 16);
    } else if (ch == 'N') {
        fail(l, "\\N{...} in a string is not supported");
    } else {
        jout_puts(l->c, o, "\\"); /* unknown: the backslash stays */
        if ((unsigned char)ch >= 0x80) { /* Python's way over ASCII spells such a character out */
            uint32_t u;
            char text[16];
            *at += jdecode(l->s + *at, &u);
            snprintf(text, sizeof text, u < 0x100 ? "x%02x" : u < 0x10000 ? "u%04x" : "U%08x", u);
            jout_puts(l->c, o, text);
        }
        return;
    }
    if (cp < 0 || cp > 0x10ffff || (cp >= 0xd800 && cp < 0xe000))
        fail(l, "a string has an escape that is no character");
    jout_char(l->c, o, (uint32_t)cp);
}

static void string(struct lexer *l)
{
    const char quote = l->s[l->at];
    size_t end = l->at + 1;
    while (end < l->len && l->s[end] != quote)
        end += l->s[end] == '\\' ? 2 : 1;
    if (end >= l->len)
        fail(l, "a string has no end");
    struct jout o = { 0 };
    struct jtok *k = add(l, T_STRING);
    for (size_t at = l->at + 1; at < end;) {
        if (l->s[at] == '\\') {
            at++;
            escape(l, &at, end, &o);
            continue;
        }
        const size_t from = at;
        while (at < end && l->s[at] != '\\')
            at++;
        jout_add(l->c, &o, l->s + from, at - from);
    }
    k->value = jout_end(l->c, &o);
    move(l, end + 1);
}

static void operator(struct lexer *l)
{
    static const char *const two[] = { "//", "**", "==", "!=", ">=", "<=" };
    const char ch = l->s[l->at];
    size_t n = 0;
    for (size_t i = 0; i < sizeof two / sizeof two[0]; i++)
        if (starts(l, l->at, two[i]))
            n = 2;
    if (n == 0 && ch != '\0' && strchr("+-/*%~[](){}><=.:|,;", ch) != NULL)
        n = 1;
    if (n == 0) {
        char msg[40];
        uint32_t cp;
        snprintf(msg, sizeof msg, "unexpected character '%.*s'", (int)jdecode(l->s + l->at, &cp),
                 l->s + l->at);
        fail(l, msg);
    }
    if (n == 1 && strchr("([{", ch) != NULL) {
        l->open[l->nopen++] = ch == '(' ? ')' : ch == '[' ? ']' : '}';
    } else if (n == 1 && strchr(")]}", ch) != NULL &&
               (l->nopen == 0 || l->open[--l->nopen] != ch)) {
        char msg[24];
        snprintf(msg, sizeof msg, "unexpected '%c'", ch);
        fail(l, msg);
    }
    memcpy(add(l, T_OP)->op, l->s + l->at, n);
    move(l, l->at + n);
}

/* From behind "{{" or "{%" to the end of the tag. */
static void inside(struct lexer *l, bool block)
{
    while (l->at < l->len) {
        const size_t at = l->at;
        size_t to = 0;
        if (l->nopen == 0 && block)
            to = tag_end(l, at, "%}");
        else if (l->nopen == 0)
            to = starts(l, at, "-}}") ? skip_space(l, at + 3) : starts(l, at, "}}") ? at + 2 : 0;
        if (to > 0) {
            add(l, block ? T_BLOCK_END : T_VAR_END);
            move(l, to);
            return;
        }
        if ((to = skip_space(l, at)) > at) {
            move(l, to);
        } else if (l->s[at] >= '0' && l->s[at] <= '9') {
            number(l);
        } else if ((to = name_end(l)) > at) {
            if (!identifier(l->s + at, to - at))
                fail(l, "a name has a character that names cannot have");
            struct jtok *k = add(l, T_NAME);
            k->s = l->s + at;
            k->len = to - at;
            move(l, to);
        } else if (l->s[at] == '\'' || l->s[at] == '"') {
            string(l);
        } else {
            operator(l);
        }
    }
}

/* --- public ----------------------------------------------------------------------------------------- */

/* \r\n and \r become \n; the last newline goes. */
static void normalise(struct lexer *l, const char *text, size_t len)
{
    char *s = jalloc(l->c, len + 1, 1);
    size_t n = 0;
    for (size_t i = 0; i < len; i++) {
        if (text[i] == '\r' && i + 1 < len && text[i + 1] == '\n')
            continue;
        s[n++] = text[i] == '\r' ? '\n' : text[i];
    }
    if (n > 0 && s[n - 1] == '\n')
        n--;
    l->s = s;
    l->len = n;
}

struct jtoks jlex(struct jctx *c, const char *text, size_t len)
{
    struct lexer l = { .c = c, .line = 1, .line_starting = true };
    normalise(&l, text, len);
    l.open = jalloc(c, len + 1, 1);
    while (l.at < l.len) {
        size_t tag = l.at;
        while (tag + 1 < l.len &&
               !(l.s[tag] == '{' && (l.s[tag + 1] == '{' || l.s[tag + 1] == '%' || l.s[tag + 1] == '#')))
            tag++;
        if (tag + 1 >= l.len) {
            data(&l, l.len, '+', false);
            break;
        }
        const char kind = l.s[tag + 1];
        const bool sign = sign_at(&l, tag + 2);
        const size_t raw_to = kind == '%' ? raw_begin(&l, tag) : 0;
        data(&l, tag, sign ? l.s[tag + 2] : '\0', kind != '{');
        if (raw_to > 0) {
            move(&l, raw_to);
            raw(&l);
            continue;
        }
        if (kind != '#')
            add(&l, kind == '{' ? T_VAR_BEGIN : T_BLOCK_BEGIN);
        move(&l, tag + 2 + sign);
        l.nopen = 0;
        if (kind == '#')
            comment(&l);
        else
            inside(&l, kind == '%');
    }
    add(&l, T_EOF);
    return l.toks;
}
