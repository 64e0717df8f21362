/* jinja_filter_seq.c - filters over sequences and mappings.
 *
 * Where Python gives a generator, so do we: it has no length and no text, and is used up by the first
 * that walks it.  Its items are made at once, though, so an error in one shows even if nobody gets
 * that far. */
#include "engine/jinja_int.h"

#include <string.h>

#define FILTER(name) \
    static struct jv name(struct jctx *c, struct jv v, const struct jargs *raw, struct jv *a)

static const struct jv missing = { .type = J_MISSING };

/* --- attributes by path: "a.b.0" ----------------------------------------------------------------------- */

static bool all_digits(const struct jstr *s)
{
    for (size_t i = 0; i < s->len; i++)
        if (s->s[i] < '0' || s->s[i] > '9')
            return false;
    return s->len > 0 && s->len < 18;
}

static struct jv follow(struct jctx *c, struct jv item, struct jv path, struct jv otherwise)
{
    if (path.type == J_NONE || !jgiven(path))
        return item;
    const bool text = path.type == J_STR;
    const struct jv parts = text ? jsplit(c, path.s, jstrz(c, "."), -1, false) : missing;
    for (size_t i = 0; i < (text ? parts.q->n : 1); i++) {
        struct jv key = text ? parts.q->v[i] : path;
        if (key.type == J_STR && all_digits(key.s)) {
            int64_t n = 0;
            for (size_t k = 0; k < key.s->len; k++)
                n = 10 * n + key.s->s[k] - '0';
            key = jint(n);
        }
        item = jitem(c, item, key);
        if (item.type == J_UNDEF && jgiven(otherwise) && otherwise.type != J_NONE)
            item = otherwise;
    }
    return item;
}

static struct jv fold_case(struct jctx *c, struct jv v, struct jv case_sensitive)
{
    return v.type == J_STR && !jtruth(case_sensitive) ? jcase(c, v.s, CASE_LOWER) : v;
}

/* --- one of them ------------------------------------------------------------------------------------- */

FILTER(f_first)
{
    (void)raw, (void)a;
    if (jis_gen(v)) {
        if (v.q->n == 0)
            return jundef_hint(c, "No first item, sequence was empty.");
        v.q->n--;
        v.q->cap = v.q->n;
        return *v.q->v++;
    }
    const struct jspan s = jiter(c, v);
    return s.n > 0 ? s.v[0] : jundef_hint(c, "No first item, sequence was empty.");
}

FILTER(f_last)
{
    (void)raw, (void)a;
    if (jis_gen(v) || !jiterable(v))
        jfail(c, "'%s' object is not reversible", jtype_name(v));
    const struct jspan s = jiter(c, v);
    return s.n > 0 ? s.v[s.n - 1] : jundef_hint(c, "No last item, sequence was empty.");
}

static struct jv extreme(struct jctx *c, struct jv v, struct jv *a, bool most)
{
    const struct jspan s = jiter(c, v);
    if (s.n == 0)
        return jundef_hint(c, "No aggregated item, sequence was empty.");
    size_t best = 0;
    struct jv key = fold_case(c, follow(c, s.v[0], a[1], missing), a[0]);
    for (size_t i = 1; i < s.n; i++) {
        const struct jv k = fold_case(c, follow(c, s.v[i], a[1], missing), a[0]);
        if (jrelation(c, most ? OP_GT : OP_LT, k, key)) {
            best = i;
            key = k;
        }
    }
    return s.v[best];
}

FILTER(f_min) { (void)raw; return extreme(c, v, a, false); }
FILTER(f_max) { (void)raw; return extreme(c, v, a, true); }

FILTER(f_sum)
{
    (void)raw;
    const struct jspan s = jiter(c, v);
    struct jv r = jgiven(a[1]) ? a[1] : jint(0);
    if (r.type == J_STR)
        jfail(c, "sum() can't sum strings [use ''.join(seq) instead]");
    for (size_t i = 0; i < s.n; i++)
        r = jbinary(c, OP_ADD, r, follow(c, s.v[i], a[0], missing));
    return r;
}

