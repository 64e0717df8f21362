/* jinja_method.c - methods of strings, lists and dicts, and the global functions. */
#include "engine/jinja_int.h"

#include <stdio.h>
#include <string.h>
#include <utf8proc.h>

#define METHOD(name) \
    static struct jv name(struct jctx *c, struct jv v, const struct jargs *raw, struct jv *a)
#define UNUSED (void)c, (void)v, (void)raw, (void)a

static const struct jstr *text_arg(struct jctx *c, struct jv v)
{
    if (v.type != J_STR)
        jfail(c, "must be str, not %s", jtype_name(v));
    return v.s;
}

static int64_t int_arg(struct jctx *c, struct jv v, int64_t otherwise)
{
    int64_t i = otherwise;
    if (jgiven(v) && !jget_int(v, &i))
        jfail(c, "'%s' object cannot be interpreted as an integer", jtype_name(v));
    return i;
}

/* --- strings ------------------------------------------------------------------------------------------ */

METHOD(s_upper) { UNUSED; return jcase(c, v.s, CASE_UPPER); }
METHOD(s_lower) { UNUSED; return jcase(c, v.s, CASE_LOWER); }
METHOD(s_title) { UNUSED; return jcase(c, v.s, CASE_TITLE); }
METHOD(s_capitalize) { UNUSED; return jcase(c, v.s, CASE_CAPITAL); }
METHOD(s_swapcase) { UNUSED; return jcase(c, v.s, CASE_SWAP); }
METHOD(s_strip) { UNUSED; return jstrip(c, v.s, a[0], STRIP_LEFT | STRIP_RIGHT); }
METHOD(s_lstrip) { UNUSED; return jstrip(c, v.s, a[0], STRIP_LEFT); }
METHOD(s_rstrip) { UNUSED; return jstrip(c, v.s, a[0], STRIP_RIGHT); }

/* Parts of safe text are safe. */
static struct jv parts(struct jctx *c, struct jv v, struct jv list)
{
    for (size_t i = 0; v.s->safe && i < list.q->n; i++)
        list.q->v[i] = jstr_safe(c, list.q->v[i], true);
    return list;
}

METHOD(s_split) { UNUSED; return parts(c, v, jsplit(c, v.s, a[0], int_arg(c, a[1], -1), false)); }
METHOD(s_rsplit) { UNUSED; return parts(c, v, jsplit(c, v.s, a[0], int_arg(c, a[1], -1), true)); }
METHOD(s_splitlines) { UNUSED; return parts(c, v, jsplitlines(c, v.s, jtruth(a[0]))); }

METHOD(s_center) { UNUSED; return jpad(c, v.s, int_arg(c, a[0], 0), a[1], 0); }
METHOD(s_ljust) { UNUSED; return jpad(c, v.s, int_arg(c, a[0], 0), a[1], -1); }
METHOD(s_rjust) { UNUSED; return jpad(c, v.s, int_arg(c, a[0], 0), a[1], 1); }

METHOD(s_replace)
{
    UNUSED;
    struct jv old = a[0], new = a[1];
    text_arg(c, old);
    text_arg(c, new);
    if (v.s->safe) {
        old = jescape(c, old);
        new = jescape(c, new);
    }
    return jstr_safe(c, jreplace(c, v.s, old.s, new.s, int_arg(c, a[2], -1)), v.s->safe);
}

METHOD(s_zfill)
{
    UNUSED;
    const bool sign = v.s->len > 0 && (v.s->s[0] == '-' || v.s->s[0] == '+');
    const struct jv rest = jstr_part(c, v.s, sign, v.s->len);
    const struct jv digits = jpad(c, rest.s, int_arg(c, a[0], 0) - sign, jstrz(c, "0"), 1);
    return jstr_safe(c, jcat(c, jstr_part(c, v.s, 0, sign).s, digits.s), v.s->safe);
}

METHOD(s_join)
{
    UNUSED;
    const struct jspan s = jiter(c, a[0]);
    struct jout o = { 0 };
    for (size_t i = 0; i < s.n; i++) {
        if (s.v[i].type != J_STR)
            jfail(c, "sequence item %zu: expected str instance, %s found", i, jtype_name(s.v[i]));
        if (i > 0)
            jout_str(c, &o, v.s);
        jout_str(c, &o, v.s->safe ? jescape(c, s.v[i]).s : s.v[i].s);
    }
    return jstr_safe(c, jout_end(c, &o), v.s->safe);
}

