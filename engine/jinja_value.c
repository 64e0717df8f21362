/* jinja_value.c - memory and values: the arena, truth, equality, order, sequences, dicts. */
#include "engine/jinja_int.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* --- memory and failure ------------------------------------------------------------------------ */

struct jblock {
    struct jblock *prev;
    size_t cap, used;
    _Alignas(16) char data[];
};

_Noreturn static void fail_v(struct jctx *c, int rc, const char *slug, const char *fmt, va_list ap)
{
    char msg[sizeof c->err->msg];
    vsnprintf(msg, sizeof msg, fmt, ap);
    c->rc = err_set_slug(c->err, (enum err_code)rc, slug, NULL, "%s", msg);
    longjmp(c->jump, 1);
}

void jfail_plain(struct jctx *c, int rc, const char *slug, const char *fmt, ...)
{
    va_list ap;
    va_start(ap, fmt);
    fail_v(c, rc, slug, fmt, ap);
}

void jfail(struct jctx *c, const char *fmt, ...)
{
    char msg[sizeof c->err->msg];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(msg, sizeof msg, fmt, ap);
    va_end(ap);
    jfail_plain(c, ERR_INVALID, NULL, "%s, line %d: %s", c->name, c->line, msg);
}

/* A block with room for n bytes more at its end. */
static struct jblock *room(struct jctx *c, struct jblock **list, size_t n)
{
    struct jblock *b = *list;
    if (b != NULL && n <= b->cap - b->used)
        return b;
    size_t cap = b == NULL ? 4096 : b->cap < (1 << 20) ? 2 * b->cap : b->cap;
    if (n > (size_t)1 << 40)
        cap = c->max + 1;
    else if (cap < n + n / 2)
        cap = n + n / 2;
    if (cap > c->max - c->used)
        jfail_plain(c, ERR_TOO_LARGE, NULL, "%s, line %d: more than %zu bytes of memory are needed",
                    c->name, c->line, c->max);
    struct jblock *new = malloc(sizeof *new + cap);
    if (new == NULL)
        jfail_plain(c, ERR_NOMEM, NULL, "out of memory");
    c->used += cap;
    *new = (struct jblock){ .prev = b, .cap = cap };
    *list = new;
    return new;
}

void *jalloc(struct jctx *c, size_t n, size_t size)
{
    size_t bytes;
    if (__builtin_mul_overflow(n, size, &bytes) || bytes > SIZE_MAX / 4)
        bytes = SIZE_MAX / 4;
    bytes = (bytes + 15) & ~(size_t)15;
    struct jblock *b = room(c, &c->heap, bytes);
    void *p = b->data + b->used;
    b->used += bytes;
    return memset(p, 0, bytes);
}

char *jbytes(struct jctx *c, size_t n)
{
    struct jblock *b = room(c, &c->text, n);
    char *p = b->data + b->used;
    b->used += n;
    return p;
}

static void free_blocks(struct jblock *b)
{
    while (b != NULL) {
        struct jblock *prev = b->prev;
        free(b);
        b = prev;
    }
}

void jctx_free(struct jctx *c)
{
    free_blocks(c->heap);
    free_blocks(c->text);
    c->heap = c->text = NULL;
}

void jcharge(struct jctx *c, size_t n)
{
    if (n > (size_t)c->steps) {
        c->steps = 0;
        jfail_plain(c, ERR_TOO_LARGE, NULL, "%s, line %d: the template takes too many steps",
                    c->name, c->line);
    }
    c->steps -= (int64_t)n;
}

void jenter(struct jctx *c)
{
    jcharge(c, 1);
    if (++c->depth > JDEPTH_MAX)
        jfail_plain(c, ERR_TOO_LARGE, NULL, "%s, line %d: nested too deep", c->name, c->line);
}

/* a + b: where a's bytes are the newest there are, b's go right behind them and both strings share
 * the beginning.  A template that adds to a string again and again takes linear time. */