FILTER(f_join)
{
    (void)raw;
    const struct jspan s = jiter(c, v);
    const struct jstr *between = jgiven(a[0]) ? jtostr(c, a[0]).s : NULL;
    struct jout o = { 0 };
    for (size_t i = 0; i < s.n; i++) {
        if (i > 0 && between != NULL)
            jout_str(c, &o, between);
        jprint(c, &o, follow(c, s.v[i], a[1], missing));
    }
    return jout_end(c, &o);
}

/* --- all of them, in another order or shape ------------------------------------------------------------ */

static struct jseq *list_of(struct jctx *c, struct jspan s, enum jseq_kind kind)
{
    struct jseq *q = jseq_new(c, kind, s.n);
    for (size_t i = 0; i < s.n; i++)
        jseq_add(c, q, s.v[i]);
    return q;
}

FILTER(f_list) { (void)raw, (void)a; return jseqv(list_of(c, jiter(c, v), SEQ_LIST)); }

FILTER(f_reverse)
{
    (void)raw, (void)a;
    if (v.type == J_STR)
        return jslice(c, v, jnone(), jnone(), jint(-1));
    if (!jiterable(v))
        jfail(c, "argument must be iterable");
    const bool gen = jis_gen(v);
    struct jseq *q = list_of(c, jiter(c, v), gen ? SEQ_LIST : SEQ_GEN);
    for (size_t i = 0; i < q->n / 2; i++) {
        const struct jv t = q->v[i];
        q->v[i] = q->v[q->n - 1 - i];
        q->v[q->n - 1 - i] = t;
    }
    return jseqv(q);
}

/* Keys of "a,b" are lists, compared item by item. */
static struct jv sort_key(struct jctx *c, struct jv item, struct jv path, struct jv case_sensitive)
{
    struct jseq *q = jseq_new(c, SEQ_LIST, 1);
    if (path.type != J_STR) {
        jseq_add(c, q, fold_case(c, follow(c, item, path, missing), case_sensitive));
        return jseqv(q);
    }
    const struct jv paths = jsplit(c, path.s, jstrz(c, ","), -1, false);
    for (size_t i = 0; i < paths.q->n; i++)
        jseq_add(c, q, fold_case(c, follow(c, item, paths.q->v[i], missing), case_sensitive));
    return jseqv(q);
}

FILTER(f_sort)
{
    (void)raw;
    struct jseq *q = list_of(c, jiter(c, v), SEQ_LIST);
    struct jv *keys = jalloc(c, q->n, sizeof *keys);
    for (size_t i = 0; i < q->n; i++)
        keys[i] = sort_key(c, q->v[i], a[2], a[1]);
    jsort(c, keys, q->v, q->n, jtruth(a[0]));
    return jseqv(q);
}

static struct jv pair(struct jctx *c, struct jv one, struct jv two, enum jseq_kind kind)
{
    struct jseq *q = jseq_new(c, kind, 2);
    jseq_add(c, q, one);
    jseq_add(c, q, two);
    return jseqv(q);
}

FILTER(f_dictsort)
{
    (void)raw;
    const bool by_value = a[1].type == J_STR && jstr_is(a[1].s, "value");
    if (jgiven(a[1]) && !by_value && !(a[1].type == J_STR && jstr_is(a[1].s, "key")))
        jfail(c, "You can only sort by either \"key\" or \"value\"");
    if (v.type == J_UNDEF)
        jfail_undef(c, v);
    if (v.type != J_DICT)
        jfail(c, "'%s' object has no attribute 'items'", jtype_name(v));
    struct jseq *q = jseq_new(c, SEQ_LIST, v.m->n);
    struct jv *keys = jalloc(c, v.m->n, sizeof *keys);
    for (size_t i = 0; i < v.m->n; i++) {
        const struct jpair *e = &v.m->e[i];
        keys[i] = fold_case(c, by_value ? e->value : e->key, a[0]);
        jseq_add(c, q, pair(c, e->key, e->value, SEQ_TUPLE));
    }
    jsort(c, keys, q->v, q->n, jtruth(a[2]));
    return jseqv(q);
}

FILTER(f_unique)
{
    (void)raw;
    const struct jspan s = jiter(c, v);
    struct jseq *q = jseq_new(c, SEQ_GEN, 0);
    struct jdict *seen = jdict_new(c);
    for (size_t i = 0; i < s.n; i++) {
        const struct jv key = fold_case(c, follow(c, s.v[i], a[1], missing), a[0]);
        if (jgiven(jdict_get(c, seen, key)))
            continue;
        jdict_set(c, seen, key, jnone());
        jseq_add(c, q, s.v[i]);
    }
    return jseqv(q);
}

