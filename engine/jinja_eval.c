/* jinja_eval.c - expressions to values. */
#include "engine/jinja_int.h"

#include <string.h>

/* --- variables ------------------------------------------------------------------------------------ */

struct jv jlookup(struct jctx *c, const struct jscope *s, const struct jname *name)
{
    for (; s != NULL; s = s->parent)
        for (size_t i = s->n; i > 0; i--)
            if (s->v[i - 1].name == name)
                return s->v[i - 1].value;
    const struct jv key = { .type = J_STR, .s = name->s };
    struct jv v = jdict_get(c, c->vars, key);
    if (!jgiven(v))
        v = jglobal(name->s);
    return jgiven(v) ? v : jundef(c, (struct jv){ .type = J_MISSING }, key);
}

void jbind(struct jctx *c, struct jscope *s, const struct jname *name, struct jv v)
{
    for (size_t i = 0; i < s->n; i++)
        if (s->v[i].name == name) {
            s->v[i].value = v;
            return;
        }
    if (s->n == s->cap) {
        const size_t cap = s->cap ? 2 * s->cap : 4;
        struct jbind *p = jalloc(c, cap, sizeof *p);
        if (s->n > 0)
            memcpy(p, s->v, s->n * sizeof *p);
        s->v = p;
        s->cap = cap;
    }
    s->v[s->n++] = (struct jbind){ name, v };
}

/* --- calls ------------------------------------------------------------------------------------------ */

static void add_kw(struct jctx *c, struct jargs *r, struct jv name, struct jv value)
{
    for (size_t i = 0; i < r->nkw; i++)
        if (jeq(c, r->kw[i].name, name))
            jfail(c, "got multiple values for keyword argument '%.*s'", (int)name.s->len,
                  name.s->s);
    r->kw[r->nkw++] = (struct jkw){ name, value };
}

struct jargs jeval_args(struct jctx *c, struct jscope *s, const struct jnargs *a)
{
    struct jargs r = { 0 };
    struct jspan star = { NULL, 0 };
    struct jv stars = { .type = J_MISSING };
    size_t nkw = a->kw.n;
    struct jv *own = jalloc(c, a->pos.n, sizeof *own);
    for (size_t i = 0; i < a->pos.n; i++)
        own[i] = jeval(c, s, a->pos.v[i]);
    if (a->star != NULL)
        star = jiter(c, jeval(c, s, a->star));
    r.pos = own;
    r.npos = a->pos.n + star.n;
    if (star.n > 0) {
        r.pos = jalloc(c, r.npos, sizeof *r.pos);
        memcpy(r.pos, own, a->pos.n * sizeof *own);
        memcpy(r.pos + a->pos.n, star.v, star.n * sizeof *own);
    }
    if (a->stars != NULL) {
        stars = jeval(c, s, a->stars);
        if (stars.type != J_DICT)
            jfail(c, "argument after ** must be a mapping, not %s", jtype_name(stars));
        nkw += stars.m->n;
    }
    r.kw = jalloc(c, nkw + 1, sizeof *r.kw); /* one more for `caller` */
    for (size_t i = 0; i < a->kw.n; i++)
        add_kw(c, &r, (struct jv){ .type = J_STR, .s = a->kwname[i]->s }, jeval(c, s, a->kw.v[i]));
    for (size_t i = 0; jgiven(stars) && i < stars.m->n; i++) {
        if (stars.m->e[i].key.type != J_STR)
            jfail(c, "keywords must be strings");
        add_kw(c, &r, stars.m->e[i].key, stars.m->e[i].value);
    }
    return r;
}

/* Does the word at `list` (words with spaces between) equal `s`? */
static bool is_word(const char *list, const struct jstr *s)
{
    const size_t n = strcspn(list, " ");
    return n == s->len && memcmp(list, s->s, n) == 0;
}

static void sort_args(struct jctx *c, const struct jrow *row, const struct jargs *a, struct jv *out)
{
    size_t n = 0;
    for (const char *p = row->params; *p != '\0'; p += strcspn(p, " "), p += *p == ' ', n++)
        if (n < a->npos)
            out[n] = a->pos[n];
    if (a->npos > n)
        jfail(c, "%s takes at most %zu arguments, not %zu", row->name, n, a->npos);
    for (size_t k = 0; k < a->nkw; k++) {
        size_t i = 0;
        const char *p = row->params;
        while (*p != '\0' && !is_word(p, a->kw[k].name.s)) {
            p += strcspn(p, " ");
            p += *p == ' ';
            i++;
        }
        if (*p == '\0' || jgiven(out[i]))
            jfail(c, "%s got an unexpected or repeated argument '%.*s'", row->name,
                  (int)a->kw[k].name.s->len, a->kw[k].name.s->s);
        out[i] = a->kw[k].value;
    }
    for (size_t i = 0; i < (size_t)row->required; i++)
        if (!jgiven(out[i]))
            jfail(c, "%s needs %d argument%s", row->name, row->required,
                  row->required == 1 ? "" : "s");
}

struct jv jrow_run(struct jctx *c, const struct jrow *row, struct jv self, const struct jargs *a)
{
    struct jv out[JPARAMS_MAX] = { { .type = J_MISSING } };
    if (row->params != NULL)
        sort_args(c, row, a, out);
    return row->run(c, self, a, out);
}

struct jv jcall(struct jctx *c, struct jv f, const struct jargs *a)
{
    struct jv r;
    const int line = c->line;
    jenter(c);
    switch (f.type) {
    case J_MACRO: r = jmacro_call(c, f.macro, a); break;
    case J_FUNC: r = jrow_run(c, f.func, jnone(), a); break;
    case J_METHOD: r = jrow_run(c, f.method->row, f.method->self, a); break;
    case J_LOOP: r = jloop_call(c, f.loop, a); break;
    case J_UNDEF: jfail_undef(c, f);
    default: jfail(c, "'%s' object is not callable", jtype_name(f));
    }
    c->line = line;
    jleave(c);
    return r;
}

