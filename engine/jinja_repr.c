/* jinja_repr.c - values as text: Python's str() and repr(), and JSON as json.dumps() writes it. */
#include "engine/jinja_int.h"

#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* --- numbers -------------------------------------------------------------------------------------- */

/* The shortest digits that read back as the same number; an exponent from 1e16 on and below 1e-4. */
void jfloat_text(double d, char ret[32])
{
    char e[32];
    if (isnan(d) || isinf(d)) {
        snprintf(ret, 32, "%s", isnan(d) ? "nan" : d < 0 ? "-inf" : "inf");
        return;
    }
    int digits = 1;
    do
        snprintf(e, sizeof e, "%.*e", digits - 1, d);
    while (strtod(e, NULL) != d && digits++ < 17);
    const int exp = atoi(strchr(e, 'e') + 1);
    if (exp >= 16 || exp < -4) {
        snprintf(ret, 32, "%.*e", digits - 1, d); /* at least two digits of exponent, as Python */
        return;
    }
    const int places = digits - 1 - exp;
    snprintf(ret, 32, "%.*f", places > 1 ? places : 1, d);
}

/* --- repr ------------------------------------------------------------------------------------------ */

static void repr_str(struct jctx *c, struct jout *o, const struct jstr *s)
{
    const bool single = s->len > 0 && memchr(s->s, '\'', s->len) != NULL;
    const bool both = single && memchr(s->s, '"', s->len) != NULL;
    const char quote = single && !both ? '"' : '\'';
    if (s->safe)
        jout_puts(c, o, "Markup(");
    jout_add(c, o, &quote, 1);
    jcharge(c, s->len / 16);
    for (size_t at = 0; at < s->len;) {
        uint32_t cp;
        char esc[16] = "";
        const size_t n = jdecode(s->s + at, &cp);
        if (cp == '\\' || cp == (unsigned char)quote)
            snprintf(esc, sizeof esc, "\\%c", (char)cp);
        else if (cp == '\n' || cp == '\r' || cp == '\t')
            snprintf(esc, sizeof esc, "\\%c", cp == '\n' ? 'n' : cp == '\r' ? 'r' : 't');
        else if (!jprintable(cp))
            snprintf(esc, sizeof esc, cp < 0x100 ? "\\x%02x" : cp < 0x10000 ? "\\u%04x" : "\\U%08x",
                     cp);
        if (esc[0] != '\0')
            jout_puts(c, o, esc);
        else
            jout_add(c, o, s->s + at, n);
        at += n;
    }
    jout_add(c, o, &quote, 1);
    if (s->safe)
        jout_puts(c, o, ")");
}

static void repr_seq(struct jctx *c, struct jout *o, const struct jseq *q)
{
    static const char *const before[] = { "[", "(", "(", "", "dict_keys([", "dict_values([",
                                          "dict_items([" };
    static const char *const after[] = { "]", ")", ")", "", "])", "])", "])" };
    char b[96];
    if (q->kind == SEQ_GEN)
        jfail(c, "a generator has no text: use the filter list, join or first");
    if (q->kind == SEQ_RANGE) {
        snprintf(b, sizeof b, "range(%" PRId64 ", %" PRId64 "%s", q->start, q->stop,
                 q->step == 1 ? ")" : "");
        jout_puts(c, o, b);
        snprintf(b, sizeof b, ", %" PRId64 ")", q->step);
        if (q->step != 1)
            jout_puts(c, o, b);
        return;
    }
    jout_puts(c, o, before[q->kind]);
    for (size_t i = 0; i < q->n; i++) {
        if (i > 0)
            jout_puts(c, o, ", ");
        jrepr(c, o, q->v[i]);
    }
    if (q->n == 1 && (q->kind == SEQ_TUPLE || q->kind == SEQ_GROUP))
        jout_puts(c, o, ",");
    jout_puts(c, o, after[q->kind]);
}

static void repr_dict(struct jctx *c, struct jout *o, const struct jdict *m)
{
    jout_puts(c, o, "{");
    for (size_t i = 0; i < m->n; i++) {
        if (i > 0)
            jout_puts(c, o, ", ");
        jrepr(c, o, m->e[i].key);
        jout_puts(c, o, ": ");
        jrepr(c, o, m->e[i].value);
    }
    jout_puts(c, o, "}");
}