/* The part of the string that optional start and end mean, in bytes. */
static struct jspan range_of(struct jctx *c, const struct jstr *s, struct jv from, struct jv to,
                             size_t *ret_from, size_t *ret_to)
{
    const int64_t n = (int64_t)s->chars;
    int64_t f = from.type == J_NONE ? 0 : int_arg(c, from, 0);
    int64_t t = to.type == J_NONE ? n : int_arg(c, to, n);
    f = f < 0 ? (f < -n ? 0 : f + n) : f;
    t = t < 0 ? (t < -n ? 0 : t + n) : t > n ? n : t;
    *ret_from = f > n ? SIZE_MAX : jchar_at(s, (size_t)f);
    *ret_to = jchar_at(s, (size_t)t);
    return (struct jspan){ NULL, 0 };
}

static bool affix(struct jctx *c, const struct jstr *s, struct jv what, size_t from, size_t to,
                  bool end)
{
    const struct jstr *w = text_arg(c, what);
    if (from > to || w->len > to - from)
        return false;
    return w->len == 0 || memcmp(end ? s->s + to - w->len : s->s + from, w->s, w->len) == 0;
}

static struct jv affixes(struct jctx *c, const struct jstr *s, struct jv *a, bool end)
{
    size_t from, to;
    range_of(c, s, a[1], a[2], &from, &to);
    if (a[0].type != J_SEQ || (a[0].q->kind != SEQ_TUPLE && a[0].q->kind != SEQ_GROUP))
        return jbool(affix(c, s, a[0], from, to, end));
    for (size_t i = 0; i < a[0].q->n; i++)
        if (affix(c, s, a[0].q->v[i], from, to, end))
            return jbool(true);
    return jbool(false);
}

METHOD(s_startswith) { UNUSED; return affixes(c, v.s, a, false); }
METHOD(s_endswith) { UNUSED; return affixes(c, v.s, a, true); }

/* Code points before byte `at`. */
static int64_t chars_before(struct jctx *c, const struct jstr *s, size_t at)
{
    return (int64_t)jstr_part(c, s, 0, at).s->chars;
}

static int64_t find(struct jctx *c, const struct jstr *s, struct jv *a, bool last)
{
    size_t from, to, found = SIZE_MAX;
    const struct jstr *what = text_arg(c, a[0]);
    range_of(c, s, a[1], a[2], &from, &to);
    if (from > to)
        return -1;
    const struct jstr *part = jstr_part(c, s, from, to).s;
    if (!last) {
        found = jfind(c, part, what, 0);
    } else if (what->len <= part->len) {
        jcharge(c, part->len);
        found = part->len - what->len;
        while (found != SIZE_MAX && what->len > 0 &&
               memcmp(part->s + found, what->s, what->len) != 0)
            found--; /* ends at SIZE_MAX */
    }
    return found == SIZE_MAX ? -1 : chars_before(c, s, from + found);
}

METHOD(s_find) { UNUSED; return jint(find(c, v.s, a, false)); }
METHOD(s_rfind) { UNUSED; return jint(find(c, v.s, a, true)); }

static struct jv index_or_fail(struct jctx *c, int64_t at)
{
    if (at < 0)
        jfail(c, "substring not found");
    return jint(at);
}

METHOD(s_index) { UNUSED; return index_or_fail(c, find(c, v.s, a, false)); }
METHOD(s_rindex) { UNUSED; return index_or_fail(c, find(c, v.s, a, true)); }

METHOD(s_count)
{
    UNUSED;
    size_t from, to;
    const struct jstr *what = text_arg(c, a[0]);
    range_of(c, v.s, a[1], a[2], &from, &to);
    if (from > to)
        return jint(0);
    const struct jstr *part = jstr_part(c, v.s, from, to).s;
    int64_t n = 0;
    if (what->len == 0)
        return jint((int64_t)part->chars + 1);
    for (size_t at = 0; (at = jfind(c, part, what, at)) != SIZE_MAX; at += what->len)
        n++;
    return jint(n);
}

METHOD(s_removeprefix)
{
    UNUSED;
    const bool has = affix(c, v.s, a[0], 0, v.s->len, false);
    return jstr_safe(c, jstr_part(c, v.s, has ? a[0].s->len : 0, v.s->len), v.s->safe);
}

METHOD(s_removesuffix)
{
    UNUSED;
    const bool has = affix(c, v.s, a[0], 0, v.s->len, true);
    return jstr_safe(c, jstr_part(c, v.s, 0, v.s->len - (has ? a[0].s->len : 0)), v.s->safe);
}