struct jv jcat(struct jctx *c, const struct jstr *a, const struct jstr *b)
{
    struct jstr *s = jalloc(c, 1, sizeof *s);
    struct jblock *top = c->text;
    jcharge(c, b->len / 64);
    *s = (struct jstr){ a->s, a->len + b->len, a->chars + b->chars, false };
    if (top != NULL && a->len > 0 && a->s + a->len == top->data + top->used &&
        a->s >= top->data && b->len <= top->cap - top->used) {
        memcpy(top->data + top->used, b->s, b->len);
        top->used += b->len;
    } else {
        jcharge(c, a->len / 64);
        char *p = jbytes(c, a->len + b->len);
        memcpy(p, a->s, a->len);
        memcpy(p + a->len, b->s, b->len);
        s->s = p;
    }
    return (struct jv){ .type = J_STR, .s = s };
}

/* --- values ---------------------------------------------------------------------------------- */

struct jv jundef(struct jctx *c, struct jv of, struct jv name)
{
    struct jundef *u = jalloc(c, 1, sizeof *u);
    u->of = of;
    u->name = name;
    return (struct jv){ .type = J_UNDEF, .undef = u };
}

struct jv jundef_hint(struct jctx *c, const char *fmt, ...)
{
    char msg[256];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(msg, sizeof msg, fmt, ap);
    va_end(ap);
    struct jundef *u = jalloc(c, 1, sizeof *u);
    u->hint = jstr_z(c, jstrz(c, msg).s);
    return (struct jv){ .type = J_UNDEF, .undef = u };
}

void jfail_undef(struct jctx *c, struct jv v)
{
    const struct jundef *u = v.undef;
    if (u->hint != NULL)
        jfail(c, "%s", u->hint);
    struct jout o = { 0 };
    jrepr(c, &o, u->name);
    const int n = o.len < 200 ? (int)o.len : 200;
    if (u->of.type == J_MISSING)
        jfail(c, "%.*s is undefined", n, o.s);
    const bool none = u->of.type == J_NONE;
    if (u->name.type == J_STR)
        jfail(c, "'%s%s' has no attribute %.*s", none ? "None" : jtype_name(u->of),
              none ? "" : " object", n, o.s);
    jfail(c, "%s%s has no element %.*s", none ? "None" : jtype_name(u->of), none ? "" : " object",
          n, o.s);
}

const char *jtype_name(struct jv v)
{
    static const char *const seq[] = { "list", "tuple", "tuple", "range", "dict_keys",
                                       "dict_values", "dict_items", "generator" };
    static const char *const type[] = { "missing", "Undefined", "NoneType", "bool", "int", "float",
                                        "str", "", "dict", "Namespace", "Macro", "function",
                                        "builtin_function_or_method", "LoopContext" };
    if (v.type == J_STR && v.s->safe)
        return "Markup";
    return v.type == J_SEQ ? seq[v.q->kind] : type[v.type];
}

bool jtruth(struct jv v)
{
    switch (v.type) {
    case J_MISSING:
    case J_UNDEF:
    case J_NONE: return false;
    case J_BOOL: return v.b;
    case J_INT: return v.i != 0;
    case J_FLOAT: return v.d != 0;
    case J_STR: return v.s->len > 0;
    case J_SEQ: return v.q->kind == SEQ_GEN || v.q->n > 0;
    case J_DICT: return v.m->n > 0;
    default: return true;
    }
}

bool jget_int(struct jv v, int64_t *ret)
{
    if (v.type != J_INT && v.type != J_BOOL)
        return false;
    *ret = v.type == J_INT ? v.i : v.b;
    return true;
}

bool jis_number(struct jv v) { return v.type == J_INT || v.type == J_BOOL || v.type == J_FLOAT; }

double jnumber(struct jv v)
{
    return v.type == J_FLOAT ? v.d : v.type == J_INT ? (double)v.i : (double)v.b;
}

/* Numbers of any kind; -2 for "not comparable" (NaN). */
static int order_numbers(struct jv a, struct jv b)
{
    int64_t x, y;
    if (jget_int(a, &x) && jget_int(b, &y))
        return (x > y) - (x < y);
    /* 64 bits of mantissa where long double has them: an int is then compared exactly */
    const long double p = a.type == J_INT ? (long double)a.i : (long double)jnumber(a);
    const long double q = b.type == J_INT ? (long double)b.i : (long double)jnumber(b);
    if (isnan(p) || isnan(q))
        return -2;
    return (p > q) - (p < q);
}

static int order_text(struct jctx *c, const struct jstr *a, const struct jstr *b)
{
    const size_t n = a->len < b->len ? a->len : b->len;
    jcharge(c, n / 64);
    const int d = n > 0 ? memcmp(a->s, b->s, n) : 0;
    return d != 0 ? d : (a->len > b->len) - (a->len < b->len);
}