/* --- expressions ------------------------------------------------------------------------------------ */

static struct jv eval_items(struct jctx *c, struct jscope *s, const struct jnode *n)
{
    struct jseq *q = jseq_new(c, n->type == E_LIST ? SEQ_LIST : SEQ_TUPLE, n->list.n);
    for (size_t i = 0; i < n->list.n; i++)
        jseq_add(c, q, jeval(c, s, n->list.v[i]));
    return jseqv(q);
}

static struct jv eval_dict(struct jctx *c, struct jscope *s, const struct jnode *n)
{
    struct jdict *m = jdict_new(c);
    for (size_t i = 0; i < n->list.n; i++) {
        const struct jv key = jeval(c, s, n->list.v[i]);
        jdict_set(c, m, key, jeval(c, s, n->other.v[i]));
    }
    return jdictv(m);
}

static struct jv part(struct jctx *c, struct jscope *s, const struct jnode *n)
{
    return n ? jeval(c, s, n) : jnone();
}

static struct jv eval_item(struct jctx *c, struct jscope *s, const struct jnode *n)
{
    const struct jv obj = jeval(c, s, n->a);
    if (n->b->type == E_SLICE) {
        const struct jv from = part(c, s, n->b->a), to = part(c, s, n->b->b);
        return jslice(c, obj, from, to, part(c, s, n->b->d));
    }
    return jitem(c, obj, jeval(c, s, n->b));
}

static struct jv eval_compare(struct jctx *c, struct jscope *s, const struct jnode *n)
{
    struct jv left = jeval(c, s, n->a);
    for (size_t i = 0; i < n->list.n; i++) {
        const struct jv right = jeval(c, s, n->list.v[i]);
        if (!jrelation(c, n->ops[i], left, right))
            return jbool(false);
        left = right;
    }
    return jbool(true);
}

static struct jv eval_concat(struct jctx *c, struct jscope *s, const struct jnode *n)
{
    struct jv r = jtostr(c, jeval(c, s, n->list.v[0]));
    for (size_t i = 1; i < n->list.n; i++) {
        const struct jv next = jtostr(c, jeval(c, s, n->list.v[i]));
        r = jcat(c, r.s, next.s);
    }
    return r;
}

static struct jv eval_row(struct jctx *c, struct jscope *s, const struct jnode *n)
{
    const struct jv self = jeval(c, s, n->a);
    if (n->row == NULL)
        jfail(c, "there is no %s named '%.*s'", n->type == E_FILTER ? "filter" : "test",
              (int)n->name->s->len, n->name->s->s);
    const struct jargs a = jeval_args(c, s, n->args);
    c->line = n->line;
    return jrow_run(c, n->row, self, &a); /* cppcheck-suppress returnDanglingLifetime */
}

static struct jv eval_call(struct jctx *c, struct jscope *s, const struct jnode *n)
{
    const struct jv f = jeval(c, s, n->a);
    const struct jargs a = jeval_args(c, s, n->args);
    c->line = n->line;
    return jcall(c, f, &a); /* cppcheck-suppress returnDanglingLifetime */
}

static struct jv eval_two(struct jctx *c, struct jscope *s, const struct jnode *n)
{
    const struct jv a = jeval(c, s, n->a);
    if (n->type == E_AND)
        return jtruth(a) ? jeval(c, s, n->b) : a;
    if (n->type == E_OR)
        return jtruth(a) ? a : jeval(c, s, n->b);
    const struct jv b = jeval(c, s, n->b);
    c->line = n->line;
    return jbinary(c, n->op, a, b);
}

static struct jv eval_cond(struct jctx *c, struct jscope *s, const struct jnode *n)
{
    if (jtruth(jeval(c, s, n->a)))
        return jeval(c, s, n->b);
    if (n->d != NULL)
        return jeval(c, s, n->d);
    return jundef_hint(c, "the inline if-expression on line %d evaluated to false and no else section "
                       "was defined", n->line);
}

struct jv jeval(struct jctx *c, struct jscope *s, const struct jnode *n)
{
    struct jv r;
    jenter(c);
    c->line = n->line;
    switch (n->type) {
    case E_CONST: r = n->value; break;
    case E_NAME: r = jlookup(c, s, n->name); break;
    case E_TUPLE:
    case E_LIST: r = eval_items(c, s, n); break;
    case E_DICT: r = eval_dict(c, s, n); break;
    case E_ATTR: r = jattr(c, jeval(c, s, n->a), (struct jv){ .type = J_STR, .s = n->name->s }); break;
    case E_ITEM: r = eval_item(c, s, n); break;
    case E_CALL: r = eval_call(c, s, n); break;
    case E_FILTER: r = eval_row(c, s, n); break;
    case E_TEST: r = eval_row(c, s, n); break;
    case E_COND: r = eval_cond(c, s, n); break;
    case E_AND:
    case E_OR:
    case E_BINARY: r = eval_two(c, s, n); break;
    case E_NOT: r = jbool(!jtruth(jeval(c, s, n->a))); break;
    case E_NEG:
    case E_POS: r = jnegate(c, jeval(c, s, n->a), n->type == E_NEG); break;
    case E_COMPARE: r = eval_compare(c, s, n); break;
    case E_CONCAT: r = eval_concat(c, s, n); break;
    default: jfail(c, "this expression has no value"); /* not reached: the parser makes no others */
    }
    jleave(c);
    return r;
}