static struct jv partition(struct jctx *c, const struct jstr *s, struct jv sep, bool last)
{
    struct jv args[3] = { sep, jnone(), jnone() };
    struct jseq *q = jseq_new(c, SEQ_TUPLE, 3);
    if (text_arg(c, sep)->len == 0)
        jfail(c, "empty separator");
    const int64_t at = find(c, s, args, last);
    const struct jv all = jstr_part(c, s, 0, s->len), empty = jstrz(c, "");
    if (at < 0) {
        jseq_add(c, q, last ? empty : all);
        jseq_add(c, q, empty);
        jseq_add(c, q, last ? all : empty);
        return jseqv(q);
    }
    const size_t b = jchar_at(s, (size_t)at);
    jseq_add(c, q, jstr_part(c, s, 0, b));
    jseq_add(c, q, sep);
    jseq_add(c, q, jstr_part(c, s, b + sep.s->len, s->len));
    return jseqv(q);
}

METHOD(s_partition) { UNUSED; return parts(c, v, partition(c, v.s, a[0], false)); }
METHOD(s_rpartition) { UNUSED; return parts(c, v, partition(c, v.s, a[0], true)); }

/* --- what all characters of a string are --------------------------------------------------------------- */

static bool is_decimal(uint32_t cp)
{
    return utf8proc_category((utf8proc_int32_t)cp) == UTF8PROC_CATEGORY_ND;
}

static bool is_digit(uint32_t cp)
{
    return is_decimal(cp) || cp == 0xb2 || cp == 0xb3 || cp == 0xb9 || cp == 0x2070 ||
           (cp >= 0x2074 && cp <= 0x2079) || (cp >= 0x2080 && cp <= 0x2089);
}

static bool is_numeric(uint32_t cp)
{
    const utf8proc_category_t k = utf8proc_category((utf8proc_int32_t)cp);
    return k >= UTF8PROC_CATEGORY_ND && k <= UTF8PROC_CATEGORY_NO;
}

static bool is_alnum(uint32_t cp) { return jletter(cp) || is_numeric(cp); }
static bool is_ascii(uint32_t cp) { return cp < 0x80; }

static struct jv all(struct jctx *c, const struct jstr *s, bool (*is)(uint32_t), bool empty)
{
    jcharge(c, s->len / 16);
    for (size_t at = 0; at < s->len;) {
        uint32_t cp;
        at += jdecode(s->s + at, &cp);
        if (!is(cp))
            return jbool(false);
    }
    return jbool(s->len > 0 || empty);
}

METHOD(s_isdigit) { UNUSED; return all(c, v.s, is_digit, false); }
METHOD(s_isdecimal) { UNUSED; return all(c, v.s, is_decimal, false); }
METHOD(s_isnumeric) { UNUSED; return all(c, v.s, is_numeric, false); }
METHOD(s_isalpha) { UNUSED; return all(c, v.s, jletter, false); }
METHOD(s_isalnum) { UNUSED; return all(c, v.s, is_alnum, false); }
METHOD(s_isspace) { UNUSED; return all(c, v.s, jspace, false); }
METHOD(s_isascii) { UNUSED; return all(c, v.s, is_ascii, true); }
METHOD(s_isupper) { UNUSED; return jrow_run(c, jtest_find("upper", 5), v, raw); }
METHOD(s_islower) { UNUSED; return jrow_run(c, jtest_find("lower", 5), v, raw); }

static const struct jrow str_methods[] = {
    { "capitalize", s_capitalize, "", 0 },
    { "center", s_center, "width fillchar", 1 },
    { "count", s_count, "sub start end", 1 },
    { "endswith", s_endswith, "suffix start end", 1 },
    { "find", s_find, "sub start end", 1 },
    { "index", s_index, "sub start end", 1 },
    { "isalnum", s_isalnum, "", 0 },
    { "isalpha", s_isalpha, "", 0 },
    { "isascii", s_isascii, "", 0 },
    { "isdecimal", s_isdecimal, "", 0 },
    { "isdigit", s_isdigit, "", 0 },
    { "islower", s_islower, "", 0 },
    { "isnumeric", s_isnumeric, "", 0 },
    { "isspace", s_isspace, "", 0 },
    { "isupper", s_isupper, "", 0 },
    { "join", s_join, "iterable", 1 },
    { "ljust", s_ljust, "width fillchar", 1 },
    { "lower", s_lower, "", 0 },
    { "lstrip", s_lstrip, "chars", 0 },
    { "partition", s_partition, "sep", 1 },
    { "removeprefix", s_removeprefix, "prefix", 1 },
    { "removesuffix", s_removesuffix, "suffix", 1 },
    { "replace", s_replace, "old new count", 2 },
    { "rfind", s_rfind, "sub start end", 1 },
    { "rindex", s_rindex, "sub start end", 1 },
    { "rjust", s_rjust, "width fillchar", 1 },
    { "rpartition", s_rpartition, "sep", 1 },
    { "rsplit", s_rsplit, "sep maxsplit", 0 },
    { "rstrip", s_rstrip, "chars", 0 },
    { "split", s_split, "sep maxsplit", 0 },
    { "splitlines", s_splitlines, "keepends", 0 },
    { "startswith", s_startswith, "prefix start end", 1 },
    { "strip", s_strip, "chars", 0 },
    { "swapcase", s_swapcase, "", 0 },
    { "title", s_title, "", 0 },
    { "upper", s_upper, "", 0 },
    { "zfill", s_zfill, "width", 1 },
    { NULL, NULL, NULL, 0 },
};

