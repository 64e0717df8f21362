/* jinja_printf.c - "%s is %d" % (a, b), Python's older way to format. */
#include "engine/jinja_int.h"

#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

struct spec {
    bool minus, plus, space, zero, alt;
    int64_t width, precision; /* precision -1: none */
    char type;
};

struct reader {
    const struct jstr *fmt;
    size_t at;
    struct jspan args; /* for those without a name */
    size_t used;
    struct jv dict;    /* for those with one, or J_MISSING */
};

static struct jv next_arg(struct jctx *c, struct reader *r)
{
    if (r->used == r->args.n)
        jfail(c, "not enough arguments for format string");
    return r->args.v[r->used++];
}

static char look(const struct reader *r)
{
    return r->at < r->fmt->len ? r->fmt->s[r->at] : '\0';
}

static int64_t read_number(struct jctx *c, struct reader *r)
{
    int64_t v = 0;
    if (look(r) == '*') {
        r->at++;
        if (!jget_int(next_arg(c, r), &v))
            jfail(c, "* wants int");
    } else {
        for (; look(r) >= '0' && look(r) <= '9' && v < 1 << 20; r->at++)
            v = 10 * v + look(r) - '0';
    }
    if (v < 0 || v >= 1 << 20)
        jfail(c, "a width or precision is too large");
    return v;
}

static struct spec read_spec(struct jctx *c, struct reader *r)
{
    struct spec s = { .precision = -1 };
    for (;; r->at++) {
        const char ch = look(r);
        s.minus |= ch == '-';
        s.plus |= ch == '+';
        s.space |= ch == ' ';
        s.zero |= ch == '0';
        s.alt |= ch == '#';
        if (ch == '\0' || strchr("-+ 0#", ch) == NULL)
            break;
    }
    s.width = read_number(c, r);
    if (look(r) == '.') {
        r->at++;
        s.precision = read_number(c, r);
    }
    while (look(r) == 'l' || look(r) == 'h' || look(r) == 'L')
        r->at++;
    s.type = look(r);
    if (s.type == '\0')
        jfail(c, "incomplete format");
    r->at++;
    return s;
}

/* Digits with sign, zeros and blanks around them. */
static void put_number(struct jctx *c, struct jout *o, const struct spec *s, bool negative,
                       const char *digits, bool zeros)
{
    const char *sign = negative ? "-" : s->plus ? "+" : s->space ? " " : "";
    int64_t fill = s->width - (int64_t)(strlen(sign) + strlen(digits));
    jcharge(c, fill > 0 ? (size_t)fill : 0);
    for (; !s->minus && !zeros && fill > 0; fill--)
        jout_puts(c, o, " ");
    jout_puts(c, o, sign);
    for (; !s->minus && zeros && fill > 0; fill--)
        jout_puts(c, o, "0");
    jout_puts(c, o, digits);
    for (; fill > 0; fill--)
        jout_puts(c, o, " ");
}

static void put_int(struct jctx *c, struct jout *o, const struct spec *s, struct jv v)
{
    int64_t i = 0;
    const bool decimal = strchr("diu", s->type) != NULL;
    if (decimal && v.type == J_FLOAT && fabs(v.d) < 9e18)
        i = (int64_t)v.d;
    else if (!jget_int(v, &i))
        jfail(c, "%%%c format: %s is required, not %s", s->type,
              decimal ? "a real number" : "an integer", jtype_name(v));
    char b[128], padded[600];
    const uint64_t u = i < 0 ? -(uint64_t)i : (uint64_t)i;
    const char *prefix = !s->alt || decimal ? "" : s->type == 'o' ? "0o" : s->type == 'x' ? "0x" : "0X";
    snprintf(b, sizeof b, s->type == 'x' ? "%" PRIx64 : s->type == 'X' ? "%" PRIX64
                          : s->type == 'o' ? "%" PRIo64 : "%" PRIu64, u);
    if (s->precision > 500)
        jfail(c, "a precision is too large");
    const int zeros = s->precision > (int64_t)strlen(b) ? (int)(s->precision - (int64_t)strlen(b)) : 0;
    snprintf(padded, sizeof padded, "%s%0*d%s", prefix, zeros, 0, b);
    if (zeros == 0)
        snprintf(padded, sizeof padded, "%s%s", prefix, b);
    put_number(c, o, s, i < 0, padded, s->zero && s->precision < 0);
}