static bool is_tuple(struct jv v)
{
    return v.type == J_SEQ && (v.q->kind == SEQ_TUPLE || v.q->kind == SEQ_GROUP);
}

static bool same_kind(struct jv a, struct jv b)
{
    return (is_tuple(a) && is_tuple(b)) || a.q->kind == b.q->kind;
}

static bool eq_seq(struct jctx *c, struct jv a, struct jv b)
{
    if (a.q == b.q)
        return true;
    if (!same_kind(a, b) || a.q->kind == SEQ_GEN || a.q->kind == SEQ_VALUES || a.q->n != b.q->n)
        return false;
    for (size_t i = 0; i < a.q->n; i++)
        if (!jeq(c, a.q->v[i], b.q->v[i]))
            return false;
    return true;
}

static bool eq_dict(struct jctx *c, const struct jdict *a, const struct jdict *b)
{
    if (a == b)
        return true;
    if (a->n != b->n)
        return false;
    for (size_t i = 0; i < a->n; i++) {
        const struct jv v = jdict_get(c, b, a->e[i].key);
        if (!jgiven(v) || !jeq(c, a->e[i].value, v))
            return false;
    }
    return true;
}

bool jeq(struct jctx *c, struct jv a, struct jv b)
{
    jenter(c);
    bool same = false;
    if (jis_number(a) && jis_number(b))
        same = order_numbers(a, b) == 0;
    else if (a.type != b.type)
        same = false;
    else if (a.type == J_STR)
        same = a.s->len == b.s->len && order_text(c, a.s, b.s) == 0;
    else if (a.type == J_SEQ)
        same = eq_seq(c, a, b);
    else if (a.type == J_DICT)
        same = eq_dict(c, a.m, b.m);
    else if (a.type == J_UNDEF || a.type == J_NONE)
        same = true;
    else if (a.type == J_METHOD)
        same = a.method->row == b.method->row && jeq(c, a.method->self, b.method->self);
    else
        same = a.m == b.m; /* one thing */
    jleave(c);
    return same;
}

int jcompare(struct jctx *c, struct jv a, struct jv b, const char *op)
{
    if (a.type == J_UNDEF)
        jfail_undef(c, a);
    if (b.type == J_UNDEF)
        jfail_undef(c, b);
    jenter(c);
    int d;
    if (jis_number(a) && jis_number(b)) {
        d = order_numbers(a, b);
        d = d == -2 ? 1 : d;
    } else if (a.type == J_STR && b.type == J_STR) {
        d = order_text(c, a.s, b.s);
    } else if (a.type == J_SEQ && b.type == J_SEQ && same_kind(a, b) &&
               (a.q->kind == SEQ_LIST || is_tuple(a))) {
        size_t i = 0;
        while (i < a.q->n && i < b.q->n && jeq(c, a.q->v[i], b.q->v[i]))
            i++;
        d = i < a.q->n && i < b.q->n ? jcompare(c, a.q->v[i], b.q->v[i], op)
                                     : (a.q->n > b.q->n) - (a.q->n < b.q->n);
    } else {
        jfail(c, "'%s' not supported between instances of '%s' and '%s'", op, jtype_name(a),
              jtype_name(b));
    }
    jleave(c);
    return d;
}

/* --- sequences ---------------------------------------------------------------------------------- */

struct jseq *jseq_new(struct jctx *c, enum jseq_kind kind, size_t cap)
{
    struct jseq *q = jalloc(c, 1, sizeof *q);
    q->kind = kind;
    q->cap = cap;
    q->v = cap > 0 ? jalloc(c, cap, sizeof *q->v) : NULL;
    return q;
}

void jseq_add(struct jctx *c, struct jseq *q, struct jv v)
{
    jcharge(c, 1);
    if (q->n == q->cap) {
        const size_t cap = q->cap ? 2 * q->cap : 8;
        struct jv *p = jalloc(c, cap, sizeof *p);
        if (q->n > 0)
            memcpy(p, q->v, q->n * sizeof *p);
        q->v = p;
        q->cap = cap;
    }
    q->v[q->n++] = v; /* NOLINT(clang-analyzer-core.NullDereference): there is room */
}