static void repr_macro(struct jctx *c, struct jout *o, const struct jmacro *m)
{
    jout_puts(c, o, m->def->name ? "<Macro " : "<Macro anonymous>");
    if (m->def->name == NULL)
        return;
    repr_str(c, o, m->def->name->s);
    jout_puts(c, o, ">");
}

void jrepr(struct jctx *c, struct jout *o, struct jv v)
{
    char b[48];
    jenter(c);
    switch (v.type) {
    case J_UNDEF: jout_puts(c, o, "Undefined"); break;
    case J_NONE: jout_puts(c, o, "None"); break;
    case J_BOOL: jout_puts(c, o, v.b ? "True" : "False"); break;
    case J_INT:
        snprintf(b, sizeof b, "%" PRId64, v.i);
        jout_puts(c, o, b);
        break;
    case J_FLOAT:
        jfloat_text(v.d, b);
        jout_puts(c, o, b);
        break;
    case J_STR: repr_str(c, o, v.s); break;
    case J_SEQ: repr_seq(c, o, v.q); break;
    case J_DICT: repr_dict(c, o, v.m); break;
    case J_SPACE:
        jout_puts(c, o, "<Namespace ");
        repr_dict(c, o, v.m);
        jout_puts(c, o, ">");
        break;
    case J_MACRO: repr_macro(c, o, v.macro); break;
    case J_LOOP: {
        const struct jstr index = { "index", 5, 5, false }, length = { "length", 6, 6, false };
        snprintf(b, sizeof b, "<LoopContext %" PRId64 "/", jloop_attr(c, v.loop, &index).i);
        jout_puts(c, o, b);
        snprintf(b, sizeof b, "%" PRId64 ">", jloop_attr(c, v.loop, &length).i);
        jout_puts(c, o, b);
        break;
    }
    default: jfail(c, "a %s has no text", jtype_name(v));
    }
    jleave(c);
}

void jprint(struct jctx *c, struct jout *o, struct jv v)
{
    if (v.type == J_STR)
        jout_str(c, o, v.s);
    else if (v.type != J_UNDEF)
        jrepr(c, o, v);
}

struct jv jsoft(struct jctx *c, struct jv v)
{
    if (v.type == J_STR)
        return v;
    struct jout o = { 0 };
    jprint(c, &o, v);
    return jout_end(c, &o);
}

struct jv jtostr(struct jctx *c, struct jv v)
{
    return jstr_safe(c, jsoft(c, v), false);
}

/* --- JSON ------------------------------------------------------------------------------------------ */

struct json_form {
    const struct jstr *indent; /* NULL: on one line */
    const struct jstr *item, *key;
    bool ascii, sorted;
};

static void json_str(struct jctx *c, struct jout *o, const struct jstr *s, bool ascii)
{
    static const char from[] = "\"\\\n\r\t\b\f", to[] = "\"\\nrtbf";
    jout_puts(c, o, "\"");
    jcharge(c, s->len / 16);
    for (size_t at = 0; at < s->len;) {
        uint32_t cp;
        char esc[16] = "";
        const size_t n = jdecode(s->s + at, &cp);
        const char *p = cp != 0 && cp < 0x80 ? strchr(from, (int)cp) : NULL;
        if (p != NULL)
            snprintf(esc, sizeof esc, "\\%c", to[p - from]);
        else if (cp < 0x20 || (ascii && cp > 0x7e && cp < 0x10000))
            snprintf(esc, sizeof esc, "\\u%04x", cp);
        else if (ascii && cp >= 0x10000)
            snprintf(esc, sizeof esc, "\\u%04x\\u%04x", 0xd800 + ((cp - 0x10000) >> 10),
                     0xdc00 + ((cp - 0x10000) & 0x3ff));
        if (esc[0] != '\0')
            jout_puts(c, o, esc);
        else
            jout_add(c, o, s->s + at, n);
        at += n;
    }
    jout_puts(c, o, "\"");
}

static void json_scalar(struct jctx *c, struct jout *o, struct jv v)
{
    if (v.type == J_NONE)
        jout_puts(c, o, "null");
    else if (v.type == J_BOOL)
        jout_puts(c, o, v.b ? "true" : "false");
    else if (v.type == J_FLOAT && (isnan(v.d) || isinf(v.d)))
        jout_puts(c, o, isnan(v.d) ? "NaN" : v.d < 0 ? "-Infinity" : "Infinity");
    else
        jrepr(c, o, v);
}

