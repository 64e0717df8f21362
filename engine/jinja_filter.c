/* jinja_filter.c - {{ x | filter }}: those over text and numbers.  jinja_filter_seq.c has the others. */
#include "engine/jinja_int.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define FILTER(name) \
    static struct jv name(struct jctx *c, struct jv v, const struct jargs *raw, struct jv *a)

static int64_t int_arg(struct jctx *c, struct jv v, int64_t otherwise, const char *what)
{
    int64_t i = otherwise;
    if (jgiven(v) && !jget_int(v, &i))
        jfail(c, "%s must be an integer, not %s", what, jtype_name(v));
    return i;
}

/* --- text ------------------------------------------------------------------------------------------ */

FILTER(f_upper) { (void)raw, (void)a; return jcase(c, jsoft(c, v).s, CASE_UPPER); }
FILTER(f_lower) { (void)raw, (void)a; return jcase(c, jsoft(c, v).s, CASE_LOWER); }
FILTER(f_capitalize) { (void)raw, (void)a; return jcase(c, jsoft(c, v).s, CASE_CAPITAL); }
FILTER(f_trim) { (void)raw; return jstrip(c, jsoft(c, v).s, a[0], STRIP_LEFT | STRIP_RIGHT); }
FILTER(f_string) { (void)raw, (void)a; return jsoft(c, v); }
FILTER(f_safe) { (void)raw, (void)a; return jstr_safe(c, jtostr(c, v), true); }
FILTER(f_escape) { (void)raw, (void)a; return jescape(c, v); }
FILTER(f_forceescape) { (void)raw, (void)a; return jescape(c, jtostr(c, v)); }
FILTER(f_length) { (void)raw, (void)a; return jint((int64_t)jlen(c, v)); }
FILTER(f_center)
{
    (void)raw;
    const struct jv none = { .type = J_MISSING };
    return jpad(c, jsoft(c, v).s, int_arg(c, a[0], 80, "width"), none, 0);
}

/* Words begin after blanks and opening brackets, unlike in str.title(). */
FILTER(f_title)
{
    (void)raw, (void)a;
    const struct jstr *s = jsoft(c, v).s;
    struct jout o = { 0 };
    bool first = true;
    for (size_t at = 0, to; at < s->len; at = to) {
        uint32_t cp;
        to = at + jdecode(s->s + at, &cp);
        const bool splits = jspace(cp) || (cp < 0x80 && cp != 0 && strchr("-({[<", (int)cp) != NULL);
        if (splits) {
            jout_add(c, &o, s->s + at, to - at);
            first = true;
            continue;
        }
        if (!first) { /* the rest of the word at once, for the sake of a final sigma */
            while (to < s->len) {
                const size_t n = jdecode(s->s + to, &cp);
                if (jspace(cp) || (cp < 0x80 && cp != 0 && strchr("-({[<", (int)cp) != NULL))
                    break;
                to += n;
            }
        }
        jout_str(c, &o, jcase(c, jstr_part(c, s, at, to).s, first ? CASE_UPPER : CASE_LOWER).s);
        first = false;
    }
    return jout_end(c, &o);
}

FILTER(f_replace)
{
    (void)raw;
    const int64_t count = a[2].type == J_NONE ? -1 : int_arg(c, a[2], -1, "count");
    return jreplace(c, jtostr(c, v).s, jtostr(c, a[0]).s, jtostr(c, a[1]).s, count);
}

FILTER(f_indent)
{
    (void)raw;
    struct jv by;
    if (v.type == J_UNDEF)
        jfail_undef(c, v);
    if (v.type != J_STR)
        jfail(c, "indent: unsupported operand type(s) for +=: '%s' and 'str'", jtype_name(v));
    if (a[0].type == J_STR)
        by = a[0];
    else
        by = jbinary(c, OP_MUL, jstrz(c, " "), jint(int_arg(c, a[0], 4, "width")));
    const struct jv lines = jsplitlines(c, jcat(c, v.s, jstrz(c, "\n").s).s, false);
    struct jout o = { 0 };
    for (size_t i = 0; i < lines.q->n; i++) {
        const struct jstr *line = lines.q->v[i].s;
        if (i > 0)
            jout_puts(c, &o, "\n");
        if (i == 0 ? jtruth(a[1]) : jtruth(a[2]) || line->len > 0)
            jout_str(c, &o, by.s);
        jout_str(c, &o, line);
    }
    return jstr_safe(c, jout_end(c, &o), v.s->safe);
}