bool jiterable(struct jv v)
{
    return v.type == J_STR || v.type == J_SEQ || v.type == J_DICT || v.type == J_UNDEF;
}

static struct jspan chars_of(struct jctx *c, const struct jstr *s)
{
    struct jspan r = { jalloc(c, s->chars, sizeof *r.v), 0 };
    for (size_t at = 0; at < s->len;) {
        uint32_t cp;
        const size_t n = jdecode(s->s + at, &cp);
        r.v[r.n++] = jstr_part(c, s, at, at + n);
        at += n;
    }
    return r;
}

struct jspan jiter(struct jctx *c, struct jv v)
{
    struct jspan r = { NULL, 0 };
    if (v.type == J_SEQ) {
        r = (struct jspan){ v.q->v, v.q->n };
        if (v.q->kind == SEQ_GEN)
            v.q->n = 0;
    } else if (v.type == J_STR) {
        r = chars_of(c, v.s);
    } else if (v.type == J_DICT) {
        r.v = jalloc(c, v.m->n, sizeof *r.v);
        for (; r.n < v.m->n; r.n++)
            r.v[r.n] = v.m->e[r.n].key;
    } else if (v.type != J_UNDEF) {
        jfail(c, "'%s' object is not iterable", jtype_name(v));
    }
    jcharge(c, r.n);
    return r;
}

size_t jlen(struct jctx *c, struct jv v)
{
    if (v.type == J_STR)
        return v.s->chars;
    if (v.type == J_SEQ && v.q->kind != SEQ_GEN)
        return v.q->n;
    if (v.type == J_DICT)
        return v.m->n;
    if (v.type != J_UNDEF)
        jfail(c, "object of type '%s' has no len()", jtype_name(v));
    return 0;
}

/* Merge sort, because a comparison may jump away and must see each pair once. */
static void sort_range(struct jctx *c, struct jv *k, struct jv *v, struct jv *tk, struct jv *tv,
                       size_t n, bool reverse)
{
    if (n < 2)
        return;
    const size_t half = n / 2;
    sort_range(c, k, v, tk, tv, half, reverse);
    sort_range(c, k + half, v + half, tk, tv, n - half, reverse);
    size_t i = 0, j = half;
    for (size_t o = 0; o < n; o++) {
        bool left = i < half;
        if (left && j < n) {
            const int d = jcompare(c, k[j], k[i], "<");
            left = reverse ? d <= 0 : d >= 0;
        }
        const size_t from = left ? i++ : j++;
        tk[o] = k[from];
        tv[o] = v[from];
    }
    memcpy(k, tk, n * sizeof *k);
    memcpy(v, tv, n * sizeof *v);
}

void jsort(struct jctx *c, struct jv *keys, struct jv *items, size_t n, bool reverse)
{
    struct jv *tk = jalloc(c, n, sizeof *tk), *tv = jalloc(c, n, sizeof *tv);
    sort_range(c, keys, items, tk, tv, n, reverse);
}

/* --- dicts ------------------------------------------------------------------------------------- */

enum { SMALL_DICT = 8 };

static uint64_t mix(uint64_t h)
{
    h ^= h >> 33;
    h *= 0xff51afd7ed558ccdULL;
    return h ^ (h >> 33);
}

static uint64_t hash_of(struct jctx *c, struct jv k)
{
    uint64_t h = 0xcbf29ce484222325ULL;
    int64_t i;
    if (k.type == J_STR) {
        jcharge(c, k.s->len / 16);
        for (size_t at = 0; at < k.s->len; at++)
            h = (h ^ (unsigned char)k.s->s[at]) * 0x100000001b3ULL;
        return mix(h);
    }
    if (jget_int(k, &i))
        return mix((uint64_t)i);
    if (k.type == J_FLOAT) {
        if (k.d >= -9e18 && k.d <= 9e18 && k.d == floor(k.d))
            return mix((uint64_t)(int64_t)k.d);
        memcpy(&h, &k.d, sizeof h);
        return mix(h);
    }
    if (is_tuple(k)) {
        jenter(c);
        for (size_t at = 0; at < k.q->n; at++)
            h = mix(h ^ hash_of(c, k.q->v[at]));
        jleave(c);
        return h;
    }
    if (k.type == J_DICT || (k.type == J_SEQ && (k.q->kind == SEQ_LIST || k.q->kind == SEQ_KEYS ||
                                                 k.q->kind == SEQ_ITEMS)))
        jfail(c, "unhashable type: '%s'", jtype_name(k));
    return k.type == J_UNDEF || k.type == J_NONE ? (uint64_t)k.type
                                                 : mix((uint64_t)(uintptr_t)k.m);
}