FILTER(f_groupby)
{
    (void)raw;
    struct jseq *q = list_of(c, jiter(c, v), SEQ_LIST), *r = jseq_new(c, SEQ_LIST, 0);
    struct jv *keys = jalloc(c, q->n, sizeof *keys);
    for (size_t i = 0; i < q->n; i++)
        keys[i] = fold_case(c, follow(c, q->v[i], a[0], a[1]), a[2]);
    jsort(c, keys, q->v, q->n, false);
    for (size_t i = 0; i < q->n;) {
        struct jseq *group = jseq_new(c, SEQ_LIST, 0);
        const size_t first = i;
        do
            jseq_add(c, group, q->v[i++]);
        while (i < q->n && jeq(c, keys[i], keys[first]));
        const struct jv name = jtruth(a[2]) ? keys[first] : follow(c, q->v[first], a[0], a[1]);
        jseq_add(c, r, pair(c, name, jseqv(group), SEQ_GROUP));
    }
    return jseqv(r);
}

static int64_t count_arg(struct jctx *c, struct jv v, const char *what)
{
    int64_t n;
    if (!jget_int(v, &n))
        jfail(c, "%s must be an integer, not %s", what, jtype_name(v));
    return n;
}

FILTER(f_batch)
{
    (void)raw;
    const struct jspan s = jiter(c, v);
    const int64_t n = count_arg(c, a[0], "linecount");
    struct jseq *r = jseq_new(c, SEQ_GEN, 0), *row = jseq_new(c, SEQ_LIST, 0);
    for (size_t i = 0; i < s.n; i++) {
        if ((int64_t)row->n == n) {
            jseq_add(c, r, jseqv(row));
            row = jseq_new(c, SEQ_LIST, 0);
        }
        jseq_add(c, row, s.v[i]);
    }
    while (row->n > 0 && jgiven(a[1]) && a[1].type != J_NONE && (int64_t)row->n < n)
        jseq_add(c, row, a[1]);
    if (row->n > 0)
        jseq_add(c, r, jseqv(row));
    return jseqv(r);
}

FILTER(f_slice)
{
    (void)raw;
    const struct jspan s = jiter(c, v);
    const int64_t n = count_arg(c, a[0], "slices");
    struct jseq *r = jseq_new(c, SEQ_GEN, 0);
    if (n == 0)
        jfail(c, "integer division or modulo by zero");
    size_t at = 0;
    for (int64_t i = 0; i < n; i++) {
        const bool more = (size_t)i < s.n % (size_t)n;
        const size_t size = s.n / (size_t)n + more;
        struct jseq *part = jseq_new(c, SEQ_LIST, 0);
        for (size_t k = 0; k < size; k++)
            jseq_add(c, part, s.v[at++]);
        if (!more && jgiven(a[1]) && a[1].type != J_NONE)
            jseq_add(c, part, a[1]);
        jseq_add(c, r, jseqv(part));
    }
    return jseqv(r);
}

FILTER(f_items)
{
    (void)raw, (void)a;
    if (v.type != J_UNDEF && v.type != J_DICT)
        jfail(c, "Can only get item pairs from a mapping.");
    struct jseq *q = jseq_new(c, SEQ_GEN, 0);
    for (size_t i = 0; v.type == J_DICT && i < v.m->n; i++)
        jseq_add(c, q, pair(c, v.m->e[i].key, v.m->e[i].value, SEQ_TUPLE));
    return jseqv(q);
}

/* --- map, select and their kin ------------------------------------------------------------------------- */

static const struct jrow *row_arg(struct jctx *c, struct jv name, bool filter)
{
    if (name.type != J_STR)
        jfail(c, "the name of a %s must be a string, not %s", filter ? "filter" : "test",
              jtype_name(name));
    const struct jrow *row = filter ? jfilter_find(name.s->s, name.s->len)
                                    : jtest_find(name.s->s, name.s->len);
    if (row == NULL)
        jfail(c, "there is no %s named '%.*s'", filter ? "filter" : "test",
              name.s->len < 60 ? (int)name.s->len : 60, name.s->s);
    return row;
}