FILTER(f_truncate)
{
    (void)raw;
    const int64_t length = int_arg(c, a[0], 255, "length"), leeway = int_arg(c, a[3], 5, "leeway");
    const struct jv end = jgiven(a[2]) ? a[2] : jstrz(c, "...");
    if (v.type != J_STR || end.type != J_STR)
        jfail(c, "truncate needs text, not %s", jtype_name(v.type != J_STR ? v : end));
    if (length < (int64_t)end.s->chars || leeway < 0)
        jfail(c, "truncate: expected length >= %zu and leeway >= 0", end.s->chars);
    if ((int64_t)v.s->chars - leeway <= length)
        return v;
    struct jv head = jslice(c, v, jnone(), jint(length - (int64_t)end.s->chars), jnone());
    if (!jtruth(a[1]))
        head = jsplit(c, head.s, jstrz(c, " "), 1, true).q->v[0];
    return jbinary(c, OP_ADD, head, end);
}

FILTER(f_wordcount)
{
    (void)raw, (void)a;
    const struct jstr *s = jsoft(c, v).s;
    int64_t n = 0;
    bool inside = false;
    jcharge(c, s->len / 16);
    for (size_t at = 0; at < s->len;) {
        uint32_t cp;
        at += jdecode(s->s + at, &cp);
        n += !inside && jword(cp);
        inside = jword(cp);
    }
    return jint(n);
}

FILTER(f_format)
{
    (void)a;
    struct jseq *q = jseq_new(c, SEQ_TUPLE, raw->npos);
    struct jdict *m = jdict_new(c);
    if (raw->npos > 0 && raw->nkw > 0)
        jfail(c, "can't handle positional and keyword arguments at the same time");
    for (size_t i = 0; i < raw->npos; i++)
        jseq_add(c, q, raw->pos[i]);
    for (size_t i = 0; i < raw->nkw; i++)
        jdict_set(c, m, raw->kw[i].name, raw->kw[i].value);
    return jprintf(c, jsoft(c, v).s, raw->nkw > 0 ? jdictv(m) : jseqv(q));
}

/* As urllib.parse.quote(); a form's fields also have "/" escaped and "+" for a blank. */
static void quote(struct jctx *c, struct jout *o, struct jv v, bool field)
{
    const struct jstr *s = jtostr(c, v).s;
    for (size_t i = 0; i < s->len; i++) {
        const unsigned char ch = (unsigned char)s->s[i];
        char b[4];
        const bool plain = (ch >= '0' && ch <= '9') || ((ch | 32) >= 'a' && (ch | 32) <= 'z') ||
                           (ch != 0 && strchr("_.-~", ch) != NULL) || (ch == '/' && !field);
        snprintf(b, sizeof b, field && ch == ' ' ? "+" : plain ? "%c" : "%%%02X", ch);
        jout_puts(c, o, b);
    }
}

FILTER(f_urlencode)
{
    (void)raw, (void)a;
    struct jout o = { 0 };
    if (v.type != J_DICT && v.type != J_SEQ) {
        quote(c, &o, v, false);
        return jout_end(c, &o);
    }
    const struct jspan keys = jiter(c, v);
    for (size_t i = 0; i < keys.n; i++) {
        struct jv pair[2] = { keys.v[i], jnone() };
        if (v.type == J_DICT) {
            pair[1] = jdict_get(c, v.m, keys.v[i]);
        } else {
            const struct jspan two = jiter(c, keys.v[i]);
            if (two.n != 2)
                jfail(c, "urlencode needs pairs, not %zu values", two.n);
            memcpy(pair, two.v, sizeof pair);
        }
        jout_puts(c, &o, i > 0 ? "&" : "");
        quote(c, &o, pair[0], true);
        jout_puts(c, &o, "=");
        quote(c, &o, pair[1], true);
    }
    return jout_end(c, &o);
}

/* --- numbers ---------------------------------------------------------------------------------------- */

/* Text without blanks around it and without the underscores that Python allows between digits;
 * false if it has others. */