/* --- lists and dicts ----------------------------------------------------------------------------------- */

METHOD(l_index)
{
    UNUSED;
    const int64_t n = (int64_t)v.q->n;
    int64_t from = int_arg(c, a[1], 0), to = int_arg(c, a[2], n);
    from = from < 0 ? (from < -n ? 0 : from + n) : from;
    to = to < 0 ? to + n : to > n ? n : to;
    for (int64_t i = from; i < to; i++)
        if (jeq(c, v.q->v[i], a[0]))
            return jint(i);
    jfail(c, "the value is not in the %s", jtype_name(v));
}

METHOD(l_count)
{
    UNUSED;
    int64_t n = 0;
    for (size_t i = 0; i < v.q->n; i++)
        n += jeq(c, v.q->v[i], a[0]);
    return jint(n);
}

METHOD(l_copy)
{
    UNUSED;
    struct jseq *q = jseq_new(c, SEQ_LIST, v.q->n);
    for (size_t i = 0; i < v.q->n; i++)
        jseq_add(c, q, v.q->v[i]);
    return jseqv(q);
}

static const struct jrow list_methods[] = {
    { "index", l_index, "value start stop", 1 },
    { "count", l_count, "value", 1 },
    { "copy", l_copy, "", 0 },
    { NULL, NULL, NULL, 0 },
};

METHOD(d_keys)
{
    UNUSED;
    struct jseq *q = jseq_new(c, SEQ_KEYS, v.m->n);
    for (size_t i = 0; i < v.m->n; i++)
        jseq_add(c, q, v.m->e[i].key);
    return jseqv(q);
}

METHOD(d_values)
{
    UNUSED;
    struct jseq *q = jseq_new(c, SEQ_VALUES, v.m->n);
    for (size_t i = 0; i < v.m->n; i++)
        jseq_add(c, q, v.m->e[i].value);
    return jseqv(q);
}

METHOD(d_items)
{
    UNUSED;
    struct jseq *q = jseq_new(c, SEQ_ITEMS, v.m->n);
    for (size_t i = 0; i < v.m->n; i++) {
        struct jseq *pair = jseq_new(c, SEQ_TUPLE, 2);
        jseq_add(c, pair, v.m->e[i].key);
        jseq_add(c, pair, v.m->e[i].value);
        jseq_add(c, q, jseqv(pair));
    }
    return jseqv(q);
}

METHOD(d_get)
{
    UNUSED;
    const struct jv r = jdict_get(c, v.m, a[0]);
    return jgiven(r) ? r : jgiven(a[1]) ? a[1] : jnone();
}

METHOD(d_copy)
{
    UNUSED;
    struct jdict *m = jdict_new(c);
    for (size_t i = 0; i < v.m->n; i++)
        jdict_set(c, m, v.m->e[i].key, v.m->e[i].value);
    return jdictv(m);
}

static const struct jrow dict_methods[] = {
    { "items", d_items, "", 0 },
    { "keys", d_keys, "", 0 },
    { "values", d_values, "", 0 },
    { "get", d_get, "key default", 1 },
    { "copy", d_copy, "", 0 },
    { NULL, NULL, NULL, 0 },
};

static const struct jrow *find_row(const struct jrow *r, const struct jstr *name)
{
    for (; r->name != NULL; r++)
        if (jstr_is(name, r->name))
            return r;
    return NULL;
}

const struct jrow *jmethod_find(struct jv self, const struct jstr *name)
{
    if (self.type == J_STR)
        return find_row(str_methods, name);
    if (self.type == J_DICT)
        return find_row(dict_methods, name);
    if (self.type != J_SEQ || self.q->kind > SEQ_RANGE)
        return NULL;
    const struct jrow *r = find_row(list_methods, name);
    return r != NULL && r->run == l_copy && self.q->kind != SEQ_LIST ? NULL : r;
}