struct jdict *jdict_new(struct jctx *c) { return jalloc(c, 1, sizeof(struct jdict)); }

static size_t dict_find(struct jctx *c, const struct jdict *m, struct jv key, uint64_t hash)
{
    if (m->index == NULL) {
        for (size_t i = 0; i < m->n; i++)
            if (m->e[i].hash == hash && jeq(c, m->e[i].key, key))
                return i;
        return SIZE_MAX;
    }
    for (size_t at = hash & (m->nindex - 1); m->index[at] != 0; at = (at + 1) & (m->nindex - 1)) {
        const size_t i = m->index[at] - 1;
        jcharge(c, 1);
        if (m->e[i].hash == hash && jeq(c, m->e[i].key, key))
            return i;
    }
    return SIZE_MAX;
}

static void index_put(struct jdict *m, size_t i)
{
    size_t at = m->e[i].hash & (m->nindex - 1);
    while (m->index[at] != 0)
        at = (at + 1) & (m->nindex - 1);
    m->index[at] = (uint32_t)i + 1;
}

static void dict_grow(struct jctx *c, struct jdict *m)
{
    const size_t cap = m->cap ? 2 * m->cap : 4;
    struct jpair *e = jalloc(c, cap, sizeof *e);
    if (m->n > 0)
        memcpy(e, m->e, m->n * sizeof *e);
    m->e = e;
    m->cap = cap;
    if (cap > SMALL_DICT) {
        m->nindex = 2 * cap;
        m->index = jalloc(c, m->nindex, sizeof *m->index);
        for (size_t i = 0; i < m->n; i++)
            index_put(m, i);
    }
}

void jdict_set(struct jctx *c, struct jdict *m, struct jv key, struct jv value)
{
    const uint64_t hash = hash_of(c, key);
    const size_t i = dict_find(c, m, key, hash);
    jcharge(c, 1);
    if (i != SIZE_MAX) {
        m->e[i].value = value;
        return;
    }
    if (m->n == m->cap)
        dict_grow(c, m);
    m->e[m->n] = (struct jpair){ key, value, hash };
    if (m->index != NULL)
        index_put(m, m->n);
    m->n++;
}

struct jv jdict_get(struct jctx *c, const struct jdict *m, struct jv key)
{
    const size_t i = dict_find(c, m, key, hash_of(c, key));
    return i == SIZE_MAX ? (struct jv){ .type = J_MISSING } : m->e[i].value;
}

struct jv jdict_str(struct jctx *c, const struct jdict *m, const char *key)
{
    return jdict_get(c, m, jstr_borrow(c, key, strlen(key)));
}

/* --- from JSON --------------------------------------------------------------------------------- */

struct jv jfrom_json(struct jctx *c, const json_t *j)
{
    struct jv r = jnone();
    jenter(c);
    switch (json_typeof(j)) {
    case JSON_TRUE:
    case JSON_FALSE: r = jbool(json_is_true(j)); break;
    case JSON_INTEGER: r = jint(json_integer_value(j)); break;
    case JSON_REAL: r = jfloat(json_real_value(j)); break;
    case JSON_STRING: r = jstr_borrow(c, json_string_value(j), json_string_length(j)); break;
    case JSON_ARRAY: {
        struct jseq *q = jseq_new(c, SEQ_LIST, json_array_size(j));
        for (size_t i = 0; i < json_array_size(j); i++)
            jseq_add(c, q, jfrom_json(c, json_array_get(j, i)));
        r = jseqv(q);
        break;
    }
    case JSON_OBJECT: {
        struct jdict *m = jdict_new(c);
        const char *key;
        size_t len;
        json_t *v;
        json_object_keylen_foreach((json_t *)j, key, len, v)
            jdict_set(c, m, jstr_borrow(c, key, len), jfrom_json(c, v));
        r = jdictv(m);
        break;
    }
    default: break;
    }
    jleave(c);
    return r;
}