static void put_float(struct jctx *c, struct jout *o, const struct spec *s, struct jv v)
{
    char b[1024], f[8];
    if (!jis_number(v))
        jfail(c, "must be real number, not %s", jtype_name(v));
    const double d = jnumber(v);
    const int precision = s->precision < 0 ? 6 : (int)s->precision;
    if (precision > 500)
        jfail(c, "a precision is too large");
    snprintf(f, sizeof f, "%%%s.*%c", s->alt ? "#" : "", s->type);
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wformat-nonliteral"
    snprintf(b, sizeof b, f, precision, fabs(d));
#pragma GCC diagnostic pop
    put_number(c, o, s, signbit(d) && !isnan(d), b, s->zero && !isnan(d) && !isinf(d));
}

static void put_text(struct jctx *c, struct jout *o, const struct spec *s, struct jv v, bool safe)
{
    struct jv t;
    if (s->type == 's') {
        t = safe ? jescape(c, v) : jtostr(c, v);
    } else {
        struct jout r = { 0 };
        jrepr(c, &r, v);
        t = jout_end(c, &r);
        t = safe ? jescape(c, t) : t;
    }
    if (s->precision >= 0 && (size_t)s->precision < t.s->chars)
        t = jstr_part(c, t.s, 0, jchar_at(t.s, (size_t)s->precision));
    const struct jv none = { .type = J_MISSING };
    jout_str(c, o, jpad(c, t.s, s->width, none, s->minus ? -1 : 1).s);
}

static void put_char(struct jctx *c, struct jout *o, const struct spec *s, struct jv v)
{
    int64_t i;
    struct jv t = v;
    if (jget_int(v, &i)) {
        char b[4];
        if (i < 0 || i > 0x10ffff || (i >= 0xd800 && i < 0xe000))
            jfail(c, "%%c arg not in range(0x110000)");
        t = jstrn(c, b, jencode((uint32_t)i, b));
    } else if (v.type != J_STR || v.s->chars != 1) {
        jfail(c, "%%c requires int or char");
    }
    const struct jv none = { .type = J_MISSING };
    jout_str(c, o, jpad(c, t.s, s->width, none, s->minus ? -1 : 1).s);
}

static void put(struct jctx *c, struct jout *o, struct reader *r)
{
    struct jv named = { .type = J_MISSING };
    if (look(r) == '(') {
        const size_t from = ++r->at;
        while (look(r) != ')' && look(r) != '\0')
            r->at++;
        if (!jgiven(r->dict))
            jfail(c, "format requires a mapping");
        if (look(r) == '\0')
            jfail(c, "incomplete format key");
        named = jdict_get(c, r->dict.m, jstr_part(c, r->fmt, from, r->at++));
        if (!jgiven(named))
            jfail(c, "a name in the format is not in the mapping");
    }
    const struct spec s = read_spec(c, r);
    if (s.type == '%') {
        jout_puts(c, o, "%");
        return;
    }
    const struct jv v = jgiven(named) ? named : next_arg(c, r);
    if (strchr("diuxXo", s.type) != NULL)
        put_int(c, o, &s, v);
    else if (strchr("eEfFgG", s.type) != NULL)
        put_float(c, o, &s, v);
    else if (strchr("sra", s.type) != NULL && s.type != 'a')
        put_text(c, o, &s, v, r->fmt->safe);
    else if (s.type == 'c')
        put_char(c, o, &s, v);
    else
        jfail(c, "unsupported format character '%c'", s.type);
}

struct jv jprintf(struct jctx *c, const struct jstr *fmt, struct jv args)
{
    struct reader r = { .fmt = fmt, .dict = { .type = J_MISSING } };
    struct jout o = { 0 };
    const bool tuple = args.type == J_SEQ && (args.q->kind == SEQ_TUPLE || args.q->kind == SEQ_GROUP);
    r.args = tuple ? (struct jspan){ args.q->v, args.q->n } : (struct jspan){ &args, 1 };
    if (args.type == J_DICT)
        r.dict = args;
    while (r.at < fmt->len) {
        const char *p = memchr(fmt->s + r.at, '%', fmt->len - r.at);
        const size_t to = p ? (size_t)(p - fmt->s) : fmt->len;
        jout_add(c, &o, fmt->s + r.at, to - r.at);
        r.at = to;
        if (p != NULL) {
            r.at++;
            put(c, &o, &r);
        }
    }
    if (r.used < r.args.n && args.type != J_DICT && !(args.type == J_SEQ && !tuple))
        jfail(c, "not all arguments converted during string formatting");
    return jstr_safe(c, jout_end(c, &o), fmt->safe);
}