bool jmethod_unsafe(struct jv self, const struct jstr *name)
{
    static const char *const list[] = { "append", "clear", "extend", "insert", "pop", "remove",
                                        "reverse", "sort", NULL };
    static const char *const dict[] = { "clear", "pop", "popitem", "setdefault", "update", NULL };
    const char *const *names = self.type == J_DICT ? dict
                               : self.type == J_SEQ && self.q->kind == SEQ_LIST ? list : NULL;
    for (; names != NULL && *names != NULL; names++)
        if (jstr_is(name, *names))
            return true;
    return false;
}

/* --- global functions ---------------------------------------------------------------------------------- */

enum { RANGE_MAX = 100000 }; /* the sandbox's own limit */

METHOD(g_range)
{
    UNUSED;
    int64_t from = int_arg(c, a[0], 0), to = from, step = int_arg(c, a[2], 1), n = 0;
    enum { FAR = 1 << 30 }; /* so that arithmetic with a range's numbers cannot overflow */
    if (jgiven(a[1]))
        to = int_arg(c, a[1], 0);
    else
        from = 0;
    if (step == 0)
        jfail(c, "range() arg 3 must not be zero");
    if (from > FAR || from < -FAR || to > FAR || to < -FAR || step > FAR || step < -FAR)
        jfail(c, "range() takes numbers of at most %d here", FAR);
    struct jseq *q = jseq_new(c, SEQ_RANGE, 0);
    q->start = from;
    q->stop = to;
    q->step = step;
    for (int64_t i = from; step > 0 ? i < to : i > to;) {
        if (++n > RANGE_MAX)
            jfail(c, "Range too big. The sandbox blocks ranges larger than MAX_RANGE (%d).",
                  RANGE_MAX);
        jseq_add(c, q, jint(i));
        if (__builtin_add_overflow(i, step, &i))
            break;
    }
    return jseqv(q);
}

/* dict(other, key=value), dict([(key, value)]) */
METHOD(g_dict)
{
    UNUSED;
    struct jdict *m = jdict_new(c);
    if (raw->npos > 1)
        jfail(c, "dict expected at most 1 argument, got %zu", raw->npos);
    if (raw->npos == 1 && (raw->pos[0].type == J_DICT || raw->pos[0].type == J_SPACE)) {
        const struct jdict *o = raw->pos[0].m;
        for (size_t i = 0; i < o->n; i++)
            jdict_set(c, m, o->e[i].key, o->e[i].value);
    } else if (raw->npos == 1) {
        const struct jspan s = jiter(c, raw->pos[0]);
        for (size_t i = 0; i < s.n; i++) {
            const struct jspan pair = jiter(c, s.v[i]);
            if (pair.n != 2)
                jfail(c, "dictionary update sequence element #%zu has length %zu; 2 is required", i,
                      pair.n);
            jdict_set(c, m, pair.v[0], pair.v[1]);
        }
    }
    for (size_t i = 0; i < raw->nkw; i++)
        jdict_set(c, m, raw->kw[i].name, raw->kw[i].value);
    return jdictv(m);
}

METHOD(g_namespace)
{
    struct jv m = g_dict(c, v, raw, a);
    m.type = J_SPACE;
    return m;
}

METHOD(g_raise)
{
    UNUSED;
    const struct jstr *s = jtostr(c, a[0]).s;
    jfail_plain(c, ERR_INVALID, "template_exception", "%.*s", s->len < 500 ? (int)s->len : 500, s->s);
}

METHOD(g_strftime)
{
    UNUSED;
    char b[512];
    struct tm tm;
    const char *fmt = jstr_z(c, text_arg(c, a[0]));
    if (localtime_r(&c->now, &tm) == NULL)
        jfail(c, "the clock is out of range");
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wformat-nonliteral"
    const size_t n = strftime(b, sizeof b, fmt, &tm);
#pragma GCC diagnostic pop
    if (n == 0 && fmt[0] != '\0')
        jfail(c, "strftime_now(): the date in this format is too long or empty");
    return jstrn(c, b, n);
}

struct jv jglobal(const struct jstr *name)
{
    static const struct jrow functions[] = {
        { "range", g_range, "start stop step", 1 },
        { "dict", g_dict, NULL, 0 },
        { "namespace", g_namespace, NULL, 0 },
        { "raise_exception", g_raise, "message", 1 },
        { "strftime_now", g_strftime, "format", 1 },
        { NULL, NULL, NULL, 0 },
    };
    const struct jrow *r = find_row(functions, name);
    return r ? (struct jv){ .type = J_FUNC, .func = r } : (struct jv){ .type = J_MISSING };
}