static struct jargs rest_of(const struct jargs *raw, size_t from)
{
    struct jargs r = *raw;
    r.pos = raw->npos > from ? raw->pos + from : NULL;
    r.npos = raw->npos > from ? raw->npos - from : 0;
    return r;
}

static struct jv map_attribute(struct jctx *c, struct jspan s, const struct jargs *raw)
{
    struct jv path = missing, otherwise = missing;
    for (size_t i = 0; i < raw->nkw; i++) {
        if (jstr_is(raw->kw[i].name.s, "attribute"))
            path = raw->kw[i].value;
        else if (jstr_is(raw->kw[i].name.s, "default"))
            otherwise = raw->kw[i].value;
        else
            jfail(c, "Unexpected keyword argument '%.*s'", (int)raw->kw[i].name.s->len,
                  raw->kw[i].name.s->s);
    }
    if (!jgiven(path))
        jfail(c, "map requires a filter argument");
    struct jseq *q = jseq_new(c, SEQ_GEN, s.n);
    for (size_t i = 0; i < s.n; i++)
        jseq_add(c, q, follow(c, s.v[i], path, otherwise));
    return jseqv(q);
}

FILTER(f_map)
{
    (void)a;
    struct jseq *q = jseq_new(c, SEQ_GEN, 0);
    if (!jtruth(v))
        return jseqv(q);
    const struct jspan s = jiter(c, v);
    if (raw->npos == 0)
        return map_attribute(c, s, raw);
    const struct jrow *row = row_arg(c, raw->pos[0], true);
    const struct jargs rest = rest_of(raw, 1);
    jenter(c); /* map(map(...)) recurses */
    for (size_t i = 0; i < s.n; i++)
        jseq_add(c, q, jrow_run(c, row, s.v[i], &rest));
    jleave(c);
    return jseqv(q);
}

static struct jv choose(struct jctx *c, struct jv v, const struct jargs *raw, bool attr, bool want)
{
    struct jseq *q = jseq_new(c, SEQ_GEN, 0);
    if (!jtruth(v))
        return jseqv(q);
    if (attr && raw->npos == 0)
        jfail(c, "Missing parameter for attribute name");
    const struct jspan s = jiter(c, v);
    const struct jrow *row = raw->npos > (size_t)attr ? row_arg(c, raw->pos[attr], false) : NULL;
    const struct jargs rest = rest_of(raw, (size_t)attr + 1);
    for (size_t i = 0; i < s.n; i++) {
        struct jv x = attr ? follow(c, s.v[i], raw->pos[0], missing) : s.v[i];
        if (row != NULL)
            x = jrow_run(c, row, x, &rest);
        if (jtruth(x) == want)
            jseq_add(c, q, s.v[i]);
    }
    return jseqv(q);
}

FILTER(f_select) { (void)a; return choose(c, v, raw, false, true); }
FILTER(f_reject) { (void)a; return choose(c, v, raw, false, false); }
FILTER(f_selectattr) { (void)a; return choose(c, v, raw, true, true); }
FILTER(f_rejectattr) { (void)a; return choose(c, v, raw, true, false); }

const struct jrow jfilters_seq[] = {
    { "batch", f_batch, "linecount fill_with", 1 },
    { "dictsort", f_dictsort, "case_sensitive by reverse", 0 },
    { "first", f_first, "", 0 },
    { "groupby", f_groupby, "attribute default case_sensitive", 1 },
    { "items", f_items, "", 0 },
    { "join", f_join, "d attribute", 0 },
    { "last", f_last, "", 0 },
    { "list", f_list, "", 0 },
    { "map", f_map, NULL, 0 },
    { "max", f_max, "case_sensitive attribute", 0 },
    { "min", f_min, "case_sensitive attribute", 0 },
    { "reject", f_reject, NULL, 0 },
    { "rejectattr", f_rejectattr, NULL, 0 },
    { "reverse", f_reverse, "", 0 },
    { "select", f_select, NULL, 0 },
    { "selectattr", f_selectattr, NULL, 0 },
    { "slice", f_slice, "slices fill_with", 1 },
    { "sort", f_sort, "reverse case_sensitive attribute", 0 },
    { "sum", f_sum, "attribute start", 0 },
    { "unique", f_unique, "case_sensitive attribute", 0 },
    { NULL, NULL, NULL, 0 },
};