static bool clean_number(struct jctx *c, const struct jstr *s, char *ret, size_t size)
{
    const struct jstr *t = jstrip(c, s, jnone(), STRIP_LEFT | STRIP_RIGHT).s;
    size_t n = 0;
    if (t->len == 0 || t->len >= size)
        return false;
    for (size_t i = 0; i < t->len; i++) {
        const char ch = t->s[i];
        if (ch == '\0' || (ch == '_' && (i == 0 || i + 1 == t->len || !strchr("0123456789abcdefABCDEF",
                                         t->s[i - 1]) || t->s[i + 1] == '_')))
            return false;
        if (ch != '_')
            ret[n++] = ch;
    }
    ret[n] = '\0';
    return true;
}

static bool text_to_int(struct jctx *c, const struct jstr *s, int64_t base, int64_t *ret)
{
    char b[512], *end;
    if (!clean_number(c, s, b, sizeof b))
        return false;
    const char *p = b + (b[0] == '-' || b[0] == '+');
    static const char kinds[] = "box";
    const char *kind = p[0] == '0' && p[1] != '\0' ? strchr(kinds, p[1] | 32) : NULL;
    static const int bases[] = { 2, 8, 16 };
    if (kind != NULL && *kind != '\0' && (base == 0 || base == bases[kind - kinds])) {
        base = bases[kind - kinds];
        p += 2;
    } else if (base == 0) {
        if (p[0] == '0' && strspn(p, "0") != strlen(p))
            return false;
        base = 10;
    }
    const char first = (char)(p[0] | 32);
    const int d = first >= '0' && first <= '9' ? first - '0'
                  : first >= 'a' && first <= 'z' ? first - 'a' + 10 : 99;
    if (d >= base || (base == 16 && (p[1] | 32) == 'x'))
        return false;
    int64_t v = 0;
    for (; *p != '\0'; p++) {
        const char ch = (char)(*p | 32);
        const int x = *p >= '0' && *p <= '9' ? *p - '0' : ch >= 'a' && ch <= 'z' ? ch - 'a' + 10 : 99;
        if (x >= base)
            return false;
        if (__builtin_mul_overflow(v, base, &v) || __builtin_add_overflow(v, x, &v))
            jfail(c, "an integer has more than 64 bits");
    }
    end = b;
    *ret = *end == '-' ? -v : v;
    return true;
}

static bool text_to_float(struct jctx *c, const struct jstr *s, double *ret)
{
    char b[512], *end;
    if (!clean_number(c, s, b, sizeof b) || strpbrk(b, "xXpP(") != NULL)
        return false;
    *ret = strtod(b, &end);
    return *end == '\0' && end != b;
}

static bool to_float(struct jctx *c, struct jv v, double *ret)
{
    if (v.type == J_UNDEF)
        jfail_undef(c, v);
    if (v.type == J_STR)
        return text_to_float(c, v.s, ret);
    if (!jis_number(v))
        return false;
    *ret = jnumber(v);
    return true;
}

FILTER(f_int)
{
    (void)raw;
    int64_t i;
    double d;
    const int64_t base = int_arg(c, a[1], 10, "base");
    if (jget_int(v, &i))
        return jint(i);
    if (v.type == J_STR && base != 0 && (base < 2 || base > 36))
        i = 0;
    else if (v.type == J_STR && text_to_int(c, v.s, base, &i))
        return jint(i);
    if (!to_float(c, v, &d) || isnan(d))
        return jgiven(a[0]) ? a[0] : jint(0);
    if (!(fabs(d) < 9.2e18))
        jfail(c, isinf(d) ? "cannot convert float infinity to integer"
                          : "an integer has more than 64 bits");
    return jint((int64_t)d);
}

FILTER(f_float)
{
    (void)raw;
    double d;
    if (to_float(c, v, &d))
        return jfloat(d);
    return jgiven(a[0]) ? a[0] : jfloat(0);
}

FILTER(f_abs)
{
    (void)raw, (void)a;
    int64_t i;
    if (v.type == J_FLOAT)
        return jfloat(fabs(v.d));
    if (!jget_int(v, &i))
        jfail(c, "bad operand type for abs(): '%s'", jtype_name(v));
    return i < 0 ? jnegate(c, jint(i), true) : jint(i);
}

/* To even at the half, in tens to the power of -digits. */
static struct jv round_int(struct jctx *c, int64_t i, int64_t digits)
{
    int64_t p = 1;
    if (digits >= 0)
        return jint(i);
    for (; digits < 0 && p <= INT64_MAX / 10; digits++)
        p *= 10;
    if (digits < 0)
        return jint(0);
    int64_t down = i / p * p;
    if (i < down)
        down -= p;
    else if (i % p < 0)
        down -= p;
    const uint64_t rest = (uint64_t)i - (uint64_t)down, half = (uint64_t)p / 2;
    const bool up = rest > half || (rest == half && p > 1 && (down / p) % 2 != 0);
    return up ? jbinary(c, OP_ADD, jint(down), jint(p)) : jint(down);
}