static void json_break(struct jctx *c, struct jout *o, const struct json_form *f, int level)
{
    if (f->indent == NULL)
        return;
    jout_puts(c, o, "\n");
    for (int i = 0; i < level; i++)
        jout_str(c, o, f->indent);
}

static void json_value(struct jctx *c, struct jout *o, struct jv v, const struct json_form *f,
                       int level);

static void json_key(struct jctx *c, struct jout *o, struct jv k, const struct json_form *f)
{
    if (k.type == J_STR) {
        json_str(c, o, k.s, f->ascii);
        return;
    }
    if (k.type != J_NONE && !jis_number(k))
        jfail(c, "keys must be str, int, float, bool or None, not %s", jtype_name(k));
    jout_puts(c, o, "\"");
    json_scalar(c, o, k);
    jout_puts(c, o, "\"");
}

static void json_dict(struct jctx *c, struct jout *o, const struct jdict *m,
                      const struct json_form *f, int level)
{
    struct jv *k = jalloc(c, m->n, sizeof *k), *v = jalloc(c, m->n, sizeof *v);
    for (size_t i = 0; i < m->n; i++) {
        k[i] = m->e[i].key;
        v[i] = m->e[i].value;
    }
    if (f->sorted)
        jsort(c, k, v, m->n, false);
    jout_puts(c, o, "{");
    for (size_t i = 0; i < m->n; i++) {
        if (i > 0)
            jout_str(c, o, f->item);
        json_break(c, o, f, level + 1);
        json_key(c, o, k[i], f);
        jout_str(c, o, f->key);
        json_value(c, o, v[i], f, level + 1);
    }
    if (m->n > 0)
        json_break(c, o, f, level);
    jout_puts(c, o, "}");
}

static void json_value(struct jctx *c, struct jout *o, struct jv v, const struct json_form *f,
                       int level)
{
    jenter(c);
    if (v.type == J_STR) {
        json_str(c, o, v.s, f->ascii);
    } else if (v.type == J_NONE || jis_number(v)) {
        json_scalar(c, o, v);
    } else if (v.type == J_DICT) {
        json_dict(c, o, v.m, f, level);
    } else if (v.type == J_SEQ && v.q->kind <= SEQ_GROUP) {
        jout_puts(c, o, "[");
        for (size_t i = 0; i < v.q->n; i++) {
            if (i > 0)
                jout_str(c, o, f->item);
            json_break(c, o, f, level + 1);
            json_value(c, o, v.q->v[i], f, level + 1);
        }
        if (v.q->n > 0)
            json_break(c, o, f, level);
        jout_puts(c, o, "]");
    } else {
        jfail(c, "Object of type %s is not JSON serializable", jtype_name(v));
    }
    jleave(c);
}

/* tojson(ensure_ascii=False, indent=None, separators=None, sort_keys=False), as transformers has it
 * and unlike Jinja's own, which escapes for HTML. */
struct jv jtojson(struct jctx *c, struct jv self, const struct jargs *raw, struct jv *a)
{
    (void)raw;
    struct json_form f = { .ascii = jtruth(a[0]), .sorted = jtruth(a[3]) };
    int64_t n;
    if (a[1].type == J_STR) {
        f.indent = a[1].s;
    } else if (jget_int(a[1], &n)) {
        const struct jstr space = { " ", 1, 1, false };
        f.indent = jbinary(c, OP_MUL, (struct jv){ .type = J_STR, .s = &space }, jint(n)).s;
    } else if (jgiven(a[1]) && a[1].type != J_NONE) {
        jfail(c, "tojson: indent must be a number, not %s", jtype_name(a[1]));
    }
    f.item = jstrz(c, f.indent ? "," : ", ").s;
    f.key = jstrz(c, ": ").s;
    if (jgiven(a[2]) && a[2].type != J_NONE) {
        if (a[2].type != J_SEQ || a[2].q->n != 2 || a[2].q->v[0].type != J_STR ||
            a[2].q->v[1].type != J_STR)
            jfail(c, "tojson: separators must be two strings");
        f.item = a[2].q->v[0].s;
        f.key = a[2].q->v[1].s;
    }
    struct jout o = { 0 };
    json_value(c, &o, self, &f, 0);
    return jout_end(c, &o);
}