static double round_float(double d, int64_t digits)
{
    char b[400];
    if (digits > 323 || !isfinite(d))
        return d;
    if (digits < -308)
        return copysign(0, d);
    if (digits >= 0) { /* printf rounds the exact value, to even at the half, as Python does */
        snprintf(b, sizeof b, "%.*f", (int)(digits > 60 ? 60 : digits), d);
        return strtod(b, NULL);
    }
    const double p = pow(10, (double)-digits);
    return nearbyint(d / p) * p;
}

FILTER(f_round)
{
    (void)raw;
    int64_t i;
    const int64_t digits = int_arg(c, a[0], 0, "precision");
    const struct jv method = jgiven(a[1]) ? a[1] : jstrz(c, "common");
    const bool common = method.type == J_STR && jstr_is(method.s, "common");
    const bool up = method.type == J_STR && jstr_is(method.s, "ceil");
    if (!common && !up && !(method.type == J_STR && jstr_is(method.s, "floor")))
        jfail(c, "method must be common, ceil or floor");
    if (v.type == J_UNDEF)
        jfail(c, "type Undefined doesn't define __round__ method");
    if (!jis_number(v))
        jfail(c, "type %s doesn't define __round__ method", jtype_name(v));
    if (common)
        return jget_int(v, &i) ? round_int(c, i, digits) : jfloat(round_float(v.d, digits));
    const struct jv p = jbinary(c, OP_POW, jint(10), jint(digits));
    const double x = jnumber(jbinary(c, OP_MUL, v, p));
    return jbinary(c, OP_DIV, jfloat(up ? ceil(x) : floor(x)), p);
}

/* --- anything ---------------------------------------------------------------------------------------- */

FILTER(f_default)
{
    (void)raw;
    if (v.type == J_UNDEF || (jtruth(a[1]) && !jtruth(v)))
        return jgiven(a[0]) ? a[0] : jstrz(c, "");
    return v;
}

/* Like x.name, but never x["name"]. */
FILTER(f_attr)
{
    (void)raw;
    if (a[0].type != J_STR)
        jfail(c, "attribute name must be string, not '%s'", jtype_name(a[0]));
    if (v.type == J_DICT && jmethod_find(v, a[0].s) == NULL)
        return jundef(c, v, a[0]);
    return jattr(c, v, a[0]);
}

static const struct jrow filters[] = {
    { "abs", f_abs, "", 0 },
    { "attr", f_attr, "name", 1 },
    { "capitalize", f_capitalize, "", 0 },
    { "center", f_center, "width", 0 },
    { "count", f_length, "", 0 },
    { "d", f_default, "default_value boolean", 0 },
    { "default", f_default, "default_value boolean", 0 },
    { "e", f_escape, "", 0 },
    { "escape", f_escape, "", 0 },
    { "float", f_float, "default", 0 },
    { "forceescape", f_forceescape, "", 0 },
    { "format", f_format, NULL, 0 },
    { "indent", f_indent, "width first blank", 0 },
    { "int", f_int, "default base", 0 },
    { "length", f_length, "", 0 },
    { "lower", f_lower, "", 0 },
    { "replace", f_replace, "old new count", 2 },
    { "round", f_round, "precision method", 0 },
    { "safe", f_safe, "", 0 },
    { "string", f_string, "", 0 },
    { "title", f_title, "", 0 },
    { "tojson", jtojson, "ensure_ascii indent separators sort_keys", 0 },
    { "trim", f_trim, "chars", 0 },
    { "truncate", f_truncate, "length killwords end leeway", 0 },
    { "upper", f_upper, "", 0 },
    { "urlencode", f_urlencode, "", 0 },
    { "wordcount", f_wordcount, "", 0 },
    { NULL, NULL, NULL, 0 },
};

const struct jrow *jfilter_find(const char *name, size_t len)
{
    const struct jrow *const tables[] = { filters, jfilters_seq };
    for (size_t t = 0; t < 2; t++)
        for (const struct jrow *r = tables[t]; r->name != NULL; r++)
            if (strlen(r->name) == len && memcmp(r->name, name, len) == 0)
                return r;
    return NULL;
}
